"""A stage without a kernel: what POSIX says, what is copied, what survives, what is committed."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import itertools
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import artifactfs.staging.recovery as recovery
from artifactfs.errors import ConflictError, InvalidNameError, NotFoundError, StoreFormatError
from artifactfs.model import BLAKE3, BLOCK, Dir, Entry, File, Ref, Version
from artifactfs.names import ArtifactName
from artifactfs.publish import Draft, NewRef, publish
from artifactfs.reader import Handle, Reader
from artifactfs.references import expand
from artifactfs.staging import RENAME_EXCHANGE, RENAME_NOREPLACE, Stage, StageSpec, list_stages
from artifactfs.store.urls import open_store

NAME = ArtifactName("acme", "vision", "bikes")
ME = (os.getuid(), os.getgid())
BIG = bytes(range(256)) * (3 * BLOCK // 256) + b"tail"


class CountingReader(Reader):
    """Notes the (offset, size) of every read of a stored content."""

    def __init__(self, store: Any) -> None:
        super().__init__(store, None)
        self.reads: list[tuple[int, int]] = []

    def open(self, entry: Entry, where: str = "") -> Handle:
        return _CountingHandle(super().open(entry, where), self.reads)


class _CountingHandle:
    def __init__(self, handle: Handle, reads: list[tuple[int, int]]) -> None:
        self._handle = handle
        self._reads = reads

    def read(self, offset: int, size: int) -> bytes:
        self._reads.append((offset, size))
        return self._handle.read(offset, size)

    def close(self) -> None:
        self._handle.close()


class Place:
    """A store, and stages on it."""

    def __init__(self, tmp: Path) -> None:
        self.tmp = tmp
        self.store = open_store(str(tmp / "store"))
        self.reader = CountingReader(self.store)
        self.stages = tmp / "stages"
        self.made: list[Stage] = []

    def begin(self, base: int | None = None, **more: Any) -> Stage:
        stage = Stage.begin(self.stages / uuid.uuid4().hex, spec(self.store.url, base, **more), self.store, self.reader)
        self.made.append(stage)
        return stage

    def resume(self, stage: Stage) -> Stage:
        """What comes of a stage whose process was killed."""
        abandon(stage)
        resumed = Stage.resume(stage.path, self.store, self.reader)
        self.made.append(resumed)
        return resumed

    def based(self, **files: bytes) -> Stage:
        """A stage over a version of these files."""
        stage = self.begin()
        for name, data in files.items():
            put(stage, "/" + name.replace("__", "/"), data)
        stage.commit(final=True)
        stage.remove()
        return self.begin(self.latest().number)

    def latest(self) -> Version:
        return self.store.version(NAME)

    def files(self, version: Version) -> dict[str, bytes]:
        """The content of every file of a version."""
        found = {}
        for path, entry in self.store.tree.walk(version.root):
            if isinstance(entry, (File, Ref)):
                handle = self.reader.open(entry)
                found[path] = handle.read(0, entry.size)
                handle.close()
        return found


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    for stage in made.made:
        with contextlib.suppress(OSError):
            stage.close()
    made.reader.close()


def spec(store: str, base: int | None, **more: Any) -> StageSpec:
    given = {
        "name": NAME,
        "store": store,
        "type": "dataset",
        "base": base,
        "commit": uuid.uuid4().hex,
        "algorithm": BLAKE3,
        "mountpoint": "/nowhere",
        "created_at": "2026-11-01T00:00:00.000000Z",
    }
    return StageSpec(**(given | more))


def abandon(stage: Stage) -> None:
    """Let go of a stage as a dying process does: descriptors close, nothing else happens."""
    if stage._directory.fd >= 0:
        os.close(stage._directory._lock)
        os.close(stage._directory.fd)
        stage._directory.fd = -1
        os.close(stage._ledger.journal._fd)
        stage._data.close()
    stage._closed = True


def put(stage: Stage, path: str, data: bytes, mode: int = 0o644) -> None:
    """Write a whole file, with the directories it is in."""
    for parent in reversed(Path(path).parents):
        with contextlib.suppress(FileExistsError):
            stage.mkdir(str(parent), 0o755, ME)
    fh = stage.create(path, mode, os.O_WRONLY | os.O_TRUNC, ME)
    assert stage.write(fh, data, 0) == len(data)
    stage.release(fh)


def get(stage: Stage, path: str) -> bytes:
    fh = stage.open(path, os.O_RDONLY)
    try:
        size = stage.getattr(path).size
        data = stage.read(fh, size + 1, 0)
        assert len(data) == size
        return data
    finally:
        stage.release(fh)


@contextlib.contextmanager
def opened(stage: Stage, path: str, flags: int = os.O_RDWR) -> Iterator[int]:
    fh = stage.open(path, flags)
    try:
        yield fh
    finally:
        stage.release(fh)


def names(stage: Stage, path: str = "/") -> list[str]:
    return sorted(name for name, _, _ in stage.readdir(path))


def listing(stage: Stage, path: str = "") -> dict[str, Any]:
    """Names, modes, owners, link counts, targets and attributes of everything."""
    found: dict[str, Any] = {}
    for name, mode, ino in stage.readdir(path or "/"):
        below = f"{path}/{name}"
        info = stage.getattr(below)
        xattrs = {key: stage.getxattr(below, key) for key in stage.listxattr(below)}
        target = stage.readlink(below) if stat.S_ISLNK(mode) else None
        found[below] = info.mode, info.uid, info.gid, info.nlink, target, xattrs
        assert info.ino == ino
        if stat.S_ISDIR(mode):
            found |= listing(stage, below)
    return found


def changes(stage: Stage) -> list[tuple[str, str, str]]:
    return [(change.path, change.change, change.kind) for change in stage.status()]


@contextlib.contextmanager
def fails(code: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:
        yield
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[code]


# Names


def test_new_files_directories_and_links_are_there_at_once(place: Place) -> None:
    stage = place.begin()
    put(stage, "/d/f", b"content", 0o640)
    stage.symlink("d/f", "/ln", ME)
    assert names(stage) == ["d", "ln"]
    assert get(stage, "/d/f") == b"content"
    assert stage.readlink("/ln") == "d/f"
    info = stage.getattr("/d/f")
    assert (info.mode, info.nlink, info.size, info.uid, info.gid) == (stat.S_IFREG | 0o640, 1, 7, *ME)
    assert stage.getattr("/ln").size == 3
    assert stage.getattr("/").nlink == 3
    assert stage.getattr("/d").nlink == 2


def test_errors_are_posix(place: Place) -> None:
    stage = place.based(file=b"x", full__file=b"y")
    stage.mkdir("/empty", 0o755, ME)
    stage.symlink("nowhere", "/ln", ME)
    with fails(errno.ENOENT):
        stage.getattr("/nothing")
    with fails(errno.ENOENT):
        stage.open("/nothing", os.O_RDONLY)
    with fails(errno.ENOENT):
        stage.mkdir("/nothing/below", 0o755, ME)
    with fails(errno.ENOTDIR):
        stage.mkdir("/file/below", 0o755, ME)
    with fails(errno.ENOTDIR):
        stage.getattr("/file/below")
    with fails(errno.ENOTDIR):
        list(stage.readdir("/file"))
    with fails(errno.ENOTDIR):
        stage.rmdir("/file")
    with fails(errno.EEXIST):
        stage.mkdir("/file", 0o755, ME)
    with fails(errno.EEXIST):
        stage.create("/file", 0o644, os.O_WRONLY | os.O_EXCL, ME)
    with fails(errno.EEXIST):
        stage.symlink("x", "/full", ME)
    with fails(errno.EEXIST):
        stage.link("/file", "/full/file")
    with fails(errno.EISDIR):
        stage.open("/full", os.O_RDWR)
    with fails(errno.EISDIR):
        stage.unlink("/full")
    with fails(errno.ENOTEMPTY):
        stage.rmdir("/full")
    with fails(errno.EBUSY):
        stage.rmdir("/")
    with fails(errno.EPERM):
        stage.link("/full", "/other")
    with fails(errno.ELOOP):
        stage.open("/ln", os.O_RDONLY)
    with fails(errno.EINVAL):
        stage.readlink("/file")
    with fails(errno.EINVAL):
        stage.truncate("/file", -1)
    with fails(errno.EINVAL):
        stage.mknod("/link", stat.S_IFLNK | 0o600, ME)
    with fails(errno.EBADF):
        stage.read(4711, 1, 0)
    with opened(stage, "/file", os.O_RDONLY) as fh, fails(errno.EBADF):
        stage.write(fh, b"x", 0)


def test_names_have_at_most_255_bytes(place: Place) -> None:
    stage = place.based(file=b"x")
    longest = "ü" * 127 + "x"
    put(stage, f"/{longest}", b"there")
    assert names(stage) == ["file", longest]
    for too_long in (f"/{longest}x", "/" + "x" * 256, "/" + "x" * 256 + "/below"):
        with fails(errno.ENAMETOOLONG):
            stage.getattr(too_long)
        with fails(errno.ENAMETOOLONG):
            stage.mkdir(too_long, 0o755, ME)
        with fails(errno.ENAMETOOLONG):
            stage.create(too_long, 0o644, os.O_WRONLY, ME)
        with fails(errno.ENAMETOOLONG):
            stage.rename("/file", too_long)
        with fails(errno.ENAMETOOLONG):
            stage.link("/file", too_long)
    with fails(errno.ENAMETOOLONG):
        stage.symlink("x" * 4096, "/ln", ME)


def test_names_that_are_not_utf8_are_refused_and_said_in_the_log(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    stage = place.begin()
    odd = b"/caf\xe9".decode("utf-8", "surrogateescape")
    with fails(errno.ENOENT):
        stage.getattr(odd)
    with fails(errno.EILSEQ):
        stage.create(odd, 0o644, os.O_WRONLY, ME)
    with fails(errno.EILSEQ):
        stage.mkdir(odd, 0o755, ME)
    with fails(errno.EILSEQ):
        stage.symlink(odd[1:], "/ln", ME)
    assert "not UTF-8" in caplog.text
    assert os.listdir(stage.path / "data") == []


def test_a_directory_deeper_than_pythons_stack(place: Place) -> None:
    stage = place.begin()
    path = ""
    for _ in range(1500):
        path += "/d"
        stage.mkdir(path, 0o755, ME)
    put(stage, path + "/f", b"deep")
    stage = place.resume(stage)
    assert get(stage, path + "/f") == b"deep"
    assert len(stage.status()) == 1501
    stage.rename("/d/d", "/top")
    assert stage.getattr("/top" + path[4:] + "/f").size == 4


def test_readdir_merges_base_and_changes_and_keeps_going_while_the_directory_changes(place: Place) -> None:
    stage = place.based(**{f"f{i:03}": b"x" for i in range(300)})
    stage.unlink("/f007")
    put(stage, "/new", b"")
    stage.rename("/f008", "/moved")
    seen = []
    for name, _, _ in stage.readdir("/"):
        seen.append(name)
        if len(seen) == 10:
            stage.unlink("/f200")
            put(stage, "/late", b"")
    assert len(seen) == len(set(seen))
    expected = {f"f{i:03}" for i in range(300)} - {"f007", "f008"} | {"new", "moved"}
    assert expected - set(seen) <= {"f200"}
    assert set(names(stage)) == expected - {"f200"} | {"late"}


def test_inode_numbers_are_unique_and_stable(place: Place) -> None:
    stage = place.based(a=b"1", b=b"2", d__e=b"3")

    def number(path: str) -> int:
        return stage.getattr(path).ino

    before = {path: number(path) for path in ("/", "/a", "/b", "/d", "/d/e")}
    assert len(set(before.values())) == 5
    put(stage, "/a", b"changed")
    stage.chmod("/d", 0o700)
    stage.rename("/d", "/moved")
    put(stage, "/d", b"a new file where the directory was")
    assert number("/a") == before["/a"]
    assert number("/moved") == before["/d"]
    assert number("/moved/e") == before["/d/e"]
    assert number("/d") not in before.values()
    stage = place.resume(stage)
    assert number("/moved/e") == before["/d/e"]
    stage.commit()
    assert (number("/a"), number("/b"), number("/moved/e")) == (before["/a"], before["/b"], before["/d/e"])


# Renaming


def test_rename_over_what_is_there(place: Place) -> None:
    stage = place.based(a=b"a", b=b"b", d__x=b"x", e__y=b"y")
    stage.rename("/a", "/b")
    assert (names(stage), get(stage, "/b")) == (["b", "d", "e"], b"a")
    with fails(errno.ENOTEMPTY):
        stage.rename("/d", "/e")
    stage.unlink("/e/y")
    stage.rename("/d", "/e")
    assert (names(stage), names(stage, "/e")) == (["b", "e"], ["x"])
    with fails(errno.EISDIR):
        stage.rename("/b", "/e")
    with fails(errno.ENOTDIR):
        stage.rename("/e", "/b")
    with fails(errno.ENOENT):
        stage.rename("/nothing", "/b")


def test_rename_of_directories(place: Place) -> None:
    stage = place.based(d__s__f=b"f")
    with fails(errno.EINVAL):
        stage.rename("/d", "/d/s/below")
    with fails(errno.EINVAL):
        stage.rename("/d", "/d/below")
    with fails(errno.ENOTEMPTY):
        stage.rename("/d/s", "/d")
    with fails(errno.EBUSY):
        stage.rename("/", "/x")
    stage.rename("/d", "/d")
    stage.rename("/d/s", "/s")
    assert (stage.getattr("/").nlink, stage.getattr("/d").nlink, names(stage, "/s")) == (4, 2, ["f"])
    stage.rename("/s", "/d/t")
    assert get(stage, "/d/t/f") == b"f"
    assert (stage.getattr("/").nlink, stage.getattr("/d").nlink) == (3, 3)


def test_renaming_a_base_directory_touches_nothing_below_it(place: Place) -> None:
    stage = place.based(**{f"d__f{i}": b"x" for i in range(200)})
    known = len(stage._space.nodes)
    stage.rename("/d", "/e")
    assert len(stage._space.nodes) == known + 1
    assert place.reader.reads == []
    assert len(names(stage, "/e")) == 200


def test_rename_flags(place: Place) -> None:
    stage = place.based(a=b"a", b=b"b", d__x=b"x")
    with fails(errno.EEXIST):
        stage.rename("/a", "/b", RENAME_NOREPLACE)
    with fails(errno.EINVAL):
        stage.rename("/a", "/b", 8)
    stage.rename("/a", "/c", RENAME_NOREPLACE)
    with fails(errno.ENOENT):
        stage.rename("/c", "/nothing", RENAME_EXCHANGE)
    with fails(errno.EINVAL):
        stage.rename("/d", "/d/x", RENAME_EXCHANGE)
    with fails(errno.EINVAL):
        stage.rename("/d/x", "/d", RENAME_EXCHANGE)
    stage.rename("/c", "/d", RENAME_EXCHANGE)
    assert (get(stage, "/d"), get(stage, "/c/x")) == (b"a", b"x")
    assert (stage.getattr("/").nlink, stage.getattr("/c").nlink) == (3, 2)
    stage = place.resume(stage)
    assert (get(stage, "/d"), get(stage, "/c/x"), get(stage, "/b")) == (b"a", b"x", b"b")


def test_hard_links_are_one_file_and_two_in_the_version(place: Place) -> None:
    stage = place.based(a=b"one")
    stage.link("/a", "/b")
    with opened(stage, "/b") as fh:
        stage.write(fh, b"two", 0)
    assert get(stage, "/a") == b"two"
    assert (stage.getattr("/a").nlink, stage.getattr("/a").ino) == (2, stage.getattr("/b").ino)
    stage.rename("/a", "/b")
    assert names(stage) == ["a", "b"]
    stage = place.resume(stage)
    stage.unlink("/a")
    assert (stage.getattr("/b").nlink, get(stage, "/b")) == (1, b"two")
    stage.link("/b", "/c")
    published = stage.commit()
    assert published is not None
    assert place.files(published.version) == {"b": b"two", "c": b"two"}


# Open files


@pytest.mark.parametrize("base", [False, True])
def test_a_removed_file_stays_for_who_has_it_open(place: Place, base: bool) -> None:
    stage = place.based(f=b"content") if base else place.begin()
    if not base:
        put(stage, "/f", b"content")
    with opened(stage, "/f") as fh:
        stage.unlink("/f")
        assert names(stage) == []
        with fails(errno.ENOENT):
            stage.getattr("/f")
        assert stage.read(fh, 100, 0) == b"content"
        stage.write(fh, b"CON", 0)
        stage.write(fh, b"!", 7)
        assert stage.read(fh, 100, 0) == b"CONtent!"
        assert stage.getattr("/f", fh).nlink == 0
        stage.ftruncate(fh, 3)
        assert stage.read(fh, 100, 0) == b"CON"
        put(stage, "/f", b"another")
        assert stage.read(fh, 100, 0) == b"CON"
    stage.fsyncdir("/")
    assert len(os.listdir(stage.path / "data")) == 1
    assert get(place.resume(stage), "/f") == b"another"


def test_what_libfuse_hides_is_gone_for_everybody_else(place: Place) -> None:
    stage = place.based(d__f=b"content")
    hidden = "/d/.fuse_hidden0000000300000001"
    with opened(stage, "/d/f") as fh:
        stage.rename("/d/f", hidden)
        assert (names(stage, "/d"), changes(stage)) == ([], [("d/f", "deleted", "file")])
        assert (stage.getattr(hidden).nlink, stage.getattr("/", fh).nlink) == (1, 0)  # libfuse subtracts the name it sees
        stage.write(fh, b"CON", 0)
        assert stage.read(fh, 10, 0) == b"CONtent"
        stage.rmdir("/d")
    with contextlib.suppress(FileNotFoundError):
        stage.unlink(hidden)
    published = stage.commit()
    assert published is not None
    assert list(place.store.tree.walk(published.version.root)) == []


def test_a_name_like_libfuses_is_never_committed(place: Place) -> None:
    stage = place.begin()
    put(stage, "/.fuse_hidden0000000300000001", b"left over")
    put(stage, "/f", b"x")
    assert changes(stage) == [("f", "added", "file")]
    published = stage.commit()
    assert published is not None
    assert place.files(published.version) == {"f": b"x"}
    assert stage.status() == []


def test_two_handles_see_one_file(place: Place) -> None:
    stage = place.based(f=BIG)
    with opened(stage, "/f") as one, opened(stage, "/f") as two:
        stage.write(one, b"1", BLOCK)
        assert stage.read(two, 2, BLOCK) == b"1\x01"
        stage.ftruncate(two, 0)
        assert stage.read(one, 10, 0) == b""
        with opened(stage, "/f", os.O_WRONLY | os.O_TRUNC) as three:
            stage.write(three, b"3", 1)
        assert stage.read(one, 10, 0) == b"\0003"


def test_sparse_files_take_no_space(place: Place) -> None:
    stage = place.begin()
    put(stage, "/f", b"")
    stage.truncate("/f", 1 << 40)
    with opened(stage, "/f") as fh:
        stage.write(fh, b"end", 1 << 40)
        assert stage.read(fh, 10, (1 << 40) - 4) == b"\0\0\0\0end"
    info = stage.getattr("/f")
    assert (info.size, info.blocks < 100) == ((1 << 40) + 3, True)


# Attributes


def test_modes_owners_and_times(place: Place) -> None:
    stage = place.based(f=b"x", x__g=b"y")
    assert stage.getattr("/f").mode == stat.S_IFREG | 0o644
    assert stage.getattr("/x").mode == stat.S_IFDIR | 0o755
    stage.chmod("/f", 0o4755)
    stage.chown("/f", 12, -1)
    stage.chown("/f", -1, 34)
    stage.utimens("/f", 1_000_000_001, None)
    stage.utimens("/f", None, 2_000_000_002)
    for checked in (stage, place.resume(stage)):
        info = checked.getattr("/f")
        assert (info.mode, info.uid, info.gid, info.atime, info.mtime) == (
            stat.S_IFREG | 0o4755,
            12,
            34,
            1_000_000_001,
            2_000_000_002,
        )
        assert abs(info.ctime - time.time_ns()) < 60 * 10**9


def test_times_of_written_files_survive(place: Place) -> None:
    stage = place.begin()
    put(stage, "/f", b"x")
    stage.utimens("/f", 5, 7_000_000_000)
    with opened(stage, "/f", os.O_RDONLY):
        assert stage.getattr("/f").mtime == 7_000_000_000
    stage.chmod("/f", 0o600)
    assert stage.getattr("/f").mtime == 7_000_000_000
    stage = place.resume(stage)
    assert (stage.getattr("/f").mtime, stage.getattr("/f").atime) == (7_000_000_000, 5)
    with opened(stage, "/f") as fh:
        stage.write(fh, b"y", 0)
    assert abs(stage.getattr("/f").mtime - time.time_ns()) < 60 * 10**9


def test_changes_stamp_the_directories_they_are_in(place: Place) -> None:
    stage = place.based(d__f=b"x", e__g=b"y")

    def stamped(*paths: str) -> list[bool]:
        recent = time.time_ns() - 3600 * 10**9
        return [stage.getattr(path).mtime > recent and stage.getattr(path).ctime > recent for path in paths]

    def age(*paths: str) -> None:
        for path in paths:
            stage.utimens(path, 1, 1)

    age("/d", "/e")
    stage.rename("/d/f", "/e/f")
    assert stamped("/d", "/e") == [True, True]
    age("/d", "/e")
    stage.unlink("/e/f")
    stage.mkdir("/d/s", 0o755, ME)
    assert stamped("/d", "/e") == [True, True]
    age("/d", "/e")
    stage.rmdir("/d/s")
    stage.link("/e/g", "/e/h")
    assert stamped("/d", "/e") == [True, True]
    age("/d")
    stage.symlink("x", "/d/ln", ME)
    assert stamped("/d") == [True]


def test_a_setgid_directory_gives_its_group_on(place: Place) -> None:
    stage = place.begin()
    stage.mkdir("/d", 0o755, ME)
    stage.chown("/d", -1, 77)
    stage.chmod("/d", 0o2775)
    stage.mkdir("/d/below", 0o755, (5, 5))
    fh = stage.create("/d/f", 0o2755, os.O_WRONLY, (5, 5))
    stage.release(fh)
    below, file = stage.getattr("/d/below"), stage.getattr("/d/f")
    assert (below.uid, below.gid, below.mode & 0o7777) == (5, 77, 0o2755)
    assert (file.uid, file.gid, file.mode & 0o7777) == (5, 77, 0o755)


def test_extended_attributes(place: Place) -> None:
    stage = place.based(f=b"x")
    with fails(errno.ENODATA):
        stage.getxattr("/f", "user.key")
    with fails(errno.ENOTSUP):
        stage.setxattr("/f", "trusted.key", b"x", 0)
    with fails(errno.ENODATA):
        stage.setxattr("/f", "user.key", b"x", os.XATTR_REPLACE)
    stage.setxattr("/f", "user.key", b"value\0", os.XATTR_CREATE)
    with fails(errno.EEXIST):
        stage.setxattr("/f", "user.key", b"x", os.XATTR_CREATE)
    with fails(errno.E2BIG):
        stage.setxattr("/f", "user.key", bytes(70_000), 0)
    stage.setxattr("/f", "user.other", b"", 0)
    stage = place.resume(stage)
    assert (stage.getxattr("/f", "user.key"), stage.getxattr("/f", "user.other")) == (b"value\0", b"")
    assert stage.listxattr("/f") == ["user.key", "user.other"]
    stage.removexattr("/f", "user.key")
    with fails(errno.ENODATA):
        stage.removexattr("/f", "user.key")
    assert stage.status() == []


def test_special_files_are_kept_and_not_committed(place: Place) -> None:
    stage = place.based(f=b"x")
    stage.mknod("/pipe", stat.S_IFIFO | 0o600, ME)
    stage.mknod("/plain", stat.S_IFREG | 0o600, ME)
    stage.unlink("/f")
    stage.mknod("/f", stat.S_IFSOCK | 0o600, ME)
    stage.mkdir("/dir", 0o755, ME)
    stage.mknod("/dir/null", stat.S_IFCHR | 0o600, ME, os.makedev(1, 3))
    left_out = [("dir/null", "ignored", "device"), ("f", "ignored", "socket"), ("pipe", "ignored", "fifo")]
    for resumed in (stage, place.resume(stage)):
        assert resumed.getattr("/pipe").mode == stat.S_IFIFO | 0o600
        assert resumed.getattr("/dir/null").device == os.makedev(1, 3)
        changed = [("f", "deleted", "file"), ("plain", "added", "file"), ("dir", "added", "directory")]
        assert sorted(changes(resumed)) == sorted([*changed, *left_out])
        stage = resumed
    assert sorted((change.path, change.change, change.kind) for change in stage.left_out()) == left_out
    stage.unlink("/dir/null")
    stage.rmdir("/dir")
    published = stage.commit()
    assert published is not None
    assert place.files(published.version) == {"plain": b""}


def test_statfs_is_the_staging_disk(place: Place) -> None:
    found = os.statvfs(place.tmp)
    space = place.begin().statfs()
    assert space.total == found.f_blocks * found.f_frsize
    assert 0 < space.free <= space.total


# What is copied


def test_reading_copies_nothing(place: Place) -> None:
    stage = place.based(f=BIG)
    with opened(stage, "/f") as fh:
        assert stage.read(fh, 5, BLOCK) == BIG[BLOCK : BLOCK + 5]
    assert (os.listdir(stage.path / "data"), stage.status()) == ([], [])


def test_only_touched_blocks_are_fetched(place: Place) -> None:
    stage = place.based(f=BIG)
    with opened(stage, "/f") as fh:
        stage.write(fh, b"new", 2 * BLOCK + 10)
        assert place.reader.reads == [(2 * BLOCK, BLOCK)]
        stage.write(fh, b"more", 2 * BLOCK + 100)
        assert place.reader.reads == [(2 * BLOCK, BLOCK)]
    (data,) = (stage.path / "data").iterdir()
    assert data.stat().st_size == len(BIG)
    assert data.stat().st_blocks * 512 <= BLOCK + 65536
    assert changes(stage) == [("f", "modified", "file")]


def test_appending_fetches_at_most_the_last_block(place: Place) -> None:
    stage = place.based(f=BIG, even=BIG[: 2 * BLOCK])
    with opened(stage, "/f") as fh, opened(stage, "/even") as even:
        stage.write(fh, b"appended", len(BIG))
        assert place.reader.reads == [(3 * BLOCK, 4)]
        place.reader.reads.clear()
        stage.write(even, b"appended", 2 * BLOCK)
        assert place.reader.reads == []
        assert stage.read(fh, 20, len(BIG) - 4) == b"tailappended"
        assert stage.read(even, 20, 2 * BLOCK - 2) == b"\xfe\xffappended"
    stored: list[int] = []
    published = stage.commit(lambda progress: stored.append(progress.stored))
    assert published is not None
    assert place.files(published.version) == {"f": BIG + b"appended", "even": BIG[: 2 * BLOCK] + b"appended"}
    assert stored[-1] < 1000


def test_overwriting_whole_blocks_and_emptying_fetch_nothing(place: Place) -> None:
    stage = place.based(f=BIG, g=BIG, h=BIG)
    with opened(stage, "/f") as fh:
        stage.write(fh, b"z" * BLOCK, BLOCK)
        stage.write(fh, b"t" * 10, 3 * BLOCK)
    with opened(stage, "/g", os.O_WRONLY | os.O_TRUNC) as fh:
        stage.write(fh, b"short", 0)
    stage.truncate("/h", BLOCK + 5)
    assert place.reader.reads == []
    assert get(stage, "/f") == BIG[:BLOCK] + b"z" * BLOCK + BIG[2 * BLOCK : 3 * BLOCK] + b"t" * 10
    assert get(stage, "/g") == b"short"
    assert get(stage, "/h") == BIG[: BLOCK + 5]


def test_what_a_truncation_cut_off_is_zeros_when_the_file_grows_again(place: Place) -> None:
    stage = place.based(f=BIG)
    stage.truncate("/f", BLOCK + 5)
    stage.truncate("/f", 2 * BLOCK)
    expected = BIG[: BLOCK + 5] + bytes(BLOCK - 5)
    assert get(stage, "/f") == expected
    with opened(stage, "/f") as fh:
        stage.write(fh, b"x", BLOCK + 10)
    expected = expected[: BLOCK + 10] + b"x" + expected[BLOCK + 11 :]
    stage = place.resume(stage)
    assert get(stage, "/f") == expected
    published = stage.commit()
    assert published is not None
    assert place.files(published.version)["f"] == expected


@pytest.mark.parametrize("algorithm", ["BLAKE3", "MD5", "XXH128"])
def test_partly_changed_files_are_committed_right(place: Place, algorithm: str) -> None:
    data = {"grown": BIG[:100], "exact": BIG[:BLOCK], "shrunk": BIG, "edited": BIG, "cut": BIG, "same": BIG[: BLOCK + 1]}
    stage = place.begin(algorithm=algorithm)
    for name, content in data.items():
        put(stage, "/" + name, content)
    stage.commit(final=True)
    stage = place.begin(0, algorithm=algorithm)
    with opened(stage, "/grown") as fh:
        stage.write(fh, b"x", 2 * BLOCK)
    with opened(stage, "/exact") as fh:
        stage.write(fh, b"x", 2 * BLOCK)
    stage.truncate("/shrunk", 10)
    with opened(stage, "/edited") as fh:
        stage.write(fh, b"edit", BLOCK - 2)
    stage.truncate("/cut", 2 * BLOCK)
    with opened(stage, "/same") as fh:
        stage.write(fh, b"", 0)
    expected = {path: get(stage, "/" + path) for path in data}
    assert expected["edited"] == BIG[: BLOCK - 2] + b"edit" + BIG[BLOCK + 2 :]
    published = stage.commit(final=True)
    assert published is not None
    assert place.files(published.version) == expected
    other = place.begin(algorithm=algorithm, name=dataclasses.replace(NAME, collection="plain"))
    for name, content in expected.items():
        put(other, "/" + name, content)
    plain = other.commit(final=True)
    assert plain is not None and plain.version.digest == published.version.digest


def test_references_stay_references_until_they_are_written(place: Place) -> None:
    outside = place.tmp / "outside"
    outside.mkdir()
    (outside / "a").write_bytes(BIG)
    (outside / "b").write_bytes(b"small")
    draft = Draft(name=NAME, type="dataset", folder=_References(outside), commit=uuid.uuid4().hex)
    publish(place.store, draft)
    stage = place.begin(0)
    assert (stage.getattr("/a").size, get(stage, "/b")) == (len(BIG), b"small")
    stage.rename("/b", "/moved")
    assert changes(stage) == [("b", "deleted", "reference"), ("moved", "added", "reference")]
    with opened(stage, "/a") as fh:
        stage.write(fh, b"new", BLOCK)
    published = stage.commit()
    assert published is not None
    changed, moved = (place.store.tree.resolve(published.version.root, path) for path in ("a", "moved"))
    assert isinstance(changed, File) and isinstance(moved, Ref)
    expected = BIG[:BLOCK] + b"new" + BIG[BLOCK + 3 :]
    assert place.files(published.version) == {"a": expected, "moved": b"small"}
    assert get(stage, "/a") == expected


class _References:
    """References to the files of a local directory."""

    base = None

    def __init__(self, root: Path) -> None:
        self._root = root

    def changes(self) -> Iterator[tuple[str, Any]]:
        for found in expand(self._root.as_uri()):
            yield found.path, NewRef(found.ref, found.block_list)


# Crashes


def test_whatever_is_lost_of_the_journal_a_prefix_of_the_operations_is_left(place: Place) -> None:
    stage = place.based(f=b"x", d__g=b"y")
    journal = stage.path / "journal"
    states = [(journal.stat().st_size, listing(stage))]
    operations: list[Callable[[], Any]] = [
        lambda: stage.mkdir("/new", 0o755, ME),
        lambda: put(stage, "/new/file", b"data"),
        lambda: stage.rename("/d", "/new/d"),
        lambda: stage.setxattr("/new/d/g", "user.k", b"v", 0),
        lambda: stage.link("/f", "/new/link"),
        lambda: stage.unlink("/f"),
        lambda: stage.symlink("target", "/ln", ME),
        lambda: stage.chmod("/new/link", 0o600),
        lambda: stage.rename("/ln", "/new/link", RENAME_EXCHANGE),
        lambda: stage.truncate("/new/d/g", 0),
    ]
    for operation in operations:
        operation()
        states.append((journal.stat().st_size, listing(stage)))
    abandon(stage)
    kept = place.tmp / "kept"
    shutil.copytree(stage.path, kept)
    start, end = states[-4][0], states[-1][0]
    sizes = [*range(start, end + 1), *(size for size, _ in states)]
    for size in sizes:
        shutil.rmtree(stage.path)
        shutil.copytree(kept, stage.path)
        os.truncate(journal, size)
        resumed = Stage.resume(stage.path, place.store, place.reader)
        expected = [state for boundary, state in states if boundary <= size][-1]
        assert listing(resumed) == expected
        resumed.close()


def test_a_damaged_record_ends_the_journal_and_what_followed_is_kept(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    stage = place.begin()
    stage.mkdir("/a", 0o755, ME)
    size = (stage.path / "journal").stat().st_size
    stage.mkdir("/b", 0o755, ME)
    stage.mkdir("/c", 0o755, ME)
    abandon(stage)
    with (stage.path / "journal").open("r+b") as file:
        file.seek(size + 12)
        file.write(b"\xff")
    resumed = Stage.resume(stage.path, place.store, place.reader)
    assert names(resumed) == ["a"]
    assert "incomplete" in caplog.text
    assert (stage.path / "journal.damaged").stat().st_size > size
    resumed.close()


def test_a_journal_of_another_format_is_refused(place: Place) -> None:
    stage = place.begin()
    abandon(stage)
    (stage.path / "journal").write_bytes(b"AFSTAGE9" + bytes(100))
    with pytest.raises(StoreFormatError, match="newer"):
        Stage.resume(stage.path, place.store, place.reader)


@pytest.mark.parametrize("record", [[("k", 99, [1])], [("d", 1, "x", 77, 0)], [("?",)], [("t",)]])
def test_a_journal_that_contradicts_itself_is_refused(place: Place, record: list[tuple[Any, ...]]) -> None:
    stage = place.begin()
    stage._ledger.journal.append(record)
    abandon(stage)
    with pytest.raises(StoreFormatError, match="damaged"):
        Stage.resume(stage.path, place.store, place.reader)


def test_an_interrupted_truncation_is_finished(place: Place) -> None:
    stage = place.based(f=BIG)
    with opened(stage, "/f") as fh:
        stage.write(fh, b"local", 2 * BLOCK)
    node = stage._node("/f")
    stage._ledger.change(node, ("u", node.ino, BLOCK + 5))
    stage = place.resume(stage)
    assert get(stage, "/f") == BIG[: BLOCK + 5]


def test_data_files_that_no_name_has_are_removed(place: Place) -> None:
    stage = place.begin()
    put(stage, "/kept", b"x")
    put(stage, "/removed", b"y")
    fh = stage.open("/removed", os.O_RDONLY)
    stage.unlink("/removed")
    (stage.path / "data" / "999").write_bytes(b"created, but never recorded")
    assert stage.read(fh, 1, 0) == b"y"
    stage = place.resume(stage)
    assert len(os.listdir(stage.path / "data")) == 1
    put(stage, "/another", b"z")
    assert get(stage, "/kept") == b"x"


def test_after_power_loss_unsynced_blocks_are_the_bases(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the disk may have lost is taken away from the data files by hand: the journal has all of it."""
    stage = place.based(f=BIG, g=BIG)
    for path in ("/f", "/g"):
        with opened(stage, path) as fh:
            stage.write(fh, b"first", 10)
            stage.write(fh, b"second", BLOCK + 10)
            stage.fsync(fh)
            stage.write(fh, b"third", 2 * BLOCK + 10)
    numbers = [stage._node(path).data for path in ("/f", "/g")]
    abandon(stage)
    for number in numbers:
        data = stage.path / "data" / str(number)
        punch(data, 2 * BLOCK + 8192, BLOCK - 8192)
    punch(stage.path / "data" / str(numbers[1]), 2 * BLOCK, 8192)
    os.truncate(stage.path / "data" / str(numbers[1]), 2 * BLOCK)
    monkeypatch.setattr(recovery, "boot_id", lambda: "after the power came back")
    resumed = Stage.resume(stage.path, place.store, place.reader)
    synced = BIG[:10] + b"first" + BIG[15 : BLOCK + 10] + b"second" + BIG[BLOCK + 16 :]
    assert get(resumed, "/g") == synced
    assert get(resumed, "/f") == synced[: 2 * BLOCK + 10] + b"third" + synced[2 * BLOCK + 15 :]
    published = resumed.commit()
    assert published is not None
    assert place.files(published.version) == {"f": get(resumed, "/f"), "g": synced}
    resumed.close()


@pytest.mark.parametrize("lost", [False, True])
def test_after_power_loss_a_committed_file_is_the_versions_but_for_known_changes(
    place: Place, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    stage = place.begin()
    put(stage, "/f", BIG)
    stage.commit()
    assert stage._node("/f").entry is not None
    with opened(stage, "/f") as fh:
        stage.write(fh, b"synced", BLOCK + 7)
        stage.fsync(fh)
    number = stage._node("/f").data
    abandon(stage)
    with (stage.path / "data" / str(number)).open("r+b") as file:
        file.write(b"written, but the journal lost the record")
        if lost:  # so is what the commit has stored, and only that
            file.truncate(2 * BLOCK)
    monkeypatch.setattr(recovery, "boot_id", lambda: "after the power came back")
    resumed = Stage.resume(stage.path, place.store, place.reader)
    assert changes(resumed) == [("f", "modified", "file")]
    published = resumed.commit()
    assert published is not None
    expected = BIG[: BLOCK + 7] + b"synced" + BIG[BLOCK + 13 :]
    assert place.files(published.version) == {"f": get(resumed, "/f")} == {"f": expected}
    resumed.close()


def punch(path: Path, offset: int, size: int) -> None:
    subprocess.run(["fallocate", "--punch-hole", "--offset", str(offset), "--length", str(size), str(path)], check=True)


KILLER = """
import os, sys
from pathlib import Path
from artifactfs.reader import Reader
from artifactfs.staging import Stage
from artifactfs.store.urls import open_store

def commit(left):
    def counted(call):
        def run(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(9)
            return call(*args, **kwargs)
        return run
    store = open_store(sys.argv[2])
    stage = Stage.resume(Path(sys.argv[1]), store, Reader(store, None))
    for name in ("write", "pwrite", "rename", "replace", "link", "fsync", "fdatasync", "unlink", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    stage.commit(final=True)
    stage.remove()

for line in sys.stdin:
    child = os.fork()
    if not child:
        commit(int(line))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Commits once for each line of its input, each time in a new process that dies at the so-manieth change on disk."""


def test_a_commit_killed_at_any_step_is_finished_by_the_next(place: Place) -> None:
    stage = place.based(f=BIG, d__old=b"x")
    with opened(stage, "/f") as fh:
        stage.write(fh, b"edit", BLOCK)
    put(stage, "/new", b"n" * 1000)
    stage.rename("/d", "/e")
    expected = {path: get(stage, "/" + path) for path in ("f", "new", "e/old")}
    abandon(stage)
    kept, store = place.tmp / "kept", place.tmp / "store"
    shutil.copytree(stage.path, kept)
    shutil.copytree(store, place.tmp / "kept-store")
    command = [sys.executable, "-c", KILLER, str(stage.path), str(store)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as killer:
        assert killer.stdin is not None and killer.stdout is not None
        for step in itertools.count():
            for there, saved in ((stage.path, kept), (store, place.tmp / "kept-store")):
                shutil.rmtree(there, ignore_errors=True)
                shutil.copytree(saved, there)
            killer.stdin.write(f"{step}\n")
            killer.stdin.flush()
            code = int(killer.stdout.readline())
            fresh = open_store(str(store))
            if (stage.path / "stage.json").exists():
                resumed = Stage.resume(stage.path, fresh, place.reader)
                published = resumed.commit(final=True)
                assert published is not None and published.version.number == 1
                resumed.remove()
            assert [version.number for version in fresh.versions(NAME)] == [0, 1]
            assert place.files(fresh.version(NAME)) == expected
            if code == 0:
                break
            assert code == 9
        killer.stdin.close()
    assert step > 10


# The directory


def test_two_processes_never_use_one_stage(place: Place) -> None:
    stage = place.begin()
    with pytest.raises(ConflictError, match=f"process {os.getpid()}"):
        Stage.resume(stage.path, place.store, place.reader)
    code = (
        "import sys; from pathlib import Path; from artifactfs.staging import Stage; from artifactfs.reader import Reader\n"
        "from artifactfs.store.urls import open_store; store = open_store(sys.argv[2])\n"
        "Stage.resume(Path(sys.argv[1]), store, Reader(store, None))"
    )
    command = [sys.executable, "-c", code, str(stage.path), str(place.tmp / "store")]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"in use by process {os.getpid()}" in refused.stderr
    stage.close()
    assert subprocess.run(command, check=False).returncode == 0


def test_stages_are_listed_with_their_state(place: Place) -> None:
    assert list_stages(place.stages) == []
    active, orphan, finished, damaged = (place.begin() for _ in range(4))
    put(finished, "/f", b"x")
    finished.commit(final=True)
    for stage in (orphan, finished, damaged):
        abandon(stage)
    (damaged.path / "stage.json").write_text("{")
    (place.stages / "junk").mkdir()
    found = {info.directory: (info.state, info.pid) for info in list_stages(place.stages)}
    assert found == {
        active.path: ("active", os.getpid()),
        orphan.path: ("orphan", None),
        finished.path: ("committed", None),
        damaged.path: ("damaged", None),
    }
    with pytest.raises(StoreFormatError):
        Stage.resume(damaged.path, place.store, place.reader)
    with pytest.raises(NotFoundError):
        Stage.resume(place.stages / "junk", place.store, place.reader)
    with pytest.raises(NotFoundError):
        Stage.resume(place.stages / "nothing", place.store, place.reader)


def test_the_directory_is_private_and_goes_when_removed(place: Place) -> None:
    stage = place.begin()
    put(stage, "/f", b"x")
    assert stat.S_IMODE(stage.path.stat().st_mode) == 0o700
    with pytest.raises(ConflictError):
        Stage.begin(stage.path, stage.spec, place.store, place.reader)
    stage.remove()
    assert not stage.path.exists()
    stage.remove()
    stage.close()


def test_what_a_dying_removal_left_goes_with_the_next_stage(place: Place) -> None:
    stage = place.begin()
    put(stage, "/f", b"x")
    stage._directory.retire()
    place.begin()
    assert stage.path.exists()
    abandon(stage)
    assert [info.directory for info in list_stages(place.stages)] == [place.made[-1].path]
    place.begin()
    assert not stage.path.exists()


def test_what_a_commit_would_refuse_is_refused_at_the_beginning(place: Place) -> None:
    for wrong in ({"aliases": ("v3",)}, {"tags": ("no/slash",)}, {"type": "wandb-x"}, {"metadata": {"x": float("inf")}}):
        with pytest.raises(InvalidNameError):
            place.begin(**wrong)
    with pytest.raises(NotFoundError):
        place.begin(7)
    assert list_stages(place.stages) == []
    assert not place.stages.exists() or os.listdir(place.stages) == []


# Status and commits


def test_status_lists_what_differs(place: Place) -> None:
    stage = place.based(same=b"x", gone=b"x", edited=b"x", d__in=b"x", d__sub__deep=b"x", kind=b"x", x=b"x")
    stage.unlink("/gone")
    put(stage, "/edited", b"longer")
    with opened(stage, "/same") as fh:
        stage.write(fh, b"", 0)
    stage.rename("/d", "/moved")
    stage.chmod("/x", 0o755)
    stage.unlink("/kind")
    stage.mkdir("/kind", 0o755, ME)
    put(stage, "/kind/below", b"12")
    stage.symlink("x", "/ln", ME)
    stage.mkdir("/empty", 0o755, ME)
    expected = [
        ("d", "deleted", "directory"),
        ("d/in", "deleted", "file"),
        ("d/sub", "deleted", "directory"),
        ("d/sub/deep", "deleted", "file"),
        ("edited", "modified", "file"),
        ("empty", "added", "directory"),
        ("gone", "deleted", "file"),
        ("kind", "deleted", "file"),
        ("kind", "added", "directory"),
        ("kind/below", "added", "file"),
        ("ln", "added", "symlink"),
        ("moved", "added", "directory"),
        ("moved/in", "added", "file"),
        ("moved/sub", "added", "directory"),
        ("moved/sub/deep", "added", "file"),
        ("x", "modified", "file"),
    ]
    assert changes(stage) == expected
    assert {change.path: change.size for change in stage.status()}["kind/below"] == 2
    stage = place.resume(stage)
    assert changes(stage) == expected
    stage.rename("/moved", "/d")
    assert not [path for path, _, _ in changes(stage) if path.startswith(("d", "moved"))]
    stage.commit()
    assert changes(stage) == []


def test_a_directory_replaced_by_another_is_compared_by_content(place: Place) -> None:
    stage = place.based(a__same=b"x", a__only_a=b"x", b__same=b"x", b__only_b=b"x")
    stage.rename("/a", "/b", RENAME_EXCHANGE)
    assert changes(stage) == [
        ("a/only_a", "deleted", "file"),
        ("a/only_b", "added", "file"),
        ("b/only_a", "added", "file"),
        ("b/only_b", "deleted", "file"),
    ]


def test_nothing_changed_makes_no_version(place: Place) -> None:
    assert place.begin().commit() is None
    stage = place.based(f=b"x")
    with opened(stage, "/f") as fh:
        stage.read(fh, 1, 0)
    stage.mkdir("/d", 0o755, ME)
    stage.rmdir("/d")
    published = stage.commit()
    assert published is not None and (published.version.number, published.created) == (0, False)
    put(stage, "/f", b"y")
    stage.commit()
    older = place.begin(0, aliases=("best",))
    published = older.commit()
    assert published is not None and (published.version.number, published.created) == (0, False)
    assert place.store.collection(NAME).aliases == {"latest": 1, "best": 0}


def test_a_stage_goes_on_over_what_it_committed(place: Place) -> None:
    stage = place.based(f=BIG, d__g=b"g")
    put(stage, "/new", BIG)
    fh = stage.open("/f", os.O_RDWR)
    stage.write(fh, b"one", BLOCK)
    stage.unlink("/d/g")
    first = stage.commit()
    stage.write(fh, b"two", 2 * BLOCK)
    stage.release(fh)
    with opened(stage, "/new") as new:
        stage.write(new, b"x", 5)
    put(stage, "/d/g", b"again")
    assert changes(stage) == [("d/g", "added", "file"), ("f", "modified", "file"), ("new", "modified", "file")]
    second = stage.commit()
    assert first is not None and second is not None
    assert (first.version.number, second.version.number, second.version.base) == (1, 2, 1)
    edited = BIG[:BLOCK] + b"one" + BIG[BLOCK + 3 :]
    assert place.files(first.version) == {"f": edited, "new": BIG}
    expected = {
        "f": edited[: 2 * BLOCK] + b"two" + edited[2 * BLOCK + 3 :],
        "new": BIG[:5] + b"x" + BIG[6:],
        "d/g": b"again",
    }
    assert place.files(second.version) == expected
    assert {path: get(stage, "/" + path) for path in expected} == expected
    stage = place.resume(stage)
    assert (changes(stage), stage.base) == ([], second.version)
    assert {path: get(stage, "/" + path) for path in expected} == expected


def test_changes_made_by_others_while_a_commit_runs_are_in_the_next(place: Place) -> None:
    """Two counters are written one after the other: a version in which the second is ahead was cut at two moments."""
    stage = place.begin()
    put(stage, "/first", b"0" * 8)
    put(stage, "/second", b"0" * 8)
    stop = threading.Event()
    failed: list[BaseException] = []

    def count() -> None:
        try:
            with opened(stage, "/first") as first, opened(stage, "/second") as second:
                number = 0
                while not stop.is_set():
                    number += 1
                    stage.write(first, b"%08d" % number, 0)
                    stage.write(second, b"%08d" % number, 0)
                    put(stage, f"/name-{number % 5}", b"%d" % number)
        except BaseException as error:
            failed.append(error)

    writer = threading.Thread(target=count)
    writer.start()
    try:
        for _ in range(8):
            published = stage.commit()
            assert published is not None
            found = place.files(published.version)
            assert 0 <= int(found["first"]) - int(found["second"]) <= 1
    finally:
        stop.set()
        writer.join()
    assert not failed
    stage.commit()
    assert place.files(place.latest()) == {name: get(stage, "/" + name) for name in names(stage)}


def test_a_failed_commit_keeps_everything_and_is_repeated(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = place.begin()
    put(stage, "/f", b"x")
    expected = ConflictError("the store is away")

    def away(*_: Any) -> Any:
        raise expected

    with monkeypatch.context() as patch:
        patch.setattr("artifactfs.staging.stage.publish", away)
        with pytest.raises(ConflictError) as caught:
            stage.commit()
    assert caught.value is expected
    put(stage, "/g", b"y")
    published = stage.commit()
    assert published is not None and place.files(published.version) == {"f": b"x", "g": b"y"}


def test_what_changes_after_a_commit_that_died_is_not_taken_for_it(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version was made, its result not recorded, and then somebody went on writing."""
    stage = place.begin(expect_base=True)
    put(stage, "/f", b"x")

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage._directory, "write_result", die)
        with pytest.raises(KeyboardInterrupt):
            stage.commit()
    assert place.latest().number == 0
    same = place.resume(stage)
    published = same.commit()
    assert published is not None and (published.version.number, published.version.commit) == (0, stage.spec.commit)
    put(same, "/f", b"later")
    published = same.commit()
    assert published is not None and published.version.number == 1
    assert place.files(published.version) == {"f": b"later"}


def test_expect_base_finds_out_that_somebody_else_committed(place: Place) -> None:
    stage = place.based(f=b"x")
    mine, other = place.begin(0, expect_base=True), place.begin(0)
    for changed in (stage, mine, other):
        put(changed, "/f", changed.path.name.encode())
    put(other, "/g", b"x")
    other.commit()
    with pytest.raises(ConflictError, match="v1"):
        mine.commit()
    assert get(mine, "/f") == mine.path.name.encode()


def test_aliases_tags_and_metadata_reach_the_version(place: Place) -> None:
    stage = place.begin(aliases=("best",), tags=("fast",), description="words", metadata={"k": [1, 2]})
    put(stage, "/run.sh", b"#!/bin/sh", 0o755)
    stage.symlink("run.sh", "/ln", ME)
    stage.mkdir("/empty", 0o755, ME)
    published = stage.commit()
    assert published is not None
    version = published.version
    assert (version.tags, version.description, version.metadata, version.type) == (["fast"], "words", {"k": [1, 2]}, "dataset")
    assert place.store.collection(NAME).aliases == {"best": 0, "latest": 0}
    entries = dict(place.store.tree.walk(version.root))
    assert isinstance(entries["run.sh"], File) and entries["run.sh"].executable
    assert isinstance(entries["empty"], Dir)
    stage.chmod("/run.sh", 0o644)
    published = stage.commit()
    assert published is not None
    changed = place.store.tree.resolve(published.version.root, "run.sh")
    assert isinstance(changed, File) and not changed.executable and changed.extents == entries["run.sh"].extents


def test_threads_may_do_anything_at_once(place: Place) -> None:
    stage = place.based(**{f"d{i}__f": BIG[: BLOCK + i] for i in range(4)})
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for round_ in range(30):
                put(stage, f"/d{number}/n{round_}", b"%d" % round_)
                with opened(stage, f"/d{number}/f") as fh:
                    stage.write(fh, b"%08d" % round_, 16 * round_)
                    assert stage.read(fh, 8, 16 * round_) == b"%08d" % round_
                stage.rename(f"/d{number}/n{round_}", f"/d{(number + 1) % 4}/m{number}-{round_}")
                stage.getattr(f"/d{(number + 2) % 4}")
                list(stage.readdir("/"))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert sum(len(names(stage, f"/d{i}")) for i in range(4)) == 4 + 120
    before = listing(stage)
    assert listing(place.resume(stage)) == before


# A full disk


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_refuses_writers_and_loses_nothing(place: Place) -> None:
    small = place.tmp / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(small)], check=True)
    try:
        place.based(f=BIG, g=BIG)
        place.stages = small
        stage = place.begin(0)
        fh = stage.create("/filler", 0o644, os.O_WRONLY, ME)
        written = 0
        with fails(errno.ENOSPC):
            while True:
                written += stage.write(fh, b"x" * 100_000, written)
        stage.release(fh)
        assert stage.getattr("/filler").size == written
        with opened(stage, "/f") as fh, fails(errno.ENOSPC):
            stage.write(fh, b"edit", BLOCK)
        assert get(stage, "/f") == BIG
        for number in range(20):
            with contextlib.suppress(OSError):
                stage.mkdir(f"/d{number}", 0o755, ME)
        expected = listing(stage)
        resumed = place.resume(stage)
        assert listing(resumed) == expected
        fill(small)
        with fails(errno.ENOSPC):
            for number in range(1000):
                resumed.mkdir(f"/more-{number}", 0o755, ME)
        expected = listing(resumed)
        resumed = place.resume(resumed)
        assert listing(resumed) == expected
        gc.collect()  # the errors above have frames that hold files open, whose space is not free before
        resumed.unlink("/filler")
        published = resumed.commit()
        assert published is not None and place.files(published.version) == {"f": BIG, "g": BIG}
        resumed.close()
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)


def fill(directory: Path) -> None:
    """Leave no byte free."""
    for size in (65536, 512):
        with contextlib.suppress(OSError), (directory / f"filler-{size}").open("wb", buffering=0) as file:
            while file.write(bytes(size)):
                pass
