"""Teachers of finished runs, with the accuracy that their stores record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coursepack.data.store import load_manifest
from coursepack.data.store.locations import SEPARATOR
from coursepack.distill.runs.folder import PROVENANCE_FILE
from coursepack.distill.runs.records import read_provenance
from coursepack.distill.setup.teacher import accuracy
from coursepack.errors import CoursepackError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from coursepack.distill.runs.folder import FinishedRun


@dataclass(frozen=True)
class Teacher:
    """Teacher of a store."""

    store: str
    accuracy: float
    """Share of the rows in the store whose top class is the label, in [0, 1]."""
    views: int
    """Number of committed views."""
    source: str
    """Source of the store's samples, usually the training data."""


def teachers_of(runs: Iterable[FinishedRun]) -> list[Teacher]:
    """Return the teachers of runs whose stores are on this machine and are those that the runs used."""
    found: dict[str, Teacher] = {}
    for run in runs:
        for path, fingerprint in _stores(run).items():
            if path not in found and (teacher := _teacher(path, fingerprint)) is not None:
                found[path] = teacher
    return list(found.values())


def _stores(run: FinishedRun) -> dict[str, str]:
    """Return the fingerprints of a run's stores by their paths."""
    try:
        stores = read_provenance(run.path / PROVENANCE_FILE)["stores"]
    except CoursepackError:
        return {}
    return {str(store.get("path", "")): str(store.get("fingerprint", "")) for store in stores}


def _teacher(path: str, fingerprint: str) -> Teacher | None:
    if SEPARATOR in path:
        return None  # a comparison of runs does not use the network
    try:
        manifest = load_manifest(path)
        if manifest.fingerprint != fingerprint or not manifest.totals["rows"]:
            return None
        source = str(manifest.identity["source"]["name"])
        return Teacher(path, accuracy(manifest), len(manifest.committed_views()), source)
    except (CoursepackError, OSError):
        return None


def teachers_table(teachers: Iterable[Teacher]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows for `print_table`."""
    header = ["teacher", "accuracy", "on"]
    rows = [
        [Path(teacher.store).name, f"{teacher.accuracy:.2%}", f"{teacher.views} views of {teacher.source}"]
        for teacher in teachers
    ]
    return header, rows
