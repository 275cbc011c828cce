"""Listings that are read as far as they are asked for, in pages."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar, overload

from artifactfs.errors import UsageError

T = TypeVar("T")


class Pages(Sequence[T], Generic[T]):
    """The items of ``source``, ``per_page`` read at a time and each once. ``len()`` reads all. For one thread.

    ``more`` says whether another page may be there, and :meth:`load_page` reads it.
    """

    def __init__(self, source: Callable[[], Iterator[T]], per_page: int = 50) -> None:
        if per_page < 1:
            raise UsageError(f"per_page must be at least 1, not {per_page}")
        self.per_page = per_page
        self.more = True
        self._rest = source()
        self._loaded: list[T] = []

    def load_page(self) -> list[T]:
        """Read the next page and return it; an empty one at the end."""
        page = list(itertools.islice(self._rest, self.per_page)) if self.more else []
        self.more = len(page) == self.per_page
        self._loaded += page
        return page

    def __iter__(self) -> Iterator[T]:
        at = 0
        while at < len(self._loaded) or self.load_page():
            yield self._loaded[at]
            at += 1

    def __len__(self) -> int:
        while self.more:
            self.load_page()
        return len(self._loaded)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return list(self)[index]
        if index < 0:
            return list(self)[index]
        while index >= len(self._loaded) and self.load_page():
            pass
        return self._loaded[index]

    def __eq__(self, other: Any) -> bool:
        """As lists are: a listing equals a list of the same items."""
        return list(self) == list(other) if isinstance(other, (list, Pages)) else NotImplemented

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"[{', '.join(map(repr, self._loaded))}{', …' if self.more else ''}]"
