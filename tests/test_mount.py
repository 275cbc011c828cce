"""Read-only mounts through a real kernel: what programs see, and what they may not do."""

from __future__ import annotations

import errno
import importlib
import mmap
import os
import socket
import sqlite3
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_server import FaultServer
from mounting import World, needs_fuse, world
from shelves import until, write_files

from artifactfs.content import EMPTY_ID
from artifactfs.errors import NotFoundError, ReadOnlyError, SourceChangedError
from artifactfs.folders import MadeFolder, local_change
from artifactfs.model import BLOCK, File
from artifactfs.objects import object_key
from artifactfs.publish import NewRef
from artifactfs.references import expand

pytestmark = needs_fuse
__all__ = ["world"]
adapter = importlib.import_module("artifactfs.mount")  # by its name it is the function `artifactfs.mount`

BIG = os.urandom(3 * BLOCK + 12345)
FILES = {
    "readme.md": b"hello\n",
    "run.sh": b"#!/bin/sh\necho ran\n",
    "data/big.bin": BIG,
    "data/empty": b"",
    "link": "data/big.bin",
    "void": None,
}


def run(*command: str | Path, **options: Any) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60, **options)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def mounted(world: World) -> Path:
    world.log("acme/vision/bikes", FILES)
    return world.mount("acme/vision/bikes:latest")


def test_the_mount_table_says_what_it_is(mounted: Path) -> None:
    found = run("findmnt", "-no", "SOURCE,FSTYPE,OPTIONS", mounted).split()
    assert found[:2] == ["artifactfs#acme/vision/bikes:v0", "fuse.artifactfs"]
    assert "ro" in found[2].split(",")
    assert run("df", "--output=source,fstype,size", "-B1", mounted).splitlines()[1].split() == [
        "artifactfs#acme/vision/bikes:v0",
        "fuse.artifactfs",
        str(-(-sum(len(data) for data in FILES.values() if isinstance(data, bytes)) // 512) * 512),
    ]


def test_what_is_there(world: World, mounted: Path) -> None:
    assert run("diff", "-r", "--no-dereference", world.root / "made-0", mounted) == ""
    assert run(mounted / "run.sh") == "ran\n"
    assert os.readlink(mounted / "link") == "data/big.bin"
    status = os.stat(mounted / "readme.md")
    assert (stat.filemode(status.st_mode), status.st_size, status.st_nlink) == ("-r--r--r--", 6, 1)
    types = {
        entry.name: (entry.is_dir(follow_symlinks=False), entry.is_symlink(), entry.inode()) for entry in os.scandir(mounted)
    }
    assert types == {
        name: (path.is_dir() and not path.is_symlink(), path.is_symlink(), path.lstat().st_ino)
        for name in ("readme.md", "run.sh", "data", "link", "void")
        for path in [mounted / name]
    }
    assert os.stat(mounted).st_ino == 1
    assert run("ls", "-a", mounted / "void").split() == [".", ".."]
    dots = [str(path.stat().st_ino) for path in (mounted / "data", mounted)]
    assert run("ls", "-ai1", mounted / "data").split()[:4] == [dots[0], ".", dots[1], ".."]


def test_programs_that_read_in_their_own_way(world: World, mounted: Path, tmp_path: Path) -> None:
    source = world.root / "made-0"
    run("bash", "-c", f"tar cf - . | tar xf - -C {tmp_path}", cwd=mounted)
    assert (tmp_path / "data/big.bin").read_bytes() == BIG
    assert run("rsync", "-nrlc", "--delete", "--out-format=%n", f"{source}/", f"{mounted}/").strip() == ""
    run("cp", "--reflink=auto", "-a", mounted / "data", tmp_path / "copied")
    assert (tmp_path / "copied/big.bin").read_bytes() == BIG
    with open(mounted / "data/big.bin", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[BLOCK - 5 : BLOCK + 5] == BIG[BLOCK - 5 : BLOCK + 5]
    direct = os.open(mounted / "data/big.bin", os.O_RDONLY | os.O_DIRECT)
    with mmap.mmap(-1, 2 * BLOCK) as buffer:
        assert os.preadv(direct, [buffer], BLOCK) == 2 * BLOCK
        assert buffer[:] == BIG[BLOCK : 3 * BLOCK]
    os.close(direct)
    ours, theirs = socket.socketpair()
    received = bytearray()
    drain = threading.Thread(target=lambda: [received.extend(data) for data in iter(lambda: theirs.recv(1 << 16), b"")])
    drain.start()
    with open(mounted / "data/big.bin", "rb") as file:
        assert ours.sendfile(file) == len(BIG)
    ours.close()
    drain.join()
    assert received == BIG


def test_sqlite_and_git_read_it(world: World) -> None:
    made = world.root / "programs"
    made.mkdir()
    with sqlite3.connect(made / "db.sqlite") as database:
        database.execute("create table t (x)")
        database.executemany("insert into t values (?)", [(n,) for n in range(1000)])
    database.close()
    git = ["git", "-C", str(made / "repo"), "-c", "user.name=a", "-c", "user.email=a@b"]
    run("git", "init", "-q", made / "repo")
    (made / "repo/file").write_text("content")
    run(*git, "add", ".")
    run(*git, "commit", "-qm", "first")
    world.log("a/b/programs", made)
    mounted = world.mount("a/b/programs:latest")
    assert run("sqlite3", mounted / "db.sqlite", "pragma integrity_check; select sum(x) from t").split() == ["ok", "499500"]
    safe = ["-c", f"safe.directory={mounted}/repo", "-C", str(mounted / "repo")]
    run("git", *safe, "fsck", "--strict")
    assert run("git", *safe, "log", "--format=%s") == "first\n"


@pytest.mark.parametrize(
    "act",
    [
        lambda path: (path / "new").write_bytes(b""),
        lambda path: (path / "readme.md").write_bytes(b""),
        lambda path: open(path / "readme.md", "ab").close(),
        lambda path: (path / "readme.md").unlink(),
        lambda path: (path / "new").mkdir(),
        lambda path: (path / "void").rmdir(),
        lambda path: (path / "readme.md").rename(path / "other"),
        lambda path: (path / "readme.md").chmod(0o777),
        lambda path: os.utime(path / "readme.md"),
        lambda path: os.truncate(path / "readme.md", 0),
        lambda path: os.symlink("a", path / "new"),
        lambda path: os.link(path / "readme.md", path / "new"),
        lambda path: os.setxattr(path / "readme.md", "user.x", b"y"),
    ],
)
def test_nothing_can_be_written(module_mount: Path, act: Any) -> None:
    with pytest.raises(OSError) as caught:
        act(module_mount)
    assert caught.value.errno == errno.EROFS


@pytest.fixture(scope="module")
def module_mount(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("shared")
        for which in ("CONFIG", "DATA", "CACHE", "STATE"):
            patch.setenv(f"XDG_{which}_HOME", str(home / which.lower()))
        shared = World(home)
        shared.log("acme/vision/bikes", FILES)
        yield shared.mount("acme/vision/bikes:latest")
        shared.close()


def test_other_errors(module_mount: Path) -> None:
    for act, expected in (
        (lambda: os.stat(module_mount / "nothing"), errno.ENOENT),
        (lambda: os.stat(module_mount / "readme.md/x"), errno.ENOTDIR),
        (lambda: os.open(module_mount / "data", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW), 0),
        (lambda: os.open(module_mount / "link", os.O_RDONLY | os.O_NOFOLLOW), errno.ELOOP),
        (lambda: os.listdir(module_mount / "readme.md"), errno.ENOTDIR),
        (lambda: os.stat(module_mount / ("n" * 256)), errno.ENAMETOOLONG),
        (lambda: os.stat(os.fsencode(module_mount) + b"/\xff\xfe"), errno.ENOENT),
        (lambda: os.getxattr(module_mount / "readme.md", "user.nothing"), errno.ENODATA),
    ):
        try:
            found = act()
        except OSError as error:
            assert error.errno == expected
        else:
            assert expected == 0
            if isinstance(found, int):
                os.close(found)


def test_xattrs(module_mount: Path) -> None:
    assert sorted(os.listxattr(module_mount / "readme.md")) == [
        f"user.artifactfs.{name}" for name in ("cached", "content_id", "digest", "version")
    ]
    assert os.getxattr(module_mount / "readme.md", "user.artifactfs.version") == b"acme/vision/bikes:v0"
    assert run("getfattr", "--only-values", "-n", "user.artifactfs.cached", module_mount / "data/big.bin") == str(len(BIG))


def test_a_directory_of_100000_and_awkward_names(world: World) -> None:
    many: dict[str, Any] = {f"entry-{number:06d}": File("", 0, False, EMPTY_ID) for number in range(100_000)}
    awkward = ["n" * 255, "é" * 127, "new\nline", "tab\t", "quote'\"", "\\", " ", "-rf", "日本語", "\x7f\x01", "a,b", "🚲"]
    root = write_files(world.root / "many", {name: name.encode() for name in awkward})
    world.log("a/b/many", MadeFolder({**{name: local_change(str(root / name)) for name in awkward}, "d": MadeFolder(many)}))
    mounted = world.mount("a/b/many:v0")
    assert sorted(os.listdir(mounted / "d")) == [f"entry-{number:06d}" for number in range(100_000)]
    assert sorted(os.listdir(mounted)) == sorted([*awkward, "d"])
    assert all((mounted / name).read_text() == name for name in awkward)
    assert os.stat(mounted / "d/entry-099999").st_size == 0
    handle = os.open(mounted / "d", os.O_RDONLY)
    first = os.listdir(handle)  # the same handle read twice: rewinddir
    assert sorted(os.listdir(handle)) == sorted(first)
    os.close(handle)


def test_a_flipped_bit_is_an_error_of_that_file_only(world: World) -> None:
    version = world.log("a/b/c", {"good": b"good", "bad": os.urandom(BLOCK + 5), "small": b"small" * 100})
    for name, at in (("bad", BLOCK + 1), ("small", 7)):
        entry: Any = world.store.tree.resolve(version.root, name)
        extent = entry.extents[0]
        path = world.store.objects.path(object_key(extent.object))
        assert path
        os.chmod(path, 0o600)
        with open(path, "r+b") as file:
            file.seek(extent.offset + at)
            byte = file.read(1)
            file.seek(extent.offset + at)
            file.write(bytes([byte[0] ^ 4]))
    mounted = world.mount("a/b/c:v0")
    assert (mounted / "good").read_bytes() == b"good"
    for name in ("bad", "small"):
        with pytest.raises(OSError) as caught:
            (mounted / name).read_bytes()
        assert caught.value.errno == errno.EIO
    with open(mounted / "bad", "rb", buffering=0) as file:
        file.seek(0)
        assert len(os.pread(file.fileno(), 100, 0)) == 100  # its first block is as it was
    assert "a/b/c" in Path(world.record(mounted).log).read_text() or "damaged" in Path(world.record(mounted).log).read_text()
    assert sorted(os.listdir(mounted)) == ["bad", "good", "small"]


def test_a_reference_that_changed_is_stale(world: World, tmp_path: Path) -> None:
    targets = [tmp_path / name for name in ("kept", "changed", "gone")]
    for target in targets:
        target.write_bytes(target.name.encode() + b" as it was")
    refs = {
        target.name: NewRef(found.ref, found.block_list) for target in targets for found in expand(target.as_uri(), target.name)
    }
    world.log("a/b/c", MadeFolder(refs))
    targets[1].write_bytes(b"changed otherwise")
    targets[2].unlink()
    mounted = world.mount("a/b/c:v0")
    assert (mounted / "kept").read_bytes() == b"kept as it was"
    for name, expected in (("changed", errno.ESTALE), ("gone", errno.ESTALE)):
        with pytest.raises(OSError) as caught:
            (mounted / name).read_bytes()
        assert caught.value.errno == expected
    assert sorted(os.listdir(mounted)) == ["changed", "gone", "kept"]


def test_browsing(world: World) -> None:
    world.log("acme/vision/bikes", {"a": b"0"})
    world.log("acme/vision/bikes", {"a": b"1"}, aliases=["best"])
    mounted = world.mount("acme/vision")
    assert os.listdir(mounted) == ["bikes"]
    assert sorted(os.listdir(mounted / "bikes")) == ["best", "latest", "v0", "v1"]
    assert (mounted / "bikes/latest/a").read_bytes() == b"1"
    assert (mounted / "bikes/v0/a").read_bytes() == b"0"
    assert os.readlink(mounted / "bikes/best") == "v1"
    world.log("acme/vision/bikes", {"a": b"2"})
    until(lambda: (mounted / "bikes/latest/a").read_bytes() == b"2")
    world.log("acme/vision/cars", {"c": b"c"})
    until(lambda: sorted(os.listdir(mounted)) == ["bikes", "cars"])
    assert run("findmnt", "-no", "SOURCE", mounted).strip() == "artifactfs#acme/vision"
    with pytest.raises(OSError) as caught:
        (mounted / "bikes/v0/a").write_bytes(b"")
    assert caught.value.errno == errno.EROFS


def test_everything_a_difference_and_a_prefix(world: World) -> None:
    world.log("acme/vision/bikes", {"a": b"0", "b/x": b"x", "b/y": b"y"})
    world.log("acme/vision/bikes", {"a": b"1", "b/x": b"x", "c": b"new"})
    top = world.mount("/")
    assert (top / "acme/vision/bikes/v1/a").read_bytes() == b"1"
    diff = world.mount("acme/vision/bikes:v0..latest")
    assert {str(path.relative_to(diff)): path.read_bytes() for path in diff.rglob("*") if path.is_file()} == {
        "added/c": b"new",
        "modified/a": b"1",
        "removed/b/y": b"y",
    }
    part = world.mount("acme/vision/bikes:v0", path_prefix="b/")
    assert [str(path.relative_to(part)) for path in sorted(part.rglob("*"))] == ["b", "b/x", "b/y"]


def test_many_readers_of_one_mount(module_mount: Path) -> None:
    wrong: list[int] = []

    def read(seed: int) -> None:
        for number in range(100):
            offset = (seed * 7919 + number * 104729) % len(BIG)
            with open(module_mount / "data/big.bin", "rb", buffering=0) as file:
                if os.pread(file.fileno(), 1000, offset) != BIG[offset : offset + 1000]:
                    wrong.append(offset)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# References elsewhere


@pytest.fixture
def remote(world: World) -> Iterator[tuple[World, FaultServer]]:
    """Versions of a stored file beside one on a web server."""
    with FaultServer({"/far.bin": BIG}) as server:
        far = next(iter(expand(server.url("/far.bin"), "far.bin"))).ref
        local = local_change(str(write_files(world.root / "near", {"near": b"near"}) / "near"))
        world.log("a/b/c", MadeFolder({"far.bin": far, "near": local, "d": MadeFolder({"near": local})}))
        yield world, server


@pytest.mark.parametrize("name", ["a/b/c:v0", "a/b"])
def test_a_stalled_source_delays_only_its_readers(remote: tuple[World, FaultServer], name: str) -> None:
    """In a mount with libfuse's threads, and in one with a loop that is overtaken."""
    world, server = remote
    mounted = world.mount(name)
    version = mounted if name.endswith("v0") else mounted / "c/v0"
    server.faults.stall_after = 1000
    done: list[bytes] = []
    readers = [threading.Thread(target=lambda: done.append((version / "far.bin").read_bytes())) for _ in range(3)]
    for reader in readers:
        reader.start()
    until(lambda: server.requests >= 2)
    for _ in range(20):
        assert sorted(os.listdir(version)) == ["d", "far.bin", "near"]
        assert (version / "d/near").read_bytes() == b"near"
        assert os.stat(version / "far.bin").st_size == len(BIG)
        assert os.statvfs(mounted).f_namemax == 255
    assert not done
    server.faults.stall_after = None
    server.release()
    for reader in readers:
        reader.join(60)
    assert done == [BIG] * 3


def test_a_remote_that_fails_then_recovers(remote: tuple[World, FaultServer]) -> None:
    """A failure is not remembered, by us or by the kernel."""
    world, server = remote
    mounted = world.mount("a/b/c:v0")
    server.faults.status = 404
    with pytest.raises(OSError) as caught:
        (mounted / "far.bin").read_bytes()
    assert caught.value.errno in (errno.ESTALE, errno.ENOENT, errno.EIO)
    server.faults.status = 0
    assert (mounted / "far.bin").read_bytes() == BIG
    assert (mounted / "near").read_bytes() == b"near"


def test_offline(remote: tuple[World, FaultServer]) -> None:
    world, server = remote
    mounted = world.mount("a/b/c:v0", offline=True)
    with pytest.raises(OSError) as caught:
        (mounted / "far.bin").read_bytes()
    assert caught.value.errno == errno.EHOSTUNREACH
    assert (mounted / "near").read_bytes() == b"near"
    assert "offline" in Path(world.record(mounted).log).read_text()
    online = world.mount("a/b/c:v0", prefetch="all")
    until(lambda: int(os.getxattr(online / "far.bin", "user.artifactfs.cached")) == len(BIG))
    asked = server.requests
    assert (mounted / "far.bin").read_bytes() == BIG
    assert server.requests == asked


# The adapter


def test_what_an_operation_raises_is_an_errno(caplog: pytest.LogCaptureFixture) -> None:
    def fail(error: BaseException) -> int:
        raise error

    answers = {
        errno.ENOENT: NotFoundError("x"),
        errno.EROFS: ReadOnlyError("x"),
        errno.ESTALE: SourceChangedError("one"),
        errno.ENOSPC: OSError(errno.ENOSPC, "x"),
        errno.EIO: ZeroDivisionError("a bug"),
    }
    for expected, error in answers.items():
        assert adapter._answer(fail, error) == -expected
    assert adapter._answer(fail, OSError("no errno")) == adapter._answer(fail, SystemExit()) == -errno.EIO
    assert adapter._answer(lambda: None) == 0 and adapter._answer(lambda: 7) == 7
    assert "Traceback" in caplog.text and "a bug in fail" in caplog.text
    before = caplog.text.count("one (ESTALE)")
    assert adapter._answer(fail, SourceChangedError("one")) == -errno.ESTALE
    assert before == caplog.text.count("one (ESTALE)") == 1  # a program that tries again and again does not fill the log


def test_a_directory_stream_goes_on_where_it_stopped() -> None:
    items = [(f"n{number}", stat.S_IFREG, number) for number in range(10)]
    stream = adapter._Stream(lambda: iter(items), (1, 1), snapshot=False)
    seen: list[str] = []
    offset = 0
    for room in (1, 3, 1, 5, 100, 100):  # entries that fit into each answer
        for count, (after, item) in enumerate(stream.after(offset)):
            if count == room:
                break
            seen.append(item[0])
            offset = after
    assert seen == [".", "..", *(item[0] for item in items)]
    assert [item[0] for _, item in stream.after(5)] == [item[0] for item in items[3:]]  # seekdir
    assert [item[0] for _, item in stream.after(0)][2:] == [item[0] for item in items]  # rewinddir
