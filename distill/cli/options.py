"""Options of `distill train` that set recipe fields; type, choices, default and help come from the field."""

from __future__ import annotations

import os
import types
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import click

from coursepack.config import field_at
from coursepack.console import parse_numbers
from coursepack.data.store.cache import LIMIT_VARIABLE, parse_bytes
from coursepack.distill.recipe import TrainRecipe
from coursepack.distill.runs.tracking import TRACKERS
from coursepack.distill.runs.train import CHECKPOINT_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

OPTIONS = {
    "Student": {
        "student": "student",
        "student-size": "student_size",
        "student-mean": "student_mean",
        "student-std": "student_std",
    },
    "Teachers and objective": {
        "store": "stores",
        "method": "method",
        "online": "online",
        "group": "group",
        "temperature": "objective.temperature",
        "soft-weight": "objective.soft_weight",
        "hard-weight": "objective.hard_weight",
        "label-smoothing": "objective.label_smoothing",
        "teacher-weights": "objective.fusion.weights",
    },
    "Samples and views": {
        "source": "source",
        "root": "root",
        "limit": "limit",
        "view": "view",
        "views": "views",
        "view-order": "view_order",
        "views-per-load": "views_per_load",
        "allow-drift": "allow_drift",
    },
    "Training": {
        "epochs": "epochs",
        "batch-size": "batch_size",
        "accumulate": "accumulate",
        "seed": "seed",
        "patience": "patience",
        "evaluate-every": "evaluate_every",
        "keep-checkpoints": "keep_checkpoints",
    },
    "Optimizer": {
        "optimizer": "optimizer.name",
        "lr": "optimizer.lr",
        "lr-schedule": "optimizer.schedule.shape",
        "milestones": "optimizer.schedule.milestones",
        "warmup-epochs": "optimizer.schedule.warmup_epochs",
        "momentum": "optimizer.momentum",
        "weight-decay": "optimizer.weight_decay",
        "clip": "optimizer.clip",
        "ema": "optimizer.ema",
    },
    "Precision and speed": {
        "precision": "precision",
        "channels-last": "channels_last",
        "compile": "compile",
        "deterministic": "deterministic",
    },
}
"""Recipe field by option, in the groups of the help. Other fields are set with `--set FIELD=VALUE`."""
FIELDS = {name: field for group in OPTIONS.values() for name, field in group.items()}

REPEATABLE = {
    "store": "Repeatable.",
    "student": "Repeat it for several students that learn from each other.",
}
"""Help text of options that may be given several times."""

DEFAULTS = {
    "method": "kd with stores, else supervised",
    "source": "the stores'",
    "view": "the stores'",
    "root": "the stores'",
}
"""Help text for defaults that are not constants."""


def _limit_cache(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    """Set the environment variable of the limit until the command ends, for its child processes too."""
    if value is None:
        return
    parse_bytes(value, "--cache-bytes")
    before = os.environ.get(LIMIT_VARIABLE)
    os.environ[LIMIT_VARIABLE] = value

    def restore() -> None:
        if before is None:
            del os.environ[LIMIT_VARIABLE]
        else:
            os.environ[LIMIT_VARIABLE] = before

    ctx.call_on_close(restore)


WORKERS = click.option(
    "--workers",
    type=click.IntRange(0),
    help="Processes that decode images.  [default: one per core for image files]",
)
THREADS = click.option(
    "--threads",
    type=click.IntRange(1),
    help="Threads of torch and the loss kernels.  [default: one per core]",
)
CHECKPOINTS = click.option(
    "--checkpoint-seconds",
    type=click.FloatRange(0),
    default=CHECKPOINT_SECONDS,
    show_default=True,
    help="Seconds between checkpoints; 0 means after every step.",
)
TRACK = click.option(
    "--track",
    multiple=True,
    type=click.Choice(list(TRACKERS)),
    help="Also show metrics in TensorBoard, Weights & Biases or MLflow. Repeatable.",
)
CACHE_BYTES = click.option(
    "--cache-bytes",
    metavar="SIZE",
    callback=_limit_cache,
    expose_value=False,
    help="Maximum size of the cache of stores in buckets, such as 200G.  [default: half of the free disk]",
)
"""Options of the commands that train."""


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for every entry of `FIELDS` to a command."""
    for name in reversed(FIELDS):
        command = _option(name, FIELDS[name])(command)
    return command


def given_options(options: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """Return flag, recipe field and value of every given option."""
    flags = {name: name.replace("_", "-") for name in options}
    return [
        (f"--{flags[name]}", FIELDS[flags[name]], value)
        for name, value in options.items()
        if value is not None and value != ()
    ]


def _option(name: str, path: str) -> Callable[..., Any]:
    field = field_at(TrainRecipe, path)
    kind = _kind(field.annotation, field.metadata)
    text = " ".join((field.description or "").split())
    default = DEFAULTS.get(name)
    if default is None and path.startswith("objective."):
        default = "the method's"
    elif default is None and not field.is_required():
        default = None if field.default in (None, False, ()) else str(field.default)
    shown = text + (f"  [default: {default}]" if default else "")
    flag, variable = f"--{name}", name.replace("-", "_")
    if kind is bool:
        return click.option(flag, variable, is_flag=True, default=None, help=shown)
    if name in REPEATABLE:
        return click.option(flag, variable, multiple=True, help=f"{shown} {REPEATABLE[name]}")
    if kind is tuple:
        return click.option(flag, variable, callback=parse_numbers, metavar="X,X,...", help=shown)
    return click.option(flag, variable, type=kind, help=shown)


def _kind(annotation: Any, bounds: Sequence[Any] = ()) -> Any:
    """Return click's type for a field; `bool` means a flag and `tuple` a list of numbers."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *marks = get_args(annotation)
        more = (bound for mark in marks for bound in getattr(mark, "metadata", [mark]))
        return _kind(inner, [*bounds, *more])
    if origin in (Union, types.UnionType):
        return _kind(get_args(annotation)[0], bounds)
    if origin is Literal:
        return click.Choice(get_args(annotation))
    if origin is tuple:
        return tuple
    if annotation in (int, float):
        return _range(annotation, bounds)
    return bool if annotation is bool else str


def _range(number: type, bounds: Sequence[Any]) -> click.IntRange | click.FloatRange:
    """Return click's range of numbers within pydantic's bounds."""
    limits: dict[str, Any] = {}
    for bound in bounds:
        for name, side in (("ge", "min"), ("gt", "min"), ("le", "max"), ("lt", "max")):
            if hasattr(bound, name):
                limits |= {side: getattr(bound, name), f"{side}_open": name in ("gt", "lt")}
    return (click.IntRange if number is int else click.FloatRange)(**limits)
