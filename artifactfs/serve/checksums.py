"""The MD5 of stored contents: what W&B's clients compare files with.

An entry that was stored with an MD5 or XXH128 digest has what a manifest needs. One with a BLAKE3 digest (what artifactfs makes
by itself) is read, checked against its content id, when its MD5 is asked for the first time; that is remembered by content id
in the data directory, and so costs one read of each content in the life of a server.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator

from artifactfs.errors import IntegrityError
from artifactfs.model import BLOCK, MD5, XXH128, File
from artifactfs.reader import Reader
from artifactfs.serve.state import State
from artifactfs.store.native import NativeStore

PIECE = 4 * BLOCK
"""Bytes read at a time."""


class Checksums:
    """Threads may share one."""

    def __init__(self, store: NativeStore, reader: Reader, state: State) -> None:
        self._store = store
        self._reader = reader
        self._state = state

    def known(self, file: File) -> str | None:
        """The base64 MD5 of a content if it need not be read for that."""
        if file.algorithm == MD5:
            return file.checksum
        if not file.size:
            return base64.b64encode(hashlib.md5(usedforsecurity=False).digest()).decode()
        found = self._state.checksum(file.id)
        return None if found is None else base64.b64encode(found).decode()

    def digest(self, file: File, where: str) -> str:
        """The digest of an entry as a manifest has it: XXH128 where it has one, else MD5. Reads the content if need be."""
        return file.checksum if file.algorithm == XXH128 else self.md5(file, where)

    def md5(self, file: File, where: str) -> str:
        """The base64 MD5 of a content; ``where`` names it in errors."""
        found = self.known(file)
        if found is None:
            for _ in self.reading(file, where):
                pass
            found = self.known(file)
            assert found is not None
        return found

    def reading(self, file: File, where: str) -> Iterator[int]:
        """Work out the MD5 of a content that is not known, and remember it; yields the bytes read so far, after each piece."""
        hasher = hashlib.md5(usedforsecurity=False)
        handle = self._reader.open(file, where)
        try:
            offset = 0
            while offset < file.size:
                data = handle.read(offset, PIECE)
                if not data:
                    raise IntegrityError(f"{where} ends after {offset} of {file.size} bytes")
                hasher.update(data)
                offset += len(data)
                yield offset
        finally:
            handle.close()
        self._state.add_checksum(file.id, hasher.digest())
