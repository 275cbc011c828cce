"""The examples of ``docs/comet.md`` run in order, and print what it says."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from programs import Program
from servers import Bucket
from shelves import write_files

from artifactfs.errors import ArtifactFSError

PAGE = Path(__file__).parents[1] / "docs" / "comet.md"


def run(code: str, names: dict[str, Any]) -> str:
    """What the code prints; an error that ends it as the name of its class."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            exec(compile(code, str(PAGE), "exec"), names)
        except ArtifactFSError as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            print(next(name for name in kinds if name.endswith("Exception")))
    return out.getvalue()


def test_examples(seaweed: Any, bucket: Bucket, afs: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.client.create_bucket(Bucket="my-bucket")
    for key, data in {"photos/a.jpg": b"photo", "photos/b/c.jpg": b"photo2"}.items():
        bucket.client.put_object(Bucket="my-bucket", Key=key, Body=data)
    monkeypatch.setenv("ARTIFACTFS_STORE", str(tmp_path / "store"))
    write_files(tmp_path / "data", {"train.csv": b"1,2\n", "test.csv": b"3\n"})
    (tmp_path / "bikes").mkdir()
    names: dict[str, Any] = {}
    said = ""
    ran = 0
    for kind, text in re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        if kind == "python":
            said = run(text, names)
            ran += 1
        elif kind == "text":
            assert said == text
        elif kind == "console":
            for line in text.splitlines():
                words = shlex.split(line.removeprefix("$ artifactfs "))
                if os.path.exists("/dev/fuse") or "mount" not in words[0]:
                    afs(*words)
                    assert words[0] != "mount" or sorted(os.listdir("bikes")) == [
                        ".comet",
                        "data",
                        "first",
                        "large.bin",
                        "second",
                    ]
    assert ran == 6
