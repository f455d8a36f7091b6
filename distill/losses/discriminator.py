"""Adversarial loss of MEAL: a discriminator tells the student's logits from a teacher's.

    loss = 1/2 [BCE(D(reversed(z)), (1, 0)) + BCE(D(z_k), (0, 1))]

Shen, He and Xue, AAAI 2019, arXiv 1812.02425. The discriminator learns to tell the logits apart; the gradient
to the student is reversed, so that the student learns to be taken for a teacher. Two things are otherwise in
the release, and are options here: its student's gradient is not reversed unless `--grl` is given, so that the
student helps the discriminator, and its last layer has a ReLU too, which stops learning where it is zero.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from coursepack.distill.losses.base import BuildContext, Loss, LossInputs, Needs, TermConfig
from coursepack.distill.schedule import NotNegative
from coursepack.errors import RecipeError
from coursepack.kernels import decode
from coursepack.models.build import seeded


class DiscriminatorConfig(TermConfig):
    """Config of the adversarial loss."""

    term: Literal["discriminator"] = "discriminator"
    reverse: bool = True
    """Reverse the gradient to the student; false as in the release without `--grl`."""
    last_relu: bool = False
    """Apply ReLU to the discriminator's outputs too, as in the release."""
    least_width: Annotated[int, Field(ge=1)] = 16
    """Smallest width of a hidden layer. With 1, as in the release, widths of C/2 and C/4 are so small for few
    classes that all units may stop learning."""
    lr_factor: Annotated[float, Field(gt=0)] = 0.01
    """Learning rate of the discriminator as a multiple of the student's; 0.01 as in the release's script."""
    weight_decay: NotNegative = 1e-4
    """Weight decay of the discriminator."""


class Discriminator(nn.Module):
    """Discriminator of logits: three linear layers, hidden ones of C/2 and C/4 units with ReLU."""

    def __init__(self, config: DiscriminatorConfig, classes: int, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        half, quarter = (max(config.least_width, classes // part) for part in (2, 4))
        with seeded(seed):
            self.layer1 = nn.Linear(classes, half)
            self.layer2 = nn.Linear(half, quarter)
            self.layer3 = nn.Linear(quarter, 2)

    def forward(self, inputs: LossInputs) -> Tensor:
        """Return the loss `(N,)`, the mean over the teachers that are read.

        Gradients go to the discriminator and, reversed, to the student's logits.
        """
        student = inputs.student.logits
        if student.dtype != torch.float64:
            student = student.float()
        # The value of 2 z - z is exactly z, and its gradient with the first z detached is reversed.
        found = self.judge(2 * student.detach() - student if self.config.reverse else student)[0]
        teachers = [
            self.judge(decode(logits).detach().to(student.dtype))[1] for logits in inputs.teachers.logits
        ]
        return (found + torch.stack(teachers).mean(0)) / 2

    def judge(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses `(N,)` of logits `(N, C)` if they are the student's, and if they are a teacher's.

        Each is the mean of the binary cross-entropies of both outputs, in nats, to (1, 0) and (0, 1).
        """
        outputs = self.layer3(self.layer2(self.layer1(logits).relu()).relu())
        first, second = (outputs.relu() if self.config.last_relu else outputs).unbind(1)
        as_student = -F.logsigmoid(first) - F.logsigmoid(-second)
        as_teacher = -F.logsigmoid(-first) - F.logsigmoid(second)
        return as_student / 2, as_teacher / 2

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the discriminator's parameters with their own learning rate and weight decay."""
        return [
            {
                "params": list(self.parameters()),
                "weight_decay": self.config.weight_decay,
                "lr_factor": self.config.lr_factor,
            }
        ]


def _needs(_config: DiscriminatorConfig) -> Needs:
    return Needs(teacher_logits=True, dense_logits="the discriminator")


def _build(config: DiscriminatorConfig, context: BuildContext) -> Discriminator:
    if not context.classes:
        raise RecipeError(
            "term 'discriminator' has to be fitted to the number of classes: build the objective with "
            "make_objective(stores, student, method)"
        )
    return Discriminator(config, context.classes, seed=context.seed)


LOSS = Loss(
    config=DiscriminatorConfig,
    formula="1/2 (BCE(D(z), (1, 0)) + BCE(D(z_k), (0, 1))), gradient reversed for the student",
    source="Shen, He and Xue 2019 (MEAL), arXiv 1812.02425, section 3",
    needs=_needs,
    build=_build,
)
