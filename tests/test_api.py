"""api.py, paging.py and filtering.py: listings, in pages, ordered and filtered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import artifactfs as afs
from artifactfs.artifact import Artifact
from artifactfs.errors import CommError, NotFoundError, UsageError
from artifactfs.filtering import compile_filter
from artifactfs.paging import Pages
from artifactfs.store.native import NativeStore

pytestmark = pytest.mark.usefixtures("desk")


def test_pages_are_read_as_they_are_asked_for() -> None:
    read: list[int] = []

    def source() -> Iterator[int]:
        for number in range(7):
            read.append(number)
            yield number

    pages = Pages(source, per_page=3)
    assert read == [] and pages.more
    assert next(iter(pages)) == 0 and read == [0, 1, 2]
    assert pages[4] == 4 and len(read) == 6 and pages.per_page == 3
    assert pages.load_page() == [6] and not pages.more and pages.load_page() == []
    assert list(pages) == [*range(7)] == list(pages) and len(pages) == 7 and pages[-1] == 6 and pages[1:3] == [1, 2]
    assert pages == [*range(7)] and pages != [1] and repr(pages) == "[0, 1, 2, 3, 4, 5, 6]"
    assert not Pages(lambda: iter(())) and bool(Pages(lambda: iter((1,))))
    with pytest.raises(IndexError):
        pages[7]
    with pytest.raises(UsageError, match="per_page"):
        Pages(source, per_page=0)


DOCUMENT = {"name": "bikes", "number": 3, "tags": ["a", "b"], "metadata": {"acc": 0.9, "deep": {"x": None}}, "a.b": 1}
FILTERS: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"name": "bikes"}, True),
    ({"name": "cars"}, False),
    ({"name": "bikes", "number": 4}, False),
    ({"tags": "a"}, True),
    ({"tags": {"$in": ["x", "b"]}}, True),
    ({"tags": {"$nin": ["x", "b"]}}, False),
    ({"metadata.acc": {"$gt": 0.5, "$lte": 0.9}}, True),
    ({"metadata.acc": {"$lt": 0.5}}, False),
    ({"metadata.acc": {"$gt": "text"}}, False),
    ({"metadata.none": {"$gt": 0}}, False),
    ({"metadata.none": {"$exists": False}}, True),
    ({"metadata.deep.x": {"$exists": True}}, True),
    ({"a.b": 1}, True),
    ({"metadata.none": {"$ne": 1}}, True),
    ({"name": {"$regex": "^b.k"}}, True),
    ({"number": {"$regex": "3"}}, False),
    ({"name": {"$contains": "ike"}}, True),
    ({"name": {"$not": {"$eq": "bikes"}}}, False),
    ({"$or": [{"name": "cars"}, {"number": 3}]}, True),
    ({"$and": [{"name": "bikes"}, {"number": 4}]}, False),
    ({"$nor": [{"name": "cars"}, {"number": 4}]}, True),
    ({"$not": {"name": "cars"}}, True),
]


@pytest.mark.parametrize("filter, passes", FILTERS, ids=str)
def test_filters(filter: dict[str, Any], passes: bool) -> None:
    assert compile_filter(filter)(DOCUMENT) is passes


@pytest.mark.parametrize(
    "filter",
    [
        {"$x": []},
        {"$or": {}},
        {"$or": []},
        {"name": {"$like": "x"}},
        {"name": {"$in": "x"}},
        {"name": {"$regex": "("}},
        {"$and": [1]},
        [1],
    ],
    ids=str,
)
def test_what_is_no_filter(filter: Any) -> None:
    with pytest.raises(UsageError):
        compile_filter(filter)


@pytest.fixture
def shelves(store: NativeStore) -> afs.Api:
    with afs.init(id="one", job_type="train") as run:
        for number in range(5):
            artifact = Artifact("bikes", "dataset", metadata={"accuracy": number / 10})
            with artifact.new_file("a.txt") as file:
                file.write(str(number))
            run.log_artifact(artifact, tags=["even"] if number % 2 == 0 else ["odd", "t"], aliases=[f"n{number}"])
        for name, kind in (("cars", "dataset"), ("net", "model"), ("zoo", "dataset")):
            run.log_artifact(Artifact(name, kind))
    with afs.init(id="two", project="shop") as run:
        run.log_artifact(Artifact("till", "dataset"))
    return afs.Api()


def versions(found: Any) -> list[str]:
    return [artifact.version for artifact in found]


def test_artifacts(shelves: afs.Api) -> None:
    assert versions(shelves.artifacts("dataset", "bikes")) == ["v4", "v3", "v2", "v1", "v0"]
    assert versions(shelves.artifacts("dataset", "bikes", order="+createdAt")) == ["v0", "v1", "v2", "v3", "v4"]
    assert versions(shelves.artifacts("dataset", "bikes", tags=["odd", "t"])) == ["v3", "v1"]
    assert versions(shelves.artifacts("dataset", "bikes", tags="even", per_page=1)) == ["v4", "v2", "v0"]
    assert versions(shelves.artifacts("dataset", "bikes", start="v3")) == ["v2", "v1", "v0"]
    assert versions(shelves.artifacts("dataset", "bikes", start="v3", order="versionIndex")) == ["v4"]
    assert versions(shelves.artifacts("dataset", "bikes", filters={"metadata.accuracy": {"$gte": 0.3}})) == ["v4", "v3"]
    assert versions(shelves.artifacts("dataset", "bikes", filters={"aliases": "n2"})) == ["v2"]
    edited = shelves.artifact("bikes:v1")
    edited.description = "text"
    edited.save()
    assert versions(shelves.artifacts("dataset", "bikes", order="-updatedAt"))[0] == "v1"
    assert versions(shelves.artifacts("dataset", "bikes", order="updatedAt", start="v4")) == ["v1"]
    assert versions(shelves.artifact_versions("dataset", "bikes")) == ["v4", "v3", "v2", "v1", "v0"]
    with pytest.raises(CommError, match="has type 'dataset'"):
        shelves.artifacts("model", "bikes")
    for order in ("size", "--createdAt", ""):
        if order:
            with pytest.raises(UsageError, match="order"):
                shelves.artifacts("dataset", "bikes", order=order)
    with pytest.raises(UsageError, match="start"):
        shelves.artifacts("dataset", "bikes", start="best")


def test_a_listing_reads_no_further_than_its_page(shelves: afs.Api, store: NativeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = store.any_version
    monkeypatch.setattr(store, "any_version", lambda name, number: (read.append(number), real(name, number))[1])
    found = iter(shelves.artifacts("dataset", "bikes", per_page=2))
    assert next(found).version == "v4" and read == [4, 3]
    assert versions(found) == ["v3", "v2", "v1", "v0"]


def test_collections_and_types(shelves: afs.Api) -> None:
    def names(found: Any) -> list[str]:
        return [it.name for it in found]

    assert names(shelves.artifact_types("vision")) == ["dataset", "model"]
    assert names(shelves.artifact_collections("vision", "dataset")) == ["bikes", "cars", "zoo"]
    assert names(shelves.artifact_collections("acme/vision", "dataset", per_page=1, order="-name")) == ["zoo", "cars", "bikes"]
    assert names(shelves.artifact_collections("vision", "dataset", filters={"name": {"$in": ["cars", "net"]}})) == ["cars"]
    kind = shelves.artifact_type("model", "vision")
    assert names(kind.collections()) == ["net"] and kind.collection("net").type == "model"
    assert [project.path for project in shelves.projects()] == ["acme/shop", "acme/vision"]
    assert list(shelves.projects("nobody")) == [] and list(shelves.artifact_collections("none", "dataset")) == []
    for call in (lambda: kind.collection("bikes"), lambda: shelves.artifact_type("none"), lambda: shelves.run("none")):
        with pytest.raises(CommError) as caught:
            call()
        assert isinstance(caught.value, NotFoundError)
    assert shelves.artifact_exists("bikes:n1") and not shelves.artifact_exists("bikes:none")
    assert shelves.artifact_exists("bikes", type="dataset") and not shelves.artifact_exists("bikes", type="model")
    with pytest.raises(ValueError, match="has type 'dataset', not 'model'"):
        shelves.artifact("bikes", type="model")
    with pytest.raises(ValueError, match="4 parts"):
        shelves.artifact("a/b/c/d")


def test_runs(shelves: afs.Api) -> None:
    assert [run.id for run in shelves.runs("vision")] == ["one"] == [run.id for run in shelves.runs("acme/vision", per_page=1)]
    assert [run.id for run in shelves.runs("vision", filters={"jobType": "eval"})] == []
    assert [run.id for run in shelves.runs("vision", filters={"job_type": "train"}, order="-created_at")] == ["one"]
    with pytest.raises(UsageError, match="order"):
        shelves.runs("vision", order="size")


def test_files_from_a_path_on(shelves: afs.Api) -> None:
    artifact = Artifact("many", "dataset")
    for name in "abc":
        with artifact.new_file(name):
            pass
    artifact.save()
    logged = artifact.wait()
    assert [file.name for file in logged.files(start="a")] == ["b", "c"] and len(logged.files(start="a")) == 2
    assert [file.name for file in logged.files(names=["c", "a"], start="a")] == ["c"] and logged.files(start="c")[0:] == []
