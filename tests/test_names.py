"""Names, aliases, tags, paths and metadata: W&B's rules (client 0.31), strict where that client lets confusion through."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifactfs import names
from artifactfs.errors import InvalidNameError


def refused(check: Any, *arguments: Any) -> str:
    """The message of the InvalidNameError: one line, also printable where the offender is not."""
    with pytest.raises(InvalidNameError) as caught:
        check(*arguments)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    message.encode()
    assert isinstance(caught.value, ValueError)
    assert caught.value.exit_code == 2
    return message


# --- collections ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "bikes", "Bikes-2_b.tar.gz", "...", "-x", "v3", "0", "a" * 128])
def test_collection_names(name: str) -> None:
    assert names.check_collection(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "a b",
        "a/b",
        "a:b",
        "a\n",
        "\na",
        "a\r",
        "a\t",
        "a\0",
        "é",
        "名前",
        "a,b",
        "a\\b",
        "a*",
        "..",
        ".",
        "a" * 129,
        "\udcff",
        "\ud800",
    ],
)
def test_malformed_collection_names(name: str) -> None:
    refused(names.check_collection, name)


# --- entities and projects -----------------------------------------------------------------------


@pytest.mark.parametrize("check", [names.check_entity, names.check_project])
@pytest.mark.parametrize("name", ["a", "acme inc", "wandb-registry-model", "...", "名前", "a" * 128, "é" * 64, "-", "a,b", "a*b"])
def test_namespaces(check: Any, name: str) -> None:
    assert check(name) == name


@pytest.mark.parametrize("check", [names.check_entity, names.check_project])
@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a/b",
        "a\\b",
        "a#b",
        "a?b",
        "a%b",
        "a:b",
        "a\r",
        "a\nb",
        "a\0b",
        "\x1b[31m",
        "a" * 129,
        "é" * 65,
        "\udcff",
        "\ud800",
    ],
)
def test_malformed_namespaces(check: Any, name: str) -> None:
    refused(check, name)


# --- whole names ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("acme/vision/bikes:v3", ("acme", "vision", "bikes", "v3")),
        ("acme/vision/bikes", ("acme", "vision", "bikes", "")),
        ("vision/bikes:best", ("E", "vision", "bikes", "best")),
        ("bikes", ("E", "P", "bikes", "")),
        ("bikes:latest", ("E", "P", "bikes", "latest")),
        ("bikes:v1..v2", ("E", "P", "bikes", "v1..v2")),
        ("acme inc/my project/bikes", ("acme inc", "my project", "bikes", "")),
    ],
)
def test_parse(text: str, parts: tuple[str, str, str, str]) -> None:
    found = names.parse(text, "E", "P")
    assert (found.entity, found.project, found.collection, found.alias) == parts


@pytest.mark.parametrize(
    "text",
    ["", ":", "/", "a:", ":v1", "a/", "/a", "//", "a//b", "/e/p/c", "e/p/c/", "a/b/c/d", "a:b:c", "a:b/c",
        "e/p/c:v1\n", "e/./c", "e/../c", "../e/c",
     "e p/c\n", "e/p/c d", "a:\udcff", "e\udcff/p/c", "a:.", "a:..", "c:" + "x" * 129, "c:" + "字" * 100],
)  # fmt: skip
def test_malformed_names(text: str) -> None:
    refused(names.parse, text, "E", "P")


def test_missing_entity_and_project_say_what_to_do() -> None:
    assert "ARTIFACTFS_ENTITY" in refused(names.parse, "bikes", "", "P")
    assert "ARTIFACTFS_PROJECT" in refused(names.parse, "bikes", "E", "")


def test_malformed_defaults_are_checked_too() -> None:
    refused(names.parse, "bikes", "a:b", "P")
    refused(names.parse, "bikes", "E", "..")


@given(st.text(max_size=40))
def test_parse_inverts_str_or_refuses(text: str) -> None:
    try:
        found = names.parse(text, "E", "P")
    except InvalidNameError as error:
        assert "\n" not in str(error)
    else:
        assert names.parse(str(found)) == found


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ()),
        ("/", ()),
        ("acme", ("acme",)),
        ("acme/", ("acme",)),
        ("acme/vision", ("acme", "vision")),
        ("a/b/c", ("a", "b", "c")),
    ],
)
def test_prefixes(text: str, parts: tuple[str, ...]) -> None:
    assert names.parse_prefix(text) == parts


@pytest.mark.parametrize("text", ["a/b/c/d", "a//b", "a/b/c:v1", "a:v1", "..", "a/../b", "a/b/c d", "a\n", "\udcff"])
def test_malformed_prefixes(text: str) -> None:
    refused(names.parse_prefix, text)


# --- types ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dataset", "model", "my type", "run_table", "code", "jobs", "wandb", "データ", "t" * 128])
def test_types(kind: str) -> None:
    assert names.check_type(kind, "bikes") == kind


@pytest.mark.parametrize(
    ("kind", "collection"),
    [("", "c"), ("t" * 129, "c"), ("a/b", "c"), ("a:b", "c"), ("a\n", "c"), ("\udcff", "c"),
     ("wandb-history", "c"), ("job", "c"), ("run_table", "run-1-t"), ("code", "source-x")],
)  # fmt: skip
def test_malformed_and_reserved_types(kind: str, collection: str) -> None:
    refused(names.check_type, kind, collection)


# --- aliases -------------------------------------------------------------------------------------


@pytest.mark.parametrize("alias", ["best", "latest", "a,b", "v", "v1a", "V1", "1", "v-1", "v1.0", "a b", "最良", "x" * 128])
def test_aliases(alias: str) -> None:
    assert names.check_alias(alias) == alias
    assert names.check_new_alias(alias) == alias


@pytest.mark.parametrize(
    "alias", ["", "a/b", "a:b", "/", ":", ".", "..", "a\n", "a\0", "\x7f", "x" * 129, "字" * 100, "\udcff", "\ud800"]
)
def test_malformed_aliases(alias: str) -> None:
    refused(names.check_alias, alias)
    refused(names.check_new_alias, alias)


@pytest.mark.parametrize("alias", ["v0", "v12", "v007", "v00", "v" + "9" * 100])
def test_version_names_cannot_be_given_as_aliases(alias: str) -> None:
    assert names.check_alias(alias) == alias
    assert "reserved" in refused(names.check_new_alias, alias)


@pytest.mark.parametrize(
    ("alias", "number"),
    [
        ("v0", 0),
        ("v12", 12),
        ("v012", None),
        ("V1", None),
        ("v", None),
        ("v1\n", None),
        ("v1a", None),
        ("best", None),
        ("", None),
        ("v٣", None),
        ("v-1", None),
    ],
)
def test_version_numbers(alias: str, number: int | None) -> None:
    assert names.version_number(alias) == number


# --- tags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["a", "a-b", "a_b", "two words", "two   words", "-", "été", "t" * 128])
def test_tags(tag: str) -> None:
    assert names.check_tag(tag) == tag


@pytest.mark.parametrize(
    "tag",
    ["", " ", " a", "a ", "a\n", "a\tb", "a,b", "a.b", "a:b", "a/b", "a!", "a\0", "t" * 129, "\udcff", "a" + " " * 200 + "!"],
)
def test_malformed_tags(tag: str) -> None:
    refused(names.check_tag, tag)


def test_repeated_tags_count_once() -> None:
    assert names.check_tags(["b", "a", "b"]) == ["b", "a"]


# --- entry paths ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "canonical"),
    [
        ("a", "a"), ("a/b", "a/b"), ("./a", "a"), ("a//b", "a/b"), ("a/./b", "a/b"), ("a/b/", "a/b"),
        ("a/b/.", "a/b"), ("./././a", "a"),
        ("a\\b", "a\\b"), ("..a", "..a"), ("a..", "a.."), ("...", "..."), ("a\nb", "a\nb"),
        ("名/前", "名/前"), ("C:", "C:"), ("a:b/c", "a:b/c"),
        ("x" * 255, "x" * 255), (" ", " "), ("-rf", "-rf"),
    ],
)  # fmt: skip
def test_entry_paths(path: str, canonical: str) -> None:
    assert names.entry_path(path) == canonical


@pytest.mark.parametrize(
    "path",
    ["", ".", "./", "/", "//", "/a", "/etc/passwd", "..", "../a", "a/..", "a/../b", "a/b/..", "C:\\x", "c:/x", "a\0b",
        "\0", "x" * 256, "é" * 128,
     "a/" + "x" * 256 + "/b", "a\udcff", "\ud800"],
)  # fmt: skip
def test_malformed_entry_paths(path: str) -> None:
    assert "Invalid artifact path" in refused(names.entry_path, path)


@pytest.mark.parametrize("part", ["", ".", "..", "a/b", "a\0", "x" * 256, "\udcff"])
def test_malformed_parts(part: str) -> None:
    refused(names.check_part, part, "dir/part")


@given(st.text(alphabet=st.sampled_from("a./\\\0é:\udcff"), max_size=12))
def test_canonical_paths_stay_inside(path: str) -> None:
    try:
        found = names.entry_path(path)
    except InvalidNameError:
        return
    assert names.entry_path(found) == found
    assert found and not found.startswith("/")
    assert not {"", ".", ".."} & set(found.split("/"))
    assert found.encode()


# --- metadata ------------------------------------------------------------------------------------


class Colour(str, enum.Enum):  # noqa: UP042 - its str() is not its value, which is the trap
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Celsius(float):
    pass


@dataclasses.dataclass
class Split:
    name: str
    share: float


class Array:
    """What numpy arrays and scalars look like."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def tolist(self) -> Any:
        return self.value


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (None, {}),
        ({}, {}),
        ('{"a": [1, 2.5, null, true]}', {"a": [1, 2.5, None, True]}),
        ({"a": (1, 2)}, {"a": [1, 2]}),
        ({"a": {1}}, {"a": [1]}),
        ({"a": frozenset()}, {"a": []}),
        ({7: 2, None: 3, True: 4, 2.5: 5}, {"7": 2, "null": 3, "true": 4, "2.5": 5}),
        ({"a": slice(1, 2, 3)}, {"a": {"slice_start": 1, "slice_step": 3, "slice_stop": 2}}),
        ({"a": Split("train", 0.8)}, {"a": {"name": "train", "share": 0.8}}),
        ({"a": datetime.date(2026, 1, 2)}, {"a": "2026-01-02"}),
        ({"a": datetime.datetime(2026, 1, 2, 3, 4, 5)}, {"a": "2026-01-02T03:04:05"}),
        ({"a": Array([1, Array(2.5)])}, {"a": [1, 2.5]}),
        ({"a": float("nan")}, {"a": None}),
        ('{"a": NaN}', {"a": None}),
        ({"a": Colour.RED, "b": Level.HIGH, "c": Celsius(2.5)}, {"a": "red", "b": 3, "c": 2.5}),
        ({"a": 2**70}, {"a": 2**70}),
        ({"a": {str(n): n for n in range(200)}}, {"a": {str(n): n for n in range(200)}}),
        ({str(n): n for n in range(100)}, {str(n): n for n in range(100)}),
    ],
)
def test_metadata(given: Any, plain: dict[str, Any]) -> None:
    found = names.check_metadata(given)
    assert found == plain
    assert json.loads(json.dumps(found)) == found
    scalars = [value for value in found.values() if isinstance(value, (str, int, float))]
    assert all(type(value) in (str, int, float, bool) for value in scalars)


def cyclic() -> dict[str, Any]:
    loop: dict[str, Any] = {}
    loop["a"] = loop
    return loop


@pytest.mark.parametrize(
    "given",
    [
        "", "{", "{'a': 1}", "[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, '{"a": ' + "9" * 5000 + "}",
        '{"a": Infinity}', '{"a": "\\ud800"}',
        {"a": float("inf")}, {"a": float("-inf")}, {"a": {"b": [float("inf")]}}, {str(n): n for n in range(101)},
        {"a": b"bytes"}, {"a": object()},
        {"a": 10**5000}, {"a": "\udcff"}, {"\udcff": 1}, {1: "a", "1": "b"}, {None: 1, "null": 2}, cyclic(),
        {"a": 1j}, {"a": datetime.timedelta(1)},
    ],
)  # fmt: skip
def test_malformed_metadata(given: Any) -> None:
    refused(names.check_metadata, given)


@pytest.mark.parametrize("given", [[], [1], 5, "5", "[1]", "null", '"text"', object()])
def test_metadata_that_is_no_mapping(given: Any) -> None:
    with pytest.raises(TypeError, match="metadata must be a dict"):
        names.check_metadata(given)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(st.dictionaries(st.text(), _json, max_size=5))
def test_plain_json_is_unchanged(metadata: dict[str, Any]) -> None:
    assert names.check_metadata(metadata) == metadata
    assert names.check_metadata(json.dumps(metadata)) == metadata
