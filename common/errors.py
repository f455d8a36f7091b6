"""Exceptions that coursepack raises for wrong input, damaged files and failed runs.

Each also inherits the builtin exception that fits, so `except FileNotFoundError` works without importing this
module. A message contains the wrong value, its location, the expectation and the next action. Commands print
only the message and exit with status 1. `coursepack.kernels` raises plain `ValueError` and `TypeError` for
wrong shapes and dtypes.
"""

from __future__ import annotations

import copyreg
import difflib
from typing import TYPE_CHECKING, Any

from coursepack.canonical import cut

if TYPE_CHECKING:
    from collections.abc import Iterable


NEAR = 0.65
"""Minimum similarity of a suggestion, from 0 to 1: one typing error in three letters, or three in nine."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that a mistyped one probably stands for, or None if none is similar.

    Case, and the difference of `-` and `_`, do not matter.

    >>> nearest("unifrom", ["uniform", "fixed"])
    'uniform'
    >>> nearest("foo", ["uniform", "fixed"])
    """
    spellings = {_plain(each): each for each in known}
    matches = difflib.get_close_matches(_plain(name), spellings, n=1, cutoff=NEAR)
    return spellings[matches[0]] if matches else None


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return the question ` Did you mean ...?` with the nearest known name, or nothing if none is similar."""
    near = nearest(name, known)
    return f" Did you mean {near!r}?" if near else ""


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def first_line(error: Exception) -> str:
    """Return the class and the first line of an error of another library, to be quoted in one of ours."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


class CoursepackError(Exception):
    """Base class of all exceptions of coursepack."""


class UnknownName(CoursepackError, LookupError):
    """A name of a source, view, network, method, encoding or tap does not exist."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = list(known)
        super().__init__(
            f"unknown {kind} {cut(repr(name))}.{suggestion(name, known)} Known: {', '.join(known)}."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors travel between processes, and the arguments above are not kept.
        return copyreg.__newobj__, (type(self), *self.args)  # type: ignore[attr-defined]  # not in the stubs


class RecipeError(CoursepackError, ValueError):
    """A recipe, or the options of a command, are invalid or contradict each other."""


class UntrustedCode(CoursepackError, PermissionError):
    """A store or a run folder names Python code that the user has neither named nor trusted."""


class SourceError(CoursepackError, OSError):
    """The files of a data set are missing or damaged."""


class TeacherMismatch(CoursepackError, ValueError):
    """A network does not fit the weights, the source or the store that it is used with."""


class NonFiniteOutput(CoursepackError, FloatingPointError):
    """A teacher's outputs or weights contain NaN or infinity."""


class OutOfMemory(CoursepackError, MemoryError):
    """A device has too little memory for a batch."""


class EncodingRange(CoursepackError, OverflowError):
    """A value cannot be represented in the chosen encoding."""


class StoreNotFound(CoursepackError, FileNotFoundError):
    """There is no store at a path."""


class StoreIncomplete(CoursepackError, RuntimeError):
    """A store lacks requested views or arrays because they are not committed yet."""


class StoreMismatch(CoursepackError, ValueError):
    """A store was written with another recipe, source, teacher or format version than the current one."""


class StoreDamaged(CoursepackError, OSError):
    """The files of a store differ from the sizes and checksums in its manifest."""


class CacheError(CoursepackError, ValueError):
    """A cache of another program is damaged, or does not fit the source that it is imported for."""


class StoreFull(CoursepackError, OSError):
    """There is not enough free disk space for a store."""


class StoreBusy(CoursepackError, RuntimeError):
    """Another process is writing to the same part of a store."""


class TrainingDiverged(CoursepackError, FloatingPointError):
    """The loss of a student became NaN or infinite."""


class RankLost(CoursepackError, ConnectionError):
    """Another rank of a distributed run has ended or does not respond."""


class WorkerLost(CoursepackError, ConnectionError):
    """A cluster or its workers cannot be reached, do not start, or end again and again."""


class StudentsLost(WorkerLost):
    """Students have lost several workers of a cluster each; all others are finished or have diverged."""


class WorkerMismatch(CoursepackError, ValueError):
    """A worker of a cluster would compute other rows than the rest."""


class RunBusy(CoursepackError, RuntimeError):
    """Another process is training in the same run folder, or as the same replica of a group."""


class RunError(CoursepackError, OSError):
    """A run folder is missing, unfinished, damaged, or would be overwritten."""
