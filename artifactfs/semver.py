"""Semantic versions as semver.org 2.0.0 defines them: ``1.2.0``, ``2.0.0-rc.1+linux``. Comet names an artifact's versions so."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

from artifactfs.errors import InvalidNameError

_MAX_TEXT = 128  # as long as an alias may be: both stand behind the colon of a name
_NUMBER = r"(?:0|[1-9][0-9]*)"
_WORD = rf"(?:{_NUMBER}|[0-9]*[A-Za-z-][0-9A-Za-z-]*)"
_SEMVER = re.compile(
    rf"({_NUMBER})\.({_NUMBER})\.({_NUMBER})"
    rf"(?:-({_WORD}(?:\.{_WORD})*))?"
    r"(?:\+([0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*))?"
)


@functools.total_ordering
@dataclasses.dataclass(frozen=True, slots=True, eq=True)
class SemVer:
    """One semantic version. ``str()`` gives its text back. Ordered by precedence, and where that is the same by build."""

    major: int
    minor: int = 0
    patch: int = 0
    prerelease: tuple[str, ...] = ()
    build: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> SemVer:
        """InvalidNameError (a ValueError) unless ``text`` is exactly one: no ``v`` before it, no part left out."""
        match = _SEMVER.fullmatch(text) if len(text) <= _MAX_TEXT else None
        if match is None:
            raise InvalidNameError(f"version {text[:40]!r} is no semantic version; write major.minor.patch, as in 1.2.0")
        major, minor, patch, prerelease, build = match.groups()
        return cls(int(major), int(minor), int(patch), _words(prerelease), _words(build))

    def __str__(self) -> str:
        prerelease = f"-{'.'.join(self.prerelease)}" if self.prerelease else ""
        build = f"+{'.'.join(self.build)}" if self.build else ""
        return f"{self.major}.{self.minor}.{self.patch}{prerelease}{build}"

    def __lt__(self, other: object) -> bool:
        return self._order() < other._order() if isinstance(other, SemVer) else NotImplemented

    def next_major(self) -> SemVer:
        """The release that a breaking change makes: ``2.0.0`` after ``1.4.2``, and after ``2.0.0-rc.1``."""
        return SemVer(self.major if self.prerelease and not (self.minor or self.patch) else self.major + 1)

    def next_minor(self) -> SemVer:
        """``1.5.0`` after ``1.4.2``, and after ``1.5.0-rc.1``."""
        return SemVer(self.major, self.minor if self.prerelease and not self.patch else self.minor + 1)

    def next_patch(self) -> SemVer:
        """``1.4.3`` after ``1.4.2``, and after ``1.4.3-rc.1``."""
        return SemVer(self.major, self.minor, self.patch if self.prerelease else self.patch + 1)

    def _order(self) -> tuple[Any, ...]:
        # A pre-release comes before its release; numbers come before words; a longer list after its beginning.
        words = tuple((0, int(word), "") if word.isdecimal() else (1, 0, word) for word in self.prerelease)
        return (self.major, self.minor, self.patch, not self.prerelease, words, self.build)


def is_semver(text: str) -> bool:
    """Whether ``text`` is a semantic version."""
    return len(text) <= _MAX_TEXT and _SEMVER.fullmatch(text) is not None


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(text.split(".")) if text else ()
