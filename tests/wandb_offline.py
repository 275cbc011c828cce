"""The real ``wandb`` client without a network: what it writes as files, and files as what it reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

wandb = pytest.importorskip("wandb")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package, with all of its directories below ``tmp_path``."""
    for key, value in {"MODE": "offline", "SILENT": "true", "DIR": "w", "CACHE_DIR": "w/cache", "DATA_DIR": "w/data"}.items():
        monkeypatch.setenv(f"WANDB_{key}", str(tmp_path / value) if "DIR" in key else value)
    (tmp_path / "w").mkdir(exist_ok=True)
    return wandb


def written(artifact: Any, root: Path) -> Path:
    """The entries of a draft of the real client, as files below ``root``."""
    for path, entry in artifact.manifest.entries.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(Path(entry.local_path).read_bytes())
    return root


def tree(root: Path) -> dict[str, bytes]:
    """The files below ``root`` by path."""
    found = (Path(folder, name) for folder, _, names in os.walk(root) for name in names)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(found)}


def reading(root: Path) -> Any:
    """An artifact of the real client that holds the files below ``root``, as if it had been logged and downloaded there.

    ``get`` and everything behind it are the real ones; only the questions to a server are answered here.
    """

    class Downloaded(wandb.Artifact):  # type: ignore[misc, name-defined]
        aliases = ("latest",)

        def is_draft(self) -> bool:
            return False

        def download(self, *arguments: Any, **options: Any) -> str:
            return str(root)

        def get_entry(self, name: str) -> Any:
            entry = self.manifest.entries.get(name) or self._get_obj_entry(name)[0]
            if entry is None:
                raise KeyError(name)
            entry.__class__ = Local
            return entry

    class Local(wandb.sdk.artifacts.artifact_manifest_entry.ArtifactManifestEntry):  # type: ignore[misc, name-defined]
        def download(self, *arguments: Any, **options: Any) -> str:
            return str(root / self.path)

    artifact = Downloaded("downloaded", "dataset")
    artifact.add_dir(str(root))
    return artifact
