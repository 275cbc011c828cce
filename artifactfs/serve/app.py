"""The ASGI application: routes, keys, limits and time-outs around the store.

Every request gets an id, which its answer carries (``X-Request-Id``) and the log has. Work that touches a disk or the store
runs in threads, a bounded number at a time; the event loop only moves bytes. Errors of ours become one line with a status that
tells clients whether to try again: 4xx not, 503 yes. GraphQL answers 200 with ``errors``, as its clients expect.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import unquote

import anyio
import anyio.to_thread
import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from artifactfs.errors import (
    ArtifactFSError,
    ConflictError,
    IntegrityError,
    NetworkError,
    NotFoundError,
    NotPermittedError,
    StorageFullError,
    UsageError,
)
from artifactfs.names import parse
from artifactfs.serve.contents import Arrival, Begun, Download, begin, open_by_digest, open_entry, read_file
from artifactfs.serve.keys import Caller
from artifactfs.serve.manifests import write_manifest
from artifactfs.serve.mutations import Mutation, check_run, check_write
from artifactfs.serve.nodes import Query
from artifactfs.serve.observing import ROUTES, Metrics, access, request_id
from artifactfs.serve.saving import check_object
from artifactfs.serve.schema import Answer, Operation, execute, prepare
from artifactfs.serve.service import Context, Service
from artifactfs.serve.signing import Claims

log = logging.getLogger(__name__)

MAX_MANIFEST = 1 << 30
MAX_RUN_FILE = 1 << 30
MAX_STREAM = 64 << 20
"""Bytes of a manifest, a run's file, and a piece of a file stream at most."""
_BATCH = 1 << 20
"""Bytes of a body that go to a thread at a time."""
_LEAST_RATE = 1024
"""Bytes a second that a body must make on the whole, beyond the time-out."""
_MUTATIONS = 64
"""Mutations at a time: a client that loses patience repeats a commit, which waits for the first."""

_SHORT = 64 << 10
"""Bytes of JSON that may be read in the event loop: a thread would take longer."""
_ALWAYS = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; sandbox"),
    (b"cache-control", b"no-store"),
)
"""Headers of all answers: what people stored must do nothing in a browser, and stay nowhere."""
_JUDGED = (b"content-length", b"transfer-encoding", b"sec-fetch-site")

_T = TypeVar("_T")
_Handler = Callable[[Request], Awaitable[Response]]

_STATUS: tuple[tuple[type[ArtifactFSError], int], ...] = (
    (NotFoundError, 404),
    (NotPermittedError, 403),
    (ConflictError, 409),
    (UsageError, 400),
    (IntegrityError, 422),
    (StorageFullError, 507),
    (NetworkError, 503),
)


def status_of(error: ArtifactFSError) -> int:
    """The HTTP status for an error."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


class TooSlowError(Exception):
    """A body that does not come."""


class Application:
    """The routes over a service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.metrics = Metrics(service.state)
        threads = service.options.threads
        self.working: set[object] = set()
        """One thing for each piece of work that a thread does."""
        self._unlimited = anyio.CapacityLimiter(math.inf)
        self._reading = anyio.CapacityLimiter(threads)
        self._moving = anyio.CapacityLimiter(threads)
        self._changing = anyio.CapacityLimiter(_MUTATIONS)
        self._looking = anyio.CapacityLimiter(1)  # what needs no key takes no thread from what does
        routes = [
            Route("/graphql", self.graphql, methods=["POST"]),
            Route("/storage/{token}/{name:path}", self.get_storage, methods=["GET"]),
            Route("/storage/{token}/{name:path}", self.put_storage, methods=["PUT"]),
            Route("/artifactsV2/{rest:path}", self.get_content, methods=["GET"]),
            Route("/artifacts/{rest:path}", self.get_content, methods=["GET"]),
            Route("/files/{entity}/{project}/{run}/file_stream", self.file_stream, methods=["POST"]),
            Route("/healthz", self.healthz, methods=["GET"]),
            Route("/metrics", self.show_metrics, methods=["GET"]),
        ]
        handlers: dict[Any, Any] = dict.fromkeys(
            (HTTPException, ArtifactFSError, TooSlowError, ClientDisconnect, Exception), _explained
        )
        self.app: ASGIApp = Watched(Starlette(routes=routes, exception_handlers=handlers), self.metrics, service)

    async def _in_thread(self, limiter: anyio.CapacityLimiter, work: Callable[..., _T], *arguments: Any) -> _T:
        ticket = object()

        def working() -> _T:
            try:
                return work(*arguments)
            finally:
                self.working.discard(ticket)

        async with limiter:
            self.working.add(ticket)  # until the thread is done, even if the request is not there any more
            return await anyio.to_thread.run_sync(working, limiter=self._unlimited)

    # Who asks

    def _context(self, request: Request, caller: Caller) -> Context:
        request.state.caller = caller.name
        base = self._service.options.public_url or f"{request.scope['scheme']}://{request.headers.get('host', '')}"
        return Context(self._service, caller, base, request_id.get())

    def _caller(self, request: Request) -> Caller:
        """Whoever has the key of the request. HTTPException 401."""
        scheme, _, rest = request.headers.get("authorization", "").partition(" ")
        key = ""
        if scheme.lower() == "basic":
            try:
                key = base64.b64decode(rest, validate=True).decode().partition(":")[2]
            except (binascii.Error, ValueError):
                key = ""
        caller = self._service.keys.caller(key) if key else None
        if caller is None:
            self.metrics.refused.labels("key").inc()
            message = "the API key is not known here" if key else "an API key is needed: WANDB_API_KEY"
            raise HTTPException(401, message, {"WWW-Authenticate": 'Basic realm="artifactfs"'})
        return caller

    def _claims(self, request: Request) -> tuple[Context, Claims]:
        """What a signed URL allows, if the key in whose name it was signed is still there."""
        try:
            claims = self._service.signer.check(request.path_params["token"], request.method)
            caller = self._service.keys.by_id(claims.caller)
            if caller is None:
                raise NotPermittedError("the API key that the URL was made for was removed")
        except NotPermittedError:
            self.metrics.refused.labels("signature").inc()
            raise
        return self._context(request, caller), claims

    # GraphQL

    async def graphql(self, request: Request) -> Response:
        context = self._context(request, self._caller(request))
        body = await self._body(request, self._service.options.max_document)
        asked = _decoded(body) if len(body) < _SHORT else await self._in_thread(self._reading, _decoded, body)
        answer, data = await self._answer(context, asked)
        self.metrics.operations.labels(*answer).inc()
        return Response(data, media_type="application/json")

    async def _answer(self, context: Context, asked: Any) -> tuple[tuple[str, str], bytes]:
        """((field, outcome), the answer as JSON) of a request."""
        try:
            if not isinstance(asked, dict) or not isinstance(asked.get("query"), str):
                raise UsageError('a GraphQL request is an object with a "query"')
            variables, name = asked.get("variables"), asked.get("operationName")
            if not isinstance(variables, (dict, type(None))) or not isinstance(name, (str, type(None))):
                raise UsageError('"variables" must be an object, and "operationName" a string')
            operation = await self._in_thread(self._reading, prepare, asked["query"], name or None)
        except UsageError as error:
            return ("none", "refused"), _encode({"data": None, "errors": [{"message": str(error)}]})
        limiter = self._changing if operation.kind == "mutation" else self._reading
        answer, data = await self._in_thread(limiter, _executed, operation, context, variables or {})
        return (operation.label, "broken" if answer.broken else "failed" if answer.failed else "done"), data

    # Signed URLs

    async def get_storage(self, request: Request) -> Response:
        context, claims = self._claims(request)
        if claims.kind == "entry":
            return await self._send(request, open_entry, context, *claims.names)
        if claims.kind == "manifest":
            return await self._send_manifest(context, claims.names[0])
        if claims.kind == "run-file":
            context.need_read(claims.names[0].partition("/")[0], "the file")
            path = context.state.run_files(*claims.names).get(claims.names[1])
            if path is None or not path.exists():
                raise NotFoundError("there is no such file")
            headers = {"Content-Type": "application/octet-stream", "Content-Disposition": "attachment"}
            return Pieces(self._pieces(read_file(path)), {**headers, "Content-Length": str(path.stat().st_size)})
        raise NotPermittedError("the URL is not for reading")

    async def _send_manifest(self, context: Context, version: str) -> Response:
        name = parse(version)
        context.need_read(name.entity, version)
        found = await self._in_thread(self._reading, self._service.content_version, name)
        pieces = write_manifest(self._service, found)
        first = await self._in_thread(self._reading, next, pieces, b"")  # what fails at once has a status
        return Pieces(self._pieces(pieces, first), {"Content-Type": "application/json"})

    async def put_storage(self, request: Request) -> Response:
        context, claims = self._claims(request)
        if claims.kind in ("upload", "part", "manifest-upload"):
            artifact, object = claims.names
            check_object(context, artifact, object)
            target = context.state.object_path(artifact, object)
            most = MAX_MANIFEST if claims.kind == "manifest-upload" else self._service.options.max_upload
        elif claims.kind == "run-file":
            check_write(context, claims.names[0].partition("/")[0])
            target = context.state.run_object(*claims.names)
            most = MAX_RUN_FILE
        else:
            raise NotPermittedError("the URL is not for writing")
        given = request.headers.get("content-md5")
        if given is not None and claims.md5 and given != claims.md5:
            raise UsageError("Content-MD5 is not the MD5 that the URL was signed for")
        md5 = await self._receive(request, target, min(most, self._service.options.max_upload), claims, given or "")
        return Response(b"", 200, {"ETag": f'"{md5}"'})

    async def _receive(self, request: Request, target: Any, most: int, claims: Claims, given: str) -> str:
        """Take the body; its hex MD5."""
        _check_length(request, most)
        arrival = Arrival(target, most, claims.md5 or given, claims.digest)
        try:
            batch = bytearray()
            async for data in self._stream(request):
                batch += data
                if len(batch) >= _BATCH:
                    await self._in_thread(self._moving, arrival.write, batch)
                    self.metrics.received.inc(len(batch))
                    batch = bytearray()
            self.metrics.received.inc(len(batch))
            return await self._in_thread(self._moving, arrival.finish, batch)
        finally:
            arrival.abandon()

    # Contents by key

    async def get_content(self, request: Request) -> Response:
        """``/artifactsV2/<region>/<entity>/<project>/<collection>/[<artifact>/]<birth artifact>/<hex digest>/<name>`` and
        ``/artifacts/<entity>/<hex digest>``."""
        context = self._context(request, self._caller(request))
        parts = _raw_parts(request)
        if parts[0] == "artifactsV2" and len(parts) in (8, 9):
            entity, ids, digest = parts[2], parts[5:-2], parts[-2]
        elif parts[0] == "artifacts" and len(parts) == 3:
            entity, ids, digest = parts[1], [], parts[2]
        else:
            raise NotFoundError("there is nothing here")
        context.need_read(entity, "the content")
        return await self._send(request, open_by_digest, context, entity, ids, digest)

    async def _send(self, request: Request, opening: Callable[..., Download], *arguments: Any) -> Response:
        """The content that ``opening`` gives. A small one takes one turn of one thread."""

        def work() -> tuple[Download, Begun]:
            opened = opening(*arguments)
            return opened, begin(opened, request.method, request.headers)

        opened, begun = await self._in_thread(self._reading, work)
        if begun.offset == begun.end:
            self.metrics.sent.inc(len(begun.body))
            return Response(begun.body, begun.status, begun.headers)
        return Pieces(self._rest(opened, begun.body, begun.offset, begun.end), begun.headers, begun.status)

    async def _rest(self, opened: Download, first: bytes, offset: int, end: int) -> AsyncIterator[bytes]:
        try:
            self.metrics.sent.inc(len(first))
            yield first
            while offset < end:
                data = await self._in_thread(self._moving, opened.read, offset, end)
                offset += len(data)
                self.metrics.sent.inc(len(data))
                yield data
        finally:
            opened.close()

    async def _pieces(self, pieces: Iterator[bytes], first: bytes = b"") -> AsyncIterator[bytes]:
        if first:
            yield first
        while data := await self._in_thread(self._moving, _next_piece, pieces):
            self.metrics.sent.inc(len(data))
            yield data

    # Runs

    async def file_stream(self, request: Request) -> Response:
        """What a run tells of itself. Its state is kept; its metrics and its console are not, artifacts are all we store."""
        context = self._context(request, self._caller(request))
        entity, project, run = (request.path_params[key] for key in ("entity", "project", "run"))
        check_write(context, entity)
        check_run(run)
        body = await self._body(request, MAX_STREAM)
        told = _decoded(body) if len(body) < _SHORT else await self._in_thread(self._reading, _decoded, body)
        if isinstance(told, dict):
            await self._in_thread(self._changing, _note_run, context, f"{entity}/{project}/{run}", told)
        return JSONResponse({"exitcode": None, "limits": {}})

    # Looking after it

    async def healthz(self, request: Request) -> Response:
        """200 if the store and the data directory answer."""
        await self._in_thread(self._looking, self._service.check)
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, request: Request) -> Response:
        return Response(await self._in_thread(self._looking, self.metrics.text), media_type="text/plain; version=0.0.4")

    # Bodies

    async def _body(self, request: Request, most: int) -> bytes:
        _check_length(request, most)
        body = bytearray()
        async for data in self._stream(request):
            body += data
            if len(body) > most:
                raise HTTPException(413, f"the body is larger than {most} bytes")
        return bytes(body)

    async def _stream(self, request: Request) -> AsyncIterator[bytes]:
        """The body as it comes. TooSlowError if nothing comes for the time-out, or on the whole too little."""
        patience = self._service.options.body_timeout
        begun = time.monotonic()
        size = 0
        stream = request.stream()
        while True:
            try:
                async with asyncio.timeout(patience):
                    data = await anext(stream)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise TooSlowError from None
            size += len(data)
            if time.monotonic() - begun > patience + size / _LEAST_RATE:
                raise TooSlowError
            yield data


class Pieces(Response):
    """A body that is sent as it is made. What fails in the middle cuts the connection: the client sees that it is short."""

    def __init__(self, pieces: AsyncIterator[bytes], headers: dict[str, str], status: int = 200) -> None:
        self.status_code = status
        self.background = None
        self.body_iterator = pieces
        self.init_headers(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        gone = asyncio.create_task(_until_gone(receive))
        try:
            async for piece in self.body_iterator:
                if gone.done():
                    return  # to whom the rest is nothing
                if piece:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
        except ArtifactFSError as error:
            log.warning("cut off: %s", error)
            return
        except OSError:
            return  # the client has gone
        finally:
            gone.cancel()
            await self.body_iterator.aclose()  # type: ignore[attr-defined]  # it is a generator
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Watched:
    """Around all: the request's id, its line in the log, its metrics, and an answer whatever happens."""

    def __init__(self, app: ASGIApp, metrics: Metrics, service: Service) -> None:
        self._app = app
        self._metrics = metrics
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        id = secrets.token_hex(8)
        request_id.set(id)
        scope["path"] = scope["path"].replace(
            "\n", " "
        )  # patterns of routes stop at a line feed; names are read from the raw path
        route = scope["path"].split("/", 2)[1]
        route = {"artifactsV2": "artifacts", "files": "file_stream"}.get(route, route)
        route = route if route in ROUTES else "other"
        method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST", "PUT") else "other"
        begun, status, sent = time.monotonic(), 0, 0

        async def watching(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_ALWAYS, (b"x-request-id", id.encode())]
            elif message["type"] == "http.response.body":
                sent += len(message.get("body", b""))
            await send(message)

        self._metrics.running.inc()
        try:
            await self._answered(scope, receive, watching)
        finally:
            self._metrics.running.dec()
            seconds = time.monotonic() - begun
            self._metrics.requests.labels(route, method, str(status or 499)).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            caller = scope.get("state", {}).get("caller", "")
            fields = {"method": method, "route": route, "status": status or 499, "ms": round(seconds * 1000, 1), "sent": sent}
            access.info("request", extra={"fields": {**fields, "caller": caller}})

    async def _answered(self, scope: Scope, receive: Receive, send: Send) -> None:
        reason = _not_taken(scope)
        if reason:
            return await _error(400, reason, {"Connection": "close"})(scope, receive, send)
        try:
            await self._app(scope, receive, send)
        except Exception:  # it was answered (see _explained), as far as it could be
            log.exception("request failed")


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _not_taken(scope: Scope) -> str:
    """Why a request is not even looked at; "" for one that is. A body of two lengths may end elsewhere for a proxy before us; and
    a page of another site must not use the password that a browser remembers."""
    names = {name: value for name, value in scope["headers"] if name in _JUDGED}
    if b"content-length" in names and b"transfer-encoding" in names:
        return "a request has either Content-Length or Transfer-Encoding"
    if names.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin"):
        return "requests of other sites' pages are not answered"
    return ""


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    # In GraphQL's form, which is also what clients look for in other answers.
    return JSONResponse({"errors": [{"message": message}], "error": message}, status, headers)


async def _explained(request: Request, error: Exception) -> Response:
    """The answer for what a handler raised."""
    if isinstance(error, HTTPException):
        return _error(error.status_code, error.detail, dict(error.headers or {}))
    if isinstance(error, ArtifactFSError):
        return _error(status_of(error), str(error))
    if isinstance(error, TooSlowError):
        return _error(408, "the body did not come in time", {"Connection": "close"})
    if isinstance(error, ClientDisconnect):
        return _error(499, "the client has gone")  # nobody reads it
    return _error(500, f"the server failed; its log says more about request {request_id.get()}")


def _check_length(request: Request, most: int) -> None:
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and (len(length) > 20 or int(length) > most):
        raise HTTPException(413, f"the body is larger than {most} bytes", {"Connection": "close"})


def _raw_parts(request: Request) -> list[str]:
    """The parts of the path, each unquoted by itself: ids may hold a quoted slash."""
    raw: bytes = request.scope.get("raw_path") or b""
    return [unquote(part, errors="surrogateescape") for part in raw.decode("ascii", "replace").strip("/").split("/")]


def _decoded(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise UsageError("the request is no JSON that can be read") from None


def _executed(operation: Operation, context: Context, variables: dict[str, Any]) -> tuple[Answer, bytes]:
    root = Mutation(context) if operation.kind == "mutation" else Query(context)
    answer = execute(operation, root, context, variables)
    return answer, _encode(answer.body)


def _encode(body: Any) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _next_piece(pieces: Iterator[bytes]) -> bytes:
    """The next piece that is not empty; b"" at the end."""
    return next((piece for piece in pieces if piece), b"")


def _note_run(context: Context, path: str, told: dict[str, Any]) -> None:
    if told.get("complete"):
        context.state.save_run(path, state="finished" if told.get("exitcode") in (0, None) else "failed")
    elif "files" in told or "dropped" in told:
        summary = _summary(told.get("files"))
        context.state.save_run(path, state="running", summary=summary)


def _summary(files: Any) -> str | None:
    """The newest summary of a run, which comes as the content of a file."""
    if not isinstance(files, dict) or not isinstance(files.get("wandb-summary.json"), dict):
        return None
    lines = files["wandb-summary.json"].get("content")
    return lines[-1] if isinstance(lines, list) and lines and isinstance(lines[-1], str) else None
