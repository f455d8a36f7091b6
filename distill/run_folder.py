"""A run's folder: the recipe as used, where its targets came from, metrics per epoch, weights.

recipe.yaml          trains this run again
provenance.json      fingerprints of the stores it read, library versions, device
network.yaml         what `run:FOLDER` needs to build the student
metrics.jsonl        one line per epoch
student.safetensors  the student's weights after the last epoch; its presence says the run is finished
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors.torch import save

from coursepack.canonical import canonical_json
from coursepack.config import parse_config, write_yaml
from coursepack.distill.recipe import TrainRecipe, load_recipe
from coursepack.errors import RunError
from coursepack.files import write_whole
from coursepack.models.build import NETWORK_FILE, WEIGHTS_FILE

if TYPE_CHECKING:
    from pathlib import Path

    from coursepack.models import Network

RECIPE_FILE = "recipe.yaml"
PROVENANCE_FILE = "provenance.json"
METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class FinishedRun:
    """What is kept of a run."""

    path: Path
    recipe: TrainRecipe
    metrics: list[dict[str, Any]]
    """One entry per epoch."""


class RunFolder:
    """A run being written."""

    def __init__(self, path: Path, recipe: TrainRecipe, provenance: dict[str, Any], network: Network) -> None:
        """Make the folder.

        Raises:
            RunError: the folder cannot be made.
        """
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"cannot make the run's folder {str(path)!r}: {error.strerror}. Choose another --out."
            ) from error
        write_whole(path / RECIPE_FILE, write_yaml(recipe.model_dump(mode="json")).encode())
        write_whole(path / PROVENANCE_FILE, canonical_json(provenance, indent=1).encode())
        write_whole(path / NETWORK_FILE, write_yaml(network.describe()).encode())
        (path / METRICS_FILE).write_bytes(b"")

    def log(self, metrics: dict[str, Any]) -> None:
        """Append one epoch's metrics."""
        with (self.path / METRICS_FILE).open("a") as file:
            file.write(canonical_json(metrics) + "\n")

    def finish(self, network: Network) -> None:
        """Write the weights."""
        state = {
            name: value.detach().cpu().contiguous() for name, value in network.module.state_dict().items()
        }
        write_whole(self.path / WEIGHTS_FILE, save(state))


def check_free(path: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds something, or clear it of an earlier run.

    Raises:
        RunError: the folder is not empty, and is not a run or may not be overwritten.
    """
    if path.exists() and not path.is_dir():
        raise RunError(f"{str(path)!r} is a file, expected a folder for the run: choose another --out")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not (path / RECIPE_FILE).is_file():
        raise RunError(f"{str(path)!r} is not empty and not a run: choose another --out")
    if not overwrite:
        raise RunError(f"{str(path)!r} already holds a run: choose another --out, or give --overwrite")
    shutil.rmtree(path)


def load_run(path: Path) -> FinishedRun:
    """Read a finished run's recipe and metrics.

    Raises:
        RunError: there is no run, or it is unfinished.
    """
    if not (path / RECIPE_FILE).is_file():
        raise RunError(f"there is no run at {str(path)!r}. Make one with `distill train ... --out {path}`.")
    if not (path / WEIGHTS_FILE).is_file():
        raise RunError(f"run {str(path)!r} is unfinished: train it again with --overwrite")
    recipe = parse_config(TrainRecipe, load_recipe(path / RECIPE_FILE), str(path / RECIPE_FILE))
    lines = (path / METRICS_FILE).read_text().splitlines()
    return FinishedRun(path, recipe, [json.loads(line) for line in lines])
