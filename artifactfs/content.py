"""Content ids and digests: one pass over a content gives its id, its block list, and MD5 or XXH128 if asked.

A content of at most one block has as id the BLAKE3 of its bytes. A larger one has BLAKE3, in derive-key mode with
:data:`LIST_CONTEXT`, over its size (8 bytes, little endian) and its blocks' BLAKE3 digests (32 bytes each) in order. The
context makes sure that no file's bytes can pass for a list. The digests in order, back to back, are the *block list*:
it is checked against the id, and then every block against the list.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
import struct
from collections.abc import Iterable
from typing import Protocol

import xxhash
from blake3 import blake3

from artifactfs.errors import IntegrityError, UsageError
from artifactfs.model import ALGORITHMS, BLAKE3, BLOCK, MD5, XXH128, block_count

LIST_CONTEXT = "artifactfs 2026-11 block list v1"
DIGEST_SIZE = 32
MAX_CONTENT = 16 << 40
"""Bytes of one content at most: the largest file of ext4. Its block list is read whole, and has 512 MiB then."""

EMPTY_ID = blake3(b"").digest()


class _Hash(Protocol):
    def update(self, data: bytes | memoryview, /) -> object: ...
    def digest(self) -> bytes: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Fingerprint:
    """What one pass over a content found: ``id``, ``size``, ``blocks`` (the block list, empty for at most one block) and
    ``checksum`` (base64, empty for BLAKE3)."""

    id: bytes
    size: int
    blocks: bytes
    algorithm: str
    checksum: str

    @property
    def digest(self) -> str:
        """The checksum users see, base64."""
        return self.checksum or base64.b64encode(self.id).decode()


def check_algorithm(algorithm: str) -> str:
    """The algorithm's name in upper case; :class:`UsageError` for one we do not have (W&B would silently use MD5)."""
    name = algorithm.upper()
    if name not in ALGORITHMS:
        raise UsageError(f"digest algorithm {algorithm!r} is not known; use one of {', '.join(ALGORITHMS)}")
    return name


def block_digest(data: bytes | bytearray | memoryview) -> bytes:
    """The 32-byte BLAKE3 of one block."""
    return blake3(data).digest()


def list_id(size: int, blocks: bytes) -> bytes:
    """The content id of a content of ``size`` bytes (more than one block) whose block list is ``blocks``."""
    return blake3(struct.pack("<Q", size) + blocks, derive_key_context=LIST_CONTEXT).digest()


def content_id(size: int, blocks: bytes) -> bytes:
    """The content id from the block list alone, whatever the size: a single block's digest is the id itself."""
    return list_id(size, blocks) if size > BLOCK else blocks or EMPTY_ID


class Checksum:
    """The running MD5 or XXH128 of a content; nothing for BLAKE3, whose digest is the content id."""

    def __init__(self, algorithm: str) -> None:
        self.algorithm = check_algorithm(algorithm)
        self._hash = _new_hash(self.algorithm)
        self.needed = self._hash is not None

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes."""
        if self._hash is not None:
            self._hash.update(data)

    def finish(self) -> str:
        """The checksum, base64; "" for BLAKE3."""
        return base64.b64encode(self._hash.digest()).decode() if self._hash is not None else ""


class EntryChecksum:
    """The running checksum of a content as its entry has it: MD5 or XXH128, and for BLAKE3 the content id."""

    def __init__(self, algorithm: str) -> None:
        self._checksum = Checksum(algorithm)
        self._hasher = Hasher()
        self._buffer = bytearray()

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes."""
        if self._checksum.needed:
            self._checksum.update(data)
        elif not self._buffer and len(data) == BLOCK:
            self._hasher.block(data)
        else:
            self._buffer += data
            while len(self._buffer) >= BLOCK:
                self._hasher.block(bytes(self._buffer[:BLOCK]))
                del self._buffer[:BLOCK]

    def finish(self) -> str:
        """The checksum, base64. May be asked again; nothing can be taken after it."""
        if self._buffer:
            self._hasher.block(bytes(self._buffer))
            self._buffer.clear()
        return self._checksum.finish() or self._hasher.finish().digest


def fingerprint(data: bytes | memoryview, algorithm: str = BLAKE3) -> Fingerprint:
    """The fingerprint of a content that is in memory."""
    if len(data) <= BLOCK:  # as most are: no need for what follows
        checksum = Checksum(algorithm)
        checksum.update(data)
        return Fingerprint(blake3(data).digest(), len(data), b"", checksum.algorithm, checksum.finish())
    hasher = Hasher(algorithm)
    view = memoryview(data)
    for start in range(0, len(view), BLOCK):
        hasher.block(view[start : start + BLOCK])
    return hasher.finish()


def manifest_digest(entries: Iterable[tuple[str, str]], algorithm: str) -> str:
    """W&B's digest of a version, hex: MD5 (or XXH128) over its ``(path, entry digest)`` pairs, which come sorted by path."""
    hasher = _new_hash(algorithm)
    if hasher is None:
        raise UsageError(f"manifest digests are MD5 or XXH128, not {algorithm}")
    hasher.update(b"wandb-artifact-manifest-v1\n")
    for path, digest in entries:
        hasher.update(f"{path}:{digest}\n".encode())
    return hasher.digest().hex()


def check_block_list(id: bytes, size: int, blocks: bytes, where: str) -> bytes:
    """``blocks``, once it is known to be the block list of the content ``id``; else :class:`IntegrityError`."""
    if len(blocks) != DIGEST_SIZE * block_count(size) or list_id(size, blocks) != id:
        raise IntegrityError(f"the block list of {where} does not match its content id {id.hex()}")
    return blocks


class Hasher:
    """Fingerprints a content given block by block, in order. Every block but the last is :data:`BLOCK` bytes."""

    def __init__(self, algorithm: str = BLAKE3) -> None:
        self.algorithm = check_algorithm(algorithm)
        self._checksum = Checksum(self.algorithm)
        self._blocks = bytearray()
        self._size = 0

    def block(self, data: bytes | memoryview) -> None:
        """Take the next block."""
        self._blocks += blake3(data).digest()
        self._size += len(data)
        self._checksum.update(data)

    def finish(self) -> Fingerprint:
        """The fingerprint of all blocks taken."""
        blocks = bytes(self._blocks)
        large = blocks if self._size > BLOCK else b""
        return Fingerprint(content_id(self._size, blocks), self._size, large, self.algorithm, self._checksum.finish())


def _new_hash(algorithm: str) -> _Hash | None:
    if algorithm == MD5:
        return hashlib.md5(usedforsecurity=False)
    if algorithm == XXH128:
        return xxhash.xxh3_128()
    return None


class CheckedBlocks:
    """Serves ranges of a file's blocks, each block checked before any byte of it is served for the first time.

    What was checked is remembered until the file is another one or its change time moves: from then on every block is checked
    again. Threads may share one; the worst a race costs is a second check.
    """

    def __init__(self) -> None:
        self._stamp = (-1, -1)
        self._good: set[int] = set()

    def read(self, fd: int, position: int, length: int, start: int, size: int, digest: bytes) -> bytes | None:
        """``size`` bytes from ``start`` of the block that lies at ``position`` of ``fd`` and is ``length`` long.

        None if the block's BLAKE3 is not ``digest``, or the file ends before it does. ``position`` identifies the block.
        """
        status = os.fstat(fd)
        stamp = (status.st_ino, status.st_ctime_ns)
        if stamp != self._stamp:
            self._good = set()
            self._stamp = stamp
        good = self._good
        if position in good:
            data = os.pread(fd, size, position + start)
            return data if len(data) == size else None
        block = os.pread(fd, length, position)
        if len(block) != length or blake3(block).digest() != digest:
            return None
        good.add(position)
        return block if size == length else block[start : start + size]
