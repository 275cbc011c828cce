"""``s3://``, ``gs://`` and Azure references: objects of a bucket, pinned by version id and ETag.

============================================================  =====================================================
``s3://bucket/key``, ``s3://bucket/key?versionId=X``          S3; the key is taken literally
``gs://bucket/key``, ``gs://bucket/key#GENERATION``           Google Cloud Storage; the same
``https://account.blob.core.windows.net/container/blob``      Azure, ``?versionId=X`` may follow; percent-encoded
``az://container/blob``                                       the same in the account that the environment names
============================================================  =====================================================

As in W&B the digest is the ETag without its quotes, ``extra`` has it as ``etag`` and the version id as ``versionID`` (for gs://
only that, an integer), and the URI that is kept names the object without its version. What is not an object is taken for the
prefix of some: all whose key starts with it, one entry each. Where some lie below ``key/`` and others beside it, nobody knows
which are meant, and that is an error. Below a prefix, empty objects of S3 and placeholders of directories are passed over as in
W&B. Credentials are the environment's, the service is where ``AWS_S3_ENDPOINT_URL`` or what boto3 heeds says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import re
import secrets
from collections.abc import Iterator
from urllib.parse import quote, unquote, urlsplit

import msgspec

from artifactfs.buckets import Bucket, NoBucketError, Pin, Stat, open_bucket
from artifactfs.errors import NotFoundError, NotPermittedError, SourceChangedError, UsageError
from artifactfs.model import Ref, scheme_of
from artifactfs.names import entry_path
from artifactfs.references.source import DEADLINE, ETAG, SEEN, VERSION, Expanded, source_key

log = logging.getLogger(__name__)

AZURE_HOST = ".blob.core.windows.net"

_SCHEMES = {"s3": "s3", "gs": "gs", "az": "az", "https": "az"}
_SUFFIX = {
    "s3": re.compile(r"\?versionId=([^&?]*)$"),
    "gs": re.compile(r"#([0-9]+)$"),
    "az": re.compile(r"\?versionId=([^&?]*)$"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """What a URI names. ``root`` is the bucket's URI, with a slash; ``key`` "" is all of it; ``version`` "" the current one."""

    scheme: str
    root: str
    bucket: str
    key: str
    version: str
    account: str = ""

    def uri(self, key: str) -> str:
        """The URI of an object, without its version."""
        return self.root + (quote(key) if self.root.startswith("https:") else key)

    def open(self, deadline: float = DEADLINE) -> Bucket:
        options = {"account": self.account} if self.account else {}
        endpoint = os.environ.get("AWS_S3_ENDPOINT_URL")  # W&B's; boto3 has names of its own, which come after it
        if self.scheme == "s3" and endpoint:
            options["endpoint_url"] = endpoint
        return open_bucket(self.scheme, self.bucket, options, deadline)


def is_bucket(uri: str) -> bool:
    """Whether the URI is one of this module's."""
    scheme = scheme_of(uri)
    if scheme == "https":
        try:
            return (urlsplit(uri).hostname or "").endswith(AZURE_HOST)
        except ValueError:
            return False
    return scheme in _SCHEMES


def expand(uri: str, name: str, checksum: bool, max_objects: int, keep_empty: bool = False) -> Iterator[Expanded]:
    """The entry of an object, or those of all objects of a prefix in the service's order, in bounded memory."""
    place = _parse(uri)
    if not checksum:
        path = name or entry_path(place.key.strip("/") or place.bucket)
        yield Expanded(path, Ref(path.rpartition("/")[2], uri, digest=uri, size=-1))
        return
    bucket = place.open()
    stat = _object(bucket, place)
    if stat is not None:
        yield _entry(place, stat, name or entry_path(place.key.rpartition("/")[2]))
        return
    kept = empty = 0
    for stat, path in _below(bucket, place):
        if _is_placeholder(bucket, place, stat, keep_empty):
            empty += place.scheme == "s3" and not stat.key.endswith("/")
            continue
        kept += 1
        if kept > max_objects:
            text = f"has more than {max_objects} objects; pass a larger max_objects, or reference a part of it"
            raise UsageError(f"{shown(uri)} {text}")
        yield _entry(place, stat, entry_path(f"{name}/{path}" if name else path))
    if empty:
        log.warning("%s: %d empty objects are passed over, as W&B does; store them as files if they matter", shown(uri), empty)
    if not kept:
        raise NotFoundError(f"{shown(uri)}: there is no object of that key, and none below it; check bucket and key")


def resolve(ref: Ref, deadline: float) -> Ref:
    """``ref`` pinned to what the bucket has now."""
    place = _parse(ref.uri)
    _check_key(ref.uri, place)
    stat = place.open(deadline).head(place.key, place.version)
    if 0 <= ref.size != stat.size:
        raise SourceChangedError(f"{shown(ref.uri)} is {stat.size} bytes long and was {ref.size} when it was added; add it again")
    extra = _extra(place, stat) or {SEEN: secrets.token_hex(16)}
    return msgspec.structs.replace(ref, size=stat.size, extra=extra)


def shown(uri: str) -> str:
    """``uri`` for messages: of an Azure one without user and query, which may hold a signature."""
    if scheme_of(uri) == "https":
        parts = urlsplit(uri)
        uri = f"https://{parts.hostname}{parts.path}"
    return "".join(char if char.isprintable() else "?" for char in uri)[:500]


class BucketSource:
    """An object whose every answer is of what was pinned."""

    def __init__(self, ref: Ref, deadline: float) -> None:
        place = _parse(ref.uri)
        _check_key(ref.uri, place)
        self.size = ref.size
        self.key = source_key(ref)
        self.where = shown(ref.uri)
        self._object = place.key
        self._bucket = place.open(deadline)
        etag = str(ref.extra.get(ETAG, "")).strip('"')
        version = str(ref.extra.get(VERSION, "")) or place.version
        self._pin = Pin(f'"{etag}"' if etag else "", version, ref.size)

    def fetch(self, offset: int, size: int) -> Iterator[bytes]:
        end = offset + size
        try:
            for piece in self._stream(offset, size):
                offset += len(piece)
                yield piece
        except SourceChangedError:
            if not self._find_older():
                raise
            yield from self._stream(offset, end - offset)

    def _stream(self, offset: int, size: int) -> Iterator[bytes]:
        try:
            yield from self._bucket.stream(self._object, offset, size, self._pin)
        except NoBucketError:
            raise
        except NotFoundError:
            raise SourceChangedError(f"{self.where} is no longer there; put it back, or add it again") from None

    def _find_older(self) -> bool:
        """Whether the bucket still has what was pinned as an older version (W&B looks there, too), which pins it from now on."""
        if self._pin.version or not self._pin.etag:
            return False
        with contextlib.suppress(NotFoundError, NotPermittedError):
            version = self._bucket.older(self._object, self._pin.etag)
            if version and version != "null":
                self._pin = dataclasses.replace(self._pin, version=version)
                return True
        return False


def _parse(uri: str) -> _Place:
    """What ``uri`` names. UsageError for one that names no bucket, or with what cannot be kept."""
    scheme = _SCHEMES[scheme_of(uri)]
    match = _SUFFIX[scheme].search(uri)
    version = match[1] if match else ""
    plain = uri[: match.start()] if match else uri
    if match and not version:
        raise UsageError(f"reference {shown(plain)!r} has an empty version id; leave ?versionId= out for the current version")
    if scheme_of(uri) == "https":
        return _azure(plain, version)
    bucket, _, key = plain.partition("://")[2].partition("/")
    if not bucket:
        raise UsageError(f"reference {shown(uri)!r} names no bucket; write {scheme}://BUCKET/KEY")
    return _Place(scheme, f"{scheme}://{bucket}/", bucket, key, version)


def _azure(uri: str, version: str) -> _Place:
    parts = urlsplit(uri)
    if parts.query or parts.username is not None or parts.fragment:
        text = "holds a query, a user name or a fragment, which everyone who reads the version would see"
        raise UsageError(f"reference {shown(uri)!r} {text}; give credentials by the environment")
    container, _, blob = unquote(parts.path.lstrip("/")).partition("/")
    if not container:
        raise UsageError(f"reference {shown(uri)!r} names no container; write https://ACCOUNT{AZURE_HOST}/CONTAINER/BLOB")
    host = parts.hostname or ""
    account = host.removesuffix(AZURE_HOST)
    return _Place("az", f"https://{host}/{container}/", container, blob, version, account)


def _check_key(uri: str, place: _Place) -> None:
    if not place.key:
        raise UsageError(f"reference {shown(uri)!r} is a whole bucket, which cannot be read as a file; add it with checksum")


def _object(bucket: Bucket, place: _Place) -> Stat | None:
    """The object that the URI names, or None if it can only be a prefix. NotFoundError for a version that is not there."""
    if not place.key or place.key.endswith("/"):
        if place.version:
            raise UsageError(f"{shown(place.uri(place.key))} is a prefix, which has no versions; leave the version id out")
        return None
    try:
        stat = bucket.head(place.key, place.version)
    except NoBucketError:
        raise
    except NotFoundError:
        if place.version:
            raise
        return None
    if not stat.size and not place.version and _has_below(bucket, place.key):
        return None  # the placeholder of a directory
    return stat


def _below(bucket: Bucket, place: _Place) -> Iterator[tuple[Stat, str]]:
    """The objects of a prefix, each with its path below it.

    A prefix that ends within a name (``s3://b/data/img_``) gives paths from the beginning of that name.
    """
    prefix = place.key
    if place.scheme == "az" and prefix and not prefix.endswith("/"):
        prefix += "/"
    parent = prefix.rpartition("/")[0]
    inside = beside = ""
    for stat in bucket.scan(prefix):
        rest = stat.key[len(prefix) :]
        if not rest:  # the placeholder of the prefix itself
            continue
        if not prefix or prefix.endswith("/") or rest.startswith("/"):
            inside, path = stat.key, rest.lstrip("/")
        else:
            beside, path = stat.key, stat.key[len(parent) :].lstrip("/")
        if inside and beside:
            what = shown(place.uri(place.key))
            raise UsageError(
                f"{what} is the beginning of {beside!r} as well as of {inside!r}; write {what}/ for what is below it"
            )
        if path:
            yield stat, path


def _is_placeholder(bucket: Bucket, place: _Place, stat: Stat, keep_empty: bool) -> bool:
    """Whether this object of a prefix is passed over: as W&B does it, with ``keep_empty`` only what stands for a directory."""
    if stat.key.endswith("/"):
        return True
    return not stat.size and ((place.scheme == "s3" and not keep_empty) or _has_below(bucket, stat.key))


def _has_below(bucket: Bucket, key: str) -> bool:
    """Whether there are objects below ``key/``, its own placeholder apart (which some listings give without the slash)."""
    return any(stat.key.rstrip("/") != key for stat in itertools.islice(bucket.scan(key + "/"), 2))


def _entry(place: _Place, stat: Stat, path: str) -> Expanded:
    uri = place.uri(stat.key)
    digest = stat.etag.removeprefix("W/").strip('"') or uri
    return Expanded(path, Ref(path.rpartition("/")[2], uri, digest, stat.size, extra=_extra(place, stat)))


def _extra(place: _Place, stat: Stat) -> dict[str, str | int]:
    version = stat.version if stat.version != "null" else ""
    if place.scheme == "gs" and version.isdecimal():
        return {VERSION: int(version)}
    extra: dict[str, str | int] = {}
    if stat.etag:
        extra[ETAG] = stat.etag.removeprefix("W/").strip('"')
    if version:
        extra[VERSION] = version
    return extra
