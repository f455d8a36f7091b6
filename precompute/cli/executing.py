"""Options of `precompute run` that choose the executor."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import click

from coursepack.commands import Choice

if TYPE_CHECKING:
    from collections.abc import Callable

    from coursepack.precompute.executors.base import Executor

LOCAL = "local"
"""Executor of this process."""
NAMES = (LOCAL, "ray")
"""Names of the executors, so that help does not import them."""

# fmt: off
OPTIONS = (
    click.option("--executor", type=Choice(NAMES), default=LOCAL, show_default=True,
                 help="Processes that run the teacher: this one, or the workers of a Ray cluster."),
    click.option("--address",
                 help="Address of the Ray cluster, or auto.  [default: RAY_ADDRESS, or this machine alone]"),
    click.option("--actors", type=click.IntRange(1),
                 help="Number of Ray workers.  [default: one per GPU, or without GPUs per CPU]"),
    click.option("--workers-per-gpu", type=click.IntRange(1),
                 help="Number of Ray workers that share a GPU.  [default: 1]"),
)
# fmt: on


def executor_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of executors to a command."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def make_executor(name: str, **options: Any) -> Executor:
    """Return an executor by name.

    Args:
        name: name of the executor.
        options: values of the other options, None where an option is not given.

    Raises:
        UsageError: an option is given that the executor does not have.
        RecipeError: the executor needs a library that is not installed.
    """
    from coursepack.precompute.executors import EXECUTORS

    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in inspect.signature(EXECUTORS[name]).parameters:
            others = " or ".join(
                other for other in EXECUTORS if option in inspect.signature(EXECUTORS[other]).parameters
            )
            flag = f"--{option.replace('_', '-')}"
            raise click.UsageError(
                f"{flag} does not apply to --executor {name}: give --executor {others}, or leave {flag} out."
            )
    return EXECUTORS[name](**given)
