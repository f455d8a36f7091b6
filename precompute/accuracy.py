"""Comparison of a teacher's accuracy on the views of its store with the accuracy that its run recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coursepack.console import warn
from coursepack.data.store.records import view_mean

if TYPE_CHECKING:
    from coursepack.data.store import Manifest
    from coursepack.precompute.job import Job

MUCH_WORSE = 0.1
"""Difference of accuracies from which a teacher is reported."""


class AccuracyGuard:
    """Warns once if a teacher does much worse on the store's views than in its run.

    A view that does not suit the teacher, such as one meant for larger images, would pass unnoticed. Views
    that mix samples are not compared, because no label is right for them.
    """

    def __init__(self, job: Job, *, quiet: bool = False) -> None:
        self._record = job.runner.network.record
        self._network, self._mixes = job.runner.network.spec, job.recipe.mix is not None
        self._source, self._store = job.source.name, job.store
        self._silent = quiet

    def check(self, manifest: Manifest) -> None:
        """Compare the views that are committed so far."""
        record = self._record
        if self._silent or record is None or self._mixes or not manifest.view_records:
            return
        if _name(record.source) != _name(self._source):
            return
        views = manifest.view_records.items()
        means = [view_mean(values, "correct", f"view {view}") for view, values in views]
        accuracy = sum(means) / len(means)
        if record.accuracy - accuracy > MUCH_WORSE:
            self._silent = True
            warn(
                f"teacher {self._network!r} classifies {accuracy:.1%} of the views of {self._source!r} "
                f"correctly, but its run recorded {record.accuracy:.1%} on {record.source!r}. The view "
                f"recipe may not suit it: draw the views with `precompute inspect {self._store} --out "
                "grid.png`, or give another --view"
            )


def _name(source: str) -> str:
    """Return the name of a source without its split."""
    return source.rpartition(":")[0] or source
