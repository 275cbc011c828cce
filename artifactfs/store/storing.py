"""Local files become stored contents: small ones in packs, large ones as blobs or as extents of an older content and a new one.

A commit uses it for its new files (``upload.py``), and a stage to store what was closed ahead of its commit. Each file is read
once; the segments of a large one are read and hashed by workers, a little ahead of the writing. What another store has is read
from there in the same way, and compared with what that knows of it.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import errno
import functools
import os
import stat
from collections import deque
from collections.abc import Callable, Generator, Iterator, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from artifactfs.content import MAX_CONTENT, Checksum, Fingerprint, block_digest, content_id, fingerprint
from artifactfs.errors import ConflictError, IntegrityError, UsageError, from_os_error
from artifactfs.model import BLAKE3, BLOCK, File, Remote
from artifactfs.pack import PackWriter
from artifactfs.store.large import LargeContent
from artifactfs.store.native import NativeStore

_SEGMENT = 4 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class NewFile:
    """A local file to store. ``path`` is read once, while the commit runs; one that changes meanwhile fails the commit with a
    ConflictError that names it.

    ``base``, ``changed`` and ``read_base``: where only some blocks differ from a stored file, ``changed`` are the numbers of the
    blocks that must be read from ``path``, which has the new size; all others are those of ``base``, whose bytes need not be in
    ``path``. Blocks that ``base`` has not, or not whole, are in ``changed``. ``read_base(offset, size)`` gives bytes of ``base``,
    for digests that need them all.
    """

    path: str
    executable: bool
    base: File | None = None
    changed: frozenset[int] = frozenset()
    read_base: Callable[[int, int], bytes] | None = None


class Content(Protocol):
    """An open content of another store."""

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``, fewer only at the end."""

    def close(self) -> None: ...


class Contents(Protocol):
    """The contents of a version of another store. Threads may share it."""

    def open(self, path: str) -> Content:
        """The content at ``path``."""

    def where(self, path: str) -> str:
        """What to call that in messages."""


@dataclasses.dataclass(frozen=True, slots=True)
class Streamed:
    """A file of another store, whose bytes are read from there when they are stored, maybe more than once. ``file`` is what that
    store knows of it, ``path`` where it is among ``contents``."""

    file: File
    path: str
    contents: Contents

    @property
    def size(self) -> int:
        """In bytes."""
        return self.file.size

    @property
    def executable(self) -> bool:
        """Whether it is."""
        return self.file.executable

    @property
    def id(self) -> bytes:
        """Its content id, b"" where the other store does not know that."""
        if not isinstance(self.file, Remote):
            return self.file.id
        return base64.b64decode(self.file.checksum) if self.file.checksum and self.file.algorithm == BLAKE3 else b""

    def opened(self) -> Content:
        """Its bytes."""
        return self.contents.open(self.path)

    def wrong(self) -> IntegrityError:
        """What to raise if they are not what the other store says."""
        return IntegrityError(
            f"{self.contents.where(self.path)} is not what was recorded: it has another size or {self.file.algorithm}; "
            "it is not copied"
        )


class Storing:
    """Stores contents through ``packs``, which whoever made it flushes. For one thread.

    ``stored`` are contents that are stored already, by id; what is stored is added. ``find`` looks for one elsewhere. ``read`` is
    told of each piece that was read (the number of files it completes, bytes), and may raise to give the file up.
    """

    def __init__(
        self,
        store: NativeStore,
        packs: PackWriter,
        pool: ThreadPoolExecutor,
        ahead: int,
        algorithm: str,
        stored: MutableMapping[bytes, File],
        find: Callable[[bytes], File | None],
        read: Callable[[int, int], None],
    ) -> None:
        """``ahead`` segments of 4 MiB are under way in ``pool``."""
        self._store = store
        self._packs = packs
        self._pool = pool
        self._ahead = ahead
        self._algorithm = algorithm
        self._stored = stored
        self._find = find
        self._read = read
        self.written = 0
        """Bytes that were not stored before."""
        self.packed: dict[bytes, list[File]] | None = None
        """Small files by the pack that they were put into, where somebody asks for that."""

    def file(self, new: NewFile, prior: File | None) -> File:
        """A file of any size, as :meth:`patched`, :meth:`small` or :meth:`large`."""
        if new.base is not None:
            return self.patched(new, new.base)
        found = read_small(new.path, self._algorithm)
        return self.large(new, prior) if found is None else self.small(new, *found, prior)

    def small(self, new: NewFile | Streamed, data: bytes, found: Fingerprint, prior: File | None) -> File:
        """A file that was read already. ``prior``: what it may be the same as."""
        known = prior if prior is not None and prior.id == found.id else self._known(found.id) if data else None
        if known is None and data:
            known = self._stored[found.id] = File("", len(data), False, found.id, (self._packs.add(data),))
            self.written += len(data)
            if self.packed is not None:
                self.packed.setdefault(known.extents[0].object, []).append(known)
        self._read(1, len(data))
        return _placed(found, new.executable, known if data else None)

    def patched(self, new: NewFile, base: File) -> File:
        """A staged file of which only some blocks are local."""
        with _opened(new.path) as (fd, size):
            if size > BLOCK:
                return self._store_large(_Local(fd, size, new), base, new.changed)
            local = 0 in new.changed or not size
            data = _pread(fd, size, 0, new.path) if local else _read_base(new, 0, size)
        return self.small(new, data, fingerprint(data, self._algorithm), None)

    def large(self, new: NewFile, prior: File | None) -> File:
        """A file of more than one block; those that ``prior`` has at the same place are not stored again."""
        with _opened(new.path) as (fd, size):
            return self._store_large(_Local(fd, size, new), prior, None)

    def streamed(self, new: Streamed, read: tuple[bytes, Fingerprint] | None, prior: File | None) -> File:
        """A file of another store; ``read`` is what :func:`read_streamed` gave of it. IntegrityError."""
        if read is not None:
            return self.small(new, *read, prior)
        with contextlib.closing(new.opened()) as content:
            return self._store_large(_Elsewhere(content, new), prior, None)

    def _store_large(self, source: _Local | _Elsewhere, prior: File | None, changed: frozenset[int] | None) -> File:
        """``changed``: the blocks to read, None for all; the others are those of ``prior``."""
        new, size = source.new, source.size
        if size > MAX_CONTENT:
            raise UsageError(f"{new.path} has {size} bytes; a file in a version has at most {MAX_CONTENT}")
        content = LargeContent(self._store, prior, source.again() if not self._store.local else None)
        checksum = Checksum(self._algorithm if isinstance(new, NewFile) else new.file.algorithm)
        try:
            with contextlib.closing(self._segments(source, changed)) as segments:
                for start, data, digests in segments:
                    if data is None:
                        length = min(BLOCK, size - start)
                        content.keep(length)
                        if checksum.needed:
                            assert isinstance(new, NewFile)
                            checksum.update(_read_base(new, start, length))
                        continue
                    checksum.update(data)
                    for at, digest in enumerate(digests):
                        content.take(memoryview(data)[at * BLOCK : (at + 1) * BLOCK], digest)
                    self._read(0, len(data))
            id = content_id(size, bytes(content.digests))
            found = Fingerprint(id, size, bytes(content.digests), checksum.algorithm, checksum.finish())
            if isinstance(new, Streamed):
                _compare(new, found)
            known = prior if prior is not None and prior.id == id else self._known(id)
            if known is None:
                extents, table = content.finish(self._packs)
                blocks = self._packs.add(found.blocks)
                known = self._stored[id] = File("", size, False, id, extents, blocks, table=table)
                self.written += content.written
        finally:
            content.abort()
        self._read(1, 0)
        return _placed(found, new.executable, known)

    def _segments(
        self, source: _Local | _Elsewhere, changed: frozenset[int] | None
    ) -> Generator[tuple[int, bytes | None, list[bytes]]]:
        """(offset, bytes, block digests) in order, read and hashed ahead by the workers; bytes None for a block not to read."""
        window: deque[tuple[int, Future[tuple[bytes, list[bytes]]] | None]] = deque()
        try:
            for offset, length, local in _plan(source.size, changed):
                window.append((offset, self._pool.submit(_read_segment, source, offset, length) if local else None))
                while len(window) > self._ahead:
                    yield _finished(*window.popleft())
            while window:
                yield _finished(*window.popleft())
        finally:
            for _, future in window:  # given up: the descriptor will be closed, and must not be read as another file's
                if future is not None and not future.cancel():
                    future.exception()

    def _known(self, id: bytes) -> File | None:
        return self._stored.get(id) or self._find(id)


def read_small(path: str, algorithm: str) -> tuple[bytes, Fingerprint] | None:
    """The file's bytes and their fingerprint; None for one of more than a block."""
    with _opened(path) as (fd, size):
        if size > BLOCK:
            return None
        data = _pread(fd, size, 0, path)
    return data, fingerprint(data, algorithm)


def read_batch(paths: Sequence[str], algorithm: str) -> list[tuple[bytes, Fingerprint] | None]:
    """The small ones of ``paths``, read and hashed; None for the large ones."""
    return [read_small(path, algorithm) for path in paths]


def read_streamed(new: Streamed) -> tuple[bytes, Fingerprint]:
    """The bytes of a small file of another store and their fingerprint. IntegrityError if they are not what it should be."""
    with contextlib.closing(new.opened()) as content:
        data = content.read(0, new.size) if new.size else b""
    found = fingerprint(data, new.file.algorithm)
    _compare(new, found)
    return data, found


def _compare(new: Streamed, found: Fingerprint) -> None:
    """IntegrityError unless what was read is what the other store says, as far as it says anything."""
    if found.size != new.size or new.file.digest not in ("", found.digest):
        raise new.wrong()


def _placed(found: Fingerprint, executable: bool, known: File | None) -> File:
    """The entry of a content that lies where ``known`` does; None for the empty content, which lies nowhere."""
    extents, blocks, table = (known.extents, known.blocks, known.table) if known is not None else ((), None, None)
    algorithm = found.algorithm
    return File("", found.size, executable, found.id, extents, blocks, algorithm, found.checksum, table)


@dataclasses.dataclass(frozen=True, slots=True)
class _Local:
    """An open local file of more than one block."""

    fd: int
    size: int
    new: NewFile

    def read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes. ConflictError."""
        return _pread(self.fd, size, offset, self.new.path)

    def again(self) -> Callable[[int, int], bytes]:
        """What reads it later."""
        return _Again(self.fd, self.new.path).read


@dataclasses.dataclass(frozen=True, slots=True)
class _Elsewhere:
    """An open content of another store, of more than one block."""

    content: Content
    new: Streamed

    @property
    def size(self) -> int:
        """In bytes."""
        return self.new.size

    def read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes. IntegrityError."""
        return _read_exactly(self.content, self.new, offset, size)

    def again(self) -> Callable[[int, int], bytes]:
        """What reads it later."""
        return functools.partial(_read_anew, self.new)


def _read_exactly(content: Content, new: Streamed, offset: int, size: int) -> bytes:
    data = content.read(offset, size)
    if len(data) != size:
        raise new.wrong()
    return data


def _read_anew(new: Streamed, offset: int, size: int) -> bytes:
    with contextlib.closing(new.opened()) as content:
        return _read_exactly(content, new, offset, size)


class _Again:
    """A file that is read once more after its descriptor was closed. It is closed with this."""

    def __init__(self, fd: int, path: str) -> None:
        self._file = open(os.dup(fd), "rb", buffering=0)  # noqa: SIM115 - read by whoever sends it, then let go
        self._path = path

    def read(self, offset: int, size: int) -> bytes:
        return _pread(self._file.fileno(), size, offset, self._path)


def _plan(size: int, changed: frozenset[int] | None) -> Iterator[tuple[int, int, bool]]:
    """(offset, length, whether to read it) of a large content: segments to read, single blocks not to."""
    offset = 0
    while offset < size:
        block = offset // BLOCK
        if changed is not None and block not in changed:
            yield offset, min(BLOCK, size - offset), False
            offset += BLOCK
            continue
        count = 1
        while count < _SEGMENT // BLOCK and (changed is None or block + count in changed):
            count += 1
        yield offset, min(count * BLOCK, size - offset), True
        offset += count * BLOCK


def _finished(offset: int, future: Future[tuple[bytes, list[bytes]]] | None) -> tuple[int, bytes | None, list[bytes]]:
    if future is None:
        return offset, None, []
    data, digests = future.result()
    return offset, data, digests


def _read_segment(source: _Local | _Elsewhere, offset: int, length: int) -> tuple[bytes, list[bytes]]:
    data = source.read(offset, length)
    view = memoryview(data)
    return data, [block_digest(view[at : at + BLOCK]) for at in range(0, length, BLOCK)]


def _read_base(new: NewFile, offset: int, size: int) -> bytes:
    if new.read_base is None:
        raise ValueError(f"{new.path} needs bytes of its base, and has no way to read them")
    return new.read_base(offset, size)


def _pread(fd: int, size: int, offset: int, path: str) -> bytes:
    """Exactly ``size`` bytes."""
    data = os.pread(fd, size, offset)
    while len(data) < size:
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            raise _changed(path)
        data += more
    return data


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[int, int]]:
    """(descriptor, size) of a regular file that must not change until the block ends; ConflictError if it does."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO put in its place must not hang us
        try:
            before = os.fstat(fd)
            if not stat.S_ISREG(before.st_mode):
                raise UsageError(f"{path} is not a regular file")
            yield fd, before.st_size
            after = os.fstat(fd)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket cannot even be opened
            raise UsageError(f"{path} is not a regular file") from None
        raise from_os_error(error, f"reading {path}") from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise _changed(path)


def _changed(path: str) -> ConflictError:
    return ConflictError(f"{path} changed while it was being stored; try again once nothing writes to it")
