"""``python -m artifactfs.cli``: the program without its console script."""

from __future__ import annotations

from artifactfs.cli.program import main

main()
