"""What an artifact holds, as W&B's clients show it: the manifest, its entries, and files to list and fetch.

A manifest reads a version's tree only where it is asked: ``entries["a/b"]`` costs a few pages, iterating costs them all.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import mimetypes
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple, Protocol, overload

from artifactfs import download
from artifactfs.content import manifest_digest
from artifactfs.draft import AddedFile, DraftFolder, DraftTree, Leaf, prefetch_fingerprints
from artifactfs.errors import ArtifactNotLoggedError, ConflictError, NotFoundError, UsageError, also
from artifactfs.model import BLAKE3, MD5, Dir, Ref, Symlink, Version
from artifactfs.names import entry_path
from artifactfs.publish import NewRef, build_digest
from artifactfs.session import Session


class Stored(NamedTuple):
    """A logged version and the session it was reached through."""

    session: Session
    version: Version


class Owner(Protocol):
    """The artifact that entries belong to."""

    def stored(self) -> Stored | None:
        """Its version once it is logged."""

    def default_root(self) -> str:
        """Where its files go when no directory is named."""


class Holding(Protocol):
    """The entries of a draft or of a version."""

    def find(self, path: str) -> Leaf | None: ...
    def walk(self) -> Iterator[tuple[str, Leaf]]: ...
    def totals(self) -> tuple[int, int]: ...
    def digest(self) -> str: ...


@dataclasses.dataclass(frozen=True, slots=True)
class DraftHolding:
    """The entries of a draft whose digests are of ``algorithm``."""

    tree: DraftTree
    algorithm: str

    def find(self, path: str) -> Leaf | None:
        leaf = self.tree.find(path)
        return None if isinstance(leaf, (DraftFolder, Symlink)) else leaf

    def walk(self) -> Iterator[tuple[str, Leaf]]:
        return self.tree.walk()

    def totals(self) -> tuple[int, int]:
        return self.tree.totals()

    def digest(self) -> str:
        """W&B's formula, or the digest of the root directory that the version will have."""
        if self.algorithm == BLAKE3:
            return build_digest(self.tree.digestible(), self.tree.tree)
        prefetch_fingerprints(file for _, file in self.tree.added())
        return manifest_digest(((path, digest_of(leaf)) for path, leaf in self.tree.walk()), self.algorithm)


@dataclasses.dataclass(frozen=True, slots=True)
class VersionHolding:
    """The entries of a version."""

    source: Stored

    def find(self, path: str) -> Leaf | None:
        session, version = self.source
        entry = session.store.tree.resolve(version.root, path)
        return None if isinstance(entry, (Dir, Symlink)) else entry

    def walk(self) -> Iterator[tuple[str, Leaf]]:
        session, version = self.source
        return session.store.tree.listing(version.root)

    def totals(self) -> tuple[int, int]:
        return self.source.version.size, self.source.version.file_count

    def digest(self) -> str:
        return self.source.version.digest


class ArtifactManifestEntry:
    """One file or reference of an artifact."""

    def __init__(self, path: str, leaf: Leaf, owner: Owner) -> None:
        self._path = path
        self._leaf = leaf
        self._owner = owner

    def __repr__(self) -> str:
        return f"<ArtifactManifestEntry {self._path!r}>"

    @property
    def path(self) -> str:
        """Where it is in the artifact."""
        return self._path

    name = path

    @property
    def digest(self) -> str:
        """Its checksum, base64; of a reference what pins it: an ETag, a checksum or the URI."""
        return digest_of(self.leaf())

    @property
    def ref(self) -> str | None:
        """The URI of a reference, else None."""
        reference = self._reference()
        return reference.uri if reference else None

    @property
    def size(self) -> int | None:
        """Bytes; None where it is not known."""
        size = _size(self.leaf())
        return size if size >= 0 else None

    @property
    def extra(self) -> dict[str, Any]:
        """``etag`` and ``versionID`` of a reference; ``alg`` where the digest is not MD5."""
        reference = self._reference()
        algorithm = self.digest_algorithm()
        extra: dict[str, Any] = dict(reference.extra) if reference else {}
        return extra if algorithm == MD5 else {**extra, "alg": algorithm}

    @property
    def birth_artifact_id(self) -> str | None:
        """None: contents are found by what they are, not by who stored them first."""
        return None

    @property
    def local_path(self) -> str | None:
        """For a file added to a draft the path that is read when it is logged, else None."""
        leaf = self.leaf()
        return leaf.path if isinstance(leaf, AddedFile) else None

    @property
    def skip_cache(self) -> bool:
        return isinstance(self._leaf, AddedFile) and self._leaf.skip_cache

    def digest_algorithm(self) -> str:
        """``BLAKE3``, ``MD5`` or ``XXH128``."""
        leaf = self.leaf()
        return (leaf.ref if isinstance(leaf, NewRef) else leaf).algorithm if not isinstance(leaf, Symlink) else BLAKE3

    def download(self, root: str | os.PathLike[str] | None = None, skip_cache: bool | None = None) -> str:
        """Fetch the file, checked, to ``root``/path (default: the artifact's directory); returns where it is."""
        source = self._stored("download")
        root = os.fspath(root) if root is not None else self._owner.default_root()
        session, version = source
        return download.get_file(session.store, session.reader, version, self._path, root)

    def ref_target(self) -> str:
        """The URI of a reference. ValueError if it is a stored file."""
        reference = self._reference()
        if reference is None:
            raise UsageError(f"{self._path!r} is a stored file; only references have a target")
        return reference.uri

    def ref_url(self) -> str:
        """A URI that means this entry in ``add_reference`` of another artifact."""
        _, version = self._stored("ref_url")
        return f"wandb-artifact://{base64.standard_b64decode(version_id(version)).hex()}/{self._path}"

    def leaf(self) -> Leaf:
        """The entry as it is stored, or as it will be."""
        source = self._owner.stored()
        if source is None or not isinstance(self._leaf, (AddedFile, NewRef)):
            return self._leaf
        return VersionHolding(source).find(self._path) or self._leaf

    def owner(self) -> Owner:
        """The artifact it belongs to."""
        return self._owner

    def source(self) -> Stored | None:
        """The version it is in, None while that is a draft."""
        return self._owner.stored()

    def to_json(self) -> dict[str, Any]:
        """As a manifest file has it."""
        fields = {"digest": self.digest, "size": self.size, "ref": self.ref, "extra": self.extra}
        return {key: value for key, value in fields.items() if value is not None and value != {}}

    def _reference(self) -> Ref | None:
        leaf = self.leaf()
        leaf = leaf.ref if isinstance(leaf, NewRef) else leaf
        return leaf if isinstance(leaf, Ref) else None

    def _stored(self, member: str) -> Stored:
        source = self._owner.stored()
        if source is None:
            raise ArtifactNotLoggedError(
                f"'ArtifactManifestEntry.{member}' used prior to logging artifact; log it and wait() first"
            )
        return source


class ArtifactManifest:
    """The entries of an artifact."""

    version = 1

    def __init__(self, holding: Holding, owner: Owner) -> None:
        self._holding = holding
        self._owner = owner

    @property
    def entries(self) -> Mapping[str, ArtifactManifestEntry]:
        """The entries by path, in ascending order of path."""
        return _Entries(self._holding, self._owner)

    def digest(self) -> str:
        """The artifact's digest, hex."""
        return self._holding.digest()

    def size(self) -> int:
        """The sum of the sizes of all entries that have one."""
        return self._holding.totals()[0]

    def get_entry_by_path(self, path: str) -> ArtifactManifestEntry | None:
        """The entry at a path, None if there is none."""
        return self.entries.get(path)

    def get_entries_in_directory(self, directory: str) -> list[ArtifactManifestEntry]:
        """The entries below a directory, at any depth."""
        prefix = f"{entry_path(directory)}/"
        return [ArtifactManifestEntry(path, leaf, self._owner) for path, leaf in self._holding.walk() if path.startswith(prefix)]

    def to_manifest_json(self) -> dict[str, Any]:
        """As ``wandb_manifest.json`` has it."""
        return {
            "version": 1,
            "storagePolicy": "wandb-storage-policy-v1",
            "storagePolicyConfig": {"storageLayout": "V2"},
            "contents": {path: entry.to_json() for path, entry in self.entries.items()},
        }


class _Entries(Mapping[str, ArtifactManifestEntry]):
    def __init__(self, holding: Holding, owner: Owner) -> None:
        self._holding = holding
        self._owner = owner

    def __getitem__(self, path: str) -> ArtifactManifestEntry:
        leaf = self._holding.find(path)
        if leaf is None:
            raise KeyError(path)
        return ArtifactManifestEntry(path, leaf, self._owner)

    def __iter__(self) -> Iterator[str]:
        return (path for path, _ in self._holding.walk())

    def __len__(self) -> int:
        return self._holding.totals()[1]

    def __contains__(self, path: object) -> bool:
        return isinstance(path, str) and self._holding.find(path) is not None

    def __repr__(self) -> str:
        return f"<{len(self)} entries>"


class ArtifactFile:
    """A file of a logged artifact, as ``Artifact.files`` lists it."""

    def __init__(self, entry: ArtifactManifestEntry, updated_at: str, url: str) -> None:
        self._entry = entry
        self.updated_at = updated_at
        self.url = url

    def __repr__(self) -> str:
        return f"<File {self.name} ({self.mimetype}) {self.size} bytes>"

    @property
    def name(self) -> str:
        return self._entry.path

    @property
    def size(self) -> int:
        return self._entry.size or 0

    @property
    def digest(self) -> str:
        return self._entry.digest

    @property
    def md5(self) -> str:
        """The base64 MD5; "" where the digest is another."""
        return self._entry.digest if self._entry.digest_algorithm() == MD5 and not self._entry.ref else ""

    @property
    def mimetype(self) -> str:
        """Guessed from the name."""
        return mimetypes.guess_type(self.name)[0] or "application/octet-stream"

    def download(self, root: str | os.PathLike[str] = ".", replace: bool = False, exist_ok: bool = False) -> IO[str]:
        """Fetch it to ``root``/name and open it. A file that is there is an error (W&B's ValueError) unless ``replace``, or
        ``exist_ok``, which opens it as it is."""
        path = os.path.join(os.fspath(root), self.name)
        if os.path.lexists(path) and not replace:
            if exist_ok:
                return open(path, encoding="utf-8")
            raise also(
                ConflictError(f"File {path!r} already exists, pass replace=True to overwrite or exist_ok=True to open it"),
                ValueError,
            )
        return open(self._entry.download(root), encoding="utf-8")


class ArtifactFiles(Sequence[ArtifactFile]):
    """The files of a logged artifact, by path; ``names`` selects some, in their order; ``start`` those after that path."""

    def __init__(
        self, manifest: ArtifactManifest, version: Version, url: str, names: Sequence[str] | None, start: str | None = None
    ) -> None:
        self._entries = manifest.entries
        self._version = version
        self._url = url
        self._names = None if names is None else [entry_path(name) for name in names]
        self._start = start

    def __iter__(self) -> Iterator[ArtifactFile]:
        return (self._file(self._entries[path]) for path in self._paths())

    def _paths(self) -> Iterator[str]:
        paths = self._entries if self._names is None else (name for name in self._names if name in self._entries)
        return (path for path in paths if self._start is None or path > self._start)

    def __len__(self) -> int:
        if self._names is None and self._start is None:
            return len(self._entries)
        return sum(1 for _ in self._paths())

    @overload
    def __getitem__(self, index: int) -> ArtifactFile: ...
    @overload
    def __getitem__(self, index: slice) -> list[ArtifactFile]: ...
    def __getitem__(self, index: int | slice) -> ArtifactFile | list[ArtifactFile]:
        if isinstance(index, slice):
            return list(self)[index]
        at = index + len(self) if index < 0 else index
        found = next(itertools.islice(self, at, None), None) if at >= 0 else None
        if found is None:
            raise IndexError(f"{self._version.qualified_name} has {len(self)} files; there is no file {index}")
        return found

    def __repr__(self) -> str:
        return f"<ArtifactFiles {self._version.qualified_name} ({len(self)})>"

    def _file(self, entry: ArtifactManifestEntry) -> ArtifactFile:
        return ArtifactFile(entry, self._version.updated_at, f"{self._url}/{entry.path}" if self._url else "")


def digest_of(leaf: Leaf) -> str:
    """The checksum users see of an entry."""
    if isinstance(leaf, Symlink):
        return ""
    return leaf.ref.digest if isinstance(leaf, NewRef) else leaf.digest


def version_id(version: Version) -> str:
    """An opaque id of a version, from which :func:`version_name` gives its name back; a link has that of its source."""
    return base64.standard_b64encode(f"Artifact:{version.origin.qualified_name}".encode()).decode()


def version_name(uri: str) -> tuple[str, str]:
    """(qualified name, path) of a ``wandb-artifact://<hex id>/<path>`` URI. UsageError for one that is not of a native store."""
    host, _, path = uri.removeprefix("wandb-artifact://").partition("/")
    try:
        kind, _, name = bytes.fromhex(host).decode().partition(":")
    except ValueError:
        kind = ""
    if kind != "Artifact" or not path:
        raise UsageError(f"{uri!r} is not a reference to an entry of this store")
    return name, path


def no_such_entry(path: str, name: str) -> Exception:
    """W&B's KeyError for an entry that is not there."""
    return also(NotFoundError(f"Path not contained in artifact: {path!r} ({name})"), KeyError)


def _size(leaf: Leaf) -> int:
    if isinstance(leaf, Symlink):
        return 0
    return leaf.ref.size if isinstance(leaf, NewRef) else leaf.size
