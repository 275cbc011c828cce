"""Every error artifactfs raises, as one tree; each class carries its errno and its exit code.

::

    ArtifactFSError                     EIO           1   a failure that fits nothing below
    ├── UsageError (ValueError)         EINVAL        2   an argument that cannot be right
    │   └── InvalidNameError            EINVAL        2   a malformed name, alias, tag, path or metadata
    ├── NotFoundError                   ENOENT        3   no such entity, collection, version, alias or path
    ├── ConflictError                   EEXIST        4   somebody else changed it first; in use
    ├── NetworkError                    ETIMEDOUT     5   a remote did not answer, after retries
    │   └── OfflineError                EHOSTUNREACH  5   not cached, and --offline forbids fetching
    ├── IntegrityError                  EIO           6   bytes are not what their name says
    │   ├── SourceChangedError          ESTALE        6   a reference's target is no longer what was pinned
    │   └── VerifyError (ValueError)    EIO           6   a directory is not what a version says it is
    ├── NotPermittedError               EACCES        7   the store, a remote or the system refuses
    │   └── ReadOnlyError               EROFS         7   a write to what is immutable
    ├── StorageFullError                ENOSPC        1   no space left, or a quota reached
    ├── StoreFormatError                EIO           1   a store of another format, or of a newer version
    ├── MountError                      EIO           1   mounting or unmounting failed
    ├── CommError                       EIO           1   W&B's name for "the API call failed"
    ├── WaitTimeoutError (TimeoutError) ETIMEDOUT     5   ``Artifact.wait(timeout)`` ran out
    └── ArtifactStatusError (AttributeError)  EINVAL  2   a member used in the wrong state of an Artifact
        ├── ArtifactFinalizedError                        a mutator on a finalized or logged artifact
        └── ArtifactNotLoggedError                        a member that only logged artifacts have

The FUSE boundary (``mount.py``) answers with ``errno``; the command line exits with ``exit_code``. Foreign
exceptions are mapped here or in the one module that imports their library, and nowhere else. Where W&B's clients promise
another built-in (``KeyError`` for an unknown entry, ``CommError`` for a failed look-up), :func:`also` makes an error both.
"""

from __future__ import annotations

import errno
import os
from typing import Any, ClassVar


class ArtifactFSError(Exception):
    """The base of the tree. ``str(error)`` is one line that says what happened, to what, and what to do."""

    errno: Any = errno.EIO  # an int; Any because OSError, which WaitTimeoutError also is, declares it otherwise
    exit_code: ClassVar[int] = 1


class UsageError(ArtifactFSError, ValueError):
    errno = errno.EINVAL
    exit_code = 2


class InvalidNameError(UsageError):
    pass


class NotFoundError(ArtifactFSError):
    errno = errno.ENOENT
    exit_code = 3


class ConflictError(ArtifactFSError):
    errno = errno.EEXIST
    exit_code = 4


class NetworkError(ArtifactFSError):
    errno = errno.ETIMEDOUT
    exit_code = 5


class OfflineError(NetworkError):
    errno = errno.EHOSTUNREACH


class IntegrityError(ArtifactFSError):
    errno = errno.EIO
    exit_code = 6


class SourceChangedError(IntegrityError):
    errno = errno.ESTALE


class VerifyError(IntegrityError, ValueError):
    pass


class NotPermittedError(ArtifactFSError):
    errno = errno.EACCES
    exit_code = 7


class ReadOnlyError(NotPermittedError):
    errno = errno.EROFS


class StorageFullError(ArtifactFSError):
    errno = errno.ENOSPC


class StoreFormatError(ArtifactFSError):
    pass


class MountError(ArtifactFSError):
    pass


class CommError(ArtifactFSError):
    pass


class WaitTimeoutError(ArtifactFSError, TimeoutError):
    errno = errno.ETIMEDOUT
    exit_code = 5


class ArtifactStatusError(ArtifactFSError, AttributeError):
    errno = errno.EINVAL
    exit_code = 2


class ArtifactFinalizedError(ArtifactStatusError):
    pass


class ArtifactNotLoggedError(ArtifactStatusError):
    pass


_BY_ERRNO: dict[int, type[ArtifactFSError]] = {
    errno.ENOENT: NotFoundError,
    errno.EACCES: NotPermittedError,
    errno.EPERM: NotPermittedError,
    errno.EROFS: ReadOnlyError,
    errno.ENOSPC: StorageFullError,
    errno.EDQUOT: StorageFullError,
    errno.ETIMEDOUT: NetworkError,
}

_ADVICE: dict[int, str] = {
    errno.EACCES: "check the owner and mode of the directory",
    errno.EPERM: "check the owner and mode of the directory",
    errno.EROFS: "the disk is mounted read-only; use another store or remount it",
    errno.ENOSPC: "make space on that disk, then try again",
    errno.EDQUOT: "your quota on that disk is used up; make space, then try again",
}


def from_os_error(error: OSError, doing: str) -> ArtifactFSError:
    """The error of this tree for a failed system call.

    ``doing`` names the action and its object, as in ``"writing pack ab12… in /srv/store"``.
    """
    code = error.errno or errno.EIO
    advice = _ADVICE.get(code)
    text = f"{doing}: {os.strerror(code)}" + (f"; {advice}" if advice else "")
    return _BY_ERRNO.get(code, ArtifactFSError)(text)


def also(error: ArtifactFSError, kind: type[Exception]) -> ArtifactFSError:
    """``error`` as an instance of its own class and of ``kind``, so that callers may catch it as either."""
    if isinstance(error, kind):
        return error
    both = _both(type(error), kind)(str(error))
    for note in getattr(error, "__notes__", ()):
        both.add_note(note)
    return both


def _both(ours: type[ArtifactFSError], kind: type[Exception]) -> type[ArtifactFSError]:
    """A class below both. It shows its text plainly, which ``KeyError`` would not, and can be pickled."""
    members = {
        "__module__": ours.__module__,
        "__str__": Exception.__str__,
        "__reduce__": lambda self: (also, (ours(str(self)), kind)),
        "errno": ours.errno,
    }
    return type(ours.__name__, (ours, kind), members)
