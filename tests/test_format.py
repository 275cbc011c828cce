"""What ``docs/format.md`` says is what is stored: a reader written from that page alone reads our stores."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path

import pytest
from commits import NAME, commit, contents, file_at, folder_at, new_file
from format_reader import FormatReader
from shelves import write_files
from steps import small_packs

from artifactfs import tree as tree_module
from artifactfs.content import LIST_CONTEXT, MAX_CONTENT, fingerprint
from artifactfs.folders import LocalFolder, MadeFolder, MergedFolder
from artifactfs.maintenance import gc
from artifactfs.model import BLOCK, Dir, Ref, Run, Symlink
from artifactfs.names import ArtifactName, parse
from artifactfs.objects import MAX_RECORD
from artifactfs.pack import PACK_TARGET
from artifactfs.publish import NewFile, NewRef
from artifactfs.store.native import MAX_TABLE, NativeStore, now
from artifactfs.store.urls import open_store
from artifactfs.tree import DIGEST_CONTEXT, EMPTY, MAX_PAGE_BYTES

PAGE = Path(__file__).parent.parent / "docs/format.md"


@pytest.fixture
def store(tmp_path: Path) -> NativeStore:
    return open_store(str(tmp_path / "store"))


def everything(store: NativeStore, tmp_path: Path, rng: random.Random) -> None:
    """Versions of all algorithms, over bases, with patched large files, references, symlinks, odd names."""
    large = rng.randbytes(3 * BLOCK + 50)
    files = {f"d{n % 3}/f{n:02d}": rng.randbytes(rng.randint(0, 300)) for n in range(40)}
    data = write_files(
        tmp_path / "data", {**files, "large": large, "link": "large", "none": None, "a-b": b"", "a/x": b"1", "run.sh": b"x"}
    )
    found = fingerprint(rng.randbytes(2 * BLOCK))
    references = {
        "ref": NewRef(Ref("", "file:///x", "digest", found.size, id=found.id), found.blocks),
        "ref2": Ref("", "s3://b/k", "etag", -1, True, {"versionID": 5, "etag": "é"}),
        "\U0001f600": Symlink("", "é"),
    }
    first = commit(
        store,
        MergedFolder(LocalFolder(str(data)), MadeFolder(references)),
        algorithm="MD5",
        description="é",
        metadata={"a": [1, None]},
    ).version
    changed = bytearray(large)
    changed[BLOCK + 7] ^= 1

    def read_base(offset: int, size: int) -> bytes:
        return large[offset : offset + size]

    patch = NewFile(
        new_file(tmp_path / "p", bytes(changed)).path, False, file_at(store, first, "large"), frozenset({1}), read_base
    )
    more = {f"n{n}": new_file(tmp_path / f"n{n}", b"%d" % n) for n in range(20)}
    changes = {"large": patch, "d0": MadeFolder(more, folder_at(store, first, "d0")), "d1": None}
    commit(store, MadeFolder(changes, first.root), algorithm="XXH128", base=0)
    commit(store, data, aliases=["best"], ttl=60)
    commit(store, {}, ArtifactName("é" * 50, "a b+c", "x.y"), type="model")


def test_the_reader_reads_what_we_write(store: NativeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "_CUT", 4)
    monkeypatch.setattr(tree_module, "_MAX_CHILDREN", 3)
    monkeypatch.setattr(tree_module, "_MAX_WEIGHT", 3000)
    with small_packs(4000):
        everything(store, tmp_path, random.Random(5))
    store.delete_version(NAME.at("v1"))
    reader = FormatReader(Path(store.url))
    assert set(reader.collections()) == {("acme", "vision", "bikes"), ("é" * 50, "a b+c", "x.y")}
    versions = reader.versions("acme", "vision", "bikes")
    assert [record["state"] for record in versions] == ["COMMITTED", "DELETED", "COMMITTED"]
    for record, version in zip(versions, store.versions(NAME, deleted=True), strict=True):
        ours = contents(store, version)
        theirs = reader.contents(record["root"])
        assert theirs.keys() == ours.keys()
        assert {path: value for path, value in theirs.items() if not isinstance(value, list)} == {
            path: value for path, value in ours.items() if not isinstance(value, Ref)
        }
        reader.check_cuts(record["root"], 4, 3000, 3)
        for _, entry in reader.walk(record["root"]):
            if entry[0] == 1:
                reader.check_cuts(entry, 4, 3000, 3)
    (empty,) = reader.versions("é" * 50, "a b+c", "x.y")
    assert empty["type"] == "model" and empty["digest"] == EMPTY.digest.hex()


def test_pages_end_where_the_page_says(store: NativeStore, tmp_path: Path) -> None:
    """With the real constants: 12,000 entries, some of them heavy."""
    rng = random.Random(9)

    class Many:
        base = None

        def changes(self):  # type: ignore[no-untyped-def]
            for number in range(12_000):
                long = rng.randrange(100) == 0
                yield f"{number:05d}" + "é" * rng.randrange(20), Symlink("", "x" * (rng.randrange(30_000) if long else 5))

    version = commit(store, Many()).version
    reader = FormatReader(Path(store.url))
    (record,) = reader.versions(*("acme", "vision", "bikes"))
    leaves = list(reader.leaves(record["root"][3]))
    weights = [sum(map(reader.weight, leaf)) for leaf, _ in leaves]
    ends = [reader.ends(leaf[-1][1], 0, 2048) for leaf, _ in leaves[:-1]]
    assert any(ends) and not all(ends), "pages end for both reasons here"
    assert len(leaves) > 4 and max(weights) < (960 + 64) << 10
    reader.check_cuts(record["root"])
    for number in ("06000", "06000x", "00000", "12000"):
        version = commit(store, MadeFolder({number: Symlink("", "changed")}, version.root)).version
        reader.check_cuts(reader.versions("acme", "vision", "bikes")[-1]["root"])


def test_records_have_the_keys_that_the_page_names(store: NativeStore, tmp_path: Path) -> None:
    version = commit(store, {"x": new_file(tmp_path / "x", b"x")}).version
    run = Run(entity="acme", project="vision", id="r/1", created_at=now(), updated_at=now())
    store.save_run(run)
    store.mark_used(version, run)
    text = PAGE.read_text()
    for key in (
        "catalog/acme/vision/bikes/versions/00000000.json",
        "catalog/acme/vision/bikes/collection.json",
        "runs/acme/vision/r%2F1.json",
    ):
        for name in json.loads(Path(store.url, key).read_bytes()):
            assert f"`{name}`" in text, (key, name)
    mark = json.loads(Path(store.url, "catalog/acme/vision/bikes/used/00000000/acme/vision/r%2F1").read_bytes())
    assert mark.keys() == {"run", "at"} and mark["run"] == "acme/vision/r/1"


def test_the_page_has_our_constants() -> None:
    text = PAGE.read_text()
    for constant in (LIST_CONTEXT, DIGEST_CONTEXT):
        assert f'"{constant}"' in text
    said = {
        f"{BLOCK:,} bytes": 1 << 20,
        "at most 32 MiB": MAX_RECORD,
        "at most 16 TiB": MAX_CONTENT,
        "at most 64 MiB": MAX_TABLE,
        "closed at 16 MiB": PACK_TARGET,
        "more than 4 MiB": MAX_PAGE_BYTES,
        f"960 KiB ({tree_module._MAX_WEIGHT:,})": 960 << 10,
        f"mod {tree_module._CUT} = 0": 2048,
        f"{tree_module._MAX_CHILDREN:,}th child": 1920,
        f"An entry weighs {tree_module._BASE_WEIGHT}": 256,
        "weighs more than 64 KiB": tree_module.MAX_ENTRY_WEIGHT,
        EMPTY.digest.hex(): EMPTY.digest.hex(),
    }
    for words in said:
        assert words in text, words
    units = {"KiB": 1 << 10, "MiB": 1 << 20, "TiB": 1 << 40}
    for words, value in said.items():
        if match := re.search(r"(\d+) ([KMT]iB)", words):
            assert int(match[1]) * units[match[2]] == value, words


def test_the_format_does_not_move(store: NativeStore, tmp_path: Path) -> None:
    """Digests that were ever shown stay what they were; a change here is a change of the format."""
    files: dict[str, bytes | str | None] = {f"d{n % 3}/f{n}": b"%d" % n for n in range(10)}
    files |= {"large": bytes(BLOCK + 1), "link": "large", "empty": None, "run.sh": b"x"}
    refs = {"ref": Ref("", "s3://b/k", "etag", 5, False, {"etag": "e", "versionID": "v"})}
    root = MergedFolder(LocalFolder(str(write_files(tmp_path / "data", files))), MadeFolder(refs))
    digests = [commit(store, root, f"acme/vision/{it}", algorithm=it).version.digest for it in ("BLAKE3", "MD5", "XXH128")]
    assert digests == [
        "907e3597ee43c40812fa82f130c8aa94d3a50ad5d106a5325cb89adf740f8ac8",
        "937e72e1a44ddfd0cbac6244393ae47d",
        "1c006eef4b9f3aabc2ca23fd088a7830",
    ]
    large = file_at(store, store.version(parse("acme/vision/MD5")), "large")
    assert large.id.hex() == "e81f1db3f004432b04abae5b2e531089a839aeb565d914447b40c43c1a9964b9"


def test_a_copy_by_any_tool_is_the_same_store(store: NativeStore, tmp_path: Path) -> None:
    """Bytes and names are all there is: no inode, no time, no owner counts."""
    with small_packs(4000):
        everything(store, tmp_path, random.Random(6))
    copy = tmp_path / "copy"
    for path in Path(store.url).rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(store.url)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
            os.utime(target, (0, 0))
    copied = open_store(str(copy))
    assert copied.versions(NAME) == store.versions(NAME)
    assert contents(copied, copied.version(NAME)) == contents(store, store.version(NAME))
    assert gc(copied, grace=0).removed == 0
    assert isinstance(copied.tree.lookup(copied.version(NAME).root, "d0"), Dir)
