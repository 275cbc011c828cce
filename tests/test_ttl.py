"""Times to live: set, inherited, disabled, and enforced by gc."""

from __future__ import annotations

import datetime
import json
from typing import Any

import msgspec
import pytest
from programs import Program

import artifactfs as afs
from artifactfs.artifact import Artifact, ArtifactTTL
from artifactfs.maintenance import gc
from artifactfs.names import parse
from artifactfs.store.native import NativeStore

pytestmark = pytest.mark.usefixtures("store")

HOUR = datetime.timedelta(hours=1)
ALWAYS = datetime.timedelta(seconds=1)


def log(text: str, ttl: Any = "unset", name: str = "bikes", type: str = "dataset", **more: Any) -> Artifact:
    artifact = Artifact(name, type)
    with artifact.new_file("a.txt") as file:
        file.write(text)
    if ttl != "unset":
        artifact.ttl = ttl
    with afs.init() as run:
        return run.log_artifact(artifact, **more).wait()


def inherit(store: NativeStore, seconds: int | None) -> None:
    store.update_entity("acme", lambda it: msgspec.structs.replace(it, default_ttl=seconds))


def age(store: NativeStore, version: str) -> None:
    """Let a version be made a day earlier."""
    key = f"catalog/acme/vision/{version}.json"
    data, etag = store.objects.get(key)
    made = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    record = {**json.loads(data), "created_at": made.strftime("%Y-%m-%dT%H:%M:%S.%fZ")}
    assert store.objects.swap(key, json.dumps(record).encode(), etag)


def test_set_inherited_and_disabled(store: NativeStore) -> None:
    own, inherited, never = log("1", HOUR), log("2"), log("3", None)
    assert (own.ttl, inherited.ttl, never.ttl) == (HOUR, None, None)
    inherit(store, 60)
    assert (own.ttl, inherited.ttl, never.ttl) == (HOUR, datetime.timedelta(minutes=1), None)
    own.ttl = ArtifactTTL.INHERIT
    with pytest.raises(afs.ArtifactNotLoggedError, match="inherited"):
        _ = own.ttl
    own.save()
    inherited.ttl = None
    inherited.save()
    assert own.ttl == datetime.timedelta(minutes=1) and afs.Api().artifact("bikes:v1").ttl is None
    inherit(store, None)
    assert afs.Api().artifact("bikes:v0").ttl is None
    draft = Artifact("bikes", "dataset")
    with pytest.raises(afs.ArtifactNotLoggedError):
        _ = draft.ttl
    draft.ttl = None
    assert draft.ttl is None
    assert log("4", HOUR).new_draft()._ttl is ArtifactTTL.INHERIT


def test_what_cannot_have_one() -> None:
    artifact = log("1")
    link = artifact.link("approved")
    with pytest.raises(ValueError, match="is a link"):
        link.ttl = HOUR
    for bad in (datetime.timedelta(0), -HOUR):
        with pytest.raises(ValueError, match="at least a second"):
            artifact.ttl = bad
    with pytest.raises(ValueError, match="timedelta"):
        artifact.ttl = 60  # type: ignore[assignment]
    table = Artifact("table", "run_table")
    with pytest.raises(ValueError, match="cannot have a TTL"):
        table.ttl = HOUR
    artifact.link("wandb-registry-model/bikes")
    artifact.ttl = HOUR
    with pytest.raises(ValueError, match="nothing expires"):
        artifact.save()


def test_gc_deletes_what_has_expired(store: NativeStore) -> None:
    """Aliases and links go with it; what a registry links to, what never expires and what is younger stays."""
    log("own", ALWAYS, aliases=["best"]).link("approved")
    log("inherited")
    log("never", None)
    log("registry", ALWAYS, name="kept").link("wandb-registry-model/bikes")
    log("young", HOUR * 48)
    log("special", name="table", type="run_table")
    for version in ("bikes/versions/00000000", "bikes/versions/00000001", "bikes/versions/00000002", "bikes/versions/00000003"):
        age(store, version)
    for version in ("kept/versions/00000000", "table/versions/00000000"):
        age(store, version)
    assert gc(store, dry_run=True).expired == ["acme/vision/bikes:v0"]
    inherit(store, 3600)
    expected = ["acme/vision/bikes:v0", "acme/vision/bikes:v1"]
    assert gc(store, dry_run=True).expired == expected and len(afs.Api().artifacts("dataset", "bikes")) == 4
    assert gc(store).expired == expected
    assert [it.version for it in afs.Api().artifacts("dataset", "bikes")] == ["v3", "v2"]
    assert not afs.Api().artifact_exists("approved:v0") and not afs.Api().artifact_exists("bikes:best")
    assert afs.Api().artifact("kept").download() and gc(store).expired == []
    afs.Api().artifact("wandb-registry-model/bikes").unlink()
    assert gc(store).expired == ["acme/vision/kept:v0"]


def test_on_the_command_line(afs: Program, store: NativeStore) -> None:
    log("1")
    assert "inherited" in afs("info", "bikes").out
    assert afs("describe", "bikes", "--ttl", "2d", "--json").document["ttl"] == 2 * 86400
    assert afs("describe", "bikes", "--ttl", "none", "--json").document["ttl_inherited"] is False
    assert afs("describe", "bikes", "--ttl", "inherit", "--json").document["ttl_inherited"] is True
    assert afs("entity", "acme", "--ttl", "1d", "--json").document["default_ttl"] == 86400
    assert store.ttl_of(store.version(parse("acme/vision/bikes"))) == 86400
    log("2").link("wandb-registry-model/bikes")
    assert "nothing expires" in afs("describe", "bikes", "--ttl", "2d", code=2).err
    age(store, "bikes/versions/00000000")
    afs("entity", "acme", "--ttl", "1s")
    assert "would expire acme/vision/bikes:v0" in afs("gc", "--dry-run").out
    assert "expired acme/vision/bikes:v0" in afs("gc").out
    assert "never" not in afs("entity", "acme", "--ttl", "none").out
    assert afs("entity", "a/b", code=2).err
