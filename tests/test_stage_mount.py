"""Staging mounts through a real kernel: programs write as they always do, and unmounting, however, makes the version."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from mounting import World, needs_fuse, world
from shelves import Files, until, write_files

from artifactfs import daemon, resume
from artifactfs.errors import (
    ConflictError,
    InvalidNameError,
    MountError,
    NotFoundError,
    NotPermittedError,
    ReadOnlyError,
    UsageError,
)
from artifactfs.model import BLOCK
from artifactfs.names import parse

pytestmark = needs_fuse
__all__ = ["world"]

BASE: Files = {"keep": b"kept", "change": b"before", "data/big": bytes(range(256)) * 8000, "gone": b"x", "run.sh": b"#!/bin/sh\n"}


def run(*command: str | Path, **options: Any) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=250, **options)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def snapshot(path: Path, to: Path) -> Path:
    """A copy of what a stage shows, taken by cp."""
    run("cp", "-a", path, to)
    return to


def assert_version_is(world: World, name: str, expected: Path) -> None:
    """``name`` mounted equals the directory: contents, links, executable bits, empty directories."""
    mounted = world.mount(name)
    assert run("diff", "-r", "--no-dereference", expected, mounted) == ""
    listing = "find . -type d -printf '%p/\\n' -o -type l -printf '%p -> %l\\n' -o -executable -printf '%p*\\n' -o -print | sort"
    assert run("sh", "-c", listing, cwd=expected) == run("sh", "-c", listing, cwd=mounted)
    daemon.unmount(mounted)


@pytest.fixture
def staged(world: World) -> Path:
    world.log("acme/vision/bikes", BASE)
    return world.stage("acme/vision/bikes")


def test_a_change_becomes_the_next_version(world: World, staged: Path) -> None:
    assert run("findmnt", "-no", "SOURCE,FSTYPE", staged).split() == ["artifactfs#acme/vision/bikes:v0", "fuse.artifactfs"]
    assert "rw" in run("findmnt", "-no", "OPTIONS", staged).strip().split(",")
    (staged / "new/deep").mkdir(parents=True)
    (staged / "new/deep/file").write_bytes(b"new")
    (staged / "change").write_bytes(b"after")
    with open(staged / "data/big", "ab") as file:
        file.write(b"appended")
    (staged / "gone").unlink()
    (staged / "new/link").symlink_to("../keep")
    (staged / "keep").chmod(0o755)
    (staged / "empty").mkdir()
    assert {(row["path"], row["change"]) for row in daemon.status(staged)} == {
        ("new", "added"), ("new/deep", "added"), ("new/deep/file", "added"), ("new/link", "added"), ("empty", "added"),
        ("change", "modified"), ("data/big", "modified"), ("keep", "modified"), ("gone", "deleted"),
    }  # fmt: skip
    expected = snapshot(staged, world.root / "expected")
    result = daemon.unmount(staged)
    assert (result.committed, result.created) == ("acme/vision/bikes:v1", True)
    assert os.listdir(staged) == []
    assert os.listdir(world.settings.staging_dir) == []
    assert daemon.mounts(all=True) == []
    assert_version_is(world, "acme/vision/bikes:latest", expected)
    assert_version_is(world, "acme/vision/bikes:v0", world.root / "made-0")


@pytest.mark.parametrize("how", ["umount", "fusermount", "lazy", "SIGTERM", "SIGINT"])
def test_ending_by_any_means_commits(world: World, staged: Path, how: str) -> None:
    (staged / "new").write_bytes(b"new")
    record = world.record(staged)
    if how.startswith("SIG"):
        os.kill(record.pid, getattr(signal, how))
    else:
        subprocess.run(
            {"umount": ["umount"], "fusermount": ["fusermount3", "-u"], "lazy": ["umount", "-l"]}[how] + [staged], check=True
        )
    until(lambda: not record.process.lives())
    assert [(r.state, r.committed) for r in daemon.mounts(all=True)] == [("committed", "acme/vision/bikes:v1")]
    assert daemon.mounts() == []
    result = daemon.unmount(staged)  # asked afterwards, it tells what came of it, once
    assert (result.committed, result.created) == ("acme/vision/bikes:v1", True)
    with pytest.raises(MountError):
        daemon.unmount(staged)
    assert (world.mount("acme/vision/bikes:latest") / "new").read_bytes() == b"new"


def test_nothing_changed_makes_nothing(world: World, staged: Path) -> None:
    (staged / "new").write_bytes(b"")
    (staged / "new").unlink()
    result = daemon.unmount(staged)
    assert (result.committed, result.created) == ("acme/vision/bikes:v0", False)
    assert len(world.store.versions(parse("acme/vision/bikes"))) == 1


def test_discard(world: World, staged: Path) -> None:
    (staged / "new").write_bytes(b"new")
    result = daemon.unmount(staged, discard=True)
    assert (result.committed, result.discarded) == ("", True)
    assert len(world.store.versions(parse("acme/vision/bikes"))) == 1
    assert os.listdir(world.settings.staging_dir) == [] and daemon.mounts(all=True) == []


def test_commit_without_unmounting(world: World, staged: Path) -> None:
    (staged / "one").write_bytes(b"1")
    first = daemon.commit(staged)
    assert (first.committed, first.created) == ("acme/vision/bikes:v1", True)
    assert daemon.status(staged) == []
    (staged / "two").write_bytes(b"2")
    assert daemon.unmount(staged).committed == "acme/vision/bikes:v2"
    mounted = world.mount("acme/vision/bikes:v1")
    assert (mounted / "one").exists() and not (mounted / "two").exists()


def test_a_new_collection_with_everything_said(world: World) -> None:
    path = world.stage(
        "acme/vision/fresh", type="model", aliases=("best",), tags=("a tag",), description="words", metadata={"k": [1, None]}
    )
    assert os.listdir(path) == []
    (path / "weights").write_bytes(b"w" * 10)
    assert daemon.unmount(path).committed == "acme/vision/fresh:v0"
    version = world.store.version(parse("acme/vision/fresh:best"))
    assert (version.type, version.tags, version.description, version.metadata) == ("model", ["a tag"], "words", {"k": [1, None]})


def test_description_and_metadata_are_the_bases_unless_given(world: World) -> None:
    path = world.stage("acme/vision/fresh", description="words", metadata={"k": 1})
    (path / "one").write_bytes(b"1")
    daemon.unmount(path)
    for number, fields, expected in ((1, {}, ("words", {"k": 1})), (2, {"description": "new", "metadata": {}}, ("new", {}))):
        path = world.stage("acme/vision/fresh", **fields)
        (path / f"more{number}").write_bytes(b"2")
        daemon.unmount(path)
        version = world.store.version(parse(f"acme/vision/fresh:v{number}"))
        assert (version.description, version.metadata) == expected


def test_an_empty_stage_of_nothing_is_no_version(world: World) -> None:
    path = world.stage("acme/vision/fresh", type="model")
    result = daemon.unmount(path)
    assert (result.committed, result.created) == ("", False)
    with pytest.raises(NotFoundError):
        world.store.collection(parse("acme/vision/fresh"))


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"type": "model"}, UsageError),
        ({"base": "v7"}, NotFoundError),
        ({"base": "a/b"}, InvalidNameError),
        ({"aliases": ("v3",)}, InvalidNameError),
        ({"tags": ("bad/tag",)}, InvalidNameError),
        ({"metadata": {"x": float("inf")}}, InvalidNameError),
        ({"resume": "/nonexistent"}, NotFoundError),
    ],
)
def test_what_could_never_be_committed_is_refused_at_once(world: World, fields: dict[str, Any], error: type[Exception]) -> None:
    world.log("acme/vision/bikes", BASE)
    with pytest.raises(error):
        world.stage(**{"name": "acme/vision/bikes", **fields})
    assert not world.settings.staging_dir.exists() or os.listdir(world.settings.staging_dir) == []


def test_bases(world: World) -> None:
    world.log("acme/vision/bikes", {"a": b"0"})
    world.log("acme/vision/bikes", {"a": b"1"}, aliases=["best"])
    world.log("acme/vision/bikes", {"a": b"2"})
    for base, expected in (("", b"2"), ("v0", b"0"), ("best", b"1"), ("none", None)):
        path = world.stage("acme/vision/bikes", base=base)
        assert (path / "a").read_bytes() == expected if expected else os.listdir(path) == []
        daemon.unmount(path, discard=True)


def test_expect_base(world: World, staged: Path) -> None:
    first, second = world.stage("acme/vision/bikes", expect_base=True), staged
    (first / "mine").write_bytes(b"1")
    (second / "theirs").write_bytes(b"2")
    assert daemon.unmount(second).committed == "acme/vision/bikes:v1"
    record = world.record(first)
    with pytest.raises(ConflictError, match="commit --resume"):
        daemon.unmount(first)
    assert (Path(record.staging) / "stage.json").exists()
    assert [found.state for found in daemon.mounts()] == ["failed"]
    left = resume.find_stage(world.settings, str(first))
    with pytest.raises(ConflictError, match="--no-expect-base"):
        resume.finish(world.settings, left)
    assert resume.finish(world.settings, left, expect_base=False).committed == "acme/vision/bikes:v2"
    assert os.listdir(world.settings.staging_dir) == []


def test_two_stages_of_one_collection_make_two_versions(world: World, staged: Path) -> None:
    other = world.stage("acme/vision/bikes")
    (staged / "a").write_bytes(b"1")
    (other / "b").write_bytes(b"2")
    assert {daemon.unmount(staged).committed, daemon.unmount(other).committed} == {"acme/vision/bikes:v1", "acme/vision/bikes:v2"}


# What programs do


def test_system_calls(staged: Path) -> None:
    path = staged / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
    assert os.pwrite(fd, b"hello world", 0) == 11
    os.ftruncate(fd, 5)
    os.fsync(fd)
    os.fdatasync(fd)
    assert os.pread(fd, 100, 0) == b"hello"
    os.lseek(fd, 1 << 30, os.SEEK_SET)
    os.write(fd, b"sparse")
    assert os.fstat(fd).st_size == (1 << 30) + 6 and os.fstat(fd).st_blocks < 1000
    os.truncate(path, 5)
    assert os.fstat(fd).st_size == 5
    with pytest.raises(FileExistsError):
        os.open(path, os.O_CREAT | os.O_EXCL)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o640
    os.utime(path, ns=(10**18 + 1, 10**18 + 2))
    assert (os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns) == (10**18 + 1, 10**18 + 2)
    run("touch", "-m", "-d", "@5", path)
    assert (os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns) == (10**18 + 1, 5 * 10**9)
    run("touch", path)
    assert abs(os.stat(path).st_mtime - time.time()) < 60
    os.setxattr(path, "user.k", b"v")
    assert os.listxattr(path) == ["user.k"] and os.getxattr(path, "user.k") == b"v"
    os.removexattr(path, "user.k")
    os.link(path, staged / "hard")
    assert os.stat(staged / "hard").st_nlink == 2 and os.stat(staged / "hard").st_ino == os.stat(path).st_ino
    os.rename(staged / "hard", staged / "change")
    assert (staged / "change").read_bytes() == b"hello"
    os.rename(staged / "data", staged / "moved")
    assert (staged / "moved/big").stat().st_size == 256 * 8000
    (staged / "moved/sub").mkdir()
    assert run("ls", "-a", staged / "moved/sub").split() == [".", ".."]
    for act, expected in (
        (lambda: os.rmdir(staged / "moved"), errno.ENOTEMPTY),
        (lambda: os.rename(staged / "moved", staged / "moved/sub/in"), errno.EINVAL),
        (lambda: os.mkdir(staged / "moved"), errno.EEXIST),
        (lambda: os.mkdir(staged / ("n" * 256)), errno.ENAMETOOLONG),
        (lambda: os.open(staged / "moved", os.O_WRONLY), errno.EISDIR),
        (lambda: os.listdir(staged / "file"), errno.ENOTDIR),
    ):
        with pytest.raises(OSError) as caught:
            act()
        assert caught.value.errno == expected
    fcntl.flock(fd, fcntl.LOCK_EX)
    fcntl.lockf(fd, fcntl.LOCK_EX)
    os.close(fd)
    assert os.statvfs(staged).f_bavail > 0


def test_the_callers_umask_and_modes(staged: Path) -> None:
    run("sh", "-c", "umask 027; echo x > file; mkdir dir; umask 0; echo y > open; mkdir -m 1777 shared", cwd=staged)
    modes = {name: oct(stat.S_IMODE(os.stat(staged / name).st_mode)) for name in ("file", "dir", "open", "shared")}
    assert modes == {"file": "0o640", "dir": "0o750", "open": "0o666", "shared": "0o1777"}


def test_open_files_that_are_removed_or_replaced(world: World, staged: Path) -> None:
    with open(staged / "gone", "r+b") as gone, open(staged / "keep", "rb") as old:
        os.unlink(staged / "gone")
        gone.seek(0)
        gone.write(b"still here")
        gone.seek(0)
        assert gone.read() == b"still here"
        assert os.fstat(gone.fileno()).st_size == 10
        (staged / "other").write_bytes(b"other")
        os.rename(staged / "other", staged / "keep")
        assert old.read() == b"kept"
        with tempfile.TemporaryFile(dir=staged) as anonymous:
            anonymous.write(b"z" * 5000)
            anonymous.flush()
            anonymous.seek(0)
            assert anonymous.read() == b"z" * 5000
            assert not [name for name in os.listdir(staged) if name.startswith(".fuse")]
            assert not [row for row in daemon.status(staged) if ".fuse" in row["path"]]
    assert daemon.unmount(staged).created
    mounted = world.mount("acme/vision/bikes:latest")
    assert sorted(os.listdir(mounted)) == ["change", "data", "keep", "run.sh"]
    assert (mounted / "keep").read_bytes() == b"other"


def test_mapped_writes(world: World, staged: Path) -> None:
    with open(staged / "data/big", "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[BLOCK - 3 : BLOCK + 3] = b"mapped"
        assert os.pread(file.fileno(), 6, BLOCK - 3) == b"mapped"  # shared writes are seen by read at once
        os.pwrite(file.fileno(), b"WRITE", 100)
        assert mapped[100:105] == b"WRITE"  # and the other way round
        mapped.flush()
    expected = bytearray(BASE["data/big"])  # type: ignore[arg-type]
    expected[BLOCK - 3 : BLOCK + 3] = b"mapped"
    expected[100:105] = b"WRITE"
    daemon.unmount(staged)
    assert (world.mount("acme/vision/bikes:v1") / "data/big").read_bytes() == expected


def test_appending_from_several_processes(world: World, staged: Path) -> None:
    script = "import os, sys\nfd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)\n"
    script += "for n in range(200): os.write(fd, (sys.argv[2] + '%06d' % n + chr(10)).encode())\n"
    writers = [subprocess.Popen([sys.executable, "-c", script, str(staged / "log"), letter]) for letter in "abcd"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0, 0]
    lines = (staged / "log").read_text().split()
    assert sorted(lines) == sorted(f"{letter}{number:06d}" for letter in "abcd" for number in range(200))
    daemon.unmount(staged)
    assert (world.mount("acme/vision/bikes:v1") / "log").read_text().split() == lines


def test_programs_that_write(world: World, staged: Path, tmp_path: Path) -> None:
    write_files(tmp_path / "src", {f"d{n % 5}/f{n}": os.urandom(n * 37) for n in range(60)})
    run("tar", "-C", tmp_path / "src", "-cf", tmp_path / "src.tar", ".")
    with zipfile.ZipFile(tmp_path / "src.zip", "w") as archive:
        archive.writestr("zipped/one", b"1" * 1000)
    git = ["git", "-C", str(staged / "repo"), "-c", "user.name=a", "-c", "user.email=a@b", "-c", f"safe.directory={staged}/repo"]
    run("git", "init", "-q", staged / "repo")
    run("tar", "-C", staged / "repo", "-xf", tmp_path / "src.tar")
    run(*git, "add", ".")
    run(*git, "commit", "-qm", "first")
    run(*git, "fsck", "--strict")
    run("sed", "-i", "s/before/behind/", staged / "change")
    assert (staged / "change").read_bytes() == b"behind"
    run("cp", "-a", tmp_path / "src", staged / "copied")
    run("rsync", "-aH", f"{tmp_path}/src/", staged / "synced")
    run(sys.executable, "-m", "zipfile", "-e", tmp_path / "src.zip", staged)
    with sqlite3.connect(staged / "db.sqlite") as database:
        database.execute("create table t (x)")
        for number in range(20):
            database.execute("insert into t values (?)", (number,))
            database.commit()
    database.close()
    editor = "echo edited > .keep.tmp && sync .keep.tmp && mv .keep.tmp keep"
    run("sh", "-c", editor, cwd=staged)
    expected = snapshot(staged, world.root / "expected")
    assert daemon.unmount(staged).created
    assert_version_is(world, "acme/vision/bikes:latest", expected)
    mounted = world.mount("acme/vision/bikes:latest")
    assert run("sqlite3", mounted / "db.sqlite", "pragma integrity_check; select count(*) from t").split() == ["ok", "20"]
    run("git", "-c", f"safe.directory={mounted}/repo", "-C", mounted / "repo", "fsck", "--strict")


def test_sqlite_with_several_writers(world: World, staged: Path) -> None:
    """In WAL mode, which needs shared maps and POSIX locks, and in journal mode."""
    script = (
        "import sqlite3, sys\n"
        "db = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)\n"
        "for n in range(10): db.execute('insert into t values (?)', (n,))\n"
    )
    for mode in ("wal", "delete"):
        path = staged / f"{mode}.db"
        with sqlite3.connect(path) as database:
            assert database.execute(f"pragma journal_mode={mode}").fetchone() == (mode,)
            database.execute("create table t (x)")
        database.close()
        writers = [subprocess.Popen([sys.executable, "-c", script, str(path)]) for _ in range(3)]
        assert [writer.wait(90) for writer in writers] == [0] * 3
        assert run("sqlite3", path, "pragma integrity_check; select count(*) from t").split() == ["ok", "30"]


def test_deleting_while_reading_a_large_directory(staged: Path) -> None:
    many = staged / "many"
    many.mkdir()
    for number in range(2000):
        os.mknod(many / f"file-{number:05d}")
    run("rm", "-r", many)
    assert not many.exists()


# When things go wrong


def test_a_killed_daemon_loses_nothing(world: World, staged: Path) -> None:
    (staged / "closed").write_bytes(os.urandom(3 * BLOCK))
    expected = (staged / "closed").read_bytes()
    writing = open(staged / "open", "wb", buffering=0)  # noqa: SIM115
    writing.write(b"written")
    record = world.kill(staged)
    with pytest.raises(OSError):
        writing.write(b"more")
    with contextlib.suppress(OSError):
        writing.close()
    assert [(found.state, found.staging) for found in daemon.mounts()] == [("dead", record.staging)]
    with pytest.raises(MountError, match="commit --resume"):
        daemon.unmount(staged)
    assert os.listdir(staged) == []
    assert [found.state for found in daemon.mounts(all=True)] == ["orphan"]
    again = world.start(world.request("stage", "acme/vision/bikes", staged, resume=record.staging))
    assert again.staging == record.staging
    assert (staged / "closed").read_bytes() == expected and (staged / "open").read_bytes() == b"written"
    assert daemon.unmount(staged).committed == "acme/vision/bikes:v1"
    assert (world.mount("acme/vision/bikes:v1") / "closed").read_bytes() == expected


def test_a_killed_stage_is_mounted_over_or_finished_without_mounting(world: World, staged: Path) -> None:
    (staged / "new").write_bytes(b"new")
    record = world.kill(staged)
    world.start(world.request("stage", "acme/vision/bikes", staged, resume=record.staging))  # the dead mount goes by itself
    assert (staged / "new").read_bytes() == b"new"
    assert [found.state for found in daemon.mounts(all=True)] == ["mounted"]
    world.kill(staged)
    finished = resume.finish(world.settings, resume.find_stage(world.settings, str(staged)))
    assert finished.committed == "acme/vision/bikes:v1"
    assert daemon.mounts(all=True) == [] and os.listdir(staged) == []


def test_a_dead_stage_can_be_discarded(world: World, staged: Path) -> None:
    (staged / "new").write_bytes(b"new")
    world.kill(staged)
    assert daemon.unmount(staged, discard=True).discarded
    assert os.listdir(world.settings.staging_dir) == [] and daemon.mounts(all=True) == []


def test_one_stage_is_not_used_twice(world: World, staged: Path) -> None:
    with pytest.raises(ConflictError, match="in use"):
        world.start(world.request("stage", "acme/vision/bikes", resume=world.record(staged).staging))
    (staged / "still").write_bytes(b"works")


def test_a_store_that_cannot_be_written_fails_the_commit_only(world: World, staged: Path) -> None:
    (staged / "new").write_bytes(os.urandom(100))
    record = world.record(staged)
    store = Path(world.settings.store)
    aside = store.with_name("aside")
    run("mount", "--bind", store, store)
    run("mount", "-o", "remount,ro,bind", store)
    try:
        with pytest.raises((NotPermittedError, ReadOnlyError), match="commit --resume"):
            daemon.unmount(staged)
    finally:
        run("umount", "-l", store)
    assert not aside.exists() and not os.path.ismount(staged)
    assert [(found.state, found.staging) for found in daemon.mounts()] == [("failed", record.staging)]
    with pytest.raises((NotPermittedError, ReadOnlyError)):
        daemon.unmount(staged)  # says it again
    finished = resume.finish(world.settings, resume.find_stage(world.settings, record.staging))
    assert finished.committed == "acme/vision/bikes:v1"


def test_busy_then_lazy(world: World, staged: Path) -> None:
    with open(staged / "late", "wb", buffering=0) as file:
        file.write(b"early ")
        with pytest.raises(ConflictError, match="busy"):
            daemon.unmount(staged)
        assert daemon.unmount(staged, lazy=True).detached
        assert not os.path.ismount(staged)
        file.write(b"and late")
        assert len(world.store.versions(parse("acme/vision/bikes"))) == 1
    until(lambda: len(world.store.versions(parse("acme/vision/bikes"))) == 2)
    assert (world.mount("acme/vision/bikes:v1") / "late").read_bytes() == b"early and late"
    until(lambda: [found.state for found in daemon.mounts(all=True) if found.kind == "stage"] == ["committed"])


def test_a_signal_while_files_are_open_waits_for_their_close(world: World, staged: Path) -> None:
    record = world.record(staged)
    with open(staged / "file", "wb", buffering=0) as file:
        file.write(b"one ")
        os.kill(record.pid, signal.SIGTERM)
        until(lambda: not os.path.ismount(staged))
        file.write(b"two")
    until(lambda: not record.process.lives())
    assert (world.mount("acme/vision/bikes:v1") / "file").read_bytes() == b"one two"


def test_a_signal_does_not_wait_for_ever(world: World, staged: Path) -> None:
    """Files that stay open: nothing half-written is committed, and the stage can be resumed."""
    path = world.stage("acme/vision/bikes", drain=0.3)
    record = world.record(path)
    with contextlib.suppress(OSError), open(path / "file", "wb", buffering=0) as file:
        file.write(b"half")
        os.kill(record.pid, signal.SIGTERM)
        until(lambda: not record.process.lives())
        with pytest.raises(OSError):
            file.write(b"more")
    assert [found.state for found in daemon.mounts() if found.id == record.id] == ["failed"]
    finished = resume.finish(world.settings, resume.find_stage(world.settings, record.staging))
    assert finished.committed == "acme/vision/bikes:v1"


def test_a_second_signal_stops_at_once(world: World, staged: Path) -> None:
    record = world.record(staged)
    with contextlib.suppress(OSError), open(staged / "file", "wb", buffering=0) as file:
        file.write(b"half")
        os.kill(record.pid, signal.SIGTERM)
        until(lambda: not os.path.ismount(staged))
        os.kill(record.pid, signal.SIGTERM)
        until(lambda: not record.process.lives())
        with pytest.raises(OSError):
            file.write(b"more")
    assert resume.find_stage(world.settings, record.staging).directory == Path(record.staging)


def test_a_full_staging_disk_is_the_writers_error(world: World, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=4m", "none", disk)
    try:
        path = world.stage("acme/vision/new", type="t", staging_dir=str(disk / "stages"))
        (path / "small").write_bytes(b"small")
        with pytest.raises(OSError) as caught:
            (path / "large").write_bytes(bytes(8 << 20))
        assert caught.value.errno == errno.ENOSPC
        (path / "large").unlink()
        (path / "more").write_bytes(b"more")
        assert daemon.unmount(path).committed == "acme/vision/new:v0"
    finally:
        run("umount", "-l", disk)
    assert sorted(os.listdir(world.mount("acme/vision/new:v0"))) == ["more", "small"]


def test_many_threads_write_while_it_is_read(world: World, staged: Path) -> None:
    wrong: list[str] = []

    def work(number: int) -> None:
        for step in range(40):
            path = staged / f"t{number}-{step}"
            path.write_bytes(bytes([number]) * (step * 100))
            if path.read_bytes() != bytes([number]) * (step * 100):
                wrong.append(path.name)
            os.listdir(staged)
            if step % 3 == 0:
                os.rename(path, staged / f"r{number}-{step}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    expected = snapshot(staged, world.root / "expected")
    daemon.unmount(staged)
    assert_version_is(world, "acme/vision/bikes:latest", expected)
    shutil.rmtree(expected)
