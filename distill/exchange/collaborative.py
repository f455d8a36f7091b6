"""Collaborative learning: all students follow one target made of all their logits and the labels.

KDCL: Guo, Wang, Wu, Yu, Liang, Hu and Luo 2020, CVPR, section 3. Formulas are known from others' notes and
code (see the method's note).
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor, nn

from coursepack.distill.exchange.base import Exchange, ExchangeConfig, Exchanged, ExchangeInputs, GroupContext
from coursepack.distill.losses.base import Needs
from coursepack.distill.losses.label import cross_entropy
from coursepack.kernels import MixedLabels

SWEEPS = 6
BISECTIONS = 24
RIDGE = 1e-4
"""Added to the diagonal of the errors' second moments, relative to its mean, before they are inverted."""


class CollaborativeConfig(ExchangeConfig):
    """Config of the exchange for collaborative learning."""

    name: Literal["collaborative"] = "collaborative"
    target: Literal["naive", "linear", "min_logit", "general"] = "naive"
    """Target logits, per sample.

    naive      those of the student with the smallest cross-entropy
    linear     the convex combination of the students' logits with the smallest cross-entropy
    min_logit  the smallest logit of each class over the students, after each subtracts that of the label
    general    the combination whose weights minimize the error of the previous epoch's probabilities
    """


class Collaborative(nn.Module):
    """One detached target for all students."""

    moments: Tensor
    weights: Tensor
    epoch: Tensor

    def __init__(self, config: CollaborativeConfig, students: int) -> None:
        super().__init__()
        self.config = config
        if config.target == "general":
            self.register_buffer("moments", torch.zeros(students, students))
            self.register_buffer("weights", torch.full((students,), 1 / students))
            self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))

    def begin_epoch(self, epoch: int) -> None:
        """Compute the weights of target `general` from the errors of the epoch before, and start anew.

        A second call for the same epoch, as after a resume within it, changes nothing.
        """
        if self.config.target != "general" or epoch <= int(self.epoch):
            return
        if bool(self.moments.any()):
            self.weights.copy_(weights_of_errors(self.moments))
            self.moments.zero_()
        self.epoch.fill_(epoch)

    def forward(self, inputs: ExchangeInputs) -> Exchanged:
        """Return the same logits for every student to follow, without gradient."""
        logits = torch.stack([output.logits.detach() for output in inputs.outputs])
        target = self._target(logits, inputs.labels)
        return Exchanged(((target,),) * len(logits))

    def _target(self, logits: Tensor, labels: Tensor | MixedLabels) -> Tensor:
        if self.config.target == "naive":
            return naive_target(logits, labels)
        assert not isinstance(labels, MixedLabels)
        if self.config.target == "linear":
            return linear_target(logits, labels)
        if self.config.target == "min_logit":
            return min_logit_target(logits, labels)
        errors = logits.softmax(2)
        errors[:, torch.arange(len(labels), device=labels.device), labels] -= 1
        flat = errors.flatten(1)
        self.moments += flat @ flat.T
        mixed: Tensor = (self.weights[:, None, None] * logits).sum(0)
        return mixed


def naive_target(logits: Tensor, labels: Tensor | MixedLabels) -> Tensor:
    """Return `(N, C)`, for each sample the logits of the student with the smallest cross-entropy.

    Args:
        logits: `(M, N, C)` of M students.
        labels: class ids `(N,)`, or mixed labels.
    """
    losses = torch.stack([cross_entropy(each, labels) for each in logits])
    best = losses.argmin(0)
    return logits[best, torch.arange(logits.shape[1], device=logits.device)]


def min_logit_target(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `(N, C)`: the minimum over students of z_c - z_y. Arguments as for `naive_target`."""
    of_label = logits.gather(2, labels.expand(len(logits), -1)[:, :, None])
    return (logits - of_label).amin(0)


def linear_target(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `(N, C)`: sum_i a_i z_i, where a minimizes its cross-entropy, a >= 0 and sum_i a_i = 1.

    The problem is convex. Mass is moved between two students at a time, as far as the loss falls, which a
    bisection of its derivative finds; `SWEEPS` sweeps go over all pairs. Arguments as for `naive_target`.
    """
    students, rows, _ = logits.shape
    shares = logits.new_full((students, rows), 1 / students)
    pairs = list(itertools.combinations(range(students), 2))
    for first, second in pairs * (1 if students == 2 else SWEEPS):
        direction = logits[first] - logits[second]
        mixed = (shares[:, :, None] * logits).sum(0)
        low, high = -shares[first], shares[second]
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            at_middle = mixed + middle[:, None] * direction
            own = direction.gather(1, labels[:, None])[:, 0]
            rises = (at_middle.softmax(1) * direction).sum(1) - own > 0
            low, high = torch.where(rises, low, middle), torch.where(rises, middle, high)
        moved = (low + high) / 2
        shares[first] += moved
        shares[second] -= moved
    return (shares[:, :, None] * logits).sum(0)


def weights_of_errors(moments: Tensor) -> Tensor:
    """Return `(M,)`, sum one: the combination of M students with the smallest mean squared error.

    w_k = sum_j (C^-1)_kj / sum_ij (C^-1)_ij, where C is the second moment of their errors.

    Args:
        moments: C `(M, M)`, up to a factor.
    """
    scaled = moments.double() / moments.diagonal().mean()
    inverse = torch.linalg.inv(scaled + RIDGE * torch.eye(len(moments), device=moments.device))
    weights: Tensor = inverse.sum(1) / inverse.sum()
    return weights.to(moments.dtype)


def _needs(config: CollaborativeConfig) -> Needs:
    name = f"exchange target {config.target!r}"
    return Needs(
        labels=True,
        one_label="" if config.target == "naive" else name,
        whole_batch=(name,) if config.target == "general" else (),
    )


def _build(config: CollaborativeConfig, context: GroupContext) -> Collaborative:
    return Collaborative(config, len(context.students))


EXCHANGE = Exchange(
    config=CollaborativeConfig,
    formula="one target of all students' logits and the labels: the best student's, the best combination, or "
    "the minimum",
    source="Guo et al. 2020 (KDCL), CVPR 2020, section 3",
    needs=_needs,
    build=_build,
)
