"""The server as a process: killed, stopped and started again in the middle of things; its keys, logs, metrics and TLS."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from served import COMMIT, CREATE, FILES, MANIFEST, digest_of, manifest_of, md5_of
from serving_fixture import PROGRAM, WandbServer, start_server

from artifactfs.names import ArtifactName
from artifactfs.store.urls import open_store

NAME = ArtifactName("acme", "p", "bikes")


class Uploader:
    """A client of one version: what it sent, and can send again to a server that was started again."""

    def __init__(self, files: dict[str, bytes], references: int = 0) -> None:
        self.files = files
        contents: dict[str, Any] = {name: {"digest": md5_of(data), "size": len(data)} for name, data in files.items()}
        for number in range(references):
            contents[f"r/{number:06}"] = {"digest": f"etag-{number}", "ref": f"s3://bucket/{number}", "size": number}
        self.manifest = json.dumps(manifest_of(contents)).encode()
        self._digest = digest_of({name: entry["digest"] for name, entry in contents.items()})
        self.artifact = ""

    def ask(self, server: WandbServer, query: str, timeout: float = 60, **variables: Any) -> Any:
        body = {"query": query, "variables": variables}
        answer = requests.post(f"{server.url}/graphql", json=body, auth=("api", server.key), timeout=timeout).json()
        assert not answer.get("errors"), answer
        return next(iter(answer["data"].values()))

    def begin(self, server: WandbServer) -> dict[str, str]:
        """Announce all; where each file that is not there yet is to be put."""
        if not self.artifact:
            input = {"entityName": "acme", "projectName": "p", "artifactTypeName": "dataset", "digest": self._digest}
            input["artifactCollectionName"] = "bikes"
            self.artifact = self.ask(server, CREATE, input={**input, "aliases": [{"alias": "latest"}]})["artifact"]["id"]
        asked = [{"artifactID": self.artifact, "name": name, "md5": md5_of(data)} for name, data in self.files.items()]
        if not asked:
            return {}
        edges = self.ask(server, FILES, input={"artifactFiles": asked})["files"]["edges"]
        urls = (edge["node"]["uploadUrl"] for edge in edges)
        return {name: url for name, url in zip(self.files, urls, strict=True) if url}

    def put(self, server: WandbServer) -> None:
        """Upload what is not there yet, and the manifest."""
        for name, url in self.begin(server).items():
            assert requests.put(url, data=self.files[name], timeout=30).status_code == 200
        input = {"artifactID": self.artifact, "name": "m", "digest": md5_of(self.manifest), "type": "FULL"}
        url = self.ask(server, MANIFEST, input=input)["artifactManifest"]["file"]["uploadUrl"]
        assert requests.put(url, data=self.manifest, timeout=30).status_code == 200

    def commit(self, server: WandbServer) -> str:
        return str(self.ask(server, COMMIT, id=self.artifact)["artifact"]["id"])


def check_whole(store: str, uploader: Uploader) -> None:
    """There is one version, it has all the bytes, and the store is well."""
    native = open_store(store)
    (version,) = native.versions(NAME)
    assert version.file_count == len(uploader.files) + uploader.manifest.count(b'"ref"')
    assert native.collection(NAME).aliases == {"latest": 0}
    done = subprocess.run([*PROGRAM, "--store", store, "fsck"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@contextlib.contextmanager
def sending(url: str, length: int, first: bytes) -> Iterator[socket.socket]:
    """A PUT of which only the beginning has been sent."""
    host, _, path = url.removeprefix("http://").partition("/")
    name, port = host.split(":")
    with socket.create_connection((name, int(port)), timeout=20) as connection:
        connection.sendall(f"PUT /{path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n\r\n".encode() + first)
        yield connection


def whole(connection: socket.socket) -> bytes:
    """All that comes until the end."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(1 << 20):
            answer += piece
    return answer


def until(holds: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        threading.Event().wait(0.01)


# --- killed ---------------------------------------------------------------------------------------


def test_killed_in_the_middle_of_an_upload(tmp_path: Path) -> None:
    store, data = str(tmp_path / "store"), tmp_path / "data"
    uploader = Uploader({"a": b"first", "b": os.urandom(3 << 20)})
    with start_server(store, data) as server:
        urls = uploader.begin(server)
        assert requests.put(urls["a"], data=b"first", timeout=10).status_code == 200
        with sending(urls["b"], 3 << 20, uploader.files["b"][: 2 << 20]):
            until(lambda: list((data / "pending").rglob("*.tmp")))
            server.process.kill()
            server.process.wait()
        key = server.key
    with start_server(store, data, key=key) as server:
        assert not list((data / "pending").rglob("*.tmp"))
        assert list(uploader.begin(server)) == ["b"]  # the other one is there
        uploader.put(server)
        uploader.commit(server)
        assert not server.tracebacks()
    check_whole(store, uploader)


@pytest.mark.parametrize("delay", [0.0, 0.03, 0.1])
def test_killed_in_the_middle_of_a_commit(tmp_path: Path, delay: float) -> None:
    """Whatever was written by then: the commit, repeated, is one whole version."""
    store, data = str(tmp_path / "store"), tmp_path / "data"
    uploader = Uploader({f"d{n % 7}/{n}": os.urandom(50_000) for n in range(60)} | {"big": os.urandom(9 << 20)})
    with start_server(store, data) as server:
        uploader.put(server)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            committing = pool.submit(uploader.commit, server)
            until(lambda: committing.done() or any("blobs" in str(path) for path in Path(store).glob("*")))
            threading.Event().wait(delay)
            server.process.kill()
            server.process.wait()
            with contextlib.suppress(requests.RequestException):
                committing.result()
        key = server.key
    with contextlib.suppress(Exception):
        assert len(open_store(store).versions(NAME)) <= 1
    with start_server(store, data, key=key) as server:
        assert uploader.commit(server) == uploader.commit(server)
        assert not server.tracebacks()
    check_whole(store, uploader)
    assert not list((data / "pending").iterdir())


# --- stopped --------------------------------------------------------------------------------------


def test_stopped_in_the_middle_of_an_upload_and_a_download(tmp_path: Path) -> None:
    """What goes on is finished; nothing new is taken."""
    store, data = str(tmp_path / "store"), tmp_path / "data"
    with start_server(store, data) as server:
        blob = os.urandom(40 << 20)
        first = Uploader({"blob": blob})
        first.put(server)
        query = "query Q($id: ID!) { artifact(id: $id) { files { edges { node { directUrl } } } } }"
        url = first.ask(server, query, id=first.commit(server))["files"]["edges"][0]["node"]["directUrl"]
        second = Uploader({"b": b"x" * 100_000})
        (upload,) = second.begin(server).values()
        host, _, path = url.removeprefix("http://").partition("/")
        with (
            sending(upload, 100_000, b"x" * 70_000) as putting,
            socket.create_connection((host.split(":")[0], int(host.split(":")[1])), timeout=20) as getting,
        ):
            getting.sendall(f"GET /{path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            got = getting.recv(1000)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: _refused(host))
            putting.sendall(b"x" * 30_000)
            assert whole(putting).startswith(b"HTTP/1.1 200")
            got += whole(getting)
        assert got.partition(b"\r\n\r\n")[2] == blob
        assert server.process.wait(20) == 0
        assert not server.tracebacks()


def _refused(host: str) -> bool:
    try:
        socket.create_connection((host.split(":")[0], int(host.split(":")[1])), timeout=5).close()
    except OSError:
        return True
    return False


def test_stopped_while_a_client_stalls(tmp_path: Path) -> None:
    """The limit ends it; the upload is as if it had never begun, and can be sent again."""
    store, data = str(tmp_path / "store"), tmp_path / "data"
    uploader = Uploader({"a": b"x" * 100_000})
    with start_server(store, data, "--shutdown-timeout", "1") as server:
        (url,) = uploader.begin(server).values()
        with sending(url, 100_000, b"x" * 50_000) as stalled:
            threading.Event().wait(0.1)
            begun = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(20) == 0
            assert 0.9 < time.monotonic() - begun < 15
            assert b"200 OK" not in whole(stalled)
        assert not server.tracebacks()
        key = server.key
    with start_server(store, data, key=key) as server:
        uploader.put(server)
        uploader.commit(server)
    check_whole(store, uploader)


def test_stopped_in_the_middle_of_a_long_commit(tmp_path: Path) -> None:
    """A commit cannot be interrupted; the process ends all the same, and the commit can be repeated."""
    store, data = str(tmp_path / "store"), tmp_path / "data"
    uploader = Uploader({}, references=60_000)
    with start_server(store, data, "--shutdown-timeout", "1") as server:
        uploader.put(server)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            committing = pool.submit(uploader.commit, server)
            threading.Event().wait(0.5)
            begun = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(20) == 0
            assert time.monotonic() - begun < 15
            with pytest.raises(requests.RequestException):
                committing.result()
        assert not server.tracebacks()
        assert any("did not end in time" in str(line["message"]) for line in server.lines())
        key = server.key
    with start_server(store, data, key=key) as server:
        assert uploader.commit(server) == uploader.commit(server)
        assert not server.tracebacks()
    check_whole(store, uploader)


# --- keys, logs, metrics, TLS ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WandbServer]:
    root = tmp_path_factory.mktemp("operated")
    with start_server(str(root / "store"), root / "data") as running:
        yield running
        assert not running.tracebacks()


def ask(server: WandbServer, key: str) -> requests.Response:
    body = {"query": "{ viewer { username } }"}
    return requests.post(f"{server.url}/graphql", json=body, auth=("api", key), timeout=10)


def test_keys_are_added_at_the_same_time(server: WandbServer) -> None:
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        keys = list(pool.map(lambda number: server.add_key(f"many-{number}", "acme"), range(6)))
    assert len(set(keys)) == 6
    assert [ask(server, key).json()["data"]["viewer"]["username"] for key in keys] == [f"many-{n}" for n in range(6)]
    stored = server.data / "keys.json"
    assert stored.stat().st_mode & 0o777 == 0o600
    assert not [path for path in server.data.iterdir() if path.name.endswith(".tmp")]


def test_a_file_of_keys_that_is_edited(server: WandbServer) -> None:
    stored = server.data / "keys.json"
    before = stored.read_bytes()
    key = server.add_key("edited", "acme")
    try:
        assert ask(server, key).status_code == 200
        for text, status in (("{", 400), ('{"keys": 5}', 400), ('{"keys": []}', 401), (stored.read_text(), 200)):
            stored.write_text(text)
            assert ask(server, key).status_code == status, text[:20]
        stored.chmod(0o640)
        assert ask(server, key).status_code == 403
        stored.unlink()
        assert ask(server, key).status_code == 401
    finally:
        stored.unlink(missing_ok=True)
        stored.write_bytes(before)
        stored.chmod(0o600)
    assert ask(server, server.key).status_code == 200


def test_every_request_has_a_line_and_is_counted(server: WandbServer) -> None:
    answer = ask(server, server.key)
    refused = ask(server, "f" * 40)
    requests.get(server.url + "/no/such/path?key=secret-in-a-query", timeout=10)
    lines = {line.get("request"): line for line in server.lines()}
    line = lines[answer.headers["x-request-id"]]
    assert (line["route"], line["method"], line["status"], line["caller"]) == ("graphql", "POST", 200, "everything")
    assert lines[refused.headers["x-request-id"]]["status"] == 401
    assert all(json.loads(text)["time"].endswith("Z") for text in server.log.read_text().splitlines())
    metrics = requests.get(server.url + "/metrics", timeout=10).text
    for name in ("requests_total", "request_seconds_bucket", "operations_total", "received_bytes_total", "refused_total"):
        assert f"artifactfs_serve_{name}" in metrics
    assert 'artifactfs_serve_refused_total{reason="key"}' in metrics
    said = server.log.read_text() + metrics
    assert server.key not in said and "f" * 40 not in said and "secret-in-a-query" not in said


def test_lines_for_people(tmp_path: Path) -> None:
    with start_server(str(tmp_path / "store"), tmp_path / "data", "--log-format", "text") as server:
        assert ask(server, server.key).status_code == 200
        until(lambda: "route=graphql status=200" in server.log.read_text())
        assert server.key not in server.log.read_text()


def test_a_store_that_is_gone(tmp_path: Path) -> None:
    with start_server(str(tmp_path / "store"), tmp_path / "data") as server:
        assert requests.get(server.url + "/healthz", timeout=10).json() == {"status": "ok"}
        store = tmp_path / "store"
        if store.exists():
            store.rename(tmp_path / "moved")
        store.write_text("not a directory")
        until(lambda: requests.get(server.url + "/healthz", timeout=10).status_code >= 500)
        assert not server.tracebacks()


def certificate(folder: Path, name: str) -> None:
    made = subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem"),
        ],
        capture_output=True,
    )
    if made.returncode:
        pytest.skip("needs openssl")


def test_tls_and_its_mistakes(tmp_path: Path) -> None:
    certificate(tmp_path, "right")
    certificate(tmp_path, "other")
    both = tmp_path / "both.pem"
    both.write_text((tmp_path / "right.pem").read_text() + (tmp_path / "right.key").read_text())
    with start_server(str(tmp_path / "store"), tmp_path / "data", "--tls-cert", str(both)) as server:
        assert requests.get(server.url + "/healthz", verify=str(tmp_path / "right.pem"), timeout=10).json() == {"status": "ok"}
        context = ssl.create_default_context(cafile=str(tmp_path / "right.pem"))
        context.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(OSError), socket.create_connection(server.host.split(":")) as plain:
            context.wrap_socket(plain, server_hostname="127.0.0.1")
        with socket.create_connection((server.host.split(":")[0], int(server.host.split(":")[1])), timeout=10) as plain:
            plain.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"ok" not in whole(plain)
        assert not server.tracebacks()
    for options, text in (
        (("--tls-cert", tmp_path / "right.pem", "--tls-key", tmp_path / "other.key"), "cannot be used"),
        (("--tls-cert", tmp_path / "right.pem"), "cannot be used"),
        (("--tls-key", tmp_path / "right.key"), "needs --tls-cert"),
    ):
        command = [*PROGRAM, "--store", tmp_path / "store", "serve", "--port", "0", "--data-dir", tmp_path / "d", *options]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=30)
        assert (done.returncode, text in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr
