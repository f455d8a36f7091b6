"""Metrics for TensorBoard, an optional dependency."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coursepack.errors import RecipeError
from coursepack.files import naming

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from typing import Self


def check_tensorboard() -> None:
    """Check that TensorBoard is installed.

    Raises:
        RecipeError: it is not.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401 - only to see whether it is installed
    except ImportError as error:
        raise RecipeError(
            "--tensorboard needs a library that is not installed: pip install 'coursepack[tensorboard]'. "
            "The same numbers are in the run's metrics.jsonl."
        ) from error


class MetricWriter:
    """Writer of metrics by epoch to TensorBoard event files."""

    def __init__(self, path: Path, *, first: int | None = None) -> None:
        """Initialize a writer to a folder; events of epoch `first` and later ones are purged."""
        from torch.utils.tensorboard import SummaryWriter

        self._path = path
        self._writer: Any = SummaryWriter(str(path), purge_step=first)  # type: ignore[no-untyped-call, unused-ignore]  # optional, untyped

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of one epoch, and flush them to disk."""
        with naming(self._path):
            for name, value in scalars(metrics):
                self._writer.add_scalar(name, value, metrics["epoch"])
            self._writer.flush()


class NoMetricWriter:
    """Writer that discards metrics."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Do nothing."""


def scalars(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield the path and value of every number in nested metrics; list items are named by index.

    >>> list(scalars({"train": {"loss": 1.5}, "teachers": {"weight": [0.25, 0.75]}}))
    [('train/loss', 1.5), ('teachers/weight/0', 0.25), ('teachers/weight/1', 0.75)]
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from scalars(inner, f"{name}/{key}" if name else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from scalars(inner, f"{name}/{index}")
    elif isinstance(value, (int, float)):
        yield name, float(value)
