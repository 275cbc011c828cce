"""What the server keeps on its own disk: versions that clients are uploading, and what can be worked out again.

::

    <data dir>/lock          held by the one server that uses the directory
               secret        what URLs are signed with
               keys.json     API keys (unless --keys names another file)
               serve.sqlite  the tables below
               pending/<artifact>/<object>   uploaded bytes; a file of its final name is complete and has the MD5 it was to have
               runs/<run>/<object>           files of runs

Nothing here is needed for a version that was committed: those are in the store alone, and any server over the store serves them.
A killed process loses nothing of it: SQLite's journal, and files that are synced before they get their name.

Threads: one connection behind one lock, never held during I/O other than SQLite's own.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from artifactfs.errors import ConflictError, NotFoundError, from_os_error
from artifactfs.names import ArtifactName

KEEP_PENDING = 7 * 24 * 3600
"""Seconds without any request until what was uploaded of a version that was never committed is removed."""
_CHECKSUMS = 1000
"""MD5s of contents that are written at a time: each write waits for the disk."""
KEEP_RESULTS = 90 * 24 * 3600
"""Seconds for which the id that a version had while it was uploaded is known afterwards."""

_FILE_COLUMNS = "name, md5, digest, object, stored"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS artifacts (      -- a version that is being uploaded, or what became of it
    id TEXT PRIMARY KEY, entity TEXT NOT NULL, project TEXT NOT NULL, collection TEXT NOT NULL,
    type TEXT NOT NULL, digest TEXT NOT NULL, algorithm TEXT NOT NULL, fields TEXT NOT NULL,
    client TEXT NOT NULL, distributed TEXT NOT NULL, since INTEGER NOT NULL,
    result TEXT NOT NULL DEFAULT '',          -- qualified name of the version
    created_at TEXT NOT NULL, touched REAL NOT NULL);
CREATE INDEX IF NOT EXISTS artifacts_client ON artifacts (client) WHERE client != '';
CREATE INDEX IF NOT EXISTS artifacts_distributed ON artifacts (entity, project, collection, distributed) WHERE distributed != '';
CREATE TABLE IF NOT EXISTS manifests (      -- its manifests; the object is there once it was uploaded
    id TEXT PRIMARY KEY, artifact TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, digest TEXT NOT NULL,
    base TEXT NOT NULL, made INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS manifests_artifact ON manifests (artifact);
CREATE TABLE IF NOT EXISTS files (          -- what its entries are made of: an uploaded object, or a stored entry
    artifact TEXT NOT NULL, name TEXT NOT NULL, md5 TEXT NOT NULL, digest TEXT NOT NULL, object TEXT NOT NULL,
    stored BLOB, PRIMARY KEY (artifact, name, md5, digest)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS multiparts (id TEXT PRIMARY KEY, artifact TEXT NOT NULL, object TEXT NOT NULL, parts TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS known (          -- a hint where in a collection a content of this MD5 lies; checked before it is used
    collection TEXT NOT NULL, md5 BLOB NOT NULL, number INTEGER NOT NULL, path TEXT NOT NULL,
    PRIMARY KEY (collection, md5)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS checksums (content BLOB PRIMARY KEY, md5 BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS runs (path TEXT PRIMARY KEY, state TEXT NOT NULL, summary TEXT NOT NULL, fields TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS projects (       -- made by themselves, or by a run: a store has a project with its first collection
    entity TEXT NOT NULL, name TEXT NOT NULL, fields TEXT NOT NULL, PRIMARY KEY (entity, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS run_files (
    run TEXT NOT NULL, name TEXT NOT NULL, object TEXT NOT NULL, PRIMARY KEY (run, name)) WITHOUT ROWID;
"""


class Fields(msgspec.Struct, frozen=True, kw_only=True):
    """What a client said of a version that it uploads."""

    description: str | None = None
    metadata: dict[str, Any] = {}
    aliases: list[str] = []
    tags: list[str] = []
    ttl: int | None = None
    inherit_ttl: bool = True
    run: str = ""
    runs: list[str] = []
    """All runs that added to a distributed version."""


class Pending(NamedTuple):
    """A version that is being uploaded. ``result`` is the qualified name of what became of it, "" until then."""

    id: str
    name: ArtifactName
    type: str
    digest: str
    algorithm: str
    fields: Fields
    client: str
    distributed: str
    since: int
    result: str
    created_at: str = ""


class Manifest(NamedTuple):
    """A manifest of a version that is being uploaded; ``base`` is the id of an artifact."""

    id: str
    artifact: str
    kind: str
    name: str
    digest: str
    base: str


class Uploaded(NamedTuple):
    """What one entry is made of: the object that was, or is to be, uploaded; or a stored entry (``stored``, msgpack)."""

    name: str
    md5: str
    digest: str
    object: str
    stored: bytes | None


class Multipart(NamedTuple):
    id: str
    artifact: str
    object: str
    parts: dict[int, str]
    """The hex MD5 that each part is to have."""


class State:
    """The data directory at ``root``, held by this process alone until :meth:`close`. ConflictError if another server has it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in ("pending", "runs"):
                (root / name).mkdir(mode=0o700, exist_ok=True)
            self._held = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise from_os_error(error, f"opening the data directory {root}") from None
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._held)
            raise ConflictError(
                f"another server uses the data directory {root}; stop it, or name another with --data-dir"
            ) from None
        self._lock = threading.RLock()
        self._fresh: dict[bytes, bytes] = {}
        self._database = sqlite3.connect(root / "serve.sqlite", check_same_thread=False, isolation_level=None)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.executescript(_SCHEMA)
        self._leftovers()

    def close(self) -> None:
        with self._lock:
            self.write_checksums()
            self._database.close()
            os.close(self._held)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._database.execute(query, values).fetchall()

    # Versions that are being uploaded

    def add_pending(self, pending: Pending) -> None:
        with self._transaction() as database:
            database.execute(
                "INSERT INTO artifacts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    pending.id,
                    pending.name.entity,
                    pending.name.project,
                    pending.name.collection,
                    pending.type,
                    pending.digest,
                    pending.algorithm,
                    msgspec.json.encode(pending.fields).decode(),
                    pending.client,
                    pending.distributed,
                    pending.since,
                    pending.result,
                    pending.created_at,
                    time.time(),
                ),
            )
        if not pending.result:
            self.folder(pending.id).mkdir(mode=0o700, exist_ok=True)

    def pending(self, id: str) -> Pending | None:
        """What is being uploaded, or was, under that id."""
        return self._first("id = ?", (id,))

    def by_client(self, client: str) -> Pending | None:
        """What the client made that gave it this id."""
        return self._first("client = ?", (client,)) if client else None

    def open_distributed(self, name: ArtifactName, id: str) -> Pending | None:
        """The distributed version of that id that is not committed."""
        return self._first(
            "entity = ? AND project = ? AND collection = ? AND distributed = ? AND result = ''",
            (name.entity, name.project, name.collection, id),
        )

    def _first(self, where: str, values: Sequence[Any]) -> Pending | None:
        rows = self._rows(f"SELECT * FROM artifacts WHERE {where} ORDER BY touched DESC LIMIT 1", values)
        if not rows:
            return None
        id, entity, project, collection, type, digest, algorithm, fields, client, distributed, since, result, created, _ = rows[0]
        name = ArtifactName(entity, project, collection)
        decoded = msgspec.json.decode(fields, type=Fields)
        return Pending(id, name, type, digest, algorithm, decoded, client, distributed, since, result, created)

    def update_fields(self, id: str, fields: Fields) -> None:
        """Replace what was said of a version."""
        with self._transaction() as database:
            text = msgspec.json.encode(fields).decode()
            database.execute("UPDATE artifacts SET fields = ?, touched = ? WHERE id = ?", (text, time.time(), id))

    def touch(self, id: str) -> None:
        """Note that the upload goes on."""
        with self._transaction() as database:
            database.execute("UPDATE artifacts SET touched = ? WHERE id = ?", (time.time(), id))

    def settle(self, id: str, result: str) -> None:
        """Note what became of a version, and remove what was uploaded of it."""
        with self._transaction() as database:
            database.execute("UPDATE artifacts SET result = ?, touched = ? WHERE id = ?", (result, time.time(), id))
        self._drop(id)

    def discard(self, id: str) -> None:
        """Forget an upload."""
        with self._transaction() as database:
            database.execute("DELETE FROM artifacts WHERE id = ?", (id,))
        self._drop(id)

    def _drop(self, id: str) -> None:
        with self._transaction() as database:
            for table in ("manifests", "files", "multiparts"):
                database.execute(f"DELETE FROM {table} WHERE artifact = ?", (id,))
        shutil.rmtree(self.folder(id), ignore_errors=True)

    def expire(self, at: float | None = None) -> int:
        """Remove uploads that nobody goes on with, and ids that nobody needs; returns how many uploads."""
        at = time.time() if at is None else at
        rows = self._rows("SELECT id FROM artifacts WHERE result = '' AND touched < ?", (at - KEEP_PENDING,))
        for (id,) in rows:
            self.discard(id)
        with self._transaction() as database:
            database.execute("DELETE FROM artifacts WHERE result != '' AND touched < ?", (at - KEEP_RESULTS,))
        return len(rows)

    def counts(self) -> tuple[int, int]:
        """(uploads under way, bytes of them on disk)."""
        ((number,),) = self._rows("SELECT count(*) FROM artifacts WHERE result = ''")
        size = 0
        for folder, _, names in os.walk(self.root / "pending"):
            for name in names:
                with contextlib.suppress(OSError):
                    size += os.stat(os.path.join(folder, name)).st_size
        return number, size

    def _leftovers(self) -> None:
        """Remove the directories of uploads that a killed process had half removed, and what it was writing."""
        known = {id for (id,) in self._rows("SELECT id FROM artifacts WHERE result = ''")}
        for path in (self.root / "pending").iterdir():
            if path.name not in known:
                shutil.rmtree(path, ignore_errors=True)
            else:
                for unfinished in path.glob("*.tmp"):
                    unfinished.unlink(missing_ok=True)

    # Their manifests and files

    def add_manifest(self, manifest: Manifest) -> None:
        with self._transaction() as database:
            database.execute("INSERT INTO manifests VALUES (?, ?, ?, ?, ?, ?, ?)", (*manifest, time.time_ns()))

    def manifest(self, id: str) -> Manifest | None:
        rows = self._rows("SELECT id, artifact, kind, name, digest, base FROM manifests WHERE id = ?", (id,))
        return Manifest(*rows[0]) if rows else None

    def manifests(self, artifact: str) -> list[Manifest]:
        """The manifests of a version in the order in which they were made."""
        rows = self._rows(
            "SELECT id, artifact, kind, name, digest, base FROM manifests WHERE artifact = ? ORDER BY made, rowid", (artifact,)
        )
        return [Manifest(*row) for row in rows]

    def update_manifest(self, id: str, digest: str, base: str) -> None:
        with self._transaction() as database:
            database.execute("UPDATE manifests SET digest = ?, base = ? WHERE id = ?", (digest, base, id))

    def add_files(self, artifact: str, files: Iterable[Uploaded]) -> list[Uploaded]:
        """Note what entries are to be made of; returns what is noted, in order: the first word counts for each entry."""
        noted = []
        with self._transaction() as database:
            for file in files:
                database.execute("INSERT OR IGNORE INTO files VALUES (?, ?, ?, ?, ?, ?)", (artifact, *file))
                (row,) = database.execute(
                    f"SELECT {_FILE_COLUMNS} FROM files WHERE artifact = ? AND name = ? AND md5 = ? AND digest = ?",
                    (artifact, file.name, file.md5, file.digest),
                ).fetchall()
                noted.append(Uploaded(*row))
        return noted

    def files_of(self, artifact: str, name: str) -> list[Uploaded]:
        """What is noted for the entries of that name."""
        rows = self._rows(f"SELECT {_FILE_COLUMNS} FROM files WHERE artifact = ? AND name = ?", (artifact, name))
        return [Uploaded(*row) for row in rows]

    def file_of(self, artifact: str, object: str) -> Uploaded:
        """The entry that an object is for. NotFoundError."""
        rows = self._rows(f"SELECT {_FILE_COLUMNS} FROM files WHERE artifact = ? AND object = ?", (artifact, object))
        if not rows:
            raise NotFoundError("there is no such upload")
        return Uploaded(*rows[0])

    def folder(self, artifact: str) -> Path:
        """Where the bytes of an upload are."""
        return self.root / "pending" / artifact

    def object_path(self, artifact: str, object: str) -> Path:
        """Where an uploaded object is, once it is complete."""
        return self.folder(artifact) / object

    # Uploads in parts

    def add_multipart(self, upload: Multipart) -> None:
        parts = json.dumps({str(number): md5 for number, md5 in upload.parts.items()})
        with self._transaction() as database:
            database.execute("INSERT INTO multiparts VALUES (?, ?, ?, ?)", (upload.id, upload.artifact, upload.object, parts))

    def multipart(self, id: str) -> Multipart | None:
        rows = self._rows("SELECT id, artifact, object, parts FROM multiparts WHERE id = ?", (id,))
        if not rows:
            return None
        key, artifact, object, parts = rows[0]
        return Multipart(key, artifact, object, {int(number): md5 for number, md5 in json.loads(parts).items()})

    # What can be worked out again

    def know(self, collection: str, number: int, contents: Iterable[tuple[bytes, str]]) -> None:
        """Note the paths of a version by the MD5 of what they hold."""
        with self._transaction() as database:
            database.executemany(
                "INSERT OR REPLACE INTO known VALUES (?, ?, ?, ?)", ((collection, md5, number, path) for md5, path in contents)
            )

    def known(self, collection: str, md5: bytes) -> tuple[int, str] | None:
        """(number of a version, path) where a content of this MD5 was seen last."""
        rows = self._rows("SELECT number, path FROM known WHERE collection = ? AND md5 = ?", (collection, md5))
        return rows[0] if rows else None

    def knowing(self, entity: str, md5: bytes) -> list[tuple[str, int]]:
        """(collection, number) of the entity's versions where a content of this MD5 was seen."""
        low = f"{entity}/"
        return self._rows(
            "SELECT collection, number FROM known WHERE collection >= ? AND collection < ? AND md5 = ?", (low, f"{entity}0", md5)
        )

    def checksum(self, content: bytes) -> bytes | None:
        """The MD5 of a stored content."""
        fresh = self._fresh.get(content)
        if fresh is not None:
            return fresh
        rows = self._rows("SELECT md5 FROM checksums WHERE content = ?", (content,))
        return rows[0][0] if rows else None

    def add_checksum(self, content: bytes, md5: bytes) -> None:
        """Note the MD5 of a content. It is written with others: a killed process loses some, which are worked out again."""
        with self._lock:
            self._fresh[content] = md5
            if len(self._fresh) >= _CHECKSUMS:
                self.write_checksums()

    def write_checksums(self) -> None:
        """Write the MD5s that were noted since the last time."""
        with self._lock:
            with self._transaction() as database:
                database.executemany("INSERT OR IGNORE INTO checksums VALUES (?, ?)", list(self._fresh.items()))
            self._fresh.clear()

    # Projects and runs: what a store has no place for

    def projects(self, entity: str) -> list[str]:
        """The projects that were made here, sorted."""
        return [name for (name,) in self._rows("SELECT name FROM projects WHERE entity = ? ORDER BY name", (entity,))]

    def has_project(self, entity: str, name: str) -> bool:
        return bool(self._rows("SELECT 1 FROM projects WHERE entity = ? AND name = ?", (entity, name)))

    def project(self, entity: str, name: str) -> dict[str, Any]:
        """What is kept of a project: description, access, created_at; empty if nothing is."""
        rows = self._rows("SELECT fields FROM projects WHERE entity = ? AND name = ?", (entity, name))
        return dict(json.loads(rows[0][0])) if rows else {}

    def save_project(self, entity: str, name: str, **fields: Any) -> bool:
        """Make a project, or change what is kept of it (None stays as it is); whether it is new here."""
        with self._transaction() as database:
            new = not self.has_project(entity, name)
            merged = {**self.project(entity, name), **{key: value for key, value in fields.items() if value is not None}}
            database.execute("INSERT OR REPLACE INTO projects VALUES (?, ?, ?)", (entity, name, json.dumps(merged)))
        return new

    def delete_project(self, entity: str, name: str) -> None:
        with self._transaction() as database:
            database.execute("DELETE FROM projects WHERE entity = ? AND name = ?", (entity, name))

    def run(self, path: str) -> tuple[str, str, dict[str, Any]]:
        """(state, summary as JSON, other fields) of a run."""
        rows = self._rows("SELECT state, summary, fields FROM runs WHERE path = ?", (path,))
        return (rows[0][0], rows[0][1], json.loads(rows[0][2])) if rows else ("finished", "{}", {})

    def save_run(self, path: str, state: str | None = None, summary: str | None = None, **fields: Any) -> None:
        """Change what is kept of a run; None stays as it is."""
        with self._transaction() as database:
            old_state, old_summary, old = self.run(path)
            merged = {**old, **{key: value for key, value in fields.items() if value is not None}}
            database.execute(
                "INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?)",
                (path, state or old_state, old_summary if summary is None else summary, json.dumps(merged)),
            )

    def run_object(self, run: str, name: str) -> Path:
        """Where a file of a run is, or is to be, kept."""
        with self._transaction() as database:
            database.execute("INSERT OR IGNORE INTO run_files VALUES (?, ?, ?)", (run, name, secrets.token_hex(16)))
        return self.run_files(run, name)[name]

    def run_files(self, run: str, name: str | None = None) -> dict[str, Path]:
        """The files of a run by name, whether they have arrived or not."""
        where, values = ("AND name = ?", (run, name)) if name is not None else ("", (run,))
        rows = self._rows(f"SELECT name, object FROM run_files WHERE run = ? {where} ORDER BY name", values)
        return {found: self.root / "runs" / object[:2] / object for found, object in rows}


def need_pending(state: State, id: str) -> Pending:
    """The upload of that id, if it is not over. NotFoundError, ConflictError."""
    found = state.pending(id)
    if found is None:
        raise NotFoundError("there is no artifact of that id that is being uploaded; log it again")
    if found.result:
        raise ConflictError(f"the artifact is committed already, as {found.result}")
    return found
