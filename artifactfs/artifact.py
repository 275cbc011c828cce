"""Artifacts as W&B's clients know them: drafts to build and log, versions to read and edit, and the collections they are in.

An artifact is a *draft* (state ``PENDING``) until it is logged; then it is a version of its collection. What only the one or the
other has raises ArtifactNotLoggedError or ArtifactFinalizedError. A draft is one thread's; ``run.log_artifact`` hands it to a
background commit, which sets ``_logged`` at its end, in one assignment: that is all that another thread ever sees change.

Edits of a version (aliases, tags, metadata, description, TTL) are made here and pushed by :meth:`Artifact.save` as what they
change of what was last seen: an edit that somebody else made meanwhile stays, and two different ones of the same thing are a
ConflictError.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import enum
import itertools
import logging
import os
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

import msgspec

from artifactfs import commits, distributed, download, media, session
from artifactfs.building import Contents, Policy
from artifactfs.content import check_algorithm
from artifactfs.edits import Edits, merge_tags, merge_value
from artifactfs.errors import (
    ArtifactFinalizedError,
    ArtifactFSError,
    ArtifactNotLoggedError,
    CommError,
    ConflictError,
    IntegrityError,
    NotFoundError,
    UsageError,
    VerifyError,
    WaitTimeoutError,
    also,
)
from artifactfs.links import link_target
from artifactfs.manifest import (
    ArtifactFiles,
    ArtifactManifest,
    ArtifactManifestEntry,
    DraftHolding,
    Holding,
    Stored,
    VersionHolding,
    no_such_entry,
    version_id,
)
from artifactfs.media import Media
from artifactfs.model import BLAKE3, Collection, LinkedVersion, Run, Version
from artifactfs.names import (
    LATEST,
    ArtifactName,
    check_collection,
    check_metadata,
    check_new_alias,
    check_tags,
    check_type,
    entry_path,
    expires,
)
from artifactfs.paging import Pages
from artifactfs.publish import Draft, Progress, check_sequence, publish
from artifactfs.references import DEFAULT_MAX_OBJECTS
from artifactfs.session import Session
from artifactfs.store.native import now
from artifactfs.store.server import ArtifactServer

PathLike: TypeAlias = "str | os.PathLike[str]"


class ArtifactTTL(enum.Enum):
    """``INHERIT``: the entity's default time to live, which is none unless the store has one."""

    INHERIT = 0


@dataclasses.dataclass(frozen=True, slots=True)
class _Logged:
    """What a store said last of a version: what edits are compared with. ``alias`` is what it was fetched by."""

    session: Session
    version: Version
    aliases: tuple[str, ...]
    alias: str

    @property
    def name(self) -> ArtifactName:
        """As it was fetched: of a link the link's."""
        return ArtifactName(self.version.entity, self.version.project, self.version.collection, self.version.name)

    @property
    def source(self) -> ArtifactName:
        """As it was logged."""
        origin = self.version.origin
        return ArtifactName(origin.entity, origin.project, origin.collection, origin.name)


class Artifact:
    """A draft, or a version of a collection."""

    def __init__(
        self,
        name: str,
        type: str,
        description: str | None = None,
        metadata: Mapping[str, Any] | str | None = None,
        incremental: bool = False,
        use_as: str | None = None,
        storage_region: str | None = None,
        digest_algorithm: str = BLAKE3,
    ) -> None:
        """A draft of the next version of the collection ``name``. ``incremental``: logged, its entries are laid over the
        newest version's. InvalidNameError (a ValueError) for a name, type, metadata or algorithm that cannot be."""
        if use_as is not None:
            warnings.warn("use_as is deprecated and has no effect", DeprecationWarning, stacklevel=2)
        self._collection_name = check_collection(name)
        self._type = check_type(type, name)
        self._description = description
        self._metadata = check_metadata(metadata)
        self._incremental = incremental
        self._storage_region = storage_region
        self._algorithm = check_algorithm(digest_algorithm)
        self._ttl: datetime.timedelta | ArtifactTTL | None = ArtifactTTL.INHERIT
        self._ttl_changed = False
        self._tags: list[str] = []
        self._aliases: list[str] = []
        self._logged: _Logged | None = None
        self._final = False
        self._commit: commits.Commit | None = None
        self._commit_id = secrets.token_hex(16)
        self._parent: _Logged | None = None
        self._contents = Contents(self._algorithm)
        self._distributed_id: str | None = None

    @classmethod
    def _fetched(cls, opened: Session, version: Version, alias: str = "", collection: Collection | None = None) -> Artifact:
        """The artifact of a version; ``alias`` is what it was asked for by."""
        artifact = cls(version.collection, _ANY_TYPE, digest_algorithm=version.algorithm)
        artifact._final = True
        artifact._show(_seen(opened, version, alias, collection))
        return artifact

    @classmethod
    def _fetch(cls, opened: Session, name: ArtifactName) -> Artifact:
        """The artifact that ``name`` says, ``latest`` without an alias. NotFoundError."""
        return cls._fetched(opened, opened.store.version(name), name.alias or LATEST)

    def __repr__(self) -> str:
        logged = self._logged
        return f"<Artifact {logged.version.qualified_name if logged else self._collection_name + ' (draft)'}>"

    # What it is

    @property
    def id(self) -> str | None:
        """An opaque id; None for a draft."""
        return version_id(self._logged.version) if self._logged else None

    @property
    def entity(self) -> str:
        """Of the collection it was fetched through, as are :attr:`project` and :attr:`version`."""
        return self._need("entity").version.entity

    @property
    def project(self) -> str:
        return self._need("project").version.project

    @property
    def name(self) -> str:
        """``collection:alias`` as it was fetched, ``collection:v3`` once logged; the collection's name alone for a draft."""
        logged = self._logged
        return f"{self._collection_name}:{logged.alias or logged.version.name}" if logged else self._collection_name

    @property
    def qualified_name(self) -> str:
        """``entity/project/`` and :attr:`name`."""
        logged = self._need("qualified_name")
        return f"{logged.version.entity}/{logged.version.project}/{self.name}"

    @property
    def version(self) -> str:
        """``v3``."""
        return self._need("version").version.name

    @property
    def collection(self) -> ArtifactCollection:
        """The collection it was fetched through."""
        logged = self._need("collection")
        return ArtifactCollection(logged.session, logged.session.store.collection(logged.name))

    @property
    def source_entity(self) -> str:
        """Where it was logged, which for a link is another place, as for all of ``source_…``."""
        return self._need("source_entity").version.origin.entity

    @property
    def source_project(self) -> str:
        return self._need("source_project").version.origin.project

    @property
    def source_name(self) -> str:
        """``collection:v3`` where it was logged; the collection's name alone for a draft."""
        source = self._logged.version.origin if self._logged else None
        return f"{source.collection}:{source.name}" if source else self._collection_name

    @property
    def source_qualified_name(self) -> str:
        """``entity/project/collection:v3`` where it was logged."""
        return self._need("source_qualified_name").version.origin.qualified_name

    @property
    def source_version(self) -> str:
        """``v3`` in the collection it was logged to."""
        return self._need("source_version").version.origin.name

    @property
    def source_collection(self) -> ArtifactCollection:
        """The collection it was logged to."""
        logged = self._need("source_collection")
        return ArtifactCollection(logged.session, logged.session.store.collection(logged.source))

    @property
    def source_artifact(self) -> Artifact:
        """The artifact that this one is a link to; itself if it is none. ValueError if that is gone."""
        logged = self._need("source_artifact")
        if not self.is_link:
            return self
        try:
            return Artifact._fetched(logged.session, logged.session.store.version(logged.source), logged.source.alias)
        except NotFoundError as error:
            raise also(error, ValueError) from None

    @property
    def is_link(self) -> bool:
        """Whether it was fetched through a collection that it is linked into."""
        return self._logged is not None and isinstance(self._logged.version, LinkedVersion)

    @property
    def linked_artifacts(self) -> list[Artifact]:
        """The links to it, as artifacts; none for a link."""
        logged = self._need("linked_artifacts")
        if self.is_link:
            return []
        found = logged.session.store.links_of(logged.version)
        return [Artifact._fetched(logged.session, link, link.name) for link in found]

    @property
    def type(self) -> str:
        return self._logged.version.type if self._logged else self._type

    @property
    def url(self) -> str:
        """``artifactfs://entity/project/collection:v3``, which fsspec opens."""
        return f"artifactfs://{self._need('url').version.qualified_name}"

    @property
    def state(self) -> str:
        """``PENDING`` (a draft), ``COMMITTED`` or ``DELETED``."""
        return self._logged.version.state if self._logged else "PENDING"

    def is_draft(self) -> bool:
        """Whether it is not a version yet."""
        return self._logged is None

    @property
    def incremental(self) -> bool:
        return self._incremental

    @property
    def storage_region(self) -> str | None:
        return self._storage_region

    @property
    def digest_algorithm(self) -> str:
        """Of the digests of new files: ``BLAKE3``, ``MD5`` or ``XXH128``."""
        return self._algorithm

    @property
    def use_as(self) -> str | None:
        """None: deprecated."""
        return None

    @property
    def distributed_id(self) -> str | None:
        """The id of the version that it was added to with others, by ``run.upsert_artifact`` or ``finish_artifact``."""
        return self._distributed_id

    # What it holds

    @property
    def manifest(self) -> ArtifactManifest:
        """The entries. Of a draft they are those of this moment."""
        return ArtifactManifest(self._holding(), self)

    @property
    def digest(self) -> str:
        """Hex. Of a draft: the digest that the version will have; files that were not read yet are read."""
        return self._holding().digest()

    @property
    def size(self) -> int:
        """The bytes of all entries, references included where their size is known."""
        return self._holding().totals()[0]

    @property
    def file_count(self) -> int:
        """The number of entries, references included."""
        return self._need("file_count").version.file_count

    def get_entry(self, name: PathLike) -> ArtifactManifestEntry:
        """The entry at a path, or of the media object that was added under this name. KeyError if there is none."""
        logged = self._need("get_entry")
        path = entry_path(os.fspath(name))
        entry: ArtifactManifestEntry | None = self.manifest.get_entry_by_path(path) or media.find(self, path)
        if entry is None:
            raise no_such_entry(path, logged.version.qualified_name)
        return entry

    def get(self, name: str) -> Any:
        """The media object that was added as ``name`` (a Table, an Image, …); None if there is none.

        Files of it are fetched to :meth:`default_root` when they are first used. IntegrityError (a ValueError) for a stored form
        that cannot be right.
        """
        self._need("get")
        return media.get(self, name)

    def __getitem__(self, name: str) -> Any:
        """As :meth:`get`."""
        return self.get(name)

    def get_path(self, name: PathLike) -> ArtifactManifestEntry:
        """As :meth:`get_entry`."""
        self._need("get_path")
        return self.get_entry(name)

    def files(self, names: Sequence[str] | None = None, per_page: int = 50, start: str | None = None) -> ArtifactFiles:
        """The files, or those of ``names`` that exist; with ``start`` those that come after that path. ``per_page`` is taken for
        W&B's sake: they are read as they are asked for."""
        logged = self._need("files")
        return ArtifactFiles(self.manifest, logged.version, self.url, names, start)

    def stored(self) -> Stored | None:
        """The version and its session once it is logged."""
        return Stored(self._logged.session, self._logged.version) if self._logged else None

    def default_root(self) -> str:
        """Where :meth:`download` puts its files: ``$ARTIFACTFS_ARTIFACT_DIR``, ``$WANDB_ARTIFACT_DIR`` or ``./artifacts``, and
        below it ``collection:v3``."""
        return os.path.join(_artifacts_dir(), self.source_name)

    def _holding(self) -> Holding:
        source = self.stored()
        return VersionHolding(source) if source else DraftHolding(self._contents.tree, self._algorithm)

    # What can be edited

    @property
    def description(self) -> str | None:
        return self._description

    @description.setter
    def description(self, description: str | None) -> None:
        self._description = description

    @property
    def metadata(self) -> dict[str, Any]:
        """JSON values; edits in place count."""
        return self._metadata

    @metadata.setter
    def metadata(self, metadata: Mapping[str, Any] | str | None) -> None:
        self._metadata = check_metadata(metadata)

    @property
    def aliases(self) -> list[str]:
        """The aliases but for ``v3`` itself; edits in place count, and :meth:`save` pushes them. ``latest`` cannot be taken
        away: it moves at every commit."""
        self._need("aliases")
        return self._aliases

    @aliases.setter
    def aliases(self, aliases: Sequence[str]) -> None:
        self._need("aliases")
        self._aliases = _check_aliases(aliases)

    @property
    def tags(self) -> list[str]:
        """Edits in place count."""
        self._need("tags")
        return self._tags

    @tags.setter
    def tags(self, tags: Sequence[str]) -> None:
        self._need("tags")
        self._tags = check_tags([tags] if isinstance(tags, str) else tags)

    @property
    def ttl(self) -> datetime.timedelta | None:
        """How long after its creation the version may be deleted; None for never. An inherited one is the entity's default of
        now. ArtifactNotLoggedError where it is inherited and the artifact is a draft, or was just set to inherit: then only
        :meth:`save` tells."""
        if self._ttl is not ArtifactTTL.INHERIT:
            return self._ttl
        if self._ttl_changed or self._logged is None:
            raise ArtifactNotLoggedError("'Artifact.ttl' is inherited, which only logging or save() resolves")
        seconds = self._logged.session.store.ttl_of(self._logged.version) if expires(self.type) else None
        return None if seconds is None else datetime.timedelta(seconds=seconds)

    @ttl.setter
    def ttl(self, ttl: datetime.timedelta | ArtifactTTL | None) -> None:
        if self.is_link:
            raise UsageError(f"{self.name} is a link, which has no TTL of its own; set that of source_artifact")
        if not expires(self.type):
            raise UsageError(f"artifacts of type {self.type!r} cannot have a TTL")
        if isinstance(ttl, datetime.timedelta) and ttl.total_seconds() < 1:
            raise UsageError(f"Artifact TTL must be at least a second, not {ttl}; use None for no TTL")
        if not isinstance(ttl, (datetime.timedelta, ArtifactTTL, type(None))):
            raise UsageError(f"Artifact TTL must be a timedelta, None or ArtifactTTL.INHERIT, not {ttl!r}")
        self._ttl = ttl
        self._ttl_changed = True

    @property
    def commit_hash(self) -> str:
        """The id of the commit that made the version."""
        return self._need("commit_hash").version.commit

    @property
    def created_at(self) -> str:
        """ISO 8601, UTC."""
        return self._need("created_at").version.created_at

    @property
    def updated_at(self) -> str:
        """ISO 8601, UTC."""
        version = self._need("updated_at").version
        return version.updated_at or version.created_at

    @property
    def linked_at(self) -> str | None:
        """When it was linked, ISO 8601, UTC; None for what is no link."""
        version = self._need("linked_at").version
        return version.linked_at if isinstance(version, LinkedVersion) else None

    @property
    def history_step(self) -> int | None:
        """None: runs have no steps here."""
        self._need("history_step")
        return None

    # Building a draft

    def add_file(
        self,
        local_path: PathLike,
        name: str | None = None,
        is_tmp: bool = False,
        skip_cache: bool = False,
        policy: Policy = "mutable",
        overwrite: bool = False,
    ) -> ArtifactManifestEntry:
        """Add a file under ``name`` (default: its own). ``policy`` ``mutable`` copies it now; ``immutable`` reads it when it is
        logged, and a file that has changed by then fails the commit.

        ValueError for what is no file, and for a path that is taken by other content unless ``overwrite``. ``is_tmp`` names it
        by its content: what is before the first dot becomes 20 hex digits of its MD5. The owner's executable bit is kept.
        """
        self._need_open("add_file")
        path, leaf = self._contents.add_file(os.fspath(local_path), name or "", is_tmp, skip_cache, policy, overwrite)
        return ArtifactManifestEntry(path, leaf, self)

    def add_dir(
        self,
        local_path: PathLike,
        name: str | None = None,
        skip_cache: bool = False,
        policy: Policy = "mutable",
        merge: bool = False,
    ) -> None:
        """Add the files below a directory, at their paths in it, or below ``name``; all of them or, on an error, none.

        Links to files and directories are followed, as W&B does; empty directories and the owner's executable bits are kept,
        times and other modes are not. ``merge`` replaces files whose path is taken by other content, which is a ValueError
        otherwise, as are devices, sockets, pipes, broken links and links to a directory above.
        """
        self._need_open("add_dir")
        self._contents.add_dir(os.fspath(local_path), name or "", skip_cache, policy, merge)

    @contextlib.contextmanager
    def new_file(self, name: str, mode: str = "x", encoding: str | None = None, policy: Policy = "mutable") -> Iterator[IO[Any]]:
        """A file object to write an entry with; it is added when the ``with`` block ends, and not if that raises.

        With an ``x`` in ``mode`` a path that is taken is a ValueError; other modes replace it. Text is UTF-8 unless ``encoding``
        says otherwise.
        """
        self._need_open("new_file")
        with self._contents.new_file(name, mode, encoding, policy) as file:
            yield file
            self._need_open("new_file")

    def add_reference(
        self,
        uri: ArtifactManifestEntry | str,
        name: str | None = None,
        checksum: bool = True,
        max_objects: int | None = None,
    ) -> Sequence[ArtifactManifestEntry]:
        """Add an entry, or one for each file of a directory, whose bytes stay at ``uri``; all or none.

        An entry of another artifact of the same store, or its ``ref_url()``, is added as what it is: a stored file shares its
        content and needs neither copy nor source any more. With ``checksum`` False nothing is read and nothing is pinned.
        ValueError for a URI without scheme, for more than ``max_objects`` entries (default 10,000,000) and for taken paths.
        """
        self._need_open("add_reference")
        added = self._contents.add_reference(uri, name or "", checksum, max_objects or DEFAULT_MAX_OBJECTS)
        return [ArtifactManifestEntry(path, leaf, self) for path, leaf in added]

    def add(self, obj: Media, name: PathLike, overwrite: bool = False) -> ArtifactManifestEntry:
        """Add a media object (a Table, an Image, …) as ``<name>.<kind>.json`` and what it consists of; all or none.

        TypeError for what is no media object, ValueError for one that cannot be stored and for a path that is taken by other
        content unless ``overwrite``. An object of another artifact of the same store shares its contents.
        """
        self._need_open("add")
        path, additions = media.plan(obj, os.fspath(name), self._algorithm, self._contents.digest_at)
        return ArtifactManifestEntry(path, self._contents.add_object(additions, overwrite), self)

    def __setitem__(self, name: str, obj: Media) -> ArtifactManifestEntry:
        """As :meth:`add`."""
        return self.add(obj, name)

    def remove(self, item: PathLike | ArtifactManifestEntry) -> None:
        """Take away an entry, or everything below a directory. FileNotFoundError if there is no such path."""
        self._need_open("remove")
        self._contents.remove(item.path if isinstance(item, ArtifactManifestEntry) else os.fspath(item))

    def get_added_local_path_name(self, local_path: str) -> str | None:
        """The path in the artifact of a file that was added by exactly this local path, else None."""
        return self._contents.path_of(local_path)

    def finalize(self) -> None:
        """Refuse further additions and removals."""
        self._final = True

    def new_draft(self) -> Artifact:
        """A draft of the collection's next version that holds everything this version does, without aliases, tags and TTL."""
        logged = self._need("new_draft")
        draft = Artifact(
            logged.source.collection,
            _ANY_TYPE,
            description=self._description,
            metadata=copy.deepcopy(self._metadata),
            digest_algorithm=logged.version.algorithm,
        )
        draft._type = logged.version.type
        draft._parent = dataclasses.replace(logged, version=logged.version.origin)
        draft._contents = Contents(draft._algorithm, Stored(logged.session, logged.version))
        return draft

    def _any_session(self) -> Session:
        return self._parent.session if self._parent else session.current()

    # Logging

    def save(self, project: str | None = None) -> None:
        """Log a draft, in the current run or else in a run of its own (``project``), or push the edits of a version.

        Of a version only what was changed here is written. ConflictError if somebody else changed the same thing in another
        way since it was fetched: fetch it again and repeat the edit.
        """
        if self._logged is not None:
            self._push(self._logged)
        elif session.active_runs:
            session.active_runs[-1].log_artifact(self)
        else:
            self._log_alone(project)

    def wait(self, timeout: float | None = None) -> Artifact:
        """Return once it is logged. WaitTimeoutError after ``timeout`` seconds; a ValueError (and what else it is) if the commit
        failed: it may then be logged again. ArtifactNotLoggedError if it never was."""
        if self._commit is None:
            if self._logged is not None:
                return self
            raise ArtifactNotLoggedError("'Artifact.wait' used prior to logging artifact; use run.log_artifact or save() first")
        if not self._commit.wait(timeout):
            raise WaitTimeoutError(
                f"{self._collection_name} is not committed after {timeout} seconds; it goes on in the background"
            )
        if self._commit.error is not None:
            raise self._failure(self._commit.error) from self._commit.error
        return self

    def _failure(self, error: Exception) -> Exception:
        found = error if isinstance(error, ArtifactFSError) else ArtifactFSError(f"{type(error).__name__}: {error}")
        return also(found, ValueError)

    def _destination(self, opened: Session, entity: str, project: str) -> ArtifactName:
        """The collection a draft is logged to. UsageError if it cannot be, before anything is done."""
        name = ArtifactName(entity, project, self._collection_name)
        parent = self._parent
        if parent is not None and (parent.version.entity, parent.version.project) != (entity, project):
            raise UsageError(
                f"{self._collection_name} is a draft of {parent.version.qualified_name} and can be logged only to its project"
            )
        if parent is not None and parent.session.store.url != opened.store.url:
            raise UsageError(f"{self._collection_name} is a draft of a version in {parent.session.store.url}; log it there")
        if self._storage_region is not None:
            raise UsageError(f"{opened.store.url} has no storage regions; leave storage_region out")
        with contextlib.suppress(NotFoundError):
            collection = opened.store.collection(name)
            check_sequence(collection)
            kind = collection.type
            if kind != self._type:
                raise UsageError(
                    f"{name.path} already exists with type {kind!r}; type {self._type!r} cannot be logged to it: use another name"
                )
        return name

    def _publish(self, opened: Session, name: ArtifactName, aliases: Sequence[str], tags: Sequence[str], run: str) -> None:
        """Commit the draft, here and now; a version only gets the aliases and tags. After a failure it may be tried again."""
        if self._logged is not None:
            self._give(self._logged, aliases, tags)
            return
        try:
            version = self._publish_draft(opened, self._draft(name, aliases, tags, run))
        except BaseException as error:
            if kept := self._contents.keep():
                error.add_note(f"its files are kept in {kept}")
            raise
        self._show(_seen(opened, version, ""))
        self._contents.close()
        self._contents = Contents(self._algorithm)

    def _draft(self, name: ArtifactName, aliases: Sequence[str], tags: Sequence[str], run: str) -> Draft:
        return Draft(
            name=name,
            type=self._type,
            folder=self._contents.tree.root,
            commit=self._commit_id,
            algorithm=self._algorithm,
            description=self._description,
            metadata=check_metadata(self._metadata),
            tags=tags,
            aliases=aliases,
            ttl=_seconds(self._ttl),
            inherit_ttl=self._ttl is ArtifactTTL.INHERIT,
            run=run,
            base=self._parent.version.number if self._parent else None,
        )

    def _publish_draft(self, opened: Session, draft: Draft) -> Version:
        self._contents.check_borrowed(opened)
        draft = dataclasses.replace(draft, notes=opened.settings.state_dir / "arrived")
        if not self._incremental:
            return publish(opened.store, draft).version
        while True:
            newest = opened.store.newest(draft.name)
            folder = self._contents.tree.root.over(opened.store.tree, newest.root if newest else None)
            number = newest.number if newest else None
            expected = -1 if number is None else number
            try:
                return publish(opened.store, dataclasses.replace(draft, folder=folder, base=number, expect_base=expected)).version
            except ConflictError:
                again = opened.store.newest(draft.name)
                if (again.number if again else None) == number:
                    raise

    def _publish_part(self, opened: Session, name: ArtifactName, aliases: Sequence[str], run: str) -> None:
        """Add the draft to the distributed version, and stay a draft."""
        self._contents.check_borrowed(opened)
        distributed.add_part(opened.store, self._distributed_id or "", self._draft(name, aliases, (), run))

    def _publish_last_part(self, opened: Session, name: ArtifactName, aliases: Sequence[str], run: str) -> None:
        """Add the draft to the distributed version, and become what is made of all parts."""
        self._contents.check_borrowed(opened)
        draft = self._draft(name, aliases, (), run)
        version = distributed.finish(opened.store, self._distributed_id or "", draft, incremental=self._incremental)
        self._show(_seen(opened, version, ""))
        self._contents.close()
        self._contents = Contents(self._algorithm)

    def _log_alone(self, project: str | None) -> None:
        opened = self._any_session()
        parent = self._parent.version if self._parent else None
        entity = parent.entity if parent else opened.entity
        project = project or (parent.project if parent else opened.project)
        self._final = True
        name = self._destination(opened, entity, project)
        record = Run(entity=entity, project=project, id=secrets.token_hex(4), job_type="auto", created_at=now(), updated_at=now())
        opened.store.ensure_format()
        opened.store.save_run(record)
        self._commit = commits.submit(
            f"{opened.store.url} {name.path}", name.path, lambda: self._publish(opened, name, (), (), record.path)
        )
        self.wait()
        opened.store.save_run(msgspec.structs.replace(record, logged=[self.source_qualified_name]))
        opened.store.finish_run(record, 0)

    def _give(self, logged: _Logged, aliases: Sequence[str], tags: Sequence[str]) -> None:
        """Set further aliases and tags."""
        self._aliases = list(dict.fromkeys([*self._aliases, *(alias for alias in aliases if alias != LATEST)]))
        self._tags = list(dict.fromkeys([*self._tags, *tags]))
        self._push(logged)

    # Pushing edits

    def _push(self, logged: _Logged) -> None:
        aliases = _check_aliases(self._aliases)
        edits = self._edits(logged.version)
        store = logged.session.store
        if self._ttl_changed and self._ttl is not ArtifactTTL.INHERIT and store.in_registry(logged.version):
            raise UsageError(f"{self.name} is linked to a registry, where nothing expires: a TTL cannot be set")
        seen = logged.version.origin
        try:
            if edits.onto(seen, seen) != seen:
                if self.is_link:
                    warnings.warn(f"{self.name} is a link: this edits its source, {seen.qualified_name}", stacklevel=3)
                store.update_version(logged.name, lambda current: edits.onto(current, seen))
            if set(aliases) != set(logged.aliases):
                self._push_aliases(logged, aliases)
            version = store.version(logged.name)
        except NotFoundError as error:
            raise also(error, CommError) from None
        self._show(_seen(logged.session, version, logged.alias))

    def _push_aliases(self, logged: _Logged, aliases: Sequence[str]) -> None:
        added = set(aliases) - set(logged.aliases)
        removed = set(logged.aliases) - set(aliases) - {LATEST}
        number = logged.version.number

        def change(collection: Collection) -> Collection:
            held = {alias: at for alias, at in collection.aliases.items() if not (alias in removed and at == number)}
            return msgspec.structs.replace(collection, aliases=held | dict.fromkeys(sorted(added), number))

        def undo(collection: Collection) -> Collection:
            held = {alias: at for alias, at in collection.aliases.items() if not (alias in added and at == number)}
            return msgspec.structs.replace(collection, aliases=held)

        store = logged.session.store
        store.update_collection(logged.name, change)
        try:
            store.version(logged.name)
        except NotFoundError:  # deleted meanwhile: no alias may lead to it
            store.update_collection(logged.name, undo)
            raise

    def _edits(self, seen: Version) -> Edits:
        """What was changed here since ``seen``."""
        ttl = (seen.ttl, seen.ttl_inherited)
        if self._ttl_changed:
            ttl = (_seconds(self._ttl), self._ttl is ArtifactTTL.INHERIT)
        return Edits(self._description, check_metadata(self._metadata), ttl, check_tags(self._tags))

    def _show(self, logged: _Logged) -> None:
        """Take over what the store says. ``_logged`` last: who sees it sees the rest."""
        version = logged.version
        self._type = version.type
        self._algorithm = version.algorithm
        self._description = version.description
        self._metadata = copy.deepcopy(version.metadata)
        self._tags = list(version.tags)
        self._aliases = list(logged.aliases)
        self._ttl = datetime.timedelta(seconds=version.ttl) if version.ttl is not None else None
        if version.ttl is None and version.ttl_inherited:
            self._ttl = ArtifactTTL.INHERIT
        self._ttl_changed = False
        self._logged = logged

    # Reading

    def download(
        self,
        root: PathLike | None = None,
        allow_missing_references: bool = False,
        skip_cache: bool | None = None,
        path_prefix: PathLike | None = None,
        multipart: bool | None = None,
    ) -> str:
        """Fetch the files, every byte checked, into ``root`` (default :meth:`default_root`); returns it.

        ``path_prefix`` is a plain string prefix of the paths. Files that are right already are kept, differing ones replaced,
        others left alone. ``allow_missing_references`` passes over references whose target is gone or changed. ``skip_cache``
        and ``multipart`` are taken for W&B's sake: what is read in which pieces is decided by the reader.
        """
        logged = self._need("download")
        target = os.fspath(root) if root is not None else self.default_root()
        prefix = os.fspath(path_prefix) if path_prefix is not None else ""
        store, reader = logged.session.store, logged.session.reader
        with _shown_progress(logged.version) as report:
            download.get(store, reader, logged.version, target, prefix, report, allow_missing_references=allow_missing_references)
        return target

    def checkout(self, root: PathLike | None = None) -> str:
        """Make ``root`` (default ``./artifacts/collection``) exactly this version: what else is in it is removed."""
        logged = self._need("checkout")
        target = os.fspath(root) if root is not None else os.path.join(_artifacts_dir(), logged.source.collection)
        download.checkout(logged.session.store, logged.session.reader, logged.version, target)
        return target

    def verify(self, root: PathLike | None = None) -> None:
        """Compare ``root`` (default :meth:`default_root`) with this version. VerifyError (a ValueError) names what differs first
        and how much else does; it is a FileNotFoundError too if all that is wrong is that files are missing."""
        logged = self._need("verify")
        target = os.fspath(root) if root is not None else self.default_root()
        try:
            problems = download.verify(logged.session.store, logged.session.reader, logged.version, target)
        except NotFoundError as error:
            raise also(VerifyError(str(error)), FileNotFoundError) from None
        if problems:
            more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
            differs = VerifyError(f"{problems[0].message}{more}")
            missing = all(problem.kind == "missing" for problem in problems)
            raise also(differs, FileNotFoundError) if missing else differs

    def file(self, root: PathLike | None = None) -> str:
        """Download an artifact that has a single file to ``root`` (default ``./artifacts/name``); returns its path. ValueError
        if there are more."""
        logged = self._need("file")
        paths = list(itertools.islice(self.manifest.entries, 2))
        if len(paths) != 1:
            raise UsageError(f"{logged.version.qualified_name} has {logged.version.file_count} files; .file() needs exactly one")
        target = os.fspath(root) if root is not None else os.path.join(_artifacts_dir(), self.name)
        return self.get_entry(paths[0]).download(target)

    # Lineage and deletion

    def logged_by(self) -> Run | None:
        """The run that logged it, None if that is not known."""
        logged = self._need("logged_by")
        parts = logged.version.run.split("/")  # a link's is that of its source
        if len(parts) != 3:
            return None
        try:
            return logged.session.store.run(*parts)
        except NotFoundError:
            return None

    def used_by(self) -> list[Run]:
        """The runs that used it, or a link to it."""
        logged = self._need("used_by")
        return logged.session.store.used_by(logged.version)

    def link(self, target_path: str, aliases: Sequence[str] | str | None = None) -> Artifact:
        """Link it into the portfolio ``[[entity/]project/]collection``, which is made if it is not there; returns the link.

        ``wandb-registry-<registry>/<collection>`` is one of the organization's registry. A draft is saved first; of a link its
        source is linked. What is linked there already keeps its number and gets the aliases. ValueError for a target that
        versions are logged to, that has another type, or that is another organization's.
        """
        return self._link(target_path, aliases)

    def _link(
        self, target_path: str, aliases: Sequence[str] | str | None, run: str = "", entity: str = "", project: str = ""
    ) -> Artifact:
        given = _check_aliases(aliases)
        if self._logged is None:
            if self._commit is None:
                self.save()
            self.wait()
        logged = self._need("link")
        if self.is_link:
            warnings.warn(f"{self.name} is a link: its source, {self.source_qualified_name}, is linked", stacklevel=3)
        store = logged.session.store
        target = link_target(store, target_path, logged.version, entity, project)
        made = store.link(logged.version, target, given, run)
        return Artifact._fetched(logged.session, made, made.name)

    def unlink(self) -> None:
        """Take the link away; its source stays. ValueError if it is none."""
        logged = self._need("unlink")
        if not self.is_link:
            raise UsageError(f"{self.name} is no link, so it cannot be unlinked; delete() deletes a version")
        try:
            logged.session.store.unlink(logged.name)
        except NotFoundError as error:
            raise also(error, CommError) from None

    def delete(self, delete_aliases: bool = False) -> None:
        """Delete the version, and links to it. ConflictError (and CommError) if it has aliases besides ``latest``, unless
        ``delete_aliases``. Of a link only the link goes, with its aliases."""
        logged = self._need("delete")
        if self.is_link:
            if delete_aliases:
                warnings.warn(f"{self.name} is a link: it is unlinked, and delete_aliases has no meaning", stacklevel=2)
            self.unlink()
            return
        try:
            version = logged.session.store.delete_version(logged.name, delete_aliases)
        except (ConflictError, NotFoundError) as error:
            raise also(error, CommError) from None
        self._show(dataclasses.replace(logged, version=version, aliases=()))

    def json_encode(self) -> dict[str, Any]:
        """What stands for it in a run's configuration."""
        logged = self._need("json_encode")
        return {
            "_type": "artifactVersion",
            "_version": "v0",
            "id": self.id,
            "version": logged.version.origin.name,
            "sequenceName": logged.source.collection,
            "usedAs": None,
        }

    def _need(self, member: str) -> _Logged:
        if self._logged is None:
            raise ArtifactNotLoggedError(f"'Artifact.{member}' used prior to logging artifact; call wait() after logging it")
        return self._logged

    def _need_open(self, member: str) -> None:
        if self._final:
            raise ArtifactFinalizedError(
                f"'Artifact.{member}' used on logged artifact: a finalized artifact cannot be modified; use new_draft()"
            )


def _seen(opened: Session, version: Version, alias: str, collection: Collection | None = None) -> _Logged:
    if collection is None:
        collection = opened.store.collection(ArtifactName(version.entity, version.project, version.collection))
    aliases = tuple(name for name, number in collection.aliases.items() if number == version.number)
    return _Logged(opened, version, aliases, alias)


class ArtifactCollection:
    """A collection: its versions in order, and their type, description, tags and aliases."""

    def __init__(self, opened: Session, record: Collection) -> None:
        self._session = opened
        self._seen = record
        self.description = record.description
        self._tags = list(record.tags)
        self._type = self._seen_type = record.type

    def __repr__(self) -> str:
        return f"<ArtifactCollection {self._seen.path} ({self.type})>"

    @property
    def id(self) -> str:
        return self._seen.path

    @property
    def name(self) -> str:
        return self._seen.name

    @name.setter
    def name(self, name: str) -> None:
        if name != self._seen.name:
            raise UsageError(f"{self._seen.path} cannot be renamed: its versions have its name; link them to {name!r}")

    @property
    def entity(self) -> str:
        return self._seen.entity

    @property
    def project(self) -> str:
        return self._seen.project

    @property
    def type(self) -> str:
        """Of a collection that versions are logged to it can be set; :meth:`save` pushes it."""
        return self._type

    @type.setter
    def type(self, new_type: str) -> None:
        if not self.is_sequence():
            raise UsageError(f"{self._seen.path} is a portfolio: its type is that of what is linked into it")
        check_type(self._type, self.name)
        self._type = check_type(new_type, self.name)
        self._seen_type = ""  # its versions are looked at, also where a save() before this died over them

    @property
    def created_at(self) -> str:
        return self._seen.created_at

    @property
    def updated_at(self) -> str:
        return self._seen.updated_at

    @property
    def aliases(self) -> list[str]:
        """The aliases of all versions."""
        return list(self._seen.aliases)

    @property
    def tags(self) -> list[str]:
        """Edits in place count; :meth:`save` pushes them."""
        return self._tags

    @tags.setter
    def tags(self, tags: Sequence[str]) -> None:
        self._tags = check_tags(tags)

    def is_sequence(self) -> bool:
        """Whether versions are logged here, and not only linked."""
        return not self._seen.is_portfolio

    def artifacts(self, per_page: int = 50) -> Pages[Artifact]:
        """Its versions, newest first; they are read ``per_page`` at a time, as they are asked for."""
        record = self._session.store.collection(self._name)
        found = newest_first(self._session, record)
        return Pages(lambda: (Artifact._fetched(self._session, version, collection=record) for version in found()), per_page)

    def change_type(self, new_type: str) -> None:
        """Deprecated: set :attr:`type` and :meth:`save`."""
        warnings.warn("change_type is deprecated; set the type and save()", DeprecationWarning, stacklevel=2)
        self.type = new_type
        self.save()

    def save(self) -> None:
        """Push description, tags and type. ConflictError if somebody else set another description or type. A new type is that of
        all versions; ValueError for W&B's reserved types, and for a portfolio's."""
        seen, description, tags, kind = self._seen, self.description, check_tags(self._tags), self._type

        def change(current: Collection) -> Collection:
            text = merge_value(f"description of {seen.path}", description, current.description, seen.description)
            type = merge_value(f"type of {seen.path}", kind, current.type, seen.type)
            return msgspec.structs.replace(current, description=text, type=type, tags=merge_tags(tags, current.tags, seen.tags))

        store = self._session.store
        try:
            self._seen = store.update_collection(self._name, change)
            if self.is_sequence():
                self._retype_versions()
        except NotFoundError as error:
            raise also(error, CommError) from None
        self.description, self._tags, self._type = self._seen.description, list(self._seen.tags), self._seen.type

    def _retype_versions(self) -> None:
        """Let every version have the collection's type. One made meanwhile has it, or gets it from who makes it."""
        store, kind = self._session.store, self._seen.type
        if kind == self._seen_type:
            return
        for version in store.versions(self._name):
            if version.type != kind:
                store.update_version(self._name.at(version.name), lambda it: msgspec.structs.replace(it, type=kind))
        self._seen_type = kind

    def delete(self) -> None:
        """Delete the collection: a sequence with all its versions, their aliases and links to them; a portfolio with its links,
        whose sources stay."""
        with contextlib.suppress(NotFoundError):
            self._session.store.delete_collection(self._name)

    @property
    def _name(self) -> ArtifactName:
        return ArtifactName(self.entity, self.project, self.name)


def newest_first(opened: Session, record: Collection) -> Callable[[], Iterator[Version]]:
    """The committed versions, or members, of a collection, each read when it comes."""
    name = ArtifactName(record.entity, record.project, record.name)

    def found() -> Iterator[Version]:
        if isinstance(opened.store, ArtifactServer):  # which lists them all at once
            with contextlib.suppress(NotFoundError):
                yield from reversed(opened.store.versions(name))
            return
        numbers = sorted(record.links) if record.is_portfolio else opened.store.numbers(name)
        for number in reversed(numbers):
            try:
                version = opened.store.any_version(name, number)
            except (NotFoundError, IntegrityError) as error:
                _log.warning("not listed: %s", error)
                continue
            if version.state == "COMMITTED":
                yield version

    return found


_ANY_TYPE = "unspecified"
_LARGE = 50 << 20
_MANY = 5000
"""Bytes and files from which a download shows its progress, as W&B's client has them."""
_EVERY = 0.2
"""Seconds between two lines of progress."""
_log = logging.getLogger(__name__)


def _check_aliases(aliases: Sequence[str] | str | None) -> list[str]:
    """The aliases a user gave, each once. InvalidNameError."""
    given = [aliases] if isinstance(aliases, str) else aliases or []
    return [alias if alias == LATEST else check_new_alias(alias) for alias in dict.fromkeys(given)]


@contextlib.contextmanager
def _shown_progress(version: Version) -> Iterator[Callable[[Progress], None] | None]:
    """A line about the download of a large version, on a terminal."""
    if not sys.stderr.isatty() or (version.size < _LARGE and version.file_count < _MANY):
        yield None
        return
    shown = 0.0

    def report(progress: Progress) -> None:
        nonlocal shown
        if time.monotonic() - shown < _EVERY:
            return
        shown = time.monotonic()
        text = f"{version.qualified_name}: {progress.files:,} of {version.file_count:,} files, {progress.bytes >> 20:,} MiB"
        print(f"\r{text}", end="", file=sys.stderr, flush=True)

    try:
        yield report
    finally:
        if shown:
            print(file=sys.stderr)


def _seconds(ttl: datetime.timedelta | ArtifactTTL | None) -> int | None:
    return int(ttl.total_seconds()) if isinstance(ttl, datetime.timedelta) else None


def _artifacts_dir() -> str:
    configured = os.environ.get("ARTIFACTFS_ARTIFACT_DIR") or os.environ.get("WANDB_ARTIFACT_DIR") or "artifacts"
    return str(Path(os.path.expanduser(configured)).absolute())
