"""Manifests: a version's list of files, read as a stream, in bounded memory whatever its length.

A manifest is another's word: every path is checked where the tree is built (``store.kept``), everything else here.
``local_path``, which names a file of the machine that logged the version, is never looked at.
"""

from __future__ import annotations

import base64
import binascii
import tempfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple
from urllib.parse import quote

from artifactfs.errors import IntegrityError
from artifactfs.jsonstream import items, members, value
from artifactfs.model import MD5, XXH128, Entry, Ref, Remote, remote_id, scheme_of

ARTIFACT_SCHEME = "wandb-artifact"
_MAX_SIZE = 1 << 62
_SPOOL = 8 << 20
_PINS = ("etag", "versionID")
_CONTENTS = "contents"


class Locator(NamedTuple):
    """Where a stored file is: the version whose manifest lists it, the one that first stored its bytes, its path, its layout."""

    artifact: str
    birth: str
    path: str
    layout: str
    region: str

    def encode(self) -> str:
        """The text that an entry keeps."""
        return "\n".join((self.artifact, "" if self.birth == self.artifact else self.birth, self.layout, self.region, self.path))


def locator_of(entry: Remote) -> Locator:
    """The locator of an entry of a W&B server. IntegrityError."""
    parts = entry.locator.split("\n", 4)
    if len(parts) != 5:
        raise IntegrityError(f"{entry.name} is not of a W&B server")
    artifact, birth, layout, region, path = parts
    return Locator(artifact, birth or artifact, path, layout, region)


def new_file() -> IO[bytes]:
    """Where a manifest goes as it arrives: to disk (or, of a few megabytes, into memory), as it is read more than once."""
    return tempfile.SpooledTemporaryFile(_SPOOL)


def read(file: IO[bytes], url: str, artifact: str, where: str) -> Iterator[tuple[str, Entry]]:
    """The entries of a manifest, as the store at ``url`` keeps them. IntegrityError for what is no manifest, and for an entry
    that cannot be right; ``where`` names the version."""
    try:
        head = _head(file)
        if head.get("version") != 1:
            raise IntegrityError(f"the manifest of {where} has version {str(head.get('version'))[:20]!r}; this program reads 1")
        config = head.get("storagePolicyConfig")
        config = config if isinstance(config, dict) else {}
        layout, region = str(config.get("storageLayout") or "V1"), str(config.get("storageRegion") or "default")
        if layout not in ("V1", "V2") or "\n" in region:
            raise IntegrityError(f"the manifest of {where} has a storage layout that is not known: {layout[:20]!r}")
        found = False
        file.seek(0)
        for key, events in members(file):
            if key == _CONTENTS:
                found = True
                for path, item in items(events):
                    yield path, _entry(path, item, url, artifact, layout, region, where)
            else:
                value(events)
        if not found:
            raise IntegrityError(f"the manifest of {where} has no contents")
    except ValueError as error:
        raise IntegrityError(f"the manifest of {where} cannot be read: {str(error)[:120]!r}") from None


def _head(file: IO[bytes]) -> dict[str, Any]:
    """The members besides the contents, which mostly come first."""
    found: dict[str, Any] = {}
    file.seek(0)
    for key, events in members(file):
        if key == _CONTENTS:
            for _ in items(events):
                pass
        else:
            found[key] = value(events)
        if {"version", "storagePolicyConfig"} <= found.keys():
            break
    return found


def _entry(path: str, item: Any, url: str, artifact: str, layout: str, region: str, where: str) -> Entry:
    if not isinstance(item, dict):
        raise _wrong(where, path, "is no object")
    digest, size, uri, extra = item.get("digest"), item.get("size"), item.get("ref"), item.get("extra")
    birth = item.get("birthArtifactID")
    extra = extra if isinstance(extra, dict) else {}
    if not isinstance(digest, str) or len(digest) > 4096 or "\n" in digest:
        raise _wrong(where, path, "has no digest")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= _MAX_SIZE):
        raise _wrong(where, path, f"has a size that cannot be: {str(size)[:30]}")
    name = path.rpartition("/")[2]
    if uri is not None:
        if not isinstance(uri, str) or not scheme_of(uri) or any(char in uri for char in "\0\r\n"):
            raise _wrong(where, path, "is a reference to what is no URI")
        pins = {key: extra[key] for key in _PINS if isinstance(extra.get(key), (str, int)) and not isinstance(extra[key], bool)}
        # W&B writes 0 where no size is known; asking once more for that of an empty object costs little.
        return Ref(name, uri, digest, size or -1, extra=pins)
    algorithm = XXH128 if str(extra.get("alg", "")).upper() == XXH128 else MD5
    try:
        raw = base64.b64decode(digest, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != 16 or base64.b64encode(raw).decode() != digest:
        raise _wrong(where, path, f"has a digest that is no {algorithm}")
    if size is None:
        raise _wrong(where, path, "has no size")
    if birth is not None and (not isinstance(birth, str) or "\n" in birth or len(birth) > 1024):
        raise _wrong(where, path, "has a birth artifact that cannot be")
    locator = Locator(artifact, birth or artifact, path, layout, region).encode()
    id = remote_id(url, algorithm, digest, size)
    return Remote(name, size, False, id, algorithm=algorithm, checksum=digest, locator=locator)


def _wrong(where: str, path: str, why: str) -> IntegrityError:
    return IntegrityError(f"the manifest of {where} lists {path[:200]!r}, which {why}; the version is refused")


def direct_urls(base: str, entity: str, project: str, collection: str, entry: Remote) -> list[str]:
    """The URLs of a stored file that need no look-up but the caller's key, best first."""
    place = locator_of(entry)
    digest = base64.b64decode(entry.checksum).hex()
    if place.layout == "V1":
        return [f"{base}/artifacts/{quote(entity, '')}/{digest}"]
    parts = [place.region, entity, project, collection, place.artifact, place.birth, digest]
    without = [*parts[:4], *parts[5:]]
    name = quote(place.path.rpartition("/")[2])
    return [f"{base}/artifactsV2/" + "/".join(quote(part, "") for part in given) + f"/{name}" for given in (parts, without)]
