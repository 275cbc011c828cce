"""W&B servers."""

from __future__ import annotations

from artifactfs.cache import BlockCache
from artifactfs.errors import UsageError
from artifactfs.store import Store


def open_wandb(url: str, cache: BlockCache | None, offline: bool) -> Store:
    """The store at ``url``."""
    raise UsageError(f"{url} cannot be opened by this version")
