"""Commands that look after the cache, the store and the machine: cache, gc, fsck, doctor."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from artifactfs import doctor, maintenance
from artifactfs.cache import LIST, BlockCache
from artifactfs.cli import arguments, output
from artifactfs.cli.output import Column
from artifactfs.cli.progress import progress
from artifactfs.cli.session import Group, Session, command, pass_session
from artifactfs.errors import ArtifactFSError, IntegrityError
from artifactfs.publish import Progress
from artifactfs.settings import parse_size
from artifactfs.store.native import native_store
from artifactfs.store.urls import open_store


def _cache(session: Session) -> BlockCache:
    return BlockCache(session.settings.cache_dir, session.settings.cache_size)


@click.group("cache", cls=Group)
def cache_command() -> None:
    """The cache of outside bytes, shared by all mounts and processes of this user."""


@command("info")
@pass_session
def cache_info(session: Session) -> None:
    """Show where the cache is and how full."""
    info = _cache(session).info()
    document = {**dataclasses.asdict(info), "root": str(info.root)}
    shown = {
        "directory": str(info.root),
        "used": f"{output.size(info.used)} of at most {output.size(info.limit)}",
        "contents": f"{info.contents:,} in {output.count(info.blocks, 'block')}",
        "disk": f"{output.size(info.disk_free)} free of {output.size(info.disk_total)}",
    }
    session.result(document, output.fields({**shown, "problem": info.problem} if info.problem else shown))


@command("prune")
@click.option("--to", "target", default="0", metavar="SIZE", help="Keep this much, as in 2GiB; what was used last stays.")
@pass_session
def cache_prune(session: Session, target: str) -> None:
    """Empty the cache, or make it smaller. Mounts go on, and fetch again what they need."""
    freed = _cache(session).prune(parse_size(target, "--to"))
    session.result({"freed": freed}, f"freed {output.size(freed)}")


@command("verify")
@pass_session
def cache_verify(session: Session) -> None:
    """Read everything in the cache and remove what is damaged; it is fetched again when it is needed. Fails if there was any."""
    found = 0
    rows = []
    for problem in _cache(session).verify():
        found += 1
        block = "list" if problem.block == LIST else problem.block
        rows.append({"key": problem.key, "block": block, "reason": problem.reason})
    session.rows(
        rows,
        [
            Column("CONTENT", lambda row: row["key"]),
            Column("BLOCK", lambda row: str(row["block"]), right=True),
            Column("REASON", lambda row: row["reason"]),
        ],
    )
    if found:
        raise IntegrityError(f"{output.count(found, 'block')} in the cache were damaged and are removed")
    session.note("everything in the cache is right")


for _subcommand in (cache_info, cache_prune, cache_verify):
    cache_command.add_command(_subcommand)


@command("gc")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option("--grace", metavar="24h", default="24h", help="Spare what is younger: no commit may take longer than this.")
@pass_session
def gc_command(session: Session, dry_run: bool, grace: str) -> None:
    """Expire versions whose time to live is over, and remove contents that no version refers to any more.

    Runs beside commits and mounts and loses nothing of theirs, as long as no commit takes longer than the grace period.
    """
    seconds = 0 if grace in ("0", "0s") else arguments.ttl(grace) or 0
    store = native_store(open_store(session.settings.store), "collected")
    done = maintenance.gc(store, dry_run=dry_run, grace=seconds)
    removed = f"{output.count(done.removed, 'object')} ({output.size(done.bytes)})"
    lines = [f"{'would expire' if dry_run else 'expired'} {name}" for name in done.expired]
    lines += [f"{'would give up' if dry_run else 'gave up'} the parts of {name}" for name in done.abandoned]
    lines.append(f"{'would remove' if dry_run else 'removed'} {removed}; {done.kept:,} in use, {done.young:,} too young to judge")
    session.result({**dataclasses.asdict(done), "dry_run": dry_run}, lines)


@command("fsck")
@pass_session
def fsck_command(session: Session) -> None:
    """Check the catalog, every page and every byte of every version in the store. Fails with exit code 6 if anything is wrong."""
    store = native_store(open_store(session.settings.store), "checked with fsck; `artifactfs verify NAME` reads a version")
    checked = maintenance.Checked()
    with progress(session, "checking") as report:

        def count(done: maintenance.Checked) -> None:
            nonlocal checked
            checked = done
            if report is not None:
                report(Progress(done.files, done.bytes))

        problems = list(maintenance.fsck(store, count))
    rows = [dataclasses.asdict(problem) for problem in problems]
    session.rows(
        rows,
        [
            Column("WHERE", lambda row: row["where"]),
            Column("PATH", lambda row: row["path"]),
            Column("PROBLEM", lambda row: row["problem"]),
        ],
    )
    if problems:
        raise IntegrityError(f"{store.url} has {output.count(len(problems), 'problem')}")
    session.note(
        f"{store.url} is sound: {output.count(checked.versions, 'version')}, {output.count(checked.files, 'content')}, "
        f"{output.size(checked.bytes)} read"
    )


@command("doctor")
@pass_session
def doctor_command(session: Session) -> None:
    """Check what mounting and storing need, and say how to mend what is missing. Fails if anything is."""
    checks = doctor.examine(session.settings)
    rows: list[dict[str, Any]] = [dataclasses.asdict(check) for check in checks]
    if session.json:
        session.rows(rows, [])
    else:
        session.rows(rows, [Column("CHECK", lambda row: row["what"]), Column("", _verdict), Column("", lambda row: row["found"])])
        session.result(None, [f"{check.what}: {check.fix}" for check in checks if check.fix])
    failed = [check.what for check in checks if not check.ok]
    if failed:
        raise ArtifactFSError(f"{output.count(len(failed), 'check')} failed: {', '.join(failed)}")


def _verdict(row: Any) -> str:
    return "FAILED" if not row["ok"] else "note" if row["fix"] else "ok"
