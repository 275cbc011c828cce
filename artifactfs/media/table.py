"""Tables: rows of values and media objects, with typed columns, and keys that link one table's rows to another's."""

from __future__ import annotations

import base64
import datetime
import decimal
import enum
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self, TypeAlias

from artifactfs.errors import UsageError, also
from artifactfs.media import columns
from artifactfs.media.arrays import put_arrays, read_arrays
from artifactfs.media.base import MAX_TABLE, DocumentAddition, Media, Plan, Stored, encode, kind_of, shown, wrong_type
from artifactfs.media.columns import (
    ANY,
    NUMBER,
    PRIMARY_KEY,
    STRING,
    TIMESTAMP,
    UNKNOWN,
    ArrayType,
    ColumnType,
    DictType,
    ListType,
    UnionType,
    as_type,
    holds,
    is_missing,
    milliseconds,
    read_type,
    time_of,
    type_of,
)
from artifactfs.media.columns import optional as or_none
from artifactfs.media.extras import is_array, is_frame, is_scalar, need, plain

ColumnKey: TypeAlias = str | int
LOG_MODES = ("IMMUTABLE", "MUTABLE", "INCREMENTAL")


class TableKey(str):
    """A value of another table's key column."""

    table: Table
    column: ColumnKey

    @classmethod
    def of(cls, value: str, table: Table, column: ColumnKey) -> TableKey:
        key = cls(value)
        key.table, key.column = table, column
        return key

    def column_type(self) -> ColumnType:
        return ForeignKeyType(self.table, self.column)


class TableIndex(int):
    """The number of a row of another table."""

    table: Table

    @classmethod
    def of(cls, value: int, table: Table) -> TableIndex:
        index = cls(value)
        index.table = table
        return index

    def get_row(self) -> dict[ColumnKey, Any]:
        """The row, by column."""
        return dict(zip(self.table.columns, self.table.data[self], strict=True))

    def column_type(self) -> ColumnType:
        return ForeignIndexType(self.table)


class ForeignKeyType(ColumnType):
    """Values of a column of another table."""

    def __init__(self, table: Table, column: ColumnKey) -> None:
        super().__init__("foreignKey")
        self.table = table
        self.column = column

    def join(self, other: ColumnType) -> ColumnType | None:
        return self if other in (STRING, self) else None

    def params(self, plan: Plan) -> dict[str, Any]:
        return {"table": put_table(plan, self.table), "col_name": self.column}

    def _key(self) -> Any:
        return id(self.table), self.column


class ForeignIndexType(ColumnType):
    """Numbers of rows of another table."""

    def __init__(self, table: Table) -> None:
        super().__init__("foreignIndex")
        self.table = table

    def join(self, other: ColumnType) -> ColumnType | None:
        return self if other in (NUMBER, self) else None

    def params(self, plan: Plan) -> dict[str, Any]:
        return {"table": put_table(plan, self.table)}

    def _key(self) -> Any:
        return id(self.table)


class TableType(ColumnType):
    """Tables whose columns have these types."""

    def __init__(self, types: ColumnType) -> None:
        super().__init__("table")
        self.types = types

    def join(self, other: ColumnType) -> ColumnType | None:
        types = self.types.join(other.types) if isinstance(other, TableType) else None
        return None if types is None else self if types == self.types else TableType(types)

    def params(self, plan: Plan) -> dict[str, Any]:
        return {"column_types": self.types.to_json(plan)}

    def _key(self) -> Any:
        return self.types


class Table(Media):
    """Rows of values: numbers, text, booleans, times, lists, mappings, arrays, images and other media, tables.

    ``data`` is rows, a 2-D array or a DataFrame; ``columns`` are names. ``dtype`` is one type for all columns or a list of one
    each; without it a column takes the type of its first value, and another one later is a TypeError unless
    ``allow_mixed_types``. None (and NaN) is allowed unless ``optional`` is False.
    """

    kind: ClassVar[str] = "table"
    max_document: ClassVar[int] = MAX_TABLE
    MAX_ROWS: ClassVar[int] = 10000
    MAX_ARTIFACT_ROWS: ClassVar[int] = 200000
    MAX_EMBEDDING: ClassVar[int] = 150

    data: list[list[Any]]
    columns: list[ColumnKey]

    def __init__(
        self,
        columns: Sequence[ColumnKey] | None = None,
        data: Any = None,
        rows: Iterable[Iterable[Any]] | None = None,
        dataframe: Any = None,
        dtype: Any = None,
        optional: bool | Sequence[bool] = True,
        allow_mixed_types: bool = False,
        log_mode: str | None = "IMMUTABLE",
    ) -> None:
        if log_mode not in LOG_MODES:
            raise UsageError(f"Invalid log_mode: {log_mode}. Must be one of {', '.join(LOG_MODES)}")
        self.log_mode = log_mode
        frame = dataframe if dataframe is not None else data if is_frame(data) else None
        given = _frame_rows(frame) if frame is not None else plain(data) if data is not None else rows or []
        names = list(frame.columns) if frame is not None else ["Input", "Output", "Expected"] if columns is None else columns
        self.columns = _checked_columns(names)
        wanted = ANY if allow_mixed_types else dtype
        kinds = [as_type(kind) for kind in self._per_column(wanted, "dtype")]
        options = self._per_column(optional, "optional")
        self._types = [or_none(kind) if option else kind for kind, option in zip(kinds, options, strict=True)]
        self.data = []
        if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
            raise wrong_type(f"data is rows, an array or a DataFrame, not {shown(given)}")
        for row in given:
            self.add_data(*row)

    def add_data(self, *data: Any) -> None:
        """Append a row. ValueError for another number of values than columns, TypeError for a value of another type."""
        if len(data) != len(self.columns):
            raise UsageError(f"This table expects {len(self.columns)} columns: {self.columns}, found {len(data)}")
        for column, value in zip(self.columns, data, strict=True):
            if isinstance(value, (TableKey, TableIndex)) and self._type(column) != PRIMARY_KEY:
                self.cast(column, type_of(value))
        self._types = [
            self._widened(kind, value, column) for column, kind, value in zip(self.columns, self._types, data, strict=True)
        ]
        self.data.append(
            [self._linked(kind, value, column) for column, kind, value in zip(self.columns, self._types, data, strict=True)]
        )

    def add_row(self, *row: Any) -> None:
        """As :meth:`add_data`, which is its newer name."""
        self.add_data(*row)

    def add_column(self, name: str, data: Any, optional: bool = False) -> None:
        """Append a column with a value for each row; to a table without columns it brings the rows."""
        self._refuse_incremental("add_column")
        values = list(data)
        if self.columns and len(values) != len(self.data):
            raise UsageError(f"Expected length {len(self.data)}, found {len(values)}")
        names = _checked_columns([*self.columns, name])
        kind = or_none(UNKNOWN) if optional else UNKNOWN
        for value in values:
            kind = self._widened(kind, value, name)
        if not self.columns:
            self.data = [[] for _ in values]
        for row, value in zip(self.data, values, strict=True):
            row.append(self._linked(kind, value, name))
        self.columns = names
        self._types.append(kind)

    def add_computed_columns(self, fn: Callable[[int, dict[ColumnKey, Any]], dict[str, Any]]) -> None:
        """Append columns with what ``fn(number, row)`` returns by their names; it must return all of them for every row."""
        self._refuse_incremental("add_computed_columns")
        computed = [fn(number, dict(zip(self.columns, row, strict=True))) for number, row in enumerate(self.data)]
        names = list(computed[0]) if computed else []
        for number, found in enumerate(computed):
            if found.keys() != set(names):
                raise UsageError(f"the function gave the columns {list(found)} for row {number}, and {names} for row 0")
        for name in names:
            self.add_column(name, [found[name] for found in computed])

    def get_column(self, name: ColumnKey, convert_to: str | None = None) -> Any:
        """The values of a column; ``convert_to="numpy"`` gives an array, images as their pixels."""
        if convert_to not in (None, "numpy"):
            raise UsageError(f"a column can be converted to 'numpy', not to {convert_to!r}")
        at = self._place(name)
        values = [row[at] for row in self.data]
        if convert_to is None:
            return values
        return need("numpy", "a column as an array").array([v.to_numpy() if hasattr(v, "to_numpy") else v for v in values])

    def get_dataframe(self) -> Any:
        """The table as a pandas DataFrame."""
        return need("pandas", "a table as a DataFrame").DataFrame.from_records(self.data, columns=self.columns)

    def get_index(self) -> list[TableIndex]:
        """The numbers of all rows, as links for other tables."""
        return [TableIndex.of(number, self) for number in range(len(self.data))]

    def index_ref(self, index: int) -> TableIndex:
        """The number of a row, as a link for another table."""
        if not 0 <= index < len(self.data):
            raise UsageError(f"the table has {len(self.data)} rows; there is no row {index}")
        return TableIndex.of(index, self)

    def iterrows(self) -> Iterator[tuple[TableIndex, list[Any]]]:
        """(number, row); the number is a link for other tables."""
        for number, row in enumerate(self.data):
            yield TableIndex.of(number, self), row

    def cast(self, col_name: ColumnKey, dtype: Any, optional: bool = False) -> ColumnType:
        """Give a column a type. TypeError if a value of it has another."""
        at = self._place(col_name)
        kind = or_none(as_type(dtype)) if optional else as_type(dtype)
        if isinstance(kind, (ForeignKeyType, ForeignIndexType)) and kind.table is self:
            raise UsageError("Cannot set a foreign table reference to same table.")
        if kind == PRIMARY_KEY and PRIMARY_KEY in self._types and self._types[at] != PRIMARY_KEY:
            raise UsageError(f"Cannot have multiple primary keys - {self.columns[self._types.index(PRIMARY_KEY)]} is one already")
        for row in self.data:
            kind = self._widened(kind, row[at], col_name)
        self._types[at] = kind
        for row in self.data:
            row[at] = self._linked(kind, row[at], col_name)
        return kind

    def set_pk(self, col_name: ColumnKey) -> None:
        """Make a column of text the key that other tables refer to."""
        self.cast(col_name, PRIMARY_KEY)

    def set_fk(self, col_name: ColumnKey, table: Table, table_col: ColumnKey) -> None:
        """Make a column refer to a column of another table."""
        table._place(table_col)
        self.cast(col_name, ForeignKeyType(table, table_col))

    def column_type(self) -> ColumnType:
        """The type of a column of such tables."""
        return TableType(self._row_type())

    def __len__(self) -> int:
        return len(self.data)

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Table) or self.columns != other.columns or len(self.data) != len(other.data):
            return False
        pairs = zip(self.data, other.data, strict=True)
        return all(_equal(a, b) for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<Table {len(self.data)} rows of {self.columns}>"

    def describe(self, plan: Plan) -> dict[str, Any]:
        if len(self.data) > self.MAX_ARTIFACT_ROWS:
            raise UsageError(
                f"the table has {len(self.data)} rows, and at most {self.MAX_ARTIFACT_ROWS} are stored in one; make a "
                "PartitionedTable of several, or raise Table.MAX_ARTIFACT_ROWS"
            )
        with plan.inside(self):
            stored = [self._stored_column(plan, at) for at in range(len(self.columns))]
            cells = [values for _, values in stored]
            types = DictType({str(name): kind for name, (kind, _) in zip(self.columns, stored, strict=True)})
            value = {
                "_type": self.kind,
                "columns": self.columns,
                "data": [list(row) for row in zip(*cells, strict=True)] if cells else [],
                "ncols": len(self.columns),
                "nrows": len(self.data),
                "column_types": types.to_json(plan),
                "log_mode": self.log_mode,
            }
        if self.log_mode == "INCREMENTAL":
            value |= {"increment_num": 0, "previous_increments_paths": []}
        return value

    @classmethod
    def read(cls, stored: Stored) -> Self:
        names = stored.field("columns", list)
        if not all(type(name) in (str, int) for name in names) or len(set(map(str, names))) != len(names):
            raise stored.malformed(f"{shown(names)} are not the names of columns")
        mode = stored.optional("log_mode", str) or "IMMUTABLE"
        table = cls(columns=names, log_mode=mode if mode in LOG_MODES else "IMMUTABLE")
        table._types = _read_types(stored, names)
        rows = stored.optional("data", list) or []
        for number, row in enumerate(rows):
            if not isinstance(row, list) or len(row) != len(names):
                raise stored.malformed(f"row {number} is {shown(row)} and not {len(names)} values")
        cells = [_read_column(stored, kind, [row[at] for row in rows]) for at, kind in enumerate(table._types)]
        table._types = [_without_place(kind) for kind in table._types]
        table.data = [list(row) for row in zip(*cells, strict=True)] if cells else [[] for _ in rows]
        table._link()
        if mode == "INCREMENTAL":
            table._add_increments(stored)
        return table

    def _add_increments(self, stored: Stored) -> None:
        """Make this increment the whole table: the rows of all entries ``<number>-<time>.<key>.table.json``, in turn."""
        folder, slash, base = stored.path.rpartition("/")
        match = _INCREMENT.fullmatch(base)
        if match is None:
            return
        found = []
        for entry in stored.source.below(folder) if folder else stored.source.all():
            other = _INCREMENT.fullmatch(entry.path.removeprefix(f"{folder}{slash}"))
            if other is not None and other[3] == match[3]:
                found.append((int(other[1]), int(other[2] or 0), entry.path))
        rows: list[list[Any]] = []
        for _, _, path in sorted(found):
            rows += self.data if path == stored.path else _increment(stored, path, self.columns)
        self.data = rows

    def _stored_column(self, plan: Plan, at: int) -> tuple[ColumnType, list[Any]]:
        """The type and the cells of a column in JSON. Arrays are put into a file; short ones of numbers are lists."""
        kind, name = self._types[at], self.columns[at]
        values = [plain(row[at]) for row in self.data]
        array = next((member for member in kind.members() if isinstance(member, ArrayType)), None)
        if array is not None and values:
            missing = [is_missing(value) for value in values]
            if len(array.shape) == 1 and array.shape[0] <= self.MAX_EMBEDDING and all(map(_is_finite, values)):
                listed: ColumnType = ListType(NUMBER, array.shape[0])
                kind = or_none(listed) if any(missing) else listed
            elif not any(missing):
                where = ArrayType(array.shape, put_arrays(plan, str(name), values))
                kind = (
                    UnionType(where if member is array else member for member in kind.members()) if kind is not array else where
                )
                return kind, [None] * len(values)
        found = []
        for number, value in enumerate(values):
            try:
                found.append(cell_json(value, plan))
            except UsageError as error:
                raise also(type(error)(f"row {number}, column {name!r}: {error}"), TypeError) from None
        return kind, found

    def _row_type(self) -> DictType:
        return DictType({str(name): kind for name, kind in zip(self.columns, self._types, strict=True)})

    def _place(self, column: ColumnKey) -> int:
        if column not in self.columns:
            raise UsageError(f"the table has no column {column!r}; it has {self.columns}")
        return self.columns.index(column)

    def _type(self, column: ColumnKey) -> ColumnType:
        return self._types[self._place(column)]

    def _per_column(self, value: Any, what: str) -> list[Any]:
        if not isinstance(value, list):
            return [value] * len(self.columns)
        if len(value) != len(self.columns):
            raise UsageError(f"{what} has {len(value)} items for {len(self.columns)} columns; give one each, or one for all")
        return value

    def _widened(self, kind: ColumnType, value: Any, column: ColumnKey) -> ColumnType:
        if holds(kind, value):
            return kind
        found = kind.widen(value, type_of(value))
        if found is None:
            raise wrong_type(
                f"Data row contained incompatible types: column {column!r} is {kind}, and {shown(value)} is {type_of(value)}"
            )
        return found

    def _linked(self, kind: ColumnType, value: Any, column: ColumnKey) -> Any:
        """A cell as a key or an index, in a column of those."""
        if kind == PRIMARY_KEY:
            return TableKey.of(value, self, column)
        if isinstance(kind, ForeignKeyType):
            return TableKey.of(value, kind.table, kind.column)
        return TableIndex.of(value, kind.table) if isinstance(kind, ForeignIndexType) else value

    def _link(self) -> None:
        for at, (kind, column) in enumerate(zip(self._types, self.columns, strict=True)):
            if kind == PRIMARY_KEY or isinstance(kind, (ForeignKeyType, ForeignIndexType)):
                for row in self.data:
                    row[at] = self._linked(kind, row[at], column)

    def _refuse_incremental(self, member: str) -> None:
        if self.log_mode == "INCREMENTAL":
            raise UsageError(f"Table.{member} cannot be used with log_mode 'INCREMENTAL': rows can only be appended")


_INCREMENT = re.compile(r"(\d+)(?:-(\d+))?\.(.+)\.table\.json")


def put_table(plan: Plan, table: Table) -> str:
    """Plan a table that another one refers to, named by its content; returns its entry."""
    data = encode(table.describe(plan))
    checksum = hashlib.md5(data, usedforsecurity=False).hexdigest()[:20]
    return plan.add(DocumentAddition(f"media/tables/{checksum}.table.json", data))


def cell_json(value: Any, plan: Plan) -> Any:
    """A cell in JSON. UsageError for what cannot be stored, or would be read as something else."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is list:
        return [cell_json(item, plan) for item in value]
    if type(value) is datetime.datetime:
        return milliseconds(value)
    if isinstance(value, Media):
        return value.describe(plan)
    value = plain(value)
    if is_missing(value):
        return None
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, float):
        return None if value != value else float(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        found = {str(key): cell_json(item, plan) for key, item in value.items()}
        if len(found) != len(value) or kind_of(found) is not None:
            raise UsageError(f"{shown(value)} has two keys that are one as text, or a '_type' of a media object")
        return found
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=lambda item: (type(item).__name__, repr(item)))
    if isinstance(value, (list, tuple)):
        return [cell_json(item, plan) for item in value]
    if type_of(value) == TIMESTAMP:
        return milliseconds(value)
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, bytes):
        return _text(value)
    if is_array(value) or is_scalar(value):
        return cell_json(_listed(value), plan)
    raise UsageError(f"a {type(value).__name__} cannot be stored in a table; convert it to numbers, text or a media object")


def _listed(value: Any) -> Any:
    """An array or a scalar of numpy as lists and values of Python."""
    if value.dtype.kind in "mcVO":
        raise UsageError(f"values of numpy type {value.dtype} cannot be stored in a table; convert them first")
    if value.dtype.kind == "M":
        value = value.astype("datetime64[ms]").astype("int64")
    return value.tolist()


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise UsageError(
            f"{shown(value)} is not UTF-8 text; store it as {shown(base64.b64encode(value[:6]).decode())} (base64)"
        ) from None


def _is_finite(value: Any) -> bool:
    """Whether it is an array of finite numbers, which JSON can hold; also for no value at all."""
    if is_missing(value):
        return True
    return is_array(value) and value.dtype.kind in "iuf" and bool((value - value == 0).all())


def _equal(mine: Any, theirs: Any) -> bool:
    if is_array(mine) or is_array(theirs):
        return bool(need("numpy", "arrays in a table").array_equal(mine, theirs))
    return bool(mine == theirs) or (is_missing(mine) and is_missing(theirs))


def _frame_rows(frame: Any) -> Iterator[tuple[Any, ...]]:
    values = [frame.iloc[:, at].to_numpy() for at in range(frame.shape[1])]
    return zip(*values, strict=True)


def _checked_columns(names: Iterable[Any]) -> list[ColumnKey]:
    found = [name.item() if is_scalar(name) else name for name in names]
    wrong = [name for name in found if type(name) not in (str, int)]
    if wrong:
        raise UsageError(f"columns are named by strings or ints, and {shown(wrong[0])} is neither")
    texts = list(map(str, found))
    if len(set(texts)) != len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise UsageError(f"two columns are named {twice!r}; rename one")
    return found


def _read_types(stored: Stored, names: Sequence[ColumnKey]) -> list[ColumnType]:
    declared = stored.optional("column_types", dict)
    if declared is None:
        return [or_none(ANY) for _ in names]
    types = read_type(stored.at(declared))
    if not isinstance(types, DictType):
        raise stored.malformed(f"'column_types' is {shown(declared)}")
    return [types.fields.get(str(name), or_none(ANY)) for name in names]


def _without_place(kind: ColumnType) -> ColumnType:
    """The type without the entry its arrays were read from."""
    if isinstance(kind, ArrayType):
        return ArrayType(kind.shape)
    return UnionType(map(_without_place, kind.members())) if isinstance(kind, UnionType) else kind


def _read_column(stored: Stored, kind: ColumnType, values: list[Any]) -> Sequence[Any]:
    """The cells of a column from JSON."""
    members = kind.members()
    array = next((member for member in members if isinstance(member, ArrayType)), None)
    if array is not None and array.stored is not None:
        return list(read_arrays(stored, array.stored, array.shape, len(values)))
    for member in members:
        if isinstance(member, (ForeignKeyType, type(PRIMARY_KEY))) and not all(isinstance(value, str) for value in values):
            raise stored.malformed("a key is not text")
        if isinstance(member, ForeignIndexType) and not all(type(value) is int for value in values):
            raise stored.malformed("an index of a row is not a whole number")
    timed = _is_timed(members)
    return [
        value
        if type(value) in (str, bool, type(None)) or (type(value) in (int, float) and not timed)
        else _read_cell(stored, members, value)
        for value in values
    ]


def _is_timed(kinds: Sequence[ColumnType]) -> bool:
    """Whether numbers in a column of these types are times."""
    return TIMESTAMP in kinds and NUMBER not in kinds


def _read_cell(stored: Stored, kinds: Sequence[ColumnType], value: Any) -> Any:
    if isinstance(value, dict):
        if kind_of(value) is not None:
            return stored.at(value).object()
        fields = next((kind.fields for kind in kinds if isinstance(kind, DictType)), {})
        return {key: _read_cell(stored, fields[key].members() if key in fields else (), item) for key, item in value.items()}
    if isinstance(value, list):
        return _read_list(stored, kinds, value)
    if type(value) in (int, float) and _is_timed(kinds):
        try:
            return time_of(value)
        except (OverflowError, ValueError):
            raise stored.malformed(f"{value} is no time") from None
    return value


def _read_list(stored: Stored, kinds: Sequence[ColumnType], value: list[Any]) -> Any:
    array = next((kind for kind in kinds if isinstance(kind, ArrayType)), None)
    if array is not None:
        try:
            return need("numpy", "a column of arrays").array(value).reshape(array.shape)
        except ValueError as error:
            raise stored.malformed(f"{shown(value)} is not an array of shape {list(array.shape)} ({error})") from None
    element = next((kind.element.members() for kind in kinds if isinstance(kind, ListType)), ())
    if all(type(item) in (str, bool, int, float) for item in value) and not _is_timed(element):
        return value
    return [_read_cell(stored, element, item) for item in value]


def _increment(stored: Stored, path: str, names: Sequence[ColumnKey]) -> list[list[Any]]:
    """The rows of another increment."""
    source = stored.source
    found = source.value(path)
    if not isinstance(found, dict):
        raise source.malformed(path, "it is not the JSON of a table")
    table = Table.read(Stored(source, path, {**found, "log_mode": "IMMUTABLE"}))
    if table.columns != list(names):
        raise source.malformed(path, f"it has the columns {shown(table.columns)}, and {stored.path!r} has {shown(names)}")
    return table.data


def _read_table(params: Stored) -> Table:
    path = params.field("table", str)
    table = params.source.get(path, params.path)
    if not isinstance(table, Table):
        raise params.malformed(f"{path!r} is not a table")
    return table


def _read_foreign_key(params: Stored) -> ColumnType:
    table = _read_table(params)
    column = params.value.get("col_name")
    if column not in table.columns:
        raise params.malformed(f"{params.value['table']!r} has no column {shown(column)}")
    return ForeignKeyType(table, column)


def _read_table_type(params: Stored) -> ColumnType:
    declared = params.optional("column_types", dict)
    return TableType(read_type(params.at(declared)) if declared else UNKNOWN)


columns.register(("foreignKey", "wandb.TableForeignKey"), _read_foreign_key)
columns.register(("foreignIndex", "wandb.TableForeignIndex"), lambda params: ForeignIndexType(_read_table(params)))
columns.register(("table", "wandb.Table"), _read_table_type)
