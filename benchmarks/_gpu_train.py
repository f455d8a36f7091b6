"""Epochs of a student on a device with cached teachers and without, and what a step launches."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import _train_place
from _harness import exact, ratios, row
from _train_place import Place

from coursepack.data.loading import Renderer
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.training.loop import train_epoch, train_steps
from coursepack.distill.training.metrics import WATCH_EVERY, EpochMetrics
from coursepack.distill.training.runtime import torch_algorithms
from coursepack.distill.training.state import make_state

if TYPE_CHECKING:
    from collections.abc import Callable

    from _gpu import Device
    from _harness import Row

    from coursepack.distill.setup.prepare import Setup

PLAIN = "no teacher"


@dataclass(frozen=True)
class Students:
    """Students and data of the measured epochs."""

    teachers: tuple[str, ...]
    samples: int
    students: tuple[tuple[str, int, str], ...]
    """Network, batch size and precision."""
    rounds: int


def epochs(device: Device, size: Students) -> list[Row]:
    """Measure epochs, and the launches and synchronizations of their steps."""
    _train_place.DEVICE = device.device
    found = []
    with tempfile.TemporaryDirectory() as folder, torch_algorithms(deterministic=False):
        place = Place(Path(folder), size.samples, size.teachers)
        for name in size.teachers:
            for encoding in ("float16", "int8"):
                place.write_store(name, place.store(name, encoding), (), encoding)
        for student, batch, precision in size.students:
            found += _epochs_of(device, place, student, batch, precision, size)
    return found


def _epochs_of(
    device: Device, place: Place, student: str, batch: int, precision: str, size: Students
) -> list[Row]:
    fields = {"precision": precision, "channels_last": precision != "float32"}
    all_teachers = f"{len(size.teachers)} cached teachers"
    cases = {
        PLAIN: place.recipe(student, "supervised", batch, **fields),
        "1 cached teacher": place.recipe(student, "kd", batch, count=1, **fields),
        all_teachers: place.recipe(student, "kd", batch, **fields),
        f"{all_teachers}, int8": place.recipe(student, "kd", batch, encoding="int8", **fields),
    }
    name = f"epoch of {student}, batch {batch}, {precision}"
    config = {"samples": size.samples, "batch": batch, "student": student, "precision": precision}
    found = []
    with ExitStack() as stack:
        setups = {title: prepare(recipe, device.device) for title, recipe in cases.items()}
        variants = {title: device.waited(_epoch(setup, device, stack)) for title, setup in setups.items()}
        seconds = device.alternate(variants, size.rounds)
        for title, taken in seconds.items():
            found.append(row(f"{name}: {title}", [1e3 * s for s in taken], "ms", config))
            if title != PLAIN:
                values = ratios(seconds, title, PLAIN)
                found.append(row(f"{name}: {title} / {PLAIN}", values, "ratio", config))
        for title, setup in setups.items():
            launched, waited = device.launches(_steps(setup), WATCH_EVERY)
            step = f"step of {student}, batch {batch}, {precision}: {title}"
            found.append(exact(f"{step}, launches", launched, "launches", config))
            found.append(exact(f"{step}, synchronizations", waited, "synchronizations", config))
    return found


def _epoch(setup: Setup, device: Device, stack: ExitStack) -> Callable[[], None]:
    """Return a function that trains a student for an epoch, with its views rendered ahead as in a run."""
    state = make_state(setup)
    sizes = setup.sizes([state.learner.network])
    renderer = stack.enter_context(Renderer(setup.source, setup.recipe.view, sizes, pin=device.is_cuda))

    def run() -> None:
        train_epoch([state], renderer.ahead(setup.batches(0)), setup.targets)

    return run


def _steps(setup: Setup) -> Callable[[], None]:
    """Return a function that trains for as many steps as the rarest metric takes to come round."""
    state = make_state(setup)

    def run() -> None:
        log = EpochMetrics(max(1, len(setup.readers)))
        steps = train_steps([[state]], setup.batches(0), setup.targets, [log])
        for _ in range(WATCH_EVERY):
            next(steps)
        steps.close()

    return run
