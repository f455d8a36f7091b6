"""What every benchmark shares: alternated runs, medians with their spread, one table, one JSON file."""

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

from coursepack.console import print_table

if TYPE_CHECKING:
    from collections.abc import Callable


def arguments(description: str) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="a tiny size, to see that it runs")
    return parser


def alternate(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant, `rounds` times, in a new random order every round after one warm-up."""
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_number in range(rounds + 1):
        names = list(variants)
        order.shuffle(names)
        for name in names:
            started = time.perf_counter()
            variants[name]()
            if round_number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratios(seconds: dict[str, list[float]], over: str, under: str) -> list[float]:
    """One variant's times over another's, round by round."""
    return [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]


def row(
    identifier: str, values: list[float], unit: str, config: dict[str, Any], bar: str | None = None
) -> dict[str, Any]:
    """One result: median and quartiles, and whether it holds its bar (`<= 1.02`, `>= 0.9`)."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    median = statistics.median(values)
    holds = None
    if bar is not None:
        sign, limit = bar.split()
        holds = median <= float(limit) if sign == "<=" else median >= float(limit)
    return {
        "id": identifier, "value": median, "low": low, "high": high, "unit": unit, "n": len(values),
        "config": config, "bar": bar, "holds": holds,
    }  # fmt: skip


def ratio_of_sums(
    identifier: str,
    seconds: dict[str, list[float]],
    over: str,
    under: str,
    config: dict[str, Any],
    bar: str | None = None,
) -> dict[str, Any]:
    """One variant's total time over another's, with a 95 % interval from resampling the rounds."""
    above, below = np.array(seconds[over]), np.array(seconds[under])
    chosen = np.random.default_rng(0).integers(0, len(above), (2000, len(above)))
    low, high = np.quantile(above[chosen].sum(1) / below[chosen].sum(1), [0.025, 0.975])
    value = float(above.sum() / below.sum())
    found = row(identifier, [value], "ratio", config | {"interval": "95 %"}, bar)
    return found | {"low": float(low), "high": float(high), "n": len(above)}


def report(title: str, rows: list[dict[str, Any]], path: Path | None) -> None:
    """Print the rows, write them, and exit with status 1 if a bar does not hold."""
    cells = [
        [
            entry["id"], f"{entry['value']:.4g}", f"{entry['low']:.4g} to {entry['high']:.4g}", entry["unit"],
            str(entry["n"]), entry["bar"] or "-", {True: "yes", False: "NO", None: "-"}[entry["holds"]],
        ]
        for entry in rows
    ]  # fmt: skip
    print_table(title, ["figure", "median", "quartiles", "unit", "n", "bar", "holds"], cells)
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    if any(entry["holds"] is False for entry in rows):
        sys.exit(1)


def machine() -> dict[str, Any]:
    """Hardware, versions and date, for the record."""
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
