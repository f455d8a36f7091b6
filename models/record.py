"""The accuracy that a run folder records for its network."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from coursepack.config import read_yaml
from coursepack.errors import RecipeError
from coursepack.parsing import parse_json, read_bounded

if TYPE_CHECKING:
    from pathlib import Path

METRICS_FILE, RECIPE_FILE = "metrics.jsonl", "recipe.yaml"
MAX_BYTES = 1 << 28


class Record(NamedTuple):
    """Result of an evaluation of a run."""

    accuracy: float
    """Share of samples that were classified correctly, from 0 to 1."""
    source: str
    """Source of the samples with its split, such as `digits:test`."""


def read_record(folder: Path, epochs: int | None = None, *, best: bool = False) -> Record | None:
    """Return the result of a run's last evaluation, or of the one after a number of completed epochs.

    With `best`, return the evaluation with the best accuracy. None if the folder has none that can be read.
    """
    try:
        recipe = read_yaml(folder / RECIPE_FILE)
        lines = read_bounded(folder / METRICS_FILE, MAX_BYTES).splitlines()
        evaluated: list[Record] = []
        for line in reversed(lines):
            metrics = parse_json(line)
            values = metrics.get("evaluation")
            if values is not None and epochs in (None, metrics["epoch"] + 1):
                evaluated.append(Record(float(values["accuracy"]), str(recipe["evaluation"])))
                if not best:
                    break
        return max(evaluated, default=None)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecipeError):
        return None
