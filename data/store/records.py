"""Records of views: sums over rows, checksums of draws and fidelity of the encoding.

Every block has its own record. The record of a view is reduced from these in block order, so it does not
depend on which worker wrote which block, or when.
"""

from __future__ import annotations

from collections import Counter
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coursepack.canonical import canonical_json
from coursepack.errors import StoreDamaged
from coursepack.kernels import soft_target_loss

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from coursepack.kernels import Rows

FIDELITY_TEMPERATURES = (1.0, 4.0)
TOTALS = ("rows", "correct")
"""Sums over all views in a manifest; integral, so that the order of addition does not matter."""
KNOWN = "known"
"""Sum of the rows whose label the teacher knows, of a teacher that does not know all classes: `correct` and
`cross_entropy` are of these rows."""
_PER_DECADE = 16
_LOWEST_DECADE = -14


def divergences(exact: Tensor, rows: Rows) -> dict[str, NDArray[np.float64]]:
    """Return KL(exact || decoded) of encoded logits, in nats `(N,)`, by name of the temperature.

    Args:
        exact: logits `(N, C)` float32.
        rows: the same logits, encoded.
    """
    found = {}
    for temperature in FIDELITY_TEMPERATURES:
        decoded = rows.decode(torch.full((len(exact),), temperature))
        scaled = soft_target_loss(decoded, [exact], temperature=temperature)
        found[f"T={temperature:g}"] = scaled.double().numpy() / temperature**2
    return found


def fidelity(batches: Sequence[dict[str, NDArray[np.float64]]]) -> dict[str, Any]:
    """Return the fidelity of the rows of batches, each as `divergences` returns it.

    Returns:
        Row count, sum, maximum and logarithmic histogram per temperature, all of which can be merged.
    """
    record = {}
    for name in batches[0] if batches else ():
        kl = np.concatenate([batch[name] for batch in batches])
        bins, counts = np.unique(_bin(kl), return_counts=True)
        record[name] = {
            "rows": len(kl),
            # sum() rounds differently in different versions of Python
            "sum": reduce(add, (float(batch[name].sum()) for batch in batches)),
            "largest": float(kl.max(initial=0.0)),
            "histogram": {str(place): int(count) for place, count in zip(bins, counts, strict=True)},
        }
    return record


def merge_fidelity(total: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Merge the fidelity of two sets of rows."""
    if not total:
        return more
    merged = {}
    for name, first in total.items():
        second = more[name]
        counts = Counter(first["histogram"]) + Counter(second["histogram"])
        merged[name] = {
            "rows": first["rows"] + second["rows"],
            "sum": first["sum"] + second["sum"],
            "largest": max(first["largest"], second["largest"]),
            "histogram": dict(counts),
        }
    return merged


def fidelity_summary(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return mean, 99th percentile (upper edge of its bin, at most 16 % too high) and largest KL, in nats."""
    summary = {}
    for name, entry in record.items():
        left = 0.01 * entry["rows"]
        percentile = 0.0
        for place in sorted(map(int, entry["histogram"]), reverse=True):
            percentile = 10 ** ((place + 1) / _PER_DECADE + _LOWEST_DECADE)
            left -= entry["histogram"][str(place)]
            if left < 0:
                break
        summary[name] = {
            "mean": entry["sum"] / max(entry["rows"], 1),
            "p99": min(percentile, entry["largest"]),
            "largest": entry["largest"],
        }
    return summary


def view_mean(record: dict[str, Any], name: str, where: str) -> float:
    """Return the mean over a view's rows of one of its `sums`: `correct`, `cross_entropy` or `entropy`.

    Raises:
        StoreDamaged: the record lacks that sum; the message contains `where`, the name of view and store.
    """
    sums = record["sums"]
    if "rows" not in sums or name not in sums:
        raise StoreDamaged(
            f"the manifest has no sum of {name!r} for {where}, which `precompute run` always writes. Write "
            "the store again."
        )
    rows = sums["rows"] if name == "entropy" else sums.get(KNOWN, sums["rows"])
    return float(sums[name] / max(rows, 1))


def merge_environments(
    environments: Iterable[dict[str, Any]], records: Iterable[dict[str, Any]]
) -> tuple[dict[str, Any], ...]:
    """Return the distinct environments of both arguments, sorted by canonical text."""
    found = {canonical_json(environment): environment for environment in environments}
    for record in records:
        found |= {canonical_json(environment): environment for environment in record["environments"]}
    return tuple(found[text] for text in sorted(found))


def add_totals(totals: Mapping[str, float], records: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Return `totals` with `rows`, those with a known label, and `correct` of the given records added."""
    found = {name: float(totals.get(name, 0.0)) for name in TOTALS}
    for record in records:
        sums = record["sums"]
        found["rows"] += float(sums.get(KNOWN, sums.get("rows", 0.0)))
        found["correct"] += float(sums.get("correct", 0.0))
    return found


def reduce_records(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Reduce the records of a view's blocks, given in block order, to the record of the view."""
    sums: dict[str, float] = {}
    measured: dict[str, Any] = {}
    environments: list[Any] = []
    for record in records:
        for name, value in record["sums"].items():
            sums[name] = sums.get(name, 0.0) + value
        measured = merge_fidelity(measured, record["fidelity"]) if record["fidelity"] else measured
        if record["environment"] not in environments:
            environments.append(record["environment"])
    content = [record["content"] for record in records if "content" in record]
    precision = [record["precision"] for record in records if "precision" in record]
    return {
        "sums": sums,
        "fidelity": measured,
        "draws": [record["draws"] for record in records],
        "probes": {
            sample: digest for record in records for sample, digest in record.get("probes", {}).items()
        },
        "environments": environments,
        **({"content": content} if content else {}),
        **({"precision": precision[0]} if precision else {}),
    }


def _bin(kl: NDArray[np.float64]) -> NDArray[np.int64]:
    decades = np.log10(np.maximum(kl, 10.0**_LOWEST_DECADE)) - _LOWEST_DECADE
    bins: NDArray[np.int64] = np.floor(decades * _PER_DECADE).astype(np.int64)
    return bins
