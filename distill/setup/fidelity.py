"""Warning where a temperature is too high for what a store kept of its teacher's logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coursepack.data.encodings import drops_classes, is_coarse
from coursepack.data.store.manifest import LOGITS
from coursepack.data.store.records import FIDELITY_TEMPERATURES, fidelity_summary
from coursepack.distill.schedule import range_of
from coursepack.distill.setup.requirements import precompute_command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.data.store import StoreReader
    from coursepack.distill.recipe import TrainRecipe

LARGEST_ERROR = 0.5
"""Largest T² KL(teacher || stored row) in nats, in units of the soft-target loss, without a warning."""


def temperature_warnings(recipe: TrainRecipe, readers: Sequence[StoreReader]) -> list[str]:
    """Return a warning for each store of sparse or int4 rows too far from the teacher at the temperature.

    The measure is the fidelity that the store recorded for its first view when it was written. Nothing is
    said of stores without it, or where teachers run live.
    """
    if recipe.online or not recipe.objective.needs().fused:
        return []
    _, hottest = range_of(recipe.objective.temperature)
    warnings = []
    for reader in readers:
        array = reader.manifest.arrays[LOGITS]
        errors = _recorded_errors(reader)
        if not is_coarse(array.encoding) or errors is None:
            continue
        error = _error_at(hottest, *errors)
        if error > LARGEST_ERROR:
            dense = precompute_command(
                reader,
                recipe.root,
                store=f"{reader.address.removesuffix('.zarr')}-int8.zarr",
                encoding="int8",
            )
            half = (
                "\nor as int4, in half the bytes; its errors are recorded and checked in the same way"
                if drops_classes(array.encoding)
                else ""
            )
            limit = _highest(*errors)
            other = "no temperature" if limit is None else f"temperatures up to {limit:.2g}"
            warnings.append(
                f"warning: the temperature is {hottest:g}, but the rows of store {reader.address!r} "
                f"({array.encoding.name}) support {other}: T² KL to the teacher is {error:.2g} nats, more "
                f"than {LARGEST_ERROR:g}. Lower the temperature, or write all logits as int8 with\n"
                f"  {dense}{half}"
            )
    return warnings


def _recorded_errors(reader: StoreReader) -> tuple[float, float] | None:
    """Return T² KL in nats at T = 1 and 4 that the first view recorded, or None."""
    summary = fidelity_summary(reader.manifest.view_records[str(reader.views[0])]["fidelity"])
    if not summary:
        return None
    first, second = (t**2 * summary[f"T={t:g}"]["mean"] for t in FIDELITY_TEMPERATURES)
    return first, second


def _error_at(temperature: float, first: float, second: float) -> float:
    """Return T² KL at a temperature: linear in 1/T between T = 1 and 4, and constant beyond."""
    share = (1 - 1 / min(max(temperature, 1.0), 4.0)) / 0.75
    return first + share * (second - first)


def _highest(first: float, second: float) -> float | None:
    """Return the highest temperature up to 4 whose error is small enough, or None if T = 1 is too high."""
    if first > LARGEST_ERROR:
        return None
    share = (LARGEST_ERROR - first) / (second - first) if second > LARGEST_ERROR else 1.0
    return 1 / (1 - 0.75 * share)
