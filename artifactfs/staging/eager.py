"""Stores what was written ahead of the commit, while work goes on, so that a commit right after a long job has little left to do.

One background thread takes files whose last handle was released, and that nobody has opened since, one at a time; when files
are written meanwhile it rests four times as long as it works. A file that is written again is stored again later, each time
after twice as long a rest. Small contents and block lists gather in a pack. Once that is durable the files stored since the last
one are recorded in the journal, each with the identity of its data file: number, size and change time. A commit takes a recorded
entry where the data file is still that one and the store still has the objects; else it stores the file itself. So whatever goes
wrong here costs time only: it is logged once and tried again, later and later.

No version refers to these objects yet. ``gc`` spares what is younger than its grace period, so they are made new well before.

Threads: ``Ledger.lock`` may be held when :meth:`Eager.closed` is called, and this module's own lock is never held while taking
another. A node's ``early`` is :data:`~artifactfs.staging.nodes.BUSY` from when it is taken until it is recorded; whoever begins
to change the file sets it to None.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

from cachetools import LRUCache

from artifactfs.content import DIGEST_SIZE
from artifactfs.errors import ArtifactFSError, IntegrityError
from artifactfs.maintenance import GRACE
from artifactfs.model import BLOCK, File, Ref, Version
from artifactfs.objects import object_key
from artifactfs.pack import PackWriter
from artifactfs.staging.changes import Plan
from artifactfs.staging.files import Files
from artifactfs.staging.journal import Delta
from artifactfs.staging.ledger import Ledger
from artifactfs.staging.nodes import BUSY, NOT_CUTTING, FileNode, decode_early, early_delta, now
from artifactfs.store.native import NativeStore
from artifactfs.store.storing import NewFile, Storing
from artifactfs.store.upload import Index

log = logging.getLogger(__name__)

_SETTLE = 1.0
"""Seconds after the last close: most programs that write a file in several steps have done so by then."""
_LONGEST_SETTLE = 300.0
_TICK = 20_000_000
"""Nanoseconds of two ticks of the slowest kernel clock that stamps files: a change after that has another change time."""
_PACK = 12 << 20
"""Bytes of small contents that are recorded together; below the size at which a pack is closed by itself."""
_PENDING = 4096
_PENDING_FOR = 30.0
"""Files and seconds after which what was stored is recorded, however little it is: what a crash can cost."""
_RECORD = 256
"""Files recorded in one hold of the lock: about 1 ms."""
_SHARE = 4
_PACE = 0.02
"""Seconds of work after which it looks whether to rest."""
_RETRY, _LONGEST_RETRY = 30.0, 600.0
_REFRESH = GRACE / 6
_REMEMBERED = 20_000
"""Contents that are known not to need storing again, and files whose last content is remembered: 10 MB."""

_NEVER = float("inf")

_Order = Literal["work", "drain", "park", "stop"]


class _GivenUp(Exception):
    """The file is being changed, or the stage is closed."""


class _Pending(NamedTuple):
    """A file that is stored, but not durable or not recorded."""

    node: FileNode
    data: int
    ctime: int
    file: File


class Eager:
    """The background thread of one stage."""

    def __init__(
        self, ledger: Ledger, files: Files, store: NativeStore, algorithm: str, base: Callable[[], Version | None], where: str
    ) -> None:
        """``base`` is asked for what the stage lies over; ``where`` is for messages."""
        self._ledger = ledger
        self._files = files
        self._store = store
        self._algorithm = algorithm
        self._base = base
        self._where = where
        self._queue = _Queue()
        self._lock = threading.Lock()
        self._order: _Order = "work"
        self._news = threading.Event()
        self._urgent = threading.Event()
        self._parked = threading.Event()
        self._idle = False
        self._left = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="eager-read", initializer=_yield_to_others)
        self._packs: PackWriter | None = None
        self._storing: Storing | None = None
        self._known: LRUCache[bytes, File] = LRUCache(_REMEMBERED)
        self._index: tuple[Version | None, Index] | None = None
        self._current: FileNode | None = None
        self._pending: list[_Pending] = []
        self._packed = 0
        self._flush_at = 0.0
        self._refresh_at = time.monotonic() + _REFRESH
        self._failures = 0
        self._retry_at = 0.0
        self._rested = time.monotonic()
        self._activity = 0
        with ledger.lock:
            self._take_all()
        files.closed = self.closed
        self._thread = threading.Thread(target=self._run, name="eager", daemon=True)
        self._thread.start()

    def closed(self, node: FileNode) -> None:
        """Nobody has the file open any more, and it was changed."""
        self._queue.put(node.ino)
        if self._idle:
            self._news.set()

    @contextlib.contextmanager
    def suspended(self, drain: bool) -> Iterator[None]:
        """Nothing is stored here while the block runs. What is under way is finished and recorded first; with ``drain`` also
        every file that is closed by now."""
        self._ask("drain" if drain else "park")
        self._parked.wait()
        try:
            yield
        finally:
            self._ask("work")

    def stop(self) -> None:
        """End the thread; what is not recorded by now is stored by the commit. Idempotent."""
        self._ask("stop")
        self._thread.join()

    def _ask(self, order: _Order) -> None:
        with self._lock:
            self._order = order
            if self._thread.is_alive():
                self._parked.clear()
        (self._urgent.clear if order == "work" else self._urgent.set)()
        self._news.set()

    # The thread

    def _run(self) -> None:
        _yield_to_others()
        try:
            while (order := self._order) != "stop":
                self._step(order)
        except BaseException:
            log.exception("nothing more is stored ahead of the commit of %s", self._where)
        finally:
            self._files.closed = lambda node: None
            self._drop()
            self._pool.shutdown(wait=True, cancel_futures=True)
            with self._lock:
                self._order = "stop"
                self._parked.set()

    def _step(self, order: _Order) -> None:
        self._queue.take_in()
        if order == "park":
            self._park()
        elif order == "drain":
            self._drain()
        elif time.monotonic() < self._retry_at:
            self._wait(self._retry_at)
        elif (ino := self._queue.next()) is not None:
            self._attempt(lambda: self._take(ino))
        elif self._is_full() or (self._pending and time.monotonic() >= self._flush_at):
            self._attempt(self._flush)
        elif time.monotonic() >= self._refresh_at:
            self._attempt(self._refresh)
        else:
            self._wait(min(self._queue.due(), self._flush_at if self._pending else self._refresh_at, self._refresh_at))

    def _park(self) -> None:
        self._attempt(self._flush)
        with self._lock:
            if self._order == "park":
                self._parked.set()
        self._news.wait()
        self._news.clear()

    def _drain(self) -> None:
        """Every file closed by now, whether it has settled or not."""
        for _ in range(len(self._queue)):
            if self._order != "drain" or time.monotonic() < self._retry_at:
                break
            ino = self._queue.next(early=True)
            if ino is None:
                break
            self._attempt(lambda ino=ino: self._take(ino))  # type: ignore[misc]
            if self._is_full():
                self._attempt(self._flush)
        with self._lock:
            if self._order == "drain":
                self._order = "park"

    def _wait(self, until: float) -> None:
        self._idle = not self._queue
        if not self._idle:
            until = min(until, time.monotonic() + _SETTLE)  # so that not every close need wake this thread
        if not self._queue.has_news():
            self._news.wait(None if until == _NEVER else max(until - time.monotonic(), 0.0))
        self._idle = False
        self._news.clear()
        self._rested, self._activity = time.monotonic(), self._files.activity

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except _GivenUp:
            pass
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Say so once, and try everything that is not recorded again later."""
        if not self._failures:
            known = isinstance(error, (ArtifactFSError, OSError))
            log.warning(
                "storing ahead of the commit of %s failed and is tried again later: %s", self._where, error, exc_info=not known
            )
        self._retry_at = time.monotonic() + min(_RETRY * 2**self._failures, _LONGEST_RETRY)
        self._failures = min(self._failures + 1, 16)
        self._drop()

    def _drop(self) -> None:
        """Forget what is not recorded; it is in the queue again."""
        for item in self._pending:
            self._let_go(item.node, again=True)
        self._pending = []
        self._packed = 0
        self._known.clear()  # it may speak of packs that will never be
        if self._packs is not None:
            self._packs.close()
        self._packs = self._storing = None

    def _let_go(self, node: FileNode, again: bool) -> None:
        with self._ledger.lock:
            if node.early is BUSY:
                node.early = None
                if again:
                    self._queue.put(node.ino)

    # One file

    def _take_all(self) -> None:
        """Everything that an earlier process left."""
        for node in self._ledger.space.nodes.values():
            if isinstance(node, FileNode) and node.data and node.early is None and not node.open:
                self._queue.put(node.ino)

    def _take(self, ino: int) -> None:
        node = self._begin(ino)
        if node is None:
            return
        self._current = node
        plan = Plan(self._ledger, self._files, self._where)
        try:
            self._store_node(node, plan)
        except _GivenUp:
            self._let_go(node, again=False)
            raise
        except Exception:
            moved = node.early is not BUSY
            self._let_go(node, again=True)
            self._queue.forget(ino)
            if moved:  # whatever it was, it came of that
                raise _GivenUp from None
            raise
        finally:
            plan.close()
            self._current = None

    def _begin(self, ino: int) -> FileNode | None:
        """The node, if it is to be stored: from now on whoever changes it says so."""
        with self._ledger.lock:
            node = self._ledger.space.nodes.get(ino)
            if not isinstance(node, FileNode) or node.open or not node.nlink or not node.data or node.early is not None:
                return None
            size = self._files.stat(node).size
            if not size or not node.differs(size) or isinstance(node.entry, Ref) or node.cutting != NOT_CUTTING:
                return None
            node.early = BUSY
            return node

    def _store_node(self, node: FileNode, plan: Plan) -> None:
        change = plan.change(node)
        data, ctime = self._identity(node)
        if not isinstance(change, NewFile):
            self._let_go(node, again=False)
            return
        file = self._session().file(change, self._queue.last(node.ino) if node.entry is None else None)
        if not self._pending:
            self._flush_at = time.monotonic() + _PENDING_FOR
        self._pending.append(_Pending(node, data, ctime, file))
        self._packed += file.size if file.size <= BLOCK else -(-file.size // BLOCK) * DIGEST_SIZE

    def _identity(self, node: FileNode) -> tuple[int, int]:
        """Number and change time of the data file, once any later change would give it another."""
        while True:
            ctime = self._files.data_stat(node).st_ctime_ns
            age = now() - ctime
            if age > _TICK:
                return node.data, ctime
            if age < -_TICK:
                raise _GivenUp  # the clock was put back: times tell nothing for a while
            self._check()
            time.sleep(_TICK / 1e9)

    def _session(self) -> Storing:
        if self._storing is None:
            self._store.ensure_format()
            self._packs = PackWriter(self._store.objects)
            storing = Storing(self._store, self._packs, self._pool, 1, self._algorithm, self._known, self._find, self._progress)
            self._storing = storing
        return self._storing

    def _find(self, id: bytes) -> File | None:
        """What the base has of that content."""
        base = self._base()
        if self._index is None or self._index[0] is not base:
            self._index = base, Index(self._store.tree, base.root if base else None, self._pace)
        return self._index[1].find(id, lambda: None)

    def _progress(self, files: int, size: int) -> None:
        self._pace()

    def _check(self) -> None:
        if self._order == "stop" or (self._current is not None and self._current.early is not BUSY):
            raise _GivenUp

    def _pace(self) -> None:
        """Give way to writers."""
        self._check()
        worked = time.monotonic() - self._rested
        if worked < _PACE:
            return
        activity = self._files.activity
        if activity != self._activity:
            self._activity = activity
            self._urgent.wait(min(worked, 1.0) * _SHARE)
        self._rested = time.monotonic()

    # Records

    def _is_full(self) -> bool:
        return self._packed >= _PACK or len(self._pending) >= _PENDING

    def _flush(self) -> None:
        """Make what is stored durable, then record it."""
        if not self._pending:
            return
        assert self._packs is not None
        self._packs.flush()
        while self._pending:
            self._record(self._pending[:_RECORD])
            del self._pending[:_RECORD]
        self._packed = 0
        self._failures = 0

    def _record(self, stored: list[_Pending]) -> None:
        with self._ledger.lock:
            sound = [item for item in stored if self._is_sound(item)]
            deltas: list[Delta] = [early_delta(item.node.ino, item.data, item.ctime, item.file) for item in sound]
            if deltas:
                self._ledger.note(*deltas)
        for item in stored:
            self._queue.stored(item.node.ino, item.file)

    def _is_sound(self, item: _Pending) -> bool:
        """Whether the data file is still what was stored. A node that is not is in the queue when it is closed."""
        node = item.node
        if node.early is not BUSY or not node.nlink:
            return False
        found = self._files.data_stat(node)
        if (node.data, found.st_size, found.st_ctime_ns) == (item.data, item.file.size, item.ctime):
            return True
        self._let_go(node, again=True)
        return False

    def _refresh(self) -> None:
        self._refresh_at = time.monotonic() + _REFRESH
        for node in refresh(self._ledger, self._store)[1]:
            self._queue.put(node.ino)


class _Queue:
    """Inode numbers in the order in which they are due. :meth:`put` may be called from any thread, all else by one."""

    def __init__(self) -> None:
        self._put: deque[int] = deque()
        self._due: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []
        self._last: LRUCache[int, tuple[File, int]] = LRUCache(_REMEMBERED)

    def __len__(self) -> int:
        return len(self._due)

    def put(self, ino: int) -> None:
        """It has changed just now."""
        self._put.append(ino)

    def has_news(self) -> bool:
        return bool(self._put)

    def take_in(self) -> None:
        while self._put:
            ino = self._put.popleft()
            times = self._last[ino][1] if ino in self._last else 0
            due = time.monotonic() + min(_SETTLE * 2**times, _LONGEST_SETTLE)
            if ino not in self._due:
                heapq.heappush(self._heap, (due, ino))
            self._due[ino] = due

    def next(self, early: bool = False) -> int | None:
        """The next that is due, which is taken out; ``early``: due or not."""
        while self._heap:
            due, ino = self._heap[0]
            if self._due[ino] > due:
                heapq.heapreplace(self._heap, (self._due[ino], ino))
            elif due > time.monotonic() and not early:
                return None
            else:
                heapq.heappop(self._heap)
                del self._due[ino]
                return ino
        return None

    def due(self) -> float:
        """When to look again."""
        return self._heap[0][0] if self._heap else _NEVER

    def stored(self, ino: int, file: File) -> None:
        """It was stored: the next time may take longer, and need not store what is the same."""
        times = self._last[ino][1] if ino in self._last else 0
        self._last[ino] = file, min(times + 1, 16)

    def forget(self, ino: int) -> None:
        """What it was stored as may be what is wrong."""
        self._last.pop(ino, None)

    def last(self, ino: int) -> File | None:
        return self._last[ino][0] if ino in self._last else None


def refresh(ledger: Ledger, store: NativeStore) -> tuple[dict[bytes, File], list[FileNode]]:
    """Make all objects of recorded files as new as just written. Returns their contents by id, and the files of which something
    is lost, whose records are dropped."""
    with ledger.lock:
        nodes = [node for node in ledger.space.nodes.values() if isinstance(node, FileNode) and node.early]
    there: dict[bytes, bool] = {}
    stored: dict[bytes, File] = {}
    lost: list[FileNode] = []
    for node in nodes:
        early = node.early
        if not early:
            continue
        file = decode_early(early).file
        if _refreshed(store, file, there):
            stored[file.id] = file
            continue
        with ledger.lock:
            if node.early is early:
                node.early = None
        lost.append(node)
    return stored, lost


def _refreshed(store: NativeStore, file: File, there: dict[bytes, bool]) -> bool:
    try:
        objects = {extent.object for extent in store.places(file)}
    except IntegrityError:
        return False
    for object in objects:
        if object not in there:
            there[object] = store.objects.refresh(object_key(object))
    return all(there[object] for object in objects)


def _yield_to_others() -> None:
    """On Linux this lowers the calling thread alone."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
