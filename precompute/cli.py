"""The command `precompute`: write stores, look at them, check them."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coursepack.console import Commands, byte_size, print_table, progress, say
from coursepack.data import open_source, view_recipe
from coursepack.data.store import load_manifest, verify
from coursepack.data.store.owners import Part, live_runs
from coursepack.data.store.writer import BLOCKS
from coursepack.models import TeacherRunner, load_teacher, parse_tap
from coursepack.models.classes import load_columns
from coursepack.models.runner import pick_device
from coursepack.precompute.job import Job, run_job

if TYPE_CHECKING:
    from coursepack.data.store import Manifest


@click.group(cls=Commands)
def main() -> None:
    """Run frozen teachers once over augmented views and keep what they say in Zarr stores."""


def _parse_part(_ctx: click.Context, _param: click.Parameter, value: str) -> Part:
    index, _, count = value.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise click.BadParameter(f"{value!r} is not I/COUNT with 0 <= I < COUNT, as in 0/2 and 1/2")
    return Part(int(index), int(count))


EXAMPLES_RUN = """\b
Examples:
  precompute run --teacher run:teachers/cnn --source digits --view digits --views 8 --store cnn.zarr
  precompute run --teacher run:teachers/cnn --source digits --view digits --views 16 --store cnn.zarr
"""


@main.command(epilog=EXAMPLES_RUN)
@click.option("--teacher", required=True, help="run:FOLDER, or a network's name with --weights.")
@click.option("--weights", help="The teacher's weights: .safetensors, .pt, or a name of torchvision's.")
@click.option("--size", type=click.IntRange(1), help="Side in pixels to render views at for this teacher.")
@click.option("--source", "source_spec", required=True, help="NAME or NAME:SPLIT.")
@click.option("--root", type=click.Path(path_type=Path), help="Folder of the source's files, if it has any.")
@click.option("--view", "view", required=True, help="View recipe: a preset's name or a YAML file.")
@click.option("--view-seed", type=click.IntRange(0), help="Seed of the view recipe.  [default: the recipe's]")
@click.option("--views", type=click.IntRange(1), required=True, help="Views of every sample.")
@click.option("--store", type=click.Path(path_type=Path), required=True, help="Folder of the store.")
@click.option("--tap", "taps", multiple=True, help="LAYER[:REDUCTION[:SIZE]] to store too. Repeatable.")
@click.option(
    "--encoding", default="float16", show_default=True,
    help="How logits are stored: float32, float16, bfloat16, int8, topk:K.",
)  # fmt: skip
@click.option(
    "--feature-encoding", default="float16", show_default=True,
    help="How features are stored: float32, float16, bfloat16, int8, bits.",
)  # fmt: skip
@click.option(
    "--classes", "class_map", type=click.Path(path_type=Path),
    help="YAML: for each class of the source the teacher's own class.",
)  # fmt: skip
@click.option(
    "--batch-size", type=click.IntRange(1), default=256, show_default=True, help="Images at a time."
)
@click.option("--block-rows", type=click.IntRange(1), help="Rows done or redone as a whole.  [default: auto]")
@click.option(
    "--part", callback=_parse_part, metavar="I/COUNT", default="0/1", show_default=True,
    help="Do only this share of the blocks; other processes do the rest.",
)  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto.")
def run(
    teacher: str,
    weights: str | None,
    size: int | None,
    source_spec: str,
    root: Path | None,
    view: str,
    view_seed: int | None,
    views: int,
    store: Path,
    taps: tuple[str, ...],
    encoding: str,
    feature_encoding: str,
    class_map: Path | None,
    batch_size: int,
    block_rows: int | None,
    part: Part,
    device: str,
) -> None:
    """Run one teacher over all views and write its store.

    Run the same command again after any interruption: it goes on where it stopped. More --views, or another
    --tap, on a finished store adds only what is missing.
    """
    source = open_source(source_spec, root)
    recipe = view_recipe(view, view_seed)
    columns = None if class_map is None else load_columns(class_map, source.class_names)
    network = load_teacher(teacher, source.class_names, weights=weights, size=size, columns=columns)
    runner = TeacherRunner(network, [parse_tap(tap) for tap in taps], pick_device(device), columns)
    job = Job(
        store=store,
        source=source,
        recipe=recipe,
        runner=runner,
        views=views,
        encoding=encoding,
        feature_encoding=feature_encoding,
        batch_size=batch_size,
        block_rows=block_rows,
        part=part,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        manifest = run_job(job)
    except KeyboardInterrupt:
        say(f"stopped. What is done is kept; run the same command again to finish {str(store)!r}.")
        raise click.exceptions.Exit(130) from None
    _print_status(store, manifest)


@main.command(epilog="\b\nExample:\n  precompute status --store cnn.zarr")
@click.option("--store", type=click.Path(path_type=Path), required=True, help="Folder of the store.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(store: Path, as_json: bool) -> None:
    """Say what a store holds, what is still missing, and who is writing to it."""
    manifest = load_manifest(store)
    if as_json:
        click.echo(json.dumps(_status(store, manifest), indent=1))
    else:
        _print_status(store, manifest)


@main.command("verify", epilog="\b\nExample:\n  precompute verify --store cnn.zarr")
@click.option("--store", type=click.Path(path_type=Path), required=True, help="Folder of the store.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify_command(store: Path, as_json: bool) -> None:
    """Check every file against the manifest; exit status 1 if anything is wrong."""
    total = sum(size for size, _ in load_manifest(store).files.values())
    with progress(f"verify {store.name}", total, "bytes") as meter:
        report = verify(store, on_file=meter.advance)
    if as_json:
        values = {"files": report.files, "bytes": report.size, "problems": list(report.problems)}
        click.echo(json.dumps(values, indent=1))
    else:
        for problem in report.problems:
            click.echo(problem)
        verdict = f"{len(report.problems)} problems" if report.problems else "sound"
        click.echo(f"{store}: {verdict}, {report.files} files, {byte_size(report.size)}")
    if report.problems:
        raise click.exceptions.Exit(1)


def _status(store: Path, manifest: Manifest) -> dict[str, Any]:
    identity = manifest.identity
    views = {}
    for view, record in sorted(manifest.view_records.items(), key=lambda item: int(item[0])):
        sums = record["sums"]
        views[view] = {name: sums[name] / sums["rows"] for name in ("correct", "cross_entropy", "entropy")}
    return {
        "store": str(store),
        "fingerprint": manifest.fingerprint,
        "network": identity["teacher"]["network"],
        "weights": manifest.origin.get("weights_file"),
        "source": identity["source"]["name"],
        "view_fingerprint": manifest.view_fingerprint,
        "samples": manifest.samples,
        "classes": len(manifest.class_names),
        "views": manifest.views,
        "committed_views": list(manifest.committed_views()),
        "blocks_done_of_other_views": len(list((store / BLOCKS).glob("*.json"))),
        "block_rows": manifest.block_rows,
        "arrays": {
            name: {"encoding": array.encoding.to_dict(), "row_shape": list(array.row_shape)}
            for name, array in manifest.arrays.items()
        },
        "bytes": sum(size for size, _ in manifest.files.values()),
        "per_view": views,
        "writers": live_runs(store),
    }


def _print_status(store: Path, manifest: Manifest) -> None:
    facts = _status(store, manifest)
    rows = [
        ["teacher", f"{facts['network']} from {facts['weights']}"],
        ["source", f"{facts['source']}, {facts['samples']:,} samples, {facts['classes']} classes"],
        ["views committed", f"{len(facts['committed_views'])} of {facts['views']}"],
    ]
    for name, array in facts["arrays"].items():
        shape = " x ".join(map(str, array["row_shape"]))
        rows.append([name, f"{shape}, {array['encoding']['name']}"])
    rows.append(["size", byte_size(facts["bytes"])])
    if facts["per_view"]:
        correct = [view["correct"] for view in facts["per_view"].values()]
        rows.append(["teacher's accuracy", f"{min(correct):.2%} to {max(correct):.2%} over views"])
    if len(facts["committed_views"]) < facts["views"]:
        rows.append(["blocks done besides", str(facts["blocks_done_of_other_views"])])
    for writer in facts["writers"]:
        part = f"part {writer['part_index']}/{writer['part_count']}"
        rows.append(["being written by", f"process {writer['pid']} on {writer['host']}, {part}"])
    print_table(str(store), ["", ""], rows)
