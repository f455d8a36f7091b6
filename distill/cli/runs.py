"""Commands `distill sweep`, `distill eval` and `distill compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coursepack.commands import Command, name_of
from coursepack.console import JSON, TRUST_CODE, inform, print_json, print_table
from coursepack.distill.cli.executing import executor_options, take_executor
from coursepack.distill.cli.options import CACHE_BYTES, CHECKPOINTS, THREADS, TRACK, WORKERS
from coursepack.errors import StudentsLost, TrainingDiverged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.distill.runs.compare import Group


@click.command(
    "sweep",
    cls=Command,
    epilog="\b\nExample:\n  distill sweep grid.yaml --out runs/sweep --together 4 --resume",
)
@click.argument("grid_file", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the runs' folders.")
@click.option("--resume", is_flag=True, help="Skip finished runs, and continue unfinished ones.")
@click.option("--together", type=click.IntRange(1), default=1, show_default=True,
              help="Students to train at the same time, if they use the same batches.")  # fmt: skip
@CACHE_BYTES
@WORKERS
@THREADS
@CHECKPOINTS
@click.option(
    "--tensorboard", is_flag=True, help="Also write metrics for TensorBoard into the runs' folders."
)
@TRACK
@TRUST_CODE
@JSON
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:NUMBER or auto.")
@executor_options
def sweep_command(grid_file: Path, out: Path, as_json: bool, trust_code: bool, **how: Any) -> None:
    """Train one student for every combination of the values in a grid file.

    The file has `base`, the recipe fields that all students share, and `grid`, lists of values by
    field.subfield. Each student is a run in its own folder, named after its values.

    \b
    base: {stores: [cnn.zarr, mlp.zarr], epochs: 30}
    grid:
      student: [digits-small, digits-cnn]
      objective.temperature: [2, 4]
      seed: [0, 1, 2]
    """
    from coursepack.distill.runs.sweep import finished_runs, read_grid, sweep

    executor = take_executor(how)
    students = read_grid(grid_file, trust_code=trust_code)
    try:
        diverged = sweep(students, out, trust_code=trust_code, executor=executor, **how)
    except StudentsLost:  # the others are finished
        _show(finished_runs(students, out), as_json=as_json)
        raise
    _show(finished_runs(students, out), as_json=as_json)
    if diverged:
        raise TrainingDiverged(f"{len(diverged)} of {len(students)} students diverged: {', '.join(diverged)}")


@click.command("eval", cls=Command, epilog="\b\nExample:\n  distill eval runs/kd")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--source", shell_complete=name_of("source"),
              help="Evaluation data, NAME:SPLIT.  [default: the run's evaluation data]")  # fmt: skip
@click.option("--root", type=click.Path(path_type=Path), help="Folder of the source's files.")
@TRUST_CODE
@JSON
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:NUMBER or auto.")
def eval_command(
    run: Path, source: str | None, root: Path | None, trust_code: bool, as_json: bool, device: str
) -> None:
    """Evaluate the student of a finished run, or every student of a group and their ensembles."""
    from coursepack.device import pick_device
    from coursepack.distill.runs.evaluation import evaluate_run

    chosen = pick_device(device)
    data, found = evaluate_run(run, device=chosen, source=source, root=root, trust_code=trust_code)
    if as_json:
        rows = [
            {"run": str(each.path), **({"ensemble": each.ensemble} if each.ensemble else {}),
             "source": data.name, **each.metrics}
            for each in found
        ]  # fmt: skip
        print_json(rows if len(rows) > 1 else rows[0])
        return
    for each in found:
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in each.metrics.items())
        what = f"{each.path} {each.ensemble}".strip()
        click.echo(f"{what}: {numbers} on {data.name}, {len(data.labels):,} samples")


@click.command("compare", cls=Command, epilog="\b\nExample:\n  distill compare runs/alone-* runs/kd-*")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@JSON
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(path_type=Path),
    help="Also plot accuracy by epoch, to a .png, .svg or .pdf file.",
)
def compare_command(runs: tuple[Path, ...], as_json: bool, plot_file: Path | None) -> None:
    """Compare finished runs in a table; runs that differ only in their seed share a row.

    \b
    Columns:
      recipe          method, student, teachers, and fields in which rows differ
      runs            number of runs, one per seed
      accuracy        mean over seeds, on the evaluation data, after training
      +- sd           standard deviation of the accuracy over seeds
      nll             mean negative log-likelihood of the labels, in nats
      epoch           median time of an epoch, without evaluation
      beats first     seeds that are more accurate than in the first row
      ece             expected calibration error, on the evaluation data
      agrees          share of training rows with the teachers' top class
      kl to teachers  mean divergence from the teachers on training rows, in nats
      T clamped       share of training rows whose temperature was clamped

    A second table has the accuracy of each teacher on the views in its store, which are of the training
    data, and not of the evaluation data.
    """
    groups = _show(runs, as_json=as_json)
    inform("columns: see distill compare --help")
    if plot_file is not None:
        from coursepack.distill.runs.compare import plot

        plot(groups, plot_file)


def _show(runs: Sequence[Path], *, as_json: bool) -> list[Group]:
    from coursepack.distill.runs.compare import compare, group_runs, table_rows
    from coursepack.distill.runs.folder import load_runs
    from coursepack.distill.runs.teachers import teachers_of, teachers_table

    finished = [run for path in runs for run in load_runs(path)]
    groups, members = compare(finished), group_runs(finished)
    if as_json:
        print_json(
            [
                {**group.to_dict(), "teachers": {each.store: each.accuracy for each in teachers_of(of_group)}}
                for group, of_group in zip(groups, members, strict=True)
            ]
        )
        return groups
    print_table("", *table_rows(groups))
    if teachers := teachers_of(finished):
        print_table("", *teachers_table(teachers))
    return groups
