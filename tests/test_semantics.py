"""``docs/semantics.md`` is true: its examples are run, part by part, and give what they show.

A part (a heading of two signs) is one shell session in an empty directory with a home of its own. In a ``console`` block a line
with ``$ `` in front is a command, which lines with ``> `` continue; the lines up to the next one are its output, standard error
included, in which ``...`` stands for anything within a line. ``console root`` blocks are run by root only.

``python tests/test_semantics.py`` runs the page and writes into it the output that there was.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from mounting import needs_fuse
from programs import executable

PAGE = Path(__file__).parents[1] / "docs/semantics.md"
_BLOCK = re.compile(r"^```console( root)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = "\x01"


@dataclasses.dataclass
class Command:
    """A command of the page, and the output that the page shows. ``line`` counts in the page."""

    line: int
    text: str
    shown: str = ""


def parts(page: str) -> dict[str, list[Command]]:
    """The commands by the heading of their part."""
    found: dict[str, list[Command]] = {}
    heads = [*re.finditer(r"^## (.*)$", page, re.MULTILINE)]
    for head, following in zip(heads, [*heads[1:], None], strict=True):
        end = following.start() if following else len(page)
        commands: list[Command] = []
        for block in _BLOCK.finditer(page, head.start(), end):
            if not block[1] or os.getuid() == 0:
                commands += _commands(block[2], page.count("\n", 0, block.start(2)) + 1)
        if commands:
            found[head[1]] = commands
    return found


def _commands(block: str, line: int) -> list[Command]:
    commands: list[Command] = []
    for number, text in enumerate(block.splitlines(), line):
        if text.startswith("$ "):
            commands.append(Command(number, text[2:]))
        elif text.startswith("> "):
            commands[-1].text += "\n" + text[2:]
        else:
            commands[-1].shown += text + "\n"
    return commands


def outputs(commands: list[Command], directory: Path) -> list[str]:
    """What each command prints."""
    script = directory / "script"
    script.write_text("exec 2>&1\n" + "".join(f"printf {_MARK}\n{command.text}\n" for command in commands))
    work = directory / "work"
    work.mkdir()
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": search, "LC_ALL": "C.UTF-8", "TZ": "UTC", "PYTHONUNBUFFERED": "1"}
    try:
        done = subprocess.run(
            ["bash", str(script)], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, timeout=250, cwd=work, env=env
        )
    finally:
        _clean_up(work)
    return done.stdout.split(_MARK)[1:]


def _clean_up(directory: Path) -> None:
    """Take away what a session that broke off has left mounted."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        mountpoint = line.split()[1]
        if mountpoint.startswith(f"{directory}/"):
            executable("unmount", "--discard", mountpoint)
            subprocess.run(["umount", "--lazy", mountpoint], check=False, capture_output=True)


def _matches(shown: str, output: str) -> bool:
    return re.fullmatch(".*".join(re.escape(piece) for piece in shown.split("...")), output) is not None


@needs_fuse
@pytest.mark.parametrize("part", parts(PAGE.read_text()))
def test_the_examples_are_true(part: str, tmp_path: Path) -> None:
    commands = parts(PAGE.read_text())[part]
    found = outputs(commands, tmp_path)
    wrong = [
        f"{PAGE.name}:{command.line}: $ {command.text}\n{output}" + f"instead of\n{command.shown}"
        for command, output in zip(commands, found, strict=True)
        if not _matches(command.shown, output)
    ]
    assert not wrong, "\n".join(wrong)


def rerun(page: str) -> str:
    """The page with the output that its commands have now, where it does not match."""
    lines = page.splitlines(keepends=True)
    for commands in reversed(parts(page).values()):
        with tempfile.TemporaryDirectory() as scratch:
            os.environ["HOME"] = f"{scratch}/home"
            for which in ("CONFIG", "DATA", "CACHE", "STATE"):
                os.environ[f"XDG_{which}_HOME"] = f"{scratch}/home/{which.lower()}"
            (Path(scratch) / "session").mkdir()
            found = outputs(commands, Path(scratch) / "session")
        for command, output in reversed(list(zip(commands, found, strict=True))):
            if not _matches(command.shown, output):
                start = command.line + command.text.count("\n")
                lines[start : start + command.shown.count("\n")] = output.splitlines(keepends=True)
    return "".join(lines)


if __name__ == "__main__":
    PAGE.write_text(rerun(PAGE.read_text()))
