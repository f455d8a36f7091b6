"""Stage one compared with the teacher alone, with a slow location, with a simulated device, and its memory.

    python benchmarks/precompute.py [--json FILE] [--quick]

A throughput is that of writing a store from rendered pixels, from the first batch to the last commit, over
that of forward passes alone, which alternate with it in this process. The simulated device is a teacher that
sleeps 10 ms for a batch without holding the interpreter. Its parts (rendering all views, running the teacher
on rendered batches, encoding and writing all outputs with their records) are timed alone and together in the
pipeline, whose time is divided by the longest of the three in the same round. Memory is peak anonymous memory
(RssAnon) above that of a process that has written a small store, the median of three processes. A full run
takes about 35 minutes on two idle cores.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from _harness import PATIENCE, Threads, arguments, exact, measure, ratios, report, row
from _pipeline import SLEEP, Parts, simulated_job
from _rendered import RenderedJob, forward, rounded_and_written, written
from PIL import Image
from torch import nn

from coursepack.allocator import keep_freed_memory
from coursepack.data import Batch, open_source, view_recipe
from coursepack.models import TeacherRunner, build_network, parse_tap
from coursepack.precompute import Job, run_job
from coursepack.precompute.several import run_jobs

if TYPE_CHECKING:
    from collections.abc import Callable

    from _harness import Row, Seconds


PROCESS = Path(__file__).parent / "_pipeline.py"
CLASSES, BATCH = 100, 256
PUT_SECONDS = 0.05
LONGER = 3
"""Rows of a run with a slow location, over those of the others: the last puts have no forward pass beside."""
JPEG_SIDE, SMALL, TEACHERS = 256, "resnet8", 4
TAPS = {"resnet56": ("layer2", "layer3"), "wrn-40-2": ("layer2", "layer3")}


@dataclass(frozen=True)
class Size:
    """Sizes of the measurement."""

    rows: dict[str, int]
    """Number of images per round by network."""
    rounds: int
    simulated: tuple[int, int]
    """Samples and rounds of the simulated device."""
    files: int
    """Number of JPEG files."""
    memory: int
    """Samples of the smallest store whose memory is measured: enough that as many batches wait as may."""
    growths: int = 3
    """Number of ways in which stores grow whose memory is measured."""
    repeats: int = 5
    """Number of times that each memory is measured."""
    patience: float = PATIENCE


FULL = Size({"resnet56": 2048, "wrn-40-2": 1024}, 12, (196_608, 6), 1_024, 65_536)
QUICK = Size({"resnet56": 4}, 1, (256, 1), 4, 256, growths=1, repeats=1, patience=0)


@torch.no_grad()
def network_jobs(name: str, rows: int) -> dict[str, RenderedJob]:
    """Return jobs of a network with fresh weights by what they write."""
    source = open_source(f"fake,classes={CLASSES},samples={rows}")
    recipe = view_recipe("cifar")
    network = build_network(name, CLASSES, seed=0)
    samples = np.arange(rows)
    pixels = Batch(source, recipe, samples, np.zeros_like(samples)).pixels(network.preprocessing.size)
    for module in network.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    network.module.train()(network.preprocessing(pixels[:64]))  # statistics that keep outputs bounded
    fields = {"batch_size": BATCH, "block_rows": min(rows, 512), "pixels": pixels}
    plain = RenderedJob(Path(), source, recipe, TeacherRunner(network), 1, **fields)
    tapped = TeacherRunner(network, [parse_tap(tap) for tap in TAPS[name]])
    return {
        "float16": plain,
        "int8": replace(plain, encoding="int8"),
        "topk:10": replace(plain, encoding="topk:10"),
        "float16, two taps": replace(plain, runner=tapped),
    }


def throughput(name: str, rows: int, size: Size) -> list[Row]:
    """Measure writing over forward passes alone, by encoding and with a slow location."""
    jobs = network_jobs(name, rows)
    cases = {what: (job, 0.0, size.rounds, ">= 0.97") for what, job in jobs.items()}
    long = network_jobs(name, LONGER * rows)["float16"]
    slow = f"float16, {1000 * PUT_SECONDS:.0f} ms a put"
    cases[slow] = (long, PUT_SECONDS, size.rounds // LONGER, ">= 0.95")
    found: list[Row] = []
    for what, (job, put_seconds, rounds, bar) in cases.items():
        variants: dict[str, Callable[[], Any]] = {
            "alone": partial(forward, job),
            "written": partial(written, job, put_seconds),
        }
        if "taps" in what:
            variants["least"] = partial(rounded_and_written, job)
        config = {"rows": len(job.pixels), "classes": CLASSES, "batch": BATCH, "block rows": job.block_rows}
        config |= {"torch threads": torch.get_num_threads()}
        if "taps" in what:
            config["taps"] = TAPS[name]

        def rows_of(
            seconds: Seconds, what: str = what, bar: str = bar, config: dict[str, Any] = config
        ) -> list[Row]:
            identifier = f"{name}: {what}, speed vs forward alone"
            rows = [row(identifier, ratios(seconds, "alone", "written"), "x", config, bar)]
            if "least" in seconds:
                identifier = f"{name}: {what}, rounded and written only, speed vs forward alone"
                rows.append(row(identifier, ratios(seconds, "alone", "least"), "x", config))
            if what == next(iter(jobs)):
                speed = [config["rows"] / taken for taken in seconds["alone"]]
                rows.insert(0, row(f"{name}: forward alone", speed, "images/s", config))
            return rows

        found += measure(variants, max(1, rounds), rows_of, patience=size.patience)
    return found


def simulation(size: Size) -> list[Row]:
    """Measure the parts of stage one on the simulated device, alone and together."""
    samples, rounds = size.simulated
    found = []
    for what, taps in (("logits", 0), ("logits and four taps", 4)):
        job = simulated_job(Path(), samples, taps=taps)
        parts = Parts(job)
        variants = {
            "render": parts.render,
            "forward": parts.forward,
            "write": parts.write,
            "together": partial(written, job),
        }
        config = {
            "samples": samples,
            "batch": job.batch_size,
            "ms a batch": 1000 * SLEEP,
            "taps": taps,
            "torch threads": 1,
        }

        def rows_of(seconds: Seconds, what: str = what, config: dict[str, Any] = config) -> list[Row]:
            longest = [
                max(parts)
                for parts in zip(*(seconds[part] for part in ("render", "forward", "write")), strict=True)
            ]
            title = f"simulated device, {what}: {{}}".format
            times = [
                row(title(part), [1000 * s for s in values], "ms", config) for part, values in seconds.items()
            ]
            shares = [each / part for each, part in zip(seconds["together"], longest, strict=True)]
            return [*times, row(title("time / longest part"), shares, "ratio", config, "<= 1.1")]

        with Threads(1):  # threads that wait for the next operation would take the cores of other parts
            found += measure(variants, rounds, rows_of, patience=size.patience)
    return found


def one_pass(size: Size) -> list[Row]:
    """Measure four teachers in one pass over JPEG files, compared with four passes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pixels = np.random.default_rng(0).integers(0, 256, (2, JPEG_SIDE, JPEG_SIDE, 3), dtype=np.uint8)
        for index in range(size.files):
            path = folder / "train" / f"class{index % 2}" / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            # Sides differ, so that the images are not kept in memory.
            Image.fromarray(pixels[index % 2, : JPEG_SIDE - index % 3]).save(path, quality=90)
        source, recipe = open_source("folder", folder), view_recipe("imagenet")
        network = build_network(SMALL, 2, seed=0)
        plain = Job(Path(), source, recipe, TeacherRunner(network), views=1, batch_size=BATCH)

        def jobs(place: str) -> list[Job]:
            return [replace(plain, store=Path(place) / f"{index}.zarr") for index in range(TEACHERS)]

        def together() -> None:
            with tempfile.TemporaryDirectory() as place:
                run_jobs(jobs(place), quiet=True)

        def one_by_one() -> None:
            with tempfile.TemporaryDirectory() as place:
                for job in jobs(place):
                    run_job(job, quiet=True)

        config = {"files": size.files, "side": JPEG_SIDE, "teachers": TEACHERS, "network": SMALL}

        def rows_of(seconds: Seconds) -> list[Row]:
            values = ratios(seconds, "one pass", "four passes")
            return [row("four teachers: one pass / four passes", values, "ratio", config, "<= 0.8")]

        variants: dict[str, Callable[[], Any]] = {"one pass": together, "four passes": one_by_one}
        return measure(variants, size.rounds, rows_of, patience=size.patience)


def memory(size: Size) -> list[Row]:
    """Measure the memory of writing stores with more samples, views and arrays."""
    least = size.memory
    cases = {
        "smallest": {"samples": least, "views": 1, "taps": 1},
        "8 times the samples": {"samples": 8 * least, "views": 1, "taps": 1},
        "8 times the views": {"samples": least, "views": 8, "taps": 1},
        "8 taps of an eighth of the size": {"samples": least, "views": 1, "taps": 8},
    }
    cases = dict(islice(cases.items(), 1 + size.growths))
    command = [sys.executable, str(PROCESS), json.dumps(list(cases.values()) * size.repeats)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peaks = [int(line) / 1e6 for line in done.stdout.split()]
    found = {name: peaks[index :: len(cases)] for index, name in enumerate(cases)}
    median = statistics.median(found["smallest"])
    return [
        *(row(f"memory: {name}", values, "MB", cases[name]) for name, values in found.items()),
        *(
            exact(
                f"memory: {name} / smallest",
                statistics.median(found[name]) / median,
                "ratio",
                cases[name] | {"measurements": size.repeats},
                "<= 1.25",
            )
            for name in list(found)[1:]
        ),
    ]


def main() -> None:
    chosen = arguments("Stage one compared with the teacher alone.").parse_args()
    keep_freed_memory()
    size = QUICK if chosen.quick else FULL
    rows = [entry for name, count in size.rows.items() for entry in throughput(name, count, size)]
    rows += simulation(size)
    rows += one_pass(size)
    rows += memory(size)
    report("Stage one", rows, chosen.json)


if __name__ == "__main__":
    main()
