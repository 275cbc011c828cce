"""The HTTP session against a real server that fails: right bytes or the right error, within a bound, and no secret told."""

from __future__ import annotations

import logging
import os
import random
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_server import FaultServer

from artifactfs import attempts, http
from artifactfs.errors import (
    ArtifactFSError,
    IntegrityError,
    NetworkError,
    NotFoundError,
    NotPermittedError,
    SourceChangedError,
    UsageError,
)
from artifactfs.http import NoRangesError, Pin

DATA = random.Random(1).randbytes(3_000_000)
PATH = "/data/a.bin"


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer({PATH: DATA, "/empty": b""}) as server:
        yield server


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "BACKOFF", 0.01)


def pin_of(server: FaultServer, path: str = PATH) -> Pin:
    return Pin(server.etag(path) or "", "", len(server.contents[path]))


def read(server: FaultServer, offset: int = 0, size: int = len(DATA), pin: Pin | None = None, deadline: float = 10.0) -> bytes:
    return b"".join(http.get_range(server.url(PATH), offset, size, pin or pin_of(server), deadline))


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, len(DATA)), (len(DATA) - 1, 1), (1234, 2_000_000), (5, 0)])
def test_ranges(server: FaultServer, offset: int, size: int) -> None:
    assert read(server, offset, size) == DATA[offset : offset + size]
    assert server.body_bytes == size


def test_pieces_come_as_they_arrive(server: FaultServer) -> None:
    server.faults.stall_after = 100_000
    stream = http.get_range(server.url(PATH), 0, len(DATA), pin_of(server), 30)
    began = time.monotonic()
    got = bytearray()
    while len(got) < 100_000:
        got += next(stream)
    assert time.monotonic() - began < 5
    assert got == DATA[: len(got)]
    stream.close()  # type: ignore[attr-defined]


def test_connections_are_kept(server: FaultServer) -> None:
    made = []
    connect = socket.create_connection

    def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
        made.append(args)
        return connect(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "create_connection", counted)
        patch.setattr(socket.socket, "connect", _counting(socket.socket.connect, made))
        for offset in range(0, 100_000, 10_000):
            assert read(server, offset, 10_000) == DATA[offset : offset + 10_000]
    assert len(made) <= 1


def _counting(connect, made):  # type: ignore[no-untyped-def]
    def wrapper(self, address):  # type: ignore[no-untyped-def]
        made.append(address)
        return connect(self, address)

    return wrapper


def test_probe(server: FaultServer) -> None:
    pin = http.probe(server.url(PATH))
    assert pin == Pin(server.etag(PATH) or "", "Tue, 14 Nov 2023 22:13:20 GMT", len(DATA))
    assert [method for method, _, _ in server.seen] == ["GET"]
    assert http.probe(server.url("/empty")).size == 0
    server.faults.chunked, server.faults.etag, server.faults.modified = True, None, False
    assert http.probe(server.url(PATH)) == Pin()


def test_whole(server: FaultServer) -> None:
    server.faults.chunked = True
    assert b"".join(http.get_whole(server.url(PATH))) == DATA
    server.faults.chunked, server.faults.cut_after = False, 1000
    with pytest.raises(NetworkError, match="try again"):
        list(http.get_whole(server.url(PATH)))


def test_content_encodings_are_not_undone(server: FaultServer) -> None:
    server.faults.extra_headers = {"Content-Encoding": "gzip"}
    assert read(server) == DATA
    assert all(headers["accept-encoding"] == "identity" for _, _, headers in server.seen)


# Broken and slow answers


@pytest.mark.parametrize("cut", [0, 1, 99_999, 1_000_000, len(DATA) - 1])
def test_a_cut_body_is_resumed(server: FaultServer, cut: int) -> None:
    server.faults.cut_after, server.faults.cuts = cut, 2
    assert read(server, 7, len(DATA) - 7) == DATA[7:]
    assert all(headers.get("if-match") == server.etag(PATH) for _, _, headers in server.seen)
    assert server.body_bytes == len(DATA) - 7


def test_a_body_that_is_always_cut_makes_progress(server: FaultServer) -> None:
    server.faults.cut_after = 200_000
    assert read(server) == DATA


def test_a_body_that_never_comes_is_an_error(server: FaultServer) -> None:
    server.faults.cut_after = 0
    with pytest.raises(NetworkError, match="attempt"):
        read(server)
    assert server.requests == attempts.MAX_ATTEMPTS


def test_changed_in_the_middle(server: FaultServer) -> None:
    """After a cut the object is another: what came is of the old one, and nothing of the new one is yielded."""
    server.faults.cut_after, server.faults.cuts = 500_000, 1
    stream = http.get_range(server.url(PATH), 0, len(DATA), pin_of(server), 10)
    got = next(stream)
    server.contents[PATH] = bytes(len(DATA))
    with pytest.raises(SourceChangedError):
        while True:
            got += next(stream)
    assert got == DATA[: len(got)]


def test_a_length_that_is_wrong(server: FaultServer) -> None:
    server.faults.content_length = 1000  # less than the range it claims to send
    assert read(server, 0, 3000) == DATA[:3000]
    server.faults.content_length = len(DATA) * 2
    assert read(server, 100, 3000) == DATA[100:3100]


def test_a_stall_ends_at_the_deadline(server: FaultServer) -> None:
    server.faults.stall_after = 1000
    began = time.monotonic()
    with pytest.raises(NetworkError, match="no answer in time"):
        read(server, deadline=1.0)
    assert time.monotonic() - began < 4


def test_a_stalled_connection_is_replaced(server: FaultServer) -> None:
    server.faults.stall_after, server.faults.stalls = 50_000, 1
    assert read(server, deadline=2.0) == DATA


def test_a_server_that_never_answers(server: FaultServer) -> None:
    server.faults.latency = 60
    began = time.monotonic()
    with pytest.raises(NetworkError):
        read(server, deadline=1.0)
    assert time.monotonic() - began < 4


def test_drops_are_no_progress(server: FaultServer) -> None:
    server.faults.drip = 0.02
    began = time.monotonic()
    with pytest.raises(NetworkError, match="too slow"):
        read(server, deadline=1.0)
    assert time.monotonic() - began < 4


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_transient_statuses_are_retried(server: FaultServer, status: int) -> None:
    server.faults.status, server.faults.statuses = status, 3
    assert read(server) == DATA
    assert server.requests == 4


def test_every_other_answer_is_a_503(server: FaultServer) -> None:
    server.faults.status, server.faults.every, server.faults.cut_after = 503, 2, 300_000
    assert read(server) == DATA


def test_retry_after_is_honoured_within_the_deadline(server: FaultServer) -> None:
    server.faults.status, server.faults.statuses, server.faults.retry_after = 503, 1, "1"
    began = time.monotonic()
    assert read(server, 0, 10) == DATA[:10]
    assert 1.0 <= time.monotonic() - began < 5
    server.faults.statuses, server.faults.retry_after = 1, "3600"
    began = time.monotonic()
    with pytest.raises(NetworkError, match="503"):
        read(server, 0, 10, deadline=5)
    assert time.monotonic() - began < 4
    server.faults.statuses, server.faults.retry_after = 1, "soon"
    assert read(server, 0, 10) == DATA[:10]


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(NetworkError, match="Connection refused"):
        list(http.get_range(f"http://127.0.0.1:{port}/x", 0, 10, Pin(size=10), 5))


def test_an_unknown_host() -> None:
    with pytest.raises(NetworkError, match="host name is not known"):
        http.probe("http://no-such-host.invalid/x", 5)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        *((status, NotPermittedError) for status in (401, 403)),
        *((status, NotFoundError) for status in (404, 410)),
        *((status, http.StatusError) for status in (204, 400, 418, 501)),
        (412, SourceChangedError),
    ],
)
def test_final_statuses(server: FaultServer, status: int, error: type[ArtifactFSError]) -> None:
    server.faults.status = status
    with pytest.raises(error) as caught:
        read(server)
    assert type(caught.value) is error
    assert server.requests == 1
    assert "127.0.0.1" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://", "http://[::1", "http://a b/", "http://host:notaport/", "http:///x"])
def test_malformed_urls(url: str) -> None:
    with pytest.raises((UsageError, NetworkError)):
        http.probe(url, 2)


# Pins


def test_if_match_is_sent_and_the_answer_compared(server: FaultServer) -> None:
    server.faults.honour_if_match = False
    with pytest.raises(SourceChangedError):
        read(server, pin=Pin('"another"', "", len(DATA)))
    assert server.seen[0][2]["if-match"] == '"another"'
    assert server.body_bytes <= len(DATA)


def test_412(server: FaultServer) -> None:
    with pytest.raises(SourceChangedError, match="add it again"):
        read(server, pin=Pin('"another"', "", len(DATA)))


def test_an_etag_that_is_no_longer_sent(server: FaultServer) -> None:
    pin = pin_of(server)
    server.faults.etag, server.faults.honour_if_match = None, False
    with pytest.raises(SourceChangedError):
        read(server, pin=pin)


@pytest.mark.parametrize("recorded", ['W/"abc"', '"abc"'])
def test_weak_etags_are_compared_not_sent(server: FaultServer, recorded: str) -> None:
    server.faults.etag = 'W/"abc"'
    if recorded.startswith("W/"):
        assert read(server, pin=Pin(recorded, "", len(DATA))) == DATA
        assert "if-match" not in server.seen[0][2]
    server.faults.honour_if_match = False
    assert read(server, pin=Pin(recorded, "", len(DATA))) == DATA
    with pytest.raises(SourceChangedError):
        read(server, pin=Pin('W/"other"', "", len(DATA)))


def test_without_etag_time_and_size_are_compared(server: FaultServer) -> None:
    server.faults.etag = None
    pin = http.probe(server.url(PATH))
    assert read(server, pin=pin) == DATA
    server.mtime += 1
    with pytest.raises(SourceChangedError):
        read(server, pin=pin)
    server.faults.modified = False
    with pytest.raises(SourceChangedError):
        read(server, pin=pin)
    server.contents[PATH] = DATA + b"!"
    with pytest.raises(SourceChangedError):
        read(server, 0, 10, pin=Pin(size=len(DATA)))
    server.contents[PATH] = DATA[:100]
    with pytest.raises(SourceChangedError):
        read(server, 50, 100, pin=Pin(size=len(DATA)))
    with pytest.raises(SourceChangedError):
        read(server, 200, 100, pin=Pin(size=len(DATA)))


@pytest.mark.parametrize(
    "given",
    [
        "bytes 0-9/3000000",
        "bytes 100-109/3000000",
        "bytes 101-110/3000000",
        "bytes 100-110/3000000",
        "bytes */3000000",
        "x",
        "lines 100-199/*",
    ],
)
def test_a_wrong_content_range(server: FaultServer, given: str) -> None:
    server.faults.content_range = given
    with pytest.raises(IntegrityError, match="asked for bytes 100-199"):
        read(server, 100, 100)


def test_a_content_range_without_total(server: FaultServer) -> None:
    server.faults.content_range = "bytes 100-199/*"
    assert read(server, 100, 100) == DATA[100:200]


def test_a_206_without_content_range(server: FaultServer) -> None:
    server.faults.content_range = " "
    with pytest.raises(IntegrityError):
        read(server, 100, 100)


# Servers without ranges


def test_no_ranges_gives_the_whole_stream(server: FaultServer) -> None:
    server.faults.ranges = False
    with pytest.raises(NoRangesError) as caught:
        read(server, 100, 100)
    assert b"".join(caught.value.stream) == DATA
    assert server.requests == 1
    assert read(server) == DATA  # the whole was asked for: a 200 is as good as a 206


def test_no_ranges_and_a_cut(server: FaultServer) -> None:
    server.faults.ranges = False
    server.faults.cut_after, server.faults.cuts = 1_000_000, 2
    with pytest.raises(NoRangesError) as caught:
        read(server, 100, 100)
    assert b"".join(caught.value.stream) == DATA
    assert read(server) == DATA


def test_no_ranges_and_always_cut(server: FaultServer) -> None:
    """Reading again up to where it broke is no progress."""
    server.faults.ranges, server.faults.cut_after = False, 1_000_000
    began = time.monotonic()
    with pytest.raises(NetworkError):
        read(server)
    assert server.requests == attempts.MAX_ATTEMPTS
    assert time.monotonic() - began < 5


def test_no_ranges_and_changed_after_a_cut(server: FaultServer) -> None:
    server.faults.ranges = False
    server.faults.cut_after, server.faults.cuts = 1_000_000, 1
    with pytest.raises(NoRangesError) as caught:
        read(server, 100, 100)
    got = next(caught.value.stream)
    server.contents[PATH] = bytes(len(DATA))
    with pytest.raises(SourceChangedError):
        while True:
            got += next(caught.value.stream)
    assert got == DATA[: len(got)]


def test_ranges_that_go_away(server: FaultServer) -> None:
    server.faults.cut_after, server.faults.cuts = 1000, 1
    stream = http.get_range(server.url(PATH), 100, 1_000_000, pin_of(server), 10)
    got = next(stream)
    server.faults.ranges = False
    with pytest.raises(NoRangesError) as caught:
        while True:
            got += next(stream)
    assert got == DATA[100 : 100 + len(got)]
    assert b"".join(caught.value.stream) == DATA


@pytest.mark.parametrize("ranges", [True, False])
def test_chunked_bodies(server: FaultServer, ranges: bool) -> None:
    server.faults.chunked, server.faults.ranges = True, ranges
    assert read(server) == DATA
    server.faults.cut_after, server.faults.cuts = 700_000, 2
    assert read(server) == DATA


# Redirects, credentials, TLS


def test_redirects_to_another_host_lose_the_password(server: FaultServer, isolated_home: Path) -> None:
    (isolated_home / ".netrc").write_text("machine 127.0.0.1 login me password s3cret\n")
    (isolated_home / ".netrc").chmod(0o600)
    with FaultServer({PATH: DATA}) as first:
        first.faults.redirect = server.url(PATH).replace("127.0.0.1", "localhost")
        assert b"".join(http.get_range(first.url(PATH), 10, 100, pin_of(server))) == DATA[10:110]
        assert first.seen[0][2]["authorization"].startswith("Basic ")
    assert "authorization" not in server.seen[0][2]
    assert server.seen[0][2]["if-match"] == server.etag(PATH)


def test_redirects_in_circles(server: FaultServer) -> None:
    server.faults.redirect = PATH
    with pytest.raises(NetworkError, match="circles"):
        read(server)


def test_a_redirect_to_a_file_is_refused(server: FaultServer) -> None:
    server.faults.redirect = "file:///etc/passwd"
    with pytest.raises((UsageError, NetworkError)):
        read(server)


SECRETS = ["s3cret", "me:", "AKIA", "0123456789abcdef"]


def test_no_secret_in_messages_and_logs(server: FaultServer, caplog: pytest.LogCaptureFixture) -> None:
    query = "?id=5&X-Amz-Signature=0123456789abcdef&X-Amz-Credential=AKIA&token=s3cret#s3cret"
    url = server.url(PATH).replace("http://", "http://me:s3cret@") + query
    shown = http.shown(url)
    assert "id=5" in shown and "X-Amz-Signature=…" in shown
    texts = [shown]
    with caplog.at_level(logging.DEBUG, logger="artifactfs"):
        for status in (403, 404, 412, 418, 503):
            server.faults.status = status
            with pytest.raises(ArtifactFSError) as caught:
                list(http.get_range(url, 0, 10, Pin(size=10), 1))
            texts.append(str(caught.value))
        server.stop()
        with pytest.raises(NetworkError) as caught:
            http.probe(url, 1)
        texts.append(str(caught.value))
    texts += [record.getMessage() for record in caplog.records if record.name.startswith("artifactfs")]
    assert not [secret for secret in SECRETS for text in texts if secret in text]
    assert "line\nbreak" not in http.shown("http://host/line\nbreak")


@pytest.fixture
def tls_server(tmp_path: Path) -> Iterator[FaultServer]:
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    command += ["-keyout", str(key), "-out", str(cert), "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    with FaultServer({PATH: DATA}, tls=context) as server:
        yield server


def test_tls_is_verified(tls_server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NetworkError, match="certificate is not trusted"):
        read(tls_server)
    assert tls_server.requests == 0
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "cert.pem"))
    assert read(tls_server, 5, 1_000_000) == DATA[5:1_000_005]


def test_a_redirect_out_of_tls_is_refused(
    tls_server: FaultServer, server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "cert.pem"))
    tls_server.faults.redirect = server.url(PATH)
    with pytest.raises(NetworkError, match="not encrypted"):
        read(tls_server)
    assert server.requests == 0


# Threads and processes


def test_many_threads_share_the_session(server: FaultServer) -> None:
    server.faults.status, server.faults.every = 503, 7
    wrong = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(10):
            offset = chance.randrange(len(DATA) - 50_000)
            if read(server, offset, 50_000) != DATA[offset : offset + 50_000]:
                wrong.append(offset)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong


def test_a_forked_child_has_its_own_connections(server: FaultServer) -> None:
    assert read(server, 0, 1000) == DATA[:1000]
    parents = http._session()
    child = os.fork()
    if child == 0:
        try:
            good = http._session() is not parents and read(server, 5, 1000) == DATA[5:1005]
            os._exit(0 if good else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert http._session() is parents
    assert read(server, 9, 1000) == DATA[9:1009]
