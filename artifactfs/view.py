"""Read-only file trees over a store: one version, the levels of its namespace, the difference of two versions. No FUSE here.

Every tree answers the same few calls (:class:`FileTree`); ``mount.py`` puts a kernel in front of them, tests do without one.
Paths start with ``/`` and are canonical, as a kernel gives them; symlinks are not followed. Errors are those of
``errors.py``: NotFoundError for a path that is not there, ReadOnlyError for opening to write, OSError where only an errno
fits (``EISDIR``, ``EINVAL``). Everything may be called from any thread.

A version never changes, so what was once found in it stays found; only :class:`BrowseView` looks at the store again, at
most once in :data:`FRESH` seconds for each thing it shows.
"""

from __future__ import annotations

import datetime
import errno
import functools
import itertools
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import xxhash
from cachetools import LRUCache, TTLCache, cached

from artifactfs import names
from artifactfs.errors import ArtifactFSError, InvalidNameError, NotFoundError, ReadOnlyError, UsageError
from artifactfs.model import Attributes, Collection, Dir, Entry, File, Ref, Remote, Space, Symlink, Version
from artifactfs.names import ArtifactName
from artifactfs.reader import Handle, Reader
from artifactfs.store import Store

log = logging.getLogger(__name__)

FRESH = 1.0
"""Seconds for which a browsing view may show what it last saw of the store: its mounts' timeouts too."""

ROOT_INO = 1
LINKS = 1
"""Also of directories: there it says that their subdirectories are not counted, where 2 would tell `find` that there are none."""
XATTR = "user.artifactfs."

_REMEMBERED = 2048  # entries by path: a look-up is mostly followed by an open of it or a look-up beside it; about 1 MB
_OPEN_VIEWS = 32  # versions that a browsing view keeps ready, each with what it remembers
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_TRUNC


class DirItem(NamedTuple):
    """One name of a directory: ``mode`` holds at least the file type, ``ino`` is what ``getattr`` will say."""

    name: str
    mode: int
    ino: int


class FileTree(Protocol):
    """A read-only file tree."""

    label: str
    """What is shown, as in ``entity/project/name:v3``: the mount's source."""
    versions: Sequence[Version]
    """The versions in it, where they are known beforehand."""
    changes: bool
    """Whether anything in it can become different while it is mounted."""

    def getattr(self, path: str) -> Attributes: ...

    def readdir(self, path: str) -> Iterable[DirItem]:
        """The names in the directory, without ``.`` and ``..``; read as the iteration goes."""

    def readlink(self, path: str) -> str: ...

    def open(self, path: str, flags: int) -> int:
        """A file handle for :meth:`read`, which :meth:`release` gives back."""

    def read(self, fh: int, size: int, offset: int) -> bytes:
        """``size`` bytes from ``offset``, fewer only at the end of the file."""

    def release(self, fh: int) -> None: ...

    def statfs(self) -> Space: ...

    def getxattr(self, path: str, name: str) -> bytes:
        """The attribute's value; OSError ``ENODATA`` if the path has none of that name."""

    def listxattr(self, path: str) -> list[str]: ...

    def close(self) -> None:
        """Close the handles that are still open."""


class Handles:
    """The open files of a tree by number."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._open: dict[int, Handle] = {}

    def add(self, handle: Handle) -> int:
        number = next(self._numbers)
        self._open[number] = handle
        return number

    def read(self, fh: int, size: int, offset: int) -> bytes:
        try:
            handle = self._open[fh]
        except KeyError:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None
        return handle.read(offset, size)

    def release(self, fh: int) -> None:
        handle = self._open.pop(fh, None)
        if handle is not None:
            handle.close()

    def close(self) -> None:
        for fh in list(self._open):
            self.release(fh)


class VersionView:
    """One version. ``prefix`` shows only paths that start with this plain string, and the directories that lead to them.

    ``within`` is where the version stands in a larger view, with a trailing slash: inode numbers are hashes of the whole path.
    """

    changes = False

    def __init__(
        self,
        store: Store,
        reader: Reader,
        version: Version,
        prefix: str = "",
        within: str = "",
        handles: Handles | None = None,
    ) -> None:
        """NotFoundError if nothing in the version starts with ``prefix``."""
        self.label = version.qualified_name
        self.version = version
        self.versions: Sequence[Version] = (version,)
        self._tree = store.tree
        self._reader = reader
        self.prefix = prefix
        self._within = within
        self._handles = handles or Handles()
        self._owner = (os.getuid(), os.getgid())
        self._time = nanoseconds(version.created_at)
        self._entry: Callable[[str], Entry] = functools.lru_cache(_REMEMBERED)(self._find)
        if prefix and not self._has_prefix():
            raise NotFoundError(f"no path in {self.label} starts with {prefix!r}; `artifactfs ls {self.label}` lists them")

    def getattr(self, path: str) -> Attributes:
        return self._attributes(path, self._entry(path))

    def readdir(self, path: str) -> Iterator[DirItem]:
        directory = self._entry(path)
        if not isinstance(directory, Dir):
            raise _os_error(errno.ENOTDIR)
        below = path.rstrip("/") + "/"
        start = self._within + below[1:]
        for entry in self._tree.entries(directory, among=self._beside(path)[1] if path != "/" else ()):
            if not self.prefix or self._shown(below[1:] + entry.name, entry):
                yield DirItem(entry.name, _mode(entry), _ino(start + entry.name))

    def readlink(self, path: str) -> str:
        entry = self._entry(path)
        if not isinstance(entry, Symlink):
            raise _os_error(errno.EINVAL)
        return entry.target

    def open(self, path: str, flags: int) -> int:
        if flags & _WRITING:
            raise ReadOnlyError(f"{self.label}{path} cannot be written: a version never changes; use `artifactfs stage`")
        entry = self._entry(path)
        if isinstance(entry, Dir):
            raise _os_error(errno.EISDIR)
        if isinstance(entry, Symlink):
            raise _os_error(errno.ELOOP)
        return self._handles.add(self._reader.open(entry, self.label + path, functools.partial(self._beside, path)))

    def read(self, fh: int, size: int, offset: int) -> bytes:
        return self._handles.read(fh, size, offset)

    def release(self, fh: int) -> None:
        self._handles.release(fh)

    def statfs(self) -> Space:
        return Space(self.version.size, 0, self.version.file_count, 0)

    def getxattr(self, path: str, name: str) -> bytes:
        value = self._xattrs(path).get(name)
        if value is None:
            raise _os_error(errno.ENODATA)
        return value()

    def listxattr(self, path: str) -> list[str]:
        return list(self._xattrs(path))

    def close(self) -> None:
        self._handles.close()

    def _find(self, path: str) -> Entry:
        """The entry at ``path``, if it is shown; reached through its parent, which is mostly remembered."""
        if path == "/":
            return self.version.root
        parent, _, name = path.rpartition("/")
        directory = self._entry(parent or "/")
        if not isinstance(directory, Dir):
            raise _os_error(errno.ENOTDIR)
        entry = self._tree.lookup(directory, name)
        if entry is None or (self.prefix and not self._shown(path[1:], entry)):
            if len(name) > names.MAX_PATH_PART:
                raise _os_error(errno.ENAMETOOLONG)
            raise NotFoundError(f"{self.label} has no path {path[1:]!r}")
        return entry

    def _beside(self, path: str) -> tuple[bytes, Sequence[Entry]]:
        """The page that the entry at ``path`` is of: its id and entries."""
        parent, _, name = path.rpartition("/")
        directory = self._entry(parent or "/")
        return self._tree.page_with(directory, name) if isinstance(directory, Dir) else (b"", ())

    def _shown(self, path: str, entry: Entry) -> bool:
        if path.startswith(self.prefix):
            return True
        return isinstance(entry, Dir) and self.prefix.startswith(path + "/")

    def _has_prefix(self) -> bool:
        above, _, start = self.prefix.rpartition("/")
        directory = self._tree.resolve(self.version.root, above)
        if not isinstance(directory, Dir) or self.prefix.startswith("/"):
            return False
        return any(entry.name.startswith(start) for entry in self._tree.entries(directory))

    def _attributes(self, path: str, entry: Entry) -> Attributes:
        size = self._size(entry)
        ino = _ino((self._within + path[1:]).rstrip("/"))
        return Attributes(_mode(entry), ino, LINKS, *self._owner, size, -(-size // 512), self._time, self._time, self._time)

    def _size(self, entry: Entry) -> int:
        if isinstance(entry, File):
            return entry.size
        if isinstance(entry, Symlink):
            return len(entry.target.encode("utf-8", "surrogateescape"))
        if isinstance(entry, Ref):
            return entry.size if entry.size >= 0 else self._ask_size(entry)
        return 0

    def _ask_size(self, ref: Ref) -> int:
        """The size that a reference was recorded without. One that can never be read shows 0, and opening it is refused."""
        try:
            return self._reader.size(ref)
        except UsageError:
            return 0

    def _xattrs(self, path: str) -> dict[str, Callable[[], bytes]]:
        """What there is to read, by name; computed only when it is read."""
        entry = self._entry(path)
        if isinstance(entry, Symlink):  # the kernel answers for their user.* with ENODATA, and `rsync -X` fails on a name
            return {}
        values: dict[str, Callable[[], bytes]] = {XATTR + "version": self.label.encode}
        if isinstance(entry, Dir):
            digest = self.version.digest if path == "/" else entry.digest.hex()
            values[XATTR + "digest"] = digest.encode
        elif isinstance(entry, (File, Ref)):
            values[XATTR + "digest"] = entry.digest.encode
            values[XATTR + "cached"] = lambda: str(self._reader.cached_bytes(entry)).encode()
            if entry.id and not isinstance(entry, Remote):
                values[XATTR + "content_id"] = entry.id.hex().encode
        if isinstance(entry, Ref):
            values[XATTR + "ref"] = entry.uri.encode
        if isinstance(entry, (Ref, Remote)):
            values[XATTR + "verified"] = lambda: str(self._reader.is_verified(entry)).lower().encode()
        return values


class BrowseView:
    """The levels above a version: all entities, one entity's projects, a project's collections, a collection's versions.

    A collection shows ``v0 v1 …`` as directories and its aliases as symlinks to them; an alias spelled like a version is not
    shown. Names that no file can have, which only a damaged or hostile store gives, are left out and logged.
    """

    changes = True
    versions: Sequence[Version] = ()

    def __init__(self, store: Store, reader: Reader, parts: tuple[str, ...]) -> None:
        """``parts`` has zero to three of entity, project and collection. NotFoundError if there is no such level."""
        self.label = "/".join(parts) or "/"
        self._store = store
        self._reader = reader
        self._parts = parts
        self._handles = Handles()
        self._owner = (os.getuid(), os.getgid())
        self._started = time.time_ns()
        self._views: LRUCache[tuple[str, str], VersionView] = LRUCache(_OPEN_VIEWS)
        self._views_lock = threading.Lock()
        self._level = _remembered(self._read_level)
        self._collection = _remembered(self._read_collection)
        self._version = _remembered(self._read_version)
        if parts:
            self._check(parts)
            if not self._level(parts) and len(parts) < 3:
                raise NotFoundError(
                    f"{store.url} has no {_LEVELS[len(parts) - 1]} {self.label!r}; `artifactfs ls` lists what is there"
                )

    def getattr(self, path: str) -> Attributes:
        parts = self._split(path)
        if len(parts) > 3:
            target = self._alias(parts)
            if target is not None:
                return self._attributes(parts, stat.S_IFLNK | 0o777, len(target))
            view, below = self._view(parts)
            return view.getattr(below)
        self._check(parts)
        return self._attributes(parts, stat.S_IFDIR | 0o555, 0)

    def readdir(self, path: str) -> Iterator[DirItem]:
        parts = self._split(path)
        if len(parts) > 3:
            view, below = self._view(parts)
            yield from view.readdir(below)
            return
        self._check(parts)
        mode = stat.S_IFDIR | 0o555
        start = "".join(f"{part}/" for part in parts)
        for name in self._level(parts):
            yield DirItem(name, mode, _ino(start + name))
        for alias in self._aliases(parts) if len(parts) == 3 else ():
            yield DirItem(alias, stat.S_IFLNK | 0o777, _ino(start + alias))

    def readlink(self, path: str) -> str:
        parts = self._split(path)
        target = self._alias(parts)
        if target is not None:
            return target
        if len(parts) <= 4:
            self.getattr(path)
            raise _os_error(errno.EINVAL)
        view, below = self._view(parts)
        return view.readlink(below)

    def open(self, path: str, flags: int) -> int:
        parts = self._split(path)
        if len(parts) <= 4:
            self.getattr(path)
            raise _os_error(errno.EISDIR)
        view, below = self._view(parts)
        return view.open(below, flags)

    def read(self, fh: int, size: int, offset: int) -> bytes:
        return self._handles.read(fh, size, offset)

    def release(self, fh: int) -> None:
        self._handles.release(fh)

    def statfs(self) -> Space:
        """Nothing: adding up all versions would read the whole catalog."""
        return Space(0, 0, 0, 0)

    def getxattr(self, path: str, name: str) -> bytes:
        parts = self._split(path)
        if len(parts) <= 3 or self._alias(parts) is not None:
            self.getattr(path)
            raise _os_error(errno.ENODATA)
        view, below = self._view(parts)
        return view.getxattr(below, name)

    def listxattr(self, path: str) -> list[str]:
        parts = self._split(path)
        if len(parts) <= 3 or self._alias(parts) is not None:
            self.getattr(path)
            return []
        view, below = self._view(parts)
        return view.listxattr(below)

    def close(self) -> None:
        self._handles.close()

    def _split(self, path: str) -> tuple[str, ...]:
        """Entity, project, collection, version or alias, then the rest of ``path``, as far as it goes."""
        return self._parts + tuple(path[1:].split("/")) if path != "/" else self._parts

    def _check(self, parts: tuple[str, ...]) -> None:
        """NotFoundError unless the level ``parts`` (at most three) is there. What is above the mount's own level is taken as
        there: a store need not let everyone list it."""
        if len(parts) == 3:
            self._collection(parts)
            return
        for depth in range(len(self._parts), len(parts)):
            if parts[depth] not in self._level(parts[:depth]):
                raise NotFoundError(f"{self._store.url} has no {_LEVELS[depth]} {'/'.join(parts[: depth + 1])!r}")

    def _read_level(self, parts: tuple[str, ...]) -> tuple[str, ...]:
        """The names below a level, in their order; the versions below a collection."""
        if len(parts) == 0:
            return tuple(_valid(self._store.entities(), names.check_entity))
        if len(parts) == 1:
            return tuple(_valid(self._store.projects(parts[0]), names.check_project))
        if len(parts) == 2:
            return tuple(_valid([c.name for c in self._store.collections(*parts)], names.check_collection))
        return tuple(version.name for version in self._store.versions(ArtifactName(*parts)))

    def _read_collection(self, parts: tuple[str, ...]) -> Collection:
        try:
            names.parse_prefix("/".join(parts))
        except InvalidNameError as error:  # a file manager looking for its own files: nothing is there
            raise NotFoundError(str(error)) from None
        return self._store.collection(ArtifactName(*parts))

    def _read_version(self, parts: tuple[str, ...]) -> Version:
        """The version that four parts name; only by its number, so that an alias is never taken for one."""
        if names.version_number(parts[3]) is None:
            raise NotFoundError(f"{'/'.join(parts[:3])} has no version or alias {parts[3]!r}")
        return self._store.version(ArtifactName(*parts))

    def _aliases(self, parts: tuple[str, ...]) -> list[str]:
        """The aliases and semantic versions that a collection shows."""
        collection = self._collection(parts)
        live = set(self._level(parts)) if collection.semver else set()
        shown = {*collection.aliases, *(text for text, number in collection.semver.items() if f"v{number}" in live)}
        return [alias for alias in _valid(sorted(shown), names.check_alias) if not _is_version(alias)]

    def _alias(self, parts: tuple[str, ...]) -> str | None:
        """What the symlink that ``parts`` names points to; None if they name none."""
        if len(parts) != 4 or _is_version(parts[3]):
            return None
        self._check(parts[:3])
        collection = self._collection(parts[:3])
        number = collection.semver.get(parts[3], collection.aliases.get(parts[3]))
        return None if number is None or not list(_valid(parts[3:], names.check_alias)) else f"v{number}"

    def _view(self, parts: tuple[str, ...]) -> tuple[VersionView, str]:
        """The version that the first four parts name, and the path in it."""
        self._check(parts[:3])
        version = self._version(parts[:4])
        key = (version.qualified_name, version.commit)
        with self._views_lock:
            view = self._views.get(key)
            if view is None:
                within = "".join(f"{part}/" for part in parts[:4])
                view = VersionView(self._store, self._reader, version, within=within, handles=self._handles)
                self._views[key] = view
        return view, "/" + "/".join(parts[4:])

    def _attributes(self, parts: tuple[str, ...], mode: int, size: int) -> Attributes:
        moment = nanoseconds(self._collection(parts[:3]).updated_at) if len(parts) >= 3 else self._started
        ino = ROOT_INO if parts == self._parts else _ino("/".join(parts))
        return Attributes(mode, ino, LINKS, *self._owner, size, 0, moment, moment, moment)


class _Section:
    """Part of a version: a version's view, and the paths of it that are shown.

    ``shown`` maps a name to what is shown below it, or to None for all of it.
    """

    def __init__(self, view: VersionView) -> None:
        self.view = view
        self.shown: _Shown = {}

    def add(self, path: str) -> None:
        """Show ``path`` and everything below it."""
        *above, name = path.split("/")
        node = self.shown
        for part in above:
            below = node.setdefault(part, {})
            if below is None:
                return
            node = below
        node[name] = None

    def below(self, path: str) -> _Shown | None:
        """The names shown in a directory (``/`` or ``/a/b``), None for all of them. NotFoundError if ``path`` is not shown."""
        node: _Shown | None = self.shown
        for part in path[1:].split("/") if path != "/" else ():
            if node is None:
                return None
            if part not in node:
                raise NotFoundError(f"{path[1:]!r} does not differ")
            node = node[part]
        return node


class DiffView:
    """What differs between two versions: ``added/``, ``removed/`` and ``modified/``, the last with the new contents."""

    changes = False

    def __init__(self, store: Store, reader: Reader, old: Version, new: Version) -> None:
        self.label = f"{old.qualified_name}..{new.name}"
        self.versions: Sequence[Version] = (old, new)
        self._handles = Handles()
        self._owner = (os.getuid(), os.getgid())
        self._time = nanoseconds(new.created_at)
        self._files = self._bytes = 0
        self._sections = {
            name: _Section(VersionView(store, reader, version, within=f"{name}/", handles=self._handles))
            for name, version in (("added", new), ("modified", new), ("removed", old))
        }
        for path, before, after in store.tree.diff(old.root, new.root):
            self._sort(path, before, after)

    def getattr(self, path: str) -> Attributes:
        if path == "/":
            return Attributes(stat.S_IFDIR | 0o555, ROOT_INO, LINKS, *self._owner, 0, 0, self._time, self._time, self._time)
        view, below, _ = self._locate(path)
        return view.getattr(below)

    def readdir(self, path: str) -> Iterator[DirItem]:
        if path == "/":
            for name in self._sections:
                yield DirItem(name, stat.S_IFDIR | 0o555, _ino(name))
            return
        view, below, shown = self._locate(path)
        if shown is None:
            yield from view.readdir(below)
            return
        start = below.rstrip("/") + "/"
        for name in sorted(shown):
            attributes = view.getattr(start + name)
            yield DirItem(name, attributes.mode, attributes.ino)

    def readlink(self, path: str) -> str:
        view, below, _ = self._locate(path)
        return view.readlink(below)

    def open(self, path: str, flags: int) -> int:
        view, below, _ = self._locate(path)
        return view.open(below, flags)

    def read(self, fh: int, size: int, offset: int) -> bytes:
        return self._handles.read(fh, size, offset)

    def release(self, fh: int) -> None:
        self._handles.release(fh)

    def statfs(self) -> Space:
        """The bytes and number of the files that are shown."""
        return Space(self._bytes, 0, self._files, 0)

    def getxattr(self, path: str, name: str) -> bytes:
        if path == "/":
            raise _os_error(errno.ENODATA)
        view, below, _ = self._locate(path)
        return view.getxattr(below, name)

    def listxattr(self, path: str) -> list[str]:
        if path == "/":
            return []
        view, below, _ = self._locate(path)
        return view.listxattr(below)

    def close(self) -> None:
        self._handles.close()

    def _sort(self, path: str, before: Entry | None, after: Entry | None) -> None:
        """Put one difference where it is shown. A file that became a directory is removed and added."""
        if before is not None and after is not None and not isinstance(before, Dir) and not isinstance(after, Dir):
            self._show("modified", path, after)
            return
        if before is not None:
            self._show("removed", path, before)
        if after is not None:
            self._show("added", path, after)

    def _show(self, section: str, path: str, entry: Entry) -> None:
        self._sections[section].add(path)
        if isinstance(entry, (File, Ref)):
            self._files += 1
            self._bytes += max(entry.size, 0)

    def _locate(self, path: str) -> tuple[VersionView, str, _Shown | None]:
        """The view that shows ``path``, the path in it, and the names shown below (None: all)."""
        name, _, rest = path[1:].partition("/")
        section = self._sections.get(name)
        if section is None:
            raise NotFoundError(f"{self.label} has added/, modified/ and removed/, and no {name!r}")
        return section.view, "/" + rest, section.below("/" + rest)


_T = TypeVar("_T")


def _remembered(read: Callable[[tuple[str, ...]], _T]) -> Callable[[tuple[str, ...]], _T]:
    """``read``, asked again only when its last answer is :data:`FRESH` seconds old. No lock is held while it reads."""
    answers: TTLCache[Any, _T] = TTLCache(1024, FRESH)
    return cached(answers, lock=threading.Lock())(read)


_Shown = dict[str, "_Shown | None"]
_LEVELS = ("entity", "project", "collection")


def nanoseconds(moment: str) -> int:
    """Nanoseconds since the epoch of an ISO 8601 time as versions hold it; 0 for text that is none."""
    try:
        when = datetime.datetime.fromisoformat(moment)
    except ValueError:
        return 0
    if when.tzinfo is None:
        when = when.replace(tzinfo=datetime.UTC)
    delta = when - datetime.datetime.fromtimestamp(0, datetime.UTC)
    return (delta.days * 86400 + delta.seconds) * 10**9 + delta.microseconds * 1000


def _mode(entry: Entry) -> int:
    if isinstance(entry, Dir):
        return stat.S_IFDIR | 0o555
    if isinstance(entry, Symlink):
        return stat.S_IFLNK | 0o777
    return stat.S_IFREG | (0o555 if entry.executable else 0o444)


def _ino(path: str) -> int:
    """The inode number of a path without its leading slash. 64 bits of hash: among 10,000,000 paths two share
    one with odds of 1 to 100,000, and even then a link count of 1 keeps tools from taking them for one file."""
    if not path:
        return ROOT_INO
    return xxhash.xxh3_64_intdigest(path.encode("utf-8", "surrogateescape")) | 2


def _valid(found: Iterable[str], check: Callable[[str], str]) -> Iterator[str]:
    """The names that can be file names here."""
    for name in found:
        try:
            yield names.check_part(check(name))
        except ArtifactFSError as error:
            log.warning("not shown: %s", error)


def _is_version(name: str) -> bool:
    return names.version_number(name) is not None


def _os_error(code: int) -> OSError:
    return OSError(code, os.strerror(code))
