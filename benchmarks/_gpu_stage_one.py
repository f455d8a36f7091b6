"""Stage one on a device: forward passes alone, the pipeline that writes a store, and rendering there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from _harness import ratios, row
from _rendered import RenderedJob, written
from torch import nn

from coursepack.data import Batch, view_recipe
from coursepack.data.loading import device_images
from coursepack.data.sources import InMemory
from coursepack.distill.training.learner import network_input
from coursepack.models import Preprocessing, TeacherRunner, build_network
from coursepack.models.precision import has_precision
from coursepack.precompute import Job, pipeline

if TYPE_CHECKING:
    from collections.abc import Callable

    from _gpu import Device
    from _harness import Row

    from coursepack.models import Network

CLASSES = 100


@dataclass(frozen=True)
class Teacher:
    """Teacher whose forward passes are measured."""

    network: str
    batch: int
    samples: int
    views: int
    rounds: int
    compiled: bool = False
    """Measure it under `torch.compile` too, which takes about a minute."""


@dataclass(frozen=True)
class Setting:
    """Way to run a teacher."""

    precision: str
    channels_last: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        parts = [self.precision, "channels last" * self.channels_last, "compiled" * self.compiled]
        return ", ".join(part for part in parts if part)


SETTINGS = (
    Setting("float32"),
    Setting("float32", channels_last=True),
    Setting("tf32"),
    Setting("tf32", channels_last=True),
    Setting("float16"),
    Setting("float16", channels_last=True),
    Setting("bfloat16", channels_last=True),
    Setting("float16", channels_last=True, compiled=True),
)
RENDERED = Setting("float16", channels_last=True)
"""Setting that is measured with rendering too."""


def random_source(samples: int, size: int) -> InMemory:
    """Return a source of random images in memory."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (samples, size, size, 3), dtype=np.uint8)
    labels = np.arange(samples, dtype=np.int64) % CLASSES
    return InMemory("random:train", images, labels, tuple(map(str, range(CLASSES))))


@torch.no_grad()
def fresh_network(name: str, pixels: torch.Tensor) -> Network:
    """Return an untrained network with running statistics of images, which keep outputs bounded."""
    network = build_network(name, CLASSES, seed=0)
    for module in network.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    network.module.train()(network.preprocessing(pixels))
    return network


def throughput(device: Device, teacher: Teacher, setting: Setting) -> list[Row]:
    """Measure writing a store over forward passes alone, in one precision and memory format.

    Forward passes alone have their pixels on the device. The pipeline starts from rendered pixels on the
    host; with float16 it is also measured with rendering. What is done once per store, the comparison of a
    reduced precision with float32, is left out.
    """
    name = f"stage one, {teacher.network}, {setting}"
    if (reason := _missing(setting, teacher, device.device)) is not None:
        device.leave_out(name, reason)
        return []
    size = build_network(teacher.network, CLASSES, seed=0).preprocessing.size
    source, recipe = random_source(teacher.samples, size), view_recipe("cifar")
    pixels = torch.from_numpy(source.images)
    runner = TeacherRunner(
        fresh_network(teacher.network, pixels[:32]), (), device.device, precision=setting.precision,
        channels_last=setting.channels_last, compiled=setting.compiled,
    )  # fmt: skip
    fields: dict[str, Any] = {"batch_size": teacher.batch, "block_rows": teacher.samples}
    rendered = RenderedJob(Path(), source, recipe, runner, teacher.views, pixels=pixels, **fields)
    resident = pixels.to(device.device)
    variants: dict[str, Callable[[], float]] = {
        "forward": device.waited(partial(_forward, runner, resident, teacher)),
        "pipeline": partial(written, rendered),
    }
    if setting == RENDERED:
        job = Job(Path(), source, recipe, runner, teacher.views, **fields)
        variants["pipeline with rendering"] = partial(written, job)
    with mock.patch.object(pipeline, "precision_error", return_value=None):
        seconds = device.alternate(variants, teacher.rounds)
    rows = teacher.samples * teacher.views
    config = {"rows": rows, "batch": teacher.batch, "side": size, "classes": CLASSES}
    found = [
        row(f"{name}: {what}", [rows / s for s in taken], "images/s", config)
        for what, taken in seconds.items()
    ]
    return found + [
        row(f"{name}: {what}, speed vs forward", ratios(seconds, "forward", what), "x", config)
        for what in list(variants)[1:]
    ]


def _missing(setting: Setting, teacher: Teacher, device: torch.device) -> str | None:
    """Return why a setting is not measured, or None if it is."""
    if not has_precision(setting.precision, device):
        return f"the device does not have {setting.precision}"
    if setting.compiled and not teacher.compiled:
        return "compilation takes a minute: measured for another network, and not with --quick"
    if setting.compiled and device.type == "cpu":
        return "needs a C++ compiler on the CPU, and takes minutes there"
    return None


def _forward(runner: TeacherRunner, pixels: torch.Tensor, teacher: Teacher) -> None:
    for _ in range(teacher.views):
        for start in range(0, teacher.samples, teacher.batch):
            runner.run(pixels[start : start + teacher.batch])


@dataclass(frozen=True)
class View:
    """View recipe whose rendering is measured."""

    recipe: str
    origin: int
    """Side of the source's images in pixels."""
    side: int
    """Side of the rendered views in pixels."""
    batch: int
    samples: int


def rendering(device: Device, view: View, rounds: int) -> list[Row]:
    """Measure drawing, rendering and normalizing a batch, on the device and on the CPU with a copy."""
    source, recipe = random_source(view.samples, view.origin), view_recipe(view.recipe)
    images = device_images(source, recipe, device.device)
    images = torch.from_numpy(source.images) if images is None else images
    preprocessing = Preprocessing(size=view.side, mean=(0.5,) * 3, std=(0.25,) * 3)
    samples = np.random.default_rng(0).integers(0, view.samples, view.batch)

    def network_images(images: torch.Tensor | None) -> torch.Tensor:
        batch = Batch(source, recipe, samples, np.zeros_like(samples), device.device, images)
        return network_input(batch, preprocessing)

    pixels = Batch(source, recipe, samples, np.zeros_like(samples), device.device, images).pixels(view.side)
    normalized = preprocessing(pixels)
    target = torch.empty_like(normalized)
    variants = {
        "on the device": device.waited(partial(network_images, images)),
        "on the CPU": device.waited(partial(network_images, None)),
        "normalizing": device.timed(partial(preprocessing, pixels)),
        "copy of as many floats": device.timed(partial(target.copy_, normalized)),
    }
    seconds = device.alternate(variants, rounds)
    name = f"view {view.recipe} {view.origin} to {view.side}"
    config = {"batch": view.batch, "channels": 3}
    found = [
        row(f"{name}, {what}", [1e3 * s for s in taken], "ms", config) for what, taken in seconds.items()
    ]
    pairs = (("on the device", "on the CPU"), ("normalizing", "copy of as many floats"))
    return found + [
        row(f"{name}, {over} / {under}", ratios(seconds, over, under), "ratio", config)
        for over, under in pairs
    ]
