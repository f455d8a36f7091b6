"""Why a loss is not finite: the student diverged, or what it was given is at fault."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from coursepack.errors import NonFiniteOutput
from coursepack.kernels import decode

if TYPE_CHECKING:
    from coursepack.data.store import StoreReader
    from coursepack.distill.facts import Facts

ROWS_AT_A_TIME = 1024


def is_finite(values: Tensor) -> bool:
    """Whether there is neither NaN nor infinity among the values."""
    return bool(torch.isfinite(values).all())


def cause_of(facts: Facts, fusion: object) -> tuple[str, str]:
    """Which input of a batch's loss is not finite, and what to do about it."""
    for place, logits in zip(facts.teachers.places, facts.teachers.logits, strict=True):
        if not is_finite(decode(logits)):
            return f"the targets of teacher {place} are not", "Check its weights, or write its store again."
    smaller = "Use a smaller --lr, and --overwrite what is left of the run."
    if isinstance(fusion, nn.Module) and not all(map(is_finite, fusion.parameters())):
        return "what the fusion learned is not", smaller
    representation = facts.inside.representation
    if is_finite(facts.student_logits) and (representation is None or is_finite(representation)):
        return "it overflows for these logits", smaller
    if (facts.moment.epoch, facts.moment.batch) == (0, 0):
        return (
            "the student's logits are not",
            "It has made no step yet: check its weights and its --student-std.",
        )
    return "the student's logits are not", smaller


def check_rows_finite(reader: StoreReader, array: str, view: int) -> None:
    """Read one view of an array and refuse NaN and infinity.

    Raises:
        NonFiniteOutput: names the first samples.
    """
    bad: list[int] = []
    for start in range(0, reader.manifest.samples, ROWS_AT_A_TIME):
        samples = np.arange(start, min(start + ROWS_AT_A_TIME, reader.manifest.samples))
        finite = torch.isfinite(reader.rows(array, view, samples).decode()).flatten(1).all(1)
        bad += samples[~finite.numpy()].tolist()
    if bad:
        shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
        raise NonFiniteOutput(
            f"store {str(reader.path)!r} holds {array} that are not finite for {len(bad)} samples of view "
            f"{view} ({shown}): no student can learn from them. Write it again with `precompute run`, which "
            "refuses such answers, or leave it out"
        )
