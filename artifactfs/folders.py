"""Local directories and references as folders to publish, read while the commit walks them: symlinks, executable bits and empty
directories stay.

One directory's names are in memory at a time for each level of depth, never the whole tree. Nothing is opened here: the
publisher reads the files. A walk belongs to one thread.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import NoneType
from typing import TypeGuard

from artifactfs.errors import InvalidNameError, NotFoundError, UsageError, from_os_error
from artifactfs.model import Dir, Entry, File, Ref, Symlink, is_executable
from artifactfs.names import check_part
from artifactfs.publish import Change, Folder, NewFile, NewRef, Streamed
from artifactfs.references import Expanded

_SPECIAL = {
    stat.S_IFSOCK: "a socket",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
}

Skip = Callable[[str], None]
"""Told of what is left out, as "path is a socket"."""


@dataclasses.dataclass(frozen=True, slots=True)
class MadeFolder:
    """A folder of ``children``, which are not of the file system at this level."""

    children: Mapping[str, Change]
    base: Dir | None = None

    def changes(self) -> Iterator[tuple[str, Change]]:
        return iter(sorted(self.children.items(), key=lambda item: os.fsencode(item[0])))


@dataclasses.dataclass(frozen=True, slots=True)
class LocalFolder:
    """The directory ``path``.

    With ``skip`` sockets, pipes and devices are passed over and told to it; without, they are refused. While it is walked:
    UsageError for a special file, InvalidNameError for a name that is not UTF-8, and the errors of the system for what cannot
    be read.
    """

    path: str
    skip: Skip | None = None
    base: Dir | None = None

    def changes(self) -> Iterator[tuple[str, Change]]:
        for raw in self._names():
            name = os.fsdecode(raw)
            change = self._local(name)
            if change is not None:
                yield name, change

    def _names(self) -> list[bytes]:
        """Sorted bytes, which take a quarter of the memory of directory entries."""
        try:
            return sorted(map(os.fsencode, os.listdir(self.path)))
        except OSError as error:
            raise from_os_error(error, f"reading directory {self.path}") from None

    def _local(self, name: str) -> Change:
        path = os.path.join(self.path, name)
        check_part(name, _shown(path))
        return local_change(path, self.skip)


def _shown(path: str) -> str:
    """``path`` with bytes that are not UTF-8 as ``\\xff``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def local_change(path: str, skip: Skip | None = None, follow: bool = False) -> Change:
    """What ``path`` is to the publisher; None for a special file that is passed over. ``follow``: a link is what it leads to."""
    try:
        status = os.stat(path) if follow else os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            return _symlink(path)
    except FileNotFoundError:
        raise NotFoundError(
            f"{path} does not exist; check the path" if follow else f"{path} went away while it was read"
        ) from None
    except OSError as error:
        raise from_os_error(error, f"reading {path}") from None
    if stat.S_ISREG(status.st_mode):
        return NewFile(path, is_executable(status.st_mode))
    if stat.S_ISDIR(status.st_mode):
        return LocalFolder(path, skip)
    what = f"{path} is {_SPECIAL.get(stat.S_IFMT(status.st_mode), 'a special file')}"
    if skip is None:
        raise UsageError(f"{what}, which a version cannot hold; remove it, or pass over such files with --skip-special")
    skip(what)
    return None


def _symlink(path: str) -> Symlink:
    target = os.readlink(path)
    try:
        target.encode()
    except UnicodeEncodeError:
        raise InvalidNameError(
            f"symlink {_shown(path)} leads to {_shown(target)}, which is not valid UTF-8; replace the link"
        ) from None
    return Symlink("", target)


@dataclasses.dataclass(frozen=True, slots=True)
class ReferenceFolder:
    """``references``, which come sorted by the components of their paths, as folders. Read as the walk goes on, and only so."""

    references: Iterable[Expanded]
    base: Dir | None = None

    def changes(self) -> Iterator[tuple[str, Change]]:
        return _Cursor(iter(self.references)).level("")


class _Cursor:
    """Where the walk is in sorted references. Its folders share it, so each must be walked before the next name is asked for."""

    def __init__(self, references: Iterator[Expanded]) -> None:
        self._rest = references
        self._at = next(references, None)

    def level(self, prefix: str) -> Iterator[tuple[str, Change]]:
        last = ""
        while self._at is not None and self._at.path.startswith(prefix):
            here = self._at
            name, below, _ = here.path[len(prefix) :].partition("/")
            if name == last:
                raise _clash(prefix + name, here)
            last = name
            if below:
                yield name, _Below(self, f"{prefix}{name}/")
                continue
            yield name, NewRef(here.ref, here.block_list) if here.block_list else here.ref
            self._at = next(self._rest, None)


@dataclasses.dataclass(frozen=True, slots=True)
class _Below:
    cursor: _Cursor
    prefix: str
    base: Dir | None = None

    def changes(self) -> Iterator[tuple[str, Change]]:
        return self.cursor.level(self.prefix)


def _clash(path: str, other: Expanded) -> UsageError:
    if other.path == path:
        return UsageError(f"two references would both be {path!r} in the version; log them apart")
    return UsageError(f"reference {other.path!r} lies below {path!r}, which is a reference itself; give it another name")


@dataclasses.dataclass(frozen=True, slots=True)
class MergedFolder:
    """What is in either folder; folders of one name are merged, anything else of one name would hide the other: a UsageError."""

    one: Folder
    other: Folder
    base: Dir | None = None

    def changes(self) -> Iterator[tuple[str, Change]]:
        ours, theirs = self.one.changes(), self.other.changes()
        mine, yours = next(ours, None), next(theirs, None)
        # A folder is walked before its iterator is asked for the next name: see _Cursor.
        while mine is not None or yours is not None:
            if yours is None or (mine is not None and os.fsencode(mine[0]) < os.fsencode(yours[0])):
                assert mine is not None
                yield mine
                mine = next(ours, None)
            elif mine is None or os.fsencode(yours[0]) < os.fsencode(mine[0]):
                yield yours
                yours = next(theirs, None)
            else:
                yield mine[0], self._both(mine[0], mine[1], yours[1])
                mine, yours = next(ours, None), next(theirs, None)

    def _both(self, name: str, one: Change, other: Change) -> Folder:
        if _is_folder(one) and _is_folder(other):
            return MergedFolder(one, other)
        where = os.path.join(self.one.path, name) if isinstance(self.one, LocalFolder) else name
        raise UsageError(f"{_shown(where)} and something else given would both be {name!r} in the version; give it another name")


def _is_folder(change: Change) -> TypeGuard[Folder]:
    return not isinstance(change, (File, Dir, Symlink, Ref, NewFile, NewRef, Streamed, NoneType))


def gather(
    paths: Sequence[str],
    references: Iterable[Expanded] = (),
    skip: Skip | None = None,
    shared: Mapping[str, Entry] | None = None,
) -> Folder:
    """The folder of a version made from local paths, references, and entries by name that are stored already.

    One directory gives its contents; one file, or several paths, lie under their last names. A path that is a link stands for
    what it leads to; links below it are kept as links. ``references`` come in the order of :class:`ReferenceFolder`. UsageError
    if two would have one name, which for some is found while the folder is walked.
    """
    folders = [_local_folder(paths, skip)] if paths else []
    if shared:
        folders.append(MadeFolder(shared))
    folders.append(ReferenceFolder(references))
    return functools.reduce(MergedFolder, folders)


def _local_folder(paths: Sequence[str], skip: Skip | None) -> Folder:
    if len(paths) == 1 and os.path.isdir(paths[0]):
        return LocalFolder(paths[0], skip)
    children: dict[str, Change] = {}
    for path in paths:
        name = check_part(os.path.basename(os.path.abspath(path)), _shown(path))
        change = local_change(path, skip, follow=True)
        if name in children:
            raise UsageError(f"{path} and something else given would both be {name!r} in the version; log them apart, or rename")
        if change is not None:
            children[name] = change
    return MadeFolder(children)
