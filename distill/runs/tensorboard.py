"""Metrics for TensorBoard, where it is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coursepack.errors import RecipeError
from coursepack.files import naming

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from typing import Self


def check_tensorboard() -> None:
    """Refuse before a run what would fail in it.

    Raises:
        RecipeError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401 - only to see whether it is there
    except ImportError as error:
        raise RecipeError(
            "--tensorboard needs a library that is not installed: pip install 'coursepack[tensorboard]'. "
            "The same numbers are in the run's metrics.jsonl."
        ) from error


class Board:
    """Scalars by epoch, in a folder of event files."""

    def __init__(self, path: Path, *, first: int | None = None) -> None:
        """Write into a folder; what was written of epoch `first` and later ones is no longer shown."""
        from torch.utils.tensorboard import SummaryWriter

        self._path = path
        self._writer: Any = SummaryWriter(str(path), purge_step=first)  # type: ignore[no-untyped-call, unused-ignore]  # optional, untyped

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Write one epoch's metrics, so that they can be looked at and outlive the process."""
        with naming(self._path):
            for name, value in scalars(metrics):
                self._writer.add_scalar(name, value, metrics["epoch"])
            self._writer.flush()  # a run that is killed has told what it finished


class NoBoard:
    """Nowhere."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Write nothing."""


def scalars(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number in metrics with a path for a name; a list counts its places.

    >>> list(scalars({"train": {"loss": 1.5}, "teachers": {"weight": [0.25, 0.75]}}))
    [('train/loss', 1.5), ('teachers/weight/0', 0.25), ('teachers/weight/1', 0.75)]
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from scalars(inner, f"{name}/{key}" if name else str(key))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from scalars(inner, f"{name}/{place}")
    elif isinstance(value, (int, float)):
        yield name, float(value)
