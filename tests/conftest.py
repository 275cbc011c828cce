"""Fixtures of all tests: an isolated home, no mount left behind, and an order in which the lowest failure is seen first."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import differences
import pytest
from hypothesis import HealthCheck, settings
from places import desk, here, place, store, wandb_stand_in  # noqa: F401 - fixtures for all
from programs import afs, folder, logged  # noqa: F401 - fixtures for all
from servers import azurite, bucket, container, gcs, gcs_bucket, seaweed, shared_bucket, versioned_bucket  # noqa: F401 - fixtures for all
from serving_fixture import wandb_server  # noqa: F401 - a fixture for all

from artifactfs import session

# Test modules by the layer of what they test; one that is not named here runs between the layers and the command line.
_ORDER = (
    ("layers", "errors", "names"),
    ("model", "content", "settings"),
    ("objects", "http"),
    ("pack", "tree", "references"),
    ("cache", "store", "native"),
    ("reader", "publish"),
    ("view", "staging", "media", "folders", "download"),
    ("artifact", "run", "api"),
    ("mount", "daemon", "filesystem"),
    (),
    ("cli", "serve", "web"),
    ("scripts", "docs", "quickstart"),
)
_RANK = {name: rank for rank, names in enumerate(_ORDER) for name in names}
_UNRANKED = _ORDER.index(())

# What the caller's environment may hold that a program of ours or a client library of a cloud would heed.
_OUTSIDE = ("ARTIFACTFS_", "XDG_", "WANDB_", "COMET_", "AWS_", "AZURE_", "GOOGLE_", "STORAGE_EMULATOR_HOST")

# A busy two-core machine: a slow example is no failure, the test's own timeout is. The same examples in every run, so that what a
# change broke is told apart from a new find; ARTIFACTFS_LONG_TESTS=1 looks for those.
settings.register_profile(
    "default",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
    derandomize="ARTIFACTFS_LONG_TESTS" not in os.environ,
)
settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if _stands(item)]
    items.sort(key=lambda item: (item.get_closest_marker("slow") is not None, _rank(item)))


def _stands(item: pytest.Item) -> bool:
    """Whether a test that is to be run on a W&B server can be."""
    given = getattr(item, "callspec", None)
    on_wandb = given is not None and "wandb" in (given.params.get("place"), given.params.get("here"))
    return not on_wandb or differences.stands(item.path.stem, getattr(item, "originalname", item.name))


def _rank(item: pytest.Item) -> int:
    words = item.path.stem.removeprefix("test_").split("_")
    return _RANK.get(words[0], _UNRANKED)


@pytest.fixture(autouse=True)
def isolated_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The home directory of this test, with its own XDG directories; no setting of the caller's environment is seen."""
    home = tmp_path_factory.mktemp("home")
    for key in [key for key in os.environ if key.startswith(_OUTSIDE)]:
        monkeypatch.delenv(key)
    for key in ("NO_COLOR", "FORCE_COLOR", "http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(home))
    for which in ("CONFIG", "DATA", "CACHE", "STATE"):
        monkeypatch.setenv(f"XDG_{which}_HOME", str(home / which.lower()))
    yield home
    session._sessions.clear()  # each holds descriptors, and thousands of tests are one process


@pytest.fixture(autouse=True)
def no_mount_left(isolated_home: Path, tmp_path: Path) -> Iterator[None]:
    """Fails a test that leaves something mounted below its directories, after taking it away."""
    yield
    left = [point for point in _mountpoints() if point.startswith((f"{tmp_path}/", f"{isolated_home}/"))]
    for point in reversed(left):
        subprocess.run(["umount", "--lazy", point], check=False)
    assert not left, f"still mounted after the test: {left}"


def _mountpoints() -> list[str]:
    lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    escaped = [line.split()[4].decode("utf-8", "surrogateescape") for line in lines]
    return [point.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\") for point in escaped]
