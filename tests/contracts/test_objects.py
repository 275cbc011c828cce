"""The contract of object stores, run over every implementation: what ``objects/__init__.py`` obliges them to."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from artifactfs.errors import IntegrityError, NotFoundError
from artifactfs.objects import ABSENT, MAX_RECORD, ObjectStore
from artifactfs.store.urls import open_objects

Opener = Callable[[], ObjectStore]
PACK = "packs/ab/" + "ab" * 16
BLOB = "blobs/cd/" + "cd" * 32


@pytest.fixture(params=["local", "s3", "az"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    """Opens one and the same store again and again, as separate processes would."""
    if request.param == "local":
        url = str(tmp_path / "store")
    elif request.param == "s3":
        url = request.getfixturevalue("bucket").store_url("a/prefix")
    else:
        url = f"az://{request.getfixturevalue('container').name}/prefix"
    return lambda: open_objects(url)


@pytest.fixture
def objects(opened: Opener) -> ObjectStore:
    return opened()


def keys(objects: ObjectStore, prefix: str, after: str = "") -> list[str]:
    return sorted(info.key for info in objects.scan(prefix, after))


def test_an_empty_store_has_nothing_and_says_so(objects: ObjectStore) -> None:
    assert objects.size("a/b") is None
    assert keys(objects, "a/") == []
    assert objects.folders("") == objects.folders("a/") == []
    assert objects.delete("a/b") is False
    assert objects.refresh(PACK) is False
    for read in (lambda: objects.get("a/b"), lambda: objects.read("a/b", 0, 1)):
        with pytest.raises(NotFoundError, match="a/b"):
            read()


@pytest.mark.parametrize("data", [b"", b"x", os.urandom(3 << 20)], ids=["empty", "byte", "3MiB"])
def test_what_is_put_is_there_whole(opened: Opener, data: bytes) -> None:
    opened().put(PACK, data)
    objects = opened()
    assert objects.get(PACK)[0] == data
    assert objects.size(PACK) == len(data)
    assert objects.read(PACK, 0, len(data)) == data
    assert objects.read(PACK, len(data) // 2, len(data) // 3) == data[len(data) // 2 : len(data) // 2 + len(data) // 3]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_put_takes_any_buffer_and_may_be_repeated(objects: ObjectStore, kind: Callable[[bytes], bytes]) -> None:
    for _ in range(2):
        objects.put(PACK, kind(b"the same"))
    assert objects.get(PACK)[0] == b"the same"
    assert keys(objects, "packs/") == [PACK]


@pytest.mark.parametrize("offset, size", [(0, 5), (4, 1), (5, 1), (3, 2), (0, 1 << 40), (1 << 40, 1), (1 << 62, 1 << 62)])
def test_a_read_past_the_end_is_an_integrity_error_that_names_the_object(objects: ObjectStore, offset: int, size: int) -> None:
    objects.put(PACK, b"four")
    with pytest.raises(IntegrityError, match=PACK):
        objects.read(PACK, offset, size)


def test_a_record_that_is_too_large_is_not_read(objects: ObjectStore) -> None:
    writer = objects.writer()
    writer.write_at(MAX_RECORD, b"x")
    writer.commit("catalog/huge")
    with pytest.raises(IntegrityError, match="catalog/huge"):
        objects.get("catalog/huge")
    assert objects.read("catalog/huge", MAX_RECORD, 1) == b"x"


def test_a_writer_takes_pieces_in_any_order_from_any_thread(objects: ObjectStore) -> None:
    data = os.urandom(1 << 20)
    pieces = [(at, data[at : at + 10_000]) for at in range(0, len(data), 10_000)]
    writer = objects.writer()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda piece: writer.write_at(*piece), reversed(pieces)))
    assert objects.size(BLOB) is None and keys(objects, "blobs/") == [], "nothing appears before it is whole"
    writer.commit(BLOB)
    writer.abort()  # does nothing any more
    assert objects.get(BLOB)[0] == data


def test_an_aborted_writer_leaves_nothing(objects: ObjectStore) -> None:
    writer = objects.writer()
    writer.write_at(0, b"lost")
    writer.abort()
    writer.abort()
    assert keys(objects, "") == []


def test_a_writer_replaces_an_object_that_is_there_already(objects: ObjectStore) -> None:
    objects.put(BLOB, b"same")
    writer = objects.writer()
    writer.write_at(0, b"same")
    writer.commit(BLOB)
    assert objects.get(BLOB)[0] == b"same"


def test_create_if_absent_creates_once(opened: Opener) -> None:
    first, second = opened(), opened()
    assert first.swap("catalog/a", b"one", ABSENT) is not None
    assert second.swap("catalog/a", b"two", ABSENT) is None
    assert second.get("catalog/a")[0] == b"one"


def test_swap_replaces_only_what_was_seen(opened: Opener) -> None:
    first, second = opened(), opened()
    made = first.swap("catalog/a", b"one", ABSENT)
    data, seen = second.get("catalog/a")
    assert (data, seen) == (b"one", made)
    replaced = second.swap("catalog/a", b"two", seen)
    assert replaced == first.get("catalog/a")[1]
    assert first.swap("catalog/a", b"three", seen) is None, "a write came in between"
    assert first.swap("catalog/a", b"three", replaced or "") is not None
    assert first.swap("catalog/other", b"x", replaced or "") is None, "what is not there cannot be replaced"
    assert second.get("catalog/a")[0] == b"three"


def test_of_many_creators_at_once_one_wins(opened: Opener) -> None:
    for round in range(20 if opened().path("") else 3):
        barrier = threading.Barrier(8)

        def create(number: int, key: str = f"catalog/round{round}", barrier: threading.Barrier = barrier) -> bool:
            objects = opened()
            barrier.wait()
            return objects.swap(key, b"%d" % number, ABSENT) is not None

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(create, range(8)))
        assert won.count(True) == 1
        assert opened().get(f"catalog/round{round}")[0] == b"%d" % won.index(True)


_COUNT = """
import sys
from artifactfs.store.urls import open_objects
objects = open_objects(sys.argv[1])
for _ in range(int(sys.argv[2])):
    while True:
        data, etag = objects.get("catalog/counter")
        if objects.swap("catalog/counter", b"%d" % (int(data) + 1), etag) is not None:
            break
"""


def test_no_update_by_another_process_is_lost(opened: Opener) -> None:
    objects = opened()
    each = 40 if objects.path("") else 5
    objects.swap("catalog/counter", b"0", ABSENT)
    processes = [subprocess.Popen([sys.executable, "-c", _COUNT, objects.url, str(each)]) for _ in range(6)]
    for process in processes:
        assert process.wait(60) == 0
    assert objects.get("catalog/counter")[0] == b"%d" % (6 * each)


def test_scan_tells_keys_sizes_and_times(objects: ObjectStore) -> None:
    before = time.time() - 5
    for key in ("x/a/1", "x/a/2", "x/a-b/1", "x/ab", "y/1", "x/a/deep/er/1"):
        objects.swap(key, b"." * len(key), ABSENT)
    assert keys(objects, "x/") == ["x/a-b/1", "x/a/1", "x/a/2", "x/a/deep/er/1", "x/ab"]
    assert keys(objects, "x/a/") == ["x/a/1", "x/a/2", "x/a/deep/er/1"]
    assert keys(objects, "x/", after="x/a/1") == ["x/a/2", "x/a/deep/er/1", "x/ab"]
    assert keys(objects, "") == sorted(["x/a/1", "x/a/2", "x/a-b/1", "x/ab", "y/1", "x/a/deep/er/1"])
    for info in objects.scan("x/"):
        assert info.size == len(info.key) and before < info.modified < time.time() + 5


def test_objects_may_be_removed_while_they_are_listed(objects: ObjectStore) -> None:
    for number in range(20):
        objects.put(f"packs/ab/{number:032d}", b"x")
    for info in objects.scan("packs/"):
        assert objects.delete(info.key)
    assert keys(objects, "packs/") == []


def test_folders_are_the_names_below(objects: ObjectStore) -> None:
    for key in ("c/acme/vision/x/1", "c/acme/text/y/1", "c/zeta/vision/z/1", "c/file", "top"):
        objects.swap(key, b"", ABSENT)
    assert "c" in objects.folders("") and "top" not in objects.folders("")
    assert objects.folders("c/") == ["acme", "zeta"]
    assert objects.folders("c/acme/") == ["text", "vision"]
    assert objects.folders("c/none/") == []


@pytest.mark.parametrize("part", ["a%20b", "=YWJj", "a.b", "-", "_", "~", "v1.json", "x" * 250])
def test_keys_of_every_form_that_stores_use(objects: ObjectStore, part: str) -> None:
    key = f"catalog/{part}/{part}"
    etag = objects.swap(key, b"x", ABSENT)
    assert objects.get(key) == (b"x", etag)
    assert objects.folders("catalog/") == [part]
    assert keys(objects, f"catalog/{part}/") == [key]


def test_delete_spares_what_is_newer(objects: ObjectStore) -> None:
    objects.put(PACK, b"x")
    assert objects.delete(PACK, unless_newer=time.time() - 60) is False
    assert objects.size(PACK) == 1
    assert objects.delete(PACK, unless_newer=time.time() + 60) is True
    assert objects.size(PACK) is None
    objects.put(PACK, b"x")
    assert objects.delete(PACK) is True
    assert objects.delete(PACK) is False


def test_writing_again_makes_an_object_new(objects: ObjectStore) -> None:
    objects.put(PACK, b"x")
    moment = time.time()
    while next(info.modified for info in objects.scan("packs/")) <= moment:
        objects.put(PACK, b"x")
    assert objects.delete(PACK, unless_newer=moment) is False


def test_refresh_makes_an_object_new(objects: ObjectStore) -> None:
    objects.put(PACK, b"x")
    moment = time.time()
    while next(info.modified for info in objects.scan("packs/")) <= moment:
        assert objects.refresh(PACK) is True
    assert objects.delete(PACK, unless_newer=moment) is False
    assert objects.get(PACK)[0] == b"x"


def test_many_are_removed_by_age_and_what_is_written_meanwhile_stays(opened: Opener) -> None:
    keys = [f"packs/ab/{number:032x}" for number in range(60)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: opened().put(key, b"old"), keys))
        cutoff = opened().clock() + 1  # listings tell whole seconds
        while opened().clock() < cutoff + 1.1:
            time.sleep(0.1)
        again = pool.map(lambda key: opened().put(key, b"new"), keys[::2])
        removed = set(opened().remove(keys, cutoff))
        list(again)
    left = {info.key for info in opened().scan("packs/")}
    assert left >= set(keys[::2]), "what was written anew is there, whichever came first"
    assert removed >= set(keys[1::2]) and not left.intersection(keys[1::2])


def test_no_write_is_lost_between_a_check_of_the_age_and_the_removal(opened: Opener) -> None:
    """A collector removes what is old; writers write the same object anew. After each write it is there."""
    stop = threading.Event()
    lost = []

    def collect() -> None:
        objects = opened()
        while not stop.is_set():
            objects.delete(PACK, unless_newer=time.time() - 5)

    def write() -> None:
        objects = opened()
        for _ in range(150 if objects.path("") else 10):
            objects.put(PACK, b"x")
            if objects.size(PACK) is None:
                lost.append(True)
            path = objects.path(PACK)
            if path is not None:  # grown old at once
                os.utime(path, (0, 0))

    collector = threading.Thread(target=collect)
    collector.start()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(write).result()
    stop.set()
    collector.join()
    assert not lost
