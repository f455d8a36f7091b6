"""Time of the trainer: cost of teachers per epoch, overhead of the trainer, and the growth of both.

    python benchmarks/train.py [--json FILE] [--quick]

The data are files in CIFAR-100's format with synthetic images. Networks are untrained, because accuracy does
not affect the times. Variants alternate step by step, so that other load on the machine affects all of them
equally. The time of an epoch is the sum of its steps, and ratios of epochs have a 95 % interval over steps.
"""

from __future__ import annotations

import itertools
import pickle
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _train_growth
import _train_sweep
import numpy as np
import torch
import torch.nn.functional as F
from _harness import PATIENCE, arguments, measure, ratio_of_sums, ratios, report, row
from safetensors.torch import save_file

from coursepack.console import say
from coursepack.data import open_source, view_recipe
from coursepack.data.sources import FirstSamples
from coursepack.distill.recipe import TrainRecipe, resolve_objective
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.setup.student import blocks
from coursepack.distill.training.loop import train_steps
from coursepack.distill.training.metrics import EpochMetrics
from coursepack.distill.training.state import make_state
from coursepack.models import TeacherRunner, build_network, load_teacher, parse_tap
from coursepack.precompute import Job, run_job

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from _harness import Row, Seconds

    from coursepack.data import Source
    from coursepack.distill.setup.prepare import Setup

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLASSES = 100
TEACHERS = ("resnet32x4", "wrn-40-2", "vgg13", "resnet56")
GENTLE = 1e-3
"""Learning rate. On noise and with untrained teachers, a student may diverge with the usual one."""


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


class Place:
    """Folder with the data, teachers and stores of the benchmark."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.folder = folder
        self.names = size.teachers
        write_cifar100(folder, size.samples)
        self.source = open_source("cifar100:train", folder)
        self.weights = {}
        for place, name in enumerate(size.teachers):
            self.weights[name] = folder / f"{name}.safetensors"
            save_file(self.fresh_teacher(name, place).state_dict(), self.weights[name])
        for place, name in enumerate(size.teachers):
            started = time.perf_counter()
            runner = self.runner(name, tapped=True)
            run_job(Job(self.store(name, "float16"), self.source, view_recipe("cifar"), runner, 1))
            say(f"stored {name} in {time.perf_counter() - started:.0f} s")
            # The time to read does not depend on the values, so random ones are stored.
            _train_growth.write_store(self.store(name, "int8"), self.source, "cifar", 1, place, "int8")

    @torch.no_grad()
    def fresh_teacher(self, name: str, seed: int) -> torch.nn.Module:
        """Return an untrained network with running statistics of images, which keep outputs bounded."""
        network = build_network(name, CLASSES, seed=seed)
        for module in network.module.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
        pixels = torch.from_numpy(self.source.pixels(np.arange(min(64, len(self.source.labels)))))
        network.module.train()(network.preprocessing(pixels))
        return network.module

    def runner(self, name: str, *, tapped: bool = False) -> TeacherRunner:
        """Return a runner of a teacher, with `tapped` including a tap of its last block for hints."""
        network = load_teacher(name, self.source.class_names, weights=str(self.weights[name]))
        taps = [parse_tap(f"{blocks(network.module)[-1]}:map")] if tapped else []
        return TeacherRunner(network, taps, DEVICE)

    def store(self, name: str, encoding: str) -> Path:
        """Return the path of a teacher's store."""
        return self.folder / f"{name}-{encoding}.zarr"

    def recipe(self, student: str, method: str, batch_size: int, **fields: Any) -> TrainRecipe:
        """Return a recipe on the benchmark's data; `encoding` and `count` select the stores."""
        encoding, count = fields.pop("encoding", "float16"), fields.pop("count", len(self.names))
        stores = [] if method == "supervised" else [self.store(name, encoding) for name in self.names[:count]]
        return TrainRecipe.model_validate(
            {
                "student": student, "method": method, "stores": [str(store) for store in stores],
                "objective": resolve_objective(method, {}, "benchmark", classes=CLASSES),
                "source": "cifar100:train",
                "evaluation": "cifar100:test", "root": str(self.folder), "view": view_recipe("cifar"),
                "views": None if stores else 1, "batch_size": batch_size,
                "optimizer": {"lr": GENTLE}, **fields,
            }
        )  # fmt: skip


def write_cifar100(folder: Path, samples: int) -> None:
    """Write files in CIFAR-100's format with random images, with an eighth as many test images."""
    inside = folder / "cifar-100-python"
    inside.mkdir()
    rng = np.random.default_rng(0)
    for name, rows in (("train", samples), ("test", max(1, samples // 8))):
        values = {
            "data": rng.integers(0, 256, (rows, 3072), dtype=np.uint8),
            "fine_labels": rng.integers(0, CLASSES, rows).tolist(),
            "coarse_labels": [0] * rows,
            "filenames": [f"{row}.png" for row in range(rows)],
            "batch_label": name,
        }
        (inside / name).write_bytes(pickle.dumps(values, protocol=2))
    names = {
        "fine_label_names": [f"class {i}" for i in range(CLASSES)],
        "coarse_label_names": ["things"] * 20,
    }
    (inside / "meta").write_bytes(pickle.dumps(names, protocol=2))


def stepper(run: Setup) -> Callable[[], None]:
    """Return a function that runs the next step of a new student, epoch after epoch."""
    state = make_state(run)

    def steps() -> Iterator[int]:
        for epoch in itertools.count():
            log = EpochMetrics(max(1, len(run.readers)))
            yield from train_steps([state], run.batches(epoch), run.targets, [log], epoch)

    stream = steps()
    return lambda: _waited(lambda: next(stream))


def minimal(student: str, source: Source, batch_size: int) -> Callable[[], None]:
    """Return a step of a minimal training loop on normalised float32 images on the device."""
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
    return lambda: _waited(lambda: next(stream))


def _waited(step: Callable[[], Any]) -> None:
    step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


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
            ("amtml", "plain"): "<= 1.05" if batch_size == 64 else None,
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
            "cached": cached, "live": live, "plain": plain, "forward": lambda run=forward: _waited(run)
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
            {"run": run, "bare": lambda bare=bare: _waited(bare)}, size.precompute_rounds,
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
    size = QUICK if chosen.quick else FULL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place = Place(folder, size)
        rows = [
            *teachers_in_an_epoch(place, size),
            *live_teachers(place, size),
            *precompute(place, size),
            *_train_sweep.sweeps(place, size.sweep),
            *_train_growth.growth(folder / "growth", size.growth),
            *_train_growth.beginning(folder / "large", size.growth),
        ]
    report("Training students", rows, chosen.json)


if __name__ == "__main__":
    main()
