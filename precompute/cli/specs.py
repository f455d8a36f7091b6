"""Jobs of `precompute run` and `precompute plan` from their options, and the estimate that `plan` prints."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from coursepack.console import byte_size, duration, inform, print_table
from coursepack.data import open_source, view_recipe
from coursepack.data.encodings import parse_encoding
from coursepack.data.store.manifest import LOGITS
from coursepack.data.store.owners import Part
from coursepack.device import rank_device
from coursepack.errors import RecipeError
from coursepack.models.classes import load_columns
from coursepack.models.load import teacher_class_names
from coursepack.precompute.plan import what_views_buy
from coursepack.precompute.spec import PrecomputeSpec
from coursepack.precompute.teachers import of_checkpoints, teacher_specs

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from coursepack.precompute.job import Job
    from coursepack.precompute.plan import Costs, Probe

BESIDE_FILE = {"part", "device", "workers", "trust_code", "single_writer"}
"""Options of a job that may be given beside a file of teachers."""


def jobs_of_specs(specs: Sequence[PrecomputeSpec], *, elsewhere: bool = False) -> list[Job]:
    """Return the jobs of some specifications, and print where another encoding is used."""
    jobs = [spec.job(elsewhere=elsewhere) for spec in specs]
    for job in jobs:
        _say_other_encoding(job)
    return jobs


def spec_of_options(
    *,
    teacher: str,
    weights: str | None,
    size: int | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    class_map: Path | None,
    source_spec: str,
    root: Path | None,
    view: str,
    view_seed: int | None,
    taps: tuple[str, ...],
    trust_code: bool,
    device: str,
    store: str | Path,
    part: Part | None,
    **numbers: Any,
) -> PrecomputeSpec:
    """Return the specification of a job from the options of a command."""
    part, device = _own_share(part, device)
    columns = None
    if class_map is not None:
        names = open_source(source_spec, root).class_names
        columns = load_columns(class_map, names, partial(teacher_class_names, teacher, weights))
    return PrecomputeSpec(
        teacher=teacher,
        source=source_spec,
        view=view_recipe(view, view_seed).model_dump(mode="json"),
        store=str(store),
        weights=weights,
        size=size,
        mean=mean,
        std=std,
        columns=columns,
        root=None if root is None else str(root),
        taps=taps,
        trust_code=trust_code,
        device=device,
        part=(part.index, part.count),
        **numbers,
    )


def specs_of_options(**flags: Any) -> list[PrecomputeSpec]:
    """Return the specifications of a command's options: several for all checkpoints of a run, else one."""
    return of_checkpoints(spec_of_options(**flags))


def specs_of_file(file: Path, flags: dict[str, Any]) -> list[PrecomputeSpec]:
    """Return the specifications of a file of teachers, with the options that may be given beside it."""
    ctx = click.get_current_context()
    given = [
        param.opts[0]
        for param in ctx.command.params
        if param.name in flags.keys() - BESIDE_FILE
        and param.name is not None
        and ctx.get_parameter_source(param.name) is click.core.ParameterSource.COMMANDLINE
    ]
    if given:
        raise click.UsageError(f"{given[0]} belongs in {str(file)!r}: leave it out here.", ctx)
    part, device = _own_share(flags["part"], flags["device"])
    common = {name: flags[name] for name in ("workers", "trust_code", "single_writer")}
    return teacher_specs(file, part=(part.index, part.count), device=device, **common)


def _own_share(part: Part | None, device: str) -> tuple[Part, str]:
    """Return the part and the device of this process; under torchrun, those of its rank.

    Raises:
        RecipeError: a part is given as well, or the ranks cannot have devices of their own.
    """
    if ranks() == 1:
        return part or Part(), device
    if part is not None:
        raise RecipeError(
            f"--part {part.index}/{part.count} is given, but torchrun started {ranks()} ranks, each of "
            "which writes a part of its own: leave --part out"
        )
    return Part(rank(), ranks()), str(rank_device(device))


def rank() -> int:
    """Return the rank of this process under torchrun, else 0."""
    return int(os.environ.get("RANK", "0"))


def ranks() -> int:
    """Return the number of ranks that torchrun started, else 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _say_other_encoding(job: Job) -> None:
    stored = job.plan().arrays[LOGITS][0].name
    if stored != parse_encoding(job.encoding).name and rank() == 0:
        inform(
            f"encoding {job.encoding} would not be smaller than {stored} for {len(job.source.class_names)} "
            f"classes: logits are stored as {stored}"
        )


def plan_values(cost: Costs, timing: Probe, job: Job, device: str) -> dict[str, Any]:
    """Return the estimate of a job as plain values."""
    epochs = timing.break_even(job.views)
    return {
        "store": str(job.store),
        **asdict(cost),
        "total_bytes": cost.total_bytes,
        "device": device,
        "seconds": cost.rows_left * timing.teacher,
        "seconds_per_image": timing.teacher,
        "seconds_per_row_read": timing.read,
        "break_even_epochs": epochs if math.isfinite(epochs) else None,
    }


def print_plan(cost: Costs, timing: Probe, job: Job, device: str) -> None:
    """Print the estimate of a job."""
    header = ["array", "encoding", "bytes a row", "in all", "files"]
    rows = [
        [
            array.name,
            array.encoding,
            f"{array.row_bytes:,}",
            byte_size(array.total_bytes),
            f"{array.shards:,}",
        ]
        for array in cost.arrays
    ]
    rows.append(["labels, static", "", "", byte_size(cost.table_bytes), f"{cost.table_files:,}"])
    rows.append(["in all", "", "", byte_size(cost.total_bytes), f"{cost.files:,}"])
    print_table(str(job.store), header, rows)
    seconds = cost.rows_left * timing.teacher
    pays = timing.break_even(job.views)
    click.echo(
        f"{cost.rows:,} rows in {cost.blocks:,} blocks of {cost.block_rows:,}, {cost.rows_left:,} to do\n"
        f"free disk {byte_size(cost.free_bytes)}, needed {byte_size(cost.bytes_left)}\n"
        f"about {duration(seconds)} at {1 / timing.teacher:,.0f} images/s on {device}, "
        f"{cost.rows * timing.teacher / 3600:,.1f} device-hours for the whole store\n"
        f"pays for itself after {pays:.1f} student epochs (teacher {timing.teacher * 1e6:,.0f} us an image, "
        f"reading it back {timing.read * 1e6:,.1f} us)\n"
        f"{what_views_buy()}"
    )
