"""The native store's catalog: names, versions, aliases, deletion, runs; and reading contents."""

from __future__ import annotations

import base64
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from commits import NAME, commit, contents, file_at, leftovers, new_file, nothing_leaks, problems

from artifactfs.errors import ConflictError, IntegrityError, InvalidNameError, NotFoundError, StoreFormatError, UsageError
from artifactfs.folders import MadeFolder
from artifactfs.model import BLOCK, Collection, Run, Version
from artifactfs.names import ArtifactName, parse
from artifactfs.store.native import NativeStore, now
from artifactfs.store.urls import open_store


@pytest.fixture
def store(tmp_path: Path) -> NativeStore:
    return open_store(str(tmp_path / "store"))


def make(store: NativeStore, tmp_path: Path, count: int, name: ArtifactName | str = NAME, **fields: Any) -> list[Version]:
    def one(number: int) -> Version:
        return commit(store, {"x": new_file(tmp_path / "x", f"{tmp_path} {name} {number}".encode())}, name, **fields).version

    return [one(number) for number in range(count)]


# Opening


def test_opening_writes_nothing(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    assert store.entities() == store.projects("acme") == store.collections("acme", "vision") == []
    assert store.runs("acme", "vision") == []
    with pytest.raises(NotFoundError, match="acme/vision/bikes does not exist"):
        store.version(NAME)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("form", ["{}", "file://{}", "file://localhost{}", "file://{}/", "{}/../store"])
def test_urls_of_one_store(tmp_path: Path, form: str) -> None:
    path = tmp_path / "store"
    make(open_store(str(path)), tmp_path, 1)
    assert open_store(form.format(path)).version(NAME).number == 0


def test_a_url_is_percent_decoded(tmp_path: Path) -> None:
    make(open_store(str(tmp_path / "a store")), tmp_path, 1)
    assert open_store(f"file://{tmp_path}/a%20store").version(NAME).number == 0


@pytest.mark.parametrize("url", ["", "s4://bucket", "file://elsewhere/path", "http://x/y", "a\0b", "file:///a%00b"])
def test_urls_of_no_store(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_store(url)
    assert "\n" not in str(caught.value)


def test_another_process_makes_the_store_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path / "store"))
    real = store.objects.folders

    def folders(prefix: str) -> list[str]:
        if prefix == "" and not (tmp_path / "store/store.json").exists():
            make(open_store(str(tmp_path / "store")), tmp_path, 1)
        return real(prefix)

    monkeypatch.setattr(store.objects, "folders", folders)
    store.ensure_format()
    assert store.version(NAME).number == 0


def test_many_processes_make_one_store(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)

    def first(number: int) -> int:
        barrier.wait()
        return make(open_store(str(tmp_path / "store")), tmp_path / str(number), 1, f"acme/p{number}/c")[0].number

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(first, range(8))) == [0] * 8
    assert open_store(str(tmp_path / "store")).projects("acme") == [f"p{n}" for n in range(8)]


@pytest.mark.parametrize("content", ["file", "folder/", "folder/file", ".hidden"])
def test_a_directory_of_other_things_is_no_store(tmp_path: Path, content: str) -> None:
    path = tmp_path / "mine"
    path.mkdir()
    if content.endswith("/"):
        (path / content).mkdir()
    else:
        (path / content).parent.mkdir(exist_ok=True)
        (path / content).write_bytes(b"precious")
    with pytest.raises(StoreFormatError, match="is not an artifactfs store; name an empty or new directory"):
        open_store(str(path))
    assert [str(it.relative_to(path)) for it in path.rglob("*") if it.is_file()] == ([] if content.endswith("/") else [content])


def test_a_directory_that_died_before_its_format_was_written_is_a_new_store(tmp_path: Path) -> None:
    (tmp_path / "store/tmp").mkdir(parents=True)
    (tmp_path / "store/tmp/123-abc").write_bytes(b"left")
    assert make(open_store(str(tmp_path / "store")), tmp_path, 1)[0].number == 0


@pytest.mark.parametrize(
    "header, message",
    [
        (b'{"format": "artifactfs-store", "version": 2}', "store format 2; this artifactfs reads up to 1: upgrade artifactfs"),
        (b'{"format": "other", "version": 1}', "says format 'other'"),
        (b'{"format": "artifactfs-store"}', "cannot be read"),
        (b'{"format": "artifactfs-store", "version": "1"}', "cannot be read"),
        (b"[]", "cannot be read"),
        (b"", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (json.dumps({"format": "x\n\033[31m" * 1000, "version": 1}).encode(), "says format"),
    ],
)
def test_stores_of_other_formats_are_refused(tmp_path: Path, header: bytes, message: str) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store/store.json").write_bytes(header)
    with pytest.raises(StoreFormatError, match=message) as caught:
        open_store(str(tmp_path / "store"))
    assert "\n" not in str(caught.value) and "\033" not in str(caught.value) and len(str(caught.value)) < 400


# Names


ODD = ["acme", "ac me", "ACME", "a+b", "=a", "é", "日本語" * 14, "x" * 128, "-", "~", "...", ".x", "a&b;c'd\"e"]


def test_names_of_every_kind(store: NativeStore, tmp_path: Path) -> None:
    for entity in ODD:
        for project in (ODD[-1], entity):
            make(store, tmp_path, 1, ArtifactName(entity, project, "c..d"))
    assert store.entities() == sorted(ODD)
    for entity in ODD:
        assert store.projects(entity) == sorted({ODD[-1], entity})
        assert [it.name for it in store.collections(entity, entity)] == ["c..d"]
        found = store.version(ArtifactName(entity, entity, "c..d"))
        assert (found.entity, found.project) == (entity, entity)
    assert problems(store.url) == []
    for path in Path(store.url).rglob("*"):
        assert str(path.relative_to(store.url)).isascii()


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_no_name_leads_out_of_the_catalog(store: NativeStore, tmp_path: Path, name: str) -> None:
    make(store, tmp_path, 1)
    for bad in (ArtifactName(name, "vision", "bikes"), ArtifactName("acme", name, "bikes"), ArtifactName("acme", "vision", name)):
        for look in (store.version, store.collection, store.versions, store.numbers, store.newest):
            with pytest.raises(InvalidNameError):
                look(bad)
    with pytest.raises(InvalidNameError):
        store.projects(name)


def test_what_is_not_there_is_said(store: NativeStore, tmp_path: Path) -> None:
    make(store, tmp_path, 2, aliases=["best"])
    for text, message in {
        "acme/vision/cars": "collection acme/vision/cars does not exist in .*; acme/vision has: bikes",
        "acme/visio/bikes": "collection acme/visio/bikes does not exist",
        "acme/vision/bikes:v7": "acme/vision/bikes has no version v7",
        "acme/vision/bikes:worst": "has no alias 'worst'; its aliases are: best, latest",
        "acme/vision/cars:v0": "does not exist",
    }.items():
        with pytest.raises(NotFoundError, match=message):
            store.version(parse(text))
    with pytest.raises(NotFoundError):
        store.versions(parse("acme/vision/cars"))
    with pytest.raises(NotFoundError):
        store.update_collection(parse("acme/vision/cars"), lambda it: it)
    with pytest.raises(NotFoundError):
        store.update_version(parse("acme/vision/bikes:v7"), lambda it: it)
    with pytest.raises(NotFoundError):
        store.delete_version(parse("acme/vision/bikes:v7"))


# Deleting


def test_deleting(store: NativeStore, tmp_path: Path) -> None:
    versions = make(store, tmp_path, 4)
    store.update_collection(NAME, lambda it: msgspec.structs.replace(it, aliases={**it.aliases, "best": 3, "old": 0}))
    with pytest.raises(ConflictError, match="v3 has the aliases best; move them first"):
        store.delete_version(NAME)
    assert store.version(NAME).number == 3
    deleted = store.delete_version(NAME, delete_aliases=True)
    assert deleted.state == "DELETED" and deleted.deleted_at
    assert store.collection(NAME).aliases == {"latest": 2, "old": 0}
    with pytest.raises(NotFoundError, match=r"acme/vision/bikes:v3 was deleted on 20\d\d-\d\d-\d\d"):
        store.version(NAME.at("v3"))
    with pytest.raises(NotFoundError):
        store.delete_version(NAME.at("v3"))
    store.delete_version(NAME.at("v1"))
    assert [it.number for it in store.versions(NAME)] == [0, 2]
    assert [it.number for it in store.versions(NAME, deleted=True)] == [0, 1, 2, 3]
    assert make(store, tmp_path / "more", 1)[0].number == 4, "numbers are not used again"
    for number in (0, 2, 4):
        store.delete_version(NAME.at(f"v{number}"), delete_aliases=True)
    assert store.collection(NAME).aliases == {} and store.versions(NAME) == []
    with pytest.raises(NotFoundError, match="no alias 'latest'; its aliases are: none"):
        store.version(NAME)
    assert [it.name for it in store.collections("acme", "vision")] == ["bikes"]
    assert contents(store, versions[0]), "what was deleted is there until it is collected"


def test_an_alias_cannot_be_moved_to_what_is_not_there(store: NativeStore, tmp_path: Path) -> None:
    make(store, tmp_path, 2)
    store.delete_version(NAME.at("v0"))
    for number in (0, 2):
        with pytest.raises(NotFoundError, match=f"v{number}"):
            store.update_collection(NAME, lambda it, number=number: msgspec.structs.replace(it, aliases={"a": number}))  # type: ignore[misc]
    assert store.collection(NAME).aliases == {"latest": 1}


# Changing


def test_changes_that_change_nothing_write_nothing(store: NativeStore, tmp_path: Path) -> None:
    make(store, tmp_path, 1)
    before = {path: path.stat().st_mtime_ns for path in Path(store.url, "catalog").rglob("*.json")}
    assert store.update_version(NAME, lambda it: it) == store.version(NAME)
    assert store.update_collection(NAME, lambda it: it) == store.collection(NAME)
    assert before == {path: path.stat().st_mtime_ns for path in Path(store.url, "catalog").rglob("*.json")}


def test_no_change_of_several_is_lost(tmp_path: Path, store: NativeStore) -> None:
    make(store, tmp_path, 1)

    def edit(who: int) -> None:
        mine = open_store(store.url)
        for number in range(25):
            tag = f"{who}-{number}"
            mine.update_version(NAME, lambda it, tag=tag: msgspec.structs.replace(it, tags=[*it.tags, tag]))  # type: ignore[misc]
            mine.update_collection(NAME, lambda it, tag=tag: msgspec.structs.replace(it, tags=[*it.tags, tag]))  # type: ignore[misc]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(edit, range(4)))
    expected = {f"{who}-{number}" for who in range(4) for number in range(25)}
    assert set(store.version(NAME).tags) == set(store.collection(NAME).tags) == expected
    assert store.version(NAME).updated_at > store.version(NAME).created_at


def test_a_change_that_raises_changes_nothing(store: NativeStore, tmp_path: Path) -> None:
    make(store, tmp_path, 1)

    def fail(it: Any) -> Any:
        raise ConflictError("no")

    for update in (store.update_version, store.update_collection):
        with nothing_leaks(), pytest.raises(ConflictError):
            update(NAME, fail)
    assert leftovers(store.url) == []


def test_what_could_not_be_read_again_is_not_written(store: NativeStore, tmp_path: Path) -> None:
    make(store, tmp_path, 1)
    for change in ({"description": "\udcff"}, {"description": "x" * (33 << 20)}):
        with pytest.raises(UsageError, match="stored"):
            store.update_version(NAME, lambda it, change=change: msgspec.structs.replace(it, **change))  # type: ignore[misc]
    assert store.version(NAME).description is None


# A collection whose first commit died before its collection.json


def test_a_collection_without_its_record_is_what_its_versions_say(store: NativeStore, tmp_path: Path) -> None:
    make(store, tmp_path, 3, type="model")
    record = Path(store.url, "catalog/acme/vision/bikes/collection.json")
    record.unlink()
    collection = store.collection(NAME)
    assert (collection.type, collection.aliases, collection.path) == ("model", {"latest": 2}, NAME.path)
    assert store.version(NAME).number == 2
    assert not record.exists(), "looking writes nothing"
    store.update_collection(NAME, lambda it: msgspec.structs.replace(it, tags=["x"]))
    assert store.collection(NAME).aliases == {"latest": 2} and record.exists()
    record.unlink()
    make(store, tmp_path / "more", 1, type="model")
    assert store.collection(NAME).aliases == {"latest": 3}


# Records that are damaged


def _edit(path: Path, **fields: Any) -> None:
    record = json.loads(path.read_bytes())
    for key, value in fields.items():
        if value is ...:
            del record[key]
        else:
            record[key] = value
    path.write_text(json.dumps(record))


BAD_VERSIONS: list[dict[str, Any]] = [
    {"number": 7},
    {"number": -1},
    {"number": "1"},
    {"collection": "other"},
    {"entity": "../.."},
    {"project": ""},
    {"root": ...},
    {"root": None},
    {"root": [1, "", "AAAA", None, 0, 0, 0, 0]},
    {"root": [0, "x", 1, False, base64.b64encode(bytes(32)).decode()]},
    {"size": -1},
    {"size": 1 << 63},
    {"size": 1.5},
    {"file_count": -1},
    {"state": "GONE"},
    {"created_at": "yesterday"},
    {"created_at": "2026-01-01T00:00:00"},
    {"created_at": "9999999-01-01T00:00:00Z"},
    {"updated_at": ""},
    {"deleted_at": "x"},
    {"state": "DELETED"},
    {"metadata": []},
    {"tags": [1]},
    {"ttl": -1},
    {"ttl": 1 << 60},
    {"commit": ...},
]


@pytest.mark.parametrize("fields", BAD_VERSIONS)
def test_a_version_whose_record_cannot_be_hides_no_other(store: NativeStore, tmp_path: Path, fields: dict[str, Any]) -> None:
    make(store, tmp_path, 3)
    _edit(Path(store.url, "catalog/acme/vision/bikes/versions/00000001.json"), **fields)
    with pytest.raises(IntegrityError, match=r"versions/00000001\.json") as caught:
        store.version(NAME.at("v1"))
    assert "\n" not in str(caught.value)
    assert [it.number for it in store.versions(NAME)] == [0, 2]
    assert store.version(NAME).number == 2
    found = problems(store.url)
    assert [it.where for it in found] == ["acme/vision/bikes:v1"]
    assert make(store, tmp_path / "more", 1)[0].number == 3


def test_a_damaged_newest_version_does_not_stop_the_collection(store: NativeStore, tmp_path: Path) -> None:
    make(store, tmp_path, 2)
    Path(store.url, "catalog/acme/vision/bikes/versions/00000001.json").write_bytes(b"{")
    assert make(store, tmp_path / "more", 1)[0].number == 2
    assert store.collection(NAME).aliases == {"latest": 2}


def test_fields_of_a_newer_program_are_kept_out_of_the_way(store: NativeStore, tmp_path: Path) -> None:
    made = make(store, tmp_path, 1)
    _edit(Path(store.url, "catalog/acme/vision/bikes/versions/00000000.json"), colour="blue")
    _edit(Path(store.url, "catalog/acme/vision/bikes/collection.json"), colour={"a": [1]})
    assert store.versions(NAME) == made
    _edit(Path(store.url, "catalog/acme/vision/bikes/versions/00000000.json"), tags=..., ttl=..., metadata=..., description=...)
    assert store.versions(NAME) == made, "a missing one takes its default"


@pytest.mark.parametrize(
    "fields",
    [{"name": "other"}, {"type": 5}, {"aliases": {"latest": -1}}, {"aliases": {"a/b": 0}}, {"aliases": {"": 0}}, {"aliases": []}],
)
def test_a_damaged_collection_hides_no_other(store: NativeStore, tmp_path: Path, fields: dict[str, Any]) -> None:
    make(store, tmp_path, 1)
    make(store, tmp_path, 1, "acme/vision/cars")
    _edit(Path(store.url, "catalog/acme/vision/bikes/collection.json"), **fields)
    with pytest.raises(IntegrityError, match=r"bikes/collection\.json"):
        store.version(NAME)
    assert store.version(NAME.at("v0")).number == 0
    assert [it.name for it in store.collections("acme", "vision")] == ["cars"]
    assert [it.where for it in problems(store.url)] == ["acme/vision/bikes"]
    with pytest.raises(IntegrityError):
        make(store, tmp_path / "more", 1)
    assert store.numbers(NAME) == [0], "refused before a version was made"


@pytest.mark.parametrize("name", ["%2E%2E", "%2F", "a%2fb", "%zz", "..%2F..", "=####", "%FF", "lost+found", "a b", "%41"])
def test_names_in_the_catalog_that_are_none(store: NativeStore, tmp_path: Path, name: str) -> None:
    make(store, tmp_path, 1)
    folders = [f"catalog/{name}", f"catalog/acme/{name}", f"catalog/acme/vision/{name}"]
    for folder in folders:
        Path(store.url, folder, "versions").mkdir(parents=True)
        Path(store.url, folder, "versions/00000000.json").write_bytes(b"{}")
    assert store.entities() == ["acme"] and store.projects("acme") == ["vision"]
    assert [it.name for it in store.collections("acme", "vision")] == ["bikes"]
    assert {it.where for it in problems(store.url)} == set(folders)


@pytest.mark.parametrize(
    "name", ["1.json", "00000001", "0000000²0.json", "x.json", "00000001.json~", "-0000001.json", "sub/00000001.json"]
)
def test_files_beside_the_versions_that_are_none(store: NativeStore, tmp_path: Path, name: str) -> None:
    make(store, tmp_path, 1)
    path = Path(store.url, "catalog/acme/vision/bikes/versions", name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x")
    assert store.numbers(NAME) == [0]
    assert make(store, tmp_path / "more", 1)[0].number == 1


def test_large_numbers_of_versions(store: NativeStore, tmp_path: Path) -> None:
    first = make(store, tmp_path, 1)[0]
    jump = msgspec.structs.replace(first, number=123_456_789)
    assert store.create_version(jump)
    assert store.numbers(NAME) == [0, 123_456_789]
    assert make(store, tmp_path / "more", 1)[0].number == 123_456_790


def test_create_version_knows_its_own(store: NativeStore, tmp_path: Path) -> None:
    first = make(store, tmp_path, 1)[0]
    assert store.create_version(first), "this very commit's already"
    assert not store.create_version(msgspec.structs.replace(first, commit="another"))


# Runs and lineage


def run(id: str, **fields: Any) -> Run:
    return Run(entity="acme", project="vision", id=id, created_at=fields.pop("at", now()), updated_at=now(), **fields)


def test_runs(store: NativeStore, tmp_path: Path) -> None:
    store.save_run(run("b", at="2026-01-02T00:00:00.000000Z", used=["x"], config={"lr": 0.1}))
    assert open_store(store.url).run("acme", "vision", "b").config == {"lr": 0.1}, "also before anything was logged"
    store.save_run(run("a/odd id", at="2026-01-03T00:00:00.000000Z"))
    store.save_run(run("b", used=["y", "x"], logged=["z"], job_type="train"))
    merged = store.run("acme", "vision", "b")
    assert merged.used == ["x", "y"] and merged.logged == ["z"] and merged.job_type == "train"
    assert merged.created_at == "2026-01-02T00:00:00.000000Z"
    assert [it.id for it in store.runs("acme", "vision")] == ["b", "a/odd id"]
    with pytest.raises(NotFoundError, match="run acme/vision/c does not exist"):
        store.run("acme", "vision", "c")
    version = make(store, tmp_path, 1)[0]
    for id in ("b", "a/odd id", "b"):
        store.mark_used(version, store.run("acme", "vision", id))
    store.mark_used(version, run("never saved"))
    assert [it.id for it in store.used_by(version)] == ["a/odd id", "b"]
    assert store.used_by(make(store, tmp_path / "more", 1)[0]) == []


def test_long_names_of_runs(store: NativeStore, tmp_path: Path) -> None:
    long = Run(entity="é" * 64, project="ü" * 64, id="x" * 128, created_at=now(), updated_at=now())
    store.save_run(long)
    version = make(store, tmp_path, 1)[0]
    store.mark_used(version, long)
    assert store.used_by(version) == [long] == store.runs(long.entity, long.project)
    with pytest.raises(InvalidNameError, match="too long"):
        store.save_run(run("x" * 500))


def test_a_damaged_run_hides_no_other(store: NativeStore) -> None:
    store.save_run(run("a"))
    store.save_run(run("b"))
    Path(store.url, "runs/acme/vision/a.json").write_bytes(b"[" * 10_000)
    assert [it.id for it in store.runs("acme", "vision")] == ["b"]


# Reading contents


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 77])
def test_contents_read_as_they_were_written(store: NativeStore, tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    file = file_at(store, commit(store, {"x": new_file(tmp_path / "x", data)}).version, "x")
    content = store.local_content(file)
    assert content is not None
    for offset in (0, 1, BLOCK - 5, BLOCK, 2 * BLOCK - 1, size - 1, size, size + 1, 10 * BLOCK):
        for length in (0, 1, 10, BLOCK, 2 * BLOCK + 3, 100 * BLOCK):
            if offset >= 0:
                assert content.read(offset, length) == data[offset : offset + length]
    content.close()
    source = store.source(file)
    assert source.size == size and source.key == file.id
    for offset, length in ((0, size), (size // 3, size // 2), (size, 0)):
        assert b"".join(source.fetch(offset, length)) == data[offset : offset + length]


def test_closing_while_others_read(store: NativeStore, tmp_path: Path) -> None:
    """A read under way ends well: no descriptor is taken away from it and given to another file."""
    data = os.urandom(4 * BLOCK)
    file = file_at(store, commit(store, {"x": new_file(tmp_path / "x", data)}).version, "x")
    content = store.local_content(file)
    assert content is not None
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            assert content.read(BLOCK + 5, 2 * BLOCK) == data[BLOCK + 5 : 3 * BLOCK + 5]

    with nothing_leaks(), ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(3)]
        for _ in range(300):
            content.close()
        stop.set()
        for reader in readers:
            reader.result()
        content.close()


def test_what_is_open_stays_readable_when_it_is_collected(store: NativeStore, tmp_path: Path) -> None:
    data = os.urandom(2 * BLOCK)
    file = file_at(store, commit(store, {"x": new_file(tmp_path / "x", data)}).version, "x")
    content = store.local_content(file)
    assert content is not None and content.read(0, 10) == data[:10]
    for path in Path(store.url, "blobs").rglob("*"):
        if path.is_file():
            path.unlink()
    assert content.read(0, len(data)) == data
    content.close()
    with pytest.raises(IntegrityError, match="lost"):
        content.read(0, 1)
    with pytest.raises(IntegrityError, match="lost"):
        list(store.source(file).fetch(0, 10))


def test_collections_are_values(store: NativeStore, tmp_path: Path) -> None:
    make(store, tmp_path, 1)
    collection = store.collection(NAME)
    assert isinstance(collection, Collection) and collection.created_at.endswith("Z")
    assert MadeFolder({}).base is None
