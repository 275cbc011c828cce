"""Room in a cache: reserve it before writing, and evict what was least recently used when there is none."""

from __future__ import annotations

import contextlib
import errno
import heapq
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from artifactfs.cache.layout import Found, Place, Tree
from artifactfs.cache.ledger import LOCK_SECONDS, UNKNOWN, BusyError, Ledger, StaleError
from artifactfs.forking import new_lock

log = logging.getLogger(__name__)

_EVICT_SHARE = 8  # each eviction frees an eighth: what finding the oldest costs is spread over many writes
_AHEAD_SHARE = 32  # eviction begins when only this share is free, so that writers need not wait for it
_AHEAD_LEAST = 128 << 20  # in a smaller cache that would be a few blocks
_HOPELESS_SECONDS = 1.0  # a search for room that found none costs too much to be made for each block
_BATCH = 64  # unlinks under one lock: some milliseconds
_PATIENT_SECONDS = 60.0


class _Victim(NamedTuple):
    """A file to evict. Sorts the least recently used last."""

    minus_atime: int
    weight: int
    place: Place


class _Survey(NamedTuple):
    """``found`` bytes are in the cache, ``used`` with all grants; ``victims`` are to go, the oldest first."""

    found: int
    used: int
    victims: list[_Victim]


class Space:
    """The room of ``tree`` for at most ``limit`` bytes. ``removed`` is told of each file that goes.

    Threads may share one. Every method may raise BusyError (another process is at it), StaleError (the cache was removed
    under us) and OSError.
    """

    def __init__(self, tree: Tree, limit: int, removed: Callable[[Place], object]) -> None:
        self.tree = tree
        self._limit = limit
        self._removed = removed
        self._evicting = new_lock()
        self._hopeless_until = 0.0
        self._ledger = Ledger(tree, limit)
        if not self._ledger.valid():
            with self._ledger.evicting(LOCK_SECONDS):
                if not self._ledger.valid():  # nobody else counted while we waited
                    self._survey(goal=0)

    @property
    def owned(self) -> bool:
        """False in a forked child: the grants are its parent's."""
        return self._ledger.pid == os.getpid()

    def reserve(self, cost: int) -> bool:
        """Whether ``cost`` bytes may now be added, after evicting others if need be. If so, :meth:`settle` must follow.

        OSError (ENOSPC) if the disk is too full.
        """
        if not self.tree.disk_shortage(cost) and self._ledger.take(cost):
            self._evict_ahead()
            return True
        if not self._evicting.acquire(timeout=LOCK_SECONDS):
            return False
        try:
            return self._make_room(cost)
        finally:
            self._evicting.release()

    def _make_room(self, cost: int) -> bool:
        """As :meth:`reserve`. Needs ``_evicting``."""
        shortage = self.tree.disk_shortage(cost)
        if not shortage and self._ledger.take(cost):
            return True  # another thread made room meanwhile
        if time.monotonic() < self._hopeless_until:
            return False
        self._hopeless_until = time.monotonic() + _HOPELESS_SECONDS
        target = self._limit - max(self._limit // _EVICT_SHARE, cost)
        if shortage:
            used = self._ledger.used()
            target = min(target, used - shortage - used // _EVICT_SHARE)
        self._trim(max(0, target))
        if self.tree.disk_shortage(cost):
            raise OSError(errno.ENOSPC, "the last 5 % of its disk are left to others")
        if not self._ledger.take(cost):
            return False
        self._hopeless_until = 0.0
        return True

    def settle(self, cost: int, spent: bool) -> None:
        """End what :meth:`reserve` began: the bytes were added, or not."""
        self._ledger.settle(cost, spent)

    def shrink(self, cost: int) -> None:
        """Evict some, and at least ``cost`` bytes: the disk, or a quota that it does not show, turned out to be full."""
        with contextlib.suppress(OSError, BusyError, StaleError), self._evicting:
            used = self._ledger.used()
            self._trim(max(0, used - max(used // _EVICT_SHARE, cost)))

    def prune(self, target: int) -> int:
        """Count anew, and evict until at most ``target`` bytes are in the cache, grants aside. Returns the bytes freed."""
        with self._evicting, self._ledger.evicting(_PATIENT_SECONDS):
            survey = self._survey(goal=max(0, self._ledger.used() - target))
            return self._evict(survey.victims, target + survey.used - survey.found)

    def close(self) -> None:
        """Give back what was reserved and not used."""
        self._ledger.close()

    def _evict_ahead(self) -> None:
        """Begin to evict in the background if little is free."""
        nearly_full = self._ledger.seen > self._limit - self._limit // _AHEAD_SHARE
        if nearly_full and self._limit >= _AHEAD_LEAST and self._evicting.acquire(blocking=False):
            self._ledger.seen = 0  # not again before the next grant
            threading.Thread(target=self._run_ahead, name="artifactfs-evict", daemon=True).start()

    def _run_ahead(self) -> None:
        """Takes over ``_evicting``."""
        try:
            self._trim(self._limit - self._limit // _EVICT_SHARE)
        except (BusyError, StaleError, OSError) as error:
            log.debug("cache: evicting in the background: %r", error)  # a writer will meet it, and say so
        finally:
            self._evicting.release()

    def _trim(self, target: int) -> None:
        """Count, then evict the least recently used until at most ``target`` bytes are used. Needs ``_evicting``.

        Nothing is done if another process has just made room.
        """
        with self._ledger.evicting(LOCK_SECONDS):
            used = self._ledger.used()
            if used >= UNKNOWN:  # who began to count died: without a count, how much to evict cannot be told
                used = self._survey(goal=0).used
            if used > target:
                self._evict(self._survey(goal=used - target).victims, target)

    def _survey(self, goal: int) -> _Survey:
        """Count what is used, and find the least recently used files that together weigh ``goal``, the oldest first."""
        begun = self._ledger.begin_count()
        total, selected, heap = self.tree.overhead(), 0, list[_Victim]()
        for found in self.tree.walk():
            weight = self.tree.weight(found)
            total += weight
            minus_atime = -found.info.st_atime_ns
            if not goal or not found.place.name or (selected >= goal and minus_atime <= heap[0].minus_atime):
                continue
            heapq.heappush(heap, _Victim(minus_atime, weight, found.place))
            selected += weight
            while selected - heap[0].weight >= goal:
                selected -= heapq.heappop(heap).weight
        return _Survey(total, self._ledger.end_count(begun, total), sorted(heap, reverse=True))

    def _evict(self, victims: list[_Victim], target: int) -> int:
        """Remove ``victims`` in order until ``target`` is reached. Returns the bytes freed."""
        freed = 0
        for start in range(0, len(victims), _BATCH):
            with self._ledger.change() as account:
                for victim in victims[start : start + _BATCH]:
                    if account.used <= target:
                        break
                    gone = self._evict_one(victim)
                    if gone is not None:
                        freed += gone.allocated
                        account.used -= min(account.used, victim.weight)
            if account.used <= target:
                break
        for place in {victim.place._replace(name="") for victim in victims if victim.place.large}:
            self.tree.remove(place)
        return freed

    def _evict_one(self, victim: _Victim) -> Found | None:
        """The file, once it is removed; None if it is gone or was used since it was found."""
        info = self.tree.stat(victim.place)
        if info is None or info.st_atime_ns != -victim.minus_atime:
            return None
        self._removed(victim.place)
        return Found(victim.place, info) if self.tree.remove(victim.place) else None
