"""Checkpoints: all that a run needs to go on, to the last bit, from between two steps."""

from __future__ import annotations

import io
import zipfile
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from coursepack.errors import RunError
from coursepack.files import write_whole

if TYPE_CHECKING:
    from pathlib import Path

    from coursepack.distill.training.metrics import EpochMetrics
    from coursepack.distill.training.state import TrainState

CHECKPOINT_FILE = "checkpoint.pt"
VERSION = 2


@dataclass
class Position:
    """How far a run is."""

    epoch: int = 0
    batches: int = 0
    """Batches of the epoch that are done."""
    seconds: float = 0.0
    """Time that they took."""
    best: float | None = None
    """The best accuracy of an evaluation so far."""
    stale: int = 0
    """Evaluations since then."""


def save_checkpoint(folder: Path, position: Position, state: TrainState, metrics: EpochMetrics) -> None:
    """Write a run's checkpoint; a kill leaves the old one or the new one. Of several ranks the first does."""
    content = {
        "version": VERSION,
        "position": asdict(position),
        "state": state.state(),
        "metrics": metrics.state(),
    }
    if not state.learner.ranks.is_first:
        return
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(folder / CHECKPOINT_FILE, buffer.getvalue())


def load_checkpoint(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """What `save_checkpoint` wrote; None where there is none. Nothing is unpickled but plain values.

    Raises:
        RunError: it cannot be read, or is of another version.
    """
    path = folder / CHECKPOINT_FILE
    if not path.is_file():
        return None
    try:
        _check_sums(path)
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise RunError(
            f"checkpoint {str(path)!r} cannot be read ({error}): train again with --overwrite"
        ) from error
    if state.get("version") != VERSION:
        raise RunError(
            f"checkpoint {str(path)!r} is of version {state.get('version')}, expected {VERSION}: finish the "
            "run with the version that began it, or train again with --overwrite"
        )
    return state


def _check_sums(path: Path) -> None:
    """Compare the file's checksums, which torch writes but does not look at."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of its part {damaged!r} is wrong")
