"""Artifacts as Comet's Python client knows them, over the same stores: a script runs by importing from here.

::

    from artifactfs.comet import Artifact, Experiment

    experiment = Experiment(workspace="acme", project_name="vision")
    artifact = Artifact("bikes", "dataset", version="1.2.0")
    artifact.add("data/")
    artifact.add_remote("s3://bucket/more")
    experiment.log_artifact(artifact)
    local = experiment.get_artifact("acme/bikes:1.2.0").download("copy")
    experiment.end()

A workspace is an entity, an artifact's name a collection of the experiment's project, and its versions are versions of that:
``artifactfs mount acme/vision/bikes:1.2.0`` shows one. ``docs/comet.md`` tells all of it.
"""

from artifactfs.comet.artifact import Artifact as Artifact
from artifactfs.comet.assets import ArtifactAsset as ArtifactAsset
from artifactfs.comet.exceptions import ArtifactAssetNotFound as ArtifactAssetNotFound
from artifactfs.comet.exceptions import ArtifactConflictingAssetLogicalPath as ArtifactConflictingAssetLogicalPath
from artifactfs.comet.exceptions import ArtifactDownloadException as ArtifactDownloadException
from artifactfs.comet.exceptions import ArtifactNotFinalException as ArtifactNotFinalException
from artifactfs.comet.exceptions import ArtifactNotFound as ArtifactNotFound
from artifactfs.comet.exceptions import CometException as CometException
from artifactfs.comet.exceptions import GetArtifactException as GetArtifactException
from artifactfs.comet.exceptions import LogArtifactException as LogArtifactException
from artifactfs.comet.experiment import API as API
from artifactfs.comet.experiment import Experiment as Experiment
from artifactfs.comet.logged import APIExperiment as APIExperiment
from artifactfs.comet.logged import LoggedArtifact as LoggedArtifact
from artifactfs.comet.logged import LoggedArtifactAsset as LoggedArtifactAsset
