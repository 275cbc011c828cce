"""Commands that show and change what belongs together: links, runs, lineage, and the settings of an entity."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import click
import msgspec

from artifactfs import lineage, names
from artifactfs.cli import arguments, output
from artifactfs.cli.catalog import describe_version, version_document
from artifactfs.cli.output import Column
from artifactfs.cli.session import Session, command, pass_session
from artifactfs.errors import NotFoundError, UsageError
from artifactfs.links import link_target, parse_name
from artifactfs.model import Run, Version
from artifactfs.store import Store
from artifactfs.store.urls import open_store

# --- links ---------------------------------------------------------------------------------------


@command("link")
@click.argument("name")
@click.argument("target")
@click.option("--alias", "aliases", multiple=True, metavar="A", help="Give this alias in the portfolio. Repeatable.")
@pass_session
def link_command(session: Session, name: str, target: str, aliases: tuple[str, ...]) -> None:
    """Link the version NAME into the portfolio TARGET, [[ENTITY/]PROJECT/]COLLECTION, which is made if it is not there.

    wandb-registry-REGISTRY/COLLECTION is in the registry of the entity's organization. The link is a version of the portfolio,
    with aliases of its own there, and can be mounted like any other.
    """
    for alias in aliases:
        if alias != names.LATEST:
            names.check_new_alias(alias)
    store = open_store(session.settings.store)
    version = store.version(_name(session, name))
    made = store.link(version, link_target(store, target, version), aliases)
    session.result(describe_version(store, made), f"{made.qualified_name} -> {made.source.qualified_name}")


@command("unlink")
@click.argument("name")
@pass_session
def unlink_command(session: Session, name: str) -> None:
    """Take the link NAME out of its portfolio, with its aliases there. What it leads to stays."""
    parsed = _name(session, name)
    if not parsed.alias:
        raise UsageError(f"say which link of {parsed.path} to remove, as in {parsed.path}:v0")
    gone = open_store(session.settings.store).unlink(parsed)
    session.result(version_document(gone, []), f"unlinked {gone.qualified_name} from {gone.source.qualified_name}")


def _name(session: Session, text: str) -> names.ArtifactName:
    """As the session has it, with registries in the organization of the default entity."""
    return parse_name(open_store(session.settings.store), text, session.settings.entity, session.settings.project)


# --- runs ----------------------------------------------------------------------------------------


@command("runs")
@click.argument("prefix", metavar="ENTITY/PROJECT", default="")
@pass_session
def runs_command(session: Session, prefix: str) -> None:
    """List the runs of a project; without one, of the default entity and project."""
    entity, project = _project(session, prefix)
    session.rows(
        map(_run_document, open_store(session.settings.store).runs(entity, project)),
        [
            Column("RUN", lambda row: row["id"]),
            Column("NAME", lambda row: row["name"]),
            Column("JOB TYPE", lambda row: row["job_type"]),
            Column("CREATED", lambda row: output.moment(row["created_at"])),
            Column("USED", lambda row: str(len(row["used"])), right=True),
            Column("LOGGED", lambda row: str(len(row["logged"])), right=True),
        ],
    )


def _project(session: Session, prefix: str) -> tuple[str, str]:
    """Entity and project from ``[entity/]project`` and the defaults."""
    parts = names.parse_prefix(prefix)
    if len(parts) > 2:
        raise UsageError(f"{prefix!r} names a collection; runs belong to a project: entity/project")
    entity = parts[0] if len(parts) == 2 else session.settings.entity
    project = parts[-1] if parts else session.settings.project
    if not entity or not project:
        raise UsageError("say which project: entity/project (or set ARTIFACTFS_ENTITY and ARTIFACTFS_PROJECT)")
    return names.check_entity(entity), names.check_project(project)


def _run_document(run: Run) -> dict[str, Any]:
    return msgspec.to_builtins(run)  # type: ignore[no-any-return]


# --- lineage -------------------------------------------------------------------------------------

_FORMS: dict[str, Callable[[lineage.Graph], Iterator[str]]] = {
    "text": lineage.text_tree,
    "dot": lineage.dot,
    "svg": lineage.svg,
}


@command("lineage")
@click.argument("name")
@click.option("--depth", type=click.IntRange(1), default=6, metavar="N", help="Steps to go in each direction; a run is one.")
@click.option(
    "--format", "form", type=click.Choice(list(_FORMS)), default="text", help="A tree; Graphviz' language; or a picture."
)
@pass_session
def lineage_command(session: Session, name: str, depth: int, form: str) -> None:
    """Show what the version NAME came from and what came of it: runs that logged and used it, their other versions, links.

    --json has the graph: nodes and edges.
    """
    store = open_store(session.settings.store)
    version = store.version(_name(session, name))
    graph = lineage.trace(store, version, depth)
    document = {
        "name": version.origin.qualified_name,
        "base": None if version.base is None else f"v{version.base}",
        "logged_by": _logged_by(store, version),
        "used_by": list(map(_run_document, store.used_by(version))),
        **graph.document(),
    }
    session.result(document, _FORMS[form](graph))


def _logged_by(store: Store, version: Version) -> dict[str, Any] | None:
    with contextlib.suppress(NotFoundError, ValueError):
        entity, project, id = version.run.split("/")
        return _run_document(store.run(entity, project, id))
    return None


# --- entities ------------------------------------------------------------------------------------


@command("entity")
@click.argument("name")
@click.option("--ttl", metavar="30d|none", help="The time to live of versions that inherit it; none: they never expire.")
@click.option("--organization", metavar="ENTITY", help="The entity that holds its registries; itself, if not set.")
@pass_session
def entity_command(session: Session, name: str, ttl: str | None, organization: str | None) -> None:
    """Show or change what is set for the entity NAME in the store."""
    store = open_store(session.settings.store)
    names.check_entity(name)
    changes: dict[str, Any] = {}
    if ttl is not None:
        changes["default_ttl"] = None if ttl == "none" else arguments.ttl(ttl)
    if organization is not None:
        changes["organization"] = "" if organization == name else names.check_entity(organization)
    found = store.entity_settings(name)
    if changes:
        found = store.update_entity(name, lambda it: msgspec.structs.replace(it, **changes))
    document = {"entity": name, "default_ttl": found.default_ttl, "organization": found.organization or name}
    shown = {"entity": name, "default ttl": output.duration(found.default_ttl), "organization": found.organization or name}
    session.result(document, output.fields(shown))
