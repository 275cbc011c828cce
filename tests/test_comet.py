"""``artifactfs.comet``: what Comet's client does with artifacts, on a directory, on a bucket and on a Comet server."""

from __future__ import annotations

import inspect
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from comet_server import CometServer
from mounting import needs_fuse
from programs import Program
from servers import Bucket, GcsBucket
from shelves import write_files

import artifactfs as afs_package
from artifactfs import session
from artifactfs.comet import (
    API,
    APIExperiment,
    Artifact,
    ArtifactAsset,
    ArtifactAssetNotFound,
    ArtifactConflictingAssetLogicalPath,
    ArtifactDownloadException,
    ArtifactNotFound,
    CometException,
    Experiment,
    GetArtifactException,
    LogArtifactException,
    LoggedArtifact,
    LoggedArtifactAsset,
)
from artifactfs.draft import DraftFolder
from artifactfs.errors import ConflictError, InvalidNameError, NotFoundError, SourceChangedError, UsageError
from artifactfs.names import ArtifactName
from artifactfs.publish import Draft, publish
from artifactfs.semver import SemVer

Files = dict[str, bytes]


@pytest.fixture(params=["directory", "bucket", "server"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The URL of a new store, which is that of the settings."""
    url = str(tmp_path / "store")
    if request.param == "bucket":
        url = request.getfixturevalue("shared_bucket").store_url(f"comet-{tmp_path.name}")
    if request.param == "server":
        server = request.getfixturevalue("comet_server")
        monkeypatch.setenv("COMET_API_KEY", server.key)
        url = f"comet://{server.host}"
    monkeypatch.setenv("ARTIFACTFS_STORE", url)
    return url


@pytest.fixture
def store(place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A new store, which is that of the settings; the working directory is empty."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return place


@pytest.fixture
def comet_server() -> Iterator[CometServer]:
    """A stand-in for a Comet server, with the workspaces of these tests."""
    with CometServer(("acme", "other", "zoo")) as server:
        yield server


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As ``store``, but a directory only: what differs in nothing that a store does."""
    monkeypatch.setenv("ARTIFACTFS_STORE", str(tmp_path / "store"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def experiment(**names: str) -> Experiment:
    return Experiment(**{"workspace": "acme", "project_name": "vision", **names})  # type: ignore[arg-type]


def made(files: Files, name: str = "bikes", **options: Any) -> Artifact:
    """An artifact of file objects."""
    artifact = Artifact(name, "dataset", **options)
    for path, data in files.items():
        artifact.add(io.BytesIO(data), path)
    return artifact


def paths(artifact: Artifact | LoggedArtifact) -> list[str]:
    return [asset.logical_path for asset in artifact.assets]


def files_below(root: str | Path) -> Files:
    return {str(path.relative_to(root)): path.read_bytes() for path in Path(root).rglob("*") if path.is_file()}


# Names and signatures


@pytest.mark.parametrize(
    ("member", "signature"),
    [
        (Artifact, "(name, artifact_type=None, version=None, aliases=None, metadata=None, version_tags=None)"),
        (Artifact.add, "(self, local_path_or_data, logical_path=None, overwrite=False, copy_to_tmp=True, metadata=None)"),
        (
            Artifact.add_remote,
            "(self, uri, logical_path=None, overwrite=False, asset_type=None, metadata=None, sync_mode=True, "
            "max_synced_objects=10000)",
        ),
        (Experiment.log_artifact, "(self, artifact)"),
        (Experiment.get_artifact, "(self, artifact_name, workspace=None, version_or_alias=None)"),
        (API.get_artifact, "(self, workspace, artifact_name, version=None, alias=None)"),
        (LoggedArtifact.download, "(self, path=None, overwrite_strategy=False, sync_mode=True)"),
        (LoggedArtifact.get_asset, "(self, asset_logical_path)"),
        (LoggedArtifact.get_source_experiment, "(self, api_key=None, cache=True)"),
        (LoggedArtifact.update_aliases, "(self, new_aliases)"),
        (LoggedArtifact.update_version_tags, "(self, new_version_tags)"),
        (LoggedArtifact.update_artifact_tags, "(self, new_artifact_tags)"),
        (LoggedArtifactAsset.download, "(self, local_path=None, logical_path=None, overwrite_strategy=False)"),
    ],
)
def test_signatures_are_comets(member: Callable[..., Any], signature: str) -> None:
    found = inspect.signature(member)
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in found.parameters.values()]
    shown = str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty))
    assert shown == signature


def test_new_artifact() -> None:
    artifact = Artifact("bikes", version="1.2.0-rc.1", aliases=["a", "a", "Latest"], metadata={"k": (1, 2)}, version_tags=["x y"])
    assert str(artifact) == "Artifact('bikes', artifact_type='data')"
    assert (artifact.name, artifact.artifact_type, str(artifact.version)) == ("bikes", "data", "1.2.0-rc.1")
    assert (artifact.aliases, artifact.metadata, artifact.version_tags) == ({"a"}, {"k": [1, 2]}, {"x y"})
    assert artifact.assets == [] and artifact.download_local_path is None
    artifact.version = artifact.version.next_minor()  # type: ignore[union-attr]
    assert artifact.version == SemVer(1, 2, 0)
    artifact.version = "3.0.0"
    assert artifact.version == SemVer(3)
    artifact.version = None


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "a b"},
        {"name": ".."},
        {"name": "n" * 101},
        {"version": "1.2"},
        {"version": "v1.2.0"},
        {"metadata": ["a"]},
        {"metadata": "{}"},
        {"metadata": {"k": float("inf")}},
        {"aliases": ["v3"]},
        {"aliases": ["a/b"]},
        {"aliases": "best"},
        {"version_tags": [" x"]},
        {"version_tags": "tag"},
        {"artifact_type": "job"},
    ],
)
def test_what_cannot_be_is_refused_at_once(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Artifact(**{"name": "bikes", **arguments})
    Artifact("n" * 100)


# Adding


def test_add_paths(local: Path) -> None:
    write_files(local / "data", {"a.txt": b"A", "sub/b.txt": b"BB", "sub/empty": None, "to-b": "sub/b.txt", "to-sub": "sub"})
    artifact = Artifact("bikes")
    artifact.add("data")
    assert paths(artifact) == ["data/a.txt", "data/sub/b.txt", "data/to-b", "data/to-sub/b.txt"], "links are followed"
    artifact.add(local / "data" / "a.txt")
    artifact.add("data/", logical_path="other/place")
    artifact.add("data/sub", logical_path="")
    artifact.add("data/a.txt", "x//./y.txt", metadata={"split": "train"})
    assert {"a.txt", "other/place/sub/b.txt", "b.txt", "x/y.txt"} <= set(paths(artifact))
    found = next(asset for asset in artifact.assets if asset.logical_path == "x/y.txt")
    assert (found.remote, found.size, found.link, found.asset_type) == (False, 1, None, "asset")
    assert (found.metadata, found.local_path_or_data) == ({"split": "train"}, "data/a.txt")
    assert found.id and sorted(artifact.assets) == artifact.assets


def test_add_is_read_when_logged(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (local / "f").write_bytes(b"old")
    artifact = Artifact("bikes")
    artifact.add("f")
    (local / "f").write_bytes(b"newer")
    (local / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    root = experiment().log_artifact(artifact).download().download_local_path
    assert root is not None and files_below(root) == {"f": b"newer"}
    (local / "f").unlink()
    with pytest.raises(LogArtifactException, match="does not exist"):
        experiment().log_artifact(artifact)


@pytest.mark.parametrize("copy_to_tmp", [True, False])
def test_add_file_objects(local: Path, copy_to_tmp: bool) -> None:
    (local / "f").write_bytes(b"0123456789")
    artifact = Artifact("bikes")
    with open("f", "rb") as file, open("f", encoding="ascii") as text:
        file.seek(2)
        artifact.add(file, "rest", copy_to_tmp=copy_to_tmp)
        artifact.add(text, "text", copy_to_tmp=copy_to_tmp)
        artifact.add(io.StringIO("täxt"), "memory", copy_to_tmp=copy_to_tmp, metadata={"m": 1})
        assert [asset.size for asset in artifact.assets] == ([5, 8, 10] if copy_to_tmp else [0, 0, 0])
        first = experiment().log_artifact(artifact)
    assert [asset.size for asset in artifact.assets] == [5, 8, 10]
    second = experiment().log_artifact(artifact)
    for logged in (first, second):
        assert logged.get_asset("memory").metadata == {"m": 1}
        root = logged.download().download_local_path
        assert root is not None and files_below(root) == {"rest": b"23456789", "text": b"0123456789", "memory": "täxt".encode()}


@pytest.mark.parametrize(
    ("given", "options", "kind"),
    [
        (None, {}, TypeError),
        (io.BytesIO(b"x"), {}, TypeError),
        ("no such file", {}, ValueError),
        ("some text\nof several lines", {}, ValueError),
        (b"bytes", {}, ValueError),
        (17, {}, ValueError),
        ("/dev/null", {}, ValueError),
        ("f", {"logical_path": "../f"}, ValueError),
        ("f", {"logical_path": "/f"}, ValueError),
        ("f", {"logical_path": ".comet/assets.json"}, ValueError),
        ("f", {"metadata": ["x"]}, ValueError),
        ("f", {"metadata": {"x": object()}}, ValueError),
        ("broken", {}, ValueError),
    ],
)
def test_what_cannot_be_added(local: Path, given: Any, options: dict[str, Any], kind: type[Exception]) -> None:
    (local / "f").write_bytes(b"x")
    (local / "broken").symlink_to("nowhere")
    artifact = Artifact("bikes")
    with pytest.raises(kind):
        artifact.add(given, **options)
    assert artifact.assets == []


def test_conflicts(local: Path) -> None:
    write_files(local / "d", {"x": b"1", "y": b"2"})
    artifact = Artifact("bikes")
    artifact.add("d/x", "d/y")
    for add in (
        lambda: artifact.add("d"),
        lambda: artifact.add("d/x", "d/y"),
        lambda: artifact.add(io.BytesIO(b""), "d/y"),
        lambda: artifact.add_remote("s3://b/y", "d/y", sync_mode=False),
        lambda: artifact.add("d/x", "d"),
        lambda: artifact.add("d/x", "d/y/z"),
        lambda: artifact.add("d/x", "d/y/z", overwrite=True),
    ):
        with pytest.raises(ArtifactConflictingAssetLogicalPath, match=r"'d(/y)?'") as caught:
            add()
        assert isinstance(caught.value, (CometException, ConflictError))
        assert paths(artifact) == ["d/y"], "nothing is added"
    artifact.add("d", overwrite=True)
    assert paths(artifact) == ["d/x", "d/y"]
    root = experiment().log_artifact(artifact).download().download_local_path
    assert root is not None and files_below(root) == {"d/x": b"1", "d/y": b"2"}


def test_remote_assets_may_be_anything(local: Path) -> None:
    artifact = Artifact("bikes")
    for uri in ("https://example.com/a/b.bin?x=1", "dataset-v1", "hdfs://host/p/q/", "s3://", "https://example.com", "x://h/.."):
        artifact.add_remote(uri, sync_mode=False, overwrite=True, metadata={"uri": uri})
    assert paths(artifact) == ["b.bin", "dataset-v1", "q", "remote"]
    logged = experiment().log_artifact(artifact)
    assert [asset.link for asset in logged.assets] == [asset.link for asset in artifact.assets]
    assert [asset.metadata for asset in logged.assets] == [{"uri": asset.link} for asset in logged.assets]
    assert logged.assets == logged.remote_assets and logged.size == 0
    assert all(asset.remote and not asset.is_asset_downloadable() and asset.size == 0 for asset in logged.assets)
    for uri in ("", "two\nlines", None):
        with pytest.raises(ValueError):
            artifact.add_remote(uri)  # type: ignore[arg-type]
    with pytest.warns(DeprecationWarning, match="asset_type"):
        artifact.add_remote("m", asset_type="model")


# Logging and versions


def test_round_trip(store: str) -> None:
    first = experiment()
    write_files(Path("data"), {"a.txt": b"alpha", "sub/b.bin": bytes(range(256)) * 5000, "run.sh": b"#!/bin/sh\n"})
    artifact = Artifact("bikes", "dataset", "1.2.0", ["best"], {"rows": 7}, ["raw"])
    artifact.add("data", metadata={"split": "train"})
    artifact.add(io.BytesIO(b"read me"), "README")
    artifact.add_remote("https://example.com/more.bin", metadata={"why": "large"})
    logged = first.log_artifact(artifact)
    assert str(logged) == "<LoggedArtifact 'acme/bikes:1.2.0'>"
    first.end()

    second = experiment()
    found = second.get_artifact("acme/bikes:1.2.0")
    assert repr(found) == repr(logged)
    assert (found.name, found.artifact_type, found.workspace) == ("bikes", "dataset", "acme")
    assert found.version == SemVer(1, 2, 0) and found.qualified_name == "acme/vision/bikes:1.2.0"
    assert found.aliases == {"best", "latest"} and found.version_tags == {"raw"} and found.artifact_tags == frozenset()
    assert found.metadata == {"rows": 7}
    with pytest.raises(TypeError, match="cannot be changed"):
        found.metadata["rows"] = 8
    assert found.size == 5 + 256 * 5000 + 10 + 7
    assert found.source_experiment_key == first.get_key()
    source = found.get_source_experiment()
    assert isinstance(source, APIExperiment)
    assert (source.id, source.workspace, source.project_name) == (first.id, "acme", "vision")
    logged = [] if store.startswith("comet:") else ["acme/vision/bikes:v0"]  # a server does not say it of an experiment
    assert source.get_artifact_lineage("output") == {"output": logged}

    assert paths(found) == ["README", "data/a.txt", "data/run.sh", "data/sub/b.bin", "more.bin"]
    assert [asset.logical_path for asset in found.remote_assets] == ["more.bin"]
    asset = found.get_asset("data/a.txt")
    assert (asset.size, asset.metadata, asset.remote) == (5, {"split": "train"}, False)
    assert asset.source_experiment_key == first.id and asset.artifact_id == "acme/vision/bikes"
    assert found.get_asset("more.bin").metadata == {"why": "large"} and found.get_asset("README").metadata is None
    for missing in ("data", "nothing", "../a", ".comet/assets.json"):
        with pytest.raises(ArtifactAssetNotFound):
            found.get_asset(missing)

    local = found.download("copy")
    assert local.download_local_path == "copy" and str(local) == "Artifact('bikes', artifact_type='dataset')"
    assert (local.version, local.aliases, local.metadata, local.version_tags) == (None, set(), {}, set())
    assert files_below("copy") == {f"data/{path}": data for path, data in files_below("data").items()} | {"README": b"read me"}
    assert os.access("copy/data/run.sh", os.X_OK)

    # Change what was downloaded, and log it as the next version.
    Path("copy/data/a.txt").write_bytes(b"changed")
    local.add(io.BytesIO(b"other"), "README")
    with pytest.raises(ArtifactConflictingAssetLogicalPath):
        local.add(io.BytesIO(b"again"), "README")
    local.version = found.version.next_minor()
    third = second.log_artifact(local)
    assert str(third.version) == "1.3.0" and third.aliases == {"latest"}
    root = third.download().download_local_path
    assert root is not None
    assert files_below(root)["data/a.txt"] == b"changed" and files_below(root)["README"] == b"other"
    assert third.get_asset("data/a.txt").metadata == {"split": "train"}
    assert third.get_asset("more.bin").link == "https://example.com/more.bin"
    assert second.get_artifact("bikes:best").version == SemVer(1, 2, 0)
    second.end()


def test_versions_follow(store: str) -> None:
    going = experiment()
    assert str(going.log_artifact(made({"f": b"1"})).version) == "1.0.0"
    assert str(going.log_artifact(made({"f": b"1"})).version) == "2.0.0", "the same content is another version"
    assert str(going.log_artifact(made({"f": b"2"}, version="1.1.0")).version) == "1.1.0"
    with pytest.raises(LogArtifactException, match=r"1\.1\.0 exists already") as caught:
        going.log_artifact(made({"f": b"3"}, version="1.1.0"))
    assert isinstance(caught.value, ConflictError)
    assert str(going.log_artifact(made({"f": b"3"}, version="5.0.0-rc.1")).version) == "5.0.0-rc.1"
    assert str(going.log_artifact(made({"f": b"3"})).version) == "5.0.0"
    with pytest.raises(LogArtifactException, match="type"):
        going.log_artifact(Artifact("bikes", "model"))
    for asked, expected in {"": "5.0.0", ":latest": "5.0.0", ":Latest": "5.0.0", ":v2": "1.1.0", ":1.1.0": "1.1.0"}.items():
        assert str(going.get_artifact(f"bikes{asked}").version) == expected
    assert str(going.get_artifact("bikes:latest", version_or_alias="2.0.0").version) == "2.0.0", "what is given apart wins"
    for unknown in ("bikes:9.9.9", "bikes:nope", "cars", "nobody/bikes", "bikes:v99"):
        with pytest.raises(ArtifactNotFound) as missing:
            going.get_artifact(unknown)
        assert isinstance(missing.value, (GetArtifactException, NotFoundError))
    with pytest.raises(GetArtifactException):
        going.get_artifact("a/b/c/d")


def test_empty_artifact(local: Path, caplog: pytest.LogCaptureFixture) -> None:
    logged = experiment().log_artifact(Artifact("nothing"))
    assert "no assets" in caplog.text
    assert logged.assets == [] and logged.size == 0 and logged.artifact_type == "data"
    assert logged.download().assets == []


def test_many_log_at_once(store: str) -> None:
    """Whoever logs gets a semantic version of its own, and one wins where all want the same."""

    def log(number: int) -> list[str]:
        going = experiment()
        logged = [str(going.log_artifact(made({"f": b"%d" % number})).version)]
        try:
            logged.append(str(going.log_artifact(made({"f": b"x%d" % number}, version="0.5.0")).version))
        except LogArtifactException:
            logged.append("")
        return logged

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(log, range(6)))
    assert sorted(major for major, _ in found) == sorted(f"{number}.0.0" for number in range(1, 7))
    assert sorted(explicit for _, explicit in found) == [""] * 5 + ["0.5.0"]
    name = session.current().parse("acme/vision/bikes")
    versions = session.current().store.versions(name)
    assert sorted(version.semver for version in versions) == sorted(["0.5.0", *(f"{n}.0.0" for n in range(1, 7))])
    for version in versions:
        assert session.current().store.version(name.at(version.semver)).number == version.number


def test_beside_the_other_api(store: str) -> None:
    """Versions of W&B's kind are Comet's too, and the other way round."""
    with afs_package.init(entity="acme", project="vision") as run:
        artifact = afs_package.Artifact("bikes", "dataset")
        with artifact.new_file("f") as file:
            file.write("one")
        run.log_artifact(artifact).wait()
    going = experiment()
    assert str(going.get_artifact("bikes").version) == "1.0.0"
    assert str(going.log_artifact(made({"f": b"two"})).version) == "2.0.0"
    found = afs_package.Api().artifact("acme/vision/bikes:2.0.0")
    assert found.version == "v1" and found.aliases == ["latest"]
    draft = found.new_draft()
    with draft.new_file("g") as file:
        file.write("three")
    draft.save()
    assert [str(going.get_artifact(f"bikes:v{number}").version) for number in range(3)] == ["1.0.0", "2.0.0", "3.0.0"]
    with pytest.raises(afs_package.ConflictError, match="semantic version"):
        found.aliases = ["3.0.0"]
        found.save()


def test_projects(local: Path) -> None:
    experiment().log_artifact(made({"f": b"vision"}))
    elsewhere = experiment(project_name="other")
    assert elsewhere.get_artifact("acme/bikes").project_name == "vision", "the only one of the workspace"
    elsewhere.log_artifact(made({"f": b"other"}))
    assert elsewhere.get_artifact("bikes").project_name == "other", "its own first"
    third = experiment(project_name="third")
    with pytest.raises(GetArtifactException, match=r"other, vision; write acme/other/bikes"):
        third.get_artifact("bikes")
    assert third.get_artifact("acme/vision/bikes:1.0.0").project_name == "vision"
    assert experiment(workspace="else").get_artifact("acme/other/bikes", "acme").project_name == "other"
    assert API().get_artifact("acme", "vision/bikes", version="1.0.0").project_name == "vision"
    with pytest.raises(ValueError, match="not both"):
        API().get_artifact("acme", "vision/bikes", version="1.0.0", alias="latest")


def test_lineage(local: Path) -> None:
    first = experiment(experiment_key="k1")
    first.log_artifact(made({"f": b"1"}))
    second = experiment(experiment_key="k2")
    assert second.get_artifact("bikes").get_source_experiment().get_key() == "k1"
    second.log_artifact(made({"f": b"1"}, name="cars"))
    second.end()
    second.end()
    with pytest.raises(ValueError, match="has ended"):
        second.log_artifact(made({}))
    with pytest.raises(ValueError, match="has ended"):
        second.get_artifact("bikes")
    again = experiment(experiment_key="k2")
    again.log_artifact(made({"f": b"2"}, name="cars"))
    lineage = again.get_artifact("cars").get_source_experiment().get_artifact_lineage()
    assert lineage == {
        "input": ["acme/vision/bikes:v0", "acme/vision/cars:v1"],
        "output": ["acme/vision/cars:v0", "acme/vision/cars:v1"],
    }
    store = session.current().store
    assert [run.id for run in store.used_by(store.version(session.current().parse("acme/vision/bikes:v0")))] == ["k2"]
    with pytest.raises(ValueError, match="up"):
        again.get_artifact("cars").get_source_experiment(cache=False).get_artifact_lineage("up")
    version = publish(
        store, Draft(name=ArtifactName("acme", "vision", "alone"), type="dataset", folder=DraftFolder(), commit="c")
    ).version
    assert version.run == ""
    with pytest.raises(GetArtifactException, match="not logged by an experiment"):
        API().get_artifact("acme", "vision/alone").get_source_experiment()


def test_experiment_takes_comets_options(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMET_WORKSPACE", "team")
    monkeypatch.setenv("COMET_PROJECT_NAME", "work")
    going = Experiment("an-api-key", log_code=False, auto_metric_logging=False)
    assert (going.workspace, going.project_name, len(going.get_key())) == ("team", "work", 32)
    with pytest.raises(ValueError, match="disabled"):
        Experiment(disabled=True)
    with Experiment() as within:
        assert not within.ended
    assert within.ended
    with pytest.raises(InvalidNameError):
        Experiment(experiment_key="a/b")
    with pytest.raises(ValueError, match=r"takes an artifactfs\.comet\.Artifact"):
        going.log_artifact("f")  # type: ignore[arg-type]


# Updating


def test_updates_replace(store: str) -> None:
    going = experiment()
    old = going.log_artifact(made({"f": b"1"}, aliases=["best", "prod"], version_tags=["raw"]))
    new = going.log_artifact(made({"f": b"2"}))
    old.update_aliases(["prod", "first", "Latest"])
    old.update_version_tags(["clean", "clean"])
    old.update_artifact_tags(["vision"])
    assert (old.aliases, old.version_tags, old.artifact_tags) == ({"prod", "first"}, {"clean"}, {"vision"})
    seen = going.get_artifact("bikes:first")
    assert (seen.aliases, seen.version_tags, seen.artifact_tags) == (old.aliases, old.version_tags, old.artifact_tags)
    new.update_aliases(["prod"])
    assert new.aliases == {"prod", "latest"} and going.get_artifact("bikes:1.0.0").aliases == {"first"}
    new.update_aliases([])
    assert going.get_artifact("bikes").aliases == {"latest"} and going.get_artifact("bikes").artifact_tags == {"vision"}
    with pytest.raises(ConflictError, match="semantic version"):
        new.update_aliases(["1.0.0"])
    with pytest.raises(InvalidNameError):
        new.update_aliases(["v7"])
    if store.startswith("comet:"):
        with pytest.raises(UsageError, match="its own pages can"):
            session.current().store.delete_version(session.current().parse("acme/vision/bikes:1.0.0"), delete_aliases=True)
        return
    session.current().store.delete_version(session.current().parse("acme/vision/bikes:1.0.0"), delete_aliases=True)
    with pytest.raises(NotFoundError):
        old.update_aliases(["x"])
    with pytest.raises(ArtifactNotFound, match="was deleted"):
        going.get_artifact("bikes:1.0.0")


# Downloading


@pytest.mark.parametrize(
    ("strategy", "kept"),
    [
        ("PRESERVE", True),
        ("preserve", True),
        (True, False),
        ("OVERWRITE", False),
        ("Overwrite", False),
        (False, None),
        ("fail", None),
    ],
)
def test_overwrite_strategies(store: str, strategy: bool | str, kept: bool | None, caplog: pytest.LogCaptureFixture) -> None:
    logged = experiment().log_artifact(made({"a": b"mine", "d/b": b"same"}))
    write_files(Path("out"), {"a": b"other", "d/b": b"same", "unrelated": b"x"})
    before = os.stat("out/d/b")
    if kept is None:
        with pytest.raises(ArtifactDownloadException, match="'a' is there already"):
            logged.download("out", strategy)
        with pytest.raises(ArtifactDownloadException, match="is there already"):
            logged.get_asset("a").download("out", overwrite_strategy=strategy)
    elif kept:
        assert logged.download("out", strategy).assets[0].size == 5
        logged.get_asset("a").download("out", overwrite_strategy=strategy)
    else:
        logged.download("out", strategy)
        assert "out/a is replaced" in caplog.text
        Path("out/a").write_bytes(b"another")
        logged.get_asset("a").download("out", overwrite_strategy=strategy)
    assert files_below("out") == {"a": b"mine" if kept is False else b"other", "d/b": b"same", "unrelated": b"x"}
    assert os.stat("out/d/b").st_ino == before.st_ino, "what is right is left alone"
    logged.get_asset("d/b").download("out")


@pytest.mark.parametrize("strategy", ["replace", None, 2, ""])
def test_unknown_strategies(local: Path, strategy: Any) -> None:
    logged = experiment().log_artifact(made({"a": b"mine"}))
    for download in (logged.download, logged.get_asset("a").download):
        with pytest.raises(ValueError, match="overwrite_strategy"):
            download("out", overwrite_strategy=strategy)
    assert not Path("out").exists()


def test_download_of_one_asset(store: str) -> None:
    asset = experiment().log_artifact(made({"d/a.txt": b"mine"})).get_asset("d/a.txt")
    for arguments, where in (
        (("out",), "out/d/a.txt"),
        (("out", "x/y"), "out/x/y"),
        (("deep/er/file", ""), "deep/er/file"),
        (("file", False), "file"),
    ):
        got = asset.download(*arguments)
        assert got == ArtifactAsset(False, "d/a.txt", 4, None, None, "asset", where)
        assert Path(where).read_bytes() == b"mine"
    assert Path(asset.download().local_path_or_data).read_bytes() == b"mine"
    assert Path(asset.download(None, "").local_path_or_data).read_bytes() == b"mine"
    assert sorted(os.listdir(".")) == ["deep", "file", "out"] and os.listdir("deep/er") == ["file"]


def test_damage_is_no_download(local: Path) -> None:
    logged = experiment().log_artifact(made({"a": b"mine"}))
    for pack in Path("../store/packs").rglob("*"):
        if pack.is_file():
            pack.chmod(0o600)
            pack.write_bytes(pack.read_bytes().replace(b"mine", b"evil"))
    with pytest.raises(ArtifactDownloadException):
        logged.download("out")
    assert files_below("out") == {}


def test_metadata_that_cannot_be_read(local: Path) -> None:
    with afs_package.init(entity="acme", project="vision") as run:
        for text in ("no json", '{"version": 2, "assets": {}}'):
            artifact = afs_package.Artifact("bikes", "dataset")
            with artifact.new_file(".comet/assets.json") as file:
                file.write(text)
            with artifact.new_file("f") as file:
                file.write(text)
            run.log_artifact(artifact).wait()
            with pytest.raises(afs_package.IntegrityError, match=r"\.comet/assets\.json"):
                assert experiment().get_artifact("bikes").assets


# Buckets


@pytest.fixture
def objects(bucket: Bucket) -> Bucket:
    for key, data in {"d/a.txt": b"alpha", "d/b/c.txt": b"gamma", "d/empty": b"", "top": b"top"}.items():
        bucket.put(key, data)
    bucket.client.put_object(Bucket=bucket.name, Key="d/folder/")
    return bucket


def test_synced_objects(local: Path, objects: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = Artifact("bikes")
    artifact.add_remote(objects.uri("d"), metadata={"source": "s3"})
    artifact.add_remote(objects.uri("d/"), "named")
    artifact.add_remote(objects.uri("top"))
    assert paths(artifact) == ["a.txt", "b/c.txt", "empty", "named/a.txt", "named/b/c.txt", "named/empty", "top"]
    logged = experiment().log_artifact(artifact)
    asset = logged.get_asset("a.txt")
    etag = objects.client.head_object(Bucket=objects.name, Key="d/a.txt")["ETag"].strip('"')
    assert asset.metadata == {
        "source": "s3",
        "synced": True,
        "checksum": etag,
        "file_size": 5,
        "s3_path": objects.uri("d/a.txt"),
        "s3_platform": "aws",
    }
    assert asset.link == objects.uri("d/a.txt") and asset.size == 5 and asset.is_remote_and_synced()
    assert [asset.metadata for asset in artifact.assets] == [asset.metadata for asset in logged.assets]
    assert logged.remote_assets == logged.assets and logged.size == 23
    assert logged.download("none", sync_mode=False).assets[0].local_path_or_data is None and files_below("none") == {}
    got = logged.download("out")
    assert files_below("out")["named/b/c.txt"] == b"gamma" and len(files_below("out")) == 7
    assert got.assets[0].remote and got.assets[0].local_path_or_data == "out/a.txt"
    logged.download("out")  # what is there is compared
    Path("out/a.txt").write_bytes(b"other")
    with pytest.raises(ArtifactDownloadException, match=r"'a\.txt' is there already"):
        logged.download("out")
    again = experiment().log_artifact(got)
    assert [asset.metadata for asset in again.assets] == [asset.metadata for asset in logged.assets]
    assert again.get_asset("top").download("one").local_path_or_data == "one/top"
    objects.put("d/a.txt", b"omega")
    again.download("cached")
    assert files_below("cached")["a.txt"] == b"alpha"
    monkeypatch.setenv("ARTIFACTFS_CACHE_DIR", str(local.parent / "other-cache"))
    with pytest.raises(ArtifactDownloadException) as caught:
        experiment().get_artifact("bikes").download("later")
    assert isinstance(caught.value, SourceChangedError)


def test_synced_versions(local: Path, versioned_bucket: Bucket) -> None:
    first = versioned_bucket.put("d/a", b"first")["VersionId"]
    artifact = Artifact("bikes")
    artifact.add_remote(versioned_bucket.uri("d/a"))
    logged = experiment().log_artifact(artifact)
    versioned_bucket.put("d/a", b"second")
    assert (logged.get_asset("a").metadata or {})["version_id"] == first
    logged.download("out")
    assert files_below("out") == {"a": b"first"}


def test_more_than_a_page_of_objects(local: Path, bucket: Bucket) -> None:
    """Comet's client stops at a thousand, one listing's answer; its documentation does not."""
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: bucket.put(f"d/{number:04}", b"x"), range(1010)))
    artifact = Artifact("bikes")
    artifact.add_remote(bucket.uri("d/"))
    assert len(artifact.assets) == 1010 and all((asset.metadata or {})["synced"] for asset in artifact.assets)


def test_too_many_objects_are_one_asset(local: Path, objects: Bucket, caplog: pytest.LogCaptureFixture) -> None:
    artifact = Artifact("bikes")
    artifact.add_remote(objects.uri("d/"), max_synced_objects=2, metadata={"mine": 1})
    assert "could not be synced" in caplog.text
    [asset] = artifact.assets
    assert (asset.logical_path, asset.link, asset.size) == ("d", objects.uri("d/"), 0)
    told = asset.metadata or {}
    assert told["mine"] == 1 and told["synced"] is False and "more than 2 objects" in told["error_message"]
    logged = experiment().log_artifact(artifact)
    assert logged.get_asset("d").metadata == told
    with pytest.raises(ArtifactDownloadException, match=r"more than 2 objects.*sync_mode=False"):
        logged.download("out")
    assert logged.download("out", sync_mode=False).assets[0].link == objects.uri("d/")
    with pytest.raises(ArtifactDownloadException, match="only a link"):
        logged.get_asset("d").download("out")
    other = Artifact("bikes")
    other.add_remote(objects.uri("d/"), max_synced_objects=3)
    assert len(other.assets) == 3
    other.add_remote(objects.uri("no/such"))
    assert (other.assets[-1].metadata or {})["synced"] is False
    with pytest.raises(ValueError, match="at least 1"):
        other.add_remote(objects.uri("d/"), "x", max_synced_objects=0)
    with pytest.raises(ArtifactConflictingAssetLogicalPath):
        other.add_remote(objects.uri("d/"))
    assert len(other.assets) == 4


def test_google_cloud_storage(local: Path, gcs_bucket: GcsBucket) -> None:
    first = gcs_bucket.put("d/a.txt", b"alpha")
    gcs_bucket.put("d/b.txt", b"beta")
    artifact = Artifact("bikes")
    artifact.add_remote(gcs_bucket.uri("d"), "at")
    artifact.add_remote(gcs_bucket.uri("d/a.txt"))
    logged = experiment().log_artifact(artifact)
    told = logged.get_asset("at/a.txt").metadata or {}
    assert (told["synced"], told["file_size"], told["gs_path"]) == (True, 5, gcs_bucket.uri("d/a.txt"))
    assert "s3_platform" not in told
    assert (logged.get_asset("a.txt").metadata or {})["version_id"] == int(first["generation"])
    logged.download("out")
    assert files_below("out") == {"a.txt": b"alpha", "at/a.txt": b"alpha", "at/b.txt": b"beta"}


def test_store_that_cannot_be_written(local: Path) -> None:
    going = experiment()
    (local.parent / "store" / "packs").write_bytes(b"no directory")
    with pytest.raises(LogArtifactException, match="packs"):
        going.log_artifact(made({"f": b"1"}))


# The command line and mounts


def test_command_line(store: str, afs: Program) -> None:
    going = experiment()
    logged = going.log_artifact(made({"a.txt": b"alpha"}, version="1.2.0"))
    going.log_artifact(made({"a.txt": b"beta"}))
    assert afs("info", logged.qualified_name, "--json").document["semver"] == "1.2.0"
    assert afs("info", "acme/vision/bikes:2.0.0", "--json").document["version"] == "v1"
    assert afs("ls", logged.qualified_name).out.count("a.txt") == 1
    afs("get", "acme/vision/bikes:1.2.0", "got")
    assert Path("got/a.txt").read_bytes() == b"alpha"
    assert afs("info", "acme/vision/bikes:1.2.1", code=3).err.count("1.2.1") == 1
    afs("alias", "acme/vision/bikes:v1", "add", "1.2.0", code=4)
    [row] = afs("diff", "acme/vision/bikes:1.2.0", "acme/vision/bikes:2.0.0", "--json").document
    assert row["path"] == "a.txt"
    assert json.loads(afs("log", "acme/vision/bikes", "got/a.txt", "--json").out)["semver"] == "3.0.0"
    if store.startswith("comet:"):
        assert "its own pages can" in afs("delete", "acme/vision/bikes:1.2.0", code=2).err
        assert "artifact server" in afs("fsck", code=2).err
        return
    afs("delete", "acme/vision/bikes:1.2.0")
    assert "was deleted" in afs("info", "acme/vision/bikes:1.2.0", code=3).err
    assert afs("fsck").code == 0


@needs_fuse
@pytest.mark.fuse
def test_mount_by_semantic_version(store: str, tmp_path: Path, afs: Program) -> None:
    going = experiment()
    going.log_artifact(made({"a.txt": b"alpha"}, version="1.2.0"))
    going.log_artifact(made({"a.txt": b"beta"}, version="1.3.0"))
    for name in ("one", "all"):
        (tmp_path / name).mkdir()
    afs("mount", "acme/vision/bikes:1.2.0", tmp_path / "one")
    try:
        assert (tmp_path / "one" / "a.txt").read_bytes() == b"alpha"
    finally:
        afs("unmount", tmp_path / "one")
    afs("mount", "acme/vision/bikes", tmp_path / "all")
    try:
        assert sorted(os.listdir(tmp_path / "all")) == ["1.2.0", "1.3.0", "latest", "v0", "v1"]
        assert os.readlink(tmp_path / "all" / "1.3.0") == "v1"
        assert (tmp_path / "all" / "1.2.0" / "a.txt").read_bytes() == b"alpha"
        assert not (tmp_path / "all" / "1.4.0").exists()
    finally:
        afs("unmount", tmp_path / "all")
    afs("mount", "acme/vision/bikes:1.2.0..1.3.0", tmp_path / "one")
    try:
        assert os.listdir(tmp_path / "one" / "modified") == ["a.txt"]
    finally:
        afs("unmount", tmp_path / "one")


def test_importing_costs_no_client_library(local: Path) -> None:
    code = "import sys, artifactfs.comet; print(sorted({'boto3', 'requests', 'obstore', 'comet_ml'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
