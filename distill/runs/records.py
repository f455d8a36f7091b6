"""Metrics and provenance of a run, validated when they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coursepack.errors import RunError
from coursepack.parsing import parse_json, read_bounded, read_json
from coursepack.problems import lines_of

if TYPE_CHECKING:
    from pathlib import Path

MAX_METRICS_BYTES = 1 << 28
Index = Annotated[int, Field(ge=0, lt=1 << 48)]


class _Record(BaseModel):
    """Mapping with validated keys; unknown keys, as later releases may add, are allowed."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Evaluation(_Record):
    accuracy: float
    nll: float
    calibration_error: float | None = None


class _Teachers(_Record):
    agreement: float | None = None
    kl: float | None = None


class _Temperature(_Record):
    clamped: float | None = None


class _Epoch(_Record):
    epoch: Index
    seconds: float
    evaluation: _Evaluation | None = None
    teachers: _Teachers | None = None
    temperature: _Temperature | None = None
    ensembles: dict[str, _Evaluation] = {}


class _Evaluated(_Epoch):
    evaluation: _Evaluation


class _Store(_Record):
    reading: Literal["resident", "mapped", "windowed"]


class _Provenance(_Record):
    stores: list[_Store]


P = TypeVar("P", bound=_Record)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the metrics of a finished run, one mapping per epoch.

    Raises:
        RunError: the file cannot be read, or a line is damaged.
    """
    try:
        lines = read_bounded(path, MAX_METRICS_BYTES).splitlines()
    except ValueError as error:
        raise RunError(f"{str(path)!r} {error}") from error
    except OSError as error:
        raise RunError(f"cannot read {str(path)!r}: {error.strerror}") from error
    if not lines:
        raise RunError(f"{str(path)!r} holds no epoch, but the run is finished")
    return [
        _checked(_Evaluated if number == len(lines) else _Epoch, line, f"line {number} of {str(path)!r}")
        for number, line in enumerate(lines, start=1)
    ]


def read_provenance(path: Path) -> dict[str, Any]:
    """Return the provenance of an unfinished run.

    Raises:
        RunError: the file cannot be read, or is damaged.
    """
    values: dict[str, Any] = read_json(path, RunError)
    _check(_Provenance, values, str(path))
    return values


def _checked(model: type[P], line: bytes, where: str) -> dict[str, Any]:
    try:
        values: dict[str, Any] = parse_json(line)
    except ValueError as error:
        raise RunError(f"{where} {error}") from error
    _check(model, values, where)
    return values


def _check(model: type[P], values: Any, where: str) -> None:
    try:
        model.model_validate(values)
    except ValidationError as error:
        raise RunError(f"{where} is damaged: {lines_of(model, error)[0]}") from error
