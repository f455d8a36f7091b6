"""Subcommands that exchange stores with other programs: `export` and `import`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from coursepack.commands import Choice, Command
from coursepack.console import JSON, byte_size, print_json, print_table
from coursepack.errors import RecipeError
from coursepack.precompute.cli.options import SINGLE_WRITER, STORE_PATH
from coursepack.precompute.cli.stores import print_status, status_values

CACHE_FORMATS = ("numpy", "tinyvit", "fkd")
"""Names in `coursepack.precompute.caches.FORMATS`, whose modules import torch."""

EXAMPLES_IMPORT = """\b
Example:
  precompute import cnn.safetensors --format numpy --source digits --view digits --out imported.zarr
"""
ONLY_FOR = {
    "array": ("numpy",),
    "values": ("numpy",),
    "label_type": ("fkd",),
    "replay_seeds": ("tinyvit",),
    "view": ("numpy", "tinyvit"),
}
"""Formats of the options that not all formats have."""


@click.command(
    "import",
    cls=Command,
    epilog=EXAMPLES_IMPORT,
    groups={
        "Cache": ("cache_format", "array", "values", "label_type", "replay_seeds", "temperature"),
        "Samples and views": ("source_spec", "root", "view", "size"),
        "Store": ("store", "encoding", "single_writer", "as_json"),
    },
)
@click.argument("cache", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "cache_format",
    type=Choice(CACHE_FORMATS),
    required=True,
    help="numpy: arrays in .npy, .npz or .safetensors; tinyvit: folder of logits_topK_epochE; "
    "fkd: folder of one file per image.",
)
@click.option("--array", help="Name of the array in a file of several.  [default: logits, or the only one]")
@click.option(
    "--values",
    type=click.Choice(["logits", "probs"]),
    default="logits",
    show_default=True,
    help="Meaning of the array's values.",
)
@click.option(
    "--label-type",
    default="marginal_smoothing_k5",
    show_default=True,
    help="Type of FKD's labels, as its --label_type; marginal_renorm_k5, smoothing, hard or ori.",
)
@click.option(
    "--replay-seeds",
    is_flag=True,
    help="Replay TinyViT's seeds as crops and flips; right only without other augmentations.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Temperature of the softmax that gave the cache's probabilities.",
)
@click.option("--source", "source_spec", required=True, help="Source of samples: NAME or NAME:SPLIT.")
@click.option("--root", type=click.Path(path_type=Path), help="Folder of the source's files.")
@click.option("--view", help="View that the cache was made for: none, eval, or a YAML file without draws.")
@click.option(
    "--size",
    type=click.IntRange(1, 4096),
    help="Side in pixels of the images that the teacher saw.  [default: the view's reference size, "
    "224 for recorded views]",
)
@click.option("--out", "store", type=STORE_PATH, required=True, help="Folder or address of the store.")
@click.option(
    "--encoding",
    help="Encoding of logits: float32, float16, bfloat16, int8, int4 or topk:K.  [default: "
    "one that keeps the cache's precision]",
)
@SINGLE_WRITER
@JSON
def import_command(
    cache: Path,
    cache_format: str,
    source_spec: str,
    root: Path | None,
    view: str | None,
    size: int | None,
    store: str | Path,
    encoding: str | None,
    single_writer: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write a store of answers that another program cached.

    The store is used like one of `precompute run`, for the views that its answers were made for: the crops
    and flips that FKD's files record, or the one view that you name with --view. What the store can be used
    for is printed, and recorded in it. An interrupted import continues when the same command is run again.
    """
    from coursepack.data import open_source, view_recipe
    from coursepack.precompute.caches import FORMATS
    from coursepack.precompute.caches.base import CacheOptions
    from coursepack.precompute.caches.write import cache_plan, import_cache

    _check_options(cache_format)
    source = open_source(source_spec, root)
    source.check()
    opened = FORMATS[cache_format](
        CacheOptions(cache, source, None if view is None else view_recipe(view), **options)
    )
    plan = cache_plan(opened, source, cache, encoding=encoding, size=size, root=root)
    manifest = import_cache(store, opened, source, plan, single_writer=single_writer)
    if as_json:
        print_json(status_values(store, manifest))
    else:
        print_status(store, manifest)


EXAMPLES_EXPORT = """\b
Example:
  precompute export cnn.zarr --out cnn.safetensors
"""


@click.command("export", cls=Command, epilog=EXAMPLES_EXPORT)
@click.argument("store", type=STORE_PATH)
@click.option(
    "--format",
    type=click.Choice(["safetensors"]),
    default="safetensors",
    show_default=True,
    expose_value=False,
    help="Format of the file.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File to write.")
@click.option("--views", type=click.IntRange(1), help="Number of views, from the first.  [default: all]")
@JSON
def export(store: str | Path, out: Path, views: int | None, as_json: bool) -> None:
    """Write the decoded rows of a store to one file.

    Logits and features are float32, `(V, N, ...)`, beside the labels `(N,)` and the indices of the views
    `(V,)`. The file's metadata names teacher, view, source, classes and fingerprints.
    """
    from coursepack.data.store import StoreReader
    from coursepack.precompute.export import export_safetensors

    reader = StoreReader(store)
    found = export_safetensors(reader, out, views)
    if as_json:
        shapes = {name: list(shape) for name, shape in found.shapes.items()}
        print_json({"out": str(out), "bytes": found.size, "tensors": shapes})
        return
    rows = [[name, " x ".join(map(str, shape))] for name, shape in found.shapes.items()]
    print_table(f"{out}, {byte_size(found.size)}", ["tensor", "shape"], rows)


def _check_options(cache_format: str) -> None:
    """Check that no option of another format is given.

    Raises:
        RecipeError: one is; names it.
    """
    ctx = click.get_current_context()
    for param in ctx.command.params:
        given = ctx.get_parameter_source(str(param.name)) is click.core.ParameterSource.COMMANDLINE
        formats = ONLY_FOR.get(str(param.name))
        if given and formats is not None and cache_format not in formats:
            raise RecipeError(
                f"{param.opts[0]} is for --format {' and '.join(formats)}, but the format is "
                f"{cache_format}: leave it out"
            )
