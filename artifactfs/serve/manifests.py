"""``wandb_manifest.json``: made from a version's tree as it is sent, and read, entry by entry, as it was uploaded.

Neither direction holds more than one entry: a version of 1,000,000 entries takes no more memory than one of ten.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import IO, Any

import msgspec

from artifactfs.errors import InvalidNameError, UsageError
from artifactfs.jsonstream import items, members, value
from artifactfs.manifest import version_id
from artifactfs.model import BLAKE3, MD5, XXH128, Dir, Entry, File, Ref, Symlink, Version
from artifactfs.names import entry_path
from artifactfs.serve.service import Service
from artifactfs.tree import Tree

MAX_PATH = 4096
MAX_TEXT = 16384
"""Characters of a digest or reference at most."""

_ENCODE = msgspec.json.Encoder().encode
_PIECE = 64 << 10
_PULSE = 64 << 20
"""Bytes of contents that are read for their MD5 between two signs of life."""


def entries_after(tree: Tree, root: Dir, after: str = "") -> Iterator[tuple[str, File | Ref]]:
    """(path, entry) of the files and references after the path ``after``, in walk order: what was listed before is not read."""
    first, _, rest = after.partition("/")
    if rest:
        folder = tree.lookup(root, first)
        if isinstance(folder, Dir):
            for path, found in entries_after(tree, folder, rest):
                yield f"{first}/{path}", found
    stack: list[tuple[str, Iterator[Entry]]] = [("", tree.entries(root, first))]
    while stack:
        prefix, entries = stack[-1]
        entry: Entry | None = next(entries, None)
        if entry is None:
            stack.pop()
        elif isinstance(entry, Dir):
            stack.append((f"{prefix}{entry.name}/", tree.entries(entry)))
        elif not isinstance(entry, Symlink):
            yield prefix + entry.name, entry


def write_manifest(service: Service, version: Version) -> Iterator[bytes]:
    """The manifest in pieces. Where contents must be read for their MD5, spaces are sent meanwhile, which mean nothing in JSON,
    so that nobody takes the server for dead."""
    head = b'{"version":1,"storagePolicy":"wandb-storage-policy-v1","storagePolicyConfig":{"storageLayout":"V2"},"contents":{'
    yield head
    birth = version_id(version)
    buffer = bytearray()
    separator = b""
    for path, entry in service.store.tree.listing(version.root):
        if isinstance(entry, File) and entry.algorithm == BLAKE3 and service.checksums.known(entry) is None:
            yield bytes(buffer)
            buffer.clear()
            told = 0
            for offset in service.checksums.reading(entry, f"{version.qualified_name}/{path}"):
                if offset - told >= _PULSE:
                    told = offset
                    yield b" "
        buffer += separator + _ENCODE(path) + b":" + _ENCODE(_fields(service, version, path, entry, birth))
        separator = b","
        if len(buffer) >= _PIECE:
            yield bytes(buffer)
            buffer.clear()
    yield bytes(buffer) + b"}}"


def _fields(service: Service, version: Version, path: str, entry: File | Ref, birth: str) -> dict[str, Any]:
    if isinstance(entry, Ref):
        fields: dict[str, Any] = {"digest": entry.digest, "ref": entry.uri}
        if entry.size >= 0:
            fields["size"] = entry.size
        if entry.extra:
            fields["extra"] = entry.extra
        return fields
    digest = service.checksums.digest(entry, f"{version.qualified_name}/{path}")
    fields = {"digest": digest, "size": entry.size, "birthArtifactID": birth}
    if entry.algorithm == XXH128:
        fields["extra"] = {"alg": XXH128}
    return fields


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of an uploaded manifest. ``path`` is canonical; ``size`` -1 is unknown."""

    path: str
    digest: str
    size: int = -1
    ref: str = ""
    extra: dict[str, str | int] = {}
    birth: str = ""

    @property
    def algorithm(self) -> str:
        """MD5 unless the entry says XXH128; a reference has no other than MD5."""
        return XXH128 if self.extra.get("alg") == XXH128 and not self.ref else MD5


def read_manifest(file: IO[bytes]) -> Iterator[Listed]:
    """The entries of an uploaded manifest, in its order. UsageError for what is none, InvalidNameError for a path that cannot be,
    after what came before it. ``local_path`` and keys that we do not know are passed over."""
    version: Any = None
    try:
        for key, events in members(file):
            if key == "contents":
                for path, fields in items(events):
                    yield _listed(path, fields)
            else:
                found = value(events)
                version = found if key == "version" else version
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"the manifest cannot be read: {str(error)[:200]}") from None
    if version != 1 or isinstance(version, bool):
        raise UsageError(f"the manifest has version {str(version)[:20]!r}; this server knows version 1")


def _listed(path: Any, fields: Any) -> Listed:
    if not isinstance(path, str) or len(path) > MAX_PATH:
        raise InvalidNameError(f"Invalid artifact path: {str(path)[:40]!r} is too long; at most {MAX_PATH} characters can be")
    canonical = entry_path(path)
    if canonical != path:
        raise InvalidNameError(f"Invalid artifact path: {path!r}; write {canonical!r}")
    if not isinstance(fields, dict):
        raise UsageError(f"the manifest's entry {path!r} is no object")
    digest, size, ref, extra = (fields.get(key) for key in ("digest", "size", "ref", "extra"))
    birth = fields.get("birthArtifactID")
    if not isinstance(digest, str) or not digest or len(digest) > MAX_TEXT:
        raise UsageError(f"the manifest's entry {path!r} has no digest that can be")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 62):
        raise UsageError(f"the manifest's entry {path!r} has a size that cannot be")
    if ref is not None and (not isinstance(ref, str) or len(ref) > MAX_TEXT):
        raise UsageError(f"the manifest's entry {path!r} has a reference that cannot be")
    return Listed(
        path=path,
        digest=_text(digest),
        size=-1 if size is None else size,
        ref=_text(ref or ""),
        extra=_extra(extra),
        birth=birth if isinstance(birth, str) and len(birth) < 1024 else "",
    )


def _extra(extra: Any) -> dict[str, str | int]:
    if not isinstance(extra, dict):
        return {}
    kept = ((str(key), value) for key, value in itertools.islice(extra.items(), 16))
    return {
        _text(key[:128]): _text(value[:MAX_TEXT]) if isinstance(value, str) else value
        for key, value in kept
        if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63)
    }


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("the manifest has text that is not valid Unicode") from None
    return text
