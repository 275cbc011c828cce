"""Clouds of points, and Bokeh plots: files of JSON."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from artifactfs.errors import UsageError
from artifactfs.media.annotations import plain_json
from artifactfs.media.base import Plan, compact, wrong_type
from artifactfs.media.extras import is_array, need, plain
from artifactfs.media.payload import FileMedia, MadeFile, Payload, UserFile, is_path

_SHAPES = "n points as (n, 3): x y z, (n, 4): x y z and a category of 1 to 14, or (n, 6): x y z r g b"
_FILES = ("obj", "gltf", "glb", "babylon", "stl", "pts.json")
_POINTS = ".pts.json"


class Object3D(FileMedia):
    """A cloud of points: an array of points, a scene ``{"type": "lidar/beta", "points": …, "boxes": …, "vectors": …}``, a
    ``.pts.json`` file, or an ``io`` object with such text and ``file_type="pts.json"``.

    Meshes (obj, stl, glb, …) can be objects, but artifacts store clouds of points only, as W&B's do: :meth:`from_mesh` makes one.
    """

    kind: ClassVar[str] = "object3D-file"
    folder: ClassVar[str] = "media/object3D"

    def __init__(self, data_or_path: Any, caption: str | None = None, file_type: str | None = None) -> None:
        data = plain(data_or_path)
        payload: Payload
        if is_path(data):
            if not os.fspath(data).endswith(_FILES):
                raise UsageError(f"File {os.fspath(data)!r} is not compatible with Object3D: it takes {', '.join(_FILES)}")
            payload = UserFile(data)
        elif hasattr(data, "read"):
            payload = MadeFile(_content(data), f".{_checked(file_type)}")
        elif isinstance(data, Mapping):
            payload = MadeFile(compact(_scene(data)), _POINTS)
        elif is_array(data):
            if data.ndim != 2 or data.shape[1] not in (3, 4, 6):
                raise UsageError(f"the array has the shape {list(data.shape)}; an Object3D is made of {_SHAPES}")
            payload = MadeFile(compact(data.tolist()), _POINTS)
        else:
            raise UsageError("an Object3D is made of an array, a scene, a path or an io object, not of " + type(data).__name__)
        super().__init__(payload, caption)

    @classmethod
    def from_file(cls, data_or_path: Any, file_type: str | None = None) -> Self:
        """Of a path, or of an ``io`` object with its ``file_type``."""
        return cls(data_or_path, file_type=file_type)

    @classmethod
    def from_numpy(cls, data: Any) -> Self:
        """Of an array of points."""
        if not is_array(data):
            raise UsageError("`data` must be a numpy array")
        return cls(data)

    @classmethod
    def from_point_cloud(
        cls,
        points: Sequence[Any],
        boxes: Sequence[Any],
        vectors: Sequence[Any] | None = None,
        point_cloud_type: str = "lidar/beta",
    ) -> Self:
        """Of points with labelled boxes (their eight ``corners``, ``label``, ``color``) and vectors (``start``, ``end``)."""
        scene = {"type": point_cloud_type, "points": points, "boxes": boxes, "vectors": vectors if vectors is not None else []}
        return cls(scene)

    @classmethod
    def from_mesh(cls, mesh: Any, points: int | None = None, seed: int = 0, caption: str | None = None) -> Self:
        """The vertices of a mesh, or ``points`` points spread evenly over its surface, the same ones for the same ``seed``.

        ``mesh`` is a path that trimesh can load, or an object of trimesh.
        """
        trimesh = need("trimesh", "an Object3D of a mesh")
        found = trimesh.load(os.fspath(mesh), force="mesh") if is_path(mesh) else mesh
        if points is None:
            return cls(need("numpy", "an Object3D").asarray(found.vertices, float), caption)
        sampled = trimesh.sample.sample_surface(found, points, seed=seed)[0]
        return cls(need("numpy", "an Object3D").asarray(sampled, float), caption)

    @property
    def data(self) -> Any:
        """The points as lists, or the scene."""
        return _parsed(self.path)

    def to_numpy(self) -> Any:
        """The points as an array."""
        data = self.data
        points = data.get("points", []) if isinstance(data, dict) else data
        return need("numpy", "an Object3D as an array").asarray(points)

    def describe(self, plan: Plan) -> dict[str, Any]:
        if not self._payload.name.endswith(_POINTS):
            raise UsageError(
                f"{self._payload.name}: Non-point cloud 3D objects are not yet supported with Artifacts; add_file() stores the "
                "file, Object3D.from_mesh() makes a cloud of points of it"
            )
        return super().describe(plan)


class Bokeh(FileMedia):
    """A Bokeh plot: a model, a document, or a ``.bokeh.json`` file. The same plot gives the same bytes."""

    kind: ClassVar[str] = "bokeh-file"
    folder: ClassVar[str] = "media/bokeh"
    extension: ClassVar[str] = ".bokeh.json"

    def __init__(self, data_or_path: Any) -> None:
        payload: Payload
        if is_path(data_or_path):
            if not os.fspath(data_or_path).endswith(self.extension):
                raise UsageError(f"{os.fspath(data_or_path)} does not end with {self.extension}; save the plot under such a name")
            payload = UserFile(data_or_path)
        else:
            payload = MadeFile(compact(_numbered(_plot(data_or_path))), self.extension)
        super().__init__(payload)

    @property
    def b_obj(self) -> Any:
        """A new Bokeh document with the plot."""
        document = need("bokeh.document", "a Bokeh plot").Document
        try:
            return document.from_json(_parsed(self.path))
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:
            raise UsageError(f"{self.path} cannot be read as a Bokeh plot: {error}") from None


def _content(file: Any) -> bytes:
    if hasattr(file, "seek"):
        file.seek(0)
    content = file.read()
    return content.encode() if isinstance(content, str) else bytes(content)


def _checked(file_type: str | None) -> str:
    if file_type is None:
        raise UsageError("Must pass file type keyword argument when using io objects.")
    if file_type not in _FILES:
        raise UsageError(f"Object 3D only supports numpy arrays or files of the type: {', '.join(_FILES)}")
    return file_type


def _scene(data: Mapping[str, Any]) -> dict[str, Any]:
    if data.get("type") != "lidar/beta":
        raise UsageError(f"Type {data.get('type')!r} not supported, only 'lidar/beta' is currently supported")
    return {"type": data["type"], **{key: plain_json(data.get(key, [])) for key in ("vectors", "points", "boxes")}}


def _parsed(path: str) -> Any:
    with open(path, "rb") as file:
        try:
            return json.loads(file.read())
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path} is not JSON: {error}") from None


def _plot(value: Any) -> Any:
    """The JSON of a document with the plot."""
    need("bokeh", "a Bokeh plot")
    document = need("bokeh.document", "a Bokeh plot").Document
    if isinstance(value, need("bokeh.model", "a Bokeh plot").Model):
        root, value = value, document()
        value.add_root(root)
    elif not isinstance(value, document):
        raise wrong_type("Bokeh constructor accepts Bokeh document/model or path to Bokeh json file")
    return document.from_json(value.to_json(deferred=False)).to_json(deferred=False)


def _numbered(plot: Any) -> Any:
    """The plot with the ids that Bokeh counted up in this process counted from 1000, in order of appearance."""
    ids: dict[str, str] = {}

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: number(item) if key == "id" else renamed(item) for key, item in value.items()}
        return [renamed(item) for item in value] if isinstance(value, list) else value

    def number(id: Any) -> Any:
        if not isinstance(id, str) or not re.fullmatch(r"p\d+", id):
            return renamed(id)
        return ids.setdefault(id, f"p{1000 + len(ids)}")

    return renamed(plot)
