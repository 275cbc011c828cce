"""Manifests and digests are those of the real ``wandb`` SDK, offline: Hypothesis makes the trees, both build them.

The SDK is a development dependency (group ``parity`` of pyproject.toml); without it these tests are skipped.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import artifactfs as afs

os.environ.setdefault("WANDB_MODE", "offline")  # before the SDK reads it: nothing may be sent
wandb = pytest.importorskip("wandb", reason="wandb (group parity of pyproject.toml) is not installed")


pytestmark = pytest.mark.usefixtures("desk")

ALGORITHMS = ("MD5", "XXH128")
_numbers = itertools.count()


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for which in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DIR"):
        monkeypatch.setenv(which, str(tmp_path / "wandb"))
    (tmp_path / "wandb").mkdir(exist_ok=True)


names = st.one_of(
    st.sampled_from(
        ["a", "a-b", "a.b", "A", "é", "e\u0301", "\U0001f600", "\uffff", "a b", " ", "z\n", "b\\c", "-", "%41", "#", "ab:c", "~"]
    ),
    st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=8).filter(
        # a:b and \\b are refused by W&B, which takes them for a drive's, and are names like others here (docs/differences.md)
        lambda name: name not in (".", "..") and name[1:2] != ":" and name[0] != "\\" and len(name.encode()) < 100
    ),
)
contents = st.one_of(st.binary(max_size=64), st.sampled_from([b"", b"x" * 70_000]))


def is_tree(files: dict[str, bytes]) -> bool:
    return not any(other.startswith(f"{path}/") for path in files for other in files)


trees = st.dictionaries(st.lists(names, min_size=1, max_size=3).map("/".join), contents, max_size=8).filter(is_tree)


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Any]:
    """Makes a folder of files; the one before it goes."""
    made: list[Path] = []

    def make(files: dict[str, bytes]) -> Path:
        for old in made:
            shutil.rmtree(old)
        made.clear()
        root = tmp_path / f"tree-{next(_numbers)}"
        root.mkdir()
        for path, content in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)
        made.append(root)
        return root

    yield make


def both(algorithm: str, name: str = "n") -> tuple[Any, afs.Artifact]:
    return wandb.Artifact(name, "t", digest_algorithm=algorithm), afs.Artifact(name, "t", digest_algorithm=algorithm)


def check(theirs: Any, ours: afs.Artifact) -> None:
    """One manifest, one digest, one size."""
    assert ours.manifest.to_manifest_json() == theirs.manifest.to_manifest_json()
    assert ours.digest == theirs.digest and ours.size == theirs.size
    assert list(ours.manifest.entries) == sorted(theirs.manifest.entries)
    for path, entry in theirs.manifest.entries.items():
        mine = ours.manifest.entries[path]
        assert (mine.digest, mine.size, mine.ref, mine.extra) == (entry.digest, entry.size, entry.ref, entry.extra)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=30)
@given(files=trees, name=st.sampled_from(["", "sub", "sub/deep", "./sub//x/"]))
def test_directories(algorithm: str, files: dict[str, bytes], name: str) -> None:
    root = Path(os.environ["WANDB_DATA_DIR"]) / f"tree-{next(_numbers)}"
    root.mkdir()
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    theirs, ours = both(algorithm)
    for artifact in (theirs, ours):
        artifact.add_dir(str(root), name=name or None)
    check(theirs, ours)
    shutil.rmtree(root)


steps = st.lists(
    st.tuples(
        st.sampled_from(["add", "overwrite", "remove", "new", "reference", "tmp"]),
        st.lists(st.sampled_from(["a", "b", "c.txt", "é"]), min_size=1, max_size=2).map("/".join),
        st.sampled_from([b"", b"one", b"two"]),
    ),
    max_size=10,
)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=40)
@given(steps=steps)
def test_files_references_overwrites_and_removals(algorithm: str, steps: list[tuple[str, str, bytes]]) -> None:
    """The same calls have the same outcome, errors included, where no name is a file and a directory (docs/differences.md)."""
    root = Path(os.environ["WANDB_DATA_DIR"])
    local = root / "local.tar.gz"
    theirs, ours = both(algorithm)
    paths: set[str] = set()
    for at, (what, path, content) in enumerate(steps):
        if what != "remove" and any(path.startswith(f"{it}/") or it.startswith(f"{path}/") for it in paths):
            continue
        local.write_bytes(content)
        refused = [_do(artifact, what, path, content, local, at) for artifact in (theirs, ours)]
        if refused[0] == "blocked":
            ours.remove(path)
            continue
        assert refused[0] == refused[1], (what, path)
        paths = set(theirs.manifest.entries)
        check(theirs, ours)


def _do(artifact: Any, what: str, path: str, content: bytes, local: Path, at: int) -> str:
    try:
        if what in ("add", "overwrite"):
            artifact.add_file(str(local), name=path, overwrite=what == "overwrite")
        elif what == "tmp":
            artifact.add_file(str(local), name=path, is_tmp=True)
        elif what == "new":
            with artifact.new_file(path, mode="wb") as file:
                file.write(content)
        elif what == "reference":
            artifact.add_reference(local.as_uri() if at % 2 else f"other://host/{content.decode()}", name=path)
        else:
            artifact.remove(path)
    except IsADirectoryError:  # W&B's directory for new files still has what was removed from the artifact
        return "blocked"
    except (ValueError, FileNotFoundError) as error:
        return "missing" if isinstance(error, FileNotFoundError) else "refused"
    return ""


def test_a_new_file_is_new() -> None:
    for artifact in both("MD5"):
        with artifact.new_file("a") as file:
            file.write("x")
        with pytest.raises(ValueError, match="already exists"), artifact.new_file("a"):
            pass
        with pytest.raises(RuntimeError), artifact.new_file("b"):
            raise RuntimeError
        with artifact.new_file("a", "w", encoding="utf-16") as file:
            file.write("é")
        assert list(artifact.manifest.entries) == ["a"] and artifact.manifest.entries["a"].size == 4


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_empty_artifact(algorithm: str) -> None:
    check(*both(algorithm))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_references_to_directories(algorithm: str, fresh: Any) -> None:
    root = fresh({"a.txt": b"a", "sub/b": b"b", "sub/empty": b""})
    for name in (None, "there", "there/deep"):
        for checksum in (True, False):
            theirs, ours = both(algorithm)
            for artifact in (theirs, ours):
                artifact.add_reference(root.as_uri(), name=name, checksum=checksum)
                artifact.add_reference((root / "a.txt").as_uri(), name="one", checksum=checksum)
            check(theirs, ours)


PATHS = ["a", "./a", "a//b", "a/./b", "a/", "a/b/", "", ".", "..", "../a", "a/../b", "/a", "C:\\x", "C:/x", "a\\b", " ", "a\n"]


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_paths(path: str, tmp_path: Path) -> None:
    """What the SDK refuses is refused; what it accepts has the same path."""
    (tmp_path / "local").write_bytes(b"x")
    results = []
    for artifact in both("MD5"):
        try:
            results.append(artifact.add_file(str(tmp_path / "local"), name=path).path)
        except ValueError:
            results.append("refused")
    assert str(results[0]) == str(results[1])


NAMES = ["n", "N_-.1", "a b", "a/b", "", "é", "x" * 128, "x" * 129, "a:b", "a\nb"]
TYPES = ["t", "wandb-x", "job", "code", "run_table", "data set"]


@pytest.mark.parametrize("name", NAMES, ids=repr)
@pytest.mark.parametrize("kind", TYPES)
def test_names_and_types(name: str, kind: str) -> None:
    refused = []
    for maker in (wandb.Artifact, afs.Artifact):
        try:
            maker(name, kind)
            refused.append(False)
        except ValueError:
            refused.append(True)
    assert refused[0] == refused[1]


METADATA: list[Any] = [
    {},
    {"a": (1, 2), "b": {3}, "c": [None, True]},
    {1: "x", None: 2, False: 3},
    {"a": float("nan")},
    {"a": float("inf")},
    {"s": slice(1, 2, 3)},
    '{"a": [1, {"b": 2}]}',
    [1],
    {f"k{number}": 1 for number in range(100)},
    {f"k{number}": 1 for number in range(101)},
    {"deep": {f"k{number}": 1 for number in range(200)}},
]


@pytest.mark.parametrize("metadata", METADATA, ids=lambda it: repr(it)[:30])
def test_metadata(metadata: Any) -> None:
    results: list[Any] = []
    for maker in (wandb.Artifact, afs.Artifact):
        try:
            results.append(maker("n", "t", metadata=metadata).metadata)
        except (ValueError, TypeError) as error:
            results.append("TypeError" if isinstance(error, TypeError) else "ValueError")
    assert results[0] == results[1]


# Members that only logged artifacts have, of both; see section 7 of what docs/api.md is made from.
NOT_LOGGED = [
    "entity",
    "project",
    "qualified_name",
    "version",
    "collection",
    "source_entity",
    "source_project",
    "source_qualified_name",
    "source_version",
    "source_collection",
    "linked_artifacts",
    "source_artifact",
    "url",
    "aliases",
    "tags",
    "commit_hash",
    "file_count",
    "created_at",
    "updated_at",
    "linked_at",
    "history_step",
    "ttl",
]
CALLS = {
    "new_draft": (),
    "get_entry": ("a",),
    "get_path": ("a",),
    "download": (),
    "checkout": (),
    "verify": (),
    "file": (),
    "files": (),
    "delete": (),
    "unlink": (),
    "used_by": (),
    "logged_by": (),
    "json_encode": (),
    "wait": (),
}


@pytest.mark.parametrize("member", [*NOT_LOGGED, *CALLS])
def test_what_a_draft_does_not_have(member: str) -> None:
    for artifact in both("MD5"):
        with pytest.raises(AttributeError) as caught:
            found = getattr(artifact, member)
            if member in CALLS:
                found(*CALLS[member])
        assert type(caught.value).__name__ == "ArtifactNotLoggedError"


MUTATORS: dict[str, tuple[Any, ...]] = {
    "add_file": ("x",),
    "add_dir": ("x",),
    "add_reference": ("http://127.0.0.1:1/x",),
    "remove": ("x",),
}


@pytest.mark.parametrize("member", [*MUTATORS, "new_file"])
def test_what_a_finalized_draft_refuses(member: str) -> None:
    for artifact in both("MD5"):
        artifact.finalize()
        with pytest.raises(AttributeError) as caught:
            if member == "new_file":
                with artifact.new_file("x"):
                    pass
            else:
                getattr(artifact, member)(*MUTATORS[member])
        assert type(caught.value).__name__ == "ArtifactFinalizedError"


def test_what_a_draft_has(tmp_path: Path) -> None:
    (tmp_path / "local").write_bytes(b"x")
    seen = []
    for artifact in both("MD5"):
        artifact.add_file(str(tmp_path / "local"))
        artifact.description = "text"
        found = [getattr(artifact, it) for it in ("id", "name", "source_name", "type", "description", "state", "is_link")]
        found += [artifact.is_draft(), artifact.get_added_local_path_name(str(tmp_path / "local"))]
        seen.append([*found, artifact.get_added_local_path_name("elsewhere"), artifact.use_as, artifact.incremental])
    assert seen[0] == seen[1]
