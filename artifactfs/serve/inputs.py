"""What clients send, checked: arguments and inputs of GraphQL are plain JSON until they come here."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from artifactfs.errors import UsageError

MAX_TEXT = 1 << 20
MAX_LIST = 100_000
_MAX_REGEX = 200


def text(value: Any, what: str, most: int = MAX_TEXT) -> str:
    """``value``, which must be a string of at most ``most`` characters that UTF-8 can hold. UsageError."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)[:64]  # ids may be given as numbers
    if not isinstance(value, str):
        raise UsageError(f"{what} must be a string, not {type(value).__name__}")
    if len(value) > most:
        raise UsageError(f"{what} is {len(value)} characters long; at most {most} can be")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{what} is not valid Unicode") from None
    return value


def optional_text(value: Any, what: str, most: int = MAX_TEXT) -> str | None:
    """As :func:`text`, or None."""
    return None if value is None else text(value, what, most)


def optional_number(value: Any, what: str, low: int, high: int) -> int | None:
    """A whole number from ``low`` to ``high``, or None. UsageError."""
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UsageError(f"{what} must be a whole number from {low} to {high}")
    return value


def listed(value: Any, what: str) -> list[Any]:
    """A list; None is an empty one. UsageError."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise UsageError(f"{what} must be a list, not {type(value).__name__}")
    if len(value) > MAX_LIST:
        raise UsageError(f"{what} has {len(value)} items; at most {MAX_LIST} can be")
    return value


def json_object(value: Any, what: str) -> dict[str, Any]:
    """An object that is given as JSON text, or as it is; None and "" are empty. UsageError."""
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, UnicodeEncodeError):
            raise UsageError(f"{what} is not JSON that can be read") from None
    if not isinstance(value, dict):
        raise UsageError(f"{what} must be a JSON object")
    return value


class Input:
    """The ``input`` of a mutation. Keys that are not asked for are passed over; null is as good as absent."""

    def __init__(self, value: Any) -> None:
        if not isinstance(value, Mapping):
            raise UsageError("the mutation has no input")
        self._fields = value

    def has(self, key: str) -> bool:
        return self._fields.get(key) is not None

    def text(self, key: str, most: int = MAX_TEXT) -> str:
        return text(self._fields.get(key), key, most)

    def optional(self, key: str, most: int = MAX_TEXT) -> str | None:
        return optional_text(self._fields.get(key), key, most)

    def number(self, key: str, low: int, high: int) -> int | None:
        return optional_number(self._fields.get(key), key, low, high)

    def listed(self, key: str) -> list[Any]:
        return listed(self._fields.get(key), key)

    def texts(self, key: str, most: int = MAX_TEXT) -> list[str]:
        return [text(item, key, most) for item in self.listed(key)]

    def objects(self, key: str) -> list[Input]:
        return [Input(item) for item in self.listed(key)]

    def json(self, key: str) -> dict[str, Any]:
        return json_object(self._fields.get(key), key)

    def flag(self, key: str, default: bool) -> bool:
        value = self._fields.get(key)
        return default if value is None else bool(value)


def check_filter(value: Any, depth: int = 0) -> None:
    """UsageError for a filter that could keep the server busy for long: nested deep, or with a regular expression that may need
    exponential time, which nothing can interrupt."""
    if depth > 16:
        raise UsageError("the filter is nested too deep")
    items: Sequence[Any] = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()
    if len(items) > 1000:
        raise UsageError("the filter is too large")
    if isinstance(value, dict) and "$regex" in value:
        _check_regex(value["$regex"])
    for item in items:
        check_filter(item, depth + 1)


_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", re.DOTALL)


def _check_regex(pattern: Any) -> None:
    """Three repetitions at most, none of a group: then a name of 128 characters costs no more than some million steps."""
    if not isinstance(pattern, str) or len(pattern) > _MAX_REGEX:
        raise UsageError(f"$regex in a filter must be a string of at most {_MAX_REGEX} characters")
    tokens = _TOKEN.findall(pattern)
    repeats = sum(token in "*+{" for token in tokens)
    grouped = any(one == ")" and two in "*+{?" for one, two in itertools.pairwise(tokens))
    if repeats > 3 or grouped:
        raise UsageError("$regex in a filter may have three of * + { } at most, and none of them after a group")
