"""Views without a kernel: versions, the levels above them, differences, and what hostile stores cannot make them show."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shelves import Shelf, shelf, until, write_files

from artifactfs import view as views
from artifactfs.errors import ArtifactFSError, IntegrityError, NotFoundError, ReadOnlyError
from artifactfs.folders import MadeFolder
from artifactfs.model import BLOCK, Ref, Symlink
from artifactfs.view import BrowseView, DiffView, FileTree, VersionView

__all__ = ["shelf"]

FILES = {
    "readme.md": b"hello",
    "run.sh": b"#!/bin/sh\n",
    "data/a.bin": bytes(range(256)) * 5000,
    "data/empty": b"",
    "data/deep/er/x": b"x",
    "dataset.csv": b"1,2\n",
    "link": "data/a.bin",
    "void": None,
}


@pytest.fixture
def version(shelf: Shelf) -> VersionView:
    return VersionView(shelf.store, shelf.reader, shelf.log("acme/vision/bikes", FILES))


def listing(tree: FileTree, path: str = "/") -> list[str]:
    return [item.name for item in tree.readdir(path)]


def everything(tree: FileTree, path: str = "/") -> dict[str, Any]:
    """Contents, targets and empty directories by path, checked against getattr on the way."""
    found: dict[str, Any] = {}
    for item in tree.readdir(path):
        below = path.rstrip("/") + "/" + item.name
        attributes = tree.getattr(below)
        assert (stat.S_IFMT(item.mode), item.ino) == (stat.S_IFMT(attributes.mode), attributes.ino)
        if stat.S_ISDIR(item.mode):
            found.update(everything(tree, below) or {below[1:]: None})
        elif stat.S_ISLNK(item.mode):
            found[below[1:]] = tree.readlink(below)
        else:
            found[below[1:]] = content(tree, below)
    return found


def content(tree: FileTree, path: str) -> bytes:
    fh = tree.open(path, os.O_RDONLY)
    try:
        data = tree.read(fh, tree.getattr(path).size + 1, 0)
        assert len(data) == tree.getattr(path).size
        return data
    finally:
        tree.release(fh)


def code(error: BaseException) -> int:
    assert isinstance(error, (OSError, ArtifactFSError))
    return int(error.errno or 0)


def test_a_version_is_what_was_logged(version: VersionView) -> None:
    assert everything(version) == FILES


def test_attributes(version: VersionView) -> None:
    file, script, directory, link = (version.getattr(path) for path in ("/readme.md", "/run.sh", "/data", "/link"))
    assert [oct(a.mode) for a in (file, script, directory, link)] == ["0o100444", "0o100555", "0o40555", "0o120777"]
    assert (file.size, file.blocks, file.nlink, directory.nlink, link.size) == (5, 1, 1, 1, len("data/a.bin"))
    assert (file.uid, file.gid) == (os.getuid(), os.getgid())
    assert file.mtime == views.nanoseconds(version.version.created_at) > 10**18
    assert version.getattr("/").ino == 1


def test_inodes_are_stable_and_differ(shelf: Shelf, version: VersionView) -> None:
    again = VersionView(shelf.store, shelf.reader, version.version)
    paths = ["/", *(f"/{path}" for path in FILES)]
    numbers = [again.getattr(path).ino for path in paths]
    assert numbers == [version.getattr(path).ino for path in paths]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (lambda v: v.getattr("/nothing"), errno.ENOENT),
        (lambda v: v.getattr("/readme.md/below"), errno.ENOTDIR),
        (lambda v: v.getattr("/link/below"), errno.ENOTDIR),
        (lambda v: list(v.readdir("/readme.md")), errno.ENOTDIR),
        (lambda v: v.readlink("/readme.md"), errno.EINVAL),
        (lambda v: v.open("/data", os.O_RDONLY), errno.EISDIR),
        (lambda v: v.open("/link", os.O_RDONLY), errno.ELOOP),
        (lambda v: v.open("/readme.md", os.O_RDWR), errno.EROFS),
        (lambda v: v.open("/readme.md", os.O_TRUNC), errno.EROFS),
        (lambda v: v.read(999, 1, 0), errno.EBADF),
        (lambda v: v.getxattr("/readme.md", "user.other"), errno.ENODATA),
        (lambda v: v.getattr("/\udcff"), errno.ENOENT),
    ],
)
def test_errors(version: VersionView, act: Any, expected: int) -> None:
    with pytest.raises((OSError, ArtifactFSError)) as caught:
        act(version)
    assert code(caught.value) == expected


def test_writing_is_refused_with_advice(version: VersionView) -> None:
    with pytest.raises(ReadOnlyError, match="artifactfs stage"):
        version.open("/readme.md", os.O_WRONLY)


def test_reading_at_offsets(version: VersionView) -> None:
    whole = FILES["data/a.bin"]
    assert isinstance(whole, bytes) and len(whole) > BLOCK
    fh = version.open("/data/a.bin", os.O_RDONLY)
    for offset, size in ((0, 10), (BLOCK - 3, 7), (len(whole) - 2, 100), (len(whole), 5), (len(whole) + 9, 5)):
        assert version.read(fh, size, offset) == whole[offset : offset + size]
    version.release(fh)
    version.release(fh)
    version.close()


def test_xattrs(shelf: Shelf, version: VersionView) -> None:
    entry = shelf.store.tree.resolve(version.version.root, "readme.md")
    values = {name.removeprefix(views.XATTR): version.getxattr("/readme.md", name) for name in version.listxattr("/readme.md")}
    assert values == {
        "digest": entry.digest.encode(),  # type: ignore[union-attr]
        "content_id": entry.id.hex().encode(),  # type: ignore[union-attr]
        "version": b"acme/vision/bikes:v0",
        "cached": b"5",
    }
    assert version.getxattr("/", views.XATTR + "digest") == version.version.digest.encode()
    assert views.XATTR + "content_id" not in version.listxattr("/data")
    assert version.listxattr("/link") == []


def test_statfs(version: VersionView) -> None:
    space = version.statfs()
    assert (space.total, space.files, space.free) == (version.version.size, version.version.file_count, 0)


@pytest.mark.parametrize(
    ("prefix", "shown"),
    [
        ("data", ["data/a.bin", "data/deep/er/x", "data/empty", "dataset.csv"]),
        ("data/", ["data/a.bin", "data/deep/er/x", "data/empty"]),
        ("data/deep/e", ["data/deep/er/x"]),
        ("readme.md", ["readme.md"]),
    ],
)
def test_a_path_prefix_is_a_plain_string(shelf: Shelf, version: VersionView, prefix: str, shown: list[str]) -> None:
    part = VersionView(shelf.store, shelf.reader, version.version, prefix)
    assert everything(part) == {path: FILES[path] for path in shown}
    assert part.getattr("/" + shown[0]) == version.getattr("/" + shown[0])
    with pytest.raises(NotFoundError):
        part.getattr("/run.sh")


@pytest.mark.parametrize("prefix", ["nothing", "data/x", "readme.md/", "/data"])
def test_a_prefix_of_nothing_is_refused(shelf: Shelf, version: VersionView, prefix: str) -> None:
    with pytest.raises(NotFoundError, match="starts with"):
        VersionView(shelf.store, shelf.reader, version.version, prefix)


def test_references_show_their_uri(shelf: Shelf, tmp_path: Path) -> None:
    target = tmp_path / "outside.txt"
    target.write_bytes(b"outside")
    local = Ref("", target.as_uri(), digest="d", size=7)
    never = Ref("", "tracking://somewhere/else", digest="tracking://somewhere/else", size=-1)
    version = VersionView(
        shelf.store, shelf.reader, shelf.log("a/b/c", MadeFolder({"more": local, "never": never, "link": Symlink("", "/etc")}))
    )
    assert version.getxattr("/more", views.XATTR + "ref") == target.as_uri().encode()
    assert version.getattr("/more").size == 7
    assert version.getattr("/never").size == 0  # it can be listed, and only opening it fails
    with pytest.raises(ArtifactFSError):
        version.read(version.open("/never", os.O_RDONLY), 1, 0)


def test_large_directories_are_listed_in_order_and_found(shelf: Shelf, tmp_path: Path) -> None:
    root = tmp_path / "many"
    root.mkdir()
    for number in range(5000):
        (root / f"f{number:05d}").touch()
    version = VersionView(shelf.store, shelf.reader, shelf.log("a/b/many", root))
    assert listing(version) == [f"f{number:05d}" for number in range(5000)]
    assert version.getattr("/f04999").size == 0


def test_a_damaged_page_spoils_its_directory_only(shelf: Shelf, version: VersionView) -> None:
    page = shelf.store.tree.resolve(version.version.root, "data").page  # type: ignore[union-attr]
    from artifactfs.objects import object_key

    path = shelf.store.objects.path(object_key(page.extent.object))  # type: ignore[union-attr]
    assert path
    with open(path, "r+b") as file:
        file.seek(page.extent.offset + 3)
        byte = file.read(1)
        file.seek(page.extent.offset + 3)
        file.write(bytes([byte[0] ^ 1]))
    fresh = Shelf(shelf.root)
    damaged = VersionView(fresh.store, fresh.reader, version.version)
    assert content(damaged, "/readme.md") == b"hello"
    with pytest.raises(IntegrityError):
        list(damaged.readdir("/data"))
    with pytest.raises(IntegrityError):
        damaged.getattr("/data/empty")
    fresh.close()


@given(names=st.lists(st.text(min_size=1, max_size=40), unique=True, max_size=8))
def test_any_valid_name_is_found_again(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    from artifactfs.names import check_part
    from artifactfs.tree import DirBuilder, Tree

    pages: dict[bytes, bytes] = {}

    def valid(name: str) -> bool:
        try:
            return bool(check_part(name))
        except ArtifactFSError:
            return False

    names = sorted(filter(valid, names))
    from blake3 import blake3

    from artifactfs.model import OBJECT_BLOB, Extent, Page

    def store_page(data: bytes) -> Page:
        id = blake3(data).digest()
        pages[id] = data
        return Page(id, Extent(OBJECT_BLOB + id, 0, len(data)))

    builder = DirBuilder(store_page)
    for name in names:
        builder.add(Symlink(name, "t"))
    root = builder.finish()

    class _Store:
        tree = Tree(lambda page: pages[page.id])

    shown = VersionView(_Store(), None, make_version(root))  # type: ignore[arg-type]
    assert listing(shown) == names
    assert all(shown.readlink(f"/{name}") == "t" for name in names)


def make_version(root: Any) -> Any:
    from artifactfs.model import Version

    return Version(
        entity="a", project="b", collection="c", number=0, type="t", digest="", root=root, size=0, file_count=0, commit="",
        created_at="", updated_at="",
    )  # fmt: skip


# Browsing


@pytest.fixture
def catalog(shelf: Shelf) -> Shelf:
    shelf.log("acme/vision/bikes", {"a": b"0"})
    shelf.log("acme/vision/bikes", {"a": b"1", "sub/b": b"11"}, aliases=["best"])
    shelf.log("acme/vision/cars", {"c": b"2"})
    shelf.log("acme/audio/birds", {"d": b"3"})
    shelf.log("other/x/y", {"e": b"4"})
    return shelf


def test_browsing_every_level(catalog: Shelf) -> None:
    def browse(*parts: str) -> BrowseView:
        return BrowseView(catalog.store, catalog.reader, parts)

    assert listing(browse()) == ["acme", "other"]
    assert listing(browse("acme")) == ["audio", "vision"]
    assert listing(browse("acme", "vision")) == ["bikes", "cars"]
    assert listing(browse("acme", "vision", "bikes")) == ["v0", "v1", "best", "latest"]
    top = browse()
    assert listing(top, "/acme/vision/bikes") == ["v0", "v1", "best", "latest"]
    assert listing(top, "/acme/vision/bikes/v1/sub") == ["b"]
    assert content(top, "/acme/vision/bikes/v1/sub/b") == b"11"
    assert top.readlink("/acme/vision/bikes/latest") == "v1"
    assert stat.S_ISLNK(top.getattr("/acme/vision/bikes/best").mode)
    assert top.getxattr("/acme/vision/bikes/v0", views.XATTR + "version") == b"acme/vision/bikes:v0"
    assert top.listxattr("/acme") == []


def test_browsing_inodes_are_of_the_whole_path(catalog: Shelf) -> None:
    top = BrowseView(catalog.store, catalog.reader, ())
    seen = {}
    for path in ("", "/acme", "/acme/vision", "/acme/vision/bikes"):
        for item in top.readdir(path or "/"):
            seen[f"{path}/{item.name}"] = item.ino
            assert top.getattr(f"{path}/{item.name}").ino == item.ino
    below = BrowseView(catalog.store, catalog.reader, ("acme", "vision", "bikes"))
    assert {item.name: item.ino for item in below.readdir("/")} == {
        name: seen[f"/acme/vision/bikes/{name}"] for name in listing(below)
    }
    assert below.getattr("/v0/a").ino == top.getattr("/acme/vision/bikes/v0/a").ino != top.getattr("/acme/vision/bikes/v1/a").ino


@pytest.mark.parametrize(
    "path",
    ["/nobody", "/acme/nothing", "/acme/vision/none", "/acme/vision/bikes/v7", "/acme/vision/bikes/v01", "/acme/vision/bikes/x",
     "/acme/vision/..", "/.Trash-0", "/acme/vision/bikes/v0/zz", "/acme/vision/.DS_Store", "/acme/a:b", "/acme/vision/\udcff"],
)  # fmt: skip
def test_browsing_what_is_not_there(catalog: Shelf, path: str) -> None:
    top = BrowseView(catalog.store, catalog.reader, ())
    for act in (top.getattr, top.readlink, lambda p: top.open(p, 0), lambda p: list(top.readdir(p)), top.listxattr):
        with pytest.raises(NotFoundError):
            act(path)


@pytest.mark.parametrize("parts", [("nobody",), ("acme", "nothing"), ("acme", "vision", "none")])
def test_browsing_a_level_that_is_not_there(catalog: Shelf, parts: tuple[str, ...]) -> None:
    with pytest.raises(NotFoundError):
        BrowseView(catalog.store, catalog.reader, parts)


def test_new_versions_appear_and_old_ones_stay(catalog: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "FRESH", 0.05)
    seen = BrowseView(catalog.store, catalog.reader, ("acme", "vision", "bikes"))
    fh = seen.open("/v0/a", os.O_RDONLY)
    assert listing(seen) == ["v0", "v1", "best", "latest"]
    catalog.log("acme/vision/bikes", {"a": b"2"})
    until(lambda: listing(seen) == ["v0", "v1", "v2", "best", "latest"])
    until(lambda: seen.readlink("/latest") == "v2")
    assert content(seen, "/v2/a") == b"2"
    assert seen.read(fh, 9, 0) == b"0"


def test_many_versions_and_open_files_outlive_the_views_kept(catalog: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "_OPEN_VIEWS", 1)
    seen = BrowseView(catalog.store, catalog.reader, ("acme", "vision", "bikes"))
    first = seen.open("/v0/a", os.O_RDONLY)
    second = seen.open("/v1/a", os.O_RDONLY)
    assert (seen.read(first, 9, 0), seen.read(second, 9, 0)) == (b"0", b"1")
    seen.close()


class HostileStore:
    """A store that says of its collections what the embedded one would refuse to."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def entities(self) -> list[str]:
        return [*self._store.entities(), "..", "a/b", "", "nul\0", "\udcff"]

    def collection(self, name: Any) -> Any:
        found = self._store.collection(name)
        bad = {"v0": 1, "v9": 1, "..": 0, "a/b": 0, "x" * 300: 0, "nul\0": 0, "": 0, "good": 0}
        return msgspec.structs.replace(found, aliases={**found.aliases, **bad})


def test_names_that_cannot_be_are_not_shown_and_no_alias_shadows_a_version(catalog: Shelf) -> None:
    store: Any = HostileStore(catalog.store)
    seen = BrowseView(store, catalog.reader, ("acme", "vision", "bikes"))
    assert listing(seen) == ["v0", "v1", "best", "good", "latest"]
    assert content(seen, "/v0/a") == b"0"
    with pytest.raises(NotFoundError):
        seen.getattr("/v9")
    assert listing(BrowseView(store, catalog.reader, ())) == ["acme", "other"]


# Differences


def test_a_difference(shelf: Shelf) -> None:
    old = {"same": b"s", "gone": b"g", "changed": b"1", "dir/keep": b"k", "dir/gone": b"g", "was-file": b"f", "mode": b"m",
           "link": "a", "old/x/y": b"y", "was-dir/z": b"z"}  # fmt: skip
    new = {"same": b"s", "changed": b"22", "dir/keep": b"k", "dir/new": b"n", "was-file/now": b"d", "mode": b"m",
           "link": "b", "new/x/y": b"y", "was-dir": b"z", "empty": None}  # fmt: skip
    before = shelf.log("a/b/c", old)
    folder = shelf.root / "new"
    write_files(folder, new)
    (folder / "mode").chmod(0o755)
    after = shelf.log("a/b/c", folder)
    diff = DiffView(shelf.store, shelf.reader, before, after)
    assert listing(diff) == ["added", "modified", "removed"]
    assert everything(diff, "/added") == {
        f"added/{path}": new[path] for path in ("dir/new", "was-file/now", "new/x/y", "was-dir", "empty")
    }
    assert everything(diff, "/modified") == {"modified/changed": b"22", "modified/link": "b", "modified/mode": b"m"}
    assert everything(diff, "/removed") == {
        f"removed/{path}": old[path] for path in ("gone", "dir/gone", "was-file", "old/x/y", "was-dir/z")
    }
    assert diff.getxattr("/removed/gone", views.XATTR + "version") == b"a/b/c:v0"
    for path in ("/removed/same", "/added/dir/keep", "/other", "/modified/dir"):
        with pytest.raises(NotFoundError):
            diff.getattr(path)
    assert diff.statfs().files == 4 + 2 + 5


def test_no_difference(shelf: Shelf) -> None:
    version = shelf.log("a/b/c", {"x": b"1"})
    diff = DiffView(shelf.store, shelf.reader, version, version)
    assert dict.fromkeys(("added", "modified", "removed")) == everything(diff)


def test_times_of_odd_versions() -> None:
    assert views.nanoseconds("2026-01-01T00:00:00.000001Z") == 1767225600_000001000
    assert views.nanoseconds("2026-01-01T01:00:00+01:00") == 1767225600 * 10**9
    assert views.nanoseconds("nonsense") == views.nanoseconds("") == 0
