"""What every scheme's module gives: entries when a URI is added, a source of pinned bytes when one is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

from blake3 import blake3

from artifactfs.model import Ref, reference_key

DEADLINE = 60.0
"""Seconds within which a remote must make progress before a fetch from it is given up."""

ETAG = "etag"
VERSION = "versionID"
MODIFIED = "lastModified"
SEEN = "seen"
PINS = (ETAG, VERSION, MODIFIED, SEEN)
"""The keys of ``Ref.extra`` that pin: the first two are W&B's. ``seen`` is never stored: it stands for what a process saw of a
remote that tells nothing, and keeps that apart from what others cached."""

_KEY_CONTEXT = "artifactfs 2026-11 reference key v1"  # no content's id can equal a key that was derived with it


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
        for an answer that is short or of another range, :class:`WholeOnly` where the remote cannot send a part. A piece is
        yielded as soon as it arrives.
        """


class WholeOnly(Exception):
    """The remote sends a content only as a whole. ``stream`` is that, already under way, from the first byte to the last."""

    def __init__(self, stream: Iterator[bytes]) -> None:
        super().__init__("only whole contents")
        self.stream = stream


@dataclasses.dataclass(frozen=True, slots=True)
class Expanded:
    """One entry that a URI stands for. ``path`` is where it goes in the artifact; ``block_list`` is what the publisher stores
    and sets ``ref.blocks`` to (empty where there is none to store)."""

    path: str
    ref: Ref
    block_list: bytes = b""


def source_key(ref: Ref) -> bytes:
    """The identity of the bytes of a pinned reference: the content id, or a hash of the URI and all that pins it."""
    return ref.id or blake3(reference_key(ref), derive_key_context=_KEY_CONTEXT).digest()
