"""``docs/media.md`` is true: its examples are run, in order, and give what they show."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs/media.md"


def test_the_examples(isolated_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("numpy", "pandas", "PIL", "soundfile", "imageio_ffmpeg", "bokeh"):
        pytest.importorskip(library)
    for key, value in {"STORE": str(tmp_path / "store"), "ENTITY": "acme", "PROJECT": "vision"}.items():
        monkeypatch.setenv(f"ARTIFACTFS_{key}", value)
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text().replace("```pycon", "").replace("\n```\n", "\n\n")
    examples = doctest.DocTestParser().get_doctest(text, {}, PAGE.name, str(PAGE), 0)
    assert len(examples.examples) > 50
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples, out=said.append)
    assert not said, "".join(said)
