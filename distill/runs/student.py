"""Run of one student: its folder, its progress, and the end of its epochs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from coursepack.distill.training.checkpoint import Position, save_checkpoint
from coursepack.distill.training.evaluate import evaluate
from coursepack.distill.training.loop import new_metrics
from coursepack.errors import TrainingDiverged

if TYPE_CHECKING:
    from typing import Self

    from coursepack.data.loading import Renderer
    from coursepack.distill.recipe import TrainRecipe
    from coursepack.distill.runs.folder import ReadOnlyRunFolder, RunFolder
    from coursepack.distill.runs.tracking import Tracking
    from coursepack.distill.setup.prepare import Setup
    from coursepack.distill.training.metrics import EpochMetrics
    from coursepack.distill.training.state import TrainState


@dataclass
class StudentRun:
    """Run of one student: its recipe, folder and progress.

    `GroupRun` has the same methods for several students.
    """

    recipe: TrainRecipe
    folder: RunFolder | ReadOnlyRunFolder
    state: TrainState
    tracking: Tracking
    position: Position
    log: EpochMetrics
    """Metrics of the current epoch."""
    identity: dict[str, Any]
    """Recipe and fingerprints of the data, with which a checkpoint must agree."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Metrics of the last completed epoch."""
    diverged: TrainingDiverged | None = None
    """Error that ended the run, if training diverged."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Unlock the folder, and remove it if an error occurred before the first step."""
        self.folder.close(keep=kind is None or self.state.steps > 0)

    @property
    def is_finished(self) -> bool:
        """True after the last epoch, or when `patience` is exhausted."""
        patience = self.recipe.patience
        return self.position.epoch >= self.recipe.epochs or (
            patience is not None and self.position.stale >= patience
        )

    @property
    def is_over(self) -> bool:
        """True if the run is finished or has diverged."""
        return self.is_finished or self.diverged is not None

    def save(self) -> None:
        """Write a checkpoint."""
        save_checkpoint(self.folder.path, (self.position, self.state, self.log), self.identity)

    @property
    def students(self) -> list[StudentRun]:
        """The students that learn from each other: this one alone."""
        return [self]

    def evaluate(self, setup: Setup, renderer: Renderer) -> dict[str, float]:
        """Return the metrics of the student on the evaluation data."""
        return evaluate(
            self.state.network, setup.evaluation, setup.device, renderer=renderer, ranks=setup.ranks
        )

    def finish(self) -> None:
        """Write the final weights, and remove the checkpoint."""
        self.folder.finish(self.state.network)

    def end_epoch(self, views: list[int], evaluation: dict[str, float] | None) -> None:
        """Log the metrics of an epoch, save the student if it is the best, and start the next epoch."""
        epoch = self.position.epoch
        train_metrics = self.log.means()
        group_names = train_metrics.keys() & {"teachers", "temperature"}
        groups: dict[str, Any] = {name: train_metrics.pop(name) for name in sorted(group_names)}
        _check_finite(train_metrics | (evaluation or {}), epoch, self.recipe)
        self.metrics = {
            "epoch": epoch,
            "view": views[0] if len(views) == 1 else views,
            "seconds": round(self.position.seconds, 6),
            "train": train_metrics,
            **({} if evaluation is None else {"evaluation": evaluation}),
            **groups,
        }
        if self.recipe.replicas:
            self.metrics["exchange"] = self.state.learner.exchange.epoch_metrics()
        self.folder.log(self.metrics)
        self.tracking.log(self.metrics)
        best, stale = self.position.best, self.position.stale
        if evaluation is not None:
            if best is None or evaluation["accuracy"] > best:
                self.folder.keep_best(self.state.network)
                best, stale = evaluation["accuracy"], 0
            else:
                stale += 1
        every = self.recipe.keep_checkpoints
        if every is not None and (epoch + 1) % every == 0:
            self.folder.keep_checkpoint(self.state.network, epoch + 1)
        self.position = Position(epoch + 1, best=best, stale=stale)
        self.log = new_metrics(self.state)


def _check_finite(metrics: dict[str, float], epoch: int, recipe: TrainRecipe) -> None:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise TrainingDiverged(
                f"training diverged in epoch {epoch}: {name} is {value}. Use a smaller --lr than "
                f"{recipe.optimizer.lr:g}. The unfinished run stays in its folder: remove it, or replace it "
                "with --overwrite."
            )
