"""``comet://host``: the artifacts of a Comet server as a store.

==============================  ========================================================================================
Comet                           here
==============================  ========================================================================================
workspace                       entity
project of the artifact         project; in a name any will do, as artifacts are the workspace's
artifact, its tags              collection, its tags
version ``1.2.0``               version; ``v0``, ``v1``, … are its place in the order in which they were begun
aliases, tags, metadata         the same. ``latest`` is the newest version that is closed
asset; remote asset             file (a ``model.Remote``); reference
experiment                      run
==============================  ========================================================================================

Only closed versions count. The files of one never change, so the list of them is fetched once and kept as a tree; the rest is
asked for each time. What was last told of an artifact is kept for ``--offline``.

The number of a version is for this process fixed once it was given: a version that somebody deletes on the server does not move
the others under the feet of who has a name of them.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec

from artifactfs.cache import BlockCache
from artifactfs.content import fingerprint
from artifactfs.errors import (
    ConflictError,
    IntegrityError,
    InvalidNameError,
    NotFoundError,
    UsageError,
)
from artifactfs.forking import new_lock
from artifactfs.model import BLAKE3, Collection, Dir, Entry, File, Remote, Run, Version, remote_id
from artifactfs.names import (
    LATEST,
    ArtifactName,
    check_alias,
    check_collection,
    check_entity,
    check_project,
    check_type,
    version_number,
)
from artifactfs.references import DEADLINE, Source
from artifactfs.semver import SemVer, is_semver
from artifactfs.store.comet import assets, contents, saving
from artifactfs.store.comet.account import server_of
from artifactfs.store.comet.assets import OURS
from artifactfs.store.comet.client import (
    CometClient,
    Details,
    ExperimentRow,
    FileRow,
    NotFinalError,
    VersionRow,
)
from artifactfs.store.comet.words import SIDECAR, encode_sidecar
from artifactfs.store.drafts import Draft, Published
from artifactfs.store.kept import Listed
from artifactfs.store.semvers import NEXT, Semvers
from artifactfs.store.server import ArtifactServer
from artifactfs.store.upload import Report
from artifactfs.tree import EMPTY

_WORKERS = 8  # requests at a time, where each version or artifact of a list takes one
_CLOSED = "CLOSED"
_LIST = "metadata"  # the locator of the file of assets' metadata begins so

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_R = TypeVar("_R")


class CometStore(ArtifactServer):
    """The artifacts of the server that ``url`` names."""

    semantic = True

    def __init__(self, url: str, cache: BlockCache | None = None, offline: bool = False, deadline: float = DEADLINE) -> None:
        """UsageError for a URL that cannot be right. Makes no connection."""
        self.client = CometClient(server_of(url), deadline)
        super().__init__(self.client.url, cache, offline)
        self._folder = str(cache.root) if cache is not None else None
        self._links = contents.Links()
        self._deadline = deadline
        self._lock = new_lock()
        self._numbers: dict[tuple[str, str], dict[str, int]] = {}

    # The catalog

    def entities(self) -> list[str]:
        self.check_online("a list of workspaces")
        return _valid(self.client.workspaces(), check_entity)

    def projects(self, entity: str) -> list[str]:
        self.check_online("a list of projects")
        with contextlib.suppress(NotFoundError):
            named = [row.project or "" for row in self.client.artifacts(entity)]
            return _valid([*self.client.projects(entity), *named], check_project)
        return []

    def collection_names(self, entity: str, project: str) -> list[str]:
        self.check_online("a list of artifacts")
        with contextlib.suppress(NotFoundError):
            rows = [row for row in self.client.artifacts(entity) if row.project in (None, "", project)]
            return _valid((row.name or row.artifact_name for row in rows), check_collection)
        return []

    def collections(self, entity: str, project: str) -> list[Collection]:
        def described(collection: str) -> Collection | None:
            name = ArtifactName(entity, project, collection)
            try:
                return self._collection(name, self._details(name))
            except (NotFoundError, IntegrityError) as error:
                log.warning("not listed: %s", error)
                return None

        return [found for found in _at_once(described, self.collection_names(entity, project)) if found is not None]

    def collection(self, name: ArtifactName) -> Collection:
        return self._collection(name, self._details(name))

    def numbers(self, name: ArtifactName) -> list[int]:
        return sorted(self._numbered(name, self._details(name)))

    def newest(self, name: ArtifactName, without: int | None = None) -> Version | None:
        try:
            details = self._details(name)
        except NotFoundError:
            return None
        numbered = self._numbered(name, details)
        for number in sorted(numbered, reverse=True):
            if number != without:
                with contextlib.suppress(NotFinalError):
                    return self._version(name, details, number, numbered[number])
        return None

    def versions(self, name: ArtifactName, deleted: bool = False) -> list[Version]:
        details = self._details(name)

        def described(item: tuple[int, VersionRow]) -> Version | None:
            try:
                return self._version(name, details, *item)
            except (IntegrityError, NotFoundError) as error:
                log.warning("not listed: %s", error)
                return None

        found = _at_once(described, sorted(self._numbered(name, details).items()))
        return [version for version in found if version is not None]

    def version(self, name: ArtifactName) -> Version:
        details = self._details(name)
        numbered = self._numbered(name, details)
        alias = name.alias or LATEST
        if alias.lower() == LATEST:
            newest = self.newest(name)
            if newest is None:
                raise NotFoundError(f"{name.path} has no version that is closed yet; wait until one is logged")
            return newest
        number = version_number(alias)
        if number is None:
            number = next((at for at, row in numbered.items() if row.version == alias), None)
        if number is None:
            number = next((at for at, row in numbered.items() if alias in (row.alias or ())), None)
        if number is None or number not in numbered:
            self._say_why_not(name, details, alias)
            known = ", ".join(sorted({alias for row in numbered.values() for alias in row.alias or ()})) or "none"
            what = "version" if version_number(alias) is not None or is_semver(alias) else "alias"
            raise NotFoundError(f"{name.path} has no {what} {alias!r}; its aliases are: {known}")
        return self._version(name, details, number, numbered[number])

    def _say_why_not(self, name: ArtifactName, details: Details, alias: str) -> None:
        """NotFinalError where what is asked for is there, but not closed."""
        for row in details.versions or ():
            if alias == row.version or alias in (row.alias or ()):
                raise NotFinalError(
                    f"{name.path}:{alias} is {row.state or 'not closed'} on {self.url}: it is being logged, or that failed; "
                    "wait, or log another version"
                )

    def _details(self, name: ArtifactName) -> Details:
        """What is told of an artifact; offline, what was last told."""
        key = f"artifact {name.entity}/{name.collection}"
        if self.offline:
            data = self.records.get(key) if self.records is not None else None
            if data is None:
                self.check_online(f"{name.path}, which was never looked at here,")
            assert data is not None
            return msgspec.json.decode(data, type=Details)
        try:
            details = self.client.artifact(name.entity, name.collection)
        except NotFoundError:
            raise NotFoundError(f"artifact {name.path} does not exist in {self.url}; `artifactfs ls` lists what does") from None
        if self.records is not None:
            self.records.put(key, msgspec.json.encode(details))
        return details

    def _numbered(self, name: ArtifactName, details: Details) -> dict[int, VersionRow]:
        """The versions that may be closed, by number."""
        rows = sorted(details.versions or (), key=_order)
        with self._lock:
            known = self._numbers.setdefault((name.entity, name.collection), {})
            for row in rows:
                known.setdefault(row.artifact_version_id, len(known))
            return {known[row.artifact_version_id]: row for row in rows if row.state in (None, "", _CLOSED)}

    def _collection(self, name: ArtifactName, details: Details) -> Collection:
        numbered = self._numbered(name, details)
        aliases = {alias: at for at, row in numbered.items() for alias in row.alias or () if _is_alias(alias)}
        if numbered:
            aliases[LATEST] = max(numbered)
        times = [_time(row.added) for row in numbered.values()]
        return Collection(
            entity=name.entity,
            project=name.project,
            name=name.collection,
            type=_type(details),
            description=details.description,
            tags=list(details.tags or ()),
            aliases=dict(sorted(aliases.items())),
            semver={row.version: at for at, row in numbered.items() if is_semver(row.version)},
            created_at=min(times, default=_time(None)),
            updated_at=max(times, default=_time(None)),
        )

    def _version(self, name: ArtifactName, details: Details, number: int, row: VersionRow) -> Version:
        """A closed version. NotFinalError for one that is not."""
        told = _metadata(row.metadata)
        ours = told.pop(OURS, None)
        ours = ours if isinstance(ours, dict) else {}
        base = ours.get("base")
        root = self._root(name, row)
        time = _time(row.added)
        return Version(
            entity=name.entity,
            project=name.project,
            collection=name.collection,
            number=number,
            type=_type(details),
            digest=self.tree.digest(root, BLAKE3),
            root=root,
            size=root.size,
            file_count=root.files,
            description=ours["description"] if isinstance(ours.get("description"), str) else None,
            metadata=told,
            tags=list(row.tags or ()),
            run=self._logged_by(name, details, row),
            commit=ours["commit"] if isinstance(ours.get("commit"), str) else row.artifact_version_id,
            base=base if isinstance(base, int) and base >= 0 else None,
            created_at=time,
            updated_at=time,
            semver=row.version if is_semver(row.version) else "",
        )

    def _logged_by(self, name: ArtifactName, details: Details, row: VersionRow) -> str:
        """The run that logged a version, "" where it is not told. Asked for once, which also tells whether it is closed."""
        data = self.records.get(f"origin {row.artifact_version_id}") if self.records is not None else None
        if data is None:
            if self.offline:
                return ""
            data = self._ask_origin(name.entity, name.collection, row.version, row.artifact_version_id)
        run = data.decode()
        return f"{name.entity}/{details.project or name.project}/{run}" if run else ""

    def _ask_origin(self, workspace: str, name: str, version: str, id: str) -> bytes:
        """The key of the experiment that logged a version. NotFinalError for one that is not closed."""
        data = (self.client.version(workspace, name, version).experiment_key or "").encode()
        if self.records is not None:
            self.records.put(f"origin {id}", data)
        return data

    # Files

    def _root(self, name: ArtifactName, row: VersionRow) -> Dir:
        """The root directory of a version."""
        return self.trees.root(f"{name.entity}/{name.collection}/{row.version}/{row.artifact_version_id}")

    def list_files(self, identity: str) -> Listed:
        workspace, name, version, id = identity.split("/", 3)
        self.check_online(f"{workspace}/{name}:{version}, whose files were never listed here,")
        self._ask_origin(workspace, name, version, id)
        return self._entries(identity, id, self.client.files(workspace, name, version))

    def _entries(self, identity: str, id: str, rows: list[FileRow]) -> Iterator[tuple[str, Entry]]:
        """The entries of a version; last the file of its assets' metadata."""
        told: dict[str, dict[str, Any]] = {}
        for path, entry, metadata in assets.found(rows, self.url, id):
            if metadata is not None:
                told[path] = metadata
            yield path, entry if entry is not None else EMPTY
        if told:
            data = encode_sidecar(told)
            checksum = fingerprint(data).digest
            key = remote_id(self.url, BLAKE3, checksum, len(data))
            where = assets.locator(_LIST, identity)
            yield SIDECAR, Remote("", len(data), False, key, algorithm=BLAKE3, checksum=checksum, locator=where)

    def _list_of(self, identity: str) -> bytes:
        """The file of assets' metadata of a version."""
        workspace, name, version, id = identity.split("/", 3)
        listed = assets.found(self.client.files(workspace, name, version), self.url, id)
        return encode_sidecar({path: metadata for path, _, metadata in listed if metadata is not None})

    def source(self, file: File) -> Source:
        if not isinstance(file, Remote):
            raise IntegrityError(f"{file.name} is not of {self.url}")
        self.check_online(f"reading {file.name}")
        kind, _, identity = file.locator.partition("/")
        if kind == _LIST:
            return contents.MemorySource(file, file.id, f"{self.url} {SIDECAR}", self._list_of(identity))
        return contents.AssetSource(self.client, self._links, file, self._deadline)

    def pin(self, file: Remote, deadline: float) -> Remote:
        return contents.pin(self.client, self._links, file, deadline)

    # Changing

    def update_collection(self, name: ArtifactName, change: Callable[[Collection], Collection]) -> Collection:
        """As the protocol says, but that Comet has no compare-and-swap: of two at the same moment the later one wins."""
        details = self._details(name)
        before = self._collection(name, details)
        after = change(before)
        _refuse_changes(before, after, {"aliases", "tags", "type", "updated_at"}, f"{self.url} cannot change of an artifact")
        for alias in after.aliases.keys() - before.aliases.keys():
            Semvers(before.semver, ()).check_alias(alias, name)
        self._move_aliases(name, self._numbered(name, details), before.aliases, after.aliases)
        if after.tags != before.tags or after.type != before.type:
            kind = after.type if after.type != before.type else None
            tags = after.tags if after.tags != before.tags else None
            self.client.label_artifact(details.artifact_id, kind=kind, tags=tags)
        return self.collection(name)

    def _move_aliases(
        self, name: ArtifactName, numbered: Mapping[int, VersionRow], before: Mapping[str, int], after: Mapping[str, int]
    ) -> None:
        """Let versions have the aliases of ``after``: first take them, then give them. UsageError for ``latest``."""
        if before.get(LATEST) != after.get(LATEST):
            raise UsageError(f"{name.path}:latest cannot be moved on {self.url}: it is the newest version")
        moved = {alias for alias in {*before, *after} - {LATEST} if before.get(alias) != after.get(alias)}
        for wanted, gives in ((before, False), (after, True)):
            for number in sorted({wanted[alias] for alias in moved if alias in wanted}):
                row = numbered.get(number)
                if row is None:
                    raise NotFoundError(f"{name.path} has no version v{number}")
                kept = [alias for alias in row.alias or () if alias not in moved]
                given = sorted(alias for alias in moved if gives and after.get(alias) == number)
                self.client.label(row.artifact_version_id, aliases=[*kept, *given])

    def update_version(self, name: ArtifactName, change: Callable[[Version], Version]) -> Version:
        """As the protocol says, without a compare-and-swap, as above."""
        details = self._details(name)
        version = self.version(name)
        row = self._numbered(name, details)[version.number]
        after = change(version)
        what = f"{self.url} cannot change of a version"
        _refuse_changes(version, after, {"metadata", "description", "tags", "updated_at"}, what)
        metadata = None
        if after.metadata != version.metadata or after.description != version.description:
            ours = _metadata(row.metadata).get(OURS)
            ours = dict(ours) if isinstance(ours, dict) else {}
            ours.pop("description", None)
            if after.description is not None:
                ours["description"] = after.description
            metadata = assets.encoded({**after.metadata, **({OURS: ours} if ours else {})})
        tags = after.tags if after.tags != version.tags else None
        if metadata is not None or tags is not None:
            self.client.label(row.artifact_version_id, metadata=metadata, tags=tags)
        return self.version(name.at(version.name))

    def delete_version(self, name: ArtifactName, delete_aliases: bool = False) -> Version:
        self.cannot("delete versions over its API; its own pages can")

    # Runs

    def run(self, entity: str, project: str, id: str) -> Run:
        self.check_online(f"run {id}")
        try:
            row = self.client.experiment(id)
        except (NotFoundError, UsageError):
            raise NotFoundError(f"run {entity}/{project}/{id} does not exist in {self.url}") from None
        if row.workspace_name not in (None, entity):
            raise NotFoundError(f"run {entity}/{project}/{id} does not exist in {self.url}")
        return _run(row, entity, project)

    def runs(self, entity: str, project: str) -> list[Run]:
        self.check_online("a list of runs")
        found = [_run(row, entity, project) for row in self.client.experiments(entity, project)]
        return sorted(found, key=lambda run: (run.created_at, run.id))

    def save_run(self, run: Run) -> None:
        """Begin the run's experiment, if it is not there. Its configuration is not kept."""
        self.check_online("a run")
        if saving.is_key(run.id):
            self.client.begin(run.id, run.entity, run.project)

    def mark_used(self, version: Version, run: Run) -> None:
        if saving.is_key(run.id):
            self.client.version(version.entity, version.collection, version.semver, consumer=run.id)

    # Making versions

    def save(self, draft: Draft, report: Report | None) -> Published:
        self.check_online("a commit")
        name = draft.name
        newest = self.newest(name)
        self._check_fits(draft, newest)
        own = self._begun(draft) if draft.retry else None
        if own is not None and own.state == _CLOSED:
            return self._published(draft, own.version, True)
        saving.check_draft(draft, newest, self.url)
        listing = saving.list_items(self, draft, report)
        if newest is not None and not draft.always and listing.same_as(self.tree, newest.root, self._metadata_of(newest)):
            return self._published(draft, newest.semver, False)
        made = saving.Saving(self.client, self, draft, self._folder, report)
        there: frozenset[str] | None = frozenset()
        if own is not None:
            there = made.there(own.version, listing)
            if there is None:
                made.fail(own.artifact_version_id)
                own, there = None, frozenset()
        assert there is not None
        kind = draft.type or (newest.type if newest else saving.DEFAULT_TYPE)
        try:
            if own is not None:
                id, semver = own.artifact_version_id, own.version
            else:
                self._check_semver(draft)
                id, semver = made.create(kind, lambda: self._begun(draft))
            try:
                made.fill(id, listing, there)
                made.close(id)
            except Exception as error:
                if saving.is_lasting(error):
                    made.fail(id)
                raise
        finally:
            made.end()
        return self._published(draft, semver, True)

    def _check_fits(self, draft: Draft, newest: Version | None) -> None:
        """UsageError for another type than the artifact has; ConflictError for an alias that is what a version is called."""
        if newest is None:
            return
        if draft.type and draft.type != newest.type:
            raise UsageError(
                f"{draft.name.path} already exists with type {newest.type!r}, not {draft.type!r}; use that type or another name"
            )
        known = self.collection(draft.name)
        for alias in draft.aliases:
            Semvers(known.semver, ()).check_alias(alias, draft.name)

    def _check_semver(self, draft: Draft) -> None:
        """ConflictError for a version that there is, closed or not. The server has the last word."""
        if draft.semver in ("", NEXT):
            return
        with contextlib.suppress(NotFoundError):
            rows = self._details(draft.name).versions or ()
            if any(draft.semver in (row.version, *(row.alias or ())) for row in rows):
                raise ConflictError(f"{draft.name.path}:{draft.semver} exists already; give another version, or none")

    def _begun(self, draft: Draft) -> VersionRow | None:
        """The version that an earlier attempt at this commit began, unless that was given up."""
        try:
            details = self._details(draft.name)
        except NotFoundError:
            return None
        for row in sorted(details.versions or (), key=_order, reverse=True):
            ours = _metadata(row.metadata).get(OURS)
            if isinstance(ours, dict) and ours.get("commit") == draft.commit and row.state != "ERROR":
                return self._with_state(draft.name, row)
        return None

    def _with_state(self, name: ArtifactName, row: VersionRow) -> VersionRow:
        if row.state in (None, ""):
            try:
                self.client.version(name.entity, name.collection, row.version)
            except NotFinalError:
                return msgspec.structs.replace(row, state="OPEN")
            return msgspec.structs.replace(row, state=_CLOSED)
        return row

    def _metadata_of(self, version: Version) -> Mapping[str, dict[str, Any]]:
        """The metadata of a version's assets."""
        entry = self.tree.resolve(version.root, SIDECAR)
        return saving.metadata_from(self, entry) if isinstance(entry, Remote) else {}

    def _published(self, draft: Draft, semver: str, created: bool) -> Published:
        """The version, once it has the draft's aliases."""
        name = draft.name
        wanted = [alias for alias in draft.aliases if alias.lower() != LATEST]
        if wanted:

            def point(collection: Collection) -> Collection:
                number = collection.semver[semver]
                return msgspec.structs.replace(collection, aliases={**collection.aliases, **dict.fromkeys(wanted, number)})

            self.update_collection(name, point)
        return Published(self.version(name.at(semver)), created)


def _valid(names: Iterable[str], check: Callable[[str], str]) -> list[str]:
    """The names that can be parts of ours, sorted, each once."""
    found = set()
    for name in names:
        try:
            found.add(check(name))
        except InvalidNameError as error:
            if name:
                log.warning("not listed: %s", error)
    return sorted(found)


def _at_once(function: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
    """What ``function`` gives for each item, in order, several at a time."""
    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="comet") as pool:
        return list(pool.map(function, items))


def _order(row: VersionRow) -> tuple[int, bool, Any, str]:
    """In which versions are numbered: as they were begun; by what they are called where that is not told."""
    known = is_semver(row.version)
    return (row.added or 0, known, SemVer.parse(row.version) if known else None, row.version)


def _time(millis: int | None) -> str:
    """A time as records have it."""
    try:
        at = datetime.datetime.fromtimestamp((millis or 0) / 1000, datetime.UTC)
    except (ValueError, OverflowError, OSError):
        at = datetime.datetime.fromtimestamp(0, datetime.UTC)
    return at.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _type(details: Details) -> str:
    try:
        return check_type(details.type or "unknown", details.name)
    except UsageError:
        return "unknown"


def _is_alias(alias: str) -> bool:
    """Whether a name can have ``alias`` behind its colon, and mean it."""
    if alias.lower() == LATEST or version_number(alias) is not None:
        return False
    try:
        check_alias(alias)
    except InvalidNameError:
        return False
    return True


def _metadata(text: str | None) -> dict[str, Any]:
    """A version's metadata; empty where it is none that can be read."""
    try:
        told = msgspec.json.decode(text) if text else None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        told = None
    return told if isinstance(told, dict) else {}


def _refuse_changes(before: Collection | Version, after: Collection | Version, but: set[str], what: str) -> None:
    """UsageError for a change of anything but the fields ``but``."""
    for field in before.__struct_fields__:
        if field not in but and getattr(before, field) != getattr(after, field):
            raise UsageError(f"{what} its {field.replace('_', ' ')}")


def _run(row: ExperimentRow, entity: str, project: str) -> Run:
    return Run(
        entity=entity,
        project=row.project_name or project,
        id=row.experiment_key,
        name=row.experiment_name or "",
        job_type="experiment",
        created_at=_time(row.start_time_millis),
        updated_at=_time(row.end_time_millis or row.start_time_millis),
    )


def open_comet(url: str, cache: BlockCache | None, offline: bool) -> CometStore:
    """The store at ``url``; errors as :class:`CometStore`."""
    return CometStore(url, cache, offline)
