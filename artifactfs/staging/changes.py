"""What is staged, against what it lies over: for a commit, for ``status``, and after a commit.

All three cost what was touched: a base directory in which nothing was is compared, published and rebased as one entry.
"""

from __future__ import annotations

import dataclasses
import re
import stat
from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

import msgspec

from artifactfs.model import BLOCK, Dir, Entry, File, Ref, Remote, Symlink, Version, block_count, is_executable
from artifactfs.publish import Change, NewFile
from artifactfs.staging.data import Below
from artifactfs.staging.files import Files
from artifactfs.staging.journal import Delta
from artifactfs.staging.ledger import Ledger
from artifactfs.staging.nodes import (
    DirNode,
    FileNode,
    LinkNode,
    Namespace,
    Node,
    SpecialNode,
    base_kind,
    rebase_delta,
    stored_delta,
)
from artifactfs.tree import EMPTY, Tree

HIDDEN = re.compile(r"\.fuse_hidden[0-9a-f]{16}")
"""What libfuse renames an open file to that is unlinked or renamed over, until its last close; never committed."""

_FEW = 64
"""Names up to which looking each up is cheaper than listing a directory of unknown size."""

Kind: TypeAlias = Literal["file", "directory", "symlink", "reference", "fifo", "socket", "device"]

_SPECIAL_KINDS: dict[int, Kind] = {stat.S_IFIFO: "fifo", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
_NAMED = 3
"""Paths that a message names at most."""


@dataclasses.dataclass(frozen=True, slots=True)
class StageChange:
    """One difference between a stage and what it lies over. ``path`` is relative; ``size`` is in bytes, 0 but for files.
    ``ignored`` is what a version cannot hold, so that no commit takes it along."""

    path: str
    change: Literal["added", "modified", "deleted", "ignored"]
    kind: Kind
    size: int


def is_committed(name: str, node: Node) -> bool:
    """Whether what is at ``name`` becomes part of a version."""
    return not isinstance(node, SpecialNode) and not (name.startswith(".fuse_hidden") and HIDDEN.fullmatch(name))


# For a commit


class Plan:
    """How each node is published. Nothing may change while it is in use; :meth:`close` it afterwards."""

    def __init__(self, ledger: Ledger, files: Files, where: str) -> None:
        self._ledger = ledger
        self._files = files
        self._where = where
        self._opened: list[Below] = []

    def change(self, node: Node) -> Change:
        if isinstance(node, FileNode):
            return self._file(node)
        if isinstance(node, DirNode):
            return node.base if node.base is not None and not node.children else StagedFolder(node, self)
        assert isinstance(node, LinkNode)
        return Symlink("", node.target)

    def close(self) -> None:
        for below in self._opened:
            below.close()
        self._opened.clear()

    def _file(self, node: FileNode) -> Change:
        with self._ledger.lock:
            size = self._files.stat(node).size
        executable = is_executable(node.mode)
        stored = self._files.early(node) if node.entry is None or node.differs(size) else node.entry
        if stored is not None:
            return stored if stored.executable == executable else msgspec.structs.replace(stored, executable=executable)
        entry = node.entry
        path = self._files.path_of(node)
        if not isinstance(entry, File) or isinstance(entry, Remote):  # a server takes whole files only
            self._localise(node, range(block_count(node.visible)))
            return NewFile(path, executable)
        changed = _changed_blocks(node, entry, size)
        self._localise(node, changed)
        below = Below(self._files.reader, entry, self._where)
        self._opened.append(below)
        return NewFile(path, executable, entry, frozenset(changed), below.read)

    def _localise(self, node: FileNode, blocks: range | set[int]) -> None:
        missing = [block for block in blocks if node.lacks(block)]
        if missing:
            with self._ledger.lock:
                file = self._files.acquire(node, self._where)
            try:
                self._files.prepare(file)
                self._files.localise(file, missing)
            finally:
                self._files.drop(file)


class StagedFolder:
    """A directory as ``publish`` takes it: the base's, but for the changes."""

    def __init__(self, directory: DirNode, plan: Plan) -> None:
        self._directory = directory
        self._plan = plan

    @property
    def base(self) -> Dir | None:
        return self._directory.base

    def changes(self) -> Iterator[tuple[str, Change]]:
        children = self._directory.children
        for name in sorted(children):
            node = children[name]
            if node is not None and is_committed(name, node):
                yield name, self._plan.change(node)
            elif name in self._directory.masked:
                yield name, None


def _changed_blocks(node: FileNode, entry: File, size: int) -> set[int]:
    """The blocks of a file of ``size`` bytes that are not, whole, those of ``entry``."""
    changed = set(node.dirty)
    first = node.visible // BLOCK
    if node.visible == size == entry.size and node.visible % BLOCK:
        first += 1
    changed.update(range(first, block_count(size)))
    return changed


# For status


_Item: TypeAlias = "Node | Entry"


class Comparison:
    """Finds the differences, reading of the base only what is needed. The stage may change meanwhile."""

    def __init__(self, tree: Tree, ledger: Ledger, files: Files) -> None:
        self._tree = tree
        self._ledger = ledger
        self._files = files

    def run(self, base: Version | None) -> Iterator[StageChange]:
        """The differences to ``base``, in no certain order."""
        stack = [self._below("", self._ledger.space.root, base.root if base else EMPTY)]
        while stack:
            found = next(stack[-1], None)
            if found is None:
                stack.pop()
            elif isinstance(found, StageChange):
                yield found
            else:
                stack.append(found)

    def _below(self, prefix: str, now: DirNode | Dir, before: Dir) -> _Steps:
        """The differences below two directories; iterators are to be run through in turn."""
        if isinstance(now, Dir):
            for path, old, new in self._tree.diff(before, now):
                yield from self._pair(prefix + path, new, old, False)
            return
        with self._ledger.lock:
            base, children = now.base or EMPTY, dict(now.children)
        if base.digest == before.digest:
            for name, old in self._look_up(before, children):
                yield from self._pair(prefix + name, self._shown(name, children[name]), old)
            return
        current: dict[str, _Item | None] = {entry.name: entry for entry in self._tree.entries(base)}
        current.update((name, self._shown(name, node)) for name, node in children.items())
        earlier = {entry.name: entry for entry in self._tree.entries(before)}
        for name in current.keys() | earlier.keys():
            yield from self._pair(prefix + name, current.get(name), earlier.get(name))

    def _pair(self, path: str, now: _Item | None, before: Entry | None, deep: bool = True) -> _Steps:
        """What is different at one path. Not ``deep``: what is below comes from elsewhere."""
        now_dir = now if isinstance(now, (DirNode, Dir)) else None
        old_dir = before if isinstance(before, Dir) else None
        if now is not None and before is not None and (now_dir is None) == (old_dir is None):
            if now_dir is None and not self._same(now, before):
                yield self._change(path, "modified", now)
        else:
            if before is not None:
                yield self._change(path, "deleted", before)
            if now is not None:
                yield self._change(path, "added", now)
        if deep and (now_dir is not None or old_dir is not None):
            yield self._below(path + "/", EMPTY if now_dir is None else now_dir, old_dir or EMPTY)

    def _look_up(self, directory: Dir, names: dict[str, Node | None]) -> Iterator[tuple[str, Entry | None]]:
        if len(names) <= _FEW:
            yield from ((name, self._tree.lookup(directory, name)) for name in names)
            return
        entries = {entry.name: entry for entry in self._tree.entries(directory) if entry.name in names}
        yield from ((name, entries.get(name)) for name in names)

    def _shown(self, name: str, node: Node | None) -> Node | None:
        return node if node is not None and is_committed(name, node) else None

    def _same(self, now: _Item, before: Entry) -> bool:
        if isinstance(now, LinkNode):
            return isinstance(before, Symlink) and now.target == before.target
        if isinstance(now, (File, Ref, Symlink)):
            return _identity(now) == _identity(before)
        if isinstance(now, FileNode):
            with self._ledger.lock:
                differs = now.differs(self._files.stat(now).size)
                entry, executable = now.entry, is_executable(now.mode)
            return not differs and entry is not None and _identity(entry, executable) == _identity(before)
        return False

    def _change(self, path: str, change: Literal["added", "modified", "deleted"], item: _Item) -> StageChange:
        if isinstance(item, (DirNode, Dir)):
            return StageChange(path, change, "directory", 0)
        if isinstance(item, (LinkNode, Symlink)):
            return StageChange(path, change, "symlink", 0)
        if isinstance(item, FileNode):
            with self._ledger.lock:
                size = self._files.stat(item).size
                reference = isinstance(item.entry, Ref) and not item.differs(size)
            return StageChange(path, change, "reference" if reference else "file", size)
        assert isinstance(item, (File, Ref))
        return StageChange(path, change, "reference" if isinstance(item, Ref) else "file", max(item.size, 0))


def special_files(ledger: Ledger) -> Iterator[StageChange]:
    """The FIFOs, sockets and device nodes that are staged, in no certain order."""
    stack = [("", ledger.space.root)]
    while stack:
        prefix, directory = stack.pop()
        with ledger.lock:
            children = list(directory.children.items())
        for name, node in children:
            if isinstance(node, DirNode):
                stack.append((f"{prefix}{name}/", node))
            elif isinstance(node, SpecialNode):
                yield StageChange(prefix + name, "ignored", _SPECIAL_KINDS[stat.S_IFMT(node.mode)], 0)


def left_out_warning(left_out: list[StageChange]) -> str:
    """One line about what no commit takes along; "" if there is nothing."""
    if not left_out:
        return ""
    named = [f"{change.path} ({change.kind})" for change in left_out[:_NAMED]]
    if len(left_out) > _NAMED:
        named.append(f"{len(left_out) - _NAMED} more")
    return "not committed, as a version holds only files, directories and symlinks: " + ", ".join(named)


_Steps: TypeAlias = "Iterator[StageChange | _Steps]"


def _identity(entry: Entry, executable: bool | None = None) -> tuple[object, ...]:
    """What two files or references have in common if they are the same."""
    if isinstance(entry, File):
        return entry.id, entry.executable if executable is None else executable
    if isinstance(entry, Ref):
        bit = entry.executable if executable is None else executable
        return entry.uri, entry.digest, sorted(entry.extra.items()), bit
    return (entry.target,) if isinstance(entry, Symlink) else ()


# After a commit


def rebased(tree: Tree, space: Namespace, root: Dir) -> list[Delta]:
    """The deltas after which everything in the table lies over ``root``, which was made of exactly it."""
    deltas: list[Delta] = []
    stack = [(space.root, root)]
    while stack:
        directory, stored = stack.pop()
        find = _finder(tree, stored, len(directory.children))
        masked: list[tuple[str, int]] = []
        for name, node in directory.children.items():
            entry = find(name)
            if node is None or entry is None:
                continue
            masked.append((name, base_kind(entry)))
            if isinstance(node, FileNode) and isinstance(entry, (File, Ref)):
                if node.data:
                    deltas.append(stored_delta(node.ino, entry, entry.size))
            elif isinstance(node, DirNode) and isinstance(entry, Dir):
                stack.append((node, entry))
        deltas.append(rebase_delta(directory.ino, stored, masked))
    return deltas


def _finder(tree: Tree, directory: Dir, count: int) -> Callable[[str], Entry | None]:
    if count <= _FEW:
        return lambda name: tree.lookup(directory, name)
    return {entry.name: entry for entry in tree.entries(directory)}.get
