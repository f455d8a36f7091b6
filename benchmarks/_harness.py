"""Alternating measurements with medians, intervals and bars, reported as a table and a JSON file.

A row with a bar has the 95 % interval of its value. The bar holds (`yes`) or does not (`no`) only if that
interval lies entirely on one side of it; otherwise it is `undecided`, and `measure` adds rounds. Rows without
a bar have quartiles. Ratios compare variants of the same round, so that temporary slowdowns affect both.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import stats

from coursepack.console import inform, print_table

if TYPE_CHECKING:
    from collections.abc import Callable

Row = dict[str, Any]
Seconds = dict[str, list[float]]

STARTED = time.monotonic()
PATIENCE = 60.0
"""Seconds of additional rounds that one undecided measurement may take."""
LATEST = 25 * 60.0
"""Seconds after the start of the process from which no rounds are added, so that a run ends in 30 minutes."""
DOUBLINGS = 5
"""Maximum number of times that the rounds of an undecided measurement are doubled."""
FEWEST = 6
"""Minimum number of rounds for a 95 % interval of the median from order statistics."""
RESAMPLES = 2000


def arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="run in seconds at a tiny size")
    return parser


class Threads:
    """Context manager that sets the number of torch threads and restores the previous one."""

    def __init__(self, count: int) -> None:
        self._count, self._before = count, torch.get_num_threads()

    def __enter__(self) -> None:
        torch.set_num_threads(self._count)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)


def alternate(variants: dict[str, Callable[[], Any]], rounds: int) -> Seconds:
    """Return the seconds of each variant, `rounds` times, in a new random order every round, after a warm-up.

    A variant that returns a float has timed itself: the float is its seconds, without its preparation.
    """
    seconds: Seconds = {name: [] for name in variants}
    order = random.Random(0)
    _round(variants, order)
    _add_rounds(seconds, variants, order, rounds)
    return seconds


def measure(
    variants: dict[str, Callable[[], Any]],
    rounds: int,
    rows_of: Callable[[Seconds], list[Row]],
    *,
    patience: float = PATIENCE,
    warm_up: bool = True,
) -> list[Row]:
    """Return the rows of alternated variants, with more rounds while a bar is undecided.

    The number of rounds is doubled at most `DOUBLINGS` times: an interval that is tested after every round
    would eventually miss the true value. `patience` limits the seconds of additional rounds.
    """
    seconds: Seconds = {name: [] for name in variants}
    order = random.Random(0)
    if warm_up:
        _round(variants, order)
    started = time.monotonic()
    _add_rounds(seconds, variants, order, rounds)
    now = time.monotonic()
    per_round = max(now - started, 1e-6) / rounds
    limit = min(now + patience, STARTED + LATEST)
    rows, done = rows_of(seconds), rounds
    for _ in range(DOUBLINGS):
        more = min(done, int((limit - time.monotonic()) / per_round))
        if more < 1 or all(entry["holds"] != "undecided" for entry in rows):
            break
        _add_rounds(seconds, variants, order, more)
        rows, done = rows_of(seconds), done + more
    return rows


def _add_rounds(
    seconds: Seconds, variants: dict[str, Callable[[], Any]], order: random.Random, rounds: int
) -> None:
    for _ in range(rounds):
        for name, value in _round(variants, order).items():
            seconds[name].append(value)


def _round(variants: dict[str, Callable[[], Any]], order: random.Random) -> dict[str, float]:
    """Run every variant once, in a random order, and return the seconds of each."""
    names, taken = list(variants), {}
    order.shuffle(names)
    for name in names:
        started = time.perf_counter()
        own = variants[name]()
        taken[name] = own if isinstance(own, float) else time.perf_counter() - started
    return taken


def ratios(seconds: Seconds, over: str, under: str) -> list[float]:
    """Return one variant's times over another's, round by round."""
    return [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]


def row(
    identifier: str, values: list[float], unit: str, config: dict[str, Any], bar: str | None = None
) -> Row:
    """Return the median of repeated measurements, with quartiles or, if there is a bar, its 95 % interval.

    `bar` is like `<= 1.02` or `>= 0.9`. The interval is exact for any distribution (order statistics); fewer
    than six values have none, so their bar is undecided and the row has their range.
    """
    median = statistics.median(values)
    if bar is None:
        low, high = np.quantile(values, [0.25, 0.75]).tolist()
        config = config | {"interval": "quartiles" if len(values) > 1 else "one run"}
        return _row(identifier, median, low, high, unit, len(values), config)
    if len(values) < FEWEST:
        config = config | {"interval": "range"}
        return _row(identifier, median, min(values), max(values), unit, len(values), config, bar, "undecided")
    low, high = (float(end) for end in stats.quantile_test(values, p=0.5).confidence_interval(0.95))
    config = config | {"interval": "95 %"}
    return _row(identifier, median, low, high, unit, len(values), config, bar, verdict(low, high, bar))


def exact(identifier: str, value: float, unit: str, config: dict[str, Any], bar: str | None = None) -> Row:
    """Return a figure that does not vary from run to run, such as a size or an error."""
    holds = None if bar is None else verdict(value, value, bar)
    return _row(identifier, value, value, value, unit, 1, config | {"interval": "exact"}, bar, holds)


def ratio_of_sums(
    identifier: str, seconds: Seconds, over: str, under: str, config: dict[str, Any], bar: str | None = None
) -> Row:
    """Return one variant's total time over another's, with a 95 % interval from resampling the rounds."""
    value = sum(seconds[over]) / sum(seconds[under])
    rounds = ratios(seconds, over, under)
    if len(rounds) < FEWEST:
        holds = None if bar is None else "undecided"
        config = config | {"interval": "range"}
        low, high = min(value, *rounds), max(value, *rounds)
        return _row(identifier, value, low, high, "ratio", len(rounds), config, bar, holds)
    above, below = np.array(seconds[over]), np.array(seconds[under])
    chosen = np.random.default_rng(0).integers(0, len(above), (RESAMPLES, len(above)))
    low, high = np.quantile(above[chosen].sum(1) / below[chosen].sum(1), [0.025, 0.975]).tolist()
    low, high = min(low, value), max(high, value)
    holds = None if bar is None else verdict(low, high, bar)
    config = config | {"interval": "95 %"}
    return _row(identifier, value, low, high, "ratio", len(rounds), config, bar, holds)


def verdict(low: float, high: float, bar: str) -> str:
    """Return whether a bar holds for all of an interval (`yes`), for none of it (`no`), or for a part.

    >>> verdict(0.9, 0.99, "<= 1.0"), verdict(0.9, 1.1, "<= 1.0"), verdict(1.01, 1.1, "<= 1.0")
    ('yes', 'undecided', 'no')
    """
    sign, limit = bar.split()
    inside = [end <= float(limit) if sign == "<=" else end >= float(limit) for end in (low, high)]
    return "yes" if all(inside) else "undecided" if any(inside) else "no"


def _row(
    identifier: str,
    value: float,
    low: float,
    high: float,
    unit: str,
    n: int,
    config: dict[str, Any],
    bar: str | None = None,
    holds: str | None = None,
) -> Row:
    return {
        "id": identifier, "value": value, "low": low, "high": high, "unit": unit, "n": n, "config": config,
        "bar": bar, "holds": holds,
    }  # fmt: skip


def report(title: str, rows: list[Row], path: Path | None) -> None:
    """Print and write the rows, and exit with status 1 if a bar does not hold."""
    cells = [
        [
            entry["id"], f"{entry['value']:.4g}", f"{entry['low']:.4g} to {entry['high']:.4g}",
            entry["config"].get("interval", "-"), entry["unit"], str(entry["n"]), entry["bar"] or "-",
            entry["holds"] or "-",
        ]
        for entry in rows
    ]  # fmt: skip
    print_table(title, ["figure", "value", "low to high", "interval", "unit", "n", "bar", "holds"], cells)
    if path is not None:
        write_rows(path, machine(), rows)
        inform(f"Wrote {path}.")
    if any(entry["holds"] == "no" for entry in rows):
        sys.exit(1)


def write_rows(path: Path, where: dict[str, Any], rows: list[Row]) -> None:
    """Write the machine and the rows as JSON, one row per line so that versions of the file compare well."""
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in rows)
    path.write_text(f'{{\n "machine": {json.dumps(where)},\n "rows": [\n{lines}\n ]\n}}\n')


def machine() -> dict[str, Any]:
    """Return the hardware, versions and date of a measurement."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = f"{len(names)} x {names[0].partition(':')[2].strip()}" if names else processor
    return {
        "processor": processor,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("coursepack", "torch", "numpy", "numba", "zarr")},
        "date": time.strftime("%Y-%m-%d"),
    }
