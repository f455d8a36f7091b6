"""Metrics for Weights & Biases, an optional dependency.

The variables of its own, such as `WANDB_PROJECT`, `WANDB_MODE=offline` and `WANDB_DIR`, are followed.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coursepack.console import inform
from coursepack.distill.runs.tracking.base import missing_tracker, scalars

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coursepack.distill.runs.tracking.base import TrackedRun

PROJECT = "coursepack"
"""Project of the runs, unless `WANDB_PROJECT` names another."""
FOLDER = "wandb"
"""Folder of its files within a run's folder, unless `WANDB_DIR` names another."""


def check() -> None:
    """Check that the library is installed.

    Raises:
        RecipeError: it is not.
    """
    try:
        import wandb  # noqa: F401 - only to see whether it is installed
    except ImportError as error:
        raise missing_tracker("wandb", error) from error


def start(run: TrackedRun) -> WandbTracker:
    """Start a run of Weights & Biases, or continue the one of the same identifier."""
    return WandbTracker(run)


class WandbTracker:
    """Run of Weights & Biases."""

    def __init__(self, run: TrackedRun) -> None:
        """Start the run, which several may do in one process."""
        import wandb

        identifier = (run.state or {}).get("id") or secrets.token_hex(8)
        self.state: Mapping[str, str] = {"id": identifier}
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=identifier,
            name=run.name,
            config=dict(run.recipe),
            dir=None if "WANDB_DIR" in os.environ else str(run.folder),
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )
        if self._run.offline:
            inform(f"{run.folder}: tracked offline; `wandb sync {Path(self._run.dir).parent}` uploads it")
        elif self._run.url:
            inform(f"{run.folder}: tracked at {self._run.url}")

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Log the metrics of one epoch. The service ignores an epoch that it has already."""
        self._run.log(dict(scalars(metrics)), step=metrics["epoch"])

    def end(self, error: BaseException | None) -> None:
        """End the run, as failed if there is an error."""
        self._run.finish(exit_code=0 if error is None else 1)
