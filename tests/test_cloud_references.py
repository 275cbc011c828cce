"""References to objects of buckets, on real services: what W&B's rules give for a URI, and that nothing but what was pinned is
ever read."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from mounting import World, needs_fuse, world  # noqa: F401 - a fixture
from programs import Program
from proxy import Fault, Proxy
from servers import Bucket, Container, GcsBucket
from shelves import Shelf, shelf  # noqa: F401 - a fixture

from artifactfs import download, references
from artifactfs.artifact import Artifact
from artifactfs.buckets import Bucket as OpenBucket
from artifactfs.buckets import Stat
from artifactfs.errors import (
    ArtifactFSError,
    InvalidNameError,
    NetworkError,
    NotFoundError,
    NotPermittedError,
    SourceChangedError,
    UsageError,
)
from artifactfs.folders import ReferenceFolder
from artifactfs.model import BLOCK, Ref, Version
from artifactfs.reader import Reader
from artifactfs.references import Expanded, is_pinned, is_verified, open_reference, resolve
from artifactfs.references.sorting import SortedEntries

BIG = random.Random(3).randbytes(2 * BLOCK + 12345)
KEYS = ("d/a.txt", "d/b/c.txt", "d-x", "top")


def expand(uri: str, name: str = "", **options: Any) -> list[Expanded]:
    return list(references.expand(uri, name, **options))


def paths(uri: str, name: str = "", **options: Any) -> list[str]:
    return sorted(entry.path for entry in expand(uri, name, **options))


def one(uri: str, name: str = "", **options: Any) -> Expanded:
    [entry] = expand(uri, name, **options)
    return entry


def content(ref: Ref, offset: int = 0, size: int = -1, deadline: float = 10) -> bytes:
    source = open_reference(ref, deadline)
    return b"".join(source.fetch(offset, source.size - offset if size < 0 else size))


def fill(place: Bucket | GcsBucket | Container) -> None:
    for key in KEYS:
        place.put(key, key.encode())


# S3


def test_an_object(bucket: Bucket) -> None:
    etag = bucket.put("data/big file+1.bin", BIG)["ETag"].strip('"')
    uri = bucket.uri("data/big file+1.bin")
    entry = one(uri)
    assert entry == Expanded("big file+1.bin", Ref("big file+1.bin", uri, etag, len(BIG), extra={"etag": etag}))
    assert is_pinned(entry.ref) and is_verified(entry.ref)
    assert content(entry.ref) == BIG
    assert content(entry.ref, BLOCK - 5, 10) == BIG[BLOCK - 5 : BLOCK + 5]
    assert one(uri, "x/y").path == "x/y"


def test_a_prefix(bucket: Bucket) -> None:
    fill(bucket)
    assert paths(bucket.uri("d/")) == ["a.txt", "b/c.txt"]
    assert paths(bucket.uri("d/"), "in") == ["in/a.txt", "in/b/c.txt"]
    assert paths(bucket.uri()) == paths(f"s3://{bucket.name}") == sorted(KEYS)
    assert paths(bucket.uri("d/a")) == ["a.txt"]  # any string may be a prefix, as in W&B
    assert paths(bucket.uri("d/b")) == ["c.txt"]
    for entry in expand(bucket.uri("d")[:-1]):
        assert content(entry.ref).decode() == entry.path
        assert entry.ref.uri == bucket.uri(entry.path)
    with pytest.raises(UsageError, match=r"is the beginning of 'd-x' .* of 'd/.*write .*/d/ for"):
        expand(bucket.uri("d"))
    for nothing in ("none", "none/", "d/a.txt/"):
        with pytest.raises(NotFoundError, match="no object"):
            expand(bucket.uri(nothing))


def test_empty_objects_of_a_prefix_are_passed_over(bucket: Bucket, caplog: pytest.LogCaptureFixture) -> None:
    """Placeholders of directories in silence, others with a warning; one that is named itself is an entry."""
    for key, data in {"d/": b"", "d/sub/": b"", "d/a": b"1", "d/empty": b"", "e": b""}.items():
        bucket.put(key, data)
    with caplog.at_level(logging.WARNING):
        assert paths(bucket.uri("d/")) == ["a"]
    assert [record.getMessage() for record in caplog.records if "1 empty objects" in record.getMessage()]
    assert one(bucket.uri("e")).ref.size == 0
    assert content(one(bucket.uri("e")).ref) == b""
    bucket.put("stub", b"")
    bucket.put("stub/x", b"1")
    assert paths(bucket.uri("stub")) == ["x"]
    with pytest.raises(NotFoundError):
        expand(bucket.uri("d/sub/"))


def test_max_objects(bucket: Bucket) -> None:
    fill(bucket)
    assert len(expand(bucket.uri(), max_objects=4)) == len(expand(bucket.uri(), max_objects=0)) == 4
    with pytest.raises(UsageError, match="more than 3 objects"):
        expand(bucket.uri(), max_objects=3)
    assert references.DEFAULT_MAX_OBJECTS == 10_000_000


def test_versions(versioned_bucket: Bucket) -> None:
    first = versioned_bucket.put("k", b"1")["VersionId"]
    old = one(versioned_bucket.uri("k")).ref
    second = versioned_bucket.put("k", b"22")["VersionId"]
    new = one(versioned_bucket.uri("k")).ref
    assert (old.extra["versionID"], new.extra["versionID"]) == (first, second)
    assert old.uri == new.uri == versioned_bucket.uri("k")
    assert (content(old), content(new)) == (b"1", b"22")
    assert one(versioned_bucket.uri(f"k?versionId={first}")).ref == old
    versioned_bucket.delete("k")  # a marker; the versions stay
    assert (content(old), content(new)) == (b"1", b"22")
    with pytest.raises(NotFoundError):
        expand(versioned_bucket.uri("k"))
    versioned_bucket.client.delete_object(Bucket=versioned_bucket.name, Key="k", VersionId=first)
    with pytest.raises(SourceChangedError, match="no longer there"):
        content(old)
    with pytest.raises(ArtifactFSError):
        expand(versioned_bucket.uri(f"k?versionId={first}"))


def test_a_prefix_of_a_versioned_bucket(versioned_bucket: Bucket) -> None:
    """A listing tells no version ids; what was pinned by its ETag is looked for among older versions."""
    versioned_bucket.put("d/k", b"first")
    versioned_bucket.put("d/kk", b"other")
    [k, kk] = [entry.ref for entry in expand(versioned_bucket.uri("d/"))]
    versioned_bucket.put("d/k", b"later")
    versioned_bucket.delete("d/kk")
    assert (content(k), content(k, 2, 2), content(kk)) == (b"first", b"rs", b"other")
    version = versioned_bucket.client.list_object_versions(Bucket=versioned_bucket.name, Prefix="d/k")["Versions"]
    for item in version:
        versioned_bucket.client.delete_object(Bucket=versioned_bucket.name, Key=item["Key"], VersionId=item["VersionId"])
    for ref in (k, kk):
        with pytest.raises(SourceChangedError):
            content(ref)


def test_an_object_that_changed_or_is_gone(bucket: Bucket) -> None:
    bucket.put("k", b"first")
    ref = one(bucket.uri("k")).ref
    bucket.put("k", b"other")
    with pytest.raises(SourceChangedError, match=r"k is no longer what was recorded"):
        content(ref)
    bucket.put("k", b"longer than before")
    with pytest.raises(SourceChangedError):
        content(ref, 0, 2)
    bucket.delete("k")
    with pytest.raises(SourceChangedError, match="no longer there"):
        content(ref)
    bucket.put("k", b"first")
    assert content(ref) == b"first"


def test_without_checksum(bucket: Bucket) -> None:
    """Nothing is asked for, nothing pinned; what is read is what is there then, of one object."""
    uri = bucket.uri("k/x.txt")
    ref = one(uri, checksum=False).ref
    assert one(uri, checksum=False).path == "k/x.txt"
    assert one(uri, "name", checksum=False).path == "name"
    assert one(bucket.uri(), checksum=False).path == bucket.name
    assert (ref.digest, ref.size, ref.extra) == (uri, -1, {})
    assert not is_pinned(ref) and not is_verified(ref)
    with pytest.raises(NotFoundError):
        resolve(ref)
    bucket.put("k/x.txt", BIG)
    pinned = resolve(ref)
    assert content(pinned) == BIG
    bucket.put("k/x.txt", b"other")
    with pytest.raises(SourceChangedError):
        content(pinned)
    assert content(resolve(ref)) == b"other"
    with pytest.raises(SourceChangedError, match="was 7 when"):
        resolve(msgspec.structs.replace(ref, size=7))
    with pytest.raises(UsageError, match="whole bucket"):
        resolve(one(bucket.uri(), checksum=False).ref)


@pytest.mark.parametrize(
    "uri",
    [
        *("s3://", "s3:///k", "s3:k", "gs://", "https://acct.blob.core.windows.net", "https://acct.blob.core.windows.net/"),
        *("s3://b/k?versionId=", "https://acct.blob.core.windows.net/c/b?sig=S3CRET", "s3://../k", "az:///k"),
        "https://me:S3CRET@acct.blob.core.windows.net/c/b",
    ],
)
def test_malformed_uris(uri: str) -> None:
    with pytest.raises(UsageError) as caught:
        expand(uri, "name")
    assert "S3CRET" not in str(caught.value)


def test_keys_that_cannot_be_paths(bucket: Bucket) -> None:
    bucket.put("d/x\ny", b"1")
    with contextlib.suppress(InvalidNameError, UsageError):
        assert "\n" in one(bucket.uri("d/")).path


def test_access_denied_and_no_bucket(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError, match="bucket does not exist"):
        expand("s3://no-such-bucket-here/k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wr0ng")
    monkeypatch.setenv("AWS_S3_ENDPOINT_URL", bucket.server.url)  # a client of its own, with these credentials
    with pytest.raises(NotPermittedError) as caught:
        expand(bucket.uri("k"))
    assert "wr0ng" not in str(caught.value)


# The link


@pytest.fixture
def proxy(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Between the references and the bucket, whose environment variable of W&B's names it."""
    with Proxy(bucket.server.url) as proxy:
        monkeypatch.setenv("AWS_S3_ENDPOINT_URL", proxy.url)
        yield proxy


def test_faults_of_the_link(bucket: Bucket, proxy: Proxy) -> None:
    bucket.put("k", BIG)
    ref = one(bucket.uri("k")).ref
    for fault in (
        Fault("status", times=2),
        Fault("cut", at=1000, times=3),
        Fault("cut", at=-1, times=1),
        Fault("truncate", at=1000, times=1),
        Fault("stall", at=1000, times=1),
    ):
        proxy.add(fault)
        with contextlib.suppress(ArtifactFSError):  # wrong lengths and ranges may be errors, never wrong bytes
            assert content(ref, deadline=2) == BIG
        assert fault.done
        proxy.clear()
        proxy.release()
    proxy.refuse()
    with pytest.raises(NetworkError):
        content(ref, deadline=1)
    proxy.accept()
    assert content(ref) == BIG


def test_a_listing_survives_faults(bucket: Bucket, proxy: Proxy) -> None:
    fill(bucket)
    proxy.add(Fault("status", every=2))
    assert paths(bucket.uri()) == sorted(KEYS)
    proxy.clear()
    proxy.add(Fault("cut", at=50, times=1))
    assert paths(bucket.uri()) == sorted(KEYS)


def test_only_what_is_read_is_fetched(bucket: Bucket, proxy: Proxy, shelf: Shelf) -> None:  # noqa: F811
    """And through the cache, so once."""
    bucket.put("k", BIG)
    entry = one(bucket.uri("k"))
    proxy.reset()
    for reader in (shelf.reader, Reader(shelf.store, shelf.cache, offline=True)):
        with contextlib.closing(reader.open(entry.ref, "k")) as handle:
            assert handle.read(2 * BLOCK, 100) == BIG[2 * BLOCK : 2 * BLOCK + 100]
    assert (proxy.count("GET"), proxy.bytes_down) == (1, 12345)


# Others


def test_google_cloud_storage(gcs_bucket: GcsBucket) -> None:
    fill(gcs_bucket)
    gcs_bucket.put("d/", b"")
    gcs_bucket.put("d/empty", b"")
    assert paths(gcs_bucket.uri("d/")) == ["a.txt", "b/c.txt", "empty"]
    entry = one(gcs_bucket.uri("top"))
    assert entry.ref.uri == gcs_bucket.uri("top")
    generation = entry.ref.extra["versionID"]
    assert isinstance(generation, int)
    assert content(entry.ref) == b"top"
    assert one(gcs_bucket.uri(f"top#{generation}")).ref == entry.ref
    for listed in expand(gcs_bucket.uri("d/")):
        assert is_pinned(listed.ref)
        assert content(listed.ref) == (b"" if listed.path == "empty" else f"d/{listed.path}".encode())
    gcs_bucket.put("top", b"new")
    with pytest.raises(SourceChangedError):
        content(entry.ref)
    gcs_bucket.put("d/a.txt", b"other")
    gcs_bucket.delete("d/b/c.txt")
    for listed in expand(gcs_bucket.uri("d/a.txt")):
        assert content(listed.ref) == b"other"
    with pytest.raises(NotFoundError):
        expand(gcs_bucket.uri("none"))


def test_azure(container: Container) -> None:
    fill(container)
    container.put("with space/é", b"1")
    container.put("hns", b"")
    container.put("hns/x", b"2")
    container.put("empty", b"")
    assert paths(container.uri("d")) == paths(container.uri("d/")) == ["a.txt", "b/c.txt"]
    assert paths(container.uri("hns")) == ["x"]
    entry = one(container.uri("with space/é"))
    assert (entry.path, entry.ref.uri) == ("é", container.uri("with space/é"))
    assert entry.ref.digest == entry.ref.extra["etag"]
    assert '"' not in entry.ref.digest
    assert content(entry.ref) == b"1"
    everything = expand(container.uri())
    assert sorted(found.path for found in everything) == sorted([*KEYS, "with space/é", "hns/x", "empty"])
    assert one(f"az://{container.name}/top").ref.size == 3
    container.put("with space/é", b"2")
    with pytest.raises(SourceChangedError):
        content(entry.ref)
    container.delete("top")
    with pytest.raises(SourceChangedError, match="is no longer"):
        content(next(found.ref for found in everything if found.path == "top"))


# Many


def test_expansion_of_a_million_objects(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # noqa: F811
    """In the order of a bucket, which is not that of a tree, and in memory that does not grow with their number."""
    count, run = 12_000, 600

    def scan(self: OpenBucket, prefix: str) -> Iterator[Stat]:
        for n in range(count):
            key = f"data/{n % 7}{'-' * (n % 2)}/{n // 1000:05}/{n:08}"
            yield Stat(key, n + 1, f'"{n:032x}"', "", 0.0)

    monkeypatch.setattr(OpenBucket, "scan", scan)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    tracemalloc.start()
    entries = SortedEntries(references.expand("s3://bucket/data/"), str(tmp_path / "spool"), run)
    seen = sum(1 for _ in entries)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seen == count
    assert peak < 6 << 20  # all of them take 12 MB
    assert not list((tmp_path / "spool").iterdir())
    version = shelf.log("a/b/c", ReferenceFolder(entries))
    assert (version.root.links, version.size) == (count, count * (count + 1) // 2)
    keys = [entry.path for entry in itertools.islice(entries, 5000)]
    assert keys == sorted(keys, key=lambda path: path.split("/"))
    with pytest.raises(UsageError, match="more than 11999"):
        for _ in references.expand("s3://bucket/data/", max_objects=count - 1):
            pass


# The main job


def test_log_get_and_mount(afs: Program, bucket: Bucket, tmp_path: Path) -> None:
    fill(bucket)
    bucket.put("d/big.bin", BIG)
    name = afs("log", "acme/vision/refs", "--reference", bucket.uri("d/"), "--reference", bucket.uri("top")).out.strip()
    assert [row["path"] for row in afs("ls", name, "--json").document] == ["a.txt", "b", "big.bin", "top"]
    afs("get", name, tmp_path / "out")
    assert (tmp_path / "out/big.bin").read_bytes() == BIG
    assert (tmp_path / "out/b/c.txt").read_text() == "d/b/c.txt"
    assert afs("log", "acme/vision/refs", "--reference", bucket.uri("d/"), "--reference", bucket.uri("top")).out.strip() == name
    afs("log", "acme/vision/refs", "--reference", bucket.uri("none/"), code=3)
    assert bucket.uri("none/") in afs("log", "acme/vision/refs", "--reference", bucket.uri("none/"), code=3).err
    shared = f"artifactfs://{name}"
    again = afs("log", "acme/vision/more", "--reference", f"{shared}/b", "--reference", f"{shared}/big.bin").out.strip()
    assert [row["path"] for row in afs("ls", again, "--json").document] == ["big.bin", "c.txt"]
    afs("log", "acme/vision/more", "--reference", f"{shared}/none", code=3)
    afs("log", "acme/vision/more", "--reference", "artifactfs://only/two", code=2)


@needs_fuse
def test_on_a_mount(bucket: Bucket, world: World) -> None:  # noqa: F811
    bucket.put("big.bin", BIG)
    bucket.put("loose", b"loose")
    entries = [*expand(bucket.uri("big.bin")), *expand(bucket.uri("loose"), checksum=False)]
    world.log("acme/vision/refs", ReferenceFolder(entries))
    where = world.mount("acme/vision/refs:v0")
    assert (where / "big.bin").read_bytes() == BIG
    assert (where / "loose").read_bytes() == b"loose"
    assert (where / "big.bin").stat().st_size == len(BIG)
    assert os.getxattr(where / "big.bin", "user.artifactfs.verified") == b"true"
    assert os.getxattr(where / "loose", "user.artifactfs.verified") == b"false"
    assert os.getxattr(where / "loose", "user.artifactfs.ref") == bucket.uri("loose").encode()


@needs_fuse
def test_a_changed_object_on_a_mount(bucket: Bucket, world: World) -> None:  # noqa: F811
    bucket.put("k", b"first")
    world.log("acme/vision/refs", ReferenceFolder(expand(bucket.uri("k"))))
    where = world.mount("acme/vision/refs:v0")
    bucket.put("k", b"other")
    with pytest.raises(OSError, match="Stale"):
        (where / "k").read_bytes()


def test_python(bucket: Bucket, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.chdir(shelf.root)
    monkeypatch.setenv("ARTIFACTFS_ENTITY", "acme")
    monkeypatch.setenv("ARTIFACTFS_PROJECT", "vision")
    fill(bucket)
    artifact = Artifact("refs", type="dataset")
    [a, c] = sorted(artifact.add_reference(bucket.uri("d/"), name="data"), key=lambda entry: str(entry.path))
    assert (a.path, c.path, a.size, a.digest) == ("data/a.txt", "data/b/c.txt", 7, a.extra["etag"])
    assert a.ref_target() == bucket.uri("d/a.txt")
    artifact.add_reference(bucket.uri("top"))
    with pytest.raises(ValueError, match="more than 1 objects"):
        artifact.add_reference(bucket.uri(), name="x", max_objects=1)
    with pytest.raises(ValueError, match="same path twice"):
        artifact.add_reference(bucket.uri("d-x"), name="top")
    artifact.save()
    artifact.wait()
    shared = Artifact("shared", type="dataset")
    assert len(shared.add_reference("artifactfs://acme/vision/refs:v0/data", name="all")) == 2
    shared.add_reference("artifactfs://acme/vision/refs:latest/top")
    assert sorted(shared.manifest.entries) == ["all/a.txt", "all/b/c.txt", "top"]
    bucket.delete("top")
    with pytest.raises(SourceChangedError):
        artifact.download()
    root = Path(artifact.download(allow_missing_references=True))
    assert (root / "data/b/c.txt").read_text() == "d/b/c.txt"
    assert not (root / "top").exists()


def test_missing_references_of_every_service(shelf: Shelf, bucket: Bucket, gcs_bucket: GcsBucket, container: Container) -> None:  # noqa: F811
    for place in (bucket, gcs_bucket, container):
        place.put("gone", b"1")
        place.put("there", b"2")
        version: Version = shelf.log("a/b/c", ReferenceFolder([one(place.uri("gone")), one(place.uri("there"))]))
        place.delete("gone")
        root = shelf.root / f"out-{place.name}"
        download.get(shelf.store, shelf.reader, version, str(root), allow_missing_references=True)
        assert [path.name for path in root.iterdir()] == ["there"]
        with pytest.raises(SourceChangedError):
            download.get(shelf.store, shelf.reader, version, str(root))


def test_the_libraries_are_imported_by_need() -> None:
    """They cost a third of a second, which no mount without such references should pay."""
    code = "import sys, artifactfs.reader; sys.exit('boto3' in sys.modules or 'obstore' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
