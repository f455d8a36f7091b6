"""Speed of drawing, rendering and loading views; what several views of an image do for students.

    python benchmarks/views.py [--section rendering|students|training] [--json FILE] [--quick]

Section `rendering`, the default, measures the speed of drawing and rendering views and of loading image
files, compared with torchvision's transforms v2. Threads are those of torch and, for resampling, Python
threads that run a compiled kernel without the GIL. Everything runs on the CPU.

Section `students` measures accuracies on the digits by number of cached views and by views per load (see
`_views_students`), and section `training` the seconds of training from JPEG files with several views per
load (see `_views_training`).
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import _views_students
import _views_training
import numpy as np
import torch
from _harness import PATIENCE, Threads, arguments, measure, ratios, report, row
from _photographs import FILE_SIDES, photograph, write_photographs
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from coursepack.data import batches, open_source, view_recipe
from coursepack.data.batches import Batch
from coursepack.data.loading import Renderer
from coursepack.data.randomness import random_words
from coursepack.data.sources import InMemory
from coursepack.data.views import GRID, ViewParams, draw, render
from coursepack.models.preprocessing import Preprocessing

if TYPE_CHECKING:
    from collections.abc import Callable

    from _harness import Row, Seconds

BATCH = 256
MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
SIDE = 224


def words(rounds: int, patience: float) -> list[Row]:
    """Measure the drawing of eight random words for each of 256 samples."""
    samples, generator = np.arange(BATCH), torch.Generator()

    def ours() -> None:
        for _ in range(100):
            random_words(0, samples, 3, 16, 2)

    def theirs() -> None:
        for sample in samples.tolist():
            generator.manual_seed(sample)
            torch.rand(8, generator=generator)

    config = {"samples": BATCH, "values": 8}

    def rows_of(seconds: Seconds) -> list[Row]:
        shares = [ratio / 100 for ratio in ratios(seconds, "ours", "theirs")]
        return [
            row("draw 8 values for 256 samples", [value * 1e4 for value in seconds["ours"]], "us", config),
            row("draw / torch.Generator per sample", shares, "ratio", config, "<= 0.01"),
        ]

    return measure({"ours": ours, "theirs": theirs}, rounds, rows_of, patience=patience)


def small(rounds: int, patience: float) -> list[Row]:
    """Measure pad-crop, flip and normalization of 256 images of 32x32, with new parameters each time."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4096, 32, 32, 3), dtype=np.uint8)
    source = InMemory("made:up", images, np.zeros(len(images), np.int64), ("one",))
    recipe, preprocessing = view_recipe("cifar"), Preprocessing(size=32, mean=MEAN, std=STD)
    tensors = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    transform = v2.Compose(
        [
            v2.RandomCrop(32, padding=4),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    levels = preprocessing.levels(3)
    assert levels is not None
    view = 0

    def ours() -> torch.Tensor:
        nonlocal view
        view += 1
        batch = Batch(source, recipe, rng.integers(0, 4096, BATCH), np.full(BATCH, view))
        return batch.normalized(32, *levels)

    def each() -> torch.Tensor:
        return torch.stack([transform(tensors[k]) for k in rng.integers(0, 4096, BATCH)])

    def shared() -> torch.Tensor:
        return transform(tensors[torch.from_numpy(rng.integers(0, 4096, BATCH))])

    config = {"samples": BATCH, "side": 32, "threads": 1}
    name = "32x32 pad-crop, flip, normalize"

    def rows_of(seconds: Seconds) -> list[Row]:
        single, batched = ratios(seconds, "ours", "each"), ratios(seconds, "ours", "shared")
        return [
            row(name, [value * 1e6 for value in seconds["ours"]], "us", config),
            row(f"{name} / v2 per sample", single, "ratio", config, "<= 0.06"),
            row(f"{name} / v2 batched, one draw for all", batched, "ratio", config, "<= 0.85"),
        ]

    variants = {"ours": ours, "each": each, "shared": shared}
    return measure(variants, rounds, rows_of, patience=patience)


def large(rounds: int, patience: float, count: int, threads: int, bar: str) -> list[Row]:
    """Measure identical random crops of photographs, resized to 224."""
    rng = np.random.default_rng(1)
    images = [photograph(rng) for _ in range(count)]
    planes = [torch.from_numpy(image).permute(2, 0, 1).contiguous() for image in images]
    strided = [torch.from_numpy(image).permute(2, 0, 1) for image in images]
    source = Listed(images)
    recipe, samples = view_recipe("imagenet"), np.arange(count)
    params = draw(recipe, source, samples, 0)  # type: ignore[arg-type]  # Listed has what rendering needs
    crops = pixel_boxes(params, source.sizes(samples))
    flips = np.zeros(count, bool) if params.flips is None else params.flips > 0

    def ours() -> None:
        render(recipe, source, samples, params, SIDE, threads=threads)  # type: ignore[arg-type]  # Listed has what rendering needs

    def theirs(tensors: list[torch.Tensor]) -> None:
        for tensor, crop, flip in zip(tensors, crops, flips, strict=True):
            pixels = F.resized_crop(tensor, *crop, [SIDE, SIDE], antialias=True)
            if flip:
                F.horizontal_flip(pixels)

    variants: dict[str, Callable[[], Any]] = {
        "ours": ours,
        "planes": lambda: theirs(planes),
        "as decoded": lambda: theirs(strided),
    }
    config = {"images": count, "side": SIDE, "from": FILE_SIDES, "threads": threads}
    name = f"224 resized crop, {threads} thread{'s' if threads > 1 else ''}"

    def rows_of(seconds: Seconds) -> list[Row]:
        planes, decoded = ratios(seconds, "ours", "planes"), ratios(seconds, "ours", "as decoded")
        return [
            row(name, [value / count * 1e6 for value in seconds["ours"]], "us per image", config),
            row(f"{name} / v2", planes, "ratio", config, bar),
            row(f"{name} / v2, channels last as Pillow gives", decoded, "ratio", config),
        ]

    with Threads(threads):
        return measure(variants, rounds, rows_of, patience=patience)


def files(rounds: int, patience: float, count: int, workers: int) -> list[Row]:
    """Measure the images per second from a tree of JPEG files to normalized tensors."""
    rng = np.random.default_rng(2)
    with tempfile.TemporaryDirectory() as name:
        write_photographs(Path(name), count, 4, rng)
        with mock.patch.dict(os.environ, {"COURSEPACK_CACHE": str(Path(name) / "cache")}):
            source, recipe = open_source("folder:train", Path(name)), view_recipe("imagenet")
        preprocessing = Preprocessing(size=SIDE, mean=MEAN, std=STD)
        transform = v2.Compose(
            [
                v2.PILToTensor(),
                v2.RandomResizedCrop(SIDE, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )
        plain = torch.utils.data.DataLoader(
            ImageFolder(Path(name) / "train", transform),
            batch_size=64,
            shuffle=True,
            num_workers=workers,
            persistent_workers=True,
        )
        epoch = 0

        def ours(renderer: Renderer, views: int) -> None:
            nonlocal epoch
            order = rng.permutation(count)
            chosen = range(epoch, epoch + views)
            epoch += views
            several = batches(source, recipe, order, views=chosen, batch_size=64)
            for batch in renderer.ahead(several):
                preprocessing(batch.pixels(SIDE))

        def theirs() -> None:
            for _ in plain:
                pass

        config = {"files": count, "side": SIDE, "from": FILE_SIDES, "workers": workers, "batch": 64}

        def rows_of(seconds: Seconds) -> list[Row]:
            rows = [row("JPEG, DataLoader", [count / s for s in seconds["plain"]], "images/s", config)]
            for views in (1, 2, 4):
                rates = [views * ratio for ratio in ratios(seconds, "plain", f"{views} a load")]
                bar = ">= 1.0" if views == 1 else None
                rows.append(row(f"JPEG, {views} views a load / DataLoader", rates, "ratio", config, bar))
            return rows

        with Renderer(source, recipe, [SIDE], workers=workers) as renderer:
            variants: dict[str, Callable[[], Any]] = {
                f"{views} a load": lambda views=views: ours(renderer, views) for views in (1, 2, 4)
            }
            return measure({"plain": theirs, **variants}, rounds, rows_of, patience=patience)


class Listed:
    """Source of images of any size in memory, with the interface of decoded files."""

    in_memory = None
    channels = 3

    def __init__(self, images: list[np.ndarray]) -> None:
        self.labels = np.zeros(len(images), np.int64)
        self._images = images

    def sizes(self, samples: np.ndarray) -> np.ndarray:
        """Return height and width of each image."""
        return np.array([self._images[k].shape[:2] for k in samples], dtype=np.int32)

    def pixels(self, samples: np.ndarray) -> list[np.ndarray]:
        """Return the images."""
        return [self._images[k] for k in samples]


def pixel_boxes(params: ViewParams, sizes: np.ndarray) -> list[list[int]]:
    """Return drawn boxes in whole pixels: top, left, height, width."""
    starts = np.rint(params.boxes[:, :2] * sizes / GRID).astype(int)
    stops = np.rint((params.boxes[:, :2] + params.boxes[:, 2:]) * sizes / GRID).astype(int)
    return np.concatenate([starts, stops - starts], axis=1).tolist()


def rendering(*, quick: bool) -> list[Row]:
    """Measure the speed of drawing, rendering and loading."""
    rounds, patience, count = (2, 0.0, 4) if quick else (15, PATIENCE, 64)
    with Threads(1):
        rows = words(rounds, patience) + small(rounds, patience)
        rows += large(rounds, patience, count, 1, "<= 1.1") + large(rounds, patience, count, 2, "<= 0.8")
    return rows + files(min(7, rounds), patience, 16 if quick else 512, workers=2)


def students(*, quick: bool) -> list[Row]:
    """Measure the accuracy of students by number of views, and by views per load."""
    size = _views_students.QUICK if quick else _views_students.FULL
    with tempfile.TemporaryDirectory() as folder:
        return _views_students.students(Path(folder), size, quick=quick)


def training(*, quick: bool) -> list[Row]:
    """Measure the seconds of training from JPEG files by views per load."""
    size = _views_training.QUICK if quick else _views_training.FULL
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        return _views_training.training(Path(folder), size, stack)


SECTIONS = {"rendering": rendering, "students": students, "training": training}


def main() -> None:
    parser = arguments("Speed of views, and what several views of an image do for students.")
    parser.add_argument("--section", choices=SECTIONS, default="rendering", help="what to measure")
    chosen = parser.parse_args()
    report(f"views, {chosen.section}", SECTIONS[chosen.section](quick=chosen.quick), chosen.json)


if __name__ == "__main__":
    main()
