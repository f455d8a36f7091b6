"""Learner: one student and its objective as a single module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coursepack.data.batches import shares
from coursepack.distill.distributed import SINGLE_RANK
from coursepack.distill.losses.base import LossInputs, Step, StudentOutput
from coursepack.distill.setup.student import watched

if TYPE_CHECKING:
    from collections.abc import Callable

    from coursepack.data import Batch
    from coursepack.distill.distributed import Ranks
    from coursepack.distill.objective import Objective, ObjectiveValue
    from coursepack.distill.targets.base import Targets
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
    """Module that holds one student and its objective, so that optimizers and checkpoints cover both."""

    def __init__(
        self,
        network: Network,
        objective: Objective,
        *,
        precision: torch.dtype | None = None,
        compiled: bool = False,
        ranks: Ranks = SINGLE_RANK,
    ) -> None:
        """Initialize the learner.

        Args:
            network: the student.
            objective: the student's objective.
            precision: autocast precision of the student's forward and backward pass; None means float32. The
                objective always computes in float32.
            compiled: compile the student with `torch.compile`.
            ranks: the processes that train this student, each on its own rows.
        """
        super().__init__()
        self.network = network
        self.student = torch.compile(network.module) if compiled else network.module
        self.objective = objective
        self.precision = precision
        self.ranks = ranks
        self.exchange: Any = None
        """Exchange between students that train together, held by the first of them; None for the others."""
        self.own_part: int | None = None
        """Index of the student's part of a batch, if students read rows of their own; None for all rows."""
        self.couples = bool(objective.needs.whole_batch)
        """True if a sample's loss depends on its whole batch."""

    def begin_epoch(self, epoch: int) -> None:
        """Start an epoch: freeze or unfreeze parameters as the objective's phases require."""
        self.objective.begin_epoch(epoch)
        if self.exchange is not None and hasattr(self.exchange, "begin_epoch"):
            self.exchange.begin_epoch(epoch)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return all parameters in groups for an optimizer; groups with their own settings come last."""
        groups = self.objective.parameter_groups()
        if self.exchange is not None and hasattr(self.exchange, "parameter_groups"):
            groups = [*groups, *self.exchange.parameter_groups()]
        own = {id(value) for group in groups for value in group["params"]}
        rest = [value for value in self.parameters() if id(value) not in own]
        return [{"params": rest}, *(group for group in groups if group["params"])]

    def rows_for(self, batch: Batch) -> Batch:
        """Return the rows that the objective reads: this rank's, or all ranks' if it couples samples.

        Of a batch of students that read rows of their own, they are the student's.
        """
        if self.own_part is not None:
            return batch.of_student(self.own_part)
        return batch.global_batch if self.couples and batch.global_batch is not None else batch

    def forward(self, batch: Batch, targets: Targets | None, step: Step | None = None) -> LearnerOutput:
        """Return the student's logits and the objective's value on one batch.

        Args:
            batch: the student's rows.
            targets: teachers' targets for `rows_for(batch)`, the rows of the returned logits and value.
            step: epoch and batch, on which schedules and random draws depend; defaults to the first.
        """
        output = self.gathered(batch, self.predict(batch))
        inputs = self.inputs(batch, output, targets, step or Step())
        return LearnerOutput(inputs.student.logits, self.objective(inputs))

    def predict(self, batch: Batch) -> StudentOutput:
        """Return the student's output for a batch: its logits, and the layers that the objective reads.

        Outputs computed under autocast are converted to float32.
        """
        layers, needs = self.objective.student_layers, self.objective.needs
        if layers or needs.embedding:
            with watched(
                self.network, layers, embedding=bool(needs.embedding), embedding_layer=needs.embedding_layer
            ) as output:
                result = output(self.logits(batch))
        else:
            result = StudentOutput(self.logits(batch))
        return result if self.precision is None else result.float()

    def logits(self, batch: Batch) -> Tensor:
        """Return the student's logits `(N, C)` in the learner's autocast precision."""
        return self._logits(self.student, self.network, batch)

    def logits_of(self, network: Network, batch: Batch) -> Tensor:
        """Return another network's logits `(N, C)` for the student's rows, in the same precision."""
        return self._logits(network.module, network, batch)

    def _logits(self, module: Callable[[Tensor], Tensor], network: Network, batch: Batch) -> Tensor:
        rows = batch if self.own_part is None else batch.of_student(self.own_part)
        images = network_input(rows, network.preprocessing)
        with torch.autocast(images.device.type, self.precision, enabled=self.precision is not None):
            return module(images)

    def inputs(
        self,
        batch: Batch,
        output: StudentOutput,
        targets: Targets | None,
        step: Step,
        peers: tuple[Tensor, ...] = (),
    ) -> LossInputs:
        """Return the objective's inputs for `rows_for(batch)`.

        Args:
            batch: the student's rows.
            output: a result of `gathered`.
            targets: teachers' targets.
            step: epoch and batch.
            peers: logits that the exchange gives the student to follow.
        """
        rows = self.rows_for(batch)
        return LossInputs(output, rows.labels, targets, step, samples=rows.samples, peers=peers)

    def gathered(self, batch: Batch, output: StudentOutput) -> StudentOutput:
        """Return a student's output for `rows_for(batch)`, of all ranks if it couples samples."""
        rows = self.rows_for(batch)
        if rows is batch or self.own_part is not None:
            return output
        counts = [share.stop - share.start for share in shares(len(rows), self.ranks.count)]
        return output.map(lambda own: self.ranks.gather_rows(own, counts))


def network_input(batch: Batch, preprocessing: Preprocessing) -> Tensor:
    """Return a network's input for a batch, `(N, channels, size, size)` float32 in channels-last format.

    Convolutions on a CPU are faster in this format, whatever the format of the weights.
    """
    size, levels = preprocessing.size, preprocessing.levels(batch.source.channels)
    if levels is None or batch.device.type != "cpu":
        images = preprocessing(batch.pixels(size))  # its table stays on the device
    else:
        images = batch.normalized(size, *levels)
    return images.contiguous(memory_format=torch.channels_last)
