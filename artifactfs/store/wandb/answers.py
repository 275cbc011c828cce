"""Values of a server's answers, as they come: a number may be text, an object may be JSON, a time may be missing."""

from __future__ import annotations

import datetime
import json
import logging
from typing import Any

log = logging.getLogger(__name__)


def whole(value: object) -> int | None:
    """A number that a server gives as a number or as text; None for what is none."""
    if isinstance(value, str) and value.lstrip("-").isdecimal() and value.isascii() and len(value) < 19:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63 else None


def count(value: object) -> int:
    """A number that cannot be negative; 0 for what is none."""
    return max(whole(value) or 0, 0)


def json_object(text: object) -> dict[str, Any]:
    """An object that comes as JSON text, or as itself; empty for what is none."""
    found: object = text
    if isinstance(text, str) and text:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
    return found if isinstance(found, dict) else {}


def moment(value: object) -> str:
    """A time as ``Version`` has it; now for what is none."""
    found = None
    if isinstance(value, str) and value:
        try:
            found = datetime.datetime.fromisoformat(value)
        except ValueError:
            log.debug("a server's time is none: %r", value[:40])
    if found is None:
        found = datetime.datetime.now(datetime.UTC)
    if found.tzinfo is None:
        found = found.replace(tzinfo=datetime.UTC)
    return found.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
