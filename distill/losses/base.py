"""Loss terms: what a term declares that it needs, what it is built from, and its inputs for one batch.

A term is a `Loss` row in `coursepack.distill.losses.LOSSES`: its numbers (a `TermConfig`), what follows from
the numbers alone (`Needs`), and a function that builds the module. The module maps `LossInputs` to values per
sample `(N,)`, or to a scalar that is coupled over the batch. Weights, schedules and the mean over the batch
are the objective's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from coursepack.config import Config
from coursepack.distill.schedule import Weight
from coursepack.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from coursepack.distill.fusion.fused import FusedTargets
    from coursepack.distill.targets.stores import Targets
    from coursepack.kernels import MixedLabels


@dataclass(frozen=True)
class Step:
    """Position in training, on which schedules and random draws depend."""

    epoch: int = 0
    batch: int = 0
    """Index of the batch within its epoch."""
    micro_batch: int = 0
    """Index of the micro-batch within its batch, where gradients are accumulated."""


@dataclass(frozen=True)
class StudentOutput:
    """Output of one student for a batch, with gradient."""

    logits: Tensor
    """`(N, C)`."""
    embedding: Tensor | None = None
    """`(N, D)`: the input of the student's head, or a layer's maximum over positions."""
    features: Mapping[str, Tensor] = field(default_factory=dict)
    """Outputs `(N, ...)` of watched layers by layer name."""

    def float(self) -> StudentOutput:
        """Return the same output in float32."""
        return self.map(lambda value: value.float())

    def map(self, change: Callable[[Tensor], Tensor]) -> StudentOutput:
        """Return the output with a function applied to every tensor."""
        embedding = None if self.embedding is None else change(self.embedding)
        features = {name: change(value) for name, value in self.features.items()}
        return StudentOutput(change(self.logits), embedding, features)


@dataclass(frozen=True)
class LossInputs:
    """Inputs of a loss term for one batch: student outputs, labels, teacher targets and training step."""

    student: StudentOutput
    labels: Tensor | MixedLabels
    """Class ids `(N,)` int64, or two and a share per sample where images are mixed."""
    targets: Targets | None = None
    """Targets of the teachers; None where no term of the objective needs them."""
    step: Step = Step()
    samples: NDArray[np.int64] | None = None
    """Sample indices `(N,)`, for terms that keep a memory of the samples."""
    peers: tuple[StudentOutput, ...] = ()
    """Outputs of the other students that train together with this one, detached."""
    fused: FusedTargets | None = None
    """Targets of all teachers fused into one; set by the objective where a term needs it."""
    fusion: nn.Module | None = None
    """The objective's fusion, for terms that penalize or train its parameters."""

    @property
    def teachers(self) -> Targets:
        """The targets of the teachers.

        Raises:
            RecipeError: there are none.
        """
        if self.targets is None:
            raise RecipeError("this objective needs teachers, but was given no targets")
        return self.targets

    @property
    def soft(self) -> FusedTargets:
        """The fused targets.

        Raises:
            RecipeError: the term did not declare `fused` in its needs.
        """
        if self.fused is None:
            raise RecipeError("this term reads the fused targets, but its needs do not declare them")
        return self.fused


class PairChoice(Config):
    """One teacher's tap that is compared with one of the student's layers."""

    teacher: Annotated[int, Field(ge=0)]
    """Index of the teacher's store."""
    tap: str
    """LAYER[:REDUCTION[:SIZE]] in its store."""
    layer: str
    """The student's layer."""


@dataclass(frozen=True)
class PairNeeds:
    """Pairs of a teacher's tap and a student's layer that a term compares."""

    pairs: tuple[PairChoice, ...] = ()
    """The pairs; empty means one per teacher, chosen by depth."""
    layers: tuple[str, ...] = ()
    """The student's layers to choose from by depth, shallow to deep; empty means all its blocks."""
    reductions: tuple[str, ...] = ("map", "pooled")
    """Reductions of the taps that the term can compare."""


@dataclass(frozen=True)
class FeaturePair:
    """A pair with the shapes of one sample's features."""

    teacher: int
    tap: str
    """Name of the tap in its store."""
    layer: str
    teacher_shape: tuple[int, ...]
    student_shape: tuple[int, ...]


@dataclass(frozen=True)
class Needs:
    """Everything that a term, a fusion or an objective must be given, known from its numbers alone.

    Which arrays of the stores are read, which layers are watched, and what a recipe is refused for follow
    from it. A text field is empty where the need does not exist, and otherwise says in an error what has it.
    """

    teacher_logits: bool = False
    fused: bool = False
    """The teachers' targets fused into one; implies their logits."""
    dense_logits: str = ""
    """All logits of a teacher: top-k rows do not suffice."""
    pairs: PairNeeds | None = None
    """Features of teachers and student layers."""
    embedding: str = ""
    """An embedding of each sample inside the student."""
    embedding_layer: str | None = None
    """The layer it is taken from; None means the input of the student's head."""
    student_layers: tuple[str, ...] = ()
    """Further layers of the student whose outputs are read."""
    one_label: str = ""
    """One label per sample: mixed images have two."""
    whole_batch: tuple[str, ...] = ()
    """Everything that makes a sample's loss depend on the rest of its batch, by name."""
    every_teacher: str = ""
    """The targets of all teachers in every batch: a fusion that asks one at a time does not fit."""
    peers: str = ""
    """Other students that train together with this one."""

    @property
    def logits(self) -> bool:
        """True if the teachers' logits are read."""
        return self.teacher_logits or self.fused

    @property
    def teachers(self) -> bool:
        """True if any teacher is read."""
        return self.logits or self.pairs is not None

    @property
    def inside_student(self) -> tuple[str, ...]:
        """Names of what reads inside the student, for the refusal of a compiled one."""
        layers = ["hints"] if self.pairs is not None or self.student_layers else []
        return (*layers, *([self.embedding] if self.embedding else []))

    def __or__(self, other: Needs) -> Needs:
        """Join two needs: flags and texts add up; only the first one's pairs are kept (see `Objective`)."""
        joined: dict[str, Any] = {}
        for each in fields(self):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            if isinstance(mine, tuple):
                joined[each.name] = tuple(dict.fromkeys((*mine, *theirs)))
            else:
                joined[each.name] = mine or theirs
        return Needs(**joined)


class TermConfig(Config):
    """Base of every term's numbers."""

    term: str
    """A name in `LOSSES`; the key of the term where it is left out."""
    weight: Weight = 1.0
    """Factor of the term, or its schedule over epochs."""

    @model_serializer(mode="wrap")
    def _keep_term(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"term": self.term, **handler(self)}


@dataclass(frozen=True)
class BuildContext:
    """Everything that terms and fusions may be built for, beside their numbers."""

    teachers: int = 1
    """Number of teachers K."""
    classes: int = 0
    """Number of classes C."""
    accuracies: tuple[float, ...] = ()
    """Share of samples that each teacher classified correctly when its store was written."""
    embedding_width: int = 0
    """D of the student's embedding."""
    labels: NDArray[np.int64] | None = None
    """Labels of all samples of the training split, in index order."""
    pairs_by_term: Mapping[str, tuple[FeaturePair, ...]] = field(default_factory=dict)
    """Pairs of every term that compares features, by the term's key."""
    pairs: tuple[FeaturePair, ...] = ()
    """Pairs of the term that is being built."""
    seed: int = 0
    """Seed of everything that is drawn: initial adapters and latents, a random teacher."""

    def for_term(self, key: str) -> Self:
        """Return the context of one term."""
        return replace(self, pairs=self.pairs_by_term.get(key, ()))


@dataclass(frozen=True)
class Loss:
    """One kind of loss term.

    The module that `build` returns maps `LossInputs` to values `(N,)`, to a scalar coupled over the batch, or
    to None where it has nothing to add in this step. It may have `begin_epoch(epoch)`, called before every
    epoch; `after_step(inputs)`, called after the update, as a memory needs it; and `parameter_groups()`, for
    parameters with optimizer settings of their own.
    """

    config: type[TermConfig]
    formula: str
    source: str
    needs: Callable[[Any], Needs]
    build: Callable[[Any, BuildContext], nn.Module]
    applies_weight: bool = False
    """True if the module multiplies by its weight itself, as a fused kernel does."""
