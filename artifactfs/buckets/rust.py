"""Requests through obstore: a third of the CPU time of boto3 for a small one, and Python goes on while it waits.

obstore itself retries nothing here: only the bucket knows the deadline, and a conditional write must not be sent twice blindly.
It cannot be used in a child that was forked after its first request (:func:`usable`), nor for keys that are not of its form
(:func:`speakable`). Its error texts hold URLs, so nothing but status and code is taken from them.
"""

from __future__ import annotations

import ctypes
import datetime
import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import obstore
from obstore import exceptions
from obstore.store import AzureStore, GCSStore, S3Store

from artifactfs.attempts import CONNECT_TIMEOUT, READ_TIMEOUT, TransientError
from artifactfs.buckets.service import Answer, Data, NotPartialError, Pin, RefusedError, Stat, explained, quoted
from artifactfs.errors import ArtifactFSError, NetworkError

if TYPE_CHECKING:  # obstore has these for type checkers only
    from obstore.store import ClientConfig, RetryConfig

AnyStore = S3Store | GCSStore | AzureStore
_AnyStore = TypeVar("_AnyStore", S3Store, GCSStore, AzureStore, AnyStore)

STAMP = "artifactfsstamp"  # Azure takes letters only in the names of metadata
_PIECE = 256 << 10  # at least this much is handed over at once: less would cost more CPU, more would hold back what is there
_WHOLE_REQUEST = 300.0  # seconds: what a PUT of 16 MiB takes at 56 kB/s; a longer answer is resumed
_STATUS = re.compile(r"status code: ([0-9]{3})")
_CODE = re.compile(r"<Code>([A-Za-z]{1,64})</Code>")
_SHORT = re.compile(r"object was only [0-9]+ bytes long")
_TLS = re.compile(r"certificate|UnknownIssuer|tls|ssl", re.IGNORECASE)

_users: set[int] = set()  # processes whose obstore has threads: this one, or the one it was forked from


def usable() -> bool:
    """Whether this process may use obstore: its threads do not survive a fork."""
    return not _users or os.getpid() in _users


def speakable(key: str) -> bool:
    """Whether obstore passes ``key`` on as it is."""
    parts = key.split("/")
    return "" not in parts and not {".", ".."}.intersection(parts) and key.isprintable() and "\\" not in key


def client_options(deadline: float, certificates: bytes = b"", proxy: str = "") -> ClientConfig:
    """Time limits within ``deadline`` seconds; plain http is what an endpoint's URL asks for."""
    options: ClientConfig = {
        "allow_http": True,
        "connect_timeout": datetime.timedelta(seconds=min(CONNECT_TIMEOUT, deadline)),
        "read_timeout": datetime.timedelta(seconds=min(READ_TIMEOUT, deadline / 2)),
        "timeout": datetime.timedelta(seconds=max(_WHOLE_REQUEST, deadline)),
        "user_agent": "artifactfs",
        "pool_idle_timeout": datetime.timedelta(seconds=20),  # below what servers and balancers keep idle connections for
    }
    if certificates:
        options["root_certificate"] = certificates
    if proxy:
        options["proxy_url"] = proxy
    return options


ONCE: RetryConfig = {"max_retries": 0}


def lasting(store: _AnyStore) -> _AnyStore:
    """``store``, which now lives as long as its process, and as all that are forked from it: to close the connections of a
    parent a child would wait for threads that it does not have. There is one for each bucket and each renewal of credentials."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(store))
    return store


class Wire:
    """One attempt at a request for an object of ``store``.

    ``url`` is for messages. ``generations``: conditional writes compare versions, not ETags.
    """

    def __init__(self, store: AnyStore, url: str, generations: bool = False) -> None:
        self.store = lasting(store)
        self._url = url
        self._generations = generations

    def head(self, key: str, version: str) -> Stat:
        with self._errors(key):
            options: Any = {"head": True, **_version(version)}
            found = obstore.get(self.store, key, options=options)
            return stat_of(key, found.meta)

    def get(self, key: str, span: tuple[int, int] | None, pin: Pin) -> Answer:
        options: dict[str, Any] = _version(pin.version)
        if span is not None:
            options["range"] = span
        if pin.etag and not pin.etag.startswith("W/"):
            options["if_match"] = quoted(pin.etag)
        with self._errors(key):
            found = obstore.get(self.store, key, options=options)  # type: ignore[arg-type]  # a TypedDict, made in steps
            start, end = found.range
            stamp = str(found.attributes.get(STAMP, ""))
            return Answer(stat_of(key, found.meta), start, end, stamp, self._pieces(key, found))

    def put(self, key: str, data: Data, match: str | None, stamp: str) -> str:
        mode: Any = "overwrite" if match is None else "create"
        if match:
            mode = {"version": match} if self._generations else {"e_tag": match}
        attributes = {STAMP: stamp} if stamp else None
        with self._errors(key):
            made = obstore.put(self.store, key, data, attributes=attributes, mode=mode, use_multipart=False)
        return (made["version"] if self._generations else quoted(made["e_tag"])) or ""

    def delete(self, key: str) -> None:
        with self._errors(key):
            obstore.delete(self.store, key)

    def copy(self, key: str) -> None:
        with self._errors(key):
            obstore.copy(self.store, key, key)

    def listing(self, prefix: str, offset: str) -> Iterator[tuple[list[Stat], str]]:
        """Pages of the objects whose key starts with ``prefix`` and sorts after ``offset``, and the last key of each."""
        folder, _, _ = prefix.rpartition("/")  # obstore's prefixes are whole segments
        with self._errors(prefix):
            pages = obstore.list(self.store, folder or None, offset=offset or None, chunk_size=1000)
            for page in pages:
                stats = [stat_of(meta["path"], meta) for meta in page if meta["path"].startswith(prefix)]
                if page:
                    yield stats, page[-1]["path"]

    def folders(self, prefix: str) -> list[str]:
        with self._errors(prefix):
            found = obstore.list_with_delimiter(self.store, prefix.rstrip("/") or None)
            return [path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"]]

    def _pieces(self, key: str, found: obstore.GetResult) -> Iterator[bytes]:
        with self._errors(key):
            for piece in found.stream(min_chunk_size=_PIECE):
                yield bytes(piece)

    def _errors(self, key: str) -> _Mapped:
        return _Mapped(f"{self._url}/{key}")


def _version(version: str) -> dict[str, Any]:
    return {"version": version} if version else {}


def stat_of(key: str, meta: Mapping[str, Any]) -> Stat:
    return Stat(key, meta["size"], quoted(meta["e_tag"]), meta["version"] or "", meta["last_modified"].timestamp())


class _Mapped:
    """Foreign exceptions become those of ``service.py``. A class, as a generator's context costs ten times as much."""

    __slots__ = ("_where",)

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        _users.add(os.getpid())

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None or isinstance(error, (ArtifactFSError, TransientError, GeneratorExit)):
            return
        mapped = _explained(error, self._where)
        if mapped is not None:
            raise mapped from None


def _explained(error: BaseException, where: str) -> Exception | None:
    """The error for one of obstore's; None for what is none of it."""
    if not isinstance(error, (exceptions.BaseError, OSError, ValueError)):
        return None
    text = str(error)
    status, code = _STATUS.search(text), _CODE.search(text)
    if status:
        return explained(int(status[1]), code[1] if code else "", where)
    if "non-partial response" in text:
        return NotPartialError("the service does not answer with the range that was asked for")
    if _SHORT.search(text):
        return explained(416, "", where)
    if isinstance(error, (exceptions.PreconditionError, exceptions.AlreadyExistsError, exceptions.NotModifiedError)):
        return RefusedError(where)
    if isinstance(error, exceptions.UnauthenticatedError):
        return explained(401, "", where)
    if isinstance(error, FileNotFoundError):
        return explained(404, "", where)
    if isinstance(error, exceptions.PermissionDeniedError):
        return explained(403, "", where)
    if isinstance(error, (exceptions.GenericError, OSError)):
        if _TLS.search(text.partition("Debug source")[2]):
            return NetworkError(f"{where}: the TLS connection failed; check the endpoint, and set AWS_CA_BUNDLE for your own CA")
        return TransientError("no answer")
    return NetworkError(f"{where}: the request cannot be made ({type(error).__name__}); check the name and the endpoint")
