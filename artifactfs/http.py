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
import os
import re
import socket
import ssl
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, suppress
from email.utils import parsedate_to_datetime
from http.cookiejar import DefaultCookiePolicy
from typing import IO, Any, Protocol, TypeAlias
from urllib.parse import urljoin, urlsplit, urlunsplit

import requests
import requests.adapters
import urllib3.connection
import urllib3.connectionpool
import urllib3.exceptions
from cachetools import LRUCache

from artifactfs.attempts import DEADLINE, TRANSIENT, Attempts, TransientError
from artifactfs.errors import (
    ArtifactFSError,
    IntegrityError,
    NetworkError,
    NotFoundError,
    NotPermittedError,
    SourceChangedError,
    UsageError,
)
from artifactfs.forking import new_lock

_RETRY_AFTER_MAX = 30.0  # a server that asks for more is asked again after this many seconds, if the deadline allows
_PIECE = 256 << 10  # at most this much is read at once; what has arrived is passed on without waiting for more
_DRAIN = 64 << 10  # a body up to this size is cheaper to read than its connection to replace
_POOL = 64  # kept connections a host: more streams than a mount ever has in flight to one

_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
_ENVIRONMENT = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", *_PROXIES, *map(str.upper, _PROXIES))
_MOST = 8 << 30  # bytes of a list of files: thirty million entries
_QUICK_ACK: int | None = getattr(socket, "TCP_QUICKACK", None)  # Linux has it

_CONTENT_RANGE = re.compile(r"bytes\s+([0-9]+)-([0-9]+)/([0-9]+|\*)\s*", re.IGNORECASE)
_SECRET_NAME = re.compile(r"sig|token|key|secret|pass|pwd|credential|auth|session|code|policy", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, slots=True)
class Pin:
    """What a content at a URL is known to be. ``etag`` and ``modified`` are raw header values, "" if the server sends none;
    ``size`` is -1 if unknown."""

    etag: str = ""
    modified: str = ""
    size: int = -1


_NO_HEADERS: Mapping[str, str] = {}


class NoRangesError(ArtifactFSError):
    """The server sends only whole contents. ``stream`` is the answer already under way: the content from its first byte."""

    def __init__(self, url: str, stream: Iterator[bytes]) -> None:
        super().__init__(f"{shown(url)} cannot be read in ranges")
        self.stream = stream


class StatusError(NetworkError):
    """The server's answer is no success, nothing that another attempt may mend, and none of those that have errors of their own:
    Google's storage says 400 to a link that has expired."""


class RedirectedError(ArtifactFSError):
    """The server has the content elsewhere, and the request was one that does not follow; ``location`` is where."""

    def __init__(self, url: str, location: str) -> None:
        super().__init__(f"{shown(url)} redirects to {shown(location)}")
        self.location = location


class Sized(Protocol):
    """A body that is sent as it is read: ``len()`` tells its bytes, so that the request does."""

    def __len__(self) -> int: ...

    def read(self, size: int = -1, /) -> bytes: ...


Body: TypeAlias = "bytes | IO[bytes] | Sized"


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


def probe(url: str, deadline: float = DEADLINE, headers: Mapping[str, str] = _NO_HEADERS) -> Pin:
    """What the server says of the content, from the head of its answer to a GET; the body is left unread.

    A GET and not a HEAD: signed URLs allow one method only, and some servers answer HEAD differently.
    """
    attempts = Attempts(shown(url), deadline)
    while True:
        try:
            with closing(_send(url, headers, attempts)) as response:
                _check_status(response, url)
                pin = _pin_of(response)
                if 0 <= pin.size <= _DRAIN:
                    response.raw.drain_conn()
                return pin
        except TransientError as error:
            attempts.failed(error)


def get_range(
    url: str,
    offset: int,
    size: int,
    pin: Pin,
    deadline: float = DEADLINE,
    headers: Mapping[str, str] = _NO_HEADERS,
    follow: bool = True,
) -> Iterator[bytes]:
    """Stream exactly ``size`` bytes from ``offset``, in pieces as they arrive; ``pin.size`` must be known.

    A connection that breaks is resumed where it broke, with the same pin, or where that has none with what the first answer
    said. :class:`NoRangesError` if the server answers with the whole content where a part was asked for. ``follow`` False: a
    redirect is a :class:`RedirectedError`.
    """
    attempts = Attempts(shown(url), deadline)
    position, end = offset, offset + size
    while position < end:
        try:
            response = _ask(url, position, end, pin, attempts, headers, follow)
            pin = _learned(pin, response)
            if response.status_code == 200 and (offset, size) != (0, pin.size):
                raise NoRangesError(url, _whole(url, pin, attempts, response, headers))
            with closing(response):
                skip = position if response.status_code == 200 else 0
                for piece in _pieces(response, skip, end - position, attempts):
                    position += len(piece)
                    yield piece
        except TransientError as error:
            attempts.failed(error)


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """An answer to :func:`exchange`, whatever its status. ``headers`` have lower-case names."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def exchange(
    method: str,
    url: str,
    headers: Mapping[str, str],
    body: Callable[[], Body],
    deadline: float = DEADLINE,
    most: int = 64 << 20,
    also: Collection[int] = (),
) -> Answer:
    """:func:`call` with attempts of its own, which follows redirects: they take ``Authorization`` to no other host."""
    return call(method, url, headers, body, Attempts(shown(url), deadline), most, also=also)


def call(
    method: str,
    url: str,
    headers: Mapping[str, str],
    body: Callable[[], Body],
    attempts: Attempts,
    most: int = 64 << 20,
    *,
    follow: bool = True,
    repeat: bool = True,
    patience: float = 0.0,
    also: Collection[int] = (),
) -> Answer:
    """Send a request, and take its whole answer, of at most ``most`` bytes. ``body`` is called for each attempt.

    Repeated when the connection breaks, the answer is cut or the server asks for it (429, 5xx), within the deadline: the request
    must be one that may come twice. With ``repeat`` False it is sent once, and TransientError says that its answer is not known.
    No credentials are sent but those in ``headers``. ``follow`` False: a redirect is a :class:`RedirectedError`. ``patience``:
    seconds to wait for the answer to what takes the server long, instead of those of ``attempts``. ``also``: further statuses
    that another attempt may mend.
    """
    while True:
        connect, wait = attempts.timeouts()
        try:
            sent = _send(url, headers, attempts, method, body(), follow, (connect, max(wait, patience)))
            with closing(sent) as response:
                if response.status_code in TRANSIENT or response.status_code in also:
                    raise _transient(response)
                found = {name.lower(): value for name, value in response.headers.items()}
                return Answer(response.status_code, found, _taken(response, url, attempts, most))
        except TransientError as error:
            if not repeat:
                raise
            attempts.failed(error)


def get_pin(
    url: str, size: int, deadline: float = DEADLINE, headers: Mapping[str, str] = _NO_HEADERS, follow: bool = True
) -> Pin:
    """What the server says of a content of ``size`` bytes, from its answer to a request for the first of them; with ``size`` -1
    of one that sends no ranges. Errors as of :func:`get_range`."""
    attempts = Attempts(shown(url), deadline)
    while True:
        try:
            with closing(_ask(url, 0, 1, Pin(size=size), attempts, headers, follow)) as response:
                known = _learned(Pin(size=size), response)
                if response.status_code == 206:
                    response.raw.drain_conn()
                    return known
                return dataclasses.replace(known, size=-1)
        except TransientError as error:
            attempts.failed(error)


def _learned(pin: Pin, response: requests.Response) -> Pin:
    """``pin``, or where it tells no validator that of the answer."""
    if pin.etag or pin.modified:
        return pin
    return dataclasses.replace(_pin_of(response), size=pin.size)


def _taken(response: requests.Response, url: str, attempts: Attempts, most: int) -> bytes:
    pieces: list[bytes] = []
    have = 0
    for piece in _pieces(response, 0, _content_length(response), attempts):
        have += len(piece)
        if have > most:
            raise NetworkError(f"{shown(url)} answers with over {most} bytes; refused")
        pieces.append(piece)
    return b"".join(pieces)


def get_whole(url: str, deadline: float = DEADLINE) -> Iterator[bytes]:
    """Stream a content of unknown size to its end. A connection that breaks is an error: nothing pins a second answer."""
    attempts = Attempts(shown(url), deadline)
    try:
        with closing(_send(url, {}, attempts)) as response:
            _check_status(response, url)
            yield from _pieces(response, 0, _content_length(response), attempts)
    except TransientError as error:
        raise NetworkError(f"{shown(url)}: {error}; try again") from None


def fetch_into(
    file: IO[bytes], url: str, deadline: float = DEADLINE, headers: Mapping[str, str] = _NO_HEADERS, most: int = _MOST
) -> None:
    """Write a content of unknown size, of at most ``most`` bytes, to ``file``, which is empty. After a break it begins anew."""
    attempts = Attempts(shown(url), deadline)
    while True:
        try:
            file.seek(0)
            file.truncate()
            with closing(_send(url, headers, attempts)) as response:
                _check_status(response, url)
                for piece in _plain(_pieces(response, 0, _content_length(response), attempts), _encoding(response)):
                    file.write(piece)
                    if file.tell() > most:
                        raise NetworkError(f"{shown(url)} sends over {most} bytes; refused")
            return
        except TransientError as error:
            attempts.failed(error)


def _plain(pieces: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """A body without the compression that it came in though none was asked for."""
    if encoding not in ("gzip", "x-gzip", "deflate"):
        yield from pieces
        return
    inflate = zlib.decompressobj(32 + zlib.MAX_WBITS)
    try:
        for piece in pieces:
            left = piece
            while left:
                yield inflate.decompress(left, _PIECE)
                left = inflate.unconsumed_tail
    except zlib.error:
        raise TransientError("the answer is compressed, and damaged") from None
    if not inflate.eof:
        raise TransientError("the answer ended too early")


def _whole(url: str, pin: Pin, attempts: Attempts, response: requests.Response, headers: Mapping[str, str]) -> Iterator[bytes]:
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
        except TransientError as error:
            response = _reopen(url, position, pin, attempts, error, headers)


def _reopen(
    url: str, position: int, pin: Pin, attempts: Attempts, error: TransientError, headers: Mapping[str, str]
) -> requests.Response:
    while True:
        attempts.failed(error)
        try:
            return _ask(url, position, pin.size, pin, attempts, headers)
        except TransientError as again:
            error = again


class _Session(requests.Session):
    """Follows redirects as requests does, but never from TLS to plain text: the answer's origin would be unproven.

    What the environment says of proxies and certificates is worked out once for each origin: that takes requests a sixth of its
    time for a small file."""

    def __init__(self) -> None:
        super().__init__()
        self._surroundings: LRUCache[tuple[object, ...], Any] = LRUCache(_POOL)

    def merge_environment_settings(self, url: Any, proxies: Any, stream: Any, verify: Any, cert: Any) -> Any:
        key = (*urlsplit(str(url))[:2], verify, cert, *map(os.environ.get, _ENVIRONMENT))
        with _lock:
            known = self._surroundings.get(key)
        if known is None:
            known = super().merge_environment_settings(url, {}, None, verify, cert)
            with _lock:
                self._surroundings[key] = known
        return {**known, "proxies": dict(known["proxies"]), "stream": stream}

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        target = super().get_redirect_target(resp)
        if target and str(resp.url).lower().startswith("https:") and target.lower().startswith("http:"):
            raise NetworkError(f"{shown(str(resp.url))} redirects from https to {shown(target)}, which is not encrypted; refused")
        return target


class _OwnSession(_Session):
    """Sends what credentials it is given, to the host that they are for, and takes none from ``~/.netrc``."""

    def rebuild_auth(self, prepared_request: requests.PreparedRequest, response: requests.Response) -> None:
        if "Authorization" in prepared_request.headers and self.should_strip_auth(  # type: ignore[no-untyped-call]
            str(response.request.url), str(prepared_request.url)
        ):
            del prepared_request.headers["Authorization"]


def _nothing_more(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


_OWN = "artifactfs-own-credentials"
OWN_CREDENTIALS: Mapping[str, str] = {_OWN: ""}
"""To be among the ``headers`` of a request that has its credentials in them or in its URL. Never sent."""

_lock = new_lock()
_shared: dict[bool, _Session] = {}


def _session(own: bool = False) -> _Session:
    """The process's session, made at first use. ``own``: it takes no credentials from ``~/.netrc``."""
    with _lock:
        if own not in _shared:
            _shared[own] = _new_session(_OwnSession() if own else _Session())
        return _shared[own]


def _acknowledge_at_once(connection: urllib3.connection.HTTPConnection) -> None:
    """Many servers send the head of an answer and its body apart, and hold the body back until the head is acknowledged, which
    the system would do 40 ms later. It forgets this after some packets: hence before each answer."""
    if _QUICK_ACK is not None and isinstance(connection.sock, socket.socket):
        with suppress(OSError):  # the answer's own error tells what is wrong
            connection.sock.setsockopt(socket.IPPROTO_TCP, _QUICK_ACK, 1)


class _Connection(urllib3.connection.HTTPConnection):
    def getresponse(self) -> urllib3.HTTPResponse:  # type: ignore[override]  # as its base
        _acknowledge_at_once(self)
        return super().getresponse()


class _SecureConnection(urllib3.connection.HTTPSConnection):
    def getresponse(self) -> urllib3.HTTPResponse:  # type: ignore[override]  # as its base
        _acknowledge_at_once(self)
        return super().getresponse()


class _Pool(urllib3.connectionpool.HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(urllib3.connectionpool.HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


class _Adapter(requests.adapters.HTTPAdapter):
    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}


def _new_session(session: _Session) -> _Session:
    # max_retries=0: only the loops of this module retry, because only they know the deadline and can resume in a body.
    adapter = _Adapter(pool_connections=_POOL, pool_maxsize=_POOL, max_retries=0)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    session.headers.update({"User-Agent": "artifactfs", "Accept-Encoding": "identity"})
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))  # the jar is not safe between threads
    return session


def _forget_session() -> None:
    """In a forked child: the parent's connections are the parent's."""
    _shared.clear()


os.register_at_fork(after_in_child=_forget_session)


def _ask(
    url: str, start: int, end: int, pin: Pin, attempts: Attempts, given: Mapping[str, str], follow: bool = True
) -> requests.Response:
    """The answer to a request for bytes ``start`` to ``end`` (exclusive), checked to be of that range and of what is pinned:
    a 206, or a 200 with the whole content."""
    headers = {**given, "Range": f"bytes={start}-{end - 1}"}
    if pin.etag and not pin.etag.startswith("W/"):
        headers["If-Match"] = pin.etag
    response = _send(url, headers, attempts, follow=follow)
    try:
        _check_status(response, url)
        if _OWN in given:
            _check_plain(response, url)
        total = _check_content_range(response, url, start, end) if response.status_code == 206 else _content_length(response)
        _check_pin(pin, dataclasses.replace(_pin_of(response), size=total), url)
    except BaseException:
        response.close()
        raise
    return response


def _send(
    url: str,
    headers: Mapping[str, str],
    attempts: Attempts,
    method: str = "GET",
    body: Body | None = None,
    follow: bool = True,
    timeout: tuple[float, float] | None = None,
) -> requests.Response:
    """The head of an answer, its body unread. Foreign exceptions become this module's here."""
    own = _OWN in headers or method != "GET"
    sent = {name: value for name, value in headers.items() if name != _OWN}
    auth = _nothing_more if own else None
    try:
        response = _session(own).request(
            method,
            url,
            headers=sent,
            data=body,
            stream=True,
            timeout=timeout or attempts.timeouts(),
            auth=auth,
            allow_redirects=follow,
        )
        if not follow and response.is_redirect:
            response.close()
            raise RedirectedError(url, urljoin(url, response.headers["Location"]))
        return response
    except (requests.exceptions.ConnectionError, requests.exceptions.Timeout) as error:
        if _is_untrusted(error):
            text = f"{shown(url)}: the server's TLS certificate is not trusted; set REQUESTS_CA_BUNDLE if it is your own"
            raise NetworkError(text) from None
        raise TransientError(_reason(error)) from None
    except requests.exceptions.TooManyRedirects:
        raise NetworkError(f"{shown(url)} redirects in circles; check the URL") from None
    except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
        if isinstance(error, requests.exceptions.ChunkedEncodingError):
            raise TransientError(_reason(error)) from None
        raise UsageError(f"{shown(url)} is not a URL that can be fetched ({type(error).__name__}); check it") from None


def _pieces(response: requests.Response, skip: int, size: int, attempts: Attempts) -> Iterator[bytes]:
    """``size`` bytes of the body after ``skip`` (-1: to its end) as they arrive; a body that ends before is transient."""
    while size:
        try:
            piece: bytes = response.raw.read1(_PIECE if size < 0 else min(_PIECE, skip + size), decode_content=False)
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise TransientError(_reason(error)) from None
        if not piece:
            if size < 0:
                return
            raise TransientError("the answer ended too early")
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
    if status in TRANSIENT:
        raise _transient(response)
    if status in (401, 403):
        raise NotPermittedError(
            f"{shown(url)}: the server refuses access ({status}); check your credentials or the link's expiry"
        )
    if status in (404, 410):
        raise NotFoundError(f"{shown(url)} does not exist (the server answers {status})")
    if status in (412, 416):
        raise SourceChangedError(f"{shown(url)} is no longer what was recorded (the server answers {status}); add it again")
    raise StatusError(f"{shown(url)}: the server answers {status} {_phrase(response)}".rstrip())


def _transient(response: requests.Response) -> TransientError:
    wait = _retry_after(response)
    busy = response.status_code == 429 or bool(wait)
    return TransientError(f"the server answers {response.status_code} {_phrase(response)}".rstrip(), wait, busy)


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


def _encoding(response: requests.Response) -> str:
    """The content encoding of an answer; "" for none."""
    found = response.headers.get("Content-Encoding", "").strip().lower()
    return "" if found == "identity" else found


def _check_plain(response: requests.Response, url: str) -> None:
    """A store's own files are stored as they are: one that comes encoded, which was not asked for, has other bytes."""
    if _encoding(response):
        raise IntegrityError(
            f"{shown(url)} comes encoded ({_encoding(response)[:20]!r}), which was not asked for; nothing of it is used"
        )


def decoded(answer: Answer, most: int) -> bytes:
    """The body of ``answer``, without the compression that some servers put on what was asked for plain. NetworkError if it
    cannot be undone, or makes over ``most`` bytes."""
    encoding = answer.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("gzip", "x-gzip", "deflate"):
        return answer.body
    inflate = zlib.decompressobj(32 + zlib.MAX_WBITS)
    try:
        body = inflate.decompress(answer.body, most)
    except zlib.error:
        raise NetworkError("the server's answer is compressed, and damaged; try again") from None
    if inflate.unconsumed_tail or not inflate.eof:
        raise NetworkError(f"the server's answer is compressed, and cut or over {most} bytes; refused")
    return body


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
