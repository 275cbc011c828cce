"""How a draft becomes a version on a W&B server.

In this order: the draft is walked and what is new in it hashed, CreateArtifact, CreateArtifactManifest, CreateArtifactFiles with
the uploads, the manifest itself, CommitArtifact. Before the commit nobody sees anything; a process that dies leaves a pending
version, which the server clears up. The client id of the version follows from the draft's commit, so that a repeated attempt can
ask what became of the first one. What the base version has and the draft did not change is listed with the version that stored
it, and not sent again; of the rest the server wants what it does not have.

What another store has is read from there as it is sent, and once before where its MD5 is not known (or those of its parts): no
file of it is ever whole on this machine. Whatever is sent has its last bytes held back until all of it is known to be right.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import mimetypes
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any, Protocol
from urllib.parse import urljoin

import msgspec
from blake3 import blake3

from artifactfs import http
from artifactfs.content import EntryChecksum
from artifactfs.errors import (
    ArtifactFSError,
    CommError,
    ConflictError,
    IntegrityError,
    NetworkError,
    NotPermittedError,
    UsageError,
    from_os_error,
)
from artifactfs.model import MD5, Dir, Entry, File, Ref, Remote, Symlink, Version
from artifactfs.names import LATEST, ArtifactName
from artifactfs.references.sorting import Sorted
from artifactfs.store.drafts import Draft, Published
from artifactfs.store.storing import Content, Contents
from artifactfs.store.upload import Folder, NewFile, NewRef, Progress, Report, Streamed
from artifactfs.store.wandb import queries
from artifactfs.store.wandb.client import Client, Node, dig
from artifactfs.store.wandb.manifest import ARTIFACT_SCHEME, locator_of
from artifactfs.tree import Tree

DEFAULT_TYPE = "dataset"
MULTIPART = 2 << 30
"""Bytes from which a file is sent in parts."""
PART = 100 << 20
_MOST_PARTS = 10_000
_BATCH = 200
_WORKERS = 8
_PIECE = 1 << 20
_AHEAD = 4 * _WORKERS  # files of another store that are being read for their MD5s
_CLIENT_ID = 128
_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
_INHERIT, _NEVER = -1, -2

log = logging.getLogger(__name__)


class Catalog(Protocol):
    """What saving needs of the store."""

    url: str
    client: Client
    tree: Tree

    def newest(self, name: ArtifactName, without: int | None = None) -> Version | None: ...
    def type_of(self, name: ArtifactName) -> str | None: ...
    def version_of(self, artifact: str, name: ArtifactName) -> Version: ...
    def aliases_of(self, name: ArtifactName, version: Version) -> list[str]: ...
    def change_aliases(self, document: str, name: ArtifactName, artifact: str, aliases: Iterable[str]) -> None: ...


class _Item(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One line of the manifest to be. ``local``: the file to send; ``elsewhere``: which of the other stores' contents to
    send; "" and -1 for what is not sent. ``parts``: MD5s of its parts, hex."""

    path: str
    digest: str
    size: int
    local: str = ""
    ref: str = ""
    extra: dict[str, str | int] = {}
    birth: str = ""
    parts: tuple[str, ...] = ()
    elsewhere: int = -1

    @property
    def is_sent(self) -> bool:
        """Whether its bytes are for the server, if that does not have them."""
        return bool(self.local) or self.elsewhere >= 0


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Item).decode


def save(store: Catalog, draft: Draft, report: Report | None) -> Published:
    """See ``ArtifactServer.save``."""
    return _Saving(store, draft, report).run()


def made_by(store: Catalog, name: ArtifactName, commit: str) -> Version | None:
    """The version of ``name`` that a commit made; None if it made none, or that was deleted."""
    try:
        id = dig(store.client.ask(queries.CLIENT_ID, clientID=client_id(commit)), "clientIDMapping", "serverID")
        if not isinstance(id, str) or not id:
            return None
        node = dig(store.client.ask(queries.ARTIFACT, id=id), "artifact")
    except (NetworkError, NotPermittedError):
        raise
    except ArtifactFSError as error:  # a server that does not know the id
        log.debug("%s", error)
        return None
    return store.version_of(id, name) if dig(node, "state") == "COMMITTED" else None


class _Saving:
    """One attempt."""

    def __init__(self, store: Catalog, draft: Draft, report: Report | None) -> None:
        self._store = store
        self._client: Client = store.client
        self._draft = draft
        self._report = report
        self._progress = Progress()
        self._elsewhere: list[Contents] = []

    def run(self) -> Published:
        draft, store = self._draft, self._store
        own = self._own() if draft.retry else None
        if own is not None:
            return Published(self._with_aliases(own), True)
        kind = self._type()
        newest = store.newest(draft.name)
        found = newest.number if newest else -1
        if draft.expect_base not in (None, found):
            raise ConflictError(
                f"{draft.name.path} is at {f'v{found}' if newest else 'no version'}, not as expected: somebody else committed; "
                "stage the newest version again, or commit over it: commit --resume --no-expect-base"
            )
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="artifactfs-"))
            items = Sorted(self._hashed_items(draft.folder), folder, lambda item: item.path, _encode, _decode)
            digest = _manifest_digest(items)
            if draft.expect_digest not in ("", digest):
                raise IntegrityError(
                    f"{draft.name.path} would get the digest {digest}, not {draft.expect_digest}; nothing is made"
                )
            created = self._create(kind, digest)
            artifact = str(created["id"])
            if created.get("state") == "COMMITTED":  # the same is there already
                version = self._with_aliases(store.version_of(artifact, draft.name))
                return Published(version, draft.retry and version.number > found)
            self._send(artifact, items, folder)
        answer = self._client.ask(queries.COMMIT, artifactID=artifact)
        made = dig(answer, "commitArtifact", "artifact", "id") or artifact
        return Published(self._with_aliases(store.version_of(str(made), draft.name)), True)

    def _own(self) -> Version | None:
        """The version that an earlier attempt at this commit made."""
        return made_by(self._store, self._draft.name, self._draft.commit)

    def _type(self) -> str:
        draft = self._draft
        known = self._store.type_of(draft.name)
        if known is not None and draft.type and draft.type != known:
            raise UsageError(
                f"{draft.name.path} already exists with type {known!r}, not {draft.type!r}; use that type or another name"
            )
        return known or draft.type or DEFAULT_TYPE

    # What is in it

    def _hashed_items(self, folder: Folder) -> Iterator[_Item]:
        """The lines, those of other stores read by several workers."""
        window: deque[_Item | Future[_Item]] = deque()
        with ThreadPoolExecutor(_WORKERS, thread_name_prefix="hash") as pool:
            try:
                for item in self._items(folder, ""):
                    window.append(pool.submit(self._hashed_there, item) if isinstance(item, Streamed) else item)
                    while len(window) > _AHEAD:
                        yield self._counted(window.popleft())
                while window:
                    yield self._counted(window.popleft())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _counted(self, found: _Item | Future[_Item]) -> _Item:
        if isinstance(found, Future):
            item = found.result()
            self._count(1, item.size, 0)
            return item
        return found

    def _items(self, folder: Folder, prefix: str) -> Iterator[_Item | Streamed]:
        tree = self._store.tree
        base = tree.entries(folder.base) if folder.base is not None else iter(())
        kept = next(base, None)
        for name, change in folder.changes():
            while kept is not None and kept.name < name:
                yield from self._stored(prefix + kept.name, kept)
                kept = next(base, None)
            if kept is not None and kept.name == name:
                kept = next(base, None)
            path = prefix + name
            if change is None:
                continue
            if isinstance(change, NewFile):
                yield self._hashed(path, change)
            elif isinstance(change, Streamed):
                if not any(known is change.contents for known in self._elsewhere):
                    self._elsewhere.append(change.contents)
                yield change
            elif isinstance(change, NewRef):
                yield from self._stored(path, change.ref)
            elif isinstance(change, (File, Dir, Symlink, Ref)):
                yield from self._stored(path, change)
            else:
                yield from self._items(change, path + "/")
        while kept is not None:
            yield from self._stored(prefix + kept.name, kept)
            kept = next(base, None)

    def _stored(self, path: str, entry: Entry) -> Iterator[_Item]:
        if isinstance(entry, Dir):
            for below in self._store.tree.entries(entry):
                yield from self._stored(f"{path}/{below.name}", below)
        elif isinstance(entry, Remote):
            extra: dict[str, str | int] = {} if entry.algorithm == "MD5" else {"alg": entry.algorithm}
            yield _Item(path, entry.checksum, entry.size, extra=extra, birth=locator_of(entry).birth)
        elif isinstance(entry, Ref):
            pins = {key: value for key, value in entry.extra.items() if key in ("etag", "versionID")}
            size = 0 if entry.uri.startswith(f"{ARTIFACT_SCHEME}:") else max(entry.size, 0)
            yield _Item(path, entry.digest, size, ref=entry.uri, extra=pins)
        elif isinstance(entry, Symlink):
            raise UsageError(f"{path!r} is a symlink, which a version on a W&B server cannot hold; replace it by a file")
        else:
            raise UsageError(f"{path!r} is stored elsewhere than on {self._store.url}; copy the version it is of there first")

    def _hashed(self, path: str, change: NewFile) -> _Item:
        whole, part, parts = hashlib.md5(usedforsecurity=False), hashlib.md5(usedforsecurity=False), []
        try:
            with open(change.path, "rb") as file:
                length = os.fstat(file.fileno()).st_size
                step = part_size(length)
                size = 0
                while piece := file.read(min(_PIECE, step - size % step)):
                    whole.update(piece)
                    size += len(piece)
                    if length >= MULTIPART:
                        part.update(piece)
                        if size % step == 0:
                            parts.append(part.hexdigest())
                            part = hashlib.md5(usedforsecurity=False)
        except OSError as error:
            raise from_os_error(error, f"reading {change.path}") from None
        if length >= MULTIPART and size % step:
            parts.append(part.hexdigest())
        if size != length:
            raise _changed(change.path)
        self._count(1, size, 0)
        digest = base64.b64encode(whole.digest()).decode()
        return _Item(path, digest, size, local=os.path.abspath(change.path), parts=tuple(parts))

    def _hashed_there(self, new: Streamed) -> _Item:
        """A file of another store. Its MD5 is what that says, where it does; all that is read is compared with what it says."""
        where = next(number for number, known in enumerate(self._elsewhere) if known is new.contents)
        file = new.file
        if file.algorithm == MD5 and file.checksum and file.size < MULTIPART:
            return _Item(new.path, file.checksum, file.size, elsewhere=where)
        known, whole, parts = EntryChecksum(file.algorithm), hashlib.md5(usedforsecurity=False), []
        step = part_size(file.size)
        with contextlib.closing(new.opened()) as content:
            for start in range(0, file.size, step):
                part = hashlib.md5(usedforsecurity=False)
                for offset in range(start, min(start + step, file.size), _PIECE):
                    size = min(_PIECE, start + step - offset, file.size - offset)
                    piece = content.read(offset, size)
                    if len(piece) != size:
                        raise new.wrong()
                    for running in (known, whole, part):
                        running.update(piece)
                parts.append(part.hexdigest())
        if file.digest not in ("", known.finish()):
            raise new.wrong()
        digest = base64.b64encode(whole.digest()).decode()
        told = tuple(parts) if file.size >= MULTIPART else ()
        return _Item(new.path, digest, file.size, parts=told, elsewhere=where)

    def _count(self, files: int, size: int, stored: int) -> None:
        self._progress.files += files
        self._progress.bytes += size
        self._progress.stored += stored
        if self._report is not None:
            self._report(self._progress)

    # What is sent

    def _create(self, kind: str, digest: str) -> Node:
        draft, name = self._draft, self._draft.name
        where = {"artifactCollectionName": name.collection}
        asked: Node = {
            "entityName": name.entity,
            "projectName": name.project,
            "runName": self._run(),
            "artifactTypeName": kind,
            "artifactCollectionName": name.collection,
            "digest": digest,
            "digestAlgorithm": "MANIFEST_MD5",
            "description": draft.description,
            "aliases": [{**where, "alias": alias} for alias in dict.fromkeys((*draft.aliases, LATEST))],
            "tags": [{"tagName": tag} for tag in draft.tags],
            "metadata": json.dumps(draft.metadata) if draft.metadata else None,
            "enableDigestDeduplication": not draft.always,
            "clientID": client_id(draft.commit),
            "sequenceClientID": client_id(f"{name.path} {draft.commit}"),
        }
        if draft.ttl is not None:
            asked["ttlDurationSeconds"] = draft.ttl
        elif not draft.inherit_ttl:
            asked["ttlDurationSeconds"] = _NEVER
        found = dig(self._client.ask(queries.CREATE, input=asked), "createArtifact", "artifact")
        if not isinstance(found, dict) or not found.get("id"):
            raise CommError(f"{self._store.url} does not say which version {name.path} it is to make")
        if found.get("state") not in ("PENDING", "COMMITTED", "DELETED"):
            raise CommError(f"{self._store.url} says that the new version of {name.path} is {found.get('state')!r}")
        return found

    def _run(self) -> str | None:
        """The run that logs it, where that is of the same project."""
        entity, _, rest = self._draft.run.partition("/")
        project, _, id = rest.partition("/")
        return id if (entity, project) == (self._draft.name.entity, self._draft.name.project) and id else None

    def _send(self, artifact: str, items: Iterable[_Item], folder: str) -> None:
        manifest = self._manifest(artifact, "", False)
        births = Births()
        with ThreadPoolExecutor(_WORKERS, thread_name_prefix="upload") as pool:
            batch: list[_Item] = []
            for item in items:
                if item.is_sent:
                    batch.append(item)
                if len(batch) == _BATCH:
                    self._send_files(artifact, str(manifest["id"]), batch, births, pool)
                    batch = []
            if batch:
                self._send_files(artifact, str(manifest["id"]), batch, births, pool)
        with open(os.path.join(folder, "manifest"), "w+b") as file:
            digest = _write_manifest(file, items, births, artifact)
            whole = self._manifest(artifact, digest, True)
            url = dig(whole, "file", "uploadUrl")
            if not isinstance(url, str):
                raise CommError(f"{self._store.url} does not say where to put the manifest of {self._draft.name.path}")
            size = os.fstat(file.fileno()).st_size
            self._put(url, dig(whole, "file", "uploadHeaders"), lambda: _Slice(_LocalContent(file.name), 0, size), size)

    def _manifest(self, artifact: str, digest: str, upload: bool) -> Node:
        name = self._draft.name
        data = self._client.ask(
            queries.CREATE_MANIFEST,
            artifactID=artifact,
            baseArtifactID=None,
            name="wandb_manifest.json",
            digest=digest,
            entityName=name.entity,
            projectName=name.project,
            runName=self._run() or "",
            manifestType="FULL",
            includeUpload=upload,
        )
        found = dig(data, "createArtifactManifest", "artifactManifest")
        if not isinstance(found, dict) or not found.get("id"):
            raise CommError(f"{self._store.url} does not take a manifest of {name.path}")
        return found

    def _send_files(self, artifact: str, manifest: str, batch: list[_Item], births: Births, pool: ThreadPoolExecutor) -> None:
        nodes = self._places(artifact, manifest, batch)
        for item, node in zip(batch, nodes, strict=True):
            births.add(item.path, str(dig(node, "artifact", "id") or artifact), artifact)

        def send(item: _Item, node: Node) -> int:
            try:
                return self._send_file(artifact, item, node)
            except NotPermittedError:  # the URL was good for a while only
                return self._send_file(artifact, item, self._places(artifact, manifest, [item])[0])

        for sent in pool.map(send, batch, nodes):
            self._count(0, 0, sent)

    def _places(self, artifact: str, manifest: str, batch: list[_Item]) -> list[Node]:
        """Where to put each of the files."""
        specs = []
        for item in batch:
            parts = [{"partNumber": number, "hexMD5": digest} for number, digest in enumerate(item.parts, 1)] or None
            specs.append(
                {
                    "artifactID": artifact,
                    "artifactManifestID": manifest,
                    "name": item.path,
                    "md5": item.digest,
                    "mimetype": mimetypes.guess_type(item.path)[0] or "application/octet-stream",
                    "uploadPartsInput": parts,
                }
            )
        data = self._client.ask(queries.CREATE_FILES, input={"artifactFiles": specs, "storageLayout": "V2"})
        edges = dig(data, "createArtifactFiles", "files", "edges")
        nodes = [node for edge in edges or () if isinstance(node := dig(edge, "node"), dict)]
        if len(nodes) != len(batch):
            raise CommError(f"{self._store.url} takes {len(nodes)} of {len(batch)} files of {self._draft.name.path}")
        return nodes

    def _send_file(self, artifact: str, item: _Item, node: Node) -> int:
        """Send one file, if the server does not have it; the bytes sent."""
        parts = dig(node, "uploadMultipartUrls", "uploadUrlParts")
        if item.parts and isinstance(parts, list) and parts:
            self._send_parts(artifact, item, node, parts)
            return item.size
        url = node.get("uploadUrl")
        if not isinstance(url, str) or not url:
            return 0
        self._put(url, node.get("uploadHeaders"), self._body(item, 0, item.size, item.digest), item.size)
        return item.size

    def _send_parts(self, artifact: str, item: _Item, node: Node, parts: list[Any]) -> None:
        urls = {dig(part, "partNumber"): dig(part, "uploadUrl") for part in parts}
        if sorted(urls) != list(range(1, len(item.parts) + 1)):
            raise CommError(f"{self._store.url} has no place for some parts of {item.path}")
        step, done = part_size(item.size), []
        for number, digest in enumerate(item.parts, 1):
            offset = (number - 1) * step
            md5 = base64.b64encode(bytes.fromhex(digest)).decode()
            size = min(step, item.size - offset)
            etag = self._put(str(urls[number]), [f"Content-MD5:{md5}"], self._body(item, offset, size, md5), size).get("etag")
            if not etag:
                raise CommError(f"{self._store.url} confirms no part {number} of {item.path}")
            done.append({"partNumber": number, "hexMD5": etag})
        self._client.ask(
            queries.COMPLETE_MULTIPART,
            completeMultipartAction="Complete",
            completedParts=done,
            artifactID=str(dig(node, "artifact", "id") or artifact),
            storagePath=str(node.get("storagePath")),
            uploadID=str(dig(node, "uploadMultipartUrls", "uploadID")),
        )

    def _body(self, item: _Item, offset: int, size: int, digest: str) -> Callable[[], _Slice]:
        """What opens ``size`` bytes of a file, whose MD5 is ``digest``, to be sent."""

        def opened() -> _Slice:
            if item.elsewhere < 0:
                return _Slice(_LocalContent(item.local), offset, size, digest, _changed(item.local))
            there = self._elsewhere[item.elsewhere]
            wrong = IntegrityError(f"{there.where(item.path)} is not what was recorded: it has another MD5; it is not copied")
            return _Slice(there.open(item.path), offset, size, digest, wrong)

        return opened

    def _put(self, url: str, given: object, opened: Callable[[], _Slice], size: int) -> dict[str, str]:
        """Send ``size`` bytes of a file, and the headers that the server gave; the headers of the answer. Raises what ``opened``
        and its reading do."""
        url = urljoin(self._client.base + "/", url)
        headers = self._client.headers(url)
        for line in given if isinstance(given, list) else ():
            name, colon, value = str(line).partition(":")
            if colon and "\n" not in line and "\r" not in line:
                headers[name.strip()] = value.strip()
        slices: list[_Slice] = []

        def body() -> bytes | IO[bytes]:
            if not size:
                return b""
            while slices:
                slices.pop().close()
            slices.append(opened())
            return slices[0]  # type: ignore[return-value]  # requests reads it and asks its length

        try:
            answer = http.exchange("PUT", url, headers, body, self._client.deadline)
        finally:
            while slices:
                slices.pop().close()
        if answer.status in (401, 403):
            raise NotPermittedError(f"{http.shown(url)} refuses an upload ({answer.status})")
        if not 200 <= answer.status < 300:
            raise NetworkError(f"{http.shown(url)} answers an upload with {answer.status}; try again")
        return dict(answer.headers)

    def _with_aliases(self, version: Version) -> Version:
        """The version, once the draft's aliases are its own."""
        if self._draft.aliases:
            name = ArtifactName(version.entity, version.project, version.collection)
            there = self._store.aliases_of(name, version)
            missing = set(self._draft.aliases) - set(there) - {LATEST}
            if missing:
                self._store.change_aliases(queries.ADD_ALIASES, name, version.commit, missing)
        return version


class Births:
    """Which version stored the bytes of each path, where it is not the new one."""

    def __init__(self) -> None:
        self._others: dict[str, str] = {}

    def add(self, path: str, birth: str, artifact: str) -> None:
        """Take note of one path."""
        if birth != artifact:
            self._others[path] = birth

    def of(self, path: str, artifact: str) -> str:
        """The version that stored it."""
        return self._others.get(path, artifact)


class _LocalContent:
    """A local file as a content. ConflictError once it ends before it should."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - close() ends it
        except OSError as error:
            raise from_os_error(error, f"reading {path}") from None

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``, fewer only at the end."""
        try:
            data = os.pread(self._file.fileno(), size, offset)
            while 0 < len(data) < size and (more := os.pread(self._file.fileno(), size - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise from_os_error(error, f"reading {self._path}") from None
        return data

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


class _Slice:
    """A part of a content as ``requests`` sends one: it has a length and is read once.

    Its MD5 is taken on the way; where that is not ``digest`` (base64), or the content ends too early, ``wrong`` is raised instead
    of the last of it.
    """

    def __init__(self, content: Content, offset: int, size: int, digest: str = "", wrong: ArtifactFSError | None = None) -> None:
        self._content = content
        self._offset = offset
        self._left = size
        self._fetch = size
        self._digest = digest
        self._wrong = wrong
        self._held = memoryview(b"")
        self._hash = hashlib.md5(usedforsecurity=False)

    def __len__(self) -> int:
        return self._left

    def __iter__(self) -> Iterator[bytes]:
        while piece := self.read(_PIECE):
            yield piece

    def read(self, size: int = -1) -> bytes:
        """The next bytes, not more than a piece."""
        if not self._held and self._fetch:
            piece = self._content.read(self._offset, min(_PIECE, self._fetch))
            self._offset += len(piece)
            self._fetch -= len(piece)
            self._hash.update(piece)
            self._held = memoryview(piece)
            right = self._fetch or not self._digest or base64.b64encode(self._hash.digest()).decode() == self._digest
            if self._wrong is not None and not (piece and right):
                raise self._wrong
        size = len(self._held) if size < 0 else min(size, len(self._held))
        piece, self._held = bytes(self._held[:size]), self._held[size:]
        self._left -= len(piece)
        return piece

    def close(self) -> None:
        """Let go of the content."""
        self._content.close()


def part_size(size: int) -> int:
    """The bytes of each part but the last of a file of ``size`` bytes."""
    least = -(-size // _MOST_PARTS)
    return max(PART, -(-least // 4096) * 4096)


def client_id(commit: str) -> str:
    """The 128 lower-case letters and digits that follow from a commit's id."""
    stream = blake3(commit.encode(), derive_key_context="artifactfs 2026-11 wandb client id v1").digest(length=_CLIENT_ID)
    return "".join(_ALPHABET[byte % len(_ALPHABET)] for byte in stream)


def _manifest_digest(items: Iterable[_Item]) -> str:
    digest = hashlib.md5(b"wandb-artifact-manifest-v1\n", usedforsecurity=False)
    last = None
    for item in items:
        if "\n" in item.path or "\r" in item.path:
            raise UsageError(f"{item.path!r} holds a line break, which a W&B server cannot keep apart; rename the file")
        if item.path == last:
            raise UsageError(f"{item.path!r} would be in the version twice; log them apart")
        last = item.path
        digest.update(f"{item.path}:{item.digest}\n".encode())
    return digest.hexdigest()


def _write_manifest(file: IO[bytes], items: Iterable[_Item], births: Births, artifact: str) -> str:
    """Write the manifest; its MD5, base64."""
    digest = hashlib.md5(usedforsecurity=False)

    def write(text: str) -> None:
        data = text.encode()
        digest.update(data)
        file.write(data)

    head = {"version": 1, "storagePolicy": "wandb-storage-policy-v1", "storagePolicyConfig": {"storageLayout": "V2"}}
    write(json.dumps(head, separators=(",", ":"))[:-1] + ',"contents":{')
    for number, item in enumerate(items):
        entry: Node = {"digest": item.digest, "size": item.size}
        if item.ref:
            entry["ref"] = item.ref
        else:
            entry["birthArtifactID"] = item.birth or births.of(item.path, artifact)
        if item.extra:
            entry["extra"] = item.extra
        write(("," if number else "") + f"{json.dumps(item.path, ensure_ascii=False)}:{json.dumps(entry, separators=(',', ':'))}")
    write("}}")
    file.flush()
    return base64.b64encode(digest.digest()).decode()


def _changed(path: str) -> ConflictError:
    return ConflictError(f"{path} changed while it was read; commit again when nobody writes to it")
