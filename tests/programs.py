"""Test support: runs of the command line, and something to run it on."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from shelves import write_files

from artifactfs.cli import program
from artifactfs.model import BLOCK


@dataclasses.dataclass(frozen=True)
class Ran:
    """What a run of the program gave."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def error(self) -> dict[str, Any]:
        """The one JSON document on standard error."""
        found = json.loads(self.err)
        assert isinstance(found, dict)
        return found


Program = Callable[..., Ran]


@pytest.fixture
def afs(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    """Runs the program in this process, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    handlers = logging.root.handlers[:], logging.root.level

    def run(*arguments: str | Path, code: int | None = 0) -> Ran:
        capfd.readouterr()
        got = program.run([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        if code is not None:
            assert got == code, captured.err
        assert "Traceback" not in captured.err
        return Ran(got, captured.out, captured.err)

    yield run
    logging.root.handlers[:], logging.root.level = handlers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_files(
        tmp_path / "folder",
        {
            "a.txt": b"alpha\n",
            "bin/run.sh": b"#!/bin/sh\n",
            "deep/er/b.bin": bytes(range(256)) * 40,
            "empty-dir": None,
            "empty.txt": b"",
            "link": "a.txt",
            "large.bin": b"0123456789abcdef" * (3 * BLOCK // 16) + b"end",
        },
    )


@pytest.fixture
def logged(afs: Program, folder: Path) -> str:
    afs("log", "acme/vision/bikes", folder, "--type", "dataset", "--alias", "best", "--tag", "small", "--metadata", '{"n": 1}')
    return "acme/vision/bikes"


def executable(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own."""
    command = [sys.executable, "-m", "artifactfs.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)
