"""staging/eager.py: what was closed is stored while work goes on, and a commit takes it only where it is still true."""

from __future__ import annotations

import errno
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commits import file_at, objects, problems, stored_bytes
from shelves import until
from test_staging import BIG, ME, Place, abandon, opened, place, put

from artifactfs.errors import ReadOnlyError
from artifactfs.maintenance import gc
from artifactfs.model import BLOCK, MD5, XXH128
from artifactfs.staging import Stage, eager
from artifactfs.staging.nodes import FileNode, decode_early

__all__ = ["place"]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No resting, and a record after each file."""
    monkeypatch.setattr(eager, "_SETTLE", 0.01)
    monkeypatch.setattr(eager, "_PENDING_FOR", 0.0)
    monkeypatch.setattr(eager, "_RETRY", 0.05)


@pytest.fixture(autouse=True)
def ended(place: Place) -> Iterator[None]:
    yield
    for stage in place.made:
        if stage._eager is not None:
            stage._eager.stop()


def begin(place: Place, base: int | None = None, **more: Any) -> Stage:
    stage = place.begin(base, **more)
    stage.store_ahead()
    return stage


def node_of(stage: Stage, path: str) -> FileNode:
    node = stage._node(path)
    assert isinstance(node, FileNode)
    return node


def recorded(stage: Stage, path: str) -> bool:
    return bool(node_of(stage, path).early)


def wait_for(stage: Stage, *paths: str) -> None:
    until(lambda: all(recorded(stage, path) for path in paths), what=f"{paths} are stored")


def crash(stage: Stage, place: Place) -> Stage:
    """Stage of a process that was killed, resumed with nothing in the background."""
    assert stage._eager is not None
    stage._eager.stop()
    return place.resume(stage)


def reads_during_commit(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The data files that the commit opens."""
    real, found = os.open, []

    def watched(path: Any, *args: Any, **kwargs: Any) -> int:
        if isinstance(path, str) and path.startswith(f"{stage.path}/data/"):
            found.append(path)
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", watched)
        stage.commit()
    return found


def test_what_was_closed_is_not_read_by_the_commit(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = begin(place)
    put(stage, "/small", b"small")
    put(stage, "/big", BIG)
    put(stage, "/empty", b"")
    stage.chmod("/small", 0o755)
    wait_for(stage, "/small", "/big")
    stored = objects(place.store.url)
    stage.rename("/big", "/renamed")
    stage.link("/small", "/same")
    assert len(reads_during_commit(stage, monkeypatch)) == 1, "the empty one"
    version = place.latest()
    assert place.files(version) == {"small": b"small", "same": b"small", "renamed": BIG, "empty": b""}
    assert file_at(place.store, version, "small").executable
    assert stored.items() <= objects(place.store.url).items()
    assert len(objects(place.store.url)) == len(stored) + 1, "the pages"
    assert problems(place.store.url) == []
    assert not recorded(stage, "/renamed"), "it is the version's now"


@pytest.mark.parametrize("algorithm", [MD5, XXH128])
def test_other_digests(place: Place, algorithm: str) -> None:
    plain = place.begin(algorithm=algorithm)
    put(plain, "/f", BIG)
    expected = file_at(place.store, plain.commit().version, "f")  # type: ignore[union-attr]
    stage = begin(place, algorithm=algorithm)
    put(stage, "/f", BIG)
    wait_for(stage, "/f")
    assert file_at(place.store, stage.commit().version, "f").checksum == expected.checksum != ""  # type: ignore[union-attr]


def test_a_file_that_is_written_again_is_stored_again(place: Place) -> None:
    stage = begin(place)
    put(stage, "/f", BIG)
    wait_for(stage, "/f")
    before = stored_bytes(place.store.url)
    with opened(stage, "/f", os.O_RDWR) as fh:
        assert not recorded(stage, "/f")
        stage.write(fh, b"more", len(BIG))
    wait_for(stage, "/f")
    assert stored_bytes(place.store.url) - before < 4096, "the last block, its list and where it lies"
    stage.truncate("/f", 10)
    wait_for(stage, "/f")
    stage.commit()
    assert place.files(place.latest()) == {"f": BIG[:10]}


def test_changed_between_record_and_commit(place: Place) -> None:
    """By every means that there is."""
    stage = begin(place)
    names = ["write", "truncate", "shorten", "empty", "times", "replaced", "untouched"]
    for name in names:
        put(stage, f"/{name}", b"0123456789")
    wait_for(stage, *(f"/{name}" for name in names))
    assert stage._eager is not None
    with stage._eager.suspended(drain=False):
        with opened(stage, "/write", os.O_RDWR) as fh:
            stage.write(fh, b"X", 3)
        stage.truncate("/truncate", 20)
        stage.truncate("/shorten", 4)
        stage.release(stage.open("/empty", os.O_WRONLY | os.O_TRUNC))
        stage.utimens("/times", 1, 2)
        put(stage, "/new", b"a new one")
        stage.rename("/new", "/replaced")
        assert [name for name in names if recorded(stage, f"/{name}")] == ["untouched"]
    stage.commit(final=True)
    assert place.files(place.latest()) == {
        "write": b"012X456789",
        "truncate": b"0123456789" + bytes(10),
        "shorten": b"0123",
        "empty": b"",
        "times": b"0123456789",
        "replaced": b"a new one",
        "untouched": b"0123456789",
    }


def test_a_file_in_use_is_left_alone_until_it_is_closed(place: Place) -> None:
    stage = begin(place)
    fh = stage.create("/f", 0o644, os.O_RDWR, ME)
    stage.write(fh, b"one", 0)
    put(stage, "/other", b"other")
    wait_for(stage, "/other")
    assert node_of(stage, "/f").early is None
    stage.release(fh)
    wait_for(stage, "/f")
    with opened(stage, "/f", os.O_RDONLY) as fh:
        assert recorded(stage, "/f"), "reading changes nothing"


def test_changed_while_it_is_being_stored(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = place.begin()
    put(stage, "/f", BIG)
    real, writing = os.pread, threading.Event()

    def meddle(fd: int, size: int, offset: int) -> bytes:
        data = real(fd, size, offset)
        if not writing.is_set() and threading.current_thread().name.startswith("eager-read"):
            writing.set()
            with opened(stage, "/f", os.O_RDWR) as fh:
                stage.write(fh, b"changed", 0)
        return data

    monkeypatch.setattr(os, "pread", meddle)
    stage.store_ahead()
    wait_for(stage, "/f")
    stage.commit()
    assert place.files(place.latest()) == {"f": b"changed" + BIG[7:]}


def test_partly_changed_files(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = place.based(f=BIG, g=BIG, h=BIG)
    stage.store_ahead()
    before = stored_bytes(place.store.url)
    with opened(stage, "/f", os.O_RDWR) as fh:
        stage.write(fh, b"patch", BLOCK + 5)
    with opened(stage, "/g", os.O_RDWR) as fh:
        stage.write(fh, b"tail", len(BIG))
    stage.truncate("/h", BLOCK + 77)
    wait_for(stage, "/f", "/g", "/h")
    assert stored_bytes(place.store.url) - before < 1.2 * BLOCK
    reads = reads_during_commit(stage, monkeypatch)
    assert reads == []
    patched = BIG[: BLOCK + 5] + b"patch" + BIG[BLOCK + 10 :]
    assert place.files(place.latest()) == {"f": patched, "g": BIG + b"tail", "h": BIG[: BLOCK + 77]}
    assert problems(place.store.url) == []


def test_what_the_base_has_is_not_stored_again(place: Place) -> None:
    stage = place.based(f=BIG, small=b"small")
    stage.store_ahead()
    before = stored_bytes(place.store.url)
    put(stage, "/copy", BIG)
    put(stage, "/another", b"small")
    wait_for(stage, "/copy", "/another")
    assert stored_bytes(place.store.url) == before


def test_the_same_content_ahead_and_in_the_commit_is_stored_once(place: Place) -> None:
    stage = begin(place)
    put(stage, "/z", BIG)
    wait_for(stage, "/z")
    before = stored_bytes(place.store.url)
    fh = stage.create("/a", 0o644, os.O_RDWR, ME)
    stage.write(fh, BIG, 0)
    stage.commit()
    assert stored_bytes(place.store.url) - before < 4096
    assert file_at(place.store, place.latest(), "a").extents == file_at(place.store, place.latest(), "z").extents


def test_a_record_survives_the_process(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = begin(place)
    put(stage, "/f", BIG)
    put(stage, "/g", b"g")
    put(stage, "/h", b"h")
    wait_for(stage, "/f", "/g", "/h")
    resumed = crash(stage, place)
    resumed = place.resume(resumed)  # from a compacted journal, too
    with opened(resumed, "/h", os.O_RDWR) as fh:
        resumed.write(fh, b"H", 0)
    resumed = place.resume(resumed)
    assert recorded(resumed, "/h"), "that it has changed is not in the journal, but the data file knows"
    assert [os.path.basename(path) for path in reads_during_commit(resumed, monkeypatch)] == [str(node_of(resumed, "/h").data)]
    assert place.files(place.latest()) == {"f": BIG, "g": b"g", "h": b"H"}


def test_what_was_closed_before_a_crash_is_stored_after_it(place: Place) -> None:
    stage = place.begin()
    put(stage, "/f", BIG)
    resumed = place.resume(stage)
    resumed.store_ahead()
    wait_for(resumed, "/f")


def test_after_power_loss_the_files_count(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = begin(place)
    put(stage, "/f", b"stored")
    wait_for(stage, "/f")
    monkeypatch.setattr("artifactfs.staging.recovery.boot_id", lambda: "another boot")
    resumed = crash(stage, place)
    assert not recorded(resumed, "/f")


def test_nothing_is_recorded_before_it_is_durable(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = begin(place)
    real, held = place.store.objects.put, threading.Event()
    started = threading.Event()

    def slow(key: str, data: Any) -> None:
        started.set()
        assert held.wait(20)
        real(key, data)

    monkeypatch.setattr(place.store.objects, "put", slow)
    put(stage, "/f", b"small")
    assert started.wait(20)
    assert not recorded(stage, "/f")
    held.set()
    wait_for(stage, "/f")
    place.store.read_extent(decode_early(node_of(stage, "/f").early or b"").file.extents[0])


def test_lost_objects_are_stored_by_the_commit(place: Place) -> None:
    stage = begin(place)
    put(stage, "/f", BIG)
    put(stage, "/g", b"small")
    wait_for(stage, "/f", "/g")
    for key in objects(place.store.url):
        place.store.objects.delete(key)
    stage.commit(final=True)
    assert place.files(place.latest()) == {"f": BIG, "g": b"small"}
    assert problems(place.store.url) == []


def test_gc_spares_what_a_long_stage_has_stored(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The background thread makes the objects new again; a commit does before it refers to them."""
    monkeypatch.setattr(eager, "_REFRESH", 0.1)
    stage = begin(place)
    put(stage, "/f", BIG)
    wait_for(stage, "/f")
    paths = [Path(place.store.url, key) for key in objects(place.store.url)]
    for path in paths:
        os.utime(path, (1, 1))
    until(lambda: all(path.stat().st_mtime > 1 for path in paths))
    assert gc(place.store, grace=3600).removed == 0
    assert stage._eager is not None
    stage._eager.stop()
    for path in paths:
        os.utime(path, (1, 1))
    monkeypatch.setattr("artifactfs.staging.stage.publish", lambda *args: pytest.fail("it is checked before"))
    with pytest.raises(BaseException, match="it is checked before"):
        stage.commit()
    assert all(path.stat().st_mtime > 1 for path in paths)


def test_a_store_that_cannot_be_written_is_logged_once_and_the_commit_says_so(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stage = begin(place)
    tries = []

    def refuse(*args: Any) -> None:
        tries.append(args)
        raise ReadOnlyError("the store is read-only")

    with monkeypatch.context() as patch:
        patch.setattr(place.store.objects, "put", refuse)
        put(stage, "/f", b"small")
        until(lambda: len(tries) > 2)
        assert len([record for record in caplog.records if "ahead of the commit" in record.message]) == 1
        with pytest.raises(ReadOnlyError):
            stage.commit()
    wait_for(stage, "/f")
    stage.commit()
    assert place.files(place.latest()) == {"f": b"small"}


def test_a_full_staging_disk(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored cannot be recorded; later it can."""
    stage = begin(place)
    put(stage, "/f", b"small")
    real = stage._ledger.journal.append
    failed = threading.Event()

    def full(record: list[Any], freeing: bool = False) -> None:
        if not failed.is_set() and any(delta[0] == "w" for delta in record):
            failed.set()
            raise OSError(errno.ENOSPC, "full")
        real(record, freeing)

    monkeypatch.setattr(stage._ledger.journal, "append", full)
    with opened(stage, "/f", os.O_RDWR) as fh:
        stage.write(fh, b"S", 0)
    assert failed.wait(20)
    wait_for(stage, "/f")
    stage.commit()
    assert place.files(place.latest()) == {"f": b"Small"}


def test_a_commit_waits_for_the_file_under_way_and_no_longer(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is stored while it runs; a commit of a stage in use stores closed files first, so that its writers can go on."""
    monkeypatch.setattr(eager, "_SETTLE", 3600.0)
    stage = begin(place)
    for number in range(50):
        put(stage, f"/{number}", b"%d" % number * 1000)
    assert [node for node in stage._ledger.space.nodes.values() if getattr(node, "early", None)] == []
    assert reads_during_commit(stage, monkeypatch) != []
    put(stage, "/late", b"late")
    assert stage._eager is not None
    with stage._eager.suspended(drain=True):
        assert recorded(stage, "/late"), "not settled, but closed"
        put(stage, "/later", b"later")
    with stage._eager.suspended(drain=False):
        assert not recorded(stage, "/later")
    stage.commit(final=True)
    assert len(place.files(place.latest())) == 52


def test_a_new_stage_over_the_committed_version_goes_on(place: Place) -> None:
    stage = begin(place)
    for number in range(5):
        put(stage, "/f", BIG + b"%d" % number)
        put(stage, f"/g{number}", b"%d" % number)
        if number % 2:
            wait_for(stage, "/f", f"/g{number}")
        stage.commit()
        assert place.files(place.latest())["f"] == BIG + b"%d" % number
    assert len(place.files(place.latest())) == 6
    assert problems(place.store.url) == []


def test_writers_threads_commits_and_crashes_at_once(place: Place) -> None:
    """Every commit holds what was there; after a while nothing is left to do."""
    stage = begin(place)
    stop = time.monotonic() + 3
    expected: dict[str, bytes] = {}

    def write(which: int) -> None:
        turn = 0
        while time.monotonic() < stop:
            name, data = f"{which}-{turn % 7}", uuid.uuid4().bytes * (1 + turn % 5 * 20_000)
            put(stage, f"/{name}", data)
            expected[name] = data
            turn += 1

    threads = [threading.Thread(target=write, args=(which,)) for which in range(3)]
    for thread in threads:
        thread.start()
    while time.monotonic() < stop:
        stage.commit()
    for thread in threads:
        thread.join()
    stage = crash(stage, place)
    stage.store_ahead()
    changed = {change.path for change in stage.status() if change.change != "deleted"}
    wait_for(stage, *(f"/{name}" for name in changed))
    stage.commit(final=True)
    assert place.files(place.latest()) == expected
    assert problems(place.store.url) == []


def test_stopping_does_not_wait_for_a_large_file(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = begin(place)
    monkeypatch.setattr(eager, "_SHARE", 1e6)
    reading = threading.Event()
    real = stage._eager._pace  # type: ignore[union-attr]

    def pace() -> None:
        stage._files.activity += 1
        reading.set()
        real()

    monkeypatch.setattr(stage._eager, "_pace", pace)
    monkeypatch.setattr(eager, "_PACE", 0.0)
    put(stage, "/f", BIG * 4)
    assert reading.wait(20)
    start = time.monotonic()
    stage.close()
    assert time.monotonic() - start < 5
    abandon(stage)
