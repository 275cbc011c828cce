"""The ONE way a version comes into being: contents, pages, version, collection, in this order.

That is the order in a native store. An artifact server keeps versions in its own form, and makes one of the same draft by its own
protocol: ``ArtifactServer.save``, which nothing else calls.

Nothing refers to what is not yet durable: packs and blobs are fsync'd before the version's file appears (create if absent: that
is the commit), and the collection's aliases move only after it. A process that dies in between leaves at most bytes that no
version refers to, which ``gc`` removes, or a version whose aliases have not moved, which the retry mends: it carries the same
``Draft.commit``, finds its own version, and goes on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import msgspec

from artifactfs.content import check_algorithm
from artifactfs.errors import ConflictError, IntegrityError, NotFoundError, UsageError
from artifactfs.model import BLAKE3, MAX_TTL, Collection, Dir, Entry, Page, Version
from artifactfs.names import (
    LATEST,
    ArtifactName,
    check_collection,
    check_entity,
    check_metadata,
    check_new_alias,
    check_project,
    check_tags,
    check_type,
)
from artifactfs.objects import object_key
from artifactfs.semver import SemVer
from artifactfs.store import Store
from artifactfs.store.arrived import Arrived
from artifactfs.store.drafts import Draft, Published
from artifactfs.store.native import NativeStore, encode_record, native_store, now
from artifactfs.store.semvers import NEXT, semvers
from artifactfs.store.server import ArtifactServer
from artifactfs.store.upload import Change, Folder, NewFile, NewRef, Progress, Report, Streamed, Upload
from artifactfs.tree import EMPTY, DirUpdate, Tree, forget_page

__all__ = [
    "Change",
    "Draft",
    "Folder",
    "NewFile",
    "NewRef",
    "Progress",
    "Published",
    "Report",
    "Streamed",
    "build_digest",
    "checked",
    "publish",
]


DEFAULT_TYPE = "dataset"
"""The type of a new collection that was given none, as with W&B's ``artifact put``."""


def publish(store: Store, draft: Draft, report: Report | None = None) -> Published:
    """Make ``draft`` a version of its collection, or find that nothing changed against the newest.

    The given aliases and ``latest`` point to the result. UsageError for a type other than the collection's, ConflictError for
    ``expect_base`` or a file that changes while it is read. May be repeated with the same draft after any failure.
    """
    draft = checked(draft)
    if isinstance(store, ArtifactServer):
        return store.save(draft, report)
    return _publish(native_store(store, "committed to"), draft, report)


def _publish(store: NativeStore, draft: Draft, report: Report | None) -> Published:
    own = _own(store, draft) if draft.retry else None
    if own is not None:
        return Published(_point_aliases(store, draft, own), True)
    kind, newest = _fitting(store, draft)
    semver = _semver(store, draft, newest, store.numbers(draft.name) if draft.semver else [])
    encode_record(_version(draft, kind, 0, EMPTY, "", semver))  # what cannot be stored is refused before anything is
    store.ensure_format()
    arrived = None if draft.notes is None or store.local else Arrived(draft.notes, store, draft.name)
    stored = {**(arrived.contents() if arrived else {}), **draft.stored}
    upload = Upload(store, newest, draft.algorithm, report, stored, arrived)
    try:
        with _base_explained(store, draft):
            root = upload.build(draft.folder)
        if draft.expect_root not in (b"", root.digest):
            raise IntegrityError(f"what would be stored as {draft.name.path} has another digest than expected; nothing is made")
        unchanged = _unchanged(store, draft, newest, root)
        if unchanged is not None:
            return unchanged
        upload.flush()
    finally:
        upload.close()
    with _base_explained(store, draft):
        _keep_base(store, draft, root)
    made = _create(store, draft, root)
    if arrived is not None:
        arrived.forget()
    return made


def store_folder(store: NativeStore, draft: Draft, report: Report | None = None) -> Dir:
    """Store what a version of ``draft`` would hold, but make none; returns its root directory, durable. It is collected like what
    no version refers to, unless a record says that it is a part of one. UsageError and ConflictError as :func:`publish`."""
    draft = checked(draft)
    newest = _fitting(store, draft)[1]
    store.ensure_format()
    upload = Upload(store, newest, draft.algorithm, report, draft.stored)
    try:
        root = upload.build(draft.folder)
        upload.flush()
    finally:
        upload.close()
    return root


def build_digest(folder: Folder, tree: Tree, algorithm: str = BLAKE3) -> str:
    """The digest that a version of ``folder`` would have, where it holds stored entries and folders only; nothing is stored."""
    algorithm = check_algorithm(algorithm)
    pages: dict[bytes, bytes] = {}

    def hold(data: bytes) -> Page:
        page = forget_page(data)
        if algorithm != BLAKE3:  # its digest follows from every entry
            pages[page.id] = data
        return page

    def build(folder: Folder) -> Dir:
        update = DirUpdate(tree, folder.base, hold)
        for name, change in folder.changes():
            if isinstance(change, (NewFile, NewRef, Streamed)):
                raise TypeError(f"{name!r} is not stored yet")
            update.change(name, change if change is None or isinstance(change, Entry) else build(change))
        return update.finish()

    return tree.beside(pages).digest(build(folder), algorithm)


def checked(draft: Draft) -> Draft:
    """The draft with everything in the form that it is stored in. UsageError for what cannot be."""
    check_entity(draft.name.entity)
    check_project(draft.name.project)
    check_collection(draft.name.collection)
    for alias in draft.aliases:
        if alias != LATEST:
            check_new_alias(alias)
    if draft.semver not in ("", NEXT):
        SemVer.parse(draft.semver)
    if draft.type:
        check_type(draft.type, draft.name.collection, draft.reserved_type)
    if draft.ttl is not None and not 0 < draft.ttl <= MAX_TTL:
        raise UsageError(f"a time to live of {draft.ttl} seconds cannot be; it must be at least one")
    if not draft.commit:
        raise ValueError("a draft needs the id of its commit")
    return dataclasses.replace(
        draft,
        algorithm=check_algorithm(draft.algorithm),
        metadata=check_metadata(draft.metadata),
        tags=check_tags(draft.tags),
    )


def _own(store: NativeStore, draft: Draft) -> Version | None:
    """The version that an earlier attempt of this very commit made."""
    for number in reversed(store.numbers(draft.name)):
        if number <= draft.since:
            break
        with contextlib.suppress(IntegrityError):
            version = store.any_version(draft.name, number)
            if version.commit == draft.commit and version.state == "COMMITTED":
                return version
    return None


def _fitting(store: NativeStore, draft: Draft) -> tuple[str, Version | None]:
    """The type of the new version and the newest one that there is, if the draft fits to both."""
    newest = store.newest(draft.name)
    kind = _type(store, draft)
    _check_expected(draft, newest)
    return kind, newest


def _type(store: NativeStore, draft: Draft) -> str:
    """The type of the new version: the collection's."""
    try:
        collection = store.collection(draft.name)
    except NotFoundError:
        return draft.type or DEFAULT_TYPE
    check_sequence(collection)
    known = collection.type
    if draft.type and draft.type != known:
        raise UsageError(
            f"{draft.name.path} already exists with type {known!r}, not {draft.type!r}; use that type or another name"
        )
    return known


def _semver(store: NativeStore, draft: Draft, newest: Version | None, numbers: Sequence[int]) -> str:
    """The semantic version of a new version after those of ``numbers``. ConflictError for one, or an alias, that is taken."""
    if not draft.semver and not (newest and newest.semver):
        return ""
    try:
        known = store.collection(draft.name)
    except NotFoundError:
        return semvers(store, draft.name, {}, numbers).choose(draft.semver, draft.name, {})
    found = semvers(store, draft.name, known.semver, numbers)
    for alias in draft.aliases:
        found.check_alias(alias, draft.name)
    return found.choose(draft.semver, draft.name, known.aliases)


def check_sequence(collection: Collection) -> None:
    """UsageError unless versions can be logged to the collection."""
    if collection.is_portfolio:
        raise UsageError(f"{collection.path} is a portfolio of links, nothing is logged to it; log elsewhere and link that")


def _check_expected(draft: Draft, newest: Version | None) -> None:
    found = newest.number if newest else -1
    if draft.expect_base not in (None, found):
        expected = f"v{draft.expect_base}" if draft.expect_base != -1 else "no version"
        raise ConflictError(
            f"{draft.name.path} is at {f'v{found}' if newest else 'no version'}, not at {expected} as expected: "
            "somebody else committed; stage the newest version again, or commit over it: commit --resume --no-expect-base"
        )


def _unchanged(store: NativeStore, draft: Draft, newest: Version | None, root: Dir) -> Published | None:
    """The newest version as the result, if its tree is ``root`` and nobody deletes it meanwhile."""
    if draft.always or newest is None or newest.root.digest != root.digest:
        return None
    try:
        return Published(_point_aliases(store, draft, newest), False)
    except NotFoundError:
        return None


def _keep_base(store: NativeStore, draft: Draft, root: Dir) -> None:
    """What is kept of a base that was deleted while its stage was open may have been collected, or may be any moment: it must
    be there, and counts as written now."""
    if draft.base is None or _is_live(store, draft.name, draft.base):
        return
    for key in objects_of(store, root):
        if not store.objects.refresh(key):
            raise IntegrityError(f"{key} is lost")


@contextlib.contextmanager
def _base_explained(store: NativeStore, draft: Draft) -> Iterator[None]:
    """Damage found in a base that was deleted is no surprise."""
    try:
        yield
    except IntegrityError as error:
        if draft.base is None or _is_live(store, draft.name, draft.base):
            raise
        raise IntegrityError(
            f"{draft.name.path}:v{draft.base} was deleted while it was staged, and is collected by now ({error}); "
            "the files changed in the stage are still in its staging directory"
        ) from None


def _is_live(store: NativeStore, name: ArtifactName, number: int) -> bool:
    try:
        return store.any_version(name, number).state == "COMMITTED"
    except (NotFoundError, IntegrityError):
        return False


def objects_of(store: NativeStore, root: Dir) -> list[str]:
    """The keys of all objects that the tree ``root`` refers to, sorted. IntegrityError where a page cannot be read."""
    objects: set[bytes] = set()
    for page, entries in store.tree.pages(root, set()):
        objects.add(page.extent.object)
        for entry in entries:
            objects.update(extent.object for extent in store.places(entry))
    return sorted(object_key(object) for object in objects)


def _create(store: NativeStore, draft: Draft, root: Dir) -> Published:
    """Create the version under the next free number, unless somebody else has just made the same one."""
    digest = store.tree.digest(root, draft.algorithm)
    if draft.expect_digest not in ("", digest):
        raise IntegrityError(f"{draft.name.path} would get the digest {digest}, not {draft.expect_digest}; nothing is made")
    while True:
        # The numbers first: whoever commits after that takes the number that is tried here. So what is checked below against
        # the newest version still holds at the moment at which this one comes into being.
        numbers = store.numbers(draft.name)
        kind, newest = _fitting(store, draft)
        unchanged = _unchanged(store, draft, newest, root)
        if unchanged is not None:
            return unchanged
        own = _own(store, draft) if draft.retry else None
        if own is not None:  # made by another process that carries on the same commit
            return Published(_point_aliases(store, draft, own), True)
        semver = _semver(store, draft, newest, numbers)
        version = _version(draft, kind, max(draft.number, numbers[-1] + 1 if numbers else 0), root, digest, semver)
        if store.create_version(version):
            return Published(_point_aliases(store, draft, version), True)


def _version(draft: Draft, kind: str, number: int, root: Dir, digest: str, semver: str) -> Version:
    time = now()
    return Version(
        entity=draft.name.entity,
        project=draft.name.project,
        collection=draft.name.collection,
        number=number,
        type=kind,
        digest=digest,
        algorithm=draft.algorithm,
        root=root,
        size=root.size,
        file_count=root.files,
        description=draft.description,
        metadata=dict(draft.metadata or {}),
        tags=list(draft.tags),
        ttl=draft.ttl,
        ttl_inherited=draft.ttl is None and draft.inherit_ttl,
        run=draft.run,
        commit=draft.commit,
        base=draft.base,
        created_at=time,
        updated_at=time,
        semver=semver,
    )


def _point_aliases(store: NativeStore, draft: Draft, version: Version) -> Version:
    """Let the draft's aliases, and ``latest`` unless a newer version has it, point to ``version``. NotFoundError if that was
    deleted meanwhile; ConflictError, and the version is deleted, if its name has just become a portfolio's."""

    own = {version.semver: version.number} if version.semver else {}

    def point(collection: Collection) -> Collection:
        if collection.is_portfolio:
            raise ConflictError(f"{collection.path} has just become a portfolio of links; log to another name")
        aliases = dict(collection.aliases)
        aliases.update(dict.fromkeys(draft.aliases, version.number))
        aliases[LATEST] = max(version.number, collection.aliases.get(LATEST, -1))
        return msgspec.structs.replace(collection, aliases=aliases, semver={**collection.semver, **own})

    try:
        collection = store.update_collection(draft.name, point)
    except ConflictError:
        store.update_version(
            draft.name.at(version.name), lambda it: msgspec.structs.replace(it, state="DELETED", deleted_at=now())
        )
        raise
    if collection.type == version.type:
        return version
    # the collection's type was changed between our look at it and the version
    kind = collection.type
    return store.update_version(draft.name.at(version.name), lambda it: msgspec.structs.replace(it, type=kind))
