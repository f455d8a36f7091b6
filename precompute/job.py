"""One teacher over one source: the work behind `precompute run`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

import torch

from coursepack.console import progress
from coursepack.data import batches
from coursepack.data.drift import content_digest, probe_digests, probe_samples
from coursepack.data.encodings import FOR_FEATURES, FOR_LOGITS, parse_encoding, smaller_encoding
from coursepack.data.loading import Renderer
from coursepack.data.sources import FirstSamples
from coursepack.data.store import StorePlan, StoreWriter
from coursepack.data.store.manifest import LOGITS
from coursepack.data.store.owners import Part
from coursepack.data.views import draw, view_fingerprint
from coursepack.errors import RecipeError
from coursepack.kernels import teacher_stats
from coursepack.models.build import weights_fingerprint
from coursepack.models.teacher import check_finite
from coursepack.precompute.numerics import NumericsGuard, environment_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from torch import Tensor

    from coursepack.console import Meter
    from coursepack.data import Batch
    from coursepack.data.sources import Source
    from coursepack.data.store import Block, Manifest
    from coursepack.data.store.block import BlockFiles
    from coursepack.data.views import ViewRecipe
    from coursepack.models import TeacherRunner


@dataclass(frozen=True)
class Job:
    """What to run, and where to write it."""

    store: Path
    source: Source
    recipe: ViewRecipe
    runner: TeacherRunner
    views: int
    """Views of every sample, V."""
    encoding: str = "float16"
    """Of logits: `float32`, `float16`, `bfloat16`, `int8`, `topk:K`."""
    feature_encoding: str = "float16"
    """Of tapped features: `float32`, `float16`, `bfloat16`, `int8`, `bits`."""
    batch_size: int = 256
    """Images per forward pass. Batches are laid out from each block's start."""
    block_rows: int | None = None
    """Rows of a block; None leaves it to the width of the rows."""
    part: Part = field(default_factory=Part)
    """Which of the blocks this process does."""
    views_per_load: int = 1
    """Views of a sample that are rendered from one decoding of its image. Changes no byte."""
    workers: int | None = None
    """Processes that decode and render; None means one per core for image files, none for images in
    memory."""
    root: Path | None = None
    """Folder of the source's files, if it has any, for the store to remember."""

    def renderer(self) -> Renderer:
        """What renders the views at the size that the teacher reads."""
        size = self.runner.network.preprocessing.size
        pin = self.runner.device.type == "cuda"
        return Renderer(self.source, self.recipe, [size], workers=self.workers, pin=pin)

    def plan(self) -> StorePlan:
        """What the store is to hold.

        Raises:
            UnknownName: no such encoding.
            RecipeError: a number out of range.
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
                },
                "view": {
                    "recipe": self.recipe.model_dump(mode="json"),
                    "fingerprint": view_fingerprint(self.recipe, self.source),
                },
                "source": {"name": self.source.name, "fingerprint": self.source.fingerprint},
                "precision": "float32",
            },
            origin={
                "weights_file": network.weights_file,
                "root": None if self.root is None else str(self.root.expanduser().absolute()),
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
        """Versions, device and settings, recorded for every block and no part of the store's identity."""
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
) -> Manifest:
    """Write whatever of the store's part is not there yet, and commit every view that is complete.

    Args:
        job: what to run.
        block_order: numbers `view * blocks + block` in the order to do them; by default ascending.
        quiet: show no progress.
        same_numerics: refuse a store with rows of another kind of machine or batch size, instead of warning.

    Returns:
        The manifest as it is when this process is done.

    Raises:
        StoreMismatch: the store was written by another recipe, or under other numerics where these are to be
            the same; nothing is changed.
        StoreBusy: a live process writes this part.
        NonFiniteOutput, EncodingRange: the teacher's answer cannot be stored; done blocks stay done.
    """
    writer = StoreWriter(job.store, job.plan(), job.part)
    guard = NumericsGuard(job.store, job.environment(), same_numerics)
    seen = guard.check(writer.planned())
    with writer, job.renderer() as renderer:
        writer.commit()
        title = f"precompute {job.store.name}"
        shown = progress(title, writer.owned_rows(), "images", done=writer.done_rows())
        with nullcontext() if quiet else shown as meter:
            order = block_order or _block_order(writer, job.views_per_load)
            for _, group in groupby(writer.pending(order), key=lambda block: block.index):
                while blocks := list(islice(group, job.views_per_load)):
                    for files, sums in write_blocks(job, writer, renderer, blocks, meter):
                        files.finish(sums)
                    if any(writer.is_complete(block.view) for block in blocks):
                        writer.commit()
        writer.commit()
        # Other processes may have written since.
        guard.check(writer.manifest, seen=seen)
        return writer.manifest


def write_blocks(
    job: Job,
    writer: StoreWriter,
    renderer: Renderer,
    blocks: Sequence[Block],
    meter: Meter | None = None,
    sound: Mapping[str, tuple[int, int]] | None = None,
) -> list[tuple[BlockFiles, dict[str, float]]]:
    """Run the teacher over the same samples under one view or several, each image decoded once.

    The teacher's batches are those of each block alone, so that its answers are the same bits.

    Returns:
        For each block its files, not finished yet, and sums over its rows.
    """
    files = [writer.write(block, _record(job, block), sound) for block in blocks]
    sums = [_Sums() for _ in blocks]
    for place, batch, arrays in _answers(job, renderer, blocks):
        files[place].add(arrays)
        sums[place].add(arrays[LOGITS], batch.main_labels)
        if meter is not None:
            meter.advance(len(batch), f"view {blocks[place].view + 1} of {writer.manifest.views}")
    return [(file, sum_.total) for file, sum_ in zip(files, sums, strict=True)]


def _block_order(writer: StoreWriter, together: int) -> Iterator[int]:
    """Numbers of all blocks, so that those of the same samples under a few views follow each other."""
    views, blocks = writer.manifest.views, writer.blocks
    for first in range(0, views, together):
        for index in range(blocks):
            yield from (view * blocks + index for view in range(first, min(first + together, views)))


def _record(job: Job, block: Block) -> dict[str, Any]:
    """What a block's done-object says of its views: what drift and damage of the source are told by."""
    params = draw(job.recipe, job.source, block.samples, block.view)
    probed = probe_samples(len(job.source.labels), block.view)
    probed = probed[(probed >= block.start) & (probed < block.stop)]
    size = job.runner.network.preprocessing.size
    record = {
        "draws": params.digest(),
        "probes": probe_digests(job.recipe, job.source, probed, params[probed - block.start], size),
        "environment": job.environment(),
    }
    if block.view == 0:
        record["content"] = content_digest(job.source, block.samples)
    return record


def with_limit(job: Job, store: Path, limit: int) -> Job:
    """The same job on one view of the first `limit` samples, into another store: to try it out."""
    return replace(
        job, store=store, source=FirstSamples(job.source, limit), views=1, part=Part(), block_rows=None
    )


def _answers(
    job: Job, renderer: Renderer, blocks: Sequence[Block]
) -> Iterator[tuple[int, Batch, dict[str, np.ndarray]]]:
    """The teacher's answers to blocks of the same samples, batch by batch: the block's place, and rows."""
    size = job.runner.network.preprocessing.size
    several = batches(
        job.source,
        job.recipe,
        blocks[0].samples,
        views=[block.view for block in blocks],
        batch_size=job.batch_size * len(blocks),
    )
    for loaded in renderer.ahead(several):
        for place, batch in enumerate(loaded.split(len(blocks))):
            output = job.runner.run(batch.pixels(size))
            check_finite(output, batch.samples.tolist(), job.runner.network.spec)
            yield place, batch, {name: value.cpu().numpy() for name, value in output.arrays().items()}


class _Sums:
    """Sums over the rows of a block, of facts about the teacher."""

    def __init__(self) -> None:
        self.total = {"rows": 0.0, "correct": 0.0, "cross_entropy": 0.0, "entropy": 0.0}

    def add(self, logits: np.ndarray, labels: Tensor) -> None:
        stats = teacher_stats([torch.from_numpy(logits)], labels)
        self.total["rows"] += len(labels)
        for name in ("correct", "cross_entropy", "entropy"):
            self.total[name] += float(getattr(stats, name).double().sum())
