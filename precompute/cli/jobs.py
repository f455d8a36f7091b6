"""Subcommands of `precompute` that run a teacher: `run` and `plan`."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coursepack.commands import Command
from coursepack.console import TRUST_CODE, byte_size, parse_numbers, print_table, say
from coursepack.data import open_source, view_recipe
from coursepack.data.store.manifest import LOGITS
from coursepack.data.store.owners import Part, live_runs
from coursepack.device import rank_device
from coursepack.errors import RecipeError
from coursepack.models.classes import load_columns
from coursepack.models.load import teacher_class_names
from coursepack.models.precision import PRECISIONS
from coursepack.precompute.cli.budgets import GROUP as BUDGET_GROUP
from coursepack.precompute.cli.budgets import as_json as described
from coursepack.precompute.cli.budgets import budget_options, budgets, print_budgets, say_warm
from coursepack.precompute.cli.executing import LOCAL, executor_options, make_executor
from coursepack.precompute.cli.options import SINGLE_WRITER, STORE_PATH
from coursepack.precompute.cli.stopping import stoppable
from coursepack.precompute.cli.stores import print_status
from coursepack.precompute.job import Job, run_job
from coursepack.precompute.plan import Probe, check_space, costs, probe, read_seconds
from coursepack.precompute.several import run_jobs
from coursepack.precompute.spec import PrecomputeSpec
from coursepack.precompute.teachers import of_checkpoints, teacher_specs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from coursepack.precompute.plan import Costs


def _parse_part(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Part | None:
    if value is None:
        return None
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
    click.option("--teacher", cls=_UnlessFile,
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
    click.option("--source", "source_spec", cls=_UnlessFile, help="Source of samples: NAME or NAME:SPLIT."),
    click.option("--root", type=click.Path(path_type=Path), help="Folder of the source's files."),
    click.option("--view", cls=_UnlessFile, help="View recipe: name of a preset, or a YAML file."),
    click.option("--view-seed", type=click.IntRange(0),
                 help="Seed of the view recipe.  [default: the recipe's own]"),
    click.option("--views", type=click.IntRange(1), cls=_UnlessFile, help="Number of views of each sample."),
    click.option("--store", type=STORE_PATH, cls=_UnlessFile,
                 help="Folder or address of the store; with @all, of one store per epoch."),
    click.option("--tap", "taps", multiple=True, metavar="LAYER[:REDUCTION[:SIZE]][:sketch:VALUES]",
                 help="Layer whose features are stored too. Repeatable."),
    click.option("--encoding", default="float16", show_default=True,
                 help="Encoding of logits: float32, float16, bfloat16, int8 or topk:K."),
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
    click.option("--precision", type=click.Choice(list(PRECISIONS)), default="float32", show_default=True,
                 help="Precision of the teacher's forward pass."),
    click.option("--channels-last", is_flag=True, help="Run the teacher in channels-last memory format."),
    click.option("--compile", is_flag=True, help="Run the teacher through torch.compile."),
    SINGLE_WRITER,
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
}
"""Parameters of the options of a job by the title of their group in the help."""
BESIDE_FILE = {"part", "device", "workers", "trust_code", "single_writer"}
"""Options of a job that may be given beside a file of teachers."""


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
    chosen = make_executor(executor, address=address, actors=actors, workers_per_gpu=workers_per_gpu)
    elsewhere = executor != LOCAL
    if elsewhere and _ranks() > 1:
        raise RecipeError(f"--executor {executor} has workers of its own: run the command without torchrun")
    specs = of_checkpoints(_spec(**flags)) if file is None else _specs_of_file(file, flags)
    jobs = _jobs_of_specs(specs, elsewhere=elsewhere)
    if not ignore_space:
        for job in jobs:
            check_space(job)
    quiet, ranks = _rank() > 0, _ranks() > 1
    with stoppable([job.store for job in jobs], quiet=quiet):
        if elsewhere or (file is None and len(jobs) == 1):
            manifests = [
                run_job(job, same_numerics=same_numerics, quiet=quiet, all_ranks=ranks, executor=chosen)
                for job in jobs
            ]
        else:
            manifests = run_jobs(jobs, same_numerics=same_numerics, quiet=quiet, all_ranks=ranks)
    for job, manifest in zip(jobs, manifests, strict=True):
        # Of several ranks, the last to finish prints.
        is_last = len(manifest.committed_views()) == manifest.views and not live_runs(job.store)
        if not ranks or is_last:
            print_status(job.store, manifest)


EXAMPLES_PLAN = """\b
Examples:
  precompute plan --teacher run:teachers/cnn --source digits --view digits --views 8 --store new.zarr
  precompute plan --teacher run:teachers/cnn --source digits --view digits --views 8 --store new.zarr \\
      --compare int8,topk:2 --images-per-second 2000 --gpu-hour-price 2.5 --gb-month-price 0.02
"""


@click.command("plan", cls=Command, epilog=EXAMPLES_PLAN, groups=GROUPS | BUDGET_GROUP)
@job_options
@budget_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
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
    (job,) = _jobs_of_specs([_spec(**flags)])
    prices = {"gpu_hour": gpu_hour, "gb_month": gb_month, "puts": puts, "gets": gets}
    cost = costs(job)
    timing = Probe(1 / images_per_second, read_seconds(job)) if images_per_second else probe(job)
    found = budgets(job, compare, timing, read_seconds)
    if as_json:
        values = {"rows": cost.rows, "rows_left": cost.rows_left, "bytes_left": cost.bytes_left}
        click.echo(json.dumps({**values, "encodings": described(found, prices)}, indent=1))
    else:
        _print_plan(cost, timing, job, "one device" if images_per_second else str(job.runner.device))
        print_budgets(found, prices)
    say_warm(found, temperature, len(job.source.class_names))
    check_space(job)


def _jobs_of_specs(specs: Sequence[PrecomputeSpec], *, elsewhere: bool = False) -> list[Job]:
    """Return the jobs of some specifications, and print where another encoding is used."""
    jobs = [spec.job(elsewhere=elsewhere) for spec in specs]
    for job in jobs:
        _say_other_encoding(job)
    return jobs


def _spec(
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


def _specs_of_file(file: Path, flags: dict[str, Any]) -> list[PrecomputeSpec]:
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
    if _ranks() == 1:
        return part or Part(), device
    if part is not None:
        raise RecipeError(
            f"--part {part.index}/{part.count} is given, but torchrun started {_ranks()} ranks, each of "
            "which writes a part of its own: leave --part out"
        )
    return Part(_rank(), _ranks()), str(rank_device(device))


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _say_other_encoding(job: Job) -> None:
    stored = job.plan().arrays[LOGITS][0].name
    if stored != job.encoding and _rank() == 0:
        say(
            f"encoding {job.encoding} would not be smaller than {stored} for {len(job.source.class_names)} "
            f"classes: logits are stored as {stored}"
        )


def _print_plan(cost: Costs, timing: Probe, job: Job, device: str) -> None:
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
        f"about {_duration(seconds)} at {1 / timing.teacher:,.0f} images/s on {device}, "
        f"{cost.rows * timing.teacher / 3600:,.1f} device-hours for the whole store\n"
        f"pays for itself after {pays:.1f} student epochs (teacher {timing.teacher * 1e6:,.0f} us an image, "
        f"reading it back {timing.read * 1e6:,.1f} us)"
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
