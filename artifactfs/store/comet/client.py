"""The requests of Comet's REST API that artifacts need, as its Python client (comet_ml 3.58) sends them; no policy.

``<server>/api/rest/v2/…`` answers about workspaces, artifacts and contents and changes versions; ``<server>/clientlib/…`` begins
and ends experiments and takes assets. Every request has the API key in ``Authorization``; it is read anew after a refusal, so
that a new key is taken by whoever is running.

What asks may be repeated, and so may all that says how something is to be: labels, states, an asset under an id of ours (the
second one is refused as immutable, which is a success). Making a version may not: :class:`UnknownOutcomeError`.

Nothing a server answers is trusted to be of the right form: what cannot be decoded is a NetworkError, and names and paths are
checked by those who use them. Any thread may use a client.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from artifactfs import http
from artifactfs.attempts import DEADLINE, Attempts, TransientError
from artifactfs.errors import ArtifactFSError, ConflictError, NetworkError, NotFoundError, NotPermittedError, UsageError
from artifactfs.forking import new_lock
from artifactfs.store.comet.account import api_key, store_url

_PATIENCE = 600.0  # seconds for the answer to an upload: the server stores it elsewhere before it answers
_ANSWER_MAX = 1 << 30  # bytes: a list of some million files
_BATCH = 1000  # remote assets a request
_LIB = "3.58.8"  # the client whose requests these are; the server is told so

# The server's own numbers for what went wrong (``sdk_error_code``).
_NOT_FOUND = frozenset({624522, 624523})
_NOT_FINAL = frozenset({90402, 90403})
_EXISTS = frozenset({90399, 7000019})
_IMMUTABLE = frozenset({7000005, 7000006})

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class NotFinalError(NotFoundError):
    """The version is there but not closed: it is being made, or making it failed."""


class UnknownOutcomeError(NetworkError):
    """The request was sent, its answer lost."""


class ImmutableError(ConflictError):
    """What was to be changed or stored is closed."""


class Row(msgspec.Struct, frozen=True, rename="camel"):
    """An artifact in the list of a workspace."""

    name: str = ""
    artifact_name: str = ""
    artifact_id: str = ""
    type: str | None = None
    artifact_type: str | None = None
    project: str | None = None
    description: str | None = None
    tags: list[str] | None = None


class VersionRow(msgspec.Struct, frozen=True, rename="camel"):
    """A version in what is told of an artifact. ``added`` is in milliseconds since the epoch; ``metadata`` is JSON."""

    artifact_version_id: str
    version: str
    metadata: str | None = None
    size_in_bytes: int | None = None
    state: str | None = None
    added: int | None = None
    alias: list[str] | None = None
    tags: list[str] | None = None


class Details(msgspec.Struct, frozen=True, rename="camel"):
    """All that is told of an artifact."""

    artifact_id: str
    name: str
    type: str | None = None
    project: str | None = None
    description: str | None = None
    tags: list[str] | None = None
    versions: list[VersionRow] | None = None


class VersionDetails(msgspec.Struct, frozen=True, rename="camel"):
    """What is told of one version: ``experiment_key`` is that of the experiment which logged it."""

    artifact_version_id: str
    artifact_version: str
    alias: list[str] | None = None
    tags: list[str] | None = None
    metadata: str | None = None
    size_in_bytes: int | None = None
    experiment_key: str | None = None


class FileRow(msgspec.Struct, frozen=True, rename="camel"):
    """An asset of a version. ``link`` is a remote one's URI; ``metadata`` is JSON."""

    asset_id: str
    file_name: str
    file_size: int | None = None
    artifact_version_id: str = ""
    link: str | None = None
    remote: bool | None = None
    metadata: str | dict[str, Any] | None = None

    @property
    def is_remote(self) -> bool:
        return self.link is not None if self.remote is None else self.remote


class ExperimentRow(msgspec.Struct, frozen=True, rename="camel"):
    """An experiment. Times are in milliseconds since the epoch."""

    experiment_key: str
    experiment_name: str | None = None
    project_name: str | None = None
    workspace_name: str | None = None
    start_time_millis: int | None = None
    end_time_millis: int | None = None


class Handshake(msgspec.Struct, frozen=True):
    """What an experiment is told when it begins."""

    run_id: str = msgspec.field(name="runId")
    project_id: str | None = None
    name_limit: int | None = msgspec.field(name="artifactNameMaxLength", default=None)


class Upserted(msgspec.Struct, frozen=True, rename="camel"):
    """A version that was begun."""

    artifact_id: str
    artifact_version_id: str
    current_version: str
    previous_version: str | None = None


class _Workspaces(msgspec.Struct, rename="camel"):
    workspace_names: list[str]


class _Project(msgspec.Struct, rename="camel"):
    project_name: str


class _Projects(msgspec.Struct):
    projects: list[_Project] = []


class _Artifacts(msgspec.Struct):
    artifacts: list[Row] = []


class _Files(msgspec.Struct):
    files: list[FileRow] = []


class _Experiments(msgspec.Struct):
    experiments: list[ExperimentRow] = []


class _Refusal(msgspec.Struct):
    msg: str | None = None
    sdk_error_code: int | None = None


class CometClient:
    """The API of one server. ``deadline``: seconds without progress until a request is given up with a NetworkError."""

    def __init__(self, server: str, deadline: float = DEADLINE) -> None:
        self.server = server
        self.url = store_url(server)
        self.deadline = deadline
        self._lock = new_lock()
        self._key = ""

    # Looking up

    def workspaces(self) -> list[str]:
        """The workspaces that the key may see."""
        return self._get("workspaces", {}, _Workspaces).workspace_names

    def projects(self, workspace: str) -> list[str]:
        """The projects of a workspace. NotFoundError."""
        return [row.project_name for row in self._get("projects", {"workspaceName": workspace}, _Projects).projects]

    def artifacts(self, workspace: str) -> list[Row]:
        """The artifacts of a workspace. NotFoundError."""
        return self._get("artifacts/get-all", {"workspace": workspace}, _Artifacts).artifacts

    def artifact(self, workspace: str, name: str) -> Details:
        """An artifact and its versions, those not closed too. NotFoundError."""
        return self._get("artifacts/get", {"workspace": workspace, "artifactName": quote(name, safe="")}, Details)

    def version(self, workspace: str, name: str, version: str, consumer: str = "") -> VersionDetails:
        """One version; ``consumer`` is the key of the experiment that uses it, to be recorded. NotFoundError, NotFinalError."""
        asked = {"workspace": workspace, "artifactName": quote(name, safe=""), "version": version}
        if consumer:
            asked |= {"experimentKey": consumer, "consumerExperimentKey": consumer}
        return self._get("artifacts/version", asked, VersionDetails)

    def files(self, workspace: str, name: str, version: str) -> list[FileRow]:
        """The assets of a version, in any order. NotFoundError."""
        asked = {"workspace": workspace, "artifactName": quote(name, safe=""), "version": version}
        return self._get("artifacts/version/files", asked, _Files).files

    def experiment(self, key: str) -> ExperimentRow:
        """NotFoundError."""
        return self._get("experiment/metadata", {"experimentKey": key}, ExperimentRow)

    def experiments(self, workspace: str, project: str) -> list[ExperimentRow]:
        """The experiments of a project."""
        asked = {"workspaceName": workspace, "projectName": project, "archived": "false"}
        return self._get("experiments", asked, _Experiments).experiments

    # Contents

    def content_url(self, asset: str, version: str) -> str:
        """Where a stored asset is asked for; the answer may be a redirect to an object store."""
        asked = urlencode({"assetId": asset, "artifactVersionId": version, "allow301": "true"})
        return f"{self.server}/api/rest/v2/experiment/asset/get-asset?{asked}"

    def headers(self) -> Mapping[str, str]:
        """With what :meth:`content_url` is asked. NotPermittedError where there is no key."""
        return {**http.OWN_CREDENTIALS, "Authorization": self._current_key()}

    def refused(self) -> None:
        """To be called when a request with :meth:`headers` was: the key is read anew for the next."""
        with self._lock:
            self._key = ""

    # Experiments

    def begin(self, key: str, workspace: str, project: str) -> Handshake:
        """The experiment of that key, begun in a project if it is not there. Idempotent."""
        told = {
            "apiKey": self._current_key(),
            "experimentKey": key,
            "offline": False,
            "projectName": project,
            "teamName": workspace,
            "libVersion": _LIB,
            "getOrCreateEnabled": True,
        }
        place = "clientlib/logger/add/run"
        return self._decoded(self._post(place, told), Handshake, place)

    def end(self, key: str, handshake: Handshake) -> None:
        """Say that an experiment is over. Idempotent."""
        told = {
            "apiKey": self._current_key(),
            "runId": handshake.run_id,
            "experimentKey": key,
            "projectId": handshake.project_id,
            "is_alive": False,
            "offline": False,
        }
        self._post("clientlib/status-report/update", told)

    # Making versions

    def upsert(
        self,
        name: str,
        kind: str,
        experiment: str,
        metadata: str | None,
        version: str | None,
        aliases: Sequence[str],
        tags: Sequence[str],
    ) -> Upserted:
        """Begin a version, in the workspace of the experiment; None: the next one. ConflictError for one that there is;
        UnknownOutcomeError where it may have been begun."""
        told = {
            "artifactName": name,
            "artifactType": kind,
            "experimentKey": experiment,
            "versionMetadata": metadata,
            "version": version,
            "alias": list(aliases),
            "versionTags": list(tags),
        }
        place = "api/rest/v2/write/artifacts/upsert"
        return self._decoded(self._post(place, told, repeat=False), Upserted, place)

    def close_version(self, version: str, experiment: str, state: str = "CLOSED") -> None:
        """Let a version be ``CLOSED``, which makes it one, or ``ERROR``. Idempotent."""
        told = {"artifactVersionId": version, "experimentKey": experiment, "state": state}
        self._post("api/rest/v2/write/artifacts/state", told)

    def label(
        self,
        version: str,
        *,
        aliases: Sequence[str] | None = None,
        metadata: str | None = None,
        tags: Sequence[str] | None = None,
    ) -> None:
        """Let a version have exactly these; None leaves what there is. Idempotent."""
        told = {"alias": aliases, "artifactVersionId": version, "versionMetadata": metadata, "versionTags": tags}
        self._post("api/rest/v2/write/artifacts/version/labels", told)

    def label_artifact(self, artifact: str, *, kind: str | None = None, tags: Sequence[str] | None = None) -> None:
        """Let an artifact have this type and exactly these tags; None leaves what there is. Idempotent."""
        told = {"artifactId": artifact, "artifactType": kind, "versionMetadata": None, "version": None, "tags": tags}
        self._post("api/rest/v2/write/artifacts/details", told)

    def add_remote(self, experiment: str, assets: Sequence[Mapping[str, Any]]) -> None:
        """Add assets that are links: ``assetId``, ``artifactVersionId``, ``fileName``, ``link``, ``metadata`` (JSON or None)."""
        for first in range(0, len(assets), _BATCH):
            batch = [{"type": "asset", "isRemote": True, "overwrite": False, **asset} for asset in assets[first : first + _BATCH]]
            place = f"clientlib/rest/v2/write/artifact/assets/remote/batch?{urlencode({'experimentKey': experiment})}"
            try:
                self._post(place, {"remoteArtifactAssetRequests": batch})
            except ImmutableError:
                log.debug("%s had assets of a batch already", self.url)

    def upload(
        self,
        experiment: str,
        handshake: Handshake,
        version: str,
        asset: str,
        path: str,
        size: int,
        open_content: Callable[[], Iterator[bytes]],
        metadata: str | None,
        sent: Callable[[int], None] | None = None,
    ) -> None:
        """Store a content of ``size`` bytes as the asset ``asset`` of a version. Idempotent: what is stored already stays.

        ``open_content`` gives its bytes, anew for each attempt. ``sent`` is told how many bytes more have left.
        """
        asked: dict[str, str] = {
            "experimentId": experiment,
            "projectId": handshake.project_id or "",
            "assetId": asset,
            "fileName": path,
            "overwrite": "False",
            "runId": handshake.run_id,
            "artifactVersionId": version,
        }
        extension = path.rpartition("/")[2].rpartition(".")
        if extension[0] and extension[2]:
            asked["extension"] = extension[2]
        attempts = Attempts(f"{self.url}: storing {path}", self.deadline)
        boundary = secrets.token_hex(16)

        def form() -> http.Body:
            return _Form(boundary, metadata, size, open_content(), attempts, sent)

        url = f"{self.server}/clientlib/asset/upload?{urlencode(asked)}"
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        try:
            self._ask("POST", url, headers, form, attempts, patience=_PATIENCE)
        except ImmutableError:
            log.debug("%s had %s already", self.url, path)

    # Requests

    def _current_key(self) -> str:
        with self._lock:
            if not self._key:
                self._key = api_key(self.server)
            return self._key

    def _get(self, place: str, asked: Mapping[str, str], kind: type[_T]) -> _T:
        url = f"{self.server}/api/rest/v2/{place}?{urlencode(asked)}"
        return self._decoded(self._ask("GET", url, {}, lambda: b"", self._attempts(place)), kind, place)

    def _post(self, place: str, told: Mapping[str, Any], repeat: bool = True) -> bytes:
        data = json.dumps(told, separators=(",", ":")).encode()
        headers = {"Content-Type": "application/json;charset=utf-8"}
        attempts = self._attempts(place.partition("?")[0])
        return self._ask("POST", f"{self.server}/{place}", headers, lambda: data, attempts, repeat)

    def _attempts(self, place: str) -> Attempts:
        return Attempts(f"{self.url} ({place.removeprefix('api/rest/v2/')})", self.deadline)

    def _ask(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: Callable[[], http.Body],
        attempts: Attempts,
        repeat: bool = True,
        patience: float = 0.0,
    ) -> bytes:
        sent = {**self.headers(), **headers}
        while True:
            try:
                answer = http.call(method, url, sent, body, attempts, _ANSWER_MAX, follow=False, repeat=repeat, patience=patience)
                break
            except TransientError as error:
                if error.wait is None:
                    raise UnknownOutcomeError(f"{attempts.where}: {error}; it is not known whether it was done") from None
                attempts.failed(error)  # refused for now, with a time to come back: it was not carried out
            except http.RedirectedError as error:
                raise NetworkError(f"{attempts.where}: {error}; name the server itself in the store's URL") from None
        if answer.status != 200:
            raise self._error(answer, attempts.where, method == "GET")
        return answer.body

    def _error(self, answer: http.Answer, where: str, asked: bool) -> ArtifactFSError:
        """What an answer that is no success means; ``asked``: nothing was to be changed."""
        try:
            refusal = msgspec.json.decode(answer.body, type=_Refusal)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            refusal = _Refusal()
        code = refusal.sdk_error_code
        said = "".join(char for char in refusal.msg or "" if char.isprintable())[:200]
        text = f"{where}: {said or 'the server answers ' + str(answer.status)}"
        if answer.status in (401, 403):
            self.refused()
            return NotPermittedError(
                f"{where}: the server refuses the API key ({answer.status}); check COMET_API_KEY and its rights"
            )
        if code in _NOT_FINAL:
            return NotFinalError(f"{text}; it is not closed: wait until it is logged, or log it again")
        if code in _NOT_FOUND or answer.status in (404, 410):
            return NotFoundError(text)
        if code in _EXISTS:
            return ConflictError(f"{text}: it exists already; give another version, or none")
        if code in _IMMUTABLE:
            return ImmutableError(text)
        if answer.status == 413:
            return UsageError(f"{text}: it is larger than the server takes")
        if answer.status in (400, 422):
            # What is asked for and refused so is a workspace or an experiment that is not there: the numbers for that are many.
            return NotFoundError(text) if asked else UsageError(text)
        return NetworkError(f"{text}; check that {self.url} is a Comet server")

    def _decoded(self, data: bytes, kind: type[_T], place: str) -> _T:
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise NetworkError(
                f"{self.url} answers {place} with what is not understood ({error}); check that it is a Comet server"
            ) from None


class _Form:
    """A multipart form with a content as its field ``file``, sent as it is read."""

    def __init__(
        self,
        boundary: str,
        metadata: str | None,
        size: int,
        content: Iterator[bytes],
        attempts: Attempts,
        sent: Callable[[int], None] | None,
    ) -> None:
        own = b""
        if metadata is not None:
            own = b'--%s\r\nContent-Disposition: form-data; name="metadata"\r\n\r\n%s\r\n' % (
                boundary.encode(),
                metadata.encode(),
            )
        head = b'--%s\r\nContent-Disposition: form-data; name="file"; filename="file"\r\n\r\n' % boundary.encode()
        tail = b"\r\n--%s--\r\n" % boundary.encode()
        self._size = len(own) + len(head) + size + len(tail)
        self._parts = _joined(own + head, content, size, tail)
        self._attempts = attempts
        self._sent = sent
        self._buffer = memoryview(b"")

    def __len__(self) -> int:
        return self._size

    def read(self, size: int = -1, /) -> bytes:
        """At most ``size`` bytes more; some, unless it is the end."""
        if not self._buffer:
            self._buffer = memoryview(next(self._parts, b""))
        limit = len(self._buffer) if size < 0 else size
        data, self._buffer = bytes(self._buffer[:limit]), self._buffer[limit:]
        self._attempts.arrived(len(data), 0)  # it goes on; but a refusal at its end is one more, however long it took
        if self._sent is not None and data:
            self._sent(len(data))
        return data


def _joined(head: bytes, content: Iterator[bytes], size: int, tail: bytes) -> Iterator[bytes]:
    """The form's bytes. ConflictError for a content that is not ``size`` bytes long."""
    yield head
    left = size
    for piece in content:
        left -= len(piece)
        if left < 0:
            break
        if piece:
            yield piece
    if left:
        raise ConflictError("a file has changed while it was sent; log it again")
    yield tail
