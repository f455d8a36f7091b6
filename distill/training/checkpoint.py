"""Checkpoints: the complete state of a run between two steps, from which it resumes bit for bit."""

from __future__ import annotations

import io
import zipfile
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field

from coursepack.canonical import canonical_json, difference_table
from coursepack.config import Config, parse_config
from coursepack.errors import RunError
from coursepack.files import write_whole
from coursepack.parsing import parse_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from coursepack.distill.training.metrics import EpochMetrics
    from coursepack.distill.training.state import TrainState

CHECKPOINT_FILE = "checkpoint.pt"
KEYS = {"version", "identity", "position", "state", "metrics"}
VERSION = 2
"""Format version. Version 1 had no identity, so a checkpoint of another run could not be detected."""


@dataclass
class Position:
    """Progress of a run."""

    epoch: int = 0
    """Index of the current epoch."""
    batches: int = 0
    """Number of completed batches of the epoch."""
    seconds: float = 0.0
    """Training time of these batches."""
    best: float | None = None
    """Best evaluation accuracy so far."""
    stale: int = 0
    """Number of evaluations since the best one."""


class _PositionConfig(Config):
    """Schema of a position read from a file."""

    epoch: Annotated[int, Field(ge=0)]
    batches: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0)]
    best: Annotated[float, Field(ge=0, le=1)] | None
    stale: Annotated[int, Field(ge=0)]


Progress = tuple[Position, "TrainState", "EpochMetrics"]
"""Progress of a student: position, state, and metrics of the epoch so far."""


def save_checkpoint(folder: Path, students: Progress | Sequence[Progress], identity: dict[str, Any]) -> None:
    """Write a run's checkpoint atomically. All ranks must call it; only the first one writes.

    Args:
        folder: the run's folder.
        students: progress of the student, or of every student of a group.
        identity: everything that determines the run, as plain values; compared by `check_identity`.
    """
    group = [students] if isinstance(students, tuple) else students
    entries = [
        {"position": asdict(position), "state": state.state(), "metrics": metrics.state()}
        for position, state, metrics in group
    ]
    content: dict[str, Any] = {"version": VERSION, "identity": canonical_json(identity)}
    for key in ("position", "state", "metrics"):
        values = [entry[key] for entry in entries]
        content[key] = values[0] if isinstance(students, tuple) else values
    if not group[0][1].learner.ranks.is_first:
        return
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(folder / CHECKPOINT_FILE, buffer.getvalue())


def of_student(folder: Path, content: dict[str, Any], index: int, count: int) -> dict[str, Any]:
    """Return the part of a group's checkpoint that belongs to one of its students.

    Raises:
        RunError: the checkpoint is not of a group of `count` students.
    """
    lists = {key: content[key] for key in ("position", "state", "metrics")}
    if not all(isinstance(values, list) and len(values) == count for values in lists.values()):
        raise _damaged(folder, f"it does not hold {count} students")
    return {**content, **{key: values[index] for key, values in lists.items()}}


def load_checkpoint(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """Return the checkpoint in a folder, or None if there is none.

    Only tensors and plain values are unpickled (`weights_only=True`).

    Raises:
        RunError: the checkpoint cannot be read, or has another version.
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
    if not isinstance(state, dict):
        raise _damaged(folder, f"it holds a {type(state).__name__}")
    version = state.get("version")
    if type(version) is not int or version != VERSION:
        raise RunError(
            f"checkpoint {str(path)!r} has version {version!r:.40}, expected {VERSION}: finish the "
            "run with the release that started it, or train again with --overwrite"
        )
    if missing := KEYS - state.keys():
        raise _damaged(folder, f"it has no {', '.join(sorted(missing))}")
    return state


def restore(
    folder: Path,
    content: dict[str, Any],
    state: TrainState,
    metrics: EpochMetrics,
    *,
    epochs: int,
    batches: int,
) -> Position:
    """Restore a student and its metrics from a checkpoint, and return the run's position.

    Args:
        folder: the run's folder.
        content: a result of `load_checkpoint`.
        state: state of the student; changed in place.
        metrics: metrics of the epoch; changed in place.
        epochs: number of epochs of the run.
        batches: number of batches per epoch.

    Raises:
        RunError: the checkpoint is damaged or does not fit this run.
    """
    try:
        stated = parse_config(_PositionConfig, content["position"], "its position")
        position = Position(**stated.model_dump())
        if position.epoch >= epochs or position.batches > batches:
            raise ValueError(f"it is in epoch {position.epoch} after {position.batches} batches")
        state.restore(content["state"])
        metrics.restore(content["metrics"])
        metrics.means()
    except Exception as error:  # torch raises half a dozen kinds for states of another form
        raise _damaged(folder, " ".join(str(error).split())[:500] or type(error).__name__) from error
    return position


def check_identity(folder: Path, state: dict[str, Any], identity: dict[str, Any]) -> None:
    """Check that a checkpoint was written by this run.

    Args:
        folder: the run's folder.
        state: a result of `load_checkpoint`.
        identity: everything that determines this run, as plain values.

    Raises:
        RunError: the checkpoint belongs to another run; the message shows the differences.
    """
    held = state["identity"]
    if not isinstance(held, str) or held != canonical_json(identity):
        try:
            table = difference_table(parse_json(held), identity, "checkpoint", "this run")
        except (ValueError, TypeError, AttributeError) as error:
            raise _damaged(folder, "its identity cannot be read") from error
        raise RunError(
            f"checkpoint {str(folder / CHECKPOINT_FILE)!r} belongs to another run.\n{table}\n"
            "Resume with the values in the checkpoint, or train again with --overwrite."
        )


def _check_sums(path: Path) -> None:
    """Verify the checksums of the file's entries, which torch writes but does not verify."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is compressed, but torch writes uncompressed files")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of its entry {damaged!r} is wrong")


def _damaged(folder: Path, fault: str) -> RunError:
    return RunError(
        f"checkpoint {str(folder / CHECKPOINT_FILE)!r} is damaged: {fault}. Train again with --overwrite."
    )
