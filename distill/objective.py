"""The objective of a student: a weighted sum of named terms.

A term gives one value per sample, `(N,)`, or a scalar that is coupled over the batch. The objective takes
means over the batch (the field's `batchmean`) and adds them up; weights and the reduction live here and
nowhere else. The factor T² lives in `coursepack.kernels.soft_target_loss` (docs/decisions/reduction.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coursepack.data.store.manifest import LOGITS
from coursepack.distill.facts import Facts, Inside, Moment
from coursepack.distill.finite import cause_of, is_finite
from coursepack.distill.fusion import FUSIONS, Adaptive, FusionSetting
from coursepack.distill.hints import Hint, Hints
from coursepack.distill.relations import angle_loss, distance_loss, student_embedding
from coursepack.distill.schedule import is_used, value_at
from coursepack.distill.targets import FEATURES
from coursepack.distill.temperature import SampleTemperatures, fused_logits, sample_temperatures
from coursepack.errors import RecipeError, TrainingDiverged
from coursepack.kernels import MixedLabels, soft_target_loss, soft_targets

if TYPE_CHECKING:
    from collections.abc import Callable

    from coursepack.distill.objective_config import ObjectiveConfig
    from coursepack.distill.targets import Targets

IGNORED = -100
"""A label that adds no cross-entropy, as in torch."""


@dataclass(frozen=True)
class Setting:
    """What an objective is built for, beside its config."""

    fusion: FusionSetting
    hints: tuple[Hint, ...] = ()
    term: Callable[..., Tensor] | None = None
    """The method's own term."""
    seed: int = 0
    """Of initial adapters."""


@dataclass(frozen=True)
class ObjectiveValue:
    """What an objective says about a batch."""

    loss: Tensor
    """The sum of all terms, a scalar with gradient."""
    terms: dict[str, Tensor]
    """Each term's share of it, scalars without gradient."""
    weights: Tensor | None = None
    """What each asked teacher counted, `(N, K)` or `(K,)`, without gradient; None means 1/K."""
    adjustments: tuple[str, ...] = ()
    """Of each asked teacher."""
    temperatures: SampleTemperatures | None = None
    """Where every sample has its own."""
    targets: Targets | None = None
    """What the chosen teachers said; None where no soft targets are made of it."""


@dataclass
class _Soft:
    """The soft targets of a batch: what several terms share."""

    weights: Tensor | None
    adjustments: tuple[str, ...]
    temperatures: SampleTemperatures | None
    temperature: float | Tensor


class Objective(nn.Module):
    """The weighted sum of a config's terms, with everything in it that learns."""

    def __init__(self, config: ObjectiveConfig, setting: Setting | None = None) -> None:
        """Build it.

        Args:
            config: its numbers.
            setting: what they are fitted to, as `make_objective` does it; None for objectives that look at
                teachers' logits alone and weigh all teachers by a rule.

        Raises:
            RecipeError: it has to be fitted to teachers or to a student, and is not.
        """
        super().__init__()
        self.config = config
        self.kind = FUSIONS[config.fusion.name]
        fitted = config.uses_hints or self.needs_representation or self.kind.choose is not None
        if setting is None and fitted:
            what = "hints" if config.uses_hints else f"fusion {config.fusion.name!r}"
            raise RecipeError(
                f"an objective with {what} has to be fitted to its teachers and its student: build it with "
                "make_objective(course, student, method)"
            )
        self.setting = setting or Setting(FusionSetting(weights=config.teacher_weights))
        self.fusion = self.kind.make(self.setting.fusion)
        self.hints = Hints(self.setting.hints, seed=self.setting.seed) if self.setting.hints else None

    @property
    def student_layers(self) -> tuple[str, ...]:
        """Layers of the student whose outputs it looks at."""
        layers = {hint.layer for hint in self.setting.hints}
        if self.needs_representation and self.config.fusion.layer is not None:
            layers.add(self.config.fusion.layer)
        return tuple(sorted(layers))

    @property
    def needs_representation(self) -> bool:
        """Whether it looks at a representation of the sample inside the student."""
        return self.config.uses_soft_targets and self.kind.needs_representation

    def arrays(self, place: int) -> list[str]:
        """What it looks at in the store of the teacher at a place."""
        logits = self.config.uses_soft_targets or self.setting.term is not None
        taps = [f"{FEATURES}{hint.tap}" for hint in self.setting.hints if hint.teacher == place]
        return list(dict.fromkeys([*([LOGITS] if logits else []), *taps]))

    @property
    def may_couple(self) -> bool:
        """Whether a sample's loss may depend on its batch; a method's own term may give a scalar."""
        return bool(self.config.batch_coupled) or self.setting.term is not None

    def begin_epoch(self, epoch: int) -> None:
        """Freeze or release what a schedule of phases says."""
        joint = self.config.fusion.joint_epochs
        if isinstance(self.fusion, Adaptive):
            self.fusion.requires_grad_(joint is None or epoch < joint)

    def fusion_parameters(self) -> list[nn.Parameter]:
        """What the fusion learns."""
        return list(self.fusion.parameters()) if isinstance(self.fusion, nn.Module) else []

    def chosen_teacher(self, moment: Moment) -> int | None:
        """Place of the only teacher that is asked for a batch; None where all are."""
        if self.kind.choose is None or not self.config.uses_soft_targets:
            return None
        return self.kind.choose(self.setting.fusion, moment)

    def forward(
        self,
        student_logits: Tensor,
        labels: Tensor | MixedLabels,
        targets: Targets | None,
        inside: Inside | None = None,
        moment: Moment | None = None,
    ) -> ObjectiveValue:
        """Value on one batch, in float32 under autocast too.

        Args:
            student_logits: `(N, C)`.
            labels: `(N,)` int64, or two and a share where images are mixed.
            targets: what the teachers say, of all of them or at least of the chosen one; None where no term
                needs them.
            inside: what was caught inside the student; None where no term needs it.
            moment: epoch and batch, for schedules and draws.
        """
        moment = moment or Moment()
        chosen = self.chosen_teacher(moment)
        if targets is not None and chosen is not None:
            targets = targets.only(chosen)
        with torch.autocast(student_logits.device.type, enabled=False):
            return self._value(Facts(student_logits, inside or Inside(), labels, targets, moment))

    def _value(self, facts: Facts) -> ObjectiveValue:
        student_logits, labels, moment = facts.student_logits, facts.labels, facts.moment
        means: dict[str, Tensor] = {}
        soft = self._soft(facts) if self.config.uses_soft_targets else None
        if soft is None:
            means["cross_entropy"] = self._label_weight(moment) * cross_entropy(student_logits, labels).mean()
        else:
            means["soft_target"] = self._soft_target(facts, soft).mean()
            means |= self._relations(facts, soft)
        if self.config.label_smoothing:
            factor = self.config.label_smoothing * self._hard_weight(moment)
            means["label_smoothing"] = factor * uniform_cross_entropy(student_logits, labels).mean()
        if self.hints is not None:
            means["hints"] = value_at(self.config.hints.weight, moment.epoch) * self.hints(facts).mean()
        if isinstance(self.fusion, Adaptive) and soft is not None and self.fusion.latents.requires_grad:
            means["latents"] = self.config.fusion.l2 * self.fusion.squared_norm()
        if self.setting.term is not None:
            weight = value_at(self.config.term_weight, moment.epoch)
            means["term"] = weight * self.setting.term(facts, **self.config.term).mean()
        return ObjectiveValue(
            loss=torch.stack(list(means.values())).sum(),
            terms={name: value.detach() for name, value in means.items()},
            weights=None if soft is None or soft.weights is None else soft.weights.detach(),
            adjustments=() if soft is None else soft.adjustments,
            temperatures=None if soft is None else soft.temperatures,
            targets=None if soft is None else facts.targets,
        )

    def _hard_weight(self, moment: Moment) -> float:
        return value_at(self.config.hard_weight, moment.epoch)

    def _label_weight(self, moment: Moment) -> float:
        """What label smoothing leaves of the cross-entropy to the labels themselves."""
        return self._hard_weight(moment) * (1 - self.config.label_smoothing)

    def _soft(self, facts: Facts) -> _Soft:
        teachers = facts.teachers
        weights = self.fusion(facts)
        self._check_finite("a teacher's weight", weights, facts)
        adjustments = self.config.adjustments(teachers.places)
        dynamic = self.config.dynamic_temperature
        if dynamic.kind == "none":
            return _Soft(weights, adjustments, None, self.config.temperature)
        fused = None
        if dynamic.kind == "flsw":
            labels = None if isinstance(facts.labels, MixedLabels) else facts.labels
            with torch.no_grad():
                fused = fused_logits(teachers.logits, weights, labels, adjustments)
        temperatures = sample_temperatures(
            facts.student_logits, fused, base=self.config.temperature, **dynamic.model_dump()
        )
        self._check_finite("a sample's temperature", temperatures.values, facts)
        return _Soft(weights, adjustments, temperatures, temperatures.values)

    def _check_finite(self, name: str, values: Tensor | None, facts: Facts) -> None:
        """Say that training diverged before the loss refuses its arguments; on the CPU, where it does."""
        if values is None or values.device.type != "cpu" or is_finite(values):
            return
        cause, advice = cause_of(facts, self.fusion)
        raise TrainingDiverged(
            f"training diverged in epoch {facts.moment.epoch}: {name} is not finite, since {cause}. {advice}"
        )

    def _soft_target(self, facts: Facts, soft: _Soft) -> Tensor:
        """Fused soft targets of the teachers, with the cross-entropy in the same pass, `(N,)`."""
        config = self.config
        return soft_target_loss(
            facts.student_logits,
            facts.teachers.logits,
            facts.labels,
            weights=soft.weights,
            temperature=soft.temperature,
            adjustment=soft.adjustments,
            smoothing=config.smoothing,
            combine=self.kind.combine if config.combine == "auto" else config.combine,
            soft_weight=value_at(config.soft_weight, facts.moment.epoch),
            hard_weight=self._label_weight(facts.moment),
            divergence=config.divergence,
        )

    def _relations(self, facts: Facts, soft: _Soft) -> dict[str, Tensor]:
        relations = self.config.relations
        losses = {"angle": angle_loss, "distance": distance_loss}
        used = {name: loss for name, loss in losses.items() if is_used(getattr(relations, name))}
        if not used:
            return {}
        labels = facts.labels if isinstance(facts.labels, Tensor) else None
        theirs = soft_targets(
            facts.teachers.logits,
            labels,
            weights=None if soft.weights is None else soft.weights.detach(),
            temperature=soft.temperature,
            adjustment=soft.adjustments,
            smoothing=self.config.smoothing,
        )
        ours = student_embedding(facts.student_logits, relations.student, soft.temperature)
        epoch = facts.moment.epoch
        return {
            name: value_at(getattr(relations, name), epoch) * loss(ours, theirs)
            for name, loss in used.items()
        }


def cross_entropy(student_logits: Tensor, labels: Tensor | MixedLabels) -> Tensor:
    """Cross-entropy `(N,)` to hard or mixed labels, float32, nats."""
    logits = student_logits.float()
    if not isinstance(labels, MixedLabels):
        return F.cross_entropy(logits, labels, reduction="none")
    first, second = (F.cross_entropy(logits, ids, reduction="none") for ids in (labels.first, labels.second))
    return labels.lam * first + (1 - labels.lam) * second


def uniform_cross_entropy(student_logits: Tensor, labels: Tensor | MixedLabels) -> Tensor:
    """Cross-entropy `(N,)` to the uniform distribution over the classes, float32, nats; 0 without a label."""
    logits = student_logits.float()
    values = logits.logsumexp(1) - logits.mean(1)
    return values if isinstance(labels, MixedLabels) else values.masked_fill(labels == IGNORED, 0)
