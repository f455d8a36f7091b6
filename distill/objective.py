"""Objective of a student: a weighted sum of loss terms.

A term returns one value per sample, `(N,)`, their mean, or a scalar that couples the samples of a batch. The
objective takes means over the batch (torch's `batchmean`), applies the weights and adds the terms up. The
factor T² is applied in `coursepack.kernels.soft_target_loss` (docs/decisions/reduction.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coursepack.distill.finite import cause_of, is_finite
from coursepack.distill.fusion import FUSIONS
from coursepack.distill.fusion.fused import FusedTargets, dynamic_temperatures, standardized
from coursepack.distill.losses import LOSSES
from coursepack.distill.losses.base import BuildContext, LossInputs, Step
from coursepack.distill.schedule import value_at
from coursepack.errors import RecipeError, TrainingDiverged
from coursepack.kernels import MixedLabels, decode

if TYPE_CHECKING:
    from coursepack.distill.fusion.temperature import SampleTemperatures
    from coursepack.distill.losses.base import TermConfig
    from coursepack.distill.objective_config import ObjectiveConfig
    from coursepack.distill.targets.base import Targets


@dataclass(frozen=True)
class ObjectiveValue:
    """Value of an objective on a batch."""

    loss: Tensor
    """Sum of all terms, a scalar with gradient."""
    terms: dict[str, Tensor]
    """Weighted value of each term, scalars without gradient."""
    weights: Tensor | None = None
    """Weight of each teacher that was read, `(N, K)` or `(K,)`, without gradient; None means 1/K."""
    adjustments: tuple[str, ...] = ()
    """Adjustment of each teacher that was read."""
    temperatures: SampleTemperatures | None = None
    """Temperatures per sample; None if all samples share one."""
    targets: Targets | None = None
    """Targets of the teachers that were read; None if the objective does not fuse them."""
    unified: Tensor | None = None
    """Logits `(N, C)` of all teachers together at the objective's temperature, if the fusion unifies them."""


class Objective(nn.Module):
    """Weighted sum of loss terms, with the parameters of terms and fusion."""

    def __init__(self, config: ObjectiveConfig, context: BuildContext | None = None) -> None:
        """Build the terms and the fusion of a config.

        Args:
            config: the objective's config.
            context: properties of teachers, student and source, as found by `make_objective`; may be None if
                the objective reads only teachers' logits and its fusion reads all teachers.

        Raises:
            RecipeError: the objective needs a context, but `context` is None.
        """
        super().__init__()
        self.config = config
        self.needs = config.needs()
        self.fusion_kind = FUSIONS[config.fusion.name]
        fitted = self.needs.pairs is not None or self.needs.embedding or self.fusion_kind.choose is not None
        if context is None and fitted:
            pairs = self.needs.every_teacher if self.needs.pairs is not None else ""
            reason = pairs or f"fusion {config.fusion.name!r}"
            raise RecipeError(
                f"an objective with {reason} has to be fitted to its teachers and its student: build it with "
                "make_objective(stores, student, method)"
            )
        self.context = replace(context or BuildContext(), temperature=config.temperature)
        self.fusion = self.fusion_kind.build(config.fusion, self.context)
        self.term_configs: dict[str, TermConfig] = config.all_terms()
        self.terms = nn.ModuleDict(
            {
                key: LOSSES[term.term].build(term, self.context.for_term(key))
                for key, term in self.term_configs.items()
            }
        )

    @property
    def student_layers(self) -> tuple[str, ...]:
        """Names of the student layers whose outputs are read."""
        layers = {
            layer for pairs in self.context.pairs_by_term.values() for pair in pairs for layer in pair.layers
        }
        layer = self.needs.embedding_layer if self.needs.embedding else None
        return tuple(
            sorted({*layers, *self.needs.student_layers, *filter(None, (layer, self.context.last_map))})
        )

    def taps(self, teacher: int) -> list[str]:
        """Return the names of the taps that are read from a teacher, by its index."""
        pairs = (pair for of_term in self.context.pairs_by_term.values() for pair in of_term)
        return list(dict.fromkeys(pair.tap for pair in pairs if pair.teacher == teacher))

    def begin_epoch(self, epoch: int) -> None:
        """Start an epoch: call `begin_epoch` of the fusion and the terms that have it."""
        for module in self._modules_with("begin_epoch"):
            module.begin_epoch(epoch)

    @property
    def keeps_memory(self) -> bool:
        """True if a term has a method `after_step`."""
        return bool(self._modules_with("after_step"))

    def after_step(self, inputs: LossInputs) -> None:
        """Call `after_step` of the terms that have it, after an optimizer step."""
        for module in self._modules_with("after_step"):
            module.after_step(inputs)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return parameter groups with their own optimizer settings."""
        return [
            group for module in self._modules_with("parameter_groups") for group in module.parameter_groups()
        ]

    def teachers_read(self, step: Step) -> tuple[int, ...] | None:
        """Return the indices of the teachers that are read for a batch: one, none, or None for all."""
        if self.fusion_kind.choose is None or not self.needs.fused:
            return None
        chosen = self.fusion_kind.choose(self.config.fusion, self.context, step)
        return () if chosen is None else (chosen,)

    def teachers_of_epoch(self, epoch: int) -> tuple[int, ...] | None:
        """Return the indices of the teachers that an epoch may read, or None for all."""
        return None if self.fusion_kind.every_batch else self.teachers_read(Step(epoch))

    def forward(self, inputs: LossInputs) -> ObjectiveValue:
        """Return the value on one batch, computed with autocast disabled.

        Args:
            inputs: student outputs, labels, targets of at least the teachers that are read, and step.
        """
        chosen = self.teachers_read(inputs.step)
        targets = inputs.targets
        if targets is not None and chosen is not None:
            targets = targets.only(chosen[0]) if chosen else None
        fusion = self.fusion if isinstance(self.fusion, nn.Module) else None
        with torch.autocast(inputs.student.logits.device.type, enabled=False):
            inputs = replace(inputs, targets=targets, fusion=fusion)
            if not self.needs.fused or chosen == ():
                return self._value(inputs)
            if self.fusion_kind.unifies:
                return self._unified_value(inputs)
            return self._value(replace(inputs, fused=self._fuse(inputs)))

    def _unified_value(self, inputs: LossInputs) -> ObjectiveValue:
        """Return the value with one row of logits in the place of those of all teachers."""
        fusion: Any = self.fusion
        temperature = value_at(self.config.temperature, inputs.step.epoch)
        unified = fusion.unify(inputs.teachers.logits, temperature)
        together = replace(inputs, targets=replace(inputs.teachers, logits=[unified], teachers=(0,)))
        return replace(
            self._value(replace(together, fused=self._fuse(together))),
            adjustments=self.config.adjustments(inputs.teachers.indices),
            targets=inputs.targets,
            unified=unified,
        )

    def _value(self, inputs: LossInputs) -> ObjectiveValue:
        means: dict[str, Tensor] = {}
        for key, config in self.term_configs.items():
            values = self._values(key, inputs)
            if values is None:
                continue
            mean = values.mean() if values.ndim else values
            weighted = LOSSES[config.term].applies_weight
            means[key] = mean if weighted else value_at(config.weight, inputs.step.epoch) * mean
        fused = inputs.fused
        return ObjectiveValue(
            loss=torch.stack(list(means.values())).sum(),
            terms={key: value.detach() for key, value in means.items()},
            weights=None if fused is None or fused.weights is None else fused.weights.detach(),
            adjustments=() if fused is None else fused.adjustments,
            temperatures=None if fused is None else fused.temperatures,
            targets=None if fused is None else inputs.targets,
        )

    def _values(self, key: str, inputs: LossInputs) -> Tensor | None:
        """Return the values of a term; in a phase without teachers, those of its part that reads none."""
        module: Any = self.terms[key]
        config = self.term_configs[key]
        if inputs.fused is not None or not LOSSES[config.term].needs(config).fused:
            values: Tensor | None = module(inputs)
            return values
        return module.without_teachers(inputs) if hasattr(module, "without_teachers") else None

    def _fuse(self, inputs: LossInputs) -> FusedTargets:
        config, teachers = self.config, inputs.teachers
        temperature = value_at(config.temperature, inputs.step.epoch)
        weights = self.fusion(inputs)
        self._check_finite("a teacher's weight", weights, inputs)
        adjustments = config.adjustments(teachers.indices)
        own = dynamic_temperatures(config.dynamic_temperature, temperature, inputs, weights, adjustments)
        if own is not None:
            self._check_finite("a sample's temperature", own.values, inputs)
        logits = teachers.logits
        if config.standardize:
            logits = [standardized(decode(each).detach()) for each in logits]
        return FusedTargets(
            logits,
            None if isinstance(inputs.labels, MixedLabels) else inputs.labels,
            weights,
            adjustments,
            config.smoothing,
            temperature if own is None else own.values,
            own,
            self.fusion_kind.combine,
            config.standardize,
        )

    def _check_finite(self, name: str, values: Tensor | None, inputs: LossInputs) -> None:
        """Raise `TrainingDiverged` before the loss rejects NaN arguments, which it does on the CPU only."""
        if values is None or values.device.type != "cpu" or is_finite(values):
            return
        cause, advice = cause_of(inputs, self.fusion)
        raise TrainingDiverged(
            f"training diverged in epoch {inputs.step.epoch}: {name} is not finite, since {cause}. {advice}"
        )

    def _modules_with(self, method: str) -> list[Any]:
        """Return the fusion and the terms that have a method of the given name."""
        return [module for module in (self.fusion, *self.terms.values()) if hasattr(module, method)]
