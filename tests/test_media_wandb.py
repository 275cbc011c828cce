"""media/ and the real ``wandb`` client: the same bytes, and each reads what the other wrote, for all twelve types."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from wandb_offline import offline, reading, tree, written  # noqa: F401 - a fixture

import artifactfs as afs
from artifactfs import media

np = pytest.importorskip("numpy")
pd = pytest.importorskip("pandas")
for needed in ("PIL", "soundfile", "moviepy", "bokeh", "imageio_ffmpeg"):
    pytest.importorskip(needed)

PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
CLASSES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
LABELS = {1: "cat", 2: "dog"}
BOX = {
    "position": {"minX": 0.1, "maxX": 0.2, "minY": 0.3, "maxY": 0.4},
    "class_id": 1,
    "scores": {"acc": 0.5},
    "box_caption": "b",
}
SOUND = np.sin(np.arange(800) / 9.0)
FILM = np.random.default_rng(0).integers(0, 255, (4, 3, 16, 16), dtype=np.uint8)
POINTS = np.random.default_rng(0).random((3, 6))


@pytest.fixture(autouse=True)
def workplace(desk: Path) -> Path:
    return desk


class Library:
    """One of the two packages, with all classes in one place."""

    def __init__(self, package: Any) -> None:
        self._places = (package, getattr(package, "data_types", package))

    def __getattr__(self, name: str) -> Any:
        return next(getattr(place, name) for place in self._places if hasattr(place, name))


def build(lib: Any, artifact: Any, folder: Path) -> Any:
    """An artifact with all twelve types, and tables of everything that a table may hold."""

    def image(shift: int = 0) -> Any:
        return lib.Image(
            PIXELS + np.uint8(shift),
            caption="c",
            grouping=3,
            classes=CLASSES,
            boxes={"p": {"box_data": [BOX], "class_labels": LABELS}},
            masks={"m": {"mask_data": np.array([[1, 2], [2, 1]]), "class_labels": LABELS}},
        )

    user = folder / "user.file"
    user.mkdir(parents=True, exist_ok=True)
    (user / "page.html").write_text("<p>é</p>")
    (user / "cloud.pts.json").write_text("[[1,2,3]]")
    frame = pd.DataFrame({"a": [1, 2], "b": ["x", "y"], "c": pd.to_datetime(["2020-01-01", "2021-01-01"]), "d": [1.5, None]})
    cells = {
        "string": ["é", None],
        "number": [1, 2.5],
        "boolean": [True, False],
        "list": [[1, 2], [3, 4]],
        "dict": [{"k": 1, "z": "q"}, {"k": 2, "z": "r"}],
        "array": [np.ones((2, 2)), np.zeros((2, 2))],
        "embedding": [np.ones(3), np.zeros(3)],
        "long": [np.ones(151), np.zeros(151)],
        "time": [datetime.datetime(2020, 1, 2, 3, 4, 5), datetime.datetime(2021, 1, 2)],
        "date": [datetime.date(2020, 1, 2), None],
        "nan": [float("nan"), 3.0],
        "image": [image(), image(1)],
        "audio": [lib.Audio(SOUND, 8000, caption="a"), lib.Audio(SOUND, 16000, caption="b")],
        "html": [lib.Html("<b>x</b>"), None],
        "nothing": [None, None],
        "numpy": [np.int64(1), np.float32(2)],
        "table": [lib.Table(columns=["q"], data=[[1]]), lib.Table(columns=["q"], data=[[2]])],
    }
    ids = lib.Classes(CLASSES)
    key = lib.Table(columns=["id", "v"], data=[["a", 1], ["b", 2]])
    key.set_pk("id")
    foreign = lib.Table(columns=["id", "x"], data=[["a", 5]])
    foreign.set_fk("id", key, "id")
    pair = [lib.Table(columns=["id", name], data=[[1, 2]]) for name in ("a", "b")]
    objects = {
        "image": image(),
        "plain": lib.Image(PIXELS[..., 0]),
        "jpg": lib.Image(PIXELS, file_type="jpg"),
        "table": lib.Table(columns=[*cells], data=[list(row) for row in zip(*cells.values(), strict=True)]),
        "ids": lib.Table(columns=["c", "i"], data=[[1, 2], [2, None]], dtype=[ids.get_type(), int]),
        "mixed": lib.Table(columns=["u"], data=[["a"], [1]], allow_mixed_types=True),
        "mutable": lib.Table(columns=["u"], data=[[float("inf")]], log_mode="MUTABLE"),
        "frame": lib.Table(dataframe=frame),
        "numpy": lib.Table(columns=["a", "b"], data=np.arange(4).reshape(2, 2)),
        "foreign": foreign,
        "index": lib.Table(columns=["ix"], data=[[key.index_ref(1)]]),
        "joined": lib.JoinedTable(*pair, "id"),
        "parts/1": lib.Table(columns=["a"], data=[[1]]),
        "parts/2": lib.Table(columns=["a"], data=[[2]]),
        "parted": lib.PartitionedTable("parts"),
        "classes": lib.Classes(CLASSES[:1]),
        "mask": lib.ImageMask({"mask_data": np.array([[1, 2], [2, 127]])}, "k"),
        "boxes": lib.BoundingBoxes2D(
            {"box_data": [{"position": {"middle": [1, 2], "width": 3, "height": 4}, "class_id": 1, "domain": "pixel"}]}, "k"
        ),
        "audio": lib.Audio(SOUND, 8000, caption="hi"),
        "gif": lib.Video(FILM, fps=4, format="gif", caption="film"),
        "html": lib.Html("<html><body>hé</body></html>"),
        "page": lib.Html(str(user / "page.html"), inject=False),
        "cloud": lib.Object3D(POINTS),
        "scene": lib.Object3D.from_point_cloud([[0, 1, 2]], [{"corners": [[0, 0, 0]] * 8, "label": "x", "color": [1, 2, 3]}]),
        "file": lib.Object3D(str(user / "cloud.pts.json"), caption="f"),
        "plot": lib.Bokeh(plot()),
    }
    for name, obj in objects.items():
        artifact.add(obj, name)
    return artifact


def plot() -> Any:
    figure = pytest.importorskip("bokeh.plotting").figure()
    figure.line([1, 2], [3, 4])
    return figure


@pytest.fixture
def both(offline: Any, tmp_path: Path) -> tuple[Path, Path]:  # noqa: F811
    """The files of the same objects, written by the real client and by us."""
    theirs = build(Library(offline), offline.Artifact("theirs", "dataset"), tmp_path)
    ours = build(Library(afs), afs.Artifact("ours", "dataset", digest_algorithm="MD5"), tmp_path)
    with afs.init() as run:
        run.log_artifact(ours).wait()
    return written(theirs, tmp_path / "theirs"), Path(ours.download(str(tmp_path / "ours")))


NAMES = ("image", "plain", "jpg", "table", "ids", "mixed", "mutable", "frame", "numpy", "foreign", "index", "joined", "parts/1",
         "parted", "classes", "mask", "boxes", "audio", "gif", "html", "page", "cloud", "scene", "file", "plot")  # fmt: skip


def test_the_two_clients(both: tuple[Path, Path], offline: Any) -> None:  # noqa: F811
    the_same_bytes_are_stored(*both)
    theirs, ours = both
    known, read = reading(theirs), reading(ours)
    for name in NAMES:
        compare(name, read.get(name), known.get(name))  # the real client reads ours
    artifact = afs.Artifact("imported", "dataset")
    artifact.add_dir(theirs)
    with afs.init() as run:
        run.log_artifact(artifact).wait()
        mine = run.use_artifact("ours:latest")
    for name in NAMES:
        same = artifact.get(name) == mine.get(name)
        assert same or name in ("joined", "plot"), name  # we read theirs
    first, second = artifact.get("joined"), mine.get("joined")
    assert (first.table1, first.table2, first.join_key) == (second.table1, second.table2, second.join_key)
    assert [*artifact.get("parted").iterrows()] == [(0, [1]), (1, [2])]
    assert len(artifact.get("plot").b_obj.roots) == 1
    row = artifact.get("table").data[0]
    assert row[5].tolist() == [[1, 1], [1, 1]] and row[8] == datetime.datetime(2020, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    assert (row[11].to_numpy() == PIXELS).all() and row[12].sample_rate == 8000
    again = afs.Artifact("again", "dataset", digest_algorithm="MD5")
    for name in NAMES:
        again.add(artifact.get(name), name)
    with afs.init() as run:
        run.log_artifact(again).wait()
    stored = tree(Path(again.download(str(ours.parent / "again"))))
    expected = tree(ours)
    assert {
        path for path, data in stored.items() if expected.get(path) != data and "plot" not in path and "bokeh" not in path
    } == set()


def the_same_bytes_are_stored(theirs: Path, ours: Path) -> None:
    """But for names that the real client makes of memory addresses, and ids that Bokeh counts."""
    expected, found = tree(theirs), tree(ours)

    def rest(files: dict[str, bytes]) -> dict[str, bytes]:
        return {path: data for path, data in files.items() if not re.search(r"bokeh|^joined|^t[12]_", path)}

    assert rest(found).keys() == rest(expected).keys()
    assert [path for path, data in rest(expected).items() if rest(found)[path] != data] == []
    tables = [[data for path, data in files.items() if re.match(r"t[12]_", path)] for files in (expected, found)]
    assert tables[0] == tables[1] and len(tables[0]) == 2
    assert json.loads(found["joined.joined-table.json"]).keys() == json.loads(expected["joined.joined-table.json"]).keys()
    plots = [
        json.loads(data)["roots"][0]["attributes"].keys()
        for files in (expected, found)
        for path, data in files.items()
        if path.startswith("media/bokeh")
    ]
    assert len(plots) == 2 and plots[0] == plots[1]


def compare(name: str, found: Any, expected: Any) -> None:
    """Two objects of the real client."""
    assert type(found) is type(expected) and found is not None, name
    if name == "joined":
        found._eq_debug(expected, should_assert=True)
    elif name == "parted":
        assert sorted(row for _, row in found.iterrows()) == [[1], [2]]  # its order is that of a thread pool
    elif name == "boxes":
        assert found._val == expected._val
    elif name == "plot":
        assert len(found.b_obj.roots) == 1
    elif name in ("table", "foreign", "index"):
        assert found.columns == expected.columns and len(found.data) == len(expected.data)
        for mine, theirs in zip(found.data, expected.data, strict=True):
            assert all(np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in zip(mine, theirs, strict=True))
    else:
        assert found == expected, name


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
NUMBERS = (
    st.integers()
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.integers(-9, 9).map(np.int32)
    | st.floats(width=32).map(np.float32)
)
TIMES = (
    st.datetimes(datetime.datetime(1999, 1, 1), datetime.datetime(2030, 1, 1)).map(lambda time: time.replace(microsecond=0))
    | st.dates()
)
COLUMNS = (
    NUMBERS,
    TEXT,
    st.booleans(),
    TIMES,
    st.none(),
    st.lists(st.integers(), min_size=2, max_size=2),
    st.lists(TEXT | st.none(), min_size=3, max_size=3),
    st.fixed_dictionaries({"a": st.integers(), "b": TEXT}),
    st.integers(0, 9).map(lambda value: np.full(3, value)),
    NUMBERS | TEXT,
    NUMBERS | st.none(),
    TIMES | st.none(),
)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[str], list[list[Any]], dict[str, Any]]:
    columns = draw(st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=4))
    names = draw(st.lists(TEXT, min_size=len(columns), max_size=len(columns), unique=True))
    rows = draw(st.lists(st.tuples(*columns).map(list), max_size=4))
    return names, rows, {"optional": draw(st.booleans()), "allow_mixed_types": draw(st.booleans())}


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(tables())
@example((["a"], [[["x", None]], [[None, None]]], {"optional": True, "allow_mixed_types": False}))
def test_any_table_is_stored_the_same(offline: Any, table: Any) -> None:  # noqa: F811
    """The same bytes, or a TypeError from both."""
    names, rows, options = table
    try:
        theirs = offline.Artifact("theirs", "dataset")
        theirs.add(offline.Table(columns=names, data=rows, **options), "it")
    except TypeError:
        with pytest.raises(TypeError):
            afs.Table(columns=names, data=rows, **options)
        return
    _, additions = media.plan(afs.Table(columns=names, data=rows, **options), "it", "MD5", lambda path: None)
    assert json.loads(additions[-1].data) == json.loads(Path(theirs.manifest.entries["it.table.json"].local_path).read_bytes())


CANNOT = {
    "caption": lambda lib: lib.Audio(SOUND, 8000),
    "none": lambda lib: lib.Table(columns=["a"], data=[[np.eye(2)], [None]]),
    "booleans": lambda lib: lib.Table(columns=["a"], data=[[np.array([True, False])]]),
    "nan": lambda lib: lib.Table(columns=["a"], data=[[np.array([1, np.nan])]]),
    "file": lambda lib: lib.Table(columns=["file"], data=[[np.eye(2)]]),
    "pickle": lambda lib: lib.Table(columns=["allow_pickle"], data=[[np.eye(2)]]),
    "folder": lambda lib: lib.Table(columns=["a/b"], data=[[np.eye(2)]]),
    "escape": lambda lib: lib.Table(columns=["../x"], data=[[np.eye(2)]]),
    "names": lambda lib: lib.Table(columns=["a", 1], data=[[1, 2]]),
    "lists": lambda lib: lib.Table(columns=["a"], data=[[[1, "x"]]]),
    "times": lambda lib: lib.Table(columns=["a"], data=[[[datetime.datetime(2020, 1, 1)]]]),
    "document": lambda lib: lib.Bokeh(document()),
}


def document() -> Any:
    made = pytest.importorskip("bokeh.document").Document()
    made.add_root(plot())
    return made


@pytest.mark.parametrize("case", CANNOT)
def test_what_the_real_client_cannot(case: str, offline: Any, tmp_path: Path) -> None:  # noqa: F811
    """It fails to store or to read such an object; we do not, and it reads ours (but for lists of times)."""
    make = CANNOT[case]
    theirs = offline.Artifact("theirs", "dataset")
    with pytest.raises((KeyError, OSError, TypeError, ValueError)):
        theirs.add(make(Library(offline)), "it")
        reading(written(theirs, tmp_path / "theirs")).get("it")
    ours = afs.Artifact("ours", "dataset")
    ours.add(make(Library(afs)), "it")
    with afs.init() as run:
        run.log_artifact(ours).wait()
    found = ours.get("it")
    assert found.get_dataframe().shape[1] if isinstance(found, afs.Table) else found.path
    if case != "times":
        read = reading(Path(ours.download(str(tmp_path / "ours")))).get("it")
        if isinstance(found, afs.Table):
            mine, other = (np.asarray(cell) for table in (found, read) for cell in table.data[0][:1])
            assert np.array_equal(mine, other, equal_nan=mine.dtype.kind == "f")
        else:
            assert read._sha256 == found.sha256
