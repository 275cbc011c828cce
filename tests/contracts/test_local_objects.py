"""What the object store in a directory does besides the contract: durability, and things in the directory that are no objects."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from steps import Journal

from artifactfs.errors import ArtifactFSError, IntegrityError, NotPermittedError, StoreFormatError
from artifactfs.objects import ABSENT
from artifactfs.objects.local import LocalObjects

PACK = "packs/ab/" + "ab" * 16


@pytest.fixture
def objects(tmp_path: Path) -> LocalObjects:
    return LocalObjects(tmp_path / "store")


def test_a_name_appears_after_its_bytes_and_is_durable_at_the_end(objects: LocalObjects, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(monkeypatch)
    objects.put(PACK, b"x" * 100_000)
    assert not journal.pending
    etag = objects.swap("catalog/a/b/c", b"one", ABSENT)
    assert not journal.pending
    assert objects.swap("catalog/a/b/c", b"two", etag or "")
    writer = objects.writer()
    writer.write_at(5, b"y")
    writer.commit(PACK)
    assert objects.refresh(PACK)
    assert not journal.pending and not journal.problems


def test_a_directory_that_another_process_just_made_is_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store/catalog/a").mkdir(parents=True)  # by one that died before it could
    journal = Journal(monkeypatch)
    LocalObjects(tmp_path / "store").swap("catalog/a/b", b"x", ABSENT)
    synced = [event.removeprefix(f"sync {tmp_path}") for event in journal.events if event.startswith("sync")]
    assert {"/store/", "/store/catalog/", "/store/catalog/a/"} <= set(synced)


def test_nothing_stays_in_tmp(objects: LocalObjects, tmp_path: Path) -> None:
    objects.put(PACK, b"x")
    etag = objects.swap("catalog/a", b"1", ABSENT)
    objects.swap("catalog/a", b"2", ABSENT)
    objects.swap("catalog/a", b"2", etag or "")
    objects.swap("catalog/a", b"2", "another")
    assert list((tmp_path / "store/tmp").iterdir()) == []


@pytest.mark.parametrize("path", ["store", "store/packs", "store/packs/ab"])
def test_a_file_where_a_directory_must_be(tmp_path: Path, path: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_bytes(b"not a store")
    objects = LocalObjects(tmp_path / "store")
    for action in (lambda: objects.get(PACK), lambda: objects.put(PACK, b"x"), lambda: objects.size(PACK)):
        with pytest.raises(StoreFormatError, match="not a directory"):
            action()
    assert (tmp_path / path).read_bytes() == b"not a store"


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _directory(path: Path) -> None:
    path.mkdir()


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [_fifo, _device, _directory, _loop])
def test_what_is_no_regular_file_is_no_object(objects: LocalObjects, tmp_path: Path, make: Callable[[Path], None]) -> None:
    objects.put("packs/ab/" + "00" * 16, b"x")
    make(tmp_path / "store" / PACK)
    for action in (lambda: objects.get(PACK), lambda: objects.read(PACK, 0, 1)):
        with pytest.raises(ArtifactFSError) as caught:
            action()
        assert PACK in str(caught.value) and "\n" not in str(caught.value)


def test_a_short_object_is_an_integrity_error(objects: LocalObjects, tmp_path: Path) -> None:
    objects.put(PACK, b"whole")
    (tmp_path / "store" / PACK).chmod(0o644)
    (tmp_path / "store" / PACK).write_bytes(b"who")
    with pytest.raises(IntegrityError, match=PACK):
        objects.read(PACK, 0, 5)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that other users may enter, which pytest's are not."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_another_users_store(open_directory: Path) -> None:
    """What may be read can be read; everything else says who refuses."""
    objects = LocalObjects(open_directory / "store")
    objects.put(PACK, b"x")
    hidden = LocalObjects(open_directory / "hidden")
    hidden.put(PACK, b"x")
    (open_directory / "hidden").chmod(0o700)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            assert objects.get(PACK)[0] == b"x"
            assert [info.key for info in objects.scan("packs/")] == [PACK]
            for refused in (
                lambda: objects.put(PACK, b"x"),
                lambda: objects.swap("catalog/a", b"x", ABSENT),
                lambda: objects.delete(PACK),
                lambda: objects.refresh(PACK),
                lambda: hidden.get(PACK),
                lambda: list(hidden.scan("packs/")),
            ):
                with pytest.raises(NotPermittedError, match="ermission denied"):
                    refused()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_refreshing_what_another_user_wrote_makes_a_copy(objects: LocalObjects, monkeypatch: pytest.MonkeyPatch) -> None:
    objects.put(PACK, b"x" * 10_000)
    inode = os.stat(objects.path(PACK) or "").st_ino

    def refuse(path: str) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refuse)
    assert objects.refresh(PACK)
    assert objects.get(PACK)[0] == b"x" * 10_000
    assert os.stat(objects.path(PACK) or "").st_ino != inode


def test_locks_as_nfs_has_them(objects: LocalObjects, monkeypatch: pytest.MonkeyPatch) -> None:
    """There an exclusive lock needs a descriptor open for writing, which no directory has."""
    real = fcntl.flock

    def flock(fd: int, operation: int) -> None:
        writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        if operation == fcntl.LOCK_EX and not writable:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    objects.put(PACK, b"x")
    etag = objects.swap("catalog/a", b"1", ABSENT)
    assert objects.swap("catalog/a", b"2", etag or "")
    assert objects.refresh(PACK) and objects.delete(PACK)
    assert [info.key for info in objects.scan("catalog/")] == ["catalog/a"]


def test_a_link_whose_first_answer_was_lost_is_ours(objects: LocalObjects, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over NFS a repeated request for a link finds the one that the first made."""
    real = os.link

    def twice(source: str, target: str) -> None:
        real(source, target)
        real(source, target)

    monkeypatch.setattr(os, "link", twice)
    assert objects.swap("catalog/a", b"1", ABSENT) is not None
    assert objects.swap("catalog/a", b"2", ABSENT) is None
    assert objects.get("catalog/a")[0] == b"1"


def test_a_lock_is_there_once_and_is_no_object(objects: LocalObjects, tmp_path: Path) -> None:
    assert list(objects.scan("")) == [] and not (tmp_path / "store").exists(), "reading makes none"
    objects.put(PACK, b"x")
    inode = (tmp_path / "store/.lock").stat().st_ino
    objects.swap("a", b"x", objects.swap("a", b"1", ABSENT) or "")
    assert (tmp_path / "store/.lock").stat().st_ino == inode
    assert sorted(info.key for info in objects.scan("")) == sorted([PACK, "a"])
