"""Stored files of a W&B server: their URLs, signed for a while, and their bytes.

The first signed URL of a version is asked for alone, then those of whole pages of its files come at once (of a very large version
those of the files that follow). Each is renewed before it expires, and when the server behind it refuses it. Where signed URLs do
not help, the file is asked of the server itself, with the caller's key, under the URL that follows from the manifest.
"""

from __future__ import annotations

import calendar
import dataclasses
import logging
import re
import secrets
import time
import urllib.parse
from collections.abc import Iterator
from typing import Protocol

import msgspec
from cachetools import LRUCache

from artifactfs import http
from artifactfs.errors import (
    ArtifactFSError,
    CommError,
    IntegrityError,
    NetworkError,
    NotFoundError,
    NotPermittedError,
    SourceChangedError,
)
from artifactfs.forking import new_lock
from artifactfs.model import Remote, remote_key
from artifactfs.references import DEADLINE, WholeOnly
from artifactfs.store.wandb import queries
from artifactfs.store.wandb.client import Client, dig, edges_of, next_page
from artifactfs.store.wandb.manifest import Locator, direct_urls, locator_of
from artifactfs.waiting import about_to_wait

log = logging.getLogger(__name__)

_URLS = 20_000
_PAGE = 5000  # files of which W&B's client asks for the URLs at once
_LISTED = 20_000
"""Files of a version up to which the URLs of all are fetched once some are wanted: four pages. In a larger one those that follow
a file are asked for by name."""
_ALONE = 1
"""Files of a version that are asked for one by one; who wants more probably wants many."""
_LEAST, _MOST = 8, 512  # names in a question; more as more of them are used
_NAMES = 64 << 10  # bytes of them
_AGAIN = 5.0  # seconds after which a version's URLs may be listed from the first page once more
_MARGIN = 30.0  # seconds before its end at which a URL is renewed, or a fifth of its life
_TRIES = 3
_SEEN = "seen:"
_REFUSALS = (NotPermittedError, NotFoundError, http.StatusError)
"""A link that has expired is 403 at Amazon and Azure, 400 at Google; what became of a file without its link is 404."""


@dataclasses.dataclass(frozen=True, slots=True)
class Home:
    """Where a version is among the server's: what its files are asked for by."""

    entity: str
    project: str
    collection: str
    alias: str


class Homes(Protocol):
    """What the store knows of versions by id."""

    def home(self, artifact: str, anew: bool = False) -> Home:
        """Where the version is; with ``anew`` the server is asked, as that may have changed. NotFoundError."""

    def file_count(self, artifact: str) -> int: ...

    def following(self, artifact: str, path: str) -> Iterator[str]:
        """The paths of stored files behind ``path`` in the version, in order."""


class _Answer:
    """What is known of the URLs that came together: how many were used, and for which files the URL was refused."""

    __slots__ = ("refused", "used")

    def __init__(self) -> None:
        self.used = 0
        self.refused: set[str] = set()


@dataclasses.dataclass(slots=True)
class _Signed:
    url: str
    until: float
    """Monotonic seconds at which to renew it; infinite if it does not say."""
    answer: _Answer
    used: bool = False

    @property
    def good(self) -> bool:
        """One refused URL may be of a file that nobody may read; two of one answer have expired, and the others with them."""
        return time.monotonic() < self.until and len(self.answer.refused) < 2


class _Version:
    """How far the URLs of one version were asked for. ``lock`` guards everything, and is held while the server is asked: whoever
    wants another file of the version waits, as it is probably in the same answer."""

    def __init__(self) -> None:
        self.lock = new_lock()
        self.missed = 0
        self.cursor: object = None
        self.listed = -_AGAIN  # when the listing began that has ended
        self.began = 0.0
        self.names = _LEAST
        self.last: _Answer | None = None
        self.failure: tuple[float, NetworkError] | None = None


class FileUrls:
    """Signed URLs of stored files, by version and path. Threads may share one."""

    def __init__(self, client: Client, homes: Homes) -> None:
        self._client = client
        self._homes = homes
        self._lock = new_lock()
        self._urls: LRUCache[tuple[str, str], _Signed] = LRUCache(_URLS)
        self._versions: LRUCache[str, _Version] = LRUCache(256)

    def signed(self, entry: Remote, not_this: str = "") -> str | None:
        """A URL of the file that is good for a while, other than ``not_this``, which was refused; None if there is none."""
        place = locator_of(entry)
        key = (place.artifact, place.path)
        with self._lock:
            refused = self._urls.get(key)
            if refused is not None and refused.url == not_this:
                refused.answer.refused.add(place.path)
        known = self._known(key, not_this)
        if known is not None:
            return known
        with self._lock:
            version = self._versions.setdefault(place.artifact, _Version())
        began = time.monotonic()
        with version.lock:
            known = self._known(key, not_this)
            if known is not None:
                return known
            if version.failure is not None and version.failure[0] > began:
                raise NetworkError(
                    str(version.failure[1])
                )  # who waited for an answer that did not come need not ask as long again
            try:
                self._ask_for(version, place, not_this)
            except NetworkError as error:
                version.failure = (time.monotonic(), error)
                raise
        return self._known(key, not_this)

    def direct(self, entry: Remote) -> list[str]:
        """The URLs of the file at the server itself."""
        home = self._homes.home(locator_of(entry).artifact)
        return direct_urls(self._client.base, home.entity, home.project, home.collection, entry)

    def _known(self, key: tuple[str, str], not_this: str = "") -> str | None:
        with self._lock:
            found = self._urls.get(key)
            if found is None or not found.good or found.url == not_this:
                return None
            if not found.used:
                found.used = True
                found.answer.used += 1
            return found.url

    def _ask_for(self, version: _Version, place: Locator, not_this: str) -> None:
        version.missed += 1
        if version.missed > _ALONE:
            if self._homes.file_count(place.artifact) > _LISTED:
                self._fetch_named(place.artifact, self._with_following(version, place), version)
                return
            if self._fetch_page(version, place.artifact) and self._known((place.artifact, place.path), not_this) is not None:
                return
        self._fetch_named(place.artifact, [place.path], version)

    def _with_following(self, version: _Version, place: Locator) -> list[str]:
        """The file and some that follow: ever more if those of the last answer were used, fewer if not."""
        if version.last is not None:
            used = version.last.used * 4 >= version.names
            version.names = min(version.names * 4, _MOST) if used else max(version.names // 2, _LEAST)
        names, size = [place.path], len(place.path)
        for path in self._homes.following(place.artifact, place.path):
            size += len(path)
            if len(names) >= version.names or size > _NAMES:
                break
            if self._known_at_all(place.artifact, path):
                continue
            names.append(path)
        return names

    def _known_at_all(self, artifact: str, path: str) -> bool:
        with self._lock:
            found = self._urls.get((artifact, path))
        return found is not None and found.good

    def _fetch_named(self, artifact: str, names: list[str], version: _Version) -> None:
        version.last = answer = _Answer()
        missing = set(names)
        cursor: object = None
        for _ in range(len(names) + 1):
            found = self._files(queries.FILES, artifact, fileNames=names, cursor=cursor, perPage=max(50, len(names)))
            missing -= self._keep(artifact, found, answer)
            cursor = next_page(found, cursor)
            if not missing or cursor is None:
                return

    def _fetch_page(self, version: _Version, artifact: str) -> bool:
        """The next page of the version's files; False if all were fetched a moment ago. Later they are fetched from the first
        again: then many have expired."""
        now = time.monotonic()
        if version.cursor is None:
            if now < version.listed + _AGAIN:
                return False
            version.began = now
        found = self._files(queries.FILE_URLS, artifact, cursor=version.cursor, perPage=_PAGE)
        self._keep(artifact, found, _Answer())
        version.cursor = next_page(found, version.cursor)
        if version.cursor is None:
            version.listed = version.began
        return True

    def _files(self, document: str, artifact: str, /, **asked: object) -> object:
        """A connection of a version's files; asked for once more where it is now, if it is not where it was."""
        for anew in (False, True):
            home = self._homes.home(artifact, anew)
            where = {"entity": home.entity, "project": home.project, "collection": home.collection, "alias": home.alias}
            try:
                data = self._client.ask(document, **where, **asked)
            except NotFoundError:
                continue
            found = dig(data, "project", "artifactCollection", "artifactMembership", "files")
            if found is not None:
                return found
        return None

    def _keep(self, artifact: str, connection: object, answer: _Answer) -> set[str]:
        """Take note of the URLs in a connection of files; the paths."""
        names = set()
        for edge in edges_of(connection):
            name, url = dig(edge, "node", "name"), dig(edge, "node", "directUrl")
            if isinstance(name, str) and isinstance(url, str) and url.startswith(("http://", "https://", "/")):
                url = urllib.parse.urljoin(self._client.base + "/", url)
                with self._lock:
                    self._urls[artifact, name] = _Signed(url, time.monotonic() + lifetime(url), answer)
                names.add(name)
        return names


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
        failed: ArtifactFSError | None = None
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
            except _REFUSALS as error:
                failed = error
        raise self._failure(failed)

    def probe(self) -> Remote:
        """The entry with what the server tells of it now. IntegrityError for another size."""
        failed: ArtifactFSError | None = None
        for url, headers in self._places():
            try:
                pin = http.get_pin(url, self.size, self._deadline, headers)
            except _REFUSALS as error:
                failed = error
                continue
            except SourceChangedError:
                raise IntegrityError(f"{self.where} has not the {self.size} bytes that its version says") from None
            etag = pin.etag or ("" if pin.modified else _SEEN + secrets.token_hex(16))
            return msgspec.structs.replace(self._entry, etag=etag, modified="" if pin.etag else pin.modified)
        raise self._failure(failed)

    def _failure(self, error: ArtifactFSError | None) -> ArtifactFSError:
        if isinstance(error, NotPermittedError):
            return NotPermittedError(f"{self.where} may not be read: {error}")
        if isinstance(error, http.StatusError):
            return error
        why = f" ({error})" if error is not None else ""
        return IntegrityError(f"{self.where} is lost: the server lists it, but does not have it{why}")

    def _places(self) -> Iterator[tuple[str, dict[str, str]]]:
        """URLs to try, each once, with what to send there."""
        about_to_wait()
        last = ""
        for _ in range(_TRIES):
            try:
                url = self._urls.signed(self._entry, last)
            except (CommError, NotFoundError) as error:
                log.debug("%s: %s", self.where, error)  # what the server has no URLs for it may still have
                break
            if url is None:
                break
            for headers in self._client.ways(url):
                yield url, headers
            last = url
        if self._entry.checksum:
            try:
                direct = self._urls.direct(self._entry)
            except (CommError, NotFoundError) as error:
                log.debug("%s: %s", self.where, error)
                return
            for url in direct:
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
    """What is left of a life but a margin. Where a clock is wrong, what has just come must not seem useless: half a life."""
    left = min(left, life) if life > 0 else left
    if left <= 0:
        return max(life / 2, 1.0)
    usable = left - min(_MARGIN, life / 5)
    return usable if usable > 0 else left / 2
