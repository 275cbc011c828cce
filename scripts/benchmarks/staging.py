"""``scripts/bench staging``: programs that write into a stage beside the same into a directory of the same disk, in one run.

After each the time from unmounting to the committed version, with contents stored ahead of the commit and without. The reference
of that is ``sync`` after the same work in a directory: what it costs to make the bytes durable at all.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

from harness import Bench, Row, main, seconds

MIB = 1 << 20

Work = Callable[[Path], object]
"""Writes into a directory that is there and empty."""

_ENDINGS: dict[str, tuple[tuple[str, ...], float]] = {
    "at once": ((), 0.0),
    "10 s later": ((), 10.0),
    "--no-eager": (("--no-eager",), 0.0),
}
"""Options of ``stage``, and seconds between the end of the work and unmounting: what is stored ahead needs some to settle."""
_numbers = itertools.count()


def sequential(bench: Bench, quick: bool) -> None:
    size = (128 if quick else 1024) * MIB
    blocks = [os.urandom(MIB) for _ in range(64)]

    def write(root: Path) -> None:
        with (root / "big.bin").open("wb", buffering=0) as file:
            for number in range(size // MIB):
                file.write(blocks[number % 64][number:] + blocks[number % 64][:number])

    _measure(bench, f"writing {size // MIB} MiB in sequence", write, size / MIB, "MiB/s", quick)


def small_files(bench: Bench, quick: bool) -> None:
    count = 400 if quick else 2000
    source = random.Random(11)
    contents = [source.randbytes(source.randint(16 << 10, 64 << 10)) for _ in range(count)]

    def write(root: Path) -> None:
        for number, content in enumerate(contents):
            folder = root / f"d{number // 100:02}"
            folder.mkdir(exist_ok=True)
            (folder / f"f{number:04}").write_bytes(content)

    _measure(bench, f"writing {count:,} files of 16 to 64 KiB", write, count, "files/s", quick)


def clone(bench: Bench, quick: bool) -> None:
    """Of a repository whose one commit is Python's standard library."""
    origin = bench.work / "origin"
    library = Path(sysconfig.get_path("stdlib"))
    parts = ["json", "email", "http"] if quick else [path.name for path in library.iterdir() if path.name != "site-packages"]
    for part in parts:
        if (library / part).is_dir():
            shutil.copytree(library / part, origin / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        elif part.endswith(".py"):
            origin.mkdir(exist_ok=True)
            shutil.copy(library / part, origin / part)
    git = ["git", "-c", "user.name=bench", "-c", "user.email=bench@localhost", "-C", str(origin)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], check=True)

    def work(root: Path) -> None:
        subprocess.run(["git", "clone", "-q", "--no-hardlinks", str(origin), str(root / "clone")], check=True)

    _measure(bench, "git clone of the standard library", work, 1, "s", quick)


def install(bench: Bench, quick: bool) -> None:
    """From a wheel that was downloaded before."""
    wheels = bench.work / "wheels"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "download", "--no-deps", "--dest", str(wheels), "click" if quick else "numpy"], check=True)
    wheel = str(next(wheels.iterdir()))

    def work(root: Path) -> None:
        subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(root / "site"), wheel], check=True)

    _measure(bench, "pip install --target", work, 1, "s", quick)


def extract(bench: Bench, quick: bool) -> None:
    archive = bench.work / "tree.tar"
    source = random.Random(5)
    tree = bench.work / "tree"
    for number in range(500 if quick else 5000):
        (tree / f"d{number // 100:02}").mkdir(parents=True, exist_ok=True)
        (tree / f"d{number // 100:02}" / f"f{number}").write_bytes(source.randbytes(source.randint(100, 20_000)))
    with tarfile.open(archive, "w") as file:
        file.add(tree, "tree")

    def work(root: Path) -> None:
        subprocess.run(["tar", "-xf", str(archive), "-C", str(root)], check=True)

    _measure(bench, "tar -x of small files", work, 1, "s", quick)


def _measure(bench: Bench, name: str, work: Work, amount: float, unit: str, quick: bool) -> None:
    """``amount`` done in a stage and in a directory; then what it takes until it is a version, and until it is on the disk."""
    commits: dict[str, list[float]] = {how: [] for how in _ENDINGS}
    syncs: list[float] = []
    mount, plain = bench.work / "mnt", bench.work / "plain"
    mount.mkdir(exist_ok=True)

    def staged(how: str) -> float:
        """Seconds of the work; each time into a collection of its own, so that nothing is there already."""
        option, pause = _ENDINGS[how]
        collection = f"staged-{next(_numbers)}"
        bench.run("stage", collection, str(mount), "--base", "none", "--type", "dataset", *option)
        took = seconds(lambda: work(mount))
        time.sleep(pause)
        commits[how].append(seconds(lambda: bench.run("unmount", str(mount))))
        shutil.rmtree(bench.work / "store", ignore_errors=True)
        return took

    def rated(took: float) -> float:
        return amount / took if unit.endswith("/s") else took

    def ours() -> float:
        return rated(statistics.median(staged(how) for how in _ENDINGS))

    def reference() -> float:
        shutil.rmtree(plain, ignore_errors=True)
        plain.mkdir()
        os.sync()
        took = seconds(lambda: work(plain))
        syncs.append(seconds(os.sync))
        return rated(took)

    bench.pair(name, ours, reference, unit, 1 if quick else 3, os.sync)
    synced = statistics.median(syncs)
    for how, taken in commits.items():
        took = statistics.median(taken)
        bench.add(Row(f"{name}: unmount to version, {how}", took, synced, "s", synced / took, "reference: sync"))


BENCHMARKS: dict[str, Callable[[Bench, bool], None]] = {
    "sequential": sequential,
    "small": small_files,
    "clone": clone,
    "pip": install,
    "tar": extract,
}

if __name__ == "__main__":
    main("scripts/bench staging", __doc__, BENCHMARKS)
