"""The nodes of the GraphQL graph for reading: each knows the store's value that it stands for, and who asks.

A field ``usedBy`` is the method or attribute ``used_by`` (``schema.py``). Whatever a caller may not read is left out, or None, as
if it did not exist; that is decided where a node is made, never later.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import mimetypes
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from artifactfs.errors import IntegrityError, InvalidNameError, NotFoundError
from artifactfs.filtering import compile_filter
from artifactfs.manifest import version_id
from artifactfs.model import XXH128, Collection, Dir, Entry, File, LinkedVersion, Ref, Run, Symlink, Version
from artifactfs.names import (
    ArtifactName,
    check_collection,
    check_entity,
    check_project,
    entry_path,
    expires,
    is_registry,
    parse,
)
from artifactfs.serve.inputs import check_filter, json_object, listed, optional_number, optional_text, text
from artifactfs.serve.manifests import entries_after
from artifactfs.serve.saving import find_artifact, load_run, pending_id
from artifactfs.serve.service import Context
from artifactfs.serve.state import Pending, Uploaded

FEATURES = (
    "ARTIFACT_COLLECTIONS_FILTERING_SORTING",
    "ARTIFACT_COLLECTION_MEMBERSHIP_FILES",
    "ARTIFACT_COLLECTION_MEMBERSHIP_FILE_DOWNLOAD_HANDLER",
    "ARTIFACT_DIGEST_ALGORITHM",
    "ARTIFACT_MEMBERSHIP_IN_LINK_ARTIFACT_RESPONSE",
    "ARTIFACT_REGISTRY_SEARCH",
    "ARTIFACT_TAGS",
    "ARTIFACT_V2_DOWNLOAD_HANDLER_SUPPORTS_ARTIFACT_ID",
    "INCLUDE_ARTIFACT_TYPES_IN_REGISTRY_CREATION",
    "PROJECT_ARTIFACT_COLLECTION_MEMBERSHIP",
    "TOTAL_COUNT_IN_FILE_CONNECTION",
    "USE_ARTIFACT_WITH_ENTITY_AND_PROJECT_INFORMATION",
)
"""What the client may rely on; it asks before it does."""

MAX_PAGE = 1000
MAX_FILES_PAGE = 10_000


def node_id(kind: str, *parts: str) -> str:
    """An opaque id that :func:`id_parts` gives back."""
    return base64.standard_b64encode(f"{kind}:{'/'.join(parts)}".encode()).decode()


def id_parts(id: Any, kind: str, count: int) -> list[str]:
    """The parts of an id of ours. NotFoundError for any other."""
    try:
        found, _, rest = base64.b64decode(text(id, "id", 2048), validate=True).decode().partition(":")
    except ValueError:
        found, rest = "", ""
    parts = rest.split("/")
    if found != kind or len(parts) != count:
        raise NotFoundError(f"there is no {kind} of that id")
    return parts


def number_of(*parts: str) -> int:
    """A number that stands for a name where clients want one."""
    return int.from_bytes(hashlib.sha256("/".join(parts).encode()).digest()[:6])


class PageInfo:
    def __init__(self, end_cursor: str | None, has_next_page: bool) -> None:
        self.end_cursor = end_cursor
        self.has_next_page = has_next_page


class Edge:
    def __init__(self, cursor: str, node: Any) -> None:
        self.cursor = cursor
        self.node = node
        self.version = getattr(node, "edge_version", None)


class Connection:
    """One page of a listing."""

    def __init__(self, edges: list[Edge], more: bool, total: Callable[[], int] | int) -> None:
        self.edges = edges
        self.page_info = PageInfo(edges[-1].cursor if edges else None, more)
        self._total = total

    def total_count(self) -> int:
        return self._total if isinstance(self._total, int) else self._total()


def connect(items: Sequence[Any], make: Callable[[Any], Any], first: Any, after: Any) -> Connection:
    """A page of ``items`` as nodes; a cursor is the number of an item."""
    start = int(after) if isinstance(after, str) and after.isascii() and after.isdigit() and len(after) < 12 else 0
    count = optional_number(first, "first", 0, 1 << 31)
    count = MAX_PAGE if count is None else min(count, MAX_PAGE)
    chosen = items[start : start + count]
    edges = [Edge(str(start + place), make(item)) for place, item in enumerate(chosen, 1)]
    return Connection(edges, start + count < len(items), len(items))


def passing(filters: Any) -> Callable[[Mapping[str, Any]], bool]:
    """What tells whether a document passes a filter that a client sent as JSON. UsageError."""
    given = json_object(filters, "filters")
    check_filter(given)
    return compile_filter(given)


# --- the top --------------------------------------------------------------------------------------


class Query:
    """The fields at the top of a query."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def viewer(self) -> UserNode:
        return UserNode(self._context)

    def server_info(self) -> ServerInfo:
        return ServerInfo()

    def entity(self, name: Any = None) -> EntityNode | None:
        return entity_node(self._context, name)

    def organization(self, name: Any = None) -> OrganizationNode | None:
        entity = entity_node(self._context, name)
        return OrganizationNode(self._context, entity) if entity is not None else None

    def project(self, name: Any = None, entity_name: Any = None) -> ProjectNode | None:
        return project_node(self._context, entity_name, name)

    model = project

    def models(self, entity_name: Any = None, first: Any = None, after: Any = None) -> Connection | None:
        entity = entity_node(self._context, entity_name)
        return entity.projects(first, after) if entity is not None else None

    def artifact(self, id: Any = None) -> ArtifactNode | None:
        try:
            found = find_artifact(self._context, text(id, "id", 2048))
        except NotFoundError:
            return None
        return PendingNode(self._context, found) if isinstance(found, Pending) else VersionNode(self._context, found)

    def artifact_collection(self, id: Any = None) -> CollectionNode | None:
        try:
            return CollectionNode(self._context, find_collection(self._context, id))
        except NotFoundError:
            return None

    def client_id_mapping(self, client_id: Any = None) -> Fieldset | None:
        pending = self._context.state.by_client(text(client_id, "clientID", 1024))
        if pending is None or not self._context.caller.can_read(pending.name.entity):
            return None
        return Fieldset(
            server_id=version_id(self._context.version(parse(pending.result))) if pending.result else pending_id(pending.id)
        )


class Fieldset(dict[str, Any]):
    """Fields by name, for a node that is nothing more."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(fields)

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


class ServerInfo:
    features = tuple(Fieldset(name=name, is_enabled=True) for name in FEATURES)
    cli_version_info = Fieldset(max_cli_version="0.31.0", min_cli_version="0.13.0")


class UserNode:
    """Whoever has the key."""

    graphql_type = "User"

    def __init__(self, context: Context) -> None:
        caller = context.caller
        self._context = context
        self.id = node_id("User", caller.id)
        self.name = self.username = caller.name
        self.email = ""
        self.flags = "{}"
        self.admin = False
        self.entity = default_entity(context)

    def teams(self) -> Connection:
        return connect(self._context.caller.entities, lambda name: EntityNode(self._context, name), None, None)

    def organizations(self) -> list[OrganizationNode]:
        caller = self._context.caller
        known = self._context.store.entities() if caller.opens_all else caller.entities
        names = dict.fromkeys(self._context.organization(entity) for entity in known)
        return [
            OrganizationNode(self._context, EntityNode(self._context, name))
            for name in names
            if self._context.caller.can_read(name)
        ]

    def api_keys(self) -> Connection:
        return connect([], lambda it: it, None, None)


def default_entity(context: Context) -> str:
    """The entity of a caller who names none: the first that the key names; for a key that opens all, what it is called."""
    return context.caller.entities[0] if context.caller.entities else context.caller.name


def entity_node(context: Context, name: Any) -> EntityNode | None:
    """None for an entity that the caller may not read, and for what cannot be one."""
    given = optional_text(name, "entity", 1024) or default_entity(context)
    try:
        check_entity(given)
    except InvalidNameError:
        return None
    return EntityNode(context, given) if context.caller.can_read(given) else None


class EntityNode:
    """An entity that the caller may read."""

    entity_type = "team"
    is_team = True
    available = False
    xxhash_digests_enabled = True

    def __init__(self, context: Context, name: str) -> None:
        self._context = context
        self.name = name
        self.id = node_id("Entity", name)

    def organization(self) -> OrganizationNode | None:
        """None for the name of a key that opens all, which is no team's: its user is in every organization."""
        if self._is_personal() and self.name not in self._context.store.entities():
            return None
        name = self._context.organization(self.name)
        return OrganizationNode(self._context, EntityNode(self._context, name)) if self._context.caller.can_read(name) else None

    def user(self) -> UserNode | None:
        return UserNode(self._context) if self.name == default_entity(self._context) else None

    def _is_personal(self) -> bool:
        return self._context.caller.opens_all and self.name == self._context.caller.name

    def project(self, name: Any = None) -> ProjectNode | None:
        return project_node(self._context, self.name, name)

    def projects(self, first: Any = None, after: Any = None, filters: Any = None, order: Any = None) -> Connection:
        passes = passing(filters)
        names = [name for name in self._project_names() if passes(project_document(self.name, name))]
        if isinstance(order, str) and order.startswith("-"):
            names.reverse()
        return connect(names, lambda name: ProjectNode(self._context, self.name, name), first, after)

    def _project_names(self) -> list[str]:
        return project_names(self._context, self.name)

    def artifact_collections(
        self,
        project_filters: Any = None,
        filters: Any = None,
        collection_types: Any = None,
        first: Any = None,
        after: Any = None,
        order: Any = None,
    ) -> Connection:
        kinds = {text(kind, "collectionTypes", 64) for kind in listed(collection_types, "collectionTypes")}
        found = [record for record in self._registry_collections(project_filters) if not kinds or record.kind in kinds]
        return collections_page(self._context, found, filters, order, first, after)

    def artifact_memberships(
        self,
        project_filters: Any = None,
        collection_filters: Any = None,
        filters: Any = None,
        first: Any = None,
        after: Any = None,
        order: Any = None,
    ) -> Connection:
        chosen, passes = passing(collection_filters), passing(filters)
        found = []
        for record in self._registry_collections(project_filters):
            if chosen(collection_document(record)):
                found += [it for it in members(self._context, record) if passes(version_document(it, record))]
        return connect(found, lambda version: MembershipNode(self._context, version), first, after)

    def _registry_collections(self, project_filters: Any) -> Iterator[Collection]:
        passes = passing(project_filters)
        for project in project_names(self._context, self.name):
            if is_registry(project) and passes(project_document(self.name, project)):
                yield from self._context.store.collections(self.name, project)


class OrganizationEntityNode(EntityNode):
    """An entity as an organization: its projects are its registries."""

    entity_type = "organization"

    def _project_names(self) -> list[str]:
        return [name for name in super()._project_names() if is_registry(name)]


class OrganizationNode:
    """An organization: the entity that holds registries."""

    def __init__(self, context: Context, entity: EntityNode) -> None:
        self.org_entity = OrganizationEntityNode(context, entity.name)
        self.name = entity.name
        self.id = node_id("Organization", entity.name)


# --- projects -------------------------------------------------------------------------------------


def project_names(context: Context, entity: str) -> list[str]:
    """The projects of an entity, sorted."""
    return sorted({*context.store.projects(entity), *context.state.projects(entity)})


def project_document(entity: str, name: str) -> dict[str, Any]:
    """What filters look at."""
    number = number_of(entity, name)
    return {"name": name, "id": number, "project_id": number, "entity_id": number_of(entity)}


def project_node(context: Context, entity: Any, name: Any) -> ProjectNode | None:
    """None for a project that does not exist, or is of an entity that the caller may not read."""
    found = entity_node(context, entity)
    given = optional_text(name, "project", 1024) or "uncategorized"
    try:
        check_project(given)
    except InvalidNameError:
        return None
    if found is None or not _exists(context, found.name, given):
        return None
    return ProjectNode(context, found.name, given)


def _exists(context: Context, entity: str, project: str) -> bool:
    if context.state.has_project(entity, project) or project in context.store.projects(entity):
        return True
    return bool(context.store.runs(entity, project))


class ProjectNode:
    """A project of an entity that the caller may read."""

    is_benchmark = False
    allow_all_artifact_types_in_registry = True

    def __init__(self, context: Context, entity: str, name: str) -> None:
        self._context = context
        self.name = name
        self.entity_name = entity
        self.id = node_id("Project", entity, name)
        self.internal_id = base64.standard_b64encode(f"ProjectInternalId:{number_of(entity, name)}".encode()).decode()
        self.read_only = not context.caller.can_write(entity)

    def entity(self) -> EntityNode:
        return EntityNode(self._context, self.entity_name)

    def user(self) -> UserNode:
        return UserNode(self._context)

    def description(self) -> str:
        return self._record().get("description") or ""

    def access(self) -> str:
        return self._record().get("access") or ("ORGANIZATION" if is_registry(self.name) else "PRIVATE")

    def created_at(self) -> str:
        """Of the first collection, where the project was not made by itself."""
        return self._record().get("created_at") or min((it.created_at for it in self._collections()), default=_EPOCH)

    def updated_at(self) -> str:
        return max((it.updated_at for it in self._collections()), default=self.created_at())

    def _record(self) -> dict[str, Any]:
        return self._context.state.project(self.entity_name, self.name)

    def _collections(self) -> list[Collection]:
        return self._context.store.collections(self.entity_name, self.name)

    def artifact(self, name: Any = None) -> VersionNode | None:
        version = self._version(name)
        return VersionNode(self._context, version) if version is not None else None

    def artifact_collection_membership(self, name: Any = None) -> MembershipNode | None:
        version = self._version(name)
        return MembershipNode(self._context, version) if version is not None else None

    def _version(self, name: Any) -> Version | None:
        collection, _, alias = text(name, "name", 1024).partition(":")
        return _found_version(self._context, ArtifactName(self.entity_name, self.name, collection, alias))

    def artifact_collection(self, name: Any = None) -> CollectionNode | None:
        record = find_record(self._context, self.entity_name, self.name, text(name, "name", 1024))
        return CollectionNode(self._context, record) if record is not None else None

    def artifact_collections(self, first: Any = None, after: Any = None, filters: Any = None, order: Any = None) -> Connection:
        return collections_page(self._context, self._collections(), filters, order, first, after)

    def artifact_type(self, name: Any = None) -> TypeNode | None:
        given = text(name, "type", 1024)
        if not self._context.service.has_type(self.entity_name, self.name, given):
            return None
        return TypeNode(self._context, self.entity_name, self.name, given)

    def artifact_types(self, first: Any = None, after: Any = None, include_all: Any = None) -> Connection:
        types = sorted({record.type for record in self._collections()})
        return connect(types, lambda name: TypeNode(self._context, self.entity_name, self.name, name), first, after)

    def run(self, name: Any = None) -> RunNode | None:
        try:
            return RunNode(self._context, self._context.store.run(self.entity_name, self.name, text(name, "run", 1024)))
        except (NotFoundError, InvalidNameError):
            return None

    def bucket(self, name: Any = None, missing_ok: Any = None) -> RunNode | None:
        return self.run(name)

    def runs(self, first: Any = None, after: Any = None, filters: Any = None, order: Any = None) -> Connection:
        found = self._runs(filters)
        if not isinstance(order, str) or order.startswith("-"):
            found.reverse()
        return connect(found, lambda run: RunNode(self._context, run), first, after)

    def run_count(self, filters: Any = None) -> int:
        return len(self._runs(filters))

    def _runs(self, filters: Any) -> list[Run]:
        passes = passing(filters)
        runs = self._context.store.runs(self.entity_name, self.name)
        return [run for run in runs if passes({**msgspec.to_builtins(run), "name": run.id, "display_name": run.name or run.id})]

    def total_sweeps(self) -> int:
        return 0

    def sweeps(self, first: Any = None, after: Any = None, filters: Any = None) -> Connection:
        return connect([], lambda it: it, first, after)


_EPOCH = "1970-01-01T00:00:00Z"


def _found_version(context: Context, name: ArtifactName) -> Version | None:
    """The version, or None where there is none that the caller may see."""
    try:
        check_collection(name.collection)
        return context.version(name)
    except (NotFoundError, InvalidNameError):
        return None


def find_record(context: Context, entity: str, project: str, name: str) -> Collection | None:
    """The collection, or None where there is none that the caller may read."""
    if not context.caller.can_read(entity):
        return None
    try:
        check_collection(name)
        return context.store.collection(ArtifactName(entity, project, name))
    except (NotFoundError, InvalidNameError):
        return None


def find_collection(context: Context, id: Any) -> Collection:
    """The collection of an id. NotFoundError where there is none that the caller may read."""
    record = find_record(context, *id_parts(id, "ArtifactCollection", 3))
    if record is None:
        raise NotFoundError("there is no artifact collection of that id")
    return record


class TypeNode:
    """A type of artifacts in a project."""

    description: str | None = None

    def __init__(self, context: Context, entity: str, project: str, name: str) -> None:
        self._context = context
        self._entity = entity
        self._project = project
        self.name = name
        self.id = node_id("ArtifactType", entity, project, name)

    def created_at(self) -> str:
        return min((record.created_at for record in self._records()), default=_EPOCH)

    def artifact_collection(self, name: Any = None) -> CollectionNode | None:
        record = find_record(self._context, self._entity, self._project, text(name, "name", 1024))
        return CollectionNode(self._context, record) if record is not None and record.type == self.name else None

    def artifact_collections(self, first: Any = None, after: Any = None, filters: Any = None, order: Any = None) -> Connection:
        return collections_page(self._context, self._records(), filters, order, first, after)

    def _records(self) -> list[Collection]:
        return [it for it in self._context.store.collections(self._entity, self._project) if it.type == self.name]


# --- collections ----------------------------------------------------------------------------------

_ORDERS = {
    "name": "name",
    "created_at": "created_at",
    "createdAt": "created_at",
    "updated_at": "updated_at",
    "updatedAt": "updated_at",
}


def collections_page(
    context: Context, records: Iterable[Collection], filters: Any, order: Any, first: Any, after: Any
) -> Connection:
    passes = passing(filters)
    kept = [record for record in records if passes(collection_document(record))]
    wanted = optional_text(order, "order", 64) or ""
    field = _ORDERS.get(wanted.lstrip("+-"), "name")
    kept.sort(key=lambda record: (getattr(record, field), record.name), reverse=wanted.startswith("-"))
    return connect(kept, lambda record: CollectionNode(context, record), first, after)


def collection_document(record: Collection) -> dict[str, Any]:
    """What filters look at."""
    return {
        "name": record.name,
        "description": record.description,
        "tag": record.tags,
        "tags": record.tags,
        "type": record.type,
        "created_at": record.created_at,
        "createdAt": record.created_at,
        "updated_at": record.updated_at,
        "updatedAt": record.updated_at,
    }


def version_document(version: Version, record: Collection) -> dict[str, Any]:
    """What filters look at."""
    aliases = aliases_of(record, version.number)
    return {
        "state": version.state,
        "version": version.name,
        "versionIndex": version.number,
        "version_index": version.number,
        "alias": aliases,
        "aliases": aliases,
        "tag": version.tags,
        "tags": version.tags,
        "metadata": version.metadata,
        "description": version.description,
        "created_at": version.created_at,
        "createdAt": version.created_at,
        "updated_at": version.updated_at,
        "updatedAt": version.updated_at,
        "size": version.size,
    }


def aliases_of(record: Collection, number: int) -> list[str]:
    """The aliases of a version of a collection."""
    return [alias for alias, at in record.aliases.items() if at == number]


def members(context: Context, record: Collection) -> list[Version]:
    """The versions, or links, of a collection that the caller may see, newest first."""
    try:
        found = context.store.versions(_name_of(record))
    except NotFoundError:
        return []
    return [version for version in reversed(found) if context.visible(version)]


def _name_of(record: Collection) -> ArtifactName:
    return ArtifactName(record.entity, record.project, record.name)


class CollectionNode:
    """A collection of an entity that the caller may read."""

    def __init__(self, context: Context, record: Collection) -> None:
        self._context = context
        self._record = record
        self.graphql_type = "ArtifactPortfolio" if record.is_portfolio else "ArtifactSequence"
        self.id = node_id("ArtifactCollection", record.entity, record.project, record.name)
        self.name = record.name
        self.description = record.description
        self.created_at = record.created_at
        self.updated_at = record.updated_at
        self.state = record.state

    def project(self) -> ProjectNode:
        return ProjectNode(self._context, self._record.entity, self._record.project)

    def default_artifact_type(self) -> TypeNode:
        return TypeNode(self._context, self._record.entity, self._record.project, self._record.type)

    def tags(self, first: Any = None, after: Any = None, filters: Any = None, order: Any = None) -> Connection:
        return connect(self._record.tags, tag_node, first, after)

    def aliases(self, first: Any = None, after: Any = None, filters: Any = None, order: Any = None) -> Connection:
        return connect(list(self._record.aliases), lambda alias: AliasNode(self._context, self._record, alias), first, after)

    def artifacts(self, first: Any = None, after: Any = None, filters: Any = None, order: Any = None) -> Connection:
        return connect(
            self._members(filters, order), lambda version: VersionNode(self._context, version, self._record), first, after
        )

    def artifact_memberships(self, first: Any = None, after: Any = None, filters: Any = None, order: Any = None) -> Connection:
        return connect(self._members(filters, order), lambda it: MembershipNode(self._context, it, self._record), first, after)

    def _members(self, filters: Any, order: Any) -> list[Version]:
        passes = passing(filters)
        found = [it for it in members(self._context, self._record) if passes(version_document(it, self._record))]
        if isinstance(order, str) and order and not order.startswith("-"):
            found.reverse()
        return found

    def artifact_membership(self, alias_name: Any = None) -> MembershipNode | None:
        version = _found_version(self._context, _name_of(self._record).at(optional_text(alias_name, "aliasName", 1024) or ""))
        return MembershipNode(self._context, version, self._record) if version is not None else None

    def latest_artifact(self) -> VersionNode | None:
        version = _found_version(self._context, _name_of(self._record))
        return VersionNode(self._context, version, self._record) if version is not None else None

    def digest_algorithm(self) -> str | None:
        newest = self._context.store.newest(_name_of(self._record))
        return None if newest is None else manifest_algorithm(newest.algorithm)


def manifest_algorithm(algorithm: str) -> str:
    """A digest algorithm by W&B's name; BLAKE3 shows itself as MD5, which manifests give for it."""
    return "MANIFEST_XXH128" if algorithm == XXH128 else "MANIFEST_MD5"


class AliasNode:
    def __init__(self, context: Context, record: Collection, alias: str) -> None:
        self._context = context
        self._record = record
        self.alias = alias
        self.id = node_id("ArtifactAlias", record.entity, record.project, record.name, alias)

    def artifact_collection(self) -> CollectionNode:
        return CollectionNode(self._context, self._record)


def tag_node(name: str) -> Fieldset:
    return Fieldset(id=node_id("Tag", name), name=name)


# --- versions -------------------------------------------------------------------------------------


class MembershipNode:
    """A version as a member of a collection: where it was logged, or of a portfolio."""

    def __init__(self, context: Context, version: Version, record: Collection | None = None) -> None:
        self._context = context
        self._version = version
        self._record = record
        self.id = node_id("ArtifactCollectionMembership", version.entity, version.project, version.collection, version.name)
        self.version_index = version.number
        self.created_at = version.linked_at if isinstance(version, LinkedVersion) else version.created_at

    def _collection(self) -> Collection:
        if self._record is None:
            self._record = self._context.store.collection(name_of(self._version))
        return self._record

    def aliases(self) -> list[AliasNode]:
        record = self._collection()
        return [AliasNode(self._context, record, alias) for alias in aliases_of(record, self._version.number)]

    def artifact_collection(self) -> CollectionNode:
        return CollectionNode(self._context, self._collection())

    def artifact(self) -> VersionNode:
        return VersionNode(self._context, self._version)

    def files(self, first: Any = None, after: Any = None, names: Any = None) -> Connection:
        return files_page(self._context, self._version, first, after, names)


def name_of(version: Version) -> ArtifactName:
    """The collection of a version."""
    return ArtifactName(version.entity, version.project, version.collection)


class ArtifactNode:
    """A version, or one that is being uploaded."""


class PendingNode(ArtifactNode):
    """A version that is being uploaded."""

    state = "PENDING"

    def __init__(self, context: Context, pending: Pending) -> None:
        self._context = context
        self._pending = pending
        self.id = pending_id(pending.id)
        self.digest = pending.digest
        self.description = pending.fields.description
        self.digest_algorithm = manifest_algorithm(pending.algorithm)
        self.metadata = msgspec.json.encode(pending.fields.metadata).decode()
        self.version_index = pending.since + 1  # if nobody else commits first
        self.size = self.file_count = 0
        self.created_at = self.updated_at = pending.created_at
        self.history_step = None
        self.commit_hash = None
        self.tags = [tag_node(tag) for tag in pending.fields.tags]
        self.aliases: list[AliasNode] = []
        self.ttl_duration_seconds = -2 if pending.fields.ttl is None else pending.fields.ttl
        self.ttl_is_inherited = pending.fields.inherit_ttl

    def artifact_type(self) -> TypeNode:
        name = self._pending.name
        return TypeNode(self._context, name.entity, name.project, self._pending.type)

    def artifact_sequence(self) -> CollectionNode | Fieldset:
        name = self._pending.name
        record = find_record(self._context, name.entity, name.project, name.collection)
        if record is not None:
            return CollectionNode(self._context, record)
        project = ProjectNode(self._context, name.entity, name.project)
        id = node_id("ArtifactCollection", name.entity, name.project, name.collection)
        return Fieldset(graphql_type="ArtifactSequence", id=id, name=name.collection, project=project, state="READY")


class VersionNode(ArtifactNode):
    """A version that the caller may read; of a link what it leads to."""

    def __init__(self, context: Context, version: Version, record: Collection | None = None) -> None:
        source = version.origin
        self._context = context
        self._version = source
        self._record = record if source is version else None
        self.edge_version = version.name
        self.id = version_id(source)
        self.version_index = source.number
        self.description = source.description
        self.state = source.state
        self.size = source.size
        self.digest = source.digest
        self.file_count = source.file_count
        self.created_at = source.created_at
        self.updated_at = source.updated_at
        self.history_step = None
        self.digest_algorithm = manifest_algorithm(source.algorithm)

    def commit_hash(self) -> str:
        return self._version.root.digest.hex()

    def metadata(self) -> str:
        return msgspec.json.encode(self._version.metadata).decode()

    def ttl_duration_seconds(self) -> int:
        """-2: never."""
        if not expires(self._version.type):
            return -2
        seconds = self._context.store.ttl_of(self._version)
        return -2 if seconds is None else seconds

    def ttl_is_inherited(self) -> bool:
        return self._version.ttl is None and self._version.ttl_inherited

    def tags(self) -> list[Fieldset]:
        return [tag_node(tag) for tag in self._version.tags]

    def artifact_type(self) -> TypeNode:
        return TypeNode(self._context, self._version.entity, self._version.project, self._version.type)

    def artifact_sequence(self) -> CollectionNode:
        return CollectionNode(self._context, self._collection())

    def _collection(self) -> Collection:
        if self._record is None:
            self._record = self._context.store.collection(name_of(self._version))
        return self._record

    def aliases(self) -> list[AliasNode]:
        """Of all its memberships."""
        return [alias for membership in self._memberships() for alias in membership.aliases()]

    def _memberships(self) -> list[MembershipNode]:
        own = MembershipNode(self._context, self._version, self._collection())
        links = (link for link in self._context.store.links_of(self._version) if self._context.visible(link))
        return [own, *(MembershipNode(self._context, link) for link in links)]

    def artifact_memberships(self, first: Any = None, after: Any = None, filters: Any = None, order: Any = None) -> Connection:
        return connect(self._memberships(), lambda it: it, first, after)

    def current_manifest(self) -> Fieldset:
        url = self._context.signed("GET", "manifest", (self._version.qualified_name,))
        id = node_id("ArtifactManifest", self._version.qualified_name)
        return Fieldset(id=id, file=Fieldset(id=id, name="wandb_manifest.json", direct_url=url, url=url))

    def used_by(self, first: Any = None, after: Any = None, filters: Any = None, order: Any = None) -> Connection:
        runs = [run for run in self._context.store.used_by(self._version) if self._context.caller.can_read(run.entity)]
        return connect(runs, lambda run: RunNode(self._context, run), first, after)

    def created_by(self) -> RunNode | None:
        try:
            run = load_run(self._context.store, self._version.run)
        except (NotFoundError, InvalidNameError):
            return None
        return RunNode(self._context, run) if self._context.caller.can_read(run.entity) else None

    def files(self, first: Any = None, after: Any = None, names: Any = None) -> Connection:
        return files_page(self._context, self._version, first, after, names)

    def files_by_manifest_entries(
        self, storage_layout: Any = None, manifest_version: Any = None, entries: Any = None, storage_region: Any = None
    ) -> Connection:
        wanted = [entry.get("name") if isinstance(entry, dict) else entry for entry in listed(entries, "entries")]
        return files_page(self._context, self._version, len(wanted), None, wanted)


# --- files ----------------------------------------------------------------------------------------


def files_page(context: Context, version: Version, first: Any, after: Any, names: Any) -> Connection:
    """A page of a version's files and references; a cursor is a path. ``names``: only those that it has of them."""
    count = optional_number(first, "first", 0, 1 << 31)
    count = MAX_FILES_PAGE if count is None else min(count, MAX_FILES_PAGE)
    after = optional_text(after, "after", 8192) or ""
    found: Iterable[tuple[str, File | Ref]]
    total: Callable[[], int] | int
    if names is None:
        found = entries_after(context.store.tree, version.root, after)
        total = version.file_count
    else:
        given = [text(name, "names", 8192) for name in listed(names, "names")]
        named = list(_named(context, version, given))
        total = len(named)
        place = next((place for place, (path, _) in enumerate(named, 1) if path == after), 0) if after else 0
        found = named[place:]
    page = list(itertools.islice(found, count + 1))
    edges = [Edge(path, FileNode(context, version, path, entry)) for path, entry in page[:count]]
    return Connection(edges, len(page) > count, total)


def _named(context: Context, version: Version, names: Iterable[str]) -> Iterator[tuple[str, File | Ref]]:
    for name in dict.fromkeys(names):
        try:
            path = entry_path(name)
        except InvalidNameError:
            continue
        entry: Entry | None = context.store.tree.resolve(version.root, path)
        if entry is not None and not isinstance(entry, (Dir, Symlink)):
            yield path, entry


class FileNode:
    """A file or reference of a version."""

    def __init__(self, context: Context, version: Version, path: str, entry: File | Ref) -> None:
        self._context = context
        self._version = version
        self._entry = entry
        self.name = self.display_name = path

    def id(self) -> str:
        return node_id("File", self._version.qualified_name, self.name)

    def direct_url(self) -> str:
        """The reference itself, or a signed URL."""
        if isinstance(self._entry, Ref):
            return self._entry.uri
        return self._context.signed("GET", "entry", (self._version.qualified_name, self.name))

    url = direct_url

    def size_bytes(self) -> int:
        return max(self._entry.size, 0)

    def storage_path(self) -> str:
        return self._entry.uri if isinstance(self._entry, Ref) else f"contents/{self._entry.id.hex()}"

    def mimetype(self) -> str:
        return mimetypes.guess_type(self.name)[0] or "application/octet-stream"

    def updated_at(self) -> str:
        return self._version.created_at

    def digest(self) -> str:
        if isinstance(self._entry, Ref):
            return self._entry.digest
        return self._context.service.checksums.digest(self._entry, self._where())

    def md5(self) -> str | None:
        return None if isinstance(self._entry, Ref) else self._context.service.checksums.md5(self._entry, self._where())

    def _where(self) -> str:
        return f"{self._version.qualified_name}/{self.name}"

    def artifact(self) -> VersionNode:
        return VersionNode(self._context, self._version)


class UploadNode:
    """A file that is to be uploaded, or need not be: ``upload_url`` None."""

    def __init__(self, context: Context, artifact: str, file: Uploaded, multipart: Fieldset | None, done: bool) -> None:
        self.name = self.display_name = file.name
        self.storage_path = f"uploads/{artifact}/{file.object}"
        self.id = node_id("File", self.storage_path)
        self.md5 = file.md5 or None
        self.digest = file.digest or file.md5
        self.artifact = Fieldset(id=pending_id(artifact))
        self.upload_headers: list[str] = []
        self.upload_url = None
        self.upload_multipart_urls = None
        if done:
            return
        if multipart is not None:
            self.upload_multipart_urls = multipart
        if file.md5:
            self.upload_headers = [f"Content-MD5:{file.md5}"]
        self.upload_url = context.signed("PUT", "upload", (artifact, file.object), file.md5, file.digest)


# --- runs -----------------------------------------------------------------------------------------


class RunNode:
    """A run of an entity that the caller may read."""

    graphql_type = "Run"
    description = None
    commit = None
    sweep_name = None
    history_line_count = 0
    log_line_count = 0
    events_line_count = 0
    history_tail = "[]"
    events_tail = "[]"
    system_metrics = "{}"
    history_keys = None
    stopped = False

    def __init__(self, context: Context, run: Run) -> None:
        self._context = context
        self._run = run
        self.id = node_id("Run", run.entity, run.project, run.id)
        self.name = run.id
        self.display_name = run.name or run.id
        self.group = run.group or None
        self.job_type = run.job_type or None
        self.created_at = run.created_at
        self.heartbeat_at = self.updated_at = run.updated_at
        self.read_only = not context.caller.can_write(run.entity)
        self.project_id = number_of(run.entity, run.project)

    def _kept(self) -> tuple[str, str, dict[str, Any]]:
        return self._context.state.run(self._run.path)

    def state(self) -> str:
        return self._kept()[0]

    def summary_metrics(self) -> str:
        return self._kept()[1]

    def tags(self) -> list[str]:
        return self._kept()[2].get("tags") or []

    def notes(self) -> str | None:
        return self._kept()[2].get("notes")

    def config(self) -> str:
        return msgspec.json.encode({key: {"value": value} for key, value in self._run.config.items()}).decode()

    def wandb_config(self, keys: Any = None) -> str:
        return "{}"

    def user(self) -> UserNode:
        return UserNode(self._context)

    def project(self) -> ProjectNode:
        return ProjectNode(self._context, self._run.entity, self._run.project)

    def input_artifacts(self, first: Any = None, after: Any = None, filters: Any = None, order: Any = None) -> Connection:
        return self._artifacts(self._run.used, first, after)

    def output_artifacts(self, first: Any = None, after: Any = None, filters: Any = None, order: Any = None) -> Connection:
        return self._artifacts(self._run.logged, first, after)

    def _artifacts(self, names: Iterable[str], first: Any, after: Any) -> Connection:
        found = []
        for name in names:
            try:
                found.append(self._context.version(parse(name)))
            except (NotFoundError, InvalidNameError, IntegrityError):
                continue
        return connect(found, lambda version: VersionNode(self._context, version), first, after)

    def files(self, first: Any = None, after: Any = None, names: Any = None, pattern: Any = None) -> Connection:
        found = self._context.state.run_files(self._run.path)
        wanted = set(map(str, listed(names, "names"))) or set(found)
        there = [name for name, path in found.items() if name in wanted and path.exists()]
        return connect(there, lambda name: RunFileNode(self._context, self._run, name), first, after)

    def file_count(self) -> int:
        return sum(path.exists() for path in self._context.state.run_files(self._run.path).values())


class RunFileNode:
    """A file of a run, which may not have arrived yet."""

    def __init__(self, context: Context, run: Run, name: str) -> None:
        self._context = context
        self._path = run.path
        self.name = self.display_name = name
        self.id = node_id("RunFile", run.entity, run.project, run.id, name)
        self.mimetype = mimetypes.guess_type(name)[0] or "application/octet-stream"

    def upload_url(self) -> str:
        return self._context.signed("PUT", "run-file", (self._path, self.name))

    def direct_url(self) -> str:
        return self._context.signed("GET", "run-file", (self._path, self.name))

    url = direct_url

    def size_bytes(self) -> int:
        path = self._context.state.run_files(self._path, self.name).get(self.name)
        try:
            return path.stat().st_size if path is not None else 0
        except FileNotFoundError:
            return 0  # it has not arrived

    def updated_at(self) -> str | None:
        return None
