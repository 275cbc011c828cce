"""The block cache on disk: blocks of remote contents, shared by every thread and process of a user, bounded, never wrong.

On disk
    One file holds one block, so that the directory is the presence map, a block comes and goes with one system call, no byte
    of a stored file ever changes, and the limit holds for a content larger than it without punching holes (not every system
    can, and a reader could take the hole for data). Everything is below ``<root>/v1``; another layout would have another name::

        <root>/v1/                      0700, the user's own, or the cache is not used
            small/<h>/<key>             a content of at most one block; <key> in hex, <h> its first digit
            large/<key>/<block>         one block of a larger content; <block> is its number in hex
            large/<key>/list            its block list
            ledger                      magic (8), boot id (16), used (8), granted (8), BLAKE3 of these (16)
            writers/<pid>-<random>      bytes (8) a process may still add; locked by it as long as it lives
            evict                       locked by whoever is evicting
            claims                      empty; locked byte by byte by who is fetching a block (:mod:`artifactfs.cache.claims`)

    A block file is the data and then its *seal*: 32 bytes, BLAKE3 in derive-key mode with :data:`layout.SEAL_CONTEXT` over key
    (32 bytes), block number (8, little endian; the list's is 2**64 - 1) and the BLAKE3 of the data (32). Its length is exactly
    that of the block plus 32. Numbers are little endian. The key is a content id, or a digest of all that identifies a
    reference's bytes; the cache does not care which. The time of last access says when a block was last used: it is set
    explicitly (at most once a second), so that ``noatime`` does not matter.

Never a wrong byte
    A block is served only after its BLAKE3 was compared with the one the caller knows, or else with its seal. What was
    checked is remembered by inode and modification time: once the latter moves, the block is checked again. So a torn write,
    a crash, zeroed, truncated, swapped or flipped bytes cost a fetch, never an answer. Nothing is ever synced to disk.

Threads and processes
    Reading a block, and writing one within the grant, takes no lock of other processes. A block is written under its final
    name; who reads it meanwhile finds it short, which is a miss. Two writers of one block both leave a good one. A descriptor
    belongs to an object and is closed when its last user lets go of it, so that no thread reads from a number that was closed
    and opened again. Lock order: ``BlockCache._opening``, ``Space._evicting``, the lock on ``evict``, ``Ledger._mutex``, the
    lock on ``ledger`` (held for microseconds, or for 64 unlinks), ``_Memory._lock`` (held for a look into a dictionary).
    Nobody waits for another process, or for an eviction, longer than a second or two: the block is then not cached.

The limit
    holds at every moment for the sum of the allocated blocks of all files and directories. The ledger's ``used`` is never less
    than that: a process first adds a grant to it, under the lock, and creates files only within its grant. What goes wrong
    (kill -9, files removed by hand) leaves ``used`` too high, and it is counted anew whenever there seems to be no room, and
    after every boot. Counting runs beside writers: what exists in the end was seen, or was paid for by what the live writers
    held at the beginning, or by what was granted since (``granted`` only grows). Files are removed and subtracted in one
    locked step; who removes a block without the lock does not subtract.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from cachetools import LRUCache

from artifactfs.cache.claims import Claims
from artifactfs.cache.layout import (
    LIST,
    LIST_NAME,
    SEAL,
    Block,
    Data,
    Fd,
    Place,
    Tree,
    has_block,
    identity,
    open_read,
    verify,
    write_block,
)
from artifactfs.cache.ledger import BusyError, StaleError
from artifactfs.cache.space import Space
from artifactfs.content import DIGEST_SIZE, block_digest
from artifactfs.errors import ConflictError, NotPermittedError, from_os_error
from artifactfs.forking import new_lock
from artifactfs.model import BLOCK, Lying, block_count

__all__ = ["LIST", "BlockCache", "CacheInfo", "CacheProblem", "CachedContent"]

log = logging.getLogger(__name__)

_SKELETON = 64 << 10  # the empty cache's directories and bookkeeping, generously: a smaller limit means no cache
_PAUSE_SECONDS = 10.0
_TOUCH_NS = 10**9
_RACY_NS = 20 * 10**6  # time stamps tick every 1 to 10 ms: a file changed in the tick of its check would look unchanged
_COARSE_RACY_NS = 2 * 10**9  # the same on file systems that keep whole seconds
_READ_AHEAD = 4  # blocks: what a fast disk delivers while one is checked and served
_OPEN_FILES = 64
_OPEN_DIRECTORIES = 32
_HELD_SHARE = 64 << 20  # one open file per this much of the limit: an evicted file's space is free only once it is closed
_CHECKED = 16384  # blocks remembered as checked: 16 GiB of large contents in some MB of memory


@dataclasses.dataclass(frozen=True, slots=True)
class CacheInfo:
    """The state of a cache. All sizes in bytes.

    ``used`` is what it occupies on disk, everything included; ``contents`` and ``blocks`` count what is in it, whole or in part.
    ``problem`` is "" or one line that says why nothing can be cached here.
    """

    root: Path
    limit: int
    used: int
    contents: int
    blocks: int
    disk_free: int
    disk_total: int
    problem: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class CacheProblem:
    """A block that was bad and was removed: ``key`` in hex, ``block`` its number (:data:`LIST` for the block list)."""

    key: str
    block: int
    reason: str


class _Checked(NamedTuple):
    """A block that was checked: which file, its modification time then, and the BLAKE3 it has."""

    ino: int
    mtime: int
    digest: bytes


class _Memory:
    """Open descriptors and checked blocks: bounded, shared by threads, forgotten at will."""

    def __init__(self, files: int) -> None:
        self._lock = new_lock()
        self._directories: LRUCache[tuple[bool, str], Fd] = LRUCache(_OPEN_DIRECTORIES)
        self._files: LRUCache[Place, Fd] = LRUCache(files)
        self._checked: LRUCache[Place, _Checked] = LRUCache(_CHECKED)

    def directory(self, place: Place) -> Fd | None:
        with self._lock:
            return self._directories.get(place[:2])

    def keep_directory(self, place: Place, directory: Fd | None) -> None:
        with self._lock:
            if directory is None:
                self._directories.pop(place[:2], None)
            else:
                self._directories[place[:2]] = directory

    def file(self, place: Place) -> Fd | None:
        with self._lock:
            return self._files.get(place)

    def keep_file(self, place: Place, file: Fd) -> None:
        with self._lock:
            self._files[place] = file

    def checked(self, place: Place, info: os.stat_result) -> bytes | None:
        """The BLAKE3 that the file had when it was checked, unless it was changed since."""
        with self._lock:
            known = self._checked.get(place)
        return known.digest if known is not None and known[:2] == (info.st_ino, info.st_mtime_ns) else None

    def keep_checked(self, place: Place, info: os.stat_result, digest: bytes) -> None:
        racy = _RACY_NS if info.st_mtime_ns % 10**9 else _COARSE_RACY_NS
        if time.time_ns() - info.st_mtime_ns > racy:
            with self._lock:
                self._checked[place] = _Checked(info.st_ino, info.st_mtime_ns, digest)

    def forget(self, place: Place) -> None:
        with self._lock:
            self._files.pop(place, None)
            self._checked.pop(place, None)

    def clear(self) -> None:
        with self._lock:
            self._directories.clear()
            self._files.clear()


class _Slot:
    """What a cache holds open: a tree, and for writing its space. Closed without keeping the cache itself alive."""

    def __init__(self) -> None:
        self.tree: Tree | None = None
        self.space: Space | None = None
        self.claims: Claims | None = None

    def close(self) -> None:
        space, self.tree, self.space, self.claims = self.space, None, None, None
        if space is not None:
            space.close()


class BlockCache:
    """The cache at ``root``, at most ``limit`` bytes on disk and never in the last 5 % of the disk.

    Threads may share one; processes share the directory. Nothing is created before the first write. Whatever goes wrong in
    reading and writing blocks is no more than a miss, and its reason is logged once.
    """

    def __init__(self, root: Path, limit: int) -> None:
        self.root = root
        self.limit = limit
        self._opening = new_lock()
        self._slot = _Slot()
        self._memory = _Memory(max(1, min(_OPEN_FILES, limit // _HELD_SHARE)))
        self._paused_until = 0.0
        self._warned: set[str] = set()
        self._finalizer = weakref.finalize(self, self._slot.close)

    def content(self, key: bytes, size: int) -> CachedContent:
        """The cached blocks of the content of ``size`` bytes that ``key`` (32 bytes) identifies. Touches no disk."""
        return CachedContent(self, key, size)

    def info(self) -> CacheInfo:
        """What is there, by looking at every file. A cache that does not exist yet is empty."""
        used = contents = blocks = 0
        problem = ""
        try:
            tree = self._fresh_tree()
            if tree is not None:
                used, contents, blocks = _census(tree)
            problem = _unwritable(self.root if tree is None else tree.path)
        except NotPermittedError as error:
            problem = str(error)
        except OSError as error:
            problem = str(from_os_error(error, f"reading the cache {self.root}"))
        total, free = _disk(self.root)
        return CacheInfo(self.root, self.limit, used, contents, blocks, free, total, problem)

    def claim(self, key: bytes, block: int) -> bool:
        """Whether no other process is fetching that block; then others see that this one is, until :meth:`disclaim`. Advice
        only: True also where that cannot be told."""
        claims = self._claims()
        return claims is None or claims.take(key, block)

    def disclaim(self, key: bytes, block: int) -> None:
        """The block was fetched, or given up. Idempotent."""
        claims = self._slot.claims
        if claims is not None:
            claims.give_back(key, block)

    def _claims(self) -> Claims | None:
        claims = self._slot.claims
        if claims is None and self.limit > _SKELETON and time.monotonic() >= self._paused_until:
            try:
                claims = self._slot.claims = Claims(self._open_tree(create=True))
            except (OSError, NotPermittedError) as error:
                self._paused_until = time.monotonic() + _PAUSE_SECONDS
                self._warn(error)
        return claims

    def prune(self, target: int = 0) -> int:
        """Evict what was least recently used until at most ``target`` bytes are used (as far as directories and bookkeeping
        allow), clear up after dead processes, and count anew. Returns the bytes freed.

        NotPermittedError, ReadOnlyError or another error for a directory that cannot be changed; ConflictError if other
        processes keep evicting for a minute.
        """
        try:
            with contextlib.suppress(StaleError):
                return self._prune(target)
            self.close()
            return self._prune(target)
        except (BusyError, StaleError):
            raise ConflictError(f"the cache {self.root} is being changed by another process; try again") from None
        except OSError as error:
            raise from_os_error(error, f"pruning the cache {self.root}") from None

    def _prune(self, target: int) -> int:
        tree = self._fresh_tree()
        if tree is None:
            return 0
        freed = self._space(tree).prune(target)
        for found in list(tree.walk()):
            if found.place.directory and not found.place.name:
                tree.remove(found.place)
        return freed

    def evict(self, key: bytes) -> int:
        """Remove all of one content. Returns the bytes freed; 0 if nothing was cached. Errors as :meth:`prune`."""
        try:
            tree = self._fresh_tree()
            if tree is None:
                return 0
            found = tree.of_key(key.hex())
            for file in found:
                self._memory.forget(file.place)
            freed = sum(file.allocated for file in found if tree.remove(file.place))
            tree.remove(Place(True, key.hex(), ""))
            return freed
        except OSError as error:
            raise from_os_error(error, f"evicting from the cache {self.root}") from None

    def verify(self) -> Iterator[CacheProblem]:
        """Read everything, remove every block that fails its check and tell what it was. Does not count as a use.

        Errors as :meth:`prune`.
        """
        try:
            tree = self._fresh_tree()
            if tree is None:
                return
            for place in (found.place for found in tree.walk() if found.place.name):
                reason = verify(tree, place)
                if reason:
                    self._memory.forget(place)
                    tree.remove(place)
                    yield CacheProblem(*identity(place), reason)
        except OSError as error:
            raise from_os_error(error, f"verifying the cache {self.root}") from None

    def close(self) -> None:
        """Give back reserved space and close descriptors. The cache works on afterwards, as if new."""
        self._slot.close()
        self._memory.clear()

    # The open state

    def _tree(self) -> Tree | None:
        """The open tree; None if there is no cache yet or it may not be used."""
        if self._slot.tree is not None:
            return self._slot.tree
        try:
            return self._open_tree(create=False)
        except FileNotFoundError:
            return None
        except (OSError, NotPermittedError) as error:
            self._warn(error)
            return None

    def _open_tree(self, create: bool) -> Tree:
        with self._opening:
            if self._slot.tree is None:
                self._slot.tree = Tree(self.root, create)
            return self._slot.tree

    def _fresh_tree(self) -> Tree | None:
        """The open tree, opened anew if the path leads elsewhere by now; None if there is none. NotPermittedError, OSError."""
        tree = self._slot.tree
        if tree is not None and not tree.current():
            self.close()
        try:
            return self._open_tree(create=False)
        except FileNotFoundError:
            return None

    def _space(self, tree: Tree) -> Space:
        with self._opening:
            space = self._slot.space
            if space is None or space.tree is not tree or not space.owned:
                space = self._slot.space = Space(tree, self.limit, self._memory.forget)
            return space

    def _directory(self, place: Place) -> Fd | None:
        """The open directory of ``place``; None if there is none."""
        directory = self._memory.directory(place)
        if directory is not None:
            return directory
        tree = self._tree()
        if tree is None:
            return None
        try:
            directory = tree.open_directory(place)
        except FileNotFoundError:
            return None
        self._memory.keep_directory(place, directory)
        return directory

    # Blocks

    def _read(self, block: Block, start: int, size: int, digest: bytes) -> bytes | None:
        """``size`` bytes from ``start`` of ``block``, or None."""
        try:
            found = self._open(block, keep=size < block.length)
            return None if found is None else self._serve(*found, block, start, size, digest)
        except OSError as error:
            if error.errno in (errno.EIO, errno.ELOOP, errno.EISDIR):
                self._drop(block, f"cannot be read ({error.strerror})")
            else:
                self._warn(error)
            return None

    def _lying(self, block: Block) -> Lying | None:
        try:
            found = self._open(block, keep=False)
        except OSError:
            return None
        return Lying(found[0].number, 0, block.length, found[0]) if found is not None else None

    def _open(self, block: Block, keep: bool) -> tuple[Fd, os.stat_result] | None:
        """The file of ``block`` if it has the right length: another is a miss, and the next write replaces it."""
        file = self._memory.file(block.place)
        info = os.fstat(file.number) if file is not None else None
        if file is None or info is None or not info.st_nlink:
            file = self._open_anew(block.place, keep)
            if file is None:
                return None
            info = os.fstat(file.number)
        if info.st_size != block.length + SEAL:
            return None
        now = time.time_ns()
        if abs(now - info.st_atime_ns) > _TOUCH_NS:
            with contextlib.suppress(OSError):
                os.utime(file.number, ns=(now, info.st_mtime_ns))
        return file, info

    def _advise(self, block: Block) -> None:
        """Let the system begin to load the file of ``block``, if it is there."""
        with contextlib.suppress(OSError):
            file = self._open_anew(block.place, keep=False)
            if file is not None and hasattr(os, "posix_fadvise"):  # not on macOS
                os.posix_fadvise(file.number, 0, 0, os.POSIX_FADV_WILLNEED)

    def _open_anew(self, place: Place, keep: bool) -> Fd | None:
        directory = self._directory(place)
        if directory is None:
            return None
        try:
            file = open_read(place.name, directory)
        except FileNotFoundError:
            self._memory.forget(place)
            return None
        if keep:
            self._memory.keep_file(place, file)
        return file

    def _serve(self, file: Fd, info: os.stat_result, block: Block, start: int, size: int, digest: bytes) -> bytes | None:
        """The bytes from an open file; None, and the file is dropped, if it is not what ``digest`` or else its seal says."""
        known = self._memory.checked(block.place, info)
        if known is not None and known == (digest or known):
            data = os.pread(file.number, size, start)
            return data if len(data) == size else None
        data = os.pread(file.number, block.length, 0)
        actual = block_digest(data)
        if actual == digest or (not digest and os.pread(file.number, SEAL, block.length) == block.seal(actual)):
            self._memory.keep_checked(block.place, info, actual)
            return data if size == block.length else data[start : start + size]
        self._drop(block, "failed its check")
        return None

    def _drop(self, block: Block, reason: str) -> None:
        log.warning("cache: block %d of %s %s and is dropped", block.number, block.key.hex(), reason)
        self._memory.forget(block.place)
        with contextlib.suppress(OSError):
            directory = self._directory(block.place)
            if directory is not None:
                os.unlink(block.place.name, dir_fd=directory.number)

    def _has(self, block: Block) -> bool:
        try:
            directory = self._directory(block.place)
            return directory is not None and has_block(block, directory)
        except OSError:
            return False

    def _lengths(self, place: Place) -> dict[int, int]:
        """Number and length of each block file beside ``place``."""
        try:
            tree = self._tree()
            found = [] if tree is None else tree.of_key(place.directory)
        except OSError:
            return {}
        blocks = ((*identity(file.place), file.info.st_size - SEAL) for file in found if file.place.large)
        return {number: length for key, number, length in blocks if key == place.directory and number >= 0}

    def _write(self, block: Block, data: Data, digest: bytes) -> bool:
        """Whether ``block`` is cached now. After an error, which is logged once, nothing is written for a while."""
        if time.monotonic() < self._paused_until or len(data) + _SKELETON > self.limit:
            return False
        seal = block.seal(digest or block_digest(data))
        try:
            return self._store_safely(block.place, data, seal)
        except BusyError:
            return False
        except (OSError, NotPermittedError) as error:
            self._paused_until = time.monotonic() + _PAUSE_SECONDS
            self._warn(error)
            return False

    def _store_safely(self, place: Place, data: Data, seal: bytes) -> bool:
        """As :meth:`_store`, again if the directory or the whole cache was removed under us."""
        for attempt in range(3):
            try:
                return self._store(place, data, seal)
            except FileNotFoundError:
                self._memory.keep_directory(place, None)
                if attempt:
                    self.close()
            except StaleError:
                self.close()
        return False

    def _store(self, place: Place, data: Data, seal: bytes) -> bool:
        """Whether the block is there now; False if there is no room for it."""
        tree = self._open_tree(create=True)
        space = self._space(tree)
        directory = self._directory(place)
        cost = tree.cost(len(data) + SEAL) + (tree.cost(1) if directory is None else 0)
        if not space.reserve(cost):
            return False
        written = False
        try:
            if directory is None:
                directory = tree.open_directory(place, create=True)
                self._memory.keep_directory(place, directory)
            written = write_block(place.name, directory, data, seal)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                space.shrink(cost)
            raise
        finally:
            space.settle(cost, written)
        return True

    def _warn(self, error: Exception) -> None:
        """Log a reason not to cache, once."""
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        if reason not in self._warned:
            self._warned.add(reason)
            log.warning("cache %s: %s; reading on without it", self.root, reason)


class CachedContent:
    """The cached blocks of one content. Threads may share it. Its descriptors belong to the cache, which bounds them."""

    def __init__(self, cache: BlockCache, key: bytes, size: int) -> None:
        if len(key) != DIGEST_SIZE or size < 0:
            raise ValueError(f"a cache key is {DIGEST_SIZE} bytes and a size is not negative: {key!r}, {size}")
        self.key = key
        self.size = size
        self._cache = cache
        self._name = key.hex()
        self._count = block_count(size)
        self._latest = -1  # read in sequence up to this block,
        self._ahead = 0  # and the system was asked to load up to that one. A race costs an advice.

    def read(self, block: int, start: int, size: int, digest: bytes = b"") -> bytes | None:
        """``size`` bytes from ``start`` of block number ``block``; None if they are not cached.

        The block is compared with ``digest``, the BLAKE3 it must have, or without one with what was recorded when it was
        written, before any byte of it is served for the first time; one that differs is dropped.
        """
        found = self._block(block)
        if start < 0 or size < 0 or start + size > found.length:
            raise ValueError(f"bytes {start} to {start + size} are not in block {block} of {found.length} bytes")
        if block != self._latest and self._count > 1:
            self._read_ahead(block)
        return self._cache._read(found, start, size, digest) if found.length else b""

    def lying(self, block: int) -> Lying | None:
        """Where block number ``block`` lies, not checked; None if it is not cached."""
        return self._cache._lying(self._block(block))

    def write(self, block: int, data: Data, digest: bytes = b"") -> bool:
        """Cache block number ``block``. Returns whether it is cached now: best effort, never an error.

        ``digest`` saves hashing ``data`` (whole, as long as the block) once more where its BLAKE3 was just computed.
        """
        found = self._block(block)
        if len(data) != found.length:
            raise ValueError(f"block {block} has {found.length} bytes, not {len(data)}")
        return not found.length or self._cache._write(found, data, digest)

    def has(self, block: int) -> bool:
        """Whether the block seems to be cached: whether it is good shows when it is read."""
        found = self._block(block)
        return not found.length or self._cache._has(found)

    def cached_bytes(self) -> int:
        """Bytes of the content that seem to be cached."""
        if self._count < 2:
            return self.size if self._count and self.has(0) else 0
        found = self._cache._lengths(self._list().place)
        blocks = (self._block(number) for number in found if number < self._count)
        return sum(block.length for block in blocks if found[block.number] == block.length)

    def get_list(self) -> bytes | None:
        """The block list of a content of more than one block, if it is cached. The caller checks it against the id."""
        found = self._list()
        return self._cache._read(found, 0, found.length, b"") if self._count > 1 else None

    def set_list(self, blocks: bytes) -> bool:
        """Cache the block list. As :meth:`write`; there is none for at most one block."""
        found = self._list()
        if self._count > 1 and len(blocks) != found.length:
            raise ValueError(f"the block list of {self._count} blocks has {found.length} bytes, not {len(blocks)}")
        return self._count > 1 and self._cache._write(found, blocks, b"")

    def close(self) -> None:
        """Done with it. Idempotent; what the cache keeps open for the next reader is bounded and its own."""

    def __enter__(self) -> CachedContent:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _read_ahead(self, block: int) -> None:
        """Have the system load the next blocks while this one is checked: its own reading ahead ends with each file."""
        in_sequence = block == self._latest + 1
        self._latest = block
        self._ahead = max(self._ahead, block) if in_sequence else block
        while in_sequence and self._ahead < min(block + _READ_AHEAD, self._count - 1):
            self._ahead += 1
            self._cache._advise(self._block(self._ahead))

    def _block(self, number: int) -> Block:
        if not 0 <= number < max(1, self._count):
            raise ValueError(f"a content of {self.size} bytes has no block {number}")
        length = min(BLOCK, self.size - number * BLOCK)
        if self.size > BLOCK:
            return Block(Place(True, self._name, f"{number:x}"), self.key, number, length)
        return Block(Place(False, self._name[0], self._name), self.key, number, length)

    def _list(self) -> Block:
        return Block(Place(True, self._name, LIST_NAME), self.key, LIST, self._count * DIGEST_SIZE)


def _census(tree: Tree) -> tuple[int, int, int]:
    """Bytes used on disk, contents, and blocks."""
    used, blocks = tree.overhead(), 0
    contents: set[str] = set()
    for found in tree.walk():
        used += found.allocated
        if found.place.name and found.place.directory:
            contents.add(found.place.directory if found.place.large else found.place.name)
            blocks += found.place.name != LIST_NAME
    return used, len(contents), blocks


def _unwritable(path: Path) -> str:
    """Why nothing can be created at ``path``, or ""."""
    place = next(place for place in (path, *path.parents) if place.exists())
    if os.access(place, os.W_OK | os.X_OK):
        return ""
    return f"{place} cannot be written to; set ARTIFACTFS_CACHE_DIR to a directory of your own"


def _disk(root: Path) -> tuple[int, int]:
    """The bytes in total and free of the disk that holds ``root`` or would hold it; zeros if that cannot be told."""
    for path in (root, *root.parents):
        with contextlib.suppress(OSError):
            vfs = os.statvfs(path)
            return vfs.f_blocks * vfs.f_frsize, vfs.f_bavail * vfs.f_frsize
    return 0, 0
