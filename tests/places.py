"""Test support: each test once on a store in a directory, and once on one in a bucket."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from artifactfs import session
from artifactfs.store.native import NativeStore

_prefixes = itertools.count()


@pytest.fixture(params=["directory", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty store, which is the one of the settings; ``acme`` and ``vision`` are the defaults of names."""
    url = str(tmp_path / "store")
    if request.param == "bucket":
        url = request.getfixturevalue("shared_bucket").store_url(f"places-{os.getpid()}-{next(_prefixes)}")
    monkeypatch.setenv("ARTIFACTFS_STORE", url)
    return url


@pytest.fixture
def store(place: str, desk: Path) -> NativeStore:
    return session.current().store


@pytest.fixture
def desk(tmp_path: Path, isolated_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, empty, with an entity and a project to work in; no run is left behind."""
    monkeypatch.setenv("ARTIFACTFS_STORE", os.environ.get("ARTIFACTFS_STORE", str(tmp_path / "store")))
    monkeypatch.setenv("ARTIFACTFS_ENTITY", "acme")
    monkeypatch.setenv("ARTIFACTFS_PROJECT", "vision")
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert session.active_runs == []
