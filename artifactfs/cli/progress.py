"""Progress bars: on a terminal's standard error only."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator

from artifactfs.cli import output
from artifactfs.cli.session import Session
from artifactfs.publish import Progress, Report

_INTERVAL = 0.1  # seconds: a report comes for every file, and drawing costs more than a small file does


@contextlib.contextmanager
def progress(session: Session, doing: str) -> Iterator[Report | None]:
    """A report that draws what is done while the block runs; None where nobody would see it."""
    if not session.progress or session.quiet or session.json or not sys.stderr.isatty():
        yield None
        return
    # rich takes 0.15 s to import: only for those who see it.
    from rich.console import Console
    from rich.status import Status

    console = Console(stderr=True, no_color="NO_COLOR" in os.environ or None, highlight=False)
    started = time.monotonic()
    drawn = 0.0

    def draw(done: Progress) -> None:
        nonlocal drawn
        now = time.monotonic()
        if now - drawn >= _INTERVAL:
            drawn = now
            status.update(_line(doing, done, now - started))

    with Status(doing, console=console, spinner="line") as status:
        yield draw


class Counted:
    """A report that keeps what was done last, and passes it on to ``report`` if there is one."""

    def __init__(self, report: Report | None) -> None:
        self.last = Progress()
        self._report = report

    def __call__(self, done: Progress) -> None:
        self.last = done
        if self._report is not None:
            self._report(done)


def _line(doing: str, done: Progress, seconds: float) -> str:
    rate = output.size(int(done.bytes / seconds)) if seconds > 0 else "?"
    return f"{doing}: {output.count(done.files, 'file')}, {output.size(done.bytes)}, {rate}/s"
