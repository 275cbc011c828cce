"""What images are annotated with: classes, boxes and masks."""

from __future__ import annotations

import hashlib
import io
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from artifactfs.errors import UsageError
from artifactfs.media.base import Media, Plan, Stored, wrong_type
from artifactfs.media.extras import is_array, is_scalar, is_tensor, need, plain
from artifactfs.media.payload import FileMedia, MadeFile, Payload, UserFile, stored_file


class Classes(Media):
    """Names of class ids: ``[{"id": 1, "name": "cat"}, …]``, ids being numbers or text."""

    kind: ClassVar[str] = "classes"

    def __init__(self, class_set: Sequence[Mapping[str, Any]]) -> None:
        for item in class_set:
            if not isinstance(item, Mapping) or not {"id", "name"} <= item.keys():
                raise UsageError(f"each class needs an 'id' and a 'name', and {item!r} has not both")
        self._class_set: list[dict[str, Any]] = [plain_json(item) for item in class_set]
        for item in self._class_set:
            if not isinstance(item["id"], (str, int, float)) or not isinstance(item["name"], str):
                raise wrong_type(f"a class has a number or text as its id and text as its name, and {item!r} has not")

    @property
    def class_set(self) -> list[dict[str, Any]]:
        return self._class_set

    def get_type(self) -> Any:
        """These classes as the ``dtype`` of a column of ids."""
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Classes) and self._class_set == other._class_set

    def __hash__(self) -> int:
        return hash(str(self._class_set))

    def __repr__(self) -> str:
        return f"Classes({self._class_set})"

    def describe(self, plan: Plan) -> dict[str, Any]:
        return {"_type": self.kind, "class_set": self._class_set}

    def put(self, plan: Plan, name: str = "") -> dict[str, Any]:
        """Plan their entry, ``name`` if that is free; returns what refers to it in JSON."""
        value = self.describe(plan)
        checksum = hashlib.md5(str(self._class_set).encode(), usedforsecurity=False).hexdigest()
        path = self.entry_name(name or f"media/classes/{checksum}_cls")
        if plan.would_clash(path, value):
            path = self.entry_name(f"media/classes/{checksum}_cls")
        path = plan.document(path, value)
        return {"type": "classes-file", "path": path, "digest": plan.digest(path)}

    @classmethod
    def read(cls, stored: Stored) -> Self:
        try:
            return cls(stored.field("class_set", list))
        except UsageError as error:
            raise stored.malformed(str(error)) from None


class BoundingBoxes2D(Media):
    """Boxes in an image: ``{"box_data": [{"position": …, "class_id": …}, …], "class_labels": {1: "cat"}}``.

    A position is ``minX``, ``maxX``, ``minY`` and ``maxY``, or ``middle``, ``width`` and ``height``, as fractions of the image,
    or in pixels with ``"domain": "pixel"``. ``scores``, ``box_caption`` and ``class_labels`` may be left out.
    """

    kind: ClassVar[str] = "bounding-boxes"

    def __init__(self, val: Mapping[str, Any], key: str = "") -> None:
        boxes = val.get("box_data")
        if not isinstance(boxes, list):
            raise wrong_type("box_data must be a list of boxes")
        self._boxes: list[dict[str, Any]] = [plain_json(box) for box in boxes]
        self._key = key
        for box in self._boxes:
            _check_box(box)
        ids = sorted({box["class_id"] for box in self._boxes if "class_id" in box})
        self._class_labels = _labels(val) or {id: f"class_{id}" for id in ids}

    @property
    def boxes(self) -> list[dict[str, Any]]:
        return self._boxes

    @property
    def class_labels(self) -> dict[Any, str]:
        return self._class_labels

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BoundingBoxes2D) and self._boxes == other._boxes

    def __hash__(self) -> int:
        return hash(len(self._boxes))

    def describe(self, plan: Plan) -> list[dict[str, Any]]:
        return self._boxes

    @classmethod
    def read(cls, stored: Stored) -> Self:
        try:
            return cls({"box_data": stored.value})
        except UsageError as error:
            raise stored.malformed(str(error)) from None


class ImageMask(FileMedia):
    """Class ids of an image's pixels, 0 to 255: ``{"mask_data": 2-D array, "class_labels": {1: "cat"}}`` or ``{"path": …}``."""

    kind: ClassVar[str] = "mask"
    folder: ClassVar[str] = "media/images/mask"

    def __init__(self, val: Mapping[str, Any] | Payload, key: str = "") -> None:
        self._key = key
        self._class_labels: dict[Any, str] = {}
        if not isinstance(val, Mapping):
            super().__init__(val)
        elif "path" in val:
            super().__init__(UserFile(val["path"]))
            self._class_labels = _labels(val)
        else:
            data = _mask(val.get("mask_data"))
            ids = need("numpy", "an ImageMask").unique(data).tolist()
            self._class_labels = _labels(val) or {id: f"class_{id}" for id in ids}
            super().__init__(MadeFile(png(data, "L"), ".mask.png"))

    @property
    def class_labels(self) -> dict[Any, str]:
        return self._class_labels

    def to_numpy(self) -> Any:
        """The class ids as a 2-D array of bytes."""
        image = open_image(self.path)
        return need("numpy", "an ImageMask as an array").asarray(image if image.mode in ("L", "P") else image.convert("L"))

    @classmethod
    def read(cls, stored: Stored) -> Self:
        return cls(stored_file(stored))


def png(data: Any, mode: str) -> bytes:
    """An array of bytes as a PNG file."""
    return encoded(need("PIL.Image", "an image").fromarray(data).convert(mode), "png")


def encoded(image: Any, extension: str) -> bytes:
    """A Pillow image as a file. UsageError where the format cannot hold it."""
    buffer = io.BytesIO()
    try:
        image.save(buffer, format="jpeg" if extension in ("jpg", "jpeg") else extension, transparency=None)
    except (OSError, ValueError) as error:
        raise UsageError(f"an image of mode {image.mode} cannot be written as {extension} ({error}); convert it first") from None
    return buffer.getvalue()


def open_image(path: str) -> Any:
    """A Pillow image, decoded. UsageError for what is none, or has more pixels than Pillow trusts."""
    pillow = need("PIL.Image", "an image")
    try:
        with pillow.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise UsageError(f"{path} cannot be read as an image: {error}") from None


def plain_json(value: Any) -> Any:
    """``value`` with arrays, tensors and scalars of numpy as lists and numbers, and tuples as lists."""
    value = plain(value)
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    return value.tolist() if is_array(value) or is_scalar(value) or is_tensor(value) else value


def _mask(data: Any) -> Any:
    numpy = need("numpy", "an ImageMask")
    array = plain(data)
    if not is_array(array) or array.ndim != 2:
        raise wrong_type("mask_data must be a 2D array")
    small = array.astype(numpy.uint8)
    if not (small == array).all():
        raise wrong_type("Mask data must be integers between 0 and 255")
    return small


def _labels(val: Mapping[str, Any]) -> dict[Any, str]:
    labels = {plain_json(id): name for id, name in (val.get("class_labels") or {}).items()}
    if not all(isinstance(id, numbers.Number) and isinstance(name, str) for id, name in labels.items()):
        raise wrong_type("Class labels must be a dictionary of numbers to strings")
    return labels


def _check_box(box: Any) -> None:
    position = box.get("position") if isinstance(box, dict) else None
    if not isinstance(position, dict) or not (_is_middle(position) or _has_numbers(position, "minX", "maxX", "minY", "maxY")):
        raise wrong_type("Each box must contain a position with: middle, width, and height or minX, maxX, minY, maxY")
    scores = box.get("scores", {})
    if not isinstance(scores, dict) or not all(isinstance(score, numbers.Number) for score in scores.values()):
        raise wrong_type("Box scores must be a dictionary of names to numbers")
    if not isinstance(box.get("class_id", 0), int):
        raise wrong_type("A box's class_id must be an integer")
    if not isinstance(box.get("box_caption", ""), str):
        raise wrong_type("A box's caption must be a string")


def _is_middle(position: Mapping[str, Any]) -> bool:
    middle = position.get("middle")
    return isinstance(middle, list) and len(middle) == 2 and _has_numbers(position, "width", "height")


def _has_numbers(position: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(position.get(name), numbers.Number) for name in names)
