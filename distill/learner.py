"""A learner: one student and its objective, with everything that is trained for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from coursepack.data import Batch
    from coursepack.distill.objective import Objective, ObjectiveValue
    from coursepack.distill.targets import Targets
    from coursepack.models import Network


@dataclass(frozen=True)
class LearnerOutput:
    """What a learner makes of a batch."""

    student_logits: Tensor
    """`(N, C)`."""
    value: ObjectiveValue


class Learner(nn.Module):
    """One student and its objective. Optimiser, checkpoints and gradient sync see it as a whole."""

    def __init__(self, network: Network, objective: Objective) -> None:
        super().__init__()
        self.network = network
        self.student = network.module
        self.objective = objective

    def forward(self, batch: Batch, targets: Targets | None) -> LearnerOutput:
        """Student's logits and the objective's value on one batch."""
        student_logits = self.predict(batch)
        return LearnerOutput(student_logits, self.objective(student_logits, batch.labels, targets))

    def predict(self, batch: Batch) -> Tensor:
        """Student's logits `(N, C)`."""
        preprocessing = self.network.preprocessing
        logits: Tensor = self.student(preprocessing(batch.pixels(preprocessing.size)))
        return logits
