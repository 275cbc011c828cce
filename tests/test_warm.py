"""Filling the cache with what a version refers to, against a real HTTP server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_server import FaultServer
from programs import Program
from shelves import Shelf, shelf, write_files  # noqa: F401 - fixtures

from artifactfs import warm
from artifactfs.errors import NetworkError, NotFoundError
from artifactfs.folders import gather
from artifactfs.model import BLOCK, Version
from artifactfs.publish import Progress
from artifactfs.reader import Reader
from artifactfs.references import expand

CONTENTS = {"/small": b"small" * 10, "/large": os.urandom(5 * BLOCK + 7), "/empty": b""}


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer(CONTENTS) as made:
        yield made


@pytest.fixture
def version(shelf: Shelf, server: FaultServer, tmp_path: Path) -> Version:  # noqa: F811
    local = write_files(tmp_path / "local", {"here": b"here"})
    (tmp_path / "outside").write_bytes(b"outside")
    references = [found for path in CONTENTS for found in expand(server.url(path), f"web{path}")]
    references += expand(f"file://{tmp_path}/outside")
    return shelf.log("a/b/c", gather([str(local)], sorted(references, key=lambda found: found.path)))


def total(sizes: Iterator[warm.Cached]) -> tuple[int, int]:
    found = list(sizes)
    return sum(item.size for item in found), sum(item.cached for item in found)


def test_warm_check_evict(shelf: Shelf, server: FaultServer, version: Version) -> None:  # noqa: F811
    size = sum(map(len, CONTENTS.values()))
    assert [item.path for item in warm.check(shelf.store, shelf.reader, version)] == ["web/empty", "web/large", "web/small"]
    assert total(warm.check(shelf.store, shelf.reader, version)) == (size, 0)
    last = Progress()

    def keep(progress: Progress) -> None:
        nonlocal last
        last = progress

    assert warm.warm(shelf.store, shelf.reader, version, report=keep) == []
    assert (last.files, last.bytes, last.stored) == (3, size, size)
    assert total(warm.check(shelf.store, shelf.reader, version)) == (size, size)
    server.reset_counts()
    assert warm.warm(shelf.store, shelf.reader, version, report=keep) == []
    assert server.requests == 0
    assert last.stored == 0
    offline = Reader(shelf.store, shelf.cache, offline=True)
    assert warm.warm(shelf.store, offline, version) == []
    offline.close()
    assert warm.evict(shelf.store, shelf.cache, version) >= size
    assert total(warm.check(shelf.store, shelf.reader, version)) == (size, 0)


def test_warm_a_prefix(shelf: Shelf, version: Version) -> None:  # noqa: F811
    assert warm.warm(shelf.store, shelf.reader, version, "web/s") == []
    assert {item.path for item in warm.check(shelf.store, shelf.reader, version) if item.cached} == {"web/small"}


def test_one_that_fails_does_not_stop_the_others(shelf: Shelf, server: FaultServer, version: Version) -> None:  # noqa: F811
    server.contents.pop("/small")
    (failure,) = warm.warm(shelf.store, shelf.reader, version)
    assert failure.path == "web/small"
    assert {item.path for item in warm.check(shelf.store, shelf.reader, version) if item.cached} == {"web/large"}
    assert isinstance(failure.error, (NotFoundError, NetworkError)) or failure.error.exit_code in (3, 6)


def test_the_command(afs: Program, shelf: Shelf, server: FaultServer, version: Version) -> None:  # noqa: F811
    rows = afs("warm", "a/b/c", "--check", "--json").document
    assert {row["path"]: row["cached"] for row in rows} == {"web/empty": 0, "web/large": 0, "web/small": 0}
    assert afs("warm", "a/b/c", "--json").document["files"] == 3
    assert "in the cache, 0 B fetched" in afs("warm", "a/b/c").out
    assert all(row["cached"] == row["size"] for row in afs("warm", "a/b/c", "--check", "--json").document)
    server.stop()
    afs("get", "a/b/c", "out")
    assert Path("out/web/large").read_bytes() == CONTENTS["/large"]
    assert afs("warm", "a/b/c", "--evict", "--json").document["freed"] > 5 * BLOCK
