"""Copies between stores: the same digests, only what is missing sent, nothing damaged passed on, and a killed copy goes on."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from commits import NAME, commit, contents
from http_server import FaultServer
from programs import Program
from proxy import Fault, Proxy
from servers import Bucket, Container
from shelves import until, write_files
from steps import die_at, steps

from artifactfs import copying
from artifactfs.copying import Copied
from artifactfs.errors import IntegrityError, NotFoundError, UsageError
from artifactfs.folders import ReferenceFolder
from artifactfs.maintenance import fsck
from artifactfs.model import BLOCK, File, Version
from artifactfs.names import LATEST
from artifactfs.objects import object_key
from artifactfs.publish import Progress
from artifactfs.reader import Reader
from artifactfs.references import Expanded, expand
from artifactfs.store.native import NativeStore
from artifactfs.store.urls import open_store

MIB = 1 << 20
LARGE = random.Random(1).randbytes(5 * BLOCK + 77)
FILES: dict[str, bytes | str | None] = {
    "a.txt": b"alpha\n",
    "again.txt": b"alpha\n",
    "bin/run.sh": b"#!/bin/sh\n",
    "deep/er/b.bin": bytes(range(256)) * 40,
    "empty-dir": None,
    "empty.txt": b"",
    "link": "a.txt",
    "large.bin": LARGE,
    "block.bin": LARGE[:BLOCK],
}


@pytest.fixture
def source(tmp_path: Path) -> NativeStore:
    return open_store(str(tmp_path / "source"))


@pytest.fixture
def target(tmp_path: Path) -> NativeStore:
    return open_store(str(tmp_path / "target"))


def copy(source: NativeStore, target: NativeStore, name: Any = NAME) -> tuple[list[Copied], int]:
    """What was copied, and how many bytes of contents were sent."""
    last = Progress()

    def report(progress: Progress) -> None:
        last.stored = progress.stored

    return copying.copy(source, target, name, report), last.stored


def log(store: NativeStore, root: Path, files: dict[str, Any], **fields: Any) -> Version:
    """The directory ``root`` with ``files`` besides what is in it, as the next version."""
    files = {name: content for name, content in files.items() if not (root / name).is_symlink()}
    return commit(store, write_files(root, files), **fields).version


def assert_same(source: NativeStore, target: NativeStore, name: str) -> None:
    ours, theirs = target.version(NAME.at(name)), source.version(NAME.at(name))
    assert (ours.root.digest, ours.digest, ours.algorithm) == (theirs.root.digest, theirs.digest, theirs.algorithm)
    for field in ("number", "type", "size", "file_count", "description", "metadata", "tags", "ttl", "run", "commit"):
        assert getattr(ours, field) == getattr(theirs, field)
    reader = Reader(target, None)
    with contextlib.closing(reader):
        for path, entry in target.tree.walk(ours.root):
            if isinstance(entry, File):
                original = source.tree.resolve(theirs.root, path)
                assert isinstance(original, File)
                assert (entry.digest, entry.executable) == (original.digest, original.executable)
                with contextlib.closing(reader.open(entry, path)) as handle:
                    assert handle.read(0, entry.size) == contents_of(source, original)


def contents_of(store: NativeStore, file: File) -> bytes:
    reader = Reader(store, None)
    with contextlib.closing(reader), contextlib.closing(reader.open(file)) as handle:
        return handle.read(0, file.size)


@pytest.mark.parametrize("algorithm", ["BLAKE3", "MD5", "XXH128"])
def test_everything_of_a_version(source: NativeStore, target: NativeStore, tmp_path: Path, algorithm: str) -> None:
    fields = {"description": "what", "metadata": {"n": [1, None]}, "tags": ["x", "y"], "ttl": 1000, "aliases": ["best", "new"]}
    log(source, tmp_path / "f", FILES, algorithm=algorithm, run="acme/vision/r1", **fields)
    source.update_collection(NAME, lambda it: msgspec.structs.replace(it, description="about", tags=["t"]))
    [copied], sent = copy(source, target, NAME.at("best"))
    assert copied.created
    assert sent == len(LARGE) + BLOCK + 6 + 10 + 10240
    assert_same(source, target, "v0")
    assert contents(target, copied.version) == contents(source, source.version(NAME))
    ours = target.collection(NAME)
    assert ours.aliases == {LATEST: 0, "best": 0, "new": 0}
    assert (ours.description, ours.tags, ours.type) == ("about", ["t"], "dataset")
    assert not list(fsck(target))


def test_a_collection_version_by_version(source: NativeStore, target: NativeStore, tmp_path: Path) -> None:
    """In order, under their numbers; a deleted one leaves a gap. Each sends what is new in it."""
    root = tmp_path / "f"
    for n in range(4):
        log(source, root, {**FILES, "n": b"%d" % n, f"file-{n}": os.urandom(1000)}, aliases=[f"a{n}"])
    source.delete_version(NAME.at("v1"), delete_aliases=True)
    copied, sent = copy(source, target)
    assert [version.name for version, _ in copied] == ["v0", "v2", "v3"]
    assert sent == len(LARGE) + BLOCK + 6 + 10 + 10240 + 4 * 1000 + 3
    for name in ("v0", "v2", "v3"):
        assert_same(source, target, name)
    assert target.collection(NAME).aliases == {LATEST: 3, "a0": 0, "a2": 2, "a3": 3}
    assert not list(fsck(target))

    again, sent = copy(source, target)
    assert ([created for _, created in again], sent) == ([False] * 3, 0)
    log(source, root, {"more": b"more"})
    copied, sent = copy(source, target)
    assert ([created for _, created in copied], sent) == ([False] * 3 + [True], 4)
    assert target.version(NAME).number == 4


def test_what_the_target_has_is_not_sent(source: NativeStore, target: NativeStore, tmp_path: Path) -> None:
    """Neither a content, wherever it lies, nor a block of a large one; and its own layout is kept."""
    log(target, tmp_path / "theirs", {"other/name": b"x" * 5000, "large.bin": LARGE, "gone": b"gone"})
    changed = LARGE[:BLOCK] + os.urandom(BLOCK) + LARGE[2 * BLOCK :] + b"appended"
    log(source, tmp_path / "ours", {"here": b"x" * 5000, "large.bin": changed, "new": b"new"})
    [copied], sent = copy(source, target)
    assert sent == BLOCK + (len(LARGE) + 8) % BLOCK + 3
    assert copied.version.number == 1
    assert contents(target, copied.version) == contents(source, source.version(NAME))
    assert not list(fsck(target))


def test_a_small_change_in_a_large_directory(source: NativeStore, target: NativeStore, tmp_path: Path) -> None:
    files = {f"d/{n:05}": b"%d" % n for n in range(6000)}
    log(source, tmp_path / "f", files)
    copy(source, target)
    before = {info.key for info in target.objects.scan("packs/")}
    log(source, tmp_path / "f", {"d/03000": b"changed"})
    [_, copied], sent = copy(source, target)
    assert (copied.created, sent) == (True, 7)
    assert_same(source, target, "v1")
    new = [info for info in target.objects.scan("packs/") if info.key not in before]
    assert sum(info.size for info in new) < MIB  # the pages that changed


def test_references_and_their_block_lists(source: NativeStore, target: NativeStore, tmp_path: Path) -> None:
    (tmp_path / "big.bin").write_bytes(LARGE)
    with FaultServer({"/x": b"web"}) as server:
        found = [*expand((tmp_path / "big.bin").as_uri()), *expand(server.url("/x"))]
    commit(source, ReferenceFolder(sorted(found, key=_path)))
    [copied], sent = copy(source, target)
    assert sent == 0
    assert target.version(NAME).root.links == 2
    reader = Reader(target, None)
    with contextlib.closing(reader):
        entry: Any = target.tree.lookup(copied.version.root, "big.bin")
        with contextlib.closing(reader.open(entry)) as handle:
            assert handle.read(0, len(LARGE)) == LARGE
    assert not list(fsck(target))


def _path(found: Expanded) -> str:
    return found.path


def test_an_older_version_later(source: NativeStore, target: NativeStore, tmp_path: Path) -> None:
    """Its number is taken by then, so it gets the next one."""
    log(source, tmp_path / "f", {"a": b"1"}, aliases=["old"])
    log(source, tmp_path / "f", {"a": b"2"})
    copy(source, target, NAME.at("v1"))
    assert target.version(NAME).number == 1
    [copied], _ = copy(source, target, NAME.at("old"))
    assert (copied.version.number, copied.version.root.digest) == (2, source.version(NAME.at("v0")).root.digest)
    assert target.collection(NAME).aliases == {LATEST: 2, "old": 2}


def test_refusals(source: NativeStore, target: NativeStore, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        copy(source, target)
    log(source, tmp_path / "f", {"a": b"1"})
    with pytest.raises(NotFoundError):
        copy(source, target, NAME.at("v7"))
    with pytest.raises(UsageError, match="--to"):
        copy(source, open_store(str(tmp_path / "source")))
    log(target, tmp_path / "g", {"a": b"2"}, type="model")
    with pytest.raises(UsageError, match="type 'model'"):
        copy(source, target)
    assert len(target.versions(NAME)) == 1


@pytest.mark.parametrize("path", ["a.txt", "large.bin"])
def test_damage_is_not_passed_on(source: NativeStore, target: NativeStore, tmp_path: Path, path: str) -> None:
    version = log(source, tmp_path / "f", FILES)
    entry = source.tree.lookup(version.root, path)
    assert isinstance(entry, File)
    extent = source.extents(entry)[0]
    where = Path(source.objects.path(object_key(extent.object)) or "")
    where.chmod(0o600)
    with where.open("r+b") as file:
        file.seek(extent.offset + extent.length // 2)
        file.write(b"\xff")
    with pytest.raises(IntegrityError, match="is damaged"):
        copy(source, target)
    assert not target.numbers(NAME)


def test_killed_at_every_step_and_repeated(source: NativeStore, tmp_path: Path) -> None:
    """The next attempt completes it, and no content is stored twice."""
    log(source, tmp_path / "f", {**FILES, "n": b"0"}, aliases=["one"])
    log(source, tmp_path / "f", {**FILES, "n": b"1"})
    taken = 0
    step = 1
    while _killed_copy(source, tmp_path / f"t{step}", step):
        target = open_store(str(tmp_path / f"t{step}"))
        copy(source, target)
        assert target.collection(NAME).aliases == {LATEST: 1, "one": 0}
        for name in ("v0", "v1"):
            assert target.version(NAME.at(name)).root.digest == source.version(NAME.at(name)).root.digest
        assert not list(fsck(target))
        taken += 1
        step += 9
    assert taken > 3


def _killed_copy(source: NativeStore, where: Path, step: int) -> bool:
    """Whether a copy in a process of its own was killed before that step, rather than done."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException), steps(die_at(step)):
            copy(open_store(source.url.removeprefix("file://")), open_store(str(where)))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


# Buckets


def test_to_a_bucket_and_back(source: NativeStore, bucket: Bucket, tmp_path: Path) -> None:
    log(source, tmp_path / "f", FILES, aliases=["best"], metadata={"k": "v"})
    log(source, tmp_path / "f", {**FILES, "more": os.urandom(100_000)})
    team = open_store(bucket.store_url("team/store"))
    copied, _ = copy(source, team)
    assert [created for _, created in copied] == [True, True]
    assert_same(source, team, "v0")
    assert_same(source, team, "v1")
    back = open_store(str(tmp_path / "back"))
    copy(team, back)
    assert contents(back, back.version(NAME)) == contents(source, source.version(NAME))
    assert back.collection(NAME).aliases == source.collection(NAME).aliases
    assert not list(fsck(back))


def test_between_clouds(source: NativeStore, container: Container, bucket: Bucket, tmp_path: Path) -> None:
    log(source, tmp_path / "f", FILES)
    azure, amazon = open_store(f"az://{container.name}/store"), open_store(bucket.store_url())
    back = open_store(str(tmp_path / "back"))
    for left, right in ((source, azure), (azure, amazon), (amazon, back)):
        assert [created for _, created in copy(left, right)[0]] == [True]
    assert contents(back, back.version(NAME)) == contents(source, source.version(NAME))


def test_a_copy_to_a_bucket_is_killed_and_repeated(source: NativeStore, bucket: Bucket, tmp_path: Path) -> None:
    """What arrived is not sent again."""
    files: dict[str, Any] = {f"{n:03}": random.Random(n).randbytes(900_000) for n in range(60)}
    files["z.bin"] = random.Random(99).randbytes(6 * MIB)
    log(source, tmp_path / "f", files)
    total = sum(map(len, files.values()))
    with Proxy(bucket.server.url) as proxy:
        url = bucket.store_url("s", endpoint=proxy.url)
        stalled = proxy.add(Fault("stall", method="PUT POST", path="/blobs/", at=-1))
        command = [sys.executable, "-m", "artifactfs.cli", "--store", str(tmp_path / "source"), "copy", NAME.path, "--to", url]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(lambda: stalled.done or process.poll() is not None, 60)
        assert process.poll() is None
        until(lambda: len(bucket.keys("s/packs/")) >= 3, 60)
        process.kill()
        process.wait()
        proxy.clear()
        proxy.release()
        arrived = {key: bucket.client.head_object(Bucket=bucket.name, Key=key) for key in bucket.keys("s/packs/")}
        assert sum(head["ContentLength"] for head in arrived.values()) > total / 2
        proxy.reset()
        target = open_store(url)
        copy(source, target)
        assert proxy.bytes_up < total / 2
    assert_same(source, open_store(bucket.store_url("s")), "v0")


def test_link_faults(source: NativeStore, bucket: Bucket, tmp_path: Path) -> None:
    log(source, tmp_path / "f", {**FILES, "more": os.urandom(3 * MIB)})
    with Proxy(bucket.server.url, latency=0.005) as proxy:
        proxy.add(Fault("status", every=10))
        proxy.add(Fault("swallow", method="PUT", every=4))
        proxy.add(Fault("cut", method="GET", every=5, at=100))
        url = bucket.store_url("s", endpoint=proxy.url)
        copy(source, open_store(url))
        proxy.add(Fault("corrupt", method="GET", every=7, at=50))
        back = open_store(str(tmp_path / "back"))
        copy(open_store(url), back)
    assert contents(back, back.version(NAME)) == contents(source, source.version(NAME))


# The command


def test_the_command(afs: Program, logged: str, tmp_path: Path) -> None:
    there = tmp_path / "there"
    ran = afs("copy", f"{logged}:best", "--to", there)
    assert (ran.lines, "1 version made" in ran.err) == ([f"{logged}:v0"], True)
    ours, theirs = (afs(*store, "info", logged, "--json").document for store in ((), ("--store", there)))
    for key in ("digest", "aliases", "tags", "metadata", "size", "file_count", "type"):
        assert ours[key] == theirs[key]
    again = afs("copy", logged, "--to", f"file://{there}", "--json").document
    assert [(row["name"], row["created"]) for row in again] == [(f"{logged}:v0", False)]
    afs("--store", there, "get", logged, tmp_path / "out")
    afs("verify", logged, tmp_path / "out")
    assert "the next one" not in afs("copy", logged, "--to", there, "--quiet").err
    afs("copy", "acme/vision/none", "--to", there, code=3)
    afs("copy", logged, code=2)
    afs("copy", logged, "--to", "thing://x", code=2)
