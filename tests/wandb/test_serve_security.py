"""Nothing is served to a caller without the right, and nothing that is sent makes the server fail."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import (
    BY_ID,
    COMMIT,
    CREATE,
    FILES,
    MANIFEST,
    NAMED,
    Served,
    digest_of,
    manifest_of,
    md5_of,
    no_fault,  # noqa: F401 - a fixture for all
    upload_of,
)

from artifactfs.model import File
from artifactfs.names import ArtifactName
from artifactfs.serve import schema
from artifactfs.serve.service import Service
from artifactfs.serve.signing import Claims, Signer
from artifactfs.serve.state import KEEP_PENDING, State


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("served")).running() as running:
        yield running


# --- keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["", "f" * 40, "x", "api:"])
def test_no_key_and_wrong_keys(served: Served, key: str) -> None:
    auth = ("api", key) if key else None
    for method, path in (
        ("POST", "/graphql"),
        ("POST", "/files/acme/p/r/file_stream"),
        ("GET", "/artifactsV2/default/acme/p/bikes/x/x/" + "0" * 32 + "/a"),
        ("GET", "/artifacts/acme/" + "0" * 32),
    ):
        answer = served.http.request(method, served.url + path, data=b"{}", auth=auth, timeout=10)
        assert (answer.status_code, answer.headers["www-authenticate"][:5]) == (401, "Basic")
        assert "errors" in answer.json()
    assert served.http.get(served.url + "/healthz", timeout=10).json() == {"status": "ok"}


@pytest.mark.parametrize(
    "header", ["Basic", "Basic !!!", "Basic " + base64.b64encode(b"\xff\xfe:\xff").decode(), "Bearer x", "Digest"]
)
def test_malformed_authorization(served: Served, header: str) -> None:
    answer = served.http.post(served.url + "/graphql", data=b"{}", headers={"Authorization": header}, timeout=10)
    assert answer.status_code == 401


def test_a_reader_writes_nothing(served: Served) -> None:
    id = served.log({"a.txt": b"a"}, "guarded")
    before = sorted(str(path) for path in (served.root / "store").rglob("*"))
    inputs: dict[str, Any] = {
        "createArtifact": {
            "entityName": "acme",
            "projectName": "p",
            "artifactTypeName": "t",
            "artifactCollectionName": "c",
            "digest": "0" * 32,
        },
        "updateArtifact": {"artifactID": id, "description": "mine"},
        "deleteArtifact": {"artifactID": id, "deleteAliases": True},
        "addAliases": {
            "artifactID": id,
            "aliases": [{"entityName": "acme", "projectName": "p", "artifactCollectionName": "guarded", "alias": "x"}],
        },
        "linkArtifact": {
            "artifactID": id,
            "entityName": "acme",
            "projectName": "p",
            "artifactPortfolioName": "shelf",
            "aliases": [],
        },
        "useArtifact": {"artifactID": id, "entityName": "acme", "projectName": "p", "runName": "r"},
        "deleteArtifactSequence": {"artifactSequenceID": base64.b64encode(b"ArtifactCollection:acme/p/guarded").decode()},
        "updateArtifactSequence": {
            "artifactSequenceID": base64.b64encode(b"ArtifactCollection:acme/p/guarded").decode(),
            "description": "mine",
        },
        "createArtifactCollectionTagAssignments": {
            "entityName": "acme",
            "projectName": "p",
            "artifactCollectionName": "guarded",
            "tags": [{"tagName": "x"}],
        },
        "upsertBucket": {"entityName": "acme", "modelName": "p", "name": "r"},
        "upsertModel": {"entityName": "acme", "name": "wandb-registry-x"},
        "createRunFiles": {"entityName": "acme", "projectName": "p", "runName": "r", "files": ["f"]},
    }
    for field, input in inputs.items():
        query = f"mutation M($input: X!) {{ {field}(input: $input) {{ __typename }} }}"
        assert "may read 'acme', not write it" in served.message(query, served.reader, input=input), field
        told = served.message(query, served.stranger, input=input)
        assert "not found" in told or "no artifact collection" in told, (field, told)
    stream = f"{served.url}/files/acme/p/r/file_stream"
    assert served.http.post(stream, data=b"{}", auth=("api", served.reader), timeout=10).status_code == 403
    assert served.http.post(stream, data=b"{}", auth=("api", served.stranger), timeout=10).status_code == 404
    assert sorted(str(path) for path in (served.root / "store").rglob("*")) == before


def test_what_is_hidden_looks_like_what_is_not_there(served: Served) -> None:
    id = served.log({"a.txt": b"a"}, "hidden")
    absent = base64.b64encode(b"Artifact:acme/p/nothing:v0").decode()
    pending = served.begin(artifactCollectionName="hidden-too")
    for query in (NAMED,):
        seen = [
            served.graphql(query, {"e": entity, "p": "p", "n": "hidden:v0"}, served.stranger) for entity in ("acme", "nobody")
        ]
        assert seen[0] == seen[1] == {"data": {"project": None}}
    for shown in (id, absent, pending):
        assert served.graphql(BY_ID, {"id": shown}, served.stranger) == {"data": {"artifact": None}}
        for field in ("useArtifact", "deleteArtifact", "commitArtifact", "updateArtifact"):
            query = f"mutation M($input: X!) {{ {field}(input: $input) {{ __typename }} }}"
            input = {"artifactID": shown, "entityName": "other", "projectName": "p", "runName": "r"}
            text = served.message(query, served.stranger, input=input)
            assert "not found" in text and "permitted" not in text and "read" not in text, text
    assert served.data('query Q { entity(name: "acme") { name } }', served.stranger) is None
    assert served.data('query Q { organization(name: "acme") { name } }', served.stranger) is None


def test_a_link_does_not_open_what_it_leads_to(served: Served) -> None:
    served.log({"secret.txt": b"secret"}, "private")
    source = served.store.version(ArtifactName("acme", "p", "private", "v0"))
    served.store.link(source, ArtifactName("other", "p", "shelf"))
    assert served.data(NAMED, served.stranger, e="other", p="p", n="shelf:v0")["artifactCollectionMembership"] is None


def test_keys_change_while_the_server_runs(served: Served) -> None:
    late = served.keys.add("late", {"acme": "write"})
    assert served.graphql("{ viewer { username } }", key=late)["data"]["viewer"]["username"] == "late"
    url = served.announce(served.begin(late, artifactCollectionName="late"), "a", b"a")["uploadUrl"]
    id = served.log({"a.txt": b"late"}, "late-too", key=late)
    manifest = served.data(BY_ID, late, id=id)["currentManifest"]["file"]["directUrl"]
    assert served.http.get(manifest, timeout=10).status_code == 200
    served.keys.remove("late")
    assert served.post({"query": "{ viewer { id } }"}, late).status_code == 401
    assert served.http.get(manifest, timeout=10).status_code == 403  # what was signed in its name goes with it
    assert url and served.http.put(url, data=b"a", timeout=10).status_code == 200  # signed for the writer who announced it
    os.chmod(served.keys.path, 0o644)
    try:
        assert served.post({"query": "{ viewer { id } }"}).status_code == 403
    finally:
        os.chmod(served.keys.path, 0o600)
    assert served.post({"query": "{ viewer { id } }"}).status_code == 200
    assert late not in served.keys.path.read_text()


# --- signed URLs ----------------------------------------------------------------------------------


def test_signed_urls(served: Served) -> None:
    served.log({"a.txt": b"content", "b.txt": b"another"}, "signed")
    id = base64.b64encode(b"Artifact:acme/p/signed:v0").decode()
    url, other = (edge["node"]["directUrl"] for edge in served.data(BY_ID, id=id)["files"]["edges"])
    assert served.http.get(url, timeout=10).content == b"content"
    assert served.http.get(url, timeout=10).content == b"content"  # a read may be repeated
    assert served.http.head(url, timeout=10).headers["content-length"] == "7"
    assert served.http.put(url, data=b"x", timeout=10).status_code == 403
    assert served.http.delete(url, timeout=10).status_code == 405
    head, token, name = url.rpartition("/")[0].rpartition("/")[0], url.split("/")[-2], url.split("/")[-1]
    claims, mac = token.split(".")
    other_claims, other_mac = other.split("/")[-2].split(".")
    for forged in (
        f"{claims}.{other_mac}",
        f"{other_claims}.{mac}",
        f"{claims}.",
        f".{mac}",
        claims,
        f"{claims}.{mac}A",
        f"{claims}=.{mac}",
        f"{claims}.{mac[:-2]}",
        "..",
        "%2e%2e",
        "a" * 9000,
        f"{claims}\u0000.{mac}",
        f"{claims}.{mac}.{mac}",
    ):
        assert served.http.get(f"{head}/{forged}/{name}", timeout=10).status_code in (403, 404), forged
    for place in range(0, len(token), 7):
        changed = token[:place] + ("A" if token[place] != "A" else "B") + token[place + 1 :]
        assert served.http.get(f"{head}/{changed}/{name}", timeout=10).status_code in (403, 404)


def test_expired_urls(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.log({"a.txt": b"content"}, "expiring")
    id = base64.b64encode(b"Artifact:acme/p/expiring:v0").decode()
    url = served.data(BY_ID, id=id)["files"]["edges"][0]["node"]["directUrl"]
    monkeypatch.setattr("artifactfs.serve.signing.time.time", lambda now=time.time: now() + served.options.url_lifetime + 2)
    answer = served.http.get(url, timeout=10)
    assert answer.status_code == 403 and "expired" in answer.text


def test_signatures_of_another_server_are_nothing(served: Served) -> None:
    claims = Signer(b"x" * 32, 60).token("GET", "entry", ("acme/p/signed:v0", "a.txt"), "0" * 16)
    assert served.http.get(f"{served.url}/storage/{claims}/a", timeout=10).status_code == 403
    assert Claims("GET", "entry", ("a",), 1, "b") == Claims("GET", "entry", ("a",), 1, "b", "", "")


def test_uploads_are_what_they_were_signed_for(served: Served) -> None:
    artifact = served.begin(artifactCollectionName="uploads")
    node = served.announce(artifact, "a.txt", b"right")
    put = served.http.put
    assert put(node["uploadUrl"], data=b"wrong", timeout=10).status_code == 422
    assert put(node["uploadUrl"], data=b"right", headers={"Content-MD5": md5_of(b"wrong")}, timeout=10).status_code == 400
    ok = put(node["uploadUrl"], data=b"right", headers={"Content-MD5": md5_of(b"right")}, timeout=10)
    assert (ok.status_code, ok.headers["etag"]) == (200, f'"{hashlib.md5(b"right").hexdigest()}"')
    assert put(node["uploadUrl"], data=b"right", timeout=10).status_code == 200  # a repeated upload leaves the same
    assert put(node["uploadUrl"], data=b"wrong", timeout=10).status_code == 422
    assert served.announce(artifact, "a.txt", b"right")["uploadUrl"] is None
    served.put_manifest(artifact, manifest_of({"a.txt": {"digest": md5_of(b"right"), "size": 5}}))
    assert "as was announced" in served.message(COMMIT, id=artifact)
    served.service.state.discard(upload_of(artifact))
    assert put(node["uploadUrl"], data=b"right", timeout=10).status_code == 404  # replayed after its end


def test_an_md5_is_no_key_to_bytes(served: Served) -> None:
    """Who names the MD5 of what somebody else stored must upload the bytes."""
    secret = b"bytes of another entity"
    theirs = served.log({"secret.bin": secret}, "vault", entity="other", key=served.stranger)
    assert theirs
    artifact = served.begin(artifactCollectionName="thief")
    assert served.announce(artifact, "secret.bin", secret)["uploadUrl"]
    served.put_manifest(artifact, manifest_of({"secret.bin": {"digest": md5_of(secret), "birthArtifactID": theirs, "size": 1}}))
    assert "were not uploaded" in served.message(COMMIT, id=artifact)
    host = base64.b64decode(theirs).hex()
    reference = {"digest": md5_of(secret), "ref": f"wandb-artifact://{host}/secret.bin", "size": 0}
    served.put_manifest(artifact, manifest_of({"r": reference}))
    assert "not found" in served.message(COMMIT, id=artifact)
    hex_md5 = base64.b64decode(md5_of(secret)).hex()
    for path in (
        f"/artifacts/other/{hex_md5}",
        f"/artifacts/acme/{hex_md5}",
        f"/artifactsV2/d/other/p/vault/{theirs}/{hex_md5}/secret.bin",
    ):
        assert served.http.get(served.url + path, auth=("api", served.writer), timeout=10).status_code == 404
    own = served.http.get(
        f"{served.url}/artifactsV2/d/other/p/vault/{theirs}/{hex_md5}/s", auth=("api", served.stranger), timeout=10
    )
    assert own.content == secret


def test_contents_by_digest(served: Served) -> None:
    id = served.log({"d/a.txt": b"by digest"}, "addressed")
    hex_md5 = hashlib.md5(b"by digest").hexdigest()
    quoted = id.replace("=", "%3D").replace("+", "%2B").replace("/", "%2F")
    for path in (
        f"/artifactsV2/default/acme/p/addressed/{quoted}/{quoted}/{hex_md5}/a.txt",
        f"/artifactsV2/default/acme/p/addressed/{quoted}/{hex_md5}/a.txt",
        f"/artifacts/acme/{hex_md5}",
    ):
        got = served.http.get(served.url + path, auth=("api", served.reader), headers={"Range": "bytes=3-"}, timeout=10)
        assert (got.status_code, got.content) == (206, b"digest"), path
    gone = served.http.get(f"{served.url}/artifacts/acme/{'0' * 32}", auth=("api", served.reader), timeout=10)
    assert gone.status_code == 404


# --- ranges ---------------------------------------------------------------------------------------


def test_ranges(served: Served) -> None:
    data = os.urandom(3_000_000)
    id = served.log({"blob": data, "empty": b""}, "ranges")
    url, empty = (edge["node"]["directUrl"] for edge in served.data(BY_ID, id=id)["files"]["edges"])
    get = served.http.get
    whole = get(url, timeout=30)
    assert (whole.status_code, whole.content, whole.headers["accept-ranges"]) == (200, data, "bytes")
    tag = whole.headers["etag"]
    for header, start, end in (
        ("bytes=0-0", 0, 1),
        ("bytes=1048575-1048577", 1048575, 1048578),
        ("bytes=2999999-", 2999999, 3000000),
        ("bytes=5-99999999999", 5, 3000000),
        ("bytes=-10", 2999990, 3000000),
        ("bytes=-99999999", 0, 3000000),
    ):
        part = get(url, headers={"Range": header, "If-Range": tag}, timeout=30)
        assert (part.status_code, part.content) == (206, data[start:end]), header
        assert part.headers["content-range"] == f"bytes {start}-{end - 1}/3000000"
    for header in ("bytes=3000000-", "bytes=-0", "bytes=9999999999-"):
        refused = get(url, headers={"Range": header}, timeout=30)
        assert (refused.status_code, refused.headers["content-range"]) == (416, "bytes */3000000"), header
    for header in ("bytes=5-2", "lines=1-2", "bytes=", "bytes=-", "bytes=1-2,5-6", "bytes=a-b", "bytes=" + "9" * 40 + "-"):
        assert get(url, headers={"Range": header}, timeout=30).status_code == 200, header
    assert get(url, headers={"Range": "bytes=0-1", "If-Range": '"other"'}, timeout=30).status_code == 200
    assert get(url, headers={"If-None-Match": tag}, timeout=30).status_code == 304
    assert (get(empty, timeout=30).content, get(empty, headers={"Range": "bytes=0-"}, timeout=30).status_code) == (b"", 416)


# --- names ----------------------------------------------------------------------------------------

BAD_NAMES = ["..", ".", "../x", "/etc/passwd", "a/../../b", "", "a\0b", "x" * 300, "a/b", "\ud800", "C:\\x", "a:b", "a\nb"]


def allowed(key: str, name: str) -> bool:
    """No entity or project is the default one; a type is no part of any path."""
    return (key in ("entityName", "projectName") and name == "") or (key == "artifactTypeName" and name in (".", ".."))


@pytest.mark.parametrize("name", BAD_NAMES)
def test_no_name_leads_outside(served: Served, name: str) -> None:
    before = set(served.root.parent.iterdir())
    for key in ("entityName", "projectName", "artifactCollectionName", "artifactTypeName"):
        input = {
            "entityName": "acme",
            "projectName": "p",
            "artifactTypeName": "t",
            "artifactCollectionName": "c",
            "digest": "0" * 32,
            key: name,
        }
        body = served.graphql(CREATE, {"input": input})
        assert body.get("errors") or allowed(key, name), (key, body)
    artifact = served.begin(artifactCollectionName="names")
    file = {"artifactID": artifact, "name": name, "md5": md5_of(b"x")}
    if name not in ("a:b", "a\nb"):  # entries may have such names
        relative = name == "a/b"
        assert bool(served.graphql(FILES, {"input": {"artifactFiles": [file]}}).get("errors")) is not relative
        served.put_manifest(artifact, manifest_of({name: {"digest": md5_of(b"x"), "size": 1}}))
        assert served.message(COMMIT, id=artifact)
    for query, variables in (
        (NAMED, {"e": name, "p": "p", "n": "x"}),
        (NAMED, {"e": "acme", "p": name, "n": "x"}),
        (NAMED, {"e": "acme", "p": "p", "n": name}),
        (NAMED, {"e": "acme", "p": "p", "n": f"signed:{name}"}),
        (BY_ID, {"id": base64.b64encode(f"Artifact:acme/{name}/x:v0".encode("utf-8", "replace")).decode()}),
        (BY_ID, {"id": base64.b64encode(f"Artifact:pending:{name}".encode("utf-8", "replace")).decode()}),
    ):
        served.graphql(query, variables)
    run = {"entityName": "acme", "modelName": "p", "name": name}
    assert (
        served.graphql("mutation M($i: X) { upsertBucket(input: $i) { inserted } }", {"i": run}).get("errors") or name == "a\nb"
    )
    files = {"entityName": "acme", "projectName": "p", "runName": "r", "files": [name]}
    served.graphql("mutation M($i: X) { createRunFiles(input: $i) { files { name uploadUrl } } }", {"i": files})
    assert set(served.root.parent.iterdir()) == before


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/storage/../data/secret",
        "/storage/..%2f..%2fsecret/x",
        "/artifactsV2/../../x",
        "/files/acme/../../x/file_stream",
        "/artifactsV2/d/acme/p/c/..%2f../x/" + "0" * 32 + "/..",
        "/artifacts/..%2f/" + "0" * 32,
        "//graphql",
        "/%00",
        "/%ff%fe",
        "/a" * 4000,
        "/artifactsV2/" + "%2e%2e/" * 7,
        "/files/%2e%2e/p/r/file_stream",
    ],
)
def test_urls_lead_nowhere_else(served: Served, path: str) -> None:
    authorization = base64.b64encode(f"api:{served.writer}".encode()).decode()
    for method in ("GET", "PUT", "POST", "HEAD", "DELETE", "OPTIONS", "BREW"):
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)
        connection.request(method, path, headers={"Authorization": f"Basic {authorization}", "Content-Length": "0"})
        answer = connection.getresponse()
        assert 400 <= answer.status < 500, (method, path, answer.status)
        answer.read()
        connection.close()


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"a": {"digest": "x", "size": 1}}, "digest that cannot be"),
        ({"a": {"size": 1}}, "no digest"),
        ({"a": 5}, "no object"),
        ({"a": {"digest": md5_of(b""), "size": -1}}, "size"),
        ({"a": {"digest": md5_of(b""), "size": "1"}}, "size"),
        ({"a": {"digest": md5_of(b""), "ref": 5}}, "reference"),
        ({"a//b": {"digest": "d", "ref": "s3://b/k"}}, "Invalid artifact path"),
        (
            {"a": {"digest": "d", "ref": "s3://b/k"}, "a/b": {"digest": "d", "ref": "s3://b/k"}},
            "both as a file and as a directory",
        ),
        ({"a": {"digest": "d", "ref": "wandb-client-artifact://x/y"}}, "not logged"),
        ({"a": {"digest": md5_of(b"never"), "size": 5, "local_path": "/etc/passwd"}}, "were not uploaded"),
    ],
)
def test_hostile_manifests(served: Served, contents: Any, message: str) -> None:
    artifact = served.begin(artifactCollectionName="hostile")
    served.put_manifest(artifact, manifest_of(contents))
    assert message in served.message(COMMIT, id=artifact)


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"[]",
        b"{",
        b'{"version": 2, "contents": {}}',
        b'{"contents": {}}',
        b"\xff" * 9,
        b'{"version": 1, "contents": [1]}',
        b"[" * 99999,
        b'{"version": 1, "contents": {"a": {"digest": "x", "ref": "s3://b/k"}, "a": {"digest": "y", "ref": "s3://b/k"}}}',
    ],
)
def test_what_is_no_manifest(served: Served, manifest: bytes) -> None:
    artifact = served.begin(artifactCollectionName="broken")
    served.put_manifest(artifact, manifest)
    assert "errors" in served.graphql(COMMIT, {"id": artifact})


# --- sizes and time -------------------------------------------------------------------------------


def test_large_documents(served: Served) -> None:
    deep = "{ viewer " + "{ teams { edges { node { user " * 40 + "{ id }" + " } } } }" * 40 + " }"
    wide = "{ " + " ".join(f"a{number}: viewer {{ id }}" for number in range(300)) + " }"
    bomb = "query { ...f0 } " + "".join(f"fragment f{n} on Query {{ ...f{n + 1} ...f{n + 1} }} " for n in range(60))
    bomb += "fragment f60 on Query { viewer { id } }"
    circle = "query { ...a } fragment a on Query { ...b } fragment b on Query { ...a }"
    brackets = "{" * 50_000
    long = "{ viewer { id } } #" + "x" * 200_000
    values = "{ entity(name: " + "[" * 5000 + "]" * 5000 + ") { id } }"
    for query in (
        deep,
        wide,
        bomb,
        circle,
        brackets,
        long,
        values,
        "",
        "   ",
        "{",
        "query A { viewer { id } } query B { viewer { id } }",
    ):
        begun = time.monotonic()
        assert "errors" in served.graphql(query), query[:60]
        assert time.monotonic() - begun < 20
    for query in ("subscription { x }", "type A { b: Int }", "query { ...nothing }", "mutation { dropEverything { ok } }"):
        assert "errors" in served.graphql(query)
    # What a query asks for beyond the schema is left out; a type that is not ours is plain JSON.
    got = served.graphql("query Q($x: Strange! = {a: [1]}) { viewer { id nonsense(x: $x) { y } } nope }", {})
    assert set(got["data"]["viewer"]) == {"id"} and "errors" not in got


def test_bodies_that_are_no_requests(served: Served) -> None:
    for body in (
        b"",
        b"null",
        b"[]",
        b"5",
        b'"x"',
        b"{}",
        b'{"query": 5}',
        b'{"query": "{ viewer { id } }", "variables": []}',
        b"\xff",
        b"[" * 100_000,
        b'{"query": "{ viewer { id } }", "operationName": {}}',
        b'{"query": "{ viewer { id } }", "operationName": "Other"}',
    ):
        answer = served.post(body)
        assert answer.status_code in (200, 400) and answer.json()["errors"], body[:50]


def test_oversized_bodies(tmp_path: Path) -> None:
    with Served(tmp_path, max_document=100_000, max_upload=50_000).running() as served:
        assert served.post({"query": "{ viewer { id } }", "variables": {"x": "y" * 200_000}}).status_code == 413
        artifact = served.begin()
        data = os.urandom(60_000)
        url = served.announce(artifact, "a", data)["uploadUrl"]
        assert served.http.put(url, data=data, timeout=10).status_code == 413
        assert (
            served.http.put(url, data=iter([data[:30_000], data[30_000:]]), timeout=10).status_code == 400
        )  # chunked: no length
        assert not list((tmp_path / "data/pending").rglob("*.tmp"))
        with contextlib.suppress(OSError):  # cut off while it still sends
            assert served.raw(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 3_000_000).startswith(b"HTTP/1.1 400")


def _drips(connection: socket.socket, data: bytes) -> bool:
    """Whether the server lets all of it come, a byte each 50 ms."""
    connection.settimeout(0.05)
    for byte in data:
        try:
            connection.sendall(bytes([byte]))
            if connection.recv(65536) == b"":
                return False
        except TimeoutError:
            continue
        except OSError:
            return False
    return True


def test_slow_clients(tmp_path: Path) -> None:
    with Served(tmp_path, header_timeout=0.5, body_timeout=0.5).running() as served:
        begun = time.monotonic()
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as idle:
            assert idle.recv(1) == b""
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as slow:
            assert not _drips(slow, b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"y" * 200)  # a byte now and then
        authorization = base64.b64encode(f"api:{served.writer}".encode())
        head = (
            b"POST /graphql HTTP/1.1\r\nHost: x\r\nAuthorization: Basic " + authorization + b"\r\nContent-Length: 1000\r\n\r\n{"
        )
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as stalled:
            stalled.sendall(head)
            assert stalled.recv(4096).startswith(b"HTTP/1.1 408")
        url = served.announce(served.begin(), "a", b"x" * 1000)["uploadUrl"].removeprefix(served.url)
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as stalled:
            stalled.sendall(f"PUT {url} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nxx".encode())
            assert stalled.recv(4096).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - begun < 40
        assert served.graphql("{ viewer { id } }")["data"]


def test_a_body_that_ends_early_leaves_nothing(served: Served) -> None:
    url = served.announce(served.begin(artifactCollectionName="early"), "a", b"x" * 1000)["uploadUrl"].removeprefix(served.url)
    served.raw(f"PUT {url} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nxx".encode())
    deadline = time.monotonic() + 5
    while list((served.root / "data/pending").rglob("*.tmp")) and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    assert not list((served.root / "data/pending").rglob("*.tmp"))


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)*b", "a*a*a*a*a*b", "[", "x" * 300, 5, "(?:a{1,9}){1,9}"])
def test_filters_that_take_for_ever(served: Served, pattern: Any) -> None:
    filters = json.dumps({"name": {"$regex": pattern}})
    query = (
        'query Q($f: JSONString) { project(entityName: "acme", name: "p") { artifactCollections(filters: $f) { totalCount } } }'
    )
    served.log({"a": b"a"}, "filtered")
    assert served.message(query, f=filters)
    assert served.data(query, f=json.dumps({"name": {"$regex": "^filt.*d$"}}))["artifactCollections"]["totalCount"] == 1
    nested: Any = {"name": "x"}
    for _ in range(100):
        nested = {"$and": [nested]}
    assert served.message(query, f=json.dumps(nested))


# --- what must not be lost ------------------------------------------------------------------------


def test_a_commit_that_is_repeated_is_one(served: Served) -> None:
    data = b"once"
    artifact = served.begin(artifactCollectionName="once", digest=digest_of({"a": md5_of(data)}))
    served.http.put(served.announce(artifact, "a", data)["uploadUrl"], data=data, timeout=10)
    served.put_manifest(artifact, manifest_of({"a": {"digest": md5_of(data), "size": 4}}))
    ids = []
    threads = [threading.Thread(target=lambda: ids.append(Again(served).commit(artifact))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 6 and len(set(ids)) == 1
    assert len(served.store.versions(ArtifactName("acme", "p", "once"))) == 1
    assert "committed" in served.message(MANIFEST, input={"artifactID": artifact, "type": "FULL"})


class Again:
    """Another connection to the same server."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def commit(self, artifact: str) -> str:
        body = {"query": COMMIT, "variables": {"id": artifact}}
        answer = requests.post(f"{self._served.url}/graphql", json=body, auth=("api", self._served.writer), timeout=30)
        return str(answer.json()["data"]["commitArtifact"]["artifact"]["id"])


def test_uploads_survive_a_restart(tmp_path: Path) -> None:
    data = os.urandom(100_000)
    with Served(tmp_path).running() as first:
        writer = first.writer
        artifact = first.begin(digest=digest_of({"a": md5_of(data)}))
        first.http.put(first.announce(artifact, "a", data)["uploadUrl"], data=data, timeout=10)
        first.put_manifest(artifact, manifest_of({"a": {"digest": md5_of(data), "size": len(data)}}))
        (tmp_path / "data/pending" / upload_of(artifact) / "half.tmp").write_bytes(b"x")
    second = Served.__new__(Served)
    second.__dict__.update(first.__dict__)
    second.http = requests.Session()
    second.service = Service(first.store, None, State(tmp_path / "data"), first.keys, first.options)
    with second.running():
        assert second.announce(artifact, "a", data)["uploadUrl"] is None
        id = second.data(COMMIT, writer, id=artifact)["artifact"]["id"]
        assert second.data(COMMIT, writer, id=artifact)["artifact"]["id"] == id
        assert not list((tmp_path / "data/pending").iterdir())


def test_uploads_that_nobody_goes_on_with_are_removed(served: Served) -> None:
    artifact = served.begin(artifactCollectionName="forgotten")
    served.http.put(served.announce(artifact, "a", b"a")["uploadUrl"], data=b"a", timeout=10)
    assert served.service.state.expire(time.time() + KEEP_PENDING - 100) == 0
    assert served.service.state.expire(time.time() + KEEP_PENDING + 100) >= 1
    assert "not found" in served.message(COMMIT, id=artifact)
    assert not (served.root / "data/pending" / upload_of(artifact)).exists()


def test_bytes_that_rot_on_the_servers_disk_become_no_version(served: Served) -> None:
    data = b"right bytes"
    for kind in ("FULL", "INCREMENTAL", "PATCH"):
        artifact = served.begin(artifactCollectionName="rotten", digest=digest_of({"a": md5_of(data)}))
        served.http.put(served.announce(artifact, "a", data)["uploadUrl"], data=data, timeout=10)
        served.put_manifest(artifact, manifest_of({"a": {"digest": md5_of(data), "size": 4}}), kind)
        folder = served.root / "data/pending" / upload_of(artifact)
        for path in folder.iterdir():
            if path.read_bytes() == data:
                path.write_bytes(b"wrong bytes")
        assert "is not what its manifest says" in served.message(COMMIT, id=artifact)
    assert ArtifactName("acme", "p", "rotten").collection not in served.store.collection_names("acme", "p")


def test_parts(served: Served) -> None:
    parts = [os.urandom(5000), os.urandom(5000), b"end"]
    data = b"".join(parts)
    artifact = served.begin(artifactCollectionName="parts", digest=digest_of({"big": md5_of(data)}))
    asked = [{"partNumber": number, "hexMD5": hashlib.md5(part).hexdigest()} for number, part in enumerate(parts, 1)]
    file = {"artifactID": artifact, "name": "big", "md5": md5_of(data), "uploadPartsInput": asked}
    node = served.data(FILES, input={"artifactFiles": [file]})["files"]["edges"][0]["node"]
    upload = node["uploadMultipartUrls"]
    complete = "mutation M($i: X) { completeMultipartUploadArtifact(input: $i) { digest } }"
    tags = []
    for part, place in zip(parts, upload["uploadUrlParts"], strict=True):
        assert served.http.put(place["uploadUrl"], data=part + b"!", timeout=10).status_code == 422
        if place["partNumber"] != 2:
            tags.append(
                {
                    "partNumber": place["partNumber"],
                    "hexMD5": served.http.put(place["uploadUrl"], data=part, timeout=10).headers["etag"],
                }
            )
    given = {"artifactID": artifact, "storagePath": node["storagePath"], "uploadID": upload["uploadID"], "completedParts": tags}
    assert "each must be named once" in served.message(complete, i=given)
    tags.append({"partNumber": 2, "hexMD5": hashlib.md5(parts[1]).hexdigest()})
    assert "not uploaded yet" in served.message(complete, i=given)
    served.http.put(upload["uploadUrlParts"][1]["uploadUrl"], data=parts[1], timeout=10)
    for _ in range(2):
        assert served.data(complete, i=given)["digest"] == md5_of(data)
    served.put_manifest(artifact, manifest_of({"big": {"digest": md5_of(data), "size": len(data)}}))
    served.data(COMMIT, id=artifact)
    entry = served.store.tree.resolve(served.store.version(ArtifactName("acme", "p", "parts")).root, "big")
    assert isinstance(entry, File) and entry.checksum == md5_of(data)


def test_the_same_digest_is_the_same_version(served: Served) -> None:
    first = served.log({"a": b"1"}, "dedup")
    served.log({"a": b"2"}, "dedup")
    input = {
        "entityName": "acme",
        "projectName": "p",
        "artifactTypeName": "dataset",
        "artifactCollectionName": "dedup",
        "digest": digest_of({"a": md5_of(b"1")}),
        "enableDigestDeduplication": True,
        "aliases": [{"alias": "latest"}, {"alias": "x"}],
    }
    made = served.data(CREATE, input=input)["artifact"]
    assert made == {"id": first, "state": "COMMITTED"}
    assert served.store.collection(ArtifactName("acme", "p", "dedup")).aliases == {"latest": 0, "x": 0}


def test_metrics_and_logs_have_no_secrets(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    id = served.log({"a.txt": b"a"}, "observed")
    url = served.data(BY_ID, id=id)["files"]["edges"][0]["node"]["directUrl"]
    served.http.get(url, timeout=10)
    served.http.get(f"{served.url}/storage/{'x' * 50}/y", timeout=10)
    text = served.http.get(served.url + "/metrics", timeout=10).text
    assert 'artifactfs_serve_operations_total{field="commitArtifact",outcome="done"}' in text
    assert "artifactfs_serve_pending_uploads" in text
    routes = {line.split('route="')[1].split('"')[0] for line in text.splitlines() if 'route="' in line}
    assert routes <= {"graphql", "storage", "artifacts", "file_stream", "healthz", "metrics", "other"}
    told = caplog.text + text + "".join(str(getattr(record, "fields", "")) for record in caplog.records)
    for secret in (served.writer, url.split("/")[-2], url.split("/")[-2].split(".")[1]):
        assert secret not in told
    assert any(getattr(record, "fields", {}).get("caller") == "writer" for record in caplog.records)


# --- anything at all ------------------------------------------------------------------------------

_TEXT = st.text(max_size=12) | st.sampled_from(
    [*BAD_NAMES, "acme", "p", "bikes", "v0", "latest", "QXJ0aWZhY3Q6YWNtZS9wL2Jpa2VzOnYw"]
)
_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=6,
)
_FIELDS = sorted(schema.schema().mutation_type.fields)
_KEYS = [
    "entityName",
    "projectName",
    "modelName",
    "name",
    "id",
    "artifactID",
    "artifactTypeName",
    "artifactCollectionName",
    "digest",
    "aliases",
    "tags",
    "metadata",
    "ttlDurationSeconds",
    "clientID",
    "distributedID",
    "runName",
    "artifactFiles",
    "artifactManifestID",
    "type",
    "baseArtifactID",
    "uploadID",
    "completedParts",
    "artifactPortfolioName",
    "artifactPortfolioID",
    "artifactSequenceID",
    "files",
    "destinationArtifactTypeName",
    "tagsToAdd",
    "config",
    "summaryMetrics",
    "description",
    "digestAlgorithm",
    "deleteAliases",
]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from(_FIELDS), input=st.dictionaries(st.sampled_from(_KEYS), _VALUE, max_size=8) | _VALUE)
def test_no_mutation_makes_it_fail(served: Served, field: str, input: Any) -> None:
    query = f"mutation M($input: X) {{ {field}(input: $input) {{ __typename }} }}"
    body = {"query": query, "variables": {"input": input}}
    answer = served.post(json.dumps(body, ensure_ascii=True).encode())
    assert answer.status_code in (200, 400), answer.text
    assert "its log says more" not in answer.text


READ = """query Q($a: X, $b: X, $c: X, $d: X) {
  viewer { teams { edges { node { name } } } }
  entity(name: $a) { name projects(filters: $d, first: $b, after: $c) { totalCount } organization { orgEntity {
    artifactCollections(filters: $d, projectFilters: $d, collectionTypes: $b, order: $c) { totalCount }
    artifactMemberships(filters: $d, collectionFilters: $d) { totalCount } } } }
  project(entityName: $a, name: $b) { artifact(name: $c) { id } artifactType(name: $c) { artifactCollection(name: $d) { id } }
    artifactCollection(name: $c) { artifactMembership(aliasName: $d) { files(names: $d, first: $c, after: $b) { totalCount } } }
    runs(filters: $d, order: $c) { totalCount } run(name: $c) { id } }
  known: project(entityName: "acme", name: "p") { artifact(name: $c) { id } artifactType(name: $c) { id }
    artifactCollections(filters: $d, order: $c, first: $b, after: $a) { totalCount }
    artifactCollection(name: "bikes") { aliases(first: $b) { totalCount } artifacts(filters: $d, order: $c) { totalCount }
      artifactMembership(aliasName: $d) { files(names: $d, first: $c, after: $b) { totalCount
        edges { node { id md5 url } } } } } }
  artifact(id: $a) { id filesByManifestEntries(entries: $b) { totalCount } usedBy { totalCount } }
  artifactCollection(id: $b) { id }
  clientIDMapping(clientID: $c) { serverID }
}"""


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.dictionaries(st.sampled_from("abcd"), _VALUE))
def test_no_query_makes_it_fail(served: Served, values: dict[str, Any]) -> None:
    served.service.store.entities()
    answer = served.post(json.dumps({"query": READ, "variables": values}).encode())
    assert answer.status_code in (200, 400), answer.text
    assert "its log says more" not in answer.text


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from(["GET", "PUT", "POST", "HEAD"]),
    first=st.sampled_from(["storage", "artifactsV2", "artifacts", "files", "graphql", "healthz", "x"]),
    rest=st.lists(st.text(max_size=10) | st.sampled_from(["..", "acme", "0" * 32, "file_stream"]), max_size=9),
    header=st.sampled_from(["", "bytes=0-", "bytes=--", "\xff"]),
    body=st.binary(max_size=30),
)
def test_no_url_makes_it_fail(served: Served, method: str, first: str, rest: list[str], header: str, body: bytes) -> None:
    path = "/" + "/".join([first, *(requests.utils.quote(part.encode("utf-8", "replace"), safe="") for part in rest)])
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)
    authorization = base64.b64encode(f"api:{served.writer}".encode()).decode()
    connection.request(method, path, body, {"Authorization": f"Basic {authorization}", **({"Range": header} if header else {})})
    answer = connection.getresponse()
    assert answer.status < 500, (method, path)
    answer.read()
    connection.close()


_READ = [
    "viewer",
    "entity",
    "project",
    "artifact",
    "artifactCollection",
    "files",
    "edges",
    "node",
    "name",
    "id",
    "teams",
    "aliases",
]
_OTHER = [
    "createArtifact",
    "commitArtifact",
    "__typename",
    "__schema",
    "__type",
    "types",
    "fields",
    "nope",
    "a",
    "on",
    "fragment",
]
_NAMES = st.sampled_from([*_READ, *_OTHER])
_ARGUMENTS = st.sampled_from(
    ["", "", '(name: "acme")', "(first: -1)", "(first: 99999999999999999999)", "(id: $v)", '(x: {a: [1, "\\u0000"]})']
)
_DIRECTIVES = st.sampled_from(["", "", "@include(if: $v)", "@skip(if: true)", "@include", "@nope(x: 1)"])


def _selections(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    field = st.builds("{}{}{} {}".format, st.sampled_from(["", "b: ", "c: "]), _NAMES, _ARGUMENTS, inner)
    spread = st.sampled_from(["...F", "...G", "... on Artifact { id }", "... on Nope { x }", "... @include(if: $v) { id }"])
    return st.lists(st.builds("{} {}".format, field, _DIRECTIVES) | spread, min_size=1, max_size=4).map(
        lambda parts: "{ " + " ".join(parts) + " }"
    )


_SELECTION = st.recursive(st.just(""), _selections, max_leaves=12)
_FRAGMENTS = ["", "fragment F on Query { viewer { id } }", "fragment F on Query { ...G } fragment G on Query { ...F }"]
_DOCUMENT = st.builds(
    "{} {} {}".format,
    st.sampled_from(["", "query", "query Q($v: X)", "mutation M($v: [X!]! = 5)", "subscription", "fragment F on Query", "type"]),
    _SELECTION.filter(bool) | st.text(max_size=20),
    st.sampled_from(_FRAGMENTS),
)
_BODY = st.binary(max_size=60) | st.text(max_size=60).map(lambda text: json.dumps({"query": text}).encode())


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(query=_DOCUMENT, value=_VALUE, name=st.none() | st.sampled_from(["Q", "M", ""]))
def test_no_document_makes_it_fail(served: Served, query: str, value: Any, name: str | None) -> None:
    body = {"query": query, "variables": {"v": value}, "operationName": name}
    answer = served.post(json.dumps(body, ensure_ascii=True).encode())
    assert answer.status_code in (200, 400), answer.text
    assert "its log says more" not in answer.text


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: json.dumps({"query": text}).encode()),
    cut=st.integers(0, 60),
)
def test_no_body_makes_it_fail(served: Served, body: bytes, cut: int) -> None:
    answer = served.post(body[:cut])
    assert answer.status_code in (200, 400), answer.text
    assert "its log says more" not in answer.text
    stream = f"{served.url}/files/acme/p/r/file_stream"
    assert served.http.post(stream, data=body, auth=("api", served.writer), timeout=10).status_code in (200, 400)


@st.composite
def _of_the_schema(draw: st.DrawFn, kind: Any = None, depth: int = 0) -> str:
    """A selection of fields that the schema has, with values for their arguments: what gets beyond the parser."""
    kind = kind or schema.schema().query_type
    while hasattr(kind, "of_type"):
        kind = kind.of_type
    if hasattr(kind, "types"):
        return "{ __typename " + " ".join(f"... on {it.name} {draw(_of_the_schema(it, depth + 1))}" for it in kind.types) + " }"
    if not hasattr(kind, "fields"):
        return ""
    fields = []
    for name in draw(st.lists(st.sampled_from(sorted(kind.fields)), min_size=1, max_size=5, unique=True)):
        field = kind.fields[name]
        below = draw(_of_the_schema(field.type, depth + 1)) if depth < 7 else ""
        if depth >= 7 and hasattr(_bare(field.type), "fields"):
            continue
        given = [f"{key}: ${draw(st.sampled_from(sorted(_GOOD)))}" for key in field.args if draw(st.booleans())]
        fields.append(f"{name}{'(' + ', '.join(given) + ')' if given else ''} {below}")
    return "{ __typename " + " ".join(fields) + " }"


def _bare(kind: Any) -> Any:
    while hasattr(kind, "of_type"):
        kind = kind.of_type
    return kind


_GOOD = {
    "acme": "acme",
    "p": "p",
    "bikes": "stock:v0",
    "name": "stock",
    "alias": "v0",
    "type": "dataset",
    "run": "r",
    "artifact": base64.b64encode(b"Artifact:acme/p/stock:v0").decode(),
    "collection": base64.b64encode(b"ArtifactCollection:acme/p/stock").decode(),
    "count": 3,
    "filter": '{"name": {"$regex": "b"}}',
    "list": ["a.txt", "f"],
}


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.data_too_large])
@given(data=st.data(), place=st.sampled_from(["artifact", "collection", "project", "run", "entity", "top"]), value=_VALUE)
def test_no_field_makes_it_fail(served: Served, stocked: None, data: st.DataObject, place: str, value: Any) -> None:
    types = schema.schema().type_map
    kinds = {"artifact": "Artifact", "collection": "ArtifactSequence", "project": "Project", "run": "Run", "entity": "Entity"}
    inner = data.draw(_of_the_schema(types[kinds[place]] if place in kinds else None, 2))
    around = {
        "artifact": "{ artifact(id: $artifact) %s }",
        "collection": "{ artifactCollection(id: $collection) { ... on ArtifactSequence %s } }",
        "project": "{ project(entityName: $acme, name: $p) %s }",
        "run": "{ project(entityName: $acme, name: $p) { run(name: $run) %s } }",
        "entity": "{ entity(name: $acme) %s }",
        "top": "%s",
    }
    query = "query Q(" + " ".join(f"${key}: X" for key in _GOOD) + ") " + around[place] % inner
    variables = {**_GOOD, data.draw(st.sampled_from(["filter", "count", "list", "alias", "type"])): value}
    answer = served.post(json.dumps({"query": query, "variables": variables}).encode())
    assert answer.status_code in (200, 400), answer.text
    assert "its log says more" not in answer.text, (query, variables, answer.text)


@pytest.fixture(scope="module")
def stocked(served: Served) -> None:
    """Something to look at: a version with a link, a run that used it and has a file that has come, and one that has not."""
    id = served.log({"a.txt": b"a", "f": b"f"}, "stock")
    version = served.store.version(ArtifactName("acme", "p", "stock", "v0"))
    served.store.link(version, ArtifactName("acme", "p", "a-shelf"))
    run = {"entityName": "acme", "projectName": "p", "runName": "r"}
    served.data("mutation M($i: X) { upsertBucket(input: $i) { inserted } }", i={**run, "modelName": "p", "name": "r"})
    served.data("mutation M($i: X) { useArtifact(input: $i) { artifact { id } } }", i={**run, "artifactID": id})
    asked = "mutation M($i: X) { createRunFiles(input: $i) { files { name uploadUrl sizeBytes } } }"
    (file, _) = served.data(asked, i={**run, "files": ["f", "late"]})["files"]
    assert served.http.put(file["uploadUrl"], data=b"x", timeout=10).status_code == 200
