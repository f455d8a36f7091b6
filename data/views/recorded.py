"""Views whose crops and flips were recorded by another program, read from the store that holds them.

A recorded view is a pure function of sample and view like any other: its parameters are an array in a store,
and the recipe, and with it every fingerprint, has the sha256 of that array.
"""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from coursepack.canonical import fingerprint
from coursepack.config import Config
from coursepack.data.views.params import GRID, MIRRORED, UPSIDE_DOWN, ViewParams
from coursepack.errors import RecipeError, StoreDamaged

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from coursepack.data.randomness import Samples
    from coursepack.data.store import StoreReader

RECORDED = "recorded"
"""Name of the array of a store with the parameters of its views `(V, N, 5)`: top, left, height and width in
2**-16 of the image's sides, and the flip bits; float32 that hold integers."""
COLUMNS = 5
READERS = 8
"""Maximum number of stores that are kept open for their parameters."""


class Recorded(Config):
    """Crop the recorded box of each sample and view, then flip it as recorded."""

    op: Literal["recorded"] = "recorded"
    parameters: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """sha256 of the recorded parameters of all samples and views, see `ParametersDigest`."""
    store: Annotated[str | None, Field(exclude=True)] = None
    """Address of the store that holds the parameters; not part of any fingerprint."""

    def params(self, samples: Samples, view: int) -> ViewParams:
        """Return the recorded parameters of one view of the samples.

        Raises:
            RecipeError: it is not known which store holds them.
            StoreIncomplete: the store does not have this view.
            StoreDamaged: the store's files are damaged, or a row is no crop.
        """
        if self.store is None:
            raise RecipeError(
                f"the view replays recorded crops ({self.parameters[:12]}), which are in the store that was "
                "imported with them: give that store with --store"
            )
        return params_of(_rows(_reader(self.store, self.parameters), view, samples))


@functools.lru_cache(READERS)
def _reader(store: str, parameters: str) -> StoreReader:
    from coursepack.data.store import StoreReader

    reader = StoreReader(store)
    ops = reader.manifest.identity["view"]["recipe"].get("ops", ())
    if [op.get("parameters") for op in ops] != [parameters]:
        raise RecipeError(
            f"store {store!r} does not hold the recorded crops {parameters[:12]} of this view: give the "
            "store "
            "that was imported with them"
        )
    return reader


def _rows(reader: StoreReader, view: int, samples: Samples) -> NDArray[np.int32]:
    rows = reader.rows(RECORDED, view, samples).decode().numpy()
    if rows.shape[1:] != (COLUMNS,) or not rows_are_valid(rows):
        raise StoreDamaged(
            f"view {view} of {RECORDED!r} in store {reader.address!r} has rows that are no crops, although "
            "their "
            "checksums are right: import the cache again into a new store"
        )
    return rows.astype(np.int32)


def params_of(rows: NDArray[np.int32]) -> ViewParams:
    """Return view parameters from rows `(N, 5)`."""
    return ViewParams(np.ascontiguousarray(rows[:, :4]), rows[:, 4].astype(np.uint8))


def rows_are_valid(rows: NDArray[np.float32] | NDArray[np.int32]) -> bool:
    """Return True if rows `(N, 5)` hold integers, boxes on or next to the image, and flip bits."""
    start, length, flips = rows[:, :2], rows[:, 2:4], rows[:, 4]
    near = (np.abs(rows) <= 2 * GRID).all() and (start + length <= 2 * GRID).all()  # False for NaN
    return bool(
        near
        and (rows == np.rint(rows)).all()
        and (length >= 1).all()
        and (start >= -GRID).all()
        and ((flips >= 0) & (flips <= (MIRRORED | UPSIDE_DOWN))).all()
    )


class ParametersDigest:
    """sha256 over the recorded parameters of all samples and views.

    It is the sha256 of the canonical JSON list of one sha256 per view, each over the view's rows in the order
    of the samples, as little-endian int32.
    """

    def __init__(self, views: int) -> None:
        self._views = [hashlib.sha256() for _ in range(views)]

    def add(self, view: int, rows: NDArray[np.int32]) -> None:
        """Add the next rows `(n, 5)` of a view."""
        self._views[view].update(np.ascontiguousarray(rows, dtype="<i4").tobytes())

    def hexdigest(self) -> str:
        """Return the sha256 of what was added so far."""
        return fingerprint([digest.hexdigest() for digest in self._views])


def parameters_of_store(reader: StoreReader, views: Iterable[int], rows_at_a_time: int = 1 << 16) -> str:
    """Return the digest of the parameters that a store holds for some views."""
    views = list(views)
    digest = ParametersDigest(len(views))
    for index, view in enumerate(views):
        for start in range(0, reader.manifest.samples, rows_at_a_time):
            samples = np.arange(start, min(start + rows_at_a_time, reader.manifest.samples))
            digest.add(index, _rows(reader, view, samples))
    return digest.hexdigest()


def rows_of_crops(
    start: NDArray[np.int64], stop: NDArray[np.int64], sides: NDArray[np.int32], mirrored: NDArray[np.bool_]
) -> NDArray[np.int32]:
    """Return rows `(N, 5)` for crops on whole pixels.

    Args:
        start: first row and column `(N, 2)` of each crop.
        stop: row and column `(N, 2)` after its last ones.
        sides: height and width `(N, 2)` of the images.
        mirrored: True for crops that are flipped left and right `(N,)`.
    """
    low, high = GRID * start // sides, GRID * stop // sides
    flips = mirrored.astype(np.int64)[:, None] * MIRRORED
    return np.concatenate([low, np.maximum(high - low, 1), flips], axis=1).astype(np.int32)
