"""The reader against a real HTTP server that fails: right bytes or the right error within a deadline, fetched once."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast

import msgspec
import pytest
from http_server import FaultServer
from hypothesis import given, settings
from hypothesis import strategies as st

from artifactfs import attempts
from artifactfs.cache import BlockCache
from artifactfs.content import fingerprint
from artifactfs.errors import (
    ArtifactFSError,
    IntegrityError,
    NetworkError,
    NotFoundError,
    OfflineError,
    SourceChangedError,
    UsageError,
)
from artifactfs.folders import gather
from artifactfs.model import BLOCK, Extent, File, Ref
from artifactfs.names import parse
from artifactfs.publish import Draft, publish
from artifactfs.reader import Handle, Reader
from artifactfs.references import Source, expand, open_reference
from artifactfs.store import Store
from artifactfs.store.urls import open_store

KIB = 1 << 10
MIB = 1 << 20
PATH = "/f.bin"
DATA = random.Random(3).randbytes(8 * MIB + 54321)
LARGE = random.Random(4).randbytes(32 * MIB)
DEADLINE = 8.0


class WebStore:
    """A remote store whose contents lie on an HTTP server, by their paths (the object of their one extent)."""

    def __init__(self, server: FaultServer) -> None:
        self.server = server
        self.url = server.url("/")
        self.lists: dict[bytes, bytes] = {}
        self.list_reads = 0

    def add(self, path: str) -> File:
        found = fingerprint(self.server.contents[path])
        self.lists[found.id] = found.blocks
        return File(path[1:], found.size, False, found.id, (Extent(path.encode(), 0, found.size),))

    def referenced(self, ref: Ref) -> Ref:
        return ref

    def local_content(self, file: File) -> None:
        return None

    def source(self, file: File) -> Source:
        url = self.server.url(file.extents[0].object.decode())
        source = open_reference(Ref(file.name, url, "", file.size, id=file.id), DEADLINE / 2)
        assert source.key == file.id
        return source

    def packed(self, file: File) -> None:
        return None

    def stream(self, extent: Extent) -> Iterator[bytes]:
        raise AssertionError("nothing is packed here")

    def block_list(self, file: File) -> bytes:
        self.list_reads += 1
        return self.lists[file.id] if file.size > BLOCK else file.id


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "BACKOFF", 0.01)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer({PATH: DATA, "/large": LARGE, "/small": DATA[:1000], "/empty": b""}) as server:
        yield server


@pytest.fixture
def store(server: FaultServer) -> WebStore:
    return WebStore(server)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[BlockCache]:
    cache = BlockCache(tmp_path / "cache", 1 << 30)
    yield cache
    cache.close()


Make = Callable[..., Reader]


@pytest.fixture
def make(store: WebStore, cache: BlockCache) -> Iterator[Make]:
    """Makes readers, with the cache unless told otherwise, and closes them."""
    made: list[Reader] = []

    def build(with_cache: BlockCache | None = cache, **options: object) -> Reader:
        options.setdefault("deadline", DEADLINE)
        made.append(Reader(cast(Store, store), with_cache, **options))  # type: ignore[arg-type]
        return made[-1]

    yield build
    for reader in made:
        reader.close()


def reference(server: FaultServer, path: str = PATH) -> Ref:
    """A reference pinned by what the server sends; forgets the request that took."""
    ref = next(iter(expand(server.url(path), "x"))).ref
    until(lambda: not server.concurrent)  # the server has noticed that nobody reads the body
    server.reset_counts()
    return ref


def read_through(handle: Handle, step: int = 128 * KIB) -> bytes:
    """The whole content as the kernel reads it."""
    parts = []
    offset = 0
    while piece := handle.read(offset, step):
        parts.append(piece)
        offset += len(piece)
    return b"".join(parts)


def settle(reader: Reader) -> None:
    """Wait until no fetch is under way."""
    until(lambda: not any(content.fetches for content in tuple(reader._contents.values())))


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it never came to that"
        time.sleep(0.005)


# Right bytes


EDGES = [(0, 1), (0, len(DATA)), (len(DATA) - 1, 1), (len(DATA) - 1, 100), (MIB - 1, 2), (MIB, MIB), (5, 3 * MIB), (0, 1 << 40)]


@pytest.mark.parametrize("with_cache", [True, False])
@pytest.mark.parametrize("kind", ["file", "reference", "no ranges"])
def test_reads(server: FaultServer, store: WebStore, make: Make, cache: BlockCache, with_cache: bool, kind: str) -> None:
    entry = store.add(PATH) if kind == "file" else reference(server)
    server.faults.ranges = kind != "no ranges"
    reader = make(cache if with_cache else None)
    for _ in range(2):
        handle = reader.open(entry, "e/p/c:v0/f.bin")
        assert handle.size == len(DATA)
        for offset, size in EDGES:
            assert handle.read(offset, size) == DATA[offset : offset + size]
        for offset, size in [(len(DATA), 1), (len(DATA) + 5, 1), (0, 0), (10, -1), (-1, 5)]:
            assert handle.read(offset, size) == b""
        handle.close()
        handle.close()


def test_empty_content(server: FaultServer, store: WebStore, make: Make) -> None:
    for entry in (store.add("/empty"), Ref("x", server.url("/empty"), "", 0, extra={"etag": "x"})):
        handle = make().open(entry)
        assert handle.read(0, 100) == b""
        handle.close()
    assert server.requests == 0


@pytest.mark.parametrize("kind", ["file", "reference", "no ranges", "no cache", "no ranges, no cache", "small cache"])
def test_random_reads_equal_the_content(
    store: WebStore, server: FaultServer, tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    """Any order of reads, of any size, through several handles; with answers that break off and 503s in between."""
    entry = store.add(PATH) if kind == "file" else reference(server)
    span = st.tuples(st.integers(0, 2), st.integers(-10, len(DATA) + 10), st.integers(0, 3 * MIB))

    @settings(max_examples=12)
    @given(st.lists(span, min_size=1, max_size=12), st.integers(3, 9))
    def check(reads: list[tuple[int, int, int]], every: int) -> None:
        server.faults.ranges = "no ranges" not in kind
        server.faults.status, server.faults.every = 503, every
        server.faults.cut_after, server.faults.cuts = 900_000, -1 if server.faults.ranges else 2
        limit = 4 * MIB if kind == "small cache" else 1 << 30
        cache = None if "no cache" in kind else BlockCache(tmp_path_factory.mktemp("cache"), limit)
        reader = Reader(cast(Store, store), cache, deadline=DEADLINE)
        handles = [reader.open(entry) for _ in range(3)]
        for which, offset, size in reads:
            expected = DATA[offset : offset + size] if offset >= 0 else b""
            assert handles[which].read(offset, size) == expected
        for handle in handles:
            handle.close()
        reader.close()
        if cache is not None:
            cache.close()

    check()


# How much is fetched, and how often


@pytest.mark.parametrize("kind", ["file", "reference"])
def test_random_reads_fetch_a_block_each(server: FaultServer, store: WebStore, make: Make, kind: str) -> None:
    entry = store.add("/large") if kind == "file" else reference(server, "/large")
    handle = make().open(entry)
    chance = random.Random(5)
    blocks = set()
    for _ in range(40):
        offset = chance.randrange(0, len(LARGE) // (64 * KIB)) * 64 * KIB
        blocks.add(offset // BLOCK)
        assert handle.read(offset, 64 * KIB) == LARGE[offset : offset + 64 * KIB]
    assert server.body_bytes <= len(blocks) * BLOCK * 1.1
    assert server.requests <= len(blocks) * 1.1


def test_a_header_alone_opens_no_window(server: FaultServer, make: Make) -> None:
    reader = make()
    handle = reader.open(reference(server, "/large"))
    assert handle.read(0, 128 * KIB) == LARGE[: 128 * KIB]
    assert handle.read(len(LARGE) - 64 * KIB, 64 * KIB) == LARGE[-64 * KIB :]
    settle(reader)
    assert (server.requests, server.body_bytes) == (2, 2 * BLOCK)


@pytest.mark.parametrize("with_cache", [True, False])
@pytest.mark.parametrize("step", [4 * KIB + 1, 128 * KIB, 1 * MIB, 5 * MIB, 64 * MIB])
def test_sequential_reads_fetch_every_byte_once(
    server: FaultServer, make: Make, cache: BlockCache, with_cache: bool, step: int
) -> None:
    reader = make(cache if with_cache else None)
    handle = reader.open(reference(server, "/large"))
    assert read_through(handle, step) == LARGE
    settle(reader)
    assert server.body_bytes == len(LARGE)
    assert server.requests <= (24 if with_cache else 40)


def test_sequential_reads_use_several_streams(server: FaultServer, make: Make) -> None:
    server.faults.latency = 0.2
    handle = make().open(reference(server, "/large"))
    began = time.monotonic()
    assert read_through(handle) == LARGE
    assert server.most_concurrent > 2
    assert time.monotonic() - began < 32 * 0.2


def test_readahead_out_of_order_keeps_the_window(server: FaultServer, make: Make) -> None:
    reader = make()
    handle = reader.open(reference(server, "/large"))
    step = 128 * KIB
    offsets = list(range(0, len(LARGE), step))
    chance = random.Random(6)
    for start in range(0, len(offsets), 6):  # as several kernel threads deliver them
        group = offsets[start : start + 6]
        chance.shuffle(group)
        offsets[start : start + 6] = group
    for offset in offsets:
        assert handle.read(offset, step) == LARGE[offset : offset + step]
    assert server.body_bytes == len(LARGE)
    assert server.requests <= 24


def test_a_far_seek_closes_the_window(server: FaultServer, make: Make) -> None:
    reader = make()
    handle = reader.open(reference(server, "/large"))
    for offset in range(0, 2 * MIB, 128 * KIB):
        handle.read(offset, 128 * KIB)
    settle(reader)
    server.reset_counts()
    assert handle.read(28 * MIB, 64 * KIB) == LARGE[28 * MIB : 28 * MIB + 64 * KIB]
    settle(reader)
    assert (server.requests, server.body_bytes) == (1, BLOCK)


def test_single_flight(server: FaultServer, make: Make, cache: BlockCache) -> None:
    server.faults.latency = 0.2
    for with_cache in (cache, None):
        reader = make(with_cache)
        entry = reference(server)
        with ThreadPoolExecutor(8) as pool:
            handles = [reader.open(entry) for _ in range(8)]
            found = list(pool.map(lambda handle: handle.read(3 * MIB + 5, 1000), handles))
        assert found == [DATA[3 * MIB + 5 : 3 * MIB + 1005]] * 8
        assert (server.requests, server.body_bytes) == (1, BLOCK)
        cache.prune()


def test_eight_threads_fetch_every_byte_once(server: FaultServer, make: Make) -> None:
    reader = make()
    entry = reference(server, "/large")

    def work(_: int) -> bool:
        handle = reader.open(entry)
        try:
            return read_through(handle) == LARGE
        finally:
            handle.close()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert server.body_bytes == len(LARGE)


def test_opening_makes_no_connection(server: FaultServer, store: WebStore, make: Make) -> None:
    ref = reference(server)
    reader = make()
    for entry in (ref, store.add(PATH), msgspec.structs.replace(ref, size=-1, extra={})):
        reader.open(entry).close()
    assert (server.requests, store.list_reads) == (0, 0)


def test_cached_blocks_are_not_fetched(server: FaultServer, store: WebStore, make: Make) -> None:
    entry = store.add(PATH)
    assert read_through(make().open(entry)) == DATA
    server.reset_counts()
    reader = make()
    assert read_through(reader.open(entry)) == DATA
    assert (server.requests, store.list_reads) == (0, 1)
    assert reader.cached_bytes(entry) == len(DATA)


def test_cached_bytes(server: FaultServer, make: Make) -> None:
    reader = make()
    entry = reference(server)
    assert reader.cached_bytes(entry) == 0
    handle = reader.open(entry)
    handle.read(2 * MIB, 10)
    assert reader.cached_bytes(entry) == BLOCK
    assert make(None).cached_bytes(entry) == 0
    assert reader.cached_bytes(Ref("x", "hdfs://x/y", "", -1)) == 0


def test_a_cache_smaller_than_the_content(server: FaultServer, make: Make, tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "small", 6 * MIB)
    reader = make(cache)
    assert read_through(reader.open(reference(server, "/large"))) == LARGE
    assert server.body_bytes <= 2 * len(LARGE)
    assert cache.info().used <= 6 * MIB
    cache.close()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cache_that_cannot_be_written(server: FaultServer, make: Make, tmp_path: Path, ranges: bool) -> None:
    (tmp_path / "file").touch()
    entry = reference(server, "/large")
    server.faults.ranges = ranges
    handle = make(BlockCache(tmp_path / "file", 1 << 30)).open(entry)
    assert read_through(handle) == LARGE
    assert server.body_bytes <= len(LARGE) + 2 * BLOCK
    assert handle.read(5, 10) == LARGE[5:15]


# Servers without ranges


def test_a_content_without_ranges_is_spooled_once(server: FaultServer, make: Make) -> None:
    entry = reference(server, "/large")
    server.faults.ranges = False
    reader = make()
    handle = reader.open(entry)
    chance = random.Random(7)
    for _ in range(50):
        offset = chance.randrange(len(LARGE) - 64 * KIB)
        assert handle.read(offset, 64 * KIB) == LARGE[offset : offset + 64 * KIB]
    handle.close()
    settle(reader)
    assert read_through(reader.open(entry)) == LARGE
    assert (server.requests, server.body_bytes) == (1, len(LARGE))


def test_a_spool_serves_all_its_readers(server: FaultServer, make: Make, cache: BlockCache) -> None:
    server.faults.latency = 0.1
    server.faults.ranges = False
    for with_cache in (cache, None):
        entry = reference(server, "/large")
        reader = make(with_cache)

        def work(number: int, reader: Reader = reader, entry: Ref = entry) -> bool:
            handle = reader.open(entry)
            offset = number * 4 * MIB
            try:
                return handle.read(offset, MIB) == LARGE[offset : offset + MIB]
            finally:
                handle.close()

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(8)))
        settle(reader)
        if with_cache is not None:
            assert server.body_bytes <= 2 * len(LARGE) and server.requests <= 8  # all asked before any answer came
            assert reader.cached_bytes(entry) == len(LARGE)
        cache.prune()


def test_a_spool_that_breaks_is_resumed(server: FaultServer, make: Make) -> None:
    entry = reference(server, "/large")
    server.faults.ranges = False
    server.faults.cut_after, server.faults.cuts = 10 * MIB, 2
    assert read_through(make().open(entry)) == LARGE


def test_a_spool_without_cache_goes_no_further_than_its_reader(server: FaultServer, make: Make) -> None:
    server.contents["/huge"] = bytes(200 * MIB)
    entry = reference(server, "/huge")
    server.faults.ranges = False
    reader = make(None)
    handle = reader.open(entry)
    assert handle.read(0, 10) == bytes(10)
    content = next(iter(reader._contents.values()))
    until(lambda: all(fetch.position > 8 for fetch in content.fetches))
    assert handle.read(60 * MIB, 10) == bytes(10)
    assert server.body_bytes < 120 * MIB
    handle.close()
    settle(reader)


def test_a_spool_that_nobody_reads_ends(server: FaultServer, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("artifactfs.reader._PAUSE", 0.1)
    server.contents["/huge"] = bytes(100 * MIB) + DATA
    entry = reference(server, "/huge")
    server.faults.ranges = False
    reader = make(None)
    handle = reader.open(entry)
    assert handle.read(0, 10) == bytes(10)
    settle(reader)
    assert server.body_bytes < 60 * MIB
    assert handle.read(100 * MIB, 5 * MIB) == DATA[: 5 * MIB]


class PlainHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def test_the_server_of_the_standard_library(tmp_path: Path, make: Make) -> None:
    """``python -m http.server``: HTTP/1.0, no ETag, no ranges."""
    (tmp_path / "f.bin").write_bytes(DATA)
    plain = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(PlainHandler, directory=str(tmp_path)))
    thread = threading.Thread(target=plain.serve_forever, args=(0.02,))
    thread.start()
    try:
        ref = next(iter(expand(f"http://127.0.0.1:{plain.server_port}/f.bin"))).ref
        reader = make()
        handle = reader.open(ref)
        assert handle.read(5 * MIB, 100) == DATA[5 * MIB : 5 * MIB + 100]
        assert read_through(handle) == DATA
        os.utime(tmp_path / "f.bin", (1_000_000_000, 1_000_000_000))
        with pytest.raises(SourceChangedError):
            make(None).open(ref).read(0, 10)
    finally:
        plain.shutdown()
        plain.server_close()
        thread.join()


# Wrong bytes


def test_wrong_bytes_are_fetched_again(
    server: FaultServer, store: WebStore, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    entry = store.add(PATH)
    server.faults.flip, server.faults.flips = frozenset({2 * MIB + 7}), 1
    assert read_through(make().open(entry, "e/p/c:v0/f.bin")) == DATA
    assert "e/p/c:v0/f.bin: block 2" in caplog.text


@pytest.mark.parametrize("ranges", [True, False])
def test_wrong_bytes_are_never_served_nor_cached(
    server: FaultServer, store: WebStore, make: Make, cache: BlockCache, caplog: pytest.LogCaptureFixture, ranges: bool
) -> None:
    entry = store.add(PATH)
    server.faults.ranges = ranges
    server.faults.flip = frozenset({2 * MIB + 7, len(DATA) - 1})
    reader = make()
    handle = reader.open(entry, "e/p/c:v0/f.bin")
    for offset in (2 * MIB, len(DATA) - 10):
        with pytest.raises(IntegrityError, match=r"e/p/c:v0/f\.bin: block") as caught:
            handle.read(offset, 10)
        assert type(caught.value) is IntegrityError
    assert handle.read(3 * MIB, BLOCK) == DATA[3 * MIB : 4 * MIB]  # everything else reads on
    logged = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert any("e/p/c:v0/f.bin: block 2" in text and server.url(PATH) in text for text in logged)
    settle(reader)
    cached = cache.content(entry.id, entry.size)
    assert [cached.has(block) for block in (2, 3, 8)] == [False, True, False]
    server.faults.flip = frozenset()
    assert read_through(handle) == DATA  # the error was not remembered


def test_wrong_small_content(server: FaultServer, store: WebStore, make: Make) -> None:
    entry = store.add("/small")
    server.contents["/small"] = bytes(1000)
    handle = make().open(entry)
    with pytest.raises(IntegrityError):
        handle.read(0, 10)
    assert server.requests == 2
    server.contents["/small"] = DATA[:1000]
    assert handle.read(0, 1000) == DATA[:1000]


@pytest.mark.parametrize("wrong", [b"", bytes(9 * 32), bytes(5)])
def test_a_wrong_block_list(store: WebStore, server: FaultServer, make: Make, wrong: bytes) -> None:
    entry = store.add(PATH)
    right, store.lists[entry.id] = store.lists[entry.id], wrong
    reader = make()
    handle = reader.open(entry)
    with pytest.raises(IntegrityError):
        handle.read(0, 10)
    settle(reader)
    assert reader.cached_bytes(entry) == 0, "the block that was fetched meanwhile was not kept: nothing says that it is right"
    store.lists[entry.id] = right
    assert handle.read(0, 10) == DATA[:10]


def test_a_flipped_bit_in_the_cache_is_fetched_again(server: FaultServer, store: WebStore, make: Make, cache: BlockCache) -> None:
    entries = [store.add(PATH), reference(server), store.add("/small")]
    for entry in entries:
        read_through(make().open(entry))
    files = [path for path in cache.root.rglob("*") if path.is_file() and path.stat().st_size > 100]
    for path in files:
        if path.name != "ledger":
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    for entry, expected in zip(entries, (DATA, DATA, DATA[:1000]), strict=True):
        assert read_through(make().open(entry)) == expected


def test_answers_of_another_range(server: FaultServer, make: Make) -> None:
    handle = make().open(reference(server))
    server.faults.content_range = f"bytes 0-{BLOCK - 1}/{len(DATA)}"
    with pytest.raises(IntegrityError):
        handle.read(2 * MIB, 10)
    server.faults.content_range = ""
    assert handle.read(2 * MIB, 10) == DATA[2 * MIB : 2 * MIB + 10]


# Changed sources


@pytest.mark.parametrize("honour", [True, False])
def test_a_changed_object_in_the_middle(server: FaultServer, make: Make, honour: bool) -> None:
    handle = make().open(reference(server))
    assert handle.read(0, 100) == DATA[:100]
    server.contents[PATH] = DATA[::-1]
    server.faults.honour_if_match = honour
    with pytest.raises(SourceChangedError, match="add it again"):
        handle.read(4 * MIB, 100)
    assert handle.read(200, 100) == DATA[200:300]  # the old bytes that are cached are still right
    server.contents[PATH] = DATA
    assert handle.read(4 * MIB, 100) == DATA[4 * MIB : 4 * MIB + 100]


def test_a_new_version_is_another_content(server: FaultServer, make: Make) -> None:
    reader = make()
    assert read_through(reader.open(reference(server))) == DATA
    server.contents[PATH] = DATA[::-1]
    assert read_through(reader.open(reference(server))) == DATA[::-1]


def test_pinned_by_content_id_alone(server: FaultServer, store: WebStore, make: Make) -> None:
    """No ETag, no time: what differs from what was read when it was added is a changed source."""
    server.faults.etag, server.faults.modified = None, False
    added = next(iter(expand(server.url(PATH))))
    store.lists[added.ref.id] = added.block_list
    handle = make().open(added.ref)
    assert handle.read(0, 10) == DATA[:10]
    server.contents[PATH] = DATA[::-1]
    with pytest.raises(SourceChangedError):
        handle.read(4 * MIB, 10)


# Errors


def test_errors_are_not_remembered(server: FaultServer, make: Make) -> None:
    handle = make().open(reference(server))
    del server.contents[PATH]
    for _ in range(2):
        with pytest.raises(NotFoundError):
            handle.read(0, 10)
    server.contents[PATH] = DATA
    server.faults.status = 503
    with pytest.raises(NetworkError):
        handle.read(0, 10)
    server.faults.status = 0
    assert handle.read(0, 10) == DATA[:10]


def test_a_stall_delays_only_who_needs_it(server: FaultServer, store: WebStore, make: Make, tmp_path: Path) -> None:
    reader = make(deadline=5.0)
    ref = reference(server)
    stalled = reader.open(ref)
    assert stalled.read(7 * MIB, 10) == DATA[7 * MIB : 7 * MIB + 10]
    (tmp_path / "local").write_bytes(b"local")
    local = reader.open(next(iter(expand(f"file://{tmp_path}/local"))).ref)
    with FaultServer({PATH: DATA}) as healthy, ThreadPoolExecutor(20) as pool:
        other = reader.open(reference(healthy))
        server.faults.stall_after = 1000
        began = time.monotonic()
        waiting = [pool.submit(stalled.read, number * 100 * KIB, 10) for number in range(20)]
        until(lambda: server.concurrent > 0)
        assert stalled.read(7 * MIB, 10) == DATA[7 * MIB : 7 * MIB + 10]  # cached
        assert local.read(0, 5) == b"local"
        assert read_through(other) == DATA
        assert time.monotonic() - began < 5.0
        for future in waiting:
            with pytest.raises(NetworkError):
                future.result(30)
        assert time.monotonic() - began < 20.0
    server.faults.stall_after = None
    assert stalled.read(0, 10) == DATA[:10]


def test_a_stall_in_the_window_gives_way_to_another_fetch(server: FaultServer, make: Make) -> None:
    reader = make(deadline=3.0)
    handle = reader.open(reference(server, "/large"))
    server.faults.stall_after, server.faults.stalls = 500 * KIB, 2
    assert read_through(handle) == LARGE


def test_a_slow_but_steady_source_is_no_stall(server: FaultServer, make: Make) -> None:
    """Each answer breaks off early, so the fetch of a block lasts longer than the deadline, but it moves."""
    reader = make(deadline=1.0)
    server.faults.cut_after, server.faults.latency = 100 * KIB, 0.15
    handle = reader.open(reference(server))
    began = time.monotonic()
    assert handle.read(0, 10) == DATA[:10]
    assert time.monotonic() - began > 1.0


def test_a_dripping_source_is_a_stall(server: FaultServer, make: Make) -> None:
    server.faults.drip = 0.02
    began = time.monotonic()
    with pytest.raises(NetworkError):
        make(deadline=1.5).open(Ref("x", server.url(PATH), "", len(DATA), extra={"etag": server.etag(PATH) or ""})).read(0, 10)
    assert time.monotonic() - began < 5


def test_a_server_that_is_gone(server: FaultServer, make: Make) -> None:
    handle = make().open(reference(server))
    server.stop()
    with pytest.raises(NetworkError):
        handle.read(0, 10)


def test_closing_ends_what_waits(server: FaultServer, make: Make) -> None:
    reader = make()
    handle = reader.open(reference(server))
    server.faults.latency = 60
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(handle.read, 0, 10)
        until(lambda: server.concurrent > 0)
        reader.close()
        with pytest.raises(ArtifactFSError, match="closed"):
            waiting.result(5)
    with pytest.raises(ArtifactFSError, match="closed"):
        handle.read(0, 10)
    handle.close()


def test_a_closed_handle(server: FaultServer, make: Make) -> None:
    handle = make().open(reference(server), "name")
    handle.close()
    with pytest.raises(ArtifactFSError, match="name was closed"):
        handle.read(0, 10)


def test_closing_the_last_handle_stops_the_window(server: FaultServer, make: Make) -> None:
    reader = make()
    handle = reader.open(reference(server, "/large"))
    for offset in range(0, 4 * MIB, 128 * KIB):
        handle.read(offset, 128 * KIB)
    handle.close()
    settle(reader)
    assert server.body_bytes < 24 * MIB
    until(lambda: not reader._contents)
    assert reader.budget.taken == 0


def test_the_budget_bounds_what_is_under_way(server: FaultServer, make: Make) -> None:
    reader = make(budget=3 * MIB)
    handle = reader.open(reference(server, "/large"))
    most = 0
    for offset in range(0, len(LARGE), 128 * KIB):
        assert handle.read(offset, 128 * KIB) == LARGE[offset : offset + 128 * KIB]
        most = max(most, reader.budget.taken)
    assert most <= 3 * MIB + BLOCK
    settle(reader)
    assert reader.budget.taken == 0
    assert server.body_bytes == len(LARGE)


# Offline


def test_offline(server: FaultServer, store: WebStore, make: Make) -> None:
    file, ref, small = store.add(PATH), reference(server), store.add("/small")
    online = make()
    for entry in (file, ref, small):
        online.open(entry).read(0, 100)
    settle(online)
    online.size(unsized := msgspec.structs.replace(ref, size=-1, extra={}))
    server.reset_counts()
    store.list_reads = 0
    offline = make(offline=True)
    for entry in (file, ref, small):
        assert offline.open(entry).read(50, 50) == DATA[50:100]
    for entry in (file, ref):
        with pytest.raises(OfflineError, match="e/p/c:v0/f is not in the cache"):
            offline.open(entry, "e/p/c:v0/f").read(5 * MIB, 10)
        with pytest.raises(OfflineError):
            offline.open(entry).read(0, 5 * MIB)
    with pytest.raises(OfflineError):
        offline.size(unsized)
    with pytest.raises(OfflineError):
        offline.open(unsized).read(0, 10)
    with pytest.raises(OfflineError):
        make(None, offline=True).open(ref).read(0, 10)
    assert (server.requests, store.list_reads) == (0, 0)


# References of unknown size, and files


def test_size_is_asked_once(server: FaultServer, make: Make) -> None:
    ref = next(iter(expand(server.url(PATH), checksum=False))).ref
    reader = make()
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: reader.size(ref), range(16))) == {len(DATA)}
    assert server.requests == 1
    handle = reader.open(ref)
    assert handle.size == -1
    assert handle.read(0, 100) == DATA[:100]
    assert handle.size == len(DATA)
    server.contents[PATH] = DATA[::-1]
    with pytest.raises(SourceChangedError):  # pinned for this process by what it saw first
        handle.read(3 * MIB, 10)
    assert reader.size(msgspec.structs.replace(ref, size=7)) == 7


def test_an_unsized_reference_that_fails_is_asked_again(server: FaultServer, make: Make) -> None:
    ref = next(iter(expand(server.url("/later"), checksum=False))).ref
    reader = make()
    with pytest.raises(NotFoundError):
        reader.size(ref)
    server.contents["/later"] = b"12345"
    assert reader.size(ref) == 5


def test_tracked_references_cannot_be_read(make: Make) -> None:
    ref = next(iter(expand("hdfs://cluster/x", "x"))).ref
    with pytest.raises(UsageError, match="not recognized"):
        make().open(ref)
    with pytest.raises(UsageError, match="not recognized"):
        make().size(ref)


def test_file_references(tmp_path: Path, store: WebStore, make: Make, cache: BlockCache) -> None:
    path = tmp_path / "f"
    path.write_bytes(DATA)
    added = next(iter(expand(f"file://{path}")))
    store.lists[added.ref.id] = added.block_list
    with pytest.raises(OfflineError):  # its block list is in the store
        make(offline=True).open(added.ref).read(0, 10)
    make().open(added.ref).read(0, 10)
    reader = make(offline=True)
    handle = reader.open(added.ref, "e/p/c:v0/f")
    for offset, size in EDGES:
        assert handle.read(offset, size) == DATA[offset : offset + size]
    assert read_through(handle) == DATA
    assert handle.read(len(DATA), 1) == b""
    assert reader.cached_bytes(added.ref) == len(DATA)
    assert not any(cache.content(added.ref.id, len(DATA)).has(block) for block in range(9))


def test_a_changed_file_is_never_served(tmp_path: Path, store: WebStore, make: Make) -> None:
    path = tmp_path / "f"
    path.write_bytes(DATA)
    before = path.stat()
    added = next(iter(expand(f"file://{path}")))
    store.lists[added.ref.id] = added.block_list
    reader = make()
    handle = reader.open(added.ref, "e/p/c:v0/f")
    assert handle.read(0, 10) == DATA[:10]
    with path.open("r+b") as file:  # in place, with the size and the time of before
        file.seek(3 * MIB)
        file.write(b"!")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(SourceChangedError, match="e/p/c:v0/f"):
        handle.read(3 * MIB + 100, 10)
    assert handle.read(4 * MIB, 10) == DATA[4 * MIB : 4 * MIB + 10]
    path.unlink()
    with pytest.raises(SourceChangedError):
        handle.read(5 * MIB, 10)
    path.write_bytes(DATA)
    assert handle.read(3 * MIB + 100, 10) == DATA[3 * MIB + 100 : 3 * MIB + 110]


def test_an_unchecked_file(tmp_path: Path, make: Make) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"12345")
    ref = next(iter(expand(f"file://{path}", checksum=False))).ref
    handle = make().open(ref)
    assert (handle.read(0, 10), handle.read(2, 2), handle.read(5, 1)) == (b"12345", b"34", b"")
    path.write_bytes(b"1234")
    with pytest.raises(SourceChangedError):
        handle.read(0, 1)


def test_the_native_store(server: FaultServer, tmp_path: Path, cache: BlockCache) -> None:
    """Everything that a version of a local store can hold, with the block lists of references in its packs."""
    server.faults.etag, server.faults.modified = None, False
    (tmp_path / "new").mkdir()
    (tmp_path / "new/stored").write_bytes(LARGE)
    (tmp_path / "outside").write_bytes(LARGE[: 3 * MIB])
    added = [*expand(f"file://{tmp_path}/outside", "file"), *expand(server.url(PATH), "web"), *expand(server.url("/small"))]
    store = open_store(str(tmp_path / "store"))
    added.sort(key=lambda found: found.path)
    draft = Draft(name=parse("e/p/c"), type="dataset", folder=gather([str(tmp_path / "new")], added), commit="1")
    root = publish(store, draft).version.root
    reader = Reader(store, cache, deadline=DEADLINE)
    contents = {"stored": LARGE, "file": LARGE[: 3 * MIB], "web": DATA, "small": DATA[:1000]}
    for name, expected in contents.items():
        entry = store.tree.lookup(root, name)
        assert isinstance(entry, (File, Ref))
        handle = reader.open(entry, f"e/p/c:v0/{name}")
        assert read_through(handle) == expected
        handle.close()
        assert reader.cached_bytes(entry) == len(expected)
    server.stop()
    offline = Reader(store, cache, offline=True)
    for name, expected in contents.items():
        entry = store.tree.lookup(root, name)
        assert isinstance(entry, (File, Ref))
        assert offline.open(entry).read(100, 100) == expected[100:200]
    reader.close()
    offline.close()


# Threads


@pytest.mark.parametrize("kind", ["ranges", "no ranges", "no cache", "no ranges, no cache", "small cache"])
def test_mixed_work_in_many_threads(
    server: FaultServer, store: WebStore, make: Make, cache: BlockCache, tmp_path: Path, kind: str
) -> None:
    """Sequential and random readers, opening and closing, over a server that cuts and refuses; nothing is left behind."""
    cache = BlockCache(tmp_path / "small", 5 * MIB) if kind == "small cache" else cache
    reader = make(None if "no cache" in kind else cache)
    entries: list[tuple[File | Ref, bytes]] = [
        (store.add(PATH), DATA),
        (reference(server), DATA),
        (reference(server, "/large"), LARGE),
        (store.add("/small"), DATA[:1000]),
    ]
    server.faults.status, server.faults.every = 503, 5
    server.faults.ranges = "no ranges" not in kind
    server.faults.cut_after, server.faults.cuts = 700 * KIB, -1 if server.faults.ranges else 3

    def work(seed: int) -> int:
        chance = random.Random(seed)
        wrong = 0
        for _ in range(6):
            entry, data = chance.choice(entries)
            handle = reader.open(entry)
            offset = chance.randrange(len(data))
            for _ in range(chance.randrange(1, 12)):
                size = chance.choice([1, 4096, 128 * KIB, 3 * MIB])
                wrong += read(handle, offset, size) != data[offset : offset + size]
                offset = offset + size if chance.random() < 0.8 else chance.randrange(len(data))
            handle.close()
        return wrong

    def read(handle: Handle, offset: int, size: int) -> bytes:
        """Now and then one fetch meets all the refusals of its six attempts; the next read tries again."""
        for _ in range(4):
            with contextlib.suppress(NetworkError):
                return handle.read(offset, size)
        return handle.read(offset, size)

    with ThreadPoolExecutor(10) as pool:
        assert sum(pool.map(work, range(10))) == 0
    settle(reader)
    until(lambda: not reader._contents)
    assert reader.budget.taken == 0


def test_threads_end_when_there_is_nothing_to_do(server: FaultServer, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("artifactfs.waiting._IDLE", 0.05)
    before = set(threading.enumerate())
    reader = make(None)
    assert read_through(reader.open(reference(server))) == DATA
    until(lambda: not any(thread.name == "artifactfs-fetch" for thread in set(threading.enumerate()) - before))
    assert reader.open(reference(server, "/large")).read(0, 10) == LARGE[:10]
