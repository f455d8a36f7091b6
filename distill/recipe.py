"""Recipe of a training run: its config, and the objective of its method."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from coursepack.config import Config, merge_values, parse_config
from coursepack.data import ViewRecipe
from coursepack.data.randomness import Purpose, random_words
from coursepack.distill.methods import METHODS
from coursepack.distill.objective_config import ObjectiveConfig
from coursepack.distill.recipe_file import load_recipe as load_recipe
from coursepack.distill.recipe_file import set_value as set_value
from coursepack.distill.recipe_file import set_values as set_values
from coursepack.errors import UnknownName

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

    from coursepack.distill.methods.base import Method

Count = Annotated[int, Field(ge=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


class LearningRateConfig(Config):
    """Learning-rate schedule."""

    shape: Literal["constant", "step", "cosine", "one_cycle"] = "constant"
    """Learning-rate schedule: `constant`; `step` multiplies by `factor` at every milestone; `cosine` decays
    to `end`; `one_cycle` rises, then decays to nearly zero."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs of linear warm-up; fractions are allowed."""
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Epochs at whose start schedule `step` lowers the learning rate."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Factor applied to the learning rate at each milestone of schedule `step`."""
    end: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Final learning rate of schedule `cosine`, as a fraction of `lr`."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.shape == "step") != bool(self.milestones):
            raise ValueError(
                f"milestones are {list(self.milestones)}, but shape is {self.shape!r}: milestones are for "
                "shape 'step', which needs at least one. Give --milestones N,N with it, or "
                "--set optimizer.schedule.milestones=[] with another shape"
            )
        if self.shape == "one_cycle" and self.warmup_epochs:
            raise ValueError(
                f"warmup_epochs is {self.warmup_epochs:g}, but shape 'one_cycle' has its own warm-up: leave "
                "warmup_epochs out, or choose another shape"
            )
        return self


class OptimizerConfig(Config):
    """Optimizer of the student and of the objective's trainable parameters."""

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
    """Coefficients of AdamW's running averages of the gradient and its square."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Weight decay: an L2 penalty for SGD, decoupled for AdamW."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Maximum norm of the gradient; larger gradients are clipped."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of an exponential moving average of the weights, which is evaluated and saved instead of
    the weights."""


class TrainRecipe(Config):
    """Config that determines a training run except for the hardware."""

    student: str
    """Network of the student, by name."""
    peers: tuple[str, ...] = ()
    """Networks of further students, by name, which train together with the student and learn from it, as it
    does from them."""
    member: Annotated[int, Field(ge=0)] = 0
    """Index of the student in its group, in the recipe of one of several students that train together; its
    initial weights and dropout are drawn from this index and the seed."""
    replicas: Annotated[int, Field(ge=2)] | None = None
    """Number of replicas of the student, each trained by a process of its own on its share of the samples;
    `member` is the index of this one."""
    group: str | None = None
    """Folder or bucket address, such as `s3://BUCKET/PATH`, through which replicas exchange their weights."""
    student_size: Count | None = None
    """Height and width of the student's images in pixels; defaults to the network's own."""
    student_mean: tuple[float, ...] | None = None
    """Mean per channel, subtracted from the student's pixels in [0, 1]; defaults to the network's own."""
    student_std: tuple[float, ...] | None = None
    """Standard deviation per channel, by which the student's pixels are divided; defaults to the network's
    own."""
    method: str = "supervised"
    """Distillation method, see `distill methods`."""
    objective: ObjectiveConfig
    """Loss terms, fusion and temperature; defaults to those of the method."""
    stores: tuple[str, ...] = ()
    """Store of a teacher's outputs."""
    reading: Literal["auto", "resident", "mapped", "windowed"] = "auto"
    """Access to the stores: whole views in memory, memory maps, or a moving window of chunks; auto chooses by
    size and free memory."""
    online: bool = False
    """Run the stores' teachers live instead of reading their stored outputs."""
    source: str
    """Training data, NAME or NAME:SPLIT."""
    evaluation: str
    """Evaluation data, NAME:SPLIT; defaults to the part of the source that is not trained on, or its test
    split."""
    root: str | None = None
    """Folder of the source's files."""
    view: ViewRecipe
    """View recipe: the name of a preset, or a YAML file."""
    views: Count | None = None
    """Number of views, used one per epoch in turn; defaults to all views in the stores, or without stores to
    a new view every epoch."""
    view_order: Literal["cyclic", "shuffled"] = "cyclic"
    """Order of the views: the same in every round, or reshuffled for each round."""
    views_per_load: Count = 1
    """Views of every sample per epoch; each image is decoded once for all of them."""
    allow_drift: bool = False
    """Train even if this version renders views that differ from those the teachers saw."""
    limit: Count | None = None
    """Number of training samples, balanced over the classes; defaults to all."""
    epochs: Count = 40
    """Number of epochs."""
    patience: Count | None = None
    """Stop after this many consecutive evaluations without a new best accuracy."""
    keep_checkpoints: Count | None = None
    """Epochs between copies of the student's weights that are kept, each a teacher `run:FOLDER@EPOCH`;
    defaults to no copies."""
    evaluate_every: Count = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    batch_size: Count = 64
    """Samples per step, over all micro-batches and ranks."""
    accumulate: Count = 1
    """Micro-batches per step; gradients are accumulated over them to save memory."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and learning rate."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Autocast precision of the student's forward and backward pass; float16 uses gradient scaling."""
    channels_last: bool = False
    """Keep the student's weights in channels-last memory format."""
    compile: bool = False
    """Compile the student with torch.compile."""
    deterministic: bool = False
    """Use deterministic algorithms only."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Seed for weight initialization, sample order and dropout."""

    @model_serializer(mode="wrap")
    def _leave_out(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out fields for peers with default values, so that other recipes are written as before."""
        values: dict[str, Any] = handler(self)
        unused = ("peers", "member", "replicas", "group")
        return {name: value for name, value in values.items() if value or name not in unused}

    @property
    def shares(self) -> int:
        """Number of disjoint shares of the samples, one for each student; 1 if they share all samples."""
        splits = self.objective.exchange.splits_rows and bool(self.objective.needs().peers)
        return (self.replicas or 1 + len(self.peers)) if splits else 1

    @property
    def own_seed(self) -> int:
        """Seed of the student's initial weights and dropout; other students of its group have others."""
        if self.member == 0:
            return self.seed
        words = random_words(self.seed, np.array([self.member]), 0, Purpose.MEMBER)[0]
        return int(words[:2].view(np.int64)[0] & (2**63 - 1))

    def members(self) -> tuple[TrainRecipe, ...]:
        """Return the recipe of every student: of the student itself, then of its peers."""
        networks = (self.student, *self.peers)
        return (
            self,
            *(
                self.model_copy(
                    update={
                        "student": network,
                        "peers": networks[:index] + networks[index + 1 :],
                        "member": index,
                        "objective": self.objective.for_peers(),
                    }
                )
                for index, network in enumerate(self.peers, 1)
            ),
        )


def resolve_objective(
    method: str, overrides: Mapping[str, Any], where: str, *, classes: int | None = None
) -> ObjectiveConfig:
    """Return a method's objective config with some fields replaced.

    Args:
        method: a name in `METHODS`.
        overrides: fields to replace; nested mappings are merged field by field.
        where: file or command that the fields came from, for error messages.
        classes: number of classes; required if a default of the method depends on it.

    Raises:
        UnknownName: the method does not exist.
        RecipeError: a field does not exist, a value is out of range, or `classes` is required but None.
    """
    return parse_config(ObjectiveConfig, objective_values(method, overrides, classes=classes), where)


def objective_values(method: str, overrides: Mapping[str, Any], *, classes: int | None) -> dict[str, Any]:
    """Return a method's objective as plain, unvalidated values, with some fields replaced.

    Raises:
        UnknownName: the method does not exist.
        RecipeError: `classes` is required but None.
    """
    if method not in METHODS:
        raise UnknownName("method", method, METHODS)
    values = METHODS[method].values(classes)
    merge_values(values, overrides)
    return values


def changed_method(name: str, overrides: Mapping[str, Any], where: str) -> Method:
    """Return a method with some fields of its objective replaced.

    Raises:
        UnknownName: the method does not exist.
        RecipeError: a field does not exist, or a value is out of range.
    """
    if name not in METHODS:
        raise UnknownName("method", name, METHODS)
    method = METHODS[name]
    values = method.objective.model_dump()
    merge_values(values, overrides)
    per_class = tuple(field for field in method.per_class if field not in overrides)
    return replace(method, objective=parse_config(ObjectiveConfig, values, where), per_class=per_class)
