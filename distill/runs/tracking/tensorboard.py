"""Metrics for TensorBoard, an optional dependency."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coursepack.distill.runs.tracking.base import missing_tracker, scalars
from coursepack.files import naming

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Self

    from coursepack.distill.runs.tracking.base import TrackedRun

FOLDER = "tensorboard"
"""Folder of the event files within a run's folder."""


def check() -> None:
    """Check that TensorBoard is installed.

    Raises:
        RecipeError: it is not.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401 - only to see whether it is installed
    except ImportError as error:
        raise missing_tracker("tensorboard", error) from error


def start(run: TrackedRun) -> MetricWriter:
    """Open event files in the run's folder."""
    return MetricWriter(run.folder / FOLDER, first=run.first)


class MetricWriter:
    """Writer of metrics by epoch to TensorBoard event files."""

    def __init__(self, path: Path, *, first: int | None = None) -> None:
        """Initialize a writer to a folder; events of epoch `first` and later ones are purged."""
        from torch.utils.tensorboard import SummaryWriter

        self.state: Mapping[str, str] = {}
        self._path = path
        self._writer: Any = SummaryWriter(str(path), purge_step=first)  # type: ignore[no-untyped-call, unused-ignore]  # optional, untyped

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end(None)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of one epoch, and flush them to disk."""
        with naming(self._path):
            for name, value in scalars(metrics):
                self._writer.add_scalar(name, value, metrics["epoch"])
            self._writer.flush()

    def end(self, error: BaseException | None) -> None:
        """Close the event files."""
        self._writer.close()
