"""The journal: an append-only file of records, each a list of deltas that take effect together or not at all.

The file starts with :data:`MAGIC`; a record is its payload's length and CRC-32 (4 bytes each, little endian), then the payload, a
msgpack array of deltas (:mod:`artifactfs.staging.nodes`). A record goes into the file by one ``write(2)`` before its operation
is acknowledged, so ``kill -9`` loses none; :meth:`Journal.sync` makes all so far survive power loss. What a dying machine left
half-written at the end fails its length or checksum and is dropped.

Threads: :meth:`append` is called under the stage's lock; :meth:`sync` without it, by any number of threads at once, which share
one ``fdatasync``.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import struct
import threading
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeAlias

import msgspec

from artifactfs.errors import IntegrityError, StoreFormatError

log = logging.getLogger(__name__)

Delta: TypeAlias = "tuple[Any, ...]"
"""An operation's letter and its arguments."""

MAGIC = b"AFSTAGE1"
_HEAD = struct.Struct("<II")
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[tuple[Any, ...]]).decode

_FULL = (errno.ENOSPC, errno.EDQUOT)
_RESERVE = 256 << 10
"""Bytes kept aside so that on a full disk there is still room to resume, and to record deletions, which make space."""


class Journal:
    """An open journal."""

    def __init__(self, directory: int, fd: int, size: int) -> None:
        self._directory = directory
        self._fd = fd
        self._size = size
        self._synced = size
        self._sync_lock = threading.Lock()
        self._broken = False
        self.before_sync: Callable[[], None] = lambda: None
        """Makes durable what records rely on."""
        self._refill()

    @classmethod
    def create(cls, directory: int, records: Callable[[], Iterable[list[Delta]]]) -> Journal:
        """Replace the journal in ``directory`` (a descriptor) by one of ``records``, durable and in one step."""
        try:
            fd, size = _replace(directory, records())
        except OSError as error:
            if error.errno not in _FULL:
                raise
            _drop_reserve(directory)
            fd, size = _replace(directory, records())
        return cls(directory, fd, size)

    def append(self, record: list[Delta], freeing: bool = False) -> None:
        """Add a record; once this returns it survives the process. Whatever fails (OSError), nothing of it stays.

        ``freeing`` says that the operation makes space: on a full disk it may use the reserve.
        """
        if self._broken:
            raise OSError(errno.EIO, "the journal failed earlier")
        data = _framed(record)
        try:
            self._write(data)
        except OSError as error:
            if error.errno not in _FULL or not freeing:
                raise
            _drop_reserve(self._directory)
            self._write(data)
            self._refill()

    def sync(self) -> None:
        """Return once every record appended before this call survives power loss."""
        self.before_sync()
        wanted = self._size
        with self._sync_lock:
            if self._synced >= wanted:
                return
            size = self._size
            try:
                os.fdatasync(self._fd)
            except OSError:
                self._broken = True  # the kernel has dropped the pages: a later sync would claim what is not so
                raise
            self._synced = size

    @property
    def size(self) -> int:
        """Bytes that were appended so far."""
        return self._size

    @property
    def durable(self) -> int:
        """How many of them survive power loss for certain."""
        return self._synced

    def close(self) -> None:
        """Close the file, synced if that is possible."""
        with contextlib.suppress(OSError):
            self.sync()
        os.close(self._fd)

    def _write(self, data: bytes) -> None:
        try:
            written = os.write(self._fd, data)
        except OSError:
            self._cut()
            raise
        if written != len(data):
            self._cut()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size += written

    def _cut(self) -> None:
        """Remove what a failed write may have left: records after it would be lost with it."""
        try:
            os.ftruncate(self._fd, self._size)
        except OSError:
            self._broken = True

    def _refill(self) -> None:
        """Have the reserve, if there is space for it."""
        try:
            fd = os.open("reserve", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=self._directory)
        except OSError:
            return
        try:
            os.posix_fallocate(fd, 0, _RESERVE)
        except OSError:
            _drop_reserve(self._directory)
        finally:
            os.close(fd)


def _replace(directory: int, records: Iterable[list[Delta]]) -> tuple[int, int]:
    """The descriptor and the size of a new journal."""
    fd = os.open("journal.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600, dir_fd=directory)
    try:
        size = _write_all(fd, MAGIC)
        for record in records:
            size += _write_all(fd, _framed(record))
        os.fsync(fd)
        os.rename("journal.new", "journal", src_dir_fd=directory, dst_dir_fd=directory)
        os.fsync(directory)
    except BaseException:
        os.close(fd)
        with contextlib.suppress(OSError):
            os.unlink("journal.new", dir_fd=directory)
        raise
    return fd, size


def _drop_reserve(directory: int) -> None:
    with contextlib.suppress(OSError):
        os.unlink("reserve", dir_fd=directory)


def replay(directory: int) -> Iterator[list[Delta]]:
    """The records of the journal in ``directory``, in order, without a torn tail.

    StoreFormatError for a file that is no journal. A tail that is dropped although more follows it, which no crash of a
    process explains, is kept as ``journal.damaged`` and logged.
    """
    fd = os.open("journal", os.O_RDONLY, dir_fd=directory)
    try:
        size = os.fstat(fd).st_size
        if os.pread(fd, len(MAGIC), 0) != MAGIC:
            raise StoreFormatError("the stage's journal is of another format or of a newer version of artifactfs; use that one")
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as data, memoryview(data) as view:
            end = yield from _records(view, size)
            if end < size:
                _report_tail(directory, view, end)
    finally:
        os.close(fd)


def _records(view: memoryview, size: int) -> Generator[list[Delta], None, int]:
    """The records that are whole; returns where they end."""
    at = len(MAGIC)
    while at + _HEAD.size <= size:
        length, checksum = _HEAD.unpack_from(view, at)
        start = at + _HEAD.size
        if not length or start + length > size:
            break
        with view[start : start + length] as payload:
            if zlib.crc32(payload) != checksum:
                break
            try:
                record = _decode(payload)
            except msgspec.DecodeError as error:
                raise IntegrityError(f"the stage's journal has a record that cannot be read: {error}") from None
        yield record
        at = start + length
    return at


def _report_tail(directory: int, view: memoryview, end: int) -> None:
    """Say what is dropped; keep it if it is more than one record that a crash cut short."""
    size = len(view)
    whole = end + _HEAD.size <= size and end + _HEAD.size + _HEAD.unpack_from(view, end)[0] < size
    log.warning("the journal's last %d bytes are incomplete and are dropped", size - end)
    if whole:
        fd = os.open("journal.damaged", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600, dir_fd=directory)
        with open(fd, "wb") as file:
            file.write(view)


def _framed(record: list[Delta]) -> bytes:
    payload = _encode(record)
    return _HEAD.pack(len(payload), zlib.crc32(payload)) + payload


def _write_all(fd: int, data: bytes) -> int:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return len(data)
