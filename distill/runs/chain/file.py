"""Chain files: an ordered list of recipes, whose references name earlier stages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from coursepack.config import Config, parse_config, start_paths
from coursepack.distill.recipe import load_recipe
from coursepack.errors import RecipeError, suggestion
from coursepack.models.teacher_options import TeacherOptions

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Self

STAGE = "stage:"
"""Prefix of a reference to an earlier stage: `stage:NAME`, or `stage:NAME@EPOCH` for a kept checkpoint."""
KINDS = ("train", "precompute", "ensemble")
"""Kinds of stages, which are the keys of their recipes."""
READS = {"stores": "precompute", "teacher": "train", "runs": "train"}
"""Kind of stage that a reference in each field names."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Positive = Annotated[int, Field(ge=1)]


class PrecomputeConfig(TeacherOptions):
    """One teacher of a file of `precompute run`; the chain chooses the store."""

    teacher: str
    """`stage:NAME` or `stage:NAME@EPOCH` of an earlier stage that trains, `run:FOLDER`, a trained network of
    a hub such as `hf:FOLDER`, or a network's name with `weights`."""
    views: Positive
    """Number of views of each sample."""
    source: str | None = None
    """Source of samples, NAME or NAME:SPLIT. Defaults to the one that the teacher's stage trains on."""
    root: str | None = None
    """Folder of the source's files. Defaults to that of the teacher's stage."""
    view: str | None = None
    """View recipe: name of a preset, or a YAML file. Defaults to that of the teacher's stage."""
    view_seed: Annotated[int, Field(ge=0)] | None = None
    """Seed of the view recipe. Defaults to the recipe's own."""
    batch_size: Positive = 256
    """Images per forward pass."""
    block_rows: Positive | None = None
    """Rows per block. Defaults to a number chosen by the width of the rows."""
    views_per_load: Positive = 1
    """Views rendered per decoded image."""


class EnsembleConfig(Config):
    """Evaluation of several students together."""

    runs: Annotated[tuple[str, ...], Field(min_length=2)]
    """Stages that train the students, as `stage:NAME`."""
    combine: Literal["probs", "logits"] = "probs"
    """Average their probabilities, or their logits."""


class StageConfig(Config):
    """One stage: a name and the recipe of one command."""

    name: Name
    """Name of the stage: letters, digits, `_` and `-`."""
    train: dict[str, Any] | None = None
    """Fields of a recipe of `distill train`, in addition to those of `base`."""
    precompute: PrecomputeConfig | None = None
    """A store of a teacher's outputs."""
    ensemble: EnsembleConfig | None = None
    """Students evaluated together."""

    @model_validator(mode="after")
    def _has_one_recipe(self) -> Self:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(
                f"stage {self.name!r} has {' and '.join(given) or 'no recipe'}, expected one of "
                f"{', '.join(KINDS)}"
            )
        return self

    @property
    def kind(self) -> str:
        """The kind of the stage."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)


class ChainConfig(Config):
    """Content of a chain file."""

    base: dict[str, Any] = Field(default={})
    """Recipe fields that all stages with `train` share; a stage replaces whole fields."""
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1)]
    """The stages, in the order in which they run."""


def read_chain(path: Path) -> ChainConfig:
    """Return the content of a chain file.

    Raises:
        RecipeError: the file is not a chain, two stages have the same name, or a reference does not name an
            earlier stage of the right kind.
    """
    values = load_recipe(path)
    start_paths(values, path.parent)
    chain = parse_config(ChainConfig, values, str(path))
    names = [stage.name for stage in chain.stages]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise RecipeError(f"{str(path)!r} has two stages {repeated[0]!r}: give each a name of its own")
    for index, stage in enumerate(chain.stages):
        for field, text in _references(chain, stage):
            _check_reference(chain, index, field, text, str(path))
    return chain


def referenced(text: str) -> str | None:
    """Return the stage that a text refers to, or None if it is a path or another name.

    >>> referenced("stage:teacher"), referenced("stage:teacher@5")
    ('teacher', 'teacher')
    """
    return text.removeprefix(STAGE).partition("@")[0] if text.startswith(STAGE) else None


def referenced_epoch(text: str) -> int | None:
    """Return the epoch of a reference to a kept checkpoint, or None for any other text.

    >>> referenced_epoch("stage:teacher"), referenced_epoch("stage:teacher@5")
    (None, 5)
    """
    epoch = text.partition("@")[2]
    return int(epoch) if text.startswith(STAGE) and epoch else None


def _references(chain: ChainConfig, stage: StageConfig) -> list[tuple[str, str]]:
    """Return the field and the text of everything in a stage that may name another stage."""
    if stage.precompute is not None:
        return [("teacher", stage.precompute.teacher)]
    if stage.ensemble is not None:
        return [("runs", text) for text in stage.ensemble.runs]
    stores = train_values(chain.base, stage).get("stores")
    return [("stores", text) for text in stores or () if isinstance(text, str)]


def train_values(base: Mapping[str, Any], stage: StageConfig) -> dict[str, Any]:
    """Return the recipe fields of a stage that trains, together with those of `base`."""
    return {**base, **(stage.train or {})}


def _check_reference(chain: ChainConfig, index: int, field: str, text: str, where: str) -> None:
    """Check that a text in a stage names an earlier stage of the right kind, or no stage at all."""
    stage, kinds = chain.stages[index], {each.name: each.kind for each in chain.stages}
    who = f"stage {stage.name!r} of {where!r}: {field} names"
    name, wanted = referenced(text), READS[field]
    if name is None:
        if field == "runs":
            raise RecipeError(f"{who} {text!r}, expected stages of this chain, as {STAGE}NAME")
        if (text.partition("@")[0] if field == "teacher" else text) in kinds:
            raise RecipeError(f"{who} {text!r}, which is a stage and no path: write {STAGE}{text}")
        return
    earlier = [each.name for each in chain.stages[:index]]
    if name not in kinds:
        hint, known = suggestion(name, earlier), ", ".join(earlier) or "none"
        raise RecipeError(f"{who} the unknown stage {name!r}.{hint} Earlier stages: {known}.")
    if name == stage.name:
        raise RecipeError(f"{who} the stage itself, expected an earlier one")
    if name not in earlier:
        raise RecipeError(
            f"{who} stage {name!r}, which comes later: a stage reads earlier ones only, so move {name!r} "
            f"before {stage.name!r}"
        )
    if kinds[name] != wanted:
        raise RecipeError(
            f"{who} stage {name!r}, a stage of kind {kinds[name]!r}, expected one of kind {wanted!r}"
        )
    if "@" in text and field != "teacher":
        raise RecipeError(f"{who} {text!r}, expected {STAGE}{name}: only a teacher can be a checkpoint")
    if "@" in text and not text.partition("@")[2].isdecimal():
        raise RecipeError(
            f"{who} {text!r}, expected {STAGE}{name}@EPOCH with a number of epochs: give every checkpoint a "
            "stage of its own"
        )
