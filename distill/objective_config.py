"""Config of an objective. A method is a named objective config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from coursepack.config import Config, OneOf, merge_values
from coursepack.distill.exchange import EXCHANGES
from coursepack.distill.exchange.base import ExchangeConfig
from coursepack.distill.exchange.outputs import OutputsConfig
from coursepack.distill.fusion import FUSIONS
from coursepack.distill.fusion.base import FusionConfig
from coursepack.distill.fusion.temperature import DynamicTemperatureConfig
from coursepack.distill.fusion.weights import FixedConfig
from coursepack.distill.losses import LOSSES
from coursepack.distill.losses.base import Needs, Step, TermConfig
from coursepack.distill.losses.label import LabelConfig
from coursepack.distill.losses.soft_target import Divergence, SoftTargetConfig
from coursepack.distill.schedule import (
    Schedule,
    Temperature,
    TemperatureSchedule,
    Weight,
    is_used,
    range_of,
)
from coursepack.problems import lines_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from coursepack.distill.losses.base import BuildContext

Adjustment = Literal["none", "shift", "smooth"]
AnyTerm = Annotated[TermConfig, OneOf("term", {name: loss.config for name, loss in LOSSES.items()})]
AnyFusion = Annotated[FusionConfig, OneOf("name", {name: fusion.config for name, fusion in FUSIONS.items()})]
AnyExchange = Annotated[ExchangeConfig, OneOf("name", {name: row.config for name, row in EXCHANGES.items()})]
SOFT_TARGET, CROSS_ENTROPY, LABEL_SMOOTHING = "soft_target", "cross_entropy", "label_smoothing"


class ObjectiveConfig(Config):
    """Config of the loss terms, the fusion of teachers and the temperature."""

    soft_weight: Weight = 0.0
    """Weight of the soft-target loss T² D(teachers || student), or its schedule over epochs."""
    hard_weight: Weight = 1.0
    """Weight of the cross-entropy to the labels, or its schedule over epochs."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing of the cross-entropy (Szegedy et al. 2016, arXiv 1512.00567)."""
    temperature: Temperature | TemperatureSchedule = 4.0
    """Temperature of teachers and student, or its schedule over epochs; T_0 of a dynamic temperature."""
    dynamic_temperature: DynamicTemperatureConfig = DynamicTemperatureConfig()
    """Temperature per sample."""
    standardize: bool = False
    """Standardize the logits of teachers and student, each row to mean 0 and deviation 1, before they are
    divided by the temperature and compared (Sun et al. 2024, arXiv 2403.01427); the cross-entropy takes them
    as they are."""
    adjustment: Adjustment | tuple[Adjustment, ...] = "none"
    """Adjustment of wrong predictions of teachers: one for all teachers, or one per teacher."""
    smoothing: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Epsilon of the adjustment `smooth`."""
    divergence: Divergence = "kl"
    """Divergence of the student from the soft targets, see `coursepack.kernels.soft_target_loss`."""
    combine: Literal["auto", "mixture", "sum"] = "auto"
    """Divergence from the mixture of teachers, or weighted sum of divergences; auto takes the published form
    of the fusion."""
    fusion: AnyFusion = FixedConfig()
    """Fusion, which determines the teachers' weights."""
    terms: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], AnyTerm] = Field(default={})
    """Additional loss terms by key. A key is the name of a loss, unless field `term` names the loss."""
    exchange: AnyExchange = OutputsConfig()
    """Exchange between students that train together, which makes the targets of term `mutual`."""
    peers: dict[str, Any] = Field(default={})
    """Fields of the objective that have other values for the peers than for the student."""

    def for_peers(self) -> ObjectiveConfig:
        """Return the objective of the peers: this one with the fields in `peers` replaced."""
        if not self.peers:
            return self
        values = self.model_dump(mode="json", exclude={"peers"})
        merge_values(values, self.peers)
        return ObjectiveConfig.model_validate(values)

    def all_terms(self) -> dict[str, TermConfig]:
        """Return all terms with a nonzero weight by key: soft targets and labels first, the fusion's last."""
        terms: dict[str, TermConfig] = {}
        hard = self._scaled(self.hard_weight, 1 - self.label_smoothing)
        if is_used(self.soft_weight):
            terms[SOFT_TARGET] = SoftTargetConfig(
                weight=self.soft_weight, hard_weight=hard, divergence=self.divergence, combine=self.combine
            )
        else:
            terms[CROSS_ENTROPY] = LabelConfig(weight=hard)
        if self.label_smoothing:
            weight = self._scaled(self.hard_weight, self.label_smoothing)
            terms[LABEL_SMOOTHING] = LabelConfig(weight=weight, target="uniform")
        terms |= {key: term for key, term in self.terms.items() if is_used(term.weight)}
        trains = FUSIONS[self.fusion.name].trained_by
        fuses = any(LOSSES[term.term].needs(term).fused for term in terms.values())
        if trains and fuses and trains not in self.terms:
            terms[trains] = LOSSES[trains].config(term=trains)
        return terms

    @staticmethod
    def _scaled(weight: float | Schedule, factor: float) -> float | Schedule:
        if isinstance(weight, Schedule):
            return weight.model_copy(update={"start": weight.start * factor, "end": weight.end * factor})
        return weight * factor

    def needs(self) -> Needs:
        """Return the union of the needs of all terms and the fusion."""
        needs = Needs()
        for term in self.all_terms().values():
            if is_used(term.weight):  # a cross-entropy of weight 0 stands for having no other term
                needs |= LOSSES[term.term].needs(term)
        if needs.peers:
            row = EXCHANGES[self.exchange.name]
            layers = (
                Needs(last_map=f"exchange {self.exchange.name!r}") if row.layers == "last map" else Needs()
            )
            needs |= row.needs(self.exchange) | layers | Needs(joint=row.joint)
        if not needs.fused:
            return needs
        adjusted = self.adjustment != "none" and set(self.adjustment) != {"none"}
        return (
            needs
            | FUSIONS[self.fusion.name].needs(self.fusion)
            | self.dynamic_temperature.needs()
            | Needs(
                teacher_logits=True,
                dense_logits="logit standardization" if self.standardize else "",
                labels=adjusted,
                one_label=f"adjustment is {self.adjustment!r}" if adjusted else "",
            )
        )

    def logits_read(self, context: BuildContext) -> tuple[int, ...]:
        """Return the indices of the teachers whose logits are read in any step."""
        needs, fusion = self.needs(), FUSIONS[self.fusion.name]
        if needs.fused and fusion.constant and fusion.choose is not None:
            chosen = fusion.choose(self.fusion, context, Step())
            return () if chosen is None else (chosen,)
        return tuple(range(context.teachers)) if needs.logits else ()

    def adjustments(self, indices: Sequence[int]) -> tuple[str, ...]:
        """Return the adjustments of the teachers with the given indices."""
        if isinstance(self.adjustment, str):
            return (self.adjustment,) * len(indices)
        return tuple(self.adjustment[index] for index in indices)

    @field_validator("terms", mode="before")
    @classmethod
    def _name_terms(cls, terms: Any) -> Any:
        """Set `term` of each term to its key by default, and remove terms that are null."""
        if not isinstance(terms, dict):
            return terms
        named = {}
        for key, term in terms.items():
            if isinstance(term, dict):
                named[key] = {"term": key, **term}
            elif term is not None:
                named[key] = term
        return named

    @field_validator("fusion", mode="before")
    @classmethod
    def _name_fusion(cls, fusion: Any) -> Any:
        return {"name": "fixed", **fusion} if isinstance(fusion, dict) else fusion

    @field_validator("exchange", mode="before")
    @classmethod
    def _name_exchange(cls, exchange: Any) -> Any:
        return {"name": "outputs", **exchange} if isinstance(exchange, dict) else exchange

    @model_serializer(mode="wrap")
    def _leave_out(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out fields for peers with default values, so that other objectives are written as before."""
        values: dict[str, Any] = handler(self)
        unused = {"exchange": self.exchange == OutputsConfig(), "peers": not self.peers}
        return {name: value for name, value in values.items() if not unused.get(name)}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        needs = self.needs()
        try:
            self.for_peers()
        except ValidationError as error:
            raise ValueError(f"peers.{lines_of(ObjectiveConfig, error)[0]}") from error
        if FUSIONS[self.fusion.name].choose is not None and needs.every_teacher:
            raise ValueError(
                f"{needs.every_teacher} need every teacher, "
                f"but fusion {self.fusion.name!r} reads one at a time"
            )
        self._check_phases()
        self._check_unified()
        dynamic = self.dynamic_temperature
        if dynamic.lowest > dynamic.highest:
            raise ValueError(
                f"dynamic_temperature.lowest is {dynamic.lowest:g}, above highest ({dynamic.highest:g})"
            )
        coldest, hottest = range_of(self.temperature)
        if dynamic.kind != "none" and not dynamic.lowest <= coldest <= hottest <= dynamic.highest:
            given = f"{coldest:g}" if coldest == hottest else f"from {coldest:g} to {hottest:g}"
            raise ValueError(
                f"temperature (T_0) is {given}, expected dynamic_temperature.lowest to highest "
                f"({dynamic.lowest:g} to {dynamic.highest:g}), within which each sample's temperature is kept"
            )
        smooths = needs.fused and "smooth" in (self.adjustment, *self.adjustment)
        if self.divergence == "mse" and smooths:
            raise ValueError(
                "adjustment 'smooth' returns probabilities, but divergence 'mse' compares logits: choose "
                "another adjustment or divergence"
            )
        return self

    def _check_unified(self) -> None:
        """Refuse what compares other than distributions at one temperature with the target of a fusion."""
        if not FUSIONS[self.fusion.name].unifies or not self.needs().fused:
            return
        terms = {key: LOSSES[term.term].needs(term) for key, term in self.all_terms().items()}
        values = next((needs.dense_logits for needs in terms.values() if needs.dense_logits), "")
        unfit = {
            "a dynamic temperature": self.dynamic_temperature.kind != "none",
            "standardize": self.standardize,
            "divergence 'mse'": self.divergence == "mse",
            "an adjustment for each teacher": not isinstance(self.adjustment, str),
            values: bool(values),
        }
        for name in filter(unfit.get, unfit):
            raise ValueError(
                f"fusion {self.fusion.name!r} makes one distribution of all teachers at one temperature, "
                f"which {name} cannot use: leave it out, or choose another fusion"
            )

    def _check_phases(self) -> None:
        """Refuse label phases without labels, and terms whose targets a fusion may leave out."""
        if self.fusion.has_label_phase and self.needs().fused and not is_used(self.hard_weight):
            raise ValueError(
                f"fusion {self.fusion.name!r} has a last phase on labels alone, but hard_weight is 0, so "
                "that nothing would be learned in it: give hard_weight above 0, or fusion.label_epochs=0"
            )
        if not FUSIONS[self.fusion.name].abstains:
            return
        fused = [
            key
            for key, term in self.all_terms().items()
            if key != SOFT_TARGET and LOSSES[term.term].needs(term).fused
        ]
        if fused:
            raise ValueError(
                f"terms.{fused[0]} compares the student with the mixture of teachers, but with fusion "
                f"{self.fusion.name!r} a sample may have no teacher: choose another fusion, or use "
                "soft_weight instead"
            )
        if self.combine == "mixture" and self.divergence != "kl":
            raise ValueError(
                f"divergence {self.divergence!r} of the mixture is not zero for a sample without teachers, "
                f"as fusion {self.fusion.name!r} may leave it: leave combine out, or use divergence 'kl'"
            )
