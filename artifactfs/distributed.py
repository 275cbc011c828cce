"""Versions that many processes add to, on as many machines as reach the store: parts first, then one commit that joins them.

A part's contents and pages are stored before the record names it, so that whoever finishes reads nothing of anybody's disk. The
record changes by compare-and-swap: what is being finished is taken out of it first, under a commit id that it keeps, so that a
finish that died, or that two processes do at once, makes one version. What is added after that is of the next version.

That is for native stores. A server that knows of such versions keeps the parts itself: ``ArtifactServer.add_part``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import msgspec

from artifactfs.errors import ConflictError, NotFoundError, UsageError
from artifactfs.model import Closing, Dir, Distributed, Entry, File, Part, Ref, Symlink, Version
from artifactfs.names import ArtifactName
from artifactfs.publish import Change, Draft, Published, checked, publish, store_folder
from artifactfs.store import Store
from artifactfs.store.native import NativeStore, native_store, now
from artifactfs.store.server import ArtifactServer
from artifactfs.tree import Tree

_ATTEMPTS = 8
"""Times that an incremental version is laid over the newest one: each lost race is somebody's commit."""


_TOGETHER = "logged to by several processes together"


def add_part(store: Store, id: str, draft: Draft) -> None:
    """Store what ``draft`` holds as a part of the distributed version ``id``; ``draft.commit`` makes it one part, however often.

    UsageError if others add to it with another type or digest algorithm.
    """
    if isinstance(store, ArtifactServer):
        store.add_part(id, checked(draft))
    else:
        _add_part(native_store(store, _TOGETHER), id, draft)


def _add_part(store: NativeStore, id: str, draft: Draft) -> None:
    root = store_folder(store, draft)
    part = _part(draft, root)

    def add(current: Distributed | None) -> Distributed:
        record = current or _new(id, draft)
        _check_like(record, draft)
        closing = record.closing.parts if record.closing else ()
        if any(known.commit == part.commit for known in (*record.parts, *closing)):
            return record
        return msgspec.structs.replace(
            record, type=draft.type or record.type, algorithm=draft.algorithm, parts=[*record.parts, part]
        )

    store.update_distributed(draft.name, id, add)


def finish(store: Store, id: str, draft: Draft, *, incremental: bool = False) -> Version:
    """Add ``draft`` as the last part, and make everything that was added to ``id`` one version, which is returned.

    A path that two parts give different contents is a ConflictError: then nothing is made, and the parts are dropped.
    ``incremental``: the parts are laid over the newest version. What joins the parts of a server is the server.
    """
    if not isinstance(store, ArtifactServer):
        return _finish(native_store(store, _TOGETHER), id, draft, incremental)
    if incremental:
        raise UsageError(f"{store.url} is an artifact server, which cannot lay parts over a version; leave incremental out")
    return store.finish(id, checked(draft))


def _finish(store: NativeStore, id: str, draft: Draft, incremental: bool) -> Version:
    begun = _finish_closing(store, draft.name, id)  # what somebody began and died over comes first
    if begun is not None and any(part.commit == draft.commit for part in begun.parts):
        return begun.version  # it was us
    _add_part(store, id, draft)
    numbers = store.numbers(draft.name)
    after = numbers[-1] if numbers else -1
    commit = secrets.token_hex(16)

    def close(current: Distributed | None) -> Distributed:
        assert current is not None
        if current.closing is not None or not current.parts:
            return current
        closing = Closing(commit=commit, parts=current.parts, after=after, incremental=incremental, run=draft.run)
        return msgspec.structs.replace(current, parts=[], closing=closing)

    store.update_distributed(draft.name, id, close)
    finished = _finish_closing(store, draft.name, id)
    if finished is not None:
        return finished.version
    record = store.distributed(draft.name, id)  # another process finished ours with its own
    if record is None or not record.last:
        raise ConflictError(f"the parts of {draft.name.path} were given up by another process; upsert them again")
    return store.version(draft.name.at(record.last))


class _Finished(NamedTuple):
    version: Version
    parts: list[Part]


def _finish_closing(store: NativeStore, name: ArtifactName, id: str) -> _Finished | None:
    """Make the version that is being closed; None if there is none."""
    record = store.distributed(name, id)
    if record is None or record.closing is None:
        return None
    closing = record.closing
    try:
        version = _join(store, name, record, closing).version
    except (ConflictError, UsageError):
        _settle(store, name, id, closing, record.last)
        raise
    _settle(store, name, id, closing, version.name)
    for run in {part.run for part in closing.parts if part.run}:
        _note_run(store, run, version)
    return _Finished(version, closing.parts)


def _note_run(store: NativeStore, path: str, version: Version) -> None:
    """Let the record of a run that added a part say so."""
    with contextlib.suppress(NotFoundError, ValueError):
        entity, project, id = path.split("/")
        store.save_run(msgspec.structs.replace(store.run(entity, project, id), logged=[version.qualified_name]))


def _settle(store: NativeStore, name: ArtifactName, id: str, closing: Closing, last: str) -> None:
    """Note that ``closing`` is over, unless another process has."""

    def settle(current: Distributed | None) -> Distributed:
        assert current is not None
        if current.closing is None or current.closing.commit != closing.commit:
            return current
        return msgspec.structs.replace(current, closing=None, last=last)

    store.update_distributed(name, id, settle)


def _join(store: NativeStore, name: ArtifactName, record: Distributed, closing: Closing) -> Published:
    parts = closing.parts
    last = parts[-1]
    roots = tuple(part.root for part in parts)
    metadata = {key: value for part in parts for key, value in part.metadata.items()}
    draft = Draft(
        name=name,
        type=record.type,
        folder=_Union(store.tree, roots, "", None),
        commit=closing.commit,
        algorithm=record.algorithm,
        description=next((part.description for part in reversed(parts) if part.description is not None), None),
        metadata=metadata,
        tags=list(dict.fromkeys(tag for part in parts for tag in part.tags)),
        aliases=list(dict.fromkeys(alias for part in parts for alias in part.aliases)),
        ttl=last.ttl,
        inherit_ttl=last.ttl_inherited,
        run=closing.run,
        retry=True,
        since=closing.after,
    )
    if not closing.incremental:
        return publish(store, draft)
    lost = 0
    newest = store.newest(name)
    while True:
        folder = _Union(store.tree, roots, "", newest.root if newest else None)
        over = {"base": newest.number, "expect_base": newest.number} if newest else {"base": None, "expect_base": -1}
        try:
            return publish(store, dataclasses.replace(draft, folder=folder, **over))
        except ConflictError:
            before, newest = newest, store.newest(name)
            lost += 1
            if (newest and newest.number) == (before and before.number) or lost == _ATTEMPTS:
                raise


def _new(id: str, draft: Draft) -> Distributed:
    return Distributed(id=id, type=draft.type, algorithm=draft.algorithm, created_at=now(), updated_at=now())


def _check_like(record: Distributed, draft: Draft) -> None:
    """UsageError if ``draft`` cannot become one version with what is there; a version that is not begun may be of any kind."""
    if not record.parts:
        return
    for what, theirs, ours in (("type", record.type, draft.type), ("digest algorithm", record.algorithm, draft.algorithm)):
        if theirs != ours:
            raise UsageError(f"distributed version {record.id!r} of {draft.name.path} has {what} {theirs!r}, not {ours!r}")


def _part(draft: Draft, root: Dir) -> Part:
    return Part(
        commit=draft.commit,
        root=root,
        description=draft.description,
        metadata=dict(draft.metadata or {}),
        tags=list(draft.tags),
        aliases=list(draft.aliases),
        ttl=draft.ttl,
        ttl_inherited=draft.inherit_ttl,
        run=draft.run,
        added_at=now(),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Union:
    """The directories ``trees`` as changes to ``base``: what is in several of them must be the same in all."""

    tree: Tree
    trees: tuple[Dir, ...]
    path: str
    base: Dir | None

    def changes(self) -> Iterator[tuple[str, Change]]:
        found = ((entry.name, entry) for tree in self.trees for entry in self.tree.entries(tree))
        # Sorted at once: a directory's entries are a few pages, and are not all read again for each part.
        for name, group in groupby(sorted(found, key=itemgetter(0)), key=itemgetter(0)):
            yield name, self._joined(name, [entry for _, entry in group])

    def _joined(self, name: str, entries: Sequence[Entry]) -> Change:
        path = f"{self.path}{name}"
        folders = tuple(entry for entry in entries if isinstance(entry, Dir))
        if len(folders) == len(entries):
            below = self.tree.lookup(self.base, name) if self.base is not None else None
            if len(folders) == 1 and not isinstance(below, Dir):
                return folders[0]
            return _Union(self.tree, folders, f"{path}/", below if isinstance(below, Dir) else None)
        if folders or len({_content(entry) for entry in entries}) > 1:
            raise ConflictError(
                f"{path!r} is in several parts of the distributed version, with different contents; nothing is made, and its "
                "parts are dropped: give each process paths of its own, and upsert again"
            )
        return entries[0]


def _content(entry: Entry) -> tuple[object, ...]:
    """What makes two entries of one path the same."""
    if isinstance(entry, File):
        return "file", entry.id, entry.executable
    if isinstance(entry, Ref):
        return "reference", entry.uri, entry.digest, tuple(sorted(entry.extra.items()))
    assert isinstance(entry, Symlink)
    return "link", entry.target
