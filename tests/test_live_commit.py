"""A commit of a stage in use is a cut: every file, and all of them together, as they were at one moment."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commits import read_file
from mounting import World, needs_fuse, world
from shelves import until

from artifactfs import daemon
from artifactfs.model import BLOCK, File
from artifactfs.names import parse

pytestmark = needs_fuse
__all__ = ["world"]

_RECORD = 64 << 10
_PLACES = 6
_BASE_PLACES = 3 * BLOCK // _RECORD

_WRITER = f"""
import os, struct, sys, zlib
os.chdir(sys.argv[1])
def record(turn, size):
    body = struct.pack("<QQ", turn, size) + bytes([turn % 251]) * (size - 20)
    return body + struct.pack("<I", zlib.crc32(body))
def put(name, turn):
    with open(name + ".new", "wb") as file:
        file.write(record(turn, 5000))
        file.write(record(turn, 300))
    os.rename(name + ".new", name)
in_place = os.open("in-place", os.O_RDWR | os.O_CREAT)
in_base = os.open("base", os.O_RDWR)
log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
first, second = (os.open(name, os.O_RDWR | os.O_CREAT) for name in ("first", "second"))
turn = 0
while True:
    turn += 1
    os.pwrite(first, record(turn, 64), 0)
    os.pwrite(in_place, record(turn, {_RECORD}), turn % {_PLACES} * {_RECORD})
    os.pwrite(in_base, record(turn, {_RECORD}), turn % {_BASE_PLACES} * {_RECORD})
    os.write(log, record(turn, 1000))
    put("replaced", turn)
    put(f"many/{{turn % 50}}", turn)
    os.pwrite(second, record(turn, 64), 0)
    if os.path.exists("stop"):
        break
"""


def records(data: bytes, size: int) -> list[int]:
    """The turns of the whole records that ``data`` consists of."""
    assert len(data) % size == 0
    turns = []
    for start in range(0, len(data), size):
        body, check = data[start : start + size - 4], data[start + size - 4 : start + size]
        turn, length = struct.unpack_from("<QQ", body)
        assert (zlib.crc32(body), length) == (struct.unpack("<I", check)[0], size), f"torn at {start}"
        turns.append(turn)
    return turns


def check(files: dict[str, bytes]) -> int:
    """The turn that a version was taken at; fails if no moment had these files."""
    (first,), (second,) = records(files["first"], 64), records(files["second"], 64)
    assert 0 <= first - second <= 1
    whole = range(1, second + 1)  # what was done in these turns is there; of the turn ``first`` perhaps a part
    log = records(files["log"], 1000)
    assert log == list(range(1, len(log) + 1)) and second <= len(log) <= first
    for name, places in (("in-place", _PLACES), ("base", _BASE_PLACES)):
        for place, turn in enumerate(records(files[name], _RECORD)):
            newest = max((turn for turn in (*whole[-places:],) if turn % places == place), default=0)
            assert turn == newest or (turn == first and turn % places == place), name
    replaced = files["replaced"]
    assert records(replaced[:5000], 5000) == records(replaced[5000:], 300) in ([first], [second])
    for place in range(50):
        newest = max((turn for turn in whole[-50:] if turn % 50 == place), default=0)
        if newest:
            data = files[f"many/{place}"]
            assert records(data[:5000], 5000) == records(data[5000:], 300) and records(data[:5000], 5000)[0] in (newest, first)
    return second


@contextmanager
def writing(staged: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program that changes files in ``staged`` all the time; ended in order."""
    process = subprocess.Popen([sys.executable, "-c", _WRITER, str(staged)])
    try:
        until(lambda: (staged / "log").exists() and process.poll() is None)
        wait_for_turns(staged, 2 * _PLACES)  # now every place of the new file was written
        yield process
        (staged / "stop").touch()
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_for_turns(staged: Path, count: int) -> None:
    """Return once the writer has done so many more."""
    log = staged / "log"
    size = log.stat().st_size
    until(lambda: log.stat().st_size >= size + 1000 * count, what="the writer goes on")


def files_of(world: World, number: int) -> dict[str, bytes]:
    version = world.store.version(parse(f"acme/vision/live:v{number}"))
    entries = world.store.tree.walk(version.root)
    return {path: read_file(world.store, entry) for path, entry in entries if isinstance(entry, File)}


@pytest.fixture
def base(world: World) -> World:
    body = struct.pack("<QQ", 0, _RECORD) + bytes(_RECORD - 20)
    empty = body + struct.pack("<I", zlib.crc32(body))
    world.log("acme/vision/live", {"base": empty * _BASE_PLACES, "many": None})
    return world


@pytest.mark.parametrize("eager", [True, False])
def test_every_version_is_of_one_moment(base: World, eager: bool) -> None:
    staged = base.stage("acme/vision/live", eager=eager)
    turns = []
    with writing(staged):
        for number in range(1, 9):
            start = time.monotonic()
            assert daemon.commit(staged).committed == f"acme/vision/live:v{number}"
            assert time.monotonic() - start < 20
            turns.append(check(files_of(base, number)))
            wait_for_turns(staged, 5 + 20 * (number % 2))
    assert turns == sorted(set(turns)), "each is later than the one before"
    result = daemon.unmount(staged)
    assert result.committed == "acme/vision/live:v9"
    final = files_of(base, 9)
    assert check(final) == len(records(final["log"], 1000)) > turns[-1]


_KEEPER = """
import os
records = os.open("records", os.O_WRONLY | os.O_CREAT)
turn = 0
while not os.path.exists("stop"):
    for _ in range(500):
        turn += 1
        os.pwrite(records, turn.to_bytes(8, "little") * 500, turn % 100 * 4000)
"""


def test_no_write_is_torn(base: World) -> None:
    """The kernel hands most of these over in two parts, the first of which ends with a page."""
    staged = base.stage("acme/vision/live")
    process = subprocess.Popen([sys.executable, "-c", _KEEPER], cwd=staged)
    try:
        until(lambda: (staged / "records").exists())
        for number in range(1, 41):
            daemon.commit(staged)
            data = files_of(base, number)["records"]
            for start in range(0, len(data), 4000):
                assert len(set(struct.iter_unpack("<Q", data[start : start + 4000]))) == 1
            time.sleep(0.02)
        (staged / "stop").touch()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    daemon.unmount(staged, discard=True)


def test_a_daemon_killed_in_the_middle_of_it(base: World) -> None:
    """What is resumed goes on from there, and the next version is of one moment, too."""
    staged = base.stage("acme/vision/live")
    with pytest.raises(AssertionError), writing(staged):  # the writer cannot be told to stop: it got ENOTCONN
        daemon.commit(staged)
        record = base.record(staged)
        os.kill(record.pid, signal.SIGKILL)
        until(lambda: not record.process.lives())
        subprocess.run(["umount", "--lazy", str(staged)], check=True)
        raise AssertionError
    base.start(base.request("stage", "acme/vision/live", staged, resume=record.staging))
    daemon.commit(staged)
    newest = base.store.versions(parse("acme/vision/live"))[-1].number  # 1 still, if the writer did not get to write anything
    assert check(files_of(base, newest)) >= check(files_of(base, 1))
    assert daemon.unmount(staged).created is False
