"""Stores made by somebody who means harm: everything that reads one ends soon, in bounded memory, with an error of ours."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from blake3 import blake3
from commits import NAME, commit, contents, fork, new_file, problems

from artifactfs.content import MAX_CONTENT
from artifactfs.errors import ArtifactFSError, IntegrityError, NotPermittedError, StoreFormatError
from artifactfs.folders import MadeFolder
from artifactfs.maintenance import gc
from artifactfs.model import BLOCK, Dir, Entry, Extent, File, Page, Ref, Symlink, Version
from artifactfs.names import ArtifactName
from artifactfs.objects import object_key
from artifactfs.store.native import NativeStore, encode_record, now
from artifactfs.store.urls import open_store

PACK = b"p" + b"\x11" * 16
BLOB = b"b" + b"\x22" * 32
HOSTILE = ArtifactName("acme", "vision", "hostile")
MEMORY = 400 << 20
"""Bytes that reading anything hostile may take on top of what the interpreter has."""
SECONDS = 30


@pytest.fixture
def store(tmp_path: Path) -> NativeStore:
    """A store with one sound version beside whatever a test puts there."""
    store = open_store(str(tmp_path / "store"))
    commit(store, {"x": new_file(tmp_path / "x", b"sound")})
    return store


class Crafted:
    """Writes pages of one's own making into one pack, and a version over them."""

    def __init__(self, store: NativeStore) -> None:
        self.store = store
        self.data = bytearray(b"\0" * 64)

    def put(self, data: bytes) -> Extent:
        extent = Extent(PACK, len(self.data), len(data))
        self.data += data
        return extent

    def page(self, data: bytes) -> Page:
        return Page(blake3(data).digest(), self.put(data))

    def leaf(self, *entries: Entry) -> Page:
        return self.page(msgspec.msgpack.encode([0, 1, entries]))

    def folder(self, name: str, page: Page | None, count: int = 1) -> Dir:
        return Dir(name, bytes(32), page, count, 1, 1, 0)

    def finish(self, page: Page | None) -> Version:
        self.store.objects.put(object_key(PACK), self.data)
        root = self.folder("", page)
        fields: dict[str, Any] = {"type": "dataset", "digest": root.digest.hex(), "size": 1, "file_count": 1, "commit": "hostile"}
        place = {"entity": HOSTILE.entity, "project": HOSTILE.project, "collection": HOSTILE.collection, "number": 0}
        version = Version(root=root, created_at=now(), updated_at=now(), **fields, **place)
        assert self.store.create_version(version)
        return version


def read_everything(store: NativeStore, version: Version) -> list[str]:
    """Read all that can be; the errors of the rest. Any other exception than ours goes through."""
    errors: list[str] = []
    pending = [version.root]
    seen: set[Page | None] = set()
    while pending:
        directory = pending.pop()
        if directory.page in seen:
            continue
        seen.add(directory.page)
        try:
            for entry in store.tree.entries(directory):
                if isinstance(entry, Dir):
                    pending.append(entry)
                elif isinstance(entry, File):
                    errors += _read(store, entry)
                elif isinstance(entry, Ref):
                    errors += _tried(lambda entry=entry: store.block_list(entry))  # type: ignore[misc]
        except IntegrityError as error:
            errors.append(str(error))
        errors += _tried(lambda directory=directory: store.tree.lookup(directory, "x"))  # type: ignore[misc]
    return errors


def _read(store: NativeStore, file: File) -> list[str]:
    def local() -> None:
        content = store.local_content(file)
        assert content is not None
        try:
            for offset in (0, BLOCK, file.size // 2, max(0, file.size - 5)):
                content.read(offset, 100)
        finally:
            content.close()

    def remote() -> None:
        pieces = store.source(file).fetch(max(0, file.size - 100), min(100, file.size))
        assert sum(map(len, pieces)) == min(100, file.size)

    return _tried(local) + _tried(remote)


def _tried(action: Callable[[], object]) -> list[str]:
    try:
        action()
    except ArtifactFSError as error:
        return [str(error)]
    return []


def survives(store: NativeStore, version: Version, folder: Path, harmless: bool = False) -> None:
    """Whoever reads the version, checks the store, collects in it or publishes beside and upon it, gets ours or nothing."""

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (_size() + MEMORY,) * 2)
        signal.alarm(SECONDS)
        fresh = open_store(store.url)
        errors = read_everything(fresh, version)
        found = problems(store.url)
        errors += [problem.problem for problem in found]
        assert harmless or any("hostile" in problem.where for problem in found), "fsck sees that something is wrong"
        assert not any("bikes" in problem.where for problem in found), "and what is sound is sound"
        errors += _tried(lambda: gc(fresh, grace=-10))
        added: dict[str, Any] = {"x": new_file(folder / "n", b"new"), "zz": new_file(folder / "l", bytes(2 * BLOCK))}
        errors += _tried(lambda: commit(fresh, MadeFolder(added, version.root), HOSTILE))
        errors += _tried(lambda: commit(fresh, added, HOSTILE))
        errors += _tried(lambda: fresh.tree.digest(version.root, "MD5"))
        assert all("\n" not in error and len(error) < 2000 for error in errors), errors
        assert contents(fresh, fresh.version(NAME)) == {"x": (b"sound", False)}
        commit(fresh, {"x": new_file(folder / "y", b"more")})

    assert fork(child) == 0
    assert not list(folder.glob("escaped*"))


def _size() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


# Pages


NAMES = ["..", ".", "", "/", "a/b", "/etc/passwd", "../../escaped", "a\0b", "x" * 256, "\n" * 300]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_elsewhere(store: NativeStore, tmp_path: Path, name: str) -> None:
    crafted = Crafted(store)
    page = crafted.leaf(Symlink(name, "x"))
    survives(store, crafted.finish(page), tmp_path)


def _cases() -> Iterator[tuple[str, Callable[[Crafted], Page | None]]]:
    def link(name: str) -> Symlink:
        return Symlink(name, "x")

    def index(crafted: Crafted, level: int, *children: tuple[str, Page]) -> Page:
        listed = [[first, bytes(32), page, 1, 1, 1, 0] for first, page in children]
        return crafted.page(msgspec.msgpack.encode([1, 1, level, listed]))

    yield "repeated names", lambda c: c.leaf(link("a"), link("a"))
    yield "names out of order", lambda c: c.leaf(link("b"), link("a"))
    yield "an empty page", lambda c: c.leaf()
    yield "no page", lambda c: c.page(b"garbage")
    yield "nested msgpack", lambda c: c.page(b"\x91" * 500_000)
    yield "a huge array header", lambda c: c.page(b"\x93\x00\x01\xdd\xff\xff\xff\xff")
    yield "a huge string header", lambda c: c.page(b"\x93\x00\x01\x91\x93\x02\xdb\xff\xff\xff\xff")
    yield "another page version", lambda c: c.page(msgspec.msgpack.encode([0, 2, [link("a")]]))
    yield "not UTF-8", lambda c: c.page(b"\x93\x00\x01\x91\x93\x02\xa1\xff\xa1x")
    yield "bytes that do not match", lambda c: Page(bytes(32), c.put(msgspec.msgpack.encode([0, 1, [link("a")]])))
    yield "a page outside its pack", lambda c: Page(bytes(32), Extent(PACK, 1 << 40, 100))
    yield "a page over the end of its pack", lambda c: Page(bytes(32), Extent(PACK, 10, 4 << 20))
    yield "a page of no length", lambda c: Page(bytes(32), Extent(PACK, 10, 0))
    yield "a page of a terabyte", lambda c: Page(bytes(32), Extent(PACK, 10, 1 << 40))
    yield "a page at the end of numbers", lambda c: Page(bytes(32), Extent(PACK, (1 << 63) - 1, 100))
    yield "a page in no object", lambda c: Page(bytes(32), Extent(b"../../../../etc/passwd", 0, 100))
    yield "a page in an object that is not there", lambda c: Page(bytes(32), Extent(b"p" + b"\x99" * 16, 0, 100))
    yield "an index of itself, nearly", lambda c: index(c, 1, ("a", index(c, 1, ("a", c.leaf(link("a"))))))
    yield "an index of level 200", lambda c: index(c, 200, ("a", c.leaf(link("a"))))
    yield "an index out of order", lambda c: index(c, 1, ("b", c.leaf(link("b"))), ("a", c.leaf(link("a"))))
    yield "pages that overlap", lambda c: index(c, 1, ("a", c.leaf(link("a"), link("z"))), ("b", c.leaf(link("b"), link("z"))))
    yield "an index of another first name", lambda c: index(c, 1, ("a", c.leaf(link("x"))))

    def levels(c: Crafted) -> Page:
        page = c.leaf(link("a"))
        for level in range(1, 50):
            page = index(c, level, ("a", page))
        return page

    yield "fifty levels of index", levels

    def totals(c: Crafted) -> Page:
        most = (1 << 63) - 1
        return c.leaf(*(Dir(name, bytes(32), c.leaf(link("a")), most, most, most, most) for name in "abc"))

    yield "totals that overflow", totals
    yield (
        "a reference with a list that is none",
        lambda c: c.leaf(Ref("r", "file:///etc/passwd", "d", 1 << 60, id=bytes(32), blocks=Extent(PACK, 0, 1 << 60))),
    )
    yield (
        "a reference of no size with a list",
        lambda c: c.leaf(Ref("r", "file:///etc/passwd", "d", -1, id=b"short", blocks=Extent(PACK, 1 << 62, 1 << 62))),
    )


CASES = dict(_cases())


@pytest.mark.parametrize("case", CASES)
def test_pages_that_cannot_be(store: NativeStore, tmp_path: Path, case: str) -> None:
    crafted = Crafted(store)
    survives(store, crafted.finish(CASES[case](crafted)), tmp_path)


# Files


def _file(size: int, *extents: Extent, **fields: Any) -> File:
    return File("f", size, False, fields.pop("id", b"\x33" * 32), extents, **fields)


FILES: dict[str, Callable[[Crafted], File]] = {
    "outside its pack": lambda c: _file(100, Extent(PACK, 1 << 40, 100)),
    "over the end of its pack": lambda c: _file(1 << 20, Extent(PACK, 10, 1 << 20)),
    "at the end of numbers": lambda c: _file(100, Extent(PACK, (1 << 63) - 50, 100)),
    "in no object": lambda c: _file(100, Extent(b"b../../../../../../etc/passwd", 0, 100)),
    "in an object of an odd kind": lambda c: _file(100, Extent(b"x" + bytes(16), 0, 100)),
    "in an object that is not there": lambda c: _file(100, Extent(b"b" + bytes(32), 0, 100)),
    "nowhere": lambda c: _file(100),
    "of other bytes": lambda c: _file(64, Extent(PACK, 0, 64)),
    "larger than its extents": lambda c: _file(101, Extent(PACK, 0, 64)),
    "smaller than its extents": lambda c: _file(10, Extent(PACK, 0, 64)),
    "of extents that straddle blocks": lambda c: _file(64, Extent(PACK, 0, 10), Extent(PACK, 10, 54)),
    "of many empty extents": lambda c: _file(64, *[Extent(PACK, 0, 0)] * 10_000, Extent(PACK, 0, 64)),
    "large without a list": lambda c: _file(2 * BLOCK, Extent(PACK, 0, 2 * BLOCK)),
    "large with a short list": lambda c: _file(2 * BLOCK, Extent(PACK, 0, 2 * BLOCK), blocks=Extent(PACK, 0, 63)),
    "large with a wrong list": lambda c: _file(2 * BLOCK, Extent(PACK, 0, 2 * BLOCK), blocks=Extent(PACK, 0, 64)),
    "of an exabyte": lambda c: _file(1 << 60, Extent(PACK, 0, 1 << 60), blocks=Extent(PACK, 0, 1 << 45)),
    "of the last number": lambda c: _file((1 << 63) - 1, Extent(PACK, 0, (1 << 63) - 1), blocks=Extent(PACK, 0, 32)),
    "of the most a file may have": lambda c: _file(
        MAX_CONTENT, Extent(PACK, 0, MAX_CONTENT), blocks=Extent(PACK, 0, 32 * MAX_CONTENT // BLOCK)
    ),
    "with a table of a terabyte": lambda c: _file(100, table=Extent(PACK, 0, 1 << 40)),
    "with a table outside its pack": lambda c: _file(100, table=Extent(PACK, 1 << 30, 10_000)),
    "with a table that is none": lambda c: _file(100, table=c.put(b"garbage")),
    "with a nested table": lambda c: _file(100, table=c.put(b"\x91" * 500_000)),
    "with a table of a huge header": lambda c: _file(100, table=c.put(b"\xdd\xff\xff\xff\xff")),
    "with a table of negative places": lambda c: _file(0, table=c.put(msgspec.msgpack.encode([[PACK, -1, 0]]))),
    "with a table that adds up to too much": lambda c: _file(
        100, table=c.put(msgspec.msgpack.encode([[PACK, 0, (1 << 63) - 1]] * 4))
    ),
    "empty of another id": lambda c: _file(0),
    "of an algorithm that is none": lambda c: _file(0, id=blake3(b"").digest(), algorithm="SHA0", checksum="x"),
    "of a checksum of another content": lambda c: _file(0, id=blake3(b"").digest(), algorithm="MD5", checksum="x"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_cannot_be(store: NativeStore, tmp_path: Path, case: str) -> None:
    crafted = Crafted(store)
    survives(store, crafted.finish(crafted.leaf(FILES[case](crafted))), tmp_path)


def test_lists_and_tables_in_a_sparse_terabyte(store: NativeStore, tmp_path: Path) -> None:
    """What costs an attacker nothing to claim: objects of any size, of zeros."""
    crafted = Crafted(store)
    size = 2 << 40
    files = [
        File("a", size, False, bytes(32), (Extent(BLOB, 0, size),), Extent(BLOB, 0, 32 * size // BLOCK)),
        File("b", 100, False, bytes(32), table=Extent(BLOB, 0, 64 << 20)),
        File("c", 100, False, bytes(32), table=Extent(BLOB, 0, (64 << 20) + 1)),
        File("d", 1 << 20, False, bytes(32), (Extent(BLOB, 0, 1 << 20),)),
    ]
    version = crafted.finish(crafted.leaf(*files))
    path = Path(store.url, object_key(BLOB))
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(4 << 40)
    survives(store, version, tmp_path)


# Shapes


def test_a_chain_of_folders_without_end(store: NativeStore, tmp_path: Path) -> None:
    crafted = Crafted(store)
    page = crafted.leaf(Symlink("a", "x"))
    for _ in range(3000):
        page = crafted.leaf(crafted.folder("d", page))
    survives(store, crafted.finish(page), tmp_path)


def test_folders_that_are_each_twice_in_the_next(store: NativeStore, tmp_path: Path) -> None:
    """2 to the power of 60 paths: whoever visits each page once is soon done."""
    crafted = Crafted(store)
    page = crafted.leaf(Symlink("a", "x"))
    for _ in range(60):
        page = crafted.leaf(crafted.folder("d", page), crafted.folder("e", page))
    version = crafted.finish(page)

    def child() -> None:
        signal.alarm(SECONDS)
        fresh = open_store(store.url)
        assert len(list(fresh.tree.pages(version.root, set()))) == 61
        assert any("totals" in problem.problem for problem in problems(store.url))
        gc(fresh, grace=-10)
        commit(fresh, {"x": new_file(tmp_path / "n", b"new")}, HOSTILE)

    assert fork(child) == 0


def test_symlinks_that_lead_outside_are_only_text(store: NativeStore, tmp_path: Path) -> None:
    crafted = Crafted(store)
    links = [Symlink("a", "/etc/passwd"), Symlink("b", "../../.."), Symlink("c", "x\ny"), Symlink("d", "")]
    version = crafted.finish(crafted.leaf(*links))
    survives(store, version, tmp_path)
    assert [entry.target for entry in store.tree.entries(version.root) if isinstance(entry, Symlink)] == [
        link.target for link in links
    ]


# Records


@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"[" * 1_000_000, b'{"a":' * 1_000_000, b"\xff" * 100, b'{"number": 1e999}', b"{}", b'"' + b"x" * (1 << 20)],
    ids=["empty", "null", "nested lists", "nested objects", "not UTF-8", "infinity", "no keys", "unterminated"],
)
@pytest.mark.parametrize("record", ["store.json", "collection.json", "versions/00000000.json", "runs"])
def test_records_that_are_none(store: NativeStore, tmp_path: Path, record: str, data: bytes) -> None:
    folder = Path(store.url, "catalog/acme/vision/bikes")
    path = {"store.json": Path(store.url, record), "runs": Path(store.url, "runs/acme/vision/r.json")}.get(
        record, folder / record
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    if record == "store.json":
        with pytest.raises(StoreFormatError, match="cannot be read"):
            open_store(store.url)
        return
    fresh = open_store(store.url)
    errors: list[str] = []
    for action in (
        lambda: fresh.version(NAME),
        lambda: fresh.collection(NAME),
        lambda: fresh.versions(NAME),
        lambda: fresh.collections("acme", "vision"),
        lambda: fresh.runs("acme", "vision"),
        lambda: fresh.run("acme", "vision", "r"),
        lambda: gc(fresh, grace=-10),
        lambda: fresh.delete_version(NAME),
        lambda: list(problems(store.url)),
        lambda: commit(fresh, {"x": new_file(tmp_path / "n", b"new")}),
    ):
        errors += _tried(action)
    assert errors and all("\n" not in error and len(error) < 1000 for error in errors)


def test_deep_metadata_in_a_version(store: NativeStore) -> None:
    path = Path(store.url, "catalog/acme/vision/bikes/versions/00000000.json")
    record = path.read_text().replace('"metadata": {}', '"metadata": {"x": ' + "[" * 100_000 + "]" * 100_000 + "}")
    path.write_text(record)
    with pytest.raises(IntegrityError, match=r"versions/00000000\.json .*cannot be decoded"):
        open_store(store.url).version(NAME)


@pytest.mark.parametrize("record", ["store.json", "catalog/acme/vision/bikes/collection.json"])
@pytest.mark.parametrize("kind", ["endless", "pipe", "terabyte", "loop", "directory"])
def test_records_that_are_no_files(store: NativeStore, record: str, kind: str) -> None:
    path = Path(store.url, record)
    path.unlink()
    if kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "terabyte":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.mkdir()

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (_size() + MEMORY,) * 2)
        signal.alarm(SECONDS)
        with pytest.raises(ArtifactFSError) as caught:
            open_store(store.url).version(NAME)
        assert record in str(caught.value) and "\n" not in str(caught.value)

    assert fork(child) == 0


@pytest.mark.parametrize("kind", ["endless", "pipe", "directory"])
def test_data_objects_that_are_no_files(store: NativeStore, kind: str) -> None:
    for key in list(Path(store.url, "packs").rglob("*/*")):
        key.unlink()
        if kind == "endless":
            key.symlink_to("/dev/zero")
        elif kind == "pipe":
            os.mkfifo(key)
        else:
            key.mkdir()

    def child() -> None:
        signal.alarm(SECONDS)
        fresh = open_store(store.url)
        with pytest.raises(ArtifactFSError):
            contents(fresh, fresh.version(NAME))
        assert problems(store.url)

    assert fork(child) == 0


# The directory itself


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_a_store_that_is_a_file(tmp_path: Path, form: str) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(StoreFormatError, match="not a directory") as caught:
            commit(open_store(form.format(path)), {"x": new_file(tmp_path / "x", b"x")})
        assert str(path) in str(caught.value)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(ArtifactFSError, match="too long"):
        open_store(str(tmp_path / ("x" * 300)))


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
@pytest.mark.parametrize("mode", [0o000, 0o555, 0o700])
def test_a_store_of_another_user(mode: int) -> None:
    path = Path(tempfile.mkdtemp())
    try:
        path.chmod(0o777)
        store = open_store(str(path / "store"))
        commit(store, {"x": new_file(path / "x", b"x")})
        (path / "store").chmod(mode)
        for below in (path / "store").rglob("*"):
            if below.is_dir():
                below.chmod(mode)

        def other_user() -> None:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            if mode == 0o555:
                fresh = open_store(str(path / "store"))
                assert contents(fresh, fresh.version(NAME)) == {"x": (b"x", False)}
                assert problems(fresh.url) == []
                assert [it.name for it in fresh.collections("acme", "vision")] == ["bikes"]
                for action in (
                    lambda: commit(fresh, {"x": new_file(path / "y", b"y")}),
                    lambda: fresh.delete_version(NAME),
                ):
                    with pytest.raises(NotPermittedError, match="Permission denied; check the owner and mode"):
                        action()
            else:
                with pytest.raises(NotPermittedError, match="Permission denied"):
                    open_store(str(path / "store")).version(NAME)

        assert fork(other_user) == 0
    finally:
        shutil.rmtree(path)


def test_a_store_whose_directory_vanishes(store: NativeStore, tmp_path: Path) -> None:
    version = store.version(NAME)
    shutil.rmtree(store.url)
    fresh = open_store(store.url)
    with pytest.raises(ArtifactFSError):
        fresh.version(NAME)
    with pytest.raises(IntegrityError, match="lost"):
        contents(open_store(store.url), version)
    assert commit(store, {"x": new_file(tmp_path / "n", b"new")}).version.number == 0
    assert json.loads(Path(store.url, "store.json").read_text()) == {"format": "artifactfs-store", "version": 1}
    assert encode_record(store.version(NAME))
