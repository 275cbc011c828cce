"""How Comet says things of assets, and where a version keeps what users say of them.

Metadata of assets is in a file of the version, ``.comet/assets.json``: ``{"version": 1, "assets": {"<logical path>": {…}}}``,
only for assets that have any. In stores of our own it is stored as such, so it is versioned, copied, checked and collected like
all else, and a mount shows it; in a store on a Comet server it is made of the assets' own metadata and taken apart into them.

What was found out about a synced object is in its reference (ETag, version id, size); :func:`remote_metadata` tells it in
Comet's words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from artifactfs.errors import IntegrityError, UsageError
from artifactfs.model import Ref, scheme_of
from artifactfs.references.source import PINS, VERSION

FOLDER = ".comet"
SIDECAR = f"{FOLDER}/assets.json"
MAX_SIDECAR = 256 << 20
"""Bytes of all assets' metadata at most: it is read whole."""
SYNCED_SCHEMES = ("s3", "gs")

SYNCED = "synced"
ERROR = "error_message"


class _Sidecar(msgspec.Struct):
    version: int
    assets: dict[str, dict[str, Any]]


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
