"""Small contents and pages of a remote store: read through the cache, checked, and fetched together with their neighbours.

A small content (at most a block) and a page are the same thing here: bytes in one extent whose BLAKE3 is their id. One that is
missing is fetched by a request of its own at once. What else may be fetched with it, its user says (``ahead``): that comes in
large ranges, one stream each, from which every content is cut, checked and cached by its own id. Who asks for one that is
under way waits for that.

A content that fails its check is fetched once more, alone; if it fails again, those who wait get an IntegrityError. A range that
cannot be read does not spoil what lies in it: whoever waits for a content of it fetches that alone.

Threads: every public method may be called from any thread. ``_lock`` is never held during I/O beyond a look whether the cache
has a content. Errors belong to those who wait; the next read tries again.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from cachetools import LRUCache

from artifactfs.cache import BlockCache
from artifactfs.content import block_digest
from artifactfs.errors import ArtifactFSError, IntegrityError, NetworkError, OfflineError
from artifactfs.model import BLOCK, Extent
from artifactfs.objects import object_key
from artifactfs.waiting import Budget, Result, Workers

log = logging.getLogger(__name__)

_GAP = 64 << 10
"""Bytes between two contents that are fetched along: less than a request costs on a link of 90 MB/s and 20 ms."""
_RANGE = 4 << 20
"""Bytes of a request: two and a half round trips' worth, so that the stream of one costs little, and a pack has several."""
_MEMORY = 32 << 20
"""Bytes of contents that came last, or that the cache did not take."""

OTHERS = 5.0
"""Seconds to wait for what another process is fetching into the shared cache: its link may have stalled."""
_LOOK = 0.005  # seconds between two looks whether it is there: nothing tells processes of each other's blocks

Stream = Callable[[Extent], Iterator[bytes]]


class Small(NamedTuple):
    """``extent`` holds bytes whose BLAKE3 is ``id``."""

    id: bytes
    extent: Extent


Ahead = Callable[[], Iterable[Small]]
"""What to fetch as well, told after a miss: the fetch of what is missing has begun by then."""


class PackedContents:
    """Reads small contents by ``stream``. ``cache`` None: nothing is kept on disk. ``deadline``: seconds without progress until a
    read is given up with a NetworkError."""

    def __init__(self, stream: Stream, cache: BlockCache | None, *, offline: bool, budget: Budget, deadline: float) -> None:
        self._stream = stream
        self._cache = cache
        self._offline = offline
        self._budget = budget
        self._deadline = deadline
        self._closed = False
        self._begin()

    def _begin(self) -> None:
        """Start with nothing under way: a forked child has neither the threads of its parent nor what they hold."""
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._workers = Workers()
        self._slots: dict[bytes, _Slot] = {}
        self._memory: LRUCache[bytes, bytes] = LRUCache(_MEMORY, getsizeof=len)

    def read(self, small: Small, offset: int, size: int, where: str, ahead: Ahead | None = None) -> bytes:
        """``size`` bytes from ``offset`` of ``small``, fewer only at its end. ``where`` names it in messages."""
        size = min(size, small.extent.length - offset)
        if size <= 0:
            return b""
        if self._process != os.getpid():
            self._budget = Budget(self._budget.limit)
            self._begin()
        anew = False
        while True:
            data = self._peek(small, offset, size)
            if data is not None:
                return data
            slot, first = self._slot(small, where, anew)
            if slot is None:
                anew = True  # it has come since, or it only seems to be here
                continue
            if first and ahead is not None:
                self.prefetch(ahead())
            whole = self._wait(slot, small, where)
            if whole is not None:
                return whole if size == len(whole) else whole[offset : offset + size]
            anew = False

    def prefetch(self, smalls: Iterable[Small]) -> bool:
        """Begin to fetch those of ``smalls`` that are neither here nor under way, as far as the budget allows. Whether it did."""
        if self._offline or self._closed:
            return True
        wanted = [small for small in smalls if 0 < small.extent.length <= _RANGE]
        # The looks into the cache take milliseconds: whoever reads should not wait for them.
        room = self._budget.left > 0
        if wanted and room:
            self._try_run(functools.partial(self._prefetch, wanted))
        return room

    def has(self, small: Small) -> bool:
        """Whether it seems to be here."""
        if small.id in self._memory:
            return True
        return self._cache is not None and _cacheable(small) and self._cache.content(small.id, small.extent.length).has(0)

    def close(self) -> None:
        """Whoever waits gets an error. Idempotent."""
        with self._lock:
            self._closed = True
            slots = list(self._slots.values())
            self._slots.clear()
        for slot in slots:
            slot.fail(closed_error())

    def _peek(self, small: Small, offset: int, size: int) -> bytes | None:
        with self._lock:
            whole = self._memory.get(small.id)
        if whole is not None:
            return whole[offset : offset + size]
        if self._cache is None or not _cacheable(small):
            return None
        return self._cache.content(small.id, small.extent.length).read(0, offset, size, small.id)

    # Planning

    def _slot(self, small: Small, where: str, anew: bool) -> tuple[_Slot | None, bool]:
        """Where to wait for ``small``, None if it has come meanwhile (not with ``anew``); and whether its fetch begins now."""
        with self._lock:
            slot = self._slots.get(small.id)
            if slot is not None:
                return slot, False
            if not anew and self.has(small):
                return None, False
            if self._closed:
                raise closed_error()
            if self._offline:
                raise OfflineError(
                    f"{where} is not in the cache, and offline nothing is fetched; run `artifactfs warm` when online"
                )
            fetch = _Fetch(small.extent, [small], where, demanded=True)
            slot = self._slots[small.id] = _Slot(fetch)
        self._budget.charge(small.extent.length)
        self._start(fetch)
        return slot, True

    def _prefetch(self, smalls: list[Small]) -> None:
        missing = {small.id: small for small in smalls if small.id not in self._slots and not self.has(small)}
        for run in _runs(missing.values()):
            extent = _range(run)
            if not self._budget.take(extent.length):
                return
            fetch = _Fetch(extent, run, object_key(extent.object), demanded=False)
            with self._lock:
                fetch.smalls = [small for small in run if small.id not in self._slots] if not self._closed else []
                self._slots.update((small.id, _Slot(fetch)) for small in fetch.smalls)
            self._start(fetch)

    def _start(self, fetch: _Fetch) -> None:
        """Fetch in a thread of its own; what there is no thread for is an error of those who wait."""
        if not self._try_run(functools.partial(self._run, fetch)):
            self._end(fetch, ArtifactFSError(f"{fetch.where} cannot be fetched: the system has no more threads"))

    def _try_run(self, task: Callable[[], None]) -> bool:
        try:
            self._workers.run(task)
        except RuntimeError:
            return False
        return True

    # Waiting

    def _wait(self, slot: _Slot, small: Small, where: str) -> bytes | None:
        """The content, or None if it must be asked for again."""
        limit = time.monotonic() + self._deadline
        while not slot.wait(max(limit - time.monotonic(), 0.0)):
            limit = max(limit, slot.fetch.moved + self._deadline)
            if limit <= time.monotonic():
                self._give_up(slot.fetch)
                raise NetworkError(
                    f"{where}: {object_key(small.extent.object)} made no progress in {self._deadline:g} s; "
                    "check the network, then try again"
                )
        return None if slot.again else slot.get()

    def _give_up(self, fetch: _Fetch) -> None:
        """Take a stalled fetch out of the way: its other readers, who may have waited less, start another."""
        for slot in self._taken(fetch):
            slot.ask_again()

    def _taken(self, fetch: _Fetch) -> list[_Slot]:
        """The slots of the fetch that are left, out of the way."""
        with self._lock:
            ids = [small.id for small in fetch.smalls if (slot := self._slots.get(small.id)) is not None and slot.fetch is fetch]
            return [self._slots.pop(id) for id in ids]

    # Fetching, each in a thread of its own

    def _run(self, fetch: _Fetch) -> None:
        error: BaseException | None = None
        claimed: list[Small] = []
        try:
            claimed = [small for small in fetch.smalls if self._claim(fetch, small)]
            for run in _runs(claimed):
                self._fetch(fetch, run)
        except BaseException as caught:  # whatever it is, those who wait must hear of it
            error = caught
        for small in claimed:
            self._disclaim(small)
        self._end(fetch, error)

    def _claim(self, fetch: _Fetch, small: Small) -> bool:
        """Whether ``small`` is to be fetched here. If another process is at it, that one does it, and who waits for it gets what
        comes to the cache; unless that takes too long."""
        cache = self._cache
        if cache is None or not _cacheable(small):
            return True
        limit = time.monotonic() + OTHERS
        while not cache.claim(small.id, 0) and time.monotonic() < limit:
            if not fetch.demanded:
                return False
            time.sleep(_LOOK)
        if not self.has(small):
            return True
        self._disclaim(small)
        data = self._peek(small, 0, small.extent.length)
        if data is None:
            return True
        self._pass_on(small, data)
        return False

    def _disclaim(self, small: Small) -> None:
        if self._cache is not None:
            self._cache.disclaim(small.id, 0)

    def _pass_on(self, small: Small, data: bytes) -> None:
        with self._lock:
            self._memory[small.id] = data  # also if it is cached now: it is likely to be read soon
            slot = self._slots.pop(small.id, None)
        if slot is not None:
            slot.set(data)

    def _end(self, fetch: _Fetch, error: BaseException | None) -> None:
        self._budget.give_back(fetch.extent.length)
        for slot in self._taken(fetch):
            if error is None or not fetch.demanded:
                slot.ask_again()
            else:
                slot.fail(error)

    def _fetch(self, fetch: _Fetch, run: list[Small]) -> None:
        """Stream the range in which ``run`` lies, and deliver each content once its last byte is here."""
        extent = _range(run)
        start, have = extent.offset, 0
        buffer = bytearray(extent.length)
        view = memoryview(buffer)
        waiting = sorted(run, key=lambda small: small.extent.offset + small.extent.length, reverse=True)
        for piece in self._stream(extent):
            view[have : have + len(piece)] = piece
            have += len(piece)
            fetch.moved = time.monotonic()
            while waiting and waiting[-1].extent.offset + waiting[-1].extent.length - start <= have:
                small = waiting.pop()
                at = small.extent.offset - start
                self._deliver(fetch, small, bytes(view[at : at + small.extent.length]))
        if waiting:
            raise IntegrityError(f"{object_key(extent.object)} ended before byte {start + extent.length}; try again")

    def _deliver(self, fetch: _Fetch, small: Small, data: bytes) -> None:
        if block_digest(data) == small.id:
            if self._cache is not None and _cacheable(small):
                self._cache.content(small.id, len(data)).write(0, data, small.id)
                self._disclaim(small)
            self._pass_on(small, data)
        elif fetch.demanded and not fetch.second:
            log.warning("%s fails its check; it is fetched again", fetch.where)
            fetch.second = True
            self._fetch(fetch, [small])
        elif fetch.demanded:
            raise IntegrityError(
                f"{fetch.where}: byte {small.extent.offset} of {object_key(small.extent.object)} begins what does not match its "
                "content id, fetched twice; run `artifactfs verify`"
            )
        else:
            log.warning("%s at %d fails its check; it is fetched again when it is read", fetch.where, small.extent.offset)
            with self._lock:
                slot = self._slots.pop(small.id, None)
            if slot is not None:
                slot.ask_again()


class _Slot(Result[bytes]):
    """Where readers wait for a content. ``fetch`` is to deliver it."""

    def __init__(self, fetch: _Fetch) -> None:
        super().__init__()
        self.fetch = fetch
        self.again = False

    def ask_again(self) -> None:
        """It did not come, for no fault of its own: who waits should ask for it alone."""
        self.again = True
        self.finish()


@dataclasses.dataclass(slots=True, eq=False)
class _Fetch:
    """One stream of the bytes of ``extent``, in which ``smalls`` lie. ``demanded``: somebody waits for its one content.
    ``moved`` is when bytes came last; ``second``: what came first was wrong."""

    extent: Extent
    smalls: list[Small]
    where: str
    demanded: bool
    moved: float = 0.0
    second: bool = False


def _runs(smalls: Iterable[Small]) -> Iterator[list[Small]]:
    """The contents by object and place, parted where a gap is too large or a run too long."""
    run: list[Small] = []
    end = 0
    for small in sorted(smalls, key=lambda small: (small.extent.object, small.extent.offset)):
        extent = small.extent
        if run:
            first = run[0].extent
            apart = extent.object != first.object or extent.offset > end + _GAP
            if apart or extent.offset + extent.length - first.offset > _RANGE:
                yield run
                run = []
        end = max(end, extent.offset + extent.length) if run else extent.offset + extent.length
        run.append(small)
    if run:
        yield run


def _range(run: list[Small]) -> Extent:
    """The bytes from the first of ``run`` to the end of the last."""
    first = run[0].extent
    end = max(small.extent.offset + small.extent.length for small in run)
    return Extent(first.object, first.offset, end - first.offset)


def _cacheable(small: Small) -> bool:
    """A block of the cache is at most that long; no content and no page of ours is longer."""
    return small.extent.length <= BLOCK


def offline_error(where: str) -> OfflineError:
    """``where`` is not cached, and may not be fetched."""
    return OfflineError(f"{where} is not in the cache, and offline nothing is fetched; run `artifactfs warm` when online")


def closed_error() -> ArtifactFSError:
    return ArtifactFSError("the read was ended: its file or mount was closed")
