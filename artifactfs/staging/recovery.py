"""What is done to the table and the data files before a stage is used again.

``kill -9`` leaves little to do: a truncation that had begun is finished, and data files that no node has are removed. After the
machine itself went down, the data files may lack what was not synced, although the journal speaks of it:

- a file that is shorter than the journal knows gets its length back, so that what is not local is the base's again;
- in blocks that are said to be local but were never synced, holes are filled from the base; a block that is all hole counts as
  not local;
- what was stored ahead of a commit may be newer than what is left of the file: it is not used;
- of a file that a commit has stored, only the blocks that are known to have changed since are taken from the data file.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

import msgspec

from artifactfs.model import BLOCK
from artifactfs.reader import Reader
from artifactfs.staging.data import Below, DataDir, DataFile, holes, write_all
from artifactfs.staging.nodes import NOT_CUTTING, FileNode, Namespace

log = logging.getLogger(__name__)


def boot_id() -> str:
    """The running system's id: another one means that what was not synced may be lost."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def mend(space: Namespace, data: DataDir, reader: Reader, where: str) -> set[int]:
    """Make table and data files agree. Returns the numbers of the data files that are not needed any more, to be removed once the
    table is durable. ``where`` is for messages."""
    files = [node for node in space.nodes.values() if isinstance(node, FileNode) and node.data]
    there = data.numbers()
    boot = boot_id()
    crashed = boot != space.header.boot
    for node in files:
        if node.data not in there:
            log.warning("data file %d of inode %d in %s is lost; what was written to it is too", node.data, node.ino, where)
            data.create(node.data)
        if node.cutting != NOT_CUTTING:
            _resize(data, node, node.cutting)
            node.cutting = NOT_CUTTING
        if crashed:
            node.early = None  # the data file may have lost what was stored
        if crashed or node.data not in there:
            _distrust(node, data, reader, where)
    numbers = [ino for ino in space.nodes if ino < space.header.next_id or not ino >> 62]
    used = max([*numbers, *(node.data for node in files)], default=0)
    space.header = msgspec.structs.replace(space.header, boot=boot, next_id=max(space.header.next_id, used + 1))
    return there - {node.data for node in files}


def _distrust(node: FileNode, data: DataDir, reader: Reader, where: str) -> None:
    if node.entry is None:
        return
    if node.local is None:
        node.fall_back()
    if data.stat(node.data).st_size < node.floor:
        _resize(data, node, node.floor)
    if not node.fresh:
        return
    below = Below(reader, node.entry, where)
    try:
        file = data.open(node.data)
        for block in sorted(node.fresh):
            _fill(node, file, below, block)
    finally:
        below.close()


def _fill(node: FileNode, file: DataFile, below: Below, block: int) -> None:
    start = block * BLOCK
    end = min(start + BLOCK, node.visible)
    missing = list(holes(file.fd, start, end))
    if missing == [(start, end)]:
        assert node.local is not None
        node.local.discard(block)
        node.dirty -= {block}
        node.fresh -= {block}
        return
    for low, high in missing:
        write_all(file.fd, below.read(low, high - low), low)


def _resize(data: DataDir, node: FileNode, size: int) -> None:
    file = data.open(node.data)
    os.ftruncate(file.fd, size)
