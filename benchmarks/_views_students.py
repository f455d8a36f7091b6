"""Accuracy of students of 300 digits by number of cached views, and by views per load.

Teachers are those of `benchmarks/methods.py`; `kd` learns from all three, `fitnets` from the resnet. Students
are convolutional, have the numbers of the methods' presets, and are paired by seed: the same initial weights
and samples. All rows of a comparison have the same number of steps.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
from _harness import exact, verdict
from _methods_presets import LEARNING_RATE, STUDENT
from methods import entries, interval, recipe, train_student, train_teachers
from PIL import Image

from coursepack.console import inform
from coursepack.data import ViewRecipe, open_source
from coursepack.data.views.geometry import PadCrop, ResizedCrop
from coursepack.models import TeacherRunner, load_teacher, parse_tap
from coursepack.precompute import Job
from coursepack.precompute.several import run_jobs

if TYPE_CHECKING:
    from pathlib import Path

    from _harness import Row
    from methods import Entry

    from coursepack.data import Source

METHODS = ("kd", "fitnets")
TAPS: tuple[tuple[str, ...], ...] = ((), (), ("layer1",))
"""Taps of the stores of mlp, cnn and resnet."""
BATCH = 60
"""Rows per step; 1, 2 and 4 views per load divide it, and it divides 300 digits."""
NOT_WORSE = ">= -1.0"
"""Bar for the points that several views per load may cost."""
VIEW = ViewRecipe(ops=(PadCrop(padding=1), ResizedCrop(scale=(0.5, 1.0))), reference_size=8)
"""Preset `digits`, which has nine views of a digit, with crops of half to all of the area besides."""


@dataclass(frozen=True)
class Size:
    """Sizes of the measurement."""

    share: str = "0.208"
    """Share of the training digits that students learn from: 300 of 1442."""
    seeds: int = 10
    epochs: int = 40
    """Number of epochs of students that see one view per epoch, and of views in the stores."""
    counts: tuple[int, ...] = (1, 2, 4, 8, 16)
    loads: tuple[int, ...] = (1, 2, 4)


FULL = Size()
QUICK = Size("0.05", seeds=2, epochs=2, counts=(1,), loads=(1, 2))


def students(folder: Path, size: Size, *, quick: bool) -> list[Row]:
    """Train the teachers, then the students of both comparisons."""
    runs = train_teachers(folder / "teachers", quick)["plain"]
    rows = how_many(folder / "digits", runs, size)
    with mock.patch.dict(os.environ, {"COURSEPACK_CACHE": str(folder / "cache")}):
        return rows + per_load(folder / "jpeg", runs, size)


def how_many(folder: Path, runs: list[Path], size: Size) -> list[Row]:
    """Measure students of several numbers of cached views against a new view every epoch."""
    source = open_source(f"digits:train+{size.share}")
    stores = write_stores(folder, runs, source, size.epochs)
    rows: list[Row] = []
    fields = {"source": source.name, "view": VIEW}
    for entry in entries("presets", METHODS):
        fresh = accuracies(entry, stores, size.seeds, size.epochs, **fields, views=size.epochs)
        for count in size.counts:
            own = accuracies(entry, stores, size.seeds, size.epochs, **fields, views=count)
            title = f"{count} view{'s' * (count > 1)}: {entry.name}"
            rows += paired(title, own, fresh, "new views", {"views": count})
        title = f"a new view every epoch: {entry.name}"
        rows += paired(title, fresh, fresh, "new views", {"views": size.epochs})
    return rows


def per_load(folder: Path, runs: list[Path], size: Size) -> list[Row]:
    """Measure students from JPEG files with several views per load against one, all with the same rows."""
    write_digits(folder, size.share)
    source = open_source("folder:train", folder)
    stores = write_stores(folder / "stores", runs, source, size.epochs)
    rows: list[Row] = []
    fields = {"source": source.name, "evaluation": "folder:test", "root": str(folder)}
    fields |= {"view": VIEW, "views": size.epochs}
    for entry in entries("presets", METHODS):
        base: np.ndarray | None = None
        for each in size.loads:
            epochs = size.epochs // each
            own = accuracies(entry, stores, size.seeds, epochs, **fields, views_per_load=each)
            base = own if base is None else base
            title = f"{each} view{'s' * (each > 1)} per load: {entry.name}"
            rows += paired(title, own, base, "one view", {"views": size.epochs}, NOT_WORSE)
    return rows


def write_stores(folder: Path, runs: list[Path], source: Source, views: int) -> list[Path]:
    """Write the stores of the teachers in some run folders."""
    jobs = []
    for run, taps in zip(runs, TAPS, strict=True):
        network = load_teacher(f"run:{run}", source.class_names)
        runner = TeacherRunner(network, [parse_tap(tap) for tap in taps])
        jobs.append(Job(folder / f"{run.name}.zarr", source, VIEW, runner, views))
    run_jobs(jobs, quiet=True)
    return [folder / f"{run.name}.zarr" for run in runs]


def write_digits(root: Path, share: str) -> None:
    """Write the digits that students learn from, and the test digits, as JPEG files."""
    for split, name in (("train", f"digits:train+{share}"), ("test", "digits:test")):
        source = open_source(name)
        for sample, label in enumerate(source.labels.tolist()):
            path = root / split / source.class_names[label] / f"{sample:04}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source.pixels(np.array([sample]))[0][..., 0]).save(path, quality=95)


def accuracies(entry: Entry, stores: list[Path], seeds: int, epochs: int, **fields: Any) -> np.ndarray:
    """Return the accuracy in percent of a student of each seed."""
    fields |= {"student": STUDENT, "optimizer": {"lr": LEARNING_RATE}, "batch_size": BATCH, "limit": None}
    title = f"{entry.name}, {fields['views']} views"
    recipes = [recipe(entry, stores, seed, epochs, **fields) for seed in range(seeds)]
    return np.array([100 * train_student(each, title)[0]["accuracy"] for each in recipes])


def paired(
    title: str, own: np.ndarray, base: np.ndarray, name: str, config: dict[str, Any], bar: str | None = None
) -> list[Row]:
    """Return the mean accuracy, and its difference from the base of the same seeds."""
    rows = []
    both = ((title, own, "%", None), (f"{title} - {name}", own - base, "points", bar))
    for identifier, values, unit, limit in both[: 1 if own is base else 2]:
        low, high = interval(values)
        made = exact(identifier, float(values.mean()), unit, {})
        made |= {"low": low, "high": high, "n": len(values), "config": config | {"interval": "95 %"}}
        holds = None if limit is None else verdict(low, high, limit)
        rows.append(made | {"bar": limit, "holds": holds})
    inform(f"{title}: {own.mean():.2f} %, {(own - base).mean():+.2f}")
    return rows
