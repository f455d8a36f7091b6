"""Fusion: how much each teacher counts, for a batch or for every sample.

A fusion gives weights `(K,)` or `(N, K)` for `soft_target_loss`, or None for 1/K. All sum to one over the
teachers that are asked, whatever a release did (see `methods`), but for weights of `fixed` that are given:
those are taken as they are. Only `adaptive` has anything to learn and gives a gradient; the others look at
teachers and labels alone, without gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from coursepack.config import Config
from coursepack.data.randomness import Purpose, below, random_words
from coursepack.distill.schedule import NotNegative
from coursepack.errors import UnknownName
from coursepack.kernels import MixedLabels, teacher_stats

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from coursepack.distill.facts import Facts, Moment

    Weigh = Callable[[Facts], Tensor | None]


class FusionConfig(Config):
    """Which fusion, and its numbers."""

    name: str = "fixed"
    """A name in `FUSIONS`."""
    teacher: Annotated[int, Field(ge=0)] | None = None
    """Of `best`: the store's place; none means the one whose teacher was right most often when written."""
    layer: str | None = None
    """Of `adaptive`: the student's layer whose largest values over places represent a sample; none means
    what the student's head reads."""
    l2: NotNegative = 0.1
    """Of `adaptive`: factor of the squared norms of the latents, as long as they are trained."""
    init: NotNegative = 1.0
    """Of `adaptive`: standard deviation of the initial latents. At 1, the release's, wide students begin with
    nearly all weight on one teacher; with 0.1 they begin close to equal."""
    joint_epochs: Annotated[int, Field(ge=1)] | None = None
    """Of `adaptive`: latents are trained for so many epochs and then frozen; none means to the end."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in FUSIONS:
            raise ValueError(str(UnknownName("fusion", name, FUSIONS)))
        return name

    @model_validator(mode="after")
    def _is_read(self) -> Self:
        for field, info in type(self).model_fields.items():
            value = getattr(self, field)
            if field == "name" or field in FUSIONS[self.name].numbers or value == info.default:
                continue
            readers = ", ".join(repr(name) for name, fusion in FUSIONS.items() if field in fusion.numbers)
            raise ValueError(
                f"fusion.{field} is for fusion {readers}, but fusion is {self.name!r}: leave {field} out"
            )
        return self


@dataclass(frozen=True)
class FusionSetting:
    """What a fusion is built from, beside its own numbers."""

    teachers: int = 1
    """K."""
    weights: tuple[float, ...] | None = None
    """Fixed weights."""
    width: int = 0
    """D of the student's representation."""
    accuracies: tuple[float, ...] = ()
    """Share of samples each teacher was right on when its store was written."""
    seed: int = 0
    teacher: int | None = None
    """As `FusionConfig.teacher`."""
    init: float = 1.0
    """As `FusionConfig.init`."""


@dataclass(frozen=True)
class Fusion:
    """One way to weigh teachers."""

    formula: str
    source: str
    combine: Literal["mixture", "sum"]
    """What it is published with: the divergence of the mixture, or the weighted sum of divergences."""
    make: Callable[[FusionSetting], Weigh]
    choose: Callable[[FusionSetting, Moment], int] | None = None
    """The only teacher that is asked for a batch; None where all are."""
    needs_representation: bool = False
    numbers: tuple[str, ...] = ()
    """Fields of `FusionConfig` that it reads; another is refused unless it has its default."""


def confidence_weights(cross_entropy: Tensor) -> Tensor:
    """CA-MKD: `w_k = (1 - softmax_k(CE_k)) / (K - 1)`, `(N, K)`; one teacher has weight one.

    Args:
        cross_entropy: of each teacher to the label at T = 1, `(K, N)` nats.

    Zhang, Chen and Wang, ICASSP 2022, arXiv 2201.00007, equation 2.
    """
    return _less_of(cross_entropy.softmax(0))


def entropy_weights(entropy: Tensor) -> Tensor:
    """EBKD: `w_k = (1 - H_k / sum_j H_j) / (K - 1)`, `(N, K)`; one teacher has weight one.

    Args:
        entropy: of each teacher at T = 1, `(K, N)` nats. Where all are zero, all count the same.

    Kwon et al. 2020 as in the release of CA-MKD, which leaves out the K - 1, so that weights sum to K - 1.
    """
    total = entropy.sum(0)
    share = torch.where(total > 0, entropy / total, 1 / len(entropy))
    return _less_of(share)


def _less_of(share: Tensor) -> Tensor:
    """Weights `(N, K)` that sum to one and fall with each teacher's share `(K, N)`."""
    if len(share) == 1:
        return torch.ones_like(share).T
    return ((1 - share) / (len(share) - 1)).T


def label_cross_entropy(facts: Facts) -> Tensor:
    """Cross-entropy of each teacher to the labels at T = 1, `(K, N)` nats; shares for mixed labels."""

    def to(labels: Tensor) -> Tensor:
        found = teacher_stats(facts.teachers.logits, labels).cross_entropy
        assert found is not None
        return found

    if isinstance(facts.labels, MixedLabels):
        lam = facts.labels.lam
        return lam * to(facts.labels.first) + (1 - lam) * to(facts.labels.second)
    return to(facts.labels)


class Fixed(nn.Module):
    """Weights that never change."""

    weights: Tensor | None

    def __init__(self, weights: tuple[float, ...] | None) -> None:
        super().__init__()
        given = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        self.register_buffer("weights", given, persistent=False)

    def forward(self, _facts: Facts) -> Tensor | None:
        """`(K,)`, or None for 1/K."""
        return self.weights


class Adaptive(nn.Module):
    """AMTML-KD: a latent vector per teacher, compared with the student's representation of each sample.

        a_ki = v . (theta_k * beta_i),   w_i = softmax_k(a_i)

    Liu, Zhang and Wang 2020, arXiv 2103.04062, section 3.2. beta_i gets a gradient, by construction; so do
    theta and v. With one teacher the weight is exactly one.
    """

    def __init__(self, teachers: int, width: int, *, init: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.latents = nn.Parameter(init * torch.randn(teachers, width, generator=generator))
        self.shared = nn.Parameter(init * torch.randn(width, generator=generator))

    def forward(self, facts: Facts) -> Tensor:
        """Weights `(N, K)`."""
        representation = facts.inside.representation
        assert representation is not None
        return ((representation.float() * self.shared) @ self.latents.T).softmax(1)

    def squared_norm(self) -> Tensor:
        """`||v||² + sum_k ||theta_k||²`."""
        return self.latents.square().sum() + self.shared.square().sum()


def best_teacher(setting: FusionSetting, _moment: Moment) -> int:
    """The place that is given, or the teacher that was right most often; ties to the first."""
    return int(np.argmax(setting.accuracies)) if setting.teacher is None else setting.teacher


def random_teacher(setting: FusionSetting, moment: Moment) -> int:
    """One teacher per batch, by (seed, epoch, batch)."""
    words = random_words(setting.seed, np.array([moment.batch]), moment.epoch, Purpose.TEACHER)
    return int(below(words[:, 0], setting.teachers)[0])


def _plain(weigh: Weigh) -> Callable[[FusionSetting], Weigh]:
    return lambda _setting: weigh


_equal = _plain(lambda _facts: None)

FUSIONS: dict[str, Fusion] = {
    "fixed": Fusion(
        formula="w_k as given in teacher_weights; 1/K if none are",
        source="Hinton, Vinyals and Dean 2015, arXiv 1503.02531",
        combine="mixture",
        make=lambda setting: Fixed(setting.weights),
    ),
    "uniform": Fusion(
        formula="w_k = 1/K",
        source="mean of divergences, as AVER in the release of CA-MKD",
        combine="sum",
        make=_equal,
    ),
    "best": Fusion(
        formula="w_k = 1 for one teacher; the others are not read",
        source="the usual single-teacher baseline",
        combine="mixture",
        make=_equal,
        choose=best_teacher,
        numbers=("teacher",),
    ),
    "random": Fusion(
        formula="w_k = 1 for one teacher, drawn anew for every batch; the others are not read",
        source="Shen, He and Xue 2019 (MEAL), arXiv 1812.02425, section 3",
        combine="mixture",
        make=_equal,
        choose=random_teacher,
    ),
    "confidence": Fusion(
        formula="w_k = (1 - softmax_k(CE(z_k, y))) / (K - 1)",
        source="Zhang, Chen and Wang 2022 (CA-MKD), arXiv 2201.00007, equation 2",
        combine="sum",
        make=_plain(lambda facts: confidence_weights(label_cross_entropy(facts))),
    ),
    "entropy": Fusion(
        formula="w_k = (1 - H_k / sum_j H_j) / (K - 1)",
        source="Kwon et al. 2020 (EBKD), as in the release of CA-MKD",
        combine="sum",
        make=_plain(lambda facts: entropy_weights(teacher_stats(facts.teachers.logits).entropy)),
    ),
    "adaptive": Fusion(
        formula="w_k = softmax_k(v . (theta_k * beta)), beta the student's representation",
        source="Liu, Zhang and Wang 2020 (AMTML-KD), arXiv 2103.04062, section 3.2",
        combine="mixture",
        make=lambda setting: Adaptive(setting.teachers, setting.width, init=setting.init, seed=setting.seed),
        needs_representation=True,
        numbers=("layer", "l2", "init", "joint_epochs"),
    ),
}
