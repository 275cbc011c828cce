"""``wandb://`` and the real client on one server: what one of them makes, the other has byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounting import needs_fuse
from serving_fixture import PROGRAM, WandbServer, run_client, start_server

Afs = Callable[..., str]
FILES = {
    "a.txt": b"one",
    "empty": b"",
    "deep/er/b.bin": bytes(range(256)) * 300,
    "ä ö/x#y?%.txt": "ü".encode(),
    "large.bin": os.urandom((5 << 20) + 17),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WandbServer]:
    """One server for all, each of whose tests has a collection of its own."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "data").mkdir()
    with start_server(str(folder / "store"), folder / "data") as server:
        yield server
        assert not server.tracebacks()


@pytest.fixture
def afs(server: WandbServer) -> Afs:
    """The program with the server as its store."""

    def run(*arguments: str, code: int = 0) -> str:
        environ = {
            **os.environ,
            "ARTIFACTFS_STORE": f"wandb://{server.host}",
            "WANDB_API_KEY": server.key,
            "WANDB_ENTITY": "acme",
            "WANDB_PROJECT": "vision",
        }
        done = subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, timeout=90, env=environ, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    return run


def write(root: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


def same(first: Path, second: Path) -> None:
    done = subprocess.run(["diff", "-r", str(first), str(second)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


LOG = """
import datetime, json, sys, wandb
with wandb.init(entity="acme", project="vision", id=sys.argv[2], config={"lr": 0.1}, job_type="train") as run:
    artifact = wandb.Artifact(sys.argv[1], "dataset", description="by the client", metadata={"k": [1, None]})
    artifact.add_dir("in")
    artifact.ttl = datetime.timedelta(days=3)
    run.log_artifact(artifact, aliases=["best"], tags=["t one"]).wait()
"""

GET = """
import json, sys, wandb
artifact = wandb.Api().artifact(f"acme/vision/{sys.argv[1]}")
artifact.download("out")
by = artifact.logged_by()
print(json.dumps({
    "version": artifact.version, "aliases": sorted(artifact.aliases), "digest": artifact.digest, "size": artifact.size,
    "metadata": artifact.metadata, "description": artifact.description, "tags": artifact.tags, "type": artifact.type,
    "ttl": artifact.ttl.total_seconds() if artifact.ttl else None, "by": by.id if by else None,
    "config": dict(by.config) if by else None, "state": by.state if by else None,
    "used": sorted(run.id for run in artifact.used_by()),
}))
"""


@needs_fuse
def test_what_the_client_logged_is_got_and_mounted(server: WandbServer, afs: Afs, tmp_path: Path) -> None:
    home = tmp_path / "home"
    write(home / "in", FILES)
    run_client(server, home, LOG, "theirs", "run-1")
    afs("get", "theirs:best", str(tmp_path / "got"))
    same(home / "in", tmp_path / "got")
    afs("verify", "theirs:best", str(tmp_path / "got"))
    where = tmp_path / "mount"
    where.mkdir()
    afs("mount", "theirs:latest", str(where))
    try:
        same(home / "in", where)
        assert os.getxattr(where / "large.bin", "user.artifactfs.verified") == b"true"
    finally:
        afs("unmount", str(where))
    shown = json.loads(afs("--json", "info", "theirs:best"))
    assert (shown["description"], shown["metadata"], shown["tags"]) == ("by the client", {"k": [1, None]}, ["t one"])
    assert shown["run"] == "acme/vision/run-1" and shown["ttl"] == 3 * 86400
    [run] = [run for run in json.loads(afs("--json", "runs")) if run["id"] == "run-1"]
    assert run["logged"] == ["acme/vision/theirs:v0"] and run["config"] == {"lr": 0.1} and run["job_type"] == "train"


@needs_fuse
def test_what_was_logged_and_staged_is_the_clients(server: WandbServer, afs: Afs, tmp_path: Path) -> None:
    root = write(tmp_path / "in", FILES)
    afs("log", "ours", str(root), "--alias", "best", "--tag", "t", "--metadata", '{"k": 1}', "--description", "d")
    home = tmp_path / "home"
    home.mkdir()
    told = json.loads(run_client(server, home, GET, "ours:best").splitlines()[-1])
    same(root, home / "out")
    assert (told["version"], told["aliases"], told["metadata"], told["tags"]) == ("v0", ["best", "latest"], {"k": 1}, ["t"])
    assert told["size"] == sum(map(len, FILES.values())) and told["description"] == "d" and told["type"] == "dataset"
    where = tmp_path / "stage"
    where.mkdir()
    afs("stage", "ours", str(where))
    try:
        for below in (root, where):
            with open(below / "large.bin", "r+b") as file:
                file.seek(2 << 20)
                file.write(b"changed in the middle")
            (below / "a.txt").unlink()
            (below / "deep/er/b.bin").rename(below / "deep/moved")
            (below / "new").mkdir()
            (below / "new/file").write_bytes(b"new" * 50_000)
            (below / "deep/er").rmdir()
    finally:
        assert "ours:v1" in afs("unmount", str(where))
    other = tmp_path / "other"
    other.mkdir()
    told = json.loads(run_client(server, other, GET, "ours:latest").splitlines()[-1])
    assert told["version"] == "v1"
    same(root, other / "out")


OURS = """
import json, sys
import artifactfs as wandb
with wandb.init(entity="acme", project="vision", id="run-a", config={"lr": 0.5}, job_type="train", group="g") as run:
    artifact = wandb.Artifact("api", "dataset", metadata={"k": 1})
    artifact.add(wandb.Table(columns=["a", "b"], data=[[1, "x"], [2, "y"]]), "table")
    with artifact.new_file("x") as file:
        file.write("x")
    run.log_artifact(artifact, aliases=["best"]).wait()
    for number in range(3):
        part = wandb.Artifact("together", "dataset")
        with part.new_file(f"{number}.txt") as file:
            file.write(str(number))
        (run.finish_artifact if number == 2 else run.upsert_artifact)(part, distributed_id="d").wait()
with wandb.init(entity="acme", project="vision", id="run-b") as run:
    used = run.use_artifact("api:best")
    assert used.get("table").data == [[1, "x"], [2, "y"]]
    link = used.link("shelf", aliases=["prod"])
    more = wandb.Artifact("api", "dataset", incremental=True)
    with more.new_file("y") as file:
        file.write("y")
    run.log_artifact(more).wait()
assert [run.id for run in wandb.Api().artifact("api:v0").used_by()] == ["run-b"]
assert wandb.Api().artifact("api:v0").logged_by().id == "run-a"
"""

CHECK = """
import json, wandb
api = wandb.Api()
first = api.artifact("acme/vision/api:v0")
table = first.get("table")
linked = api.artifact("acme/vision/shelf:prod")
print(json.dumps({
    "table": [table.columns, table.data],
    "linked": [linked.source_qualified_name, linked.is_link],
    "together": sorted(api.artifact("acme/vision/together:latest").manifest.entries),
    "more": sorted(api.artifact("acme/vision/api:latest").manifest.entries),
    "by": [first.logged_by().id, dict(first.logged_by().config), first.logged_by().state],
    "used": [run.id for run in first.used_by()],
    "runs": sorted(run.id for run in api.runs("acme/vision")),
}))
"""


def test_runs_tables_parts_links_and_lineage(server: WandbServer, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environ = {
        **os.environ,
        "ARTIFACTFS_STORE": f"wandb://{server.host}",
        "WANDB_API_KEY": server.key,
        "WANDB_ENTITY": "acme",
        "WANDB_PROJECT": "vision",
    }
    done = subprocess.run(
        [PROGRAM[0], "-c", OURS], cwd=home, env=environ, capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr
    told = (
        json.loads(run_client(server, tmp_path / "client", CHECK).splitlines()[-1])
        if (tmp_path / "client").mkdir() is None
        else {}
    )
    assert told["table"] == [["a", "b"], [[1, "x"], [2, "y"]]]
    assert told["linked"] == ["acme/vision/api:v0", True]
    assert told["together"] == ["0.txt", "1.txt", "2.txt"] and told["more"] == ["table.table.json", "x", "y"]
    assert told["by"] == ["run-a", {"lr": 0.5}, "finished"] and told["used"] == ["run-b"]
    assert {"run-a", "run-b"} <= set(told["runs"])
