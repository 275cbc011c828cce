"""What an asset of Comet is as an entry of a version, and what an entry is as an asset.

A stored asset is a :class:`~artifactfs.model.Remote` file, a remote one a reference. What Comet's client found out about a synced
object of a bucket is in the asset's metadata and becomes the reference's pins. What an asset cannot hold otherwise is in its
metadata under the one key :data:`OURS`:

- ``{"blake3": "<content id, hex>", "executable": true}`` of a stored file; the second only where it is so. The server tells no
  checksum of what it stores, so this is what contents that were logged from here are compared with.
- ``{"symlink": "<target>"}``: a symlink, whose target is also the asset's content.
- ``{"directory": true}``: an empty file in a directory that has nothing else, for the sake of that.
- ``{"extra": {…}, "digest": "…", "size": 5, "executable": true}`` of a reference: what pins it, unless Comet's own words say all.

All other metadata of an asset is its user's. That is shown, and set, as the file ``.comet/assets.json`` of a version, the same
that ``artifactfs.comet`` keeps in stores of our own.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from artifactfs.content import DIGEST_SIZE
from artifactfs.errors import IntegrityError, InvalidNameError
from artifactfs.model import BLAKE3, MD5, Ref, Remote, Symlink, remote_id, scheme_of
from artifactfs.names import entry_path
from artifactfs.references.source import ETAG, VERSION
from artifactfs.store.comet.client import FileRow
from artifactfs.store.comet.words import SYNCED, SYNCED_SCHEMES, remote_metadata

OURS = "artifactfs"
PLACEHOLDER = ".artifactfs-keep"
"""The name of the empty file that keeps an empty directory."""

_MAX_TARGET = 4095  # PATH_MAX less the NUL

log = logging.getLogger(__name__)


class Found(NamedTuple):
    """An asset: its path in the version; its entry, or for a directory that is empty None; its user's metadata."""

    path: str
    entry: Remote | Ref | Symlink | None
    metadata: dict[str, Any] | None


def found(rows: Iterable[FileRow], url: str, version: str) -> Iterator[Found]:
    """The assets of the version with that id of the server at ``url``. IntegrityError for one that cannot be in a directory."""
    for row in rows:
        shown = row.file_name[:200]
        try:
            path = entry_path(row.file_name)
        except InvalidNameError as error:
            raise IntegrityError(f"{url}: asset {row.asset_id[:64]} cannot be in a directory: {error}") from None
        told = _decoded(row.metadata, shown)
        marked = told is not None and OURS in told
        ours = told.pop(OURS, None) if told is not None else None
        ours = ours if isinstance(ours, dict) else {}
        if ours.get("directory") is True and path.rpartition("/")[2] == PLACEHOLDER and not row.file_size:
            yield Found(path.rpartition("/")[0], None, None)
            continue
        name = path.rpartition("/")[2]
        if row.is_remote:
            ref, metadata = _reference(name, row, told, ours)
            yield Found(path, ref, metadata)
        elif isinstance(ours.get("symlink"), str) and 0 < len(ours["symlink"].encode()) <= _MAX_TARGET:
            yield Found(path, Symlink(name, ours["symlink"]), told or None)
        else:
            yield Found(path, _stored(name, row, url, version, ours), told or None if marked else told)


def describe(content_id: bytes, executable: bool, metadata: Mapping[str, Any] | None) -> str:
    """The metadata of a stored file's asset."""
    own: dict[str, Any] = {"blake3": content_id.hex()}
    if executable:
        own["executable"] = True
    return encoded({**(metadata or {}), OURS: own})


def describe_symlink(target: str) -> str:
    """The metadata of the asset that is a symlink."""
    return encoded({OURS: {"symlink": target}})


def describe_directory() -> str:
    """The metadata of the asset that is an empty directory."""
    return encoded({OURS: {"directory": True}})


def describe_reference(ref: Ref, metadata: Mapping[str, Any] | None) -> str | None:
    """The metadata of a reference's asset: in Comet's words where these say it."""
    known = remote_metadata(ref)
    told: dict[str, Any] = {**(metadata or {}), **known}
    if _pins(told, ref.uri) != (ref.digest, ref.size, ref.extra) or ref.executable:
        own: dict[str, Any] = {"digest": ref.digest, "size": ref.size, "extra": ref.extra}
        if ref.executable:
            own["executable"] = True
        told[OURS] = own
    return encoded(told) if told else None


def encoded(metadata: Mapping[str, Any]) -> str:
    """Metadata as Comet's client writes it."""
    return msgspec.json.encode(metadata, order="sorted").decode()


def locator(version: str, asset: str) -> str:
    """What a :class:`Remote` of this store says of where it is."""
    return f"{version}/{asset}"


def _stored(name: str, row: FileRow, url: str, version: str, ours: Mapping[str, Any]) -> Remote:
    checksum = _content_id(ours.get("blake3"))
    size = row.file_size or 0
    if size < 0:
        raise IntegrityError(f"{url} says that {row.file_name[:200]!r} has {size} bytes")
    where = locator(version, row.asset_id)
    id = remote_id(url, BLAKE3, checksum, size, where)
    return Remote(name, size, ours.get("executable") is True, id, algorithm=BLAKE3, checksum=checksum, locator=where)


def _content_id(told: object) -> str:
    """The content id that was recorded, base64; "" for none that can be."""
    try:
        raw = bytes.fromhex(told) if isinstance(told, str) else b""
    except ValueError:
        return ""
    return base64.b64encode(raw).decode() if len(raw) == DIGEST_SIZE else ""


def _reference(
    name: str, row: FileRow, told: dict[str, Any] | None, ours: Mapping[str, Any]
) -> tuple[Ref, dict[str, Any] | None]:
    """The reference, and what of the metadata it does not tell."""
    uri = row.link or ""
    digest, size, extra = _pins(told or {}, uri)
    if isinstance(ours.get("digest"), str) and isinstance(ours.get("size"), int) and isinstance(ours.get("extra"), dict):
        given = {str(key): value for key, value in ours["extra"].items() if isinstance(value, (str, int))}
        digest, size, extra = ours["digest"], max(int(ours["size"]), -1), given
    ref = Ref(name, uri, digest, size, ours.get("executable") is True, extra, algorithm=MD5)
    known = remote_metadata(ref)
    rest = {key: value for key, value in (told or {}).items() if known.get(key) != value}
    return ref, rest or (None if known or ours or told is None else {})


def _pins(told: Mapping[str, Any], uri: str) -> tuple[str, int, dict[str, str | int]]:
    """(digest, size, what pins it) as Comet's metadata of a synced object says; of any other the URI alone."""
    size = told.get("file_size")
    plain: tuple[str, int, dict[str, str | int]] = (uri, -1, {})
    if told.get(SYNCED) is not True or not isinstance(size, int) or size < 0 or scheme_of(uri) not in SYNCED_SCHEMES:
        return plain
    extra: dict[str, str | int] = {}
    checksum, version = told.get("checksum"), told.get("version_id")
    bare = checksum.strip('"') if isinstance(checksum, str) else ""
    if bare and scheme_of(uri) == "s3":  # of gs it is a hash of the content and no ETag
        extra[ETAG] = bare
    if isinstance(version, (str, int)) and version not in ("", "null"):
        generation = scheme_of(uri) == "gs" and str(version).isdecimal()
        extra[VERSION] = int(version) if generation else str(version)
    return (bare or uri, size, extra) if extra else plain


def _decoded(metadata: str | dict[str, Any] | None, where: str) -> dict[str, Any] | None:
    if metadata is None or isinstance(metadata, dict):
        return dict(metadata) if metadata is not None else None
    try:
        told = msgspec.json.decode(metadata)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        told = None
    if not isinstance(told, dict):
        log.warning("the metadata of asset %r cannot be read; it is passed over", where)
        return None
    return told
