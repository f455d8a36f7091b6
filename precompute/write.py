"""Writing of a store's blocks: render views, run the teacher, encode and write its outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from coursepack.data import batches
from coursepack.data.drift import content_digest, probe_digests, probe_samples
from coursepack.data.store.manifest import LOGITS
from coursepack.data.views import draw
from coursepack.kernels import teacher_stats
from coursepack.models.teacher import check_finite

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    from torch import Tensor

    from coursepack.console import Meter
    from coursepack.data import Batch
    from coursepack.data.loading import Renderer
    from coursepack.data.store import Block, StoreWriter
    from coursepack.data.store.block import BlockFiles
    from coursepack.precompute.job import Job


def write_blocks(
    job: Job,
    writer: StoreWriter,
    renderer: Renderer,
    blocks: Sequence[Block],
    meter: Meter | None = None,
    sound: Mapping[str, tuple[int, int]] | None = None,
) -> list[tuple[BlockFiles, dict[str, float]]]:
    """Run the teacher on blocks of the same samples under one or more views, decoding each image once.

    Every forward pass has images of one block only, so its outputs have the same bits as with one view.

    Returns:
        The unfinished files of each block, and sums over its rows.
    """
    files = [writer.write(block, _record(job, block), sound) for block in blocks]
    sums = [_Sums() for _ in blocks]
    for place, batch, arrays in _answers(job, renderer, blocks):
        files[place].add(arrays)
        sums[place].add(arrays[LOGITS], batch.main_labels)
        if meter is not None:
            meter.advance(len(batch), f"view {blocks[place].view + 1} of {writer.manifest.views}")
    return [(file, sum_.total) for file, sum_ in zip(files, sums, strict=True)]


def _record(job: Job, block: Block) -> dict[str, Any]:
    """Return the record of a block's done-object, used to detect drift of views and damage of the source."""
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


def _answers(
    job: Job, renderer: Renderer, blocks: Sequence[Block]
) -> Iterator[tuple[int, Batch, dict[str, np.ndarray]]]:
    """Yield the position of the block, the batch and the rows of the teacher's outputs for each batch."""
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
    """Sums of the teacher's statistics over the rows of a block."""

    def __init__(self) -> None:
        self.total = {"rows": 0.0, "correct": 0.0, "cross_entropy": 0.0, "entropy": 0.0}

    def add(self, logits: np.ndarray, labels: Tensor) -> None:
        stats = teacher_stats([torch.from_numpy(logits)], labels)
        self.total["rows"] += len(labels)
        for name in ("correct", "cross_entropy", "entropy"):
            self.total[name] += float(getattr(stats, name).double().sum())
