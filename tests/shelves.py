"""Test support: a store with versions to look at."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from artifactfs.cache import BlockCache
from artifactfs.folders import LocalFolder
from artifactfs.model import Version
from artifactfs.names import parse
from artifactfs.publish import Draft, Folder, publish
from artifactfs.reader import Reader
from artifactfs.settings import load as load_settings
from artifactfs.store.native import NativeStore
from artifactfs.store.urls import open_store

Files = Mapping[str, bytes | str | None]
"""Contents by path; text is a symlink's target, None an empty directory."""


def write_files(root: Path, files: Files) -> Path:
    """Make ``files`` below ``root``; one whose name ends with ``.sh`` is executable."""
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir(exist_ok=True)
        elif isinstance(content, str):
            path.symlink_to(content)
        else:
            path.write_bytes(content)
            path.chmod(0o755 if name.endswith(".sh") else 0o644)
    return root


def until(true: Callable[[], Any], seconds: float = 20.0, what: str = "") -> Any:
    """What ``true`` returns once it is true; fails the test after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what or true}"
        time.sleep(0.01)
    return value


class Shelf:
    """The store of this test's user, with a reader of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.settings = load_settings()
        self.store: NativeStore = open_store(self.settings.store)
        self.cache = BlockCache(self.settings.cache_dir, self.settings.cache_size)
        self.reader = Reader(self.store, self.cache)
        self.numbers = itertools.count()

    def log(self, name: str, files: Files | Path | Folder, **fields: Any) -> Version:
        """Log files, a local directory or a folder as the next version of ``name``."""
        folder: Any = files
        if isinstance(files, Mapping):
            files = write_files(self.root / f"made-{next(self.numbers)}", files)
        if isinstance(files, Path):
            folder = LocalFolder(str(files))
        fields.setdefault("type", "dataset")
        draft = Draft(name=parse(name), folder=folder, commit=secrets.token_hex(16), **fields)
        return publish(self.store, draft).version

    def close(self) -> None:
        self.reader.close()
        self.cache.close()


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    """A store that is still empty."""
    made = Shelf(tmp_path)
    yield made
    made.close()
