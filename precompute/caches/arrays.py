"""Arrays of logits or probabilities `(N, C)` or `(V, N, C)` in .npy, .npz or .safetensors files."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from safetensors import SafetensorError, safe_open

from coursepack.console import progress
from coursepack.data import view_fingerprint
from coursepack.errors import CacheError
from coursepack.precompute.caches.base import EXPORTED, FIXED, CacheOptions, given_view
from coursepack.precompute.caches.sparse import check_probs, logits_of_probs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from coursepack.data import ViewRecipe

ROWS_AT_A_TIME = 8192
KNOWN = ("float16", "float32", "float64", "bfloat16")
SAFETENSORS = {"F16": "float16", "F32": "float32", "F64": "float64", "BF16": "bfloat16"}
"""Names of dtypes by their names in safetensors files."""


@dataclass(frozen=True)
class _Array:
    """One array of a file, read in parts."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[tuple[slice | int, ...]], NDArray[Any]]


@dataclass(frozen=True)
class _Rows:
    read: Callable[[slice], NDArray[np.float32]]
    start: int
    params: None = None

    def logits(self, rows: slice) -> NDArray[np.float32]:
        return self.read(slice(self.start + rows.start, self.start + rows.stop))


@dataclass
class ArrayCache:
    """Arrays of logits or probabilities."""

    values: _Array
    options: CacheOptions
    recipe: ViewRecipe
    facts: dict[str, Any]
    views: int
    digest: str = ""
    by_sample: bool = False
    sample_bytes: int = 0
    encoding: str = "float16"

    def load(self, view: int, start: int, stop: int) -> _Rows:
        """Return the answers of a view for the samples `start` to `stop`."""
        return _Rows(partial(self.logits, view), start)

    def logits(self, view: int, samples: slice) -> NDArray[np.float32]:
        """Return the logits `(n, C)` of some samples in one view."""
        values = self.raw(view, samples)
        return logits_of_probs(values, self.options.temperature) if self.is_probs else values

    @property
    def is_probs(self) -> bool:
        """True if the array holds probabilities."""
        return self.options.values == "probs"

    def raw(self, view: int, samples: slice) -> NDArray[np.float32]:
        """Return values `(n, C)` as they are in the file."""
        index = (samples,) if len(self.values.shape) == 2 else (view, samples)
        return np.array(self.values.read(index), dtype=np.float32, order="C")


def open_arrays(options: CacheOptions) -> ArrayCache:
    """Open arrays and check all rows.

    Raises:
        CacheError: the file is damaged, or an array does not fit the source.
        RecipeError: the view is not given, or is drawn at random and not the one that the file names.
    """
    arrays, metadata = _read(options.path)
    values = _chosen(arrays, options)
    _check_shape(values, options)
    if "labels" in arrays:
        _check_labels(arrays["labels"], options)
    is_exported = options.view is not None and metadata.get("view_fingerprint") == view_fingerprint(
        options.view, options.source
    )
    recipe = options.view if is_exported else None
    if recipe is None:
        other = "Answers to random views can be stored by `precompute run`, or imported from a file that "
        recipe = given_view(options, other + "`precompute export` wrote, with the --view of its store")
    facts: dict[str, Any] = {
        "format": "numpy",
        "views": EXPORTED if is_exported else FIXED,
        "values": options.values,
    }
    if options.values == "probs":
        facts["temperature"] = options.temperature
    views = 1 if len(values.shape) == 2 else values.shape[0]
    cache = ArrayCache(values, options, recipe, facts, views)
    cache.digest = _checked_digest(cache)
    return cache


def _read(path: Path) -> tuple[dict[str, _Array], Mapping[str, str]]:
    """Return the arrays of a file by name, and the metadata of a safetensors file."""
    if path.suffix not in (".npy", ".npz", ".safetensors"):
        raise CacheError(f"{str(path)!r} ends in {path.suffix!r}, expected .npy, .npz or .safetensors")
    if not path.is_file():
        raise CacheError(f"there is no file at {str(path)!r}")
    loaded: dict[str, NDArray[Any]]
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if path.suffix == ".npy":
            loaded = {path.stem: np.lib.format.open_memmap(path, mode="r")}
        else:
            with path.open("rb") as opened, NpzFile(opened, allow_pickle=False) as file:
                loaded = {name: file[name] for name in file.files}
    except (SafetensorError, ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise CacheError(
            f"{str(path)!r} cannot be read: {error}. Expected arrays, without pickles"
        ) from error
    return {
        name: _Array(name, array.shape, str(array.dtype), array.__getitem__) for name, array in loaded.items()
    }, {}


def _read_safetensors(path: Path) -> tuple[dict[str, _Array], Mapping[str, str]]:
    file: Any = safe_open(path, framework="pt")
    found = {}
    for name in file.keys():  # noqa: SIM118 - not a mapping: it cannot be iterated over
        part = file.get_slice(name)

        def read(index: tuple[slice | int, ...], part: Any = part) -> NDArray[Any]:
            tensor = part[index]
            array: NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
            return array

        dtype = SAFETENSORS.get(part.get_dtype(), part.get_dtype())
        found[name] = _Array(name, tuple(part.get_shape()), dtype, read)
    return found, file.metadata() or {}


def _chosen(arrays: Mapping[str, _Array], options: CacheOptions) -> _Array:
    names = [name for name in arrays if name != "labels"]
    name = options.array or ("logits" if "logits" in arrays else names[0] if len(names) == 1 else None)
    if name is None or name not in arrays:
        problem = f"has no array {name!r}" if name else f"has {len(names)} arrays"
        raise CacheError(
            f"{str(options.path)!r} {problem}: give --array with one of {', '.join(arrays) or 'none'}"
        )
    return arrays[name]


def _check_shape(values: _Array, options: CacheOptions) -> None:
    where = f"array {values.name!r} of {str(options.path)!r}"
    if values.dtype not in KNOWN:
        raise CacheError(f"{where} has dtype {values.dtype}, expected one of {', '.join(KNOWN)}")
    shape, expected = values.shape, (options.samples, options.classes)
    if len(shape) not in (2, 3) or shape[0] == 0 or shape[-2:] != expected:
        counts = f"({expected[0]}, {expected[1]})"
        raise CacheError(
            f"{where} has shape {shape}, expected {counts}, or (V, {expected[0]}, {expected[1]}): a row for "
            f"each of the {expected[0]:,} samples of source {options.source.name!r} in their order, with "
            f"{expected[1]:,} classes"
        )


def _check_labels(labels: _Array, options: CacheOptions) -> None:
    expected = options.source.labels
    if labels.shape != expected.shape:
        raise CacheError(
            f"array 'labels' of {str(options.path)!r} has shape {labels.shape}, expected {expected.shape}"
        )
    others = np.flatnonzero(labels.read((slice(None),)) != expected)
    if len(others):
        raise CacheError(
            f"array 'labels' of {str(options.path)!r} differs from the labels of source "
            f"{options.source.name!r} "
            f"for {len(others):,} of {len(expected):,} samples, first for {others[:5].tolist()}: the rows "
            "are in "
            "another order, or of another split"
        )


def _checked_digest(cache: ArrayCache) -> str:
    """Check all rows, and return the sha256 over them."""
    where, digest = f"array {cache.values.name!r} of {str(cache.options.path)!r}", hashlib.sha256()
    digest.update(json.dumps(list(cache.values.shape)).encode())
    samples = cache.options.samples
    with progress(f"read {cache.options.path.name}", cache.views * samples, "rows") as meter:
        for view in range(cache.views):
            for start in range(0, samples, ROWS_AT_A_TIME):
                rows = cache.raw(view, slice(start, min(start + ROWS_AT_A_TIME, samples)))
                _check_rows(rows, cache, f"{where}, view {view}, from sample {start}")
                digest.update(rows.astype("<f4", copy=False).tobytes())
                meter.advance(len(rows))
    return digest.hexdigest()


def _check_rows(rows: NDArray[np.float32], cache: ArrayCache, where: str) -> None:
    finite = np.isfinite(rows).all(1)
    if not finite.all():
        bad = np.flatnonzero(~finite)
        raise CacheError(
            f"{where}: {len(bad):,} rows have NaN or infinity, first row {bad[0]}: write them again"
        )
    if cache.is_probs:
        check_probs(rows, where, whole=True)
    elif rows.shape[1] > 1 and (rows >= 0).all() and (np.abs(rows.sum(1) - 1) < 1e-3).all():
        raise CacheError(
            f"{where}: the rows are not negative and sum to 1, so they are probabilities, expected logits: "
            "give "
            "--values probs"
        )
