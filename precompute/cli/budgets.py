"""Options of `precompute plan` for clusters, and the table of what a store takes by encoding."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from coursepack.console import byte_size, print_table, warn

if TYPE_CHECKING:
    from collections.abc import Callable

    from coursepack.precompute.budget import Budget, Prices
    from coursepack.precompute.job import Job
    from coursepack.precompute.plan import Probe

NOT_NEGATIVE = click.FloatRange(0, max=1e12)
POSITIVE = click.FloatRange(0, min_open=True, max=1e12)


def _parse_encodings(_ctx: click.Context, _param: click.Parameter, value: str | None) -> list[str]:
    return [] if value is None else list(dict.fromkeys(value.split(",")))


# fmt: off
OPTIONS = (
    click.option("--compare", callback=_parse_encodings, metavar="ENCODINGS",
                 help="Encodings of logits to show beside --encoding, such as float16,int8,topk:100."),
    click.option("--temperature", type=POSITIVE,
                 help="Distillation temperature that students will use; warns where rows do not suit it."),
    click.option("--images-per-second", type=POSITIVE,
                 help="Speed of the teacher on one device of the cluster.  [default: measured here]"),
    click.option("--gpu-hour-price", "gpu_hour", type=NOT_NEGATIVE, help="Price of an hour of one device."),
    click.option("--gb-month-price", "gb_month", type=NOT_NEGATIVE,
                 help="Price of storing 1 GB (10^9 bytes) for a month."),
    click.option("--put-price", "puts", type=NOT_NEGATIVE, help="Price of 1,000 PUT requests."),
    click.option("--get-price", "gets", type=NOT_NEGATIVE, help="Price of 1,000 GET requests."),
)
# fmt: on
GROUP = {
    "Comparison and prices": (
        *("compare", "temperature", "images_per_second"),
        *("gpu_hour", "gb_month", "puts", "gets"),
    ),
    "Output": ("as_json", "quiet"),
}
"""Parameters of these options by the title of their group in the help."""


def budget_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of comparisons and prices to a command."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def budgets(
    job: Job, compare: list[str], timing: Probe, read_seconds: Callable[[Job], float]
) -> list[tuple[str, Budget]]:
    """Return the budget of a job's own encoding, then those of others, each with the name that was asked for.

    Args:
        job: the job.
        compare: other encodings of the logits.
        timing: times per image with the job's own encoding.
        read_seconds: measures the time to read a row that a job writes.
    """
    from coursepack.precompute.budget import budget

    found = [(job.encoding, budget(job, job.encoding, timing))]
    for encoding in compare:
        if encoding != job.encoding:
            other = replace(job, encoding=encoding)
            budget(other, encoding, timing)  # refused before anything is measured
            timed = replace(timing, read=read_seconds(other))
            found.append((encoding, budget(other, encoding, timed)))
    return found


def print_budgets(found: list[tuple[str, Budget]], prices: dict[str, float | None]) -> None:
    """Print a row per encoding, with money for what has a price."""
    from coursepack.precompute.budget import Prices

    given = {name: price for name, price in prices.items() if price is not None}
    header = ["encoding of logits", "bytes a row", "size", "objects", "PUTs", "GETs a view", "break-even"]
    rows = [
        [
            asked if asked == each.encoding else f"{asked}, stored as {each.encoding}",
            f"{each.row_bytes:,}",
            byte_size(each.total_bytes),
            f"{each.objects:,}",
            f"{each.puts:,}",
            f"{each.gets // each.views:,}",
            epochs(each.break_even),
        ]
        for asked, each in found
    ]
    if given:
        money = _money(Prices(**given), given)
        header += list(money)
        rows = [
            [*row, *(cell(each) for cell in money.values())]
            for row, (_, each) in zip(rows, found, strict=True)
        ]
    print_table("the whole store", header, rows)


def _money(prices: Prices, given: dict[str, float]) -> dict[str, Callable[[Budget], str]]:
    """Return the columns of the table for the prices that are given, by title."""
    columns: dict[str, Callable[[Budget], str]] = {}
    if given.keys() & {"gpu_hour", "puts"}:
        columns["writing"] = lambda each: f"{each.writing(prices):,.2f}"
    if "gb_month" in given:
        columns["a month"] = lambda each: f"{each.month(prices):,.2f}"
    if "gets" in given:
        columns["reading all"] = lambda each: f"{each.reading(prices):,.2f}"
    if "gpu_hour" in given:
        columns["break-even in money"] = lambda each: epochs(each.break_even_money(prices))
    return columns


def say_warm(found: list[tuple[str, Budget]], temperature: float | None, classes: int) -> None:
    """Print a warning for each encoding that does not suit the temperature."""
    from coursepack.precompute.budget import too_warm

    for _, each in found:
        if warning := too_warm(each.encoding, temperature, classes):
            warn(warning)


def epochs(count: float) -> str:
    """Format a number of student epochs.

    >>> epochs(8.04), epochs(float("inf"))
    ('8.0 epochs', 'never')
    """
    return "never" if math.isinf(count) else f"{count:,.1f} epochs"


def budget_values(found: list[tuple[str, Budget]], prices: dict[str, float | None]) -> list[dict[str, Any]]:
    """Return the budgets as plain values; money is null where nothing has a price."""
    from coursepack.precompute.budget import Prices

    given = {name: price for name, price in prices.items() if price is not None}
    cost = Prices(**given)
    return [
        {
            "encoding": asked,
            "stored_as": each.encoding,
            "rows": each.rows,
            "row_bytes": each.row_bytes,
            "bytes": each.total_bytes,
            "objects": each.objects,
            "puts": each.puts,
            "gets": each.gets,
            "device_hours": each.hours,
            "break_even_epochs": _finite(each.break_even),
            "writing": each.writing(cost) if given.keys() & {"gpu_hour", "puts"} else None,
            "month": each.month(cost) if "gb_month" in given else None,
            "reading_all": each.reading(cost) if "gets" in given else None,
            "break_even_money_epochs": _finite(each.break_even_money(cost)) if "gpu_hour" in given else None,
        }
        for asked, each in found
    ]


def _finite(count: float) -> float | None:
    return None if math.isinf(count) else count
