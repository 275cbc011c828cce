"""Trees are pages: build, look up, list, walk, diff. SKELETON: signatures are settled, bodies are being written."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from artifactfs.model import Dir, Entry, Page


class Tree:
    """Reads the directories of stored versions. ``load`` gives a page's bytes, checked against its id. Threads may share it."""

    def __init__(self, load: Callable[[Page], bytes], cache_bytes: int = 64 << 20) -> None:
        self._load = load

    def lookup(self, directory: Dir, name: str) -> Entry | None:
        """The entry of that name, or None. Reads one page a level of the directory's index."""
        raise AssertionError

    def entries(self, directory: Dir, after: str = "") -> Iterator[Entry]:
        """The entries whose name sorts after ``after``, in ascending order of the names' UTF-8 bytes."""
        raise AssertionError

    def resolve(self, root: Dir, path: str) -> Entry | None:
        """The entry at a canonical relative path ("" is the root itself); symlinks are not followed. None if there is none."""
        raise AssertionError

    def walk(self, root: Dir) -> Iterator[tuple[str, Entry]]:
        """(relative path, entry) of everything below ``root``, a directory before its contents, in walk order."""
        raise AssertionError

    def diff(self, old: Dir, new: Dir) -> Iterator[tuple[str, Entry | None, Entry | None]]:
        """(path, old entry, new entry) wherever they differ, reading only pages that do. A directory that exists on one side
        only is followed by everything below it; one on both sides appears only through what differs in it."""
        raise AssertionError
