"""What the Python API works with: a store, the reader of its contents, and the defaults of names."""

from __future__ import annotations

import getpass
import os
from typing import Any, Protocol

from artifactfs import settings as _settings
from artifactfs.cache import BlockCache
from artifactfs.errors import UsageError
from artifactfs.forking import new_lock
from artifactfs.links import parse_name
from artifactfs.names import ArtifactName, check_entity
from artifactfs.reader import Reader
from artifactfs.settings import Settings
from artifactfs.store import Store
from artifactfs.store.urls import open_store

DEFAULT_PROJECT = "uncategorized"


class Session:
    """A store as ``settings`` name it. Threads may share one."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.cache = BlockCache(settings.cache_dir, settings.cache_size)
        self.store: Store = open_store(settings.store, self.cache)
        self._reader: Reader | None = None
        self._lock = new_lock()
        self._process = os.getpid()

    @property
    def reader(self) -> Reader:
        """Reads stored contents and references, checked; opened when it is first needed."""
        if self._process != os.getpid():  # forked: the threads of the parent's reader are not ours
            self._process, self._reader = os.getpid(), None
        with self._lock:
            if self._reader is None:
                self._reader = Reader(self.store, self.cache)
            return self._reader

    @property
    def entity(self) -> str:
        """The entity of names that give none: the setting, else as the store knows its caller, else the login name."""
        return self.settings.entity or self.store.default_entity() or login_name()

    @property
    def project(self) -> str:
        """The project of names that give none."""
        return self.settings.project or DEFAULT_PROJECT

    def parse(self, name: str, entity: str = "", project: str = "") -> ArtifactName:
        """A name with its defaults: those given, then those of the settings; a registry's is in the entity's organization.
        InvalidNameError."""
        return parse_name(self.store, name, entity or self.entity, project or self.project)


class ActiveRun(Protocol):
    """What an artifact needs of the run that is going on."""

    def log_artifact(self, artifact_or_path: Any) -> Any: ...


active_runs: list[ActiveRun] = []
"""The runs that were started and not finished, the current one last. Only ``run.py`` changes it."""

_sessions: dict[tuple[int, Settings], Session] = {}


def current_settings() -> Settings:
    """The settings in force now."""
    return _settings.load()


def current() -> Session:
    """The session for the settings in force now; the same as long as they, and the process, are."""
    return opened(current_settings())


def opened(settings: Settings) -> Session:
    """The session for ``settings``, opened once a process."""
    key = (os.getpid(), settings)
    session = _sessions.get(key)
    if session is None:
        session = _sessions.setdefault(key, Session(settings))
    return session


def login_name() -> str:
    """The user's login name. UsageError if there is none, or if it cannot be an entity's name."""
    try:
        return check_entity(getpass.getuser())
    except (OSError, KeyError, ImportError, UsageError):
        raise UsageError("no entity is given and the login name cannot be one; pass entity= or set ARTIFACTFS_ENTITY") from None
