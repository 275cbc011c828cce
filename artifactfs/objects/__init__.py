"""Object stores: named bytes, and the obligations every implementation has. ``tests/contracts`` runs them all.

Keys are ``/``-separated relative paths of printable ASCII-safe parts. Data objects (``packs/``, ``blobs/``) are written once
under names that nobody else uses for other bytes; catalog objects are small and change by compare-and-swap only.

Every method may raise the errors of ``errors.py``: NotFoundError for a key that is not there (except where "missing is no
error"), NotPermittedError/ReadOnlyError, StorageFullError, NetworkError after the retries are used up. All methods may be
called from any thread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, runtime_checkable

from artifactfs.model import OBJECT_BLOB, OBJECT_PACK

ABSENT = ""
"""The ETag of what is not there: ``swap(key, data, ABSENT)`` creates."""

MAX_RECORD = 32 << 20
"""Bytes of a catalog object at most: it is read into memory whole, and its metadata is a person's, not a data set."""


@dataclasses.dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object of a listing: ``size`` in bytes, ``modified`` in seconds since the epoch by the store's clock."""

    key: str
    size: int
    modified: float


class Writer(Protocol):
    """An object being written. Positional writes of disjoint ranges may come from several threads, in any order."""

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put ``data`` at ``offset``. The object ends where the furthest write ended."""

    def commit(self, key: str) -> None:
        """Make it appear, whole and durable, as ``key``; an object already there is replaced (it has the same bytes)."""

    def abort(self) -> None:
        """Forget it. Idempotent; after :meth:`commit` it does nothing."""


class ObjectStore(Protocol):
    """Named bytes. ``url`` has no secrets in it and goes into messages."""

    url: str

    def get(self, key: str) -> tuple[bytes, str]:
        """The whole object and its ETag. For catalog objects: one of over :data:`MAX_RECORD` bytes is an IntegrityError."""

    def read(self, key: str, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes at ``offset``; an object that ends before is an IntegrityError that names it."""

    def path(self, key: str) -> str | None:
        """A local path whose bytes are the object, if there is one; else None. Missing is no error here."""

    def size(self, key: str) -> int | None:
        """The object's bytes, or None if it is not there: missing is no error."""

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        """Write a data object, whole and durable once this returns. Idempotent."""

    def writer(self, key: str = "") -> Writer:
        """Start a data object too large to hold in memory. ``key``, if it is known already, is what it will be committed as: then
        a remote store gets its bytes as they are written, and none of them has to wait for the commit."""

    def swap(self, key: str, data: bytes, etag: str) -> str | None:
        """Replace a catalog object only if its ETag is ``etag`` (:data:`ABSENT`: only if it is not there).

        Returns the new ETag, or None if another write came first. Atomic between all processes and machines, and durable.
        A client's own retry must not turn a success into a loss: bytes that contain a unique stamp are read back first.
        """

    def scan(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        """The objects whose key starts with ``prefix`` (ends with ``/``) and sorts after ``after``, in any order."""

    def folders(self, prefix: str) -> list[str]:
        """The names directly below ``prefix`` (ends with ``/``, or is "") that have objects below them, sorted."""

    def delete(self, key: str, unless_newer: float | None = None) -> bool:
        """Remove an object; missing is no error. With ``unless_newer`` (seconds since the epoch) an object modified after
        that stays, and no write can come between the check and the removal. Returns whether it was removed."""

    def remove(self, keys: Iterable[str], unless_newer: float) -> Iterator[str]:
        """:meth:`delete` for many: the keys of those that were removed, as they are."""

    def refresh(self, key: str) -> bool:
        """Make a data object as new as one just written, for :meth:`delete`'s ``unless_newer``. False if it is not there."""

    def clock(self) -> float:
        """Now, in seconds since the epoch, by the clock that ``modified`` is told by."""

    def sweep(self, before: float) -> int:
        """Remove what writers left that died before ``before`` (seconds since the epoch) and that is no object. How many."""


@runtime_checkable
class Streaming(Protocol):
    """An object store that can hand out bytes before all of them are here."""

    def stream(self, key: str, offset: int, size: int) -> Iterator[bytes]:
        """Exactly ``size`` bytes at ``offset`` in pieces as they arrive, by one request (and its retries); errors as
        :meth:`ObjectStore.read`."""


def stream(objects: ObjectStore, key: str, offset: int, size: int) -> Iterator[bytes]:
    """Exactly ``size`` bytes at ``offset``, in pieces as they arrive where ``objects`` can do that."""
    return objects.stream(key, offset, size) if isinstance(objects, Streaming) else iter((objects.read(key, offset, size),))


Wrapper = Callable[[ObjectStore], ObjectStore]


def object_key(object: bytes) -> str:
    """The key of the blob or pack that an extent names.

    ValueError for an id of another form: it cannot lead outside ``blobs/`` and ``packs/``.
    """
    kind, name = object[:1], object[1:].hex()
    if kind == OBJECT_BLOB and len(name) == 64:
        return f"blobs/{name[:2]}/{name}"
    if kind == OBJECT_PACK and len(name) == 32:
        return f"packs/{name[:2]}/{name}"
    raise ValueError(f"not an object id: {object[:40]!r}")
