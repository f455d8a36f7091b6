"""What a run's folder says of a run: its metrics and its provenance, checked before they are believed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coursepack.errors import RunError
from coursepack.parsing import parse_json, read_bounded, read_json

if TYPE_CHECKING:
    from pathlib import Path

MOST_METRICS_BYTES = 1 << 28
Index = Annotated[int, Field(ge=0, lt=1 << 48)]


class _Part(BaseModel):
    """What is read of a mapping; it may hold more, as what a later release adds."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Evaluation(_Part):
    accuracy: float
    nll: float
    calibration_error: float | None = None


class _Teachers(_Part):
    agreement: float | None = None
    kl: float | None = None


class _Temperature(_Part):
    clamped: float | None = None


class _Epoch(_Part):
    epoch: Index
    seconds: float
    evaluation: _Evaluation | None = None
    teachers: _Teachers | None = None
    temperature: _Temperature | None = None


class _Evaluated(_Epoch):
    evaluation: _Evaluation


class _Store(_Part):
    reading: Literal["resident", "mapped", "windowed"]


class _Provenance(_Part):
    stores: list[_Store]


P = TypeVar("P", bound=_Part)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a finished run's metrics, one per epoch.

    Raises:
        RunError: the file cannot be read, or a line is not what a run writes.
    """
    try:
        lines = read_bounded(path, MOST_METRICS_BYTES).splitlines()
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
    """Where an unfinished run's targets come from, as `prepare.provenance` gave it.

    Raises:
        RunError: the file cannot be read, or is not what a run writes.
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
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"])) or "it"
        text = problem["msg"] if problem["loc"] else "Input should be a mapping"
        raise RunError(f"{where} is damaged: {place}: {text}") from error
