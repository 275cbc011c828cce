"""Where things are and what they default to: environment, then ``$XDG_CONFIG_HOME/artifactfs/config.toml``, then defaults.

Keys of the config file: ``store``, ``entity``, ``project``, ``cache_dir``, ``cache_size``, ``staging_dir``. The environment
has the same as ``ARTIFACTFS_STORE`` and so on. ``~`` is expanded in paths. Where the store is a W&B server, ``WANDB_ENTITY`` and
``WANDB_PROJECT`` are taken where ours are not set.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

from artifactfs.errors import UsageError

DEFAULT_CACHE_SIZE = 10 << 30

_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}
_KEYS = ("store", "entity", "project", "cache_dir", "cache_size", "staging_dir")


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """``entity`` and ``project`` are "" when not set. ``cache_size`` is in bytes. Directories need not exist yet."""

    store: str
    entity: str
    project: str
    cache_dir: Path
    cache_size: int
    staging_dir: Path
    state_dir: Path
    """Holds the registry of mounts, their control sockets and their logs; for the user alone (0700)."""


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """The settings in force. UsageError names a malformed config file or value."""
    env = os.environ if environ is None else environ
    home = _home(env)
    config = _read_config(_xdg(env, home, "CONFIG", ".config") / "config.toml")

    def value(key: str) -> str:
        return env.get(f"ARTIFACTFS_{key.upper()}") or config.get(key, "")

    def directory(key: str, default: Path) -> Path:
        text = value(key)
        return Path(os.path.abspath(_expand(text, home))) if text else default

    def wandb(key: str) -> str:
        """What W&B's client would take, where the store is a W&B server."""
        return env.get(f"WANDB_{key}", "") if value("store").startswith("wandb://") else ""

    data = _xdg(env, home, "DATA", ".local/share")
    size = value("cache_size")
    return Settings(
        store=_expand(value("store"), home) or str(data / "store"),
        entity=value("entity") or wandb("ENTITY"),
        project=value("project") or wandb("PROJECT"),
        cache_dir=directory("cache_dir", _xdg(env, home, "CACHE", ".cache")),
        cache_size=parse_size(size, "cache_size") if size else DEFAULT_CACHE_SIZE,
        staging_dir=directory("staging_dir", data / "stages"),
        state_dir=_xdg(env, home, "STATE", ".local/state"),
    )


def _home(env: Mapping[str, str]) -> Path:
    """``$HOME``, else the home directory of the password database, which a container's user id may not be in."""
    try:
        return Path(env.get("HOME") or Path.home())
    except RuntimeError:
        raise UsageError("the home directory is not known; set HOME") from None


def parse_size(text: str, what: str = "size") -> int:
    """Bytes for ``10GiB``, ``10G`` (10**9), ``500 MB``, ``1024``. UsageError otherwise."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if not match or match[2] not in _UNITS or len(match[1]) > 20:
        raise UsageError(f"{what} {text!r} is not a size; write bytes, or a number with KiB, MiB, GiB, TiB, kB, MB, GB or TB")
    number, unit = match[1], _UNITS[match[2]]
    return int(number) * unit if number.isdigit() else int(float(number) * unit)


def _xdg(env: Mapping[str, str], home: Path, which: str, default: str) -> Path:
    base = env.get(f"XDG_{which}_HOME", "")
    return (Path(base) if base.startswith("/") else home / default) / "artifactfs"


def _expand(text: str, home: Path) -> str:
    return str(home) + text[1:] if text == "~" or text.startswith("~/") else text


def _read_config(path: Path) -> dict[str, str]:
    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except FileNotFoundError:
        return {}
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"config file {path} cannot be read: {error}") from None
    for key, item in table.items():
        if key not in _KEYS:
            raise UsageError(f"config file {path} has an unknown key {key!r}; known are {', '.join(_KEYS)}")
        if not isinstance(item, (str, int)):
            raise UsageError(f"config file {path}: {key} must be a string")
    return {key: str(item) for key, item in table.items()}
