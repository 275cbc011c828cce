"""Copies versions from one store to another, of whatever kind: native stores, W&B's servers, Comet's.

============  ==================================================================================================================
module        what it does
============  ==================================================================================================================
stored        trees and contents between native stores: stored objects are read and written as they are
streamed      all other directions: contents are read through a ``Reader``, and made versions of as all versions are
catalog       aliases, descriptions, links and runs
left          what a store cannot hold, in words
============  ==================================================================================================================

A version that is there already is known by the id of its commit: a copy keeps that of what it is a copy of
(``ArtifactServer.identity``), in whatever form its store keeps such ids. So a copy may be repeated, and a version that comes back
to where it is from is not made again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from artifactfs.cache import BlockCache
from artifactfs.copying.catalog import Pair, adopt_collection, carry_creator, copy_links, copy_runs
from artifactfs.copying.left import LeftOut
from artifactfs.copying.stored import copy_stored
from artifactfs.copying.streamed import Older, copy_streamed, identity
from artifactfs.errors import ConflictError, NotFoundError, UsageError
from artifactfs.model import Collection, Version
from artifactfs.names import ArtifactName
from artifactfs.publish import Progress, Published, Report
from artifactfs.reader import Reader
from artifactfs.store import Store
from artifactfs.store.native import NativeStore
from artifactfs.store.server import ArtifactServer

_LOOK_BACK = 5
"""Older versions that a single one's copy is looked for, to be made over: each may be a question."""

log = logging.getLogger(__name__)


class Copied(NamedTuple):
    """``created`` is False where the target had the version already."""

    version: Version
    created: bool


def copy(
    source: Store,
    target: Store,
    name: ArtifactName,
    report: Report | None = None,
    *,
    cache: BlockCache | None = None,
    notes: Path | None = None,
    warn: Callable[[str], None] = log.warning,
    new_digests: bool = False,
) -> list[Copied]:
    """Copy the version that ``name``'s alias names, or all versions of the collection where it has none, in order.

    A version keeps its number, or gets the next one free in the target where that is higher, or the one that a server gives; its
    semantic version likewise. Its aliases (which move from other versions there), description, metadata, tags, TTL, links and
    runs come with it; the collection's description and tags, where the target's has none. A portfolio becomes a collection of the
    versions that it links. What the target cannot hold, ``warn`` is told, in a line for each version.

    ``cache`` keeps what is read of a remote source, and ``notes`` (see ``Draft``) what was sent, for an attempt after this one.
    ``new_digests``: a W&B version whose digest does not follow from its list of files, as of one that was logged in parts, is
    copied under the digest that does, and ``warn`` is told. NotFoundError for what is not in ``source``; UsageError for another
    type of the target's collection, and for one and the same store; IntegrityError for what is not what was recorded: it is not
    copied.
    """
    if source.url == target.url:
        raise UsageError(f"{target.url} is the store that {name.path} is copied from; name another one with --to")
    versions = [source.version(name)] if name.alias else source.versions(name)
    with closing(Reader(source, cache)) as reader:
        return _Job(source, target, reader, notes, warn, _Totals(report), new_digests).copy_collection(name.at(""), versions)


class _Totals:
    """Adds up what is done version by version."""

    def __init__(self, report: Report | None) -> None:
        self._report = report
        self._before = Progress()
        self._now = Progress()

    def begin(self) -> Progress:
        """The next version: what :meth:`told` is told is of that."""
        self._before = Progress(
            self._before.files + self._now.files,
            self._before.bytes + self._now.bytes,
            self._before.stored + self._now.stored,
        )
        self._now = Progress()
        return Progress()

    def told(self, done: Progress) -> None:
        """As a ``Report``."""
        self._now = Progress(done.files, done.bytes, done.stored)
        if self._report is not None:
            before = self._before
            self._report(Progress(before.files + done.files, before.bytes + done.bytes, before.stored + done.stored))


class _Job:
    """One copy."""

    def __init__(
        self,
        source: Store,
        target: Store,
        reader: Reader,
        notes: Path | None,
        warn: Callable[[str], None],
        totals: _Totals,
        new_digests: bool,
    ) -> None:
        self._source = source
        self._target = target
        self._reader = reader
        self._notes = notes
        self._warn = warn
        self._totals = totals
        self._new_digests = new_digests
        self._portfolios: dict[str, Collection] = {}

    def copy_collection(self, name: ArtifactName, versions: Sequence[Version]) -> list[Copied]:
        """Copy versions of one collection, in order."""
        theirs = self._source.collection(name)
        known = _Known(self._source, self._target, name, versions)
        copied, pairs = [], []
        older = None
        for listed in versions:
            # A W&B server does not say in a list which run logged a version.
            asked = isinstance(self._source, ArtifactServer) and not listed.run
            version = self._source.version(name.at(listed.name)) if asked else listed
            left = LeftOut()
            try:
                there = known.find(version)
                if there is None:
                    older = older or self._older(known, name, version)
                    published = self._publish(version, older, theirs, left)
                    result = Copied(published.version, published.created)
                else:
                    result = Copied(there, False)
                pair = Pair(version, result.version)
                copy_links(self._source, self._target, pair, self._portfolios, left)
                copy_runs(self._source, self._target, pair, left)
            finally:
                self._tell(version.qualified_name, left)
            copied.append(result)
            pairs.append(pair)
            older = Older(version, result.version)
        left = LeftOut()
        adopt_collection(self._target, name, theirs, pairs, left)
        self._tell(name.path, left)
        return copied

    def _older(self, known: _Known, name: ArtifactName, version: Version) -> Older | None:
        """The newest of the versions before this one that the target has, of the last few."""
        if isinstance(self._source, NativeStore) and isinstance(self._target, NativeStore):
            return None  # these compare with what is newest there
        before = [it for it in self._source.versions(name) if it.number < version.number]
        for other in before[: -_LOOK_BACK - 1 : -1]:
            found = known.find(other)
            if found is not None:
                return Older(other, found)
        return None

    def _publish(self, version: Version, older: Older | None, theirs: Collection, left: LeftOut) -> Published:
        source, target = self._source, self._target
        progress = self._totals.begin()
        if isinstance(source, NativeStore) and isinstance(target, NativeStore):
            return copy_stored(source, target, version, identity(source, version), progress, self._totals.told)
        run = carry_creator(target, source, version, left)
        aliases = [alias for alias, number in theirs.aliases.items() if number == version.number]
        report, new = self._totals.told, self._new_digests
        return copy_streamed(source, target, self._reader, version, run, older, aliases, left, self._notes, report, new)

    def _tell(self, what: str, left: LeftOut) -> None:
        said = left.said()
        if said:
            self._warn(f"{what}: not carried over to {self._target.url}: {said}")


class _Known:
    """Which versions of a collection the target has already, as copies of the source's, or as what those are copies of."""

    def __init__(self, source: Store, target: Store, name: ArtifactName, versions: Sequence[Version]) -> None:
        """``versions`` are those that will be asked for."""
        self._source = source
        self._target = target
        self._name = name
        self._copies: dict[str, Version | None] = {}
        self._look([identity(source, version) for version in versions])
        self._returned: dict[str, Version] | None = None

    def find(self, version: Version) -> Version | None:
        """The target's version that is the same as the source's ``version``."""
        commit = identity(self._source, version)
        if commit not in self._copies:
            self._look([commit])
        return self._copies[commit] or self._returns().get(version.commit)

    def _look(self, commits: list[str]) -> None:
        made = _made_by(self._target, self._name, commits)
        for copy in made.values():
            home = f"{copy.entity}/{copy.project}/{copy.collection}"
            if home != self._name.path:
                raise ConflictError(
                    f"{self._name.path} was copied to {self._target.url} before, and is {home} there now: give it back its name"
                )
        self._copies.update((commit, made.get(commit)) for commit in commits)

    def _returns(self) -> dict[str, Version]:
        """The target's versions that those of the source are copies of, by the commit of the copy."""
        if isinstance(self._source, NativeStore) and isinstance(self._target, NativeStore):
            return {}  # one commit is another's copy as much as that is its
        if self._returned is None:
            try:
                ours = {identity(self._target, version): version for version in self._target.versions(self._name)}
            except NotFoundError:
                ours = {}
            made = _made_by(self._source, self._name, list(ours))
            self._returned = {copy.commit: ours[commit] for commit, copy in made.items()}
        return self._returned


def _made_by(store: Store, name: ArtifactName, commits: Sequence[str]) -> dict[str, Version]:
    if isinstance(store, ArtifactServer):
        return store.made_by(name, commits)
    wanted = set(commits)
    try:
        return {version.commit: version for version in store.versions(name) if version.commit in wanted}
    except NotFoundError:
        return {}
