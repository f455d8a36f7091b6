"""A learner: one student and its objective, with everything that is trained for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coursepack.data.batches import shares
from coursepack.distill.distributed import ALONE
from coursepack.distill.losses.base import LossInputs, Step, StudentOutput
from coursepack.distill.setup.student import watched

if TYPE_CHECKING:
    from coursepack.data import Batch
    from coursepack.distill.distributed import Ranks
    from coursepack.distill.objective import Objective, ObjectiveValue
    from coursepack.distill.targets.stores import Targets
    from coursepack.models import Network
    from coursepack.models.preprocessing import Preprocessing


@dataclass(frozen=True)
class LearnerOutput:
    """Output of a learner for a batch."""

    student_logits: Tensor
    """`(N, C)`."""
    value: ObjectiveValue
    """The objective's value."""


class Learner(nn.Module):
    """One student and its objective. Optimizer, checkpoints and gradient averaging see them as one module."""

    def __init__(
        self,
        network: Network,
        objective: Objective,
        *,
        precision: torch.dtype | None = None,
        compiled: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        """Join a student and its objective.

        Args:
            network: the student.
            objective: its loss.
            precision: autocast precision of the student's forward and backward pass; None means float32. The
                objective computes in float32 whatever it is.
            compiled: train the student through `torch.compile`.
            ranks: the processes that train it together, each on its own rows.
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
        """Return everything that is trained, for an optimizer; parts with settings of their own come last."""
        groups = self.objective.parameter_groups()
        own = {id(value) for group in groups for value in group["params"]}
        rest = [value for value in self.parameters() if id(value) not in own]
        return [{"params": rest}, *(group for group in groups if group["params"])]

    def rows_for(self, batch: Batch) -> Batch:
        """Return the rows that the objective reads: those of all ranks where it couples them."""
        return (
            batch
            if batch.global_batch is None or not self.objective.needs.whole_batch
            else batch.global_batch
        )

    def forward(self, batch: Batch, targets: Targets | None, step: Step | None = None) -> LearnerOutput:
        """Return the student's logits and the objective's value on one batch.

        Args:
            batch: the student's rows.
            targets: targets of `rows_for(batch)`; logits and value are of these rows too.
            step: epoch and batch, on which schedules and draws depend.
        """
        inputs = self.inputs(batch, self.predict(batch), targets, step or Step())
        return LearnerOutput(inputs.student.logits, self.objective(inputs))

    def predict(self, batch: Batch) -> StudentOutput:
        """Return the student's output for a batch: logits, and the layers that the objective reads.

        Logits are in the precision of training as long as it is float32, and in float32 otherwise.
        """
        layers, needs = self.objective.student_layers, self.objective.needs
        if layers or needs.embedding:
            with watched(
                self.network, layers, embedding=bool(needs.embedding), embedding_layer=needs.embedding_layer
            ) as output:
                found = output(self.logits(batch))
        else:
            found = StudentOutput(self.logits(batch))
        return found if self.precision is None else found.float()

    def logits(self, batch: Batch) -> Tensor:
        """Return the student's logits `(N, C)`, in the precision of training."""
        images = network_input(batch, self.network.preprocessing)
        with torch.autocast(images.device.type, self.precision, enabled=self.precision is not None):
            logits: Tensor = self.student(images)
        return logits

    def inputs(
        self,
        batch: Batch,
        output: StudentOutput,
        targets: Targets | None,
        step: Step,
        peers: tuple[StudentOutput, ...] = (),
    ) -> LossInputs:
        """Return the objective's inputs, with the rows of all ranks where it couples them."""
        rows = self.rows_for(batch)
        if rows is not batch:
            counts = [share.stop - share.start for share in shares(len(rows), self.ranks.count)]
            output, *others = (
                each.map(lambda own: self.ranks.all_rows(own, counts)) for each in (output, *peers)
            )
            peers = tuple(others)
        return LossInputs(output, rows.labels, targets, step, samples=rows.samples, peers=peers)


def network_input(batch: Batch, preprocessing: Preprocessing) -> Tensor:
    """Return a network's input for a batch, `(N, channels, size, size)` float32, channels last in memory.

    In that order a CPU convolves faster, whatever the order of the weights.
    """
    size, levels = preprocessing.size, preprocessing.levels(batch.source.channels)
    images = preprocessing(batch.pixels(size)) if levels is None else batch.normalized(size, *levels)
    return images.contiguous(memory_format=torch.channels_last)
