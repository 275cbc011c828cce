"""What every benchmark needs: a place of its own, the command line, paired runs, and a table of ratios."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path


@dataclasses.dataclass
class Row:
    """One line of the result: medians of both sides in ``unit``, and the median of the ratios pair by pair."""

    work: str
    ours: float
    reference: float | None
    unit: str
    ratio: float | None
    note: str = ""


class Bench:
    """A run of benchmarks in a directory of its own, with its own store, cache, state and staging."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.rows: list[Row] = []
        self.at_end: list[Callable[[], None]] = []
        home = work / "home"
        home.mkdir(parents=True)
        self.env = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("ARTIFACTFS_", "XDG_"))},
            "HOME": str(home),
            "ARTIFACTFS_STORE": str(work / "store"),
            "ARTIFACTFS_ENTITY": "bench",
            "ARTIFACTFS_PROJECT": "local",
        }
        self.program = str(Path(sys.executable).parent / "artifactfs")

    def run(self, *args: str) -> str:
        """The output of an artifactfs command."""
        return subprocess.run(
            [self.program, "-q", *args], env=self.env, check=True, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
        ).stdout

    @contextlib.contextmanager
    def mounted(self, name: str, *options: str) -> Iterator[Path]:
        """``name`` mounted."""
        target = self.work / "mnt"
        target.mkdir(exist_ok=True)
        self.run("mount", name, str(target), *options)
        try:
            yield target
        finally:
            self.run("unmount", str(target))

    def pair(
        self,
        work: str,
        ours: Callable[[], float],
        reference: Callable[[], float],
        unit: str,
        runs: int,
        before: Callable[[], None] = lambda: None,
        note: str = "",
    ) -> None:
        """Measure both in turn, A B A B …; more is better where the unit is a rate, so ratios are given as speed."""
        pairs = []
        for _ in range(runs):
            before()
            a = ours()
            before()
            pairs.append((a, reference()))
        rate = unit.endswith("/s")
        ratios = [a / b if rate else b / a for a, b in pairs]
        self.add(
            Row(
                work,
                statistics.median(a for a, _ in pairs),
                statistics.median(b for _, b in pairs),
                unit,
                statistics.median(ratios),
                note,
            )
        )

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(_line(row), file=sys.stderr, flush=True)

    def table(self) -> str:
        """The rows as a Markdown table."""
        head = "| work | artifactfs | reference | speed ratio | |\n|---|---|---|---|---|\n"
        return head + "\n".join(_line(row) for row in self.rows) + "\n"


def _line(row: Row) -> str:
    reference = f"{_number(row.reference)} {row.unit}" if row.reference is not None else ""
    ratio = f"{row.ratio:.2f}" if row.ratio is not None else ""
    return f"| {row.work} | {_number(row.ours)} {row.unit} | {reference} | {ratio} | {row.note} |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def drop_caches() -> None:
    """Empty the kernel's page, entry and inode caches (root only)."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def seconds(action: Callable[[], object]) -> float:
    """How long ``action`` takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


@contextlib.contextmanager
def workplace(parent: str | None) -> Iterator[Path]:
    """A directory that is gone afterwards, whatever was mounted in it."""
    path = Path(tempfile.mkdtemp(prefix="artifactfs-bench-", dir=parent))
    try:
        yield path
    finally:
        # Also of a daemon that died, where ismount would not know; without a mount it fails, and that is fine.
        subprocess.run(["fusermount", "-u", "-z", str(path / "mnt")], check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(path, ignore_errors=True)


def main(program: str, description: str | None, benchmarks: dict[str, Callable[[Bench, bool], None]]) -> None:
    """Run the benchmarks that the command line asks for, and print their table."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--quick", action="store_true", help="smaller data and one run of each: to see that it works")
    parser.add_argument("--only", action="append", choices=sorted(benchmarks), help="only these")
    parser.add_argument("--work", help="directory for the data; the file system it is on is the reference")
    options = parser.parse_args()
    with workplace(options.work) as work:
        bench = Bench(work)
        try:
            for name, benchmark in benchmarks.items():
                if not options.only or name in options.only:
                    benchmark(bench, options.quick)
        finally:
            for end in bench.at_end:
                end()
        print(bench.table())
