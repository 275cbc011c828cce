"""Looking after a native store: collect what no version refers to, and check every byte that one does.

Both run beside commits and mounts. What keeps ``gc`` from taking what a commit under way needs is the grace period: it spares
objects younger than that, and everything that a version deleted less than that ago refers to. So a commit is safe if less than
the grace period passes from its first look at the newest version to its own version's file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec

from artifactfs.content import DIGEST_SIZE, EMPTY_ID, Checksum, block_digest
from artifactfs.errors import ArtifactFSError, IntegrityError, NotFoundError
from artifactfs.model import BLOCK, Dir, Distributed, Entry, File, Page, Ref, Version, block_count
from artifactfs.names import ArtifactName, expires
from artifactfs.objects import ObjectInfo, object_key
from artifactfs.objects.local import TEMPORARY
from artifactfs.store.native import NativeStore, seconds
from artifactfs.tree import DirBuilder, Tree, forget_page

GRACE = 24 * 3600.0
"""Seconds: longer than any commit takes, short enough that a deleted terabyte is gone the next day."""

ABANDONED = 7 * 24 * 3600.0
"""Seconds, besides the grace period, after which the parts of a distributed version that nobody finishes are given up."""

_WORKERS = 2
_REMOTE_WORKERS = 16  # each mostly waits for the network
_AHEAD = 64
_MAX_DONE = 2_000_000
"""Contents and directories remembered as checked: 200 MB."""
_OBJECT = re.compile(r"(packs/[0-9a-f]{2}/[0-9a-f]{32}|blobs/[0-9a-f]{2}/[0-9a-f]{64})")


@dataclasses.dataclass(slots=True)
class Collected:
    """What ``gc`` did, or would do: versions that expired, distributed ones that nobody finished; objects and their bytes
    removed, objects still in use, and those too young to judge.
    """

    expired: list[str] = dataclasses.field(default_factory=list)
    abandoned: list[str] = dataclasses.field(default_factory=list)
    removed: int = 0
    bytes: int = 0
    kept: int = 0
    young: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it must be: in which version (or object), at which path, and what."""

    where: str
    path: str
    problem: str


@dataclasses.dataclass(slots=True)
class Checked:
    """Counts of a check so far."""

    versions: int = 0
    files: int = 0
    bytes: int = 0


def gc(store: NativeStore, *, dry_run: bool = False, grace: float = GRACE) -> Collected:
    """Mark versions whose TTL ran out as deleted, then remove objects that nothing refers to any more.

    ``grace`` is in seconds. A record or page that cannot be read stops it with an IntegrityError before anything is removed:
    what it refers to is not known.
    """
    cutoff = store.objects.clock() - grace  # objects tell their age by this clock
    result = Collected()
    used: set[bytes] = set()
    seen: set[Page] = set()
    defaults: dict[str, int | None] = {}
    # Parts first: one that is joined into a version meanwhile is marked as the one or the other.
    for where, root in _parts(store, cutoff - ABANDONED, dry_run, result):
        _mark(store, where, root, seen, used)
    for version in _versions(store):
        if version.state == "COMMITTED" and _expired(store, version, defaults):
            result.expired.append(version.qualified_name)
            if not dry_run:
                _expire(store, version)
        elif version.state == "DELETED" and seconds(version.deleted_at) < cutoff:
            continue
        _mark(store, version.qualified_name, version.root, seen, used)
    garbage = _Garbage(store, {object_key(object) for object in used}, cutoff, result)
    for key in garbage if dry_run else store.objects.remove(garbage, cutoff):
        result.removed += 1
        result.bytes += garbage.sizes.pop(key)
    if not dry_run:
        store.objects.sweep(cutoff)
    return result


class _Garbage:
    """The keys of objects that may go: not ``used``, and old. Counts the others."""

    def __init__(self, store: NativeStore, used: set[str], cutoff: float, result: Collected) -> None:
        self._store = store
        self._used = used
        self._cutoff = cutoff
        self._result = result
        self.sizes: dict[str, int] = {}
        """In bytes, of those that were given out and may yet be removed."""

    def __iter__(self) -> Iterator[str]:
        for info in _collectable(self._store):
            if info.key in self._used:
                self._result.kept += 1
            elif info.modified > self._cutoff:
                self._result.young += 1
            else:
                self.sizes[info.key] = info.size
                yield info.key


def fsck(store: NativeStore, report: Callable[[Checked], None] | None = None) -> Iterator[Problem]:
    """Every problem of every version that is not deleted: catalog, pages, digests, totals, and each block of each content.

    A content that several versions share is read once. References are not fetched.
    """
    checked = Checked()
    done: set[int] = set()
    for key in store.strangers():
        yield Problem(key, "", "is in the catalog, but is no name of anything")
    for name in _collections(store):
        yield from _check_collection(store, name)
        for number in store.numbers(name):
            try:
                version = store.any_version(name, number)
            except ArtifactFSError as error:
                yield Problem(str(name.at(f"v{number}")), "", str(error))
                continue
            if version.state == "COMMITTED":
                checked.versions += 1
                yield from check_version(store, version, done, checked, report)


def check_version(
    store: NativeStore,
    version: Version,
    done: set[int] | None = None,
    checked: Checked | None = None,
    report: Callable[[Checked], None] | None = None,
) -> Iterator[Problem]:
    """Every problem of one version, each stored byte read. ``done``: contents and directories that need no second look."""
    done = set() if done is None else done
    checked = checked or Checked()
    tree = Tree(store.load_page, cache_bytes=0)  # what is on disk now, not what was there when a page was read before
    with ThreadPoolExecutor(_WORKERS if store.local else _REMOTE_WORKERS, thread_name_prefix="check") as pool:
        window: deque[tuple[str, File, Future[str]]] = deque()
        for path, entry in _sound_entries(tree, version.root, done):
            if isinstance(entry, str):
                yield Problem(version.qualified_name, path, entry)
            elif isinstance(entry, Ref) and entry.blocks is not None:
                trouble = _attempt(lambda ref: store.block_list(ref) and None, entry)
                if trouble:
                    yield Problem(version.qualified_name, path, trouble)
            elif isinstance(entry, File) and _first(done, msgspec.structs.replace(entry, name="", executable=False)):
                window.append((path, entry, pool.submit(_attempt, lambda file: _read_all(store, file), entry)))
                if len(window) > _AHEAD:
                    yield from _result(version, *window.popleft(), checked, report)
        while window:
            yield from _result(version, *window.popleft(), checked, report)
    if version.digest != _attempt_digest(tree, version):
        yield Problem(version.qualified_name, "", "its digest is not that of its files")
    if (version.size, version.file_count) != (version.root.size, version.root.files):
        yield Problem(version.qualified_name, "", "its size or file count is not that of its files")


def _check_collection(store: NativeStore, name: ArtifactName) -> Iterator[Problem]:
    try:
        aliases = store.collection(name).aliases
    except NotFoundError:  # all of its versions are deleted, or none has come into being yet
        return
    except ArtifactFSError as error:
        yield Problem(str(name), "", str(error))
        return
    for alias, number in sorted(aliases.items()):
        try:
            store.version(name.at(f"v{number}"))
        except NotFoundError as error:
            if store.collection(name).aliases.get(alias) == number:  # still: nobody is just moving it
                yield Problem(str(name), "", f"alias {alias!r} leads nowhere: {error}")
        except ArtifactFSError:
            pass  # reported with the version


def _result(
    version: Version, path: str, file: File, future: Future[str], checked: Checked, report: Callable[[Checked], None] | None
) -> Iterator[Problem]:
    problem = future.result()
    checked.files += 1
    checked.bytes += file.size
    if report is not None:
        report(checked)
    if problem:
        yield Problem(version.qualified_name, path, problem)


def _sound_entries(tree: Tree, root: Dir, done: set[int]) -> Iterator[tuple[str, Entry | str]]:
    """(path, entry) of everything below ``root``; (path, what is wrong) for a directory whose pages are not as they must be."""
    pending: list[tuple[str, Dir]] = [("", root)]
    while pending:
        path, directory = pending.pop()
        if not _first(done, msgspec.structs.replace(directory, name="")):
            continue
        rebuilt = DirBuilder(forget_page)
        try:
            for entry in tree.entries(directory):
                rebuilt.add(entry)
                below = f"{path}/{entry.name}" if path else entry.name
                if isinstance(entry, Dir):
                    pending.append((below, entry))
                else:
                    yield below, entry
            if _totals(rebuilt.finish()) != _totals(directory):
                yield path, "the directory's digest or totals are not those of its entries"
        except ArtifactFSError as error:
            yield path, str(error)


def _first(done: set[int], entry: Entry) -> bool:
    """Whether ``entry`` is not in ``done``, to which it is added. Hashes will do: at worst it is checked in another run."""
    seen = hash(entry)
    if seen in done:
        return False
    if len(done) >= _MAX_DONE:
        done.clear()
    done.add(seen)
    return True


def _totals(directory: Dir) -> tuple[object, ...]:
    return (directory.digest, directory.count, directory.size, directory.files, directory.links)


def _attempt_digest(tree: Tree, version: Version) -> str:
    """The version's digest, computed; its own where damage, reported already, makes that impossible."""
    try:
        return tree.digest(version.root, version.algorithm)
    except ArtifactFSError:
        return version.digest


def _attempt(action: Callable[[File], object] | Callable[[Ref], object], entry: File | Ref) -> str:
    """What went wrong; "" if nothing."""
    try:
        action(entry)  # type: ignore[arg-type]  # each caller pairs them
    except ArtifactFSError as error:
        return str(error)
    return ""


def _read_all(store: NativeStore, file: File) -> None:
    """Read and check every block of a content, and the checksum that users see."""
    checksum = Checksum(file.algorithm)
    for block in _checked_blocks(store, file):
        checksum.update(block)
    if checksum.finish() != file.checksum or (not file.size and file.id != EMPTY_ID):
        raise IntegrityError(f"content {file.id.hex()} is sound, but its entry has another digest than it")


def _checked_blocks(store: NativeStore, file: File) -> Iterator[bytes | memoryview]:
    """The blocks of a content as they are stored now, each checked."""
    content = store.local_content(file, recheck=True)
    if content is not None:
        with contextlib.closing(content):
            for offset in range(0, file.size, BLOCK):
                yield content.read(offset, BLOCK)
        return
    digests = store.block_list(file)
    number, block = 0, bytearray()
    for piece in store.source(file).fetch(0, file.size):
        view = memoryview(piece)
        while view:
            taken = view[: min(BLOCK, file.size - number * BLOCK) - len(block)]
            block += taken
            view = view[len(taken) :]
            if len(block) == min(BLOCK, file.size - number * BLOCK):
                if block_digest(block) != digests[number * DIGEST_SIZE : (number + 1) * DIGEST_SIZE]:
                    raise IntegrityError(f"block {number} of content {file.id.hex()} in {store.url} is damaged")
                yield memoryview(block)
                number, block = number + 1, bytearray()
    if block or number != block_count(file.size):
        raise IntegrityError(f"content {file.id.hex()} in {store.url} ends too early")


def _collections(store: NativeStore) -> Iterator[ArtifactName]:
    for entity in store.entities():
        for project in store.projects(entity):
            for name in store.collection_names(entity, project):
                yield ArtifactName(entity, project, name)


def _versions(store: NativeStore) -> Iterator[Version]:
    """All of them; IntegrityError if there is anything that could be one and cannot be read."""
    for key in store.strangers():
        raise IntegrityError(f"{key} in {store.url} is no name of anything; what it holds is not known: move it away first")
    for name in _collections(store):
        for number in store.numbers(name):
            yield store.any_version(name, number)


def _parts(store: NativeStore, cutoff: float, dry_run: bool, result: Collected) -> Iterator[tuple[str, Dir]]:
    """(what it is, tree) of all parts of distributed versions. Those that nobody added to since ``cutoff`` are given up."""
    for name in _collections(store):
        for record in store.all_distributed(name):
            parts = [*record.parts, *(record.closing.parts if record.closing else ())]
            where = f"distributed version {record.id!r} of {name.path}"
            if parts and seconds(record.updated_at) < cutoff:
                result.abandoned.append(where)
                if not dry_run:
                    _abandon(store, name, record)
            yield from ((where, part.root) for part in parts)


def _abandon(store: NativeStore, name: ArtifactName, seen: Distributed) -> None:
    """Drop the parts, unless somebody has just added another; the next run collects what they refer to."""

    def drop(current: Distributed | None) -> Distributed:
        assert current is not None
        return msgspec.structs.replace(current, parts=[], closing=None) if current == seen else current

    store.update_distributed(name, seen.id, drop)


def _mark(store: NativeStore, where: str, root: Dir, seen: set[Page], used: set[bytes]) -> None:
    """Add the objects that the tree ``root`` refers to."""
    try:
        for page, entries in store.tree.pages(root, seen):
            used.add(page.extent.object)
            for entry in entries:
                for extent in store.places(entry):
                    used.add(extent.object)
    except (IntegrityError, NotFoundError) as error:
        raise IntegrityError(f"{where} cannot be read, so nothing is removed: {error}") from None


def _collectable(store: NativeStore) -> Iterator[ObjectInfo]:
    """The objects that are ours to remove."""
    for prefix in ("packs/", "blobs/"):
        yield from (info for info in store.objects.scan(prefix) if _OBJECT.fullmatch(info.key))
    yield from store.objects.scan(f"{TEMPORARY}/")


def _expired(store: NativeStore, version: Version, defaults: dict[str, int | None]) -> bool:
    """Whether its TTL has run out; one that a registry has a link to does not expire. ``defaults`` are those of entities."""
    ttl = version.ttl
    if ttl is None and version.ttl_inherited:
        if version.entity not in defaults:
            defaults[version.entity] = store.entity_settings(version.entity).default_ttl
        ttl = defaults[version.entity]
    if ttl is None or not expires(version.type) or seconds(version.created_at) + ttl >= time.time():
        return False
    return not store.in_registry(version)


def _expire(store: NativeStore, version: Version) -> None:
    name = ArtifactName(version.entity, version.project, version.collection, version.name)
    with contextlib.suppress(NotFoundError):  # deleted by somebody else, a moment ago
        store.delete_version(name, delete_aliases=True)
