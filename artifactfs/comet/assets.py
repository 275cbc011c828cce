"""Assets: what an artifact has at a logical path, and how a version keeps what its entries cannot hold.

A stored asset is a file of the version, a remote one a reference; ``artifactfs/store/comet/words.py`` tells where their metadata
is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from artifactfs.errors import UsageError
from artifactfs.model import Ref
from artifactfs.names import check_metadata, entry_path
from artifactfs.store.comet.words import FOLDER, remote_metadata

ASSET_TYPE = "asset"
"""Comet's default; other types are deprecated there."""


@dataclasses.dataclass(frozen=True, slots=True, order=False)
class ArtifactAsset:
    """One asset of an artifact that is not logged yet, or of one that was downloaded. ``size`` is in bytes, 0 for a plain remote
    one; ``link`` is the URI of a remote one; ``local_path_or_data`` is what was added, or where it is now."""

    remote: bool
    logical_path: str
    size: int
    link: str | None = None
    metadata: dict[str, Any] | None = None
    asset_type: str | None = ASSET_TYPE
    local_path_or_data: Any = None
    id: str | None = dataclasses.field(default=None, compare=False)

    def __lt__(self, other: ArtifactAsset) -> bool:
        return self.logical_path < other.logical_path


def check_logical_path(path: str) -> str:
    """The path in its normal form. InvalidNameError for one that cannot be, UsageError for one that is kept for this package."""
    normal = entry_path(path)
    if normal == FOLDER or normal.startswith(f"{FOLDER}/"):
        raise UsageError(f"logical path {path!r} is reserved: {FOLDER} holds the metadata of assets; choose another one")
    return normal


def check_asset_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """``metadata`` as JSON values. UsageError (a ValueError) for anything but a dict or None."""
    if metadata is None:
        return None
    if not isinstance(metadata, Mapping):
        raise UsageError(f"metadata of an asset must be a dict, not {type(metadata).__name__}")
    plain: dict[str, Any] = check_metadata({"metadata": metadata})["metadata"]
    return plain


def shown_metadata(own: Mapping[str, Any] | None, ref: Ref | None) -> dict[str, Any] | None:
    """An asset's metadata as users see it: its own, and what is known of a synced object; None if there is neither."""
    known = remote_metadata(ref) if ref is not None else {}
    return {**own, **known} if own is not None else known or None


def own_metadata(shown: Mapping[str, Any] | None, ref: Ref | None) -> dict[str, Any] | None:
    """What of it must be kept, as the reference does not tell it; None for nothing."""
    known = remote_metadata(ref) if ref is not None else {}
    own = {key: value for key, value in (shown or {}).items() if key not in known}
    return own if own or (shown is not None and not known) else None
