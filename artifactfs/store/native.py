"""The native store: one format over any object store (design, section 3; ``docs/format.md`` is the reference).

::

    store.json                                                         format and version of the store
    blobs/<aa>/<id>   packs/<aa>/<id>                                  contents and pages
    catalog/<entity>/<project>/<collection>/collection.json            type, description, tags, aliases (compare-and-swap)
    catalog/<entity>/<project>/<collection>/versions/<00000012>.json   one version (create if absent; then compare-and-swap)
    catalog/<entity>/<project>/<collection>/used/<00000012>/<run>      lineage marks
    runs/<entity>/<project>/<run>.json

A version exists once its file does. ``collection.json`` comes after it and may be missing or behind where a commit died in
between: a collection without it is the one its versions describe, and the next commit mends it.
"""

from __future__ import annotations

import datetime
import threading
import urllib.parse
from collections.abc import Callable
from typing import TypeVar

import msgspec
from blake3 import blake3
from cachetools import LRUCache

from artifactfs.content import DIGEST_SIZE, CheckedBlocks, check_block_list
from artifactfs.errors import ConflictError, IntegrityError, NotFoundError, StoreFormatError
from artifactfs.model import BLOCK, Collection, Entry, Extent, File, Page, Ref, Run, Version, block_count
from artifactfs.names import LATEST, ArtifactName, version_number
from artifactfs.objects import ABSENT, ObjectStore, object_key
from artifactfs.store import LocalContent
from artifactfs.store.contents import ExtentSource, LocalExtents
from artifactfs.tree import Tree

FORMAT = "artifactfs-store"
FORMAT_VERSION = 1
_MAX_TABLE = 64 << 20
"""Bytes of extents that a file may claim: a million of them."""

_Record = TypeVar("_Record", Version, Collection, Run)


class _Header(msgspec.Struct):
    format: str
    version: int


class NativeStore:
    """A native store over ``objects``."""

    def __init__(self, objects: ObjectStore) -> None:
        self.objects = objects
        self.url = objects.url
        self.tree = Tree(self._load_page)
        self._checks = _SharedChecks()
        self._check_format()

    # The catalog

    def entities(self) -> list[str]:
        return [_unquote(name) for name in self.objects.folders("catalog/")]

    def projects(self, entity: str) -> list[str]:
        return [_unquote(name) for name in self.objects.folders(f"catalog/{_quote(entity)}/")]

    def collections(self, entity: str, project: str) -> list[Collection]:
        found = (self._collection(ArtifactName(entity, project, name)) for name in self.collection_names(entity, project))
        return [collection for collection, _ in found if collection is not None]

    def collection_names(self, entity: str, project: str) -> list[str]:
        """The names of all collections there ever were in a project, sorted."""
        return [_unquote(name) for name in self.objects.folders(f"catalog/{_quote(entity)}/{_quote(project)}/")]

    def collection(self, name: ArtifactName) -> Collection:
        collection, _ = self._collection(name)
        if collection is None:
            raise NotFoundError(f"collection {name.path} does not exist in {self.url}{self._nearest(name)}")
        return collection

    def versions(self, name: ArtifactName, deleted: bool = False) -> list[Version]:
        found = [self._version(name, number)[0] for number in self.numbers(name)]
        if not found:
            self.collection(name)
        return [version for version in found if deleted or version.state == "COMMITTED"]

    def version(self, name: ArtifactName) -> Version:
        alias = name.alias or LATEST
        number = version_number(alias)
        if number is None:
            collection = self.collection(name)
            number = collection.aliases.get(alias)
            if number is None:
                known = ", ".join(sorted(collection.aliases)) or "none"
                raise NotFoundError(f"{name.path} has no alias {alias!r}; its aliases are: {known}")
        try:
            version, _ = self._version(name, number)
        except NotFoundError:
            self.collection(name)
            raise NotFoundError(f"{name.path} has no version v{number}") from None
        if version.state != "COMMITTED":
            raise NotFoundError(f"{version.qualified_name} was deleted on {version.deleted_at[:10]}")
        return version

    def numbers(self, name: ArtifactName) -> list[int]:
        """The numbers of all versions there ever were, deleted ones too, ascending; empty for no collection."""
        prefix = f"{_folder(name)}/versions/"
        stems = (info.key.removeprefix(prefix).removesuffix(".json") for info in self.objects.scan(prefix))
        return sorted(int(stem) for stem in stems if stem.isdigit())

    def any_version(self, name: ArtifactName, number: int) -> Version:
        """The version of that number, deleted or not. NotFoundError."""
        return self._version(name, number)[0]

    def newest(self, name: ArtifactName) -> Version | None:
        """The committed version of the highest number, or None."""
        for number in reversed(self.numbers(name)):
            version, _ = self._version(name, number)
            if version.state == "COMMITTED":
                return version
        return None

    def create_version(self, version: Version) -> bool:
        """Write a version if its number is free. True also if it is this very commit's already."""
        key = _version_key(ArtifactName(version.entity, version.project, version.collection), version.number)
        if self.objects.swap(key, _encode(version), ABSENT) is not None:
            return True
        stored, _ = self._get(key, Version)
        return stored.commit == version.commit

    def update_collection(self, name: ArtifactName, change: Callable[[Collection], Collection]) -> Collection:
        while True:
            collection, etag = self._collection(name)
            if collection is None:
                self.collection(name)
            assert collection is not None
            changed = change(collection)
            if changed == collection and etag != ABSENT:
                return collection
            changed = msgspec.structs.replace(changed, updated_at=now())
            if self.objects.swap(f"{_folder(name)}/collection.json", _encode(changed), etag) is not None:
                return changed

    def update_version(self, name: ArtifactName, change: Callable[[Version], Version]) -> Version:
        number = self.version(name).number
        while True:
            version, etag = self._version(name, number)
            changed = change(version)
            if changed == version:
                return version
            changed = msgspec.structs.replace(changed, updated_at=now())
            if self.objects.swap(_version_key(name, number), _encode(changed), etag) is not None:
                return changed

    def delete_version(self, name: ArtifactName, delete_aliases: bool = False) -> Version:
        version = self.version(name)

        def drop(collection: Collection) -> Collection:
            held = [alias for alias, number in collection.aliases.items() if number == version.number and alias != LATEST]
            if held and not delete_aliases:
                shown = ", ".join(sorted(held))
                raise ConflictError(
                    f"{version.qualified_name} has the aliases {shown}; move them first, or delete them too (--delete-aliases)"
                )
            aliases = {alias: number for alias, number in collection.aliases.items() if number != version.number}
            left = [other.number for other in self.versions(name) if other.number != version.number]
            if LATEST not in aliases and left:
                aliases[LATEST] = left[-1]
            return msgspec.structs.replace(collection, aliases=aliases)

        # Aliases go first: a death in between leaves a version without aliases, not aliases without a version.
        self.update_collection(name, drop)
        return self.update_version(
            name.at(version.name), lambda it: msgspec.structs.replace(it, state="DELETED", deleted_at=now())
        )

    # Runs and lineage

    def mark_used(self, version: Version, run: Run) -> None:
        name = ArtifactName(version.entity, version.project, version.collection)
        key = f"{_folder(name)}/used/{version.number:08d}/{_quote(run.path)}"
        self.objects.swap(key, msgspec.json.encode({"run": run.path, "at": now()}), ABSENT)

    def used_by(self, version: Version) -> list[Run]:
        name = ArtifactName(version.entity, version.project, version.collection)
        prefix = f"{_folder(name)}/used/{version.number:08d}/"
        paths = sorted(_unquote(info.key.removeprefix(prefix)) for info in self.objects.scan(prefix))
        return [self.run(*path.split("/", 2)) for path in paths]

    def run(self, entity: str, project: str, id: str) -> Run:
        try:
            return self._get(_run_key(entity, project, id), Run)[0]
        except NotFoundError:
            raise NotFoundError(f"run {entity}/{project}/{id} does not exist in {self.url}") from None

    def runs(self, entity: str, project: str) -> list[Run]:
        prefix = f"runs/{_quote(entity)}/{_quote(project)}/"
        found = [self._get(info.key, Run)[0] for info in self.objects.scan(prefix)]
        return sorted(found, key=lambda run: (run.created_at, run.id))

    def save_run(self, run: Run) -> None:
        key = _run_key(run.entity, run.project, run.id)
        while True:
            merged, etag = run, ABSENT
            try:
                stored, etag = self._get(key, Run)
            except NotFoundError:
                pass
            else:
                used = list(dict.fromkeys([*stored.used, *run.used]))
                logged = list(dict.fromkeys([*stored.logged, *run.logged]))
                merged = msgspec.structs.replace(run, used=used, logged=logged, created_at=stored.created_at)
            if self.objects.swap(key, _encode(merged), etag) is not None:
                return

    # Contents

    def local_content(self, file: File, recheck: bool = False) -> LocalContent | None:
        """As the protocol says; ``recheck``: every block is checked, also those that this process has checked before."""
        if self.objects.path("") is None:
            return None
        checks = {} if recheck else self._checks.of(file.id)
        return LocalExtents(self.objects, file.id, file.size, self.extents(file), self._block_digests(file), checks)

    def source(self, file: File) -> ExtentSource:
        return ExtentSource(self.objects, file.id, file.size, self.extents(file))

    def extents(self, file: File) -> tuple[Extent, ...]:
        """Where the bytes of ``file`` lie, in order; IntegrityError if that cannot be."""
        extents = file.extents
        if file.table is not None:
            extents = self._table(file.table, file.id)
        for extent in extents:
            check_extent(extent)
        aligned = all(extent.length % BLOCK == 0 for extent in extents[:-1])
        if sum(extent.length for extent in extents) != file.size or not aligned:
            raise IntegrityError(f"the extents of content {file.id.hex()} do not make up its {file.size} bytes")
        return extents

    def block_list(self, file: File | Ref) -> bytes:
        if file.size <= BLOCK:
            return file.id
        expected = DIGEST_SIZE * block_count(file.size)
        if file.blocks is None or file.blocks.length != expected:
            raise IntegrityError(f"content {file.id.hex()} has no block list of {expected} bytes")
        data = self.read_extent(file.blocks)
        return check_block_list(file.id, file.size, data, f"content {file.id.hex()}")

    def places(self, entry: Entry) -> tuple[Extent, ...]:
        """Every extent that ``entry`` itself refers to: contents, block list, table of extents; a directory's page not."""
        if isinstance(entry, File):
            return (*self.extents(entry), *(extent for extent in (entry.blocks, entry.table) if extent is not None))
        if isinstance(entry, Ref) and entry.blocks is not None:
            return (entry.blocks,)
        return ()

    def read_extent(self, extent: Extent) -> bytes:
        """The bytes of one extent, not checked."""
        check_extent(extent)
        return self.objects.read(object_key(extent.object), extent.offset, extent.length)

    def ensure_format(self) -> None:
        """Write ``store.json`` if it is not there; before anything else is written."""
        header = msgspec.json.encode({"format": FORMAT, "version": FORMAT_VERSION})
        if not self._check_format():
            self.objects.swap("store.json", header + b"\n", ABSENT)
            self._check_format()

    def _block_digests(self, file: File) -> Callable[[], bytes]:
        return lambda: self.block_list(file)

    def _table(self, table: Extent, id: bytes) -> tuple[Extent, ...]:
        if table.length > _MAX_TABLE:
            raise IntegrityError(f"the extents of content {id.hex()} claim {table.length} bytes")
        try:
            return msgspec.msgpack.decode(self.read_extent(table), type=tuple[Extent, ...])
        except msgspec.MsgspecError as error:
            raise IntegrityError(f"the extents of content {id.hex()} cannot be decoded: {error}") from None

    def _load_page(self, page: Page) -> bytes:
        data = self.read_extent(page.extent)
        if blake3(data).digest() != page.id:
            where = object_key(page.extent.object)
            raise IntegrityError(f"page {page.id.hex()} in {where} of {self.url} is damaged: its bytes do not match its id")
        return data

    # Catalog objects

    def _check_format(self) -> bool:
        """Whether ``store.json`` is there; StoreFormatError unless it is one we can use."""
        try:
            data, _ = self.objects.get("store.json")
        except NotFoundError:
            if self.objects.folders(""):
                self._refuse_foreign()
            return False
        try:
            header = msgspec.json.decode(data, type=_Header)
        except msgspec.MsgspecError:
            raise StoreFormatError(f"{self.url} is not an artifactfs store: its store.json cannot be read") from None
        if header.format != FORMAT:
            raise StoreFormatError(f"{self.url} is not an artifactfs store: store.json says format {header.format!r}")
        if header.version > FORMAT_VERSION:
            raise StoreFormatError(
                f"{self.url} has store format {header.version}; this artifactfs reads up to {FORMAT_VERSION}: upgrade artifactfs"
            )
        return True

    def _refuse_foreign(self) -> None:
        """A directory that holds other things is no place for a store: somebody mistyped its path."""
        strangers = set(self.objects.folders("")) - {"tmp"}
        if strangers:
            raise StoreFormatError(
                f"{self.url} holds {sorted(strangers)[0]!r} but no store.json, so it is not an artifactfs store; "
                "name an empty or new directory"
            )

    def _collection(self, name: ArtifactName) -> tuple[Collection | None, str]:
        try:
            return self._get(f"{_folder(name)}/collection.json", Collection)
        except NotFoundError:
            return self._described_by_versions(name), ABSENT

    def _described_by_versions(self, name: ArtifactName) -> Collection | None:
        newest = self.newest(name)
        if newest is None:
            return None
        return Collection(
            entity=name.entity,
            project=name.project,
            name=name.collection,
            type=newest.type,
            aliases={LATEST: newest.number},
            created_at=newest.created_at,
            updated_at=newest.created_at,
        )

    def _version(self, name: ArtifactName, number: int) -> tuple[Version, str]:
        return self._get(_version_key(name, number), Version)

    def _get(self, key: str, kind: type[_Record]) -> tuple[_Record, str]:
        data, etag = self.objects.get(key)
        try:
            return msgspec.json.decode(data, type=kind), etag
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise IntegrityError(f"{key} in {self.url} cannot be decoded: {error}") from None

    def _nearest(self, name: ArtifactName) -> str:
        """A hint for a mistyped name."""
        names = self.collection_names(name.entity, name.project)
        return f"; {name.entity}/{name.project} has: {', '.join(names[:8])}" if names else ""


class _SharedChecks:
    """What this process has checked of the contents it read lately, so that an opened file is not checked all over again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: LRUCache[bytes, dict[bytes, CheckedBlocks]] = LRUCache(1024)

    def of(self, id: bytes) -> dict[bytes, CheckedBlocks]:
        """By object, the checks of the content ``id``."""
        with self._lock:
            checks = self._known.get(id)
            if checks is None:
                checks = self._known[id] = {}
            return checks


def open_native(objects: ObjectStore) -> NativeStore:
    """The native store over ``objects``; see :func:`artifactfs.store.urls.open_store` for errors."""
    return NativeStore(objects)


def now() -> str:
    """The current time as stores hold it: ISO 8601, UTC, microseconds, ``Z``."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def check_extent(extent: Extent) -> None:
    """IntegrityError for an extent that cannot be: of no blob or pack, or with a negative place or length."""
    try:
        object_key(extent.object)
    except ValueError as error:
        raise IntegrityError(str(error)) from None
    if extent.offset < 0 or extent.length < 0:
        raise IntegrityError(f"an extent of {object_key(extent.object)} claims {extent.length} bytes at {extent.offset}")


def _encode(record: Version | Collection | Run) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"


def _quote(part: str) -> str:
    """One part of a key for any legal name: percent-encoded but for letters, digits and ``_.-~``; never ``.`` or ``..``."""
    return urllib.parse.quote(part, safe="")


def _unquote(part: str) -> str:
    return urllib.parse.unquote(part)


def _folder(name: ArtifactName) -> str:
    return f"catalog/{_quote(name.entity)}/{_quote(name.project)}/{_quote(name.collection)}"


def _version_key(name: ArtifactName, number: int) -> str:
    return f"{_folder(name)}/versions/{number:08d}.json"


def _run_key(entity: str, project: str, id: str) -> str:
    return f"runs/{_quote(entity)}/{_quote(project)}/{_quote(id)}.json"
