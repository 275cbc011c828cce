"""Objects as files of a directory: the embedded store.

An object appears whole: it is written to ``tmp/``, fsync'd, then renamed (data) or hard-linked (create if absent) into place,
and its directory is fsync'd, as is every directory that was made for it. Locks are ``flock`` on the object's directory, so they
leave no files behind and die with their process: compare-and-swap and conditional removal hold it exclusively, data writes hold
it shared while they rename. No lock is held while data is written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from blake3 import blake3

from artifactfs.errors import ArtifactFSError, IntegrityError, NotFoundError, from_os_error
from artifactfs.objects import ABSENT, ObjectInfo

TEMPORARY = "tmp"


class LocalObjects:
    """The object store in ``root``, which need not exist until something is written."""

    def __init__(self, root: Path) -> None:
        self.root = os.path.abspath(root)
        self.url = self.root

    def path(self, key: str) -> str | None:
        return f"{self.root}/{key}"

    def get(self, key: str) -> tuple[bytes, str]:
        with self._errors("reading", key), open(f"{self.root}/{key}", "rb") as file:
            data = file.read()
        return data, _etag(data)

    def read(self, key: str, offset: int, size: int) -> bytes:
        with self._errors("reading", key):
            fd = os.open(f"{self.root}/{key}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                # Looked up first: a location made up by a hostile page must not make us allocate what it claims.
                data = os.pread(fd, size, offset) if offset + size <= os.fstat(fd).st_size else b""
            finally:
                os.close(fd)
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

    def writer(self) -> LocalWriter:
        with self._errors("writing", TEMPORARY):
            return LocalWriter(self, self._temporary())

    def swap(self, key: str, data: bytes, etag: str) -> str | None:
        target = f"{self.root}/{key}"
        with self._errors("writing", key):
            directory = self._make_parent(target)
            temporary = self._temporary()
            try:
                _write_durably(temporary, data)
                replaced = _link(temporary, target) if etag == ABSENT else _replace_if(temporary, target, directory, etag)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
            if not replaced:
                return None
            _sync_directory(directory)
        return _etag(data)

    def scan(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        pending = [prefix.rstrip("/")]
        while pending:
            folder = pending.pop()
            with self._errors("listing", folder), _entries(f"{self.root}/{folder}") as entries:
                for entry in entries:
                    key = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(key)
                    elif key > after:
                        with contextlib.suppress(FileNotFoundError):
                            status = entry.stat(follow_symlinks=False)
                            yield ObjectInfo(key, status.st_size, status.st_mtime)

    def folders(self, prefix: str) -> list[str]:
        with self._errors("listing", prefix), _entries(f"{self.root}/{prefix}") as entries:
            return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))

    def delete(self, key: str, unless_newer: float | None = None) -> bool:
        target = f"{self.root}/{key}"
        with self._errors("deleting", key), contextlib.suppress(FileNotFoundError), _locked(os.path.dirname(target)):
            if unless_newer is not None and os.stat(target).st_mtime > unless_newer:
                return False
            os.unlink(target)
            return True
        return False

    def _temporary(self) -> str:
        """A path in ``tmp/`` that nobody else has."""
        folder = f"{self.root}/{TEMPORARY}"
        _make_directories(folder)
        return f"{folder}/{os.getpid()}-{secrets.token_hex(8)}"

    def _make_parent(self, target: str) -> str:
        parent = os.path.dirname(target)
        _make_directories(parent)
        return parent

    @contextlib.contextmanager
    def _errors(self, doing: str, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise NotFoundError(f"{key} is not in the store {self.url}") from None
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
            with _locked(directory, shared=True):
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
        return False
    return True


def _replace_if(temporary: str, target: str, directory: str, etag: str) -> bool:
    with _locked(directory):
        try:
            with open(target, "rb") as file:
                current = file.read()
        except FileNotFoundError:
            return False
        if _etag(current) != etag:
            return False
        os.rename(temporary, target)
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


def _make_directories(path: str) -> None:
    """Make ``path`` and its parents; each one made is durable in its parent."""
    try:
        os.mkdir(path)
    except FileExistsError:
        if not os.path.isdir(path):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None
        return
    except FileNotFoundError:
        _make_directories(os.path.dirname(path))
        _make_directories(path)
        return
    _sync_directory(os.path.dirname(path))


@contextlib.contextmanager
def _entries(path: str) -> Iterator[Iterator[os.DirEntry[str]]]:
    """The directory's entries; none if it is not there."""
    try:
        scan = os.scandir(path)
    except FileNotFoundError:
        yield iter(())
        return
    with scan:
        yield scan


@contextlib.contextmanager
def _locked(directory: str, shared: bool = False) -> Iterator[None]:
    """Hold the directory's lock; it goes when the descriptor closes."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
