"""``Api``: look up what a store has, without a run."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec

from artifactfs import model, session
from artifactfs.artifact import Artifact, ArtifactCollection, newest_first
from artifactfs.errors import NotFoundError, UsageError
from artifactfs.filtering import Filter, compile_filter
from artifactfs.links import organization_of
from artifactfs.model import Collection, Version
from artifactfs.names import REGISTRY, ArtifactName, check_entity, check_project, check_tags, is_registry, version_number
from artifactfs.paging import Pages
from artifactfs.run import as_comm_error
from artifactfs.session import Session

_NAMES = {"createdAt": "created_at", "updatedAt": "updated_at", "versionIndex": "number", "jobType": "job_type"}
"""W&B's names of fields in orders and filters, and ours."""


class ArtifactType:
    """A type of a project's collections."""

    def __init__(self, opened: Session, entity: str, project: str, name: str) -> None:
        self.name = name
        self.entity = entity
        self.project = project
        self._session = opened

    def __repr__(self) -> str:
        return f"<ArtifactType {self.name}>"

    def collections(
        self, filters: Filter | None = None, order: str | None = None, per_page: int = 50
    ) -> Pages[ArtifactCollection]:
        """The collections of this type, by name."""
        with as_comm_error():
            return _collections(self._session, [(self.entity, self.project)], self.name, filters, order, per_page)

    def collection(self, name: str) -> ArtifactCollection:
        """NotFoundError (also CommError) if there is none of that name and type."""
        with as_comm_error():
            return _collection(self._session, self.name, self._session.parse(name, self.entity, self.project).path)


@dataclasses.dataclass(frozen=True, slots=True)
class Project:
    """A project that has collections, or had some."""

    entity: str
    name: str

    @property
    def path(self) -> str:
        """``entity/name``."""
        return f"{self.entity}/{self.name}"


class Registry:
    """A registry: the project ``wandb-registry-<name>`` of an organization. Linking something into it makes it."""

    def __init__(self, opened: Session, organization: str, name: str) -> None:
        self.organization = organization
        self.name = name
        self._session = opened

    def __repr__(self) -> str:
        return f"<Registry {self.full_name}>"

    @property
    def full_name(self) -> str:
        """``wandb-registry-`` and the name."""
        return f"{REGISTRY}{self.name}"

    @property
    def entity(self) -> str:
        """The entity it belongs to: the organization."""
        return self.organization

    def collections(
        self, filter: Filter | None = None, order: str | None = None, per_page: int = 50
    ) -> Pages[ArtifactCollection]:
        """Its collections, by name, that pass ``filter``."""
        with as_comm_error():
            return _collections(self._session, [(self.entity, self.full_name)], None, filter, order, per_page)

    def versions(self, filter: Filter | None = None, per_page: int = 50) -> Pages[Artifact]:
        """The links in all of its collections that pass ``filter``, newest first in each."""
        passes = compile_filter(filter)
        with as_comm_error():
            records = self._session.store.collections(self.entity, self.full_name)
            return Pages(
                lambda: itertools.chain.from_iterable(_versions(self._session, record, passes)() for record in records), per_page
            )


class Api:
    """Look-ups in the store of the settings in force. Its errors are W&B's CommError as well as what they are."""

    def __init__(self, overrides: Mapping[str, str] | None = None, timeout: float | None = None) -> None:
        """``overrides``: ``entity``, ``project`` and ``store`` instead of the settings'. ``timeout`` is taken for W&B's sake."""
        given = dict(overrides or {})
        unknown = set(given) - {"entity", "project", "store"}
        if unknown:
            raise UsageError(f"Api has no override {sorted(unknown)[0]!r}; it has entity, project and store")
        settings = session.current_settings()
        self._session = session.opened(
            dataclasses.replace(
                settings,
                store=given.get("store", settings.store),
                entity=given.get("entity", settings.entity),
                project=given.get("project", settings.project),
            )
        )

    @property
    def default_entity(self) -> str:
        return self._session.entity

    def artifact(self, name: str, type: str | None = None) -> Artifact:
        """The artifact ``[[entity/]project/]collection[:alias]``; ``latest`` without an alias. ValueError for another type."""
        with as_comm_error():
            artifact = Artifact._fetch(self._session, self._session.parse(name))
            if type is not None and artifact.type != type:
                raise UsageError(f"{artifact.qualified_name} has type {artifact.type!r}, not {type!r}")
            return artifact

    def artifacts(
        self,
        type_name: str,
        name: str,
        order: str | None = None,
        per_page: int = 50,
        tags: Iterable[str] | str | None = None,
        start: str | None = None,
        filters: Filter | None = None,
    ) -> Pages[Artifact]:
        """The versions of a collection, newest first; only those that have all of ``tags`` and pass ``filters``.

        ``order`` is ``createdAt``, ``updatedAt`` or ``versionIndex``, with ``-`` for descending. ``start`` (``v12``): those that
        come after that version. They are read ``per_page`` at a time, as they are asked for.
        """
        wanted = set(check_tags([tags] if isinstance(tags, str) else tags or []))
        passes = compile_filter(filters)
        field, ascending = _order(order or "-createdAt", ("created_at", "updated_at", "number"))
        after = None if start is None else version_number(start)
        if start is not None and after is None:
            raise UsageError(f"start {start!r} is no version; write for example v12")
        with as_comm_error():
            record = _collection(self._session, type_name, self._session.parse(name).path)._seen
        tagged = _versions(self._session, record, lambda it: wanted <= set(it["tags"]) and passes(it))

        def found() -> Iterator[Artifact]:
            artifacts: Iterable[Artifact] = tagged()
            if field == "updated_at" or ascending:  # by number, descending, is the order they come in; and of creation, too
                artifacts = sorted(artifacts, key=lambda it: getattr(it._need("order").version, field), reverse=not ascending)
            if after is None:
                return iter(artifacts)
            if field == "updated_at":
                rest = itertools.dropwhile(lambda it: it.version != start, artifacts)
                return itertools.islice(rest, 1, None)
            return (it for it in artifacts if (it._need("start").version.number > after) is ascending and it.version != start)

        return Pages(found, per_page)

    artifact_versions = artifacts

    def projects(self, entity: str | None = None, per_page: int = 50) -> Pages[Project]:
        """The projects of an entity that have collections, by name."""
        with as_comm_error():
            home = check_entity(entity or self._session.entity)
            names = self._session.store.projects(home)
        return Pages(lambda: (Project(home, name) for name in names), per_page)

    def artifact_types(self, project: str | None = None) -> list[ArtifactType]:
        """The types that collections of a project (``[entity/]project``) have, sorted."""
        with as_comm_error():
            entity, project = self._project(project)
            names = sorted({record.type for record in self._session.store.collections(entity, project)})
            return [ArtifactType(self._session, entity, project, name) for name in names]

    def artifact_type(self, type_name: str, project: str | None = None) -> ArtifactType:
        """NotFoundError (also CommError) if no collection has it."""
        with as_comm_error():
            for found in self.artifact_types(project):
                if found.name == type_name:
                    return found
            raise NotFoundError(f"no collection of {'/'.join(self._project(project))} has type {type_name!r}")

    def artifact_collections(
        self,
        project_name: str,
        type_name: str,
        per_page: int = 50,
        filters: Filter | None = None,
        order: str | None = None,
    ) -> Pages[ArtifactCollection]:
        """The collections of a project (``[entity/]project``) that have a type and pass ``filters``, by name."""
        with as_comm_error():
            return _collections(self._session, [self._project(project_name)], type_name, filters, order, per_page)

    def registries(self, organization: str | None = None, filter: Filter | None = None, per_page: int = 50) -> Pages[Registry]:
        """The registries of an organization (default: the entity's), by name."""
        passes = compile_filter(filter)
        with as_comm_error():
            home = check_entity(organization or organization_of(self._session.store, self._session.entity))
            names = [name.removeprefix(REGISTRY) for name in self._session.store.projects(home) if is_registry(name)]
        kept = [name for name in names if passes({"name": name, "organization": home})]
        return Pages(lambda: (Registry(self._session, home, name) for name in kept), per_page)

    def registry(self, name: str, organization: str | None = None) -> Registry:
        """The registry of that name, with or without ``wandb-registry-``. NotFoundError (also CommError)."""
        short = name.removeprefix(REGISTRY)
        with as_comm_error():
            for found in self.registries(organization):
                if found.name == short:
                    return found
            raise NotFoundError(f"there is no registry {short!r}: nothing is linked into {REGISTRY}{short}")

    def artifact_collection(self, type_name: str, name: str) -> ArtifactCollection:
        """NotFoundError (also CommError) if there is none of that name and type."""
        with as_comm_error():
            return _collection(self._session, type_name, self._session.parse(name).path)

    def artifact_exists(self, name: str, type: str | None = None) -> bool:
        """Whether :meth:`artifact` finds it. Other errors than "not found" are raised."""
        try:
            artifact = self.artifact(name)
        except NotFoundError:
            return False
        return type is None or artifact.type == type

    def artifact_collection_exists(self, name: str, type: str) -> bool:
        """Whether there is a collection of that name and type."""
        try:
            self.artifact_collection(type, name)
        except NotFoundError:
            return False
        return True

    def run(self, path: str) -> model.Run:
        """The run ``[[entity/]project/]id``."""
        *rest, id = path.strip("/").split("/")
        with as_comm_error():
            entity, project = self._project("/".join(rest) or None)
            return self._session.store.run(entity, project, id)

    def runs(
        self, path: str | None = None, filters: Filter | None = None, order: str = "+created_at", per_page: int = 50
    ) -> Pages[model.Run]:
        """The runs of a project (``[entity/]project``) that pass ``filters``, oldest first."""
        passes = compile_filter(filters)
        field, ascending = _order(order, ("created_at", "updated_at", "name", "job_type"))
        with as_comm_error():
            found = self._session.store.runs(*self._project(path))
        kept = [run for run in found if passes(_document(run))]
        kept.sort(key=lambda run: getattr(run, field), reverse=not ascending)
        return Pages(lambda: iter(kept), per_page)

    def _project(self, path: str | None) -> tuple[str, str]:
        parts = path.strip("/").split("/") if path else []
        if len(parts) > 2:
            raise UsageError(f"project {path!r} has {len(parts)} parts; use entity/project")
        project = parts[-1] if parts else self._session.project
        entity = parts[0] if len(parts) == 2 else self._session.entity
        return check_entity(entity), check_project(project)


def _collection(opened: Session, type_name: str, path: str) -> ArtifactCollection:
    record = opened.store.collection(opened.parse(path))
    if record.type != type_name:
        raise NotFoundError(f"{record.path} has type {record.type!r}, not {type_name!r}")
    return ArtifactCollection(opened, record)


def _collections(
    opened: Session,
    projects: Iterable[tuple[str, str]],
    type_name: str | None,
    filters: Filter | None,
    order: str | None,
    per_page: int,
) -> Pages[ArtifactCollection]:
    """The collections of some projects, by name or in ``order``, each record read when it comes."""
    passes = compile_filter(filters)
    field, ascending = _order(order or "name", ("name", "created_at", "updated_at"))

    def records() -> Iterator[Collection]:
        for project in projects:
            for name in opened.store.collection_names(*project):
                try:
                    record = opened.store.collection(ArtifactName(*project, name))
                except NotFoundError:  # deleted
                    continue
                if type_name in (None, record.type) and passes(_document(record)):
                    yield record

    def found() -> Iterator[ArtifactCollection]:
        kept: Iterable[Collection] = records()
        if not (field == "name" and ascending):
            kept = sorted(kept, key=lambda it: getattr(it, field), reverse=not ascending)
        return (ArtifactCollection(opened, record) for record in kept)

    return Pages(found, per_page)


def _versions(
    opened: Session, record: Collection, passes: Callable[[Mapping[str, Any]], bool]
) -> Callable[[], Iterator[Artifact]]:
    """The versions of a collection that pass, newest first."""

    def found() -> Iterator[Artifact]:
        # A server's list of collections does not tell their aliases, and every collection with a version has one.
        known = record if record.aliases else opened.store.collection(ArtifactName(record.entity, record.project, record.name))
        for version in newest_first(opened, known)():
            aliases = [alias for alias, number in known.aliases.items() if number == version.number]
            if passes({**_document(version), "aliases": aliases, "version": version.name}):
                yield Artifact._fetched(opened, version, collection=known)

    return found


def _document(record: Collection | Version | model.Run) -> dict[str, Any]:
    """What filters look at: the fields, by our names and W&B's."""
    fields: dict[str, Any] = msgspec.to_builtins(record)
    return {**fields, **{theirs: fields[ours] for theirs, ours in _NAMES.items() if ours in fields}}


def _order(order: str, known: tuple[str, ...]) -> tuple[str, bool]:
    """(field, ascending) of ``-createdAt``. UsageError."""
    name = order.lstrip("+-")
    field = _NAMES.get(name, name)
    if field not in known or len(order) - len(name) > 1:
        raise UsageError(f"order {order!r} is none; it is one of {', '.join(known)}, with - for descending")
    return field, not order.startswith("-")
