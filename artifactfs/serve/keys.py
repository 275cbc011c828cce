"""API keys: who may read and write which entities. A file for the owner alone, without any key in it.

The file is JSON: ``{"keys": [{"name", "hash", "grants": {entity or "*": "read" or "write"}, "created_at"}]}``. ``hash`` is the
plain SHA-256 of the key: a key is 160 random bits that nobody chose, so there is nothing that guessing (which slow, salted
hashes are against) could find, and each request is checked at the cost of one hash. The file is replaced as a whole, under a
lock beside it; a running server looks at its stamp with each request, so that a key that was added works, and one that was
removed does not, from the next request on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import re
import secrets
import stat
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from artifactfs.errors import ConflictError, NotFoundError, NotPermittedError, UsageError, from_os_error
from artifactfs.names import check_entity
from artifactfs.store.native import now

Right: TypeAlias = Literal["read", "write"]

ANY = "*"
KEY_BYTES = 20
"""Random bytes of a key: 40 hexadecimal characters, which is what every ``wandb`` client takes for a key."""

_MAX_FILE = 4 << 20
_NAME = re.compile(r"[\w.@-]{1,64}")


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """One key as it is stored. ``grants`` maps an entity, or ``*`` for all, to what the key may do there; write includes read."""

    name: str
    hash: str
    grants: dict[str, Right]
    created_at: str = ""


class _File(msgspec.Struct, kw_only=True):
    keys: list[Key] = []


@dataclasses.dataclass(frozen=True, slots=True)
class Caller:
    """Whoever sent a request with a key. ``id`` names the key in signed URLs and says nothing about it."""

    name: str
    id: str
    grants: Mapping[str, Right]

    def can_read(self, entity: str) -> bool:
        return entity in self.grants or ANY in self.grants

    def can_write(self, entity: str) -> bool:
        return "write" in (self.grants.get(entity), self.grants.get(ANY))

    @property
    def opens_all(self) -> bool:
        """Whether its key opens every entity."""
        return ANY in self.grants

    @property
    def entities(self) -> list[str]:
        """The entities that its key names, those that it may write to first."""
        named = [entity for entity in self.grants if entity != ANY]
        return sorted(named, key=lambda entity: (self.grants[entity] != "write", entity))


class KeyFile:
    """The keys in the file at ``path``. Threads may share one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._stamp: tuple[int, ...] = ()
        self._by_hash: dict[str, Caller] = {}
        self._by_id: dict[str, Caller] = {}

    def caller(self, key: str) -> Caller | None:
        """Whom ``key`` belongs to, None if there is no such key now. NotPermittedError if the file cannot be trusted."""
        self._refresh()
        return self._by_hash.get(_hash(key))

    def by_id(self, id: str) -> Caller | None:
        """The caller of that id, None if the key was removed."""
        self._refresh()
        return self._by_id.get(id)

    def all(self) -> list[Key]:
        """All keys, by name. An absent file has none."""
        return sorted(_read(self.path), key=lambda key: key.name)

    def add(self, name: str, grants: Mapping[str, Right]) -> str:
        """Make a key and return it: this is the only time that it can be seen. ConflictError if the name is taken."""
        if not _NAME.fullmatch(name):
            raise UsageError(f"key name {name!r} may only contain letters, digits, dots, @, _ and -, at most 64 of them")
        if not grants:
            raise UsageError(f"key {name!r} would open nothing; name at least one entity, or * for all")
        for entity in grants:
            if entity != ANY:
                check_entity(entity)
        with self._changing() as keys:
            if any(key.name == name for key in keys):
                raise ConflictError(f"there is a key {name!r} already; remove it first, or choose another name")
            made = secrets.token_hex(KEY_BYTES)
            keys.append(Key(name=name, hash=_hash(made), grants=dict(grants), created_at=now()))
        return made

    def remove(self, name: str) -> None:
        """Take a key away. NotFoundError."""
        with self._changing() as keys:
            kept = [key for key in keys if key.name != name]
            if len(kept) == len(keys):
                raise NotFoundError(f"there is no key {name!r} in {self.path}")
            keys[:] = kept

    @contextlib.contextmanager
    def _changing(self) -> Iterator[list[Key]]:
        """The keys, to be changed; written at the end. One process at a time."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            held = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise from_os_error(error, f"writing the keys to {self.path}") from None
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            keys = _read(self.path)
            yield keys
            _write(self.path, keys)
        finally:
            os.close(held)

    def _refresh(self) -> None:
        stamp: tuple[int, ...]
        try:
            status = os.stat(self.path)
            stamp = (status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode)
        except OSError:
            stamp = (-1,)
        if stamp == self._stamp:
            return
        with self._lock:
            self._by_hash, self._by_id, self._stamp = {}, {}, ()  # until it was read nobody is let in
            found = _read(self.path)
            callers = {key.hash: Caller(key.name, key.hash[:16], key.grants) for key in found}
            self._by_id = {caller.id: caller for caller in callers.values()}
            self._by_hash, self._stamp = callers, stamp


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _read(path: Path) -> list[Key]:
    """The stored keys. NotPermittedError where others could have read or written them, UsageError for what is no key file."""
    try:
        with open(path, "rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise NotPermittedError(f"{path} can be read or written by others; chmod 600 {path}")
            data = file.read(_MAX_FILE)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise from_os_error(error, f"reading the keys in {path}") from None
    try:
        return msgspec.json.decode(data, type=_File).keys
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not a file of keys: {error}") from None


def _write(path: Path, keys: list[Key]) -> None:
    data = msgspec.json.format(msgspec.json.encode(_File(keys=keys)), indent=1) + b"\n"
    new = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise from_os_error(error, f"writing the keys to {path}") from None
