"""Commands that move bytes: log, get, checkout, verify, warm."""

from __future__ import annotations

import itertools
import os
import uuid
from typing import Any

import click

from artifactfs import download, warm
from artifactfs.cli import arguments, output
from artifactfs.cli.catalog import describe_version
from artifactfs.cli.output import Column
from artifactfs.cli.progress import Counted, progress
from artifactfs.cli.session import Session, command, pass_session
from artifactfs.content import check_algorithm
from artifactfs.errors import IntegrityError, UsageError
from artifactfs.folders import gather
from artifactfs.model import BLAKE3, Entry, Version
from artifactfs.publish import Draft, Folder, Progress, publish
from artifactfs.references import expand
from artifactfs.references.sorting import SortedEntries
from artifactfs.session import opened
from artifactfs.shared import is_shared, top_entries
from artifactfs.store.urls import open_store


@command("log")
@click.argument("name")
@click.argument("paths", metavar="PATH...", nargs=-1, type=click.Path())
@arguments.draft_options
@click.option("--digest", "algorithm", default=BLAKE3, metavar="ALG", help="blake3 (the default), md5 or xxh128.")
@click.option(
    "--reference", "references", multiple=True, metavar="URI", help="Add a URI (file, http, s3, gs, Azure, artifactfs)."
)
@click.option("--ttl", metavar="30d", help="Expire so long after creation.")
@click.option("--skip-special", is_flag=True, help="Pass over sockets, pipes and devices, with a warning for each.")
@pass_session
def log_command(session: Session, /, name: str, paths: tuple[str, ...], **options: Any) -> None:
    """Make a new version of NAME from each PATH and reference, and print its name.

    One directory gives its contents. A file, and each of several paths, lies under its own name. Symlinks, executable bits and
    empty directories are kept. Nothing changed against the newest version: that one is printed, and given aliases move to it.
    """
    if not paths and not options["references"]:
        raise UsageError("say what to log: a PATH or --reference")
    draft = _draft(session, name, paths, options)
    store = open_store(session.settings.store)
    with progress(session, "storing") as report:
        count = Counted(report)
        published = publish(store, draft, count)
    document = {**describe_version(store, published.version), "created": published.created}
    done = count.last
    counted = f"{output.count(done.files, 'file')} read, {output.size(done.bytes)}, of which {output.size(done.stored)} were new"
    session.note(counted if published.created else "nothing changed against the newest version")
    session.result(document, document["name"])


def _draft(session: Session, name: str, paths: tuple[str, ...], options: dict[str, Any]) -> Draft:
    parsed = session.name(name)
    if parsed.alias:
        raise UsageError(f"a new version gets its number by itself: write {parsed.path}, and --alias {parsed.alias} for an alias")
    algorithm = check_algorithm(options["algorithm"])
    metadata = arguments.metadata(options["metadata_text"])
    ttl = arguments.ttl(options["ttl"])
    _refuse_store(session, paths)
    return Draft(
        name=parsed,
        type=options["kind"],
        folder=_folder(session, paths, options, algorithm),
        commit=uuid.uuid4().hex,
        algorithm=algorithm,
        description=options["description"],
        metadata=metadata,
        tags=options["tags"],
        aliases=options["aliases"],
        ttl=ttl,
        notes=session.settings.state_dir / "arrived",
    )


def _folder(session: Session, paths: tuple[str, ...], options: dict[str, Any], algorithm: str) -> Folder:
    """What is to be logged; all references are looked up here."""
    shared: dict[str, Entry] = {}
    outside = []
    for uri in options["references"]:
        if not is_shared(uri):
            outside.append(uri)
            continue
        found = top_entries(open_store(session.settings.store), uri)
        if taken := next((name for name in found if name in shared), ""):
            raise UsageError(f"two references would both be {taken!r} in the version; log them apart")
        shared.update(found)
    expanded = itertools.chain.from_iterable(expand(uri, algorithm=algorithm) for uri in outside)
    references = SortedEntries(expanded, str(session.settings.staging_dir))
    skip = (lambda what: session.warn(f"{what}: passed over")) if options["skip_special"] else None
    return gather(paths, references, skip, shared)


def _refuse_store(session: Session, paths: tuple[str, ...]) -> None:
    """A directory that holds the store would grow while it is stored."""
    store = os.path.realpath(session.settings.store.removeprefix("file://"))
    for path in paths:
        real = os.path.realpath(path)
        if os.path.isdir(real) and (store + "/").startswith(real.rstrip("/") + "/"):
            raise UsageError(f"{path} holds the store itself ({store}); log a directory without it, or use another --store")


@command("get")
@click.argument("name")
@click.argument("directory", metavar="[DIR]", required=False, type=click.Path())
@arguments.path_prefix
@pass_session
def get_command(session: Session, name: str, directory: str | None, path_prefix: str) -> None:
    """Download the version NAME into DIR and print the directory (default: artifacts/COLLECTION:VERSION).

    Files that are already right are kept, others of those names replaced, and whatever else is in DIR left alone. Where the file
    system can (XFS, btrfs), large files share their space on disk with the store or the cache.
    """
    found = opened(session.settings)
    version = found.store.version(session.name(name))
    root = directory or os.path.join("artifacts", f"{version.collection}:{version.name}")
    with progress(session, "downloading") as report:
        done = download.get(found.store, found.reader, version, root, path_prefix, report)
    _downloaded(session, version, root, done)


@command("checkout")
@click.argument("name")
@click.argument("directory", metavar="DIR", type=click.Path())
@pass_session
def checkout_command(session: Session, name: str, directory: str) -> None:
    """Make DIR exactly the version NAME: as get, and whatever else is in DIR is REMOVED."""
    found = opened(session.settings)
    version = found.store.version(session.name(name))
    with progress(session, "checking out") as report:
        done = download.checkout(found.store, found.reader, version, directory, report)
    _downloaded(session, version, directory, done)


def _downloaded(session: Session, version: Version, root: str, done: Progress) -> None:
    document = {
        "name": version.qualified_name,
        "directory": os.path.abspath(root),
        "files": done.files,
        "size": done.bytes,
        "written": done.stored,
    }
    session.note(
        f"{output.count(done.files, 'file')}, {output.size(done.bytes)}, of which {output.size(done.stored)} were written"
    )
    session.result(document, root)


@command("verify")
@click.argument("name")
@click.argument("directory", metavar="[DIR]", required=False, type=click.Path())
@pass_session
def verify_command(session: Session, name: str, directory: str | None) -> None:
    """Check that DIR is exactly the version NAME; without DIR, that all its stored bytes are what they were.

    Lists every path that is not, and fails with exit code 6 if there is one.
    """
    found = opened(session.settings)
    version = found.store.version(session.name(name))
    with progress(session, "verifying") as report:
        if directory is None:
            problems = download.verify_stored(found.store, found.reader, version, report)
        else:
            problems = download.verify(found.store, found.reader, version, directory, report)
    rows = [{"path": problem.path, "kind": problem.kind, "message": problem.message} for problem in problems]
    session.rows(rows, [Column("PROBLEM", lambda row: row["kind"]), Column("PATH", lambda row: row["path"] or "."), _MESSAGE])
    what = directory or f"{version.qualified_name} as stored"
    if problems:
        raise IntegrityError(f"{what} differs from {version.qualified_name} in {output.count(len(problems), 'path')}")
    session.note(f"{what} is right: {output.count(version.file_count, 'file')}, {output.size(version.size)}")


_MESSAGE = Column("", lambda row: row["message"])


@command("warm")
@click.argument("name")
@arguments.path_prefix
@click.option("--check", "action", flag_value="check", help="List how much of each is in the cache; fetch nothing.")
@click.option("--evict", "action", flag_value="evict", help="Remove it from the cache.")
@pass_session
def warm_command(session: Session, name: str, path_prefix: str, action: str | None) -> None:
    """Fetch what the version NAME refers to into the cache, so that it can be read offline and fast.

    Contents of a local store and file: references need no cache and are passed over.
    """
    found = opened(session.settings)
    version = found.store.version(session.name(name))
    where = (found.store, found.reader, version, path_prefix)
    if action == "check":
        rows = ({"path": item.path, "size": item.size, "cached": item.cached} for item in warm.check(*where))
        session.rows(rows, _CACHED_COLUMNS)
        return
    if action == "evict":
        cache = found.reader.cache
        freed = warm.evict(found.store, cache, version, path_prefix) if cache is not None else 0
        session.result({"name": version.qualified_name, "freed": freed}, f"freed {output.size(freed)}")
        return
    with progress(session, "fetching") as report:
        count = Counted(report)
        failures = warm.warm(*where, count)
    for failure in failures:
        session.warn(f"{failure.path}: {failure.error}")
    if failures:
        raise failures[0].error
    done = count.last
    document = {"name": version.qualified_name, "files": done.files, "size": done.bytes, "fetched": done.stored}
    session.result(document, _warmed(version, done))


def _warmed(version: Version, done: Progress) -> str:
    if not done.files:
        return f"{version.qualified_name}: nothing to fetch; its contents are on this machine"
    return f"{version.qualified_name}: {output.count(done.files, 'file')} in the cache, {output.size(done.stored)} fetched"


_CACHED_COLUMNS = [
    Column("SIZE", lambda row: output.size(row["size"]), right=True),
    Column("CACHED", lambda row: output.size(row["cached"]), right=True),
    Column("PATH", lambda row: row["path"]),
]
