"""Edits of a version, pushed as what they change of what was last seen: no edit of anybody else is lost.

Description, TTL and each metadata key are compared three ways: mine, the store's of now, and what I had seen. What I did not
change stays as it is; what only I changed is set; what both changed, differently, is a ConflictError. Tags are a set: my
additions and removals are applied to what is there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import msgspec

from artifactfs.errors import ConflictError
from artifactfs.model import Version
from artifactfs.names import check_metadata

_GONE: Any = msgspec.UNSET


@dataclasses.dataclass(frozen=True, slots=True)
class Edits:
    """What the changeable fields of a version should be. ``metadata`` holds JSON values; ``ttl`` is seconds and whether it is
    inherited."""

    description: str | None
    metadata: dict[str, Any]
    ttl: tuple[int | None, bool]
    tags: list[str]

    def onto(self, current: Version, seen: Version) -> Version:
        """``current`` with what these change against ``seen``. ConflictError; InvalidNameError for too much metadata in all."""
        of = f"of {current.qualified_name}"
        ttl, inherited = merge_value(f"TTL {of}", self.ttl, _ttl(current), _ttl(seen))
        return msgspec.structs.replace(
            current,
            description=merge_value(f"description {of}", self.description, current.description, seen.description),
            metadata=check_metadata(_merge_metadata(of, self.metadata, current.metadata, seen.metadata)),
            ttl=ttl,
            ttl_inherited=inherited,
            tags=merge_tags(self.tags, current.tags, seen.tags),
        )


def _ttl(version: Version) -> tuple[int | None, bool]:
    return version.ttl, version.ttl_inherited


def merge_value(what: str, mine: Any, theirs: Any, seen: Any) -> Any:
    """The value that a store should have. ConflictError, naming ``what``, if both sides changed it."""
    if _equal(mine, seen) or _equal(mine, theirs):
        return theirs
    if not _equal(theirs, seen):
        raise ConflictError(f"the {what} was changed by somebody else since it was fetched; fetch it again and repeat the edit")
    return mine


def merge_tags(mine: Sequence[str], theirs: Sequence[str], seen: Sequence[str]) -> list[str]:
    """``theirs`` without what I removed, and with what I added at the end."""
    kept = [tag for tag in theirs if tag in mine or tag not in seen]
    return kept + [tag for tag in mine if tag not in seen and tag not in kept]


def _merge_metadata(of: str, mine: dict[str, Any], theirs: dict[str, Any], seen: dict[str, Any]) -> dict[str, Any]:
    merged = {}
    for key in dict.fromkeys([*theirs, *mine]):
        sides = (side.get(key, _GONE) for side in (mine, theirs, seen))
        value = merge_value(f"metadata {key!r} {of}", *sides)
        if value is not _GONE:
            merged[key] = value
    return merged


def _equal(one: Any, other: Any) -> bool:
    """Whether two JSON values are the same: unlike for Python, 1, 1.0 and true are three."""
    if one is _GONE or other is _GONE:
        return one is other
    return msgspec.json.encode(one, order="sorted") == msgspec.json.encode(other, order="sorted")
