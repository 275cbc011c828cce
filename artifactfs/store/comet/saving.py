"""How a version comes into being on a Comet server, for ``publish`` alone.

In this order: the experiment that logs it; the version, not closed, without aliases and with the id of the commit in its
metadata; its assets; ``CLOSED``, which is the commit; its aliases. Nobody takes a version that is not closed for one. Whoever
dies in between leaves at most such a one. The retry finds it by the id, and if all that it has is wanted, sends what is missing:
an asset's id follows from the commit, its path and its content, and the server takes each once. Else, and after an error that no
retry mends, it is marked as ``ERROR``, and another one is begun.

Comet has no means to let a version have an asset of another one, so what a version keeps is fetched, compared with what is known
of it, and sent again.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import logging
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import IO, Any, Protocol, TypeAlias

import msgspec
from blake3 import blake3

from artifactfs.content import Fingerprint, Hasher
from artifactfs.errors import (
    ArtifactFSError,
    ConflictError,
    IntegrityError,
    NetworkError,
    NotFoundError,
    UsageError,
    from_os_error,
)
from artifactfs.model import BLAKE3, BLOCK, Dir, Entry, File, Ref, Remote, Symlink, Version
from artifactfs.references import Source, WholeOnly
from artifactfs.store.comet import assets
from artifactfs.store.comet.assets import OURS, PLACEHOLDER
from artifactfs.store.comet.client import CometClient, Handshake, UnknownOutcomeError, VersionRow
from artifactfs.store.comet.words import MAX_SIDECAR, SIDECAR, decode_sidecar
from artifactfs.store.drafts import Draft
from artifactfs.store.semvers import NEXT
from artifactfs.store.upload import Change, Folder, NewFile, NewRef, Progress, Report, Streamed
from artifactfs.tree import Tree

DEFAULT_TYPE = "dataset"
_WORKERS = 8  # assets under way: each is a request, and the server stores it elsewhere before it answers
_AHEAD = 64
_UPSERTS = 3  # attempts whose outcome is not known; each may leave a version that is never closed
_KEY = re.compile(r"[A-Za-z0-9]{32,50}")
_ASSET_CONTEXT = "artifactfs 2026-11 comet asset id v1"

log = logging.getLogger(__name__)

Leaf: TypeAlias = "NewFile | NewRef | Streamed | File | Ref | Symlink | None"
"""What is at a path; None is an empty directory."""


class Opened(Protocol):
    """What is needed of the store."""

    tree: Tree

    def source(self, file: File) -> Source: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """What a version is to have at a path. ``id`` is a file's content id, b"" where that is not known."""

    path: str
    leaf: Leaf
    id: bytes = b""
    size: int = 0

    def same_as(self, entry: Entry | None) -> bool:
        """Whether a version has this already."""
        leaf = self.leaf
        if isinstance(leaf, (NewFile, Streamed, File)) and isinstance(entry, Remote):
            known = bool(self.id) and self.id == known_id(entry)
            kept = isinstance(leaf, Remote) and leaf.id == entry.id and leaf.locator == entry.locator
            return (known or kept) and leaf.executable == entry.executable
        if isinstance(leaf, (Ref, NewRef)) and isinstance(entry, Ref):
            return _told(leaf) == _told(entry)
        if isinstance(leaf, Symlink):
            return isinstance(entry, Symlink) and entry.target == leaf.target
        return leaf is None and isinstance(entry, Dir) and entry.page is None


@dataclasses.dataclass(frozen=True, slots=True)
class Listing:
    """All that a version is to have: its items by path, and the metadata of assets."""

    items: dict[str, Item]
    metadata: Mapping[str, dict[str, Any]]

    def same_as(self, tree: Tree, root: Dir, metadata: Mapping[str, dict[str, Any]]) -> bool:
        """Whether the version ``root``, whose assets have that metadata, has just this."""
        left = len(self.items)
        for path, entry in tree.walk(root):
            if path == SIDECAR or (isinstance(entry, Dir) and (entry.page is not None or path == "")):
                continue
            item = self.items.get(path)
            if item is None or not item.same_as(entry):
                return False
            left -= 1
        return not left and dict(self.metadata) == dict(metadata)


def known_id(entry: Remote) -> bytes:
    """The content id of a stored asset, b"" where nobody recorded it."""
    return base64.b64decode(entry.checksum) if entry.checksum and entry.algorithm == BLAKE3 else b""


def list_items(store: Opened, draft: Draft, report: Report | None) -> Listing:
    """What ``draft`` comes to; every new file is read once. UsageError for what Comet cannot hold."""
    progress = Progress()
    items: dict[str, Item] = {}
    told: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="comet") as pool:
        pending: list[tuple[str, NewFile | Streamed, Future[Fingerprint]]] = []

        def count(size: int) -> None:
            progress.files += 1
            progress.bytes += size
            if report is not None:
                report(progress)

        def settle(most: int) -> None:
            while len(pending) > most:
                path, new, found = pending.pop(0)
                fingerprint = found.result()
                items[path] = Item(path, new, fingerprint.id, fingerprint.size)
                count(fingerprint.size)

        for path, leaf in _leaves(store.tree, draft.folder, ""):
            if path == SIDECAR:
                told = metadata_from(store, leaf)
            elif isinstance(leaf, NewFile):
                if leaf.base is not None:
                    raise UsageError(f"{path!r} is only partly here; Comet takes whole files")
                pending.append((path, leaf, pool.submit(_fingerprint, leaf.path)))
                settle(_AHEAD)
            elif isinstance(leaf, Streamed) and not leaf.id:
                pending.append((path, leaf, pool.submit(_fingerprint_there, leaf)))
                settle(_AHEAD)
            elif isinstance(leaf, Streamed):
                items[path] = Item(path, leaf, leaf.id, leaf.size)
                count(leaf.size)
            else:
                size = max(leaf.size, 0) if isinstance(leaf, File) else 0
                items[path] = Item(path, leaf, known_id(leaf) if isinstance(leaf, Remote) else b"", size)
        settle(0)
    return Listing(items, {path: own for path, own in told.items() if path in items})


def _leaves(tree: Tree, folder: Folder, prefix: str) -> Iterator[tuple[str, Leaf]]:
    """Everything that ``folder`` has, with what its base keeps; a directory with nothing in it as None."""
    empty = True
    for name, change in _merged(tree, folder):
        if change is None:
            continue
        empty = False
        path = prefix + name
        if isinstance(change, Dir):
            yield from _stored_leaves(tree, change, path)
        elif isinstance(change, (NewFile, NewRef, Streamed, File, Ref, Symlink)):
            yield path, change
        else:
            yield from _leaves(tree, change, f"{path}/")
    if empty and prefix:
        yield prefix[:-1], None


def _merged(tree: Tree, folder: Folder) -> Iterator[tuple[str, Change]]:
    """The changes of a folder, and what of its base they do not name."""
    kept = tree.entries(folder.base) if folder.base is not None else iter(())
    entry = next(kept, None)
    for name, change in folder.changes():
        while entry is not None and entry.name < name:
            yield entry.name, entry
            entry = next(kept, None)
        if entry is not None and entry.name == name:
            entry = next(kept, None)
        yield name, change
    while entry is not None:
        yield entry.name, entry
        entry = next(kept, None)


def _stored_leaves(tree: Tree, root: Dir, path: str) -> Iterator[tuple[str, Leaf]]:
    if root.page is None:
        yield path, None
    for below, entry in tree.walk(root):
        if not isinstance(entry, Dir):
            yield f"{path}/{below}", entry
        elif entry.page is None:
            yield f"{path}/{below}", None


def metadata_from(store: Opened, leaf: Leaf) -> dict[str, dict[str, Any]]:
    """What the file of assets' metadata says. UsageError for one that cannot be understood."""
    if isinstance(leaf, NewFile):
        try:
            with open(leaf.path, "rb") as file:
                data = file.read(MAX_SIDECAR + 1)
        except OSError as error:
            raise from_os_error(error, f"reading {leaf.path}") from None
    elif isinstance(leaf, Streamed) and leaf.size <= MAX_SIDECAR:
        data = b"".join(_there(leaf, b""))
    elif isinstance(leaf, Remote) and leaf.size <= MAX_SIDECAR:
        data = b"".join(store.source(leaf).fetch(0, leaf.size))
    else:
        raise UsageError(f"{SIDECAR} must be a file: it holds the metadata of assets")
    try:
        found = decode_sidecar(data, "the draft")
    except IntegrityError as error:
        raise UsageError(f"{error}; it holds the metadata of assets: write it as artifactfs.comet does, or remove it") from None
    return {path: {key: value for key, value in own.items() if key != OURS} for path, own in found.items()}


class Saving:
    """One version that is being made. ``experiment`` is the key of the experiment that logs it."""

    def __init__(self, client: CometClient, store: Opened, draft: Draft, folder: str | None, report: Report | None) -> None:
        """``folder``: where what is fetched only to be sent again is kept meanwhile."""
        self._client = client
        self._store = store
        self._draft = draft
        self._folder = folder
        self._report = report
        self._progress = Progress()
        self._lock = threading.Lock()
        self.experiment = experiment_of(draft)
        self._handshake: Handshake | None = None

    def begin(self) -> Handshake:
        """The experiment, begun. UsageError for a name that is longer than the server keeps whole."""
        name = self._draft.name
        if self._handshake is None:
            self._handshake = self._client.begin(self.experiment, name.entity, name.project)
            limit = self._handshake.name_limit
            if limit and len(name.collection) > limit:
                raise UsageError(
                    f"artifact name {name.collection[:20]!r}… is {len(name.collection)} characters long; "
                    f"{self._client.url} takes {limit}: give it a shorter one"
                )
        return self._handshake

    def create(self, kind: str, again: Callable[[], VersionRow | None]) -> tuple[str, str]:
        """(version id, semantic version) of a new version that is not closed. ``again`` finds it where an answer was lost."""
        draft = self._draft
        self.begin()
        wanted = draft.semver if draft.semver not in ("", NEXT) else None
        metadata = version_metadata(draft)
        for attempt in range(_UPSERTS):
            try:
                made = self._client.upsert(draft.name.collection, kind, self.experiment, metadata, wanted, [], list(draft.tags))
                return made.artifact_version_id, made.current_version
            except UnknownOutcomeError as error:
                found = again()
                if found is not None:
                    return found.artifact_version_id, found.version
                if attempt == _UPSERTS - 1:
                    raise
                log.warning("%s; it was not, and is asked for again", error)
        raise AssertionError("the last attempt returns or raises")

    def there(self, semver: str, listing: Listing) -> frozenset[str] | None:
        """The ids of the assets that a version which was begun has already; None if it has others than it should, or will not
        say: then it can never be what is wanted."""
        wanted = {self._asset_id(item) for item in listing.items.values()}
        name = self._draft.name
        try:
            found = {row.asset_id for row in self._client.files(name.entity, name.collection, semver)}
        except (NotFoundError, UsageError):
            return None
        return frozenset(found) if found <= wanted else None

    def fill(self, version: str, listing: Listing, there: frozenset[str]) -> None:
        """Send all assets but those that are there. What fails ends all of it."""
        handshake = self.begin()
        references = []
        stop = threading.Event()
        with ThreadPoolExecutor(_WORKERS, thread_name_prefix="comet") as pool:
            pending: set[Future[None]] = set()
            try:
                for item in listing.items.values():
                    if self._asset_id(item) in there:
                        continue
                    own = listing.metadata.get(item.path)
                    if isinstance(item.leaf, (Ref, NewRef)):
                        references.append(self._reference(version, item, own))
                        continue
                    pending.add(pool.submit(self._send, stop, handshake, version, item, own))
                    if len(pending) >= _AHEAD:
                        pending = _settled(pending)
                while pending:
                    pending = _settled(pending)
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if references:
            self._client.add_remote(self.experiment, references)

    def close(self, version: str) -> None:
        """Let it be a version."""
        self._client.close_version(version, self.experiment)

    def end(self) -> None:
        """Say that the experiment is over, if it was begun for this alone."""
        if self._handshake is not None and not self._draft.run:
            try:
                self._client.end(self.experiment, self._handshake)
            except ArtifactFSError as error:
                log.warning("%s; its experiment stays shown as running for a while", error)

    def fail(self, version: str) -> None:
        """Mark it as one that never will be."""
        try:
            self._client.close_version(version, self.experiment, "ERROR")
        except ArtifactFSError as error:
            log.warning("%s; version %s stays open there, and nobody can use it", error, version)

    def _reference(self, version: str, item: Item, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
        ref = item.leaf.ref if isinstance(item.leaf, NewRef) else item.leaf
        assert isinstance(ref, Ref)
        return {
            "assetId": self._asset_id(item),
            "artifactVersionId": version,
            "fileName": item.path,
            "link": ref.uri,
            "metadata": assets.describe_reference(ref, metadata),
        }

    def _send(
        self, stop: threading.Event, handshake: Handshake, version: str, item: Item, metadata: Mapping[str, Any] | None
    ) -> None:
        """Store one asset."""
        if stop.is_set():
            return
        leaf, path = item.leaf, item.path

        def upload(size: int, opened: Callable[[], Iterator[bytes]], described: str) -> None:
            asset = self._asset_id(item)
            self._client.upload(self.experiment, handshake, version, asset, path, size, opened, described, self._sent)

        if isinstance(leaf, NewFile):
            upload(item.size, lambda: _local(leaf.path, item), assets.describe(item.id, leaf.executable, metadata))
        elif isinstance(leaf, Streamed):
            upload(item.size, lambda: _there(leaf, item.id), assets.describe(item.id, leaf.executable, metadata))
        elif isinstance(leaf, Symlink):
            target = leaf.target.encode()
            upload(len(target), lambda: iter((target,)), assets.describe_symlink(leaf.target))
        elif isinstance(leaf, Remote):
            with self._fetched(leaf, path) as file:
                described = assets.describe(_fingerprint_of(file).id, leaf.executable, metadata)
                upload(leaf.size, lambda: _pieces_of(file), described)
        elif leaf is None:
            path = f"{path}/{PLACEHOLDER}"
            upload(0, lambda: iter(()), assets.describe_directory())
        else:
            raise UsageError(f"{path!r} is stored elsewhere; copy it here first")

    def _sent(self, size: int) -> None:
        with self._lock:
            self._progress.stored += size
            if self._report is not None:
                self._report(self._progress)

    @contextlib.contextmanager
    def _fetched(self, remote: Remote, path: str) -> Iterator[IO[bytes]]:
        """The bytes of an asset of another version, checked as far as they can be, in an unnamed file."""
        where = f"{self._client.url} {path}"
        with contextlib.ExitStack() as closing:
            try:
                file = closing.enter_context(tempfile.TemporaryFile(dir=self._folder))
                try:
                    _write(file, self._store.source(remote).fetch(0, remote.size) if remote.size else iter(()))
                except WholeOnly as whole:
                    _write(file, whole.stream)
            except OSError as error:
                raise from_os_error(error, f"fetching {where} into {self._folder or tempfile.gettempdir()}") from None
            expected = known_id(remote)
            if file.tell() != remote.size or (expected and _fingerprint_of(file).id != expected):
                raise IntegrityError(f"{where} is not what was recorded when it was logged; no version is made of it")
            yield file

    def _asset_id(self, item: Item) -> str:
        """The same for the same content at the same path in the same commit, so that it is stored once."""
        leaf = item.leaf
        content: object = item.id
        if isinstance(leaf, (Ref, NewRef)):
            content = repr(_told(leaf))
        elif isinstance(leaf, Symlink):
            content = leaf.target
        elif isinstance(leaf, Remote):
            content = leaf.locator
        what = msgspec.msgpack.encode((self._draft.commit, item.path, type(leaf).__name__, content))
        return blake3(what, derive_key_context=_ASSET_CONTEXT).hexdigest()[:32]


def version_metadata(draft: Draft) -> str:
    """The metadata of a version: the user's, and under :data:`OURS` what Comet has no place for."""
    own: dict[str, Any] = {"commit": draft.commit}
    if draft.description is not None:
        own["description"] = draft.description
    if draft.base is not None:
        own["base"] = draft.base
    return assets.encoded({**(draft.metadata or {}), OURS: own})


def experiment_of(draft: Draft) -> str:
    """The key of the experiment that logs it: of the draft's run in the same workspace, else one of its own."""
    entity, _, rest = draft.run.partition("/")
    key = rest.rpartition("/")[2]
    if entity == draft.name.entity and is_key(key):
        return key
    return blake3((draft.run or draft.commit).encode(), derive_key_context=_ASSET_CONTEXT).hexdigest()[:32]


def is_key(text: str) -> bool:
    """Whether ``text`` can be the key of an experiment."""
    return _KEY.fullmatch(text) is not None


def check_draft(draft: Draft, newest: Version | None, url: str) -> None:
    """ConflictError where somebody else committed first; UsageError for what Comet has no means for."""
    found = newest.number if newest else -1
    if draft.expect_base not in (None, found):
        expected = f"v{draft.expect_base}" if draft.expect_base != -1 else "no version"
        raise ConflictError(
            f"{draft.name.path} is at {f'v{found}' if newest else 'no version'}, not at {expected} as expected: "
            "somebody else committed; stage the newest version again, or commit over it: commit --resume --no-expect-base"
        )
    if draft.ttl is not None:
        raise UsageError(f"{url} keeps versions for ever: Comet has no time to live; leave it out")
    if draft.algorithm != BLAKE3:
        raise UsageError(f"{url} keeps BLAKE3 digests only; leave --digest out")


def _settled(pending: set[Future[None]]) -> set[Future[None]]:
    """Those still under way, once one is done. Raises what one raised."""
    done, left = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
    return left


def _told(leaf: Ref | NewRef) -> tuple[object, ...]:
    ref = leaf.ref if isinstance(leaf, NewRef) else leaf
    return (ref.uri, ref.digest, ref.size, ref.executable, sorted(ref.extra.items()))


def _fingerprint(path: str) -> Fingerprint:
    try:
        with open(path, "rb") as file:
            return _fingerprint_of(file)
    except OSError as error:
        raise from_os_error(error, f"reading {path}") from None


def _fingerprint_there(new: Streamed) -> Fingerprint:
    """Of a file of another store. IntegrityError unless it is what that says."""
    hasher = Hasher(new.file.algorithm)
    for piece in _blocks_there(new):
        hasher.block(piece)
    found = hasher.finish()
    if found.size != new.size or new.file.digest not in ("", found.digest):
        raise new.wrong()
    return found


def _there(new: Streamed, id: bytes) -> Iterator[bytes]:
    """The bytes of a file of another store. IntegrityError, before the last of them, if they are not those of ``id``."""
    hasher = Hasher()
    held = b""
    for piece in _blocks_there(new):
        if held:
            yield held
        hasher.block(piece)
        held = piece
    found = hasher.finish()
    if found.size != new.size or id not in (b"", found.id):
        raise new.wrong()
    if held:
        yield held


def _blocks_there(new: Streamed) -> Iterator[bytes]:
    with contextlib.closing(new.opened()) as content:
        for offset in range(0, new.size, BLOCK):
            yield content.read(offset, min(BLOCK, new.size - offset))


def _fingerprint_of(file: IO[bytes]) -> Fingerprint:
    hasher = Hasher()
    for piece in _pieces_of(file):
        hasher.block(piece)
    return hasher.finish()


def _pieces_of(file: IO[bytes]) -> Iterator[bytes]:
    """The bytes of an open file, in blocks, from its start; its position is left alone."""
    file.flush()
    fd, offset = file.fileno(), 0
    while True:
        piece = bytearray()
        while len(piece) < BLOCK and (data := os.pread(fd, BLOCK - len(piece), offset + len(piece))):
            piece += data
        if not piece:
            return
        offset += len(piece)
        yield bytes(piece)


def _local(path: str, item: Item) -> Iterator[bytes]:
    """The bytes of a local file. ConflictError, before the last of them, if they are not those that were read before."""
    hasher = Hasher()
    held = b""
    try:
        with open(path, "rb") as file:
            for piece in _pieces_of(file):
                if held:
                    yield held
                hasher.block(piece)
                held = piece
    except OSError as error:
        raise from_os_error(error, f"reading {path}") from None
    if hasher.finish().id != item.id:
        raise ConflictError(f"{path} has changed while it was logged; log it again")
    if held:
        yield held


def _write(file: IO[bytes], stream: Iterator[bytes]) -> None:
    file.seek(0)
    for piece in stream:
        file.write(piece)


def is_lasting(error: BaseException) -> bool:
    """Whether a retry cannot mend it."""
    return isinstance(error, ArtifactFSError) and not isinstance(error, NetworkError)
