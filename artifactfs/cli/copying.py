"""The command that copies between stores, native ones and servers."""

from __future__ import annotations

import contextlib

import click

from artifactfs import copying
from artifactfs.cache import BlockCache
from artifactfs.cli import output
from artifactfs.cli.catalog import describe_version
from artifactfs.cli.progress import Counted, progress
from artifactfs.cli.session import Session, command, pass_session
from artifactfs.store.urls import open_store


@command("copy")
@click.argument("name")
@click.option("--to", "target", required=True, metavar="URL", help="The store to copy into: a path or URL, as for --store.")
@click.option(
    "--new-digests",
    is_flag=True,
    help="Copy W&B versions whose digest does not follow from their files, as of those logged in parts, under one that does.",
)
@pass_session
def copy_command(session: Session, name: str, target: str, new_digests: bool) -> None:
    """Copy the version NAME, or without an alias all versions of a collection, into another store; print their names there.

    Each store may be a directory, a bucket, a W&B server or a Comet server. Digests stay the same as far as the other store can
    compute them, and so do aliases, description, metadata, tags, links and lineage. A version keeps its number if that is
    higher than all others of its collection there, else it gets the next; servers give their own. Contents are checked on their
    way; what an older version there has is not sent. What the other store cannot hold is named in one line for each version. A
    copy that was interrupted goes on where it was when it is started again.
    """
    parsed = session.name(name)
    cache = BlockCache(session.settings.cache_dir, session.settings.cache_size)
    with contextlib.closing(cache), progress(session, "copying") as report:
        source = open_store(session.settings.store, cache)
        into = open_store(session.located(target), cache)
        count = Counted(report)
        notes = session.settings.state_dir / "arrived"
        copied = copying.copy(source, into, parsed, count, cache=cache, notes=notes, warn=session.warn, new_digests=new_digests)
        documents = [{**describe_version(into, version), "created": created} for version, created in copied]
    made = sum(result.created for result in copied)
    session.note(
        f"{output.count(made, 'version')} made, {output.size(count.last.stored)} sent; {len(copied) - made} there before"
    )
    session.result(documents, [document["name"] for document in documents])
