"""The native store: one format over any object store (design, section 3; ``docs/format.md`` is the reference).

::

    store.json                                                         format and version of the store
    blobs/<aa>/<id>   packs/<aa>/<id>                                  contents and pages
    catalog/<entity>/<project>/<collection>/collection.json            type, description, tags, aliases (compare-and-swap)
    catalog/<entity>/<project>/<collection>/versions/<00000012>.json   one version (create if absent; then compare-and-swap)
    catalog/<entity>/<project>/<collection>/used/<00000012>/<entity>/<project>/<run>   lineage marks
    catalog/<entity>/<project>/<collection>/linked/<00000012>/<entity>/<project>/<collection>   where it may be linked
    catalog/<entity>/<project>/<collection>/distributed/<id>.json      parts of versions to come (compare-and-swap)
    runs/<entity>/<project>/<run>.json                                 (compare-and-swap)
    entities/<entity>.json                                             its settings (compare-and-swap)

A version exists once its file does. ``collection.json`` comes after it and may be missing or behind where a commit died in
between: a collection without it is the one its versions describe, and the next commit mends it. A record that does not say what
its key says is an IntegrityError; listings pass over it with a warning, and ``fsck`` reports it.

A portfolio is a ``collection.json`` with links and no versions; all of it changes by one compare-and-swap. A link exists if it is
there and its source is committed. The marks at the source say only where to look: they are written before the link, and stay.
Whatever a newer artifactfs has added to a record stays in it when it is changed here.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import datetime
import itertools
import logging
import re
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import msgspec
from blake3 import blake3
from cachetools import LRUCache

from artifactfs.attempts import Races
from artifactfs.cache import BlockCache
from artifactfs.cache.records import Records
from artifactfs.content import DIGEST_SIZE, MAX_CONTENT, CheckedBlocks, check_block_list
from artifactfs.errors import ConflictError, IntegrityError, InvalidNameError, NotFoundError, StoreFormatError, UsageError
from artifactfs.forking import new_lock
from artifactfs.model import (
    BLOCK,
    OBJECT_PACK,
    Collection,
    Distributed,
    EntitySettings,
    Entry,
    Extent,
    File,
    Link,
    LinkedVersion,
    Page,
    Ref,
    Remote,
    Run,
    Version,
    block_count,
)
from artifactfs.names import (
    LATEST,
    ArtifactName,
    check_alias,
    check_collection,
    check_entity,
    check_project,
    is_registry,
    parse,
    version_number,
)
from artifactfs.objects import ABSENT, MAX_RECORD, ObjectStore, object_key, stream
from artifactfs.packed import PackedContents, Small
from artifactfs.references import DEADLINE
from artifactfs.semver import is_semver
from artifactfs.store import LocalContent, Store
from artifactfs.store.contents import ExtentSource, LocalExtents
from artifactfs.store.remembered import RememberedObjects
from artifactfs.store.semvers import Semvers, semvers
from artifactfs.tree import PageOrder, Tree
from artifactfs.waiting import Budget

FORMAT = "artifactfs-store"
FORMAT_VERSION = 1
MAX_TABLE = 64 << 20
"""Bytes of a content's table of extents at most: a million of them."""

_MAX_PLACE = 1 << 62
_PAGES_AHEAD = 16 << 20
"""Bytes of pages under way ahead of what is looked up; they never wait for contents, which have a budget of their own."""
_MAX_KEY_PART = 240
"""Bytes: file systems allow 255."""
_VERSION_FILE = re.compile(r"([0-9]{8,12})\.json")

log = logging.getLogger(__name__)

_Record = TypeVar("_Record", Version, Collection, Run, EntitySettings, Distributed)
Check: TypeAlias = Callable[[str], str]

_LEVELS = (check_entity, check_project, check_collection)


class _Header(msgspec.Struct):
    format: str
    version: int


class _Stored(NamedTuple, Generic[_Record]):
    """A record as it was read: with what it takes to change it."""

    record: _Record
    etag: str
    data: bytes


class NativeStore:
    """A native store over ``objects``. Where these are not on a local disk, its pages are kept in ``cache``, and with ``offline``
    what is neither there nor among its records is an OfflineError: no connection is made."""

    def __init__(self, objects: ObjectStore, cache: BlockCache | None = None, offline: bool = False) -> None:
        self.local = objects.path("") is not None
        if not self.local and cache is not None:
            objects = RememberedObjects(objects, Records(cache.root, objects.url), offline)
        self.objects = objects
        self.url = objects.url
        self._pages = PackedContents(
            self.stream, None if self.local else cache, offline=offline, budget=Budget(_PAGES_AHEAD), deadline=DEADLINE
        )
        self._order = PageOrder()
        self.tree = Tree(self.load_page, ahead=None if self.local else self._load_ahead)
        self._checks = _SharedChecks()
        self._check_format()

    # The catalog

    def entities(self) -> list[str]:
        return _names(self.objects.folders("catalog/"), check_entity)

    def projects(self, entity: str) -> list[str]:
        return _names(self.objects.folders(f"catalog/{_quote(entity)}/"), check_project)

    def collections(self, entity: str, project: str) -> list[Collection]:
        found = []
        for name in self.collection_names(entity, project):
            try:
                collection = self._collection(ArtifactName(entity, project, name))[0]
            except IntegrityError as error:
                log.warning("not listed: %s", error)
                continue
            if collection is not None:
                found.append(collection)
        return found

    def collection_names(self, entity: str, project: str) -> list[str]:
        """The names of all collections there ever were in a project, sorted."""
        return _names(self.objects.folders(f"catalog/{_quote(entity)}/{_quote(project)}/"), check_collection)

    def strangers(self) -> list[str]:
        """The keys of what lies in the catalog where a name must be, and is none. Readers pass over them."""
        found = list(self._misnamed("catalog/", 0))
        shallow = (info.key for info in self.objects.scan("catalog/") if info.key.count("/") <= len(_LEVELS))
        for key in shallow:
            # A link to a directory, as a part of a store on another disk is, counts as one; a broken link does not.
            parent, _, name = key.rpartition("/")
            below = any(key.startswith(f"{stranger}/") for stranger in found)
            if not below and name not in self.objects.folders(f"{parent}/"):
                found.append(key)
        return found

    def _misnamed(self, prefix: str, level: int) -> Iterator[str]:
        for part in self.objects.folders(prefix):
            if _name_of(part, _LEVELS[level]) is None:
                yield prefix + part
            elif level + 1 < len(_LEVELS):
                yield from self._misnamed(f"{prefix}{part}/", level + 1)

    def collection(self, name: ArtifactName) -> Collection:
        collection = self._collection(name)[0]
        if collection is None:
            raise NotFoundError(f"collection {name.path} does not exist in {self.url}{self._nearest(name)}")
        return collection

    def versions(self, name: ArtifactName, deleted: bool = False) -> list[Version]:
        found = []
        for number in self.numbers(name):
            try:
                found.append(self._version(name, number).record)
            except IntegrityError as error:
                log.warning("not listed: %s", error)
        committed = [version for version in found if version.state == "COMMITTED"]
        if not committed:
            collection = self._collection(name)[0]
            if collection is not None and collection.is_portfolio:
                return self._links(collection)
            if collection is None and not found:
                self.collection(name)
        return found if deleted else committed

    def version(self, name: ArtifactName) -> Version:
        alias = name.alias or LATEST
        number = version_number(alias)
        if number is None:
            collection = self.collection(name)
            number = self._named(name, collection, alias)
            if number is None:
                known = ", ".join(sorted(collection.aliases)) or "none"
                raise NotFoundError(f"{name.path} has no alias {alias!r}; its aliases are: {known}")
        version = self.any_version(name, number)
        if version.state != "COMMITTED":
            raise NotFoundError(f"{version.qualified_name} was deleted on {version.deleted_at[:10]}")
        return version

    def _named(self, name: ArtifactName, collection: Collection, alias: str) -> int | None:
        """The number that a semantic version or an alias stands for."""
        number = collection.semver.get(alias, collection.aliases.get(alias))
        if number is None and is_semver(alias):
            numbers = sorted(collection.links) if collection.is_portfolio else self.numbers(name)
            number = semvers(self, name, collection.semver, numbers).find(alias)
        return number

    def numbers(self, name: ArtifactName) -> list[int]:
        """The numbers of all versions there ever were, deleted ones too, ascending; empty for no collection."""
        prefix = f"{_folder(name)}/versions/"
        found = (_VERSION_FILE.fullmatch(info.key, len(prefix)) for info in self.objects.scan(prefix))
        return sorted(int(match[1]) for match in found if match)

    def any_version(self, name: ArtifactName, number: int) -> Version:
        """The version of that number, deleted or not. NotFoundError."""
        version = None
        with contextlib.suppress(NotFoundError):
            version = self._version(name, number).record
        if version is not None and version.state == "COMMITTED":
            return version
        collection = self._collection(name)[0]
        if collection is not None and collection.is_portfolio and number in collection.links:
            return self._linked(collection, number)
        if version is None:
            self.collection(name)
            raise NotFoundError(f"{name.path} has no version v{number}")
        return version

    def newest(self, name: ArtifactName, without: int | None = None) -> Version | None:
        """The committed version of the highest number (but ``without``) that can be read, or None."""
        for number in reversed(self.numbers(name)):
            try:
                version = self._version(name, number).record
            except IntegrityError as error:
                log.warning("passed over: %s", error)
                continue
            if version.state == "COMMITTED" and number != without:
                return version
        return None

    def create_version(self, version: Version) -> bool:
        """Write a version if its number is free. True also if it is this very commit's already."""
        name = ArtifactName(version.entity, version.project, version.collection)
        if self.objects.swap(_version_key(name, version.number), encode_record(version), ABSENT) is not None:
            return True
        try:
            return self._version(name, version.number).record.commit == version.commit
        except IntegrityError:
            return False

    def update_collection(self, name: ArtifactName, change: Callable[[Collection], Collection]) -> Collection:
        """As the protocol says. NotFoundError if an alias is moved to a version that is not there, or is deleted meanwhile."""

        def checked(collection: Collection) -> Collection:
            changed = change(collection)
            for number in {number for alias, number in changed.aliases.items() if collection.aliases.get(alias) != number}:
                self.version(name.at(f"v{number}"))
            for alias in changed.aliases.keys() - collection.aliases.keys():
                Semvers(collection.semver, ()).check_alias(alias, name)
            return changed

        return self._update_collection(name, checked)

    def _update_collection(self, name: ArtifactName, change: Callable[[Collection], Collection]) -> Collection:
        races = Races()
        while True:
            races.enter()
            collection, stored = self._collection(name)
            if collection is None:
                self.collection(name)
            assert collection is not None
            changed = change(collection)
            if stored is not None and changed == stored.record:
                return collection
            changed = msgspec.structs.replace(changed, updated_at=now())
            if self._swap(f"{_folder(name)}/collection.json", changed, stored):
                return changed

    def update_version(self, name: ArtifactName, change: Callable[[Version], Version]) -> Version:
        found = self.version(name)
        source = found.origin
        name = ArtifactName(source.entity, source.project, source.collection)

        def changed(version: Version | None) -> Version:
            assert version is not None
            return _dated(version, change(version))

        made = self._edit(_version_key(name, source.number), lambda: self._version(name, source.number), changed)
        return _as_link(found, made) if isinstance(found, LinkedVersion) else made

    def delete_version(self, name: ArtifactName, delete_aliases: bool = False) -> Version:
        version = self.version(name)
        if isinstance(version, LinkedVersion):
            self.unlink(name)
            return version

        def drop(collection: Collection) -> Collection:
            held = [alias for alias, number in collection.aliases.items() if number == version.number and alias != LATEST]
            if held and not delete_aliases:
                shown = ", ".join(sorted(held))
                raise ConflictError(
                    f"{version.qualified_name} has the aliases {shown}; move them first, or delete them too (--delete-aliases)"
                )
            return self._without(collection, version.number)

        # Aliases go first: a death in between leaves a version without aliases, not aliases without a version. And once more
        # after it: this write, which changes something in any case, meets every one that did not see the version deleted.
        self._update_collection(name, drop)
        deleted = self.update_version(
            name.at(version.name), lambda it: msgspec.structs.replace(it, state="DELETED", deleted_at=now())
        )
        self._update_collection(name, lambda collection: self._without(collection, version.number))
        for link in self._marked(version):
            self._forget_source(link, version)
        return deleted

    def _without(self, collection: Collection, gone: int) -> Collection:
        """The collection without aliases, and links, of version ``gone``; ``latest`` moves to the highest one left."""
        aliases = {alias: number for alias, number in collection.aliases.items() if number != gone}
        links = {number: link for number, link in collection.links.items() if number != gone}
        if LATEST not in aliases:
            if collection.is_portfolio:
                highest = max(links, default=None)
            else:
                newest = self.newest(ArtifactName(collection.entity, collection.project, collection.name), without=gone)
                highest = newest.number if newest else None
            if highest is not None:
                aliases[LATEST] = highest
        return msgspec.structs.replace(collection, aliases=aliases, links=links, updated_at=now())

    def delete_collection(self, name: ArtifactName, delete_aliases: bool = True) -> None:
        """Delete a collection: a portfolio with its links, a sequence with all its versions. ConflictError as for them."""
        collection = self.collection(name)
        if not collection.is_portfolio:
            held = sorted(set(collection.aliases) - {LATEST})
            if held and not delete_aliases:
                raise ConflictError(f"{name.path} has versions with the aliases {', '.join(held)}; pass delete_aliases=True")
            for version in self.versions(name):
                with contextlib.suppress(NotFoundError):  # by somebody else, a moment ago
                    self.delete_version(name.at(version.name), delete_aliases=True)
        with contextlib.suppress(NotFoundError):
            self._update_collection(
                name, lambda it: msgspec.structs.replace(it, state="DELETED", aliases={}, links={}, tags=[], description=None)
            )

    # Links

    def link(
        self, version: Version, target: ArtifactName, aliases: Sequence[str] = (), run: str = "", description: str | None = None
    ) -> LinkedVersion:
        """Make a version, or what a link leads to, a member of the portfolio ``target``, which is made if it is not there.

        It gets the next number, ``latest`` and ``aliases``; one that is a member already keeps its number, and gets the aliases.
        UsageError for a collection that versions are logged to, or of another type. ``description`` is of a new portfolio.
        """
        source = version.origin
        if target.path == f"{source.entity}/{source.project}/{source.collection}":
            raise UsageError(f"{source.qualified_name} cannot be linked to its own collection; name another target")
        check_entity(target.entity)
        check_project(target.project)
        check_collection(target.collection)
        self.ensure_format()
        self.objects.swap(_linked_mark(source, target), msgspec.json.encode({"collection": target.path, "at": now()}), ABSENT)
        key = f"{_folder(target)}/collection.json"
        races = Races()
        while True:
            races.enter()
            collection, stored = self._collection(target)
            known = collection
            if known is None:
                numbers = self.numbers(target)  # of versions that were deleted
                least = max(numbers[-1] + 1 if numbers else 0, stored.record.next_link if stored else 0)
                known = _new_portfolio(target, source, least, description)
            _check_takes(known, source)
            changed, number = _with_link(known, source, aliases, run)
            if (stored is not None and changed == stored.record) or self._swap(key, changed, stored):
                break
        newest = self.newest(target) if collection is None else None
        if newest is not None:  # a version was logged to that name at the same moment
            self._give_way(target, newest.number)
            raise ConflictError(f"{target.path} has just become a collection of versions; link to another name")
        made = self._linked(changed, number)
        if made.state != "COMMITTED":
            self._forget_source(target, source)
            raise NotFoundError(f"{source.qualified_name} was deleted meanwhile, so it is not linked")
        return made

    def _give_way(self, name: ArtifactName, newest: int) -> None:
        """Turn a portfolio that was made beside a version of that name into the collection of that."""

        def change(collection: Collection) -> Collection:
            if not collection.is_portfolio:
                return collection
            return msgspec.structs.replace(collection, kind="SEQUENCE", links={}, aliases={LATEST: newest})

        self._update_collection(name, change)

    def unlink(self, name: ArtifactName) -> LinkedVersion:
        """Take a link out of its portfolio, with its aliases there; returns it as it was. UsageError if it is none."""
        version = self.version(name)
        if not isinstance(version, LinkedVersion):
            raise UsageError(f"{version.qualified_name} is no link but a version that was logged; delete removes it")
        self._update_collection(name, lambda collection: self._without(collection, version.number))
        return version

    def links_of(self, version: Version) -> list[LinkedVersion]:
        """The links that lead to what was logged as ``version``, in order of their names."""
        found = []
        for name in self._marked(version.origin):
            try:
                collection = self._collection(name)[0]
            except IntegrityError as error:
                log.warning("not listed: %s", error)
                continue
            for number, link in sorted(collection.links.items()) if collection is not None else ():
                if link.source == version.origin.qualified_name:
                    found.append(self._linked(collection, number))  # type: ignore[arg-type]  # not None: it has links
        return found

    def in_registry(self, version: Version) -> bool:
        """Whether a registry has a link to the version."""
        return any(is_registry(link.project) for link in self.links_of(version))

    def _links(self, collection: Collection) -> list[Version]:
        """The members of a portfolio whose sources are there."""
        found: list[Version] = []
        for number in sorted(collection.links):
            try:
                version = self._linked(collection, number)
            except (NotFoundError, IntegrityError) as error:
                log.warning("not listed: %s", error)
                continue
            if version.state == "COMMITTED":
                found.append(version)
        return found

    def _linked(self, collection: Collection, number: int) -> LinkedVersion:
        link = collection.links[number]
        name, at = _source_of(link)
        if at is None:
            raise IntegrityError(f"{collection.path}:v{number} in {self.url} is a link to {link.source!r}, which is no version")
        version = self._version(name, at).record
        own = {"entity": collection.entity, "project": collection.project, "collection": collection.name, "number": number}
        fields = {field: getattr(version, field) for field in Version.__struct_fields__}
        return LinkedVersion(**{**fields, **own}, source=version, linked_at=link.linked_at)

    def _marked(self, version: Version) -> list[ArtifactName]:
        """Where links to a version may be."""
        prefix = _linked_marks(version)
        parts = (info.key.removeprefix(prefix).split("/") for info in self.objects.scan(prefix))
        return sorted((ArtifactName(*map(_unquote, mark)) for mark in parts if len(mark) == 3), key=str)

    def _forget_source(self, target: ArtifactName, source: Version) -> None:
        """Take all links to ``source`` out of a portfolio."""

        def drop(collection: Collection) -> Collection:
            for number, link in collection.links.items():
                if link.source == source.qualified_name:
                    collection = self._without(collection, number)
            return collection

        with contextlib.suppress(NotFoundError):
            self._update_collection(target, drop)

    # Settings of entities

    def entity_settings(self, entity: str) -> EntitySettings:
        """What is set for an entity; the defaults where nothing is."""
        stored = self._find(_entity_key(entity), EntitySettings)
        return stored.record if stored else EntitySettings(entity=entity, created_at="", updated_at="")

    def update_entity(self, entity: str, change: Callable[[EntitySettings], EntitySettings]) -> EntitySettings:
        """Apply ``change`` atomically, as :meth:`update_collection` does."""
        check_entity(entity)
        self.ensure_format()
        key = _entity_key(entity)

        def changed(known: EntitySettings | None) -> EntitySettings:
            known = known or EntitySettings(entity=entity, created_at=now(), updated_at="")
            return msgspec.structs.replace(change(known), updated_at=now())

        return self._edit(key, lambda: self._find(key, EntitySettings), changed)

    def ttl_of(self, version: Version) -> int | None:
        """The seconds after its creation at which the version expires; None for never. A registry's are not expired."""
        source = version.origin
        return self.entity_settings(source.entity).default_ttl if source.ttl is None and source.ttl_inherited else source.ttl

    # Versions that many processes add to

    def distributed(self, name: ArtifactName, id: str) -> Distributed | None:
        """The distributed version ``id`` of a collection, if anything was ever added to it."""
        stored = self._find(_distributed_key(name, id), Distributed)
        return stored.record if stored else None

    def update_distributed(self, name: ArtifactName, id: str, change: Callable[[Distributed | None], Distributed]) -> Distributed:
        """Apply ``change`` atomically: it is called again with the newest state if another write came first."""
        key = _distributed_key(name, id)

        def changed(current: Distributed | None) -> Distributed:
            return _dated(current, change(current))

        return self._edit(key, lambda: self._find(key, Distributed), changed)

    def all_distributed(self, name: ArtifactName) -> list[Distributed]:
        """What is being added to in a collection, and what was. IntegrityError for a record that cannot be read."""
        return [self._get(info.key, Distributed).record for info in self.objects.scan(f"{_folder(name)}/distributed/")]

    # Runs and lineage

    def mark_used(self, version: Version, run: Run) -> None:
        key = f"{_used_by(version.origin)}{_quote(run.entity)}/{_quote(run.project)}/{_quote(run.id)}"
        self.objects.swap(key, msgspec.json.encode({"run": run.path, "at": now()}), ABSENT)

    def used_by(self, version: Version) -> list[Run]:
        prefix = _used_by(version.origin)
        marks = (info.key.removeprefix(prefix).split("/") for info in self.objects.scan(prefix))
        found = []
        for entity, project, id in sorted(tuple(map(_unquote, mark)) for mark in marks if len(mark) == 3):
            try:
                found.append(self.run(entity, project, id))
            except (NotFoundError, IntegrityError) as error:
                log.warning("not listed: %s", error)
        return found

    def run(self, entity: str, project: str, id: str) -> Run:
        try:
            return self._get(_run_key(entity, project, id), Run).record
        except NotFoundError:
            raise NotFoundError(f"run {entity}/{project}/{id} does not exist in {self.url}") from None

    def runs(self, entity: str, project: str) -> list[Run]:
        prefix = f"runs/{_quote(entity)}/{_quote(project)}/"
        found = []
        for info in self.objects.scan(prefix):
            try:
                found.append(self._get(info.key, Run).record)
            except IntegrityError as error:
                log.warning("not listed: %s", error)
        return sorted(found, key=lambda run: (run.created_at, run.id))

    def finish_run(self, run: Run, exit_code: int) -> None:
        """Nothing: a run's record says what it did, not whether it goes on."""

    def save_run(self, run: Run) -> None:
        self.ensure_format()
        key = _run_key(run.entity, run.project, run.id)

        def merged(known: Run | None) -> Run:
            if known is None:
                return run
            used = list(dict.fromkeys([*known.used, *run.used]))
            logged = list(dict.fromkeys([*known.logged, *run.logged]))
            return msgspec.structs.replace(run, used=used, logged=logged, created_at=known.created_at)

        self._edit(key, lambda: self._find(key, Run), merged)

    # Contents

    def local_content(self, file: File, recheck: bool = False) -> LocalContent | None:
        """As the protocol says; ``recheck``: every block is checked, also those that this process has checked before."""
        if self.objects.path("") is None:
            return None
        checks = {} if recheck else self._checks.of(file.id)
        return LocalExtents(self.objects, file.id, file.size, self.extents(file), self._block_digests(file), checks)

    def packed(self, file: File) -> Extent | None:
        if self.local or not 0 < file.size <= BLOCK:
            return None
        extents = self.extents(file)
        return extents[0] if len(extents) == 1 and extents[0].object[:1] == OBJECT_PACK else None

    def stream(self, extent: Extent) -> Iterator[bytes]:
        check_extent(extent)
        key = object_key(extent.object)
        try:
            yield from stream(self.objects, key, extent.offset, extent.length)
        except NotFoundError:  # not "not found": what refers to it exists
            raise IntegrityError(f"{key} of {self.url} is lost") from None

    def source(self, file: File) -> ExtentSource:
        if isinstance(file, Remote):
            self.pin(file, 0.0)
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
        if file.size > MAX_CONTENT or file.blocks is None or file.blocks.length != expected:
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
        """The bytes of one extent, not checked. IntegrityError if its object is lost."""
        check_extent(extent)
        key = object_key(extent.object)
        try:
            return self.objects.read(key, extent.offset, extent.length)
        except NotFoundError:  # not "not found": what refers to it exists
            raise IntegrityError(f"{key} of {self.url} is lost") from None

    def ensure_format(self) -> None:
        """Write ``store.json`` if it is not there; before anything else is written."""
        header = msgspec.json.encode({"format": FORMAT, "version": FORMAT_VERSION})
        if not self._check_format():
            self.objects.swap("store.json", header + b"\n", ABSENT)
            self._check_format()

    def default_entity(self) -> str:
        return ""

    def referenced(self, ref: Ref) -> File | Ref:
        return ref

    def pin(self, file: Remote, deadline: float) -> Remote:
        raise IntegrityError(f"{file.name} is of an artifact server, and cannot be in {self.url}; the version is damaged")

    def _block_digests(self, file: File) -> Callable[[], bytes]:
        return lambda: self.block_list(file)

    def _table(self, table: Extent, id: bytes) -> tuple[Extent, ...]:
        if table.length > MAX_TABLE:
            raise IntegrityError(f"the extents of content {id.hex()} claim {table.length} bytes")
        try:
            return msgspec.msgpack.decode(self.read_extent(table), type=tuple[Extent, ...])
        except (msgspec.MsgspecError, RecursionError) as error:
            raise IntegrityError(f"the extents of content {id.hex()} cannot be decoded: {error}") from None

    def load_page(self, page: Page) -> bytes:
        """The bytes of a page, checked against its id."""
        if not self.local:
            check_extent(page.extent)
            return self._pages.read(Small(page.id, page.extent), 0, page.extent.length, f"page {page.id.hex()} of {self.url}")
        data = self.read_extent(page.extent)
        if blake3(data).digest() != page.id:
            where = object_key(page.extent.object)
            raise IntegrityError(f"page {page.id.hex()} in {where} of {self.url} is damaged: its bytes do not match its id")
        return data

    def _load_ahead(self, page: Page, among: Sequence[object]) -> None:
        """Begin to fetch ``page`` and some of those that are likely to be read after it."""
        pages = self._order.after(page, among)
        if len(pages) > 1:
            self._pages.prefetch([Small(page.id, page.extent) for page in pages])

    # Catalog objects

    def _check_format(self) -> bool:
        """Whether ``store.json`` is there; StoreFormatError unless it is one we can use."""
        try:
            data = self._header()
        except NotFoundError:
            return False
        try:
            header = msgspec.json.decode(data, type=_Header)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise StoreFormatError(f"{self.url} is not an artifactfs store: its store.json cannot be read") from None
        if header.format != FORMAT:
            raise StoreFormatError(f"{self.url} is not an artifactfs store: store.json says format {header.format[:40]!r}")
        if header.version > FORMAT_VERSION:
            raise StoreFormatError(
                f"{self.url} has store format {header.version}; this artifactfs reads up to {FORMAT_VERSION}: upgrade artifactfs"
            )
        return True

    def _header(self) -> bytes:
        """``store.json``; NotFoundError where a store may be made, StoreFormatError where other things are: somebody mistyped
        the path."""
        try:
            return self.objects.get("store.json")[0]
        except NotFoundError:
            stranger = self._stranger()
            if stranger is None:
                raise
        try:
            return self.objects.get("store.json")[0]  # another process has made the store while we looked
        except NotFoundError:
            raise StoreFormatError(
                f"{self.url} holds {stranger!r} but no store.json, so it is not an artifactfs store; "
                "name an empty or new directory"
            ) from None

    def _stranger(self) -> str | None:
        """Something in the store that does not belong into one that is just being made."""
        folders = (folder for folder in self.objects.folders("") if folder != "tmp")
        objects = (info.key for info in self.objects.scan("") if not info.key.startswith("tmp/"))
        return next(itertools.chain(folders, objects), None)

    def _collection(self, name: ArtifactName) -> tuple[Collection | None, _Stored[Collection] | None]:
        """(the collection, its record). One without a record, or whose record says that it was deleted, is what its versions
        describe; None if there are none."""
        key = f"{_folder(name)}/collection.json"
        try:
            stored = self._get(key, Collection)
        except NotFoundError:
            return self._described_by_versions(name), None
        collection = stored.record
        if collection.path != name.path:
            raise IntegrityError(f"{key} in {self.url} says that it is {collection.path}")
        try:
            for alias in collection.aliases:
                check_alias(alias)
        except InvalidNameError as error:
            raise IntegrityError(f"{key} in {self.url}: {error}") from None
        if collection.state == "DELETED":
            return self._described_by_versions(name, collection.next_link), stored
        return collection, stored

    def _described_by_versions(self, name: ArtifactName, next_link: int = 0) -> Collection | None:
        newest = self.newest(name)
        if newest is None:
            return None
        return Collection(
            entity=name.entity,
            project=name.project,
            name=name.collection,
            type=newest.type,
            aliases={LATEST: newest.number},
            next_link=next_link,
            created_at=newest.created_at,
            updated_at=newest.created_at,
        )

    def _version(self, name: ArtifactName, number: int) -> _Stored[Version]:
        key = _version_key(name, number)
        stored = self._get(key, Version)
        version = stored.record
        if version.qualified_name != f"{name.path}:v{number}":
            raise IntegrityError(f"{key} in {self.url} says that it is {version.qualified_name}")
        try:
            for time in (version.created_at, version.updated_at):
                seconds(time)
            if version.deleted_at or version.state == "DELETED":
                seconds(version.deleted_at)
        except ValueError:
            raise IntegrityError(f"{key} in {self.url} has a time that is none") from None
        return stored

    def _get(self, key: str, kind: type[_Record]) -> _Stored[_Record]:
        data, etag = self.objects.get(key)
        try:
            return _Stored(msgspec.json.decode(data, type=kind), etag, data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise IntegrityError(f"{key} in {self.url} cannot be decoded: {error}") from None

    def _find(self, key: str, kind: type[_Record]) -> _Stored[_Record] | None:
        """As :meth:`_get`; None if there is none."""
        try:
            return self._get(key, kind)
        except NotFoundError:
            return None

    def _edit(
        self, key: str, read: Callable[[], _Stored[_Record] | None], change: Callable[[_Record | None], _Record]
    ) -> _Record:
        """Write what ``change`` makes of the record that ``read`` gives, again with the newest one if another write came first.
        One that stays as it is is not written."""
        races = Races()
        while True:
            races.enter()
            stored = read()
            changed = change(stored.record if stored else None)
            if (stored is not None and changed == stored.record) or self._swap(key, changed, stored):
                return changed

    def _swap(self, key: str, record: _Record, stored: _Stored[_Record] | None) -> bool:
        """Write ``record`` in place of ``stored``; False if another write came first."""
        data = encode_record(record, stored.data if stored else b"")
        return self.objects.swap(key, data, stored.etag if stored else ABSENT) is not None

    def _nearest(self, name: ArtifactName) -> str:
        """A hint for a mistyped name."""
        names = self.collection_names(name.entity, name.project)
        return f"; {name.entity}/{name.project} has: {', '.join(names[:8])}" if names else ""


class _SharedChecks:
    """What this process has checked of the contents it read lately, so that an opened file is not checked all over again."""

    def __init__(self) -> None:
        self._lock = new_lock()
        self._known: LRUCache[bytes, dict[bytes, CheckedBlocks]] = LRUCache(1024)

    def of(self, id: bytes) -> dict[bytes, CheckedBlocks]:
        """By object, the checks of the content ``id``."""
        with self._lock:
            checks = self._known.get(id)
            if checks is None:
                checks = self._known[id] = {}
            return checks


def open_native(objects: ObjectStore, cache: BlockCache | None = None, offline: bool = False) -> NativeStore:
    """The native store over ``objects``; see :func:`artifactfs.store.urls.open_store` for errors."""
    return NativeStore(objects, cache, offline)


def native_store(store: Store, doing: str) -> NativeStore:
    """``store``, if it is a native one. UsageError for an artifact server, which cannot be ``doing``."""
    if isinstance(store, NativeStore):
        return store
    raise UsageError(f"{store.url} is an artifact server, which cannot be {doing}: only stores of artifactfs's own can")


def now() -> str:
    """The current time as stores hold it: ISO 8601, UTC, microseconds, ``Z``."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def seconds(time: str) -> float:
    """Seconds since the epoch of a stored time; ValueError if it is none."""
    at = datetime.datetime.fromisoformat(time)
    if at.tzinfo is None:
        raise ValueError(f"{time!r} has no time zone")
    return at.timestamp()


def check_extent(extent: Extent) -> None:
    """IntegrityError for an extent that cannot be: of no blob or pack, or with an impossible place or length."""
    try:
        object_key(extent.object)
    except ValueError as error:
        raise IntegrityError(str(error)) from None
    if extent.offset < 0 or extent.length < 0 or extent.offset + extent.length > _MAX_PLACE:
        raise IntegrityError(f"an extent of {object_key(extent.object)} claims {extent.length} bytes at {extent.offset}")


def _dated(before: _Record | None, after: _Record) -> _Record:
    """``after`` as changed now, unless it is what was there before."""
    return after if after == before else msgspec.structs.replace(after, updated_at=now())


def encode_record(record: Version | Collection | Run | EntitySettings | Distributed, over: bytes = b"") -> bytes:
    """The record as it is stored; ``over`` is the stored one that it replaces, whose unknown keys it keeps. UsageError for one
    that could not be read again."""
    if isinstance(record, LinkedVersion):
        raise TypeError(f"{record.qualified_name} is a link, which is not stored as a version")
    try:
        data = msgspec.json.encode(record)
        if over:
            data = msgspec.json.encode(_with_unknown(record, msgspec.json.decode(data), msgspec.json.decode(over)))
        data = msgspec.json.format(data, indent=1) + b"\n"
    except UnicodeEncodeError:
        raise UsageError("a description or name is not valid Unicode, so it cannot be stored") from None
    if len(data) > MAX_RECORD:
        raise UsageError(f"metadata, description and tags take {len(data)} bytes; at most {MAX_RECORD} can be stored: use a file")
    return data


def _with_unknown(
    record: Version | Collection | Run | EntitySettings | Distributed, ours: dict[str, Any], old: dict[str, Any]
) -> dict[str, Any]:
    """``ours`` with the keys of ``old`` that this program does not know, in the record and in the links of a portfolio."""
    known = record.__struct_fields__
    if isinstance(record, Collection):
        links = old.get("links") or {}
        ours["links"] = {number: {**links.get(number, {}), **link} for number, link in ours["links"].items()}
    return {**{key: value for key, value in old.items() if key not in known}, **ours}


def _new_portfolio(name: ArtifactName, source: Version, number: int, description: str | None) -> Collection:
    return Collection(
        entity=name.entity,
        project=name.project,
        name=name.collection,
        type=source.type,
        description=description,
        kind="PORTFOLIO",
        next_link=number,
        created_at=now(),
        updated_at=now(),
    )


def _check_takes(collection: Collection, source: Version) -> None:
    """UsageError unless ``source`` may be linked to the collection."""
    if not collection.is_portfolio:
        raise UsageError(f"{collection.path} holds versions that were logged to it; links need a collection of their own")
    if collection.type != source.type:
        raise UsageError(
            f"{collection.path} holds links to artifacts of type {collection.type!r}; "
            f"{source.qualified_name} has type {source.type!r}: link it elsewhere"
        )


def _with_link(collection: Collection, source: Version, aliases: Sequence[str], run: str) -> tuple[Collection, int]:
    """The portfolio with a link to ``source``, and the number of that."""
    number = next((at for at, link in collection.links.items() if link.source == source.qualified_name), None)
    held = dict(collection.aliases)
    links, following = collection.links, collection.next_link
    if number is None:
        number = max(following, max(links, default=-1) + 1)
        links = {**links, number: Link(source=source.qualified_name, linked_at=now(), run=run)}
        following = number + 1
        held[LATEST] = number
    held.update(dict.fromkeys((alias for alias in aliases if alias != LATEST), number))
    return msgspec.structs.replace(collection, aliases=held, links=links, next_link=following), number


def _source_of(link: Link) -> tuple[ArtifactName, int | None]:
    """The collection and number that a link leads to; None for what is no name of a version."""
    try:
        name = parse(link.source)
    except InvalidNameError:
        return ArtifactName("", "", ""), None
    return name, version_number(name.alias)


def _as_link(link: LinkedVersion, source: Version) -> LinkedVersion:
    """``link`` with its source as it is now."""
    own = {"entity", "project", "collection", "number"}
    fields = {field: getattr(source, field) for field in Version.__struct_fields__ if field not in own}
    return msgspec.structs.replace(link, source=source, **fields)


def _quote(part: str) -> str:
    """One part of a key for any legal name: percent-encoded but for ASCII letters, digits and ``_.-~``; never ``.`` or ``..``.
    What gets too long for a file's name is ``=`` and base64 instead."""
    if part in ("", ".", ".."):
        raise InvalidNameError(f"{part!r} cannot be the name of anything in a store")
    try:
        quoted = urllib.parse.quote(part, safe="")
        if len(quoted) > _MAX_KEY_PART:
            quoted = "=" + base64.urlsafe_b64encode(part.encode()).decode()
    except UnicodeEncodeError:
        raise InvalidNameError(f"{part!r} is not valid Unicode") from None
    if len(quoted) > _MAX_KEY_PART + 10:
        raise InvalidNameError(f"{part[:40]!r}… is too long to be the name of anything in a store")
    return quoted


def _unquote(part: str) -> str:
    """What :func:`_quote` made ``part`` of; anything at all, where it made it of nothing."""
    if part.startswith("="):
        with contextlib.suppress(binascii.Error, UnicodeDecodeError):
            return base64.urlsafe_b64decode(part[1:]).decode()
    return urllib.parse.unquote(part, errors="surrogateescape")


def _name_of(part: str, check: Check) -> str | None:
    """The name that a part of a key stands for; None if it stands for none."""
    try:
        name = check(_unquote(part))
        return name if _quote(name) == part else None
    except InvalidNameError:
        return None


def _names(parts: list[str], check: Check) -> list[str]:
    return sorted(name for name in (_name_of(part, check) for part in parts) if name is not None)


def _folder(name: ArtifactName) -> str:
    return f"catalog/{_quote(name.entity)}/{_quote(name.project)}/{_quote(name.collection)}"


def _used_by(version: Version) -> str:
    name = ArtifactName(version.entity, version.project, version.collection)
    return f"{_folder(name)}/used/{version.number:08d}/"


def _linked_marks(version: Version) -> str:
    name = ArtifactName(version.entity, version.project, version.collection)
    return f"{_folder(name)}/linked/{version.number:08d}/"


def _linked_mark(version: Version, target: ArtifactName) -> str:
    return f"{_linked_marks(version)}{_quote(target.entity)}/{_quote(target.project)}/{_quote(target.collection)}"


def _distributed_key(name: ArtifactName, id: str) -> str:
    return f"{_folder(name)}/distributed/{_quote(id)}.json"


def _entity_key(entity: str) -> str:
    return f"entities/{_quote(entity)}.json"


def _version_key(name: ArtifactName, number: int) -> str:
    return f"{_folder(name)}/versions/{number:08d}.json"


def _run_key(entity: str, project: str, id: str) -> str:
    return f"runs/{_quote(entity)}/{_quote(project)}/{_quote(id)}.json"
