"""The bytes of stored contents: from local disk with every block checked, or from anywhere as a source for the cache."""

from __future__ import annotations

import os
import stat
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate

from artifactfs.content import DIGEST_SIZE, CheckedBlocks
from artifactfs.errors import IntegrityError, NotFoundError, from_os_error
from artifactfs.forking import new_lock
from artifactfs.model import BLOCK, Extent, Lying
from artifactfs.objects import ObjectStore, object_key, stream

_AHEAD = 8 * BLOCK
"""What the kernel is asked to read ahead: some 16 ms of a disk of 500 MB/s."""


_MAX_OPEN = 16
"""Objects that a content keeps open: one that was appended to a thousand times lies in a thousand."""


class LocalExtents:
    """A content read from the local files that hold it. Each block is checked when this process first reads it.

    Objects are opened at the first read, and the last 16 stay open until :meth:`close`, and until the reads under way then are
    done; so a collected garbage object is still readable to whoever had it open. Threads may share one.
    """

    def __init__(
        self,
        objects: ObjectStore,
        id: bytes,
        size: int,
        extents: tuple[Extent, ...],
        digests: Callable[[], bytes],
        checks: dict[bytes, CheckedBlocks],
    ) -> None:
        self._objects = objects
        self._id = id
        self._size = size
        self._extents = extents
        self._starts = [0, *accumulate(extent.length for extent in extents)]
        self._load_digests = digests
        self._digests = b""
        self._checks = checks
        self._last = -1
        self._lock = new_lock()
        self._files: dict[bytes, _Opened] = {}

    def read(self, offset: int, size: int) -> bytes:
        end = min(offset + size, self._size)
        if offset >= end:
            return b""
        first = offset // BLOCK
        if (end - 1) // BLOCK == first:
            return self._read_block(first, offset - first * BLOCK, end - offset)
        pieces = []
        while offset < end:
            block = offset // BLOCK
            stop = min(end, (block + 1) * BLOCK)
            pieces.append(self._read_block(block, offset - block * BLOCK, stop - offset))
            offset = stop
        return b"".join(pieces)

    def lying(self, offset: int) -> Lying | None:
        at = bisect_right(self._starts, offset) - 1
        if not 0 <= offset < self._size:
            return None
        within = offset - self._starts[at]
        try:
            opened = self._open(self._extents[at].object)
        except (OSError, IntegrityError):
            return None
        return Lying(opened.fd, self._extents[at].offset + within, self._extents[at].length - within, opened)

    def close(self) -> None:
        with self._lock:
            self._files = {}

    def _read_block(self, block: int, start: int, size: int) -> bytes:
        position = block * BLOCK
        at = bisect_right(self._starts, position) - 1
        extent = self._extents[at]
        checks = self._checks.get(extent.object)
        if checks is None:
            checks = self._checks.setdefault(extent.object, CheckedBlocks())
        length = min(BLOCK, self._size - position)
        place = extent.offset + position - self._starts[at]
        try:
            opened = self._open(extent.object)
            if block != self._last:
                self._look_ahead(block, opened.fd, place)
            data = checks.read(opened.fd, place, length, start, size, self._digest(block))
        except OSError as error:
            raise from_os_error(error, f"reading {self._where(extent)}") from error
        if data is None:
            raise IntegrityError(f"block {block} of content {self._id.hex()} in {self._where(extent)} is damaged")
        return data

    def _look_ahead(self, block: int, fd: int, place: int) -> None:
        """Reading in sequence has the disk at work on the next blocks while this one is checked and handed out."""
        if block == self._last + 1 and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, place + BLOCK, _AHEAD, os.POSIX_FADV_WILLNEED)
        self._last = block

    def _digest(self, block: int) -> bytes:
        if not self._digests:
            self._digests = self._load_digests()
        return self._digests[block * DIGEST_SIZE : (block + 1) * DIGEST_SIZE]

    def _open(self, object: bytes) -> _Opened:
        opened = self._files.get(object)
        if opened is not None:
            return opened
        key = object_key(object)
        with self._lock:
            if object not in self._files:
                path = self._objects.path(key)
                assert path is not None
                if len(self._files) >= _MAX_OPEN:
                    del self._files[next(iter(self._files))]
                try:
                    self._files[object] = _Opened(path)
                except FileNotFoundError:
                    # Not "not found": the file exists in its version, its bytes are gone.
                    raise IntegrityError(f"content {self._id.hex()} is lost: {key} is not in {self._objects.url}") from None
            return self._files[object]

    def _where(self, extent: Extent) -> str:
        return f"{object_key(extent.object)} of {self._objects.url}"


class _Opened:
    """A descriptor that is closed once nobody has it: a read under way keeps its own, whoever closes the content."""

    __slots__ = ("fd",)

    def __init__(self, path: str) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(self.fd).st_mode):
            raise IntegrityError(f"{path} is not a regular file, so it is no object of a store")

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class ExtentSource:
    """A content as a :class:`artifactfs.references.Source`, unchecked: its reader checks each block."""

    def __init__(self, objects: ObjectStore, id: bytes, size: int, extents: tuple[Extent, ...]) -> None:
        self.key = id
        self.size = size
        self.where = f"content {id.hex()} of {objects.url}"
        self._objects = objects
        self._extents = extents

    def fetch(self, offset: int, size: int) -> Iterator[bytes]:
        end = offset + size
        start = 0
        for extent in self._extents:
            low, high = max(offset, start), min(end, start + extent.length)
            if low < high:
                try:
                    yield from stream(self._objects, object_key(extent.object), extent.offset + low - start, high - low)
                except NotFoundError as error:
                    raise IntegrityError(f"{self.where} is lost: {error}") from None
            start += extent.length
