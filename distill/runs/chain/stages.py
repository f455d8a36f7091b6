"""Execution of stages: training and evaluation in this process, `precompute run` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coursepack.config import write_yaml
from coursepack.data.loading import Renderer
from coursepack.distill.runs import CHECKPOINT_SECONDS
from coursepack.distill.runs.chain.file import referenced
from coursepack.distill.runs.chain.plan import run_folder, store_folder
from coursepack.distill.runs.chain.record import is_written
from coursepack.distill.runs.folder import finished_metrics
from coursepack.distill.runs.sweep import Student, SweepOptions, unfinished
from coursepack.distill.runs.train import train
from coursepack.distill.training.evaluate import evaluate_ensemble, evaluation_view
from coursepack.distill.training.runtime import torch_threads
from coursepack.errors import RunError, TrainingDiverged
from coursepack.files import write_whole
from coursepack.models import load_teacher
from coursepack.models.build import RUN

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from coursepack.distill.runs.chain.plan import Stage
    from coursepack.distill.runs.cluster import RayExecutor

PRECOMPUTE = """
import os, runpy, sys, threading

def end_with_parent():
    os.read(0, 1)  # returns when the other end of the pipe is closed
    os._exit(1)

threading.Thread(target=end_with_parent, daemon=True).start()
runpy.run_module("coursepack.precompute.cli", run_name="__main__", alter_sys=True)
"""
"""Program of the process that precomputes: the command `precompute`, which ends if this process is killed."""
OWN_FIELDS = ("source", "root", "view", "views", "batch_size", "block_rows", "views_per_load")
"""Fields of a stage that a file of teachers has at its top; the others describe its one teacher."""


@dataclass(frozen=True)
class How:
    """Options of a chain that do not change its results."""

    device: torch.device
    device_name: str = "auto"
    """Device as the user named it, for processes of their own."""
    workers: int | None = None
    threads: int | None = None
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    trust_code: bool = False
    executor: RayExecutor | None = None
    """Executor of stages that train, and by its name of those that precompute; None for this process."""


def stages_at_once(stages: Sequence[Stage], how: How) -> list[list[Stage]]:
    """Return the stages in groups to run one after another, in an order in which they can be run.

    A cluster trains the students of independent stages at the same time.
    """
    if how.executor is None:
        return [[stage] for stage in stages]
    depth: dict[str, int] = {}
    for stage in stages:
        depth[stage.name] = 1 + max((depth[name] for name in stage.reads), default=0)
    found: list[list[Stage]] = []
    for level in sorted(set(depth.values())):
        same = [stage for stage in stages if depth[stage.name] == level]
        students = [stage for stage in same if stage.kind == "train"]
        found += [students] if students else []
        found += [[stage] for stage in same if stage.kind != "train"]
    return found


def run_stages(stages: Sequence[Stage], out: Path, how: How) -> list[dict[str, float] | None]:
    """Run one stage, or several that train, or continue them, and return their evaluations.

    Raises:
        CoursepackError: a stage failed. What is finished of it, and of the others, is kept.
    """
    if how.executor is not None and stages[0].kind == "train":
        return _train_on_cluster(stages, out, how, how.executor)
    return [_run_stage(stage, out, how) for stage in stages]


def _run_stage(stage: Stage, out: Path, how: How) -> dict[str, float] | None:
    if stage.kind == "train":
        return _train(stage, out, how)
    if stage.kind == "precompute":
        if not is_written(out, stage):
            _precompute(stage, out, how)
        return None
    return _evaluate(stage, out, how)


def _train(stage: Stage, out: Path, how: How) -> dict[str, float]:
    assert stage.train is not None
    metrics = train(
        stage.train,
        run_folder(out, stage.name),
        device=how.device,
        resume=True,
        workers=how.workers,
        threads=how.threads,
        checkpoint_seconds=how.checkpoint_seconds,
        trust_code=how.trust_code,
    )
    evaluation: dict[str, float] = metrics["evaluation"]
    return evaluation


def _train_on_cluster(
    stages: Sequence[Stage], out: Path, how: How, executor: RayExecutor
) -> list[dict[str, float] | None]:
    """Train the students of stages on the workers of a cluster."""
    students = []
    for stage in stages:
        assert stage.train is not None
        students.append(Student(run_folder(out, stage.name).name, stage.train))
    options = SweepOptions(
        device=how.device_name,
        resume=True,
        workers=how.workers,
        threads=how.threads,
        checkpoint_seconds=how.checkpoint_seconds,
        trust_code=how.trust_code,
    )
    left = unfinished(students, out)
    diverged = executor.train([[student] for student in left], out, options, lambda group: group[0].name)
    if diverged:
        several = len(stages) > 1
        texts = [f"stage {name!r}: {text}" if several else text for name, text in diverged.items()]
        raise TrainingDiverged("\n".join(texts))
    metrics = [finished_metrics(out / student.name, student.recipe) for student in students]
    return [None if found is None else found["evaluation"] for found in metrics]


def _evaluate(stage: Stage, out: Path, how: How) -> dict[str, float]:
    source = stage.evaluation
    assert source is not None
    networks = [
        load_teacher(f"{RUN}:{run_folder(out, name)}", source.class_names, trust_code=how.trust_code)
        for name in stage.reads
    ]
    for network in networks:
        network.module.to(how.device)
    sizes = sorted({network.preprocessing.size for network in networks})
    pin = how.device.type == "cuda"
    with (
        torch_threads(how.threads),
        Renderer(source, evaluation_view(source), sizes, workers=how.workers, pin=pin) as renderer,
    ):
        return evaluate_ensemble(
            networks, source, how.device, combine=stage.recipe["combine"], renderer=renderer
        )


def _precompute(stage: Stage, out: Path, how: How) -> None:
    """Write or continue a store with the command `precompute run`."""
    file, view = out / f"{stage.name}.teacher.yaml", out / f"{stage.name}.view.yaml"
    write_whole(view, write_yaml(stage.recipe["view"]).encode())
    write_whole(file, write_yaml(teachers_file(stage, out, view)).encode())
    words = [sys.executable, "-c", PRECOMPUTE, "run", str(file), "--device", how.device_name]
    words += [] if how.workers is None else ["--workers", str(how.workers)]
    words += ["--trust-code"] if how.trust_code else []
    if how.executor is not None:
        words += ["--executor", "ray", "--address", how.executor.address]
    threads = {} if how.threads is None else {"OMP_NUM_THREADS": str(how.threads)}
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env={**os.environ, **threads}
    ) as process:
        status = process.wait()
    if status or not is_written(out, stage):
        reason = f"ended with status {status}" if status >= 0 else f"was killed by signal {-status}"
        raise RunError(
            f"`precompute run {file}` {reason}, see what it printed: once the cause is mended, the same "
            "command continues the chain"
        )


def teachers_file(stage: Stage, out: Path, view: Path) -> dict[str, Any]:
    """Return a stage that precomputes as a file of teachers for `precompute run`."""
    values = {name: value for name, value in stage.recipe.items() if value is not None}
    name = referenced(values["teacher"])
    if name is not None:
        checkpoint = "" if stage.epoch is None else f"@{stage.epoch}"
        values["teacher"] = f"{RUN}:{run_folder(out, name)}{checkpoint}"
    values |= {"view": str(view), "store": str(store_folder(out, stage.name))}
    teacher = {name: value for name, value in values.items() if name not in OWN_FIELDS}
    return {**{name: values[name] for name in OWN_FIELDS if name in values}, "teachers": [teacher]}
