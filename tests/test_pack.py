"""Packs: where things lie is known at once, and they are there once flushed."""

from __future__ import annotations

import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from artifactfs.errors import StorageFullError
from artifactfs.model import OBJECT_PACK, Extent
from artifactfs.objects import object_key
from artifactfs.objects.local import LocalObjects
from artifactfs.pack import PACK_TARGET, PackWriter


@pytest.fixture
def objects(tmp_path: Path) -> LocalObjects:
    return LocalObjects(tmp_path / "store")


def read(objects: LocalObjects, extent: Extent) -> bytes:
    return objects.read(object_key(extent.object), extent.offset, extent.length)


def test_what_was_added_is_where_it_was_said_to_be(objects: LocalObjects) -> None:
    packs = PackWriter(objects, target=10_000)
    contents = [os.urandom(size) for size in (1, 0, 5000, 9999, 30_000, 10_000, 7)]
    extents = [packs.add(content) for content in contents]
    packs.flush()
    packs.close()
    assert [read(objects, extent) for extent in extents] == contents
    assert len({extent.object for extent in extents}) == 4
    for extent in extents:
        assert extent.object[:1] == OBJECT_PACK and len(extent.object) == 17


def test_packs_hold_nothing_but_what_was_added(objects: LocalObjects) -> None:
    packs = PackWriter(objects, target=1000)
    sizes: Counter[bytes] = Counter()
    for number in range(200):
        sizes[packs.add(bytes(number)).object] += number
    packs.flush()
    assert {info.key: info.size for info in objects.scan("packs/")} == {object_key(it): size for it, size in sizes.items()}
    assert all(1000 <= size < 1200 for size in list(sizes.values())[:-1])


def test_nothing_is_there_before_a_flush_of_a_little(objects: LocalObjects) -> None:
    packs = PackWriter(objects)
    packs.add(b"x")
    assert list(objects.scan("packs/")) == []
    packs.close()
    assert list(objects.scan("packs/")) == [], "closed without a flush: forgotten"


def test_a_flush_of_nothing_writes_nothing(objects: LocalObjects) -> None:
    packs = PackWriter(objects)
    packs.flush()
    packs.flush()
    packs.close()
    packs.close()
    assert list(objects.scan("")) == []


def test_threads_may_share_a_writer(objects: LocalObjects) -> None:
    packs = PackWriter(objects, target=50_000)
    contents = [os.urandom(number % 977) for number in range(2000)]
    with ThreadPoolExecutor(8) as pool:
        extents = list(pool.map(packs.add, contents))
    packs.flush()
    packs.close()
    assert [read(objects, extent) for extent in extents] == contents


class Failing(LocalObjects):
    """Fails every write of a pack, and counts those that are under way."""

    def __init__(self, root: Path, after: int) -> None:
        super().__init__(root)
        self.left = after

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        self.left -= 1
        if self.left < 0:
            raise StorageFullError(f"writing {key}: no space left on device")
        super().put(key, data)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_failed_pack_is_told_at_the_latest_by_flush_and_leaves_no_thread(tmp_path: Path, after: int) -> None:
    before = threading.active_count()
    packs = PackWriter(Failing(tmp_path / "store", after), target=1000)
    with pytest.raises(StorageFullError, match="no space left"):
        for _ in range(20):
            packs.add(bytes(600))
        packs.flush()
    with pytest.raises(StorageFullError):
        packs.flush()  # whoever caught the first one is told again
    packs.close()
    assert threading.active_count() == before


def test_memory_is_bounded_to_a_few_packs(tmp_path: Path) -> None:
    """A store that hangs stops whoever adds, so that not the whole commit ends up in memory."""
    hold = threading.Event()
    started = []

    class Slow(LocalObjects):
        def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
            started.append(key)
            assert hold.wait(30)

    packs = PackWriter(Slow(tmp_path / "store"))
    added = []

    def fill() -> None:
        for _ in range(5):
            packs.add(bytes(PACK_TARGET))
            added.append(True)

    filler = threading.Thread(target=fill)
    filler.start()
    filler.join(0.3)
    assert filler.is_alive() and len(started) == 2 and len(added) == 2
    hold.set()
    filler.join(30)
    assert len(added) == 5
    packs.flush()
    packs.close()
