"""The documents say what is: ``docs/cli.md`` ends with the help of every command, links lead somewhere, words are explained.

``python tests/test_docs.py`` writes the help into ``docs/cli.md`` anew.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from artifactfs.cli import program
from artifactfs.errors import ArtifactFSError

ROOT = Path(__file__).parents[1]
CLI = ROOT / "docs/cli.md"
_MARK = "## Commands\n"
_CODE = "import sys; from artifactfs.cli import program\nfor words in {}: print('>>>', *words); program.run([*words, '--help'])"


def reference() -> str:
    """What follows the mark: the help of each command, without the options that all have."""
    commands = [[name] for name in program.COMMANDS] + [["cache", name] for name in ("info", "prune", "verify")]
    commands += [["serve", "key", name] for name in ("add", "list", "remove")]
    code = _CODE.format(sorted(commands, key=lambda words: (list(program.COMMANDS).index(words[0]), words[1:])))
    env = {**os.environ, "COLUMNS": "100"}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
    sections = []
    for part in said.split(">>> ")[1:]:
        name, _, help = part.partition("\n")
        help = re.sub(r"\nOptions of every command:\n(?:  .*\n)+", "", help)
        sections.append(f"\n### {name}\n\n```text\n{help.rstrip()}\n```\n")
    return "".join(sections)


def test_cli_reference_is_up_to_date() -> None:
    assert CLI.read_text().partition(_MARK)[2] == reference(), "python tests/test_docs.py writes it anew"


def test_exit_codes_are_those_of_the_errors() -> None:
    documented = {int(code) for code in re.findall(r"^\| ([0-7]) \|", CLI.read_text(), re.MULTILINE)}
    kinds = [ArtifactFSError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert documented == {0} | {kind.exit_code for kind in kinds}


@pytest.mark.parametrize("page", sorted(map(str, [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])))
def test_links_lead_somewhere(page: str) -> None:
    text = Path(page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text) if not link.startswith("http")]
    assert [link for link in links if not (Path(page).parent / link).exists()] == []


if __name__ == "__main__":
    CLI.write_text(CLI.read_text().partition(_MARK)[0] + _MARK + reference())
