"""A stand-in for a Comet server, on loopback: what comet_ml 3.58.8 asks of one about experiments and artifacts, from memory.

::

    with CometServer() as server:
        server.faults.status = 503
        ...

What it answers follows the public client: the paths, parameters and fields that it sends and reads. ``test_comet_store.py`` runs
the real client against it, so that it cannot drift into something that only our own code understands. Names of artifacts come
percent-encoded twice (by the client, then as parameters), so they are decoded once more here.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import re
import socket
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, ClassVar
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

KEY = "k0123456789abcdefghijklmn"

NOT_FOUND = 624523
NOT_FINAL = 90403
VERSION_EXISTS = 90399
IMMUTABLE = 7000005


@dataclasses.dataclass
class Faults:
    """What goes wrong, until it is changed back. They meet requests whose path contains ``only``."""

    only: str = ""
    status: int = 0
    """Answer this status instead, …"""
    statuses: int = -1
    """… so often (-1: always)."""
    retry_after: str = ""
    body: bytes = b""
    """The body of such an answer."""
    drop: int = 0
    """Carry out so many requests, and close the connection without an answer."""
    latency: float = 0.0
    cut_after: int | None = None
    """Close the connection after so many bytes of a content's body …"""
    cuts: int = -1
    """… in so many answers."""
    short: int = 0
    """Contents are sent without their last bytes, under a Content-Length that says nothing of it."""
    flip: frozenset[int] = frozenset()
    """Offsets into each content whose byte is sent with its bits turned over."""


@dataclasses.dataclass
class Asset:
    id: str
    version: str
    name: str
    data: bytes = b""
    link: str | None = None
    metadata: str | None = None
    kind: str = "asset"

    @property
    def etag(self) -> str:
        return f'"{hashlib.md5(self.data).hexdigest()}"'


@dataclasses.dataclass
class Version:
    id: str
    artifact: str
    version: str
    experiment: str
    metadata: str | None
    aliases: list[str]
    tags: list[str]
    added: int
    state: str = "OPEN"
    assets: dict[str, Asset] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(len(asset.data) for asset in self.assets.values())


@dataclasses.dataclass
class Artifact:
    id: str
    workspace: str
    project: str
    name: str
    type: str
    tags: list[str] = dataclasses.field(default_factory=list)
    versions: list[Version] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Experiment:
    key: str
    workspace: str
    project: str
    started: int
    name: str = ""
    alive: bool = True
    used: list[str] = dataclasses.field(default_factory=list)


class RefusedError(Exception):
    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class CometServer:
    """One server with one API key, ``key``, which may be changed; a request with another is refused."""

    def __init__(self, workspaces: tuple[str, ...] = ("acme",)) -> None:
        self.key = KEY
        self.workspaces = list(workspaces)
        self.faults = Faults()
        self.contents = "ranges"
        """How a content is sent: ``ranges`` (by the server, in ranges), ``whole`` (by the server, only whole), ``links`` (by
        an object store behind it, to which it redirects who allows that, and which sends ranges)."""
        self.states = True
        """Whether it tells the states of versions where it lists them."""
        self.link_life = 3600.0
        self.links_revoked = 0
        self.artifacts: dict[tuple[str, str], Artifact] = {}
        self.experiments: dict[str, Experiment] = {}
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        """(method, path, parameters) of every request."""
        self.unknown: list[str] = []
        self.sent = 0
        """Bytes of contents sent."""
        self.lock = threading.RLock()
        self._clock = 1_700_000_000_000
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> CometServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the port and every connection, as if the machine were gone."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._server.close_connections()
            self._thread.join(10)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    def count(self, path: str, method: str = "") -> int:
        """How many requests had ``path`` in theirs."""
        return sum(path in found and method in ("", how) for how, found, _ in self.seen)

    def artifact(self, name: str, workspace: str = "acme") -> Artifact:
        return self.artifacts[workspace, name]

    def add(self, name: str, files: dict[str, bytes], workspace: str = "acme", project: str = "vision", **fields: Any) -> Version:
        """A closed version with ``files``, as another client may have logged it; ``fields``: ``links``, ``metadata``,
        ``asset_metadata``, ``version``, ``aliases``, ``state``, ``type``."""
        with self.lock:
            self.experiments.setdefault("e" * 32, Experiment("e" * 32, workspace, project, self.now()))
            made = self.upsert(
                {
                    "artifactName": name,
                    "artifactType": fields.get("type", "dataset"),
                    "experimentKey": "e" * 32,
                    "versionMetadata": json.dumps(fields["metadata"]) if "metadata" in fields else None,
                    "version": fields.get("version"),
                    "alias": fields.get("aliases", []),
                    "versionTags": [],
                },
                workspace,
                project,
            )
            version = self.find_version(made["artifactVersionId"])
            about = fields.get("asset_metadata", {})
            for path, data in files.items():
                self._add_asset(version, path, data=data, metadata=about.get(path))
            for path, link in fields.get("links", {}).items():
                self._add_asset(version, path, link=link, metadata=about.get(path))
            version.state = fields.get("state", "CLOSED")
            return version

    def _add_asset(self, version: Version, path: str, metadata: Any = None, **fields: Any) -> None:
        told = json.dumps(metadata) if metadata is not None else None
        asset = Asset(uuid.uuid4().hex, version.id, path, metadata=told, **fields)
        version.assets[asset.id] = asset

    def now(self) -> int:
        with self.lock:
            self._clock += 1000
            return self._clock

    def find_version(self, id: str) -> Version:
        for artifact in self.artifacts.values():
            for version in artifact.versions:
                if version.id == id:
                    return version
        raise RefusedError(400, NOT_FOUND, "no such artifact version")

    def closed(self, name: str, workspace: str = "acme") -> list[Version]:
        """The closed versions of an artifact, oldest first."""
        found = self.artifacts.get((workspace, name))
        return [version for version in found.versions if version.state == "CLOSED"] if found else []

    # What is asked

    def upsert(self, told: dict[str, Any], workspace: str, project: str) -> dict[str, Any]:
        name = told["artifactName"]
        artifact = self.artifacts.get((workspace, name))
        if artifact is None:
            artifact = Artifact(str(uuid.uuid4()), workspace, project, name, told["artifactType"])
            self.artifacts[workspace, name] = artifact
        wanted = told.get("version")
        if wanted is None:
            wanted = _following([version.version for version in artifact.versions])
        elif any(version.version == wanted for version in artifact.versions):
            raise RefusedError(400, VERSION_EXISTS, f"version {wanted} of {name} exists")
        previous = artifact.versions[-1].version if artifact.versions else None
        aliases = [alias for alias in told.get("alias") or [] if alias.lower() != "latest"]
        for other in artifact.versions:
            other.aliases = [alias for alias in other.aliases if alias not in aliases and alias != "Latest"]
        made = Version(
            str(uuid.uuid4()),
            artifact.id,
            wanted,
            told["experimentKey"],
            told.get("versionMetadata"),
            [*aliases, "Latest"],
            list(told.get("versionTags") or []),
            self.now(),
        )
        artifact.versions.append(made)
        return {
            "artifactId": artifact.id,
            "artifactVersionId": made.id,
            "currentVersion": wanted,
            "previousVersion": previous,
        }

    def version_of(self, params: dict[str, str]) -> tuple[Artifact, Version]:
        wanted = {key: value for key, value in params.items() if value}
        if "versionId" in wanted:
            version = self.find_version(wanted["versionId"])
            artifact = next(found for found in self.artifacts.values() if found.id == version.artifact)
            return artifact, version
        if "workspace" not in wanted and wanted.get("experimentKey") in self.experiments:
            wanted["workspace"] = self.experiments[wanted["experimentKey"]].workspace
        artifact = self.artifact_of(wanted)
        given = wanted.get("version") or wanted.get("alias") or wanted.get("versionOrAlias") or "Latest"
        for version in artifact.versions:
            aliases = version.aliases + [alias.lower() for alias in version.aliases if alias == "Latest"]
            if ("alias" not in wanted and version.version == given) or ("version" not in wanted and given in aliases):
                return artifact, version
        raise RefusedError(400, NOT_FOUND, "no such artifact version")

    def artifact_of(self, params: dict[str, str]) -> Artifact:
        id = params.get("artifact_id") or params.get("artifactId")
        name = unquote(params.get("artifactName", ""))
        for (workspace, own), artifact in self.artifacts.items():
            if (id and artifact.id == id) or (not id and (workspace, own) == (params.get("workspace"), name)):
                return artifact
        raise RefusedError(400, NOT_FOUND, "no such artifact")


def _following(versions: list[str]) -> str:
    """The major version after all of ``versions``; the release of a major version of which there are only candidates."""
    found = []
    for version in versions:
        release, _, rest = version.partition("-")
        major, minor, patch = release.partition("+")[0].split(".")
        found.append(int(major) if rest and (minor, patch) == ("0", "0") else int(major) + 1)
    return f"{max(found, default=1)}.0.0"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, owner: CometServer) -> None:
        self.owner = owner
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        for request in list(self._open):
            try:
                request.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that goes away in the middle is no news


class _DropError(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes: the second would wait for the client to confirm the first
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        owner, faults = self.server.owner, self.server.owner.faults
        parts = urlsplit(self.path)
        params = dict(parse_qsl(parts.query, keep_blank_values=True))
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        if len(body) != size:  # who sent it gave up
            self.close_connection = True
            return
        with owner.lock:
            owner.seen.append((method, parts.path, params))
        if faults.latency and faults.only in parts.path:
            time.sleep(faults.latency)
        try:
            if faults.status and faults.only in parts.path and faults.statuses:
                faults.statuses -= 1
                self._send(faults.status, faults.body or b"{}", {"Retry-After": faults.retry_after} if faults.retry_after else {})
                return
            if parts.path.startswith("/objects/"):
                self._object(parts.path.rpartition("/")[2], params)
                return
            self._check_key(parts.path, body)
            if parts.path.endswith("experiment/asset/get-asset"):
                self._content(params)
                return
            with owner.lock:
                found = self._dispatch(method, parts.path, params, body)
            if faults.drop and faults.only in parts.path:
                faults.drop -= 1
                raise _DropError
            self._send(200, json.dumps(found).encode())
        except RefusedError as error:
            told = {"msg": str(error), "code": error.status, "data": None, "sdk_error_code": error.code}
            self._send(error.status, json.dumps(told).encode())
        except _DropError:
            self._cut()

    def _check_key(self, path: str, body: bytes) -> None:
        given = self.headers.get("Authorization")
        if given != self.server.owner.key:
            raise RefusedError(401, 1, "the API key is not valid")

    def _dispatch(self, method: str, path: str, params: dict[str, str], body: bytes) -> Any:
        place = re.sub(r"^/(api|clientlib)/rest/v2/|^/clientlib/", "", path)
        if "gzip" in self.headers.get("Content-Encoding", ""):
            body = gzip.decompress(body)
        handler = self._handlers.get((method, place))
        if handler is None:
            self.server.owner.unknown.append(f"{method} {path}")
            return {}
        if self.headers.get("Content-Type", "").startswith("multipart/form-data"):
            return handler(self, params, body)
        return handler(self, params, json.loads(body) if body else {})

    # Experiments

    def _ping(self, params: dict[str, str], told: Any) -> Any:
        return {"msg": "Healthy Server"}

    def _alive(self, params: dict[str, str], told: Any) -> Any:
        return {"version": "9.9.9", "msg": "5.0.0"}

    def _account(self, params: dict[str, str], told: Any) -> Any:
        return {"userName": "tester", "defaultWorkspaceName": self.server.owner.workspaces[0]}

    def _workspaces(self, params: dict[str, str], told: Any) -> Any:
        return {"workspaceNames": list(self.server.owner.workspaces)}

    def _projects(self, params: dict[str, str], told: Any) -> Any:
        owner = self.server.owner
        self._check_workspace(params["workspaceName"])
        names = {one.project for one in owner.experiments.values() if one.workspace == params["workspaceName"]}
        return {"projects": [{"projectName": name, "workspaceName": params["workspaceName"]} for name in sorted(names)]}

    def _check_workspace(self, workspace: str) -> None:
        if workspace not in self.server.owner.workspaces:
            raise RefusedError(400, 620011, f"no workspace {workspace}")

    def _add_run(self, params: dict[str, str], told: Any) -> Any:
        owner, key = self.server.owner, told["experimentKey"]
        workspace = told["teamName"] or owner.workspaces[0]
        if workspace not in owner.workspaces:
            raise RefusedError(400, 620011, f"no workspace {workspace}")
        known = owner.experiments.get(key)
        if known and not told.get("getOrCreateEnabled"):
            raise RefusedError(400, 90212, "experiment exists")
        if not known:
            owner.experiments[key] = Experiment(key, workspace, told["projectName"] or "general", owner.now())
        return self._handshake(owner.experiments[key])

    def _get_run(self, params: dict[str, str], told: Any) -> Any:
        key = told["previousExperiment"]
        if key not in self.server.owner.experiments:
            raise RefusedError(400, 90130, "no such experiment")
        return self._handshake(self.server.owner.experiments[key])

    def _handshake(self, experiment: Experiment) -> Any:
        return {
            "runId": f"run-{experiment.key}",
            "project_id": f"project-{experiment.project}",
            "focusUrl": f"{self.server.owner.url}/{experiment.workspace}/{experiment.project}/",
            "lastOffset": 0,
            "s3DirectAccessEnabled": False,
            "upload_file_size_limit_in_mb": 100,
            "asset_upload_file_size_limit_in_mb": 102400,
            "featureToggles": [],
            "cometWebAssetUrl": f"{self.server.owner.url}/api/asset/download",
            "cometWebImageUrl": f"{self.server.owner.url}/api/image/download",
            "cometRestApiAssetUrl": f"{self.server.owner.url}/api/rest/v2/experiment/asset/get-asset",
            "cometRestApiImageUrl": f"{self.server.owner.url}/api/rest/v2/image/get-image",
            "name": None,
            "artifactNameMaxLength": 100,
            "assetNameMaxLength": 2000,
            "imageNameMaxLength": 2000,
        }

    def _status(self, params: dict[str, str], told: Any) -> Any:
        if told["experimentKey"] in self.server.owner.experiments:
            self.server.owner.experiments[told["experimentKey"]].alive = bool(told["is_alive"])
        return {
            "is_alive_beat_duration_millis": 3_600_000,
            "gpu_monitor_interval_millis": 3_600_000,
            "cpu_monitor_interval_millis": 3_600_000,
            "pending_rpcs": False,
        }

    def _experiment(self, params: dict[str, str], told: Any) -> Any:
        found = self.server.owner.experiments.get(params["experimentKey"])
        if found is None:
            raise RefusedError(400, 90130, "no such experiment")
        return self._about(found)

    def _experiments(self, params: dict[str, str], told: Any) -> Any:
        own = (params["workspaceName"], params["projectName"])
        found = [one for one in self.server.owner.experiments.values() if (one.workspace, one.project) == own]
        return {"experiments": [self._about(one) for one in found]}

    def _about(self, found: Experiment) -> dict[str, Any]:
        return {
            "experimentKey": found.key,
            "experimentName": found.name or None,
            "projectName": found.project,
            "workspaceName": found.workspace,
            "startTimeMillis": found.started,
            "endTimeMillis": found.started,
            "running": found.alive,
            "archived": False,
        }

    # Artifacts

    def _list(self, params: dict[str, str], told: Any) -> Any:
        self._check_workspace(params["workspace"])
        found = [one for one in self.server.owner.artifacts.values() if one.workspace == params["workspace"]]
        wanted = params.get("type")
        return {"artifacts": [self._shown(one) for one in found if not wanted or one.type == wanted]}

    def _shown(self, artifact: Artifact) -> dict[str, Any]:
        return {
            "artifactId": artifact.id,
            "project": artifact.project,
            "type": artifact.type,
            "name": artifact.name,
            "description": None,
            "latestVersion": artifact.versions[-1].version if artifact.versions else None,
            "tags": artifact.tags,
            "isPublic": False,
            "emoji": None,
            "sizeInBytes": sum(version.size for version in artifact.versions),
        }

    def _details(self, params: dict[str, str], told: Any) -> Any:
        artifact = self.server.owner.artifact_of(params)
        return self._shown(artifact) | {
            "versions": [
                {
                    "artifactVersionId": version.id,
                    "version": version.version,
                    "owner": "tester",
                    "metadata": version.metadata,
                    "createdFrom": None,
                    "sizeInBytes": version.size,
                    "state": version.state if self.server.owner.states else None,
                    "added": version.added,
                    "alias": version.aliases,
                    "tags": version.tags,
                }
                for version in artifact.versions
            ]
        }

    def _version(self, params: dict[str, str], told: Any) -> Any:
        owner = self.server.owner
        artifact, version = owner.version_of(params)
        consumer = params.get("consumerExperimentKey")
        if version.state != "CLOSED" and not params.get("versionId"):
            raise RefusedError(400, NOT_FINAL, f"version {version.version} is {version.state}")
        if consumer in owner.experiments:
            owner.experiments[consumer].used.append(version.id)
        return {
            "artifact": {
                "artifactId": artifact.id,
                "artifactName": artifact.name,
                "artifactType": artifact.type,
                "workspaceName": artifact.workspace,
                "tags": artifact.tags,
            },
            "artifactVersionId": version.id,
            "artifactVersion": version.version,
            "alias": version.aliases,
            "tags": version.tags,
            "metadata": version.metadata,
            "sizeInBytes": version.size,
            "experimentKey": version.experiment,
            "state": version.state,
            "added": version.added,
        }

    def _files(self, params: dict[str, str], told: Any) -> Any:
        _, version = self.server.owner.version_of(params)
        return {
            "files": [
                {
                    "artifactId": version.artifact,
                    "artifactVersionId": version.id,
                    "assetId": asset.id,
                    "fileName": asset.name,
                    "fileSize": len(asset.data),
                    "link": asset.link,
                    "remote": asset.link is not None,
                    "dir": None,
                    "type": asset.kind,
                    "metadata": asset.metadata,
                }
                for asset in version.assets.values()
            ]
        }

    def _upsert(self, params: dict[str, str], told: Any) -> Any:
        owner = self.server.owner
        experiment = owner.experiments.get(told["experimentKey"])
        if experiment is None:
            raise RefusedError(400, 90130, "no such experiment")
        return owner.upsert(told, experiment.workspace, experiment.project)

    def _labels(self, params: dict[str, str], told: Any) -> Any:
        owner = self.server.owner
        version = owner.find_version(told["artifactVersionId"])
        if told.get("alias") is not None:
            artifact = next(found for found in owner.artifacts.values() if found.id == version.artifact)
            moved = [alias for alias in told["alias"] if alias != "Latest"]
            for other in artifact.versions:
                other.aliases = [alias for alias in other.aliases if alias not in moved]
            version.aliases = [*moved, *(alias for alias in version.aliases if alias == "Latest")]
        if told.get("versionTags") is not None:
            version.tags = list(told["versionTags"])
        if told.get("versionMetadata") is not None:
            version.metadata = told["versionMetadata"]
        return {"msg": "ok"}

    def _artifact_details(self, params: dict[str, str], told: Any) -> Any:
        artifact = self.server.owner.artifact_of({"artifactId": told["artifactId"]})
        if told.get("tags") is not None:
            artifact.tags = list(told["tags"])
        if told.get("artifactType") is not None:
            artifact.type = told["artifactType"]
        return {"msg": "ok"}

    def _state(self, params: dict[str, str], told: Any) -> Any:
        version = self.server.owner.find_version(told["artifactVersionId"])
        if version.state == "CLOSED" and told["state"] != "CLOSED":
            raise RefusedError(400, IMMUTABLE, "the version is closed")
        version.state = told["state"]
        return {"msg": "ok"}

    def _remote_assets(self, params: dict[str, str], told: Any) -> Any:
        for item in told["remoteArtifactAssetRequests"]:
            self._store(item, Asset(item["assetId"], item["artifactVersionId"], item["fileName"], link=item["link"],
                                    metadata=item.get("metadata"), kind=item.get("type") or "asset"))  # fmt: skip
        return {"msg": "ok"}

    def _upload(self, params: dict[str, str], body: Any) -> Any:
        fields = _form(self.headers["Content-Type"], body)
        metadata = fields["metadata"].decode() if "metadata" in fields else None
        asset = Asset(params["assetId"], params.get("artifactVersionId", ""), params["fileName"], metadata=metadata)
        if "link" in fields:
            asset.link = fields["link"].decode()
        else:
            asset.data = fields["file"]
        asset.kind = params.get("type") or "asset"
        self._store(params, asset)
        return {"assetId": asset.id}

    def _store(self, told: dict[str, Any], asset: Asset) -> None:
        if not asset.version:
            return
        version = self.server.owner.find_version(asset.version)
        if version.state == "CLOSED" or asset.id in version.assets:
            raise RefusedError(400, IMMUTABLE, "the asset is immutable")
        version.assets[asset.id] = asset

    # Contents

    def _content(self, params: dict[str, str]) -> None:
        owner = self.server.owner
        version = owner.find_version(params["artifactVersionId"])
        asset = version.assets.get(params["assetId"])
        if asset is None or asset.link is not None:
            raise RefusedError(400, 90500, "no such asset")
        if owner.contents == "links" and params.get("allow301", "").lower() == "true":
            query = urlencode(
                {"v": version.id, "expires": time.time() + owner.link_life, "signature": f"sig-{owner.links_revoked}"}
            )
            self._send(301, b"", {"Location": f"{owner.url}/objects/{asset.id}?{query}"})
            return
        self._bytes(asset, owner.contents == "ranges")

    def _object(self, id: str, params: dict[str, str]) -> None:
        owner = self.server.owner
        valid = params.get("signature") == f"sig-{owner.links_revoked}" and float(params.get("expires", "0")) >= time.time()
        if not valid or "Authorization" in self.headers:
            self._send(403, b"<Error><Code>AccessDenied</Code></Error>", {})
            return
        self._bytes(owner.find_version(params["v"]).assets[id], True)

    def _bytes(self, asset: Asset, ranges: bool) -> None:
        owner, faults = self.server.owner, self.server.owner.faults
        data = bytearray(asset.data)
        for offset in faults.flip:
            if offset < len(data):
                data[offset] ^= 0xFF
        total, first, end, status = len(data), 0, len(data), 200
        headers = {"ETag": asset.etag, "Content-Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if ranges:
            match = self.headers.get("If-Match")
            if match is not None and match != asset.etag:
                self._send(412, b"", {})
                return
            if wanted:
                first = int(wanted[1])
                end = min(int(wanted[2] or total) + 1, total)
                if first >= total:
                    self._send(416, b"", {"Content-Range": f"bytes */{total}"})
                    return
                status = 206
                headers["Content-Range"] = f"bytes {first}-{end - 1}/{total}"
        else:
            del headers["ETag"]
        part = bytes(data[first:end])
        if faults.short:
            part = part[: -faults.short]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if faults.cut_after is not None and faults.cuts and len(part) > faults.cut_after:
            faults.cuts -= 1
            self.wfile.write(part[: faults.cut_after])
            self.wfile.flush()
            self._cut()
            return
        with owner.lock:
            owner.sent += len(part)
        self.wfile.write(part)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    _handlers: ClassVar[dict[tuple[str, str], Any]] = {
        ("GET", "health/ping"): _ping,
        ("GET", "isAlive/ver"): _alive,
        ("GET", "account-details"): _account,
        ("GET", "workspaces"): _workspaces,
        ("GET", "projects"): _projects,
        ("POST", "logger/add/run"): _add_run,
        ("POST", "logger/get/run"): _get_run,
        ("POST", "status-report/update"): _status,
        ("GET", "experiment/metadata"): _experiment,
        ("GET", "experiments"): _experiments,
        ("GET", "artifacts/get-all"): _list,
        ("GET", "artifacts/get"): _details,
        ("GET", "artifacts/version"): _version,
        ("GET", "artifacts/version/files"): _files,
        ("POST", "write/artifacts/upsert"): _upsert,
        ("POST", "write/artifacts/version/labels"): _labels,
        ("POST", "write/artifacts/details"): _artifact_details,
        ("POST", "write/artifacts/state"): _state,
        ("POST", "write/artifact/assets/remote/batch"): _remote_assets,
        ("POST", "asset/upload"): _upload,
    }


def _form(content_type: str, body: bytes) -> dict[str, bytes]:
    """The fields of a multipart form."""
    match = re.search(r'boundary="?([^";]+)', content_type)
    assert match is not None
    fields = {}
    for part in body.split(b"--" + match[1].encode()):
        head, gap, value = part.partition(b"\r\n\r\n")
        name = re.search(rb'[; ]name="([^"]*)"', head)
        if gap and name:
            fields[name[1].decode()] = value.removesuffix(b"\r\n")
    return fields
