"""Bytes of one file as bytes of another without a copy on disk, where the file system can: XFS, btrfs, bcachefs, OCFS2."""

from __future__ import annotations

import fcntl
import struct
import sys

from artifactfs.model import Lying

_FICLONERANGE = 0x4020940D  # _IOW(0x94, 13, struct file_clone_range), linux/fs.h
_UNIT = 4096


def share(source: Lying, target: int, offset: int, size: int) -> int:
    """Have up to ``size`` bytes at ``offset`` of the open file ``target`` be those of ``source``; how many of them now are.

    Only whole units of 4096 bytes can be. OSError where the file system, or the system, cannot share at all.
    """
    if sys.platform != "linux":
        raise OSError("reflinks of ranges are Linux's")
    length = min(size, source.length) // _UNIT * _UNIT
    if length <= 0 or source.offset % _UNIT or offset % _UNIT:
        return 0
    fcntl.ioctl(target, _FICLONERANGE, struct.pack("=qQQQ", source.fd, source.offset, length, offset))
    return length
