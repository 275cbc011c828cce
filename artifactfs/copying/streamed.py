"""Between stores of different kinds, and from one artifact server to another: contents are read through a ``Reader``.

The source's tree becomes a folder of changes over the target's copy of an older version, so that what is the same in both is
neither read nor sent. It is made a version by ``publish``, as all versions are: contents are compared with all that the source
knows of them while they flow, and a version whose digest W&B's formula gives must get the same one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from artifactfs.content import manifest_digest
from artifactfs.copying.left import EMPTY, EXECUTABLE, SYMLINK, TAG, LeftOut
from artifactfs.copying.stored import free_semver
from artifactfs.errors import IntegrityError, InvalidNameError, NotFoundError
from artifactfs.model import BLAKE3, MD5, XXH128, Dir, Entry, File, LinkedVersion, Ref, Remote, Symlink, Version
from artifactfs.names import LATEST, ArtifactName, check_tag
from artifactfs.publish import Change, Draft, Published, Report, Streamed, publish
from artifactfs.reader import Handle, Reader
from artifactfs.references.sorting import tree_order
from artifactfs.semver import is_semver
from artifactfs.store import Store
from artifactfs.store.comet.words import SIDECAR
from artifactfs.store.native import NativeStore
from artifactfs.store.server import ArtifactServer

_HIGHEST = 10**9
"""A number that is carried over: with a higher one, which only a server that errs can give, none would be left there."""


class Older(NamedTuple):
    """A version that was copied before: at the source, and what became of it at the target."""

    source: Version
    target: Version


def identity(store: Store, version: Version) -> str:
    """The id that a copy of ``version`` keeps as that of its commit."""
    commit = store.identity(version) if isinstance(store, ArtifactServer) else version.origin.commit
    if isinstance(version, LinkedVersion):  # the portfolio becomes a collection of its own, beside that of its members
        return f"{commit} in {version.entity}/{version.project}/{version.collection}"
    return commit


def root_of(store: Store, version: Version) -> Dir:
    """The root directory of a version."""
    return store.root_of(version) if isinstance(store, ArtifactServer) else version.root


@dataclasses.dataclass(frozen=True, slots=True)
class _VersionContents:
    """The contents of ``version``. Threads may share it."""

    store: Store
    reader: Reader
    version: Version
    root: Dir

    def open(self, path: str) -> Handle:
        """See ``storing.Contents``."""
        entry = self.store.tree.resolve(self.root, path)
        if not isinstance(entry, (File, Ref)):
            raise NotFoundError(f"{self.where(path)} is no file")
        return self.reader.open(entry, self.where(path), lambda: self.store.tree.page_of(self.root, path))

    def where(self, path: str) -> str:
        """See ``storing.Contents``."""
        return f"{self.version.qualified_name}/{path}"


def copy_streamed(
    source: Store,
    target: Store,
    reader: Reader,
    version: Version,
    run: str,
    older: Older | None,
    aliases: list[str],
    left: LeftOut,
    notes: Path | None,
    report: Report | None,
    new_digests: bool = False,
) -> Published:
    """``version`` of ``source`` in ``target``, logged by ``run`` there. What ``target`` cannot hold goes to ``left``.

    ``aliases`` are those of the version; ``older`` saves reading what that one has, too; ``new_digests`` as for ``copy``.
    IntegrityError for what is not what ``source`` says of it, and for what the target then says of the copy.
    """
    root = root_of(source, version)
    algorithm, digest, pure = _check_listing(source, version, root, left if new_digests else None)
    server = target if isinstance(target, ArtifactServer) else None
    if server is not None and server.semantic:
        older = None  # Comet would have to be sent what it has, from itself
    folder = _CopiedFolder(
        _Job(source, target, _VersionContents(source, reader, version, root), left, server is not None and server.files_only),
        root,
        root_of(source, older.source) if older else None,
        root_of(target, older.target) if older else None,
    )
    draft = Draft(
        name=ArtifactName(version.entity, version.project, version.collection),
        type=version.type,
        folder=folder,
        commit=identity(source, version),
        algorithm=BLAKE3 if server is not None and server.semantic else algorithm,
        description=version.description,
        metadata=version.metadata,
        tags=valid_tags(version.tags, left),
        run=run,
        expect_digest=digest if _keeps_digest(server, algorithm, pure) else "",
        number=version.number if version.number <= _HIGHEST else 0,
        retry=server is not None,  # an attempt before this one may have begun it
        always=True,  # it is a version there, and must be one here: with what the next one differs in
        reserved_type=True,
        notes=notes,
        semver=_semver(target, version, aliases),
        **_time_to_live(version, server, left),
    )
    published = publish(target, draft, report)
    if server is not None:
        _check_made(source, root, server, published.version)
    return published


def _keeps_digest(server: ArtifactServer | None, algorithm: str, pure: bool) -> bool:
    """Whether the copy's digest is to be the source's: by W&B's formula, and over the same digests of files. (A W&B server that
    takes no XXH128 gives others.)"""
    return algorithm != BLAKE3 and (server is None or (server.files_only and pure))


def _check_listing(source: Store, version: Version, root: Dir, left: LeftOut | None) -> tuple[str, str, bool]:
    """(the algorithm of the version's digest; the digest, "" if it has none that follows from its files; whether all files have
    theirs by that algorithm). If W&B's formula gives another digest, then the version was logged in parts, or its list of files
    is not the one that was logged: that goes to ``left``, or is an IntegrityError where there is none."""
    if version.algorithm == BLAKE3:
        return BLAKE3, version.digest, True
    used = {it.algorithm for it in _leaves(source, root) if isinstance(it, File)}
    for algorithm in (MD5, XXH128) if version.digest else ():
        found = manifest_digest(((path, entry.digest) for path, entry in source.tree.listing(root)), algorithm)
        if found == version.digest:
            return algorithm, found, used <= {algorithm}
    if not version.digest:
        return version.algorithm, "", False
    if left is not None:
        left.name(f"the digest {version.digest}, which is not that of its list of files")
        return version.algorithm, "", False
    raise IntegrityError(
        f"{version.qualified_name} has the digest {version.digest} in {source.url}, and its list of files another one: it was "
        "logged in parts, or files were lost there; look at it, then copy it under the digest of what it has: copy --new-digests"
    )


def _leaves(store: Store, root: Dir) -> Iterator[Entry]:
    """All files and references; of one to another version of the same store the file that it leads to."""
    for _, entry in store.tree.listing(root):
        yield store.referenced(entry) if isinstance(entry, Ref) else entry


def valid_tags(tags: list[str], left: LeftOut) -> list[str]:
    """Those that any store takes."""
    found = []
    for tag in tags:
        try:
            found.append(check_tag(tag))
        except InvalidNameError:
            left.count(TAG)
    return found


def _time_to_live(version: Version, server: ArtifactServer | None, left: LeftOut) -> dict[str, Any]:
    ttl = None if version.ttl_inherited else version.ttl
    if server is None or server.expires:
        return {"ttl": ttl, "inherit_ttl": version.ttl_inherited}
    if ttl is not None:
        left.name("its time to live")
    return {}


def _semver(target: Store, version: Version, aliases: list[str]) -> str:
    """Its semantic version, where the target has such: its own, or one that it has as an alias because it came from where there
    are none."""
    name = ArtifactName(version.entity, version.project, version.collection)
    if isinstance(target, NativeStore):
        return free_semver(target, name, version.semver)
    if not isinstance(target, ArtifactServer) or not target.semantic:
        return ""
    wanted = version.semver or next((alias for alias in aliases if is_semver(alias)), "")
    try:
        known = target.collection(name)
    except NotFoundError:
        return wanted
    return "" if wanted in known.semver or wanted in known.aliases else wanted


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    """One version on its way. ``files_only``: the target holds nothing but files and references."""

    source: Store
    target: Store
    contents: _VersionContents
    left: LeftOut
    files_only: bool


@dataclasses.dataclass(frozen=True, slots=True)
class _CopiedFolder:
    """The source's directory ``theirs``, as changes to the target's ``base``, which is a copy of the source's ``before``."""

    job: _Job
    theirs: Dir
    before: Dir | None = None
    base: Dir | None = None
    prefix: str = ""

    def changes(self) -> Iterator[tuple[str, Change]]:
        """See ``upload.Folder``."""
        job = self.job
        for old, new in job.source.tree.pairs(self.before, self.theirs):
            if new is None:
                assert old is not None
                yield old.name, None
                continue
            change = self._folder(old, new) if isinstance(new, Dir) else self._entry(new)
            if change is not None or old is not None:
                yield new.name, change

    def _folder(self, old: Entry | None, new: Dir) -> Change:
        job = self.job
        path = f"{self.prefix}{new.name}/"
        if new.page is None:
            if not job.files_only:
                return new
            job.left.count(EMPTY)
            return None
        base = job.target.tree.lookup(self.base, new.name) if self.base is not None else None
        if isinstance(old, Dir) and isinstance(base, Dir):
            return _CopiedFolder(job, new, old, base, path)
        return _CopiedFolder(job, new, prefix=path)

    def _entry(self, entry: File | Symlink | Ref) -> Change:
        job = self.job
        if isinstance(entry, Symlink):
            if not job.files_only:
                return entry
            job.left.count(SYMLINK)
            return None
        if entry.executable and job.files_only:
            job.left.count(EXECUTABLE)
        found = job.source.referenced(entry) if isinstance(entry, Ref) else entry
        if isinstance(found, Ref):
            return msgspec.structs.replace(found, blocks=None)
        return Streamed(found, f"{self.prefix}{entry.name}", job.contents)


def _check_made(source: Store, root: Dir, target: ArtifactServer, made: Version) -> None:
    """IntegrityError unless the list of files that the server now has of the version is the source's."""
    ours = _compared(target, target.root_of(made), target)
    theirs = _compared(source, root, target)
    for mine, other in zip_longest(ours, theirs):
        if mine is None or other is None or mine[0] != other[0] or not _alike(mine[1], other[1]):
            path = min((it[0] for it in (mine, other) if it is not None), key=tree_order)
            raise IntegrityError(
                f"{made.qualified_name} in {target.url} is not what was sent: {path!r} differs; delete it there, and copy again"
            )


def _compared(store: Store, root: Dir, target: ArtifactServer) -> Iterator[tuple[str, Entry]]:
    for path, entry in store.tree.walk(root):
        if isinstance(entry, Dir) and (target.files_only or entry.page is not None or not path):
            continue
        if (isinstance(entry, Symlink) and target.files_only) or (path == SIDECAR and target.semantic):
            continue
        yield path, store.referenced(entry) if isinstance(entry, Ref) else entry


def _alike(mine: Entry, other: Entry) -> bool:
    """Whether two entries of different stores can be the same, as far as both say."""
    if isinstance(mine, Remote) and isinstance(other, File):
        known = mine.algorithm == other.algorithm and mine.digest and other.digest
        return mine.size == other.size and (not known or mine.digest == other.digest)
    if isinstance(mine, Ref) and isinstance(other, Ref):
        return (mine.uri, mine.digest) == (other.uri, other.digest)
    if isinstance(mine, Symlink) and isinstance(other, Symlink):
        return mine.target == other.target
    return isinstance(mine, Dir) and isinstance(other, Dir)


def carried_aliases(target: Store, version: Version, aliases: list[str]) -> list[str]:
    """The aliases of ``version`` as the target will have them, without ``latest``. Where there are no semantic versions, that
    is one, too."""
    found = [alias for alias in aliases if alias != LATEST]
    if isinstance(target, ArtifactServer) and not target.semantic and version.semver:
        found.append(version.semver)
    return found
