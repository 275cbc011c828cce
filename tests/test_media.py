"""media/: objects become entries and come back, on a directory and on a bucket; hostile stored forms are refused."""

from __future__ import annotations

import datetime
import decimal
import enum
import io
import json
import math
import re
import secrets
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from http_server import FaultServer

import artifactfs as afs
from artifactfs.errors import (
    ArtifactFinalizedError,
    ArtifactNotLoggedError,
    ConflictError,
    IntegrityError,
    UsageError,
)
from artifactfs.media import arrays, base
from artifactfs.media.table import TableKey

np = pytest.importorskip("numpy")
pd = pytest.importorskip("pandas")
PIL = pytest.importorskip("PIL.Image")
pytest.importorskip("soundfile")
trimesh = pytest.importorskip("trimesh")
plotting = pytest.importorskip("bokeh.plotting")

PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
LABELS = {1: "cat", 2: "dog"}
CLASSES = [{"id": id, "name": name} for id, name in LABELS.items()]
MASK = np.array([[1, 2], [200, 1]])
BOX = {
    "position": {"minX": 0.1, "maxX": 0.2, "minY": 0.3, "maxY": 0.4},
    "class_id": 1,
    "scores": {"acc": 0.5},
    "box_caption": "b",
}


@pytest.fixture(autouse=True)
def workplace(desk: Path) -> Path:
    """Each test runs in a directory and with a store of its own."""
    return desk


def draft(name: str = "media", **more: Any) -> afs.Artifact:
    return afs.Artifact(name, "dataset", **more)


def logged(*objects: tuple[str, Any], name: str = "media", **more: Any) -> afs.Artifact:
    """A version with these objects."""
    artifact = draft(name, **more)
    for at, obj in objects:
        artifact.add(obj, at)
    return log(artifact)


def log(artifact: afs.Artifact) -> afs.Artifact:
    with afs.init() as run:
        return run.log_artifact(artifact).wait()


def stored(files: dict[str, Any]) -> afs.Artifact:
    """A version with these files as somebody else may have written them."""
    artifact = draft("stored")
    for path, content in files.items():
        with artifact.new_file(path, "wb") as file:
            file.write(content if isinstance(content, bytes) else json.dumps(content).encode())
    return log(artifact)


def back(obj: Any) -> Any:
    """The object after it was stored."""
    return logged(("it", obj)).get("it")


def image(**more: Any) -> afs.Image:
    return afs.Image(
        PIXELS,
        caption="c",
        grouping=3,
        classes=CLASSES,
        boxes={"p": {"box_data": [BOX], "class_labels": LABELS}},
        masks={"m": {"mask_data": MASK, "class_labels": LABELS}},
        **more,
    )


def plot() -> Any:
    figure = plotting.figure()
    figure.line([1, 2], [3, 4])
    return figure


@pytest.fixture(params=["directory", "seaweed"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "seaweed":
        bucket = request.getfixturevalue("shared_bucket")
        monkeypatch.setenv("ARTIFACTFS_STORE", bucket.store_url(f"media-{secrets.token_hex(4)}"))


@pytest.mark.usefixtures("store")
def test_all_twelve_come_back() -> None:
    sound = np.sin(np.arange(800) / 9.0)
    film = np.random.default_rng(0).integers(0, 255, (4, 3, 16, 16), dtype=np.uint8)
    points = np.random.default_rng(0).random((5, 6))
    rows = afs.Table(columns=["id", "image"], data=[["a", image()], ["b", None]])
    right = afs.Table(columns=["id", "n"], data=[["b", 2], ["a", 1], ["a", 3]])
    found = logged(
        ("table", rows),
        ("joined", afs.JoinedTable(rows, right, "id")),
        ("parts/1", afs.Table(columns=["a"], data=[[1], [2]])),
        ("parts/2", afs.Table(columns=["a"], data=[[3]])),
        ("parted", afs.PartitionedTable("parts")),
        ("classes", afs.Classes(CLASSES)),
        ("mask", afs.ImageMask({"mask_data": MASK})),
        ("boxes", afs.BoundingBoxes2D({"box_data": [BOX]})),
        ("image", image()),
        ("audio", afs.Audio(sound, 8000, caption="hi")),
        ("video", afs.Video(film, format="gif", fps=5, caption="film")),
        ("page", afs.Html("<html><body>hé</body></html>")),
        ("cloud", afs.Object3D(points, caption="points")),
        ("plot", afs.Bokeh(plot())),
    )

    table = found["table"]
    assert table == rows and table.data[0][1].classes.class_set == CLASSES
    joined = found.get("joined")
    assert [row for _, row in joined.iterrows()] == [["a", image(), "a", 1], ["a", image(), "a", 3], ["b", None, "b", 2]]
    assert [*found.get("parted").iterrows()] == [(0, [1]), (1, [2]), (2, [3])]
    assert found.get("classes") == afs.Classes(CLASSES)
    assert (found.get("mask").to_numpy() == MASK).all()
    assert found.get("boxes").boxes == [BOX]
    one = found.get("image")
    assert one == image() and (one.to_numpy() == PIXELS).all() and (one.width, one.height, one.grouping) == (4, 4, 3)
    assert (one.masks["m"].to_numpy() == MASK).all() and one.boxes["p"].boxes == [BOX]
    audio = found.get("audio")
    assert (audio.sample_rate, audio.duration, audio.caption) == (8000, 0.1, "hi")
    assert np.abs(audio.to_numpy() - sound).max() < 1e-4
    video = found.get("video")
    assert (video.width, video.height, video.caption) == (16, 16, "film") and video.to_numpy().shape == film.shape
    assert found.get("page").html.startswith('<html><head><base target="_blank">') and "hé" in found.get("page").html
    assert (found.get("cloud").to_numpy() == points).all() and found.get("cloud").caption == "points"
    assert len(found.get("plot").b_obj.roots) == 1
    assert found.get("nothing") is None
    assert found.get_entry("table").path == "table.table.json"


@pytest.mark.usefixtures("store")
def test_an_object_of_another_artifact_shares_its_contents(workplace: Path) -> None:
    first = logged(
        ("t", afs.Table(columns=["i"], data=[[image()]])), ("j", afs.JoinedTable(*[afs.Table(["k"], [["x"]])] * 2, "k"))
    )
    second = logged(
        ("t", first.get("t")),
        ("j", first.get("j")),
        ("e", afs.JoinedTable(first.get_entry("t"), "t.table.json", "i")),
        name="second",
    )
    assert not [path for path in workplace.rglob("*") if path.suffix == ".png"]  # nothing was fetched for it
    assert {path: entry.digest for path, entry in first.manifest.entries.items()}.items() <= {
        path: entry.digest for path, entry in second.manifest.entries.items()
    }.items()
    first.delete(delete_aliases=True)
    assert (second.get("t").data[0][0].to_numpy() == PIXELS).all()
    assert second.get("e").table1 == second.get("t")


def test_an_object_of_another_store_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = logged(("i", image())).get("i")
    monkeypatch.setenv("ARTIFACTFS_STORE", str(tmp_path / "other"))
    assert (logged(("i", found)).get("i").to_numpy() == PIXELS).all()


def test_the_same_objects_give_the_same_version() -> None:
    def version() -> afs.Artifact:
        table = afs.Table(columns=["id", "array", "image"], data=[["a", np.ones((2, 2)), image()]])
        table.set_pk("id")
        other = afs.Table(columns=["id"], data=[["a"]])
        other.set_fk("id", table, "id")
        return logged(("t", table), ("f", other), ("j", afs.JoinedTable(table, other, "id")), ("b", afs.Bokeh(plot())))

    first, second = version(), version()
    assert first.version == second.version == "v0"
    assert [path for path in first.manifest.entries if re.fullmatch(r"t1_[0-9a-f]{20}\.table\.json", path)]


def test_add_is_all_or_nothing_and_says_what_is_wrong() -> None:
    artifact = draft()
    with pytest.raises(TypeError, match="Found object of type dict, expected one of: Table,"):
        artifact.add({}, "x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="masks or boxes needs classes"):
        artifact.add(afs.Image(PIXELS, boxes={"p": {"box_data": []}}), "x")
    with pytest.raises(TypeError, match=r"row 1, column 'o': a PosixPath cannot be stored"):
        artifact.add(afs.Table(["i", "o"], [[image(), None], [None, Path("x")]]), "x")
    with pytest.raises(ValueError, match="at most 200000 are stored"):
        artifact.add(_long(), "x")
    with pytest.raises(ValueError, match="leave the artifact's root"):
        artifact.add(image(), "../x")
    assert len(artifact.manifest.entries) == 0
    entry = artifact.add(image(), "x")
    assert (entry.path, artifact.add(image(), "x").path) == ("x.image-file.json",) * 2
    with pytest.raises(ValueError, match="Cannot add the same path twice"):
        artifact.add(afs.Image(PIXELS), "x")
    artifact.add(afs.Image(PIXELS), "x", overwrite=True)
    artifact["y"] = image()
    with pytest.raises(ArtifactNotLoggedError):
        artifact.get("x")
    log(artifact)
    assert artifact["x"].boxes == {} and artifact["y"].boxes
    with pytest.raises(ArtifactFinalizedError):
        artifact.add(image(), "z")


def _long() -> afs.Table:
    table = afs.Table(["a"])
    table.data = [[1]] * 200001
    return table


def test_names_of_entries() -> None:
    table = afs.Table(["a"], [[1]])
    artifact = draft()
    assert artifact.add(table, "dir/mytable.json").path == "dir/mytable.json"
    assert artifact.add(table, "./b//c").path == "b/c.table.json"
    assert artifact.add(afs.JoinedTable(table, table, "a"), "x.table.json").path == "x.table.json.joined-table.json"
    assert artifact.add(table, "media/tables/any").path == artifact.add(table, "media/tables/other").path
    log(artifact)
    for name in ("dir/mytable.json", "b/c", "b/c.table.json"):
        assert artifact.get(name) == table
    assert isinstance(artifact.get("x.table.json"), afs.JoinedTable)
    assert isinstance(artifact.get("x.table.json.joined-table.json"), afs.JoinedTable)


class Colour(enum.Enum):
    RED = 1


UTC = datetime.UTC
CELLS = [
    (1, 1),
    (2.5, 2.5),
    (True, True),
    ("é\n", "é\n"),
    (None, None),
    (math.nan, None),
    (math.inf, math.inf),
    (np.float32(1.5), 1.5),
    (np.float64("nan"), None),
    (np.int64(7), 7),
    (np.bool_(True), True),
    (np.str_("x"), "x"),
    (decimal.Decimal("1.5"), 1.5),
    (b"bytes", "bytes"),
    (Colour.RED, "RED"),
    ([1, None, 2], [1, None, 2]),
    ([1, "a"], [1, "a"]),
    ((1, 2), [1, 2]),
    ({3, 1, 2}, [1, 2, 3]),
    ({"a": {"b": [1]}}, {"a": {"b": [1]}}),
    ({1: "x"}, {"1": "x"}),
    (datetime.datetime(2020, 1, 2, 3, 4, 5, 123000), datetime.datetime(2020, 1, 2, 3, 4, 5, 123000, UTC)),
    (datetime.datetime(1969, 1, 1, tzinfo=UTC), datetime.datetime(1969, 1, 1, tzinfo=UTC)),
    (datetime.date(2020, 1, 2), datetime.datetime(2020, 1, 2, tzinfo=UTC)),
    (np.datetime64("2020-01-02T03:04:05.123456789"), datetime.datetime(2020, 1, 2, 3, 4, 5, 123000, UTC)),
    (pd.Timestamp("2020-01-02"), datetime.datetime(2020, 1, 2, tzinfo=UTC)),
    (pd.NaT, None),
    (pd.NA, None),
    ([datetime.date(2020, 1, 2)], [datetime.datetime(2020, 1, 2, tzinfo=UTC)]),
    ({"t": datetime.date(2020, 1, 2)}, {"t": datetime.datetime(2020, 1, 2, tzinfo=UTC)}),
    (np.array([1.0, 2.0]), [1.0, 2.0]),
]


def test_cells_of_a_table() -> None:
    table = afs.Table(columns=[str(number) for number in range(len(CELLS))], data=[[given for given, _ in CELLS]])
    (row,) = back(table).data
    for got, (given, expected) in zip(row, CELLS, strict=True):
        assert got == expected and type(got) is type(expected), given


@pytest.mark.parametrize("value", [object(), Path("x"), 1j, b"\xff", np.timedelta64(1), {1: 1, "1": 2}, {"_type": "table"}])
def test_cells_that_cannot_be_stored(value: Any) -> None:
    table = afs.Table(columns=["c"], data=[[value]])
    with pytest.raises(UsageError, match="row 0, column 'c': "):
        draft().add(table, "t")


def test_arrays_in_a_table() -> None:
    columns = {
        "square": [np.arange(4).reshape(2, 2), np.ones((2, 2), int)],
        "some": [np.arange(4.0).reshape(2, 2), None],
        "long": [np.arange(151.0), np.ones(151)],
        "short": [np.arange(150.0), np.ones(150)],
        "nan": [np.array([1.0, np.nan]), np.array([1.0, 2.0])],
        "text": [np.array(["a", "bc"]), np.array(["d", "e"])],
        "file": [np.eye(2), np.eye(2)],
        "../up.x": [np.asfortranarray(np.eye(3)), np.eye(3)],
    }
    version = logged(("t", afs.Table([*columns], [*zip(*columns.values(), strict=True)])))
    assert all(path.count("/") == 2 for path in version.manifest.entries if path.endswith(".npz"))
    found = version.get("t")
    for name, expected in columns.items():
        for got, array in zip(found.get_column(name), expected, strict=True):
            assert (array is None and got is None) or np.array_equal(got, array, equal_nan=array.dtype.kind == "f"), name
    assert found.get_column("square", convert_to="numpy").shape == (2, 2, 2)
    again = logged(("t", found), name="again")
    assert again.get_entry("t").digest == version.get_entry("t").digest
    with pytest.raises(ValueError, match="Python objects"):
        draft().add(afs.Table(["o"], [[np.array([[object()]])]]), "t")


def test_pandas_and_numpy_in_and_out() -> None:
    frame = pd.DataFrame(
        {"n": [1, 2], "x": [1.5, None], "s": ["a", "b"], 7: pd.to_datetime(["2020-01-01", "2021-01-01"]), "b": [True, False]}
    )
    for table in (afs.Table(dataframe=frame), afs.Table(data=frame)):
        got = back(table).get_dataframe()
        assert list(got.columns) == list(frame.columns) and got["n"].tolist() == [1, 2] and got["s"].tolist() == ["a", "b"]
        assert got["x"].isna().tolist() == [False, True] and got[7].dt.year.tolist() == [2020, 2021]
    table = afs.Table(columns=["a", "b"], data=np.arange(6).reshape(3, 2))
    assert back(table).data == [[0, 1], [2, 3], [4, 5]]
    assert back(afs.Table(columns=["i"], data=[[image()]])).get_column("i", convert_to="numpy").shape == (1, 4, 4, 3)


def test_types_of_columns() -> None:
    table = afs.Table(columns=["a", "b"], data=[[1, "x"]])
    with pytest.raises(TypeError, match="column 'a' is None or Number, and 'y' is String"):
        table.add_data("y", "x")
    assert table.data == [[1, "x"]]
    with pytest.raises(ValueError, match=r"expects 2 columns: \['a', 'b'\], found 1"):
        table.add_data(1)
    with pytest.raises(TypeError):
        afs.Table(columns=["a"], data=[[None]], optional=False, dtype=int)
    assert back(afs.Table(columns=["a"], data=[[1], ["x"], [None]], allow_mixed_types=True)).data == [[1], ["x"], [None]]
    assert back(afs.Table(columns=["a"], data=[[1], ["x"]], dtype=[[int, str]])).data == [[1], ["x"]]
    classes = afs.Classes(CLASSES)
    labelled = back(afs.Table(columns=["c", "d"], data=[[1, 2]], dtype=[classes, classes.get_type()]))
    with pytest.raises(TypeError):
        labelled.add_data(3, 1)
    labelled.add_data(2, 2)
    for columns, message in ((["a", "a"], "two columns are named 'a'"), ([1, "1"], "two columns"), ([None], "strings or ints")):
        with pytest.raises(ValueError, match=message):
            afs.Table(columns=columns)
    with pytest.raises(ValueError, match="no column 'z'"):
        table.get_column("z")
    with pytest.raises(ValueError, match="log_mode"):
        afs.Table(log_mode="NEVER")


def test_two_sets_of_classes_in_one_artifact() -> None:
    def table(*names: str) -> afs.Table:
        classes = afs.Classes([{"id": id, "name": name} for id, name in enumerate(names)])
        return afs.Table(columns=["c"], data=[[0]], dtype=classes)

    found = logged(("a", table("x", "y")), ("b", table("z")), ("c", table("x", "y")))
    assert [found.get(name)._types[0].members()[0].classes.class_set[0]["name"] for name in "abc"] == ["x", "z", "x"]


def test_columns_are_added_and_computed() -> None:
    table = afs.Table(columns=[], data=[])
    table.add_column("x", [1, 2])
    table.add_column("y", np.array([3, 4]))
    table.add_computed_columns(lambda number, row: {"sum": row["x"] + row["y"], "at": number})
    assert back(table).data == [[1, 3, 4, 0], [2, 4, 6, 1]]
    with pytest.raises(ValueError, match="Expected length 2, found 1"):
        table.add_column("z", [1])
    with pytest.raises(TypeError):
        table.add_column("z", [1, "a"])
    assert table.columns == ["x", "y", "sum", "at"] and all(len(row) == 4 for row in table.data)


def test_keys_link_tables() -> None:
    people = afs.Table(columns=["id", "age"], data=[["ann", 5], ["bob", 6]])
    people.set_pk("id")
    visits = afs.Table(columns=["who", "row"])
    for number, _ in people.iterrows():
        visits.add_data(people.data[number][0], number)
    found = logged(("people", people), ("visits", visits)).get("visits")
    key, index = found.data[1]
    assert isinstance(key, TableKey) and key == "bob" and key.table == people
    assert index.get_row() == {"id": "bob", "age": 6}
    with pytest.raises(ValueError, match="same table"):
        people.set_fk("age", people, "id")
    with pytest.raises(ValueError, match="multiple primary keys"):
        people.set_pk("age")
    other = afs.Table(columns=["k"], data=[["x"]])
    other.set_fk("k", visits, "who")
    visits.add_column("back", ["x", "x"])
    visits.set_fk("back", other, "k")
    with pytest.raises(UsageError, match="refers to itself"):
        draft().add(visits, "v")


def test_an_incremental_table_is_read_as_a_whole() -> None:
    def increment(*rows: list[Any]) -> afs.Table:
        return afs.Table(columns=["n", "a"], data=[*rows], log_mode="INCREMENTAL")

    found = logged(
        ("0-100.loss", increment([1, np.eye(2)])),
        ("10-300.loss", increment([4, np.eye(2)])),
        ("2-200.loss", increment([2, np.ones((2, 2))], [3, np.eye(2)])),
        ("0-100.other", increment([9, np.eye(2)])),
        ("plain", increment([8, np.eye(2)])),
    )
    assert [row[0] for row in found.get("10-300.loss").data] == [1, 2, 3, 4]
    assert found.get("0-100.loss").data[1][1].sum() == 4
    assert [row[0] for row in found.get("plain").data] == [8]


def test_images_of_all_kinds(tmp_path: Path) -> None:
    def pixels(given: Any, **more: Any) -> Any:
        return back(afs.Image(given, **more)).to_numpy()

    assert (pixels(PIXELS[..., 0]) == PIXELS[..., 0]).all()
    assert (pixels(PIXELS[..., :1]) == PIXELS[..., 0]).all()
    assert (pixels(PIXELS[None]) == PIXELS).all()
    assert (pixels(PIXELS.astype(float)) == PIXELS).all()
    assert pixels(np.zeros((2, 3, 4), np.uint8)).shape == (2, 3, 4)
    assert pixels(np.zeros((2, 3, 4), np.uint8), file_type="jpg").shape == (2, 3, 3)
    assert pixels(PIL.new("L", (5, 3))).shape == (3, 5)
    assert back(afs.Image(PIXELS, file_type="bmp")).format == "bmp"
    path = tmp_path / "photo.1.PNG"
    PIL.fromarray(PIXELS).save(path)
    one = logged(("i", afs.Image(path, caption="x")))
    (payload,) = [entry for entry in one.manifest.entries if entry.startswith("media/")]
    assert payload == f"media/images/{one.get('i').sha256[:20]}/photo.1.PNG" and (one.get("i").width, one.get("i").format) == (
        4,
        "PNG",
    )
    copy = afs.Image(one.get("i"), caption="y")
    assert (copy.caption, copy.sha256, one.get("i").caption) == ("y", one.get("i").sha256, "x")
    for wrong, message in (
        (PIXELS.astype(int) * 100, "scale them first"),
        (np.full((2, 2), np.nan), "scale them first"),
        (-1.0 * PIXELS, "scale"),
        (np.zeros((2, 2, 5)), "Un-supported shape"),
        (np.zeros(3), "Un-supported shape"),
    ):
        with pytest.raises(ValueError, match=message):
            afs.Image(wrong)
    (tmp_path / "no.png").write_text("text")
    for path in (tmp_path / "no.png", tmp_path / "missing.png"):
        with pytest.raises(ValueError, match=str(path)):
            afs.Image(path)
    with pytest.raises(ValueError, match="cannot be written as jpg"):
        afs.Image(PIL.new("RGBA", (2, 2)), file_type="jpg")
    with pytest.raises(ValueError, match="file_type must be one of"):
        afs.Image(PIXELS, file_type="exe")


def test_a_file_that_changes_is_not_stored(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(b"sound")
    audio = afs.Audio(path)
    path.write_bytes(b"other sound")
    with pytest.raises(ConflictError, match="has changed since the object was made"):
        draft().add(audio, "a")
    path.unlink()
    with pytest.raises(ConflictError):
        draft().add(audio, "a")


def test_references_of_images_and_sounds() -> None:
    buffer = io.BytesIO()
    PIL.fromarray(PIXELS).save(buffer, "png")
    with FaultServer({"/a.png": buffer.getvalue()}) as server:
        url = server.url("/a.png")
        artifact = draft()
        artifact.add(afs.Image(url), "i")
        artifact.add(afs.Audio(url), "a")
        assert afs.Image(url).image is None
        found = log(artifact).get("i")
        assert (found.to_numpy() == PIXELS).all() and artifact.get("a").path.endswith("/a.png")
        (entry, _) = [entry for entry in artifact.manifest.entries.values() if entry.ref]
        assert entry.ref == url
        again = logged(("i", found), name="again")
        assert [entry.ref for entry in again.manifest.entries.values() if entry.ref] == [url]


@pytest.mark.parametrize("format", ["gif", "mp4", "webm", "ogg"])
def test_videos(format: str) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (5, 1 if format == "gif" else 3, 15, 17), dtype=np.uint8)
    found = back(afs.Video(frames, format=format, fps=10))
    assert found.to_numpy().shape == (5, 3, found.height, found.width) and found.width in (17, 18) and found.height in (15, 16)
    if format == "gif":
        assert back(afs.Video(np.stack([frames] * 3), format=format)).width == 68  # three films and an empty one in a row
    taken = back(afs.Video(io.BytesIO(Path(found.path).read_bytes()), format=format))
    assert taken.sha256 == found.sha256 and back(afs.Video(found.path)).sha256 == found.sha256


def test_what_is_no_video_sound_page_or_cloud(tmp_path: Path) -> None:
    frames = np.zeros((2, 3, 4, 4), np.uint8)
    for make, message in (
        (lambda: afs.Video(frames), "requires a `format`"),
        (lambda: afs.Video(frames, format="avi"), "accepts gif, mp4"),
        (lambda: afs.Video(tmp_path / "x.avi"), "accepts gif"),
        (lambda: afs.Video(frames[0], format="gif"), "4 dimensions"),
        (lambda: afs.Video(frames * 1000.0 + 999, format="gif"), "scale"),
        (lambda: afs.Video("missing.mp4"), "not a file"),
        (lambda: afs.Audio(np.zeros(3)), "sample_rate"),
        (lambda: afs.Audio(np.zeros((2, 2, 2)), 8000), "cannot be written as WAV"),
        (lambda: afs.Html(7), "Html is made of"),
        (lambda: afs.Object3D(np.zeros((2, 5))), "made of n points"),
        (lambda: afs.Object3D({"type": "other"}), "only 'lidar/beta'"),
        (lambda: afs.Object3D("x.txt"), "not compatible"),
        (lambda: afs.Object3D(io.StringIO("[]")), "Must pass file type"),
        (lambda: afs.Bokeh(7), "Bokeh document/model"),
        (lambda: afs.Bokeh("x.json"), r"\.bokeh\.json"),
        (lambda: afs.ImageMask({"mask_data": np.full((2, 2), 256)}), "between 0 and 255"),
        (lambda: afs.ImageMask({"mask_data": np.zeros(2)}), "2D"),
        (lambda: afs.BoundingBoxes2D({"box_data": [{"position": {"minX": 1}}]}), "must contain a position"),
        (lambda: afs.BoundingBoxes2D({"box_data": [{**BOX, "class_id": "x"}]}), "class_id"),
        (lambda: afs.Classes([{"id": 1}]), "'id' and a 'name'"),
        (lambda: afs.JoinedTable("a.table.json", 7, "k"), "table2"),
        (lambda: afs.JoinedTable("a.table.json", "b.table.json", ["k"]), "join_key"),
        (lambda: afs.PartitionedTable("../x"), "root"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            make()  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match="not found in artifact"):
        draft().add(afs.JoinedTable("a.table.json", "a.table.json", "k"), "j")


def test_clouds_of_points(tmp_path: Path) -> None:
    box = {"corners": [[0, 0, 0]] * 8, "label": "x", "color": [1, 2, 3]}
    assert back(afs.Object3D.from_point_cloud(np.zeros((1, 3)), [box])).data == {
        "type": "lidar/beta", "vectors": [], "points": [[0.0, 0.0, 0.0]], "boxes": [box]
    }  # fmt: skip
    assert back(afs.Object3D.from_file(io.StringIO("[[1, 2, 3]]"), "pts.json")).to_numpy().tolist() == [[1, 2, 3]]
    mesh = trimesh.creation.box()
    mesh.export(tmp_path / "box.stl")
    assert back(afs.Object3D.from_mesh(mesh)).to_numpy().shape == (8, 3)
    sampled = [afs.Object3D.from_mesh(str(tmp_path / "box.stl"), points=20).sha256 for _ in range(2)]
    assert sampled[0] == sampled[1]
    with pytest.raises(ValueError, match=r"from_mesh\(\) makes a cloud"):
        draft().add(afs.Object3D(tmp_path / "box.stl"), "o")


def test_pages(tmp_path: Path) -> None:
    path = tmp_path / "p.html"
    path.write_text("<head></head>x")
    assert back(afs.Html(str(path), inject=False)).html == "<head></head>x"
    assert back(afs.Html(path)).html.startswith("<head><base")
    assert back(afs.Html(str(path), inject=False, data_is_not_path=True)).html == str(path)
    assert back(afs.Html(io.StringIO("text"), inject=False)).html == "text"


def test_plots(tmp_path: Path) -> None:
    document = pytest.importorskip("bokeh.document").Document()
    document.add_root(plot())
    found = back(afs.Bokeh(document))
    assert len(found.b_obj.roots) == 1 and found.sha256 == afs.Bokeh(plot()).sha256
    path = tmp_path / "p.bokeh.json"
    path.write_bytes(Path(found.path).read_bytes())
    assert back(afs.Bokeh(path)).sha256 == found.sha256


# Hostile stored forms

TABLE = {"_type": "table", "columns": ["a"], "data": [[1]], "ncols": 1, "nrows": 1, "log_mode": "IMMUTABLE"}


def table(kind: Any = None, data: Any = ((1,),), **more: Any) -> dict[str, Any]:
    types = {"column_types": {"wb_type": "typedDict", "params": {"type_map": {"a": kind}}}} if kind is not None else {}
    return {**TABLE, "data": [*data], **types, **more}


def linked(kind: str, params: dict[str, Any]) -> dict[str, Any]:
    return table({"wb_type": f"foreign{kind}", "params": params}, [["x"]])


def joined(first: str, key: Any) -> dict[str, Any]:
    return {"_type": "joined-table", "table1": first, "table2": "t.table.json", "join_key": key}


def at(path: Any, kind: str = "image-file", **more: Any) -> dict[str, Any]:
    return {"_type": kind, "path": path, "sha256": "0" * 64, "format": "png", **more}


def ndarray(path: str, shape: Any = (2,)) -> dict[str, Any]:
    return {"wb_type": "ndarray", "params": {"shape": shape, "serialization_path": {"path": path, "key": "a"}}}


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        *((f"x.{kind}.json", at(path, kind), "is no path of an entry") for kind in ("image-file", "audio-file", "mask")
          for path in ("../../etc/passwd", "/etc/passwd", "a/../b", "./a.bin", "a.bin/", "", "a\0", "\ud800", 7 * "../")),
        ("x.image-file.json", at("missing"), "does not have"),
        ("x.image-file.json", at(7), "'path' is 7 and not a text"),
        ("x.image-file.json", {"_type": "image-file"}, "has no 'path'"),
        ("x.image-file.json", at("a.bin", width="4"), "'width' is '4'"),
        ("x.image-file.json", at("a.bin", classes={"path": "../c"}), "no path of an entry"),
        ("x.image-file.json", at("a.bin", classes={"path": "t.table.json"}), "not a set of classes"),
        ("x.image-file.json", at("a.bin", masks={"m": {"path": "../m"}}), "no path of an entry"),
        ("x.image-file.json", at("a.bin", masks={"m": 7}), "not a JSON object"),
        ("x.image-file.json", at("a.bin", boxes={"b": [{"position": 1}]}), "must contain a position"),
        ("x.image-file.json", [], "cannot be read as an object"),
        ("x.image-file.json", b"{", "not JSON"),
        ("x.image-file.json", b"\xff\xfe", "not JSON"),
        ("x.image-file.json", b"[" * 100000, "nested too deeply"),
        ("x.image-file.json", b'{"_type": "image-file", "path": ' + b"9" * 5000 + b"}", "not JSON"),
        ("x.image-file.json", {"_type": "unheard-of"}, "not the JSON of a media object"),
        ("x.bounding-boxes.json", [7], "must contain a position"),
        ("x.classes.json", {"_type": "classes", "class_set": [{"id": [], "name": "x"}]}, "as its id"),
        ("x.classes.json", {"_type": "classes", "class_set": 7}, "'class_set' is 7"),
        ("x.table.json", table(data=[[1, 2]]), "row 0 is"),
        ("x.table.json", table(data=[7]), "row 0 is"),
        ("x.table.json", table(columns=["a", "a"]), "names of columns"),
        ("x.table.json", table(columns=[None]), "names of columns"),
        ("x.table.json", table({"wb_type": "timestamp"}, [[1e300]]), "is no time"),
        ("x.table.json", table({"wb_type": "timestamp"}, [[math.inf]]), "is no time"),
        ("x.table.json", table({"wb_type": 7}), "'wb_type' is 7"),
        ("x.table.json", table({"wb_type": "union", "params": {"allowed_types": [7]}}), "not a JSON object"),
        ("x.table.json", table({"wb_type": "image-file", "params": {"class_map": {"params": {"val": [7]}}}}), "'class_map'"),
        ("x.table.json", table(data=[[at("../x")]]), "no path of an entry"),
        ("x.table.json", table(ndarray("../x.npz")), "no path of an entry"),
        ("x.table.json", table(ndarray("a.bin")), "not an .npz file"),
        ("x.table.json", table(ndarray("a.npz", [-1])), "not the shape"),
        ("x.table.json", table(ndarray("a.npz", [3])), "expected are 1 of shape"),
        ("x.table.json", table(ndarray("pickle.npz", [1])), "expected are 1 of shape"),
        ("x.table.json", table(ndarray("huge.npz", [1 << 40])), "bytes at most"),
        ("x.table.json", table(ndarray("lie.npz", [1 << 20])), "are declared"),
        ("x.table.json", linked("Key", {"table": "../t", "col_name": "a"}), "no path"),
        ("x.table.json", linked("Key", {"table": "x.table.json", "col_name": "a"}), "back to itself"),
        ("x.table.json", linked("Key", {"table": "t.table.json", "col_name": "z"}), "no column 'z'"),
        ("x.table.json", linked("Index", {"table": "t.table.json"}), "whole number"),
        ("x.joined-table.json", joined("../t", "a"), "no path"),
        ("x.joined-table.json", joined("x.joined-table.json", "a"), "itself"),
        ("x.joined-table.json", joined("t.table.json", 7), "join_key"),
        ("x.partitioned-table.json", {"_type": "partitioned-table", "parts_path": "../x"}, "no path of a directory"),
    ],
)  # fmt: skip
def test_hostile_forms_are_refused(path: str, content: Any, message: str, workplace: Path) -> None:
    files = {"a.bin": b"bytes", "t.table.json": TABLE, "a.npz": npz(np.zeros((1, 2))), "pickle.npz": npz(np.array([[Trap()]]))}
    files |= {"huge.npz": header((1, 1 << 40)), "lie.npz": header((1, 1 << 20))}
    version = stored({**files, path: content})
    with pytest.raises(IntegrityError, match="of stored:v0 cannot be read as an object") as caught:
        version.get("x")
    assert message in str(caught.value) and isinstance(caught.value, ValueError) and "\n" not in str(caught.value)
    assert not Trap.sprung and {found.name for found in workplace.iterdir()} <= {"artifacts"}


class Trap:
    """Says when somebody unpickled it."""

    sprung = False

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return setattr, (Trap, "sprung", True)


def npz(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, a=array)
    return buffer.getvalue()


def header(shape: tuple[int, ...]) -> bytes:
    """An .npz whose array says it has this shape, and has no data."""
    buffer, array = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "<f8", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.npy", array.getvalue())
    return buffer.getvalue()


def test_sizes_have_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    version = stored(
        {
            "x.classes.json": b" " * (base.MAX_DOCUMENT + 1),
            "t.table.json": table(ndarray("a.npz")),
            "a.npz": npz(np.zeros((1, 2))),
        }
    )
    with pytest.raises(IntegrityError, match=f"it has {base.MAX_DOCUMENT + 1} bytes, and at most {base.MAX_DOCUMENT} are read"):
        version.get("x")
    assert version.get("t").data[0][0].tolist() == [0, 0]
    monkeypatch.setattr(arrays, "MAX_ARRAYS", 15)
    with pytest.raises(IntegrityError, match="15 bytes at most"):
        version.get("t")


def test_payloads_are_checked() -> None:
    version = stored({"x.image-file.json": at("a.bin"), "a.bin": b"bytes"})
    with pytest.raises(IntegrityError, match=r"'a.bin' is not the file whose SHA-256 it gives"):
        _ = version.get("x").image
    bomb = io.BytesIO()
    PIL.new("1", (20000, 20000)).save(bomb, "png")
    found = stored({"x.image-file.json": {"_type": "image-file", "path": "a.png"}, "a.png": bomb.getvalue()}).get("x")
    with pytest.raises(UsageError, match="decompression bomb"):
        _ = found.image


def test_types_of_other_clients_are_kept() -> None:
    kind = {"wb_type": "html-file-of-2031", "params": {"x": [1]}}
    version = stored({"x.table.json": table(kind, [[{"_type": "unheard-of", "path": "../x"}]])})
    found = version.get("x")
    assert found.data == [[{"_type": "unheard-of", "path": "../x"}]]
    again = logged(("x", found), name="again")
    document = json.loads(Path(again.get_entry("x").download()).read_text())
    assert document["column_types"]["params"]["type_map"]["a"] == kind


def test_missing_libraries_name_the_extra() -> None:
    code = (
        "import sys\n"
        "for name in ('numpy', 'pandas', 'PIL', 'soundfile', 'bokeh', 'imageio', 'trimesh'): sys.modules[name] = None\n"
        "import artifactfs as afs\n"
        "afs.Table(columns=['a'], data=[[1]]).describe(afs.media.base.Plan('MD5'))\n"
        "for make in (lambda: afs.Image([[1]]), lambda: afs.Audio([0.0], 8000), lambda: afs.Bokeh(7),\n"
        "             lambda: afs.Table(columns=['a']).get_dataframe(), lambda: afs.Object3D.from_mesh('x.stl')):\n"
        "    try: make()\n"
        "    except ImportError as error: print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split(" needs ")[1].split(",")[0] for line in said] == ["Pillow", "soundfile", "bokeh", "pandas", "trimesh"]
    assert all(line.endswith("install it with: pip install 'artifactfs[media]'") for line in said)


def test_libraries_are_imported_when_used() -> None:
    code = "import sys, artifactfs as afs; afs.Table, afs.Image, afs.Artifact; print({'numpy', 'PIL'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
