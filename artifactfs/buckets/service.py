"""What a kind of object service must do for a :class:`artifactfs.buckets.bucket.Bucket`: one attempt each, errors told apart.

A service tries once and says what happened: TransientError where another attempt may do, :class:`RefusedError` where a condition
does not hold, :class:`DeniedError` where the credentials are refused; an error of ``errors.py`` where nothing helps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeAlias

from artifactfs.attempts import TRANSIENT, TransientError
from artifactfs.errors import ArtifactFSError, NetworkError, NotFoundError, NotPermittedError, SourceChangedError

Data: TypeAlias = bytes | bytearray | memoryview

_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired", "InvalidToken"})
_TRANSIENT_CODES = frozenset({"SlowDown", "RequestTimeout", "InternalError", "OperationAborted", "ConditionalRequestConflict"})
_CONDITION_CODES = frozenset({"PreconditionFailed", "BlobAlreadyExists", "ConditionNotMet", "UpdateConditionNotSatisfied"})


@dataclasses.dataclass(frozen=True, slots=True)
class Stat:
    """One object. ``etag`` is in quotes, "" if the service tells none; ``version`` is the version id (a GCS generation), "" in a
    bucket without versions. ``size`` in bytes; ``modified`` in seconds since the epoch by the service's clock."""

    key: str
    size: int
    etag: str
    version: str
    modified: float


@dataclasses.dataclass(frozen=True, slots=True)
class Pin:
    """What an object must still be when it is read: "" and -1 where that is not known."""

    etag: str = ""
    version: str = ""
    size: int = -1


ANY = Pin()
"""Whatever the object is now."""


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """To a GET: the object (``stat.size`` is the whole object's), which of its bytes follow, and its stamp ("" for none)."""

    stat: Stat
    start: int
    end: int
    stamp: str
    pieces: Iterator[bytes]


class NoBucketError(NotFoundError):
    """The bucket itself is not there."""


class RefusedError(Exception):
    """A condition of the request does not hold."""


class NotPartialError(TransientError):
    """The service answers to a request for a range as to one for all."""


class DeniedError(Exception):
    """The credentials are refused. ``error`` says so, unless renewed ones help."""

    def __init__(self, error: NotPermittedError) -> None:
        super().__init__(str(error))
        self.error = error


class Multipart(Protocol):
    """An object on its way in parts. Parts may be sent by several threads, numbered from 0."""

    ordered: bool
    """Whether parts must come one after the other, from one thread at a time."""

    def part(self, number: int, data: Data) -> None:
        """Send a part. Each but the last has the same size, of at least 5 MiB."""

    def complete(self) -> None:
        """Make the object appear."""

    def abort(self) -> None:
        """Leave nothing of it."""


class Service(Protocol):
    """One bucket of one service; ``url`` (``s3://name``) has no secrets in it."""

    url: str

    def head(self, key: str, version: str) -> Stat: ...

    def get(self, key: str, span: tuple[int, int] | None, pin: Pin) -> Answer:
        """The bytes from ``span[0]`` to ``span[1]`` (exclusive), or all; on the condition of ``pin``'s ETag and version."""

    def put(self, key: str, data: Data, match: str | None, stamp: str) -> str:
        """Write an object; its token. ``match``: only over the object with that token, or ("") over none. ``stamp`` is kept."""

    def listing(self, prefix: str, resume: str) -> Iterator[tuple[Sequence[Stat], str]]:
        """(objects whose key starts with ``prefix``, where to go on after them); ``resume``: such a place, or "" to begin."""

    def folders(self, prefix: str) -> Sequence[str]:
        """The names directly below ``prefix`` (ends with ``/`` or is "") that have objects below them."""

    def delete(self, key: str) -> None:
        """Missing is no error."""

    def touch(self, key: str) -> None:
        """Rewrite an object in place, so that it counts as just written. May take several requests."""

    def multipart(self, key: str) -> Multipart: ...

    def drop_uploads(self, prefix: str, before: float) -> int:
        """Abort multipart uploads below ``prefix`` that were begun before that time; how many there were."""

    def older(self, key: str, etag: str) -> str:
        """The id of a version of the object that has this ETag; "" if there is none, or the service does not tell."""

    def token(self, stat: Stat) -> str:
        """What :meth:`put`'s ``match`` takes for an object."""

    def credentials(self) -> str:
        """Where the credentials come from, in words; "" if there are none. NotPermittedError if they cannot be had."""

    def renew(self) -> bool:
        """Get credentials anew. Whether they are others than before."""


def explained(status: int, code: str, where: str) -> Exception:
    """The error for a service's answer: HTTP ``status`` and the service's own error ``code`` ("" if not told)."""
    error = _permanent(status, code, where)
    if error is not None:
        return error
    if code in _TRANSIENT_CODES or status in TRANSIENT:
        return TransientError(f"the service answers {status} {code}".rstrip())
    if status == 412 or code in _CONDITION_CODES:
        return RefusedError(where)
    if code in _EXPIRED:
        return DeniedError(
            NotPermittedError(f"{where}: the credentials have expired; log in again or renew them, then try again")
        )
    if status in (401, 403):
        told = f"{status} {code}".rstrip()
        text = f"{where}: the service refuses access ({told}); check the credentials and what they are allowed to do"
        return DeniedError(NotPermittedError(text))
    return NetworkError(f"{where}: the service answers {status} {code}; check the bucket, its region and endpoint")


def _permanent(status: int, code: str, where: str) -> ArtifactFSError | None:
    if code in ("NoSuchBucket", "ContainerNotFound"):
        return NoBucketError(f"{where}: the bucket does not exist; create it, or check its name and endpoint")
    if status in (404, 410):
        return NotFoundError(f"{where} does not exist")
    if status == 416:
        return SourceChangedError(f"{where} is shorter than recorded")
    return None


def quoted(etag: str | None) -> str:
    """An ETag as HTTP has it; "" for none. Some listings leave the quotes out."""
    return f'"{etag}"' if etag and not etag.endswith('"') else etag or ""


def opaque(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')
