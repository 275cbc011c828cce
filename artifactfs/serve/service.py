"""What every request works with: the store, its reader, the data directory, keys and signatures."""

from __future__ import annotations

import dataclasses
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cachetools import LRUCache, TTLCache

from artifactfs.cache import BlockCache
from artifactfs.errors import NotFoundError
from artifactfs.links import organization_of
from artifactfs.model import Version
from artifactfs.names import ArtifactName
from artifactfs.reader import Reader
from artifactfs.serve.checksums import Checksums
from artifactfs.serve.keys import Caller, KeyFile
from artifactfs.serve.signing import Kind, Signer, load_secret
from artifactfs.serve.state import State
from artifactfs.store.native import NativeStore

_COMMITS = 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a server serves. Sizes are bytes, times seconds. ``public_url`` has no trailing slash; "" is what each request was
    sent to."""

    host: str = "127.0.0.1"
    port: int = 8080
    public_url: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    max_upload: int = 5 << 40
    max_document: int = 32 << 20
    url_lifetime: int = 3600
    header_timeout: float = 20.0
    body_timeout: float = 60.0
    shutdown_timeout: float = 30.0
    threads: int = 16
    connections: int = 512
    log_format: str = "json"


class Service:
    """A store that is served. Threads share it; :meth:`close` at the end."""

    def __init__(self, store: NativeStore, cache: BlockCache | None, state: State, keys: KeyFile, options: Options) -> None:
        self.store = store
        self.reader = Reader(store, cache)
        self.state = state
        self.keys = keys
        self.options = options
        self.signer = Signer(load_secret(state.root / "secret"), options.url_lifetime)
        self.checksums = Checksums(store, self.reader, state)
        self.committing = threading.BoundedSemaphore(_COMMITS)
        """Commits that store bytes at a time: each has workers of its own."""
        self._well_until = 0.0
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._versions: LRUCache[str, Version] = LRUCache(4096)
        self._types: TTLCache[tuple[str, str, str], bool] = TTLCache(1024, 30.0)

    def close(self) -> None:
        self.reader.close()
        self.state.close()

    def check(self) -> None:
        """Raises what is wrong if the store or the data directory does not answer; that they did is good for a second, because
        who asks needs no key."""
        if time.monotonic() < self._well_until:
            return
        self.store.entities()
        self.state.pending("")
        self._well_until = time.monotonic() + 1.0

    @contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Do something of that name in one thread at a time."""
        with self._lock:
            held = self._held.setdefault(name, _Held())
            held.users += 1
        try:
            with held.lock:
                yield
        finally:
            with self._lock:
                held.users -= 1
                if not held.users:
                    self._held.pop(name, None)

    def content_version(self, name: ArtifactName) -> Version:
        """The version ``name`` says by its number, as it was at some time: what is in it never changes. NotFoundError."""
        key = str(name)
        with self._lock:
            version = self._versions.get(key)
        if version is None:
            version = self.store.version(name)
            with self._lock:
                self._versions[key] = version
        return version

    def has_type(self, entity: str, project: str, type: str) -> bool:
        """Whether a project has collections of a type. To tell means to read them all, so a yes is good for a while."""
        key = (entity, project, type)
        with self._lock:
            if key in self._types:
                return True
        found = any(record.type == type for record in self.store.collections(entity, project))
        if found:
            with self._lock:
                self._types[key] = True
        return found

    def forget_version(self, name: ArtifactName) -> None:
        """It was deleted."""
        with self._lock:
            self._versions.pop(str(name), None)


@dataclasses.dataclass(slots=True)
class _Held:
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    users: int = 0


@dataclasses.dataclass(slots=True)
class Context:
    """One request: who asks, and where. ``base`` is the server's URL as the caller is to see it."""

    service: Service
    caller: Caller
    base: str
    request: str = ""

    @property
    def store(self) -> NativeStore:
        return self.service.store

    @property
    def state(self) -> State:
        return self.service.state

    def signed(self, method: str, kind: Kind, names: tuple[str, ...], md5: str = "", digest: str = "") -> str:
        """A URL that is good for ``method`` on an object without a key."""
        token = self.service.signer.token(method, kind, names, self.caller.id, md5, digest)
        last = urllib.parse.quote(names[-1].rpartition("/")[2][:100], safe="") if kind == "entry" else kind
        return f"{self.base}/storage/{token}/{last}"

    def organization(self, entity: str) -> str:
        """The entity that holds the registries of ``entity``."""
        return organization_of(self.store, entity)

    def need_read(self, entity: str, what: str) -> None:
        """NotFoundError, as for what does not exist, unless the caller may read ``entity``."""
        if not self.caller.can_read(entity):
            raise NotFoundError(f"{what} not found")

    def version(self, name: ArtifactName) -> Version:
        """A version that the caller may read, with the source of a link. NotFoundError."""
        self.need_read(name.entity, f"artifact {name}")
        version = self.store.version(name)
        self.need_read(version.origin.entity, f"artifact {name}")
        return version

    def visible(self, version: Version) -> bool:
        """Whether the caller may see a version: a link only with what it leads to."""
        return self.caller.can_read(version.entity) and self.caller.can_read(version.origin.entity)


def default_data_dir(state_dir: Path, store_url: str) -> Path:
    """Where the server of a store keeps its data, unless it is told."""
    return state_dir / "serve" / urllib.parse.quote(store_url, safe="")[-200:]
