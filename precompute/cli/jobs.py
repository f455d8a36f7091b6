"""Subcommands of `precompute` that run a teacher: `run` and `plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coursepack.catalog import names_of
from coursepack.commands import Choice, Command, complete_tap, name_of
from coursepack.console import JSON, TRUST_CODE, parse_numbers, print_json
from coursepack.precompute.cli.budgets import GROUP as BUDGET_GROUP
from coursepack.precompute.cli.budgets import budget_options
from coursepack.precompute.cli.executing import LOCAL, executor_options, make_executor
from coursepack.precompute.cli.options import SINGLE_WRITER, STORE_PATH
from coursepack.precompute.cli.stopping import stoppable
from coursepack.precompute.cli.stores import print_status, status_values

if TYPE_CHECKING:
    from collections.abc import Callable

    from coursepack.data.store.owners import Part


def _parse_part(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Part | None:
    if value is None:
        return None
    from coursepack.data.store.owners import Part

    index, _, count = value.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise click.BadParameter(f"{value!r} is not I/COUNT with 0 <= I < COUNT, as in 0/2 and 1/2")
    return Part(int(index), int(count))


class _UnlessFile(click.Option):
    """Required option that is not needed if a file of teachers is given."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, required=True, **settings)

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        self.required = not isinstance(ctx.params.get("file"), Path)
        return super().process_value(ctx, value)


# fmt: off
JOB_OPTIONS = (
    click.option("--teacher", cls=_UnlessFile, shell_complete=name_of("network"),
                 help="run:FOLDER[@EPOCH|@all], hf:FOLDER, timm:local-dir:FOLDER, onnx:FILE, or a network's "
                      "name with --weights."),
    click.option("--weights",
                 help="Weights: a .safetensors or .pt file, or a name of torchvision's or timm's."),
    click.option("--size", type=click.IntRange(1),
                 help="Side in pixels of the rendered views.  [default: the teacher's own]"),
    click.option("--mean", callback=parse_numbers, metavar="X,X,X",
                 help="Mean per channel, of values in [0, 1].  [default: the teacher's own]"),
    click.option("--std", callback=parse_numbers, metavar="X,X,X",
                 help="Standard deviation per channel.  [default: the teacher's own]"),
    click.option("--classes", "class_map", type=click.Path(path_type=Path),
                 help="YAML class map: the teacher's class for each class of the source; made if missing."),
    click.option("--source", "source_spec", cls=_UnlessFile, shell_complete=name_of("source"),
                 help="Source of samples: NAME or NAME:SPLIT."),
    click.option("--root", type=click.Path(path_type=Path), help="Folder of the source's files."),
    click.option("--view", cls=_UnlessFile, shell_complete=name_of("view"),
                 help="View recipe: name of a preset, or a YAML file."),
    click.option("--view-seed", type=click.IntRange(0),
                 help="Seed of the view recipe.  [default: the recipe's own]"),
    click.option("--views", type=click.IntRange(1), cls=_UnlessFile, help="Number of views of each sample."),
    click.option("--store", type=STORE_PATH, cls=_UnlessFile,
                 help="Folder or address of the store; with @all, of one store per epoch."),
    click.option("--tap", "taps", multiple=True, shell_complete=complete_tap,
                 metavar="LAYER[:REDUCTION[:SIZE]][:sketch:VALUES]",
                 help="Layer whose features are stored too. Repeatable."),
    click.option("--encoding", shell_complete=name_of("encoding"), default="float16", show_default=True,
                 help="Encoding of logits: float32, float16, bfloat16, int8, int4, topk:K or topk16:K."),
    click.option("--feature-encoding", default="float16", show_default=True,
                 help="Encoding of features: float32, float16, bfloat16, int8 or bits."),
    click.option("--batch-size", type=click.IntRange(1), default=256, show_default=True,
                 help="Images per forward pass."),
    click.option("--block-rows", type=click.IntRange(1),
                 help="Rows per block, the unit of resuming.  [default: auto]"),
    click.option("--part", callback=_parse_part, metavar="I/COUNT",
                 help="Share of the blocks that this process writes.  [default: all; torchrun's rank]"),
    click.option("--views-per-load", type=click.IntRange(1), default=1, show_default=True,
                 help="Views rendered per decoded image; does not change the store's bytes."),
    click.option("--workers", type=click.IntRange(0),
                 help="Worker processes that render views.  [default: one per core for image files]"),
    TRUST_CODE,
    click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:NUMBER or auto."),
    click.option("--precision", type=Choice(names_of("precision")), default="float32", show_default=True,
                 help="Precision of the teacher's forward pass."),
    click.option("--channels-last", is_flag=True, help="Run the teacher in channels-last memory format."),
    click.option("--compile", is_flag=True, help="Run the teacher through torch.compile."),
    SINGLE_WRITER,
    JSON,
)
# fmt: on


GROUPS = {
    "Teacher": ("teacher", "weights", "size", "mean", "std", "class_map"),
    "Samples and views": ("source_spec", "root", "view", "view_seed", "views"),
    "Store": (
        "store",
        "taps",
        "encoding",
        "feature_encoding",
        "block_rows",
        "part",
        "single_writer",
        "ignore_space",
        "same_numerics",
    ),
    "Execution": (
        *("device", "precision", "batch_size", "workers", "views_per_load"),
        *("channels_last", "compile", "trust_code"),
        *("executor", "address", "actors", "workers_per_gpu"),
    ),
    "Output": ("as_json", "quiet"),
}
"""Parameters of the options of a job by the title of their group in the help."""


def job_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that describe a job to a command."""
    for option in reversed(JOB_OPTIONS):
        command = option(command)
    return command


EXAMPLES_RUN = """\b
Examples:
  precompute run --teacher run:teachers/cnn --source digits --view digits --views 8 --store cnn.zarr
  precompute run --teacher run:teachers/cnn --source digits --view digits --views 16 --store cnn.zarr
  precompute run --teacher run:teachers/cnn --source digits --view digits --views 16 --store cnn.zarr \\
      --tap conv2:attention
  precompute run teachers.yaml
"""


@click.command("run", cls=Command, epilog=EXAMPLES_RUN, groups=GROUPS)
@click.argument(
    "file", required=False, is_eager=True, type=click.Path(path_type=Path), metavar="[TEACHERS.yaml]"
)
@job_options
@click.option("--ignore-space", is_flag=True, help="Start even if the store will not fit on the disk.")
@click.option(
    "--same-numerics",
    is_flag=True,
    help="Fail instead of warning if rows come from another kind of machine or batch size.",
)
@executor_options
def run(
    file: Path | None,
    ignore_space: bool,
    same_numerics: bool,
    executor: str,
    address: str | None,
    actors: int | None,
    workers_per_gpu: int | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Run one teacher over all views and write its store, or all teachers of a file.

    run:FOLDER@EPOCH is a teacher's checkpoint that `distill train --keep-checkpoints` kept, and
    run:FOLDER@all each of them: views are rendered once, and STORE is the folder of all their stores.

    An interrupted run continues when the same command is run again. More --views, or another --tap, for a
    finished store adds only the missing views and arrays. Under torchrun, every rank writes a part of the
    stores, with --device cuda on a GPU of its own. With --executor ray, the workers of a Ray cluster do, and
    several teachers run one after another.
    """
    from coursepack.data.store.owners import live_runs
    from coursepack.errors import RecipeError
    from coursepack.precompute.cli.specs import jobs_of_specs, rank, ranks, specs_of_file, specs_of_options
    from coursepack.precompute.job import run_job
    from coursepack.precompute.plan import check_space
    from coursepack.precompute.several import run_jobs

    chosen = make_executor(executor, address=address, actors=actors, workers_per_gpu=workers_per_gpu)
    elsewhere, in_ranks = executor != LOCAL, ranks() > 1
    if elsewhere and in_ranks:
        raise RecipeError(f"--executor {executor} has workers of its own: run the command without torchrun")
    specs = specs_of_options(**flags) if file is None else specs_of_file(file, flags)
    jobs = jobs_of_specs(specs, elsewhere=elsewhere)
    if not ignore_space:
        for job in jobs:
            check_space(job)
    quiet = rank() > 0
    with stoppable([job.store for job in jobs], quiet=quiet):
        if elsewhere or (file is None and len(jobs) == 1):
            manifests = [
                run_job(job, same_numerics=same_numerics, quiet=quiet, all_ranks=in_ranks, executor=chosen)
                for job in jobs
            ]
        else:
            manifests = run_jobs(jobs, same_numerics=same_numerics, quiet=quiet, all_ranks=in_ranks)
    # Of several ranks, the last to finish prints.
    written = [
        (job.store, manifest)
        for job, manifest in zip(jobs, manifests, strict=True)
        if not in_ranks or (len(manifest.committed_views()) == manifest.views and not live_runs(job.store))
    ]
    if as_json and written:
        print_json([status_values(store, manifest) for store, manifest in written])
    for store, manifest in () if as_json else written:
        print_status(store, manifest)


EXAMPLES_PLAN = """\b
Examples:
  precompute plan --teacher run:teachers/cnn --source digits --view digits --views 8 --store new.zarr
  precompute plan --teacher run:teachers/cnn --source digits --view digits --views 8 --store new.zarr \\
      --compare int8,topk:2 --images-per-second 2000 --gpu-hour-price 2.5 --gb-month-price 0.02
"""


@click.command("plan", cls=Command, epilog=EXAMPLES_PLAN, groups=GROUPS | BUDGET_GROUP)
@job_options
@budget_options
def plan(
    compare: list[str],
    temperature: float | None,
    images_per_second: float | None,
    gpu_hour: float | None,
    gb_month: float | None,
    puts: float | None,
    gets: float | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Estimate the size, duration and break-even of `precompute run` with the same options.

    Runs the teacher on a few batches and writes nothing to the store. Objects and requests are those of a
    store in a bucket; break-even is the number of student epochs from which the store takes less time, or
    money, than teachers that run live. Money is shown for what has a price, in the currency of the prices.
    The exit status is 1 if the store does not fit on the disk.
    """
    from coursepack.precompute.cli.budgets import budget_values, budgets, print_budgets, say_warm
    from coursepack.precompute.cli.specs import jobs_of_specs, plan_values, print_plan, spec_of_options
    from coursepack.precompute.plan import Probe, check_space, costs, probe, read_seconds

    (job,) = jobs_of_specs([spec_of_options(**flags)])
    prices = {"gpu_hour": gpu_hour, "gb_month": gb_month, "puts": puts, "gets": gets}
    cost = costs(job)
    timing = Probe(1 / images_per_second, read_seconds(job)) if images_per_second else probe(job)
    found = budgets(job, compare, timing, read_seconds)
    device = "one device" if images_per_second else str(job.runner.device)
    if as_json:
        print_json({**plan_values(cost, timing, job, device), "encodings": budget_values(found, prices)})
    else:
        print_plan(cost, timing, job, device)
        print_budgets(found, prices)
    say_warm(found, temperature, len(job.source.class_names))
    check_space(job)
