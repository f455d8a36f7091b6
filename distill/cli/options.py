"""Options of `distill train` that set recipe fields; type, choices, default and help come from the field.

They are read from the catalog, which is written from the recipe's fields, so that help does not import torch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from coursepack.catalog import names_of, read_catalog
from coursepack.commands import Choice, complete_folder, name_of
from coursepack.console import parse_numbers
from coursepack.distill.runs import CHECKPOINT_SECONDS
from coursepack.errors import UnknownName

if TYPE_CHECKING:
    from collections.abc import Callable

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

NAMED = {"method": "method", "student": "network", "source": "source", "view": "view"}
"""Kind of the names in the catalog that an option takes."""
COMPLETED = {
    **{name: name_of(kind) for name, kind in NAMED.items()},
    **dict.fromkeys(("store", "root", "group"), complete_folder),
}
"""Functions that complete values in the shell, by option."""


def _limit_cache(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    """Set the environment variable of the limit until the command ends, for its child processes too."""
    if value is None:
        return
    from coursepack.data.store.cache import LIMIT_VARIABLE, parse_bytes

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
TRACKERS = ("tensorboard", "wandb", "mlflow")
"""Names in `coursepack.distill.runs.tracking.TRACKERS`, whose modules import torch."""
TRACK = click.option(
    "--track",
    multiple=True,
    type=Choice(TRACKERS),
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
        command = _option(name)(command)
    return command


def given_options(options: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """Return flag, recipe field and value of every given option."""
    flags = {name: name.replace("_", "-") for name in options}
    return [
        (f"--{flags[name]}", FIELDS[flags[name]], value)
        for name, value in options.items()
        if value is not None and value != ()
    ]


def _option(name: str) -> Callable[..., Any]:
    described = read_catalog()["options"][name]
    flag, variable, shown = f"--{name}", name.replace("-", "_"), described["help"]
    kind = described["kind"]
    complete = COMPLETED.get(name)
    if name in REPEATABLE:
        shown = f"{shown} {REPEATABLE[name]}"
        return click.option(flag, variable, multiple=True, help=shown, shell_complete=complete)
    if kind == "flag":
        return click.option(flag, variable, is_flag=True, default=None, help=shown)
    if kind == "numbers":
        return click.option(flag, variable, callback=parse_numbers, metavar="X,X,...", help=shown)
    check = _check_method if name == "method" else None
    return click.option(
        flag, variable, type=_type(described), help=shown, shell_complete=complete, callback=check
    )


def _check_method(_ctx: click.Context, _param: click.Parameter, name: str | None) -> str | None:
    """Return a method's name, or raise `UnknownName` before torch is imported."""
    if name is not None and name not in names_of("method"):
        raise UnknownName("method", name, names_of("method"))
    return name


def _type(described: dict[str, Any]) -> Any:
    """Return click's type of an option of the catalog."""
    if described["kind"] == "choice":
        return Choice(described["choices"])
    ranges = {"integer": click.IntRange, "number": click.FloatRange}
    if described["kind"] in ranges:
        return ranges[described["kind"]](**described["limits"])
    return click.STRING
