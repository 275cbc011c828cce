"""Runs: what logs versions and uses them, and so makes lineage."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import msgspec

from artifactfs import commits, model, session
from artifactfs.artifact import Artifact, PathLike
from artifactfs.errors import (
    ArtifactFSError,
    CommError,
    InvalidNameError,
    NotFoundError,
    UsageError,
    also,
)
from artifactfs.names import (
    LATEST,
    ArtifactName,
    check_alias,
    check_entity,
    check_metadata,
    check_new_alias,
    check_project,
    check_tags,
)
from artifactfs.session import Session
from artifactfs.store.native import now

_log = logging.getLogger(__name__)


class Config(dict[str, Any]):
    """A run's configuration: a dict whose keys are attributes too. Stored when the run logs something and when it ends."""

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(f"the run's configuration has no {key!r}") from None

    def __setattr__(self, key: str, value: Any) -> None:
        self[key] = value


class Run:
    """A run that is going on: made by :func:`init`, ended by :meth:`finish` or the end of its ``with`` block.

    Its record is in the store from the start, so that lineage can point to it. Threads may share a run.
    """

    def __init__(self, opened: Session, record: model.Run) -> None:
        self.config = Config(record.config)
        self._session = opened
        self._record = record
        self._lock = threading.Lock()
        self._logged: list[Artifact] = []
        self._finished = False

    def __repr__(self) -> str:
        return f"<Run {self.path}>"

    @property
    def id(self) -> str:
        return self._record.id

    @property
    def name(self) -> str:
        """The name it was given, else its id."""
        return self._record.name or self.id

    @property
    def entity(self) -> str:
        return self._record.entity

    @property
    def project(self) -> str:
        return self._record.project

    @property
    def path(self) -> str:
        """``entity/project/id``."""
        return self._record.path

    @property
    def job_type(self) -> str:
        return self._record.job_type

    @property
    def group(self) -> str:
        """The group it was given, by default the id of the distributed versions that it adds to."""
        return self._record.group

    def log_artifact(
        self,
        artifact_or_path: Artifact | PathLike,
        name: str | None = None,
        type: str | None = None,
        aliases: Sequence[str] | None = None,
        tags: Sequence[str] | None = None,
    ) -> Artifact:
        """Make an artifact a version, in the background: ``wait()`` on the result. Versions of one collection come in the order
        of these calls.

        A path or URI is logged as ``name`` (default ``run-<id>-<last part of the path>``) of ``type`` (default ``unspecified``).
        ``latest`` and ``aliases`` point to the version; where nothing had changed against the newest one, to that. ValueError
        for names that cannot be and for the type of an existing collection; nothing is done then.
        """
        checked = check_tags([tags] if isinstance(tags, str) else tags or [])

        def work(artifact: Artifact, destination: ArtifactName, given: list[str]) -> None:
            artifact._publish(self._session, destination, given, checked, self.path)
            self._save(logged=[artifact.source_qualified_name])

        return self._submit("log_artifact", artifact_or_path, name, type, aliases, work)

    def upsert_artifact(
        self,
        artifact_or_path: Artifact | PathLike,
        name: str | None = None,
        type: str | None = None,
        aliases: Sequence[str] | None = None,
        distributed_id: str | None = None,
    ) -> Artifact:
        """Add an artifact as a part of a version that many runs make together, in the background. It stays a draft: ``wait()``
        returns once the part is stored; :meth:`finish_artifact` makes the version.

        ``distributed_id`` (default: the run's group) says which; TypeError if there is neither. After a finish, the next part
        with that id begins a new version. ValueError for a type or digest algorithm other than the other parts'.
        """
        id = self._check_distributed_id("upsert_artifact", distributed_id)

        def work(artifact: Artifact, destination: ArtifactName, given: list[str]) -> None:
            artifact._publish_part(self._session, destination, given, self.path)

        return self._submit("upsert_artifact", artifact_or_path, name, type, aliases, work, id)

    def finish_artifact(
        self,
        artifact_or_path: Artifact | PathLike,
        name: str | None = None,
        type: str | None = None,
        aliases: Sequence[str] | None = None,
        distributed_id: str | None = None,
    ) -> Artifact:
        """Add the last part, which may be empty, and make everything added to ``distributed_id`` one version, in the background.

        Aliases, tags and metadata of all parts are put together, the last one's winning. A path that two parts give different
        contents is a ConflictError from ``wait()``: no version is made, and the parts are dropped. Otherwise as
        :meth:`upsert_artifact`.
        """
        id = self._check_distributed_id("finish_artifact", distributed_id)

        def work(artifact: Artifact, destination: ArtifactName, given: list[str]) -> None:
            artifact._publish_last_part(self._session, destination, given, self.path)
            self._save(logged=[artifact.source_qualified_name])

        return self._submit("finish_artifact", artifact_or_path, name, type, aliases, work, id)

    def link_artifact(self, artifact: Artifact, target_path: str, aliases: Sequence[str] | str | None = None) -> Artifact:
        """Link an artifact, which is logged by this run first if it is a draft, into the portfolio
        ``[[entity/]project/]collection`` or ``wandb-registry-<registry>/<collection>``; returns the link. See
        ``Artifact.link``."""
        self._check_running("link_artifact")
        if artifact.is_draft() and artifact._commit is None:
            self.log_artifact(artifact)
        artifact.wait()
        return artifact._link(target_path, aliases, self.path, self.entity, self.project)

    def _submit(
        self,
        member: str,
        artifact_or_path: Artifact | PathLike,
        name: str | None,
        type: str | None,
        aliases: Sequence[str] | None,
        work: Callable[[Artifact, ArtifactName, list[str]], None],
        distributed_id: str | None = None,
    ) -> Artifact:
        """Do ``work`` for an artifact in the background, after what was submitted to its collection before."""
        self._check_running(member)
        self._take_config()
        given = _check_new_aliases(aliases)
        artifact = self._artifact(artifact_or_path, name, type)
        if distributed_id is not None and artifact._logged is not None:
            raise UsageError(f"{artifact.name} is logged already, so it is no part of a version to come; use new_draft()")
        artifact._final = True
        destination = artifact._destination(self._session, self.entity, self.project)
        if distributed_id is not None:
            artifact._distributed_id = distributed_id
        lane = f"{self._session.store.url} {destination.path}"
        artifact._commit = commits.submit(lane, destination.path, lambda: work(artifact, destination, given))
        self._logged.append(artifact)
        return artifact

    def _check_distributed_id(self, member: str, given: str | None) -> str:
        id = given or self.group
        if not id:
            raise TypeError(f"'Run.{member}' needs a distributed_id, or a run with a group: init(group=…)")
        return _check_id(id, "distributed_id")

    def use_artifact(
        self,
        artifact_or_name: Artifact | str,
        type: str | None = None,
        aliases: Sequence[str] | None = None,
    ) -> Artifact:
        """The artifact of that name, recorded as used by this run; any number of times is once.

        A draft is logged first, which this waits for. ``aliases`` are given to the version. ValueError for another ``type``;
        NotFoundError (also W&B's CommError) for a name that does not exist.
        """
        self._check_running("use_artifact")
        self._take_config()
        given = _check_new_aliases(aliases)
        if isinstance(artifact_or_name, Artifact):
            artifact = artifact_or_name
        else:
            with as_comm_error():
                artifact = Artifact._fetch(self._session, self._session.parse(artifact_or_name, self.entity, self.project))
        if type is not None and artifact.type != type:
            raise UsageError(f"{artifact.name} has type {artifact.type!r}, not {type!r}")
        if artifact.is_draft():
            if artifact._distributed_id is not None:
                raise UsageError(f"{artifact.name} is a part of a version that is not finished; finish_artifact makes it one")
            self.log_artifact(artifact, aliases=given).wait()
        elif given:
            artifact.aliases = [*artifact.aliases, *given]
            artifact.save()
        self._mark_used(artifact)
        return artifact

    def finish(self, exit_code: int | None = None) -> None:
        """Wait for everything logged, store the record, and end the run. Raises the first failed commit's error, with the
        others as notes. Idempotent. ``exit_code`` is taken for W&B's sake."""
        if self._finished:
            return
        self._finished = True
        with contextlib.suppress(ValueError):
            session.active_runs.remove(self)
        failures = [error for artifact in self._logged if (error := _failure(artifact)) is not None]
        try:
            self._take_config()
        except InvalidNameError as error:
            failures.append(error)
        self._save()
        self._session.store.finish_run(self._record, exit_code if exit_code is not None else int(bool(failures)))
        if failures:
            for other in failures[1:]:
                failures[0].add_note(str(other))
            raise failures[0]

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.finish()
        except Exception as failed:
            if error is None:
                raise
            error.add_note(f"and finishing the run failed: {failed}")

    def _artifact(self, artifact_or_path: Artifact | PathLike, name: str | None, type: str | None) -> Artifact:
        if isinstance(artifact_or_path, Artifact):
            if name is not None or type is not None:
                raise UsageError("name and type belong to the Artifact; give them only with a path")
            return artifact_or_path
        path = os.fspath(artifact_or_path)
        base = os.path.basename(path.rstrip("/"))
        artifact = Artifact(name or f"run-{self.id}-{base}", type or "unspecified")
        if os.path.isfile(path):
            artifact.add_file(path)
        elif os.path.isdir(path):
            artifact.add_dir(path)
        elif "://" in path:
            artifact.add_reference(path)
        else:
            raise UsageError(f"path must be a file, directory or external reference like s3://bucket/path, not {path!r}")
        return artifact

    def _mark_used(self, artifact: Artifact) -> None:
        source = artifact.stored()
        assert source is not None
        if source.session.store.url != self._session.store.url:
            raise UsageError(
                f"{source.version.qualified_name} is in {source.session.store.url}, not in the run's store; copy it first"
            )
        self._save(used=[source.version.origin.qualified_name])
        self._session.store.mark_used(source.version, self._record)

    def _take_config(self) -> None:
        """Take the configuration over into the record, in the caller's thread: it may be edited while a commit runs."""
        config = _plain_config(self.config)
        with self._lock:
            self._record = msgspec.structs.replace(self._record, config=config)

    def _save(self, used: Sequence[str] = (), logged: Sequence[str] = ()) -> None:
        """Store the record with further names in it."""
        with self._lock:
            record = msgspec.structs.replace(
                self._record,
                used=list(dict.fromkeys([*self._record.used, *used])),
                logged=list(dict.fromkeys([*self._record.logged, *logged])),
                updated_at=now(),
            )
            self._session.store.save_run(record)
            self._record = record

    def _check_running(self, member: str) -> None:
        if self._finished:
            raise UsageError(f"Run ({self.id}) is finished: 'Run.{member}' cannot be used any more; start another with init()")


def init(
    project: str | None = None,
    entity: str | None = None,
    job_type: str | None = None,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    id: str | None = None,
    group: str | None = None,
) -> Run:
    """Start a run; it is ``artifactfs.run`` until it ends, and the one before is again afterwards.

    ``entity`` defaults to the settings' or else the login name, ``project`` to the settings' or ``uncategorized``. The ``id`` of
    an existing run continues it. Raises what the store raises if it cannot be written.
    """
    opened = session.current()
    record = model.Run(
        entity=check_entity(entity or opened.entity),
        project=check_project(project or opened.project),
        id=_check_id(id) if id is not None else secrets.token_hex(4),
        name=name or "",
        job_type=job_type or "",
        group=group or "",
        config=_plain_config(config or {}),
        created_at=now(),
        updated_at=now(),
    )
    opened.store.ensure_format()
    run = Run(opened, _continued(opened, record) if id is not None else record)
    run._save()
    session.active_runs.append(run)
    return run


def current_run() -> Run | None:
    """The run that was started last and is not finished, if any."""
    return session.active_runs[-1] if session.active_runs else None  # type: ignore[return-value]  # only runs are put there


@contextlib.contextmanager
def as_comm_error() -> Iterator[None]:
    """Errors inside are W&B's CommError as well as what they are."""
    try:
        yield
    except ArtifactFSError as error:
        raise also(error, CommError) from None


def _continued(opened: Session, record: model.Run) -> model.Run:
    """``record`` over the stored run of its id, if there is one."""
    try:
        stored = opened.store.run(record.entity, record.project, record.id)
    except NotFoundError:
        return record
    return msgspec.structs.replace(
        stored,
        name=record.name or stored.name,
        job_type=record.job_type or stored.job_type,
        group=record.group or stored.group,
        config=stored.config | record.config,
    )


def _failure(artifact: Artifact) -> Exception | None:
    try:
        artifact.wait()
    except ArtifactFSError as error:
        return error
    return None


def _check_new_aliases(aliases: Sequence[str] | str | None) -> list[str]:
    """The aliases but for ``latest``, which moves by itself."""
    given = [aliases] if isinstance(aliases, str) else aliases or []
    return [check_new_alias(alias) for alias in dict.fromkeys(given) if alias != LATEST]


def _check_id(id: str, what: str = "run id") -> str:
    try:
        return check_alias(id)
    except InvalidNameError:
        raise InvalidNameError(f"{what} {id!r} must be 1 to 128 printable characters without / and :") from None


def _plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` as JSON values; unlike metadata it may have any number of keys."""
    plain = check_metadata({"config": dict(config)})["config"]
    assert isinstance(plain, dict)
    return plain
