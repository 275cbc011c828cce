"""How a draft becomes a version on a W&B server.

In this order: the draft is walked and what is new in it hashed, CreateArtifact, CreateArtifactManifest, CreateArtifactFiles with
the uploads, the manifest itself, CommitArtifact. Before the commit nobody sees anything; a process that dies leaves a pending
version, which the server clears up. Whether an earlier attempt at a commit was the one that counted is asked by the version's id,
which is noted on this machine before the commit is asked for, and by its client id, which follows from the draft's commit. What
the base version has and the draft did not change is listed with the version that stored it, and not sent again; of the rest the
server wants what it does not have.

A version that many processes make (``add_part``, ``finish``) is one pending version with a manifest of each, a PATCH; the server
joins them at the commit.

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
from artifactfs.content import Checksum, EntryChecksum, manifest_digest
from artifactfs.errors import (
    ArtifactFSError,
    CommError,
    ConflictError,
    IntegrityError,
    NetworkError,
    NotFoundError,
    NotPermittedError,
    UsageError,
    from_os_error,
)
from artifactfs.model import BLAKE3, MD5, XXH128, Dir, Entry, File, Ref, Remote, Symlink, Version
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
_DELETED = ("DELETED", "PENDING_DELETION", "GARBAGE_COLLECTED")
_DELETED_MOST = 100
_NEVER = -2  # a ttlDurationSeconds that is no seconds
_KINDS = {"FULL": "wandb_manifest.json", "PATCH": "wandb_manifest.patch.json"}
_DIGESTS = "ARTIFACT_DIGEST_ALGORITHM"
"""The feature of servers that know of other digests than MD5; no other is told of any."""

log = logging.getLogger(__name__)


class Catalog(Protocol):
    """What saving needs of the store."""

    url: str
    client: Client
    tree: Tree

    def features(self) -> frozenset[str]: ...
    def start_run(self, entity: str, project: str) -> str: ...
    def newest(self, name: ArtifactName, without: int | None = None) -> Version | None: ...
    def type_of(self, name: ArtifactName, logged: bool = False) -> str | None: ...
    def version_of(self, artifact: str, name: ArtifactName) -> Version: ...
    def aliases_of(self, name: ArtifactName, version: Version) -> list[str]: ...
    def change_aliases(self, document: str, name: ArtifactName, artifact: str, aliases: Iterable[str]) -> None: ...


class _Item(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One line of the manifest to be. ``local``: the file to send; ``elsewhere``: which of the other stores' contents to send;
    "" and -1 for what is not sent. ``parts``: MD5s of its parts, hex; ``md5``: that of the file, base64, where ``digest`` is
    another."""

    path: str
    digest: str
    size: int
    local: str = ""
    ref: str = ""
    extra: dict[str, str | int] = {}
    birth: str = ""
    parts: tuple[str, ...] = ()
    md5: str = ""
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


def add_part(store: Catalog, id: str, draft: Draft) -> None:
    """See ``ArtifactServer.add_part``."""
    _Saving(store, draft, None, id).part()


def finish(store: Catalog, id: str, draft: Draft) -> Version:
    """See ``ArtifactServer.finish``."""
    return _Saving(store, draft, None, id).last_part()


def made_by(store: Catalog, name: ArtifactName, commit: str) -> Version | None:
    """The version of ``name`` that a commit made; None if it made none, or that was deleted."""
    _, artifact = _trace(store.client, commit)
    return store.version_of(artifact, name) if artifact else None


def _trace(client: Client, commit: str) -> tuple[str, str]:
    """(the client id for a further attempt at a commit, the id of the version that one made, "" for none). What was deleted since
    keeps its client id: the one after that follows from it."""
    told = client_id(commit)
    for _ in range(_DELETED_MOST):
        try:
            found = dig(client.ask(queries.CLIENT_ID, clientID=told), "clientIDMapping", "serverID")
        except (NetworkError, NotPermittedError):
            raise
        except ArtifactFSError as error:  # a server that does not know the id
            log.debug("%s", error)
            found = None
        state = _state(client, str(found)) if found else ""
        if state not in _DELETED:
            return told, str(found) if state == "COMMITTED" else ""
        told = client_id(f"{commit}\n{found}")
    raise CommError(f"a version was deleted {_DELETED_MOST} times since; log it as a new one")


def _state(client: Client, artifact: str) -> str:
    """What the server says of a version's state; "" if it does not know it."""
    try:
        return str(dig(client.ask(queries.ARTIFACT, id=artifact), "artifact", "state") or "")
    except (NetworkError, NotPermittedError):
        raise
    except ArtifactFSError as error:
        log.debug("%s", error)
        return ""


class _Saving:
    """One attempt. ``distributed``: the id of the version that many processes make, of which the draft is a part."""

    def __init__(self, store: Catalog, draft: Draft, report: Report | None, distributed: str = "") -> None:
        self._store = store
        self._client: Client = store.client
        self._draft = draft
        self._report = report
        self._distributed = distributed
        self._progress = Progress()
        self._elsewhere: list[Contents] = []
        self._client_id = client_id(draft.commit)
        self._digests = _DIGESTS in store.features()
        self._algorithm = MD5
        self._note = _Note(draft, store.url)
        self._manifest_run = self._run() or ""

    def run(self) -> Published:
        draft, store = self._draft, self._store
        own = self._own() if draft.retry or self._note.read() else None
        if own is not None:
            return Published(self._known(own), True)
        kind = self._type()
        newest = store.newest(draft.name)
        found = newest.number if newest else -1
        if draft.expect_base not in (None, found):
            raise ConflictError(
                f"{draft.name.path} is at {f'v{found}' if newest else 'no version'}, not as expected: somebody else committed; "
                "stage the newest version again, or commit over it: commit --resume --no-expect-base"
            )
        base = newest.commit if newest and draft.base in (None, newest.number) else ""
        artifact, state = self._send(kind, base)
        if state == "COMMITTED":  # the same is there already
            version = self._with_aliases(store.version_of(artifact, draft.name))
            return Published(version, draft.retry and version.number > found)
        return Published(self._commit(artifact), True)

    def part(self) -> tuple[str, str]:
        """Add the draft to the pending version; its id and state."""
        return self._send(self._type(), "")

    def last_part(self) -> Version:
        """Add the draft, and commit; the version, also where an earlier attempt made it."""
        own = self._own()
        if own is not None:
            return self._known(own)
        artifact, state = self.part()
        if state == "COMMITTED":
            return self._with_aliases(self._store.version_of(artifact, self._draft.name))
        return self._commit(artifact)

    def _own(self) -> Version | None:
        """The version that an earlier attempt at this commit made."""
        noted = self._note.read()
        if noted and self._state(noted) == "COMMITTED":
            return self._store.version_of(noted, self._draft.name)
        self._client_id, artifact = _trace(self._client, self._draft.commit)
        return self._store.version_of(artifact, self._draft.name) if artifact else None

    def _state(self, artifact: str) -> str:
        return _state(self._client, artifact)

    def _commit(self, artifact: str) -> Version:
        """Make the pending version one. An answer that was lost makes the request come twice, and what the server says to the
        second one is not what counts."""
        self._note.write(artifact)
        try:
            answer = self._client.ask(queries.COMMIT, artifactID=artifact)
        except (NetworkError, NotPermittedError):
            raise
        except ArtifactFSError:
            if self._state(artifact) != "COMMITTED":
                raise
            answer = {}
        made = dig(answer, "commitArtifact", "artifact", "id") or artifact
        return self._known(self._store.version_of(str(made), self._draft.name))

    def _known(self, version: Version) -> Version:
        """The version, once all is as the draft says, so that nothing has to be noted any more."""
        version = self._with_aliases(version)
        self._note.forget()
        return version

    def _type(self) -> str:
        draft = self._draft
        known = self._store.type_of(draft.name, logged=True)
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
        other = Checksum(XXH128) if self._algorithm == XXH128 else None
        try:
            with open(change.path, "rb") as file:
                length = os.fstat(file.fileno()).st_size
                step = part_size(length)
                size = 0
                while piece := file.read(min(_PIECE, step - size % step)):
                    whole.update(piece)
                    if other is not None:
                        other.update(piece)
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
        md5 = base64.b64encode(whole.digest()).decode()
        local = os.path.abspath(change.path)
        if other is None:
            return _Item(path, md5, size, local=local, parts=tuple(parts))
        return _Item(path, other.finish(), size, local=local, extra={"alg": XXH128}, parts=tuple(parts), md5=md5)

    def _hashed_there(self, new: Streamed) -> _Item:
        """A file of another store. Its MD5 is what that says, where it does; all that is read is compared with what it says."""
        where = next(number for number, known in enumerate(self._elsewhere) if known is new.contents)
        file = new.file
        if self._algorithm == file.algorithm == MD5 and file.checksum and file.size < MULTIPART:
            return _Item(new.path, file.checksum, file.size, elsewhere=where)
        known, whole, parts = EntryChecksum(file.algorithm), hashlib.md5(usedforsecurity=False), []
        other = Checksum(self._algorithm if self._algorithm != MD5 else BLAKE3)  # of BLAKE3 it is none
        step = part_size(file.size)
        with contextlib.closing(new.opened()) as content:
            for start in range(0, file.size, step):
                part = hashlib.md5(usedforsecurity=False)
                for offset in range(start, min(start + step, file.size), _PIECE):
                    piece = content.read(offset, min(_PIECE, start + step - offset, file.size - offset))
                    if not piece:
                        raise new.wrong()
                    for running in (known, whole, part, other):
                        running.update(piece)
                parts.append(part.hexdigest())
        if file.digest not in ("", known.finish()):
            raise new.wrong()
        md5 = base64.b64encode(whole.digest()).decode()
        told = tuple(parts) if file.size >= MULTIPART else ()
        if not other.needed:
            return _Item(new.path, md5, file.size, parts=told, elsewhere=where)
        extra: dict[str, str | int] = {"alg": other.algorithm}
        return _Item(new.path, other.finish(), file.size, extra=extra, parts=told, md5=md5, elsewhere=where)

    def _count(self, files: int, size: int, stored: int) -> None:
        self._progress.files += files
        self._progress.bytes += size
        self._progress.stored += stored
        if self._report is not None:
            self._report(self._progress)

    # What is sent

    def _algorithm_of(self, kind: str) -> str:
        """The digest of new files: XXH128 where that is asked for and the server takes it for this collection, else MD5."""
        name = self._draft.name
        if self._draft.algorithm != XXH128 or not self._digests:
            return MD5
        try:
            if not dig(self._client.ask(queries.XXHASH_ENABLED, entityName=name.entity), "entity", "xxhashDigestsEnabled"):
                return MD5
        except CommError as error:
            log.debug("%s", error)
            return MD5
        where = {"entityName": name.entity, "projectName": name.project, "artifactTypeName": kind}
        try:
            data = self._client.ask(queries.DIGEST_ALGORITHM, **where, artifactCollectionName=name.collection)
        except (CommError, NotFoundError) as error:  # a project that is not there yet
            log.debug("%s", error)
            return XXH128
        known = dig(data, "project", "artifactType", "artifactCollection", "digestAlgorithm")
        return MD5 if known == "MANIFEST_MD5" else XXH128

    def _create(self, kind: str, digest: str) -> Node:
        draft, name = self._draft, self._draft.name
        where = {"artifactCollectionName": name.collection}
        asked: Node = {
            "entityName": name.entity,
            "projectName": name.project,
            "runName": self._run(),
            "artifactTypeName": kind,
            "artifactCollectionName": name.collection,
            "artifactCollectionNames": None,
            "digest": digest,
            "description": draft.description,
            "aliases": [{**where, "alias": alias} for alias in dict.fromkeys((*draft.aliases, LATEST))],
            "metadata": json.dumps(draft.metadata) if draft.metadata else None,
            "ttlDurationSeconds": draft.ttl if draft.ttl is not None or draft.inherit_ttl else _NEVER,
            "historyStep": None,
            # Of a part the digest says nothing of the whole: a version of the same files as one part must not stand for all.
            "enableDigestDeduplication": not draft.always and not self._distributed,
            "distributedID": self._distributed or None,
            "clientID": self._client_id,
            "sequenceClientID": client_id(f"{name.path} {draft.commit}"),
            "storageRegion": None,
            "labels": None,
            "clientMutationId": None,
        }
        if self._digests:
            asked["digestAlgorithm"] = f"MANIFEST_{self._algorithm}"
        if draft.tags:
            asked["tags"] = [{"tagName": tag, "tagCategoryName": None, "attributes": None} for tag in draft.tags]
        found = dig(self._client.ask(queries.CREATE, input=asked), "createArtifact", "artifact")
        if not isinstance(found, dict) or not found.get("id"):
            raise CommError(f"{self._store.url} does not say which version {name.path} it is to make")
        if found.get("state") not in (None, "PENDING", "COMMITTED", "DELETED"):
            raise CommError(f"{self._store.url} says that the new version of {name.path} is {found.get('state')!r}")
        return found

    def _run(self) -> str | None:
        """The run that logs it, where that is of the same project."""
        entity, _, rest = self._draft.run.partition("/")
        project, _, id = rest.partition("/")
        return id if (entity, project) == (self._draft.name.entity, self._draft.name.project) and id else None

    def _send(self, kind: str, base: str) -> tuple[str, str]:
        """Create the version, and send all that is in it, unless the server has the same; its id and state."""
        self._algorithm = self._algorithm_of(kind)
        with tempfile.TemporaryDirectory(prefix="artifactfs-") as folder:
            items = Sorted(self._hashed_items(self._draft.folder), folder, lambda item: item.path, _encode, _decode)
            digest = manifest_digest(_lines(items), self._algorithm)
            expected = self._draft.expect_digest if self._draft.algorithm == self._algorithm else ""
            if expected not in ("", digest):
                raise IntegrityError(f"{self._draft.name.path} would get the digest {digest}, not {expected}; nothing is made")
            created = self._create(kind, digest)
            artifact = str(created["id"])
            if created.get("state") == "COMMITTED":
                return artifact, "COMMITTED"
            base = base or str(dig(created, "artifactSequence", "latestArtifact", "id") or "")
            manifest = self._manifest(artifact, base, "", False)
            births = self._send_all(artifact, str(manifest["id"]), items)
            with open(os.path.join(folder, "manifest"), "w+b") as file:
                md5 = _write_manifest(file, items, births, artifact)
                size = os.fstat(file.fileno()).st_size
                for again in (True, False):
                    if self._distributed:
                        whole = self._updated(str(manifest["id"]), md5)
                    else:
                        whole = self._manifest(artifact, base, md5, True)
                    url = dig(whole, "file", "uploadUrl")
                    if not isinstance(url, str) or not url:
                        raise CommError(f"{self._store.url} does not say where to put the manifest of {self._draft.name.path}")
                    try:
                        self._put(
                            url, dig(whole, "file", "uploadHeaders"), lambda: _Slice(_LocalContent(file.name), 0, size), size
                        )
                        break
                    except NotPermittedError:  # the URL was good for a while only
                        if not again:
                            raise
        return artifact, "PENDING"

    def _send_all(self, artifact: str, manifest: str, items: Iterable[_Item]) -> Births:
        births = Births()
        with ThreadPoolExecutor(_WORKERS, thread_name_prefix="upload") as pool:
            batch: list[_Item] = []
            for item in items:
                if item.is_sent:
                    batch.append(item)
                if len(batch) == _BATCH:
                    self._send_files(artifact, manifest, batch, births, pool)
                    batch = []
            if batch:
                self._send_files(artifact, manifest, batch, births, pool)
        return births

    def _manifest(self, artifact: str, base: str, digest: str, upload: bool) -> Node:
        """Announce the manifest, or its contents."""
        kind = "PATCH" if self._distributed else "FULL"
        try:
            return self._announce(artifact, base, digest, upload, kind)
        except (CommError, NotFoundError, NotPermittedError) as error:
            if self._manifest_run:
                raise
            # A version belongs to no run where nobody said which; a server may want one all the same, as W&B's client has it.
            log.debug("once more, with a run: %s", error)
            self._manifest_run = self._store.start_run(self._draft.name.entity, self._draft.name.project)
            return self._announce(artifact, base, digest, upload, kind)

    def _announce(self, artifact: str, base: str, digest: str, upload: bool, kind: str) -> Node:
        data = self._client.ask(
            queries.CREATE_MANIFEST,
            artifactID=artifact,
            baseArtifactID=base or None,
            name=_KINDS[kind],
            digest=digest,
            entityName=self._draft.name.entity,
            projectName=self._draft.name.project,
            runName=self._manifest_run,
            manifestType=kind,
            includeUpload=upload,
        )
        return self._taken(dig(data, "createArtifactManifest", "artifactManifest"))

    def _updated(self, manifest: str, digest: str) -> Node:
        asked = {"artifactManifestID": manifest, "digest": digest, "baseArtifactID": None, "includeUpload": True}
        data = self._client.ask(queries.UPDATE_MANIFEST, **asked)
        return self._taken(dig(data, "updateArtifactManifest", "artifactManifest"))

    def _taken(self, manifest: object) -> Node:
        if not isinstance(manifest, dict) or not manifest.get("id"):
            raise CommError(f"{self._store.url} does not take a manifest of {self._draft.name.path}")
        return manifest

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
            spec: Node = {
                "artifactID": artifact,
                "artifactManifestID": manifest,
                "name": item.path,
                "md5": item.md5 or item.digest,
                "mimetype": mimetypes.guess_type(item.path)[0],
                "uploadPartsInput": parts,
            }
            specs.append({**spec, "digest": item.digest} if self._digests else spec)
        asked: Node = {"artifactFiles": specs, "storageLayout": "V2", "cloudRegionID": None, "clientMutationId": None}
        if self._digests:
            asked["digestAlgorithm"] = f"MANIFEST_{self._algorithm}"
        data = self._client.ask(queries.CREATE_FILES, input=asked)
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
        self._put(url, node.get("uploadHeaders"), self._body(item, 0, item.size, item.md5 or item.digest), item.size)
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

    def _body(self, item: _Item, offset: int, size: int, md5: str) -> Callable[[], _Slice]:
        """What opens ``size`` bytes of a file, whose MD5 is ``md5``, to be sent."""

        def opened() -> _Slice:
            if item.elsewhere < 0:
                return _Slice(_LocalContent(item.local), offset, size, md5, _changed(item.local))
            there = self._elsewhere[item.elsewhere]
            wrong = IntegrityError(f"{there.where(item.path)} is not what was recorded: it has another MD5; it is not copied")
            return _Slice(there.open(item.path), offset, size, md5, wrong)

        return opened

    def _put(self, url: str, given: object, opened: Callable[[], _Slice], size: int) -> dict[str, str]:
        """Send ``size`` bytes of a file, and the headers that the server gave, without a key: what a URL permits is in it. The
        headers of the answer. Raises what ``opened`` and its reading do."""
        url = urljoin(self._client.base + "/", url)
        headers = dict(http.OWN_CREDENTIALS)
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


class _Note:
    """The id of the version that a draft's commit is about to make, on this machine, for the next attempt. Without a directory
    for it, or on a disk that cannot keep it, the server is asked alone."""

    def __init__(self, draft: Draft, url: str) -> None:
        name = blake3(f"{url}\n{draft.commit}".encode()).hexdigest()[:32]
        self._path = draft.notes / f"wandb-{name}" if draft.notes is not None else None

    def read(self) -> str:
        """What was written; "" for nothing."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return self._path.read_text().strip() if self._path is not None else ""
        return ""

    def write(self, artifact: str) -> None:
        """Keep it, durably."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with open(self._path, "w") as file:
                file.write(artifact)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            log.debug("not noted: %s", error)

    def forget(self) -> None:
        """The version is there, and known."""
        with contextlib.suppress(OSError):
            if self._path is not None:
                self._path.unlink(missing_ok=True)


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


def _lines(items: Iterable[_Item]) -> Iterator[tuple[str, str]]:
    """What the digest of the version is made of. UsageError for names that a server cannot keep apart."""
    last = None
    for item in items:
        if "\n" in item.path or "\r" in item.path:
            raise UsageError(f"{item.path!r} holds a line break, which a W&B server cannot keep apart; rename the file")
        if item.path == last:
            raise UsageError(f"{item.path!r} would be in the version twice; log them apart")
        last = item.path
        yield item.path, item.digest


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
