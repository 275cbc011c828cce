"""A stage's directory after power loss: what was fsync'd is there, and a replaced file is the old or the new one, whole.

The disk is an ext4 on a loop device that is shut down without writing anything back.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import struct
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_staging import BIG, ME, Place, get, names, opened, place, put, spec

from artifactfs.reader import Reader
from artifactfs.staging import Stage
from artifactfs.store.urls import open_store

__all__ = ["place"]

pytestmark = pytest.mark.skipif(
    os.getuid() != 0 or not shutil.which("mkfs.ext4") or not os.path.exists("/dev/loop-control"),
    reason="needs root, mkfs.ext4 and loop devices",
)

_SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN
_NO_FLUSH = 2  # EXT4_GOING_FLAGS_NOLOGFLUSH: nothing more reaches the disk, not even what its own journal holds


class Disk:
    """A small disk that can lose power. ``path`` is where it is mounted."""

    def __init__(self, root: Path) -> None:
        self.path = root / "disk"
        self.path.mkdir()
        self._image = root / "image"
        with open(self._image, "wb") as file:
            file.truncate(96 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", self._image], check=True)
        self._mount()

    def lose_power(self) -> None:
        """From now on every write fails. What was not synced is lost."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _NO_FLUSH))
        finally:
            os.close(fd)

    def come_back(self) -> None:
        """Once nobody has a file open on it any more."""
        self.close()
        self._mount()

    def close(self) -> None:
        subprocess.run(["umount", self.path], check=True)

    def _mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", self._image, self.path], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    try:
        made = Disk(tmp_path)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no loop mounts here: {error}")
    yield made
    with contextlib.suppress(subprocess.CalledProcessError):
        made.close()


@pytest.fixture
def another_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines that lose power boot again."""
    monkeypatch.setattr("artifactfs.staging.recovery.boot_id", lambda: uuid.uuid4().hex)


_RECORD = 4096


def record(turn: int) -> bytes:
    return struct.pack("<Q", turn) * (_RECORD // 8)


class Work:
    """What a program does, and what it may rely on: ``promised`` is written once an fsync has returned."""

    def __init__(self, stage: Stage, promised: int) -> None:
        self.stage = stage
        self.promised = promised

    def run(self) -> None:
        with opened(self.stage, "/base") as base:
            turn = 0
            while True:
                turn += 1
                self.turn(turn, base)

    def turn(self, turn: int, base: int) -> None:
        stage = self.stage
        fh = stage.create(f"/file{turn}", 0o644, os.O_RDWR, ME)
        stage.write(fh, record(turn) * (turn % 40), 0)
        put(stage, "/new", record(turn) * 20)
        stage.rename("/new", "/replaced")
        stage.write(base, record(turn), turn % 700 * _RECORD)
        if turn % 3 == 0:
            stage.fsync(fh)
            self.promise("file", turn)
        if turn % 5 == 0:
            stage.fsync(base, datasync=bool(turn % 2))
            self.promise("base", turn)
        if turn % 7 == 0:
            stage.fsyncdir("/")
            self.promise("names", turn)
        stage.release(fh)

    def promise(self, what: str, turn: int) -> None:
        os.write(self.promised, f"{what} {turn}\n".encode())


def work_until_power_fails(disk: Disk, directory: Path, store: str, turns: int) -> dict[str, list[int]]:
    """What a process that worked on the stage in ``directory`` was promised; the power fails while it goes on."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            opened_store = open_store(store)
            Work(Stage.resume(directory, opened_store, Reader(opened_store, None)), writing).run()
        os._exit(0)
    os.close(writing)
    promised: dict[str, list[int]] = {"file": [], "base": [], "names": []}
    with open(reading) as lines:
        try:
            for line in lines:
                what, turn = line.split()
                promised[what].append(int(turn))
                if what == "file" and int(turn) >= turns:
                    break
            disk.lose_power()
            for line in lines:
                what, turn = line.split()
                promised[what].append(int(turn))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return promised


@pytest.mark.parametrize("turns", [3, 60, 200])
def test_what_was_synced_is_there_after_power_loss(place: Place, disk: Disk, another_boot: None, turns: int) -> None:
    place.based(base=BIG).remove()
    directory = disk.path / "stages/one"
    stage = Stage.begin(directory, spec(place.store.url, 0), place.store, place.reader)
    put(stage, "/replaced", record(0) * 20)
    with opened(stage, "/replaced") as fh:
        stage.fsync(fh)
    stage.close()
    promised = work_until_power_fails(disk, directory, place.store.url, turns)
    disk.come_back()
    stage = Stage.resume(directory, place.store, place.reader)
    try:
        check(stage, promised)
        stage.commit()
        version = place.files(place.latest())
        assert version["replaced"] == get(stage, "/replaced") and version["base"] == get(stage, "/base")
    finally:
        stage.close()


def check(stage: Stage, promised: dict[str, list[int]]) -> None:
    there = set(names(stage))
    for turn in promised["file"]:
        assert get(stage, f"/file{turn}") == record(turn) * (turn % 40), f"file{turn} was synced"
    synced = max((*promised["names"], *promised["file"], *promised["base"]))
    assert {f"file{turn}" for turn in range(1, synced)} <= there, "names before a sync are there, too"
    replaced = get(stage, "/replaced")
    turn = struct.unpack_from("<Q", replaced)[0]
    assert replaced == record(turn) * 20 and turn >= synced - 1, "the old or the new one, whole"
    content = get(stage, "/base")
    assert len(content) == len(BIG)
    newest = max(promised["base"], default=0)
    for at in range(700):
        found = content[at * _RECORD : (at + 1) * _RECORD]
        wanted = max((turn for turn in range(max(newest - 699, 1), newest + 1) if turn % 700 == at), default=0)
        later = struct.unpack_from("<Q", found)[0]
        old = record(wanted) if wanted else BIG[at * _RECORD : (at + 1) * _RECORD]
        assert found == old or (later > newest and later % 700 == at and found == record(later)), f"base at {at}"
    assert content[700 * _RECORD :] == BIG[700 * _RECORD :]


def test_power_loss_after_a_commit_of_a_stage_in_use(place: Place, disk: Disk, another_boot: None) -> None:
    """Nothing was synced; but what the version has is not shown as anything else, and not committed again."""
    directory = disk.path / "stages/one"
    stage = Stage.begin(directory, spec(place.store.url, None), place.store, place.reader)
    put(stage, "/f", BIG)
    put(stage, "/small", b"small")
    made = stage.commit()
    assert made is not None
    disk.lose_power()
    with contextlib.suppress(OSError):
        stage.close()
    disk.come_back()
    stage = Stage.resume(directory, place.store, place.reader)
    try:
        assert (stage.base, stage.status()) == (made.version, [])
        assert (get(stage, "/f"), get(stage, "/small")) == (BIG, b"small")
        again = stage.commit()
        assert again is not None and not again.created
    finally:
        stage.close()
