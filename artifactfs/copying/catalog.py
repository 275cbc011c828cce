"""What is said of versions beside their files: aliases, the collection's description and tags, links, runs.

All of it may be done again: what the target has already is left as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from artifactfs.copying.left import ALIAS, LINK, USER, LeftOut
from artifactfs.copying.streamed import carried_aliases, valid_tags
from artifactfs.errors import (
    CommError,
    ConflictError,
    IntegrityError,
    InvalidNameError,
    NotFoundError,
    NotPermittedError,
    UsageError,
)
from artifactfs.model import Collection, LinkedVersion, Run, Version
from artifactfs.names import LATEST, ArtifactName, check_new_alias
from artifactfs.store import Store
from artifactfs.store.native import NativeStore, now
from artifactfs.store.server import ArtifactServer

_REFUSED = (UsageError, NotPermittedError, NotFoundError, ConflictError, CommError)
"""What a store answers that has no means for something, or not for this caller."""


class Pair(NamedTuple):
    """A version of the source and its copy."""

    source: Version
    target: Version


def adopt_collection(target: Store, name: ArtifactName, theirs: Collection, pairs: Sequence[Pair], left: LeftOut) -> None:
    """Give the copied versions of ``name`` their aliases, and the collection what describes it, where it has nothing of that.
    ``latest`` moves as it does when versions are made (a copy that was killed may not have come to that) or, where the source has
    it elsewhere and the target allows that, to the same version."""
    numbers = {pair.source.number: pair.target.number for pair in pairs}
    if not numbers:
        return
    wanted = _aliases(target, theirs, pairs, left)
    server = target if isinstance(target, ArtifactServer) else None
    describes = server is None or server.files_only
    if theirs.description is not None and not describes:
        left.name("the collection's description")
    tags = valid_tags(theirs.tags, left)

    def adopt(ours: Collection) -> Collection:
        aliases = {alias: at for alias, at in wanted.items() if ours.semver.get(alias, at) == at and alias not in ours.semver}
        latest = _latest(server, ours, theirs, numbers)
        return msgspec.structs.replace(
            ours,
            description=theirs.description if ours.description is None and describes else ours.description,
            tags=ours.tags or tags,
            aliases={**ours.aliases, **aliases, **({LATEST: latest} if latest is not None else {})},
        )

    held = target.update_collection(name, adopt).aliases.get(LATEST)
    if held in numbers.values() and held != numbers.get(theirs.aliases.get(LATEST, -1), held):  # not a newer one of its own
        left.name(f"the alias {LATEST}, which stays with v{held} there")


def _aliases(target: Store, theirs: Collection, pairs: Sequence[Pair], left: LeftOut) -> dict[str, int]:
    wanted = {}
    for pair in pairs:
        own = [alias for alias, number in theirs.aliases.items() if number == pair.source.number]
        for alias in carried_aliases(target, pair.source, own):
            try:
                wanted[check_new_alias(alias)] = pair.target.number
            except InvalidNameError:
                left.count(ALIAS)
    return wanted


def _latest(server: ArtifactServer | None, ours: Collection, theirs: Collection, numbers: Mapping[int, int]) -> int | None:
    """Which version of the target is to be ``latest``; None to leave that to the target."""
    held = ours.aliases.get(LATEST)
    if server is not None and not server.moves_latest:
        return held
    wanted = numbers.get(theirs.aliases.get(LATEST, -1))
    known = set(numbers.values())
    if wanted is not None and (held is None or held in known):
        return wanted
    return max(-1 if held is None else held, *known) if server is None else held


# Links


def copy_links(source: Store, target: Store, pair: Pair, portfolios: dict[str, Collection], left: LeftOut) -> None:
    """Link the copy to where its source is linked; ``portfolios`` keeps those that were asked for."""
    if isinstance(pair.source, LinkedVersion):
        return
    try:
        links = source.links_of(pair.source)
        there = {(it.entity, it.project, it.collection) for it in target.links_of(pair.target)} if links else set()
    except _REFUSED:  # the version is there, and worth more than its links
        left.name("the links to it")
        return
    for link in links:
        if (link.entity, link.project, link.collection) not in there:
            try:
                _link(source, target, pair, link, portfolios)
            except _REFUSED:
                left.count(LINK)


def _link(source: Store, target: Store, pair: Pair, link: LinkedVersion, portfolios: dict[str, Collection]) -> None:
    name = ArtifactName(link.entity, link.project, link.collection)
    portfolio = portfolios.get(name.path)
    if portfolio is None:
        portfolio = portfolios[name.path] = source.collection(name)
    aliases = [alias for alias, number in portfolio.aliases.items() if number == link.number and alias != LATEST]
    description = None
    try:
        target.collection(name)
    except NotFoundError:
        description = portfolio.description
    target.link(pair.target, name, aliases, description=description)


# Runs


def carry_creator(target: Store, source: Store, version: Version, left: LeftOut) -> str:
    """The run that the copy of ``version`` is to be logged by, "" for none; it is there, where that must be so."""
    if not version.run or isinstance(target, NativeStore):
        return version.run
    if isinstance(target, ArtifactServer) and target.files_only:
        same = version.run.rpartition("/")[0] == f"{version.entity}/{version.project}"
        if not same or not _keep_run(target, _run(source, version.run)):
            left.name("the run that logged it")
            return ""
    return version.run


def copy_runs(source: Store, target: Store, pair: Pair, left: LeftOut) -> None:
    """Let the target know which runs made and used a version."""
    made = pair.target.qualified_name
    if pair.source.run and isinstance(target, NativeStore):
        _keep_run(target, msgspec.structs.replace(_run(source, pair.source.run), logged=[made]))
    try:
        users = source.used_by(pair.source)
        known = {run.path for run in target.used_by(pair.target)} if users else set()
    except _REFUSED:
        left.name("the runs that used it")
        return
    for run in users:
        if run.path in known and not isinstance(target, NativeStore):
            continue
        used = msgspec.structs.replace(run, used=[made], logged=[])
        try:
            if not _keep_run(target, used):
                left.count(USER)
                continue
            target.mark_used(pair.target, used)
        except _REFUSED:
            left.count(USER)


def _run(source: Store, path: str) -> Run:
    """What the source knows of a run, without what it used and logged there."""
    entity, project, id = path.split("/", 2)
    with contextlib.suppress(NotFoundError, IntegrityError, UsageError):
        return msgspec.structs.replace(source.run(entity, project, id), used=[], logged=[])
    return Run(entity=entity, project=project, id=id, created_at=now(), updated_at=now())


def _keep_run(target: Store, run: Run) -> bool:
    """Make sure that the target has the run; what it says of it already stays. False where it has no means for that."""
    known = None
    with contextlib.suppress(NotFoundError, UsageError):
        known = target.run(run.entity, run.project, run.id)
    if known is not None:
        if not isinstance(target, NativeStore) or (set(known.used) >= set(run.used) and set(known.logged) >= set(run.logged)):
            return True
        run = msgspec.structs.replace(known, used=run.used, logged=run.logged)
    try:
        target.save_run(run)
    except _REFUSED:
        return False
    if isinstance(target, ArtifactServer) and target.semantic:  # Comet takes only such ids as it gives itself
        with contextlib.suppress(NotFoundError):
            target.run(run.entity, run.project, run.id)
            return True
        return False
    target.finish_run(run, 0)
    return True
