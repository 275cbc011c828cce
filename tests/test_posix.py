"""What POSIX says of files, asked of a staging mount and of a plain directory of the local file system alike.

A test that takes ``place`` runs in both, so that what it expects is what the local file system does. ``staged_file`` is a file of
several MiB: one that is new, one that only the base version has, and one whose content is partly the base's.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import multiprocessing
import os
import random
import socket
import stat
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mounting import World, needs_fuse, world
from shelves import until

from artifactfs import daemon, resume
from artifactfs.model import BLOCK

pytestmark = needs_fuse
__all__ = ["world"]

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

SIZE = 3 * BLOCK + 12_345
CONTENT = random.Random(1).randbytes(SIZE)

_libc = ctypes.CDLL(None, use_errno=True)
_fork = multiprocessing.get_context("fork")


@pytest.fixture(params=["local", "staged"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An empty directory: of the local file system, and in a staging mount."""
    if request.param == "local":
        made = tmp_path / "local"
        made.mkdir()
        return made
    world: World = request.getfixturevalue("world")
    return world.stage("acme/vision/places", type="dataset")


@pytest.fixture
def staged(world: World) -> Path:
    world.log("acme/vision/bikes", {"base": CONTENT, "data/one": b"1", "data/two": b"2"})
    return world.stage("acme/vision/bikes")


@pytest.fixture(params=["local", "new", "base", "patched"])
def staged_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file with :data:`CONTENT`."""
    if request.param == "local":
        path = tmp_path / "base"
        path.write_bytes(CONTENT)
        return path
    path = request.getfixturevalue("staged") / ("new" if request.param == "new" else "base")
    if request.param == "new":
        path.write_bytes(CONTENT)
    elif request.param == "patched":
        with open(path, "r+b") as file:
            file.seek(BLOCK + 5)
            file.write(CONTENT[BLOCK + 5 : BLOCK + 10])
    return path


@contextlib.contextmanager
def opened(path: Path, flags: int, mode: int = 0o644) -> Iterator[int]:
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def fails(code: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:
        yield
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[code]


def call(name: str, *arguments: Any) -> int:
    """A function of the C library. OSError where it returns -1."""
    result: int = getattr(_libc, name)(*arguments)
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def in_children(*works: Callable[[], Any]) -> list[Any]:
    """What each of ``works`` returns in a process of its own, all at once."""
    pipes = [_fork.Pipe() for _ in works]
    children = [
        _fork.Process(target=lambda work=work, pipe=pipe: pipe[1].send(work())) for work, pipe in zip(works, pipes, strict=True)
    ]
    for child in children:
        child.start()
    try:
        assert all(ours.poll(60) for ours, _ in pipes), "a process does not answer"
        return [ours.recv() for ours, _ in pipes]
    finally:
        for child in children:
            child.join()


def in_child(work: Callable[[], Any]) -> Any:
    return in_children(work)[0]


def as_user(uid: int, work: Callable[[], None]) -> int:
    """The errno with which ``work`` fails for that user, 0 if it does not."""

    def become() -> int:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        try:
            work()
        except OSError as error:
            return error.errno or -1
        return 0

    code: int = in_child(become)
    return code


# Pipes, sockets, devices


def test_a_fifo_connects_two_processes(place: Path) -> None:
    os.mkfifo(place / "pipe", 0o640)
    assert stat.S_IFMT(os.lstat(place / "pipe").st_mode) == stat.S_IFIFO
    assert [entry.is_file() for entry in os.scandir(place)] == [False]
    child = _fork.Process(target=lambda: (place / "pipe").write_bytes(b"through the pipe"))
    child.start()
    assert (place / "pipe").read_bytes() == b"through the pipe"
    child.join()
    os.rename(place / "pipe", place / "moved")
    os.link(place / "moved", place / "linked")
    assert os.lstat(place / "linked").st_nlink == 2
    os.unlink(place / "moved")
    os.unlink(place / "linked")


def test_a_socket_connects_two_processes(place: Path) -> None:
    os.chdir(place)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("S.agent")
        server.listen()

        def speak() -> bytes:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect("S.agent")
                return client.recv(100)

        child = threading.Thread(target=lambda: server.accept()[0].sendall(b"hello"))
        child.start()
        assert in_child(speak) == b"hello"
        child.join()
        with fails(errno.EADDRINUSE), socket.socket(socket.AF_UNIX) as second:
            second.bind("S.agent")
    assert stat.S_ISSOCK(os.stat("S.agent").st_mode)
    os.chdir("/")


@needs_root
def test_device_nodes_are_there_but_are_no_devices(staged: Path) -> None:
    os.mknod(staged / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(staged / "disk", stat.S_IFBLK | 0o600, os.makedev(253, 12345))
    assert os.stat(staged / "null").st_rdev == os.makedev(1, 3)
    assert os.stat(staged / "disk").st_rdev == os.makedev(253, 12345)
    with fails(errno.EACCES):
        os.open(staged / "null", os.O_WRONLY)


def test_special_files_are_reported_and_not_committed(world: World, staged: Path) -> None:
    for name in ("a", "b", "c", "data/d"):
        os.mkfifo(staged / name)
    (staged / "new").write_bytes(b"new")
    assert {row["path"]: row["kind"] for row in daemon.status(staged) if row["change"] == "ignored"} == dict.fromkeys(
        ("a", "b", "c", "data/d"), "fifo"
    )
    warning = daemon.commit(staged).record.warning
    assert warning.startswith("not committed, as ") and warning.endswith(": a (fifo), b (fifo), c (fifo), 1 more")
    record = world.kill(staged)
    world.start(world.request("stage", "acme/vision/bikes", staged, resume=record.staging))
    assert stat.S_ISFIFO(os.stat(staged / "data/d").st_mode)
    os.unlink(staged / "a")
    os.unlink(staged / "b")
    result = daemon.unmount(staged)
    assert (result.committed, result.created) == ("acme/vision/bikes:v1", False)
    assert "c (fifo)" in result.record.warning and "a (fifo)" not in result.record.warning
    assert sorted(os.listdir(world.mount("acme/vision/bikes:v1"))) == ["base", "data", "new"]


def test_a_commit_without_a_mount_says_too_what_it_leaves_out(world: World, staged: Path) -> None:
    os.mkfifo(staged / "pipe")
    world.kill(staged)
    done = resume.finish(world.settings, resume.find_stage(world.settings, str(staged)))
    assert done.warning.endswith(": pipe (fifo)")


# Names


def test_hard_links(place: Path) -> None:
    one, two, three = place / "one", place / "two", place / "dir/three"
    one.write_bytes(b"content")
    os.mkdir(place / "dir")
    os.link(one, two)
    os.link(two, three)
    assert {path.stat().st_nlink for path in (one, two, three)} == {3}
    assert len({path.stat().st_ino for path in (one, two, three)}) == 1
    three.write_bytes(b"changed")
    os.unlink(two)
    assert (one.read_bytes(), one.stat().st_nlink) == (b"changed", 2)
    os.rename(one, three)  # the same file: nothing happens
    assert one.exists() and three.stat().st_nlink == 2
    os.symlink("one", place / "symlink")
    os.link(place / "symlink", place / "symlink2", follow_symlinks=False)
    assert os.lstat(place / "symlink").st_nlink == 2
    with fails(errno.EPERM):
        os.link(place / "dir", place / "dir2")
    with fails(errno.EEXIST):
        os.link(three, one)
    with opened(one, os.O_RDONLY) as fd:
        os.unlink(one)
        assert os.fstat(fd).st_nlink == 1
        os.unlink(three)
        assert os.fstat(fd).st_nlink == 0


def test_open_files_outlive_their_names(staged_file: Path) -> None:
    path = staged_file
    with opened(path, os.O_RDWR) as fd:
        os.unlink(path)
        assert not path.exists() and os.fstat(fd).st_nlink == 0
        assert os.pwrite(fd, b"after", 2 * BLOCK) == 5
        os.fchmod(fd, 0o600)
        os.utime(fd, ns=(5, 7))
        os.ftruncate(fd, 2 * BLOCK + 100)
        info = os.fstat(fd)
        assert (stat.S_IMODE(info.st_mode), info.st_mtime_ns > 7, info.st_size) == (0o600, True, 2 * BLOCK + 100)
        expected = CONTENT[: 2 * BLOCK] + b"after" + CONTENT[2 * BLOCK + 5 : 2 * BLOCK + 100]
        assert os.pread(fd, SIZE, 0) == expected
        path.write_bytes(b"another")  # the name is free
        assert os.pread(fd, SIZE, 0) == expected and path.read_bytes() == b"another"
    with opened(path, os.O_RDONLY) as fd:
        (path.parent / "other").write_bytes(b"replacing")
        os.rename(path.parent / "other", path)
        assert os.pread(fd, 100, 0) == b"another" and path.read_bytes() == b"replacing"
        os.rename(path, path.parent / "elsewhere")
        os.link(path.parent / "elsewhere", path)
        os.unlink(path.parent / "elsewhere")
        assert os.pread(fd, 100, 0) == b"another" and path.read_bytes() == b"replacing"


def test_renamed_while_open(staged_file: Path) -> None:
    with opened(staged_file, os.O_RDWR) as fd:
        moved = staged_file.parent / "moved" / "here"
        os.mkdir(moved.parent)
        os.rename(staged_file, moved)
        os.pwrite(fd, b"x", 0)
        os.rename(moved.parent, staged_file.parent / "again")
        os.pwrite(fd, b"y", 1)
        assert (staged_file.parent / "again/here").read_bytes() == b"xy" + CONTENT[2:]
        assert os.fstat(fd).st_ino == os.stat(staged_file.parent / "again/here").st_ino


def test_renames_of_directories(place: Path) -> None:
    for name in ("full/sub", "empty", "other"):
        (place / name).mkdir(parents=True)
    (place / "full/sub/file").write_bytes(b"f")
    (place / "other/file").write_bytes(b"o")
    (place / "file").write_bytes(b"x")
    os.rename(place / "full", place / "empty")
    assert (place / "empty/sub/file").read_bytes() == b"f" and not (place / "full").exists()
    for old, new, code in (
        ("empty", "other", errno.ENOTEMPTY),
        ("empty", "empty/sub/below", errno.EINVAL),
        ("empty", "file", errno.ENOTDIR),
        ("file", "empty", errno.EISDIR),
        ("gone", "any", errno.ENOENT),
        ("file", "gone/any", errno.ENOENT),
        ("file", "file/any", errno.ENOTDIR),
    ):
        with fails(code):
            os.rename(place / old, place / new)
    assert os.stat(place).st_nlink in (4, 1)
    os.rename(place / "empty/sub", place / "sub")
    assert os.listdir(place / "empty") == [] and os.listdir(place / "sub") == ["file"]


def test_directories_of_the_base_can_be_moved(staged: Path) -> None:
    os.rename(staged / "data", staged / "moved")
    os.mkdir(staged / "data")
    os.rename(staged / "moved", staged / "data")
    assert sorted(os.listdir(staged / "data")) == ["one", "two"]
    os.rename(staged / "data/one", staged / "base")
    assert (staged / "base").read_bytes() == b"1"


@pytest.mark.parametrize(
    ("flags", "target", "code"),
    [(1, "new", errno.EINVAL), (1, "data/one", errno.EEXIST), (2, "data/one", errno.EINVAL), (4, "new", errno.EINVAL)],
    ids=["NOREPLACE-nothing", "NOREPLACE-file", "EXCHANGE", "WHITEOUT"],
)
def test_flags_of_renameat2_are_refused_not_ignored(staged: Path, flags: int, target: str, code: int) -> None:
    with fails(code):
        call("renameat2", -100, os.fsencode(staged / "base"), -100, os.fsencode(staged / target), flags)
    assert (staged / "data/one").read_bytes() == b"1" and (staged / "base").exists()
    subprocess.run(["mv", "--no-clobber", staged / "base", staged / "new"], check=True)
    assert (staged / "new").read_bytes() == CONTENT  # mv does without them


def test_names_that_are_too_long_or_lead_nowhere(place: Path) -> None:
    longest = "n" * 255
    (place / longest).write_bytes(b"x")
    os.rename(place / longest, place / ("m" * 255))
    for act in (
        lambda: os.mkdir(place / (longest + "n")),
        lambda: os.stat(place / (longest + "n")),
        lambda: os.symlink("x", place / (longest + "n")),
        lambda: os.rename(place / ("m" * 255), place / (longest + "n")),
        lambda: os.stat(str(place) + "/x" * 3000),
        lambda: os.symlink("t" * 4096, place / "ln"),
    ):
        with fails(errno.ENAMETOOLONG):
            act()
    os.symlink("t" * 4095, place / "ln")
    assert os.readlink(place / "ln") == "t" * 4095 and os.lstat(place / "ln").st_size == 4095
    os.symlink("loop2", place / "loop1")
    os.symlink("loop1", place / "loop2")
    with fails(errno.ELOOP):
        os.stat(place / "loop1")
    with fails(errno.ELOOP):
        os.open(place / "loop1", os.O_RDONLY | os.O_NOFOLLOW)
    with fails(errno.ENOENT):
        os.stat(place / "gone/x")
    with fails(errno.ENOTDIR):
        os.stat(place / ("m" * 255) / "x")


def test_paths_longer_than_a_path_may_be(place: Path) -> None:
    start = os.open(place, os.O_RDONLY)
    fd = start
    try:
        for number in range(60):  # 12,000 bytes
            name = f"{number:0200}"
            os.mkdir(name, dir_fd=fd)
            below = os.open(name, os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        with os.fdopen(os.open("file", os.O_RDWR | os.O_CREAT, 0o644, dir_fd=fd), "w+b") as file:
            file.write(b"deep")
            os.fchmod(file.fileno(), 0o600)
            os.rename("file", "renamed", src_dir_fd=fd, dst_dir_fd=fd)
        assert os.listdir(fd) == ["renamed"] and os.stat("renamed", dir_fd=fd).st_size == 4
        os.fsync(fd)
    finally:
        os.close(fd)
    os.system(f"rm -rf {place}/0*")
    assert os.listdir(place) == []


def test_exclusive_creation_has_one_winner(place: Path) -> None:
    def compete(me: int) -> int:
        won = 0
        for number in range(50):
            with contextlib.suppress(FileExistsError):
                os.close(os.open(place / f"lock{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                won += 1
        return won

    assert sum(in_children(*(functools.partial(compete, number) for number in range(3)))) == 50


# Content


def test_appending_by_several_processes_loses_nothing(staged_file: Path) -> None:
    def append(me: int) -> None:
        with opened(staged_file, os.O_WRONLY | os.O_APPEND) as fd:
            for number in range(200):
                os.write(fd, b"%d %04d\n" % (me, number))

    in_children(*(functools.partial(append, me) for me in range(3)))
    data = staged_file.read_bytes()
    assert data[:SIZE] == CONTENT
    lines = data[SIZE:].split(b"\n")[:-1]
    for me in range(3):
        assert [line for line in lines if line.startswith(b"%d " % me)] == [b"%d %04d" % (me, number) for number in range(200)]
    assert len(lines) == 600


def test_truncation(staged_file: Path) -> None:
    with opened(staged_file, os.O_RDWR) as fd:
        os.ftruncate(fd, BLOCK + 100)
        os.ftruncate(fd, 2 * BLOCK)
        assert os.pread(fd, 2 * BLOCK + 1, 0) == CONTENT[: BLOCK + 100] + bytes(BLOCK - 100)
        os.truncate(staged_file, 0)
        assert (os.fstat(fd).st_size, os.read(fd, 10)) == (0, b"")
        os.pwrite(fd, b"end", 10)
        assert staged_file.read_bytes() == bytes(10) + b"end"
    with opened(staged_file, os.O_RDWR | os.O_TRUNC) as fd:
        assert os.fstat(fd).st_size == 0
    with fails(errno.EINVAL):
        os.truncate(staged_file, -1)
    with fails(errno.EISDIR):
        os.truncate(staged_file.parent, 0)


def test_sparse_files(place: Path) -> None:
    with opened(place / "sparse", os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"x" * 4096, 100 * BLOCK)
        os.ftruncate(fd, 1 << 40)
        info = os.fstat(fd)
        assert info.st_size == 1 << 40 and 8 <= info.st_blocks <= 64
        assert os.pread(fd, 10, 100 * BLOCK - 5) == bytes(5) + b"x" * 5
        assert os.pread(fd, 10, (1 << 40) - 5) == bytes(5)
        with fails(errno.EFBIG):
            os.ftruncate(fd, 1 << 62)


def test_space_is_reserved(staged_file: Path) -> None:
    with opened(staged_file, os.O_RDWR) as fd:
        os.posix_fallocate(fd, BLOCK - 10, 20)
        assert os.fstat(fd).st_size == SIZE
        os.posix_fallocate(fd, SIZE - 10, 4 * BLOCK)
        assert os.fstat(fd).st_size == SIZE - 10 + 4 * BLOCK
        assert os.fstat(fd).st_blocks * 512 >= SIZE + 3 * BLOCK
        assert os.pread(fd, 10 * BLOCK, 0) == CONTENT + bytes(4 * BLOCK - 10)
        os.pwrite(fd, b"x", 2 * BLOCK)
    with opened(staged_file, os.O_RDONLY) as fd, fails(errno.EBADF):
        os.posix_fallocate(fd, 0, 10)
    assert staged_file.read_bytes() == CONTENT[: 2 * BLOCK] + b"x" + CONTENT[2 * BLOCK + 1 :] + bytes(4 * BLOCK - 10)


@pytest.mark.parametrize("mode", [0x01, 0x03, 0x08, 0x10, 0x20], ids=["KEEP_SIZE", "PUNCH_HOLE", "COLLAPSE", "ZERO", "INSERT"])
def test_other_modes_of_fallocate_are_refused(staged: Path, mode: int) -> None:
    with opened(staged / "base", os.O_RDWR) as fd, fails(errno.EOPNOTSUPP):
        call("fallocate", fd, mode, ctypes.c_long(0), ctypes.c_long(4096))
    assert (staged / "base").read_bytes() == CONTENT


def test_writing_with_many_offsets_at_once(staged_file: Path) -> None:
    parts = [(offset, bytes([number]) * 777) for number, offset in enumerate(range(BLOCK - 5000, BLOCK + 5000, 1000))]

    def write(mine: list[tuple[int, bytes]]) -> None:
        with opened(staged_file, os.O_WRONLY) as fd:
            for offset, data in mine:
                os.pwritev(fd, [data[:100], data[100:]], offset)

    in_children(functools.partial(write, parts[::2]), functools.partial(write, parts[1::2]))
    expected = bytearray(CONTENT)
    for offset, data in parts:
        expected[offset : offset + 777] = data
    assert staged_file.read_bytes() == bytes(expected)


def test_direct_io(staged_file: Path) -> None:
    page = mmap.mmap(-1, 8192)
    page.write(b"direct" * 1000)
    with opened(staged_file, os.O_RDWR | os.O_DIRECT) as fd:
        os.pwritev(fd, [page], BLOCK - 4096)
        back = mmap.mmap(-1, 8192)
        os.preadv(fd, [back], BLOCK - 4096)
    assert back[:] == page[:]
    assert staged_file.read_bytes() == CONTENT[: BLOCK - 4096] + page[:] + CONTENT[BLOCK + 4096 :]


def test_copies_within_the_kernel(staged_file: Path) -> None:
    copy = staged_file.parent / "copy"
    with opened(staged_file, os.O_RDONLY) as source, opened(copy, os.O_RDWR | os.O_CREAT) as target:
        assert os.sendfile(target, source, 0, 100_000) > 0
        copied = os.lseek(target, 0, os.SEEK_CUR)
        while copied < SIZE:
            copied += os.copy_file_range(source, target, SIZE - copied, copied, copied)
    assert copy.read_bytes() == CONTENT


def test_a_file_that_may_not_be_written_is_read_only_through_every_handle(staged_file: Path) -> None:
    with opened(staged_file, os.O_RDONLY) as fd:
        with fails(errno.EBADF):
            os.write(fd, b"x")
        with fails(errno.EINVAL):
            os.ftruncate(fd, 5)
    with opened(staged_file, os.O_WRONLY) as fd, fails(errno.EBADF):
        os.read(fd, 1)
    assert staged_file.read_bytes() == CONTENT


# Memory maps


def test_maps_and_writes_see_each_other(staged_file: Path) -> None:
    with opened(staged_file, os.O_RDWR) as fd, mmap.mmap(fd, SIZE) as shared:
        os.pwrite(fd, b"written", BLOCK - 3)
        assert shared[BLOCK - 3 : BLOCK + 4] == b"written"
        shared[2 * BLOCK : 2 * BLOCK + 6] = b"mapped"
        assert os.pread(fd, 6, 2 * BLOCK) == b"mapped"
        with opened(staged_file, os.O_RDONLY) as other:
            assert os.pread(other, 6, 2 * BLOCK) == b"mapped"
        with mmap.mmap(fd, SIZE, flags=mmap.MAP_PRIVATE) as private:
            private[0:5] = b"alone"
            assert os.pread(fd, 5, 0) == CONTENT[:5] == shared[:5]
    data = bytearray(CONTENT)
    data[BLOCK - 3 : BLOCK + 4] = b"written"
    data[2 * BLOCK : 2 * BLOCK + 6] = b"mapped"
    assert staged_file.read_bytes() == bytes(data)


def test_maps_and_writes_of_two_processes_see_each_other(staged_file: Path) -> None:
    ours, theirs = _fork.Pipe()

    def other() -> None:
        with opened(staged_file, os.O_RDWR) as fd, mmap.mmap(fd, SIZE) as shared:
            for number in range(20):
                place = theirs.recv()
                assert shared[place : place + 4] == struct.pack("<I", number)
                shared[place + 4 : place + 8] = struct.pack("<I", number + 1000)
                theirs.send(None)

    child = _fork.Process(target=other)
    child.start()
    with opened(staged_file, os.O_RDWR) as fd:
        for number in range(20):
            place = number * 150_000
            os.pwrite(fd, struct.pack("<I", number), place)
            ours.send(place)
            assert ours.poll(30)
            ours.recv()
            assert os.pread(fd, 8, place) == struct.pack("<II", number, number + 1000)
    child.join()
    assert child.exitcode == 0


def test_a_map_outlives_its_descriptor_and_its_name(staged_file: Path) -> None:
    with opened(staged_file, os.O_RDWR) as fd:
        shared = mmap.mmap(fd, SIZE)
    os.link(staged_file, staged_file.parent / "kept")
    os.unlink(staged_file)
    shared[0:4] = b"late"
    shared.flush()
    assert (staged_file.parent / "kept").read_bytes() == b"late" + CONTENT[4:]
    shared.close()


# Space, times, attributes


def test_statfs_is_that_of_the_staging_disk(world: World, staged: Path) -> None:
    mine, disk = os.statvfs(staged), os.statvfs(world.settings.staging_dir)
    assert mine.f_blocks * mine.f_frsize == disk.f_blocks * disk.f_frsize
    assert abs(mine.f_bavail * mine.f_frsize - disk.f_bavail * disk.f_frsize) < 1 << 30
    assert mine.f_namemax == 255


def test_times_are_set_to_the_nanosecond(staged_file: Path) -> None:
    os.utime(staged_file, ns=(1_000_000_000_123_456_789, 999_999_999_987_654_321))
    info = os.stat(staged_file)
    assert (info.st_atime_ns, info.st_mtime_ns) == (1_000_000_000_123_456_789, 999_999_999_987_654_321)
    now, omit = (1 << 30) - 1, (1 << 30) - 2

    def utimensat(atime: tuple[int, int], mtime: tuple[int, int]) -> None:
        call("utimensat", -100, os.fsencode(staged_file), struct.pack("=qqqq", *atime, *mtime), 0)

    utimensat((0, omit), (5, 6))
    assert (os.stat(staged_file).st_atime_ns, os.stat(staged_file).st_mtime_ns) == (info.st_atime_ns, 5_000_000_006)
    before = time.time() - 1
    utimensat((7, 8), (0, now))
    info = os.stat(staged_file)
    assert info.st_atime_ns == 7_000_000_008 and before < info.st_mtime < time.time() + 1
    utimensat((0, omit), (0, omit))
    assert os.stat(staged_file).st_mtime_ns == info.st_mtime_ns
    os.utime(staged_file, ns=(-1_500_000_000, -2_500_000_000))  # before 1970
    assert os.stat(staged_file).st_mtime_ns == -2_500_000_000
    os.utime(staged_file)
    assert os.stat(staged_file).st_mtime > before


def test_what_changes_which_times(place: Path) -> None:
    path, other = place / "dir/file", place / "dir2"
    path.parent.mkdir()
    other.mkdir()
    path.write_bytes(b"x" * 100)
    os.setxattr(path, "user.k", b"v")

    def changed(act: Callable[[], object]) -> str:
        """Of the file f, its directory d and the other directory o: which of c- and mtime ``act`` changes."""
        fd = os.open(path, os.O_RDWR)
        watched = {"f": fd, "d": path.parent, "o": other}
        before = {name: os.stat(what) for name, what in watched.items()}
        until(lambda: time.clock_gettime_ns(5) > max(info.st_ctime_ns for info in before.values()))
        act()
        after = {name: os.stat(what) for name, what in watched.items()}
        os.close(fd)
        return " ".join(
            name + letter
            for name in watched
            for letter, field in (("c", "st_ctime_ns"), ("m", "st_mtime_ns"))
            if getattr(before[name], field) != getattr(after[name], field)
        )

    def write(data: bytes = b"y", at: int = 0) -> None:
        with opened(path, os.O_RDWR) as fd:
            os.pwrite(fd, data, at)

    assert changed(write) == "fc fm"
    assert changed(lambda: write(b"z", 5000)) == "fc fm"
    assert changed(lambda: os.truncate(path, 50)) == "fc fm"
    assert changed(lambda: os.truncate(path, 500)) == "fc fm"
    assert changed(path.read_bytes) == ""
    assert changed(lambda: os.chmod(path, 0o600)) == "fc"
    assert changed(lambda: os.chown(path, -1, os.getgid())) == "fc"
    assert changed(lambda: os.utime(path, ns=(1, 1))) == "fc fm"
    assert changed(lambda: os.setxattr(path, "user.k", b"w")) == "fc"
    assert changed(lambda: os.removexattr(path, "user.k")) == "fc"
    assert changed(lambda: os.link(path, path.parent / "two")) == "fc dc dm"
    assert changed(lambda: os.unlink(path.parent / "two")) == "fc dc dm"
    assert changed(lambda: os.rename(path, path.parent / "moved")) == "fc dc dm"
    os.rename(path.parent / "moved", path)
    assert changed(lambda: os.rename(path, other / "moved")) == "fc dc dm oc om"
    os.rename(other / "moved", path)
    assert changed(lambda: os.mkdir(path.parent / "sub")) == "dc dm"
    assert changed(lambda: os.rename(path.parent / "sub", other / "sub")) == "dc dm oc om"
    assert changed(lambda: os.rmdir(other / "sub")) == "oc om"
    assert changed(lambda: os.symlink("x", other / "ln")) == "oc om"
    assert changed(lambda: os.mkfifo(other / "pipe")) == "oc om"
    assert changed(lambda: os.stat(path)) == ""
    assert changed(lambda: os.listdir(other)) == ""
    assert changed(lambda: (path.parent / "new").touch()) == "dc dm"
    assert changed(lambda: os.rename(path.parent / "new", path)) == "fc dc dm"


def test_link_counts_of_directories(place: Path) -> None:
    counts = []
    for act in (
        lambda: os.mkdir(place / "a"),
        lambda: os.mkdir(place / "a/b"),
        lambda: os.mkdir(place / "c"),
        lambda: os.rename(place / "c", place / "a/c"),
        lambda: os.mkdir(place / "a/c2"),
        lambda: os.rename(place / "a/c", place / "a/c2"),
        lambda: os.rmdir(place / "a/b"),
    ):
        act()
        counts.append((os.stat(place).st_nlink, os.stat(place / "a").st_nlink))
    assert counts == [(3, 2), (3, 3), (4, 3), (3, 4), (3, 5), (3, 4), (3, 3)]


@needs_root
def test_bits_of_the_mode_are_kept_and_cleared_as_posix_says(tmp_path: Path, world: World) -> None:
    staged = Path(world.start(world.request("stage", "acme/vision/modes", type="dataset", allow_other=True)).mountpoint)
    local = tmp_path / "local"
    local.mkdir()
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_mode & 0o005 != 0o005:
            parent.chmod(parent.stat().st_mode | 0o005)
        if parent == Path("/tmp"):
            break
    for place in (local, staged):
        place.chmod(0o1777)
        path = place / "file"

        def make(mode: int, owner: int, path: Path = path) -> None:
            path.write_bytes(b"x")
            os.chown(path, owner, owner)
            os.chmod(path, mode)

        def mode(path: Path = path) -> str:
            return oct(stat.S_IMODE(os.stat(path).st_mode))

        make(0o6755, 1000)
        assert mode() == "0o6755"
        assert as_user(1000, lambda path=path: path.write_bytes(b"y")) == 0
        assert mode() == "0o755"  # who writes without the right to set the bits clears them
        make(0o6755, 1000)
        os.chown(path, 1001, 1001)
        assert mode() in ("0o755", "0o6755")
        make(0o644, 1000)
        assert as_user(1001, lambda path=path: os.chmod(path, 0o777)) == errno.EPERM
        assert as_user(1001, lambda path=path: os.unlink(path)) == errno.EPERM  # the directory is sticky
        assert as_user(1001, lambda path=path: path.write_bytes(b"z")) == errno.EACCES
        assert as_user(1001, lambda path=path: os.utime(path, (1, 1))) == errno.EPERM
        assert as_user(1000, lambda path=path: os.chown(path, 1001, -1)) == errno.EPERM
        assert as_user(1000, lambda path=path: os.unlink(path)) == 0
        os.mkdir(place / "group")
        os.chown(place / "group", 0, 1001)
        os.chmod(place / "group", 0o2777)
        assert as_user(1000, lambda place=place: (place / "group/file").touch()) == 0
        assert as_user(1000, lambda place=place: (place / "group/dir").mkdir()) == 0
        assert os.stat(place / "group/file").st_gid == os.stat(place / "group/dir").st_gid == 1001
        assert os.stat(place / "group/dir").st_mode & stat.S_ISGID
        assert os.stat(place / "group/file").st_uid == 1000
        os.chmod(place / "group", 0o700)
        assert as_user(1000, lambda place=place: (place / "group/file").read_bytes()) == errno.EACCES


def test_xattrs(staged_file: Path) -> None:
    os.setxattr(staged_file, "user.one", b"1\0binary\xff")
    os.setxattr(staged_file, "user.two", b"")
    assert set(os.listxattr(staged_file)) == {"user.one", "user.two"}
    with fails(errno.EEXIST):
        os.setxattr(staged_file, "user.one", b"2", os.XATTR_CREATE)
    with fails(errno.ENODATA):
        os.setxattr(staged_file, "user.none", b"2", os.XATTR_REPLACE)
    with fails(errno.ENODATA):
        os.getxattr(staged_file, "user.none")
    os.setxattr(staged_file, "user.one", b"v" * 3000, os.XATTR_REPLACE)
    assert os.getxattr(staged_file, "user.one") == b"v" * 3000
    with fails(errno.ERANGE):
        call("getxattr", os.fsencode(staged_file), b"user.one", ctypes.create_string_buffer(10), 10)
    os.rename(staged_file, staged_file.parent / "moved")
    assert os.getxattr(staged_file.parent / "moved", "user.two") == b""
    os.removexattr(staged_file.parent / "moved", "user.two")
    assert os.listxattr(staged_file.parent / "moved") == ["user.one"]
    with fails(errno.EOPNOTSUPP):
        os.setxattr(staged_file.parent / "moved", "nonsense.k", b"")
    assert (staged_file.parent / "moved").read_bytes() == CONTENT


# Locks


def test_locks_hold_between_processes(staged_file: Path) -> None:
    def posix(start: int = 0, length: int = 0) -> int:
        with opened(staged_file, os.O_RDWR) as fd:
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
            except OSError as error:
                return error.errno or -1
        return 0

    def flock() -> int:
        with opened(staged_file, os.O_RDONLY) as fd:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                return error.errno or -1
        return 0

    with opened(staged_file, os.O_RDWR) as fd:
        fcntl.lockf(fd, fcntl.LOCK_EX, 10, 5)
        assert in_child(lambda: posix(0, 5)) == 0 and in_child(lambda: posix(15, 5)) == 0
        assert in_child(lambda: posix(14, 1)) == errno.EAGAIN and in_child(posix) == errno.EAGAIN
        assert in_child(flock) == 0
        fcntl.lockf(fd, fcntl.LOCK_UN)
        assert in_child(posix) == 0
        fcntl.flock(fd, fcntl.LOCK_SH)
        assert in_child(flock) == errno.EAGAIN
        with opened(staged_file, os.O_RDWR) as second:
            owned = struct.pack("=hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
            fcntl.fcntl(fd, 37, owned)  # F_OFD_SETLK
            with fails(errno.EAGAIN):
                fcntl.fcntl(second, 37, owned)
    assert in_child(flock) == 0 and in_child(posix) == 0


def test_who_waits_for_a_lock_gets_it(staged_file: Path) -> None:
    def count() -> None:
        for _ in range(25):
            with opened(staged_file, os.O_RDWR) as fd:
                fcntl.lockf(fd, fcntl.LOCK_EX)
                value = struct.unpack("<I", os.pread(fd, 4, 100))[0]
                os.pwrite(fd, struct.pack("<I", value + 1), 100)

    with opened(staged_file, os.O_RDWR) as fd:
        os.pwrite(fd, bytes(4), 100)
    in_children(count, count, count)
    assert struct.unpack("<I", staged_file.read_bytes()[100:104]) == (75,)


# Directories


class Stream:
    """opendir(3) and what goes with it."""

    class _Entry(ctypes.Structure):
        _fields_ = (
            ("ino", ctypes.c_ulong),
            ("off", ctypes.c_long),
            ("reclen", ctypes.c_ushort),
            ("type", ctypes.c_ubyte),
            ("name", ctypes.c_char * 256),
        )

    def __init__(self, path: Path) -> None:
        for name, result, arguments in (
            ("opendir", ctypes.c_void_p, [ctypes.c_char_p]),
            ("readdir", ctypes.POINTER(self._Entry), [ctypes.c_void_p]),
            ("telldir", ctypes.c_long, [ctypes.c_void_p]),
            ("seekdir", None, [ctypes.c_void_p, ctypes.c_long]),
            ("rewinddir", None, [ctypes.c_void_p]),
            ("closedir", ctypes.c_int, [ctypes.c_void_p]),
        ):
            function = getattr(_libc, name)
            function.restype, function.argtypes = result, arguments
        self._stream = _libc.opendir(os.fsencode(path))

    def next(self) -> str | None:
        entry = _libc.readdir(self._stream)
        return os.fsdecode(entry.contents.name) if entry else None

    def rest(self) -> list[str]:
        return list(iter(self.next, None))

    def tell(self) -> int:
        place: int = _libc.telldir(self._stream)
        return place

    def seek(self, place: int) -> None:
        _libc.seekdir(self._stream, place)

    def rewind(self) -> None:
        _libc.rewinddir(self._stream)

    def close(self) -> None:
        _libc.closedir(self._stream)


def test_places_in_a_directory_stay_what_they_are(place: Path) -> None:
    names = {f"name-{number:04}" for number in range(500)}
    for name in names:
        (place / name).touch()
    stream = Stream(place)
    seen = [(stream.tell(), stream.next()) for _ in range(502)]
    assert stream.next() is None and {name for _, name in seen} == names | {".", ".."}
    gone = {name for _, name in seen[1:400:7] if name in names}
    for name in gone:
        os.unlink(place / name)
    for number in random.Random(5).sample(range(502), 50):
        position, name = seen[number]
        stream.seek(position)
        if name not in gone:
            # What was removed may still be shown, but nothing is passed over or shown at another place.
            assert next(found for found in iter(stream.next, None) if found not in gone) == name
    (place / "late").touch()
    stream.rewind()
    found = stream.rest()
    assert set(found) == names - gone | {".", "..", "late"} and len(found) == len(set(found))
    stream.close()


def test_a_directory_that_is_emptied_while_it_is_read(place: Path) -> None:
    for number in range(700):
        (place / f"name-{number:04}").touch()
    (place / "stays").touch()
    stream = Stream(place)
    seen = []
    while (name := stream.next()) is not None:
        seen.append(name)
        if name.startswith("name-"):
            os.unlink(place / name)
            (place / f"late-{name}").touch()
    stream.close()
    assert len(seen) == len(set(seen)) and {"stays", *(f"name-{number:04}" for number in range(700))} <= set(seen)
    assert len(os.listdir(place)) == 701


def test_an_open_directory_can_be_renamed(place: Path) -> None:
    (place / "dir/sub").mkdir(parents=True)
    (place / "dir/file").touch()
    fd = os.open(place / "dir", os.O_RDONLY)
    stream = Stream(place / "dir")
    os.rename(place / "dir", place / "moved")
    (place / "dir").mkdir()
    assert sorted(stream.rest()) == [".", "..", "file", "sub"]
    assert sorted(os.listdir(fd)) == ["file", "sub"]
    assert os.stat("file", dir_fd=fd).st_size == 0
    stream.close()
    os.close(fd)


def test_an_open_directory_that_is_removed_is_empty(place: Path) -> None:
    (place / "dir").mkdir()
    fd = os.open(place / "dir", os.O_RDONLY)
    os.rmdir(place / "dir")
    with contextlib.suppress(FileNotFoundError):  # as Linux says it
        assert os.listdir(fd) == []
    with fails(errno.ENOENT):
        os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
    os.close(fd)


def test_a_large_directory(staged: Path) -> None:
    names = [f"file-{number:05}" for number in range(1200)]
    for name in names:
        os.close(os.open(staged / "data" / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    assert sorted(os.listdir(staged / "data")) == [*names, "one", "two"]
    assert sum(entry.is_file() for entry in os.scandir(staged / "data")) == 1202
    assert daemon.unmount(staged).created
