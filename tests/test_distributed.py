"""Versions that many processes add to: parts, one commit that joins them, and what happens when one of them dies."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

import msgspec
import pytest

import artifactfs as afs
from artifactfs import maintenance
from artifactfs.artifact import Artifact
from artifactfs.errors import ConflictError, NetworkError, NotFoundError
from artifactfs.names import parse
from artifactfs.store.native import NativeStore

pytestmark = pytest.mark.usefixtures("store")

NAME = parse("acme/vision/parts")


def part(files: dict[str, str], **more: Any) -> Artifact:
    artifact = Artifact("parts", "dataset", **more)
    for path, text in files.items():
        with artifact.new_file(path) as file:
            file.write(text)
    return artifact


def texts(artifact: Artifact) -> dict[str, str]:
    root = artifact.download()
    found = {}
    for path in artifact.manifest.entries:
        with open(os.path.join(root, path)) as file:
            found[path] = file.read()
    return found


def _add_parts(number: int) -> None:
    with afs.init(group="many", id=f"worker-{number}") as run:
        run.upsert_artifact(part({f"shared/{number}.txt": str(number), "shared/same.txt": "same", f"{number}/x": "x"}))


def test_many_processes_make_one_version() -> None:
    workers = [multiprocessing.get_context("fork").Process(target=_add_parts, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    with afs.init(group="many", id="last") as run:
        artifact = run.finish_artifact(part({"end.txt": "end"}, metadata={"a": 1}), aliases=["done"]).wait()
    assert artifact.version == "v0" and not artifact.is_draft() and artifact.distributed_id == "many"
    found = afs.Api().artifact("parts:done")
    expected = {f"shared/{number}.txt": str(number) for number in range(8)} | {f"{number}/x": "x" for number in range(8)}
    assert texts(found) == expected | {"shared/same.txt": "same", "end.txt": "end"}
    assert found.logged_by().id == "last" and found.metadata == {"a": 1}
    assert afs.Api().run("worker-3").logged == ["acme/vision/parts:v0"], "who added a part logged it, too"
    assert len(afs.Api().artifacts("dataset", "parts")) == 1


def test_a_part_stays_a_draft() -> None:
    with afs.init() as run:
        artifact = part({"a": "1"})
        assert run.upsert_artifact(artifact, distributed_id="x").wait() is artifact
        assert artifact.is_draft() and artifact.id is None and artifact.state == "PENDING" and artifact.distributed_id == "x"
        with pytest.raises(afs.ArtifactNotLoggedError):
            _ = artifact.version
        with pytest.raises(afs.ArtifactFinalizedError):
            artifact.remove("a")
        with pytest.raises(ValueError, match="not finished"):
            run.use_artifact(artifact)
        with pytest.raises(afs.CommError, match="does not exist"):
            afs.Api().artifact("parts")
        assert run.upsert_artifact(artifact, distributed_id="x").wait().is_draft(), "the same part again is one part"
        done = run.finish_artifact(artifact, distributed_id="x").wait()
        assert done.version == "v0" and list(done.manifest.entries) == ["a"]
        with pytest.raises(ValueError, match="is logged already"):
            run.upsert_artifact(done, distributed_id="x")


def test_what_is_added_later_is_of_the_next_version() -> None:
    with afs.init(group="g") as run:
        run.upsert_artifact(part({"a": "1"}), aliases=["first"])
        first = run.finish_artifact(part({"b": "1"})).wait()
        run.upsert_artifact(part({"c": "2"}), distributed_id="other")
        run.upsert_artifact(part({"a": "2"}))
        second = run.finish_artifact(part({})).wait()
        assert sorted(first.manifest.entries) == ["a", "b"] and set(first.aliases) == {"first", "latest"}
        assert (second.version, sorted(second.manifest.entries)) == ("v1", ["a"])
        third = run.finish_artifact(part({"d": "3"}, incremental=True), distributed_id="other").wait()
        assert (third.version, sorted(third.manifest.entries)) == ("v2", ["a", "c", "d"]), "laid over the newest"


def test_arguments() -> None:
    with afs.init() as run:
        for member in (run.upsert_artifact, run.finish_artifact):
            with pytest.raises(TypeError, match="distributed_id"):
                member(part({}))
            with pytest.raises(ValueError, match="distributed_id"):
                member(part({}), distributed_id="a/b")
        run.upsert_artifact(part({"a": "1"}), distributed_id="x").wait()
        run.upsert_artifact(part({"b": "1"}, digest_algorithm="MD5"), distributed_id="x")
        with pytest.raises(ValueError, match="has digest algorithm 'BLAKE3', not 'MD5'"):
            run.finish_artifact(part({"b": "1"}, digest_algorithm="MD5"), distributed_id="x").wait()
        run._logged.clear()


def test_one_path_with_two_contents(store: NativeStore) -> None:
    with afs.init(group="g") as run:
        run.upsert_artifact(part({"a/b/c": "1", "x": "1"}))
        failed = run.finish_artifact(part({"a/b/c": "2"}))
        with pytest.raises(ConflictError, match="'a/b/c' is in several parts"):
            failed.wait()
        run._logged.clear()
        run.upsert_artifact(part({"a": "a file"}))
        with pytest.raises(ConflictError, match="'a' is in several parts"):
            run.finish_artifact(part({"a/b": "below it"})).wait()
        run._logged.clear()
        assert run.finish_artifact(part({"a/b/c": "2"})).wait().version == "v0", "the parts were dropped"
    assert store.numbers(NAME) == [0]


@pytest.mark.parametrize("algorithm", ["MD5", "XXH128"])
def test_digests_are_those_of_the_whole(algorithm: str) -> None:
    whole = part({"a": "1", "b/c": "2"}, digest_algorithm=algorithm)
    with afs.init(group="g") as run:
        run.upsert_artifact(part({"a": "1"}, digest_algorithm=algorithm))
        assert run.finish_artifact(part({"b/c": "2"}, digest_algorithm=algorithm)).wait().digest == whole.digest


def test_a_finish_that_died_is_carried_on(store: NativeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it stopped before or after its version came into being, there is one version, and nothing is lost."""
    for number, step in enumerate(("create_version", "update_collection", "update_distributed")):
        with afs.init(group="g") as run:
            run.upsert_artifact(part({f"{number}/a": "1"})).wait()
            real = getattr(store, step)
            calls = iter(range(100))

            def die(*arguments: Any, real: Any = real, step: str = step, calls: Any = calls, **more: Any) -> Any:
                if step != "update_distributed" or next(calls) == 2:  # after a part and the closing: when it is settled
                    raise NetworkError("the process is gone")
                return real(*arguments, **more)

            artifact = part({f"{number}/b": "2"})
            with monkeypatch.context() as patched, pytest.raises(NetworkError):
                patched.setattr(store, step, die)
                run.finish_artifact(artifact).wait()
            run._logged.clear()
            again = run.finish_artifact(artifact).wait()
            assert (again.version, sorted(again.manifest.entries)) == (f"v{number}", [f"{number}/a", f"{number}/b"])
            assert afs.Api().artifact("parts").version == f"v{number}"
    record = store.distributed(NAME, "g")
    assert record is not None and record.parts == [] and record.closing is None and record.last == "v2"


def test_another_process_finishes_what_one_died_over(store: NativeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with afs.init(group="g") as run:
        with monkeypatch.context() as patched, pytest.raises(NetworkError):
            patched.setattr(store, "create_version", lambda version: (_ for _ in ()).throw(NetworkError("gone")))
            run.finish_artifact(part({"a": "1"})).wait()
        run._logged.clear()
        second = run.finish_artifact(part({"b": "2"})).wait()
        assert (second.version, sorted(second.manifest.entries)) == ("v1", ["b"])
        assert sorted(afs.Api().artifact("parts:v0").manifest.entries) == ["a"]


def test_gc_keeps_parts_until_they_are_given_up(store: NativeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with afs.init(group="g") as run:
        run.upsert_artifact(part({"a": "precious"})).wait()
        maintenance.gc(store, grace=0)
        assert run.finish_artifact(part({})).wait().manifest.size() == 8
        assert list(maintenance.fsck(store)) == []
        run.upsert_artifact(part({"b": "left"})).wait()
    monkeypatch.setattr(maintenance, "ABANDONED", -1000.0)
    assert maintenance.gc(store, dry_run=True, grace=0).abandoned == ["distributed version 'g' of acme/vision/parts"]
    assert maintenance.gc(store, grace=0).abandoned and not maintenance.gc(store, grace=0).abandoned
    record = store.distributed(NAME, "g")
    assert record is not None and record.parts == []
    assert list(maintenance.fsck(store)) == []


def test_a_part_of_a_deleted_artifact(store: NativeStore) -> None:
    source = part({"a": "1"})
    source.save()
    borrowed = part({})
    borrowed.add_reference(source.wait().get_entry("a"))
    store.delete_version(NAME.at("v0"))
    with afs.init(group="g") as run:
        with pytest.raises(NotFoundError, match="was deleted"):
            run.upsert_artifact(borrowed).wait()
        run._logged.clear()


def test_the_record_keeps_unknown_keys(store: NativeStore) -> None:
    with afs.init(group="g") as run:
        run.upsert_artifact(part({"a": "1"})).wait()
        key = "catalog/acme/vision/parts/distributed/g.json"
        data, etag = store.objects.get(key)
        store.objects.swap(key, msgspec.json.encode({**msgspec.json.decode(data), "future": 1}), etag)
        run.finish_artifact(part({})).wait()
    assert msgspec.json.decode(store.objects.get(key)[0])["future"] == 1
