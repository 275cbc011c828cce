"""An object written in parts: positional writes from any thread become a multipart upload, several parts at once.

Memory is bounded: four parts that are being filled (what is written out of order beyond them goes to a local file), and
:data:`_IN_FLIGHT` bytes under way. An object of one part is one PUT. Nothing appears before :meth:`PartWriter.commit`.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

from artifactfs.buckets import Bucket, Multipart
from artifactfs.errors import ArtifactFSError, UsageError, from_os_error

_STREAMS = 4
"""Parts of one object under way at once."""
_IN_FLIGHT = 40 << 20
_FILLING = 4

# A service takes 10,000 parts, which must not be small where an object is large: 16 GiB in parts of 8 MiB, then larger ones.
_SCHEDULE = ((2000, 8 << 20), (4000, 64 << 20), (4000, 512 << 20))
_SIZES = [size for count, size in _SCHEDULE for _ in range(count)]
_STARTS = [0, *accumulate(_SIZES)]


class PartWriter:
    """Writes one object of ``bucket``; see :class:`artifactfs.objects.Writer`. ``key`` "": it is told at the commit."""

    def __init__(self, bucket: Bucket, key: str) -> None:
        self._bucket = bucket
        self._key = key
        self._lock = threading.Lock()
        self._filling: dict[int, _Part] = {}
        self._done: set[int] = set()
        self._size = 0
        self._spill: _Spill | None = None
        self._sending: _Sending | None = None

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        while view:
            number = bisect_right(_STARTS, offset) - 1
            if number >= len(_SIZES):
                raise UsageError(f"an object in a bucket has at most {_STARTS[-1]} bytes")
            at = offset - _STARTS[number]
            piece = view[: _SIZES[number] - at]
            self._write_part(number, at, piece)
            view = view[len(piece) :]
            offset += len(piece)

    def commit(self, key: str) -> None:
        """Send what is left, and make it appear."""
        self._key = key
        count = bisect_right(_STARTS, self._size - 1) if self._size else 0
        if count <= 1 and self._sending is None:
            part = self._filling.pop(0, None)
            self._bucket.put(key, part.content(self._size) if part is not None else b"")
        else:
            sending = self._start()
            for number in range(count):
                if number not in self._done:
                    length = min(_SIZES[number], self._size - _STARTS[number])
                    part = self._filling.pop(number, None)
                    sending.send(number, part.content(length) if part is not None else bytes(length))
            sending.complete()
        self._forget()

    def abort(self) -> None:
        """As the protocol says. What cannot be removed now, for want of a network, gc removes."""
        if self._sending is not None:
            with contextlib.suppress(ArtifactFSError):
                self._sending.abort()
        self._forget()

    def _write_part(self, number: int, at: int, piece: memoryview) -> None:
        with self._lock:
            self._size = max(self._size, _STARTS[number] + at + len(piece))
            part = self._filling.get(number)
            if part is None:
                part = self._filling[number] = self._new_part(number)
            part.write(at, piece)
            full = part.written == _SIZES[number] and self._key != ""
            if not full or (self._start().ordered and number != len(self._done)):
                return
            del self._filling[number]
            self._done.add(number)
            sending = self._start()
            if sending.ordered:
                sending.send(number, part.content(_SIZES[number]))
                return
        sending.send(number, part.content(_SIZES[number]))

    def _new_part(self, number: int) -> _Part:
        if self._key and sum(part.spill is None for part in self._filling.values()) < _FILLING:
            return _Part(None, 0)
        if not self._key and number == 0:
            return _Part(None, 0)
        if self._spill is None:
            self._spill = _Spill()
        return _Part(self._spill, _STARTS[number])

    def _start(self) -> _Sending:
        if self._sending is None:
            self._sending = _Sending(self._bucket.multipart(self._key))
        return self._sending

    def _forget(self) -> None:
        if self._sending is not None:
            self._sending.close()
            self._sending = None
        if self._spill is not None:
            self._spill.close()
            self._spill = None
        self._filling = {}


class _Part:
    """Bytes of one part, in memory or in the local file; ``written`` of them. Ranges are disjoint."""

    __slots__ = ("_buffer", "_start", "spill", "written")

    def __init__(self, spill: _Spill | None, start: int) -> None:
        self.spill = spill
        self.written = 0
        self._start = start
        self._buffer = bytearray()

    def write(self, at: int, piece: memoryview) -> None:
        self.written += len(piece)
        if self.spill is not None:
            self.spill.write(self._start + at, piece)
            return
        if at > len(self._buffer):
            self._buffer.extend(bytes(at - len(self._buffer)))
        self._buffer[at : at + len(piece)] = piece

    def content(self, size: int) -> bytearray:
        """All ``size`` bytes; zeros where nothing was written."""
        if self.spill is not None:
            self._buffer = self.spill.read(self._start, size)
        self._buffer.extend(bytes(size - len(self._buffer)))
        return self._buffer


class _Spill:
    """A local file for what was written out of order."""

    def __init__(self) -> None:
        try:
            self._file = tempfile.TemporaryFile(prefix="artifactfs-")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise from_os_error(error, f"making a file in {tempfile.gettempdir()}") from None

    def write(self, offset: int, piece: memoryview) -> None:
        try:
            while piece:
                done = os.pwrite(self._file.fileno(), piece, offset)
                piece, offset = piece[done:], offset + done
        except OSError as error:
            raise from_os_error(error, f"writing to a file in {tempfile.gettempdir()}") from None

    def read(self, offset: int, size: int) -> bytearray:
        """At most ``size`` bytes."""
        found = bytearray()
        while len(found) < size and (data := os.pread(self._file.fileno(), size - len(found), offset + len(found))):
            found += data
        return found

    def close(self) -> None:
        self._file.close()


class _Sending:
    """Sends the parts of an upload, several at once; :meth:`send` waits while too many bytes are under way."""

    def __init__(self, upload: Multipart) -> None:
        self.ordered = upload.ordered
        self._upload = upload
        self._pool = ThreadPoolExecutor(1 if upload.ordered else _STREAMS, thread_name_prefix="part")
        self._changed = threading.Condition()
        self._bytes = 0
        self._error: BaseException | None = None

    def send(self, number: int, data: bytes | bytearray) -> None:
        """Raises what an earlier part failed with."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or not self._bytes or self._bytes + len(data) <= _IN_FLIGHT)
            self._raise()
            self._bytes += len(data)
        self._pool.submit(self._part, number, data)

    def complete(self) -> None:
        """Wait for all parts, then make the object appear."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or not self._bytes)
            self._raise()
        self._upload.complete()

    def abort(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._upload.abort()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _part(self, number: int, data: bytes | bytearray) -> None:
        try:
            self._upload.part(number, data)
        except BaseException as error:  # told to whoever sends the next part
            with self._changed:
                self._error = self._error or error
        finally:
            with self._changed:
                self._bytes -= len(data)
                self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
