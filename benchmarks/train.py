"""Time of the trainer: cost of teachers per epoch, overhead of the trainer, and the growth of both.

    python benchmarks/train.py [--json FILE] [--quick]

The data are files in CIFAR-100's format with synthetic images. Networks are untrained, because accuracy does
not affect the times. Variants alternate step by step, so that other load on the machine affects all of them
equally. The time of an epoch is the sum of its steps, and ratios of epochs have a 95 % interval over steps.
"""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _train_cold
import _train_growth
import _train_hints
import _train_sweep
import numpy as np
import torch
import torch.nn.functional as F
from _harness import PATIENCE, arguments, measure, ratio_of_sums, ratios, report, row
from _train_place import CLASSES, DEVICE, GENTLE, Place, stepper, waited

from coursepack.allocator import keep_freed_memory
from coursepack.data import open_source, view_recipe
from coursepack.data.sources import FirstSamples
from coursepack.distill.setup.prepare import prepare
from coursepack.models import build_network
from coursepack.precompute import Job, run_job

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from _harness import Row, Seconds

    from coursepack.data import Source
    from coursepack.models import TeacherRunner

TEACHERS = ("resnet32x4", "wrn-40-2", "vgg13", "resnet56")


@dataclass(frozen=True)
class Size:
    """Sizes of the measurement."""

    samples: int = 3200
    teachers: tuple[str, ...] = TEACHERS
    students: tuple[str, ...] = ("resnet8x4", "wrn-16-2")
    batch_sizes: tuple[int, ...] = (64, 256)
    steps: tuple[int, ...] = (50, 12)
    """Number of steps for each batch size."""
    live_counts: tuple[int, ...] = (1, 2, 4)
    live_steps: int = 8
    precompute_teachers: tuple[str, ...] = ("wrn-40-2", "resnet56")
    precompute_samples: int = 1024
    precompute_rounds: int = 6
    patience: float = PATIENCE
    growth: _train_growth.Size = _train_growth.FULL
    sweep: _train_sweep.Size = _train_sweep.FULL


FULL = Size()
QUICK = Size(
    samples=32, teachers=("resnet8", "resnet14"), students=("resnet8",), batch_sizes=(16,), steps=(1,),
    live_counts=(1,), live_steps=1,
    precompute_teachers=("resnet8",), precompute_samples=32, precompute_rounds=1, patience=0,
    growth=_train_growth.QUICK, sweep=_train_sweep.QUICK,
)  # fmt: skip


def open_place(folder: Path, size: Size) -> Place:
    """Write the data, teachers and stores of the benchmark, each with a tap of its last block for hints."""
    place = Place(folder, size.samples, size.teachers)
    for index, name in enumerate(size.teachers):
        place.write_store(name, place.store(name, "float16"), [f"{place.last_block(name)}:map"])
        # The time to read does not depend on the values, so random ones are stored.
        _train_growth.write_store(place.store(name, "int8"), place.source, "cifar", 1, index, "int8")
    return place


def minimal(student: str, source: Source, batch_size: int) -> Callable[[], None]:
    """Return a step of a minimal training loop on normalized float32 images on the device."""
    network = build_network(student, CLASSES)
    module = network.module.to(DEVICE).train()
    optimizer = torch.optim.SGD(
        module.parameters(), lr=GENTLE, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
    )
    pixels = torch.from_numpy(source.pixels(np.arange(len(source.labels)))).to(DEVICE)
    images, labels = network.preprocessing(pixels), torch.from_numpy(source.labels).to(DEVICE)
    images = images.contiguous(memory_format=torch.channels_last)

    def steps() -> Iterator[None]:
        while True:
            for chosen in torch.randperm(len(labels), device=DEVICE).split(batch_size):
                loss = F.cross_entropy(module(images[chosen]), labels[chosen])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                yield

    stream = steps()
    return lambda: waited(lambda: next(stream))


def teachers_in_an_epoch(place: Place, size: Size) -> list[Row]:
    """Measure epochs with cached teachers and of a hand-written loop, over epochs without teachers."""
    found = []
    for student, (batch_size, steps) in itertools.product(
        size.students, zip(size.batch_sizes, size.steps, strict=True)
    ):
        recipes = {
            "plain": place.recipe(student, "supervised", batch_size),
            "kd float16": place.recipe(student, "kd", batch_size),
            "kd int8": place.recipe(student, "kd", batch_size, encoding="int8"),
            "amtml": place.recipe(student, "amtml", batch_size),
            "amtml-hints": place.recipe(student, "amtml-hints", batch_size),
        }
        variants = {name: stepper(prepare(recipe, DEVICE)) for name, recipe in recipes.items()}
        variants["minimal"] = minimal(student, place.source, batch_size)
        config = {"student": student, "batch": batch_size, "teachers": list(place.names)}
        title = f"{student}, batch {batch_size}"
        bars = {
            ("kd float16", "plain"): "<= 1.02",
            ("kd int8", "plain"): "<= 1.02",
            ("amtml", "plain"): "<= 1.05" if batch_size == 64 else "<= 1.10",
            ("amtml-hints", "plain"): None,
            ("plain", "minimal"): "<= 1.03",
        }
        found += measure(
            variants, steps, lambda seconds, rest=(title, config, bars): _epochs(seconds, *rest),
            patience=size.patience,
        )  # fmt: skip
    return found


def _epochs(
    seconds: Seconds, title: str, config: dict[str, Any], bars: dict[tuple[str, str], str | None]
) -> list[Row]:
    steps = [
        row(f"step: {title}, {name}", [1e3 * s for s in seconds[name]], "ms", config) for name in seconds
    ]
    return steps + [
        ratio_of_sums(f"epoch: {title}, {over} / {under}", seconds, over, under, config, bar)
        for (over, under), bar in bars.items()
    ]


def live_teachers(place: Place, size: Size) -> list[Row]:
    """Measure live teachers over cached ones, with the maximum that can be saved."""
    found, student, batch_size = [], size.students[0], size.batch_sizes[0]
    for count in size.live_counts:
        cached, live = (
            stepper(prepare(place.recipe(student, "kd", batch_size, count=count, online=online), DEVICE))
            for online in (False, True)
        )
        runners = [place.runner(name) for name in place.names[:count]]
        pixels = torch.from_numpy(place.source.pixels(np.arange(batch_size))).to(DEVICE)

        def forward(runners: list[TeacherRunner] = runners, pixels: torch.Tensor = pixels) -> None:
            for runner in runners:
                bare_forward(runner, pixels)

        plain = stepper(prepare(place.recipe(student, "supervised", batch_size), DEVICE))
        config = {"student": student, "batch": batch_size, "teachers": list(place.names[:count])}
        variants = {
            "cached": cached, "live": live, "plain": plain, "forward": lambda run=forward: waited(run)
        }  # fmt: skip
        found += measure(
            variants, size.live_steps, lambda seconds, config=config: _live(seconds, config),
            patience=size.patience,
        )  # fmt: skip
    return found


def _live(seconds: Seconds, config: dict[str, Any]) -> list[Row]:
    speedups, bounds = ratios(seconds, "live", "cached"), [1 + r for r in ratios(seconds, "forward", "plain")]
    shares = [speedup / bound for speedup, bound in zip(speedups, bounds, strict=True)]
    count = len(config["teachers"])
    title = f"live: {count} teacher{'s' if count > 1 else ''}"
    return [
        row(f"{title}, live / cached", speedups, "ratio", config),
        row(f"{title}, (student + forward) / student", bounds, "ratio", config),
        row(f"{title}, share of that bound", shares, "ratio", config, ">= 0.95"),
    ]


@torch.inference_mode()
def bare_forward(runner: TeacherRunner, pixels: torch.Tensor) -> torch.Tensor:
    """Run only a teacher's network on pixels in memory, and return its output."""
    network = runner.network
    logits: torch.Tensor = network.module(network.preprocessing(pixels))
    return logits


def precompute(place: Place, size: Size) -> list[Row]:
    """Measure `precompute run`, including rendering, encoding and writing, over the bare forward pass."""
    found = []
    source = open_source("cifar100:train", place.folder)
    rows = min(size.precompute_samples, len(source.labels))
    for name in size.precompute_teachers:
        runner = place.runner(name)
        pixels = torch.from_numpy(source.pixels(np.arange(rows))).to(DEVICE)

        def bare(runner: TeacherRunner = runner, pixels: torch.Tensor = pixels) -> None:
            for chunk in pixels.split(256):
                bare_forward(runner, chunk)

        def run(runner: TeacherRunner = runner) -> None:
            with tempfile.TemporaryDirectory(dir=place.folder) as folder:
                job = Job(
                    Path(folder) / "store.zarr", FirstSamples(source, rows), view_recipe("cifar"), runner, 1
                )
                run_job(job)

        config = {"teacher": name, "samples": rows, "views": 1}
        found += measure(
            {"run": run, "bare": lambda bare=bare: waited(bare)}, size.precompute_rounds,
            lambda seconds, config=config: _speeds(seconds, config), patience=size.patience,
        )  # fmt: skip
    return found


def _speeds(seconds: Seconds, config: dict[str, Any]) -> list[Row]:
    bare, title = [config["samples"] / s for s in seconds["bare"]], f"precompute: {config['teacher']}"
    return [
        row(f"{title}, bare forward", bare, "images/s", config),
        row(
            f"{title}, run / bare forward",
            ratios(seconds, "bare", "run"),
            "ratio of images/s",
            config,
            ">= 0.95",
        ),
    ]


def main() -> None:
    chosen = arguments("The trainer: teachers' cost in an epoch, the trainer's own, and growth.").parse_args()
    keep_freed_memory()
    size = QUICK if chosen.quick else FULL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place = open_place(folder, size)
        rows = [
            *teachers_in_an_epoch(place, size),
            *_train_hints.hint_parts(
                place, size.students, list(zip(size.batch_sizes, size.steps, strict=True)), size.patience
            ),
            *live_teachers(place, size),
            *precompute(place, size),
            *_train_sweep.sweeps(place, size.sweep),
            *_train_growth.growth(folder / "growth", size.growth),
            *_train_growth.beginning(folder / "large", size.growth),
            *([] if chosen.quick else _train_cold.first_steps(folder, place, size.students[0])),
        ]
    report("Training students", rows, chosen.json)


if __name__ == "__main__":
    main()
