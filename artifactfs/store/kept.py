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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import msgspec
from blake3 import blake3
from cachetools import LRUCache

from artifactfs.content import DIGEST_SIZE
from artifactfs.errors import IntegrityError, InvalidNameError, from_os_error
from artifactfs.forking import new_lock
from artifactfs.model import Dir, Entry, Extent, Page, Ref, Remote, Symlink, named
from artifactfs.names import entry_path
from artifactfs.references.sorting import Sorted, tree_order
from artifactfs.tree import MAX_ENTRY_WEIGHT, DirBuilder, Tree, weight
from artifactfs.waiting import Result, about_to_wait

CONTEXT = "artifactfs 2026-11 kept tree v1"
_OPEN = 64
_KIND = b"t"  # of the objects that extents of kept pages name: this, and what identifies the version
_LAZY = b"r"  # the same, of the page that stands for the root page of a version that was not listed yet
_LAZY_CONTEXT = "artifactfs 2026-11 lazy root v1"
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

    def __init__(
        self,
        root: Path | None,
        url: str,
        limit: int,
        entries: Callable[[str], Listed],
        made: Callable[[str, Dir], None] = lambda identity, root: None,
    ) -> None:
        """``entries`` lists the version that an identity names for ever; it is called when the version's tree is not kept, or not
        any more. IntegrityError, when a directory is read, for entries that no directory can hold. ``made`` is told of each tree
        that was made."""
        self.tree = Tree(self._load)
        self._entries = entries
        self._made = made
        self._folder = root / "trees" if root is not None else None
        self._url = url
        self._limit = max(limit, _LEAST)
        self._lock = new_lock()
        self._open: LRUCache[str, _Kept] = LRUCache(_OPEN)
        self._own: dict[str, _Kept] = {}  # in temporary files: nobody could open them again
        self._making: dict[str, Result[_Kept]] = {}

    def lazy(self, identity: str, size: int, files: int) -> Dir:
        """The root directory of a version, which its server says to have ``files`` files of ``size`` bytes in all. What is in it
        is asked for when it is first read; until then its page stands for that."""
        id = blake3(f"{self._url}\0{identity}".encode(), derive_key_context=_LAZY_CONTEXT).digest()
        return Dir("", id, Page(id, Extent(_LAZY + identity.encode(), 0, 1)), 1, size, files, 0)

    def root(self, identity: str) -> Dir:
        """The root directory, as it is kept."""
        return self._find(identity).root

    def _find(self, identity: str) -> _Kept:
        kept = self._kept(identity)
        if kept is not None:
            return kept
        with self._lock:
            result = self._making.get(identity)
            first = result is None
            if result is None:
                result = self._making[identity] = Result()
        if first:
            try:
                kept = self._make(identity)
                self._made(identity, kept.root)
                result.set(kept)
            except BaseException as error:
                result.fail(error)
            with self._lock:
                del self._making[identity]
        else:
            while not result.wait(60.0):  # whoever makes it has deadlines of its own
                pass
        return result.get()

    def _kept(self, identity: str) -> _Kept | None:
        with self._lock:
            kept = self._own.get(identity) or self._open.get(identity)
        if kept is not None or self._folder is None:
            return kept
        try:
            file = open(self._folder / self._name(identity).hex(), "rb", opener=_own_file)  # noqa: SIM115 - it stays open
        except OSError:
            return None
        kept = _opened(file, self._name(identity))
        if kept is None:
            file.close()
            return None
        with contextlib.suppress(OSError):
            os.utime(file.fileno())
        with self._lock:
            self._open[identity] = kept
        return kept

    def _make(self, identity: str) -> _Kept:
        about_to_wait()
        name = self._name(identity)
        what = f"version {identity} of {self._url}"
        entries = self._entries(identity)
        folder, temporary, file = self._new_file()
        try:
            with contextlib.ExitStack() as undo:
                undo.callback(file.close)
                if temporary is not None:
                    undo.callback(_unlink, temporary)
                root = _build(file, _KIND + identity.encode(), entries, str(folder), what)
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
            (self._open if temporary is not None else self._own)[identity] = kept
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
        kind, identity = page.extent.object[:1], page.extent.object[1:].decode()
        if kind not in (_KIND, _LAZY):
            raise IntegrityError(f"page {page.id.hex()} is not of {self._url}")
        for attempt in (0, 1):
            kept = self._find(identity)
            if kind == _LAZY:
                if kept.root.page is None:
                    return b""
                page = kept.root.page
            data = os.pread(kept.file.fileno(), page.extent.length, page.extent.offset)
            if blake3(data).digest() == page.id:
                return data
            if not attempt:  # the disk's fault, or somebody else's: it is made anew
                log.warning("a kept directory page of %s fails its check; the version's list of files is read again", self._url)
                self._drop(identity)
        raise IntegrityError(f"a directory page of {self._url} is not what it was: the version's list of files has changed")

    def _drop(self, identity: str) -> None:
        with self._lock:
            self._open.pop(identity, None)
            self._own.pop(identity, None)
        if self._folder is not None:
            _unlink(self._folder / self._name(identity).hex())

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


def _build(file: IO[bytes], object: bytes, entries: Listed, folder: str, what: str) -> bytes:
    """Write the pages of a tree to ``file``; its encoded root."""

    def store(data: bytes) -> Page:
        page = Page(blake3(data).digest(), Extent(object, file.tell(), len(data)))
        file.write(data)
        return page

    checked = (_Listed(check_path(path, what), entry) for path, entry in entries)  # type: ignore[arg-type]  # never a Dir or a File
    ordered = Sorted(checked, folder, lambda item: tree_order(item.path), _encode, _decode)
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
