"""Formats of other projects: the speed and size of reading them, and the logits that their rows mean."""

from __future__ import annotations

import itertools
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from _content import BATCH, LOGITS, Shuffle, write_store
from _harness import exact, measure, ratios, row

from coursepack.kernels import DenseRows

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from _harness import Row, Seconds


def peers(folder: Path, values: np.ndarray, rounds: int, patience: float) -> list[Row]:
    """Measure other projects' formats, written with the same content and read as their loaders do."""
    k, views = 10, 4
    rows, classes = values.shape
    probs = torch.softmax(torch.from_numpy(values), dim=1)
    top_probs, top_ids = probs.topk(k, dim=1)
    ids, halves = top_ids.numpy().astype(np.int16), top_probs.half().numpy()
    records = folder / "records.bin"
    with records.open("wb") as file:
        for sample in range(rows):
            file.write(struct.pack("<i", sample) + ids[sample].tobytes() + halves[sample].tobytes())
    record_bytes = 4 + 4 * k
    singles = folder / "singles"
    singles.mkdir()
    for sample in range(rows):
        torch.save([top_probs[sample].half(), top_ids[sample].to(torch.int16)], singles / f"{sample}.pt")
    images = folder / "images"
    images.mkdir()
    for image in range(rows // views):
        chosen = slice(image * views, (image + 1) * views)
        torch.save([top_probs[chosen].half(), top_ids[chosen].to(torch.int16)], images / f"{image}.pt")
    reader = write_store(folder / "peer-topk.zarr", values, encoding=f"topk:{k}")

    def seek(samples: np.ndarray) -> np.ndarray:
        with records.open("rb") as file:
            parts = []
            for sample in samples:
                file.seek(int(sample) * record_bytes)
                parts.append(file.read(record_bytes))
        return np.frombuffer(b"".join(parts), dtype=np.uint8).reshape(-1, record_bytes)

    def one_by_one(samples: np.ndarray) -> list[torch.Tensor]:
        return [torch.load(singles / f"{sample}.pt", weights_only=True)[0] for sample in samples]

    def by_image(samples: np.ndarray) -> list[torch.Tensor]:
        return [torch.load(images / f"{sample // views}.pt", weights_only=True)[0] for sample in samples]

    shuffle = Shuffle(rows, 1)
    variants: dict[str, Callable[[], None]] = {
        "ours": shuffle.each(lambda samples: reader.rows(LOGITS, 0, samples)),
        "records with a seek each (TinyViT)": shuffle.each(seek),
        "a file per sample": shuffle.each(one_by_one),
        "a file per image with its views (FKD)": shuffle.each(by_image),
    }
    sizes_on_disk = {
        "ours": sum(size for key, (size, _) in reader.manifest.files.items() if key.startswith(LOGITS)),
        "records with a seek each (TinyViT)": records.stat().st_size,
        "a file per sample": sum(path.stat().st_size for path in singles.iterdir()),
        "a file per image with its views (FKD)": sum(path.stat().st_size for path in images.iterdir()),
    }
    lit = litdata_reader(folder, halves, ids)
    if lit is not None:
        variants["litdata"], sizes_on_disk["litdata"] = shuffle.each(lit[0]), lit[1]
    config = {"rows": rows, "classes": classes, "k": k, "batch": BATCH}

    def rows_of(seconds: Seconds) -> list[Row]:
        result = []
        for name, values_ in seconds.items():
            result.append(row(f"{name}: batch", [1e6 * s for s in values_], "us", config))
            result.append(exact(f"{name}: bytes a view", sizes_on_disk[name] / rows, "bytes", config))
            if name != "ours":
                result.append(row(f"speed vs {name}", ratios(seconds, name, "ours"), "x", config, ">= 1.0"))
        return result

    return measure(variants, rounds, rows_of, patience=patience)


def litdata_reader(
    folder: Path, halves: np.ndarray, ids: np.ndarray
) -> tuple[Callable[[np.ndarray], Any], int] | None:
    """Return a reader of litdata's streaming dataset with the same content, if litdata is installed."""
    try:
        from litdata import StreamingDataset
        from litdata.streaming.writer import BinaryWriter
    except ImportError:
        return None
    target = folder / "litdata"
    target.mkdir()
    writer = BinaryWriter(str(target), chunk_bytes="64MB")
    for sample in range(len(halves)):
        writer[sample] = {"probs": halves[sample], "ids": ids[sample]}
    writer.done()
    writer.merge(1)
    dataset = StreamingDataset(str(target), shuffle=True)
    total = sum(path.stat().st_size for path in target.iterdir())
    # The intended use: its own shuffled order, one sample after another.
    endless = itertools.chain.from_iterable(iter(dataset) for _ in itertools.count())
    return lambda samples: [next(endless) for _ in samples], total


def top_probs_rows(values: np.ndarray, k: int) -> tuple[DenseRows, float]:
    """Return the logits of TinyViT's targets: float16 top-k probabilities, with the rest to 1 spread evenly.

    Source: Wu et al. 2022, arXiv 2207.10666, with the tail as in their training code. Also returns the share
    of rows where rounding leaves no probability for the tail. These rows use float16's smallest number,
    because KL without a tail would be infinite.
    """
    probs, ids = torch.softmax(torch.from_numpy(values), dim=1).topk(k, dim=1)
    probs = probs.half().float()
    left = 1 - probs.sum(1, keepdim=True)
    tail = left.clamp_min(2.0**-24) / (values.shape[1] - k)
    targets = tail.expand(values.shape).scatter(1, ids, probs.clamp_min(2.0**-24))
    return DenseRows(targets.log()), float((left <= 0).float().mean())


def renormalized_rows(values: np.ndarray, k: int) -> DenseRows:
    """Return the logits of FKD's marginal re-norm: float16 top-k probabilities, divided by their sum.

    Source: Shen and Xing 2022, arXiv 2112.01528, section 3.2. Its marginal smoothing is TinyViT's form. The
    other classes have no probability; they use float16's smallest number here.
    """
    probs, ids = torch.softmax(torch.from_numpy(values), dim=1).topk(k, dim=1)
    kept = (probs / probs.sum(1, keepdim=True)).half().float().clamp_min(2.0**-24)
    return DenseRows(torch.full(values.shape, 2.0**-24).scatter(1, ids, kept).log())


def digit_logits(epochs: int) -> tuple[np.ndarray, str, np.ndarray]:
    """Return a real teacher's logits of the test digits after a short training."""
    from epoch import DEVICE, recipe

    from coursepack.data import open_source
    from coursepack.data.batches import Batch
    from coursepack.distill.setup.prepare import prepare
    from coursepack.distill.training.loop import train_epoch
    from coursepack.distill.training.state import make_state

    run = prepare(recipe("supervised", [], student="digits-cnn", epochs=1), DEVICE)
    state = make_state(run)
    for epoch in range(epochs):
        train_epoch([state], run.batches(epoch), None)
    source = open_source("digits:test")
    samples = np.arange(len(source.labels))
    batch = Batch(source, run.recipe.view, samples, np.zeros_like(samples), DEVICE)
    state.learner.eval()
    with torch.inference_mode():
        answers = state.learner.logits(batch).float().cpu().numpy()
    return answers, "digits", source.labels
