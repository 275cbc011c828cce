"""The ``wandb://`` store, against a server of its protocol that knows nothing of artifactfs (``wandb_server``)."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from programs import Program
from wandb_server import KEY, Artifact, WandbServer, b64md5, running

from artifactfs import download
from artifactfs.cache import BlockCache
from artifactfs.errors import (
    ConflictError,
    IntegrityError,
    NetworkError,
    NotFoundError,
    NotPermittedError,
    SourceChangedError,
    UsageError,
)
from artifactfs.folders import LocalFolder, MadeFolder
from artifactfs.model import BLOCK, Dir, LinkedVersion, Ref, Remote, Run
from artifactfs.names import ArtifactName, parse
from artifactfs.publish import Draft, publish
from artifactfs.reader import WHOLE, Reader
from artifactfs.store.native import NativeStore
from artifactfs.store.urls import open_store
from artifactfs.store.wandb import WandbStore
from artifactfs.store.wandb.files import lifetime
from artifactfs.view import VersionView

BIKES = parse("ann/lab/bikes", "", "")
LARGE = bytes(os.urandom(WHOLE + 3 * BLOCK + 17))
FILES = {"a.txt": b"one", "dir/b.bin": b"\0" * 70_000, "dir/c/d": b"", "ä ö/x#y?.txt": b"odd"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    yield from running()


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[BlockCache]:
    cache = BlockCache(tmp_path / "cache", 1 << 30)
    yield cache
    cache.close()


def read_all(server: WandbServer, cache: BlockCache | None, name: ArtifactName, path: str, **options: Any) -> bytes:
    store = open_store(server.url, cache)
    version = store.version(name)
    entry = store.tree.resolve(version.root, path)
    assert isinstance(entry, (Remote, Ref))
    reader = Reader(store, cache, **options)
    try:
        with closing(reader.open(entry, f"{version.qualified_name}/{path}")) as handle:
            parts, offset = [], 0
            while data := handle.read(offset, BLOCK):
                parts.append(data)
                offset += len(data)
            return b"".join(parts)
    finally:
        reader.close()


def draft(folder: Any, **given: Any) -> Draft:
    return Draft(**{"name": BIKES, "type": "dataset", "folder": folder, "commit": uuid.uuid4().hex, **given})


def write(root: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return root


# The catalog


def test_what_is_there_is_listed_page_by_page(server: WandbServer, cache: BlockCache) -> None:
    for number in range(7):
        server.log_version("ann/lab/bikes", {"n": str(number).encode()}, aliases=("odd",) if number % 2 else ())
    for number in range(5):
        server.log_version(f"ann/lab/other-{number}", FILES, kind="model")
    server.log_version("team/lab2/x", FILES)
    store = open_store(server.url, cache)
    assert store.entities() == ["ann", "team"]
    assert store.projects("ann") == ["lab"] and store.projects("team") == ["lab2"]
    assert [it.name for it in store.collections("ann", "lab")] == ["bikes", *(f"other-{number}" for number in range(5))]
    assert store.collections("ann", "nothing") == []
    assert [it.name for it in store.versions(BIKES)] == [f"v{number}" for number in range(7)]
    assert store.collection(BIKES).aliases == {"latest": 6, "odd": 5}
    assert store.version(BIKES).number == 6 and store.version(BIKES.at("odd")).number == 5
    assert store.default_entity() == "ann"
    for missing in ("v9", "none"):
        with pytest.raises(NotFoundError, match="bikes has no"):
            store.version(BIKES.at(missing))
    with pytest.raises(NotFoundError, match="collection ann/lab/cars does not exist"):
        store.version(parse("ann/lab/cars", "", ""))
    assert store.newest(parse("ann/lab/cars", "", "")) is None


def test_nothing_of_the_files_is_asked_for_before_somebody_looks(server: WandbServer, cache: BlockCache) -> None:
    server.log_version("ann/lab/bikes", FILES)
    store = open_store(server.url, cache)
    version = store.versions(BIKES)[0]
    assert "FetchArtifactManifest" not in server.asked
    assert [path for path, entry in store.tree.walk(version.root) if not isinstance(entry, Dir)] == sorted(FILES)
    assert server.asked.count("FetchArtifactManifest") == 1
    again = open_store(server.url, cache)
    assert len(list(again.tree.walk(again.version(BIKES).root))) == 7
    assert server.asked.count("FetchArtifactManifest") == 1  # it is kept by the version's id


def test_offline_what_was_read_is_there(server: WandbServer, cache: BlockCache) -> None:
    server.log_version("ann/lab/bikes", FILES)
    assert read_all(server, cache, BIKES, "dir/b.bin") == FILES["dir/b.bin"]
    server.stop()
    store = open_store(server.url, cache, offline=True)
    entry = store.tree.resolve(store.version(BIKES).root, "dir/b.bin")
    assert isinstance(entry, Remote)
    with closing(Reader(store, cache, offline=True).open(entry)) as handle:
        assert handle.read(0, 100_000) == FILES["dir/b.bin"]


# Reading


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("path", sorted(FILES))
def test_every_file_is_read(server: WandbServer, cache: BlockCache, path: str, cached: bool) -> None:
    server.log_version("ann/lab/bikes", FILES)
    assert read_all(server, cache if cached else None, BIKES, path) == FILES[path]


@pytest.mark.parametrize("etags", [True, False])
def test_a_large_file_is_verified_once_all_of_it_is_here(server: WandbServer, cache: BlockCache, etags: bool) -> None:
    server.etags = etags
    server.log_version("ann/lab/bikes", {"large": LARGE})
    store = open_store(server.url, cache)
    version = store.version(BIKES)
    reader = Reader(store, cache)
    view = VersionView(store, reader, version)
    entry = store.tree.resolve(version.root, "large")
    assert isinstance(entry, Remote)
    with closing(reader.open(entry)) as handle:
        assert handle.read(5 * BLOCK, 10) == LARGE[5 * BLOCK : 5 * BLOCK + 10]
        assert view.getxattr("/large", "user.artifactfs.verified") == b"false"
        assert b"".join(handle.read(at, BLOCK) for at in range(0, len(LARGE), BLOCK)) == LARGE
        assert view.getxattr("/large", "user.artifactfs.verified") == b"true"
    assert view.getxattr("/large", "user.artifactfs.digest").decode() == b64md5(LARGE)
    reader.close()
    if etags:
        before = len(server.log)
        again = Reader(store, cache, offline=True)
        assert again.is_verified(entry) and again.cached_bytes(entry) == len(LARGE)
        with closing(again.open(entry)) as handle:
            assert handle.read(BLOCK + 5, 100) == LARGE[BLOCK + 5 : BLOCK + 105]
        assert len(server.log) == before


@pytest.mark.parametrize("cached", [True, False])
def test_a_wrong_checksum_is_never_served_as_a_whole(
    server: WandbServer, cache: BlockCache, cached: bool, caplog: pytest.LogCaptureFixture
) -> None:
    server.log_version("ann/lab/bikes", {"large": LARGE, "small": b"s" * 100_000})
    for place, data in server.blobs.items():
        server.blobs[place] = data[:-1] + bytes([data[-1] ^ 1])
    for path in ("small", "large"):
        with pytest.raises(IntegrityError, match="MD5 is another"):
            read_all(server, cache if cached else None, BIKES, path)
    assert "bikes:v0/large" in caplog.text
    assert cache.info().contents == 0  # nothing of either stayed


def test_after_a_wrong_whole_every_read_fails(server: WandbServer, cache: BlockCache) -> None:
    server.log_version("ann/lab/bikes", {"large": LARGE})
    (place,) = server.blobs
    server.blobs[place] = b"x" + LARGE[1:]
    store = open_store(server.url, cache)
    entry = store.tree.resolve(store.version(BIKES).root, "large")
    assert isinstance(entry, Remote)
    with closing(Reader(store, cache)) as reader, closing(reader.open(entry)) as handle:
        with pytest.raises(IntegrityError):
            for at in range(0, len(LARGE), BLOCK):
                handle.read(at, BLOCK)
        for at in (0, BLOCK, 3 * BLOCK):
            with pytest.raises(IntegrityError):
                handle.read(at, 10)


def test_a_file_that_changes_between_two_ranges(server: WandbServer, cache: BlockCache) -> None:
    server.log_version("ann/lab/bikes", {"large": LARGE})
    (place,) = server.blobs
    store = open_store(server.url, cache)
    entry = store.tree.resolve(store.version(BIKES).root, "large")
    assert isinstance(entry, Remote)
    with closing(Reader(store, cache)) as reader:
        with closing(reader.open(entry)) as handle:
            assert handle.read(0, 10) == LARGE[:10]
            server.blobs[place] = LARGE[::-1]
            with pytest.raises(SourceChangedError):
                handle.read(6 * BLOCK, 10)
        server.blobs[place] = LARGE
        with closing(reader.open(entry)) as handle:
            assert handle.read(6 * BLOCK, 10) == LARGE[6 * BLOCK : 6 * BLOCK + 10]


def test_a_url_that_ends_in_the_middle_of_a_read(server: WandbServer, cache: BlockCache) -> None:
    server.log_version("ann/lab/bikes", {"large": LARGE})
    store = open_store(server.url, cache)
    entry = store.tree.resolve(store.version(BIKES).root, "large")
    assert isinstance(entry, Remote)
    with closing(Reader(store, cache)) as reader, closing(reader.open(entry)) as handle:
        for at in range(0, len(LARGE), BLOCK):
            assert handle.read(at, BLOCK) == LARGE[at : at + BLOCK]
            server.secret = os.urandom(16)  # every URL that was given out is void


def test_without_signed_urls_the_server_itself_is_asked(server: WandbServer, cache: BlockCache) -> None:
    server.sign = False
    server.log_version("ann/lab/bikes", {"x": b"here", "large": LARGE})
    assert read_all(server, cache, BIKES, "x") == b"here"
    assert read_all(server, cache, BIKES, "large") == LARGE


def test_many_files_are_asked_for_in_pages(server: WandbServer, cache: BlockCache) -> None:
    server.page = 100
    files = {f"{number:03}": str(number).encode() for number in range(60)}
    server.log_version("ann/lab/bikes", files)
    store = open_store(server.url, cache)
    root = store.version(BIKES).root
    with closing(Reader(store, cache)) as reader:
        for path, data in files.items():
            entry = store.tree.resolve(root, path)
            assert isinstance(entry, Remote)
            with closing(reader.open(entry)) as handle:
                assert handle.read(0, 99) == data
    assert server.asked.count("ArtifactMembershipFiles") + server.asked.count("GetArtifactMembershipFileUrls") < 10


def test_the_key_goes_to_the_server_alone(server: WandbServer, cache: BlockCache) -> None:
    (Path.home() / ".netrc").write_text("machine 127.0.0.1\n login api\n password for-somebody-else\n")
    (Path.home() / ".netrc").chmod(0o600)
    server.log_version("ann/lab/bikes", FILES)
    assert read_all(server, cache, BIKES, "a.txt") == b"one"
    server.sign = False
    assert read_all(server, None, BIKES, "a.txt") == b"one"
    with_key = {
        "/graphql" if path == "/graphql" else path.split("/")[1] for _, path, sent in server.log if "Authorization" in sent
    }
    assert with_key == {"/graphql", "artifactsV2"}


def test_a_key_in_netrc(server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    server.log_version("ann/lab/bikes", FILES)
    store = open_store(server.url)
    with pytest.raises(NotPermittedError, match=r"no API key for 127\.0\.0\.1"):
        store.version(BIKES)
    (Path.home() / ".netrc").write_text(f"machine {server.url.removeprefix('wandb://')}\n login api\n password {KEY}\n")
    (Path.home() / ".netrc").chmod(0o600)
    assert store.version(BIKES).number == 0


def test_a_key_that_is_revoked_and_comes_back(server: WandbServer, cache: BlockCache) -> None:
    server.log_version("ann/lab/bikes", FILES)
    store = open_store(server.url, cache)
    view = VersionView(store, Reader(store, cache), store.version(BIKES))
    assert [item.name for item in view.readdir("/")][-1]
    server.keys = set()
    handle = view.open("/a.txt", os.O_RDONLY)
    with pytest.raises(NotPermittedError, match="does not accept your API key"):
        view.read(handle, 10, 0)
    server.keys = {KEY}
    assert view.read(handle, 10, 0) == b"one"
    view.close()


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again(server: WandbServer, cache: BlockCache, status: int) -> None:
    server.log_version("ann/lab/bikes", {"large": LARGE})
    seen: dict[str, int] = {}

    def busy(method: str, path: str) -> tuple[int, dict[str, str]] | None:
        path = path.partition("?")[0]
        seen[path] = seen.get(path, 0) + 1
        return (status, {"Retry-After": "0"}) if seen[path] == 1 else None

    server.fail = busy
    assert read_all(server, cache, BIKES, "large") == LARGE


def test_a_server_that_stays_busy_is_given_up(server: WandbServer) -> None:
    server.fail = lambda method, path: (503, {"Retry-After": "0"})
    with pytest.raises(NetworkError, match="503"):
        open_store(server.url).version(BIKES)


def test_cut_answers_are_asked_for_again(server: WandbServer, cache: BlockCache) -> None:
    server.log_version("ann/lab/bikes", {"large": LARGE, "x": b"x" * 1000})
    cuts = iter(range(1, 10_000))
    server.cut = lambda path, body: body[: len(body) // 2] if next(cuts) % 2 else body
    assert read_all(server, cache, BIKES, "x") == b"x" * 1000
    assert read_all(server, cache, BIKES, "large") == LARGE


def test_references(server: WandbServer, cache: BlockCache, tmp_path: Path) -> None:
    target = server.log_version("ann/lab/target", {"deep/file": b"referred to"})
    (tmp_path / "f").write_bytes(b"local")
    hexed = base64.b64decode(target.id).hex()

    def add(manifest: dict[str, Any]) -> None:
        manifest["contents"]["here"] = {
            "digest": b64md5(b"referred to"), "size": 0, "ref": f"wandb-artifact://{hexed}/deep/file"
        }  # fmt: skip
        manifest["contents"]["local"] = {"digest": b64md5(b"local"), "size": 5, "ref": f"file://{tmp_path}/f"}
        manifest["contents"]["s3"] = {
            "digest": "e",
            "size": 7,
            "ref": "s3://b/k",
            "extra": {"etag": "e", "versionID": "v", "x": []},
        }

    server.log_version("ann/lab/bikes", {}, manifest=add)
    store = open_store(server.url, cache)
    version = store.version(BIKES)
    view = VersionView(store, Reader(store, cache), version)
    assert view.getattr("/here").size == len(b"referred to")
    for path, data in (("/here", b"referred to"), ("/local", b"local")):
        assert view.read(view.open(path, os.O_RDONLY), 100, 0) == data
    assert view.getxattr("/s3", "user.artifactfs.ref") == b"s3://b/k"
    entry = store.tree.resolve(version.root, "s3")
    assert isinstance(entry, Ref) and entry.extra == {"etag": "e", "versionID": "v"}
    view.close()


# Hostile manifests

GOOD = {"digest": b64md5(b""), "size": 0}


@pytest.mark.parametrize(
    "contents",
    [
        {"../x": GOOD},
        {"a/../../x": GOOD},
        {"/etc/passwd": GOOD},
        {"C:\\x": GOOD},
        {"": GOOD},
        {".": GOOD},
        {"a//b": GOOD},
        {"./a": GOOD},
        {"a/": GOOD},
        {"a\nb": GOOD},
        {"a\0b": GOOD},
        {"x" * 256: GOOD},
        {"/".join("d" * 300): GOOD},
        {"a": GOOD, "a/b": GOOD},
        {"a": GOOD, "a-b": GOOD, "a/b": GOOD},
        {"x": {**GOOD, "size": -1}},
        {"x": {**GOOD, "size": 1 << 80}},
        {"x": {**GOOD, "size": "7"}},
        {"x": {**GOOD, "size": True}},
        {"x": {**GOOD, "size": None}},
        {"x": {**GOOD, "digest": "not base64!"}},
        {"x": {**GOOD, "digest": "QUJD"}},
        {"x": {**GOOD, "digest": 7}},
        {"x": {"size": 1}},
        {"x": {**GOOD, "ref": 7}},
        {"x": {**GOOD, "ref": "no scheme"}},
        {"x": {**GOOD, "birthArtifactID": ["x"]}},
        {"x": []},
        {"x": None},
        [],
    ],
    ids=lambda contents: ascii(contents)[:40],
)
def test_a_hostile_manifest_is_refused(server: WandbServer, cache: BlockCache, contents: Any) -> None:
    server.log_version("ann/lab/bikes", {}, manifest=lambda whole: whole.update(contents=contents))
    store = open_store(server.url, cache)
    version = store.version(BIKES)
    with pytest.raises(IntegrityError, match=r"manifest|lists|refused"):
        list(store.tree.walk(version.root))


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"<html>",
        b'{"version": 1, "contents": {"a": {"digest": "' + b64md5(b"").encode() + b'", "size": 0}',
        b'{"version": 2, "contents": {}}',
        b'{"version": 1}',
        b'{"version": 1, "storagePolicyConfig": {"storageLayout": "V9"}, "contents": {}}',
        b'{"version": 1, "contents": {"a": {"digest": "%b", "size": 0}, "a": {"digest": "%b", "size": 0}}}'
        % (b64md5(b"").encode(), b64md5(b"").encode()),
        b'{"version": 1, "contents": {"a": ' + b"[" * 100_000 + b"}}",
    ],
    ids=["empty", "html", "cut", "version", "none", "layout", "twice", "deep"],
)
def test_what_is_no_manifest_is_refused(server: WandbServer, cache: BlockCache, manifest: bytes) -> None:
    server.log_version("ann/lab/bikes", {}, manifest=manifest)
    store = open_store(server.url, cache)
    with pytest.raises(IntegrityError):
        list(store.tree.walk(store.version(BIKES).root))


def test_an_empty_file_with_another_checksum(server: WandbServer, cache: BlockCache) -> None:
    wrong = {"x": {"digest": b64md5(b"something"), "size": 0}}
    server.log_version("ann/lab/bikes", {}, manifest=lambda whole: whole.update(contents=wrong))
    with pytest.raises(IntegrityError, match="MD5 is another"):
        read_all(server, cache, BIKES, "x")


def test_local_paths_of_a_manifest_are_never_looked_at(server: WandbServer, cache: BlockCache, tmp_path: Path) -> None:
    server.log_version("ann/lab/bikes", FILES)  # each entry names /etc/passwd as its local_path
    assert read_all(server, cache, BIKES, "a.txt") == b"one"


# Downloads


def test_download_verify_and_checkout(server: WandbServer, cache: BlockCache, tmp_path: Path) -> None:
    files = {**FILES, "large": LARGE}
    server.log_version("ann/lab/bikes", files)
    store = open_store(server.url, cache)
    version = store.version(BIKES)
    with closing(Reader(store, cache)) as reader:
        download.get(store, reader, version, str(tmp_path / "got"))
        assert {
            str(p.relative_to(tmp_path / "got")): p.read_bytes() for p in (tmp_path / "got").rglob("*") if p.is_file()
        } == files
        assert download.verify(store, reader, version, str(tmp_path / "got")) == []
        assert download.verify_stored(store, reader, version) == []
        (tmp_path / "got/a.txt").write_bytes(b"two")
        (tmp_path / "got/more").write_bytes(b"")
        assert [problem.path for problem in download.verify(store, reader, version, str(tmp_path / "got"))] == ["a.txt", "more"]
        before = len(server.log)
        download.checkout(store, reader, version, str(tmp_path / "got"))
        assert download.verify(store, reader, version, str(tmp_path / "got")) == []
        assert len(server.log) == before  # the one that differed was in the cache


# Making versions


def test_log_and_read_back(server: WandbServer, cache: BlockCache, tmp_path: Path) -> None:
    files = {**FILES, "large": LARGE, "same": FILES["a.txt"]}
    store = open_store(server.url, cache)
    given = {"description": "d", "metadata": {"k": [1, None]}, "tags": ["t"], "aliases": ["best"], "ttl": 3600}
    done = publish(store, draft(LocalFolder(str(write(tmp_path / "in", files))), **given))
    assert done.created and done.version.name == "v0"
    version = store.version(BIKES.at("best"))
    assert (version.description, version.metadata, version.tags, version.ttl) == ("d", {"k": [1, None]}, ["t"], 3600)
    lines = "".join(f"{path}:{b64md5(data)}\n" for path, data in sorted(files.items()))
    assert version.digest == hashlib.md5(b"wandb-artifact-manifest-v1\n" + lines.encode()).hexdigest()
    (artifact,) = server.artifacts.values()
    assert list(artifact.contents) == sorted(files)
    for path, data in files.items():
        assert read_all(server, cache, BIKES, path) == data


def test_the_same_again_is_no_new_version(server: WandbServer, cache: BlockCache, tmp_path: Path) -> None:
    store = open_store(server.url, cache)
    folder = LocalFolder(str(write(tmp_path / "in", FILES)))
    first = publish(store, draft(folder))
    again = publish(store, draft(folder, aliases=["again"]))
    assert not again.created and again.version.commit == first.version.commit
    assert store.version(BIKES.at("again")).number == 0
    assert publish(store, draft(folder, always=True)).version.number == 1


def test_what_did_not_change_is_not_sent_again(server: WandbServer, cache: BlockCache, tmp_path: Path) -> None:
    store = open_store(server.url, cache)
    first = publish(store, draft(LocalFolder(str(write(tmp_path / "in", {**FILES, "large": LARGE}))))).version
    puts = len([1 for method, _, _ in server.log if method == "PUT"])
    changes = {"new": LocalFolder(str(write(tmp_path / "more", {"x": b"new"}))), "a.txt": None}
    second = publish(store, draft(MadeFolder(changes, base=first.root))).version
    assert second.number == 1
    assert len([1 for method, _, _ in server.log if method == "PUT"]) == puts + 2  # the new file, and the manifest
    files = {path: data for path, data in FILES.items() if path != "a.txt"}
    assert {path for path, entry in store.tree.walk(second.root) if not isinstance(entry, Dir)} == {*files, "large", "new/x"}
    assert read_all(server, None, BIKES, "large") == LARGE and read_all(server, None, BIKES, "new/x") == b"new"


def test_parts_of_a_very_large_file(
    server: WandbServer, cache: BlockCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("artifactfs.store.wandb.saving.MULTIPART", 3 * BLOCK)
    monkeypatch.setattr("artifactfs.store.wandb.saving.PART", BLOCK)
    store = open_store(server.url, cache)
    publish(store, draft(LocalFolder(str(write(tmp_path / "in", {"large": LARGE})))))
    assert server.asked.count("CompleteMultipartUploadArtifact") == 1
    assert read_all(server, cache, BIKES, "large") == LARGE


def test_what_a_server_cannot_hold_is_refused_before_anything_is_sent(
    server: WandbServer, cache: BlockCache, tmp_path: Path
) -> None:
    store = open_store(server.url, cache)
    root = write(tmp_path / "in", FILES)
    (root / "link").symlink_to("a.txt")
    with pytest.raises(UsageError, match="'link' is a symlink"):
        publish(store, draft(LocalFolder(str(root))))
    (root / "link").unlink()
    (root / "a\nb").write_bytes(b"")
    with pytest.raises(UsageError, match="line break"):
        publish(store, draft(LocalFolder(str(root))))
    (root / "a\nb").unlink()
    publish(store, draft(LocalFolder(str(root))))
    with pytest.raises(UsageError, match="already exists with type 'dataset'"):
        publish(store, draft(LocalFolder(str(root)), type="model"))
    with pytest.raises(ConflictError, match="is at v0"):
        publish(store, draft(LocalFolder(str(root)), expect_base=-1))
    with pytest.raises(UsageError, match="semantic versions"):
        publish(store, draft(LocalFolder(str(root)), semver="1.0.0"))
    assert [it.state for it in server.artifacts.values()] == ["COMMITTED"]


def test_an_entry_of_a_server_cannot_get_into_a_native_store(server: WandbServer, cache: BlockCache, tmp_path: Path) -> None:
    server.log_version("ann/lab/bikes", FILES)
    store = open_store(server.url, cache)
    entry = store.tree.resolve(store.version(BIKES).root, "a.txt")
    native = open_store(str(tmp_path / "native"))
    assert isinstance(native, NativeStore)
    with pytest.raises(UsageError, match="copy the version"):
        publish(native, draft(MadeFolder({"a.txt": entry})))  # type: ignore[dict-item]


# Changes


def test_aliases_tags_and_the_rest(server: WandbServer, cache: BlockCache) -> None:
    server.log_version("ann/lab/bikes", FILES, aliases=("old",))
    server.log_version("ann/lab/bikes", {"x": b"1"})
    store = open_store(server.url, cache)
    changed = store.update_collection(
        BIKES, lambda it: msgspec.structs.replace(it, aliases={"latest": 1, "new": 0}, tags=["t"], description="of bikes")
    )
    assert changed == msgspec.structs.replace(
        store.collection(BIKES), updated_at=changed.updated_at, created_at=changed.created_at
    )
    store.update_version(
        BIKES.at("v0"),
        lambda it: msgspec.structs.replace(it, description="x", metadata={"a": 1}, tags=["u"], ttl=60, ttl_inherited=False),
    )
    found = store.version(BIKES.at("new"))
    assert (found.number, found.description, found.metadata, found.tags, found.ttl) == (0, "x", {"a": 1}, ["u"], 60)
    store.update_version(BIKES.at("v0"), lambda it: msgspec.structs.replace(it, tags=[]))
    assert store.version(BIKES.at("v0")).tags == []
    with pytest.raises(ConflictError, match="has the aliases new"):
        store.delete_version(BIKES.at("v0"))
    store.delete_version(BIKES.at("v0"), delete_aliases=True)
    assert [it.number for it in store.versions(BIKES)] == [1]


def test_links(server: WandbServer, cache: BlockCache) -> None:
    server.log_version("ann/lab/other", {"y": b"2"})
    server.log_version("ann/lab/bikes", FILES)
    store = open_store(server.url, cache)
    target = parse("ann/lab/shelf", "", "")
    version = store.version(BIKES)
    link = store.link(version, target, ["prod"])
    assert isinstance(link, LinkedVersion) and link.source.qualified_name == version.qualified_name
    assert store.collection(target).is_portfolio
    assert store.version(target.at("prod")).origin.qualified_name == version.qualified_name
    assert read_all(server, cache, target, "a.txt") == b"one"
    assert [it.qualified_name for it in store.links_of(version)] == ["ann/lab/shelf:v0"]
    store.unlink(target.at("v0"))
    assert store.links_of(version) == []
    with pytest.raises(UsageError, match="no link"):
        store.unlink(BIKES)


def test_lineage(server: WandbServer, cache: BlockCache, tmp_path: Path) -> None:
    store = open_store(server.url, cache)
    made = publish(store, draft(LocalFolder(str(write(tmp_path / "in", FILES))), run="ann/lab/r1")).version
    time_ = made.created_at
    store.mark_used(made, Run(entity="ann", project="lab", id="r2", created_at=time_, updated_at=time_))
    assert [run.path for run in store.used_by(made)] == ["ann/lab/r2"]
    assert store.version(BIKES).run == "ann/lab/r1"
    assert store.run("ann", "lab", "r1").logged == [made.qualified_name]
    assert store.run("ann", "lab", "r2").used == [made.qualified_name]


def test_what_servers_do_not_have_says_so(server: WandbServer, cli: Program) -> None:
    for command in ("gc", "fsck"):
        done = cli(command, code=2)
        assert server.url in done.err and "cannot be" in done.err, done.err


@pytest.mark.parametrize(
    "url",
    ["wandb://u:p@host", "wandb://host/path", "wandb://host?x=1", "wandb://host?scheme=ftp", "wandb://:80", "wandb://host:x"],
)
def test_urls_that_cannot_be(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_store(url)
    assert "p@" not in str(caught.value)


@pytest.mark.parametrize(
    "given, url",
    [
        ("", "wandb://api.wandb.ai"),
        ("http://127.0.0.1:8080/", "wandb://127.0.0.1:8080"),
        ("https://corp.example", "wandb://corp.example"),
        ("http://corp.example:8080", "wandb://corp.example:8080?scheme=http"),
        ("https://localhost:9/wandb", "wandb://localhost:9?scheme=https&path=/wandb"),
    ],
)
def test_the_server_that_the_environment_names_is_recorded(given: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stage notes means the same server when the environment is another one."""
    monkeypatch.setenv("WANDB_BASE_URL", given)
    store = open_store("wandb://")
    assert (
        isinstance(store, WandbStore) and store.url == url and store.client.base == (given.rstrip("/") or "https://api.wandb.ai")
    )
    monkeypatch.setenv("WANDB_BASE_URL", "https://elsewhere.example")
    again = open_store(store.url)
    assert isinstance(again, WandbStore) and (again.url, again.client.base) == (url, store.client.base)


def test_an_identity_token_is_no_key(server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_IDENTITY_TOKEN_FILE", "/some/token")
    with pytest.raises(NotPermittedError, match=r"identity tokens .* are not used; set WANDB_API_KEY"):
        open_store(server.url).version(BIKES)


def test_how_long_urls_live() -> None:
    now = time.gmtime()
    date = time.strftime("%Y%m%dT%H%M%SZ", now)
    assert 500 < lifetime(f"https://h/x?X-Amz-Date={date}&X-Amz-Expires=600") <= 570
    assert lifetime("https://h/x?X-Goog-Date=20200101T000000Z&X-Goog-Expires=600") == 300.0
    assert 60 < lifetime(f"https://h/x?Expires={int(time.time()) + 100}&Signature=x") <= 80
    assert lifetime("https://h/x") == float("inf")


# The command line, and mounts


@pytest.fixture
def cli(server: WandbServer, afs: Program, monkeypatch: pytest.MonkeyPatch) -> Program:
    """The program with the server as its store."""
    for name, value in {"ARTIFACTFS_STORE": server.url, "WANDB_ENTITY": "ann", "WANDB_PROJECT": "lab"}.items():
        monkeypatch.setenv(name, value)
    return afs


def test_commands(server: WandbServer, cli: Program, tmp_path: Path) -> None:
    root = write(tmp_path / "in", FILES)
    assert cli("log", "bikes", str(root), "--alias", "best").out.strip().endswith("bikes:v0")
    assert json.loads(cli("--json", "info", "bikes:best").out)["file_count"] >= 0
    assert "a.txt" in cli("ls", "bikes:latest").out
    cli("get", "bikes", str(tmp_path / "out"))
    cli("verify", "bikes", str(tmp_path / "out"))
    subprocess.run(["diff", "-r", str(root), str(tmp_path / "out")], check=True)
    cli("alias", "bikes:v0", "add", "more")
    cli("info", "bikes:nope", code=3)
    server.keys = set()
    cli("info", "bikes", code=7)


@pytest.mark.fuse
def test_mount_and_stage(server: WandbServer, cli: Program, tmp_path: Path) -> None:
    server.log_version("ann/lab/bikes", {**FILES, "large": LARGE})
    where = tmp_path / "m"
    where.mkdir()
    cli("mount", "bikes:latest", str(where))
    try:
        assert (where / "large").read_bytes() == LARGE
        assert os.getxattr(where / "large", "user.artifactfs.verified") == b"true"
        assert sorted(str(p.relative_to(where)) for p in where.rglob("*") if p.is_file()) == sorted([*FILES, "large"])
    finally:
        cli("unmount", str(where))
    cli("stage", "bikes", str(where))
    try:
        with open(where / "large", "r+b") as file:
            file.seek(2 * BLOCK)
            file.write(b"changed")
        (where / "new").write_bytes(b"new")
        (where / "a.txt").unlink()
    finally:
        assert "bikes:v1" in cli("unmount", str(where)).out
    changed = LARGE[: 2 * BLOCK] + b"changed" + LARGE[2 * BLOCK + 7 :]
    assert read_all(server, None, BIKES, "large") == changed
    assert read_all(server, None, BIKES, "new") == b"new"
    with pytest.raises(AssertionError):
        read_all(server, None, BIKES, "a.txt")
    cli("mount", "ann/lab", str(where))
    try:
        assert sorted(os.listdir(where)) == ["bikes"]
        assert (where / "bikes/v0/a.txt").read_bytes() == b"one"
        assert os.readlink(where / "bikes/latest") == "v1"
    finally:
        cli("unmount", str(where))


_MILLION = """
import sys
from pathlib import Path
from artifactfs.cache import BlockCache
from artifactfs.names import parse
from artifactfs.store.urls import open_store
cache = BlockCache(Path(sys.argv[2]), 1 << 30)
store = open_store(sys.argv[1], cache)
def peak():
    return int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]) // 1024
before = peak()
version = store.version(parse("ann/lab/bikes", "", ""))
entry = store.tree.resolve(version.root, "d0177/00177-0500.bin")
assert entry is not None and entry.size == 500, entry
print(peak() - before)
"""


FOLDERS = 1000 if "ARTIFACTFS_LONG_TESTS" in os.environ else 200
"""Of 1,000 entries each. The bound on the memory is the same for both."""


@pytest.mark.slow
def test_a_million_entries_in_bounded_memory(server: WandbServer, tmp_path: Path) -> None:
    digest = b64md5(b"x")
    lines = (
        f'"d{folder:04}/{folder:05}-{number:04}.bin":{{"digest":"{digest}","size":{number},"birthArtifactID":"QUJD"}}'
        for folder in range(FOLDERS)
        for number in range(1000)
    )
    manifest = b'{"version":1,"storagePolicyConfig":{"storageLayout":"V2"},"contents":{' + ",".join(lines).encode() + b"}}"
    server.log_version("ann/lab/bikes", {}, manifest=manifest)
    server.artifacts[next(iter(server.artifacts))].__class__ = _Plain
    run = [sys.executable, "-c", _MILLION, server.url, str(tmp_path / "big")]
    started = time.monotonic()
    done = subprocess.run(run, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    print(f"{done.stdout.strip()} MiB, {time.monotonic() - started:.0f} s")
    assert int(done.stdout) < 200
    again = subprocess.run(run, capture_output=True, text=True, timeout=20, check=False)
    assert again.returncode == 0 and int(again.stdout) < 60
    assert server.asked.count("FetchArtifactManifest") == 1


class _Plain(Artifact):
    """Its manifest is not looked into."""

    contents: Any = None
