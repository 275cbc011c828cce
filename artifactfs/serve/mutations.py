"""The mutations: each checks what it was sent and what the caller may do, and has the store do it.

Who may not read an entity is told that it does not exist; who may only read it, that the key has no right to write.
"""

from __future__ import annotations

import base64
import binascii
import secrets
from typing import Any

import msgspec

from artifactfs.edits import Edits
from artifactfs.errors import ConflictError, NotFoundError, NotPermittedError, UsageError
from artifactfs.links import organization_of
from artifactfs.manifest import version_id
from artifactfs.model import MAX_TTL, MD5, XXH128, Collection, Run, Version
from artifactfs.names import (
    LATEST,
    ArtifactName,
    check_alias,
    check_collection,
    check_entity,
    check_metadata,
    check_new_alias,
    check_project,
    check_tags,
    check_type,
    entry_path,
    expires,
    is_registry,
)
from artifactfs.serve.inputs import Input
from artifactfs.serve.nodes import (
    CollectionNode,
    Connection,
    Edge,
    Fieldset,
    MembershipNode,
    PendingNode,
    ProjectNode,
    RunFileNode,
    RunNode,
    UploadNode,
    VersionNode,
    default_entity,
    find_collection,
    id_parts,
    name_of,
    tag_node,
)
from artifactfs.serve.saving import (
    FULL,
    KINDS,
    Announced,
    announce_files,
    commit,
    complete_parts,
    create,
    find_artifact,
    find_version,
    load_run,
    part_object,
    pending_id,
    writable_pending,
)
from artifactfs.serve.service import Context
from artifactfs.serve.state import Fields, Manifest, Multipart, Pending, Uploaded
from artifactfs.store.native import now

_INHERIT = -1
_DISABLED = -2
_MAX_PARTS = 10_000
_MAX_CONFIG = 4 << 20
MAX_NAMES = 200


class Mutation:
    """The fields at the top of a mutation."""

    def __init__(self, context: Context) -> None:
        self._context = context

    # Logging

    def create_artifact(self, input: Any = None) -> Fieldset:
        """A version to upload, or the one that has the digest already."""
        given = Input(input)
        name = self._collection_name(given, given.text("artifactCollectionName", 1024))
        self._need_write(name.entity)
        algorithm = XXH128 if given.optional("digestAlgorithm", 64) in ("MANIFEST_XXH128", XXH128) else MD5
        announced = Pending(
            id=secrets.token_hex(16),
            name=name,
            type=check_type(given.text("artifactTypeName", 1024), name.collection, reserved=True),
            digest=given.text("digest", 64),
            algorithm=algorithm,
            fields=self._fields(given, name),
            client=given.optional("clientID", 1024) or "",
            distributed=given.optional("distributedID", 1024) or "",
            since=max(self._context.store.numbers(name), default=-1),
            result="",
            created_at=now(),
        )
        made = create(self._context, announced, given.flag("enableDigestDeduplication", False))
        return Fieldset(artifact=self._artifact(made))

    def _fields(self, given: Input, name: ArtifactName) -> Fields:
        aliases = []
        for alias in given.objects("aliases"):
            if alias.optional("artifactCollectionName", 1024) in (None, name.collection):
                text = alias.text("alias", 1024)
                aliases.append(text if text == LATEST else check_new_alias(text))
        run = given.optional("runName", 1024)
        ttl, inherited = _ttl(given)
        return Fields(
            description=given.optional("description"),
            metadata=check_metadata(given.json("metadata")),
            aliases=list(dict.fromkeys(aliases)),
            tags=check_tags(tag.text("tagName", 1024) for tag in given.objects("tags")),
            ttl=ttl,
            inherit_ttl=inherited,
            run=f"{name.entity}/{name.project}/{run}" if run else "",
        )

    def _artifact(self, found: Version | Pending) -> VersionNode | PendingNode:
        return PendingNode(self._context, found) if isinstance(found, Pending) else VersionNode(self._context, found)

    def create_artifact_manifest(self, input: Any = None) -> Fieldset:
        given = Input(input)
        pending = writable_pending(self._context, given.text("artifactID", 1024))
        kind = given.optional("type", 64) or FULL
        if kind not in KINDS:
            raise UsageError(f"manifest type {kind[:40]!r} is not known; it is one of {', '.join(KINDS)}")
        manifest = Manifest(
            id=secrets.token_hex(16),
            artifact=pending.id,
            kind=kind,
            name=given.optional("name", 1024) or "",
            digest=_md5(given.optional("digest", 64)),
            base=self._base(given.optional("baseArtifactID", 1024)),
        )
        self._context.state.add_manifest(manifest)
        return self._manifest(manifest)

    def _base(self, id: str | None) -> str:
        """The id of a base, which the caller may read; "" for none, and for one that is gone."""
        if not id:
            return ""
        try:
            return version_id(find_version(self._context, id))
        except NotFoundError:
            return ""

    def update_artifact_manifest(self, input: Any = None) -> Fieldset:
        given = Input(input)
        manifest = self._context.state.manifest(given.text("artifactManifestID", 1024))
        if manifest is None:
            raise NotFoundError("there is no artifact manifest of that id")
        writable_pending(self._context, pending_id(manifest.artifact))
        digest = _md5(given.optional("digest", 64)) or manifest.digest
        base = self._base(given.optional("baseArtifactID", 1024)) or manifest.base
        self._context.state.update_manifest(manifest.id, digest, base)
        return self._manifest(manifest._replace(digest=digest, base=base))

    def _manifest(self, manifest: Manifest) -> Fieldset:
        url = self._context.signed("PUT", "manifest-upload", (manifest.artifact, manifest.id), manifest.digest)
        headers = [f"Content-MD5:{manifest.digest}", "Content-Type:application/json"] if manifest.digest else []
        file = Fieldset(id=manifest.id, name=manifest.name, upload_url=url, upload_headers=headers)
        return Fieldset(artifact_manifest=Fieldset(id=manifest.id, digest=manifest.digest, file=file))

    def create_artifact_files(self, input: Any = None) -> Fieldset:
        given = Input(input)
        files = given.objects("artifactFiles")
        if not files:
            return Fieldset(files=Connection([], False, 0))
        pending = writable_pending(self._context, files[0].text("artifactID", 1024))
        if any(file.text("artifactID", 1024) != pending_id(pending.id) for file in files):
            raise UsageError("all files of one call must be of one artifact")
        announced = [
            Announced(entry_path(file.text("name", 8192)), file.optional("md5", 64) or "", file.optional("digest", 64) or "")
            for file in files
        ]
        if pending.algorithm == MD5:  # the digest is the MD5 then
            announced = [file._replace(md5=file.md5 or file.digest, digest="") for file in announced]
        self._context.state.touch(pending.id)
        noted = announce_files(self._context, pending, announced)
        nodes = [self._upload(pending, file, asked) for file, asked in zip(noted, files, strict=True)]
        return Fieldset(files=Connection([Edge(str(at), node) for at, node in enumerate(nodes)], False, len(nodes)))

    def _upload(self, pending: Pending, file: Uploaded, asked: Input) -> UploadNode:
        done = file.stored is not None or self._context.state.object_path(pending.id, file.object).exists()
        parts = asked.objects("uploadPartsInput")
        multipart = self._parts(pending, file, parts) if parts and not done else None
        return UploadNode(self._context, pending.id, file, multipart, done)

    def _parts(self, pending: Pending, file: Uploaded, parts: list[Input]) -> Fieldset:
        if len(parts) > _MAX_PARTS:
            raise UsageError(f"a file can be uploaded in {_MAX_PARTS} parts at most")
        wanted: dict[int, str] = {}
        for part in parts:
            number = part.number("partNumber", 1, _MAX_PARTS)
            md5 = part.text("hexMD5", 64).lower()
            if number is None or number in wanted or len(md5) != 32 or set(md5) - set("0123456789abcdef"):
                raise UsageError("each part needs a number of its own and a hexadecimal MD5")
            wanted[number] = md5
        upload = Multipart(secrets.token_hex(16), pending.id, file.object, wanted)
        self._context.state.add_multipart(upload)
        urls = []
        for number, md5 in sorted(wanted.items()):
            names = (pending.id, part_object(file.object, number))
            url = self._context.signed("PUT", "part", names, base64.b64encode(bytes.fromhex(md5)).decode())
            urls.append(Fieldset(part_number=number, upload_url=url))
        return Fieldset(upload_id=upload.id, upload_url_parts=urls)

    def complete_multipart_upload_artifact(self, input: Any = None) -> Fieldset:
        given = Input(input)
        action = given.optional("completeMultipartAction", 64) or "Complete"
        if action != "Complete":
            raise UsageError(f"completeMultipartAction {action[:40]!r} is not known; it is Complete")
        parts = []
        for part in given.objects("completedParts"):
            number = part.number("partNumber", 1, _MAX_PARTS)
            if number is None:
                raise UsageError("each completed part needs its number")
            parts.append((number, part.text("hexMD5", 128)))
        digest = complete_parts(self._context, given.text("artifactID", 1024), given.text("uploadID", 128), parts)
        return Fieldset(digest=digest)

    def commit_artifact(self, input: Any = None) -> Fieldset:
        return Fieldset(artifact=VersionNode(self._context, commit(self._context, Input(input).text("artifactID", 1024))))

    def use_artifact(self, input: Any = None) -> Fieldset:
        given = Input(input)
        version = find_version(self._context, given.text("artifactID", 1024))
        entity, project = self._project(given)
        self._need_write(entity)
        run = self._run(entity, project, given.text("runName", 1024))
        self._context.store.save_run(msgspec.structs.replace(run, used=[version.qualified_name], updated_at=now()))
        self._context.store.mark_used(version, run)
        return Fieldset(artifact=VersionNode(self._context, version))

    # Editing

    def update_artifact(self, input: Any = None) -> Fieldset:
        """Only what is given changes."""
        given = Input(input)
        version = self._writable_version(given.text("artifactID", 1024))
        name = name_of(version).at(version.name)
        added = check_tags(tag.text("tagName", 1024) for tag in given.objects("tagsToAdd"))
        removed = {tag.text("tagName", 1024) for tag in given.objects("tagsToDelete")}
        metadata = check_metadata(given.json("metadata")) if given.has("metadata") else None
        description = given.optional("description")
        ttl = _ttl(given) if given.has("ttlDurationSeconds") else None
        if ttl is not None and ttl[0] is not None:
            if not expires(version.type):
                raise UsageError(f"{version.qualified_name} has type {version.type!r}, which does not expire")
            if self._context.store.in_registry(version):
                raise UsageError(f"{version.qualified_name} is linked to a registry, where nothing expires")

        def change(current: Version) -> Version:
            edits = Edits(
                description=current.description if description is None else description,
                metadata=current.metadata if metadata is None else metadata,
                ttl=(current.ttl, current.ttl_inherited) if ttl is None else ttl,
                tags=list(dict.fromkeys([*(tag for tag in current.tags if tag not in removed), *added])),
            )
            return edits.onto(current, current)

        changed = self._context.store.update_version(name, change)
        return Fieldset(artifact=VersionNode(self._context, changed))

    def delete_artifact(self, input: Any = None) -> Fieldset:
        given = Input(input)
        found = find_artifact(self._context, given.text("artifactID", 1024))
        if isinstance(found, Pending):
            self._need_write(found.name.entity)
            self._context.state.discard(found.id)
            return Fieldset(artifact=PendingNode(self._context, found))
        self._need_write(found.entity)
        name = name_of(found).at(found.name)
        deleted = self._context.store.delete_version(name, given.flag("deleteAliases", False))
        self._context.service.forget_version(name)
        return Fieldset(artifact=Fieldset(id=version_id(deleted)))

    def add_aliases(self, input: Any = None) -> Fieldset:
        return self._change_aliases(Input(input), add=True)

    def delete_aliases(self, input: Any = None) -> Fieldset:
        return self._change_aliases(Input(input), add=False)

    def _change_aliases(self, given: Input, add: bool) -> Fieldset:
        version = find_version(self._context, given.text("artifactID", 1024))
        by_collection: dict[ArtifactName, list[str]] = {}
        for alias in given.objects("aliases"):
            name = self._collection_name(alias, alias.text("artifactCollectionName", 1024))
            self._need_write(name.entity)
            text = alias.text("alias", 1024)
            checked = text if text == LATEST else (check_new_alias(text) if add else check_alias(text))
            by_collection.setdefault(name, []).append(checked)
        for name, aliases in by_collection.items():
            self._set_aliases(version, name, aliases, add)
        return Fieldset(success=True)

    def _set_aliases(self, version: Version, name: ArtifactName, aliases: list[str], add: bool) -> None:
        number = self._number_in(version, name)

        def change(collection: Collection) -> Collection:
            if add:
                return msgspec.structs.replace(collection, aliases={**collection.aliases, **dict.fromkeys(aliases, number)})
            held = {key: at for key, at in collection.aliases.items() if at != number or key not in aliases or key == LATEST}
            return msgspec.structs.replace(collection, aliases=held)

        self._context.store.update_collection(name, change)

    def _number_in(self, version: Version, name: ArtifactName) -> int:
        """The number of a version in a collection: its own, or a portfolio."""
        if name_of(version) == name:
            return version.number
        for link in self._context.store.links_of(version):
            if name_of(link) == name:
                return link.number
        raise NotFoundError(f"{version.qualified_name} is not in {name.path}")

    # Links

    def link_artifact(self, input: Any = None) -> Fieldset:
        given = Input(input)
        version = self._linked(given)
        target = self._collection_name(given, given.text("artifactPortfolioName", 1024))
        if is_registry(target.project) and target.entity != organization_of(self._context.store, version.entity):
            raise UsageError(f"{version.entity} cannot link to a registry of {target.entity}: that is not its organization")
        self._need_write(target.entity)
        texts = [alias.text("alias", 1024) for alias in given.objects("aliases")]
        aliases = [text if text == LATEST else check_new_alias(text) for text in texts]
        link = self._context.store.link(version, target, aliases)
        return Fieldset(version_index=link.number, artifact_membership=MembershipNode(self._context, link))

    def _linked(self, given: Input) -> Version:
        if given.has("artifactID"):
            return find_version(self._context, given.text("artifactID", 1024))
        pending = self._context.state.by_client(given.text("clientID", 1024))
        if pending is None or not self._context.caller.can_read(pending.name.entity):
            raise NotFoundError("there is no artifact of that client id; log it first")
        return find_version(self._context, pending_id(pending.id))

    def unlink_artifact(self, input: Any = None) -> Fieldset:
        given = Input(input)
        version = find_version(self._context, given.text("artifactID", 1024))
        record = find_collection(self._context, given.text("artifactPortfolioID", 1024))
        self._need_write(record.entity)
        name = ArtifactName(record.entity, record.project, record.name)
        self._context.store.unlink(name.at(f"v{self._number_in(version, name)}"))
        return Fieldset(success=True)

    # Collections

    def update_artifact_sequence(self, input: Any = None) -> Fieldset:
        return self._update_collection(Input(input), "artifactSequenceID")

    def update_artifact_portfolio(self, input: Any = None) -> Fieldset:
        return self._update_collection(Input(input), "artifactPortfolioID")

    def _update_collection(self, given: Input, key: str) -> Fieldset:
        name, record = self._writable_collection(given.text(key, 1024))
        renamed = given.optional("name", 1024)
        if renamed is not None and renamed != record.name:
            raise UsageError(f"{record.path} cannot be renamed: its versions have its name; link them to {renamed[:128]!r}")
        description = given.optional("description")

        def change(current: Collection) -> Collection:
            return current if description is None else msgspec.structs.replace(current, description=description)

        return Fieldset(artifact_collection=CollectionNode(self._context, self._context.store.update_collection(name, change)))

    def move_artifact_sequence(self, input: Any = None) -> Fieldset:
        """Give a collection, and all its versions, another type."""
        given = Input(input)
        name, record = self._writable_collection(given.text("artifactSequenceID", 1024))
        if record.is_portfolio:
            raise UsageError(f"{record.path} is a portfolio: its type is that of what is linked into it")
        kind = check_type(given.text("destinationArtifactTypeName", 1024), record.name)
        store = self._context.store
        changed = store.update_collection(name, lambda current: msgspec.structs.replace(current, type=kind))
        for version in store.versions(name):
            if version.type != kind:
                store.update_version(name.at(version.name), lambda it: msgspec.structs.replace(it, type=kind))
        return Fieldset(artifact_collection=CollectionNode(self._context, changed))

    def delete_artifact_sequence(self, input: Any = None) -> Fieldset:
        return self._delete_collection(Input(input).text("artifactSequenceID", 1024))

    def delete_artifact_portfolio(self, input: Any = None) -> Fieldset:
        return self._delete_collection(Input(input).text("artifactPortfolioID", 1024))

    def _delete_collection(self, id: str) -> Fieldset:
        name, record = self._writable_collection(id)
        self._context.store.delete_collection(name)
        return Fieldset(artifact_collection=CollectionNode(self._context, msgspec.structs.replace(record, state="DELETED")))

    def create_artifact_collection_tag_assignments(self, input: Any = None) -> Fieldset:
        record = self._change_tags(Input(input), add=True)
        return Fieldset(tags=[tag_node(tag) for tag in record.tags])

    def delete_artifact_collection_tag_assignments(self, input: Any = None) -> Fieldset:
        self._change_tags(Input(input), add=False)
        return Fieldset(success=True)

    def _change_tags(self, given: Input, add: bool) -> Collection:
        name = self._collection_name(given, given.text("artifactCollectionName", 1024))
        self._need_write(name.entity)
        tags = check_tags(tag.text("tagName", 1024) for tag in given.objects("tags"))

        def change(current: Collection) -> Collection:
            kept = [tag for tag in current.tags if tag not in tags]
            return msgspec.structs.replace(current, tags=list(dict.fromkeys([*current.tags, *tags])) if add else kept)

        return self._context.store.update_collection(name, change)

    # Projects and registries

    def upsert_model(self, input: Any = None) -> Fieldset:
        given = Input(input)
        if given.has("id"):
            entity, project = id_parts(given.text("id", 2048), "Project", 2)
        else:
            entity, project = self._project(given, "name")
        self._need_write(entity)
        new = self._context.state.save_project(
            entity,
            project,
            description=given.optional("description", 65536),
            access=given.optional("access", 64),
        )
        if new:
            self._context.state.save_project(entity, project, created_at=now())
        node = ProjectNode(self._context, entity, project)
        return Fieldset(inserted=new, project=node, model=node)

    def rename_project(self, input: Any = None) -> Fieldset:
        given = Input(input)
        entity = given.optional("entityName", 1024) or default_entity(self._context)
        self._need_write(entity)
        raise UsageError(
            f"{given.optional('oldProjectName', 128) or 'the project'} cannot be renamed: its versions have its name"
        )

    def delete_model(self, input: Any = None) -> Fieldset:
        """Only a project without collections can go: versions are deleted by themselves."""
        entity, project = id_parts(Input(input).text("id", 2048), "Project", 2)
        self._need_write(entity)
        if self._context.store.collections(entity, project):
            raise ConflictError(f"{entity}/{project} has collections; delete these first")
        self._context.state.delete_project(entity, project)
        return Fieldset(success=True)

    # Runs

    def upsert_bucket(self, input: Any = None) -> Fieldset:
        given = Input(input)
        if given.has("id"):
            entity, project, id = id_parts(given.text("id", 2048), "Run", 3)
        else:
            entity, project = self._project(given, "modelName")
            id = given.text("name", 1024)
        self._need_write(entity)
        check_run(id)
        store = self._context.store
        try:
            known: Run | None = store.run(entity, project, id)
        except NotFoundError:
            known = None
        run = known or Run(entity=entity, project=project, id=id, created_at=now(), updated_at=now())
        config = _plain_config(given.json("config")) if given.has("config") else run.config
        run = msgspec.structs.replace(
            run,
            name=given.optional("displayName", 1024) or run.name,
            job_type=given.optional("jobType", 1024) or run.job_type,
            group=given.optional("groupName", 1024) or run.group,
            config=config,
            updated_at=now(),
        )
        store.save_run(run)
        tags = given.texts("tags", 1024)[:MAX_NAMES]
        self._context.state.save_run(
            run.path,
            state=given.optional("state", 64) or "running",
            summary=given.optional("summaryMetrics", _MAX_CONFIG),
            notes=given.optional("notes", 65536),
            tags=tags or None,
        )
        return Fieldset(bucket=RunNode(self._context, run), inserted=known is None)

    def create_run_files(self, input: Any = None) -> Fieldset:
        given = Input(input)
        entity, project = self._project(given)
        self._need_write(entity)
        run = self._run(entity, project, given.text("runName", 1024))
        names = [entry_path(name) for name in given.texts("files", 4096)][:MAX_NAMES]
        for name in names:
            self._context.state.run_object(run.path, name)
        nodes = [RunFileNode(self._context, run, name) for name in names]
        return Fieldset(run_id=RunNode(self._context, run).id, upload_headers=[], files=nodes)

    def mark_run_files_uploaded(self, input: Any = None) -> Fieldset:
        entity, _ = self._project(Input(input))
        self._need_write(entity)
        return Fieldset(success=True)

    # Rights and names

    def _need_write(self, entity: str) -> None:
        """NotPermittedError, or NotFoundError where the caller may not even read."""
        check_write(self._context, entity)

    def _project(self, given: Input, key: str = "projectName") -> tuple[str, str]:
        entity = given.optional("entityName", 1024) or default_entity(self._context)
        project = given.optional(key, 1024) or "uncategorized"
        return check_entity(entity), check_project(project)

    def _collection_name(self, given: Input, collection: str) -> ArtifactName:
        entity, project = self._project(given)
        return ArtifactName(entity, project, check_collection(collection))

    def _run(self, entity: str, project: str, id: str) -> Run:
        try:
            return load_run(self._context.store, f"{entity}/{project}/{check_run(id)}")
        except NotFoundError:
            return Run(entity=entity, project=project, id=id, created_at=now(), updated_at=now())

    def _writable_version(self, id: str) -> Version:
        version = find_version(self._context, id)
        self._need_write(version.entity)
        return version

    def _writable_collection(self, id: str) -> tuple[ArtifactName, Collection]:
        record = find_collection(self._context, id)
        self._need_write(record.entity)
        return ArtifactName(record.entity, record.project, record.name), record


def check_write(context: Context, entity: str) -> None:
    """NotPermittedError unless the caller may write; NotFoundError, as for an entity that is not there, if it may not read."""
    if context.caller.can_write(entity):
        return
    if context.caller.can_read(entity):
        raise NotPermittedError(f"the API key {context.caller.name!r} may read {entity!r}, not write it")
    raise NotFoundError(f"entity {entity!r} not found")


def check_run(id: str) -> str:
    """``id``, if it can be a run's. UsageError."""
    return check_entity(id)  # the same rule: it is one part of a path and of a URL


def _ttl(given: Input) -> tuple[int | None, bool]:
    """(seconds, whether they are inherited) of W&B's number."""
    seconds = given.number("ttlDurationSeconds", _DISABLED, MAX_TTL)
    if seconds is None or seconds == _INHERIT:
        return None, True
    if seconds == _DISABLED:
        return None, False
    if not seconds:
        raise UsageError("a time to live of 0 seconds cannot be; it must be at least one")
    return seconds, False


def _md5(text: str | None) -> str:
    """A base64 MD5, or "". UsageError."""
    if not text:
        return ""
    try:
        if len(base64.b64decode(text, validate=True)) == 16:
            return text
    except (binascii.Error, ValueError):
        pass
    raise UsageError(f"the digest {text!r} is no base64 MD5")


def _plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration as artifactfs keeps it: values by key, without what W&B's clients note of themselves."""
    plain = {key: value["value"] if isinstance(value, dict) and "value" in value else value for key, value in config.items()}
    plain.pop("_wandb", None)
    checked = check_metadata({"config": plain})["config"]
    assert isinstance(checked, dict)
    return checked
