"""The recipe of a training run: everything that determines it, and how flags and files become one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from coursepack.config import Config, parse_config, read_yaml
from coursepack.data import ViewRecipe
from coursepack.distill.methods import METHODS
from coursepack.distill.objective_config import ObjectiveConfig
from coursepack.errors import RecipeError, UnknownName
from coursepack.parsing import parse_yaml

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import Self

Count = Annotated[int, Field(ge=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


class LearningRateConfig(Config):
    """Learning rate as a function of the step."""

    shape: Literal["constant", "step", "cosine", "one_cycle"] = "constant"
    """Learning-rate schedule. `step`: multiplied by `factor` at every milestone; `cosine`: half a cosine down
    to `end`; `one_cycle`: up, and far down again."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs of linear warm-up."""
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Epochs at whose start the schedule `step` lowers the learning rate."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Factor of the learning rate at each milestone of the schedule `step`."""
    end: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Final learning rate of the schedule `cosine`, as a fraction of `lr`."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.shape == "step") != bool(self.milestones):
            raise ValueError(
                f"milestones are {list(self.milestones)}, but shape is {self.shape!r}: milestones are for "
                "shape 'step', which needs at least one. Give --milestones N,N with it, or "
                "--set optimizer.schedule.milestones=[] with another shape"
            )
        if self.shape == "one_cycle" and self.warmup_epochs:
            raise ValueError("warmup_epochs is set, but shape 'one_cycle' has a rise of its own")
        return self


class OptimizerConfig(Config):
    """Optimizer of a student, with everything that its objective trains."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Optimizer."""
    lr: Annotated[float, Field(gt=0)] = 0.05
    """Learning rate."""
    schedule: LearningRateConfig = LearningRateConfig()
    """Learning-rate schedule."""
    momentum: BelowOne = 0.9
    """Momentum of SGD."""
    nesterov: bool = True
    """Use Nesterov momentum in SGD."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Decay rates of AdamW's running averages."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Weight decay: L2 penalty of SGD, decoupled for AdamW."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Maximum norm of all gradients together."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of an exponential moving average of the weights, which is then evaluated and kept."""


class TrainRecipe(Config):
    """A config that determines a training run in everything but the hardware."""

    student: str
    """Name of the student's network."""
    student_size: Count | None = None
    """Side in pixels of the student's images; defaults to the network's own."""
    student_mean: tuple[float, ...] | None = None
    """Mean per channel, subtracted from the student's pixels in [0, 1]; defaults to the network's own."""
    student_std: tuple[float, ...] | None = None
    """Standard deviation per channel that the student's pixels are divided by; defaults to the network's
    own."""
    method: str = "supervised"
    """Name of the method, see `distill methods`."""
    objective: ObjectiveConfig
    """Numbers of the method, all spelled out."""
    stores: tuple[str, ...] = ()
    """A teacher's store."""
    reading: Literal["auto", "resident", "mapped", "windowed"] = "auto"
    """How stores are read: whole views in memory, memory maps, or windows of chunks; auto chooses by size and
    free memory."""
    online: bool = False
    """Run the stores' teachers live instead of reading their stored outputs."""
    source: str
    """Data to train on, NAME or NAME:SPLIT."""
    evaluation: str
    """Data to evaluate on, NAME:SPLIT."""
    root: str | None = None
    """Folder of the source's files."""
    view: ViewRecipe
    """View recipe: the name of a preset or a YAML file."""
    views: Count | None = None
    """Number of views to use, one per epoch in turn; defaults to all in the stores, or to a new one every
    epoch."""
    view_order: Literal["cyclic", "shuffled"] = "cyclic"
    """Order of the views: the same in every round, or shuffled anew for each."""
    views_per_load: Count = 1
    """Views of every sample in one epoch; each image is decoded once for all of them."""
    allow_drift: bool = False
    """Train although this version renders other views than the stores' teachers saw."""
    limit: Count | None = None
    """Number of training samples, chosen evenly over the classes; defaults to all."""
    epochs: Count = 40
    """Number of epochs."""
    patience: Count | None = None
    """Stop after this many evaluations in a row without a better accuracy."""
    evaluate_every: Count = 1
    """Evaluate every this many epochs, and after the last."""
    batch_size: Count = 64
    """Samples per step."""
    accumulate: Count = 1
    """Micro-batches per step, to save memory; gradients are those of the whole batch."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and learning rate."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Autocast precision of the student's forward and backward pass; float16 with gradient scaling."""
    channels_last: bool = False
    """Keep the student's weights in channels-last memory format."""
    compile: bool = False
    """Train the student through torch.compile."""
    deterministic: bool = False
    """Use deterministic algorithms only."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Seed of weight initialization, sample order and dropout."""


def resolve_objective(
    method: str, overrides: Mapping[str, Any], where: str, *, classes: int | None = None
) -> ObjectiveConfig:
    """Return a method's objective with some of its fields replaced.

    Args:
        method: a name in `METHODS`.
        overrides: fields to replace, groups of fields one by one.
        where: file or command that the fields came from, for errors.
        classes: number of classes; None is refused where a default depends on it.

    Raises:
        UnknownName: no such method.
        RecipeError: a field that does not exist, a value out of range, or `classes` is needed.
    """
    if method not in METHODS:
        raise UnknownName("method", method, METHODS)
    values = METHODS[method].values(classes)
    _merge(values, overrides)
    return parse_config(ObjectiveConfig, values, where)


def _merge(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Replace values in place, field by field; another fusion or term brings its own numbers."""
    for name, change in changes.items():
        held = values.get(name)
        if isinstance(held, dict) and isinstance(change, dict) and _is_same_kind(held, change):
            _merge(held, change)
        else:
            values[name] = change


def _is_same_kind(held: Mapping[str, Any], change: Mapping[str, Any]) -> bool:
    """Return false for a change to another fusion or another kind of term."""
    return all(change.get(key, held.get(key)) == held.get(key) for key in ("name", "term"))


def load_recipe(path: Path) -> dict[str, Any]:
    """The plain values of a recipe file.

    Raises:
        RecipeError: missing, not YAML, or not a mapping.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        held = "nothing" if values is None else f"a {type(values).__name__}"
        raise RecipeError(f"{str(path)!r} holds {held}, expected a mapping of recipe fields")
    return values


def set_values(values: dict[str, Any], assignments: Sequence[str]) -> None:
    """Apply `key.subkey=value` assignments in place; values are YAML.

    Raises:
        RecipeError: an assignment without `=`, or into something that is no mapping.
    """
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not all(key.split(".")):
            raise RecipeError(f"--set {assignment!r} is not key=value")
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise RecipeError(f"--set {assignment!r}: the value {error}") from error
        set_value(values, key, value, f"--set {assignment!r}")


def set_value(values: dict[str, Any], key: str, value: Any, said: str) -> None:
    """Put one value where `key.subkey` says; `said` names the flag in errors.

    Raises:
        RecipeError: a part of the key is no mapping.
    """
    *parents, leaf = key.split(".")
    place = values
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise RecipeError(f"{said}: {parent!r} is {place!r}, not a group of fields")
    place[leaf] = value
