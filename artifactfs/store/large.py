"""Contents of more than one block on their way into a store: blocks that an older content has at the same place are kept there.

The result is a list of extents: runs of the older content's objects, and one new object with all new blocks back to back. So
changing a little of a large file stores a little, and a file without an older one becomes one blob.

A remote store must be told an object's name before its first byte, and a blob's follows from all of its blocks. So for one the
new blocks are only noted, and read again when they are sent, in the background: what is there already is not sent at all, and a
file that has changed since is noticed, because each block is checked against its digest.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate

import msgspec

from artifactfs.content import DIGEST_SIZE, block_digest, content_id
from artifactfs.errors import ConflictError, UsageError
from artifactfs.model import BLOCK, OBJECT_BLOB, Extent, File
from artifactfs.objects import ObjectStore, Writer, object_key
from artifactfs.pack import PackWriter
from artifactfs.store.native import MAX_TABLE, NativeStore

_NEW = b""
"""Stands for the new object in extents until its id is known."""


class LargeContent:
    """Takes a content's blocks in order, then says where they lie. For one thread.

    ``digests`` are the digests of the blocks taken so far; ``written`` the bytes that were not stored before.
    """

    def __init__(self, store: NativeStore, prior: File | None, again: Callable[[int, int], bytes] | None = None) -> None:
        """``again(offset, size)`` reads bytes of the content once more, later and in another thread."""
        self._again = again if not store.local else None
        self._noted: list[tuple[int, int]] = []
        self._store = store
        self._prior = store.extents(prior) if prior is not None else ()
        self._starts = [0, *accumulate(extent.length for extent in self._prior)]
        self._known = store.block_list(prior) if prior is not None and prior.size else b""
        self._extents: list[Extent] = []
        self._new_digests = bytearray()
        self._held = bytearray()
        self._writer: Writer | None = None
        self._is_blob = False
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
        """The next block is new to the older content; the caller sees to it that the blob of all such blocks is in the store. Not
        to be mixed with :meth:`take`."""
        self._is_blob = True
        self.digests += digest
        self._new_digests += digest
        self._extend(Extent(_NEW, self.written, length))
        self.size += length
        self.written += length

    def finish(self, packs: PackWriter) -> tuple[tuple[Extent, ...], Extent | None]:
        """The content's extents, or their table where there are several. Durable once ``packs`` are."""
        object, start = b"", 0
        if self._is_blob:
            object = OBJECT_BLOB + content_id(self.written, bytes(self._new_digests))
            self._store_blob(object_key(object), packs)
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

    def _store_blob(self, key: str, packs: PackWriter) -> None:
        if self._writer is not None:
            self._writer.commit(key)
        elif self._again is not None:
            packs.run(_Sending(self._store.objects, key, self._again, self._noted, bytes(self._new_digests)))

    def _write(self, data: memoryview) -> None:
        """New bytes go into a pack if they stay within a block, else into a blob."""
        if self._again is not None:
            self._noted.append((self.size, len(data)))
        if not self._is_blob and len(self._held) + len(data) <= BLOCK:
            self._held += data
            return
        self._is_blob = True
        if self._again is not None:
            self._held = bytearray()
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


class _Sending:
    """Sends a blob, unless it is there: its blocks are read ``again``, and must have the same digests as before."""

    def __init__(
        self, objects: ObjectStore, key: str, again: Callable[[int, int], bytes], blocks: list[tuple[int, int]], digests: bytes
    ) -> None:
        self._objects = objects
        self._key = key
        self._again = again
        self._blocks = blocks
        self._digests = digests

    def __call__(self) -> None:
        size = sum(length for _, length in self._blocks)
        # An attempt at this commit has sent it, or another commit; made as new as one just written, gc spares it.
        if self._objects.size(self._key) == size and self._objects.refresh(self._key):
            return
        writer = self._objects.writer(self._key)
        try:
            written = 0
            for number, (offset, length) in enumerate(self._blocks):
                data = self._again(offset, length)
                if block_digest(data) != self._digests[number * DIGEST_SIZE : (number + 1) * DIGEST_SIZE]:
                    raise ConflictError("a file changed while it was being stored; try again once nothing writes to it")
                writer.write_at(written, data)
                written += length
            writer.commit(self._key)
        finally:
            writer.abort()
