"""One bucket of a real service: what is read is what was asked for, conditions hold, errors say what to do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from servers import Bucket as Made

from artifactfs.buckets import Bucket, NoBucketError, Pin, open_bucket
from artifactfs.errors import IntegrityError, NetworkError, NotFoundError, NotPermittedError, SourceChangedError, UsageError

DATA = os.urandom(700_000)
ODD = ("a b", "ä/ö", "x%20y", "q?r=1#s", "p+q", "tilde~", "comma,", "=eq", "[b]{c}^`|<>\"'")


@pytest.fixture
def s3(bucket: Made) -> Bucket:
    return open_bucket("s3", bucket.name)


def read(bucket: Bucket, key: str, offset: int, size: int, pin: Pin | None = None) -> bytes:
    return b"".join(bucket.stream(key, offset, size, pin or Pin()))


def test_ranges_are_read_as_asked(s3: Bucket) -> None:
    s3.put("k", DATA)
    stat = s3.head("k")
    assert stat.size == len(DATA) and abs(stat.modified - time.time()) < 60
    for offset, size in ((0, 1), (0, len(DATA)), (5, 600_000), (len(DATA) - 1, 1), (9, 0)):
        assert read(s3, "k", offset, size, Pin(stat.etag, size=stat.size)) == DATA[offset : offset + size]
    assert s3.get("k", len(DATA)) == (DATA, stat)


def test_what_is_not_as_pinned_is_not_read(s3: Bucket) -> None:
    s3.put("k", DATA)
    etag = s3.head("k").etag
    with pytest.raises(SourceChangedError, match="shorter"):
        read(s3, "k", 1, len(DATA))
    with pytest.raises(SourceChangedError, match="shorter"):
        read(s3, "k", len(DATA) + 1, 5)
    with pytest.raises(SourceChangedError, match="no longer"):
        read(s3, "k", 1, 5, Pin(etag, size=len(DATA) - 1))
    s3.put("k", DATA[::-1])
    with pytest.raises(SourceChangedError, match="no longer"):
        read(s3, "k", 0, 5, Pin(etag))
    with pytest.raises(IntegrityError, match="expected at most"):
        s3.get("k", 1000)


def test_versions_are_read_by_their_id(versioned_bucket: Made) -> None:
    s3 = open_bucket("s3", versioned_bucket.name)
    s3.put("k", b"old")
    old = s3.head("k")
    s3.put("k", b"newer")
    assert old.version and s3.head("k").version != old.version
    assert s3.head("k", old.version) == old
    assert read(s3, "k", 0, 3, Pin(old.etag, old.version, 3)) == b"old"
    s3.delete("k")
    assert read(s3, "k", 1, 2, Pin(version=old.version)) == b"ld"


@pytest.mark.parametrize("key", ODD)
def test_odd_keys_are_themselves(bucket: Made, s3: Bucket, key: str) -> None:
    """As boto3 writes and lists them."""
    bucket.put(key, DATA)
    assert s3.get(key, len(DATA))[0] == DATA
    assert [stat.key for stat in s3.scan("")] == [key] == bucket.keys()
    s3.put(key, b"mine")
    assert bucket.get(key) == b"mine" and read(s3, key, 1, 2) == b"in"
    s3.delete(key)
    assert bucket.keys() == []


def test_conditional_writes(s3: Bucket) -> None:
    made = s3.swap("k", b"one", "")
    assert made and s3.swap("k", b"two", "") is None
    replaced = s3.swap("k", b"two", made)
    assert replaced == s3.token(s3.head("k"))
    assert s3.swap("k", b"three", made) is None and s3.swap("none", b"x", made) is None
    assert s3.get("k", 10)[0] == b"two"


def test_listings(bucket: Made, s3: Bucket) -> None:
    keys = {f"l/{part}/{number}" for part in ("a", "a-b", "ab") for number in range(3)} | {"l/top", "m"}
    for key in keys:
        bucket.put(key, key.encode())
    assert {stat.key for stat in s3.scan("")} == keys
    assert {stat.key for stat in s3.scan("l/a")} == {key for key in keys if key.startswith("l/a")}, "any prefix, not only folders"
    assert all(stat.size == len(stat.key) and stat.etag == s3.head(stat.key).etag for stat in s3.scan("l/"))
    assert list(s3.scan("none/")) == [] and s3.folders("none/") == []
    assert s3.folders("") == ["l"] and s3.folders("l/") == ["a", "a-b", "ab"]


def test_parts_come_in_any_order_and_the_completion_may_be_repeated(s3: Bucket) -> None:
    upload = s3.multipart("k")
    upload.part(1, b"end")
    upload.part(0, bytes(5 << 20))
    with pytest.raises(NotFoundError):
        s3.head("k")
    upload.complete()
    upload.complete()
    upload.abort()
    assert s3.head("k").size == (5 << 20) + 3


def test_unfinished_uploads_are_dropped_by_age(bucket: Made, s3: Bucket) -> None:
    s3.multipart("k/x").part(0, b"x")
    other = s3.multipart("other")
    assert s3.drop_uploads("k/", time.time() - 3600) == 0
    assert s3.drop_uploads("k/", time.time() + 3600) == 1
    other.abort()
    other.abort()
    assert not bucket.client.list_multipart_uploads(Bucket=bucket.name).get("Uploads")


def test_a_touched_object_is_new(s3: Bucket) -> None:
    s3.put("k", DATA)
    before = s3.head("k")
    while s3.head("k").modified == before.modified:
        s3.touch("k")
    assert s3.get("k", len(DATA))[0] == DATA
    with pytest.raises(NotFoundError):
        s3.touch("none")


def test_missing_is_not_found(s3: Bucket) -> None:
    calls: list[Callable[[], Any]] = [lambda: s3.head("n"), lambda: s3.get("n", 1), lambda: read(s3, "n", 0, 1)]
    for call in calls:
        with pytest.raises(NotFoundError, match=r"bucket-[0-9]+/n does not exist"):
            call()
    s3.delete("n")
    with pytest.raises(NoBucketError, match="create it"):
        open_bucket("s3", "no-such-bucket").get("n", 1)
    with pytest.raises(NoBucketError, match="create it"):
        list(open_bucket("s3", "no-such-bucket").scan(""))


def test_wrong_credentials_are_named_but_not_shown(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    for call in (lambda it: it.get("n", 1), lambda it: list(it.scan("")), lambda it: it.put("n", b"")):
        with pytest.raises(NotPermittedError, match="check the credentials") as caught:
            call(open_bucket("s3", s3.url[5:], {"region": "us-east-1"}))
        assert "wrong-secret" not in str(caught.value) and "AKART" not in str(caught.value)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(NotPermittedError, match="AWS_PROFILE"):
        open_bucket("s3", s3.url[5:], {"region": "eu-west-1"}).get("n", 1)


def test_credentials_that_changed_are_taken_up(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a renewed login writes where credentials come from is used without a restart."""
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "expired")
    bucket = open_bucket("s3", s3.url[5:], {"region": "us-east-1"})
    with pytest.raises(NotPermittedError):
        bucket.put("k", b"x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    bucket.put("k", b"x")
    assert read(bucket, "k", 0, 1) == b"x"


def test_no_service_is_a_network_error_within_the_deadline(bucket: Made) -> None:
    gone = open_bucket("s3", bucket.name, {"endpoint_url": "http://127.0.0.1:1"}, deadline=1)
    unknown = open_bucket("s3", bucket.name, {"endpoint_url": "http://host.invalid:1"}, deadline=1)
    started = time.monotonic()
    for call in (lambda it: it.head("k"), lambda it: list(it.scan("")), lambda it: read(it, "k", 0, 1)):
        for bad in (gone, unknown):
            with pytest.raises(NetworkError, match="check the network"):
                call(bad)
    assert time.monotonic() - started < 12


def test_a_forked_child_uses_the_bucket(s3: Bucket) -> None:
    s3.put("k", DATA)
    child = os.fork()
    if not child:
        try:
            good = s3.get("k", len(DATA))[0] == DATA == read(s3, "k", 0, len(DATA)) and s3.head("k").size == len(DATA)
            good = good and s3.swap("child", b"1", "") is not None and s3.swap("child", b"1", "") is None
            os._exit(0 if good else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert s3.get("child", 1)[0] == b"1"


_FORKING = """
import os, signal, sys, threading
from artifactfs.buckets import open_bucket

buckets = [open_bucket("s3", sys.argv[1], {}, deadline=n) for n in (20, 21, 22, 23)]
stop = threading.Event()

def busy(bucket):
    while not stop.is_set():
        bucket.get("k", 1 << 20)

threads = [threading.Thread(target=busy, args=(bucket,), daemon=True) for bucket in buckets]
for thread in threads:
    thread.start()
for number in range(12):
    child = os.fork()
    if not child:
        signal.alarm(30)
        if number % 10 == 0:
            assert buckets[number % 4].get("k", 1 << 20)[0]
        del buckets, threads
        if number % 2:
            os._exit(0)
        sys.exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == 0, f"child {number} ended with {status}"
stop.set()
"""


@pytest.mark.slow
def test_children_forked_while_requests_are_under_way_do_not_hang(bucket: Made) -> None:
    """What their parent had open is nothing that they could close."""
    bucket.put("k", b"little")
    command = [sys.executable, "-c", _FORKING, bucket.name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "scheme, name, options",
    [("ftp", "b", {}), ("s3", "", {}), ("s3", "a/b", {}), ("s3", "b", {"secret": "x"}), ("s3", "b", {"sse": "rot13"})],
)
def test_what_cannot_be_a_bucket(scheme: str, name: str, options: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        open_bucket(scheme, name, options)
