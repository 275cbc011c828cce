"""What a server tells of itself: one line of JSON (or text) for each request, and Prometheus metrics.

Neither has a secret: a signed URL is named by its route alone, callers by the name of their key. Labels of metrics come from
fixed sets, so that nobody can make their number grow.
"""

from __future__ import annotations

import contextvars
import datetime
import json
import logging
import sys
import threading
import traceback
from typing import Any

from cachetools import TTLCache, cached
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from artifactfs.serve.state import State

ROUTES = ("graphql", "storage", "artifacts", "file_stream", "healthz", "metrics", "other")

_COUNTS_FOR = 5.0
"""Seconds for which the number and size of uploads is not counted again."""

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")

access = logging.getLogger("artifactfs.serve.access")


class Metrics:
    """The metrics of one server."""

    def __init__(self, state: State) -> None:
        self.registry = CollectorRegistry()
        prefix = "artifactfs_serve"
        self.requests = Counter(f"{prefix}_requests", "Requests", ["route", "method", "status"], registry=self.registry)
        self.seconds = Histogram(f"{prefix}_request_seconds", "Time to answer", ["route"], registry=self.registry)
        self.operations = Counter(f"{prefix}_operations", "GraphQL operations", ["field", "outcome"], registry=self.registry)
        self.received = Counter(f"{prefix}_received_bytes", "Bytes of uploads", registry=self.registry)
        self.sent = Counter(f"{prefix}_sent_bytes", "Bytes of contents and manifests", registry=self.registry)
        self.running = Gauge(f"{prefix}_requests_running", "Requests that are being answered", registry=self.registry)
        self.refused = Counter(f"{prefix}_refused", "Requests without the right", ["reason"], registry=self.registry)
        # Whoever asks need no key: to ask again and again must not cost a walk through the disk each time.
        counts = cached(TTLCache(1, _COUNTS_FOR), lock=threading.Lock())(state.counts)
        pending = Gauge(f"{prefix}_pending_uploads", "Versions that are being uploaded", registry=self.registry)
        pending.set_function(lambda: counts()[0])
        size = Gauge(f"{prefix}_pending_bytes", "Bytes on disk of versions that are being uploaded", registry=self.registry)
        size.set_function(lambda: counts()[1])

    def text(self) -> bytes:
        """All of them in Prometheus' format."""
        return generate_latest(self.registry)


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, request, and what else was given as ``extra={"fields": …}``."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request := request_id.get():
            line["request"] = request
        line.update(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[1] is not None:
            line["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        return json.dumps(line, ensure_ascii=False)


class TextLines(logging.Formatter):
    """The same for people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        request = request_id.get()
        shown = "".join(f" {key}={value}" for key, value in ({"request": request} if request else {}).items())
        return super().format(record) + shown + "".join(f" {key}={value}" for key, value in fields.items())


def start_logging(form: str) -> None:
    """Everything goes to standard error, in the given form; the libraries' own lines only from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    access.setLevel(logging.INFO)
    logging.getLogger("artifactfs").setLevel(logging.INFO)
    # What uvicorn says of requests we say ourselves; and a connection that we cut off in the middle is no error of ours.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    logging.getLogger("uvicorn.access").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
