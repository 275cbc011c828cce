"""Fetch a version's outside bytes into the cache ahead of time, see what is there, and let go of it.

Only what is not on a disk of this machine anyway counts: contents of a local store and ``file://`` references need no cache.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

from artifactfs.cache import BlockCache
from artifactfs.errors import ArtifactFSError, UsageError
from artifactfs.model import BLOCK, Dir, File, Ref, Symlink, Version
from artifactfs.publish import Progress, Report
from artifactfs.reader import Reader, cache_keys
from artifactfs.references import is_local, is_pinned
from artifactfs.store import Store

_STREAMS = 4
"""Entries fetched at once: the reader fetches each large one by several streams already."""
_BATCH = 256
"""Entries whose small contents are fetched together: some 10 MB of those in packs."""
_AHEAD = 2 * _BATCH
_PIECE = 8 * BLOCK

Remote: TypeAlias = File | Ref


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """An entry that could not be fetched."""

    path: str
    error: ArtifactFSError


@dataclasses.dataclass(frozen=True, slots=True)
class Cached:
    """How much of an entry can be read without a connection. ``size`` -1: unknown, as nobody has asked its remote."""

    path: str
    size: int
    cached: int


def remote_entries(store: Store, version: Version, prefix: str = "") -> Iterator[tuple[str, Remote]]:
    """(path, entry) of everything whose bytes are elsewhere and whose path starts with ``prefix``."""
    for path, entry in store.tree.walk(version.root):
        if isinstance(entry, (Dir, Symlink)) or not path.startswith(prefix):
            continue
        if not _is_here(store, entry):
            yield path, entry


def warm(store: Store, reader: Reader, version: Version, prefix: str = "", report: Report | None = None) -> list[Failure]:
    """Fetch everything remote that is not cached yet; what failed. ``report``: ``stored`` counts bytes that were fetched."""
    progress = Progress()
    lock = threading.Lock()
    failures: list[Failure] = []

    def fetch(path: str, entry: Remote, before: int) -> None:
        try:
            size = _read_through(reader, entry, f"{version.qualified_name}/{path}")
        except ArtifactFSError as error:
            with lock:
                failures.append(Failure(path, error))
            return
        with lock:
            progress.files += 1
            progress.bytes += size
            progress.stored += max(0, size - before)
            if report is not None:
                report(progress)

    with ThreadPoolExecutor(_STREAMS, thread_name_prefix="warm") as pool:
        window: deque[Future[None]] = deque()
        entries = remote_entries(store, version, prefix)
        while batch := list(itertools.islice(entries, _BATCH)):
            before = [_cached_bytes(reader, entry) for _, entry in batch]
            while not reader.prefetch_small(entry for _, entry in batch) and window:
                window.popleft().result()
            window.extend(pool.submit(fetch, *item, had) for item, had in zip(batch, before, strict=True))
            while len(window) > _AHEAD:
                window.popleft().result()
        while window:
            window.popleft().result()
    return failures


def check(store: Store, reader: Reader, version: Version, prefix: str = "") -> Iterator[Cached]:
    """What of each remote entry is in the cache."""
    for path, entry in remote_entries(store, version, prefix):
        yield Cached(path, entry.size, reader.cached_bytes(entry))


def evict(store: Store, cache: BlockCache, version: Version, prefix: str = "") -> int:
    """Remove the remote entries from the cache; the bytes that this freed. Mounts go on, and fetch again what they need."""
    freed = 0
    for _, entry in remote_entries(store, version, prefix):
        if isinstance(entry, File) or is_pinned(entry):
            freed += sum(cache.evict(key) for key in cache_keys(cache, store, entry))
    return freed


def _cached_bytes(reader: Reader, entry: Remote) -> int:
    """As :meth:`Reader.cached_bytes`; 0 for what cannot be: reading it will say why."""
    try:
        return reader.cached_bytes(entry)
    except ArtifactFSError:
        return 0


def _is_here(store: Store, entry: Remote) -> bool:
    if isinstance(entry, Ref):
        return is_local(entry)
    content = store.local_content(entry)
    if content is not None:
        content.close()
    return content is not None


def _read_through(reader: Reader, entry: Remote, where: str) -> int:
    """Read all of an entry, which leaves it in the cache; its size."""
    if reader.cache is None:
        raise UsageError("there is no cache to warm; set ARTIFACTFS_CACHE_DIR or ARTIFACTFS_CACHE_SIZE")
    handle = reader.open(entry, where)
    try:
        offset = 0
        while piece := handle.read(offset, _PIECE):
            offset += len(piece)
        return offset
    finally:
        handle.close()
