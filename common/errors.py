"""Every error that coursepack raises on purpose and a caller may want to catch.

Each inherits the builtin that fits, so `except FileNotFoundError` works without importing this module.
A message says what is wrong with its value, where, what was expected, and what to do next. Commands print
the message alone and exit with status 1. Wrong shapes and dtypes given to `coursepack.kernels` are plain
`ValueError` and `TypeError`.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class CoursepackError(Exception):
    """Base of all errors below."""


class UnknownName(CoursepackError, LookupError):
    """A source, view, network, method, encoding or tap was asked for by a name that does not exist."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = list(known)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        super().__init__(f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}.")


class RecipeError(CoursepackError, ValueError):
    """A recipe, or the flags that make one, does not describe a run that can be made."""


class UntrustedCode(CoursepackError, PermissionError):
    """A store or a run's folder names Python code, and the user has neither named nor trusted it."""


class SourceError(CoursepackError, OSError):
    """A data set's files are missing or damaged."""


class TeacherMismatch(CoursepackError, ValueError):
    """A network does not fit the weights, the source or the store it is used with."""


class NonFiniteOutput(CoursepackError, FloatingPointError):
    """A teacher answered with NaN or infinity."""


class EncodingRange(CoursepackError, OverflowError):
    """A value cannot be represented in the chosen encoding."""


class StoreNotFound(CoursepackError, FileNotFoundError):
    """There is no store at the given path."""


class StoreIncomplete(CoursepackError, RuntimeError):
    """A store has not committed what was asked of it."""


class StoreMismatch(CoursepackError, ValueError):
    """A store was written by another recipe, source, teacher or format than the one at hand."""


class StoreDamaged(CoursepackError, OSError):
    """A store's files are not what its manifest vouches for."""


class StoreFull(CoursepackError, OSError):
    """There is not enough free space for a store."""


class StoreBusy(CoursepackError, RuntimeError):
    """Another process is writing the same part of a store."""


class TrainingDiverged(CoursepackError, FloatingPointError):
    """A student's loss became NaN or infinite."""


class RankLost(CoursepackError, ConnectionError):
    """Another of the processes that train together has ended or does not answer."""


class RunBusy(CoursepackError, RuntimeError):
    """Another process is training into the same run folder."""


class RunError(CoursepackError, OSError):
    """A run folder is missing, unfinished, damaged, or would be overwritten."""
