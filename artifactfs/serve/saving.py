"""How an upload becomes a version: what a client sent is checked against what it announced, and handed to ``publish``.

A client announces a version (``createArtifact``), its manifests and its files, puts bytes, and commits. The pending version's
id is kept as the ``commit`` of the version, so that a commit that is repeated, after an answer that was lost or a server that
was killed, finds what it made. All of it is read from this server's disk and from the store: nothing that a manifest says is
believed but names and references, and the MD5 of every byte is worked out anew while the bytes are stored.

No caller gets bytes for naming their MD5: a file need not be uploaded only if a version of the same collection, which the caller
may read, or this very upload has it.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import functools
import itertools
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from artifactfs.content import manifest_digest
from artifactfs.errors import ConflictError, IntegrityError, NotFoundError, UsageError, from_os_error
from artifactfs.folders import MadeFolder
from artifactfs.model import BLAKE3, MD5, XXH128, Collection, Dir, Entry, File, Ref, Run, Version
from artifactfs.names import LATEST, ArtifactName, check_new_alias, parse, version_number
from artifactfs.publish import Change, Draft, NewFile, check_sequence, publish, store_folder
from artifactfs.serve.manifests import Listed, read_manifest
from artifactfs.serve.service import Context
from artifactfs.serve.state import Fields, Manifest, Pending, Uploaded, need_pending
from artifactfs.store.native import NativeStore, now

FULL, INCREMENTAL, PATCH = "FULL", "INCREMENTAL", "PATCH"
KINDS = (FULL, INCREMENTAL, PATCH)

PREFIX = "wandb-artifact://"
CLIENT_PREFIX = "wandb-client-artifact://"
_ATTEMPTS = 8
"""Times that an incremental version is laid over the newest one: each lost race is somebody's commit."""
_TARGET_WAIT = 20.0
"""Seconds that a commit waits for the version that one of its references leads to, and that is being committed beside it."""
_FILE = msgspec.msgpack.Decoder(File).decode
_ENCODE = msgspec.msgpack.Encoder().encode


# --- ids ------------------------------------------------------------------------------------------


def pending_id(id: str) -> str:
    """The public id of an upload."""
    return base64.standard_b64encode(f"Artifact:pending:{id}".encode()).decode()


def artifact_id(text: str) -> tuple[str, ArtifactName | None]:
    """(upload, None) or ("", name) of a public id. NotFoundError for what is none of ours."""
    try:
        kind, _, rest = base64.b64decode(text, validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        kind, rest = "", ""
    if kind == "Artifact" and rest.startswith("pending:"):
        return rest.removeprefix("pending:"), None
    if kind == "Artifact":
        with contextlib.suppress(UsageError):
            name = parse(rest)
            if version_number(name.alias) is not None:
                return "", name
    raise NotFoundError(f"artifact {text[:80]!r} not found")


def find_artifact(context: Context, text: str) -> Version | Pending:
    """The version, or the upload that is not over, of a public id. NotFoundError where the caller may not read it."""
    upload, name = artifact_id(text)
    if name is not None:
        return context.version(name)
    pending = context.state.pending(upload)
    if pending is None or not context.caller.can_read(pending.name.entity):
        raise NotFoundError(f"artifact {text[:80]!r} not found")
    return context.version(parse(pending.result)) if pending.result else pending


def find_version(context: Context, text: str) -> Version:
    """The version of a public id. NotFoundError, also for one that is still being uploaded."""
    found = find_artifact(context, text)
    if isinstance(found, Pending):
        raise NotFoundError(f"artifact {found.name.path} is not committed yet")
    return found


def writable_pending(context: Context, text: str) -> Pending:
    """The upload of a public id, which the caller may go on with."""
    upload, name = artifact_id(text)
    if name is not None:
        raise ConflictError(f"artifact {name} is committed already")
    known = context.state.pending(upload)
    if known is None or not context.caller.can_write(known.name.entity):
        raise NotFoundError(f"artifact {text[:80]!r} not found")
    return need_pending(context.state, upload)


# --- announcing -----------------------------------------------------------------------------------


def create(context: Context, announced: Pending, deduplicate: bool) -> Version | Pending:
    """Begin an upload; or the version of the collection that has the digest, which then gets the aliases; or, of a distributed
    version, what others have begun. UsageError for a portfolio or another type than the collection's."""
    store = context.store
    with contextlib.suppress(NotFoundError):
        collection = store.collection(announced.name)
        check_sequence(collection)
        if collection.type != announced.type:
            raise UsageError(
                f"{announced.name.path} already exists with type {collection.type!r}, not {announced.type!r}; "
                "use that type or another name"
            )
    with context.service.holding(f"collection {announced.name.path}"):
        if announced.distributed:
            begun = context.state.open_distributed(announced.name, announced.distributed)
            if begun is not None:
                joined = _joined(begun.fields, announced.fields)
                context.state.update_fields(begun.id, joined)
                return begun._replace(fields=joined)
        elif deduplicate and (same := _with_digest(store, announced)) is not None:
            point_aliases(store, same, announced.fields.aliases)
            note_logged(store, announced.fields.run, same)
            context.state.add_pending(announced._replace(result=same.qualified_name))
            return same
        context.state.add_pending(announced)
        return announced


def _joined(begun: Fields, further: Fields) -> Fields:
    """What two writers say of the version that they make together."""
    return Fields(
        description=further.description if further.description is not None else begun.description,
        metadata={**begun.metadata, **further.metadata},
        aliases=list(dict.fromkeys([*begun.aliases, *further.aliases])),
        tags=list(dict.fromkeys([*begun.tags, *further.tags])),
        ttl=further.ttl if not further.inherit_ttl else begun.ttl,
        inherit_ttl=further.inherit_ttl and begun.inherit_ttl,
        run=further.run or begun.run,
        runs=list(dict.fromkeys(filter(None, [*begun.runs, begun.run, further.run]))),
    )


def _with_digest(store: NativeStore, announced: Pending) -> Version | None:
    """The newest version of the collection with the digest."""
    try:
        versions = store.versions(announced.name)
    except NotFoundError:
        return None
    same = (it for it in reversed(versions) if it.digest == announced.digest and it.algorithm == announced.algorithm)
    return next(same, None)


def point_aliases(store: NativeStore, version: Version, aliases: Sequence[str]) -> None:
    """Let aliases, ``latest`` among them if it is given, point to a version."""

    def point(collection: Collection) -> Collection:
        return msgspec.structs.replace(collection, aliases={**collection.aliases, **dict.fromkeys(aliases, version.number)})

    for alias in aliases:
        if alias != LATEST:
            check_new_alias(alias)
    if aliases:
        store.update_collection(ArtifactName(version.entity, version.project, version.collection), point)


def note_logged(store: NativeStore, path: str, version: Version) -> None:
    """Let the record of a run say that it logged a version."""
    if path:
        with contextlib.suppress(NotFoundError):
            store.save_run(msgspec.structs.replace(load_run(store, path), logged=[version.qualified_name], updated_at=now()))


def load_run(store: NativeStore, path: str) -> Run:
    """The run ``entity/project/id``. NotFoundError."""
    parts = path.split("/")
    if len(parts) != 3:
        raise NotFoundError(f"run {path!r} not found")
    return store.run(*parts)


class Announced(NamedTuple):
    """A file that a client will upload. ``md5`` and ``digest`` are base64; one of them may be ""."""

    name: str
    md5: str
    digest: str


def announce_files(context: Context, pending: Pending, files: Iterable[Announced]) -> list[Uploaded]:
    """What the entries are to be made of, in order: an object to upload, or what is stored or uploaded already."""
    newest = context.store.newest(pending.name)
    find = functools.cache(functools.partial(_numbered, context, pending))
    noted = []
    for file in files:
        check_digest(file)
        stored = _stored_already(context, pending, newest, file, find)
        noted.append(Uploaded(file.name, file.md5, file.digest, secrets.token_hex(16), _ENCODE(stored) if stored else None))
    return context.state.add_files(pending.id, noted)


def check_digest(file: Announced) -> None:
    """UsageError unless there is a digest, and it is base64 of 16 bytes."""
    given = [digest for digest in (file.md5, file.digest) if digest]
    for digest in given:
        try:
            size = len(base64.b64decode(digest, validate=True))
        except (binascii.Error, ValueError):
            size = 0
        if size != 16:
            raise UsageError(f"file {file.name[:80]!r} has a digest that cannot be: {digest[:40]!r}")
    if not given:
        raise UsageError(f"file {file.name[:80]!r} has no digest")


def _numbered(context: Context, pending: Pending, number: int) -> Version | None:
    """The version of that number of the collection, None if there is none any more."""
    with contextlib.suppress(NotFoundError, IntegrityError):
        return context.store.version(pending.name.at(f"v{number}"))
    return None


def _stored_already(
    context: Context, pending: Pending, newest: Version | None, file: Announced, find: Callable[[int], Version | None]
) -> File | None:
    """The stored entry of this digest in a version of the collection, which ``find`` finds by its number; the caller, who writes
    there, may read those."""
    if newest is not None:
        found = _file_at(context, newest, file.name, file)
        if found is not None:
            return found
    if not file.md5:
        return None
    place = context.state.known(pending.name.path, base64.b64decode(file.md5))
    if place is None:
        return None
    number, path = place
    version = find(number)
    if version is None:
        return None
    with contextlib.suppress(NotFoundError, IntegrityError):
        return _file_at(context, version, path, file)
    return None


def _file_at(context: Context, version: Version, path: str, wanted: Announced) -> File | None:
    """The stored file at a path of a version as an entry of the wanted digest, if its digest, as far as it is known, is that."""
    entry = context.store.tree.resolve(version.root, path)
    return _as_wanted(context, entry, wanted) if isinstance(entry, File) else None


def _as_wanted(context: Context, entry: File, wanted: Announced, read: bool = False, where: str = "") -> File | None:
    """The entry with its MD5, or XXH128 where that is wanted, if it is the wanted one. ``read``: work it out if need be."""
    if wanted.digest and not wanted.md5:
        return entry if entry.algorithm == XXH128 and entry.checksum == wanted.digest else None
    checksums = context.service.checksums
    md5 = checksums.md5(entry, where) if read else checksums.known(entry)
    if md5 != wanted.md5:
        return None
    if wanted.digest:
        return entry if entry.algorithm == XXH128 and entry.checksum == wanted.digest else None
    return msgspec.structs.replace(entry, algorithm=MD5, checksum=md5)


# --- committing -----------------------------------------------------------------------------------


def commit(context: Context, text: str) -> Version:
    """Make an upload a version; one that was committed already is that. The store's errors, UsageError and IntegrityError for
    what cannot become one: then the upload stays, and can be mended and committed again."""
    upload, name = artifact_id(text)
    if name is not None:
        context.need_read(name.entity, f"artifact {name}")
        return context.version(name)
    known = context.state.pending(upload)
    if known is None or not context.caller.can_write(known.name.entity):
        raise NotFoundError(f"artifact {text[:80]!r} not found")
    with context.service.holding(f"artifact {upload}"):
        pending = context.state.pending(upload)
        if pending is None:
            raise NotFoundError(f"artifact {text[:80]!r} not found")
        if pending.result:
            return context.version(parse(pending.result))
        context.state.touch(upload)
        version = _Commit(context, pending).run()
        for run in dict.fromkeys(filter(None, [pending.fields.run, *pending.fields.runs])):
            note_logged(context.store, run, version)
        context.state.settle(upload, version.qualified_name)
        _remember(context, version)
        return version


def _remember(context: Context, version: Version) -> None:
    """Note where contents lie, so that they need not be uploaded again."""
    collection = f"{version.entity}/{version.project}/{version.collection}"
    files = ((path, entry) for path, entry in context.store.tree.walk(version.root) if isinstance(entry, File))
    found = ((base64.b64decode(file.checksum), path) for path, file in files if file.algorithm == MD5)
    while batch := list(itertools.islice(found, 10_000)):
        context.state.know(collection, version.number, batch)


class _Commit:
    """One commit of an upload. The entries of its manifests are sorted in a database of its own, on disk if there are many."""

    def __init__(self, context: Context, pending: Pending) -> None:
        self._context = context
        self._store = context.store
        self._pending = pending
        self._versions: dict[str, Version | None] = {}
        self._numbered = functools.cache(functools.partial(_numbered, context, pending))
        self._entries = sqlite3.connect("")  # a temporary file that SQLite removes; in memory while it is small
        self._entries.execute(
            "CREATE TABLE entries (place BLOB PRIMARY KEY, path TEXT NOT NULL, source INTEGER NOT NULL, entry BLOB) WITHOUT ROWID"
        )

    def run(self) -> Version:
        try:
            return self._run()
        finally:
            self._entries.close()

    def _run(self) -> Version:
        manifests = self._manifests()
        for source, manifest in enumerate(manifests):
            self._load(manifest, source)
        with self._context.service.committing:
            return self._make(manifests)

    def _make(self, manifests: Sequence[Manifest]) -> Version:
        if any(manifest.kind == INCREMENTAL for manifest in manifests):
            return self._publish_over(manifests)
        root = self._store_folder(None)
        if manifests[0].kind == FULL:
            self._check_digest(root)
        return self._publish(root, None)

    def _manifests(self) -> list[Manifest]:
        """The manifests that count: the last full one, or all patches, or the last incremental one."""
        state, pending = self._context.state, self._pending
        uploaded = [it for it in state.manifests(pending.id) if state.object_path(pending.id, it.id).exists()]
        patches = [manifest for manifest in uploaded if manifest.kind == PATCH]
        if patches:
            return patches
        if not uploaded:
            raise UsageError(f"{pending.name.path} has no manifest yet; upload one before it is committed")
        return uploaded[-1:]

    def _load(self, manifest: Manifest, source: int) -> None:
        """Take over the entries of a manifest. What two patches both have must be the same."""
        path = self._context.state.object_path(self._pending.id, manifest.id)
        with open(path, "rb") as file, self._entries:
            for listed in read_manifest(file):
                self._await_target(listed)
                place = listed.path.replace("/", "\0").encode()  # below a directory before what sorts after its name
                row = (place, listed.path, source, _ENCODE(listed))
                try:
                    self._entries.execute("INSERT INTO entries VALUES (?, ?, ?, ?)", row)
                except sqlite3.IntegrityError:
                    self._check_same(place, listed, source)

    def _check_same(self, place: bytes, listed: Listed, source: int) -> None:
        ((other, data),) = self._entries.execute("SELECT source, entry FROM entries WHERE place = ?", (place,)).fetchall()
        known = _LISTED(data)
        if other == source:
            raise UsageError(f"the manifest has {listed.path!r} twice")
        if (known.digest, known.ref) != (listed.digest, listed.ref):
            raise ConflictError(
                f"{listed.path!r} is in several parts of the distributed version, with different contents; "
                "give each process paths of its own"
            )

    def _check_digest(self, root: Dir) -> None:
        """IntegrityError unless the stored tree has the digest that the client gave for its version."""
        algorithm = self._pending.algorithm
        rows = self._entries.execute("SELECT path, entry FROM entries ORDER BY path")
        announced = manifest_digest(((path, _LISTED(data).digest) for path, data in rows), algorithm)
        found = self._store.tree.digest(root, algorithm)
        if found != announced:
            raise IntegrityError(f"what was uploaded for {self._pending.name.path} is not what its manifest says; log it again")
        if announced != self._pending.digest:
            raise IntegrityError(
                f"the manifest of {self._pending.name.path} has the digest {announced}, not {self._pending.digest} "
                "as was announced; log it again"
            )

    def _check_entries(self, root: Dir) -> None:
        """IntegrityError unless the stored tree has every entry with the digest that its manifest says."""
        for listed in self.listed():
            entry = self._store.tree.resolve(root, listed.path)
            if not isinstance(entry, (File, Ref)) or entry.digest != listed.digest:
                raise IntegrityError(f"what was uploaded as {listed.path!r} is not what its manifest says; log it again")

    def _publish_over(self, manifests: Sequence[Manifest]) -> Version:
        """The entries laid over the version that they are for: the base that the client named, else the newest one."""
        base = manifests[-1].base
        if base:
            version = self._base(base)
            return self._publish(self._store_folder(version.root), version.number)
        for attempt in range(_ATTEMPTS):
            newest = self._store.newest(self._pending.name)
            root = self._store_folder(newest.root if newest else None)
            number = newest.number if newest else None
            try:
                return self._publish(root, number, -1 if number is None else number)
            except ConflictError:
                again = self._store.newest(self._pending.name)
                if (again.number if again else None) == number or attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError("the loop returns or raises")

    def _base(self, id: str) -> Version:
        found = find_version(self._context, id)
        if ArtifactName(found.entity, found.project, found.collection) != self._pending.name:
            raise UsageError(f"{found.qualified_name} is of another collection than {self._pending.name.path}")
        return found

    def _store_folder(self, base: Dir | None) -> Dir:
        """Store what the version will hold. What was stored has the digests that its bytes have: these must be those that the
        client meant."""
        root = store_folder(self._store, self._draft(_Folder(_Cursor(self), "", base)))
        self._check_entries(root)
        return root

    def _publish(self, root: Dir, base: int | None, expected: int | None = None) -> Version:
        draft = dataclasses.replace(
            self._draft(MadeFolder({}, root)), base=base, expect_base=expected, expect_root=root.digest, retry=True
        )
        return publish(self._store, draft).version

    def _draft(self, folder: Any) -> Draft:
        pending, fields = self._pending, self._pending.fields
        return Draft(
            name=pending.name,
            type=pending.type,
            folder=folder,
            commit=pending.id,
            algorithm=pending.algorithm,
            description=fields.description,
            metadata=fields.metadata,
            tags=fields.tags,
            aliases=fields.aliases,
            ttl=fields.ttl,
            inherit_ttl=fields.inherit_ttl,
            run=fields.run,
            since=pending.since,
            reserved_type=True,
        )

    # Entries

    def listed(self) -> Iterator[Listed]:
        """All entries, in the order of a walk through the tree."""
        return (_LISTED(data) for (data,) in self._entries.execute("SELECT entry FROM entries ORDER BY place"))

    def below(self, base: Dir | None, name: str) -> Dir | None:
        """The directory of that name in ``base``."""
        found = self._store.tree.lookup(base, name) if base is not None else None
        return found if isinstance(found, Dir) else None

    def change(self, listed: Listed) -> Change:
        if listed.ref.startswith(CLIENT_PREFIX):
            raise UsageError(f"{listed.path!r} is a reference to an artifact that was not logged; log that first")
        if listed.ref.startswith(PREFIX):
            borrowed = self._borrowed(listed)
            if borrowed is not None:
                return borrowed
        if listed.ref:
            extra = {key: value for key, value in listed.extra.items() if key != "alg"}
            return Ref("", listed.ref, listed.digest, listed.size, extra=extra)
        return self._content(listed)

    def _content(self, listed: Listed) -> Change:
        """The bytes of an entry: an upload, what the server found when they were announced, or what another version has."""
        digest, state = listed.digest, self._context.state
        wanted = Announced(listed.path, "", digest) if listed.algorithm == XXH128 else Announced(listed.path, digest, "")
        for file in state.files_of(self._pending.id, listed.path):
            if digest not in (file.md5, file.digest):
                continue
            if file.stored is not None:
                return self._live(_FILE(file.stored), listed)
            path = state.object_path(self._pending.id, file.object)
            if path.exists():
                return NewFile(str(path), False)
        check_digest(wanted)
        for version in self._sources(listed):
            found = self._store.tree.resolve(version.root, listed.path)
            if isinstance(found, File):
                kept = _as_wanted(self._context, found, wanted, True, f"{version.qualified_name}/{listed.path}")
                if kept is not None:
                    return kept
        stored = _stored_already(self._context, self._pending, None, wanted, self._numbered)
        if stored is not None:
            return stored
        raise UsageError(
            f"the bytes of {listed.path!r} were not uploaded, and no version that you may read has them; log it again"
        )

    def _live(self, file: File, listed: Listed) -> Change:
        """``file``, if the version that it was found in, or another one of the collection, still has it."""
        wanted = (
            Announced(listed.path, "", listed.digest) if listed.algorithm == XXH128 else Announced(listed.path, listed.digest, "")
        )
        newest = self._cached("newest", lambda: self._store.newest(self._pending.name))
        again = _stored_already(self._context, self._pending, newest, wanted, self._numbered)
        if again is None or again.id != file.id:
            raise ConflictError(f"the version that has the bytes of {listed.path!r} was deleted meanwhile; log it again")
        return again

    def _sources(self, listed: Listed) -> Iterator[Version]:
        """Versions that may have the bytes of an entry that was not uploaded: the one that it was born in, the base, the
        newest."""
        for key in (listed.birth, *(manifest.base for manifest in self._bases())):
            if key:
                version = self._cached(key, functools.partial(find_version, self._context, key))
                if version is not None:
                    yield version
        newest = self._cached("newest", lambda: self._store.newest(self._pending.name))
        if newest is not None:
            yield newest

    def _bases(self) -> list[Manifest]:
        return [manifest for manifest in self._context.state.manifests(self._pending.id) if manifest.base]

    def _cached(self, key: str, find: Any) -> Version | None:
        if key not in self._versions:
            try:
                self._versions[key] = find()
            except (NotFoundError, IntegrityError):
                self._versions[key] = None
        return self._versions[key]

    def _borrowed(self, listed: Listed) -> Entry | None:
        """The entry of another version that a reference means; None for a reference to another server's artifact. NotFoundError
        where the caller may not read it, as where there is none."""
        host, _, path = listed.ref.removeprefix(PREFIX).partition("/")
        try:
            id = base64.standard_b64encode(bytes.fromhex(host)).decode()
            artifact_id(id)
        except (ValueError, NotFoundError):
            return None
        version = find_version(self._context, id)
        entry = self._store.tree.resolve(version.root, path)
        if not isinstance(entry, (File, Ref)):
            raise NotFoundError(f"{listed.path!r} is a reference to {path!r} of {version.qualified_name}, which has no such file")
        where = f"{version.qualified_name}/{path}"
        if isinstance(entry, Ref):
            digest = entry.digest
        else:
            digest = self._context.service.checksums.digest(entry, where)
            if entry.algorithm == BLAKE3:
                entry = msgspec.structs.replace(entry, algorithm=MD5, checksum=digest)
        if digest != listed.digest:
            raise IntegrityError(f"{listed.path!r} is a reference to {where} with the digest {digest}, not {listed.digest}")
        return entry

    def _await_target(self, listed: Listed) -> None:
        """Wait until an upload that a reference leads to is committed: clients commit several artifacts at a time."""
        if not listed.ref.startswith(PREFIX):
            return
        host = listed.ref.removeprefix(PREFIX).partition("/")[0]
        try:
            upload, _ = artifact_id(base64.standard_b64encode(bytes.fromhex(host)).decode())
        except (ValueError, NotFoundError):
            return
        end = time.monotonic() + _TARGET_WAIT
        while upload and (found := self._context.state.pending(upload)) and not found.result and time.monotonic() < end:
            time.sleep(0.05)


_LISTED = msgspec.msgpack.Decoder(Listed).decode


class _Cursor:
    """Where the walk is in the entries. Its folders share it, so each must be walked before the next name is asked for."""

    def __init__(self, owner: _Commit) -> None:
        self._owner = owner
        self._rest = owner.listed()
        self._at = next(self._rest, None)

    def level(self, prefix: str, base: Dir | None) -> Iterator[tuple[str, Change]]:
        last = ""
        while self._at is not None and self._at.path.startswith(prefix):
            here = self._at
            name, below, _ = here.path[len(prefix) :].partition("/")
            if name == last:
                raise UsageError(f"the manifest has {prefix + name!r} both as a file and as a directory; a name can be only one")
            last = name
            if below:
                yield name, _Folder(self, f"{prefix}{name}/", self._owner.below(base, name))
                continue
            yield name, self._owner.change(here)
            self._at = next(self._rest, None)


@dataclasses.dataclass(frozen=True, slots=True)
class _Folder:
    """The entries of a commit below a prefix, as changes to ``base``."""

    cursor: _Cursor
    prefix: str
    base: Dir | None

    def changes(self) -> Iterator[tuple[str, Change]]:
        return self.cursor.level(self.prefix, self.base)


# --- bytes ----------------------------------------------------------------------------------------


def check_object(context: Context, upload: str, object: str) -> None:
    """NotFoundError unless an object of an upload may still arrive."""
    pending = context.state.pending(upload)
    if pending is None or pending.result or not context.caller.can_write(pending.name.entity):
        raise NotFoundError("the upload is over, or never was")
    if not object.isalnum():
        raise NotFoundError("there is no such object")


def complete_parts(context: Context, artifact: str, id: str, given: Sequence[tuple[int, str]]) -> str:
    """Put the parts of an upload together; the base64 MD5 of the whole, which is what was announced. Idempotent."""
    pending = writable_pending(context, artifact)
    upload = context.state.multipart(id)
    if upload is None or upload.artifact != pending.id:
        raise NotFoundError("there is no such upload in parts")
    numbers = sorted(upload.parts)
    if sorted(number for number, _ in given) != numbers:
        raise UsageError(f"the upload has the parts {numbers[0]} to {numbers[-1]}; each must be named once")
    for number, tag in given:
        if tag.strip('"') != upload.parts[number]:
            raise IntegrityError(f"part {number} has another MD5 than was announced; upload it again")
    target = context.state.object_path(pending.id, upload.object)
    with context.service.holding(f"multipart {id}"):
        if not target.exists():
            _join(context, pending, upload.object, numbers)
    file = context.state.file_of(pending.id, upload.object)
    return file.md5 or file.digest


def part_object(object: str, number: int) -> str:
    """The name of a part's file."""
    return f"{object}part{number}"


def _join(context: Context, pending: Pending, object: str, numbers: Sequence[int]) -> None:
    """Put the parts one after the other. That the whole has the MD5 that was announced is checked by the commit, as for all
    files: each part has been."""
    state = context.state
    paths = [state.object_path(pending.id, part_object(object, number)) for number in numbers]
    missing = [number for number, path in zip(numbers, paths, strict=True) if not path.exists()]
    if missing:
        raise UsageError(f"part {missing[0]} was not uploaded yet")
    whole = state.folder(pending.id) / f"{object}.{secrets.token_hex(4)}.tmp"
    try:
        with open(whole, "xb") as target:
            for path in paths:
                with open(path, "rb") as part:
                    shutil.copyfileobj(part, target, 4 << 20)
            target.flush()
            sync(target)
        whole.replace(state.object_path(pending.id, object))
    except OSError as error:
        raise from_os_error(error, "keeping an upload") from None
    finally:
        whole.unlink(missing_ok=True)
    for path in paths:
        path.unlink(missing_ok=True)


def sync(file: Any) -> None:
    """Make a file's bytes survive a power loss."""
    os.fdatasync(file.fileno())
