"""Commands about mounts and stages: mount, stage, unmount, commit, status, mounts."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

import click

from artifactfs import daemon, mountpoint, resume
from artifactfs.cli import arguments, mount_options
from artifactfs.cli.output import Column
from artifactfs.cli.progress import progress
from artifactfs.cli.session import Session, command, pass_session
from artifactfs.errors import NotFoundError, UsageError
from artifactfs.registry import MountRecord, MountRequest

_UNCHANGED = "nothing was changed, so there is no new version"

_mount_options = click.option(
    "-o", "options", multiple=True, metavar="OPT,...", help="Options as in fstab: allow_other, offline, store=URL, ..."
)
_foreground = click.option("--foreground", is_flag=True, help="Stay and log to standard error until it is unmounted.")


def record_document(record: MountRecord) -> dict[str, Any]:
    """A mount as ``--json`` shows it."""
    return {
        "mountpoint": record.mountpoint,
        "name": record.name,
        "kind": record.kind,
        "pid": record.pid,
        "state": record.state,
        "store": record.store,
        "started_at": record.started_at,
        "staging": record.staging or None,
        "log": record.log or None,
        "committed": record.committed or None,
        "error": record.error.get("message") if record.error else None,
    }


@command("mount")
@click.argument("name")
@click.argument("directory", metavar="DIR", type=click.Path())
@_foreground
@_mount_options
@click.option("--offline", is_flag=True, help="Never connect: what is not cached cannot be read.")
@click.option("--prefetch", metavar="none|auto|all", help="How much to fetch ahead of what is read (auto).")
@arguments.path_prefix
@pass_session
def mount_command(
    session: Session, /, name: str, directory: str, foreground: bool, options: tuple[str, ...], **rest: Any
) -> None:
    """Mount NAME read-only on the empty directory DIR; returns when it can be read.

    entity/project/name:alias mounts a version. Without an alias, and for entity/project, entity and /, it is a directory of
    versions, collections and so on that shows new ones as they appear. name:v7..v8 mounts the difference of two versions.
    """
    given = mount_options.parse(",".join(options))
    if rest["prefetch"]:
        given["prefetch"] = mount_options.check_prefetch(rest["prefetch"])
    if rest["offline"]:
        given["offline"] = True
    if rest["path_prefix"]:
        given["path_prefix"] = rest["path_prefix"]
    _start(session, daemon.request(session.settings, "mount", name, directory, **given), directory, foreground)


@command("stage")
@click.argument("words", metavar="NAME DIR", nargs=-1, required=True)
@click.option("--base", default="", metavar="ALIAS|none", help="The version to begin with (latest), or none.")
@arguments.draft_options
@click.option("--expect-base", is_flag=True, help="Let the commit fail if somebody else has committed meanwhile.")
@click.option("--no-eager", is_flag=True, help="Store nothing before the commit, not even files that are closed.")
@click.option("--resume", "again", is_flag=True, help="Go on with an uncommitted stage: stage --resume DIR [MOUNTPOINT].")
@_mount_options
@_foreground
@pass_session
def stage_command(
    session: Session, /, words: tuple[str, ...], foreground: bool, again: bool, options: tuple[str, ...], **rest: Any
) -> None:
    """Mount a writable directory on the empty directory DIR that becomes the next version of NAME when it is unmounted.

    It shows the version it begins with; only what is changed takes space. --resume: DIR is the mountpoint or the staging
    directory of a stage whose commit failed or whose process died; `mounts --all` lists them.
    """
    given = mount_options.parse_stage(",".join(options))
    given["eager"] = not rest["no_eager"]
    if again:
        request = _resume_request(session, words, given)
        words = ("", request.mountpoint)
    elif len(words) != 2:
        raise UsageError("stage takes a NAME and a DIR (see artifactfs stage --help)")
    else:
        _warn_of_left(session, words[1])
        request = daemon.request(
            session.settings,
            "stage",
            *words,
            base=rest["base"],
            type=rest["kind"],
            aliases=rest["aliases"],
            tags=rest["tags"],
            description=rest["description"],
            metadata=arguments.metadata(rest["metadata_text"]),
            expect_base=rest["expect_base"],
            **given,
        )
    _start(session, request, words[1], foreground)


def _warn_of_left(session: Session, directory: str) -> None:
    """Who stages anew where a stage died learns that what was in that one is not lost."""
    where = mountpoint.absolute(directory)
    for record in daemon.mounts(True, session.settings.state_dir):
        if record.mountpoint == where and record.state in ("dead", "failed", "orphan") and os.path.isdir(record.staging):
            how = f"artifactfs commit --resume {record.staging}"
            session.warn(f"an earlier stage on {where} was not committed; its changes are kept: {how}")


def _resume_request(session: Session, words: tuple[str, ...], given: dict[str, Any]) -> MountRequest:
    if len(words) > 2:
        raise UsageError("stage --resume takes a DIR and, if it should be mounted elsewhere, a MOUNTPOINT")
    stage = resume.find_stage(session.settings, words[0])
    where = words[1] if len(words) == 2 else stage.spec.mountpoint
    return daemon.request(session.settings, "stage", str(stage.spec.name), where, resume=str(stage.directory), **given)


def _start(session: Session, request: MountRequest, shown: str, foreground: bool) -> None:
    """Mount, and say so once it can be used; ``shown`` is the mountpoint as it was typed."""

    def ready(record: MountRecord) -> None:
        what = "staged" if record.kind == "stage" else "mounted"
        session.result(record_document(record), f"{record.name} {what} on {shown}")
        sys.stdout.flush()

    if not foreground:
        ready(daemon.start(request))
        return
    daemon.run(request, ready)
    record = daemon.find(request.mountpoint, request.state_dir)
    if record is not None and record.state == "committed" and not session.json:  # JSON was one document, at the start
        _ended(session, daemon.unmount(request.mountpoint, state_dir=request.state_dir))


@command("unmount")
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option("--discard", is_flag=True, help="Give up what was changed in a stage, also in one that is left uncommitted.")
@click.option("--lazy", is_flag=True, help="Do not wait for open files: a stage commits when the last is closed.")
@pass_session
def unmount_command(session: Session, directory: str, discard: bool, lazy: bool) -> None:
    """Unmount DIR. A stage is committed first, and the name of its new version printed."""
    with progress(session, "committing") as report:
        result = daemon.unmount(directory, discard=discard, lazy=lazy, report=report, state_dir=session.settings.state_dir)
    _ended(session, result)


def _ended(session: Session, result: daemon.UnmountResult) -> None:
    """Say how a mount ended or what came of a stage."""
    record = result.record
    document = {
        **record_document(record),
        "committed": result.committed or None,
        "created": result.created,
        "discarded": result.discarded,
        "warning": record.warning or None,
        "detached": result.detached,
    }
    if record.warning:
        session.warn(record.warning)
    if record.kind == "stage":
        session.note(_outcome(result))
    elif result.detached:
        session.note(f"{record.mountpoint} is detached; it ends when its open files are closed")
    session.result(document, [result.committed] if result.committed else [])


def _outcome(result: daemon.UnmountResult) -> str:
    if result.detached:
        return f"{result.record.mountpoint} is detached; its changes are committed when its open files are closed"
    if result.discarded:
        return "the changes are discarded"
    if result.created:
        return "committed"
    return _UNCHANGED


@command("commit")
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option("--resume", "again", is_flag=True, help="Commit a stage that is not mounted any more: DIR as in stage --resume.")
@click.option("--no-expect-base", "anyway", is_flag=True, help="With --resume: commit also over what somebody else committed.")
@pass_session
def commit_command(session: Session, directory: str, again: bool, anyway: bool) -> None:
    """Commit the stage mounted on DIR, which stays mounted, and print the name of the new version."""
    if anyway and not again:
        raise UsageError("--no-expect-base is for commit --resume; a stage that is mounted keeps what it was begun with")
    with progress(session, "committing") as report:
        if again:
            left = resume.find_stage(session.settings, directory)
            finished = resume.finish(session.settings, left, report, False if anyway else None)
        else:
            result = daemon.commit(directory, report, state_dir=session.settings.state_dir)
            finished = resume.Finished(result.record.mountpoint, result.committed, result.created, result.record.warning)
    if finished.warning:
        session.warn(finished.warning)
    document = {
        "mountpoint": finished.mountpoint,
        "committed": finished.committed or None,
        "created": finished.created,
        "warning": finished.warning or None,
    }
    session.note("committed" if finished.created else _UNCHANGED)
    session.result(document, [finished.committed] if finished.committed else [])


@command("status")
@click.argument("directory", metavar="DIR", type=click.Path())
@pass_session
def status_command(session: Session, directory: str) -> None:
    """List what the stage mounted on DIR adds (A), modifies (M) and deletes (D), and what a commit leaves out (I): sockets, FIFOs
    and device nodes; also of one that is left uncommitted."""
    rows = _changes(session, directory)
    session.rows(rows, [Column("", lambda row: str(row["change"])[0].upper()), Column("", lambda row: row["path"])])
    if not rows:
        session.note("nothing was changed")


def _changes(session: Session, directory: str) -> list[dict[str, Any]]:
    """What is staged in the mount on ``directory``, or in the stage that was mounted there and is left."""
    record = daemon.find(directory, session.settings.state_dir)
    if record is None or record.state in ("dead", "failed"):
        with contextlib.suppress(NotFoundError):
            return resume.changes(session.settings, resume.find_stage(session.settings, directory))
    return daemon.status(directory, state_dir=session.settings.state_dir)


@command("mounts")
@click.option("--all", "every", is_flag=True, help="Also stages that are not mounted but were not committed either.")
@pass_session
def mounts_command(session: Session, every: bool) -> None:
    """List the mounts and stages of this user. Those that died or failed to commit say what to do."""
    rows = [record_document(record) for record in daemon.mounts(every, session.settings.state_dir)]
    session.rows(
        rows,
        [
            Column("MOUNTPOINT", lambda row: row["mountpoint"] or ""),
            Column("NAME", lambda row: row["name"] or ""),
            Column("KIND", lambda row: row["kind"]),
            Column("STATE", lambda row: row["state"]),
            Column("PID", lambda row: str(row["pid"] or ""), right=True),
            Column("STAGING", lambda row: row["staging"] or ""),
        ],
    )
    for row in rows:
        if row["state"] in ("dead", "failed", "orphan") and not session.json:
            session.note(_advice(row))


def _advice(row: dict[str, Any]) -> str:
    if not row["staging"] or not os.path.isdir(row["staging"]):
        return f"{row['mountpoint']} is {row['state']}; artifactfs unmount {row['mountpoint']} cleans up"
    why = f" ({row['error']})" if row["error"] else ""
    return f"{row['staging']} is {row['state']}{why}; finish it: artifactfs commit --resume {row['staging']}"
