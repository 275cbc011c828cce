"""One W&B server: its URL, the caller's key, GraphQL.

The key is looked up anew for each request (``WANDB_API_KEY``, then netrc, whose machine is the host with its port, then W&B's
settings files), so that one that was renewed counts at once. It goes to the server's own URLs only, never into a message.
"""

from __future__ import annotations

import base64
import configparser
import contextlib
import json
import netrc
import os
import re
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from artifactfs import http
from artifactfs.attempts import DEADLINE
from artifactfs.errors import ArtifactFSError, CommError, NetworkError, NotFoundError, NotPermittedError, UsageError
from artifactfs.waiting import about_to_wait

_MOST = 256 << 20
"""Bytes of an answer: the URLs of 5,000 files have ten megabytes."""
_PAGES = 100_000
_CLOUD = "https://api.wandb.ai"
_SCHEMES = ("http", "https")
_RETRIED = frozenset({409, 507, 509, *range(520, 528), 529, 530})  # besides the usual ones: what gateways answer
_LOOPBACK = re.compile(r"localhost|127(\.[0-9]+){3}|\[?::1\]?", re.IGNORECASE)
_REFUSED = re.compile(r"permission denied|not authorized|unauthorized|forbidden|access denied|not permitted", re.IGNORECASE)
_MISSING = re.compile(r"not found|does not exist|no such", re.IGNORECASE)

Node = dict[str, Any]
"""A JSON object of an answer."""


def base_url(url: str) -> str:
    """The base URL of the server that ``url``, ``wandb://[host[:port]]``, means: plain HTTP on this machine, TLS elsewhere, or
    what ``WANDB_BASE_URL`` or W&B's settings file says of that host; without a host they name the server, or else it is W&B's
    own. ``scheme`` and ``path`` behind a ``?`` say it for good. UsageError for a URL that cannot be right."""
    given = _given_url() or _setting("base_url").rstrip("/") or _CLOUD
    try:
        parts, known = urllib.parse.urlsplit(url), urllib.parse.urlsplit(given)
        host, user, port = parts.hostname, parts.username, parts.port
        known_host = known.hostname
        options = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError:
        raise UsageError("the store's URL is not valid; write wandb://host[:port]") from None
    if user is not None or known.username is not None:
        raise UsageError("a W&B server's URL has no user or key in it; set WANDB_API_KEY, or put the key into ~/.netrc")
    scheme, path = options.pop("scheme", ""), options.pop("path", "")
    if options or parts.fragment or parts.path not in ("", "/") or scheme not in ("", *_SCHEMES) or (path and path[0] != "/"):
        raise UsageError(
            f"store wandb://{parts.netloc} takes no path, and no options but scheme=http or https, path=/…; write wandb://host[:port]"
        )
    if parts.netloc in ("", known.netloc) and not scheme and not path:
        if known.scheme in _SCHEMES and known_host:
            return given
        if not host:
            raise UsageError("WANDB_BASE_URL is no URL of a server; write https://host, or name it: wandb://host[:port]")
    if not host:
        raise UsageError("store wandb:// names no server; write wandb://host[:port]")
    if port == 0:
        raise UsageError(f"store {url} has a port that cannot be")
    return f"{scheme or _usual_scheme(host)}://{parts.netloc}{path.rstrip('/')}"


def store_url(base: str) -> str:
    """The ``wandb://`` URL that means the server at ``base``, whatever the environment says later."""
    parts = urllib.parse.urlsplit(base)
    options = {"scheme": parts.scheme if parts.scheme != _usual_scheme(parts.hostname or "") else "", "path": parts.path}
    query = urllib.parse.urlencode({name: value for name, value in options.items() if value}, safe="/")
    return f"wandb://{parts.netloc}" + (f"?{query}" if query else "")


def _usual_scheme(host: str) -> str:
    return "http" if _LOOPBACK.fullmatch(host) else "https"


def api_key(netloc: str) -> str:
    """The caller's key for the server; "" if there is none."""
    return os.environ.get("WANDB_API_KEY", "").strip() or _netrc_key(netloc) or _setting("api_key", netloc)


def _netrc_key(netloc: str) -> str:
    named = os.environ.get("NETRC")
    for path in [Path(named).expanduser()] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        with contextlib.suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
            hosts = netrc.netrc(str(path)).hosts
            found = hosts.get(netloc) or next((it for host, it in hosts.items() if host.lower() == netloc.lower()), None)
            if found is not None and found[2]:
                return found[2]
    return ""


def _setting(name: str, netloc: str = "") -> str:
    """What the user's W&B settings file says; with ``netloc`` only if it is about that server. The settings of the working
    directory are not looked at: whoever made that directory must not learn the key."""
    folder = os.environ.get("WANDB_CONFIG_DIR") or str(Path.home() / ".config" / "wandb")
    parser = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(OSError, configparser.Error, UnicodeDecodeError):
        parser.read_string(Path(folder, "settings").read_text())
    if not parser.has_section("default"):
        return ""
    about = parser.get("default", "base_url", fallback="").strip() or _given_url() or _CLOUD
    if netloc and urllib.parse.urlsplit(about).netloc != netloc:
        return ""
    return parser.get("default", name, fallback="").strip()


def _given_url() -> str:
    return os.environ.get("WANDB_BASE_URL", "").strip().rstrip("/")


class Client:
    """Talks to the server at ``base``. ``deadline``: seconds within which each answer must come, all attempts together. Threads
    may share one."""

    def __init__(self, base: str, deadline: float = DEADLINE) -> None:
        self.base = base
        self.deadline = deadline
        parts = urllib.parse.urlsplit(base)
        self.netloc = parts.netloc
        self._origin = (parts.scheme, parts.netloc)
        self._closed = False  # whether the URLs of its own that it gives out were seen to need the key

    def ways(self, url: str) -> Iterator[dict[str, str]]:
        """What to send with a request for ``url``, which the server gave out: nothing, as such a URL is good in itself; and if
        that is refused the key, where the URL is the server's own and not signed."""
        plain = dict(http.OWN_CREDENTIALS)
        parts = urllib.parse.urlsplit(url)
        if (parts.scheme, parts.netloc) != self._origin or is_signed(url):
            yield plain
            return
        if not self._closed:
            yield plain
            self._closed = True
        yield self.headers(url)

    def headers(self, url: str) -> dict[str, str]:
        """What to send with a request for ``url`` that needs the key: that, where the URL is the server's own."""
        parts = urllib.parse.urlsplit(url)
        sent = dict(http.OWN_CREDENTIALS)
        if (parts.scheme, parts.netloc) == self._origin:
            key = api_key(self.netloc)
            if not key:
                if os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
                    raise NotPermittedError(
                        f"there is no API key for {self.netloc}, and identity tokens (WANDB_IDENTITY_TOKEN_FILE) are not used; "
                        "set WANDB_API_KEY"
                    )
                raise NotPermittedError(
                    f"there is no API key for {self.netloc}; set WANDB_API_KEY, or `machine {self.netloc}` in ~/.netrc"
                )
            sent["Authorization"] = "Basic " + base64.b64encode(f"api:{key}".encode()).decode()
            with contextlib.suppress(ValueError, AttributeError):
                sent.update({str(k): str(v) for k, v in json.loads(os.environ.get("WANDB_X_EXTRA_HTTP_HEADERS", "")).items()})
        return sent

    def ask(self, document: str, /, **variables: object) -> Node:
        """The ``data`` of the answer to a query or mutation.

        NotPermittedError for a key that is not taken, NotFoundError and CommError with the server's words for what it refuses,
        NetworkError once the retries are used up.
        """
        match = re.search(r"(?:query|mutation)\s+(\w+)", document)
        name = match[1] if match else ""
        url = f"{self.base}/graphql"
        body = json.dumps({"query": document, "variables": variables, "operationName": name}).encode()
        headers = {**self.headers(url), "Content-Type": "application/json"}
        about_to_wait()
        answer = http.exchange("POST", url, headers, lambda: body, self.deadline, _MOST, _RETRIED)
        if answer.status in (401, 403):
            raise NotPermittedError(
                f"{self.netloc} does not accept your API key ({answer.status}); check WANDB_API_KEY or ~/.netrc"
            )
        try:
            found = msgspec.json.decode(http.decoded(answer, _MOST))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise NetworkError(f"{self.netloc} answers {name} with {answer.status} and no JSON; is it a W&B server?")
        errors = found.get("errors")
        if errors or answer.status != 200:
            raise _refusal(self.netloc, name, errors, answer.status)
        data = found.get("data")
        if not isinstance(data, dict):
            raise CommError(f"{self.netloc} answers {name} without data")
        return data

    def pages(self, document: str, find: Callable[[Node], Any], /, **variables: object) -> Iterator[Node]:
        """The edges of a connection that ``find`` gets from each page's data, page by page; none where it finds none."""
        cursor: object = None
        for _ in range(_PAGES):
            connection = find(self.ask(document, cursor=cursor, **variables))
            if not isinstance(connection, dict):
                return
            yield from edges_of(connection)
            cursor = next_page(connection, cursor)
            if cursor is None:
                return
        raise CommError(f"{self.netloc} has no end of pages")


def edges_of(connection: object) -> list[Node]:
    """The edges of a connection; none of what is none."""
    found = dig(connection, "edges")
    return [edge for edge in found if isinstance(edge, dict)] if isinstance(found, list) else []


def next_page(connection: object, cursor: object) -> object:
    """The cursor behind a page that was asked for with ``cursor``; None behind the last one."""
    following = dig(connection, "pageInfo", "endCursor")
    return following if dig(connection, "pageInfo", "hasNextPage") is True and following and following != cursor else None


def is_signed(url: str) -> bool:
    """Whether credentials are in the URL itself."""
    query = urllib.parse.urlsplit(url).query.lower()
    return any(name.partition("=")[0].rpartition("-")[2] in ("signature", "sig", "sign", "token") for name in query.split("&"))


def dig(data: object, *path: str) -> Any:
    """What is at ``path`` in nested objects; None where one is missing or none."""
    for part in path:
        if not isinstance(data, dict):
            return None
        data = data.get(part)
    return data


def _refusal(netloc: str, name: str, errors: object, status: int) -> ArtifactFSError:
    texts = [str(dig(error, "message") or "") for error in errors] if isinstance(errors, list) else []
    text = "; ".join(text for text in texts if text)[:500] or f"status {status}"
    text = "".join(char if char.isprintable() else " " for char in text)
    message = f"{netloc} refuses {name}: {text}"
    if _REFUSED.search(text):
        return NotPermittedError(message)
    return NotFoundError(message) if _MISSING.search(text) else CommError(message)
