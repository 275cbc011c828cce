"""Packs: small contents and pages, back to back in one object of 8 to 32 MiB. Nothing but extents says where one begins.

A pack's id is 16 random bytes, so that what is put into it has its location at once and a page can name another one of the same
pack. The bytes of a pack are not covered by its name: each content and page in it is checked by its own id.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from artifactfs.model import OBJECT_PACK, Extent
from artifactfs.objects import ObjectStore, object_key

PACK_TARGET = 16 << 20
"""A pack is closed once it has this many bytes: large enough that a request's cost is spread, small enough to hold in memory."""

_PENDING = 2
"""Packs being written at once; with the one being filled this bounds memory to 3 packs."""
_PENDING_REMOTE = 6
"""The same where each waits for a network: six connections of 90 MB/s are more than most links have."""


class PackWriter:
    """Collects contents into packs, written in the background. Threads may share one."""

    def __init__(self, objects: ObjectStore, target: int = PACK_TARGET) -> None:
        self.written: Callable[[bytes], None] = lambda object: None
        """Told, in another thread, of each pack that is durable."""
        self._objects = objects
        self._target = target
        self._lock = threading.Lock()
        self._pending = _PENDING if objects.path("") is not None else _PENDING_REMOTE
        self._pool = ThreadPoolExecutor(self._pending, thread_name_prefix="pack")
        self._writing: list[Future[None]] = []
        self._start()

    def add(self, data: bytes | bytearray | memoryview) -> Extent:
        """Where ``data`` will lie. It is durable only after :meth:`flush`."""
        with self._lock:
            extent = Extent(self._id, len(self._buffer), len(data))
            self._buffer += data
            if len(self._buffer) >= self._target:
                self._seal()
        return extent

    def run(self, write: Callable[[], None]) -> None:
        """Have ``write`` done in the background, beside the packs; :meth:`flush` waits for it, and raises what it raised."""
        with self._lock:
            self._begin(write)

    def seal(self) -> None:
        """Start to write what was added; :meth:`flush` waits for it."""
        with self._lock:
            if self._buffer:
                self._seal()

    def flush(self) -> None:
        """Return once everything added is durable; raises what writing a pack raised, also if :meth:`add` did already."""
        with self._lock:
            if self._buffer:
                self._seal()
            for future in self._writing:
                future.result()
            self._writing = []

    def close(self) -> None:
        """Forget what was not flushed and end the threads. Idempotent."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _start(self) -> None:
        self._id = OBJECT_PACK + os.urandom(16)
        self._buffer = bytearray()

    def _seal(self) -> None:
        object, buffer = self._id, self._buffer

        def write() -> None:
            self._objects.put(object_key(object), buffer)
            self.written(object)

        self._begin(write)
        self._start()

    def _begin(self, write: Callable[[], None]) -> None:
        while len(self._writing) >= self._pending:
            self._writing[0].result()  # stays if it raises: no later flush may pass
            del self._writing[0]
        self._writing.append(self._pool.submit(write))
