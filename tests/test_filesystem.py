"""``artifactfs://`` URLs through fsspec, and what reads by it."""

from __future__ import annotations

import importlib
import itertools
import os
import pickle
import re
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from shelves import write_files

from artifactfs.artifact import Artifact
from artifactfs.errors import NotFoundError, ReadOnlyError
from artifactfs.folders import LocalFolder
from artifactfs.model import BLOCK
from artifactfs.names import parse
from artifactfs.publish import Draft, publish
from artifactfs.run import init
from artifactfs.session import current
from artifactfs.store.urls import open_store

fsspec = pytest.importorskip("fsspec")
from artifactfs.filesystem import ArtifactFileSystem  # noqa: E402 - it needs fsspec

LARGE = os.urandom(2 * BLOCK + 4321)
FILES: dict[str, bytes | str | None] = {
    "a.txt": b"alpha\nbeta\n",
    "d/b.bin": LARGE,
    "d/e/c:1.txt": b"gamma",
    "d/up": "../a.txt",
    "empty": b"",
    "hollow": None,
    "out": "/etc/passwd",
    "over": "../../x",
    "round": "round",
    "run.sh": b"#!/bin/sh\n",
    "to-d": "d",
    "broken": "nothing",
}
VERSION = "acme/vision/bikes:v0"
_numbers = itertools.count()


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """As the package's entry point does it."""
    fsspec.register_implementation("artifactfs", ArtifactFileSystem, clobber=True)
    yield
    ArtifactFileSystem.clear_instance_cache()


@pytest.fixture
def fs(place: str, tmp_path: Path) -> Any:
    log(FILES, tmp_path / "files")
    return fsspec.filesystem("artifactfs")


def log(files: dict[str, bytes | str | None], folder: Path, name: str = "acme/vision/bikes", **fields: Any) -> None:
    write_files(folder, files)
    draft = Draft(name=parse(name), type="dataset", folder=LocalFolder(str(folder)), commit=f"c{next(_numbers)}", **fields)
    publish(current().store, draft)


def test_entry_point_leads_here() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["fsspec.specs"]["artifactfs"].partition(":")
    assert getattr(importlib.import_module(module), name) is ArtifactFileSystem


def test_reading(fs: Any) -> None:
    url = f"artifactfs://{VERSION}"
    with fsspec.open(f"{url}/d/b.bin", "rb") as file:
        assert file.size == len(LARGE)
        assert file.read(10) == LARGE[:10]
        file.seek(-20, os.SEEK_END)
        assert file.read() == LARGE[-20:] and file.read() == b""
        file.seek(BLOCK - 5)
        assert file.read(10) == LARGE[BLOCK - 5 : BLOCK + 5] and file.tell() == BLOCK + 5
    with fsspec.open(f"{url}/a.txt", "r") as file:
        assert file.readlines() == ["alpha\n", "beta\n"]
    assert fs.cat_file(f"{url}/d/e/c:1.txt") == b"gamma"
    assert fs.cat(f"{VERSION}/empty") == b""
    several = fs.cat(fs.find(f"{VERSION}/d"))
    assert several == {f"{VERSION}/d/b.bin": LARGE, f"{VERSION}/d/e/c:1.txt": b"gamma", f"{VERSION}/d/up": b"alpha\nbeta\n"}
    assert fs.read_text(f"{VERSION}/to-d/up") == "alpha\nbeta\n"
    assert fs.head(f"{VERSION}/a.txt", 5) == b"alpha" and fs.tail(f"{VERSION}/a.txt", 5) == b"beta\n"


@pytest.mark.parametrize(
    ("start", "end"),
    [(None, None), (0, 10), (5, None), (-7, None), (None, -3), (-9, -2), (BLOCK - 3, BLOCK + 3), (9, 4), (1 << 40, None)],
)
def test_ranges(fs: Any, start: int | None, end: int | None) -> None:
    assert fs.cat_file(f"{VERSION}/d/b.bin", start, end) == LARGE[slice(start, end)]


def test_many_ranges_at_once(fs: Any) -> None:
    starts = list(range(0, len(LARGE) - 100, 99_991))
    path = f"{VERSION}/d/b.bin"
    assert fs.cat_ranges([path] * len(starts), starts, [start + 100 for start in starts]) == [
        LARGE[start : start + 100] for start in starts
    ]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda start: fs.cat_file(path, start, start + 100), starts))
    assert got == [LARGE[start : start + 100] for start in starts]


def test_listing(fs: Any) -> None:
    assert fs.ls("", detail=False) == ["acme"] and fs.ls("artifactfs://acme", detail=False) == ["acme/vision"]
    assert fs.ls("acme/vision") == [{"name": "acme/vision/bikes", "size": 0, "type": "directory"}]
    names = [f"{VERSION}/{name}" for name in sorted({path.partition("/")[0] for path in FILES})]
    assert fs.ls(f"artifactfs://{VERSION}/", detail=False) == names
    kinds = {item["name"].rpartition("/")[2]: item["type"] for item in fs.ls(VERSION)}
    assert kinds == {
        **dict.fromkeys(["a.txt", "empty", "run.sh"], "file"),
        **dict.fromkeys(["d", "hollow", "to-d"], "directory"),
        **dict.fromkeys(["broken", "out", "over", "round"], "other"),
    }
    assert fs.ls("acme/vision/bikes/d", detail=False) == [f"acme/vision/bikes/d/{name}" for name in ("b.bin", "e", "up")]
    assert fs.ls(f"{VERSION}/hollow") == []
    [item] = fs.ls(f"{VERSION}/run.sh")
    assert (item["size"], item["executable"], item["version"]) == (10, True, VERSION)
    link = next(item for item in fs.ls(f"{VERSION}/d") if item["name"].endswith("/up"))
    assert (link["islink"], link["destination"], link["size"], link["type"]) == (True, "../a.txt", 11, "file")


def test_find_and_glob(fs: Any) -> None:
    everything = [f"{VERSION}/{path}" for path, content in sorted(FILES.items()) if content is not None]
    assert fs.find(VERSION) == everything
    assert fs.find(VERSION, maxdepth=1) == [path for path in everything if path.count("/") == 3]
    assert fs.find(f"{VERSION}/d", withdirs=True) == [
        f"{VERSION}/{path}" for path in ("d", "d/b.bin", "d/e", "d/e/c:1.txt", "d/up")
    ]
    assert fs.find(f"{VERSION}/a.txt") == [f"{VERSION}/a.txt"]
    found = fs.find(f"{VERSION}/d", detail=True)
    assert found[f"{VERSION}/d/b.bin"]["size"] == len(LARGE)
    assert fs.glob(f"{VERSION}/**/*.txt") == [f"{VERSION}/a.txt", f"{VERSION}/d/e/c:1.txt"]
    assert fs.glob("acme/vision/bikes:v0/*.sh") == [f"{VERSION}/run.sh"]
    assert fs.du(f"{VERSION}/d") == len(LARGE) + 5 + 11
    assert [base for base, _, _ in fs.walk(f"{VERSION}/d")] == [f"{VERSION}/d", f"{VERSION}/d/e"]


def test_info(fs: Any) -> None:
    info = fs.info(f"artifactfs://{VERSION}/d/b.bin")
    assert (info["name"], info["size"], info["type"]) == (f"{VERSION}/d/b.bin", len(LARGE), "file")
    assert fs.ukey(f"{VERSION}/d/b.bin") == info["content_id"] == fs.checksum(f"{VERSION}/to-d/b.bin")
    assert (
        fs.isdir(VERSION) and fs.isdir(f"{VERSION}/to-d") and fs.isfile(f"{VERSION}/d/up") and fs.isdir("") and fs.isdir("acme")
    )
    version = current().store.version(parse(VERSION))
    assert (
        fs.created(VERSION).isoformat()
        == fs.modified(f"{VERSION}/a.txt").isoformat()
        == version.created_at.replace("Z", "+00:00")
    )
    for gone in ("broken", "out", "over", "round", "round/x", "nothing", "a.txt/x", "../bikes:v0/a.txt"):
        assert not fs.exists(f"{VERSION}/{gone}")
        with pytest.raises(FileNotFoundError):
            fs.open(f"{VERSION}/{gone}")
    for gone in ("acme/vision/bikes:v9", "acme/vision/cars", "acme/other", "nobody", "acme/vi:sion", "acme/vision/b kes"):
        assert not fs.exists(gone)
        with pytest.raises(FileNotFoundError):
            fs.ls(gone)
    with pytest.raises(NotFoundError):
        fs.info("acme/vision/cars")
    for folder in ("", "acme", VERSION, f"{VERSION}/d"):
        with pytest.raises(IsADirectoryError):
            fs.cat_file(folder)


@pytest.mark.parametrize(
    "write",
    [
        lambda fs, path: fs.open(path, "wb"),
        lambda fs, path: fs.open(path, "a"),
        lambda fs, path: fs.pipe_file(path, b"x"),
        lambda fs, path: fs.pipe(path, b"x"),
        lambda fs, path: fs.rm(path),
        lambda fs, path: fs.rm_file(path),
        lambda fs, path: fs.mkdir(path),
        lambda fs, path: fs.makedirs(path, exist_ok=True),
        lambda fs, path: fs.rmdir(path),
        lambda fs, path: fs.mv(path, f"{path}2"),
        lambda fs, path: fs.cp_file(path, f"{path}2"),
        lambda fs, path: fs.touch(path),
        lambda fs, path: fs.put_file(__file__, path),
        lambda fs, path: fs.start_transaction(),
    ],
)
def test_writing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any) -> None:
    monkeypatch.setenv("ARTIFACTFS_STORE", str(tmp_path / "store"))
    log({"a.txt": b"x"}, tmp_path / "files")
    fs = fsspec.filesystem("artifactfs")
    with pytest.raises(PermissionError, match="versions do not change") as caught:
        write(fs, f"{VERSION}/a.txt")
    assert isinstance(caught.value, ReadOnlyError)
    assert fs.cat(f"{VERSION}/a.txt") == b"x"


def test_names_of_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARTIFACTFS_STORE", str(tmp_path / "store"))
    log({"f": b"one"}, tmp_path / "1", aliases=["best"], semver="1.2.0")
    fs = fsspec.filesystem("artifactfs")
    with fs.open("acme/vision/bikes:best/f") as held:
        log({"f": b"two"}, tmp_path / "2", aliases=["best"])
        fs._moving.clear()  # as the time does
        assert held.read() == b"one"
    read = {alias: fs.cat(f"acme/vision/bikes{alias}/f") for alias in ("", ":latest", ":best", ":v0", ":1.2.0", ":2.0.0")}
    assert read == {"": b"two", ":latest": b"two", ":best": b"two", ":v0": b"one", ":1.2.0": b"one", ":2.0.0": b"two"}
    assert fs.info("acme/vision/bikes:best/f")["version"] == "acme/vision/bikes:v1"


def test_another_store_and_pickles(tmp_path: Path) -> None:
    other = open_store(str(tmp_path / "other"))
    write_files(tmp_path / "files", {"f": b"there"})
    publish(other, Draft(name=parse(VERSION), type="t", folder=LocalFolder(str(tmp_path / "files")), commit="c"))
    fs = fsspec.filesystem("artifactfs", store=str(tmp_path / "other"))
    assert fs.cat(f"{VERSION}/f") == b"there"
    assert pickle.loads(pickle.dumps(fs)).cat(f"{VERSION}/f") == b"there"
    assert not fsspec.filesystem("artifactfs").exists(VERSION)


def test_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARTIFACTFS_STORE", str(tmp_path / "store"))
    (tmp_path / "outside").write_bytes(b"outside")
    artifact = Artifact("bikes", "dataset")
    artifact.add_reference(f"file://{tmp_path}/outside", "r")
    with init(entity="acme", project="vision") as run:
        run.log_artifact(artifact).wait()
    fs = fsspec.filesystem("artifactfs")
    assert fs.cat(f"{VERSION}/r") == b"outside" and fs.info(f"{VERSION}/r")["ref"].endswith("/outside")


def test_pandas_and_pyarrow(fs: Any, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    parquet = pytest.importorskip("pyarrow.parquet")
    dataset = pytest.importorskip("pyarrow.dataset")
    arrow_fs = pytest.importorskip("pyarrow.fs")
    frame = pandas.DataFrame({"number": range(100_000), "text": [f"row {number}" for number in range(100_000)]})
    folder = tmp_path / "table"
    folder.mkdir()
    frame.to_csv(folder / "t.csv", index=False)
    (folder / "parts").mkdir()
    for part in range(2):
        frame[part::2].to_parquet(folder / "parts" / f"{part}.parquet")
    log({}, folder, "acme/vision/table")
    assert pandas.read_csv("artifactfs://acme/vision/table:v0/t.csv").equals(frame)
    assert len(pandas.read_parquet("artifactfs://acme/vision/table:v0/parts/0.parquet", columns=["number"])) == 50_000
    table = parquet.read_table("acme/vision/table/parts/1.parquet", filesystem=fs)
    assert table.column("number")[0].as_py() == 1
    wrapped = arrow_fs.PyFileSystem(arrow_fs.FSSpecHandler(fs))
    assert dataset.dataset("acme/vision/table:v0/parts", filesystem=wrapped).count_rows() == 100_000
    with pytest.raises(PermissionError, match="versions do not change"):
        frame.to_csv("artifactfs://acme/vision/table:v0/new.csv")


def test_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pandas")
    monkeypatch.setenv("ARTIFACTFS_STORE", str(tmp_path / "store"))
    log({"train.csv": b"a,b\n1,2\n3,4\n"}, tmp_path / "files")
    page = (Path(__file__).parents[1] / "docs" / "fsspec.md").read_text()
    [code, said] = re.findall(r"^```(?:python|text)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    exec(compile(code, "docs/fsspec.md", "exec"), {})
    assert capsys.readouterr().out == said
