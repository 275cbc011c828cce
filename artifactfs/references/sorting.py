"""Many entries in the order of a tree, in bounded memory: sorted runs on disk, merged as they are read.

A bucket lists its keys in an order of its own: ``a-b`` before ``a/c`` in S3, which in a tree is the other way round.
"""

from __future__ import annotations

import heapq
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Generic, TypeVar

import msgspec

from artifactfs.errors import from_os_error
from artifactfs.model import Ref
from artifactfs.references.source import Expanded

_RUN = 50_000
"""Entries that are sorted at a time: some 50 MB."""
_PIECE = 64 << 10
"""Bytes of a run that are read at a time: 10,000,000 entries make 200 runs."""


_T = TypeVar("_T")


class _Record(msgspec.Struct, frozen=True, array_like=True, gc=False):
    path: str
    ref: Ref
    block_list: bytes


_ENCODE = msgspec.msgpack.Encoder().encode
_DECODE = msgspec.msgpack.Decoder(_Record).decode


class Sorted(Generic[_T]):
    """``records`` in the order of a text that ``order`` gives for each; it can be iterated again and again.

    All are taken at once. Up to 50,000 are kept in memory; more in an unnamed file in ``folder``, which is made if need be.
    ``encode`` and ``decode`` give a record's bytes and take them. Of equal ones the first taken comes first.
    """

    def __init__(
        self,
        records: Iterable[_T],
        folder: str,
        order: Callable[[_T], str],
        encode: Callable[[_T], bytes],
        decode: Callable[[memoryview], _T],
        run: int = _RUN,
    ) -> None:
        source = iter(records)
        self._encode = encode
        self._decode = decode
        self._order = order
        self._file: IO[bytes] | None = None
        self._runs: list[tuple[int, int]] = []
        self._last: list[_T] = []
        while batch := list(itertools.islice(source, run)):
            if self._last:
                self._spill(folder)
            self._last = sorted(batch, key=self._order)

    def __iter__(self) -> Iterator[_T]:
        if not self._runs:
            return iter(self._last)
        return heapq.merge(*(self._read(start, end) for start, end in self._runs), self._last, key=self._order)

    def _spill(self, folder: str) -> None:
        """The batch at hand goes to disk."""
        try:
            if self._file is None:
                os.makedirs(folder, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it goes with this object
            start = self._file.tell()
            for entry in self._last:
                data = self._encode(entry)
                self._file.write(len(data).to_bytes(4, "little"))
                self._file.write(data)
            self._runs.append((start, self._file.tell()))
            self._file.flush()
        except OSError as error:
            raise from_os_error(error, f"sorting entries in {folder}") from None

    def _read(self, position: int, end: int) -> Iterator[_T]:
        assert self._file is not None
        fd = self._file.fileno()
        held = b""
        while position < end or held:
            if len(held) < 4 or len(held) < 4 + int.from_bytes(held[:4], "little"):
                more = os.pread(fd, min(_PIECE, end - position), position)
                position += len(more)
                held += more
                if not more:
                    raise OSError(f"a file of sorted entries ends at byte {position}")
                continue
            offset = 0
            while len(held) - offset >= 4:
                size = int.from_bytes(held[offset : offset + 4], "little")
                if len(held) - offset < 4 + size:
                    break
                yield self._decode(memoryview(held)[offset + 4 : offset + 4 + size])
                offset += 4 + size
            held = held[offset:]


class SortedEntries(Sorted[Expanded]):
    """References by path, directories before what sorts after their names."""

    def __init__(self, entries: Iterable[Expanded], folder: str, run: int = _RUN) -> None:
        super().__init__(entries, folder, lambda entry: tree_order(entry.path), _encoded, _decoded, run)


def _encoded(entry: Expanded) -> bytes:
    return _ENCODE(_Record(entry.path, entry.ref, entry.block_list))


def _decoded(data: memoryview) -> Expanded:
    record = _DECODE(data)
    return Expanded(record.path, record.ref, record.block_list)


def tree_order(path: str) -> str:
    """By components: no name has a NUL, and nothing sorts before it. Code points sort as the bytes of their UTF-8 do."""
    return path.replace("/", "\0")
