"""Which Comet server a URL means, and the API key for it.

``comet://host[:port]``: http for this machine, https for all others. Without a host it is what ``COMET_URL_OVERRIDE`` says, else
the address in the API key, else www.comet.com. The key is ``COMET_API_KEY``, else ``api_key`` in the file that ``COMET_CONFIG``
names, else in ``~/.comet.config``, where Comet's client writes it.
"""

from __future__ import annotations

import base64
import binascii
import configparser
import ipaddress
import json
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from artifactfs.errors import NotPermittedError, UsageError

PUBLIC = "https://www.comet.com"
_SCHEME = "comet"
_ASK = "set COMET_API_KEY, or write it into ~/.comet.config (comet login does)"


def server_of(url: str) -> str:
    """The root URL (``https://host[:port]``) of the server that a store's URL means. UsageError for one that cannot be right."""
    parts = _split(url)
    if parts.username is not None or parts.password is not None:
        raise UsageError(f"a comet:// store takes no user or password in its URL: {_ASK}")
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise UsageError("a comet:// store is comet://host[:port], with nothing behind that; the workspace is part of names")
    if not parts.netloc:
        return _default_server()
    host = parts.hostname or ""
    return f"{'http' if is_loopback(host) else 'https'}://{parts.netloc.lower()}"


def store_url(server: str) -> str:
    """The URL of the store on a server: what :func:`server_of` takes."""
    return f"{_SCHEME}://{urlsplit(server).netloc}"


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine, so that nobody listens on the way."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def api_key(server: str) -> str:
    """The key for ``server``, as it is now. NotPermittedError where there is none, or one that cannot be."""
    key = (os.environ.get("COMET_API_KEY") or _configured().get("api_key", "")).strip()
    if not key:
        raise NotPermittedError(f"there is no API key for {store_url(server)}: {_ASK}")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise NotPermittedError(f"the API key for {store_url(server)} has characters that no key has: {_ASK}")
    return key


def _default_server() -> str:
    override = os.environ.get("COMET_URL_OVERRIDE") or _configured().get("url_override", "") or _address_in_key()
    if not override:
        return PUBLIC
    try:
        parts = urlsplit(override.strip())
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise UsageError(
            "COMET_URL_OVERRIDE is no URL of a server; write https://host/clientlib/, or name the host: comet://host"
        )
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise UsageError(f"COMET_URL_OVERRIDE names {parts.netloc} without TLS, which would show the API key; write https://")
    return f"{parts.scheme}://{parts.netloc.lower()}"


def _address_in_key() -> str:
    """A key may have the address of its server behind a star: base64 of ``{"baseUrl": …}``."""
    _, _, attributes = (os.environ.get("COMET_API_KEY") or _configured().get("api_key", "")).partition("*")
    try:
        found = json.loads(base64.b64decode(attributes.rstrip("=") + "=" * (-len(attributes.rstrip("=")) % 4)))
        return str(found.get("baseUrl") or "") if isinstance(found, dict) else ""
    except (binascii.Error, ValueError):
        return ""


def _configured() -> Mapping[str, str]:
    """The ``[comet]`` section of the client's configuration file; empty where there is none that can be read."""
    named = os.environ.get("COMET_CONFIG")
    path = Path(named).expanduser() if named else Path("~/.comet.config").expanduser()
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(path / ".comet.config" if path.is_dir() else path, encoding="utf-8")
        return dict(parser["comet"]) if parser.has_section("comet") else {}
    except (OSError, RuntimeError, UnicodeDecodeError, configparser.Error):
        return {}


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise UsageError("the comet:// store's URL cannot be read; write comet://host[:port]") from None
    return parts
