"""Artifacts as mounted directories: versioned datasets and models, read lazily and checked, written by unmounting.

::

    import artifactfs as afs

    with afs.init(entity="acme", project="vision", job_type="train") as run:
        art = afs.Artifact("bikes", type="dataset")
        art.add_dir("data/")
        run.log_artifact(art, aliases=["best"]).wait()
        path = run.use_artifact("bikes:latest").download()

    with afs.mount("acme/vision/bikes:latest") as path: ...        # a pathlib.Path
    with afs.stage("acme/vision/bikes") as s: (s.path / "new.csv").write_text("…")
    s.version                                                       # the version that came of it

Importing this package imports nothing else of it: each name below comes with its first use.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "artifactfs.api": ("Api", "ArtifactType"),
    "artifactfs.artifact": ("Artifact", "ArtifactCollection", "ArtifactTTL"),
    "artifactfs.errors": (
        "ArtifactFSError",
        "ArtifactFinalizedError",
        "ArtifactNotLoggedError",
        "ArtifactStatusError",
        "CommError",
        "ConflictError",
        "IntegrityError",
        "NetworkError",
        "NotFoundError",
        "NotPermittedError",
        "UsageError",
        "VerifyError",
        "WaitTimeoutError",
    ),
    "artifactfs.manifest": ("ArtifactManifest", "ArtifactManifestEntry"),
    "artifactfs.media": (
        "Audio",
        "Bokeh",
        "BoundingBoxes2D",
        "Classes",
        "Html",
        "Image",
        "ImageMask",
        "JoinedTable",
        "Object3D",
        "PartitionedTable",
        "Table",
        "Video",
    ),
    "artifactfs.mounting": ("Staged", "mount", "stage"),
    "artifactfs.run": ("Run", "init"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from artifactfs.api import Api as Api
    from artifactfs.api import ArtifactType as ArtifactType
    from artifactfs.artifact import Artifact as Artifact
    from artifactfs.artifact import ArtifactCollection as ArtifactCollection
    from artifactfs.artifact import ArtifactTTL as ArtifactTTL
    from artifactfs.errors import ArtifactFinalizedError as ArtifactFinalizedError
    from artifactfs.errors import ArtifactFSError as ArtifactFSError
    from artifactfs.errors import ArtifactNotLoggedError as ArtifactNotLoggedError
    from artifactfs.errors import ArtifactStatusError as ArtifactStatusError
    from artifactfs.errors import CommError as CommError
    from artifactfs.errors import ConflictError as ConflictError
    from artifactfs.errors import IntegrityError as IntegrityError
    from artifactfs.errors import NetworkError as NetworkError
    from artifactfs.errors import NotFoundError as NotFoundError
    from artifactfs.errors import NotPermittedError as NotPermittedError
    from artifactfs.errors import UsageError as UsageError
    from artifactfs.errors import VerifyError as VerifyError
    from artifactfs.errors import WaitTimeoutError as WaitTimeoutError
    from artifactfs.manifest import ArtifactManifest as ArtifactManifest
    from artifactfs.manifest import ArtifactManifestEntry as ArtifactManifestEntry
    from artifactfs.media import Audio as Audio
    from artifactfs.media import Bokeh as Bokeh
    from artifactfs.media import BoundingBoxes2D as BoundingBoxes2D
    from artifactfs.media import Classes as Classes
    from artifactfs.media import Html as Html
    from artifactfs.media import Image as Image
    from artifactfs.media import ImageMask as ImageMask
    from artifactfs.media import JoinedTable as JoinedTable
    from artifactfs.media import Object3D as Object3D
    from artifactfs.media import PartitionedTable as PartitionedTable
    from artifactfs.media import Table as Table
    from artifactfs.media import Video as Video
    from artifactfs.mounting import Staged as Staged
    from artifactfs.mounting import mount as mount
    from artifactfs.mounting import stage as stage
    from artifactfs.run import Run as Run
    from artifactfs.run import init as init

    run: Run | None

__all__ = [*sorted(_HOME_OF), "__version__", "run"]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'artifactfs' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(types.ModuleType):
    """The package with ``run``, the run that is going on (None if there is none), and ``mount``, the function.

    Both are also submodules. Importing a submodule sets the package's attribute of its name; not of these two, which are
    still imported with ``from artifactfs.run import …``.
    """

    @property
    def run(self) -> Any:
        module = sys.modules.get("artifactfs.run")
        return module.current_run() if module is not None else None

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in ("mount", "run") and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
