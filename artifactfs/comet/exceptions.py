"""The errors that Comet's client names, as classes of our tree.

``log_artifact``, ``get_artifact`` and ``download`` raise theirs *and* what went wrong in one: a store that does not answer is a
``LogArtifactException`` and a ``NetworkError``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from artifactfs.errors import ArtifactFSError, ConflictError, NotFoundError, also


class CometException(ArtifactFSError):
    pass


class LogArtifactException(CometException):
    pass


class GetArtifactException(CometException):
    pass


class ArtifactNotFound(NotFoundError, GetArtifactException):
    pass


class ArtifactNotFinalException(GetArtifactException):
    """Never raised here: a version can be seen once it is whole."""


class ArtifactAssetNotFound(NotFoundError, CometException):
    pass


class ArtifactDownloadException(CometException):
    pass


class ArtifactConflictingAssetLogicalPath(ConflictError, CometException):
    pass


@contextlib.contextmanager
def raised_as(kind: type[CometException]) -> Iterator[None]:
    """Errors of our tree inside are of ``kind`` as well."""
    try:
        yield
    except ArtifactFSError as error:
        raise also(error, kind) from error
