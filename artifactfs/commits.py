"""Commits in the background: one at a time for each collection, in the order they were asked for.

A lane is a collection's queue with a thread that lives while there is something in it. A program that ends waits for its
commits first. ``_lock`` guards ``_lanes``; no lock is held while a commit runs. A forked child starts without lanes: its
parent's commits are the parent's.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 - it must be told of the interpreter's end after us, so it is imported before
import logging
import os
import threading
from collections import deque
from collections.abc import Callable

from artifactfs.errors import UsageError
from artifactfs.forking import new_lock

_log = logging.getLogger(__name__)

_lock = new_lock()
_lanes: dict[str, deque[Commit]] = {}


class Commit:
    """A commit under way. ``error`` is what it failed with, once :meth:`wait` has returned True; None for success."""

    def __init__(self, work: Callable[[], object], what: str) -> None:
        self.error: Exception | None = None
        self._work = work
        self._what = what
        self._done = threading.Event()
        self._owner = os.getpid()

    def wait(self, timeout: float | None = None) -> bool:
        """Whether it is over within ``timeout`` seconds (None: wait for it)."""
        if self._owner != os.getpid() and not self._done.is_set():
            raise UsageError(
                f"{self._what} is being committed by process {self._owner}, which forked this one: wait for it there"
            )
        return self._done.wait(timeout)

    def run(self) -> None:
        """Do the work. A failure is logged at once, as nobody may ever wait for it."""
        try:
            self._work()
        except BaseException as error:  # whatever it is, the lane goes on
            self.error = error if isinstance(error, Exception) else RuntimeError(repr(error))
            _log.error("%s was not committed: %s", self._what, error)
        finally:
            self._work = _nothing  # what the work holds, such as a large draft, need not live as long as this does
            self._done.set()


def submit(lane: str, what: str, work: Callable[[], object]) -> Commit:
    """Run ``work`` after everything that was submitted to ``lane`` before. ``what`` names the commit in messages."""
    commit = Commit(work, what)
    with _lock:
        queue = _lanes.get(lane)
        if queue is not None:
            queue.append(commit)
            return commit
        queue = _lanes[lane] = deque([commit])
    try:
        threading.Thread(target=_drain, args=(lane, queue), name=f"afs-commit {lane}").start()
    except RuntimeError:  # no thread can be started (a limit, or the interpreter is ending): then it is done here and now
        _drain(lane, queue)
    return commit


def _drain(lane: str, queue: deque[Commit]) -> None:
    while True:
        queue[0].run()
        with _lock:
            queue.popleft()
            if not queue:
                del _lanes[lane]
                return


def _nothing() -> None:
    return None


def _forget_lanes() -> None:
    """In a forked child: the parent commits what it began."""
    _lanes.clear()


def _finish() -> None:
    """Wait for all commits."""
    while True:
        with _lock:
            waiting = [queue[-1] for queue in _lanes.values()]
        if not waiting:
            return
        for commit in waiting:
            commit.wait()


os.register_at_fork(after_in_child=_forget_lanes)
# A thread pool takes no more work once the main thread has ended, and a commit needs one: waiting for our threads, as the
# interpreter does, would be too late, and ``atexit`` is later still. The name is private, but the same from 3.9 to 3.14.
threading._register_atexit(_finish)  # type: ignore[attr-defined]
