"""A bucket as a team's store: what one machine commits another mounts; what is secret stays so. From the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounting import needs_fuse
from proxy import Fault, Proxy
from servers import Bucket
from shelves import until, write_files

from artifactfs import mountpoint

NAME = "acme/vision/bikes"
FILES = {
    "notes": b"hello\n",
    "run.sh": b"#!/bin/sh\n",
    "deep/er/large.bin": bytes(range(256)) * 20_000,
    "empty": None,
    **{f"many/{number:03}": os.urandom(5000) for number in range(150)},
}


class Machine:
    """A machine's state: a home of its own, with cache, stages and records of mounts."""

    def __init__(self, home: Path, store: str) -> None:
        self.home = home
        home.mkdir()
        kept = {key: value for key, value in os.environ.items() if not key.startswith("XDG_")}
        self.env = {**kept, "HOME": str(home), "ARTIFACTFS_STORE": store}
        self.said = ""

    def afs(self, *arguments: str | Path, code: int = 0) -> str:
        command = [sys.executable, "-m", "artifactfs.cli", *map(str, arguments)]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False)
        self.said += done.stdout + done.stderr
        assert done.returncode == code, f"{arguments}: {done.returncode} {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def place(self, name: str) -> Path:
        path = self.home / name
        path.mkdir(exist_ok=True)
        return path

    def close(self) -> None:
        for record in json.loads(self.afs("mounts", "--json")):
            if mountpoint.at(record["mountpoint"]) is not None:
                self.afs("unmount", record["mountpoint"], *(["--discard"] if record["kind"] == "stage" else []))


@pytest.fixture
def link(bucket: Bucket) -> Iterator[Proxy]:
    """A link to the bucket that tests can break."""
    with Proxy(bucket.server.url) as proxy:
        yield proxy


@pytest.fixture
def machines(bucket: Bucket, link: Proxy, tmp_path: Path) -> Iterator[tuple[Machine, Machine]]:
    store = bucket.store_url("team", endpoint=link.url)
    made = Machine(tmp_path / "one", store), Machine(tmp_path / "two", store)
    yield made
    link.clear()
    for machine in made:
        machine.close()


def same(one: Path, two: Path) -> None:
    done = subprocess.run(["diff", "-r", "--no-dereference", one, two], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@needs_fuse
def test_the_main_job_on_two_machines(machines: tuple[Machine, Machine], tmp_path: Path) -> None:
    one, two = machines
    source = write_files(tmp_path / "source", FILES)
    assert one.afs("log", NAME, source, "--type", "dataset") == f"{NAME}:v0"
    staged = one.place("staged")
    one.afs("stage", NAME, staged)
    with (staged / "deep/er/large.bin").open("ab") as file:
        file.write(b"more")
    (staged / "notes").rename(staged / "renamed")
    (staged / "many/000").unlink()
    subprocess.run(["cp", "-a", staged, tmp_path / "expected"], check=True)
    assert one.afs("unmount", staged) == f"{NAME}:v1"

    mounted = two.place("mounted")
    two.afs("mount", f"{NAME}:latest", mounted)
    same(tmp_path / "expected", mounted)
    two.afs("unmount", mounted)
    two.afs("get", f"{NAME}:v0", two.home / "got")
    same(source, two.home / "got")
    two.afs("verify", f"{NAME}:v0", two.home / "got")
    two.afs("fsck")


@needs_fuse
def test_a_stage_whose_store_is_gone_is_kept(machines: tuple[Machine, Machine], tmp_path: Path, link: Proxy) -> None:
    one, two = machines
    one.afs("log", NAME, write_files(tmp_path / "source", FILES), "--type", "dataset")
    staged = one.place("staged")
    one.afs("stage", NAME, staged)
    (staged / "new").write_bytes(b"new")
    link.refuse()
    one.afs("unmount", staged, code=5)
    assert mountpoint.at(str(staged)) is None
    one.afs("commit", "--resume", staged, code=5)
    link.accept()
    assert one.afs("commit", "--resume", staged) == f"{NAME}:v1"
    two.afs("get", NAME, two.home / "got")
    assert (two.home / "got/new").read_bytes() == b"new"


@needs_fuse
def test_offline_serves_what_was_warmed_and_opens_no_socket(
    machines: tuple[Machine, Machine], tmp_path: Path, link: Proxy
) -> None:
    one, two = machines
    one.afs("log", NAME, write_files(tmp_path / "source", FILES), "--type", "dataset")
    two.afs("warm", f"{NAME}:latest", "--path-prefix", "many/")
    link.refuse()
    mounted = two.place("mounted")
    trace = tmp_path / "trace"
    daemon = ["strace", "-f", "-qq", "-e", "trace=connect", "-o", str(trace)]
    command = [sys.executable, "-m", "artifactfs.cli", "mount", "--offline", "--foreground", f"{NAME}:latest", str(mounted)]
    process = subprocess.Popen([*daemon, *command], env=two.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: mountpoint.at(str(mounted)) is not None)
        assert (mounted / "many/007").read_bytes() == FILES["many/007"]
        with pytest.raises(OSError, match="No route to host"):
            (mounted / "deep/er/large.bin").read_bytes()
    finally:
        subprocess.run(["umount", mounted], check=False)
        process.wait(30)
    assert "AF_INET" not in trace.read_text()
    link.accept()


def test_what_arrived_of_a_failed_commit_is_not_sent_again(
    machines: tuple[Machine, Machine], tmp_path: Path, link: Proxy
) -> None:
    """Small files, that is, which lie in packs of 16 MiB."""
    one, two = machines
    source = write_files(tmp_path / "source", {f"{number:04}": os.urandom(40_000) for number in range(1300)})
    one.afs("log", "acme/vision/first", write_files(tmp_path / "first", FILES), "--type", "dataset")
    link.add(Fault("drop", method="PUT", path="/versions/", at=-1))
    one.afs("log", NAME, source, "--type", "dataset", code=5)
    link.clear()
    sent = link.bytes_up
    assert one.afs("log", NAME, source, "--type", "dataset") == f"{NAME}:v0"
    assert link.bytes_up - sent < 4 << 20
    assert [path for path in one.home.rglob("arrived/*") if path.is_file()] == []
    two.afs("get", NAME, two.home / "got")
    same(source, two.home / "got")


def test_secrets_are_nowhere(machines: tuple[Machine, Machine], tmp_path: Path, bucket: Bucket, link: Proxy) -> None:
    """Neither in what is said, also of failures, nor in what is kept on disk or in the store."""
    one, _ = machines
    source = write_files(tmp_path / "source", {"a": b"a"})
    one.afs("-v", "log", NAME, source, "--type", "dataset")
    link.add(Fault("status", status=403))
    one.afs("-v", "ls", NAME, code=7)
    link.clear()
    link.refuse()
    one.afs("-v", "ls", NAME, code=5)
    link.accept()
    one.afs("doctor", code=0)
    kept = [path.read_bytes() for path in one.home.rglob("*") if path.is_file()]
    stored = [bucket.get(key) for key in bucket.keys("")]
    secret = bucket.server.secret_key
    assert secret not in one.said and "Signature" not in one.said
    assert all(secret.encode() not in data for data in kept + stored)
