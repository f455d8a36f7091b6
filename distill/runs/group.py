"""Run of a group: a student and its peers, which learn from each other, each with a run folder of its own."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from coursepack.distill.training.checkpoint import Position, save_checkpoint
from coursepack.distill.training.evaluate import Watch, evaluate_together

if TYPE_CHECKING:
    from typing import Self

    from coursepack.data.loading import Renderer
    from coursepack.distill.recipe import TrainRecipe
    from coursepack.distill.runs.folder import ReadOnlyRunFolder, RunFolder
    from coursepack.distill.runs.student import StudentRun
    from coursepack.distill.setup.prepare import Setup
    from coursepack.distill.training.state import TrainState
    from coursepack.errors import TrainingDiverged

    Evaluations = tuple[list[dict[str, float]], dict[str, dict[str, float]]]


@dataclass
class GroupRun:
    """Run of several students that learn from each other."""

    recipe: TrainRecipe
    folder: RunFolder | ReadOnlyRunFolder
    students: list[StudentRun]
    """The student and its peers; all are at the same position."""
    identity: dict[str, Any]
    """Recipe and fingerprints of the data, with which a checkpoint must agree."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Metrics of the ensemble after the last completed epoch."""
    diverged: TrainingDiverged | None = None
    """Error that ended the run, if training diverged."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Unlock the folders, and remove them if an error occurred before the first step."""
        for student in self.students:
            student.__exit__(kind, *error)
        self.folder.close(keep=kind is None or self.students[0].state.steps > 0)

    @property
    def position(self) -> Position:
        """Progress of the run, with the best accuracy of the first student."""
        return self.students[0].position

    @property
    def is_finished(self) -> bool:
        """True after the last epoch, or when `patience` is exhausted for every student."""
        return all(student.is_finished for student in self.students)

    @property
    def is_over(self) -> bool:
        """True if the run is finished or has diverged."""
        return self.is_finished or self.diverged is not None

    def save(self) -> None:
        """Write a checkpoint of all students."""
        progress = [(student.position, student.state, student.log) for student in self.students]
        save_checkpoint(self.folder.path, progress, self.identity)

    def evaluate(self, setup: Setup, renderer: Renderer) -> Evaluations:
        """Return the metrics of each student and of their ensembles on the evaluation data."""
        states = [student.state for student in self.students]
        return evaluate_together(
            [state.network for state in states],
            setup.evaluation,
            setup.device,
            watch=_watch(states),
            renderer=renderer,
            ranks=setup.ranks,
        )

    def end_epoch(self, views: list[int], evaluation: Evaluations | None) -> None:
        """Log the metrics of an epoch, save every student that is at its best, and start the next epoch."""
        each, ensembles = ([], {}) if evaluation is None else evaluation
        for student, values in itertools.zip_longest(self.students, each):
            student.end_epoch(views, values)
        first = self.students[0].metrics
        seconds = sum(student.metrics["seconds"] for student in self.students)
        self.metrics = {"epoch": first["epoch"], "view": first["view"], "seconds": round(seconds, 6)}
        if evaluation is not None:
            others = {name: values for name, values in ensembles.items() if name != "ensemble"}
            self.metrics |= {"evaluation": ensembles["ensemble"], **({"ensembles": others} if others else {})}
        self.folder.log(self.metrics)

    def finish(self) -> None:
        """Write the final weights of the exchange and of every student, and remove the checkpoint."""
        self.folder.finish_group(self.students[0].state.learner.exchange)
        for student in self.students:
            student.finish()
        self.folder.remove_checkpoint()


def _watch(states: list[TrainState]) -> Watch | None:
    """Return the exchange and the layers it reads, if it makes ensembles of its own."""
    exchange = states[0].learner.exchange
    if not hasattr(exchange, "ensembles"):
        return None
    objectives = [state.learner.objective for state in states]
    return Watch(
        exchange,
        [
            {
                "layers": each.student_layers,
                "embedding": bool(each.needs.embedding),
                "embedding_layer": each.needs.embedding_layer,
            }
            for each in objectives
        ],
    )
