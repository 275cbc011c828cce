"""Records of a store as they were last read, kept beside the cache's blocks, for when the store cannot be asked.

``<root>/records/<name>`` holds one: 32 bytes of BLAKE3 (derive-key mode, :data:`CONTEXT`) over the name and the record, then the
record. The name is a hash of the store's URL and the record's key, so that stores are not mixed up. A file is replaced by rename
and never synced: one that was torn, or changed behind our back, fails its check and is as good as none. The newest
:data:`MOST` are kept, none of more than :data:`LARGEST` bytes; nothing of it counts against the limit of the cache.

Threads and processes may share one. No method raises: what cannot be kept is not kept.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from blake3 import blake3

from artifactfs.content import DIGEST_SIZE
from artifactfs.forking import new_lock

CONTEXT = "artifactfs 2026-11 cached record v1"
MOST = 1024
LARGEST = 256 << 10
"""Bytes: 256 MiB in all at worst, where most records have one KiB."""


class Records:
    """The records of the store at ``url`` in the cache at ``root``. Nothing is created before the first is put."""

    def __init__(self, root: Path, url: str) -> None:
        self._folder = root / "records"
        self._url = url
        self._lock = new_lock()
        self._put: dict[str, bytes] = {}  # by name, the check of what was last put: most are read again and again

    def get(self, key: str) -> bytes | None:
        """The record, or None."""
        name = self._name(key)
        try:
            fd = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            owned = os.fstat(fd).st_uid == os.geteuid()
            data = os.read(fd, LARGEST + DIGEST_SIZE + 1) if owned else b""
        except OSError:
            return None
        finally:
            os.close(fd)
        check, record = data[:DIGEST_SIZE], data[DIGEST_SIZE:]
        return record if check == _check(name, record) else None

    def put(self, key: str, record: bytes) -> None:
        """Keep ``record``."""
        name = self._name(key)
        check = _check(name, record)
        if len(record) > LARGEST or self._put.get(name) == check:
            return
        with contextlib.suppress(OSError), self._lock:
            self._write(name, check + record)
            self._put[name] = check

    def remove(self, key: str) -> None:
        """Forget the record."""
        name = self._name(key)
        with contextlib.suppress(OSError), self._lock:
            self._put.pop(name, None)
            os.unlink(self._folder / name)

    def _write(self, name: str, data: bytes) -> None:
        os.makedirs(self._folder, 0o700, exist_ok=True)
        temporary = self._folder / f"tmp-{secrets.token_hex(8)}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
            new = not os.path.lexists(self._folder / name)
            os.rename(temporary, self._folder / name)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        if new:
            self._trim()

    def _trim(self) -> None:
        """Remove the oldest; what a killed process left of a write is among them one day."""
        with os.scandir(self._folder) as found:
            names = [entry.name for entry in found]
        if len(names) <= MOST:
            return
        times = []
        for name in names:
            with contextlib.suppress(OSError):
                times.append((os.lstat(self._folder / name).st_mtime_ns, name))
        for _, name in sorted(times)[: max(0, len(times) - MOST)]:
            with contextlib.suppress(OSError):
                os.unlink(self._folder / name)

    def _name(self, key: str) -> str:
        return blake3(f"{self._url}\0{key}".encode("utf-8", "surrogateescape")).hexdigest()


def _check(name: str, record: bytes) -> bytes:
    return blake3(name.encode() + record, derive_key_context=CONTEXT).digest()
