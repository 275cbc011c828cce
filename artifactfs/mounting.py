"""``mount`` and ``stage``: a version as a directory, and a directory that becomes a version, for the time of a ``with`` block."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from artifactfs import daemon, session
from artifactfs.errors import ArtifactFSError, ConflictError
from artifactfs.names import LATEST, check_metadata, check_new_alias, check_tags
from artifactfs.registry import MountRecord
from artifactfs.settings import Settings

log = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]


@contextlib.contextmanager
def mount(name: str, path: PathLike | None = None, *, offline: bool = False, path_prefix: str = "") -> Iterator[Path]:
    """``with mount("entity/project/name:alias") as path``: its files, read-only, below ``path``; unmounted at the end.

    Without ``path`` a temporary directory is made, and removed afterwards; one that is given must exist. Without an alias it is
    ``latest``. A file that the block leaves open can still be read until it is closed.
    """
    settings = session.current_settings()
    full = session.opened(settings).parse(name if ":" in name else f"{name}:{LATEST}")
    with _directory(path) as where:
        request = daemon.request(settings, "mount", str(full), where, offline=offline, path_prefix=path_prefix)
        record = daemon.start(request)
        try:
            yield Path(where)
        finally:
            daemon.unmount(record.mountpoint, lazy=True, state_dir=settings.state_dir)


class Staged:
    """A stage: ``path`` is its directory. After the block ``version`` is the qualified name of the version that came of it,
    None where there is none, and ``created`` whether it is a new one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.version: str | None = None
        self.created = False

    def __repr__(self) -> str:
        return f"<Staged {self.path}{' ' + self.version if self.version else ''}>"


@contextlib.contextmanager
def stage(
    name: str,
    path: PathLike | None = None,
    *,
    base: str | None = None,
    type: str | None = None,
    aliases: Sequence[str] = (),
    tags: Sequence[str] = (),
    description: str | None = None,
    metadata: Mapping[str, Any] | str | None = None,
    expect_base: bool = False,
    eager: bool = True,
) -> Iterator[Staged]:
    """``with stage("entity/project/name") as s``: the newest version (or ``base``; ``none`` for nothing), writable at ``s.path``.

    The end of the block unmounts and commits; ``s.version`` is the version then. An exception in the block commits nothing: the
    changes are kept in their staging directory, which a note on the exception names. Where files are still open at the end the
    same is done, and a ConflictError raised. ``type`` is needed for a new collection; ``expect_base`` makes the commit fail if
    somebody else committed meanwhile; ``eager`` stores closed files in the background, so that the end takes less long.
    """
    settings = session.current_settings()
    fields = {
        "base": base or "",
        "type": type or "",
        "aliases": tuple(check_new_alias(alias) for alias in aliases if alias != LATEST),
        "tags": tuple(check_tags(tags)),
        "description": description,
        "metadata": check_metadata(metadata) if metadata is not None else None,
        "expect_base": expect_base,
        "eager": eager,
    }
    full = session.opened(settings).parse(name)
    with _directory(path) as where:
        record = daemon.start(daemon.request(settings, "stage", str(full), where, **fields))
        staged = Staged(Path(where))
        try:
            yield staged
        except BaseException as error:
            error.add_note(_keep(record, settings))
            raise
        try:
            result = daemon.unmount(record.mountpoint, state_dir=settings.state_dir)
        except ConflictError as error:
            if _is_mounted(record, settings):  # files are open in it; another conflict is the commit's own, after unmounting
                error.add_note(_keep(record, settings))
            raise
        staged.version, staged.created = result.committed or None, result.created
        if result.record.warning:
            log.warning("%s: %s", full, result.record.warning)


def _is_mounted(record: MountRecord, settings: Settings) -> bool:
    found = daemon.find(record.mountpoint, settings.state_dir)
    return found is not None and found.id == record.id and found.state == "mounted"


def _keep(record: MountRecord, settings: Settings) -> str:
    """Unmount without a commit; returns what to do with the changes."""
    try:
        daemon.unmount(record.mountpoint, keep=True, lazy=True, state_dir=settings.state_dir)
    except ArtifactFSError as error:
        return f"and unmounting {record.mountpoint} failed: {error}"
    return f"nothing was committed; the changes are kept in {record.staging}: artifactfs commit --resume {record.staging}"


@contextlib.contextmanager
def _directory(path: PathLike | None) -> Iterator[str]:
    """An absolute path to mount at; a temporary directory is removed afterwards, if nothing is mounted there any more."""
    if path is not None:
        yield os.path.abspath(path)
        return
    where = tempfile.mkdtemp(prefix="artifactfs-")
    try:
        yield where
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(where)
