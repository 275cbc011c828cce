"""The command line as its users have it: results, errors, exit codes, JSON. Mounts are in test_cli_mounts.py."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import Program, executable
from shelves import write_files

import artifactfs
from artifactfs.cli import program
from artifactfs.model import BLOCK

# --- help and usage ------------------------------------------------------------------------------


def test_help_lists_every_command(afs: Program) -> None:
    out = afs("--help").out
    assert all(f"  {name} " in out for name in program.COMMANDS)
    assert afs().out == out
    assert afs("-h").out == out


@pytest.mark.parametrize("name", [*program.COMMANDS, "umount"])
def test_help_of_every_command(afs: Program, name: str) -> None:
    out = afs(name, "--help").out
    assert out.startswith(f"Usage: artifactfs {name} ")
    assert "--store URL" in out
    assert out == afs(name, "-h").out


def test_version(afs: Program) -> None:
    assert afs("--version").out == "artifactfs 0.1.0\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope"], "there is no command 'nope'"),
        (["mount"], "Missing argument 'NAME'"),
        (["mount", "a/b/c:v0"], "Missing argument 'DIR'"),
        (["log", "a/b/c", ".", "--nope"], "--nope"),
        (["log", "a/b/c"], "say what to log"),
        (["--nope"], "--nope"),
        (["alias", "a/b/c", "set", "x"], "'set' is not one of 'add', 'remove'"),
        (["alias", "a/b/c", "add"], "Missing argument 'ALIASES...'"),
        (["describe", "a/b/c"], "say what to change"),
        (["delete", "a/b/c"], "say which version"),
        (["stage", "a/b/c"], "stage takes a NAME and a DIR"),
        (["stage", "a/b/c", "d", "e"], "stage takes a NAME and a DIR"),
        (["cache"], "Missing command"),
        (["cache", "nope"], "No such command 'nope'"),
        (["cache", "prune", "--to", "much"], "is not a size"),
        (["gc", "--grace", "soon"], "is not a duration"),
        (["versions", "a/b/c:v1"], "write a/b/c without :v1"),
        (["log", "a/b/c:v1", "."], "--alias v1"),
        (["runs", "a/b/c"], "runs belong to a project"),
        (["runs"], "say which project"),
        (["mount", "a/b/c:v0", ".", "-o", "frobnicate"], "mount option 'frobnicate' is not known"),
        (["mount", "a/b/c:v0", ".", "--prefetch", "some"], "use none, auto or all"),
        (["--store", "ftp://x/y", "ls"], "scheme 'ftp'"),
    ],
)
def test_usage_errors(afs: Program, arguments: list[str], said: str) -> None:
    ran = afs(*arguments, code=2)
    assert said in ran.err
    assert ran.err.count("\n") == 1
    assert ran.err.startswith("artifactfs: ")
    assert ran.out == ""
    ran = afs("--json", *arguments, code=2)
    assert said in ran.error["error"]
    assert ran.error["code"] == 2


MALFORMED_NAMES = [
    *("a/b/c d:v0", "a/b/c:", "a/b/c:x/y", "a/b/c:x:y", "a//c:v0", "/b/c:v0", "a/b/../c:v0", "a/b/..:v0", "a/b/c\n:v0"),
    *("w/x/y/z:v0", "a#/b/c:v0", "a/b?/c:v0", "a/b/é:v0", f"a/b/{'c' * 129}:v0", f"{'a' * 129}/b/c:v0", f"a/b/c:{'x' * 129}"),
]


@pytest.mark.parametrize("name", MALFORMED_NAMES)
@pytest.mark.parametrize(
    "command",
    [["info"], ["get"], ["checkout", "D"], ["verify"], ["warm"], ["ls"], ["lineage"], ["alias", "add", "x"],
     ["tag", "add", "x"], ["delete"], ["describe", "--ttl", "1d"]],
    ids=lambda words: words[0],
)  # fmt: skip
def test_malformed_names(afs: Program, command: list[str], name: str) -> None:
    ran = afs(command[0], name, *command[1:], code=2)
    assert ran.out == ""
    assert ran.err.startswith("artifactfs: ")
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--alias", "v3"], "reserved"),
        (["--alias", "a/b"], "may not contain / or :"),
        (["--alias", ""], "alias"),
        (["--alias", "x" * 129], "128"),
        (["--tag", " x"], "tag"),
        (["--tag", "a,b"], "tag"),
        (["--tag", ""], "tag"),
        (["--type", "job"], "reserved"),
        (["--type", "wandb-x"], "reserved"),
        (["--type", "a:b"], "may not contain"),
        (["--metadata", "{"], "not valid JSON"),
        (["--metadata", "[1]"], "must be a dict"),
        (["--metadata", '{"a": Infinity}'], "infinite"),
        (["--metadata", json.dumps({str(n): n for n in range(101)})], "at most 100"),
        (["--metadata", "@missing.json"], "missing.json"),
        (["--digest", "sha1"], "is not known"),
        (["--ttl", "0d"], "not a duration"),
        (["--ttl", "-1d"], "not a duration"),
        (["--ttl", "1 day"], "not a duration"),
        (["--reference", "no-scheme"], "has no scheme"),
        (["--reference", "tag:x"], "needs a name"),
    ],
)
def test_malformed_options_of_log(afs: Program, folder: Path, options: list[str], said: str) -> None:
    type_ = [] if "--type" in options else ["--type", "dataset"]
    ran = afs("log", "a/b/c", folder, *type_, *options, code=None)
    assert ran.code == (3 if "@missing.json" in options else 2)
    assert said in ran.err
    assert ran.err.count("\n") == 1
    assert afs("ls").out == "", "nothing was made"


def test_global_options_before_and_after(afs: Program, folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "elsewhere"
    before = afs("--store", store, "--json", "log", "a/b/c", folder, "--type", "t").document
    after = afs("info", "a/b/c", "--json", "--store", store).document
    assert after["digest"] == before["digest"]
    assert afs("info", "a/b/c", code=3).out == ""
    for words in (("--json", "cache", "info"), ("cache", "--json", "info"), ("cache", "info", "--json")):
        assert afs(*words).document["used"] == 0


def test_store_with_tilde_and_relative(afs: Program, folder: Path, isolated_home: Path, tmp_path: Path) -> None:
    afs("--store=~/there", "log", "a/b/c", folder, "--type", "t")
    assert (isolated_home / "there/store.json").exists()
    afs("--store", "here", "log", "a/b/c", folder, "--type", "t")
    assert (tmp_path / "here/store.json").exists()


def test_quiet_says_nothing_but_the_result(afs: Program, folder: Path) -> None:
    ran = afs("-q", "log", "a/b/c", folder, "--type", "t")
    assert (ran.out, ran.err) == ("a/b/c:v0\n", "")


# --- errors --------------------------------------------------------------------------------------


def test_exit_codes(afs: Program, logged: str, tmp_path: Path) -> None:
    assert "no version v9" in afs("info", f"{logged}:v9", code=3).err
    assert "no alias 'worst'" in afs("info", f"{logged}:worst", code=3).err
    assert "does not exist" in afs("info", "acme/vision/cars", code=3).err
    assert "has no path 'zzz'" in afs("ls", logged, "zzz", code=3).err
    assert afs("delete", f"{logged}:v0", "--json", code=4).error["code"] == 4
    assert afs("log", logged, tmp_path / "missing", code=3).err.count("\n") == 1


def test_type_of_a_new_collection(afs: Program, folder: Path) -> None:
    afs("log", "a/b/c", folder)
    assert afs("info", "a/b/c", "--json").document["type"] == "dataset"
    assert "already exists with type 'dataset'" in afs("log", "a/b/c", folder, "--type", "model", code=2).err
    assert afs("log", "a/b/c", folder).lines == ["a/b/c:v0"]


def test_json_error_is_one_document(afs: Program) -> None:
    ran = afs("info", "a/b/c:v0", "--json", code=3)
    assert ran.out == ""
    assert set(ran.error) == {"error", "code"}
    assert ran.error["code"] == 3


def test_store_of_another_format(afs: Program, logged: str, isolated_home: Path) -> None:
    header = isolated_home / "data/artifactfs/store/store.json"
    header.write_text('{"format": "artifactfs-store", "version": 99}')
    assert "upgrade artifactfs" in afs("ls", code=1).err
    header.write_text('{"format": "other", "version": 1}')
    assert "not an artifactfs store" in afs("info", logged, code=1).err
    header.write_text("{")
    assert "not an artifactfs store" in afs("info", logged, code=1).err


def test_directory_that_is_no_store(afs: Program, folder: Path) -> None:
    assert "not an artifactfs store" in afs("--store", folder, "log", "a/b/c", folder / "bin", "--type", "t", code=1).err


def test_store_inside_what_is_logged(afs: Program, folder: Path) -> None:
    assert "holds the store itself" in afs("--store", folder / "store", "log", "a/b/c", folder, "--type", "t", code=2).err


def test_control_characters_are_shown_as_escapes(afs: Program, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "odd", {"a\x1b[31mb\nc": b"1"})
    afs("log", "a/b/c", folder, "--type", "t", "--description", "one\ntwo\x07")
    assert "a\\x1b[31mb\\nc" in afs("ls", "a/b/c:v0").out
    assert afs("ls", "a/b/c:v0", "--json").document[0]["path"] == "a\x1b[31mb\nc"
    assert "\x1b" not in afs("info", "a/b/c").out
    assert "one\\ntwo\\x07" in afs("info", "a/b/c").out


def test_unexpected_exception_is_one_line(
    afs: Program, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(url: str) -> None:
        raise ZeroDivisionError("a bug")

    afs("ls")
    monkeypatch.setattr("artifactfs.cli.catalog.open_store", broken)
    assert afs("ls", code=1).err == "artifactfs: unexpected ZeroDivisionError: a bug; run with -v for details\n"
    assert program.run(["-v", "ls"]) == 1
    assert "Traceback" in capfd.readouterr().err


# --- log and what shows it -----------------------------------------------------------------------


def test_log_and_info(afs: Program, logged: str, folder: Path) -> None:
    info = afs("info", logged, "--json").document
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert {key: info[key] for key in ("entity", "project", "collection", "version", "type", "state", "tags", "metadata")} == {
        "entity": "acme", "project": "vision", "collection": "bikes", "version": "v0", "type": "dataset", "state": "COMMITTED",
        "tags": ["small"], "metadata": {"n": 1},
    }  # fmt: skip
    assert info["aliases"] == ["best", "latest"]
    assert info["size"] == sum(path.stat().st_size for path in files)
    assert info["file_count"] == len(files)
    assert info["description"] is None
    assert info["ttl"] is None
    assert len(info["digest"]) == 64
    assert info["created_at"].endswith("Z")
    text = afs("info", logged).out
    assert "acme/vision/bikes:v0" in text
    assert "best, latest" in text


def test_log_keeps_links_modes_and_empty_directories(afs: Program, logged: str, folder: Path, tmp_path: Path) -> None:
    afs("get", logged, tmp_path / "out")
    done = subprocess.run(["diff", "-r", "--no-dereference", folder, tmp_path / "out"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert os.readlink(tmp_path / "out/link") == "a.txt"
    assert (tmp_path / "out/empty-dir").is_dir()
    assert os.access(tmp_path / "out/bin/run.sh", os.X_OK)
    assert not (tmp_path / "out/a.txt").stat().st_mode & 0o111


def test_log_without_a_change(afs: Program, logged: str, folder: Path) -> None:
    ran = afs("log", logged, folder, "--alias", "again", "--json")
    assert ran.document["created"] is False
    assert ran.document["version"] == "v0"
    assert ran.document["aliases"] == ["again", "best", "latest"]
    ran = afs("log", logged, folder)
    assert ran.out == "acme/vision/bikes:v0\n"
    assert "nothing changed" in ran.err


def test_log_files_and_several_paths(afs: Program, folder: Path, tmp_path: Path) -> None:
    afs("log", "a/b/one", folder / "a.txt", "--type", "t")
    assert [row["path"] for row in afs("ls", "a/b/one:latest", "--json").document] == ["a.txt"]
    (tmp_path / "alias.txt").symlink_to(folder / "a.txt")
    afs("log", "a/b/many", folder / "bin", folder / "a.txt", tmp_path / "alias.txt", "--type", "t")
    rows = {row["path"]: row["kind"] for row in afs("ls", "a/b/many:latest", "--json").document}
    assert rows == {"a.txt": "file", "alias.txt": "file", "bin": "directory"}
    assert "both be 'a.txt'" in afs("log", "a/b/many", folder / "a.txt", folder / "a.txt", code=2).err


def test_log_special_files(afs: Program, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(folder / "sock"))
    server.close()
    assert "is a named pipe" in afs("log", "a/b/c", folder, "--type", "t", code=2).err
    ran = afs("log", "a/b/c", folder, "--type", "t", "--skip-special")
    assert "is a named pipe: passed over" in ran.err
    assert "is a socket: passed over" in ran.err
    assert not {"pipe", "sock"} & {row["path"] for row in afs("ls", "a/b/c:v0", "--json").document}


def test_log_names_that_are_not_utf8(afs: Program, folder: Path) -> None:
    (folder / os.fsdecode(b"bad\xff")).write_bytes(b"")
    ran = afs("log", "a/b/c", folder, "--type", "t", code=2)
    assert "not valid UTF-8" in ran.err
    assert "folder/bad\\xff' is not valid UTF-8" in ran.err.replace("\\\\", "\\")
    (folder / os.fsdecode(b"bad\xff")).unlink()
    (folder / "bad-link").symlink_to(os.fsdecode(b"\xff"))
    assert "bad-link" in afs("log", "a/b/c", folder, "--type", "t", code=2).err


def test_log_metadata_from_file_and_stdin(afs: Program, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text('{"a": [1, 2]}')
    assert afs("log", "a/b/c", folder, "--type", "t", "--metadata", "@m.json", "--json").document["metadata"] == {"a": [1, 2]}
    (tmp_path / "bad.json").write_bytes(b"\xff")
    assert "not UTF-8" in afs("log", "a/b/c", folder, "--metadata", "@bad.json", code=2).err


@pytest.mark.parametrize("algorithm", ["md5", "MD5", "xxh128", "blake3"])
def test_log_digests(afs: Program, folder: Path, algorithm: str) -> None:
    info = afs("log", "a/b/c", folder, "--type", "t", "--digest", algorithm, "--json").document
    assert info["digest_algorithm"] == algorithm.upper()
    if algorithm.lower() == "md5":
        # W&B's formula: symlinks and empty directories are no entries there.
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        lines = [f"{name}:{base64.b64encode(hashlib.md5((folder / name).read_bytes()).digest()).decode()}\n" for name in files]
        assert info["digest"] == hashlib.md5("".join(["wandb-artifact-manifest-v1\n", *lines]).encode()).hexdigest()


def test_log_references(afs: Program, folder: Path, tmp_path: Path) -> None:
    afs(
        "log",
        "a/b/c",
        folder / "bin",
        "--reference",
        f"file://{folder}/a.txt",
        "--reference",
        f"file://{folder}/deep",
        "--type",
        "t",
    )
    rows = {row["path"]: row for row in afs("ls", "a/b/c:v0", "--json").document}
    assert rows["a.txt"]["ref"] == f"file://{folder}/a.txt"
    assert rows["er"]["kind"] == "directory"
    assert afs("get", "a/b/c", "out").lines == ["out"]
    assert (tmp_path / "out/er/b.bin").read_bytes() == (folder / "deep/er/b.bin").read_bytes()
    assert "both be 'run.sh'" in afs("log", "a/b/c", folder / "bin", "--reference", f"file://{folder}/bin/run.sh", code=2).err


def test_log_expires(afs: Program, folder: Path) -> None:
    assert afs("log", "a/b/c", folder, "--type", "t", "--ttl", "30d", "--json").document["ttl"] == 30 * 86400
    assert ["ttl:", "30d"] in [line.split() for line in afs("info", "a/b/c").lines]
    assert afs("describe", "a/b/c:v0", "--ttl", "none", "--json").document["ttl"] is None


# --- listing -------------------------------------------------------------------------------------


def test_ls_levels(afs: Program, logged: str) -> None:
    assert afs("ls", "--json").document == [{"kind": "entity", "name": "acme"}]
    assert afs("ls", "/").lines == ["NAME", "acme"]
    assert afs("ls", "acme").lines == ["NAME", "acme/vision"]
    (row,) = afs("ls", "acme/vision", "--json").document
    assert (row["name"], row["type"], row["aliases"]) == ("acme/vision/bikes", "dataset", {"best": "v0", "latest": "v0"})
    assert afs("ls", "acme/vision").lines[0].split() == ["NAME", "TYPE", "LATEST", "UPDATED"]


def test_ls_empty_store(afs: Program) -> None:
    assert afs("ls").out == ""
    assert afs("ls", "--json").document == []


def test_ls_of_nothing(afs: Program, logged: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("zzz", "acme/zzz", "acme/vision/zzz"):
        assert afs("ls", name, code=3).err.count("\n") == 1
    monkeypatch.setenv("ARTIFACTFS_ENTITY", "acme")
    assert "nothing below 'zzz'" in afs("ls", "zzz", code=3).err
    assert "a.txt" in afs("ls", "vision/bikes").out


def test_ls_files(afs: Program, logged: str) -> None:
    rows = {row["path"]: row for row in afs("ls", logged, "--json").document}
    assert list(rows) == ["a.txt", "bin", "deep", "empty-dir", "empty.txt", "large.bin", "link"]
    assert (rows["link"]["kind"], rows["link"]["target"]) == ("symlink", "a.txt")
    assert rows["large.bin"]["size"] == 3 * BLOCK + 3
    assert (rows["bin"]["files"], rows["empty-dir"]["files"]) == (1, 0)
    assert "symlink" in afs("ls", f"{logged}:best").out
    assert [row["path"] for row in afs("ls", logged, "deep/er", "--json").document] == ["deep/er/b.bin"]
    assert afs("ls", logged, "./deep//er/", "--json").document == afs("ls", logged, "deep/er", "--json").document
    (row,) = afs("ls", logged, "bin/run.sh", "--json").document
    assert row["executable"] is True
    assert afs("ls", logged, "/", code=None).code in (0, 2)
    for path in ("../x", "/etc", "a\0b"):
        assert "Invalid artifact path" in afs("ls", logged, path, code=2).err


def test_defaults_of_names(afs: Program, logged: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "ARTIFACTFS_ENTITY" in afs("info", "bikes:v0", code=2).err
    monkeypatch.setenv("ARTIFACTFS_ENTITY", "acme")
    monkeypatch.setenv("ARTIFACTFS_PROJECT", "vision")
    assert afs("info", "bikes", "--json").document["name"] == "acme/vision/bikes:v0"
    assert afs("info", "vision/bikes:best", "--json").document["name"] == "acme/vision/bikes:v0"
    assert "a.txt" in afs("ls", "bikes").out
    assert "a.txt" in afs("ls", "bikes:v0").out


def test_versions_and_diff(afs: Program, logged: str, folder: Path) -> None:
    (folder / "a.txt").write_text("changed\n")
    (folder / "new.txt").write_text("new\n")
    (folder / "empty.txt").unlink()
    afs("log", logged, folder)
    rows = afs("versions", logged, "--json").document
    assert [(row["version"], row["aliases"]) for row in rows] == [("v0", ["best"]), ("v1", ["latest"])]
    assert afs("versions", logged).lines[0].split() == ["VERSION", "CREATED", "FILES", "SIZE", "ALIASES", "TAGS"]
    changes = {row["path"]: row["change"] for row in afs("diff", f"{logged}:v0", f"{logged}:v1", "--json").document}
    assert changes == {"a.txt": "modified", "new.txt": "added", "empty.txt": "deleted"}
    assert afs("diff", f"{logged}:v0", f"{logged}:v1").lines[0].split()[:2] == ["M", "a.txt"]
    assert afs("diff", f"{logged}:v0", f"{logged}:best").out == ""
    assert afs("diff", f"{logged}:v0", f"{logged}:best", "--json").document == []


def test_long_lists_stream(afs: Program, tmp_path: Path) -> None:
    write_files(tmp_path / "many", {f"f{n:05}": b"x" for n in range(2500)})
    afs("log", "a/b/c", tmp_path / "many", "--type", "t")
    assert len(afs("ls", "a/b/c:v0").lines) == 2501
    assert len(afs("ls", "a/b/c:v0", "--json").document) == 2500


# --- changing ------------------------------------------------------------------------------------


def test_aliases(afs: Program, logged: str, folder: Path) -> None:
    (folder / "a.txt").write_text("2")
    afs("log", logged, folder)
    assert afs("alias", f"{logged}:v1", "add", "best", "prod", "--json").document["aliases"] == ["best", "latest", "prod"]
    assert afs("info", f"{logged}:v0", "--json").document["aliases"] == []
    assert "v1 has it" in afs("alias", f"{logged}:v0", "remove", "best", code=3).err
    assert afs("alias", f"{logged}:v1", "remove", "best").out == "acme/vision/bikes:v1: latest, prod\n"
    assert "no alias 'best'" in afs("alias", f"{logged}:v1", "remove", "best", code=3).err
    assert "cannot be removed" in afs("alias", f"{logged}:v1", "remove", "latest", code=2).err
    for alias in ("v3", "a/b", "a:b", "", "..", "x" * 129):
        assert afs("alias", f"{logged}:v1", "add", alias, code=2).err.count("\n") == 1


def test_tags(afs: Program, logged: str) -> None:
    assert afs("tag", logged, "add", "x", "two words", "small", "--json").document["tags"] == ["small", "x", "two words"]
    assert afs("tag", logged, "remove", "x", "small").out == "acme/vision/bikes:v0: two words\n"
    assert "has no tag 'x'" in afs("tag", logged, "remove", "x", code=3).err
    for tag in ("a,b", " a", "a ", "", "x" * 129, "a\n"):
        assert afs("tag", logged, "add", tag, code=2).err.count("\n") == 1


def test_describe(afs: Program, logged: str) -> None:
    info = afs("describe", logged, "--description", "Bikes", "--metadata", '{"k": "v"}', "--ttl", "36h", "--json").document
    assert (info["description"], info["metadata"], info["ttl"]) == ("Bikes", {"k": "v"}, 36 * 3600)
    assert afs("describe", logged, "--description", "", "--json").document["description"] is None
    assert "not valid JSON" in afs("describe", logged, "--metadata", "{", code=2).err


def test_delete(afs: Program, logged: str) -> None:
    assert "best" in afs("delete", f"{logged}:v0", code=4).err
    assert afs("delete", f"{logged}:v0", "--delete-aliases", "--json").document["state"] == "DELETED"
    assert "was deleted" in afs("info", f"{logged}:v0", code=3).err
    assert afs("versions", logged, code=None).out == ""


# --- transfer ------------------------------------------------------------------------------------


def test_get(afs: Program, logged: str, tmp_path: Path) -> None:
    assert afs("get", logged).out == "artifacts/bikes:v0\n"
    assert (tmp_path / "artifacts/bikes:v0/a.txt").read_text() == "alpha\n"
    document = afs("get", logged, "part", "--path-prefix", "deep/", "--json").document
    assert document["files"] == 1
    assert document["directory"] == str(tmp_path / "part")
    assert [str(path.relative_to(tmp_path / "part")) for path in (tmp_path / "part").rglob("*") if path.is_file()] == [
        "deep/er/b.bin"
    ]


def test_checkout_removes_what_is_too_much(afs: Program, logged: str, tmp_path: Path) -> None:
    write_files(tmp_path / "out", {"extra/file": b"x", "a.txt": b"other"})
    assert afs("checkout", logged, "out").out == "out\n"
    assert not (tmp_path / "out/extra").exists()
    assert afs("verify", logged, "out").out == ""


def test_verify_directory(afs: Program, logged: str, tmp_path: Path) -> None:
    afs("get", logged, "out")
    assert "is right" in afs("verify", logged, "out").err
    (tmp_path / "out/a.txt").write_text("alphA\n")
    (tmp_path / "out/extra").touch()
    ran = afs("verify", logged, "out", "--json", code=6)
    assert {(row["path"], row["kind"]) for row in ran.document} == {("a.txt", "differs"), ("extra", "extra")}
    assert ran.error["code"] == 6
    assert afs("verify", logged, "missing", code=3).out == ""


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def test_damage_is_found(afs: Program, logged: str, isolated_home: Path) -> None:
    assert "is right" in afs("verify", logged).err
    assert "is sound: 1 version" in afs("fsck").err
    (blob,) = (isolated_home / "data/artifactfs/store/blobs").rglob("*/*")
    flip(blob, 2 * BLOCK)
    ran = afs("verify", logged, "--json", code=6)
    assert [(row["path"], row["kind"]) for row in ran.document] == [("large.bin", "unreadable")]
    ran = afs("fsck", "--json", code=6)
    assert [(row["where"], row["path"]) for row in ran.document] == [("acme/vision/bikes:v0", "large.bin")]
    assert ran.error["code"] == 6
    assert "large.bin" in afs("fsck", code=6).out
    assert afs("get", logged, "out", code=6).err.count("\n") == 1


# --- upkeep --------------------------------------------------------------------------------------


def test_warm_where_nothing_is_remote(afs: Program, logged: str) -> None:
    assert "nothing to fetch" in afs("warm", logged).out
    assert afs("warm", logged, "--check", "--json").document == []
    assert afs("warm", logged, "--evict", "--json").document == {"name": "acme/vision/bikes:v0", "freed": 0}


def test_cache(afs: Program, isolated_home: Path) -> None:
    info = afs("cache", "info", "--json").document
    assert info["root"] == str(isolated_home / "cache/artifactfs")
    assert info["limit"] == 10 << 30
    assert afs("cache", "prune", "--json").document == {"freed": 0}
    assert afs("cache", "verify").out == ""


def test_gc(afs: Program, logged: str, isolated_home: Path) -> None:
    afs("delete", f"{logged}:v0", "--delete-aliases")
    kept = afs("gc", "--json").document
    assert (kept["removed"], kept["dry_run"]) == (0, False)
    assert afs("gc", "--dry-run", "--grace", "0", "--json").document["removed"] > 0
    assert list((isolated_home / "data/artifactfs/store/blobs").rglob("*/*"))
    assert afs("gc", "--grace", "0").out.startswith("removed ")
    assert not list((isolated_home / "data/artifactfs/store/blobs").rglob("*/*"))


def test_gc_expires(afs: Program, folder: Path) -> None:
    afs("log", "a/b/c", folder, "--type", "t", "--ttl", "1s")
    time.sleep(1.1)  # the shortest time to live
    assert afs("gc", "--dry-run", "--json").document["expired"] == ["a/b/c:v0"]
    assert "expired a/b/c:v0" in afs("gc").out
    assert "was deleted" in afs("info", "a/b/c:v0", code=3).err


def test_runs_and_lineage(afs: Program, logged: str, tmp_path: Path) -> None:
    with artifactfs.init(entity="acme", project="vision", job_type="train") as run:
        run.use_artifact("bikes:latest")
        (tmp_path / "model.bin").write_bytes(b"weights")
        model = artifactfs.Artifact("net", type="model")
        model.add_file(str(tmp_path / "model.bin"))
        run.log_artifact(model).wait()
        id = run.id
    (row,) = afs("runs", "acme/vision", "--json").document
    assert (row["id"], row["used"], row["logged"]) == (id, ["acme/vision/bikes:v0"], ["acme/vision/net:v0"])
    assert id in afs("runs", "acme/vision").out
    assert [run["id"] for run in afs("lineage", logged, "--json").document["used_by"]] == [id]
    assert afs("lineage", "acme/vision/net", "--json").document["logged_by"]["id"] == id
    shown = afs("lineage", "acme/vision/net").out
    assert f"└─ logged by run acme/vision/{id}" in shown and "└─ which used acme/vision/bikes:v0" in shown
    assert afs("runs", "acme/other", "--json").document == []


# --- as a process --------------------------------------------------------------------------------


def test_console_script(logged: str) -> None:
    done = executable("info", logged, "--json")
    assert json.loads(done.stdout)["version"] == "v0"
    assert done.stderr == ""


def test_no_progress_bar_off_a_terminal(folder: Path) -> None:
    done = executable("log", "a/b/c", str(folder), "--type", "t")
    assert done.stdout == "a/b/c:v0\n"
    assert done.stderr.count("\n") == 1
    assert "\r" not in done.stderr + done.stdout
    assert "\x1b" not in done.stderr + done.stdout


def on_a_terminal(*arguments: str, **environ: str) -> tuple[str, str]:
    """(standard output, standard error) of a run whose standard error is a terminal."""
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "artifactfs.cli", *arguments]
    env = {**os.environ, "TERM": "xterm", **environ}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=env)
    os.close(theirs)
    shown = bytearray()
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:  # the other side is closed
        pass
    os.close(ours)
    assert process.stdout
    out = process.stdout.read().decode()
    assert process.wait(60) == 0
    return out, shown.decode()


def test_progress_bar_on_a_terminal(folder: Path) -> None:
    out, err = on_a_terminal("log", "a/b/c", str(folder), "--type", "t")
    assert out == "a/b/c:v0\n"
    assert "storing" in err
    out, err = on_a_terminal("log", "a/b/d", str(folder), "--type", "t", "--no-progress")
    assert "storing" not in err
    assert "\x1b" not in err
    _, err = on_a_terminal("log", "a/b/e", str(folder), "--type", "t", NO_COLOR="1")
    assert not [code for code in err.split("\x1b[")[1:] if code.split("m")[0].replace(";", "").isdigit() and "m" in code[:6]]


def test_broken_pipe(logged: str) -> None:
    command = f"{sys.executable} -m artifactfs.cli ls {logged} --json | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", "141")


def test_full_standard_output(logged: str) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "artifactfs.cli", "info", logged]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_interrupt(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    command = [sys.executable, "-m", "artifactfs.cli", "log", "a/b/c", str(tmp_path), "--metadata", f"@{tmp_path}/pipe"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    # The FIFO has a reader once the program waits in it.
    writer = os.open(tmp_path / "pipe", os.O_WRONLY)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    os.close(writer)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_ascii_terminal(afs: Program, tmp_path: Path) -> None:
    afs("log", "a/b/c", write_files(tmp_path / "x", {"é": b""}), "--type", "t")
    done = executable("ls", "a/b/c:v0", env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"})
    assert done.returncode == 0
    assert "\\xe9" in done.stdout


def test_closed_standard_streams(logged: str) -> None:
    for redirect, code in ((">&-", 0), ("2>&-", 0), (">&- 2>&-", 0)):
        done = subprocess.run(["bash", "-c", f"{sys.executable} -m artifactfs.cli info {logged} {redirect}"], timeout=60)
        assert done.returncode == code
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m artifactfs.cli info a/b/c 2>&-"], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, b"")


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["--help"], ["msgspec", "requests", "rich", "fuse", "blake3", "artifactfs.store", "artifactfs.daemon"]),
        (["mount", "--help"], ["requests", "rich", "fuse", "artifactfs.api"]),
        (["ls"], ["requests", "rich", "fuse", "artifactfs.daemon"]),
    ],
)
def test_start_up_imports_little(arguments: list[str], absent: list[str]) -> None:
    code = (
        f"import sys; from artifactfs.cli import program; program.run({arguments!r}); print(sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    loaded = done.stderr.splitlines()[-1]
    assert [name for name in absent if f"'{name}'" in loaded] == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    done = executable(env={**os.environ, "_ARTIFACTFS_COMPLETE": f"{shell}_source"})
    assert done.returncode == 0
    assert "_artifactfs_completion" in done.stdout
    env = {
        **os.environ,
        "_ARTIFACTFS_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": "artifactfs ver",
        "COMP_CWORD": "1" if shell != "fish" else "ver",
    }
    assert "versions" in executable(env=env).stdout


# --- stores on bad disks -------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.mark.root
@needs_root
def test_store_on_a_full_disk(afs: Program, small_disk: Path, tmp_path: Path) -> None:
    big = write_files(tmp_path / "big", {"noise": os.urandom(8 * BLOCK)})
    ran = afs("--store", small_disk / "store", "log", "a/b/c", big, "--type", "t", code=1)
    assert "No space left" in ran.err
    assert "make space" in ran.err
    assert ran.err.count("\n") == 1
    small = write_files(tmp_path / "small", {"file": b"1"})
    assert afs("--store", small_disk / "store", "log", "a/b/c", small, "--type", "t").out == "a/b/c:v0\n"
    afs("--store", small_disk / "store", "fsck")


@pytest.mark.root
@needs_root
def test_store_on_a_read_only_disk(afs: Program, small_disk: Path, tmp_path: Path) -> None:
    small = write_files(tmp_path / "small", {"file": b"1"})
    store = ["--store", str(small_disk / "store")]
    afs(*store, "log", "a/b/c", small, "--type", "t")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert afs(*store, "get", "a/b/c", tmp_path / "out").code == 0
    (small / "file").write_text("2")
    for command in (["log", "a/b/c", str(small)], ["alias", "a/b/c", "add", "x"], ["delete", "a/b/c:v0"]):
        ran = afs(*store, *command, code=7)
        assert "mounted read-only" in ran.err
        assert ran.err.count("\n") == 1


@pytest.mark.root
@needs_root
def test_get_onto_a_full_disk(afs: Program, small_disk: Path, tmp_path: Path) -> None:
    afs("log", "a/b/c", write_files(tmp_path / "big", {"noise": os.urandom(8 * BLOCK)}), "--type", "t")
    ran = afs("get", "a/b/c", small_disk / "out", code=1)
    assert "No space left" in ran.err
    assert ran.err.count("\n") == 1
