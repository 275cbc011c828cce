"""Open files of a stage: reading and changing what is in them, with as little of the base copied as the change needs.

A base file that is written gets a data file at its first write, and in it only the blocks that are touched: a block of which a
write leaves visible bytes is fetched first; the bytes go into the data file and then the block into the journal, so that a
crash in between leaves the base's. A truncation hides what is beyond it. One to nothing leaves the base alone: the file gets
a new, empty data file.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from artifactfs.model import BLOCK, File, Ref
from artifactfs.reader import Reader
from artifactfs.staging.data import Below, DataDir, DataFile, Layout, OpenFile, reserve, write_all
from artifactfs.staging.ledger import Ledger
from artifactfs.staging.nodes import NOT_CUTTING, UNKNOWN, FileNode, decode_early, now, os_error

_R = TypeVar("_R")

_REST_WAIT = 0.05
"""Seconds that a commit waits for the rest of write(2) calls of which it has seen the first part."""


class Stat(NamedTuple):
    """What changes with a file's content; ``blocks`` are of 512 bytes, times in ns."""

    size: int
    blocks: int
    mtime: int
    ctime: int


class Files:
    """The open files, by handle. Locks as in :mod:`artifactfs.staging.stage`."""

    def __init__(self, ledger: Ledger, data: DataDir, reader: Reader) -> None:
        self._ledger = ledger
        self._data = data
        self.reader = reader
        self._handles: dict[int, tuple[OpenFile, bool]] = {}
        self._numbers = itertools.count(1)
        self._open: set[OpenFile] = set()
        self._replacing: set[FileNode] = set()
        self._replacing_lock = threading.Lock()
        ledger.journal.before_sync = self._sync_replaced
        self.closed: Callable[[FileNode], None] = lambda node: None
        """Told of each file whose content was changed when nobody has it open any more, with the lock held."""
        self._settled = False
        self.activity = 0
        """Counts writes, so that work in the background can give way."""

    # Handles

    def acquire(self, node: FileNode, where: str) -> OpenFile:
        """The open file of ``node``, to be given back by :meth:`drop`; ``where`` is for messages. Call it with the lock."""
        file: OpenFile | None = node.open
        if file is None:
            file = node.open = OpenFile(node, where)
            self._open.add(file)
        file.count += 1
        return file

    def drop(self, file: OpenFile) -> None:
        unused: list[Below | None] = []
        with self._ledger.lock:
            file.count -= 1
            if not file.count:
                unused = self._close(file)
        for below in unused:
            if below is not None:
                below.close()

    def add_handle(self, file: OpenFile, writable: bool) -> int:
        if writable:
            self._expect_change(file.node)
        fh = next(self._numbers)
        self._handles[fh] = (file, writable)
        return fh

    def handle(self, fh: int) -> OpenFile:
        try:
            return self._handles[fh][0]
        except KeyError:
            raise os_error(errno.EBADF) from None

    def release(self, fh: int) -> None:
        handle = self._handles.pop(fh, None)
        if handle is not None:
            self.drop(handle[0])

    def prepare(self, file: OpenFile) -> None:
        """Open what an acquired file needs. Call it without the lock."""
        if file.layout is None:
            with file.lock:
                if file.layout is None:
                    node = file.node
                    self._arrange(file, self._data.open(node.data) if node.data else None)

    def close(self) -> None:
        """Give every handle back."""
        for fh in list(self._handles):
            self.release(fh)

    # Content

    def read(self, fh: int, size: int, offset: int) -> bytes:
        try:
            file = self._handles[fh][0]
        except KeyError:
            raise os_error(errno.EBADF) from None
        direct = file.direct
        return os.pread(direct.fd, size, offset) if direct is not None else layout_of(file).read(offset, size)

    def write(self, fh: int, data: bytes, offset: int) -> int:
        try:
            file, writable = self._handles[fh]
        except KeyError:
            raise os_error(errno.EBADF) from None
        if not writable:
            raise os_error(errno.EBADF)
        self.activity += 1
        with file.lock:
            direct = file.direct
            if direct is not None and not self._ledger.careful:
                file.last = offset, len(data)
                return write_all(direct.fd, data, offset)
        return self._changing(file, lambda: self._write(file, data, offset), rest=offset)

    def resize(self, file: OpenFile, size: int) -> None:
        """Truncate a prepared file, or extend it with zeros."""
        if size < 0:
            raise os_error(errno.EINVAL)
        self._expect_change(file.node)
        self._changing(file, lambda: self._resize(file, size))

    def allocate(self, fh: int, offset: int, length: int) -> None:
        """Have space for a range, with zeros in what is beyond the end; where the disk cannot reserve any, EOPNOTSUPP."""
        file = self.handle(fh)
        if not self._handles[fh][1]:
            raise os_error(errno.EBADF)
        self._expect_change(file.node)
        self._changing(file, lambda: reserve((file.direct or self._own_data(file)).fd, offset, length))

    def sync(self, fh: int, datasync: bool) -> None:
        """Make the file's content durable."""
        file = self.handle(fh)
        data = layout_of(file).data
        if data is None:
            return
        node = file.node
        noted = node.fresh and set(node.fresh)
        (os.fdatasync if datasync else os.fsync)(data.fd)
        if not node.durable:
            self._data.sync()
            node.durable = True
        if noted and node.nlink:
            self._ledger.note(("y", node.ino, list(noted)))

    def replaced(self, node: FileNode) -> None:
        """The file has taken the name of another one: it must not be seen there without its content. Call it with the lock."""
        if node.data:
            self._replacing.add(node)

    def write_back(self, node: FileNode) -> None:
        """Have the kernel begin to write the content to the disk, so that it is there when the journal is."""
        with contextlib.suppress(OSError):
            file = self._data.open(node.data)
            os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def localise(self, file: OpenFile, blocks: Iterable[int]) -> None:
        """Bring blocks of the base into the data file. They do not count as changed."""
        with file.lock:
            layout = layout_of(file)
            assert layout.data is not None
            before = os.fstat(layout.data.fd)
            for block in blocks:
                if not layout.is_local(block):
                    self._fetch(layout.data, layout, block)
                    self._ledger.note(("l", file.node.ino, block))
            os.utime(layout.data.fd, ns=(before.st_atime_ns, before.st_mtime_ns))

    def settle(self) -> None:
        """With the gate closed: return once no change of content is under way, and none that the kernel has cut in parts."""
        with self._ledger.lock:
            files = list(self._open)
        deadline = time.monotonic() + _REST_WAIT
        while any(file.rest() is not None for file in files) and time.monotonic() < deadline:
            time.sleep(0.001)
        self._settled = True
        for file in files:
            with file.lock:
                file.last = 0, 0  # if more had been to come, it would have come

    def unsettle(self) -> None:
        """Before the gate opens."""
        self._settled = False

    def rearrange(self) -> None:
        """With the gate closed and settled: take the layouts from what a commit has made of the nodes."""
        with self._ledger.lock:
            for file in self._open:
                if file.layout is not None:
                    file.retired.append(file.layout.below)
                    self._arrange(file, file.layout.data)

    def stat(self, node: FileNode) -> Stat:
        """Call it with the lock."""
        file: OpenFile | None = node.open
        if not node.data:
            return Stat(node.visible, -(-node.visible // 512), node.mtime, node.ctime)
        if file is not None and file.layout is not None and file.layout.data is not None:
            return self._stat(node, os.fstat(file.layout.data.fd))
        if node.size == UNKNOWN:
            self._keep_stat(node, self._stat(node, self._data.stat(node.data)))
        return Stat(node.size, node.blocks, node.mtime, node.ctime)

    def reference_size(self, entry: Ref) -> int:
        """The size of a reference that does not say it, asked where it points to."""
        return self.reader.size(entry)

    def data_stat(self, node: FileNode) -> os.stat_result:
        """What the file's data file says of itself."""
        return self._data.stat(node.data)

    def early(self, node: FileNode) -> File | None:
        """What the file's content was stored as ahead of a commit, if it has not changed since."""
        if not node.early:
            return None
        early = decode_early(node.early)
        found = self.data_stat(node)
        same = (early.data, early.ctime, early.file.size) == (node.data, found.st_ctime_ns, found.st_size)
        return early.file if same else None

    def set_times(self, node: FileNode, atime: int, mtime: int) -> None:
        """Set those of the data file. Call it with the lock."""
        self._data.utime(node.data, atime, mtime)
        if node.early is not None:
            node.early = None
            if node.open is None:
                self.closed(node)

    def path_of(self, node: FileNode) -> str:
        return self._data.path(node.data)

    def below(self, node: FileNode, where: str) -> Below | None:
        return None if node.entry is None else Below(self.reader, node.entry, where)

    # Internals

    def _expect_change(self, node: FileNode) -> None:
        """What was stored of the file ahead of a commit may soon be old."""
        if node.early is not None:
            with self._ledger.lock:
                node.early = None

    def _sync_replaced(self) -> None:
        """Make the content durable of everything that has replaced something, before the names are."""
        with self._replacing_lock:
            with self._ledger.lock:
                nodes, self._replacing = self._replacing, set()
            if not nodes:
                return
            try:
                for node in nodes:
                    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                        file = self._data.open(node.data)
                        os.fdatasync(file.fd)
                self._data.sync()
            except BaseException:
                with self._ledger.lock:
                    self._replacing |= nodes
                raise

    def _close(self, file: OpenFile) -> list[Below | None]:
        """The last handle is gone."""
        node = file.node
        layout = file.layout
        if layout is not None and layout.data is not None and node.nlink:
            self._keep_stat(node, self._stat(node, os.fstat(layout.data.fd)))
            if node.early is None and node.differs(node.size):
                self.closed(node)
        node.open = None
        file.layout = file.direct = None
        self._open.discard(file)
        if not node.nlink:
            self._ledger.forget(node)
        return [layout.below, *file.retired] if layout is not None else []

    def _stat(self, node: FileNode, found: os.stat_result) -> Stat:
        blocks = found.st_blocks if node.entry is None else -(-found.st_size // 512)
        return Stat(found.st_size, blocks, found.st_mtime_ns, max(node.ctime, found.st_ctime_ns))

    def _keep_stat(self, node: FileNode, found: Stat) -> None:
        node.size, node.blocks, node.mtime, node.ctime = found

    def _arrange(self, file: OpenFile, data: DataFile | None) -> None:
        file.arrange(data, self.below(file.node, file.where))

    def _changing(self, file: OpenFile, change: Callable[[], _R], rest: int | None = None) -> _R:
        """``change`` with the file's lock, once the gate is open, or before if it is the ``rest`` of a write from there on."""
        while True:
            with file.lock:
                if not self._ledger.gated or (rest is not None and rest == file.rest() and not self._settled):
                    if self._ledger.careful:
                        self._ledger.touch()
                    if file.node.cutting != NOT_CUTTING:
                        self._finish_cut(file)
                    return change()
            self._ledger.await_gate()

    def _write(self, file: OpenFile, data: bytes, offset: int) -> int:
        file.last = offset, len(data)
        if file.direct is not None:
            return write_all(file.direct.fd, data, offset)
        target = self._own_data(file)
        layout = layout_of(file)
        end = offset + len(data)
        tracked = [block for block in _blocks(offset, end) if block * BLOCK < layout.visible]
        missing = [block for block in tracked if not layout.is_local(block)]
        self._mark(file.node, [block for block in tracked if layout.is_local(block)])
        for block in missing:
            if not _covers(offset, end, block, layout.visible):
                self._fetch(target, layout, block)
        written = write_all(target.fd, data, offset)
        if written < len(data):
            missing = [block for block in missing if _covers(0, offset + written, block, layout.visible)]
            written = self._whole(written, offset, layout, missing)
        self._mark(file.node, missing)
        return written

    def _whole(self, written: int, offset: int, layout: Layout, kept: list[int]) -> int:
        """How much of a write that a full disk cut short counts: not what is in a block that stays the base's."""
        for block in _blocks(offset, offset + written):
            if block * BLOCK < layout.visible and not layout.is_local(block) and block not in kept:
                written = max(block * BLOCK - offset, 0)
                break
        if not written:
            raise os_error(errno.ENOSPC)
        return written

    def _mark(self, node: FileNode, blocks: list[int]) -> None:
        """Record that ``blocks`` are local and changed, unless they are known to be."""
        local = node.local
        new = [block for block in blocks if block not in node.dirty or (local is not None and block not in local)]
        if new:
            self._ledger.change(node, ("k", node.ino, new))

    def _fetch(self, target: DataFile, layout: Layout, block: int) -> None:
        """Put the base's visible bytes of ``block`` into the data file."""
        assert layout.below is not None
        start = block * BLOCK
        data = layout.below.read(start, min(BLOCK, layout.visible - start))
        if write_all(target.fd, data, start) < len(data):
            raise os_error(errno.ENOSPC)

    def _own_data(self, file: OpenFile) -> DataFile:
        """The file's data file, which it gets if it has none: empty, but as long as the content."""
        layout = layout_of(file)
        if layout.data is not None:
            return layout.data
        node = file.node
        number = self._ledger.new_number()
        data = self._data.create(number)
        try:
            os.ftruncate(data.fd, node.visible)
            os.utime(data.fd, ns=(node.atime, node.mtime))
            self._ledger.change(node, ("f", node.ino, number, node.visible))
        except BaseException:
            self._data.remove(number)
            raise
        file.arrange(data, layout.below)
        return data

    def _resize(self, file: OpenFile, size: int) -> None:
        layout = layout_of(file)
        node = file.node
        if file.direct is not None:
            os.ftruncate(file.direct.fd, size)
        elif size == 0:
            self._empty(file)
        elif size >= layout.visible:
            os.ftruncate(self._own_data(file).fd, size)
        else:
            self._own_data(file)
            self._ledger.change(node, ("u", node.ino, size))
            self._finish_cut(file)

    def _finish_cut(self, file: OpenFile) -> None:
        """The rest of a truncation that is recorded; nothing else may change the content before."""
        node = file.node
        layout = layout_of(file)
        data = self._own_data(file)
        os.ftruncate(data.fd, node.cutting)
        os.fdatasync(data.fd)  # else power loss may undo this, but not that the base is hidden from here on
        file.arrange(data, layout.below)
        self._ledger.change(node, ("v", node.ino), freeing=True)

    def _empty(self, file: OpenFile) -> None:
        """Let go of the base: the content is in a new data file."""
        node = file.node
        layout = layout_of(file)
        old = node.data
        number = self._ledger.new_number()
        data = self._data.create(number)
        try:
            self._ledger.change(node, ("o", node.ino, number), ("c", node.ino, now()), freeing=True)
        except BaseException:
            self._data.remove(number)
            raise
        file.retired.append(layout.below)
        file.arrange(data, None)
        if old:
            self._ledger.doom(old)


def layout_of(file: OpenFile) -> Layout:
    """The layout of a prepared file."""
    assert file.layout is not None
    return file.layout


def _blocks(offset: int, end: int) -> range:
    return range(offset // BLOCK, -(-end // BLOCK))


def _covers(offset: int, end: int, block: int, visible: int) -> bool:
    """Whether a write of that range leaves no visible byte of ``block``."""
    return offset <= block * BLOCK and end >= min((block + 1) * BLOCK, visible)
