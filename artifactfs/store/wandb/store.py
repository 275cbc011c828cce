"""A W&B server as a store: its catalog, its versions, its files.

What the server says is taken as it comes and turned into ``model`` values here; where it says nothing, or something that cannot
be, a listing passes over it with a warning and a look-up is an IntegrityError. A version's ``commit`` is its id on the server.
Nothing is remembered of the catalog but who the caller is and where versions are (their files are asked for by that), and, for a
time without connection, the versions that were looked up by name.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

import msgspec
from cachetools import LRUCache, TTLCache

from artifactfs import http
from artifactfs.cache import BlockCache
from artifactfs.errors import (
    ArtifactFSError,
    CommError,
    ConflictError,
    IntegrityError,
    NetworkError,
    NotFoundError,
    NotPermittedError,
    OfflineError,
    UsageError,
)
from artifactfs.forking import new_lock
from artifactfs.model import (
    MD5,
    XXH128,
    Collection,
    Dir,
    EntitySettings,
    Entry,
    File,
    Link,
    LinkedVersion,
    Ref,
    Remote,
    Run,
    Version,
    scheme_of,
)
from artifactfs.names import LATEST, ArtifactName, check_collection, check_entity, check_project, version_number
from artifactfs.references import Source
from artifactfs.semver import is_semver
from artifactfs.store.drafts import Draft, Published
from artifactfs.store.kept import Listed
from artifactfs.store.server import ArtifactServer
from artifactfs.store.upload import Report
from artifactfs.store.wandb import manifest, queries, saving
from artifactfs.store.wandb.answers import count, json_object, moment, whole
from artifactfs.store.wandb.client import Client, Node, dig, store_url
from artifactfs.store.wandb.files import FileUrls, Home, WandbSource
from artifactfs.store.wandb.runs import Runs, made_by

_REMEMBERED = 60.0  # seconds for which who the caller is, and which organisation an entity is of, is not asked again
_HOMES = 4096
_TAGS = 20  # of a collection that one request may change
_INHERIT, _NEVER = -1, -2  # ttlDurationSeconds that are no seconds

log = logging.getLogger(__name__)


class WandbStore(ArtifactServer):
    """See the module."""

    files_only = True
    expires = True
    moves_latest = True

    def __init__(self, client: Client, cache: BlockCache | None, offline: bool) -> None:
        super().__init__(store_url(client.base), cache, offline)
        self.client = client
        self._urls = FileUrls(client, self)
        self._lock = new_lock()
        self._homes: LRUCache[str, Home] = LRUCache(_HOMES)
        self._digests: LRUCache[str, str] = LRUCache(_HOMES)
        self._answers: TTLCache[str, Any] = TTLCache(256, _REMEMBERED)
        self._runs = Runs(self)

    # The catalog

    def default_entity(self) -> str:
        return str(dig(self._viewer(), "entity") or "") if not self.offline else ""

    def entities(self) -> list[str]:
        viewer = self._viewer()
        teams = (dig(edge, "node", "name") for edge in dig(viewer, "teams", "edges") or ())
        names = {viewer.get("entity"), viewer.get("username"), *teams}
        return _named(names, check_entity)

    def projects(self, entity: str) -> list[str]:
        edges = self.ask_pages(queries.PROJECTS, lambda data: dig(data, "models"), entity=entity)
        return _named({dig(edge, "node", "name") for edge in edges}, check_project)

    def collections(self, entity: str, project: str) -> list[Collection]:
        return sorted(self._collections(entity, project), key=lambda collection: collection.name)

    def _collections(self, entity: str, project: str) -> Iterator[Collection]:
        where = {"entity": entity, "project": project}
        types = self.ask_pages(queries.TYPES, lambda data: dig(data, "project", "artifactTypes"), **where)
        for kind in [str(dig(edge, "node", "name")) for edge in types if dig(edge, "node", "name")]:
            edges = self.ask_pages(
                queries.COLLECTIONS, lambda data: dig(data, "project", "artifactType", "artifactCollections"), **where, type=kind
            )
            for edge in edges:
                name = dig(edge, "node", "name")
                if _named({name}, check_collection):
                    yield _collection(edge["node"], ArtifactName(entity, project, name), kind)

    def collection(self, name: ArtifactName) -> Collection:
        node, kind = self._find_collection(name)
        return self._with_aliases(_collection(node, name, kind), kind)

    def _with_aliases(self, collection: Collection, kind: str) -> Collection:
        name = ArtifactName(collection.entity, collection.project, collection.name)
        aliases: dict[str, int] = {}
        links: dict[int, Link] = {}
        for number, node in self._members(name, kind):
            aliases.update(dict.fromkeys(_aliases_in(node, name), number))
            if collection.is_portfolio:
                with contextlib.suppress(IntegrityError):
                    version = self._version(node, name, number, "")
                    links[number] = Link(source=version.origin.qualified_name, linked_at=moment(node.get("createdAt")))
        return msgspec.structs.replace(collection, aliases=aliases, links=links, next_link=max(links, default=-1) + 1)

    def _find_collection(self, name: ArtifactName) -> tuple[Node, str]:
        """What the server says of a collection, and its type. NotFoundError."""
        kind = self.type_of(name)
        if kind is not None:
            where = {"entity": name.entity, "project": name.project, "type": kind, "name": name.collection}
            node = dig(self.ask(queries.COLLECTION, **where), "project", "artifactType", "artifactCollection")
            if isinstance(node, dict) and node.get("state") != "DELETED":
                return node, kind
        raise NotFoundError(f"collection {name.path} does not exist in {self.url}")

    def type_of(self, name: ArtifactName, logged: bool = False) -> str | None:
        """The type of a collection: its newest version's, or by search, as a collection may have no version. None for none.
        ``logged``: UsageError for one that is a portfolio."""
        membership = self._membership(name, LATEST)
        kind, home = dig(membership, "artifact", "artifactType", "name"), dig(membership, "artifactCollection", "__typename")
        if not kind or not home:
            found = (known for known in self._collections(name.entity, name.project) if known.name == name.collection)
            known = next(found, None)
            if known is None:
                return str(kind) if kind else None
            kind, home = kind or known.type, "ArtifactPortfolio" if known.is_portfolio else ""
        if logged and home == "ArtifactPortfolio":
            raise UsageError(f"{name.path} is a portfolio of links, nothing is logged to it; log elsewhere and link that")
        return str(kind)

    def _membership(self, name: ArtifactName, alias: str) -> Node | None:
        where = {"entity": name.entity, "project": name.project, "name": f"{name.collection}:{alias}"}
        try:
            data = self.ask(queries.MEMBERSHIP, **where)
        except NotFoundError:
            return None
        found = dig(data, "project", "artifactCollectionMembership")
        return found if isinstance(found, dict) and isinstance(found.get("artifact"), dict) else None

    def _members(self, name: ArtifactName, kind: str) -> list[tuple[int, Node]]:
        """(number there, version) of what is in a collection, in order of number."""
        edges = self.ask_pages(
            queries.VERSIONS,
            lambda data: dig(data, "project", "artifactType", "artifactCollection", "artifacts"),
            entity=name.entity,
            project=name.project,
            type=kind,
            collection=name.collection,
            filters='{"state":"COMMITTED"}',
            order=None,
        )
        found: dict[int, Node] = {}
        for edge in edges:
            node = edge.get("node")
            number = version_number(str(edge.get("version"))) if edge.get("version") else dig(node, "versionIndex")
            number = whole(number)
            if isinstance(node, dict) and number is not None and node.get("state") in (None, "COMMITTED"):
                found[number] = node
        return sorted(found.items())

    def versions(self, name: ArtifactName, deleted: bool = False) -> list[Version]:
        kind = self.type_of(name)
        if kind is None:
            raise NotFoundError(f"collection {name.path} does not exist in {self.url}")
        found = []
        for number, node in self._members(name, kind):
            try:
                found.append(self._version(node, name, number, ""))
            except IntegrityError as error:
                log.warning("not listed: %s", error)
        return found

    def version(self, name: ArtifactName) -> Version:
        alias = name.alias or LATEST
        key = f"version {name.path}:{alias}"
        if self.offline:
            data = self.records.get(key) if self.records is not None else None
            if data is None:
                raise OfflineError(f"{name.path}:{alias} is not in the cache, and offline nothing is asked of {self.url}")
            membership = msgspec.json.decode(data)
        else:
            membership = self._membership(name, alias)
            if membership is None:
                raise self._missing(name, alias)
            if self.records is not None:
                self.records.put(key, msgspec.json.encode(membership))
        node = membership["artifact"]
        if node.get("state") not in (None, "COMMITTED"):
            raise NotFoundError(f"{name.path}:{alias} is {str(node.get('state')).lower()} in {self.url}")
        return self._version(node, name, membership.get("versionIndex"), str(membership.get("createdAt") or ""))

    def _missing(self, name: ArtifactName, alias: str) -> NotFoundError:
        try:
            known = self.collection(name)
        except NotFoundError as error:
            return error
        if version_number(alias) is not None:
            return NotFoundError(f"{name.path} has no version {alias} in {self.url}")
        shown = ", ".join(sorted(known.aliases)) or "none"
        return NotFoundError(f"{name.path} has no alias {alias!r}; its aliases are: {shown}")

    def newest(self, name: ArtifactName, without: int | None = None) -> Version | None:
        try:
            found = [version for version in self.versions(name) if version.number != without]
        except NotFoundError:
            return None
        return found[-1] if found else None

    def numbers(self, name: ArtifactName) -> list[int]:
        try:
            return [version.number for version in self.versions(name)]
        except NotFoundError:
            return []

    def _version(self, node: Node, name: ArtifactName, number: object, linked_at: str) -> Version:
        """A version as a member of ``name``. IntegrityError for an answer that cannot be right."""
        sequence, index, id = node.get("artifactSequence"), whole(node.get("versionIndex")), node.get("id")
        id = str(id) if isinstance(id, int) else id
        source = ArtifactName(
            str(dig(sequence, "project", "entity", "name") or name.entity),
            str(dig(sequence, "project", "name") or name.project),
            str(dig(sequence, "name") or name.collection),
        )
        number = index if whole(number) is None else whole(number)
        index = number if index is None else index
        if (
            not isinstance(id, str)
            or not id
            or not isinstance(number, int)
            or not isinstance(index, int)
            or min(number, index) < 0
        ):
            raise IntegrityError(f"{self.url} says of {name.path} what no version can be: id {id!r}, number {number!r}")
        size, files = count(node.get("size")), whole(node.get("fileCount"))
        root = self.trees.lazy(id, size, max(files or 0, 0))
        with self._lock:
            # As it was looked up, not where it was logged: who may read a portfolio may have no right to the project behind it.
            self._digests[id] = str(node.get("digest") or "")
            self._homes[id] = Home(name.entity, name.project, name.collection, f"v{number}")
        seconds = whole(node.get("ttlDurationSeconds"))
        fields: dict[str, Any] = {
            "type": str(dig(node, "artifactType", "name") or "unspecified"),
            "digest": str(node.get("digest") or ""),
            "algorithm": MD5,
            "root": root,
            "size": size,
            "file_count": count(files),
            "description": str(node.get("description") or "") or None,  # W&B cannot take one away, only empty it
            "metadata": json_object(node.get("metadata")),
            "tags": [str(tag["name"]) for tag in node.get("tags") or () if dig(tag, "name")],
            "ttl": seconds if seconds is not None and seconds > 0 else None,
            "ttl_inherited": bool(node.get("ttlIsInherited")) or seconds == _INHERIT,
            "run": made_by(node.get("createdBy"), source),
            "commit": id,
            "created_at": moment(node.get("createdAt")),
            "updated_at": moment(node.get("updatedAt") or node.get("createdAt")),
        }
        made = Version(entity=source.entity, project=source.project, collection=source.collection, number=index, **fields)
        if source.path == name.path:
            return made
        own: dict[str, Any] = {"entity": name.entity, "project": name.project, "collection": name.collection, "number": number}
        return LinkedVersion(**own, **fields, source=made, linked_at=moment(linked_at or node.get("createdAt")))

    # Reading

    def list_files(self, identity: str) -> Listed:
        self.check_online(f"the list of files of version {identity}")
        with manifest.new_file() as file:
            self._fetch_manifest(identity, file)
            yield from manifest.read(file, self.url, identity, f"version {identity}")

    def check_list(self, identity: str, root: Dir) -> None:
        """Say so if a version's files are not those of its digest. That alone is no proof of damage: a version that was logged in
        parts has the digest of one of them. Each file has a checksum of its own."""
        with self._lock:
            digest = self._digests.get(identity, "")
        if digest and all(self.tree.digest(root, algorithm) != digest for algorithm in (MD5, XXH128)):
            log.warning(
                "version %s of %s has a list of files that its digest (%s) is not of; it was logged in parts, or changed since",
                identity,
                self.url,
                digest[:40],
            )

    def _fetch_manifest(self, identity: str, file: IO[bytes]) -> None:
        failed: ArtifactFSError | None = None
        for _ in range(2):  # the URL may have ended before it was used
            found = dig(self.ask(queries.MANIFEST, id=identity), "artifact")
            if not isinstance(found, dict):
                raise NotFoundError(f"version {identity} is not in {self.url}, or you have no right to it")
            url = dig(found, "currentManifest", "file", "directUrl")
            if not isinstance(url, str) or not url:
                raise IntegrityError(f"{self.url} has no manifest of version {identity}; is it still being logged?")
            url = urllib.parse.urljoin(self.client.base + "/", url)
            for headers in self.client.ways(url):
                try:
                    http.fetch_into(file, url, self.client.deadline, headers)
                    return
                except (NotPermittedError, NotFoundError, http.StatusError) as error:
                    failed = error
        if isinstance(failed, NotFoundError):
            raise IntegrityError(f"the manifest of version {identity} is lost: {self.url} names it, but does not have it")
        assert failed is not None
        raise failed

    def source(self, file: File) -> Source:
        if not isinstance(file, Remote):
            raise IntegrityError(f"{file.name} is not of {self.url}; the version is damaged")
        return WandbSource(self.client, self._urls, file, self.client.deadline)

    def pin(self, file: Remote, deadline: float) -> Remote:
        return WandbSource(self.client, self._urls, file, deadline).probe()

    def referenced(self, ref: Ref) -> File | Ref:
        """What ``wandb-artifact://<hex of an id>/<path>`` leads to."""
        seen: set[str] = set()
        while scheme_of(ref.uri) == manifest.ARTIFACT_SCHEME:
            if ref.uri in seen or len(seen) > 16:
                raise IntegrityError(f"reference {ref.uri[:200]!r} leads back to itself")
            seen.add(ref.uri)
            entry = self._target(ref)
            if not isinstance(entry, Ref):
                if entry.digest != ref.digest:
                    raise IntegrityError(f"reference {ref.uri[:200]!r} leads to {entry.digest}, and was recorded as {ref.digest}")
                return entry
            ref = entry
        return ref

    def _target(self, ref: Ref) -> File | Ref:
        host, _, path = ref.uri.partition("://")[2].partition("/")
        try:
            identity = base64.b64encode(bytes.fromhex(host)).decode()
        except ValueError:
            raise IntegrityError(f"reference {ref.uri[:200]!r} names no version") from None
        entry: Entry | None = self.tree.resolve(self.trees.root(identity), path)
        if not isinstance(entry, (File, Ref)):
            raise NotFoundError(f"reference {ref.uri[:200]!r} leads to no file of {self.url}")
        return entry

    def home(self, artifact: str, anew: bool = False) -> Home:
        """Where a version is: as it was looked up, or where it was logged. NotFoundError."""
        with self._lock:
            known = None if anew else self._homes.get(artifact)
        if known is None:
            node = dig(self.ask(queries.ARTIFACT, id=artifact), "artifact")
            if not isinstance(node, dict):
                raise NotFoundError(f"version {artifact} is not in {self.url} any more")
            sequence, index = node.get("artifactSequence"), whole(node.get("versionIndex"))
            names = [dig(sequence, "project", "entity", "name"), dig(sequence, "project", "name"), dig(sequence, "name")]
            if index is None or not all(isinstance(part, str) for part in names):
                raise IntegrityError(f"{self.url} does not say where version {artifact} is")
            known = Home(names[0], names[1], names[2], f"v{index}")
            with self._lock:
                self._homes[artifact] = known
        return known

    def file_count(self, artifact: str) -> int:
        """The number of files of a version whose list is kept."""
        return self.trees.root(artifact).files

    def following(self, artifact: str, path: str) -> Iterator[str]:
        """The paths of the stored files behind ``path`` in a version whose list is kept, in order."""
        return (other for other, entry in self.tree.walk_after(self.trees.root(artifact), path) if isinstance(entry, Remote))

    # Making versions

    def save(self, draft: Draft, report: Report | None) -> Published:
        self.check_online("a commit")
        if draft.semver:
            raise UsageError(f"{self.url} is a W&B server, which has no semantic versions; use an alias")
        return saving.save(self, draft, report)

    def root_of(self, version: Version) -> Dir:
        return self.trees.root(version.origin.commit)

    def identity(self, version: Version) -> str:
        return f"{self.url}/{version.origin.commit}"  # servers number their versions, each by itself

    def made_by(self, name: ArtifactName, commits: Iterable[str]) -> dict[str, Version]:
        self.check_online("a look for copies")
        found = {commit: saving.made_by(self, name, commit) for commit in commits}
        return {commit: it for commit, it in found.items() if it is not None}

    def add_part(self, id: str, draft: Draft) -> None:
        self.check_online("a part of a version")
        saving.add_part(self, id, draft)

    def finish(self, id: str, draft: Draft) -> Version:
        self.check_online("a commit")
        return saving.finish(self, id, draft)

    # Changes

    def update_collection(self, name: ArtifactName, change: Callable[[Collection], Collection]) -> Collection:
        """As the protocol says, but that W&B has no conditions: what two change at once, the later one decides."""
        node, kind = self._find_collection(name)
        known = self._with_aliases(_collection(node, name, kind), kind)
        changed = change(known)
        for alias in changed.aliases.keys() - known.aliases.keys():
            if is_semver(alias) and changed.semver != known.semver:
                self.cannot("keep semantic versions; use an alias")
        moved = {alias: number for alias, number in changed.aliases.items() if known.aliases.get(alias) != number}
        gone = {alias: number for alias, number in known.aliases.items() if alias not in changed.aliases}
        for number in sorted(set(moved.values())):
            self._change_aliases(queries.ADD_ALIASES, name, number, [alias for alias in moved if moved[alias] == number])
        for number in sorted(set(gone.values())):
            self._change_aliases(queries.DELETE_ALIASES, name, number, [alias for alias in gone if gone[alias] == number])
        self._change_tags(name, known.tags, changed.tags)
        if (changed.description, changed.name) != (known.description, known.name):
            key, document = (
                ("artifactPortfolioID", queries.EDIT_PORTFOLIO)
                if known.is_portfolio
                else ("artifactSequenceID", queries.EDIT_SEQUENCE)
            )
            self.ask(document, input={key: node["id"], "name": changed.name, "description": changed.description or ""})
        if changed.type != known.type:
            if known.is_portfolio:
                self.cannot("change the type of a portfolio")
            moving = {"artifactSequenceID": node["id"], "destinationArtifactTypeName": changed.type}
            self.ask(queries.MOVE_SEQUENCE, input=moving)
        return changed

    def _change_aliases(self, document: str, name: ArtifactName, number: int, aliases: Iterable[str]) -> None:
        version = self.version(name.at(f"v{number}"))
        self.change_aliases(document, name, version.commit, aliases)

    def aliases_of(self, name: ArtifactName, version: Version) -> list[str]:
        """The aliases that a version has in the collection ``name``."""
        membership = self._membership(name, version.name)
        own = [str(alias["alias"]) for alias in dig(membership, "aliases") or () if dig(alias, "alias")]
        return own or _aliases_in(dig(membership, "artifact") or {}, name)

    def change_aliases(self, document: str, name: ArtifactName, artifact: str, aliases: Iterable[str]) -> None:
        """Give aliases of a collection to a version, or take them, as ``document`` says."""
        where = {"entityName": name.entity, "projectName": name.project, "artifactCollectionName": name.collection}
        self.ask(document, input={"artifactID": artifact, "aliases": [{**where, "alias": alias} for alias in sorted(aliases)]})

    def _change_tags(self, name: ArtifactName, old: Sequence[str], new: Sequence[str]) -> None:
        where = {"entityName": name.entity, "projectName": name.project, "artifactCollectionName": name.collection}
        for document, tags in ((queries.ADD_TAGS, set(new) - set(old)), (queries.DELETE_TAGS, set(old) - set(new))):
            left = [{"tagName": tag} for tag in sorted(tags)]
            for start in range(0, len(left), _TAGS):
                self.ask(document, input={**where, "tags": left[start : start + _TAGS]})

    def update_version(self, name: ArtifactName, change: Callable[[Version], Version]) -> Version:
        """As the protocol says, but that W&B has no conditions: what two change at once, the later one decides."""
        found = self.version(name)
        old = found.origin
        new = change(old)
        if new.state != old.state or new.type != old.type:
            self.cannot("change the state or the type of one version")
        if new == old:
            return found
        added, removed = set(new.tags) - set(old.tags), set(old.tags) - set(new.tags)
        asked: Node = {  # the whole of it, as W&B's client sends it: a server may take what is left out for none
            "artifactID": old.commit,
            "description": new.description if new.description == old.description else new.description or "",
            "metadata": json.dumps(new.metadata, sort_keys=True),
            "tagsToAdd": [{"tagName": tag} for tag in sorted(added)],
            "tagsToDelete": [{"tagName": tag} for tag in sorted(removed)],
        }
        if (new.ttl, new.ttl_inherited) != (old.ttl, old.ttl_inherited):
            asked["ttlDurationSeconds"] = new.ttl or (_INHERIT if new.ttl_inherited else _NEVER)
        self.ask(queries.UPDATE_ARTIFACT, input={key: value for key, value in asked.items() if value is not None})
        return self.version(name)

    def delete_version(self, name: ArtifactName, delete_aliases: bool = False) -> Version:
        version = self.version(name)
        if isinstance(version, LinkedVersion):
            return self.unlink(name)
        held = sorted(set(self.aliases_of(name, version)) - {LATEST})
        if held and not delete_aliases:
            shown = f"{version.qualified_name} has the aliases {', '.join(held)}"
            raise ConflictError(f"{shown}; move them first, or delete them too (--delete-aliases)")
        asked = {"artifactID": version.commit, "deleteAliases": True}
        self._do(queries.DELETE, lambda: not self._is_there(name.at(version.name)), input=asked)
        return msgspec.structs.replace(version, state="DELETED", deleted_at=moment(None))

    def delete_collection(self, name: ArtifactName, delete_aliases: bool = True) -> None:
        node, kind = self._find_collection(name)
        found = self._with_aliases(_collection(node, name, kind), kind)
        held = sorted(set(found.aliases) - {LATEST})
        if held and not delete_aliases and not found.is_portfolio:
            raise ConflictError(f"{name.path} has versions with the aliases {', '.join(held)}; pass delete_aliases=True")
        document = queries.DELETE_PORTFOLIO if found.is_portfolio else queries.DELETE_SEQUENCE
        self._do(document, lambda: self.type_of(name) is None, id=node["id"])

    def link(
        self, version: Version, target: ArtifactName, aliases: Sequence[str] = (), run: str = "", description: str | None = None
    ) -> LinkedVersion:
        source = version.origin
        if target.path == f"{source.entity}/{source.project}/{source.collection}":
            raise UsageError(f"{source.qualified_name} cannot be linked to its own collection; name another target")
        asked = {
            "artifactID": source.commit,
            "artifactPortfolioName": target.collection,
            "entityName": target.entity,
            "projectName": target.project,
            "aliases": [{"artifactCollectionName": target.collection, "alias": alias} for alias in aliases],
        }
        try:
            data = self.ask(queries.LINK, input=asked)
        except CommError:
            self._check_portfolio(target, source.type)
            raise
        number = whole(dig(data, "result", "versionIndex"))
        if number is None:
            number = self._number_in(target, source)
        if number is None:
            raise CommError(f"{self.url} does not say which number {source.qualified_name} has in {target.path}")
        made = self.version(target.at(f"v{number}"))
        if not isinstance(made, LinkedVersion):
            raise UsageError(f"{target.path} is a collection that versions are logged to; link to another name")
        if description is not None:
            self.update_collection(target, lambda it: msgspec.structs.replace(it, description=description))
        return made

    def _check_portfolio(self, name: ArtifactName, kind: str) -> None:
        """UsageError where there is a collection that takes no links to versions of this type."""
        try:
            known = self.collection(name)
        except NotFoundError:
            return
        if not known.is_portfolio:
            raise UsageError(f"{name.path} holds versions that were logged to it; links need a collection of their own")
        if known.type != kind:
            raise UsageError(f"{name.path} holds links to artifacts of type {known.type!r}, not {kind!r}: link it elsewhere")

    def _number_in(self, portfolio: ArtifactName, source: Version) -> int | None:
        """The number that a version has in a portfolio."""
        where = (portfolio.entity, portfolio.project, portfolio.collection)
        links = (link for link in self.links_of(source) if (link.entity, link.project, link.collection) == where)
        return next((link.number for link in links), None)

    def unlink(self, name: ArtifactName) -> LinkedVersion:
        version = self.version(name)
        if not isinstance(version, LinkedVersion):
            raise UsageError(f"{version.qualified_name} is no link but a version that was logged; delete removes it")
        node, _ = self._find_collection(name)
        asked = {"artifactID": version.source.commit, "artifactPortfolioID": node["id"]}
        self._do(queries.UNLINK, lambda: not self._is_there(name.at(version.name)), input=asked)
        return version

    def _is_there(self, name: ArtifactName) -> bool:
        try:
            self.version(name)
        except NotFoundError:
            return False
        return True

    def _do(self, document: str, done: Callable[[], bool], /, **variables: object) -> None:
        """Ask for what cannot be done twice. Where an answer is lost the request comes again, and what the server then says of
        what is gone already counts for nothing."""
        try:
            self.ask(document, **variables)
        except (NetworkError, NotPermittedError):
            raise
        except ArtifactFSError as error:
            if not done():
                raise
            log.debug("done already: %s", error)

    def links_of(self, version: Version) -> list[LinkedVersion]:
        source = version.origin
        data = self.ask(queries.LINKED, artifactID=source.commit)
        found = []
        for edge in dig(data, "artifact", "artifactMemberships", "edges") or ():
            node = dig(edge, "node")
            collection, number = dig(node, "artifactCollection"), whole(dig(node, "versionIndex"))
            parts = [dig(collection, "project", "entity", "name"), dig(collection, "project", "name"), dig(collection, "name")]
            if dig(collection, "__typename") == "ArtifactSequence" or number is None:
                continue
            if all(isinstance(part, str) for part in parts):
                own = {"entity": parts[0], "project": parts[1], "collection": parts[2], "number": number}
                fields = {field: getattr(source, field) for field in Version.__struct_fields__}
                found.append(LinkedVersion(**{**fields, **own}, source=source, linked_at=moment(dig(node, "createdAt"))))
        return sorted(found, key=lambda link: link.qualified_name)

    def entity_settings(self, entity: str) -> EntitySettings:
        data = self._remembered(f"organization {entity}", lambda: self.ask(queries.ORGANIZATION, entity=entity))
        found = dig(data, "entity", "organization") or next(iter(dig(data, "entity", "user", "organizations") or ()), None)
        name = dig(found, "orgEntity", "name")
        return EntitySettings(entity=entity, organization=str(name or ""), created_at="", updated_at="")

    # Runs and lineage

    def run(self, entity: str, project: str, id: str) -> Run:
        return self._runs.run(entity, project, id)

    def runs(self, entity: str, project: str) -> list[Run]:
        return self._runs.runs(entity, project)

    def save_run(self, run: Run) -> None:
        self.check_online("a run")
        self._runs.save(run)

    def start_run(self, entity: str, project: str) -> str:
        """Make a run that nobody asked for; its id."""
        return self._runs.start(entity, project)

    def finish_run(self, run: Run, exit_code: int) -> None:
        self._runs.finish(run, exit_code)

    def used_by(self, version: Version) -> list[Run]:
        return self._runs.used_by(version)

    def mark_used(self, version: Version, run: Run) -> None:
        self._runs.mark_used(version, run)

    # Asking

    def _viewer(self) -> Node:
        data = self._remembered("viewer", lambda: self.ask(queries.VIEWER))
        viewer = dig(data, "viewer")
        return viewer if isinstance(viewer, dict) else {}

    def _remembered(self, key: str, ask: Callable[[], Node]) -> Node:
        with self._lock:
            known = self._answers.get(key)
        if known is None:
            known = ask()
            with self._lock:
                self._answers[key] = known
        return dict(known)

    def features(self) -> frozenset[str]:
        """What the server says that it can do besides what all can."""

        def ask() -> Node:
            try:
                return self.ask(queries.FEATURES)
            except CommError as error:  # one that does not know the question
                log.debug("%s", error)
                return {}

        found = dig(self._remembered("features", ask), "serverInfo", "features")
        return frozenset(str(dig(feature, "name")) for feature in found or () if dig(feature, "isEnabled") is True)

    def ask(self, document: str, /, **variables: object) -> Node:
        self.check_online("this")
        return self.client.ask(document, **variables)

    def ask_pages(self, document: str, find: Callable[[Node], Any], /, **variables: object) -> Iterator[Node]:
        self.check_online("this")
        return self.client.pages(document, find, **variables)

    def version_of(self, artifact: str, name: ArtifactName) -> Version:
        """The version with this id on the server, as a member of the collection it was logged to."""
        node = dig(self.ask(queries.ARTIFACT, id=artifact), "artifact")
        if not isinstance(node, dict):
            raise CommError(f"{self.url} does not know the version {artifact} of {name.path}")
        return self._version(node, name, None, "").origin


def _collection(node: Node, name: ArtifactName, kind: str) -> Collection:
    tags = (dig(edge, "node", "name") for edge in dig(node, "tags", "edges") or ())
    return Collection(
        entity=name.entity,
        project=name.project,
        name=name.collection,
        type=str(dig(node, "type", "name") or kind),
        description=node.get("description") or None,
        tags=[str(tag) for tag in tags if tag],
        kind="PORTFOLIO" if node.get("__typename") == "ArtifactPortfolio" else "SEQUENCE",
        created_at=moment(node.get("createdAt")),
        updated_at=moment(node.get("updatedAt") or node.get("createdAt")),
    )


def _aliases_in(node: Node, name: ArtifactName) -> list[str]:
    """The aliases that a version has in one collection."""
    found = []
    for alias in node.get("aliases") or ():
        home = dig(alias, "artifactCollection")
        places = (dig(home, "project", "entity", "name"), dig(home, "project", "name"), dig(home, "name"))
        if dig(alias, "alias") and all(
            there in (None, ours) for there, ours in zip(places, (name.entity, name.project, name.collection), strict=True)
        ):
            found.append(str(alias["alias"]))
    return [alias for alias in found if version_number(alias) is None]


def _named(names: Iterable[object], check: Callable[[str], object]) -> list[str]:
    """Those that can be names, sorted."""
    found = []
    for name in names:
        if isinstance(name, str):
            try:
                check(name)
            except ArtifactFSError as error:
                log.warning("not listed: %s", error)
            else:
                found.append(name)
    return sorted(found)
