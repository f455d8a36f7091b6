"""Students that learn from each other: the time of their steps, and the accuracy that they reach.

    python benchmarks/peers.py [--section step|study] [--json FILE] [--quick]

Section `step` compares a step of N students that learn from each other with a step of N students that train
side by side on the same batches, for images in CIFAR-100's format.

Section `study` trains students of 300 labelled digits with ten seeds, paired by seed: the first student of a
group starts from the same weights as the student that trains alone and sees the same batches. It compares
them with `kd` from the stores of networks of the same kind, trained alone on the same 300 digits, and with
both together. Ramps last 80 of 300 epochs in the papers, and here the same share of the epochs. Intervals are
95 % (t distribution) of the differences from the student alone.
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from _harness import Row, Seconds, arguments, exact, measure, ratios, report, row
from _train_place import Place, stepper
from methods import interval

from coursepack.allocator import keep_freed_memory
from coursepack.console import inform, print_table
from coursepack.data import open_source, view_recipe
from coursepack.distill.recipe import TrainRecipe, resolve_objective
from coursepack.distill.runs.folder import load_runs
from coursepack.distill.runs.train import train
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.training.group import make_group
from coursepack.distill.training.state import make_state
from coursepack.models import TeacherRunner, load_teacher
from coursepack.precompute import Job, run_job

if TYPE_CHECKING:
    from collections.abc import Callable

CPU = torch.device("cpu")
BAR = "<= 1.05"
NETWORK = "digits-cnn"
RAMP_SHARE = 80 / 300
RATE = 0.02
"""Learning rate; at the usual 0.05, `kd` ends with dead units in some seeds."""


@dataclass(frozen=True)
class Size:
    """Sizes of both sections."""

    student: str = "resnet20"
    samples: int = 512
    batch_size: int = 64
    rounds: int = 12
    groups: tuple[tuple[str, int], ...] = (
        *(("dml", 2), ("dml", 4), ("kdcl", 2), ("ffl", 2), ("one", 2)),
        *(("afd", 2), ("okddip", 4), ("let", 2)),
    )
    seeds: int = 10
    epochs: int = 40
    limit: int = 300
    views: int = 8
    teachers: int = 2
    patience: float = 60.0
    """Seconds of additional rounds of one group."""
    entries: int | None = None
    """Number of rows of the study; None means all."""


FULL = Size()
QUICK = Size("resnet8", 64, 16, 1, (("dml", 2),), 2, 1, 64, 1, 1, patience=0.0, entries=3)


def step_rows(folder: Path, size: Size) -> list[Row]:
    """Measure steps of students together over steps of as many side by side."""
    place = Place(folder, size.samples, ())
    rows = []
    for method, count in size.groups:
        plain = prepare(place.recipe(size.student, "supervised", size.batch_size), CPU)
        mutual = prepare(
            place.recipe(
                size.student, method, size.batch_size, stores=[], peers=(size.student,) * (count - 1)
            ),
            CPU,
        )
        alone = [
            [make_state(plain, plain.recipe.model_copy(update={"member": index}))] for index in range(count)
        ]
        variants = {
            "together": stepper(mutual, groups=[make_group(mutual)]),
            "side by side": stepper(plain, groups=alone),
        }
        title = f"step: {method}, {count} students"
        config = {"student": size.student, "batch": size.batch_size, "method": method}
        rows += measure(
            variants, size.rounds, partial(_step_rows, title=title, config=config), patience=size.patience
        )
        inform(f"{title}: {rows[-2]['value']:.3f} times the step side by side")
        rows += [exact(f"{title}, page faults {which}", page_faults(step), "faults", config)
                 for which, step in variants.items()]  # fmt: skip
    return rows


def page_faults(step: Callable[[], None]) -> float:
    """Return the median number of pages that a step takes from the system again."""
    found = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step()
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return statistics.median(found)


def _step_rows(seconds: Seconds, *, title: str, config: dict[str, Any]) -> list[Row]:
    several, bar = ratios(seconds, "together", "side by side"), BAR if config["method"] == "dml" else None
    return [
        row(f"{title}, together / side by side", several, "ratio", config, bar),
        row(f"{title}, together", [1e3 * each for each in seconds["together"]], "ms", config),
    ]


@dataclass(frozen=True)
class Entry:
    """One row of the study."""

    name: str
    method: str
    students: int = 1
    objective: dict[str, Any] = field(default_factory=dict)
    taught: bool = False
    """True if the students learn from the stores as well."""
    peer: str = NETWORK
    """Network of the peers; `run` starts them from a teacher."""


KD = {"soft_weight": 0.9, "hard_weight": 0.1, "temperature": 4.0}
ENTRIES = (
    Entry("alone", "supervised"),
    Entry("kd", "kd", taught=True),
    Entry("dml, 2", "dml", 2),
    Entry("dml, 4", "dml", 4),
    Entry("dml, 2, sequential", "dml", 2, {"exchange": {"order": "sequential"}}),
    Entry("kdcl naive, 2", "kdcl", 2),
    Entry("kdcl linear, 2", "kdcl", 2, {"exchange": {"target": "linear"}}),
    Entry("kdcl min-logit, 2", "kdcl", 2, {"exchange": {"target": "min_logit"}}),
    Entry("kdcl general, 2", "kdcl", 2, {"exchange": {"target": "general"}}),
    Entry("okddip, 4", "okddip", 4),
    Entry("one, 3", "one", 3),
    Entry("ffl, 2", "ffl", 2),
    Entry("codistillation, 2", "codistillation", 2),
    Entry("afd, 2", "afd", 2),
    Entry("let", "let", 2, peer="run"),
    Entry("dml and kd, 2", "dml", 2, KD, taught=True),
    Entry("ffl and kd, 2", "ffl", 2, KD, taught=True),
)


def recipe_of(entry: Entry, size: Size, seed: int, stores: list[Path], teachers: list[Path]) -> TrainRecipe:
    changes = dict(entry.objective)
    objective = resolve_objective(entry.method, changes, "benchmark", classes=10)
    ramp = max(1, round(RAMP_SHARE * size.epochs))
    plain = _with_ramp(objective.model_dump(mode="json"), ramp)
    peer = f"run:{teachers[0]}" if entry.peer == "run" else entry.peer
    return TrainRecipe.model_validate(
        {
            "student": NETWORK, "peers": [peer] * (entry.students - 1), "method": entry.method,
            "objective": plain, "stores": [str(store) for store in stores] if entry.taught else [],
            "source": "digits:train", "evaluation": "digits:test", "view": view_recipe("digits"),
            "views": size.views, "limit": size.limit, "epochs": size.epochs, "seed": seed,
            "evaluate_every": size.epochs, "optimizer": {"lr": RATE},
        }
    )  # fmt: skip


def _with_ramp(values: Any, epochs: int) -> Any:
    """Return plain values with every ramp shortened to a number of epochs."""
    if isinstance(values, list):
        return [_with_ramp(each, epochs) for each in values]
    if not isinstance(values, dict):
        return values
    changed = {name: _with_ramp(each, epochs) for name, each in values.items()}
    return {**changed, "epochs": epochs} if changed.get("shape") == "ramp" else changed


def write_stores(folder: Path, size: Size) -> tuple[list[Path], list[Path]]:
    """Train networks of the students' kind alone, and write their stores."""
    source, teachers, stores = open_source("digits"), [], []
    for index in range(size.teachers):
        teachers.append(folder / f"teacher-{index}")
        train(recipe_of(ENTRIES[0], size, 1000 + index, [], []), teachers[-1], device=CPU)
        runner = TeacherRunner(load_teacher(f"run:{teachers[-1]}", source.class_names))
        stores.append(folder / f"teacher-{index}.zarr")
        run_job(Job(stores[-1], source, view_recipe("digits"), runner, size.views), quiet=True)
    return teachers, stores


def study_rows(folder: Path, size: Size) -> list[Row]:
    """Measure the accuracy of the first student and of the ensemble, with every seed."""
    teachers, stores = write_stores(folder, size)
    rows: list[Row] = []
    cells, base = [], np.zeros(size.seeds)
    for entry in ENTRIES[: size.entries]:
        found, ensembles, seconds = [], [], []
        for seed in range(size.seeds):
            out = folder / f"{entry.name}-{seed}"
            started = time.perf_counter()
            train(recipe_of(entry, size, seed, stores, teachers), out, device=CPU)
            seconds.append(time.perf_counter() - started)
            runs = load_runs(out)
            found.append(100 * runs[0].metrics[-1]["evaluation"]["accuracy"])
            ensembles.append(100 * runs[-1].metrics[-1]["evaluation"]["accuracy"])
        accuracy, base = np.array(found), np.array(found) if entry is ENTRIES[0] else base
        together, difference = np.array(ensembles), accuracy - base
        low, high = interval(difference)
        several = entry.students > 1
        cells.append(
            [entry.name, f"{accuracy.mean():.2f}", f"{difference.mean():+.2f}", f"{low:+.2f} to {high:+.2f}",
             f"{together.mean():.2f}" if several else "-", f"{np.median(seconds):.1f}"]
        )  # fmt: skip
        inform(f"{entry.name}: {accuracy.mean():.2f} %, {difference.mean():+.2f} ({low:+.2f} to {high:+.2f})")
        figures = [("", accuracy, "%"), (" - alone", difference, "points")]
        figures += [(", ensemble", together, "%")] if several else []
        for what, values, unit in figures:
            ends = interval(values)
            rows.append(
                {
                    "id": f"study: {entry.name}{what}", "value": float(values.mean()), "low": ends[0],
                    "high": ends[1], "unit": unit, "n": len(values),
                    "config": {
                        "students": entry.students, "seconds": float(np.median(seconds)), "interval": "95 %",
                    },
                    "bar": None, "holds": None,
                }
            )  # fmt: skip
    header = ["method, students", "accuracy", "minus alone", "95 % interval", "ensemble", "s a run"]
    print_table(f"{NETWORK} on {size.limit} digits, {size.seeds} seeds", header, cells)
    return rows


def main() -> None:
    parser = arguments("Steps and accuracy of students that learn from each other.")
    parser.add_argument("--section", choices=("step", "study"), help="measure one section only")
    chosen = parser.parse_args()
    keep_freed_memory()
    size, rows = QUICK if chosen.quick else FULL, []
    with tempfile.TemporaryDirectory() as name:
        for section, measured in (("step", step_rows), ("study", study_rows)):
            if chosen.section in (None, section):
                folder = Path(name) / section
                folder.mkdir()
                rows += measured(folder, size)
    report("Students that learn from each other", rows, chosen.json)


if __name__ == "__main__":
    main()
