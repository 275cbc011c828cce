"""Text for people."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifactfs.cli import arguments, output
from artifactfs.errors import UsageError


@pytest.mark.parametrize(
    ("count", "text"),
    [(-1, "?"), (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (1024**2 - 1, "1.0 MiB"),
     (20 << 20, "20.0 MiB"), (1 << 30, "1.0 GiB"), (3 << 40, "3.0 TiB"), (5 << 50, "5.0 PiB"), (5 << 60, "5120.0 PiB")],
)  # fmt: skip
def test_sizes(count: int, text: str) -> None:
    assert output.size(count) == text


@given(st.integers(0, 10**18))
def test_sizes_are_short(count: int) -> None:
    assert len(output.size(count)) <= 10


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "none"), (1, "1s"), (90, "90s"), (120, "2m"), (5400, "90m"), (36 * 3600, "36h"), (864000, "10d")]
)
def test_durations(seconds: int | None, text: str) -> None:
    assert output.duration(seconds) == text
    if seconds is not None:
        assert arguments.ttl(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0d", "1", "d", "1.5d", "-1d", "1y", "1 d", "1d\n", "1e3s", "٣d", "9" * 20 + "d"])
def test_malformed_durations(text: str) -> None:
    with pytest.raises(UsageError, match="is not a duration"):
        arguments.ttl(text)


def test_counts_and_moments() -> None:
    assert (output.count(1, "file"), output.count(1234, "file")) == ("1 file", "1,234 files")
    assert output.moment("2026-11-22T10:30:59.123456Z") == "2026-11-22 10:30"


@given(st.text())
def test_shown_text_is_one_line_and_harmless(text: str) -> None:
    assert output.shown(text).isprintable() or output.shown(text) == ""
    if text.isprintable():
        assert output.shown(text) == text


def test_tables_align_wide_and_combining_characters(capsys: pytest.CaptureFixture[str]) -> None:
    columns = [output.Column("NAME", lambda row: row["name"]), output.Column("N", lambda row: str(row["n"]), right=True)]
    output.print_table([{"name": "データ", "n": 1}, {"name": "e\u0301", "n": 22}, {"name": "a\nb", "n": 3}], columns)
    assert capsys.readouterr().out == "NAME     N\nデータ   1\ne\u0301       22\na\\nb     3\n"
    output.print_table([], columns)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("rows", [[], [1], [{"a": "é\n"}, {"b": None}]])
def test_json_lists(rows: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json_list(iter(rows))
    assert json.loads(capsys.readouterr().out) == rows
