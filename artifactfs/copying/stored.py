"""From one native store to another: the same trees under the same digests, contents checked on their way.

What is read from the source is checked against its content id before it is written; pages are made anew by ``publish``, which
refuses a tree whose digest is not the source's. What the newest version of the target's collection has, at the same path or any
other, is not sent, nor are blocks of a large file that its file of that path has.

A copy that was killed is repeated, and does not send again what arrived: small contents go into packs whose ids follow from what
is copied over what, and large ones into objects named by their bytes, so that the second attempt finds those of the first. A
version that is there already is known by the id of its commit.

Threads: the caller's walks the tree and says where everything will lie; workers read, check and write the objects.
"""

from __future__ import annotations

import contextlib
import dataclasses
import struct
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import msgspec
from blake3 import blake3

from artifactfs.content import DIGEST_SIZE, block_digest, content_id
from artifactfs.errors import IntegrityError, NotFoundError
from artifactfs.model import BLOCK, OBJECT_BLOB, OBJECT_PACK, Dir, Entry, Extent, File, Ref, Symlink, Version
from artifactfs.names import ArtifactName
from artifactfs.objects import object_key
from artifactfs.pack import PACK_TARGET, PackWriter
from artifactfs.publish import Change, Draft, NewRef, Progress, Published, Report, publish
from artifactfs.store.large import LargeContent
from artifactfs.store.native import NativeStore
from artifactfs.store.semvers import NEXT, semvers
from artifactfs.store.upload import Index

_PACK_CONTEXT = "artifactfs 2026-11 copied pack v1"
"""A pack's id is derived from what is copied: whoever packs in another order, or by another size, needs another context."""
_WRITING = 4
"""Packs and large contents under way at once: 64 MiB of packs."""
_READING = 16
"""Reads at once: they are mostly round trips."""
_GAP = 64 << 10
"""Bytes between two wanted contents of a source's pack that are cheaper to read than a further request."""
_RUN = 8 << 20
_SEGMENT = 4 << 20
_AHEAD = 4
"""Segments of a large content that are read ahead: 16 MiB."""


def copy_stored(
    source: NativeStore, target: NativeStore, version: Version, commit: str, progress: Progress, report: Report | None
) -> Published:
    """``version`` in ``target``, made by ``commit``: under its number, or the next one free there where that is higher; its
    semantic version likewise. IntegrityError for what is damaged."""
    name = ArtifactName(version.entity, version.project, version.collection)
    newest = target.newest(name)
    job = _Job(source, target, version, newest, progress, report)
    draft = Draft(
        name=name,
        type=version.type,
        folder=_CopiedFolder(job, version.root, newest.root if newest else None, whole=True),
        commit=commit,
        algorithm=version.algorithm,
        description=version.description,
        metadata=version.metadata,
        tags=version.tags,
        ttl=version.ttl,
        inherit_ttl=version.ttl_inherited,
        run=version.run,
        expect_root=version.root.digest,
        number=version.number,
        semver=free_semver(target, name, version.semver),
        always=bool(version.semver),  # whoever made it made one like the version before it on purpose
        reserved_type=True,
    )
    try:
        return publish(target, draft)
    finally:
        job.close()


def free_semver(target: NativeStore, name: ArtifactName, semver: str) -> str:
    """The semantic version of a copy: its own, or where the target has given that to another version the next one."""
    if not semver:
        return ""
    try:
        collection = target.collection(name)
    except NotFoundError:
        return semver
    taken = semvers(target, name, collection.semver, target.numbers(name)).find(semver) is not None
    return NEXT if taken or semver in collection.aliases else semver


@dataclasses.dataclass(frozen=True, slots=True)
class _CopiedFolder:
    """The source's directory ``theirs`` as changes to the target's ``base``."""

    job: _Job
    theirs: Dir
    base: Dir | None
    whole: bool = False
    """It is the root: once it has been walked, everything is stored."""

    def changes(self) -> Iterator[tuple[str, Change]]:
        for before, after in self.job.differences(self.base, self.theirs):
            if after is None:
                assert before is not None
                yield before.name, None
            elif isinstance(after, Dir):
                yield after.name, _CopiedFolder(self.job, after, before if isinstance(before, Dir) else None)
            else:
                yield after.name, self.job.entry(after, before)
        if self.whole:
            self.job.flush()


class _Item(NamedTuple):
    """A small content on its way into a pack: where it lies in the source, and where it will lie in the pack."""

    id: bytes
    place: Extent
    offset: int


class _Job:
    """The contents of one version on their way."""

    def __init__(
        self,
        source: NativeStore,
        target: NativeStore,
        version: Version,
        newest: Version | None,
        progress: Progress,
        report: Report | None,
    ) -> None:
        self._source = source
        self._target = target
        self._where = version.qualified_name
        self._progress = progress
        self._report = report
        self._index = Index(target.tree, newest.root if newest else None)
        self._stored: dict[bytes, File] = {}
        self._seed = version.root.digest + (newest.root.digest if newest else bytes(DIGEST_SIZE))
        self._readers = ThreadPoolExecutor(_READING, thread_name_prefix="copy-read")
        self._writers = ThreadPoolExecutor(_WRITING, thread_name_prefix="copy-write")
        self._writing: deque[Future[int]] = deque()
        self._lists = PackWriter(target.objects)
        self._packs = 0
        self._items: list[_Item] = []
        self._size = 0

    def differences(self, ours: Dir | None, theirs: Dir) -> Iterator[tuple[Entry | None, Entry | None]]:
        """(the target's entry, the source's) by name, wherever they are not the same."""
        return self._target.tree.pairs(ours, theirs, self._source.tree)

    def entry(self, entry: File | Symlink | Ref, before: Entry | None) -> Change:
        """The entry as the target will have it; ``before`` is what it has at that path."""
        if isinstance(entry, File):
            prior = before if isinstance(before, File) else None
            known = self._known(entry, prior)
            if known is None:
                known = self._stored[entry.id] = self._large(entry, prior) if entry.size > BLOCK else self._small(entry)
            self._count(1, entry.size)
            return msgspec.structs.replace(entry, extents=known.extents, blocks=known.blocks, table=known.table)
        if isinstance(entry, Ref) and entry.blocks is not None:
            return NewRef(msgspec.structs.replace(entry, blocks=None), self._source.block_list(entry))
        return entry

    def flush(self) -> None:
        """Return once everything is durable."""
        self._seal()
        self._lists.seal()
        while self._writing:
            self._count_sent()
        self._lists.flush()

    def close(self) -> None:
        """Forget what was not flushed and end the threads. Idempotent."""
        self._writers.shutdown(wait=True, cancel_futures=True)
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._lists.close()

    def _known(self, file: File, prior: File | None) -> File | None:
        """The content where the target has it."""
        if not file.size:
            return File("", 0, False, file.id)
        if prior is not None and prior.id == file.id:
            return prior
        return self._stored.get(file.id) or self._index.find(file.id, lambda: None)

    # Small contents

    def _small(self, file: File) -> File:
        places = self._source.extents(file)
        if len(places) != 1:
            raise IntegrityError(f"content {file.id.hex()} of {self._where} has {len(places)} extents, and one block only")
        if self._size + file.size > PACK_TARGET:
            self._seal()
        place = Extent(self._pack_id(), self._size, file.size)
        self._items.append(_Item(file.id, places[0], self._size))
        self._size += file.size
        return File("", file.size, False, file.id, (place,))

    def _pack_id(self) -> bytes:
        """The same for the same pack of a repeated copy, and for nothing else."""
        identity = self._seed + struct.pack("<Q", self._packs)
        return OBJECT_PACK + blake3(identity, derive_key_context=_PACK_CONTEXT).digest()[:16]

    def _seal(self) -> None:
        """Start to write the pack at hand."""
        if not self._items:
            return
        self._start(self._write_pack, object_key(self._pack_id()), self._items, self._size)
        self._packs += 1
        self._items, self._size = [], 0

    def _start(self, write: Callable[..., int], *arguments: Any) -> None:
        """Have a worker write an object; :meth:`flush` waits for it."""
        while len(self._writing) >= _WRITING:
            self._count_sent()
        self._writing.append(self._writers.submit(write, *arguments))

    def _write_pack(self, key: str, items: list[_Item], size: int) -> int:
        """The bytes that were sent: none if the pack is there."""
        if self._is_there(key, size):
            return 0
        pack = bytearray(size)
        for read in [self._readers.submit(self._read_run, run) for run in _runs(items)]:
            for item, data in read.result():
                pack[item.offset : item.offset + len(data)] = data
        self._target.objects.put(key, pack)
        return size

    def _is_there(self, key: str, size: int) -> bool:
        """Whether the target has the object; it then counts as just written, and no ``gc`` takes it away."""
        return self._target.objects.size(key) == size and self._target.objects.refresh(key)

    def _read_run(self, run: list[_Item]) -> list[tuple[_Item, bytes | memoryview]]:
        """Contents that lie close together, read at once; those that are not what they should be, once more."""
        first, last = run[0].place, run[-1].place
        start = first.offset
        view = memoryview(self._source.read_extent(Extent(first.object, start, last.offset + last.length - start)))
        found: list[tuple[_Item, bytes | memoryview]] = []
        for item in run:
            data: bytes | memoryview = view[item.place.offset - start : item.place.offset - start + item.place.length]
            if block_digest(data) != item.id:
                data = self._source.read_extent(item.place)
            if block_digest(data) != item.id:
                raise self._damaged(item.id, object_key(item.place.object))
            found.append((item, data))
        return found

    # Large contents

    def _large(self, file: File, prior: File | None) -> File:
        """A content of more than a block, stored but for the blocks that ``prior`` has at the same place."""
        digests = self._source.block_list(file)
        content = LargeContent(self._target, prior if prior is not None and prior.size > BLOCK else None)
        count = len(digests) // DIGEST_SIZE
        new = [block for block in range(count) if content.known(block) != _digest(digests, block)]
        size = sum(_length(file, block) for block in new)
        apart = size > BLOCK
        if apart:
            self._start(self._write_blob, file, digests, new, size)
        wanted = set(new)
        with contextlib.closing(self._blocks(file, digests, [] if apart else new)) as pieces:
            for block in range(count):
                if block not in wanted:
                    content.keep(_length(file, block))
                elif apart:
                    content.take_stored(_length(file, block), _digest(digests, block))
                else:
                    content.take(next(pieces), _digest(digests, block))
        extents, table = content.finish(self._lists)
        if not apart:
            self._count_bytes(size)
        return File("", file.size, False, file.id, extents, self._lists.add(digests), table=table)

    def _write_blob(self, file: File, digests: bytes, blocks: list[int], size: int) -> int:
        """Store ``blocks`` as one object, named by its bytes. The bytes that were sent: none if it is there."""
        key = object_key(OBJECT_BLOB + content_id(size, b"".join(_digest(digests, block) for block in blocks)))
        if self._is_there(key, size):
            return 0
        writer = self._target.objects.writer(key)
        offset = 0
        try:
            with contextlib.closing(self._blocks(file, digests, blocks)) as pieces:
                for data in pieces:
                    writer.write_at(offset, data)
                    offset += len(data)
            writer.commit(key)
        finally:
            writer.abort()
        return size

    def _blocks(self, file: File, digests: bytes, blocks: list[int]) -> Generator[memoryview]:
        """The bytes of ``blocks`` in order, checked, read ahead by the workers."""
        window: deque[Future[list[memoryview]]] = deque()
        try:
            for first, count in _segments(blocks):
                window.append(self._readers.submit(self._read_segment, file, digests, first, count))
                if len(window) > _AHEAD:
                    yield from window.popleft().result()
            while window:
                yield from window.popleft().result()
        finally:
            for future in window:
                future.cancel()

    def _read_segment(self, file: File, digests: bytes, first: int, count: int) -> list[memoryview]:
        source = self._source.source(file)
        start = first * BLOCK
        size = min((first + count) * BLOCK, file.size) - start
        view = memoryview(b"".join(source.fetch(start, size)))
        blocks = []
        for block in range(first, first + count):
            data = view[(block - first) * BLOCK : (block - first + 1) * BLOCK]
            if block_digest(data) != _digest(digests, block):
                data = memoryview(b"".join(source.fetch(block * BLOCK, _length(file, block))))
            if block_digest(data) != _digest(digests, block):
                raise self._damaged(file.id, f"block {block}")
            blocks.append(data)
        return blocks

    def _damaged(self, id: bytes, what: str) -> IntegrityError:
        where = f"content {id.hex()} of {self._where} ({what} in {self._source.url})"
        return IntegrityError(f"{where} is damaged, so it is not copied; run `artifactfs fsck`")

    # Counting, in the caller's thread

    def _count(self, files: int, size: int) -> None:
        self._progress.files += files
        self._progress.bytes += size
        self._tell()

    def _count_bytes(self, sent: int) -> None:
        self._progress.stored += sent
        self._tell()

    def _count_sent(self) -> None:
        """Wait for the oldest pack under way."""
        self._count_bytes(self._writing[0].result())
        self._writing.popleft()

    def _tell(self) -> None:
        if self._report is not None:
            self._report(self._progress)


def _runs(items: list[_Item]) -> Iterator[list[_Item]]:
    """``items`` in groups that lie close together in one object of the source."""
    run: list[_Item] = []
    for item in sorted(items, key=lambda item: (item.place.object, item.place.offset)):
        if run:
            first, last = run[0].place, run[-1].place
            near = item.place.offset <= last.offset + last.length + _GAP
            if item.place.object != first.object or not near or item.place.offset + item.place.length - first.offset > _RUN:
                yield run
                run = []
        run.append(item)
    if run:
        yield run


def _segments(blocks: list[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of runs of consecutive ``blocks``, of 4 MiB at most."""
    at = 0
    while at < len(blocks):
        count = 1
        while count < _SEGMENT // BLOCK and at + count < len(blocks) and blocks[at + count] == blocks[at] + count:
            count += 1
        yield blocks[at], count
        at += count


def _digest(digests: bytes, block: int) -> bytes:
    return digests[block * DIGEST_SIZE : (block + 1) * DIGEST_SIZE]


def _length(file: File, block: int) -> int:
    return min(BLOCK, file.size - block * BLOCK)
