"""Stages that are not mounted any more: find them, and finish them without mounting.

A stage is left when its commit failed or its process died. Its directory has everything that was closed; the registry may
still have its mount.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from artifactfs import mountpoint
from artifactfs.cache import BlockCache
from artifactfs.errors import ConflictError, NotFoundError
from artifactfs.publish import Report
from artifactfs.reader import Reader
from artifactfs.registry import Registry
from artifactfs.settings import Settings
from artifactfs.staging import Stage, StageInfo, StageSpec, left_out_warning, list_stages, read_spec
from artifactfs.store.urls import open_store

_ENDING = 20.0
"""Seconds in which a daemon that has told how its commit failed lets go of the staging directory: requests to a store that does
not answer may have to end first."""


@dataclasses.dataclass(frozen=True, slots=True)
class Left:
    """A stage that can be resumed."""

    directory: Path
    spec: StageSpec


@dataclasses.dataclass(frozen=True, slots=True)
class Finished:
    """What came of a stage: the version's qualified name, "" if there is none, and whether it is new. ``warning`` is a line
    about what was left out, "" if nothing was."""

    mountpoint: str
    committed: str
    created: bool
    warning: str = ""


def find_stage(settings: Settings, path: str) -> Left:
    """The stage whose directory or mountpoint is ``path``; of several that were mounted there the newest.

    NotFoundError; ConflictError if it is in use.
    """
    directory = Path(os.path.abspath(path))
    if os.path.isfile(directory / "stage.json"):  # False, not an error, where a dead mount is
        return Left(directory, read_spec(directory))
    where = mountpoint.absolute(path)
    deadline = time.monotonic() + _ENDING
    while True:
        found = _stages_at(settings, where)
        idle = [Left(stage.directory, stage.spec) for stage in found if stage.spec is not None and stage.state == "orphan"]
        if idle:
            return max(idle, key=lambda stage: stage.spec.created_at)
        if not any(stage.state == "active" for stage in found):
            raise NotFoundError(f"there is no stage to resume at {path}; `artifactfs mounts --all` lists them")
        if mountpoint.at(where) is not None or time.monotonic() > deadline:
            raise ConflictError(f"the stage of {path} is in use; artifactfs unmount {path} commits it")
        time.sleep(0.01)  # its daemon has told the outcome and is about to let go


def _stages_at(settings: Settings, where: str) -> list[StageInfo]:
    return [stage for stage in list_stages(settings.staging_dir) if stage.spec is not None and stage.spec.mountpoint == where]


def finish(settings: Settings, left: Left, report: Report | None = None, expect_base: bool | None = None) -> Finished:
    """Commit a stage that is not mounted, then remove its directory. May be repeated after any failure.

    ``expect_base`` overrides what the stage was begun with. ConflictError also if another process uses it.
    """
    with _opened(settings, left) as stage:
        warning = left_out_warning(stage.left_out())
        published = stage.commit(report, final=True, expect_base=expect_base)
        stage.remove()
    _forget(settings, left)
    if published is None:
        return Finished(left.spec.mountpoint, "", False, warning)
    return Finished(left.spec.mountpoint, published.version.qualified_name, published.created, warning)


def changes(settings: Settings, left: Left) -> list[dict[str, Any]]:
    """What a stage that is not mounted adds, modifies and deletes, and what a commit leaves out: the fields of
    ``staging.StageChange``.

    ConflictError if another process uses it.
    """
    with _opened(settings, left) as stage:
        return [dataclasses.asdict(change) for change in stage.status()]


@contextlib.contextmanager
def _opened(settings: Settings, left: Left) -> Iterator[Stage]:
    store = open_store(left.spec.store)
    cache = BlockCache(settings.cache_dir, settings.cache_size)
    reader = Reader(store, cache)
    try:
        stage = Stage.resume(left.directory, store, reader)
        try:
            yield stage
        finally:
            stage.close()
    finally:
        reader.close()
        cache.close()


def _forget(settings: Settings, left: Left) -> None:
    """Drop the record of its mount, and what the kernel still has of it."""
    registry = Registry(settings.state_dir)
    for record in registry.records():
        if record.staging == str(left.directory) and record.state in ("dead", "failed"):
            mount = mountpoint.at(record.mountpoint)
            if mount is not None and mount.device == record.device:
                mountpoint.unmount(record.mountpoint, lazy=True)
            registry.remove(record)
