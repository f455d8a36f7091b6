"""Complete workflow on real data: three teachers, their stores, and students with and without them.

    python examples/demo.py [--out demo] [--json FILE] [--quick]

Every step runs one of the package's commands and prints it. The output folder contains the teachers, stores
and runs that later commands in the README use. The results are written as rows, in the format of the
benchmarks, to `rows.json` in that folder or to FILE.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import statistics
import sys
import time
from pathlib import Path

import click
import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from _harness import exact, machine, row, write_rows
from epoch import measure

from coursepack.console import print_table
from coursepack.distill.cli import main as distill
from coursepack.distill.runs.compare import Group, compare, table_rows
from coursepack.distill.runs.folder import load_run
from coursepack.precompute.cli import main as precompute

TEACHERS = ("mlp", "cnn", "resnet")
STUDENT = "digits-small"
SAMPLES = 300
LEARNING_RATES = ("0.1", "0.03")
"""Learning rates for both kinds of student, because soft targets at T = 4 also change the step size."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to fill")
    parser.add_argument(
        "--json", type=Path, help="write the rows to this file, by default rows.json in --out"
    )
    parser.add_argument("--quick", action="store_true", help="few epochs and seeds, to see that it runs")
    chosen = parser.parse_args()
    out, quick = chosen.out, chosen.quick
    # Remove the results of an earlier demo: its stores do not belong to the newly trained teachers.
    for path in (out / "teachers", out / "runs", *(out / f"{teacher}.zarr" for teacher in TEACHERS)):
        shutil.rmtree(path, ignore_errors=True)
    started = time.perf_counter()
    views, seeds, epochs = (2, 2, 2) if quick else (8, 6, 60)

    stores = []
    for teacher in TEACHERS:
        command(
            distill, "train", "--student", f"digits-{teacher}", "--source", "digits", "--view", "digits",
            "--epochs", "1" if quick else "25", "--overwrite", "--out", out / "teachers" / teacher,
        )  # fmt: skip
    for teacher in TEACHERS:
        stores.append(out / f"{teacher}.zarr")
        command(
            precompute, "run", "--teacher", f"run:{out / 'teachers' / teacher}", "--source", "digits",
            "--view", "digits", "--views", views, "--store", stores[-1],
        )  # fmt: skip

    runs = []
    shared = ("--student", STUDENT, "--limit", SAMPLES, "--epochs", epochs, "--overwrite")
    for rate in LEARNING_RATES:
        for kind in ("alone", "distilled"):
            for seed in range(seeds):
                runs.append(out / "runs" / f"{kind}-lr{rate}-{seed}")
                teachers = (
                    ("--source", "digits", "--view", "digits")
                    if kind == "alone"
                    else [part for store in stores for part in ("--store", store)]
                )
                command(distill, "train", *shared, *teachers, "--lr", rate, "--seed", seed, "--out", runs[-1])

    groups = compare([load_run(run) for run in runs])
    timed = measure(stores, SAMPLES, 1 if quick else 40)
    write_rows(chosen.json or out / "rows.json", machine(), accuracy_rows(out, seeds) + timed)
    print_accuracy(groups)
    print_time(timed, students=len(runs) // 2, epochs=epochs)
    plot(groups, out / "demo.png")
    click.echo(f"Plot: {out / 'demo.png'}. Whole demo: {time.perf_counter() - started:.0f} s.")


def command(entry: click.Group, *words: object) -> None:
    arguments = [str(word) for word in words]
    click.echo(f"$ {entry.callback.__module__.split('.')[1]} {shlex.join(arguments)}", err=True)
    entry(arguments, standalone_mode=False)


def accuracy_rows(out: Path, seeds: int) -> list[dict[str, object]]:
    """Return the accuracies of teachers and students."""

    def percent(run: Path) -> float:
        return 100 * load_run(run).metrics[-1]["evaluation"]["accuracy"]

    rows = [row(f"teacher {name}", [percent(out / "teachers" / name)], "%", {}) for name in TEACHERS]
    for rate in LEARNING_RATES:
        alone, distilled = (
            [percent(out / "runs" / f"{kind}-lr{rate}-{seed}") for seed in range(seeds)]
            for kind in ("alone", "distilled")
        )
        config = {"student": STUDENT, "samples": SAMPLES, "lr": float(rate)}
        rows += [
            mean_row(f"alone, lr {rate}", alone, config),
            mean_row(f"from stores, lr {rate}", distilled, config),
        ]
        better = sum(b > a for a, b in zip(alone, distilled, strict=True))
        rows.append(exact(f"seeds better from stores, lr {rate}", better, "seeds", config) | {"n": seeds})
    return rows


def mean_row(identifier: str, values: list[float], config: dict[str, object]) -> dict[str, object]:
    """Return mean and standard deviation over seeds."""
    mean, sd = statistics.fmean(values), statistics.stdev(values)
    config = config | {"sd": sd, "interval": "one standard deviation"}
    return exact(identifier, mean, "%", config) | {
        "low": mean - sd, "high": mean + sd, "n": len(values), "config": config,
    }  # fmt: skip


def print_accuracy(groups: list[Group]) -> None:
    header, rows = table_rows(groups)
    title = f"Accuracy on the test digits: the same {SAMPLES} training samples, with and without the stores"
    print_table(title, header, rows)


def print_time(timed: list[dict[str, object]], students: int, epochs: int) -> None:
    rows = {entry["id"]: entry for entry in timed}

    def cell(name: str) -> str:
        return f"{rows[name]['value']:.1f} ms"

    once = rows["teachers, once, all views"]["value"] / 1000
    live = rows["epoch with live teachers"]["value"] - rows["epoch from stores"]["value"]
    print_table(
        f"Time: {len(TEACHERS)} teachers, a student epoch of {SAMPLES} samples (median of alternated epochs)",
        ["what", "time", "times a plain epoch"],
        [
            ["teachers, all views of all training digits, paid once", f"{once:.1f} s", "-"],
            ["plain epoch, no teacher", cell("plain epoch"), "1"],
            [
                "epoch from stores",
                cell("epoch from stores"),
                f"{rows['epoch from stores / plain']['value']:.2f}",
            ],
            [
                "epoch with live teachers",
                cell("epoch with live teachers"),
                f"{rows['epoch with live teachers / plain']['value']:.2f}",
            ],
            [
                f"saved over the {students} x {epochs} epochs above",
                f"{students * epochs * live / 1000:.1f} s",
                "-",
            ],
        ],
    )


def plot(groups: list[Group], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 0.7 * len(groups) + 1.2))
    for place, group in enumerate(reversed(groups)):
        values = list(group.accuracy.values())
        color = "tab:blue" if "kd" in group.label else "tab:gray"
        axes.scatter([100 * value for value in values], [place] * len(values), color=color, alpha=0.6)
        axes.scatter(100 * statistics.fmean(values), place, marker="|", s=400, color=color)
    labels = [group.label.replace(" from ", "\nfrom ") for group in reversed(groups)]
    axes.set_yticks(range(len(groups)), labels)
    axes.margins(y=0.15)
    axes.set_xlabel(f"test accuracy, % (dots: seeds, bar: mean), {SAMPLES} training samples")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
