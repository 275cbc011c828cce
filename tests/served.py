"""``artifactfs serve`` within the test's own process, and the requests that a client sends, one by one."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from artifactfs.serve import server
from artifactfs.serve.keys import KeyFile
from artifactfs.serve.service import Options, Service
from artifactfs.serve.state import State
from artifactfs.store.urls import open_store


@pytest.fixture(autouse=True)
def no_fault(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The server logs no fault of its own, whatever it is sent. For the modules that import this."""
    yield
    faults = [record for record in caplog.get_records("call") if record.exc_info or record.levelno >= logging.ERROR]
    assert not faults, [record.getMessage() for record in faults]


class Served:
    """A server in this process, with keys for those who write and read ``acme`` and write ``other``."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.root = root
        self.keys = KeyFile(root / "keys.json")
        self.writer = self.keys.add("writer", {"acme": "write"})
        self.reader = self.keys.add("reader", {"acme": "read"})
        self.stranger = self.keys.add("stranger", {"other": "write"})
        self.options = Options(**{"port": 0, "shutdown_timeout": 5.0, **options})
        self.store = open_store(str(root / "store"))
        self.service = Service(self.store, None, State(root / "data"), self.keys, self.options)
        self.http = requests.Session()

    @contextlib.contextmanager
    def running(self) -> Iterator[Served]:
        listening = server.bound_socket(self.options)
        self.url = server.url_of(self.options, listening)
        self.port = listening.getsockname()[1]
        stops: list[Any] = []
        ready = threading.Event()

        def note(stop: Any) -> None:
            stops.append(stop)
            ready.set()

        thread = threading.Thread(target=server.run, args=(self.service, listening, note))
        thread.start()
        try:
            assert ready.wait(20)
            yield self
        finally:
            self.http.close()
            for stop in stops:
                stop()
            thread.join(20)
            assert not thread.is_alive()
            self.service.close()

    def graphql(self, query: str, variables: dict[str, Any] | None = None, key: str | None = None) -> dict[str, Any]:
        """The answer, which must be 200."""
        answer = self.post({"query": query, "variables": variables}, key)
        if answer.status_code == 400 and "\\ud" in json.dumps(variables):
            return {"errors": answer.json()["errors"], "data": None}  # text that no JSON can hold
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert isinstance(body, dict)
        return body

    def post(self, body: Any, key: str | None = None) -> requests.Response:
        key = self.writer if key is None else key
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.http.post(f"{self.url}/graphql", data=data, auth=("api", key) if key else None, timeout=30)

    def data(self, query: str, key: str | None = None, **variables: Any) -> Any:
        """What the first field gave, which must not have failed."""
        body = self.graphql(query, variables, key)
        assert "errors" not in body, body
        return next(iter(body["data"].values()))

    def message(self, query: str, key: str | None = None, **variables: Any) -> str:
        """What the first error says."""
        body = self.graphql(query, variables, key)
        assert body.get("errors"), body
        return str(body["errors"][0]["message"])

    def begin(self, key: str | None = None, **changes: Any) -> str:
        """Begin an upload; its id."""
        input = {
            "entityName": "acme",
            "projectName": "p",
            "artifactTypeName": "dataset",
            "artifactCollectionName": "bikes",
            "digest": "0" * 32,
            "aliases": [{"artifactCollectionName": "bikes", "alias": "latest"}],
            **changes,
        }
        return str(self.data(CREATE, key, input=input)["artifact"]["id"])

    def announce(self, artifact: str, name: str, data: bytes, md5: str = "") -> dict[str, Any]:
        """Announce a file of an upload."""
        file = {"artifactID": artifact, "artifactManifestID": "x", "name": name, "md5": md5 or md5_of(data)}
        node = self.data(FILES, input={"artifactFiles": [file], "storageLayout": "V2"})["files"]["edges"][0]["node"]
        assert isinstance(node, dict)
        return node

    def put_manifest(self, artifact: str, manifest: Any, kind: str = "FULL") -> None:
        data = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
        input = {"artifactID": artifact, "name": "m", "digest": md5_of(data), "type": kind}
        file = self.data(MANIFEST, input=input)["artifactManifest"]["file"]
        assert self.http.put(file["uploadUrl"], data=data, timeout=30).status_code == 200

    def log(self, files: dict[str, bytes], collection: str = "bikes", entity: str = "acme", key: str | None = None) -> str:
        """Log a version as the client does; its id."""
        digests = {name: md5_of(data) for name, data in files.items()}
        artifact = self.begin(key, digest=digest_of(digests), artifactCollectionName=collection, entityName=entity, aliases=[])
        contents = {name: {"digest": digests[name], "size": len(data)} for name, data in files.items()}
        for name, data in files.items():
            file = {"artifactID": artifact, "name": name, "md5": digests[name]}
            (edge,) = self.data(FILES, key, input={"artifactFiles": [file]})["files"]["edges"]
            if edge["node"]["uploadUrl"]:
                assert self.http.put(edge["node"]["uploadUrl"], data=data, timeout=30).status_code == 200
        manifest = json.dumps(manifest_of(contents)).encode()
        input = {"artifactID": artifact, "name": "m", "digest": md5_of(manifest), "type": "FULL"}
        url = self.data(MANIFEST, key, input=input)["artifactManifest"]["file"]["uploadUrl"]
        assert self.http.put(url, data=manifest, timeout=30).status_code == 200
        return str(self.data(COMMIT, key, id=artifact)["artifact"]["id"])

    def raw(self, data: bytes, wait: float = 10, ends: bool = True) -> bytes:
        """What comes back for bytes that are sent as they are, until the server closes; ``ends``: they are the last ones."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait) as connection:
            connection.sendall(data)
            if ends:
                connection.shutdown(socket.SHUT_WR)
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
            return answer


CREATE = "mutation M($input: CreateArtifactInput!) { createArtifact(input: $input) { artifact { id state } } }"
FILES = """mutation M($input: CreateArtifactFilesInput!) { createArtifactFiles(input: $input) { files { edges { node {
  uploadUrl uploadHeaders storagePath uploadMultipartUrls { uploadID uploadUrlParts { partNumber uploadUrl } }
  artifact { id } } } } } }"""
MANIFEST = (
    """mutation M($input: X!) { createArtifactManifest(input: $input) { artifactManifest { id file { id uploadUrl } } } }"""
)
COMMIT = "mutation M($id: ID!) { commitArtifact(input: {artifactID: $id}) { artifact { id digest } } }"
NAMED = """query Q($e: String, $p: String, $n: String!) { project(entityName: $e, name: $p) {
  artifactCollectionMembership(name: $n) { versionIndex artifact { id digest aliases { alias } } } } }"""
BY_ID = """query Q($id: ID!) { artifact(id: $id) { id state currentManifest { file { directUrl } }
  files { edges { node { name directUrl } } } } }"""


def upload_of(id: str) -> str:
    """The name of an upload's folder, from its public id."""
    return base64.b64decode(id).decode().rpartition(":")[2]


def md5_of(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data).digest()).decode()


def digest_of(digests: dict[str, str]) -> str:
    text = "wandb-artifact-manifest-v1\n" + "".join(f"{name}:{digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.md5(text.encode()).hexdigest()


def manifest_of(contents: dict[str, Any]) -> dict[str, Any]:
    return {
        "version": 1,
        "storagePolicy": "wandb-storage-policy-v1",
        "storagePolicyConfig": {"storageLayout": "V2"},
        "contents": contents,
    }
