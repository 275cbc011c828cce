"""A proxy in front of an HTTP server, in which a test makes the link slow, the server fail, and answers go wrong or get lost.

::

    with Proxy(server.url) as proxy:
        proxy.add(Fault("status", every=10))              # 503 for one request in ten
        proxy.add(Fault("swallow", method="PUT", times=1))  # a PUT takes effect, its answer is lost
        client = server.client(proxy.url)
        …
        assert proxy.count(method="PUT") == 2

The head of a request goes through as it is, ``Host`` included, so that signatures stay valid: they are made for the proxy's
address and checked against the ``Host`` that the server sees. Everything may be changed while the proxy runs, from any thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import select
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Literal
from urllib.parse import urlsplit

_PIECE = 64 << 10
_HEAD = 64 << 10


@dataclasses.dataclass
class Fault:
    """What goes wrong with one request in ``every`` of those that match, at most ``times`` times (-1: always)."""

    kind: Literal["status", "cut", "truncate", "stall", "corrupt", "swallow", "drop"]
    """
    - ``status``: the server is not asked; the answer is ``status`` and has no body.
    - ``cut``: the connection ends after ``at`` bytes of the answer's body (before its head with -1).
    - ``truncate``: the body ends after ``at`` bytes, and Content-Length agrees with that.
    - ``stall``: nothing more comes after ``at`` bytes of the body (no head with -1), until :meth:`Proxy.release`.
    - ``corrupt``: the byte at ``at`` of the body (its last, if it is shorter) has its bits turned over.
    - ``swallow``: the server acts and answers; the connection ends instead of the answer.
    - ``drop``: the connection ends when ``at`` bytes of the request's body have gone through (at its head with -1).
    """
    method: str = ""
    """Only requests of this method; several may be given, separated by blanks."""
    header: str = ""
    """Only requests with this header."""
    path: str = ""
    """Only requests in whose target (path and query) this occurs."""
    every: int = 1
    times: int = -1
    at: int = 0
    status: int = 503
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Sent with ``status``."""
    seen: int = 0
    """Matching requests so far."""
    done: int = 0
    """How often it has happened."""

    def takes(self, request: Request) -> bool:
        """Whether it happens to this request; counts."""
        if not request.matches(self.method, self.header, self.path):
            return False
        self.seen += 1
        if self.seen % self.every or self.done == self.times:
            return False
        self.done += 1
        return True


@dataclasses.dataclass(frozen=True)
class Request:
    """The head of a request; names of headers in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]

    def matches(self, method: str = "", header: str = "", path: str = "") -> bool:
        return (
            (not method or self.method in method.split())
            and (not header or header.lower() in self.headers)
            and (not path or path in self.target)
        )


class Proxy:
    """Forwards to the server at ``upstream`` (``http://host:port``). ``latency`` is seconds before each answer begins;
    ``bandwidth`` is bytes a second of each connection and direction, 0 for no limit."""

    def __init__(self, upstream: str, *, latency: float = 0.0, bandwidth: float = 0.0) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname or "", parts.port or 80)
        self.latency = latency
        self.bandwidth = bandwidth
        self.requests: list[Request] = []
        self.bytes_down = 0
        """Bytes of bodies sent to clients."""
        self.bytes_up = 0
        """Bytes of bodies received from clients."""
        self.most_concurrent = 0
        self._concurrent = 0
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = int(self._listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Proxy:
        self._serve()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()
        self.refuse()

    def add(self, fault: Fault) -> Fault:
        """From now on ``fault`` happens, before those added later. Returns it: its counters tell what happened."""
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """No faults from now on; what is stalled stays so. Latency and bandwidth are as they were."""
        with self._lock:
            self._faults.clear()

    def release(self) -> None:
        """Everything that is stalled ends: its connection is closed."""
        self._released.set()
        self._released = threading.Event()

    def refuse(self) -> None:
        """The link is gone: open connections break, new ones are refused."""
        with self._lock:
            listener, self._listener = self._listener, None
            connections = tuple(self._open)
        for connection in (listener, *connections):
            if connection is not None:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        if listener is not None:
            listener.close()

    def accept(self) -> None:
        """The link is there again, at the same address."""
        with self._lock:
            self._listener = self._listener or socket.create_server(("127.0.0.1", self.port), backlog=256)
        self._serve()

    def count(self, method: str = "", header: str = "", path: str = "") -> int:
        """The number of requests that match, those that failed included."""
        with self._lock:
            return sum(request.matches(method, header, path) for request in self.requests)

    def reset(self) -> None:
        """All counters to nothing."""
        with self._lock:
            self.requests.clear()
            self.bytes_down = self.bytes_up = self.most_concurrent = 0

    def _serve(self) -> None:
        threading.Thread(target=self._accept_all, args=(self._listener,), daemon=True).start()

    def _accept_all(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connection, args=(client,), daemon=True).start()

    def _connection(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError, _Broken):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                if self._listener is None:
                    return
                self._open.add(client)
            try:
                self._exchanges(client)
            finally:
                with self._lock:
                    self._open.discard(client)

    def _exchanges(self, client: socket.socket) -> None:
        """All requests of a connection, one after the other, over one connection to the server."""
        with socket.create_connection(self._upstream) as server:
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ours, theirs = _Stream(client), _Stream(server)
            while head := ours.head():
                request = _parse(head)
                released = self._released  # before the fault: what is to stall when all is released must not
                fault = self._begin(request)
                try:
                    kept = _Exchange(self, ours, theirs, request, fault, released).run(head)
                finally:
                    with self._lock:
                        self._concurrent -= 1
                if not kept:
                    return

    def _begin(self, request: Request) -> Fault | None:
        """Counts the request; what goes wrong with it."""
        with self._lock:
            self.requests.append(request)
            self._concurrent += 1
            self.most_concurrent = max(self.most_concurrent, self._concurrent)
            return next((fault for fault in self._faults if fault.takes(request)), None)

    def pace(self, began: float, size: int) -> None:
        """Waits until ``size`` bytes since ``began`` are within the bandwidth."""
        if self.bandwidth:
            time.sleep(max(0.0, began + size / self.bandwidth - time.monotonic()))

    def moved(self, *, up: int = 0, down: int = 0) -> None:
        with self._lock:
            self.bytes_up += up
            self.bytes_down += down

    def stall(self, client: socket.socket, released: threading.Event) -> None:
        """Until :meth:`release`, or the client goes away."""
        poll = select.poll()
        poll.register(client, select.POLLIN)
        while not released.wait(0.05):
            if poll.poll(0) and not client.recv(1, socket.MSG_PEEK):
                return


class _Broken(Exception):
    """A connection ended where more was due, or has to end here."""


class _Stream:
    """Buffered reading from a socket."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._held = b""

    def head(self) -> bytes:
        """A head with its empty line; b"" at the end of the connection."""
        while b"\r\n\r\n" not in self._held:
            more = self.connection.recv(_PIECE)
            if not more or len(self._held) > _HEAD:
                return b""
            self._held += more
        head, _, self._held = self._held.partition(b"\r\n\r\n")
        return head + b"\r\n\r\n"

    def some(self, most: int) -> bytes:
        """At least one byte, at most so many."""
        if not self._held:
            self._held = self.connection.recv(min(_PIECE, max(most, 1)))
            if not self._held:
                raise _Broken
        piece, self._held = self._held[:most], self._held[most:]
        return piece

    def line(self) -> bytes:
        while b"\r\n" not in self._held:
            more = self.connection.recv(_PIECE)
            if not more:
                raise _Broken
            self._held += more
        line, _, self._held = self._held.partition(b"\r\n")
        return line + b"\r\n"

    def exactly(self, size: int) -> Iterator[bytes]:
        while size:
            piece = self.some(size)
            size -= len(piece)
            yield piece

    def rest(self) -> Iterator[bytes]:
        with contextlib.suppress(_Broken):
            while True:
                yield self.some(_PIECE)

    def chunks(self) -> Iterator[bytes]:
        """A chunked body as it is on the wire, to its end."""
        while True:
            line = self.line()
            yield line
            size = int(line.split(b";")[0], 16)
            yield from self.exactly(size)
            yield self.line()  # after the last chunk: the end of trailers, of which there are none here
            if not size:
                return


class _Exchange:
    """One request and its answer."""

    def __init__(
        self, proxy: Proxy, client: _Stream, server: _Stream, request: Request, fault: Fault | None, released: threading.Event
    ) -> None:
        self._proxy, self._client, self._server = proxy, client, server
        self._request, self._fault, self._released = request, fault, released
        self._began = 0.0

    def run(self, head: bytes) -> bool:
        """Whether both connections can go on with another request."""
        self._began = time.monotonic()
        if self._is("status"):
            self._refuse()
            return True
        self._forward(head)
        answer = self._server.head()
        while answer.startswith(b"HTTP/1.1 100"):
            answer = self._server.head()
        if not answer:
            raise _Broken
        delay = self._began + self._proxy.latency - time.monotonic()
        if delay > 0:
            time.sleep(delay)
        return self._answer(answer)

    def _is(self, kind: str) -> bool:
        return self._fault is not None and self._fault.kind == kind

    def _refuse(self) -> None:
        assert self._fault is not None
        for _ in self._request_body():
            pass
        time.sleep(self._proxy.latency)
        lines = [f"HTTP/1.1 {self._fault.status} Fault", "Content-Length: 0"]
        lines += [f"{name}: {value}" for name, value in self._fault.headers.items()]
        self._client.connection.sendall("\r\n".join([*lines, "", ""]).encode())

    def _forward(self, head: bytes) -> None:
        """The request to the server; ``Expect`` is answered here, because nothing waits for a proxy on loopback."""
        fault = self._fault if self._is("drop") else None
        if fault is not None and fault.at < 0:
            raise _Broken
        self._server.connection.sendall(_without(head, b"expect"))
        sent, began = 0, time.monotonic()
        for piece in self._request_body():
            part = piece if fault is None else piece[: fault.at - sent]
            self._proxy.moved(up=len(part))  # before whoever gets it can look
            self._server.connection.sendall(part)
            sent += len(part)
            self._proxy.pace(began, sent)
            if fault is not None and sent >= fault.at:
                break
        if fault is not None:
            raise _Broken

    def _request_body(self) -> Iterator[bytes]:
        headers = self._request.headers
        if "expect" in headers:
            self._client.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if "chunked" in headers.get("transfer-encoding", "").lower():
            return self._client.chunks()
        return self._client.exactly(int(headers.get("content-length", "0")))

    def _answer(self, head: bytes) -> bool:
        status, headers = int(head.split(b" ", 2)[1]), _headers(head)
        body, length, kept = self._answer_body(status, headers)
        if self._is("swallow"):
            for _ in body:
                pass
            raise _Broken
        fault = self._fault
        if fault is not None and fault.at < 0 and fault.kind in ("cut", "stall"):
            self._stop(fault)
        if fault is not None and fault.kind == "truncate" and length > fault.at:
            head = _without(_without(head, b"content-length"), b"connection")[:-2]
            head += f"Content-Length: {fault.at}\r\nConnection: close\r\n\r\n".encode()  # the server has more to say
        self._client.connection.sendall(head)
        return self._body(body, length) and kept

    def _answer_body(self, status: int, headers: Mapping[str, str]) -> tuple[Iterator[bytes], int, bool]:
        """The body's pieces, its length (-1 if it is not told), and whether the connection goes on after it."""
        kept = headers.get("connection", "").lower() != "close"
        if self._request.method == "HEAD" or status in (204, 304):
            return iter(()), 0, kept
        if "chunked" in headers.get("transfer-encoding", "").lower():
            return self._server.chunks(), -1, kept
        if "content-length" in headers:
            length = int(headers["content-length"])
            return self._server.exactly(length), length, kept
        return self._server.rest(), -1, False

    def _body(self, body: Iterator[bytes], length: int) -> bool:
        """Sends the body; whether it went out whole."""
        fault, sent, began = self._fault, 0, time.monotonic()
        stop = fault.at if fault is not None and fault.kind in ("cut", "truncate", "stall") else -1
        for piece in body:
            part = self._corrupted(piece, sent, length)
            if 0 <= stop < sent + len(part):
                part = part[: stop - sent]
            self._proxy.moved(down=len(part))
            self._client.connection.sendall(part)
            sent += len(part)
            self._proxy.pace(began, sent)
            if sent == stop:
                assert fault is not None
                self._stop(fault)
        return True

    def _corrupted(self, piece: bytes, start: int, length: int) -> bytes:
        if self._fault is None or self._fault.kind != "corrupt":
            return piece
        at = min(self._fault.at, length - 1) if length >= 0 else self._fault.at
        if not start <= at < start + len(piece):
            return piece
        changed = bytearray(piece)
        changed[at - start] ^= 0xFF
        return bytes(changed)

    def _stop(self, fault: Fault) -> None:
        if fault.kind == "stall":
            self._proxy.stall(self._client.connection, self._released)
        raise _Broken


def _parse(head: bytes) -> Request:
    method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
    return Request(method, target, _headers(head))


def _headers(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    pairs = (line.partition(":") for line in lines if line)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _without(head: bytes, name: bytes) -> bytes:
    """``head`` without the header of this (lower-case) name."""
    lines = head.split(b"\r\n")
    return b"\r\n".join(line for line in lines if line.partition(b":")[0].strip().lower() != name)
