"""Seconds of training a student from JPEG files with several views per load, over a plain DataLoader.

All variants train the same network on as many rows (sample, view) with the same transforms, from the same
files, which are in the page cache. The plain one learns from labels alone; the others also read four cached
teachers. The student is small, so that decoding takes longer than its steps: what those take alone, on images
in memory, is measured beside. A round of each is one stream of batches, so that workers start to decode once.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from _harness import PATIENCE, measure, ratios, row
from _photographs import FILE_SIDES, write_photographs
from _train_growth import write_store
from _train_place import DEVICE, GENTLE, waited
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from coursepack.data import open_source, view_recipe
from coursepack.data.loading import Renderer
from coursepack.distill.recipe import TrainRecipe, resolve_objective
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.training.loop import train_epoch
from coursepack.distill.training.state import make_state
from coursepack.models import build_network

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import ExitStack
    from pathlib import Path

    from _harness import Row, Seconds

    from coursepack.models import Network

STUDENT, TEACHERS, WORKERS = "resnet8", 4, 2
VIEW = "imagenet"
BARS = {4: "<= 0.75"}
"""Bars for the seconds over those of a DataLoader, by number of views per load."""
ENDLESS = 10**6
"""Number of epochs of the recipes, of which rounds train as many as they need."""


@dataclass(frozen=True)
class Size:
    """Sizes of the measurement."""

    files: int = 1024
    classes: int = 100
    loads: tuple[int, ...] = (1, 2, 4)
    batch_size: int = 64
    rounds: int = 7
    patience: float = PATIENCE

    @property
    def views(self) -> int:
        """Number of views of each sample in a round of each variant."""
        return max(self.loads)

    @property
    def rows(self) -> int:
        """Number of rows (sample, view) in a round of each variant."""
        return self.files * self.views


FULL = Size()
QUICK = Size(files=8, classes=2, loads=(1, 2), batch_size=4, rounds=1, patience=0)


def training(folder: Path, size: Size, stack: ExitStack) -> list[Row]:
    """Measure all variants; workers end when the stack is closed."""
    write_photographs(folder, size.files, size.classes, np.random.default_rng(0))
    stack.enter_context(mock.patch.dict(os.environ, {"COURSEPACK_CACHE": str(folder / "cache")}))
    source = open_source("folder:train", folder)
    stores = [
        write_store(folder / f"{index}.zarr", source, VIEW, size.views, index) for index in range(TEACHERS)
    ]
    student = build_network(STUDENT, size.classes)
    variants = {"plain": plain(folder, student, size), "student": steps_alone(student, size)}
    for each in size.loads:
        variants[str(each)] = from_stores(folder, stores, each, size, stack)
    config = {
        "files": size.files, "from": FILE_SIDES, "side": student.preprocessing.size, "student": STUDENT,
        "teachers": TEACHERS, "classes": size.classes, "rows": size.rows, "batch": size.batch_size,
        "workers": WORKERS, "torch threads": torch.get_num_threads(), "device": DEVICE.type,
    }  # fmt: skip

    def rows_of(seconds: Seconds) -> list[Row]:
        rates = [size.rows / s for s in seconds["plain"]]
        rows = [
            row("from JPEG, DataLoader without teachers", rates, "rows/s", config),
            row("from JPEG, student's steps alone / DataLoader", ratios(seconds, "student", "plain"),
                "ratio", config),
        ]  # fmt: skip
        for each in size.loads:
            title = f"from JPEG, four teachers, {each} view{'s' * (each > 1)} per load / DataLoader"
            rows.append(row(title, ratios(seconds, str(each), "plain"), "ratio", config, BARS.get(each)))
        return rows

    return measure(variants, size.rounds, rows_of, patience=size.patience)


def from_stores(
    folder: Path, stores: list[Path], views: int, size: Size, stack: ExitStack
) -> Callable[[], None]:
    """Return a function that trains a student by `kd` on the rows of a round."""
    recipe = TrainRecipe.model_validate(
        {
            "student": STUDENT, "method": "kd", "stores": [str(store) for store in stores],
            "objective": resolve_objective("kd", {}, "benchmark"), "source": "folder:train",
            "evaluation": "folder:train", "root": str(folder), "view": view_recipe(VIEW),
            "views_per_load": views, "batch_size": size.batch_size, "epochs": ENDLESS,
            "optimizer": {"lr": GENTLE},
        }
    )  # fmt: skip
    setup = prepare(recipe, DEVICE)
    state, epochs = make_state(setup), itertools.count()
    sizes = setup.sizes([state.learner.network])
    renderer = stack.enter_context(
        Renderer(setup.source, setup.recipe.view, sizes, workers=WORKERS, pin=DEVICE.type == "cuda")
    )

    def one() -> None:
        chosen = list(itertools.islice(epochs, size.views // views))
        several = itertools.chain.from_iterable(map(setup.batches, chosen))
        train_epoch([state], renderer.ahead(several), setup.targets, chosen[0])

    return partial(waited, one)


def plain(folder: Path, student: Network, size: Size) -> Callable[[], None]:
    """Return a function that trains a student by labels on the rows of a round from a DataLoader."""
    pixels = student.preprocessing
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(pixels.size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),  # the other order, on tensors, is no faster
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(pixels.mean, pixels.std),
        ]
    )
    images = ImageFolder(folder / "train", transform)
    loader = DataLoader(
        images, size.batch_size, sampler=RandomSampler(images, num_samples=size.rows), num_workers=WORKERS,
        persistent_workers=True, pin_memory=DEVICE.type == "cuda",
    )  # fmt: skip
    step = labels_only(student)

    def one() -> None:
        train_on(loader, step)

    return partial(waited, one)


def steps_alone(student: Network, size: Size) -> Callable[[], None]:
    """Return a function that trains a student by labels on the rows of a round that are in memory."""
    side = student.preprocessing.size
    images = torch.randn(size.batch_size, 3, side, side)
    labels = torch.randint(size.classes, (size.batch_size,))
    step = labels_only(student)

    def one() -> None:
        train_on(itertools.repeat((images, labels), size.rows // size.batch_size), step)

    return partial(waited, one)


def train_on(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]], step: Callable[[torch.Tensor, torch.Tensor], None]
) -> None:
    """Train on batches of images and labels."""
    for images, labels in batches:
        moved = images.to(DEVICE, memory_format=torch.channels_last, non_blocking=True)
        step(moved, labels.to(DEVICE, non_blocking=True))


def labels_only(student: Network) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Return a minimal training step of a network with the student's architecture."""
    module = build_network(student.spec, student.classes).module.to(DEVICE).train()
    optimizer = torch.optim.SGD(
        module.parameters(), lr=GENTLE, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
    )

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        loss = F.cross_entropy(module(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step
