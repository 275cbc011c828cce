"""Copies between stores of different kinds: what arrives, what is not passed on, and what a second attempt does."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import random
import re
import secrets
import shlex
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash
from comet_server import KEY as COMET_KEY
from comet_server import CometServer
from programs import Program
from serving_fixture import run_client
from shelves import until, write_files
from wandb_server import KEY as WANDB_KEY
from wandb_server import WandbServer, b64md5

from artifactfs import copying
from artifactfs.cache import BlockCache
from artifactfs.copying import Copied
from artifactfs.errors import IntegrityError, NetworkError
from artifactfs.folders import LocalFolder
from artifactfs.model import BLAKE3, BLOCK, MD5, XXH128, File, Ref, Run, Symlink, Version
from artifactfs.names import LATEST, ArtifactName, parse
from artifactfs.publish import Draft, Progress, publish
from artifactfs.reader import Reader
from artifactfs.store import Store
from artifactfs.store.comet.store import CometStore
from artifactfs.store.urls import open_store
from artifactfs.store.wandb import saving

NAME = parse("acme/vision/bikes")
LARGE = random.Random(1).randbytes(5 * BLOCK + 77)
PLAIN: dict[str, bytes | str | None] = {
    "a.txt": b"alpha\n",
    "again.txt": b"alpha\n",
    "deep/er/b.bin": bytes(range(256)) * 40,
    "deep-er": b"between",
    "empty.txt": b"",
    "large.bin": LARGE,
    "ä ö/x#y?.txt": b"odd",
}
"""What every kind of store can hold."""
FULL = {**PLAIN, "bin/run.sh": b"#!/bin/sh\n", "empty-dir": None, "link": "a.txt"}

Server = WandbServer | CometServer


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Server]]:
    """Starts a server of a kind: ``wandb`` or ``comet``."""
    monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
    monkeypatch.setenv("COMET_API_KEY", COMET_KEY)
    with contextlib.ExitStack() as stack:

        def start(kind: str) -> Server:
            if kind == "comet":
                return stack.enter_context(CometServer())
            server = WandbServer().start()
            stack.callback(server.stop)
            return server

        yield start


class Place:
    """A store of a kind, with the server behind it, if any."""

    def __init__(self, kind: str, url: str, cache: BlockCache, server: Any = None) -> None:
        self.kind, self.url, self.cache, self.server = kind, url, cache, server
        self.store: Store = open_store(url, cache)

    def anew(self) -> Store:
        """The store as another process sees it."""
        self.store = open_store(self.url, self.cache)
        return self.store

    def log(self, files: dict[str, Any] | Any, **fields: Any) -> Version:
        """The next version of NAME, with just these files."""
        folder: Any = files
        if isinstance(files, dict):
            folder = LocalFolder(str(write_files(self.cache.root.parent / secrets.token_hex(4), files)))
        given = {"name": NAME, "type": "dataset", "commit": secrets.token_hex(16), "always": True, **fields}
        return publish(self.store, Draft(folder=folder, **given)).version

    def contents(self, alias: str = LATEST, name: ArtifactName = NAME) -> dict[str, Any]:
        """What is in a version, in the form of ``write_files``; references by their URI behind a star."""
        version = self.store.version(name.at(alias))
        found: dict[str, Any] = {}
        reader = Reader(self.store, self.cache)
        with contextlib.closing(reader):
            for path, entry in self.store.tree.walk(version.root):
                if isinstance(entry, File):
                    with contextlib.closing(reader.open(entry, path)) as handle:
                        found[path] = handle.read(0, entry.size)
                elif isinstance(entry, Symlink):
                    found[path] = entry.target
                elif isinstance(entry, Ref):
                    found[path] = f"*{entry.uri}"
                elif path and entry.page is None:
                    found[path] = None
        return found


NewPlace = Callable[[str], Place]


@pytest.fixture
def place_of(servers: Callable[[str], Server], tmp_path: Path) -> Iterator[NewPlace]:
    """Makes a store of a kind: ``native``, ``wandb`` or ``comet``."""
    made = []

    def place(kind: str) -> Place:
        number = len(made)
        cache = BlockCache(tmp_path / f"p{number}" / "cache", 1 << 30)
        if kind == "native":
            made.append(Place(kind, str(tmp_path / f"store-{number}"), cache))
        else:
            server = servers(kind)
            url = server.url if isinstance(server, WandbServer) else f"comet://{server.host}"
            made.append(Place(kind, url, cache, server))
        return made[-1]

    yield place
    for it in made:
        it.cache.close()


class Copying:
    """What a copy gave."""

    def __init__(self, source: Place, target: Place, name: ArtifactName = NAME, **options: bool) -> None:
        self.warned: list[str] = []
        self.last = Progress()
        self.copied: list[Copied] = copying.copy(
            source.store, target.store, name, self._report, cache=source.cache, warn=self.warned.append, **options
        )

    def _report(self, done: Progress) -> None:
        self.last = Progress(done.files, done.bytes, done.stored)

    @property
    def created(self) -> list[bool]:
        return [it.created for it in self.copied]

    @property
    def names(self) -> list[str]:
        return [it.version.name for it in self.copied]


def held(kind: str, files: dict[str, Any]) -> dict[str, Any]:
    """What a store of a kind has of files."""
    if kind == "wandb":
        return {path: data for path, data in files.items() if isinstance(data, bytes)}
    return files


def puts(server: WandbServer) -> list[str]:
    """The contents that were sent, by their MD5s."""
    return [path.partition("?")[0] for method, path, _ in server.log if method == "PUT" and "/manifest" not in path]


# Everything, in every direction

DIRECTIONS = [
    (one, other)
    for one in ("native", "wandb", "comet")
    for other in ("native", "wandb", "comet")
    if (one, other) != ("native",) * 2
]


@pytest.mark.parametrize(("one", "other"), DIRECTIONS)
def test_a_collection(place_of: NewPlace, one: str, other: str) -> None:
    source, target = place_of(one), place_of(other)
    first = held(one, FULL)
    second = {**first, "n": b"2", "a.txt": b"changed\n", "deep/new": b"new"}
    del second["again.txt"]
    third = {**second, "n": b"3"}
    source.log(first, metadata={"n": [1, None]}, tags=["x", "y z"], description="what", aliases=["old"])
    source.log(second, metadata={"n": 2}, aliases=["best", "now"])
    source.log(third)
    source.store.update_collection(NAME, lambda it: msgspec.structs.replace(it, tags=["t"]))
    if one != "comet":
        source.store.update_collection(NAME, lambda it: msgspec.structs.replace(it, description="about"))
    result = Copying(source, target)
    assert (result.names, result.created) == (["v0", "v1", "v2"], [True] * 3)
    for alias, files in (("v0", first), ("v1", second), ("v2", third)):
        ours, theirs = target.store.version(NAME.at(alias)), source.store.version(NAME.at(alias))
        assert target.contents(alias) == held(other, files)
        for field in ("type", "metadata", "description"):
            assert getattr(ours, field) == getattr(theirs, field)
        assert sorted(ours.tags) == sorted(theirs.tags)
        if one == "wandb" and other != "comet":
            assert ours.digest == theirs.digest
    collection, original = target.store.collection(NAME), source.store.collection(NAME)
    aliases = {alias: number for alias, number in collection.aliases.items() if "." not in alias}
    assert aliases == original.aliases == {"old": 0, "best": 1, "now": 1, LATEST: 2}
    assert collection.tags == ["t"]
    if other != "comet":
        assert collection.description == original.description
    warned = result.warned
    expected = []
    if one != "wandb" and other == "wandb":
        expected.append("acme/vision/bikes:v0: not carried over to [^ ]+: 1 executable bit, 1 empty directory, 1 symlink")
    if one != "comet" and other == "comet":
        expected.append("acme/vision/bikes: not carried over to [^ ]+: the collection's description")
    assert all(re.fullmatch(*pair) for pair in zip(expected, warned, strict=True)), warned

    # Once more: nothing is made, and nothing is sent.
    before = len(puts(target.server)) if other == "wandb" else 0
    source.anew(), target.anew()
    again = Copying(source, target)
    assert (again.created, again.last.stored, again.last.bytes) == ([False] * 3, 0, 0)
    assert other != "wandb" or len(puts(target.server)) == before

    # One more version, over the copy of the one before.
    source.log({**third, "n": b"4444"})
    result = Copying(source, target)
    assert result.created == [False] * 3 + [True]
    if other != "comet":
        assert (result.last.files, result.last.stored) == (1, 4)
    assert target.contents() == held(other, {**third, "n": b"4444"})

    # And back to where it is from: it is known there.
    back = Copying(target, source)
    assert back.created == [False] * 4
    assert len(source.anew().versions(NAME)) == 4


def _changed(files: dict[str, Any], random: random.Random) -> dict[str, Any]:
    """Some names get another content, or become something else: a file, a link, a directory, nothing."""
    changed = dict(files)
    for _ in range(4):
        name = random.choice("abcd")
        for path in [path for path in changed if path == name or path.startswith(f"{name}/")]:
            del changed[path]
        match random.randrange(6):
            case 0 | 1:
                changed[name] = random.randbytes(random.choice([0, 5, 3000]))
            case 2:
                changed[name] = random.choice(["a", "nowhere"])
            case 3:
                changed[name] = None
            case 4:
                changed[f"{name}/x"] = random.choice([random.randbytes(10), "../a", None])
                changed[f"{name}/y/z"] = b"deep"
    return changed or {"a": b""}


@pytest.mark.parametrize(("one", "other"), [("native", "wandb"), ("native", "comet"), ("comet", "native"), ("wandb", "native")])
def test_what_becomes_of_a_path(place_of: NewPlace, one: str, other: str) -> None:
    """Copies are made over older ones: nothing of these may stay that should not."""
    source, target = place_of(one), place_of(other)
    numbers = random.Random(7)
    files: dict[str, Any] = {"a": b"1", "b/c": b"2", "keep": b"3"}
    logged = []
    for _ in range(8):
        logged.append({**_changed(files, numbers), "keep": b"3"})
        files = logged[-1]
        source.log(held(one, files))
    Copying(source, target)
    for number, expected in enumerate(logged):
        assert target.contents(f"v{number}") == held(other, held(one, expected))


@pytest.mark.parametrize("kind", ["wandb", "comet"])
def test_a_round_trip_through_a_server_to_another_store(place_of: NewPlace, kind: str) -> None:
    """A team leaves, and comes back elsewhere."""
    first, between, last = place_of("native"), place_of(kind), place_of("native")
    version = first.log(FULL, algorithm=MD5, aliases=["best"], metadata={"k": {"deep": 1}})
    Copying(first, between)
    Copying(between, last)
    assert last.contents("best") == held(kind, FULL)
    if kind == "wandb":
        assert between.store.version(NAME).digest == version.digest == last.store.version(NAME).digest
        assert last.store.version(NAME).algorithm == MD5
    else:
        assert last.store.version(NAME).root.digest == version.root.digest
    assert last.store.version(NAME).metadata == {"k": {"deep": 1}}


def test_digests_that_w_and_b_cannot_compute(place_of: NewPlace) -> None:
    """It gets MD5s of the same bytes; nothing is claimed to be what it is not."""
    source, target = place_of("native"), place_of("wandb")
    source.log(held("wandb", PLAIN), algorithm=XXH128)
    Copying(source, target)
    (artifact,) = target.server.artifacts.values()
    assert {path: entry["digest"] for path, entry in artifact.contents.items()} == {
        path: b64md5(data) for path, data in PLAIN.items() if isinstance(data, bytes)
    }


def test_xxh128_files_of_w_and_b(place_of: NewPlace) -> None:
    """They keep it in a native store, and the version its digest."""
    source, target = place_of("wandb"), place_of("native")

    def tagged(manifest: Any) -> None:
        digest = base64.b64encode(xxhash.xxh3_128(b"data").digest()).decode()
        whole = xxhash.xxh3_128(f"wandb-artifact-manifest-v1\nf:{digest}\n".encode()).hexdigest()
        artifact = manifest["contents"]["f"]["birthArtifactID"]
        source.server.blobs[f"{artifact}/{digest.replace('/', '_')}"] = b"data"
        source.server.artifacts[artifact].digest = whole
        manifest["contents"]["f"].update(digest=digest, extra={"alg": "XXH128"})

    logged = source.server.log_version(NAME.path, {"f": b"data"}, manifest=tagged)
    Copying(source, target)
    version = target.store.version(NAME)
    entry = target.store.tree.resolve(version.root, "f")
    assert isinstance(entry, File)
    assert (version.algorithm, entry.algorithm, version.digest) == (XXH128, XXH128, logged.digest)
    assert target.contents() == {"f": b"data"}


def test_references_stay_references(place_of: NewPlace) -> None:
    """They are not read: nobody is there. One to a file of another version is that file."""
    source = place_of("wandb")
    other = source.server.log_version("acme/vision/other", {"inner.bin": b"shared"})
    contents = {
        "s3/x": {"digest": "etag1", "ref": "s3://nowhere/x", "size": 3, "extra": {"etag": "etag1", "versionID": "v"}},
        "web": {"digest": "https://127.0.0.1:9/y", "ref": "https://127.0.0.1:9/y", "size": 0},
    }
    shared = {
        "digest": b64md5(b"shared"),
        "ref": f"wandb-artifact://{base64.b64decode(other.id).hex()}/inner.bin",
        "size": 0,
    }

    def change(manifest: Any) -> None:
        manifest["contents"].update(contents)
        manifest["contents"]["outer.bin"] = shared

    logged = source.server.log_version(NAME.path, {"a": b"1"}, manifest=change)
    logged.digest = digest_of(logged.contents)
    expected = {"a": b"1", "outer.bin": b"shared", "s3/x": "*s3://nowhere/x", "web": "*https://127.0.0.1:9/y"}
    native, again = place_of("native"), place_of("wandb")
    for one, another in ((source, native), (native, again)):
        Copying(one, another)
        assert another.contents() == expected
        entry = another.store.tree.resolve(another.store.version(NAME).root, "s3/x")
        assert isinstance(entry, Ref) and (entry.digest, entry.extra, entry.size) == (
            "etag1",
            {"etag": "etag1", "versionID": "v"},
            3,
        )
        assert another.store.version(NAME).digest == logged.digest


def digest_of(contents: dict[str, Any]) -> str:
    lines = "".join(f"{path}:{contents[path]['digest']}\n" for path in sorted(contents))
    return hashlib.md5(f"wandb-artifact-manifest-v1\n{lines}".encode()).hexdigest()


def test_times_to_live(place_of: NewPlace) -> None:
    native, wandb, comet = place_of("native"), place_of("wandb"), place_of("comet")
    native.log({"a": b"1"}, ttl=1000)
    native.log({"a": b"2"})
    native.log({"a": b"3"}, inherit_ttl=False)
    Copying(native, wandb)
    assert [(it.ttl, it.ttl_inherited) for it in wandb.store.versions(NAME)] == [(1000, False), (None, True), (None, False)]
    assert Copying(native, comet).warned == [f"acme/vision/bikes:v0: not carried over to {comet.store.url}: its time to live"]


def test_gaps_and_latest(place_of: NewPlace) -> None:
    """A server gives its own numbers; aliases are on the same versions."""
    source, target, back = place_of("native"), place_of("wandb"), place_of("native")
    for number in range(4):
        source.log({"n": b"%d" % number}, aliases=[f"a{number}"])
    source.store.delete_version(NAME.at("v1"), delete_aliases=True)
    assert Copying(source, target).names == ["v0", "v1", "v2"]
    assert target.store.collection(NAME).aliases == {"a0": 0, "a2": 1, "a3": 2, LATEST: 2}
    target.store.update_collection(NAME, lambda it: msgspec.structs.replace(it, aliases={**it.aliases, LATEST: 0}))
    Copying(target, back)
    assert back.store.version(NAME).name == "v0"
    assert back.contents() == {"n": b"0"}


def test_one_version_over_the_copy_of_an_older_one(place_of: NewPlace) -> None:
    source, target = place_of("native"), place_of("wandb")
    source.log(PLAIN)
    source.log({**PLAIN, "n": b"new"}, aliases=["best"])
    Copying(source, target, NAME.at("v0"))
    source.anew(), target.anew()
    result = Copying(source, target, NAME.at("best"))
    assert (result.names, result.last.files, result.last.stored) == (["v1"], 1, 3)
    assert target.contents("best") == {**PLAIN, "n": b"new"}


def test_versions_that_w_and_b_would_take_for_one(place_of: NewPlace) -> None:
    """The same paths and digests, twice: they stay two."""
    source, target = place_of("native"), place_of("wandb")
    source.log({"a": b"1"}, aliases=["one"])
    source.log({"a": b"2"})
    source.log({"a": b"1"}, aliases=["three"])
    assert Copying(source, target).created == [True] * 3
    assert target.store.collection(NAME).aliases == {"one": 0, "three": 2, LATEST: 2}
    assert Copying(source, target).created == [False] * 3


def test_semantic_versions(place_of: NewPlace) -> None:
    """W&B has them as aliases; from there they are semantic versions again where there are such."""
    one, wandb, other, native = place_of("comet"), place_of("wandb"), place_of("comet"), place_of("native")
    one.log({"a": b"1"}, semver="1.0.0")
    one.log({"a": b"2"}, semver="1.1.0", aliases=["best"])
    Copying(one, wandb)
    assert wandb.contents("1.0.0") == {"a": b"1"} and wandb.contents("1.1.0") == {"a": b"2"}
    Copying(wandb, other)
    assert [it.semver for it in other.store.versions(NAME)] == ["1.0.0", "1.1.0"]
    Copying(one, native)
    assert [it.semver for it in native.store.versions(NAME)] == ["1.0.0", "1.1.0"]
    assert native.contents("best") == {"a": b"2"}


# Links and lineage


def test_links_and_runs(place_of: NewPlace) -> None:
    source, target, last = place_of("native"), place_of("native"), place_of("wandb")
    run = Run(
        entity="acme",
        project="vision",
        id="r1",
        name="train",
        config={"lr": 1},
        created_at="2026-01-01T00:00:00.000000Z",
        updated_at="2026-01-01T00:00:00.000000Z",
    )
    user = msgspec.structs.replace(run, id="r2", job_type="eval")
    version = source.log({"a": b"1"}, run=run.path)
    source.store.save_run(msgspec.structs.replace(run, logged=[version.qualified_name, "acme/vision/elsewhere:v7"]))
    source.store.save_run(msgspec.structs.replace(user, used=[version.qualified_name]))
    source.store.mark_used(version, user)
    source.store.link(version, parse("acme/vision/approved"), ["p"], description="good ones")
    for _ in range(2):
        Copying(source, target)
        ours = target.store.version(NAME)
        assert target.store.run("acme", "vision", "r1").logged == [ours.qualified_name]
        assert target.store.run("acme", "vision", "r1").config == {"lr": 1}
        assert [(it.id, it.used, it.job_type) for it in target.store.used_by(ours)] == [("r2", [ours.qualified_name], "eval")]
        portfolio = target.store.collection(parse("acme/vision/approved"))
        assert (portfolio.aliases, portfolio.description) == ({LATEST: 0, "p": 0}, "good ones")
    for _ in range(2):
        assert Copying(source, last).warned == []
        linked = last.store.version(parse("acme/vision/approved:p"))
        assert linked.origin.qualified_name == "acme/vision/bikes:v0"
        theirs = last.store.version(NAME)
        assert (theirs.run, [it.path for it in last.store.used_by(theirs)]) == (run.path, [user.path])
        assert last.store.run("acme", "vision", "r1").config == {"lr": 1}
    assert last.server.asked.count("UpsertBucket") == 2  # the second time both are there
    comet = place_of("comet")
    assert Copying(source, comet).warned == [
        f"acme/vision/bikes:v0: not carried over to {comet.store.url}: 1 link to it, 1 run that used it"
    ]


def test_runs_of_w_and_b_in_a_native_store(place_of: NewPlace) -> None:
    source, target = place_of("wandb"), place_of("native")
    logged = source.server.log_version(NAME.path, {"a": b"1"})
    logged.digest = digest_of(logged.contents)
    logged.run = "made-it"
    logged.used = [("acme", "vision", "used-it"), ("acme", "other", "far")]
    Copying(source, target)
    version = target.store.version(NAME)
    assert version.run == "acme/vision/made-it"
    assert target.store.run("acme", "vision", "made-it").logged == [version.qualified_name]
    assert [run.path for run in target.store.used_by(version)] == ["acme/other/far", "acme/vision/used-it"]


def test_a_portfolio_is_copied_as_a_collection(place_of: NewPlace) -> None:
    """Beside that of its members, whose versions are others there."""
    source, target = place_of("native"), place_of("wandb")
    version = source.log({"a": b"1"})
    portfolio = parse("acme/vision/approved")
    source.store.link(version, portfolio, ["p"])
    Copying(source, target, portfolio)
    assert target.contents("p", portfolio) == {"a": b"1"}
    assert not target.store.collection(portfolio).is_portfolio
    result = Copying(source, target)
    assert result.created == [True] and "1 link to it" in result.warned[0]
    assert [Copying(source, target, name).created for name in (portfolio, NAME)] == [[False], [False]]


# What is damaged is not passed on


@pytest.mark.parametrize("path", ["a.txt", "large.bin"])
@pytest.mark.parametrize("other", ["native", "wandb", "comet"])
def test_damage_at_w_and_b(place_of: NewPlace, path: str, other: str) -> None:
    source, target = place_of("wandb"), place_of(other)
    source.log(PLAIN)
    wanted = b64md5(PLAIN[path]).replace("/", "_")  # type: ignore[arg-type]
    for place, data in list(source.server.blobs.items()):
        if place.endswith(wanted):
            source.server.blobs[place] = data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(IntegrityError, match="is not what was recorded"):
        Copying(source, target)
    assert target.store.newest(NAME) is None


@pytest.mark.parametrize("other", ["wandb", "comet"])
@pytest.mark.parametrize("size", [100, 3 * BLOCK])
def test_damage_in_a_native_store(place_of: NewPlace, other: str, size: int) -> None:
    source, target = place_of("native"), place_of(other)
    data = random.Random(2).randbytes(size)
    source.log({"data": data})
    for path in (Path(source.url) / ("blobs" if size > BLOCK else "packs")).rglob("*"):
        if path.is_file() and (at := path.read_bytes().find(data[:50])) >= 0:
            path.chmod(0o600)
            with path.open("r+b") as file:
                file.seek(at + size - 1)
                file.write(bytes([data[-1] ^ 1]))
    with pytest.raises(IntegrityError):
        Copying(Place("native", source.url, source.cache), target)
    assert target.store.newest(NAME) is None


@pytest.mark.parametrize("other", ["native", "wandb", "comet"])
def test_a_list_of_files_that_is_not_the_one_that_was_logged(place_of: NewPlace, other: str) -> None:
    source, target = place_of("wandb"), place_of(other)

    def change(manifest: Any) -> None:
        del manifest["contents"]["b"]

    logged = source.server.log_version(NAME.path, {"a": b"1", "b": b"2"}, manifest=change)
    logged.digest = digest_of({"a": {"digest": b64md5(b"1")}, "b": {"digest": b64md5(b"2")}})
    with pytest.raises(IntegrityError, match="its list of files another one"):
        Copying(source, target)
    assert target.store.newest(NAME) is None

    copying = Copying(source, target, new_digests=True)
    assert copying.created == [True]
    assert any(f"the digest {logged.digest}, which is not that of its list of files" in line for line in copying.warned)
    if other != "comet":
        assert copying.copied[0].version.digest == digest_of({"a": {"digest": b64md5(b"1")}})
    assert Copying(source, target, new_digests=True).created == [False]


def test_a_server_that_loses_a_file_of_the_list(place_of: NewPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says of the copy is looked at."""
    source, target = place_of("native"), place_of("wandb")
    source.log(PLAIN)
    commit = target.server.commit

    def losing(artifact: Any) -> None:
        manifest = json.loads(artifact.manifest)
        del manifest["contents"]["deep/er/b.bin"]
        artifact.manifest = json.dumps(manifest).encode()
        commit(artifact)

    monkeypatch.setattr(target.server, "commit", losing)
    with pytest.raises(IntegrityError, match=r"is not what was sent: 'deep/er/b\.bin' differs"):
        Copying(source, target)


# Faults


@pytest.mark.parametrize("other", ["wandb", "comet"])
def test_a_target_that_is_busy_for_a_while(place_of: NewPlace, other: str) -> None:
    source, target = place_of("native"), place_of(other)
    source.log(held(other, FULL))
    if other == "comet":
        faults = target.server.faults
        faults.only, faults.status, faults.statuses, faults.retry_after = "asset/upload", 503, 4, "0"
    else:
        left = [6]

        def busy(method: str, path: str) -> tuple[int, dict[str, str]] | None:
            if method == "PUT" and left[0] > 0:
                left[0] -= 1
                return 503, {"Retry-After": "0"}
            return None

        target.server.fail = busy
    assert Copying(source, target).created == [True]
    assert target.contents() == held(other, FULL)


def test_a_target_that_stays_busy_and_is_asked_again(place_of: NewPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = place_of("native"), place_of("wandb")
    source.log(PLAIN)
    target.server.fail = lambda method, path: (503, {}) if method == "PUT" and "manifest" in path else None
    target.store.client.deadline = 1.0  # type: ignore[attr-defined]
    with pytest.raises(NetworkError):
        Copying(source, target)
    assert target.store.newest(NAME) is None
    sent = puts(target.server)
    assert set(sent) == {"/" + urllib.parse.quote(place) for place in target.server.blobs}
    target.server.fail = lambda method, path: None
    assert Copying(source, target).created == [True]
    assert puts(target.server) == sent
    assert target.contents() == PLAIN


@pytest.mark.parametrize("known", [True, False])
def test_files_in_parts(place_of: NewPlace, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    """As those of 2 GiB are."""
    monkeypatch.setattr(saving, "MULTIPART", 3 * BLOCK)
    monkeypatch.setattr(saving, "PART", 2 * BLOCK)
    source, target = place_of("native"), place_of("wandb")
    source.log({"large.bin": LARGE, "small": b"s"}, algorithm=MD5 if known else BLAKE3)
    Copying(source, target)
    assert target.contents() == {"large.bin": LARGE, "small": b"s"}
    assert sum(".1" in path or ".2" in path or ".3" in path for path in puts(target.server)) == 3


def test_what_a_begun_version_at_comet_has_is_not_sent_again(place_of: NewPlace) -> None:
    source, target = place_of("native"), place_of("comet")
    source.log({f"{n}": b"%d" % n for n in range(30)})
    target.store = CometStore(target.url, target.cache, deadline=1.0)
    faults, server = target.server.faults, target.server
    refused = threading.Event()

    def watch() -> None:
        until(lambda: server.count("asset/upload") >= 12, 20)
        faults.only, faults.status, faults.retry_after = "asset/upload", 503, "5"
        refused.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    faults.only, faults.latency = "asset/upload", 0.02
    with pytest.raises(NetworkError):
        Copying(source, target)
    watcher.join()
    assert refused.is_set() and target.store.newest(NAME) is None
    target.server.faults = type(faults)()
    arrived = sum(len(version.assets) for artifact in server.artifacts.values() for version in artifact.versions)
    server.seen.clear()
    assert 0 < arrived < 30
    target.anew()
    assert Copying(source, target).created == [True]
    assert server.count("asset/upload") == 30 - arrived
    assert len(target.contents()) == 30


def test_tags_and_aliases_that_only_comet_takes(place_of: NewPlace) -> None:
    source, target = place_of("comet"), place_of("native")
    source.log({"a": b"1"}, tags=["good"], aliases=["fine"])
    (artifact,) = source.server.artifacts.values()
    artifact.versions[0].tags.append("what: is/this?")
    artifact.tags.append("#1")
    warned = Copying(source, target).warned
    assert warned == [
        f"acme/vision/bikes:v0: not carried over to {target.store.url}: 1 tag",
        f"acme/vision/bikes: not carried over to {target.store.url}: 1 tag",
    ]
    assert target.store.version(NAME.at("fine")).tags == ["good"]


# Killed, and repeated


def _command(source: Place, target: Place, home: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "artifactfs.cli", "--store", source.url, "copy", NAME.path, "--to", target.url]
    environ = {**os.environ, "ARTIFACTFS_CACHE_DIR": str(source.cache.root)}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environ, cwd=home)


class Stall:
    """Lets requests of a kind pass up to a number, and holds the others until it is released."""

    def __init__(self, server: WandbServer, method: str, passing: int, where: str = "") -> None:
        self.passed, self.held = 0, threading.Event()
        self._free = threading.Event()
        self._lock = threading.Lock()

        def fail(asked: str, path: str) -> None:
            if asked == method and where in path and not path.startswith("/manifest"):
                with self._lock:
                    self.passed += 1
                    stalled = self.passed > passing
                if stalled and not self._free.is_set():
                    self.held.set()
                    self._free.wait(60)

        self._server = server
        server.fail = fail  # type: ignore[assignment]

    def release(self) -> None:
        self._free.set()
        self._server.fail = lambda method, path: None


def _kill_in_the_middle(source: Place, target: Place, stall: Stall, home: Path) -> None:
    process = _command(source, target, home)
    try:
        until(lambda: stall.held.is_set() or process.poll() is not None, 60)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
        stall.release()


MANY: dict[str, Any] = {f"{n:03}": random.Random(n).randbytes(50_000) for n in range(40)}


def test_a_copy_to_w_and_b_is_killed_and_repeated(place_of: NewPlace, tmp_path: Path) -> None:
    """What arrived is not sent again, and there is one version."""
    source, target = place_of("native"), place_of("wandb")
    source.log({**MANY, "large.bin": LARGE}, aliases=["best"])
    source.log({**MANY, "large.bin": LARGE, "more": b"more"})
    stall = Stall(target.server, "PUT", 20)
    _kill_in_the_middle(source, target, stall, tmp_path)
    arrived = set(target.server.blobs)
    assert 15 <= len(arrived) < 41 and target.store.newest(NAME) is None
    target.server.log.clear()
    process = _command(source, target, tmp_path)
    assert process.wait(60) == 0
    assert not {*puts(target.server)} & {"/" + urllib.parse.quote(place) for place in arrived}
    assert len(puts(target.server)) <= 42 - len(arrived)
    target.anew()
    assert len(target.store.versions(NAME)) == 2
    assert sum(it.state == "COMMITTED" for it in target.server.artifacts.values()) == 2
    assert target.contents("best") == {**MANY, "large.bin": LARGE}
    assert target.contents() == {**MANY, "large.bin": LARGE, "more": b"more"}


def test_a_copy_from_w_and_b_is_killed_and_repeated(place_of: NewPlace, tmp_path: Path) -> None:
    """What was fetched is in the cache; what was made is there."""
    source, target = place_of("wandb"), place_of("native")
    source.log({"n": b"0"})
    source.log({**MANY, "n": b"1"}, aliases=["best"])
    stall = Stall(source.server, "GET", 25)
    _kill_in_the_middle(source, target, stall, tmp_path)
    assert [it.name for it in target.store.versions(NAME)] == ["v0"]
    source.server.log.clear()
    process = _command(source, target, tmp_path)
    assert process.wait(60) == 0
    fetched = [path for method, path, _ in source.server.log if method == "GET" and not path.startswith("/manifest")]
    assert 0 < len(fetched) <= 41 - 15
    target.anew()
    assert [it.name for it in target.store.versions(NAME)] == ["v0", "v1"]
    assert target.contents("best") == {**MANY, "n": b"1"}
    assert target.store.collection(NAME).aliases == {LATEST: 1, "best": 1}


def test_killed_after_the_commit(place_of: NewPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody heard that the version was made; the aliases are given by the next attempt."""
    source, target = place_of("native"), place_of("wandb")
    source.log({"a": b"1"}, aliases=["best"])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):

        def dying(*arguments: Any) -> None:
            raise KeyboardInterrupt

        patched.setattr(copying, "adopt_collection", dying)
        Copying(source, target)
    source.anew(), target.anew()
    assert Copying(source, target).created == [False]
    assert target.store.collection(NAME).aliases == {"best": 0, LATEST: 0}
    assert len(target.server.artifacts) == 1


# The command


def test_the_command(place_of: NewPlace, afs: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = place_of("native"), place_of("wandb")
    source.log(FULL, aliases=["best"])
    monkeypatch.setenv("ARTIFACTFS_STORE", source.url)
    ran = afs("copy", NAME.path, "--to", target.url)
    assert ran.lines == ["acme/vision/bikes:v0"]
    assert "1 executable bit, 1 empty directory, 1 symlink" in ran.err and "1 version made" in ran.err
    assert len([line for line in ran.err.splitlines() if "not carried over" in line]) == 1
    (row,) = afs("copy", f"{NAME.path}:best", "--to", target.url, "--json").document
    assert (row["name"], row["created"], row["aliases"]) == ("acme/vision/bikes:v0", False, ["best", "latest"])
    afs("--store", target.url, "get", f"{NAME.path}:best", tmp_path / "out")
    afs("get", f"{NAME.path}:best", tmp_path / "here")
    differ = subprocess.run(["diff", "-r", "out", "here"], capture_output=True, text=True, cwd=tmp_path).stdout.splitlines()
    assert differ == ["Only in here: empty-dir", "Only in here: link"]
    back = tmp_path / "back"
    afs("--store", target.url, "copy", NAME.path, "--to", back)
    afs("--store", str(back), "verify", NAME.path, tmp_path / "out")
    afs("copy", "acme/vision/none", "--to", target.url, code=3)
    afs("--store", target.url, "copy", NAME.path, "--to", target.url, code=2)
    for place in target.server.blobs:
        target.server.blobs[place] = b"!" * len(target.server.blobs[place])
    monkeypatch.setenv("ARTIFACTFS_CACHE_DIR", str(tmp_path / "another"))
    bad = afs("--store", target.url, "copy", NAME.path, "--to", tmp_path / "bad", code=6)
    assert "is not what was recorded" in bad.err
    afs("--store", str(tmp_path / "bad"), "versions", NAME.path, code=3)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    afs("copy", NAME.path, "--to", target.url, code=7)


def test_documented_commands(place_of: NewPlace, afs: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, wandb, comet = place_of("native"), place_of("wandb"), place_of("comet")
    comet.log({"a": b"1"})
    source.log({"b": b"2"}, aliases=["best"])
    monkeypatch.setenv("ARTIFACTFS_STORE", source.url)
    places = {
        "s3://team/store": str(tmp_path / "team"),
        "wandb://wandb.example.org": wandb.url,
        "wandb://api.wandb.ai": wandb.url,
        "/backup/store": str(tmp_path / "backup"),
        "comet://": comet.url,
        "wandb://": wandb.url,
    }
    text = (Path(__file__).parents[1] / "docs" / "copy.md").read_text()
    commands = re.findall(r"^\$ artifactfs (.*)$", text, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        (name,) = afs(*(places.get(word, word) for word in shlex.split(command))).lines
        assert name.startswith("acme/vision/bikes:v")
    assert wandb.anew().version(NAME).name == "v1"


def test_through_serve(place_of: NewPlace, wandb_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A W&B server that is ours: what a team copies there is in the store that is served, and for the real client."""
    monkeypatch.setenv("WANDB_API_KEY", wandb_server.key)
    source, back = place_of("native"), place_of("native")
    target = Place("wandb", f"wandb://{wandb_server.host}", source.cache)
    source.log(PLAIN, algorithm=MD5, aliases=["best"], metadata={"n": 1}, tags=["t"], description="d")
    source.log({**PLAIN, "n": b"2"})
    result = Copying(source, target)
    assert result.created == [True, True]
    served = Place("native", wandb_server.store, source.cache)
    for alias in ("v0", "v1"):
        assert served.contents(alias) == target.contents(alias) == source.contents(alias)
    assert served.store.version(NAME.at("best")).digest == source.store.version(NAME.at("best")).digest
    target.anew()
    assert Copying(source, target).created == [False, False]
    assert len(served.anew().versions(NAME)) == 2
    assert Copying(target, back).created == [True, True]
    assert back.contents("best") == PLAIN
    assert back.store.version(NAME.at("best")).metadata == {"n": 1}
    script = """
import wandb
artifact = wandb.Api().artifact("acme/vision/bikes:best")
artifact.download("out")
artifact.verify("out")
print(artifact.digest, artifact.metadata, artifact.tags, artifact.description, artifact.aliases)
"""
    said = run_client(wandb_server, tmp_path, script)
    assert said.splitlines()[-1] == f"{source.store.version(NAME.at('best')).digest} {{'n': 1}} ['t'] d ['best']"
    assert subprocess.run(["diff", "-r", "out", write_files(tmp_path / "plain", PLAIN)], cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("other", ["native", "wandb", "serve"])
def test_what_was_deleted_there_is_copied_again(
    place_of: NewPlace, request: pytest.FixtureRequest, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = place_of("native")
    if other == "serve":
        server = request.getfixturevalue("wandb_server")
        monkeypatch.setenv("WANDB_API_KEY", server.key)
        target = Place("wandb", f"wandb://{server.host}", source.cache)
    else:
        target = place_of(other)
    source.log({"a": b"1"}, aliases=["one"])
    source.log({"a": b"2"})
    Copying(source, target)
    target.store.delete_version(NAME.at("v0"), delete_aliases=True)
    source.anew(), target.anew()
    result = Copying(source, target)
    assert result.created == [True, False]
    target.anew()
    assert target.contents("one") == {"a": b"1"}
    assert [it.created for it in Copying(source, target).copied] == [False, False]
