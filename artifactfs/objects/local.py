"""Objects as files of a directory: the embedded store.

An object appears whole: it is written to ``tmp/``, fsync'd, then renamed (data) or hard-linked (create if absent) into place,
and its directory is fsync'd, as is every directory above it. One lock, ``flock`` on the file ``.lock``, dies with its process:
compare-and-swap and conditional removal hold it exclusively, data that takes its name and listings hold it shared. It is held for
a rename or a listing of one directory, never while data is written or a caller looks at a listing. (A file, because over NFS an
exclusive lock needs a descriptor that is open for writing, and a directory's cannot be.)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from blake3 import blake3

from artifactfs.errors import ArtifactFSError, IntegrityError, NotFoundError, StoreFormatError, from_os_error
from artifactfs.objects import ABSENT, MAX_RECORD, ObjectInfo

TEMPORARY = "tmp"
_LOCK = ".lock"
_SHARED = os.O_RDONLY | os.O_CREAT
_EXCLUSIVE = os.O_RDWR | os.O_CREAT

_COPY = 8 << 20


class LocalObjects:
    """The object store in ``root``, which need not exist until something is written."""

    def __init__(self, root: Path) -> None:
        self.root = os.path.abspath(root)
        self.url = self.root
        self._durable: set[str] = set()  # directories whose parents hold them for certain

    def path(self, key: str) -> str | None:
        return f"{self.root}/{key}"

    def get(self, key: str) -> tuple[bytes, str]:
        with self._errors("reading", key), _opened(f"{self.root}/{key}") as fd:
            data = _read_record(fd, key)
        return data, _etag(data)

    def read(self, key: str, offset: int, size: int) -> bytes:
        with self._errors("reading", key), _opened(f"{self.root}/{key}") as fd:
            # Looked up first: a location made up by a hostile page must not make us allocate what it claims.
            data = os.pread(fd, size, offset) if offset + size <= os.fstat(fd).st_size else b""
        if len(data) != size:
            raise IntegrityError(f"{key} in {self.url} ends before byte {offset + size}")
        return data

    def size(self, key: str) -> int | None:
        with self._errors("looking up", key), contextlib.suppress(FileNotFoundError):
            return os.stat(f"{self.root}/{key}").st_size
        return None

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        writer = self.writer()
        try:
            writer.write_at(0, data)
            writer.commit(key)
        finally:
            writer.abort()

    def writer(self, key: str = "") -> LocalWriter:
        with self._errors("writing", TEMPORARY):
            return LocalWriter(self, self._temporary())

    def swap(self, key: str, data: bytes, etag: str) -> str | None:
        target = f"{self.root}/{key}"
        with self._errors("writing", key):
            directory = self._make_parent(target)
            temporary = self._temporary()
            try:
                _write_durably(temporary, data)
                replaced = _link(temporary, target) if etag == ABSENT else self._replace_if(temporary, target, etag)
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            if not replaced:
                return None
            _sync_directory(directory)
        return _etag(data)

    def scan(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        pending = [prefix.rstrip("/")]
        while pending:
            folder = pending.pop()
            found = []
            with self._errors("listing", folder):
                for entry in self._entries(folder):
                    key = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(key)
                    elif key > after:
                        with contextlib.suppress(FileNotFoundError):
                            status = entry.stat(follow_symlinks=False)
                            found.append(ObjectInfo(key, status.st_size, status.st_mtime))
            yield from found

    def folders(self, prefix: str) -> list[str]:
        with self._errors("listing", prefix):
            return sorted(entry.name for entry in self._entries(prefix) if entry.is_dir())  # or a link to one, on another disk

    def refresh(self, key: str) -> bool:
        target = f"{self.root}/{key}"
        with self._errors("keeping", key), contextlib.suppress(FileNotFoundError):
            try:
                with self._locked(_SHARED):
                    os.utime(target)
            except PermissionError:  # another user's: a copy of it is ours
                self._copy_over(key)
            return True
        return False

    def delete(self, key: str, unless_newer: float | None = None) -> bool:
        target = f"{self.root}/{key}"
        with self._errors("deleting", key), contextlib.suppress(FileNotFoundError), self._locked(_EXCLUSIVE):
            if unless_newer is not None and os.stat(target).st_mtime > unless_newer:
                return False
            os.unlink(target)
            return True
        return False

    def remove(self, keys: Iterable[str], unless_newer: float) -> Iterator[str]:
        return (key for key in keys if self.delete(key, unless_newer))

    def clock(self) -> float:
        return time.time()

    def sweep(self, before: float) -> int:
        """Files in ``tmp/`` are objects that ``scan`` lists: nothing else is left behind."""
        return 0

    def _replace_if(self, temporary: str, target: str, etag: str) -> bool:
        with self._locked(_EXCLUSIVE):
            try:
                with _opened(target) as fd:
                    current = _read_record(fd, target)
            except FileNotFoundError:
                return False
            if _etag(current) != etag:
                return False
            os.rename(temporary, target)
        return True

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        """A directory's entries; none if it is not there.

        Some file systems leave out a name that is renamed over while they list its directory: the lock keeps swaps out meanwhile.
        """
        try:
            with self._locked(os.O_RDONLY), os.scandir(f"{self.root}/{folder}") as entries:
                return [entry for entry in entries if folder or entry.name != _LOCK]
        except FileNotFoundError:
            return []

    @contextlib.contextmanager
    def _locked(self, flags: int) -> Iterator[None]:
        """Hold the store's lock, opened with ``flags``: shared for O_RDONLY, else exclusively. It goes with its descriptor.

        Whoever only reads does without, where nobody has written yet.
        """
        path = f"{self.root}/{_LOCK}"
        try:
            fd = os.open(path, flags | os.O_CLOEXEC, 0o666)
        except PermissionError:  # another user's: reading will do, but over NFS
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            if flags != os.O_RDONLY:
                raise
            yield
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if flags & os.O_RDWR else fcntl.LOCK_SH)
            yield
        finally:
            os.close(fd)

    def _temporary(self) -> str:
        """A path in ``tmp/`` that nobody else has."""
        folder = f"{self.root}/{TEMPORARY}"
        _make_directories(folder)
        return f"{folder}/{os.getpid()}-{secrets.token_hex(8)}"

    def _make_parent(self, target: str) -> str:
        parent = os.path.dirname(target)
        self._durable.update(_make_directories(parent))
        self._settle(parent)
        return parent

    def _settle(self, directory: str) -> None:
        """Make ``directory`` durable, once a process: another one may have made it a moment ago, and died since."""
        if directory == self.root or directory in self._durable:
            return
        above = os.path.dirname(directory)
        self._settle(above)
        _sync_directory(above)
        self._durable.add(directory)

    def _copy_over(self, key: str) -> None:
        writer = LocalWriter(self, self._temporary())
        try:
            with _opened(f"{self.root}/{key}") as fd:
                offset = 0
                while data := os.pread(fd, _COPY, offset):
                    writer.write_at(offset, data)
                    offset += len(data)
            writer.commit(key)
        finally:
            writer.abort()

    @contextlib.contextmanager
    def _errors(self, doing: str, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise NotFoundError(f"{key} is not in the store {self.url}") from None
        except NotADirectoryError:
            raise StoreFormatError(f"{doing} {key} in {self.url}: a part of that path is not a directory; name another") from None
        except ArtifactFSError:
            raise
        except OSError as error:
            raise from_os_error(error, f"{doing} {key or 'the store'} in {self.url}") from error


class LocalWriter:
    """A file in ``tmp/`` on its way to becoming an object."""

    def __init__(self, objects: LocalObjects, temporary: str) -> None:
        self._objects = objects
        self._temporary = temporary
        self._fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        with self._objects._errors("writing", self._temporary):
            view = memoryview(data)
            while view:
                written = os.pwrite(self._fd, view, offset)
                view = view[written:]
                offset += written

    def commit(self, key: str) -> None:
        target = f"{self._objects.root}/{key}"
        with self._objects._errors("writing", key):
            os.fsync(self._fd)
            directory = self._objects._make_parent(target)
            with self._objects._locked(_SHARED):
                os.rename(self._temporary, target)
            _sync_directory(directory)
        self._close()

    def abort(self) -> None:
        if self._fd >= 0:
            self._close()
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)

    def _close(self) -> None:
        os.close(self._fd)
        self._fd = -1


def _etag(data: bytes) -> str:
    """Equal states have equal ETags, so a swap that compares them can never lose a change."""
    return blake3(data).hexdigest()


def _link(temporary: str, target: str) -> bool:
    try:
        os.link(temporary, target)
    except FileExistsError:
        return os.stat(temporary).st_nlink == 2  # over NFS: it was ours, sent twice because the first answer was lost
    return True


def _write_durably(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _make_directories(path: str) -> list[str]:
    """Make ``path`` and its parents; those that were made, each durable in its parent."""
    try:
        os.mkdir(path)
    except FileExistsError:
        if not os.path.isdir(path):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None
        return []
    except FileNotFoundError:
        return _make_directories(os.path.dirname(path)) + _make_directories(path)
    _sync_directory(os.path.dirname(path))
    return [path]


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    """A descriptor of a regular file. Nothing else may pass for an object: a FIFO would hang us, a device never end."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise IntegrityError(f"{path} is not a regular file, so it is no object of a store")
        yield fd
    finally:
        os.close(fd)


def _read_record(fd: int, where: str) -> bytes:
    size = os.fstat(fd).st_size
    if size > MAX_RECORD:
        raise IntegrityError(f"{where} has {size} bytes; a record of a store has at most {MAX_RECORD}")
    return os.pread(fd, size, 0)
