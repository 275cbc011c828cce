"""The command that copies between stores."""

from __future__ import annotations

import click

from artifactfs import copying
from artifactfs.cli import output
from artifactfs.cli.catalog import describe_version
from artifactfs.cli.progress import Counted, progress
from artifactfs.cli.session import Session, command, pass_session
from artifactfs.store.native import native_store
from artifactfs.store.urls import open_store


@command("copy")
@click.argument("name")
@click.option("--to", "target", required=True, metavar="URL", help="The store to copy into: a path or URL, as for --store.")
@pass_session
def copy_command(session: Session, name: str, target: str) -> None:
    """Copy the version NAME, or without an alias all versions of a collection, into another store; print their names there.

    Digests stay the same, and so do aliases, description, metadata and tags. A version keeps its number if that is higher than
    all others of its collection there, else it gets the next. Contents are checked on their way; what the newest version there
    has is not sent. A copy that was interrupted goes on where it was when it is started again.
    """
    parsed = session.name(name)
    source = native_store(open_store(session.settings.store), "copied from")
    into = native_store(open_store(session.located(target)), "copied into")
    with progress(session, "copying") as report:
        count = Counted(report)
        copied = copying.copy(source, into, parsed, count)
    made = sum(result.created for result in copied)
    session.note(
        f"{output.count(made, 'version')} made, {output.size(count.last.stored)} sent; {len(copied) - made} there before"
    )
    documents = [{**describe_version(into, version), "created": created} for version, created in copied]
    session.result(documents, [document["name"] for document in documents])
