"""The records of a remote store, remembered for when it cannot be asked: by wrapping its objects."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from artifactfs.cache.records import Records
from artifactfs.errors import OfflineError
from artifactfs.objects import ObjectInfo, ObjectStore, Writer, stream
from artifactfs.waiting import about_to_wait

_KEPT = re.compile(r"store\.json|entities/[^/]+\.json|catalog/[^/]+/[^/]+/[^/]+/(collection|versions/[0-9]+)\.json")


class RememberedObjects:
    """``objects``, whose records go to ``records`` as they are read. ``offline``: they are read from there, and all else is an
    OfflineError; ``objects`` are not touched."""

    def __init__(self, objects: ObjectStore, records: Records, offline: bool) -> None:
        self.url = objects.url
        self._objects = objects
        self._records = records
        self._offline = offline

    def get(self, key: str) -> tuple[bytes, str]:
        if self._offline:
            known = self._records.get(key)
            if known is None:
                raise self._unreachable(key)
            return known, "offline"
        about_to_wait()
        data, etag = self._objects.get(key)
        if _KEPT.fullmatch(key):
            self._records.put(key, data)
        return data, etag

    def read(self, key: str, offset: int, size: int) -> bytes:
        return self._online(key).read(key, offset, size)

    def stream(self, key: str, offset: int, size: int) -> Iterator[bytes]:
        return stream(self._online(key), key, offset, size)

    def path(self, key: str) -> str | None:
        return None

    def size(self, key: str) -> int | None:
        return self._online(key).size(key)

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        self._online(key).put(key, data)

    def writer(self, key: str = "") -> Writer:
        return self._online(key or "a new object").writer(key)

    def swap(self, key: str, data: bytes, etag: str) -> str | None:
        return self._online(key).swap(key, data, etag)

    def scan(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        return self._online(prefix).scan(prefix, after)

    def folders(self, prefix: str) -> list[str]:
        return self._online(prefix).folders(prefix)

    def delete(self, key: str, unless_newer: float | None = None) -> bool:
        return self._online(key).delete(key, unless_newer)

    def remove(self, keys: Iterable[str], unless_newer: float) -> Iterator[str]:
        return self._online("").remove(keys, unless_newer)

    def clock(self) -> float:
        return self._online("").clock()

    def sweep(self, before: float) -> int:
        return self._online("").sweep(before)

    def refresh(self, key: str) -> bool:
        return self._online(key).refresh(key)

    def _online(self, key: str) -> ObjectStore:
        if self._offline:
            raise self._unreachable(key)
        about_to_wait()
        return self._objects

    def _unreachable(self, key: str) -> OfflineError:
        what = key or "its top level"
        return OfflineError(f"{what} of {self.url} is not in the cache, and offline nothing is fetched; run it once when online")
