"""Publishing: what becomes a version, what does not, and what happens when others publish at the same time."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash
from blake3 import blake3
from commits import (
    NAME,
    commit,
    contents,
    directory,
    draft,
    file_at,
    folder_at,
    fork,
    leftovers,
    new_file,
    nothing_leaks,
    objects,
    problems,
    stored_bytes,
)
from shelves import write_files

from artifactfs.content import fingerprint
from artifactfs.errors import (
    ArtifactFSError,
    ConflictError,
    IntegrityError,
    InvalidNameError,
    NotFoundError,
    NotPermittedError,
    UsageError,
)
from artifactfs.folders import LocalFolder, MadeFolder, MergedFolder
from artifactfs.maintenance import gc
from artifactfs.model import BLOCK, Collection, Dir, Extent, File, Ref, Symlink
from artifactfs.names import ArtifactName
from artifactfs.publish import Change, Draft, NewFile, NewRef, Progress, build_digest, publish
from artifactfs.store import upload as upload_module
from artifactfs.store.native import NativeStore
from artifactfs.store.urls import open_store
from artifactfs.tree import Tree


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> NativeStore:
    return open_store(str(root))


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A directory with something of everything."""
    repeated = os.urandom(5000)
    path = write_files(
        tmp_path / "odd",
        {
            "empty": b"",
            "one": b"1",
            "run.sh": b"#!/bin/sh\n",
            "sub/deeper/deepest/file": os.urandom(100),
            "sub/empty folder": None,
            "block": os.urandom(BLOCK),
            "more than a block": os.urandom(BLOCK + 1),
            "large": os.urandom(3 * BLOCK + 12345),
            "zeros": bytes(9 * BLOCK),
            "twice/a": repeated,
            "twice/b": repeated,
            "a-b": b"before a/x",
            "a/x": b"after a-b",
            "a0": b"after both",
            "link": "sub/deeper",
            "dangling": "no/where",
            "absolute": "/etc/passwd",
            "x" * 255: b"long",
            "é" * 127: "è" * 1000,
            "\U0001f600 \t\\ \n": b"odd",
            "\uffff": b"before the above in UTF-16, not in UTF-8",
        },
    )
    (path / "\u00e9").mkdir()
    (path / "e\u0301").mkdir()
    return path


def test_what_is_logged_is_what_was_there(store: NativeStore, odd: Path) -> None:
    done = commit(store, odd)
    assert done.created
    assert contents(store, done.version) == directory(odd)
    assert problems(store.url) == [] and leftovers(store.url) == []
    files = [value for value in directory(odd).values() if isinstance(value, tuple)]
    assert done.version.file_count == len(files)
    assert done.version.size == sum(len(data) for data, _ in files)
    assert contents(open_store(store.url), done.version) == directory(odd)


def test_all_fields_are_kept(store: NativeStore) -> None:
    metadata = {"deep": {"er": [1, 2.5, None, True, "é"]}, "big": 10**999, "negative": -(2**70), "float": 1e300}
    first = commit(
        store,
        {},
        type="model",
        algorithm="md5",
        description="what\nit is",
        metadata=metadata,
        tags=["b", "a", "b"],
        aliases=["best", "latest"],
        ttl=3600,
        run="acme/vision/run1",
    ).version
    assert store.version(NAME.at("best")) == store.version(NAME) == store.version(NAME.at("v0")) == first
    assert (first.number, first.type, first.algorithm, first.description) == (0, "model", "MD5", "what\nit is")
    assert first.metadata == metadata and first.tags == ["b", "a"] and first.ttl == 3600 and first.run == "acme/vision/run1"
    assert store.collection(NAME).aliases == {"best": 0, "latest": 0}
    assert first.digest == "64e7c61456b10382e2f3b571ac24b659", "W&B's digest of an empty artifact"
    again = store.update_version(NAME, lambda version: msgspec.structs.replace(version, description=None))
    assert again.description is None and again.metadata == metadata


# Digests that users see (artifact-model, section 4)


@pytest.mark.parametrize("algorithm, new", [("MD5", hashlib.md5), ("XXH128", xxhash.xxh3_128)])
def test_version_digests_are_wandbs(store: NativeStore, odd: Path, algorithm: str, new: Callable[..., Any]) -> None:
    ref = Ref("", "s3://bucket/key", digest="the-etag", size=7)
    version = commit(store, MergedFolder(LocalFolder(str(odd)), MadeFolder({"sub0": ref})), algorithm=algorithm).version
    lines = {}
    for path, value in directory(odd).items():
        if isinstance(value, tuple):
            lines[path] = base64.b64encode(new(value[0]).digest()).decode()
    lines["sub0"] = "the-etag"
    expected = new(b"wandb-artifact-manifest-v1\n")
    for path in sorted(lines, key=lambda path: path.encode()):
        expected.update(f"{path}:{lines[path]}\n".encode())
    assert version.digest == expected.hexdigest()
    assert version.algorithm == algorithm
    assert file_at(store, version, "one").digest == lines["one"]
    assert problems(store.url) == []


def test_a_blake3_digest_is_the_root_directorys(store: NativeStore, odd: Path) -> None:
    version = commit(store, odd).version
    assert version.digest == version.root.digest.hex() and len(version.digest) == 64


@pytest.mark.parametrize("algorithm", ["BLAKE3", "MD5", "XXH128"])
def test_the_digest_of_a_draft_is_that_of_its_version(store: NativeStore, tmp_path: Path, algorithm: str) -> None:
    write_files(tmp_path / "data", {f"d{n % 7}/f{n}": b"%d" % n for n in range(100)})
    version = commit(store, tmp_path / "data", algorithm=algorithm).version

    def entries(folder: Dir) -> MadeFolder:
        return MadeFolder({it.name: entries(it) if isinstance(it, Dir) else it for it in store.tree.entries(folder)})

    def no_pages(page: object) -> bytes:
        raise AssertionError(page)

    assert build_digest(entries(version.root), Tree(no_pages), algorithm) == version.digest
    kept = MadeFolder({}, version.root)
    assert build_digest(kept, store.tree, algorithm) == version.digest


# Nothing changed


def test_nothing_changed_is_no_version(store: NativeStore, odd: Path) -> None:
    first = commit(store, odd, metadata={"a": 1}).version
    bytes_before = stored_bytes(store.url)
    again = commit(store, odd, aliases=["best"], metadata={"a": 2}, algorithm="XXH128")
    assert not again.created and again.version == first
    assert store.collection(NAME).aliases == {"latest": 0, "best": 0}
    assert stored_bytes(store.url) == bytes_before
    assert store.numbers(NAME) == [0]


@pytest.mark.parametrize(
    "change",
    [
        lambda path: (path / "one").chmod(0o755),
        lambda path: (path / "one").rename(path / "uno"),
        lambda path: (path / "sub/empty folder").rmdir(),
        lambda path: (path / "new folder").mkdir(),
        lambda path: (path / "empty").unlink(),
        lambda path: ((path / "dangling").unlink(), (path / "dangling").symlink_to("no/where/else")),
        lambda path: (path / "large").write_bytes((path / "large").read_bytes()[:-1] + b"!"),
    ],
)
def test_each_of_these_is_a_change(store: NativeStore, odd: Path, change: Callable[[Path], object]) -> None:
    first = commit(store, odd).version
    change(odd)
    second = commit(store, odd)
    assert second.created and second.version.number == 1 and second.version.digest != first.digest
    assert contents(store, second.version) == directory(odd)


def test_going_back_to_an_older_content_is_a_version(store: NativeStore, tmp_path: Path) -> None:
    for number, content in enumerate((b"a", b"b", b"a")):
        assert commit(store, {"x": new_file(tmp_path / "x", content)}).version.number == number
    assert store.version(NAME.at("v0")).digest == store.version(NAME.at("v2")).digest


def test_times_are_no_change(store: NativeStore, odd: Path) -> None:
    commit(store, odd)
    os.utime(odd / "one", (0, 0))
    assert not commit(store, odd).created


# What is there already is not stored again


def test_the_same_content_twice_is_stored_once(store: NativeStore, tmp_path: Path) -> None:
    small, large = os.urandom(300_000), os.urandom(5 * BLOCK + 17)
    write_files(tmp_path / "data", {f"{kind}{n}": data for n in range(5) for kind, data in (("s", small), ("l", large))})
    done = commit(store, tmp_path / "data")
    assert stored_bytes(store.url) < len(small) + len(large) + 5000
    assert contents(store, done.version) == directory(tmp_path / "data")


@pytest.mark.parametrize("many", [1, 600], ids=["few", "many"])
def test_a_later_version_stores_what_is_new(store: NativeStore, tmp_path: Path, many: int) -> None:
    """Moved, copied and renamed contents cost pages only; with few files left to come and with many."""
    data = tmp_path / "data"
    files = {f"old/f{n}": os.urandom(2000) for n in range(700)}
    write_files(data, {**files, "old/large": os.urandom(3 * BLOCK), "old/sub/file": b"x" * 3000})
    commit(store, data)
    before = stored_bytes(store.url)
    (data / "old").rename(data / "new")
    (data / "copies").mkdir()
    for number in range(many):
        (data / f"copies/c{number}").write_bytes(files[f"old/f{number}"])
    (data / "copies/large").write_bytes((data / "new/large").read_bytes())
    second = commit(store, data)
    assert second.created
    pages = 200 * (702 + many + 1)
    assert stored_bytes(store.url) - before < pages
    assert contents(store, second.version) == directory(data)
    assert problems(store.url) == []


def test_nothing_is_stored_for_a_folder_that_stays(store: NativeStore, tmp_path: Path) -> None:
    data = write_files(tmp_path / "data", {f"d{d}/f{f}": os.urandom(10) for d in range(50) for f in range(20)})
    commit(store, data)
    before = objects(store.url)
    (data / "d7/f7").write_bytes(b"changed")
    commit(store, data)
    added = {key: size for key, size in objects(store.url).items() if key not in before}
    assert len(added) == 2 and sum(added.values()) < 20 * 150 + 50 * 150 + 100


def test_empty_contents_are_not_stored(store: NativeStore, tmp_path: Path) -> None:
    version = commit(store, {name: new_file(tmp_path / name, b"") for name in "abc"}).version
    assert file_at(store, version, "a").extents == ()
    assert contents(store, version)["a"] == (b"", False)


def test_folders_over_a_base_keep_what_they_do_not_change(store: NativeStore, odd: Path, tmp_path: Path) -> None:
    first = commit(store, odd).version
    sub = folder_at(store, first, "sub")
    changes: dict[str, Change] = {
        "one": None,
        "not there": None,
        "sub": MadeFolder({"deeper": None, "added": new_file(tmp_path / "n", b"new", True)}, sub),
        "a": new_file(tmp_path / "f", b"a file where a folder was"),
        "a0": MadeFolder({"x": Symlink("ignored", "target")}),
        "link": file_at(store, first, "block"),
        "copy": folder_at(store, first, "twice"),
    }
    before = stored_bytes(store.url)
    second = commit(store, MadeFolder(changes, first.root), base=0).version
    expected = {path: value for path, value in directory(odd).items() if not path.startswith(("one", "sub/deeper", "a/", "a0"))}
    expected |= {"sub/added": (b"new", True), "a": (b"a file where a folder was", False), "a0": None, "a0/x": "target"}
    expected |= {"link": expected["block"], "copy": None, "copy/a": expected["twice/a"], "copy/b": expected["twice/b"]}
    assert contents(store, second) == expected
    assert second.base == 0
    assert stored_bytes(store.url) - before < 10_000
    assert problems(store.url) == []


# Wrong input


@pytest.mark.parametrize(
    "fields, error",
    [
        ({"type": "a/b"}, InvalidNameError),
        ({"type": "wandb-x"}, InvalidNameError),
        ({"name": ArtifactName("acme", "vision", "..")}, InvalidNameError),
        ({"name": ArtifactName("..", "vision", "x")}, InvalidNameError),
        ({"name": ArtifactName("acme", "", "x")}, InvalidNameError),
        ({"name": ArtifactName("acme", "a/b", "x")}, InvalidNameError),
        ({"aliases": ["v3"]}, InvalidNameError),
        ({"aliases": ["a/b"]}, InvalidNameError),
        ({"tags": ["a,b"]}, InvalidNameError),
        ({"metadata": {"x": float("inf")}}, InvalidNameError),
        ({"metadata": {"x": "y" * (40 << 20)}}, UsageError),
        ({"description": "\udcff"}, UsageError),
        ({"algorithm": "sha256"}, UsageError),
        ({"ttl": 0}, UsageError),
        ({"ttl": -5}, UsageError),
        ({"ttl": 1 << 60}, UsageError),
        ({"expect_base": 0}, ConflictError),
    ],
)
def test_a_draft_that_cannot_be_is_refused_before_anything_is_stored(
    store: NativeStore, tmp_path: Path, fields: dict[str, Any], error: type[ArtifactFSError]
) -> None:
    with nothing_leaks(), pytest.raises(error) as caught:
        commit(store, {"x": new_file(tmp_path / "x", b"x")}, **fields)
    assert "\n" not in str(caught.value)
    assert not Path(store.url).exists()


@pytest.mark.parametrize(
    "change",
    [
        {"..": Symlink("", "x")},
        {"a/b": Symlink("", "x")},
        {"a\0b": Symlink("", "x")},
        {"é" * 128: Symlink("", "x")},
        {"\udcff": Symlink("", "x")},
        {"x": Symlink("", "\udcff")},
        {"x": Symlink("", "y" * 70_000)},
        {"x": Ref("", "s3://b/k", "y" * 70_000, 1)},
        {"x": Ref("", "s3://b/k", "d", 1, extra={"versionID": 1 << 70})},
        {"x": Ref("", "s3://b/k", "d", 1, extra={"etag": "\udcff"})},
        {"x": NewRef(Ref("", "s3://b/\udcff", "d", 1), bytes(64))},
    ],
)
def test_entries_that_could_not_be_read_again_are_refused(store: NativeStore, change: dict[str, Change]) -> None:
    with nothing_leaks(), pytest.raises(InvalidNameError) as caught:
        commit(store, change)
    assert "\n" not in str(caught.value)
    assert store.numbers(NAME) == []


def test_names_out_of_order_are_a_mistake_that_makes_no_version(store: NativeStore) -> None:
    class Unsorted:
        base = None

        def changes(self) -> Iterator[tuple[str, Change]]:
            yield "b", Symlink("", "x")
            yield "a", Symlink("", "x")

    with nothing_leaks(), pytest.raises(ValueError, match="comes after"):
        commit(store, Unsorted())
    assert store.numbers(NAME) == []


def test_a_collection_has_one_type(store: NativeStore, tmp_path: Path) -> None:
    commit(store, {"x": new_file(tmp_path / "x", b"1")}, type="dataset")
    with pytest.raises(UsageError, match="already exists with type 'dataset'"):
        commit(store, {"x": new_file(tmp_path / "x", b"2")}, type="model")
    assert commit(store, {"x": new_file(tmp_path / "x", b"2")}, type="").version.type == "dataset"
    assert commit(store, {}, "acme/vision/new", type="").version.type == "dataset"
    for number in (0, 1):
        store.delete_version(NAME.at(f"v{number}"))
    with pytest.raises(UsageError, match="already exists"):
        commit(store, {"x": new_file(tmp_path / "x", b"3")}, type="model")
    assert commit(store, {"x": new_file(tmp_path / "x", b"3")}, type="").version.number == 2


# Files that cannot be read, or will not stand still


def test_special_files_are_refused_and_nothing_hangs(store: NativeStore, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket"))
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path / "directory", tmp_path / "socket"):
        with nothing_leaks(), pytest.raises(UsageError, match="not a regular file") as caught:
            commit(store, {"x": NewFile(str(path), False)})
        assert str(path) in str(caught.value)
    listening.close()
    assert store.numbers(NAME) == [] and leftovers(store.url) == []


def test_a_missing_file_is_named(store: NativeStore, tmp_path: Path) -> None:
    with nothing_leaks(), pytest.raises(NotFoundError, match="no such thing"):
        commit(store, {"x": NewFile(str(tmp_path / "no such thing"), False)})


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_an_unreadable_file_is_named() -> None:
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o777)
        Path(path, "secret").write_bytes(b"x")
        Path(path, "secret").chmod(0)

        def other_user() -> None:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            store = open_store(f"{path}/store")
            with pytest.raises(NotPermittedError, match="secret"):
                commit(store, {"x": NewFile(f"{path}/secret", False)})

        assert fork(other_user) == 0


@pytest.mark.parametrize("size", [1000, 3 * BLOCK])
@pytest.mark.parametrize("how", ["grow", "shrink", "rewrite", "vanish"])
def test_a_file_that_changes_while_it_is_stored_fails_the_commit(
    store: NativeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, how: str
) -> None:
    path = tmp_path / "moving"
    file = new_file(path, os.urandom(size))
    real = os.pread

    def meddle(fd: int, count: int, offset: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{fd}") == str(path):
            monkeypatch.setattr(upload_module.os, "pread", real)
            if how == "grow":
                with path.open("ab") as other:
                    other.write(b"more")
            elif how == "shrink":
                os.truncate(path, size // 2)
            elif how == "rewrite":
                with path.open("r+b") as other:
                    other.write(b"changed")
            else:
                path.unlink()
        return real(fd, count, offset)

    monkeypatch.setattr(upload_module.os, "pread", meddle)
    if how == "vanish":  # what is open stays readable, and is whole
        assert commit(store, {"x": file}).created
        return
    with nothing_leaks(), pytest.raises(ConflictError, match="moving changed while it was being stored"):
        commit(store, {"x": file})
    assert store.numbers(NAME) == [] and leftovers(store.url) == []
    assert commit(store, {"x": file}).created, "once it stands still"


def test_a_folder_whose_walk_fails_makes_no_version(store: NativeStore, tmp_path: Path) -> None:
    class Failing:
        base = None

        def changes(self) -> Iterator[tuple[str, Change]]:
            for number in range(100):
                yield f"{number:03d}", new_file(tmp_path / f"x{number}", os.urandom(3 * BLOCK if number == 50 else 1000))
            raise NotFoundError("the folder is gone")

    with nothing_leaks(), pytest.raises(NotFoundError, match="the folder is gone"):
        commit(store, Failing())
    assert store.numbers(NAME) == [] and leftovers(store.url) == []


# References


def test_a_reference_whose_content_was_read_has_its_block_list_stored(store: NativeStore) -> None:
    data = os.urandom(2 * BLOCK + 9)
    found = fingerprint(data)
    new = NewRef(Ref("", "file:///data/x", "digest", found.size, id=found.id), found.blocks)
    first = commit(store, {"x": new}).version
    ref = store.tree.resolve(first.root, "x")
    assert isinstance(ref, Ref) and store.block_list(ref) == found.blocks
    assert (first.file_count, first.size, first.root.links) == (1, found.size, 1)
    second = commit(store, {"x": new, "y": Ref("", "s3://b/k", "e", -1)}).version
    again = store.tree.resolve(second.root, "x")
    assert isinstance(again, Ref) and again.blocks == ref.blocks, "a block list that is there is not stored again"
    assert (second.file_count, second.size, second.root.links) == (2, found.size, 2)
    assert problems(store.url) == []


# Progress


def test_progress_counts_files_and_bytes(store: NativeStore, odd: Path) -> None:
    seen: list[tuple[int, int, int]] = []

    def report(progress: Progress) -> None:
        seen.append((progress.files, progress.bytes, progress.stored))

    version = publish(store, draft(odd), report).version
    assert seen == sorted(seen)
    assert seen[-1][:2] == (version.file_count, version.size)
    assert seen[-1][2] == version.size - 5000, "what is there twice is stored once"


@pytest.mark.parametrize("at", [1, 5, 12])
def test_whoever_watches_may_stop_it(store: NativeStore, odd: Path, at: int) -> None:
    """As Ctrl-C does."""
    calls = []

    def report(progress: Progress) -> None:
        calls.append(progress.files)
        if len(calls) == at:
            raise KeyboardInterrupt

    with nothing_leaks(), pytest.raises(KeyboardInterrupt):
        publish(store, draft(odd), report)
    assert store.numbers(NAME) == [] and leftovers(store.url) == []


# Others at the same time


class Meanwhile:
    """A folder that lets something else happen while it is walked."""

    def __init__(self, folder: MadeFolder, action: Callable[[], object]) -> None:
        self.folder = folder
        self.base = folder.base
        self.action = action

    def changes(self) -> Iterator[tuple[str, Change]]:
        self.action()
        return self.folder.changes()


def test_a_commit_in_between_takes_its_number(store: NativeStore, tmp_path: Path) -> None:
    def other() -> None:
        commit(open_store(store.url), {"x": new_file(tmp_path / "o", b"other")})

    mine = commit(store, Meanwhile(MadeFolder({"x": new_file(tmp_path / "x", b"mine")}), other))
    assert mine.created and mine.version.number == 1
    assert store.collection(NAME).aliases == {"latest": 1}


@pytest.mark.parametrize("before", [0, 1, 3])
def test_expect_base_holds_until_the_version_is_there(store: NativeStore, tmp_path: Path, before: int) -> None:
    for number in range(before):
        commit(store, {"x": new_file(tmp_path / "x", b"%d" % number)})
    mine = MadeFolder({"x": new_file(tmp_path / "x", b"mine")})
    for wrong in {-1, 0, 1, 2, 3} - {before - 1}:
        with pytest.raises(ConflictError, match="not at"):
            commit(store, mine, expect_base=wrong)

    def other() -> None:
        commit(open_store(store.url), {"x": new_file(tmp_path / "o", b"other")})

    with nothing_leaks(), pytest.raises(ConflictError, match="somebody else committed"):
        commit(store, Meanwhile(mine, other), expect_base=before - 1)
    assert store.numbers(NAME) == list(range(before + 1))
    assert commit(store, mine, expect_base=before).version.number == before + 1


def test_two_first_commits_of_different_types(store: NativeStore, tmp_path: Path) -> None:
    def other() -> None:
        commit(open_store(store.url), {"x": new_file(tmp_path / "o", b"other")}, type="model")

    with pytest.raises(UsageError, match="already exists with type 'model'"):
        commit(store, Meanwhile(MadeFolder({"x": new_file(tmp_path / "x", b"mine")}), other), type="dataset")
    assert store.numbers(NAME) == [0] and store.collection(NAME).type == "model"


def test_the_same_content_by_several_at_once_is_one_version(store: NativeStore, tmp_path: Path) -> None:
    """As every rank of a training run logs the same data set."""
    data = write_files(tmp_path / "data", {f"f{n}": os.urandom(100) for n in range(50)})
    barrier = threading.Barrier(6)

    def rank(number: int) -> tuple[int, bool]:
        barrier.wait()
        done = commit(open_store(store.url), data, aliases=[f"rank{number}"])
        return done.version.number, done.created

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(rank, range(6)))
    assert [number for number, _ in results] == [0] * 6
    assert sum(created for _, created in results) == 1
    assert store.collection(NAME).aliases == {"latest": 0, **{f"rank{n}": 0 for n in range(6)}}


def test_a_newest_version_deleted_meanwhile_is_not_returned(store: NativeStore, tmp_path: Path) -> None:
    same = MadeFolder({"x": new_file(tmp_path / "x", b"same")})
    commit(store, same)
    done = commit(store, Meanwhile(same, lambda: open_store(store.url).delete_version(NAME)), aliases=["best"])
    assert done.created and done.version.number == 1
    assert store.collection(NAME).aliases == {"latest": 1, "best": 1}
    assert contents(store, done.version) == {"x": (b"same", False)}
    gc(store, grace=-10)
    assert problems(store.url) == []


def test_latest_stays_with_the_highest_version(store: NativeStore, tmp_path: Path) -> None:
    """A slow commit that took the lower number points its aliases last."""
    folder = MadeFolder({"x": new_file(tmp_path / "x", b"slow")})
    real = store.create_version

    def slow(version: Any) -> bool:
        made = real(version)
        store.create_version = real  # type: ignore[method-assign]
        commit(open_store(store.url), {"x": new_file(tmp_path / "o", b"fast")}, aliases=["fast"])
        return made

    store.create_version = slow  # type: ignore[method-assign]
    assert commit(store, folder, aliases=["slow"]).version.number == 0
    assert store.collection(NAME).aliases == {"fast": 1, "slow": 0, "latest": 1}


# A base that was deleted while it was staged


def test_a_base_deleted_and_collected_meanwhile(store: NativeStore, tmp_path: Path) -> None:
    first = commit(store, {"x": new_file(tmp_path / "x", os.urandom(1000))}).version
    commit(store, {"y": new_file(tmp_path / "y", os.urandom(1000))})
    store.delete_version(NAME.at("v0"))
    gc(store, grace=-10)
    staged = MadeFolder({"z": new_file(tmp_path / "z", b"new")}, first.root)
    with nothing_leaks(), pytest.raises(IntegrityError, match="v0 was deleted while it was staged, and is collected"):
        commit(open_store(store.url), staged, base=0)
    assert store.numbers(NAME) == [0, 1] and problems(store.url) == []


def test_a_base_deleted_but_not_yet_collected_is_kept(store: NativeStore, tmp_path: Path) -> None:
    """A collection that looked at the versions before the commit, and removes afterwards, spares what the commit keeps."""
    first = commit(
        store, {"x": new_file(tmp_path / "x", os.urandom(1000)), "l": new_file(tmp_path / "l", bytes(3 * BLOCK))}
    ).version
    commit(store, {"y": new_file(tmp_path / "y", os.urandom(1000))})
    store.delete_version(NAME.at("v0"))
    for key in objects(store.url):
        os.utime(Path(store.url, key), (0, 0))
    moment = time.time() - 5
    staged = MadeFolder({"z": new_file(tmp_path / "z", b"new")}, first.root)
    done = commit(open_store(store.url), staged, base=0)
    for key in objects(store.url):
        store.objects.delete(key, unless_newer=moment)
    assert contents(store, done.version) == {
        "x": contents(store, first)["x"],
        "l": (bytes(3 * BLOCK), False),
        "z": (b"new", False),
    }


# Many processes

_COMMITTER = """
import os, sys
sys.path.insert(0, sys.argv[4])
from pathlib import Path
from commits import commit, new_file
from artifactfs.store.urls import open_store
store = open_store(sys.argv[1])
work = Path(sys.argv[2]) / sys.argv[3]
for number in range(25):
    who = f"{sys.argv[3]}-{number}"
    files = {"who": new_file(work / "who", who.encode()), "shared": new_file(work / "shared", bytes(2000))}
    if number % 10 == 0:
        files["large"] = new_file(work / "large", who.encode() * 200_000)
    version = commit(store, files, commit=who, metadata={"who": who}, aliases=[f"by-{sys.argv[3]}"]).version
    assert store.version(__import__("commits").NAME.at(version.name)).commit == who
"""

_EDITOR = """
import sys
sys.path.insert(0, sys.argv[4])
import msgspec
from commits import NAME
from artifactfs.errors import NotFoundError
from artifactfs.store.urls import open_store
store = open_store(sys.argv[1])
edits = 0
while edits < 60:
    try:
        newest = store.version(NAME)
    except NotFoundError:
        continue
    def change(collection):
        aliases = {**collection.aliases, f"{sys.argv[3]}-{edits}": newest.number}
        return msgspec.structs.replace(collection, aliases=aliases, tags=[*collection.tags, f"{sys.argv[3]}-{edits}"])
    store.update_collection(NAME, change)
    edits += 1
"""


@pytest.mark.slow
def test_eight_processes_commit_25_versions_each_while_others_edit_the_collection(store: NativeStore, tmp_path: Path) -> None:
    arguments = [store.url, str(tmp_path)]
    tests = str(Path(__file__).parent)
    started = [subprocess.Popen([sys.executable, "-c", _COMMITTER, *arguments, f"c{n}", tests]) for n in range(8)]
    started += [subprocess.Popen([sys.executable, "-c", _EDITOR, *arguments, f"e{n}", tests]) for n in range(2)]
    assert [process.wait(100) for process in started] == [0] * 10
    assert store.numbers(NAME) == list(range(200))
    versions = store.versions(NAME)
    assert {version.commit for version in versions} == {f"c{n}-{i}" for n in range(8) for i in range(25)}
    for version in versions:
        assert version.metadata == {"who": version.commit}
        found = contents(store, version)
        assert found["who"] == (version.commit.encode(), False) and found["shared"] == (bytes(2000), False)
        assert ("large" in found) == (int(version.commit.split("-")[1]) % 10 == 0)
        if "large" in found:
            assert found["large"] == (version.commit.encode() * 200_000, False)
    collection = store.collection(NAME)
    assert collection.aliases["latest"] == 199
    for n in range(8):
        assert versions[collection.aliases[f"by-c{n}"]].commit == f"c{n}-24"
    edits = {f"e{n}-{i}" for n in range(2) for i in range(60)}
    assert set(collection.tags) == edits and edits <= collection.aliases.keys()
    assert problems(store.url) == [] and leftovers(store.url) == []


def test_aliases_and_deletions_at_once_leave_no_alias_that_leads_nowhere(store: NativeStore, tmp_path: Path) -> None:
    for number in range(12):
        commit(store, {"x": new_file(tmp_path / "x", b"%d" % number)})
    stop = threading.Event()

    def edit(who: int) -> None:
        mine = open_store(store.url)
        number = 0
        while not stop.is_set():
            number += 1

            def change(collection: Collection, number: int = number) -> Collection:
                return msgspec.structs.replace(collection, aliases={**collection.aliases, f"a{who}": number % 12})

            try:
                mine.update_collection(NAME, change)
            except NotFoundError:
                continue

    def delete(numbers: list[int]) -> None:
        mine = open_store(store.url)
        for number in numbers:
            mine.delete_version(NAME.at(f"v{number}"), delete_aliases=True)

    with ThreadPoolExecutor(5) as pool:
        editors = [pool.submit(edit, who) for who in range(3)]
        deleters = [pool.submit(delete, [11, 9, 7, 5, 3]), pool.submit(delete, [10, 8, 6, 4, 2])]
        for deleter in deleters:
            deleter.result(60)
        stop.set()
        for editor in editors:
            editor.result(60)
    assert [version.number for version in store.versions(NAME)] == [0, 1]
    assert store.collection(NAME).aliases["latest"] == 1
    assert set(store.collection(NAME).aliases.values()) <= {0, 1}
    assert problems(store.url) == []


# Repeating a commit


def test_a_repeated_commit_finds_its_version(store: NativeStore, tmp_path: Path) -> None:
    first = draft({"x": new_file(tmp_path / "x", b"1")}, aliases=["best"])
    publish(store, first)
    for number in range(3):
        commit(store, {"x": new_file(tmp_path / "y", b"other %d" % number)})
    (tmp_path / "x").unlink()
    again = publish(store, again_with(first, retry=True))
    assert again.created and again.version.number == 0
    assert store.numbers(NAME) == [0, 1, 2, 3]
    assert store.collection(NAME).aliases == {"latest": 3, "best": 0}


def again_with(draft: Draft, **fields: Any) -> Draft:
    return dataclasses.replace(draft, **fields)


def test_a_repeated_commit_whose_version_was_deleted_is_a_new_one(store: NativeStore, tmp_path: Path) -> None:
    first = draft({"x": new_file(tmp_path / "x", b"1")}, commit="once")
    publish(store, first)
    store.delete_version(NAME)
    again = publish(store, again_with(first, retry=True))
    assert again.created and again.version.number == 1


def test_given_files_may_lie_anywhere(store: NativeStore) -> None:
    """An entry of another version, collection or algorithm is taken as it is."""
    data = b"content"
    at = Extent(b"p" + secrets.token_bytes(16), 0, len(data))
    given = File("other name", len(data), True, blake3(data).digest(), (at,), algorithm="MD5", checksum="sum")
    version = commit(store, {"x": given}, algorithm="MD5").version
    assert file_at(store, version, "x") == msgspec.structs.replace(given, name="x")
