"""Random operations on a stage and on a plain directory: the same answers, the same tree, also after crashes and commits."""

from __future__ import annotations

import errno
import functools
import inspect
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from artifactfs.model import BLAKE3, BLOCK, Dir, File, Symlink
from artifactfs.names import ArtifactName
from artifactfs.reader import Reader
from artifactfs.staging import Stage, StageSpec
from artifactfs.store.urls import open_store

NAME = ArtifactName("acme", "vision", "bikes")
ME = (os.getuid(), os.getgid())

names = st.sampled_from(["a", "b", "c", "ä", "long-" + "x" * 40])
paths = st.lists(names, min_size=1, max_size=3).map(lambda parts: "/" + "/".join(parts))
SIZES = [0, 1, 4095, 5000, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 77]
offsets = st.sampled_from(SIZES) | st.integers(0, 3 * BLOCK)
contents = st.binary(max_size=30) | st.sampled_from([b"y" * 70_000, b"z" * BLOCK, b"q" * (BLOCK + 5)])


class Mirror:
    """A stage, and the plain directory that it must be like."""

    def __init__(self, tmp: Path) -> None:
        self.tmp = tmp
        self.plain = tmp / "plain"
        self.plain.mkdir()
        self.store = open_store(str(tmp / "store"))
        self.reader = Reader(self.store, None)
        self.handles: dict[int, int] = {}
        self.stage = Stage.begin(tmp / "stage", spec(self.store.url, None), self.store, self.reader)

    def host(self, path: str) -> str:
        return f"{self.plain}{path}"

    def both(self, staged: Callable[[], Any], plain: Callable[[], Any]) -> tuple[Any, Any] | None:
        """The results of both; None if both failed, which they must with the same errno."""
        one, two = attempt(staged), attempt(plain)
        assert isinstance(one, OSError) == isinstance(two, OSError), f"stage: {one!r}, plain: {two!r}"
        if isinstance(two, OSError):
            assert errno.errorcode[one.errno] == errno.errorcode[two.errno or 0]
            return None
        return one, two

    def crash(self) -> None:
        """As kill -9: nothing is closed in order; what was open is gone."""
        for fd in self.handles.values():
            os.close(fd)
        self.handles.clear()
        abandon(self.stage)
        self.stage = Stage.resume(self.tmp / "stage", self.store, self.reader)

    def commit(self) -> None:
        published = self.stage.commit()
        if published is not None:
            assert committed(self.store, self.reader, published.version.root) == plain_tree(self.plain)
        else:
            assert plain_tree(self.plain) == {}
        assert self.stage.status() == []

    def compare(self) -> None:
        assert staged_tree(self.stage) == plain_tree(self.plain, links=True)
        for fh, fd in self.handles.items():
            size = os.fstat(fd).st_size
            found = self.stage.getattr("/", fh)
            assert (found.size, found.nlink) == (size, os.fstat(fd).st_nlink)
            assert self.stage.read(fh, size + 1, 0) == os.pread(fd, size + 1, 0)

    def close(self) -> None:
        for fd in self.handles.values():
            os.close(fd)
        self.stage.remove()
        self.reader.close()


def spec(store: str, base: int | None, **more: Any) -> StageSpec:
    return StageSpec(
        name=NAME,
        store=store,
        type="dataset",
        base=base,
        commit=uuid.uuid4().hex,
        algorithm=BLAKE3,
        mountpoint="/nowhere",
        created_at="2026-11-01T00:00:00.000000Z",
        **more,
    )


def abandon(stage: Stage) -> None:
    """Let go of a stage as a dying process does."""
    os.close(stage._directory._lock)
    os.close(stage._directory.fd)
    stage._directory.fd = -1
    os.close(stage._ledger.journal._fd)
    stage._data.close()


def attempt(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except OSError as error:
        return error


def plain_tree(root: Path, links: bool = False) -> dict[str, Any]:
    """path → what is there; with ``links`` also link counts, modes and which names are one file."""
    found: dict[str, Any] = {}
    inodes: dict[int, int] = {}
    for folder, dirs, files in os.walk(root):
        for name in sorted(dirs + files):
            full = os.path.join(folder, name)
            info = os.lstat(full)
            path = full.removeprefix(str(root))
            found[path] = describe(
                info.st_mode, info.st_nlink, links, lambda full=full: os.readlink(full), lambda full=full: read(full)
            )
            if links and info.st_nlink > 1 and stat.S_ISREG(info.st_mode):
                inodes.setdefault(info.st_ino, len(inodes))
    return found


def read(path: str) -> bytes:
    return Path(path).read_bytes()


def describe(mode: int, nlink: int, links: bool, target: Callable[[], str], content: Callable[[], bytes]) -> Any:
    kind = "link" if stat.S_ISLNK(mode) else "dir" if stat.S_ISDIR(mode) else "file"
    what: Any = target() if kind == "link" else content() if kind == "file" else None
    if not links:
        return kind, bool(mode & 0o100) if kind == "file" else None, what
    return kind, stat.S_IMODE(mode), nlink, what


def staged_tree(stage: Stage, path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, mode, ino in stage.readdir(path or "/"):
        below = f"{path}/{name}"
        info = stage.getattr(below)
        assert (stat.S_IFMT(info.mode), info.ino) == (stat.S_IFMT(mode), ino)
        found[below] = describe(
            info.mode,
            info.nlink,
            True,
            lambda below=below: stage.readlink(below),
            lambda below=below, size=info.size: load(stage, below, size),
        )
        if stat.S_ISDIR(info.mode):
            found.update(staged_tree(stage, below))
    return found


def load(stage: Stage, path: str, size: int) -> bytes:
    fh = stage.open(path, os.O_RDONLY)
    try:
        data = stage.read(fh, size + 1, 0)
        assert len(data) == size
        return data
    finally:
        stage.release(fh)


def committed(store: Any, reader: Reader, root: Dir) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, entry in store.tree.walk(root):
        if isinstance(entry, File):
            handle = reader.open(entry, path)
            found["/" + path] = "file", entry.executable, handle.read(0, entry.size)
            handle.close()
        else:
            found["/" + path] = ("link", None, entry.target) if isinstance(entry, Symlink) else ("dir", None, None)
    return found


def resolved(method: Callable[..., Any]) -> Callable[..., Any]:
    """The rule, left out where a symlink is on the way to one of its paths: a kernel follows these, a stage does not."""
    names = [name for name in inspect.signature(method).parameters if name in ("path", "old", "new")]

    @functools.wraps(method)
    def run(self: StagingMachine, **given: Any) -> Any:
        above = [parent for name in names for parent in Path(given[name]).parents]
        if any(os.path.islink(self.mirror.host(str(parent))) for parent in above):
            return multiple() if method.__name__ in ("create", "open") else None
        return method(self, **given)

    return run


class StagingMachine(RuleBasedStateMachine):
    """One stage and its plain twin; every rule may fail, and then must fail alike."""

    handles = Bundle("handles")

    def __init__(self) -> None:
        super().__init__()
        self.tmp = Path(tempfile.mkdtemp(prefix="staging-"))
        self.mirror = Mirror(self.tmp)
        self.stage_calls = 0

    def teardown(self) -> None:
        self.mirror.commit()
        self.mirror.close()
        shutil.rmtree(self.tmp)

    @property
    def stage(self) -> Stage:
        return self.mirror.stage

    @initialize(large=st.booleans())
    def make_base(self, large: bool) -> None:
        """A first version, so that there is something underneath."""
        for folder in ("/a", "/a/b", "/c"):
            self.stage.mkdir(folder, 0o755, ME)
            os.mkdir(self.mirror.host(folder), 0o755)
        for path, data in (("/a/b/c", b"deep"), ("/b", b"top"), ("/c/a", b"r" * (2 * BLOCK + 77 if large else 3000))):
            fh = self.stage.create(path, 0o644, os.O_WRONLY, ME)
            self.stage.write(fh, data, 0)
            self.stage.release(fh)
            Path(self.mirror.host(path)).write_bytes(data)
        self.mirror.commit()
        self.mirror.stage.remove()
        self.mirror.stage = Stage.begin(self.tmp / "stage", spec(self.mirror.store.url, 0), self.mirror.store, self.mirror.reader)

    @rule(target=handles, path=paths, mode=st.sampled_from([0o644, 0o755, 0o600]), data=contents)
    @resolved
    def create(self, path: str, mode: int, data: bytes) -> Any:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        made = self.mirror.both(
            lambda: self.stage.create(path, mode, flags, ME), lambda: os.open(self.mirror.host(path), flags, mode)
        )
        if made is None:
            return multiple()
        fh, fd = made
        os.fchmod(fd, mode)
        self.mirror.handles[fh] = fd
        assert self.stage.write(fh, data, 0) == os.pwrite(fd, data, 0)
        return fh

    @rule(target=handles, path=paths, truncate=st.booleans())
    @resolved
    def open(self, path: str, truncate: bool) -> Any:
        flags = os.O_RDWR | os.O_NOFOLLOW | (os.O_TRUNC if truncate else 0)
        made = self.mirror.both(lambda: self.stage.open(path, flags), lambda: os.open(self.mirror.host(path), flags))
        if made is None:
            return multiple()
        self.mirror.handles[made[0]] = made[1]
        return made[0]

    @rule(fh=consumes(handles))
    def close(self, fh: int) -> None:
        fd = self.mirror.handles.pop(fh, None)
        if fd is not None:
            self.stage.release(fh)
            os.close(fd)

    @rule(fh=handles, offset=offsets, data=contents)
    def write(self, fh: int, offset: int, data: bytes) -> None:
        fd = self.mirror.handles.get(fh)
        if fd is not None:
            assert self.stage.write(fh, data, offset) == os.pwrite(fd, data, offset)

    @rule(fh=handles, size=offsets)
    def ftruncate(self, fh: int, size: int) -> None:
        fd = self.mirror.handles.get(fh)
        if fd is not None:
            self.stage.ftruncate(fh, size)
            os.ftruncate(fd, size)

    @rule(fh=handles, offset=offsets, size=st.integers(0, 2 * BLOCK))
    def read(self, fh: int, offset: int, size: int) -> None:
        fd = self.mirror.handles.get(fh)
        if fd is not None:
            assert self.stage.read(fh, size, offset) == os.pread(fd, size, offset)

    @rule(fh=handles)
    def fsync(self, fh: int) -> None:
        if fh in self.mirror.handles:
            self.stage.fsync(fh)

    @rule(path=paths, size=offsets)
    @resolved
    def truncate(self, path: str, size: int) -> None:
        fd = attempt(lambda: os.open(self.mirror.host(path), os.O_WRONLY | os.O_NOFOLLOW))
        if not isinstance(fd, OSError):
            os.ftruncate(fd, size)
            os.close(fd)
            self.stage.truncate(path, size)

    @rule(path=paths)
    @resolved
    def mkdir(self, path: str) -> None:
        if self.mirror.both(lambda: self.stage.mkdir(path, 0o755, ME), lambda: os.mkdir(self.mirror.host(path))):
            os.chmod(self.mirror.host(path), 0o755)

    @rule(path=paths)
    @resolved
    def rmdir(self, path: str) -> None:
        self.mirror.both(lambda: self.stage.rmdir(path), lambda: os.rmdir(self.mirror.host(path)))

    @rule(path=paths)
    @resolved
    def unlink(self, path: str) -> None:
        self.mirror.both(lambda: self.stage.unlink(path), lambda: os.unlink(self.mirror.host(path)))

    @rule(old=paths, new=paths)
    @resolved
    def rename(self, old: str, new: str) -> None:
        self.mirror.both(lambda: self.stage.rename(old, new), lambda: os.rename(self.mirror.host(old), self.mirror.host(new)))

    @rule(old=paths, new=paths)
    @resolved
    def link(self, old: str, new: str) -> None:
        self.mirror.both(
            lambda: self.stage.link(old, new),
            lambda: os.link(self.mirror.host(old), self.mirror.host(new), follow_symlinks=False),
        )

    @rule(points_to=paths, path=paths)
    @resolved
    def symlink(self, points_to: str, path: str) -> None:
        goal = points_to[1:]
        self.mirror.both(lambda: self.stage.symlink(goal, path, ME), lambda: os.symlink(goal, self.mirror.host(path)))

    @rule(path=paths, mode=st.sampled_from([0o600, 0o755, 0o711]))
    @resolved
    def chmod(self, path: str, mode: int) -> None:
        if not os.path.islink(self.mirror.host(path)):
            self.mirror.both(lambda: self.stage.chmod(path, mode), lambda: os.chmod(self.mirror.host(path), mode))

    @rule(path=paths, atime=st.integers(0, 10**18), mtime=st.integers(0, 10**18))
    @resolved
    def utimens(self, path: str, atime: int, mtime: int) -> None:
        host = self.mirror.host(path)
        set_both = self.mirror.both(
            lambda: self.stage.utimens(path, atime, mtime), lambda: os.utime(host, ns=(atime, mtime), follow_symlinks=False)
        )
        if set_both:
            found = self.stage.getattr(path)
            assert (found.atime, found.mtime) == (atime, mtime)

    @rule()
    def crash(self) -> None:
        self.mirror.crash()

    @rule()
    def commit(self) -> None:
        self.mirror.commit()

    @invariant()
    def same(self) -> None:
        self.mirror.compare()


StagingMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestStaging = pytest.mark.timeout(600)(StagingMachine.TestCase)
