"""One bucket: every operation with retries, a deadline, renewed credentials, and answers compared with what was asked.

A conditional write carries a random stamp, kept with the object. If an attempt ends without an answer, the next one may be
refused because the first took effect: the object is looked up, and it is ours if it has our stamp.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable, Iterator
from typing import TypeVar

from artifactfs.attempts import Attempts, TransientError
from artifactfs.buckets.service import ANY, Answer, Data, DeniedError, Multipart, Pin, RefusedError, Service, Stat, opaque
from artifactfs.errors import IntegrityError, NotFoundError, SourceChangedError

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class Bucket:
    """``url`` names it (``s3://name``), without secrets. ``deadline``: seconds within which a request must make progress."""

    def __init__(self, service: Service, deadline: float) -> None:
        self.url = service.url
        self.deadline = deadline
        self._service = service

    def head(self, key: str, version: str = "") -> Stat:
        """The object as it is now, or that version of it. NotFoundError."""
        return self._tried(key, lambda: self._service.head(key, version))

    def get(self, key: str, limit: int) -> tuple[bytes, Stat]:
        """The whole object; IntegrityError if it has more than ``limit`` bytes, which are then not read."""

        def read() -> tuple[bytes, Stat]:
            answer = self._service.get(key, None, ANY)
            size = answer.stat.size
            if size > limit:
                raise IntegrityError(f"{self._where(key)} has {size} bytes, over the {limit} that are expected at most")
            data = b"".join(answer.pieces)
            if len(data) != size:
                raise TransientError("the answer ended too early")
            return data, answer.stat

        return self._tried(key, read)

    def stream(self, key: str, offset: int, size: int, pin: Pin = ANY) -> Iterator[bytes]:
        """Exactly ``size`` bytes from ``offset``, in pieces as they arrive; ``size`` 0 gives none without I/O.

        All of one object: the one that is pinned, or the one that the first answer is of. SourceChangedError if it is not that or
        ends before. A connection that breaks is resumed where it broke.
        """
        tries = _Tries(self, key)
        position, end = offset, offset + size
        while position < end:
            with tries.one():
                answer = self._service.get(key, (position, end), pin)
                self._check(answer, position, end, pin)
                pin = Pin(answer.stat.etag or pin.etag, pin.version, answer.stat.size)
                for piece in answer.pieces:
                    if position + len(piece) > end:
                        raise IntegrityError(f"{self._where(key)}: the service sends more than was asked for")
                    position += len(piece)
                    tries.attempts.arrived(len(piece), len(piece))
                    yield piece
                if position < end:
                    raise TransientError("the answer ended too early")

    def scan(self, prefix: str) -> Iterator[Stat]:
        """The objects whose key starts with ``prefix`` (any string), in the service's order, which may not be that of bytes. In
        bounded memory. None of them is no error."""
        resume = ""
        tries = _Tries(self, prefix)
        while True:
            with tries.one():
                for stats, after in self._service.listing(prefix, resume):
                    tries.progressed()
                    yield from stats
                    resume = after
                return

    def folders(self, prefix: str) -> list[str]:
        """The names directly below ``prefix`` (ends with ``/``, or is "") that have objects below them, sorted."""
        return sorted(self._tried(prefix, lambda: self._service.folders(prefix)))

    def put(self, key: str, data: Data) -> None:
        """Write an object whole, whatever is there."""
        self._tried(key, lambda: self._service.put(key, data, None, ""))

    def swap(self, key: str, data: Data, match: str) -> str | None:
        """Write an object only over the one that has the token ``match`` ("": only where there is none); its own token.

        None if another write came first. A write of ours whose answer was lost counts as ours, unless it was replaced since.
        """
        stamp = secrets.token_hex(16)
        attempts = Attempts(self._where(key), self.deadline)
        doubt = renewed = False
        while True:
            try:
                return self._service.put(key, data, match, stamp)
            except RefusedError:
                return self._own(key, stamp) if doubt else None
            except NotFoundError:
                if match == "":
                    raise
                return None  # as some services answer to a condition on what is not there
            except TransientError as error:
                doubt = True
                attempts.failed(error)
            except DeniedError as denied:
                if renewed or not self._service.renew():
                    raise denied.error from None
                renewed = True

    def older(self, key: str, etag: str) -> str:
        """The id of a version of the object that has this ETag; "" if there is none, or the service does not tell."""
        return self._tried(key, lambda: self._service.older(key, etag))

    def token(self, stat: Stat) -> str:
        """What :meth:`swap`'s ``match`` takes for this object."""
        return self._service.token(stat)

    def delete(self, key: str) -> None:
        """Remove an object; missing is no error."""
        self._tried(key, lambda: self._service.delete(key))

    def touch(self, key: str) -> None:
        """Rewrite an object within the service, so that it counts as just written. NotFoundError."""
        self._tried(key, lambda: self._service.touch(key))

    def multipart(self, key: str) -> Multipart:
        """Start to write an object in parts; each of its operations is retried like those here."""
        return _Upload(self, key, self._tried(key, lambda: self._service.multipart(key)))

    def drop_uploads(self, prefix: str, before: float) -> int:
        """Abort unfinished multipart uploads below ``prefix`` that began before ``before`` (seconds since the epoch, by the
        service's clock). How many there were; always 0 for a service that drops them by itself or cannot list them."""
        return self._tried(prefix, lambda: self._service.drop_uploads(prefix, before))

    def credentials(self) -> str:
        """Where the credentials come from, in words; "" if there are none. NotPermittedError if they cannot be had."""
        return self._service.credentials()

    def _own(self, key: str, stamp: str) -> str | None:
        """The token of the object ``key`` if it has ``stamp``."""

        def look() -> str | None:
            answer = self._service.get(key, None, ANY)
            with contextlib.closing(answer.pieces):  # type: ignore[type-var]  # a generator
                return self._service.token(answer.stat) if answer.stamp == stamp else None

        with contextlib.suppress(NotFoundError):
            return self._tried(key, look)
        return None

    def _tried(self, key: str, action: Callable[[], _Result]) -> _Result:
        """What ``action`` returns, tried again as the policy says. It must be one that may be done twice."""
        tries = _Tries(self, key)
        while True:
            with tries.one():
                return action()

    def _check(self, answer: Answer, start: int, end: int, pin: Pin) -> None:
        """Nothing, if the answer is of the range asked for and of what is pinned."""
        where, stat = self._where(answer.stat.key), answer.stat
        if pin.etag and (not stat.etag or opaque(stat.etag) != opaque(pin.etag)):
            raise self._changed(stat.key)
        if (pin.version and stat.version and stat.version != pin.version) or 0 <= pin.size != stat.size:
            raise self._changed(stat.key)
        if stat.size < end:
            raise SourceChangedError(f"{where} is {stat.size} bytes long, shorter than byte {end} that is asked for")
        if (answer.start, answer.end) != (start, end):
            raise IntegrityError(f"{where}: asked for bytes {start}-{end}, the service answers with {answer.start}-{answer.end}")

    def _changed(self, key: str) -> SourceChangedError:
        return SourceChangedError(f"{self._where(key)} is no longer what was recorded; add it again as a new version")

    def _where(self, key: str) -> str:
        shown = "".join(char if char.isprintable() else "?" for char in key)
        return f"{self.url}/{shown}"


class _Tries:
    """The attempts at one operation, as the policy says: broken ones are repeated within the deadline, denied ones once, with
    renewed credentials."""

    def __init__(self, bucket: Bucket, key: str) -> None:
        self._bucket = bucket
        self._key = key
        self._renewed = False
        self.progressed()

    def progressed(self) -> None:
        """The deadline begins anew."""
        self.attempts = Attempts(self._bucket._where(self._key), self._bucket.deadline)

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Ends quietly where the attempt inside is to be repeated."""
        try:
            yield
        except TransientError as error:
            self.attempts.failed(error)
        except RefusedError:
            raise self._bucket._changed(self._key) from None
        except DeniedError as denied:
            if self._renewed or not self._bucket._service.renew():
                raise denied.error from None
            self._renewed = True


class _Upload:
    """A multipart upload with the bucket's retries."""

    def __init__(self, bucket: Bucket, key: str, upload: Multipart) -> None:
        self.ordered = upload.ordered
        self._bucket = bucket
        self._key = key
        self._upload = upload

    def part(self, number: int, data: Data) -> None:
        self._bucket._tried(self._key, lambda: self._upload.part(number, data))

    def complete(self) -> None:
        self._bucket._tried(self._key, self._upload.complete)

    def abort(self) -> None:
        self._bucket._tried(self._key, self._upload.abort)
