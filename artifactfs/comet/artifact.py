"""``Artifact``: assets to be logged as a version. Only ``Experiment.log_artifact`` touches a store, only ``add_remote`` a bucket.

Local files are read when the artifact is logged, as they are then; one that changes while it is read fails that. An artifact is
one thread's. It may be logged any number of times: each makes a version.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias
from urllib.parse import urlsplit

import msgspec

from artifactfs import session
from artifactfs.building import Contents
from artifactfs.comet.assets import ArtifactAsset, check_asset_metadata, check_logical_path, own_metadata, shown_metadata
from artifactfs.comet.exceptions import ArtifactConflictingAssetLogicalPath
from artifactfs.draft import CopyArea, check_regular, scan_folder
from artifactfs.errors import ArtifactFSError, SourceChangedError, UsageError, from_os_error
from artifactfs.model import BLAKE3, BLOCK, Ref, Version, scheme_of
from artifactfs.names import (
    LATEST,
    ArtifactName,
    check_collection,
    check_metadata,
    check_new_alias,
    check_part,
    check_tags,
    check_type,
)
from artifactfs.publish import Draft, NewRef, publish
from artifactfs.references import expand
from artifactfs.semver import SemVer
from artifactfs.session import Session
from artifactfs.store.comet.words import ERROR, SIDECAR, SYNCED, SYNCED_SCHEMES, encode_sidecar
from artifactfs.store.semvers import NEXT

MAX_NAME = 100
"""Characters of an artifact's name, as Comet documents it."""
DEFAULT_TYPE = "data"
MAX_SYNCED = 10_000

log = logging.getLogger(__name__)


class Stream(Protocol):
    """Any file object that can be read; text is stored as UTF-8."""

    def read(self, size: int, /) -> bytes | str: ...


Source: TypeAlias = "str | Ref | Stream"
"""Where an asset comes from: a local path, a remote place, or a file object that is read when the artifact is logged."""


@dataclasses.dataclass(frozen=True, slots=True)
class Added:
    """An asset and where it comes from. ``inherited``: it came with a download, so another may take its place."""

    asset: ArtifactAsset
    source: Source
    inherited: bool = False


class Artifact:
    """A set of assets, at logical paths, to be logged as a version of ``name``."""

    def __init__(
        self,
        name: str,
        artifact_type: str | None = None,
        version: str | SemVer | None = None,
        aliases: Iterable[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        version_tags: Iterable[str] | None = None,
    ) -> None:
        """``artifact_type`` defaults to ``data``; without ``version`` (``1.2.0``) the next major one is taken when it is logged.

        ValueError for a name, type, version, alias, tag or metadata that cannot be.
        """
        self.name = _check_name(name)
        self.artifact_type = check_type(DEFAULT_TYPE if artifact_type is None else artifact_type, name)
        self._version = _parse_version(version)
        self.aliases = set(checked_aliases(aliases or ()))
        self.version_tags = set(check_tags(_listed(version_tags or (), "version_tags")))
        self.metadata = _check_metadata(metadata)
        self._assets: dict[str, Added] = {}
        self._folders: Counter[str] = Counter()
        self._area: CopyArea | None = None
        self._download_local_path: str | None = None

    @classmethod
    def _downloaded(cls, name: str, artifact_type: str, root: str, assets: Iterable[Added]) -> Artifact:
        """The artifact that a download to ``root`` gives: all assets, whose place others may take."""
        artifact = cls(name, artifact_type)
        artifact._download_local_path = root
        for added in assets:
            artifact._keep(added)
        return artifact

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, artifact_type={self.artifact_type!r})"

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name={self.name!r}, artifact_type={self.artifact_type!r}, version={self._version!s}, "
            f"aliases={sorted(self.aliases)!r}, version_tags={sorted(self.version_tags)!r})"
        )

    @property
    def version(self) -> SemVer | None:
        """The version it is to be logged as; None for the next one. May be set, to a ``SemVer`` or its text."""
        return self._version

    @version.setter
    def version(self, version: str | SemVer | None) -> None:
        self._version = _parse_version(version)

    @property
    def assets(self) -> list[ArtifactAsset]:
        """The assets, by logical path."""
        return [self._assets[path].asset for path in sorted(self._assets)]

    @property
    def download_local_path(self) -> str | None:
        """The directory it was downloaded to, if it came from ``LoggedArtifact.download``."""
        return self._download_local_path

    def add(
        self,
        local_path_or_data: Any,
        logical_path: str | None = None,
        overwrite: bool = False,
        copy_to_tmp: bool = True,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Add a file, the files below a directory, or what a file object gives.

        ``logical_path`` defaults to the file's name; of a directory it is what the paths of its files begin with, by default the
        directory's name. A file object needs one, and is read now, or with ``copy_to_tmp`` False when the artifact is logged.
        ``metadata`` is each asset's. TypeError for None and for a file object without ``logical_path``; ValueError for what is no
        file, directory or file object; ArtifactConflictingAssetLogicalPath for a path that is taken, unless ``overwrite`` or
        unless it came with a download. After an error nothing is added.
        """
        own = check_asset_metadata(metadata)
        if local_path_or_data is None:
            raise TypeError("local_path_or_data cannot be None; give a path or a file object")
        if hasattr(local_path_or_data, "read"):
            self._add_stream(local_path_or_data, logical_path, overwrite, copy_to_tmp, own)
            return
        local = _local_path(local_path_or_data)
        if os.path.isdir(local):
            prefix = os.path.basename(os.path.abspath(local)) if logical_path is None else logical_path
            files = [(f"{prefix}/{path}" if prefix else path, file) for path, file in scan_folder(local).files]
        else:
            files = [(logical_path or os.path.basename(local), check_regular(local))]
        self._put(
            [_local_asset(check_logical_path(path), file, _file_size(file), own, file) for path, file in files],
            overwrite,
        )

    def add_remote(
        self,
        uri: str,
        logical_path: str | None = None,
        overwrite: bool = False,
        asset_type: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        sync_mode: bool = True,
        max_synced_objects: int = MAX_SYNCED,
    ) -> None:
        """Add an asset whose bytes stay where ``uri`` says, which may be any text.

        With ``sync_mode`` an ``s3://`` or ``gs://`` URI is looked up: each object that it names, or whose key it is the beginning
        of, becomes an asset at ``logical_path`` and what its key has behind that, pinned to its present version. Where there
        are more than ``max_synced_objects``, or the look-up fails, a warning is logged and the URI becomes one plain asset with
        ``synced`` False and ``error_message`` in its metadata. ``logical_path`` of a plain asset defaults to the last part of
        the URI's path, else ``remote``. Errors as :meth:`add`. ``asset_type`` is deprecated and has no effect.
        """
        if asset_type is not None:
            warnings.warn("asset_type is deprecated and has no effect", DeprecationWarning, stacklevel=2)
        own = check_asset_metadata(metadata)
        _check_uri(uri)
        if sync_mode and scheme_of(uri) in SYNCED_SCHEMES:
            if max_synced_objects < 1:
                raise UsageError(f"max_synced_objects must be at least 1, not {max_synced_objects}; or pass sync_mode=False")
            try:
                found = list(expand(uri, logical_path or "", max_objects=max_synced_objects, keep_empty=True))
            except ArtifactFSError as error:
                log.warning("%s is logged as one plain remote asset, it could not be synced: %s", uri, error)
                own = {**(own or {}), SYNCED: False, ERROR: str(error)}
            else:
                self._put([_remote_asset(item.path, item.ref, own) for item in found], overwrite)
                return
        path = check_logical_path(logical_path or _last_part(uri))
        self._put([_remote_asset(path, Ref(path.rpartition("/")[2], uri, digest=uri, size=-1), own)], overwrite)

    def _add_stream(
        self, stream: Stream, logical_path: str | None, overwrite: bool, copy_now: bool, own: dict[str, Any] | None
    ) -> None:
        if not logical_path:
            raise TypeError("a file object needs a logical_path")
        path = check_logical_path(logical_path)
        self._check([path], overwrite)
        if copy_now:
            local = self._copy(stream)
            added = _local_asset(path, local, _file_size(local), own, local)
        else:
            added = _local_asset(path, stream, 0, own, stream)
        self._put([added], overwrite)

    def _copy(self, stream: Stream) -> str:
        """What is left to read of ``stream``, in a file of our own."""
        if self._area is None:
            self._area = CopyArea(session.current_settings().staging_dir / ".drafts")
        target = self._area.new_path()
        with open(target, "xb") as file:
            while data := stream.read(BLOCK):
                file.write(data.encode() if isinstance(data, str) else data)
        return target

    def _put(self, added: list[Added], overwrite: bool) -> None:
        """Add them all, or none."""
        self._check([item.asset.logical_path for item in added], overwrite)
        for item in added:
            self._keep(item)

    def _check(self, paths: list[str], overwrite: bool) -> None:
        """ArtifactConflictingAssetLogicalPath unless assets can be added at ``paths``, in any order."""
        new: set[str] = set()
        folders: set[str] = set()
        for path in paths:
            held = self._assets.get(path)
            if path in new:
                raise ArtifactConflictingAssetLogicalPath(f"cannot add two assets at {path!r} at once; nothing is added")
            if held is not None and not (overwrite or held.inherited):
                raise ArtifactConflictingAssetLogicalPath(
                    f"{self} has an asset at {path!r} already, from {_shown(held)}; pass overwrite=True to replace it"
                )
            new.add(path)
            folders.update(_above(path))
        held_folders = {path for path in new if path in folders or path in self._folders}
        for path in held_folders | {path for path in folders if path in self._assets}:
            raise ArtifactConflictingAssetLogicalPath(
                f"{path!r} would be an asset and hold others in {self}; a path is a file or a directory, not both"
            )

    def _keep(self, added: Added) -> None:
        path = added.asset.logical_path
        if path not in self._assets:
            self._folders.update(_above(path))
        self._assets[path] = added

    # Logging

    @contextlib.contextmanager
    def _contents(self) -> Iterator[Contents]:
        """What is published: the assets, and the file of their metadata."""
        contents = Contents(BLAKE3)
        try:
            told = {}
            for path, added in list(self._assets.items()):
                self._put_into(contents, path, added)
                ref = added.source if isinstance(added.source, Ref) else None
                if (own := own_metadata(added.asset.metadata, ref)) is not None:
                    told[path] = own
            if told:
                with contents.new_file(SIDECAR, "xb", None, "mutable") as file:
                    file.write(encode_sidecar(told))
            yield contents
        finally:
            contents.close()

    def _put_into(self, contents: Contents, path: str, added: Added) -> None:
        source = added.source
        if isinstance(source, Ref):
            contents.tree.check_free(path)
            contents.tree.put(path, _renewed(source, path))
            return
        if not isinstance(source, str):  # from now on it is a copy, as it cannot be read again
            source = self._copy(source)
            asset = dataclasses.replace(added.asset, size=_file_size(source), local_path_or_data=source)
            self._assets[path] = Added(asset, source, added.inherited)
        contents.add_file(source, path, False, False, "immutable", False)


def publish_artifact(artifact: Artifact, opened: Session, workspace: str, project: str, run: str) -> Version:
    """Make a version of the artifact. ConflictError for a version that there is; what else ``publish`` raises."""
    if not artifact._assets:
        log.warning("%s has no assets; an empty version is logged", artifact)
    with artifact._contents() as contents:
        draft = Draft(
            name=ArtifactName(workspace, project, _check_name(artifact.name)),
            type=check_type(artifact.artifact_type, artifact.name),
            folder=contents.tree.root,
            commit=secrets.token_hex(16),
            metadata=_check_metadata(artifact.metadata),
            tags=sorted(check_tags(artifact.version_tags)),
            aliases=sorted(checked_aliases(artifact.aliases)),
            run=run,
            semver=str(artifact.version) if artifact.version is not None else NEXT,
            always=True,
        )
        return publish(opened.store, draft).version


def checked_aliases(aliases: Iterable[str]) -> set[str]:
    """The aliases but for ``latest`` (``Latest``), which moves by itself. InvalidNameError."""
    given = _listed(aliases, "aliases")
    return {check_new_alias(alias) for alias in given if alias.lower() != LATEST}


def _listed(given: Iterable[str], what: str) -> Iterable[str]:
    if isinstance(given, str):
        raise UsageError(f"{what} must be a list of texts, not the text {given!r}")
    return given


def _check_name(name: str) -> str:
    if len(name) > MAX_NAME:
        raise UsageError(f"artifact name {name[:20]!r}… is {len(name)} characters long; at most {MAX_NAME} are allowed")
    return check_collection(name)


def _parse_version(version: str | SemVer | None) -> SemVer | None:
    return version if version is None or isinstance(version, SemVer) else SemVer.parse(str(version))


def _check_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    if metadata is not None and not isinstance(metadata, Mapping):
        raise UsageError(f"metadata must be a dict, not {type(metadata).__name__}")
    return check_metadata(metadata)


def _local_path(given: Any) -> str:
    try:
        local = os.fspath(given)
    except TypeError:
        local = b""
    if not isinstance(local, str):
        raise UsageError(f"{str(given)[:100]!r} ({type(given).__name__}) cannot be added; give a path or a file object")
    return local


def _file_size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError as error:
        raise from_os_error(error, f"reading {path}") from None


def _local_asset(path: str, source: str | Stream, size: int, own: dict[str, Any] | None, given: object) -> Added:
    source = os.path.abspath(source) if isinstance(source, str) else source
    asset = ArtifactAsset(False, path, size, metadata=own, local_path_or_data=given, id=secrets.token_hex(16))
    return Added(asset, source)


def _remote_asset(path: str, ref: Ref, own: dict[str, Any] | None) -> Added:
    shown = shown_metadata(own, ref)
    asset = ArtifactAsset(True, check_logical_path(path), max(ref.size, 0), ref.uri, shown, id=secrets.token_hex(16))
    return Added(asset, ref)


def _renewed(ref: Ref, path: str) -> NewRef:
    """A reference of another version, to stand at ``path`` of this one. What was read then (``file://``) is read again."""
    if not ref.id:
        return NewRef(msgspec.structs.replace(ref, name=path.rpartition("/")[2], blocks=None), b"")
    item = next(expand(ref.uri, path))
    if item.ref.id != ref.id:
        raise SourceChangedError(f"{ref.uri} has changed since {path!r} was logged; add it again")
    return NewRef(item.ref, item.block_list)


def _check_uri(uri: str) -> None:
    if not isinstance(uri, str) or not uri:
        raise UsageError(f"a remote asset needs a URI, not {uri!r}")
    if not uri.isprintable():
        raise UsageError(f"remote asset {uri[:200]!r} has a line break or another control character in it; percent-encode it")


def _last_part(uri: str) -> str:
    """The last part of a URI's path, if that can be a name, else ``remote``."""
    try:
        part = urlsplit(uri).path.rstrip("/").rpartition("/")[2]
        return check_part(part)
    except ValueError:
        return "remote"


def _above(path: str) -> Iterator[str]:
    """The directories above ``path``."""
    parts = path.split("/")
    return ("/".join(parts[:depth]) for depth in range(1, len(parts)))


def _shown(added: Added) -> str:
    source = added.source
    return repr(source) if isinstance(source, str) else source.uri if isinstance(source, Ref) else "a file object"
