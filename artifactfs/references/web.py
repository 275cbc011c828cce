"""``http://`` and ``https://`` references: pinned by ETag, else by modification time, else by their content.

As in W&B the digest is the ETag without its quotes, or the URL where there is none, and ``extra`` has the raw ETag. Beyond
that ``extra.lastModified`` is recorded where there is no ETag; and what has neither, or tells no size, is read once when it
is added, so that its content id pins it.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from urllib.parse import urlsplit

import msgspec

from artifactfs import http
from artifactfs.content import Fingerprint, Hasher
from artifactfs.errors import SourceChangedError, UsageError
from artifactfs.model import BLOCK, Ref
from artifactfs.names import entry_path
from artifactfs.references.source import DEADLINE, ETAG, MODIFIED, SEEN, Expanded, WholeOnly, source_key


def expand(url: str, name: str, checksum: bool) -> Expanded:
    """The entry of a URL; ``name`` "" takes its last segment, query included. One GET, whose body is read only if need be."""
    _check_url(url)
    path = entry_path(name) if name else _default_path(url)
    last = path.rpartition("/")[2]
    if not checksum:
        return Expanded(path, Ref(last, url, digest=url, size=-1))
    pin = http.probe(url)
    digest = _unquoted(pin.etag) or url
    ref = Ref(last, url, digest, pin.size, extra=_extra(pin))
    if ref.extra and ref.size >= 0:
        return Expanded(path, ref)
    found = _fingerprint(url)
    return Expanded(path, msgspec.structs.replace(ref, size=found.size, id=found.id), found.blocks)


def resolve(ref: Ref, deadline: float) -> Ref:
    """``ref`` pinned to what the server has now."""
    pin = http.probe(ref.uri, deadline)
    size = pin.size if pin.size >= 0 else sum(len(piece) for piece in http.get_whole(ref.uri, deadline))
    if 0 <= ref.size != size:
        raise SourceChangedError(f"{http.shown(ref.uri)} is {size} bytes long and was {ref.size} when it was added; add it again")
    return msgspec.structs.replace(ref, size=size, extra=_extra(pin) or {SEEN: secrets.token_hex(16)})


class WebSource:
    """A URL whose every answer is compared with what was pinned."""

    def __init__(self, ref: Ref, deadline: float = DEADLINE) -> None:
        self.size = ref.size
        self.key = source_key(ref)
        self.where = http.shown(ref.uri)
        self._url = ref.uri
        self._pin = http.Pin(str(ref.extra.get(ETAG, "")), str(ref.extra.get(MODIFIED, "")), ref.size)
        self._deadline = deadline

    def fetch(self, offset: int, size: int) -> Iterator[bytes]:
        try:
            yield from http.get_range(self._url, offset, size, self._pin, self._deadline)
        except http.NoRangesError as error:
            raise WholeOnly(error.stream) from None


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        host, user = parts.hostname, parts.username
    except ValueError:
        raise UsageError(f"reference {http.shown(url)!r} is not a valid URL; check it") from None
    if not host:
        raise UsageError(f"reference {http.shown(url)!r} has no host; write {parts.scheme}://host/path")
    if user is not None:
        text = "holds a user name or password, which everyone who reads the version would see; put them into ~/.netrc"
        raise UsageError(f"reference {http.shown(url)} {text}")


def _default_path(url: str) -> str:
    base = url.rpartition("/")[2]
    if not base:
        raise UsageError(f"reference {http.shown(url)} needs a name: the URL ends with a slash")
    return entry_path(base)


def _extra(pin: http.Pin) -> dict[str, str | int]:
    if pin.etag:
        return {ETAG: pin.etag}
    return {MODIFIED: pin.modified} if pin.modified else {}


def _unquoted(etag: str) -> str:
    return etag[1:-1] if len(etag) > 1 and etag[0] == etag[-1] == '"' else etag


def _fingerprint(url: str) -> Fingerprint:
    """What one pass over the content found."""
    hasher = Hasher()
    buffer = bytearray()
    for piece in http.get_whole(url):
        buffer += piece
        while len(buffer) >= BLOCK:
            hasher.block(bytes(buffer[:BLOCK]))
            del buffer[:BLOCK]
    if buffer:
        hasher.block(bytes(buffer))
    return hasher.finish()
