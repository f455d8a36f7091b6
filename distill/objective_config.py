"""The numbers of an objective's terms. A method is a named choice of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from coursepack.config import Config
from coursepack.distill.fusion import FUSIONS, FusionConfig
from coursepack.distill.hints import HintsConfig
from coursepack.distill.relations import RelationsConfig
from coursepack.distill.schedule import NotNegative, Weight, is_used
from coursepack.distill.temperature import DynamicTemperatureConfig, Temperature

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

Adjustment = Literal["none", "shift", "smooth"]
Divergence = Literal["kl", "reverse_kl", "js", "mse"]


class ObjectiveConfig(Config):
    """Numbers of the terms."""

    soft_weight: Weight = 0.0
    """Factor of T² D(teachers || student)."""
    hard_weight: Weight = 1.0
    """Factor of the cross-entropy to the labels."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the labels' probability that the cross-entropy spreads over all classes (Szegedy et al. 2016,
    arXiv 1512.00567)."""
    temperature: Temperature = 4.0
    """T of teachers and student; T_0 where every sample has its own."""
    adjustment: Adjustment | tuple[Adjustment, ...] = "none"
    """What to do with a teacher that is wrong: one for all, or one per teacher."""
    smoothing: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Epsilon of the adjustment `smooth`."""
    divergence: Divergence = "kl"
    """How soft targets are compared, as `coursepack.kernels.soft_target_loss` names it."""
    combine: Literal["auto", "mixture", "sum"] = "auto"
    """Divergence of the teachers' mixture, or weighted sum of divergences; auto: what the fusion is
    published with."""
    teacher_weights: tuple[NotNegative, ...] | None = None
    """Of the fusion `fixed`, one per teacher, in the order of the stores, taken as they are: their sum is a
    factor of the soft-target term's gradient. None means equal weights that sum to one."""
    fusion: FusionConfig = FusionConfig()
    """How much each teacher counts."""
    dynamic_temperature: DynamicTemperatureConfig = DynamicTemperatureConfig()
    """A temperature per sample."""
    relations: RelationsConfig = RelationsConfig()
    """Relations between the samples of a batch."""
    hints: HintsConfig = HintsConfig()
    """Teachers' features as targets."""
    term_weight: Weight = 1.0
    """Factor of the method's own term, where it has one."""
    term: dict[str, float | str] = Field(default={})
    """Arguments of the method's own term."""

    @property
    def uses_soft_targets(self) -> bool:
        """Whether the teachers' logits are looked at."""
        return is_used(self.soft_weight) or any(
            is_used(weight) for weight in (self.relations.angle, self.relations.distance)
        )

    @property
    def uses_hints(self) -> bool:
        """Whether the teachers' features are looked at."""
        return is_used(self.hints.weight)

    @property
    def needs_teachers(self) -> bool:
        """Whether it looks at teachers at all."""
        return self.uses_soft_targets or self.uses_hints

    @property
    def needs_one_label(self) -> bool:
        """Whether it needs one label per sample: adjustments do."""
        return self.uses_soft_targets and self.adjustment != "none" and set(self.adjustment) != {"none"}

    @property
    def batch_coupled(self) -> tuple[str, ...]:
        """What makes a sample's loss depend on the rest of its batch."""
        found = [name for name in ("angle", "distance") if is_used(getattr(self.relations, name))]
        dynamic = self.uses_soft_targets and self.dynamic_temperature.kind != "none"
        return (*found, *(["dynamic_temperature"] if dynamic else []))

    @property
    def adjustments_given(self) -> tuple[str, ...]:
        """The adjustments that are named: one for all teachers, or one of each."""
        return (self.adjustment,) if isinstance(self.adjustment, str) else self.adjustment

    def adjustments(self, places: Sequence[int]) -> tuple[str, ...]:
        """The adjustment of each of the teachers at some places."""
        if isinstance(self.adjustment, str):
            return (self.adjustment,) * len(places)
        return tuple(self.adjustment[place] for place in places)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.teacher_weights is not None and self.fusion.name != "fixed":
            raise ValueError(f"teacher_weights are for fusion 'fixed', but fusion is {self.fusion.name!r}")
        if self.teacher_weights is not None and not any(self.teacher_weights):
            raise ValueError("teacher_weights are all zero: give at least one teacher a weight above zero")
        if FUSIONS[self.fusion.name].choose is not None and self.uses_hints:
            raise ValueError(f"hints need every teacher, but fusion {self.fusion.name!r} asks one at a time")
        dynamic = self.dynamic_temperature
        if dynamic.lowest > dynamic.highest:
            raise ValueError(
                f"dynamic_temperature.lowest is {dynamic.lowest:g}, above highest ({dynamic.highest:g})"
            )
        if dynamic.kind != "none" and not dynamic.lowest <= self.temperature <= dynamic.highest:
            raise ValueError(
                f"temperature (T_0) is {self.temperature:g}, expected dynamic_temperature.lowest to highest "
                f"({dynamic.lowest:g} to {dynamic.highest:g}), within which each sample's temperature is kept"
            )
        if self.divergence == "mse" and self.needs_one_label and "smooth" in self.adjustments_given:
            raise ValueError(
                "adjustment 'smooth' makes probabilities, but divergence 'mse' compares logits: choose "
                "another of the two"
            )
        return self
