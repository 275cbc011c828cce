"""Test support: commits into a native store, what is in it, and what it must never be."""

from __future__ import annotations

import os
import secrets
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from artifactfs.folders import LocalFolder, MadeFolder
from artifactfs.maintenance import Problem, fsck
from artifactfs.model import Dir, File, Ref, Symlink, Version
from artifactfs.names import ArtifactName, parse
from artifactfs.publish import Change, Draft, Folder, NewFile, Published, publish
from artifactfs.store.native import NativeStore
from artifactfs.store.urls import open_store

NAME = parse("acme/vision/bikes")


def draft(folder: Folder | Path | Mapping[str, Change], name: ArtifactName | str = NAME, **fields: Any) -> Draft:
    """A draft of a folder, a local directory, or changes by name."""
    if isinstance(folder, Path):
        folder = LocalFolder(str(folder))
    elif isinstance(folder, Mapping):
        folder = MadeFolder(folder)
    fields.setdefault("type", "dataset")
    fields.setdefault("commit", secrets.token_hex(16))
    return Draft(name=parse(name) if isinstance(name, str) else name, folder=folder, **fields)


def commit(
    store: NativeStore, folder: Folder | Path | Mapping[str, Change], name: ArtifactName | str = NAME, **fields: Any
) -> Published:
    return publish(store, draft(folder, name, **fields))


def new_file(path: Path, content: bytes, executable: bool = False) -> NewFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return NewFile(str(path), executable)


def read_file(store: NativeStore, file: File) -> bytes:
    """The content, every block checked."""
    content = store.local_content(file, recheck=True)
    assert content is not None
    try:
        return content.read(0, file.size)
    finally:
        content.close()


def contents(store: NativeStore, version: Version) -> dict[str, Any]:
    """Everything in a version by path: (bytes, executable), a symlink's target, a reference, None for a directory."""
    found: dict[str, Any] = {}
    for path, entry in store.tree.walk(version.root):
        if isinstance(entry, File):
            found[path] = (read_file(store, entry), entry.executable)
        elif isinstance(entry, Symlink):
            found[path] = entry.target
        elif isinstance(entry, Ref):
            found[path] = entry
        else:
            found[path] = None
    return found


def directory(root: Path) -> dict[str, Any]:
    """The same of a local directory."""
    found: dict[str, Any] = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = Path(folder, name)
            relative = str(path.relative_to(root))
            if path.is_symlink():
                found[relative] = os.readlink(path)
            elif path.is_dir():
                found[relative] = None
            else:
                found[relative] = (path.read_bytes(), bool(path.stat().st_mode & 0o100))
    return found


def file_at(store: NativeStore, version: Version, path: str) -> File:
    entry = store.tree.resolve(version.root, path)
    assert isinstance(entry, File), (path, entry)
    return entry


def folder_at(store: NativeStore, version: Version, path: str) -> Dir:
    entry = store.tree.resolve(version.root, path)
    assert isinstance(entry, Dir), (path, entry)
    return entry


def problems(root: Path | str) -> list[Problem]:
    """What is wrong in the store, seen by a process that has read nothing yet."""
    return list(fsck(open_store(str(root))))


def objects(root: Path | str) -> dict[str, int]:
    """Sizes of the data objects of a store, by key."""
    return {
        str(path.relative_to(root)): path.stat().st_size
        for folder in ("packs", "blobs")
        for path in Path(root, folder).rglob("*")
        if path.is_file()
    }


def stored_bytes(root: Path | str) -> int:
    return sum(objects(root).values())


def leftovers(root: Path | str) -> list[str]:
    return sorted(path.name for path in Path(root, "tmp").glob("*"))


@contextmanager
def nothing_leaks() -> Iterator[None]:
    """No thread and no descriptor more afterwards than before."""
    threads, descriptors = threading.active_count(), _descriptors()
    yield
    assert threading.active_count() <= threads
    assert _descriptors() <= descriptors


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def fork(action: Callable[[], Any]) -> int:
    """The exit status of ``action`` in a child process: 0, 1 after an exception, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
