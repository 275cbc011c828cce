"""The one HTTP session: pooled connections, one retry loop, timeouts and a deadline, pinned range reads, error mapping.

Nothing else imports ``requests`` or ``urllib3`` (importing them costs 0.2 s, so this module is imported by need, see
``references/__init__``). All functions may be called from any thread and, after a fork, from any process.

A content at a URL is *pinned* by what is known of it (:class:`Pin`); every answer is compared with that:

- A strong ETag is sent as ``If-Match`` and must come back. A weak one (``W/"…"``) never satisfies ``If-Match``, so it is
  only compared, by its opaque part: what the server itself calls equivalent counts as unchanged.
- Without an ETag, ``Last-Modified`` is compared, and always the size.

Bytes are taken as they are stored (no content encoding is asked for, none is undone), so ranges and sizes mean the same
on both sides. Errors: 401/403 NotPermittedError, 404/410 NotFoundError, a 412, a 416 or another validator
SourceChangedError, an answer of another range IntegrityError, all else NetworkError once the retries are used up.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from email.utils import parsedate_to_datetime
from http.cookiejar import DefaultCookiePolicy
from urllib.parse import urlsplit, urlunsplit

import requests
import requests.adapters
import urllib3.exceptions

from artifactfs.errors import (
    ArtifactFSError,
    IntegrityError,
    NetworkError,
    NotFoundError,
    NotPermittedError,
    SourceChangedError,
    UsageError,
)

log = logging.getLogger(__name__)

DEADLINE = 60.0
"""Seconds within which a fetch must make progress (16 KiB, or its rest); then it is given up."""

_CONNECT_TIMEOUT = 10.0  # a handshake over the worst usable link, and time for the next address of the name
_READ_TIMEOUT = 30.0  # half of DEADLINE: a stalled connection is replaced once before the fetch is given up
_PROGRESS = 16 << 10  # fewer bytes are no progress: a server that drips could otherwise hold a fetch for days
_ATTEMPTS = 6  # failures in a row without progress between them
_BACKOFF = 0.2  # seconds before the second retry (the first is immediate: mostly a kept connection that had been closed)
_BACKOFF_MAX = 10.0
_RETRY_AFTER_MAX = 30.0  # a server that asks for more is asked again after this many seconds, if the deadline allows
_PIECE = 256 << 10  # at most this much is read at once; what has arrived is passed on without waiting for more
_DRAIN = 64 << 10  # a body up to this size is cheaper to read than its connection to replace
_POOL = 64  # kept connections a host: more streams than a mount ever has in flight to one

_jitter = random.Random()  # of its own: a program's seeded generator must not depend on the network

_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"bytes\s+([0-9]+)-([0-9]+)/([0-9]+|\*)\s*", re.IGNORECASE)
_SECRET_NAME = re.compile(r"sig|token|key|secret|pass|pwd|credential|auth|session|code|policy", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, slots=True)
class Pin:
    """What a content at a URL is known to be. ``etag`` and ``modified`` are raw header values, "" if the server sends none;
    ``size`` is -1 if unknown."""

    etag: str = ""
    modified: str = ""
    size: int = -1


class NoRangesError(ArtifactFSError):
    """The server sends only whole contents. ``stream`` is the answer already under way: the content from its first byte."""

    def __init__(self, url: str, stream: Iterator[bytes]) -> None:
        super().__init__(f"{shown(url)} cannot be read in ranges")
        self.stream = stream


class _TransientError(Exception):
    """An attempt failed in a way that another may not. ``wait``: seconds that the server asks for, or None."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def shown(url: str) -> str:
    """``url`` for messages: without user, password and fragment, and without values of query parameters that may be secret."""
    url = "".join(char if char.isprintable() else "?" for char in url)
    try:
        parts = urlsplit(url)
    except ValueError:
        return url.partition("?")[0].rpartition("@")[2]
    fields = (field.partition("=") for field in parts.query.split("&"))
    query = "&".join(f"{name}=…" if _SECRET_NAME.search(name) else f"{name}{equals}{value}" for name, equals, value in fields)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, query, ""))


def probe(url: str, deadline: float = DEADLINE) -> Pin:
    """What the server says of the content, from the head of its answer to a GET; the body is left unread.

    A GET and not a HEAD: signed URLs allow one method only, and some servers answer HEAD differently.
    """
    attempts = _Attempts(url, deadline)
    while True:
        try:
            with closing(_send(url, {}, attempts)) as response:
                _check_status(response, url)
                pin = _pin_of(response)
                if 0 <= pin.size <= _DRAIN:
                    response.raw.drain_conn()
                return pin
        except _TransientError as error:
            attempts.failed(error)


def get_range(url: str, offset: int, size: int, pin: Pin, deadline: float = DEADLINE) -> Iterator[bytes]:
    """Stream exactly ``size`` bytes from ``offset``, in pieces as they arrive; ``pin.size`` must be known.

    A connection that breaks is resumed where it broke, with the same pin. :class:`NoRangesError` if the server answers
    with the whole content where a part was asked for.
    """
    attempts = _Attempts(url, deadline)
    position, end = offset, offset + size
    while position < end:
        try:
            response = _ask(url, position, end, pin, attempts)
            if response.status_code == 200 and (offset, size) != (0, pin.size):
                raise NoRangesError(url, _whole(url, pin, attempts, response))
            with closing(response):
                skip = position if response.status_code == 200 else 0
                for piece in _pieces(response, skip, end - position, attempts):
                    position += len(piece)
                    yield piece
        except _TransientError as error:
            attempts.failed(error)


def get_whole(url: str, deadline: float = DEADLINE) -> Iterator[bytes]:
    """Stream a content of unknown size to its end. A connection that breaks is an error: nothing pins a second answer."""
    attempts = _Attempts(url, deadline)
    try:
        with closing(_send(url, {}, attempts)) as response:
            _check_status(response, url)
            yield from _pieces(response, 0, -1, attempts)
    except _TransientError as error:
        raise NetworkError(f"{shown(url)}: {error}; try again") from None


def _whole(url: str, pin: Pin, attempts: _Attempts, response: requests.Response) -> Iterator[bytes]:
    """The whole content, beginning with an answer that is already there; after a break, read again up to where it broke."""
    position = 0
    while True:
        try:
            with closing(response):
                skip = position if response.status_code == 200 else 0
                for piece in _pieces(response, skip, pin.size - position, attempts):
                    position += len(piece)
                    yield piece
            return
        except _TransientError as error:
            response = _reopen(url, position, pin, attempts, error)


def _reopen(url: str, position: int, pin: Pin, attempts: _Attempts, error: _TransientError) -> requests.Response:
    while True:
        attempts.failed(error)
        try:
            return _ask(url, position, pin.size, pin, attempts)
        except _TransientError as again:
            error = again


class _Attempts:
    """Counts the failures of one fetch in a row without new bytes between them, and the time since bytes came at all."""

    def __init__(self, url: str, deadline: float) -> None:
        self.url = url
        self.deadline = deadline
        self._failures = 0
        self._bytes = 0
        self._new = 0
        self._limit = time.monotonic() + deadline

    def arrived(self, size: int, new: int) -> None:
        """Count ``size`` bytes, ``new`` of which were not here before. NetworkError if they drip too slowly."""
        self._bytes += size
        self._new += new
        if self._new >= _PROGRESS:
            self._failures = self._new = 0
        if self._bytes >= _PROGRESS:
            self._bytes = 0
            self._limit = time.monotonic() + self.deadline
        elif time.monotonic() > self._limit:
            raise NetworkError(f"{shown(self.url)}: {self._bytes} bytes in {self.deadline:g} s are too slow; try again later")

    def timeouts(self) -> tuple[float, float]:
        """Seconds to connect and to wait for a byte, within what is left of the deadline."""
        left = max(self._limit - time.monotonic(), 0.05)
        return min(_CONNECT_TIMEOUT, left), min(_READ_TIMEOUT, self.deadline / 2, left)

    def failed(self, error: _TransientError) -> None:
        """Wait before the next attempt; NetworkError if there is none left."""
        self._failures += 1
        wait = error.wait if error.wait is not None else self._backoff()
        if self._failures >= _ATTEMPTS or time.monotonic() + wait >= self._limit:
            raise NetworkError(
                f"{shown(self.url)}: {error} (attempt {self._failures}); check the network, then try again"
            ) from None
        log.debug("%s: %s; attempt %d follows in %.1f s", shown(self.url), error, self._failures + 1, wait)
        time.sleep(wait)

    def _backoff(self) -> float:
        if self._failures == 1:
            return 0.0
        step = min(_BACKOFF * float(2 ** (self._failures - 2)), _BACKOFF_MAX)
        return step * _jitter.uniform(0.5, 1.0)


class _Session(requests.Session):
    """Follows redirects as requests does, but never from TLS to plain text: the answer's origin would be unproven."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        target = super().get_redirect_target(resp)
        if target and str(resp.url).lower().startswith("https:") and target.lower().startswith("http:"):
            raise NetworkError(f"{shown(str(resp.url))} redirects from https to {shown(target)}, which is not encrypted; refused")
        return target


_lock = threading.Lock()
_shared: _Session | None = None


def _session() -> _Session:
    """The process's session, made at first use."""
    global _shared
    with _lock:
        if _shared is None:
            _shared = _new_session()
        return _shared


def _new_session() -> _Session:
    session = _Session()
    # max_retries=0: only the loops of this module retry, because only they know the deadline and can resume in a body.
    adapter = requests.adapters.HTTPAdapter(pool_connections=_POOL, pool_maxsize=_POOL, max_retries=0)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    session.headers.update({"User-Agent": "artifactfs", "Accept-Encoding": "identity"})
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))  # the jar is not safe between threads
    return session


def _forget_session() -> None:
    """In a forked child: the parent's connections are the parent's, and its lock may have been held."""
    global _shared, _lock
    _shared = None
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_session)


def _ask(url: str, start: int, end: int, pin: Pin, attempts: _Attempts) -> requests.Response:
    """The answer to a request for bytes ``start`` to ``end`` (exclusive), checked to be of that range and of what is pinned:
    a 206, or a 200 with the whole content."""
    headers = {"Range": f"bytes={start}-{end - 1}"}
    if pin.etag and not pin.etag.startswith("W/"):
        headers["If-Match"] = pin.etag
    response = _send(url, headers, attempts)
    try:
        _check_status(response, url)
        total = _check_content_range(response, url, start, end) if response.status_code == 206 else _content_length(response)
        _check_pin(pin, dataclasses.replace(_pin_of(response), size=total), url)
    except BaseException:
        response.close()
        raise
    return response


def _send(url: str, headers: dict[str, str], attempts: _Attempts) -> requests.Response:
    """The head of an answer, its body unread. Foreign exceptions become this module's here."""
    try:
        return _session().get(url, headers=headers, stream=True, timeout=attempts.timeouts())
    except (requests.exceptions.ConnectionError, requests.exceptions.Timeout) as error:
        if _is_untrusted(error):
            text = f"{shown(url)}: the server's TLS certificate is not trusted; set REQUESTS_CA_BUNDLE if it is your own"
            raise NetworkError(text) from None
        raise _TransientError(_reason(error)) from None
    except requests.exceptions.TooManyRedirects:
        raise NetworkError(f"{shown(url)} redirects in circles; check the URL") from None
    except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
        if isinstance(error, requests.exceptions.ChunkedEncodingError):
            raise _TransientError(_reason(error)) from None
        raise UsageError(f"{shown(url)} is not a URL that can be fetched ({type(error).__name__}); check it") from None


def _pieces(response: requests.Response, skip: int, size: int, attempts: _Attempts) -> Iterator[bytes]:
    """``size`` bytes of the body after ``skip`` (-1: to its end) as they arrive; a body that ends before is transient."""
    while size:
        try:
            piece: bytes = response.raw.read1(_PIECE if size < 0 else min(_PIECE, skip + size), decode_content=False)
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise _TransientError(_reason(error)) from None
        if not piece:
            if size < 0:
                return
            raise _TransientError("the answer ended too early")
        dropped = min(skip, len(piece))
        attempts.arrived(len(piece), len(piece) - dropped)
        if dropped:
            skip -= dropped
            piece = piece[dropped:]
        if piece:
            size -= len(piece) if size > 0 else 0
            yield piece


def _check_status(response: requests.Response, url: str) -> None:
    """Nothing for a 200 or 206; else the error of this status."""
    status = response.status_code
    if status in (200, 206):
        return
    response.close()
    if status in _TRANSIENT:
        raise _TransientError(f"the server answers {status} {_phrase(response)}".rstrip(), _retry_after(response))
    if status in (401, 403):
        raise NotPermittedError(
            f"{shown(url)}: the server refuses access ({status}); check your credentials or the link's expiry"
        )
    if status in (404, 410):
        raise NotFoundError(f"{shown(url)} does not exist (the server answers {status})")
    if status in (412, 416):
        raise SourceChangedError(f"{shown(url)} is no longer what was recorded (the server answers {status}); add it again")
    raise NetworkError(f"{shown(url)}: the server answers {status} {_phrase(response)}".rstrip())


def _phrase(response: requests.Response) -> str:
    return "".join(char for char in str(response.reason or "") if char.isprintable())[:60]


def _retry_after(response: requests.Response) -> float | None:
    """The seconds to wait that the answer asks for, as a number or a date, within bounds; None if it does not."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isdecimal():
        seconds = float(value)
    else:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return min(max(seconds, 0.0), _RETRY_AFTER_MAX)


def _check_content_range(response: requests.Response, url: str, start: int, end: int) -> int:
    """The content's size (-1 if not told), once the answer is known to be of the range asked for."""
    given = response.headers.get("Content-Range", "")
    match = _CONTENT_RANGE.fullmatch(given.strip())
    if not match or int(match[1]) != start or int(match[2]) != end - 1:
        total = int(match[3]) if match and match[3] != "*" else -1
        if 0 <= total < end:
            raise SourceChangedError(f"{shown(url)} is now {total} bytes long, shorter than recorded; add it again")
        text = f"{shown(url)}: asked for bytes {start}-{end - 1}, the server answered with {given[:60]!r}"
        raise IntegrityError(text)
    return -1 if match[3] == "*" else int(match[3])


def _content_length(response: requests.Response) -> int:
    value = response.headers.get("Content-Length", "").strip()
    if "chunked" in response.headers.get("Transfer-Encoding", "").lower() or not re.fullmatch("[0-9]+", value):
        return -1
    return int(value)


def _pin_of(response: requests.Response) -> Pin:
    headers = response.headers
    return Pin(headers.get("ETag", "").strip(), headers.get("Last-Modified", "").strip(), _content_length(response))


def _check_pin(pin: Pin, found: Pin, url: str) -> None:
    """SourceChangedError unless ``found`` is what was pinned. A validator that was recorded must come back: without it the
    answer could be of anything."""
    if pin.etag:
        changed = not found.etag or _opaque(pin.etag) != _opaque(found.etag)
    else:
        changed = pin.modified != found.modified if pin.modified else False
    if changed or (pin.size >= 0 and found.size >= 0 and pin.size != found.size):
        raise SourceChangedError(f"{shown(url)} is no longer what was recorded; add it again as a new version")


def _opaque(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


def _chain(error: BaseException) -> Iterator[BaseException]:
    """``error`` and what it was raised for, by cause, context, or the argument in which urllib3 keeps it."""
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        item = waiting.pop()
        if isinstance(item, BaseException) and id(item) not in seen:
            seen.add(id(item))
            yield item
            waiting += [item.__context__, item.__cause__, getattr(item, "reason", None), *item.args]


def _is_untrusted(error: BaseException) -> bool:
    return any(isinstance(item, ssl.SSLCertVerificationError) for item in _chain(error))


def _reason(error: BaseException) -> str:
    """Why an attempt failed, in words of our own: the foreign text holds the URL with its secrets."""
    chain = list(_chain(error))
    if any(isinstance(item, socket.gaierror) for item in chain):
        return "the host name is not known"
    for item in chain:
        if isinstance(item, OSError) and item.errno and item.strerror:
            return "the TLS connection failed" if isinstance(item, ssl.SSLError) else os.strerror(item.errno)
    if any(isinstance(item, (TimeoutError, requests.exceptions.Timeout, urllib3.exceptions.TimeoutError)) for item in chain):
        return "no answer in time"
    return "the connection broke"
