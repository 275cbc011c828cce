"""The cache's directories and block files: opening, writing, checking, listing. The format stands in :mod:`artifactfs.cache`.

Names are only ever resolved below open directories, one part at a time and never through a symbolic link, so that nothing
planted in the cache leads out of it. Functions raise OSError as the system gives it.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

from blake3 import blake3

from artifactfs.content import DIGEST_SIZE, block_digest
from artifactfs.errors import NotPermittedError
from artifactfs.model import BLOCK

Data: TypeAlias = "bytes | bytearray | memoryview"

LAYOUT = "v1"
SEAL_CONTEXT = "artifactfs 2026-11 cache block v1"
SEAL = 32
LIST = -1
"""The block number of a block list."""
LIST_NAME = "list"

_LIST_NUMBER = 2**64 - 1
_DISK_SHARE = 20  # the last twentieth of the disk is not ours: others fail before us when it is used up
_VERIFY_SECONDS = 1.0  # time for a writer to end what looks torn

_SAFE = os.O_CLOEXEC | os.O_NOFOLLOW
_READ = os.O_RDONLY | os.O_NONBLOCK | _SAFE  # not blocking, or a planted pipe would hang us
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFE
_UPDATE = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | _SAFE
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | _SAFE
_NO_ATIME: int = getattr(os, "O_NOATIME", 0)


class Fd:
    """An open descriptor, closed when the last reference to this object goes: hold the object while its number is in use."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self, close=os.close) -> None:  # type: ignore[no-untyped-def]  # bound: ``os`` may be gone at exit
        close(self.number)


class Place(NamedTuple):
    """Where a file lies: below ``large/`` or ``small/``, in ``directory``, as ``name``; without a name, the directory."""

    large: bool
    directory: str
    name: str


class Block(NamedTuple):
    """A block (with :data:`LIST` as ``number``: the block list) of the content ``key``, and where it lies."""

    place: Place
    key: bytes
    number: int
    length: int

    def seal(self, digest: bytes) -> bytes:
        """What follows data of this BLAKE3 in the file, so that the file passes for no other block."""
        number = _LIST_NUMBER if self.number == LIST else self.number
        return blake3(struct.pack("<32sQ32s", self.key, number, digest), derive_key_context=SEAL_CONTEXT).digest()


class Found(NamedTuple):
    """A file or directory of the cache as a scan saw it."""

    place: Place
    info: os.stat_result

    @property
    def allocated(self) -> int:
        """The bytes it occupies on disk."""
        return self.info.st_blocks * 512


class Tree:
    """The directories of a cache, held open. Threads may share one."""

    def __init__(self, root: Path, create: bool) -> None:
        """Opens the cache at ``root``, making what is missing only with ``create``.

        FileNotFoundError if there is none; NotPermittedError if it belongs to another user.
        """
        if create:
            os.makedirs(root, 0o700, exist_ok=True)
        self.path = root / LAYOUT
        self._root = Fd(os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        _check_owner(root, self._root)
        self.top = open_directory(LAYOUT, self._root, create)
        _check_owner(self.path, self.top)
        if stat.S_IMODE(os.fstat(self.top.number).st_mode) & 0o077:
            os.chmod(self.top.number, 0o700)
        self._small = open_directory("small", self.top, create=True)
        self._large = open_directory("large", self.top, create=True)
        self._unit = max(4096, os.fstatvfs(self.top.number).f_frsize)

    def current(self) -> bool:
        """Whether the path still leads to what is open here."""
        try:
            now = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return False
        top, small, large = (os.fstat(fd.number) for fd in (self.top, self._small, self._large))
        return os.path.samestat(now, top) and bool(small.st_nlink and large.st_nlink)

    def open_directory(self, place: Place, create: bool = False) -> Fd:
        """The directory that holds ``place``'s file."""
        parent = self._large if place.large else self._small
        return open_directory(place.directory, parent, create) if place.directory else parent

    def stat(self, place: Place) -> os.stat_result | None:
        """None if there is no such file."""
        try:
            directory = self.open_directory(place)
            return os.stat(place.name, dir_fd=directory.number, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def remove(self, place: Place) -> bool:
        """Remove a file, or an empty directory. False if it is not there, not empty, or a directory that passes for a file."""
        try:
            if place.name:
                directory = self.open_directory(place)
                os.unlink(place.name, dir_fd=directory.number)
            else:
                parent = self._large if place.large else self._small
                os.rmdir(place.directory, dir_fd=parent.number)
        except OSError as error:
            if place.name and not isinstance(error, (FileNotFoundError, IsADirectoryError)):
                raise
            return False
        return True

    def walk(self) -> Iterator[Found]:
        """Every directory and file of contents, a directory before its files. What is removed meanwhile may be missing."""
        for large, parent in ((False, self._small), (True, self._large)):
            yield Found(Place(large, "", ""), os.fstat(parent.number))
            for entry, info in scan(".", parent):
                if not stat.S_ISDIR(info.st_mode):
                    yield Found(Place(large, "", entry), info)
                    continue
                yield Found(Place(large, entry, ""), info)
                for name, file in scan(entry, parent):
                    yield Found(Place(large, entry, name), file)

    def of_key(self, key: str) -> list[Found]:
        """The files of the content ``key`` (hex)."""
        small = Place(False, key[0], key)
        info = self.stat(small)
        found = [Found(small, info)] if info is not None else []
        return found + [Found(Place(True, key, name), file) for name, file in scan(key, self._large)]

    def cost(self, size: int) -> int:
        """At least what a new file of ``size`` bytes and its name take of the disk."""
        # A name takes up to 150 bytes of its directory; a fragmented MiB one more block for its list of extents.
        return -(-size // self._unit) * self._unit + 256 + (size >> 8)

    def weight(self, found: Found) -> int:
        """The bytes that ``found`` counts against the limit: at least what it occupies."""
        allocated = found.info.st_blocks * 512
        if not found.place.name:
            return allocated
        # Delayed allocation and compression may show less than was paid; a sparse giant is not one of our files.
        cost = self.cost(min(found.info.st_size, BLOCK + SEAL))
        return cost if cost > allocated else allocated

    def overhead(self) -> int:
        """The bytes allocated for everything that :meth:`walk` does not find."""
        blocks = os.fstat(self._root.number).st_blocks + os.fstat(self.top.number).st_blocks
        for directory in (".", "writers"):
            blocks += sum(info.st_blocks for name, info in scan(directory, self.top) if name not in ("small", "large"))
        return blocks * 512

    def disk_shortage(self, cost: int) -> int:
        """The bytes that must become free on the disk before ``cost`` more may be used; 0 if there is room."""
        vfs = os.fstatvfs(self.top.number)
        return max(0, (vfs.f_blocks // _DISK_SHARE - vfs.f_bavail) * vfs.f_frsize + cost)


def _check_owner(path: Path, directory: Fd) -> None:
    """NotPermittedError unless the directory, and the symbolic link that led to it if any, belong to the user."""
    user = os.geteuid()
    link = os.lstat(path)
    if os.fstat(directory.number).st_uid != user or (stat.S_ISLNK(link.st_mode) and link.st_uid not in (user, 0)):
        raise NotPermittedError(f"{path} belongs to another user; set ARTIFACTFS_CACHE_DIR to a directory of your own")


def open_directory(name: str, parent: Fd, create: bool) -> Fd:
    """The directory ``name`` in ``parent``, made if need be (and ``create``) for the user alone."""
    if create:
        with contextlib.suppress(FileNotFoundError):
            return Fd(os.open(name, _DIRECTORY, dir_fd=parent.number))
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=parent.number)
    return Fd(os.open(name, _DIRECTORY, dir_fd=parent.number))


def open_update(name: str, parent: Fd, new: bool = False) -> Fd:
    """A bookkeeping file, made empty if need be. FileExistsError if it is there already and must be ``new``."""
    return Fd(os.open(name, _UPDATE | (os.O_EXCL if new else 0), 0o600, dir_fd=parent.number))


def open_read(name: str, parent: Fd, flags: int = 0) -> Fd:
    return Fd(os.open(name, _READ | flags, dir_fd=parent.number))


def scan(name: str, parent: Fd) -> Iterator[tuple[str, os.stat_result]]:
    """The entries of a directory; none if there is no such directory."""
    try:
        # Opened anew, because descriptors of one opening share one position.
        directory = open_directory(name, parent, create=False)
    except FileNotFoundError:
        return
    with os.scandir(directory.number) as entries:
        for entry in entries:
            try:
                info = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            yield entry.name, info


def write_block(name: str, directory: Fd, data: Data, seal: bytes) -> bool:
    """Write a block file. False if one of its length is there already; any other is replaced: its writer died, or loses."""
    file = None
    while file is None:
        try:
            file = Fd(os.open(name, _CREATE, 0o600, dir_fd=directory.number))
        except FileExistsError:
            if _has_length(name, directory, len(data) + len(seal)):
                return False
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory.number)
    try:
        written = os.writev(file.number, (data, seal))
        if written < len(data) + len(seal):  # the disk is full, or about to say so
            rest = memoryview(bytes(data) + seal)[written:]
            while rest:
                rest = rest[os.write(file.number, rest) :]
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=directory.number)
        raise
    return True


def _has_length(name: str, directory: Fd, length: int) -> bool:
    try:
        info = os.stat(name, dir_fd=directory.number, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(info.st_mode) and info.st_size == length


def has_block(block: Block, directory: Fd) -> bool:
    """Whether a file of the right length is there."""
    return _has_length(block.place.name, directory, block.length + SEAL)


def identity(place: Place) -> tuple[str, int]:
    """Key in hex and block number by the name of a file; number 0 where the name is none of ours."""
    if not place.large:
        return place.name, 0
    if place.name == LIST_NAME:
        return place.directory, LIST
    with contextlib.suppress(ValueError):
        number = int(place.name, 16)
        if f"{number:x}" == place.name:
            return place.directory, number
    return f"{place.directory}/{place.name}", 0


def verify(tree: Tree, place: Place) -> str:
    """What is wrong with a file; "" if nothing, or if it is gone. What is being written gets time to become whole."""
    key, number = identity(place)
    if not _is_key(key) or place.directory != (key if place.large else key[0]):
        return "is no file of this cache"
    deadline = time.monotonic() + _VERIFY_SECONDS
    before = tree.stat(place)
    while before is not None:
        reason = _verify_once(tree, Block(place, bytes.fromhex(key), number, before.st_size - SEAL))
        fresh = abs(time.time_ns() - before.st_mtime_ns) < _VERIFY_SECONDS * 10**9
        if not reason or not fresh or time.monotonic() > deadline:
            return reason
        time.sleep(0.02)
        now = tree.stat(place)
        if now is not None and _stamp(now) == _stamp(before):
            return reason
        before = now
    return ""


def _stamp(info: os.stat_result) -> tuple[int, int, int]:
    return info.st_ino, info.st_mtime_ns, info.st_size


def _is_key(text: str) -> bool:
    return len(text) == 2 * DIGEST_SIZE and set(text) <= set("0123456789abcdef")


def _verify_once(tree: Tree, block: Block) -> str:
    if block.length <= 0 or (block.length > BLOCK and block.number != LIST):
        return f"has a wrong length ({block.length + SEAL} bytes)"
    try:
        directory = tree.open_directory(block.place)
        file = _open_quietly(block.place.name, directory)
        data = os.pread(file.number, block.length, 0)
        seal = os.pread(file.number, SEAL, block.length)
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "" if seal == block.seal(block_digest(data)) else "failed its check"


def _open_quietly(name: str, directory: Fd) -> Fd:
    """Open for reading without changing the time of last use, where the system allows it."""
    try:
        return open_read(name, directory, _NO_ATIME)
    except PermissionError:
        return open_read(name, directory)
