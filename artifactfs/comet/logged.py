"""What was logged: ``LoggedArtifact``, its assets, and the experiment it came from."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import msgspec
from blake3 import blake3

from artifactfs import download
from artifactfs.comet.artifact import Added, Artifact, checked_aliases
from artifactfs.comet.assets import ASSET_TYPE, ArtifactAsset, shown_metadata
from artifactfs.comet.exceptions import (
    ArtifactAssetNotFound,
    ArtifactDownloadException,
    GetArtifactException,
    raised_as,
)
from artifactfs.download import Existing
from artifactfs.draft import fingerprint_file
from artifactfs.errors import ConflictError, IntegrityError, NotFoundError, UsageError, also, from_os_error
from artifactfs.manifest import version_id
from artifactfs.model import BLAKE3, Collection, Dir, Entry, File, Ref, Remote, Run, Symlink, Version
from artifactfs.names import LATEST, ArtifactName, check_tags, entry_path
from artifactfs.semver import SemVer
from artifactfs.session import Session
from artifactfs.store.comet.words import ERROR, FOLDER, MAX_SIDECAR, SIDECAR, SYNCED, decode_sidecar, is_synced
from artifactfs.store.semvers import semver_of

_STRATEGIES: dict[object, Existing] = {
    False: "refuse",
    "fail": "refuse",
    "preserve": "keep",
    True: "replace",
    "overwrite": "replace",
}


log = logging.getLogger(__name__)


class ImmutableDict(dict[str, Any]):
    """A dict that refuses to be changed."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("the metadata of a logged artifact cannot be changed; log another version")

    __setitem__ = __delitem__ = update = setdefault = pop = popitem = clear = __ior__ = _refuse


class Recorded:
    """An experiment's names, as its record has them."""

    _record: Run

    def __repr__(self) -> str:
        return f"<{type(self).__name__} '{self._record.path}'>"

    @property
    def id(self) -> str:
        """The experiment's key."""
        return self._record.id

    def get_key(self) -> str:
        """The experiment's key."""
        return self._record.id

    @property
    def workspace(self) -> str:
        return self._record.entity

    @property
    def project_name(self) -> str:
        return self._record.project


class APIExperiment(Recorded):
    """An experiment as the store keeps it: what logged artifacts, and used them."""

    key = Recorded.id

    def __init__(self, record: Run) -> None:
        self._record = record

    @property
    def name(self) -> str:
        return self._record.name or self.id

    def get_name(self) -> str:
        return self.name

    def get_artifact_lineage(self, direction: str = "all") -> dict[str, list[str]]:
        """The versions that it made (``output``) and used (``input``), as ``workspace/project/name:vN``. ValueError for another
        ``direction`` than ``all``, ``output`` and ``input``."""
        found = {"input": list(self._record.used), "output": list(self._record.logged)}
        if direction == "all":
            return found
        if direction not in found:
            raise UsageError(f"direction {direction!r} is not known; it is all, input or output")
        return {direction: found[direction]}


@dataclasses.dataclass(frozen=True, slots=True)
class LoggedArtifactAsset:
    """One asset of a version. ``size`` is in bytes, 0 for a plain remote one; ``link`` is a remote one's URI, else one that
    fsspec opens."""

    remote: bool
    logical_path: str
    size: int
    link: str
    metadata: dict[str, Any] | None
    asset_type: str
    id: str
    artifact_version_id: str
    artifact_id: str
    source_experiment_key: str | None
    _owner: LoggedArtifact = dataclasses.field(repr=False, compare=False)
    _entry: File | Ref = dataclasses.field(repr=False, compare=False)

    def __lt__(self, other: LoggedArtifactAsset) -> bool:
        return self.logical_path < other.logical_path

    def is_remote_and_synced(self) -> bool:
        """Whether its bytes are in a bucket, and known to be those that were there when it was added."""
        return isinstance(self._entry, Ref) and is_synced(self._entry)

    def is_asset_downloadable(self) -> bool:
        """Whether :meth:`download` can fetch it: all but plain remote ones."""
        return not self.remote or self.is_remote_and_synced()

    def download(
        self,
        local_path: str | os.PathLike[str] | None = None,
        logical_path: str | bool | None = None,
        overwrite_strategy: bool | str = False,
    ) -> ArtifactAsset:
        """Fetch it, checked, to ``logical_path`` (default: its own) below the directory ``local_path`` (default: a new temporary
        one). With ``logical_path`` "" or False ``local_path`` is the file itself.

        ``overwrite_strategy`` as in :meth:`LoggedArtifact.download`. ArtifactDownloadException.
        """
        existing = _strategy(overwrite_strategy)
        with raised_as(ArtifactDownloadException):
            if not self.is_asset_downloadable():
                raise UsageError(f"{self.logical_path!r} of {self._owner} is only a link, to {self.link}; it is not downloaded")
            target = _target(self.logical_path, local_path, logical_path)
            self._fetch(target, existing)
        return ArtifactAsset(False, self.logical_path, os.path.getsize(target), None, self.metadata, self.asset_type, target)

    def _fetch(self, target: str, existing: Existing) -> None:
        taken = os.path.lexists(target)
        if taken and existing == "keep":
            return
        if taken and _has_content(target, self._entry):
            return
        if taken and existing == "refuse" and _is_known(self._entry):
            raise _taken(target, self._owner)
        folder = os.path.dirname(os.path.abspath(target))
        with _os_errors(f"writing {target}"):
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".afs-", dir=folder) as beside:
                found = self._owner._get_file(self.logical_path, beside)
                if taken and existing == "refuse" and not _same_files(found, target):
                    raise _taken(target, self._owner)
                os.replace(found, target)


class LoggedArtifact:
    """A version of an artifact, made by ``Experiment.log_artifact`` or found by ``Experiment.get_artifact``."""

    def __init__(self, opened: Session, version: Version, collection: Collection) -> None:
        self._session = opened
        self._version = version
        self._collection = collection
        self._assets: list[LoggedArtifactAsset] | None = None
        self._told: dict[str, dict[str, Any]] | None = None

    def __str__(self) -> str:
        return f"<{type(self).__name__} '{self.workspace}/{self.name}:{self.version}'>"

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(artifact_name={self.name!r}, artifact_type={self.artifact_type!r}, "
            f"workspace={self.workspace!r}, version={str(self.version)!r}, aliases={sorted(self.aliases)!r}, "
            f"artifact_tags={sorted(self.artifact_tags)!r}, version_tags={sorted(self.version_tags)!r}, size={self.size!r}, "
            f"source_experiment_key={self.source_experiment_key!r})"
        )

    @property
    def name(self) -> str:
        return self._version.collection

    @property
    def artifact_type(self) -> str:
        return self._version.type

    @property
    def version(self) -> SemVer:
        """The semantic version. Of one that was not logged in Comet's way it is made of its number: ``v0`` is ``1.0.0``."""
        return SemVer.parse(semver_of(self._version))

    @property
    def workspace(self) -> str:
        return self._version.entity

    @property
    def project_name(self) -> str:
        """The project whose collection it is in."""
        return self._version.project

    @property
    def qualified_name(self) -> str:
        """``workspace/project/name:1.2.0``, which can be mounted."""
        return f"{self._name.path}:{self.version}"

    @property
    def aliases(self) -> frozenset[str]:
        """As last seen; ``latest`` is the newest version's."""
        number = self._version.number
        return frozenset(alias for alias, held in self._collection.aliases.items() if held == number)

    @property
    def artifact_tags(self) -> frozenset[str]:
        """The tags of all versions together, as last seen."""
        return frozenset(self._collection.tags)

    @property
    def version_tags(self) -> frozenset[str]:
        """As last seen."""
        return frozenset(self._version.tags)

    @property
    def metadata(self) -> ImmutableDict:
        return ImmutableDict(copy.deepcopy(self._version.metadata))

    @property
    def size(self) -> int:
        """The bytes of all assets, synced remote ones included."""
        sidecar = self._session.store.tree.resolve(self._version.root, SIDECAR)
        return self._version.size - (sidecar.size if isinstance(sidecar, File) else 0)

    @property
    def source_experiment_key(self) -> str | None:
        """The key of the experiment that logged it, None if none did."""
        return self._version.run.rpartition("/")[2] or None

    @property
    def assets(self) -> list[LoggedArtifactAsset]:
        """All assets, remote ones as well, by logical path."""
        if self._assets is None:
            listing = self._session.store.tree.listing(self._version.root)
            self._assets = [self._asset(path, entry) for path, entry in listing if not _is_ours(path)]
        return list(self._assets)

    @property
    def remote_assets(self) -> list[LoggedArtifactAsset]:
        """The remote ones among :attr:`assets`."""
        return [asset for asset in self.assets if asset.remote]

    def get_asset(self, asset_logical_path: str) -> LoggedArtifactAsset:
        """The asset at a logical path. ArtifactAssetNotFound."""
        with contextlib.suppress(UsageError):
            path = entry_path(asset_logical_path)
            entry = self._session.store.tree.resolve(self._version.root, path)
            if isinstance(entry, (File, Ref)) and not _is_ours(path):
                return self._asset(path, entry)
        raise ArtifactAssetNotFound(f"{self} has no asset {asset_logical_path!r}")

    def download(
        self,
        path: str | os.PathLike[str] | None = None,
        overwrite_strategy: bool | str = False,
        sync_mode: bool = True,
    ) -> Artifact:
        """Fetch the assets, every byte checked, to the directory ``path`` (default: a new temporary one). The result is an
        artifact with these assets, which can be changed and logged as another version.

        A file that is there and has other content: ``overwrite_strategy`` False or ``"FAIL"`` raises, ``"PRESERVE"`` keeps it,
        True or ``"OVERWRITE"`` replaces it with a warning. Plain remote assets are not fetched, and with ``sync_mode`` False
        synced ones neither. ArtifactDownloadException, also for a remote asset that should have been synced when it was added
        and could not be. ValueError for another strategy.
        """
        existing = _strategy(overwrite_strategy)
        root = os.fspath(path) if path is not None else tempfile.mkdtemp()
        with raised_as(ArtifactDownloadException):
            assets = self.assets
            if sync_mode:
                _check_synced(assets)
            wanted = _wanted(assets, sync_mode)
            if existing == "replace":
                self._warn_of_replaced(root, assets)

            def select(inside: str, entry: Entry) -> bool:
                return isinstance(entry, Symlink) or (inside in wanted and not _is_ours(inside))

            store, reader = self._session.store, self._session.reader
            download.get(store, reader, self._version, root, existing=existing, select=select)
            return Artifact._downloaded(
                self.name, self.artifact_type, root, (_inherited(asset, root, asset.logical_path in wanted) for asset in assets)
            )

    def get_source_experiment(self, api_key: str | None = None, cache: bool = True) -> APIExperiment:
        """The experiment that logged it. GetArtifactException if none did or it is not known. The parameters are Comet's."""
        with raised_as(GetArtifactException):
            parts = self._version.run.split("/")
            if len(parts) != 3:
                raise NotFoundError(f"{self} was not logged by an experiment")
            return APIExperiment(self._session.store.run(*parts))

    def update_aliases(self, new_aliases: Iterable[str]) -> None:
        """Let the version have exactly these aliases; ``latest`` stays where it is."""
        wanted = checked_aliases(new_aliases)
        number = self._version.number

        def change(collection: Collection) -> Collection:
            kept = {alias: held for alias, held in collection.aliases.items() if held != number or alias == LATEST}
            return msgspec.structs.replace(collection, aliases=kept | dict.fromkeys(sorted(wanted), number))

        self._session.store.version(self._name.at(self._version.name))  # a deleted one gets none
        self._collection = self._session.store.update_collection(self._name, change)

    def update_version_tags(self, new_version_tags: Iterable[str]) -> None:
        """Let the version have exactly these tags."""
        tags = check_tags(new_version_tags)
        name = self._name.at(self._version.name)
        self._version = self._session.store.update_version(name, lambda it: msgspec.structs.replace(it, tags=tags))

    def update_artifact_tags(self, new_artifact_tags: Iterable[str]) -> None:
        """Let the artifact, with all its versions, have exactly these tags."""
        tags = check_tags(new_artifact_tags)
        self._collection = self._session.store.update_collection(self._name, lambda it: msgspec.structs.replace(it, tags=tags))

    @property
    def _name(self) -> ArtifactName:
        return ArtifactName(self._version.entity, self._version.project, self._version.collection)

    def _asset(self, path: str, entry: File | Ref) -> LoggedArtifactAsset:
        ref = entry if isinstance(entry, Ref) else None
        return LoggedArtifactAsset(
            remote=ref is not None,
            logical_path=path,
            size=max(entry.size, 0),
            link=ref.uri if ref is not None else f"artifactfs://{self._version.qualified_name}/{path}",
            metadata=shown_metadata(self._asset_metadata().get(path), ref),
            asset_type=ASSET_TYPE,
            id=blake3(f"{self._version.qualified_name}/{path}".encode()).hexdigest()[:32],
            artifact_version_id=version_id(self._version),
            artifact_id=self._name.path,
            source_experiment_key=self.source_experiment_key,
            _owner=self,
            _entry=entry,
        )

    def _asset_metadata(self) -> dict[str, dict[str, Any]]:
        """What the version keeps of its assets' own metadata, by logical path."""
        if self._told is None:
            where = self._version.qualified_name
            entry = self._session.store.tree.resolve(self._version.root, SIDECAR)
            if not isinstance(entry, File):
                return {}
            if entry.size > MAX_SIDECAR:
                raise IntegrityError(f"{where}/{SIDECAR} has {entry.size} bytes, more than any that is written")
            with contextlib.closing(self._session.reader.open(entry, f"{where}/{SIDECAR}")) as handle:
                self._told = decode_sidecar(_read_all(handle, entry.size), where)
        return self._told

    def _get_file(self, path: str, root: str) -> str:
        return download.get_file(self._session.store, self._session.reader, self._version, path, root)

    def _warn_of_replaced(self, root: str, assets: Iterable[LoggedArtifactAsset]) -> None:
        """Say which files in ``root`` are about to be replaced by other content."""
        for asset in assets:
            target = os.path.join(root, asset.logical_path)
            if asset.is_asset_downloadable() and os.path.isfile(target) and not _has_content(target, asset._entry):
                log.warning("%s is replaced by the asset of %s", target, self)


def _is_ours(path: str) -> bool:
    """Whether what stands at ``path`` is this package's and no asset."""
    return path == FOLDER or path.startswith(f"{FOLDER}/")


def _wanted(assets: Iterable[LoggedArtifactAsset], sync_mode: bool) -> set[str]:
    """The paths to download, and those of the directories above them."""
    wanted: set[str] = set()
    for asset in assets:
        if not asset.remote or (sync_mode and asset.is_remote_and_synced()):
            path = asset.logical_path
            while path and path not in wanted:
                wanted.add(path)
                path = path.rpartition("/")[0]
    return wanted


def _check_synced(assets: Iterable[LoggedArtifactAsset]) -> None:
    """ArtifactDownloadException for an asset that could not be synced when it was added."""
    for asset in assets:
        told = asset.metadata or {}
        if asset.remote and not asset.is_remote_and_synced() and (told.get(ERROR) is not None or told.get(SYNCED)):
            why = told.get(ERROR) or "its scheme cannot be"
            raise ArtifactDownloadException(
                f"cannot download {asset.logical_path!r}: it was not synced when it was added ({why}); pass sync_mode=False"
            )


def _inherited(asset: LoggedArtifactAsset, root: str, fetched: bool) -> Added:
    """An asset of the version as one of the artifact that a download to ``root`` gives."""
    local = os.path.join(root, asset.logical_path) if fetched else ""
    shown = ArtifactAsset(
        remote=asset.remote,
        logical_path=asset.logical_path,
        size=os.path.getsize(local) if fetched else asset.size,
        link=asset.link if asset.remote else None,
        metadata=asset.metadata,
        asset_type=asset.asset_type,
        local_path_or_data=local or None,
        id=asset.id,
    )
    return Added(shown, asset._entry if isinstance(asset._entry, Ref) else os.path.abspath(local), inherited=True)


def _strategy(given: bool | str) -> Existing:
    key = given.lower() if isinstance(given, str) else given
    found = _STRATEGIES.get(key) if isinstance(key, (bool, str)) else None
    if found is None:
        raise UsageError(f"overwrite_strategy {given!r} is not known; it is False or 'FAIL', 'PRESERVE', True or 'OVERWRITE'")
    return found


def _target(own: str, local_path: str | os.PathLike[str] | None, logical_path: str | bool | None) -> str:
    """Where an asset is downloaded to."""
    inside = entry_path(own) if logical_path is None or logical_path is True else logical_path
    if not inside:
        return os.fspath(local_path) if local_path is not None else os.path.join(tempfile.mkdtemp(), own.rpartition("/")[2])
    return os.path.join(local_path if local_path is not None else tempfile.mkdtemp(), str(inside))


def _taken(target: str, owner: LoggedArtifact) -> ConflictError:
    return also(  # type: ignore[return-value]  # of both classes
        ConflictError(
            f"{target} is there already, and not as {owner} has it; move it away or pass overwrite_strategy='OVERWRITE'"
        ),
        ArtifactDownloadException,
    )


def _is_known(entry: Entry) -> bool:
    """Whether the content of ``entry`` can be told from another without fetching it."""
    if isinstance(entry, Remote):
        return bool(entry.checksum)
    return not isinstance(entry, (Dir, Symlink)) and bool(entry.id)


def _has_content(path: str, entry: Entry) -> bool:
    """Whether the file at ``path`` has the very content of ``entry``, as far as that is known without fetching it."""
    if isinstance(entry, (Dir, Symlink)) or not _is_known(entry) or os.path.islink(path) or not os.path.isfile(path):
        return False
    if os.path.getsize(path) != entry.size:
        return False
    if isinstance(entry, Remote):
        return fingerprint_file(path, entry.algorithm).digest == entry.checksum
    return fingerprint_file(path, BLAKE3).id == entry.id


def _same_files(one: str, other: str) -> bool:
    return os.path.isfile(other) and fingerprint_file(one, BLAKE3).id == fingerprint_file(other, BLAKE3).id


def _read_all(handle: Any, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (piece := handle.read(len(data), size - len(data))):
        data += piece
    return bytes(data)


@contextlib.contextmanager
def _os_errors(doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise from_os_error(error, doing) from None
