"""Test support: mounts of which nothing stays behind, whatever the test does."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from shelves import Shelf, until

from artifactfs import daemon, mountpoint, registry
from artifactfs.registry import MountRecord

needs_fuse = pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="needs /dev/fuse")


class World(Shelf):
    """One user's store and mounts."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._records: dict[str, MountRecord] = {}

    def directory(self) -> Path:
        """A new empty directory."""
        path = self.root / f"mnt-{next(self.numbers)}"
        path.mkdir()
        return path

    def request(self, kind: registry.Kind, name: str, path: Path | None = None, **fields: Any) -> registry.MountRequest:
        return daemon.request(self.settings, kind, name, path or self.directory(), **fields)

    def mount(self, name: str, **fields: Any) -> Path:
        """Where ``name`` is mounted now."""
        return Path(self.start(self.request("mount", name, **fields)).mountpoint)

    def stage(self, name: str, **fields: Any) -> Path:
        """Where ``name`` is staged now."""
        return Path(self.start(self.request("stage", name, **fields)).mountpoint)

    def start(self, request: registry.MountRequest) -> MountRecord:
        record = daemon.start(request)
        self._records[record.id] = record
        return record

    def record(self, path: Path) -> MountRecord:
        """The record of the mount at ``path``."""
        found = daemon.find(path)
        assert found is not None
        return found

    def kill(self, path: Path) -> MountRecord:
        """Kill the daemon of ``path`` without a warning."""
        record = self.record(path)
        os.kill(record.pid, signal.SIGKILL)
        until(lambda: not record.process.lives())
        return record

    def close(self) -> None:
        """Take all mounts away and end their daemons."""
        for record in self._records.values():
            mount = mountpoint.at(record.mountpoint)
            if record.process.lives():
                os.kill(record.pid, signal.SIGKILL)
                until(lambda process=record.process: not process.lives())
            if mount is not None:
                subprocess.run(["umount", "--lazy", record.mountpoint], check=False, capture_output=True)
        super().close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A store, and mounts that end with the test."""
    made = World(tmp_path)
    yield made
    made.close()
