"""A user's way through artifacts, as W&B's guide goes it, step by step: with ``import artifactfs as wandb`` its calls run.

The examples are told in our own words and on files of our own; what is checked is what the guide says comes of them.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
from http_server import FaultServer

import artifactfs as wandb
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
