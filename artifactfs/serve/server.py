"""The process: a socket, uvicorn with time-outs of our own, signals, and housekeeping."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from artifactfs.errors import UsageError, from_os_error
from artifactfs.serve.app import Application
from artifactfs.serve.service import Options, Service

log = logging.getLogger(__name__)

Ready: TypeAlias = Callable[[Callable[[], None]], None]
"""Told that requests are answered now; it is given what ends the server."""

_HOUSEKEEPING = 600.0
"""Seconds between two looks for uploads that nobody goes on with."""
_MAX_HEADERS = 64 << 10
_BACKLOG = 512


def protocol(header_timeout: float) -> type[H11Protocol]:
    """uvicorn's protocol, which closes a connection whose request line and headers do not come in time."""

    class Patient(H11Protocol):
        _waiting: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._unwatch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is h11.IDLE:
                self._watch()
            else:
                self._unwatch()

        def on_response_complete(self) -> None:
            self._unwatch()
            super().on_response_complete()

        def _watch(self) -> None:
            """The time runs from the first byte, however many follow."""
            if self._waiting is None:
                self._waiting = self.loop.call_later(header_timeout, self._too_slow)

        def _unwatch(self) -> None:
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None

        def _too_slow(self) -> None:
            if not self.transport.is_closing():
                self.transport.close()

    return Patient


class _Server(uvicorn.Server):
    """Tells when it is ready, and ends with a signal as a program that did what it was asked to."""

    def __init__(self, config: uvicorn.Config, ready: Ready) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready(self._stop)

    def _stop(self) -> None:
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def bound_socket(options: Options) -> socket.socket:
    """A listening socket; UsageError if there cannot be one there."""
    try:
        family = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0][0]
        found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # or asyncio would not set TCP_NODELAY
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((options.host, options.port))
        found.listen(_BACKLOG)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {options.host}:{options.port}: {error.strerror}; choose another --host or --port"
        ) from None
    return found


def url_of(options: Options, listening: socket.socket) -> str:
    """Where the server can be reached from this machine."""
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if options.tls_cert else 'http'}://{shown}:{port}"


def run(service: Service, listening: socket.socket, ready: Ready) -> None:
    """Serve until a signal comes, or what ``ready`` is given is called, and end what is under way, within a bounded time."""
    options = service.options
    application = Application(service)
    config = uvicorn.Config(
        application.app,
        http=protocol(options.header_timeout),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=options.connections,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(options.shutdown_timeout),
        h11_max_incomplete_event_size=_MAX_HEADERS,
        ssl_certfile=options.tls_cert or None,
        ssl_keyfile=options.tls_key or None,
    )
    for path in filter(None, (options.tls_cert, options.tls_key)):
        try:
            open(path, "rb").close()  # whose error names the file, unlike that of ssl
        except OSError as error:
            raise from_os_error(error, f"reading {path}") from None
    try:
        config.load()
    except ssl.SSLError as error:
        raise UsageError(f"the TLS certificate or key cannot be used: {error.reason or error}") from None
    # It would log signed URLs; we have lines of our own.
    logging.getLogger("uvicorn.access").disabled = True
    ended = threading.Event()
    keeper = threading.Thread(target=_keep_house, args=(service, ended), name="housekeeping", daemon=True)
    keeper.start()
    try:
        _Server(config, ready).run(sockets=[listening])
    finally:
        ended.set()
        keeper.join(5)


def _keep_house(service: Service, ended: threading.Event) -> None:
    while True:
        try:
            if gone := service.state.expire():
                log.info("removed %d uploads that nobody went on with", gone)
        except Exception:
            log.exception("housekeeping failed")
        if ended.wait(_HOUSEKEEPING):
            return
