"""Image folders of digits, and caches in the formats of other programs, written from their description."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from click.testing import CliRunner
from image_files import save_image

from coursepack.data import open_source
from coursepack.precompute.cli import main as precompute

if TYPE_CHECKING:
    from pathlib import Path

CLASSES = 10


def write_digits(root: Path, train: int = 4, val: int = 2) -> Path:
    """PNG files of digits: some images of each class in `train` and `val`."""
    for split, spec, count in (("train", "digits:train", train), ("val", "digits:test", val)):
        source = open_source(spec)
        for label in range(CLASSES):
            for sample in np.flatnonzero(source.labels == label)[:count]:
                save_image(root / split / f"c{label}" / f"{sample:04d}.x.png", source.images[sample, :, :, 0])
    return root


def random_probs(rows: int, seed: int = 0, classes: int = CLASSES) -> np.ndarray:
    """Sharp probabilities `(rows, C)`."""
    logits = np.random.default_rng(seed).normal(0, 3, (rows, classes))
    return torch.softmax(torch.from_numpy(logits), 1).numpy().astype(np.float32)


def right_probs(labels: np.ndarray, seed: int = 0, classes: int = CLASSES) -> np.ndarray:
    """Probabilities `(N, C)` whose largest is the label's."""
    probs = random_probs(len(labels), seed, classes)
    order = np.argsort(-probs, axis=1)
    first, wanted = order[:, 0].copy(), probs[np.arange(len(labels)), labels].copy()
    probs[np.arange(len(labels)), labels] = probs.max(1)
    swapped = first != labels
    probs[np.flatnonzero(swapped), first[swapped]] = wanted[swapped]
    return probs


def top(probs: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Class ids and values `(N, k)` of the largest probabilities, in descending order."""
    ids = np.argsort(-probs, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(probs, ids, axis=1)


def smoothed(ids: np.ndarray, probs: np.ndarray, classes: int = CLASSES) -> np.ndarray:
    """The published recovery: the missing mass is divided among the other classes, `(N, C)` float64."""
    k = ids.shape[1]
    rest = (1 - probs.astype(np.float64).sum(1)) / (classes - k)
    dense = np.tile(rest[:, None], (1, classes))
    for row in range(len(ids)):
        dense[row, ids[row]] = probs[row]
    return dense


def call(*words, status=0):
    """Output of a subcommand of `precompute`; of a refused one, its only line of errors."""
    result = CliRunner().invoke(precompute, [str(word) for word in words])
    assert result.exit_code == status, result.output
    if status:
        assert result.stdout == ""
        return next(line for line in result.stderr.splitlines() if line.startswith(("Error", "Usage")))
    return result.stdout


def softmax_of(reader, view: int, temperature: float = 1.0) -> np.ndarray:
    """Probabilities `(N, C)` that a store's logits give at a temperature."""
    samples = np.arange(reader.manifest.samples)
    temperatures = torch.full((len(samples),), temperature)
    return torch.softmax(reader.rows("logits", view, samples).decode(temperatures) / temperature, 1).numpy()
