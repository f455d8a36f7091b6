"""Random images, untrained teachers with stores, and training steps, for benchmarks of the trainer."""

from __future__ import annotations

import itertools
import pickle
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file

from coursepack.console import inform
from coursepack.data import open_source, view_recipe
from coursepack.distill.recipe import TrainRecipe, resolve_objective
from coursepack.distill.setup.student import blocks
from coursepack.distill.training.loop import train_steps
from coursepack.distill.training.metrics import EpochMetrics
from coursepack.distill.training.state import make_state
from coursepack.models import TeacherRunner, build_network, load_teacher, parse_tap
from coursepack.precompute import Job, run_job

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from coursepack.distill.setup.prepare import Setup
    from coursepack.distill.training.state import TrainState

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLASSES = 100
GENTLE = 1e-3
"""Learning rate. On noise and with untrained teachers, a student may diverge with the usual one."""


class Place:
    """Folder with the data, teachers and stores of a benchmark."""

    def __init__(self, folder: Path, samples: int, teachers: tuple[str, ...]) -> None:
        self.folder = folder
        self.names = teachers
        write_cifar100(folder, samples)
        self.source = open_source("cifar100:train", folder)
        self.weights = {}
        for index, name in enumerate(teachers):
            self.weights[name] = folder / f"{name}.safetensors"
            save_file(self.fresh_teacher(name, index).state_dict(), self.weights[name])

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

    def runner(self, name: str, taps: Sequence[str] = ()) -> TeacherRunner:
        """Return a runner of a teacher with some taps."""
        network = load_teacher(name, self.source.class_names, weights=str(self.weights[name]))
        return TeacherRunner(network, [parse_tap(tap) for tap in taps], DEVICE)

    def last_block(self, name: str) -> str:
        """Return the name of a teacher's last block."""
        return blocks(build_network(name, CLASSES).module)[-1]

    def write_store(self, name: str, path: Path, taps: Sequence[str], encoding: str = "float16") -> None:
        """Write the store of a teacher's logits and of some taps, with one view."""
        started = time.perf_counter()
        run_job(Job(path, self.source, view_recipe("cifar"), self.runner(name, taps), 1, encoding))
        inform(f"stored {path.stem} in {time.perf_counter() - started:.0f} s")

    def store(self, name: str, encoding: str) -> Path:
        """Return the path of a teacher's store."""
        return self.folder / f"{name}-{encoding}.zarr"

    def recipe(self, student: str, method: str, batch_size: int, **fields: Any) -> TrainRecipe:
        """Return a recipe on the benchmark's data; `encoding` and `count`, or `stores`, select the stores."""
        encoding, count = fields.pop("encoding", "float16"), fields.pop("count", len(self.names))
        stores = [] if method == "supervised" else [self.store(name, encoding) for name in self.names[:count]]
        stores = fields.pop("stores", stores)
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


def stepper(
    run: Setup, epochs: Iterable[int] | None = None, groups: Sequence[Sequence[TrainState]] | None = None
) -> Callable[[], None]:
    """Return a function that runs the next step of groups of students, by default of one new student.

    Epochs follow each other, unless they are given.
    """
    groups = groups or [[make_state(run)]]
    students = [state for group in groups for state in group]

    def steps() -> Iterator[int]:
        for epoch in itertools.count() if epochs is None else epochs:
            logs = [EpochMetrics(max(1, len(run.readers))) for _ in students]
            yield from train_steps(groups, run.batches(epoch), run.targets, logs, epoch)

    stream = steps()
    return lambda: waited(lambda: next(stream))


def waited(step: Callable[[], Any]) -> None:
    """Run a step, and wait for the device."""
    step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
