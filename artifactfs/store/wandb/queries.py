"""The GraphQL documents that are sent. Each asks for no more than W&B's own client does of the same operation."""

from __future__ import annotations

_PROJECT = "project { name entity { name } }"
_COLLECTION = f"__typename name {_PROJECT}"
_FIELDS = f"""id artifactSequence {{ {_COLLECTION} }} versionIndex artifactType {{ name }} description metadata
ttlDurationSeconds ttlIsInherited tags {{ id name }} state size digest commitHash fileCount createdAt updatedAt
aliases {{ id alias artifactCollection {{ {_COLLECTION} }} }}"""
_RUN = f"__typename id name {_PROJECT}"
_MADE_BY = f"createdBy {{ __typename ... on Run {{ {_RUN} }} }}"
_WHOLE_COLLECTION = f"""__typename id name description createdAt updatedAt {_PROJECT} type: defaultArtifactType {{ name }}
tags {{ edges {{ node {{ id name }} }} }}"""
_PAGE = "pageInfo { endCursor hasNextPage }"

VIEWER = "query Viewer { viewer { id entity username teams { edges { node { name } } } } }"

PROJECTS = f"""query GetProjects($entity: String!, $cursor: String, $perPage: Int = 50) {{
  models(entityName: $entity, after: $cursor, first: $perPage) {{ {_PAGE} edges {{ node {{ name }} }} }} }}"""

MEMBERSHIP = f"""query ArtifactMembershipByName($entity: String!, $project: String!, $name: String!) {{
  project(name: $project, entityName: $entity) {{ artifactCollectionMembership(name: $name) {{
    id versionIndex createdAt aliases {{ id alias }} artifactCollection {{ {_COLLECTION} }}
    artifact {{ {_FIELDS} {_MADE_BY} }} }} }} }}"""

ARTIFACT = f"query ArtifactByID($id: ID!) {{ artifact(id: $id) {{ {_FIELDS} {_MADE_BY} }} }}"

MANIFEST = "query FetchArtifactManifest($id: ID!) { artifact(id: $id) { currentManifest { file { directUrl } } } }"

COLLECTION = f"""query ProjectArtifactCollection($entity: String!, $project: String!, $type: String!, $name: String!) {{
  project(entityName: $entity, name: $project) {{ artifactType(name: $type) {{
    artifactCollection(name: $name) {{ {_WHOLE_COLLECTION} }} }} }} }}"""

TYPES = f"""query ProjectArtifactTypes($entity: String!, $project: String!, $cursor: String, $perPage: Int = 100) {{
  project(name: $project, entityName: $entity) {{
    artifactTypes(after: $cursor, first: $perPage) {{ {_PAGE} edges {{ node {{ id name }} }} }} }} }}"""

COLLECTIONS = f"""query ArtifactTypeArtifactCollections($entity: String!, $project: String!, $type: String!, $cursor: String,
    $perPage: Int = 100) {{
  project(entityName: $entity, name: $project) {{ artifactType(name: $type) {{
    artifactCollections(after: $cursor, first: $perPage) {{ {_PAGE} edges {{ node {{ {_WHOLE_COLLECTION} }} }} }} }} }} }}"""

VERSIONS = f"""query ProjectArtifacts($entity: String!, $project: String!, $type: String!, $collection: String!, $cursor: String,
    $perPage: Int = 100, $order: String, $filters: JSONString) {{
  project(entityName: $entity, name: $project) {{ artifactType(name: $type) {{ artifactCollection(name: $collection) {{
    __typename artifacts(after: $cursor, first: $perPage, order: $order, filters: $filters) {{
      {_PAGE} edges {{ version node {{ {_FIELDS} {_MADE_BY} }} }} }} }} }} }} }}"""

LINKED = f"""query FetchLinkedArtifacts($artifactID: ID!) {{ artifact(id: $artifactID) {{ artifactMemberships {{ edges {{ node {{
  versionIndex createdAt aliases {{ id alias }} artifactCollection {{ {_COLLECTION} }} }} }} }} }} }}"""

FILES = f"""query ArtifactMembershipFiles($entity: String!, $project: String!, $collection: String!, $alias: String!,
    $fileNames: [String!], $cursor: String, $perPage: Int = 50) {{
  project(name: $project, entityName: $entity) {{ artifactCollection(name: $collection) {{ __typename
    artifactMembership(aliasName: $alias) {{ files(names: $fileNames, after: $cursor, first: $perPage) {{
      {_PAGE} edges {{ node {{ id name: displayName directUrl }} }} }} }} }} }} }}"""

FILE_URLS = f"""query GetArtifactMembershipFileUrls($entity: String!, $project: String!, $collection: String!, $alias: String!,
    $cursor: String, $perPage: Int) {{
  project(name: $project, entityName: $entity) {{ artifactCollection(name: $collection) {{ __typename
    artifactMembership(aliasName: $alias) {{ files(after: $cursor, first: $perPage) {{
      {_PAGE} edges {{ node {{ name directUrl }} }} }} }} }} }} }}"""

ORGANIZATION = """query FetchOrgInfoFromEntity($entity: String!) { entity(name: $entity) {
  organization { name orgEntity { name } } user { organizations { name orgEntity { name } } } } }"""

FEATURES = "query ServerFeaturesQuery { serverInfo { features { name isEnabled } } }"

XXHASH_ENABLED = "query XXHashDigestsEnabled($entityName: String!) { entity(name: $entityName) { xxhashDigestsEnabled } }"

DIGEST_ALGORITHM = """query FetchArtifactDigestAlgorithm($entityName: String!, $projectName: String!, $artifactTypeName: String!,
    $artifactCollectionName: String!) {
  project(name: $projectName, entityName: $entityName) { artifactType(name: $artifactTypeName) {
    artifactCollection(name: $artifactCollectionName) { __typename ... on ArtifactSequence { digestAlgorithm } } } } }"""

CLIENT_ID = "query ClientIDMapping($clientID: ID!) { clientIDMapping(clientID: $clientID) { serverID } }"

_SOME = f"(first: 50) {{ {_PAGE} edges {{ node {{ id versionIndex artifactSequence {{ {_COLLECTION} }} }} }} }}"
_WHOLE_RUN = f"""projectId id name displayName state config group jobType createdAt heartbeatAt {_PROJECT}
outputArtifacts{_SOME} inputArtifacts{_SOME}"""
USED_BY = f"query ArtifactUsedBy($id: ID!) {{ artifact(id: $id) {{ usedBy {{ edges {{ node {{ {_WHOLE_RUN} }} }} }} }} }}"
RUN = f"""query Run($project: String!, $entity: String!, $name: String!) {{
  project(name: $project, entityName: $entity) {{ run(name: $name) {{ {_WHOLE_RUN} }} }} }}"""
RUNS = f"""query Runs($project: String!, $entity: String!, $cursor: String, $perPage: Int = 50, $order: String,
    $filters: JSONString) {{
  project(name: $project, entityName: $entity) {{ runs(filters: $filters, after: $cursor, first: $perPage, order: $order) {{
    {_PAGE} edges {{ node {{ {_WHOLE_RUN} }} cursor }} }} }} }}"""

_RUN_ARTIFACTS = """query {name}($entity: String!, $project: String!, $run: String!, $cursor: String, $perPage: Int = 100) {{
  project(name: $project, entityName: $entity) {{ run(name: $run) {{ id name {field}(after: $cursor, first: $perPage) {{
    {page} edges {{ node {{ {fields} }} }} }} }} }} }}"""
RUN_INPUTS = _RUN_ARTIFACTS.format(name="RunInputArtifacts", field="inputArtifacts", page=_PAGE, fields=_FIELDS)
RUN_OUTPUTS = _RUN_ARTIFACTS.format(name="RunOutputArtifacts", field="outputArtifacts", page=_PAGE, fields=_FIELDS)

ADD_ALIASES = "mutation AddAliases($input: AddAliasesInput!) { result: addAliases(input: $input) { success } }"
DELETE_ALIASES = "mutation DeleteAliases($input: DeleteAliasesInput!) { result: deleteAliases(input: $input) { success } }"
UPDATE_ARTIFACT = f"""mutation UpdateArtifact($input: UpdateArtifactInput!) {{
  result: updateArtifact(input: $input) {{ artifact {{ {_FIELDS} }} }} }}"""
LINK = "mutation LinkArtifact($input: LinkArtifactInput!) { result: linkArtifact(input: $input) { versionIndex } }"
UNLINK = "mutation UnlinkArtifact($input: UnlinkArtifactInput!) { result: unlinkArtifact(input: $input) { success } }"
DELETE = "mutation DeleteArtifact($input: DeleteArtifactInput!) { result: deleteArtifact(input: $input) { artifact { id } } }"
USE = "mutation UseArtifact($input: UseArtifactInput!) { useArtifact(input: $input) { artifact { id } } }"
UPSERT_RUN = """mutation UpsertBucket($id: String, $name: String, $project: String, $entity: String, $groupName: String,
    $description: String, $displayName: String, $notes: String, $commit: String, $config: JSONString, $host: String,
    $debug: Boolean, $program: String, $repo: String, $jobType: String, $state: String, $sweep: String, $tags: [String!],
    $summaryMetrics: JSONString) {
  upsertBucket(input: {id: $id, name: $name, groupName: $groupName, modelName: $project, entityName: $entity,
      description: $description, displayName: $displayName, notes: $notes, config: $config, commit: $commit, host: $host,
      debug: $debug, jobProgram: $program, jobRepo: $repo, jobType: $jobType, state: $state, sweep: $sweep, tags: $tags,
      summaryMetrics: $summaryMetrics}) {
    bucket { id name displayName description config sweepName project { id name entity { id name } } historyLineCount }
    inserted } }"""

_EDIT = """mutation {name}($input: {type}!) {{
  result: {field}(input: $input) {{ artifactCollection {{ __typename id name }} }} }}"""
EDIT_SEQUENCE = _EDIT.format(name="UpdateArtifactSequence", type="UpdateArtifactSequenceInput", field="updateArtifactSequence")
EDIT_PORTFOLIO = _EDIT.format(
    name="UpdateArtifactPortfolio", type="UpdateArtifactPortfolioInput", field="updateArtifactPortfolio"
)
MOVE_SEQUENCE = _EDIT.format(name="UpdateArtifactSequenceType", type="MoveArtifactSequenceInput", field="moveArtifactSequence")
ADD_TAGS = """mutation AddArtifactCollectionTags($input: CreateArtifactCollectionTagAssignmentsInput!) {
  result: createArtifactCollectionTagAssignments(input: $input) { tags { id name } } }"""
DELETE_TAGS = """mutation DeleteArtifactCollectionTags($input: DeleteArtifactCollectionTagAssignmentsInput!) {
  result: deleteArtifactCollectionTagAssignments(input: $input) { success } }"""
DELETE_SEQUENCE = """mutation DeleteArtifactSequence($id: ID!) {
  result: deleteArtifactSequence(input: {artifactSequenceID: $id}) { artifactCollection { __typename state } } }"""
DELETE_PORTFOLIO = """mutation DeleteArtifactPortfolio($id: ID!) {
  result: deleteArtifactPortfolio(input: {artifactPortfolioID: $id}) { artifactCollection { __typename state } } }"""

CREATE = """mutation CreateArtifact($input: CreateArtifactInput!) { createArtifact(input: $input) {
  artifact { id state artifactSequence { latestArtifact { id } } } } }"""
CREATE_MANIFEST = """mutation CreateArtifactManifest($artifactID: ID!, $baseArtifactID: ID, $name: String!, $digest: String!,
    $entityName: String!, $projectName: String!, $runName: String!, $manifestType: ArtifactManifestType!,
    $includeUpload: Boolean!) {
  createArtifactManifest(input: {artifactID: $artifactID, baseArtifactID: $baseArtifactID, name: $name, digest: $digest,
      entityName: $entityName, projectName: $projectName, runName: $runName, type: $manifestType}) {
    artifactManifest { id file { id uploadUrl @include(if: $includeUpload) uploadHeaders @include(if: $includeUpload) } } } }"""
UPDATE_MANIFEST = """mutation UpdateArtifactManifest($artifactManifestID: ID!, $digest: String, $baseArtifactID: ID,
    $includeUpload: Boolean!) {
  updateArtifactManifest(input: {artifactManifestID: $artifactManifestID, digest: $digest, baseArtifactID: $baseArtifactID}) {
    artifactManifest { id file { id uploadUrl @include(if: $includeUpload) uploadHeaders @include(if: $includeUpload) } } } }"""
CREATE_FILES = """mutation CreateArtifactFiles($input: CreateArtifactFilesInput!) { createArtifactFiles(input: $input) {
  files { edges { node { storagePath uploadUrl uploadHeaders
    uploadMultipartUrls { uploadID uploadUrlParts { partNumber uploadUrl } } artifact { id } } } } } }"""
COMPLETE_MULTIPART = """mutation CompleteMultipartUploadArtifact($completeMultipartAction: CompleteMultipartAction!,
    $completedParts: [UploadPartsInput!]!, $artifactID: ID!, $storagePath: String!, $uploadID: String!) {
  completeMultipartUploadArtifact(input: {completeMultipartAction: $completeMultipartAction, completedParts: $completedParts,
      artifactID: $artifactID, storagePath: $storagePath, uploadID: $uploadID}) { digest } }"""
COMMIT = """mutation CommitArtifact($artifactID: ID!) {
  commitArtifact(input: {artifactID: $artifactID}) { artifact { id digest } } }"""
