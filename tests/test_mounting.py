"""mounting.py: versions and stages for the time of a with block, on real mounts."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import artifactfs as afs
from artifactfs import daemon, session
from artifactfs.artifact import Artifact
from artifactfs.errors import ConflictError, NotFoundError, UsageError

pytestmark = pytest.mark.fuse


@pytest.fixture(autouse=True)
def workplace(isolated_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("ARTIFACTFS_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("ARTIFACTFS_ENTITY", "acme")
    monkeypatch.setenv("ARTIFACTFS_PROJECT", "vision")
    yield tmp_path
    wait_for_daemons()


def log(text: str) -> Artifact:
    with afs.init() as run:
        artifact = Artifact("bikes", "dataset")
        with artifact.new_file("a.txt") as file:
            file.write(text)
        return run.log_artifact(artifact).wait()


def kept_in(error: BaseException) -> Path:
    [note] = error.__notes__
    assert note.startswith("nothing was committed; the changes are kept in ")
    return Path(note.rpartition(" ")[2])


def test_mount(tmp_path: Path) -> None:
    log("one")
    log("two")
    with afs.mount("bikes") as path:
        assert os.path.ismount(path) and (path / "a.txt").read_text() == "two"
        with afs.mount("acme/vision/bikes:v0") as other:
            assert (other / "a.txt").read_text() == "one" and other != path
        with pytest.raises(OSError, match="Read-only"):
            (path / "b.txt").write_text("x")
    assert not path.exists() and not other.exists()
    (tmp_path / "here").mkdir()
    with afs.mount("bikes:v0", tmp_path / "here", path_prefix="") as path:
        assert path == tmp_path / "here" and os.listdir(path) == ["a.txt"]
    assert os.listdir(tmp_path / "here") == []
    with pytest.raises(NotFoundError), afs.mount("nothing"):
        pass
    with pytest.raises(UsageError), afs.mount("a/b/c/d"):
        pass


def test_an_exception_in_a_mount_unmounts() -> None:
    log("one")
    with pytest.raises(ZeroDivisionError), afs.mount("bikes") as path:
        assert path.is_mount()
        raise ZeroDivisionError
    assert not path.exists()


def test_a_file_left_open_in_a_mount() -> None:
    log("one")
    with afs.mount("bikes") as path:
        file = (path / "a.txt").open()
    assert not os.path.ismount(path) and file.read() == "one"
    file.close()


def wait_for_daemons() -> None:
    """A daemon tells its outcome before it ends; that of a detached mount ends with its last open file."""
    deadline = time.monotonic() + 20
    while any(record.process.lives() for record in daemon.mounts(True)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_stage() -> None:
    with afs.stage("acme/vision/bikes", type="dataset", aliases=["best"], tags=["t"], metadata={"k": 1}, description="d") as s:
        (s.path / "new.csv").write_text("1")
        assert s.version is None
    assert (s.version, s.created) == ("acme/vision/bikes:v0", True) and not s.path.exists()
    artifact = afs.Api().artifact("bikes:best")
    assert (artifact.tags, artifact.metadata, artifact.description) == (["t"], {"k": 1}, "d")
    with afs.stage("bikes") as s:
        assert (s.path / "new.csv").read_text() == "1"
        (s.path / "sub").mkdir()
        (s.path / "sub/more.csv").write_text("2")
    assert s.version == "acme/vision/bikes:v1"
    assert list(afs.Api().artifact("bikes").manifest.entries) == ["new.csv", "sub/more.csv"]
    with afs.stage("bikes") as s:
        pass
    assert (s.version, s.created) == ("acme/vision/bikes:v1", False)
    with afs.stage("bikes", base="v0") as s:
        assert os.listdir(s.path) == ["new.csv"]
    with pytest.raises(ValueError, match="alias"), afs.stage("bikes", aliases=["v3"]):
        pass


def test_an_exception_in_a_stage_keeps_the_changes() -> None:
    log("one")
    with pytest.raises(ZeroDivisionError) as caught, afs.stage("bikes") as s:
        (s.path / "y").write_text("kept")
        raise ZeroDivisionError
    kept = kept_in(caught.value)
    assert kept.is_dir() and kept.parent == session.current_settings().staging_dir
    assert afs.Api().artifact("bikes").version == "v0" and s.version is None and not s.path.exists()
    assert [(record.state, record.staging) for record in daemon.mounts(True)] == [("orphan", str(kept))]


def test_a_file_left_open_in_a_stage_is_a_conflict() -> None:
    log("one")
    with pytest.raises(ConflictError, match="busy") as caught, afs.stage("bikes") as s:
        file = (s.path / "z").open("w")
        file.write("late")
    assert not os.path.ismount(s.path) and kept_in(caught.value).is_dir()
    file.close()
    wait_for_daemons()
    assert afs.Api().artifact("bikes").version == "v0", "and its last close commits nothing either"


def test_a_conflict_of_the_commit_itself() -> None:
    log("one")
    with pytest.raises(ConflictError, match="as expected") as caught, afs.stage("bikes", expect_base=True) as s:
        (s.path / "y").write_text("mine")
        log("two")
    assert "kept in" in str(caught.value) and not getattr(caught.value, "__notes__", [])
