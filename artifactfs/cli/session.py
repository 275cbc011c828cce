"""What every command shares: the global options, the settings they change, and where output goes.

Results go to standard output, everything else to standard error. The global options are accepted before and after the
command's name.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

from artifactfs import names, settings
from artifactfs.cli import output


class Session:
    """One run of the program. ``store`` is "" where ``--store`` was not given."""

    def __init__(self) -> None:
        self.store = ""
        self.json = False
        self.quiet = False
        self.verbose = False
        self.progress = True

    @functools.cached_property
    def settings(self) -> settings.Settings:
        """The settings in force, with ``--store`` over them; a store that is a path is absolute."""
        found = settings.load()
        return dataclasses.replace(found, store=self.located(self.store or found.store))

    def located(self, store: str) -> str:
        """A store's URL, or the absolute path of one that is a path."""
        if "://" not in store and not store.startswith("file:"):
            return os.path.abspath(os.path.expanduser(store))
        return store

    def name(self, text: str) -> names.ArtifactName:
        """The artifact name that ``text`` is, with the defaults of the settings."""
        return names.parse(text, self.settings.entity, self.settings.project)

    def start_logging(self) -> None:
        level = logging.ERROR if self.quiet else logging.WARNING
        logging.basicConfig(level=level, format="artifactfs: %(message)s", stream=sys.stderr, force=True)
        if self.verbose:  # of us only: botocore's details have the signatures of requests in them
            logging.getLogger("artifactfs").setLevel(logging.DEBUG)

    def note(self, text: str) -> None:
        """One line on standard error for the person who waits; not with ``--quiet`` or ``--json``."""
        if not self.quiet and not self.json:
            print(output.shown(text), file=sys.stderr)

    def warn(self, text: str) -> None:
        """One line on standard error that must be seen."""
        if not self.quiet:
            print(f"artifactfs: warning: {output.shown(text)}", file=sys.stderr)

    def result(self, document: Any, lines: Iterable[str] | str) -> None:
        """The result: ``document`` with ``--json``, else ``lines``."""
        if self.json:
            print(json.dumps(document, indent=2, ensure_ascii=False))
            return
        for line in [lines] if isinstance(lines, str) else lines:
            print(output.shown(line))

    def rows(self, rows: Iterable[Mapping[str, Any]], columns: Sequence[output.Column]) -> None:
        """A list of objects: as it is with ``--json``, else a table of ``columns``. Streams; nothing is kept."""
        if self.json:
            output.print_json_list(rows)
        else:
            output.print_table(rows, columns)


pass_session = click.make_pass_decorator(Session)


def _remember(attribute: str, value: Any = None) -> Any:
    """A callback that stores an option in the session; one that was not given changes nothing."""

    def callback(context: click.Context, parameter: click.Parameter, given: Any) -> None:
        if given:
            setattr(context.ensure_object(Session), attribute, given if value is None else value(given))
            context.ensure_object(Session).start_logging()

    return callback


def global_options() -> list[click.Option]:
    """New options, to be added to every command."""
    return [
        click.Option(["--store"], metavar="URL", expose_value=False, callback=_remember("store"), help="The store to use."),
        click.Option(["--json"], is_flag=True, expose_value=False, callback=_remember("json"), help="Print one JSON document."),
        click.Option(["-q", "--quiet"], is_flag=True, expose_value=False, callback=_remember("quiet"), help="Errors only."),
        click.Option(["-v", "--verbose"], is_flag=True, expose_value=False, callback=_remember("verbose"), help="Details."),
        click.Option(
            ["--no-progress"],
            is_flag=True,
            expose_value=False,
            callback=_remember("progress", lambda given: False),
            help="No progress bars.",
        ),
    ]


class GlobalOptions(click.Command):
    """A command that also takes the global options, and shows them apart in its help."""

    @functools.cached_property
    def global_options(self) -> list[click.Option]:
        return global_options()

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        own = super().get_params(ctx)
        return [*own[:-1], *self.global_options, *own[-1:]]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records = {False: [], True: []}  # type: dict[bool, list[tuple[str, str]]]
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)):
                records[parameter in self.global_options].append(record)
        for everywhere, title in ((False, "Options"), (True, "Options of every command")):
            with formatter.section(title):
                formatter.write_dl(records[everywhere])


class Command(GlobalOptions):
    pass


class Group(GlobalOptions, click.Group):
    """A command with subcommands; the global options may stand at each level."""

    command_class = Command

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "no_args_is_help": False})

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


command = functools.partial(click.command, cls=Command)
