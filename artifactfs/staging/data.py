"""The data files of a stage, and files that lie partly in one and partly in the store.

``data/<number>`` is an ordinary sparse file. While a stage's file is open there is one :class:`OpenFile` for it, however many
handles it has. Its :class:`Layout` says where each byte is: what is below ``visible`` and in no local block is in the stored
content underneath, everything else is in the data file. A layout is never changed but replaced, so that readers take it
without a lock; only its set of local blocks grows, and a block joins it after its bytes are in the data file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from artifactfs.model import BLOCK, File, Ref
from artifactfs.reader import Handle, Reader
from artifactfs.staging.journal import Journal
from artifactfs.staging.nodes import FileNode, os_error

_libc = ctypes.CDLL(None, use_errno=True)

_MANY = 256
_MUCH = 64 << 20
"""Doomed files, and bytes of them, for which the journal is made durable: 2 ms, so that removing many is not slowed down."""
_LITTLE = 256 << 20
"""Free bytes below which space is given back at once."""

_PAGE = os.sysconf("SC_PAGE_SIZE")
_REQUEST = 128 << 10


class DataFile:
    """An open data file; closed when nobody refers to it any more, so that a reader's descriptor is never another file's."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class DataDir:
    """The directory ``data``."""

    def __init__(self, stage: int, path: str) -> None:
        """``stage`` is a descriptor of the stage's directory, ``path`` its path."""
        with contextlib.suppress(FileExistsError):
            os.mkdir("data", 0o700, dir_fd=stage)
        self._fd = os.open("data", os.O_RDONLY | os.O_DIRECTORY, dir_fd=stage)
        self._path = path

    def create(self, number: int) -> DataFile:
        return DataFile(os.open(str(number), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self._fd))

    def open(self, number: int) -> DataFile:
        return DataFile(os.open(str(number), os.O_RDWR, dir_fd=self._fd))

    def path(self, number: int) -> str:
        return f"{self._path}/data/{number}"

    def stat(self, number: int) -> os.stat_result:
        return os.stat(str(number), dir_fd=self._fd)

    def utime(self, number: int, atime: int, mtime: int) -> None:
        os.utime(str(number), ns=(atime, mtime), dir_fd=self._fd)

    def remove(self, number: int) -> None:
        """Remove a data file; missing is no error."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(str(number), dir_fd=self._fd)

    def numbers(self) -> set[int]:
        return {int(name) for name in os.listdir(self._fd) if name.isdecimal()}

    def free(self) -> int:
        """Bytes free on the disk."""
        found = os.fstatvfs(self._fd)
        return found.f_bavail * found.f_frsize

    def sync(self) -> None:
        """Make the names of the data files durable."""
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)
        self._fd = -1


class Doomed:
    """Data files that nobody needs any more. They are removed once the journal that says so is durable: else power loss could
    bring back what needs them. Threads may share it."""

    def __init__(self, data: DataDir, journal: Journal) -> None:
        self._data = data
        self._journal = journal
        self._waiting: deque[tuple[int, int]] = deque()
        self._bytes = 0

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, number: int) -> None:
        """Remove the data file when everything that is in the journal now is durable. Under the stage's lock."""
        with contextlib.suppress(OSError):
            self._bytes += self._data.stat(number).st_blocks * 512
        self._waiting.append((self._journal.size, number))

    def bury(self, all: bool = False) -> None:
        """Remove what can be; without a lock, as it may take long for large files. When there is much to remove or little space,
        or ``all`` is to be, the journal is made durable for that."""
        if all or len(self._waiting) >= _MANY or self._bytes >= _MUCH or self._data.free() < _LITTLE:
            with contextlib.suppress(OSError):
                self._journal.sync()
        durable = self._journal.durable
        while self._waiting:
            try:
                item = self._waiting.popleft()
            except IndexError:
                return
            if item[0] > durable:
                self._waiting.appendleft(item)
                return
            self._data.remove(item[1])
        self._bytes = 0


class Below:
    """The stored content under a file, opened when first read. Threads may share it."""

    def __init__(self, reader: Reader, entry: File | Ref, where: str) -> None:
        self._reader = reader
        self._entry = entry
        self._where = where
        self._lock = threading.Lock()
        self._handle: Handle | None = None

    def read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes at ``offset``."""
        handle = self._handle or self._open()
        data = handle.read(offset, size)
        while len(data) < size:
            more = handle.read(offset + len(data), size - len(data))
            if not more:
                raise OSError(errno.EIO, f"{self._where} in the base version ends before its size")
            data += more
        return data

    def close(self) -> None:
        with self._lock:
            if self._handle is not None:
                self._handle.close()
                self._handle = None

    def _open(self) -> Handle:
        with self._lock:
            if self._handle is None:
                self._handle = self._reader.open(self._entry, self._where)
            return self._handle


class Layout(NamedTuple):
    """Where the bytes of a file are. ``data`` None: nothing is local. ``local`` None: everything is."""

    data: DataFile | None
    below: Below | None
    visible: int
    local: set[int] | None

    def is_local(self, block: int) -> bool:
        return self.local is None or block in self.local or block * BLOCK >= self.visible

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``, fewer only at the end of the file."""
        end = min(offset + size, self.visible if self.data is None else os.fstat(self.data.fd).st_size)
        pieces: list[bytes] = []
        for start, stop, local in self._runs(offset, end):
            pieces.append(self._piece(start, stop, local))
            if len(pieces[-1]) < stop - start:
                break  # truncated meanwhile: what follows is not there either
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _runs(self, offset: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """(start, stop, whether it is in the data file) of the runs from one source that make up a range."""
        while offset < end:
            local = self.is_local(offset // BLOCK)
            stop = min(end, (offset // BLOCK + 1) * BLOCK)
            while stop < end and self.is_local(stop // BLOCK) == local:
                stop = min(end, stop + BLOCK)
            if not local and offset < self.visible < stop:
                stop = self.visible
            elif not local and offset >= self.visible:
                local = True
            yield offset, stop, local
            offset = stop

    def _piece(self, start: int, stop: int, local: bool) -> bytes:
        if local or self.below is None:
            return b"" if self.data is None else read_exactly(self.data.fd, stop - start, start)
        return self.below.read(start, stop - start)


class OpenFile:
    """A file while it is open. ``lock`` is held to change the content, and while blocks are fetched for that.

    ``layout`` is None until the file is prepared. ``direct`` is the data file, where all content is in it and writing needs no
    record. ``retired`` are stored contents that the file no longer lies over, and that a reader may still use. ``last`` is the
    offset and the size of the last write.
    """

    __slots__ = ("count", "direct", "last", "layout", "lock", "node", "retired", "where")

    def __init__(self, node: FileNode, where: str) -> None:
        self.node = node
        self.where = where
        self.lock = threading.Lock()
        self.count = 0
        self.direct: DataFile | None = None
        self.layout: Layout | None = None
        self.retired: list[Below | None] = []
        self.last = 0, 0

    def rest(self) -> int | None:
        """Where the last write may go on: Linux hands one write(2) over in parts, each of at most 128 KiB, and the first of
        which ends with the page that it begins in, if that page is not in memory (``fuse_fill_write_pages`` in fs/fuse/file.c).
        """
        offset, size = self.last
        end = offset + size
        return end if end % _PAGE == 0 and (offset % _PAGE or size >= _REQUEST) else None

    def arrange(self, data: DataFile | None, below: Below | None) -> None:
        """Take the layout from what the node says."""
        node = self.node
        self.layout = Layout(data, below, node.visible, node.local)
        self.direct = data if node.entry is None else None


def read_exactly(fd: int, size: int, offset: int) -> bytes:
    """``size`` bytes, fewer only at the end of the file."""
    data = os.pread(fd, size, offset)
    while len(data) < size:
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def write_all(fd: int, data: bytes | memoryview, offset: int) -> int:
    """The bytes of ``data`` written at ``offset``: fewer than there are only if an error came after the first."""
    written = os.pwrite(fd, data, offset)
    if written == len(data):
        return written
    view = memoryview(data)
    while written < len(view):
        try:
            written += os.pwrite(fd, view[written:], offset + written)
        except OSError:
            break
    return written


def reserve(fd: int, offset: int, length: int) -> None:
    """fallocate(2), which posix_fallocate would emulate by writing where the disk has it not: EOPNOTSUPP."""
    call = getattr(_libc, "fallocate64", None)
    if call is None:
        raise os_error(errno.EOPNOTSUPP)
    while call(fd, 0, ctypes.c_int64(offset), ctypes.c_int64(length)) == -1:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise os_error(code)


def holes(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The (start, end) of the ranges between ``start`` and ``end`` that the file has no bytes for."""
    while start < end:
        try:
            data = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            data = end
        if data > start:
            yield start, min(data, end)
        if data >= end:
            return
        start = os.lseek(fd, data, os.SEEK_HOLE)
