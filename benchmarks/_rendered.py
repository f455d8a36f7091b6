"""Stage one from pixels that are rendered already, timed from the first batch to the last commit."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from coursepack.data.loading import Renderer
from coursepack.data.store.locations.local import LocalLocation
from coursepack.kernels.cpu.threads import use_threads
from coursepack.precompute import Job, run_job
from coursepack.precompute.executors import LocalExecutor

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

    from torch import Tensor

    from coursepack.console import Meter
    from coursepack.data import Batch
    from coursepack.data.store import Block, StoreWriter


class Rendered(Renderer):
    """Renderer whose pixels exist already."""

    def __init__(self, job: Job, pixels: Tensor) -> None:
        size = job.runner.network.preprocessing.size
        super().__init__(job.source, job.recipe, [size], workers=0, background=True)
        self._pixels = pixels

    def ahead(self, batches: Iterable[Batch]) -> Generator[Batch]:
        """Yield the batches with their rows of the pixels."""
        for batch in batches:
            batch.rendered[self.sizes[0]] = self._pixels[torch.from_numpy(batch.samples)]
            yield batch


@dataclass(frozen=True)
class RenderedJob(Job):
    """Job of one view whose pixels exist already."""

    pixels: Tensor = field(default_factory=partial(torch.empty, 0))

    def renderer(self) -> Renderer:
        return Rendered(self, self.pixels)


class Timed(LocalExecutor):
    """Executor that records when it is started."""

    began = 0.0

    def run(
        self, job: Job, writer: StoreWriter, groups: Iterator[list[Block]], meter: Meter | None
    ) -> Generator[list[Block]]:
        self.began = time.perf_counter()
        yield from super().run(job, writer, groups, meter)


def written(job: Job, put_seconds: float = 0.0) -> float:
    """Write a store and return the seconds from the first batch to the last commit."""
    put = LocalLocation.put

    def slow(self: LocalLocation, key: str, *pieces: Any) -> None:
        time.sleep(put_seconds)
        put(self, key, *pieces)

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        executor = Timed()
        if put_seconds:
            stack.enter_context(mock.patch.object(LocalLocation, "put", slow))
        run_job(replace(job, store=folder / "s.zarr"), quiet=True, executor=executor)
        return time.perf_counter() - executor.began


def forward(job: RenderedJob) -> None:
    """Run the forward passes alone."""
    for pixels in job.pixels.split(job.batch_size):
        job.runner.run(pixels)


def rounded_and_written(job: RenderedJob) -> None:
    """Run forward passes while a thread rounds their outputs to float16 and writes them, and nothing else."""
    outputs: SimpleQueue[dict[str, Tensor] | None] = SimpleQueue()

    def write(path: Path) -> None:
        use_threads(1)
        with path.open("wb") as file:
            while (arrays := outputs.get()) is not None:
                for value in arrays.values():
                    value.half().numpy().tofile(file)
            os.fsync(file.fileno())

    with tempfile.TemporaryDirectory() as folder:
        thread = threading.Thread(target=write, args=(Path(folder) / "rows",))
        thread.start()
        for pixels in job.pixels.split(job.batch_size):
            outputs.put(job.runner.run(pixels).arrays())
        outputs.put(None)
        thread.join()
