"""Pages."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from artifactfs.errors import UsageError
from artifactfs.media.payload import FileMedia, MadeFile, UserFile, is_path

_HEAD = '<base target="_blank"><link rel="stylesheet" type="text/css" href="https://app.wandb.ai/normalize.css" />'
"""What W&B puts into pages, so that its panels show them evenly."""


class Html(FileMedia):
    """A page: a path that ends with ``.html``, text, or an ``io`` object with text.

    ``inject`` puts W&B's style sheet and ``<base target="_blank">`` at the head of the page; without it a page is stored as it
    is. ``data_is_not_path`` takes text as it is even where a file of that name exists.
    """

    kind: ClassVar[str] = "html-file"
    folder: ClassVar[str] = "media/html"

    def __init__(self, data: Any, inject: bool = True, data_is_not_path: bool = False) -> None:
        path = _page_path(data) if not data_is_not_path else None
        if path is not None and not inject:
            super().__init__(UserFile(path))
            return
        text = _text(path) if path is not None else _given(data)
        super().__init__(MadeFile((_injected(text) if inject else text).encode(), ".html"))

    @property
    def html(self) -> str:
        """The page."""
        return _text(self.path)


def _page_path(data: Any) -> str | None:
    found = os.fspath(data) if is_path(data) else ""
    return found if found.endswith(".html") and os.path.isfile(found) else None


def _given(data: Any) -> str:
    if hasattr(data, "read"):
        if hasattr(data, "seek"):
            data.seek(0)
        data = data.read()
    if isinstance(data, bytes):
        data = data.decode()
    if not isinstance(data, str):
        raise UsageError(
            f"Html is made of text, an io object with text, or an existing path that ends with .html, not of {data!r}"
        )
    return data


def _text(path: str) -> str:
    with open(path, encoding="utf-8", newline="") as file:
        try:
            return file.read()
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is not UTF-8 text: {error}") from None


def _injected(page: str) -> str:
    for tag, before, after in (("<head>", "", ""), ("<html>", "<head>", "</head>")):
        start, found, rest = page.partition(tag)
        if found:
            return f"{start}{tag}{before}{_HEAD}{after}{rest}".strip()
    return f"{_HEAD}{page}".strip()
