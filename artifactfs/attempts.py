"""When to try again: the one retry policy, for every remote.

The first retry of a fetch is immediate, later ones wait, longer each time and by chance; a fetch that makes no progress within
its deadline is given up. Whoever talks to a remote turns what another attempt may mend into a :class:`TransientError`.
"""

from __future__ import annotations

import logging
import os
import random
import time

from artifactfs.errors import NetworkError

log = logging.getLogger(__name__)

DEADLINE = 60.0
"""Seconds within which a fetch must make progress (16 KiB, or its rest); then it is given up."""

MAX_ATTEMPTS = 6
"""Failures in a row without progress between them."""

CONNECT_TIMEOUT = 10.0  # a handshake over the worst usable link, and time for the next address of the name
READ_TIMEOUT = 30.0  # half of DEADLINE: a stalled connection is replaced once before the fetch is given up
BACKOFF = 0.2  # seconds before the second retry (the first is immediate: mostly a kept connection that had been closed)
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that another attempt may mend."""

_PROGRESS = 16 << 10  # fewer bytes are no progress: a server that drips could otherwise hold a fetch for days
_BACKOFF_MAX = 10.0
_BUSY = 1.0  # seconds before the first retry of what a server is too busy for and does not say when
_TELL = 2.0  # seconds: who waits longer should know for what
_RACE = 0.005  # seconds: a write to a service nearby takes about as long
_RACE_MAX = 1.0

_jitter = random.Random()  # of its own: a program's seeded generator must not depend on the network


os.register_at_fork(after_in_child=_jitter.seed)  # or all children would wait in step


class Races:
    """Waits between attempts at a compare-and-swap that others win: not before the second, then longer and by chance, so that
    many writers of one object do not all read it again at once. There is no limit: each lost race is somebody's success."""

    def __init__(self) -> None:
        self._lost = -1

    def enter(self) -> None:
        """To be called before each attempt."""
        self._lost += 1
        if self._lost > 1:
            time.sleep(_jitter.uniform(0.0, min(_RACE * float(2 ** min(self._lost, 20)), _RACE_MAX)))


class TransientError(Exception):
    """An attempt failed in a way that another may not. ``wait``: seconds that the server asks for, or None. ``busy``: it is
    there and wants to be asked later, so only the deadline limits how often that is."""

    def __init__(self, reason: str, wait: float | None = None, busy: bool = False) -> None:
        super().__init__(reason)
        self.wait = wait
        self.busy = busy


class Attempts:
    """Counts the failures of one fetch in a row without new bytes between them, and the time since bytes came at all."""

    def __init__(self, where: str, deadline: float) -> None:
        """``where``: what is fetched, for messages; without secrets."""
        self.where = where
        self.deadline = deadline
        self._failures = 0
        self._bytes = 0
        self._new = 0
        self._limit = time.monotonic() + deadline
        self._told = False

    def arrived(self, size: int, new: int) -> None:
        """Count ``size`` bytes, ``new`` of which were not here before. NetworkError if they drip too slowly."""
        self._bytes += size
        self._new += new
        if self._new >= _PROGRESS:
            self._failures = self._new = 0
        if self._bytes >= _PROGRESS:
            self._bytes = 0
            self._limit = time.monotonic() + self.deadline
        elif time.monotonic() > self._limit:
            raise NetworkError(f"{self.where}: {self._bytes} bytes in {self.deadline:g} s are too slow; try again later")

    def timeouts(self) -> tuple[float, float]:
        """Seconds to connect and to wait for a byte, within what is left of the deadline."""
        left = max(self._limit - time.monotonic(), 0.05)
        return min(CONNECT_TIMEOUT, left), min(READ_TIMEOUT, self.deadline / 2, left)

    def failed(self, error: TransientError) -> None:
        """Wait before the next attempt; NetworkError if there is none left."""
        self._failures += 1
        wait = error.wait if error.wait is not None else self._backoff()
        if error.busy and (error.wait is None or self._failures > 1):
            wait = max(wait, _jitter.uniform(0.5, 1.0) * min(_BUSY * float(2 ** min(self._failures - 1, 20)), _BACKOFF_MAX))
        given_up = self._failures >= MAX_ATTEMPTS and not error.busy
        if given_up or time.monotonic() + wait >= self._limit:
            advice = "try again later" if error.busy else "check the network, then try again"
            raise NetworkError(f"{self.where}: {error} (attempt {self._failures}); {advice}") from None
        if wait >= _TELL and not self._told:
            self._told = True
            log.warning("%s: %s; trying again in %.0f s", self.where, error, wait)
        log.debug("%s: %s; attempt %d follows in %.1f s", self.where, error, self._failures + 1, wait)
        time.sleep(wait)

    def _backoff(self) -> float:
        if self._failures == 1:
            return 0.0
        step = min(BACKOFF * float(2 ** (self._failures - 2)), _BACKOFF_MAX)
        return step * _jitter.uniform(0.5, 1.0)
