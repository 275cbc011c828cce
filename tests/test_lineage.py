"""lineage.py: the graph around a version, and its forms."""

from __future__ import annotations

import json
import shutil
import subprocess
import xml.etree.ElementTree
from typing import Any

import pytest
from programs import Program

import artifactfs as afs
from artifactfs import lineage
from artifactfs.artifact import Artifact
from artifactfs.lineage import Edge, dot, svg, text_tree, trace
from artifactfs.names import parse
from artifactfs.store.native import NativeStore

pytestmark = pytest.mark.usefixtures("store")


def made(name: str, text: str, type: str = "dataset") -> Artifact:
    artifact = Artifact(name, type)
    with artifact.new_file("a.txt") as file:
        file.write(text)
    return artifact


@pytest.fixture
def pipeline(store: NativeStore) -> NativeStore:
    """raw:v0 -> prepare -> clean:v0 -> train -> net:v0 -> eval; clean:v1 is made over v0; net is linked."""
    with afs.init(id="collect", job_type="collect") as run:
        run.log_artifact(made("raw", "1"))
    with afs.init(id="prepare", job_type="prepare") as run:
        run.use_artifact("raw:latest")
        run.log_artifact(made("clean", "1"))
    draft = afs.Api().artifact("clean").new_draft()
    with draft.new_file("more") as file:
        file.write("x")
    with afs.init(id="repair") as run:
        run.log_artifact(draft)
    with afs.init(id="train", job_type="train <fast>") as run:
        run.use_artifact("clean:v0")
        run.use_artifact("clean:v0")
        net = run.log_artifact(made("net", "1", "model")).wait()
        run.use_artifact(net)
    net.link("wandb-registry-model/net")
    with afs.init(id="eval") as run:
        run.use_artifact("wandb-registry-model/net:latest")
    return store


def graph(store: NativeStore, name: str, depth: int = 6) -> lineage.Graph:
    return trace(store, store.version(parse(f"acme/vision/{name}")), depth)


def test_the_graph(pipeline: NativeStore) -> None:
    found = graph(pipeline, "clean:v0")
    short = {name.removeprefix("acme/vision/") for name in found.nodes}
    assert short == {
        "clean:v0",
        "prepare",
        "raw:v0",
        "collect",
        "clean:v1",
        "train",
        "net:v0",
        "eval",
        "acme/wandb-registry-model/net:v0",
    } - {"clean:v1"}
    assert Edge("acme/vision/raw:v0", "acme/vision/prepare", "used") in found.edges
    assert Edge("acme/vision/train", "acme/vision/net:v0", "logged") in found.edges
    assert Edge("acme/vision/net:v0", "acme/wandb-registry-model/net:v0", "linked") in found.edges
    assert len(set(found.edges)) == len(found.edges) and not found.cut
    assert Edge("acme/vision/clean:v0", "acme/vision/clean:v1", "base") in graph(pipeline, "clean:v1").edges
    near = graph(pipeline, "clean:v0", 1)
    assert near.cut and len(near.nodes) == 3
    link = trace(pipeline, pipeline.version(parse("acme/wandb-registry-model/net:v0")))
    assert link.root == "acme/vision/net:v0"


def test_the_tree(pipeline: NativeStore) -> None:
    lines = list(text_tree(graph(pipeline, "clean:v0")))
    assert lines == [
        "acme/vision/clean:v0 (dataset)",
        "came from:",
        "└─ logged by run acme/vision/prepare (prepare)",
        "   └─ which used acme/vision/raw:v0 (dataset)",
        "      └─ logged by run acme/vision/collect (collect)",
        "led to:",
        "└─ used by run acme/vision/train (train <fast>)",
        "   └─ which logged acme/vision/net:v0 (model)",
        "      ├─ used by run acme/vision/eval",
        "      ├─ used by run acme/vision/train (train <fast>) (see above)",
        "      └─ linked as acme/wandb-registry-model/net:v0 (model)",
    ]
    alone = made("alone", "x")
    alone.save()
    assert "used by" not in "".join(text_tree(graph(pipeline, "alone:v0")))


def test_deleted_versions_and_runs(pipeline: NativeStore) -> None:
    pipeline.delete_version(parse("acme/vision/raw:v0"))
    pipeline.objects.delete("runs/acme/vision/prepare.json")
    text = "\n".join(text_tree(graph(pipeline, "clean:v0")))
    assert "prepare [deleted]" in text
    assert "raw" not in text
    assert any(node.gone for node in graph(pipeline, "clean:v0").nodes.values())


def test_it_is_bounded(pipeline: NativeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lineage, "MAX_NODES", 4)
    found = graph(pipeline, "clean:v0")
    assert len(found.nodes) == 4 and found.cut
    assert list(text_tree(found))[-1].startswith("… and more")


def test_pictures(pipeline: NativeStore) -> None:
    found = graph(pipeline, "clean:v0")
    picture = xml.etree.ElementTree.fromstring("".join(svg(found)))
    titles = [title.text for title in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert "run acme/vision/train (train <fast>)" in titles and len(titles) == len(found.nodes) + len(found.edges)
    boxes = {group[0].text: int(group[1].get("x", "")) for group in picture.iter("{http://www.w3.org/2000/svg}g")}
    assert boxes["acme/vision/raw:v0 (dataset)"] < boxes["acme/vision/clean:v0 (dataset)"] < boxes["acme/vision/net:v0 (model)"]
    text = "\n".join(dot(found))
    assert text.count("->") == len(found.edges) and '"acme/vision/raw:v0" -> "acme/vision/prepare"' in text
    if program := shutil.which("dot"):
        subprocess.run([program, "-Tsvg"], input=text, text=True, check=True, capture_output=True)


def test_the_command(afs: Program, pipeline: NativeStore) -> None:
    document: dict[str, Any] = afs("lineage", "clean:v0", "--json").document
    assert document["logged_by"]["id"] == "prepare" and [run["id"] for run in document["used_by"]] == ["train"]
    assert {node["kind"] for node in document["nodes"]} == {"version", "run", "link"} and document["root"] == document["name"]
    assert {edge["what"] for edge in document["edges"]} == {"logged", "used", "linked"}
    assert "└─ used by run" in afs("lineage", "clean:v0").out
    assert afs("lineage", "clean:v0", "--format", "svg").out.startswith("<svg")
    assert afs("lineage", "clean:v0", "--format", "dot").out.startswith("digraph")
    assert "see --depth" in afs("lineage", "clean:v0", "--depth", "1").out
    assert json.loads(afs("runs", "--json").out)[0]["group"] == ""
