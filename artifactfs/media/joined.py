"""Tables made of tables: two that are joined by a column, and parts that follow one another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Self

from artifactfs.errors import UsageError
from artifactfs.media.base import Media, Plan, Source, Stored, encode, shown
from artifactfs.media.table import ColumnKey, Table
from artifactfs.names import entry_path


class PartitionedTable(Media):
    """The tables below a directory of an artifact, one after the other, in order of their paths.

    The parts are added like any other table, as ``<parts_path>/<name>``.
    """

    kind: ClassVar[str] = "partitioned-table"

    def __init__(self, parts_path: str) -> None:
        self.parts_path = entry_path(parts_path)
        self._source: Source | None = None
        self._parts: list[str] = []

    @property
    def parts(self) -> list[str]:
        """The entries of the parts; none for a table that is not read from an artifact."""
        return list(self._parts)

    def iterrows(self) -> Iterator[tuple[int, list[Any]]]:
        """(number, row), one part in memory at a time. ValueError if parts have other columns than the first."""
        number, columns = 0, None
        for path in self._parts:
            part = self._part(path)
            if columns is not None and part.columns != columns:
                raise UsageError(f"Table parts have non-matching columns. {path!r} has {part.columns}, others {columns}")
            columns = part.columns
            for row in part.data:
                yield number, row
                number += 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PartitionedTable) and self.parts_path == other.parts_path

    def __hash__(self) -> int:
        return hash(self.parts_path)

    def __repr__(self) -> str:
        return f"PartitionedTable({self.parts_path!r})"

    def describe(self, plan: Plan) -> dict[str, Any]:
        for path in self._parts:  # read from another artifact: the parts come along
            plan.document(path, self._part(path).describe(plan))
        return {"_type": self.kind, "parts_path": self.parts_path}

    @classmethod
    def read(cls, stored: Stored) -> Self:
        path = stored.field("parts_path", str)
        try:
            table = cls(path)
        except UsageError:
            raise stored.malformed(f"{shown(path)} is no path of a directory") from None
        table._source = stored.source
        table._parts = [entry.path for entry in stored.source.below(table.parts_path) if entry.path.endswith(".table.json")]
        return table

    def _part(self, path: str) -> Table:
        assert self._source is not None
        part = self._source.read(path)
        if not isinstance(part, Table):
            raise self._source.malformed(path, "it is not a table")
        return part


class JoinedTable(Media):
    """Two tables, joined by a column of one name, or by a column of each.

    A table is a Table, a PartitionedTable, the entry of one that the artifact has already, or an entry of another artifact.
    """

    kind: ClassVar[str] = "joined-table"

    def __init__(self, table1: Any, table2: Any, join_key: str | Sequence[str]) -> None:
        keys = join_key if isinstance(join_key, (list, tuple)) else [join_key]
        if not all(isinstance(key, str) for key in keys) or (not isinstance(join_key, str) and len(keys) != 2):
            raise UsageError("JoinedTable join_key should be a string or a list of two strings")
        self._tables = (_table(table1, "table1"), _table(table2, "table2"))
        self._join_key = join_key if isinstance(join_key, str) else list(join_key)

    @property
    def table1(self) -> Any:
        return self._tables[0]

    @property
    def table2(self) -> Any:
        return self._tables[1]

    @property
    def join_key(self) -> str | list[str]:
        return self._join_key

    def iterrows(self) -> Iterator[tuple[int, list[Any]]]:
        """(number, row) of the inner join: the columns of the first table, then those of the second. UsageError for paths."""
        keys = self._join_key if isinstance(self._join_key, list) else [self._join_key] * 2
        first, second = (_rows(table) for table in self._tables)
        places = [columns.index(key) if key in columns else None for (columns, _), key in zip((first, second), keys, strict=True)]
        if None in places:
            raise UsageError(f"the tables cannot be joined by {self._join_key}: their columns are {first[0]} and {second[0]}")
        left, right = (place or 0 for place in places)
        matches: dict[Any, list[list[Any]]] = {}
        for row in second[1]:
            matches.setdefault(row[right], []).append(row)
        found = ([*row, *other] for row in first[1] for other in matches.get(row[left], ()))
        return enumerate(found)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JoinedTable) and (self._tables, self._join_key) == (other._tables, other._join_key)

    __hash__ = None  # type: ignore[assignment]

    def describe(self, plan: Plan) -> dict[str, Any]:
        with plan.inside(self):
            first, second = (_put(plan, table, number) for number, table in enumerate(self._tables, 1))
        return {"_type": self.kind, "table1": first, "table2": second, "join_key": self._join_key}

    @classmethod
    def read(cls, stored: Stored) -> Self:
        first, second = (stored.source.get(stored.field(key, str), stored.path) for key in ("table1", "table2"))
        try:
            return cls(first, second, stored.value.get("join_key"))
        except UsageError as error:
            raise stored.malformed(str(error)) from None


def _table(table: Any, what: str) -> Any:
    """A table as it is; that of an entry of another artifact."""
    if isinstance(table, (Table, PartitionedTable)) or (isinstance(table, str) and table.endswith("table.json")):
        return table
    owner = getattr(table, "owner", None)
    found = Source(owner()).get(table.path) if owner is not None else None
    if not isinstance(found, (Table, PartitionedTable)):
        raise UsageError(f"JoinedTable {what} should be an artifact path to a table or a Table object, not {shown(table)}")
    return found


def _put(plan: Plan, table: Any, number: int) -> str:
    """Plan one of the two tables, named by its content; returns its entry."""
    if isinstance(table, str):
        if not plan.exists(table):
            raise UsageError(
                f"JoinedTable table:{table} not found in artifact. Add it with Artifact.add(<table>, {table!r}) first"
            )
        return table
    value = table.describe(plan)
    checksum = hashlib.md5(encode(value), usedforsecurity=False).hexdigest()[:20]
    return plan.document(table.entry_name(f"t{number}_{checksum}"), value)


def _rows(table: Any) -> tuple[list[ColumnKey], list[list[Any]]]:
    if isinstance(table, Table):
        return table.columns, table.data
    if isinstance(table, PartitionedTable) and table.parts:
        return table._part(table.parts[0]).columns, [row for _, row in table.iterrows()]
    raise UsageError(f"{shown(table)} is a path: log the artifact and get() the JoinedTable to read its rows")
