"""The inode table of a stage: what its journal says, folded. Every change is a delta, live and at resume alike.

A directory is its stored base ``Dir`` (listed lazily, never copied) under its *children*: a name maps to the node that is there,
or to None where a base entry is hidden. What of the base was never changed has no node in the table; when it is looked at, a
*floating* node stands in for it, one per inode as long as anybody holds it. Its inode number is a hash of its directory's
number and its name, so it needs no memory to be stable. A floating node that is changed is *adopted* into the table first.

Deltas (``id`` is an inode number, ``entry`` an entry's msgpack form):

::

    ("h", header)                                      the msgpack form of a :class:`Header`: first record, and when it changes
    ("n", id, mode, uid, gid, atime, mtime, ctime)     a node, of the kind that mode says, empty and linked nowhere
    ("e", id, entry)                                   directory: its listing is that of the stored entry
    ("s", id, target)                                  it is a symlink to target
    ("p", id, device)                                  it is a device node for device
    ("d", id, name, child, masked)                     in directory id, name is child, or nothing if that is 0; masked: the base
                                                       has the name too (0 no, 1 yes, 2 as a directory)
    ("r", id, name)                                    directory id has no such child any more, nor has its base
    ("t", id, mtime, ctime)   ("c", id, ctime)         times
    ("a", id, mode, uid, gid, atime, mtime, ctime)     all attributes
    ("x", id, name, value)                             an extended attribute; value None removes it
    ("z", id, data, entry, visible, floor, local, dirty, fresh)   file: all of its content's state, as :class:`FileNode` has it
    ("o", id, data)                                    file: all content is in the data file data
    ("f", id, data, size)                              file: changed blocks will be in the data file data, which has size bytes
    ("k", id, blocks)                                  file: these blocks are in the data file and are no longer the entry's
    ("l", id, block)                                   file: this block of the entry is in the data file, unchanged
    ("y", id, blocks)                                  file: these blocks are durable in the data file
    ("u", id, size)   ("v", id)                        file: a truncation to size begins; it is done
    ("b", id, entry, masked)                           directory: a commit stored its listing as entry, which has the names
                                                       masked (pairs of name and 1 or 2); what was hidden else is forgotten
    ("g", id, entry, visible, dirty)                   file: a commit stored its content as entry, of which so many bytes are
                                                       still the same but for the blocks dirty
    ("w", id, early)                                   file: what is in its data file is stored, see :class:`Early`

Threads: everything here is called under the stage's lock, but for reading ``FileNode.local`` and ``dirty``, which change under
the file's lock as well.
"""

from __future__ import annotations

import os
import stat
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any, NamedTuple

import msgspec
import xxhash

from artifactfs.model import BLOCK, Dir, Entry, File, Ref, Symlink, Version
from artifactfs.staging.journal import Delta

ROOT_INO = 1
_HASHED = 1 << 62
"""Set in the inode numbers of base entries, never in those of new nodes, which count up from :data:`ROOT_INO`."""

UNKNOWN = -1
NOT_CUTTING = -1
BUSY = b""
"""A file's ``early`` while it is being stored ahead of its commit."""

_encode = msgspec.msgpack.Encoder().encode
_decode_entry: Callable[[bytes], Entry] = msgspec.msgpack.Decoder(Entry).decode


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What is true of the whole stage. ``time`` (ns) is what untouched base entries show, ``boot`` the running system's id.

    ``commit`` is the id of the next commit; if it was ``attempted``, nothing has changed since, so that it may be repeated.
    Numbers from ``next_id`` on have not been used for nodes and data files.
    """

    base: Version | None
    time: int
    owner: tuple[int, int]
    commit: str
    attempted: bool = False
    boot: str = ""
    next_id: int = ROOT_INO + 1


_decode_header: Callable[[bytes], Header] = msgspec.msgpack.Decoder(Header).decode


_NONE: Set[int] = frozenset()
"""No blocks: most files have none to note, and an empty set of their own would be a third of what they take."""


def _grown(blocks: Set[int], more: Iterable[int]) -> set[int]:
    """``blocks`` and ``more``; the same set as before unless that was :data:`_NONE`."""
    grown = blocks if isinstance(blocks, set) else set(blocks)
    grown.update(more)
    return grown


class Early(NamedTuple):
    """A content that was stored ahead of its commit as ``file``, from the data file ``data`` of the change time ``ctime``."""

    data: int
    ctime: int
    file: File


_decode_early: Callable[[bytes], Early] = msgspec.msgpack.Decoder(Early).decode


class Node:
    """An inode: attributes as ``stat`` shows them, times in ns. ``nlink`` is not used for directories."""

    __slots__ = ("__weakref__", "adopted", "atime", "ctime", "gid", "ino", "mode", "mtime", "nlink", "origin", "uid", "xattrs")

    def __init__(self, ino: int, mode: int, uid: int, gid: int, atime: int, mtime: int, ctime: int) -> None:
        self.ino = ino
        self.nlink = 0
        self.xattrs: dict[bytes, bytes] | None = None
        self.adopted = False
        self.origin: tuple[DirNode, str] | None = None
        """Where a floating node is."""
        self.set_attributes(mode, uid, gid, atime, mtime, ctime)

    def set_attributes(self, mode: int, uid: int, gid: int, atime: int, mtime: int, ctime: int) -> None:
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.atime = atime
        self.mtime = mtime
        self.ctime = ctime

    def attributes(self) -> tuple[int, int, int, int, int, int]:
        return self.mode, self.uid, self.gid, self.atime, self.mtime, self.ctime


class FileNode(Node):
    """A regular file.

    ``entry`` is the stored content underneath, None if all content is in the data file. Bytes of it from ``visible`` on are
    hidden. ``local`` are the blocks overlapping the visible part that are in the data file (None: all are), ``dirty`` those
    of them that may differ from the entry. From ``visible`` on everything is in the data file, whose size is the file's.
    ``data`` is the data file's number, 0 if there is none. ``fresh`` are local blocks not known to be durable, ``floor`` the
    least size the data file can have, ``cutting`` the size of a truncation under way. ``size`` and ``blocks`` hold what the
    data file's inode says while nobody has the file open, :data:`UNKNOWN` until asked; without a data file the content's size.
    ``early`` is an :class:`Early`, encoded; None for none.
    """

    __slots__ = (
        *("blocks", "cutting", "data", "dirty", "durable", "early", "entry"),
        *("floor", "fresh", "local", "open", "size", "visible"),
    )

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.early: bytes | None = None
        self.size = 0
        self.blocks = 0
        self.data = 0
        self.entry: File | Ref | None = None
        self.visible = 0
        self.floor = 0
        self.cutting = NOT_CUTTING
        self.local: set[int] | None = None
        self.dirty = _NONE
        self.fresh = _NONE
        self.durable = False
        self.open: Any = None
        """The :class:`~artifactfs.staging.data.OpenFile` while anybody has it open."""

    def set_entry(self, entry: File | Ref, size: int) -> None:
        self.entry = entry
        self.size = self.visible = self.floor = size
        self.local = set()

    def set_stored(self, entry: File | Ref, visible: int, dirty: Iterable[int]) -> None:
        self.entry = entry
        self.visible = visible
        self.dirty = set(dirty) or _NONE
        self.early = None

    def set_own(self, data: int) -> None:
        self.entry = None
        self.data = data
        self.early = None
        self.size = UNKNOWN
        self.visible = self.floor = 0
        self.local = None
        self.dirty = _NONE
        self.fresh = _NONE
        self.durable = False
        self.cutting = NOT_CUTTING

    def set_data(self, data: int, size: int) -> None:
        self.data = data
        self.floor = size
        self.size = UNKNOWN
        self.durable = False

    def cut(self, size: int) -> None:
        """Begin a truncation to ``size``; sets are replaced, not changed, because readers may hold the old ones."""
        self.cutting = size
        self.floor = size
        self.visible = min(self.visible, size)
        end = -(-self.visible // BLOCK)
        if self.local is not None:
            self.local = {block for block in self.local if block < end}
        self.dirty = {block for block in self.dirty if block < end} or _NONE
        self.fresh = {block for block in self.fresh if block < end} or _NONE

    def fall_back(self) -> None:
        """Of what a commit has stored, only the blocks that changed since are in the data file; none of them for certain."""
        self.local = set(self.dirty)
        self.fresh = set(self.dirty) or _NONE
        self.floor = max(self.floor, self.visible)

    def add_local(self, blocks: Iterable[int]) -> None:
        if self.local is not None:
            self.fresh = _grown(self.fresh, [block for block in blocks if block not in self.local])
            self.local.update(blocks)

    def differs(self, size: int) -> bool:
        """Whether the content, which has ``size`` bytes, may be another than the entry's."""
        return self.entry is None or bool(self.dirty) or self.visible != size or 0 <= self.entry.size != size

    def lacks(self, block: int) -> bool:
        """Whether the block has visible bytes that are in the entry only."""
        return self.local is not None and block not in self.local and block * BLOCK < self.visible

    def dump(self) -> Delta:
        entry = None if self.entry is None else _encode(self.entry)
        local = None if self.local is None else list(self.local)
        return ("z", self.ino, self.data, entry, self.visible, self.floor, local, list(self.dirty), list(self.fresh))

    def load(
        self,
        data: int,
        entry: bytes | None,
        visible: int,
        floor: int,
        local: list[int] | None,
        dirty: list[int],
        fresh: list[int],
    ) -> None:
        self.data = data
        decoded = None if entry is None else _decode_entry(entry)
        assert decoded is None or isinstance(decoded, (File, Ref))
        self.entry = decoded
        self.visible = visible
        self.floor = floor
        self.local = None if local is None else set(local)
        self.dirty = set(dirty) or _NONE
        self.fresh = set(fresh) or _NONE
        self.size = UNKNOWN if data else visible


class DirNode(Node):
    """A directory. ``base_dirs`` is how many directories the base has, None while not counted. ``masked`` are the base's names
    that ``children`` decides about (2 for a directory, else 1), ``masked_dirs`` how many of these are directories. ``dirs`` and
    ``whiteouts`` count among the children. ``parent`` is None for the root and for a removed directory."""

    __slots__ = ("base", "base_dirs", "children", "dirs", "masked", "masked_dirs", "name", "parent", "whiteouts")

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.base: Dir | None = None
        self.base_dirs: int | None = 0
        self.children: dict[str, Node | None] = {}
        self.masked: dict[str, int] = {}
        self.masked_dirs = 0
        self.dirs = 0
        self.whiteouts = 0
        self.parent: DirNode | None = None
        self.name = ""

    def set_base(self, base: Dir) -> None:
        self.base = base
        self.base_dirs = None if base.count else 0

    @property
    def empty(self) -> bool:
        hidden = self.base is None or self.base.count == len(self.masked)
        return hidden and len(self.children) == self.whiteouts

    @property
    def links(self) -> int:
        """2 and the subdirectories; 1, which means "not counted", while the base's are not known."""
        if self.base_dirs is None:
            return 1
        return 2 + self.base_dirs - self.masked_dirs + self.dirs

    def within(self, other: DirNode) -> bool:
        """Whether this directory is ``other`` or below it."""
        node: DirNode | None = self
        while node is not None and node is not other:
            node = node.parent
        return node is not None


class LinkNode(Node):
    """A symbolic link."""

    __slots__ = ("target",)

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.target = ""


class SpecialNode(Node):
    """A FIFO, a socket or a device node, which only the kernel gives a meaning; never committed."""

    __slots__ = ("device",)

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.device = 0


class Namespace:
    """The table of nodes, and the directory tree that they make."""

    def __init__(self) -> None:
        self.header = Header(base=None, time=0, owner=(0, 0), commit="")
        self.nodes: dict[int, Node] = {}
        self.dead: list[Node] = []
        """Nodes that lost a link in the last :meth:`apply`: whoever applied looks which have none left."""
        self._floating: weakref.WeakValueDictionary[int, Node] = weakref.WeakValueDictionary()
        self._apply: dict[str, Callable[..., None]] = {
            "h": self._header,
            "n": self._node,
            "e": self._entry,
            "z": self._content,
            "s": self._symlink,
            "p": self._special,
            "d": self._put,
            "r": self._remove,
            "t": self._times,
            "c": self._ctime,
            "a": self._attributes,
            "x": self._xattr,
            "o": self._own,
            "f": self._data,
            "k": self._blocks,
            "l": self._local,
            "y": self._durable,
            "u": self._cut,
            "v": self._cut_done,
            "b": self._rebase,
            "g": self._stored,
            "w": self._early,
        }

    @property
    def root(self) -> DirNode:
        root = self.nodes[ROOT_INO]
        assert isinstance(root, DirNode)
        return root

    def apply(self, record: Iterable[Delta]) -> None:
        """Make a record's changes. It cannot fail for records that this class's own state gave rise to."""
        for delta in record:
            self._apply[delta[0]](*delta[1:])

    def floating(self, directory: DirNode, entry: Entry, size: int) -> Node:
        """The node that stands for ``entry``, an untouched base entry of ``directory``; ``size`` bytes for a file."""
        ino = base_ino(directory.ino, entry.name)
        node = self._floating.get(ino)
        if node is None:
            time = self.header.time
            node = self._new(ino, entry_mode(entry), *self.header.owner, time, time, time)
            node.origin = directory, entry.name
            node.nlink = 1
            if isinstance(entry, Dir) and isinstance(node, DirNode):
                node.set_base(entry)
                node.parent, node.name = directory, entry.name
            elif isinstance(entry, Symlink) and isinstance(node, LinkNode):
                node.target = entry.target
            elif isinstance(entry, (File, Ref)) and isinstance(node, FileNode):
                node.set_entry(entry, size)
            self._floating[ino] = node
        return node

    def sink(self, node: Node, now: int) -> None:
        """A floating node whose name was removed: whoever has it open keeps it."""
        self._floating.pop(node.ino, None)
        node.origin = None
        node.nlink = 0
        node.ctime = now

    def attach(self, node: Node) -> None:
        """Take a node into the table that has no name and is not recorded: it ends with its last handle."""
        node.adopted = True
        self.nodes[node.ino] = node

    def adoption(self, *nodes: Node) -> list[Delta]:
        """The deltas that take floating nodes, and the directories they are in, into the table; none for any others."""
        deltas: list[Delta] = []
        seen: set[int] = set()
        for node in nodes:
            chain: list[Delta] = []
            while node.origin is not None and node.ino not in seen:
                seen.add(node.ino)
                directory, name = node.origin
                chain.append(("d", directory.ino, name, node.ino, base_kind(node)))
                chain.extend(reversed(self.dump(node)))
                node = directory
            deltas.extend(reversed(chain))
        return deltas

    def dump(self, node: Node) -> list[Delta]:
        """The deltas that make a node like this one, but for its links."""
        deltas: list[Delta] = [("n", node.ino, *node.attributes())]
        if isinstance(node, FileNode):
            deltas.append(node.dump())
            if node.early:
                deltas.append(("w", node.ino, node.early))
        elif isinstance(node, DirNode) and node.base is not None:
            deltas.append(("e", node.ino, _encode(node.base)))
        elif isinstance(node, LinkNode):
            deltas.append(("s", node.ino, node.target))
        elif isinstance(node, SpecialNode) and node.device:
            deltas.append(("p", node.ino, node.device))
        deltas.extend(("x", node.ino, name, value) for name, value in (node.xattrs or {}).items())
        return deltas

    def records(self) -> Iterator[list[Delta]]:
        """All records that make this table: what a compacted journal consists of."""
        yield [header_delta(self.header)]
        for node in self.nodes.values():
            yield self.dump(node)
        for node in self.nodes.values():
            if isinstance(node, DirNode) and node.children:
                yield [
                    ("d", node.ino, name, child.ino if child else 0, node.masked.get(name, 0))
                    for name, child in node.children.items()
                ]

    def drop_unlinked(self) -> None:
        """At resume: forget the nodes that no directory has, which were only open."""
        reachable = {ROOT_INO}
        stack = [self.root]
        while stack:
            for child in stack.pop().children.values():
                if child is not None:
                    reachable.add(child.ino)
                    if isinstance(child, DirNode):
                        stack.append(child)
        self.nodes = {ino: node for ino, node in self.nodes.items() if ino in reachable}
        self.dead.clear()

    # Deltas

    def _new(self, ino: int, mode: int, *rest: int) -> Node:
        kind = _KINDS.get(stat.S_IFMT(mode), SpecialNode)
        return kind(ino, mode, *rest)

    def _node(self, ino: int, mode: int, *rest: int) -> None:
        node = self._floating.pop(ino, None)
        if node is None:
            node = self._new(ino, mode, *rest)
        node.origin = None
        node.adopted = True
        node.nlink = int(ino == ROOT_INO)
        self.nodes[ino] = node

    def _header(self, header: bytes) -> None:
        self.header = _decode_header(header)

    def _entry(self, ino: int, entry: bytes) -> None:
        directory = self._dir(ino)
        if directory.base is None:  # else adopted while alive: it has this base already, and what was counted of it
            base = _decode_entry(entry)
            assert isinstance(base, Dir)
            directory.set_base(base)

    def _content(self, ino: int, *state: Any) -> None:
        self._file(ino).load(*state)

    def _symlink(self, ino: int, target: str) -> None:
        self._link(ino).target = target

    def _special(self, ino: int, device: int) -> None:
        node = self.nodes[ino]
        assert isinstance(node, SpecialNode)
        node.device = device

    def _put(self, ino: int, name: str, child: int, masked: int) -> None:
        directory = self._dir(ino)
        self._unlink(directory, name)
        if masked and name not in directory.masked:
            directory.masked[name] = masked
            directory.masked_dirs += masked == 2
        if not child:
            directory.children[name] = None
            directory.whiteouts += 1
            return
        node = self.nodes[child]
        directory.children[name] = node
        node.nlink += 1
        if isinstance(node, DirNode):
            directory.dirs += 1
            node.parent, node.name = directory, name

    def _remove(self, ino: int, name: str) -> None:
        self._unlink(self._dir(ino), name)

    def _unlink(self, directory: DirNode, name: str) -> None:
        if name not in directory.children:
            return
        node = directory.children.pop(name)
        if node is None:
            directory.whiteouts -= 1
            return
        node.nlink -= 1
        self.dead.append(node)
        if isinstance(node, DirNode):
            directory.dirs -= 1
            if node.parent is directory and node.name == name:
                node.parent = None

    def _times(self, ino: int, mtime: int, ctime: int) -> None:
        node = self.nodes[ino]
        node.mtime, node.ctime = mtime, ctime

    def _ctime(self, ino: int, ctime: int) -> None:
        self.nodes[ino].ctime = ctime

    def _attributes(self, ino: int, *attributes: int) -> None:
        self.nodes[ino].set_attributes(*attributes)

    def _xattr(self, ino: int, name: bytes, value: bytes | None) -> None:
        node = self.nodes[ino]
        xattrs = node.xattrs = node.xattrs or {}
        if value is None:
            xattrs.pop(name, None)
        else:
            xattrs[name] = value

    def _own(self, ino: int, data: int) -> None:
        self._file(ino).set_own(data)

    def _data(self, ino: int, data: int, size: int) -> None:
        self._file(ino).set_data(data, size)

    def _blocks(self, ino: int, blocks: list[int]) -> None:
        node = self._file(ino)
        node.add_local(blocks)
        node.dirty = _grown(node.dirty, blocks)

    def _local(self, ino: int, block: int) -> None:
        self._file(ino).add_local((block,))

    def _durable(self, ino: int, blocks: list[int]) -> None:
        node = self._file(ino)
        node.fresh = set(node.fresh).difference(blocks) or _NONE

    def _cut(self, ino: int, size: int) -> None:
        self._file(ino).cut(size)

    def _cut_done(self, ino: int) -> None:
        self._file(ino).cutting = NOT_CUTTING

    def _rebase(self, ino: int, entry: bytes, masked: list[tuple[str, int]]) -> None:
        directory = self._dir(ino)
        links = directory.links if directory.base_dirs is not None else None
        base = _decode_entry(entry)
        assert isinstance(base, Dir)
        directory.set_base(base)
        directory.masked = dict(masked)
        directory.masked_dirs = sum(kind == 2 for _, kind in masked)
        for name in [name for name, child in directory.children.items() if child is None and name not in directory.masked]:
            del directory.children[name]
        for name in directory.masked:
            directory.children.setdefault(name, None)
        directory.whiteouts = sum(child is None for child in directory.children.values())
        if links is not None:
            directory.base_dirs = links - 2 + directory.masked_dirs - directory.dirs

    def _stored(self, ino: int, entry: bytes, visible: int, dirty: list[int]) -> None:
        stored = _decode_entry(entry)
        assert isinstance(stored, (File, Ref))
        self._file(ino).set_stored(stored, visible, dirty)

    def _early(self, ino: int, early: bytes) -> None:
        self._file(ino).early = early

    # Access by number, with the kind that a delta implies

    def _file(self, ino: int) -> FileNode:
        node = self.nodes[ino]
        assert isinstance(node, FileNode)
        return node

    def _dir(self, ino: int) -> DirNode:
        node = self.nodes[ino]
        assert isinstance(node, DirNode)
        return node

    def _link(self, ino: int) -> LinkNode:
        node = self.nodes[ino]
        assert isinstance(node, LinkNode)
        return node


def base_ino(directory: int, name: str) -> int:
    """The inode number of an untouched base entry of the directory of that number: odds of 1 to 400,000 that of 1,000,000
    entries two share one."""
    return xxhash.xxh3_64_intdigest(name.encode(), directory) >> 2 | _HASHED


def header_delta(header: Header) -> Delta:
    return "h", _encode(header)


def stored_delta(ino: int, entry: Entry, visible: int) -> Delta:
    """File ``ino`` is now stored as ``entry``."""
    return "g", ino, _encode(entry), visible, []


def early_delta(ino: int, data: int, ctime: int, file: File) -> Delta:
    """File ``ino`` was stored as ``file`` from its data file as it was then."""
    return "w", ino, _encode(Early(data, ctime, file))


def decode_early(early: bytes) -> Early:
    return _decode_early(early)


def rebase_delta(ino: int, entry: Dir, masked: list[tuple[str, int]]) -> Delta:
    """Directory ``ino`` is now stored as ``entry``, which has the names ``masked``."""
    return "b", ino, _encode(entry), masked


def base_kind(entry: Node | Entry) -> int:
    """How a delta says that the base has a name: 2 as a directory, 1 as anything else."""
    return 2 if isinstance(entry, (DirNode, Dir)) else 1


_KINDS: dict[int, type[Node]] = {stat.S_IFREG: FileNode, stat.S_IFDIR: DirNode, stat.S_IFLNK: LinkNode}


def entry_mode(entry: Entry) -> int:
    """The ``st_mode`` that an untouched base entry shows."""
    if isinstance(entry, Dir):
        return stat.S_IFDIR | 0o755
    if isinstance(entry, Symlink):
        return stat.S_IFLNK | 0o777
    return stat.S_IFREG | (0o755 if entry.executable else 0o644)


_COARSE = 5  # CLOCK_REALTIME_COARSE, with which the kernel stamps data files: stamps of both are compared


def now() -> int:
    """The time of a change, in ns."""
    return time.clock_gettime_ns(_COARSE)


def os_error(code: int) -> OSError:
    return OSError(code, os.strerror(code))
