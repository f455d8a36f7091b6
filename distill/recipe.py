"""The recipe of a training run: everything that determines it, and how flags and files become one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from coursepack.config import Config, parse_config, read_yaml
from coursepack.data import ViewRecipe
from coursepack.distill.methods import METHODS
from coursepack.distill.objective_config import ObjectiveConfig
from coursepack.distill.optimiser import OptimiserConfig
from coursepack.errors import RecipeError, UnknownName
from coursepack.parsing import parse_yaml

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

Count = Annotated[int, Field(ge=1)]


class TrainRecipe(Config):
    """A config that fully determines a training run, but for the hardware."""

    student: str
    """A network's name."""
    student_size: Count | None = None
    """Side in pixels to render views at for the student; none means its own."""
    student_mean: tuple[float, ...] | None = None
    """Subtracted per channel of the student's pixels in [0, 1]; none means its own."""
    student_std: tuple[float, ...] | None = None
    """Divided by, per channel; none means its own."""
    method: str = "supervised"
    """A name in `METHODS`."""
    objective: ObjectiveConfig
    """The method's numbers, all spelled out."""
    stores: tuple[str, ...] = ()
    """Stores of the teachers, in the order of `teacher_weights`."""
    reading: Literal["auto", "resident", "mapped", "windowed"] = "auto"
    """Whole views in memory, memory maps, or windows of chunks; auto chooses by size and free memory."""
    online: bool = False
    """Run the stores' teachers live instead of reading what they said."""
    source: str
    """NAME:SPLIT to train on."""
    evaluation: str
    """NAME:SPLIT to evaluate on."""
    root: str | None = None
    """Folder of the source's files, if it has any."""
    view: ViewRecipe
    """The view recipe; that of the stores where there are any."""
    views: Count | None = None
    """Views to take in turn, one per epoch; none means all that the stores have, or a new one each epoch."""
    view_order: Literal["cyclic", "shuffled"] = "cyclic"
    """The order in which views are taken: always the same, or another one every time round."""
    views_per_load: Count = 1
    """Views of every sample in one epoch, from one decoding each; a batch holds all of them."""
    allow_drift: bool = False
    """Train although this version makes other views than the stores' teachers saw."""
    limit: Count | None = None
    """Train on this many samples only."""
    epochs: Count = 40
    """Passes over the samples."""
    patience: Count | None = None
    """Stop after so many evaluations in a row without a better accuracy; none means never."""
    evaluate_every: Count = 1
    """Evaluate after every so many epochs, and after the last."""
    batch_size: Count = 64
    """Samples per step."""
    accumulate: Count = 1
    """Parts that a batch is worked through in, to save memory; gradients are those of the whole."""
    optimiser: OptimiserConfig = OptimiserConfig()
    """How the student is updated."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the student's matrix products in training, by autocast; float16 with scaled gradients."""
    channels_last: bool = False
    """Keep the student's weights in channels-last order, which many devices convolve faster in."""
    compile: bool = False
    """Train the student through torch.compile."""
    deterministic: bool = False
    """Let torch use only algorithms that give the same bits every time; on a CPU most do anyway."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Of initial weights, order, and what the student draws in training."""


def resolve_objective(method: str, overrides: Mapping[str, Any], where: str) -> ObjectiveConfig:
    """A method's objective with some of its fields replaced.

    Raises:
        UnknownName: no such method.
        RecipeError: a field that does not exist or a value out of range.
    """
    if method not in METHODS:
        raise UnknownName("method", method, METHODS)
    values = METHODS[method].objective.model_dump()
    _merge(values, overrides)
    return parse_config(ObjectiveConfig, values, where)


def _merge(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Replace values in place, within groups of fields one by one; another fusion brings its own numbers."""
    for name, change in changes.items():
        held = values.get(name)
        another = isinstance(change, dict) and "name" in change and change["name"] != (held or {}).get("name")
        if isinstance(held, dict) and isinstance(change, dict) and not another:
            _merge(held, change)
        else:
            values[name] = change


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
