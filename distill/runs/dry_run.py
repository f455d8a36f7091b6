"""Dry runs: all that `train` checks before its first step, without a step or a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coursepack.distill.distributed import SINGLE_RANK
from coursepack.distill.runs.folder import check_free
from coursepack.distill.setup.describe import describe_training, describe_work, warnings_of
from coursepack.distill.setup.prepare import describe_setup, prepare
from coursepack.distill.training.group import make_group

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from coursepack.distill.distributed import Ranks
    from coursepack.distill.recipe import TrainRecipe


def dry_run(
    recipe: TrainRecipe,
    out: Path | None,
    *,
    device: torch.device,
    overwrite: bool = False,
    resume: bool = False,
    ranks: Ranks = SINGLE_RANK,
    trust_code: bool = False,
) -> list[str]:
    """Open and check everything that a run needs, and return lines that describe its work.

    Args:
        recipe: the recipe.
        out: folder that the run would use; None skips its check.
        device: device to prepare for.
        overwrite: allow the folder to hold a run.
        resume: allow the folder to hold a run.
        ranks: rank of this process.
        trust_code: allow stores to name Python code for live teachers.

    Raises:
        As `train` before its first step, except for files of views, which are not opened.
    """
    if out is not None:
        check_free(out, overwrite=overwrite, resume=resume)
    setup = prepare(recipe, device, ranks, trust_code=trust_code)
    make_group(setup)
    lines = ["dry run: nothing was trained or written", describe_setup(setup)]
    lines += [describe_training(recipe, setup), *describe_work(setup)]
    for warning in warnings_of(recipe, setup.readers):
        lines += warning.splitlines()
    return lines
