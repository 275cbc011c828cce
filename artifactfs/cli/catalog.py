"""Commands that show and change what the store knows: names, versions, aliases, tags, runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click
import msgspec

from artifactfs import names
from artifactfs.cli import arguments, output
from artifactfs.cli.output import Column
from artifactfs.cli.session import Session, command, pass_session
from artifactfs.errors import NotFoundError, UsageError
from artifactfs.model import Collection, Dir, Entry, File, LinkedVersion, Symlink, Version
from artifactfs.names import LATEST, ArtifactName
from artifactfs.store import Store
from artifactfs.store.urls import open_store

_NO_CHANGE = "say what to change: --description, --metadata or --ttl"


# --- showing -------------------------------------------------------------------------------------


def version_document(version: Version, aliases: list[str]) -> dict[str, Any]:
    """A version as ``--json`` shows it everywhere."""
    return {
        "entity": version.entity,
        "project": version.project,
        "collection": version.collection,
        "version": version.name,
        "semver": version.semver or None,
        "name": version.qualified_name,
        "aliases": aliases,
        "type": version.type,
        "digest": version.digest,
        "digest_algorithm": version.algorithm,
        "size": version.size,
        "file_count": version.file_count,
        "state": version.state,
        "tags": version.tags,
        "metadata": version.metadata,
        "description": version.description,
        "created_at": version.created_at,
        "updated_at": version.updated_at,
        "ttl": version.ttl,
        "ttl_inherited": version.ttl_inherited,
        "source": version.origin.qualified_name if isinstance(version, LinkedVersion) else None,
        "base": None if version.base is None else f"v{version.base}",
        "run": version.run or None,
    }


def aliases_of(collection: Collection, version: Version) -> list[str]:
    """The aliases of a version, sorted."""
    return sorted(alias for alias, number in collection.aliases.items() if number == version.number)


def describe_version(store: Store, version: Version) -> dict[str, Any]:
    """:func:`version_document` with the aliases as they are now."""
    name = ArtifactName(version.entity, version.project, version.collection)
    return version_document(version, aliases_of(store.collection(name), version))


@command("info")
@click.argument("name")
@pass_session
def info_command(session: Session, name: str) -> None:
    """Show all about the version NAME."""
    store = open_store(session.settings.store)
    session.result(*_info(describe_version(store, store.version(session.name(name)))))


def _info(document: dict[str, Any]) -> tuple[dict[str, Any], Iterator[str]]:
    """The document and its lines."""
    shown = {
        "name": document["name"],
        "type": document["type"],
        "aliases": ", ".join(document["aliases"]) or "none",
        "tags": ", ".join(document["tags"]) or "none",
        "digest": f"{document['digest']} ({document['digest_algorithm']})",
        "size": f"{output.size(document['size'])} in {output.count(document['file_count'], 'file')}",
        "created": f"{output.moment(document['created_at'])} UTC",
        "ttl": "inherited" if document["ttl_inherited"] else output.duration(document["ttl"]),
        **({"source": document["source"]} if document["source"] else {}),
        "base": document["base"] or "none",
        "run": document["run"] or "none",
        "description": document["description"] or "none",
        "metadata": msgspec.json.encode(document["metadata"]).decode() if document["metadata"] else "none",
    }
    return document, output.fields(shown)


@command("versions")
@click.argument("name")
@pass_session
def versions_command(session: Session, name: str) -> None:
    """List the versions of the collection NAME, oldest first."""
    store = open_store(session.settings.store)
    parsed = session.name(name)
    if parsed.alias:
        raise UsageError(f"versions lists a whole collection; write {parsed.path} without :{parsed.alias}")
    collection = store.collection(parsed)
    rows = (version_document(version, aliases_of(collection, version)) for version in store.versions(parsed))
    session.rows(
        rows,
        [
            Column("VERSION", lambda row: row["version"]),
            Column("CREATED", lambda row: output.moment(row["created_at"])),
            Column("FILES", lambda row: f"{row['file_count']:,}", right=True),
            Column("SIZE", lambda row: output.size(row["size"]), right=True),
            Column("ALIASES", lambda row: ", ".join(row["aliases"])),
            Column("TAGS", lambda row: ", ".join(row["tags"])),
        ],
    )


@command("diff")
@click.argument("old")
@click.argument("new")
@pass_session
def diff_command(session: Session, old: str, new: str) -> None:
    """List the paths in which version NEW differs from version OLD: A added, M modified, D deleted."""
    store = open_store(session.settings.store)
    before, after = (store.version(session.name(text)) for text in (old, new))
    rows = (_difference(*found) for found in store.tree.diff(before.root, after.root))
    session.rows(
        rows,
        [
            Column("", lambda row: {"added": "A", "modified": "M", "deleted": "D"}[row["change"]]),
            Column("", lambda row: row["path"] + ("/" if "directory" in (row["kind"], row["old_kind"]) else "")),
            Column("", lambda row: _sizes(row["old_size"], row["size"])),
        ],
    )


def _difference(path: str, old: Entry | None, new: Entry | None) -> dict[str, Any]:
    before, after = (_entry_document(path, entry) if entry is not None else {} for entry in (old, new))
    return {
        "path": path,
        "change": "added" if old is None else "deleted" if new is None else "modified",
        **{key: after.get(key) for key in ("kind", "size", "digest")},
        **{f"old_{key}": before.get(key) for key in ("kind", "size", "digest")},
    }


def _sizes(old: int | None, new: int | None) -> str:
    return " -> ".join(output.size(size) for size in (old, new) if size is not None)


# --- listing -------------------------------------------------------------------------------------


@command("ls")
@click.argument("name", default="")
@click.argument("path", default="")
@pass_session
def ls_command(session: Session, name: str, path: str) -> None:
    """List entities, the projects of an entity, the collections of a project, or the files of a version at PATH.

    NAME with three parts or a colon is a version (no alias means latest). With fewer parts it is an entity or a project; if there
    is none of that name, it is a version in the default entity and project.
    """
    store = open_store(session.settings.store)
    found = None if path or ":" in name else _level(store, names.parse_prefix(name))
    if found is not None:
        _list_level(session, found)
        return
    if not path and ":" not in name and not _completed(session, name):
        raise NotFoundError(f"there is nothing below {name.strip('/')!r} in {store.url}; artifactfs ls lists what there is")
    version = store.version(session.name(name.strip("/")))
    session.rows(_entries(store, version, path), _ENTRY_COLUMNS)


def _level(store: Store, parts: tuple[str, ...]) -> list[dict[str, Any]] | None:
    """What is below a prefix; None if it names a version, or nothing."""
    if not parts:
        return [{"kind": "entity", "name": name} for name in store.entities()]
    if len(parts) == 1:
        return [{"kind": "project", "name": f"{parts[0]}/{name}"} for name in store.projects(parts[0])] or None
    if len(parts) == 2:
        return [_collection_document(collection) for collection in store.collections(*parts)] or None
    return None


def _completed(session: Session, name: str) -> bool:
    """Whether a name without an alias is a whole one with the default entity and project."""
    defaults = (session.settings.entity, session.settings.project)
    parts = len(names.parse_prefix(name))
    return all(defaults[: 3 - parts])


def _collection_document(collection: Collection) -> dict[str, Any]:
    return {
        "kind": "portfolio" if collection.is_portfolio else "collection",
        "name": collection.path,
        "type": collection.type,
        "latest": f"v{collection.aliases[LATEST]}" if LATEST in collection.aliases else None,
        "aliases": {alias: f"v{number}" for alias, number in sorted(collection.aliases.items())},
        "tags": collection.tags,
        "description": collection.description,
        "created_at": collection.created_at,
        "updated_at": collection.updated_at,
    }


def _list_level(session: Session, rows: list[dict[str, Any]]) -> None:
    columns = [Column("NAME", lambda row: row["name"])]
    if rows and rows[0]["kind"] in ("collection", "portfolio"):
        columns += [
            Column("TYPE", lambda row: row["type"]),
            Column("LATEST", lambda row: row["latest"] or ""),
            Column("UPDATED", lambda row: output.moment(row["updated_at"])),
        ]
    session.rows(rows, columns)


_ENTRY_COLUMNS = [
    Column("KIND", lambda row: row["kind"] + ("*" if row.get("executable") else "")),
    Column("SIZE", lambda row: "" if row.get("size") is None else output.size(row["size"]), right=True),
    Column("PATH", lambda row: _shown_path(row)),
]


def _entries(store: Store, version: Version, path: str) -> Iterator[dict[str, Any]]:
    """The entries of the directory at ``path``, or the one entry that is no directory."""
    clean = names.entry_path(path) if path.strip("/").removeprefix(".") else ""
    entry: Entry | None = store.tree.resolve(version.root, clean) if clean else version.root
    if entry is None:
        raise NotFoundError(
            f"{version.qualified_name} has no path {path!r}; list what it has: artifactfs ls {version.qualified_name}"
        )
    if not isinstance(entry, Dir):
        return iter([_entry_document(clean, entry)])
    return (_entry_document(f"{clean}/{item.name}" if clean else item.name, item) for item in store.tree.entries(entry))


def _entry_document(path: str, entry: Entry) -> dict[str, Any]:
    if isinstance(entry, Dir):
        return {"path": path, "kind": "directory", "size": entry.size, "files": entry.files, "digest": entry.digest.hex()}
    if isinstance(entry, Symlink):
        return {"path": path, "kind": "symlink", "size": len(entry.target.encode()), "target": entry.target}
    stored = {
        "path": path,
        "size": None if entry.size < 0 else entry.size,
        "digest": entry.digest,
        "digest_algorithm": entry.algorithm,
    }
    if isinstance(entry, File):
        return {**stored, "kind": "file", "executable": entry.executable}
    return {**stored, "kind": "reference", "executable": entry.executable, "ref": entry.uri}


def _shown_path(row: Mapping[str, Any]) -> str:
    if row["kind"] == "directory":
        return f"{row['path']}/"
    led = row.get("target") or row.get("ref")
    return f"{row['path']} -> {led}" if led else str(row["path"])


# --- changing ------------------------------------------------------------------------------------

_action = click.argument("action", type=click.Choice(["add", "remove"]))


@command("alias")
@click.argument("name")
@_action
@click.argument("aliases", nargs=-1, required=True)
@pass_session
def alias_command(session: Session, name: str, action: str, aliases: tuple[str, ...]) -> None:
    """Add or remove aliases of the version NAME. An alias that another version has moves to this one."""
    store = open_store(session.settings.store)
    parsed = session.name(name)
    for alias in aliases:
        names.check_new_alias(alias)
    if action == "remove" and LATEST in aliases:
        raise UsageError("alias latest cannot be removed: it moves to the newest version at every commit")
    version = store.version(parsed)

    def change(collection: Collection) -> Collection:
        kept = dict(collection.aliases)
        for alias in aliases:
            if action == "add":
                kept[alias] = version.number
            elif kept.pop(alias, None) != version.number:
                raise NotFoundError(f"{version.qualified_name} has no alias {alias!r}{_holder(collection, alias)}")
        return msgspec.structs.replace(collection, aliases=kept)

    collection = store.update_collection(parsed, change)
    held = aliases_of(collection, version)
    session.result(version_document(version, held), f"{version.qualified_name}: {', '.join(held) or 'no aliases'}")


def _holder(collection: Collection, alias: str) -> str:
    return f"; v{collection.aliases[alias]} has it" if alias in collection.aliases else ""


@command("tag")
@click.argument("name")
@_action
@click.argument("tags", nargs=-1, required=True)
@pass_session
def tag_command(session: Session, name: str, action: str, tags: tuple[str, ...]) -> None:
    """Add or remove tags of the version NAME."""
    store = open_store(session.settings.store)
    given = names.check_tags(tags)

    def change(version: Version) -> Version:
        missing = [tag for tag in given if tag not in version.tags]
        if action == "add":
            return msgspec.structs.replace(version, tags=[*version.tags, *missing])
        if missing:
            raise NotFoundError(f"{version.qualified_name} has no tag {missing[0]!r}")
        return msgspec.structs.replace(version, tags=[tag for tag in version.tags if tag not in given])

    version = store.update_version(session.name(name), change)
    session.result(describe_version(store, version), f"{version.qualified_name}: {', '.join(version.tags) or 'no tags'}")


@command("describe")
@click.argument("name")
@click.option("--description", metavar="TEXT", help='The new description; "" for none.')
@click.option("--metadata", "metadata_text", metavar="JSON|@FILE", help="The new metadata, in place of the old.")
@click.option("--ttl", metavar="30d|none|inherit", help="Expire so long after creation; none: never.")
@pass_session
def describe_command(session: Session, name: str, description: str | None, metadata_text: str | None, ttl: str | None) -> None:
    """Change the description, metadata or time to live of the version NAME."""
    changes: dict[str, Any] = {}
    if description is not None:
        changes["description"] = description or None
    if metadata_text is not None:
        changes["metadata"] = arguments.metadata(metadata_text)
    if ttl is not None:
        changes["ttl"] = None if ttl in ("none", "inherit") else arguments.ttl(ttl)
        changes["ttl_inherited"] = ttl == "inherit"
    if not changes:
        raise UsageError(_NO_CHANGE)
    store = open_store(session.settings.store)
    parsed = session.name(name)
    if changes.get("ttl") is not None and store.in_registry(store.version(parsed)):
        raise UsageError(f"{parsed} is linked to a registry, where nothing expires: a TTL cannot be set")
    version = store.update_version(parsed, lambda it: msgspec.structs.replace(it, **changes))
    session.result(*_info(describe_version(store, version)))


@command("delete")
@click.argument("name")
@click.option("--delete-aliases", is_flag=True, help="Delete it even if it has aliases besides latest, and them too.")
@pass_session
def delete_command(session: Session, name: str, delete_aliases: bool) -> None:
    """Delete the version NAME, which must say which (:v3 or an alias). Its contents go when gc runs."""
    parsed = session.name(name)
    if not parsed.alias:
        raise UsageError(f"say which version of {parsed.path} to delete, as in {parsed.path}:v0")
    store = open_store(session.settings.store)
    version = store.delete_version(parsed, delete_aliases)
    done = "unlinked" if isinstance(version, LinkedVersion) else "deleted"
    session.result(version_document(version, []), f"{done} {version.qualified_name}")
