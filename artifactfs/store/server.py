"""Artifact servers: stores whose versions, contents and rules are another system's. W&B's and Comet's are made of this.

What such a server knows of a stored file becomes a ``model.Remote`` entry; the list of a version's files becomes a tree on disk,
once (:mod:`artifactfs.store.kept`). What every server has no means for is answered here.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from artifactfs.cache import BlockCache
from artifactfs.cache.records import Records
from artifactfs.errors import NotFoundError, OfflineError, UsageError
from artifactfs.model import Collection, Dir, EntitySettings, Extent, File, LinkedVersion, Ref, Remote, Run, Version
from artifactfs.names import ArtifactName, is_registry
from artifactfs.references import Source
from artifactfs.store import LocalContent
from artifactfs.store.drafts import Draft, Published
from artifactfs.store.kept import KeptTrees, Listed
from artifactfs.store.upload import Report


class ArtifactServer(abc.ABC):
    """A store that is an artifact server at ``url``. Trees, and records for when it cannot be asked, are kept in ``cache``; with
    ``offline`` nothing else is used. A subclass implements the abstract methods as ``store.Store`` describes them."""

    local = False
    files_only = False
    """Its versions hold files and references: no symlinks, executable bits or empty directories."""
    semantic = False
    """Its versions have semantic versions."""
    expires = False
    """Its versions may have a time to live."""
    moves_latest = False
    """``latest`` may be given to any version."""

    def __init__(self, url: str, cache: BlockCache | None, offline: bool) -> None:
        self.url = url
        self.offline = offline
        root: Path | None = cache.root if cache is not None else None
        self.trees = KeptTrees(root, url, cache.limit // 4 if cache is not None else 0, self.list_files, self.check_list)
        self.records = Records(root, url) if root is not None else None
        self.tree = self.trees.tree

    @abc.abstractmethod
    def save(self, draft: Draft, report: Report | None) -> Published:
        """Make ``draft``, which is checked, a version; for ``publish.publish`` alone, which describes it. May be repeated
        with the same draft after any failure; then no second version comes of it."""

    def add_part(self, id: str, draft: Draft) -> None:
        """Add ``draft``, which is checked, to the version that several processes make under ``id``; for ``distributed`` alone."""
        self.cannot("make a version of parts that several processes add")

    def finish(self, id: str, draft: Draft) -> Version:
        """Add the last part, and make all of them a version; may be repeated with the same draft, as :meth:`save`."""
        self.cannot("make a version of parts that several processes add")

    # What servers have

    @abc.abstractmethod
    def entities(self) -> list[str]: ...

    @abc.abstractmethod
    def projects(self, entity: str) -> list[str]: ...

    @abc.abstractmethod
    def collections(self, entity: str, project: str) -> list[Collection]: ...

    @abc.abstractmethod
    def collection(self, name: ArtifactName) -> Collection: ...

    @abc.abstractmethod
    def versions(self, name: ArtifactName, deleted: bool = False) -> list[Version]: ...

    @abc.abstractmethod
    def version(self, name: ArtifactName) -> Version: ...

    @abc.abstractmethod
    def source(self, file: File) -> Source: ...

    @abc.abstractmethod
    def pin(self, file: Remote, deadline: float) -> Remote: ...

    @abc.abstractmethod
    def list_files(self, identity: str) -> Listed:
        """The files and references of the version that ``identity`` names for ever, as :class:`KeptTrees` takes them."""

    def check_list(self, identity: str, root: Dir) -> None:  # noqa: B027 - most servers tell nothing to compare it with
        """Told of a version's files, as they are kept from now on."""

    @abc.abstractmethod
    def update_collection(self, name: ArtifactName, change: Callable[[Collection], Collection]) -> Collection: ...

    @abc.abstractmethod
    def update_version(self, name: ArtifactName, change: Callable[[Version], Version]) -> Version: ...

    @abc.abstractmethod
    def delete_version(self, name: ArtifactName, delete_aliases: bool = False) -> Version: ...

    # What follows from that

    def collection_names(self, entity: str, project: str) -> list[str]:
        return [collection.name for collection in self.collections(entity, project)]

    def numbers(self, name: ArtifactName) -> list[int]:
        return [version.number for version in self.versions(name)]

    def any_version(self, name: ArtifactName, number: int) -> Version:
        return self.version(name.at(f"v{number}"))

    def newest(self, name: ArtifactName, without: int | None = None) -> Version | None:
        found = [version for version in self.versions(name) if version.number != without]
        return found[-1] if found else None

    def in_registry(self, version: Version) -> bool:
        return any(is_registry(link.project) for link in self.links_of(version))

    def default_entity(self) -> str:
        return ""

    def referenced(self, ref: Ref) -> File | Ref:
        return ref

    def ttl_of(self, version: Version) -> int | None:
        return version.origin.ttl

    def root_of(self, version: Version) -> Dir:
        """The root directory of a version as it is; ``version.root`` may only stand for it."""
        return version.root

    def identity(self, version: Version) -> str:
        """What the commit of a copy of ``version`` is: the same for the same version, whoever copies it, and for no other."""
        return version.origin.commit

    def made_by(self, name: ArtifactName, commits: Iterable[str]) -> dict[str, Version]:
        """The versions of ``name`` that were made by those of ``commits`` that made one which is there, by commit."""
        wanted = set(commits)
        try:
            return {version.commit: version for version in self.versions(name) if version.commit in wanted}
        except NotFoundError:
            return {}

    # What contents of a server are not

    def local_content(self, file: File) -> LocalContent | None:
        return None

    def packed(self, file: File) -> Extent | None:
        return None

    def stream(self, extent: Extent) -> Iterator[bytes]:
        self.cannot("be read in extents")

    def block_list(self, file: File) -> bytes:
        """Empty: no server knows the digests of blocks."""
        return b""

    # What a server may have no means for

    def ensure_format(self) -> None:
        """Nothing is created beforehand; a server says no when it is told to save."""
        self.check_online("a commit")

    def delete_collection(self, name: ArtifactName, delete_aliases: bool = True) -> None:
        self.cannot("delete collections")

    def link(
        self, version: Version, target: ArtifactName, aliases: Sequence[str] = (), run: str = "", description: str | None = None
    ) -> LinkedVersion:
        self.cannot("link versions")

    def unlink(self, name: ArtifactName) -> LinkedVersion:
        self.cannot("unlink versions")

    def links_of(self, version: Version) -> list[LinkedVersion]:
        return []

    def entity_settings(self, entity: str) -> EntitySettings:
        return EntitySettings(entity=entity, created_at="", updated_at="")

    def update_entity(self, entity: str, change: Callable[[EntitySettings], EntitySettings]) -> EntitySettings:
        self.cannot("keep settings of entities for artifactfs; its own pages have them")

    def mark_used(self, version: Version, run: Run) -> None:
        self.cannot("record that a run used a version")

    def used_by(self, version: Version) -> list[Run]:
        return []

    @abc.abstractmethod
    def run(self, entity: str, project: str, id: str) -> Run: ...

    @abc.abstractmethod
    def runs(self, entity: str, project: str) -> list[Run]: ...

    def save_run(self, run: Run) -> None:
        self.cannot("keep runs of artifactfs")

    def finish_run(self, run: Run, exit_code: int) -> None:  # noqa: B027 - most servers need nothing here
        """Nothing, where a server does not keep whether a run goes on."""

    # For subclasses

    def cannot(self, what: str) -> NoReturn:
        """UsageError: this kind of store cannot do ``what``."""
        raise UsageError(f"{self.url} is an artifact server and cannot {what}")

    def check_online(self, what: str) -> None:
        """OfflineError where nothing may be fetched."""
        if self.offline:
            raise OfflineError(f"{what} needs {self.url}, and offline nothing is fetched; do it when online")
