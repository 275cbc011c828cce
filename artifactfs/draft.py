"""A version in the making: a stored base (or none) with additions and removals, and the copies of files that may still change.

Nothing here knows a collection, a run or a network; everything is one process's own and not for several threads at once, but for
:meth:`AddedFile.fingerprint`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import heapq
import itertools
import os
import secrets
import shutil
import stat
import threading
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

from artifactfs.content import Fingerprint, Hasher
from artifactfs.errors import ConflictError, NotFoundError, UsageError, also, from_os_error
from artifactfs.model import BLOCK, Dir, Entry, File, Ref, Symlink, is_executable, named
from artifactfs.names import entry_path
from artifactfs.publish import Change, Folder, NewFile, NewRef
from artifactfs.tree import EMPTY, Tree

WORKERS = 2
"""Threads that copy or hash: more only fight over the interpreter and the disk."""
MAX_DEPTH = 256
"""Levels of directories: deeper trees exist by mistake only (a link loop), and every walk of a tree is a recursion."""
_COPY_ATTEMPTS = 3
_KEPT = "KEPT"
_LOCK = "lock"


class AddedFile:
    """A local file that the version will store.

    ``original`` is what the user named; ``path`` is where the bytes are read: the original, or a copy of it. The file must
    stay as it is from here on: :meth:`check` and :meth:`fingerprint` raise ConflictError once it has changed.
    """

    __slots__ = ("_fingerprint", "_lock", "_stamp", "algorithm", "executable", "original", "path", "size", "skip_cache")

    def __init__(
        self,
        path: str,
        status: os.stat_result,
        algorithm: str,
        original: str = "",
        executable: bool = False,
        skip_cache: bool = False,
    ) -> None:
        self.path = path
        self.original = original or path
        self.size = status.st_size
        self.executable = executable
        self.algorithm = algorithm
        self.skip_cache = skip_cache
        self._stamp = _stamp(status)
        self._fingerprint: Fingerprint | None = None
        self._lock = threading.Lock()

    @property
    def digest(self) -> str:
        """The checksum users see, base64."""
        return self.fingerprint().digest

    def fingerprint(self) -> Fingerprint:
        """Read the file, once, and fingerprint it."""
        with self._lock:
            if self._fingerprint is None:
                self._fingerprint = fingerprint_file(self.path, self.algorithm)
                self.check()
            return self._fingerprint

    def check(self) -> None:
        """ConflictError if the file is no longer the one that was added."""
        try:
            changed = _stamp(os.stat(self.path)) != self._stamp
        except FileNotFoundError:
            changed = True
        except OSError as error:
            raise from_os_error(error, f"reading {self.path}") from None
        if changed:
            raise ConflictError(f"{self.original} has changed since it was added; add it again, or add it with policy='mutable'")

    def as_file(self, name: str) -> File:
        """The entry that it will be, without a location."""
        found = self.fingerprint()
        checksum = found.checksum
        return File(name, found.size, self.executable, found.id, algorithm=found.algorithm, checksum=checksum)


Leaf: TypeAlias = AddedFile | NewRef | File | Symlink | Ref
"""What stands at the path of an entry: an addition, or an entry of the base."""
Node: TypeAlias = "Leaf | DraftFolder"


class DraftFolder:
    """A directory of a draft: ``base`` with ``children`` over it, where None stands for a removed name. A publish ``Folder``."""

    __slots__ = ("base", "children")

    def __init__(self, base: Dir | None = None) -> None:
        self.base = base
        self.children: dict[str, Node | None] = {}

    def changes(self) -> Iterator[tuple[str, Change]]:
        """For ``publish``: files that changed since they were added raise ConflictError here."""
        for name in sorted(self.children):
            yield name, _as_change(self.children[name])

    def over(self, tree: Tree, base: Dir | None) -> Folder:
        """The same changes laid over another directory: its entries stay where this has none of that name."""
        return _Rebased(self, tree, base) if base is not None else self


@dataclasses.dataclass(frozen=True, slots=True)
class _Rebased:
    folder: DraftFolder
    tree: Tree
    base: Dir | None

    def changes(self) -> Iterator[tuple[str, Change]]:
        assert self.base is not None
        for name in sorted(self.folder.children):
            node = self.folder.children[name]
            below = self.tree.lookup(self.base, name) if isinstance(node, DraftFolder) else None
            if isinstance(node, DraftFolder) and isinstance(below, Dir):
                yield name, _Rebased(node, self.tree, below)
            else:
                yield name, _as_change(node)


@dataclasses.dataclass(frozen=True, slots=True)
class _Digested:
    """A folder whose additions stand as the entries they will be: what ``build_digest`` takes."""

    folder: DraftFolder

    @property
    def base(self) -> Dir | None:
        return self.folder.base

    def changes(self) -> Iterator[tuple[str, Change]]:
        for name in sorted(self.folder.children):
            node = self.folder.children[name]
            if isinstance(node, AddedFile):
                yield name, node.as_file(name)
            elif isinstance(node, NewRef):
                yield name, node.ref
            else:
                yield name, _Digested(node) if isinstance(node, DraftFolder) else node


def _as_change(node: Node | None) -> Change:
    if isinstance(node, AddedFile):
        node.check()
        return NewFile(node.path, node.executable)
    return node


class DraftTree:
    """The entries of a draft by path. ``tree`` reads the base, which may be None."""

    def __init__(self, tree: Tree, base: Dir | None = None) -> None:
        self.tree = tree
        self.root = DraftFolder(base)

    def find(self, path: str) -> Leaf | DraftFolder | None:
        """What stands at a canonical path; None if nothing does. A folder is the live one, or a new one over the base's."""
        node: Node | None = self.root
        for part in path.split("/"):
            if not isinstance(node, DraftFolder):
                return None
            node = self._child(node, part)
        return node

    def check_free(self, path: str, folder: bool = False) -> None:
        """UsageError for a path that runs through a file or is too deep, and for a file where a folder is or the other way."""
        parts = path.split("/")
        if len(parts) > MAX_DEPTH:
            raise UsageError(f"Invalid artifact path: {path[:40]!r}… has {len(parts)} levels; at most {MAX_DEPTH} are allowed")
        node: Node | None = self.root
        for depth, part in enumerate(parts, 1):
            node = self._child(node, part) if isinstance(node, DraftFolder) else None
            if node is None:
                return
            is_folder = isinstance(node, DraftFolder)
            if not is_folder and (folder or depth < len(parts)):
                file = "/".join(parts[:depth])
                raise UsageError(
                    f"cannot add {path!r}: {file!r} is a file in this artifact; a name is a file or a directory, not both"
                )
            if is_folder and not folder and depth == len(parts):
                raise UsageError(f"cannot add {path!r}: it is a directory in this artifact; remove it first")

    def put(self, path: str, leaf: Leaf) -> None:
        """Set the entry at ``path``, which :meth:`check_free` allows."""
        folder, name = self._folder_for(path)
        folder.children[name] = leaf

    def make_folder(self, path: str) -> None:
        """Make sure of a folder at ``path``, which :meth:`check_free` allows; it may be empty."""
        folder, name = self._folder_for(path)
        folder.children[name] = self._child(folder, name) or DraftFolder()

    def remove(self, path: str) -> bool:
        """Take away the entry or the folder at ``path`` and folders that this leaves empty; False if there is nothing."""
        if self.find(path) is None:
            return False
        parts = path.split("/")
        for depth in range(len(parts), 0, -1):
            folder, name = self._folder_for("/".join(parts[:depth]))
            if folder.base is not None and self.tree.lookup(folder.base, name) is not None:
                folder.children[name] = None
            else:
                folder.children.pop(name, None)
            if folder is self.root or next(self._nodes(folder), None) is not None:
                break
        return True

    def walk(self) -> Iterator[tuple[str, Leaf]]:
        """(path, entry) in ascending order of whole paths, as W&B's manifests have them. Folders and symlinks are no entries."""
        return self._walk("", self.root)

    def totals(self) -> tuple[int, int]:
        """(bytes, entries) as W&B counts them: files and references."""
        return self._totals(self.root)

    def digestible(self) -> Folder:
        """The whole tree as ``publish.build_digest`` takes it. Reads every added file that has no fingerprint yet."""
        prefetch_fingerprints(leaf for _, leaf in self._added("", self.root))
        return _Digested(self.root)

    def added(self) -> Iterator[tuple[str, AddedFile]]:
        """(path, file) of everything that is not in the base."""
        return self._added("", self.root)

    def _folder_for(self, path: str) -> tuple[DraftFolder, str]:
        """The folder that holds ``path``, made where missing, and the name in it."""
        *parents, name = path.split("/")
        folder = self.root
        for part in parents:
            node = self._child(folder, part)
            assert node is None or isinstance(node, DraftFolder), path
            if node is None:
                node = DraftFolder()
            folder.children[part] = node
            folder = node
        return folder, name

    def _child(self, folder: DraftFolder, name: str) -> Node | None:
        if name in folder.children or folder.base is None:
            return folder.children.get(name)
        return _node(self.tree.lookup(folder.base, name))

    def _nodes(self, folder: DraftFolder) -> Iterator[tuple[str, Node]]:
        """(name, node) of a folder, sorted by name."""
        over = sorted(folder.children.items())
        at = 0
        for entry in self.tree.entries(folder.base) if folder.base is not None else ():
            while at < len(over) and over[at][0] < entry.name:
                if (node := over[at][1]) is not None:
                    yield over[at][0], node
                at += 1
            if at < len(over) and over[at][0] == entry.name:
                continue
            node = _node(entry)
            assert node is not None
            yield entry.name, node
        yield from ((name, node) for name, node in over[at:] if node is not None)

    def _walk(self, prefix: str, folder: DraftFolder) -> Iterator[tuple[str, Leaf]]:
        for name, node in in_path_order((name, node, isinstance(node, DraftFolder)) for name, node in self._nodes(folder)):
            if isinstance(node, DraftFolder):
                yield from self._walk(f"{prefix}{name}/", node)
            elif not isinstance(node, Symlink):
                yield prefix + name, node

    def _added(self, prefix: str, folder: DraftFolder) -> Iterator[tuple[str, AddedFile]]:
        for name, node in folder.children.items():
            if isinstance(node, DraftFolder):
                yield from self._added(f"{prefix}{name}/", node)
            elif isinstance(node, AddedFile):
                yield prefix + name, node

    def _totals(self, folder: DraftFolder) -> tuple[int, int]:
        base = folder.base or EMPTY
        size, files = base.size, base.files
        for name, node in folder.children.items():
            below = self.tree.lookup(base, name)
            lost, gone = _weigh(below) if below is not None else (0, 0)
            bytes_, count = self._totals(node) if isinstance(node, DraftFolder) else _weigh(node)
            size, files = size + bytes_ - lost, files + count - gone
        return size, files


def _node(entry: Entry | None) -> Node | None:
    return DraftFolder(entry) if isinstance(entry, Dir) else entry


def _weigh(leaf: Leaf | Dir | None) -> tuple[int, int]:
    if isinstance(leaf, NewRef):
        leaf = leaf.ref
    if isinstance(leaf, Dir):
        return leaf.size, leaf.files
    if isinstance(leaf, (AddedFile, File, Ref)):
        return max(leaf.size, 0), 1
    return 0, 0


def in_path_order(entries: Iterable[tuple[str, Node, bool]]) -> Iterator[tuple[str, Node]]:
    """(name, node) in the order of the paths below them, from (name, node, is a directory) in order of name.

    What is in a directory sorts by ``name/``: ``a.b`` comes before ``a/x`` although ``a`` comes before ``a.b``.
    """
    waiting: list[tuple[str, int, str, Node]] = []
    for at, (name, node, is_dir) in enumerate(entries):
        while waiting and waiting[0][0] < name:
            _, _, due, held = heapq.heappop(waiting)
            yield due, held
        if is_dir:
            heapq.heappush(waiting, (name + "/", at, name, node))
        else:
            yield name, node
    while waiting:
        _, _, due, held = heapq.heappop(waiting)
        yield due, held


def prefetch_fingerprints(files: Iterable[AddedFile]) -> None:
    """Fingerprint the files, :data:`WORKERS` at a time."""
    with ThreadPoolExecutor(WORKERS) as pool:
        for _ in pool.map(AddedFile.fingerprint, files):
            pass


def fingerprint_file(path: str, algorithm: str) -> Fingerprint:
    """The fingerprint of a local file."""
    hasher = Hasher(algorithm)
    try:
        with open(path, "rb", buffering=0) as file:
            while block := _read_block(file.fileno()):
                hasher.block(block)
    except OSError as error:
        raise from_os_error(error, f"reading {path}") from None
    return hasher.finish()


def _read_block(fd: int) -> bytes:
    """The next block of ``fd``: short only at its end."""
    data = os.read(fd, BLOCK)
    while 0 < len(data) < BLOCK and (more := os.read(fd, BLOCK - len(data))):
        data += more
    return data


@dataclasses.dataclass(frozen=True, slots=True)
class FoundFolder:
    """What :func:`scan_folder` found: files by their path below the folder, and directories that have nothing in them."""

    files: list[tuple[str, str]]
    empty: list[str]


def scan_folder(local: str) -> FoundFolder:
    """The files of a local directory, sorted by path, links followed as W&B does.

    A link to a directory above itself, a broken link, a device, a socket or a pipe, and a name that is not UTF-8 are refused.
    """
    found = FoundFolder([], [])
    try:
        _scan(local, "", (), found)
    except OSError as error:
        raise from_os_error(error, f"reading {error.filename or local}") from None
    found.files.sort()
    return found


def _scan(local: str, prefix: str, above: tuple[tuple[int, int], ...], found: FoundFolder) -> None:
    status = os.stat(local)
    here = (status.st_dev, status.st_ino)
    if len(above) >= MAX_DEPTH:
        raise UsageError(f"{local[:40]}… has more than {MAX_DEPTH} levels of directories below what is added")
    if here in above:
        raise UsageError(f"{local} is a link to a directory that holds it: it cannot be followed; remove the link")
    names = os.listdir(local)
    if prefix and not names:
        found.empty.append(prefix.rstrip("/"))
    for name in names:
        path = os.path.join(local, name)
        entry_path(prefix + name)
        if os.path.isdir(path):
            _scan(path, f"{prefix}{name}/", (*above, here), found)
        else:
            found.files.append((prefix + name, check_regular(path)))


def check_regular(path: str) -> str:
    """``path``, if it is a regular file or a link to one; UsageError (a ValueError) says what it is instead."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        what = "is a broken link" if os.path.islink(path) else "does not exist"
        raise UsageError(f"Path is not a file: {path!r} {what}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"Path is not a file: {path!r}: {error}") from None
    if not stat.S_ISREG(mode):
        raise UsageError(f"Path is not a file: {path!r}")
    return path


class CopyArea:
    """A private directory for copies of files whose originals may change, and for files written into a draft.

    It goes when :meth:`close` is called, when the object is collected, or at the end of the process, unless :meth:`keep` was
    called. A process that was killed leaves its area; the next one that needs an area removes it.
    """

    def __init__(self, parent: Path) -> None:
        try:
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _sweep(parent)
            self.path, self._held = _make_area(parent)
        except OSError as error:
            raise from_os_error(error, f"making a place for copies in {parent}") from None
        self._remove = weakref.finalize(self, _remove_area, self.path, self._held, os.getpid())
        self._numbers = itertools.count()

    def new_path(self) -> str:
        """A path in the area that is not taken. May be called from several threads."""
        return os.path.join(self.path, f"{next(self._numbers):x}")

    def copy(self, source: str, algorithm: str, skip_cache: bool = False) -> AddedFile:
        """The bytes of ``source`` as they are now. ConflictError if it keeps changing while it is copied."""
        target = self.new_path()
        try:
            executable = _copy_stable(source, target)
            return AddedFile(target, os.stat(target), algorithm, source, executable, skip_cache)
        except OSError as error:
            raise from_os_error(error, f"copying {source} to {target}") from None

    def keep(self) -> None:
        """Leave the directory where it is, also after the process has ended: its files are all there is of a failed commit."""
        with contextlib.suppress(OSError):
            Path(self.path, _KEPT).touch()

    def close(self) -> None:
        """Remove the directory and everything in it, kept or not. Idempotent."""
        with contextlib.suppress(OSError):
            Path(self.path, _KEPT).unlink()
        self._remove()


def _make_area(parent: Path) -> tuple[str, int]:
    """A new area and the lock that says that its process lives."""
    while True:
        path = parent / f"{os.getpid()}-{secrets.token_hex(6)}"
        path.mkdir(mode=0o700)
        held = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(held, fcntl.LOCK_EX)
        if os.fstat(held).st_nlink:
            return str(path), held
        os.close(held)  # another process swept it away before it was locked


def _sweep(parent: Path) -> None:
    """Remove the areas of processes that are gone."""
    for path in parent.iterdir():
        if (path / _KEPT).exists():
            continue
        with contextlib.suppress(OSError):
            held = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(held)


def _remove_area(path: str, held: int, owner: int) -> None:
    if os.getpid() != owner:  # a forked child has our finalizers, but not our files
        return
    if not os.path.exists(os.path.join(path, _KEPT)):
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.close(held)


def _copy_stable(source: str, target: str) -> bool:
    """Copy a file that may be written meanwhile, until it was not; returns whether it is executable."""
    for _ in range(_COPY_ATTEMPTS):
        reader = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            before = os.fstat(reader)
            with open(target, "wb", buffering=0, opener=_private) as file:
                _copy_bytes(reader, file.fileno())
            if _stamp(os.fstat(reader)) == _stamp(before):
                return is_executable(before.st_mode)
        finally:
            os.close(reader)
    raise ConflictError(f"{source} keeps changing while it is copied; add it again when nothing writes to it")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _copy_bytes(reader: int, writer: int) -> None:
    """Copy in the kernel, which clones where the file system can; by hand where it cannot, and for files of no stated size."""
    copied = 0
    if os.fstat(reader).st_size:
        with contextlib.suppress(OSError):
            while count := os.copy_file_range(reader, writer, 1 << 30):
                copied += count
    os.lseek(reader, copied, os.SEEK_SET)
    os.lseek(writer, copied, os.SEEK_SET)
    while data := os.read(reader, BLOCK):
        _write_all(writer, data)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _stamp(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def missing_path(path: str) -> Exception:
    """The error for a path that a draft does not have: W&B's is a FileNotFoundError."""
    return also(NotFoundError(f"no such file or directory in the artifact: {path!r}"), FileNotFoundError)


def entry_of(leaf: Leaf, name: str) -> File | Ref | Symlink:
    """``leaf`` as the entry it is or will be."""
    if isinstance(leaf, AddedFile):
        return leaf.as_file(name)
    entry = leaf.ref if isinstance(leaf, NewRef) else leaf
    return named(entry, name)  # type: ignore[return-value]  # never a Dir
