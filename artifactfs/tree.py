"""Trees are pages: build, look up, list, walk, diff.

A directory's entries, sorted by name (code points, which is the order of their UTF-8 bytes), are cut into leaf pages; the leaf
pages of a big directory are listed by index pages, those by further ones, up to one root page. A page ends after an entry whose
name's hash says so, or when it is heavy; both depend on nothing but what the entries *are*, so the same directory has the same
pages whatever its history. The stored form of a page is ``docs/format.md``, section "Pages".

Beside its id (the BLAKE3 of its bytes) each page has a digest over what its entries are: kind, name, and for a file the
executable bit and content id; a reference its URI, digest and pins; a symlink its target; a directory its digest. Locations do
not count. A directory's digest is its root page's.
"""

from __future__ import annotations

import itertools
import operator
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, TypeVar

import msgspec
import xxhash
from blake3 import blake3
from cachetools import LRUCache

from artifactfs.content import manifest_digest
from artifactfs.errors import IntegrityError
from artifactfs.forking import new_lock
from artifactfs.model import BLAKE3, Count, Digest, Dir, Entry, Extent, File, Page, Ref, Remote, Symlink, named
from artifactfs.names import MAX_PATH_PART

DIGEST_CONTEXT = "artifactfs 2026-11 directory digest v1"
PAGE_VERSION = 1
MAX_PAGE_BYTES = 4 << 20
"""No page of ours is near it (:data:`_MAX_WEIGHT`); a page that claims more is refused before it is read."""

_CUT = 2048
"""One name in so many ends a page: a look-up decodes about a millisecond's worth, a commit of one file rewrites 200 KB."""
_MAX_WEIGHT = 960 << 10
"""Weight at which a page ends whatever its names are: a bound for those who chose names that never end one."""
_BASE_WEIGHT = 256
_MAX_CHILDREN = 1920
_MAX_LEVEL = 8
MAX_ENTRY_WEIGHT = 64 << 10
"""Bytes of name, symlink target or reference that an entry may have in all."""
_MAX_TOTAL = (1 << 63) - 1
_NOT_NAMES = frozenset(("", ".", ".."))

_AHEAD_BYTES = 4 << 20
"""Bytes of pages that are fetched ahead at once: 40,000 entries, in two or three round trips' time."""
_NEAR_BYTES = 256 << 10
_WALKS = 1024
_WALK_GAP = 64  # entries that a walk may pass over, as files are between directories, or pages that are here
_WALK_MOST = 1024

StorePage = Callable[[bytes], Page]
_Any = TypeVar("_Any", "_Leaf | _Index", "_SlimLeaf | _Index")


class Child(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A page as its index page lists it: its first name, its digest and location, and the totals of what is below it."""

    first: str
    digest: Digest
    page: Page
    count: Count
    size: Count
    files: Count
    links: Count


class _Leaf(msgspec.Struct, frozen=True, array_like=True, tag=0):
    version: int
    entries: list[Entry]


class _Index(msgspec.Struct, frozen=True, array_like=True, tag=1):
    version: int
    level: int
    children: list[Child]


# The same, without what a search for contents has no use for: decoding a million entries takes a third of the time.


class _SlimFile(msgspec.Struct, frozen=True, array_like=True, tag=0, gc=False):
    name: str
    size: Count
    executable: bool
    id: Digest


class _SlimDir(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    id: ClassVar[bytes] = b""
    name: str
    digest: Digest
    page: Page | None


class _SlimSymlink(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    id: ClassVar[bytes] = b""
    name: str


class _SlimRef(msgspec.Struct, frozen=True, array_like=True, tag=3, gc=False):
    id: ClassVar[bytes] = b""
    name: str


class _SlimRemote(_SlimFile, frozen=True, array_like=True, tag=4, gc=False):
    pass


class _SlimLeaf(msgspec.Struct, frozen=True, array_like=True, tag=0):
    version: int
    entries: list[_SlimFile | _SlimDir | _SlimSymlink | _SlimRef | _SlimRemote]


_id_of: Callable[[object], bytes] = operator.attrgetter("id")
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Leaf | _Index).decode
_decode_slim = msgspec.msgpack.Decoder(_SlimLeaf | _Index).decode


class _Names:
    """A decoded page with its names for bisection, and about the bytes of memory that it takes."""

    __slots__ = ("cost", "items", "level", "names")

    def __init__(self, level: int, items: Sequence[Entry] | Sequence[Child], names: list[str], size: int) -> None:
        self.level = level
        self.items = items
        self.names = names
        self.cost = 1024 + size + 350 * len(names)  # measured: 400 to 450 bytes for an entry of 90 stored ones


class Tree:
    """Reads the directories of stored versions. ``load`` gives a page's bytes, checked against its id; none for a page that
    stands for a directory of which nothing was known beforehand, and which is empty. Threads may share it."""

    def __init__(
        self,
        load: Callable[[Page], bytes],
        cache_bytes: int = 64 << 20,
        ahead: Callable[[Page, Sequence[object]], None] | None = None,
    ) -> None:
        """``cache_bytes`` bounds the memory of the decoded pages that are kept for the next look-up; 0 keeps none. ``ahead`` is
        told of a page before it is loaded, with the entries of the page, directories and index children, that names it."""
        self._load = load
        self._ahead = ahead
        self._lock = new_lock()
        self._pages: LRUCache[bytes, _Names] = LRUCache(cache_bytes, getsizeof=lambda page: page.cost)

    def beside(self, pages: Mapping[bytes, bytes]) -> Tree:
        """A tree that has the pages of this one, and ``pages``, by their ids, that are not stored."""
        return Tree(lambda page: pages.get(page.id) or self._load(page))

    def lookup(self, directory: Dir, name: str) -> Entry | None:
        """The entry of that name, or None. Reads one page a level of the directory's index."""
        if directory.page is None:
            return None
        decoded = self._leaf_for(directory, name)[1]
        at = bisect_left(decoded.names, name)
        found = at < len(decoded.names) and decoded.names[at] == name
        return decoded.items[at] if found else None  # type: ignore[return-value]  # level 0 holds entries

    def page_with(self, directory: Dir, name: str) -> tuple[bytes, Sequence[Entry]]:
        """The id and the entries of the page of ``directory`` that has ``name``, if anything there has it."""
        if directory.page is None:
            return b"", ()
        page, decoded = self._leaf_for(directory, name)
        return page.id, decoded.items  # type: ignore[return-value]  # level 0 holds entries

    def page_of(self, root: Dir, path: str) -> tuple[bytes, Sequence[Entry]]:
        """The same for what is at ``path`` below ``root``."""
        parent, _, name = path.rpartition("/")
        directory = self.resolve(root, parent)
        return self.page_with(directory, name) if isinstance(directory, Dir) else (b"", ())

    def _leaf_for(self, directory: Dir, name: str) -> tuple[Page, _Names]:
        child = _whole(directory)
        level = _MAX_LEVEL
        among: Sequence[object] = ()
        while True:
            decoded = self._page(child, level, among)
            if decoded.level == 0:
                return child.page, decoded
            at = max(bisect_right(decoded.names, name) - 1, 0)
            level = decoded.level - 1
            among = decoded.items
            child = decoded.items[at]  # type: ignore[assignment]

    def entries(self, directory: Dir, after: str = "", among: Sequence[object] = ()) -> Iterator[Entry]:
        """The entries whose name sorts after ``after``, in ascending order of the names' UTF-8 bytes. ``among``: the entries of
        the page that ``directory`` is of, where whoever lists it will probably list others of them too."""
        for items in self._leaf_entries(directory, after, among):
            yield from items

    def _leaf_entries(self, directory: Dir, after: str, among: Sequence[object]) -> Iterator[Sequence[Entry]]:
        last = ""
        for child, siblings in self._children(directory, after, among):
            decoded = self._page(child, 0, siblings)
            if not decoded.names:
                return
            if decoded.names[0] <= last:
                raise _disordered(child)
            last = decoded.names[-1]
            yield decoded.items[bisect_right(decoded.names, after) :] if after else decoded.items  # type: ignore[misc]

    def children(self, directory: Dir, after: str = "") -> Iterator[Child]:
        """The leaf pages of ``directory`` that can hold names after ``after``, in order."""
        for child, _ in self._children(directory, after, ()):
            yield child

    def _children(self, directory: Dir, after: str, among: Sequence[object]) -> Iterator[tuple[Child, Sequence[object]]]:
        if directory.page is None:
            return
        last = None
        for child, siblings in self._leaves(_whole(directory), after, _MAX_LEVEL, among):
            if last is not None and child.first <= last:
                raise _disordered(child)
            last = child.first
            yield child, siblings

    def resolve(self, root: Dir, path: str) -> Entry | None:
        """The entry at a canonical relative path ("" is the root itself); symlinks are not followed. None if there is none."""
        entry: Entry | None = root
        for part in path.split("/") if path else ():
            if not isinstance(entry, Dir):
                return None
            entry = self.lookup(entry, part)
        return entry

    def walk(self, root: Dir) -> Iterator[tuple[str, Entry]]:
        """(relative path, entry) of everything below ``root``, a directory before its contents, in walk order."""
        stack: list[_Walk] = [_Walk("", self._leaf_entries(root, "", ()))]
        while stack:
            walk = stack[-1]
            entry = next(walk.entries, None)
            if entry is None:
                items = next(walk.leaves, None)
                if items is None:
                    stack.pop()
                else:
                    walk.items, walk.entries = items, iter(items)
                continue
            path = walk.prefix + entry.name
            yield path, entry
            if isinstance(entry, Dir):
                stack.append(_Walk(path + "/", self._leaf_entries(entry, "", walk.items)))

    def walk_after(self, root: Dir, path: str) -> Iterator[tuple[str, Entry]]:
        """What :meth:`walk` gives behind ``path`` and all that is below that, reading no page before."""
        parts = path.split("/")
        for depth in range(len(parts) - 1, -1, -1):
            folder = "".join(f"{part}/" for part in parts[:depth])
            directory = self.resolve(root, folder.rstrip("/"))
            for entry in self.entries(directory, after=parts[depth]) if isinstance(directory, Dir) else ():
                yield folder + entry.name, entry
                if isinstance(entry, Dir):
                    yield from ((f"{folder}{entry.name}/{below}", found) for below, found in self.walk(entry))

    def diff(self, old: Dir, new: Dir) -> Iterator[tuple[str, Entry | None, Entry | None]]:
        """(path, old entry, new entry) wherever they differ, reading only pages that do. A directory that exists on one side
        only is followed by everything below it; one on both sides appears only through what differs in it."""
        stack = [("", self.pairs(old, new))]
        while stack:
            prefix, pairs = stack[-1]
            pair = next(pairs, None)
            if pair is None:
                stack.pop()
                continue
            before, after = pair
            name = (before or after).name  # type: ignore[union-attr]  # one of them is there
            old_dir, new_dir = isinstance(before, Dir), isinstance(after, Dir)
            if not (old_dir and new_dir):
                yield prefix + name, before, after
            if old_dir or new_dir:
                below = self.pairs(before if old_dir else _EMPTY, after if new_dir else _EMPTY)  # type: ignore[arg-type]
                stack.append((f"{prefix}{name}/", below))

    def pages(self, root: Dir, seen: set[Page]) -> Iterator[tuple[Page, Sequence[Entry]]]:
        """Every page at and below ``root`` that is not in ``seen``, to which it is added; with a leaf's entries."""
        stack = [(root.page, _MAX_LEVEL)]
        while stack:
            page, level = stack.pop()
            if page is None or page in seen:
                continue
            seen.add(page)
            decoded = self._read(page)
            _check_level(page, decoded, level)
            if decoded.level:
                yield page, ()
                stack.extend((child.page, decoded.level - 1) for child in reversed(decoded.items))  # type: ignore[union-attr]
            else:
                yield page, decoded.items  # type: ignore[misc]
                directories = [entry for entry in decoded.items if isinstance(entry, Dir)]
                stack.extend((entry.page, _MAX_LEVEL) for entry in reversed(directories))

    def content_ids(self, root: Dir) -> Iterator[tuple[Page, list[bytes]]]:
        """Every page of entries at and below ``root``, once, with the content ids of its entries; b"" where one is no file."""
        seen: set[Page] = set()
        stack = [root.page]
        while stack:
            page = stack.pop()
            if page is None or page in seen:
                continue
            seen.add(page)
            decoded = _decoded(self._bytes(page), page.id.hex(), _decode_slim)
            if isinstance(decoded, _Index):
                stack.extend(child.page for child in reversed(decoded.children))
            else:
                ids = list(map(_id_of, decoded.entries))
                yield page, ids
                if b"" in ids:
                    stack.extend(entry.page for entry in reversed(decoded.entries) if type(entry) is _SlimDir)

    def entry_at(self, page: Page, position: int) -> Entry:
        """The entry at a position of a page of entries."""
        return self.leaf(Child("", b"", page, 0, 0, 0, 0))[position]

    def listing(self, root: Dir) -> Iterator[tuple[str, File | Ref]]:
        """(path, entry) of every file and reference, in ascending order of the whole paths: the order of W&B's manifests."""
        stack: list[tuple[str, Iterator[Entry]]] = [("", self._by_path(root))]
        while stack:
            prefix, entries = stack[-1]
            entry = next(entries, None)
            if entry is None:
                stack.pop()
            elif isinstance(entry, Dir):
                stack.append((f"{prefix}{entry.name}/", self._by_path(entry)))
            elif not isinstance(entry, Symlink):
                yield prefix + entry.name, entry

    def _by_path(self, directory: Dir) -> Iterator[Entry]:
        # "a-b" sorts before "a/x" but after the directory "a": a directory waits until its name with a slash has its turn.
        waiting: list[tuple[str, Dir]] = []
        for entry in self.entries(directory):
            while waiting and waiting[0][0] < entry.name:
                yield waiting.pop(0)[1]
            if isinstance(entry, Dir):
                insort(waiting, (entry.name + "/", entry), key=lambda item: item[0])
            else:
                yield entry
        yield from (held for _, held in waiting)

    def digest(self, root: Dir, algorithm: str) -> str:
        """The digest that users see of a version, hex: its root directory's for BLAKE3, W&B's formula over all entries else."""
        if algorithm == BLAKE3:
            return root.digest.hex()
        return manifest_digest(((path, entry.digest) for path, entry in self.listing(root)), algorithm)

    def update(self, base: Dir | None, changes: Iterable[tuple[str, Entry | None]], store_page: StorePage) -> Dir:
        """``base`` with ``changes`` (ascending names; None deletes, absent or not) as a directory named "".

        Pages that the changes do not touch are kept, not stored again; ``store_page`` is given the bytes of new ones.
        """
        update = DirUpdate(self, base, store_page)
        for name, entry in changes:
            update.change(name, entry)
        return update.finish()

    def leaf(self, child: Child) -> Sequence[Entry]:
        """The entries of one leaf page that :meth:`children` gave; at least one."""
        return self._page(child, 0).items  # type: ignore[return-value]

    def index_pages(self, directory: Dir | None) -> Iterator[Page]:
        """The index pages of ``directory``; none if it has one page."""
        pending = [(_whole(directory), _MAX_LEVEL)] if directory and directory.page else []
        while pending:
            child, level = pending.pop()
            decoded = self._page(child, level)
            if decoded.level:
                yield child.page
            if decoded.level > 1:
                pending.extend((below, decoded.level - 1) for below in decoded.items)  # type: ignore[misc]

    def pairs(self, old: Dir | None, new: Dir, other: Tree | None = None) -> Iterator[tuple[Entry | None, Entry | None]]:
        """The entries of two directories that are not equal, by name; only pages that differ are read. ``new`` is of the tree
        ``other``, if that is given; None for ``old`` is an empty directory."""
        old, other = old or _EMPTY, other or self
        if old.digest == new.digest:
            return
        ours, theirs = list(self.children(old)), list(other.children(new))
        common = {child.digest for child in ours} & {child.digest for child in theirs}
        left = self._entries_of(ours, common)
        right = other._entries_of(theirs, common)
        before, after = next(left, None), next(right, None)
        while before is not None or after is not None:
            if after is None or (before is not None and before.name < after.name):
                yield before, None
                before = next(left, None)
            elif before is None or after.name < before.name:
                yield None, after
                after = next(right, None)
            else:
                if identity(before) != identity(after):
                    yield before, after
                before, after = next(left, None), next(right, None)

    def _entries_of(self, children: list[Child], without: set[bytes]) -> Iterator[Entry]:
        for child in children:
            if child.digest not in without:
                yield from self.leaf(child)

    def _leaves(self, child: Child, after: str, level: int, among: Sequence[object]) -> Iterator[tuple[Child, Sequence[object]]]:
        """The leaf pages below ``child``, each with the entries of the page that names it."""
        decoded = self._page(child, level, among)
        if decoded.level == 0:
            yield child, among
            return
        start = max(bisect_right(decoded.names, after) - 1, 0)
        for below in decoded.items[start:]:
            if decoded.level == 1:
                yield below, decoded.items  # type: ignore[misc]
            else:
                yield from self._leaves(below, after, decoded.level - 1, decoded.items)  # type: ignore[arg-type]

    def _page(self, child: Child, level: int, among: Sequence[object] = ()) -> _Names:
        """The page of ``child``, decoded and checked; ``level`` is the highest it may have."""
        page = child.page
        with self._lock:
            decoded = self._pages.get(page.id)
        if decoded is None:
            if self._ahead is not None and among:
                self._ahead(page, among)
            decoded = self._read(page)
            with self._lock:
                if decoded.cost <= self._pages.maxsize:
                    self._pages[page.id] = decoded
        _check_level(page, decoded, level)
        if child.first and child.first != decoded.names[0]:
            raise _disordered(child)
        return decoded

    def _read(self, page: Page) -> _Names:
        data = self._bytes(page)
        return decode_page(data, page.id.hex()) if data else _Names(0, (), [], 0)

    def _bytes(self, page: Page) -> bytes:
        if not 0 < page.extent.length <= MAX_PAGE_BYTES:
            raise IntegrityError(f"page {page.id.hex()} claims {page.extent.length} bytes")
        return self._load(page)


class _Walk:
    """A directory that is being walked: its pages, and what is left of the one at hand."""

    __slots__ = ("entries", "items", "leaves", "prefix")

    def __init__(self, prefix: str, leaves: Iterator[Sequence[Entry]]) -> None:
        self.prefix = prefix
        self.leaves = leaves
        self.items: Sequence[Entry] = ()
        self.entries: Iterator[Entry] = iter(())


class PageOrder:
    """Tells which pages are likely to be read after one that is missing. Threads may share one.

    Whoever walks a tree reads pages in the order in which another page names them. The first that is missing among these may be
    all that is asked for; each one that is missing further on doubles how many are fetched with it, up to :data:`_AHEAD_BYTES`.
    Those that are missing in no order, :data:`_NEAR_BYTES` of what follows are fetched with.
    """

    def __init__(self) -> None:
        self._lock = new_lock()
        self._walks: LRUCache[bytes, tuple[int, int]] = LRUCache(_WALKS)  # by the first: the last missing one, and a window

    def after(self, page: Page, among: Sequence[object]) -> list[Page]:
        """``page`` and those of the pages that ``among`` (directories or children of an index) name to fetch with it."""
        pages = [item.page for item in among if isinstance(item, (Dir, Child)) and item.page is not None]
        at = next((at for at, other in enumerate(pages) if other.id == page.id), None)
        if at is None:
            return [page]
        with self._lock:
            last, window = self._walks.get(pages[0].id, (-1, 0))
            onward = last < at <= last + window + _WALK_GAP
            window = min(max(window, 1) * 2, _WALK_MOST) if onward and last >= 0 else 0
            self._walks[pages[0].id] = (at, window)
        most = _AHEAD_BYTES if window else _NEAR_BYTES if last >= 0 else 0
        return list(_bounded(pages[at : at + 1 + (window or _WALK_MOST)], most))


def _bounded(pages: Iterable[Page], most: int) -> Iterator[Page]:
    """The first page, and those after it that with it are at most ``most`` bytes."""
    for number, page in enumerate(pages):
        most -= page.extent.length
        if number and most < 0:
            return
        yield page


def _check_level(page: Page, decoded: _Names, level: int) -> None:
    if decoded.level > level:
        raise IntegrityError(f"page {page.id.hex()} is an index where a page of entries must be")


def _disordered(child: Child) -> IntegrityError:
    return IntegrityError(f"page {child.page.id.hex()} is not where its names belong in its directory")


def decode_page(data: bytes, where: str) -> _Names:
    """A page from its bytes; IntegrityError if they are no page, or one whose names could lead anywhere else."""
    page = _decoded(data, where, _decode)
    if isinstance(page, _Index):
        names = [child.first for child in page.children]
        if not 0 < page.level <= _MAX_LEVEL:
            raise IntegrityError(f"page {where} is an index of level {page.level}")
        _check_names(names, where)
        return _Names(page.level, page.children, names, len(data))
    names = [entry.name for entry in page.entries]
    _check_names(names, where)
    return _Names(0, page.entries, names, len(data))


def _decoded(data: bytes, where: str, decode: Callable[[bytes], _Any]) -> _Any:
    try:
        page = decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise IntegrityError(f"page {where} cannot be decoded: {error}") from None
    if page.version != PAGE_VERSION:
        raise IntegrityError(f"page {where} has version {page.version}; this program reads version {PAGE_VERSION}: upgrade it")
    return page


def _check_names(names: list[str], where: str) -> None:
    """Refuse what cannot be one component of a path, repeats or is out of order; and a page without names."""
    joined = "/".join(names)
    bad = joined.count("/") != len(names) - 1 or "\0" in joined or not _NOT_NAMES.isdisjoint(names)
    if bad or not all(map(operator.lt, names, itertools.islice(names, 1, None))):
        raise IntegrityError(f"page {where} has names that are not valid, repeat or are out of order")
    longest = max(map(len, names))
    if longest > MAX_PATH_PART or (4 * longest > MAX_PATH_PART and max(map(_length, names)) > MAX_PATH_PART):
        raise IntegrityError(f"page {where} has a name of over {MAX_PATH_PART} bytes")


class DirBuilder:
    """Cuts a directory's entries into pages as they come, in ascending order of name; memory is one page a level."""

    def __init__(self, store_page: StorePage) -> None:
        self._store = store_page
        self._entries: list[Entry] = []
        self._weight = 0
        self._last = ""
        self._index = _IndexBuilder(store_page, 1)

    @property
    def aligned(self) -> bool:
        """Whether the next entry starts a page."""
        return not self._entries

    def add(self, entry: Entry) -> None:
        """Take the next entry."""
        if entry.name <= self._last:
            raise ValueError(f"entry {entry.name!r} comes after {self._last!r}")
        self._last = entry.name
        self._entries.append(entry)
        self._weight += weight(entry)
        if self._weight >= _MAX_WEIGHT or _ends_page(entry.name, 0):
            self._cut()

    def keep(self, child: Child) -> None:
        """Take a whole stored leaf page where :attr:`aligned`."""
        self._last = child.first
        self._index.add(child)

    def finish(self) -> Dir:
        """The directory, named ""."""
        if self._entries:
            self._cut()
        root = self._index.root()
        if root is None:
            return _EMPTY
        return Dir("", root.digest, root.page, root.count, root.size, root.files, root.links)

    def _cut(self) -> None:
        entries = self._entries
        totals = [_totals(entry) for entry in entries]
        size, files, links = (_sum(column) for column in zip(*totals, strict=True))
        page = self._store(_encode(_Leaf(PAGE_VERSION, entries)))
        self._index.add(Child(entries[0].name, leaf_digest(entries), page, len(entries), size, files, links))
        self._entries = []
        self._weight = 0


class _IndexBuilder:
    """The same for the pages of one level: stores them as index pages of ``level`` once there are several."""

    def __init__(self, store_page: StorePage, level: int) -> None:
        self._store = store_page
        self._level = level
        self._children: list[Child] = []
        self._above: _IndexBuilder | None = None

    def add(self, child: Child) -> None:
        self._children.append(child)
        count = len(self._children)
        if count >= _MAX_CHILDREN or (count > 1 and _ends_page(child.first, self._level)):
            self._cut()

    def root(self) -> Child | None:
        if self._above is None and len(self._children) <= 1:
            return self._children[0] if self._children else None
        if self._children:
            self._cut()
        assert self._above is not None
        return self._above.root()

    def _cut(self) -> None:
        children = self._children
        page = self._store(_encode(_Index(PAGE_VERSION, self._level, children)))
        if self._above is None:
            self._above = _IndexBuilder(self._store, self._level + 1)
        self._above.add(
            Child(
                children[0].first,
                index_digest(self._level, children),
                page,
                _sum(child.count for child in children),
                _sum(child.size for child in children),
                _sum(child.files for child in children),
                _sum(child.links for child in children),
            )
        )
        self._children = []


def identity(entry: Entry) -> tuple[object, ...]:
    """What the entry is, wherever it lies: equal for entries that no reader can tell apart."""
    if isinstance(entry, File):
        return (0, entry.name, entry.executable, entry.id)
    if isinstance(entry, Dir):
        return (1, entry.name, entry.digest)
    if isinstance(entry, Symlink):
        return (2, entry.name, entry.target)
    return (3, entry.name, entry.executable, entry.uri, entry.digest, sorted(entry.extra.items()))


def leaf_digest(entries: Iterable[Entry]) -> bytes:
    """The digest of a page of entries."""
    return _digest([identity(entry) for entry in entries])


def index_digest(level: int, children: Iterable[Child]) -> bytes:
    """The digest of an index page of ``level``."""
    return _digest((level, [child.digest for child in children]))


def weight(entry: Entry) -> int:
    """What an entry counts towards the size of its page: about its stored bytes at most, but such that no location, and no
    digest that users see, changes it."""
    size = _BASE_WEIGHT + _length(entry.name)
    if isinstance(entry, Symlink):
        return size + _length(entry.target)
    if isinstance(entry, Ref):
        extra = sum(_length(key) + _length(str(value)) for key, value in entry.extra.items())
        return size + _length(entry.uri) + _length(entry.digest) + extra
    if isinstance(entry, Remote):
        return size + _length(entry.locator)
    return size


def _length(text: str) -> int:
    """Bytes of ``text`` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def forget_page(data: bytes) -> Page:
    """A ``store_page`` that stores nothing: for digests alone."""
    return Page(blake3(data).digest(), Extent(b"", 0, len(data)))


def _digest(value: object) -> bytes:
    return blake3(_encode(value), derive_key_context=DIGEST_CONTEXT).digest()


def _totals(entry: Entry) -> tuple[int, int, int]:
    """(bytes, files, references) that an entry adds to its directory's totals."""
    if isinstance(entry, Dir):
        return entry.size, entry.files, entry.links
    if isinstance(entry, File):
        return entry.size, 1, 0
    if isinstance(entry, Ref):
        return max(entry.size, 0), 1, 1
    return 0, 0, 0


def _sum(totals: Iterable[int]) -> int:
    result = sum(totals)
    if result > _MAX_TOTAL:
        raise IntegrityError(f"a directory claims {result} bytes or files, which cannot be")
    return result


def _ends_page(name: str, level: int) -> bool:
    return xxhash.xxh3_64_intdigest(name.encode(), seed=level) % _CUT == 0


def _whole(directory: Dir) -> Child:
    """A directory's root page as an index page would list it."""
    assert directory.page is not None
    counts = (directory.count, directory.size, directory.files, directory.links)
    return Child("", directory.digest, directory.page, *counts)


class DirUpdate:
    """A stored directory with changes, given in ascending order of name, as a new one. See :meth:`Tree.update`."""

    def __init__(self, tree: Tree, base: Dir | None, store_page: StorePage, twin: Dir | None = None) -> None:
        """``twin``: a stored directory that is probably much the same; a page that it has already is not stored again."""
        self._tree = tree
        self._kept = {page.id: page for page in tree.index_pages(base or twin)}
        if twin is not None and base is None:
            self._kept.update((child.page.id, child.page) for child in tree.children(twin))
        self._builder = DirBuilder(lambda data: self._kept.get(blake3(data).digest()) or store_page(data))
        self._children = list(tree.children(base)) if base else []
        self._at = 0
        self._rest: Sequence[Entry] | None = None  # what is left of the leaf at _at; None while it has not been read
        self._last = ""

    def change(self, name: str, entry: Entry | None) -> None:
        """``name`` is ``entry`` (whose own name is ignored); None: it is not there, whether it was or not."""
        if name <= self._last:
            raise ValueError(f"change of {name!r} comes after {self._last!r}")
        self._last = name
        self._add_before(name)
        if entry is not None:
            self._builder.add(named(entry, name))

    def finish(self) -> Dir:
        """The directory, named ""."""
        while self._at < len(self._children):
            self._finish_child()
        return self._builder.finish()

    def _add_before(self, name: str) -> None:
        """Take over the entries of the base before ``name``, and pass over its own."""
        while self._at + 1 < len(self._children) and name >= self._children[self._at + 1].first:
            self._finish_child()
        if self._at == len(self._children):
            return
        rest = self._leaf() if self._rest is None else self._rest
        if not rest:
            return
        at = bisect_left(rest, name, key=lambda entry: entry.name)
        self._add(rest[:at])
        self._rest = rest[at + (at < len(rest) and rest[at].name == name) :]

    def _finish_child(self) -> None:
        """Take over the leaf at hand, or what is left of it; as a page, where a page can start and it is whole."""
        if self._rest is not None:
            self._add(self._rest)
        elif self._builder.aligned:
            self._builder.keep(self._children[self._at])
        else:
            self._add(self._leaf())
        self._rest = None
        self._at += 1

    def _leaf(self) -> Sequence[Entry]:
        child = self._children[self._at]
        self._kept[child.page.id] = child.page  # the changes may leave it as it was
        entries = self._tree.leaf(child)
        if self._at + 1 < len(self._children) and entries[-1].name >= self._children[self._at + 1].first:
            raise _disordered(self._children[self._at + 1])
        return entries

    def _add(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._builder.add(entry)


_EMPTY = Dir("", leaf_digest([]), None, 0, 0, 0, 0)
EMPTY = _EMPTY
"""The directory without entries."""
