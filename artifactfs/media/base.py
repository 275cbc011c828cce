"""What all media objects have in common: how one becomes entries of a draft, and how entries become one again.

Writing is planned first: an object describes itself as JSON and names in a :class:`Plan` whatever else it consists of. Nothing
touches the draft before the plan is complete, so an object that cannot be stored leaves the draft as it was.

Reading trusts nothing: a stored form may come from anywhere. Paths in it are paths of entries of the same version, sizes are
looked at before anything is fetched, and what does not fit is an IntegrityError (a ValueError, too) that names the entry.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, Self, TypeAlias, TypeVar

from artifactfs.content import fingerprint
from artifactfs.errors import ArtifactFSError, IntegrityError, UsageError, also
from artifactfs.names import entry_path

MAX_DOCUMENT = 64 << 20
"""Bytes of the JSON of an object that is no table. Boxes of one image have kilobytes."""
MAX_TABLE = 2 << 30
"""Bytes of the JSON of a table: 200,000 rows of 10 KB. Parsing needs some times that in memory."""

T = TypeVar("T")


class Readable(Protocol):
    """A logged artifact. Its manifest and entries are those of ``manifest.py``, which is above this layer."""

    @property
    def manifest(self) -> Any: ...
    @property
    def name(self) -> str: ...
    def default_root(self) -> str: ...


class FileAddition(NamedTuple):
    """A local file that becomes an entry; it is copied. ``owner`` keeps it until then."""

    path: str
    local: str
    owner: object

    def is_same(self, other: Addition) -> bool:
        return isinstance(other, FileAddition)  # two files are at one path only where that is made of their checksum


class DocumentAddition(NamedTuple):
    """A JSON document that becomes an entry."""

    path: str
    data: bytes

    def is_same(self, other: Addition) -> bool:
        return isinstance(other, DocumentAddition) and other.data == self.data


class EntryAddition(NamedTuple):
    """An entry of another version: its content is shared, or copied from ``local()`` where it is in another store."""

    path: str
    entry: Any
    local: Callable[[], str]

    def is_same(self, other: Addition) -> bool:
        return True  # differing content at a path is found out where both are entries


class ReferenceAddition(NamedTuple):
    """A URI that becomes a reference."""

    path: str
    uri: str

    def is_same(self, other: Addition) -> bool:
        return isinstance(other, ReferenceAddition) and other.uri == self.uri


Addition: TypeAlias = FileAddition | DocumentAddition | EntryAddition | ReferenceAddition


class Plan:
    """What adding an object puts into a draft whose digests are of ``algorithm``.

    ``present`` gives the digest of the draft's entry at a path, None if there is nothing.
    """

    def __init__(self, algorithm: str, present: Callable[[str], str | None] = lambda path: None) -> None:
        self.additions: dict[str, Addition] = {}
        self._algorithm = algorithm
        self._present = present
        self._within: list[int] = []

    def add(self, addition: Addition) -> str:
        """Plan it; returns its path. UsageError for a path that cannot be or that something else has in this plan."""
        path = entry_path(addition.path)
        known = self.additions.get(path)
        if known is not None and not addition.is_same(known):
            raise UsageError(f"two parts of one object would both be {path!r}; give the object another name")
        self.additions.setdefault(path, addition._replace(path=path))
        return path

    def document(self, path: str, value: Any) -> str:
        """Plan a JSON document; returns its path."""
        return self.add(DocumentAddition(path, encode(value)))

    def digest(self, path: str) -> str:
        """The digest that a planned document will have as an entry."""
        addition = self.additions[path]
        assert isinstance(addition, DocumentAddition)
        return fingerprint(addition.data, self._algorithm).digest

    def exists(self, path: str) -> bool:
        """Whether something is planned at ``path`` or the draft has it."""
        return path in self.additions or self._present(path) is not None

    def would_clash(self, path: str, value: Any) -> bool:
        """Whether something else than the JSON document ``value`` is planned at ``path``, or the draft has it."""
        document = DocumentAddition(path, encode(value))
        known = self.additions.get(path)
        if known is not None:
            return not document.is_same(known)
        return self._present(path) not in (None, fingerprint(document.data, self._algorithm).digest)

    @contextlib.contextmanager
    def inside(self, obj: Media) -> Iterator[None]:
        """While the parts of ``obj`` are planned. UsageError if it is a part of itself."""
        if id(obj) in self._within:
            raise UsageError(f"a {type(obj).__name__} refers to itself, directly or through another; it cannot be stored")
        self._within.append(id(obj))
        yield
        self._within.pop()


class Media:
    """An object that an artifact stores as JSON, with files beside it. ``kind`` is its ``_type`` and in its entry's name."""

    kind: ClassVar[str] = ""
    max_document: ClassVar[int] = MAX_DOCUMENT
    _kinds: ClassVar[dict[str, type[Media]]] = {}

    def __init_subclass__(cls) -> None:
        if cls.kind:
            Media._kinds[cls.kind] = cls

    @classmethod
    def entry_name(cls, name: str) -> str:
        """The entry of an object that was added as ``name``."""
        suffix = f"{cls.kind}.json"
        return name if name.endswith(suffix) else f"{name}.{suffix}"

    def describe(self, plan: Plan) -> Any:
        """The object as JSON; its parts are added to ``plan``. UsageError for what cannot be stored."""
        raise NotImplementedError

    @classmethod
    def read(cls, stored: Stored) -> Self:
        """The object that :meth:`describe` gave. IntegrityError for what it never gives."""
        raise NotImplementedError


def kind_of(value: Any) -> type[Media] | None:
    """The class of a JSON value that is an object of ours, by its ``_type``."""
    kind = value.get("_type") if isinstance(value, dict) else None
    return Media._kinds.get(kind) if isinstance(kind, str) else None


class Source:
    """A logged artifact that objects are read from. Files are fetched to the directory that is its default one at this moment."""

    def __init__(self, artifact: Readable) -> None:
        self._manifest = artifact.manifest
        self._name = artifact.name
        self.root = artifact.default_root()
        self._objects: dict[str, Media] = {}
        self._open: list[str] = []

    def find(self, name: str) -> Any:
        """The entry of the object that was added as ``name``, under whichever suffix; None if there is none."""
        for path in dict.fromkeys(kind.entry_name(name) for kind in Media._kinds.values()):
            entry = self._manifest.get_entry_by_path(path)
            if entry is not None:
                return entry
        return None

    def get(self, path: str, by: str = "") -> Media:
        """The object in the entry ``path``, the same one each time. ``by`` is the entry that leads there."""
        entry = self.entry(path, by)
        if path in self._open:
            raise self.malformed(by or path, f"it leads back to itself by {path!r}")
        if path not in self._objects:
            self._open.append(path)
            try:
                self._objects[path] = self._read(entry)
            finally:
                self._open.pop()
        return self._objects[path]

    def entry(self, path: Any, by: str) -> Any:
        """The entry that ``by`` names in its JSON. IntegrityError if that is no path of an entry."""
        try:
            is_path = isinstance(path, str) and entry_path(path) == path
        except UsageError:
            is_path = False
        if not is_path:
            raise self.malformed(by, f"{_short(path)} is no path of an entry")
        entry = self._manifest.get_entry_by_path(path)
        if entry is None:
            raise self.malformed(by, f"it names {_short(path)}, which this version does not have")
        return entry

    def below(self, directory: str) -> list[Any]:
        """The entries below a directory, in order of path."""
        return list(self._manifest.get_entries_in_directory(directory))

    def all(self) -> Iterator[Any]:
        """All entries, in order of path."""
        return iter(self._manifest.entries.values())

    def read(self, path: str) -> Media:
        """As :meth:`get`, but read anew and not kept: for what is too large to keep."""
        return self._read(self.entry(path, path))

    def value(self, path: str) -> Any:
        """The JSON of the entry ``path``, which may be as long as a table."""
        return self._document(path, self.fetch(self.entry(path, path), MAX_TABLE))

    def malformed(self, path: str, what: str) -> ArtifactFSError:
        """The error for a stored form that cannot be right."""
        return also(IntegrityError(f"{path!r} of {self._name} cannot be read as an object: {what}"), ValueError)

    def fetch(self, entry: Any, limit: int | None = None) -> str:
        """The entry as a local file, checked. IntegrityError if it has more than ``limit`` bytes."""
        self._check_size(entry.path, entry.size or 0, limit)
        local = str(entry.download(self.root))
        self._check_size(entry.path, os.path.getsize(local), limit)  # a reference may not have told
        return local

    def _check_size(self, path: str, size: int, limit: int | None) -> None:
        if limit is not None and size > limit:
            raise self.malformed(path, f"it has {size} bytes, and at most {limit} are read; download() gets the file")

    def _read(self, entry: Any) -> Media:
        path: str = entry.path
        named = max(
            (kind for kind in Media._kinds.values() if path.endswith(f"{kind.kind}.json")),
            key=lambda kind: len(kind.kind),
            default=None,
        )
        value = self._document(path, self.fetch(entry, named.max_document if named else MAX_DOCUMENT))
        kind = kind_of(value) or (named if isinstance(value, list) else None)
        if kind is None:
            raise self.malformed(path, "it is not the JSON of a media object")
        try:
            return kind.read(Stored(self, path, value))
        except RecursionError:
            raise self.malformed(path, "its JSON is nested too deeply") from None

    def _document(self, path: str, local: str) -> Any:
        try:
            with open(local, "rb") as file:
                return json.loads(file.read())
        except RecursionError:
            raise self.malformed(path, "its JSON is nested too deeply") from None
        except ValueError as error:
            raise self.malformed(path, f"it is not JSON ({error})") from None


class Stored(NamedTuple):
    """A JSON value of the entry ``path``, whose other entries are in ``source``."""

    source: Source
    path: str
    value: Any

    def at(self, value: Any) -> Stored:
        """Another value of the same entry."""
        return self._replace(value=value)

    def malformed(self, what: str) -> ArtifactFSError:
        return self.source.malformed(self.path, what)

    def field(self, key: str, kind: type[T]) -> T:
        """The value of ``key``, which must be there and of this type."""
        found = self.optional(key, kind)
        if found is None:
            raise self.malformed(f"it has no {key!r}")
        return found

    def optional(self, key: str, kind: type[T]) -> T | None:
        """The value of ``key``; None if it is not there or null."""
        if not isinstance(self.value, dict):
            raise self.malformed(f"{_short(self.value)} is not a JSON object")
        found = self.value.get(key)
        if found is not None and (not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool)):
            raise self.malformed(f"{key!r} is {_short(found)} and not a {_JSON_NAMES[kind]}")
        return found

    def object(self) -> Media:
        """The object that the value is, by its ``_type``."""
        kind = kind_of(self.value)
        if kind is None:
            raise self.malformed(f"{_short(self.value)} is not a media object")
        return kind.read(self)


_JSON_NAMES: Mapping[type, str] = {
    str: "text",
    int: "whole number",
    dict: "JSON object",
    list: "list",
    float: "number",
    bool: "boolean",
}


def encode(value: Any) -> bytes:
    """JSON as W&B writes it: keys in order, ASCII, a space after each separator."""
    return json.dumps(value, sort_keys=True).encode()


def compact(value: Any) -> bytes:
    """JSON as W&B writes payloads: as it comes, UTF-8, no spaces."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def wrong_type(text: str) -> ArtifactFSError:
    """A UsageError that is a TypeError, as W&B raises it."""
    return also(UsageError(text), TypeError)


def shown(value: Any) -> str:
    """A value in a message."""
    return _short(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def base_name(path: str) -> str:
    """The last part of a local path."""
    return os.path.basename(os.path.abspath(path))
