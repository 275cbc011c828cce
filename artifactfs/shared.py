"""Entries of other versions of a store, by URI: ``artifactfs://entity/project/collection:alias/path``.

Adding such a reference adds what it names: a stored content is shared, not copied, and is there as long as any version has it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from artifactfs.errors import NotFoundError, UsageError
from artifactfs.model import Dir, Entry, Version, scheme_of
from artifactfs.names import ArtifactName, entry_path, parse
from artifactfs.store import Store

SCHEME = "artifactfs"

_URI = re.compile(r"artifactfs://([^/]+/[^/]+/[^/:]+(?::[^/]+)?)(?:/(.*))?", re.IGNORECASE | re.DOTALL)


class Shared(NamedTuple):
    """What a URI names. ``path`` "" is the version's root directory."""

    version: Version
    path: str
    entry: Entry


def is_shared(uri: str) -> bool:
    return scheme_of(uri) == SCHEME


def find_shared(store: Store, uri: str) -> Shared:
    """The entry that ``uri`` names in ``store``, as it is now. UsageError, NotFoundError."""
    name, path = _parse(uri)
    version = store.version(name)
    entry = store.tree.resolve(version.root, path) if path else version.root
    if entry is None:
        raise NotFoundError(f"{version.qualified_name} has no path {path!r}")
    return Shared(version, path, entry)


def top_entries(store: Store, uri: str) -> dict[str, Entry]:
    """What ``uri`` adds to a folder by default: a directory's entries, else the entry itself, by name."""
    found = find_shared(store, uri)
    if isinstance(found.entry, Dir):
        return {entry.name: entry for entry in store.tree.entries(found.entry)}
    return {found.path.rpartition("/")[2]: found.entry}


def _parse(uri: str) -> tuple[ArtifactName, str]:
    match = _URI.fullmatch(uri)
    if not match:
        raise UsageError(f"reference {uri[:200]!r} is not of the form artifactfs://ENTITY/PROJECT/COLLECTION:ALIAS/PATH")
    path = (match[2] or "").strip("/")
    return parse(match[1]), entry_path(path) if path else ""
