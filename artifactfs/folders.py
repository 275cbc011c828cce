"""A local directory as a folder to publish, read while the commit walks it: symlinks, executable bits and empty directories stay.

One directory's names are in memory at a time for each level of depth, never the whole tree. Nothing is opened here: the
publisher reads the files. A walk belongs to one thread.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence

from artifactfs.errors import InvalidNameError, NotFoundError, UsageError, from_os_error
from artifactfs.model import Dir, Symlink, is_executable
from artifactfs.names import check_part
from artifactfs.publish import Change, Folder, NewFile, NewRef
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
    """The directory ``path`` and ``extra`` entries, which lie beside what is in it (a MadeFolder: also inside of it).

    With ``skip`` sockets, pipes and devices are passed over and told to it; without, they are refused. While it is walked:
    UsageError for a special file, InvalidNameError for a name that is not UTF-8, and the errors of the system for what cannot
    be read.
    """

    path: str
    extra: Mapping[str, Change] = dataclasses.field(default_factory=dict)
    skip: Skip | None = None
    base: Dir | None = None

    def changes(self) -> Iterator[tuple[str, Change]]:
        for raw in self._names():
            name = os.fsdecode(raw)
            change = self._local(name) if name not in self.extra else self._merged(name)
            if change is not None:
                yield name, change

    def _names(self) -> list[bytes]:
        """Sorted bytes, which take a quarter of the memory of directory entries."""
        try:
            found = set(map(os.fsencode, os.listdir(self.path)))
        except OSError as error:
            raise from_os_error(error, f"reading directory {self.path}") from None
        return sorted(found.union(map(os.fsencode, self.extra)))

    def _merged(self, name: str) -> Change:
        """A folder of ``extra`` goes into the local directory of its name; anything else of one name would hide the other."""
        extra = self.extra[name]
        path = os.path.join(self.path, name)
        if not os.path.lexists(path):
            return extra
        if isinstance(extra, MadeFolder) and os.path.isdir(path) and not os.path.islink(path):
            return LocalFolder(path, extra.children, self.skip)
        raise UsageError(f"{path} and something else given would both be {name!r} in the version; give it another name")

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
        return LocalFolder(path, skip=skip)
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


def gather(paths: Sequence[str], references: Sequence[Expanded] = (), skip: Skip | None = None) -> Folder:
    """The folder of a version made from local paths and references.

    One directory gives its contents; one file, or several paths, lie under their last names. A path that is a link stands for
    what it leads to; links below it are kept as links. UsageError if two would have one name.
    """
    extra = _nested(references)
    if len(paths) == 1 and os.path.isdir(paths[0]):
        return LocalFolder(paths[0], extra, skip)
    children = dict(extra)
    for path in paths:
        name = check_part(os.path.basename(os.path.abspath(path)), _shown(path))
        change = local_change(path, skip, follow=True)
        if name in children:
            other = children[name]
            if not (isinstance(change, LocalFolder) and isinstance(other, MadeFolder)):
                raise UsageError(
                    f"{path} and something else given would both be {name!r} in the version; log them apart, or rename"
                )
            change = dataclasses.replace(change, extra=other.children)
        if change is not None:
            children[name] = change
    return MadeFolder(children)


def _nested(references: Sequence[Expanded]) -> dict[str, Change]:
    """The references as nested folders."""
    root: dict[str, Change] = {}
    for found in references:
        *parents, name = found.path.split("/")
        level = root
        for parent in parents:
            folder = level.setdefault(parent, MadeFolder({}))
            if not isinstance(folder, MadeFolder):
                raise UsageError(
                    f"reference {found.path!r} lies below {parent!r}, which is a reference itself; give it another name"
                )
            assert isinstance(folder.children, dict)
            level = folder.children
        if name in level:
            raise UsageError(f"two references would both be {found.path!r} in the version; log them apart")
        level[name] = NewRef(found.ref, found.block_list) if found.block_list else found.ref
    return root
