"""Lineage: which runs logged and used which versions, as a graph around one version, and its forms: a text tree, DOT and SVG.

A version leads to the runs that used it, and they to what they logged; a link leads from its source. The graph is walked in both
directions, to a number of steps and of nodes, so that a data set that everybody uses does not make a picture of everything.
"""

from __future__ import annotations

import dataclasses
import html
import json
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from artifactfs.errors import IntegrityError, NotFoundError
from artifactfs.model import Run, Version
from artifactfs.names import parse
from artifactfs.store import Store

MAX_NODES = 500
"""Nodes of a graph at most: more is no picture any more."""

Kind = Literal["version", "run", "link"]


class Node(NamedTuple):
    """A version, a run or a link by its name. ``detail`` is a version's type, a run's job type."""

    kind: Kind
    name: str
    detail: str
    gone: bool = False
    """It is named by others, but deleted."""


class Edge(NamedTuple):
    """What comes from what: a version from a run that logged it, a run from a version that it used."""

    source: str
    target: str
    what: Literal["logged", "used", "linked", "base"]


@dataclasses.dataclass(slots=True)
class Graph:
    """``nodes`` by name. ``root`` is the version that was asked for. ``cut``: there was more than could be walked."""

    root: str
    nodes: dict[str, Node] = dataclasses.field(default_factory=dict)
    edges: list[Edge] = dataclasses.field(default_factory=list)
    cut: bool = False

    def document(self) -> dict[str, Any]:
        """As ``--json`` shows it."""
        return {
            "root": self.root,
            "nodes": [node._asdict() for node in self.nodes.values()],
            "edges": [edge._asdict() for edge in self.edges],
            "cut": self.cut,
        }


def trace(store: Store, version: Version, depth: int = 6) -> Graph:
    """The graph around a version: up to ``depth`` steps (a run is one) to what it came from, and to what came of it."""
    return _Walk(store, version.origin, depth).graph


class _Walk:
    """One walk, breadth first, so that what is near is there when it is cut."""

    def __init__(self, store: Store, root: Version, depth: int) -> None:
        self.graph = Graph(root.qualified_name)
        self._store = store
        self._versions: dict[str, Version | None] = {root.qualified_name: root}
        self._runs: dict[str, Run | None] = {}
        self._edges: set[Edge] = set()
        self._add(_version_node(root.qualified_name, root))
        for back in (True, False):
            self._walk(root.qualified_name, back, depth)

    def _walk(self, root: str, back: bool, depth: int) -> None:
        pending = deque([(root, 0)])
        seen = {root}
        while pending:
            name, steps = pending.popleft()
            for edge, node in self._around(name, back):
                if steps >= depth or not self._add(node):
                    self.graph.cut = True
                    continue
                if edge not in self._edges:
                    self._edges.add(edge)
                    self.graph.edges.append(edge)
                if node.name not in seen:
                    seen.add(node.name)
                    pending.append((node.name, steps + 1))

    def _add(self, node: Node) -> bool:
        if node.name not in self.graph.nodes and len(self.graph.nodes) >= MAX_NODES:
            return False
        self.graph.nodes.setdefault(node.name, node)
        return True

    def _around(self, name: str, back: bool) -> Iterator[tuple[Edge, Node]]:
        """What a node comes from, or what comes of it."""
        kind = self.graph.nodes[name].kind
        if kind == "run":
            yield from self._around_run(name, back)
        elif kind == "version":
            version = self._version(name)
            if version is not None:
                yield from self._before(version) if back else self._after(version)

    def _around_run(self, name: str, back: bool) -> Iterator[tuple[Edge, Node]]:
        run = self._run(name)
        for other in (run.used if back else run.logged) if run is not None else ():
            node = _version_node(other, self._version(other))
            yield (Edge(other, name, "used") if back else Edge(name, other, "logged")), node

    def _before(self, version: Version) -> Iterator[tuple[Edge, Node]]:
        name = version.qualified_name
        if version.run:
            yield Edge(version.run, name, "logged"), _run_node(version.run, self._run(version.run))
        if version.base is not None:
            base = f"{version.entity}/{version.project}/{version.collection}:v{version.base}"
            yield Edge(base, name, "base"), _version_node(base, self._version(base))

    def _after(self, version: Version) -> Iterator[tuple[Edge, Node]]:
        name = version.qualified_name
        for run in self._store.used_by(version):
            self._runs[run.path] = run
            yield Edge(name, run.path, "used"), _run_node(run.path, run)
        for link in self._store.links_of(version):
            if link.state == "COMMITTED":
                yield Edge(name, link.qualified_name, "linked"), Node("link", link.qualified_name, link.type)

    def _version(self, name: str) -> Version | None:
        if name not in self._versions:
            try:
                self._versions[name] = self._store.version(parse(name)).origin
            except (NotFoundError, IntegrityError, ValueError):
                self._versions[name] = None
        return self._versions[name]

    def _run(self, path: str) -> Run | None:
        if path not in self._runs:
            try:
                entity, project, id = path.split("/")
                self._runs[path] = self._store.run(entity, project, id)
            except (NotFoundError, IntegrityError, ValueError):
                self._runs[path] = None
        return self._runs[path]


def _version_node(name: str, version: Version | None) -> Node:
    return Node("version", name, version.type if version else "", version is None)


def _run_node(path: str, run: Run | None) -> Node:
    return Node("run", path, (run.job_type or run.name) if run else "", run is None)


# Text


def text_tree(graph: Graph) -> Iterator[str]:
    """Two trees of lines: what the version came from, and what came of it. What was shown already is not opened again."""
    yield _label(graph.nodes[graph.root])
    before = [edge for edge in graph.edges if edge.target == graph.root]
    after = [edge for edge in graph.edges if edge.source == graph.root]
    for title, edges, back in (("came from", before, True), ("led to", after, False)):
        if edges:
            yield f"{title}:"
            yield from _branches(graph, graph.root, back, "", {graph.root})
    if not graph.edges:
        yield "no run logged or used it"
    if graph.cut:
        yield "… and more: see --depth"


def _branches(graph: Graph, name: str, back: bool, indent: str, shown: set[str]) -> Iterator[str]:
    edges = [edge for edge in graph.edges if (edge.target if back else edge.source) == name]
    for at, edge in enumerate(edges):
        other = edge.source if back else edge.target
        last = at == len(edges) - 1
        again = other in shown
        above = " (see above)" if again else ""
        yield f"{indent}{'└─' if last else '├─'} {_verb(edge, back)} {_label(graph.nodes[other])}{above}"
        if not again:
            shown.add(other)
            yield from _branches(graph, other, back, indent + ("   " if last else "│  "), shown)


def _verb(edge: Edge, back: bool) -> str:
    words = {
        "logged": ("logged by", "which logged"),
        "used": ("which used", "used by"),
        "linked": ("linked from", "linked as"),
        "base": ("made over", "base of"),
    }
    return words[edge.what][0 if back else 1]


def _label(node: Node) -> str:
    kind = "run " if node.kind == "run" else ""
    detail = f" ({node.detail})" if node.detail else ""
    return f"{kind}{node.name}{detail}{' [deleted]' if node.gone else ''}"


# Pictures


def dot(graph: Graph) -> Iterator[str]:
    """The graph in Graphviz' language."""
    yield "digraph lineage {"
    yield "  rankdir=LR;"
    yield '  node [fontname="sans-serif", fontsize=10, style=filled];'
    for node in graph.nodes.values():
        shape = {"version": "box", "run": "ellipse", "link": "note"}[node.kind]
        label = json.dumps("\n".join(_lines(node)), ensure_ascii=False)
        bold = ", penwidth=2" if node.name == graph.root else ""
        yield f'  {_dot_id(node.name)} [label={label}, shape={shape}, fillcolor="{_COLOURS[node.kind]}"{bold}];'
    for edge in graph.edges:
        style = "" if edge.what in ("logged", "used") else f" [style=dashed, label={json.dumps(edge.what)}]"
        yield f"  {_dot_id(edge.source)} -> {_dot_id(edge.target)}{style};"
    yield "}"


def _dot_id(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)


_COLOURS = {"version": "#dbe9f6", "run": "#fde7c8", "link": "#e2f0d9"}
_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 220, 40, 70, 18, 20
_CHARS = 34
"""Characters of a label that fit into a box."""


def svg(graph: Graph) -> Iterator[str]:
    """The graph as a picture: sources left, results right, one column for each step."""
    columns = _columns(graph)
    places = {
        name: (_MARGIN + x * (_WIDTH + _GAP_X), _MARGIN + y * (_HEIGHT + _GAP_Y))
        for x, column in enumerate(columns)
        for y, name in enumerate(column)
    }
    width = 2 * _MARGIN + len(columns) * (_WIDTH + _GAP_X) - _GAP_X
    height = 2 * _MARGIN + max(map(len, columns)) * (_HEIGHT + _GAP_Y) - _GAP_Y
    yield f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    yield "<style>text{font:11px sans-serif} .d{fill:#555} path{fill:none;stroke:#777} .x{stroke-dasharray:4 3}</style>"
    for edge in graph.edges:
        yield _svg_edge(edge, places)
    for node in graph.nodes.values():
        yield from _svg_node(node, *places[node.name], node.name == graph.root)
    yield "</svg>"


def _columns(graph: Graph) -> list[list[str]]:
    """The names by column: each node right of all that it comes from, but for a run, which stands left of what it logged even
    if it used that, too; what else goes round in a circle stands where it was met."""
    sources: dict[str, list[str]] = {name: [] for name in graph.nodes}
    logged = {(edge.source, edge.target) for edge in graph.edges if edge.what == "logged"}
    for edge in graph.edges:
        if edge.what != "used" or (edge.target, edge.source) not in logged:
            sources[edge.target].append(edge.source)
    ranks: dict[str, int] = {}
    for start in graph.nodes:
        stack: list[tuple[str, Iterator[str]]] = [(start, iter(sources[start]))] if start not in ranks else []
        under_way = {start}
        while stack:
            name, rest = stack[-1]
            before = next((it for it in rest if it not in ranks and it not in under_way), None)
            if before is not None:
                under_way.add(before)
                stack.append((before, iter(sources[before])))
                continue
            ranks[name] = 1 + max((ranks[it] for it in sources[name] if it in ranks), default=-1)
            stack.pop()
    columns: list[list[str]] = [[] for _ in range(max(ranks.values()) + 1)]
    for name in graph.nodes:
        columns[ranks[name]].append(name)
    return columns


def _svg_edge(edge: Edge, places: dict[str, tuple[int, int]]) -> str:
    (x1, y1), (x2, y2) = places[edge.source], places[edge.target]
    x1, y1, y2 = x1 + _WIDTH, y1 + _HEIGHT // 2, y2 + _HEIGHT // 2
    dashed = "" if edge.what in ("logged", "used") else ' class="x"'
    bend = _GAP_X // 2
    line = f'<path{dashed} d="M{x1} {y1}C{x1 + bend} {y1} {x2 - bend} {y2} {x2} {y2}"><title>{edge.what}</title></path>'
    return f'{line}<path d="M{x2 - 6} {y2 - 4}L{x2} {y2}L{x2 - 6} {y2 + 4}"/>'


def _svg_node(node: Node, x: int, y: int, root: bool) -> Iterator[str]:
    radius = _HEIGHT // 2 if node.kind == "run" else 4
    stroke = 'stroke="#000" stroke-width="2"' if root else 'stroke="#999"'
    yield f"<g><title>{html.escape(_label(node))}</title>"
    yield (f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="{radius}" fill="{_COLOURS[node.kind]}" {stroke}/>')
    for at, line in enumerate(_lines(node)):
        text = line if len(line) <= _CHARS else f"…{line[1 - _CHARS :]}"
        style = ' class="d"' if at else ""
        yield f'<text{style} x="{x + _WIDTH // 2}" y="{y + 17 + 14 * at}" text-anchor="middle">{html.escape(text)}</text>'
    yield "</g>"


def _lines(node: Node) -> Sequence[str]:
    """The node's name without its entity and project where they are long, and what it is."""
    detail = " ".join(filter(None, [node.kind, f"({node.detail})" if node.detail else "", "deleted" if node.gone else ""]))
    return node.name, detail
