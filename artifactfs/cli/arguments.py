"""Arguments and options that several commands take, and what their text means."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from artifactfs import names
from artifactfs.errors import UsageError, from_os_error

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}

_Function = TypeVar("_Function", bound=Callable[..., Any])


def metadata(text: str | None) -> dict[str, Any] | None:
    """What ``--metadata`` gives: a JSON object, or ``@FILE`` (``@-``: standard input) that holds one; None for None."""
    if text is None:
        return None
    if text.startswith("@"):
        text = _read(text[1:])
    try:
        return names.check_metadata(text)
    except TypeError as error:
        raise UsageError(str(error)) from None


def _read(path: str) -> str:
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode()
    except OSError as error:
        raise from_os_error(error, f"reading metadata from {path}") from None
    except UnicodeDecodeError:
        raise UsageError(f"metadata in {path} is not UTF-8 text") from None


def ttl(text: str | None) -> int | None:
    """Seconds for ``30d``, ``36h``, ``90m``, ``45s``, ``2w``; None for None."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,9})([smhdw])", text)
    if not match or not int(match[1]):
        raise UsageError(f"time to live {text!r} is not a duration over 0; write for example 30d, 36h or 2w")
    return int(match[1]) * _UNITS[match[2]]


def draft_options(function: _Function) -> _Function:
    """The options that describe a new version."""
    for option in reversed(
        [
            click.option("--type", "kind", default="", metavar="T", help="The type of a new collection; dataset if not given."),
            click.option("--alias", "aliases", multiple=True, metavar="A", help="Also give this alias. Repeatable."),
            click.option("--tag", "tags", multiple=True, metavar="T", help="Give this tag. Repeatable."),
            click.option("--description", metavar="TEXT", help="What is in it."),
            click.option("--metadata", "metadata_text", metavar="JSON|@FILE", help="A JSON object, or a file that holds one."),
        ]
    ):
        function = option(function)
    return function


path_prefix = click.option("--path-prefix", default="", metavar="P", help="Only entries whose path starts with P.")
