"""Media objects in artifacts: tables, images, sounds and the like become files, and files become them again.

The stored form is W&B's, so that its clients read what is stored here, and the other way round. An object is one JSON entry,
``<name>.<kind>.json``, beside entries with its bytes, below ``media/``, named by their checksums::

    artifact.add(afs.Table(columns=["id", "image"], data=[[1, afs.Image("a.png")]]), "examples")
    artifact.get("examples").data[0][1].image

:func:`plan` and :func:`get` are what ``Artifact.add`` and ``Artifact.get`` do; nothing here writes into a draft or a store.
Libraries (numpy, Pillow, soundfile, …) are imported when they are first used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from artifactfs.media.annotations import BoundingBoxes2D, Classes, ImageMask
from artifactfs.media.base import Addition, Media, Plan, Readable, Source, encode, wrong_type
from artifactfs.media.clips import Audio, Video
from artifactfs.media.html import Html
from artifactfs.media.image import Image
from artifactfs.media.joined import JoinedTable, PartitionedTable
from artifactfs.media.models import Bokeh, Object3D
from artifactfs.media.table import Table
from artifactfs.names import entry_path

CLASSES: tuple[type[Media], ...] = (
    Table,
    JoinedTable,
    PartitionedTable,
    Classes,
    ImageMask,
    BoundingBoxes2D,
    Image,
    Audio,
    Video,
    Html,
    Object3D,
    Bokeh,
)


def plan(obj: Any, name: str, algorithm: str, present: Callable[[str], str | None]) -> tuple[str, Sequence[Addition]]:
    """The path of the entry that ``obj`` will be as ``name`` in a draft, and all additions, the object's own the last.

    ``present`` gives the digest of what the draft has at a path, None for nothing. TypeError for what is no media object,
    UsageError for one that cannot be stored.
    """
    if not isinstance(obj, CLASSES):
        names = ", ".join(kind.__name__ for kind in CLASSES)
        raise wrong_type(f"Found object of type {type(obj).__name__}, expected one of: {names}")
    making = Plan(algorithm, present)
    value = obj.describe(making)
    path = type(obj).entry_name(entry_path(name))
    if path.startswith("media/tables"):  # such names are made of the content, as W&B's are
        folder, _, base = path.rpartition("/")
        checksum = hashlib.md5(encode(value), usedforsecurity=False).hexdigest()[:20]
        path = f"{folder}/{checksum}.{base.partition('.')[2]}"
    making.document(path, value)
    own = making.additions.pop(path)
    return path, [*making.additions.values(), own]


def get(artifact: Readable, name: str) -> Media | None:
    """The object that was added as ``name`` to a logged artifact; None if there is none. IntegrityError if it is damaged."""
    source = Source(artifact)
    entry = source.find(entry_path(name))
    return source.get(entry.path) if entry is not None else None


def find(artifact: Readable, name: str) -> Any:
    """The entry of the object that was added as ``name``; None if there is none."""
    return Source(artifact).find(name)


__all__ = [
    "CLASSES",
    "Addition",
    "Audio",
    "Bokeh",
    "BoundingBoxes2D",
    "Classes",
    "Html",
    "Image",
    "ImageMask",
    "JoinedTable",
    "Media",
    "Object3D",
    "PartitionedTable",
    "Table",
    "Video",
    "find",
    "get",
    "plan",
]
