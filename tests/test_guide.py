"""A user's way through artifacts, as W&B's guide and Comet's reference go it: with ``import artifactfs as wandb`` its calls run.

The examples are told in our own words and on files of our own; what is checked is what they say comes of it.
"""

from __future__ import annotations

import datetime
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_server import FaultServer

import artifactfs as wandb
import artifactfs.comet as comet_ml
from artifactfs.artifact import ArtifactTTL

pytestmark = pytest.mark.usefixtures("store")


@pytest.fixture
def project_with_images(desk: Path) -> Path:
    """The folder that the guide's tables of paths are about."""
    for path, text in {
        "project-directory/images/cat.png": "cat",
        "project-directory/images/dog.png": "dog",
        "project-directory/checkpoints/model.h5": "weights",
        "project-directory/model.h5": "top",
    }.items():
        (desk / path).parent.mkdir(parents=True, exist_ok=True)
        (desk / path).write_text(text)
    return desk / "project-directory"


def paths(artifact: wandb.Artifact) -> list[str]:
    return list(artifact.manifest.entries)


# Making one


def test_make_a_data_set_and_log_it(project_with_images: Path) -> None:
    with wandb.init(project="animals", job_type="upload") as run:
        artifact = wandb.Artifact(name="pets", type="dataset", description="two pets", metadata={"source": "attic", "count": 2})
        artifact.add_dir("project-directory/images")
        logged = run.log_artifact(artifact)
        logged.wait()
    assert (logged.name, logged.version, logged.state, logged.aliases) == ("pets:v0", "v0", "COMMITTED", ["latest"])
    found = wandb.Api().artifact("acme/animals/pets:latest")
    assert (found.description, found.metadata) == ("two pets", {"source": "attic", "count": 2})


@pytest.mark.parametrize(
    "call, result",
    [
        (("model.h5", None), "model.h5"),
        (("checkpoints/model.h5", None), "model.h5"),
        (("model.h5", "models/mine.h5"), "models/mine.h5"),
    ],
)
def test_the_table_of_files(project_with_images: Path, call: tuple[str, str | None], result: str) -> None:
    artifact = wandb.Artifact("nets", type="model")
    artifact.add_file(f"project-directory/{call[0]}", name=call[1])
    assert paths(artifact) == [result]


@pytest.mark.parametrize(
    "name, result",
    [(None, ["cat.png", "dog.png"]), ("images", ["images/cat.png", "images/dog.png"]), ("a/b", ["a/b/cat.png", "a/b/dog.png"])],
)
def test_the_table_of_directories(project_with_images: Path, name: str | None, result: list[str]) -> None:
    artifact = wandb.Artifact("pets", type="dataset")
    artifact.add_dir("project-directory/images", name=name)
    assert paths(artifact) == result


def test_write_a_file_into_it(desk: Path) -> None:
    artifact = wandb.Artifact("notes", type="result")
    with artifact.new_file("report.json", mode="w") as file:
        json.dump({"accuracy": 0.9}, file)
    with artifact.new_file("raw.bin", mode="wb") as binary:
        binary.write(b"\x00\x01")
    artifact.save()
    root = Path(artifact.wait().download())
    assert json.loads((root / "report.json").read_text()) == {"accuracy": 0.9} and (root / "raw.bin").read_bytes() == b"\x00\x01"


def test_take_something_out_again(project_with_images: Path) -> None:
    artifact = wandb.Artifact("pets", type="dataset")
    artifact.add_dir("project-directory")
    artifact.remove("images")
    artifact.remove(artifact.manifest.entries["model.h5"])
    assert paths(artifact) == ["checkpoints/model.h5"]
    with pytest.raises(FileNotFoundError):
        artifact.remove("images")


# References


@pytest.mark.parametrize(
    "name, result", [(None, ["cat.png", "dog.png"]), ("mnt/images", ["mnt/images/cat.png", "mnt/images/dog.png"])]
)
def test_refer_to_a_shared_disk(project_with_images: Path, name: str | None, result: list[str]) -> None:
    artifact = wandb.Artifact("pets", type="dataset")
    entries = artifact.add_reference(f"file://{project_with_images}/images", name=name)
    assert paths(artifact) == result == sorted(entry.path for entry in entries)
    with wandb.init() as run:
        run.log_artifact(artifact).wait()
        entry = run.use_artifact("pets:latest").get_entry(result[0])
    assert entry.ref_target() == f"file://{project_with_images}/images/cat.png" and entry.ref == entry.ref_target()


def test_refer_to_the_web(desk: Path) -> None:
    with FaultServer({"/data/file.bin": b"from afar"}) as server:
        url = server.url("/data/file.bin")
        artifact = wandb.Artifact("web", type="dataset")
        artifact.add_reference(url)
        artifact.add_reference(url, name="renamed.bin")
        assert paths(artifact) == ["file.bin", "renamed.bin"]
        artifact.save()
        root = Path(artifact.wait().download())
        assert (root / "renamed.bin").read_bytes() == b"from afar"


def test_refer_to_a_bucket_and_share_an_entry(desk: Path) -> None:
    """An address that is not read, and an entry of another artifact."""
    first = wandb.Artifact("first", type="dataset")
    first.add_reference("s3://bucket/prefix/x.txt", checksum=False)
    with first.new_file("small.txt") as file:
        file.write("small")
    assert (
        paths(first) == ["prefix/x.txt", "small.txt"]
        and first.manifest.entries["prefix/x.txt"].digest == "s3://bucket/prefix/x.txt"
    )
    first.save()
    second = wandb.Artifact("second", type="dataset")
    second.add_reference(first.wait().get_entry("small.txt"), name="mine.txt")
    second.save()
    assert second.wait().get_entry("mine.txt").size == 5


# Using one


@pytest.fixture
def pets(project_with_images: Path) -> wandb.Artifact:
    with wandb.init(job_type="upload") as run:
        artifact = wandb.Artifact("pets", type="dataset")
        artifact.add_dir("project-directory/images")
        return run.log_artifact(artifact, aliases=["production"]).wait()


def test_use_it_in_a_run(pets: wandb.Artifact, desk: Path) -> None:
    with wandb.init(job_type="train") as run:
        artifact = run.use_artifact("pets:production", type="dataset")
        assert artifact.download() == str(desk / "artifacts/pets:v0")
        assert artifact.download(root="elsewhere") == "elsewhere"
        assert artifact.get_entry("cat.png").download(root="one") == "one/cat.png"
        with pytest.raises(KeyError, match="Path not contained in artifact"):
            artifact.get_entry("cow.png")
        with pytest.raises(ValueError):
            run.use_artifact("pets:production", type="model")
    assert sorted(it.name for it in (desk / "elsewhere").iterdir()) == ["cat.png", "dog.png"]
    assert [it.job_type for it in pets.used_by()] == ["train"] and pets.logged_by().job_type == "upload"


def test_use_a_part_of_it(pets: wandb.Artifact, desk: Path) -> None:
    """A prefix is one of the string."""
    artifact = wandb.Artifact("parts", type="dataset")
    for name in ("some-prefix/a", "some-prefix-two", "other"):
        with artifact.new_file(name):
            pass
    artifact.save()
    artifact.wait().download(root="got", path_prefix="some-prefix")
    assert sorted(it.name for it in (desk / "got").iterdir()) == ["some-prefix", "some-prefix-two"]


def test_use_it_outside_of_a_run(pets: wandb.Artifact, desk: Path) -> None:
    api = wandb.Api()
    artifact = api.artifact("acme/vision/pets:v0")
    artifact.download()
    artifact.verify()
    (desk / "artifacts/pets:v0/cat.png").write_text("dog")
    with pytest.raises(ValueError, match=r"cat\.png"):
        artifact.verify()
    (desk / "artifacts/pets").mkdir()
    (desk / "artifacts/pets/stray.txt").touch()
    assert artifact.checkout() == str(desk / "artifacts/pets")
    assert sorted(it.name for it in (desk / "artifacts/pets").iterdir()) == ["cat.png", "dog.png"]
    with pytest.raises(ValueError, match="exactly one"):
        artifact.file()


def test_use_a_draft_without_logging_it_first(project_with_images: Path) -> None:
    ids = set()
    for _ in range(2):
        with wandb.init() as run:
            artifact = wandb.Artifact("pets", type="dataset")
            artifact.add_dir("project-directory/images")
            used = run.use_artifact(artifact)
            ids.add((used.id, used.version))
    assert len(ids) == 1 and used.version == "v0"


# Changing one


def test_update_it_in_a_run_and_outside(pets: wandb.Artifact) -> None:
    with wandb.init() as run:
        artifact = run.use_artifact("pets:production")
        artifact.metadata["quality"] = "good"
        artifact.description = "new words"
        artifact.aliases.append("golden")
        artifact.save()
    artifact = wandb.Api().artifact("vision/pets:golden")
    artifact.metadata = {"whole": True}
    artifact.aliases.remove("production")
    artifact.tags = ["checked"]
    artifact.save()
    artifact = wandb.Api().artifact("pets:golden")
    artifact.aliases = ["replaced"]
    artifact.save()
    found = wandb.Api().artifact("pets:v0")
    assert (found.metadata, found.description, found.tags) == ({"whole": True}, "new words", ["checked"])
    assert set(found.aliases) == {"replaced", "latest"}


def test_give_it_a_time_to_live(pets: wandb.Artifact) -> None:
    pets.ttl = datetime.timedelta(days=30)
    pets.save()
    assert wandb.Api().artifact("pets").ttl == datetime.timedelta(days=30)
    pets.ttl = None
    pets.save()
    assert wandb.Api().artifact("pets").ttl is None
    pets.ttl = ArtifactTTL.INHERIT
    pets.save()
    assert pets.ttl is None


# Versions and aliases


def test_versions_come_of_changes(pets: wandb.Artifact, project_with_images: Path) -> None:
    def log() -> wandb.Artifact:
        with wandb.init() as run:
            artifact = wandb.Artifact("pets", type="dataset")
            artifact.add_dir("project-directory/images")
            return run.log_artifact(artifact, aliases=["newest"]).wait()

    assert log().version == "v0", "nothing has changed"
    (project_with_images / "images/cow.png").write_text("cow")
    assert log().version == "v1"
    api = wandb.Api()
    assert api.artifact("pets:latest").version == "v1" == api.artifact("pets:newest").version
    assert api.artifact("pets:production").version == "v0"
    assert [it.version for it in api.artifacts("dataset", "pets")] == ["v1", "v0"]


def test_a_new_version_from_an_old_one(pets: wandb.Artifact) -> None:
    with wandb.init() as run:
        draft = run.use_artifact("pets:latest").new_draft()
        draft.remove("cat.png")
        with draft.new_file("cow.png") as file:
            file.write("cow")
        made = run.log_artifact(draft).wait()
    assert (made.version, paths(made)) == ("v1", ["cow.png", "dog.png"])
    with wandb.init() as run:
        more = wandb.Artifact("pets", type="dataset", incremental=True)
        with more.new_file("hen.png") as file:
            file.write("hen")
        assert paths(run.log_artifact(more).wait()) == ["cow.png", "dog.png", "hen.png"]


def test_many_runs_make_one_version(desk: Path) -> None:
    for number in range(3):
        with wandb.init(group="spread", job_type="part") as run:
            part = wandb.Artifact("parts", type="dataset")
            with part.new_file(f"part-{number}.txt") as file:
                file.write(str(number))
            run.upsert_artifact(part)
    with wandb.init(group="spread", job_type="finish") as run:
        last = wandb.Artifact("parts", type="dataset")
        with last.new_file("index.txt") as file:
            file.write("0 1 2")
        made = run.finish_artifact(last).wait()
    assert paths(made) == ["index.txt", "part-0.txt", "part-1.txt", "part-2.txt"] and made.version == "v0"


# Linking, deleting


def test_link_it_where_others_look(pets: wandb.Artifact) -> None:
    with wandb.init() as run:
        artifact = run.use_artifact("pets:production")
        run.link_artifact(artifact, "acme/shared/good-pets", aliases=["staging"])
        run.link_artifact(artifact, "wandb-registry-pets/good")
    assert wandb.Api().artifact("acme/shared/good-pets:staging").source_artifact.id == pets.id
    assert wandb.Api().artifact("wandb-registry-pets/good:latest").is_link
    assert [it.project for it in pets.linked_artifacts] == ["shared", "wandb-registry-pets"]


def test_delete_it(pets: wandb.Artifact) -> None:
    artifact = wandb.Api().artifact("pets:v0")
    with pytest.raises(wandb.CommError, match="production"):
        artifact.delete()
    artifact.delete(delete_aliases=True)
    assert artifact.state == "DELETED" and not wandb.Api().artifact_exists("pets:v0")


def test_log_paths_and_addresses(project_with_images: Path) -> None:
    with wandb.init() as run:
        assert paths(run.log_artifact("project-directory/images", name="pets", type="dataset").wait()) == ["cat.png", "dog.png"]
        one = run.log_artifact("project-directory/model.h5").wait()
        assert (one.source_name, one.type) == (f"run-{run.id}-model.h5:v0", "unspecified")
        assert one.file(root="got") == "got/model.h5"
        far = run.log_artifact(f"file://{project_with_images}/model.h5", name="far", type="model").wait()
        assert far.get_entry("model.h5").ref


def test_walk_what_led_to_what(pets: wandb.Artifact) -> None:
    with wandb.init(job_type="train") as run:
        run.use_artifact("pets:latest")
        net = wandb.Artifact("net", type="model")
        with net.new_file("weights") as file:
            file.write("0.1")
        run.log_artifact(net).wait()
    maker = wandb.Api().artifact("net:v0").logged_by()
    assert maker is not None and maker.used == ["acme/vision/pets:v0"] and maker.logged == ["acme/vision/net:v0"]
    assert [run.id for run in wandb.Api().artifact("pets:v0").used_by()] == [maker.id]


# Comet's reference: with ``import artifactfs.comet as comet_ml`` its calls run


@pytest.fixture
def experiment(desk: Path) -> Iterator[comet_ml.Experiment]:
    with comet_ml.Experiment(workspace="acme", project_name="vision") as going:
        yield going


def logical_paths(artifact: comet_ml.Artifact | comet_ml.LoggedArtifact) -> list[str]:
    return sorted(asset.logical_path for asset in artifact.assets)


def test_comet_make_one_and_log_it(experiment: comet_ml.Experiment, project_with_images: Path) -> None:
    artifact = comet_ml.Artifact(
        name="pets",
        artifact_type="dataset",
        version="1.2.0",
        aliases=["raw"],
        metadata={"count": 2},
        version_tags=["2026"],
    )
    assert str(artifact) == "Artifact('pets', artifact_type='dataset')"
    artifact.add("project-directory/model.h5")
    artifact.add("project-directory/images")
    artifact.add("project-directory/images", logical_path="again")
    artifact.add("project-directory/model.h5", logical_path="nets/first.h5", metadata={"epoch": 3})
    with open("project-directory/images/cat.png", "rb") as file:
        artifact.add(file, logical_path="from-a-file-object.png", copy_to_tmp=True)
    with pytest.raises(TypeError):
        artifact.add(io.BytesIO(b"without a path"))
    with pytest.raises(comet_ml.ArtifactConflictingAssetLogicalPath):
        artifact.add("project-directory/checkpoints/model.h5")
    logged = experiment.log_artifact(artifact)
    assert logical_paths(logged) == [
        "again/cat.png",
        "again/dog.png",
        "from-a-file-object.png",
        "images/cat.png",
        "images/dog.png",
        "model.h5",
        "nets/first.h5",
    ]
    assert (str(logged), str(logged.version), logged.workspace) == ("<LoggedArtifact 'acme/pets:1.2.0'>", "1.2.0", "acme")
    assert (logged.artifact_type, logged.metadata, logged.version_tags) == ("dataset", {"count": 2}, {"2026"})
    assert logged.aliases == {"raw", "latest"} and logged.size == 3 + 3 + 3 + 3 + 3 + 3 + 3
    assert logged.get_asset("nets/first.h5").metadata == {"epoch": 3}
    with pytest.raises(comet_ml.ArtifactAssetNotFound):
        logged.get_asset("nets/second.h5")


def test_comet_remote_assets(experiment: comet_ml.Experiment) -> None:
    artifact = comet_ml.Artifact("far", "dataset")
    artifact.add_remote("https://example.com/data/large.bin")
    artifact.add_remote("s3://bucket/dir/file.txt", logical_path="mine.txt", sync_mode=False, metadata={"origin": "bucket"})
    logged = experiment.log_artifact(artifact)
    assert {asset.logical_path: asset.link for asset in logged.remote_assets} == {
        "large.bin": "https://example.com/data/large.bin",
        "mine.txt": "s3://bucket/dir/file.txt",
    }
    assert all(asset.remote for asset in logged.assets) and logged.get_asset("mine.txt").metadata["origin"] == "bucket"


@pytest.fixture
def comet_pets(experiment: comet_ml.Experiment, project_with_images: Path) -> comet_ml.LoggedArtifact:
    artifact = comet_ml.Artifact("pets", "dataset", aliases=["raw"])
    artifact.add("project-directory/images")
    return experiment.log_artifact(artifact)


def test_comet_use_it(experiment: comet_ml.Experiment, comet_pets: comet_ml.LoggedArtifact, desk: Path) -> None:
    for found in (
        experiment.get_artifact("pets"),
        experiment.get_artifact("acme/pets:raw"),
        experiment.get_artifact("pets", workspace="acme", version_or_alias="1.0.0"),
        comet_ml.API().get_artifact("acme", "pets"),
        comet_ml.API().get_artifact(workspace="acme", artifact_name="pets", alias="raw"),
    ):
        assert str(found) == "<LoggedArtifact 'acme/pets:1.0.0'>"
    assert found.get_source_experiment().get_key() == experiment.get_key() == found.source_experiment_key
    local = found.download("here")
    assert local.download_local_path == "here" and logical_paths(local) == ["images/cat.png", "images/dog.png"]
    assert (desk / "here/images/cat.png").read_text() == "cat"
    found.get_asset("images/dog.png").download("there", logical_path="a-dog.png")
    assert (desk / "there/a-dog.png").read_text() == "dog"
    with pytest.raises(comet_ml.ArtifactNotFound):
        experiment.get_artifact("cows")


def test_comet_download_over_other_files(comet_pets: comet_ml.LoggedArtifact, desk: Path) -> None:
    (desk / "here/images").mkdir(parents=True)
    cat = desk / "here/images/cat.png"
    cat.write_text("a lion")
    with pytest.raises(comet_ml.ArtifactDownloadException):
        comet_pets.download("here")
    comet_pets.download("here", overwrite_strategy="PRESERVE")
    assert cat.read_text() == "a lion"
    comet_pets.download("here", overwrite_strategy=True)
    assert cat.read_text() == "cat"


def test_comet_change_it_and_log_it_again(experiment: comet_ml.Experiment, comet_pets: comet_ml.LoggedArtifact) -> None:
    local = comet_pets.download("here")
    local.add(io.BytesIO(b"cow"), "images/cow.png")
    local.version = comet_pets.version.next_minor()
    local.aliases.add("with-cow")
    logged = experiment.log_artifact(local)
    assert str(logged.version) == "1.1.0" and logged.aliases == {"with-cow", "latest"}
    assert logical_paths(logged) == ["images/cat.png", "images/cow.png", "images/dog.png"]
    assert str(experiment.log_artifact(comet_ml.Artifact("pets", "dataset")).version) == "2.0.0"


def test_comet_update_aliases_and_tags(experiment: comet_ml.Experiment, comet_pets: comet_ml.LoggedArtifact) -> None:
    comet_pets.update_aliases(["checked"])
    comet_pets.update_version_tags(["2026"])
    comet_pets.update_artifact_tags(["animals"])
    found = experiment.get_artifact("pets:checked")
    assert (found.aliases, found.version_tags, found.artifact_tags) == ({"checked", "latest"}, {"2026"}, {"animals"})
    with pytest.raises(comet_ml.ArtifactNotFound):
        experiment.get_artifact("pets:raw")
