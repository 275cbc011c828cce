"""A commit that is stopped at any step: by SIGKILL, by a disk that is full, read-only or broken, by a loss of power."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commits import NAME, commit, contents, draft, file_at, fork, leftovers, new_file, nothing_leaks, problems
from shelves import write_files
from steps import FailFrom, Journal, die_at, small_packs, steps

from artifactfs.errors import ArtifactFSError, NotFoundError, ReadOnlyError, StorageFullError
from artifactfs.folders import MadeFolder
from artifactfs.maintenance import gc
from artifactfs.model import BLOCK, Run
from artifactfs.publish import Draft, NewFile, Published, publish
from artifactfs.store.native import NativeStore, now
from artifactfs.store.urls import open_store

MAX_STEPS = 400


@dataclasses.dataclass
class Scenario:
    """``template``: the store before; ``expected``: what the new version holds; ``old``: what the one before it holds."""

    template: Path
    draft: Callable[[NativeStore], Draft]
    number: int
    expected: dict[str, Any]
    old: dict[str, Any] | None


def _first(tmp_path: Path) -> Scenario:
    """The first version ever: small files in several packs, a large one, folders."""
    files = {f"d{n % 3}/f{n}": os.urandom(4000) for n in range(15)} | {"large": os.urandom(2 * BLOCK + 5), "link": "large"}
    data = write_files(tmp_path / "data", files)
    made = draft(data, aliases=["best"], metadata={"a": 1}, commit="once")
    expected: dict[str, Any] = {path: value if isinstance(value, str) else (value, False) for path, value in files.items()}
    return Scenario(tmp_path / "nothing", lambda store: made, 0, expected | {"d0": None, "d1": None, "d2": None}, None)


def _later(tmp_path: Path) -> Scenario:
    """A later version: a large file changed in part, a small one added and one removed, over a base."""
    large = os.urandom(3 * BLOCK + 100)
    store = open_store(str(tmp_path / "template"))
    first = {"large": large, "gone": b"gone", "kept": os.urandom(30_000), "sub/x": b"x"}
    commit(store, write_files(tmp_path / "data", first), aliases=["best"])
    base = store.version(NAME)
    changed = bytearray(large + os.urandom(BLOCK))
    changed[5] ^= 1
    patch = new_file(tmp_path / "patch", bytes(changed))

    def make(store: NativeStore) -> Draft:
        new = NewFile(patch.path, False, file_at(store, base, "large"), frozenset({0, 3, 4}))
        folder = MadeFolder({"large": new, "gone": None, "new": new_file(tmp_path / "n", b"new" * 1000)}, base.root)
        return draft(folder, aliases=["best"], commit="once", base=0, expect_base=0)

    old: dict[str, Any] = {path: (data, False) for path, data in first.items()} | {"sub": None}
    expected = old | {"large": (bytes(changed), False), "new": (b"new" * 1000, False)}
    del expected["gone"]
    return Scenario(tmp_path / "template", make, 1, expected, old)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: hundreds of commits whose fsyncs cost nothing."""
    parent = Path("/dev/shm")
    if not os.access(parent, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=parent) as path:
        yield Path(path)


@pytest.fixture(params=[_first, _later], ids=["first", "later"])
def scenario(request: pytest.FixtureRequest, memory: Path) -> Iterator[Scenario]:
    with small_packs():
        yield request.param(memory)


def fresh(scenario: Scenario, root: Path) -> NativeStore:
    shutil.rmtree(root, ignore_errors=True)
    if scenario.template.exists():
        shutil.copytree(scenario.template, root)
    return open_store(str(root))


def check_stopped(scenario: Scenario, root: Path, where: str) -> None:
    """Nothing refers to what is missing, and whoever looks sees the old version or the new one, whole."""
    assert problems(root) == [], where
    store = open_store(str(root))
    try:
        seen = store.version(NAME)
    except NotFoundError:
        assert scenario.old is None and not _numbers(store), where
        return
    assert contents(store, seen) == (scenario.old if seen.number < scenario.number else scenario.expected), where
    for number in _numbers(store):
        assert contents(store, store.any_version(NAME, number)) in (scenario.old, scenario.expected), where


def _numbers(store: NativeStore) -> list[int]:
    return [version.number for version in store.versions(NAME)] if store.numbers(NAME) else []


def check_repeated(scenario: Scenario, root: Path, where: str) -> None:
    """Repeating the commit makes it exactly one version, with its aliases; nothing stays behind for good."""
    store = open_store(str(root))
    done: Published = publish(store, dataclasses.replace(scenario.draft(store), retry=True))
    assert done.created and done.version.number == scenario.number, where
    assert store.numbers(NAME) == list(range(scenario.number + 1)), where
    assert store.collection(NAME).aliases == {"latest": scenario.number, "best": scenario.number}, where
    assert contents(store, store.version(NAME)) == scenario.expected, where
    gc(store, grace=-10)
    assert problems(root) == [] and leftovers(root) == [], where
    assert contents(open_store(str(root)), store.version(NAME)) == scenario.expected, where


@pytest.mark.slow
def test_killed_before_every_step(scenario: Scenario, memory: Path) -> None:
    root = memory / "store"
    for step in range(MAX_STEPS):
        fresh(scenario, root)

        def die(step: int = step) -> None:
            store = open_store(str(root))
            made = scenario.draft(store)
            with steps(die_at(step)):
                publish(store, made)

        status = fork(die)
        assert status in (0, -9)
        check_stopped(scenario, root, f"killed at step {step}")
        check_repeated(scenario, root, f"repeated after step {step}")
        if status == 0:
            assert step > 40, "the steps were counted"
            return
    raise AssertionError(f"more than {MAX_STEPS} steps")


def test_everything_is_durable_before_the_version_appears(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the version is before it is acknowledged."""
    store = fresh(scenario, tmp_path / "synced")
    made = scenario.draft(store)
    journal = Journal(monkeypatch)
    publish(store, made)
    assert journal.problems == [] and journal.pending == set()
    named = [event.split()[-1].removeprefix(store.url) for event in journal.events if event.startswith("name")]
    kinds = [next(kind for kind in ("store.json", "packs", "blobs", "versions", "collection.json") if kind in it) for it in named]
    order = {"store.json": 0, "packs": 1, "blobs": 1, "versions": 2, "collection.json": 3}
    assert [order[kind] for kind in kinds] == sorted(order[kind] for kind in kinds)
    assert kinds.count("packs") >= 2 and kinds.count("blobs") == 1 and kinds.count("versions") == 1


CLASSES = {errno.ENOSPC: StorageFullError, errno.EROFS: ReadOnlyError, errno.EIO: ArtifactFSError, errno.EDQUOT: StorageFullError}


@pytest.mark.slow
def test_a_disk_that_fails_at_every_step(scenario: Scenario, memory: Path) -> None:
    """The error says what and where, nothing is broken or left behind, and a repetition does it."""
    root = memory / "store"
    for step in range(MAX_STEPS):
        code = list(CLASSES)[step % len(CLASSES)]
        store = fresh(scenario, root)
        made = scenario.draft(store)
        fault = FailFrom(step, code)
        with nothing_leaks(), steps(fault), contextlib.suppress(ArtifactFSError):
            try:
                publish(store, made)
            except ArtifactFSError as error:
                assert type(error) is CLASSES[code], (step, error)
                assert str(root) in str(error) and "\n" not in str(error)
                assert os.strerror(code) in str(error)
                raise
        assert leftovers(root) == [], step
        check_stopped(scenario, root, f"failed at step {step}")
        check_repeated(scenario, root, f"repeated after step {step}")
        if not fault.failed:
            assert step > 40, "the steps were counted"
            return
    raise AssertionError(f"more than {MAX_STEPS} steps")


@pytest.mark.parametrize("action", ["delete", "gc"])
def test_deleting_and_collecting_killed_before_every_step(memory: Path, tmp_path: Path, action: str) -> None:
    template, root = memory / "template", memory / "store"
    store = open_store(str(template))
    kept: dict[int, dict[str, Any]] = {}
    with small_packs():
        for number in range(4):
            files = {f"f{n}": new_file(tmp_path / f"{number}-{n}", os.urandom(9000)) for n in range(3)}
            kept[number] = contents(store, commit(store, MadeFolder(files), aliases=[f"a{number}"]).version)
    if action == "gc":
        store.delete_version(NAME.at("v1"), delete_aliases=True)
        store.delete_version(NAME.at("v2"), delete_aliases=True)

    def act() -> None:
        store = open_store(str(root))
        if action == "gc":
            gc(store, grace=-10)
        else:
            store.delete_version(NAME.at("v3"), delete_aliases=True)

    def die(step: int) -> None:
        with steps(die_at(step)):
            act()

    left = {0, 3} if action == "gc" else {0, 1, 2}
    for step in range(MAX_STEPS):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(template, root)
        status = fork(lambda step=step: die(step))  # type: ignore[misc]
        assert status in (0, -9)
        assert problems(root) == [], step
        found = open_store(str(root))
        live = {version.number for version in found.versions(NAME)}
        assert left <= live and found.version(NAME).number in live
        with contextlib.suppress(NotFoundError):
            act()
        assert {version.number for version in found.versions(NAME)} == left
        for number in left:
            assert contents(found, found.any_version(NAME, number)) == kept[number]
        assert found.collection(NAME).aliases == {"latest": max(left), **{f"a{n}": n for n in left}}
        gc(found, grace=-10)
        assert problems(root) == [] and leftovers(root) == []
        if status == 0:
            return
    raise AssertionError(f"more than {MAX_STEPS} steps")


# Real disks


@contextlib.contextmanager
def mounted(point: Path, *arguments: str) -> Iterator[Path]:
    point.mkdir(exist_ok=True)
    subprocess.run(["mount", *arguments, str(point)], check=True, capture_output=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=4m", "none") as disk:
        store = open_store(str(disk / "store"))
        commit(store, {"x": new_file(tmp_path / "x", b"fits")})
        for size in (6 << 20, 900_000):
            files = {f"f{n}": new_file(tmp_path / f"f{n}", os.urandom(size)) for n in range(1 if size > BLOCK else 6)}
            with nothing_leaks(), pytest.raises(StorageFullError, match=r"No space left on device; make space on that disk"):
                commit(store, MadeFolder(files))
            assert leftovers(store.url) == [] and problems(store.url) == []
            assert store.numbers(NAME) == [0]
        gc(store, grace=-10)
        assert commit(store, {"x": new_file(tmp_path / "x", b"fits as well")}).version.number == 1


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_disk_that_is_really_read_only(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "none") as disk:
        version = commit(open_store(str(disk / "store")), {"x": new_file(tmp_path / "x", b"x")}).version
        run = Run(entity="acme", project="vision", id="r1", created_at=now(), updated_at=now())
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        store = open_store(str(disk / "store"))
        assert contents(store, store.version(NAME)) == {"x": (b"x", False)}
        assert problems(store.url) == []
        for write in (
            lambda: commit(store, {"x": new_file(tmp_path / "x", b"y")}),
            lambda: store.delete_version(NAME),
            lambda: store.mark_used(version, run),
            lambda: store.save_run(run),
        ):
            with nothing_leaks(), pytest.raises(ReadOnlyError, match="mounted read-only"):
                write()
        with pytest.raises(ReadOnlyError):
            commit(open_store(str(disk / "new")), {"x": new_file(tmp_path / "x", b"y")})


_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32): EXT4_IOC_SHUTDOWN, the same as XFS_IOC_GOINGDOWN
_NO_LOG_FLUSH = struct.pack("I", 2)


def _lose_power(disk: Path) -> None:
    """From here on nothing reaches the disk, and what only the journal's memory has is lost."""
    fd = os.open(disk, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, _SHUTDOWN, _NO_LOG_FLUSH)
    finally:
        os.close(fd)


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mkfs.ext4") is None, reason="mounts a file system")
def test_what_was_acknowledged_survives_a_loss_of_power(tmp_path: Path) -> None:
    """And a commit that was under way is there whole or not at all."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    disk, root = tmp_path / "disk", tmp_path / "disk/store"
    expected: dict[int, dict[str, Any]] = {}
    number = 0
    with small_packs():
        for step in (None, 3, 14, 25, 36, 47, 58, 64, 70, 76, 82, 88, None):
            files = {f"d{n}/f": os.urandom(9000) for n in range(4)} | {"large": os.urandom(BLOCK + 1)}
            data = write_files(tmp_path / f"data{number}", files)
            acknowledged = False
            with mounted(disk, "-o", "loop", str(image)):
                store = open_store(str(root))

                def before(taken: int, what: str, step: int | None = step) -> None:
                    if taken == step:
                        _lose_power(disk)

                with steps(before), contextlib.suppress(ArtifactFSError):
                    commit(store, data, commit=f"c{number}-{step}")
                    acknowledged = True
                if acknowledged:
                    _lose_power(disk)
            with mounted(disk, "-o", "loop", str(image)):
                assert problems(root) == [], step
                store = open_store(str(root))
                found = store.numbers(NAME)
                assert found == list(range(number + 1)) or (not acknowledged and found == list(range(number))), step
                if len(found) > number:
                    expected[number] = {path: (value, False) for path, value in files.items()} | {f"d{n}": None for n in range(4)}
                    number += 1
                for version in store.versions(NAME) if found else []:
                    assert contents(store, version) == expected[version.number], step
    assert number >= 2
