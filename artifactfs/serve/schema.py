"""The GraphQL schema as far as ``wandb`` clients use it for artifacts, and its execution within bounds.

Documents are executed generically. What a document asks for beyond the schema is left out of the answer, as clients of other
versions expect; so documents are not validated against the schema, and every argument and variable is plain JSON, which the
resolvers check. Before anything runs, a document is measured: bytes, tokens, depth, selections (fragments counted where they are
spread) and aliases; while it runs, the fields that were resolved, and time.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
import time
from typing import Any

from graphql import (
    DocumentNode,
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    GraphQLError,
    GraphQLResolveInfo,
    InlineFragmentNode,
    NamedTypeNode,
    NameNode,
    OperationDefinitionNode,
    OperationType,
    SelectionSetNode,
    Visitor,
    build_schema,
    execute_sync,
    parse,
    visit,
)

from artifactfs.errors import ArtifactFSError, UsageError
from artifactfs.serve.service import Context

log = logging.getLogger(__name__)

MAX_DOCUMENT = 128 << 10
"""Characters of a document. The client's largest is 5,000."""
_MAX_KEPT = 8 << 10
"""Characters of a document whose parsed form, a hundred times as large, is kept."""
MAX_TOKENS = 20_000
MAX_DEPTH = 24
"""Levels of selection sets. The client's deepest has 13."""
MAX_SELECTIONS = 2_000
MAX_ALIASES = 100
MAX_ROOTS = 20
"""Fields at the top: each is an operation of its own."""
MAX_RESOLVED = 2_000_000
"""Fields that one request may resolve: 5,000 files have 60,000."""
MAX_SECONDS = 25.0
"""The client gives an attempt 30 seconds. A mutation that has begun goes on, whatever the time."""

_CONNECTIONS = """ArtifactMembership:ArtifactCollectionMembership Artifact ArtifactCollection ArtifactType ArtifactAlias File Run
Project Tag User:User Team:Entity Sweep ApiKey"""


def _connections() -> str:
    text = []
    for word in _CONNECTIONS.split():
        name, _, node = word.partition(":")
        extra = " version: String" if name == "Artifact" else ""
        text.append(
            f"type {name}Connection {{ totalCount: Int pageInfo: PageInfo edges: [{name}Edge] }}\n"
            f"type {name}Edge {{ cursor: String node: {node or name}{extra} }}"
        )
    return "\n".join(text)


_MUTATIONS = """
createArtifact: artifact: Artifact
createArtifactManifest: artifactManifest: ArtifactManifest
updateArtifactManifest: artifactManifest: ArtifactManifest
createArtifactFiles: files: FileConnection
completeMultipartUploadArtifact: digest: String
commitArtifact: artifact: Artifact
useArtifact: artifact: Artifact
updateArtifact: artifact: Artifact
deleteArtifact: artifact: Artifact
addAliases: success: Boolean
deleteAliases: success: Boolean
linkArtifact: versionIndex: Int artifactMembership: ArtifactCollectionMembership
unlinkArtifact: success: Boolean
updateArtifactSequence: artifactCollection: ArtifactCollection
updateArtifactPortfolio: artifactCollection: ArtifactCollection
moveArtifactSequence: artifactCollection: ArtifactCollection
deleteArtifactSequence: artifactCollection: ArtifactCollection
deleteArtifactPortfolio: artifactCollection: ArtifactCollection
createArtifactCollectionTagAssignments: tags: [Tag]
deleteArtifactCollectionTagAssignments: success: Boolean
upsertModel: inserted: Boolean project: Project model: Project
renameProject: inserted: Boolean project: Project model: Project
deleteModel: success: Boolean
upsertBucket: bucket: Run inserted: Boolean
createRunFiles: runID: ID uploadHeaders: [String] files: [File]
markRunFilesUploaded: success: Boolean
"""


def _mutations() -> str:
    """Each mutation has one input and a payload type of its own, whose name clients know."""
    fields, payloads = [], []
    for line in _MUTATIONS.strip().splitlines():
        name, _, payload = line.partition(": ")
        kind = f"{name[0].upper()}{name[1:]}Payload"
        fields.append(f"  {name}(input: JSON): {kind}")
        payloads.append(f"type {kind} {{ clientMutationId: String {payload} }}")
    return "type Mutation {\n" + "\n".join(fields) + "\n}\n" + "\n".join(payloads)


_LISTING = "(first: JSON, after: JSON, filters: JSON, order: JSON)"
_COLLECTION = f"""
  id: ID name: String description: String createdAt: String updatedAt: String state: String project: Project
  defaultArtifactType: ArtifactType tags{_LISTING}: TagConnection aliases{_LISTING}: ArtifactAliasConnection
  artifacts{_LISTING}: ArtifactConnection artifactMembership(aliasName: JSON): ArtifactCollectionMembership
  artifactMemberships{_LISTING}: ArtifactMembershipConnection
"""
_PROJECT = "(name: JSON, entityName: JSON)"
_FILES = "(first: JSON, after: JSON, names: JSON)"

_SDL = f"""
scalar JSON
scalar Int64
type PageInfo {{ endCursor: String hasNextPage: Boolean }}
type Query {{
  viewer: User
  serverInfo: ServerInfo
  entity(name: JSON): Entity
  organization(name: JSON): Organization
  project{_PROJECT}: Project
  model{_PROJECT}: Project
  models(entityName: JSON, first: JSON, after: JSON): ProjectConnection
  artifact(id: JSON): Artifact
  artifactCollection(id: JSON): ArtifactCollection
  clientIDMapping(clientID: JSON): ClientIDMapping
}}
type ServerInfo {{ features: [ServerFeature] cliVersionInfo: JSON latestLocalVersionInfo: JSON }}
type ServerFeature {{ name: String isEnabled: Boolean }}
type ClientIDMapping {{ serverID: ID }}
type User {{
  id: ID name: String entity: String username: String email: String flags: JSON admin: Boolean deletedAt: String
  teams: TeamConnection organizations: [Organization] apiKeys: ApiKeyConnection
}}
type ApiKey {{ id: ID name: String description: String }}
type Entity {{
  id: ID name: String entityType: String isTeam: Boolean available: Boolean xxhashDigestsEnabled: Boolean
  organization: Organization user: User project(name: JSON): Project
  projects{_LISTING}: ProjectConnection
  artifactCollections(projectFilters: JSON, filters: JSON, collectionTypes: JSON, first: JSON, after: JSON, order: JSON):
    ArtifactCollectionConnection
  artifactMemberships(projectFilters: JSON, collectionFilters: JSON, filters: JSON, first: JSON, after: JSON, order: JSON):
    ArtifactMembershipConnection
}}
type Organization {{ id: ID name: String orgEntity: Entity }}
type Project {{
  id: ID internalId: ID name: String entityName: String entity: Entity description: String createdAt: String updatedAt: String
  access: String readOnly: Boolean isBenchmark: Boolean user: User views: JSON allowAllArtifactTypesInRegistry: Boolean
  artifact(name: JSON): Artifact
  artifactCollectionMembership(name: JSON): ArtifactCollectionMembership
  artifactCollection(name: JSON): ArtifactCollection
  artifactCollections{_LISTING}: ArtifactCollectionConnection
  artifactType(name: JSON): ArtifactType
  artifactTypes(first: JSON, after: JSON, includeAll: JSON): ArtifactTypeConnection
  run(name: JSON): Run
  bucket(name: JSON, missingOk: JSON): Run
  runs{_LISTING}: RunConnection
  runCount(filters: JSON): Int
  totalSweeps: Int
  sweeps(first: JSON, after: JSON, filters: JSON): SweepConnection
  sweep(sweepName: JSON): Sweep
}}
type Sweep {{ id: ID name: String }}
type ArtifactType {{
  id: ID name: String description: String createdAt: String
  artifactCollection(name: JSON): ArtifactCollection
  artifactCollections{_LISTING}: ArtifactCollectionConnection
}}
interface ArtifactCollection {{ {_COLLECTION} }}
type ArtifactSequence implements ArtifactCollection {{ {_COLLECTION} latestArtifact: Artifact digestAlgorithm: String }}
type ArtifactPortfolio implements ArtifactCollection {{ {_COLLECTION} }}
type ArtifactAlias {{ id: ID alias: String artifactCollection: ArtifactCollection }}
type Tag {{ id: ID name: String }}
type ArtifactCollectionMembership {{
  id: ID versionIndex: Int createdAt: String aliases: [ArtifactAlias] artifactCollection: ArtifactCollection artifact: Artifact
  files{_FILES}: FileConnection
}}
type Artifact {{
  id: ID artifactSequence: ArtifactSequence versionIndex: Int artifactType: ArtifactType description: String metadata: JSON
  ttlDurationSeconds: Int64 ttlIsInherited: Boolean tags: [Tag] historyStep: Int state: String size: Int64 digest: String
  digestAlgorithm: String commitHash: String fileCount: Int64 createdAt: String updatedAt: String aliases: [ArtifactAlias]
  currentManifest: ArtifactManifest artifactMemberships{_LISTING}: ArtifactMembershipConnection
  usedBy{_LISTING}: RunConnection createdBy: RunOrUser files{_FILES}: FileConnection
  filesByManifestEntries(storageLayout: JSON, manifestVersion: JSON, entries: JSON, storageRegion: JSON): FileConnection
}}
type ArtifactManifest {{ id: ID digest: String file: File }}
type File {{
  id: ID name: String displayName: String url: String directUrl: String sizeBytes: Int64 storagePath: String mimetype: String
  updatedAt: String digest: String md5: String uploadUrl: String uploadHeaders: [String] uploadMultipartUrls: MultipartUrls
  artifact: Artifact
}}
type MultipartUrls {{ uploadID: ID uploadUrlParts: [UploadPart] }}
type UploadPart {{ partNumber: Int uploadUrl: String }}
union RunOrUser = Run | User
type Run {{
  id: ID name: String displayName: String description: String notes: String config: JSON state: String group: String
  jobType: String commit: String readOnly: Boolean createdAt: String heartbeatAt: String updatedAt: String tags: [String]
  sweepName: String summaryMetrics: JSON systemMetrics: JSON historyLineCount: Int logLineCount: Int eventsLineCount: Int
  historyTail: JSON eventsTail: JSON historyKeys: JSON wandbConfig(keys: JSON): JSON user: User project: Project projectId: ID
  stopped: Boolean fileCount: Int
  inputArtifacts{_LISTING}: ArtifactConnection outputArtifacts{_LISTING}: ArtifactConnection
  files(first: JSON, after: JSON, names: JSON, pattern: JSON): FileConnection
}}
{_mutations()}
{_connections()}
"""


@functools.cache
def schema() -> Any:
    """The schema, built once."""
    return build_schema(_SDL)


@dataclasses.dataclass(slots=True)
class Operation:
    """A document that may run."""

    document: DocumentNode
    name: str | None
    kind: str
    label: str
    """The first field at the top, if the schema has it: what logs and metrics call the request."""


class _Measure:
    """Counts what a document would select, without executing it."""

    def __init__(self, document: DocumentNode) -> None:
        self._fragments = {it.name.value: it for it in document.definitions if isinstance(it, FragmentDefinitionNode)}
        self._known: dict[str, tuple[int, int, int]] = {}
        self._open: set[str] = set()

    def of(self, selections: SelectionSetNode | None) -> tuple[int, int, int]:
        """(depth, selections, aliases) of a selection set."""
        if selections is None:
            return 0, 0, 0
        depth = count = aliases = 0
        for selection in selections.selections:
            if isinstance(selection, FragmentSpreadNode):
                below = self._fragment(selection.name.value)
            elif isinstance(selection, InlineFragmentNode):
                below = self.of(selection.selection_set)
            else:
                assert isinstance(selection, FieldNode)
                inner = self.of(selection.selection_set)
                below = (inner[0] + 1, inner[1] + 1, inner[2] + (selection.alias is not None))
            depth, count, aliases = max(depth, below[0]), count + below[1], aliases + below[2]
            if depth > MAX_DEPTH or count > MAX_SELECTIONS or aliases > MAX_ALIASES:
                raise UsageError(
                    f"the GraphQL document is too large: at most {MAX_DEPTH} levels, {MAX_SELECTIONS} selections and "
                    f"{MAX_ALIASES} aliases can be"
                )
        return depth, count, aliases

    def _fragment(self, name: str) -> tuple[int, int, int]:
        if name in self._open:
            raise UsageError(f"the GraphQL fragment {name[:40]!r} holds itself")
        if name not in self._known:
            found = self._fragments.get(name)
            if found is None:
                raise UsageError(f"the GraphQL fragment {name[:40]!r} is not defined")
            self._open.add(name)
            self._known[name] = self.of(found.selection_set)
            self._open.discard(name)
        return self._known[name]


class _PlainVariables(Visitor):
    """Gives every variable the one input type that we have."""

    def enter_variable_definition(self, node: Any, *_: Any) -> Any:
        return type(node)(
            variable=node.variable,
            type=NamedTypeNode(name=NameNode(value="JSON")),
            default_value=node.default_value,
            directives=(),
        )


@functools.lru_cache(maxsize=128)
def _parsed_once(text: str) -> DocumentNode:
    return _parse(text)


def _parsed(text: str) -> DocumentNode:
    """Clients send the same documents again and again; what is kept of them is bounded, in number and in size."""
    return _parsed_once(text) if len(text) <= _MAX_KEPT else _parse(text)


def _parse(text: str) -> DocumentNode:
    try:
        document = parse(text, no_location=True, max_tokens=MAX_TOKENS)
    except GraphQLError as error:
        raise UsageError(f"the GraphQL document cannot be parsed: {error.message[:200]}") from None
    except RecursionError:
        raise UsageError("the GraphQL document is nested too deep") from None
    measure = _Measure(document)
    try:
        for definition in document.definitions:
            if isinstance(definition, OperationDefinitionNode):
                measure.of(definition.selection_set)
                if len(definition.selection_set.selections) > MAX_ROOTS:
                    raise UsageError(f"the GraphQL document has more than {MAX_ROOTS} operations at the top")
            elif not isinstance(definition, FragmentDefinitionNode):
                raise UsageError("the GraphQL document defines types; it may hold operations and fragments only")
        return visit(document, _PlainVariables())  # type: ignore[no-any-return]
    except RecursionError:
        raise UsageError("the GraphQL document is nested too deep") from None


def prepare(text: str, name: str | None) -> Operation:
    """A document, measured and ready to run. UsageError for one that cannot be, or is too large."""
    if len(text) > MAX_DOCUMENT:
        raise UsageError(f"the GraphQL document has {len(text)} characters; at most {MAX_DOCUMENT} can be")
    document = _parsed(text)
    operations = [it for it in document.definitions if isinstance(it, OperationDefinitionNode)]
    chosen = [it for it in operations if name is None or (it.name is not None and it.name.value == name)]
    if len(chosen) != 1:
        raise UsageError("the GraphQL request must name one operation of its document")
    operation = chosen[0]
    if operation.operation is OperationType.SUBSCRIPTION:
        raise UsageError("this server has no GraphQL subscriptions")
    if operation.operation is OperationType.MUTATION:
        _check_known(operation)
    return Operation(document, name, operation.operation.value, _label(operation))


def _check_known(operation: OperationDefinitionNode) -> None:
    """UsageError for a mutation that we do not have: who leaves it out of the answer lets its caller believe that it was done."""
    known = schema().mutation_type.fields
    for selection in operation.selection_set.selections:
        name = selection.name.value if isinstance(selection, FieldNode) else "a fragment"
        if name not in known and name != "__typename":
            raise UsageError(f"this server has no mutation {name[:60]!r}; artifactfs serves artifacts, not all of W&B")


def _label(operation: OperationDefinitionNode) -> str:
    root = schema().mutation_type if operation.operation is OperationType.MUTATION else schema().query_type
    for selection in operation.selection_set.selections:
        if isinstance(selection, FieldNode) and selection.name.value in root.fields:
            return str(selection.name.value)
    return "other"


@dataclasses.dataclass(slots=True)
class _Run:
    """One execution. ``left`` are the fields that may still be resolved."""

    end: float
    left: int = MAX_RESOLVED
    broken: bool = False
    """Something failed that is our own fault."""


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """``body`` is what is sent. ``failed``: there are errors; ``broken``: through a fault of ours."""

    body: dict[str, Any]
    failed: bool
    broken: bool


def execute(operation: Operation, root: Any, context: Context, variables: dict[str, Any]) -> Answer:
    """Run a document. Never raises: what fails is in the answer, in one line, without anything of the server in it."""
    run = _Run(time.monotonic() + MAX_SECONDS)
    try:
        result = execute_sync(
            schema(),
            operation.document,
            root_value=root,
            context_value=run,
            variable_values=variables,
            operation_name=operation.name,
            field_resolver=_resolve,
            type_resolver=_resolve_type,
        )
    except RecursionError:
        return Answer({"data": None, "errors": [{"message": "the GraphQL document is nested too deep"}]}, True, False)
    body: dict[str, Any] = {"data": result.data}
    if result.errors:
        body["errors"] = [_shown(error, run, context) for error in result.errors[:20]]
    return Answer(body, bool(result.errors), run.broken)


def _shown(error: GraphQLError, run: _Run, context: Context) -> dict[str, Any]:
    cause = error.original_error
    shown: dict[str, Any] = {"path": error.path} if error.path else {}
    if cause is None:
        return {"message": error.message[:500], **shown}
    if isinstance(cause, (ArtifactFSError, GraphQLError)):
        return {"message": str(cause), **shown}
    run.broken = True
    log.error("request %s failed", context.request, exc_info=cause)
    return {"message": f"the server failed; its log says more about request {context.request}", **shown}


_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


@functools.lru_cache(maxsize=4096)
def snake(name: str) -> str:
    """``usedBy`` as ``used_by``, ``artifactID`` as ``artifact_id``."""
    return _WORDS.sub("_", name).lower()


def _resolve(source: Any, info: GraphQLResolveInfo[_Run], **arguments: Any) -> Any:
    """The attribute, or method, of the node that has the field's name; None where it has none."""
    run = info.context
    run.left -= 1
    if run.left < 0:
        raise UsageError("the GraphQL request asks for too much at once; ask for smaller pages")
    if not run.left & 63 and time.monotonic() > run.end:
        raise UsageError("the GraphQL request takes too long; ask for smaller pages")
    value = getattr(source, snake(info.field_name), None)
    if not callable(value):
        return value
    if time.monotonic() > run.end and info.path.prev is not None:
        raise UsageError("the GraphQL request takes too long; ask for smaller pages")
    return value(**{snake(name): value for name, value in arguments.items()})


def _resolve_type(value: Any, *_: Any) -> str:
    return str(value.graphql_type)
