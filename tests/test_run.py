"""run.py, api.py and commits.py: logging in the background, lineage, look-ups."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import artifactfs as afs
from artifactfs import commits, session
from artifactfs.artifact import Artifact
from artifactfs.errors import CommError, ConflictError, InvalidNameError, NotFoundError, UsageError, WaitTimeoutError


@pytest.fixture(autouse=True)
def workplace(isolated_home: Path, here: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("ARTIFACTFS_ENTITY", "acme")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    yield tmp_path / "cwd"
    assert session.active_runs == []


def made(text: str, name: str = "bikes", type: str = "dataset") -> Artifact:
    artifact = Artifact(name, type)
    with artifact.new_file("a.txt") as file:
        file.write(text)
    return artifact


# Runs


def test_a_run_has_a_record_from_the_start() -> None:
    with afs.init(project="vision", job_type="train", name="first", config={"lr": 0.1}) as run:
        found = afs.Api().run(run.path)
        assert (found.entity, found.project, found.name, found.job_type) == ("acme", "vision", "first", "train")
        assert found.config == {"lr": 0.1} and run.path == f"acme/vision/{run.id}"
        run.config.epochs = 3
        run.config["lr"] = 0.2
        run.config.update({"tuple": (1, 2)})
        assert run.config.lr == 0.2
        with pytest.raises(AttributeError, match="missing"):
            run.config.missing  # noqa: B018
    assert afs.Api().run(run.path).config == {"lr": 0.2, "epochs": 3, "tuple": [1, 2]}
    assert [found.id for found in afs.Api().runs("acme/vision")] == [run.id]


def test_a_configuration_that_cannot_be_stored(tmp_path: Path) -> None:
    """It is refused in the caller's thread, and no commit fails of it."""
    run = afs.init()
    artifact = run.log_artifact(made("x"))
    run.config.bad = object()
    with pytest.raises(InvalidNameError, match=r"config\.bad"):
        run.log_artifact(made("y"))
    with pytest.raises(InvalidNameError, match=r"config\.bad"):
        run.finish()
    assert artifact.version == "v0" and afs.Api().run(run.id).logged == ["acme/uncategorized/bikes:v0"]


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARTIFACTFS_ENTITY")
    monkeypatch.setenv("LOGNAME", "somebody")
    with afs.init() as run:
        assert (run.entity, run.project, run.job_type) == ("somebody", "uncategorized", "") and run.name == run.id
        assert afs.Api().default_entity == "somebody"


BAD_ARGUMENTS = [{"entity": "a/b"}, {"project": "a:b"}, {"id": "a/b"}, {"id": ""}, {"config": {"x": object()}}]


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS)
def test_bad_arguments(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        afs.init(**arguments)  # type: ignore[arg-type]
    assert afs.run is None


def test_the_current_run() -> None:
    assert afs.run is None
    with afs.init(project="outer") as outer:
        assert afs.run is outer
        inner = afs.init(project="inner")
        assert afs.run is inner
        inner.finish()
        inner.finish()
        assert afs.run is outer
    assert afs.run is None
    for call in (lambda: outer.log_artifact(made("x")), lambda: outer.use_artifact("bikes")):
        with pytest.raises(UsageError, match="is finished"):
            call()


def test_a_run_is_continued_by_its_id() -> None:
    with afs.init(id="one", job_type="train", config={"a": 1, "b": 1}) as run:
        run.log_artifact(made("x"))
    with afs.init(id="one", config={"b": 2}) as again:
        assert again.job_type == "train"
        again.use_artifact("bikes")
    found = afs.Api().run("one")
    assert found.config == {"a": 1, "b": 2}
    assert found.logged == found.used == ["acme/uncategorized/bikes:v0"]


# Logging


def test_versions_come_in_the_order_of_the_calls() -> None:
    with afs.init() as run:
        logged = [
            run.log_artifact(made(str(number), name), aliases=[f"a{number}"]) for number in range(12) for name in ("x", "y")
        ]
    for name in ("x", "y"):
        artifacts = [artifact for artifact in logged if artifact.source_name.startswith(name)]
        assert [artifact.version for artifact in artifacts] == [f"v{number}" for number in range(12)]
        assert afs.Api().artifact(f"{name}:a7").version == "v7"
    assert sorted(afs.Api().run(run.id).logged) == sorted(artifact.source_qualified_name for artifact in logged)


def test_logging_returns_at_once() -> None:
    """The commit waits behind another of its collection; the call does not."""
    gate = threading.Event()
    with afs.init() as run:
        lane = f"{session.current().store.url} {run.entity}/{run.project}/bikes"
        commits.submit(lane, "the gate", gate.wait)
        artifact = run.log_artifact(made("x"))
        assert artifact.is_draft() and artifact.state == "PENDING"
        with pytest.raises(WaitTimeoutError) as caught:
            artifact.wait(timeout=0.01)
        assert isinstance(caught.value, TimeoutError)
        other = run.log_artifact(made("x", name="other")).wait()
        assert other.version == "v0" and artifact.is_draft()
        gate.set()
        assert artifact.wait().version == "v0"


def test_paths_and_uris(workplace: Path) -> None:
    Path("data/sub").mkdir(parents=True)
    Path("data/sub/x.txt").write_text("x")
    with afs.init() as run:
        folder = run.log_artifact("data/").wait()
        assert (folder.source_name, folder.type) == (f"run-{run.id}-data:v0", "unspecified")
        assert list(folder.manifest.entries) == ["sub/x.txt"]
        file = run.log_artifact(Path("data/sub/x.txt"), name="named", type="model").wait()
        assert (file.source_name, file.type, list(file.manifest.entries)) == ("named:v0", "model", ["x.txt"])
        uri = run.log_artifact(Path("data").absolute().as_uri(), name="uri").wait()
        assert list(uri.manifest.entries) == ["sub/x.txt"] and uri.get_entry("sub/x.txt").ref
        with pytest.raises(ValueError, match="must be a file, directory or external reference"):
            run.log_artifact("nowhere")
        with pytest.raises(ValueError, match="only with a path"):
            run.log_artifact(made("x"), name="other")


def test_bad_calls_do_nothing() -> None:
    with afs.init() as run:
        run.log_artifact(made("x")).wait()
        for aliases in (["a/b"], ["v3"], [""], "a:b"):
            with pytest.raises(ValueError, match="alias"):
                run.log_artifact(made("y"), aliases=aliases)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="tag"):
            run.log_artifact(made("y"), tags=["a/b"])
        with pytest.raises(ValueError, match="already exists with type 'dataset'"):
            run.log_artifact(made("y", type="model"))
    assert [artifact.version for artifact in afs.Api().artifacts("dataset", "bikes")] == ["v0"]


def test_aliases_and_tags() -> None:
    with afs.init() as run:
        first = run.log_artifact(made("x"), aliases=["latest", "best", "best"], tags=["t", "t"]).wait()
        assert sorted(first.aliases) == ["best", "latest"] and first.tags == ["t"]
        run.log_artifact(made("y"), aliases=["best"]).wait()
        run.log_artifact(first, aliases=["again"], tags=["u"]).wait()
    seen = afs.Api().artifact("bikes:again")
    assert (seen.version, seen.aliases, seen.tags) == ("v0", ["again"], ["t", "u"])
    assert afs.Api().artifact("bikes:best").version == "v1"


def test_logging_twice_is_once() -> None:
    artifact = made("x")
    with afs.init() as run:
        run.log_artifact(artifact)
        run.log_artifact(artifact, aliases=["more"])
        artifact.wait()
    assert artifact.version == "v0" and afs.Api().artifact("bikes:more").version == "v0"
    assert len(afs.Api().artifacts("dataset", "bikes")) == 1


def failing(tmp_path: Path, name: str) -> Artifact:
    artifact = Artifact(name, "dataset")
    (tmp_path / name).write_text("x")
    artifact.add_file(tmp_path / name, policy="immutable")
    (tmp_path / name).write_text("changed")
    return artifact


def test_finish_tells_what_failed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = afs.init()
    run.log_artifact(failing(tmp_path, "one"))
    run.log_artifact(failing(tmp_path, "two"))
    good = run.log_artifact(made("x"))
    with pytest.raises(ConflictError, match="one has changed") as caught:
        run.finish()
    assert isinstance(caught.value, ValueError) and "two has changed" in str(caught.value.__notes__)
    assert good.version == "v0" and "acme/uncategorized/one was not committed" in caplog.text
    assert afs.run is None


def test_an_error_in_the_block_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught, afs.init() as run:
        run.log_artifact(failing(tmp_path, "one"))
        raise ZeroDivisionError
    assert "finishing the run failed" in caught.value.__notes__[0]


SCRIPT = """
import artifactfs as afs
run = afs.init(project="vision")
art = afs.Artifact("bikes", "dataset")
with art.new_file("big", "wb") as file:
    file.write(bytes(20 << 20))
run.log_artifact(art)
{end}
"""


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "1 / 0"])
def test_a_program_that_ends_waits_for_its_commits(end: str) -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT.format(end=end)], check=False, capture_output=True, text=True)
    assert "not committed" not in result.stderr
    assert result.returncode == {"": 0, "raise SystemExit(3)": 3}.get(end, 1)
    assert afs.Api().artifact("vision/bikes").size == 20 << 20
    assert list((session.current_settings().staging_dir / ".drafts").iterdir()) == []


def test_a_failure_that_nobody_waits_for_is_seen() -> None:
    script = """
import artifactfs as afs
open("x", "w").close()
art = afs.Artifact("bikes", "dataset")
art.add_file("x", policy="immutable")
open("x", "w").write("changed")
afs.init().log_artifact(art)
"""
    result = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert "acme/uncategorized/bikes was not committed: x has changed since it was added" in result.stderr


def test_a_forked_child_can_log() -> None:
    """As a worker process of a data loader would, while the parent has a commit under way."""
    gate = threading.Event()
    commits.submit("gate", "the gate", gate.wait)
    with afs.init() as run:
        parents = run.log_artifact(made("x"))
        pid = os.fork()
        if pid == 0:
            try:
                with afs.init() as child:
                    child.log_artifact(made("y", name="childs")).wait(timeout=30)
                os._exit(0)
            except BaseException:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        gate.set()
        assert parents.wait().version == "v0"
    assert afs.Api().artifact("childs").version == "v0"


def test_a_lane_outlives_failures_and_stops_when_idle() -> None:
    def fail() -> None:
        raise RuntimeError("no")

    first, second = commits.submit("lane", "first", fail), commits.submit("lane", "second", lambda: None)
    assert first.wait(10) and second.wait(10)
    assert isinstance(first.error, RuntimeError) and second.error is None
    third = commits.submit("lane", "third", lambda: None)
    assert third.wait(10)
    for thread in threading.enumerate():
        if thread.name.startswith("afs-commit"):
            thread.join(10)
    assert not commits._lanes


# Using


def test_use_artifact_makes_lineage_once() -> None:
    with afs.init(id="maker") as maker:
        maker.log_artifact(made("x"), aliases=["best"])
    with afs.init(id="user") as user:
        used = user.use_artifact("bikes:best", type="dataset")
        assert user.use_artifact("acme/uncategorized/bikes:v0").id == used.id
        user.use_artifact(used, aliases=["seen"])
        assert (used.name, used.version) == ("bikes:best", "v0")
        with pytest.raises(ValueError, match="has type 'dataset', not 'model'"):
            user.use_artifact("bikes", type="model")
        with pytest.raises(CommError, match="nothing") as caught:
            user.use_artifact("nothing:latest")
        assert isinstance(caught.value, NotFoundError)
        with pytest.raises(InvalidNameError):
            user.use_artifact("a/b/c/d")
    assert [run.id for run in used.used_by()] == ["user"]
    by = used.logged_by()
    assert by is not None and by.id == "maker"
    assert afs.Api().run("user").used == ["acme/uncategorized/bikes:v0"]
    assert "seen" in afs.Api().artifact("bikes").aliases


def test_use_of_a_draft_logs_it() -> None:
    with afs.init() as run:
        first = run.use_artifact(made("x"), aliases=["a"])
        second = run.use_artifact(made("x"))
        assert first.version == second.version == "v0" and first.id == second.id
    assert afs.Api().run(run.id).used == afs.Api().run(run.id).logged == ["acme/uncategorized/bikes:v0"]
    assert afs.Api().artifact("bikes:a").version == "v0"


def test_artifacts_of_another_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with afs.init() as run:
        here = run.log_artifact(made("x")).wait()
    monkeypatch.setenv("ARTIFACTFS_STORE", str(tmp_path / "other"))
    with afs.init() as run:
        with pytest.raises(ValueError, match="not in the run's store"):
            run.use_artifact(here)
        with pytest.raises(ValueError, match="log it there"):
            run.log_artifact(here.new_draft())
        with pytest.raises(ValueError, match="in another store"):
            made("x").add_reference(here.get_entry("a.txt"), name="b")


# Looking up


def test_api() -> None:
    with afs.init(project="vision") as run:
        run.log_artifact(made("1"), tags=["t", "u"]).wait()
        run.log_artifact(made("2"), tags=["u"]).wait()
        run.log_artifact(made("3", name="net", type="model")).wait()
    api = afs.Api({"project": "vision"})
    assert api.artifact("bikes").version == api.artifact("acme/vision/bikes:latest", type="dataset").version == "v1"
    assert [artifact.version for artifact in api.artifacts("dataset", "bikes")] == ["v1", "v0"]
    assert [artifact.version for artifact in api.artifacts("dataset", "bikes", tags=["u", "t"])] == ["v0"]
    assert [kind.name for kind in api.artifact_types()] == [kind.name for kind in afs.Api().artifact_types("acme/vision")]
    assert [kind.name for kind in api.artifact_types("vision")] == ["dataset", "model"]
    assert [found.name for found in api.artifact_type("model").collections()] == ["net"]
    assert api.artifact_type("model").collection("net").type == "model"
    assert [found.name for found in api.artifact_collections("vision", "dataset")] == ["bikes"]
    assert api.artifact_exists("bikes:v1") and api.artifact_exists("bikes", "dataset")
    assert not api.artifact_exists("bikes:v2") and not api.artifact_exists("bikes", "model")
    assert api.artifact_collection_exists("bikes", "dataset") and not api.artifact_collection_exists("bikes", "model")
    assert not api.artifact_collection_exists("cars", "dataset")
    assert api.artifact_types("empty") == []


def test_api_errors_are_comm_errors(tmp_path: Path) -> None:
    with afs.init(project="vision") as run:
        run.log_artifact(made("1"))
    api = afs.Api({"project": "vision"})
    for call in (
        lambda: api.artifact("nothing"),
        lambda: api.artifact("bikes:none"),
        lambda: api.artifact_collection("model", "bikes"),
        lambda: api.artifact_type("model"),
        lambda: api.run("none"),
    ):
        with pytest.raises(CommError) as caught:
            call()
        assert isinstance(caught.value, NotFoundError) and caught.value.exit_code == 3
    with pytest.raises(ValueError, match="has type 'dataset'"):
        api.artifact("bikes", type="model")
    with pytest.raises(CommError, match="parts"):
        api.artifact("a/b/c/d:e")
    with pytest.raises(UsageError, match="base_url"):
        afs.Api({"base_url": "x"})
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange/store.json").write_text('{"format": "artifactfs-store", "version": 99}')
    with pytest.raises(afs.ArtifactFSError, match="upgrade"):
        afs.Api({"store": str(tmp_path / "strange")})


# The package


def test_importing_is_cheap_and_names_are_there() -> None:
    script = """
import sys
import artifactfs as afs
assert [name for name in sys.modules if name.startswith("artifactfs")] == ["artifactfs"]
assert afs.run is None and afs.__version__
missing = [name for name in afs.__all__ if not hasattr(afs, name)]
assert not missing, missing
assert set(dir(afs)) == set(afs.__all__)
import artifactfs.mount, artifactfs.run
from artifactfs.mount import Session
from artifactfs.run import current_run
assert afs.run is None and callable(afs.mount), "submodules of these names hide nothing"
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="nothing"):
        afs.nothing  # noqa: B018
