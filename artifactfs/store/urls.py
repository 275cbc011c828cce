"""``open_store(url)``: the store a URL names."""

from __future__ import annotations

import urllib.parse
from pathlib import Path

from artifactfs.cache import BlockCache
from artifactfs.errors import UsageError
from artifactfs.model import scheme_of
from artifactfs.objects.local import LocalObjects
from artifactfs.store.native import NativeStore


def open_store(url: str, cache: BlockCache | None = None, offline: bool = False) -> NativeStore:
    """The store at ``url``: a path or ``file:///…``, created at the first commit if it is not there. Of one that is elsewhere,
    pages and records are kept in ``cache``, and with ``offline`` come from there alone.

    StoreFormatError for another format or a newer version, UsageError for a scheme that is not known.
    """
    scheme = scheme_of(url)
    path = url
    if scheme == "file":
        parts = urllib.parse.urlsplit(url)
        path = urllib.parse.unquote(parts.path)
        if parts.netloc not in ("", "localhost") or not path.startswith("/"):
            raise UsageError(f"store {url!r} is not a local file URL; write file:///absolute/path")
    elif "://" in url:
        raise UsageError(f"store {url!r} has the scheme {scheme!r}, which is not known; use a path or file:///path")
    if not path:
        raise UsageError("the store's path is empty; set ARTIFACTFS_STORE or --store to a path")
    if "\0" in path:
        raise UsageError(f"store {url!r} contains a NUL byte, which no path can")
    return NativeStore(LocalObjects(Path(path)), cache, offline)
