"""gc and fsck: nothing that is referred to is lost, nothing that is not stays, and no damage goes unseen."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from commits import NAME, commit, contents, file_at, leftovers, new_file, nothing_leaks, objects, problems
from shelves import write_files
from steps import small_packs

from artifactfs import maintenance
from artifactfs import tree as tree_module
from artifactfs.content import fingerprint
from artifactfs.errors import IntegrityError, NotFoundError
from artifactfs.folders import LocalFolder, MadeFolder, MergedFolder
from artifactfs.maintenance import Checked, check_version, fsck, gc
from artifactfs.model import BLOCK, Dir, Extent, File, Ref, Version
from artifactfs.names import parse
from artifactfs.objects import object_key
from artifactfs.publish import NewFile, NewRef
from artifactfs.store.native import NativeStore
from artifactfs.store.urls import open_store

ALL = -10.0
"""A grace period that spares nothing, whatever the clock's grain."""


@pytest.fixture
def store(tmp_path: Path) -> NativeStore:
    return open_store(str(tmp_path / "store"))


def make(store: NativeStore, tmp_path: Path, number: int, name: str = "acme/vision/bikes", **fields: Any) -> Version:
    files = {
        "own": new_file(tmp_path / f"own{number}", b"%d" % number * 1000),
        "large": new_file(tmp_path / f"large{number}", bytes([number]) * (BLOCK + 5)),
        "shared": new_file(tmp_path / "shared", b"shared" * 1000),
    }
    return commit(store, files, name, **fields).version


# gc


def test_what_is_referred_to_stays(store: NativeStore, tmp_path: Path) -> None:
    versions = [make(store, tmp_path, number) for number in range(3)]
    before = objects(store.url)
    done = gc(store, grace=ALL)
    assert (done.removed, done.bytes, done.young, done.expired) == (0, 0, 0, [])
    assert done.kept == len(before) and objects(store.url) == before
    assert problems(store.url) == []
    for version in versions:
        assert contents(open_store(store.url), version)


def test_what_nothing_refers_to_goes(store: NativeStore, tmp_path: Path) -> None:
    for number in range(4):
        make(store, tmp_path, number)
    before = objects(store.url)
    for name in ("v1", "v2"):
        store.delete_version(NAME.at(name))
    seen = gc(store, grace=ALL, dry_run=True)
    assert objects(store.url) == before
    done = gc(store, grace=ALL)
    assert done == seen and done.removed > 0
    after = objects(store.url)
    assert done.bytes == sum(before.values()) - sum(after.values()) and done.kept == len(after)
    assert problems(store.url) == []
    assert sorted(contents(store, store.version(NAME.at("v0")))) == ["large", "own", "shared"]
    for name in ("v0", "v3"):
        store.delete_version(NAME.at(name))
    gc(store, grace=ALL)
    assert objects(store.url) == {}
    assert make(store, tmp_path, 9).number == 4


def test_the_grace_period_spares_what_is_young_and_what_was_just_deleted(store: NativeStore, tmp_path: Path) -> None:
    make(store, tmp_path, 0)
    make(store, tmp_path, 1)
    store.delete_version(NAME.at("v0"))
    before = objects(store.url)
    done = gc(store, grace=3600)
    assert done.removed == 0 and done.young == 0, "deleted within the hour: a commit may still build on it"
    for key in before:
        os.utime(Path(store.url, key), (0, 0))
    assert gc(store, grace=3600).removed == 0
    store.update_collection(NAME, lambda it: it)
    stray = "packs/ab/" + "ab" * 16
    store.objects.put(stray, b"of a commit under way")
    done = gc(store, grace=3600)
    assert (done.removed, done.young) == (0, 1)
    assert gc(store, grace=ALL).removed > 1
    assert stray not in objects(store.url)


def test_leftovers_of_writers_that_died_go_after_the_grace_period(store: NativeStore, tmp_path: Path) -> None:
    make(store, tmp_path, 0)
    writer = store.objects.writer()
    writer.write_at(0, b"under way")
    old = Path(store.url, "tmp/123-dead")
    old.write_bytes(b"dead")
    os.utime(old, (0, 0))
    gc(store, grace=3600)
    assert len(leftovers(store.url)) == 1
    writer.commit("packs/ab/" + "ab" * 16)


def test_other_things_in_the_store_stay(store: NativeStore, tmp_path: Path) -> None:
    make(store, tmp_path, 0)
    for name in ("packs/README", "packs/ab/notes.txt", "blobs/x", "other/file", "README"):
        path = Path(store.url, name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
        os.utime(path, (0, 0))
    gc(store, grace=ALL)
    for name in ("packs/README", "packs/ab/notes.txt", "blobs/x", "other/file", "README"):
        assert Path(store.url, name).exists()


def test_a_part_of_the_catalog_on_another_disk_counts(store: NativeStore, tmp_path: Path) -> None:
    version = make(store, tmp_path, 0)
    folder = Path(store.url, "catalog/acme")
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert gc(store, grace=ALL).removed == 0
    assert store.entities() == ["acme"] and problems(store.url) == []
    assert contents(open_store(store.url), version)


def test_versions_expire(store: NativeStore, tmp_path: Path) -> None:
    for number, ttl in enumerate((None, 3600, 3600, None)):
        make(store, tmp_path, number, ttl=ttl, aliases=[f"a{number}"])
    store.update_version(NAME.at("v1"), lambda it: msgspec.structs.replace(it, created_at="2020-01-01T00:00:00.000000Z"))
    before = objects(store.url)
    assert gc(store, grace=ALL, dry_run=True).expired == ["acme/vision/bikes:v1"]
    assert len(store.versions(NAME)) == 4
    done = gc(store, grace=ALL)
    assert done.expired == ["acme/vision/bikes:v1"]
    assert [it.number for it in store.versions(NAME)] == [0, 2, 3]
    assert store.collection(NAME).aliases == {"latest": 3, "a0": 0, "a2": 2, "a3": 3}
    assert objects(store.url) == before, "expired now: collected in the next run, after the grace period"
    assert gc(store, grace=ALL).removed > 0
    assert problems(store.url) == []


def test_an_expired_newest_version_hands_latest_over(store: NativeStore, tmp_path: Path) -> None:
    make(store, tmp_path, 0)
    make(store, tmp_path, 1, ttl=1)
    store.update_version(NAME, lambda it: msgspec.structs.replace(it, created_at="2020-01-01T00:00:00.000000Z"))
    gc(store, grace=ALL)
    assert store.version(NAME).number == 0
    longest = make(store, tmp_path, 2, ttl=1 << 47)
    assert gc(store, grace=ALL).expired == [] and longest.ttl == 1 << 47


@pytest.mark.parametrize("damage", ["page", "lost page", "version", "stranger", "broken link", "table"])
def test_nothing_is_removed_while_something_cannot_be_read(store: NativeStore, tmp_path: Path, damage: str) -> None:
    first = make(store, tmp_path, 0)
    make(store, tmp_path, 1)
    store.delete_version(NAME.at("v1"))
    data = bytearray(bytes([0]) * (BLOCK + 5) + bytes(2 * BLOCK))
    data[-1] = 1
    last = commit(
        store,
        {
            "large": NewFile(
                new_file(tmp_path / "p", bytes(data)).path, False, file_at(store, first, "large"), frozenset({1, 2, 3})
            )
        },
    ).version
    page = last.root.page
    assert page is not None
    if damage == "page":
        _flip(store, page.extent, 3)
    elif damage == "lost page":
        Path(store.url, object_key(page.extent.object)).unlink()
    elif damage == "version":
        Path(store.url, "catalog/acme/vision/bikes/versions/00000002.json").write_bytes(b"{}")
    elif damage == "stranger":
        Path(store.url, "catalog/lost+found").mkdir()
    elif damage == "broken link":
        Path(store.url, "catalog/acme/speech").symlink_to("/a/disk/that/is/not/mounted")
    else:
        table = file_at(store, last, "large").table
        assert table is not None
        _flip(store, table, 0)
    before = objects(store.url)
    fresh = open_store(store.url)
    with nothing_leaks(), pytest.raises(IntegrityError) as caught:
        gc(fresh, grace=ALL)
    assert "\n" not in str(caught.value)
    assert objects(store.url) == before


def test_a_commit_between_looking_and_removing_loses_nothing(
    store: NativeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gc has seen all versions; then one appears that keeps contents of the newest, stores its own, and again another's."""
    make(store, tmp_path, 0)
    make(store, tmp_path, 1)
    store.delete_version(NAME.at("v0"))
    for key in objects(store.url):
        os.utime(Path(store.url, key), (0, 0))
    real = maintenance._collectable
    made: list[Version] = []

    def late(found: NativeStore) -> Iterator[Any]:
        made.append(make(open_store(store.url), tmp_path, 2))
        made.append(make(open_store(store.url), tmp_path, 0))  # its large blob has the name of one that is to go
        yield from real(found)

    monkeypatch.setattr(maintenance, "_collectable", late)
    gc(store, grace=1.0)
    assert problems(store.url) == []
    assert [contents(open_store(store.url), version)["shared"][0] for version in made] == [b"shared" * 1000] * 2


_COMMITTER = """
import sys, time, os
sys.path.insert(0, sys.argv[4])
from pathlib import Path
from commits import commit, new_file, NAME
from artifactfs.errors import NotFoundError
from artifactfs.store.urls import open_store
store, work, end = open_store(sys.argv[1]), Path(sys.argv[2]) / sys.argv[3], time.time() + float(sys.argv[5])
longest = number = 0
while time.time() < end:
    number += 1
    files = {f"f{n}": new_file(work / f"f{n}", b"%d" % (number * (n == number % 5) + n) * 500) for n in range(5)}
    files["large"] = new_file(work / "large", bytes([number % 3]) * (3 << 20))
    started = time.time()
    version = commit(store, files).version
    longest = max(longest, time.time() - started)
    for old in store.versions(NAME)[:-3]:
        try:
            store.delete_version(NAME.at(old.name), delete_aliases=True)
        except NotFoundError:
            pass
print(longest)
"""


@pytest.mark.slow
def test_collecting_beside_running_commits_loses_nothing(store: NativeStore, tmp_path: Path) -> None:
    """What the grace period promises: a commit that takes less is safe, whatever is deleted and collected meanwhile."""
    grace, seconds = 1.5, 6.0
    command = [sys.executable, "-c", _COMMITTER, store.url, str(tmp_path)]
    rest = [str(Path(__file__).parent), str(seconds)]
    started = [subprocess.Popen([*command, f"c{n}", *rest], stdout=subprocess.PIPE, text=True) for n in range(3)]
    removed = 0
    try:
        while any(process.poll() is None for process in started):
            with contextlib.suppress(NotFoundError):
                removed += gc(open_store(store.url), grace=grace).removed
    finally:
        output = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0] * 3
    if max(map(float, output)) > 0.8 * grace:
        pytest.skip("a commit took longer than the grace period here")
    assert removed > 0
    assert problems(store.url) == []
    for version in store.versions(NAME):
        assert len(contents(store, version)) == 6


# fsck


def _flip(store: NativeStore, extent: Extent, offset: int, bit: int = 0) -> None:
    path = Path(store.url, object_key(extent.object))
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(extent.offset + offset)
        byte = file.read(1)[0]
        file.seek(extent.offset + offset)
        file.write(bytes([byte ^ (1 << bit)]))


@pytest.fixture
def everything(store: NativeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NativeStore]:
    """Two versions with small contents, an index of several levels, a large content of three extents, references."""
    monkeypatch.setattr(tree_module, "_CUT", 3)
    monkeypatch.setattr(tree_module, "_MAX_CHILDREN", 4)
    rng = random.Random(3)
    files = {f"d{n % 3}/f{n:02d}": rng.randbytes(rng.randint(1, 300)) for n in range(60)}
    large = rng.randbytes(3 * BLOCK + 50)
    data = write_files(tmp_path / "data", {**files, "large": large, "link": "large", "none": b""})
    referred = rng.randbytes(2 * BLOCK)
    found = fingerprint(referred)
    reference = NewRef(Ref("", "file:///x", "digest", found.size, id=found.id), found.blocks)
    with small_packs(8000):
        first = commit(store, MergedFolder(LocalFolder(str(data)), MadeFolder({"reference": reference})), algorithm="MD5").version
        changed = bytearray(large)
        changed[BLOCK + 7] ^= 1
        patch = new_file(tmp_path / "patch", bytes(changed))
        new = NewFile(
            patch.path, False, file_at(store, first, "large"), frozenset({1}), lambda offset, size: large[offset : offset + size]
        )
        commit(store, MadeFolder({"large": new, "more": new_file(tmp_path / "more", b"more")}, first.root), algorithm="XXH128")
        store.objects.put("packs/ab/" + "ab" * 16, b"garbage of a commit that died")
    assert problems(store.url) == []
    return store


def _ranges(store: NativeStore) -> dict[str, list[tuple[int, int, str]]]:
    """(start, end, what) of every byte that a version refers to, by object."""
    ranges: dict[str, list[tuple[int, int, str]]] = {}

    def add(extent: Extent | None, what: str) -> None:
        if extent is not None:
            ranges.setdefault(object_key(extent.object), []).append((extent.offset, extent.offset + extent.length, what))

    for version in store.versions(NAME):
        for page, _ in store.tree.pages(version.root, set()):
            add(page.extent, "page")
        for path, entry in store.tree.walk(version.root):
            if isinstance(entry, File):
                for extent in store.extents(entry):
                    add(extent, path)
                add(entry.blocks, "list")
                add(entry.table, "table")
            elif isinstance(entry, Ref):
                add(entry.blocks, "list of a reference")
    return ranges


def _readable(store: NativeStore) -> tuple[dict[str, Any], int]:
    """What of both versions can be read, and how much cannot, with an IntegrityError each."""
    found: dict[str, Any] = {}
    failed = 0
    for version in store.versions(NAME):
        pending: list[tuple[str, Dir]] = [(version.name, version.root)]
        while pending:
            path, directory = pending.pop()
            try:
                entries = list(store.tree.entries(directory))
            except IntegrityError:
                failed += 1
                continue
            for entry in entries:
                below = f"{path}/{entry.name}"
                if isinstance(entry, Dir):
                    pending.append((below, entry))
                elif isinstance(entry, File):
                    try:
                        content = store.local_content(entry)
                        assert content is not None
                        with contextlib.closing(content):
                            found[below] = content.read(0, entry.size)
                    except IntegrityError as error:
                        assert "\n" not in str(error)
                        failed += 1
    return found, failed


@pytest.mark.slow
def test_every_flipped_bit_is_found_and_harms_nothing_else(everything: NativeStore) -> None:
    """A random bit of any object: fsck reports it if any version refers to its byte, reading it fails, all else reads on."""
    store = everything
    ranges = _ranges(store)
    whole, failed = _readable(store)
    assert failed == 0
    rng = random.Random(11)
    seen: set[str] = set()
    keys = sorted(objects(store.url))
    for _ in range(150):
        key = rng.choice(keys)
        covered = ranges.get(key, [])
        # Half of the time in one of the small things that would be hit too rarely, else anywhere.
        if covered and rng.random() < 0.7:
            start, end, _ = rng.choice(covered)
        else:
            start, end = 0, objects(store.url)[key]
        at, bit = rng.randrange(start, end), rng.randrange(8)
        hit = {what for start, end, what in covered if start <= at < end}
        path = Path(store.url, key)
        original = path.read_bytes()
        path.chmod(0o644)
        path.write_bytes(original[:at] + bytes([original[at] ^ (1 << bit)]) + original[at + 1 :])
        found = list(fsck(open_store(store.url)))
        readable, failed = _readable(open_store(store.url))
        path.write_bytes(original)
        where = f"bit {bit} of byte {at} of {key}, which is {hit or 'nothing'}"
        assert bool(found) == bool(hit), where
        assert readable.items() <= whole.items(), f"wrong bytes were served: {where}"
        if hit != {"list of a reference"}:
            assert (failed > 0) == bool(hit), where
        if hit and "page" not in hit and hit & {"list", "table", "large"} == set():
            assert len(whole) - len(readable) <= 2, where
        seen |= {"content" if "/f" in what else what for what in hit} or {"nothing"}
    assert {"page", "content", "large", "list", "table", "nothing"} <= seen
    assert problems(store.url) == []


def test_fsck_reads_what_is_on_disk_and_not_what_it_remembers(everything: NativeStore) -> None:
    store = everything
    version = store.version(NAME)
    contents(store, version)
    assert list(check_version(store, version)) == []
    page = version.root.page
    assert page is not None
    _flip(store, page.extent, 5)
    assert [problem.problem for problem in check_version(store, version) if "is damaged" in problem.problem]
    _flip(store, page.extent, 5)
    _flip(store, file_at(store, version, "large").blocks or Extent(b"", 0, 0), 5)
    assert [problem.path for problem in check_version(store, version)] == ["large"]


def test_problems_name_version_path_and_object(everything: NativeStore) -> None:
    store = everything
    file = file_at(store, store.version(NAME), "d1/f01")
    _flip(store, file.extents[0], 0)
    found = problems(store.url)
    assert [(it.where, it.path) for it in found] == [("acme/vision/bikes:v0", "d1/f01")], "once, where it is seen first"
    assert file.id.hex() in found[0].problem and object_key(file.extents[0].object) in found[0].problem


def test_lost_objects_are_found(everything: NativeStore) -> None:
    store = everything
    for key in sorted(objects(store.url)):
        path = Path(store.url, key)
        data = path.read_bytes()
        path.unlink()
        referred = not key.startswith("packs/ab/" + "ab")
        assert bool(problems(store.url)) == referred, key
        path.write_bytes(data[:-1])
        assert bool(problems(store.url)) == referred, f"{key} cut short"
        path.write_bytes(data)
    assert problems(store.url) == []


def test_entries_that_lie_about_their_content_are_found(store: NativeStore, tmp_path: Path) -> None:
    good = file_at(store, commit(store, {"x": new_file(tmp_path / "x", b"content")}, algorithm="MD5").version, "x")
    lies = {
        "checksum": msgspec.structs.replace(good, checksum="1B2M2Y8AsgTpgAmY7PhCfg=="),
        "empty": File("", 0, False, good.id),
        "size": msgspec.structs.replace(good, size=6),
        "id": msgspec.structs.replace(good, id=bytes(32)),
        "no extents": msgspec.structs.replace(good, extents=()),
        "twice": msgspec.structs.replace(good, extents=good.extents * 2),
        "beyond": msgspec.structs.replace(good, extents=(Extent(good.extents[0].object, 1 << 40, 7),)),
        "far beyond": msgspec.structs.replace(good, extents=(Extent(good.extents[0].object, (1 << 63) - 8, 7),)),
        "elsewhere": msgspec.structs.replace(good, extents=(Extent(b"x../../../etc/passwd", 0, 7),)),
    }
    commit(store, lies)
    found = {it.path: it.problem for it in problems(store.url)}
    assert found.keys() == set(lies)
    assert all("\n" not in problem for problem in found.values())


def test_totals_and_digests_that_lie_are_found(store: NativeStore, tmp_path: Path) -> None:
    sub = commit(store, {"d": MadeFolder({"x": new_file(tmp_path / "x", b"content")})}).version
    folder = store.tree.lookup(sub.root, "d")
    assert isinstance(folder, Dir)
    for number, lie in enumerate(({"count": 2}, {"size": 8}, {"files": 0}, {"links": 1}, {"digest": bytes(32)})):
        commit(store, {"d": msgspec.structs.replace(folder, **lie)}, f"acme/lies/c{number}")  # type: ignore[arg-type]
    found = problems(store.url)
    assert sorted(it.where for it in found) == [f"acme/lies/c{n}:v0" for n in range(5)]
    store.update_version(parse("acme/vision/bikes"), lambda it: msgspec.structs.replace(it, size=1))
    store.update_version(parse("acme/lies/c0"), lambda it: msgspec.structs.replace(it, digest="00"))
    assert sorted({it.where for it in problems(store.url)}) == sorted({*(it.where for it in found), "acme/vision/bikes:v0"})


def test_aliases_that_lead_nowhere_are_found(store: NativeStore, tmp_path: Path) -> None:
    make(store, tmp_path, 0)
    path = Path(store.url, "catalog/acme/vision/bikes/collection.json")
    path.write_bytes(path.read_bytes().replace(b'"latest": 0', b'"latest": 0, "lost": 5'))
    assert [(it.where, it.problem.split(":")[0]) for it in problems(store.url)] == [
        ("acme/vision/bikes", "alias 'lost' leads nowhere")
    ]


def test_a_deleted_version_is_not_checked(store: NativeStore, tmp_path: Path) -> None:
    make(store, tmp_path, 0)
    make(store, tmp_path, 1)
    store.delete_version(NAME.at("v0"))
    gc(store, grace=ALL)
    assert problems(store.url) == []
    store.delete_version(NAME.at("v1"))
    gc(store, grace=ALL)
    assert problems(store.url) == [] and objects(store.url) == {}


def test_a_check_counts_what_it_reads(everything: NativeStore) -> None:
    counts: list[tuple[int, int, int]] = []

    def report(checked: Checked) -> None:
        counts.append((checked.versions, checked.files, checked.bytes))

    assert list(fsck(everything, report)) == []
    assert counts == sorted(counts)
    assert counts[-1][0] == 2 and 60 < counts[-1][1] < 70
    assert time.time() > 0
