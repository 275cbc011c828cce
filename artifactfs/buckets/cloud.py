"""Buckets of Google Cloud Storage and containers of Azure, through obstore, which finds credentials as the vendors' tools do: for
GCS ``GOOGLE_APPLICATION_CREDENTIALS``, gcloud's own or the machine's; for Azure ``AZURE_STORAGE_*``, ``AZURE_*`` of a service
principal, workload identity or the machine's."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from obstore import open_writer
from obstore.store import AzureStore, GCSStore

from artifactfs.buckets.rust import ONCE, AnyStore, Wire, client_options, lasting, speakable, usable
from artifactfs.buckets.service import Answer, Data, Pin, Stat
from artifactfs.errors import NotFoundError, NotPermittedError, UsageError
from artifactfs.forking import new_lock

_PART = 8 << 20
_STREAMS = 4


def open_cloud(scheme: str, name: str, options: Mapping[str, str], deadline: float) -> CloudService:
    """The bucket of scheme ``gs`` or ``az``."""
    make = _gcs if scheme == "gs" else _azure
    return CloudService(f"{scheme}://{name}", lambda **kwargs: make(name, options, deadline, **kwargs), scheme == "gs")


def _gcs(name: str, options: Mapping[str, str], deadline: float, **kwargs: Any) -> GCSStore:
    config: dict[str, Any] = {}
    endpoint = options.get("endpoint_url") or os.environ.get("STORAGE_EMULATOR_HOST")
    if endpoint:
        config["base_url"] = endpoint if "://" in endpoint else f"http://{endpoint}"
    if "STORAGE_EMULATOR_HOST" in os.environ:
        kwargs["credential_provider"] = lambda: {"token": "emulator", "expires_at": None}  # else the machine's are looked for
    return GCSStore(name, config=config, client_options=client_options(deadline), **kwargs)  # type: ignore[arg-type]


def _azure(name: str, options: Mapping[str, str], deadline: float, **kwargs: Any) -> AzureStore:
    config: dict[str, Any] = {}
    endpoint = options.get("endpoint_url") or os.environ.get("AZURE_STORAGE_ENDPOINT")
    account = options.get("account") or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME") or os.environ.get("AZURE_STORAGE_ACCOUNT")
    if endpoint:
        config["endpoint"] = endpoint
    if account:
        config["account_name"] = account
    elif not endpoint:
        raise UsageError(f"az://{name} needs its storage account; set AZURE_STORAGE_ACCOUNT_NAME, or write az://{name}?account=…")
    return AzureStore(name, config=config, client_options=client_options(deadline), **kwargs)  # type: ignore[arg-type]


class CloudService:
    """As the protocol says. ``generations``: conditional writes compare generations (GCS), not ETags (Azure)."""

    def __init__(self, url: str, make: Callable[..., AnyStore], generations: bool) -> None:
        self.url = url
        self._make = make
        self._generations = generations
        self._lock = new_lock()
        self._made: Wire | None = None
        self._patient: AnyStore | None = None

    def head(self, key: str, version: str) -> Stat:
        return self._wire(key).head(key, version)

    def get(self, key: str, span: tuple[int, int] | None, pin: Pin) -> Answer:
        return self._wire(key).get(key, span, pin)

    def put(self, key: str, data: Data, match: str | None, stamp: str) -> str:
        return self._wire(key).put(key, data, match, stamp)

    def listing(self, prefix: str, resume: str) -> Iterator[tuple[Sequence[Stat], str]]:
        return self._wire().listing(prefix, resume)

    def folders(self, prefix: str) -> Sequence[str]:
        return self._wire().folders(prefix)

    def delete(self, key: str) -> None:
        with contextlib.suppress(NotFoundError):
            self._wire(key).delete(key)

    def touch(self, key: str) -> None:
        self._wire(key).copy(key)

    def multipart(self, key: str) -> _Upload:
        self._wire(key)
        with self._lock:
            if self._patient is None:  # obstore itself retries parts: no condition hangs on them
                self._patient = lasting(self._make())
        return _Upload(self._patient, key)

    def drop_uploads(self, prefix: str, before: float) -> int:
        """Azure drops what was not committed after a week by itself, GCS as the bucket's lifecycle rules say."""
        return 0

    def older(self, key: str, etag: str) -> str:
        return ""  # obstore lists no versions

    def token(self, stat: Stat) -> str:
        return stat.version if self._generations else stat.etag

    def credentials(self) -> str:
        return "looked for by obstore, as the vendor's own tools do"

    def renew(self) -> bool:
        return False  # obstore renews by itself what expires

    def _wire(self, key: str = "x") -> Wire:
        if not usable():
            raise NotPermittedError(
                f"{self.url} cannot be used in a process forked after its first use; start processes by spawn"
            )
        if not speakable(key):
            raise UsageError(
                f"{self.url}/{key!r} cannot be used: keys with empty parts, . or .. or control characters are not known"
            )
        with self._lock:
            if self._made is None:
                self._made = Wire(self._make(retry_config=ONCE), self.url, self._generations)
            return self._made


class _Upload:
    """An object in parts, sent in order; obstore has several under way."""

    ordered = True

    def __init__(self, store: AnyStore, key: str) -> None:
        self._writer = open_writer(store, key, buffer_size=_PART, max_concurrency=_STREAMS)

    def part(self, number: int, data: Data) -> None:
        self._writer.write(data)

    def complete(self) -> None:
        self._writer.close()

    def abort(self) -> None:
        """Nothing appears unless the writer is closed; what it has sent goes with its service's rules."""
