"""The same random system calls on a mounted stage and on a plain directory: the same answers, the same tree.

Between any two calls the daemon may be killed and the stage resumed, or a version be committed, which must equal the directory.
A failure names its seed and its last calls. More than CI runs: ``ARTIFACTFS_TEST_STEPS=100000 pytest tests/test_mount_model.py``.
"""

from __future__ import annotations

import mmap
import os
import random
import stat
import subprocess
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commits import contents, directory
from mounting import World, needs_fuse, world

from artifactfs import daemon, mountpoint
from artifactfs.model import BLOCK
from artifactfs.names import parse

pytestmark = needs_fuse
__all__ = ["world"]

STEPS = int(os.environ.get("ARTIFACTFS_TEST_STEPS", "1500"))
NAME = "acme/vision/twins"
BASE = {
    "a": b"one file\n" * 100,
    "large": bytes(range(256)) * (3 * BLOCK // 256) + b"end",
    "dir/b": b"x" * 5000,
    "dir/below/c": b"deep",
    "dir/empty": None,
}
_NAMES = ["a", "b", "c", "ä", "large", "dir", "below", "n" * 255]
_SIZES = [0, 1, 4095, 4096, 5000, BLOCK - 1, BLOCK, 2 * BLOCK + 77]
_OPEN = [os.O_RDWR, os.O_RDWR | os.O_CREAT, os.O_RDWR | os.O_CREAT | os.O_EXCL, os.O_RDWR | os.O_TRUNC, os.O_RDONLY]
_OPEN += [
    os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    os.O_RDWR | os.O_APPEND,
    os.O_RDONLY | os.O_NOFOLLOW,
    os.O_RDONLY | os.O_DIRECTORY,
]

Both = tuple[Any, Any]


class Twins:
    """A mounted stage, and the plain directory that it must be like."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.plain = world.root / "plain"
        world.log(NAME, BASE)
        self.staged = world.stage(NAME)
        subprocess.run(["cp", "-rT", self.staged, self.plain], check=True)
        self.open: list[tuple[int, int]] = []
        self.done: deque[str] = deque(maxlen=30)
        self.version = 0

    def step(self) -> None:
        """One call on both, or something that happens to the stage."""
        calls = [call for call, weight in _CALLS for _ in range(weight)]
        self.random.choice(calls)(self)

    # Calls on paths

    def path(self) -> str:
        depth = self.random.choice([1, 1, 1, 2, 2, 3])
        return "/".join(self.random.choice(_NAMES) for _ in range(depth))

    def both(self, what: str, call: Callable[[Path], Any]) -> Both | None:
        """What both answer; None if both fail, which they must with the same errno."""
        self.done.append(what)
        return self.same(what, attempt(lambda: call(self.staged)), attempt(lambda: call(self.plain)))

    def same(self, what: str, one: Any, two: Any) -> Both | None:
        failed = [error.errno for error in (one, two) if isinstance(error, OSError)]
        if failed:
            assert len(failed) == 2 and failed[0] == failed[1], f"{what}: stage {one!r}, plain {two!r}"
            return None
        return one, two

    def equal(self, what: str, call: Callable[[Path], Any]) -> None:
        found = self.both(what, call)
        assert found is None or found[0] == found[1], f"{what}: stage {found[0]!r}, plain {found[1]!r}"

    def mkdir(self) -> None:
        path = self.path()
        self.equal(f"mkdir {path}", lambda root: os.mkdir(root / path, 0o755))

    def rmdir(self) -> None:
        path = self.path()
        self.equal(f"rmdir {path}", lambda root: os.rmdir(root / path))

    def unlink(self) -> None:
        path = self.path()
        self.equal(f"unlink {path}", lambda root: os.unlink(root / path))

    def rename(self) -> None:
        old, new = self.path(), self.path()
        self.equal(f"rename {old} {new}", lambda root: os.rename(root / old, root / new))

    def link(self) -> None:
        old, new = self.path(), self.path()
        self.equal(f"link {old} {new}", lambda root: os.link(root / old, root / new, follow_symlinks=False))

    def symlink(self) -> None:
        target, path = self.path(), self.path()
        self.equal(f"symlink {target} {path}", lambda root: os.symlink(target, root / path))

    def chmod(self) -> None:
        path, mode = self.path(), self.random.choice([0o644, 0o755, 0o600, 0o4755, 0o1777, 0o2770])
        self.equal(f"chmod {path} {mode:o}", lambda root: os.chmod(root / path, mode))

    def times(self) -> None:
        path, when = self.path(), self.random.randrange(10**9, 2 * 10**18)
        self.equal(f"utimens {path} {when}", lambda root: os.utime(root / path, ns=(when, when + 5)))

    def truncate(self) -> None:
        path, size = self.path(), self.random.choice(_SIZES)
        self.equal(f"truncate {path} {size}", lambda root: os.truncate(root / path, size))

    def setxattr(self) -> None:
        path, value = self.path(), self.random.randbytes(self.random.choice([0, 5, 300]))
        flag = self.random.choice([0, os.XATTR_CREATE, os.XATTR_REPLACE])
        self.equal(f"setxattr {path} {flag}", lambda root: os.setxattr(root / path, "user.note", value, flag))

    def removexattr(self) -> None:
        path = self.path()
        self.equal(f"removexattr {path}", lambda root: os.removexattr(root / path, "user.note"))

    def getxattr(self) -> None:
        path = self.path()
        self.equal(f"getxattr {path}", lambda root: os.getxattr(root / path, "user.note"))

    def stat(self) -> None:
        path = self.path()
        self.equal(f"stat {path}", lambda root: shape(os.stat(root / path)))

    def listdir(self) -> None:
        path = self.path()
        self.equal(f"list {path}", lambda root: sorted(os.listdir(root / path)))

    # Calls on open files

    def open_file(self) -> None:
        path, flags = self.path(), self.random.choice(_OPEN)
        if len(self.open) > 12:
            self.close()
        found = self.both(f"open {path} {flags:o}", lambda root: os.open(root / path, flags, 0o644))
        if found:
            self.open.append(found)

    def on_open(self, what: str, call: Callable[[int], Any]) -> None:
        if not self.open:
            return
        staged, plain = self.random.choice(self.open)
        if os.fstat(plain).st_nlink == 0 and stat.S_ISDIR(os.fstat(plain).st_mode):
            return  # a removed directory, which libfuse 2 only knows by its name
        self.done.append(f"{what} of {self.open.index((staged, plain))}")
        one, two = attempt(lambda: call(staged)), attempt(lambda: call(plain))
        found = self.same(what, one, two)
        assert found is None or found[0] == found[1], f"{what}: stage {str(found[0])[:100]}, plain {str(found[1])[:100]}"

    def data(self) -> bytes:
        return self.random.choice([b"y" * 20, b"z" * 5000, self.random.randbytes(200_000), b"q" * (BLOCK + 5)])

    def pwrite(self) -> None:
        data, offset = self.data(), self.random.choice(_SIZES)
        self.on_open(f"pwrite {len(data)} at {offset}", lambda fd: os.pwrite(fd, data, offset))

    def write(self) -> None:
        data = self.data()
        self.on_open(f"write {len(data)}", lambda fd: os.write(fd, data))

    def pread(self) -> None:
        size, offset = self.random.choice(_SIZES), self.random.choice(_SIZES)
        self.on_open(f"pread {size} at {offset}", lambda fd: os.pread(fd, size, offset))

    def ftruncate(self) -> None:
        size = self.random.choice(_SIZES)
        self.on_open(f"ftruncate {size}", lambda fd: os.ftruncate(fd, size))

    def fallocate(self) -> None:
        size, offset = self.random.choice(_SIZES), self.random.choice(_SIZES)
        self.on_open(f"fallocate {size} at {offset}", lambda fd: os.posix_fallocate(fd, offset, size))

    def fstat(self) -> None:
        self.on_open("fstat", lambda fd: shape(os.fstat(fd)))

    def fsync(self) -> None:
        self.on_open("fsync", os.fsync)

    def map(self) -> None:
        offset, data = self.random.choice([0, 100, 4090]), self.random.randbytes(50)

        def change(fd: int) -> None:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                with mmap.mmap(fd, 0) as area:
                    if len(area) >= offset + 50:
                        area[offset : offset + 50] = data
                        area.flush()

        self.on_open(f"mmap at {offset}", lambda fd: attempt_quietly(lambda: change(fd)))

    def close(self) -> None:
        if self.open:
            for fd in self.open.pop(self.random.randrange(len(self.open))):
                os.close(fd)

    # What happens to the stage

    def crash(self) -> None:
        """The daemon dies, and everything that was answered is there again."""
        self.done.append("kill -9 and resume")
        while self.open:
            self.close()
        record = self.world.kill(self.staged)
        subprocess.run(["umount", "--lazy", self.staged], check=True)
        assert mountpoint.at(str(self.staged)) is None
        self.world.start(self.world.request("stage", NAME, self.staged, resume=record.staging))

    def commit(self) -> None:
        self.done.append("commit")
        self.equals_version(daemon.commit(self.staged).committed)

    def equals_version(self, name: str) -> None:
        version = self.world.store.version(parse(name))
        assert version.number >= self.version
        self.version = version.number
        assert contents(self.world.store, version) == directory(self.plain)

    def compare(self) -> None:
        """Both trees, whole."""
        assert tree(self.staged) == tree(self.plain)

    def end(self) -> None:
        while self.open:
            self.close()
        self.compare()
        self.equals_version(daemon.unmount(self.staged).committed)


_CALLS: list[tuple[Callable[[Twins], None], int]] = [
    *((call, 3) for call in (Twins.mkdir, Twins.unlink, Twins.rename, Twins.link, Twins.symlink, Twins.stat, Twins.listdir)),
    *((call, 1) for call in (Twins.rmdir, Twins.times, Twins.setxattr, Twins.getxattr, Twins.removexattr, Twins.fsync)),
    *((call, 2) for call in (Twins.chmod, Twins.truncate, Twins.ftruncate, Twins.fallocate, Twins.map, Twins.close)),
    *((call, 6) for call in (Twins.open_file, Twins.pwrite, Twins.pread)),
    *((call, 3) for call in (Twins.write, Twins.fstat)),
]


def attempt(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except OSError as error:
        return error


def attempt_quietly(call: Callable[[], Any]) -> Any:
    """As a mapping fails where there is nothing to map: with a ValueError for an empty file."""
    try:
        return call()
    except ValueError:
        return "nothing to map"


def shape(found: os.stat_result) -> tuple[Any, ...]:
    """What must be the same of two files; a directory's size and links are each file system's own."""
    if stat.S_ISDIR(found.st_mode):
        return (oct(found.st_mode),)
    return oct(found.st_mode), found.st_nlink, found.st_size


def tree(root: Path) -> dict[str, Any]:
    """Everything below ``root``: kinds, modes, links, contents, targets and extended attributes by path."""
    found: dict[str, Any] = {}
    for path in walk(root):
        state: list[Any] = [shape(os.lstat(path))]
        if path.is_symlink():
            state.append(os.readlink(path))
        else:
            noted = {"user.note"} & set(os.listxattr(path))
            state += [os.getxattr(path, name) for name in noted]
            if path.is_file():
                state.append(path.read_bytes())
        found[str(path.relative_to(root))] = state
    return found


def walk(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        yield from (Path(folder, name) for name in folders + files)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.timeout(300 + STEPS)
def test_a_stage_is_like_a_directory(world: World, seed: int) -> None:
    twins = Twins(world, seed)
    happens = (Twins.crash, Twins.commit, Twins.compare)
    events = {step: what for what in happens for step in twins.random.sample(range(STEPS), max(STEPS // 350, 1))}
    try:
        for step in range(STEPS):
            twins.step()
            if step in events:
                events[step](twins)
        twins.end()
    except BaseException:
        print(f"seed {seed}; the last calls:", *twins.done, sep="\n  ")
        raise
    finally:
        for pair in twins.open:
            for fd in pair:
                os.close(fd)
