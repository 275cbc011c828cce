"""Looking after a native store: collect what no version refers to, and check every byte that one does.

Both run beside commits and mounts. What keeps ``gc`` from taking what a commit under way needs is the grace period: it spares
objects younger than that, and everything that a version deleted less than that ago refers to. So no commit may take longer.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from artifactfs.errors import ArtifactFSError, IntegrityError
from artifactfs.model import BLOCK, Dir, Entry, File, Page, Ref, Version
from artifactfs.names import ArtifactName
from artifactfs.objects import object_key
from artifactfs.objects.local import TEMPORARY
from artifactfs.store.native import NativeStore
from artifactfs.tree import forget_page

GRACE = 24 * 3600.0
"""Seconds: longer than any commit takes, short enough that a deleted terabyte is gone the next day."""

_WORKERS = 2
_AHEAD = 64


@dataclasses.dataclass(slots=True)
class Collected:
    """What ``gc`` did, or would do: versions that expired, objects and their bytes removed, objects still in use."""

    expired: list[str] = dataclasses.field(default_factory=list)
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

    A page that cannot be read stops it with an IntegrityError before anything is removed: what it refers to is not known.
    """
    cutoff = time.time() - grace
    result = Collected()
    used: set[bytes] = set()
    seen: set[Page] = set()
    for version in _versions(store):
        if version.state == "COMMITTED" and _expired(version):
            result.expired.append(version.qualified_name)
            if not dry_run:
                _expire(store, version)
        elif version.state == "DELETED" and _seconds(version.deleted_at) < cutoff:
            continue
        _mark(store, version.root, seen, used)
    keys = {object_key(object) for object in used}
    for prefix in ("packs/", "blobs/", f"{TEMPORARY}/"):
        for info in store.objects.scan(prefix):
            if info.key in keys:
                result.kept += 1
            elif info.modified > cutoff:
                result.young += 1
            elif dry_run or store.objects.delete(info.key, unless_newer=cutoff):
                result.removed += 1
                result.bytes += info.size
    return result


def fsck(store: NativeStore, report: Callable[[Checked], None] | None = None) -> Iterator[Problem]:
    """Every problem of every version that is not deleted: catalog, pages, digests, totals, and each block of each content.

    A content that several versions share is read once. References are not fetched.
    """
    checked = Checked()
    done: set[tuple[object, ...]] = set()
    for name in _collections(store):
        try:
            versions = store.versions(name)
            collection = store.collection(name)
        except ArtifactFSError as error:
            yield Problem(str(name), "", str(error))
            continue
        numbers = {version.number for version in versions}
        for alias, number in sorted(collection.aliases.items()):
            if number not in numbers:
                yield Problem(str(name), "", f"alias {alias!r} leads to v{number}, which is not there")
        for version in versions:
            checked.versions += 1
            yield from check_version(store, version, done, checked, report)


def check_version(
    store: NativeStore,
    version: Version,
    done: set[tuple[object, ...]] | None = None,
    checked: Checked | None = None,
    report: Callable[[Checked], None] | None = None,
) -> Iterator[Problem]:
    """Every problem of one version, each stored byte read. ``done``: contents and directories that need no second look."""
    done = set() if done is None else done
    checked = checked or Checked()
    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="check") as pool:
        window: deque[tuple[str, File, Future[str]]] = deque()
        for path, entry in _sound_entries(store, version.root, done):
            if isinstance(entry, str):
                yield Problem(version.qualified_name, path, entry)
                continue
            if isinstance(entry, Ref) and entry.blocks is not None:
                trouble = _attempt(lambda ref: store.block_list(ref) and None, entry)
                if trouble:
                    yield Problem(version.qualified_name, path, trouble)
            key = (entry.id, entry.extents, entry.blocks, entry.table) if isinstance(entry, File) else ()
            if not isinstance(entry, File) or key in done:
                continue
            done.add(key)
            window.append((path, entry, pool.submit(_attempt, lambda file: _read_all(store, file), entry)))
            if len(window) > _AHEAD:
                yield from _result(version, *window.popleft(), checked, report)
        while window:
            yield from _result(version, *window.popleft(), checked, report)
    if version.digest != _attempt_digest(store, version):
        yield Problem(version.qualified_name, "", "its digest is not that of its files")


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


def _sound_entries(store: NativeStore, root: Dir, done: set[tuple[object, ...]]) -> Iterator[tuple[str, Entry | str]]:
    """(path, entry) of everything below ``root``; (path, what is wrong) for a directory whose pages are not as they must be."""
    pending: list[tuple[str, Dir]] = [("", root)]
    while pending:
        path, directory = pending.pop()
        key = (directory.page, directory.digest)
        if key in done:
            continue
        done.add(key)
        try:
            entries = list(store.tree.entries(directory))
            rebuilt = store.tree.update(None, ((entry.name, entry) for entry in entries), forget_page)
        except (ArtifactFSError, ValueError) as error:
            yield path, str(error)
            continue
        if _totals(rebuilt) != _totals(directory):
            yield path, "the directory's digest or totals are not those of its entries"
        for entry in entries:
            below = f"{path}/{entry.name}" if path else entry.name
            if isinstance(entry, Dir):
                pending.append((below, entry))
            else:
                yield below, entry


def _totals(directory: Dir) -> tuple[object, ...]:
    return (directory.digest, directory.count, directory.size, directory.files, directory.links)


def _attempt_digest(store: NativeStore, version: Version) -> str:
    """The version's digest, computed; its own where damage, reported already, makes that impossible."""
    try:
        return store.tree.digest(version.root, version.algorithm)
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
    """Read and check every block of a content."""
    content = store.local_content(file, recheck=True)
    if content is None:
        raise IntegrityError(f"{store.url} is not local")
    try:
        for offset in range(0, file.size, BLOCK):
            content.read(offset, BLOCK)
    finally:
        content.close()


def _collections(store: NativeStore) -> Iterator[ArtifactName]:
    for entity in store.entities():
        for project in store.projects(entity):
            for name in store.collection_names(entity, project):
                yield ArtifactName(entity, project, name)


def _versions(store: NativeStore) -> Iterator[Version]:
    for name in _collections(store):
        for number in store.numbers(name):
            yield store.any_version(name, number)


def _mark(store: NativeStore, root: Dir, seen: set[Page], used: set[bytes]) -> None:
    """Add the objects that the tree refers to."""
    for page, entries in store.tree.pages(root, seen):
        used.add(page.extent.object)
        for entry in entries:
            for extent in store.places(entry):
                used.add(extent.object)


def _expired(version: Version) -> bool:
    return version.ttl is not None and _seconds(version.created_at) + version.ttl < time.time()


def _expire(store: NativeStore, version: Version) -> None:
    name = ArtifactName(version.entity, version.project, version.collection, version.name)
    store.delete_version(name, delete_aliases=True)


def _seconds(timestamp: str) -> float:
    return datetime.datetime.fromisoformat(timestamp).timestamp()
