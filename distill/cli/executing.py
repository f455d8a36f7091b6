"""Options of `distill sweep` and `distill chain` that choose the executor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from coursepack.commands import Choice, make_chosen

if TYPE_CHECKING:
    from collections.abc import Callable

    from coursepack.distill.runs.cluster import RayExecutor

LOCAL, RAY = "local", "ray"
"""Executors: this process, and the workers of a cluster."""

# fmt: off
OPTIONS = (
    click.option("--executor", type=Choice((LOCAL, RAY)), default=LOCAL, show_default=True,
                 help="Processes that train students: this one, or the workers of a Ray cluster."),
    click.option("--address",
                 help="Address of the Ray cluster, or auto.  [default: RAY_ADDRESS, or this machine alone]"),
    click.option("--gpus-per-run", type=click.FloatRange(0, min_open=True), metavar="NUMBER",
                 help="Number of GPUs, or share of one, for a run on Ray.  [default: 1 if there are GPUs]"),
    click.option("--cpus-per-run", type=click.IntRange(1),
                 help="Number of CPUs for a run on Ray, and of its threads.  [default: 1]"),
)
# fmt: on
NAMES = ("executor", "address", "gpus_per_run", "cpus_per_run")


def executor_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of executors to a command."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def _this_process() -> None:
    """Return None, with which a sweep and a chain run in this process."""


def take_executor(options: dict[str, Any]) -> RayExecutor | None:
    """Remove the options of executors from those of a command, and return the executor.

    None is that of this process.

    Raises:
        UsageError: an option is given that the executor does not have.
        RecipeError: the executor needs a library that is not installed.
    """
    from coursepack.distill.runs.cluster import RayExecutor

    executors: dict[str, Callable[..., RayExecutor | None]] = {LOCAL: _this_process, RAY: RayExecutor}
    own = {name: options.pop(name) for name in NAMES}
    return make_chosen(executors, "--executor", own.pop("executor"), **own)
