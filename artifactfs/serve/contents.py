"""Bytes over HTTP: contents by range, from the checked reader; and bodies that arrive, checked, on their way to disk."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import xxhash

from artifactfs.errors import IntegrityError, NotFoundError, UsageError, from_os_error
from artifactfs.manifest import version_id
from artifactfs.model import MD5, XXH128, File, Version
from artifactfs.names import ArtifactName, parse
from artifactfs.reader import Handle
from artifactfs.serve.manifests import entries_after
from artifactfs.serve.saving import find_version, sync
from artifactfs.serve.service import Context

PIECE = 1 << 20
"""Bytes that are read, and held, at a time for each download: hundreds of slow clients must fit into memory."""

_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})")


class Span(NamedTuple):
    """The bytes from ``start`` to before ``end``; ``partial`` if that was asked for."""

    start: int
    end: int
    partial: bool


def span_of(header: str | None, size: int) -> Span | None:
    """What a Range header asks of ``size`` bytes; None if it cannot be satisfied. What is no single range is the whole."""
    whole = Span(0, size, False)
    match = _RANGE.fullmatch(header.strip()) if header else None
    if match is None or not (match[1] or match[2]):
        return whole
    if not match[1]:
        count = min(int(match[2]), size)
        return Span(size - count, size, True) if count else None
    start, end = int(match[1]), min(int(match[2]) + 1 if match[2] else size, size)
    if match[2] and int(match[2]) < start:
        return whole
    return Span(start, end, True) if start < size else None


class Download:
    """A stored content that is sent. For one thread at a time; :meth:`close` it."""

    def __init__(self, context: Context, file: File, where: str) -> None:
        self.size = file.size
        self.etag = f'"{file.id.hex()}"'
        self._handle: Handle = context.service.reader.open(file, where)

    def read(self, offset: int, end: int) -> bytes:
        """The next piece before ``end``; IntegrityError rather than a short one."""
        wanted = min(PIECE, end - offset)
        data = self._handle.read(offset, wanted)
        if len(data) != wanted:
            raise IntegrityError(f"a content of {self.size} bytes ends after {offset + len(data)}")
        return data

    def close(self) -> None:
        self._handle.close()


class Begun(NamedTuple):
    """An answer with a content: its head, and ``body``, of which bytes from ``offset`` to before ``end`` are yet to be read. A
    download of which nothing is left is closed."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    offset: int = 0
    end: int = 0


def begin(opened: Download, method: str, asked: Mapping[str, str]) -> Begun:
    """What a request with the headers ``asked`` is answered. Closes the download if that is all, or fails."""
    try:
        begun = _begin(opened, method, asked)
    except BaseException:
        opened.close()
        raise
    if begun.offset == begun.end:
        opened.close()
    return begun


def _begin(opened: Download, method: str, asked: Mapping[str, str]) -> Begun:
    headers = {
        "ETag": opened.etag,
        "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream",
        "Content-Disposition": "attachment",
    }
    if opened.etag in asked.get("if-none-match", ""):
        return Begun(304, headers)
    wanted = asked.get("range") if asked.get("if-range", opened.etag) == opened.etag else None
    span = span_of(wanted, opened.size)
    if span is None:
        return Begun(416, {**headers, "Content-Range": f"bytes */{opened.size}"})
    headers["Content-Length"] = str(span.end - span.start)
    if span.partial:
        headers["Content-Range"] = f"bytes {span.start}-{span.end - 1}/{opened.size}"
    status = 206 if span.partial else 200
    if method == "HEAD" or span.start == span.end:
        return Begun(status, headers)
    first = opened.read(span.start, span.end)  # what fails at once has a status
    return Begun(status, headers, first, span.start + len(first), span.end)


def open_entry(context: Context, version: str, path: str) -> Download:
    """The content at a path of a version, which the caller may read. NotFoundError."""
    name = parse(version)
    context.need_read(name.entity, version)
    found = context.service.content_version(name)
    context.need_read(found.origin.entity, version)
    entry = context.store.tree.resolve(found.root, path)
    if not isinstance(entry, File):
        raise NotFoundError(f"{version} has no file {path!r}")
    return Download(context, entry, f"{version}/{path}")


def open_by_digest(context: Context, entity: str, ids: list[str], hex_digest: str) -> Download:
    """The content with a digest in the first of some versions, by id, that has it; without ids, in any of the entity that was
    seen to have it. NotFoundError."""
    try:
        digest = bytes.fromhex(hex_digest)
    except ValueError:
        digest = b""
    if len(digest) == 16:
        if not ids:
            names = (parse(f"{path}:v{number}") for path, number in context.state.knowing(entity, digest))
            ids = [version_id(context.version(name)) for name in names if _is_there(context, name)]
        for id in dict.fromkeys(ids):
            with contextlib.suppress(NotFoundError):
                version = find_version(context, id)
                found = _find(context, version, digest)
                if found is not None:
                    return Download(context, found[1], f"{version.qualified_name}/{found[0]}")
    raise NotFoundError("there is no such content")


def _is_there(context: Context, name: ArtifactName) -> bool:
    try:
        context.version(name)
    except NotFoundError:
        return False
    return True


def _find(context: Context, version: Version, digest: bytes) -> tuple[str, File] | None:
    """(path, file) with an MD5 or XXH128 in a version. What is not noted yet is noted for the whole version."""
    collection = f"{version.entity}/{version.project}/{version.collection}"
    place = context.state.known(collection, digest)
    if place is not None:
        with contextlib.suppress(NotFoundError):
            other = context.version(ArtifactName(version.entity, version.project, version.collection, f"v{place[0]}"))
            entry = context.store.tree.resolve(other.root, place[1])
            if isinstance(entry, File) and _has(context, entry, digest):
                return place[1], entry
    wanted = None
    noted = []
    for path, entry in entries_after(context.store.tree, version.root):
        if isinstance(entry, File):
            md5 = base64.b64decode(context.service.checksums.md5(entry, f"{version.qualified_name}/{path}"))
            noted.append((md5, path))
            if wanted is None and _has(context, entry, digest):
                wanted = path, entry
        if len(noted) >= 10_000:
            context.state.know(collection, version.number, noted)
            noted = []
    context.state.know(collection, version.number, noted)
    return wanted


def _has(context: Context, file: File, digest: bytes) -> bool:
    text = base64.b64encode(digest).decode()
    if file.algorithm == XXH128 and file.checksum == text:
        return True
    return (file.checksum if file.algorithm == MD5 else context.service.checksums.known(file)) == text


class Arrival:
    """A body that is written to disk under another name until it is complete and has the digest that it must have.

    For one thread at a time; nothing is on disk before the first :meth:`write`. UsageError for one that is larger than ``most``,
    IntegrityError for one that is not what was said.
    """

    def __init__(self, target: Path, most: int, md5: str, digest: str) -> None:
        self.size = 0
        self._target = target
        self._most = most
        self._expected = md5, digest
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._xxh128 = xxhash.xxh3_128() if digest else None
        self._path = target.with_name(f"{target.name}.{secrets.token_hex(4)}.tmp")
        self._file: BinaryIO | None = None

    def _opened(self) -> BinaryIO:
        if self._file is None:
            self._target.parent.mkdir(mode=0o700, exist_ok=True)
            self._file = open(self._path, "xb", buffering=0)  # noqa: SIM115 - closed by finish or abandon
        return self._file

    def write(self, data: bytes | bytearray) -> None:
        self.size += len(data)
        if self.size > self._most:
            raise UsageError(f"the body is larger than {self._most} bytes, which is the most that this server takes")
        self._md5.update(data)
        if self._xxh128 is not None:
            self._xxh128.update(data)
        try:
            file = self._opened()
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
        except OSError as error:
            raise from_os_error(error, "keeping an upload") from None

    def finish(self, last: bytes | bytearray) -> str:
        """Write the last bytes, check what arrived, and give it its name, to stay; its hex MD5."""
        self.write(last)
        md5, digest = self._expected
        found = base64.b64encode(self._md5.digest()).decode()
        if md5 and found != md5:
            raise IntegrityError(f"what arrived has the MD5 {found}, not {md5}; send it again")
        if digest and self._xxh128 is not None and base64.b64encode(self._xxh128.digest()).decode() != digest:
            raise IntegrityError(f"what arrived has not the XXH128 {digest}; send it again")
        try:
            file = self._opened()
            sync(file)
            file.close()
            os.replace(self._path, self._target)
            _sync_folder(self._target.parent)
        except OSError as error:
            raise from_os_error(error, "keeping an upload") from None
        return self._md5.hexdigest()

    def abandon(self) -> None:
        """Remove what arrived, unless it was finished."""
        if self._file is None:
            return
        self._file.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)


def _sync_folder(path: Path) -> None:
    held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(held)
    finally:
        os.close(held)


def read_file(path: Path) -> Iterator[bytes]:
    """The bytes of a file of a run."""
    with open(path, "rb") as file:
        while data := file.read(PIECE):
            yield data
