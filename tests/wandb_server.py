"""A small server that speaks W&B's artifact protocol, for the tests of the ``wandb://`` store. Its habits are its own.

It knows nothing of artifactfs: GraphQL documents are parsed by graphql-core and their selections executed over plain values, so
that any document of the protocol works. Contents are on a second port, behind signed URLs that end; ids look like nothing; pages
may be shorter than asked for; ``artifactsV2`` answers 302. Inputs are taken in the form that the protocol has them, and no other:
a field too many is refused. A version can be committed once.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import json
import re
import secrets
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from graphql import FieldNode, FragmentSpreadNode, InlineFragmentNode, OperationDefinitionNode, parse
from graphql.utilities import value_from_ast_untyped

KEY = "k" * 40
TIME = "2026-11-20T10:11:12Z"

Value = Any
Answer = tuple[int, bytes, dict[str, str]]


def b64md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data).digest()).decode()


# What an input may hold and, with a ``!``, must; by mutation. What a feature adds is in _WITH.
_ALIAS = {"alias!", "artifactCollectionName!"}
_PLACED = {*_ALIAS, "entityName!", "projectName!"}
_TAG = {"tagName!", "tagCategoryName", "attributes"}
_INPUTS = {
    "createArtifact": """entityName! projectName! runName! artifactTypeName! artifactCollectionName! artifactCollectionNames
        digest! description aliases! tags metadata ttlDurationSeconds historyStep enableDigestDeduplication! distributedID
        clientID! sequenceClientID! storageRegion labels clientMutationId""",
    "createArtifactFiles": "artifactFiles! storageLayout! cloudRegionID clientMutationId",
    "addAliases": "artifactID! aliases!",
    "deleteAliases": "artifactID! aliases!",
    "updateArtifact": "artifactID! description metadata! ttlDurationSeconds tagsToAdd! tagsToDelete!",
    "linkArtifact": "artifactID artifactPortfolioName! entityName! projectName! aliases!",
    "unlinkArtifact": "artifactID! artifactPortfolioID!",
    "deleteArtifact": "artifactID! deleteAliases!",
    "useArtifact": "entityName! projectName! runName! artifactID! usedAs",
    "updateArtifactSequence": "artifactSequenceID! name description",
    "updateArtifactPortfolio": "artifactPortfolioID! name description",
    "moveArtifactSequence": "artifactSequenceID! destinationArtifactTypeName!",
    "createArtifactCollectionTagAssignments": "entityName! projectName! artifactCollectionName! tags!",
    "deleteArtifactCollectionTagAssignments": "entityName! projectName! artifactCollectionName! tags!",
}
_WITH = {
    ("createArtifact", "ARTIFACT_DIGEST_ALGORITHM"): "digestAlgorithm!",
    ("createArtifactFiles", "ARTIFACT_DIGEST_ALGORITHM"): "digestAlgorithm!",
    ("artifactFiles", "ARTIFACT_DIGEST_ALGORITHM"): "digest!",
    ("useArtifact", "USE_ARTIFACT_WITH_ENTITY_AND_PROJECT_INFORMATION"): "artifactEntityName! artifactProjectName!",
}
_FILE = "artifactID! artifactManifestID! name! md5! mimetype uploadPartsInput"


class Refused(Exception):
    pass


class Artifact:
    def __init__(self, id: str, kind: str, entity: str, project: str, collection: str, given: dict[str, Value]) -> None:
        self.id, self.kind = id, kind
        self.entity, self.project, self.collection = entity, project, collection
        self.given = given
        self.state = "PENDING"
        self.index: int | None = None
        self.manifest: bytes = b""
        self.digest = given.get("digest") or ""
        self.description = given.get("description")
        self.metadata = given.get("metadata")
        self.tags = {tag["tagName"] for tag in given.get("tags") or ()}
        self.ttl = given.get("ttlDurationSeconds")
        self.run = given.get("runName")
        self.used: list[tuple[str, str, str]] = []
        self.patches: dict[str, bytes] = {}  # by id of a manifest
        self.created = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")

    @property
    def contents(self) -> dict[str, Value]:
        try:
            found = json.loads(self.manifest)["contents"]
        except (ValueError, KeyError, RecursionError):
            found = None
        return found if isinstance(found, dict) else {}


class Collection:
    def __init__(self, id: str, entity: str, project: str, name: str, kind: str, portfolio: bool) -> None:
        self.id, self.entity, self.project, self.name, self.kind, self.portfolio = id, entity, project, name, kind, portfolio
        self.description: str | None = None
        self.tags: set[str] = set()
        self.members: dict[int, str] = {}
        self.aliases: dict[str, int] = {}
        self.next = 0


class WandbServer:
    """Start it with :meth:`start`; ``url`` is its ``wandb://`` URL. Every knob may be turned while it runs."""

    def __init__(self) -> None:
        self.keys = {KEY}
        self.page = 3  # entries of a page at most, whatever was asked for
        self.life = 60.0  # seconds of a signed URL
        self.secret = secrets.token_bytes(16)
        self.etags = True
        self.sign = True  # False: no signed URLs at all
        self.features: set[str] = set()
        self.xxhash = False  # what the entity's flag says
        self.orgs: dict[str, tuple[str, str]] = {}  # of an entity: its organization's name, and that one's entity
        self.runs: dict[tuple[str, str, str], dict[str, Value]] = {}
        self.need_runs = False  # a manifest must be some run's
        self.manifests: dict[str, tuple[str, str]] = {}  # by id: of which version, of which type
        self.blobs: dict[str, bytes] = {}  # by storage path
        self.artifacts: dict[str, Artifact] = {}
        self.collections: dict[tuple[str, str, str], Collection] = {}
        self.asked: list[str] = []  # names of operations
        self.log: list[tuple[str, str, dict[str, str]]] = []  # (method, URL, headers) of both ports
        self.fail: Callable[[str, str], tuple[int, dict[str, str]] | None] = lambda method, path: None
        self.cut: Callable[[str, bytes], bytes] = lambda path, body: body  # what really is sent of an answer
        self.fault: Callable[[str], int | str | None] = lambda step: None  # of a mutation's name, "PUT" or "stream": a status,
        # "before" or "after" for a connection that breaks before it is done, or before the answer; or "" for neither
        self.lock = threading.RLock()
        # For the tests of reading
        self.gate: Callable[[str], None] = lambda path: None  # may hold an answer back
        self.shape: Callable[[str, int, bytes, dict[str, str]], Answer] = lambda path, *answer: answer
        self.ranges = True
        self.redirects = True  # False: the server's own URLs of files are answered with their bytes
        self.forms = {"V2", "V2 of old", "V1"}  # of the server's own URLs of files that there are
        self.hidden: dict[tuple[str, str], str] = {}  # projects that the caller may not see: with a message, or null without one
        self.variables: list[tuple[str, dict[str, Value]]] = []
        self.connections: set[tuple[str, int]] = set()
        self._servers: list[ThreadingHTTPServer] = []

    def start(self) -> WandbServer:
        for handler in (_Api, _Storage):
            server = _Server(("127.0.0.1", 0), handler)
            server.owner = self  # type: ignore[attr-defined]
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            self._servers.append(server)
        self.base = f"http://127.0.0.1:{self._servers[0].server_address[1]}"
        self.storage = f"http://127.0.0.1:{self._servers[1].server_address[1]}"
        self.url = self.base.replace("http://", "wandb://")
        return self

    def stop(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    # Making versions without a client

    def log_version(
        self, path: str, files: dict[str, bytes], *, kind: str = "dataset", manifest: Value = None, aliases: tuple[str, ...] = ()
    ) -> Artifact:
        """Make a version of ``entity/project/collection``; ``manifest`` may change or replace the manifest."""
        entity, project, name = path.split("/")
        artifact = self._new(entity, project, name, kind, {})
        contents = {}
        for file, data in files.items():
            md5 = b64md5(data)
            self.blobs[f"{artifact.id}/{md5.replace('/', '_')}"] = data
            contents[file] = {"digest": md5, "size": len(data), "birthArtifactID": artifact.id, "local_path": "/etc/passwd"}
        whole = {
            "version": 1,
            "storagePolicy": "wandb-storage-policy-v1",
            "storagePolicyConfig": {"storageLayout": "V2"},
            "contents": contents,
        }
        if callable(manifest):
            manifest(whole)
        artifact.manifest = manifest if isinstance(manifest, bytes) else json.dumps(whole).encode()
        artifact.given["aliases"] = [{"alias": alias, "artifactCollectionName": name} for alias in aliases]
        self.commit(artifact)
        return artifact

    def _new(self, entity: str, project: str, name: str, kind: str, given: dict[str, Value]) -> Artifact:
        id = base64.b64encode(f"art!{len(self.artifacts)}+{secrets.token_hex(3)}".encode()).decode()
        artifact = self.artifacts[id] = Artifact(id, kind, entity, project, name, given)
        return artifact

    def commit(self, artifact: Artifact) -> None:
        key = (artifact.entity, artifact.project, artifact.collection)
        home = self.collections.get(key)
        if home is None:
            home = self.collections[key] = Collection(_id("c", *key), *key, artifact.kind, False)
        if artifact.state == "COMMITTED":
            return
        artifact.state, artifact.index = "COMMITTED", home.next
        home.members[home.next] = artifact.id
        for alias in {"latest", *(given["alias"] for given in artifact.given.get("aliases") or ())}:
            home.aliases[alias] = home.next
        home.next += 1

    # Signed URLs

    def signed(self, place: str, method: str = "GET") -> str:
        until = f"{time.time() + self.life:.3f}"
        sign = hmac.new(self.secret, f"{method} {place} {until}".encode(), "sha256").hexdigest()
        date = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        query = {"X-Amz-Date": date, "X-Amz-Expires": str(max(int(self.life), 1)), "until": until, "X-Amz-Signature": sign}
        return f"{self.storage}/{urllib.parse.quote(place)}?{urllib.parse.urlencode(query)}"

    def is_signed(self, method: str, place: str, query: dict[str, str]) -> bool:
        text = f"{method} {place} {query.get('until')}"
        good = hmac.new(self.secret, text.encode(), "sha256").hexdigest()
        return query.get("X-Amz-Signature") == good and time.time() < float(query["until"])

    def place_of(self, artifact: Artifact, entry: dict[str, Value]) -> str:
        return f"{entry.get('birthArtifactID') or artifact.id}/{entry['digest'].replace('/', '_')}"

    # GraphQL

    def execute(self, document: str, variables: dict[str, Value]) -> Value:
        tree = parse(document)
        fragments = {node.name.value: node for node in tree.definitions if not isinstance(node, OperationDefinitionNode)}  # type: ignore[attr-defined]
        (operation,) = (node for node in tree.definitions if isinstance(node, OperationDefinitionNode))
        self.asked.append(operation.name.value if operation.name else "")
        self.variables.append((self.asked[-1], variables))
        given = {
            item.variable.name.value: value_from_ast_untyped(item.default_value)
            for item in operation.variable_definitions or ()
            if item.default_value
        }
        with self.lock:
            return self._select(self._root(), operation.selection_set, fragments, {**given, **variables})

    def _select(self, value: Value, selections: Value, fragments: dict[str, Value], variables: dict[str, Value]) -> Value:
        if callable(value):
            value = value({})
        if value is None or selections is None:
            return value
        if isinstance(value, list):
            return [self._select(item, selections, fragments, variables) for item in value]
        found: dict[str, Value] = {}
        for node in selections.selections:
            if not _included(node, variables):
                continue
            if isinstance(node, FragmentSpreadNode):
                found.update(self._select(value, fragments[node.name.value].selection_set, fragments, variables))
            elif isinstance(node, InlineFragmentNode):
                kind = node.type_condition.name.value if node.type_condition else None
                if kind in (None, value.get("__typename")) or (kind == "ArtifactCollection"):
                    found.update(self._select(value, node.selection_set, fragments, variables))
            elif isinstance(node, FieldNode):
                item = value.get(node.name.value)
                if callable(item):
                    item = item({arg.name.value: value_from_ast_untyped(arg.value, variables) for arg in node.arguments or ()})
                key = node.alias.value if node.alias else node.name.value
                found[key] = self._select(item, node.selection_set, fragments, variables)
        return found

    def _root(self) -> dict[str, Value]:
        mutations = {name.removeprefix("do_"): getattr(self, name) for name in dir(self) if name.startswith("do_")}
        return {
            "viewer": {"id": "u", "entity": "ann", "username": "ann", "teams": _page([{"name": "team"}], {}, self.page)},
            "models": lambda args: _page(
                [{"name": name} for name in sorted({key[1] for key in self.collections if key[0] == args["entityName"]})],
                args,
                self.page,
            ),
            "project": lambda args: (
                self._seen(args["entityName"], args["name"]) and self._project(args["entityName"], args["name"])
            ),
            "artifact": lambda args: self._seen_artifact(self.artifacts.get(args["id"])),
            "serverInfo": {"features": [{"name": name, "isEnabled": True} for name in sorted(self.features)]},
            "entity": lambda args: self._entity(args["name"]),
            "clientIDMapping": lambda args: next(
                ({"serverID": it.id} for it in self.artifacts.values() if it.given.get("clientID") == args["clientID"]), None
            ),
            **{name: (lambda args, name=name, do=do: do(self._checked(name, args["input"]))) for name, do in mutations.items()},
        }

    def _checked(self, name: str, given: dict[str, Value]) -> dict[str, Value]:
        """An input, if it has the form that the protocol gives it."""
        if name in _INPUTS:
            self._check(name, _INPUTS[name].split(), given)
        for part, fields in {"aliases": _ALIAS if name in ("createArtifact", "linkArtifact") else _PLACED, "tags": _TAG}.items():
            for item in given.get(part) or () if name in _INPUTS else ():
                self._check(part, list(fields), item)
        for item in given.get("artifactFiles") or ():
            self._check("artifactFiles", _FILE.split(), item)
        return given

    def _check(self, name: str, fields: list[str], given: dict[str, Value]) -> None:
        for (what, feature), more in _WITH.items():
            if what == name and feature in self.features:
                fields = [*fields, *more.split()]
        known = {field.rstrip("!") for field in fields}
        unknown, missing = given.keys() - known, {field[:-1] for field in fields if field[-1] == "!"} - given.keys()
        if unknown or missing:
            raise Refused(f"the input of {name} has {sorted(unknown)} too many, and {sorted(missing)} too few")

    def _entity(self, name: str) -> Value:
        org, home = self.orgs.get(name, ("", ""))
        found = {"name": org, "orgEntity": {"name": home}} if org else None
        return {"name": name, "organization": found, "user": {"organizations": []}, "xxhashDigestsEnabled": self.xxhash}

    def _seen(self, entity: str, project: str) -> bool:
        if self.hidden.get((entity, project)):
            raise Refused(self.hidden[entity, project])
        return (entity, project) not in self.hidden

    def _seen_project(self, entity: str, project: str) -> Value:
        return self._project(entity, project) if self._seen(entity, project) else None

    def _seen_artifact(self, it: Artifact | None) -> Value:
        return self._artifact(it) if it is not None and self._seen(it.entity, it.project) else None

    def _project(self, entity: str, project: str) -> Value:
        mine = [it for key, it in sorted(self.collections.items()) if key[:2] == (entity, project)]
        runs = sorted(key for key in self.runs if key[:2] == (entity, project))
        if not mine and not runs:
            return None
        kinds = sorted({it.kind for it in mine})

        def of_type(kind: str) -> Value:
            those = [it for it in mine if it.kind == kind]
            return {
                "id": _id("t", kind),
                "name": kind,
                "artifactCollections": lambda args: _page([self._collection(it) for it in those], args, self.page),
                "artifactCollection": lambda args: next((self._collection(it) for it in those if it.name == args["name"]), None),
            }

        return {
            **_project_info(entity, project),
            "artifactTypes": lambda args: _page([of_type(kind) for kind in kinds], args, self.page),
            "artifactType": lambda args: of_type(args["name"]) if args["name"] in kinds else None,
            "artifactCollection": lambda args: next((self._collection(it) for it in mine if it.name == args["name"]), None),
            "artifactCollectionMembership": lambda args: self._membership_by_name(mine, args["name"]),
            "run": lambda args: (
                self._run(entity, project, args["name"]) if self._has_run((entity, project, args["name"])) else None
            ),
            "runs": lambda args: _page([self._run(*run) for run in runs], args, self.page),
        }

    def _membership_by_name(self, mine: list[Collection], name: str) -> Value:
        name, _, alias = name.partition(":")
        home = next((it for it in mine if it.name == name), None)
        return self._membership(home, alias or "latest") if home is not None else None

    def _membership(self, home: Collection, alias: str) -> Value:
        number = int(alias[1:]) if re.fullmatch("v[0-9]+", alias) else home.aliases.get(alias)
        if number is None or number not in home.members:
            return None
        artifact = self.artifacts[home.members[number]]
        return {
            "__typename": "ArtifactCollectionMembership",
            "id": _id("m", home.id, number),
            "versionIndex": number,
            "createdAt": TIME,
            "aliases": [{"id": _id("a", it), "alias": it} for it, at in home.aliases.items() if at == number],
            "artifactCollection": self._collection(home),
            "artifact": lambda args: self._artifact(artifact),
            "files": lambda args: self._files(artifact, args),
        }

    def _files(self, artifact: Artifact, args: dict[str, Value]) -> Value:
        names = args.get("names")
        items = [(path, entry) for path, entry in artifact.contents.items() if not names or path in names]
        nodes = []
        for path, entry in items:
            url = entry.get("ref") or (self.signed(self.place_of(artifact, entry)) if self.sign else None)
            nodes.append(
                {"__typename": "File", "id": _id("f", path), "name": path, "displayName": path, "directUrl": url, "url": url}
            )
        return _page(nodes, args, self.page)

    def _collection(self, home: Collection) -> dict[str, Value]:
        return {
            "__typename": "ArtifactPortfolio" if home.portfolio else "ArtifactSequence",
            "id": home.id,
            "name": home.name,
            "description": home.description,
            "createdAt": TIME,
            "project": _project_info(home.entity, home.project),
            "defaultArtifactType": {"name": home.kind},
            "tags": lambda args: _page([{"id": _id("g", tag), "name": tag} for tag in sorted(home.tags)], args, 100),
            "artifactMembership": lambda args: self._membership(home, args["aliasName"]),
            "artifacts": lambda args: _page(
                [
                    (self._artifact(self.artifacts[id]), {"version": f"v{n}"})
                    for n, id in sorted(home.members.items(), reverse=True)
                ],
                args,
                self.page,
            ),
        }

    def _artifact(self, it: Artifact | None) -> Value:
        if it is None:
            return None
        home = self.collections.get((it.entity, it.project, it.collection))
        places = [(c, n) for c in self.collections.values() for n, id in c.members.items() if id == it.id]
        return {
            "__typename": "Artifact",
            "id": it.id,
            "artifactSequence": self._collection(home) if home else None,
            "versionIndex": it.index,
            "artifactType": {"name": it.kind},
            "description": it.description,
            "metadata": it.metadata,
            "ttlDurationSeconds": it.ttl,
            "ttlIsInherited": it.ttl in (None, -1),
            "tags": [{"id": _id("g", tag), "name": tag} for tag in sorted(it.tags)],
            "state": it.state,
            "size": lambda args: str(sum(map(_size, (it.contents or {}).values()))),
            "digest": it.digest,
            "commitHash": hashlib.sha1(it.id.encode()).hexdigest(),
            "fileCount": lambda args: len(it.contents or {}),
            "createdAt": it.created,
            "aliases": lambda args: [
                {"id": _id("a", alias), "alias": alias, "artifactCollection": self._collection(c)}
                for c, n in places
                for alias, at in c.aliases.items()
                if at == n
            ],
            "currentManifest": {"file": {"directUrl": self.signed(f"manifest/{it.id}")}},
            "artifactMemberships": {
                "edges": [
                    {"node": {"versionIndex": n, "createdAt": TIME, "artifactCollection": self._collection(c)}} for c, n in places
                ]
            },
            "createdBy": self._run(it.entity, it.project, it.run) if it.run else None,
            "usedBy": {"edges": [{"node": self._run(*run)} for run in it.used]},
        }

    def _has_run(self, key: tuple[str, str, str]) -> bool:
        return key in self.runs or any((it.entity, it.project, it.run) == key or key in it.used for it in self.artifacts.values())

    def _run(self, entity: str, project: str, id: str) -> Value:
        done = [it for it in self.artifacts.values() if it.state == "COMMITTED"]
        made = [it for it in done if (it.entity, it.project, it.run) == (entity, project, id)]
        used = [it for it in done if (entity, project, id) in it.used]
        known = self.runs.get((entity, project, id), {})
        return {
            "__typename": "Run",
            "id": _id("r", id),
            "projectId": "17",
            "name": id,
            "displayName": known.get("displayName") or f"lucky-{id}",
            "state": known.get("state"),
            "config": known.get("config"),
            "group": known.get("groupName"),
            "jobType": known.get("jobType"),
            "createdAt": known.get("created"),
            "project": _project_info(entity, project),
            "outputArtifacts": lambda args: _page([self._artifact(it) for it in made], args, self.page),
            "inputArtifacts": lambda args: _page([self._artifact(it) for it in used], args, self.page),
        }

    # Mutations

    def do_upsertBucket(self, given: dict[str, Value]) -> Value:
        key = (given["entityName"], given["modelName"], given["name"])
        inserted = key not in self.runs
        known = self.runs.setdefault(key, {"created": f"2026-11-20T10:11:12.{len(self.runs):06}Z", "state": "running"})
        known.update({name: value for name, value in given.items() if value is not None})
        config = json.loads(given["config"] or "{}")
        assert all(isinstance(value, dict) and "value" in value for value in config.values())
        return {"bucket": self._run(*key), "inserted": inserted}

    def do_createArtifact(self, given: dict[str, Value]) -> Value:
        key = (given["entityName"], given["projectName"], given["artifactCollectionName"])
        home = self.collections.get(key)
        if home is not None and (home.portfolio or home.kind != given["artifactTypeName"]):
            raise Refused("the collection is a portfolio" if home.portfolio else "the collection has another type")
        newest = self.artifacts[home.members[max(home.members)]].id if home is not None and home.members else None
        sequence = {"latestArtifact": {"id": newest} if newest else None}
        if home is not None and given.get("enableDigestDeduplication"):
            for number, id in home.members.items():
                if self.artifacts[id].digest == given["digest"]:
                    home.aliases.update({alias["alias"]: number for alias in given["aliases"]})
                    return {"artifact": {"id": id, "state": "COMMITTED", "artifactSequence": sequence}}
        shared = given["distributedID"]
        waiting = (
            it for it in self.artifacts.values() if it.state == "PENDING" and (it.entity, it.project, it.collection) == key
        )
        known = next((it for it in waiting if shared and it.given.get("distributedID") == shared), None)
        artifact = known or self._new(*key, given["artifactTypeName"], given)
        if known:
            known.given["aliases"] = [*known.given["aliases"], *given["aliases"]]
            known.tags |= {tag["tagName"] for tag in given.get("tags") or ()}
            known.metadata = given["metadata"] or known.metadata
            known.run = given["runName"]
        return {"artifact": {"id": artifact.id, "state": artifact.state, "artifactSequence": sequence}}

    def do_createArtifactManifest(self, given: dict[str, Value]) -> Value:
        names = {"FULL": "wandb_manifest.json", "PATCH": "wandb_manifest.patch.json"}
        run = (given["entityName"], given["projectName"], given["runName"])
        if given["name"] != names[given["type"]] or (given.get("baseArtifactID") or given["artifactID"]) not in self.artifacts:
            raise Refused("no such manifest, or base")
        if self.need_runs and run not in self.runs:
            raise Refused(f"run {given['runName']!r} not found")
        id = _id("man", given["artifactID"], len(self.manifests))
        self.manifests[id] = (given["artifactID"], given["type"])
        return {"artifactManifest": self._manifest_file(id, given["digest"])}

    def do_updateArtifactManifest(self, given: dict[str, Value]) -> Value:
        if self.manifests[given["artifactManifestID"]][1] == "FULL":
            raise Refused("that is a whole one")
        return {"artifactManifest": self._manifest_file(given["artifactManifestID"], given["digest"])}

    def _manifest_file(self, id: str, digest: str) -> Value:
        headers = ["Content-MD5:" + digest]
        return {
            "id": id,
            "file": {"id": _id("mf", id), "uploadUrl": self.signed(f"manifest/{id}", "PUT"), "uploadHeaders": headers},
        }

    def put_manifest(self, id: str, data: bytes) -> None:
        of, kind = self.manifests[id]
        artifact = self.artifacts[of]
        if kind == "PATCH":
            artifact.patches[id] = data
        else:
            artifact.manifest = data

    def do_createArtifactFiles(self, given: dict[str, Value]) -> Value:
        edges = []
        for spec in given["artifactFiles"]:
            name = (spec.get("digest") or spec["md5"]).replace("/", "_")
            known = next((place for place in self.blobs if place.endswith("/" + name)), None)
            place = known or f"{spec['artifactID']}/{name}"
            node = {
                "storagePath": place,
                "uploadUrl": None if known else self.signed(place, "PUT"),
                "uploadHeaders": [f"Content-MD5:{spec['md5']}", "Content-Type:application/x-test"],
                "artifact": {"id": place.partition("/")[0]},
            }
            if spec.get("uploadPartsInput") and not known:
                urls = [
                    {"partNumber": p["partNumber"], "uploadUrl": self.signed(f"{place}.{p['partNumber']}", "PUT")}
                    for p in spec["uploadPartsInput"]
                ]
                node["uploadMultipartUrls"] = {"uploadID": "up", "uploadUrlParts": urls}
            edges.append({"node": node})
        return {"files": {"edges": edges}}

    def do_completeMultipartUploadArtifact(self, given: dict[str, Value]) -> Value:
        place = given["storagePath"]
        self.blobs[place] = b"".join(self.blobs.pop(f"{place}.{part['partNumber']}") for part in given["completedParts"])
        return {"digest": b64md5(self.blobs[place])}

    def do_commitArtifact(self, given: dict[str, Value]) -> Value:
        artifact = self.artifacts[given["artifactID"]]
        if artifact.state != "PENDING":
            raise Refused("the version is not pending")
        if artifact.patches:
            whole: dict[str, Value] = {}
            for patch in artifact.patches.values():
                found = json.loads(patch)
                whole = {**found, "contents": {**whole.get("contents", {}), **found["contents"]}}
            artifact.manifest = json.dumps(whole).encode()
        for entry in artifact.contents.values():
            if "ref" not in entry and self.place_of(artifact, entry) not in self.blobs:
                raise Refused("the manifest lists what was not uploaded")
        self.commit(artifact)
        return {"artifact": {"id": artifact.id, "digest": artifact.digest}}

    def _home(self, given: dict[str, Value]) -> Collection:
        return self.collections[given["entityName"], given["projectName"], given["artifactCollectionName"]]

    def do_addAliases(self, given: dict[str, Value]) -> Value:
        for alias in given["aliases"]:
            home = self._home(alias)
            (number,) = (n for n, id in home.members.items() if id == given["artifactID"])
            home.aliases[alias["alias"]] = number
        return {"success": True}

    def do_deleteAliases(self, given: dict[str, Value]) -> Value:
        for alias in given["aliases"]:
            self._home(alias).aliases.pop(alias["alias"], None)
        return {"success": True}

    def do_updateArtifact(self, given: dict[str, Value]) -> Value:
        artifact = self.artifacts[given["artifactID"]]
        artifact.description = given.get("description", artifact.description)
        artifact.metadata = given.get("metadata", artifact.metadata)
        artifact.ttl = given.get("ttlDurationSeconds", artifact.ttl)
        artifact.tags |= {tag["tagName"] for tag in given.get("tagsToAdd") or ()}
        artifact.tags -= {tag["tagName"] for tag in given.get("tagsToDelete") or ()}
        return {"artifact": self._artifact(artifact)}

    def do_linkArtifact(self, given: dict[str, Value]) -> Value:
        key = (given["entityName"], given["projectName"], given["artifactPortfolioName"])
        artifact = self.artifacts[given["artifactID"]]
        home = self.collections.setdefault(key, Collection(_id("p", *key), *key, artifact.kind, True))
        if not home.portfolio or home.kind != artifact.kind:
            raise Refused("that is a sequence, or of another type")
        number = next((n for n, id in home.members.items() if id == artifact.id), None)
        if number is None:
            number, home.next = home.next, home.next + 1
            home.members[number] = artifact.id
        home.aliases.update({"latest": number, **{alias["alias"]: number for alias in given["aliases"]}})
        return {"versionIndex": number}

    def do_unlinkArtifact(self, given: dict[str, Value]) -> Value:
        (home,) = (it for it in self.collections.values() if it.id == given["artifactPortfolioID"])
        numbers = [n for n, id in home.members.items() if id == given["artifactID"]]
        if not numbers:
            raise Refused("membership not found")
        self._forget(home, numbers[0])
        return {"success": True}

    def _forget(self, home: Collection, number: int) -> None:
        del home.members[number]
        home.aliases = {alias: at for alias, at in home.aliases.items() if at != number}
        if home.members:
            home.aliases.setdefault("latest", max(home.members))

    def do_deleteArtifact(self, given: dict[str, Value]) -> Value:
        artifact = self.artifacts[given["artifactID"]]
        held = [
            alias for home in self.collections.values() for alias, at in home.aliases.items() if home.members[at] == artifact.id
        ]
        if held and not given["deleteAliases"]:
            raise Refused(f"the version has the aliases {held}")
        if artifact.state == "DELETED":
            raise Refused("artifact not found")
        artifact.state = "DELETED"
        for home in self.collections.values():
            for number in [n for n, id in home.members.items() if id == artifact.id]:
                self._forget(home, number)
        return {"artifact": {"id": artifact.id}}

    def do_useArtifact(self, given: dict[str, Value]) -> Value:
        artifact = self.artifacts[given["artifactID"]]
        artifact.used.append((given["entityName"], given["projectName"], given["runName"]))
        return {"artifact": self._artifact(artifact)}

    def do_updateArtifactSequence(self, given: dict[str, Value]) -> Value:
        id = given.get("artifactSequenceID") or given["artifactPortfolioID"]
        (home,) = (it for it in self.collections.values() if it.id == id)
        home.description = given["description"]
        if home.name != given["name"]:
            del self.collections[home.entity, home.project, home.name]
            for artifact in [self.artifacts[id] for id in home.members.values()] if not home.portfolio else []:
                artifact.collection = given["name"]
            home.name = given["name"]
            self.collections[home.entity, home.project, home.name] = home
        return {"artifactCollection": self._collection(home)}

    def do_moveArtifactSequence(self, given: dict[str, Value]) -> Value:
        (home,) = (it for it in self.collections.values() if it.id == given["artifactSequenceID"])
        home.kind = given["destinationArtifactTypeName"]
        for id in home.members.values():
            self.artifacts[id].kind = home.kind
        return {"artifactCollection": self._collection(home)}

    do_updateArtifactPortfolio = do_updateArtifactSequence

    def do_createArtifactCollectionTagAssignments(self, given: dict[str, Value]) -> Value:
        self._home(given).tags |= {tag["tagName"] for tag in given["tags"]}
        return {"tags": []}

    def do_deleteArtifactCollectionTagAssignments(self, given: dict[str, Value]) -> Value:
        self._home(given).tags -= {tag["tagName"] for tag in given["tags"]}
        return {"success": True}

    def do_deleteArtifactSequence(self, given: dict[str, Value]) -> Value:
        id = given.get("artifactSequenceID") or given["artifactPortfolioID"]
        gone = next((it for it in self.collections.values() if it.id == id), None)
        if gone is None:
            raise Refused("collection not found")
        for member in [] if gone.portfolio else list(gone.members.values()):
            self.do_deleteArtifact({"artifactID": member, "deleteAliases": True})
        self.collections = {key: it for key, it in self.collections.items() if it.id != id}
        return {"artifactCollection": {"state": "DELETED"}}

    do_deleteArtifactPortfolio = do_deleteArtifactSequence


def _id(*parts: object) -> str:
    return base64.b64encode("~".join(map(str, parts)).encode()).decode()


def _size(entry: Value) -> int:
    size = entry.get("size") if isinstance(entry, dict) else None
    return size if isinstance(size, int) else 0


def _project_info(entity: str, project: str) -> dict[str, Value]:
    return {"id": _id(entity, project), "name": project, "entity": {"name": entity}}


def _page(nodes: list[Value], args: dict[str, Value], most: int) -> dict[str, Value]:
    start = int(args.get("after") or 0)
    end = start + min(args.get("first") or most, most)
    pairs = [node if isinstance(node, tuple) else (node, {}) for node in nodes[start:end]]
    info = {"endCursor": str(end), "hasNextPage": end < len(nodes)}
    return {"totalCount": len(nodes), "pageInfo": info, "edges": [{"node": node, "cursor": "x", **edge} for node, edge in pairs]}


def _included(node: Value, variables: dict[str, Value]) -> bool:
    for directive in node.directives or ():
        (arg,) = directive.arguments
        wanted = directive.name.value == "include"
        if directive.name.value in ("include", "skip") and bool(value_from_ast_untyped(arg.value, variables)) != wanted:
            return False
    return True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Value, client_address: Value) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that closes its connection early is none of ours
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    disable_nagle_algorithm = True
    wbufsize = -1  # an answer is one write: no 40 ms of waiting for an acknowledgement in the middle
    protocol_version = "HTTP/1.1"

    @property
    def owner(self) -> WandbServer:
        return self.server.owner  # type: ignore[attr-defined, no-any-return]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def begin(self) -> bool:
        """Note the request; False if it was answered with a fault already."""
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        self.owner.log.append((self.command, self.path, dict(self.headers)))
        self.owner.connections.add(self.client_address)
        self.owner.gate(self.path)
        fault = self.owner.fail(self.command, self.path)
        if fault is not None:
            self.answer(fault[0], b"no", fault[1])
        return fault is None

    def broken(self, step: str) -> bool:
        """Whether the request is to have no answer, or another one, before it is done; :meth:`lost` says whether after."""
        fault = self.owner.fault(step)
        self.lose = fault == "after"
        if isinstance(fault, int):
            self.answer(fault, b"busy", {"Retry-After": "0"})
        elif fault == "before":
            self.close_connection = True
        return fault == "before" or isinstance(fault, int)

    def lost(self) -> bool:
        """Whether the answer is to be lost."""
        if self.lose:
            self.close_connection = True
        return self.lose

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        status, body, headers = self.owner.shape(self.path, status, body, headers or {})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers and "Transfer-Encoding" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = self.owner.cut(self.path, body)
        self.wfile.write(sent)
        if len(sent) < len(body):
            self.close_connection = True

    def send_blob(self, data: bytes) -> None:
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        headers = {"ETag": etag} if self.owner.etags else {}
        if self.headers.get("If-Match", etag) != etag:
            self.answer(412, b"")
            return
        match = re.fullmatch(r"bytes=([0-9]+)-([0-9]*)", self.headers.get("Range", ""))
        if match and data and self.owner.ranges:
            start, end = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
            self.answer(206, data[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"})
        else:
            self.answer(200, data, headers)

    def authorized(self) -> bool:
        given = self.headers.get("Authorization", "")
        return any(given == "Basic " + base64.b64encode(f"api:{key}".encode()).decode() for key in self.owner.keys)


class _Api(_Handler):
    def do_POST(self) -> None:
        if not self.begin():
            return
        if not self.authorized():
            self.answer(401, b"{}")
            return
        stream = re.fullmatch("/files/([^/]+)/([^/]+)/([^/]+)/file_stream", self.path)
        if stream is not None:
            key = (urllib.parse.unquote(stream[1]), urllib.parse.unquote(stream[2]), urllib.parse.unquote(stream[3]))
            told = json.loads(self.body)
            if told.get("complete"):
                self.owner.runs[key]["state"] = "failed" if told.get("exitcode") else "finished"
            self.answer(200, b'{"exitcode":null,"limits":{}}')
            return
        asked = json.loads(self.body)
        if self.broken(asked["operationName"]):
            return
        try:
            answer: Value = {"data": self.owner.execute(asked["query"], asked.get("variables") or {})}
        except Refused as error:
            answer = {"data": None, "errors": [{"message": str(error)}]}
        if self.lost():
            return
        self.answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def do_GET(self) -> None:
        if not self.begin():
            return
        parts = [urllib.parse.unquote(part) for part in urllib.parse.urlsplit(self.path).path.split("/")[1:]]
        form = {("artifactsV2", 9): "V2", ("artifactsV2", 8): "V2 of old", ("artifacts", 3): "V1"}.get((parts[0], len(parts)))
        if not self.authorized() or form not in self.owner.forms:
            self.answer(401 if not self.authorized() else 404, b"")
            return
        md5 = base64.b64encode(bytes.fromhex(parts[2] if form == "V1" else parts[-2])).decode().replace("/", "_")
        birth = "" if form == "V1" else parts[-3]
        place = next((it for it in self.owner.blobs if it.endswith(f"/{md5}") and birth in ("", it.rpartition("/")[0])), None)
        if place is None:
            self.answer(404, b"")
        elif self.owner.redirects:
            self.answer(302, b"", {"Location": self.owner.signed(place)})
        else:
            self.send_blob(self.owner.blobs[place])


class _Storage(_Handler):
    def place(self) -> str | None:
        parts = urllib.parse.urlsplit(self.path)
        place = urllib.parse.unquote(parts.path[1:])
        signed = self.owner.is_signed(self.command, place, dict(urllib.parse.parse_qsl(parts.query)))
        if not signed or "Authorization" in self.headers:
            self.answer(403, b"<Error>expired</Error>")
            return None
        return place

    def do_PUT(self) -> None:
        place = self.place() if self.begin() else None
        if place is None or self.broken("PUT"):
            return
        if self.headers.get("Content-MD5", b64md5(self.body)) != b64md5(self.body):
            self.answer(400, b"bad digest")
            return
        if place.startswith("manifest/"):
            self.owner.put_manifest(place.removeprefix("manifest/"), self.body)
        else:
            self.owner.blobs[place] = self.body
        if self.lost():
            return
        self.answer(200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def do_GET(self) -> None:
        place = self.place() if self.begin() else None
        if place is None:
            return
        if place.startswith("manifest/"):
            data: bytes | None = self.owner.artifacts[place.removeprefix("manifest/")].manifest
        else:
            data = self.owner.blobs.get(place)
        if data is None:
            self.answer(404, b"")
            return
        self.send_blob(data)


def running(page: int = 3) -> Iterator[WandbServer]:
    """For a fixture."""
    server = WandbServer().start()
    server.page = page
    try:
        yield server
    finally:
        server.stop()
