"""Trees of pages against nested dictionaries, with pages cut so small that a few names make several levels of index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import msgspec
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from artifactfs import tree as tree_module
from artifactfs.errors import IntegrityError
from artifactfs.model import Dir, Entry, Extent, File, Page, Ref, Symlink, named
from artifactfs.tree import EMPTY, MAX_PAGE_BYTES, DirUpdate, Tree, decode_page, identity, weight

Model: TypeAlias = "dict[str, Entry | Model]"


few = settings(max_examples=30)
REAL = {name: getattr(tree_module, name) for name in ("_CUT", "_MAX_CHILDREN", "_MAX_WEIGHT", "_MAX_LEVEL")}


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of about two entries, at most eight; indexes of at most three pages."""
    monkeypatch.setattr(tree_module, "_CUT", 2)
    monkeypatch.setattr(tree_module, "_MAX_CHILDREN", 3)
    monkeypatch.setattr(tree_module, "_MAX_WEIGHT", 256 * 8)
    monkeypatch.setattr(tree_module, "_MAX_LEVEL", 40)


class Pages:
    """Stores pages in memory. A page's location follows from its bytes and ``salt``, so equal bytes lie at one place."""

    def __init__(self, salt: bytes = b"") -> None:
        self.salt = salt
        self.data: dict[bytes, bytes] = {}
        self.stored: list[bytes] = []
        self.loaded: list[bytes] = []
        self.tree = Tree(self.load)

    def store(self, data: bytes) -> Page:
        id = blake3(data).digest()
        self.data[id] = data
        self.stored.append(id)
        return Page(id, Extent(b"p" + blake3(id + self.salt).digest()[:16], 0, len(data)))

    def load(self, page: Page) -> bytes:
        self.loaded.append(page.id)
        return self.data[page.id]

    def build(self, model: Model) -> Dir:
        return self.tree.update(None, ((name, self.entry(model[name])) for name in sorted(model)), self.store)

    def entry(self, node: Entry | Model) -> Entry:
        return self.build(node) if isinstance(node, dict) else node

    def update(self, base: Dir, old: Model, new: Model) -> Dir:
        """``base``, which is ``old``, made ``new`` by the changes alone, directory by directory."""

        def changes() -> Iterator[tuple[str, Entry | None]]:
            for name in sorted(old.keys() | new.keys()):
                before, after = old.get(name), new.get(name)
                if after is None:
                    yield name, None
                elif isinstance(before, dict) and isinstance(after, dict):
                    below = self.tree.lookup(base, name)
                    assert isinstance(below, Dir)
                    yield name, self.update(below, before, after)
                elif before != after:
                    yield name, self.entry(after)

        return self.tree.update(base, changes(), self.store)


def walked(model: Model, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in sorted(model):
        node = model[name]
        yield prefix + name, dict if isinstance(node, dict) else identity(named(node, name))
        if isinstance(node, dict):
            yield from walked(node, f"{prefix}{name}/")


def shown(walk: Iterator[tuple[str, Entry]]) -> list[tuple[str, Any]]:
    return [(path, dict if isinstance(entry, Dir) else identity(entry)) for path, entry in walk]


def totals(model: Model) -> tuple[int, int, int]:
    found = (0, 0, 0)
    for node in model.values():
        if isinstance(node, dict):
            add = totals(node)
        elif isinstance(node, Symlink):
            add = (0, 0, 0)
        else:
            add = (max(node.size, 0), 1, int(isinstance(node, Ref)))
        found = (found[0] + add[0], found[1] + add[1], found[2] + add[2])
    return found


def file(number: int, executable: bool = False) -> File:
    return File("", number, executable, blake3(b"%d" % number).digest(), (Extent(b"p" + bytes(16), number, number),))


# Names that tell orders apart: "a-b" < "a/x" < "a0", and beyond the first plane, where UTF-16 would sort otherwise.
NAMES = st.one_of(
    st.sampled_from(["a", "a-", "a-b", "a.b", "a0", "ab", "b", "A", " ", "\t", "\n", "é", "e\u0301", "\uffff", "\U0001f600"]),
    st.text("ab-", min_size=1, max_size=4),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=12).filter(
        lambda name: name not in (".", "..") and len(name.encode()) <= 255
    ),
    st.sampled_from(["x" * 255, "é" * 127, "x" * 254 + "y", "\U0001f600" * 63]),
)
LEAVES = st.one_of(
    st.builds(file, st.integers(0, 5), st.booleans()),
    st.builds(Symlink, st.just(""), st.text("ab/.", min_size=1, max_size=5)),
    st.builds(
        Ref,
        st.just(""),
        st.sampled_from(["s3://b/k", "https://h/x"]),
        st.sampled_from(["etag", "other"]),
        st.integers(-1, 5),
        extra=st.dictionaries(st.sampled_from(["etag", "versionID"]), st.one_of(st.integers(0, 3), st.text("ab", max_size=2))),
    ),
)
FOLDERS: st.SearchStrategy[Model] = st.recursive(
    st.dictionaries(NAMES, LEAVES, max_size=10),
    lambda below: st.dictionaries(NAMES, st.one_of(LEAVES, below), max_size=8),
    max_leaves=3,
)


@few
@given(FOLDERS)
def test_a_tree_is_what_was_put_into_it(model: Model) -> None:
    pages = Pages()
    root = pages.build(model)
    assert shown(pages.tree.walk(root)) == list(walked(model))
    assert (root.count, root.size, root.files, root.links) == (len(model), *totals(model))
    for name in [*model, "", "a", "aa", "zz", "\U0010ffff"]:
        found = pages.tree.lookup(root, name)
        assert (found is not None) == (name in model)
        if found is not None:
            assert found.name == name
    for path, entry in pages.tree.walk(root):
        assert pages.tree.resolve(root, path) == entry
    assert pages.tree.resolve(root, "") == root
    assert pages.tree.resolve(root, "a/none/at/all") is None


@few
@given(FOLDERS, NAMES)
def test_listing_goes_on_after_any_name(model: Model, after: str) -> None:
    pages = Pages()
    root = pages.build(model)
    for start in (after, "", *model):
        assert [entry.name for entry in pages.tree.entries(root, start)] == [name for name in sorted(model) if name > start]


@few
@given(FOLDERS)
def test_the_order_of_manifests_is_that_of_whole_paths(model: Model) -> None:
    pages = Pages()
    found = [path for path, _ in pages.tree.listing(pages.build(model))]
    leaves = {path for path, node in walked(model) if node is not dict and node[0] != 2}
    assert found == sorted(leaves, key=lambda path: path.encode())


@few
@given(FOLDERS, FOLDERS)
def test_an_update_is_what_building_anew_would_be(old: Model, new: Model) -> None:
    """The same digest and, as equal bytes lie at equal places here, the very same pages."""
    pages, fresh = Pages(), Pages()
    root = pages.build(old)
    assert pages.update(root, old, new) == fresh.build(new)


@few
@given(FOLDERS, st.lists(st.lists(st.tuples(NAMES, st.one_of(st.none(), LEAVES)), max_size=6), max_size=8))
def test_history_leaves_no_trace(model: Model, steps: list[list[tuple[str, Entry | None]]]) -> None:
    pages = Pages()
    root = pages.build(model)
    for step in steps:
        changes = dict(step)
        root = pages.tree.update(root, sorted(changes.items()), pages.store)
        model = {name: node for name, node in {**model, **changes}.items() if node is not None}
        assert root == Pages().build(model)


@few
@given(FOLDERS, FOLDERS)
def test_a_twin_changes_nothing_but_what_is_stored(old: Model, new: Model) -> None:
    pages = Pages()
    twin = pages.build(old)
    pages.stored.clear()
    update = DirUpdate(pages.tree, None, pages.store, twin)
    for name in sorted(new):
        node = new[name]
        below = pages.tree.lookup(twin, name)
        if isinstance(node, dict):
            inner = DirUpdate(pages.tree, None, pages.store, below if isinstance(below, Dir) else None)
            for inside in sorted(node):
                inner.change(inside, pages.entry(node[inside]))
            update.change(name, inner.finish())
        else:
            update.change(name, node)
    assert update.finish() == Pages().build(new)


@few
@given(FOLDERS)
def test_what_is_the_same_is_not_stored_again(model: Model) -> None:
    pages = Pages()
    root = pages.build(model)
    pages.stored.clear()
    assert pages.tree.update(root, [], pages.store) == root
    assert pages.update(root, model, model) == root
    touched = {name: pages.entry(node) for name, node in model.items() if not isinstance(node, dict)}
    assert pages.tree.update(root, sorted(touched.items()), pages.store) == root
    assert pages.tree.update(root, [("not there", None)], pages.store) == root if "not there" not in model else True
    update = DirUpdate(pages.tree, None, pages.store, root)
    for entry in list(pages.tree.entries(root)):
        update.change(entry.name, entry)
    assert update.finish() == root
    assert pages.stored == []


def differences(old: Model, new: Model, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        both = isinstance(before, dict) and isinstance(after, dict)
        told = [None if it is None else dict if isinstance(it, dict) else identity(named(it, name)) for it in (before, after)]
        if not both and told[0] != told[1]:
            yield prefix + name, told[0], told[1]
        below = (before if isinstance(before, dict) else {}, after if isinstance(after, dict) else {})
        yield from differences(*below, f"{prefix}{name}/")


@few
@given(FOLDERS, FOLDERS)
def test_a_diff_is_what_differs(old: Model, new: Model) -> None:
    pages = Pages()
    first, second = pages.build(old), pages.build(new)

    def told(entry: Entry | None) -> Any:
        return None if entry is None else dict if isinstance(entry, Dir) else identity(entry)

    found = [(path, told(before), told(after)) for path, before, after in pages.tree.diff(first, second)]
    assert found == list(differences(old, new))
    assert (first.digest == second.digest) == (list(walked(old)) == list(walked(new)))


@few
@given(FOLDERS)
def test_digests_do_not_depend_on_where_things_lie(model: Model) -> None:
    here, there = Pages(), Pages(b"elsewhere")
    first, second = here.build(model), there.build(model)
    assert first.digest == second.digest
    assert first.page == second.page or first.page is None or first.page.extent != second.page.extent
    both = Tree(lambda page: here.data.get(page.id) or there.data[page.id])
    assert list(both.diff(first, second)) == []


@few
@given(FOLDERS, FOLDERS)
def test_equal_digests_mean_equal_trees(one: Model, two: Model) -> None:
    pages = Pages()
    same = list(walked(one)) == list(walked(two))
    assert (pages.build(one).digest == pages.build(two).digest) == same


@few
@given(FOLDERS)
def test_every_page_is_found_once(model: Model) -> None:
    pages = Pages()
    root = pages.build(model)
    seen: set[Page] = set()
    found = list(pages.tree.pages(root, seen))
    assert {page.id for page, _ in found} == set(pages.data) == {page.id for page in seen}
    assert len(found) == len(seen)
    assert list(pages.tree.pages(root, seen)) == []
    files = {entry.id for _, entries in found for entry in entries if isinstance(entry, File)}
    assert files == {entry.id for _, entry in pages.tree.walk(root) if isinstance(entry, File)}
    slim = dict(pages.tree.content_ids(root))
    assert slim.keys() == {page for page, entries in found if entries}
    for page, entries in found:
        for place, entry in enumerate(entries):
            assert slim[page][place] == (entry.id if isinstance(entry, File) else b"")
            assert pages.tree.entry_at(page, place) == entry


def test_a_large_directory_has_several_levels_of_index() -> None:
    pages = Pages()
    model: Model = {f"{number:05d}": file(number % 3) for number in range(3000)}
    root = pages.build(model)
    assert root.page is not None
    top = decode_page(pages.data[root.page.id], "top")
    assert top.level >= 3
    assert shown(pages.tree.walk(root)) == list(walked(model))
    pages.loaded.clear()
    fresh = Tree(pages.load)
    assert fresh.lookup(root, "01500") == named(file(1500 % 3), "01500")
    assert len(pages.loaded) == top.level + 1


def test_one_change_of_many_stores_a_page_a_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "_CUT", 20)
    monkeypatch.setattr(tree_module, "_MAX_CHILDREN", 30)
    monkeypatch.setattr(tree_module, "_MAX_WEIGHT", 256 * 100)
    pages = Pages()
    model: Model = {f"{number:05d}": file(number % 3) for number in range(5000)}
    root = pages.build(model)
    for name, entry in (("02500", file(99)), ("02500", None), ("02500x", file(1)), ("", None)):
        if not name:
            continue
        pages.stored.clear()
        pages.tree.update(root, [(name, entry)], pages.store)
        assert len(pages.stored) <= 8, "the page, the one it runs over into, and the indexes above"


def test_looking_at_what_differs_reads_only_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "_MAX_CHILDREN", 30)
    monkeypatch.setattr(tree_module, "_CUT", 5)
    pages = Pages()
    model: Model = {f"d{number:03d}": {"x": file(number), "y": file(1)} for number in range(500)}
    root = pages.build(model)
    model["d250"] = {"x": file(7), "y": file(1)}
    other = pages.build(model)
    fresh = Tree(pages.load)
    pages.loaded.clear()
    assert [path for path, _, _ in fresh.diff(root, other)] == ["d250/x"]
    leaves = sum(1 for _ in fresh.children(root))
    indexes = sum(1 for _ in fresh.index_pages(root))
    assert len(pages.loaded) <= 2 * indexes + 8 < leaves


@pytest.mark.parametrize("changes", [["b", "a"], ["a", "a"], ["a", "b", "b"], ["é", "z"]])
def test_changes_out_of_order_are_a_mistake(changes: list[str]) -> None:
    pages = Pages()
    for base in (None, pages.build({"a": file(1), "c": file(2), "q": file(3)})):
        with pytest.raises(ValueError, match="comes after"):
            pages.tree.update(base, [(name, file(1)) for name in changes], pages.store)


def test_what_entries_are_decides_the_digest() -> None:
    """Each of these differs from each other one."""
    pages = Pages()
    ref = Ref("", "s3://b/k", "etag", 5)
    variants: list[Model] = [
        {},
        {"a": file(1)},
        {"b": file(1)},
        {"a": file(2)},
        {"a": file(1, True)},
        {"a": {}},
        {"a": {"a": file(1)}},
        {"a": Symlink("", "x")},
        {"a": Symlink("", "y")},
        {"a": ref},
        {"a": msgspec.structs.replace(ref, uri="s3://b/l")},
        {"a": msgspec.structs.replace(ref, digest="other")},
        {"a": msgspec.structs.replace(ref, extra={"etag": "1"})},
        {"a": msgspec.structs.replace(ref, extra={"etag": 1})},
        {"a": msgspec.structs.replace(ref, executable=True)},
        {"a": file(1), "b": file(1)},
    ]
    digests = [pages.build(model).digest for model in variants]
    assert len(set(digests)) == len(digests)
    assert digests[0] == EMPTY.digest


def test_locations_and_other_digests_do_not_count() -> None:
    pages = Pages()
    plain = file(1)
    moved = msgspec.structs.replace(plain, extents=(Extent(b"b" + bytes(32), 9, 1),), algorithm="MD5", checksum="x")
    assert pages.build({"a": plain}).digest == pages.build({"a": moved}).digest
    assert weight(named(plain, "a")) == weight(named(moved, "a")), "or the same directory would be cut otherwise"


# Bounds


@pytest.fixture
def real_pages(small_pages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in REAL.items():
        monkeypatch.setattr(tree_module, name, value)


ENTRIES: list[Callable[[int], Entry]] = [
    lambda n: File(
        f"{n:08d}" + "\U0001f600" * 61,
        1 << 40,
        True,
        bytes(32),
        (Extent(b"b" + bytes(32), 1 << 61, 1 << 61),),
        Extent(b"p" + bytes(16), 1 << 61, 1 << 40),
        "XXH128",
        "x" * 24,
        Extent(b"p" + bytes(16), 1 << 61, 1 << 40),
    ),
    lambda n: Symlink(f"{n:08d}", "\U0001f600" * 4000),
    lambda n: Ref(f"{n:08d}", "s3://" + "é" * 30_000, "e" * 100, 1 << 40, True, {f"{k}": k for k in range(500)}, bytes(32)),
    lambda n: Dir(f"{n:08d}", bytes(32), Page(bytes(32), Extent(b"p" + bytes(16), 1 << 61, 1 << 22)), *[1 << 40] * 4),
]


@pytest.mark.parametrize("make", ENTRIES)
@pytest.mark.usefixtures("real_pages")
def test_no_page_of_ours_is_one_we_refuse_to_read(make: Callable[[int], Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "_ends_page", lambda name, level: False)  # as long as pages ever get
    sizes: list[int] = []

    def store(data: bytes) -> Page:
        sizes.append(len(data))
        return Page(blake3(data).digest(), Extent(b"p" + bytes(16), 0, len(data)))

    builder = tree_module.DirBuilder(store)
    entry = make(0)
    for number in range(2 * (tree_module._MAX_WEIGHT // weight(entry) + 2)):
        builder.add(named(entry, make(number).name))
        if len(sizes) == 1:
            break
    assert 0 < sizes[0] < MAX_PAGE_BYTES // 2


@pytest.mark.usefixtures("real_pages")
def test_entries_weigh_at_least_what_they_take() -> None:
    """So that the weight at which a page ends bounds its bytes. (Twice as much, for many tiny ``extra`` values.)"""
    for make in (ENTRIES[0], ENTRIES[1], ENTRIES[3]):
        assert len(msgspec.msgpack.encode(make(1))) <= weight(make(1))
    assert len(msgspec.msgpack.encode(ENTRIES[2](1))) <= 2 * weight(ENTRIES[2](1))


@pytest.mark.usefixtures("real_pages")
def test_memory_of_the_page_cache_is_bounded() -> None:
    pages = Pages()
    model: Model = {f"{number:06d}": file(number % 7) for number in range(40_000)}
    root = pages.build(model)
    tree = Tree(pages.load, cache_bytes=5 << 20)
    for _ in range(2):
        assert sum(1 for _ in tree.entries(root)) == 40_000
    assert tree._pages.currsize <= 5 << 20
    assert len(tree._pages) > 2
    none = Tree(pages.load, cache_bytes=0)
    assert none.lookup(root, "000001") is not None
    assert len(none._pages) == 0


@pytest.mark.usefixtures("real_pages")
def test_updates_need_memory_for_pages_not_for_directories() -> None:
    """What is given in order is stored as it comes."""
    pages = Pages()
    stored_when_half_done = []

    def changes() -> Iterator[tuple[str, Entry | None]]:
        for number in range(20_000):
            if number == 15_000:
                stored_when_half_done.append(len(pages.stored))
            yield f"{number:06d}", file(1)

    base = pages.tree.update(None, changes(), pages.store)
    pages.stored.clear()
    pages.tree.update(base, ((f"{number:06d}", file(2)) for number in range(20_000, 40_000)), pages.store)
    assert stored_when_half_done[0] > 2


# What pages say is not believed


def _leaf(*names: str) -> bytes:
    return msgspec.msgpack.encode([0, 1, [[2, name, "target"] for name in names]])


def _index(pages: Pages, level: int, *children: tuple[str, bytes]) -> bytes:
    listed = [[first, bytes(32), pages.store(data), 1, 1, 1, 1] for first, data in children]
    return msgspec.msgpack.encode([1, 1, level, listed])


def _root(pages: Pages, data: bytes) -> Dir:
    return Dir("", bytes(32), pages.store(data), 1, 1, 1, 1)


BAD_NAMES = ["", ".", "..", "a/b", "/", "/etc/passwd", "../x", "a\0b", "x" * 256, "é" * 128, "\U0001f600" * 64]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_lead_elsewhere_make_a_page_unreadable(name: str) -> None:
    pages = Pages()
    for data in (_leaf(name), _leaf("0", name), _leaf(*sorted(["0", name, "~"])), _index(pages, 1, (name, _leaf("a")))):
        with pytest.raises(IntegrityError, match="name"):
            list(pages.tree.entries(_root(pages, data)))
        with pytest.raises(IntegrityError, match="name"):
            pages.tree.lookup(_root(pages, data), "a")


@pytest.mark.parametrize("names", [("b", "a"), ("a", "a"), ("a", "c", "b"), ()])
def test_pages_out_of_order_repeating_or_empty_are_unreadable(names: tuple[str, ...]) -> None:
    pages = Pages()
    broken = [_leaf(*names), _index(pages, 1, *((name, _leaf(name)) for name in names))]
    for data in broken:
        with pytest.raises(IntegrityError, match=r"name|decoded"):
            list(pages.tree.entries(_root(pages, data)))


def test_pages_that_are_not_where_their_names_belong() -> None:
    pages = Pages()
    wrong_first = _index(pages, 1, ("a", _leaf("b")))
    beyond = _index(pages, 1, ("a", _leaf("a", "c")), ("b", _leaf("b")))
    again = _index(pages, 1, ("a", _leaf("a", "b")), ("b", _leaf("b")))
    deep = _index(
        pages, 2, ("a", _index(pages, 1, ("a", _leaf("a")), ("c", _leaf("c")))), ("b", _index(pages, 1, ("b", _leaf("b"))))
    )
    for data in (wrong_first, beyond, again, deep):
        root = _root(pages, data)
        with pytest.raises(IntegrityError, match="belong"):
            list(pages.tree.entries(root))
        with pytest.raises(IntegrityError, match="belong"):
            pages.tree.update(root, [("aa", file(1)), ("bb", file(1)), ("d", file(1))], pages.store)
    with pytest.raises(IntegrityError, match="belong"):
        pages.tree.lookup(_root(pages, wrong_first), "b")


def test_indexes_that_do_not_get_lower_end() -> None:
    pages = Pages()
    same = _index(pages, 1, ("a", _index(pages, 1, ("a", _leaf("a")))))
    for data in (
        same,
        _index(pages, 0, ("a", _leaf("a"))),
        _index(pages, -1, ("a", _leaf("a"))),
        _index(pages, 41, ("a", _leaf("a"))),
    ):
        root = _root(pages, data)
        for use in (
            lambda root=root: list(pages.tree.entries(root)),
            lambda root=root: pages.tree.lookup(root, "a"),
            lambda root=root: list(pages.tree.pages(root, set())),
        ):
            with pytest.raises(IntegrityError):
                use()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc0",
        b"\x93\x00\x01",
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        msgspec.msgpack.encode([0, 1, [[9, "a"]]]),
        msgspec.msgpack.encode([2, 1, []]),
        msgspec.msgpack.encode([0, 2, []]),
        msgspec.msgpack.encode([0, 1, [[0, "a", -1, False, bytes(32)]]]),
        msgspec.msgpack.encode([0, 1, [[0, "a", 1 << 63, False, bytes(32)]]]),
        msgspec.msgpack.encode([0, 1, [[0, "a", 1, False, bytes(31)]]]),
        msgspec.msgpack.encode([0, 1, [[1, "a", bytes(32), None, -1, 0, 0, 0]]]),
        b"\x93\x00\x01\x91\x93\x02\xa1\xff\xa1x",
        msgspec.msgpack.encode([0, 1, [[2, "a", "x"]]]) + b"\x00",
    ],
)
def test_bytes_that_are_no_page(data: bytes) -> None:
    pages = Pages()
    root = _root(pages, data)
    for use in (lambda: list(pages.tree.entries(root)), lambda: list(pages.tree.pages(root, set()))):
        with pytest.raises(IntegrityError, match="page"):
            use()


@pytest.mark.parametrize("data", [b"", b"\x91" * 100_000, msgspec.msgpack.encode([0, 2, []]), _leaf("a") + b"\x00"])
def test_a_search_for_contents_meets_no_page_either(data: bytes) -> None:
    pages = Pages()
    with pytest.raises(IntegrityError, match="page"):
        list(pages.tree.content_ids(_root(pages, data)))


@pytest.mark.parametrize("length", [0, MAX_PAGE_BYTES + 1, 1 << 62])
def test_a_page_of_impossible_length_is_not_even_read(length: int) -> None:
    pages = Pages()
    root = Dir("", bytes(32), Page(bytes(32), Extent(b"p" + bytes(16), 0, length)), 1, 1, 1, 1)
    with pytest.raises(IntegrityError, match="claims"):
        list(pages.tree.entries(root))
    assert pages.loaded == []


def test_totals_that_cannot_be_are_refused() -> None:
    pages = Pages()
    most = (1 << 63) - 1
    huge = Dir("", bytes(32), Page(bytes(32), Extent(b"p" + bytes(16), 0, 1)), most, most, most, most)
    with pytest.raises(IntegrityError, match="cannot be"):
        pages.build({"a": huge, "b": huge})


def test_a_tree_with_pages_beside_it() -> None:
    pages, other = Pages(), Pages()
    root = other.build({"a": file(1)})
    assert pages.tree.beside(other.data).lookup(root, "a") is not None
