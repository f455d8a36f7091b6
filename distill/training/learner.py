"""A learner: one student and its objective, with everything that is trained for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coursepack.data.batches import shares
from coursepack.distill.losses.base import Inside, Moment
from coursepack.distill.setup.student import watched
from coursepack.distill.training.distributed import ALONE

if TYPE_CHECKING:
    from coursepack.data import Batch
    from coursepack.distill.losses.objective import Objective, ObjectiveValue
    from coursepack.distill.targets.stores import Targets
    from coursepack.distill.training.distributed import Ranks
    from coursepack.models import Network
    from coursepack.models.preprocessing import Preprocessing


@dataclass(frozen=True)
class LearnerOutput:
    """What a learner makes of a batch."""

    student_logits: Tensor
    """`(N, C)`."""
    value: ObjectiveValue


class Learner(nn.Module):
    """One student and its objective. Optimiser, checkpoints and gradient sync see it as a whole."""

    def __init__(
        self,
        network: Network,
        objective: Objective,
        *,
        precision: torch.dtype | None = None,
        compiled: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        """Join the two.

        Args:
            network: the student.
            objective: what it learns.
            precision: of the student's matrix products in training, by autocast; None means float32. The
                objective computes in float32 whatever it is.
            compiled: train the student through `torch.compile`.
            ranks: who else trains it, each on its own rows.
        """
        super().__init__()
        self.network = network
        self.student = torch.compile(network.module) if compiled else network.module
        self.objective = objective
        self.precision = precision
        self.ranks = ranks

    def begin_epoch(self, epoch: int) -> None:
        """Freeze or release what the objective's phases say."""
        self.objective.begin_epoch(epoch)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Everything that learns, for an optimiser: the fusion's latents have an L2 penalty of their own."""
        latents = self.objective.fusion_parameters()
        own = {id(value) for value in latents}
        rest = [value for value in self.parameters() if id(value) not in own]
        return [{"params": rest}, *([{"params": latents, "weight_decay": 0.0}] if latents else [])]

    def rows_for(self, batch: Batch) -> Batch:
        """The rows that the objective looks at: of a rank's share, all ranks' where they are coupled."""
        return batch if batch.whole is None or not self.objective.may_couple else batch.whole

    def forward(self, batch: Batch, targets: Targets | None, moment: Moment | None = None) -> LearnerOutput:
        """Student's logits and the objective's value on one batch.

        Args:
            batch: what the student looks at.
            targets: of `rows_for(batch)`, as are the logits and the value that are given.
            moment: epoch and batch.
        """
        objective = self.objective
        layers, representation = objective.student_layers, objective.needs_representation
        if layers or representation:
            layer = objective.config.fusion.layer if representation else None
            with watched(self.network, layers, representation=representation, layer=layer) as caught:
                student_logits = self.predict(batch)
                inside = caught()
        else:
            student_logits, inside = self.predict(batch), Inside()
        if self.precision is not None:
            student_logits, inside = student_logits.float(), inside.float()
        rows = self.rows_for(batch)
        if rows is not batch:
            counts = [share.stop - share.start for share in shares(len(rows), self.ranks.count)]
            student_logits = self.ranks.all_rows(student_logits, counts)
            inside = inside.each(lambda own: self.ranks.all_rows(own, counts))
        value = objective(student_logits, rows.labels, targets, inside, moment or Moment())
        return LearnerOutput(student_logits, value)

    def predict(self, batch: Batch) -> Tensor:
        """Student's logits `(N, C)`, in the precision of training."""
        images = look_at(batch, self.network.preprocessing)
        with torch.autocast(images.device.type, self.precision, enabled=self.precision is not None):
            logits: Tensor = self.student(images)
        return logits


def look_at(batch: Batch, preprocessing: Preprocessing) -> Tensor:
    """What a network reads of a batch, `(N, channels, size, size)` float32, channels last in memory.

    In that order a CPU convolves faster, whatever the order of the weights.
    """
    size, levels = preprocessing.size, preprocessing.levels(batch.source.channels)
    images = preprocessing(batch.pixels(size)) if levels is None else batch.normalised(size, *levels)
    return images.contiguous(memory_format=torch.channels_last)
