"""The files of media objects: made in memory, the user's own, entries of a version, or at a URI.

A payload is fixed when it is made: its checksum is taken then, and a user's file that changes before it is stored is refused.
Those of a version are fetched when somebody first asks for the bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
from typing import Any, ClassVar, Protocol, Self, TypeGuard

from artifactfs import settings
from artifactfs.draft import CopyArea
from artifactfs.errors import ConflictError, UsageError, from_os_error
from artifactfs.media.base import EntryAddition, FileAddition, Media, Plan, ReferenceAddition, Source, Stored, base_name


class Payload(Protocol):
    """The bytes of a media object."""

    @property
    def sha256(self) -> str:
        """Hex; of a URI its own, as W&B has it."""

    @property
    def name(self) -> str:
        """The last part of its path."""

    def local(self) -> str:
        """A local file with the bytes. It is not to be changed."""

    def put(self, plan: Plan, folder: str) -> str:
        """Plan it as an entry below ``folder``; returns the path."""


class MadeFile:
    """Bytes that were made in memory, kept in a file of ours as long as this object lives."""

    def __init__(self, data: bytes, extension: str) -> None:
        self._area = _area()
        self._local = f"{self._area.new_path()}{extension}"
        try:
            with open(self._local, "xb") as file:
                file.write(data)
        except OSError as error:
            raise from_os_error(error, f"writing {self._local}") from None
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.name = f"{hashlib.md5(data, usedforsecurity=False).hexdigest()[:20]}{extension}"

    def __del__(self) -> None:
        if self._area is _areas.get(os.getpid()):  # a forked child has our objects, but not our files
            try:
                os.unlink(self._local)
            except (OSError, AttributeError):
                return

    def local(self) -> str:
        return self._local

    def put(self, plan: Plan, folder: str) -> str:
        return plan.add(FileAddition(f"{folder}/{self.name}", self._local, self))


class UserFile:
    """A file that the user named. Its bytes are those of now."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._local = os.fspath(path)
        try:
            if not os.path.isfile(self._local):
                raise UsageError(f"Path is not a file: {self._local!r}")
            self._stamp = _stamp(self._local)
            self.sha256 = _sha256(self._local)
        except OSError as error:
            raise from_os_error(error, f"reading {self._local}") from None
        self.name = base_name(self._local)

    def local(self) -> str:
        return self._local

    def put(self, plan: Plan, folder: str) -> str:
        try:
            changed = _stamp(self._local) != self._stamp
        except OSError:
            changed = True
        if changed:
            raise ConflictError(f"{self._local} has changed since the object was made of it; make the object again")
        return plan.add(FileAddition(f"{folder}/{self.sha256[:20]}/{self.name}", self._local, self))


class StoredFile:
    """An entry of a version, fetched and checked against ``sha256`` when its bytes are first asked for."""

    def __init__(self, source: Source, entry: Any, by: str, sha256: str) -> None:
        self._source = source
        self._entry = entry
        self._by = by
        self._local = ""
        self._sha256 = sha256
        self.name: str = entry.path.rpartition("/")[2]

    @property
    def sha256(self) -> str:
        if not self._sha256:
            self._sha256 = _sha256(self.local())
        return self._sha256

    @property
    def entry(self) -> Any:
        return self._entry

    def local(self) -> str:
        if not self._local:
            local = self._source.fetch(self._entry)
            if self._sha256 and self._entry.ref is None and _sha256(local) != self._sha256:
                raise self._source.malformed(self._by, f"{self._entry.path!r} is not the file whose SHA-256 it gives")
            self._local = local
        return self._local

    def put(self, plan: Plan, folder: str) -> str:
        return plan.add(EntryAddition(self._entry.path, self._entry, self.local))


class RemoteFile:
    """A URI, stored as a reference."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.sha256 = hashlib.sha256(uri.encode()).hexdigest()
        self.name = uri.rstrip("/").rpartition("/")[2]

    def local(self) -> str:
        raise UsageError(f"{self.uri} is a reference: its bytes are not here; log the artifact and get() the object to read it")

    def put(self, plan: Plan, folder: str) -> str:
        return plan.add(ReferenceAddition(f"{folder}/{self.sha256[:20]}/{self.name}", self.uri))


class FileMedia(Media):
    """A media object that is one file, with a caption perhaps. ``folder`` is where its files are in an artifact."""

    folder: ClassVar[str]

    def __init__(self, payload: Payload, caption: str | None = None) -> None:
        self._payload = payload
        self._caption = caption

    @property
    def path(self) -> str:
        """The local file with its bytes, fetched if need be. It is not to be changed."""
        return self._payload.local()

    @property
    def sha256(self) -> str:
        """The SHA-256 of its file, hex."""
        return self._payload.sha256

    @property
    def caption(self) -> str | None:
        return self._caption

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and (self.sha256, self.caption) == (other.sha256, other.caption)

    def __hash__(self) -> int:
        return hash((type(self), self.sha256))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._payload.name}>"

    def describe(self, plan: Plan) -> dict[str, Any]:
        value = {"_type": self.kind, "path": self._payload.put(plan, self.folder), "sha256": self.sha256}
        return value if self._caption is None else {**value, "caption": self._caption}

    @classmethod
    def read(cls, stored: Stored) -> Self:
        found = cls.__new__(cls)
        FileMedia.__init__(found, stored_file(stored), stored.optional("caption", str))
        return found


class PictureMedia(FileMedia):
    """A file of pixels, whose width and height may be known."""

    _size: tuple[int, int] | None

    @property
    def width(self) -> int | None:
        """Pixels; None where it is not known."""
        return self._size[0] if self._size else None

    @property
    def height(self) -> int | None:
        """Pixels; None where it is not known."""
        return self._size[1] if self._size else None

    @classmethod
    def read(cls, stored: Stored) -> Self:
        found = super().read(stored)
        width, height = stored.optional("width", int), stored.optional("height", int)
        found._size = (width, height) if width is not None and height is not None else None
        return found


def stored_file(stored: Stored) -> StoredFile:
    """The payload that a stored object names."""
    entry = stored.source.entry(stored.field("path", str), stored.path)
    return StoredFile(stored.source, entry, stored.path, stored.optional("sha256", str) or "")


def is_remote(value: Any) -> TypeGuard[str]:
    """Whether it is a URI that media take as a reference."""
    return isinstance(value, str) and re.match(r"(gs|s3|https?)://", value) is not None


def is_path(value: Any) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(value, (str, os.PathLike))


_areas: dict[int, CopyArea] = {}


def _area() -> CopyArea:
    """This process's directory for what is made in memory; it goes with the process."""
    area = _areas.get(os.getpid())
    if area is None:
        _areas.clear()
        area = _areas[os.getpid()] = CopyArea(settings.load().staging_dir / ".drafts")
    return area


def _stamp(path: str) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
