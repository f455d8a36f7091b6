"""The command `distill`: train students, evaluate and compare them."""

from __future__ import annotations

import faulthandler
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coursepack.console import TRUST_CODE, Commands, parse_numbers, print_table, progress
from coursepack.data import open_source, view_recipe
from coursepack.data.loading import Renderer
from coursepack.distill.distributed import joined
from coursepack.distill.methods import METHODS, describe
from coursepack.distill.recipe import load_recipe, set_value, set_values
from coursepack.distill.runs.compare import compare, plot, table_rows
from coursepack.distill.runs.folder import load_run
from coursepack.distill.runs.smoke import smoke_recipe
from coursepack.distill.runs.sweep import finished, read_grid, sweep
from coursepack.distill.runs.train import CHECKPOINT_SECONDS, train
from coursepack.distill.setup.resolve import complete
from coursepack.distill.training.evaluate import evaluate, evaluation_view
from coursepack.errors import TrainingDiverged, UnknownName
from coursepack.imports import check_trusted
from coursepack.models import load_teacher
from coursepack.models.teacher import pick_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.distill.runs.compare import Group


@click.group(cls=Commands)
def main() -> None:
    """Train students from precomputed stores, evaluate them and compare their runs."""
    # A mapped file that is cut short while it is read ends the process by SIGBUS: at least say where.
    if sys.__stderr__ is not None and not faulthandler.is_enabled():
        faulthandler.enable(sys.__stderr__)


EXAMPLES_TRAIN = """\b
Examples:
  distill train --student digits-cnn --source digits --view digits --epochs 30 --out teachers/cnn
  distill train --student digits-small --store cnn.zarr --store mlp.zarr --method kd --out runs/kd
  distill train runs/kd/recipe.yaml --smoke --out runs/smoke
  distill train runs/kd/recipe.yaml --set seed=1 --set objective.temperature=2 --out runs/kd-1
"""


@main.command("train", epilog=EXAMPLES_TRAIN)
@click.argument("recipe_file", required=False, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option("--overwrite", is_flag=True, help="Replace a run that is there.")
@click.option("--student", help="A network's name.")
@click.option("--student-size", type=click.IntRange(1),
              help="Side in pixels to render views at for it.  [default: its own]")  # fmt: skip
@click.option("--student-mean", callback=parse_numbers, metavar="X,X,X",
              help="Subtracted per channel of values in [0, 1].  [default: its own]")  # fmt: skip
@click.option("--student-std", callback=parse_numbers, metavar="X,X,X",
              help="Divided by, per channel.  [default: its own]")  # fmt: skip
@click.option("--store", "stores", multiple=True, help="A teacher's store. Repeatable.")
@click.option("--method", help="See `distill methods`.  [default: kd with stores, else supervised]")
@click.option("--online", is_flag=True, default=None, help="Run the stores' teachers live instead.")
@click.option("--source", help="NAME or NAME:SPLIT.  [default: the stores']")
@click.option("--root", help="Folder of the source's files, if it has any.  [default: the stores']")
@click.option("--view", "view", help="View recipe: a preset's name or a YAML file.  [default: the stores']")
@click.option("--views", type=click.IntRange(1), help="Views to take in turn, one per epoch.")
@click.option("--view-order", type=click.Choice(["cyclic", "shuffled"]),
              help="Whether views come in another order every time round.  [default: cyclic]")  # fmt: skip
@click.option("--views-per-load", type=click.IntRange(1),
              help="Views of every sample in one epoch, decoded once.  [default: 1]")  # fmt: skip
@click.option("--allow-drift", is_flag=True, default=None,
              help="Train although this version makes other views than the stores hold.")  # fmt: skip
@click.option("--workers", type=click.IntRange(0),
              help="Processes that decode and render.  [default: one per core for image files]")  # fmt: skip
@click.option("--limit", type=click.IntRange(1), help="Train on this many samples, evenly over classes.")
@click.option("--epochs", type=click.IntRange(1), help="Passes over the samples.  [default: 40]")
@click.option("--batch-size", type=click.IntRange(1), help="Samples per step.  [default: 64]")
@click.option("--optimizer", type=click.Choice(["sgd", "adamw"]), help="What updates it.  [default: sgd]")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="Learning rate.  [default: 0.05]")
@click.option("--lr-schedule", type=click.Choice(["constant", "step", "cosine", "one_cycle"]),
              help="How the learning rate changes.  [default: constant]")  # fmt: skip
@click.option("--milestones", callback=parse_numbers, metavar="N,N,...",
              help="Epochs at which the schedule `step` divides the learning rate by ten.")  # fmt: skip
@click.option("--warmup-epochs", type=click.FloatRange(0), help="Epochs in which the learning rate rises.")
@click.option("--momentum", type=click.FloatRange(0, 1, max_open=True), help="Momentum.  [default: 0.9]")
@click.option("--weight-decay", type=click.FloatRange(0), help="L2 penalty.  [default: 0.0005]")
@click.option("--clip", type=click.FloatRange(0, min_open=True), help="Largest norm of the gradients.")
@click.option("--ema", type=click.FloatRange(0, 1, min_open=True, max_open=True),
              help="Decay per step of averaged weights, which are evaluated and kept.")  # fmt: skip
@click.option("--accumulate", type=click.IntRange(1), help="Parts to work a batch through in.")
@click.option(
    "--patience", type=click.IntRange(1), help="Evaluations without a better accuracy to stop after."
)
@click.option("--evaluate-every", type=click.IntRange(1), help="Epochs from evaluation to evaluation.")
@click.option("--precision", type=click.Choice(["float32", "bfloat16", "float16"]),
              help="Of the student's products in training.  [default: float32]")  # fmt: skip
@click.option("--channels-last", is_flag=True, default=None, help="Keep weights in channels-last order.")
@click.option("--compile", is_flag=True, default=None, help="Train the student through torch.compile.")
@click.option("--deterministic", is_flag=True, default=None, help="Use deterministic algorithms only.")
@click.option("--seed", type=click.IntRange(0), help="Of initial weights and order.  [default: 0]")
@click.option("--temperature", type=click.FloatRange(0, 100, min_open=True), help="T of the soft targets.")
@click.option("--soft-weight", type=click.FloatRange(0), help="Factor of the soft-target term.")
@click.option("--hard-weight", type=click.FloatRange(0), help="Factor of the cross-entropy.")
@click.option("--label-smoothing", type=click.FloatRange(0, 1, max_open=True),
              help="Share of the labels' probability that is spread over all classes.")  # fmt: skip
@click.option(
    "--teacher-weights", callback=parse_numbers, metavar="X,X,...", help="One per store.  [default: equal]"
)
@click.option(
    "--set", "assignments", multiple=True, help="Any recipe field, as key.subkey=value. Repeatable."
)
@click.option("--smoke", is_flag=True,
              help="Run it for two epochs on made-up data and teachers, to see that it runs.")  # fmt: skip
@click.option("--resume", is_flag=True,
              help="Go on with a run that was interrupted; begin it where there is none.")  # fmt: skip
@click.option("--checkpoint-seconds", type=click.FloatRange(0), default=CHECKPOINT_SECONDS, show_default=True,
              help="Time between checkpoints; 0 means after every step.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1),
              help="Threads of torch and the kernels.  [default: one per core]")  # fmt: skip
@click.option("--tensorboard", is_flag=True, help="Write metrics for TensorBoard into the run, too.")
@TRUST_CODE
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto.")
def train_command(
    recipe_file: Path | None,
    out: Path,
    overwrite: bool,
    tensorboard: bool,
    trust_code: bool,
    smoke: bool,
    device: str,
    workers: int | None,
    resume: bool,
    checkpoint_seconds: float,
    threads: int | None,
    assignments: tuple[str, ...],
    **flags: Any,
) -> None:
    """Train one student: from stores, from their teachers run live, or alone.

    Flags replace what a RECIPE_FILE says. The recipe as used is kept in the run's folder.
    """
    with joined(device) as (ranks, own):
        values = {} if recipe_file is None else load_recipe(recipe_file)
        changes: dict[str, Any] = {}
        _apply_flags(changes, flags)
        set_values(changes, assignments)
        if "method" in values and changes.get("method", values["method"]) != values["method"]:
            values.pop("objective", None)  # those numbers are another method's
        _apply_flags(values, flags)
        set_values(values, assignments)
        where = "the recipe" if recipe_file is None else str(recipe_file)
        recipe = complete(values, where, smoke=smoke, trust_code=trust_code)
        how: dict[str, Any] = {
            "overwrite": overwrite,
            "resume": resume,
            "workers": workers,
            "threads": threads,
            "tensorboard": tensorboard,
            "trust_code": trust_code,
            "checkpoint_seconds": checkpoint_seconds,
        }
        if smoke:
            with tempfile.TemporaryDirectory() as folder:
                recipe = smoke_recipe(recipe, Path(folder))
                metrics = train(recipe, out, device=own, ranks=ranks, **how)
        else:
            metrics = train(recipe, out, device=own, ranks=ranks, **how)
        evaluation = metrics["evaluation"]
        if not ranks.is_first:
            return
        click.echo(
            f"{out}: accuracy {evaluation['accuracy']:.2%}, NLL {evaluation['nll']:.3f} on "
            f"{recipe.evaluation} after {metrics['epoch'] + 1} epochs"
        )


@main.command(
    "sweep", epilog="\b\nExample:\n  distill sweep grid.yaml --out runs/sweep --together 4 --resume"
)
@click.argument("grid_file", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the runs' folders.")
@click.option("--resume", is_flag=True, help="Leave out what is finished, go on with what is not.")
@click.option("--together", type=click.IntRange(1), default=1, show_default=True,
              help="Students to train at a time, where they see the same batches.")  # fmt: skip
@click.option("--workers", type=click.IntRange(0),
              help="Processes that decode and render.  [default: one per core for image files]")  # fmt: skip
@click.option("--threads", type=click.IntRange(1),
              help="Threads of torch and the kernels.  [default: one per core]")  # fmt: skip
@click.option("--checkpoint-seconds", type=click.FloatRange(0), default=CHECKPOINT_SECONDS, show_default=True,
              help="Time between checkpoints; 0 means after every step.")  # fmt: skip
@TRUST_CODE
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto.")
def sweep_command(
    grid_file: Path, out: Path, device: str, as_json: bool, trust_code: bool, **how: Any
) -> None:
    """Train many students: every combination of the values in a grid file.

    The file has `base`, the recipe fields that all share, and `grid`, lists of values by field.subfield.
    Each student is a run of its own, in a folder that its values name.

    \b
    base: {stores: [cnn.zarr, mlp.zarr], epochs: 30}
    grid:
      student: [digits-small, digits-cnn]
      objective.temperature: [2, 4]
      seed: [0, 1, 2]
    """
    students = read_grid(grid_file, trust_code=trust_code)
    diverged = sweep(students, out, device=pick_device(device), trust_code=trust_code, **how)
    _show(finished(students, out), as_json=as_json)
    if diverged:
        raise TrainingDiverged(f"{len(diverged)} of {len(students)} students diverged: {', '.join(diverged)}")


@main.command("eval", epilog="\b\nExample:\n  distill eval runs/kd")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--source", help="NAME:SPLIT.  [default: what the run was evaluated on]")
@click.option("--root", type=click.Path(path_type=Path), help="Folder of the source's files, if it has any.")
@TRUST_CODE
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto.")
def eval_command(
    run: Path, source: str | None, root: Path | None, trust_code: bool, as_json: bool, device: str
) -> None:
    """Evaluate the student of a finished run."""
    finished = load_run(run)
    recipe = finished.recipe
    name = source or check_trusted(recipe.evaluation, f"run {str(run)!r}", trust_code=trust_code)
    data = open_source(name, root or (Path(recipe.root) if recipe.root else None))
    network = load_teacher(f"run:{run}", data.class_names, trust_code=trust_code)
    chosen = pick_device(device)
    network.module.to(chosen)
    with progress(f"eval {run.name}", len(data.labels), "samples") as meter:
        size = network.preprocessing.size
        with Renderer(data, evaluation_view(data), [size], pin=chosen.type == "cuda") as renderer:
            facts = evaluate(network, data, chosen, renderer=renderer, meter=meter)
    if as_json:
        click.echo(json.dumps({"run": str(run), "source": data.name, **facts}, indent=1))
    else:
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in facts.items())
        click.echo(f"{run}: {numbers} on {data.name}, {len(data.labels):,} samples")


@main.command("compare", epilog="\b\nExample:\n  distill compare runs/alone-* runs/kd-*")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Draw accuracy by epoch, too.")
def compare_command(runs: tuple[Path, ...], as_json: bool, plot_file: Path | None) -> None:
    """Put finished runs side by side; runs that differ only in their seed are one row."""
    groups = _show(runs, as_json=as_json)
    if plot_file is not None:
        plot(groups, plot_file)


def _show(runs: Sequence[Path], *, as_json: bool) -> list[Group]:
    groups = compare([load_run(path) for path in runs])
    if as_json:
        click.echo(json.dumps([group.to_dict() for group in groups], indent=1))
    else:
        print_table("", *table_rows(groups))
    return groups


@main.command("methods", epilog="\b\nExamples:\n  distill methods amtml\n  distill methods --json")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def methods_command(name: str | None, as_json: bool) -> None:
    """Say what each method computes, where it is from, and what it needs.

    Every default can be replaced with --set objective.FIELD=VALUE.
    """
    if name is not None and name not in METHODS:
        raise UnknownName("method", name, METHODS)
    told = [describe(each) for each in METHODS if name in (None, each)]
    if as_json:
        click.echo(json.dumps(told, indent=1))
    elif name is None:
        print_table("", ["method", "loss"], [[each["name"], each["formula"]] for each in told])
    else:
        click.echo("\n".join(_described(told[0])))


def _described(method: dict[str, Any]) -> list[str]:
    lines = [f"{method['name']}", f"  loss      {method['formula']}", f"  source    {method['source']}"]
    if method["fusion"] is not None:
        fusion = method["fusion"]
        lines.append(f"  fusion    {fusion['name']}: {fusion['formula']}; combined as a {method['combine']}")
    lines.append(f"  needs     {', '.join(method['needs'])}")
    lines += [f"  note      {method['note']}"] if method["note"] else []
    lines.append("  defaults  " + json.dumps(method["defaults"]))
    return lines


_PLACES = {
    **dict.fromkeys(("temperature", "soft_weight", "hard_weight", "label_smoothing"), "objective.{}"),
    **dict.fromkeys(("lr", "momentum", "weight_decay", "clip", "ema"), "optimizer.{}"),
    **dict.fromkeys(("milestones", "warmup_epochs"), "optimizer.schedule.{}"),
    "teacher_weights": "objective.fusion.weights",
    "optimizer": "optimizer.name",
    "lr_schedule": "optimizer.schedule.shape",
}
"""Where in a recipe a flag's value goes, but at the top under its own name."""


def _apply_flags(values: dict[str, Any], flags: dict[str, Any]) -> None:
    """Put the flags that were given into a recipe's plain values.

    Raises:
        UnknownName, RecipeError: no such view, or flags that do not fit the recipe.
    """
    for name, value in flags.items():
        if value is None or value == ():
            continue
        said = f"--{name.replace('_', '-')}"
        if name in _PLACES:
            set_value(values, _PLACES[name].format(name), value, said)
        elif name == "view":
            values["view"] = view_recipe(value).model_dump(mode="json")
        else:
            values[name] = value


if __name__ == "__main__":
    main()
