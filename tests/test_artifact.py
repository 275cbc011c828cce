"""artifact.py with draft.py, manifest.py, edits.py and session.py: drafts, versions and edits, as artifact-model has them."""

from __future__ import annotations

import base64
import datetime
import hashlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash
from blake3 import blake3
from http_server import FaultServer
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import artifactfs as afs
from artifactfs import model, session
from artifactfs.artifact import Artifact
from artifactfs.draft import CopyArea
from artifactfs.errors import (
    ArtifactFinalizedError,
    ArtifactNotLoggedError,
    CommError,
    ConflictError,
    NotFoundError,
    SourceChangedError,
    UsageError,
    VerifyError,
)
from artifactfs.names import ArtifactName

EMPTY_MD5 = "64e7c61456b10382e2f3b571ac24b659"


@pytest.fixture(autouse=True)
def workplace(here: str, desk: Path) -> Path:
    """Each test runs in a directory and with a store of its own."""
    return desk


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "sub/deep").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "a.txt").write_text("alpha")
    (root / "run.sh").write_text("#!/bin/sh\n")
    (root / "run.sh").chmod(0o755)
    (root / "sub/b.bin").write_bytes(bytes(range(256)) * 5000)
    (root / "sub/deep/ünï.txt").write_text("odd")
    return root


def log(artifact: Artifact, **more: Any) -> Artifact:
    with afs.init(job_type="test") as run:
        return run.log_artifact(artifact, **more).wait()


def made(name: str = "bikes", /, files: dict[str, str] | None = None, **more: Any) -> Artifact:
    """A draft with small files."""
    artifact = Artifact(name, "dataset", **more)
    for path, text in (files or {"a.txt": "alpha"}).items():
        with artifact.new_file(path) as file:
            file.write(text)
    return artifact


def base64_md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data).digest()).decode()


def wandb_digest(contents: dict[str, bytes]) -> str:
    """Section 4 of the model, from nothing but the contents."""
    lines = b"".join(f"{path}:{base64_md5(contents[path])}\n".encode() for path in sorted(contents))
    return hashlib.md5(b"wandb-artifact-manifest-v1\n" + lines).hexdigest()


# Digests (section 4)


def test_digest_constants(data: Path) -> None:
    assert Artifact("n", "t", digest_algorithm="MD5").digest == EMPTY_MD5
    assert Artifact("n", "t", digest_algorithm="XXH128").digest == xxhash.xxh3_128(b"wandb-artifact-manifest-v1\n").hexdigest()
    artifact = Artifact("n", "t", digest_algorithm="MD5")
    with artifact.new_file("empty"):
        pass
    assert artifact.manifest.entries["empty"].digest == "1B2M2Y8AsgTpgAmY7PhCfg=="
    with pytest.raises(UsageError, match="SHA256"):
        Artifact("n", "t", digest_algorithm="SHA256")


def test_md5_and_xxh128_manifests(data: Path) -> None:
    contents = {str(path.relative_to(data)): path.read_bytes() for path in data.rglob("*") if path.is_file()}
    artifact = Artifact("n", "t", digest_algorithm="MD5")
    artifact.add_dir(data)
    assert artifact.digest == artifact.manifest.digest() == wandb_digest(contents)
    assert artifact.manifest.to_manifest_json() == {
        "version": 1,
        "storagePolicy": "wandb-storage-policy-v1",
        "storagePolicyConfig": {"storageLayout": "V2"},
        "contents": {path: {"digest": base64_md5(contents[path]), "size": len(contents[path])} for path in sorted(contents)},
    }
    other = Artifact("n", "t", digest_algorithm="XXH128")
    other.add_file(data / "a.txt")
    entry = other.manifest.entries["a.txt"]
    assert entry.digest == base64.b64encode(xxhash.xxh3_128(b"alpha").digest()).decode()
    assert entry.extra == {"alg": "XXH128"}
    assert other.digest == xxhash.xxh3_128(f"wandb-artifact-manifest-v1\na.txt:{entry.digest}\n".encode()).hexdigest()


parts = st.sampled_from(["a", "a-b", "a.b", "b", "é", "\U0001f600", "￿", "a b", "z\n"])
trees = st.dictionaries(st.lists(parts, min_size=1, max_size=3).map("/".join), st.binary(max_size=20), max_size=12)


def is_tree(contents: dict[str, bytes]) -> bool:
    return not any(other.startswith(path + "/") for path in contents for other in contents)


@settings(max_examples=40)
@given(trees.filter(is_tree), st.sampled_from(["MD5", "BLAKE3"]))
def test_a_draft_has_the_digest_of_its_version(contents: dict[str, bytes], algorithm: str) -> None:
    artifact = Artifact(f"n{secrets.token_hex(8)}", "t", digest_algorithm=algorithm)  # the store lives through all examples
    for path, content in contents.items():
        with artifact.new_file(path, "xb") as file:
            file.write(content)
    before, listed = artifact.digest, list(artifact.manifest.entries)
    assert listed == sorted(contents) and artifact.size == sum(map(len, contents.values()))
    if algorithm == "MD5":
        assert before == wandb_digest(contents)
    log(artifact)
    assert artifact.digest == before and list(artifact.manifest.entries) == listed


def test_digests_with_everything_in_it(data: Path, tmp_path: Path) -> None:
    """References, empty directories, executable bits and a base count in the digest of a draft as they do in the version's."""
    outside = tmp_path / "outside"
    outside.write_bytes(os.urandom(3 << 20))
    for algorithm in ("BLAKE3", "MD5", "XXH128"):
        artifact = Artifact(f"n{algorithm}", "t", digest_algorithm=algorithm)
        artifact.add_dir(data)
        artifact.add_reference(outside.as_uri(), name="ref/outside")
        before = artifact.digest, artifact.size
        log(artifact)
        assert (artifact.digest, artifact.size) == before
        draft = artifact.new_draft()
        draft.remove("sub/deep")
        draft.add_file(data / "a.txt", name="sub/deeper/copy.txt", policy="immutable")
        before = draft.digest, draft.size
        log(draft)
        assert (draft.digest, draft.size, draft.version) == (*before, "v1")
        assert list(draft.manifest.entries) == ["a.txt", "ref/outside", "run.sh", "sub/b.bin", "sub/deeper/copy.txt"]


# The constructor (section 2)


@pytest.mark.parametrize("name", ["", "a/b", "a b", "a:b", "a\n", "..", ".", "ä", "x" * 129])
def test_bad_names(name: str) -> None:
    with pytest.raises(ValueError, match="artifact name"):
        Artifact(name, "dataset")


@pytest.mark.parametrize(
    ("name", "kind"), [("n", ""), ("n", "a/b"), ("n", "wandb-x"), ("n", "job"), ("run-1", "run_table"), ("source-1", "code")]
)
def test_bad_types(name: str, kind: str) -> None:
    with pytest.raises(ValueError, match="artifact type"):
        Artifact(name, kind)


def test_metadata() -> None:
    artifact = Artifact("n", "t", metadata={"tuple": (1, 2), "nan": float("nan"), 3: "key"})
    assert artifact.metadata == {"tuple": [1, 2], "nan": None, "3": "key"}
    with pytest.raises(TypeError):
        Artifact("n", "t", metadata=[1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="infinite"):
        artifact.metadata = {"x": float("inf")}
    with pytest.raises(ValueError, match="100"):
        Artifact("n", "t", metadata={str(i): i for i in range(101)})
    with pytest.warns(DeprecationWarning):
        assert Artifact("n", "t", use_as="x").use_as is None


# Building (section 6)


def test_add_file(data: Path) -> None:
    artifact = Artifact("n", "t", digest_algorithm="MD5")
    entry = artifact.add_file(str(data / "a.txt"))
    assert (entry.path, entry.size, entry.digest, entry.ref, entry.extra) == ("a.txt", 5, base64_md5(b"alpha"), None, {})
    assert artifact.add_file(data / "a.txt", name="./x//y/").path == "x/y"
    assert artifact.get_added_local_path_name(str(data / "a.txt")) == "x/y"
    assert artifact.get_added_local_path_name("a.txt") is None
    artifact.add_file(data / "a.txt")  # equal content: nothing to complain of
    (data / "a.txt").write_text("other")
    with pytest.raises(ValueError, match=r"Cannot add the same path twice: 'a\.txt'"):
        artifact.add_file(data / "a.txt")
    artifact.add_file(data / "a.txt", overwrite=True)
    assert artifact.manifest.entries["a.txt"].digest == base64_md5(b"other")
    (data / "q.tar.gz").write_text("alpha")
    expected = hashlib.md5(b"alpha").hexdigest()[:20] + ".tar.gz"
    assert artifact.add_file(data / "q.tar.gz", is_tmp=True).path == expected
    assert artifact.add_file(data / "q.tar.gz", name="d/q.tar.gz", is_tmp=True).path == f"d/{expected}"


@pytest.mark.parametrize("path", ["missing", ".", "fifo", "broken", "nul\0"])
def test_add_file_of_what_is_no_file(data: Path, path: str) -> None:
    os.mkfifo(data / "fifo")
    (data / "broken").symlink_to("nowhere")
    for name in (None, "named"):
        with pytest.raises(ValueError, match="Path is not a file"):
            Artifact("n", "t").add_file(str(data / path), name=name)


@pytest.mark.parametrize("name", ["..", "../x", "a/../b", "/abs", "C:\\x", "a/\0", "x" * 256, "a\udcff"])
def test_bad_paths(data: Path, name: str) -> None:
    artifact = Artifact("n", "t")
    with pytest.raises(ValueError, match="Invalid artifact path"):
        artifact.add_file(data / "a.txt", name=name)
    with pytest.raises(ValueError, match="Invalid artifact path"), artifact.new_file(name):
        pass
    with pytest.raises(ValueError, match="Invalid artifact path"):
        artifact.add_dir(data, name=name)
    with pytest.raises(ValueError, match="Invalid artifact path"):
        artifact.add_reference(data.as_uri(), name=name)
    assert list(artifact.manifest.entries) == []


def test_a_file_and_a_directory_of_one_name_are_refused(data: Path) -> None:
    artifact = Artifact("n", "t")
    artifact.add_file(data / "a.txt", name="x")
    artifact.add_file(data / "a.txt", name="d/e/f")
    for name in ("x/y", "x/y/z"):
        with pytest.raises(ValueError, match="'x' is a file in this artifact"):
            artifact.add_file(data / "a.txt", name=name, overwrite=True)
        with pytest.raises(ValueError, match="'x' is a file in this artifact"):
            artifact.add_dir(data, name=name, merge=True)
    for name in ("d", "d/e"):
        with pytest.raises(ValueError, match="is a directory in this artifact"):
            artifact.add_file(data / "a.txt", name=name, overwrite=True)
        with pytest.raises(ValueError, match="is a directory in this artifact"):
            artifact.add_reference((data / "a.txt").as_uri(), name=name)
    with pytest.raises(ValueError, match="at most 256"):
        artifact.add_file(data / "a.txt", name="d/" * 300 + "f")
    assert list(artifact.manifest.entries) == ["d/e/f", "x"]


def test_mutable_copies_and_immutable_does_not(data: Path) -> None:
    artifact = Artifact("n", "t")
    artifact.add_file(data / "a.txt", name="copied")
    (data / "a.txt").write_text("changed")
    (data / "b.txt").write_text("bravo")
    artifact.add_file(data / "b.txt", name="original", policy="immutable")
    assert artifact.manifest.entries["original"].local_path == str(data / "b.txt")
    with pytest.raises(ValueError, match="policy"):
        artifact.add_file(data / "b.txt", policy="x")  # type: ignore[arg-type]
    log(artifact)
    assert Path(artifact.download("out"), "copied").read_text() == "alpha"
    assert Path("out/original").read_text() == "bravo"


def test_an_immutable_file_that_changes_fails_the_commit(data: Path) -> None:
    artifact = Artifact("n", "t")
    artifact.add_file(data / "a.txt", policy="immutable")
    (data / "a.txt").write_text("omega")
    with afs.init() as run:
        with pytest.raises(ConflictError, match=r"a\.txt has changed since it was added"):
            run.log_artifact(artifact).wait()
        run._logged.clear()
    assert artifact.is_draft() and not afs.Api().artifact_exists("n")
    with pytest.raises(ConflictError):
        artifact.digest  # noqa: B018


def test_files_of_no_stated_size_are_copied_whole() -> None:
    """Files of /proc have a size of 0."""
    artifact = Artifact("n", "t")
    artifact.add_file("/proc/self/status", name="status")
    log(artifact)
    assert Path(artifact.download(), "status").read_text().startswith("Name:")


def test_add_dir(data: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "linked").write_text("linked")
    (data / "to-dir").symlink_to(elsewhere)
    (data / "sub/to-file").symlink_to(elsewhere / "linked")
    artifact = Artifact("n", "t")
    artifact.add_dir(str(data))
    artifact.add_dir(data / "sub", name="again/")
    paths = ["a.txt", "again/b.bin", "again/deep/ünï.txt", "again/to-file", "run.sh", "sub/b.bin", "sub/deep/ünï.txt"]
    assert list(artifact.manifest.entries) == [*paths, "sub/to-file", "to-dir/linked"]
    assert artifact.get_added_local_path_name(str(data / "a.txt")) == "a.txt"
    log(artifact)
    out = Path(artifact.download())
    assert (out / "to-dir/linked").read_text() == (out / "sub/to-file").read_text() == "linked"
    assert (out / "empty").is_dir() and not (out / "to-dir").is_symlink()
    assert os.access(out / "run.sh", os.X_OK) and not os.access(out / "a.txt", os.X_OK)
    with pytest.raises(ValueError, match="Path is not a directory"):
        Artifact("n", "t").add_dir(data / "a.txt")


def test_add_dir_refuses_what_it_cannot_keep(data: Path) -> None:
    def fails(match: str) -> None:
        artifact = Artifact("n", "t")
        with pytest.raises(ValueError, match=match):
            artifact.add_dir(data)
        assert list(artifact.manifest.entries) == []

    (data / "sub/loop").symlink_to("..")
    fails("link to a directory that holds it")
    (data / "sub/loop").unlink()
    (data / "sub/broken").symlink_to("nowhere")
    fails("broken link")
    (data / "sub/broken").unlink()
    os.mkfifo(data / "sub/pipe")
    fails("Path is not a file")
    (data / "sub/pipe").unlink()
    Path(os.fsdecode(os.fsencode(data) + b"/sub/\xff")).write_text("x")
    fails("not valid UTF-8")


def test_add_dir_adds_all_or_nothing(data: Path) -> None:
    artifact = Artifact("n", "t")
    with artifact.new_file("sub/b.bin") as file:
        file.write("other")
    before = artifact.digest
    with pytest.raises(ValueError, match=r"sub/b\.bin"):
        artifact.add_dir(data)
    assert artifact.digest == before and list(artifact.manifest.entries) == ["sub/b.bin"]
    artifact.add_dir(data, merge=True)
    assert artifact.manifest.entries["sub/b.bin"].size == 256 * 5000 and len(artifact.manifest.entries) == 4
    artifact.add_dir(data)  # all equal


def test_new_file() -> None:
    artifact = Artifact("n", "t")
    with artifact.new_file("dir/x.txt") as text:
        text.write("ü\n")
    with artifact.new_file("y.bin", mode="wb") as binary:
        binary.write(b"\xff")
    with pytest.raises(ValueError, match="already exists"), artifact.new_file("dir/x.txt"):
        pass
    with artifact.new_file("dir/x.txt", mode="w", encoding="latin-1") as text:
        text.write("ü")
    with pytest.raises(RuntimeError), artifact.new_file("never") as text:
        raise RuntimeError
    for mode in ("r", "rb", "r+", "q", "wx", ""):
        with pytest.raises(ValueError, match="mode"), artifact.new_file("z", mode):
            pass
    assert list(artifact.manifest.entries) == ["dir/x.txt", "y.bin"]
    assert artifact.manifest.entries["y.bin"].skip_cache
    log(artifact)
    assert Path(artifact.download(), "dir/x.txt").read_bytes() == b"\xfc"


def test_remove(data: Path) -> None:
    artifact = Artifact("n", "t")
    artifact.add_dir(data)
    entry = artifact.manifest.entries["a.txt"]
    artifact.remove(entry)
    artifact.remove("sub/deep/")
    artifact.remove("sub/b.bin")
    assert list(artifact.manifest.entries) == ["run.sh"]
    for path in ("sub", "a.txt", "nowhere/x", "run.sh/x"):
        with pytest.raises(FileNotFoundError, match="no such file or directory"):
            artifact.remove(path)
    log(artifact)
    assert sorted(os.listdir(artifact.download())) == ["empty", "run.sh"]
    draft = artifact.new_draft()
    draft.remove("run.sh")
    draft.remove("empty")
    assert draft.size == 0 and len(draft.manifest.entries) == 0
    draft.add_file(data / "a.txt", name="run.sh/below")
    assert list(draft.manifest.entries) == ["run.sh/below"]


def test_finalize(data: Path) -> None:
    artifact = made()
    artifact.finalize()
    assert artifact.is_draft() and artifact.state == "PENDING"
    check_mutators(artifact, data)
    log(artifact)
    check_mutators(artifact, data)
    check_mutators(afs.Api().artifact("bikes"), data)


def check_mutators(artifact: Artifact, data: Path) -> None:
    calls: dict[str, Callable[[], object]] = {
        "add_file": lambda: artifact.add_file(data / "a.txt"),
        "add_dir": lambda: artifact.add_dir(data),
        "add_reference": lambda: artifact.add_reference("http://nowhere.invalid/x"),
        "remove": lambda: artifact.remove("a.txt"),
        "new_file": lambda: artifact.new_file("x").__enter__(),
    }
    for name, call in calls.items():
        with pytest.raises(ArtifactFinalizedError, match=f"'Artifact.{name}' used on logged artifact"):
            call()


paths = st.lists(st.sampled_from(["a", "b", "a.b", "é"]), min_size=1, max_size=3).map("/".join)


class DraftMachine(RuleBasedStateMachine):
    """A draft over a stored base against a dict of its files."""

    @initialize(files=st.dictionaries(paths, st.sampled_from(["1", "22"]), max_size=6).filter(is_tree))
    def begin(self, files: dict[str, str]) -> None:
        self.files = dict(files)
        self.draft = log(made(f"n{secrets.token_hex(8)}", files)).new_draft() if files else made()
        if not files:
            self.draft.remove("a.txt")

    @rule(path=paths, text=st.sampled_from(["1", "22", "33"]), mode=st.sampled_from("xw"))
    def write(self, path: str, text: str, mode: str) -> None:
        below = any(path.startswith(f"{other}/") or other.startswith(f"{path}/") for other in self.files)
        if below or (mode == "x" and path in self.files):
            with pytest.raises(UsageError), self.draft.new_file(path, mode) as file:
                file.write(text)
            return
        with self.draft.new_file(path, mode) as file:
            file.write(text)
        self.files[path] = text

    @rule(path=paths)
    def remove(self, path: str) -> None:
        gone = [other for other in self.files if other == path or other.startswith(f"{path}/")]
        if not gone:
            with pytest.raises(FileNotFoundError):
                self.draft.remove(path)
            return
        self.draft.remove(path)
        for other in gone:
            del self.files[other]

    @invariant()
    def holds_the_same(self) -> None:
        entries = self.draft.manifest.entries
        assert list(entries) == sorted(self.files) and len(entries) == len(self.files)
        assert self.draft.size == sum(map(len, self.files.values()))
        for path, text in self.files.items():
            assert entries[path].digest == base64.b64encode(blake3(text.encode()).digest()).decode()

    @rule()
    def has_the_digest_of_a_fresh_one(self) -> None:
        fresh = Artifact("n", "t")
        for path, text in self.files.items():
            with fresh.new_file(path) as file:
                file.write(text)
        assert self.draft.digest == fresh.digest


def test_drafts_against_a_model() -> None:
    run_state_machine_as_test(DraftMachine, settings=settings(max_examples=25, stateful_step_count=15, deadline=None))


def test_a_killed_process_leaves_no_copies(data: Path, tmp_path: Path) -> None:
    area = tmp_path / "areas"
    script = f"""
import os, signal
from pathlib import Path
from artifactfs.draft import CopyArea
area = CopyArea(Path({str(area)!r}))
area.copy({str(data / "a.txt")!r}, "MD5")
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    [left] = area.iterdir()
    first = CopyArea(area)
    assert not left.exists()
    second = CopyArea(area)
    first.copy(str(data / "a.txt"), "MD5")
    assert len(list(area.iterdir())) == 2, "an area in use stays"
    pid = os.fork()
    if pid == 0:
        first.close()
        os._exit(0)
    os.waitpid(pid, 0)
    assert Path(first.path, "0").exists(), "a forked child removes nothing"
    first.close()
    del second
    assert list(area.iterdir()) == []


# References (section 5)


def test_file_references(data: Path, tmp_path: Path) -> None:
    artifact = Artifact("n", "t", digest_algorithm="MD5")
    [entry] = artifact.add_reference((data / "a.txt").as_uri())
    assert (entry.path, entry.size, entry.digest) == ("a.txt", 5, base64_md5(b"alpha"))
    assert entry.ref == entry.ref_target() == (data / "a.txt").as_uri() and entry.extra == {}
    assert len(artifact.add_reference(data.as_uri(), name="all")) == 4
    assert [path for path in artifact.manifest.entries if path.startswith("all/")] == [
        "all/a.txt",
        "all/run.sh",
        "all/sub/b.bin",
        "all/sub/deep/ünï.txt",
    ]
    with pytest.raises(ValueError, match="no scheme"):
        artifact.add_reference(str(data))
    with pytest.raises(ValueError, match="more than"):
        artifact.add_reference(data.as_uri(), name="few", max_objects=3)
    artifact.add_reference((data / "a.txt").as_uri())  # equal
    with pytest.raises(ValueError, match="Cannot add the same path twice"):
        artifact.add_reference((data / "run.sh").as_uri(), name="a.txt")
    with artifact.new_file("taken/sub/b.bin") as file:
        file.write("x")
    with pytest.raises(ValueError, match="Cannot add the same path twice"):
        artifact.add_reference(data.as_uri(), name="taken")
    assert [path for path in artifact.manifest.entries if path.startswith("taken/")] == ["taken/sub/b.bin"]
    tracked = artifact.add_reference("thing://some/where", name="tracked")[0]
    assert (tracked.digest, tracked.size) == ("thing://some/where", None)
    with pytest.raises(ValueError, match="needs a name"):
        artifact.add_reference("thing://some/where")
    with pytest.raises(ValueError, match="stored file"):
        artifact.manifest.entries["taken/sub/b.bin"].ref_target()
    log(artifact)
    with pytest.raises(ValueError, match="not recognized"):
        artifact.download("out")
    artifact.download("some", path_prefix="all")
    assert Path("some/all/sub/deep/ünï.txt").read_text() == "odd"


def test_http_references(tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    with FaultServer({"/data/x.bin": content, "/y.bin": b"why"}) as server:
        artifact = Artifact("n", "t")
        [entry] = artifact.add_reference(server.url("/data/x.bin"))
        [other] = artifact.add_reference(server.url("/y.bin"), name="d/y")
        etag = server.etag("/data/x.bin")
        assert etag and (entry.path, entry.size, entry.digest) == ("x.bin", len(content), etag.strip('"'))
        assert entry.extra["etag"] == etag and other.path == "d/y"
        before = artifact.digest
        log(artifact)
        assert artifact.digest == before and artifact.size == len(content) + 3
        root = Path(artifact.download())
        assert (root / "x.bin").read_bytes() == content and (root / "d/y").read_bytes() == b"why"
        artifact.verify()
    with FaultServer({"/y.bin": b"WHY"}) as server:
        changed = Artifact("changed", "t")
        changed.add_reference(server.url("/y.bin"), name="y")
        log(changed)
        server.faults.etag = '"another"'
        with pytest.raises(SourceChangedError):
            changed.download("out")
        changed.download("out", allow_missing_references=True)
        assert not Path("out/y").exists()


def test_entries_of_other_artifacts(data: Path) -> None:
    first = Artifact("first", "t")
    first.add_dir(data)
    draft = Artifact("second", "t")
    [unlogged] = draft.add_reference(first.manifest.entries["sub/b.bin"])
    assert unlogged.path == "b.bin"
    log(first)
    source = first.get_entry("a.txt")
    draft.add_reference(source, name="x/y.txt")
    [by_url] = draft.add_reference(source.ref_url())
    assert (by_url.path, by_url.digest, by_url.ref) == ("a.txt", source.digest, None)
    log(draft)
    assert Path(draft.download(), "x/y.txt").read_text() == "alpha"
    assert Path(draft.download(), "b.bin").read_bytes() == (data / "sub/b.bin").read_bytes()
    for bad in ("wandb-artifact://zz/a", "wandb-artifact://41/a", "wandb-artifact://"):
        with pytest.raises(ValueError, match="not a reference to an entry"):
            Artifact("n", "t").add_reference(bad)
    late = Artifact("third", "t")
    late.add_reference(source)
    first.delete()
    with afs.init() as run:
        with pytest.raises(NotFoundError, match="first:v0 was deleted"):
            run.log_artifact(late).wait()
        run._logged.clear()


# What needs a logged artifact (section 7)

LOGGED_ONLY = (
    "entity project qualified_name version collection source_entity source_project source_qualified_name source_version "
    "source_collection source_artifact url aliases tags commit_hash file_count created_at updated_at linked_at history_step"
)
LOGGED_ONLY_METHODS: dict[str, tuple[Any, ...]] = {
    "new_draft": (),
    "get_entry": ("a",),
    "get_path": ("a",),
    "download": (),
    "checkout": (),
    "verify": (),
    "file": (),
    "files": (),
    "delete": (),
    "used_by": (),
    "logged_by": (),
    "json_encode": (),
    "wait": (),
}


def test_members_of_drafts() -> None:
    artifact = made(description="d", metadata={"k": 1})
    for name in LOGGED_ONLY.split():
        with pytest.raises(ArtifactNotLoggedError, match=f"'Artifact.{name}' used prior to logging"):
            getattr(artifact, name)
    for name, arguments in LOGGED_ONLY_METHODS.items():
        with pytest.raises(ArtifactNotLoggedError, match=f"'Artifact.{name}' used prior to logging"):
            getattr(artifact, name)(*arguments)
    for name in ("aliases", "tags"):
        with pytest.raises(ArtifactNotLoggedError):
            setattr(artifact, name, ["x"])
    with pytest.raises(ArtifactNotLoggedError):
        artifact.ttl  # noqa: B018
    assert isinstance(ArtifactNotLoggedError(""), AttributeError)
    assert (artifact.id, artifact.name, artifact.source_name, artifact.type) == (None, "bikes", "bikes", "dataset")
    assert (artifact.description, artifact.metadata, artifact.size) == ("d", {"k": 1}, 5)
    assert artifact.is_draft() and not artifact.is_link and artifact.state == "PENDING"
    assert (artifact.incremental, artifact.storage_region, artifact.digest_algorithm) == (False, None, "BLAKE3")


def test_properties_of_a_version() -> None:
    before = datetime.datetime.now(datetime.UTC)
    artifact = log(made(description="d"), aliases=["best"], tags=["t"])
    assert (artifact.name, artifact.source_name, artifact.version) == ("bikes:v0", "bikes:v0", "v0")
    fetched = afs.Api().artifact("vision/bikes")
    assert (fetched.name, fetched.qualified_name) == ("bikes:latest", "acme/vision/bikes:latest")
    assert (fetched.source_name, fetched.source_qualified_name) == ("bikes:v0", "acme/vision/bikes:v0")
    assert (fetched.entity, fetched.project, fetched.source_version) == ("acme", "vision", "v0")
    assert sorted(fetched.aliases) == ["best", "latest"] and fetched.tags == ["t"]
    assert (fetched.state, fetched.file_count, fetched.size, fetched.description) == ("COMMITTED", 1, 5, "d")
    assert fetched.id == artifact.id and fetched.id and fetched.commit_hash
    assert before <= datetime.datetime.fromisoformat(fetched.created_at) <= datetime.datetime.now(datetime.UTC)
    assert fetched.updated_at >= fetched.created_at and fetched.history_step is None and fetched.ttl is None
    assert fetched.collection.name == fetched.source_collection.name == "bikes"
    assert fetched.source_artifact is fetched and fetched.url == "artifactfs://acme/vision/bikes:v0"
    assert fetched.json_encode() == {
        "_type": "artifactVersion",
        "_version": "v0",
        "id": fetched.id,
        "version": "v0",
        "sequenceName": "bikes",
        "usedAs": None,
    }
    assert fetched.digest == artifact.manifest.digest()


# Versions (section 9)


def test_the_same_content_is_no_new_version() -> None:
    assert log(made()).version == "v0"
    again = log(made(metadata={"dropped": 1}), aliases=["more"], tags=["dropped"])
    assert (again.version, sorted(again.aliases), again.metadata, again.tags) == ("v0", ["latest", "more"], {}, [])
    assert log(made(files={"a.txt": "other"})).version == "v1"
    assert afs.Api().artifact("bikes:more").version == "v0"


def test_type_of_a_collection() -> None:
    log(made())
    with afs.init() as run, pytest.raises(ValueError, match="already exists with type 'dataset'"):
        run.log_artifact(Artifact("bikes", "model"))


def test_storage_regions_are_refused() -> None:
    with afs.init() as run, pytest.raises(ValueError, match="storage_region"):
        run.log_artifact(made(storage_region="moon"))


def test_incremental(data: Path) -> None:
    assert log(made(files={"a": "1", "d/b": "2"}, incremental=True)).version == "v0"
    other = log(made(files={"d/b": "new", "d/c": "3", "e": "4"}, incremental=True))
    assert other.incremental and list(other.manifest.entries) == ["a", "d/b", "d/c", "e"]
    assert Path(other.download(), "d/b").read_text() == "new"
    nothing = log(Artifact("bikes", "dataset", incremental=True))
    assert nothing.version == "v1"


def test_incremental_from_many_threads() -> None:
    drafts = [made(files={f"f{number}": str(number)}, incremental=True) for number in range(8)]
    stores = [session.Session(session.current_settings()) for _ in drafts]
    name = ArtifactName("acme", "vision", "bikes")
    failures: list[BaseException] = []

    def publish(draft: Artifact, opened: session.Session) -> None:
        try:
            draft._publish(opened, name, (), (), "")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=publish, args=pair) for pair in zip(drafts, stores, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    newest = afs.Api().artifact("bikes")
    assert newest.version == "v7" and list(newest.manifest.entries) == [f"f{number}" for number in range(8)]


def test_new_draft(data: Path) -> None:
    base = log(made(files={"a": "1", "d/b": "2"}, description="text", metadata={"k": [1]}), aliases=["best"], tags=["t"])
    base.ttl = datetime.timedelta(days=1)
    base.save()
    draft = base.new_draft()
    assert (draft.name, draft.type, draft.description, draft.metadata) == ("bikes", "dataset", "text", {"k": [1]})
    assert draft.digest == base.digest and draft.is_draft() and draft.manifest.entries["a"].local_path is None
    draft.metadata["k"].append(2)
    assert base.metadata == {"k": [1]}
    with pytest.raises(ValueError, match="Cannot add the same path twice"):
        draft.add_file(data / "a.txt", name="d/b")
    draft.add_file(data / "a.txt", name="d/c")
    draft.remove("a")
    with afs.init(project="elsewhere") as run, pytest.raises(ValueError, match="only to its project"):
        run.log_artifact(draft)
    log(made(files={"between": "x"}))
    log(draft)
    assert (draft.version, list(draft.manifest.entries), draft.tags, draft.ttl) == ("v2", ["d/b", "d/c"], [], None)
    assert draft.aliases == ["latest"]
    assert list(base.manifest.entries) == ["a", "d/b"]


def test_entries_outlive_the_draft(data: Path) -> None:
    """The copies are gone after the commit; entries got before it answer all the same."""
    artifact = Artifact("n", "t", digest_algorithm="MD5")
    entry = artifact.add_file(data / "a.txt")
    log(artifact)
    assert entry.digest == base64_md5(b"alpha") and entry.size == 5 and entry.local_path is None
    assert Path(entry.download()).read_text() == "alpha"
    drafts = session.current_settings().staging_dir / ".drafts"
    assert list(drafts.iterdir()) == []


@pytest.mark.root
@pytest.mark.skipif(os.getuid() != 0, reason="mounts a small tmpfs")
def test_a_failed_commit_can_be_tried_again(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(store)], check=True)
    try:
        artifact = Artifact("n", "t")
        with artifact.new_file("big", "wb") as file:
            file.write(os.urandom(5 << 20))
        with afs.init() as run:
            run.log_artifact(artifact)
            with pytest.raises(ValueError, match="make space") as caught:
                artifact.wait()
            assert isinstance(caught.value, afs.ArtifactFSError) and artifact.is_draft()
            [note] = caught.value.__notes__
            kept = Path(note.removeprefix("its files are kept in "))
            assert (kept / "0").stat().st_size == 5 << 20
            subprocess.run(["mount", "-o", "remount,size=50m", str(store)], check=True)
            assert run.log_artifact(artifact).wait().version == "v0"
        assert not kept.exists()
    finally:
        subprocess.run(["umount", str(store)], check=True)


def test_save_of_a_draft() -> None:
    artifact = made()
    artifact.save()
    assert artifact.version == "v0"
    by = artifact.logged_by()
    assert by is not None and by.job_type == "auto" and by.logged == ["acme/vision/bikes:v0"]
    with afs.init() as run:
        second = made(files={"b": "2"})
        second.save()
        assert second.wait().version == "v1"
        assert second.logged_by() == afs.Api().run(run.id)
    third = made("other")
    third.save("elsewhere")
    assert third.project == "elsewhere"


# Editing


def test_edits_are_pushed_by_save() -> None:
    artifact = log(made(metadata={"a": 1, "b": 2}, description="old"), tags=["x", "y"], aliases=["one"])
    artifact.metadata["c"] = 3
    del artifact.metadata["a"]
    artifact.description = "new"
    artifact.tags.append("z")
    artifact.tags.remove("x")
    artifact.aliases.append("two")
    artifact.aliases.remove("one")
    artifact.ttl = datetime.timedelta(hours=2)
    assert afs.Api().artifact("bikes").description == "old"
    artifact.save()
    for seen in (artifact, afs.Api().artifact("bikes")):
        assert (seen.metadata, seen.description, seen.tags) == ({"b": 2, "c": 3}, "new", ["y", "z"])
        assert sorted(seen.aliases) == ["latest", "two"] and seen.ttl == datetime.timedelta(hours=2)
    artifact.metadata = {"whole": True}
    artifact.description = None
    artifact.ttl = None
    artifact.tags = []
    artifact.aliases = []
    artifact.save()
    seen = afs.Api().artifact("bikes")
    assert (seen.metadata, seen.description, seen.ttl, seen.tags, seen.aliases) == ({"whole": True}, None, None, [], ["latest"])
    stamp = seen.updated_at
    seen.save()
    assert afs.Api().artifact("bikes").updated_at == stamp, "nothing to push, nothing written"


def test_bad_edits_are_refused() -> None:
    artifact = log(made())
    for bad in ("a/b", "a:b", "v3", "", ".."):
        with pytest.raises(ValueError, match="alias"):
            artifact.aliases = [bad]
        artifact.aliases.append(bad)
        with pytest.raises(ValueError, match="alias"):
            artifact.save()
        artifact.aliases.remove(bad)
    for bad in ("", " x", "a/b", "x" * 129):
        with pytest.raises(ValueError, match="tag"):
            artifact.tags = [bad]
    artifact.metadata["x"] = float("inf")
    with pytest.raises(ValueError, match="infinite"):
        artifact.save()
    for ttl in (datetime.timedelta(0), datetime.timedelta(seconds=-1), 5, "1d"):
        with pytest.raises(ValueError, match="TTL"):
            artifact.ttl = ttl  # type: ignore[assignment]
    artifact.ttl = afs.ArtifactTTL.INHERIT
    with pytest.raises(ArtifactNotLoggedError):
        artifact.ttl  # noqa: B018


def test_an_alias_moves() -> None:
    first = log(made(), aliases=["best"])
    second = log(made(files={"b": "2"}))
    second.aliases.append("best")
    second.save()
    assert afs.Api().artifact("bikes:best").version == "v1"
    first.save()
    assert first.aliases == [] and afs.Api().artifact("bikes:best").version == "v1"
    first.aliases = ["latest"]
    first.save()
    assert afs.Api().artifact("bikes").version == "v0"


def test_concurrent_edits_merge_or_conflict() -> None:
    log(made(metadata={"a": 1, "b": {"x": 1}}, description="old"), tags=["t"])
    mine, theirs = afs.Api().artifact("bikes"), afs.Api().artifact("bikes")
    theirs.metadata.update(b={"x": 2}, n=1)
    theirs.tags = ["t", "theirs"]
    theirs.description = "theirs"
    theirs.save()
    mine.metadata["a"] = True  # equal to 1 for Python, not for JSON
    mine.tags = ["mine"]
    mine.save()
    assert (mine.metadata, mine.tags) == ({"a": True, "b": {"x": 2}, "n": 1}, ["theirs", "mine"])
    assert mine.metadata["a"] is True and mine.description == "theirs"
    stale = afs.Api().artifact("bikes")
    mine.metadata["b"] = "mine"
    mine.description = "mine"
    mine.save()
    stale.metadata["b"] = "stale"
    with pytest.raises(ConflictError, match=r"metadata 'b' of acme/vision/bikes:v0 was changed by somebody else"):
        stale.save()
    stale.metadata["b"] = {"x": 2}
    stale.description = "stale"
    with pytest.raises(ConflictError, match="description"):
        stale.save()
    stale.description = "mine"
    stale.save()
    del stale.metadata["b"]
    stale.save()
    assert "b" not in afs.Api().artifact("bikes").metadata


def test_no_edit_is_lost_between_threads() -> None:
    log(made())
    log(made(files={"b": "2"}))
    failures: list[BaseException] = []

    def edit(number: int) -> None:
        try:
            for step in range(5):
                artifact = Artifact._fetch(session.Session(session.current_settings()), name.at(f"v{number % 2}"))
                artifact.metadata[f"k{number}-{step}"] = number
                artifact.tags.append(f"t{number}-{step}")
                artifact.aliases.append(f"a{number}-{step}")
                artifact.save()
        except BaseException as error:
            failures.append(error)

    name = ArtifactName("acme", "vision", "bikes")
    threads = [threading.Thread(target=edit, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for parity in (0, 1):
        artifact = afs.Api().artifact(f"bikes:v{parity}")
        ids = {f"{number}-{step}" for number in range(parity, 8, 2) for step in range(5)}
        assert set(artifact.metadata) == {f"k{id}" for id in ids}
        assert set(artifact.tags) == {f"t{id}" for id in ids}
        assert set(artifact.aliases) - {"latest"} == {f"a{id}" for id in ids}


def test_delete() -> None:
    first, second = log(made(), aliases=["best"]), log(made(files={"b": "2"}))
    with pytest.raises(CommError, match="aliases best") as caught:
        first.delete()
    assert isinstance(caught.value, ConflictError)
    first.delete(delete_aliases=True)
    assert first.state == "DELETED" and not afs.Api().artifact_exists("bikes:v0")
    second.delete()
    assert not afs.Api().artifact_exists("bikes")
    second.metadata["x"] = 1
    with pytest.raises(CommError, match="deleted"):
        second.save()
    assert log(made(files={"c": "3"})).version == "v2"


def test_a_deleted_version_gets_no_alias() -> None:
    artifact, other = log(made()), afs.Api().artifact("bikes")
    log(made(files={"b": "2"}))
    other.delete()
    artifact.aliases.append("ghost")
    with pytest.raises(NotFoundError, match="deleted"):
        artifact.save()
    assert "ghost" not in afs.Api().artifact_collection("dataset", "bikes").aliases


# Reading (section 11)


def test_entries_and_files(data: Path) -> None:
    artifact = Artifact("n", "t", digest_algorithm="MD5")
    artifact.add_dir(data)
    log(artifact)
    entry = artifact.get_entry("./sub//b.bin")
    assert entry.path == "sub/b.bin" and artifact.get_path("sub/b.bin").size == 256 * 5000
    with pytest.raises(KeyError, match="Path not contained in artifact: 'missing'"):
        artifact.get_entry("missing")
    with pytest.raises(KeyError):
        artifact.manifest.entries["sub"]
    assert "sub" not in artifact.manifest.entries and "sub/b.bin" in artifact.manifest.entries
    assert [e.path for e in artifact.manifest.get_entries_in_directory("sub")] == ["sub/b.bin", "sub/deep/ünï.txt"]
    files = artifact.files()
    assert [file.name for file in files] == ["a.txt", "run.sh", "sub/b.bin", "sub/deep/ünï.txt"] and len(files) == 4
    assert (
        files[0].md5 == base64_md5(b"alpha") and files[-1].size == 3 and [f.name for f in files[1:3]] == ["run.sh", "sub/b.bin"]
    )
    assert files[0].mimetype == "text/plain"
    with pytest.raises(IndexError):
        files[4]
    assert [file.name for file in artifact.files(["run.sh", "missing"])] == ["run.sh"]
    with files[0].download("out") as opened:
        assert opened.read() == "alpha"
    with pytest.raises(ValueError, match="already exists"):
        files[0].download("out")
    assert entry.download("out") == "out/sub/b.bin"


def test_download_roots(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log(made(), aliases=["best"])
    artifact = afs.Api().artifact("bikes:best")
    assert artifact.download() == str(workplace / "artifacts/bikes:v0")
    assert artifact.download("relative") == "relative" and Path("relative/a.txt").exists()
    assert artifact.checkout() == str(workplace / "artifacts/bikes")
    assert artifact.file() == str(workplace / "artifacts/bikes:best/a.txt")
    monkeypatch.setenv("WANDB_ARTIFACT_DIR", "elsewhere")
    assert artifact.download() == str(workplace / "elsewhere/bikes:v0")
    monkeypatch.setenv("ARTIFACTFS_ARTIFACT_DIR", "/" + str(workplace / "abs")[1:])
    assert artifact.get_entry("a.txt").download() == str(workplace / "abs/bikes:v0/a.txt")
    with pytest.raises(ValueError, match="needs exactly one"):
        log(made(files={"a": "1", "b": "2"})).file()


def test_downloads_do_not_mix_up_artifacts() -> None:
    """The sticky destination of W&B's skip_cache: two files of one size."""
    one, two = log(made("one", files={"x": "1111"})), log(made("two", files={"x": "2222"}))
    one.download("out1", skip_cache=True)
    two.download("out2", skip_cache=False)
    assert Path("out1/x").read_text() == "1111" and Path("out2/x").read_text() == "2222"


def test_checkout_and_verify(data: Path) -> None:
    artifact = Artifact("n", "t")
    artifact.add_dir(data)
    log(artifact)
    with pytest.raises(FileNotFoundError):
        artifact.verify()
    root = Path(artifact.checkout("out"))
    artifact.verify(root)
    (root / "extra").write_text("x")
    with pytest.raises(ValueError, match="not a member"):
        artifact.verify(root)
    artifact.checkout(root)
    (root / "a.txt").write_text("alphb")
    with pytest.raises(VerifyError, match=r"Digest mismatch for file: 'a\.txt'"):
        artifact.verify(root)
    (root / "a.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"'a\.txt' of acme/vision/n:v0 is missing") as caught:
        artifact.verify(root)
    assert isinstance(caught.value, ValueError)


# Collections and the session


def test_collection() -> None:
    log(made(), aliases=["best"])
    log(made(files={"b": "2"}))
    collection = afs.Api().artifact_collection("dataset", "bikes")
    assert (collection.name, collection.type, collection.entity, collection.project) == ("bikes", "dataset", "acme", "vision")
    assert [artifact.version for artifact in collection.artifacts()] == ["v1", "v0"]
    assert [sorted(artifact.aliases) for artifact in collection.artifacts()] == [["latest"], ["best"]]
    assert sorted(collection.aliases) == ["best", "latest"] and collection.is_sequence()
    other = afs.Api().artifact_collection("dataset", "bikes")
    collection.description, collection.tags = "text", ["t"]
    collection.save()
    other.tags.append("u")
    other.save()
    assert (other.description, other.tags) == ("text", ["t", "u"])
    collection.description = "mine"
    other.description = "theirs"
    other.save()
    with pytest.raises(ConflictError):
        collection.save()


def test_sessions_follow_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = session.current()
    assert session.current() is first
    monkeypatch.setenv("ARTIFACTFS_STORE", str(tmp_path / "other"))
    assert session.current() is not first
    monkeypatch.delenv("ARTIFACTFS_ENTITY")
    monkeypatch.delenv("ARTIFACTFS_PROJECT")
    monkeypatch.setenv("LOGNAME", "somebody")
    assert str(session.current().parse("n")) == "somebody/uncategorized/n"
    monkeypatch.setenv("LOGNAME", "some:body")
    with pytest.raises(UsageError, match="ARTIFACTFS_ENTITY"):
        session.current().parse("n")


def test_a_damaged_store_is_an_error_not_wrong_bytes(tmp_path: Path) -> None:
    artifact = log(made(files={"big": "x" * (3 << 20)}))
    [blob] = [path for path in (tmp_path / "store/blobs").rglob("*") if path.is_file()]
    blob.chmod(0o600)
    with blob.open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"y")
    with pytest.raises(afs.IntegrityError):
        artifact.download()
    assert not Path("artifacts/bikes:v0/big").exists()


def test_content_ids_are_blake3(data: Path) -> None:
    artifact = made()
    assert artifact.manifest.entries["a.txt"].digest == base64.b64encode(blake3(b"alpha").digest()).decode()
    assert artifact.manifest.entries["a.txt"].extra == {"alg": model.BLAKE3}


def test_time_goes_on() -> None:
    """Versions are stamped by the clock: two commits are in order."""
    first = log(made())
    deadline = time.monotonic() + 5
    while datetime.datetime.now(datetime.UTC) <= datetime.datetime.fromisoformat(first.created_at):
        assert time.monotonic() < deadline
    assert log(made(files={"b": "2"})).created_at > first.created_at
