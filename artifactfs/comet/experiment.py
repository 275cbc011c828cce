"""``Experiment``: what logs artifacts and uses them, and so makes lineage; ``API``: look-ups without one.

An experiment is a run of the store. Threads may share one.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Sequence
from types import TracebackType

import msgspec

from artifactfs import session
from artifactfs.comet.artifact import Artifact, publish_artifact
from artifactfs.comet.exceptions import ArtifactNotFound, GetArtifactException, LogArtifactException, raised_as
from artifactfs.comet.logged import APIExperiment, LoggedArtifact, Recorded
from artifactfs.errors import ConflictError, InvalidNameError, NotFoundError, UsageError
from artifactfs.model import Run, Version
from artifactfs.names import LATEST, ArtifactName, check_alias, check_collection, check_entity, check_project
from artifactfs.session import Session
from artifactfs.store.native import now

log = logging.getLogger(__name__)


class Experiment(Recorded):
    """An experiment that is going on, until :meth:`end` or the end of its ``with`` block."""

    def __init__(
        self,
        api_key: str | None = None,
        project_name: str | None = None,
        workspace: str | None = None,
        *,
        experiment_key: str | None = None,
        disabled: bool = False,
        **options: object,
    ) -> None:
        """``workspace`` defaults to ``$COMET_WORKSPACE``, else what entities default to; ``project_name`` to
        ``$COMET_PROJECT_NAME``, else what projects default to. The key of an existing experiment continues it.

        ``api_key`` and Comet's other ``options`` are about what this package does not do and have no effect, but ``disabled``
        is refused: nothing would be logged, and nobody would notice. Raises what the store raises if it cannot be written.
        """
        if disabled:
            raise UsageError("a disabled Experiment logs nothing; leave artifacts out instead of passing disabled=True")
        opened = session.current()
        self._session = opened
        self._lock = threading.Lock()
        self._ended = False
        self._record = _continued(
            opened,
            Run(
                entity=check_entity(workspace or os.environ.get("COMET_WORKSPACE") or opened.entity),
                project=check_project(project_name or os.environ.get("COMET_PROJECT_NAME") or opened.project),
                id=_check_key(experiment_key) if experiment_key is not None else secrets.token_hex(16),
                job_type="experiment",
                created_at=now(),
                updated_at=now(),
            ),
            experiment_key is not None,
        )
        opened.store.ensure_format()
        opened.store.save_run(self._record)

    @property
    def ended(self) -> bool:
        """Whether :meth:`end` was called."""
        return self._ended

    def log_artifact(self, artifact: Artifact) -> LoggedArtifact:
        """Make a version of the artifact, always, and return it; it is stored when this returns.

        Without ``artifact.version`` it is the next major one after all there are, ``1.0.0`` the first. ``latest`` and the
        artifact's aliases point to it. LogArtifactException (and what else it is) if that fails: for a version that exists
        already or another type than the artifact has, nothing is stored.
        """
        self._check_going_on("log_artifact")
        if not isinstance(artifact, Artifact):
            raise UsageError(f"log_artifact takes an artifactfs.comet.Artifact, not {type(artifact).__name__}")
        with raised_as(LogArtifactException):
            version = publish_artifact(artifact, self._session, self.workspace, self.project_name, self._record.path)
            self._note(logged=[version.qualified_name])
            return _logged(self._session, version)

    def get_artifact(
        self, artifact_name: str, workspace: str | None = None, version_or_alias: str | None = None
    ) -> LoggedArtifact:
        """The version that ``[workspace/[project/]]name[:version or alias]`` names, recorded as used by this experiment.

        ``workspace`` and ``version_or_alias`` win over what the name says; without any, it is the newest version. Without a
        project it is the experiment's, else the only one of the workspace that has an artifact of this name.
        ArtifactNotFound; GetArtifactException, also where more than one project has it.
        """
        self._check_going_on("get_artifact")
        with raised_as(GetArtifactException):
            name = _parse(artifact_name, workspace, version_or_alias, self.workspace)
            version = _find(self._session, name, self.project_name)
            self._note(used=[version.qualified_name])
            self._session.store.mark_used(version, self._record)
            return _logged(self._session, version)

    def end(self) -> None:
        """End the experiment. Idempotent."""
        if not self._ended:
            self._note()
            self._ended = True

    def __enter__(self) -> Experiment:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()

    def _note(self, used: Sequence[str] = (), logged: Sequence[str] = ()) -> None:
        """Store the record with further names in it."""
        with self._lock:
            self._record = msgspec.structs.replace(
                self._record,
                used=list(dict.fromkeys([*self._record.used, *used])),
                logged=list(dict.fromkeys([*self._record.logged, *logged])),
                updated_at=now(),
            )
            self._session.store.save_run(self._record)

    def _check_going_on(self, member: str) -> None:
        if self._ended:
            raise UsageError(f"experiment {self.id} has ended: {member} cannot be used any more; start another Experiment")


class API:
    """Look-ups in the store of the settings in force."""

    def __init__(self, api_key: str | None = None) -> None:
        """``api_key`` is Comet's and has no effect."""
        self._session = session.current()

    def get_artifact(
        self, workspace: str, artifact_name: str, version: str | None = None, alias: str | None = None
    ) -> LoggedArtifact:
        """The version or alias (default ``latest``) of an artifact, ``[project/]name``. Errors as ``Experiment.get_artifact``;
        ValueError for both a version and an alias."""
        if version is not None and alias is not None:
            raise UsageError(f"give a version or an alias of {artifact_name!r}, not both")
        with raised_as(GetArtifactException):
            prefix = f"{workspace}/" if "/" in artifact_name else ""
            name = _parse(prefix + artifact_name, workspace, version or alias or LATEST, workspace)
            return _logged(self._session, _find(self._session, name, self._session.project))

    def get_experiment_by_key(self, experiment_key: str) -> APIExperiment | None:
        """The experiment of that key in the default workspace and project; None if there is none."""
        try:
            return APIExperiment(self._session.store.run(self._session.entity, self._session.project, experiment_key))
        except NotFoundError:
            return None


def _parse(text: str, workspace: str | None, version_or_alias: str | None, default: str) -> ArtifactName:
    """The name that is meant; project "" where none is named. InvalidNameError."""
    path, _, alias = text.partition(":")
    parts = path.split("/")
    if len(parts) > 3:
        raise InvalidNameError(f"artifact name {text!r} has {len(parts)} parts; use workspace/name:version")
    named = parts[0] if len(parts) > 1 else ""
    if workspace and named and workspace != named:
        log.warning("%r names workspace %s, but %s was asked for", text, named, workspace)
    if version_or_alias and alias and version_or_alias != alias:
        log.warning("%r names version %s, but %s was asked for", text, alias, version_or_alias)
    wanted = version_or_alias or alias or LATEST
    return ArtifactName(
        check_entity(workspace or named or default),
        check_project(parts[1]) if len(parts) == 3 else "",
        check_collection(parts[-1]),
        LATEST if wanted.lower() == LATEST else check_alias(wanted),
    )


def _find(opened: Session, name: ArtifactName, project: str) -> Version:
    """The version; without a project in ``name``, of ``project`` or else of the only one that has an artifact of that name."""
    try:
        return opened.store.version(_located(opened, name, project))
    except NotFoundError as error:
        raise ArtifactNotFound(str(error)) from None


def _located(opened: Session, name: ArtifactName, project: str) -> ArtifactName:
    if name.project:
        return name
    store, workspace, collection = opened.store, name.entity, name.collection
    if collection in store.collection_names(workspace, project):
        return ArtifactName(workspace, project, collection, name.alias)
    found = [other for other in store.projects(workspace) if collection in store.collection_names(workspace, other)]
    if not found:
        raise ArtifactNotFound(f"workspace {workspace} has no artifact {collection!r} in {store.url}")
    if len(found) > 1:
        where = ", ".join(found)
        raise ConflictError(
            f"{workspace}/{collection} is in the projects {where}; write {workspace}/{found[0]}/{collection} for the first"
        )
    return ArtifactName(workspace, found[0], collection, name.alias)


def _logged(opened: Session, version: Version) -> LoggedArtifact:
    name = ArtifactName(version.entity, version.project, version.collection)
    return LoggedArtifact(opened, version, opened.store.collection(name))


def _continued(opened: Session, record: Run, again: bool) -> Run:
    """``record``, or the stored one of its key."""
    if again:
        try:
            return opened.store.run(record.entity, record.project, record.id)
        except NotFoundError:
            pass
    return record


def _check_key(key: str) -> str:
    try:
        return check_alias(key)
    except InvalidNameError:
        raise InvalidNameError(f"experiment key {key!r} must be 1 to 128 printable characters without / and :") from None
