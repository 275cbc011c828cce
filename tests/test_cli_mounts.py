"""The command line with real mounts: mount, stage, unmount, commit, status, mounts, doctor and the mount(8) helper."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from programs import Program, executable
from shelves import until, write_files

from artifactfs import daemon, mountpoint
from artifactfs.cli import mount_helper, mount_options
from artifactfs.errors import UsageError

pytestmark = pytest.mark.fuse

NAME = "acme/vision/bikes"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty directory to mount on."""
    path = tmp_path / "mnt"
    path.mkdir()
    return path


def equal(one: Path, other: Path) -> bool:
    return subprocess.run(["diff", "-r", "--no-dereference", one, other]).returncode == 0


def source(path: Path) -> tuple[str, str]:
    mount = mountpoint.at(str(path))
    assert mount is not None
    return mount.source, mount.type


# --- mount ---------------------------------------------------------------------------------------


def test_mount_and_unmount(afs: Program, logged: str, folder: Path, place: Path) -> None:
    ran = afs("mount", logged + ":best", place)
    assert ran.out == f"{NAME}:v0 mounted on {place}\n"
    assert equal(folder, place)
    assert source(place) == (f"artifactfs#{NAME}:v0", "fuse.artifactfs")
    (row,) = afs("mounts", "--json").document
    assert {key: row[key] for key in ("mountpoint", "name", "kind", "state")} == {
        "mountpoint": str(place), "name": f"{NAME}:v0", "kind": "mount", "state": "mounted",
    }  # fmt: skip
    os.kill(row["pid"], 0)
    assert str(place) in afs("mounts").out
    assert afs("unmount", place).out == ""
    assert mountpoint.at(str(place)) is None
    assert afs("mounts", "--json").document == []
    until(lambda: not os.path.exists(f"/proc/{row['pid']}"))


def test_mount_json_and_relative_directory(afs: Program, logged: str, place: Path) -> None:
    document = afs("mount", logged + ":v0", "mnt", "--json").document
    assert document["mountpoint"] == str(place)
    assert document["name"] == f"{NAME}:v0"
    ended = afs("umount", "mnt", "--json").document
    assert (ended["committed"], ended["discarded"]) == (None, False)


def test_browse_and_prefix_and_difference(afs: Program, logged: str, folder: Path, place: Path) -> None:
    (folder / "a.txt").write_text("2\n")
    afs("log", logged, folder)
    afs("mount", logged, place)
    assert sorted(os.listdir(place)) == ["best", "latest", "v0", "v1"]
    assert os.readlink(place / "latest") == "v1"
    afs("unmount", place)
    afs("mount", "acme", place)
    assert (place / "vision/bikes/v0/a.txt").read_text() == "alpha\n"
    afs("unmount", place)
    afs("mount", f"{logged}:v0..v1", place)
    assert os.listdir(place / "modified") == ["a.txt"]
    afs("unmount", place)
    afs("mount", f"{logged}:v0", place, "--path-prefix", "deep/")
    assert os.listdir(place) == ["deep"]
    afs("unmount", place)


def test_mount_errors(afs: Program, logged: str, folder: Path, place: Path, tmp_path: Path) -> None:
    for arguments, code, said in [
        ([f"{logged}:v9", place], 3, "v9"),
        ([f"{logged}:worst", place], 3, "worst"),
        (["acme/vision/cars:v0", place], 3, "cars"),
        (["acme/vision/cars", place], 3, "cars"),
        (["a b:c:d", place], 2, "a b"),
        ([f"{logged}:v0", tmp_path / "missing"], 2, "does not exist"),
        ([f"{logged}:v0", folder / "a.txt"], 2, "not a directory"),
        ([f"{logged}:v0", folder], 1, "not empty"),
    ]:
        ran = afs("mount", *map(str, arguments), code=code)
        assert said in ran.err
        assert ran.err.count("\n") == 1
        assert ran.out == ""
    afs("mount", f"{logged}:v0", place)
    assert "in use" in afs("mount", f"{logged}:v0", place, code=1).err
    afs("unmount", place)
    assert afs("unmount", place, code=1).err.count("\n") == 1
    assert afs("mounts").out == ""


def test_unmount_of_what_is_in_use(afs: Program, logged: str, place: Path) -> None:
    afs("mount", f"{logged}:v0", place)
    with open(place / "a.txt"):
        ran = afs("unmount", place, code=4)
        assert "busy" in ran.err
        assert (place / "a.txt").exists()
        assert "detached" in afs("unmount", "--lazy", place).err
    until(lambda: not afs("mounts", "--json").document)


def test_dead_mount(afs: Program, logged: str, place: Path) -> None:
    pid = afs("mount", f"{logged}:v0", place, "--json").document["pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: afs("mounts", "--json").document[0]["state"] == "dead")
    ran = afs("mounts")
    assert f"artifactfs unmount {place} cleans up" in ran.err
    afs("unmount", place, code=None)
    assert mountpoint.at(str(place)) is None
    assert afs("mounts").out == ""


def test_foreground(afs: Program, logged: str, place: Path) -> None:
    command = [sys.executable, "-m", "artifactfs.cli", "mount", "--foreground", f"{logged}:v0", str(place)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert "mounted on" in process.stdout.readline()
    assert (place / "a.txt").read_text() == "alpha\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert mountpoint.at(str(place)) is None


# --- stage ---------------------------------------------------------------------------------------


def change(place: Path) -> None:
    (place / "a.txt").write_text("changed\n")
    (place / "new").mkdir()
    (place / "new/file").write_text("new\n")
    (place / "empty.txt").unlink()


def test_stage_status_commit_unmount(afs: Program, logged: str, folder: Path, place: Path, tmp_path: Path) -> None:
    afs("stage", logged, place, "--alias", "next", "--tag", "t", "--description", "second", "--metadata", '{"m": 2}')
    assert equal(folder, place)
    assert "nothing was changed" in afs("status", place).err
    change(place)
    changes = {row["path"]: row["change"] for row in afs("status", place, "--json").document}
    assert changes == {"a.txt": "modified", "new": "added", "new/file": "added", "empty.txt": "deleted"}
    assert "M  a.txt" in afs("status", place).lines
    assert afs("commit", place).out == f"{NAME}:v1\n"
    assert "nothing was changed" in afs("commit", place).err
    (place / "more").write_text("more\n")
    copy = shutil.copytree(place, tmp_path / "copy", symlinks=True)
    ran = afs("unmount", place)
    assert ran.out == f"{NAME}:v2\n"
    afs("checkout", f"{logged}:v2", "out")
    assert equal(copy, tmp_path / "out")
    info = afs("info", f"{logged}:v2", "--json").document
    assert (info["description"], info["metadata"], info["tags"]) == ("second", {"m": 2}, ["t"])
    assert "next" in info["aliases"]


def test_stage_without_a_change(afs: Program, logged: str, place: Path) -> None:
    afs("stage", logged, place)
    ran = afs("unmount", place)
    assert "no new version" in ran.err
    assert len(afs("versions", logged, "--json").document) == 1


def test_stage_discard(afs: Program, logged: str, place: Path, isolated_home: Path) -> None:
    afs("stage", logged, place)
    change(place)
    ran = afs("unmount", "--discard", place, "--json")
    assert ran.document["discarded"] is True
    assert len(afs("versions", logged, "--json").document) == 1
    assert list((isolated_home / "data/artifactfs/stages").iterdir()) == []


def test_stage_of_something_new(afs: Program, place: Path) -> None:
    afs("stage", "a/b/c", place, "--type", "model", "--base", "none")
    (place / "weights").write_bytes(b"1")
    assert afs("unmount", place).out == "a/b/c:v0\n"
    afs("stage", "a/b/c", place, "--base", "none")
    assert os.listdir(place) == []
    afs("unmount", "--discard", place)
    assert afs("stage", "a/b/c", place, "--base", "v7", code=3).err.count("\n") == 1
    for options in (["--alias", "v1"], ["--tag", ","], ["--metadata", "["], ["--type", "job"]):
        assert afs("stage", "a/b/c", place, *options, code=2).err.count("\n") == 1
    assert mountpoint.at(str(place)) is None


def test_umount_alone_commits(afs: Program, logged: str, place: Path) -> None:
    afs("stage", logged, place)
    change(place)
    subprocess.run(["umount", place], check=True)
    until(lambda: len(afs("versions", logged, "--json").document) == 2)
    assert afs("unmount", place).out == f"{NAME}:v1\n"


def test_expect_base(afs: Program, logged: str, folder: Path, place: Path) -> None:
    afs("stage", logged, place, "--expect-base")
    change(place)
    (folder / "a.txt").write_text("somebody else\n")
    afs("log", logged, folder)
    ran = afs("unmount", place, code=4)
    assert "somebody else committed" in ran.err
    assert "commit --resume" in ran.err
    assert mountpoint.at(str(place)) is None


@pytest.mark.parametrize("by", ["mountpoint", "directory"])
def test_killed_stage_is_resumed(afs: Program, logged: str, place: Path, by: str) -> None:
    record = afs("stage", logged, place, "--json").document
    change(place)
    os.kill(record["pid"], signal.SIGKILL)
    until(lambda: afs("mounts", "--json").document[0]["state"] == "dead")
    ran = afs("unmount", place, code=1)
    assert record["staging"] in ran.err
    (row,) = afs("mounts", "--all", "--json").document
    assert (row["state"], row["staging"], row["kind"]) == ("orphan", record["staging"], "stage")
    assert f"commit --resume {record['staging']}" in afs("mounts", "--all").err
    where = place if by == "mountpoint" else record["staging"]
    afs("stage", "--resume", where)
    assert (place / "a.txt").read_text() == "changed\n"
    (place / "later").write_text("later\n")
    assert "in use" in afs("commit", "--resume", where, code=4).err or by == "directory"
    assert afs("unmount", place).out == f"{NAME}:v1\n"
    assert afs("mounts", "--all", "--json").document == []


def test_killed_stage_is_committed(afs: Program, logged: str, place: Path) -> None:
    record = afs("stage", logged, place, "--json").document
    change(place)
    os.kill(record["pid"], signal.SIGKILL)
    until(lambda: afs("mounts", "--json").document[0]["state"] == "dead")
    ran = afs("commit", "--resume", place, "--json")
    assert ran.document == {"mountpoint": str(place), "committed": f"{NAME}:v1", "created": True, "warning": None}
    assert mountpoint.at(str(place)) is None
    assert afs("mounts", "--all", "--json").document == []
    assert not os.path.exists(record["staging"])
    assert "there is no stage to resume" in afs("commit", "--resume", place, code=3).err


@pytest.mark.parametrize("by", ["mountpoint", "directory"])
@pytest.mark.parametrize("unmounted", [False, True])
def test_killed_stage_is_looked_at_and_discarded(afs: Program, logged: str, place: Path, by: str, unmounted: bool) -> None:
    record = afs("stage", logged, place, "--json").document
    change(place)
    changes = afs("status", place).out
    os.kill(record["pid"], signal.SIGKILL)
    until(lambda: afs("mounts", "--json").document[0]["state"] == "dead")
    if unmounted:
        afs("unmount", place, code=1)
    else:
        assert "commit --resume" in afs("commit", place, code=1).err
    where = record["staging"] if by == "directory" and unmounted else place
    assert afs("status", where).out == changes != ""
    assert afs("unmount", "--discard", where, "--json").document["discarded"]
    assert not os.path.exists(record["staging"])
    assert afs("mounts", "--all", "--json").document == []
    afs("unmount", "--discard", where, code=1)


def test_several_stages_that_are_left(afs: Program, logged: str, place: Path) -> None:
    records = []
    for _ in range(2):
        ran = afs("stage", logged, place, "--json")
        assert all(f"commit --resume {record['staging']}" in ran.err for record in records)
        records.append(ran.document)
        change(place)
        os.kill(records[-1]["pid"], signal.SIGKILL)
        until(lambda: {row["state"] for row in afs("mounts", "--json").document} == {"dead"})
        afs("unmount", place, code=1)
    ran = afs("unmount", "--discard", place, code=4)
    assert all(record["staging"] in ran.err and os.path.exists(record["staging"]) for record in records)
    for record in records:
        afs("unmount", "--discard", record["staging"])
    assert afs("mounts", "--all", "--json").document == []


def test_commands_for_a_stage_that_has_ended(afs: Program, logged: str, place: Path) -> None:
    afs("stage", logged, place, "--expect-base")
    change(place)
    afs("log", logged, place.parent / "folder" / "a.txt")
    afs("unmount", place, code=4)
    assert afs("status", place).out
    afs("unmount", "--discard", place)
    afs("stage", logged, place)
    (place / "new").touch()
    subprocess.run(["umount", place], check=True)
    until(lambda: afs("mounts", "--all", "--json").document[0]["state"] == "committed")
    for command in ("commit", "status"):
        assert f"was committed as {logged}:v2" in afs(command, place, code=1).err
    afs("unmount", place)


def test_commands_for_stages_on_other_directories(afs: Program, logged: str, place: Path) -> None:
    for command in ("commit", "status"):
        assert afs(command, place, code=1).err.count("\n") == 1
    afs("mount", f"{logged}:v0", place)
    for command in ("commit", "status"):
        assert "read-only mount" in afs(command, place, code=2).err
    afs("unmount", place)


# --- -o and mount(8) -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("", {"options": ()}),
        ("ro,_netdev,nofail,x-systemd.automount,noatime,user=me,comment=hi", {"options": ()}),
        ("rw,allow_other,offline", {"allow_other": True, "offline": True, "options": ()}),
        (
            "store=/srv/a\\,b,prefetch=all,path_prefix=x/y,noexec",
            {"store": "/srv/a,b", "prefetch": "all", "path_prefix": "x/y", "options": ("noexec",)},
        ),
    ],
)
def test_mount_options(text: str, fields: dict[str, Any]) -> None:
    assert mount_options.parse(text) == fields


@pytest.mark.parametrize("text", ["nope", "store", "prefetch=some", "offline=1", "ro,bogus=1"])
def test_malformed_mount_options(text: str) -> None:
    with pytest.raises(UsageError):
        mount_options.parse(text)


def test_stage_options(afs: Program, logged: str, place: Path) -> None:
    for option in ("ro", "path_prefix=x", "bogus"):
        assert afs("stage", logged, place, "-o", option, code=2).err.count("\n") == 1
    afs("stage", logged, place, "-o", "allow_other,noatime")
    assert "allow_other" in subprocess.run(["findmnt", "-no", "OPTIONS", place], capture_output=True, text=True).stdout
    afs("unmount", place)


def test_sloppy_mount_options() -> None:
    assert mount_options.parse("nope,bogus=1,offline", sloppy=True) == {"offline": True, "options": ()}


def helper(*arguments: str | Path) -> int:
    return mount_helper.run([str(argument) for argument in arguments])


def test_mount_helper(afs: Program, logged: str, place: Path, isolated_home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store = isolated_home / "data/artifactfs/store"
    assert helper(f"{logged}:v0", place, "-n", "-o", f"rw,_netdev,nofail,store={store}", "-v") == 0
    assert "mounted on" in capfd.readouterr().out
    assert (place / "a.txt").read_text() == "alpha\n"
    assert helper(f"{logged}:v0", place) == 32
    daemon.unmount(place)
    assert helper("-f", f"{logged}:v0", place) == 0
    assert mountpoint.at(str(place)) is None
    capfd.readouterr()
    for arguments, code in [
        ([], 1), (["x"], 1), (["-Z", "x", "y"], 1), ([logged, place, "-o", "bogus"], 1), (["a b/c:v0", place], 1),
        ([f"{logged}:v0", place / "missing"], 1), ([f"{logged}:v9", place], 32), ([f"{logged}:v9", place, "-so", "bogus"], 32),
    ]:  # fmt: skip
        assert helper(*arguments) == code
        err = capfd.readouterr().err
        assert err.startswith("mount.artifactfs: ")
        assert err.count("\n") == 1
    assert helper("-h") == 0


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root and unshare")
def test_mount_command_of_the_system(afs: Program, logged: str, folder: Path, place: Path, tmp_path: Path) -> None:
    """``mount -t artifactfs`` and fstab, in a mount namespace where /usr/sbin has only our helper."""
    sbin = tmp_path / "sbin"
    sbin.mkdir()
    (sbin / "mount.artifactfs").write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "from artifactfs.cli.mount_helper import main; main()" "$@"\n'
    )
    (sbin / "mount.artifactfs").chmod(0o755)
    (tmp_path / "fstab").write_text(f"{logged}:best {place} artifactfs ro,nofail,_netdev 0 0\n")
    script = f"""
        set -e
        mount --bind {sbin} "$(realpath /sbin)"
        mount -t artifactfs {logged}:v0 {place} -o ro
        diff -r --no-dereference {folder} {place}
        umount {place}
        mount --fstab {tmp_path}/fstab {place}
        findmnt --noheadings --output SOURCE,FSTYPE {place}
        umount {place}
        mount -t artifactfs {logged}:v9 {place} || echo "code $?"
    """
    done = subprocess.run(["unshare", "--mount", "bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"artifactfs#{logged}:v0", "fuse.artifactfs", "code", "32"]


# --- doctor --------------------------------------------------------------------------------------


def test_doctor(afs: Program, logged: str) -> None:
    rows = {row["what"]: row for row in afs("doctor", "--json").document}
    assert all(row["ok"] for row in rows.values())
    assert {"libfuse", "/dev/fuse", "fuse.conf", "mounting", "credentials", "store", "cache", "staging"} <= set(rows)
    assert "works" in rows["mounting"]["found"]
    assert "mounting" in afs("doctor").out


def test_doctor_names_what_is_broken(afs: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, {"plain": b"", "other/file": b""})
    monkeypatch.setenv("ARTIFACTFS_CACHE_DIR", str(tmp_path / "plain"))
    ran = afs("--store", tmp_path / "other", "doctor", "--json", code=1)
    rows = {row["what"]: row for row in ran.document}
    assert not rows["store"]["ok"]
    assert rows["store"]["fix"]
    assert "store" in ran.error["error"]


def test_no_libfuse(logged: str, place: Path) -> None:
    env = {**os.environ, "FUSE_LIBRARY_PATH": "/nonexistent/libfuse.so.2"}
    done = executable("mount", f"{logged}:v0", str(place), env=env)
    assert done.returncode == 1
    assert "libfuse 2 cannot be loaded" in done.stderr
    assert "apt install libfuse2" in done.stderr
    assert done.stderr.count("\n") == 1
    rows = {row["what"]: row for row in json.loads(executable("doctor", "--json", env=env).stdout)}
    assert not rows["libfuse"]["ok"]
    assert "apt install libfuse2" in rows["libfuse"]["fix"]


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root and unshare")
def test_no_device(logged: str, place: Path) -> None:
    """Without /dev/fuse, as in a container that was not given it."""
    script = f"mount -t tmpfs none /dev && {sys.executable} -m artifactfs.cli mount {logged}:v0 {place}"
    done = subprocess.run(["unshare", "--mount", "bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "there is no /dev/fuse" in done.stderr
    assert done.stderr.count("\n") == 1
