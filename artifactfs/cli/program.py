"""The program: finds the command, runs it, and turns whatever happens into one line and an exit code."""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
import traceback
from typing import Any, NamedTuple

import click

import artifactfs
from artifactfs.cli import output
from artifactfs.cli.session import Command, Group, Session
from artifactfs.errors import ArtifactFSError, from_os_error

INTERRUPTED = 130
BROKEN_PIPE = 141
"""What a shell reports of a program that the signal ended: 128 and SIGINT or SIGPIPE."""
_COMPLETE = "_ARTIFACTFS_COMPLETE"


class _Entry(NamedTuple):
    module: str
    help: str


COMMANDS = {
    "mount": _Entry("mounts", "Mount a version, or browse a collection, project or entity."),
    "stage": _Entry("mounts", "Mount a writable directory that becomes a new version."),
    "unmount": _Entry("mounts", "Unmount; a stage is committed and its new version printed."),
    "commit": _Entry("mounts", "Commit a stage and keep it mounted."),
    "status": _Entry("mounts", "List what a stage adds, modifies and deletes."),
    "mounts": _Entry("mounts", "List mounts and stages."),
    "log": _Entry("transfer", "Make a version from files, directories and references."),
    "get": _Entry("transfer", "Download a version."),
    "checkout": _Entry("transfer", "Make a directory exactly a version."),
    "verify": _Entry("transfer", "Check a directory, or the stored bytes, against a version."),
    "warm": _Entry("transfer", "Fetch a version's references into the cache."),
    "copy": _Entry("copying", "Copy a version or a collection into another store."),
    "ls": _Entry("catalog", "List entities, projects, collections, or the files of a version."),
    "info": _Entry("catalog", "Show all about a version."),
    "diff": _Entry("catalog", "List the paths in which two versions differ."),
    "versions": _Entry("catalog", "List the versions of a collection."),
    "alias": _Entry("catalog", "Add or remove aliases of a version."),
    "tag": _Entry("catalog", "Add or remove tags of a version."),
    "describe": _Entry("catalog", "Change a version's description, metadata or time to live."),
    "delete": _Entry("catalog", "Delete a version."),
    "link": _Entry("relations", "Link a version into a portfolio or registry."),
    "unlink": _Entry("relations", "Take a link away."),
    "runs": _Entry("relations", "List the runs of a project."),
    "lineage": _Entry("relations", "Show what a version came from and what came of it."),
    "entity": _Entry("relations", "Show or change the settings of an entity."),
    "cache": _Entry("upkeep", "Show, prune or verify the cache."),
    "gc": _Entry("upkeep", "Remove what no version refers to any more."),
    "fsck": _Entry("upkeep", "Check everything in the store."),
    "serve": _Entry("serve", "Serve the store to wandb clients."),
    "doctor": _Entry("upkeep", "Check libfuse, /dev/fuse, settings, store and cache."),
}
_ALIASES = {"umount": "unmount"}


class Program(Group):
    """Knows its commands by name and loads the module of the one that runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        name = _ALIASES.get(cmd_name, cmd_name)
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"artifactfs.cli.{COMMANDS[name].module}")
        found = getattr(module, f"{name}_command")
        assert isinstance(found, (Command, Group))
        return found

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and args[0] not in _ALIASES and not args[0].startswith("-"):
            ctx.fail(f"there is no command {args[0]!r}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


@click.group(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="NAME is entity/project/collection:alias. Documentation: docs/cli.md.",
)
@click.version_option(artifactfs.__version__, message="artifactfs %(version)s")
def program() -> None:
    """Artifacts as directories: mount a version and read its files, stage a change and unmount it to make the next."""


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; the exit code. Never raises, but for what ends the process itself."""
    if _COMPLETE in os.environ:
        program.main(arguments, "artifactfs")
    _prepare_streams()
    session = Session()
    session.start_logging()
    try:
        code = _invoke(session, arguments)
        sys.stdout.flush()
        return code
    except BaseException as error:
        return _report(session, error, "--json" in arguments)


def _prepare_streams() -> None:
    """What cannot be encoded is escaped; what was closed by the caller goes nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the rest of the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _invoke(session: Session, arguments: list[str]) -> int:
    if not arguments:
        arguments = ["--help"]
    try:
        with program.make_context("artifactfs", list(arguments), obj=session) as context:
            program.invoke(context)
    except click.exceptions.Exit as exit:
        return exit.exit_code
    return 0


def _report(session: Session, error: BaseException, json_asked: bool) -> int:
    """Say what went wrong in one line (or document); the exit code for it."""
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        print(file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        # Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return BROKEN_PIPE
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    message, code = _explain(error)
    document: dict[str, Any] = {"error": message, "code": code}
    if session.verbose:
        document["traceback"] = traceback.format_exception(error)
    if session.json or json_asked:
        print(json.dumps(document, ensure_ascii=False), file=sys.stderr)
    else:
        if session.verbose:
            traceback.print_exception(error)
        print(f"artifactfs: {output.shown(message)}", file=sys.stderr)
    return code


def _explain(error: BaseException) -> tuple[str, int]:
    """(message, exit code)."""
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else "artifactfs"
        return f"{error.format_message().rstrip('.')} (see {path} --help)", 2
    if isinstance(error, click.ClickException):
        return error.format_message(), error.exit_code
    if isinstance(error, OSError) and not isinstance(error, ArtifactFSError):
        error = from_os_error(error, str(error.filename) if error.filename else "the system refused")
    if isinstance(error, ArtifactFSError):
        return " ".join([str(error), *getattr(error, "__notes__", ())]), error.exit_code
    if isinstance(error, MemoryError):
        return "out of memory", 1
    return f"unexpected {type(error).__name__}: {error}; run with -v for details", 1
