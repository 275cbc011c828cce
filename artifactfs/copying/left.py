"""What of a version a store cannot hold, said in one line."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple


class Kind(NamedTuple):
    """One thing and several of it."""

    one: str
    many: str


SYMLINK = Kind("symlink", "symlinks")
EXECUTABLE = Kind("executable bit", "executable bits")
EMPTY = Kind("empty directory", "empty directories")
USER = Kind("run that used it", "runs that used it")
LINK = Kind("link to it", "links to it")
TAG = Kind("tag", "tags")
ALIAS = Kind("alias", "aliases")


class LeftOut:
    """What was left out of one version or collection. For one thread."""

    def __init__(self) -> None:
        self._counted: Counter[Kind] = Counter()
        self._named: dict[str, None] = {}

    def count(self, kind: Kind) -> None:
        """One more of a kind."""
        self._counted[kind] += 1

    def name(self, what: str) -> None:
        """A thing of its own."""
        self._named[what] = None

    def said(self) -> str:
        """All of it in words, "" for nothing."""
        counted = (f"{number} {kind.one if number == 1 else kind.many}" for kind, number in self._counted.items())
        return ", ".join([*counted, *self._named])
