"""A stage's directory on local disk, and finding those that are there.

::

    stage.json    the specification; written last when a stage is made: a directory without it is none
    journal       names and attributes (:mod:`artifactfs.staging.journal`)
    data/         the bytes of changed files (:mod:`artifactfs.staging.data`)
    lock          locked by the process that uses the stage, whose id is in it
    result.json   the version that a commit made; written before anything is removed
    reserve       space for recording deletions on a full disk

The directory is for its owner alone (0700).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
import time
from pathlib import Path
from typing import Any, Literal

import msgspec

from artifactfs.errors import ArtifactFSError, ConflictError, NotFoundError, StoreFormatError, from_os_error
from artifactfs.model import Version
from artifactfs.names import ArtifactName
from artifactfs.publish import Published

FORMAT = "artifactfs-stage"
FORMAT_VERSION = 1

_LOCK_WAIT = 0.5
"""Seconds that taking the lock may wait: a listing holds it for an instant to see whether anybody else does."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """What a stage will become. ``name`` has no alias; ``store`` is a URL without secrets.

    ``base`` is the number of the version underneath, None for an empty one; with ``expect_base`` the commit fails if the
    collection has a newer one by then. ``type`` "" means the collection's own. ``commit`` is the commit's unique id, kept
    over its retries. ``mountpoint``, ``run`` and ``created_at`` (ISO 8601 UTC) are for the record.
    """

    name: ArtifactName
    store: str
    type: str
    base: int | None
    aliases: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    description: str | None = None
    metadata: dict[str, Any] | None = None
    expect_base: bool = False
    commit: str
    algorithm: str
    mountpoint: str
    run: str = ""
    created_at: str


@dataclasses.dataclass(frozen=True, slots=True)
class StageInfo:
    """A stage that is there. ``pid`` is the process that uses it, None for none: then it waits to be resumed or discarded,
    or, if ``state`` is ``committed``, only to be removed. ``damaged``: its specification cannot be read and ``spec`` is None."""

    directory: Path
    spec: StageSpec | None
    pid: int | None
    state: Literal["active", "orphan", "committed", "damaged"]


class _SpecFile(msgspec.Struct):
    format: str
    version: int
    spec: msgspec.Raw = msgspec.Raw(b"")


class Result(msgspec.Struct):
    """What the commit of that id made."""

    version: Version
    created: bool
    commit: str


class StageDirectory:
    """A stage's directory, locked for this process. ``fd`` is its descriptor."""

    def __init__(self, path: Path) -> None:
        """Lock the directory. NotFoundError if there is none, ConflictError naming the process that has it."""
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            raise NotFoundError(f"{path} is not a stage: it does not exist; `artifactfs mounts --all` lists them") from None
        except OSError as error:
            raise from_os_error(error, f"opening stage {path}") from error
        try:
            self._lock = _take_lock(path, self.fd)
        except BaseException:
            os.close(self.fd)
            raise

    @classmethod
    def create(cls, path: Path) -> StageDirectory:
        """Make the directory. ConflictError if there is something. What is left of stages whose removal died goes."""
        try:
            os.makedirs(path.parent, mode=0o700, exist_ok=True)
            _sweep(path.parent)
            os.mkdir(path, 0o700)
        except FileExistsError:
            raise ConflictError(f"stage directory {path} already exists; resume it or use another") from None
        except OSError as error:
            raise from_os_error(error, f"creating stage directory {path}") from error
        return cls(path)

    def write_spec(self, spec: StageSpec) -> None:
        """Make this directory a stage, durably."""
        self._write("stage.json", {"format": FORMAT, "version": FORMAT_VERSION, "spec": spec})
        with _opened(self.path.parent) as parent:
            os.fsync(parent)

    def read_spec(self) -> StageSpec:
        return read_spec(self.path)

    def write_result(self, published: Published, commit: str) -> None:
        """Record, durably, what a commit made."""
        self._write("result.json", Result(published.version, published.created, commit))

    def read_result(self) -> Result | None:
        """What the last commit made that is recorded, if any."""
        try:
            return msgspec.json.decode((self.path / "result.json").read_bytes(), type=Result)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def retire(self) -> None:
        """Stop being a stage, so that dying while everything is removed leaves none."""
        with contextlib.suppress(OSError):
            os.rename("stage.json", "retired", src_dir_fd=self.fd, dst_dir_fd=self.fd)
            os.fsync(self.fd)

    def remove(self) -> None:
        """Remove everything. Call it after :meth:`close`; what somebody else has put there meanwhile stays."""
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Give the lock up. Idempotent."""
        if self.fd >= 0:
            os.close(self._lock)
            os.close(self.fd)
            self.fd = -1

    def _write(self, name: str, value: Any) -> None:
        data = msgspec.json.format(msgspec.json.encode(value), indent=1)
        temporary = f"{name}.new"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600, dir_fd=self.fd)
            with open(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(fd)
            os.rename(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            os.fsync(self.fd)
        except OSError as error:
            raise from_os_error(error, f"writing {name} in stage {self.path}") from error


def read_spec(path: Path) -> StageSpec:
    """The specification of the stage in ``path``. NotFoundError, StoreFormatError."""
    try:
        data = (path / "stage.json").read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"{path} is not a stage: it has no stage.json; `artifactfs mounts --all` lists them") from None
    except OSError as error:
        raise from_os_error(error, f"reading stage {path}") from error
    try:
        file = msgspec.json.decode(data, type=_SpecFile)
        if file.format != FORMAT or file.version > FORMAT_VERSION:
            raise StoreFormatError(f"stage {path} is of a newer format ({file.version}); use a newer artifactfs")
        return msgspec.json.decode(file.spec, type=StageSpec)
    except msgspec.DecodeError as error:
        raise StoreFormatError(
            f"stage {path} has a stage.json that cannot be read ({error}); its files are in {path}/data"
        ) from None


def list_stages(staging_dir: Path) -> list[StageInfo]:
    """All stages below ``staging_dir``, by directory; empty if that is not there."""
    try:
        names = sorted(os.listdir(staging_dir))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise from_os_error(error, f"listing {staging_dir}") from error
    found = (_info(staging_dir / name) for name in names)
    return [info for info in found if info is not None]


def _sweep(staging_dir: Path) -> None:
    """Remove what :meth:`StageDirectory.retire` has marked and nobody has locked."""
    for name in os.listdir(staging_dir):
        path = staging_dir / name
        if (path / "retired").exists() and holder(path) is None:
            shutil.rmtree(path, ignore_errors=True)


def _info(path: Path) -> StageInfo | None:
    if not (path / "stage.json").exists():
        return None
    pid = holder(path)
    try:
        spec = read_spec(path)
    except NotFoundError:
        return None
    except ArtifactFSError:
        return StageInfo(path, None, pid, "damaged")
    if pid is not None:
        return StageInfo(path, spec, pid, "active")
    return StageInfo(path, spec, None, "committed" if (path / "result.json").exists() else "orphan")


def holder(path: Path) -> int | None:
    """The process that uses the stage in ``path``, 0 if it does not say which; None for none."""
    try:
        fd = os.open(path / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_pid(fd)
    finally:
        os.close(fd)
    return None


def _take_lock(path: Path, directory: int) -> int:
    """A descriptor that holds the lock for as long as it is open."""
    try:
        fd = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=directory)
    except OSError as error:
        raise from_os_error(error, f"locking stage {path}") from error
    deadline = time.monotonic() + _LOCK_WAIT
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                pid = _read_pid(fd)
                os.close(fd)
                raise ConflictError(f"stage {path} is in use by process {pid or '(unknown)'}; unmount it there first") from None
            time.sleep(0.01)
    os.pwrite(fd, b"%-20d\n" % os.getpid(), 0)
    return fd


def _read_pid(fd: int) -> int:
    text = os.pread(fd, 20, 0).strip()
    return int(text) if text.isdigit() else 0


@contextlib.contextmanager
def _opened(path: Path) -> Any:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)
