"""Specs of networks in run folders: `run:FOLDER`, `run:FOLDER@best`, `run:FOLDER@EPOCH` and `run:FOLDER@all`.

A run folder has the weights after the last epoch, those with the best accuracy, and those of the epochs that
`distill train --keep-checkpoints` kept. EPOCH is the number of completed epochs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from coursepack.errors import RunError
from coursepack.models.build import RUN, WEIGHTS_FILE

CHECKPOINTS_FOLDER = "checkpoints"
EVERY = "all"
"""Epoch in the spec of all kept checkpoints."""
BEST = "best"
"""Epoch in the spec of the weights with the best accuracy."""
BEST_FILE = "best.safetensors"
_FILE = re.compile(r"epoch-(\d+)\.safetensors")


@dataclass(frozen=True)
class RunSpec:
    """Run folder, and the epoch whose weights are meant."""

    folder: Path
    epoch: int | None = None
    """Number of completed epochs; None means the last epoch."""
    every: bool = False
    """True if all kept checkpoints are meant."""
    best: bool = False
    """True if the weights after the evaluation with the best accuracy are meant."""

    @property
    def weights(self) -> Path:
        """File of the weights.

        Raises:
            RunError: the epoch was not kept, or the spec means several.
        """
        if self.every:
            raise RunError(
                f"teacher 'run:{self.folder}@{EVERY}' is all kept checkpoints of a run, which only "
                f"`precompute run` takes: name one of them, {_choices(self.folder)}"
            )
        if self.best:
            return self.folder / BEST_FILE
        if self.epoch is None:
            return self.folder / WEIGHTS_FILE
        kept = kept_epochs(self.folder)
        if self.epoch not in kept:
            raise RunError(
                f"run {str(self.folder)!r} kept no checkpoint after {self.epoch} epochs: expected "
                f"{_choices(self.folder)}"
            )
        return checkpoint_file(self.folder, self.epoch)


def parse_run_spec(spec: str) -> RunSpec:
    """Return the folder and the epoch of a spec.

    A folder whose own name ends in `@EPOCH`, `@best` or `@all` is meant itself.
    """
    text = spec.removeprefix(f"{RUN}:")
    folder, _, epoch = text.rpartition("@")
    if not folder or not (epoch in (EVERY, BEST) or epoch.isdecimal()) or Path(text).is_dir():
        return RunSpec(Path(text))
    if epoch in (EVERY, BEST):
        return RunSpec(Path(folder), every=epoch == EVERY, best=epoch == BEST)
    return RunSpec(Path(folder), int(epoch))


def checkpoint_file(folder: Path, epoch: int) -> Path:
    """Return the file of the weights after a number of epochs."""
    return folder / CHECKPOINTS_FOLDER / f"epoch-{epoch:04d}.safetensors"


def kept_epochs(folder: Path) -> list[int]:
    """Return the epochs whose weights a run folder holds, in order."""
    path = folder / CHECKPOINTS_FOLDER
    found = [_FILE.fullmatch(child.name) for child in path.iterdir()] if path.is_dir() else []
    return sorted(int(match[1]) for match in found if match is not None)


def spec_of_weights(weights: str) -> str | None:
    """Return the spec of weights in a run folder; None for other files."""
    path = Path(weights)
    if path.name in (WEIGHTS_FILE, BEST_FILE):
        return f"{RUN}:{path.parent}" + (f"@{BEST}" if path.name == BEST_FILE else "")
    match = _FILE.fullmatch(path.name)
    if match is None or path.parent.name != CHECKPOINTS_FOLDER:
        return None
    return f"{RUN}:{path.parent.parent}@{int(match[1])}"


def specs_of_checkpoints(spec: RunSpec) -> dict[int, str]:
    """Return the spec of every kept checkpoint of a finished run by its epoch.

    Raises:
        RunError: the run is unfinished, or kept none.
    """
    if not (spec.folder / WEIGHTS_FILE).is_file():
        raise RunError(
            f"run {str(spec.folder)!r} is unfinished or not a run, so its checkpoints are not all kept: "
            "finish it first, or name one with @EPOCH"
        )
    kept = kept_epochs(spec.folder)
    if not kept:
        raise RunError(f"run {str(spec.folder)!r} kept no checkpoints: expected {_choices(spec.folder)}")
    return {epoch: f"{RUN}:{spec.folder}@{epoch}" for epoch in kept}


def _choices(folder: Path) -> str:
    kept = kept_epochs(folder)
    return (
        f"@{', @'.join(map(str, kept))}"
        if kept
        else "a run that was trained with `distill train --keep-checkpoints EVERY`"
    )
