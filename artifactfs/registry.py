"""What is mounted by this user: one JSON file a mount, in a directory that only the user may enter.

A record is written when its mount answers, changed as the mount ends, and removed when nothing more is to be said about it.
A record whose process is gone without having said so is a *dead* mount: the process is known by its id, its start time and the
machine's boot, so that another process of the same id is not taken for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from artifactfs import mountpoint
from artifactfs.errors import from_os_error

_T = TypeVar("_T")

Kind = Literal["mount", "stage"]
State = Literal["mounted", "detached", "committing", "committed", "failed", "dead", "orphan"]

_KEEP = 86400.0  # seconds for which the outcome of a stage that nobody waited for, and an old log, can be asked for


class MountRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What to mount where. Paths are absolute; ``store`` is a URL or an absolute path, and has no secrets in it.

    ``kind`` "mount": ``name`` is ``entity/project/name:alias``, ``name:v7..v8``, or the level to browse (``/`` for all).
    ``kind`` "stage": ``name`` has no alias; ``base`` is the alias or version to start from, ``none`` for nothing, "" for the
    newest if there is one. ``resume`` is the staging directory of an earlier stage to go on with; the other fields of a stage
    are then those it was made with.
    """

    kind: Kind
    name: str
    mountpoint: str
    store: str
    cache_dir: str
    cache_size: int
    staging_dir: str
    state_dir: str
    entity: str = ""
    project: str = ""
    allow_other: bool = False
    options: tuple[str, ...] = ()
    offline: bool = False
    prefetch: Literal["none", "auto", "all"] = "auto"
    path_prefix: str = ""
    base: str = ""
    type: str = ""
    aliases: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    description: str | None = None
    metadata: dict[str, Any] | None = None
    expect_base: bool = False
    eager: bool = True
    """Store what was closed while the stage is still in use."""
    resume: str = ""
    drain: float = 10.0
    """Seconds that a signal waits for the last close of files that are open."""


class Process(msgspec.Struct, frozen=True):
    """A process, told from every other one that ever was: ``started`` in clock ticks after the boot ``boot`` of ``host``."""

    pid: int
    started: int
    boot: str
    host: str

    def lives(self) -> bool:
        """False also for one that has ended and was not waited for yet, and for one of another machine or boot."""
        return self.boot == _boot_id() and started_at(self.pid) == self.started


class MountRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One mount as the registry has it.

    ``name`` is what is mounted, resolved: ``entity/project/name:v3``; a stage's is its collection's with the version it began
    from, if any. ``staging`` is a stage's directory. ``committed`` is the version that came of a stage, ``created`` whether it
    is new; both are empty for one that had no changes. ``error`` is what made a stage's commit fail, ``warning`` what to say
    about one that did not.
    """

    id: str
    kind: Kind
    name: str
    mountpoint: str
    store: str
    process: Process
    state: State = "mounted"
    started_at: str
    log: str = ""
    staging: str = ""
    device: int = -1
    committed: str = ""
    created: bool = False
    error: dict[str, str] = {}
    warning: str = ""

    @property
    def pid(self) -> int:
        return self.process.pid


class Registry:
    """The records of one user. Any process may read and change them; each file is replaced in one step."""

    def __init__(self, state_dir: str | os.PathLike[str]) -> None:
        self._root = Path(state_dir) / "mounts"

    def prepare(self) -> None:
        """Have the directory, for this user alone, and forget what is too old to be asked for."""
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.chmod(self._root, 0o700)
            self._forget_old()
        except OSError as error:
            raise from_os_error(error, f"preparing {self._root}") from None

    def new_id(self) -> str:
        return secrets.token_hex(8)

    def socket(self, id: str) -> str:
        """The path of a mount's control socket."""
        return str(self._root / f"{id}.sock")

    def log(self, id: str) -> str:
        """The path of a mount's log."""
        return str(self._root / f"{id}.log")

    def save(self, record: MountRecord) -> None:
        """Write a record, durably."""
        path = self._root / f"{record.id}.json"
        temporary = self._root / f"{record.id}.{os.getpid()}.tmp"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                file.write(encode(record))
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, path)
        except OSError as error:
            raise from_os_error(error, f"writing {path}") from None

    def remove(self, record: MountRecord) -> None:
        """Forget a mount; its log stays for a while if there is anything in it."""
        with contextlib.suppress(OSError):
            if record.log and os.path.getsize(record.log) == 0:
                os.unlink(record.log)
        for suffix in ("json", "sock"):
            with contextlib.suppress(OSError):
                os.unlink(self._root / f"{record.id}.{suffix}")

    def record(self, id: str) -> MountRecord | None:
        """The record as it is now, with its true state; None once it is gone."""
        return self._read(self._root / f"{id}.json", mountpoint.table())

    def records(self) -> list[MountRecord]:
        """All records of this machine with their true states, oldest first."""
        try:
            paths = sorted(self._root.glob("*.json"))
        except OSError as error:
            raise from_os_error(error, f"reading {self._root}") from None
        mounted = mountpoint.table() if paths else []
        found = [record for path in paths if (record := self._read(path, mounted)) is not None]
        return sorted((record for record in found if record.process.host == os.uname().nodename), key=lambda r: r.started_at)

    def _read(self, path: Path, mounted: list[mountpoint.Mounted]) -> MountRecord | None:
        """The record in a file; None for one that is gone or was never whole."""
        try:
            record = decode(path.read_bytes(), MountRecord)
        except (OSError, ValueError):
            return None
        if record.state not in ("mounted", "committing"):
            return record
        if not record.process.lives():
            return msgspec.structs.replace(record, state="dead")
        there = any(mount.path == record.mountpoint and mount.device == record.device for mount in mounted)
        if record.state == "mounted" and mounted and not there:
            return msgspec.structs.replace(record, state="detached")
        return record

    def _forget_old(self) -> None:
        oldest = time.time() - _KEEP
        for path in self._root.iterdir():
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < oldest and self._is_over(path):
                    path.unlink()

    def _is_over(self, path: Path) -> bool:
        record = self._read(path.with_suffix(".json"), [])
        return record is None or record.state == "committed"


def encode(value: object) -> bytes:
    """``value`` as one line of JSON in ASCII, which also holds paths that are not UTF-8 (msgspec's own encoder refuses them)."""
    return json.dumps(msgspec.to_builtins(value)).encode()


def decode(data: bytes, kind: type[_T]) -> _T:
    """What :func:`encode` encoded; ValueError for anything else."""
    return msgspec.convert(json.loads(data), kind)


def log_size(path: str) -> int:
    """Bytes in a log; 0 for none ("")."""
    try:
        return os.path.getsize(path) if path else 0
    except OSError:
        return 0


def last_line(path: str, start: int) -> str:
    """The last line of a log after ``start``: the reason that libfuse, or the interpreter, gave for a failure."""
    if not path:
        return "its reason stands above"
    with contextlib.suppress(OSError), open(path, errors="replace") as file:
        file.seek(start)
        lines = [line.strip() for line in file if line.strip()]
        if lines:
            return lines[-1].removeprefix("fuse: ").removeprefix("fusermount: ")
    return "it gave no reason"


def this_process() -> Process:
    """The calling process."""
    return Process(os.getpid(), started_at(os.getpid()), _boot_id(), os.uname().nodename)


def started_at(pid: int) -> int:
    """When a process started, in clock ticks since boot; -1 if it is gone, 0 where the system does not tell.

    A killed one is gone when the last of its threads is: until then it holds its locks.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # the name before may hold anything
    except FileNotFoundError:
        return 0 if not os.path.isdir("/proc/self") and _answers(pid) else -1
    except OSError:
        return -1
    ended = fields[0] in (b"Z", b"X") and len(_entries(f"/proc/{pid}/task")) <= 1
    return -1 if ended else int(fields[19])


def _entries(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""
