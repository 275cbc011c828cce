"""The process: a socket, uvicorn with time-outs of our own, signals, and housekeeping."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterator
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
_LEAST_RATE = 1024
"""Bytes a second that a client must take of an answer."""
_BACKLOG = 512
_LAST_WORDS = 0.5
"""Seconds for a request that was cancelled to end."""


def protocol(header_timeout: float, send_timeout: float) -> type[H11Protocol]:
    """uvicorn's protocol, which cuts off a connection whose request line and headers do not come within ``header_timeout``
    seconds, nor the rest of a body that was answered before its end; or whose client takes nothing of an answer for
    ``send_timeout`` seconds."""

    class Patient(H11Protocol):
        _waiting: asyncio.TimerHandle | None = None
        _sending: asyncio.TimerHandle | None = None
        _unsent = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=1, low=0)  # paused is then: there is something that was not taken
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._unwatch()
            self._forget_sending()
            self._unset_keepalive_if_required()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._judge()

        def on_response_complete(self) -> None:
            self._unwatch()
            super().on_response_complete()
            if self.conn.their_state is h11.SEND_BODY:
                self._judge()

        def _judge(self) -> None:
            answered = self.conn.our_state in (h11.DONE, h11.MUST_CLOSE)
            if self.conn.their_state is h11.IDLE or (answered and self.conn.their_state is h11.SEND_BODY):
                self._watch()
            else:
                self._unwatch()

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._sending is None:
                self._await_sending()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._forget_sending()

        def _await_sending(self) -> None:
            self._unsent = self.transport.get_write_buffer_size()
            self._sending = self.loop.call_later(send_timeout, self._look_at_sending)

        def _look_at_sending(self) -> None:
            if self._unsent - self.transport.get_write_buffer_size() < send_timeout * _LEAST_RATE:
                self.transport.abort()  # close() would wait for what is never taken
            else:
                self._await_sending()

        def _forget_sending(self) -> None:
            if self._sending is not None:
                self._sending.cancel()
                self._sending = None

        def _watch(self) -> None:
            """The time runs from the first byte, however many follow."""
            if self._waiting is None:
                self._waiting = self.loop.call_later(header_timeout, self._too_slow)

        def _unwatch(self) -> None:
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None

        def _too_slow(self) -> None:
            self.transport.abort()

    return Patient


class _Server(uvicorn.Server):
    """Tells when it is ready, and ends with a signal as a program that did what it was asked to."""

    def __init__(
        self, config: uvicorn.Config, ready: Ready, working: Collection[object], abandon: Callable[[], None] | None
    ) -> None:
        super().__init__(config)
        self._ready = ready
        self._working = working
        self._abandon = abandon

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready(self._stop)

    def _stop(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        # Requests that were too slow are cancelled by now; a thread that works for one cannot be, and Python would wait for it.
        end = time.monotonic() + _LAST_WORDS
        while self._working and time.monotonic() < end:
            await asyncio.sleep(0.02)
        if self._working:
            log.warning("%d requests did not end in time and were cut off; clients may repeat them", len(self._working))
            if self._abandon is not None:
                self._abandon()

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
        # asyncio turns Nagle's algorithm off only for sockets that say their protocol; with it each answer waits 40 ms.
        found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
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


def run(service: Service, listening: socket.socket, ready: Ready, abandon: Callable[[], None] | None = None) -> None:
    """Serve until a signal comes, or what ``ready`` is given is called, and end what is under way, within a bounded time.

    A commit in the middle of writing cannot be interrupted. ``abandon`` is called if one is left after that time, and is to end
    the process as a crash would, which no version suffers from; without it, it is waited for.
    """
    options = service.options
    application = Application(service)
    config = uvicorn.Config(
        application.app,
        http=protocol(options.header_timeout, options.body_timeout),
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
        _Server(config, ready, application.working, abandon).run(sockets=[listening])
    finally:
        ended.set()
        keeper.join(5)


def _keep_house(service: Service, ended: threading.Event) -> None:
    while True:
        try:
            service.state.write_checksums()
            if gone := service.state.expire():
                log.info("removed %d uploads that nobody went on with", gone)
        except Exception:
            log.exception("housekeeping failed")
        if ended.wait(_HOUSEKEEPING):
            return
