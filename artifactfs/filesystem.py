"""fsspec: ``artifactfs://entity/project/collection:alias/path``, for pandas, pyarrow, torch and whatever else takes such URLs.

No alias means ``latest``. ``artifactfs://entity/project``, ``artifactfs://entity`` and ``artifactfs://`` list what is below.
Symlinks of a version are followed inside it, and never out of it. Nothing can be written: versions do not change.

An open file stays what it was. An alias that moves is seen within a second; who needs several files of one version names it by
its number or semantic version, or asks ``info(path)["version"]`` first.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any, NamedTuple, NoReturn

from cachetools import LRUCache, TTLCache
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from artifactfs import session
from artifactfs.errors import ArtifactFSError, NotFoundError, ReadOnlyError, UsageError, also
from artifactfs.model import BLOCK, Dir, Entry, File, Ref, Symlink, Version
from artifactfs.names import LATEST, ArtifactName, entry_path, parse, parse_prefix, version_number
from artifactfs.reader import Handle
from artifactfs.semver import is_semver
from artifactfs.session import Session

_MOVES = 1.0  # seconds that an alias is taken for what it was
_VERSIONS = 256
_LINKS = 40  # as many as Linux follows in one path
_NAME_PARTS = 3


class _Found(NamedTuple):
    """What a path leads to: the entry at ``inside`` of ``version``, behind all links."""

    version: Version
    inside: str
    entry: Dir | File | Ref


class ArtifactFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """The versions of a store as files. Threads may share one."""

    protocol = "artifactfs"
    root_marker = ""
    sep = "/"

    def __init__(self, store: str | None = None, **options: Any) -> None:
        """``store``: a URL or path instead of the settings'; these are those in force at each call."""
        super().__init__(**options)
        self._store = store
        self._lock = threading.Lock()
        self._pinned: LRUCache[tuple[str, str], Version] = LRUCache(_VERSIONS)
        self._moving: TTLCache[tuple[str, str], Version] = TTLCache(_VERSIONS, _MOVES, timer=time.monotonic)

    # Looking

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        """``name``, ``size`` (None where it is not known), ``type``; in a version also ``version``, ``digest``, and
        ``content_id`` or ``ref``. FileNotFoundError."""
        path = self._strip_protocol(path)
        if _is_above(path):
            self._names_below(path)
            return _directory(path)
        found = self._find(path)
        return self._describe(path, found.version, found.entry)

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        """What is in a directory, by name; of a file itself. FileNotFoundError."""
        path = self._strip_protocol(path)
        if _is_above(path):
            below = [_directory(f"{path}/{name}" if path else name) for name in self._names_below(path)]
        else:
            found = self._find(path)
            if isinstance(found.entry, Dir):
                below = list(self._list(path, found.version, found.inside, found.entry))
            else:
                below = [self._describe(path, found.version, found.entry)]
        return below if detail else [item["name"] for item in below]

    def find(self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **options: Any) -> Any:
        """The files below a directory at any depth, links to directories not followed; in walk order, without a listing each."""
        path = self._strip_protocol(path)
        found = None if _is_above(path) else self._find(path)
        if found is None or not isinstance(found.entry, Dir) or (maxdepth is not None and maxdepth < 1):
            return super().find(path, maxdepth=maxdepth, withdirs=withdirs, detail=detail, **options)
        items: dict[str, dict[str, Any]] = {}
        if withdirs:
            items[path] = self._describe(path, found.version, found.entry)
        for below, entry in self._session.store.tree.walk(found.entry):
            if maxdepth is not None and below.count("/") >= maxdepth:
                continue
            if withdirs or not isinstance(entry, Dir):
                item = self._item(f"{path}/{below}", found.version, _join(found.inside, below), entry)
                items[item["name"]] = item
        ordered = dict(sorted(items.items()))
        return ordered if detail else list(ordered)

    def checksum(self, path: str) -> str:
        """The content id, hex; of a reference what pins it."""
        info = self.info(path)
        return str(info.get("content_id") or info.get("digest") or info["name"])

    ukey = checksum

    def created(self, path: str) -> datetime:
        """When the version was made."""
        path = self._strip_protocol(path)
        if _is_above(path):
            raise NotImplementedError(f"{path or '/'} has no time: only versions have")
        return datetime.fromisoformat(self._find(path).version.created_at)

    modified = created

    # Reading

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        """The bytes from ``start`` to ``end`` (negative: from the end), checked, as far as there are any."""
        handle = self._handle(self._strip_protocol(path))
        try:
            size = _size_of(handle)
            first, last, _ = slice(start, end).indices(size)
            return _read(handle, first, last)
        finally:
            handle.close()

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        autocommit: bool = True,
        cache_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> ArtifactFile:
        if mode != "rb":
            self._refuse(path)
        handle = self._handle(path)
        size = _size_of(handle)
        return ArtifactFile(self, path, handle, block_size=block_size or BLOCK, size=size, cache_options=cache_options, **options)

    def _handle(self, path: str) -> Handle:
        if _is_above(path):
            self._names_below(path)
            raise _is_a_directory(path)
        found = self._find(path)
        entry, root = found.entry, found.version.root
        if isinstance(entry, Dir):
            raise _is_a_directory(path)
        opened = self._session
        where = f"{found.version.qualified_name}/{found.inside}"
        return opened.reader.open(entry, where, lambda: opened.store.tree.page_of(root, found.inside))

    # Refusing

    def _refuse(self, path: object = "", *_: Any, **__: Any) -> NoReturn:
        text = "cannot be written: versions do not change; log another one, or mount a stage: artifactfs stage"
        raise also(ReadOnlyError(f"artifactfs://{self._strip_protocol(str(path))} {text}"), PermissionError)

    mkdir = makedirs = rmdir = rm = rm_file = _rm = cp_file = mv = touch = _refuse

    def start_transaction(self) -> NoReturn:
        self._refuse()

    # Inside

    @property
    def _session(self) -> Session:
        settings = session.current_settings()
        return session.opened(dataclasses.replace(settings, store=self._store) if self._store else settings)

    def _names_below(self, path: str) -> list[str]:
        """The names at a level above collections. FileNotFoundError."""
        with _as_os_errors():
            parts = parse_prefix(path)
            store = self._session.store
            names = (store.entities, store.projects, store.collection_names)[len(parts)](*parts)
            if not names and parts:
                raise NotFoundError(f"{store.url} has nothing below {path!r}")
            return list(names)

    def _find(self, path: str) -> _Found:
        with _as_os_errors():
            parts = path.split("/", _NAME_PARTS)
            name = parse("/".join(parts[:_NAME_PARTS]))
            inside = entry_path(parts[_NAME_PARTS]) if len(parts) > _NAME_PARTS and parts[_NAME_PARTS].strip("/") else ""
            version = self._version(name)
            found = self._follow(version, inside)
            if found is None:
                raise NotFoundError(f"{version.qualified_name} has no path {inside!r}")
            return found

    def _version(self, name: ArtifactName) -> Version:
        alias = name.alias or LATEST
        store = self._session.store
        key = (store.url, f"{name.path}:{alias}")
        remembered = self._pinned if version_number(alias) is not None or is_semver(alias) else self._moving
        with self._lock:
            version = remembered.get(key)
        if version is None:
            version = store.version(name)
            with self._lock:
                remembered[key] = version
        return version

    def _follow(self, version: Version, path: str) -> _Found | None:
        """What ``path`` leads to, links followed; None if that is nothing of the version."""
        tree = self._session.store.tree
        todo = [part for part in reversed(path.split("/")) if part]
        above: list[tuple[str, Dir]] = []
        here: Dir | File | Ref = version.root
        name = ""
        links = 0
        while todo:
            part = todo.pop()
            if part == "..":
                if not above:
                    return None
                name, here = above.pop()
                continue
            entry = tree.lookup(here, part) if isinstance(here, Dir) else None
            if isinstance(entry, Symlink):
                links += 1
                if links > _LINKS or entry.target.startswith("/"):
                    return None
                todo += [step for step in reversed(entry.target.split("/")) if step not in ("", ".")]
                continue
            if entry is None or not isinstance(here, Dir):
                return None
            above.append((name, here))
            name, here = _join(name, part), entry
        return _Found(version, name, here)

    def _list(self, path: str, version: Version, inside: str, folder: Dir) -> Iterator[dict[str, Any]]:
        for entry in self._session.store.tree.entries(folder):
            yield self._item(f"{path}/{entry.name}", version, _join(inside, entry.name), entry)

    def _item(self, path: str, version: Version, inside: str, entry: Entry) -> dict[str, Any]:
        """An entry as it is listed: a link as what it leads to."""
        if not isinstance(entry, Symlink):
            return self._describe(path, version, entry)
        target = self._follow(version, inside)
        seen = self._describe(path, version, target.entry) if target else {"name": path, "size": 0, "type": "other"}
        return {**seen, "islink": True, "destination": entry.target}

    def _describe(self, path: str, version: Version, entry: Dir | File | Ref) -> dict[str, Any]:
        if isinstance(entry, Dir):
            return {**_directory(path), "version": version.qualified_name, "digest": entry.digest.hex()}
        seen = {"name": path, "size": entry.size if entry.size >= 0 else None, "type": "file", "version": version.qualified_name}
        seen |= {"digest": entry.digest, "executable": entry.executable, "created": version.created_at}
        return seen | ({"ref": entry.uri} if isinstance(entry, Ref) else {"content_id": entry.id.hex()})


class ArtifactFile(AbstractBufferedFile):  # type: ignore[misc]  # fsspec has no types
    """An open file. Every byte is checked before it is given."""

    def __init__(self, fs: ArtifactFileSystem, path: str, handle: Handle, **options: Any) -> None:
        self._handle = handle
        super().__init__(fs, path, mode="rb", **options)

    def _fetch_range(self, start: int, end: int) -> bytes:
        return _read(self._handle, start, end)

    def close(self) -> None:
        if not self.closed:
            self._handle.close()
        super().close()


class _as_os_errors:
    """Errors inside that a file system would raise are OSErrors, too: programs look for these."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (NotFoundError, UsageError)):
            raise also(error, FileNotFoundError) from None


def _is_above(path: str) -> bool:
    """Whether a path is of a level above collections."""
    return path.count("/") < _NAME_PARTS - 1


def _is_a_directory(path: str) -> ArtifactFSError:
    return also(UsageError(f"artifactfs://{path} is a directory, which has no bytes"), IsADirectoryError)


def _directory(path: str) -> dict[str, Any]:
    return {"name": path, "size": 0, "type": "directory"}


def _size_of(handle: Handle) -> int:
    if handle.size < 0:
        handle.read(0, 1)
    return handle.size


def _read(handle: Handle, start: int, end: int) -> bytes:
    data = handle.read(start, max(end - start, 0))
    pieces = [data]
    start += len(data)
    while data and start < end:
        data = handle.read(start, end - start)
        pieces.append(data)
        start += len(data)
    return b"".join(pieces) if len(pieces) > 1 else pieces[0]


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
