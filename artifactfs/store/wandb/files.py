"""Stored files of a W&B server: their URLs, signed for a while, and their bytes.

A signed URL is asked for one file at a time, until several of a version are wanted; then for pages of its files. It is
renewed before it expires, and when the server behind it refuses it. Where signed URLs do not help, the file is asked of the
server itself, with the caller's key, under the URL that follows from the manifest.
"""

from __future__ import annotations

import calendar
import dataclasses
import re
import secrets
import time
import urllib.parse
from collections.abc import Callable, Iterator

import msgspec
from cachetools import LRUCache

from artifactfs import http
from artifactfs.errors import ArtifactFSError, IntegrityError, NotFoundError, NotPermittedError
from artifactfs.forking import new_lock
from artifactfs.model import Remote, remote_key
from artifactfs.references import DEADLINE, WholeOnly
from artifactfs.store.wandb import queries
from artifactfs.store.wandb.client import Client, dig
from artifactfs.store.wandb.manifest import direct_urls, locator_of
from artifactfs.waiting import about_to_wait

_URLS = 20_000
_PAGE = 1000
_ALONE = 3
"""Files of a version that are asked for one by one; who wants more probably wants many."""
_MARGIN = 30.0  # seconds before its end at which a URL is renewed, or a fifth of its life
_TRIES = 3
_SEEN = "seen:"


@dataclasses.dataclass(frozen=True, slots=True)
class Home:
    """Where a version is among the server's: what its files are asked for by."""

    entity: str
    project: str
    collection: str
    alias: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Signed:
    url: str
    until: float
    """Monotonic seconds at which to renew it; infinite if it does not say."""


class _Pages:
    """How far the pages of one version's URLs were fetched."""

    def __init__(self) -> None:
        self.lock = new_lock()
        self.missed = 0
        self.cursor: str | None = None
        self.ended = False


class FileUrls:
    """Signed URLs of stored files, by version and path. ``home`` tells where a version is. Threads may share one."""

    def __init__(self, client: Client, home: Callable[[str], Home]) -> None:
        self._client = client
        self._home = home
        self._lock = new_lock()
        self._urls: LRUCache[tuple[str, str], _Signed] = LRUCache(_URLS)
        self._pages: LRUCache[str, _Pages] = LRUCache(256)

    def signed(self, entry: Remote, not_this: str = "") -> str | None:
        """A URL of the file that is good for a while, other than ``not_this``; None if the server gives none."""
        place = locator_of(entry)
        key = (place.artifact, place.path)
        known = self._known(key, not_this)
        if known is not None:
            return known
        with self._lock:
            pages = self._pages.setdefault(place.artifact, _Pages())
        with pages.lock:  # whoever wants another file of the same version waits: it is probably in the same page
            known = self._known(key, not_this)
            if known is not None:
                return known
            pages.missed += 1
            if pages.missed > _ALONE and not not_this:
                self._fetch_page(place.artifact, pages)
                known = self._known(key, not_this)
                if known is not None:
                    return known
        self._fetch_one(place.artifact, place.path)
        return self._known(key, not_this)

    def direct(self, entry: Remote) -> list[str]:
        """The URLs of the file at the server itself."""
        home = self._home(locator_of(entry).artifact)
        return direct_urls(self._client.base, home.entity, home.project, home.collection, entry)

    def _known(self, key: tuple[str, str], not_this: str) -> str | None:
        with self._lock:
            found = self._urls.get(key)
        return found.url if found is not None and found.url != not_this and time.monotonic() < found.until else None

    def _fetch_one(self, artifact: str, path: str) -> None:
        home = self._home(artifact)
        asked = {"entity": home.entity, "project": home.project, "collection": home.collection, "alias": home.alias}
        data = self._client.ask(queries.FILES, **asked, fileNames=[path], cursor=None, perPage=50)
        self._keep(artifact, _files(data))

    def _fetch_page(self, artifact: str, pages: _Pages) -> None:
        """The next page of the version's files; from the first again once all were fetched, as many more have expired by then."""
        if pages.ended:
            pages.ended, pages.cursor, pages.missed = False, None, 0
            return
        home = self._home(artifact)
        asked = {"entity": home.entity, "project": home.project, "collection": home.collection, "alias": home.alias}
        data = self._client.ask(queries.FILE_URLS, **asked, cursor=pages.cursor, perPage=_PAGE)
        found = _files(data)
        self._keep(artifact, found)
        info = dig(found, "pageInfo") or {}
        last, pages.cursor = pages.cursor, info.get("endCursor")
        pages.ended = not info.get("hasNextPage") or not pages.cursor or pages.cursor == last

    def _keep(self, artifact: str, connection: object) -> None:
        for edge in dig(connection, "edges") or ():
            name, url = dig(edge, "node", "name"), dig(edge, "node", "directUrl")
            if isinstance(name, str) and isinstance(url, str) and url.startswith(("http://", "https://", "/")):
                url = urllib.parse.urljoin(self._client.base + "/", url)
                with self._lock:
                    self._urls[artifact, name] = _Signed(url, time.monotonic() + lifetime(url))


def _files(data: object) -> object:
    return dig(data, "project", "artifactCollection", "artifactMembership", "files")


class WandbSource:
    """The bytes of a stored file. What pins the entry is compared with every answer, wherever that comes from."""

    def __init__(self, client: Client, urls: FileUrls, entry: Remote, deadline: float = DEADLINE) -> None:
        self.size = entry.size
        self.key = remote_key(entry)
        self.where = f"{locator_of(entry).path} at {client.netloc}"
        self._client = client
        self._urls = urls
        self._entry = entry
        etag = "" if entry.etag.startswith(_SEEN) else entry.etag
        self._pin = http.Pin(etag, entry.modified, entry.size)
        self._deadline = deadline

    def fetch(self, offset: int, size: int) -> Iterator[bytes]:
        done = 0
        for url, headers in self._places():
            try:
                for piece in http.get_range(url, offset + done, size - done, self._pin, self._deadline, headers):
                    done += len(piece)
                    yield piece
                return
            except http.NoRangesError as error:
                if done:  # what was passed on cannot be taken back: let another place, or the next read, go on
                    continue
                raise WholeOnly(error.stream) from None
            except (NotPermittedError, NotFoundError) as error:
                self._failed = error
        raise self._failure()

    def probe(self) -> Remote:
        """The entry with what the server tells of it now. IntegrityError for another size."""
        for url, headers in self._places():
            try:
                pin = http.probe(url, self._deadline, headers)
            except (NotPermittedError, NotFoundError) as error:
                self._failed = error
                continue
            if pin.size not in (-1, self.size):
                raise IntegrityError(f"{self.where} has {pin.size} bytes, and its version says {self.size}")
            etag = pin.etag or ("" if pin.modified else _SEEN + secrets.token_hex(16))
            return msgspec.structs.replace(self._entry, etag=etag, modified="" if pin.etag else pin.modified)
        raise self._failure()

    _failed: ArtifactFSError | None = None

    def _failure(self) -> ArtifactFSError:
        error = self._failed
        if isinstance(error, NotPermittedError):
            return NotPermittedError(f"{self.where} may not be read: {error}")
        return IntegrityError(f"{self.where} is lost: the server lists it, but does not have it ({error})")

    def _places(self) -> Iterator[tuple[str, dict[str, str]]]:
        """URLs to try, each once, with what to send there."""
        about_to_wait()
        last = ""
        for _ in range(_TRIES):
            url = self._urls.signed(self._entry, last)
            if url is None:
                break
            yield url, self._client.headers(url)
            last = url
        if self._entry.checksum:
            for url in self._urls.direct(self._entry):
                yield url, self._client.headers(url)


def lifetime(url: str) -> float:
    """Seconds for which a signed URL may be used from now on; infinite if it does not say."""
    try:
        query = {name.lower(): value for name, value in urllib.parse.parse_qsl(urllib.parse.urlsplit(url).query)}
    except ValueError:
        return float("inf")
    for vendor in ("amz", "goog"):
        date, expires = query.get(f"x-{vendor}-date", ""), query.get(f"x-{vendor}-expires", "")
        if re.fullmatch(r"[0-9]{8}T[0-9]{6}Z", date) and expires.isdecimal():
            end = calendar.timegm(time.strptime(date, "%Y%m%dT%H%M%SZ")) + int(expires)
            return _usable(end - time.time(), float(expires))
    expires = query.get("expires", "")
    if expires.isdecimal() and len(expires) < 12:
        left = float(expires) - time.time()
        return _usable(left, left)
    if re.match(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", query.get("se", "")):
        left = calendar.timegm(time.strptime(query["se"][:19], "%Y-%m-%dT%H:%M:%S")) - time.time()
        return _usable(left, left)
    return float("inf")


def _usable(left: float, life: float) -> float:
    """What is left of a life but a margin. A clock that is wrong must not make fresh URLs useless: they are tried at least."""
    usable = left - min(_MARGIN, life / 5)
    return usable if usable > 0 else 1.0
