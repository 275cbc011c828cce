"""Staging: a writable directory over a version, with a journal, and no FUSE in it (design, section 5).

:class:`Stage` is the file system; ``list_stages`` finds the stages that are on this machine.

::

    stage.py       paths, names and attributes; the commit
    eager.py       storing closed files ahead of the commit
    files.py       open files and their content; copying blocks up
    changes.py     what is different from the version underneath
    recovery.py    what a crash leaves to be mended
    ledger.py      the table and the journal as one, under one lock
    data.py        data files; files that are partly in the store
    nodes.py       the table of inodes, and the deltas that change it
    journal.py     the file of records
    directory.py   the stage's directory: specification, lock, result
"""

from artifactfs.staging.changes import StageChange, StagedFolder, left_out_warning
from artifactfs.staging.directory import StageInfo, StageSpec, list_stages, read_spec
from artifactfs.staging.stage import RENAME_EXCHANGE, RENAME_NOREPLACE, Stage

__all__ = [
    "RENAME_EXCHANGE",
    "RENAME_NOREPLACE",
    "Stage",
    "StageChange",
    "StageInfo",
    "StageSpec",
    "StagedFolder",
    "left_out_warning",
    "list_stages",
    "read_spec",
]
