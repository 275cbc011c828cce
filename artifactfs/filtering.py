"""Filters in the form of W&B's and MongoDB's queries: ``{"name": {"$regex": "^bikes"}, "$or": [{…}, {…}]}``.

A key is a field of the document, with dots for those below it (``metadata.accuracy``); a plain value must be equal, or be in the
field where that is a list. Comparisons of what cannot be compared are false. No I/O.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from artifactfs.errors import UsageError

Filter: TypeAlias = Mapping[str, Any]

_ABSENT = object()


def compile_filter(filter: Filter | None) -> Callable[[Mapping[str, Any]], bool]:
    """What tells whether a document passes. UsageError for what is no filter, so that nothing is fetched first."""
    return _all_of(filter) if filter else lambda document: True


def _all_of(filter: Any) -> Callable[[Mapping[str, Any]], bool]:
    if not isinstance(filter, Mapping):
        raise UsageError(f"a filter is a dict of fields and conditions, not {filter!r}")
    tests = [_clause(key, value) for key, value in filter.items()]
    return lambda document: all(test(document) for test in tests)


def _clause(key: str, value: Any) -> Callable[[Mapping[str, Any]], bool]:
    if key in ("$and", "$or", "$nor"):
        if not isinstance(value, (list, tuple)) or not value:
            raise UsageError(f"{key} in a filter takes a list of filters, not {value!r}")
        parts = [_all_of(part) for part in value]
        if key == "$and":
            return lambda document: all(part(document) for part in parts)
        wanted = key == "$or"
        return lambda document: any(part(document) for part in parts) is wanted
    if key == "$not":
        part = _all_of(value)
        return lambda document: not part(document)
    if key.startswith("$"):
        raise UsageError(f"a filter has no operator {key!r} for a whole document; it has $and, $or, $nor and $not")
    test = _condition(value)
    return lambda document: test(_field(document, key))


def _condition(value: Any) -> Callable[[Any], bool]:
    if isinstance(value, Mapping) and any(key.startswith("$") for key in value):
        tests = [_operator(key, operand) for key, operand in value.items()]
        return lambda found: all(test(found) for test in tests)
    return lambda found: _equal(found, value)


def _operator(name: str, operand: Any) -> Callable[[Any], bool]:
    if name in _COMPARISONS:
        compare = _COMPARISONS[name]
        return lambda found: _compare(compare, found, operand)
    if name == "$eq":
        return lambda found: _equal(found, operand)
    if name == "$ne":
        return lambda found: not _equal(found, operand)
    if name in ("$in", "$nin"):
        if not isinstance(operand, (list, tuple, set, frozenset)):
            raise UsageError(f"{name} in a filter takes a list, not {operand!r}")
        return lambda found: any(_equal(found, item) for item in operand) is (name == "$in")
    if name == "$exists":
        return lambda found: (found is not _ABSENT) is bool(operand)
    if name == "$contains":
        return lambda found: isinstance(found, (str, list)) and operand in found
    if name == "$regex":
        return _matching(operand)
    if name == "$not":
        test = _condition(operand)
        return lambda found: not test(found)
    known = ", ".join([*_COMPARISONS, "$eq, $ne, $in, $nin, $exists, $contains, $regex, $not"])
    raise UsageError(f"a filter has no operator {name!r}; it has {known}")


def _matching(pattern: Any) -> Callable[[Any], bool]:
    try:
        regex = re.compile(pattern)
    except (re.error, TypeError) as error:
        raise UsageError(f"$regex {pattern!r} in a filter is no regular expression: {error}") from None
    return lambda found: isinstance(found, str) and regex.search(found) is not None


_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
}


def _compare(compare: Callable[[Any, Any], bool], found: Any, operand: Any) -> bool:
    try:
        return found is not _ABSENT and compare(found, operand)
    except TypeError:
        return False


def _equal(found: Any, wanted: Any) -> bool:
    return bool(found == wanted or (isinstance(found, list) and wanted in found))


def _field(document: Mapping[str, Any], key: str) -> Any:
    """The field of that name, else the one that the dots lead to."""
    if key in document:
        return document[key]
    found: Any = document
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return _ABSENT
        found = found[part]
    return found
