"""Causes of a loss that is not finite: a student that diverged, or an input that is not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from coursepack.errors import NonFiniteOutput
from coursepack.kernels import decode

if TYPE_CHECKING:
    from coursepack.data.store import StoreReader
    from coursepack.distill.losses.base import LossInputs

ROWS_AT_A_TIME = 1024


def is_finite(values: Tensor) -> bool:
    """Return true if no value is NaN or infinite."""
    return bool(torch.isfinite(values).all())


def cause_of(inputs: LossInputs, fusion: object) -> tuple[str, str]:
    """Return the input that made a batch's loss NaN or infinite, and advice for the error message."""
    for index, logits in zip(inputs.teachers.indices, inputs.teachers.logits, strict=True):
        if not is_finite(decode(logits)):
            return f"the targets of teacher {index} are not", "Check its weights, or write its store again."
    smaller = "Use a smaller --lr, and replace the unfinished run with --overwrite."
    if isinstance(fusion, nn.Module) and not all(map(is_finite, fusion.parameters())):
        return "the fusion's parameters are not", smaller
    student = inputs.student
    if is_finite(student.logits) and (student.embedding is None or is_finite(student.embedding)):
        return "it overflows for these logits", smaller
    if (inputs.step.epoch, inputs.step.batch) == (0, 0):
        return (
            "the student's logits are not",
            "It has not been updated yet: check its initial weights and --student-std.",
        )
    return "the student's logits are not", smaller


def check_rows_finite(reader: StoreReader, array: str, view: int) -> None:
    """Check that one view of a stored array has no NaN or infinity.

    Raises:
        NonFiniteOutput: some values are not finite; the message lists the first samples.
    """
    bad: list[int] = []
    for start in range(0, reader.manifest.samples, ROWS_AT_A_TIME):
        samples = np.arange(start, min(start + ROWS_AT_A_TIME, reader.manifest.samples))
        finite = torch.isfinite(reader.rows(array, view, samples).decode()).flatten(1).all(1)
        bad += samples[~finite.numpy()].tolist()
    if bad:
        shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
        raise NonFiniteOutput(
            f"store {reader.address!r} holds {array} that are not finite for {len(bad)} samples of view "
            f"{view} ({shown}): no student can learn from them. Write the store again with `precompute run`, "
            "which refuses such outputs, or train without it"
        )
