"""Jobs of stage one: one teacher run over one source, as `precompute run` does."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

from coursepack.data.encodings import FOR_FEATURES, FOR_LOGITS, parse_encoding, smaller_encoding
from coursepack.data.loading import Renderer
from coursepack.data.sources import FirstSamples
from coursepack.data.store import StorePlan, StoreWriter
from coursepack.data.store.manifest import LOGITS
from coursepack.data.store.owners import Part
from coursepack.data.views import view_fingerprint
from coursepack.errors import RecipeError
from coursepack.models.build import weights_fingerprint
from coursepack.precompute.accuracy import AccuracyGuard
from coursepack.precompute.executors import LocalExecutor
from coursepack.precompute.numerics import NumericsGuard, environment_of
from coursepack.precompute.ranks import progress_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from coursepack.data.sources import Source
    from coursepack.data.store import Block, Manifest
    from coursepack.data.views import ViewRecipe
    from coursepack.models import TeacherRunner
    from coursepack.precompute.executors.base import Executor
    from coursepack.precompute.spec import PrecomputeSpec


@dataclass(frozen=True)
class Job:
    """Description of one run of a teacher over a source, and of the store to write."""

    store: str | Path
    """Folder or address of the store."""
    source: Source
    recipe: ViewRecipe
    runner: TeacherRunner
    views: int
    """Number of views per sample, V."""
    encoding: str = "float16"
    """Encoding of logits: `float32`, `float16`, `bfloat16`, `int8`, `int4`, `topk:K`, `topk16:K`."""
    feature_encoding: str = "float16"
    """Encoding of tapped features: `float32`, `float16`, `bfloat16`, `int8`, `bits`."""
    batch_size: int = 256
    """Images per forward pass. Batches are counted from the start of each block."""
    block_rows: int | None = None
    """Rows per block. Defaults to a number chosen by the width of the rows."""
    part: Part = field(default_factory=Part)
    """Share of the blocks that this process computes. Defaults to all blocks."""
    views_per_load: int = 1
    """Number of views rendered each time an image is decoded. Does not change the stored bytes."""
    workers: int | None = None
    """Number of processes that decode and render. Defaults to one per core for image files and to none for
    images in memory."""
    root: Path | None = None
    """Folder of the source's files, if it has any. Recorded in the store."""
    single_writer: bool = False
    """True if no other process writes to the store; required where a bucket ignores conditions."""
    spec: PrecomputeSpec | None = None
    """Values that the job was created from, for executors that recreate it in other processes."""

    def renderer(self) -> Renderer:
        """Return a renderer of the views at the teacher's input size."""
        size = self.runner.network.preprocessing.size
        return Renderer(self.source, self.recipe, [size], workers=self.workers, inline=True)

    def plan(self) -> StorePlan:
        """Return the plan of the store: its identity, arrays, tables and labels.

        Raises:
            UnknownName: an encoding does not exist.
            RecipeError: a number is out of range.
        """
        for name in ("views", "batch_size", "views_per_load"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} is {getattr(self, name)}, expected at least 1")
        network = self.runner.network
        features = parse_encoding(self.feature_encoding, FOR_FEATURES)
        shapes = self.runner.row_shapes(self.source.channels)
        logits = smaller_encoding(parse_encoding(self.encoding, FOR_LOGITS), shapes[LOGITS])
        return StorePlan(
            identity={
                "teacher": {
                    "network": network.spec,
                    "weights": weights_fingerprint(network.module),
                    "preprocessing": network.preprocessing.model_dump(mode="json"),
                    "columns": self.runner.columns,
                    **({} if network.settings is None else {"settings": network.settings}),
                },
                "view": {
                    "recipe": self.recipe.model_dump(mode="json"),
                    "fingerprint": view_fingerprint(self.recipe, self.source),
                },
                "source": {"name": self.source.name, "fingerprint": self.source.fingerprint},
                "precision": self.runner.precision,
            },
            origin={
                "weights_file": network.weights_file,
                "root": None if self.root is None else str(self.root.expanduser().absolute()),
                "library": network.library,
            },
            labels=self.source.labels,
            class_names=self.source.class_names,
            views=self.views,
            arrays={
                LOGITS: (logits, shapes[LOGITS]),
                **{
                    f"features/{tap.name}": (
                        parse_encoding("bits") if tap.reduction == "sign" else features,
                        shapes[f"features/{tap.name}"],
                    )
                    for tap in self.runner.taps
                },
            },
            static={name: value.numpy() for name, value in self.runner.static().items()},
            block_rows=self.block_rows,
        )

    def environment(self) -> dict[str, Any]:
        """Return versions, device and settings, which every block records outside the store's identity."""
        return self._environment

    @cached_property
    def _environment(self) -> dict[str, Any]:
        return environment_of(self.runner, self.batch_size)


def run_job(
    job: Job,
    *,
    block_order: Iterator[int] | None = None,
    quiet: bool = False,
    same_numerics: bool = False,
    executor: Executor | None = None,
    all_ranks: bool = False,
) -> Manifest:
    """Write the missing blocks of a part of the store, and commit every view that is complete.

    Args:
        job: job to run.
        block_order: block numbers `view * blocks + block` in the order of computation. Defaults to an order
            that keeps `job.views_per_load` views of the same samples together.
        quiet: show no progress.
        same_numerics: raise an error, instead of a warning, if the store has rows with other numerics.
        executor: executor that computes the blocks. Defaults to `LocalExecutor`.
        all_ranks: show the progress of all parts, and wait at the end for the others that are being written.

    Returns:
        The manifest at the end of the run.

    Raises:
        StoreMismatch: the store was written by another recipe, or `same_numerics` is set and it has rows with
            other numerics. The store is unchanged.
        WorkerLost, WorkerMismatch: the executor's workers cannot be used. Finished blocks are kept.
        StoreBusy: another process is writing this part.
        NonFiniteOutput, EncodingRange: the teacher's outputs cannot be stored. Finished blocks are kept.
    """
    executor = executor or LocalExecutor()
    with executor.started(job) as environment:
        guard = NumericsGuard(job.store, environment, same_numerics)
        return _run_job(job, executor, guard, block_order, quiet=quiet, all_ranks=all_ranks)


def _run_job(
    job: Job,
    executor: Executor,
    guard: NumericsGuard,
    block_order: Iterator[int] | None,
    *,
    quiet: bool,
    all_ranks: bool,
) -> Manifest:
    writer = StoreWriter(job.store, job.plan(), job.part, single_writer=job.single_writer)
    seen = guard.check(writer.planned())
    accuracy = AccuracyGuard(job, quiet=quiet)
    with writer:
        writer.commit()
        with progress_of([writer], quiet=quiet, all_ranks=all_ranks) as meter:
            groups = _groups(writer, block_order, job.views_per_load)
            with closing(executor.run(job, writer, groups, meter)) as finished:
                for blocks in finished:
                    if any(writer.is_complete(block.view) for block in blocks):
                        writer.commit()
                        accuracy.check(writer.manifest)
        writer.commit()
        accuracy.check(writer.manifest)
        # Other processes may have written blocks in the meantime.
        guard.check(writer.manifest, seen=seen)
        return writer.manifest


def _groups(writer: StoreWriter, order: Iterator[int] | None, together: int) -> Iterator[list[Block]]:
    """Yield pending blocks in groups of the same samples under at most `together` views."""
    numbers = _block_order(writer, together) if order is None else order
    for _, group in groupby(writer.pending(numbers), key=lambda block: block.index):
        while blocks := list(islice(group, together)):
            yield blocks


def _block_order(writer: StoreWriter, together: int) -> Iterator[int]:
    """Yield the numbers of all blocks that may be pending, `together` views of the same samples in a row."""
    views = writer.open_views()
    for first in range(0, len(views), together):
        for index in range(writer.blocks):
            yield from (view * writer.blocks + index for view in views[first : first + together])


def with_limit(job: Job, store: str | Path, limit: int) -> Job:
    """Return a copy of a job for one view of the first `limit` samples and another store, for trials."""
    return replace(
        job, store=store, source=FirstSamples(job.source, limit), views=1, part=Part(), block_rows=None
    )
