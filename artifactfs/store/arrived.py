"""What a commit to a remote store has sent so far, noted on this machine: the next attempt need not send it again.

Each pack that is durable adds a record to a file of the store and the collection: the contents in it, by id, and where they lie.
A commit that is done removes the file. Large contents need no record: their objects are named by content.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
from blake3 import blake3

from artifactfs.content import DIGEST_SIZE
from artifactfs.model import BLOCK, Extent, File
from artifactfs.names import ArtifactName
from artifactfs.objects import object_key
from artifactfs.store.native import NativeStore

log = logging.getLogger(__name__)

_KEPT = 7 * 86400.0
"""Seconds after which a record is of no use: `gc` removes what no version refers to sooner."""
_HEAD = 4 + DIGEST_SIZE  # of a record: its length and its BLAKE3
_AT_ONCE = 8

_Packed = tuple[bytes, int, int]
"""A content's id, its offset in the pack, its size."""


class Arrived:
    """The file for commits to the collection ``name`` of ``store``, in ``folder``. A disk that cannot keep it is no error."""

    def __init__(self, folder: Path, store: NativeStore, name: ArtifactName) -> None:
        self._store = store
        self._path = folder / blake3(f"{store.url}\n{name.path}".encode()).hexdigest()[:32]

    def contents(self) -> dict[bytes, File]:
        """The contents that arrived and are still there, which they now are for another grace period of `gc`."""
        packs = dict(self._records())
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            there = list(pool.map(lambda object: self._store.objects.refresh(object_key(object)), packs))
        return {
            id: File("", size, False, id, (Extent(object, offset, size),))
            for (object, packed), found in zip(packs.items(), there, strict=True)
            if found
            for id, offset, size in packed
        }

    def add(self, object: bytes, files: list[File]) -> None:
        """The pack ``object`` is durable, and has ``files`` in it. For any thread."""
        packed = [(file.id, file.extents[0].offset, file.size) for file in files]
        body = msgspec.msgpack.encode((object, packed))
        with self._no_matter():
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.write(fd, len(body).to_bytes(4, "little") + blake3(body).digest() + body)
            finally:
                os.close(fd)

    def forget(self) -> None:
        """The commit is done."""
        with self._no_matter():
            self._path.unlink(missing_ok=True)

    def _records(self) -> Iterator[tuple[bytes, list[_Packed]]]:
        """What is whole of the file; what a crash cut short is passed over."""
        data = b""
        with self._no_matter():
            if time.time() - self._path.stat().st_mtime < _KEPT:
                data = self._path.read_bytes()
        at = 0
        while len(data) - at > _HEAD:
            size = int.from_bytes(data[at : at + 4], "little")
            body = data[at + _HEAD : at + _HEAD + size]
            if len(body) < size or blake3(body).digest() != data[at + 4 : at + _HEAD]:
                return
            object, packed = msgspec.msgpack.decode(body, type=tuple[bytes, list[_Packed]])
            yield object, [item for item in packed if len(item[0]) == DIGEST_SIZE and 0 < item[2] <= BLOCK]
            at += _HEAD + size

    @contextlib.contextmanager
    def _no_matter(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            pass
        except OSError as error:
            log.debug("what arrived is not noted: %s", error)
