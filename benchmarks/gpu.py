"""Loss, encodings, rendering, student epochs and stage one on a GPU, in one command of under ten minutes.

    python benchmarks/gpu.py [--device cuda|cpu] [--json FILE] [--quick]

The rows are written after every section, so a run that is cut short keeps those it has. Figures that need
CUDA are left out on the CPU, where everything else runs; a section that fails is reported and the others are
measured. Sections that would start after `LATEST` are left out. Times of single kernels are taken between
CUDA events, those of epochs and of stage one between synchronizations. Inputs of the loss are in copies that
exceed the cache; `copy` moves as many bytes as the loss has to read and write, and is its memory floor.
"""

from __future__ import annotations

import sys
import time
import traceback
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import _gpu_loss
import _gpu_stage_one
import _gpu_train
import torch
from _gpu import Device
from _gpu_stage_one import SETTINGS, Teacher, View
from _gpu_train import Students
from _harness import STARTED, arguments, machine, report, write_rows

from coursepack.console import inform
from coursepack.device import pick_device
from coursepack.errors import CoursepackError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from _harness import Row

LATEST = 7.5 * 60.0
"""Seconds after the start from which no further section is started."""


@dataclass(frozen=True)
class Size:
    """Sizes of the measurement."""

    cells: tuple[tuple[int, int, int], ...]
    """Rows, classes and teachers of the losses."""
    encoded: tuple[int, int, int]
    """Rows, classes and teachers of the encodings."""
    views: tuple[View, ...]
    students: Students
    teachers: tuple[Teacher, ...]
    rounds: int
    """Rounds of the loss, encodings and views."""
    compiled: bool


FULL = Size(
    cells=((128, 100, 4), (1024, 1000, 1), (1024, 1000, 4), (1024, 1000, 8), (256, 21841, 2)),
    encoded=(1024, 1000, 4),
    views=(View("cifar", 32, 32, 1024, 16_384), View("imagenet", 256, 224, 256, 1024)),
    students=Students(
        ("resnet8", "resnet14", "resnet20", "resnet32"),
        8192,
        (("resnet20", 128, "float32"), ("resnet20", 1024, "float32"), ("wrn-16-2", 1024, "bfloat16")),
        7,
    ),
    teachers=(
        Teacher("resnet56", 1024, 8192, 2, 5),
        Teacher("torchvision:resnet50", 256, 512, 8, 3, compiled=True),
    ),
    rounds=25,
    compiled=True,
)
QUICK = Size(
    cells=((16, 100, 2),),
    encoded=(16, 100, 2),
    views=(View("cifar", 32, 32, 8, 16), View("imagenet", 32, 16, 8, 16)),
    students=Students(("resnet8", "resnet14"), 64, (("resnet8", 8, "float32"),), 1),
    teachers=(Teacher("resnet8", 8, 16, 2, 1),),
    rounds=1,
    compiled=False,
)


def sections(device: Device, size: Size) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """Yield the title and the function of each measurement."""
    for cell in size.cells:
        yield f"loss {cell}", partial(_gpu_loss.losses, device, cell, size.rounds, compiled=size.compiled)
    yield "encodings", partial(_gpu_loss.encodings, device, size.encoded, size.rounds)
    for view in size.views:
        yield f"view {view.recipe}", partial(_gpu_stage_one.rendering, device, view, size.rounds)
    yield "students", partial(_gpu_train.epochs, device, size.students)
    for teacher in size.teachers:
        for setting in SETTINGS:
            title = f"stage one, {teacher.network}, {setting}"
            yield title, partial(_gpu_stage_one.throughput, device, teacher, setting)


def main() -> None:
    parser = arguments("The loss, training and stage one on a GPU.")
    parser.add_argument("--device", default="auto", help="cuda, cpu, or auto (the default)")
    chosen = parser.parse_args()
    try:
        device = Device(pick_device(chosen.device))
    except CoursepackError as error:
        sys.exit(str(error))
    if not device.is_cuda and not chosen.quick:
        inform("warning: on the CPU the full size takes long; --quick is tiny")
    rows: list[Row] = []
    failed = []
    where = machine() | {"device": torch.cuda.get_device_name(device.device) if device.is_cuda else "cpu"}
    for title, measured in sections(device, QUICK if chosen.quick else FULL):
        started = time.monotonic()
        if started - STARTED > LATEST:
            device.leave_out(title, f"{LATEST:.0f} s have passed")
            continue
        try:
            rows += measured()
        except Exception:  # a figure that a device cannot give must not cost the others
            traceback.print_exc()
            failed.append(title)
        else:
            inform(f"{title}: {time.monotonic() - started:.0f} s")
        if chosen.json is not None:
            write_rows(chosen.json, where | {"left out": device.missing, "failed": failed}, rows)
    report(f"On {where['device']}", rows, None)
    for title in failed:
        inform(f"failed: {title}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
