"""The block cache: right bytes or none, within its limit, whatever other processes, the disk and time do to it."""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from artifactfs.cache import LIST, BlockCache, CachedContent, CacheProblem
from artifactfs.content import block_digest, fingerprint
from artifactfs.errors import NotPermittedError
from artifactfs.model import BLOCK, block_count

MIB = 1 << 20
PLENTY = 512 * MIB
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def noise(seed: object, size: int) -> bytes:
    return random.Random(repr(seed)).randbytes(size)


def key_of(seed: object) -> bytes:
    return block_digest(repr(seed).encode())


def part(data: bytes, block: int) -> bytes:
    return data[block * BLOCK : (block + 1) * BLOCK]


def fill(content: CachedContent, data: bytes) -> list[bool]:
    return [content.write(block, part(data, block)) for block in range(block_count(len(data)))]


def whole(content: CachedContent, block: int, digest: bytes = b"") -> bytes | None:
    return content.read(block, 0, min(BLOCK, content.size - block * BLOCK), digest)


def allocated(root: Path) -> int:
    """What the directory occupies. Files that go while it is looked at count for nothing."""
    total = 0
    for folder, _, names in os.walk(root):
        for path in (folder, *(f"{folder}/{name}" for name in names)):
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(path).st_blocks * 512
    return total


def block_files(root: Path) -> list[Path]:
    return sorted(path for name in ("small", "large") for path in (root / "v1" / name).rglob("*") if not path.is_dir())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def cache(root: Path) -> Iterator[BlockCache]:
    cache = BlockCache(root, PLENTY)
    yield cache
    cache.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, 12 MiB large."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m,mode=755", "artifactfs-test", disk], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


# Reading and writing


@pytest.mark.parametrize("size", [1, 4095, 4096, 65_536, BLOCK - 1, BLOCK])
def test_small_content(cache: BlockCache, root: Path, size: int) -> None:
    data = noise(size, size)
    content = cache.content(fingerprint(data).id, size)
    assert not content.has(0)
    assert content.read(0, 0, size) is None
    assert content.write(0, data)
    assert content.has(0)
    assert content.cached_bytes() == size
    for digest in (b"", content.key):
        assert content.read(0, 0, size, digest) == data
        assert content.read(0, size // 3, size // 2, digest) == data[size // 3 :][: size // 2]
        assert content.read(0, size, 0, digest) == b""
    assert len(block_files(root)) == 1


def test_large_content(cache: BlockCache) -> None:
    data = noise("large", 3 * BLOCK + 777)
    content = cache.content(key_of("large"), len(data))
    assert content.write(1, part(data, 1))
    assert content.write(3, part(data, 3))
    assert [content.has(block) for block in range(4)] == [False, True, False, True]
    assert content.cached_bytes() == BLOCK + 777
    assert [whole(content, block) for block in range(4)] == [None, part(data, 1), None, part(data, 3)]
    assert content.read(3, 700, 77) == part(data, 3)[700:]


def test_reading_in_sequence_and_back(cache: BlockCache) -> None:
    data = noise("sequence", 12 * BLOCK + 9)
    content = cache.content(key_of(1), len(data))
    for block in (*range(7), *range(9, 13)):
        content.write(block, part(data, block))
    for block in (*range(13), 3, 4, 5, 6, 7, 12, 0, 1):
        assert whole(content, block) == (None if block in (7, 8) else part(data, block))


def test_caches_share(cache: BlockCache, root: Path) -> None:
    data = noise("shared", 2 * BLOCK)
    other = BlockCache(root, PLENTY)
    assert whole(other.content(key_of(1), len(data)), 0) is None
    fill(cache.content(key_of(1), len(data)), data)
    assert whole(other.content(key_of(1), len(data)), 1) == part(data, 1)
    other.close()
    assert whole(cache.content(key_of(1), len(data)), 0) == part(data, 0)


def test_writing_again_keeps_it(cache: BlockCache, root: Path) -> None:
    content = cache.content(key_of(1), 5)
    assert content.write(0, b"first")
    before = block_files(root)[0].stat().st_ino
    assert content.write(0, b"first")
    assert block_files(root)[0].stat().st_ino == before


def test_known_digest_decides(cache: BlockCache, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = cache.content(key_of(1), 5)
    content.write(0, b"wrong")
    assert content.read(0, 0, 5) == b"wrong"
    assert content.read(0, 0, 5, block_digest(b"right")) is None
    assert "failed its check and is dropped" in caplog.text
    assert not content.has(0)
    assert content.write(0, b"right")
    assert content.read(0, 0, 5, block_digest(b"right")) == b"right"
    assert content.read(0, 1, 3) == b"igh"


def test_digest_of_the_writer(cache: BlockCache) -> None:
    content = cache.content(key_of(1), 5)
    assert content.write(0, b"bytes", block_digest(b"bytes"))
    assert content.read(0, 0, 5) == b"bytes"
    other = cache.content(key_of(2), 5)
    other.write(0, b"bytes", block_digest(b"other"))
    assert other.read(0, 0, 5) is None


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_buffers(cache: BlockCache, kind: Callable[[bytes], bytes]) -> None:
    data = noise("buffer", 4321)
    assert cache.content(key_of(kind), len(data)).write(0, kind(data))
    assert whole(cache.content(key_of(kind), len(data)), 0) == data


def test_empty_content(cache: BlockCache, root: Path) -> None:
    with cache.content(key_of(0), 0) as content:
        assert content.has(0)
        assert content.write(0, b"")
        assert content.read(0, 0, 0) == b""
        assert content.cached_bytes() == 0
    assert not root.exists()


def test_block_list(cache: BlockCache) -> None:
    data = noise("list", 2 * BLOCK + 1)
    found = fingerprint(data)
    content = cache.content(found.id, found.size)
    assert content.get_list() is None
    assert content.set_list(found.blocks)
    assert content.get_list() == found.blocks
    assert content.cached_bytes() == 0
    assert cache.content(found.id, 10).get_list() is None
    assert not cache.content(found.id, 10).set_list(b"")


def test_cached_bytes_counts_only_blocks_of_the_content(cache: BlockCache, root: Path) -> None:
    content = cache.content(key_of(1), 2 * BLOCK + 1)
    assert content.cached_bytes() == 0
    content.write(2, b"x")
    folder = root / "v1" / "large" / key_of(1).hex()
    for name, size in (("0", 10), ("1", BLOCK + 32), ("01", BLOCK + 32), ("ff", BLOCK + 32), ("-1", 33), ("what", 33)):
        (folder / name).write_bytes(bytes(size))
    assert content.cached_bytes() == BLOCK + 1


def test_same_key_other_size(cache: BlockCache) -> None:
    cache.content(key_of(1), 5).write(0, b"12345")
    assert cache.content(key_of(1), 4).read(0, 0, 4) is None
    assert cache.content(key_of(1), BLOCK + 1).read(0, 0, 4) is None


@pytest.mark.parametrize(
    "wrong",
    [
        lambda cache: cache.content(b"short", 1),
        lambda cache: cache.content(bytes(32), -1),
        lambda cache: cache.content(bytes(32), 10).read(1, 0, 1),
        lambda cache: cache.content(bytes(32), 10).read(-1, 0, 1),
        lambda cache: cache.content(bytes(32), 10).read(0, 5, 6),
        lambda cache: cache.content(bytes(32), 10).read(0, -1, 6),
        lambda cache: cache.content(bytes(32), 10).write(0, b"123456789"),
        lambda cache: cache.content(bytes(32), 10).has(2),
        lambda cache: cache.content(bytes(32), BLOCK + 1).set_list(b"123"),
    ],
)
def test_wrong_arguments(cache: BlockCache, wrong: Callable[[BlockCache], object]) -> None:
    with pytest.raises(ValueError):
        wrong(cache)


# On disk


def test_nothing_is_created_before_the_first_write(cache: BlockCache, root: Path) -> None:
    content = cache.content(key_of(1), 10)
    assert content.read(0, 0, 1) is None
    assert not content.has(0)
    assert cache.prune() == cache.evict(key_of(1)) == cache.info().used == 0
    assert list(cache.verify()) == []
    assert not root.exists()


def test_private_and_of_this_layout(root: Path) -> None:
    (root / "v2").mkdir(parents=True)
    (root / "v2" / "future").write_text("not ours")
    old_mask = os.umask(0)
    try:
        cache = BlockCache(root, PLENTY)
        fill(cache.content(key_of(1), 2 * BLOCK), bytes(2 * BLOCK))
        cache.content(key_of(2), 3).write(0, b"abc")
    finally:
        os.umask(old_mask)
    for path in (root / "v1", *(root / "v1").rglob("*")):
        assert stat.S_IMODE(path.lstat().st_mode) & 0o077 == 0, path
    cache.prune()
    assert (root / "v2" / "future").read_text() == "not ours"


def test_an_open_directory_is_closed_to_others(root: Path) -> None:
    (root / "v1").mkdir(parents=True, mode=0o755)
    assert BlockCache(root, PLENTY).content(key_of(1), 3).write(0, b"abc")
    assert stat.S_IMODE((root / "v1").stat().st_mode) == 0o700


def test_descriptors_are_bounded(root: Path) -> None:
    cache = BlockCache(root, 1 << 40)
    before = len(os.listdir("/proc/self/fd"))
    contents = [cache.content(key_of(number), 2 * BLOCK) for number in range(300)]
    for content in contents:
        content.write(1, bytes(BLOCK))
        assert content.read(1, 5, 5) == bytes(5)
    assert len(os.listdir("/proc/self/fd")) < before + 110
    cache.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_forgotten_cache_gives_back(root: Path) -> None:
    cache = BlockCache(root, PLENTY)
    before = len(os.listdir("/proc/self/fd"))
    cache.content(key_of(1), 3).write(0, b"abc")
    assert len(list((root / "v1" / "writers").iterdir())) == 1
    del cache
    gc.collect()
    assert list((root / "v1" / "writers").iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_removed_behind_its_back(cache: BlockCache, root: Path) -> None:
    data = noise("removed", 2 * BLOCK)
    content = cache.content(key_of(1), len(data))
    tiny = cache.content(key_of(2), 4)
    for victim in (root, root / "v1", root / "v1" / "large", root / "v1" / "ledger", root / "v1" / "writers"):
        assert fill(content, data) == [True, True]
        assert tiny.write(0, b"tiny")
        shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
        assert fill(content, data) == [True, True]
        assert tiny.write(0, b"tiny")
        assert whole(content, 1) == part(data, 1)
        assert whole(tiny, 0) == b"tiny"
        assert cache.info().contents == 2
    shutil.rmtree(root)
    assert whole(content, 0) in (None, part(data, 0))
    assert cache.info().used == 0


def test_usable_in_a_forked_child(cache: BlockCache, root: Path) -> None:
    cache.content(key_of("parent"), 3).write(0, b"abc")
    pid = os.fork()
    if not pid:
        good = whole(cache.content(key_of("parent"), 3), 0) == b"abc" and cache.content(key_of("child"), 3).write(0, b"def")
        os._exit(0 if good else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert whole(cache.content(key_of("child"), 3), 0) == b"def"
    assert cache.content(key_of("later"), 3).write(0, b"ghi")


# The limit


def test_content_larger_than_the_limit(root: Path) -> None:
    limit = 5 * MIB
    cache = BlockCache(root, limit)
    size = 24 * BLOCK + 5
    content = cache.content(key_of("huge"), size)
    for block in range(25):
        data = noise(block, min(BLOCK, size - block * BLOCK))
        assert content.write(block, data)
        assert allocated(root) <= limit
        assert whole(content, block) == data
    assert 3 * BLOCK <= content.cached_bytes() <= limit
    assert next(block for block in range(25) if content.has(block)) >= 20


def test_many_small_contents(root: Path) -> None:
    limit = 2 * MIB
    cache = BlockCache(root, limit)
    for number in range(1500):
        size = 1 + number * 37 % 9000
        assert cache.content(key_of(number), size).write(0, bytes(size))
        if number % 25 == 0:
            assert allocated(root) <= limit
    assert limit * 0.75 < allocated(root) <= limit
    assert whole(cache.content(key_of(1499), 1 + 1499 * 37 % 9000), 0) is not None


def test_background_eviction_keeps_the_limit(root: Path) -> None:
    limit = 160 * MIB
    cache = BlockCache(root, limit)
    data = noise("background", BLOCK)
    content = cache.content(key_of(1), 400 * BLOCK)
    for block in range(260):
        assert content.write(block, data, block_digest(data))
        if block % 8 == 0:
            assert allocated(root) <= limit
    assert content.cached_bytes() > limit * 0.8


def test_least_recently_used_goes_first(root: Path) -> None:
    cache = BlockCache(root, 8 * MIB)
    data = noise("lru", BLOCK)
    contents = [cache.content(key_of(number), BLOCK) for number in range(12)]
    for content in contents[:6]:
        content.write(0, data)
    old = time.time_ns() - 10**12
    for age, content in enumerate(contents[:6]):
        path = root / "v1" / "small" / content.key.hex()[0] / content.key.hex()
        os.utime(path, ns=(old + age, path.stat().st_mtime_ns))
    assert contents[0].read(0, 0, 1) == data[:1]
    assert whole(contents[2], 0) == data
    for content in contents[6:10]:
        content.write(0, data)
    assert [content.has(0) for content in contents[:6]] == [True, False, True, False, False, True]


def test_use_is_noted_on_disks_mounted_noatime(root: Path, cache: BlockCache) -> None:
    content = cache.content(key_of(1), 3)
    content.write(0, b"abc")
    path = block_files(root)[0]
    before = path.stat().st_mtime_ns
    os.utime(path, ns=(1, before))
    whole(content, 0)
    assert abs(time.time_ns() - path.stat().st_atime_ns) < 60 * 10**9
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize("limit", [0, 1, 4096, 65_536, 70_000])
def test_limits_too_small_for_anything(root: Path, limit: int) -> None:
    cache = BlockCache(root, limit)
    assert not cache.content(key_of(1), BLOCK).write(0, bytes(BLOCK))
    assert not cache.content(key_of(2), 20_000).write(0, bytes(20_000))
    assert allocated(root) <= limit


def test_lower_limit_takes_hold_at_the_next_write(root: Path) -> None:
    before = BlockCache(root, PLENTY)
    fill(before.content(key_of(1), 20 * BLOCK), bytes(20 * BLOCK))
    before.close()
    cache = BlockCache(root, 4 * MIB)
    assert cache.content(key_of(2), 3).write(0, b"abc")
    assert allocated(root) <= 4 * MIB


def test_threads_at_a_small_limit(root: Path) -> None:
    limit = 6 * MIB
    cache = BlockCache(root, limit)
    over, wrong = [], []
    content = cache.content(key_of("threads"), 16 * BLOCK)
    data = noise("threads", 16 * BLOCK)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(60):
            block = rng.randrange(16)
            content.write(block, part(data, block))
            if allocated(root) > limit:
                over.append(allocated(root))
            got = content.read(block, 10, 5000)
            if got not in (None, part(data, block)[10:5010]):
                wrong.append(block)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not over
    assert not wrong


# Damage


def damage_flip(path: Path) -> None:
    with path.open("r+b") as file:
        place = path.stat().st_size // 2
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 16]))


def damage_seal(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def damage_zero(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(0)
        file.truncate(size)


def damage_truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def damage_empty(path: Path) -> None:
    os.truncate(path, 0)


def damage_tear(path: Path) -> None:
    size = path.stat().st_size
    os.truncate(path, size // 2)
    os.truncate(path, size)


def damage_append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def damage_link(path: Path) -> None:
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target)


def damage_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = [
    damage_flip,
    damage_zero,
    damage_truncate,
    damage_empty,
    damage_tear,
    damage_append,
    damage_link,
    damage_pipe,
    damage_seal,
]


@pytest.mark.parametrize("warm", [False, True], ids=["unread", "served"])
@pytest.mark.parametrize("size", [3000, BLOCK, 2 * BLOCK])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_never_served(root: Path, cache: BlockCache, damage: Callable[[Path], None], size: int, warm: bool) -> None:
    data = noise(size, size)
    content = cache.content(key_of(size), size)
    fill(content, data)
    if warm:
        assert content.read(0, 1, 100) == data[1:101]
        assert content.read(0, 1, 100) == data[1:101]
    damage(block_files(root)[0])
    intact = warm and damage is damage_link  # an open file that was only renamed
    assert content.read(0, 0, 200) == (data[:200] if intact else None)
    assert content.write(0, part(data, 0))
    assert whole(content, 0) == part(data, 0)
    assert content.read(0, 7, 7, block_digest(part(data, 0))) == data[7:14]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_block_list_is_never_served(root: Path, cache: BlockCache, damage: Callable[[Path], None]) -> None:
    found = fingerprint(noise("list", 3 * BLOCK))
    content = cache.content(found.id, found.size)
    content.set_list(found.blocks)
    damage(root / "v1" / "large" / found.id.hex() / "list")
    assert content.get_list() is None
    assert content.set_list(found.blocks)
    assert content.get_list() == found.blocks


def test_every_flipped_bit_is_found(root: Path, cache: BlockCache) -> None:
    data = noise("bits", 40)
    content = cache.content(key_of("bits"), 40)
    content.write(0, data)
    path = block_files(root)[0]
    stored = path.read_bytes()
    assert len(stored) == 72
    for bit in range(8 * len(stored)):
        bad = bytearray(stored)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        assert content.read(0, 0, 40) is None, bit
        assert not path.exists()
        path.write_bytes(stored)
        assert content.read(0, 0, 40) == data


def test_every_torn_length_is_a_miss(root: Path, cache: BlockCache) -> None:
    data = noise("torn", 300)
    content = cache.content(key_of("torn"), 300)
    content.write(0, data)
    path = block_files(root)[0]
    stored = path.read_bytes()
    for length in range(len(stored)):
        path.write_bytes(stored[:length])
        assert content.read(0, 0, 10) is None
        path.write_bytes(stored[:length] + bytes(len(stored) - length))
        assert content.read(0, 0, 10) is None
        assert content.write(0, data)
        assert content.read(0, 0, 300) == data


def test_files_that_changed_places(root: Path, cache: BlockCache) -> None:
    data = noise("swap", 3 * BLOCK)
    content, other = cache.content(key_of(1), len(data)), cache.content(key_of(2), len(data))
    fill(content, data)
    fill(other, noise("other", 3 * BLOCK))
    folder = root / "v1" / "large"
    shutil.copy(folder / key_of(2).hex() / "0", folder / key_of(1).hex() / "0")
    shutil.copy(folder / key_of(1).hex() / "1", folder / key_of(1).hex() / "2")
    assert [whole(content, block) for block in range(3)] == [None, part(data, 1), None]


def test_damaged_bookkeeping(root: Path) -> None:
    limit = 6 * MIB
    for step, damage in enumerate([damage_flip, damage_zero, damage_truncate, damage_empty, damage_append, Path.unlink]):
        live, later = BlockCache(root, limit), BlockCache(root, limit)
        for cache in (live, later, live):
            for block in range(8):
                cache.content(key_of(step), 8 * BLOCK).write(block, noise(block, BLOCK))
                assert allocated(root) <= limit
            damage(root / "v1" / "ledger")
        assert BlockCache(root, limit).content(key_of("new"), 3).write(0, b"new")
        assert allocated(root) <= limit


def test_a_ledger_from_before_the_boot_is_not_believed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, early = 6 * MIB, b""
    for boot in range(4):
        monkeypatch.setattr("artifactfs.cache.ledger._boot_id", lambda boot=boot: bytes([boot + 1]) * 16)
        if boot:
            (root / "v1" / "ledger").write_bytes(early)  # what was synced long before the crash
        cache = BlockCache(root, limit)
        cache.content(key_of("first"), 10).write(0, bytes(10))
        early = (root / "v1" / "ledger").read_bytes()
        for block in range(5):
            cache.content(key_of(boot), 5 * BLOCK).write(block, noise(block, BLOCK))
            assert allocated(root) <= limit


def test_grants_of_the_dead_are_taken_back(root: Path) -> None:
    limit = 64 * MIB
    BlockCache(root, limit).content(key_of(0), 3).write(0, b"abc")
    script = (
        "import os, sys; from pathlib import Path; from artifactfs.cache import BlockCache\n"
        "cache = BlockCache(Path(sys.argv[1]), int(sys.argv[2])); cache.content(os.urandom(32), 5).write(0, b'12345')\n"
        "os.kill(os.getpid(), 9)"
    )
    for _ in range(3):
        assert subprocess.run([sys.executable, "-c", script, root, str(limit)]).returncode == -signal.SIGKILL
    assert len(list((root / "v1" / "writers").iterdir())) == 3
    cache = BlockCache(root, limit)
    cache.prune(limit)
    assert list((root / "v1" / "writers").iterdir()) == []
    assert cache.info().contents == 4


# Several processes


def contend(root: str, limit: int, seed: int, seconds: float) -> None:
    """Write, read, evict and prune the same contents as everybody else; ends with a status that tells what was wrong."""
    rng = random.Random(seed)
    large = noise("large", 6 * BLOCK)
    smalls = [noise(number, 500 * number + 1) for number in range(20)]
    cache = BlockCache(Path(root), limit)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        number, block, start = rng.randrange(20), rng.randrange(6), rng.randrange(BLOCK - 100)
        content, small = cache.content(key_of("large"), len(large)), cache.content(key_of(number), len(smalls[number]))
        match rng.randrange(12):
            case 0 | 1 | 2:
                content.write(block, part(large, block))
            case 3 | 4:
                small.write(0, smalls[number])
            case 5 | 6 | 7:
                got = content.read(block, start, 100)
                if got not in (None, part(large, block)[start : start + 100]):
                    os._exit(3)
            case 8 | 9 | 10:
                if whole(small, 0) not in (None, smalls[number]):
                    os._exit(4)
            case _:
                cache.evict(key_of("large") if rng.random() < 0.3 else key_of(number))
    os._exit(0)


def start(target: Callable[..., None], *args: object) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    return process


def test_processes_share_it(root: Path) -> None:
    limit = 5 * MIB
    processes = [start(contend, str(root), limit, seed, 3.0) for seed in range(4)]
    most = 0
    while any(process.is_alive() for process in processes):
        most = max(most, allocated(root))
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert most <= limit
    assert list(BlockCache(root, limit).verify()) == []


def write_forever(root: str, limit: int, pipe: int) -> None:
    cache = BlockCache(Path(root), limit)
    large = noise("forever", 8 * BLOCK)
    os.write(pipe, b"+")
    while True:
        for block in range(8):
            cache.content(key_of("forever"), len(large)).write(block, part(large, block))
            cache.content(key_of(block), 5000).write(0, noise(block, 5000))
        cache.evict(key_of("forever"))


def test_killed_while_writing(root: Path) -> None:
    limit = 6 * MIB
    large = noise("forever", 8 * BLOCK)
    rng = random.Random(1)
    for _ in range(8):
        reading, writing = os.pipe()
        process = start(write_forever, str(root), limit, writing)
        os.read(reading, 1)
        deadline = time.monotonic() + rng.uniform(0.01, 0.06)
        while time.monotonic() < deadline:
            assert allocated(root) <= limit
        process.kill()
        process.join()
        os.close(reading), os.close(writing)
        cache = BlockCache(root, limit)
        content = cache.content(key_of("forever"), len(large))
        assert all(whole(content, block) in (None, part(large, block)) for block in range(8))
        assert content.write(3, part(large, 3))
        assert whole(content, 3) == part(large, 3)
        assert allocated(root) <= limit


def test_a_stopped_process_stops_nobody(root: Path) -> None:
    """One that holds the lock on the ledger costs a second; nothing is cached, nothing hangs."""
    cache = BlockCache(root, 4 * MIB)
    cache.content(key_of(1), 3).write(0, b"abc")
    script = "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, 2); print('+', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script, root / "v1" / "ledger"], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.read(1) == b"+"
        try:
            began = time.monotonic()
            assert not cache.content(key_of(2), BLOCK).write(0, bytes(BLOCK))
            assert time.monotonic() - began < 20
            assert whole(cache.content(key_of(1), 3), 0) == b"abc"
        finally:
            holder.kill()
    assert cache.content(key_of(2), BLOCK).write(0, bytes(BLOCK))


# Bad places


@ROOT_ONLY
@pytest.mark.root
def test_full_disk(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Others fill the disk: nothing is cached, one line says so, what was cached is there, and writing goes on afterwards."""
    cache = BlockCache(small_disk / "cache", PLENTY)
    tiny = cache.content(key_of("tiny"), 4)
    assert tiny.write(0, b"tiny")
    ballast = small_disk / "ballast"
    with ballast.open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(65536))
            file.flush()
    content = cache.content(key_of(1), 4 * BLOCK)
    assert fill(content, bytes(4 * BLOCK)) == [False] * 4
    assert whole(content, 0) is None
    assert caplog.text.count("reading on without it") == 1
    ballast.unlink()
    assert fill(BlockCache(small_disk / "cache", PLENTY).content(key_of(1), 4 * BLOCK), bytes(4 * BLOCK)) == [True] * 4


@ROOT_ONLY
@pytest.mark.root
def test_no_space_in_the_middle_of_a_block(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a quota that statvfs does not show: the torn block goes, older ones make room, later ones are cached."""
    monkeypatch.setattr("artifactfs.cache.layout.Tree.disk_shortage", lambda tree, cost: 0)
    monkeypatch.setattr("artifactfs.cache._PAUSE_SECONDS", 0.0)
    cache = BlockCache(small_disk / "cache", PLENTY)
    data = noise("quota", 30 * BLOCK)
    content = cache.content(key_of(1), len(data))
    done = fill(content, data)
    assert done[:11] == [True] * 11
    assert not all(done)
    assert any(done[20:])
    assert all(whole(content, block) in (None, part(data, block)) for block in range(30))
    assert list(cache.verify()) == []


@ROOT_ONLY
@pytest.mark.root
def test_the_last_of_the_disk_is_left_alone(small_disk: Path) -> None:
    cache = BlockCache(small_disk / "cache", PLENTY)
    data = noise("disk", 30 * BLOCK)
    content = cache.content(key_of(1), len(data))
    for block in range(30):
        assert content.write(block, part(data, block))
        vfs = os.statvfs(small_disk)
        assert vfs.f_bavail >= vfs.f_blocks // 20
    assert content.cached_bytes() >= 6 * BLOCK
    assert content.has(29)
    assert not content.has(0)


@ROOT_ONLY
@pytest.mark.root
def test_read_only_disk(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    BlockCache(small_disk / "cache", PLENTY).content(key_of(1), 3).write(0, b"abc")
    gc.collect()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    cache = BlockCache(small_disk / "cache", PLENTY)
    assert whole(cache.content(key_of(1), 3), 0) == b"abc"
    assert not cache.content(key_of(2), 3).write(0, b"abc")
    assert not cache.content(key_of(3), 3).write(0, b"abc")
    assert caplog.text.count("Read-only file system; reading on without it") == 1
    assert cache.info().contents == 1
    assert "cannot be written to; set ARTIFACTFS_CACHE_DIR" in cache.info().problem
    with pytest.raises(NotPermittedError, match="read-only"):
        cache.prune()


@ROOT_ONLY
@pytest.mark.root
def test_unwritable_directory(tmp_path: Path) -> None:
    """As another user, where only root may write, and where only root may look."""
    tmp_path.chmod(0o700)
    for root in (Path("/artifactfs-test-cache"), tmp_path / "cache"):
        pid = os.fork()
        if not pid:
            os.setgid(65534)
            os.setuid(65534)
            cache = BlockCache(root, PLENTY)
            content = cache.content(key_of(1), 3)
            wrong = content.write(0, b"abc") or content.read(0, 0, 3) or content.has(0) or cache.info().used
            os._exit(1 if wrong else 0)
        assert os.waitpid(pid, 0)[1] == 0
        assert not root.exists()


def test_not_a_directory(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    root.write_text("a file")
    cache = BlockCache(root, PLENTY)
    content = cache.content(key_of(1), 3)
    assert content.read(0, 0, 3) is None
    assert not content.write(0, b"abc")
    assert "reading on without it" in caplog.text
    assert cache.info().problem
    assert root.read_text() == "a file"


@ROOT_ONLY
@pytest.mark.root
def test_directory_of_another_user(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in (root, root / "v1"):
        path.mkdir()
        os.chown(path, 65534, 65534)
        cache = BlockCache(root, PLENTY)
        assert not cache.content(key_of(1), 3).write(0, b"abc")
        assert cache.content(key_of(1), 3).read(0, 0, 3) is None
        assert "belongs to another user; set ARTIFACTFS_CACHE_DIR" in cache.info().problem
        with pytest.raises(NotPermittedError):
            cache.prune()
        assert not block_files(root)
        os.chown(path, 0, 0)
    assert "belongs to another user" in caplog.text


@ROOT_ONLY
@pytest.mark.root
def test_link_of_another_user(root: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    root.symlink_to(tmp_path / "outside")
    os.lchown(root, 65534, 65534)
    assert not BlockCache(root, PLENTY).content(key_of(1), 3).write(0, b"abc")
    assert os.listdir(tmp_path / "outside") == []
    os.lchown(root, 0, 0)
    assert BlockCache(root, PLENTY).content(key_of(1), 3).write(0, b"abc")


@pytest.mark.parametrize("planted", ["v1", "v1/small", "v1/large", "v1/writers", "v1/ledger", "v1/small/@", "v1/large/@", "file"])
def test_links_lead_nowhere(root: Path, tmp_path: Path, planted: str) -> None:
    """Whatever is a symbolic link in the cache: nothing outside is written, read or removed."""
    key = key_of("planted")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "0").write_bytes(b"precious")
    (outside / key.hex()).write_bytes(b"precious")
    name = f"v1/small/{key.hex()[0]}/{key.hex()}" if planted == "file" else planted
    path = root / name.replace("small/@", f"small/{key.hex()[0]}").replace("@", key.hex())
    path.parent.mkdir(parents=True)
    path.symlink_to(outside / "new" if planted in ("v1/ledger", "file") else outside)
    cache = BlockCache(root, PLENTY)
    for content in (cache.content(key, 8), cache.content(key, 2 * BLOCK)):
        content.write(0, noise("planted", min(BLOCK, content.size)))
        content.read(0, 0, 8)
    with contextlib.suppress(Exception):
        cache.evict(key)
        list(cache.verify())
        cache.prune()
    assert sorted(os.listdir(outside)) == ["0", key.hex()]
    assert (outside / "0").read_bytes() == b"precious"


def test_no_descriptor_left(root: Path, cache: BlockCache) -> None:
    """Too many open files: a miss, nothing dropped, and all works again afterwards."""
    cache.content(key_of(1), 3).write(0, b"abc")
    cache.close()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        assert cache.content(key_of(1), 3).read(0, 0, 3) is None
        assert not cache.content(key_of(2), 3).write(0, b"abc")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert cache.content(key_of(1), 3).read(0, 0, 3) == b"abc"


# info, prune, evict, verify


def test_info(root: Path, cache: BlockCache) -> None:
    fill(cache.content(key_of(1), 2 * BLOCK), bytes(2 * BLOCK))
    cache.content(key_of(1), 2 * BLOCK).set_list(bytes(64))
    cache.content(key_of(2), 3).write(0, b"abc")
    info = cache.info()
    assert (info.root, info.limit, info.contents, info.blocks, info.problem) == (root, PLENTY, 2, 3, "")
    assert info.used == allocated(root)
    assert 0 < info.disk_free < info.disk_total


def test_prune(root: Path, cache: BlockCache) -> None:
    content = cache.content(key_of(1), 9 * BLOCK)
    fill(content, noise("prune", 9 * BLOCK))
    for number in range(30):
        cache.content(key_of(number + 2), 10).write(0, bytes(10))
    before = allocated(root)
    freed = cache.prune(5 * MIB)
    assert 3 * MIB < allocated(root) <= 5 * MIB
    assert freed >= before - 5 * MIB
    assert not content.has(0)
    assert content.has(8)
    assert cache.prune() > 0
    assert cache.info().contents == 0
    assert list((root / "v1" / "large").iterdir()) == list((root / "v1" / "small").iterdir()) == []
    assert cache.info().used < 65_536
    assert content.write(0, bytes(BLOCK))


def test_prune_by_another_process_frees_the_space_of_open_files(root: Path, cache: BlockCache) -> None:
    content = cache.content(key_of(1), 2 * BLOCK)
    content.write(0, bytes(BLOCK))
    assert content.read(0, 3, 3) == bytes(3)
    BlockCache(root, PLENTY).prune()
    assert content.read(0, 3, 3) is None


def test_evict(root: Path, cache: BlockCache) -> None:
    fill(cache.content(key_of(1), 2 * BLOCK), bytes(2 * BLOCK))
    cache.content(key_of(1), 2 * BLOCK).set_list(bytes(64))
    cache.content(key_of(2), 5000).write(0, bytes(5000))
    cache.content(key_of(3), 3).write(0, b"abc")
    assert cache.evict(key_of(1)) >= 2 * BLOCK
    assert cache.evict(key_of(2)) >= 5000
    assert cache.evict(key_of(2)) == 0
    assert [path.name for path in block_files(root)] == [key_of(3).hex()]
    assert not list((root / "v1" / "large").iterdir())


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify(root: Path, cache: BlockCache, damage: Callable[[Path], None]) -> None:
    key = fingerprint(b"small").id
    content = cache.content(key_of(1), 3 * BLOCK)
    fill(content, noise("verify", 3 * BLOCK))
    content.set_list(bytes(96))
    cache.content(key, 5).write(0, b"small")
    assert list(cache.verify()) == []
    folder = root / "v1" / "large" / key_of(1).hex()
    for path in (folder / "1", folder / "list", root / "v1" / "small" / key.hex()[0] / key.hex()):
        damage(path)
    problems = [problem for problem in cache.verify() if "elsewhere" not in problem.key]
    assert sorted((problem.key, problem.block) for problem in problems) == sorted(
        [(key_of(1).hex(), 1), (key_of(1).hex(), LIST), (key.hex(), 0)]
    )
    assert all(problem.reason for problem in problems)
    assert list(cache.verify()) == []
    assert [content.has(block) for block in range(3)] == [True, False, True]


def test_verify_removes_what_is_not_ours(root: Path, cache: BlockCache) -> None:
    cache.content(key_of(1), 3).write(0, b"abc")
    for name in ("small/stray", "small/0/stray", "large/stray"):
        path = root / "v1" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("stray")
    assert {problem.reason for problem in cache.verify()} == {"is no file of this cache"}
    assert len(block_files(root)) == 1


def test_verify_is_no_use(root: Path, cache: BlockCache) -> None:
    cache.content(key_of(1), 3).write(0, b"abc")
    path = block_files(root)[0]
    os.utime(path, ns=(10**18, path.stat().st_mtime_ns))
    assert list(cache.verify()) == []
    assert path.stat().st_atime_ns == 10**18


def test_verify_beside_writers_finds_nothing(root: Path) -> None:
    reading, writing = os.pipe()
    process = start(write_forever, str(root), 64 * MIB, writing)
    os.read(reading, 1)
    try:
        found: list[CacheProblem] = []
        for _ in range(10):
            found += BlockCache(root, 64 * MIB).verify()
        assert found == []
    finally:
        process.kill()
        process.join()
        os.close(reading), os.close(writing)


# Everything at once


class CacheMachine(RuleBasedStateMachine):
    """Two processes' caches over one directory with a small limit, somebody who damages files, and crashes."""

    limit = 4 * MIB
    sizes = (1, 700, 4096, 40_000, BLOCK, 2 * BLOCK + 9, 7 * BLOCK)

    @initialize()
    def begin(self) -> None:
        self.base = Path(os.environ["CACHE_MACHINE_ROOT"])
        self.root = self.base / os.urandom(4).hex()
        self.caches = [BlockCache(self.root, self.limit) for _ in range(2)]
        self.data = [noise(size, size) for size in self.sizes]

    def content(self, which: int, number: int) -> CachedContent:
        return self.caches[which].content(key_of(self.sizes[number]), self.sizes[number])

    @rule(which=st.integers(0, 1), number=st.integers(0, 6), block=st.integers(0, 6))
    def write(self, which: int, number: int, block: int) -> None:
        block %= block_count(self.sizes[number])
        content = self.content(which, number)
        if content.write(block, part(self.data[number], block)):
            assert content.has(block)

    @rule(which=st.integers(0, 1), number=st.integers(0, 6), share=st.floats(0, 1), known=st.booleans())
    def read(self, which: int, number: int, share: float, known: bool) -> None:
        size = self.sizes[number]
        place = int((size - 1) * share)
        block, start = divmod(place, BLOCK)
        data = part(self.data[number], block)
        got = self.content(which, number).read(block, start, len(data) - start, block_digest(data) if known else b"")
        assert got is None or got == data[start:]

    @rule(which=st.integers(0, 1))
    def read_all(self, which: int) -> None:
        for number, size in enumerate(self.sizes):
            for block in range(block_count(size)):
                assert whole(self.content(which, number), block) in (None, part(self.data[number], block))

    @rule(which=st.integers(0, 1), number=st.integers(0, 6))
    def lists(self, which: int, number: int) -> None:
        blocks = fingerprint(self.data[number]).blocks
        self.content(which, number).set_list(blocks)
        assert self.content(1 - which, number).get_list() in (None, blocks)

    @rule(which=st.integers(0, 1), number=st.integers(0, 6))
    def evict(self, which: int, number: int) -> None:
        self.caches[which].evict(key_of(self.sizes[number]))
        assert self.content(which, number).cached_bytes() == 0

    @rule(which=st.integers(0, 1), left=st.integers(200_000, 4 * MIB))
    def prune(self, which: int, left: int) -> None:
        self.caches[which].prune(left)
        assert allocated(self.root) <= left

    @rule(which=st.integers(0, 1))
    def verify(self, which: int) -> None:
        list(self.caches[which].verify())
        assert list(self.caches[1 - which].verify()) == []

    @rule(which=st.integers(0, 1), clean=st.booleans())
    def restart(self, which: int, clean: bool) -> None:
        if clean:
            self.caches[which].close()
        else:
            self.caches[which]._slot.space = None  # as kill -9: the kernel closes, nothing is given back
            gc.collect()
        self.caches[which] = BlockCache(self.root, self.limit)

    @rule(share=st.floats(0, 1), damage=st.sampled_from([damage_flip, damage_zero, damage_truncate, damage_empty, damage_tear]))
    def damage(self, share: float, damage: Callable[[Path], None]) -> None:
        files = [path for path in self.root.rglob("*") if path.is_file() and path.stat().st_size]
        if files:
            damage(files[int((len(files) - 1) * share)])

    @rule(name=st.sampled_from(["v1/ledger", "v1/large", "v1/small", "v1"]))
    def remove(self, name: str) -> None:
        path = self.root / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    @invariant()
    def within_the_limit(self) -> None:
        if hasattr(self, "root"):
            assert allocated(self.root) <= self.limit

    def teardown(self) -> None:
        for cache in getattr(self, "caches", ()):
            cache.close()
        if hasattr(self, "root"):
            shutil.rmtree(self.root, ignore_errors=True)


def test_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_MACHINE_ROOT", str(tmp_path))
    logging.getLogger("artifactfs.cache").setLevel(logging.ERROR)
    examples = 100 if "ARTIFACTFS_LONG_TESTS" in os.environ else 12
    run_state_machine_as_test(CacheMachine, settings=settings(max_examples=examples, stateful_step_count=30, deadline=None))
