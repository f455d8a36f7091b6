"""Checkpoints: all that a run needs to go on, to the last bit, from between two steps."""

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
    from pathlib import Path

    from coursepack.distill.training.metrics import EpochMetrics
    from coursepack.distill.training.state import TrainState

CHECKPOINT_FILE = "checkpoint.pt"
PARTS = {"version", "identity", "position", "state", "metrics"}
VERSION = 2
"""Version 1 did not hold the identity of its run, so that a checkpoint of another run could be taken."""


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


class _StatedPosition(Config):
    """A position as a file gives it."""

    epoch: Annotated[int, Field(ge=0)]
    batches: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0)]
    best: Annotated[float, Field(ge=0, le=1)] | None
    stale: Annotated[int, Field(ge=0)]


def save_checkpoint(
    folder: Path, position: Position, state: TrainState, metrics: EpochMetrics, identity: dict[str, Any]
) -> None:
    """Write a run's checkpoint; a kill leaves the old one or the new one. Of several ranks the first does.

    Args:
        folder: the run's folder.
        position: how far the run is.
        state: the student in training.
        metrics: sums of the epoch so far.
        identity: everything that determines the run, as plain values; `check_identity` compares it.
    """
    content = {
        "version": VERSION,
        "identity": canonical_json(identity),
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
    if not isinstance(state, dict):
        raise _damaged(folder, f"it holds a {type(state).__name__}")
    version = state.get("version")
    if type(version) is not int or version != VERSION:
        raise RunError(
            f"checkpoint {str(path)!r} is of version {version!r:.40}, expected {VERSION}: finish the "
            "run with the version that began it, or train again with --overwrite"
        )
    if missing := PARTS - state.keys():
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
    """Put a student and its metrics where a checkpoint has them, and return the position.

    Args:
        folder: the run's folder.
        content: a result of `load_checkpoint`.
        state: the student in training; changed in place.
        metrics: sums of the epoch; changed in place.
        epochs: epochs of the run.
        batches: batches of an epoch.

    Raises:
        RunError: the checkpoint is not one of this run.
    """
    try:
        stated = parse_config(_StatedPosition, content["position"], "its position")
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
    """Refuse a checkpoint that was written by another run than the one at hand.

    Args:
        folder: of the run.
        state: from `load_checkpoint`.
        identity: what determines the run at hand.

    Raises:
        RunError: the text says what differs.
    """
    held = state["identity"]
    if not isinstance(held, str) or held != canonical_json(identity):
        try:
            table = difference_table(parse_json(held), identity, "checkpoint", "this run")
        except (ValueError, TypeError, AttributeError) as error:
            raise _damaged(folder, "it does not say which run it is of") from error
        raise RunError(
            f"checkpoint {str(folder / CHECKPOINT_FILE)!r} is of another run.\n{table}\n"
            "Resume with what it was written with, or train again with --overwrite."
        )


def _check_sums(path: Path) -> None:
    """Compare the file's checksums, which torch writes but does not look at."""
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise ValueError("it is compressed, as torch writes none")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of its part {damaged!r} is wrong")


def _damaged(folder: Path, fault: str) -> RunError:
    return RunError(
        f"checkpoint {str(folder / CHECKPOINT_FILE)!r} is damaged: {fault}. Train again with --overwrite."
    )
