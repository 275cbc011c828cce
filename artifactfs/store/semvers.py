"""The semantic versions of a collection, beside its numbers: which there are, which comes next, which version one names.

A version's record holds the one it was given; ``Collection.semver`` is an index of them. That may be behind where a commit died
before it wrote the collection: what it misses is read from the records. From the first version that is given one on, every
version of the collection has one (``publish`` sees to it). A version before that goes by its number: ``v0`` is ``1.0.0``,
``v1`` is ``2.0.0``.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from artifactfs.errors import ConflictError, IntegrityError, NotFoundError
from artifactfs.model import Version
from artifactfs.names import ArtifactName
from artifactfs.semver import SemVer, is_semver

NEXT = "next"
"""What a commit asks for that wants a semantic version, whichever is next."""

_IMPLIED = re.compile(r"([1-9][0-9]*)\.0\.0")

log = logging.getLogger(__name__)


class Records(Protocol):
    """What is needed of a store."""

    def any_version(self, name: ArtifactName, number: int) -> Version:
        """The version of that number, deleted or not."""


@dataclasses.dataclass(frozen=True, slots=True)
class Semvers:
    """``given``: the numbers of versions by the semantic version that each was given. ``numbers``: of all. Deleted ones count."""

    given: Mapping[str, int]
    numbers: Sequence[int]

    def find(self, text: str) -> int | None:
        """The number of the version that ``text`` names, None if there is none."""
        number = self.given.get(text)
        match = _IMPLIED.fullmatch(text) if number is None else None
        if match is None:
            return number
        number = int(match[1]) - 1
        return number if number in self.numbers and number not in self.given.values() else None

    def next(self) -> SemVer:
        """The next major version after all there are; ``1.0.0`` is the first."""
        found = [SemVer.parse(text) for text in self.given if is_semver(text)]
        given = set(self.given.values())
        found += [SemVer(number + 1) for number in self.numbers if number not in given]
        return max(found).next_major() if found else SemVer(1)

    def check_alias(self, alias: str, name: ArtifactName) -> None:
        """ConflictError for an alias that is the semantic version of a version: nobody could tell the two apart."""
        if alias in self.given:
            raise ConflictError(f"{name.path}:{alias} is the semantic version of v{self.given[alias]}; choose another alias")

    def choose(self, wanted: str, name: ArtifactName, aliases: Mapping[str, int]) -> str:
        """What a new version is given: ``wanted``, or with :data:`NEXT` the next one; "" where nothing was wanted and no
        version has any. ConflictError if ``wanted`` is taken, by a deleted version or an alias as well."""
        if not wanted and not self.given:
            return ""
        if wanted in ("", NEXT):
            following = self.next()
            while str(following) in aliases:
                following = following.next_major()
            return str(following)
        taken = self.find(wanted)
        if taken is not None:
            raise ConflictError(f"{name.path}:{wanted} exists already: it is v{taken}; give another version, or none")
        if wanted in aliases:
            raise ConflictError(f"{name.path}:{wanted} is an alias of v{aliases[wanted]}; give another version, or none")
        return wanted


def semvers(store: Records, name: ArtifactName, index: Mapping[str, int], numbers: Sequence[int]) -> Semvers:
    """Those of a collection whose index is ``index`` and whose versions have ``numbers``, ascending."""
    given = dict(index)
    indexed = set(index.values())
    for number in reversed(numbers):
        if number in indexed:
            continue
        try:
            own = store.any_version(name, number).semver
        except (IntegrityError, NotFoundError) as error:
            log.warning("passed over: %s", error)
            continue
        if not own:
            break
        given.setdefault(own, number)
    return Semvers(given, numbers)


def semver_of(version: Version) -> str:
    """The semantic version of ``version``: the one it was given, or the one that its number stands for."""
    return version.semver or str(SemVer(version.number + 1))
