"""A link of known round trip and bandwidth in front of a server on loopback, as a process of its own that costs little.

``link.py UPSTREAM_PORT ROUND_TRIP BANDWIDTH`` (seconds; bytes per second of a connection, each way) prints the port it listens
on. What a client sends arrives a round trip later, in order; what the server sends is passed on at once, at the bandwidth, which
the kernel keeps (SO_MAX_PACING_RATE). A line on standard input is answered with ``bytes down, bytes up, requests`` so far.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from typing import NamedTuple

_PIECE = 256 << 10
_MAX_PACING_RATE = 47  # asm-generic/socket.h; Python has no name for it
_VERBS = (b"GET ", b"PUT ", b"HEAD", b"POST", b"DELE")


class Moved(NamedTuple):
    """Bytes each way, and requests."""

    down: int
    up: int
    requests: int


class Link:
    """The program as a process of its own in front of ``upstream`` (a URL), for a benchmark."""

    def __init__(self, upstream: str, round_trip: float, rate: float) -> None:
        command = [sys.executable, __file__, upstream.rpartition(":")[2], str(round_trip), str(rate)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.url = f"http://127.0.0.1:{int(self._ask())}"

    def _ask(self, question: str = "") -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(question)
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def moved(self) -> Moved:
        """What has passed so far."""
        return Moved(*map(int, self._ask("\n").split()))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Counts:
    """Guarded by ``lock``."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.down = self.up = self.requests = 0


class Connection:
    """One client's connection and the server's for it: three threads, which end with either side."""

    def __init__(self, client: socket.socket, server: socket.socket, delay: float, counts: Counts) -> None:
        self._client, self._server, self._delay, self._counts = client, server, delay, counts
        self._sent: queue.Queue[tuple[float, bytes]] = queue.Queue(64)

    def start(self) -> None:
        for work in (self._receive, self._deliver, self._answer):
            threading.Thread(target=self._until_it_breaks, args=(work,), daemon=True).start()

    def _until_it_breaks(self, work: object) -> None:
        assert callable(work)
        with contextlib.suppress(OSError):
            work()
        for end in (self._client, self._server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _receive(self) -> None:
        data = b"-"
        while data:
            data = self._client.recv(_PIECE)
            with self._counts.lock:
                self._counts.up += len(data)
                self._counts.requests += data.startswith(_VERBS)
            self._sent.put((time.monotonic() + self._delay, data))

    def _deliver(self) -> None:
        while True:
            due, data = self._sent.get()
            time.sleep(max(due - time.monotonic(), 0))
            if not data:
                return
            self._server.sendall(data)

    def _answer(self) -> None:
        """From the server to the client without a copy into this process."""
        out, into = os.pipe()
        try:
            while size := os.splice(self._server.fileno(), into, _PIECE):
                with self._counts.lock:
                    self._counts.down += size
                while size:
                    size -= os.splice(out, self._client.fileno(), size)
        finally:
            os.close(out)
            os.close(into)


def main() -> None:
    upstream, delay, rate = int(sys.argv[1]), float(sys.argv[2]), int(float(sys.argv[3]))
    counts = Counts()
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    print(listener.getsockname()[1], flush=True)
    threading.Thread(target=_accept, args=(listener, upstream, delay, rate, counts), daemon=True).start()
    for _ in sys.stdin:
        with counts.lock:
            print(counts.down, counts.up, counts.requests, flush=True)


def _accept(listener: socket.socket, upstream: int, delay: float, rate: int, counts: Counts) -> None:
    while True:
        client, _ = listener.accept()
        server = socket.create_connection(("127.0.0.1", upstream))
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.setsockopt(socket.SOL_SOCKET, _MAX_PACING_RATE, rate)
        Connection(client, server, delay, counts).start()


if __name__ == "__main__":
    main()
