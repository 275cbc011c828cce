"""Buckets: objects of S3-compatible services, Google Cloud Storage and Azure, by key. Nothing else imports boto3 or obstore.

``open_bucket("s3", "name", {"endpoint_url": …})`` gives a :class:`Bucket`. All of its methods may be called from any thread and,
for S3, after a fork from any process. One policy retries everything (``attempts.py``); a conditional write is retried only with a
stamp that tells afterwards whose it was. Errors are those of ``errors.py``: NotFoundError for a key that is not there,
NotPermittedError for missing, wrong or expired credentials (expired ones are renewed and tried again first), SourceChangedError
for what is no longer as pinned, NetworkError once the retries are used up.

Importing this package is cheap; the libraries (0.3 s) are imported with the first bucket that is opened.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from artifactfs.attempts import DEADLINE
from artifactfs.buckets.bucket import Bucket
from artifactfs.buckets.service import ANY, Multipart, NoBucketError, Pin, Stat
from artifactfs.errors import UsageError
from artifactfs.forking import new_lock

__all__ = ["ANY", "OPTIONS", "Bucket", "Multipart", "NoBucketError", "Pin", "Stat", "open_bucket"]

OPTIONS = {
    "s3": ("endpoint_url", "region", "profile", "sse", "sse_kms_key_id"),
    "gs": ("endpoint_url",),
    "az": ("endpoint_url", "account"),
}
"""What can be said of a bucket by scheme; none of it is secret."""

_lock = new_lock()
_open: dict[tuple[str, str, tuple[tuple[str, str], ...], float], Bucket] = {}


def open_bucket(scheme: str, name: str, options: Mapping[str, str] | None = None, deadline: float = DEADLINE) -> Bucket:
    """The bucket (for Azure: the container) ``name`` of ``scheme`` ``s3``, ``gs`` or ``az``; one a process for equal arguments.

    No I/O but reading configuration. ``deadline``: seconds within which a request must make progress. UsageError for an unknown
    scheme, option or a name that cannot be.
    """
    options = dict(options or {})
    known = OPTIONS.get(scheme)
    if known is None:
        raise UsageError(f"{scheme!r} is no kind of bucket; known are {', '.join(OPTIONS)}")
    for option in options:
        if option not in known:
            raise UsageError(
                f"{scheme}://{name} has no option {option!r}; known are {', '.join(known)} (credentials never go into URLs)"
            )
    if not name or "/" in name or not name.isprintable() or name.strip(".") == "":
        raise UsageError(f"{scheme}://{name!r} names no bucket; write {scheme}://BUCKET/…")
    key = (scheme, name, tuple(sorted(options.items())), deadline)
    with _lock:
        if key not in _open:
            _open[key] = _new_bucket(scheme, name, options, deadline)
        return _open[key]


def _new_bucket(scheme: str, name: str, options: Mapping[str, str], deadline: float) -> Bucket:
    if scheme == "s3":
        from artifactfs.buckets import s3  # boto3 and obstore cost 0.3 s: only for those who have such a bucket

        return Bucket(s3.S3Service(name, options, deadline), deadline)
    from artifactfs.buckets import cloud  # obstore costs 0.1 s: only for those who have such a bucket

    return Bucket(cloud.open_cloud(scheme, name, options, deadline), deadline)


def _forget() -> None:
    """In a forked child: what was opened depends on the environment of then."""
    _open.clear()


os.register_at_fork(after_in_child=_forget)
