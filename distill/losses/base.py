"""Base types of loss terms: config, needs, build context, and inputs for one batch.

A term is a `Loss` row in `coursepack.distill.losses.LOSSES`: a config (`TermConfig`), a function from the
config to its `Needs`, and a function that builds the module. The module maps `LossInputs` to values per
sample `(N,)`, to their mean, or to a scalar that couples the samples of a batch. The objective applies
weights, schedules and the mean over the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from coursepack.config import Config
from coursepack.distill.schedule import Schedule, Weight
from coursepack.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from coursepack.distill.fusion.fused import FusedTargets
    from coursepack.distill.targets.base import Targets
    from coursepack.kernels import MixedLabels
    from coursepack.models import Network


@dataclass(frozen=True)
class Step:
    """Position in training, which determines schedules and random draws."""

    epoch: int = 0
    batch: int = 0
    """Index of the batch within its epoch."""
    micro_batch: int = 0
    """Index of the micro-batch within its batch, if gradients are accumulated."""


@dataclass(frozen=True)
class StudentOutput:
    """Output of one student for a batch, with gradient."""

    logits: Tensor
    """Logits `(N, C)`."""
    embedding: Tensor | None = None
    """Embedding `(N, D)`: the input of the student's head, or a layer's maximum over positions."""
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
    """Class ids `(N,)` int64, or two class ids and their shares per sample if images are mixed."""
    targets: Targets | None = None
    """Teachers' targets; None if the objective does not read teachers."""
    step: Step = Step()
    samples: NDArray[np.int64] | None = None
    """Sample indices `(N,)`, for terms that keep a memory of the samples."""
    peers: tuple[Tensor, ...] = ()
    """Logits `(N, C)` that the exchange between students gives this one to follow."""
    fused: FusedTargets | None = None
    """Fused targets of all teachers; set by the objective if a term needs them."""
    fusion: nn.Module | None = None
    """The objective's fusion, for terms that penalize or train its parameters."""
    shared: dict[str, Tensor] = field(default_factory=dict)
    """Intermediate results that terms of one objective share, by name."""

    @property
    def teachers(self) -> Targets:
        """Teachers' targets.

        Raises:
            RecipeError: the objective was called without targets.
        """
        if self.targets is None:
            raise RecipeError(
                "this objective reads teachers, but targets is None: pass the result of `fetch(batch)`"
            )
        return self.targets

    @property
    def soft(self) -> FusedTargets:
        """The fused targets.

        Raises:
            RecipeError: the term did not declare `fused` in its needs.
        """
        if self.fused is None:
            raise RecipeError(
                "this term reads the fused targets, but its needs do not declare them: return "
                "Needs(fused=True) from its `needs`"
            )
        return self.fused


class PairChoice(Config):
    """Pair of a teacher's tap and a student layer that are compared."""

    teacher: Annotated[int, Field(ge=0)]
    """Index of the teacher's store."""
    tap: str
    """Tap in the teacher's store, as LAYER[:REDUCTION[:SIZE]][:sketch:VALUES]."""
    layer: Annotated[str, Field(pattern=r"^[^+]+(\+[^+]+)?$")]
    """Layer of the student, or two joined by `+` for the flow between them."""


@dataclass(frozen=True)
class PairNeeds:
    """Pairs of taps and student layers that a term compares."""

    pairs: tuple[PairChoice, ...] = ()
    """Given pairs; empty means that `choose` chooses them."""
    layers: tuple[str, ...] = ()
    """Student layers to choose from, shallow to deep; empty means all blocks."""
    reductions: tuple[str, ...] = ("map", "pooled")
    """Tap reductions that the term supports, starting with the one to store if none of them is."""
    choose: Literal["depth", "last", "every", "flows"] = "depth"
    """Pairs that are compared by default.

    depth   one per teacher, spread over the student's layers, each with its tap of equal depth
    last    one per teacher: its deepest tap and the student's last layer
    every   one per teacher and student layer, at equal depth; by map size if some of these do not fit
    flows   one per teacher and two consecutive student layers, with its tap of two layers, chosen as in
            `every`; by map size, layers without a tap are left out
    """
    maps: bool = False
    """True if only maps are compared, so that layers that give vectors are not chosen."""
    sketches: tuple[str, ...] = ()
    """Reductions whose sketches the term supports."""
    unfit: Callable[[FeaturePair], Unfit | None] | None = None
    """Function that returns why a pair cannot be compared; None if its shapes are compared as they are."""


@dataclass(frozen=True)
class Unfit:
    """Reason why a term cannot compare a pair."""

    problem: str
    """What does not fit, as the end of a sentence."""
    tap: str = ""
    """Tap to store instead, as the value of `--tap`; empty if none helps."""


@dataclass(frozen=True)
class FeaturePair:
    """Pair of a tap and a student layer, with the shapes of one sample's features."""

    teacher: int
    tap: str
    """Name of the tap in its store."""
    layer: str
    """Student layer, or two joined by `+`."""
    teacher_shape: tuple[int, ...]
    """Shape of the teacher's features; of a sketch, the shape before the projection."""
    student_shape: tuple[int, ...]
    """Shape of the first layer of `layers`."""
    second_shape: tuple[int, ...] | None = None
    """Shape of the second layer of `layers`, if there are two."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Student layers: one, or two for the flow between them."""
        return tuple(self.layer.split("+"))


@dataclass(frozen=True)
class Needs:
    """Inputs and conditions that a term, a fusion or an objective requires, derived from its config alone.

    Needs determine which arrays of the stores are read, which layers are watched, and which recipes are
    refused. A text field is empty if there is no such need; otherwise it names the part of the objective
    that has the need, for error messages.
    """

    teacher_logits: bool = False
    """True if the teachers' logits are read."""
    fused: bool = False
    """True if the fused targets of all teachers are read; implies `teacher_logits`."""
    dense_logits: str = ""
    """Need for all logits of every teacher; top-k stores are refused."""
    pairs: PairNeeds | None = None
    """Pairs of teachers' features and student layers that are compared."""
    embedding: str = ""
    """Need for an embedding of each sample by the student."""
    embedding_layer: str | None = None
    """Student layer that yields the embedding; None means the input of the student's head."""
    student_layers: tuple[str, ...] = ()
    """Further student layers whose outputs are read."""
    labels: bool = False
    """True if the labels are read."""
    one_label: str = ""
    """Need for exactly one label per sample; views that mix images are refused."""
    whole_batch: tuple[str, ...] = ()
    """Names of everything that makes a sample's loss depend on the rest of its batch."""
    every_teacher: str = ""
    """Need for all teachers in every batch; fusions that read one teacher at a time are refused."""
    teacher_heads: str = ""
    """Need for the linear heads of all teachers; stores without one are refused."""
    one_process: str = ""
    """Reason why the student cannot be trained on several ranks; they are refused."""
    peers: str = ""
    """Need for other students that train together with this one."""
    last_map: str = ""
    """Need for the output of the student's deepest block that gives maps."""
    joint: str = ""
    """Reason why gradients flow between students that train together; gradient scaling is refused."""
    teacher_head: str = ""
    """Need for the linear head of the teacher, of which there is one; several stores are refused."""
    first_epochs: tuple[str, ...] = ()
    """Fields of the config with a number of first epochs, in which the student does not learn from the term;
    runs that are not longer are refused."""

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
        """Names of the needs that read inside the student, which a compiled student cannot meet."""
        layers = [self.every_teacher or "hints"] if self.pairs is not None or self.student_layers else []
        return (*layers, *filter(None, (self.embedding, self.last_map)))

    def __or__(self, other: Needs) -> Needs:
        """Return the union of two needs; of two `pairs`, only the first is kept."""
        union: dict[str, Any] = {}
        for each in fields(self):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            if isinstance(mine, tuple):
                union[each.name] = tuple(dict.fromkeys((*mine, *theirs)))
            else:
                union[each.name] = mine or theirs
        return Needs(**union)


class TermConfig(Config):
    """Base class of the configs of loss terms."""

    term: str
    """Name of the term, a key of `LOSSES`; defaults to the term's key in the objective."""
    weight: Weight = 1.0
    """Weight of the term, or its schedule over epochs."""

    @model_serializer(mode="wrap")
    def _keep_term(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"term": self.term, **handler(self)}


@dataclass(frozen=True)
class TeacherHead:
    """Last linear layer of a teacher, which gives its logits."""

    weight: Tensor
    """`(C, D)` float32."""
    bias: Tensor
    """`(C,)` float32; zero if the layer has none."""


@dataclass(frozen=True)
class BuildContext:
    """Properties of teachers, student and source that terms and fusions are built from."""

    teachers: int = 1
    """Number of teachers K."""
    classes: int = 0
    """Number of classes C."""
    known: tuple[tuple[int, ...], ...] = ()
    """Classes that each teacher knows, which are the columns of its logits; empty if all know all."""
    accuracies: tuple[float, ...] = ()
    """Accuracy of each teacher, as recorded in its store."""
    embedding_width: int = 0
    """Width D of the student's embedding."""
    epochs: int = 0
    """Number of epochs of the run; 0 if it is not known."""
    temperature: float | Schedule = 1.0
    """Temperature of the objective or its schedule, T_0 of a dynamic one."""
    heads: tuple[TeacherHead, ...] = ()
    """Head of each teacher; empty if no term needs heads."""
    labels: NDArray[np.int64] | None = None
    """Labels of all samples of the training split, in index order."""
    samples: NDArray[np.int64] | None = None
    """Indices of the samples that are trained on; None means the whole training split."""
    pairs_by_term: Mapping[str, tuple[FeaturePair, ...]] = field(default_factory=dict)
    """Pairs of each term that compares features, by the key of the term."""
    pairs: tuple[FeaturePair, ...] = ()
    """Pairs of the term that is being built."""
    last_map: str = ""
    """Student's deepest block that gives maps; empty if nothing needs it."""
    seed: int = 0
    """Seed for initial adapters and latents, and for random teachers."""

    def for_term(self, key: str) -> Self:
        """Return the context with the pairs of one term."""
        return replace(self, pairs=self.pairs_by_term.get(key, ()))


@dataclass(frozen=True)
class WrapContext:
    """Properties of a student and its only teacher, from which a term wraps the student."""

    blocks: tuple[str, ...]
    """Names of the student's blocks, shallow to deep."""
    shape_of: Callable[[str], tuple[int, ...]]
    """Returns the shape of a student layer's output for one sample."""
    tap: str
    """Name of the teacher's tap that the term compares."""
    teacher_shape: tuple[int, ...]
    """Shape of the tap's features for one sample."""
    head_weight: Tensor
    """Weight of the teacher's head, `(C, D)`."""
    head_bias: Tensor
    """Bias of the teacher's head, `(C,)`."""
    seed: int = 0
    """Seed for the initial weights of what is added."""


@dataclass(frozen=True)
class Loss:
    """One kind of loss term.

    The module that `build` returns maps `LossInputs` to values `(N,)`, to their mean, to a scalar that
    couples the samples of a batch, or to None if it adds nothing in this step. Optional methods are
    `begin_epoch(epoch)`, called before every epoch; `after_step(inputs)`, called after the optimizer step,
    for example to update a memory bank; and `parameter_groups()`, for parameters with their own optimizer
    settings. In a group, `lr_factor` multiplies the learning rate of the schedule. `without_teachers(inputs)`
    gives the part of a term of the fused targets that reads no teacher; a term without that method is skipped
    in a phase on labels alone.
    """

    config: type[TermConfig]
    formula: str
    """Formula of the loss, in one line."""
    source: str
    """Paper and equation."""
    needs: Callable[[Any], Needs]
    build: Callable[[Any, BuildContext], nn.Module]
    applies_weight: bool = False
    """True if the module multiplies by its own weight, for example inside a fused kernel."""
    wrap: Callable[[Any, Network, WrapContext], Network] | None = None
    """Returns the network that is trained, evaluated and saved instead of the student, if the term changes
    its architecture. The result's spec describes it, so that `run:FOLDER` builds it again."""
