"""``file://`` references: regular files of this machine, fingerprinted when they are added and checked when they are read.

``file:///absolute/path`` (or ``file://localhost/…``) only: a relative one would mean another file in another directory.
The path is taken literally, as W&B does; only if nothing is there is it percent-decoded, as ``Path.as_uri()`` encodes it.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote, unquote

from artifactfs.content import Fingerprint, Hasher
from artifactfs.errors import ArtifactFSError, ConflictError, SourceChangedError, UsageError, from_os_error
from artifactfs.model import BLOCK, Ref, is_executable
from artifactfs.names import entry_path
from artifactfs.references.source import Expanded, source_key

_URI = re.compile(r"file:(?://(?:localhost)?|(?!//))(/.*)", re.IGNORECASE | re.DOTALL)
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY  # what is opened by mistake neither blocks nor acts
_BATCH = 4096  # files handed to the hashing threads at once: bounds the memory of what waits


def expand(uri: str, name: str, checksum: bool, max_objects: int, algorithm: str) -> list[Expanded]:
    """The entry of a file, or those of all files below a directory, sorted by path.

    Symlinks to files are read through, those to directories are not followed; anything that is neither file nor directory
    is a UsageError, as it cannot be kept.
    """
    path = local_path(uri)
    if not os.path.isdir(path):
        return [_entry(uri, path, name or entry_path(os.path.basename(path)), checksum, algorithm)]
    base = uri.rstrip("/")
    literal = path == _literal(uri)

    def entry(rel: str) -> Expanded:
        logical = entry_path(f"{name}/{rel}" if name else rel)
        return _entry(f"{base}/{rel if literal else quote(rel)}", os.path.join(path, rel), logical, checksum, algorithm)

    found = _walk(path, max_objects, uri)
    entries: list[Expanded] = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for start in range(0, len(found), _BATCH):
            entries += pool.map(entry, found[start : start + _BATCH])
    return entries


def local_path(uri: str) -> str:
    """The absolute path that a ``file:`` URI means. UsageError for a relative or remote one."""
    literal = _literal(uri)
    decoded = unquote(literal, errors="surrogateescape")
    path = decoded if decoded != literal and not os.path.lexists(literal) else literal
    if "\0" in path:
        raise UsageError(f"file reference {uri!r} contains a NUL byte")
    return path


def _literal(uri: str) -> str:
    match = _URI.fullmatch(uri)
    if not match:
        raise UsageError(f"file reference {uri[:200]!r} is not absolute; write file:///path (three slashes)")
    return match[1]


def _walk(root: str, max_objects: int, uri: str) -> list[str]:
    """The paths of all files below ``root``, relative to it, sorted by their bytes."""
    found: list[str] = []

    def failed(error: OSError) -> None:
        raise from_os_error(error, f"listing {error.filename} for {uri}")

    for folder, _, files in os.walk(root, onerror=failed):
        prefix = os.path.relpath(folder, root)
        found += files if prefix == "." else (os.path.join(prefix, file) for file in files)
        if len(found) > max_objects:
            raise UsageError(f"{uri} has more than {max_objects} files; pass a larger max_objects, or reference a part of it")
    return sorted(found, key=os.fsencode)


def _entry(uri: str, path: str, logical: str, checksum: bool, algorithm: str) -> Expanded:
    name = logical.rpartition("/")[2]
    try:
        if not checksum:
            info = _check_regular(os.stat(path), path)
            return Expanded(logical, Ref(name, uri, _unread_digest(path), info.st_size, is_executable(info.st_mode)))
        found, executable = _fingerprint(path, algorithm)
    except OSError as error:
        raise from_os_error(error, f"reading {path} for a reference") from None
    ref = Ref(name, uri, found.digest, found.size, executable, id=found.id, algorithm=found.algorithm)
    return Expanded(logical, ref, found.blocks)


def _unread_digest(path: str) -> str:
    """W&B's digest of a file that is not to be read: base64 MD5 of its resolved URI."""
    uri = Path(path).resolve().as_uri()
    return base64.b64encode(hashlib.md5(uri.encode(), usedforsecurity=False).digest()).decode()


def _fingerprint(path: str, algorithm: str) -> tuple[Fingerprint, bool]:
    """What one pass over the file found, and whether it is executable. ConflictError if it changed meanwhile."""
    fd, before = _open(path)
    try:
        hasher = Hasher(algorithm)
        offset = 0
        while block := _pread(fd, BLOCK, offset):
            hasher.block(block)
            offset += len(block)
        after = os.fstat(fd)
    finally:
        os.close(fd)
    if (before.st_size, before.st_mtime_ns, offset) != (after.st_size, after.st_mtime_ns, before.st_size):
        raise ConflictError(f"{path} changed while it was read for a reference; try again when nothing writes it")
    return hasher.finish(), is_executable(after.st_mode)


def _open(path: str) -> tuple[int, os.stat_result]:
    _check_regular(os.stat(path), path)  # before opening: to open a device may already act on it
    fd = os.open(path, _FLAGS)
    try:
        return fd, _check_regular(os.fstat(fd), path)
    except BaseException:
        os.close(fd)
        raise


def _check_regular(info: os.stat_result, path: str) -> os.stat_result:
    if not stat.S_ISREG(info.st_mode):
        raise UsageError(f"{path} is not a regular file, so it cannot be referenced; leave it out")
    return info


def _pread(fd: int, size: int, offset: int) -> bytes:
    """``size`` bytes at ``offset``, fewer only at the end of the file."""
    data = os.pread(fd, size, offset)
    while 0 < len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    return data


class FileSource:
    """A file that must have the recorded size; its bytes are for the reader to check against the content id."""

    def __init__(self, ref: Ref) -> None:
        self.size = ref.size
        self.key = source_key(ref)
        self.where = ref.uri
        _literal(ref.uri)  # a malformed one is an error of its own, not a changed file

    def fetch(self, offset: int, size: int) -> Iterator[bytes]:
        try:
            fd, info = _open(local_path(self.where))
        except (FileNotFoundError, NotADirectoryError, UsageError):
            raise SourceChangedError(f"{self.where} is no longer there; put it back, or add it again") from None
        except OSError as error:
            raise from_os_error(error, f"reading {self.where}") from None
        try:
            if info.st_size != self.size:
                raise self._changed(info.st_size)
            yield from self._pieces(fd, offset, offset + size)
        finally:
            os.close(fd)

    def _pieces(self, fd: int, offset: int, end: int) -> Iterator[bytes]:
        while offset < end:
            try:
                piece = _pread(fd, min(BLOCK, end - offset), offset)
            except OSError as error:
                raise from_os_error(error, f"reading {self.where}") from None
            if not piece:
                raise self._changed(os.fstat(fd).st_size)
            offset += len(piece)
            yield piece

    def _changed(self, size: int) -> ArtifactFSError:
        return SourceChangedError(f"{self.where} is {size} bytes long and was {self.size} when it was added; add it again")
