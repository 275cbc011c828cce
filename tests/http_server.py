"""A real HTTP server on loopback that serves contents from memory and fails on request. It counts requests and body bytes.

::

    with FaultServer({"/a.bin": data}) as server:
        server.faults.ranges = False
        requests.get(server.url("/a.bin"))
        assert server.requests == 1
"""

from __future__ import annotations

import contextlib
import dataclasses
import email.utils
import hashlib
import re
import socket
import ssl
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

_PIECE = 64 << 10


@dataclasses.dataclass
class Faults:
    """What goes wrong, until it is changed back. Counters count requests (from 1) or bytes of one answer's body."""

    ranges: bool = True
    """False: every answer is a 200 with the whole content, and ``Accept-Ranges: none``."""
    etag: str | None = ""
    """"" derives a strong ETag from the content; None sends none; anything else is sent as it is."""
    modified: bool = True
    """Whether ``Last-Modified`` is sent."""
    honour_if_match: bool = True
    latency: float = 0.0
    """Seconds before each answer."""
    cut_after: int | None = None
    """Close the connection after so many bytes of a body that promised more, in every answer …"""
    cuts: int = -1
    """… or in so many answers only."""
    stall_after: int | None = None
    """Send so many bytes of a body, then nothing until :meth:`FaultServer.release` or the end of the test …"""
    stalls: int = -1
    """… in so many answers only."""
    status: int = 0
    """Answer this status instead, in each request whose number is divisible by …"""
    every: int = 1
    """… this, in at most so many answers."""
    statuses: int = -1
    retry_after: str = ""
    flip: frozenset[int] = frozenset()
    """Offsets into the content whose byte is sent with its bits turned over …"""
    flips: int = -1
    """… in so many answers only."""
    content_range: str = ""
    """Sent instead of the right one."""
    content_length: int | None = None
    """Sent instead of the right one; the connection is closed after the body."""
    chunked: bool = False
    """The body goes out chunked, without Content-Length."""
    redirect: str = ""
    """Every answer is a 302 to there."""
    drip: float = 0.0
    """Seconds between single bytes of a body."""
    extra_headers: Mapping[str, str] = dataclasses.field(default_factory=dict)


class FaultServer:
    """Serves ``contents`` (path to bytes), which may be changed while it runs."""

    def __init__(self, contents: Mapping[str, bytes], tls: ssl.SSLContext | None = None) -> None:
        self.contents = dict(contents)
        self.faults = Faults()
        self.mtime = 1_700_000_000
        self.requests = 0
        self.body_bytes = 0
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        """(method, path, headers with lower-case names) of every request."""
        self.concurrent = 0
        self.most_concurrent = 0
        self._lock = threading.Lock()
        self._etags: dict[str, tuple[bytes, str]] = {}
        self._released = threading.Event()
        self._server = _Server(self)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._scheme = "https" if tls is not None else "http"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def url(self, path: str) -> str:
        return f"{self._scheme}://127.0.0.1:{self.port}{path}"

    def reset_counts(self) -> None:
        with self._lock:
            self.requests = self.body_bytes = self.most_concurrent = 0
            self.seen.clear()

    def release(self) -> None:
        """Let everything that is stalled end (its connection is closed)."""
        self._released.set()

    def stop(self) -> None:
        """Close the port and all connections, as if the machine were gone."""
        self.release()
        self._server.shutdown()
        self._server.server_close()
        self._server.close_connections()
        self._thread.join(10)

    def __enter__(self) -> FaultServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._thread.is_alive():
            self.stop()

    def etag(self, path: str) -> str | None:
        if self.faults.etag == "":
            data = self.contents[path]
            known = self._etags.get(path)
            if known is None or known[0] is not data:
                known = self._etags[path] = (data, '"' + hashlib.sha256(data).hexdigest()[:24] + '"')
            return known[1]
        return self.faults.etag

    def count(self, method: str, path: str, headers: dict[str, str]) -> int:
        with self._lock:
            self.requests += 1
            self.seen.append((method, path, headers))
            self.concurrent += 1
            self.most_concurrent = max(self.most_concurrent, self.concurrent)
            return self.requests

    def finished(self) -> None:
        with self._lock:
            self.concurrent -= 1

    def sent(self, size: int) -> None:
        with self._lock:
            self.body_bytes += size

    def use_up(self, name: str) -> bool:
        """Whether a fault that is limited to a number of answers applies; counts it down."""
        with self._lock:
            left: int = getattr(self.faults, name)
            if left > 0:
                setattr(self.faults, name, left - 1)
            return left != 0

    def wait_released(self, seconds: float) -> bool:
        return self._released.wait(seconds)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, owner: FaultServer) -> None:
        self.owner = owner
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request, client_address) -> None:  # type: ignore[no-untyped-def]
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:  # type: ignore[no-untyped-def]
        self._open.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        for connection in tuple(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address) -> None:  # type: ignore[no-untyped-def]
        """Clients that go away are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits for the acknowledgement of its head
    server: _Server

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, body: bool) -> None:
        owner = self.server.owner
        number = owner.count(self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
        try:
            if owner.faults.latency:
                owner.wait_released(owner.faults.latency)
            self._respond(owner, number, body)
        except OSError:
            self.close_connection = True
        finally:
            owner.finished()

    def _respond(self, owner: FaultServer, number: int, body: bool) -> None:
        faults = owner.faults
        if faults.redirect:
            self._plain(302, {"Location": faults.redirect})
        elif faults.status and number % faults.every == 0 and owner.use_up("statuses"):
            self._plain(faults.status, {"Retry-After": faults.retry_after} if faults.retry_after else {})
        elif self.path not in owner.contents:
            self._plain(404, {})
        elif faults.honour_if_match and not self._matches(owner.etag(self.path)):
            self._plain(412, {})
        else:
            self._content(owner, body)

    def _matches(self, etag: str | None) -> bool:
        wanted = self.headers.get("If-Match")
        if wanted is None:
            return True
        return etag is not None and not etag.startswith("W/") and wanted == etag

    def _plain(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _content(self, owner: FaultServer, body: bool) -> None:
        faults, data = owner.faults, owner.contents[self.path]
        etag = owner.etag(self.path)
        wanted = self.headers.get("Range") if faults.ranges else None
        start, end = 0, len(data)
        if wanted is not None:
            match = re.fullmatch(r"bytes=([0-9]+)-([0-9]*)", wanted)
            if match:
                start, end = int(match[1]), min(int(match[2]) + 1 if match[2] else len(data), len(data))
            if start >= len(data):
                self._plain(416, {"Content-Range": f"bytes */{len(data)}"})
                return
        self.send_response(206 if wanted is not None else 200)
        if wanted is not None:
            self.send_header("Content-Range", faults.content_range or f"bytes {start}-{end - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes" if faults.ranges else "none")
        if etag is not None:
            self.send_header("ETag", etag)
        if faults.modified:
            self.send_header("Last-Modified", email.utils.formatdate(owner.mtime, usegmt=True))
        for name, value in faults.extra_headers.items():
            self.send_header(name, value)
        payload = self._flipped(owner, data, start, end)
        if faults.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(payload) if faults.content_length is None else faults.content_length))
        self.end_headers()
        if body:
            self._send(owner, payload)

    def _flipped(self, owner: FaultServer, data: bytes, start: int, end: int) -> memoryview:
        here = [offset for offset in owner.faults.flip if start <= offset < end]
        if not here or not owner.use_up("flips"):
            return memoryview(data)[start:end]
        changed = bytearray(data[start:end])
        for offset in here:
            changed[offset - start] ^= 0xFF
        return memoryview(changed)

    def _send(self, owner: FaultServer, payload: memoryview) -> None:
        faults = owner.faults
        cut = stall = len(payload)
        if faults.cut_after is not None and faults.cut_after < len(payload) and owner.use_up("cuts"):
            cut = faults.cut_after
        if faults.stall_after is not None and faults.stall_after < len(payload) and owner.use_up("stalls"):
            stall = faults.stall_after
        stop = min(cut, stall)
        step = 1 if faults.drip else _PIECE
        for offset in range(0, stop, step):
            piece = payload[offset : min(offset + step, stop)]
            owner.sent(len(piece))  # before who receives it can look
            self._write(piece)
            if faults.drip and owner.wait_released(faults.drip):
                break
        if stall < len(payload):
            owner.wait_released(120)
        if stop < len(payload) or faults.content_length is not None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif faults.chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _write(self, piece: memoryview) -> None:
        if self.server.owner.faults.chunked:
            self.wfile.write(b"%x\r\n" % len(piece))
            self.wfile.write(piece)
            self.wfile.write(b"\r\n")
        else:
            self.wfile.write(piece)
