"""download.py: versions as files, made, made exact, compared; and nothing outside the root."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifactfs import download
from artifactfs.cache import BlockCache
from artifactfs.errors import (
    ConflictError,
    IntegrityError,
    NotFoundError,
    SourceChangedError,
    StorageFullError,
    UsageError,
)
from artifactfs.folders import gather
from artifactfs.model import BLOCK, Dir, File, Version
from artifactfs.names import ArtifactName
from artifactfs.objects import object_key
from artifactfs.publish import Draft, Progress, publish
from artifactfs.reader import Reader
from artifactfs.references import expand
from artifactfs.store.native import NativeStore
from artifactfs.store.urls import open_store

NAME = ArtifactName("acme", "vision", "bikes")
LARGE = os.urandom(5 * BLOCK + 17)


@pytest.fixture
def store(tmp_path: Path) -> NativeStore:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def reader(store: NativeStore) -> Iterator[Reader]:
    reader = Reader(store, None)
    yield reader
    reader.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory with everything a version can hold."""
    source = tmp_path / "source"
    (source / "sub/deep").mkdir(parents=True)
    (source / "empty").mkdir()
    (source / "a.txt").write_text("alpha")
    (source / "run.sh").write_text("#!/bin/sh\n")
    (source / "run.sh").chmod(0o755)
    (source / "nothing").write_bytes(b"")
    (source / "sub/large.bin").write_bytes(LARGE)
    (source / "sub/deep/ünïcode \n name").write_text("odd")
    (source / "sub/link").symlink_to("deep")
    (source / "dangling").symlink_to("/nowhere/at/all")
    return source


def commit(store: NativeStore, source: Path, *references: str) -> Version:
    items = sorted((item for uri in references for item in expand(uri)), key=lambda item: item.path)
    draft = Draft(name=NAME, type="dataset", folder=gather([str(source)], items), commit=secrets.token_hex(8))
    return publish(store, draft).version


def get(store: NativeStore, reader: Reader, version: Version, root: Path, prefix: str = "", **more: Any) -> Progress:
    return download.get(store, reader, version, str(root), prefix, **more)


def snapshot(root: Path) -> dict[str, tuple[str, bytes | str, bool]]:
    """(kind, content or target, executable) of everything below a directory."""
    found: dict[str, tuple[str, bytes | str, bool]] = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = Path(folder, name)
            relative = str(path.relative_to(root))
            if path.is_symlink():
                found[relative] = ("link", os.readlink(path), False)
            elif path.is_dir():
                found[relative] = ("dir", b"", False)
            else:
                found[relative] = ("file", path.read_bytes(), bool(path.stat().st_mode & 0o100))
    return found


def parts(root: Path) -> list[Path]:
    return [Path(folder, name) for folder, _, files in os.walk(root) for name in files if name.endswith(".afs-part")]


def test_everything_comes_back(store: NativeStore, reader: Reader, source: Path, tmp_path: Path) -> None:
    version = commit(store, source)
    reports: list[tuple[int, int, int]] = []
    done = get(store, reader, version, tmp_path / "out", report=lambda p: reports.append((p.files, p.bytes, p.stored)))
    assert snapshot(tmp_path / "out") == snapshot(source)
    assert (done.files, done.bytes, done.stored) == (version.file_count, version.size, version.size)
    assert reports == sorted(reports) and reports[-1] == (version.file_count, version.size, version.size)
    assert download.verify(store, reader, version, str(tmp_path / "out")) == []


def test_the_umask_decides_modes(store: NativeStore, reader: Reader, source: Path, tmp_path: Path) -> None:
    version = commit(store, source)
    old = os.umask(0o027)
    try:
        get(store, reader, version, tmp_path / "out")
    finally:
        os.umask(old)
    modes = {name: stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) for name in ("a.txt", "run.sh", "sub")}
    assert modes == {"a.txt": 0o640, "run.sh": 0o750, "sub": 0o750}


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("sub", {"sub/x", "sub/deep/y", "sub-two.txt"}),
        ("sub/", {"sub/x", "sub/deep/y"}),
        ("sub/de", {"sub/deep/y"}),
        ("sub/deep/y", {"sub/deep/y"}),
        ("none", set()),
        ("", {"sub/x", "sub/deep/y", "sub-two.txt", "other"}),
    ],
)
def test_prefix_is_a_plain_string(store: NativeStore, reader: Reader, tmp_path: Path, prefix: str, expected: set[str]) -> None:
    source = tmp_path / "source"
    for name in ("sub/x", "sub/deep/y", "sub-two.txt", "other"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    get(store, reader, commit(store, source), tmp_path / "out", prefix)
    files = {name for name, (kind, _, _) in snapshot(tmp_path / "out").items() if kind == "file"}
    assert files == expected


def test_right_files_are_kept_and_others_replaced(store: NativeStore, reader: Reader, source: Path, tmp_path: Path) -> None:
    version = commit(store, source)
    out = tmp_path / "out"
    get(store, reader, version, out)
    before = {name: (out / name).stat() for name in ("a.txt", "sub/large.bin", "nothing")}
    (out / "run.sh").chmod(0o644)
    damaged = bytearray(LARGE)
    damaged[3 * BLOCK] ^= 1
    (out / "sub/large.bin").write_bytes(damaged)  # as long, and its time is set back
    os.utime(out / "sub/large.bin", ns=(before["sub/large.bin"].st_atime_ns, before["sub/large.bin"].st_mtime_ns))
    (out / "mine").write_text("kept")
    done = get(store, reader, version, out)
    assert done.stored == len(LARGE) and done.bytes == version.size
    assert (out / "a.txt").stat().st_ino == before["a.txt"].st_ino
    assert (out / "a.txt").stat().st_mtime_ns == before["a.txt"].st_mtime_ns
    assert (out / "mine").read_text() == "kept"
    (out / "mine").unlink()
    assert snapshot(out) == snapshot(source)


def test_a_large_file_goes_on_behind_its_last_good_block(
    store: NativeStore, reader: Reader, source: Path, tmp_path: Path
) -> None:
    version = commit(store, source)
    out = tmp_path / "out"

    def stop(progress: Progress) -> None:
        if progress.stored > 4 * BLOCK:
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError):
        get(store, reader, version, out, "sub/large", report=stop)
    [part] = parts(out)
    assert not (out / "sub/large.bin").exists()
    with part.open("r+b") as file:
        file.seek(2 * BLOCK + 5)
        file.write(b"rotten")
    done = get(store, reader, version, out, "sub/large")
    assert (out / "sub/large.bin").read_bytes() == LARGE and not parts(out)
    assert done.stored == len(LARGE) - 2 * BLOCK and done.bytes == len(LARGE)


KILLED = """
import os, signal, sys
from artifactfs import download
from artifactfs.reader import Reader
from artifactfs.names import parse
from artifactfs.store.urls import open_store

url, root, after = sys.argv[1:]
store = open_store(url)
def report(progress):
    if progress.files + progress.bytes // (1 << 20) >= int(after):
        os.kill(os.getpid(), signal.SIGKILL)
download.get(store, Reader(store, None), store.version(parse("acme/vision/bikes")), root, report=report)
"""


@pytest.mark.parametrize("after", [1, 3, 6])
def test_a_killed_download_leaves_whole_files_only(
    store: NativeStore, reader: Reader, source: Path, tmp_path: Path, after: int
) -> None:
    version = commit(store, source)
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, store.url, str(out), str(after)]
    assert subprocess.run(command, check=False, timeout=60).returncode == -signal.SIGKILL
    expected = snapshot(source)
    for name, found in snapshot(out).items():
        assert name.endswith(".afs-part") or found == expected[name]
    get(store, reader, version, out)
    assert snapshot(out) == expected


def test_links_in_the_way_are_not_followed(store: NativeStore, reader: Reader, source: Path, tmp_path: Path) -> None:
    version = commit(store, source)
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    out.mkdir()
    (outside / "precious").write_text("precious")
    (out / "sub").symlink_to(outside)
    (out / "a.txt").symlink_to(outside / "precious")
    (out / "dangling").symlink_to(outside)
    before = snapshot(outside)
    with pytest.raises(ConflictError, match=r"'sub' is a directory in acme/vision/bikes:v0, but a file or link"):
        get(store, reader, version, out)
    assert snapshot(outside) == before
    assert (out / "a.txt").read_text() == "alpha" and not (out / "a.txt").is_symlink()
    assert os.readlink(out / "dangling") == "/nowhere/at/all"
    assert (out / "run.sh").exists(), "one conflict does not stop the other files"
    download.checkout(store, reader, version, str(out))
    assert snapshot(out) == snapshot(source) and snapshot(outside) == before


def test_a_version_with_a_link_where_the_next_has_a_directory(store: NativeStore, reader: Reader, tmp_path: Path) -> None:
    """Two harmless versions that together would write outside, if links were followed."""
    outside, source, out = tmp_path / "outside", tmp_path / "source", tmp_path / "out"
    outside.mkdir()
    source.mkdir()
    (source / "x").symlink_to(outside)
    get(store, reader, commit(store, source), out)
    (source / "x").unlink()
    (source / "x").mkdir()
    (source / "x/file").write_text("escaped")
    with pytest.raises(ConflictError):
        get(store, reader, commit(store, source), out)
    assert snapshot(outside) == {}


def test_a_directory_in_the_way_of_a_file(store: NativeStore, reader: Reader, source: Path, tmp_path: Path) -> None:
    version = commit(store, source)
    out = tmp_path / "out"
    for name in ("a.txt", "dangling", "sub/large.bin"):
        (out / name / "inside").mkdir(parents=True)
    with pytest.raises(ConflictError, match=r"'a.txt' is a file in .* \(and 2 more of acme/vision/bikes:v0 failed\)"):
        get(store, reader, version, out)
    assert (out / "run.sh").exists() and (out / "a.txt/inside").is_dir()
    download.checkout(store, reader, version, str(out))
    assert snapshot(out) == snapshot(source)


def test_checkout_makes_it_exact(store: NativeStore, reader: Reader, source: Path, tmp_path: Path) -> None:
    version = commit(store, source)
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    for folder in ("sub/old/older", "emptied", "empty/not"):
        (out / folder).mkdir(parents=True)
    (out / "sub/old/older/file").write_text("x")
    (out / "zzz").write_text("x")
    (out / ".hidden").write_text("x")
    (out / "away").symlink_to(outside)
    os.makedirs(os.fsencode(out) + b"/not utf-8 \xff")
    download.checkout(store, reader, version, str(out))
    assert snapshot(out) == snapshot(source)
    assert (outside / "precious").exists()
    assert download.checkout(store, reader, version, str(out)).stored == 0


@pytest.mark.parametrize("where", ["/", "~", "~/..", "the store"])
def test_checkout_refuses_what_can_only_be_a_mistake(
    store: NativeStore, reader: Reader, source: Path, tmp_path: Path, where: str
) -> None:
    version = commit(store, source)
    root = str(tmp_path) if where == "the store" else os.path.expanduser(where)
    with pytest.raises(UsageError, match="a checkout would remove all else"):
        download.checkout(store, reader, version, root)


def test_a_damaged_content_is_not_written_and_does_not_stop_the_others(
    store: NativeStore, reader: Reader, source: Path, tmp_path: Path
) -> None:
    version = commit(store, source)
    [blob] = [path for path in Path(store.url, "blobs").rglob("*") if path.is_file()]
    blob.chmod(0o644)
    with blob.open("r+b") as file:
        file.seek(2 * BLOCK)
        file.write(b"\0rotten")
    out = tmp_path / "out"
    with pytest.raises(IntegrityError, match=r"large\.bin|damaged|does not match"):
        get(store, reader, version, out)
    assert not (out / "sub/large.bin").exists()
    assert (out / "a.txt").read_text() == "alpha" and (out / "sub/deep/ünïcode \n name").read_text() == "odd"
    [problem] = download.verify_stored(store, reader, version)
    assert (problem.path, problem.kind) == ("sub/large.bin", "unreadable")


def test_a_damaged_page_is_a_finding(store: NativeStore, reader: Reader, source: Path, tmp_path: Path) -> None:
    version = commit(store, source)
    page = version.root.page
    assert page is not None
    pack = Path(store.url, object_key(page.extent.object))
    pack.chmod(0o644)
    with pack.open("r+b") as file:
        file.seek(page.extent.offset + page.extent.length - 1)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    fresh = open_store(store.url)
    with pytest.raises(IntegrityError, match="page"):
        get(fresh, reader, version, tmp_path / "out")
    assert [problem.kind for problem in download.verify_stored(fresh, reader, version)] == ["unreadable"]


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "..", ".", "", "a/../../evil", "nul\0"])
def test_hostile_names_are_refused(store: NativeStore, reader: Reader, source: Path, tmp_path: Path, name: str) -> None:
    """Names that no page of ours can hold, as another kind of store might hand them out."""
    version = commit(store, source)
    good = store.tree.resolve(version.root, "a.txt")
    assert isinstance(good, File)
    tree = SimpleNamespace(entries=lambda folder: iter([msgspec.structs.replace(good, name=name), good]))
    hostile: Any = SimpleNamespace(tree=tree, url=store.url, block_list=store.block_list)
    out = tmp_path / "deep/out"
    with pytest.raises(IntegrityError, match="hostile name"):
        download.get(hostile, reader, version, str(out))
    assert snapshot(tmp_path / "deep") == {"out": ("dir", b"", False), "out/a.txt": ("file", b"alpha", False)}


def test_verify_finds_every_kind_of_difference(store: NativeStore, reader: Reader, source: Path, tmp_path: Path) -> None:
    version = commit(store, source)
    out = tmp_path / "out"
    get(store, reader, version, out)
    (out / "a.txt").write_text("alphb")
    (out / "nothing").unlink()
    (out / "nothing").symlink_to("a.txt")
    (out / "run.sh").chmod(0o644)
    (out / "sub/link").unlink()
    (out / "sub/link").symlink_to("elsewhere")
    (out / "dangling").unlink()
    (out / "empty").rmdir()
    (out / "sub/new").write_text("new")
    (out / "zzz").mkdir()
    (out / "sub/deep/ünïcode \n name").unlink()
    (out / "sub/deep").rmdir()
    (out / "sub/deep").write_text("not a directory")
    before = snapshot(out)
    found = {(problem.path, problem.kind) for problem in download.verify(store, reader, version, str(out))}
    assert found == {
        ("a.txt", "differs"),
        ("nothing", "differs"),
        ("run.sh", "mode"),
        ("sub/link", "differs"),
        ("dangling", "missing"),
        ("empty", "missing"),
        ("sub/new", "extra"),
        ("zzz", "extra"),
        ("sub/deep", "differs"),
        ("sub/deep/ünïcode \n name", "missing"),
    }
    assert snapshot(out) == before, "verify writes nothing"
    with pytest.raises(NotFoundError):
        download.verify(store, reader, version, str(tmp_path / "nowhere"))


def test_references(store: NativeStore, reader: Reader, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "outside.bin"
    target.write_bytes(LARGE)
    gone = tmp_path / "gone.txt"
    gone.write_text("will go")
    version = commit(store, source, target.as_uri(), gone.as_uri())
    get(store, reader, version, tmp_path / "one")
    assert (tmp_path / "one/outside.bin").read_bytes() == LARGE
    assert download.verify(store, reader, version, str(tmp_path / "one")) == []
    target.write_bytes(LARGE[:-1] + bytes([LARGE[-1] ^ 1]))
    gone.unlink()
    reader = Reader(store, None)  # the first one remembers what it read
    with pytest.raises((NotFoundError, SourceChangedError)):
        get(store, reader, version, tmp_path / "two")
    assert (tmp_path / "two/a.txt").exists() and not (tmp_path / "two/outside.bin").exists()
    get(store, reader, version, tmp_path / "three", allow_missing_references=True)
    assert not (tmp_path / "three/outside.bin").exists() and not (tmp_path / "three/gone.txt").exists()
    assert download.verify(store, reader, version, str(tmp_path / "three")) == []
    assert not parts(tmp_path)
    (tmp_path / "one/gone.txt").write_text("will gO")
    assert [p.path for p in download.verify(store, reader, version, str(tmp_path / "one"))] == ["gone.txt"]


def test_two_downloads_into_one_directory(store: NativeStore, source: Path, tmp_path: Path) -> None:
    for number in range(100):
        (source / f"small{number}").write_text(str(number))
    version = commit(store, source)
    out = tmp_path / "out"
    errors: list[BaseException] = []

    def work() -> None:
        try:
            get(store, Reader(store, None), version, out)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert snapshot(out) == snapshot(source)


def test_one_file(store: NativeStore, reader: Reader, source: Path, tmp_path: Path) -> None:
    version = commit(store, source)
    where = download.get_file(store, reader, version, "sub/deep/ünïcode \n name", str(tmp_path / "out"))
    assert Path(where).read_text() == "odd"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sub"]
    for path in ("sub", "missing", "a.txt/below"):
        with pytest.raises(NotFoundError):
            download.get_file(store, reader, version, path, str(tmp_path / "out"))


def test_a_root_that_is_no_directory(store: NativeStore, reader: Reader, source: Path, tmp_path: Path) -> None:
    version = commit(store, source)
    (tmp_path / "file").write_text("x")
    for root in ("file", "file/below"):
        with pytest.raises(UsageError, match="is not a directory"):
            get(store, reader, version, tmp_path / root)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    get(store, reader, version, tmp_path / "link")
    assert snapshot(tmp_path / "real") == snapshot(source)


@pytest.mark.root
@pytest.mark.skipif(os.getuid() != 0, reason="mounts a small tmpfs")
def test_a_full_disk(store: NativeStore, reader: Reader, source: Path, tmp_path: Path) -> None:
    version = commit(store, source)
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(out)], check=True)
    try:
        with pytest.raises(StorageFullError, match="make space"):
            get(store, reader, version, out)
        assert not (out / "sub/large.bin").exists()
    finally:
        subprocess.run(["umount", str(out)], check=True)


@pytest.fixture
def sharing_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system whose files can share blocks."""
    image, disk = tmp_path / "image", tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(512 << 20)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", str(image)], check=True)
    disk.mkdir()
    subprocess.run(["mount", "-o", "loop", str(image), str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # a cache holds files open as long as it lives


def used(disk: Path) -> int:
    os.sync()
    found = os.statvfs(disk)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


@pytest.mark.root
@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("mkfs.xfs"), reason="makes an XFS on a loop device")
@pytest.mark.parametrize("place", ["store", "cache"])
def test_data_is_not_on_disk_twice(place: str, sharing_disk: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A download shares the blocks of a store, or of the cache, on a file system that can."""
    url = str(sharing_disk / "store") if place == "store" else request.getfixturevalue("bucket").store_url()
    cache = BlockCache(sharing_disk / "cache", 1 << 30)
    store = open_store(url, cache)
    source = tmp_path / "source"
    source.mkdir()
    (source / "large.bin").write_bytes(os.urandom(40 * BLOCK + 5000))
    (source / "small.txt").write_text("small")
    version = commit(store, source)
    before = used(sharing_disk)
    with contextlib.closing(Reader(store, cache)) as reader:
        for number in range(3):
            get(store, reader, version, sharing_disk / f"out{number}")
    fetched = 0 if place == "store" else 41 * BLOCK
    assert used(sharing_disk) - before < fetched + 4 * BLOCK
    assert snapshot(sharing_disk / "out2") == snapshot(source)
    with open(sharing_disk / "out0/large.bin", "r+b") as file:
        file.write(b"changed")
    with contextlib.closing(Reader(store, cache)) as reader:
        assert download.verify(store, reader, version, str(sharing_disk / "out1")) == []
        get(store, reader, version, sharing_disk / "out0")
    assert snapshot(sharing_disk / "out0") == snapshot(source)


names = st.sampled_from(["a", "b", "a.b", "é", "\n"])
nodes = st.recursive(
    st.tuples(st.just("file"), st.sampled_from([b"", b"x", b"y" * 3000]), st.booleans())
    | st.tuples(st.just("link"), st.sampled_from(["a", "..", "/", "../../outside"])),
    lambda below: st.dictionaries(names, below, max_size=3),
    max_leaves=8,
)
directories = st.dictionaries(names, nodes, max_size=4)


def build(root: Path, tree: dict[str, Any]) -> None:
    root.mkdir()
    for name, node in tree.items():
        if isinstance(node, dict):
            build(root / name, node)
        elif node[0] == "link":
            (root / name).symlink_to(node[1])
        else:
            (root / name).write_bytes(node[1])
            (root / name).chmod(0o755 if node[2] else 0o644)


@settings(max_examples=40)
@given(new=directories, there=directories)
def test_any_directory_becomes_any_version(
    tmp_path_factory: pytest.TempPathFactory, new: dict[str, Any], there: dict[str, Any]
) -> None:
    """``get`` makes the version's entries or says what is in the way, ``checkout`` makes it exact, outside nothing moves."""
    base = tmp_path_factory.mktemp("any")
    build(base / "outside", {"precious": ("file", b"precious", False)})
    build(base / "new", new)
    build(base / "out", there)
    store = open_store(str(base / "store"))
    reader = Reader(store, None)
    version = commit(store, base / "new")
    expected = snapshot(base / "new")
    try:
        get(store, reader, version, base / "out")
        assert expected.items() <= snapshot(base / "out").items()
    except ConflictError:
        assert any(is_in_the_way(base / "out" / path, kind) for path, (kind, _, _) in expected.items())
    download.checkout(store, reader, version, str(base / "out"))
    assert snapshot(base / "out") == expected
    assert download.verify(store, reader, version, str(base / "out")) == []
    assert snapshot(base / "outside") == {"precious": ("file", b"precious", False)}


def is_in_the_way(path: Path, kind: str) -> bool:
    """Whether something of another kind stands at the path or above it."""
    if path.is_symlink() or path.exists():
        is_dir = path.is_dir() and not path.is_symlink()
        return is_dir != (kind == "dir")
    return path.parent != path and is_in_the_way(path.parent, "dir")


def test_many_files_in_many_directories(store: NativeStore, reader: Reader, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for number in range(400):
        folder = source / f"d{number % 40}" / f"e{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"f{number}").write_bytes(os.urandom(number))
    version = commit(store, source)
    descriptors = len(os.listdir("/proc/self/fd"))
    get(store, reader, version, tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(source)
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert download.verify_stored(store, reader, version) == []
    root = version.root
    assert isinstance(root, Dir) and root.files == 400
