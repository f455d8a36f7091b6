"""A simulated device for stage one, its parts alone, and processes whose memory is measured.

    python benchmarks/_pipeline.py '[{"samples": 8192, "views": 1, "taps": 1}]'

Prints, for each case, the peak of anonymous memory in bytes while a store is written, above that before. Each
case runs in a process of its own, forked from one that has imported everything.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import torch
from torch import nn

from coursepack.allocator import keep_freed_memory
from coursepack.data import batches, open_source, view_recipe
from coursepack.data.drift import content_digest
from coursepack.data.store import StoreWriter
from coursepack.data.store.block import BlockFiles
from coursepack.models import Network, Preprocessing, TeacherRunner, parse_tap
from coursepack.precompute import Job, run_job
from coursepack.precompute.pipeline import block_record
from coursepack.precompute.write import Sums

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from coursepack.data import Batch

SLEEP, SHORT_SLEEP = 0.010, 0.002
"""Seconds of a forward pass, and of one where memory is measured."""
ADD = BlockFiles.add
CLASSES, BATCH, BLOCK_ROWS = 100, 256, 4096
FEATURES = 1024
"""Values of a row over all taps."""


class Device(nn.Module):
    """Network that sleeps and returns prepared logits; its taps return prepared features."""

    def __init__(self, taps: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.logits = nn.Parameter(torch.randn(BATCH, CLASSES, generator=generator) * 3)
        self.taps = nn.ModuleList(Prepared(FEATURES // taps, generator) for _ in range(taps))

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(SLEEP)
        for tap in self.taps:
            tap(images)
        return self.logits[: len(images)]


class Prepared(nn.Module):
    """Layer that returns the same rows every time."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(BATCH, width, generator=generator))

    def forward(self, images: Tensor) -> Tensor:
        return self.rows[: len(images)]


def simulated_job(store: Path, samples: int, *, views: int = 1, taps: int = 0) -> Job:
    """Return a job of the simulated device on small synthetic images."""
    source = open_source(f"fake,classes={CLASSES},samples={samples}")
    preprocessing = Preprocessing(size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    network = Network("simulated", Device(taps), preprocessing, CLASSES)
    runner = TeacherRunner(network, [parse_tap(f"taps.{index}") for index in range(taps)])
    view = view_recipe("cifar")
    return Job(store, source, view, runner, views, batch_size=BATCH, block_rows=min(BLOCK_ROWS, samples))


class Parts:
    """The parts of stage one, each by itself and on the whole source."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._size = job.runner.network.preprocessing.size
        self._rendered = [(batch, batch.pixels(self._size)) for batch in self._batches()]

    def _batches(self) -> Iterator[Batch]:
        job = self._job
        samples = np.arange(len(job.source.labels))
        return batches(job.source, job.recipe, samples, views=[0], batch_size=job.batch_size)

    def render(self) -> None:
        """Render all views."""
        for batch in self._batches():
            batch.pixels(self._size)

    def forward(self) -> None:
        """Run the teacher on rendered pixels."""
        for _, pixels in self._rendered:
            self._job.runner.run(pixels)

    def write(self) -> float:
        """Encode and write the same outputs for all batches; returns the seconds up to the commit."""
        output = self._job.runner.run(self._rendered[0][1])
        arrays = {name: value.numpy() for name, value in output.arrays().items()}
        with (
            tempfile.TemporaryDirectory() as folder,
            StoreWriter(Path(folder) / "s.zarr", self._job.plan()) as writer,
        ):
            started, first = time.perf_counter(), 0
            for block in writer.pending():
                record = block_record(self._job, block)
                record["content"] = content_digest(self._job.source, block.samples)
                files, sums = writer.write(block, record), Sums()
                for start in range(0, len(block), self._job.batch_size):
                    batch = self._rendered[(first + start) // self._job.batch_size][0]
                    files.add({name: rows[: len(batch)] for name, rows in arrays.items()})
                    sums.add(arrays["logits"][: len(batch)], batch.main_labels)
                first += len(block)
                files.finish(sums.total)
            writer.commit()
            return time.perf_counter() - started


def slow_add(self: BlockFiles, values: Mapping[str, NDArray[np.float32]]) -> None:
    """Add rows of a block after one and a half times the time of a forward pass."""
    time.sleep(1.5 * SLEEP)
    ADD(self, values)


def anonymous_bytes() -> int:
    """Return the anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@contextmanager
def peak() -> Iterator[list[int]]:
    """Yield a list whose item is the peak of anonymous memory in the context above that at its start."""
    start, found, over = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            found[0] = max(found[0], anonymous_bytes() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def measure(case: dict[str, int]) -> None:
    """Print the memory of writing one store."""
    with tempfile.TemporaryDirectory() as folder:
        job = simulated_job(Path(folder) / "s.zarr", case["samples"], views=case["views"], taps=case["taps"])
        small = simulated_job(Path(folder) / "small.zarr", BATCH, taps=case["taps"])
        run_job(small, quiet=True)
        assert (
            job.source.in_memory is not None
        )  # made before, because images in memory grow with their number
        # The writer is slower than the teacher, so that as many batches wait as may.
        with (
            mock.patch.object(sys.modules[__name__], "SLEEP", SHORT_SLEEP),
            mock.patch.object(BlockFiles, "add", slow_add),
            peak() as found,
        ):
            run_job(replace(job, block_rows=min(1024, case["samples"])), quiet=True)
    print(found[0])


def main() -> None:
    keep_freed_memory()
    for case in json.loads(sys.argv[1]):
        process = multiprocessing.get_context("fork").Process(target=measure, args=(case,))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(1)


if __name__ == "__main__":
    main()
