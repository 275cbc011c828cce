"""The stage: a writable directory tree over a version, as ``mount.py`` shows it and ``publish.py`` commits it.

Paths are absolute and canonical ("/a/b"), as a kernel gives them, decoded with surrogateescape; symlinks are not followed, and
permissions are not checked, which is the kernel's part (``default_permissions``). What POSIX has an errno for raises OSError;
what comes from the store underneath raises the errors of ``errors.py``.

**Locks**, in the order in which they may be taken:

1. ``_commit_lock``: one commit at a time.
2. ``OpenFile.lock``, one a file: held to change its content, also while base blocks are fetched for that. Never two at once.
3. ``Ledger.lock``, the namespace: names, attributes, the journal's order. Held for microseconds, never across a fetch from the
   store or an fsync: an operation that needs to know what the base has raises :class:`Unread`, the answer is read without the
   lock, and the operation starts again. So everything is looked up before anything is changed.

Reading content takes no lock. While a commit reads what is staged, changes wait at the ledger's gate.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import logging
import os
import stat
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import msgspec

from artifactfs.content import check_algorithm
from artifactfs.errors import ArtifactFSError, StoreFormatError, from_os_error
from artifactfs.model import Attributes, Dir, Entry, Ref, Space, Version, reference_key
from artifactfs.names import LATEST, check_metadata, check_new_alias, check_tags, check_type
from artifactfs.publish import Draft, Published, Report, publish
from artifactfs.reader import Reader
from artifactfs.staging.changes import HIDDEN, Comparison, Plan, StageChange, StagedFolder, rebased, special_files
from artifactfs.staging.data import DataDir, DataFile, Doomed, OpenFile
from artifactfs.staging.directory import StageDirectory, StageSpec
from artifactfs.staging.eager import Eager, refresh
from artifactfs.staging.files import Files
from artifactfs.staging.journal import Delta, Journal, replay
from artifactfs.staging.ledger import Ledger, Unread
from artifactfs.staging.nodes import (
    ROOT_INO,
    DirNode,
    FileNode,
    Header,
    LinkNode,
    Namespace,
    Node,
    SpecialNode,
    base_ino,
    base_kind,
    entry_mode,
    header_delta,
    now,
    os_error,
)
from artifactfs.staging.recovery import boot_id, mend
from artifactfs.store import Store
from artifactfs.store.native import NativeStore

log = logging.getLogger(__name__)

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
XATTR_CREATE = 1
XATTR_REPLACE = 2

_NAME_MAX = 255
_SURELY_SHORT = _NAME_MAX // 4  # characters of at most 4 bytes
_TARGET_MAX = 4095
_XATTR_NAME_MAX = 255
_XATTR_VALUE_MAX = 64 << 10

_REMEMBERED_DIRS = 4096
_REMEMBERED_ANSWERS = 1 << 15
_COUNTED = 64
"""Entries up to which a base directory is listed to count its subdirectories for ``st_nlink``; a larger one says 1."""

_DEVICE_KINDS = (stat.S_IFCHR, stat.S_IFBLK)
_SPECIAL_KINDS = (stat.S_IFIFO, stat.S_IFSOCK, *_DEVICE_KINDS)
_DIR_SIZE = 4096
_EPOCH = datetime.datetime.fromtimestamp(0, datetime.UTC)

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Place = tuple[DirNode, str]


class _Listing(NamedTuple):
    """A directory at one moment."""

    ino: int
    base: Dir | None
    children: dict[str, Node | None]


def _reading(operation: Callable[Concatenate[Stage, _P], _R]) -> Callable[Concatenate[Stage, _P], _R]:
    """The operation under the namespace lock, repeated until everything that it must know of the base is read."""

    @functools.wraps(operation)
    def run(self: Stage, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        while True:
            try:
                with self._ledger.lock:
                    return operation(self, *args, **kwargs)
            except Unread as need:
                self._learn(need)

    return run


def _changing(operation: Callable[Concatenate[Stage, _P], _R]) -> Callable[Concatenate[Stage, _P], _R]:
    """As :func:`_reading`, for operations that change something; they wait while a commit reads."""

    @functools.wraps(operation)
    def run(self: Stage, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        ledger = self._ledger
        while True:
            try:
                with ledger.lock:
                    if ledger.gated:
                        ledger.await_gate()
                    return operation(self, *args, **kwargs)
            except Unread as need:
                self._learn(need)
            finally:
                if self._doomed:
                    self._doomed.bury()

    return run


class Stage:
    """One stage. Any thread may call anything; :meth:`close`, :meth:`discard` and :meth:`remove` when no call is under way."""

    def __init__(self, directory: StageDirectory, spec: StageSpec, store: Store, reader: Reader, space: Namespace) -> None:
        """For :meth:`begin` and :meth:`resume`."""
        self.spec = spec
        self.path = directory.path
        self._directory = directory
        self._store = store
        self._space = space
        self._data = DataDir(directory.fd, str(directory.path))
        try:
            unused = mend(space, self._data, reader, spec.name.path)
            journal = Journal.create(directory.fd, space.records)
            for number in unused:  # only now, as nothing durable needs them any more
                self._data.remove(number)
            self._doomed = Doomed(self._data, journal)
            self._ledger = Ledger(space, journal, self._doomed.add)
        except BaseException:
            self._data.close()
            raise
        self._files = Files(self._ledger, self._data, reader)
        self._commit_lock = threading.Lock()
        self._dirs: dict[str, DirNode] = {"": space.root}
        self._hidden: dict[tuple[int, str], FileNode] = {}
        self._answers: dict[object, Any] = {}
        self._eager: Eager | None = None
        self._closed = False

    @classmethod
    def begin(cls, directory: Path, spec: StageSpec, store: Store, reader: Reader) -> Stage:
        """A new stage in ``directory``, which must not exist. NotFoundError if the base version does not; what a commit would
        refuse in the specification is refused here."""
        _check_spec(spec)
        base = None if spec.base is None else store.version(spec.name.at(f"v{spec.base}"))
        made = StageDirectory.create(directory)
        try:
            stage = cls(made, spec, store, reader, _new_namespace(spec, base))
            made.write_spec(spec)
        except BaseException as error:
            made.retire()
            made.close()
            made.remove()
            if isinstance(error, OSError):
                raise from_os_error(error, f"creating stage {directory}") from error
            raise
        return stage

    @classmethod
    def resume(cls, directory: Path, store: Store, reader: Reader) -> Stage:
        """The stage that is in ``directory``, with every operation that had completed.

        NotFoundError if there is none, ConflictError if another process uses it.
        """
        found = StageDirectory(directory)
        try:
            return cls(found, found.read_spec(), store, reader, _replayed(found))
        except OSError as error:
            found.close()
            raise from_os_error(error, f"resuming stage {directory}") from error
        except BaseException:
            found.close()
            raise

    @property
    def base(self) -> Version | None:
        """The version underneath: the one staged from, or the last that was committed while the stage went on."""
        return self._space.header.base

    @property
    def label(self) -> str:
        """What is staged, as in ``entity/project/name:v3``; without a version if there is none underneath."""
        return str(self.spec.name.at(self.base.name if self.base else ""))

    # Reading names and attributes

    @_reading
    def getattr(self, path: str, fh: int | None = None) -> Attributes:
        """The attributes of ``path``, or of the open file ``fh``. At a path to which libfuse has hidden an open file the link
        count is one too high: libfuse counts the name that it believes to be there, and subtracts it."""
        if fh is not None:
            return self._attributes(self._files.handle(fh).node)
        found = self._attributes(self._node(path))
        if self._hidden and self._is_hidden(path):
            found = found._replace(nlink=found.nlink + 1)
        return found

    def readdir(self, path: str) -> Iterator[tuple[str, int, int]]:
        """(name, mode, inode number) of everything in a directory, without ``.`` and ``..``, as it is at the first step."""
        return self.opendir(path)()

    @_reading
    def opendir(self, path: str) -> Callable[[], Iterator[tuple[str, int, int]]]:
        """What lists a directory as :meth:`readdir` does, each time anew, also after it was renamed or removed."""
        node = self._node(path)
        if not isinstance(node, DirNode):
            raise os_error(errno.ENOTDIR)
        return lambda: self._list(node)

    def _list(self, directory: DirNode) -> Iterator[tuple[str, int, int]]:
        with self._ledger.lock:
            listing = _Listing(directory.ino, directory.base, directory.children.copy())
        children = listing.children
        if listing.base is not None:
            for entry in self._store.tree.entries(listing.base):
                if entry.name not in children:
                    yield entry.name, entry_mode(entry), base_ino(listing.ino, entry.name)
        for name, node in children.items():
            if node is not None:
                yield name, node.mode, node.ino

    @_reading
    def readlink(self, path: str) -> str:
        node = self._node(path)
        if not isinstance(node, LinkNode):
            raise os_error(errno.EINVAL)
        return node.target

    @_reading
    def getxattr(self, path: str, name: str) -> bytes:
        """OSError ENODATA if there is none of that name, ENOTSUP for other names than ``user.*``."""
        key = _xattr_name(name)
        value = (self._node(path).xattrs or {}).get(key)
        if value is None:
            raise os_error(errno.ENODATA)
        return value

    @_reading
    def listxattr(self, path: str) -> list[str]:
        return [name.decode("utf-8", "surrogateescape") for name in self._node(path).xattrs or ()]

    def statfs(self) -> Space:
        """The space of the disk that the stage is on."""
        found = os.statvfs(self._directory.fd)
        unit = found.f_frsize
        return Space(found.f_blocks * unit, found.f_bavail * unit, found.f_files, found.f_favail)

    # Files

    def create(self, path: str, mode: int, flags: int, owner: tuple[int, int]) -> int:
        """A handle for a new file of ``mode`` (without the file type) that ``owner`` (user and group) owns; for the one that is
        there, unless ``flags`` has O_EXCL."""
        number = self._ledger.new_number()
        data = self._data.create(number)
        try:
            fh = self._create(path, mode, owner, number, data)
        except BaseException as error:
            self._data.remove(number)
            if isinstance(error, FileExistsError) and not flags & os.O_EXCL:
                return self.open(path, flags)
            raise
        return fh

    def mknod(self, path: str, mode: int, owner: tuple[int, int], device: int = 0) -> None:
        """A new, empty file, FIFO, socket or node of ``device``, as the type in ``mode`` says. All but files are there, and FIFOs
        and sockets work, while the stage is mounted, and are never committed: :meth:`left_out`."""
        kind = stat.S_IFMT(mode) or stat.S_IFREG
        if kind == stat.S_IFREG:
            self.release(self.create(path, mode, os.O_WRONLY | os.O_EXCL, owner))
        elif kind in _SPECIAL_KINDS:
            self._make(path, kind | mode & 0o7777, owner, device=device if kind in _DEVICE_KINDS else 0)
        else:
            raise os_error(errno.EINVAL)

    def open(self, path: str, flags: int) -> int:
        """A handle for an existing file. O_TRUNC empties it without reading anything."""
        file = self._acquire(path)
        try:
            self._files.prepare(file)
            writable = flags & os.O_ACCMODE != os.O_RDONLY
            if flags & os.O_TRUNC and writable:
                self._files.resize(file, 0)
        except BaseException:
            self._files.drop(file)
            raise
        return self._files.add_handle(file, writable)

    def read(self, fh: int, size: int, offset: int) -> bytes:
        """``size`` bytes from ``offset``, fewer only at the end of the file."""
        return self._files.read(fh, size, offset)

    def write(self, fh: int, data: bytes, offset: int) -> int:
        """The number of bytes written at ``offset``, fewer than given only if the disk is full.

        Also with O_APPEND at ``offset``: the kernel resolves it, and writes back mapped pages through any handle.
        """
        return self._files.write(fh, data, offset)

    def truncate(self, path: str, size: int) -> None:
        """Make the file ``size`` bytes long; what is added reads as zeros and takes no space."""
        file = self._acquire(path)
        try:
            self._files.prepare(file)
            self._files.resize(file, size)
        finally:
            self._files.drop(file)

    def ftruncate(self, fh: int, size: int) -> None:
        self._files.resize(self._files.handle(fh), size)

    def fallocate(self, fh: int, mode: int, offset: int, length: int) -> None:
        """Reserve space for a range and let the file reach to its end; other modes than 0 are EOPNOTSUPP."""
        if mode:
            raise os_error(errno.EOPNOTSUPP)
        self._files.allocate(fh, offset, length)

    def flush(self, fh: int) -> None:
        """Nothing is held back: what :meth:`write` returned from survives this process."""

    def fsync(self, fh: int, datasync: bool = False) -> None:
        """Return once the file's content, and every name and attribute so far, survives power loss."""
        self._files.sync(fh, datasync)
        self._sync_names()

    def fsyncdir(self, path: str) -> None:
        """Return once every name and attribute so far survives power loss."""
        self._sync_names()

    def release(self, fh: int) -> None:
        """Give a handle back. Unknown ones are ignored."""
        self._files.release(fh)
        if self._doomed:
            self._doomed.bury()

    # Changing names

    def mkdir(self, path: str, mode: int, owner: tuple[int, int]) -> None:
        self._make(path, stat.S_IFDIR | mode & 0o7777, owner)

    def symlink(self, target: str, path: str, owner: tuple[int, int]) -> None:
        """A symlink at ``path``. OSError EILSEQ for a target that is not UTF-8: a version cannot hold it."""
        data = _encoded(target, "symlink target")
        if not data or len(data) > _TARGET_MAX:
            raise os_error(errno.ENAMETOOLONG if data else errno.ENOENT)
        self._make(path, stat.S_IFLNK | 0o777, owner, target)

    @_changing
    def unlink(self, path: str) -> None:
        """Remove a name. A file that is open stays until it is closed."""
        directory, name = self._parent(path)
        hidden = self._hidden.pop((directory.ino, name), None)
        if hidden is not None:
            return
        node = self._existing(directory, name)
        if isinstance(node, DirNode):
            raise os_error(errno.EISDIR)
        self._remove(directory, name, node)

    @_changing
    def rmdir(self, path: str) -> None:
        if path == "/":
            raise os_error(errno.EBUSY)
        directory, name = self._parent(path)
        node = self._existing(directory, name)
        if not isinstance(node, DirNode):
            raise os_error(errno.ENOTDIR)
        if not node.empty:
            raise os_error(errno.ENOTEMPTY)
        self._remove(directory, name, node)
        self._forget_dirs()

    def rename(self, old: str, new: str, flags: int = 0) -> None:
        """Rename in one step, over what is at ``new``; ``flags``: RENAME_NOREPLACE or RENAME_EXCHANGE."""
        replacing = self._rename(old, new, flags)
        if replacing is not None:
            self._files.write_back(replacing)

    @_changing
    def _rename(self, old: str, new: str, flags: int) -> FileNode | None:
        """The file that has replaced another one, if it has content of its own."""
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE) or flags == RENAME_NOREPLACE | RENAME_EXCHANGE:
            raise os_error(errno.EINVAL)
        if "/" in (old, new):
            raise os_error(errno.EBUSY)
        source, target = self._parent(old), self._parent(new)
        node = self._existing(*source)
        if not node.nlink:
            raise os_error(errno.ENOENT)
        if isinstance(node, FileNode) and node.open and HIDDEN.fullmatch(target[1]):
            self._hide(node, source, target)
            return None
        other = self._child(*target)
        _check_name(target[1])
        _check_rename(node, source[0], other, target[0], flags)
        if flags & RENAME_EXCHANGE:
            assert other is not None
            self._exchange(node, source, other, target)
        elif other is not node:
            self._move(node, source, other, target)
        if isinstance(node, DirNode) or isinstance(other, DirNode):
            self._forget_dirs()
        if not isinstance(node, FileNode) or other is None or not node.data:
            return None
        self._files.replaced(node)
        return node

    @_changing
    def link(self, old: str, new: str) -> None:
        """A hard link. In a version the two are two files, whose content is stored once."""
        node = self._node(old)
        directory, name = self._parent(new)
        if self._child(directory, name) is not None:
            raise os_error(errno.EEXIST)
        if isinstance(node, DirNode):
            raise os_error(errno.EPERM)
        _check_name(name)
        if not node.nlink:
            raise os_error(errno.ENOENT)
        time = now()
        self._ledger.record(
            [
                *self._space.adoption(node, directory),
                ("d", directory.ino, name, node.ino, directory.masked.get(name, 0)),
                ("c", node.ino, time),
                ("t", directory.ino, time, time),
            ]
        )

    # Changing attributes

    @_changing
    def chmod(self, path: str, mode: int) -> None:
        node = self._node(path)
        self._set_attributes(node, mode=stat.S_IFMT(node.mode) | mode & 0o7777)

    @_changing
    def chown(self, path: str, uid: int, gid: int) -> None:
        """-1 leaves the user or the group as it is."""
        node = self._node(path)
        self._set_attributes(node, uid=node.uid if uid == -1 else uid, gid=node.gid if gid == -1 else gid)

    @_changing
    def utimens(self, path: str, atime_ns: int | None, mtime_ns: int | None) -> None:
        """Set times in ns since the epoch; None leaves one as it is."""
        node = self._node(path)
        atime = node.atime if atime_ns is None else _storable(atime_ns)
        mtime = node.mtime if mtime_ns is None else _storable(mtime_ns)
        if isinstance(node, FileNode) and node.data and mtime_ns is not None:
            self._files.set_times(node, atime, mtime)
        self._set_attributes(node, atime=atime, mtime=mtime)

    @_changing
    def setxattr(self, path: str, name: str, value: bytes, flags: int = 0) -> None:
        key = _xattr_name(name)
        if len(value) > _XATTR_VALUE_MAX:
            raise os_error(errno.E2BIG)
        node = self._node(path)
        there = key in (node.xattrs or ())
        if there and flags & XATTR_CREATE:
            raise os_error(errno.EEXIST)
        if not there and flags & XATTR_REPLACE:
            raise os_error(errno.ENODATA)
        self._ledger.change(node, ("x", node.ino, key, value), ("c", node.ino, now()))

    @_changing
    def removexattr(self, path: str, name: str) -> None:
        key = _xattr_name(name)
        node = self._node(path)
        if key not in (node.xattrs or ()):
            raise os_error(errno.ENODATA)
        self._ledger.change(node, ("x", node.ino, key, None), ("c", node.ino, now()))

    # What becomes of it

    def status(self) -> list[StageChange]:
        """What differs from the base, and what a commit leaves out, sorted by path."""
        return sorted([*self._differences(), *self.left_out()], key=lambda change: change.path)

    def left_out(self) -> list[StageChange]:
        """What is there and no commit takes along: FIFOs, sockets and device nodes."""
        return list(special_files(self._ledger))

    def folder(self) -> StagedFolder:
        """What a commit would publish. Nothing may change while it is read."""
        return StagedFolder(self._space.root, self._plan())

    def commit(self, report: Report | None = None, final: bool = False, expect_base: bool | None = None) -> Published | None:
        """Make what is staged a version; None if there is nothing and never was.

        May be repeated after any failure and in another process: one commit makes one version. The result is recorded
        durably before this returns. Changes by other threads wait meanwhile and belong to the next commit, which sees all
        files as of one moment. Afterwards the stage goes on over the new version, unless ``final`` says that it will only be
        removed. ``expect_base`` overrides what the stage was begun with.
        """
        with self._commit_lock, self._nothing_ahead(drain=not final):
            self._ledger.close_gate()
            try:
                self._files.settle()
                published = self._finished() or self._publish(report, expect_base)
                if published is not None and not final:
                    self._go_on(published.version)
            except OSError as error:
                raise from_os_error(error, f"committing stage {self.path}") from error
            finally:
                self._files.unsettle()
                self._ledger.open_gate()
            return published

    def store_ahead(self) -> None:
        """From now on store the contents of closed files in the background, so that the commit has less to do. Not where the
        store is an artifact server, which takes contents with a version only."""
        if not isinstance(self._store, NativeStore):
            log.debug("%s takes contents with their version only: nothing is stored ahead", self._store.url)
            return
        self._eager = Eager(self._ledger, self._files, self._store, self.spec.algorithm, lambda: self.base, self.label)

    def close(self) -> None:
        """Stop using the stage; its directory stays, to be resumed. Idempotent."""
        if not self._closed:
            self._closed = True
            if self._eager is not None:
                self._eager.stop()
            self._files.close()
            self._doomed.bury(all=True)
            self._ledger.journal.close()
            self._data.close()
            self._directory.close()

    def discard(self) -> None:
        """Give up what is staged: close, and remove the directory."""
        self.remove()

    def remove(self) -> None:
        """Close, and remove the directory. Idempotent."""
        self._directory.retire()
        self.close()
        self._directory.remove()

    # The commit

    def _finished(self) -> Published | None:
        """What an earlier attempt of this very commit made, if it got as far as recording it."""
        header, done = self._space.header, self._directory.read_result()
        if not header.attempted or done is None or done.commit != header.commit:
            return None
        return Published(done.version, done.created)

    def _publish(self, report: Report | None, expect_base: bool | None) -> Published | None:
        header = self._space.header
        base = header.base
        if next(self._differences(), None) is None:
            return None if base is None else self._unchanged(base)
        if not header.attempted:
            self._ledger.set_header(attempted=True)
        spec = self.spec
        expect = spec.expect_base if expect_base is None else expect_base
        plan = self._plan()
        draft = Draft(
            name=spec.name,
            type=spec.type,
            folder=StagedFolder(self._space.root, plan),
            commit=header.commit,
            algorithm=spec.algorithm,
            description=spec.description,
            metadata=spec.metadata,
            tags=spec.tags,
            aliases=spec.aliases,
            run=spec.run,
            base=base.number if base else None,
            expect_base=self._expected() if expect else None,
            retry=header.attempted,
            stored=refresh(self._ledger, self._store)[0] if isinstance(self._store, NativeStore) else {},
            notes=Path(self.path) / "arrived",
        )
        try:
            published = publish(self._store, draft, report)
        finally:
            plan.close()
        self._directory.write_result(published, header.commit)
        return published

    def _nothing_ahead(self, drain: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._eager is None else self._eager.suspended(drain)

    def _sync_names(self) -> None:
        self._ledger.journal.sync()
        self._doomed.bury()

    def _plan(self) -> Plan:
        return Plan(self._ledger, self._files, self.label)

    def _differences(self) -> Iterator[StageChange]:
        return Comparison(self._store.tree, self._ledger, self._files).run(self.base)

    def _unchanged(self, base: Version) -> Published:
        """Nothing was changed: no new version, and the aliases go to the one underneath."""
        aliases = dict.fromkeys((alias for alias in self.spec.aliases if alias != LATEST), base.number)
        if aliases:
            self._store.update_collection(
                self.spec.name, lambda found: msgspec.structs.replace(found, aliases={**found.aliases, **aliases})
            )
        return Published(base, False)

    def _expected(self) -> int:
        """The number of the collection's newest version if nobody else commits: the base, or what this stage made since."""
        made = self._directory.read_result()
        numbers = [version.number for version in (self.base, made.version if made else None) if version is not None]
        return max(numbers, default=-1)

    def _go_on(self, version: Version) -> None:
        """Lie over the version that was just made of exactly what is staged."""
        deltas = rebased(self._store.tree, self._space, version.root)
        header = msgspec.structs.replace(self._space.header, base=version, commit=uuid.uuid4().hex, attempted=False)
        self._ledger.note(header_delta(header), *deltas)
        self._ledger.journal.sync()
        self._files.rearrange()

    # Looking things up, under the lock

    def _node(self, path: str) -> Node:
        """The node at ``path``; OSError ENOENT."""
        if path == "/":
            return self._space.root
        directory, name = self._parent(path)
        return self._existing(directory, name)

    def _existing(self, directory: DirNode, name: str) -> Node:
        node = self._child(directory, name)
        if node is None:
            raise os_error(errno.ENAMETOOLONG if _is_long(name) else errno.ENOENT)
        return node

    def _parent(self, path: str) -> _Place:
        """The directory that ``path`` is in, and its name there."""
        above, _, name = path.rpartition("/")
        return self._dirs.get(above) or self._find_dir(above), name

    def _find_dir(self, path: str) -> DirNode:
        directory: Node = self._space.root
        for part in path[1:].split("/"):
            if not isinstance(directory, DirNode):
                raise os_error(errno.ENOTDIR)
            directory = self._existing(directory, part)
        if not isinstance(directory, DirNode):
            raise os_error(errno.ENOTDIR)
        if len(self._dirs) > _REMEMBERED_DIRS:
            self._forget_dirs()
        self._dirs[path] = directory
        return directory

    def _forget_dirs(self) -> None:
        self._dirs = {"": self._space.root}

    def _child(self, directory: DirNode, name: str) -> Node | None:
        """What is at a name: a node of the table, or one that stands for an untouched base entry."""
        try:
            return directory.children[name]
        except KeyError:
            pass
        if self._hidden and (hidden := self._hidden.get((directory.ino, name))) is not None:
            return hidden
        base = directory.base
        if base is None or base.page is None or _is_long(name):
            return None
        tree = self._store.tree
        entry: Entry | None = self._answer((base.page.id, name), lambda: tree.lookup(base, name))
        if entry is None:
            return None
        return self._space.floating(directory, entry, self._entry_size(entry))

    def _is_hidden(self, path: str) -> bool:
        directory, name = self._parent(path)
        return (directory.ino, name) in self._hidden

    def _entry_size(self, entry: Entry) -> int:
        """The size of a file's content, 0 for anything else."""
        if isinstance(entry, Ref) and entry.size < 0:
            size: int = self._answer(reference_key(entry), lambda: self._files.reference_size(entry))
            return size
        return getattr(entry, "size", 0)

    def _answer(self, key: object, fetch: Callable[[], Any]) -> Any:
        """What ``fetch`` finds out about the base, which never changes; :class:`Unread` if it is not known yet."""
        try:
            return self._answers[key]
        except KeyError:
            raise Unread(key, fetch) from None

    def _learn(self, need: Unread) -> None:
        found = need.fetch()
        if len(self._answers) > _REMEMBERED_ANSWERS:
            self._answers.clear()
        self._answers[need.key] = found

    def _attributes(self, node: Node) -> Attributes:
        size = blocks = 0
        mtime, ctime = node.mtime, node.ctime
        links = node.nlink
        device = 0
        if isinstance(node, FileNode):
            size, blocks, mtime, ctime = self._files.stat(node)
        elif isinstance(node, DirNode):
            links = self._count_links(node)
            size, blocks = _DIR_SIZE, _DIR_SIZE // 512
        elif isinstance(node, LinkNode):
            size = len(node.target.encode())
        elif isinstance(node, SpecialNode):
            device = node.device
        return Attributes(node.mode, node.ino, links, node.uid, node.gid, size, blocks, node.atime, mtime, ctime, device)

    def _count_links(self, directory: DirNode) -> int:
        base = directory.base
        if directory.base_dirs is None and base is not None and base.page is not None and base.count <= _COUNTED:
            tree = self._store.tree
            count = self._answer((base.page.id, Dir), lambda: sum(isinstance(entry, Dir) for entry in tree.entries(base)))
            directory.base_dirs = count
        return directory.links

    # Making changes, under the lock

    @_changing
    def _create(self, path: str, mode: int, owner: tuple[int, int], number: int, data: DataFile) -> int:
        directory, name = self._place(path)
        uid, gid, bits = _inherited(directory, owner, mode, False)
        self._add(directory, name, number, stat.S_IFREG | bits, uid, gid, ("o", number, number))
        node = self._space.nodes[number]
        assert isinstance(node, FileNode)
        file = self._files.acquire(node, path)
        file.arrange(data, None)
        return self._files.add_handle(file, True)

    @_changing
    def _make(self, path: str, mode: int, owner: tuple[int, int], target: str | None = None, device: int = 0) -> None:
        """A new node that is no regular file."""
        directory, name = self._place(path)
        uid, gid, bits = _inherited(directory, owner, mode & 0o7777, stat.S_ISDIR(mode))
        number = self._ledger.new_number()
        content: list[Delta] = [] if target is None else [("s", number, target)]
        if device:
            content.append(("p", number, device))
        self._add(directory, name, number, stat.S_IFMT(mode) | bits, uid, gid, *content)

    def _place(self, path: str) -> _Place:
        """Where a new name goes."""
        if path == "/":
            raise os_error(errno.EEXIST)
        directory, name = self._parent(path)
        if self._child(directory, name) is not None:
            raise os_error(errno.EEXIST)
        _check_name(name)
        return directory, name

    def _add(self, directory: DirNode, name: str, number: int, mode: int, uid: int, gid: int, *content: Delta) -> None:
        time = now()
        self._ledger.record(
            [
                *self._space.adoption(directory),
                ("n", number, mode, uid, gid, time, time, time),
                *content,
                ("d", directory.ino, name, number, directory.masked.get(name, 0)),
                ("t", directory.ino, time, time),
            ]
        )

    def _remove(self, directory: DirNode, name: str, node: Node) -> None:
        time = now()
        self._ledger.record(
            [
                *self._space.adoption(directory),
                _removal(directory, name, node),
                *_lost_link(node, time),
                ("t", directory.ino, time, time),
            ],
            freeing=True,
        )
        if node.origin is not None:
            self._space.sink(node, time)

    def _hide(self, node: FileNode, old: _Place, new: _Place) -> None:
        """libfuse removes a file that is open: it is gone, for the journal too, but libfuse finds it at ``new``."""
        self._remove(*old, node)
        self._hidden[new[0].ino, new[1]] = node

    def _move(self, node: Node, source: _Place, other: Node | None, target: _Place) -> None:
        time = now()
        (old_dir, old_name), (new_dir, new_name) = source, target
        masked = new_dir.masked.get(new_name, 0)
        if other is not None and other.origin is not None:
            masked = base_kind(other)
        self._ledger.record(
            [
                *self._space.adoption(node, new_dir),
                ("d", new_dir.ino, new_name, node.ino, masked),
                _removal(old_dir, old_name, node),
                ("c", node.ino, time),
                *(_lost_link(other, time) if other is not None else ()),
                ("t", old_dir.ino, time, time),
                ("t", new_dir.ino, time, time),
            ]
        )
        if other is not None and other.origin is not None:
            self._space.sink(other, time)

    def _exchange(self, node: Node, source: _Place, other: Node, target: _Place) -> None:
        time = now()
        (old_dir, old_name), (new_dir, new_name) = source, target
        self._ledger.record(
            [
                *self._space.adoption(node, other),
                ("d", new_dir.ino, new_name, node.ino, new_dir.masked.get(new_name, 0)),
                ("d", old_dir.ino, old_name, other.ino, old_dir.masked.get(old_name, 0)),
                ("c", node.ino, time),
                ("c", other.ino, time),
                ("t", old_dir.ino, time, time),
                ("t", new_dir.ino, time, time),
            ]
        )

    def _set_attributes(self, node: Node, **changes: int) -> None:
        values = dict(zip(("mode", "uid", "gid", "atime", "mtime"), node.attributes(), strict=False)) | changes
        self._ledger.change(node, ("a", node.ino, *values.values(), now()))

    @_reading
    def _acquire(self, path: str) -> OpenFile:
        node = self._node(path)
        if isinstance(node, DirNode):
            raise os_error(errno.EISDIR)
        if isinstance(node, LinkNode):
            raise os_error(errno.ELOOP)
        if not isinstance(node, FileNode):
            raise os_error(errno.ENXIO)
        return self._files.acquire(node, self.label + path)


def _new_namespace(spec: StageSpec, base: Version | None) -> Namespace:
    space = Namespace()
    time = _nanoseconds(base.created_at) if base else now()
    owner = os.getuid(), os.getgid()
    header = Header(base=base, time=time, owner=owner, commit=spec.commit, boot=boot_id())
    space.apply([header_delta(header), ("n", ROOT_INO, stat.S_IFDIR | 0o755, *owner, time, time, time)])
    if base is not None:
        space.root.set_base(base.root)
    return space


def _replayed(directory: StageDirectory) -> Namespace:
    """What the journal in ``directory`` says. StoreFormatError if it contradicts itself."""
    space = Namespace()
    try:
        for record in replay(directory.fd):
            space.apply(record)
        space.drop_unlinked()
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        if isinstance(error, ArtifactFSError):
            raise
        raise StoreFormatError(
            f"the journal of stage {directory.path} is damaged ({error!r}); what was written is in {directory.path}/data"
        ) from error
    return space


def _nanoseconds(moment: str) -> int:
    """Nanoseconds since the epoch of a version's time; 0 for text that is none."""
    try:
        when = datetime.datetime.fromisoformat(moment)
    except ValueError:
        return 0
    return (when - _EPOCH) // datetime.timedelta(microseconds=1) * 1000


def _check_spec(spec: StageSpec) -> None:
    for alias in spec.aliases:
        if alias != LATEST:
            check_new_alias(alias)
    check_tags(spec.tags)
    check_metadata(spec.metadata)
    check_algorithm(spec.algorithm)
    if spec.type:
        check_type(spec.type, spec.name.collection)


def _is_long(name: str) -> bool:
    return len(name) > _SURELY_SHORT and len(name.encode("utf-8", "surrogateescape")) > _NAME_MAX


def _check_name(name: str) -> None:
    """OSError for a name that no entry of a version can have."""
    if _is_long(name):
        raise os_error(errno.ENAMETOOLONG)
    if not name.isascii():
        _encoded(name, "name")


def _encoded(text: str, what: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        log.warning("refused: the %s %r is not UTF-8, which a version cannot hold", what, text)
        raise os_error(errno.EILSEQ) from None


def _check_rename(node: Node, old_dir: DirNode, other: Node | None, new_dir: DirNode, flags: int) -> None:
    """OSError where POSIX forbids ``node`` in ``old_dir`` to become what ``other`` is in ``new_dir``, in Linux's order."""
    if flags & RENAME_NOREPLACE and other is not None:
        raise os_error(errno.EEXIST)
    if flags & RENAME_EXCHANGE and other is None:
        raise os_error(errno.ENOENT)
    if isinstance(node, DirNode) and new_dir.within(node):
        raise os_error(errno.EINVAL)
    if isinstance(other, DirNode) and old_dir.within(other):
        raise os_error(errno.EINVAL if flags & RENAME_EXCHANGE else errno.ENOTEMPTY)
    if other is None or flags & RENAME_EXCHANGE:
        return
    if isinstance(other, DirNode):
        if not isinstance(node, DirNode):
            raise os_error(errno.EISDIR)
        if not other.empty and other is not node:
            raise os_error(errno.ENOTEMPTY)
    elif isinstance(node, DirNode):
        raise os_error(errno.ENOTDIR)


def _removal(directory: DirNode, name: str, node: Node) -> Delta:
    """The delta that takes ``node`` away from a name."""
    masked = base_kind(node) if node.origin is not None else directory.masked.get(name, 0)
    return ("d", directory.ino, name, 0, masked) if masked else ("r", directory.ino, name)


def _lost_link(node: Node, time: int) -> list[Delta]:
    """What becomes of a node one of whose names was removed; an untouched base entry has only one."""
    return [] if node.origin is not None else [("c", node.ino, time)]


def _inherited(directory: DirNode, owner: tuple[int, int], mode: int, is_dir: bool) -> tuple[int, int, int]:
    """User, group and mode bits of what ``owner`` makes in ``directory``: a setgid directory gives its group on, and to a
    directory the bit too; a file keeps the bit only if its maker is in that group."""
    uid, gid = owner
    mode &= 0o7777
    if not directory.mode & stat.S_ISGID:
        return uid, gid, mode
    if is_dir:
        return uid, directory.gid, mode | stat.S_ISGID
    if uid and gid != directory.gid and mode & 0o2010 == 0o2010:
        mode &= ~stat.S_ISGID
    return uid, directory.gid, mode


def _storable(time: int) -> int:
    """A time in ns as the journal can hold it: from 1677 to 2262."""
    return max(-(1 << 63), min(time, (1 << 63) - 1))


def _xattr_name(name: str) -> bytes:
    """The name's bytes; OSError ENOTSUP for any but ``user.*``."""
    if not name.startswith("user.") or name == "user.":
        raise os_error(errno.ENOTSUP)
    data = name.encode("utf-8", "surrogateescape")
    if len(data) > _XATTR_NAME_MAX:
        raise os_error(errno.ERANGE)
    return data
