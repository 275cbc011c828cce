"""The command line: it translates between a terminal and the layers below, and decides nothing.

One module a group of commands, imported when one of them runs, so that ``--help`` and ``mount`` start fast.
"""

from __future__ import annotations

from artifactfs.cli.program import main

__all__ = ["main"]
