"""The ONE way a version comes into being: contents, pages, version, collection, in this order.

SKELETON while the core is being written: the types below are settled, ``publish`` is being implemented.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from artifactfs.model import BLAKE3, Dir, File, Ref, Symlink, Version
from artifactfs.names import ArtifactName
from artifactfs.store import Store


@dataclasses.dataclass(frozen=True, slots=True)
class NewFile:
    """A local file to store. ``path`` is read once, while the commit runs; one that changes meanwhile fails the commit with a
    ConflictError that names it.

    ``base`` and ``changed``: where only some blocks differ from a stored file, ``changed`` are the numbers of the blocks that
    must be read from ``path``; all others are those of ``base`` (whose bytes need not be in ``path``). ``size`` is then the
    new size, and blocks beyond ``base`` are always read.
    """

    path: str
    executable: bool
    base: File | None = None
    changed: frozenset[int] | None = None


class Folder(Protocol):
    """A directory to publish: what is in ``base`` stays, but for the changes."""

    base: Dir | None

    def changes(self) -> Iterator[tuple[str, Change]]:
        """(name, change), in ascending order of the names' UTF-8 bytes, each name once."""


Change: TypeAlias = "File | Dir | Symlink | Ref | NewFile | Folder | None"
"""An entry is taken as it is (its own name is ignored); NewFile is stored; Folder is built; None deletes the name."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """All that a new version is made from. ``commit`` is a unique id of this commit, kept over its retries.

    ``type`` "" means the collection's own. ``aliases`` are set besides ``latest``. ``expect_base``: fail with a ConflictError
    unless the collection's highest version is this number (-1: unless it has none); None: no condition. ``base`` is the number
    of the version it was derived from, for the record.
    """

    name: ArtifactName
    type: str
    folder: Folder
    commit: str
    algorithm: str = BLAKE3
    description: str | None = None
    metadata: Mapping[str, Any] | None = None
    tags: Sequence[str] = ()
    aliases: Sequence[str] = ()
    ttl: int | None = None
    run: str = ""
    base: int | None = None
    expect_base: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Published:
    """``created`` is False where nothing had changed against ``latest`` and ``version`` is that one."""

    version: Version
    created: bool


@dataclasses.dataclass(slots=True)
class Progress:
    """Counts so far, for a progress bar: files and bytes seen, bytes actually stored. ``total_*`` are 0 while unknown."""

    files: int = 0
    bytes: int = 0
    stored: int = 0


Report: TypeAlias = Callable[[Progress], None]


def publish(store: Store, draft: Draft, report: Report | None = None) -> Published:
    """Make ``draft`` a version of its collection (or find that nothing changed)."""
    raise AssertionError("being written")
