"""The bytes of a stored asset, in ranges.

A Comet server either redirects to its object store, with a signed URL that is worth something for a while, or sends the bytes
itself, in ranges or only whole. A link that is refused is asked for anew, in the middle of a read as well. No API key goes to
where a link leads. Every answer is compared with the size and with what the server said of the bytes when they were pinned.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator

import msgspec
from cachetools import LRUCache

from artifactfs import http
from artifactfs.errors import IntegrityError, NetworkError, NotFoundError, NotPermittedError
from artifactfs.forking import new_lock
from artifactfs.model import File, Remote, remote_key
from artifactfs.references import WholeOnly
from artifactfs.store.comet.client import CometClient

SEEN_HERE = "seen:"
"""What stands for the ETag of bytes of which the server tells none: as ``store.Store.pin`` says."""

_LINKS = 16384
_LINK_LIFE = 240.0  # seconds: signed URLs that live shorter than five minutes are rare, and cost one refusal


class Links:
    """The signed URLs that a server gave, by asset. Threads may share one."""

    def __init__(self) -> None:
        self._lock = new_lock()
        self._known: LRUCache[str, tuple[str, float]] = LRUCache(_LINKS)

    def get(self, locator: str) -> str:
        """The URL, "" if there is none that should still be good."""
        with self._lock:
            url, until = self._known.get(locator, ("", 0.0))
        return url if time.monotonic() < until else ""

    def put(self, locator: str, url: str) -> None:
        with self._lock:
            self._known[locator] = (url, time.monotonic() + _LINK_LIFE)

    def drop(self, locator: str) -> None:
        with self._lock:
            self._known.pop(locator, None)


class AssetSource:
    """A stored asset as a source for the block cache."""

    def __init__(self, client: CometClient, links: Links, file: Remote, deadline: float) -> None:
        self.size = file.size
        self.key = remote_key(file)
        self._version, _, self._asset = file.locator.partition("/")
        self.where = f"{client.url} asset {self._asset}"
        self._client = client
        self._links = links
        self._locator = file.locator
        etag = "" if file.etag.startswith(SEEN_HERE) else file.etag
        self._pin = http.Pin(etag, file.modified, file.size)
        self._deadline = deadline

    def fetch(self, offset: int, size: int) -> Iterator[bytes]:
        """See ``references.Source``."""
        position, end = offset, offset + size
        while position < end:
            start = position
            link, fresh = self._links.get(self._locator), False
            try:
                if not link:
                    try:
                        for piece in self._direct(position, end):
                            position += len(piece)
                            yield piece
                        return
                    except http.RedirectedError as found:
                        link, fresh = found.location, True
                        self._links.put(self._locator, link)
                for piece in http.get_range(link, position, end - position, self._pin, self._deadline):
                    position += len(piece)
                    yield piece
                return
            except http.NoRangesError as error:
                if position != offset:
                    raise IntegrityError(f"{self.where}: the server began to send only whole contents; try again") from None
                raise WholeOnly(error.stream) from None
            except (NotPermittedError, NotFoundError, NetworkError):
                # Object stores refuse an expired link as 403, 400 or 404. What a link just asked for does not give, none does.
                if not link or (fresh and position == start):
                    raise
                self._links.drop(self._locator)

    def pinned(self) -> http.Pin:
        """What the server says of the bytes that it has now."""
        for attempt in (0, 1):
            link, fresh = self._links.get(self._locator), False
            if not link:
                try:
                    return self._known(http.get_pin(self._url, self.size, self._deadline, self._client.headers(), False))
                except http.RedirectedError as found:
                    link, fresh = found.location, True
                    self._links.put(self._locator, link)
                except NotPermittedError:
                    raise self._refused() from None
            try:
                return self._known(http.get_pin(link, self.size, self._deadline))
            except (NotPermittedError, NotFoundError, NetworkError):
                if fresh or attempt:
                    raise
                self._links.drop(self._locator)
        raise AssertionError("the second attempt returns or raises")

    @property
    def _url(self) -> str:
        return self._client.content_url(self._asset, self._version)

    def _direct(self, position: int, end: int) -> Iterator[bytes]:
        try:
            yield from http.get_range(
                self._url, position, end - position, self._pin, self._deadline, self._client.headers(), False
            )
        except NotPermittedError:
            raise self._refused() from None

    def _refused(self) -> NotPermittedError:
        self._client.refused()
        return NotPermittedError(f"{self.where}: the server refuses the API key; check COMET_API_KEY and its rights")

    def _known(self, pin: http.Pin) -> http.Pin:
        return pin if pin.etag or pin.modified else http.Pin(SEEN_HERE + secrets.token_hex(16), "", pin.size)


def pin(client: CometClient, links: Links, file: Remote, deadline: float) -> Remote:
    """``file`` with what the server says of its bytes."""
    if not file.size:
        return msgspec.structs.replace(file, etag=f"{SEEN_HERE}empty")
    found = AssetSource(client, links, file, deadline).pinned()
    return msgspec.structs.replace(file, etag=found.etag, modified=found.modified)


class MemorySource:
    """Bytes that are made when they are asked for: the list of assets' metadata."""

    def __init__(self, file: File, key: bytes, where: str, data: bytes) -> None:
        self.size = file.size
        self.key = key
        self.where = where
        self._data = data

    def fetch(self, offset: int, size: int) -> Iterator[bytes]:
        """See ``references.Source``."""
        if len(self._data) != self.size:
            raise IntegrityError(f"{self.where} is not what it was: metadata of its assets was changed; open the version again")
        yield self._data[offset : offset + size]
