"""Text for people: aligned columns, sizes, times; and JSON lists of any length."""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

_CHUNK = 1000
"""Rows that are aligned together: a listing of millions is printed as it is read."""


class Column(NamedTuple):
    """A column of a table. ``text`` turns a row into its cell. No column has a right margin: the last may be of any width."""

    title: str
    text: Callable[[Mapping[str, Any]], str]
    right: bool = False


def shown(text: str) -> str:
    """``text`` with what would move the cursor, change colours or break the line written as an escape."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text)


def size(count: int) -> str:
    """``count`` bytes as ``512 B``, ``1.5 KiB``, ``20 MiB``; "?" for an unknown size (negative)."""
    if count < 0:
        return "?"
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        value /= 1024
        if value < 1023.95 or unit == "PiB":
            break
    return f"{value:.1f} {unit}"


def moment(timestamp: str) -> str:
    """``2026-11-22 10:30`` (UTC) for an ISO 8601 time."""
    return timestamp[:16].replace("T", " ")


def count(number: int, noun: str) -> str:
    """``1 file``, ``1,234 files``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def duration(seconds: int | None) -> str:
    """``30d``, ``36h``, ``90s``: the largest unit that is exact; "none" for None."""
    if seconds is None:
        return "none"
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds % length == 0:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def print_table(rows: Iterable[Mapping[str, Any]], columns: Sequence[Column]) -> None:
    """A header, unless no column has a title, and one line a row; nothing at all for no rows."""
    cells = ([shown(column.text(row)) for column in columns] for row in rows)
    header = [[column.title for column in columns]] if any(column.title for column in columns) else []
    while chunk := list(itertools.islice(cells, _CHUNK)):
        lines, header = header + chunk, []
        widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            print(_aligned(line, widths, columns))


def print_json_list(rows: Iterable[Any]) -> None:
    """The rows as one JSON document, written as they come."""
    opening = "["
    for row in rows:
        print(opening, json.dumps(row, ensure_ascii=False), sep="\n  ", end="")
        opening = ","
    print("[]" if opening == "[" else "\n]")


def fields(pairs: Mapping[str, str]) -> Iterator[str]:
    """``key: value`` lines, aligned."""
    width = max(map(len, pairs), default=0) + 1
    return (f"{key + ':':<{width}} {value}" for key, value in pairs.items())


def _aligned(line: Sequence[str], widths: Sequence[int], columns: Sequence[Column]) -> str:
    padded = []
    for cell, width, column in zip(line, widths, columns, strict=True):
        room = " " * (width - _width(cell))
        padded.append(room + cell if column.right else cell + room)
    return "  ".join(padded).rstrip()


def _width(text: str) -> int:
    """Columns of a terminal: wide characters take two, combining ones none."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))
