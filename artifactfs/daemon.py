"""Mounts that live in the background: start one, find it, ask it, end it.

:func:`start` runs ``python -m artifactfs.daemon`` and returns when the mount answers; :func:`run` (``serving.py``) is what that
process, or ``--foreground``, does. Everybody else speaks to it through its record (``registry.py``) and its socket
(``control.py``). A daemon that was killed leaves a dead mount, which :func:`unmount`, or mounting there again, takes away.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

import artifactfs
from artifactfs import control, mountpoint, registry
from artifactfs.errors import ArtifactFSError, ConflictError, MountError, from_os_error
from artifactfs.publish import Progress, Report
from artifactfs.registry import MountRecord, MountRequest, Registry
from artifactfs.settings import Settings
from artifactfs.settings import load as load_settings
from artifactfs.staging.directory import StageDirectory, StageInfo, list_stages

__all__ = [
    "MountRecord",
    "MountRequest",
    "UnmountResult",
    "commit",
    "find",
    "mounts",
    "request",
    "run",
    "start",
    "status",
    "unmount",
]

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class UnmountResult:
    """How a mount ended. ``committed`` is the qualified name of the version that came of a stage, ``created`` whether it is new;
    "" where nothing had changed and there is no version, after ``discard``, and for a read-only mount. ``detached``: files are
    still open, and it ends (a stage commits) when the last is closed."""

    record: MountRecord
    committed: str = ""
    created: bool = False
    discarded: bool = False
    detached: bool = False


def request(settings: Settings, kind: registry.Kind, name: str, path: str | os.PathLike[str], **fields: Any) -> MountRequest:
    """A request with the directories and the store of ``settings``; ``store`` and the others may be given in ``fields``."""
    given = {
        "store": settings.store,
        "cache_dir": str(settings.cache_dir),
        "cache_size": settings.cache_size,
        "staging_dir": str(settings.staging_dir),
        "state_dir": str(settings.state_dir),
        "entity": settings.entity,
        "project": settings.project,
        **fields,
    }
    given["store"] = _absolute(given["store"])
    return MountRequest(kind=kind, name=name, mountpoint=os.path.abspath(path), **given)


def start(request: MountRequest) -> MountRecord:
    """Mount in a process of its own; returns when the mount answers. Raises that process's own reason if it cannot."""
    mounts = Registry(request.state_dir)
    mounts.prepare()
    mountpoint.check(request.mountpoint)
    mountpoint.check_device()
    id = mounts.new_id()
    answer = _spawn(request, id, mounts.log(id))
    if "error" in answer:
        raise control.unpack_error(answer["error"])
    record = msgspec.convert(answer["result"], MountRecord)
    _check_answers(record)
    _forget_ended(mounts, record)
    return record


def run(request: MountRequest, ready: Callable[[MountRecord], None], id: str = "", log_path: str = "") -> int:
    """As :func:`artifactfs.serving.run`: mount, answer and commit in this process, in its main thread."""
    # Only this needs libfuse, which may be missing, and most of the package: 50 ms that asking a mount does not pay.
    from artifactfs import serving

    return serving.run(request, ready, id, log_path)


def mounts(all: bool = False, state_dir: str | os.PathLike[str] | None = None) -> list[MountRecord]:
    """The mounts of this user that live, are dead, or failed to commit.

    With ``all`` also stages whose outcome nobody has asked for yet, and staging directories that no mount uses (``orphan``).
    """
    settings = load_settings()
    found = Registry(state_dir or settings.state_dir).records()
    if not all:
        return [record for record in found if record.state != "committed"]
    known = {record.staging for record in found}
    return found + [_orphan(info) for info in list_stages(settings.staging_dir) if str(info.directory) not in known]


def find(path: str | os.PathLike[str], state_dir: str | os.PathLike[str] | None = None) -> MountRecord | None:
    """The newest mount at ``path``, in whatever state; None if there was none."""
    where = mountpoint.absolute(os.fspath(path))
    records = [record for record in Registry(state_dir or load_settings().state_dir).records() if record.mountpoint == where]
    return max(records, key=lambda record: (record.state not in ("detached", "committed"), record.started_at), default=None)


def unmount(
    path: str | os.PathLike[str],
    *,
    discard: bool = False,
    keep: bool = False,
    lazy: bool = False,
    report: Report | None = None,
    state_dir: str | os.PathLike[str] | None = None,
) -> UnmountResult:
    """Unmount, and wait for the commit of a stage. ``discard`` gives its changes up; ``keep`` leaves them in
    the staging directory, to be resumed, and commits nothing; ``lazy`` does not wait for open files.

    With ``discard``, ``path`` may also be a stage that is not mounted any more, by its mountpoint or its staging directory.

    ConflictError if files are open (nothing has happened then); MountError if it is not mounted or its daemon died (the
    mountpoint is free afterwards, a stage's changes are kept and the error says where); and whatever made the commit fail.
    """
    state = state_dir or load_settings().state_dir
    where = mountpoint.absolute(os.fspath(path))
    record = find(where, state)
    if record is None:
        return (_discard_left(where) if discard else None) or _unmount_unknown(where, lazy)
    registry_ = Registry(state)
    if record.state in ("mounted", "detached", "committing"):
        try:
            question = {"op": "unmount", "discard": discard, "keep": keep, "lazy": lazy}
            answer = control.ask(registry_.socket(record.id), question, _forward(report))
            return _result(registry_, answer)
        except control.NoDaemonError:
            record = _after(registry_, record)
    return _collect(registry_, record, discard)


def commit(path: str | os.PathLike[str], report: Report | None = None, **where: Any) -> UnmountResult:
    """Commit the stage at ``path``, which stays mounted."""
    answer = control.ask(_socket(path, **where), {"op": "commit"}, _forward(report))
    return UnmountResult(msgspec.convert(answer["record"], MountRecord), answer["committed"], answer["created"])


def status(path: str | os.PathLike[str], **where: Any) -> list[dict[str, Any]]:
    """What was added, modified and deleted in the stage at ``path``, and what a commit would leave out: the fields of
    ``staging.StageChange``."""
    changes: list[dict[str, Any]] = control.ask(_socket(path, **where), {"op": "status"})
    return changes


def main() -> int:
    """The daemon's own process: the request on standard input, the answer on standard output, the log on standard error."""
    asked = registry.decode(sys.stdin.buffer.read(), _Launch)
    if os.fork():
        os._exit(0)  # the caller waits for this process only, so no zombie is left of the one that lives on
    faulthandler.enable()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("artifactfs").setLevel(logging.INFO)
    answered = False

    def answer(value: dict[str, Any]) -> None:
        nonlocal answered
        answered = True
        os.write(1, registry.encode(value))
        _close_standard()

    try:
        return run(asked.request, lambda record: answer({"result": record}), asked.id, asked.log)
    except Exception as error:
        if not isinstance(error, ArtifactFSError):
            log.exception("the daemon failed")
        elif answered:
            log.error("%s", error)
        if not answered:
            answer({"error": control.pack_error(error)})
        return getattr(error, "exit_code", 1)


class _Launch(msgspec.Struct, frozen=True):
    """What :func:`start` tells the process it makes."""

    request: MountRequest
    id: str
    log: str


# Of the process that starts and asks


def _spawn(request: MountRequest, id: str, log_path: str) -> dict[str, Any]:
    """Run the daemon; what it says once it is mounted or has failed."""
    package = str(Path(artifactfs.__file__).parents[1])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    launch = registry.encode(_Launch(request, id, log_path))
    command = [sys.executable, "-P", "-m", "artifactfs.daemon"]
    try:
        with open(log_path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600)) as log_file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_file,
                cwd="/",
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
            )
    except OSError as error:
        raise from_os_error(error, f"starting {' '.join(command)}") from None
    with process:
        said, _ = process.communicate(launch)
    try:
        answer: dict[str, Any] = registry.decode(said, dict)
    except ValueError:
        raise MountError(
            f"the mount's daemon died before it answered: {registry.last_line(log_path, 0)}; {log_path} has more"
        ) from None
    return answer


def _check_answers(record: MountRecord) -> None:
    """The kernel itself says that the mount is there."""
    try:
        os.statvfs(record.mountpoint)
    except OSError as error:
        raise from_os_error(error, f"{record.name} was mounted on {record.mountpoint} but does not answer") from None


def _forget_ended(mounts: Registry, begun: MountRecord) -> None:
    """A mount that begins ends what could still be asked about earlier ones at its place, and of its staging directory."""
    for record in mounts.records():
        told = record.state == "committed" or (record.state == "dead" and record.kind == "mount")
        resumed = record.state in ("dead", "failed") and record.staging == begun.staging != ""
        if record.id != begun.id and (resumed or (told and record.mountpoint == begun.mountpoint)):
            mounts.remove(record)


def _socket(path: str | os.PathLike[str], state_dir: str | os.PathLike[str] | None = None) -> str:
    """The control socket of the live mount at ``path``."""
    state = state_dir or load_settings().state_dir
    record = find(path, state)
    if record is None:
        raise _unknown(mountpoint.absolute(os.fspath(path)))
    if record.kind == "stage" and record.state in ("dead", "failed"):
        raise MountError(
            f"{record.mountpoint} is not mounted any more: {_ENDS[record.state]}; its changes are kept: artifactfs commit "
            f"--resume {record.mountpoint}, or stage --resume to go on"
        )
    if record.state == "dead":
        raise MountError(f"the daemon of {record.mountpoint} has died; `artifactfs unmount {record.mountpoint}` cleans up")
    if record.state == "committed":
        raise MountError(
            f"{record.mountpoint} is not mounted any more: it was committed as {record.committed or 'no new version'}"
        )
    return Registry(state).socket(record.id)


_ENDS = {"dead": "its daemon died", "failed": "its commit failed"}


def _discard_left(where: str) -> UnmountResult | None:
    """Remove the stage that is not mounted and has this mountpoint or directory; None if there is none."""
    stages = [_orphan(info) for info in list_stages(load_settings().staging_dir) if info.state in ("orphan", "damaged")]
    found = [record for record in stages if where in (record.mountpoint, os.path.realpath(record.staging))]
    if len(found) > 1:
        directories = " or ".join(record.staging for record in found)
        raise ConflictError(f"{len(found)} stages that were mounted on {where} are left; say which one: {directories}")
    for record in found:
        _remove_stage(record)
        return UnmountResult(record, discarded=True)
    return None


def _remove_stage(record: MountRecord) -> None:
    """Remove a staging directory and all that is in it. ConflictError if another process uses it."""
    directory = StageDirectory(Path(record.staging))
    directory.retire()
    directory.close()
    directory.remove()


def _unmount_unknown(where: str, lazy: bool) -> UnmountResult:
    """Unmount what is of artifactfs and has no record here: it was lost, or it is another user's."""
    mount = mountpoint.at(where)
    if mount is None or mount.type != mountpoint.FILE_SYSTEM:
        raise _unknown(where)
    mountpoint.unmount(where, lazy or mountpoint.is_dead(where))
    nobody = registry.Process(0, -1, "", os.uname().nodename)
    name = mount.source.removeprefix(mountpoint.SOURCE)
    record = MountRecord(id="", kind="mount", name=name, mountpoint=where, store="", process=nobody, started_at="")
    return UnmountResult(record)


def _unknown(where: str) -> MountError:
    return MountError(f"{where} is not a mountpoint of artifactfs; `artifactfs mounts` lists them")


def _forward(report: Report | None) -> Callable[[Any], None] | None:
    return None if report is None else lambda progress: report(Progress(**progress))


def _result(registry_: Registry, answer: dict[str, Any]) -> UnmountResult:
    record = msgspec.convert(answer["record"], MountRecord)
    detached = bool(answer.get("detached"))
    if not detached:
        registry_.remove(record)
    return UnmountResult(record, record.committed, record.created, bool(answer.get("discarded")), detached)


def _after(registry_: Registry, record: MountRecord) -> MountRecord:
    """The record of a mount whose daemon was just ending, once it has ended."""
    while record.process.lives():
        time.sleep(0.02)
    return registry_.record(record.id) or msgspec.structs.replace(record, state="committed")


def _collect(registry_: Registry, record: MountRecord, discard: bool) -> UnmountResult:
    """Take away what a mount that has ended by itself left behind, and tell its outcome."""
    mount = mountpoint.at(record.mountpoint)
    if record.state == "dead" and mount is not None and mount.device == record.device:
        mountpoint.unmount(record.mountpoint, lazy=True)
    registry_.remove(record)
    if record.kind == "mount" or record.state == "committed":
        return UnmountResult(record, record.committed, record.created)
    if discard:
        _remove_stage(record)
        return UnmountResult(record, discarded=True)
    if record.error:
        raise control.unpack_error(record.error)
    raise MountError(
        f"the daemon of {record.mountpoint} had died, so nothing was committed; the mountpoint is free, and the changes are kept "
        f"in {record.staging}: artifactfs commit --resume {record.staging}"
    )


def _orphan(info: StageInfo) -> MountRecord:
    """A staging directory as a record, in which there is no process."""
    spec = info.spec
    return MountRecord(
        id="",
        kind="stage",
        name=str(spec.name.at("" if spec.base is None else f"v{spec.base}")) if spec else "",
        mountpoint=spec.mountpoint if spec else "",
        store=spec.store if spec else "",
        process=registry.Process(info.pid or 0, -1, "", os.uname().nodename),
        state="orphan",
        started_at=spec.created_at if spec else "",
        staging=str(info.directory),
    )


def _absolute(store: str) -> str:
    """A store's URL or path, so that it means the same in another directory."""
    return store if "://" in store or store.startswith("file:") else os.path.abspath(store)


def _close_standard() -> None:
    """Let go of the caller's pipes."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)


if __name__ == "__main__":
    sys.exit(main())
