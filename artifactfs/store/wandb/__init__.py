"""The store on a W&B server, spoken to as W&B's own client does.

``store`` is the catalog and reading, ``saving`` how a version is made; ``client`` sends GraphQL, ``files`` finds and reads stored
files, ``manifest`` reads lists of files, ``queries`` holds the documents.
"""

from __future__ import annotations

from artifactfs.cache import BlockCache
from artifactfs.store.wandb.client import Client, base_url
from artifactfs.store.wandb.store import WandbStore


def open_wandb(url: str, cache: BlockCache | None = None, offline: bool = False) -> WandbStore:
    """The store at ``url``, ``wandb://[host[:port]]``. Nothing is asked of the server yet. UsageError for what cannot be."""
    return WandbStore(Client(base_url(url)), cache, offline)
