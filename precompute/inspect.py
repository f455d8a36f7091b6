"""Statistics of stores: teachers' accuracy and calibration, fidelity of encodings, agreement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coursepack.console import SHORT_SECONDS, progress
from coursepack.data.store.manifest import LOGITS
from coursepack.data.store.records import fidelity_summary, view_mean
from coursepack.models.calibration import Calibration
from coursepack.precompute.numerics import views_by_numerics
from coursepack.precompute.precision import store_precision

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.data.store import StoreReader

ROWS_AT_A_TIME = 8192
"""Rows of logits that are decoded together."""


def describe_store(reader: StoreReader) -> dict[str, Any]:
    """Return identity, arrays and statistics of a store as plain values.

    All logits of all committed views are read once.
    """
    manifest = reader.manifest
    labels = torch.from_numpy(reader.labels())
    views = {}
    title = f"inspect {reader.name}"
    with progress(title, len(reader.views), "views", delay=SHORT_SECONDS) as meter:
        for view in reader.views:
            record = manifest.view_records[str(view)]
            where = f"view {view} of store {reader.address!r}"
            views[str(view)] = {
                "accuracy": view_mean(record, "correct", where),
                "cross_entropy": view_mean(record, "cross_entropy", where),
                "entropy": view_mean(record, "entropy", where),
                "calibration_error": _calibration_error(reader, view, labels),
                "fidelity": fidelity_summary(record["fidelity"]),
            }
            meter.advance(1)
    return {
        "store": reader.address,
        "fingerprint": manifest.fingerprint,
        "identity": manifest.identity,
        "arrays": {
            name: {
                "encoding": array.encoding.name,
                "row_shape": list(array.row_shape),
                "row_bytes": array.row_bytes,
                "views": len(manifest.committed.get(name, ())),
            }
            for name, array in manifest.arrays.items()
        },
        "static": [name for name in manifest.tables if name.startswith("static/")],
        "views": views,
        "precision": store_precision(manifest),
        "numerics": views_by_numerics(manifest),
    }


def common_view(readers: Sequence[StoreReader]) -> int | None:
    """Return the first view that all stores have of the same pixels, or None."""
    if len({reader.manifest.view_fingerprint for reader in readers}) > 1:
        return None
    return min(set.intersection(*(set(reader.views) for reader in readers)), default=None)


def agreement(readers: Sequence[StoreReader], view: int) -> list[list[float]]:
    """Return the share of samples with the same top class in a view for each pair of teachers, `(K, K)`."""
    top_classes = []
    for reader in readers:
        parts = [rows.argmax(1) for rows, _ in _logits(reader, view)]
        top_classes.append(torch.tensor(reader.manifest.known_classes)[torch.cat(parts)])
    return [[float((one == other).double().mean()) for other in top_classes] for one in top_classes]


def _calibration_error(reader: StoreReader, view: int, labels: torch.Tensor) -> float:
    """Return the expected calibration error of a view.

    Samples of classes that the teacher does not know are left out.
    """
    known = torch.tensor(reader.manifest.known_classes)
    calibration = Calibration(torch.device("cpu"))
    for logits, samples in _logits(reader, view):
        of_samples = labels[samples]
        kept = torch.isin(of_samples, known)
        calibration.add(logits[kept], torch.searchsorted(known, of_samples[kept]))
    return calibration.error()


def _logits(reader: StoreReader, view: int) -> Any:
    for start in range(0, reader.manifest.samples, ROWS_AT_A_TIME):
        samples = np.arange(start, min(start + ROWS_AT_A_TIME, reader.manifest.samples))
        yield reader.rows(LOGITS, view, samples).decode(), samples
