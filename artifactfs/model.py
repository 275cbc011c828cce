"""What a store holds, as values: entries, directories, versions, collections, runs. No I/O.

Entries are msgspec structs because a page of thousands of them is decoded in one call; their field order is the stored
form of a page (``docs/format.md``). ``Version``, ``Collection``, ``Run``, ``EntitySettings`` and ``Distributed`` are stored as
JSON objects with these keys; unknown keys are ignored when reading and kept when writing, and a missing one takes its default.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import msgspec
from blake3 import blake3

BLOCK = 1 << 20
"""Bytes in a block: the unit of fetching, caching and checking (design, section 1)."""

BLAKE3 = "BLAKE3"
MD5 = "MD5"
XXH128 = "XXH128"
ALGORITHMS = (BLAKE3, MD5, XXH128)

OBJECT_BLOB = b"b"
OBJECT_PACK = b"p"

# What a stored number or id may be; the decoder refuses anything else.
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Digest: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


class Extent(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """``length`` bytes at ``offset`` of a stored object. ``object`` is a kind byte (``b`` blob, ``p`` pack) and an id."""

    object: bytes
    offset: Count
    length: Count


class File(msgspec.Struct, frozen=True, array_like=True, tag=0, gc=False):
    """Stored content. ``id`` is its content id (32 bytes); ``extents`` hold its bytes in order (none for an empty file).

    ``blocks`` locates the list of block digests of a content larger than one block, else None. ``algorithm`` and
    ``checksum`` are set when the user-visible digest is not BLAKE3: then ``checksum`` is base64 of MD5 or XXH128. A content in
    more than one extent has them in a list of its own, which ``table`` locates, so that an entry's size is bounded. Every extent
    but the last is a whole number of blocks.
    """

    name: str
    size: Count
    executable: bool
    id: Digest
    extents: tuple[Extent, ...] = ()
    blocks: Extent | None = None
    algorithm: str = BLAKE3
    checksum: str = ""
    table: Extent | None = None

    @property
    def digest(self) -> str:
        """The checksum users see, base64."""
        return self.checksum or base64.b64encode(self.id).decode()


class Remote(File, frozen=True, array_like=True, tag=4, gc=False):
    """Stored content of an artifact server, which knows it by MD5, XXH128 or, if artifactfs logged it, BLAKE3.

    ``id`` is made of the server's URL and that checksum (:func:`remote_id`), so it is no content id: nothing can be compared with
    it. ``checksum`` "" is a content of which the server tells no checksum: it is only pinned. ``locator`` says to the store where
    it is. ``etag`` and ``modified`` are what a process saw of it when it first asked, and pin it from then on; never in a page.
    """

    locator: str = ""
    etag: str = ""
    modified: str = ""

    @property
    def digest(self) -> str:
        """The checksum users see, base64; "" where the server tells none."""
        return self.checksum


class Page(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where a page of entries lies, and its id: the BLAKE3 of its bytes."""

    id: Digest
    extent: Extent


class Dir(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """A directory. ``digest`` is over what its entries are; ``page`` is its root page, None when it is empty.

    ``count`` is the number of its own entries; ``size`` and ``files`` are the totals of everything below it (files and
    references, as W&B counts), ``links`` the number of references below it.
    """

    name: str
    digest: Digest
    page: Page | None
    count: Count
    size: Count
    files: Count
    links: Count


class Symlink(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    """A symbolic link; ``target`` as ``readlink`` gives it, never followed by artifactfs itself."""

    name: str
    target: str


class Ref(msgspec.Struct, frozen=True, array_like=True, tag=3, gc=False):
    """A reference to an outside URI. ``digest`` is an ETag, a checksum or the URI itself, as ``artifact-model`` says.

    ``extra`` holds ``etag`` and ``versionID`` as W&B does. ``id`` and ``blocks`` are set where the content was read when
    it was added (``file://``), so that every block can be checked; else ``b""`` and None. ``size`` -1 is unknown.
    """

    name: str
    uri: str
    digest: str
    size: Annotated[int, msgspec.Meta(ge=-1, le=(1 << 63) - 1)]
    executable: bool = False
    extra: dict[str, str | int] = {}
    id: bytes = b""
    blocks: Extent | None = None
    algorithm: str = MD5


Entry: TypeAlias = File | Dir | Symlink | Ref | Remote

MAX_TTL = 1 << 47
"""Seconds; more than Python's longest timedelta."""


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """One version of a collection, as ``versions/<number>.json`` holds it.

    ``root`` is its tree. ``commit`` is the id of the attempt that made it, so that a repeated attempt recognises its own.
    Only ``state``, ``description``, ``metadata``, ``tags``, ``ttl``, ``ttl_inherited``, ``updated_at`` and ``deleted_at`` ever
    change, and ``type`` with its collection's. Times are ISO 8601 UTC with microseconds and a ``Z``; ``ttl`` is seconds, None for
    none, or with ``ttl_inherited`` for what the entity's settings say at the time. ``semver`` is
    the semantic version it was given, "" for none.
    """

    entity: str
    project: str
    collection: str
    number: Count
    type: str
    digest: str
    algorithm: str = BLAKE3
    root: Dir
    size: Count
    file_count: Count
    state: Literal["COMMITTED", "DELETED"] = "COMMITTED"
    description: str | None = None
    metadata: dict[str, Any] = {}
    tags: list[str] = []
    ttl: Annotated[int, msgspec.Meta(ge=0, le=MAX_TTL)] | None = None
    ttl_inherited: bool = False
    run: str = ""
    commit: str
    base: int | None = None
    created_at: str
    updated_at: str
    deleted_at: str = ""
    semver: str = ""

    @property
    def name(self) -> str:
        """``v12``."""
        return f"v{self.number}"

    @property
    def qualified_name(self) -> str:
        """``entity/project/collection:v12``."""
        return f"{self.entity}/{self.project}/{self.collection}:{self.name}"

    @property
    def origin(self) -> Version:
        """The version that was logged: itself, or for a link the one that it leads to."""
        return self


class LinkedVersion(Version, frozen=True, kw_only=True):
    """A version as a member of a portfolio: ``entity``, ``project``, ``collection`` and ``number`` are of that, all else is of
    ``source``. It is made when it is read and never stored."""

    source: Version
    linked_at: str

    @property
    def origin(self) -> Version:
        return self.source


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A member of a portfolio. ``source`` is the qualified name of a version that was logged; ``run`` the run that linked it."""

    source: str
    linked_at: str
    run: str = ""


class Collection(msgspec.Struct, frozen=True, kw_only=True):
    """One collection, as ``collection.json`` holds it; ``aliases`` maps each alias to a version number, ``semver`` each semantic
    version.

    A portfolio has no versions of its own, but ``links`` by number; ``next_link`` is the number that the next one gets. A deleted
    collection's record stays, so that its numbers are not used again.
    """

    entity: str
    project: str
    name: str
    type: str
    description: str | None = None
    tags: list[str] = []
    aliases: dict[str, Count] = {}
    semver: dict[str, Count] = {}
    kind: Literal["SEQUENCE", "PORTFOLIO"] = "SEQUENCE"
    state: Literal["READY", "DELETED"] = "READY"
    links: dict[Count, Link] = {}
    next_link: Count = 0
    created_at: str
    updated_at: str

    @property
    def path(self) -> str:
        """``entity/project/name``."""
        return f"{self.entity}/{self.project}/{self.name}"

    @property
    def is_portfolio(self) -> bool:
        """Whether it holds links instead of versions."""
        return self.kind == "PORTFOLIO"


class EntitySettings(msgspec.Struct, frozen=True, kw_only=True):
    """What is set for an entity, as ``entities/<entity>.json`` holds it: the seconds after which versions that inherit their TTL
    expire (None: never), and the entity that holds its registries ("": itself)."""

    entity: str
    default_ttl: Annotated[int, msgspec.Meta(gt=0, le=MAX_TTL)] | None = None
    organization: str = ""
    created_at: str
    updated_at: str


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What one process added to a distributed version: a stored tree, and what it said of the version. ``commit`` is its id."""

    commit: str
    root: Dir
    description: str | None = None
    metadata: dict[str, Any] = {}
    tags: list[str] = []
    aliases: list[str] = []
    ttl: Annotated[int, msgspec.Meta(ge=0, le=MAX_TTL)] | None = None
    ttl_inherited: bool = True
    run: str = ""
    added_at: str


class Closing(msgspec.Struct, frozen=True, kw_only=True):
    """Parts that are being joined into the version whose commit is ``commit``; its number is higher than ``after``.
    ``incremental``: it is laid over the newest version."""

    commit: str
    parts: list[Part]
    after: int = -1
    incremental: bool = False
    run: str = ""


class Distributed(msgspec.Struct, frozen=True, kw_only=True):
    """A version that many processes add to, as ``distributed/<id>.json`` holds it. ``parts`` are those of the version that is
    open; ``closing`` is one that a process is finishing, or died over. ``last`` is the newest version that came of it."""

    id: str
    type: str
    algorithm: str = BLAKE3
    parts: list[Part] = []
    closing: Closing | None = None
    last: str = ""
    created_at: str
    updated_at: str


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One run, as ``runs/<entity>/<project>/<id>.json`` holds it. ``used`` and ``logged`` are qualified names."""

    entity: str
    project: str
    id: str
    name: str = ""
    job_type: str = ""
    group: str = ""
    config: dict[str, Any] = {}
    used: list[str] = []
    logged: list[str] = []
    created_at: str
    updated_at: str

    @property
    def path(self) -> str:
        """``entity/project/id``."""
        return f"{self.entity}/{self.project}/{self.id}"


def is_executable(mode: int) -> bool:
    """Whether a stored file of this ``st_mode`` keeps an executable bit: the owner's, as git decides it."""
    return bool(mode & 0o100)


def named(entry: Entry, name: str) -> Entry:
    """``entry`` under another name."""
    return entry if entry.name == name else msgspec.structs.replace(entry, name=name)


def block_count(size: int) -> int:
    """The number of blocks of ``size`` bytes."""
    return -(-size // BLOCK)


_REMOTE_CONTEXT = "artifactfs 2026-11 remote content v1"  # no content's id can equal a key that was derived with it
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*):")


def scheme_of(uri: str) -> str:
    """The URI's scheme in lower case, "" if it has none."""
    match = _SCHEME.match(uri)
    return match[1].lower() if match else ""


def reference_key(ref: Ref) -> bytes:
    """What identifies the pinned bytes of a reference besides its content: URI, digest, version id and ETag."""
    pinned: Mapping[str, str | int] = ref.extra
    return msgspec.msgpack.encode((ref.uri, ref.digest, sorted(pinned.items())))


def remote_id(url: str, algorithm: str, checksum: str, size: int, locator: str = "") -> bytes:
    """What stands for the content of a server's file: the same for all that have its checksum, or without one its locator."""
    where = "" if checksum else locator
    return blake3(msgspec.msgpack.encode((url, algorithm, checksum, size, where)), derive_key_context=_REMOTE_CONTEXT).digest()


def remote_key(entry: Remote) -> bytes:
    """What identifies the bytes of ``entry`` in a cache: those of one pin are not mixed with those of another."""
    if not (entry.etag or entry.modified):
        return entry.id
    pinned = msgspec.msgpack.encode((entry.id, entry.etag, entry.modified))
    return blake3(pinned, derive_key_context=_REMOTE_CONTEXT).digest()


class Attributes(NamedTuple):
    """What ``stat`` shows of a node of a file tree. ``mode`` includes the file type; times are ns since the epoch. ``device`` is
    the number of the device that a device node stands for."""

    mode: int
    ino: int
    nlink: int
    uid: int
    gid: int
    size: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    device: int = 0


class Lying(NamedTuple):
    """Where bytes lie in a local file: ``length`` of them at ``offset`` of the descriptor ``fd``, which is open as long as
    ``holder`` is held."""

    fd: int
    offset: int
    length: int
    holder: object


class Space(NamedTuple):
    """What ``statfs`` shows of a file tree: bytes and files, in total and free."""

    total: int
    free: int
    files: int
    files_free: int
