"""Test support: the steps by which a local store changes, and what may happen before any of them."""

from __future__ import annotations

import errno
import functools
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from artifactfs.pack import PackWriter
from artifactfs.store import upload

_CHANGING = ("mkdir", "open", "pwrite", "fsync", "rename", "link", "unlink", "utime")


@contextmanager
def steps(before: Callable[[int, str], None]) -> Iterator[None]:
    """Calls ``before(number, what)`` before each change of a file system, from whichever thread makes it."""
    real = {name: getattr(os, name) for name in _CHANGING}
    lock = threading.Lock()
    taken = 0

    def wrapped(name: str) -> Callable[..., Any]:
        @functools.wraps(real[name])
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal taken
            if name != "open" or args[1] & os.O_CREAT:
                with lock:
                    number, taken = taken, taken + 1
                before(number, f"{name} {args[0] if isinstance(args[0], str) else ''}")
            return real[name](*args, **kwargs)

        return call

    for name in _CHANGING:
        setattr(os, name, wrapped(name))
    try:
        yield
    finally:
        for name in _CHANGING:
            setattr(os, name, real[name])


def die_at(step: int) -> Callable[[int, str], None]:
    """SIGKILL to this very process before that step."""

    def before(number: int, what: str) -> None:
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return before


class FailFrom:
    """Every change from that step on fails as a disk does that stays full, read-only or broken; removing still works."""

    def __init__(self, step: int, code: int) -> None:
        self.step = step
        self.code = code
        self.failed = False

    def __call__(self, number: int, what: str) -> None:
        if number < self.step or what.startswith("unlink") or (self.code == errno.ENOSPC and what.startswith("utime")):
            return
        self.failed = True
        raise OSError(self.code, os.strerror(self.code))


@contextmanager
def small_packs(target: int = 20_000) -> Iterator[None]:
    """Packs of this many bytes, so that a small commit has several."""
    upload.PackWriter = functools.partial(PackWriter, target=target)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        upload.PackWriter = PackWriter  # type: ignore[misc]


class Journal:
    """Follows what is durable: an inode's bytes once it is fsync'd, a name once its directory is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: dict[tuple[int, int], tuple[int, int]] = {}
        self.pending: set[str] = set()
        self.problems: list[str] = []
        self.events: list[str] = []
        real = {name: getattr(os, name) for name in ("fsync", "rename", "link", "mkdir")}

        def fsync(fd: int) -> None:
            real["fsync"](fd)
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode):
                directory = os.readlink(f"/proc/self/fd/{fd}")
                self.pending = {path for path in self.pending if os.path.dirname(path) != directory}
                self.events.append(f"sync {directory}/")
            else:
                self.synced[status.st_dev, status.st_ino] = (status.st_size, status.st_mtime_ns)

        def placed(source: str, target: str) -> None:
            status = os.stat(source)
            if self.synced.get((status.st_dev, status.st_ino)) != (status.st_size, status.st_mtime_ns):
                self.problems.append(f"{target} got its name before its bytes were durable")
            if "/versions/" in target:
                self.problems += [f"{path} was not durable when the version appeared" for path in sorted(self.pending)]
            self.events.append(f"name {target}")

        def rename(source: str, target: str) -> None:
            placed(source, target)
            real["rename"](source, target)
            self.pending.add(target)

        def link(source: str, target: str) -> None:
            placed(source, target)
            real["link"](source, target)
            self.pending.add(target)

        def mkdir(path: str, mode: int = 0o777) -> None:
            real["mkdir"](path, mode)
            self.pending.add(path)

        for name, wrapped in {"fsync": fsync, "rename": rename, "link": link, "mkdir": mkdir}.items():
            monkeypatch.setattr(os, name, wrapped)
