"""One teacher over one source: the work behind `precompute run`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from coursepack.console import progress
from coursepack.data.encodings import FOR_FEATURES, FOR_LOGITS, parse_encoding, smaller_encoding
from coursepack.data.sources import FirstSamples
from coursepack.data.store import StorePlan, StoreWriter
from coursepack.data.store.manifest import LOGITS
from coursepack.data.store.owners import Part
from coursepack.data.views import ViewParams, draw, render, view_fingerprint
from coursepack.errors import RecipeError
from coursepack.kernels import teacher_stats
from coursepack.models.build import weights_fingerprint
from coursepack.models.runner import check_finite

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import numpy as np

    from coursepack.console import Meter
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

    def plan(self) -> StorePlan:
        """What the store is to hold.

        Raises:
            UnknownName: no such encoding.
            RecipeError: a number out of range.
        """
        for name in ("views", "batch_size"):
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
            origin={"weights_file": network.weights_file},
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
        """What may change the last bits of a teacher's answer without being part of its identity."""
        libraries = {name: version(name) for name in ("coursepack", "torch", "torchvision", "numpy")}
        return {**libraries, "device": self.runner.device.type, "batch_size": self.batch_size}


def run_job(job: Job, *, block_order: Iterator[int] | None = None, quiet: bool = False) -> Manifest:
    """Write whatever of the store's part is not there yet, and commit every view that is complete.

    Args:
        job: what to run.
        block_order: numbers `view * blocks + block` in the order to do them; by default ascending.
        quiet: show no progress.

    Returns:
        The manifest as it is when this process is done.

    Raises:
        StoreMismatch: the store was written by another recipe; nothing is changed.
        StoreBusy: a live process writes this part.
        NonFiniteOutput, EncodingRange: the teacher's answer cannot be stored; done blocks stay done.
    """
    with StoreWriter(job.store, job.plan(), job.part) as writer:
        writer.commit()
        title = f"precompute {job.store.name}"
        shown = progress(title, writer.owned_rows(), "images", done=writer.done_rows())
        with nullcontext() if quiet else shown as meter:
            for block in writer.pending(block_order):
                files, sums = write_block(job, writer, block, meter)
                files.finish(sums)
                if writer.is_complete(block.view):
                    writer.commit()
        writer.commit()
        return writer.manifest


def write_block(
    job: Job,
    writer: StoreWriter,
    block: Block,
    meter: Meter | None = None,
    sound: Mapping[str, tuple[int, int]] | None = None,
) -> tuple[BlockFiles, dict[str, float]]:
    """Run the teacher over one block; gives its files, not finished yet, and sums over its rows."""
    params = draw(job.recipe, block.samples, block.view)
    files = writer.write(block, {"draws": params.digest(), "environment": job.environment()}, sound)
    sums = _Sums()
    for samples, arrays in _answers(job, block, params):
        files.add(arrays)
        sums.add(arrays[LOGITS], job.source.labels[samples])
        if meter is not None:
            meter.advance(len(samples), f"view {block.view + 1} of {writer.manifest.views}")
    return files, sums.total


def with_limit(job: Job, store: Path, limit: int) -> Job:
    """The same job on one view of the first `limit` samples, into another store: to try it out."""
    return replace(
        job, store=store, source=FirstSamples(job.source, limit), views=1, part=Part(), block_rows=None
    )


def _answers(
    job: Job, block: Block, params: ViewParams
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """The teacher's answers to a block, batch by batch from the block's start."""
    size = job.runner.network.preprocessing.size
    for start in range(0, len(block), job.batch_size):
        samples = block.samples[start : start + job.batch_size]
        boxes = ViewParams(params.boxes[start : start + job.batch_size])
        pixels = torch.from_numpy(render(job.source, samples, boxes, size))
        output = job.runner.run(pixels)
        check_finite(output, samples.tolist(), job.runner.network.spec)
        yield samples, {name: value.cpu().numpy() for name, value in output.arrays().items()}


class _Sums:
    """Sums over the rows of a block, of facts about the teacher."""

    def __init__(self) -> None:
        self.total = {"rows": 0.0, "correct": 0.0, "cross_entropy": 0.0, "entropy": 0.0}

    def add(self, logits: np.ndarray, labels: np.ndarray) -> None:
        stats = teacher_stats([torch.from_numpy(logits)], torch.from_numpy(labels))
        self.total["rows"] += len(labels)
        for name in ("correct", "cross_entropy", "entropy"):
            self.total[name] += float(getattr(stats, name).double().sum())
