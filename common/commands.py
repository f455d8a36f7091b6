"""Click groups and commands: subcommands imported when used, options in groups, errors as one message."""

from __future__ import annotations

import importlib
import inspect
import os
from collections import UserDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from coursepack.allocator import keep_freed_memory
from coursepack.catalog import names_of
from coursepack.console import QUIET, printable
from coursepack.errors import CoursepackError, nearest, suggestion

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from click.shell_completion import CompletionItem

Chosen = TypeVar("Chosen")

INTERRUPTED = 130
"""Exit status after Ctrl-C: that of shells for a process ended by SIGINT."""
HELP_OPTIONS = {"help_option_names": ["--help", "-h"]}


@dataclass(frozen=True)
class Subcommand:
    """A subcommand that is not imported yet."""

    target: str
    """Module and variable of the command, `module:variable`."""
    help: str
    """First sentence of the command's help."""


class _Subcommands(UserDict[str, Any]):
    """Commands by name; a `Subcommand` is imported when its command is read."""

    def __getitem__(self, name: str) -> click.Command:
        entry = self.data[name]
        if isinstance(entry, Subcommand):
            module, _, variable = entry.target.partition(":")
            entry = self.data[name] = getattr(importlib.import_module(module), variable)
        command: click.Command = entry
        return command

    def help_of(self, name: str) -> str:
        """Return the first sentence of a command's help, without importing the command."""
        entry = self.data[name]
        return entry.help if isinstance(entry, Subcommand) else str(entry.get_short_help_str(limit=200))


class Commands(click.Group):
    """A click group with `-h` and `--version` whose subcommands are imported when they are used.

    A `CoursepackError` or `OSError` of a subcommand is printed as one message and exits with status 1; Ctrl-C
    exits with status 130.
    """

    def __init__(
        self, *arguments: Any, subcommands: Mapping[str, Subcommand] | None = None, **settings: Any
    ) -> None:
        """Initialize a group with subcommands by name, in the order of its help."""
        super().__init__(*arguments, **{"context_settings": HELP_OPTIONS, **settings})
        self._table = _Subcommands(subcommands or {})
        self.commands = self._table
        click.version_option(package_name="coursepack", message="coursepack %(version)s")(self)

    def main(self, *arguments: Any, **settings: Any) -> Any:
        """Run the command line, or complete it for a shell."""
        if any(name.endswith("_COMPLETE") for name in os.environ):
            from coursepack.completion import register

            register()
        return super().main(*arguments, **settings)

    def invoke(self, ctx: click.Context) -> Any:
        """Invoke the subcommand, and turn domain and system errors into click's errors."""
        keep_freed_memory()
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.exceptions.Exit(INTERRUPTED) from None
        except CoursepackError as error:
            raise click.ClickException(printable(str(error))) from error
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            raise click.ClickException(printable(f"{error.strerror or error}{where}")) from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the subcommand that the arguments name, or raise an error with the nearest one."""
        name = args[0]
        if name not in self._table and not name.startswith("-") and not ctx.resilient_parsing:
            raise click.UsageError(f"No such command {name!r}.{suggestion(name, self._table)}", ctx)
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the subcommands."""
        return list(self._table)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of subcommands."""
        if self._table:
            with formatter.section("Commands"):
                formatter.write_dl([(name, self._table.help_of(name)) for name in self._table])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return completions of a subcommand's name or of an option."""
        from click.shell_completion import CompletionItem

        names = [name for name in self._table if name.startswith(incomplete)]
        return [
            *(CompletionItem(name, help=self._table.help_of(name)) for name in names),
            *click.Command.shell_complete(self, ctx, incomplete),
        ]


class Choice(click.Choice[str]):
    """Choice of names, which suggests the nearest one for a mistyped name."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            self.fail(f"{error.message}{suggestion(str(value), self.choices)}", param, ctx)


def name_of(kind: str) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """Return a function that completes the names of a kind in the catalog, and file names where none fits."""

    def complete(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        names = [CompletionItem(name) for name in names_of(kind) if name.startswith(incomplete)]
        return names or [CompletionItem(incomplete, type="file")]

    return complete


def complete_tap(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the reduction of a tap, after its layer and a colon."""
    from click.shell_completion import CompletionItem

    layer, colon, typed = incomplete.rpartition(":")
    names = [name for name in names_of("reduction") if colon and name.startswith(typed)]
    return [CompletionItem(f"{layer}:{name}") for name in names]


def complete_folder(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the name of a folder, for options that take addresses too."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="dir")]


class Command(click.Command):
    """A click command with `--quiet` and its options in groups.

    A call without arguments shows its examples.
    """

    def __init__(
        self, *arguments: Any, groups: Mapping[str, Sequence[str]] | None = None, **settings: Any
    ) -> None:
        """Initialize a command.

        Args:
            arguments: as of `click.Command`.
            groups: names of the options' parameters by the title of their group; other options follow.
            settings: as of `click.Command`.
        """
        super().__init__(*arguments, **{"context_settings": HELP_OPTIONS, **settings})
        self.groups = dict(groups or {})
        self.params.append(QUIET)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, and add the examples to the error of a call without any."""
        is_empty = not args
        try:
            return super().parse_args(ctx, args)
        except click.MissingParameter as error:
            if not is_empty or self.epilog is None:
                raise
            examples = self.epilog.removeprefix("\b\n").rstrip()
            raise click.UsageError(f"{error.format_message()}\n\n{examples}", ctx) from error
        except click.NoSuchOption as error:
            known = [name for param in self.get_params(ctx) for name in param.opts if name.startswith("--")]
            near = nearest(error.option_name.lstrip("-"), [name[2:] for name in known])
            hint = f" Did you mean '--{near}'?" if near else ""
            raise click.UsageError(f"No such option {error.option_name!r}.{hint}", ctx) from error

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in their groups."""
        records = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                records[param.name] = record
        named = {name for names in self.groups.values() for name in names}
        rest = [name for name in records if name not in named]
        for title, names in {**self.groups, "Other options" if self.groups else "Options": rest}.items():
            rows = [records[name] for name in names if name in records]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def make_chosen(table: Mapping[str, Callable[..., Chosen]], flag: str, name: str, **options: Any) -> Chosen:
    """Call the chosen function of a table with the given options.

    Args:
        table: functions by name, whose arguments have defaults and are options.
        flag: option that chooses among them.
        name: name of the chosen one.
        options: values of the options of all of them, None where an option is not given.

    Raises:
        UsageError: an option is given that the chosen one does not have.
    """
    given = {option: value for option, value in options.items() if value is not None}
    accepted = {each: inspect.signature(function).parameters for each, function in table.items()}
    for option in given:
        if option not in accepted[name]:
            others = " or ".join(each for each in table if option in accepted[each])
            own = f"--{option.replace('_', '-')}"
            raise click.UsageError(
                f"{own} does not apply to {flag} {name}: give {flag} {others}, or leave {own} out."
            )
    return table[name](**given)
