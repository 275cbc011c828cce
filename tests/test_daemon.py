"""Background mounts: readiness, reasons for failing, every way to end one, and what a killed daemon leaves."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from mounting import World, needs_fuse, world
from shelves import until

from artifactfs import control, daemon, errors, mountpoint
from artifactfs.errors import (
    ArtifactFSError,
    ConflictError,
    InvalidNameError,
    MountError,
    NotFoundError,
    NotPermittedError,
    UsageError,
    also,
)
from artifactfs.registry import MountRecord, Process, Registry, started_at, this_process

pytestmark = needs_fuse
__all__ = ["world"]


@pytest.fixture
def bikes(world: World) -> World:
    world.log("acme/vision/bikes", {"a": b"0", "sub/b": b"1"})
    return world


def processes(world: World) -> list[int]:
    """The daemons that still run for this test."""
    home = os.fsencode(os.environ["HOME"])
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes()
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"artifactfs.daemon" in command and b"HOME=" + home in environ.split(b"\0"):
            found.append(int(pid))
    return found


def test_start_and_unmount(bikes: World) -> None:
    path = bikes.directory()
    begun = time.monotonic()
    record = bikes.start(bikes.request("mount", "acme/vision/bikes:latest", path))
    assert time.monotonic() - begun < 10
    assert (path / "a").read_bytes() == b"0"  # at once: it answers
    assert (record.name, record.kind, record.state) == ("acme/vision/bikes:v0", "mount", "mounted")
    assert record.mountpoint == str(path) and record.pid != os.getpid()
    assert [(r.mountpoint, r.state) for r in daemon.mounts()] == [(str(path), "mounted")]
    assert daemon.find(path) == record
    result = daemon.unmount(path)
    assert (result.committed, result.detached, result.discarded) == ("", False, False)
    assert not os.path.ismount(path) and os.listdir(path) == []
    assert daemon.mounts(all=True) == [] and daemon.find(path) is None
    until(lambda: not processes(bikes))


def test_the_daemon_is_on_its_own(bikes: World) -> None:
    """It keeps nothing of its caller's: not its output, directory, session, or open files; and no secrets in its arguments."""
    record = bikes.record(bikes.mount("acme/vision/bikes:v0"))
    proc = Path(f"/proc/{record.pid}")
    assert os.readlink(proc / "cwd") == "/"
    assert os.getsid(record.pid) != os.getsid(0)
    assert (os.readlink(proc / "fd/0"), os.readlink(proc / "fd/1")) == (os.devnull, os.devnull)
    assert os.readlink(proc / "fd/2") == record.log
    ours = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}
    theirs = {os.readlink(proc / "fd" / fd) for fd in os.listdir(proc / "fd")}
    assert not {link for link in ours & theirs if link.startswith(("pipe:", "socket:"))}
    assert proc.joinpath("cmdline").read_bytes().split(b"\0")[1:-1] == [b"-P", b"-m", b"artifactfs.daemon"]
    registry = Path(os.environ["XDG_STATE_HOME"]) / "artifactfs/mounts"
    assert stat.S_IMODE(registry.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in registry.iterdir())


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("acme/vision/bikes:v9", NotFoundError, "v9"),
        ("acme/vision/bikes:nope", NotFoundError, "nope"),
        ("acme/vision/none:latest", NotFoundError, "none"),
        ("acme/nothing", NotFoundError, "acme/nothing"),
        ("bikes:latest", InvalidNameError, "no entity"),
        ("a/b/c/d:v0", InvalidNameError, "4 parts"),
        ("acme/vision/bikes:v0..v7", NotFoundError, "v7"),
        ("acme/vision/bad name:v0", InvalidNameError, "bad name"),
    ],
)
def test_reasons_of_the_daemon_are_raised_here(bikes: World, name: str, error: type[ArtifactFSError], text: str) -> None:
    path = bikes.directory()
    with pytest.raises(error, match=text) as caught:
        bikes.start(bikes.request("mount", name, path))
    assert type(caught.value) is error and "\n" not in str(caught.value)
    assert not os.path.ismount(path) and daemon.mounts(all=True) == []
    until(lambda: not processes(bikes))


def test_mountpoints_that_cannot_be(bikes: World, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full/inside").mkdir(parents=True)
    store = Path(bikes.settings.store) / "inside"
    store.mkdir()
    used = bikes.mount("acme/vision/bikes:v0")
    for path, error, text in (
        (tmp_path / "none", UsageError, "mkdir -p"),
        (tmp_path / "file", UsageError, "not a directory"),
        (tmp_path / "file/below", UsageError, "not"),
        (tmp_path / "full", MountError, "not empty"),
        (store, UsageError, "inside the store"),
        (used, MountError, "in use"),
    ):
        with pytest.raises(error, match=text):
            bikes.start(bikes.request("mount", "acme/vision/bikes:v0", path))
    assert (used / "a").read_bytes() == b"0"
    store.rmdir()
    empty = bikes.directory()
    with pytest.raises(UsageError, match=r"the cache .* would be inside"):
        bikes.start(bikes.request("mount", "acme/vision/bikes:v0", empty, cache_dir=str(empty / "cache")))


def test_no_device_and_no_library(bikes: World, tmp_path: Path) -> None:
    """In namespaces of their own: /dev without fuse, and a directory over the library."""
    script = (
        "import os; from artifactfs import daemon, settings; from artifactfs.errors import ArtifactFSError\n"
        f"try: daemon.start(daemon.request(settings.load(), 'mount', 'acme/vision/bikes:v0', {str(bikes.directory())!r}))\n"
        "except ArtifactFSError as e: print(type(e).__name__, e)\n"
    )
    hide = f'mount --bind {tmp_path} /dev/shm && mount -t tmpfs none /dev && {sys.executable} -c "$S"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", hide], env={**os.environ, "S": script}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("MountError there is no /dev/fuse"), done
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "FUSE_LIBRARY_PATH": "/nonexistent/libfuse.so.2"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.startswith("MountError libfuse 2 cannot be loaded"), done
    assert "apt install libfuse2" in done.stdout


def test_an_option_that_libfuse_refuses(bikes: World) -> None:
    with pytest.raises(MountError, match=r"unknown option.*nonsense"):
        bikes.start(bikes.request("mount", "acme/vision/bikes:v0", options=("nonsense",)))
    until(lambda: not processes(bikes))


def test_a_daemon_that_dies_while_it_starts(bikes: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken/artifactfs").mkdir(parents=True)
    (tmp_path / "broken/artifactfs/__init__.py").write_text("raise RuntimeError('cannot begin')")
    import artifactfs

    monkeypatch.setattr(artifactfs, "__file__", str(tmp_path / "broken/artifactfs/__init__.py"))
    with pytest.raises(MountError, match="cannot begin"):
        bikes.start(bikes.request("mount", "acme/vision/bikes:v0"))


def test_two_mounts_of_one_version(bikes: World) -> None:
    first, second = bikes.mount("acme/vision/bikes:v0"), bikes.mount("acme/vision/bikes:v0")
    assert {record.mountpoint for record in daemon.mounts()} == {str(first), str(second)}
    daemon.unmount(first)
    assert (second / "sub/b").read_bytes() == b"1"
    daemon.unmount(second)


@pytest.mark.parametrize("how", [["umount"], ["fusermount3", "-u"], ["umount", "--lazy"]])
def test_unmounting_by_others(bikes: World, how: list[str]) -> None:
    path = bikes.mount("acme/vision/bikes:v0")
    subprocess.run([*how, path], check=True)
    until(lambda: not processes(bikes))
    assert daemon.mounts(all=True) == []
    with pytest.raises(MountError, match="not a mountpoint"):
        daemon.unmount(path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_unmount(bikes: World, number: signal.Signals) -> None:
    path = bikes.mount("acme/vision/bikes:v0")
    os.kill(bikes.record(path).pid, number)
    until(lambda: not processes(bikes))
    assert not os.path.ismount(path) and daemon.mounts(all=True) == []


def test_a_busy_mount_is_not_unmounted(bikes: World) -> None:
    path = bikes.mount("acme/vision/bikes:v0")
    with open(path / "a", "rb") as file:
        with pytest.raises(ConflictError, match=rf"busy \(in use by .*\({os.getpid()}\)"):
            daemon.unmount(path)
        assert (path / "a").read_bytes() == b"0"  # nothing has happened
        result = daemon.unmount(path, lazy=True)
        assert result.detached and not os.path.ismount(path)
        assert [record.state for record in daemon.mounts()] == ["detached"]
        assert file.read() == b"0"
        again = bikes.start(bikes.request("mount", "acme/vision/bikes:v0", path))  # beside the one that is going
        assert daemon.find(path) == again
    until(lambda: len(daemon.mounts()) == 1)
    assert (path / "a").read_bytes() == b"0"
    daemon.unmount(path)


def test_a_killed_daemon_is_recognised_and_cleaned(bikes: World) -> None:
    path = bikes.mount("acme/vision/bikes:v0")
    bikes.kill(path)
    with pytest.raises(OSError) as caught:
        os.listdir(path)
    assert caught.value.errno == errno.ENOTCONN
    assert [record.state for record in daemon.mounts()] == ["dead"]
    with pytest.raises(MountError, match="died"):
        daemon.status(path)
    daemon.unmount(path)
    assert os.listdir(path) == [] and daemon.mounts(all=True) == []


def test_a_dead_mount_is_cleaned_by_mounting_there_again(bikes: World) -> None:
    path = bikes.mount("acme/vision/bikes:v0")
    bikes.kill(path)
    bikes.start(bikes.request("mount", "acme/vision/bikes:v0", path))
    assert (path / "a").read_bytes() == b"0"
    assert [record.state for record in daemon.mounts()] == ["mounted"]
    daemon.unmount(path)


def test_a_mount_without_a_record_is_still_unmounted(bikes: World) -> None:
    path = bikes.mount("acme/vision/bikes:v0")
    record = bikes.record(path)
    shutil.rmtree(Path(os.environ["XDG_STATE_HOME"]) / "artifactfs/mounts")
    daemon.unmount(path)
    assert not os.path.ismount(path)
    until(lambda: not record.process.lives())


def test_names_with_defaults(bikes: World) -> None:
    def names(text: str) -> list[str]:
        path = bikes.mount(text, entity="acme", project="vision")
        found = sorted(os.listdir(path))
        daemon.unmount(path)
        return found

    assert names("bikes:latest") == ["a", "sub"]
    assert names("bikes") == ["latest", "v0"]
    assert names("vision/bikes") == ["latest", "v0"]
    assert names("acme") == ["vision"]


def test_a_mountpoint_through_a_symlink_and_of_any_bytes(bikes: World, tmp_path: Path) -> None:
    real = tmp_path / os.fsdecode(b"b\xfft, \\o/".replace(b"/", b""))
    real.mkdir()
    (tmp_path / "way").symlink_to(real)
    bikes.start(bikes.request("mount", "acme/vision/bikes:v0", tmp_path / "way"))
    assert (real / "a").read_bytes() == b"0"
    assert daemon.find(tmp_path / "way") == daemon.find(real)
    daemon.unmount(tmp_path / "way")
    assert not os.path.ismount(real)


def test_a_long_state_directory(bikes: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / ("s" * 200)))
    long = World(tmp_path / "long")
    (tmp_path / "long").mkdir()
    path = long.mount("acme/vision/bikes:v0")
    assert (path / "a").read_bytes() == b"0"
    daemon.unmount(path)
    long.close()


def test_an_unprivileged_user(bikes: World) -> None:
    """The same through fusermount, as anybody runs it; in a namespace where anybody may open /dev/fuse."""
    home = Path(f"/tmp/afs-nobody-{os.getpid()}")
    script = (
        "import os, sys\n"
        "from artifactfs import daemon, settings\n"
        "r = daemon.request(settings.load(), 'mount', 'acme/vision/bikes:v0', sys.argv[1])\n"
        "daemon.start(r); print(open(sys.argv[1] + '/a').read())\n"
        "daemon.unmount(sys.argv[1]); print(os.listdir(sys.argv[1]))\n"
    )
    (home / "mnt").mkdir(parents=True)
    try:
        shutil.copytree(bikes.settings.store, home / "store")
        subprocess.run(["chown", "-R", "nobody", home], check=True)
        environ = {**os.environ, "HOME": str(home), "ARTIFACTFS_STORE": str(home / "store"), "S": script}
        environ.update({f"XDG_{which}_HOME": str(home / which) for which in ("CONFIG", "DATA", "CACHE", "STATE")})
        python = _python_of_nobody(environ)
        if not python:
            pytest.skip("nobody has no Python here that can import this package")
        as_nobody = f"setpriv --reuid=nobody --clear-groups {python} -c"
        device = f"mknod -m 666 {home}/fuse c 10 229 && mount --bind {home}/fuse /dev/fuse"
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", f'{device} && exec {as_nobody} "$S" {home}/mnt'],
            env=environ, capture_output=True, text=True, timeout=60, cwd="/",
        )  # fmt: skip
        assert done.stdout == "0\n[]\n", done
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _python_of_nobody(environ: dict[str, str]) -> str:
    """An interpreter that an unprivileged process can start, with this one's packages; "" if there is none."""
    environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import artifactfs.serving'], check=True)"
    for python in (sys.executable, "/usr/bin/python3"):
        command = ["setpriv", "--reuid=nobody", "--clear-groups", python, "-c", script]
        if os.path.exists(python) and not subprocess.run(command, env=environ, capture_output=True, cwd="/").returncode:
            return python
    return ""


# The parts


def test_errors_keep_their_class_on_the_way() -> None:
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, ArtifactFSError):
            packed = control.unpack_error(control.pack_error(kind("what happened")))
            assert type(packed) is kind and str(packed) == "what happened"
    both = also(NotFoundError("gone"), KeyError)
    assert type(control.unpack_error(control.pack_error(both))) is NotFoundError
    assert "ZeroDivisionError" in str(control.unpack_error(control.pack_error(ZeroDivisionError("x"))))
    assert type(control.unpack_error({"type": "Exception", "message": "m"})) is ArtifactFSError


def test_questions_and_answers(tmp_path: Path) -> None:
    def answer(question: dict[str, Any]) -> control.Answers:
        yield {"progress": 1}
        if question["op"] == "fail":
            raise ConflictError("no")
        if question["op"] == "bug":
            raise ZeroDivisionError
        yield {"result": question}

    path = str(tmp_path / ("deep" * 40) / "socket")
    os.mkdir(os.path.dirname(path))
    server = control.Server(path, answer)
    seen: list[Any] = []
    assert control.ask(path, {"op": "x"}, seen.append) == {"op": "x"} and seen == [1]
    with pytest.raises(ConflictError, match="no"):
        control.ask(path, {"op": "fail"})
    with pytest.raises(ArtifactFSError, match="internal error"):
        control.ask(path, {"op": "bug"})
    server.close()
    with pytest.raises(control.NoDaemonError):
        control.ask(path, {"op": "x"})


def test_a_process_is_not_taken_for_another() -> None:
    me = this_process()
    assert me.lives()
    assert not Process(me.pid, me.started + 1, me.boot, me.host).lives()
    assert not Process(me.pid, me.started, "another boot", me.host).lives()
    child = subprocess.Popen(["true"])
    until(lambda: started_at(child.pid) == -1)  # a zombie has ended
    child.wait()


def test_records_that_are_damaged_or_foreign_are_passed_over(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    registry.prepare()
    me = this_process()

    def record(id: str, **fields: Any) -> MountRecord:
        return MountRecord(
            **{
                "id": id,
                "kind": "mount",
                "name": "n",
                "mountpoint": "/m",
                "store": "s",
                "process": me,
                "started_at": id,
                **fields,
            }
        )

    registry.save(record("b", process=Process(1, 1, "", "another host")))
    registry.save(record("a", process=Process(me.pid, 1, me.boot, me.host)))
    (tmp_path / "mounts/c.json").write_text("{")
    assert [(found.id, found.state) for found in registry.records()] == [("a", "dead")]


def test_the_mount_table_with_awkward_paths(tmp_path: Path) -> None:
    path = tmp_path / "with space\tand\nlines\\"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", path], check=True)
    try:
        found = mountpoint.at(str(path))
        assert found is not None and found.type == "tmpfs" and found.device == os.minor(os.stat(path).st_dev)
        assert mountpoint.is_local(str(path / "nothing/yet"))
    finally:
        mountpoint.unmount(str(path))
    with pytest.raises(MountError, match="not mounted"):
        mountpoint.unmount(str(path))


def test_concurrent_unmounts_agree(bikes: World) -> None:
    path = bikes.mount("acme/vision/bikes:v0")
    outcomes: list[str] = []

    def end() -> None:
        try:
            daemon.unmount(path)
            outcomes.append("done")
        except (MountError, NotPermittedError) as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=end) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(outcomes) == 4 and "done" in outcomes
    assert not os.path.ismount(path) and daemon.mounts(all=True) == []
