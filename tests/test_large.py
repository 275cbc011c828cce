"""Large contents: what changes is stored, what stays is kept where it is, and the content id is that of the bytes."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from commits import NAME, commit, file_at, new_file, nothing_leaks, problems, read_file, stored_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from artifactfs.content import fingerprint
from artifactfs.errors import IntegrityError, UsageError
from artifactfs.folders import MadeFolder
from artifactfs.model import BLOCK, File, block_count
from artifactfs.publish import NewFile
from artifactfs.store import large as large_module
from artifactfs.store.native import NativeStore
from artifactfs.store.urls import open_store

OVERHEAD = 20_000
"""Bytes that a commit of one file may store besides content: pages, block lists, tables."""


@pytest.fixture
def store(tmp_path: Path) -> NativeStore:
    return open_store(str(tmp_path / "store"))


def log(store: NativeStore, file: NewFile, **fields: object) -> File:
    return file_at(store, commit(store, {"x": file}, **fields).version, "x")


def patched(path: Path, data: bytes, base: File, changed: set[int], **fields: object) -> NewFile:
    """A file that holds only the changed blocks of ``data``, and garbage elsewhere, as a stage's do."""
    with path.open("wb") as file:
        file.truncate(len(data))
        for block in range(block_count(len(data))):
            piece = data[block * BLOCK : (block + 1) * BLOCK]
            file.seek(block * BLOCK)
            file.write(piece if block in changed else b"\xee" * len(piece))
    return NewFile(str(path), False, base, frozenset(changed), **fields)  # type: ignore[arg-type]


def changes(old: bytes, new: bytes) -> set[int]:
    """The blocks of ``new`` that ``old`` has not, or not whole."""
    blocks = range(block_count(len(new)))
    return {it for it in blocks if new[it * BLOCK : (it + 1) * BLOCK] != old[it * BLOCK : (it + 1) * BLOCK]}


def test_a_large_file_is_one_blob_of_its_own_bytes(store: NativeStore, tmp_path: Path) -> None:
    data = os.urandom(5 * BLOCK + 123)
    file = log(store, new_file(tmp_path / "x", data))
    (extent,) = file.extents
    assert Path(store.url, f"blobs/{file.id.hex()[:2]}/{file.id.hex()}").read_bytes() == data
    assert (extent.object, extent.offset, extent.length) == (b"b" + file.id, 0, len(data))
    assert file.table is None and file.blocks is not None and file.blocks.length == 32 * 6
    assert store.block_list(file) == fingerprint(data).blocks


@pytest.mark.parametrize("algorithm", ["BLAKE3", "XXH128"])
@pytest.mark.parametrize("by", ["patch", "whole"])
def test_what_changes_is_what_is_stored(store: NativeStore, tmp_path: Path, algorithm: str, by: str) -> None:
    """Append, rewrite, shrink and grow again and again; by a stage's patch, and by logging the whole file."""
    rng = random.Random(7)
    data = rng.randbytes(6 * BLOCK + 1000)
    file = log(store, new_file(tmp_path / "x", data), algorithm=algorithm)

    def next_data() -> Iterator[bytes]:
        yield data + rng.randbytes(BLOCK)
        yield data[: 2 * BLOCK] + rng.randbytes(10) + data[2 * BLOCK + 10 :]
        yield data[:-500]
        yield data[: 3 * BLOCK]
        yield data[: 3 * BLOCK - 1]
        yield data + rng.randbytes(3 * BLOCK)
        yield rng.randbytes(BLOCK) + data[BLOCK : 4 * BLOCK] + rng.randbytes(BLOCK) + data[5 * BLOCK :]
        yield data + bytes(1)
        yield data[: BLOCK + 1]
        yield data + rng.randbytes(2 * BLOCK)

    for step, new in enumerate(next_data()):
        current = read_file(store, file)
        changed = changes(current, new)
        before = stored_bytes(store.url)
        if by == "patch":

            def read_base(offset: int, size: int, current: bytes = current) -> bytes:
                return current[offset : offset + size]

            made = patched(tmp_path / "p", new, file, changed, read_base=read_base)
        else:
            made = new_file(tmp_path / "p", new)
        file = log(store, made, algorithm=algorithm)
        found = fingerprint(new, algorithm)
        assert (file.id, file.size, file.checksum) == (found.id, len(new), found.checksum), step
        assert read_file(store, file) == new, step
        assert b"".join(store.source(file).fetch(0, len(new))) == new, step
        assert stored_bytes(store.url) - before <= len(changed) * BLOCK + OVERHEAD, step
    assert problems(store.url) == []


@settings(max_examples=15)
@given(st.data())
def test_any_sequence_of_patches_is_the_bytes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Sizes around block borders, growing and shrinking below a block and back."""
    path = tmp_path_factory.mktemp("patches")
    store = open_store(str(path / "store"))
    sizes = st.builds(lambda blocks, more: max(0, blocks * BLOCK + more), st.integers(0, 3), st.sampled_from([-1, 0, 1, 700]))
    rng = random.Random(data.draw(st.integers(0, 1000)))
    current = rng.randbytes(data.draw(sizes))
    file = log(store, new_file(path / "x", current))
    for _ in range(data.draw(st.integers(1, 4))):
        size = data.draw(sizes)
        new = bytearray((current + rng.randbytes(max(0, size - len(current))))[:size])
        for at in data.draw(st.lists(st.integers(0, max(0, size - 1)), max_size=2)) if size else []:
            new[at] ^= 1

        def read_base(offset: int, length: int, current: bytes = current) -> bytes:
            return current[offset : offset + length]

        made = patched(path / "p", bytes(new), file, changes(current, bytes(new)), read_base=read_base)
        file = log(store, made)
        current = bytes(new)
        assert (file.id, file.size) == (fingerprint(current).id, size)
        assert read_file(store, file) == current
    assert problems(store.url) == []


def test_many_patches_of_one_file_stay_cheap(store: NativeStore, tmp_path: Path) -> None:
    data = bytearray(os.urandom(8 * BLOCK))
    file = log(store, new_file(tmp_path / "x", bytes(data)))
    start = stored_bytes(store.url)
    for number in range(40):
        block = number % 8
        data[block * BLOCK + number] ^= 1
        file = log(store, patched(tmp_path / "p", bytes(data), file, {block}))
    assert read_file(store, file) == data and file.id == fingerprint(bytes(data)).id
    assert stored_bytes(store.url) - start <= 40 * (BLOCK + 3000)
    assert len(store.extents(file)) == 8 and file.table is not None and file.extents == ()
    assert problems(store.url) == []


def test_a_patch_that_says_more_changed_than_did_stores_only_what_did(store: NativeStore, tmp_path: Path) -> None:
    data = os.urandom(4 * BLOCK)
    file = log(store, new_file(tmp_path / "x", data))
    before = stored_bytes(store.url)
    commit(store, {"x": patched(tmp_path / "p", data, file, {0, 1, 2, 3}), "y": new_file(tmp_path / "y", b"y")})
    assert stored_bytes(store.url) - before < OVERHEAD


def test_a_patch_back_to_what_the_newest_version_has_is_that(store: NativeStore, tmp_path: Path) -> None:
    data = os.urandom(3 * BLOCK)
    file = log(store, new_file(tmp_path / "x", data))
    changed = b"!" + data[1:]
    second = log(store, patched(tmp_path / "p", changed, file, {0}))
    before = stored_bytes(store.url)
    third = log(store, patched(tmp_path / "p", data, second, {0}))
    assert third.id == file.id and read_file(store, third) == data
    assert stored_bytes(store.url) - before <= BLOCK + OVERHEAD


@pytest.mark.parametrize(
    "base_size, size, changed",
    [
        (BLOCK + 500, 2 * BLOCK, set()),
        (3 * BLOCK, 4 * BLOCK, {0}),
        (2 * BLOCK, 2 * BLOCK + 1, {0}),
        (0, 2 * BLOCK, {0}),
        (10, 2 * BLOCK, {1}),
    ],
)
def test_a_patch_that_leaves_out_what_its_base_has_not_is_refused(
    store: NativeStore, tmp_path: Path, base_size: int, size: int, changed: set[int]
) -> None:
    """It would refer to bytes that are not there."""
    file = log(store, new_file(tmp_path / "x", os.urandom(base_size)))
    with nothing_leaks(), pytest.raises(ValueError, match="no block of"):
        log(store, patched(tmp_path / "p", os.urandom(size), file, changed))
    assert store.numbers(NAME) == [0] and problems(store.url) == []


def test_a_digest_that_needs_all_bytes_needs_a_way_to_read_them(store: NativeStore, tmp_path: Path) -> None:
    data = os.urandom(2 * BLOCK)
    file = log(store, new_file(tmp_path / "x", data))
    made = patched(tmp_path / "p", data + b"x", file, {2})
    with nothing_leaks(), pytest.raises(ValueError, match="no way to read"):
        log(store, made, algorithm="MD5")


def test_a_content_in_too_many_pieces_is_refused_not_lost(
    store: NativeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray(os.urandom(6 * BLOCK))
    file = log(store, new_file(tmp_path / "x", bytes(data)))
    monkeypatch.setattr(large_module, "MAX_TABLE", 100)
    data[BLOCK] ^= 1
    data[3 * BLOCK] ^= 1
    with nothing_leaks(), pytest.raises(UsageError, match="pieces"):
        log(store, patched(tmp_path / "p", bytes(data), file, {1, 3}))


def test_a_damaged_base_is_told(store: NativeStore, tmp_path: Path) -> None:
    data = os.urandom(3 * BLOCK)
    file = log(store, new_file(tmp_path / "x", data))
    assert file.blocks is not None
    path = Path(store.url, f"packs/{file.blocks.object[1:2].hex()}/{file.blocks.object[1:].hex()}")
    content = bytearray(path.read_bytes())
    content[file.blocks.offset] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    with nothing_leaks(), pytest.raises(IntegrityError, match="block list"):
        log(open_store(store.url), patched(tmp_path / "p", data + b"x", file, {3}))


def test_a_file_that_was_appended_to_many_times_needs_few_descriptors(store: NativeStore, tmp_path: Path) -> None:
    data = os.urandom(2 * BLOCK)
    file = log(store, new_file(tmp_path / "x", data))
    for _ in range(40):
        data += os.urandom(BLOCK)
        file = log(store, patched(tmp_path / "p", data, file, {len(data) // BLOCK - 1}))
    assert len({extent.object for extent in store.extents(file)}) == 41
    content = store.local_content(file)
    assert content is not None
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert content.read(0, len(data)) == data
    assert len(os.listdir("/proc/self/fd")) - before <= 16
    content.close()
    assert len(os.listdir("/proc/self/fd")) <= before  # fewer where what earlier tests left is closed meanwhile


def test_a_file_beyond_all_bounds_is_refused_before_it_is_read(store: NativeStore) -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as file:
        try:
            file.truncate((16 << 40) + 1)
        except OSError:
            pytest.skip("no file system here has such files")
        with nothing_leaks(), pytest.raises(UsageError, match="at most 17592186044416"):
            log(store, NewFile(file.name, False))


def test_sparse_files(store: NativeStore, tmp_path: Path) -> None:
    """A hole is zeros; each block of them is stored once a file."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(20 * BLOCK)
        file.seek(10 * BLOCK)
        file.write(b"island")
    stored = log(store, NewFile(str(path), False))
    assert read_file(store, stored) == path.read_bytes()
    assert MadeFolder({}).base is None
