"""What goes wrong between the bytes of a connection and a request: framing, slowness, clients that go away, browsers."""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served import BY_ID, COMMIT, Served, digest_of, manifest_of, md5_of, no_fault, upload_of  # noqa: F401 - a fixture for all

from artifactfs.serve import schema
from artifactfs.serve.contents import Download


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("served"), header_timeout=1.0, body_timeout=1.0).running() as running:
        yield running


def eventually(holds: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether it comes to hold in time."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        threading.Event().wait(0.01)
    return True


def url_of(served: Served, collection: str, files: dict[str, bytes]) -> list[str]:
    id = served.log(files, collection)
    return [edge["node"]["directUrl"] for edge in served.data(BY_ID, id=id)["files"]["edges"]]


def authorization(served: Served) -> str:
    return "Authorization: Basic " + base64.b64encode(f"api:{served.writer}".encode()).decode()


# --- framing --------------------------------------------------------------------------------------

VIEWER = b'{"query": "{ viewer { username } }"}'
HIDDEN = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    "headers",
    [
        "Content-Length: 0\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 4",
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: 5, 6",
        "Content-Length: -1",
        "Content-Length: +5",
        "Content-Length: 0x5",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding : chunked",
        "Transfer-Encoding: \x0bchunked",
        "X: a\rContent-Length: 5",
        "Content-Length: 5\x00",
        "Host: y",
    ],
)
def test_a_body_ends_where_everybody_says_it_does(served: Served, headers: str) -> None:
    """One answer, which refuses, and the end: what follows is never taken for a second request."""
    head = f"POST /graphql HTTP/1.1\r\nHost: x\r\n{authorization(served)}\r\n{headers}\r\n\r\n"
    answer = served.raw(head.encode() + b"0\r\n\r\n" + HIDDEN, ends=False)
    assert answer.count(b"HTTP/1.1 ") == 1, answer
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 501")), answer
    assert b'"ok"' not in answer


def test_one_request_after_the_other_on_a_connection(served: Served) -> None:
    """Also when a body is refused before it was read, and when requests come before the answers."""
    auth = authorization(served)
    good = f"POST /graphql HTTP/1.1\r\nHost: x\r\n{auth}\r\nContent-Length: {len(VIEWER)}\r\n\r\n".encode() + VIEWER
    refused = b"POST /graphql HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n12345"
    chunked = f"POST /graphql HTTP/1.1\r\nHost: x\r\n{auth}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    chunked += b"".join(b"1\r\n" + bytes([byte]) + b"\r\n" for byte in VIEWER) + b"0\r\n\r\n"
    last = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = served.raw(good + refused + chunked + HIDDEN + last, ends=False)
    statuses = [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200", b"401", b"200", b"200", b"200"]
    assert answer.count(b'"username":"writer"') == 2


def test_what_is_no_http(served: Served) -> None:
    for data in (
        b"\x16\x03\x01\x02\x00\x01",
        b"GET\r\n\r\n",
        b"\r\n" * 100,
        b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
        b"\x00" * 5000,
    ):
        answer = served.raw(data)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer
    assert served.graphql("{ viewer { id } }")["data"]


# --- slowness -------------------------------------------------------------------------------------


def closed_in(connection: socket.socket, seconds: float, drip: bytes = b"") -> bool:
    """Whether the server ends the connection in time, while a byte is sent to it now and then."""
    end = time.monotonic() + seconds
    connection.settimeout(0.1)
    while time.monotonic() < end:
        try:
            if drip:
                connection.sendall(drip)
            if connection.recv(65536) == b"":
                return True
        except TimeoutError:
            continue
        except OSError:
            return True
    return False


def test_a_refused_body_may_not_drip_for_ever(served: Served) -> None:
    """Nobody needs a key for a connection: one that was answered 401 must not stay for as long as somebody sends to it."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(b"POST /graphql HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 401")
        assert closed_in(connection, 8, b"x")


def test_a_body_that_drips_is_refused(served: Served) -> None:
    """Each byte comes in time, all of them do not."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        head = f"POST /graphql HTTP/1.1\r\nHost: x\r\n{authorization(served)}\r\nContent-Length: 100000\r\n\r\n"
        connection.sendall(head.encode())
        assert closed_in(connection, 8, b" ")


def test_readers_that_take_nothing_are_cut_off(served: Served) -> None:
    (url,) = url_of(served, "slow-reader", {"blob": os.urandom(40 << 20)})
    path = url.removeprefix(served.url)

    def running() -> float:
        text = served.http.get(served.url + "/metrics", timeout=10).text
        return float(text.split("\nartifactfs_serve_requests_running ")[1].split()[0])

    before = running()
    connections = []
    for close in ("", "Connection: close\r\n"):
        connection = socket.create_connection(("127.0.0.1", served.port), timeout=10)
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n{close}\r\n".encode())
        connections.append(connection)
    assert eventually(lambda: running() == before + 2)
    assert eventually(lambda: running() == before, 15)
    for connection in connections:
        connection.close()
    assert served.graphql("{ viewer { id } }")["data"]


def test_what_a_client_does_not_wait_for_is_not_read(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for much and goes away costs next to nothing."""
    (url,) = url_of(served, "gone", {"blob": bytes(64 << 20)})
    path = url.removeprefix(served.url)
    read = []
    whole = Download.read
    monkeypatch.setattr(Download, "read", lambda self, *span: read.append(span) or whole(self, *span))
    closed: list[Any] = []
    close = Download.close
    monkeypatch.setattr(Download, "close", lambda self: closed.append(self) or close(self))
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert connection.recv(10)
    assert eventually(lambda: len(closed) == 3)
    assert len(read) < 96  # of 192 pieces; the kernel takes some MiB


# --- browsers -------------------------------------------------------------------------------------

NAMES = ["page.html", "x.svg", "x.js", "a\r\nSet-Cookie: x=1", 'a"; filename="b.html', "ü\u202ecod.exe", "%0d%0aX: y"]


def test_what_people_store_does_nothing_in_a_browser(served: Served) -> None:
    script = b"<html><script>alert(1)</script>"
    files = {name: script + name.encode() for name in NAMES}
    for url in url_of(served, "pages", files):
        answer = served.http.get(url, timeout=10)
        assert answer.status_code == 200 and answer.content.startswith(script)
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["content-disposition"] == "attachment"
        assert "set-cookie" not in answer.headers and "x" not in answer.headers
    answers = [
        served.http.get(served.url + path, timeout=10)
        for path in ("/<script>alert(1)</script>", "/healthz", "/metrics", "/storage/<script>/x", "/graphql")
    ]
    answers.append(served.post({"query": "<script>"}))
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-store"
        assert not answer.headers["content-type"].startswith("text/html")


def test_files_of_runs_do_nothing_either(served: Served) -> None:
    made = "mutation M($i: X) { upsertBucket(input: $i) { inserted } }"
    served.data(made, i={"entityName": "acme", "modelName": "p", "name": "r1"})
    asked = "mutation M($i: X) { createRunFiles(input: $i) { files { name uploadUrl directUrl } } }"
    input = {"entityName": "acme", "projectName": "p", "runName": "r1", "files": ["page.html", "a/b.js"]}
    for file in served.data(asked, i=input)["files"]:
        assert served.http.get(file["directUrl"], timeout=10).status_code == 404  # not there yet
        assert served.http.put(file["uploadUrl"], data=b"<script>", timeout=10).status_code == 200
        answer = served.http.get(file["directUrl"], timeout=10)
        assert (answer.content, answer.headers["content-type"]) == (b"<script>", "application/octet-stream")
        assert answer.headers["content-disposition"] == "attachment"


def test_pages_of_other_sites_are_not_answered(served: Served) -> None:
    """A browser that remembers the password sends it with every request, also one that another site's page makes."""
    for site, status in (("cross-site", 400), ("same-site", 400), ("same-origin", 200), ("none", 200)):
        answer = served.http.post(
            served.url + "/graphql", data=VIEWER, auth=("api", served.writer), headers={"Sec-Fetch-Site": site}, timeout=10
        )
        assert answer.status_code == status, site


# --- signed URLs ----------------------------------------------------------------------------------


def test_a_signed_url_opens_one_thing_only(served: Served) -> None:
    first, second = url_of(served, "signed", {"a.txt": b"first", "b.txt": b"second"})
    id = base64.b64encode(b"Artifact:acme/p/signed:v0").decode()
    manifest = served.data(BY_ID, id=id)["currentManifest"]["file"]["directUrl"]
    token = first.split("/")[-2]
    for name in ("b.txt", "..%2fb.txt", "x/y/z", "%00"):  # what follows the token is for people
        assert served.http.get(f"{served.url}/storage/{token}/{name}", timeout=10).content == b"first"
    for path in (f"/artifacts/acme/{token}", f"/files/{token}/x", f"/storage/x{token}/a.txt", f"/storage//{token}/a.txt"):
        assert served.http.get(served.url + path, timeout=10).status_code in (401, 403, 404, 405), path
    for url in (first, second, manifest):
        for method in ("PUT", "POST", "DELETE", "PATCH"):
            assert served.http.request(method, url, data=b"x", timeout=10).status_code in (403, 405), (method, url)
    assert served.http.get(second, timeout=10).content == b"second"


def test_uploads_are_over_with_their_commit(served: Served) -> None:
    data = b"content"
    artifact = served.begin(artifactCollectionName="over", digest=digest_of({"a": md5_of(data)}))
    upload = served.announce(artifact, "a", data)["uploadUrl"]
    assert served.http.get(upload, timeout=10).status_code == 403  # it is for PUT
    assert served.http.put(upload, data=data, timeout=10).status_code == 200
    served.put_manifest(artifact, manifest_of({"a": {"digest": md5_of(data), "size": 7}}))
    served.data(COMMIT, id=artifact)
    assert served.http.put(upload, data=data, timeout=10).status_code == 404
    assert not (served.root / "data/pending" / upload_of(artifact)).exists()


def test_a_url_goes_with_the_right_of_its_key(served: Served) -> None:
    key = served.keys.add("soon", {"acme": "write"})
    data = b"of a key that changes"
    artifact = served.begin(key, artifactCollectionName="soon")
    file = {"artifactID": artifact, "name": "a", "md5": md5_of(data)}
    query = "mutation M($i: X) { createArtifactFiles(input: $i) { files { edges { node { uploadUrl } } } } }"
    (edge,) = served.data(query, key, i={"artifactFiles": [file]})["files"]["edges"]
    upload = edge["node"]["uploadUrl"]
    kept = json.loads(served.keys.path.read_text())
    for row in kept["keys"]:
        if row["name"] == "soon":
            row["grants"] = {"acme": "read"}
    served.keys.path.write_text(json.dumps(kept))  # edited by hand, while the server runs
    assert served.http.put(upload, data=data, timeout=10).status_code == 404
    served.keys.remove("soon")
    assert served.http.put(upload, data=data, timeout=10).status_code == 403


# --- GraphQL --------------------------------------------------------------------------------------


def test_batches_and_explosions(served: Served) -> None:
    batch = [{"query": "{ viewer { id } }"}] * 50
    assert "errors" in served.post(json.dumps(batch).encode()).json()
    aliases = "{ " + " ".join(f"a{n}: viewer {{ id }}" for n in range(19)) + " }"
    assert len(served.graphql(aliases)["data"]) == 19
    nested = "{ viewer { teams { edges { node { " + " ".join(f"a{n}: name" for n in range(200)) + " } } } } }"
    assert "too large" in served.message(nested)
    lists = '{"query": "query Q($x: X) { entity(name: $x) { name } }", "variables": {"x": ' + "[" * 900 + "]" * 900 + "}}"
    assert served.post(lists.encode()).status_code in (200, 400)
    wide = {"query": "query Q($x: X) { entity(name: $x) { name } }", "variables": {"x": ["y"] * 500_000}}
    begun = time.monotonic()
    answer = served.post(wide)
    assert (answer.status_code, time.monotonic() - begun < 10) == (200, True)
    many = {"query": "query Q($x: X) { viewer { id } }", "variables": {f"v{n}": n for n in range(100_000)}}
    assert served.post(many).json()["data"]["viewer"]["id"]


def test_a_page_of_many_fields_is_bounded(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.log({f"{n}.txt": b"x" for n in range(50)}, "many")
    monkeypatch.setattr(schema._Run.__init__, "__defaults__", (100, False))
    id = base64.b64encode(b"Artifact:acme/p/many:v0").decode()
    query = "query Q($id: ID!) { artifact(id: $id) { files { edges { node { name directUrl md5 digest } } } } }"
    assert "too much at once" in served.message(query, id=id)


def test_large_requests_do_not_stop_the_others(served: Served) -> None:
    """JSON of some megabytes is read beside the event loop, which goes on answering."""
    body = json.dumps({"query": "{ viewer { id } }", "variables": {"x": [{"a": [n]} for n in range(400_000)]}}).encode()
    worst = 0.0
    done = threading.Event()

    def send() -> None:
        served.post(body)
        done.set()

    thread = threading.Thread(target=send)
    thread.start()
    while not done.is_set():
        begun = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)
        connection.request("GET", "/healthz")
        assert connection.getresponse().status == 200
        connection.close()
        worst = max(worst, time.monotonic() - begun)
    thread.join()
    assert worst < 8


def test_many_connections_at_once(tmp_path: Path) -> None:
    """Beyond the limit there is an answer that says to try again; those within it go on."""
    with Served(tmp_path, connections=20).running() as served:
        idle = [socket.create_connection(("127.0.0.1", served.port), timeout=10) for _ in range(25)]
        try:
            late = socket.create_connection(("127.0.0.1", served.port), timeout=10)
            late.sendall(HIDDEN)
            assert late.recv(4096).startswith(b"HTTP/1.1 503")
            late.close()
        finally:
            for connection in idle:
                connection.close()
        assert eventually(lambda: served.http.get(served.url + "/healthz", timeout=10).status_code == 200)
