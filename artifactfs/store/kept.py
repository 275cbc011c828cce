"""Trees of a server's versions, kept on disk: made once of the server's list of entries, then read page by page.

``<root>/trees/<name>`` holds the tree of one version: its pages back to back, then its root directory, then where that
begins (8 bytes, little endian) and a BLAKE3 (derive-key mode, :data:`CONTEXT`) over name, root and that number. The name is a
hash of the store's URL and of what identifies the version there for good. A page is checked by its own id when it is read,
the end of the file when it is opened; what fails is as good as not there, and made again. Files appear by rename and never
change.

Memory is bounded whatever the number of entries: they are sorted on disk and cut into pages as they come. The oldest files go
when all together are over the limit; a process goes on with those that it has open. Without a directory to write to, a tree lies
in an unnamed temporary file for the process alone. Threads and processes may share one directory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import msgspec
from blake3 import blake3
from cachetools import LRUCache

from artifactfs.content import DIGEST_SIZE
from artifactfs.errors import IntegrityError, InvalidNameError, from_os_error
from artifactfs.model import Dir, Entry, Extent, Page, Ref, Remote, Symlink, named
from artifactfs.names import entry_path
from artifactfs.references.sorting import SortedByPath
from artifactfs.tree import MAX_ENTRY_WEIGHT, DirBuilder, Tree, weight
from artifactfs.waiting import Result

CONTEXT = "artifactfs 2026-11 kept tree v1"
_OPEN = 64
_KIND = b"t"  # of the objects that extents of kept pages name: this, and the tree's name
_MAX_DEPTH = 256
_LEAST = (
    64 << 20
)  # bytes that trees may take in any case: a cache of no size must not have a version's manifest read again and again

log = logging.getLogger(__name__)

Listed = Iterable[tuple[str, Entry]]
"""Paths as the server gives them, in any order, each with its entry, whose own name is ignored. A directory has nothing in it."""


class _Listed(msgspec.Struct, frozen=True, array_like=True, gc=False):
    path: str
    entry: Remote | Ref | Symlink | Dir


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Listed).decode
_decode_root = msgspec.msgpack.Decoder(Dir).decode


class KeptTrees:
    """The trees of the store at ``url``, in the directory ``root`` (None: in temporary files), of at most ``limit`` bytes."""

    def __init__(self, root: Path | None, url: str, limit: int) -> None:
        self.tree = Tree(self._load)
        self._folder = root / "trees" if root is not None else None
        self._url = url
        self._limit = max(limit, _LEAST)
        self._lock = threading.Lock()
        self._open: LRUCache[bytes, _Kept] = LRUCache(_OPEN)
        self._own: dict[bytes, _Kept] = {}  # in temporary files: nobody could open them again
        self._makers: dict[bytes, Callable[[], Listed]] = {}
        self._making: dict[bytes, Result[_Kept]] = {}

    def root(self, identity: str, entries: Callable[[], Listed]) -> Dir:
        """The root directory of the version that ``identity`` names for ever. ``entries`` lists it, if it is not kept here; it
        may be called again later, should the file be removed. IntegrityError for entries that no directory can hold."""
        name = self._name(identity)
        with self._lock:
            self._makers[name] = entries
        return self._find(name, identity).root

    def known(self, identity: str) -> Dir | None:
        """The root directory, if it is kept here."""
        kept = self._kept(self._name(identity))
        return kept.root if kept is not None else None

    def _find(self, name: bytes, what: str) -> _Kept:
        kept = self._kept(name)
        if kept is not None:
            return kept
        with self._lock:
            maker = self._makers.get(name)
            result = self._making.get(name)
            first = result is None
            if result is None:
                result = self._making[name] = Result()
        if first:
            try:
                if maker is None:
                    raise IntegrityError(f"a directory page of {self._url} is not in the cache any more; open the version again")
                result.set(self._make(name, maker(), what))
            except BaseException as error:
                result.fail(error)
            with self._lock:
                del self._making[name]
        else:
            while not result.wait(60.0):  # whoever makes it has deadlines of its own
                pass
        return result.get()

    def _kept(self, name: bytes) -> _Kept | None:
        with self._lock:
            kept = self._own.get(name) or self._open.get(name)
        if kept is not None or self._folder is None:
            return kept
        try:
            file = open(self._folder / name.hex(), "rb", opener=_own_file)  # noqa: SIM115 - it stays open
        except OSError:
            return None
        kept = _opened(file, name)
        if kept is None:
            file.close()
            return None
        with contextlib.suppress(OSError):
            os.utime(file.fileno())
        with self._lock:
            self._open[name] = kept
        return kept

    def _make(self, name: bytes, entries: Listed, what: str) -> _Kept:
        folder, temporary, file = self._new_file()
        try:
            with contextlib.ExitStack() as undo:
                undo.callback(file.close)
                if temporary is not None:
                    undo.callback(_unlink, temporary)
                root = _build(file, name, entries, str(folder), what)
                end = file.tell()
                file.write(root)
                file.write(end.to_bytes(8, "little"))
                file.write(_check(name, root, end))
                file.flush()
                if temporary is not None:
                    assert self._folder is not None
                    os.rename(temporary, self._folder / name.hex())
                undo.pop_all()
        except OSError as error:
            raise from_os_error(error, f"keeping the list of files of {what}") from None
        kept = _opened(file, name)
        assert kept is not None
        with self._lock:
            (self._open if temporary is not None else self._own)[name] = kept
        if temporary is not None:
            self._trim(name.hex())
        return kept

    def _new_file(self) -> tuple[str | Path, Path | None, IO[bytes]]:
        """(a directory for what is sorted, the name of the file if it has one, the file)."""
        if self._folder is not None:
            try:
                os.makedirs(self._folder, 0o700, exist_ok=True)
                temporary = self._folder / f"tmp-{secrets.token_hex(8)}"
                return self._folder, temporary, open(temporary, "x+b", opener=_private)
            except OSError as error:
                log.warning(
                    "%s; the list of files is kept in a temporary file", from_os_error(error, f"writing to {self._folder}")
                )
        return tempfile.gettempdir(), None, tempfile.TemporaryFile()

    def _trim(self, newest: str) -> None:
        """Remove the oldest while all together are too large; what killed processes left is among them one day."""
        assert self._folder is not None
        found = []
        with contextlib.suppress(OSError), os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    found.append((status.st_mtime_ns, status.st_size, entry.name))
        total = sum(size for _, size, _ in found)
        for _, size, name in sorted(found):
            if total <= self._limit:
                return
            if name != newest:
                _unlink(self._folder / name)
                total -= size

    def _load(self, page: Page) -> bytes:
        """The bytes of a page, checked."""
        name = page.extent.object.removeprefix(_KIND)
        for attempt in (0, 1):
            kept = self._find(name, "a version")
            data = os.pread(kept.file.fileno(), page.extent.length, page.extent.offset)
            if blake3(data).digest() == page.id:
                return data
            if not attempt:  # the disk's fault, or somebody else's: it is made anew
                log.warning("a kept directory page of %s fails its check; the version's list of files is read again", self._url)
                self._drop(name)
        raise IntegrityError(f"a directory page of {self._url} is not what it was: the version's list of files has changed")

    def _drop(self, name: bytes) -> None:
        with self._lock:
            self._open.pop(name, None)
            self._own.pop(name, None)
        if self._folder is not None:
            _unlink(self._folder / name.hex())

    def _name(self, identity: str) -> bytes:
        return blake3(f"{self._url}\0{identity}".encode()).digest()


class _Kept:
    """An open file with a tree. It is closed when nobody has it any more."""

    def __init__(self, file: IO[bytes], root: Dir) -> None:
        self.file = file
        self.root = root

    def __del__(self) -> None:
        self.file.close()


def _own_file(path: str, flags: int) -> int:
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if os.fstat(fd).st_uid != os.geteuid():
        os.close(fd)
        raise PermissionError(f"{path} is somebody else's")
    return fd


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _opened(file: IO[bytes], name: bytes) -> _Kept | None:
    """The tree in a file, if the file is whole and of this name."""
    size = os.fstat(file.fileno()).st_size
    tail = os.pread(file.fileno(), 8 + DIGEST_SIZE, max(size - 8 - DIGEST_SIZE, 0))
    end = int.from_bytes(tail[:8], "little")
    length = size - 8 - DIGEST_SIZE - end
    if len(tail) != 8 + DIGEST_SIZE or not 0 < length < 4096:
        return None
    root = os.pread(file.fileno(), length, end)
    if _check(name, root, end) != tail[8:]:
        return None
    return _Kept(file, _decode_root(root))


def _check(name: bytes, root: bytes, end: int) -> bytes:
    return blake3(name + root + end.to_bytes(8, "little"), derive_key_context=CONTEXT).digest()


def _build(file: IO[bytes], name: bytes, entries: Listed, folder: str, what: str) -> bytes:
    """Write the pages of a tree to ``file``; its encoded root."""

    def store(data: bytes) -> Page:
        page = Page(blake3(data).digest(), Extent(_KIND + name, file.tell(), len(data)))
        file.write(data)
        return page

    checked = (_Listed(check_path(path, what), entry) for path, entry in entries)  # type: ignore[arg-type]  # never a Dir or a File
    ordered = SortedByPath(checked, folder, lambda item: item.path, _encode, _decode)
    levels = [("", DirBuilder(store))]
    last = ""
    for item in ordered:
        parts = item.path.split("/")
        if item.path == last:
            raise IntegrityError(f"{what} lists {item.path!r} twice; its owner must log it again")
        if last and item.path.startswith(f"{last}/"):
            raise IntegrityError(f"{what} lists {last!r} as a file and {item.path!r} below it; its owner must log it again")
        last = item.path
        common = 0
        while common < min(len(levels) - 1, len(parts) - 1) and levels[common + 1][0] == parts[common]:
            common += 1
        _close(levels, common + 1)
        levels.extend((part, DirBuilder(store)) for part in parts[common:-1])
        entry = named(item.entry, parts[-1])
        if weight(entry) > MAX_ENTRY_WEIGHT:
            raise IntegrityError(f"{what} lists {item.path!r} with more than {MAX_ENTRY_WEIGHT} bytes of names and places")
        levels[-1][1].add(entry)
    _close(levels, 1)
    return _encode(levels[0][1].finish())


def _close(levels: list[tuple[str, DirBuilder]], depth: int) -> None:
    """Finish the directories below ``depth`` levels."""
    while len(levels) > depth:
        part, builder = levels.pop()
        levels[-1][1].add(named(builder.finish(), part))


def check_path(path: str, what: str) -> str:
    """``path`` if it is a canonical relative one that a directory can hold. IntegrityError for any other: no server's list of
    files may lead anywhere else."""
    problem = ""
    try:
        if entry_path(path) != path:
            problem = "is not in its shortest form"
        elif "\n" in path or "\r" in path:  # the digest of a version could not tell it from two entries
            problem = "holds a line break"
        elif path.count("/") >= _MAX_DEPTH:
            problem = f"is over {_MAX_DEPTH} levels deep"
    except InvalidNameError as error:
        problem = f"cannot be a path ({error})"
    if problem:
        raise IntegrityError(f"{what} lists {path[:200]!r}, which {problem}; the version is refused")
    return path
