"""What mounting and storing need of this machine: each thing checked for real, with how to mend it."""

from __future__ import annotations

import dataclasses
import importlib
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import artifactfs
from artifactfs import daemon, mountpoint
from artifactfs.cache import BlockCache
from artifactfs.errors import ArtifactFSError, from_os_error
from artifactfs.model import scheme_of
from artifactfs.objects.local import LocalObjects
from artifactfs.settings import Settings
from artifactfs.store.urls import SERVERS, open_objects, open_store

if TYPE_CHECKING:
    from artifactfs.objects.bucket import BucketObjects

_FUSE_CONF = "/etc/fuse.conf"
_LOW_SPACE = 1 << 30
_SKEW = 300.0  # seconds: with more, services refuse signatures, and ages are told wrongly


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. ``fix`` says what to do if not ``ok``, or what could be better; "" for nothing."""

    what: str
    ok: bool
    found: str
    fix: str = ""


def examine(settings: Settings) -> list[Check]:
    """All checks, in the order in which one needs another. Mounts for real, in a temporary directory."""
    checks = [_python(), *map(_attempted, (_libfuse, _device)), _fusermount(), _fuse_conf()]
    if all(check.ok for check in checks):
        checks.append(_attempted(lambda: _mounting(settings)))
    checks += _store(settings)
    checks += [_cache(settings), *_directories(settings), *_mounts(settings)]
    return checks


def _attempted(look: Callable[[], Check]) -> Check:
    """The check, or the error it ended with, whose text says what to do."""
    names = {_libfuse: "libfuse", _device: "/dev/fuse"}
    try:
        return look()
    except ArtifactFSError as error:
        what, _, fix = str(error).partition(": ")
        return Check(names.get(look, "mounting"), False, what, fix or str(error))


def _python() -> Check:
    return Check("artifactfs", True, f"{artifactfs.__version__}, Python {platform.python_version()}, {platform.platform()}")


def _libfuse() -> Check:
    # Loads libfuse, which may be missing: that is what is asked here.
    importlib.import_module("artifactfs.mount")
    return Check("libfuse", True, "libfuse 2 can be loaded")


def _device() -> Check:
    mountpoint.check_device()
    return Check("/dev/fuse", True, "can be opened")


def _fusermount() -> Check:
    found = shutil.which("fusermount3") or shutil.which("fusermount")
    if found:
        return Check("fusermount", True, found)
    if os.geteuid() == 0:
        return Check("fusermount", True, "not installed; root needs none")
    return Check("fusermount", False, "not installed; only root can mount without it", "apt install fuse3 (or dnf install fuse)")


def _fuse_conf() -> Check:
    try:
        lines = [line.strip() for line in Path(_FUSE_CONF).read_text(errors="replace").splitlines()]
    except OSError:
        lines = []
    if "user_allow_other" in lines or os.geteuid() == 0:
        return Check("fuse.conf", True, "-o allow_other may be used")
    fix = f"only if other users must read your mounts: put user_allow_other into {_FUSE_CONF}"
    return Check("fuse.conf", True, "-o allow_other may not be used", fix)


def _mounting(settings: Settings) -> Check:
    with tempfile.TemporaryDirectory(prefix="artifactfs-doctor-") as path:
        started = time.monotonic()
        daemon.start(daemon.request(settings, "mount", "/", path))
        took = time.monotonic() - started
        daemon.unmount(path, state_dir=settings.state_dir)
    return Check("mounting", True, f"works; a mount is ready in {took:.2f} s")


def _store(settings: Settings) -> list[Check]:
    """The credentials of the store and the store itself, which is written to if it is remote: only so it is known to work."""
    if scheme_of(settings.store) in SERVERS:
        return [_artifact_server(settings)]
    try:
        objects = open_objects(settings.store)
    except ArtifactFSError as error:
        return [Check("store", False, str(error), "name another with ARTIFACTFS_STORE or --store")]
    if isinstance(objects, LocalObjects):
        return [_local_store(settings), Check("credentials", True, "none needed: the store is a local directory")]
    from artifactfs.objects.bucket import BucketObjects  # what it needs costs 0.4 s: only for those whose store is in a bucket

    assert isinstance(objects, BucketObjects)
    return [_credentials(objects), _remote_store(settings, objects)]


def _artifact_server(settings: Settings) -> Check:
    """Whether it answers, and takes the key."""
    try:
        started = time.monotonic()
        store = open_store(settings.store)
        found = len(store.entities())
    except ArtifactFSError as error:
        return _failed("store", error)
    took = time.monotonic() - started
    return Check("store", True, f"{store.url}: answers in {took * 1000:.0f} ms; the key may see {found} entities")


def _local_store(settings: Settings) -> Check:
    try:
        store = open_store(settings.store)
    except ArtifactFSError as error:
        return Check("store", False, str(error), "name another with ARTIFACTFS_STORE or --store")
    check = _directory("store", Path(store.url.removeprefix("file://")))
    return check if store.url in check.found else dataclasses.replace(check, found=f"{store.url}; {check.found}")


def _credentials(objects: BucketObjects) -> Check:
    try:
        found = objects.credentials()
    except ArtifactFSError as error:
        return _failed("credentials", error)
    fix = "" if found else "unless the bucket is public: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    return Check("credentials", True, found or "none found: requests are not signed", fix)


def _remote_store(settings: Settings, objects: BucketObjects) -> Check:
    """Whether it can be read, and written with conditions that hold."""
    try:
        started = time.monotonic()
        open_store(settings.store)
        took = time.monotonic() - started
        objects.probe()
        skew = abs(objects.clock() - time.time())
    except ArtifactFSError as error:
        return _failed("store", error)
    fix = f"this clock and the store's differ by {skew:.0f} s: synchronise it" if skew > _SKEW else ""
    return Check("store", True, f"{objects.url}: answers in {took * 1000:.0f} ms; conditional writes work", fix)


def _failed(what: str, error: ArtifactFSError) -> Check:
    found, _, fix = str(error).rpartition("; ")
    return Check(what, False, found or str(error), fix)


def _cache(settings: Settings) -> Check:
    info = BlockCache(settings.cache_dir, settings.cache_size).info()
    if info.problem:
        return Check("cache", False, info.problem, "name another directory with ARTIFACTFS_CACHE_DIR")
    return Check("cache", True, f"{info.root}; {info.used >> 20:,} of at most {info.limit >> 20:,} MiB used")


def _directories(settings: Settings) -> list[Check]:
    return [_directory("staging", settings.staging_dir), _directory("state", settings.state_dir)]


def _directory(what: str, path: Path) -> Check:
    """Whether ``path``, or where it would be made, can be written to, and how much room there is."""
    present = next(parent for parent in (path, *path.parents) if parent.exists())
    if not present.is_dir() or not os.access(present, os.W_OK | os.X_OK):
        return Check(what, False, f"{present} cannot be written to", f"check its owner and mode, or use another {what} directory")
    try:
        free = shutil.disk_usage(present).free
    except OSError as error:
        return Check(what, False, str(from_os_error(error, f"looking at {present}")), "check the disk")
    fix = f"make space on the disk of {present}" if free < _LOW_SPACE else ""
    return Check(what, True, f"{path}: can be written to, {free >> 20:,} MiB free", fix)


def _mounts(settings: Settings) -> Iterator[Check]:
    """Mounts that need somebody."""
    try:
        records = daemon.mounts(True, settings.state_dir)
    except ArtifactFSError as error:
        yield Check("mounts", False, str(error), "check the state directory")
        return
    trouble = [record for record in records if record.state in ("dead", "failed", "orphan")]
    for record in trouble:
        resume = f"artifactfs commit --resume {record.staging}" if record.staging else f"artifactfs unmount {record.mountpoint}"
        yield Check("mounts", True, f"{record.name} at {record.mountpoint} is {record.state}", resume)
    if not trouble:
        yield Check("mounts", True, f"{sum(record.state == 'mounted' for record in records)} mounted, none dead")
