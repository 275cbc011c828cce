"""What a commit stores: local files become contents, folders become pages, everything in walk order.

Each file is read once. Workers read and hash small files in batches, and the segments of large ones; the calling thread walks
the folder, finds what is stored already, fills packs and builds pages. Files of another store are read from there by workers of
their own: they mostly wait. Nothing is durable before :meth:`Upload.flush`.

What is not stored again: a content this commit has already stored; one that the collection's newest version has, at the same
path or at any other; and of a large file, the blocks that the newest version's file of that path (or ``NewFile.base``) has at
the same place.
"""

from __future__ import annotations

import dataclasses
import os
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import NoneType
from typing import Protocol, TypeAlias, TypeVar

import msgspec
from blake3 import blake3

from artifactfs.content import Fingerprint
from artifactfs.errors import InvalidNameError, UsageError
from artifactfs.model import BLAKE3, BLOCK, Dir, Entry, File, Page, Ref, Remote, Symlink, Version, named
from artifactfs.names import check_part
from artifactfs.pack import PackWriter
from artifactfs.store.arrived import Arrived
from artifactfs.store.native import NativeStore
from artifactfs.store.storing import NewFile, Storing, Streamed, read_batch, read_streamed
from artifactfs.tree import MAX_ENTRY_WEIGHT, DirUpdate, Tree, weight

__all__ = ["Change", "Folder", "Index", "NewFile", "NewRef", "Progress", "Report", "Streamed", "Upload", "check_entry"]

_BATCH = 16
"""Files that a worker reads at a time: a future costs about as much as a small file does."""
_WORKERS = max(2, min(8, os.cpu_count() or 2))
_AHEAD = 2 * _WORKERS
"""Batches and segments under way: bounds memory to so many times 16 MiB at worst."""
_FETCHERS = 16
"""Small files of another store that are read at once: each is a round trip."""
_FETCHES = 64
"""Those read ahead: 64 MiB at worst."""
_MAX_WINDOW = 4096
"""Steps of the walk looked at ahead, where there are no files to read."""
_RUN = 1 << 20
"""Contents that are sorted at a time for the index: 50 MB while it lasts, 8 afterwards."""
_PREFIX_SHIFT = 36
_PLACE_BITS = 12
"""No page of ours has more entries than this numbers: each weighs 256 bytes at least, and a page 960 KiB at most."""


@dataclasses.dataclass(frozen=True, slots=True)
class NewRef:
    """A reference whose content was read when it was added: its block list is stored with it."""

    ref: Ref
    block_list: bytes


class Folder(Protocol):
    """A directory to publish: what is in ``base`` stays, but for the changes."""

    @property
    def base(self) -> Dir | None: ...

    def changes(self) -> Iterator[tuple[str, Change]]:
        """(name, change), in ascending order of the names' UTF-8 bytes, each name once."""


Change: TypeAlias = "File | Dir | Symlink | Ref | NewFile | NewRef | Streamed | Folder | None"
"""An entry is taken as it is (its own name is ignored); NewFile and Streamed are stored; Folder is built; None deletes the
name."""


@dataclasses.dataclass(slots=True)
class Progress:
    """Counts so far, for a progress bar: files and bytes read, bytes that had to be stored."""

    files: int = 0
    bytes: int = 0
    stored: int = 0


Report: TypeAlias = Callable[[Progress], None]


_ENCODE = msgspec.msgpack.Encoder().encode

_Batch: TypeAlias = "Future[list[tuple[bytes, Fingerprint] | None]]"
_Fetch: TypeAlias = "Future[tuple[bytes, Fingerprint]]"
_Kind = TypeVar("_Kind", Dir, File, Ref)
_AnyEntry = TypeVar("_AnyEntry", bound=Entry)


@dataclasses.dataclass(slots=True)
class _Token:
    """One step of the walk: a change of ``name``, or the end of a folder (``name`` "")."""

    name: str
    change: Change
    batch: _Batch | None = None
    at: int = 0
    fetch: _Fetch | None = None


@dataclasses.dataclass(slots=True)
class _Level:
    """A directory being built: its name, its pages, and the newest version's directory of the same path."""

    name: str
    update: DirUpdate
    twin: Dir | None


class Upload:
    """One commit's stored contents and pages. For one thread; use it once, then :meth:`close`."""

    def __init__(
        self,
        store: NativeStore,
        newest: Version | None,
        algorithm: str = BLAKE3,
        report: Report | None = None,
        stored: Mapping[bytes, File] | None = None,
        arrived: Arrived | None = None,
    ) -> None:
        """``stored``: contents by id that are stored already, though no version has them; ``arrived`` is told what will be."""
        self._store = store
        self._newest = newest.root if newest else None
        self._algorithm = algorithm
        self._report = report
        self._progress = Progress()
        self._contents = PackWriter(store.objects)
        self._pages = PackWriter(store.objects)
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="upload")
        self._stored = dict(stored or {})
        self._index = Index(store.tree, self._newest)
        self._storing = Storing(store, self._contents, self._pool, _AHEAD, algorithm, self._stored, self._find, self._count)
        self._fetchers = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="fetch")
        self._ahead = _Ahead(iter(()), self._pool, self._fetchers, algorithm)
        if arrived is not None:
            packed = self._storing.packed = {}
            self._contents.written = lambda object: arrived.add(object, packed.pop(object, []))

    def build(self, folder: Folder) -> Dir:
        """``folder`` as a stored directory named ""; not durable yet."""
        self._ahead = _Ahead(_walk(folder), self._pool, self._fetchers, self._algorithm)
        levels = [self._level("", folder, self._newest)]
        while True:
            token = self._ahead.next()
            level = levels[-1]
            if token.name == "":
                built = levels.pop().update.finish()
                if not levels:
                    return built
                levels[-1].update.change(level.name, built)
            elif isinstance(token.change, (NewFile, NewRef, Streamed, File, Dir, Symlink, Ref, NoneType)):
                level.update.change(token.name, self._entry(token, level))
            else:
                levels.append(self._level(token.name, token.change, self._twin(level, token.name, Dir)))

    def flush(self) -> None:
        """Return once every content and page is durable."""
        self._contents.seal()
        self._pages.seal()  # both reach the disk at the same time
        self._contents.flush()
        self._pages.flush()

    def close(self) -> None:
        """Forget what was not flushed and end the threads. Idempotent."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._fetchers.shutdown(wait=True, cancel_futures=True)
        self._contents.close()
        self._pages.close()

    def _level(self, name: str, folder: Folder, twin: Dir | None) -> _Level:
        return _Level(name, DirUpdate(self._store.tree, folder.base, self._store_page, twin), twin)

    def _twin(self, level: _Level, name: str, kind: type[_Kind]) -> _Kind | None:
        """What the newest version has at this path, if it is of that kind."""
        found = self._store.tree.lookup(level.twin, name) if level.twin else None
        return found if isinstance(found, kind) else None

    def _entry(self, token: _Token, level: _Level) -> Entry | None:
        """The entry that a change comes to; its name is not yet right."""
        change = token.change
        if isinstance(change, Remote):
            raise UsageError(f"{token.name!r} is on an artifact server; copy the version it is of into this store first")
        if isinstance(change, (File, Dir, Symlink, Ref)):
            return check_entry(named(change, token.name))
        if isinstance(change, NewRef):
            ref = check_entry(msgspec.structs.replace(change.ref, name=token.name))
            return self._reference(ref, change.block_list, self._twin(level, token.name, Ref))
        if isinstance(change, Streamed):
            read = self._ahead.fetched(token) if token.fetch is not None else None
            return self._storing.streamed(change, read, self._twin(level, token.name, File))
        if not isinstance(change, NewFile):
            return None
        if change.base is not None:
            return self._storing.patched(change, change.base)
        small = self._ahead.result(token)
        prior = self._twin(level, token.name, File)
        if small is None:
            return self._storing.large(change, prior)
        data, found = small
        return self._storing.small(change, data, found, prior)

    def _reference(self, ref: Ref, block_list: bytes, prior: Ref | None) -> Ref:
        """The reference with its block list stored, where it has one."""
        if not block_list:
            return ref
        known = prior.blocks if prior is not None and prior.id == ref.id else None
        return msgspec.structs.replace(ref, blocks=known or self._contents.add(block_list))

    def _find(self, id: bytes) -> File | None:
        return self._index.find(id, self._ahead.outstanding)

    def _store_page(self, data: bytes) -> Page:
        return Page(blake3(data).digest(), self._pages.add(data))

    def _count(self, files: int, size: int) -> None:
        self._progress.files += files
        self._progress.bytes += size
        self._progress.stored = self._storing.written
        if self._report is not None:
            self._report(self._progress)


class _Ahead:
    """Walks a folder a little ahead, so that workers read its small files while the caller is busy with those before."""

    def __init__(self, tokens: Iterator[_Token], pool: ThreadPoolExecutor, fetchers: ThreadPoolExecutor, algorithm: str) -> None:
        self._tokens = tokens
        self._pool = pool
        self._fetchers = fetchers
        self._fetches: deque[_Fetch] = deque()
        self._algorithm = algorithm
        self._window: deque[_Token] = deque()
        self._unsent: list[_Token] = []
        self._batches: deque[_Batch] = deque()
        self._exhausted = False

    def next(self) -> _Token:
        """The next step of the walk; the last one ends the root folder."""
        while (
            not self._exhausted
            and len(self._batches) < _AHEAD
            and len(self._fetches) < _FETCHES
            and len(self._window) < _MAX_WINDOW
        ):
            token = next(self._tokens, None)
            if token is None:
                self._exhausted = True
                break
            self._window.append(token)
            if isinstance(token.change, Streamed) and token.change.size <= BLOCK:
                token.fetch = self._fetchers.submit(read_streamed, token.change)
                self._fetches.append(token.fetch)
            if isinstance(token.change, NewFile) and token.change.base is None:
                self._unsent.append(token)
                if len(self._unsent) == _BATCH:
                    self._send()
        if self._exhausted:
            self._send()
        return self._window.popleft()

    def result(self, token: _Token) -> tuple[bytes, Fingerprint] | None:
        """The bytes and fingerprint of a small file; None for a large one. Once a token."""
        if token.batch is None:
            self._send()
        assert token.batch is not None
        batch = token.batch.result()
        if token.at == len(batch) - 1:
            self._batches.popleft()
        # Let go of it, so that a batch's memory goes as its files are done.
        result, batch[token.at] = batch[token.at], None
        return result

    def fetched(self, token: _Token) -> tuple[bytes, Fingerprint]:
        """The same of a small file of another store. Once a token, in their order."""
        fetch = self._fetches.popleft()
        assert fetch is token.fetch
        token.fetch = None
        return fetch.result()

    def outstanding(self) -> set[bytes] | None:
        """The ids of all small files still to come, if the walk has seen them all; else None."""
        if not self._exhausted:
            return None
        return {fetch.result()[1].id for fetch in self._fetches} | {
            small[1].id for batch in self._batches for small in batch.result() if small is not None
        }

    def _send(self) -> None:
        if not self._unsent:
            return
        paths = [token.change.path for token in self._unsent if isinstance(token.change, NewFile)]
        batch = self._pool.submit(read_batch, paths, self._algorithm)
        self._batches.append(batch)
        for at, token in enumerate(self._unsent):
            token.batch, token.at = batch, at
        self._unsent = []


class Index:
    """Finds contents of the newest version by id, at whatever path; reads all of its pages when first asked.

    ``pace`` is called between two pages.
    """

    def __init__(self, tree: Tree, root: Dir | None, pace: Callable[[], None] = lambda: None) -> None:
        self._pace = pace
        self._tree = tree
        self._root = root
        self._found: dict[bytes, File] = {}
        self._searched: set[bytes] = set()
        self._pages: list[Page] = []
        self._runs: list[array[int]] | None = None

    def find(self, id: bytes, candidates: Callable[[], set[bytes] | None]) -> File | None:
        """The file with that content, or None. ``candidates``: all ids that will be asked for, if that is known: then one pass
        looks for them, and no index is kept."""
        if self._root is None:
            return None
        if self._runs is not None:
            return self._look_up(id)
        if id in self._searched:
            return self._found.get(id)
        wanted = candidates() if not self._searched else None
        if wanted is None:
            self._runs = list(self._sorted(self._root))
            return self._look_up(id)
        self._searched = wanted | {id}
        for page, ids in self._tree.content_ids(self._root):
            for found in self._searched.intersection(ids):
                self._found[found] = self._file(page, ids.index(found))
        return self._found.get(id)

    def _sorted(self, root: Dir) -> Iterator[array[int]]:
        """Sorted runs of 8 bytes a content: 28 bits of its id, then its page, then its place in that."""
        keys: list[int] = []
        for page, ids in self._tree.content_ids(root):
            self._pace()
            number = len(self._pages) << _PLACE_BITS
            self._pages.append(page)
            keys.extend(_prefix(id) | number | place for place, id in enumerate(ids[: 1 << _PLACE_BITS]) if id)
            if len(keys) >= _RUN:
                yield array("Q", sorted(keys))
                keys = []
        yield array("Q", sorted(keys))

    def _look_up(self, id: bytes) -> File | None:
        prefix = _prefix(id)
        for run in self._runs or ():
            for at in range(bisect_left(run, prefix), len(run)):
                if run[at] >> _PREFIX_SHIFT != prefix >> _PREFIX_SHIFT:
                    break
                place = run[at] - prefix
                file = self._file(self._pages[place >> _PLACE_BITS], place & ((1 << _PLACE_BITS) - 1))
                if file.id == id:
                    return file
        return None

    def _file(self, page: Page, position: int) -> File:
        entry = self._tree.entry_at(page, position)
        assert isinstance(entry, File)
        return entry


def _prefix(id: bytes) -> int:
    return int.from_bytes(id[:4], "little") >> 4 << _PREFIX_SHIFT


def check_entry(entry: _AnyEntry) -> _AnyEntry:
    """``entry``, if it can be stored and read again: text that is UTF-8, of bounded length. InvalidNameError otherwise."""
    try:
        heavy = weight(entry) > MAX_ENTRY_WEIGHT
        _ENCODE(entry)
    except (UnicodeEncodeError, OverflowError, ValueError, TypeError) as error:
        raise InvalidNameError(f"entry {entry.name[:80]!r} cannot be stored: {error}") from None
    if heavy:
        raise InvalidNameError(f"entry {entry.name[:40]!r} has over {MAX_ENTRY_WEIGHT >> 10} KiB of name, target or reference")
    return entry


def _walk(folder: Folder) -> Iterator[_Token]:
    """The changes of ``folder`` and of the folders in it, depth first; each folder ends with a token without a name."""
    stack = [folder.changes()]
    while stack:
        name, change = next(stack[-1], ("", None))
        if name == "":
            stack.pop()
            yield _Token("", None)
            continue
        check_part(name)
        yield _Token(name, change)
        if not isinstance(change, (NewFile, NewRef, Streamed, File, Dir, Symlink, Ref, NoneType)):
            stack.append(change.changes())
