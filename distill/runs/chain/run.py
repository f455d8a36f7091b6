"""Runs of chains: stages that are finished and unchanged are skipped, the others run in order."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from coursepack.console import SHORT_SECONDS, duration, inform, warn
from coursepack.distill.runs.chain.plan import naming_stage
from coursepack.distill.runs.chain.record import (
    LOCK,
    StageRecord,
    changes,
    output_folder,
    output_of,
    output_read,
    read_record,
    remove_output,
    sweep,
    write_record,
)
from coursepack.distill.runs.chain.stages import run_stages, stages_at_once
from coursepack.errors import RecipeError, RunBusy, RunError, UnknownName
from coursepack.locks import FileLock, Held

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from coursepack.distill.runs.chain.plan import Stage
    from coursepack.distill.runs.chain.stages import How

Decision = Literal["skip", "continue", "start", "again", "changed"]


@dataclass(frozen=True)
class Evaluated:
    """Evaluation of one stage."""

    stage: str
    description: str
    """Network and method, or the members of an ensemble."""
    metrics: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as plain values."""
        return {"stage": self.stage, "description": self.description, **self.metrics}


def run_chain(stages: Sequence[Stage], out: Path, how: How, *, redo: Collection[str] = ()) -> list[Evaluated]:
    """Run the stages of a chain that are not finished.

    Args:
        stages: a result of `plan_chain` for the same folder.
        out: folder of the chain.
        how: options that do not change the results.
        redo: stages to run again although they are finished. Stages that read their results, directly or
            through others, are run again if these results have changed.

    Returns:
        The evaluations of all stages that have one, in their order.

    Raises:
        UnknownName: `redo` names no stage.
        RunBusy: another process runs the chain.
        RunError: a stage was run with other values, or a folder holds something else. Nothing is run if that
            is known before.
        Otherwise as `train`, and as `precompute run`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("a chain runs in one process: leave torchrun out, or run its stages one by one")
    for name in redo:
        if name not in {stage.name for stage in stages}:
            raise UnknownName("stage", name, [stage.name for stage in stages])
    pending = _check_all(stages, out, redo)
    out.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(out / LOCK)
    except Held as holder:
        raise RunBusy(f"chain {str(out)!r} is being run by {holder}: wait for it, or stop it") from holder
    try:
        sweep(out)
        with nullcontext() if how.executor is None else how.executor.connected():
            _run_groups(stages, pending, out, how, set(redo))
    except KeyboardInterrupt:
        warn("interrupted: the same command continues the chain")
        raise
    finally:
        lock.release()
    return [evaluated for stage in stages if (evaluated := _evaluated(stage, out)) is not None]


def _check_all(stages: Sequence[Stage], out: Path, redo: Collection[str]) -> set[str]:
    """Return the names of the stages to run, some of which may turn out to be unchanged.

    Stages that were run with other values are refused before anything is run.

    Raises:
        RunError: there are such stages; the message shows the differences of all of them.
    """
    pending: set[str] = set()
    refused: list[str] = []
    for stage in stages:
        with naming_stage(stage.name):
            unknown = bool(pending & set(stage.reads))
            decision, table = _decide(stage, stages, out, redo, inputs_known=not unknown)
        if decision == "changed":
            refused.append(_refusal(stage, table))
        if unknown or decision != "skip":
            pending.add(stage.name)
    if refused:
        raise RunError("\n".join(refused))
    return pending


def _refusal(stage: Stage, table: str) -> str:
    return (
        f"stage {stage.name!r} was run with other values.\n{table}\nRun it again with --redo {stage.name}, "
        "restore the values, or choose another --out."
    )


def _decide(
    stage: Stage, stages: Sequence[Stage], out: Path, redo: Collection[str], *, inputs_known: bool
) -> tuple[Decision, str]:
    """Return what to do with a stage, and the differences from its record if there are any.

    If results that the stage reads are not known yet, only its recipe is compared.
    """
    record, output = read_record(out, stage.name), output_of(out, stage)
    folder = output_folder(out, stage)
    if record is None:
        if folder is not None and folder.exists():
            raise RunError(
                f"{str(folder)!r} exists, but is not of this chain: remove it, or choose another --out"
            )
        return "start", ""
    if record.output is not None and folder is not None and not folder.exists():
        return "start", ""  # its result was removed
    identity = _identity(stage, stages, out) if inputs_known else {**record.identity, "recipe": stage.recipe}
    table = changes(record, identity, output)
    if table:
        return ("again" if _may_redo(stage, stages, redo) else "changed"), table
    if record.output is None:
        return "continue", ""
    return ("again" if stage.name in redo else "skip"), ""


def _identity(stage: Stage, stages: Sequence[Stage], out: Path) -> dict[str, Any]:
    """Return everything that determines the result of a stage."""
    read = [each for each in stages if each.name in stage.reads]
    results = {each.name: output_read(out, each, stage.epoch) for each in read}
    return {"kind": stage.kind, "recipe": stage.recipe, "reads": {**stage.given, "stages": results}}


def _may_redo(stage: Stage, stages: Sequence[Stage], redo: Collection[str]) -> bool:
    """Return true if a stage, or one whose result it reads directly or through others, is to be redone."""
    before = [each for each in stages if each.name in stage.reads]
    return stage.name in redo or any(_may_redo(each, stages, redo) for each in before)


def _run_groups(
    stages: Sequence[Stage], pending: Collection[str], out: Path, how: How, redo: Collection[str]
) -> None:
    """Run the stages that are not finished, and print the time that is left after each group."""
    remaining, ran, started = len(pending), 0, time.monotonic()
    for group in stages_at_once(stages, how):
        ran += _run_group(group, stages, out, how, redo)
        remaining -= sum(stage.name in pending for stage in group)
        left = remaining * (time.monotonic() - started) / max(ran, 1)
        if ran and remaining and left >= SHORT_SECONDS:
            inform(f"{len(stages) - remaining} of {len(stages)} stages finished, about {duration(left)} left")


def _run_group(
    group: Sequence[Stage], stages: Sequence[Stage], out: Path, how: How, redo: Collection[str]
) -> int:
    """Run those of some stages that are not finished, at the same time, and return their number."""
    begun: list[tuple[Stage, dict[str, Any]]] = []
    for stage in group:
        with naming_stage(stage.name):
            identity = _begin(stage, stages, out, redo)
        if identity is not None:
            begun.append((stage, identity))
    if not begun:
        return 0
    with naming_stage(begun[0][0].name) if len(begun) == 1 else nullcontext():
        found = run_stages([stage for stage, _ in begun], out, how)
    for (stage, identity), metrics in zip(begun, found, strict=True):
        output = output_of(out, stage)
        write_record(out, StageRecord(stage=stage.name, identity=identity, output=output, metrics=metrics))
    return len(begun)


def _begin(stage: Stage, stages: Sequence[Stage], out: Path, redo: Collection[str]) -> dict[str, Any] | None:
    """Return the identity of a stage that is to be run, or None if it is finished.

    What the stage is not to continue is removed.

    Raises:
        RunError: the stage was run with other values.
    """
    decision, table = _decide(stage, stages, out, redo, inputs_known=True)
    if decision == "changed":
        raise RunError(_refusal(stage, table))
    title = f"stage {1 + [each.name for each in stages].index(stage.name)} of {len(stages)}, {stage.name}"
    if decision == "skip":
        inform(f"{title}: finished and unchanged, skipped")
        return None
    inform(f"{title}: {stage.kind}" + {"continue": ", continued", "again": ", again"}.get(decision, ""))
    identity = _identity(stage, stages, out)
    if decision != "continue":
        remove_output(out, stage)
        write_record(out, StageRecord(stage=stage.name, identity=identity))
    return identity


def _evaluated(stage: Stage, out: Path) -> Evaluated | None:
    record = read_record(out, stage.name)
    if record is None or record.metrics is None:
        return None
    if stage.train is not None:
        description = f"{stage.train.student}, {stage.train.method}"
    else:
        description = f"mean {stage.recipe['combine']} of {', '.join(stage.reads)}"
    return Evaluated(stage.name, description, record.metrics)


def table_of(rows: Sequence[Evaluated]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows for `print_table`; differences from the first row are in points."""
    shown = []
    for index, row in enumerate(rows):
        accuracy, nll = row.metrics["accuracy"], row.metrics["nll"]
        points = 100 * (accuracy - rows[0].metrics["accuracy"])
        shown.append(
            [row.stage, row.description, f"{accuracy:.2%}", f"{points:+.2f}" if index else "-", f"{nll:.3f}"]
        )
    return ["stage", "student", "accuracy", "against first", "nll"], shown
