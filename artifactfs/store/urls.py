"""``open_store(url)``: the store a URL names.

A path or ``file:///path``; ``s3://bucket/prefix``, ``gs://bucket/prefix`` or ``az://container/prefix``, with options behind a
``?`` (``endpoint_url``, ``region``, ``profile``, ``sse``, ``sse_kms_key_id``; ``account``); ``wandb://host[:port]`` or
``comet://host[:port]``. No secret is ever part of a URL.
"""

from __future__ import annotations

import urllib.parse
from pathlib import Path

from artifactfs.cache import BlockCache
from artifactfs.errors import UsageError
from artifactfs.model import scheme_of
from artifactfs.objects import ObjectStore
from artifactfs.objects.local import LocalObjects
from artifactfs.store import Store
from artifactfs.store.native import NativeStore

BUCKETS = ("s3", "gs", "az")
SERVERS = ("wandb", "comet")


def open_store(url: str, cache: BlockCache | None = None, offline: bool = False) -> Store:
    """The store at ``url``, created at the first commit if it is not there. Of one that is not a local directory, pages and
    records are kept in ``cache``, and with ``offline`` come from there alone.

    StoreFormatError for another format or a newer version, UsageError for a URL that cannot be right.
    """
    if scheme_of(url) == "wandb":
        from artifactfs.store.wandb import open_wandb  # requests and ijson cost 0.2 s: only for those whose store is a server

        return open_wandb(url, cache, offline)
    if scheme_of(url) == "comet":
        from artifactfs.store.comet.store import open_comet  # requests costs 0.2 s, as above

        return open_comet(url, cache, offline)
    return NativeStore(open_objects(url), cache, offline)


def open_objects(url: str) -> ObjectStore:
    """The objects of the store at ``url``; no I/O. UsageError as above."""
    scheme = scheme_of(url)
    if scheme in BUCKETS:
        return _in_bucket(url)
    path = url
    if scheme == "file":
        parts = urllib.parse.urlsplit(url)
        path = urllib.parse.unquote(parts.path)
        if parts.netloc not in ("", "localhost") or not path.startswith("/"):
            raise UsageError(f"store {url!r} is not a local file URL; write file:///absolute/path")
    elif "://" in url:
        known, servers = (", ".join(f"{name}://" for name in names) for names in (BUCKETS, SERVERS))
        raise UsageError(
            f"store {_shown(url)!r} has the scheme {scheme!r}, which is not known; use a path, file:///path, {known}, {servers}"
        )
    if not path:
        raise UsageError("the store's path is empty; set ARTIFACTFS_STORE or --store to a path")
    if "\0" in path:
        raise UsageError(f"store {url!r} contains a NUL byte, which no path can")
    return LocalObjects(Path(path))


def _in_bucket(url: str) -> ObjectStore:
    from artifactfs.buckets import open_bucket  # its libraries cost 0.4 s: only for those whose store is in a bucket
    from artifactfs.objects.bucket import BucketObjects  # as above

    scheme, name, prefix, options = split_bucket_url(url)
    query = urllib.parse.urlencode(sorted(options.items()), safe=":/")
    shown = f"{scheme}://{name}/{urllib.parse.quote(prefix)}".rstrip("/") + (f"?{query}" if query else "")
    return BucketObjects(open_bucket(scheme, name, options), prefix, shown)


def split_bucket_url(url: str) -> tuple[str, str, str, dict[str, str]]:
    """(scheme, bucket, prefix that is "" or ends with ``/``, options). UsageError, without secrets, for what cannot be."""
    try:
        parts = urllib.parse.urlsplit(url)
        options = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError:
        raise UsageError(f"store {_shown(url)!r} is not a URL; write s3://bucket/prefix?endpoint_url=…") from None
    hosts = (parts.netloc, urllib.parse.urlsplit(options.get("endpoint_url", "")).netloc)
    if any("@" in host for host in hosts):
        raise UsageError(
            f"store {_shown(url)!r} has a user or password in it; credentials never go into URLs: "
            "they come from AWS_PROFILE, AWS_ACCESS_KEY_ID and the like"
        )
    if parts.fragment:
        raise UsageError(f"store {_shown(url)!r} has a fragment; write # as %23")
    endpoint = options.get("endpoint_url", "")
    if endpoint and not endpoint.startswith(("http://", "https://")):
        raise UsageError(f"store {_shown(url)!r}: endpoint_url must begin with https:// or http://")
    prefix = urllib.parse.unquote(parts.path).strip("/")
    if (prefix and {"", ".", ".."}.intersection(prefix.split("/"))) or not prefix.isprintable():
        raise UsageError(f"store {_shown(url)!r}: {prefix!r} cannot be a prefix of keys")
    return parts.scheme, parts.netloc, f"{prefix}/" if prefix else "", options


def _shown(url: str) -> str:
    """``url`` for messages: without user, password and options, which may hold what was meant to be secret."""
    scheme, _, rest = url.partition("://")
    place = rest.partition("?")[0].partition("#")[0]
    host, slash, path = place.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
