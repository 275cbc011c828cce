"""Objects in a bucket, below a prefix: the team store. The service's conditional writes are the only coordination.

**Removal.** No service removes an object on condition that nobody has just written it anew: the same bytes have the same ETag. So
whoever removes old objects first says which, in the record ``gc.json`` (compare-and-swap), and only then looks how old each is
and removes it. Whoever writes a data object looks into that record afterwards: if the object is named there, its writer waits
until that is over and writes again. Either the removal sees the write, or the write sees the removal. A record is over when its
owner clears it, or when somebody has watched it unchanged for :data:`LEASE`; its owner begins no removal after a part of that.

**Probe.** Before its first write a process makes sure that the service heeds conditions (:meth:`BucketObjects.probe`): some
ignore them silently, and commits would be lost. Such a store can be read.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import msgspec

from artifactfs.buckets import Bucket, NoBucketError
from artifactfs.errors import (
    ConflictError,
    IntegrityError,
    InvalidNameError,
    NetworkError,
    NotFoundError,
    ReadOnlyError,
    SourceChangedError,
    StoreFormatError,
)
from artifactfs.forking import new_lock
from artifactfs.objects import ABSENT, MAX_RECORD, ObjectInfo
from artifactfs.objects.parts import PartWriter

LEASE = 300.0
"""Seconds after which a record of removals that nobody changes is over: its owner is dead."""

_REMOVE_FOR = 60.0  # seconds: with the deadlines of the request before it and of the last one in it, well within LEASE
_REMOVALS = "gc.json"
_BATCH = 500
_REMOVERS = 16
_POLL = 0.5
_MAX_KEY = 1023
"""Bytes: S3 allows 1,024, some services one less."""


class _Removals(msgspec.Struct):
    """The record: ``keys`` may be removed at any moment, by the collector with that ``stamp``. Empty: nobody removes."""

    stamp: str = ""
    keys: list[str] = []


class BucketObjects:
    """The object store in ``bucket`` below ``prefix`` ("" or ending with ``/``). ``url`` opens it again."""

    def __init__(self, bucket: Bucket, prefix: str, url: str) -> None:
        self.url = url
        self._bucket = bucket
        self._prefix = prefix
        self._probed = False
        self._lock = new_lock()

    def get(self, key: str) -> tuple[bytes, str]:
        with self._errors(key):
            data, stat = self._bucket.get(self._full(key), MAX_RECORD)
            return data, self._bucket.token(stat)

    def read(self, key: str, offset: int, size: int) -> bytes:
        return b"".join(self.stream(key, offset, size))

    def stream(self, key: str, offset: int, size: int) -> Iterator[bytes]:
        with self._errors(key):
            try:
                yield from self._bucket.stream(self._full(key), offset, size)
            except SourceChangedError:  # an object of a store never changes
                raise IntegrityError(f"{key} in {self.url} ends before byte {offset + size}") from None

    def path(self, key: str) -> str | None:
        return None

    def size(self, key: str) -> int | None:
        with self._errors(key), contextlib.suppress(NotFoundError):
            return self._bucket.head(self._full(key)).size
        return None

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        self._writable()
        with self._errors(key):
            self._bucket.put(self._full(key), data)
            while self._threatened(key):
                self._bucket.put(self._full(key), data)

    def writer(self, key: str = "") -> BucketWriter:
        self._writable()
        return BucketWriter(self, key)

    def swap(self, key: str, data: bytes, etag: str) -> str | None:
        self._writable()
        with self._errors(key):
            return self._bucket.swap(self._full(key), data, etag)

    def scan(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        start = len(self._prefix)
        with self._errors(prefix):
            for stat in self._bucket.scan(self._prefix + prefix):
                # Compared here: a service that lists in another order than that of bytes also begins elsewhere.
                if (key := stat.key[start:]) > after:
                    yield ObjectInfo(key, stat.size, stat.modified)

    def folders(self, prefix: str) -> list[str]:
        with self._errors(prefix):
            return self._bucket.folders(self._prefix + prefix)

    def delete(self, key: str, unless_newer: float | None = None) -> bool:
        if unless_newer is not None:
            return any(self.remove([key], unless_newer))
        with self._errors(key), contextlib.suppress(NotFoundError):
            self._bucket.head(self._full(key))
            self._bucket.delete(self._full(key))
            return True
        return False

    def remove(self, keys: Iterable[str], unless_newer: float) -> Iterator[str]:
        self._writable()
        remaining = iter(keys)
        with ThreadPoolExecutor(_REMOVERS, thread_name_prefix="remove") as pool:
            while batch := list(islice(remaining, _BATCH)):
                while batch:
                    removed, batch = self._remove_some(batch, unless_newer, pool)
                    yield from removed

    def refresh(self, key: str) -> bool:
        self._writable()
        with self._errors(key), contextlib.suppress(NotFoundError):
            self._bucket.touch(self._full(key))
            while self._threatened(key):
                self._bucket.touch(self._full(key))
            return True
        return False

    def clock(self) -> float:
        key = self._full(f"tmp/clock-{secrets.token_hex(8)}")
        with self._errors(key):
            self._bucket.put(key, b"")
            try:
                return self._bucket.head(key).modified
            finally:
                self._bucket.delete(key)

    def sweep(self, before: float) -> int:
        with self._errors("unfinished uploads"):
            return self._bucket.drop_uploads(self._prefix, before)

    def credentials(self) -> str:
        """Where the credentials come from, in words; "" if there are none. NotPermittedError if they cannot be had."""
        return self._bucket.credentials()

    def probe(self) -> None:
        """Nothing, if the service's conditional writes work; ReadOnlyError says in which way they do not."""
        key = f"tmp/probe-{secrets.token_hex(8)}"
        full = self._full(key)
        with self._errors(key):
            try:
                made = self._bucket.swap(full, b"1", ABSENT)
                if made is None:
                    raise self._unfit("refuses to create an object that is not there")
                if self._bucket.swap(full, b"2", ABSENT) is not None:
                    raise self._unfit("creates an object that is there already")
                replaced = self._bucket.swap(full, b"3", made)
                if replaced is None:
                    raise self._unfit("refuses to replace an object that is as expected")
                if self._bucket.swap(full, b"4", made) is not None:
                    raise self._unfit("replaces an object that is not as expected")
                if self._bucket.get(full, 1)[0] != b"3":
                    raise self._unfit("does not show what was written last")
            finally:
                with contextlib.suppress(NetworkError):
                    self._bucket.delete(full)

    def _unfit(self, what: str) -> ReadOnlyError:
        return ReadOnlyError(
            f"{self.url} can only be read: its service {what}, so commits could be lost; "
            "use a service with conditional writes (If-None-Match and If-Match of PutObject)"
        )

    def _writable(self) -> None:
        """Probe the service once."""
        with self._lock:
            if not self._probed:
                self.probe()
                self._probed = True

    def _remove_some(self, keys: list[str], unless_newer: float, pool: ThreadPoolExecutor) -> tuple[list[str], list[str]]:
        """Remove those of ``keys`` that are old: (what was removed, what is left to try when the time ran out)."""
        with self._errors(_REMOVALS):
            token = self._announce(keys)
            late = time.monotonic() + _REMOVE_FOR
            done = list(pool.map(lambda key: self._remove(key, unless_newer, late), keys))
            # Only reached if every removal was answered: after one that was not, the record stays until it is over.
            self._bucket.swap(self._full(_REMOVALS), msgspec.json.encode(_Removals()), token)
        removed = [key for key, was in zip(keys, done, strict=True) if was]
        return removed, [key for key, was in zip(keys, done, strict=True) if was is None]

    def _remove(self, key: str, unless_newer: float, late: float) -> bool | None:
        """Whether it was old and is removed; None if it is too late to try."""
        if time.monotonic() > late:
            return None
        try:
            if self._bucket.head(self._full(key)).modified > unless_newer:
                return False
        except NotFoundError:
            return False
        if time.monotonic() > late:
            return None
        self._bucket.delete(self._full(key))
        return True

    def _announce(self, keys: list[str]) -> str:
        """Write the record once nobody else removes; its token."""
        record = msgspec.json.encode(_Removals(secrets.token_hex(16), keys))
        while True:
            found, token = self._removals()
            if found.keys:
                token = self._over(found)
            made = self._bucket.swap(self._full(_REMOVALS), record, token)
            if made is not None:
                return made

    def _threatened(self, key: str) -> bool:
        """Whether ``key``, which was just written, may have been removed; returns once that is over."""
        found, _ = self._removals()
        if key not in found.keys:
            return False
        self._over(found)
        return True

    def _over(self, record: _Removals) -> str:
        """Wait until ``record`` is over; the token of what is there then."""
        watched = time.monotonic()
        while True:
            found, token = self._removals()
            if not found.keys or found.stamp != record.stamp:
                return token
            if time.monotonic() - watched > LEASE:
                cleared = self._bucket.swap(self._full(_REMOVALS), msgspec.json.encode(_Removals()), token)
                if cleared is not None:
                    return cleared
            time.sleep(_POLL)

    def _removals(self) -> tuple[_Removals, str]:
        try:
            data, stat = self._bucket.get(self._full(_REMOVALS), MAX_RECORD)
            return msgspec.json.decode(data, type=_Removals), self._bucket.token(stat)
        except NoBucketError:
            raise
        except NotFoundError:
            return _Removals(), ABSENT
        except msgspec.MsgspecError:
            raise IntegrityError(f"{_REMOVALS} in {self.url} cannot be decoded; remove it when no gc runs") from None

    def _full(self, key: str) -> str:
        full = self._prefix + key
        if len(full.encode()) > _MAX_KEY:
            raise InvalidNameError(
                f"{key[:60]!r}… is too long for a bucket, whose keys have {_MAX_KEY} bytes at most; use shorter names"
            )
        return full

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except NoBucketError as error:  # not "not found": nobody shall take the store for empty
            raise StoreFormatError(str(error)) from None
        except NotFoundError:
            raise NotFoundError(f"{key} is not in the store {self.url}") from None


class BucketWriter:
    """An object on its way into the bucket: in parts while it is written if its key is known, else by way of a local file."""

    def __init__(self, objects: BucketObjects, key: str) -> None:
        self._objects = objects
        self._key = key
        full = objects._full(key) if key else ""
        self._writer = PartWriter(objects._bucket, full)

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self._writer.write_at(offset, data)

    def commit(self, key: str) -> None:
        if self._key not in ("", key):
            raise ValueError(f"{key} was begun as {self._key}")
        objects = self._objects
        with objects._errors(key):
            self._writer.commit(objects._full(key))
            if objects._threatened(key) and objects.size(key) is None:
                raise ConflictError(f"{key} was collected from {objects.url} while it was written; try again")

    def abort(self) -> None:
        self._writer.abort()
