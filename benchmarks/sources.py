"""Speed of reading images from tar shards, compared with a folder, and opening a source of 13 million.

    python benchmarks/sources.py [--json FILE] [--quick]

The folder and the shards hold the same JPEG files, which two worker processes decode and render in a random
order. The large source has an index of made-up samples, over shards that take no room on disk.
"""

from __future__ import annotations

import os
import pickle
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
from _harness import PATIENCE, Threads, arguments, exact, measure, ratios, report, row
from _photographs import photograph
from _pipeline import anonymous_bytes
from PIL import Image

from coursepack.data import batches, open_source, view_recipe
from coursepack.data.loading import Renderer
from coursepack.data.sources import tar_index

if TYPE_CHECKING:
    from typing import IO

    from _harness import Row, Seconds

SIDE, BATCH = 224, 64
SHARDS = 8
CLASSES = 1000


def reading(rounds: int, patience: float, count: int, workers: int) -> list[Row]:
    """Measure the images per second from shards over those from a folder with the same files."""
    with tempfile.TemporaryDirectory() as name:
        root, rng = Path(name), np.random.default_rng(2)
        write_images(root, count, rng)
        recipe, epoch = view_recipe("imagenet"), 0
        with mock.patch.dict(os.environ, {"COURSEPACK_CACHE": str(root / "cache")}):
            sources = {"folder": open_source("folder:train", root), "shards": open_source("tar:*.tar", root)}

        def render(renderer: Renderer, kind: str) -> None:
            nonlocal epoch
            epoch += 1
            order = np.random.default_rng(epoch).permutation(count)
            several = batches(sources[kind], recipe, order, views=[epoch], batch_size=BATCH)
            for batch in renderer.ahead(several):
                batch.pixels(SIDE)

        config = {"images": count, "shards": SHARDS, "side": SIDE, "workers": workers, "batch": BATCH}

        def rows_of(seconds: Seconds) -> list[Row]:
            rates = {kind: [count / s for s in seconds[kind]] for kind in sources}
            return [
                row("folder", rates["folder"], "images/s", config),
                row("tar shards", rates["shards"], "images/s", config),
                row(
                    "tar shards over folder, images/s",
                    ratios(seconds, "folder", "shards"),
                    "ratio",
                    config,
                    ">= 1.0",
                ),
            ]

        renderers = {
            kind: Renderer(source, recipe, [SIDE], workers=workers) for kind, source in sources.items()
        }
        with renderers["folder"], renderers["shards"]:
            variants = {
                kind: lambda kind=kind, renderer=renderer: render(renderer, kind)
                for kind, renderer in renderers.items()
            }
            return measure(variants, rounds, rows_of, patience=patience)


def write_images(root: Path, count: int, rng: np.random.Generator) -> None:
    """Write JPEG files of two sizes to `train`, and the same to shards."""
    for number in range(count):
        image = Image.fromarray(photograph(rng))
        # Two sizes, because a small source with images of one size is kept decoded in memory.
        image = image.transpose(Image.Transpose.ROTATE_90) if number % 2 else image
        name = f"class{number * 4 // count}/{number:06}.jpg"
        (root / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / "train" / name, quality=90)
        with tarfile.open(root / f"{number * SHARDS // count}.tar", "a") as shard:
            shard.add(root / "train" / name, name)


def opening(rounds: int, patience: float, shards: int, samples: int) -> list[Row]:
    """Measure the opening of a source of many samples from its index."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for shard in range(shards):
            with (root / f"{shard:05}.tar").open("wb") as file:
                file.truncate(samples * 2048)

        def made_up(file: IO[bytes], _: Any) -> dict[str, np.ndarray]:
            return index_of(int(Path(file.name).stem), samples)

        def opened() -> Any:
            return open_source(f"tar:{{00000..{shards - 1:05}}}.tar", root)

        with mock.patch.dict(os.environ, {"COURSEPACK_CACHE": str(root / "cache")}):
            with mock.patch.object(tar_index, "index_shard", made_up):
                opened()
            size = sum(path.stat().st_size for path in (root / "cache").glob("*.npy"))
            config = {"samples": shards * samples, "shards": shards}
            before = anonymous_bytes()
            source = opened()
            after = anonymous_bytes()
            rows = [
                exact("index on disk", size / shards / samples, "bytes per sample", config),
                exact("anonymous memory of the opened source", (after - before) / 1e6, "MB", config),
                exact("pickle for a worker process", len(pickle.dumps(source)) / 1e3, "kB", config),
            ]

            def rows_of(seconds: Seconds) -> list[Row]:
                return [
                    row("open a large source from its index", seconds["open"], "s", config, "<= 5.0"),
                    *rows,
                ]

            return measure({"open": opened}, rounds, rows_of, patience=patience)


def index_of(shard: int, count: int) -> dict[str, np.ndarray]:
    """Return the index of a shard of made-up images of 1 kB."""
    rng = np.random.default_rng(shard)
    return {
        "offset": np.arange(count, dtype=np.int64) * 2048 + 512,
        "length": np.full(count, 1024, np.uint32),
        "size": rng.integers(200, 600, (count, 2), dtype=np.int32),
        "header": rng.integers(0, 1 << 32, count, dtype=np.uint32),
        "key": np.arange(shard * count, (shard + 1) * count, dtype=np.uint64),
        "names": np.array(str(shard)),
        "class": rng.integers(0, CLASSES, count, dtype=np.int32),
        "classes": np.array([str(label) for label in range(CLASSES)]),
        "kind": np.array("cls"),
        "damaged": np.zeros(0, np.int64),
        "damaged_names": np.zeros(0, np.str_),
        "damage": np.zeros(0, np.str_),
    }


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    rounds, patience = (2, 0.0) if options.quick else (15, PATIENCE)
    with Threads(1):
        rows = reading(min(9, rounds), patience, 32 if options.quick else 512, workers=2)
        rows += opening(rounds, patience, *((4, 50) if options.quick else (1300, 10_000)))
    report("sources", rows, options.json)


if __name__ == "__main__":
    main()
