"""Links, portfolios, registries, collections: their numbers, aliases, and what deleting one leaves."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from programs import Program

import artifactfs as afs
from artifactfs.artifact import Artifact
from artifactfs.copying import copy
from artifactfs.errors import CommError, ConflictError, IntegrityError, NotFoundError, UsageError
from artifactfs.folders import MadeFolder
from artifactfs.maintenance import fsck, gc
from artifactfs.model import LinkedVersion
from artifactfs.names import parse
from artifactfs.publish import Draft, publish
from artifactfs.store.native import NativeStore, encode_record
from artifactfs.store.urls import open_store

pytestmark = pytest.mark.usefixtures("store")


def log(text: str, name: str = "bikes", type: str = "dataset", **more: Any) -> Artifact:
    artifact = Artifact(name, type)
    with artifact.new_file("a.txt") as file:
        file.write(text)
    with afs.init() as run:
        return run.log_artifact(artifact, **more).wait()


def test_a_link_is_a_version_of_its_portfolio() -> None:
    log("zero")
    source = log("one", aliases=["best"], tags=["t"])
    link = source.link("shop/approved", aliases=["staging"])
    assert (link.qualified_name, link.version, link.aliases) == ("acme/shop/approved:v0", "v0", ["latest", "staging"])
    assert link.is_link and not source.is_link and link.linked_at and source.linked_at is None
    assert (link.entity, link.project, link.collection.name) == ("acme", "shop", "approved")
    assert (link.source_entity, link.source_project, link.source_version) == ("acme", "vision", "v1")
    assert link.source_name == "bikes:v1" and link.source_qualified_name == "acme/vision/bikes:v1"
    assert link.source_collection.name == "bikes" and link.source_collection.is_sequence()
    assert not link.collection.is_sequence()
    assert (link.id, link.digest, link.size, link.tags, link.type) == (source.id, source.digest, 3, ["t"], "dataset")
    assert link.source_artifact.aliases == ["best", "latest"] or set(link.source_artifact.aliases) == {"best", "latest"}
    assert [it.qualified_name for it in source.linked_artifacts] == ["acme/shop/approved:v0"] and link.linked_artifacts == []
    assert source.source_artifact is source and link.json_encode() == source.json_encode()
    assert link.commit_hash == source.commit_hash and link.created_at == source.created_at and link.file_count == 1
    assert afs.Api().artifact("shop/approved:staging").source_version == "v1"


def test_numbers_and_aliases_are_each_collections_own() -> None:
    first, second = log("one"), log("two", aliases=["best"])
    one = first.link("approved", aliases=["best"])
    two = second.link("approved")
    assert (one.version, two.version) == ("v0", "v1")
    again = first.link("approved", aliases=["again"])
    assert again.version == "v0" and set(again.aliases) == {"best", "again"}, "latest does not move back"
    assert afs.Api().artifact("approved").version == "v1" and afs.Api().artifact("bikes:best").version == "v1"
    again.aliases.remove("best")
    again.aliases.append("other")
    again.save()
    assert set(afs.Api().artifact("approved:v0").aliases) == {"again", "other"}
    assert set(afs.Api().artifact("bikes:v1").aliases) == {"best", "latest"}
    again.unlink()
    third = log("three").link("approved", aliases="other")
    assert third.version == "v2", "numbers are not used again"
    assert [it.version for it in afs.Api().artifacts("dataset", "approved")] == ["v2", "v1"]
    with pytest.raises(NotFoundError, match="no alias 'again'"):
        afs.Api().artifact("approved:again")


def test_a_link_of_a_link_leads_to_the_source() -> None:
    link = log("one").link("approved")
    with pytest.warns(UserWarning, match="is a link: its source"):
        second = link.link("other/chosen")
    assert second.source_qualified_name == "acme/vision/bikes:v0"
    assert [it.qualified_name for it in second.source_artifact.linked_artifacts] == [
        "acme/other/chosen:v0",
        "acme/vision/approved:v0",
    ]


def test_what_cannot_be_linked() -> None:
    source = log("one")
    with pytest.raises(ValueError, match="its own collection"):
        source.link("bikes")
    with pytest.raises(ValueError, match="write \\[\\[entity/\\]project/\\]collection"):
        source.link("approved:v0")
    with pytest.raises(ValueError, match="4 parts"):
        source.link("a/b/c/d")
    for aliases in (["a/b"], ["v3"], "a:b"):
        with pytest.raises(ValueError, match="alias"):
            source.link("approved", aliases=aliases)
    log("model", "net", "model")
    with pytest.raises(ValueError, match="holds versions that were logged to it"):
        source.link("net")
    source.link("approved")
    with pytest.raises(ValueError, match="of type 'dataset'"):
        afs.Api().artifact("net").link("approved")
    with pytest.raises(ValueError, match="is no link"):
        source.unlink()
    draft = Artifact("bikes", "dataset")
    with pytest.raises(afs.ArtifactNotLoggedError):
        draft.unlink()


def test_nothing_is_logged_to_a_portfolio(store: NativeStore) -> None:
    log("one").link("approved")
    with pytest.raises(ValueError, match="nothing is logged to it"):
        log("two", "approved")
    with pytest.raises(UsageError, match="nothing is logged to it"):
        publish(store, Draft(name=parse("acme/vision/approved"), type="", folder=MadeFolder({}), commit="c"))


def test_a_draft_is_saved_first() -> None:
    artifact = Artifact("bikes", "dataset")
    link = artifact.link("approved")
    assert artifact.version == "v0" and link.source_version == "v0" and artifact.logged_by() is not None
    other = Artifact("cars", "dataset")
    with afs.init(project="shop") as run:
        linked = run.link_artifact(other, "approved", aliases=["x"])
        assert linked.qualified_name == "acme/shop/approved:v0" and other.qualified_name == "acme/shop/cars:v0"
        same = run.log_artifact(Artifact("third", "dataset"))
        assert run.link_artifact(same, "approved").version == "v1"


def test_edits_through_a_link_are_of_the_source() -> None:
    source = log("one")
    link = source.link("approved")
    link.description, link.metadata = "text", {"a": 1}
    link.tags.append("t")
    with pytest.warns(UserWarning, match="this edits its source, acme/vision/bikes:v0"):
        link.save()
    assert (link.description, link.qualified_name) == ("text", "acme/vision/approved:v0")
    seen = afs.Api().artifact("bikes:v0")
    assert (seen.description, seen.metadata, seen.tags) == ("text", {"a": 1}, ["t"])
    source.description = "other"
    with pytest.raises(ConflictError, match="description"):
        source.save()


def test_reading_and_lineage_through_a_link(desk: Path) -> None:
    source = log("one")
    link = source.link("approved", aliases=["p"])
    with afs.init(job_type="eval") as run:
        used = run.use_artifact("approved:p")
        assert used.download() == str(desk / "artifacts/bikes:v0")
    assert Path("artifacts/bikes:v0/a.txt").read_text() == "one"
    assert link.checkout() == str(desk / "artifacts/bikes")
    link.verify()
    assert [run.job_type for run in source.used_by()] == ["eval"] == [run.job_type for run in link.used_by()]
    assert link.logged_by().id == source.logged_by().id
    assert afs.Api().run(run.id).used == ["acme/vision/bikes:v0"]
    draft = used.new_draft()
    draft.remove("a.txt")
    with afs.init() as run:
        assert run.log_artifact(draft).wait().qualified_name == "acme/vision/bikes:v1"
    other = Artifact("made", "dataset")
    other.add_reference(link.get_entry("a.txt"), name="x")
    other.save()
    assert other.wait().manifest.entries["x"].digest == source.manifest.entries["a.txt"].digest


def test_a_link_has_the_semantic_version_of_its_source(store: NativeStore) -> None:
    """And none of its own: the number that it has in the portfolio stands for none."""
    with afs.init() as run:
        for number, text in enumerate(("0.9.0", "1.4.0-rc.1")):
            folder = MadeFolder({})
            made = publish(
                store,
                Draft(
                    name=parse("acme/vision/bikes"), type="dataset", folder=folder, commit=f"c{number}", semver=text, always=True
                ),
            )
            run.link_artifact(afs.Api().artifact(made.version.qualified_name), "acme/shop/approved")
    assert [store.version(parse(f"acme/shop/approved:{text}")).number for text in ("0.9.0", "1.4.0-rc.1")] == [0, 1]
    assert store.version(parse("acme/shop/approved:1.4.0-rc.1")).origin.qualified_name == "acme/vision/bikes:v1"
    with pytest.raises(NotFoundError):
        store.version(parse("acme/shop/approved:1.0.0"))


def test_links_go_with_their_source(store: NativeStore) -> None:
    first, second = log("one"), log("two")
    link = first.link("approved", aliases=["p"])
    second.link("approved")
    first.link("other")
    first.delete()
    assert [it.version for it in afs.Api().artifacts("dataset", "approved")] == ["v1"]
    assert "p" not in afs.Api().artifact_collection("dataset", "approved").aliases
    with pytest.raises(ValueError, match="was deleted"):
        _ = link.source_artifact
    with pytest.raises(NotFoundError):
        afs.Api().artifact("other")
    assert list(fsck(store)) == []
    gc(store, grace=0)
    assert afs.Api().artifact("approved").source_version == "v1"


def test_deleting_a_link_leaves_its_source() -> None:
    source = log("one", aliases=["best"])
    link = source.link("approved", aliases=["p"])
    with pytest.warns(UserWarning, match="it is unlinked"):
        link.delete(delete_aliases=True)
    assert set(afs.Api().artifact("bikes:v0").aliases) == {"best", "latest"}
    assert not afs.Api().artifact_exists("approved:v0") and source.linked_artifacts == []
    with pytest.raises(CommError, match="no version v0"):
        link.unlink()


def test_a_source_that_is_deleted_while_it_is_linked(store: NativeStore) -> None:
    log("one")
    version = store.version(parse("acme/vision/bikes:v0"))
    store.delete_version(parse("acme/vision/bikes:v0"))
    with pytest.raises(NotFoundError, match="deleted meanwhile"):
        store.link(version, parse("acme/vision/approved"))
    assert store.collection(parse("acme/vision/approved")).links == {}


def test_a_name_that_becomes_both_at_one_moment(store: NativeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes second finds the other: no collection is both."""
    log("one")
    source = store.version(parse("acme/vision/bikes:v0"))
    target = parse("acme/vision/both")
    create = store.create_version

    def link_first(version: Any) -> bool:
        store.link(source, target)
        return create(version)

    monkeypatch.setattr(store, "create_version", link_first)
    with pytest.raises(ConflictError, match="become a portfolio"):
        publish(store, Draft(name=target, type="dataset", folder=MadeFolder({}), commit="c"))
    assert store.collection(target).is_portfolio and store.version(target.at("v0")).origin == source
    monkeypatch.setattr(store, "create_version", create)

    name = parse("acme/vision/other")
    swap = store._swap

    def log_first(key: str, record: Any, stored: Any) -> bool:
        monkeypatch.setattr(store, "_swap", swap)
        publish(store, Draft(name=name, type="dataset", folder=MadeFolder({}), commit="d"))
        store.objects.delete("catalog/acme/vision/other/collection.json")  # the commit has not come to that
        return swap(key, record, stored)

    monkeypatch.setattr(store, "_swap", log_first)
    with pytest.raises(ConflictError, match="become a collection of versions"):
        store.link(source, name)
    assert not store.collection(name).is_portfolio and store.version(name).name == "v0" and store.links_of(source)


def test_links_of_a_hundred_threads(store: NativeStore) -> None:
    log("one")
    for number in range(4):
        log(f"more {number}")
    sources = [store.version(parse(f"acme/vision/bikes:v{number}")) for number in range(5)]
    target = parse("acme/vision/approved")
    made: list[LinkedVersion] = []
    threads = [
        threading.Thread(target=lambda at=at: made.append(store.link(sources[at % 5], target, [f"a{at}"]))) for at in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    collection = store.collection(target)
    assert sorted(collection.links) == [0, 1, 2, 3, 4] and len(collection.aliases) == 21
    assert {link.source for link in collection.links.values()} == {source.qualified_name for source in sources}
    assert len(made) == 20


# Registries


def test_registries(store: NativeStore) -> None:
    source = log("one", type="model")
    link = source.link("wandb-registry-model/bikes", aliases=["production"])
    assert link.qualified_name == "acme/wandb-registry-model/bikes:v0"
    source.link("acme/wandb-registry-model/other")
    api = afs.Api()
    assert api.artifact("wandb-registry-model/bikes:production").source_version == "v0"
    assert [registry.name for registry in api.registries()] == ["model"]
    registry = api.registry("wandb-registry-model")
    assert (registry.full_name, registry.entity) == ("wandb-registry-model", "acme")
    assert [found.name for found in registry.collections()] == ["bikes", "other"]
    assert [found.name for found in registry.collections(filter={"name": {"$regex": "^b"}})] == ["bikes"]
    assert [it.qualified_name for it in registry.versions({"aliases": "production"})] == [link.qualified_name]
    with pytest.raises(CommError, match="no registry 'none'"):
        api.registry("none")


def test_registries_of_an_organization(store: NativeStore) -> None:
    source = log("one", type="model")
    with pytest.raises(ValueError, match="belongs to the organization 'acme'"):
        source.link("org/wandb-registry-model/bikes")
    store.update_entity("acme", lambda it: msgspec.structs.replace(it, organization="org"))
    for target in ("wandb-registry-model/bikes", "org/wandb-registry-model/bikes", "acme/wandb-registry-model/bikes"):
        assert source.link(target).qualified_name == "org/wandb-registry-model/bikes:v0"
    assert afs.Api().artifact("wandb-registry-model/bikes").entity == "org"
    assert [registry.organization for registry in afs.Api().registries()] == ["org"]
    with pytest.raises(ValueError, match="cannot link to a registry of 'others'"):
        source.link("others/wandb-registry-model/bikes")
    assert source.link("others/plain/bikes").entity == "others", "only registries belong to organizations"


# Collections


def test_a_collections_description_tags_and_type(store: NativeStore) -> None:
    log("one")
    log("two")
    collection = afs.Api().artifact_collection("dataset", "bikes")
    other = afs.Api().artifact_collection("dataset", "bikes")
    collection.description, collection.tags, collection.type = "text", ["a"], "model"
    collection.save()
    other.tags = ["b"]
    other.save()
    assert (other.description, other.tags, other.type) == ("text", ["a", "b"], "model")
    assert [it.type for it in afs.Api().artifacts("model", "bikes")] == ["model", "model"]
    assert log("three", type="model").version == "v2"
    with pytest.raises(ValueError, match="already exists with type 'model'"):
        log("four")
    for reserved in ("job", "wandb-x", ""):
        with pytest.raises(ValueError, match="type"):
            collection.type = reserved
    with pytest.raises(ValueError, match="cannot be renamed"):
        collection.name = "cars"
    collection.name = "bikes"
    with pytest.warns(DeprecationWarning):
        collection.change_type("dataset")
    assert afs.Api().artifact("bikes:v0").type == "dataset"
    assert list(fsck(store)) == []


def test_a_change_of_type_that_died_is_mended(store: NativeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    log("one")
    collection = afs.Api().artifact_collection("dataset", "bikes")
    collection.type = "model"
    with monkeypatch.context() as patched, pytest.raises(OSError):
        patched.setattr(store, "update_version", lambda name, change: (_ for _ in ()).throw(OSError("gone")))
        collection.save()
    again = afs.Api().artifact_collection("model", "bikes")
    again.type = "model"
    again.save()
    assert afs.Api().artifact("bikes:v0").type == "model"


def test_a_portfolio_is_copied_as_the_versions_it_links_to(store: NativeStore, tmp_path: Path) -> None:
    log("one").link("approved", aliases=["p"])
    target = open_store(str(tmp_path / "other"))
    copy(store, target, parse("acme/vision/approved"))
    collection = target.collection(parse("acme/vision/approved"))
    assert not collection.is_portfolio and collection.aliases == {"latest": 0, "p": 0}
    assert target.version(parse("acme/vision/approved:p")).digest == store.version(parse("acme/vision/bikes")).digest


def test_a_portfolios_type_is_that_of_its_links() -> None:
    portfolio = log("one").link("approved").collection
    assert portfolio.type == "dataset"
    with pytest.raises(ValueError, match="is a portfolio"):
        portfolio.type = "model"
    portfolio.description = "text"
    portfolio.tags = ["a"]
    portfolio.save()
    seen = afs.Api().artifact_collection("dataset", "approved")
    assert (seen.description, seen.tags, seen.aliases) == ("text", ["a"], ["latest"])


def test_deleting_a_portfolio_leaves_the_sources(store: NativeStore) -> None:
    source = log("one")
    source.link("approved", aliases=["p"]).collection.delete()
    assert afs.Api().artifact("bikes").version == "v0" and source.linked_artifacts == []
    assert not afs.Api().artifact_collection_exists("approved", "dataset")
    assert [found.name for found in afs.Api().artifact_collections("vision", "dataset")] == ["bikes"]
    link = source.link("approved")
    assert link.version == "v1" and link.aliases == ["latest"], "numbers are not used again"
    link.collection.delete()
    assert log("model", "approved", "model").version == "v0", "a name that is free again takes versions, of another type too"


def test_deleting_a_sequence_deletes_its_versions_and_links(store: NativeStore) -> None:
    log("one", aliases=["best"])
    log("two").link("approved")
    collection = afs.Api().artifact_collection("dataset", "bikes")
    with pytest.raises(ConflictError, match="best"):
        store.delete_collection(parse("acme/vision/bikes"), delete_aliases=False)
    collection.delete()
    collection.delete()
    assert not afs.Api().artifact_collection_exists("bikes", "dataset")
    assert not afs.Api().artifact_exists("approved:v0")
    with pytest.raises(CommError):
        collection.save()
    assert log("three", type="model").version == "v2", "a new collection of that name goes on counting"
    assert afs.Api().artifact_collection("model", "bikes").aliases == ["latest"]
    assert list(fsck(store)) == []


# The store


def test_unknown_keys_are_kept(store: NativeStore) -> None:
    """What a newer artifactfs has written stays in a record that this one changes."""
    log("one").link("approved")
    keys = ["vision/bikes/collection.json", "vision/bikes/versions/00000000.json", "vision/approved/collection.json"]
    for key in keys:
        data, etag = store.objects.get(f"catalog/acme/{key}")
        record = {**json.loads(data), "future": {"a": [1]}}
        if record.get("links"):
            record["links"]["0"]["colour"] = "red"
        assert store.objects.swap(f"catalog/acme/{key}", json.dumps(record).encode(), etag)
    link = afs.Api().artifact("approved")
    link.aliases.append("new")
    link.description = "text"
    with pytest.warns(UserWarning):
        link.save()
    collection = link.source_collection
    collection.description = "text"
    collection.save()
    found = [json.loads(store.objects.get(f"catalog/acme/{key}")[0]) for key in keys]
    assert [record["future"] for record in found] == [{"a": [1]}] * 3
    assert found[2]["links"]["0"]["colour"] == "red" and found[1]["description"] == "text"


def test_records_of_older_stores(store: NativeStore) -> None:
    """Without the keys that came later they mean what they did."""
    log("one")
    later = {"kind", "state", "links", "next_link"}
    for key, gone in (("collection.json", later), ("versions/00000000.json", {"ttl_inherited"})):
        data, etag = store.objects.get(f"catalog/acme/vision/bikes/{key}")
        old = {name: value for name, value in json.loads(data).items() if name not in gone}
        assert store.objects.swap(f"catalog/acme/vision/bikes/{key}", json.dumps(old).encode(), etag)
    store.update_entity("acme", lambda it: msgspec.structs.replace(it, default_ttl=1))
    seen = afs.Api().artifact("bikes")
    assert seen.version == "v0" and seen.ttl is None and seen.collection.is_sequence()
    assert seen.link("approved").version == "v0"


def test_a_link_is_not_stored_as_a_version(store: NativeStore) -> None:
    log("one")
    link = store.link(store.version(parse("acme/vision/bikes")), parse("acme/vision/approved"))
    with pytest.raises(TypeError, match="is a link"):
        encode_record(link)


@pytest.mark.parametrize("source", ["", "bikes", "acme/vision/bikes", "acme/vision/bikes:latest", "../x/y:v0"])
def test_a_damaged_link(store: NativeStore, source: str) -> None:
    log("one").link("approved")
    key = "catalog/acme/vision/approved/collection.json"
    data, etag = store.objects.get(key)
    record = json.loads(data)
    record["links"]["0"]["source"] = source
    assert store.objects.swap(key, json.dumps(record).encode(), etag)
    with pytest.raises(IntegrityError, match="which is no version"):
        store.version(parse("acme/vision/approved:v0"))
    assert store.versions(parse("acme/vision/approved")) == [] and afs.Api().artifact("bikes").linked_artifacts == []


# The command line


def test_commands(afs: Program, store: NativeStore, tmp_path: Path) -> None:
    log("one", aliases=["best"])
    made = afs("link", "bikes:best", "shop/approved", "--alias", "p", "--json").document
    assert (made["name"], made["source"], made["aliases"]) == ("acme/shop/approved:v0", "acme/vision/bikes:v0", ["latest", "p"])
    assert "acme/vision/bikes:v0" in afs("info", "shop/approved:p").out
    assert [row["name"] for row in afs("versions", "shop/approved", "--json").document] == ["acme/shop/approved:v0"]
    assert afs("ls", "acme/shop", "--json").document[0]["kind"] == "portfolio"
    assert "a.txt" in afs("ls", "shop/approved:p").out
    afs("get", "shop/approved:p", str(tmp_path / "got"))
    assert (tmp_path / "got/a.txt").read_text() == "one"
    afs("alias", "shop/approved:v0", "add", "more")
    afs("tag", "shop/approved:v0", "add", "tagged")
    assert afs("info", "bikes", "--json").document["tags"] == ["tagged"]
    assert afs("link", "bikes", "wandb-registry-x/c").out.strip() == "acme/wandb-registry-x/c:v0 -> acme/vision/bikes:v0"
    assert afs("unlink", "shop/approved", code=2).err
    assert "unlinked" in afs("unlink", "shop/approved:p").out
    assert afs("info", "shop/approved:v0", code=3).err
    assert "is no link" in afs("unlink", "bikes:best", code=2).err
    assert "unlinked acme/wandb-registry-x/c:v0" in afs("delete", "wandb-registry-x/c:v0").out
    assert afs("entity", "acme", "--organization", "org", "--ttl", "30d", "--json").document == {
        "entity": "acme",
        "default_ttl": 30 * 86400,
        "organization": "org",
    }
    assert "30d" in afs("entity", "acme").out


@pytest.mark.fuse
def test_links_are_mounted(tmp_path: Path, afs: Program) -> None:
    log("one").link("approved", aliases=["p"])
    for name in ("version", "portfolio", "stage"):
        (tmp_path / name).mkdir()
    afs("mount", "vision/approved:p", tmp_path / "version")
    afs("mount", "vision/approved", tmp_path / "portfolio")
    assert (tmp_path / "version/a.txt").read_text() == "one"
    assert sorted(it.name for it in (tmp_path / "portfolio").iterdir()) == ["latest", "p", "v0"]
    assert (tmp_path / "portfolio/p/a.txt").read_text() == "one"
    assert {row["name"] for row in afs("mounts", "--json").document} == {"acme/vision/approved:v0", "acme/vision/approved"}
    afs("unmount", tmp_path / "version")
    afs("unmount", tmp_path / "portfolio")
    assert "nothing is logged to it" in afs("stage", "vision/approved", tmp_path / "stage", code=2).err
