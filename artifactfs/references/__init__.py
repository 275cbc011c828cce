"""Outside bytes: expand a URI into entries when it is added, and open an entry's pinned bytes when it is read.

``expand(uri, …)`` and ``open_reference(ref)`` dispatch on the scheme; one module a scheme does the work.

A reference is *pinned* when something recorded tells its bytes from other ones: a content id, an ETag, a version id, a
modification time. Bytes that are not as pinned are never served: reading them is a SourceChangedError.
"""

from __future__ import annotations

from artifactfs.content import check_algorithm
from artifactfs.errors import UsageError
from artifactfs.model import BLAKE3, Ref, scheme_of
from artifactfs.names import entry_path
from artifactfs.references import file
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
    "open_reference",
    "resolve",
    "source_key",
]

DEFAULT_MAX_OBJECTS = 10_000_000

_WEB = ("http", "https")


def expand(
    uri: str,
    name: str = "",
    *,
    checksum: bool = True,
    max_objects: int = DEFAULT_MAX_OBJECTS,
    algorithm: str = BLAKE3,
) -> list[Expanded]:
    """The entries for ``uri``: one, or one for each file of a directory, in order of their paths.

    ``name`` is the path of the single entry, or of the directory they go into; "" takes the default of the scheme. With
    ``checksum`` False nothing is read and nothing is pinned. More than ``max_objects`` entries (0: the default) is a
    UsageError, as is a URI that cannot be right; a target that is not there is a NotFoundError.
    """
    algorithm = check_algorithm(algorithm)
    name = entry_path(name) if name else ""
    scheme = _checked_scheme(uri)
    if scheme == "file":
        return file.expand(uri, name, checksum, max_objects or DEFAULT_MAX_OBJECTS, algorithm)
    if scheme in _WEB:
        from artifactfs.references import web  # requests costs 0.2 s: only for those who have such references

        return [web.expand(uri, name, checksum)]
    if not name:
        raise UsageError(f"reference {uri[:200]!r} needs a name: none can be told from a {scheme}: URI")
    return [Expanded(name, Ref(name.rpartition("/")[2], uri, digest=uri, size=-1))]


def open_reference(ref: Ref, deadline: float = DEADLINE) -> Source:
    """The pinned bytes of ``ref``, whose size must be known. No I/O. UsageError for a scheme that cannot be read."""
    check_readable(ref)
    if is_local(ref):
        return file.FileSource(ref)
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
    check_readable(ref)
    from artifactfs.references import web  # requests costs 0.2 s: only for those who have such references

    return web.resolve(ref, deadline)


def _checked_scheme(uri: str) -> str:
    scheme = scheme_of(uri)
    if not scheme:
        raise UsageError(f"reference {uri[:200]!r} has no scheme; write for example file:///path, https://… or s3://…")
    if "\0" in uri or "\n" in uri or "\r" in uri:
        raise UsageError(f"reference {uri[:200]!r} contains a line break or a NUL byte; percent-encode it")
    return scheme


def check_readable(ref: Ref) -> None:
    """UsageError for a reference that no scheme of ours can read."""
    scheme = scheme_of(ref.uri)
    if scheme not in (*_WEB, "file"):
        raise UsageError(f"reference {ref.uri[:200]!r} is only tracked: scheme {scheme!r} is not recognized, it cannot be read")
    if scheme == "file" and ref.size < 0:
        raise UsageError(f"reference {ref.uri[:200]!r} has no size; add it again")
