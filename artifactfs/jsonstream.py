"""JSON of any length as a stream: one member of a large object is held at a time, and no value nested beyond a bounded depth.

ijson's own builders make a text of the whole path for each level, which a few kilobytes of brackets would fill any memory with:
its plain events are put together here instead. Everything raises ValueError for what is no JSON, or none of the expected form.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any, TypeAlias

import ijson

MAX_DEPTH = 32

Events: TypeAlias = Iterator[tuple[str, Any]]
"""The parser's, each (what, value). Whoever is given them takes those of the value that begins, to its end."""


def members(file: IO[bytes]) -> Iterator[tuple[str, Events]]:
    """The members of the object that ``file`` holds, from where it stands: each key, and the events of its value."""
    events = _parsed(file)
    yield from _members(events, "the document")
    if next(events, None) is not None:
        raise ValueError("something follows the document")


def items(events: Events) -> Iterator[tuple[str, Any]]:
    """The members of an object, one at a time, as (key, value)."""
    return ((key, value(found)) for key, found in _members(events, "a member that should be one"))


def value(events: Events) -> Any:
    """A whole value."""
    return _value(*_next(events), events, 0)


def _parsed(file: IO[bytes]) -> Events:
    try:
        yield from ijson.basic_parse(file, use_float=True)
    except (ijson.JSONError, UnicodeDecodeError, OverflowError) as error:
        raise ValueError(str(error)) from None


def _next(events: Events) -> tuple[str, Any]:
    event = next(events, None)
    if event is None:
        raise ValueError("it ends too early")
    return event


def _members(events: Events, what: str) -> Iterator[tuple[str, Events]]:
    if _next(events)[0] != "start_map":
        raise ValueError(f"{what} is no object")
    while (event := _next(events))[0] != "end_map":
        yield event[1], events


def _value(event: str, found: Any, events: Events, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    if event == "start_map":
        whole = {}
        while (following := _next(events))[0] != "end_map":
            whole[following[1]] = _value(*_next(events), events, depth + 1)
        return whole
    if event == "start_array":
        listed = []
        while (following := _next(events))[0] != "end_array":
            listed.append(_value(*following, events, depth + 1))
        return listed
    return found
