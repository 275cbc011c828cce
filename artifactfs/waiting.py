"""Threads that fetch, those that wait for them, and the bytes that are under way.

A fetch has a thread of its own, so that no stalled remote keeps others waiting. Who is about to wait for one calls
:func:`about_to_wait`, which lets a loop that answers requests in one thread go on in another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

_IDLE = 10.0  # seconds until a thread without work ends

_T = TypeVar("_T")
_thread = threading.local()


def before_waiting(hook: Callable[[], None] | None) -> None:
    """Have ``hook`` called whenever this thread is about to wait for a remote; None: no more."""
    _thread.hook = hook


def about_to_wait() -> None:
    """Say that this thread will now wait for a remote, perhaps for long. Nothing that others need may be held."""
    hook: Callable[[], None] | None = getattr(_thread, "hook", None)
    if hook is not None:
        hook()


class Result(Generic[_T]):
    """A value that one thread sets, once, and others wait for."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._value: _T | None = None
        self._error: BaseException | None = None

    def set(self, value: _T) -> None:
        self._value = value
        self._done.set()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._done.set()

    def finish(self) -> None:
        """There is neither a value nor an error, and nothing more to wait for."""
        self._done.set()

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def wait(self, seconds: float) -> bool:
        """Whether the value or an error came within ``seconds``."""
        if not self._done.is_set():
            about_to_wait()
        return self._done.wait(seconds)

    def get(self) -> _T:
        """The value, or the error that came instead, once :meth:`wait` said that it is there."""
        if self._error is not None:
            raise self._error
        assert self._value is not None
        return self._value


class Budget:
    """Bytes that may be asked for and not yet here, ahead of what is read. Threads may share one."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self.taken = 0

    @property
    def left(self) -> int:
        return self.limit - self.taken

    def take(self, size: int) -> bool:
        """Whether ``size`` bytes more may be asked for ahead; if so, :meth:`give_back` must follow."""
        with self._lock:
            if self.taken + size > self.limit:
                return False
            self.taken += size
            return True

    def charge(self, size: int) -> None:
        """Count ``size`` bytes that somebody waits for, whatever the limit; :meth:`give_back` must follow."""
        with self._lock:
            self.taken += size

    def give_back(self, size: int) -> None:
        with self._lock:
            self.taken -= size


class Workers:
    """Runs every task at once, on an idle thread if there is one. The threads do not keep the process alive, and are not there
    in a forked child."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle = 0
        self._tasks: SimpleQueue[Callable[[], None]] = SimpleQueue()

    def run(self, task: Callable[[], None]) -> None:
        """RuntimeError if the system has no more threads."""
        with self._lock:
            reuse = self._idle > 0
            self._idle -= reuse
        if reuse:
            self._tasks.put(task)
        else:
            threading.Thread(target=self._work, args=(task,), name="artifactfs-fetch", daemon=True).start()

    def _work(self, task: Callable[[], None]) -> None:
        while True:
            task()
            del task  # or its blocks would live as long as this thread is idle
            with self._lock:
                self._idle += 1
            try:
                task = self._tasks.get(timeout=_IDLE)
            except Empty:
                with self._lock:
                    if self._idle > 0:
                        self._idle -= 1
                        return
                task = self._tasks.get()  # our place was given to a task that is just being put
