"""``Api``: look up what a store has, without a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from artifactfs import model, session
from artifactfs.artifact import Artifact, ArtifactCollection
from artifactfs.errors import NotFoundError, UsageError
from artifactfs.names import check_entity, check_project, check_tags
from artifactfs.run import as_comm_error
from artifactfs.session import Session


class ArtifactType:
    """A type of a project's collections."""

    def __init__(self, opened: Session, entity: str, project: str, name: str) -> None:
        self.name = name
        self.entity = entity
        self.project = project
        self._session = opened

    def __repr__(self) -> str:
        return f"<ArtifactType {self.name}>"

    def collections(self) -> list[ArtifactCollection]:
        """The collections of this type, by name."""
        found = self._session.store.collections(self.entity, self.project)
        return [ArtifactCollection(self._session, record) for record in found if record.type == self.name]

    def collection(self, name: str) -> ArtifactCollection:
        """NotFoundError (also CommError) if there is none of that name and type."""
        with as_comm_error():
            return _collection(self._session, self.name, self._session.parse(name, self.entity, self.project).path)


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

    def artifacts(self, type_name: str, name: str, per_page: int = 50, tags: Iterable[str] | str | None = None) -> list[Artifact]:
        """The versions of a collection, newest first; only those that have all of ``tags``. ``per_page`` is W&B's."""
        wanted = set(check_tags([tags] if isinstance(tags, str) else tags or []))
        with as_comm_error():
            found = _collection(self._session, type_name, self._session.parse(name).path).artifacts()
        return [artifact for artifact in found if wanted <= set(artifact.tags)]

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

    def artifact_collections(self, project_name: str, type_name: str, per_page: int = 50) -> list[ArtifactCollection]:
        """The collections of a project (``[entity/]project``) that have a type, by name."""
        with as_comm_error():
            entity, project = self._project(project_name)
            return ArtifactType(self._session, entity, project, type_name).collections()

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

    def runs(self, path: str | None = None) -> list[model.Run]:
        """The runs of a project (``[entity/]project``), oldest first."""
        with as_comm_error():
            return self._session.store.runs(*self._project(path))

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
