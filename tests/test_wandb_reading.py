"""Reading a ``wandb://`` store when links end, servers are busy, stall, lie or say no: views, mounts, the command line.

The server is ``wandb_server``, which speaks the protocol and knows nothing of artifactfs.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import gzip
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mounting import needs_fuse
from shelves import until
from wandb_server import KEY, Refused, WandbServer, b64md5, running

from artifactfs.cache import BlockCache
from artifactfs.errors import (
    ArtifactFSError,
    IntegrityError,
    NetworkError,
    NotFoundError,
    NotPermittedError,
    SourceChangedError,
    UsageError,
)
from artifactfs.model import BLOCK, Dir, Remote
from artifactfs.names import parse
from artifactfs.reader import WHOLE, Reader
from artifactfs.store.urls import open_store
from artifactfs.store.wandb import WandbStore, files
from artifactfs.store.wandb.client import Client, api_key
from artifactfs.view import VersionView

BIKES = parse("ann/lab/bikes", "", "")
CHANCE = random.Random(7)
LARGE = CHANCE.randbytes(WHOLE + 5 * BLOCK + 17)
SMALL = {f"d{number % 4}/f{number:03}": CHANCE.randbytes(CHANCE.randint(1, 3000)) for number in range(200)}
STORED = re.compile(r"/[^/]+%3D*/|/[A-Za-z0-9+=]+/")  # storage paths of files, not of manifests


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    yield from running()


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[BlockCache]:
    cache = BlockCache(tmp_path / "cache", 1 << 30)
    yield cache
    cache.close()


class User:
    """A view of a version, as a mount has it, with little patience."""

    def __init__(
        self, server: WandbServer, cache: BlockCache | None, name: str = "ann/lab/bikes", deadline: float = 10.0
    ) -> None:
        self.store = WandbStore(Client(server.base, deadline), cache, False)
        self.reader = Reader(self.store, cache, deadline=deadline)
        self.view = VersionView(self.store, self.reader, self.store.version(parse(name, "", "")))

    def read(self, path: str, offset: int = 0, size: int = 1 << 30) -> bytes:
        fh = self.view.open("/" + path, os.O_RDONLY)
        try:
            parts: list[bytes] = []
            while piece := self.view.read(fh, min(128 << 10, size - sum(map(len, parts))), offset + sum(map(len, parts))):
                parts.append(piece)
            return b"".join(parts)
        finally:
            self.view.release(fh)

    def entry(self, path: str) -> Remote:
        found = self.store.tree.resolve(self.view.version.root, path)
        assert isinstance(found, Remote)
        return found

    def close(self) -> None:
        self.view.close()
        self.reader.close()


@pytest.fixture
def user(server: WandbServer, cache: BlockCache) -> Iterator[Callable[..., User]]:
    made: list[User] = []

    def make(name: str = "ann/lab/bikes", *, cached: bool = True, deadline: float = 10.0) -> User:
        made.append(User(server, cache if cached else None, name, deadline))
        return made[-1]

    yield make
    for one in made:
        one.close()


Make = Callable[..., User]


def is_storage(path: str) -> bool:
    return "X-Amz-Signature" in path and not path.startswith("/manifest/")


def gets(server: WandbServer, what: Callable[[str], bool] = is_storage) -> list[str]:
    return [path for method, path, _ in server.log if method == "GET" and what(path)]


def only(what: Callable[[str], bool], status: int, headers: dict[str, str] | None = None, times: int = 1 << 30) -> Any:
    """A fault of the requests whose path is ``what``, so many times."""
    left = [times]

    def fault(method: str, path: str) -> tuple[int, dict[str, str]] | None:
        if not what(path) or not left[0]:
            return None
        left[0] -= 1
        return status, headers or {}

    return fault


# Links that end


@pytest.mark.parametrize("status", [400, 403])
@pytest.mark.parametrize("order", ["sequence", "ranges"])
def test_links_that_end_in_the_middle(server: WandbServer, user: Make, order: str, status: int) -> None:
    """Answers are cut in their middle, and nobody goes on with a link that was given out before: Google says 400 to that."""
    server.log_version("ann/lab/bikes", {"large": LARGE, **SMALL})
    reader = user(cached=False)
    server.shape = lambda path, code, body, headers: (status if code == 403 else code, body, headers)
    cuts = iter(range(1, 1 << 20))

    def cut(path: str, body: bytes) -> bytes:
        if not is_storage(path) or next(cuts) % 3:
            return body
        server.secret = os.urandom(16)  # every link is void from here on
        return body[: len(body) // 2]

    server.cut = cut
    steps = [(at, 128 << 10) for at in range(0, len(LARGE), 128 << 10)]
    if order == "ranges":
        CHANCE.shuffle(steps)
        steps = steps[:20]
    fh = reader.view.open("/large", os.O_RDONLY)
    for at, size in steps:
        assert reader.view.read(fh, size, at) == LARGE[at : at + size]
    for path in list(SMALL)[:10]:
        assert reader.read(path) == SMALL[path]


def test_links_are_renewed_before_they_end(server: WandbServer, user: Make) -> None:
    server.life = 1.0
    server.page = 100
    server.log_version("ann/lab/bikes", SMALL)
    reader = user()
    refused: list[int] = []
    server.shape = lambda path, code, body, headers: (refused.append(code) if code == 403 else None, (code, body, headers))[1]
    began, asked = time.monotonic(), len(server.asked)
    for number, path in enumerate(SMALL):
        until(lambda at=began + number / 90: time.monotonic() > at)
        assert reader.read(path) == SMALL[path]
    assert len(server.asked) - asked >= 4
    assert server.asked.count("ArtifactMembershipFiles") + server.asked.count("GetArtifactMembershipFileUrls") >= 3
    assert refused == []


def test_links_of_a_whole_page_that_ended_are_asked_for_together(server: WandbServer, user: Make) -> None:
    server.page = 1000
    server.log_version("ann/lab/bikes", SMALL)
    reader = user(cached=False)
    for path in list(SMALL)[:50]:
        assert reader.read(path) == SMALL[path]
    server.secret = os.urandom(16)
    files._AGAIN, before = 0.0, files._AGAIN
    try:
        asked = len(server.asked)
        for path in list(SMALL)[50:]:
            assert reader.read(path) == SMALL[path]
    finally:
        files._AGAIN = before
    assert len(server.asked) - asked < 8


@pytest.mark.parametrize("redirects", [True, False])
@pytest.mark.parametrize("form", ["V2", "V2 of old", "V1"])
def test_without_good_links_the_server_itself_is_asked(server: WandbServer, user: Make, form: str, redirects: bool) -> None:
    layout = {"storageLayout": "V1"} if form == "V1" else {"storageLayout": "V2", "storageRegion": "eu west/1"}
    server.log_version(
        "ann/lab/bikes", {"large": LARGE, "ä#?%41/b": b"odd"}, manifest=lambda whole: whole.update(storagePolicyConfig=layout)
    )
    server.forms = {form}
    server.redirects = redirects
    if redirects:
        server.sign = False
    else:
        server.fail = only(is_storage, 403)
    reader = user()
    assert reader.read("ä#?%41/b") == b"odd"
    assert reader.read("large") == LARGE
    ways = gets(server, lambda path: path.startswith("/artifacts"))
    assert all("eu%20west%2F1/ann/lab/bikes/" in path for path in ways) or form == "V1"
    assert all("=" not in path for path in ways)  # ids are quoted


def test_a_server_that_has_no_question_for_files(server: WandbServer, user: Make) -> None:
    """The URLs that follow from the manifest need none."""
    server.log_version("ann/lab/bikes", {"x": b"here", "y": b"there"})
    execute = server.execute

    def refusing(document: str, variables: dict[str, Any]) -> Any:
        if "files(" in document:
            raise Refused('Cannot query field "files" on type "ArtifactCollectionMembership".')
        return execute(document, variables)

    server.execute = refusing  # type: ignore[method-assign]
    reader = user()
    assert reader.read("x") == b"here" and reader.read("y") == b"there"


def test_links_of_the_server_itself_go_without_the_key_unless_it_asks_for_it(server: WandbServer, user: Make) -> None:
    server.log_version("ann/lab/bikes", {"x": b"here", "y": b"there", "z": b"!"})
    manifest = next(iter(server.artifacts.values())).manifest
    server.blobs["m/" + b64md5(manifest).replace("/", "_")] = manifest
    server.redirects = False

    def own_url(digest: str) -> str:
        return f"/artifacts/ann/{base64.b64decode(digest).hex()}"

    server.signed = lambda place, method="GET": own_url(place.rpartition("/")[2].replace("_", "/"))  # type: ignore[method-assign]
    execute = server.execute

    def answer(document: str, variables: dict[str, Any]) -> Any:
        found = execute(document, variables)
        if "currentManifest" in document:
            found["artifact"]["currentManifest"]["file"]["directUrl"] = own_url(b64md5(manifest))
        return found

    server.execute = answer  # type: ignore[method-assign]
    reader = user()
    assert [reader.read(path) for path in "xyz"] == [b"here", b"there", b"!"]
    keyed = ["Authorization" in headers for method, path, headers in server.log if method == "GET"]
    assert keyed == [False, True, True, True, True]  # the first was refused without


# Busy, broken and stalled servers

KINDS: dict[str, Callable[[str], bool]] = {"storage": is_storage, "questions": lambda path: path == "/graphql"}


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize(("status", "wait", "times"), [(429, None, 1), (429, "1", 1), (503, None, 4), (502, "0", 3)])
def test_a_busy_server_is_asked_again(
    server: WandbServer, user: Make, kind: str, status: int, wait: str | None, times: int
) -> None:
    server.log_version("ann/lab/bikes", {"x": b"here"})
    reader = user()
    server.fail = only(KINDS[kind], status, {"Retry-After": wait} if wait else {}, times)
    assert reader.read("x") == b"here"


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize(("status", "wait"), [(429, None), (429, "0"), (429, "120"), (503, None)])
def test_a_server_that_stays_busy_is_given_up(
    server: WandbServer, user: Make, kind: str, status: int, wait: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    server.log_version("ann/lab/bikes", {"x": b"here"})
    reader = user(deadline=1.5)
    reader.view.getattr("/x")
    server.fail = only(KINDS[kind], status, {"Retry-After": wait} if wait else {})
    began, asked = time.monotonic(), len(server.log)
    with pytest.raises(NetworkError, match=f"{status}|no progress") as caught:
        reader.read("x")
    assert caught.value.errno == errno.ETIMEDOUT and caught.value.exit_code == 5
    assert time.monotonic() - began < 15
    assert len(server.log) - asked <= 8  # and is not hammered
    server.fail = lambda method, path: None
    assert reader.read("x") == b"here"  # nothing is remembered of it


def test_who_waits_long_is_told_why(server: WandbServer, caplog: pytest.LogCaptureFixture) -> None:
    server.log_version("ann/lab/bikes", {"x": b"here"})
    server.fail = only(KINDS["questions"], 429, {"Retry-After": "2"}, 1)
    assert open_store(server.url).version(BIKES).number == 0
    assert "429" in caplog.text and "trying again in 2 s" in caplog.text


@pytest.mark.parametrize("status", [409, 520, 524])
def test_what_gateways_say_is_tried_again(server: WandbServer, status: int) -> None:
    server.log_version("ann/lab/bikes", {"x": b"here"})
    server.fail = only(KINDS["questions"], status, times=2)
    assert open_store(server.url).version(BIKES).number == 0


def test_a_command_that_gets_no_answer_ends_with_5(server: WandbServer) -> None:
    server.fail = lambda method, path: (503, {})
    done = afs(server, "info", "bikes")
    assert done.returncode == 5 and "503" in done.stderr and KEY not in done.stderr, done.stderr


def test_a_stalled_file_delays_nobody_else(server: WandbServer, user: Make) -> None:
    server.page = 1000
    server.log_version("ann/lab/bikes", {"large": LARGE, **SMALL})
    reader = user()
    first, second, third = list(SMALL)[:3]
    assert reader.read(first) == SMALL[first] and reader.read(third) == SMALL[third]
    place = urllib.parse.quote(server.place_of(*_placed(server, second)))
    open_again = threading.Event()
    server.gate = lambda path: open_again.wait(20) and None if place in path else None
    with ThreadPoolExecutor(1) as pool:
        try:
            stalled = pool.submit(reader.read, second)
            until(lambda: any(place in path for path in gets(server)))
            began = time.monotonic()
            assert {item.name for item in reader.view.readdir("/")} == {"d0", "d1", "d2", "d3", "large"}
            assert reader.view.getattr("/" + second).size == len(SMALL[second])
            assert reader.read(first) == SMALL[first]
            assert reader.read("large", 3 * BLOCK, 100) == LARGE[3 * BLOCK : 3 * BLOCK + 100]
            assert time.monotonic() - began < 15 and not stalled.done()
        finally:
            open_again.set()
        assert stalled.result() == SMALL[second]


def test_stalled_questions_delay_only_who_needs_an_answer(server: WandbServer, user: Make) -> None:
    server.page = 1000
    server.log_version("ann/lab/bikes", SMALL)
    server.log_version("ann/lab/other", {"x": b"here"})
    reader, other = user(deadline=1.0), user("ann/lab/other", deadline=1.0)
    paths = list(SMALL)
    assert all(reader.read(path) == SMALL[path] for path in paths[:5])
    other.view.getattr("/x")
    open_again = threading.Event()
    server.gate = lambda path: open_again.wait(20) and None if path == "/graphql" else None
    try:
        with ThreadPoolExecutor(4) as pool:
            began = time.monotonic()
            stalled = [pool.submit(other.read, "x") for _ in range(4)]
            assert all(reader.read(path) == SMALL[path] for path in paths[5:20])  # their links are known
            assert [item.name for item in other.view.readdir("/")] == ["x"]
            for one in stalled:
                with pytest.raises(NetworkError):
                    one.result()
            assert time.monotonic() - began < 10
    finally:
        open_again.set()


def _placed(server: WandbServer, path: str) -> tuple[Any, Any]:
    artifact = next(it for it in server.artifacts.values() if path in it.contents)
    return artifact, artifact.contents[path]


# Answers that lie


def test_a_server_that_ignores_ranges(server: WandbServer, user: Make) -> None:
    server.ranges = False
    server.log_version("ann/lab/bikes", {"large": LARGE, "x": b"here"})
    reader = user()
    assert reader.read("x") == b"here"
    assert reader.read("large", 5 * BLOCK, 100) == LARGE[5 * BLOCK : 5 * BLOCK + 100]
    assert reader.read("large") == LARGE
    assert reader.view.getxattr("/large", "user.artifactfs.verified") == b"true"


Shape = Callable[[str, int, bytes, dict[str, str]], Any]


def _stored(change: Callable[[int, bytes, dict[str, str]], Any]) -> Shape:
    return lambda path, status, body, headers: change(status, body, headers) if is_storage(path) else (status, body, headers)


LIES: dict[str, Shape] = {
    "shorter": _stored(lambda status, body, headers: (status, body[:-1], headers)),
    "longer": _stored(lambda status, body, headers: (status, body + b"x", headers)),
    "length too short": _stored(lambda status, body, headers: (status, body, {**headers, "Content-Length": str(len(body) - 1)})),
    "length too long": _stored(lambda status, body, headers: (status, body, {**headers, "Content-Length": str(len(body) + 1)})),
    "no length": _stored(
        lambda status, body, headers: (status, body[:-1], {**headers, "Transfer-Encoding": "identity", "Connection": "close"})
    ),
    "another range": _stored(
        lambda status, body, headers: (status, body, {**headers, "Content-Range": f"bytes 1-{len(body)}/{len(LARGE)}"})
    ),
    "another size": _stored(
        lambda status, body, headers: (206, body, {**headers, "Content-Range": f"bytes 0-{len(body) - 1}/{len(LARGE) * 2}"})
    ),
    "gzip": _stored(lambda status, body, headers: (status, gzip.compress(body), {**headers, "Content-Encoding": "gzip"})),
    "called gzip": _stored(lambda status, body, headers: (status, body, {**headers, "Content-Encoding": "gzip"})),
    "other bytes": _stored(lambda status, body, headers: (status, bytes(len(body)), headers)),
    "one bit": _stored(lambda status, body, headers: (status, body[:-1] + bytes([body[-1] ^ 1]), headers)),
}


@pytest.mark.parametrize("lie", sorted(LIES))
def test_no_lie_becomes_a_wrong_byte(server: WandbServer, user: Make, cache: BlockCache, lie: str) -> None:
    """The small file is right or an error. So is the large one as a whole, and each range of it that is not only pinned."""
    server.log_version("ann/lab/bikes", {"x": b"here" * 100, "large": LARGE})
    reader = user(deadline=1.0)
    server.shape = LIES[lie]
    for path, data in (("x", b"here" * 100), ("large", LARGE)):
        try:
            assert reader.read(path) == data
        except ArtifactFSError as error:
            assert error.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT), error
        else:
            assert lie in ("longer", "length too long")  # what comes behind the end is not taken
    server.shape = lambda path, *answer: answer
    again = user()
    assert again.read("x") == b"here" * 100
    if lie not in ("other bytes", "one bit"):  # a large file that was wrong as a whole stays refused where it was seen
        assert again.read("large") == LARGE


def test_an_etag_that_changes_between_ranges(server: WandbServer, user: Make) -> None:
    server.log_version("ann/lab/bikes", {"large": LARGE})
    reader = user()
    fh = reader.view.open("/large", os.O_RDONLY)
    assert reader.view.read(fh, 10, 0) == LARGE[:10]
    server.shape = _stored(lambda status, body, headers: (status, body, {**headers, "ETag": f'"{time.time_ns()}"'}))
    with pytest.raises(SourceChangedError) as caught:
        reader.view.read(fh, 10, 7 * BLOCK)
    assert caught.value.errno == errno.ESTALE
    reader.view.release(fh)
    server.shape = lambda path, *answer: answer
    assert reader.read("large") == LARGE


@pytest.mark.parametrize("etags", [True, False])
def test_other_bytes_of_the_same_size(server: WandbServer, user: Make, etags: bool) -> None:
    """Replaced in the middle: with an ETag that is seen at once, without one as soon as all of it is here; nothing is cached."""
    server.etags = etags
    server.log_version("ann/lab/bikes", {"large": LARGE})
    (place,) = server.blobs
    reader = user()
    fh = reader.view.open("/large", os.O_RDONLY)
    assert reader.view.read(fh, 10, 0) == LARGE[:10]
    server.blobs[place] = LARGE[:BLOCK] + bytes(len(LARGE) - BLOCK)
    with pytest.raises(IntegrityError):
        for at in range(0, len(LARGE), BLOCK):
            reader.view.read(fh, BLOCK, at)
    server.blobs[place] = LARGE
    assert user().read("large") == LARGE


def test_answers_are_read_tolerantly(server: WandbServer, user: Make) -> None:
    """Numbers as text, nulls where something may be missing, members that nobody knows, compressed answers."""
    server.log_version("ann/lab/bikes", {"x": b"here"}, aliases=("odd",))

    def loosely(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {**{name: loosely(item, name) for name, item in value.items()}, "unknown": [{"a": None}]}
        if isinstance(value, list):
            return [loosely(item) for item in value]
        if key in ("versionIndex", "size", "ttlDurationSeconds", "totalCount") and value is not None:
            return str(value)
        return None if key in ("createdAt", "updatedAt", "description", "tags", "commitHash", "metadata", "createdBy") else value

    def shape(path: str, status: int, body: bytes, headers: dict[str, str]) -> Any:
        if path != "/graphql":
            return status, body, headers
        loose = json.dumps(loosely(json.loads(body)) | {"extensions": {}, "errors": []}).encode()
        return status, gzip.compress(loose), {**headers, "Content-Encoding": "gzip"}

    server.shape = shape
    reader = user("ann/lab/bikes:odd")
    assert reader.read("x") == b"here"
    assert [(version.number, version.tags) for version in reader.store.versions(BIKES)] == [(0, [])]
    assert reader.store.collection(BIKES).aliases["odd"] == 0
    assert reader.store.entities() and [it.name for it in reader.store.collections("ann", "lab")] == ["bikes"]


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ((200, b'{"data": null, "errors": [{"message": "boom"}]}'), ArtifactFSError),
        ((200, b'{"errors": [{"message": "permission denied"}], "data": {"project": null}}'), NotPermittedError),
        ((200, b'{"errors": [{"message": "project ann/lab not found"}]}'), NotFoundError),
        ((200, b'{"data": {"project": null}}'), NotFoundError),
        ((200, b'{"data": {"project": {"artifactCollectionMembership": null}}}'), NotFoundError),
        ((404, b"<html>no such page</html>"), NetworkError),
        ((401, b""), NotPermittedError),
        ((403, b'{"errors": ["no"]}'), NotPermittedError),
        ((400, b'{"errors": [{"message": "Cannot query field"}]}'), ArtifactFSError),
        ((200, b"[]"), NetworkError),
        ((200, b'{"data": []}'), ArtifactFSError),
        ((200, b'{"data": {"project": {"artifactCollectionMembership": {"artifact": {"id": ""}}}}}'), IntegrityError),
    ],
)  # fmt: skip
def test_what_servers_say_when_they_say_no(server: WandbServer, answer: tuple[int, bytes], kind: type[ArtifactFSError]) -> None:
    server.shape = lambda path, status, body, headers: (*answer, {})
    with pytest.raises(kind) as caught:
        open_store(server.url).version(BIKES)
    assert "\n" not in str(caught.value) and KEY not in str(caught.value)


# Lists of files


def test_a_list_of_files_that_is_cut_or_compressed(server: WandbServer, user: Make) -> None:
    server.log_version("ann/lab/bikes", SMALL)
    cuts = iter([3, 2])
    server.cut = lambda path, body: body[: len(body) // next(cuts, 1)] if path.startswith("/manifest/") else body
    server.shape = lambda path, status, body, headers: (
        (status, gzip.compress(body), {**headers, "Content-Encoding": "gzip"})
        if path.startswith("/manifest/")
        else (status, body, headers)
    )
    reader = user()
    found = {path for path, entry in reader.store.tree.walk(reader.view.version.root) if not isinstance(entry, Dir)}
    assert found == set(SMALL)


def test_a_cut_list_of_unknown_length_is_no_shorter_version(server: WandbServer, user: Make) -> None:
    server.log_version("ann/lab/bikes", SMALL)
    whole = server.shape
    server.shape = lambda path, status, body, headers: (
        (status, body[: len(body) // 2], {"Transfer-Encoding": "identity", "Connection": "close"})
        if path.startswith("/manifest/")
        else (status, body, headers)
    )
    reader = user()
    with pytest.raises(IntegrityError, match="cannot be read"):
        list(reader.view.readdir("/"))
    server.shape = whole
    assert len(list(reader.view.readdir("/"))) == 4


@pytest.mark.parametrize("counts", [(0, 0), (None, None), (7, 7), ("0", "0")], ids=str)
@pytest.mark.parametrize("contents", [{}, {"x": b"here"}], ids=["empty", "one"])
def test_the_list_counts_not_what_the_server_says_of_its_length(
    server: WandbServer, user: Make, contents: dict[str, bytes], counts: Any
) -> None:
    server.log_version("ann/lab/bikes", contents)
    artifact = server._artifact
    server._artifact = lambda it: {**artifact(it), "fileCount": counts[0], "size": counts[1]}  # type: ignore[method-assign]
    reader = user()
    assert [item.name for item in reader.view.readdir("/")] == list(contents)
    assert dict.fromkeys(contents, b"here") == {path: reader.read(path) for path in contents}
    with pytest.raises(NotFoundError):
        reader.view.getattr("/nothing")
    assert list(reader.store.tree.diff(reader.view.version.root, reader.view.version.root)) == []


def test_a_list_that_the_version_s_digest_is_not_of(server: WandbServer, user: Make, caplog: pytest.LogCaptureFixture) -> None:
    """As of versions that were logged in parts: it is said, and the files are checked each by its own."""
    right = server.log_version("ann/lab/bikes", {"x": b"here"})
    right.digest = "d41d8cd98f00b204e9800998ecf8427e"
    reader = user()
    assert reader.read("x") == b"here"
    assert right.digest in caplog.text and "has a list of files" in caplog.text
    caplog.clear()
    good = server.log_version("ann/lab/cars", {"x": b"here", "a/b": b"", "a-b": b""})
    lines = "".join(f"{path}:{entry['digest']}\n" for path, entry in sorted(good.contents.items()))
    good.digest = hashlib.md5(f"wandb-artifact-manifest-v1\n{lines}".encode()).hexdigest()
    assert user("ann/lab/cars").read("x") == b"here"
    assert caplog.text == ""


def test_a_manifest_that_is_gone(server: WandbServer, user: Make) -> None:
    server.log_version("ann/lab/bikes", {"x": b"here"})
    reader = user()
    server.fail = only(lambda path: path.startswith("/manifest/"), 404)
    with pytest.raises(IntegrityError, match="is lost"):
        reader.read("x")
    server.fail = only(lambda path: path.startswith("/manifest/"), 403, times=1)
    assert reader.read("x") == b"here"  # the first link had ended


# Rights


def test_a_portfolio_of_a_project_that_one_may_not_see(server: WandbServer, user: Make) -> None:
    made = server.log_version("ann/lab/bikes", {"x": b"here", "y": b"there"})
    server.do_linkArtifact(
        {"artifactID": made.id, "entityName": "ann", "projectName": "shelf", "artifactPortfolioName": "best", "aliases": []}
    )
    server.forms = set()
    reader = user("ann/shelf/best")
    server._seen_artifact = server._artifact  # type: ignore[method-assign]  # who has the portfolio has its versions
    server.hidden["ann", "lab"] = ""
    assert reader.read("x") == b"here" and reader.read("y") == b"there"


# References


def test_references_of_other_versions(server: WandbServer, user: Make) -> None:
    """A chain is followed, a circle is an error, and so is a target that is hidden: for that file alone."""
    first = server.log_version("ann/lab/first", {"a/file": b"referred to"})
    hidden = server.log_version("other/secret/thing", {"file": b"hidden"})

    def refer(to: str, path: str, data: bytes) -> dict[str, Any]:
        return {"digest": b64md5(data), "size": 0, "ref": f"wandb-artifact://{base64.b64decode(to).hex()}/{path}"}

    def second(whole: dict[str, Any]) -> None:
        whole["contents"] = {"there": refer(first.id, "a/file", b"referred to")}

    middle = server.log_version("ann/lab/second", {}, manifest=second)

    def third(whole: dict[str, Any]) -> None:
        whole["contents"].update(
            chain=refer(middle.id, "there", b"referred to"),
            wrong=refer(first.id, "a/file", b"something else"),
            gone=refer(first.id, "a/nothing", b""),
            unknown=refer(base64.b64encode(b"nobody").decode(), "x", b""),
            no={"digest": "x", "size": 0, "ref": "wandb-artifact://xyz/x"},
            hidden=refer(hidden.id, "file", b"hidden"),
        )

    made = server.log_version("ann/lab/bikes", {"x": b"here"}, manifest=third)
    contents = json.loads(made.manifest)
    contents["contents"]["self"] = refer(made.id, "self", b"")
    contents["contents"]["round"] = refer(made.id, "about", b"")
    contents["contents"]["about"] = refer(made.id, "round", b"")
    made.manifest = json.dumps(contents).encode()
    server.hidden["other", "secret"] = "permission denied"
    reader = user()
    assert reader.read("x") == b"here" and reader.read("chain") == b"referred to"
    assert reader.view.getattr("/chain").size == len(b"referred to")
    assert len(list(reader.view.readdir("/"))) == 10
    for path, kind in {
        "wrong": IntegrityError,
        "self": IntegrityError,
        "round": IntegrityError,
        "no": IntegrityError,
        "gone": NotFoundError,
        "unknown": NotFoundError,
        "hidden": NotPermittedError,
    }.items():
        with pytest.raises(kind):
            reader.read(path)
    server.hidden["other", "secret"] = ""  # some say null
    with pytest.raises(NotFoundError, match="no right to it"):
        reader.read("hidden")
    del server.hidden["other", "secret"]
    assert reader.read("hidden") == b"hidden"


def test_references_to_elsewhere_are_pinned_as_w_and_b_recorded_them(server: WandbServer, user: Make, tmp_path: Path) -> None:
    """An HTTP target is read as long as its ETag is the recorded one; those in clouds carry their version and ETag."""
    (tmp_path / "f").write_bytes(b"local")
    target = f"{server.storage}/elsewhere?until={time.time() + 99}"
    etag = hashlib.sha1(b"over http").hexdigest()
    server.blobs["elsewhere"] = b"over http"
    server.is_signed = lambda method, place, query: True  # type: ignore[method-assign]

    def add(whole: dict[str, Any]) -> None:
        for scheme, uri in {"s3": "s3://b/k", "gs": "gs://b/k", "azure": "https://acct.blob.core.windows.net/c/k"}.items():
            whole["contents"][scheme] = {"digest": "e", "size": 7, "ref": uri, "extra": {"etag": "e", "versionID": "1"}}
        whole["contents"]["http"] = {"digest": etag, "size": 9, "ref": target, "extra": {"etag": f'"{etag}"'}}
        whole["contents"]["bare"] = {"digest": target, "size": 0, "ref": target}
        whole["contents"]["file"] = {"digest": b64md5(b"local"), "size": 5, "ref": f"file://{tmp_path}/f"}
        whole["contents"]["odd"] = {"digest": "x", "ref": "ftp://host/x", "extra": None}

    server.log_version("ann/lab/bikes", {"x": b"here"}, manifest=add)
    reader = user()
    assert reader.read("http") == b"over http" and reader.read("bare") == b"over http" and reader.read("file") == b"local"
    for path in ("s3", "gs", "azure"):
        entry = reader.store.tree.resolve(reader.view.version.root, path)
        assert entry is not None and entry.extra == {"etag": "e", "versionID": "1"}  # type: ignore[union-attr]
        assert reader.view.getattr("/" + path).size == 7
    with pytest.raises(UsageError):
        reader.read("odd")
    assert reader.view.getattr("/odd").size == 0
    server.blobs["elsewhere"] = b"otherwise"
    again = user(cached=False)
    with pytest.raises(SourceChangedError):
        again.read("http")


# Who one is


def test_where_keys_come_from(server: WandbServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netloc = server.base.removeprefix("http://")
    home = Path.home()
    assert api_key(netloc) == KEY
    monkeypatch.delenv("WANDB_API_KEY")
    assert api_key(netloc) == ""
    settings = home / ".config/wandb/settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(f"[default]\nbase_url = {server.base}\napi_key = from-settings\n")
    assert api_key(netloc) == "from-settings" and api_key("elsewhere") == ""
    (home / "_netrc").write_text(f"machine {netloc} login user password from-underscore\n")
    assert api_key(netloc) == "from-underscore"
    (home / ".netrc").write_text(
        f"machine 127.0.0.1 login user password wrong\nmachine {netloc} login user password from-netrc\n"
    )
    assert api_key(netloc) == "from-netrc" and api_key("127.0.0.1:1") == ""
    (home / "other").write_text(f"machine {netloc.upper()} login api password from-named\n")
    monkeypatch.setenv("NETRC", "~/other")
    assert api_key(netloc) == "from-named"
    monkeypatch.setenv("WANDB_API_KEY", f" {KEY}\n")
    server.log_version("ann/lab/bikes", {"x": b"here"})
    monkeypatch.setenv("WANDB_X_EXTRA_HTTP_HEADERS", '{"X-Team": "a", "X-Number": 7}')
    assert open_store("wandb://").url == server.url  # the settings file names it
    assert open_store(server.url).version(BIKES).number == 0
    sent = server.log[-1][2]
    assert sent["Authorization"] == "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()
    assert (sent["X-Team"], sent["X-Number"]) == ("a", "7")


# How many questions


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_a_request_for_each_small_file_and_few_questions(server: WandbServer, user: Make, order: str) -> None:
    server.page = 5000
    server.log_version("ann/lab/bikes", SMALL)
    reader = user()
    list(reader.view.readdir("/"))
    before = len(server.asked)
    paths = sorted(SMALL)
    if order == "shuffled":
        CHANCE.shuffle(paths)
    server.connections.clear()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(reader.read, paths)) == [SMALL[path] for path in paths]
    assert len(server.asked) - before <= 2
    assert len(gets(server)) == len(SMALL)
    assert len(server.connections) <= 12  # they are kept, and used again


def test_files_of_a_very_large_version_are_asked_for_by_name(
    server: WandbServer, user: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_LISTED", 50)
    server.page = 100
    server.log_version("ann/lab/bikes", SMALL)
    reader = user()
    list(reader.view.readdir("/"))
    before = len(server.asked)
    for path in sorted(SMALL):
        assert reader.read(path) == SMALL[path]
    assert len(server.asked) - before <= 10
    named = [given["fileNames"] for asked, given in server.variables if asked == "ArtifactMembershipFiles"]
    assert len(named[0]) == 1 and max(map(len, named)) <= 512 and len({name for names in named for name in names}) == len(SMALL)
    assert "GetArtifactMembershipFileUrls" not in server.asked
    before, sparse = len(server.asked), user(cached=False)
    named.clear()
    for path in CHANCE.sample(sorted(SMALL), 5):
        assert sparse.read(path) == SMALL[path]
    assert len(server.asked) - before <= 7


def test_pages_of_links_that_are_shorter_than_asked_for(server: WandbServer, user: Make) -> None:
    server.page = 2
    server.log_version("ann/lab/bikes", dict(list(SMALL.items())[:20]))
    reader = user(cached=False)
    for path in CHANCE.sample(list(SMALL)[:20], 20):
        assert reader.read(path) == SMALL[path]


def test_a_large_file_costs_one_request_more_than_its_ranges(server: WandbServer, user: Make) -> None:
    server.log_version("ann/lab/bikes", {"large": LARGE})
    reader = user()
    server.connections.clear()
    assert reader.read("large", 3 * BLOCK, 10) == LARGE[3 * BLOCK : 3 * BLOCK + 10]
    assert [headers["Range"] for method, path, headers in server.log if is_storage(path)] == [
        "bytes=0-0",
        f"bytes={3 * BLOCK}-{4 * BLOCK - 1}",
    ]
    assert len(set(gets(server))) == 1 and len(server.connections) <= 2


# The command line, and mounts


def afs(server: WandbServer, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "ARTIFACTFS_STORE": server.url, "WANDB_ENTITY": "ann", "WANDB_PROJECT": "lab"}
    run = [sys.executable, "-m", "artifactfs.cli", *command]
    return subprocess.run(run, env=environ, capture_output=True, text=True, timeout=60, check=False, **options)


def ok(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextlib.contextmanager
def mounted(server: WandbServer, where: Path, name: str, *options: str) -> Iterator[Path]:
    where.mkdir(exist_ok=True)
    ok(afs(server, "mount", name, str(where), *options))
    try:
        yield where
    finally:
        ok(afs(server, "unmount", str(where)))


def failing(path: Path) -> int | None:
    try:
        path.read_bytes()
    except OSError as error:
        return error.errno
    return None


@needs_fuse
def test_a_mount_whose_links_end_whose_key_goes_and_whose_server_stalls(server: WandbServer, tmp_path: Path) -> None:
    server.page = 20
    wrong = {"wrong": b"w" * 5000, "wrong-large": LARGE[::-1]}
    server.log_version("ann/lab/bikes", {"large": LARGE, **SMALL, **wrong})
    for path, data in wrong.items():
        server.blobs[server.place_of(*_placed(server, path))] = data[:-1] + b"?"
    with mounted(server, tmp_path / "m", "bikes:latest") as where:
        data = b""
        with open(where / "large", "rb", buffering=0) as file:  # in sequence
            while piece := file.read(1 << 20):
                data += piece
                server.secret = os.urandom(16)
        assert data == LARGE
        assert os.getxattr(where / "large", "user.artifactfs.verified") == b"true"
        # wrong as a whole: EIO, whoever asks and how often
        assert [failing(where / "wrong"), failing(where / "wrong-large"), failing(where / "wrong")] == [errno.EIO] * 3
        assert os.getxattr(where / "wrong-large", "user.artifactfs.verified") == b"false"
        # a key that is taken away
        paths = sorted(SMALL)
        assert (where / paths[0]).read_bytes() == SMALL[paths[0]]
        server.keys, server.secret = set(), os.urandom(16)
        assert failing(where / paths[50]) == errno.EACCES
        assert (where / paths[0]).read_bytes() == SMALL[paths[0]]
        server.keys = {KEY}
        assert (where / paths[50]).read_bytes() == SMALL[paths[50]]
        # a server that stands still
        open_again = threading.Event()
        server.gate = lambda path: open_again.wait(30) and None
        with ThreadPoolExecutor(1) as pool:
            try:
                seen = len(server.log)
                stalled = pool.submit((where / paths[100]).read_bytes)
                until(lambda: len(server.log) > seen)
                began = time.monotonic()
                assert len(os.listdir(where)) == 7
                assert (where / paths[101]).stat().st_size == len(SMALL[paths[101]])
                assert (where / paths[50]).read_bytes() == SMALL[paths[50]]
                assert time.monotonic() - began < 15 and not stalled.done()
            finally:
                open_again.set()
            assert stalled.result(30) == SMALL[paths[100]]
        server.gate = lambda path: None
        server.fail = lambda method, path: (503, {})
        assert failing(where / paths[150]) == errno.ETIMEDOUT
        server.fail = lambda method, path: None
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda path: (where / path).read_bytes(), paths)) == [SMALL[path] for path in paths]


@needs_fuse
def test_browsing_mounts_move_with_the_server(server: WandbServer, tmp_path: Path) -> None:
    server.log_version("ann/lab/bikes", {"x": b"0"})
    server.log_version("ann/lab2/cars", {"y": b"1"}, kind="model")
    server.log_version("team/shared/tools", {"z": b"2"})
    with mounted(server, tmp_path / "m", "/") as where:
        assert sorted(os.listdir(where)) == ["ann", "team"]
        assert sorted(os.listdir(where / "ann")) == ["lab", "lab2"]
        assert (where / "ann/lab2/cars/v0/y").read_bytes() == b"1" and (where / "team/shared/tools/latest/z").read_bytes() == b"2"
        server.log_version("ann/lab/bikes", {"x": b"new"}, aliases=("best",))
        until(lambda: (where / "ann/lab/bikes/best").is_symlink())
        assert os.readlink(where / "ann/lab/bikes/best") == "v1" and (where / "ann/lab/bikes/latest/x").read_bytes() == b"new"
        assert (where / "ann/lab/bikes/v0/x").read_bytes() == b"0"
        assert not (where / "ann/lab/nothing").exists() and not (where / "nobody").exists()
        server.hidden["ann", "lab2"] = "permission denied"
        until(lambda: not _lists(where / "ann/lab2"))
        assert (where / "ann/lab/bikes/v0/x").read_bytes() == b"0"


def _lists(path: Path) -> bool:
    try:
        return bool(os.listdir(path))
    except PermissionError:
        return False


@needs_fuse
@pytest.mark.slow
def test_commands_and_what_is_left_offline(server: WandbServer, tmp_path: Path) -> None:
    server.page = 50
    server.log_version("ann/lab/bikes", {"keep/a": b"1", "keep/b": LARGE, "other/c": b"3"})
    server.log_version("ann/lab/bikes", {"keep/a": b"1", "keep/b": LARGE, "other/c": b"changed", "new": b""})
    assert json.loads(ok(afs(server, "--json", "warm", "bikes", "--path-prefix", "keep/"))) is not None
    differ = json.loads(ok(afs(server, "--json", "diff", "bikes:v0", "bikes:v1")))
    assert sorted(item["path"] for item in differ) == ["new", "other/c"]
    ok(afs(server, "get", "bikes", str(tmp_path / "out"), "--path-prefix", "keep/"))
    assert sorted(os.listdir(tmp_path / "out")) == ["keep"] and (tmp_path / "out/keep/b").read_bytes() == LARGE
    ok(afs(server, "verify", "bikes:v0"))
    with mounted(server, tmp_path / "n", "bikes:v0", "--prefetch", "all") as where:
        assert (where / "keep/b").read_bytes() == LARGE
    server.stop()
    with mounted(server, tmp_path / "m", "bikes:latest", "--offline") as where:
        assert (where / "keep/b").read_bytes() == LARGE and (where / "keep/a").read_bytes() == b"1"
        assert failing(where / "other/c") == errno.EHOSTUNREACH
        assert (where / "new").read_bytes() == b""


def test_what_another_process_brought_is_compared_as_a_whole_too(server: WandbServer, tmp_path: Path) -> None:
    """Two that share a cache read a wrong file in turns: neither is given all of it."""
    server.log_version("ann/lab/bikes", {"large": LARGE})
    (place,) = server.blobs
    server.blobs[place] = LARGE[:-1] + b"?"
    users = [User(server, BlockCache(tmp_path / "cache", 1 << 30), "ann/lab/bikes", 10.0) for _ in range(2)]
    try:
        handles = [one.view.open("/large", os.O_RDONLY) for one in users]
        blocks = -(-len(LARGE) // BLOCK)
        seen: list[set[int]] = [set(), set()]
        for block in range(blocks):
            for number in (block % 2, 1 - block % 2):
                with contextlib.suppress(IntegrityError):
                    if users[number].view.read(handles[number], 100, block * BLOCK):
                        seen[number].add(block)
        assert max(map(len, seen)) < blocks
    finally:
        for one in users:
            one.close()


def test_a_body_that_waits_for_its_head_to_be_acknowledged(server: WandbServer, user: Make) -> None:
    """This server sends them apart, and the system holds the second back: 40 ms a file, were the first not acknowledged."""
    server.page = 5000
    server.log_version("ann/lab/bikes", SMALL)
    reader = user()
    paths = list(SMALL)[:60]
    assert all(reader.read(path) for path in paths[:5])
    took = []
    for path in paths[5:]:
        began = time.monotonic()
        assert reader.read(path) == SMALL[path]
        took.append(time.monotonic() - began)
    assert sorted(took)[len(took) // 4] < 0.035  # a busy machine delays some; this would all of them
