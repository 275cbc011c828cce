"""Contents of more than one block on their way into a store: blocks that an older content has at the same place are kept there.

The result is a list of extents: runs of the older content's objects, and one new object with all new blocks back to back. So
changing a little of a large file stores a little, and a file without an older one becomes one blob.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import msgspec

from artifactfs.content import DIGEST_SIZE, content_id
from artifactfs.errors import UsageError
from artifactfs.model import BLOCK, OBJECT_BLOB, Extent, File
from artifactfs.objects import Writer, object_key
from artifactfs.pack import PackWriter
from artifactfs.store.native import MAX_TABLE, NativeStore

_NEW = b""
"""Stands for the new object in extents until its id is known."""


class LargeContent:
    """Takes a content's blocks in order, then says where they lie. For one thread.

    ``digests`` are the digests of the blocks taken so far; ``written`` the bytes that were not stored before.
    """

    def __init__(self, store: NativeStore, prior: File | None) -> None:
        self._store = store
        self._prior = store.extents(prior) if prior is not None else ()
        self._starts = [0, *accumulate(extent.length for extent in self._prior)]
        self._known = store.block_list(prior) if prior is not None and prior.size else b""
        self._extents: list[Extent] = []
        self._new_digests = bytearray()
        self._held = bytearray()
        self._writer: Writer | None = None
        self._is_stored = False
        self.digests = bytearray()
        self.size = 0
        self.written = 0

    def known(self, block: int) -> bytes:
        """The older content's digest of ``block``; b"" if it has none."""
        return self._known[block * DIGEST_SIZE : (block + 1) * DIGEST_SIZE]

    def keep(self, length: int) -> None:
        """The next block, of ``length`` bytes, is the older content's, which must have it whole."""
        if min(BLOCK, self._starts[-1] - self.size) != length:
            raise ValueError(f"the older content has no block of {length} bytes at {self.size}")
        self.digests += self.known(self.size // BLOCK)
        at = bisect_right(self._starts, self.size) - 1  # blocks do not straddle extents: NativeStore.extents checks it
        extent = self._prior[at]
        self._extend(Extent(extent.object, extent.offset + self.size - self._starts[at], length))
        self.size += length

    def take(self, data: memoryview, digest: bytes) -> None:
        """The next block is ``data``."""
        if digest == self.known(self.size // BLOCK):
            self.keep(len(data))
            return
        self.digests += digest
        self._new_digests += digest
        self._write(data)
        self._extend(Extent(_NEW, self.written, len(data)))
        self.size += len(data)
        self.written += len(data)

    def take_stored(self, length: int, digest: bytes) -> None:
        """The next block is new to the older content; the blob of all such blocks is in the store, where an earlier attempt left
        it. Not to be mixed with :meth:`take`."""
        self._is_stored = True
        self.digests += digest
        self._new_digests += digest
        self._extend(Extent(_NEW, self.written, length))
        self.size += length
        self.written += length

    def finish(self, packs: PackWriter) -> tuple[tuple[Extent, ...], Extent | None]:
        """The content's extents, or their table where there are several. Durable once ``packs`` are, and the blob is now."""
        object, start = b"", 0
        if self._writer is not None or self._is_stored:
            object = OBJECT_BLOB + content_id(self.written, bytes(self._new_digests))
            if self._writer is not None:
                self._writer.commit(object_key(object))
        elif self.written:
            place = packs.add(bytes(self._held))
            object, start = place.object, place.offset
        extents = tuple(
            Extent(object, start + extent.offset, extent.length) if extent.object == _NEW else extent for extent in self._extents
        )
        if len(extents) == 1:
            return extents, None
        table = msgspec.msgpack.encode(extents)
        if len(table) > MAX_TABLE:
            raise UsageError(f"a content of {self.size} bytes lies in {len(extents)} pieces; store it under another path, afresh")
        return (), packs.add(table)

    def abort(self) -> None:
        """Forget it. Idempotent; after :meth:`finish` it does nothing."""
        if self._writer is not None:
            self._writer.abort()

    def _write(self, data: memoryview) -> None:
        """New bytes go into a pack if they stay within a block, else into a blob."""
        if self._writer is None and len(self._held) + len(data) <= BLOCK:
            self._held += data
            return
        if self._writer is None:
            self._writer = self._store.objects.writer()
            self._writer.write_at(0, self._held)
            self._held = bytearray()
        self._writer.write_at(self.written, data)

    def _extend(self, extent: Extent) -> None:
        if self._extents:
            last = self._extents[-1]
            if last.object == extent.object and last.offset + last.length == extent.offset:
                self._extents[-1] = Extent(last.object, last.offset, last.length + extent.length)
                return
        self._extents.append(extent)
