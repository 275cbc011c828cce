"""Local directories as folders to publish."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shelves import write_files

from artifactfs.errors import InvalidNameError, NotFoundError, NotPermittedError, UsageError
from artifactfs.folders import LocalFolder, gather
from artifactfs.model import Ref, Symlink
from artifactfs.publish import Folder, NewFile, NewRef
from artifactfs.references import Expanded
from artifactfs.references.sorting import SortedEntries


def flat(folder: Folder, prefix: str = "") -> dict[str, Any]:
    """Every change by path, folders as None."""
    found: dict[str, Any] = {}
    names = []
    for name, change in folder.changes():
        names.append(os.fsencode(name))
        is_folder = hasattr(change, "changes")
        found[prefix + name] = None if is_folder else change
        if is_folder:
            found |= flat(change, f"{prefix}{name}/")
    assert names == sorted(set(names))
    return found


def ref(path: str, block_list: bytes = b"") -> Expanded:
    return Expanded(path, Ref(path.rpartition("/")[2], f"https://x/{path}", "etag", 3), block_list)


def in_order(*references: Expanded) -> SortedEntries:
    return SortedEntries(references, "/nowhere")


def test_everything_is_kept(tmp_path: Path) -> None:
    write_files(
        tmp_path, {"b": b"1", "a.sh": b"2", "dir/x": b"", "dir.x": b"", "empty": None, "link": "../out", "dangling": "none"}
    )
    os.chmod(tmp_path / "b", 0o070)
    assert flat(LocalFolder(str(tmp_path))) == {
        "a.sh": NewFile(f"{tmp_path}/a.sh", True),
        "b": NewFile(f"{tmp_path}/b", False),
        "dangling": Symlink("", "none"),
        "dir": None,
        "dir.x": NewFile(f"{tmp_path}/dir.x", False),
        "dir/x": NewFile(f"{tmp_path}/dir/x", False),
        "empty": None,
        "link": Symlink("", "../out"),
    }


_CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="/\0")


@given(st.sets(st.text(_CHARACTERS, min_size=1, max_size=8), max_size=8))
def test_names_come_in_order_of_their_bytes(tmp_path_factory: pytest.TempPathFactory, names: set[str]) -> None:
    root = tmp_path_factory.mktemp("names")
    kept = {name for name in names if name not in (".", "..")}
    for name in kept:
        (root / name).touch()
    assert [name for name, _ in LocalFolder(str(root)).changes()] == sorted(kept, key=str.encode)


def test_directory_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(".")
    assert flat(LocalFolder(str(tmp_path))) == {"loop": Symlink("", ".")}


def test_deep_directories(tmp_path: Path) -> None:
    path = tmp_path
    for _ in range(500):
        path /= "d"
    path.mkdir(parents=True)
    folder: Any = LocalFolder(str(tmp_path))
    for _ in range(500):
        ((_, folder),) = folder.changes()
    assert list(folder.changes()) == []


def test_special_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="pipe is a named pipe, which a version cannot hold"):
        flat(LocalFolder(str(tmp_path)))
    told: list[str] = []
    assert flat(LocalFolder(str(tmp_path), told.append)) == {}
    assert told == [f"{tmp_path}/pipe is a named pipe"]
    with pytest.raises(UsageError, match="is a character device"):
        gather(["/dev/null"])


def test_names_and_targets_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff")).touch()
    with pytest.raises(InvalidNameError, match="not valid UTF-8") as caught:
        flat(LocalFolder(str(tmp_path)))
    str(caught.value).encode()
    (tmp_path / os.fsdecode(b"\xff")).unlink()
    (tmp_path / "link").symlink_to(os.fsdecode(b"\xff"))
    with pytest.raises(InvalidNameError, match=r"link leads to \\xff"):
        flat(LocalFolder(str(tmp_path)))


def test_what_goes_away_or_cannot_be_read(tmp_path: Path) -> None:
    write_files(tmp_path, {"a": b"", "b": b""})
    walk = LocalFolder(str(tmp_path)).changes()
    next(walk)
    (tmp_path / "b").unlink()
    with pytest.raises(NotFoundError, match="b went away"):
        next(walk)
    with pytest.raises(NotFoundError, match="does not exist"):
        gather([str(tmp_path / "none"), str(tmp_path / "a")])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_directory_without_permission(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(NotPermittedError, match="locked"):
        flat(LocalFolder(str(tmp_path)))


def test_gather_one_directory(tmp_path: Path) -> None:
    write_files(tmp_path / "d", {"x": b""})
    (tmp_path / "link").symlink_to("d")
    assert list(flat(gather([str(tmp_path / "d")]))) == ["x"]
    assert list(flat(gather([str(tmp_path / "link")]))) == ["x"]
    assert list(flat(gather([str(tmp_path / "d") + "/"]))) == ["x"]


def test_gather_several_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, {"d/x": b"", "e/d/y": b"", "f": b"", "link": "f"})
    found = flat(gather([str(tmp_path / "f"), str(tmp_path / "d"), str(tmp_path / "link")]))
    assert list(found) == ["d", "d/x", "f", "link"]
    assert isinstance(found["link"], NewFile)
    monkeypatch.chdir(tmp_path / "d")
    assert list(flat(gather([".", "../f"]))) == ["d", "d/x", "f"]
    for paths in (["d", "e/d"], ["f", "f"]):
        with pytest.raises(UsageError, match="would both be"):
            gather([str(tmp_path / path) for path in paths])
    with pytest.raises(InvalidNameError):
        gather(["/", str(tmp_path / "f")])


def test_references_lie_beside_and_inside(tmp_path: Path) -> None:
    write_files(tmp_path, {"a": b"", "d/x": b""})
    found = flat(gather([str(tmp_path)], in_order(ref("z"), ref("d/y", b"list"), ref("d/e/w"), ref("new/v"))))
    assert list(found) == ["a", "d", "d/e", "d/e/w", "d/x", "d/y", "new", "new/v", "z"]
    assert isinstance(found["z"], Ref)
    assert isinstance(found["d/y"], NewRef)
    assert list(flat(gather([str(tmp_path / "d"), str(tmp_path / "a")], [ref("d/y")]))) == ["a", "d", "d/x", "d/y"]
    assert list(flat(gather([], [ref("only")]))) == ["only"]


@pytest.mark.parametrize("references", [["a"], ["d"], ["d/x"], ["a/below"], ["z", "z"], ["z", "z/y"], ["z/y", "z"]])
def test_two_of_one_name(tmp_path: Path, references: list[str]) -> None:
    write_files(tmp_path, {"a": b"", "d/x": b""})
    with pytest.raises(UsageError):
        flat(gather([str(tmp_path)], in_order(*map(ref, references))))
    if references[0] != "d/x":
        with pytest.raises(UsageError):
            flat(gather([str(tmp_path / "a"), str(tmp_path / "d")], in_order(*map(ref, references))))


def test_link_to_a_directory_and_a_reference_below_it(tmp_path: Path) -> None:
    """Nothing is written through a link, so a reference cannot go through one either."""
    write_files(tmp_path, {"d/x": b"", "link": "d"})
    with pytest.raises(UsageError, match="would both be 'link'"):
        flat(gather([str(tmp_path)], [ref("link/y")]))
