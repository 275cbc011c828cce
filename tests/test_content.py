"""Content ids, block lists and W&B's digests, against formulas written out here."""

from __future__ import annotations

import base64
import hashlib
import os
import struct
from pathlib import Path

import pytest
import xxhash
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from artifactfs.content import (
    CheckedBlocks,
    Checksum,
    EntryChecksum,
    Hasher,
    check_algorithm,
    check_block_list,
    content_id,
    fingerprint,
    manifest_digest,
)
from artifactfs.errors import IntegrityError, UsageError
from artifactfs.model import BLOCK

SIZES = [0, 1, 100, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 5]
CONTEXT = "artifactfs 2026-11 block list v1"


def expected_id(data: bytes) -> bytes:
    if len(data) <= 1 << 20:
        return blake3(data).digest()
    digests = b"".join(blake3(data[at : at + (1 << 20)]).digest() for at in range(0, len(data), 1 << 20))
    return blake3(struct.pack("<Q", len(data)) + digests, derive_key_context=CONTEXT).digest()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("algorithm", ["BLAKE3", "MD5", "XXH128"])
def test_a_fingerprint_is_what_the_formulas_say(size: int, algorithm: str) -> None:
    data = os.urandom(size)
    found = fingerprint(data, algorithm)
    checksum = {"BLAKE3": b"", "MD5": hashlib.md5(data).digest(), "XXH128": xxhash.xxh3_128(data).digest()}[algorithm]
    assert found.id == expected_id(data)
    assert found.size == size
    assert found.checksum == base64.b64encode(checksum).decode()
    assert found.digest == (found.checksum or base64.b64encode(found.id).decode())
    assert len(found.blocks) == (0 if size <= BLOCK else 32 * -(-size // BLOCK))
    assert content_id(size, found.blocks or blake3(data).digest()) == found.id


def test_known_values() -> None:
    assert fingerprint(b"").id.hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert fingerprint(b"", "MD5").checksum == "1B2M2Y8AsgTpgAmY7PhCfg=="  # artifact-model: an empty file at W&B
    assert content_id(0, b"") == fingerprint(b"").id


def test_no_content_can_pass_for_the_list_of_another() -> None:
    large = os.urandom(2 * BLOCK)
    preimage = struct.pack("<Q", len(large)) + fingerprint(large).blocks
    assert fingerprint(preimage).id != fingerprint(large).id


def test_the_size_counts_in_a_large_content_id() -> None:
    blocks = os.urandom(64)
    assert content_id(2 * BLOCK, blocks) != content_id(2 * BLOCK - 1, blocks)


@given(st.lists(st.integers(min_value=0, max_value=3 * BLOCK), max_size=3))
def test_blocks_given_one_by_one_are_the_content(sizes: list[int]) -> None:
    for size in sizes:
        data = bytes(size)
        hasher = Hasher("XXH128")
        for at in range(0, size, BLOCK):
            hasher.block(data[at : at + BLOCK])
        assert hasher.finish() == fingerprint(data, "XXH128")


# W&B's version digests (artifact-model, section 4)


def wandb_digest(entries: dict[str, str], new: object) -> str:
    hasher = new()  # type: ignore[operator]
    hasher.update(b"wandb-artifact-manifest-v1\n")
    for path in sorted(entries, key=lambda it: it.encode()):
        hasher.update(f"{path}:{entries[path]}\n".encode())
    return str(hasher.hexdigest())


def test_an_empty_artifact_has_wandbs_digest() -> None:
    assert manifest_digest([], "MD5") == "64e7c61456b10382e2f3b571ac24b659"


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.text(st.characters(codec="ascii"))))
def test_version_digests_are_wandbs(entries: dict[str, str]) -> None:
    pairs = sorted(entries.items())
    assert manifest_digest(pairs, "MD5") == wandb_digest(entries, hashlib.md5)
    assert manifest_digest(pairs, "XXH128") == wandb_digest(entries, xxhash.xxh3_128)


def test_a_manifest_digest_in_blake3_is_a_mistake() -> None:
    with pytest.raises(UsageError):
        manifest_digest([], "BLAKE3")


@pytest.mark.parametrize("name", ["blake3", "Blake3", "md5", "xxh128"])
def test_algorithms_are_known_in_any_case(name: str) -> None:
    assert check_algorithm(name) == name.upper()


@pytest.mark.parametrize("name", ["", "sha256", "md-5", "MD5 "])
def test_other_algorithms_are_refused_where_wandb_would_use_md5(name: str) -> None:
    for use in (check_algorithm, Checksum, lambda it: fingerprint(b"", it)):
        with pytest.raises(UsageError, match="not known"):
            use(name)


def test_a_block_list_is_checked_against_its_content_id() -> None:
    data = os.urandom(2 * BLOCK + 1)
    found = fingerprint(data)
    assert check_block_list(found.id, found.size, found.blocks, "x") == found.blocks
    flipped = bytes([found.blocks[0] ^ 1]) + found.blocks[1:]
    for bad in (b"", found.blocks[:-32], found.blocks + bytes(32), found.blocks[:-1], flipped):
        with pytest.raises(IntegrityError, match=found.id.hex()):
            check_block_list(found.id, found.size, bad, "x")
    with pytest.raises(IntegrityError):
        check_block_list(found.id, found.size - 1, found.blocks, "x")


# CheckedBlocks


def test_a_block_is_served_only_once_it_was_found_right(tmp_path: Path) -> None:
    data = os.urandom(1000)
    path = tmp_path / "object"
    path.write_bytes(b"." * 10 + data)
    digest = blake3(data).digest()
    with path.open("rb") as file:
        checks = CheckedBlocks()
        assert checks.read(file.fileno(), 10, 1000, 0, 1000, bytes(32)) is None
        assert checks.read(file.fileno(), 10, 1000, 5, 100, digest) == data[5:105]
        assert checks.read(file.fileno(), 10, 1000, 900, 100, digest) == data[900:]
        assert checks.read(file.fileno(), 11, 1000, 0, 1000, digest) is None, "it ends before the block does"


@pytest.mark.parametrize("keep_time", [False, True])
def test_a_block_that_changes_after_it_was_checked_is_checked_again(tmp_path: Path, keep_time: bool) -> None:
    data = os.urandom(1000)
    path = tmp_path / "object"
    path.write_bytes(data)
    digest = blake3(data).digest()
    with path.open("rb") as file:
        checks = CheckedBlocks()
        assert checks.read(file.fileno(), 0, 1000, 0, 10, digest) == data[:10]
        status = path.stat()
        with path.open("r+b") as other:
            other.write(b"\0" if data[0] else b"\1")
        if keep_time:
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert checks.read(file.fileno(), 0, 1000, 0, 10, digest) is None


def test_a_file_put_in_its_place_is_checked_again(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_bytes(b"good")
    bad.write_bytes(b"evil")
    checks = CheckedBlocks()
    digest = blake3(b"good").digest()
    with good.open("rb") as first, bad.open("rb") as second:
        assert checks.read(first.fileno(), 0, 4, 0, 4, digest) == b"good"
        assert checks.read(second.fileno(), 0, 4, 0, 4, digest) is None


@pytest.mark.parametrize("size", [0, 1, BLOCK, BLOCK + 1, 3 * BLOCK])
@pytest.mark.parametrize("algorithm", ["BLAKE3", "MD5", "XXH128"])
def test_entry_checksum_is_that_of_one_pass(algorithm: str, size: int) -> None:
    data = os.urandom(size)
    for step in (BLOCK, 300_000, 2 * BLOCK + 5):
        checksum = EntryChecksum(algorithm)
        for start in range(0, size, step):
            checksum.update(data[start : start + step])
        expected = fingerprint(data, algorithm).digest
        assert checksum.finish() == checksum.finish() == expected
