"""``artifactfs serve`` as a process of its own, and the real ``wandb`` client against it; both for the tests of anybody.

``wandb_server`` is a server over a fresh directory store with a key that may write everywhere. ``start_server`` starts one over
any store. What was started is ended by its process id.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

PROGRAM = [sys.executable, "-m", "artifactfs.cli"]
_READY = 30.0


@dataclasses.dataclass
class WandbServer:
    """A server that runs. ``key`` may do what it was made for; ``store`` is the URL of what is served."""

    url: str
    key: str
    store: str
    data: Path
    process: subprocess.Popen[str]
    log: Path
    environ: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def host(self) -> str:
        """``127.0.0.1:12345``."""
        return self.url.partition("://")[2]

    @property
    def pid(self) -> int:
        return self.process.pid

    def add_key(self, name: str, *entities: str, write: bool = False) -> str:
        """Another key; it works at once."""
        return add_key(self.store, self.data, name, *entities, write=write, environ=self.environ)

    def remove_key(self, name: str) -> None:
        """Take a key away, at once."""
        _run("--store", self.store, "serve", "key", "remove", name, "--data-dir", str(self.data), environ=self.environ)

    def environment(self, home: Path, key: str = "") -> dict[str, str]:
        """What a ``wandb`` client needs to speak to this server, with directories of its own below ``home``."""
        return client_environment(home, self.url, key or self.key)

    def lines(self) -> list[dict[str, object]]:
        """The server's log so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def tracebacks(self) -> list[str]:
        """What the server logged of faults of its own: there must be none."""
        text = self.log.read_text()
        found = [str(line["traceback"]) for line in self.lines() if "traceback" in line]
        return found + (["(not in JSON) " + text] if "Traceback (most recent" in text and not found else [])

    def stop(self, how: signal.Signals = signal.SIGTERM, timeout: float = 60) -> int:
        """End it; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(timeout)


def client_environment(home: Path, url: str, key: str) -> dict[str, str]:
    """The environment of a ``wandb`` client that keeps everything below ``home`` and speaks to nobody but ``url``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "ARTIFACTFS_"))}
    places = {"CACHE_DIR": "cache", "DATA_DIR": "data", "CONFIG_DIR": "config", "DIR": "runs", "ARTIFACT_DIR": "artifacts"}
    for place in places.values():
        (home / place).mkdir(parents=True, exist_ok=True)
    return {
        **kept,
        "HOME": str(home),
        "WANDB_BASE_URL": url,
        "WANDB_API_KEY": key,
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_SILENT": "true",
        "WANDB_DISABLE_GIT": "true",
        "WANDB_DISABLE_CODE": "true",
        "WANDB__DISABLE_STATS": "true",
        **{f"WANDB_{name}": str(home / place) for name, place in places.items()},
    }


def _run(*arguments: str, environ: dict[str, str] | None = None) -> str:
    whole = {**os.environ, **(environ or {})}
    done = subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, timeout=60, env=whole)
    assert done.returncode == 0, done.stderr
    return done.stdout


def add_key(store: str, data: Path, name: str, *entities: str, write: bool = False, environ: dict[str, str] | None = None) -> str:
    """Make a key with the command, and return it."""
    opened = [argument for entity in entities for argument in ("--entity", entity)]
    right = ["--write"] if write else []
    command = ("--store", store, "serve", "key", "add", name, *opened, *right, "--data-dir", str(data))
    return _run(*command, environ=environ).strip()


@contextlib.contextmanager
def start_server(
    store: str, data: Path, *options: str, key: str = "", environ: dict[str, str] | None = None
) -> Iterator[WandbServer]:
    """``artifactfs serve`` over ``store``, on a free port, with a key that may write everywhere unless one is given."""
    key = key or add_key(store, data, "everything", "*", write=True, environ=environ)
    log = data / f"server-{len(list(data.glob('server-*.log')))}.log"
    with open(log, "wb") as errors:
        process = subprocess.Popen(
            [*PROGRAM, "--store", store, "serve", "--port", "0", "--data-dir", str(data), *options],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **(environ or {})},
        )
    try:
        line = _first_line(process)
        assert " at http" in line, f"the server did not start: {line!r} {log.read_text()}"
        yield WandbServer(line.rpartition(" at ")[2].strip(), key, store, data, process, log, environ or {})
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(45)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _first_line(process: subprocess.Popen[str], timeout: float = _READY) -> str:
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    assert process.stdout is not None
    stdout = process.stdout
    threading.Thread(target=lambda: lines.put(stdout.readline()), daemon=True).start()
    try:
        return lines.get(timeout=timeout)
    except queue.Empty:
        return ""


@pytest.fixture
def wandb_server(tmp_path: Path) -> Iterator[WandbServer]:
    """A server over a new directory store, with a key that may write everywhere. It must not log a fault of its own."""
    with start_server(str(tmp_path / "served-store"), tmp_path / "served-data") as server:
        yield server
        assert not server.tracebacks()


def run_client(server: WandbServer, home: Path, script: str, *arguments: str, key: str = "", timeout: float = 110) -> str:
    """Run Python code with the real client against the server, in ``home``; what it printed."""
    done = try_client(server, home, script, arguments, key, timeout)
    assert done.returncode == 0, f"{done.stderr[-3000:]}\n{done.stdout[-1000:]}"
    return done.stdout


def try_client(
    server: WandbServer, home: Path, script: str, arguments: Sequence[str] = (), key: str = "", timeout: float = 110
) -> subprocess.CompletedProcess[str]:
    """The same for code that may fail."""
    environment = server.environment(home, key)
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=timeout)


_WORKER = """
import contextlib, io, json, os, sys, traceback
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import wandb
for line in sys.stdin:
    asked = json.loads(line)
    os.chdir(asked["folder"])
    os.environ["WANDB_CACHE_DIR"] = os.path.join(asked["folder"], "cache")  # each downloads for itself
    shown = {}
    try:
        exec(compile(asked["code"], "<client>", "exec"), {"shown": shown, **asked["names"]})
        error = ""
    except BaseException:
        error = traceback.format_exc()
    if wandb.run is not None:
        wandb.run.finish(1 if error else 0)
    answers.write(json.dumps({"shown": shown, "error": error}, default=str) + "\\n")
    answers.flush()
"""


class ClientProcess:
    """The real client as one process that runs one piece of code after the other: most of a short script is its start-up."""

    def __init__(self, server: WandbServer, home: Path) -> None:
        self._errors = open(home / "client.log", "w+")  # noqa: SIM115 - closed by close
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            cwd=home,
            env=server.environment(home),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def run(self, folder: Path, code: str, names: dict[str, object], timeout: float = 110) -> dict[str, object]:
        """Run code in ``folder`` with ``names`` among its globals; what it put into ``shown``."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"folder": str(folder), "code": code, "names": names}) + "\n")
        self._process.stdin.flush()
        line = _first_line(self._process, timeout)
        assert line, f"the client said nothing for {timeout} seconds: {self._told()}"
        answer = json.loads(line)
        assert not answer["error"], f"{answer['error']}\n{self._told()}"
        shown = answer["shown"]
        assert isinstance(shown, dict)
        return shown

    def _told(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-2000:]

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()
