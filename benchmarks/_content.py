"""Synthetic logits of teachers, stores with them, and batches to read, for benchmarks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from coursepack.data import ViewRecipe
from coursepack.data.encodings import parse_encoding
from coursepack.data.store import StorePlan, StoreReader, StoreWriter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BATCH = 256
LOGITS = "logits"
ROWS_AT_A_TIME = 4096
RANK = 64


class Shuffle:
    """Batches of a random permutation, repeated without end."""

    def __init__(self, rows: int, batches: int) -> None:
        self._order, self._batches, self._place = np.random.default_rng(2).permutation(rows), batches, 0

    def each(self, use: Callable[[np.ndarray], Any]) -> Callable[[], None]:
        """Return a function that calls `use` with each of the next few batches."""

        def run() -> None:
            for _ in range(self._batches):
                if self._place + BATCH > len(self._order):
                    self._place = 0
                use(self._order[self._place : self._place + BATCH])
                self._place += BATCH

        return run


def logits(rows: int, classes: int, *, seed: int = 0, scale: float = 1.5) -> np.ndarray:
    """Return low-rank logits `(rows, classes)` float32; most rows have one dominant class, as in practice."""
    rng = np.random.default_rng(seed)
    head = rng.standard_normal((classes, RANK), dtype=np.float32)
    features = rng.standard_normal((rows, RANK), dtype=np.float32)
    labels = made_labels(rows, classes)
    features += 0.25 * head[labels]
    return scale / 8 * features @ head.T * np.float32(1.6)


def made_labels(rows: int, classes: int) -> np.ndarray:
    """Return class ids `(rows,)` int64."""
    return np.random.default_rng(1).integers(0, classes, rows)


PIXELS = {"size": 1, "mean": [0.0], "std": [1.0]}


def write_store(
    path: Path, values: np.ndarray, *, encoding: str, views: int = 1, block_rows: int | None = None
) -> StoreReader:
    """Write a store with the same logits in every view."""
    rows, classes = values.shape
    recipe = ViewRecipe()
    identity = {
        "teacher": {"network": "made up", "weights": path.name, "preprocessing": PIXELS},
        "view": {"recipe": recipe.model_dump(mode="json"), "fingerprint": "made up"},
        "source": {"name": "made up", "fingerprint": "made up"},
    }
    plan = StorePlan(
        identity=identity,
        origin={},
        labels=made_labels(rows, classes),
        class_names=tuple(map(str, range(classes))),
        views=views,
        arrays={"logits": (parse_encoding(encoding), (classes,))},
        block_rows=block_rows,
    )
    with StoreWriter(path, plan) as writer:
        for block in writer.pending():
            files = writer.write(block, {"draws": f"{block.start:08x}", "environment": {}})
            for start in range(block.start, block.stop, ROWS_AT_A_TIME):
                files.add({"logits": values[start : min(start + ROWS_AT_A_TIME, block.stop)]})
            files.finish({"rows": len(block)})
        writer.commit()
    return StoreReader(path)
