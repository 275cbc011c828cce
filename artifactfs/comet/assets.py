"""Assets: what an artifact has at a logical path, and how a version keeps what its entries cannot hold.

A stored asset is a file of the version, a remote one a reference. Metadata of assets is in a file of the version,
``.comet/assets.json``: ``{"version": 1, "assets": {"<logical path>": {…}}}``, only for assets that have any. So it is versioned,
copied, checked and collected like all else, and a mount shows it.

What was found out about a synced object is in its reference (ETag, version id, size); :func:`remote_metadata` tells it in
Comet's words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import msgspec

from artifactfs.errors import IntegrityError, UsageError
from artifactfs.model import Ref, scheme_of
from artifactfs.names import check_metadata, entry_path
from artifactfs.references.source import PINS, VERSION

FOLDER = ".comet"
SIDECAR = f"{FOLDER}/assets.json"
MAX_SIDECAR = 256 << 20
"""Bytes of all assets' metadata at most: it is read whole."""
ASSET_TYPE = "asset"
"""Comet's default; other types are deprecated there."""
SYNCED_SCHEMES = ("s3", "gs")

SYNCED = "synced"
ERROR = "error_message"


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


class _Sidecar(msgspec.Struct):
    version: int
    assets: dict[str, dict[str, Any]]


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


def is_synced(ref: Ref) -> bool:
    """Whether ``ref`` is an object of a bucket that was looked at when it was added."""
    return scheme_of(ref.uri) in SYNCED_SCHEMES and ref.size >= 0 and any(ref.extra.get(pin) for pin in PINS)


def remote_metadata(ref: Ref) -> dict[str, Any]:
    """What Comet's metadata says of a synced object; empty for a plain reference."""
    if not is_synced(ref):
        return {}
    scheme = scheme_of(ref.uri)
    found: dict[str, Any] = {SYNCED: True, "checksum": ref.digest, "file_size": ref.size, f"{scheme}_path": ref.uri}
    if version := ref.extra.get(VERSION):
        found["version_id"] = version
    if scheme == "s3":
        found["s3_platform"] = "aws"
    return found


def shown_metadata(own: Mapping[str, Any] | None, ref: Ref | None) -> dict[str, Any] | None:
    """An asset's metadata as users see it: its own, and what is known of a synced object; None if there is neither."""
    known = remote_metadata(ref) if ref is not None else {}
    return {**own, **known} if own is not None else known or None


def own_metadata(shown: Mapping[str, Any] | None, ref: Ref | None) -> dict[str, Any] | None:
    """What of it must be kept, as the reference does not tell it; None for nothing."""
    known = remote_metadata(ref) if ref is not None else {}
    own = {key: value for key, value in (shown or {}).items() if key not in known}
    return own if own or (shown is not None and not known) else None


def encode_sidecar(assets: Mapping[str, dict[str, Any]]) -> bytes:
    """The file for the metadata of assets by logical path. UsageError where there is too much of it."""
    data = msgspec.json.format(msgspec.json.encode(_Sidecar(1, dict(sorted(assets.items())))), indent=1) + b"\n"
    if len(data) > MAX_SIDECAR:
        raise UsageError(f"the metadata of all assets takes {len(data)} bytes; at most {MAX_SIDECAR} can be stored: use a file")
    return data


def decode_sidecar(data: bytes, where: str) -> dict[str, dict[str, Any]]:
    """The metadata by logical path. IntegrityError, naming ``where``, for what this package cannot have written."""
    try:
        sidecar = msgspec.json.decode(data, type=_Sidecar)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise IntegrityError(f"{where}/{SIDECAR} cannot be read: {error}") from None
    if sidecar.version != 1:
        raise IntegrityError(f"{where}/{SIDECAR} has version {sidecar.version}; this artifactfs reads 1: upgrade artifactfs")
    return sidecar.assets
