"""What a version is made from, and what came of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from artifactfs.model import BLAKE3, File, Version
from artifactfs.names import ArtifactName
from artifactfs.store.upload import Folder


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """All that a new version is made from. ``commit`` is a unique id of this commit, kept over its retries.

    ``type`` "" means the collection's own, and for a new one :data:`DEFAULT_TYPE`. ``aliases`` are set besides ``latest``.
    ``expect_base``: fail with a ConflictError unless the collection's newest version is this number (-1: unless it has none);
    None: no condition. ``base`` is the number of the version it was derived from, for the record. ``retry``: an earlier attempt
    at this commit may have made its version. ``stored`` are contents, by id, that were stored ahead of this commit and are there.
    ``expect_root``: fail with an IntegrityError unless the root directory has this digest; ``expect_digest``: unless the version
    has this one. ``number``: the least that the version
    may have. ``since``: with ``retry``, what an earlier attempt made has a higher number. ``ttl`` None with ``inherit_ttl`` means
    the entity's, whatever that is at the time. ``notes`` is a directory of this machine to note in what arrived at a remote
    store, for the next attempt.

    ``semver``: the semantic version to give it, :data:`~artifactfs.store.semvers.NEXT` for the next one, "" for none unless the
    collection's versions have them. ``always``: make a version also where nothing had changed. ``reserved_type``: the type may be
    one that W&B's clients use by themselves.
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
    inherit_ttl: bool = True
    run: str = ""
    base: int | None = None
    expect_base: int | None = None
    retry: bool = False
    stored: Mapping[bytes, File] = dataclasses.field(default_factory=dict)
    expect_root: bytes = b""
    expect_digest: str = ""
    number: int = 0
    notes: Path | None = None
    semver: str = ""
    always: bool = False
    since: int = -1
    reserved_type: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Published:
    """``created`` is False where nothing had changed against ``latest`` and ``version`` is that one."""

    version: Version
    created: bool
