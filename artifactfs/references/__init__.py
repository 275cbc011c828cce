"""Outside bytes: expand a URI into entries when it is added, and open an entry's pinned bytes when it is read.

``expand(uri, …)`` and ``open_reference(ref)`` dispatch on the scheme; one module a kind of source does the work.

A reference is *pinned* when something recorded tells its bytes from other ones: a content id, an ETag, a version id, a
modification time. Bytes that are not as pinned are never served: reading them is a SourceChangedError.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias

from artifactfs.content import check_algorithm
from artifactfs.errors import UsageError
from artifactfs.model import BLAKE3, Ref, scheme_of
from artifactfs.names import entry_path
from artifactfs.references import bucket, file
from artifactfs.references.source import DEADLINE, PINS, Expanded, Source, WholeOnly, source_key

__all__ = [
    "DEADLINE",
    "DEFAULT_MAX_OBJECTS",
    "Expanded",
    "Source",
    "WholeOnly",
    "check_readable",
    "expand",
    "is_local",
    "is_pinned",
    "is_verified",
    "open_reference",
    "resolve",
    "source_key",
]

DEFAULT_MAX_OBJECTS = 10_000_000

Kind: TypeAlias = Literal["file", "web", "bucket", "other"]
"""What reads a reference; nothing reads the last."""


def expand(
    uri: str,
    name: str = "",
    *,
    checksum: bool = True,
    max_objects: int = DEFAULT_MAX_OBJECTS,
    algorithm: str = BLAKE3,
    keep_empty: bool = False,
) -> Iterator[Expanded]:
    """The entries for ``uri``: one, or one for each file of a directory or object of a prefix, in any order, as they are found.

    ``name`` is the path of the single entry, or of the directory they go into; "" takes the default of the scheme. With
    ``checksum`` False nothing is read and nothing is pinned. More than ``max_objects`` entries (0: the default) is a
    UsageError, as is a URI that cannot be right; a target that is not there is a NotFoundError. Memory is bounded, but for a
    local directory's names. ``keep_empty``: empty objects of a prefix are entries, too.
    """
    algorithm = check_algorithm(algorithm)
    name = entry_path(name) if name else ""
    kind = _kind(_checked(uri))
    if kind == "file":
        yield from file.expand(uri, name, checksum, max_objects or DEFAULT_MAX_OBJECTS, algorithm)
    elif kind == "bucket":
        yield from bucket.expand(uri, name, checksum, max_objects or DEFAULT_MAX_OBJECTS, keep_empty)
    elif kind == "web":
        from artifactfs.references import web  # requests costs 0.2 s: only for those who have such references

        yield web.expand(uri, name, checksum)
    elif not name:
        raise UsageError(f"reference {uri[:200]!r} needs a name: none can be told from a {scheme_of(uri)}: URI")
    else:
        yield Expanded(name, Ref(name.rpartition("/")[2], uri, digest=uri, size=-1))


def open_reference(ref: Ref, deadline: float = DEADLINE) -> Source:
    """The pinned bytes of ``ref``, whose size must be known. No I/O. UsageError for a scheme that cannot be read."""
    kind = check_readable(ref)
    if kind == "file":
        return file.FileSource(ref)
    if kind == "bucket":
        return bucket.BucketSource(ref, deadline)
    from artifactfs.references import web  # requests costs 0.2 s: only for those who have such references

    return web.WebSource(ref, deadline)


def is_local(ref: Ref) -> bool:
    """Whether the bytes lie on a file system of this machine, so that no cache is needed."""
    return scheme_of(ref.uri) == "file"


def is_pinned(ref: Ref) -> bool:
    """Whether the size of ``ref`` is known and something recorded tells its bytes from other ones (local files: needless)."""
    return ref.size >= 0 and (is_local(ref) or bool(ref.id) or any(ref.extra.get(name) for name in PINS))


def resolve(ref: Ref, deadline: float = DEADLINE) -> Ref:
    """``ref`` as its remote has it now, pinned and of known size; one that is pinned already as it is, without I/O.

    What pins it is valid for this process only, where nothing else was recorded. SourceChangedError if the remote's size is
    not the recorded one.
    """
    if is_pinned(ref):
        return ref
    if check_readable(ref) == "bucket":
        return bucket.resolve(ref, deadline)
    from artifactfs.references import web  # requests costs 0.2 s: only for those who have such references

    return web.resolve(ref, deadline)


def is_verified(ref: Ref) -> bool:
    """Whether what is read of ``ref`` is compared with anything that was recorded when it was added: a content id, or a pin."""
    return bool(ref.id) or any(ref.extra.get(name) for name in PINS)


def check_readable(ref: Ref) -> Kind:
    """What kind of source ``ref`` has. UsageError for a reference that no scheme of ours can read."""
    kind = _kind(ref.uri)
    if kind == "other":
        text = f"is only tracked: scheme {scheme_of(ref.uri)!r} is not recognized, it cannot be read"
        raise UsageError(f"reference {ref.uri[:200]!r} {text}")
    if kind == "file" and ref.size < 0:
        raise UsageError(f"reference {ref.uri[:200]!r} has no size; add it again")
    return kind


def _kind(uri: str) -> Kind:
    scheme = scheme_of(uri)
    if scheme == "file":
        return "file"
    if bucket.is_bucket(uri):
        return "bucket"
    return "web" if scheme in ("http", "https") else "other"


def _checked(uri: str) -> str:
    if not scheme_of(uri):
        raise UsageError(f"reference {uri[:200]!r} has no scheme; write for example file:///path, https://… or s3://…")
    if "\0" in uri or "\n" in uri or "\r" in uri:
        raise UsageError(f"reference {uri[:200]!r} contains a line break or a NUL byte; percent-encode it")
    return uri
