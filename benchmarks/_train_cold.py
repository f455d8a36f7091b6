"""Seconds that the first step of a run waits for compiled functions, with numba's cache empty and full.

Each run is a process of its own that ends after its first step. `in the step` is a run without the thread
that compiles while the run opens its stores and renders its first batches.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

from _harness import row

if TYPE_CHECKING:
    from pathlib import Path

    from _harness import Row
    from _train_place import Place

RUN = """
import importlib, sys, time
from pathlib import Path
from unittest import mock
import torch
from coursepack.distill.recipe import TrainRecipe
from coursepack.distill.runs import start, train
from coursepack.distill.training import loop
from coursepack.kernels.preload import PACKAGE

recipe = TrainRecipe.model_validate_json(Path(sys.argv[1]).read_text())
cpu, step = torch.device("cpu"), loop.train_step

def first_step(*args, **options):
    begun = time.perf_counter()
    for name in start.compiled_modules(recipe, cpu):
        importlib.import_module(f"{PACKAGE}.{name}")
    waited = time.perf_counter() - begun
    step(*args, **options)
    print(waited, time.perf_counter() - started)
    raise SystemExit

with mock.patch.object(loop, "train_step", first_step):
    if sys.argv[3] == "in the step":
        start.preload = lambda modules: None
    started = time.perf_counter()
    train.train(recipe, Path(sys.argv[2]), device=cpu)
"""
BARS = {("cold", "ahead"): "<= 1", ("cached", "ahead"): "<= 0.3"}


METHOD, ROUNDS = "amtml", 6


def first_steps(folder: Path, place: Place, student: str) -> list[Row]:
    """Measure the wait, and the seconds from the start of a run to the end of its first step."""
    recipe, cache = folder / "recipe.json", folder / "cache"
    recipe.write_text(place.recipe(student, METHOD, 64).model_dump_json())
    seconds: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(ROUNDS):
        for how in ("ahead", "in the step"):
            shutil.rmtree(cache, ignore_errors=True)
            for state in ("cold", "cached"):
                seconds.setdefault((state, how), []).append(_one(recipe, folder / "run", cache, how))
    config = {"student": student, "method": METHOD}
    found = []
    for (state, how), values in seconds.items():
        waits, totals = ([each[index] for each in values] for index in (0, 1))
        title = f"first step, {state}, compiled {how}"
        found += [
            row(f"{title}: wait", waits, "s", config, BARS.get((state, how))),
            row(f"{title}: start-up to its end", totals, "s", config),
        ]
    return found


def _one(recipe: Path, out: Path, cache: Path, how: str) -> tuple[float, float]:
    cache.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(recipe), str(out), how],
        env=os.environ | {"NUMBA_CACHE_DIR": str(cache)}, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)
    waited, total = done.stdout.split()[-2:]
    return float(waited), float(total)
