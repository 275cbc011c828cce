"""``scripts/bench local``: the embedded store beside the local file system it lies on, in one run."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blake3 import blake3
from harness import Bench, Row, drop_caches, main, seconds

from artifactfs.model import Dir, File
from artifactfs.names import parse
from artifactfs.publish import Change, Draft, NewFile, publish
from artifactfs.store.urls import open_store

MIB = 1 << 20


def sequential(bench: Bench, quick: bool) -> None:
    """One big file, read from end to end: first with cold caches, then again."""
    size = (128 if quick else 1024) * MIB
    plain = _big_file(bench, size)
    runs = 1 if quick else 3

    def first(path: Path) -> float:
        return size / MIB / seconds(lambda: _read_through(path))

    with bench.mounted("big:latest") as mount:
        ours = mount / "big.bin"
        bench.pair("sequential read, first", lambda: first(ours), lambda: first(plain), "MiB/s", runs, drop_caches)
        _read_through(ours)
        _read_through(plain)
        bench.pair("sequential read, second", lambda: first(ours), lambda: first(plain), "MiB/s", runs)


def random_reads(bench: Bench, quick: bool) -> None:
    """4 KiB reads at random places of the big file, its blocks already in the kernel or not."""
    size = (128 if quick else 1024) * MIB
    plain = _big_file(bench, size)
    count = 2000 if quick else 10000
    runs = 1 if quick else 3
    source = random.Random(7)
    places = [source.randrange(size // 4096) * 4096 for _ in range(count)]

    def rate(path: Path, threads: int) -> float:
        def read(part: list[int]) -> None:
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            for place in part:
                os.pread(fd, 4096, place)
            os.close(fd)

        parts = [places[at::threads] for at in range(threads)]
        with ThreadPoolExecutor(threads) as pool:
            return count / seconds(lambda: list(pool.map(read, parts)))

    with bench.mounted("big:latest") as mount:
        ours = mount / "big.bin"
        bench.pair(
            "4 KiB random reads, cold, 1 reader", lambda: rate(ours, 1), lambda: rate(plain, 1), "reads/s", runs, drop_caches
        )
        bench.pair(
            "4 KiB random reads, cold, 4 readers", lambda: rate(ours, 4), lambda: rate(plain, 4), "reads/s", runs, drop_caches
        )
        rate(ours, 4), rate(plain, 4)
        bench.pair("4 KiB random reads, again, 4 readers", lambda: rate(ours, 4), lambda: rate(plain, 4), "reads/s", runs)


def small_files(bench: Bench, quick: bool) -> None:
    """2,000 files of 16 to 64 KiB, read whole by 8 threads in random order."""
    count = 400 if quick else 2000
    plain = bench.work / "small"
    _make_files(plain, count, 16 << 10, 64 << 10)
    bench.run("log", "small", str(plain), "--type", "dataset")
    names = [str(path.relative_to(plain)) for path in plain.rglob("*") if path.is_file()]
    random.Random(3).shuffle(names)
    runs = 1 if quick else 3

    def rate(root: Path) -> float:
        with ThreadPoolExecutor(8) as pool:
            return count / seconds(lambda: list(pool.map(lambda name: (root / name).read_bytes(), names)))

    with bench.mounted("small:latest") as mount:
        bench.pair("2,000 small files, cold, 8 threads", lambda: rate(mount), lambda: rate(plain), "files/s", runs, drop_caches)
        rate(mount), rate(plain)
        bench.pair("2,000 small files, again, 8 threads", lambda: rate(mount), lambda: rate(plain), "files/s", runs)


def listing(bench: Bench, quick: bool) -> None:
    """``find -printf '%s\\n'`` over 100,000 files in 100 directories."""
    count = 5000 if quick else 100_000
    plain = bench.work / "many"
    for folder in range(100):
        (plain / f"d{folder:02}").mkdir(parents=True)
        for file in range(count // 100):
            (plain / f"d{folder:02}" / f"f{file:04}").write_bytes(b"%d" % file)
    bench.run("log", "many", str(plain), "--type", "dataset")

    def rate(root: Path) -> float:
        command = ["find", str(root), "-type", "f", "-printf", "%s\n"]
        return count / seconds(lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True))

    runs = 1 if quick else 3
    with bench.mounted("many:latest") as mount:
        bench.pair("find over 100,000 files, cold", lambda: rate(mount), lambda: rate(plain), "files/s", runs, drop_caches)
        rate(mount), rate(plain)
        bench.pair("find over 100,000 files, again", lambda: rate(mount), lambda: rate(plain), "files/s", runs)


def log(bench: Bench, quick: bool) -> None:
    """``artifactfs log`` of 20,000 files, against ``cp -r`` of them plus hashing each with the same library."""
    count = 2000 if quick else 20_000
    plain = bench.work / "tolog"
    _make_files(plain, count, 1 << 10, 64 << 10)

    def copy_and_hash() -> None:
        target = bench.work / "copied"
        shutil.rmtree(target, ignore_errors=True)
        subprocess.run(["cp", "-r", str(plain), str(target)], check=True)
        for path in target.rglob("*"):
            if path.is_file():
                blake3(path.read_bytes()).digest()
        os.sync()

    turn = iter(range(100))

    def ours() -> float:
        return seconds(lambda: (bench.run("log", f"logged{next(turn)}", str(plain), "--type", "dataset"), os.sync()))

    bench.pair("log of 20,000 files (cp -r + BLAKE3)", ours, lambda: seconds(copy_and_hash), "s", 1 if quick else 3)
    again = seconds(lambda: bench.run("log", "logged0", str(plain), "--type", "dataset"))
    bench.add(Row("log of the same 20,000 files again", again, None, "s", None, "no new version"))


def million(bench: Bench, quick: bool) -> None:
    """A version of 1,000,000 entries: mount it, list one directory, change one file, commit."""
    count = 20_000 if quick else 1_000_000
    _make_wide(bench, "wide", count)
    mount = bench.work / "mnt"
    mount.mkdir(exist_ok=True)
    took = seconds(lambda: bench.run("mount", "wide:latest", str(mount)))
    bench.add(Row("mount of 1,000,000 entries, ready", took, None, "s", None))
    record = next(item for item in json.loads(bench.run("--json", "mounts")) if item["mountpoint"] == str(mount))
    listed = seconds(lambda: os.listdir(mount / "d0007"))
    bench.add(Row("listing one directory of it", listed, None, "s", None))
    bench.add(Row("RSS after that", _rss(record["pid"]), None, "MiB", None))
    took = seconds(lambda: subprocess.run(["find", str(mount), "-printf", "%s\n"], stdout=subprocess.DEVNULL, check=True))
    bench.add(Row("find -printf over all of it", count / took, None, "entries/s", None))
    bench.add(Row("RSS after that", _rss(record["pid"]), None, "MiB", None))
    bench.run("unmount", str(mount))
    for attempt in range(1 if quick else 3):
        took = seconds(lambda: bench.run("stage", "wide", str(mount)))
        bench.add(Row("stage of 1,000,000 entries, ready", took, None, "s", None))
        (mount / "d0003" / "f0005").write_text(f"changed {attempt} {time.time()}")
        took = seconds(lambda: bench.run("unmount", str(mount)))
        bench.add(Row("commit of 1 changed file in 1,000,000", took, None, "s", None, "goal: at most 2 s"))


def _big_file(bench: Bench, size: int) -> Path:
    """The big file, logged as ``big`` once."""
    plain = bench.work / "big" / "big.bin"
    if not plain.exists():
        plain.parent.mkdir()
        with plain.open("wb") as file:
            for _ in range(size // MIB):
                file.write(os.urandom(MIB))
        bench.run("log", "big", str(plain.parent), "--type", "dataset")
    return plain


def _make_files(root: Path, count: int, least: int, most: int) -> None:
    source = random.Random(count)
    for number in range(count):
        folder = root / f"d{number // 200:03}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"f{number:05}.bin").write_bytes(source.randbytes(source.randint(least, most)))


class _Wide:
    """Directories of 1,000 entries each, all the same stored content: what is measured is the tree."""

    base: Dir | None = None

    def __init__(self, entry: File, directories: int) -> None:
        self._entry = entry
        self._directories = directories

    def changes(self) -> Iterator[tuple[str, Change]]:
        for number in range(self._directories):
            yield f"d{number:04}", _Flat(self._entry)


class _Flat:
    base: Dir | None = None

    def __init__(self, entry: File) -> None:
        self._entry = entry

    def changes(self) -> Iterator[tuple[str, Change]]:
        for number in range(1000):
            yield f"f{number:04}", self._entry


class _One:
    base: Dir | None = None

    def __init__(self, path: Path) -> None:
        self._path = path

    def changes(self) -> Iterator[tuple[str, Change]]:
        yield "one", NewFile(str(self._path), False)


def _make_wide(bench: Bench, name: str, count: int) -> None:
    store = open_store(bench.env["ARTIFACTFS_STORE"])
    seed = bench.work / "seed"
    seed.write_bytes(b"the content of every file\n")
    target = parse(name, "bench", "local")
    first = publish(store, Draft(name=target, type="dataset", folder=_One(seed), commit=uuid.uuid4().hex)).version
    entry = store.tree.lookup(first.root, "one")
    assert isinstance(entry, File)
    publish(store, Draft(name=target, type="dataset", folder=_Wide(entry, count // 1000), commit=uuid.uuid4().hex))


def _read_through(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(MIB)
        while file.readinto(buffer):
            pass


def _rss(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


BENCHMARKS: dict[str, Callable[[Bench, bool], None]] = {
    "sequential": sequential,
    "random": random_reads,
    "small": small_files,
    "find": listing,
    "log": log,
    "million": million,
}

if __name__ == "__main__":
    main("scripts/bench local", __doc__, BENCHMARKS)
