"""Stores: where versions live. The protocol every kind of store answers; ``urls.open_store(url)`` gives one.

Reading and the catalog are here; making a version is ``publish.py``'s alone. Every method may raise the errors of ``errors.py``
and may be called from any thread. What a kind of store has no means for is a UsageError that says so with the store's URL; a
NotPermittedError is of the caller's rights, a NetworkError of a remote that does not answer.

There are native stores (``native.NativeStore``) and artifact servers (``server.ArtifactServer``: W&B, Comet). What only the
former have, ``native.native_store`` gives, or says why not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from artifactfs.model import Collection, EntitySettings, Extent, File, LinkedVersion, Lying, Ref, Remote, Run, Version
from artifactfs.names import ArtifactName
from artifactfs.references import Source
from artifactfs.tree import Tree


class LocalContent(Protocol):
    """A stored content whose bytes lie on a local disk, so that no cache is needed. Threads may share it."""

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``, fewer only at the end. A block that fails its check is an IntegrityError."""

    def lying(self, offset: int) -> Lying | None:
        """Where the bytes from ``offset`` lie, not checked, as far as one file has them in one piece."""

    def close(self) -> None: ...


class Store(Protocol):
    """One store. ``url`` has no secrets in it. ``local``: its contents lie on a disk of this machine."""

    url: str
    local: bool
    tree: Tree
    """Looks up, lists, walks and compares the directories of this store's versions."""

    def default_entity(self) -> str:
        """The entity of names that give none, as the store knows its caller; "" where it does not."""

    def entities(self) -> list[str]:
        """The entities that have collections, sorted."""

    def projects(self, entity: str) -> list[str]:
        """The projects of ``entity`` that have collections, sorted; empty if it has none."""

    def collections(self, entity: str, project: str) -> list[Collection]:
        """The collections of a project, sorted by name; empty if it has none."""

    def collection_names(self, entity: str, project: str) -> list[str]:
        """The names of the collections of a project, sorted; those that were deleted may be among them."""

    def collection(self, name: ArtifactName) -> Collection:
        """The collection of ``name`` (its alias is ignored). NotFoundError."""

    def versions(self, name: ArtifactName, deleted: bool = False) -> list[Version]:
        """The committed versions of a collection in order of number; with ``deleted`` those marked deleted too. NotFoundError."""

    def version(self, name: ArtifactName) -> Version:
        """The version that ``name``'s alias (``v3``, ``best``; none means ``latest``) names. NotFoundError says which part is
        missing, and for a deleted version that it was deleted. In a portfolio it is a LinkedVersion."""

    def numbers(self, name: ArtifactName) -> list[int]:
        """The numbers of all versions that can be asked for, ascending, deleted ones too where the store keeps them."""

    def any_version(self, name: ArtifactName, number: int) -> Version:
        """The version of that number, deleted or not where the store keeps them. NotFoundError."""

    def newest(self, name: ArtifactName, without: int | None = None) -> Version | None:
        """The committed version of the highest number (but ``without``), or None."""

    def ensure_format(self) -> None:
        """Make sure that the store can take a commit: it is created, or asked for the caller's rights, as its kind does."""

    def local_content(self, file: File) -> LocalContent | None:
        """The content of ``file`` read from local disk with every block checked, or None if this store is not local."""

    def packed(self, file: File) -> Extent | None:
        """Where :meth:`stream` reads the content of ``file``, if it is a small one that lies beside others in a remote object."""

    def stream(self, extent: Extent) -> Iterator[bytes]:
        """The bytes of one extent, not checked, in pieces as they arrive. IntegrityError if its object is lost."""

    def source(self, file: File) -> Source:
        """The content of ``file`` as a source for the block cache; its key is the content id, of a Remote what pins it."""

    def pin(self, file: Remote, deadline: float) -> Remote:
        """``file`` with what its server tells of the bytes it has now, to be compared with every later answer; one request. A
        server that tells nothing gives an ETag that begins with ``seen:``, for this process alone."""

    def referenced(self, ref: Ref) -> File | Ref:
        """The entry of another version of this very store that ``ref`` stands for; ``ref`` itself if it leads elsewhere."""

    def block_list(self, file: File) -> bytes:
        """The checked block list of ``file`` (its content id alone for at most one block). IntegrityError."""

    def update_collection(self, name: ArtifactName, change: Callable[[Collection], Collection]) -> Collection:
        """Apply ``change`` atomically: it is called again with the newest state if another write came first."""

    def update_version(self, name: ArtifactName, change: Callable[[Version], Version]) -> Version:
        """Apply ``change`` to a version's changeable fields atomically, as above; of a link to those of its source. The alias
        must be ``v<n>`` or an alias."""

    def delete_version(self, name: ArtifactName, delete_aliases: bool = False) -> Version:
        """Mark a version deleted. ConflictError if it has aliases besides ``latest`` and ``delete_aliases`` is False.
        ``latest`` moves to the highest version left, or goes. Links to it go with it; a link is only taken away itself."""

    def links_of(self, version: Version) -> list[LinkedVersion]:
        """The links that lead to what was logged as ``version``, in order of their names."""

    def delete_collection(self, name: ArtifactName, delete_aliases: bool = True) -> None:
        """Delete a collection: a portfolio with its links, a sequence with all its versions. ConflictError as for them."""

    def link(
        self, version: Version, target: ArtifactName, aliases: Sequence[str] = (), run: str = "", description: str | None = None
    ) -> LinkedVersion:
        """Make a version, or what a link leads to, a member of the portfolio ``target``, which is made if it is not there.
        UsageError for a collection that versions are logged to, or of another type."""

    def unlink(self, name: ArtifactName) -> LinkedVersion:
        """Take a link out of its portfolio, with its aliases there; returns it as it was. UsageError if it is none."""

    def in_registry(self, version: Version) -> bool:
        """Whether a registry has a link to the version."""

    def entity_settings(self, entity: str) -> EntitySettings:
        """What is set for an entity; the defaults where nothing is."""

    def update_entity(self, entity: str, change: Callable[[EntitySettings], EntitySettings]) -> EntitySettings:
        """Apply ``change`` atomically, as :meth:`update_collection` does."""

    def ttl_of(self, version: Version) -> int | None:
        """The seconds after its creation at which the version expires, inherited or its own; None for never."""

    def mark_used(self, version: Version, run: Run) -> None:
        """Record that ``run`` used ``version``. Idempotent."""

    def used_by(self, version: Version) -> list[Run]:
        """The runs that used ``version``, in order of their ids."""

    def run(self, entity: str, project: str, id: str) -> Run:
        """NotFoundError if there is none."""

    def runs(self, entity: str, project: str) -> list[Run]:
        """The runs of a project by creation time."""

    def save_run(self, run: Run) -> None:
        """Create or replace a run; ``used`` and ``logged`` of a stored one are kept and merged."""

    def finish_run(self, run: Run, exit_code: int) -> None:
        """Note that a saved run ended, where the store keeps that. An exit code of 0 is success."""
