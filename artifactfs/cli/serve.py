"""``artifactfs serve`` and its keys. The server's libraries are loaded only by the command that starts it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from artifactfs import names
from artifactfs.cache import BlockCache
from artifactfs.cli.output import Column
from artifactfs.cli.session import Group, Session, pass_session
from artifactfs.errors import UsageError
from artifactfs.settings import parse_size
from artifactfs.store.native import native_store
from artifactfs.store.urls import open_store


@click.group("serve", cls=Group, invoke_without_command=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="The port; 0 takes a free one.")
@click.option("--data-dir", metavar="DIR", help="Where uploads wait and keys are; by default in the state directory.")
@click.option("--keys", "key_file", metavar="FILE", help="The file of keys; keys.json in the data directory by default.")
@click.option("--tls-cert", metavar="FILE", help="Serve https with this certificate chain (PEM).")
@click.option("--tls-key", metavar="FILE", help="The certificate's private key, if it is not in the same file.")
@click.option("--public-url", metavar="URL", help="What clients reach the server by, if it stands behind a proxy.")
@click.option("--max-upload", default="5TiB", show_default=True, metavar="SIZE", help="The largest file that may be uploaded.")
@click.option(
    "--url-lifetime",
    type=click.IntRange(1, 7 * 86400),
    default=3600,
    show_default=True,
    metavar="S",
    help="Seconds that a signed URL is good for.",
)
@click.option(
    "--shutdown-timeout",
    type=click.IntRange(1, 3600),
    default=30,
    show_default=True,
    metavar="S",
    help="Seconds that requests under way have to end once the server is to stop.",
)
@click.option("--log-format", type=click.Choice(["json", "text"]), default="json", show_default=True, help="The form of the log.")
@click.pass_context
def serve_command(context: click.Context, /, **options: Any) -> None:
    """Serve the store to wandb clients: WANDB_BASE_URL is the URL that is printed, WANDB_API_KEY a key of `serve key add`.

    Logs go to standard error. SIGTERM and SIGINT end it once what is under way is done.
    """
    session: Session = context.ensure_object(Session)
    context.meta[_PLACES] = (options["data_dir"], options["key_file"])
    if context.invoked_subcommand is None:
        _serve(session, options)


_PLACES = "artifactfs.cli.serve.places"


def _places(session: Session, data_dir: str | None, key_file: str | None) -> tuple[Path, Path]:
    """(data directory, file of keys)."""
    from artifactfs.serve.service import default_data_dir  # part of the server

    store = open_store(session.settings.store)
    data = Path(data_dir).absolute() if data_dir else default_data_dir(session.settings.state_dir, store.url)
    return data, Path(key_file).absolute() if key_file else data / "keys.json"


def _serve(session: Session, options: dict[str, Any]) -> None:
    try:
        # starlette, uvicorn, graphql and ijson: 0.5 s, and not everybody has them
        from artifactfs.serve import observing, server
        from artifactfs.serve.keys import KeyFile
        from artifactfs.serve.service import Options, Service
        from artifactfs.serve.state import State
    except ImportError as error:
        raise UsageError(f"serving needs {error.name}, which is not installed: pip install 'artifactfs[serve]'") from None
    data, key_file = _places(session, options["data_dir"], options["key_file"])
    chosen = Options(
        host=options["host"],
        port=options["port"],
        public_url=_public_url(options["public_url"]),
        tls_cert=options["tls_cert"] or "",
        tls_key=options["tls_key"] or "",
        max_upload=parse_size(options["max_upload"], "--max-upload"),
        url_lifetime=options["url_lifetime"],
        shutdown_timeout=options["shutdown_timeout"],
        log_format=options["log_format"],
    )
    if chosen.tls_key and not chosen.tls_cert:
        raise UsageError("--tls-key needs --tls-cert")
    keys = KeyFile(key_file)
    if not keys.all():
        session.warn(f"there are no keys in {key_file}: nobody is let in; artifactfs serve key add NAME --entity E makes one")
    cache = BlockCache(session.settings.cache_dir, session.settings.cache_size)
    store = native_store(open_store(session.settings.store, cache), "served: its clients speak to it directly")
    service = Service(store, cache, State(data), keys, chosen)
    try:
        listening = server.bound_socket(chosen)
        url = chosen.public_url or server.url_of(chosen, listening)
        observing.start_logging(chosen.log_format)

        def ready(_: Callable[[], None]) -> None:
            document = {"url": url, "store": service.store.url, "data_dir": str(data)}
            session.result(document, f"serving {service.store.url} at {url}")
            sys.stdout.flush()

        server.run(service, listening, ready, lambda: os._exit(0))
    finally:
        service.close()


def _public_url(url: str | None) -> str:
    if url and not url.startswith(("http://", "https://")):
        raise UsageError(f"--public-url {url!r} must begin with https:// or http://")
    return (url or "").rstrip("/")


@serve_command.group("key", cls=Group)
def key_group() -> None:
    """Make, list and remove the keys that open the server. Changes count at once, also in a server that runs."""


def _key_file(context: click.Context, session: Session, data_dir: str | None, key_file: str | None) -> Any:
    from artifactfs.serve.keys import KeyFile  # part of the server

    above = context.meta.get(_PLACES, (None, None))
    return KeyFile(_places(session, data_dir or above[0], key_file or above[1])[1])


_data_dir = click.option("--data-dir", metavar="DIR", help="The server's data directory.")
_keys = click.option("--keys", "key_file", metavar="FILE", help="The file of keys.")


@key_group.command("add")
@click.argument("name")
@click.option(
    "--entity",
    "entities",
    multiple=True,
    required=True,
    metavar="E",
    help="An entity it opens, or * for all. Repeatable; E:read or E:write says what for.",
)
@click.option("--write", is_flag=True, help="To write, too; without, to read only.")
@_data_dir
@_keys
@pass_session
@click.pass_context
def add_command(
    context: click.Context,
    session: Session,
    name: str,
    entities: tuple[str, ...],
    write: bool,
    data_dir: str | None,
    key_file: str | None,
) -> None:
    """Make a key called NAME and print it: the only time that it can be seen. It is what WANDB_API_KEY is to be."""
    grants = dict(_grant(entity, write) for entity in entities)
    key = _key_file(context, session, data_dir, key_file).add(name, grants)
    session.result({"name": name, "key": key, "grants": grants}, key)


def _grant(text: str, write: bool) -> tuple[str, str]:
    entity, colon, right = text.partition(":")
    if colon and right not in ("read", "write"):
        raise UsageError(f"--entity {text!r}: after the colon comes read or write")
    if entity != "*":
        names.check_entity(entity)
    return entity, right or ("write" if write else "read")


@key_group.command("list")
@_data_dir
@_keys
@pass_session
@click.pass_context
def list_command(context: click.Context, session: Session, data_dir: str | None, key_file: str | None) -> None:
    """List the keys by name, with what they open. The keys themselves are not kept anywhere."""
    rows = [
        {"name": key.name, "grants": key.grants, "opens": _shown_grants(key.grants), "created_at": key.created_at}
        for key in _key_file(context, session, data_dir, key_file).all()
    ]
    session.rows(
        rows,
        [
            Column("NAME", lambda row: row["name"]),
            Column("OPENS", lambda row: row["opens"]),
            Column("CREATED", lambda row: row["created_at"]),
        ],
    )


def _shown_grants(grants: dict[str, str]) -> str:
    return ", ".join(f"{entity} ({right})" for entity, right in sorted(grants.items()))


@key_group.command("remove")
@click.argument("name")
@_data_dir
@_keys
@pass_session
@click.pass_context
def remove_command(context: click.Context, session: Session, name: str, data_dir: str | None, key_file: str | None) -> None:
    """Take the key NAME away: the next request with it is refused."""
    _key_file(context, session, data_dir, key_file).remove(name)
    session.result({"name": name, "removed": True}, f"removed {name}")
