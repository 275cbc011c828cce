"""Who is fetching what: so that processes which share a cache do not fetch the same block at the same time.

A claim is a lock on one byte of the file ``claims``, at a place that follows from the block. It belongs to an opening of the
file, not to a thread, and ends with its process. It is advice: nothing is wrong if two fetch one block, or if two share a byte.
"""

from __future__ import annotations

import errno
import fcntl
import struct

from artifactfs.cache.layout import Fd, Tree, open_update

_MASK = (1 << 56) - 1
_FLOCK = struct.Struct("hhqqi")  # struct flock of Linux on 64 bits: type, whence, start, length, process (must be 0)
_SET = getattr(fcntl, "F_OFD_SETLK", None)  # Linux only


class Claims:
    """The claims in the cache ``tree``. Threads may share it; OSError if it cannot be opened."""

    def __init__(self, tree: Tree) -> None:
        self._file: Fd = open_update("claims", tree.top)

    def take(self, key: bytes, block: int) -> bool:
        """Whether no other process has claimed the block; then it is ours until it is given back."""
        return self._lock(fcntl.F_WRLCK, key, block)

    def give_back(self, key: bytes, block: int) -> None:
        self._lock(fcntl.F_UNLCK, key, block)

    def _lock(self, kind: int, key: bytes, block: int) -> bool:
        if _SET is None:
            return True
        place = (int.from_bytes(key[:7], "little") + block) & _MASK
        try:
            fcntl.fcntl(self._file.number, _SET, _FLOCK.pack(kind, 0, place, 1, 0))
        except OSError as error:  # any other one: a file system without locks
            return error.errno not in (errno.EAGAIN, errno.EACCES)
        return True
