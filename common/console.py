"""Console output of the commands: progress and messages on stderr, tables on stdout.

On a terminal, progress is a bar with rate and remaining time. Elsewhere it is a plain line every
`LOG_SECONDS`, so that log files stay readable. Rich is imported when the first bar or table is drawn.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
import unicodedata
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console
    from rich.progress import Progress

LOG_SECONDS = 10.0
"""Interval of progress lines when stderr is not a terminal."""
LOG_WIDTH = 80
"""Width of tables if stdout is not a terminal, unless the environment variable COLUMNS is set."""
LABEL_WIDTH = 20
"""Minimum width of a table's first column on a terminal, if its entries are longer."""
SHORT_SECONDS = 2.0
"""Tasks that take less show no progress, if they are given this delay."""
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
"""Option of every command."""
TRUST_CODE = click.option(
    "--trust-code", is_flag=True, help="Run code that a store, a run folder or an exported: file contains."
)
"""Option of the commands that build networks or open sources described in a store or a run folder."""


def parse_numbers(
    _ctx: click.Context, _param: click.Parameter, value: str | None
) -> tuple[float, ...] | None:
    """Parse an option's comma-separated numbers; a callback for click."""
    try:
        return None if value is None else tuple(float(number) for number in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not comma-separated numbers, as in 0.5,0.3,0.2") from None


def printable(text: str) -> str:
    """Escape the control characters of a text, except line breaks.

    Names in manifests may come from somebody else, and a terminal would interpret control characters in them.

    >>> print(printable("a\x1b[2Jb"))
    a\\x1b[2Jb
    """
    return "".join(_escaped(c) if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


def _escaped(character: str) -> str:
    return character if character == "\n" else character.encode("unicode_escape").decode()


class _Output:
    is_quiet = False
    bars: Progress | None = None


def be_quiet(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    """Print neither progress nor messages until the command ends; a callback for click."""
    if value:
        before, _Output.is_quiet = _Output.is_quiet, True
        ctx.call_on_close(lambda: setattr(_Output, "is_quiet", before))


QUIET = click.Option(
    ["--quiet"],
    is_flag=True,
    expose_value=False,
    callback=be_quiet,
    help="Print no progress and no messages, only results, warnings and errors.",
)
"""Option that `Command` adds to every command."""


def inform(text: str) -> None:
    """Print a message on stderr, unless `--quiet` is given."""
    if not _Output.is_quiet:
        warn(text)


def warn(text: str) -> None:
    """Print a warning on stderr."""
    click.echo(printable(text), err=True)


def print_json(values: Any) -> None:
    """Print plain values on stdout as one JSON document."""
    click.echo(json.dumps(values, indent=1))


class Meter(Protocol):
    """Counter of finished work, as `progress` yields it."""

    def advance(self, amount: int, note: str = "") -> None:
        """Add `amount` finished units; `note` is shown beside the count."""


@contextmanager
def progress(
    title: str, total: int, unit: str, *, done: int = 0, shown: bool = True, delay: float = 0.0
) -> Iterator[Meter]:
    """Show the progress of a task on stderr, unless `--quiet` is given.

    Args:
        title: name of the task.
        total: units of work in all.
        unit: plural name of a unit, such as `images`.
        done: units that were finished before; they do not count in the rate.
        shown: false counts the work without output.
        delay: seconds until the first output; a task that ends before shows nothing.
    """
    if not shown or _Output.is_quiet:
        yield _Hidden()
        return
    with ExitStack() as stack:
        started = time.monotonic()

        def meter() -> Meter:
            return stack.enter_context(_shown(title, total, unit, done, started))

        yield _Late(meter, started + delay) if delay else meter()


@contextmanager
def _shown(title: str, total: int, unit: str, done: int, started: float) -> Iterator[Meter]:
    if sys.stderr.isatty():
        with _bars() as bars:
            meter = _Bar(bars, title, total, unit, done, started)
            yield meter
            meter.close()
    else:
        lines = _Lines(title, total, unit, done, started)
        yield lines
        lines.close()


@contextmanager
def _bars() -> Iterator[Progress]:
    """Yield the bars on the terminal: those of the task around this one, if there is one."""
    if _Output.bars is not None:
        yield _Output.bars
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        _Output.bars = bars
        try:
            yield bars
        finally:
            _Output.bars = None


class _Bar:
    def __init__(self, bars: Progress, title: str, total: int, unit: str, done: int, started: float) -> None:
        self._bars, self._unit, self._started, self._fresh = bars, unit, started, 0
        self._is_inner = bool(bars.tasks)
        self._task = bars.add_task(title, total=total, completed=done, rate="", note="")

    def advance(self, amount: int, note: str = "") -> None:
        self._fresh += amount
        rate = self._fresh / max(time.monotonic() - self._started, 1e-9)
        self._bars.update(self._task, advance=amount, rate=_pace(rate, self._unit), note=note)

    def close(self) -> None:
        if self._is_inner:
            self._bars.refresh()
            self._bars.remove_task(self._task)


class _Late:
    """Meter of a task that may end before its progress is worth showing."""

    def __init__(self, start: Callable[[], Meter], due: float) -> None:
        self._start, self._due, self._held = start, due, 0
        self._meter: Meter | None = None

    def advance(self, amount: int, note: str = "") -> None:
        self._held += amount
        if self._meter is None and time.monotonic() >= self._due:
            self._meter = self._start()
        if self._meter is not None:
            self._meter.advance(self._held, note)
            self._held = 0


class _Hidden:
    def advance(self, amount: int, note: str = "") -> None:
        pass


class _Lines:
    def __init__(self, title: str, total: int, unit: str, done: int, started: float) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._done, self._fresh, self._note = done, 0, ""
        self._started = self._printed = started
        self._printed_done = done

    def advance(self, amount: int, note: str = "") -> None:
        is_first = not self._fresh
        self._done, self._fresh, self._note = self._done + amount, self._fresh + amount, note
        if time.monotonic() - self._printed < LOG_SECONDS:
            return
        # Much of the time until the first may be start-up, such as compiling kernels.
        self._print(paced=not is_first or self._done == self._total)

    def close(self) -> None:
        if self._done != self._printed_done:
            self._print()

    def _print(self, *, paced: bool = True) -> None:
        self._printed, self._printed_done = time.monotonic(), self._done
        parts = [f"{self._title}: {self._done:,} of {self._total:,} {self._unit}"]
        if paced:
            rate = self._fresh / max(self._printed - self._started, 1e-9)
            left = (self._total - self._done) / max(rate, 1e-9)
            parts += [_pace(rate, self._unit), f"{left:.0f} s left"]
        inform(", ".join([*parts, self._note] if self._note else parts))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout, with the first column left-aligned and the others right-aligned.

    If it is too wide, the entries of the first column are listed before the table, which has their numbers
    instead. If it is still too wide, each row is printed as a list of its columns. A table of two columns is
    wrapped. Numbers are neither cut off nor wrapped.
    """
    from rich.console import Console

    width, _ = shutil.get_terminal_size((LOG_WIDTH, 0))
    console = Console(width=width, markup=False, highlight=False)
    title = printable(title)
    header, *rows = [[printable(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    room = console.width - sum(widths[1:]) - 3 * len(widths) - 1
    if room >= min(widths[0], LABEL_WIDTH):
        _print_grid(console, title, header, rows, is_narrow=False)
        return
    if len(header) == 2:
        _print_grid(console, title, header, rows, is_narrow=True)
        return
    numbered = [[str(number), *cells] for number, (_, *cells) in enumerate(rows, start=1)]
    words = [[*name.split(" "), *cells] for name, *cells in zip(header, *numbered, strict=True)]
    if sum(max(map(len, column)) for column in words) + 2 * (len(words) - 1) > console.width:
        _print_lists(console, title, header, rows)
        return
    for number, (label, *_) in enumerate(rows, start=1):
        console.print(f"{number}: {label}")
    _print_grid(console, title, header, numbered, is_narrow=True)


def _print_grid(
    console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, is_narrow: bool
) -> None:
    """Print a table; a narrow one has no lines and a word of its header per line."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False) if is_narrow else Table()
    table.title, table.title_justify = title, "left"
    for index, name in enumerate(header):
        table.add_column(
            name.replace(" ", "\n") if is_narrow else name,
            justify="left" if index == 0 else "right",
            no_wrap=index > 0 and len(header) > 2,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _print_lists(console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print each row of a table as its first entry, and a line for each other column."""
    from rich.padding import Padding
    from rich.table import Table

    if title:
        console.print(title)
    for label, *cells in rows:
        console.print(label)
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, cell in zip(header[1:], cells, strict=True):
            table.add_row(name, cell)
        console.print(Padding(table, (0, 0, 0, 2)))


def byte_size(count: float) -> str:
    """Format a number of bytes in units of powers of 1000.

    >>> byte_size(1_234_567)
    '1.2 MB'
    """
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"


def duration(seconds: float) -> str:
    """Format a time in the largest unit of which there are two.

    >>> duration(200)
    '3 min'
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _pace(rate: float, unit: str) -> str:
    """Format a rate per second, in minutes if it is slow."""
    return f"{rate:,.0f} {unit}/s" if rate >= 1 else f"{60 * rate:.2g} {unit}/min"
