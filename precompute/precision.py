"""Error of a teacher's reduced precision, measured when a store is begun."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from coursepack.console import warn
from coursepack.data import Batch
from coursepack.kernels import soft_target_loss
from coursepack.models.teacher import advice_for, check_finite_rows, finite_rows
from coursepack.precompute.transfer import padded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.data.store import Block, Manifest
    from coursepack.precompute.job import Job

FIRST_ROWS = 256
"""Number of samples of view 0 that are run in float32 too."""
LARGE_KL = 1e-3
"""Mean KL in nats above which a warning is printed."""


def measures_precision(job: Job, block: Block) -> bool:
    """Return True for the first block of view 0 of a store in a reduced precision."""
    return job.runner.precision != "float32" and (block.view, block.start) == (0, 0)


def first_rows(job: Job, sizes: Sequence[int]) -> Batch:
    """Return the first samples in view 0, rendered at the given sizes."""
    samples = np.arange(min(FIRST_ROWS, len(job.source.labels)))
    batch = Batch(job.source, job.recipe, samples, np.zeros_like(samples))
    batch.rendered.update(zip(sizes, batch.render_all(sizes), strict=True))
    return batch


def precision_error(job: Job, first: Batch) -> dict[str, float]:
    """Measure the error of the job's precision, once per store.

    Args:
        job: the job.
        first: result of `first_rows`.

    Returns:
        Number of samples `rows`, and `kl`, the mean KL(float32 || precision) of their outputs in nats at
        T = 1.

    Raises:
        NonFiniteOutput: an output in the job's precision is NaN or infinite.
    """
    runner, samples = job.runner, first.samples
    pixels = first.pixels(runner.network.preprocessing.size)
    total = 0.0
    for start in range(0, len(samples), job.batch_size):
        part = pixels[start : start + job.batch_size]
        images = padded(part, job.batch_size)
        reduced, exact = (
            output.logits[: len(part)].cpu() for output in (runner.run(images), runner.run_float32(images))
        )
        check_finite_rows(
            finite_rows({"logits": reduced}),
            samples[start:].tolist(),
            runner.network.spec,
            advice_for(runner.precision, runner.device),
        )
        total += float(soft_target_loss(reduced, [exact], temperature=1.0).double().sum())
    kl = total / len(samples)
    if kl > LARGE_KL:
        warn(
            f"warning: in {runner.precision}, the outputs of teacher {runner.network.spec!r} differ from "
            f"those in float32 by a mean KL of {kl:.2g} nats at T = 1 over the first {len(samples)} samples, "
            f"more than {LARGE_KL:g}. Another --precision needs another --store."
        )
    return {"rows": float(len(samples)), "kl": kl}


def store_precision(manifest: Manifest) -> dict[str, Any]:
    """Return the precision of a store: its `name`, and `rows` and `kl` of `precision_error` if recorded."""
    record = manifest.view_records.get("0", {}).get("precision", {})
    return {"name": manifest.identity.get("precision", "float32"), **record}


def describe_precision(precision: dict[str, Any]) -> str:
    """Format the result of `store_precision` as one line."""
    if "kl" not in precision:
        return str(precision["name"])
    rows, kl = precision["rows"], precision["kl"]
    return f"{precision['name']}, mean KL to float32 {kl:.2g} nats over the first {rows:.0f} samples"
