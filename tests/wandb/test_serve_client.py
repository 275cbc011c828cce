"""The unmodified ``wandb`` client, as a process of its own, against ``artifactfs serve``, on a directory and on an S3 bucket."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_server import FaultServer
from mounting import needs_fuse
from servers import S3Server
from serving_fixture import PROGRAM, ClientProcess, WandbServer, start_server, try_client

pytest.importorskip("wandb")

PRELUDE = """
import datetime, json, os, sys
import wandb
def start(**options):
    return wandb.init(entity=ENTITY, project=PROJECT, settings=wandb.Settings(init_timeout=60), **options)
def drafted(name="bikes", type="dataset", files=None, **options):
    artifact = wandb.Artifact(name, type, **options)
    for path, text in (files or {"a.txt": "hello", "sub/b.txt": "deeper", "empty": ""}).items():
        with artifact.new_file(path) as file:
            file.write(text)
    return artifact
def fetch(name, **options):
    return wandb.Api().artifact(f"{ENTITY}/{PROJECT}/{name}", **options)
def show(**values):
    shown.update(json.loads(json.dumps(values, default=str)))
"""


@pytest.fixture(scope="module", params=["directory", "bucket"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WandbServer]:
    """One server for the module, over each kind of store."""
    root = tmp_path_factory.mktemp("served")
    environ = {f"XDG_{which}_HOME": str(root / which.lower()) for which in ("CONFIG", "DATA", "CACHE", "STATE")}
    store = str(root / "store")
    if request.param == "bucket":
        seaweed: S3Server = request.getfixturevalue("seaweed")
        bucket = f"served-{os.urandom(4).hex()}"
        seaweed.client().create_bucket(Bucket=bucket)
        environ.update(seaweed.environment())
        store = f"s3://{bucket}/team?endpoint_url={seaweed.url}&region=us-east-1"
    with start_server(store, root / "server", environ=environ) as running:
        yield running
        assert not running.tracebacks()


@pytest.fixture(scope="module")
def process(server: WandbServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClientProcess]:
    """One client for the module."""
    running = ClientProcess(server, tmp_path_factory.mktemp("client"))
    yield running
    running.close()


class Client:
    """A user at a server, with a folder and a project of their own."""

    def __init__(self, server: WandbServer, process: ClientProcess, home: Path, project: str) -> None:
        self.server = server
        self.home = home
        self.project = project
        self._process = process

    def run(self, body: str, timeout: float = 110, **names: Any) -> dict[str, Any]:
        """Run code after the prelude; all that it showed."""
        names = {"ENTITY": "acme", "PROJECT": self.project, **names}
        return self._process.run(self.home, PRELUDE + body, names, timeout)

    def afs(self, *arguments: str) -> str:
        """Run our own command on the store itself."""
        command = [*PROGRAM, "--store", self.server.store, *arguments]
        environ = {**os.environ, **self.server.environ}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def client(server: WandbServer, process: ClientProcess, tmp_path: Path, request: pytest.FixtureRequest) -> Client:
    home = tmp_path / "client"
    home.mkdir()
    return Client(server, process, home, f"p-{request.node.originalname}"[:60])


def test_logs_uses_and_downloads(client: Client) -> None:
    os.makedirs(client.home / "src/deep/er")
    (client.home / "src/blob.bin").write_bytes(os.urandom(3 << 20))
    (client.home / "src/deep/er/ünï cödé.txt").write_text("ü")
    (client.home / "src/empty").touch()
    shown = client.run(
        """
run = start(config={"lr": 0.5}, job_type="train")
artifact = wandb.Artifact("bikes", "dataset", description="two wheels", metadata={"k": [1, {"n": None}]})
artifact.add_dir("src")
artifact.add_reference("https://example.com/x.txt", name="away/x.txt", checksum=False)
run.log_artifact(artifact, aliases=["best"], tags=["one tag"]).wait()
show(version=artifact.version, state=artifact.state, aliases=sorted(artifact.aliases), tags=artifact.tags)
again = wandb.Artifact("bikes", "dataset")
again.add_dir("src")
again.add_reference("https://example.com/x.txt", name="away/x.txt", checksum=False)
run.log_artifact(again, aliases=["again"]).wait()
show(again=again.version, again_id=again.id == artifact.id, again_aliases=sorted(again.aliases))
used = run.use_artifact("bikes:best")
show(used=used.version, digest=used.digest == artifact.digest, count=used.file_count, size=used.size, metadata=used.metadata,
     description=used.description)
run.finish()
found = fetch("bikes:latest")
found.download("prefixed", path_prefix="deep")
entry = found.manifest.entries["away/x.txt"]
show(run=run.id, used_by=[it.id for it in found.used_by()], logged_by=found.logged_by().id, ref=entry.ref)
read = wandb.Api().run(f"{ENTITY}/{PROJECT}/{run.id}")
show(config=read.config, run_state=read.state, logged=[it.name for it in read.logged_artifacts()],
     inputs=[it.name for it in read.used_artifacts()])
"""
    )
    size = (3 << 20) + 2
    expected = {
        "version": "v0",
        "state": "COMMITTED",
        "aliases": ["best", "latest"],
        "tags": ["one tag"],
        "again": "v0",
        "again_id": True,
        "again_aliases": ["again", "best", "latest"],
        "used": "v0",
        "digest": True,
        "count": 4,
        "size": size,
        "metadata": {"k": [1, {"n": None}]},
        "description": "two wheels",
        "used_by": [shown["run"]],
        "logged_by": shown["run"],
        "ref": "https://example.com/x.txt",
        "run": shown["run"],
        "config": {"lr": 0.5},
        "run_state": "finished",
        "logged": ["bikes:v0"],
        "inputs": ["bikes:v0"],
    }
    assert shown == expected
    found = sorted(str(path.relative_to(client.home / "prefixed")) for path in (client.home / "prefixed").rglob("*"))
    assert found == ["deep", "deep/er", "deep/er/ünï cödé.txt"]


@needs_fuse
@pytest.mark.fuse
def test_what_it_logged_is_mounted(client: Client) -> None:
    """Files, directories, tables, references, merged and distributed versions: the mount shows what the client downloads."""
    os.makedirs(client.home / "src/sub")
    (client.home / "src/a.bin").write_bytes(os.urandom(2_500_000))
    for number in range(30):
        (client.home / f"src/sub/{number}.txt").write_text(str(number))
    (client.home / "near").mkdir()
    (client.home / "near/r.txt").write_text("referenced")
    with FaultServer({"/away.bin": os.urandom(300_000)}) as away:
        shown = client.run(
            """
run = start()
first = wandb.Artifact("bikes", "dataset"); first.add_dir("src"); first.add_file("src/sub/1.txt", name="again/1.txt")
first.add(wandb.Table(columns=["a"], data=[[1], [2]]), "table")
first.add_reference(AWAY, name="refs/away.bin"); first.add_reference("file://" + os.path.abspath("near"), name="refs/near")
run.log_artifact(first).wait()
run.log_artifact(drafted(files={"sub/1.txt": "changed", "more.txt": "more"}, incremental=True)).wait()
other = wandb.Artifact("other", "dataset", digest_algorithm="XXH128"); other.add_dir("src/sub"); run.log_artifact(other).wait()
borrowing = wandb.Artifact("borrowing", "dataset"); borrowing.add_reference(fetch("bikes:v0").get_entry("a.bin"), "b.bin")
run.log_artifact(borrowing).wait()
for part in ("1", "2"):
    run.upsert_artifact(drafted("together", files={part: part}), distributed_id="d").wait()
run.finish_artifact(drafted("together", files={"3": "3"}), distributed_id="d").wait()
run.finish()
for name in NAMES:
    fetch(name).download("got/" + name.replace(":", "/"))
files = fetch("bikes:v0").files(per_page=7)
show(count=len(files), names=[it.name for it in files], sizes=sum(it.size for it in files))
""",
            AWAY=away.url("/away.bin"),
            NAMES=(names := ["bikes:v0", "bikes:v1", "other:v0", "borrowing:v0", "together:v0"]),
        )
        mountpoint = client.home / "mnt"
        mountpoint.mkdir()
        client.afs("mount", f"acme/{client.project}", str(mountpoint))
        try:
            for name in names:
                collection, _, version = name.partition(":")
                (mounted,) = mountpoint.glob(f"**/{collection}/{version}")
                done = subprocess.run(
                    ["diff", "-r", client.home / "got" / collection / version, mounted], capture_output=True, text=True
                )
                assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), name
        finally:
            client.afs("unmount", str(mountpoint))
    assert (client.home / "got/bikes/v0/refs/near/r.txt").read_text() == "referenced"
    assert (client.home / "got/bikes/v1/sub/1.txt").read_text() == "changed"
    info = json.loads(client.afs("info", f"acme/{client.project}/bikes:v0", "--json"))
    assert (info["type"], info["file_count"], info["aliases"]) == ("dataset", 35, [])
    assert shown["count"] == 35 and len(set(shown["names"])) == 35 and shown["sizes"] == info["size"]
    client.afs("fsck")


def test_versions_follow_each_other(client: Client) -> None:
    shown = client.run(
        """
run = start()
first = drafted(); run.log_artifact(first).wait()
second = drafted(files={"a.txt": "hello", "more.txt": "more"}); run.log_artifact(second).wait()
back = drafted(); run.log_artifact(back, aliases=["back"]).wait()
show(second=second.version, back=back.version, latest=fetch("bikes:latest").version, newest=fetch("bikes:v1").aliases)
draft = fetch("bikes:v1").new_draft()
draft.remove("a.txt")
with draft.new_file("d.txt") as file:
    file.write("drafted")
run.log_artifact(draft).wait()
show(draft=draft.version, entries=sorted(fetch("bikes:v2").manifest.entries))
onto = drafted(files={"i.txt": "incremental", "d.txt": "changed"}, incremental=True)
run.log_artifact(onto).wait()
merged = fetch("bikes:latest")
merged.download("merged")
show(merged=merged.version, texts={name: open(f"merged/{name}").read() for name in sorted(os.listdir("merged"))})
for number in range(3):
    part = drafted("together", files={f"{number}.txt": str(number)})
    run.upsert_artifact(part, distributed_id="d").wait()
last = drafted("together", files={"last.txt": "last"})
run.finish_artifact(last, distributed_id="d").wait()
show(together=sorted(fetch("together:v0").manifest.entries))
run.finish()
"""
    )
    assert shown == {
        "second": "v1",
        "back": "v0",
        "latest": "v0",
        "newest": [],
        "draft": "v2",
        "entries": ["d.txt", "more.txt"],
        "merged": "v3",
        "texts": {"d.txt": "changed", "i.txt": "incremental", "more.txt": "more"},
        "together": ["0.txt", "1.txt", "2.txt", "last.txt"],
    }


def test_edits(client: Client) -> None:
    shown = client.run(
        """
run = start()
first = drafted(); first.ttl = datetime.timedelta(days=2)
run.log_artifact(first, aliases=["old"], tags=["gone"]).wait()
run.log_artifact(drafted(files={"x": "y"})).wait()
it = fetch("bikes:v0")
it.aliases.append("gold"); it.aliases.remove("old"); it.tags = ["kept", "two words"]
it.metadata = {"m": 1}; it.description = "described"; it.save()
now = fetch("bikes:gold")
show(version=now.version, aliases=now.aliases, tags=sorted(now.tags), metadata=now.metadata, text=now.description, ttl=now.ttl)
moved = fetch("bikes:v1"); moved.aliases.append("gold"); moved.save()
now.ttl = None; now.save()
show(moved=fetch("bikes:gold").version, ttl_none=fetch("bikes:v0").ttl)
collection = wandb.Api().artifact_collection("dataset", f"{ENTITY}/{PROJECT}/bikes")
collection.description = "all bikes"; collection.tags = ["fleet"]; collection.save()
collection.type = "fleet"; collection.save()
again = wandb.Api().artifact_collection("fleet", f"{ENTITY}/{PROJECT}/bikes")
show(about=again.description, collection_tags=again.tags, type=fetch("bikes:v0").type, all=again.aliases,
     listed=[it.version for it in again.artifacts()], types=[it.name for it in wandb.Api().artifact_types(f"{ENTITY}/{PROJECT}")])
try:
    fetch("bikes:v1").delete()
except wandb.errors.CommError as error:
    show(refused="gold" in str(error))
fetch("bikes:v1").delete(delete_aliases=True)
show(left=[it.version for it in wandb.Api().artifacts("fleet", f"{ENTITY}/{PROJECT}/bikes")],
     exists=wandb.Api().artifact_exists(f"{ENTITY}/{PROJECT}/bikes:v1"))
again.delete()
show(collection_exists=wandb.Api().artifact_collection_exists(f"{ENTITY}/{PROJECT}/bikes", "fleet"))
run.finish()
"""
    )
    assert shown == {
        "version": "v0",
        "aliases": ["gold"],
        "tags": ["kept", "two words"],
        "metadata": {"m": 1},
        "text": "described",
        "ttl": "2 days, 0:00:00",
        "moved": "v1",
        "ttl_none": None,
        "about": "all bikes",
        "collection_tags": ["fleet"],
        "type": "fleet",
        "all": ["latest", "gold"],
        "listed": ["v1", "v0"],
        "types": ["fleet"],
        "refused": True,
        "left": ["v0"],
        "exists": False,
        "collection_exists": False,
    }


def test_links_and_registries(client: Client) -> None:
    shown = client.run(
        """
run = start()
run.log_artifact(drafted()).wait()
run.log_artifact(drafted(files={"x": "y"})).wait()
source = fetch("bikes:v1")
link = source.link(f"{ENTITY}/{PROJECT}/shelf", aliases=["prod"])
again = source.link(f"{ENTITY}/{PROJECT}/shelf", aliases=["stage"])
show(link=link.name, again=again.name, is_link=link.is_link, source=link.source_name, aliases=sorted(fetch("shelf:v0").aliases))
show(text=open(fetch("shelf:prod").download("linked") + "/x").read(),
     linked=[it.qualified_name for it in fetch("bikes:v1").linked_artifacts])
registry = f"wandb-registry-{PROJECT}"
member = source.link(f"{registry}/wheels", aliases=["released"])
api = wandb.Api()
show(member=member.qualified_name, registries=[it.name for it in api.registries(organization=ENTITY) if it.name == PROJECT],
     collections=[it.name for it in api.registry(PROJECT, organization=ENTITY).collections()],
     versions=[it.qualified_name for it in api.registry(PROJECT, organization=ENTITY).versions()],
     by_name=api.artifact(f"{ENTITY}/{registry}/wheels:released").source_qualified_name)
fetch("shelf:v0").unlink()
show(unlinked=wandb.Api().artifact_exists(f"{ENTITY}/{PROJECT}/shelf:v0"), kept=fetch("bikes:v1").version)
made = api.create_registry(name=f"{PROJECT}-empty", visibility="organization", organization=ENTITY)
made.description = "empty yet"; made.save()
show(made=api.registry(f"{PROJECT}-empty", organization=ENTITY).description); made.delete()
run.finish()
"""
    )
    registry = f"acme/wandb-registry-{client.project}/wheels"
    assert shown == {
        "link": "shelf:v0",
        "again": "shelf:v0",
        "is_link": True,
        "source": "bikes:v1",
        "aliases": ["latest", "prod", "stage"],
        "text": "y",
        "linked": [f"acme/{client.project}/shelf:v0"],
        "member": f"{registry}:v0",
        "registries": [client.project],
        "collections": ["wheels"],
        "versions": [f"{registry}:v0"],
        "by_name": f"acme/{client.project}/bikes:v1",
        "unlinked": False,
        "kept": "v1",
        "made": "empty yet",
    }


def test_tables_references_and_files(client: Client) -> None:
    (client.home / "local").mkdir()
    (client.home / "local/r.txt").write_text("referenced")
    shown = client.run(
        """
run = start()
table = wandb.Table(columns=["a", "b"], data=[[1, "x"], [2, "y"]])
artifact = wandb.Artifact("tables", "dataset"); artifact.add(table, "t"); run.log_artifact(artifact).wait()
show(table=fetch("tables:v0").get("t").data)
run.log({"logged": wandb.Table(columns=["c"], data=[[3]])})
run.log_artifact(drafted()).wait()
both = wandb.Artifact("refs", "dataset")
both.add_reference(fetch("bikes:v0").get_entry("a.txt"), "borrowed.txt")
both.add_reference("file://" + os.path.abspath("local"), name="near")
both.add_reference("s3://bucket/key", name="far", checksum=False)
run.log_artifact(both).wait()
found = fetch("refs:v0")
show(borrowed=open(found.get_entry("borrowed.txt").download()).read(), far=found.get_entry("far").ref,
     near=open(found.get_entry("near/r.txt").download()).read())
first = drafted("first", files={"q.txt": "q"})
unsaved = wandb.Table(columns=["z"], data=[[5]])
first.add(unsaved, "shared")
second = wandb.Artifact("second", "dataset"); second.add(unsaved, "copy")
run.log_artifact(first); run.log_artifact(second).wait()
show(copy=fetch("second:v0").get("copy").data)
files = fetch("bikes:v0").files()
show(count=len(files), files=[[it.name, it.size, it.md5] for it in files],
     some=[it.name for it in fetch("bikes:v0").files(names=["empty"])])
found = fetch("bikes:v0"); found.download("checked"); found.verify("checked")
open("checked/a.txt", "w").write("tampered"); os.unlink("checked/empty"); open("checked/stray", "w").close()
try:
    found.verify("checked")
except ValueError as error:
    show(verified=str(error)[:20])
found.checkout("checked"); found.verify("checked")
os.environ["WANDB_CACHE_DIR"] = os.path.abspath("another-cache")  # skip_cache mixes up files that several threads download
show(checked=sorted(os.listdir("checked")), multipart=sorted(os.listdir(found.download("parts", multipart=True))))
hashed = wandb.Artifact("hashed", "dataset", digest_algorithm="XXH128"); hashed.add_dir("local"); run.log_artifact(hashed).wait()
back = fetch("hashed:v0"); back.download("hashed"); back.verify("hashed")
show(algorithm=back.digest_algorithm.value, same=back.digest == hashed.digest, entry=back.get_entry("r.txt").extra)
run.finish()
"""
    )
    assert shown == {
        "table": [[1, "x"], [2, "y"]],
        "borrowed": "hello",
        "far": "s3://bucket/key",
        "near": "referenced",
        "copy": [[5]],
        "count": 3,
        "files": [
            ["a.txt", 5, "XUFAKrxLKna5cZ2REBfFkg=="],
            ["empty", 0, "1B2M2Y8AsgTpgAmY7PhCfg=="],
            ["sub/b.txt", 6, "w3YQnvjRXEaiSTa30OC1YA=="],
        ],
        "some": ["empty"],
        "verified": "Found file checked/s",
        "checked": ["a.txt", "empty", "sub"],
        "multipart": ["a.txt", "empty", "sub"],
        "algorithm": "MANIFEST_XXH128",
        "same": True,
        "entry": {"alg": "XXH128"},
    }


def test_what_was_logged_natively_is_served(client: Client) -> None:
    """Contents have BLAKE3 digests then; the client's checks are of MD5."""
    source = client.home / "native"
    (source / "sub").mkdir(parents=True)
    (source / "large.bin").write_bytes(os.urandom(5_000_000))
    (source / "sub/small.txt").write_text("small")
    (source / "run.sh").write_text("#!/bin/sh\n")
    (source / "run.sh").chmod(0o755)
    (source / "link").symlink_to("sub/small.txt")
    (source / "void").mkdir()
    client.afs("log", f"acme/{client.project}/native", str(source), "--type", "dataset", "--alias", "made")
    shown = client.run(
        """
found = fetch("native:made"); found.download("got"); found.verify("got")
draft = found.new_draft()
with draft.new_file("added.txt") as file:
    file.write("added")
run = start(); run.log_artifact(draft).wait(); run.finish()
onto = drafted("native", files={"later.txt": "later"}, incremental=True)
run = start(); run.log_artifact(onto).wait(); run.finish()
show(files=sorted(found.manifest.entries), draft=sorted(fetch("native:v1").manifest.entries),
     merged=sorted(fetch("native:v2").manifest.entries))
"""
    )
    files = ["large.bin", "run.sh", "sub/small.txt"]
    assert shown == {"files": files, "draft": ["added.txt", *files], "merged": ["added.txt", *files[:1], "later.txt", *files[1:]]}
    assert (client.home / "got/large.bin").read_bytes() == (source / "large.bin").read_bytes()


def test_a_reader_cannot_write_and_a_stranger_sees_nothing(client: Client) -> None:
    client.run("run = start(); run.log_artifact(drafted()).wait(); run.finish()")
    reader = client.server.add_key("some-reader", "acme")
    stranger = client.server.add_key("a-stranger", "other", write=True)
    shown = client.run(
        """
reading = wandb.Api(api_key=READER)
found = reading.artifact(f"{ENTITY}/{PROJECT}/bikes:v0")
os.environ["WANDB_CACHE_DIR"] = os.path.abspath("another-cache")
show(text=open(found.download("read") + "/a.txt").read())
for project in (PROJECT, "no-such-project"):
    try:
        wandb.Api(api_key=STRANGER).artifact(f"{ENTITY}/{project}/bikes:v0")
    except Exception as error:
        show(**{"hidden" if project == PROJECT else "absent": str(error).replace(project, "P")})
""",
        READER=reader,
        STRANGER=stranger,
    )
    assert shown["text"] == "hello" and shown["hidden"] == shown["absent"]
    edit = f"""
import os, wandb
found = wandb.Api().artifact("acme/{client.project}/bikes:v0"); found.aliases.append("mine"); found.save()
"""
    refused = try_client(client.server, client.home, edit, key=reader)
    assert refused.returncode and "may read 'acme', not write it" in refused.stderr
    client.server.remove_key("some-reader")
    gone = client.run(
        """
try:
    wandb.Api(api_key=READER).artifact(f"{ENTITY}/{PROJECT}/bikes:v0")
except Exception as error:
    show(gone=type(error).__name__)
""",
        READER=reader,
    )
    assert gone["gone"]


_TWENTY = """
import os, sys, traceback
import wandb  # once for all of them: a process that has it is forked, before it has said anything

def one(number):
    os.chdir(number)
    for place in ("CACHE_DIR", "DATA_DIR", "CONFIG_DIR", "DIR", "ARTIFACT_DIR"):
        os.environ["WANDB_" + place] = os.path.abspath(place)
        os.mkdir(place)
    run = wandb.init(entity="acme", project=sys.argv[1], settings=wandb.Settings(init_timeout=100))
    made = []
    for name, files in (("shared", {f"{number}.txt": number, "same": "same"}), (f"own-{number}", {"n": number})):
        artifact = wandb.Artifact(name, "dataset")
        for path, text in files.items():
            with artifact.new_file(path) as file:
                file.write(text)
        run.log_artifact(artifact).wait()
        made.append(artifact.name)
    run.finish()
    for name, expected in zip(made, (sorted([f"{number}.txt", "same"]), ["n"])):
        assert sorted(os.listdir(wandb.Api().artifact(f"acme/{sys.argv[1]}/{name}").download("got-" + name))) == expected

children = []
for number in map(str, range(int(sys.argv[2]))):
    os.mkdir(number)
    pid = os.fork()
    if not pid:
        code = 1
        try:
            one(number)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            wandb.teardown()
            os._exit(code)
    children.append(pid)
sys.exit(any([os.waitpid(pid, 0)[1] for pid in children]))
"""


@pytest.mark.timeout(300)
def test_twenty_clients_at_once(client: Client) -> None:
    """Each is a process: what the client remembers of artifacts is not made for several threads."""
    done = try_client(client.server, client.home, _TWENTY, [client.project, "20"], timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    versions = json.loads(client.afs("versions", f"acme/{client.project}/shared", "--json"))
    assert sorted(int(it["version"][1:]) for it in versions) == list(range(20))
    client.afs("fsck")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_file_over_2_gib_goes_in_parts(wandb_server: WandbServer, tmp_path: Path) -> None:
    """On a directory: 2 GiB through SeaweedFS take minutes on a small machine, and the server does nothing else there."""
    if shutil.disk_usage(tmp_path).free < 14 << 30:
        pytest.skip("needs 14 GiB of disk")
    process = ClientProcess(wandb_server, tmp_path)
    client = Client(wandb_server, process, tmp_path, "p")
    with open(client.home / "big.bin", "wb") as file:
        file.write(b"start")
        file.seek((2 << 30) + 12345)
        file.write(b"end")
    shown = client.run(
        """
run = start()
artifact = wandb.Artifact("big", "dataset"); artifact.add_file(os.path.abspath("big.bin"), policy="immutable", skip_cache=True)
run.log_artifact(artifact).wait(); run.finish()
found = fetch("big:v0"); found.download("big", skip_cache=True)
show(size=os.path.getsize("big/big.bin"), digest=found.get_entry("big.bin").digest == artifact.manifest.entries["big.bin"].digest)
""",
        timeout=550,
    )
    process.close()
    assert shown == {"size": (2 << 30) + 12348, "digest": True}
    assert subprocess.run(["cmp", client.home / "big.bin", client.home / "big/big.bin"]).returncode == 0
    methods = [(line.get("method"), line.get("status")) for line in wandb_server.lines()]
    assert methods.count(("GET", 206)) >= 20
