"""``comet://``: a Comet server as a store, with the real client beside it, and with everything that can go wrong."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import itertools
import json
import os
import re
import secrets
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from comet_server import KEY, CometServer
from mounting import World, needs_fuse, world  # noqa: F401 - a fixture
from programs import Program
from servers import Bucket
from shelves import Files, write_files

from artifactfs import http
from artifactfs.cache import BlockCache
from artifactfs.errors import (
    ArtifactFSError,
    ConflictError,
    IntegrityError,
    NetworkError,
    NotFoundError,
    NotPermittedError,
    OfflineError,
    SourceChangedError,
    UsageError,
)
from artifactfs.folders import LocalFolder, gather
from artifactfs.model import Dir, Remote, Version
from artifactfs.names import parse
from artifactfs.publish import Draft, Folder, Published, publish
from artifactfs.reader import Reader
from artifactfs.references import expand
from artifactfs.store.comet.account import api_key, server_of
from artifactfs.store.comet.client import CometClient, NotFinalError, UnknownOutcomeError
from artifactfs.store.comet.store import CometStore

NAME = "acme/vision/bikes"
BIG = bytes(range(256)) * 20_000 + b"end"  # more than what is compared before it is served
_numbers = itertools.count()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[CometServer]:
    """A server, the key for it, and the setting that makes it the store."""
    monkeypatch.setenv("COMET_API_KEY", KEY)
    with CometServer() as made:
        monkeypatch.setenv("ARTIFACTFS_STORE", f"comet://{made.host}")
        yield made
        assert made.unknown == []


class Shelf:
    """The store of a server, with a cache and a reader of its own."""

    def __init__(self, root: Path, server: CometServer, deadline: float = 5.0, offline: bool = False) -> None:
        self.cache = BlockCache(root, 1 << 30)
        self.store = CometStore(f"comet://{server.host}", self.cache, offline, deadline)
        self.reader = Reader(self.store, self.cache, deadline=deadline, offline=offline)

    def version(self, alias: str = "latest", name: str = NAME) -> Version:
        return self.store.version(parse(f"{name}:{alias}"))

    def read(self, version: Version, path: str) -> bytes:
        entry = self.store.tree.resolve(version.root, path)
        assert isinstance(entry, Remote), path
        handle = self.reader.open(entry, path)
        with contextlib.closing(handle):
            return b"".join(handle.read(at, 1 << 20) for at in range(0, entry.size, 1 << 20))

    def files(self, version: Version) -> dict[str, bytes | str | None]:
        """What is in a version, in the form of ``write_files``."""
        found: dict[str, bytes | str | None] = {}
        for path, entry in self.store.tree.walk(version.root):
            if isinstance(entry, Remote):
                found[path] = self.read(version, path)
            elif isinstance(entry, Dir):
                if entry.page is None:
                    found[path] = None
            else:
                found[path] = getattr(entry, "target", None) or entry.uri  # type: ignore[union-attr]
        return found

    def draft(self, folder: Path | Folder, **fields: Any) -> Draft:
        content: Any = LocalFolder(str(folder)) if isinstance(folder, Path) else folder
        return Draft(**{"type": "", "commit": secrets.token_hex(16), "name": parse(NAME), "folder": content, **fields})

    def log(self, folder: Path, **fields: Any) -> Published:
        return publish(self.store, self.draft(folder, **fields))

    def close(self) -> None:
        self.reader.close()
        self.cache.close()


Open = Callable[..., Shelf]


@pytest.fixture
def opened(tmp_path: Path, server: CometServer) -> Iterator[Open]:
    """Opens the store, each time as another user would."""
    made: list[Shelf] = []

    def new(root: Path | None = None, **options: Any) -> Shelf:
        made.append(Shelf(root or tmp_path / f"cache-{next(_numbers)}", server, **options))
        return made[-1]

    yield new
    for shelf in made:
        shelf.close()


@pytest.fixture
def shelf(opened: Open) -> Shelf:
    return opened()


# Which server, which key


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("comet://comet.acme.org", "https://comet.acme.org"),
        ("comet://Comet.Acme.org:8443/", "https://comet.acme.org:8443"),
        ("comet://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("comet://localhost", "http://localhost"),
        ("comet://[::1]:5000", "http://[::1]:5000"),
        ("comet://127.evil.org", "https://127.evil.org"),
        ("comet://", "https://www.comet.com"),
    ],
)
def test_server_of_a_url(url: str, expected: str) -> None:
    assert server_of(url) == expected


@pytest.mark.parametrize(
    "url", ["comet://me:secret@host", "comet://host/acme", "comet://host?api_key=secret", "comet://host#x", "comet://host:x"]
)
def test_urls_that_cannot_be(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        server_of(url)
    assert "secret" not in str(caught.value)


def test_default_server_and_key(monkeypatch: pytest.MonkeyPatch, isolated_home: Path) -> None:
    with pytest.raises(NotPermittedError, match="set COMET_API_KEY"):
        api_key("https://www.comet.com")
    (isolated_home / ".comet.config").write_text("[comet]\napi_key=fromfile\nurl_override=https://own.acme.org/clientlib/\n")
    assert (api_key("https://x"), server_of("comet://")) == ("fromfile", "https://own.acme.org")
    address = base64.b64encode(b'{"baseUrl": "https://key.acme.org/"}').decode()
    monkeypatch.setenv("COMET_CONFIG", str(isolated_home / "none"))
    monkeypatch.setenv("COMET_API_KEY", f"abc*{address}")
    assert (api_key("https://x"), server_of("comet://")) == (f"abc*{address}", "https://key.acme.org")
    monkeypatch.setenv("COMET_URL_OVERRIDE", "http://127.0.0.1:1/clientlib/")
    assert server_of("comet://") == "http://127.0.0.1:1"
    for bad in ("http://own.acme.org/clientlib/", "ftp://x", "https://me:pw@own.acme.org"):
        monkeypatch.setenv("COMET_URL_OVERRIDE", bad)
        with pytest.raises(UsageError, match="COMET_URL_OVERRIDE") as caught:
            server_of("comet://")
        assert "pw" not in str(caught.value)
    for bad in ("a b", "a\nb", "ключ"):
        monkeypatch.setenv("COMET_API_KEY", bad)
        with pytest.raises(NotPermittedError):
            api_key("https://x")


# The real client


_REAL = """
import json, os, sys
import comet_ml

quiet = dict(log_code=False, log_graph=False, log_git_metadata=False, log_git_patch=False, log_env_details=False,
             auto_output_logging=False, display_summary_level=0)


def experiment():
    return comet_ml.Experiment(workspace="acme", project_name="vision", **quiet)


def shown(found):
    return {"version": str(found.version), "aliases": sorted(found.aliases), "tags": sorted(found.version_tags),
            "artifact_tags": sorted(found.artifact_tags), "metadata": dict(found.metadata), "type": found.artifact_type,
            "assets": {a.logical_path: [a.size, a.remote, a.link, a.metadata] for a in found.assets}}


def say(**values):
    json.dump(values, open("answer.json", "w"))

"""


def real(server: CometServer, folder: Path, script: str) -> Any:
    """What ``script`` says with the real client, in a process without any of our settings."""
    pytest.importorskip("comet_ml")
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("COMET_", "PYTHONPATH"))}
    environ |= {
        "COMET_API_KEY": server.key,
        "COMET_URL_OVERRIDE": f"{server.url}/clientlib/",
        "COMET_ERROR_TRACKING_ENABLE": "false",
        "COMET_INTERNAL_SENTRY_DSN": "",
        "COMET_DISABLE_ANNOUNCEMENT": "true",
        "COMET_LOGGING_CONSOLE": "error",
        "HOME": str(folder),
    }
    folder.mkdir(exist_ok=True)
    ran = subprocess.run(
        [sys.executable, "-c", _REAL + script], cwd=folder, env=environ, capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    for extra in ("asset/3d-limits", "notification/experiment", "batch/logger"):  # what it asks beside artifacts
        server.unknown[:] = [one for one in server.unknown if extra not in one]
    return json.loads((folder / "answer.json").read_text())


def test_what_the_real_client_logs_is_read(server: CometServer, shelf: Shelf, tmp_path: Path) -> None:
    files: Files = {"data/a.bin": BIG, "data/sub/b.txt": b"b", "empty": b""}
    write_files(tmp_path / "real" / "in", files)
    key = real(
        server,
        tmp_path / "real",
        """
e = experiment()
a = comet_ml.Artifact("bikes", "dataset", aliases=["raw"], metadata={"rows": 2}, version_tags=["t1"])
a.add("in", logical_path="")
a.add(__import__("io").BytesIO(b"hello"), "x/hello.txt", metadata={"split": "test"})
a.add_remote("https://example.com/large.bin")
e.log_artifact(a)
e.end()
e = experiment()
comet_ml.API().get_artifact("acme", "bikes").update_artifact_tags(["bikes"])
used = e.get_artifact("bikes:raw")
e.end()
say(key=used.source_experiment_key)
""",
    )["key"]
    version = shelf.version("raw")
    assert (version.semver, version.name, version.type) == ("1.0.0", "v0", "dataset")
    assert (version.metadata, version.tags, version.run) == ({"rows": 2}, ["t1"], f"acme/vision/{key}")
    assert shelf.store.run("acme", "vision", key).path == version.run
    collection = shelf.store.collection(parse(NAME))
    assert (collection.aliases, collection.tags) == ({"latest": 0, "raw": 0}, ["bikes"])
    found = shelf.files(version)
    told = json.loads(found.pop(".comet/assets.json") or b"")
    assert told == {"version": 1, "assets": {"x/hello.txt": {"split": "test"}}}
    assert found == {**files, "x/hello.txt": b"hello", "large.bin": "https://example.com/large.bin"}


def test_what_is_logged_here_the_real_client_reads(server: CometServer, shelf: Shelf, tmp_path: Path) -> None:
    files: Files = {"a/b.txt": b"hello", "big.bin": BIG, "none": b"", "run.sh": b"#!/bin/sh\n"}
    folder = write_files(tmp_path / "in", files)
    shelf.log(folder, type="model", aliases=["best"], tags=["t1"], metadata={"rows": 2}, description="words")
    answer = real(
        server,
        tmp_path / "real",
        """
found = comet_ml.API().get_artifact("acme", "bikes")
found.download("out")
before = shown(found)
found.update_aliases(["best", "new"])
found.update_version_tags(["t2"])
say(found=before)
""",
    )
    found = answer["found"]
    assert (found["version"], found["type"], found["aliases"], found["tags"]) == ("1.0.0", "model", ["Latest", "best"], ["t1"])
    assert found["metadata"]["rows"] == 2
    for path, data in files.items():
        assert isinstance(data, bytes)
        assert (tmp_path / "real" / "out" / path).read_bytes() == data
        assert found["assets"][path][0] == len(data)
    version = shelf.version("new")
    assert (version.tags, version.description, version.metadata) == (["t2"], "words", {"rows": 2})


# Looking up


def test_catalog(server: CometServer, shelf: Shelf) -> None:
    server.add("bikes", {"f": b"1"}, version="1.0.0", aliases=["raw", "a/b", "v7", "Latest"])
    server.add("bikes", {"f": b"2"}, version="1.1.0")
    server.add("cars", {"f": b"1"}, project="other")
    server.add("has space", {"f": b"1"})
    assert shelf.store.entities() == ["acme"]
    assert shelf.store.projects("acme") == ["other", "vision"]
    assert shelf.store.projects("nobody") == shelf.store.collections("nobody", "x") == []
    assert [found.path for found in shelf.store.collections("acme", "vision")] == [NAME]
    collection = shelf.store.collection(parse(NAME))
    assert collection.aliases == {"latest": 1, "raw": 0}, "what could not be written behind a colon, or means a version, is none"
    assert collection.semver == {"1.0.0": 0, "1.1.0": 1}
    assert [version.name for version in shelf.store.versions(parse(NAME))] == ["v0", "v1"]
    for asked in ("", ":latest", ":Latest", ":v1", ":1.1.0"):
        assert shelf.store.version(parse(NAME + asked)).semver == "1.1.0"
    assert shelf.store.version(parse("acme/anything/bikes:raw")).qualified_name == "acme/anything/bikes:v0"
    for missing in (":9.9.9", ":v2", ":nope"):
        with pytest.raises(NotFoundError, match="its aliases are: "):
            shelf.store.version(parse(NAME + missing))
    with pytest.raises(NotFoundError, match="does not exist"):
        shelf.store.collection(parse("acme/vision/nothing"))
    with pytest.raises(NotFoundError):
        shelf.store.run("acme", "vision", "nothing")
    assert [run.id for run in shelf.store.runs("acme", "vision")] == ["e" * 32]


def test_numbers_stay_when_a_version_is_deleted_there(server: CometServer, shelf: Shelf) -> None:
    for number in range(3):
        server.add("bikes", {"f": b"%d" % number})
    assert shelf.store.numbers(parse(NAME)) == [0, 1, 2]
    del server.artifact("bikes").versions[0]
    assert shelf.store.numbers(parse(NAME)) == [1, 2]
    assert shelf.version("v2").semver == "3.0.0"
    with pytest.raises(NotFoundError):
        shelf.version("v0")


@pytest.mark.parametrize("told", [True, False])
def test_versions_that_are_not_closed(server: CometServer, shelf: Shelf, told: bool) -> None:
    server.states = told
    server.add("bikes", {"f": b"1"}, aliases=["old"])
    server.add("bikes", {"f": b"2"}, state="OPEN", aliases=["new"])
    server.add("bikes", {"f": b"3"}, state="ERROR")
    assert shelf.version().semver == "1.0.0"
    assert [version.semver for version in shelf.store.versions(parse(NAME))] == ["1.0.0"]
    newest = shelf.store.newest(parse(NAME))
    assert newest is not None and newest.semver == "1.0.0"
    for asked in ("2.0.0", "new", "3.0.0"):
        with pytest.raises(NotFinalError, match="log"):
            shelf.version(asked)
    server.artifact("bikes").versions[1].state = "CLOSED"
    assert shelf.files(shelf.version("new")) == {"f": b"2"}, "nothing of it was remembered"
    server.add("cars", {"f": b"1"}, state="OPEN")
    with pytest.raises(NotFoundError, match="no version that is closed"):
        shelf.version(name="acme/vision/cars")


@pytest.mark.parametrize(
    "names", [["/etc/passwd"], ["../x"], ["a/../../x"], ["a", "a/b"], ["a", "./a"], ["a\nb"], ["x\0y"], [""]]
)
def test_hostile_names(server: CometServer, shelf: Shelf, names: list[str], caplog: pytest.LogCaptureFixture) -> None:
    server.add("bikes", {"f": b"good"})
    server.add("bikes", dict.fromkeys(names, b"x"))
    with pytest.raises(IntegrityError):
        shelf.version()
    assert [version.name for version in shelf.store.versions(parse(NAME))] == ["v0"]
    assert "not listed" in caplog.text


def test_metadata_that_is_none(server: CometServer, shelf: Shelf) -> None:
    ours: Any = {"blake3": 5, "executable": "yes", "symlink": ["x"], "directory": True, "extra": 3}
    version = server.add("bikes", {"f": b"1", "g": b"2"}, asset_metadata={"f": {"artifactfs": ours}, "g": {"artifactfs": "x"}})
    version.metadata = "{not json"
    next(iter(version.assets.values())).metadata = "[1]"
    found = shelf.version()
    assert found.metadata == {} and shelf.files(found) == {"f": b"1", "g": b"2"}


# Reading


@pytest.mark.parametrize("contents", ["ranges", "whole", "links"])
def test_contents(server: CometServer, opened: Open, contents: str, tmp_path: Path) -> None:
    files: Files = {"a/b.txt": b"hello", "big": BIG, "empty": b""}
    server.add("bikes", files)  # type: ignore[arg-type]
    server.contents = contents
    first = opened(tmp_path / "cache")
    assert first.files(first.version()) == files
    if contents == "whole":  # without an ETag what one process saw pins nothing for another
        return
    sent = server.sent
    again = opened(tmp_path / "cache")
    assert again.files(again.version()) == files
    assert server.sent - sent < 16, "what is cached is not fetched again"
    offline = opened(tmp_path / "cache", offline=True)
    assert offline.files(offline.version()) == files
    with pytest.raises(OfflineError):
        offline.store.entities()


def test_a_large_file_is_read_in_parts(server: CometServer, shelf: Shelf) -> None:
    for contents in ("links", "ranges"):
        server.contents = contents
        server.add("bikes", {"big": os.urandom(30 << 20)})
        version = shelf.version()
        entry = shelf.store.tree.resolve(version.root, "big")
        assert isinstance(entry, Remote) and not shelf.reader.is_verified(entry)
        server.sent = 0
        with contextlib.closing(shelf.reader.open(entry)) as handle:
            data = next(iter(server.artifact("bikes").versions[-1].assets.values())).data
            assert handle.read(20 << 20, 1000) == data[20 << 20 :][:1000]
        assert server.sent < 6 << 20


def test_links_expire_and_are_renewed(server: CometServer, shelf: Shelf) -> None:
    server.contents = "links"
    server.add("bikes", {"big": BIG * 4, "small": b"x"})
    version = shelf.version()
    entry = shelf.store.tree.resolve(version.root, "big")
    assert isinstance(entry, Remote)
    with contextlib.closing(shelf.reader.open(entry)) as handle:
        assert handle.read(0, 100) == BIG[:100]
        server.links_revoked += 1  # all that were given
        assert handle.read(15 << 20, 100) == (BIG * 4)[15 << 20 :][:100]
    source = shelf.store.source(entry)
    stream = source.fetch(0, entry.size)
    got = next(stream)
    server.links_revoked += 1
    server.faults.cut_after, server.faults.cuts = 1 << 20, 1
    assert got + b"".join(stream) == BIG * 4, "in the middle of a read as well"
    server.link_life = -1.0
    server.links_revoked += 1
    with pytest.raises(NotPermittedError, match="expiry"):
        b"".join(shelf.store.source(entry).fetch(0, 10))


@pytest.mark.parametrize("contents", ["ranges", "links"])
def test_broken_connections_are_resumed(server: CometServer, shelf: Shelf, contents: str) -> None:
    server.contents = contents
    server.add("bikes", {"big": BIG})
    version = shelf.version()
    server.faults.cut_after, server.faults.cuts = 300_000, 3
    assert shelf.read(version, "big") == BIG


@pytest.mark.parametrize("contents", ["ranges", "whole", "links"])
@pytest.mark.parametrize("size", [10, len(BIG)])
def test_short_contents(server: CometServer, opened: Open, contents: str, size: int) -> None:
    shelf = opened(deadline=1.0)
    server.contents = contents
    server.add("bikes", {"f": BIG[:size]})
    version = shelf.version()
    server.faults.short = 3
    with pytest.raises((IntegrityError, NetworkError)):
        shelf.read(version, "f")
    server.faults.short = 0
    assert shelf.read(version, "f") == BIG[:size], "no error is remembered"


@pytest.mark.parametrize("size", [10, 3_000_000, len(BIG)])
def test_what_was_logged_here_is_compared(server: CometServer, opened: Open, tmp_path: Path, size: int) -> None:
    opened().log(write_files(tmp_path / "in", {"f": BIG[:size]}))
    server.faults.flip = frozenset({size - 1})
    shelf = opened()
    version = shelf.version()
    with pytest.raises(IntegrityError, match="BLAKE3"):
        shelf.read(version, "f")
    server.faults.flip = frozenset()
    shelf = opened()
    assert shelf.read(shelf.version(), "f") == BIG[:size]
    entry = shelf.store.tree.resolve(shelf.version().root, "f")
    assert isinstance(entry, Remote) and shelf.reader.is_verified(entry)
    asset = next(iter(server.artifact("bikes").versions[0].assets.values()))
    assert base64.b64decode(entry.digest).hex() == json.loads(asset.metadata or "")["artifactfs"]["blake3"]


@pytest.mark.parametrize("contents", ["ranges", "links"])
def test_what_others_logged_is_pinned(server: CometServer, opened: Open, contents: str, tmp_path: Path) -> None:
    server.contents = contents
    added = server.add("bikes", {"f": BIG})
    asset = next(iter(added.assets.values()))
    shelf = opened(tmp_path / "cache")
    entry = shelf.store.tree.resolve(shelf.version().root, "f")
    assert isinstance(entry, Remote) and entry.digest == ""
    with contextlib.closing(shelf.reader.open(entry)) as handle:
        assert handle.read(0, 10) == BIG[:10]
        asset.data = bytes(len(BIG))
        with pytest.raises(SourceChangedError):
            handle.read(4 << 20, 10)
    assert not shelf.reader.is_verified(entry)
    other = opened(tmp_path / "cache")
    assert other.read(other.version(), "f") == asset.data, "nothing of the one is mixed with the other"


def test_an_asset_that_is_gone(server: CometServer, opened: Open) -> None:
    shelf = opened(deadline=1.0)
    added = server.add("bikes", {"f": b"data", "g": b"data"})
    version = shelf.version()
    added.assets.pop(next(iter(added.assets)))
    with pytest.raises(ArtifactFSError):
        shelf.read(version, "f")
    assert shelf.read(version, "g") == b"data"


# Refusals and faults of the API


def test_key_that_is_taken_back(server: CometServer, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("bikes", {"f": b"data"})
    version = shelf.version()
    server.key = "another"
    for refused in (lambda: shelf.read(version, "f"), shelf.version, shelf.store.entities):
        with pytest.raises(NotPermittedError, match="COMET_API_KEY") as caught:
            refused()
        assert KEY not in str(caught.value)
    monkeypatch.setenv("COMET_API_KEY", "another")
    assert shelf.read(version, "f") == b"data", "a new key is taken by who is running"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_server(server: CometServer, shelf: Shelf, status: int) -> None:
    server.add("bikes", {"f": b"data"})
    server.faults.status, server.faults.statuses = status, 2
    assert shelf.read(shelf.version(), "f") == b"data"
    server.faults.status, server.faults.statuses, server.faults.retry_after = status, 1, "0"
    assert shelf.store.entities() == ["acme"]


def test_server_that_stays_busy(server: CometServer, opened: Open) -> None:
    shelf = opened(deadline=0.5)
    server.faults.status = 429
    with pytest.raises(NetworkError, match=r"429.*try again"):
        shelf.store.entities()
    server.faults.retry_after = "3600"
    with pytest.raises(NetworkError):
        shelf.store.entities()


@pytest.mark.parametrize("body", [b"<html>proxy</html>", b"", b"[]", b'{"artifactId": 3}', b"\xff", b"[" * 100_000])
def test_answers_that_are_none(server: CometServer, shelf: Shelf, body: bytes) -> None:
    server.faults.status, server.faults.body = 200, body
    with pytest.raises(NetworkError, match=r"not understood.*Comet server"):
        shelf.version()


def test_server_that_is_gone(server: CometServer, opened: Open) -> None:
    shelf = opened(deadline=0.5)
    server.stop()
    with pytest.raises(NetworkError):
        shelf.store.entities()


# Making versions


def test_round_trip(server: CometServer, opened: Open, tmp_path: Path) -> None:
    files: Files = {"a/b.txt": b"hello", "big": BIG, "none": b"", "run.sh": b"r", "link": "a/b.txt", "d/e": None, "ä ?&%#": b"u"}
    made = opened().log(
        write_files(tmp_path / "in", files),
        aliases=["best"],
        tags=["t"],
        metadata={"k": [1]},
        description="words",
        semver="0.1.0",
    )
    assert made.created and made.version.semver == "0.1.0"
    shelf = opened()
    version = shelf.version("best")
    assert shelf.files(version) == files
    assert (version.metadata, version.tags, version.description) == ({"k": [1]}, ["t"], "words")
    assert version.digest == made.version.digest and version.type == "dataset"
    entry = shelf.store.tree.resolve(version.root, "run.sh")
    assert isinstance(entry, Remote) and entry.executable
    [experiment] = server.experiments.values()
    assert not experiment.alive, "its experiment has ended"
    again = shelf.log(tmp_path / "in", aliases=["again"])
    assert (again.created, again.version.name) == (False, "v0"), "nothing has changed"
    assert shelf.version("again").name == "v0"
    assert shelf.log(tmp_path / "in", always=True).version.semver == "1.0.0"


def test_a_version_over_another(server: CometServer, shelf: Shelf, tmp_path: Path) -> None:
    """What is kept is sent again, with its metadata, and compared with what is known of it."""
    server.add("bikes", {"keep/a": b"a", "keep/b": BIG, "gone": b"g"}, asset_metadata={"keep/a": {"split": "x"}})

    class Changed:
        def __init__(self, base: Version) -> None:
            self.base = base.root

        def changes(self) -> Iterator[Any]:
            yield "gone", None
            yield "new", LocalFolder(str(write_files(tmp_path / "new", {"n": b"n"})))

    made = publish(shelf.store, shelf.draft(Changed(shelf.version())))
    found = shelf.files(made.version)
    assert json.loads(found.pop(".comet/assets.json") or b"")["assets"] == {"keep/a": {"split": "x"}}
    assert found == {"keep/a": b"a", "keep/b": BIG, "new/n": b"n"}
    entry = shelf.store.tree.resolve(made.version.root, "keep/b")
    assert isinstance(entry, Remote) and entry.digest, "from now on it is known"
    server.faults.flip = frozenset({0})
    with pytest.raises(IntegrityError):
        publish(shelf.store, shelf.draft(Changed(made.version), always=True))
    assert [version.state for version in server.artifact("bikes").versions] == ["CLOSED", "CLOSED", "ERROR"]


def test_references(server: CometServer, shelf: Shelf, shared_bucket: Bucket, tmp_path: Path) -> None:
    prefix = f"refs{next(_numbers)}"
    for name, data in {"a.bin": b"alpha", "b.bin": b"beta"}.items():
        shared_bucket.client.put_object(Bucket=shared_bucket.name, Key=f"{prefix}/{name}", Body=data)
    references = sorted(expand(f"s3://{shared_bucket.name}/{prefix}/", "remote"), key=lambda item: item.path)
    made = publish(shelf.store, shelf.draft(gather([], references))).version
    entry = shelf.store.tree.resolve(made.root, "remote/a.bin")
    assert entry == next(item.ref for item in references if item.path == "remote/a.bin")
    with contextlib.closing(shelf.reader.open(entry)) as handle:  # type: ignore[arg-type]
        assert handle.read(0, 100) == b"alpha"
    asset = next(asset for asset in server.closed("bikes")[0].assets.values() if asset.name == "remote/a.bin")
    assert asset.link == f"s3://{shared_bucket.name}/{prefix}/a.bin"
    assert json.loads(asset.metadata or "")["synced"] is True, "as Comet's client says it"
    assert shelf.store.tree.resolve(made.root, ".comet") is None
    shared_bucket.client.put_object(Bucket=shared_bucket.name, Key=f"{prefix}/b.bin", Body=b"BETA")
    entry = shelf.store.tree.resolve(made.root, "remote/b.bin")
    with contextlib.closing(shelf.reader.open(entry)) as handle, pytest.raises(SourceChangedError):  # type: ignore[arg-type]
        handle.read(0, 100)


def test_what_a_commit_refuses(server: CometServer, shelf: Shelf, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", {"f": b"1"})
    shelf.log(folder, type="model", semver="1.0.0")
    (folder / "f").write_bytes(b"2")
    for fields, error in (
        ({"type": "dataset"}, UsageError),
        ({"semver": "1.0.0"}, ConflictError),
        ({"aliases": ["1.0.0"]}, ConflictError),
        ({"expect_base": 3}, ConflictError),
        ({"expect_base": -1}, ConflictError),
        ({"ttl": 5}, UsageError),
        ({"algorithm": "MD5"}, UsageError),
        ({"name": parse("acme/vision/" + "n" * 101)}, UsageError),
        ({"name": parse("nobody/vision/bikes")}, UsageError),
    ):
        with pytest.raises(error):
            shelf.log(folder, **fields)  # type: ignore[arg-type]
    (folder / ".comet").mkdir()
    (folder / ".comet" / "assets.json").write_text("{")
    with pytest.raises(UsageError, match=r"assets\.json"):
        shelf.log(folder)
    assert [version.state for version in server.artifact("bikes").versions] == ["CLOSED"], "nothing was begun"
    with pytest.raises(UsageError, match="cannot delete"):
        shelf.store.delete_version(parse(f"{NAME}:v0"))


def test_a_file_that_changes_while_it_is_sent(
    server: CometServer, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_files(tmp_path / "in", {"f": b"1" * 100})
    begin = CometClient.begin

    def changing(*arguments: Any) -> Any:
        (folder / "f").write_bytes(b"2" * 100)
        return begin(*arguments)

    monkeypatch.setattr(CometClient, "begin", changing)
    with pytest.raises(ConflictError, match="has changed while"):
        shelf.log(folder)
    assert [(version.state, len(version.assets)) for version in server.artifact("bikes").versions] == [("ERROR", 0)]


_STEPS = [
    "logger/add/run",
    "artifacts/get",
    "artifacts/upsert",
    "asset/upload",
    "assets/remote",
    "artifacts/state",
    "version/labels",
]


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("step", _STEPS)
def test_a_commit_that_fails_is_repeated(server: CometServer, opened: Open, tmp_path: Path, step: str, drop: bool) -> None:
    """Wherever the server fails, or its answer is lost, the repetition makes one version of it, whole, with its alias."""
    folder = write_files(tmp_path / "in", {"a": b"1", "b": b"2", "c": b"3" * 3000})
    references = list(expand("https://example.com/x", "ref", checksum=False))
    shelf = opened(deadline=0.3)
    draft = shelf.draft(gather([str(folder)], references), aliases=["best"], always=True)
    server.faults.only = step
    if drop:
        server.faults.drop = 100
    else:
        server.faults.status = 503
    with contextlib.suppress(NetworkError):
        publish(shelf.store, draft)
    assert all(version.state != "CLOSED" or len(version.assets) == 4 for version in server.closed("bikes"))
    server.faults.status = server.faults.drop = 0
    again = opened()
    made = publish(again.store, dataclasses.replace(draft, retry=True)).version
    assert len(server.closed("bikes")) == 1
    assert again.version("best").semver == made.semver
    assert again.files(made) == {"a": b"1", "b": b"2", "c": b"3" * 3000, "ref": "https://example.com/x"}


class _Died(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("request_number", range(1, 12))
def test_a_commit_that_dies_is_repeated(
    server: CometServer, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_number: int
) -> None:
    """Before each request, and with it carried out but its answer never seen."""
    folder = write_files(tmp_path / "in", {"a": b"1", "b": b"2"})
    for dies_after in (False, True):
        shelf = opened()
        draft = shelf.draft(folder, aliases=["best"], always=True, name=parse(f"acme/vision/n{dies_after}"))
        call, numbers = http.call, itertools.count(1)

        def dying(*arguments: Any, call: Any = call, numbers: Any = numbers, after: bool = dies_after, **options: Any) -> Any:
            at = next(numbers)
            if at > request_number or (at == request_number and not after):
                raise _Died
            answer = call(*arguments, **options)
            if at == request_number:
                raise _Died
            return answer

        with monkeypatch.context() as patched, contextlib.suppress(_Died):
            patched.setattr(http, "call", dying)
            publish(shelf.store, draft)
        name = draft.name
        assert all(len(version.assets) == 2 for version in server.closed(name.collection)), "none is closed that is not whole"
        again = opened()
        made = publish(again.store, dataclasses.replace(draft, retry=True)).version
        assert len(server.closed(name.collection)) == 1
        assert again.files(again.version("best", name.path)) == {"a": b"1", "b": b"2"}
        assert again.version(name=name.path).semver == made.semver


def test_what_was_begun_with_other_files_is_given_up(server: CometServer, opened: Open, tmp_path: Path) -> None:
    """A stage may be changed between two attempts at its commit: the second version has nothing of the first."""
    folder = write_files(tmp_path / "in", {"a": b"1", "b": b"2"})
    shelf = opened(deadline=0.3)
    draft = shelf.draft(folder)
    server.faults.only, server.faults.status = "artifacts/state", 503
    with pytest.raises(NetworkError):
        publish(shelf.store, draft)
    server.faults.status = 0
    (folder / "a").write_bytes(b"other")
    again = opened()
    publish(again.store, dataclasses.replace(draft, retry=True))
    assert again.files(again.version()) == {"a": b"other", "b": b"2"}
    assert [version.state for version in server.artifact("bikes").versions] == ["ERROR", "CLOSED"]


def test_only_an_upsert_is_never_repeated_blindly(server: CometServer, monkeypatch: pytest.MonkeyPatch) -> None:
    client = CometClient(server.url, 2.0)
    client.begin("x" * 32, "acme", "vision")
    server.faults.drop = 1
    with pytest.raises(UnknownOutcomeError):
        client.upsert("bikes", "dataset", "x" * 32, None, None, [], [])
    assert len(server.artifact("bikes").versions) == 1


# Changing


def test_labels(server: CometServer, shelf: Shelf) -> None:
    server.add("bikes", {"f": b"1"}, aliases=["a", "b"], metadata={"rows": 1})
    server.add("bikes", {"f": b"2"}, aliases=["c"])
    store, name = shelf.store, parse(NAME)

    def aliased(**aliases: int) -> Any:
        return lambda it: msgspec.structs.replace(it, aliases={"latest": it.aliases["latest"], **aliases})

    assert store.update_collection(name, aliased(a=1, b=0, d=0)).aliases == {"latest": 1, "a": 1, "b": 0, "d": 0}
    assert [sorted(version.aliases) for version in server.artifact("bikes").versions] == [["b", "d"], ["Latest", "a"]]
    store.update_collection(name, lambda it: msgspec.structs.replace(it, tags=["x"], type="model"))
    assert (server.artifact("bikes").tags, shelf.version().type) == (["x"], "model")
    changed = store.update_version(
        name.at("v0"), lambda it: msgspec.structs.replace(it, tags=["t"], metadata={"k": 2}, description="words")
    )
    assert (changed.tags, changed.metadata, changed.description) == (["t"], {"k": 2}, "words")
    assert shelf.version("v0") == changed
    for change in ({"description": "x"}, {"aliases": {"latest": 0}}):
        with pytest.raises(UsageError, match="cannot"):
            store.update_collection(name, lambda it, change=change: msgspec.structs.replace(it, **change))  # type: ignore[misc]
    with pytest.raises(UsageError, match="ttl"):
        store.update_version(name.at("v0"), lambda it: msgspec.structs.replace(it, ttl=5))
    with pytest.raises(NotFoundError):
        store.update_collection(name, aliased(z=9))


# Mounts


def same(one: Path, other: Path) -> bool:
    return subprocess.run(["diff", "-r", "--no-dereference", one, other], check=False).returncode == 0


@needs_fuse
@pytest.mark.fuse
@pytest.mark.parametrize("contents", ["ranges", "links"])
def test_mount(server: CometServer, opened: Open, world: World, tmp_path: Path, contents: str) -> None:  # noqa: F811
    server.contents = contents
    files: Files = {"a/b.txt": b"hello", "big": BIG, "none": b"", "run.sh": b"r", "link": "a/b.txt", "d/e": None}
    folder = write_files(tmp_path / "in", files)
    opened().log(folder)
    mounted = world.mount(f"{NAME}:1.0.0")
    assert same(folder, mounted)
    assert os.access(mounted / "run.sh", os.X_OK) and not os.access(mounted / "a" / "b.txt", os.X_OK)
    assert os.getxattr(mounted / "big", "user.artifactfs.verified") == b"true"
    server.add("bikes", {"f": BIG})
    mounted = world.mount(NAME)
    assert sorted(os.listdir(mounted)) == ["1.0.0", "2.0.0", "latest", "v0", "v1"]
    assert (mounted / "latest" / "f").read_bytes() == BIG
    assert os.getxattr(mounted / "v1" / "f", "user.artifactfs.verified") == b"false", "nobody told what it should be"


@needs_fuse
@pytest.mark.fuse
def test_key_that_is_taken_back_from_a_mount(
    server: CometServer,
    world: World,  # noqa: F811
    isolated_home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("COMET_API_KEY")
    config = isolated_home / ".comet.config"
    config.write_text(f"[comet]\napi_key={KEY}\n")
    server.add("bikes", {"f": b"data", "g": b"more"})
    mounted = world.mount(f"{NAME}:latest")
    assert (mounted / "f").read_bytes() == b"data"
    server.key = "another"
    with pytest.raises(PermissionError):
        (mounted / "g").read_bytes()
    assert (mounted / "f").read_bytes() == b"data" and os.listdir(mounted)
    config.write_text("[comet]\napi_key=another\n")
    assert (mounted / "g").read_bytes() == b"more"


@needs_fuse
@pytest.mark.fuse
def test_stage_and_commit(server: CometServer, opened: Open, world: World, afs: Program, tmp_path: Path) -> None:  # noqa: F811
    server.add("bikes", {"keep": b"k", "change": b"old", "drop": b"d"}, asset_metadata={"keep": {"split": "x"}})
    staged = world.stage(NAME)
    (staged / "change").write_bytes(b"new")
    (staged / "drop").unlink()
    (staged / "made").mkdir()
    (staged / "made" / "f").write_bytes(BIG)
    assert {row["path"] for row in afs("status", staged, "--json").document} == {"change", "drop", "made", "made/f"}
    assert afs("unmount", staged).out.strip() == f"{NAME}:v1"
    shelf = opened()
    found = shelf.files(shelf.version("2.0.0"))
    assert json.loads(found.pop(".comet/assets.json") or b"")["assets"] == {"keep": {"split": "x"}}
    assert found == {"keep": b"k", "change": b"new", "made/f": BIG}
    assert len(server.closed("bikes")) == 2


@needs_fuse
@pytest.mark.fuse
def test_a_stage_outlives_its_server(server: CometServer, opened: Open, world: World, afs: Program) -> None:  # noqa: F811
    staged = world.stage(NAME, type="dataset")
    (staged / "f").write_bytes(b"data")
    server.faults.status, server.faults.body, server.faults.only = 400, b'{"msg": "maintenance"}', "write/"
    assert "maintenance" in afs("unmount", staged, code=2).err
    server.faults.status = 0
    assert afs("commit", "--resume", staged).out.strip() == f"{NAME}:v0"
    shelf = opened()
    assert shelf.files(shelf.version()) == {"f": b"data"}


@needs_fuse
@pytest.mark.fuse
def test_documented_commands(server: CometServer, afs: Program, tmp_path: Path) -> None:
    server.add("bikes", {"f": b"data"}, version="1.2.0")
    write_files(tmp_path / "data", {"f": b"more"})
    for name in ("bikes", "work"):
        (tmp_path / name).mkdir()
    page = Path(__file__).parents[1] / "docs" / "comet.md"
    [block] = re.findall(r"^```shell\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    for line in block.splitlines():
        afs(*shlex.split(line, comments=True)[1:])
    (tmp_path / "work" / "g").write_bytes(b"g")
    for name in ("bikes", "work"):
        afs("unmount", name)
    assert [version.version for version in server.closed("bikes")] == ["1.2.0", "2.0.0", "3.0.0"]


def test_commands(server: CometServer, afs: Program, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", {"a/b.txt": b"hello", "c": b"c"})
    assert afs("log", NAME, folder, "--alias", "best", "--json").document["semver"] == "1.0.0"
    assert afs("ls").code == 0 and "bikes" in afs("ls", "acme/vision").out
    afs("get", f"{NAME}:best", "got")
    assert same(folder, tmp_path / "got")
    assert afs("verify", f"{NAME}:1.0.0", "got").code == 0
    (tmp_path / "got" / "c").write_bytes(b"x")
    assert afs("verify", f"{NAME}:1.0.0", "got", code=6).code == 6
    afs("alias", f"{NAME}:best", "add", "prod")
    afs("tag", f"{NAME}:v0", "add", "checked")
    document = afs("info", f"{NAME}:prod", "--json").document
    assert (document["aliases"], document["tags"], document["size"]) == (["best", "latest", "prod"], ["checked"], 6)
    assert [row["version"] for row in afs("versions", NAME, "--json").document] == ["v0"]
    assert "artifact server" in afs("gc", code=2).err
    assert "the key may see 1 entities" in afs("doctor", code=None).out
    server.key = "another"
    assert KEY not in afs("ls", code=7).err
