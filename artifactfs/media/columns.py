"""The types of a table's columns, in the JSON form that W&B stores with a table.

A type starts as what the user asked for, or as unknown, and widens with the values it is given: ``widen`` returns the type that
also holds a value, or None if there is none, which makes the value an error. ``join`` does the same for another type.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from artifactfs.media.annotations import Classes
from artifactfs.media.base import Media, Plan, Stored, kind_of, shown, wrong_type
from artifactfs.media.extras import is_array, is_scalar, plain


class ColumnType:
    """A type by its name in JSON. Those without parameters are instances of this class itself: :data:`STRING` and so on."""

    def __init__(self, name: str) -> None:
        self.name = name

    def widen(self, value: Any, kind: ColumnType) -> ColumnType | None:
        """The type that holds ``value``, whose own type is ``kind``, as well."""
        return self.join(kind)

    def join(self, other: ColumnType) -> ColumnType | None:
        """The type that holds what ``other`` holds as well."""
        return self if other == self else None

    def params(self, plan: Plan) -> dict[str, Any]:
        """The parameters in JSON; what they name is planned."""
        return {}

    def to_json(self, plan: Plan) -> dict[str, Any]:
        params = self.params(plan)
        return {"wb_type": self.name, "params": params} if params else {"wb_type": self.name}

    def members(self) -> tuple[ColumnType, ...]:
        """The alternatives of a union; else itself."""
        return (self,)

    def __str__(self) -> str:
        return self.name.capitalize()

    __repr__ = __str__

    def _key(self) -> Any:
        return self.name

    def __eq__(self, other: object) -> bool:
        return self is other or (type(self) is type(other) and self._key() == other._key())

    def __hash__(self) -> int:
        return hash(self.name)


class _Any(ColumnType):
    def join(self, other: ColumnType) -> ColumnType | None:
        return None if other == NONE else self


class _Unknown(ColumnType):
    def join(self, other: ColumnType) -> ColumnType | None:
        return None if other == NONE else other


class _PrimaryKey(ColumnType):
    def widen(self, value: Any, kind: ColumnType) -> ColumnType | None:
        return self if isinstance(value, str) else None

    def join(self, other: ColumnType) -> ColumnType | None:
        return self if other in (STRING, self) else None


NONE = ColumnType("none")
STRING = ColumnType("string")
NUMBER = ColumnType("number")
TIMESTAMP = ColumnType("timestamp")
BOOLEAN = ColumnType("boolean")
ANY = _Any("any")
UNKNOWN = _Unknown("unknown")
PRIMARY_KEY = _PrimaryKey("primaryKey")


class ObjectType(ColumnType):
    """Values of a class that JSON has no word for; only its name is known."""

    def __init__(self, class_name: str) -> None:
        super().__init__("pythonObject")
        self.class_name = class_name

    def params(self, plan: Plan) -> dict[str, Any]:
        return {"class_name": self.class_name}

    def _key(self) -> Any:
        return self.class_name


class ConstType(ColumnType):
    """Exactly one value."""

    def __init__(self, value: Any) -> None:
        super().__init__("const")
        self.value = value

    def widen(self, value: Any, kind: ColumnType) -> ColumnType | None:
        return self if type(value) is type(self.value) and value == self.value else None

    def params(self, plan: Plan) -> dict[str, Any]:
        return const_json(self.value)["params"]  # type: ignore[no-any-return]

    def _key(self) -> Any:
        return type(self.value), self.value

    def __str__(self) -> str:
        return str(self.value)


class UnionType(ColumnType):
    """One of several types."""

    def __init__(self, allowed: Iterable[ColumnType]) -> None:
        super().__init__("union")
        flat = (member for kind in allowed for member in kind.members())
        self.allowed = tuple(sorted(dict.fromkeys(flat), key=str))

    def widen(self, value: Any, kind: ColumnType) -> ColumnType | None:
        return self._with(lambda member: member.widen(value, kind))

    def join(self, other: ColumnType) -> ColumnType | None:
        found: ColumnType = self
        for kind in other.members():
            if kind is UNKNOWN:  # nothing yet, which any type holds
                continue
            joined = found._joined(kind) if isinstance(found, UnionType) else None
            if joined is None:
                return None
            found = joined
        return found

    def _joined(self, kind: ColumnType) -> ColumnType | None:
        return self._with(lambda member: member.join(kind))

    def _with(self, widened: Callable[[ColumnType], ColumnType | None]) -> ColumnType | None:
        """This union with its first member that can be widened widened; an unknown one is the last to be asked."""
        for member in sorted(self.allowed, key=lambda kind: kind is UNKNOWN):
            found = widened(member)
            if found is member:
                return self
            if found is not None:
                return UnionType(found if kind is member else kind for kind in self.allowed)
        return None

    def members(self) -> tuple[ColumnType, ...]:
        return self.allowed

    def params(self, plan: Plan) -> dict[str, Any]:
        return {"allowed_types": [kind.to_json(plan) for kind in self.allowed]}

    def _key(self) -> Any:
        return frozenset(self.allowed)

    def __str__(self) -> str:
        return " or ".join(map(str, self.allowed))


class ListType(ColumnType):
    """Lists of one type; ``length`` where all have the same."""

    def __init__(self, element: ColumnType = UNKNOWN, length: int | None = None) -> None:
        super().__init__("list")
        self.element = element
        self.length = length

    def join(self, other: ColumnType) -> ColumnType | None:
        if not isinstance(other, ListType):
            return None
        element = self.element if other.element == UNKNOWN else self.element.join(other.element)
        if element is None:
            return None
        length = self.length if self.length == other.length else None
        return self if (element, length) == (self.element, self.length) else ListType(element, length)

    def params(self, plan: Plan) -> dict[str, Any]:
        return {"element_type": self.element.to_json(plan), "length": self.length}

    def _key(self) -> Any:
        return self.element, self.length

    def __str__(self) -> str:
        return f"{self.element}[]"


class ArrayType(ColumnType):
    """Arrays of one shape. ``stored`` is the (entry, key) of the values in a version."""

    def __init__(self, shape: Sequence[int], stored: tuple[str, str] | None = None) -> None:
        super().__init__("ndarray")
        self.shape = tuple(shape)
        self.stored = stored

    def join(self, other: ColumnType) -> ColumnType | None:
        return self if isinstance(other, ArrayType) and other.shape == self.shape else None

    def params(self, plan: Plan) -> dict[str, Any]:
        where = {"path": self.stored[0], "key": self.stored[1]} if self.stored else None
        return {"shape": list(self.shape), "serialization_path": where}

    def _key(self) -> Any:
        return self.shape

    def __str__(self) -> str:
        return f"Ndarray(shape:{list(self.shape)})"


class DictType(ColumnType):
    """Mappings whose keys have types."""

    def __init__(self, fields: Mapping[str, ColumnType]) -> None:
        super().__init__("typedDict")
        self.fields = dict(fields)

    def join(self, other: ColumnType) -> ColumnType | None:
        if not isinstance(other, DictType) or not other.fields.keys() <= self.fields.keys():
            return None
        joined = {key: kind.join(other.fields.get(key, NONE)) for key, kind in self.fields.items()}
        found = {key: kind for key, kind in joined.items() if kind is not None}
        return (self if found == self.fields else DictType(found)) if len(found) == len(joined) else None

    def params(self, plan: Plan) -> dict[str, Any]:
        return {"type_map": {key: kind.to_json(plan) for key, kind in self.fields.items()}}

    def _key(self) -> Any:
        return frozenset(self.fields.items())

    def __str__(self) -> str:
        return str(self.fields)


class MediaType(ColumnType):
    """Media objects of one class."""

    def __init__(self, kind: type[Media]) -> None:
        super().__init__(kind.kind)
        self.kind = kind


_LAYERS = ("box_layers", "mask_layers")
_MAPS = ("box_class_maps", "mask_class_maps")


class ImageType(ColumnType):
    """Images with what their annotations have in common: layers with their class ids, class names, names of scores."""

    def __init__(self, annotations: Mapping[str, Any]) -> None:
        super().__init__("image-file")
        self.annotations = dict(annotations)

    def join(self, other: ColumnType) -> ColumnType | None:
        if not isinstance(other, ImageType):
            return None
        mine, theirs = self.annotations, other.annotations
        joined = {name: _merged(mine[name], theirs[name], lambda a, b: {*a, *b}) for name in _LAYERS}
        joined |= {name: _merged(mine[name], theirs[name], lambda a, b: {**b, **a}) for name in _MAPS}
        joined["box_score_keys"] = mine["box_score_keys"] | theirs["box_score_keys"]
        joined["class_map"] = {**theirs["class_map"], **mine["class_map"]}
        return self if joined == mine else ImageType(joined)

    def params(self, plan: Plan) -> dict[str, Any]:
        return {name: const_json(value) for name, value in self.annotations.items()}

    def _key(self) -> Any:
        return repr(const_json(self.annotations))


NO_ANNOTATIONS: Mapping[str, Any] = {
    **{name: {} for name in (*_LAYERS, *_MAPS, "class_map")},
    "box_score_keys": frozenset(),
}


def _merged(mine: Mapping[str, Any], theirs: Mapping[str, Any], join: Callable[[Any, Any], Any]) -> dict[str, Any]:
    both = mine.keys() & theirs.keys()
    return {**theirs, **mine, **{key: join(mine[key], theirs[key]) for key in both}}


class ClassesIdType(ColumnType):
    """Ids of some classes."""

    def __init__(self, classes: Classes) -> None:
        super().__init__("classesId")
        self.classes = classes
        self._ids = frozenset(item["id"] for item in classes.class_set)

    def widen(self, value: Any, kind: ColumnType) -> ColumnType | None:
        return self if (isinstance(value, (str, int, float)) or is_scalar(value)) and value in self._ids else None

    def join(self, other: ColumnType) -> ColumnType | None:
        return self if isinstance(other, ClassesIdType) and other.classes == self.classes else None

    def params(self, plan: Plan) -> dict[str, Any]:
        entry = self.classes.put(plan, "media/cls")
        allowed = [ConstType(item["id"]).to_json(plan) for item in self.classes.class_set]
        return {"classes_obj": entry, "valid_ids": {"wb_type": "union", "params": {"allowed_types": allowed}}}

    def _key(self) -> Any:
        return str(self.classes.class_set)


class OtherType(ColumnType):
    """A type that only other clients know; it is kept as it is, and holds anything."""

    def __init__(self, value: Mapping[str, Any]) -> None:
        super().__init__(str(value["wb_type"]))
        self._value = dict(value)

    def join(self, other: ColumnType) -> ColumnType | None:
        return self

    def to_json(self, plan: Plan) -> dict[str, Any]:
        return self._value

    def _key(self) -> Any:
        return repr(self._value)


def holds(kind: ColumnType, value: Any) -> bool:
    """Whether ``kind`` surely holds the value as it is: the quick answer for plain values. False says nothing."""
    simple = _PLAIN.get(type(value))
    return simple is not None and value == value and any(member is simple for member in kind.members())


def optional(kind: ColumnType) -> ColumnType:
    """``kind`` or none."""
    return UnionType([kind, NONE])


def either(mine: ColumnType, theirs: ColumnType) -> ColumnType:
    """A type that holds both: one that does, else their union."""
    joined = mine.join(theirs)
    return joined if joined is not None else UnionType([mine, theirs])


def const_json(value: Any) -> dict[str, Any]:
    """A constant in JSON: sets are lists in order, so that the same table gives the same bytes."""
    return {"wb_type": "const", "params": {"val": _listed(value), "is_set": isinstance(value, (set, frozenset))}}


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=lambda item: (str(type(item)), item))
    return value


def is_missing(value: Any) -> bool:
    """Whether a cell has no value: None, NaN of Python, and pandas' and numpy's NaT and NA."""
    if value is None or type(value).__name__ in ("NaTType", "NAType"):
        return True
    if is_scalar(value) and value.dtype.kind in "mM":
        return bool(value != value)
    return type(value) is float and value != value


def type_of(value: Any) -> ColumnType:
    """The type of a value."""
    if type(value) is list:
        return _list_type(value)
    value = plain(value)
    if is_missing(value):
        return NONE
    described: Callable[[Any], ColumnType] | None = getattr(type(value), "column_type", None)
    if described is not None:  # an image, a table, a key or an index of a row: they know more than their class
        return described(value)
    if isinstance(value, Media):
        return MediaType(type(value))
    if is_array(value):
        return ArrayType(value.shape)
    if is_scalar(value):
        return _SCALARS.get(value.dtype.kind) or ObjectType(type(value).__name__)
    if isinstance(value, Mapping):
        return DictType({str(key): type_of(item) for key, item in value.items()})
    if isinstance(value, (list, tuple, set, frozenset)):
        return _list_type(value)
    for kinds, found in _SIMPLE:
        if isinstance(value, kinds):
            return found
    return ObjectType(type(value).__name__)


_SCALARS = {
    "b": BOOLEAN, "i": NUMBER, "u": NUMBER, "f": NUMBER, "M": TIMESTAMP, "U": STRING, "S": STRING
}  # fmt: skip
_SIMPLE: tuple[tuple[tuple[type, ...], ColumnType], ...] = (
    ((str, bytes, enum.Enum), STRING),
    ((bool,), BOOLEAN),
    ((int, float, decimal.Decimal), NUMBER),
    ((datetime.date,), TIMESTAMP),
)


_PLAIN: dict[type, ColumnType] = {
    str: STRING,
    bool: BOOLEAN,
    int: NUMBER,
    float: NUMBER,
    datetime.datetime: TIMESTAMP,
    datetime.date: TIMESTAMP,
    type(None): NONE,
}


def _list_type(value: Iterable[Any]) -> ListType:
    items = list(value)
    first = type(items[0]) if items else None
    if first in (int, str, bool) and all(type(item) is first for item in items):
        return ListType(_PLAIN[first], len(items))
    kinds = list(dict.fromkeys(map(type_of, items)))
    some = [kind for kind in kinds if kind != NONE]
    element: ColumnType = UNKNOWN
    for kind in some:
        element = kind if element is UNKNOWN else either(element, kind)
    return ListType(optional(element) if len(some) < len(kinds) else element, len(items))


def as_type(wanted: Any) -> ColumnType:
    """The type that a user's ``dtype`` means: a type, a class, a list of them, a mapping, Classes, or a constant."""
    if isinstance(wanted, ColumnType):
        return wanted
    if wanted is None:
        return UNKNOWN
    if isinstance(wanted, Classes):
        return ClassesIdType(wanted)
    if isinstance(wanted, type):
        return _class_type(wanted)
    if isinstance(wanted, list):
        kinds = [as_type(item) for item in wanted]
        return UnionType(kinds) if len(kinds) > 1 else ListType(kinds[0] if kinds else UNKNOWN)
    if isinstance(wanted, dict):
        return DictType({str(key): as_type(item) for key, item in wanted.items()})
    if isinstance(wanted, (str, bool, numbers.Number)):
        return ConstType(wanted)
    raise wrong_type(f"{shown(wanted)} is no type of a column; use a class as str or afs.Image, a list of them or a constant")


def _class_type(wanted: type) -> ColumnType:
    if issubclass(wanted, Media):
        return ImageType(NO_ANNOTATIONS) if wanted.kind == "image-file" else MediaType(wanted)
    if issubclass(wanted, (list, tuple, set, frozenset)):
        return ListType()
    if issubclass(wanted, dict):
        return DictType({})
    if wanted is type(None):
        return NONE
    if any(kind.__module__ == "numpy" and kind.__name__ == "generic" for kind in wanted.__mro__):
        names = {kind.__name__ for kind in wanted.__mro__}
        found = {"number": NUMBER, "bool": BOOLEAN, "bool_": BOOLEAN, "datetime64": TIMESTAMP, "character": STRING}
        return next((found[name] for name in found if name in names), ObjectType(wanted.__name__))
    return next((found for kinds, found in _SIMPLE if issubclass(wanted, kinds)), ObjectType(wanted.__name__))


def read_type(stored: Stored) -> ColumnType:
    """The type that JSON says. IntegrityError for parameters that it cannot have; types we do not know are kept."""
    name = stored.field("wb_type", str)
    params = stored.at(stored.optional("params", dict) or {})
    reader = _READERS.get(name)
    if reader is not None:
        return reader(params)
    media = kind_of({"_type": name})
    return MediaType(media) if media is not None and not params.value else OtherType(stored.value)


def _read_union(params: Stored) -> ColumnType:
    return UnionType(read_type(params.at(kind)) for kind in params.optional("allowed_types", list) or [])


def _read_list(params: Stored) -> ColumnType:
    element = params.optional("element_type", dict)
    return ListType(read_type(params.at(element)) if element else UNKNOWN, params.optional("length", int))


def _read_array(params: Stored) -> ColumnType:
    shape = params.field("shape", list)
    if not all(type(size) is int and size >= 0 for size in shape):
        raise params.malformed(f"{shown(shape)} is not the shape of an array")
    where = params.optional("serialization_path", dict)
    if where is None:
        return ArrayType(shape)
    at = params.at(where)
    return ArrayType(shape, (at.field("path", str), at.field("key", str)))


def _read_dict(params: Stored) -> ColumnType:
    fields = params.optional("type_map", dict) or {}
    return DictType({key: read_type(params.at(kind)) for key, kind in fields.items()})


def _read_const(params: Stored) -> ColumnType:
    value = _read_constant(params)
    return OtherType({"wb_type": "const", "params": params.value}) if isinstance(value, (list, dict, set)) else ConstType(value)


def _read_constant(params: Stored) -> Any:
    value = params.value.get("val")
    if params.optional("is_set", bool) and isinstance(value, list):
        return _as_set(params, value)
    return value


def _as_set(params: Stored, value: Any) -> frozenset[Any]:
    if not isinstance(value, list) or not all(isinstance(item, (str, int, float)) for item in value):
        raise params.malformed(f"{shown(value)} is not a list of names or numbers")
    return frozenset(value)


def _read_image(params: Stored) -> ColumnType:
    found: dict[str, Any] = {}
    for name, empty in NO_ANNOTATIONS.items():
        const = params.optional(name, dict)
        value = _read_constant(params.at(params.at(const).optional("params", dict) or {})) if const else None
        if value is None or value == []:
            value = empty
        if not isinstance(value, type(empty)):
            raise params.malformed(f"{name!r} is {shown(value)}")
        found[name] = value
    for name in _LAYERS:
        found[name] = {key: _as_set(params, ids) for key, ids in found[name].items()}
    for name in _MAPS:
        if not all(isinstance(labels, dict) for labels in found[name].values()):
            raise params.malformed(f"{name!r} is {shown(found[name])}")
    return ImageType(found)


def _read_classes(params: Stored) -> ColumnType:
    where = params.at(params.field("classes_obj", dict))
    classes = where.source.get(where.field("path", str), where.path) if "path" in where.value else Classes.read(where)
    if not isinstance(classes, Classes):
        raise params.malformed(f"{where.value.get('path')!r} is not a set of classes")
    return ClassesIdType(classes)


_READERS: dict[str, Callable[[Stored], ColumnType]] = {
    **{kind.name: (lambda params, kind=kind: kind) for kind in (NONE, STRING, NUMBER, TIMESTAMP, BOOLEAN, ANY, UNKNOWN)},  # type: ignore[misc]
    **{name: (lambda params: PRIMARY_KEY) for name in ("primaryKey", "wandb.TablePrimaryKey")},
    **{name: (lambda params: ObjectType(params.field("class_name", str))) for name in ("pythonObject", "object")},
    **dict.fromkeys(("typedDict", "dictionary"), _read_dict),
    **dict.fromkeys(("image-file", "wandb.Image"), _read_image),
    **dict.fromkeys(("classesId", "wandb.Classes_id"), _read_classes),
    "union": _read_union,
    "list": _read_list,
    "ndarray": _read_array,
    "const": _read_const,
}


def register(names: Iterable[str], reader: Callable[[Stored], ColumnType]) -> None:
    """Read types of these names with ``reader``: those that refer to tables are made where tables are."""
    _READERS.update(dict.fromkeys(names, reader))


def milliseconds(value: Any) -> int | None:
    """A date or a datetime (of no zone: UTC) as JSON has it: whole milliseconds since 1970, the rest dropped."""
    if is_missing(value):
        return None
    if is_scalar(value):
        return int(value.astype("datetime64[ms]").astype("int64"))
    if not isinstance(value, datetime.datetime):
        value = datetime.datetime(value.year, value.month, value.day)
    if value.tzinfo is None:
        value = value.replace(tzinfo=datetime.UTC)
    return int((value - _EPOCH) // datetime.timedelta(milliseconds=1))


def time_of(value: float) -> datetime.datetime:
    """The datetime of :func:`milliseconds`, in UTC. OverflowError or ValueError for what is none."""
    return _EPOCH + datetime.timedelta(milliseconds=value)


_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
