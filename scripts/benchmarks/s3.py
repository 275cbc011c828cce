"""``scripts/bench s3``: a bucket behind a link of 20 ms round trip and 90 MB/s a connection, read and written by artifactfs, by
``rclone mount --vfs-cache-mode full``, by ``juicefs mount``, and by plain parallel requests of the client library that we use.

The server is SeaweedFS, the link ``scripts/benchmarks/link.py``; both count as little processor as can be had, but they share the
machine with what is measured.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore
from harness import Bench, Row, drop_caches, main, seconds
from link import Link
from obstore.store import S3Store

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from servers import S3Server, seaweed_server

MIB = 1 << 20
ROUND_TRIP = 0.02
RATE = 90e6
_STREAMS = 8
_PART = 8 * MIB
_RANDOM_READS = 64
_READ = 64 << 10
_numbers = itertools.count()


class Place:
    """A bucket with the same files three times: as a version, as plain objects, and as juicefs keeps them."""

    def __init__(self, bench: Bench, server: S3Server, link: Link, quick: bool) -> None:
        self.bench, self.server, self.link, self.quick = bench, server, link, quick
        self.size = (128 if quick else 1024) * MIB
        self.count = 300 if quick else 2000
        self.source = bench.work / "source"
        for name in ("store", "plain", "juice"):
            server.client().create_bucket(Bucket=name)
        bench.env.update(server.environment(link.url))
        self.make_files(11)
        self.names = sorted(str(path.relative_to(self.source)) for path in (self.source / "small").rglob("f*"))
        random.Random(5).shuffle(self.names)

    def make_files(self, seed: int) -> None:
        """Always of the same names and sizes; of other bytes for another ``seed``."""
        sizes, source = random.Random(11), random.Random(seed)
        for number in range(self.count):
            path = self.source / "small" / f"d{number // 100:02}" / f"f{number:04}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source.randbytes(sizes.randint(16 << 10, 64 << 10)))
        with (self.source / "big.bin").open("wb") as file:
            for _ in range(self.size // MIB):
                file.write(os.urandom(MIB))

    def store(self, bucket: str) -> S3Store:
        """The client library on a bucket, over the link."""
        keys = self.server.environment(self.link.url)
        return S3Store(
            bucket,
            endpoint=self.link.url,
            access_key_id=keys["AWS_ACCESS_KEY_ID"],
            secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
            region=keys["AWS_REGION"],
            client_options={"allow_http": True},
        )

    def put_plain(self) -> None:
        """Every file as an object: small ones eight at once, the large one in parts."""
        store = self.store("plain")
        with ThreadPoolExecutor(_STREAMS) as pool:
            for name in self.names:
                pool.submit(obstore.put, store, name, (self.source / name).read_bytes(), use_multipart=False)
            with (self.source / "big.bin").open("rb") as file:
                obstore.put(store, "big.bin", file, chunk_size=_PART, max_concurrency=_STREAMS)

    def get_plain(self) -> None:
        """The large object in ranges, eight at once: the ceiling."""
        store = self.store("plain")
        with ThreadPoolExecutor(_STREAMS) as pool:
            parts = pool.map(
                lambda at: len(obstore.get_range(store, "big.bin", start=at, length=min(_PART, self.size - at))),
                range(0, self.size, _PART),
            )
            assert sum(parts) == self.size

    # Mounts, each with an empty cache of its own that it keeps while it is mounted again

    @contextlib.contextmanager
    def ours(self, cache: Path, name: str = "files:v0") -> Iterator[Path]:
        self.bench.env["ARTIFACTFS_CACHE_DIR"] = str(cache)
        with self.bench.mounted(name) as path:
            yield path

    @contextlib.contextmanager
    def rclone(self, cache: Path) -> Iterator[Path]:
        remote = f":s3,provider=SeaweedFS,env_auth=true,endpoint='{self.link.url}',region=us-east-1,force_path_style=true:plain"
        options = ["--vfs-cache-mode", "full", "--cache-dir", str(cache), "--read-only", "--config", "", "--allow-non-empty"]
        with self._mounted([_program("rclone"), "mount", remote], options) as path:
            yield path

    @contextlib.contextmanager
    def juicefs(self, cache: Path) -> Iterator[Path]:
        options = ["--cache-dir", str(cache), "--no-usage-report", "--read-only", "--backup-meta", "0"]
        with self._mounted([_program("juicefs"), "mount", self._meta()], options) as path:
            yield path

    @contextlib.contextmanager
    def _mounted(self, command: list[str], options: list[str]) -> Iterator[Path]:
        path = self.bench.work / "mnt"
        path.mkdir(exist_ok=True)
        with (self.bench.work / "peer.log").open("ab") as log:
            process = subprocess.Popen([*command, str(path), *options], env=self.bench.env, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 30
            while not os.path.ismount(path):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{command[0]} does not mount: {(self.bench.work / 'peer.log').read_text()[-2000:]}")
                time.sleep(0.05)
            yield path
        finally:
            subprocess.run(["umount", str(path)], check=False)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()

    def _meta(self) -> str:
        return f"sqlite3://{self.bench.work}/juicefs.db"

    def fill_juicefs(self) -> None:
        """Copy the files in, past the link; then have it read through the link."""
        keys = self.server.environment()
        secrets = ["--access-key", keys["AWS_ACCESS_KEY_ID"], "--secret-key", keys["AWS_SECRET_ACCESS_KEY"]]
        juicefs = [_program("juicefs")]
        quiet: dict[str, Any] = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": self.bench.env}
        format = [*juicefs, "format", "--storage", "s3", "--bucket", f"{self.server.url}/juice", *secrets, self._meta(), "peer"]
        subprocess.run(format, **quiet)
        with self._mounted([*juicefs, "mount", self._meta()], ["--cache-dir", str(self.cache()), "--no-usage-report"]) as path:
            subprocess.run(["cp", "-rT", self.source, path], check=True)
        subprocess.run([*juicefs, "config", self._meta(), "--bucket", f"{self.link.url}/juice", "--yes"], **quiet)

    def cache(self) -> Path:
        path = self.bench.work / f"cache-{next(_numbers)}"
        path.mkdir()
        return path

    # What a program does with a mount

    def read_small(self, root: Path) -> None:
        with ThreadPoolExecutor(_STREAMS) as pool:
            sizes = list(pool.map(lambda name: len((root / name).read_bytes()), self.names))
        assert len(sizes) == self.count

    def read_big(self, root: Path) -> None:
        size = 0
        with (root / "big.bin").open("rb", buffering=0) as file:
            while data := file.read(MIB):
                size += len(data)
        assert size == self.size

    def read_randomly(self, root: Path) -> list[float]:
        """Seconds of each read."""
        source = random.Random(3)
        places = [source.randrange(self.size - _READ) for _ in range(_RANDOM_READS)]
        fd = os.open(root / "big.bin", os.O_RDONLY)
        try:
            return [seconds(functools.partial(os.pread, fd, _READ, at)) for at in places]
        finally:
            os.close(fd)


Mount = Callable[[Path], contextlib.AbstractContextManager[Path]]


def small(bench: Bench, quick: bool) -> None:
    with _place(bench, quick) as place:
        _read(place, f"{place.count} files of 16 to 64 KiB, 8 threads", place.read_small, place.count, "files/s", (10, 2))


def sequential(bench: Bench, quick: bool) -> None:
    with _place(bench, quick) as place:
        mib = place.size / MIB
        _read(place, f"sequential {mib:.0f} MiB", place.read_big, mib, "MiB/s", (2, 2))
        pairs = []
        for _ in range(1 if quick else 3):
            ours, _ = _measured(place, place.ours, place.read_big)
            pairs.append((mib / ours, mib / seconds(place.get_plain)))
        _add(place, f"sequential {mib:.0f} MiB, cold, beside plain parallel range GETs", pairs, "MiB/s", "goal: 0.85")


def random_reads(bench: Bench, quick: bool) -> None:
    with _place(bench, quick) as place:
        for peer, mount in (("artifactfs", place.ours), ("rclone", place.rclone), ("juicefs", place.juicefs)):
            if peer == "juicefs":
                place.fill_juicefs()
            with mount(place.cache()) as root:
                before = place.link.moved()
                times = place.read_randomly(root)
                after = place.link.moved()
            fetched = (after.down - before.down) / MIB
            median = statistics.median(times)
            note = f"{fetched:.0f} MiB fetched ({fetched / _RANDOM_READS:.2f} each), {after.requests - before.requests} requests"
            bench.add(Row(f"{_RANDOM_READS} random reads of 64 KiB, cold: {peer}", median * 1000, None, "ms", None, note))


def commit(bench: Bench, quick: bool) -> None:
    with _place(bench, quick, full=False) as place:
        pairs = []
        for number in range(1 if quick else 3):
            place.make_files(100 + number)  # or large contents would be there already
            plain = seconds(place.put_plain)
            log = functools.partial(bench.run, "log", f"commit-{number}", str(place.source), "--type", "dataset")
            ours = seconds(log)
            pairs.append((ours, plain))
        work = f"commit of {place.count} small files and {place.size // MIB} MiB"
        _add(place, f"{work}, beside plain parallel PUTs", pairs, "s", "goal: at least 0.83")


def training(bench: Bench, quick: bool) -> None:
    """A DataLoader with four workers over 20,000 files, and parts of large files in three formats."""
    files, size = (1000, 128 * MIB) if quick else (20_000, 1024 * MIB)
    with _place(bench, quick, full=False) as place:
        source = bench.work / "training"
        _train(place, "make", source, str(files), str(size))
        past_the_link = {**bench.env, "ARTIFACTFS_STORE": bench.env["ARTIFACTFS_STORE"].replace(place.link.url, place.server.url)}
        log = [bench.program, "-q", "log", "training", str(source), "--type", "dataset"]
        subprocess.run(log, env={**past_the_link, **place.server.environment()}, check=True, stdout=subprocess.DEVNULL)
        drop_caches()
        local = _train(place, "loader", source)
        with place.ours(place.cache(), "training:v0") as root:
            drop_caches()
            ours = _train(place, "loader", root)
        for number, name in enumerate(("epoch 1", "epoch 2")):
            _add(place, f"DataLoader over {files} files, {name}, beside a local disk", [(ours[number], local[number])], "s", "")
        for name in ("safetensors", "parquet", "hdf5", "mapped"):
            with place.ours(place.cache(), "training:v0") as root:
                before = place.link.moved().down
                start = time.perf_counter()
                needed = _train(place, name, root)
                took = time.perf_counter() - start
                fetched = (place.link.moved().down - before) / MIB
            note = f"{needed / MIB:.0f} MiB needed, {fetched:.0f} fetched of {size // MIB}"
            bench.add(Row(f"{name}, a part of {size // MIB} MiB, cold", took, None, "s", None, note))


def _train(place: Place, work: str, root: Path, *arguments: str) -> Any:
    command = [sys.executable, str(Path(__file__).with_name("training.py")), work, str(root), *arguments]
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}  # torch finds more workers than processors
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=quiet).stdout
    return json.loads(answer) if answer else None


def _read(place: Place, work: str, action: Callable[[Path], None], amount: float, unit: str, goals: tuple[int, int]) -> None:
    """Cold and warm (the kernel's caches dropped), beside rclone."""
    cold: list[tuple[float, float]] = []
    warm: list[tuple[float, float]] = []
    notes = []
    for _ in range(1 if place.quick else 3):
        ours = _cold_and_warm(place, place.ours, action)
        theirs = _cold_and_warm(place, place.rclone, action)
        cold.append((amount / ours[0], amount / theirs[0]))
        warm.append((amount / ours[1], amount / theirs[1]))
        notes.append((ours[2], theirs[2]))
    fetched = f"fetched {notes[0][0] / MIB:.0f} MiB, rclone {notes[0][1] / MIB:.0f}"
    _add(place, f"{work}, cold, beside rclone", cold, unit, f"goal: {goals[0]}; {fetched}")
    _add(place, f"{work}, warm, beside rclone", warm, unit, f"goal: {goals[1]}")


def _cold_and_warm(place: Place, mount: Mount, action: Callable[[Path], None]) -> tuple[float, float, int]:
    cache = place.cache()
    cold, fetched = _measured(place, mount, action, cache)
    warm, _ = _measured(place, mount, action, cache)
    shutil.rmtree(cache, ignore_errors=True)
    return cold, warm, fetched


def _measured(place: Place, mount: Mount, action: Callable[[Path], None], cache: Path | None = None) -> tuple[float, int]:
    """Seconds that ``action`` takes on a mount, and bytes fetched meanwhile."""
    drop_caches()
    with mount(cache or place.cache()) as root:
        before = place.link.moved().down
        return seconds(lambda: action(root)), place.link.moved().down - before


def _add(place: Place, work: str, pairs: list[tuple[float, float]], unit: str, note: str) -> None:
    rate = unit.endswith("/s")
    ratio = statistics.median(a / b if rate else b / a for a, b in pairs)
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    place.bench.add(Row(work, ours, theirs, unit, ratio, note))


_made: dict[int, tuple[Place, contextlib.ExitStack]] = {}


@contextlib.contextmanager
def _place(bench: Bench, quick: bool, full: bool = True) -> Iterator[Place]:
    """The bucket and the link, made once a run; ``full``: with the version and the objects in it."""
    if id(bench) not in _made:
        stack = contextlib.ExitStack()
        folder = Path(tempfile.mkdtemp(prefix="weed-", dir=bench.work))
        server = stack.enter_context(seaweed_server(folder))
        link = Link(server.url, ROUND_TRIP, RATE)
        stack.callback(link.close)
        bench.env["ARTIFACTFS_STORE"] = f"s3://store/bench?endpoint_url={link.url}&region=us-east-1"
        _made[id(bench)] = (Place(bench, server, link, quick), stack)
        bench.at_end.append(stack.close)
    place = _made[id(bench)][0]
    if full and not (place.bench.work / "filled").exists():
        bench.run("log", "files", str(place.source), "--type", "dataset")
        place.put_plain()
        (place.bench.work / "filled").touch()
    yield place


def _program(name: str) -> str:
    """A peer's program of this environment."""
    return str(Path(sys.executable).parent / name)


BENCHMARKS = {"small": small, "sequential": sequential, "random": random_reads, "commit": commit, "training": training}

if __name__ == "__main__":
    main("scripts/bench s3", __doc__, BENCHMARKS)
