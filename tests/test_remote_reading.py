"""Reading stores that are elsewhere: how many round trips it takes, what is fetched, and what happens when the link fails.

The first part counts calls of an object store that has no paths; the second reads SeaweedFS, through a proxy, from real mounts.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mounting import World, needs_fuse
from proxy import Fault, Proxy
from servers import Bucket, bucket, seaweed  # noqa: F401 - fixtures
from shelves import Shelf, shelf, until  # noqa: F401 - fixtures

from artifactfs import download, warm
from artifactfs.cache import BlockCache
from artifactfs.errors import ArtifactFSError, IntegrityError, NetworkError, OfflineError
from artifactfs.model import BLOCK, File, Version
from artifactfs.names import parse
from artifactfs.reader import Reader
from artifactfs.store.native import NativeStore
from artifactfs.view import VersionView

CHANCE = random.Random(11)
SMALL = {f"d{number % 3}/f{number:03}": CHANCE.randbytes(CHANCE.randint(1, 40_000)) for number in range(240)}
LARGE = CHANCE.randbytes(40 * BLOCK + 77)
NAME = parse("a/b/c:latest")


class FarObjects:
    """The objects of a local store as if they were elsewhere: each call takes ``delay`` seconds and is noted."""

    def __init__(self, objects: Any, delay: float = 0.0) -> None:
        self.url = "far://bucket/store"
        self.delay = delay
        self.calls: list[tuple[str, int]] = []
        self.broken: Callable[[str, int, bytes], bytes] = lambda key, offset, data: data
        self.stalled = threading.Event()
        self.stalled.set()
        self._objects = objects

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objects, name)

    def path(self, key: str) -> None:
        return None

    def get(self, key: str) -> Any:
        self._call(key, 0)
        return self._objects.get(key)

    def read(self, key: str, offset: int, size: int) -> bytes:
        return b"".join(self.stream(key, offset, size))

    def stream(self, key: str, offset: int, size: int) -> Iterator[bytes]:
        self._call(key, size)
        yield self.broken(key, offset, self._objects.read(key, offset, size))

    def _call(self, key: str, size: int) -> None:
        self.calls.append((key, size))
        time.sleep(self.delay)
        self.stalled.wait(20)

    def reset(self) -> None:
        self.calls.clear()

    @property
    def fetched(self) -> int:
        """Bytes of contents and pages."""
        return sum(size for _, size in self.calls)


class Far:
    """A user of a far store."""

    def __init__(self, store: Any, root: Path, **options: Any) -> None:
        self.objects = FarObjects(store.objects)
        self.cache = BlockCache(root, 1 << 30)
        self.offline = bool(options.get("offline"))
        self.store = NativeStore(self.objects, self.cache, self.offline)  # type: ignore[arg-type]  # the rest is passed on
        self.reader = Reader(self.store, self.cache, **options)

    def view(self) -> VersionView:
        return VersionView(self.store, self.reader, self.store.version(NAME))

    def close(self) -> None:
        self.objects.stalled.set()
        self.reader.close()
        self.cache.close()


Make = Callable[..., Far]


@pytest.fixture
def version(shelf: Shelf) -> Version:  # noqa: F811
    return shelf.log("a/b/c", {**SMALL, "large": LARGE, "link": "large"})


@pytest.fixture
def far(shelf: Shelf, version: Version, tmp_path: Path) -> Iterator[Make]:  # noqa: F811
    """Makes users of the far store, who share a cache."""
    made: list[Far] = []

    def make(**options: Any) -> Far:
        made.append(Far(shelf.store, tmp_path / "far-cache", **options))
        return made[-1]

    yield make
    for user in made:
        user.close()


def content(view: VersionView, path: str, step: int = 128 << 10) -> bytes:
    fh = view.open("/" + path, os.O_RDONLY)
    try:
        parts = []
        while piece := view.read(fh, step, sum(map(len, parts))):
            parts.append(piece)
        return b"".join(parts)
    finally:
        view.release(fh)


def block_files(user: Far) -> list[Path]:
    """The cache's files of blocks."""
    return [path for path in user.cache.root.rglob("*") if path.is_file() and path.parent.parent.name in ("small", "large")]


# Small contents


def test_the_first_touch_fetches_what_is_asked_the_next_ones_the_rest(far: Make) -> None:
    user = far()
    view = user.view()
    names = [name for name in SMALL if name.startswith("d1/")]
    view.getattr("/" + names[0])
    user.objects.reset()
    assert content(view, names[5]) == SMALL[names[5]]
    assert [size for _, size in user.objects.calls] == [len(SMALL[names[5]])]
    assert content(view, names[50]) == SMALL[names[50]]
    entries = [entry(user, name) for name in names]
    until(lambda: all(user.reader.cached_bytes(file) for file in entries))
    assert sum(key.startswith("packs/") for key, _ in user.objects.calls) <= 4
    total = sum(len(SMALL[name]) for name in names)
    assert user.objects.fetched <= 1.1 * total
    user.objects.reset()
    assert all(content(view, name) == SMALL[name] for name in names)
    assert user.objects.calls == []


def entry(user: Far, path: str) -> File:
    found = user.store.tree.resolve(user.store.version(NAME).root, path)
    assert isinstance(found, File)
    return found


def test_many_readers_at_random_fetch_each_byte_about_once(far: Make) -> None:
    user = far()
    user.objects.delay = 0.02
    view = user.view()
    names = list(SMALL) * 2
    random.Random(2).shuffle(names)
    user.objects.reset()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda name: content(view, name) == SMALL[name], names))
    assert len(user.objects.calls) <= 30
    assert user.objects.fetched <= 1.3 * sum(map(len, SMALL.values()))


def test_without_prefetching_each_is_fetched_alone(far: Make) -> None:
    user = far(budget=0)
    view = user.view()
    names = list(SMALL)[:20]
    content(view, names[0])
    user.objects.reset()
    assert all(content(view, name) == SMALL[name] for name in names)
    assert user.objects.fetched - sum(len(SMALL[name]) for name in names[1:]) in range(100_000), (
        "and the pages of the other directories"
    )


def test_a_cache_that_was_emptied_is_filled_again(far: Make) -> None:
    user = far()
    view = user.view()
    for _ in range(2):
        assert all(content(view, name) == data for name, data in SMALL.items())
        user.cache.prune(0)
        user.reader._packed._memory.clear()


# Large contents


def test_random_reads_fetch_a_block_and_take_one_round_trip(far: Make) -> None:
    user = far()
    view = user.view()
    fh = view.open("/large", os.O_RDONLY)
    user.objects.delay = delay = 0.3  # much more than a busy machine adds
    user.objects.reset()
    times = []
    for block in random.Random(5).sample(range(40), 7):
        begun = time.monotonic()
        offset = block * BLOCK + 1000
        assert view.read(fh, 64 << 10, offset) == LARGE[offset : offset + (64 << 10)]
        times.append(time.monotonic() - begun)
    assert times[0] < 1.9 * delay, "the block list is fetched beside the first block"
    assert sorted(times)[3] < 1.6 * delay
    assert user.objects.fetched <= 7 * BLOCK + 41 * 32


def test_in_sequence_each_byte_is_fetched_once_by_several_streams(far: Make) -> None:
    user = far()
    view = user.view()
    user.objects.delay = 0.1
    view.getattr("/large")
    user.objects.reset()
    begun = time.monotonic()
    assert content(view, "large") == LARGE
    assert user.objects.fetched == len(LARGE) + 41 * 32
    assert time.monotonic() - begun < 41 * 0.1, "one after the other they would take longer"


# Pages


def test_a_walk_fetches_pages_ahead(shelf: Shelf, far: Make, tmp_path: Path) -> None:  # noqa: F811
    files = {f"t{top}/s{sub:03}/f": b"x%d" % top for top in range(4) for sub in range(150)}
    shelf.log("a/b/c", files)
    user = far()
    user.objects.delay = 0.005
    view = user.view()
    user.objects.reset()
    assert sum(1 for _ in every(view, "/")) == len(files)
    assert len(user.objects.calls) < 100, "there are 605 pages"
    user.objects.reset()
    assert sum(1 for _ in every(far().view(), "/")) == len(files)
    again = Far(shelf.store, tmp_path / "far-cache")
    version = again.store.version(NAME)
    again.objects.reset()
    assert sum(1 for _, found in again.store.tree.walk(version.root) if isinstance(found, File)) == len(files)
    assert again.objects.calls == [], "pages are cached"
    again.close()


def every(view: VersionView, path: str) -> Iterator[str]:
    """The files below ``path``, as find(1) goes: a directory is read to its end, then those in it."""
    below = list(view.readdir(path))
    for item in below:
        where = path.rstrip("/") + "/" + item.name
        view.getattr(where)
        if item.mode & 0o040000:
            yield from every(view, where)
        else:
            yield where


def test_one_look_up_fetches_one_page_of_each_level(far: Make) -> None:
    user = far()
    view = user.view()
    user.objects.reset()
    view.getattr("/d0/f000")
    assert len(user.objects.calls) == 2


# Wrong bytes, short objects, stalls


def test_bytes_that_were_changed_once_are_fetched_again(far: Make) -> None:
    user = far()
    view = user.view()
    view.getattr("/d0/f000")
    spoiled = []

    def spoil(key: str, offset: int, data: bytes) -> bytes:
        if (key, offset) in spoiled:
            return data
        spoiled.append((key, offset))
        return bytes([data[0] ^ 1]) + data[1:]

    user.objects.broken = spoil
    assert all(content(view, name) == data for name, data in {**SMALL, "large": LARGE}.items())
    assert spoiled


def test_changed_bytes_are_an_error_of_their_content_only(far: Make) -> None:
    user = far()
    view = user.view()
    view.getattr("/d0/f000")
    names = [name for name in SMALL if name.startswith("d0/")]
    bad = entry(user, names[7]).extents[0]

    def spoil(key: str, offset: int, data: bytes) -> bytes:
        at = bad.offset - offset
        return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :] if key.startswith("packs/") and 0 <= at < len(data) else data

    user.objects.broken = spoil
    for name in names:
        if name == names[7]:
            with pytest.raises(IntegrityError, match=names[7]):
                content(view, name)
        else:
            assert content(view, name) == SMALL[name]
    assert user.reader.cached_bytes(entry(user, names[7])) == 0
    user.objects.broken = lambda key, offset, data: data
    assert content(view, names[7]) == SMALL[names[7]]


def test_a_range_that_cannot_be_read_spoils_nothing_in_it(far: Make) -> None:
    user = far()
    view = user.view()
    view.getattr("/d0/f000")

    def refuse(key: str, offset: int, data: bytes) -> bytes:
        if len(data) > 50_000:
            raise IntegrityError(f"{key} ends before byte {offset + len(data)}")
        return data

    user.objects.broken = refuse
    assert all(content(view, name) == SMALL[name] for name in SMALL if name.startswith("d0/"))


def test_a_stall_delays_only_who_needs_it(far: Make) -> None:
    user = far(deadline=3.0)
    view = user.view()
    assert content(view, "d0/f000") == SMALL["d0/f000"]
    user.objects.stalled.clear()
    with pytest.raises(NetworkError, match="no progress"):
        content(view, "d0/f003")
    begun = time.monotonic()
    assert len(list(view.readdir("/d0"))) == 80
    assert content(view, "d0/f000") == SMALL["d0/f000"]
    assert time.monotonic() - begun < 2.5, "it does not wait for the deadline"
    user.objects.stalled.set()
    assert content(view, "d0/f003") == SMALL["d0/f003"]


@pytest.mark.parametrize("damage", ["zeroed", "torn", "flipped", "empty"])
def test_what_was_damaged_in_the_cache_is_never_served(far: Make, damage: str) -> None:
    before = far().view()
    assert all(content(before, name) == data for name, data in {**SMALL, "large": LARGE}.items())
    user = far()
    paths = block_files(user)
    assert len(paths) > 240
    for path in paths:
        data = bytearray(path.read_bytes())
        half = len(data) // 2
        if damage == "flipped":
            data[half] ^= 4
        path.write_bytes({"zeroed": bytes(len(data)), "torn": data[:half], "flipped": data, "empty": b""}[damage])
    view = user.view()
    assert all(content(view, name) == data for name, data in {**SMALL, "large": LARGE}.items())
    assert sorted(name for name in every(view, "/d0"))[0] == "/d0/f000"


def test_a_cache_that_cannot_be_written(shelf: Shelf, version: Version, tmp_path: Path) -> None:  # noqa: F811
    user = Far(shelf.store, tmp_path / "tiny")
    user.cache.limit = 1
    view = user.view()
    assert all(content(view, name) == data for name, data in {**SMALL, "large": LARGE}.items())
    user.close()


# Offline and warm


def test_offline_what_was_read_is_served_and_nothing_is_asked(far: Make) -> None:
    online = far()
    assert content(online.view(), "d0/f000") == SMALL["d0/f000"]
    assert content(online.view(), "large") == LARGE
    user = far(offline=True)
    view = user.view()
    assert content(view, "d0/f000") == SMALL["d0/f000"]
    assert content(view, "large") == LARGE
    assert len(list(view.readdir("/d0"))) == 80
    for missing in (lambda: content(view, "d1/f001"), lambda: content(view, "d0/f003")):
        with pytest.raises(OfflineError) as raised:
            missing()
        assert raised.value.errno == errno.EHOSTUNREACH
    with pytest.raises(OfflineError, match="not in the cache"):
        user.store.version(parse("a/b/other:latest"))
    assert user.objects.calls == []


def test_a_damaged_record_is_none(far: Make) -> None:
    online = far()
    online.view()
    for path in (online.cache.root / "records").iterdir():
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
    with pytest.raises(ArtifactFSError):
        far(offline=True).view()


def test_warm_fetches_all_once_then_offline_serves_it(shelf: Shelf, far: Make, version: Version) -> None:  # noqa: F811
    user = far()
    user.objects.delay = 0.005
    found: list[int] = []
    version = user.store.version(NAME)  # so that its record is kept
    assert warm.warm(user.store, user.reader, version, report=lambda progress: found.append(progress.stored)) == []
    assert user.objects.fetched <= 1.1 * version.size
    assert max(found) == version.size
    assert len(user.objects.calls) < 60
    offline = far(offline=True)
    view = offline.view()
    assert all(content(view, name) == data for name, data in {**SMALL, "large": LARGE}.items())
    assert all(item.cached == item.size for item in warm.check(offline.store, offline.reader, version))
    assert warm.evict(user.store, user.cache, version, "d1/") > 0
    assert {item.path.partition("/")[0] for item in warm.check(user.store, user.reader, version) if not item.cached} == {"d1"}


def test_a_download_fetches_packs(far: Make, tmp_path: Path) -> None:
    user = far()
    version = user.store.version(NAME)
    user.objects.delay = 0.005
    user.objects.reset()
    download.get(user.store, user.reader, version, str(tmp_path / "out"))
    assert all((tmp_path / "out" / name).read_bytes() == data for name, data in {**SMALL, "large": LARGE}.items())
    assert len(user.objects.calls) < 90
    assert user.objects.fetched <= 1.2 * version.size


def test_a_forked_child_reads_on(far: Make) -> None:
    """As the workers of a data loader do: the parent's threads are not there."""
    user = far()
    view = user.view()
    assert content(view, "d0/f000") == SMALL["d0/f000"]
    assert content(view, "d0/f006") == SMALL["d0/f006"]
    child = os.fork()
    if not child:
        right = content(view, "d1/f001") == SMALL["d1/f001"] and content(view, "d1/f004") == SMALL["d1/f004"]
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Mounts of a bucket, through a link that fails


class Team(World):
    """A store in a bucket, a proxy before it, and mounts of it."""

    def __init__(self, root: Path, proxy: Proxy) -> None:
        super().__init__(root)
        self.proxy = proxy

    def forget(self) -> None:
        """Empty the cache, and the kernel's of what is no longer mounted."""
        self.cache.prune(0)


@pytest.fixture
def team(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Team]:  # noqa: F811
    with Proxy(bucket.server.url) as proxy:
        monkeypatch.setenv("ARTIFACTFS_STORE", bucket.store_url("store", proxy.url))
        made = Team(tmp_path, proxy)
        made.log("a/b/c", {**SMALL, "large": LARGE[: 6 * BLOCK + 5], "link": "large"})
        made.forget()
        proxy.reset()
        yield made
        proxy.release()
        made.close()


CONTENTS = {**SMALL, "large": LARGE[: 6 * BLOCK + 5]}
TOTAL = sum(map(len, CONTENTS.values()))


def right(mount: Path, names: list[str] | None = None) -> bool:
    return all((mount / name).read_bytes() == CONTENTS[name] for name in names or CONTENTS)


@needs_fuse
def test_a_mount_over_a_link_that_fails(team: Team) -> None:
    faults = [
        team.proxy.add(Fault("status", method="GET", every=10)),
        team.proxy.add(Fault("cut", method="GET", path="packs", every=7, at=3000)),
        team.proxy.add(Fault("truncate", method="GET", path="/store/", every=11, at=100)),
        team.proxy.add(Fault("corrupt", method="GET", path="packs", every=5, at=10)),
    ]
    mount = team.mount("a/b/c:latest", prefetch="none")  # many requests
    names = list(CONTENTS)
    random.Random(9).shuffle(names)

    def patient(name: str) -> bool:
        """What came wrong twice in a row is an error, as it should be, and no wrong byte: then once more."""
        for _ in range(5):
            try:
                return right(mount, [name])
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
        return right(mount, [name])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(patient, names))
    assert all(fault.done for fault in faults)
    team.proxy.clear()
    team.proxy.refuse()
    offline = team.mount("a/b/c:latest", offline=True)
    assert right(offline)
    assert os.readlink(offline / "link") == "large"


@needs_fuse
def test_wrong_bytes_a_stall_and_a_lost_link_at_a_mount(team: Team) -> None:
    mount = team.mount("a/b/c:latest", prefetch="none")
    assert right(mount, ["d0/f000"])
    wrong = team.proxy.add(Fault("corrupt", method="GET", at=0))
    with pytest.raises(OSError) as raised:
        (mount / "d0/f003").read_bytes()
    assert raised.value.errno == errno.EIO
    assert wrong.done in (2, 4), "fetched again once; the kernel may ask twice"
    team.proxy.clear()
    assert right(mount, ["d0/f003"])

    stalled = team.proxy.add(Fault("stall", method="GET", at=0))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(right, mount, ["large"])
        until(lambda: stalled.done)
        begun = time.monotonic()
        assert len(os.listdir(mount / "d0")) == 80
        assert right(mount, ["d0/f000"])
        assert time.monotonic() - begun < 8
        assert not waiting.done()
        team.proxy.clear()
        team.proxy.release()
        assert waiting.result(30)

    team.proxy.refuse()
    with pytest.raises(OSError) as raised:
        (mount / "d0/f006").read_bytes()
    assert raised.value.errno == errno.ETIMEDOUT
    team.proxy.accept()
    assert right(mount, ["d0/f006"])


@needs_fuse
def test_two_mounts_and_a_warm_share_what_is_fetched(team: Team) -> None:
    team.proxy.latency = 0.01
    mounts = [team.mount("a/b/c:latest"), team.mount("a/b/c:v0")]
    version = team.store.version(NAME)
    team.proxy.reset()

    def work(which: int) -> bool:
        if which == 2:
            return warm.warm(team.store, team.reader, version) == []
        names = list(CONTENTS)
        random.Random(which).shuffle(names)
        return right(mounts[which], names)

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, range(3)))
    assert team.proxy.bytes_down <= 1.5 * TOTAL, "each byte about once; pages and gaps between contents too"
