"""Runs on a W&B server: made, listed, ended, and which versions they logged and used.

A run is its bucket there: its id is the bucket's name. Which versions it logged and used the server knows from CreateArtifact and
UseArtifact; the lists of a ``Run`` are never sent.
"""

from __future__ import annotations

import json
import logging
import secrets
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import msgspec
from cachetools import LRUCache

from artifactfs import http
from artifactfs.errors import ArtifactFSError, CommError, NotFoundError
from artifactfs.forking import new_lock
from artifactfs.model import Run, Version
from artifactfs.names import ArtifactName
from artifactfs.store.wandb import queries
from artifactfs.store.wandb.answers import json_object, moment, whole
from artifactfs.store.wandb.client import Client, Node, dig

_SENT = 1024
_USED_FROM = "USE_ARTIFACT_WITH_ENTITY_AND_PROJECT_INFORMATION"
"""The feature of servers that are told where a used version is."""

log = logging.getLogger(__name__)


class Asking(Protocol):
    """How the server is asked."""

    url: str
    client: Client

    def ask(self, document: str, /, **variables: object) -> Node: ...
    def ask_pages(self, document: str, find: Callable[[Node], Any], /, **variables: object) -> Iterator[Node]: ...
    def features(self) -> frozenset[str]: ...


class Runs:
    """The runs of one server. Threads may share it."""

    def __init__(self, server: Asking) -> None:
        self._server = server
        self._lock = new_lock()
        self._sent: LRUCache[str, Node] = LRUCache(_SENT)

    def run(self, entity: str, project: str, id: str) -> Run:
        """NotFoundError if there is none."""
        node = dig(self._server.ask(queries.RUN, entity=entity, project=project, name=id), "project", "run")
        if not isinstance(node, dict):
            raise NotFoundError(f"run {entity}/{project}/{id} does not exist in {self._server.url}")
        return self._with_versions({"name": id, **node}, entity, project)

    def runs(self, entity: str, project: str) -> list[Run]:
        """The runs of a project by creation time."""

        def found(data: Node) -> object:
            runs = dig(data, "project", "runs")
            if runs is None and dig(data, "project") is not None:
                raise CommError(f"{self._server.url} does not list runs; look at them on its own pages")
            return runs

        where = {"entity": entity, "project": project, "order": "+created_at", "filters": "{}"}
        try:
            edges = list(self._server.ask_pages(queries.RUNS, found, **where))
        except NotFoundError:  # a project that is not there
            return []
        nodes = (dig(edge, "node") for edge in edges)
        runs = [self._with_versions(node, entity, project) for node in nodes if dig(node, "name")]
        return sorted(runs, key=lambda run: (run.created_at, run.id))

    def _with_versions(self, node: Node, entity: str, project: str) -> Run:
        """A run with what it logged and used: as far as that came with it, else asked for."""
        run = run_of(node, entity, project)

        def names(document: str, field: str) -> list[str]:
            some = dig(node, field)
            if isinstance(some, dict) and not dig(some, "pageInfo", "hasNextPage"):
                return _names_of((edge for edge in some.get("edges") or () if isinstance(edge, dict)), run.entity, run.project)
            where = {"entity": run.entity, "project": run.project, "run": run.id}
            edges = self._server.ask_pages(document, lambda data: dig(data, "project", "run", field), **where)
            return _names_of(edges, run.entity, run.project)

        logged, used = names(queries.RUN_OUTPUTS, "outputArtifacts"), names(queries.RUN_INPUTS, "inputArtifacts")
        return msgspec.structs.replace(run, logged=logged, used=used)

    def used_by(self, version: Version) -> list[Run]:
        """The runs that used a version, by id."""
        data = self._server.ask(queries.USED_BY, id=version.origin.commit)
        nodes = (dig(edge, "node") for edge in dig(data, "artifact", "usedBy", "edges") or ())
        found = (self._with_versions(node, version.entity, version.project) for node in nodes if dig(node, "name"))
        return sorted({run.path: run for run in found}.values(), key=lambda run: run.id)

    def mark_used(self, version: Version, run: Run) -> None:
        """Record that ``run``, which is there, used ``version``."""
        source = version.origin
        asked: Node = {
            "entityName": run.entity,
            "projectName": run.project,
            "runName": run.id,
            "artifactID": source.commit,
            "usedAs": None,
        }
        if _USED_FROM in self._server.features():
            asked |= {"artifactEntityName": source.entity, "artifactProjectName": source.project}
        self._server.ask(queries.USE, input=asked)

    def save(self, run: Run) -> None:
        """Make the run, or change it; nothing is sent where nothing has changed."""
        asked: Node = {
            "id": None,
            "name": run.id,
            "project": run.project,
            "entity": run.entity,
            "groupName": run.group or None,
            "description": None,
            "displayName": run.name or None,
            "notes": None,
            "commit": None,
            "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
            "host": None,
            "debug": None,
            "program": None,
            "repo": None,
            "jobType": run.job_type or None,
            "state": None,
            "sweep": None,
            "tags": None,
            "summaryMetrics": None,
        }
        with self._lock:
            known = self._sent.get(run.path)
        if known == asked:
            return
        answer = self._server.ask(queries.UPSERT_RUN, **asked)
        if not dig(answer, "upsertBucket", "bucket"):
            raise CommError(f"{self._server.url} does not say that it has the run {run.path}")
        with self._lock:
            self._sent[run.path] = asked

    def start(self, entity: str, project: str) -> str:
        """Make a run that nobody asked for, as W&B's client does to log without one; its id."""
        time = moment(None)
        run = Run(entity=entity, project=project, id=secrets.token_hex(4), job_type="auto", created_at=time, updated_at=time)
        self.save(run)
        self.finish(run, 0)
        return run.id

    def finish(self, run: Run, exit_code: int) -> None:
        """Tell the server that the run ended. That it could not be told is logged: nothing of the run is lost by it."""
        client = self._server.client
        parts = "/".join(urllib.parse.quote(part, "") for part in (run.entity, run.project, run.id))
        url = f"{client.base}/files/{parts}/file_stream"
        body = json.dumps({"complete": True, "exitcode": exit_code}).encode()
        try:
            headers = {**client.headers(url), "Content-Type": "application/json"}
            answer = http.exchange("POST", url, headers, lambda: body, client.deadline)
            if not 200 <= answer.status < 300:
                raise CommError(f"status {answer.status}")
        except ArtifactFSError as error:
            log.warning("%s was not told that run %s ended: %s", self._server.url, run.path, error)


def run_of(node: Node, entity: str, project: str) -> Run:
    """A run as the server describes it, without its versions."""
    config = json_object(node.get("config"))
    plain = {key: dig(value, "value") if isinstance(value, dict) and "value" in value else value for key, value in config.items()}
    return Run(
        entity=str(dig(node, "project", "entity", "name") or entity),
        project=str(dig(node, "project", "name") or project),
        id=str(node["name"]),
        name=str(node.get("displayName") or node["name"]),
        job_type=str(node.get("jobType") or ""),
        group=str(node.get("group") or ""),
        config={key: value for key, value in plain.items() if key not in ("_wandb", "wandb_version")},
        created_at=moment(node.get("createdAt")),
        updated_at=moment(node.get("heartbeatAt") or node.get("createdAt")),
    )


def made_by(node: object, home: ArtifactName) -> str:
    """The path of the run that a version's ``createdBy`` names; "" for none."""
    return run_of(node, home.entity, home.project).path if isinstance(node, dict) and node.get("name") else ""


def _names_of(edges: Iterable[Node], entity: str, project: str) -> list[str]:
    found = []
    for edge in edges:
        sequence, number = dig(edge, "node", "artifactSequence"), whole(dig(edge, "node", "versionIndex"))
        home = f"{dig(sequence, 'project', 'entity', 'name') or entity}/{dig(sequence, 'project', 'name') or project}"
        if dig(sequence, "name") and number is not None:
            found.append(f"{home}/{dig(sequence, 'name')}:v{number}")
    return list(dict.fromkeys(found))
