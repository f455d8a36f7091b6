"""Interface of a tracker: a service or a file format that shows the metrics of runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from coursepack.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path


@dataclass(frozen=True)
class TrackedRun:
    """A run of one student that a tracker is started for."""

    folder: Path
    """Folder of the run."""
    name: str
    """Name of the run for people: that of its folder, after that of its group."""
    recipe: Mapping[str, Any]
    """The recipe as plain values."""
    first: int | None = None
    """First epoch that will be logged, if the run is resumed."""
    state: Mapping[str, str] | None = None
    """What `Tracker.state` returned when the run was tracked before."""


class Tracker(Protocol):
    """Receiver of the metrics of one run."""

    state: Mapping[str, str]
    """Values by which the tracked run is found again when the run is resumed."""

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Record the metrics of one epoch, `metrics["epoch"]`."""

    def end(self, error: BaseException | None) -> None:
        """End the tracked run, as failed if there is an error."""


@dataclass(frozen=True)
class TrackerKind:
    """A tracker by name."""

    check: Callable[[], None]
    """Checks that its library is installed."""
    start: Callable[[TrackedRun], Tracker]
    """Starts tracking a run, or continues a tracked one. May raise errors of the library."""


def missing_tracker(name: str, error: ImportError) -> RecipeError:
    """Return the error for a tracker whose library cannot be imported."""
    return RecipeError(
        f"--track {name} needs a library that is not installed ({error}): pip install 'coursepack[{name}]'. "
        "The same numbers are in the run's metrics.jsonl."
    )


def leaves(value: Any, name: str = "", *, separator: str = "/") -> Iterator[tuple[str, Any]]:
    """Yield the path and value of every leaf of nested values; list items are named by index."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from leaves(inner, f"{name}{separator}{key}" if name else str(key), separator=separator)
    else:
        yield name, value


def scalars(value: Any) -> Iterator[tuple[str, float]]:
    """Yield the path and value of every number in nested metrics.

    >>> list(scalars({"train": {"loss": 1.5}, "teachers": {"weight": [0.25, 0.75]}}))
    [('train/loss', 1.5), ('teachers/weight/0', 0.25), ('teachers/weight/1', 0.75)]
    """
    for name, leaf in leaves(value):
        if isinstance(leaf, int | float):
            yield name, float(leaf)
