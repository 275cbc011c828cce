"""``scripts/bench wandb``: the ``wandb`` command beside ``artifactfs``, both against one ``artifactfs serve`` in one run.

2,000 small files and 1 GiB are logged (``wandb artifact put``, ``artifactfs log``), and a version of them that the ``wandb``
client logged is read: 1 % of the small files, then all files, 8 at once (``wandb artifact get``, then its files; ``artifactfs
mount``). Every run begins with empty caches. What passes between client and server is counted by ``link.py``, which also makes
the second half of the rows: the same 20 ms and 90 MB/s a connection away. The server shares the machine with both.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from harness import Bench, Row, main, seconds
from link import Link

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from serving_fixture import WandbServer, client_environment, start_server

MIB = 1 << 20
_NEAR = (0.0, 2e9)
_FAR = (0.02, 90e6)
_READERS = 8
_NAME = "bench/local/files:latest"
_numbers = itertools.count()


class Run(NamedTuple):
    """One measurement: bytes between client and server both ways, their requests, and bytes on the client's disk at its end."""

    seconds: float
    moved: int
    requests: int
    disk: int

    def __str__(self) -> str:
        return f"{self.moved / MIB:,.0f} MiB moved in {self.requests:,} requests, {self.disk / MIB:,.0f} MiB on disk"


class Client:
    """Both programs on one server behind a link, each time with an empty home."""

    def __init__(self, bench: Bench, server: WandbServer, link: Link) -> None:
        self.bench, self.server, self.link = bench, server, link

    @contextlib.contextmanager
    def home(self) -> Iterator[Path]:
        """An empty home of one run; with it go the caches."""
        home = self.bench.work / f"home-{next(_numbers)}"
        home.mkdir()
        self.bench.env = client_environment(home, self.link.url, self.server.key) | {
            "ARTIFACTFS_STORE": f"wandb://{self.link.url.partition('://')[2]}",
            "ARTIFACTFS_ENTITY": "bench",
            "ARTIFACTFS_PROJECT": "local",
            "WANDB_ENTITY": "bench",
        }
        os.sync()
        try:
            yield home
        finally:
            shutil.rmtree(home)

    def measured(self, home: Path, work: Callable[[], object]) -> Run:
        before = self.link.moved()
        took = seconds(work)
        after = self.link.moved()
        return Run(took, after.down + after.up - before.down - before.up, after.requests - before.requests, _used(home))

    def wandb(self, *arguments: str) -> None:
        program = str(Path(sys.executable).with_name("wandb"))
        subprocess.run([program, *arguments], env=self.bench.env, cwd=self.bench.env["HOME"], check=True, capture_output=True)

    def get(self, paths: list[str]) -> Run:
        """``wandb artifact get``, and ``paths`` read from what it wrote."""
        with self.home() as home:
            target = home / "downloaded"

            def work() -> None:
                self.wandb("artifact", "get", _NAME, "--root", str(target))
                _read(target, paths)

            return self.measured(home, work)

    def mount(self, paths: list[str]) -> Run:
        """``artifactfs mount``, and ``paths`` read in it; unmounting is not timed, as removing a download is not."""
        with self.home() as home:
            target = home / "mnt"
            target.mkdir()

            def work() -> None:
                self.bench.run("mount", _NAME, str(target))
                _read(target, paths)

            try:
                return self.measured(home, work)
            finally:
                self.bench.run("unmount", str(target))

    def put(self, source: Path) -> Run:
        with self.home() as home:
            put = ("artifact", "put", "--name", "local/files", "--type", "dataset", str(source))
            return self.measured(home, functools.partial(self.wandb, *put))

    def log(self, source: Path) -> Run:
        with self.home() as home:
            return self.measured(home, functools.partial(self.bench.run, "log", "files", str(source), "--type", "dataset"))


def _used(home: Path) -> int:
    """Bytes that the files below take on the disk; those of mounts in it are not counted."""
    return int(subprocess.run(["du", "-sx", "-B1", str(home)], capture_output=True, text=True).stdout.split()[0])


def _read(root: Path, paths: list[str]) -> None:
    def read(path: str) -> int:
        size = 0
        with (root / path).open("rb", buffering=0) as file:
            while data := file.read(MIB):
                size += len(data)
        return size

    with ThreadPoolExecutor(_READERS) as pool:
        assert all(pool.map(read, paths))


@contextlib.contextmanager
def _client(bench: Bench, how: tuple[float, float]) -> Iterator[Client]:
    """A server over an empty store, behind a link."""
    place = bench.work / f"server-{next(_numbers)}"
    place.mkdir()
    with start_server(str(place / "store"), place / "data") as server:
        link = Link(server.url, *how)
        try:
            yield Client(bench, server, link)
        finally:
            link.close()
    shutil.rmtree(place)


def _source(bench: Bench, quick: bool) -> Path:
    """The files that are logged, made once: of 16 to 64 KiB, and a large one."""
    root = bench.work / "source"
    if not root.exists():
        source = random.Random(11)
        for number in range(300 if quick else 2000):
            path = root / "small" / f"d{number // 100:02}" / f"f{number:04}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source.randbytes(source.randint(16 << 10, 64 << 10)))
        with (root / "big.bin").open("wb") as file:
            for _ in range(128 if quick else 1024):
                file.write(os.urandom(MIB))
    return root


def _compared(bench: Bench, work: str, pairs: list[tuple[Run, Run]]) -> None:
    """Medians of the times and of their ratios, pair by pair; bytes and requests of the first pair."""
    ratios = sorted(theirs.seconds / ours.seconds for ours, theirs in pairs)
    middle = len(pairs) // 2
    ours, theirs = (sorted(run.seconds for run in side)[middle] for side in zip(*pairs, strict=True))
    bench.add(Row(work, ours, theirs, "s", ratios[middle], f"{pairs[0][0]}; wandb: {pairs[0][1]}"))


def reading(bench: Bench, quick: bool, how: tuple[float, float], where: str) -> None:
    source = _source(bench, quick)
    small = sorted(str(path.relative_to(source)) for path in (source / "small").rglob("f*"))
    random.Random(5).shuffle(small)
    few = small[: len(small) // 100]
    with _client(bench, how) as client:
        client.put(source)
        for what, paths in {"1 % of the files": few, "all files": ["big.bin", *small]}.items():
            runs = [(client.mount(paths), client.get(paths)) for _ in range(1 if quick else 3)]
            _compared(bench, f"{where}: reading {what}", runs)


def writing(bench: Bench, quick: bool, how: tuple[float, float], where: str) -> None:
    source = _source(bench, quick)

    def fresh(run: Callable[[Client, Path], Run]) -> Run:
        with _client(bench, how) as client:
            return run(client, source)

    runs = [(fresh(Client.log), fresh(Client.put)) for _ in range(1 if quick else 3)]
    _compared(bench, f"{where}: logging {sum(len(files) for _, _, files in os.walk(source)):,} files", runs)


BENCHMARKS = {
    f"{name}-{distance}": functools.partial(work, how=how, where=where)
    for distance, how, where in (("near", _NEAR, "loopback"), ("far", _FAR, "20 ms away"))
    for name, work in (("log", writing), ("read", reading))
}

if __name__ == "__main__":
    main("scripts/bench wandb", __doc__, BENCHMARKS)
