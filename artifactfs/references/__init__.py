"""Outside bytes: expand a URI into entries when it is added, and open an entry's pinned bytes when it is read.

``expand(uri, …)`` and ``open_reference(ref)`` dispatch on the scheme; one module a scheme does the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol


class Source(Protocol):
    """Random access to one immutable content. Implementations may be used from any thread."""

    size: int
    """Bytes in the content."""
    key: bytes
    """The content's identity, version included: two sources with one key have the same bytes. 32 bytes."""
    where: str
    """For messages: the URI, or the store's path of the object. Never a secret."""

    def fetch(self, offset: int, size: int) -> Iterator[bytes]:
        """Stream exactly ``size`` bytes from ``offset`` (within the content) in pieces of any length.

        Raises SourceChangedError if the target is no longer what was pinned, NetworkError after retries, IntegrityError
        for an answer that is short or of another range. A piece is yielded as soon as it arrives.
        """
