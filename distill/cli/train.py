"""Command `distill train`."""

from __future__ import annotations

import re
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coursepack.commands import Command
from coursepack.console import JSON, TRUST_CODE, print_json
from coursepack.distill.cli.options import (
    CACHE_BYTES,
    CHECKPOINTS,
    OPTIONS,
    THREADS,
    TRACK,
    WORKERS,
    given_options,
    recipe_options,
)
from coursepack.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.distill.recipe import TrainRecipe
    from coursepack.distill.runs.folder import FinishedRun

EXAMPLES_TRAIN = """\b
Examples:
  distill train --student digits-cnn --source digits --view digits --epochs 30 --out teachers/cnn
  distill train --student digits-small --store cnn.zarr --store mlp.zarr --method kd --out runs/kd
  distill train --student digits-small --peers 2 --source digits --view digits --method dml --out runs/dml
  distill train runs/kd/recipe.yaml --smoke --out runs/smoke
  distill train runs/kd/recipe.yaml --dry-run
  distill train runs/kd/recipe.yaml --set seed=1 --set objective.temperature=2 --out runs/kd-1
"""
GROUPS = {
    "Run": ("out", "overwrite", "resume", "dry", "smoke", "assignments"),
    **{title: tuple(name.replace("-", "_") for name in names) for title, names in OPTIONS.items()},
    "Execution": (
        *("device", "workers", "threads", "checkpoint_seconds", "cache_bytes"),
        *("tensorboard", "track", "peers", "replica", "trust_code"),
    ),
    "Output": ("as_json", "quiet"),
}
"""Parameters by the title of their group in the help."""


def _parse_replica(_context: Any, _parameter: Any, text: str | None) -> tuple[int, int] | None:
    """Return index and number of replicas of `I/N`, which counts from 1."""
    if text is None:
        return None
    numbers = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    index, count = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if not 1 <= index <= count or count < 2:
        raise RecipeError(
            f"--replica is {text!r}, expected I/N with I from 1 to N, and N of at least 2, such as 1/3"
        )
    return index - 1, count


def _require_out(ctx: click.Context, param: click.Parameter, out: Path | None) -> Path | None:
    if out is None and not ctx.params.get("dry"):
        raise click.MissingParameter(ctx=ctx, param=param)
    return out


@click.command("train", cls=Command, epilog=EXAMPLES_TRAIN, groups=GROUPS)
@click.argument("recipe_file", required=False, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), callback=_require_out,
              help="Folder of the run.  [required]")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace an existing run.")
@recipe_options
@click.option("--peers", type=click.IntRange(2), metavar="N",
              help="Train N students of one network that learn from each other.")  # fmt: skip
@click.option("--replica", metavar="I/N", callback=_parse_replica,
              help="Train replica I of N, each a process of its own; needs --group.")  # fmt: skip
@CACHE_BYTES
@WORKERS
@click.option(
    "--set", "assignments", multiple=True, help="Recipe field to set, as key.subkey=value. Repeatable."
)
@click.option("--smoke", is_flag=True,
              help="Test the recipe: train for two epochs on synthetic data and teachers.")  # fmt: skip
@click.option("--dry-run", "dry", is_flag=True, is_eager=True,
              help="Check the run; print its recipe, its steps and the bytes it would read.")  # fmt: skip
@click.option("--resume", is_flag=True,
              help="Continue an interrupted run, or start a new one if there is none.")  # fmt: skip
@CHECKPOINTS
@THREADS
@click.option("--tensorboard", is_flag=True, help="Also write metrics for TensorBoard into the run's folder.")
@TRACK
@TRUST_CODE
@JSON
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:NUMBER or auto.")
def train_command(
    recipe_file: Path | None,
    out: Path | None,
    dry: bool,
    overwrite: bool,
    tensorboard: bool,
    track: tuple[str, ...],
    trust_code: bool,
    smoke: bool,
    as_json: bool,
    device: str,
    workers: int | None,
    resume: bool,
    checkpoint_seconds: float,
    threads: int | None,
    peers: int | None,
    replica: tuple[int, int] | None,
    assignments: tuple[str, ...],
    **options: Any,
) -> None:
    """Train a student from stores, from teachers run live, or without teachers.

    Several students can learn from each other, as with --method dml. Each is then a run in its own folder
    within --out.

    Options override fields of RECIPE_FILE. The complete recipe is saved in the run's folder.
    """
    from coursepack.distill.recipe_names import check_names

    values = _read_values(recipe_file, options, assignments)
    if peers is not None:
        _set_peers(values, peers)
    if replica is not None:
        values["member"], values["replicas"] = replica
    where = "the recipe" if recipe_file is None else str(recipe_file)
    check_names(values, where)  # before torch is imported

    from coursepack.distill.distributed import process_group
    from coursepack.distill.runs.dry_run import dry_run
    from coursepack.distill.runs.folder import load_runs
    from coursepack.distill.runs.smoke import smoke_recipe
    from coursepack.distill.runs.train import train
    from coursepack.distill.setup.resolve import resolve_recipe

    with process_group(device) as (ranks, own), ExitStack() as stack:
        recipe = resolve_recipe(values, where, smoke=smoke, trust_code=trust_code)
        shared = {"overwrite": overwrite, "resume": resume, "trust_code": trust_code}
        if smoke:
            recipe = smoke_recipe(recipe, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        if dry or out is None:
            notes = dry_run(recipe, out, device=own, ranks=ranks, **shared)
            if ranks.is_first:
                _print_dry(notes, recipe, as_json=as_json)
            return
        train(
            recipe,
            out,
            device=own,
            ranks=ranks,
            workers=workers,
            threads=threads,
            tensorboard=tensorboard,
            track=track,
            checkpoint_seconds=checkpoint_seconds,
            **shared,
        )
        if ranks.is_first:
            _print_runs(load_runs(out), recipe, as_json=as_json)


def _read_values(
    recipe_file: Path | None, options: dict[str, Any], assignments: Sequence[str]
) -> dict[str, Any]:
    """Return the plain values of a recipe file with those of the command line in their place."""
    from coursepack.config import start_paths
    from coursepack.distill.recipe_file import load_recipe

    values: dict[str, Any] = {}
    if recipe_file is not None:
        values = load_recipe(recipe_file)
        start_paths(values, recipe_file.parent)
    changes: dict[str, Any] = {}
    _apply(changes, options, assignments)
    if "method" in values and changes.get("method", values["method"]) != values["method"]:
        values.pop("objective", None)  # its fields belong to the file's method
    _apply(values, options, assignments)
    return values


def _print_dry(notes: Sequence[str], recipe: TrainRecipe, *, as_json: bool) -> None:
    from coursepack.config import write_yaml

    values = recipe.model_dump(mode="json")
    if as_json:
        print_json({"notes": list(notes), "recipe": values})
    else:
        click.echo("".join(f"# {note}\n" for note in notes) + write_yaml(values), nl=False)


def _print_runs(runs: Sequence[FinishedRun], recipe: TrainRecipe, *, as_json: bool) -> None:
    """Print the results of a student, or of each of a group and of their ensemble."""
    if as_json:
        rows = [
            {"run": str(run.path), **({"ensemble": run.ensemble} if run.ensemble else {}),
             "source": recipe.evaluation, "epochs": run.metrics[-1]["epoch"] + 1,
             **run.metrics[-1]["evaluation"]}
            for run in runs
        ]  # fmt: skip
        print_json(rows if len(rows) > 1 else rows[0])
        return
    for run in runs:
        evaluation = run.metrics[-1]["evaluation"]
        what = f"{run.path} {run.ensemble}".strip()
        click.echo(
            f"{what}: accuracy {evaluation['accuracy']:.2%}, NLL {evaluation['nll']:.3f} on "
            f"{recipe.evaluation} after {run.metrics[-1]['epoch'] + 1} epochs"
        )


def _set_peers(values: dict[str, Any], count: int) -> None:
    """Make all students of a recipe's plain values `count` students of one network, in place.

    Raises:
        RecipeError: there are several networks.
    """
    if values.get("peers"):
        raise RecipeError(
            f"--peers {count} trains {count} students of one network, but several are named: name one, or "
            "leave --peers out"
        )
    if "student" in values:
        values["peers"] = [values["student"]] * (count - 1)


def _apply(values: dict[str, Any], options: dict[str, Any], assignments: Sequence[str]) -> None:
    """Apply options and assignments to a recipe's plain values in place.

    Raises:
        UnknownName, RecipeError: a view does not exist, or an option does not fit the recipe.
    """
    from coursepack.distill.recipe_file import set_value, set_values

    for flag, field, value in given_options(options):
        plain = value
        if field == "view" and any(text.startswith("view.") for text in assignments):
            plain = _fields_of_view(value)
        if field == "student":
            plain, *values["peers"] = value
        set_value(values, field, plain, flag)
    set_values(values, assignments)


def _fields_of_view(name: str) -> Any:
    """Return the fields of a view recipe by name, some of which are assigned."""
    from coursepack.data import view_recipe

    return view_recipe(name).model_dump(mode="json")
