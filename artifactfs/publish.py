"""The ONE way a version comes into being: contents, pages, version, collection, in this order.

Nothing refers to what is not yet durable: packs and blobs are fsync'd before the version's file appears (create if absent: that
is the commit), and the collection's aliases move only after it. A process that dies in between leaves at most bytes that no
version refers to, which ``gc`` removes, or a version whose aliases have not moved, which the retry mends: it carries the same
``Draft.commit``, finds its own version, and goes on from there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from artifactfs.content import check_algorithm
from artifactfs.errors import ConflictError, IntegrityError, UsageError
from artifactfs.model import BLAKE3, Collection, Dir, Entry, Version
from artifactfs.names import LATEST, ArtifactName, check_metadata, check_new_alias, check_tags, check_type
from artifactfs.objects import object_key
from artifactfs.store.native import NativeStore, now
from artifactfs.store.upload import Change, Folder, NewFile, NewRef, Progress, Report, Upload
from artifactfs.tree import DirUpdate, Tree, forget_page

__all__ = ["Change", "Draft", "Folder", "NewFile", "NewRef", "Progress", "Published", "Report", "build_digest", "publish"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """All that a new version is made from. ``commit`` is a unique id of this commit, kept over its retries.

    ``type`` "" means the collection's own. ``aliases`` are set besides ``latest``. ``expect_base``: fail with a ConflictError
    unless the collection's newest version is this number (-1: unless it has none); None: no condition. ``base`` is the number
    of the version it was derived from, for the record. ``retry``: an earlier attempt at this commit may have made its version.
    """

    name: ArtifactName
    type: str
    folder: Folder
    commit: str
    algorithm: str = BLAKE3
    description: str | None = None
    metadata: Mapping[str, Any] | None = None
    tags: Sequence[str] = ()
    aliases: Sequence[str] = ()
    ttl: int | None = None
    run: str = ""
    base: int | None = None
    expect_base: int | None = None
    retry: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Published:
    """``created`` is False where nothing had changed against ``latest`` and ``version`` is that one."""

    version: Version
    created: bool


def publish(store: NativeStore, draft: Draft, report: Report | None = None) -> Published:
    """Make ``draft`` a version of its collection, or find that nothing changed against the newest.

    The given aliases and ``latest`` point to the result. UsageError for a type other than the collection's, ConflictError for
    ``expect_base`` or a file that changes while it is read. May be repeated with the same draft after any failure.
    """
    _check(draft)
    own = _own(store, draft) if draft.retry else None
    if own is not None:
        return Published(_point_aliases(store, draft, own), True)
    newest = store.newest(draft.name)
    kind = _type(draft, newest)
    _check_expected(draft, newest)
    store.ensure_format()
    upload = Upload(store, newest, draft.algorithm, report)
    try:
        root = upload.build(draft.folder)
        if newest is not None and root.digest == newest.root.digest:
            return Published(_point_aliases(store, draft, newest), False)
        upload.flush()
    finally:
        upload.close()
    _check_base(store, draft, root)
    version = _create(store, draft, kind, root)
    return Published(_point_aliases(store, draft, version), True)


def build_digest(folder: Folder, tree: Tree, algorithm: str = BLAKE3) -> str:
    """The digest that a version of ``folder`` would have, where it holds stored entries and folders only; nothing is stored."""

    def build(folder: Folder) -> Dir:
        update = DirUpdate(tree, folder.base, forget_page)
        for name, change in folder.changes():
            if isinstance(change, (NewFile, NewRef)):
                raise TypeError(f"{name!r} is not stored yet")
            update.change(name, change if change is None or isinstance(change, Entry) else build(change))
        return update.finish()

    return tree.digest(build(folder), check_algorithm(algorithm))


def _check(draft: Draft) -> None:
    for alias in draft.aliases:
        if alias != LATEST:
            check_new_alias(alias)
    check_tags(draft.tags)
    check_metadata(draft.metadata)
    check_algorithm(draft.algorithm)
    if draft.type:
        check_type(draft.type, draft.name.collection)


def _own(store: NativeStore, draft: Draft) -> Version | None:
    """The version that an earlier attempt of this very commit made."""
    for number in reversed(store.numbers(draft.name)):
        version = store.any_version(draft.name, number)
        if version.commit == draft.commit:
            return version
    return None


def _type(draft: Draft, newest: Version | None) -> str:
    if newest is None:
        if not draft.type:
            raise UsageError(f"{draft.name.path} is new, so it needs a type: give --type, such as dataset or model")
        return draft.type
    if draft.type and draft.type != newest.type:
        raise UsageError(
            f"{draft.name.path} already exists with type {newest.type!r}, not {draft.type!r}; use that type or another name"
        )
    return newest.type


def _check_expected(draft: Draft, newest: Version | None) -> None:
    found = newest.number if newest else -1
    if draft.expect_base not in (None, found):
        expected = f"v{draft.expect_base}" if draft.expect_base != -1 else "no version"
        raise ConflictError(
            f"{draft.name.path} is at {f'v{found}' if newest else 'no version'}, not at {expected} as expected: "
            "somebody else committed; stage the newest version again, or commit without --expect-base"
        )


def _check_base(store: NativeStore, draft: Draft, root: Dir) -> None:
    """What is kept of a base that was deleted while its stage was open may be collected by now: then it must still be there."""
    if draft.base is None or store.any_version(draft.name, draft.base).state == "COMMITTED":
        return
    missing = missing_objects(store, root)
    if missing:
        raise IntegrityError(
            f"{draft.name.path}:v{draft.base} was deleted and collected while it was staged, and {missing[0]} is gone; "
            "the files changed in the stage are still in its staging directory"
        )


def missing_objects(store: NativeStore, root: Dir) -> list[str]:
    """The keys of objects that the tree ``root`` refers to and that are not in the store."""
    keys: set[str] = set()
    for page, entries in store.tree.pages(root, set()):
        keys.add(object_key(page.extent.object))
        for entry in entries:
            keys.update(object_key(extent.object) for extent in store.places(entry))
    return sorted(key for key in keys if store.objects.size(key) is None)


def _create(store: NativeStore, draft: Draft, kind: str, root: Dir) -> Version:
    """Create the version under the next free number."""
    numbers = store.numbers(draft.name)
    _recheck(store, draft)  # after the numbers: who commits from here on takes the number that is tried first
    time = now()
    version = Version(
        entity=draft.name.entity,
        project=draft.name.project,
        collection=draft.name.collection,
        number=numbers[-1] + 1 if numbers else 0,
        type=kind,
        digest=store.tree.digest(root, check_algorithm(draft.algorithm)),
        algorithm=check_algorithm(draft.algorithm),
        root=root,
        size=root.size,
        file_count=root.files,
        description=draft.description,
        metadata=check_metadata(draft.metadata),
        tags=check_tags(draft.tags),
        ttl=draft.ttl,
        run=draft.run,
        commit=draft.commit,
        base=draft.base,
        created_at=time,
        updated_at=time,
    )
    while not store.create_version(version):
        _recheck(store, draft)
        version = msgspec.structs.replace(version, number=version.number + 1)
    return version


def _recheck(store: NativeStore, draft: Draft) -> None:
    """Somebody else may have committed while we stored: what was checked against the newest version is checked against theirs."""
    newest = store.newest(draft.name)
    _type(draft, newest)
    _check_expected(draft, newest)


def _point_aliases(store: NativeStore, draft: Draft, version: Version) -> Version:
    """Let the draft's aliases, and ``latest`` unless a newer version has it, point to ``version``."""

    def point(collection: Collection) -> Collection:
        aliases = dict(collection.aliases)
        aliases.update(dict.fromkeys(draft.aliases, version.number))
        aliases[LATEST] = max(version.number, collection.aliases.get(LATEST, -1))
        return msgspec.structs.replace(collection, aliases=aliases)

    store.update_collection(draft.name, point)
    return version
