"""``open_store(url)``: the store a URL names. SKELETON while native.py is being written; the signature is settled."""

from __future__ import annotations

from artifactfs.store import Store


def open_store(url: str) -> Store:
    """The store at ``url``: a path or ``file:///…``, created at the first commit if it is not there.

    StoreFormatError for another format or a newer version, UsageError for a scheme that is not known.
    """
    raise AssertionError("being written")
