"""``docs/api.md`` is made from the code: every public property and method with its signature and errors; nothing of W&B's misses.

``python tests/test_api_docs.py`` writes the page anew.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import artifactfs as afs
from artifactfs import errors
from artifactfs.api import Project, Registry
from artifactfs.artifact import ArtifactCollection
from artifactfs.manifest import ArtifactFile
from artifactfs.paging import Pages

PAGE = Path(__file__).parents[1] / "docs/api.md"

PROPERTIES = [
    "id",
    "entity",
    "project",
    "name",
    "qualified_name",
    "version",
    "collection",
    "source_entity",
    "source_project",
    "source_name",
    "source_qualified_name",
    "source_version",
    "source_collection",
    "is_link",
    "linked_artifacts",
    "source_artifact",
    "type",
    "url",
    "description",
    "metadata",
    "ttl",
    "aliases",
    "tags",
    "use_as",
    "state",
    "manifest",
    "digest",
    "size",
    "commit_hash",
    "file_count",
    "created_at",
    "updated_at",
    "linked_at",
    "history_step",
    "distributed_id",
    "incremental",
    "storage_region",
    "digest_algorithm",
]
METHODS = [
    "add_dir",
    "add_file",
    "add_reference",
    "checkout",
    "delete",
    "download",
    "file",
    "files",
    "finalize",
    "get_added_local_path_name",
    "get_entry",
    "get_path",
    "is_draft",
    "json_encode",
    "link",
    "logged_by",
    "new_draft",
    "new_file",
    "remove",
    "save",
    "unlink",
    "used_by",
    "verify",
    "wait",
]
MEDIA = ["add", "get", "__getitem__", "__setitem__"]
CONSTRUCTOR = ["name", "type", "description", "metadata", "incremental", "use_as", "storage_region", "digest_algorithm"]

# What W&B's members take, by section 6 to 11 of the model: positions and names of a script's calls must fit.
SIGNATURES = {
    "add_dir": "local_path name skip_cache policy merge",
    "add_file": "local_path name is_tmp skip_cache policy overwrite",
    "add_reference": "uri name checksum max_objects",
    "checkout": "root",
    "delete": "delete_aliases",
    "download": "root allow_missing_references skip_cache path_prefix multipart",
    "file": "root",
    "files": "names per_page start",
    "get_added_local_path_name": "local_path",
    "get_entry": "name",
    "get_path": "name",
    "link": "target_path aliases",
    "new_file": "name mode encoding policy",
    "remove": "item",
    "save": "project",
    "verify": "root",
    "wait": "timeout",
}
RUN = {
    "log_artifact": "artifact_or_path name type aliases tags",
    "use_artifact": "artifact_or_name type aliases",
    "upsert_artifact": "artifact_or_path name type aliases distributed_id",
    "finish_artifact": "artifact_or_path name type aliases distributed_id",
    "link_artifact": "artifact target_path aliases",
}
API = {
    "artifact": "name type",
    "artifacts": "type_name name order per_page tags start",
    "artifact_types": "project",
    "artifact_type": "type_name project",
    "artifact_collections": "project_name type_name per_page",
    "artifact_collection": "type_name name",
    "artifact_exists": "name type",
    "artifact_collection_exists": "name type",
    "run": "path",
    "runs": "path",
    "registries": "organization filter per_page",
    "registry": "name organization",
    "projects": "entity per_page",
}
COLLECTION = [
    "id",
    "entity",
    "project",
    "name",
    "type",
    "description",
    "tags",
    "aliases",
    "created_at",
    "updated_at",
    "artifacts",
    "is_sequence",
    "save",
    "delete",
    "change_type",
]
ENTRY = [
    "path",
    "digest",
    "ref",
    "size",
    "extra",
    "birth_artifact_id",
    "local_path",
    "skip_cache",
    "download",
    "ref_target",
    "ref_url",
    "digest_algorithm",
]

CLASSES: list[tuple[type, str]] = [
    (afs.Artifact, "A draft, or a version of a collection."),
    (ArtifactCollection, "`artifact.collection`, `Api().artifact_collection(…)`."),
    (afs.ArtifactManifest, "`artifact.manifest`."),
    (afs.ArtifactManifestEntry, "`artifact.manifest.entries[path]`, `artifact.get_entry(path)`."),
    (ArtifactFile, "What `artifact.files()` lists."),
    (afs.Run, "What `init(…)` starts."),
    (afs.Api, "Look-ups without a run."),
    (afs.ArtifactType, "`Api().artifact_type(…)`."),
    (Project, "What `Api().projects()` lists."),
    (Registry, "`Api().registry(…)`."),
    (Pages, "What listings are: sequences that are read in pages."),
]

_HEAD = """# The Python API

This page is made from the code by `python tests/test_api_docs.py`; a test fails when it is not up to date, and when anything of
W&B's `Artifact` is missing or takes other arguments. What differs from W&B's client in behaviour is in
[differences.md](differences.md).

Errors: every one is an `ArtifactFSError`. `UsageError` and `InvalidNameError` are a `ValueError`, `VerifyError` too,
`ArtifactStatusError` with its two kinds an `AttributeError`, `WaitTimeoutError` a `TimeoutError`. *Errors* names what a member
raises for what a caller did; any of them that reads or writes the store may also raise `NetworkError`, `IntegrityError`,
`NotPermittedError` and `StorageFullError`.
"""

_ERROR = re.compile(r"\b[A-Z][A-Za-z]*Error\b")


def members(kind: type) -> Iterator[tuple[str, Any]]:
    """The public members in the order of the source, inherited ones of ours not, and the constructor first."""
    own = kind.__dict__.get("__init__")
    if inspect.isfunction(own) and own.__code__.co_filename.endswith(".py"):  # not one that dataclasses made
        yield "__init__", kind.__dict__["__init__"]
    for name, value in kind.__dict__.items():
        shown = not name.startswith("_") or (name in MEDIA and kind is afs.Artifact)
        if shown and isinstance(value, (property, types.FunctionType, functools.cached_property, types.MemberDescriptorType)):
            yield name, value


def function_of(value: Any) -> Callable[..., Any] | None:
    if isinstance(value, property):
        return value.fget
    return value if inspect.isfunction(value) else None


def signature(name: str, value: Any) -> str:
    if isinstance(value, property):
        assert value.fget is not None
        returned = inspect.signature(value.fget).return_annotation
        return f"{name}: {returned}" + (", can be set" if value.fset else "")
    if not inspect.isfunction(value):
        return name
    found = inspect.signature(value)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in list(found.parameters.values())[1:]]
    shown = str(found.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
    returned = found.return_annotation
    return f"{name}{shown}" + ("" if returned in ("None", inspect.Signature.empty) else f" -> {returned}")


def raised(value: Any) -> list[str]:
    """The errors that the text of a member names, and those of the checks that it begins with."""
    function = inspect.unwrap(function_of(value)) if function_of(value) else None
    if function is None:
        return []
    source = inspect.getsource(function)
    found = _ERROR.findall(inspect.getdoc(value) or "")
    found += ["ArtifactNotLoggedError"] if "self._need(" in source else []
    found += ["ArtifactFinalizedError"] if "self._need_open(" in source else []
    found += ["UsageError"] if "self._check_running(" in source else []
    if isinstance(value, property) and value.fset:
        found += re.findall(r"raise (\w+Error)", inspect.getsource(value.fset))
    return sorted(set(found))


def what(value: Any) -> str:
    text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
    return re.sub(r":\w+:`([^`]*)`", r"`\1`", text).replace("``", "`")


def page() -> str:
    parts = [_HEAD]
    for kind, text in CLASSES:
        parts.append(f"\n## {kind.__name__}\n\n{text}\n\n| member | errors | what |\n|---|---|---|\n")
        for name, value in members(kind):
            shown = signature(kind.__name__ if name == "__init__" else name, value).replace("|", "\\|")
            row = (f"`{shown}`", ", ".join(f"`{error}`" for error in raised(value)), what(value).replace("|", "\\|"))
            parts.append(f"| {' | '.join(row)} |\n".replace("|  |", "| |"))
    functions = {"init": afs.init, "mount": afs.mount, "stage": afs.stage}
    parts.append("\n## Functions\n\n| function | what |\n|---|---|\n")
    for name, function in functions.items():
        found = inspect.signature(function)
        bare = found.replace(
            parameters=[p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()],
            return_annotation=inspect.Signature.empty,
        )
        parts.append(f"| `{name}{bare}` | {what(function)} |\n")
    return "".join(parts)


def parameters_of(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)[1:]


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "python tests/test_api_docs.py writes it anew"


@pytest.mark.parametrize("name", PROPERTIES)
def test_every_property(name: str) -> None:
    assert isinstance(inspect.getattr_static(afs.Artifact, name), property) and f"| `{name}: " in PAGE.read_text()


@pytest.mark.parametrize("name", METHODS)
def test_every_method(name: str) -> None:
    assert inspect.isfunction(inspect.getattr_static(afs.Artifact, name)) and f"| `{name}(" in PAGE.read_text()


@pytest.mark.skipif(importlib.util.find_spec("artifactfs.media") is None, reason="the package has no media objects")
@pytest.mark.parametrize("name", MEDIA)
def test_every_method_of_media(name: str) -> None:
    assert inspect.isfunction(inspect.getattr_static(afs.Artifact, name)) and f"| `{name}(" in PAGE.read_text()


@pytest.mark.parametrize(
    "kind, name, expected",
    [
        (kind, name, expected.split())
        for kind, wanted in ((afs.Artifact, SIGNATURES), (afs.Run, RUN), (afs.Api, API))
        for name, expected in wanted.items()
    ],
    ids=lambda it: it if isinstance(it, str) else "",
)
def test_parameters_come_in_wandbs_order(kind: type, name: str, expected: list[str]) -> None:
    found = parameters_of(getattr(kind, name))
    assert found[: len(expected)] == expected
    assert all(
        p.default is not inspect.Parameter.empty
        for p in list(inspect.signature(getattr(kind, name)).parameters.values())[len(expected) + 1 :]
    )


def test_the_constructor() -> None:
    assert parameters_of(afs.Artifact.__init__) == CONSTRUCTOR


@pytest.mark.parametrize("name", COLLECTION)
def test_every_member_of_a_collection(name: str) -> None:
    assert name == "description" or hasattr(ArtifactCollection, name)


@pytest.mark.parametrize("name", ENTRY)
def test_every_member_of_an_entry(name: str) -> None:
    assert hasattr(afs.ArtifactManifestEntry, name)


def test_errors_exist_and_members_are_described() -> None:
    known = {name for name in dir(errors) if name.endswith("Error")} | {"KeyError", "FileNotFoundError", "TypeError"}
    known |= {"ValueError", "TimeoutError", "AttributeError", "IndexError"}
    for kind, _ in CLASSES:
        for name, value in members(kind):
            assert set(raised(value)) <= known, (kind, name)
            assert name == "__init__" or inspect.isdatadescriptor(value) or inspect.getdoc(value), (kind, name)


if __name__ == "__main__":
    PAGE.write_text(page())
