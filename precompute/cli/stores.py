"""Subcommands for existing stores: `status`, `verify` and `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coursepack.commands import Command
from coursepack.console import (
    JSON,
    TRUST_CODE,
    byte_size,
    inform,
    print_json,
    print_table,
    printable,
    progress,
    warn,
)
from coursepack.errors import RecipeError
from coursepack.files import write_whole
from coursepack.precompute.cli.options import SINGLE_WRITER, STORE_PATH

if TYPE_CHECKING:
    from coursepack.data.store import Manifest
    from coursepack.data.store.check import StoreReport

STORE = click.option("--store", type=STORE_PATH, required=True, help="Folder or address of the store.")
ROOT_HELP = "Folder of the source's files.  [default: the recorded one]"


@click.command("status", cls=Command, epilog="\b\nExample:\n  precompute status --store cnn.zarr")
@STORE
@JSON
def status(store: str | Path, as_json: bool) -> None:
    """Show the content of a store, its missing views and the processes that write to it."""
    from coursepack.data.store import load_manifest
    from coursepack.data.store.identity import check_complete

    manifest = load_manifest(store)
    check_complete(manifest, str(store))
    if as_json:
        print_json(status_values(store, manifest))
    else:
        print_status(store, manifest)


EXAMPLES_VERIFY = """\b
Examples:
  precompute verify --store cnn.zarr
  precompute verify --store cnn.zarr --deep 100
  precompute verify --store cnn.zarr --content
  precompute verify --store cnn.zarr --repair
"""


@click.command("verify", cls=Command, epilog=EXAMPLES_VERIFY)
@STORE
@click.option(
    "--deep", type=click.IntRange(1), help="Number of random rows to compare with the teacher's outputs."
)
@click.option("--content", is_flag=True, help="Also compare all of the source with the recorded checksums.")
@click.option("--repair", "mend", is_flag=True, help="Write damaged files again.")
@SINGLE_WRITER
@click.option(
    "--weights",
    help="Weights of the teacher: a file, a name, or a spec such as onnx:FILE.  [default: the recorded ones]",
)
@click.option("--root", type=click.Path(path_type=Path), help=ROOT_HELP)
@TRUST_CODE
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:NUMBER or auto.")
@JSON
def verify_command(
    store: str | Path,
    deep: int | None,
    content: bool,
    mend: bool,
    single_writer: bool,
    weights: str | None,
    root: Path | None,
    trust_code: bool,
    device: str,
    as_json: bool,
) -> None:
    """Check every file of a store against its manifest.

    The exit status is 1 if there is a problem.
    """
    from coursepack.data.store import load_manifest, verify
    from coursepack.data.store.identity import check_complete
    from coursepack.data.store.locations import open_location
    from coursepack.device import pick_device
    from coursepack.precompute.verify import check_views, job_of_store, repair, verify_deep

    manifest = load_manifest(store)
    check_complete(manifest, str(store))

    def check() -> StoreReport:
        with progress(f"verify {open_location(store).name}", manifest.data_bytes, "bytes") as meter:
            return verify(store, on_file=meter.advance)

    report = check()
    wrong: tuple[str, ...] = ()
    if (report.problems and mend) or (deep and not report.problems):
        chosen = pick_device(device)
        job = job_of_store(
            store,
            manifest,
            weights=weights,
            root=root,
            device=chosen,
            trust_code=trust_code,
            float32_instead=not report.problems,
            single_writer=single_writer,
        )
    if report.problems and mend:
        others = repair(job, report.problems)
        for problem in report.problems:
            inform(f"{problem}: written again")
        for key in others:
            inform(f"{key}: the new content differs by rounding; the manifest has its new checksum")
        report = check()
    if not report.problems:
        wrong = check_views(store, manifest, root, content=content, trust_code=trust_code)
    if deep and not report.problems:
        with progress("run the teacher again", deep, "rows") as meter:
            wrong += verify_deep(job, deep, on_rows=meter.advance).wrong
    problems = [*map(str, report.problems), *wrong]
    if as_json:
        values = {"files": report.files, "bytes": report.size, "rows": deep, "problems": problems}
        print_json(values)
    else:
        for line in problems:
            click.echo(printable(line))
        verdict = f"{len(problems)} problems" if problems else "sound"
        compared = f", {deep} rows equal to the teacher's outputs" if deep and not problems else ""
        click.echo(f"{store}: {verdict}, {report.files} files, {byte_size(report.size)}{compared}")
    if problems:
        raise click.exceptions.Exit(1)


EXAMPLES_INSPECT = """\b
Examples:
  precompute inspect cnn.zarr resnet.zarr
  precompute inspect cnn.zarr resnet.zarr --html stores.html
  precompute inspect cnn.zarr resnet.zarr --views 4 --out grid.png
"""


@click.command("inspect", cls=Command, epilog=EXAMPLES_INSPECT)
@click.argument("stores", nargs=-1, required=True, type=STORE_PATH)
@click.option("--views", type=click.IntRange(1), help="Number of views that are shown.  [default: 4]")
@click.option("--out", type=click.Path(path_type=Path), help="Picture of some samples and views to write.")
@click.option(
    "--html", type=click.Path(path_type=Path), help="HTML page to write; an existing one is replaced."
)
@click.option(
    "--verify/--no-verify",
    "check_files",
    default=True,
    show_default=True,
    help="Check every file against its checksum, for the page.",
)
@click.option("--root", type=click.Path(path_type=Path), help=ROOT_HELP)
@TRUST_CODE
@JSON
def inspect(
    stores: tuple[str | Path, ...],
    views: int | None,
    out: Path | None,
    html: Path | None,
    check_files: bool,
    root: Path | None,
    trust_code: bool,
    as_json: bool,
) -> None:
    """Show statistics of stores: accuracy per view, fidelity of encodings, agreement of teachers.

    With --out, write a picture instead: some samples, their views, and the top class of each teacher.

    With --html, write all of this and more on one page that needs no network: samples, where the teachers
    disagree, missing views, damaged files.
    """
    from coursepack.data.store import StoreReader
    from coursepack.data.store.identity import check_complete
    from coursepack.precompute.inspect import agreement, common_view, describe_store
    from coursepack.precompute.picture import draw_grid

    if out is not None and html is not None:
        raise click.UsageError("--out writes a picture and --html a page: give one of them")
    if out is not None:
        draw_grid(stores, root, views or 4, out, trust_code=trust_code)
        if as_json:
            print_json({"picture": str(out), "stores": [str(store) for store in stores]})
        else:
            click.echo(f"{out}: {len(stores)} teachers on some samples")
        return
    if html is not None:
        _write_page(
            html, stores, root, views=views or 4, verify=check_files, trust_code=trust_code, as_json=as_json
        )
        return
    if views is not None:
        raise click.UsageError("--views applies to the picture: give --out grid.png too, or --html page.html")
    readers = [StoreReader(path) for path in stores]
    for reader in readers:
        check_complete(reader.manifest, reader.address)
    described = [describe_store(reader) for reader in readers]
    view = common_view(readers)
    agree = None if view is None else agreement(readers, view)
    if as_json:
        print_json({"stores": described, "agreement": agree})
        return
    for description in described:
        _print_store(description)
    if agree is not None and len(readers) > 1:
        header = ["agreement of top classes", *[reader.name for reader in readers]]
        rows = [
            [reader.name, *[f"{share:.2%}" for share in row]]
            for reader, row in zip(readers, agree, strict=True)
        ]
        print_table("", header, rows)


def _write_page(
    path: Path, stores: tuple[str | Path, ...], root: Path | None, *, as_json: bool, **options: Any
) -> None:
    """Write the page of `inspect --html`."""
    from coursepack.precompute.page.build import build_page

    if path.is_dir() or not path.parent.is_dir():
        problem = "it is a folder" if path.is_dir() else f"there is no folder {str(path.parent)!r}"
        raise RecipeError(f"cannot write the page {str(path)!r}: {problem}. Choose another --html")
    page, problems = build_page(stores, root, **options)
    for problem in problems:
        warn(f"warning: {problem}")
    content = page.encode(errors="backslashreplace")  # a path may hold bytes that are not text
    write_whole(path, content)
    if as_json:
        print_json({"page": str(path), "stores": [str(store) for store in stores], "problems": problems})
    else:
        click.echo(printable(f"{path}: {byte_size(len(content))}"))


def print_status(store: str | Path, manifest: Manifest) -> None:
    """Print the content of a store and its missing views."""
    from coursepack.precompute.precision import describe_precision

    content = status_values(store, manifest)
    rows = [
        ["teacher", f"{content['network']} from {content['weights']}"],
        ["source", f"{content['source']}, {content['samples']:,} samples, {content['classes']} classes"],
        ["views committed", f"{len(content['committed_views'])} of {content['views']}"],
    ]
    if not manifest.knows_all:
        rows.append(["classes that the teacher knows", f"{content['known_classes']}"])
    for name, array in content["arrays"].items():
        rows.append([name, f"{_shape(array['row_shape'])}, {array['encoding']}"])
    rows.append(["size", byte_size(content["bytes"])])
    if content["accuracy_per_view"]:
        correct = content["accuracy_per_view"].values()
        rows.append(["teacher's accuracy", f"{min(correct):.2%} to {max(correct):.2%} over views"])
    rows.append(["precision", describe_precision(content["precision"])])
    rows += _numerics_rows(content["numerics"])
    if len(content["committed_views"]) < content["views"]:
        rows.append(["finished blocks of uncommitted views", str(content["blocks_done_besides"])])
    if content["imported"] is not None:
        rows.append(["imported", content["imported"]])
    for writer in content["writers"]:
        part = f"part {writer['part_index']}/{writer['part_count']}"
        rows.append(["being written by", f"process {writer['pid']} on {writer['host']}, {part}"])
    print_table(str(store), ["", ""], rows)


def status_values(store: str | Path, manifest: Manifest) -> dict[str, Any]:
    """Return the content of a store and the processes that write to it as plain values."""
    from coursepack.data.store.done import done_objects
    from coursepack.data.store.locations import open_location
    from coursepack.data.store.owners import live_runs
    from coursepack.data.store.records import view_mean
    from coursepack.precompute.caches.base import describe_use
    from coursepack.precompute.numerics import views_by_numerics
    from coursepack.precompute.precision import store_precision

    identity = manifest.identity
    records = sorted(manifest.view_records.items(), key=lambda item: int(item[0]))
    return {
        "store": str(store),
        "fingerprint": manifest.fingerprint,
        "network": identity["teacher"]["network"],
        "weights": manifest.origin.get("weights_file"),
        "source": identity["source"]["name"],
        "view_fingerprint": manifest.view_fingerprint,
        "samples": manifest.samples,
        "classes": len(manifest.class_names),
        "known_classes": len(manifest.known_classes),
        "views": manifest.views,
        "committed_views": list(manifest.committed_views()),
        "blocks_done_besides": len(done_objects(open_location(store))),
        "block_rows": manifest.block_rows,
        "arrays": {
            name: {"encoding": array.encoding.name, "row_shape": list(array.row_shape)}
            for name, array in manifest.arrays.items()
        },
        "bytes": manifest.data_bytes,
        "accuracy_per_view": {
            view: view_mean(record, "correct", f"view {view} of store {str(store)!r}")
            for view, record in records
        },
        "precision": store_precision(manifest),
        "numerics": views_by_numerics(manifest),
        "imported": describe_use(manifest),
        "writers": live_runs(store),
    }


def _print_store(description: dict[str, Any]) -> None:
    from coursepack.precompute.precision import describe_precision

    teacher = description["identity"]["teacher"]
    click.echo(printable(f"{description['store']}: {teacher['network']}, weights {teacher['weights'][:12]}"))
    rows = [
        [name, array["encoding"], _shape(array["row_shape"]), f"{array['row_bytes']:,}", str(array["views"])]
        for name, array in description["arrays"].items()
    ]
    print_table("", ["array", "encoding", "row", "bytes a row", "views"], rows)
    header = ["view", "accuracy", "cross-entropy", "entropy", "calibration error"]
    temperatures = list(next(iter(description["views"].values()))["fidelity"])
    header += [f"KL {name}: mean, p99" for name in temperatures]
    rows = []
    for view, values in description["views"].items():
        row = [view, f"{values['accuracy']:.2%}"]
        row += [f"{values[name]:.4f}" for name in ("cross_entropy", "entropy", "calibration_error")]
        fidelity = (values["fidelity"][name] for name in temperatures)
        rows.append([*row, *[f"{entry['mean']:.2g}, {entry['p99']:.2g}" for entry in fidelity]])
    print_table("", header, rows)
    click.echo(printable(f"precision: {describe_precision(description['precision'])}"))
    for name, text in _numerics_rows(description["numerics"]):
        click.echo(f"{name}: {text}")


def _numerics_rows(groups: list[dict[str, Any]]) -> list[list[str]]:
    """Return a table row for each kind of numerics with its number of views."""
    from coursepack.precompute.numerics import describe_numerics

    return [["numerics", f"{describe_numerics(group)}, views: {len(group['views'])}"] for group in groups]


def _shape(row_shape: list[int]) -> str:
    return " x ".join(map(str, row_shape))
