"""Making versions over ``wandb://``: the form of each request, and that nothing is lost or made twice, whatever breaks.

The server (``wandb_server``) refuses an input with a field too many or too few, a key with an upload, and a second commit.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import select
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash
from mounting import needs_fuse
from programs import Program
from wandb_server import KEY, WandbServer, b64md5, running

from artifactfs import distributed
from artifactfs.cache import BlockCache
from artifactfs.errors import ArtifactFSError, CommError, UsageError
from artifactfs.folders import LocalFolder, MadeFolder
from artifactfs.model import Dir, LinkedVersion, Run
from artifactfs.names import parse
from artifactfs.publish import Draft, publish
from artifactfs.store import Store
from artifactfs.store.urls import open_store

BIKES = parse("ann/lab/bikes", "", "")
FILES = {"a.txt": b"one", "dir/b.bin": b"\0" * 70_000, "dir/c/d": b"", "dir/ü": b"odd"}
DIGESTS = "ARTIFACT_DIGEST_ALGORITHM"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr("artifactfs.attempts.BACKOFF", 0.01)
    yield from running()


@pytest.fixture
def store(server: WandbServer, tmp_path: Path) -> Iterator[Store]:
    cache = BlockCache(tmp_path / "cache", 1 << 30)
    yield open_store(server.url, cache)
    cache.close()


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    return LocalFolder(str(write(tmp_path / "in", FILES)))


def write(root: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


def draft(folder: Any, **given: Any) -> Draft:
    return Draft(**{"name": BIKES, "type": "dataset", "folder": folder, "commit": uuid.uuid4().hex, **given})


def listed(store: Store, name: str = "v0") -> dict[str, str]:
    """Each file of a version and its checksum."""
    version = store.version(BIKES.at(name))
    return {path: entry.digest for path, entry in store.tree.walk(version.root) if not isinstance(entry, Dir)}


def inputs(server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What every mutation that comes is given."""
    found: list[tuple[str, dict[str, Any]]] = []
    execute = server.execute

    def noting(document: str, variables: dict[str, Any]) -> Any:
        if document.lstrip().startswith("mutation"):
            found.append((document.split("(")[0].split()[1], variables.get("input", variables)))
        return execute(document, variables)

    monkeypatch.setattr(server, "execute", noting)
    return found


# The form of the requests


def test_the_requests_of_a_commit(
    server: WandbServer, store: Store, folder: LocalFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = inputs(server, monkeypatch)
    given = {"aliases": ["best"], "tags": ["t"], "metadata": {"k": 1}, "description": "d", "ttl": 60, "run": "ann/lab/r1"}
    first = publish(store, draft(folder, **given)).version
    assert [name for name, _ in asked] == [
        "CreateArtifact",
        "CreateArtifactManifest",
        "CreateArtifactFiles",
        "CreateArtifactManifest",
        "CommitArtifact",
    ]
    create = asked[0][1]
    lines = "".join(f"{path}:{b64md5(data)}\n" for path, data in sorted(FILES.items()))
    ids = {key: create.pop(key) for key in ("clientID", "sequenceClientID")}
    assert all(len(id) == 128 and id.isalnum() and id.islower() for id in ids.values()) and len(set(ids.values())) == 2
    assert create == {
        "entityName": "ann",
        "projectName": "lab",
        "runName": "r1",
        "artifactTypeName": "dataset",
        "artifactCollectionName": "bikes",
        "artifactCollectionNames": None,
        "digest": hashlib.md5(b"wandb-artifact-manifest-v1\n" + lines.encode()).hexdigest(),
        "description": "d",
        "aliases": [{"artifactCollectionName": "bikes", "alias": alias} for alias in ("best", "latest")],
        "tags": [{"tagName": "t", "tagCategoryName": None, "attributes": None}],
        "metadata": '{"k": 1}',
        "ttlDurationSeconds": 60,
        "historyStep": None,
        "enableDigestDeduplication": True,
        "distributedID": None,
        "storageRegion": None,
        "labels": None,
        "clientMutationId": None,
    }
    before, after = asked[1][1], asked[3][1]
    assert before == {
        "artifactID": first.commit,
        "baseArtifactID": None,
        "name": "wandb_manifest.json",
        "digest": "",
        "entityName": "ann",
        "projectName": "lab",
        "runName": "r1",
        "manifestType": "FULL",
        "includeUpload": False,
    }
    manifest = server.artifacts[first.commit].manifest
    assert after == {**before, "digest": b64md5(manifest), "includeUpload": True}
    files = asked[2][1]
    assert {spec["name"]: spec["md5"] for spec in files.pop("artifactFiles")} == {
        path: b64md5(data) for path, data in FILES.items()
    }
    assert files == {"storageLayout": "V2", "cloudRegionID": None, "clientMutationId": None}
    assert json.loads(manifest)["storagePolicyConfig"] == {"storageLayout": "V2"}
    puts = [headers for method, _, headers in server.log if method == "PUT"]
    assert len(puts) == 5 and not any("Authorization" in headers for headers in puts)
    publish(store, draft(MadeFolder({"new": LocalFolder(folder.path)}, base=first.root)))
    assert [given["baseArtifactID"] for name, given in asked[5:] if name == "CreateArtifactManifest"] == [first.commit] * 2


@pytest.mark.parametrize("enabled", [True, False])
def test_xxh128_where_the_server_takes_it(server: WandbServer, store: Store, folder: LocalFolder, enabled: bool) -> None:
    server.features, server.xxhash = {DIGESTS}, enabled
    made = publish(store, draft(folder, algorithm="XXH128")).version

    def digest(data: bytes) -> str:
        return base64.b64encode(xxhash.xxh128(data).digest()).decode() if enabled else b64md5(data)

    assert listed(store) == {path: digest(data) for path, data in FILES.items()}
    artifact = server.artifacts[made.commit]
    assert artifact.given["digestAlgorithm"] == ("MANIFEST_XXH128" if enabled else "MANIFEST_MD5")
    lines = "".join(f"{path}:{digest(data)}\n" for path, data in sorted(FILES.items())).encode()
    hasher: Any = xxhash.xxh128 if enabled else hashlib.md5
    assert made.digest == hasher(b"wandb-artifact-manifest-v1\n" + lines).hexdigest()
    assert all(entry.get("extra") == ({"alg": "XXH128"} if enabled else None) for entry in artifact.contents.values())


def test_a_server_without_the_feature_is_told_of_no_digests(server: WandbServer, store: Store, folder: LocalFolder) -> None:
    made = publish(store, draft(folder, algorithm="XXH128")).version
    assert "digestAlgorithm" not in server.artifacts[made.commit].given
    assert listed(store)["a.txt"] == b64md5(b"one")


def test_a_server_that_wants_a_run_gets_one(server: WandbServer, store: Store, folder: LocalFolder) -> None:
    server.need_runs = True
    publish(store, draft(folder))
    [run] = store.runs("ann", "lab")
    assert run.job_type == "auto" and server.runs["ann", "lab", run.id]["state"] == "finished"
    assert server.artifacts[store.version(BIKES).commit].run is None, "it belongs to nobody's run"


def test_runs(server: WandbServer, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = inputs(server, monkeypatch)
    time = "2026-11-20T10:11:12.000000Z"
    run = Run(
        entity="ann", project="lab", id="r", job_type="train", group="g", config={"a": [1]}, created_at=time, updated_at=time
    )
    for _ in range(3):
        store.save_run(run)
    store.save_run(msgspec.structs.replace(run, name="nice", config={"a": [1], "b": None}))
    assert [name for name, _ in asked] == ["UpsertBucket"] * 2, "what has not changed is not sent again"
    found = store.run("ann", "lab", "r")
    assert (found.name, found.job_type, found.group, found.config) == ("nice", "train", "g", {"a": [1], "b": None})
    assert [it.id for it in store.runs("ann", "lab")] == ["r"] and store.runs("ann", "nothing") == []
    for number in range(5):  # more than come with the run
        publish(store, draft(MadeFolder({}), run="ann/lab/r", always=True))
        store.mark_used(store.version(BIKES), run)
        before = server.asked.count("RunOutputArtifacts")
        expected = [f"ann/lab/bikes:v{at}" for at in range(number + 1)]
        for found in (store.run("ann", "lab", "r"), store.runs("ann", "lab")[0], store.used_by(store.version(BIKES))[0]):
            assert found.logged == found.used == expected
        assert (server.asked.count("RunOutputArtifacts") > before) == (number >= server.page)
    store.finish_run(run, 1)
    assert server.runs["ann", "lab", "r"]["state"] == "failed"


def test_parts_of_a_version(server: WandbServer, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = inputs(server, monkeypatch)
    parts = [LocalFolder(str(write(tmp_path / f"{number}", {f"{number}.txt": b"x%d" % number}))) for number in range(3)]
    for part in parts[:2]:
        distributed.add_part(store, "together", draft(part, tags=["t"]))
    assert store.numbers(BIKES) == []
    version = distributed.finish(store, "together", draft(parts[2], aliases=["best"], metadata={"k": 1}))
    assert sorted(listed(store, "best")) == ["0.txt", "1.txt", "2.txt"] and version.metadata == {"k": 1}
    kinds = {(given["manifestType"], given["name"]) for name, given in asked if name == "CreateArtifactManifest"}
    assert kinds == {("PATCH", "wandb_manifest.patch.json")} and [name for name, _ in asked].count("UpdateArtifactManifest") == 3
    assert {given["distributedID"] for name, given in asked if name == "CreateArtifact"} == {"together"}
    with pytest.raises(UsageError, match="leave incremental out"):
        distributed.finish(store, "together", draft(parts[0]), incremental=True)


def test_nothing_is_logged_to_a_portfolio_and_no_link_to_a_sequence(
    server: WandbServer, store: Store, folder: LocalFolder
) -> None:
    version = publish(store, draft(folder)).version
    store.link(version, parse("ann/lab/shelf", "", ""))
    with pytest.raises(UsageError, match="nothing is logged to it"):
        publish(store, draft(folder, name=parse("ann/lab/shelf", "", "")))
    server.log_version("ann/lab/cars", {"x": b""})
    with pytest.raises(UsageError, match="holds versions that were logged to it"):
        store.link(version, parse("ann/lab/cars", "", ""))


def test_answers_in_other_forms(server: WandbServer, store: Store, folder: LocalFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers as text and text as numbers, nulls for what need not be there, fields that nobody asked for."""
    publish(store, draft(folder, aliases=["best"]))
    select = server._artifact

    def other(it: Any) -> Any:
        found = select(it)
        if found is not None:
            found |= {"versionIndex": str(found["versionIndex"]), "size": 70_006, "fileCount": "4", "ttlDurationSeconds": "-1"}
            found |= {
                "tags": None,
                "description": None,
                "metadata": None,
                "commitHash": None,
                "updatedAt": None,
                "createdBy": None,
            }
        return found

    monkeypatch.setattr(server, "_artifact", other)
    execute = server.execute
    monkeypatch.setattr(server, "execute", lambda *args: {**execute(*args), "more": [1, {"x": None}]})
    version = store.version(BIKES.at("best"))
    assert (version.number, version.size, version.file_count, version.ttl, version.tags) == (0, 70_006, 4, None, [])
    assert publish(store, draft(folder)).created is False


# What breaks


@pytest.mark.parametrize("fault", [429, 503, "before", "after"])
def test_every_mutation_that_breaks_once(server: WandbServer, store: Store, tmp_path: Path, fault: int | str) -> None:
    """429, 503, a connection that breaks before the request is done, or before its answer: all comes once, and is all there."""
    seen: set[str] = set()

    def once(step: str) -> int | str | None:
        known = step in seen
        seen.add(step)
        return None if known else fault

    server.fault = once
    first = publish(store, draft(LocalFolder(str(write(tmp_path / "1", FILES))), aliases=["a"], always=True)).version
    second = publish(store, draft(LocalFolder(str(write(tmp_path / "2", {"x": b"2"}))))).version
    assert [it.number for it in store.versions(BIKES)] == [0, 1]
    assert listed(store) == {path: b64md5(data) for path, data in FILES.items()}
    store.update_version(BIKES.at("v0"), lambda it: msgspec.structs.replace(it, description="d", tags=["t"], metadata={"k": 1}))
    store.update_collection(
        BIKES, lambda it: msgspec.structs.replace(it, aliases={"latest": 1, "b": 0}, tags=["u"], description="e")
    )
    store.update_collection(BIKES, lambda it: msgspec.structs.replace(it, tags=[], type="model"))
    found, collection = store.version(BIKES.at("b")), store.collection(BIKES)
    assert (found.number, found.description, found.tags, found.metadata) == (0, "d", ["t"], {"k": 1})
    assert (collection.aliases, collection.tags, collection.type) == ({"latest": 1, "b": 0}, [], "model")
    shelf = parse("ann/lab/shelf", "", "")
    link = store.link(store.version(BIKES.at("b")), shelf, ["p"])
    assert isinstance(link, LinkedVersion) and [it.number for it in store.versions(shelf)] == [0]
    time = first.created_at
    run = Run(entity="ann", project="lab", id="r", created_at=time, updated_at=time)
    store.save_run(run)
    store.mark_used(second, run)
    store.finish_run(run, 0)
    assert {it.id for it in store.used_by(second)} == {"r"}
    store.unlink(shelf.at("p"))
    store.delete_collection(shelf)
    store.delete_version(BIKES.at("v0"), delete_aliases=True)
    assert [it.number for it in store.versions(BIKES)] == [1]
    store.delete_collection(BIKES)
    assert store.collections("ann", "lab") == []
    assert len(seen) >= 16, seen


STEPS = ["CreateArtifact", "CreateArtifactManifest", "CreateArtifactFiles", "PUT", "CommitArtifact", "ArtifactByID"]


@pytest.mark.parametrize("noted", [True, False], ids=["noted", "asked"])
@pytest.mark.parametrize("after", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_a_commit_that_dies_and_is_repeated_makes_one_version(
    server: WandbServer, store: Store, folder: LocalFolder, tmp_path: Path, step: str, after: str, noted: bool
) -> None:
    """The server is out of reach from ``step`` on, before it did that or after. Even where equal files make a new version, and
    somebody else logs in between, the commit is one version, and holds every byte."""
    asked = draft(folder, always=True, notes=tmp_path / "notes" if noted else None)
    dead: list[str] = []

    def dying(at: str) -> str | None:
        if dead:
            return "before"
        if at == step:
            dead.append(at)
        return after if dead else None

    server.fault = dying
    with pytest.raises(ArtifactFSError):
        publish(store, asked)
    server.fault = lambda at: None
    counted = any(it.state == "COMMITTED" for it in server.artifacts.values())
    other = publish(open_store(server.url), draft(MadeFolder({}))).version
    done = publish(open_store(server.url), dataclasses.replace(asked, retry=True))
    assert [it.number for it in store.versions(BIKES)] == [0, 1] and done.version.number == (other.number + 1) % 2
    assert counted == (done.version.number == 0)
    assert listed(store, done.version.name) == {path: b64md5(data) for path, data in FILES.items()}
    assert not noted or not list((tmp_path / "notes").iterdir())


def test_a_refused_commit_is_refused(server: WandbServer, store: Store, folder: LocalFolder) -> None:
    server.fault = lambda step: server.blobs.clear() if step == "CommitArtifact" else None  # type: ignore[func-returns-value]
    with pytest.raises(CommError, match="the manifest lists what was not uploaded"):
        publish(store, draft(folder))
    assert store.numbers(BIKES) == []


def test_an_upload_url_that_ended(server: WandbServer, store: Store, folder: LocalFolder) -> None:
    """Each URL is void when it is used first: another is asked for, of files as of the manifest."""
    seen: set[str] = set()

    def void(method: str, path: str) -> tuple[int, dict[str, str]] | None:
        place = "manifest" if path.startswith("/manifest/") else path.partition("?")[0]
        known = method != "PUT" or place in seen
        seen.add(place)
        return None if known else (403, {})

    server.fail = void
    publish(store, draft(folder))
    assert listed(store) == {path: b64md5(data) for path, data in FILES.items()}


# Stages whose daemon is killed


@needs_fuse
@pytest.mark.parametrize("step", ["CreateArtifact before", "PUT before", "CommitArtifact before", "CommitArtifact after"])
def test_a_stage_that_is_killed_while_it_commits(
    server: WandbServer, store: Store, afs: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """kill -9 at the step; then ``commit --resume``, in an environment that names another server."""
    server.log_version("ann/lab/bikes", FILES)
    where = tmp_path / "stage"
    where.mkdir()
    given = {"ARTIFACTFS_STORE": "wandb://", "WANDB_BASE_URL": server.base, "WANDB_ENTITY": "ann", "WANDB_PROJECT": "lab"}
    for setting, value in given.items():
        monkeypatch.setenv(setting, value)
    record = afs("stage", "bikes", where, "--json").document
    (where / "new").write_bytes(b"new" * 100_000)
    (where / "a.txt").write_bytes(b"changed")
    (where / "dir/b.bin").unlink()
    name, when = step.split()

    def kill(at: str) -> str | None:
        if at != name:
            return None
        os.kill(record["pid"], signal.SIGKILL)
        server.fault = lambda at: None
        return when

    server.fault = kill
    assert subprocess.run(["fusermount", "-u", str(where)], check=False).returncode == 0
    _gone(record["pid"])
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    afs("commit", "--resume", where)
    assert [it.number for it in store.versions(BIKES)] == [0, 1]
    left = {path: data for path, data in FILES.items() if path != "dir/b.bin"}
    expected = {**left, "a.txt": b"changed", "new": b"new" * 100_000}
    assert listed(store, "v1") == {path: b64md5(data) for path, data in expected.items()}
    assert not os.path.exists(record["staging"]) and afs("mounts", "--all", "--json").document == []


def _gone(pid: int) -> None:
    """Wait until a process that is no child of ours has ended."""
    with contextlib.suppress(ProcessLookupError):
        process = os.pidfd_open(pid)
        try:
            assert select.select([process], [], [], 30)[0], "it lives on"
        finally:
            os.close(process)
