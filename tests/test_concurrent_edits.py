"""Fifty processes edit aliases, tags and metadata of one collection while ten commit to it: no edit is lost, and nobody ever sees
an alias missing, or two versions behind one."""

from __future__ import annotations

import datetime
import multiprocessing
from multiprocessing.synchronize import Barrier, Event
from typing import Any

import pytest

import artifactfs as afs
from artifactfs import maintenance
from artifactfs.artifact import Artifact
from artifactfs.errors import ConflictError
from artifactfs.names import parse
from artifactfs.store.native import NativeStore

NAME = parse("acme/vision/bikes")
EDITORS, COMMITTERS, COMMITS, TARGETS = 50, 10, 2, 4
_FORK = multiprocessing.get_context("fork")


def made(text: str) -> Artifact:
    artifact = Artifact("bikes", "dataset")
    with artifact.new_file("a.txt") as file:
        file.write(text)
    return artifact


def edit(number: int, start: Event) -> None:
    """Alias, tag and metadata of one's own, and an alias that everybody wants; every fifth takes its own alias and tag back."""
    start.wait()
    artifact = afs.Api().artifact(f"bikes:v{number % TARGETS}")
    artifact.aliases += [f"alias-{number}", "wanted"]
    artifact.tags.append(f"tag-{number}")
    artifact.metadata[f"key-{number}"] = number
    artifact.save()
    if number % 5 == 0:
        artifact.aliases.remove(f"alias-{number}")
        artifact.tags.remove(f"tag-{number}")
        artifact.save()
    if number % 5 == 1:
        collection = afs.Api().artifact_collection("dataset", "bikes")
        collection.tags.append(f"of-{number}")
        collection.save()


def commit(number: int, start: Event) -> None:
    start.wait()
    for turn in range(COMMITS):
        artifact = made(f"{number} {turn}")
        with afs.init(id=f"commit-{number}-{turn}") as run:
            run.log_artifact(artifact, aliases=[f"made-{number}-{turn}"])


@pytest.mark.slow
@pytest.mark.timeout(900)  # sixty processes and a server, on what may be two busy cores
def test_no_edit_is_lost_and_no_alias_is_missing(store: NativeStore) -> None:
    for number in range(TARGETS):
        artifact = made(f"first {number}")
        with afs.init() as run:
            run.log_artifact(artifact, aliases=["wanted"])
    start = _FORK.Event()
    work = [(edit, number) for number in range(EDITORS)] + [(commit, number) for number in range(COMMITTERS)]
    processes = [_FORK.Process(target=target, args=(number, start)) for target, number in work]
    for process in processes:
        process.start()
    start.set()
    seen = 0
    latest = -1
    while any(process.is_alive() for process in processes):
        processes[0].join(0.01)  # not to take the processor from them
        collection = store.collection(NAME)
        seen += 1
        assert {"latest", "wanted"} <= set(collection.aliases), "an alias that only moves is never missing"
        assert collection.aliases["latest"] >= latest, "latest only goes forward"
        latest = collection.aliases["latest"]
        assert store.version(NAME.at("wanted")).state == "COMMITTED"
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(processes) and seen > 3
    check(store)


def check(store: NativeStore) -> None:
    versions = {version.number: version for version in store.versions(NAME)}
    assert sorted(versions) == list(range(TARGETS + COMMITTERS * COMMITS))
    aliases = store.collection(NAME).aliases
    for number in range(EDITORS):
        version = versions[number % TARGETS]
        assert (f"tag-{number}" in version.tags) is (number % 5 != 0)
        assert aliases.get(f"alias-{number}") == (version.number if number % 5 else None)
        assert version.metadata[f"key-{number}"] == number
        assert (f"of-{number}" in store.collection(NAME).tags) is (number % 5 == 1)
    for version in versions.values():
        assert len(set(version.tags)) == len(version.tags)
    made_aliases = {name: at for name, at in aliases.items() if name.startswith("made-")}
    assert len(made_aliases) == COMMITTERS * COMMITS == len(set(made_aliases.values()))
    for name, at in made_aliases.items():
        assert versions[at].run == f"acme/vision/commit-{name.removeprefix('made-')}"
    assert aliases["latest"] == max(versions) and aliases["wanted"] in range(TARGETS)
    assert list(maintenance.fsck(store)) == []


def _describe(number: int, together: Barrier, results: Any) -> None:
    artifact = afs.Api().artifact("bikes")
    together.wait()  # all have fetched it
    artifact.description = f"of {number}"
    artifact.metadata["winner"] = number
    try:
        artifact.save()
        results.put(("done", number))
    except ConflictError:
        results.put(("conflict", number))


def test_two_edits_of_one_thing_are_a_conflict(store: NativeStore) -> None:
    """One of them is there, the others are told: none is overwritten without a word."""
    log = made("x")
    log.save()
    log.wait()
    together, results = _FORK.Barrier(6), _FORK.Queue()
    processes = [_FORK.Process(target=_describe, args=(number, together, results)) for number in range(6)]
    for process in processes:
        process.start()
    said = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    (won,) = (number for what, number in said if what == "done")
    version = store.version(NAME)
    assert (version.description, version.metadata) == (f"of {won}", {"winner": won})


@pytest.mark.parametrize("key", ["description", "metadata", "ttl"])
def test_what_is_merged_and_what_is_refused(store: NativeStore, key: str) -> None:
    artifact = made("x")
    artifact.save()
    artifact.wait()
    mine, theirs = (afs.Api().artifact("bikes") for _ in range(2))
    days = datetime.timedelta(days=1), datetime.timedelta(days=2)
    changes: dict[str, Any] = {"description": ("a", "b"), "metadata": ({"k": 1}, {"k": 2}), "ttl": days}
    first, second = changes[key]
    setattr(mine, key, first)
    mine.save()
    setattr(theirs, key, second)
    with pytest.raises(ConflictError, match="changed by somebody else"):
        theirs.save()
    again = afs.Api().artifact("bikes")
    setattr(again, key, second)
    again.save()
    assert getattr(afs.Api().artifact("bikes"), key) == second
