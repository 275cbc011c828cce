"""Images, with the classes, boxes and masks that belong to them."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, TypeAlias
from urllib.parse import urlsplit

from artifactfs.errors import UsageError
from artifactfs.media.annotations import BoundingBoxes2D, Classes, ImageMask, encoded, open_image
from artifactfs.media.base import Plan, Stored, wrong_type
from artifactfs.media.columns import ColumnType, ImageType
from artifactfs.media.extras import is_array, is_tensor, need, plain
from artifactfs.media.payload import MadeFile, PictureMedia, RemoteFile, UserFile, is_path, is_remote

FORMATS = ("png", "jpg", "jpeg", "bmp")

Annotation: TypeAlias = Mapping[str, Any]


class Image(PictureMedia):
    """An image: a file, an array or tensor, a Pillow image, a matplotlib figure, another Image, or an http, s3 or gs URI.

    Arrays are (height, width) or (height, width, channels), tensors (channels, height, width), with values of 0 to 255; others
    are refused. ``boxes`` and ``masks`` are by name of a layer, such as ``predictions``. ``file_type`` is the format that is
    written for what is no file: png (default), jpg or bmp.
    """

    kind: ClassVar[str] = "image-file"
    folder: ClassVar[str] = "media/images"

    def __init__(
        self,
        data_or_path: Any,
        mode: str | None = None,
        caption: str | None = None,
        grouping: int | None = None,
        classes: Classes | Sequence[Annotation] | None = None,
        boxes: Mapping[str, BoundingBoxes2D | Annotation] | None = None,
        masks: Mapping[str, ImageMask | Annotation] | None = None,
        file_type: str | None = None,
    ) -> None:
        self._size: tuple[int, int] | None = None
        self._grouping = grouping
        self._classes: Classes | None = None
        if isinstance(data_or_path, Image):
            self._copy(data_or_path, caption)
        elif is_remote(data_or_path):
            super().__init__(RemoteFile(data_or_path), caption)
            self._format = _extension(urlsplit(data_or_path).path)
        elif is_path(data_or_path):
            super().__init__(UserFile(data_or_path), caption)
            self._format = _extension(os.fspath(data_or_path))
            self._size = _size_of(self.path)
        else:
            self._format = file_type or "png"
            image = _as_pillow(data_or_path, mode, self._format)
            self._size = image.size
            super().__init__(MadeFile(encoded(image, self._format), f".{self._format}"), caption)
        self._boxes = {
            key: box if isinstance(box, BoundingBoxes2D) else BoundingBoxes2D(box, key)
            for key, box in _layers("boxes", boxes).items()
        }
        self._masks = {
            key: mask if isinstance(mask, ImageMask) else ImageMask(mask, key) for key, mask in _layers("masks", masks).items()
        }
        self._name_classes(classes)

    @property
    def image(self) -> Any:
        """A Pillow image, decoded anew each time; None for a URI."""
        return None if isinstance(self._payload, RemoteFile) else open_image(self.path)

    @property
    def format(self) -> str:
        """The extension of its file, such as ``png``."""
        return self._format

    @property
    def grouping(self) -> int | None:
        return self._grouping

    @property
    def classes(self) -> Classes | None:
        return self._classes

    @property
    def boxes(self) -> dict[str, BoundingBoxes2D]:
        """By layer."""
        return self._boxes

    @property
    def masks(self) -> dict[str, ImageMask]:
        """By layer."""
        return self._masks

    def to_numpy(self) -> Any:
        """The pixels, (height, width) or (height, width, channels)."""
        return need("numpy", "an Image as an array").asarray(self.image)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Image) and self._compared() == other._compared()

    __hash__ = PictureMedia.__hash__

    def describe(self, plan: Plan) -> dict[str, Any]:
        if (self._masks or self._boxes) and self._classes is None:
            raise UsageError("an Image with masks or boxes needs classes to be stored; pass classes= or class_labels")
        value = {**super().describe(plan), "format": self._format}
        if self._size:
            value |= {"width": self._size[0], "height": self._size[1]}
        if self._grouping:
            value["grouping"] = self._grouping
        if self._classes is not None:
            value["classes"] = self._classes.put(plan)
        if self._boxes:
            value["boxes"] = {key: box.describe(plan) for key, box in self._boxes.items()}
        if self._masks:
            value["masks"] = {key: mask.describe(plan) for key, mask in self._masks.items()}
        return value

    def column_type(self) -> ColumnType:
        """The type of a column that this image begins."""
        scores = {key for box in self._boxes.values() for item in box.boxes for key in item.get("scores", {})}
        layers: dict[str, Any] = {"boxes": self._boxes, "masks": self._masks}
        ids = {name: {key: frozenset(layer.class_labels) for key, layer in found.items()} for name, found in layers.items()}
        names = {
            name: {
                key: {str(id): label for id, label in layer.class_labels.items()}
                for key, layer in found.items()
                if layer.class_labels
            }
            for name, found in layers.items()
        }
        return ImageType(
            {
                "box_layers": ids["boxes"],
                "mask_layers": ids["masks"],
                "box_class_maps": names["boxes"],
                "mask_class_maps": names["masks"],
                "class_map": {str(item["id"]): item["name"] for item in self._classes.class_set} if self._classes else {},
                "box_score_keys": frozenset(scores),
            }
        )

    @classmethod
    def read(cls, stored: Stored) -> Self:
        image = super().read(stored)
        image._format = stored.optional("format", str) or _extension(stored.field("path", str))
        image._grouping = stored.optional("grouping", int)
        image._classes = _read_classes(stored)
        boxes, masks = stored.optional("boxes", dict) or {}, stored.optional("masks", dict) or {}
        image._boxes = {key: BoundingBoxes2D.read(stored.at(value)) for key, value in boxes.items()}
        image._masks = {key: ImageMask.read(stored.at(value)) for key, value in masks.items()}
        return image

    def _copy(self, other: Image, caption: str | None) -> None:
        """Be the same image, without its boxes and masks."""
        super().__init__(other._payload, caption if caption is not None else other._caption)
        self._format, self._size, self._classes = other._format, other._size, other._classes
        self._grouping = self._grouping if self._grouping is not None else other._grouping

    def _name_classes(self, given: Classes | Sequence[Annotation] | None) -> None:
        """All classes that the image names: those of boxes, of masks, and those given, the later ones winning."""
        names: dict[Any, str] = {}
        for labels in [box.class_labels for box in self._boxes.values()] + [mask.class_labels for mask in self._masks.values()]:
            names |= labels
        if given is not None:
            found = given if isinstance(given, Classes) else Classes(given)
            names |= {item["id"]: item["name"] for item in found.class_set}
        if names:
            self._classes = Classes([{"id": id, "name": name} for id, name in names.items()])

    def _compared(self) -> tuple[Any, ...]:
        return self.sha256, self._caption, self._grouping, self._size, self._classes, self._boxes, self._masks


def _layers(what: str, given: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if given is not None and not isinstance(given, Mapping):
        raise UsageError(f'Images "{what}" argument must be a dictionary by name of a layer, as {{"predictions": …}}')
    return given or {}


def _read_classes(stored: Stored) -> Classes | None:
    where = stored.optional("classes", dict)
    if where is None:
        return None
    found = stored.source.get(stored.at(where).field("path", str), stored.path)
    if not isinstance(found, Classes):
        raise stored.malformed(f"{where['path']!r} is not a set of classes")
    return found


def _extension(path: str) -> str:
    return os.path.splitext(path)[1][1:]


def _size_of(path: str) -> tuple[int, int]:
    """Width and height, from the file's header."""
    pillow = need("PIL.Image", "an Image")
    try:
        with pillow.open(path) as image:
            width, height = image.size
            return int(width), int(height)
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise UsageError(f"{path} cannot be read as an image: {error}") from None


def _as_pillow(data: Any, mode: str | None, format: str) -> Any:
    """What the user gave as a Pillow image."""
    if format not in FORMATS:
        raise UsageError(f"file_type must be one of {', '.join(FORMATS)}, not {format!r}")
    pillow = need("PIL.Image", "an Image")
    if isinstance(data, pillow.Image):
        return data
    figure = getattr(data, "gcf", None) or (lambda: getattr(data, "figure", data))  # pyplot, an Axes, or a figure
    if hasattr(figure(), "savefig"):
        return _drawn(figure(), format)
    pixels = _pixels(data)
    guessed = {1: "L", 3: "RGB", 4: "RGB" if format in ("jpg", "jpeg") else "RGBA"}.get(
        pixels.shape[2] if pixels.ndim == 3 else 1
    )
    if pixels.ndim not in (2, 3) or guessed is None:
        raise UsageError(f"Un-supported shape for image conversion {list(pixels.shape)}; it is (height, width[, 1, 3 or 4])")
    return pillow.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels).convert(mode or guessed)


def _drawn(figure: Any, format: str) -> Any:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=format)
    buffer.seek(0)
    return need("PIL.Image", "an Image").open(buffer)


def _pixels(data: Any) -> Any:
    """An array of bytes, (height, width[, channels])."""
    numpy = need("numpy", "an Image of an array")
    array = plain(data)
    if not is_array(array):
        raise wrong_type(
            f"an Image is made of a path, an array, a tensor, a Pillow image or a figure, not of {type(data).__name__}"
        )
    if is_tensor(data) and array.ndim >= 3:
        array = numpy.moveaxis(array, -3, -1)
    while array.ndim > 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[0] == 1 and array.shape[2] not in (1, 3, 4):
        array = array[0]
    if array.size and not (array.min() >= 0 and array.max() <= 255):
        raise UsageError(f"pixels are 0 to 255, and these are {array.min()} to {array.max()}; scale them first")
    return numpy.ascontiguousarray(array.astype(numpy.uint8))
