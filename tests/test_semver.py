"""Semantic versions: what is one, their order, what follows, and how a collection gives them out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifactfs import copying
from artifactfs.errors import ConflictError, InvalidNameError, NotFoundError
from artifactfs.model import Dir, Version
from artifactfs.names import ArtifactName
from artifactfs.publish import Change, Draft, publish
from artifactfs.semver import SemVer, is_semver
from artifactfs.store.native import NativeStore
from artifactfs.store.semvers import NEXT, Semvers, semver_of, semvers
from artifactfs.store.urls import open_store

NAME = ArtifactName("acme", "vision", "bikes")
# The order that semver.org gives as its example, and around it.
ORDERED = (
    *("0.0.0", "0.0.1", "0.2.0", "0.10.0", "1.0.0-0", "1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta"),
    *("1.0.0-beta.2", "1.0.0-beta.11", "1.0.0-rc.1", "1.0.0", "1.0.0+build.5", "1.0.1", "1.2.0", "1.10.0", "2.0.0", "10.0.0"),
)


class _Nothing:
    base: Dir | None = None

    def changes(self) -> Iterator[tuple[str, Change]]:
        return iter(())


_commits = itertools.count()


def commit(store: NativeStore, semver: str = "", aliases: tuple[str, ...] = (), name: ArtifactName = NAME) -> Version:
    draft = Draft(
        name=name, type="data", folder=_Nothing(), commit=f"{next(_commits)}", aliases=aliases, semver=semver, always=True
    )
    return publish(store, draft).version


@pytest.fixture
def store(tmp_path: Path) -> NativeStore:
    return open_store(str(tmp_path / "store"))


@pytest.mark.parametrize("text", [*ORDERED, "1.0.0-x-y.z+001", "1.0.0--", "1.2.3-0a.1"])
def test_text_is_kept(text: str) -> None:
    assert str(SemVer.parse(text)) == text
    assert is_semver(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "1.0",
        "v1.0.0",
        "01.0.0",
        "1.0.0-",
        "1.0.0-01",
        "1.0.0+",
        "1.0.0-a..b",
        "1.0.0\n",
        " 1.0.0",
        "1.0.0-ä",
        "٣.0.0",
        "1." * 70,
    ],
)
def test_what_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidNameError, match="semantic version"):
        SemVer.parse(text)
    assert not is_semver(text)


def test_order() -> None:
    versions = [SemVer.parse(text) for text in ORDERED]
    assert sorted(versions, key=lambda version: version) == sorted(versions) == versions
    assert all(one < other and other > one for one, other in itertools.pairwise(versions))


@pytest.mark.parametrize(
    ("text", "major", "minor", "patch"),
    [
        ("1.4.2", "2.0.0", "1.5.0", "1.4.3"),
        ("1.4.2-rc.1+x", "2.0.0", "1.5.0", "1.4.2"),
        ("1.4.0-rc.1", "2.0.0", "1.4.0", "1.4.0"),
        ("2.0.0-rc.1", "2.0.0", "2.0.0", "2.0.0"),
    ],
)
def test_following(text: str, major: str, minor: str, patch: str) -> None:
    version = SemVer.parse(text)
    assert [str(version.next_major()), str(version.next_minor()), str(version.next_patch())] == [major, minor, patch]


_parts = st.lists(st.from_regex(r"\A(0|[1-9][0-9]{0,3}|[a-z-][0-9a-z-]{0,4})\Z"), max_size=3).map(tuple)
_versions = st.builds(SemVer, st.integers(0, 30), st.integers(0, 3), st.integers(0, 3), _parts, _parts)


@given(_versions, _versions)
def test_order_is_total_and_following_is_greater(one: SemVer, other: SemVer) -> None:
    assert SemVer.parse(str(one)) == one
    assert (one < other) + (one == other) + (one > other) == 1
    release = SemVer(one.major, one.minor, one.patch)
    for following in (one.next_major(), one.next_minor(), one.next_patch()):
        assert following > one or (following == release and not one.prerelease)


def test_numbers_stand_in_for_what_was_not_given(store: NativeStore) -> None:
    assert [commit(store).semver for _ in range(2)] == ["", ""]
    assert [semver_of(version) for version in store.versions(NAME)] == ["1.0.0", "2.0.0"]
    assert store.version(NAME.at("2.0.0")).number == 1
    for text in ("3.0.0", "1.0.1", "0.0.0"):
        with pytest.raises(NotFoundError, match=text):
            store.version(NAME.at(text))
    with pytest.raises(ConflictError, match="v1"):
        commit(store, "2.0.0")
    assert commit(store, NEXT).semver == "3.0.0"
    assert commit(store).semver == "4.0.0", "once there is one, every version has one"


def test_given_ones(store: NativeStore) -> None:
    assert commit(store, NEXT).semver == "1.0.0"
    assert commit(store, "1.4.2").semver == "1.4.2"
    assert commit(store, NEXT).semver == "2.0.0"
    assert commit(store, "1.4.3").semver == "1.4.3"
    assert commit(store, "5.0.0-rc.1").semver == "5.0.0-rc.1"
    assert commit(store, NEXT).semver == "5.0.0"
    assert store.version(NAME.at("1.4.3")).name == "v3"
    assert store.version(NAME.at("latest")).semver == "5.0.0"
    with pytest.raises(ConflictError, match=r"1\.4\.2 exists already: it is v1"):
        commit(store, "1.4.2")
    with pytest.raises(InvalidNameError):
        commit(store, "1.4")
    assert len(store.numbers(NAME)) == 6


def test_deleted_ones_are_not_given_again(store: NativeStore) -> None:
    commit(store, NEXT)
    commit(store, NEXT)
    store.delete_version(NAME.at("2.0.0"))
    with pytest.raises(NotFoundError, match="was deleted"):
        store.version(NAME.at("2.0.0"))
    with pytest.raises(ConflictError):
        commit(store, "2.0.0")
    assert commit(store, NEXT).semver == "3.0.0"


def test_aliases_and_semantic_versions_keep_apart(store: NativeStore) -> None:
    commit(store, NEXT, aliases=("2.0.0", "best"))
    with pytest.raises(ConflictError, match="alias of v0"):
        commit(store, "2.0.0")
    assert commit(store, NEXT).semver == "3.0.0"
    with pytest.raises(ConflictError, match=r"semantic version of v1"):
        store.update_collection(NAME, lambda it: msgspec.structs.replace(it, aliases={**it.aliases, "3.0.0": 0}))
    with pytest.raises(ConflictError, match=r"semantic version of v1"):
        commit(store, aliases=("3.0.0",))
    assert store.numbers(NAME) == [0, 1]
    assert store.version(NAME.at("2.0.0")).number == 0


def test_index_that_is_behind_is_enough(store: NativeStore) -> None:
    """As a death between a version and its collection leaves it."""
    commit(store, "1.0.0")
    commit(store, "1.1.0")
    commit(store, "1.2.0")
    store.update_collection(NAME, lambda it: msgspec.structs.replace(it, semver={"1.0.0": 0}))
    assert store.version(NAME.at("1.1.0")).number == 1
    with pytest.raises(ConflictError):
        commit(store, "1.2.0")
    assert commit(store, NEXT).semver == "2.0.0"
    assert store.collection(NAME).semver == {"1.0.0": 0, "2.0.0": 3}
    assert store.version(NAME.at("1.2.0")).number == 2


def test_repeated_commit_finds_its_own(store: NativeStore) -> None:
    draft = Draft(name=NAME, type="data", folder=_Nothing(), commit="mine", semver="1.2.0", always=True)
    made = publish(store, draft).version
    store.update_collection(NAME, lambda it: msgspec.structs.replace(it, semver={}))
    again = publish(store, dataclasses.replace(draft, retry=True)).version
    assert again == made and store.collection(NAME).semver == {"1.2.0": 0}


def test_index_costs_no_reading_where_it_is_whole() -> None:
    class Refusing:
        def any_version(self, name: ArtifactName, number: int) -> Version:
            raise AssertionError(f"v{number} is read")

    found = semvers(Refusing(), NAME, {"1.0.0": 0, "1.1.0": 1}, [0, 1])
    assert str(found.next()) == "2.0.0"
    assert Semvers({}, []).choose("", NAME, {}) == ""


def test_copies_keep_them(store: NativeStore, tmp_path: Path) -> None:
    commit(store, "0.1.0")
    commit(store, "0.2.0")
    target = open_store(str(tmp_path / "target"))
    copied = copying.copy(store, target, NAME)
    assert [it.version.semver for it in copied] == ["0.1.0", "0.2.0"]
    assert [it.created for it in copying.copy(store, target, NAME)] == [False, False]
    other = open_store(str(tmp_path / "other"))
    commit(other, "0.2.0")
    assert copying.copy(store, other, NAME.at("0.2.0"))[0].version.semver == "1.0.0"
