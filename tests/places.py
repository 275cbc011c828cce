"""Test support: each test once on a store in a directory, once on one in a bucket, and once on a W&B server where that can be.

The server is the stand-in of ``wandb_server``; ``differences`` says which modules are run on it, and which of their tests not.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb_server

from artifactfs import session
from artifactfs.store.native import NativeStore

_prefixes = itertools.count()


@pytest.fixture(params=["directory", "bucket", "wandb"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty store, which is the one of the settings; ``acme`` and ``vision`` are the defaults of names."""
    url = str(tmp_path / "store")
    if request.param == "bucket":
        url = request.getfixturevalue("shared_bucket").store_url(f"places-{os.getpid()}-{next(_prefixes)}")
    if request.param == "wandb":
        url = request.getfixturevalue("wandb_stand_in").url
        monkeypatch.setenv("WANDB_API_KEY", wandb_server.KEY)
    monkeypatch.setenv("ARTIFACTFS_STORE", url)
    return url


@pytest.fixture(params=["directory", "wandb"])
def here(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same without a bucket, for what differs in nothing that a bucket does."""
    url = str(tmp_path / "store")
    if request.param == "wandb":
        url = request.getfixturevalue("wandb_stand_in").url
        monkeypatch.setenv("WANDB_API_KEY", wandb_server.KEY)
    monkeypatch.setenv("ARTIFACTFS_STORE", url)
    return url


@pytest.fixture
def wandb_stand_in() -> Iterator[wandb_server.WandbServer]:
    """A W&B server of the tests' own, empty."""
    yield from wandb_server.running(page=100)


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
