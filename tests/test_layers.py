"""The layers of ARCHITECTURE.md hold: the imports are read, and every one goes downward."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "artifactfs"

# The only module or package that may import each of these.
IMPORTERS = {
    "fuse": "artifactfs.mount",
    "mfusepy": "artifactfs.mount",
    "fsspec": "artifactfs.filesystem",
    "click": "artifactfs.cli",
    "rich": "artifactfs.cli",
    "requests": "artifactfs.http",
    "boto3": "artifactfs.buckets",
    "botocore": "artifactfs.buckets",
    "obstore": "artifactfs.buckets",
    "starlette": "artifactfs.serve",
    "uvicorn": "artifactfs.serve",
    "graphql": "artifactfs.serve",
    "prometheus_client": "artifactfs.serve",
    "ijson": "artifactfs.jsonstream",
}
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "constants", "types", "misc", "interfaces"}


class Import(NamedTuple):
    importer: str
    imported: str
    line: int
    at_top: bool


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports_of(name: str, path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_bytes(), str(path))
    functions = (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    hidden = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, alias.name, node.lineno, id(node) not in hidden)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the full name"
            assert node.module
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield Import(name, full if full in MODULES else node.module, node.lineno, id(node) not in hidden)


IMPORTS = [found for name, path in MODULES.items() for found in imports_of(name, path)]


def layers() -> dict[str, tuple[int, int, int]]:
    """(layer, group, place) of each member of the package, from the table of ARCHITECTURE.md.

    There ``a < b`` says that ``b`` may import ``a`` although both are of one layer; a comma parts groups that may not.
    """
    table: dict[str, tuple[int, int, int]] = {}
    for line in (ROOT / "ARCHITECTURE.md").read_text().splitlines():
        if match := re.match(r"L([0-9])  +([a-z_]+(?:(?: <|,) [a-z_]+)*)(?: {2,}|$)", line):
            for chain in match[2].split(", "):
                group = len(table)
                for place, member in enumerate(chain.split(" < ")):
                    assert member not in table, f"{member} stands twice in the layers of ARCHITECTURE.md"
                    table[member] = (int(match[1]), group, place)
    return table


LAYERS = layers()


def member(module: str) -> str:
    """``store`` for ``artifactfs.store.native``; "" for the package itself."""
    return (*module.split("."), "")[1]


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def test_every_module_has_a_layer() -> None:
    missing = {member(name) for name in MODULES} - set(LAYERS) - {""}
    assert not missing, f"not in the layers of ARCHITECTURE.md: {sorted(missing)}"


@pytest.mark.parametrize("name", [name for name in MODULES if name != "artifactfs"])
def test_imports_go_downward(name: str) -> None:
    """Into a lower layer, into its own package, or to an earlier member of its group. The root may import any layer."""
    layer, group, place = LAYERS[member(name)]
    for found in IMPORTS:
        if found.importer != name or not is_within(found.imported, "artifactfs") or member(found.imported) == member(name):
            continue
        target = member(found.imported)
        if not target:  # the package's root: only its version may be read, it is a leaf at run time
            assert layer >= 4, f"{name}:{found.line} imports the package's root"
            continue
        below, its_group, its_place = LAYERS[target]
        assert below < layer or ((below, its_group) == (layer, group) and its_place < place), (
            f"{name}:{found.line} (L{layer}) imports {found.imported} (L{below})"
        )


def test_no_import_cycles() -> None:
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for found in IMPORTS:
        if found.imported in MODULES and found.at_top and found.importer != "artifactfs":
            graph[found.importer].add(found.imported)
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"import cycle: {' -> '.join((*path, name))}"
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("library", IMPORTERS)
def test_single_importer(library: str) -> None:
    wrong = [
        f"{i.importer}:{i.line}"
        for i in IMPORTS
        if is_within(i.imported, library) and not is_within(i.importer, IMPORTERS[library])
    ]
    assert not wrong, f"only {IMPORTERS[library]} may import {library}: {wrong}"


def test_no_module_is_a_drawer() -> None:
    assert not [name for name in MODULES if name.rpartition(".")[2] in BANNED_NAMES]


def test_hidden_imports_say_why() -> None:
    """An import inside a function has a comment on its line or above it (what it costs, or why it may be missing)."""
    silent = []
    for found in IMPORTS:
        if not found.at_top:
            lines = MODULES[found.importer].read_text().splitlines()[: found.line]
            block = list(itertools.takewhile(lambda line: "import " in line, (line for line in reversed(lines))))
            above = lines[-len(block) - 1] if len(block) < len(lines) else ""
            if not any("#" in line for line in (*block, above)):
                silent.append(f"{found.importer}:{found.line}")
    assert not silent


def test_architecture_is_short() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 150
