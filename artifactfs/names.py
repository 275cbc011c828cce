"""Parse and validate names, aliases, tags, entry paths and metadata: the one place that knows their rules.

The rules are W&B's (client 0.31), made strict where that client lets through what later confuses: a trailing newline,
``.`` and ``..`` as names, reserved ``vN`` aliases, undecodable paths. Everything raises :class:`InvalidNameError`
(a ``ValueError``) with one line that names the offender, except metadata of a wrong type (``TypeError``).
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from artifactfs.errors import InvalidNameError

MAX_NAME = 128
MAX_METADATA_KEYS = 100
MAX_METADATA_DEPTH = 64
MAX_METADATA_INT = 10**1000  # far beyond any use, and below the length at which Python refuses to print an int
MAX_PATH_PART = 255  # NAME_MAX of Linux and macOS: a longer part could be logged but never mounted
LATEST = "latest"

_NAME = re.compile(r"[A-Za-z0-9_\-.]+")
_VERSION = re.compile(r"v(0|[1-9][0-9]*)")
_TAG = re.compile(r"[-\w]+( +[-\w]+)*")
REGISTRY = "wandb-registry-"
"""What the projects that are registries start with."""

_PROJECT_BANNED = set("/\\#?%:\r\n")


@dataclasses.dataclass(frozen=True, slots=True)
class ArtifactName:
    """``entity/project/collection[:alias]``. ``alias`` is "" when none was given."""

    entity: str
    project: str
    collection: str
    alias: str = ""

    def __str__(self) -> str:
        return f"{self.path}:{self.alias}" if self.alias else self.path

    @property
    def path(self) -> str:
        """``entity/project/collection``, without the alias."""
        return f"{self.entity}/{self.project}/{self.collection}"

    def at(self, alias: str) -> ArtifactName:
        """The same collection, at ``alias``."""
        return dataclasses.replace(self, alias=alias)


def parse(text: str, entity: str = "", project: str = "") -> ArtifactName:
    """``[[entity/]project/]collection[:alias]`` with ``entity`` and ``project`` as defaults.

    The first ``:`` ends the collection. The result's parts are validated, and its alias is "" when none was given.
    """
    path, colon, alias = text.partition(":")
    parts = path.split("/")
    if len(parts) > 3:
        raise InvalidNameError(f"name {text!r} has {len(parts)} parts; use entity/project/collection:alias")
    collection = check_collection(parts[-1])
    project = parts[-2] if len(parts) > 1 else project
    entity = parts[-3] if len(parts) > 2 else entity
    if colon:
        check_alias(alias)
    if not entity:
        raise InvalidNameError(f"name {text!r} has no entity; write entity/project/{collection} or set ARTIFACTFS_ENTITY")
    if not project:
        raise InvalidNameError(f"name {text!r} has no project; write entity/project/{collection} or set ARTIFACTFS_PROJECT")
    return ArtifactName(check_entity(entity), check_project(project), collection, alias)


def parse_prefix(text: str) -> tuple[str, ...]:
    """The levels of a browsing name: ``""`` or ``/``, ``entity``, ``entity/project``, ``entity/project/collection``.

    Zero to three validated parts, no defaults applied, no alias allowed.
    """
    stripped = text.strip("/")
    parts = tuple(stripped.split("/")) if stripped else ()
    if len(parts) > 3:
        raise InvalidNameError(f"name {text!r} has {len(parts)} parts; use entity/project/collection")
    for part, check in zip(parts, (check_entity, check_project, check_collection), strict=False):
        check(part)
    return parts


def check_collection(name: str) -> str:
    """``name``, if it can name a collection: letters, digits, ``_ - .``, at most 128, not ``.`` or ``..``."""
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise InvalidNameError(
            f"artifact name {name!r} may only contain letters, digits, dashes, underscores and dots (and not be . or ..)"
        )
    if len(name) > MAX_NAME:
        raise InvalidNameError(f"artifact name {name[:20]!r}… is {len(name)} characters long; at most {MAX_NAME} are allowed")
    return name


def check_project(name: str) -> str:
    """``name``, if it can name a project: at most 128 characters and none of ``/ \\ # ? % :`` or a control character."""
    return _check_namespace("project", name)


def is_registry(project: str) -> bool:
    """Whether a project is a registry: a prefix of its own, and a name."""
    return project.startswith(REGISTRY) and project != REGISTRY


def check_entity(name: str) -> str:
    """``name``, if it can name an entity; the same rule as a project's."""
    return _check_namespace("entity", name)


def _check_namespace(what: str, name: str) -> str:
    if not name or name in (".", "..") or len(name.encode("utf-8", "surrogatepass")) > MAX_NAME:
        raise InvalidNameError(f"{what} {name[:40]!r} must be 1 to {MAX_NAME} bytes long and not be . or ..")
    if _PROJECT_BANNED & set(name) or not name.isprintable():
        raise InvalidNameError(f"{what} {name!r} may not contain / \\ # ? % : or control characters")
    return name


def check_type(artifact_type: str, name: str = "", reserved: bool = False) -> str:
    """``artifact_type``, if a user may give it to the collection ``name``.

    Not empty, at most 128 characters, no ``/`` or ``:``, and unless ``reserved`` none of W&B's reserved types (``wandb-…``;
    ``job``; ``run_table`` for ``run-…``; ``code`` for ``source-…``).
    """
    if not artifact_type or len(artifact_type) > MAX_NAME or not artifact_type.isprintable():
        raise InvalidNameError(f"artifact type {artifact_type[:40]!r} must be 1 to {MAX_NAME} printable characters long")
    if "/" in artifact_type or ":" in artifact_type:
        raise InvalidNameError(f"artifact type {artifact_type!r} may not contain / or :")
    is_reserved = (
        artifact_type.startswith("wandb-")
        or artifact_type == "job"
        or (artifact_type == "run_table" and name.startswith("run-"))
        or (artifact_type == "code" and name.startswith("source-"))
    )
    if is_reserved and not reserved:
        raise InvalidNameError(f"artifact type {artifact_type!r} is reserved for internal use; choose another type")
    return artifact_type


def expires(artifact_type: str) -> bool:
    """Whether versions of a type may have a time to live: not those that W&B makes by itself."""
    return artifact_type not in ("run_table", "code", "job") and not artifact_type.startswith("wandb-")


def version_number(alias: str) -> int | None:
    """12 for ``v12``; None for anything that is not the canonical name of a version (``v012``, ``V1``, ``best``)."""
    match = _VERSION.fullmatch(alias)
    return int(match[1]) if match else None


def check_alias(alias: str) -> str:
    """``alias``, if it can be looked up: not empty, at most 128 characters and 255 bytes, no ``/`` or ``:``, printable."""
    if not alias or len(alias) > MAX_NAME or not alias.isprintable():
        raise InvalidNameError(f"alias {alias[:40]!r} must be 1 to {MAX_NAME} printable characters long")
    if len(alias.encode()) > MAX_PATH_PART:
        raise InvalidNameError(f"alias {alias[:40]!r} is over {MAX_PATH_PART} bytes long: no browsing mount could show it")
    if "/" in alias or ":" in alias:
        raise InvalidNameError(f"alias {alias!r} may not contain / or :")
    if alias in (".", ".."):
        raise InvalidNameError(f"alias {alias!r} cannot be a directory name in a browsing mount; choose another")
    return alias


def check_new_alias(alias: str) -> str:
    """``alias``, if a user may set it: as :func:`check_alias`, and not ``v`` with digits, which names versions."""
    check_alias(alias)
    if re.fullmatch(r"v[0-9]+", alias):
        raise InvalidNameError(f"alias {alias!r} is reserved: v and digits name versions; choose another alias")
    return alias


def check_tag(tag: str) -> str:
    """``tag``, if valid: word characters and hyphens with inner spaces, at most 128 characters."""
    if len(tag) > MAX_NAME or not _TAG.fullmatch(tag):
        raise InvalidNameError(
            f"tag {tag[:40]!r} may only contain letters, digits, _ and -, with single words parted by spaces, at most {MAX_NAME}"
        )
    return tag


def check_tags(tags: Iterable[str]) -> list[str]:
    """The tags without repetitions, in order."""
    return list(dict.fromkeys(check_tag(tag) for tag in tags))


def entry_path(path: str) -> str:
    """The canonical relative POSIX path of an entry: ``./a``, ``a//b`` and a trailing ``/`` are normalised.

    ``..`` anywhere, an absolute path, a Windows drive, NUL, an empty result, a part over 255 bytes or text that is not
    valid UTF-8 raise. Backslashes and newlines are legal characters.
    """
    if path.startswith("/") or re.match(r"[A-Za-z]:[\\/]", path):
        raise InvalidNameError(f"Invalid artifact path: {path!r} is absolute; use a path relative to the artifact's root")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts:
        raise InvalidNameError(f"Invalid artifact path: {path!r} names nothing")
    for part in parts:
        check_part(part, path)
    return "/".join(parts)


def check_part(part: str, path: str = "") -> str:
    """``part``, if it can be one component of an entry's path; ``path`` is for the message."""
    shown = path or part
    if part in ("", ".", "..") or "/" in part:
        raise InvalidNameError(f"Invalid artifact path: {shown!r} has a part {part!r}; it may not leave the artifact's root")
    if "\0" in part:
        raise InvalidNameError(f"Invalid artifact path: {shown!r} contains a NUL byte")
    try:
        size = len(part.encode("utf-8"))
    except UnicodeEncodeError:
        raise InvalidNameError(f"Invalid artifact path: {shown!r} is not valid UTF-8; rename the file") from None
    if size > MAX_PATH_PART:
        raise InvalidNameError(
            f"Invalid artifact path: a part of {shown[:40]!r}… is {size} bytes long; at most {MAX_PATH_PART} can be mounted"
        )
    return part


def check_metadata(metadata: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """``metadata`` as plain JSON values: tuples and sets become lists, NaN null, dates ISO text, numpy plain numbers.

    A list or other non-mapping is a TypeError; infinity, more than 100 top-level keys, two keys that are one as JSON, text
    that is not valid Unicode or an unserialisable value raise InvalidNameError.
    """
    if metadata is None:
        return {}
    if isinstance(metadata, str):
        metadata = _load_json(metadata)
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata must be a dict (a JSON object), not {type(metadata).__name__}")
    if len(metadata) > MAX_METADATA_KEYS:
        raise InvalidNameError(f"metadata has {len(metadata)} top-level keys; at most {MAX_METADATA_KEYS} are allowed")
    return _plain_mapping(metadata, "", 0)


def _load_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidNameError(f"metadata is not valid JSON: {error}") from None
    except RecursionError:
        raise InvalidNameError(f"metadata is nested more than {MAX_METADATA_DEPTH} levels deep") from None


def _plain_mapping(value: Mapping[Any, Any], where: str, depth: int) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for item_key, item in value.items():
        key = _json_key(item_key, where)
        path = f"{where}.{key}" if where else key
        if key in plain:
            raise InvalidNameError(f"metadata has the key {path!r} twice once its keys are text; rename one")
        plain[key] = _plain(item, path, depth + 1)
    return plain


def _json_key(key: Any, where: str) -> str:
    """``key`` as ``json`` spells it: ``true``, ``null`` and numbers as their text."""
    if isinstance(key, str):
        return _unicode(key, where or "keys")
    if key is None or isinstance(key, (bool, int, float)):
        return json.dumps(key)
    return _unicode(str(key), where or "keys")


def _unicode(text: str, where: str) -> str:
    """``text`` as an exact ``str``, which UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidNameError(f"metadata {where!r} has text that is not valid Unicode") from None
    return str.__str__(text)


def _plain(value: Any, where: str, depth: int) -> Any:
    """``value`` as JSON can hold it. Subclasses of ``int``, ``float`` and ``str`` become those: the encoder takes no other."""
    if depth > MAX_METADATA_DEPTH:
        raise InvalidNameError(f"metadata {where[:40]!r} is nested more than {MAX_METADATA_DEPTH} levels deep")
    if isinstance(value, Mapping):
        return _plain_mapping(value, where, depth)
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item, where, depth + 1) for item in value]
    if isinstance(value, slice):
        return {"slice_start": value.start, "slice_step": value.step, "slice_stop": value.stop}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain_mapping({field.name: getattr(value, field.name) for field in dataclasses.fields(value)}, where, depth)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if hasattr(value, "tolist"):  # numpy arrays and scalars (a numpy.float64 is a float too), torch tensors
        return _plain(value.tolist(), where, depth + 1)
    return _plain_scalar(value, where)


def _plain_scalar(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _unicode(value, where)
    if isinstance(value, int):
        if abs(value) >= MAX_METADATA_INT:
            raise InvalidNameError(f"metadata {where!r} is a number of over 1000 digits; use a string")
        return int(value)
    if isinstance(value, float):
        if math.isinf(value):
            raise InvalidNameError(f"metadata {where!r} is infinite, which JSON cannot hold; use a string or None")
        return None if math.isnan(value) else float(value)
    raise InvalidNameError(f"metadata {where!r} is a {type(value).__name__}, which JSON cannot hold")
