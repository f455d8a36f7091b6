"""FKD's soft labels (Shen and Xing 2022): one file per image with the crops, flips and labels of its views.

A file `CLASS/NAME.tar` is written by `torch.save` and holds three arrays: coordinates `(V, 4)` (top, left,
height, width, as shares of the image's sides), flips `(V,)`, and labels in one of several forms. Nothing but
arrays is unpickled.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import pickle
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coursepack.console import progress
from coursepack.data import ViewRecipe
from coursepack.data.views.recorded import ParametersDigest, Recorded, rows_of_crops
from coursepack.errors import CacheError, UnknownName
from coursepack.precompute.caches.base import REPLAYED, CacheOptions
from coursepack.precompute.caches.sparse import LEAST, check_ids, check_probs, logits_of_probs, spread_probs

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIX = ".tar"
CHUNK = 512
"""Number of files that are read together while the cache is checked."""
HALF_IDS = 2049
"""Maximum number of classes whose ids float16 represents."""
OUTSIDE = 2.0**-8
"""Share of a side by which a rounded crop may exceed the image."""
DENSE = "ori"
LABEL_TYPES = ("hard", "smoothing", "marginal_smoothing_kK", "marginal_renorm_kK", DENSE)
UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, TypeError, OSError)
"""Errors of `torch.load` for damaged files and for files that hold other objects."""
_DTYPES = ("float16", "float32", "float64", "int64", "int32", "uint8", "bool")


@dataclass(frozen=True)
class LabelType:
    """Form of FKD's labels."""

    name: str
    k: int
    """Number of classes with a probability of their own; 0 if all have."""
    spread: bool
    """True if the missing mass is divided among the other classes."""

    def shape(self, classes: int) -> tuple[int, ...]:
        """Return the shape of one view's label."""
        marginal = (2, self.k) if self.name.startswith("marginal") else (2,)
        return {"hard": (), DENSE: (classes,)}.get(self.name, marginal)

    def encoding(self) -> str:
        """Return the encoding that keeps these labels: top-k with one more entry, for the sample's class."""
        return f"topk16:{self.k + 1}" if self.k else "float16"

    def check(self, labels: NDArray[Any], classes: int, where: str) -> None:
        """Check labels `(n, ...)`.

        Raises:
            CacheError: an id is not a class, or a value is not a probability.
        """
        if self.k:
            ids, probs = self._parts(labels)
            check_ids(ids, classes, where)
            check_probs(probs, where, whole=False)
        else:
            check_probs(labels, where, whole=True)

    def probs(self, labels: NDArray[Any], classes: int) -> NDArray[np.float32]:
        """Return probabilities `(n, C)` of labels `(n, ...)`."""
        if not self.k:
            return labels.astype(np.float32)
        ids, probs = self._parts(labels)
        if self.name.startswith("marginal_renorm"):
            probs = probs / np.maximum(probs.sum(1, keepdims=True), LEAST)
        return spread_probs(ids.astype(np.int64), probs, classes, spread=self.spread)

    def _parts(self, labels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """Return class ids and probabilities, `(n, k)` each."""
        parts = labels.reshape(len(labels), -1)
        ids = parts[:, : self.k]
        is_hard = self.name == "hard"
        return ids, np.ones(ids.shape, np.float32) if is_hard else parts[:, self.k :].astype(np.float32)


def parse_label_type(name: str) -> LabelType:
    """Return the form of labels by the name that FKD gives it.

    Raises:
        UnknownName: there is no such form.
    """
    marginal = re.fullmatch(r"marginal_(smoothing|renorm)_k([1-9][0-9]{0,3})", name)
    if marginal is not None:
        return LabelType(name, int(marginal[2]), marginal[1] == "smoothing")
    if name not in ("hard", "smoothing", DENSE):
        raise UnknownName("label type of FKD", name, LABEL_TYPES)
    return LabelType(name, 0 if name == DENSE else 1, name == "smoothing")


@dataclass(frozen=True)
class _Files:
    """Content of the files of consecutive samples."""

    rows: NDArray[np.int32]
    """View parameters `(n, V, 5)`."""
    labels: NDArray[Any]
    """Labels `(n, V, ...)`."""


@dataclass(frozen=True)
class _Rows:
    cache: FkdCache
    files: _Files
    view: int

    @property
    def params(self) -> NDArray[np.int32]:
        return self.files.rows[:, self.view]

    def logits(self, rows: slice) -> NDArray[np.float32]:
        return self.cache.logits(self.files.labels[rows, self.view])


class FkdCache:
    """FKD's files of all images of a source."""

    by_sample = True

    def __init__(self, options: CacheOptions) -> None:
        """Find the file of every sample, and read and check all of them.

        Raises:
            CacheError: files are missing or damaged, or do not fit the source.
        """
        self._options, self._type = options, parse_label_type(options.label_type)
        self._paths = _paths(options)
        first = self._read(0)
        self.views = len(first[1])
        self.sample_bytes = first[0].nbytes + first[1].nbytes + first[2].nbytes
        self.encoding = self._type.encoding()
        self._held: tuple[tuple[int, int], _Files] | None = None
        parameters, self.digest = self._check()
        self.recipe = ViewRecipe(ops=(Recorded(parameters=parameters),))
        self.facts: dict[str, Any] = {
            "format": "fkd",
            "views": REPLAYED,
            "labels": options.label_type,
            "temperature": options.temperature,
        }

    def load(self, view: int, start: int, stop: int) -> _Rows:
        """Return the answers of a view for the samples `start` to `stop`, whose files are read once."""
        if self._held is None or self._held[0] != (start, stop):
            self._held = ((start, stop), self._files(start, stop))
        return _Rows(self, self._held[1], view)

    def logits(self, labels: NDArray[Any]) -> NDArray[np.float32]:
        """Return the logits `(n, C)` of labels `(n, ...)`."""
        probs = self._type.probs(labels, self._options.classes)
        return logits_of_probs(probs, self._options.temperature)

    def _check(self) -> tuple[str, str]:
        """Check all files; returns the digests of their view parameters and of their labels."""
        parameters, answers = ParametersDigest(self.views), hashlib.sha256()
        with progress(f"read {self._options.path.name}", self._options.samples, "files") as meter:
            for start in range(0, self._options.samples, CHUNK):
                files = self._files(start, min(start + CHUNK, self._options.samples))
                for view in range(self.views):
                    parameters.add(view, files.rows[:, view])
                answers.update(np.ascontiguousarray(files.labels, dtype="<f4").tobytes())
                meter.advance(len(files.rows))
        return parameters.hexdigest(), answers.hexdigest()

    def _files(self, start: int, stop: int) -> _Files:
        sides = self._options.source.sizes(np.arange(start, stop))
        rows, labels = [], []
        for sample in range(start, stop):
            coords, flips, label = self._read(sample)
            where = repr(str(self._paths[sample]))
            if len(label) != self.views:
                raise CacheError(
                    f"{where} holds {len(label)} views, expected {self.views} as in {str(self._paths[0])!r}"
                )
            rows.append(_crops(coords, flips, sides[sample - start], where))
            self._type.check(label, self._options.classes, where)
            labels.append(label)
        return _Files(np.stack(rows), np.stack(labels))

    def _read(self, sample: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Return coordinates `(V, 4)`, flips `(V,)` and labels `(V, ...)` of one file."""
        path = self._paths[sample]
        coords, flips, labels = _arrays(path)
        views, label_shape = len(labels) if labels.ndim else 0, self._type.shape(self._options.classes)
        shapes = (coords.shape, flips.shape, labels.shape)
        if not views or shapes != ((views, 4), (views,), (views, *label_shape)):
            label = ", ".join(map(str, ("V", *label_shape)))
            raise CacheError(
                f"{str(path)!r} holds arrays of the shapes {', '.join(map(str, shapes))}, expected "
                "coordinates "
                f"(V, 4), flips (V,) and labels ({label}) of the type {self._type.name} with "
                f"{self._options.classes:,} classes: check --label-type, one of {', '.join(LABEL_TYPES)}"
            )
        if labels.dtype == np.float16 and self._type.k and self._options.classes > HALF_IDS:
            raise CacheError(
                f"{str(path)!r} holds class ids in float16, which has no ids above {HALF_IDS - 1}, but the "
                "source "
                f"has {self._options.classes:,} classes: write the cache without --use_fp16"
            )
        return coords, flips, labels


def open_fkd(options: CacheOptions) -> FkdCache:
    """Open FKD's files and check all of them.

    Raises:
        CacheError: files are missing or damaged, or do not fit the source.
        UnknownName: there is no such type of labels.
    """
    if options.view is not None:
        raise CacheError("FKD's files record the crops and flips of their views: leave --view out")
    return FkdCache(options)


def _paths(options: CacheOptions) -> list[Path]:
    """Return the file of each sample: that of its class folder and its name up to the first dot."""
    if not options.path.is_dir():
        raise CacheError(f"there is no folder of FKD's files at {str(options.path)!r}")
    found: dict[tuple[str, str], list[Path]] = {}
    for folder, _, names in os.walk(options.path):
        for name in names:
            if name.endswith(SUFFIX):
                found.setdefault((Path(folder).name, name.partition(".")[0]), []).append(Path(folder, name))
    paths, missing, seen = [], [], dict[tuple[str, str], int]()
    for sample in range(options.samples):
        image = options.source.path(sample)
        if image is None:
            raise CacheError(
                f"source {options.source.name!r} has no image files, by whose names FKD's files are found: "
                "give the "
                "source of image files, such as folder, that the cache was made from"
            )
        key = (Path(image).parent.name, Path(image).name.partition(".")[0])
        files = found.get(key, [])
        if len(files) > 1 or key in seen:
            others = list(map(str, files[:2])) if len(files) > 1 else [options.source.path(seen[key]), image]
            raise CacheError(
                f"{others[0]!r} and {others[1]!r} have one class and name up to the first dot, so it is not "
                "known "
                "which file belongs to which image: import one of FKD's folders at a time"
            )
        seen[key] = sample
        paths += files
        missing += [] if files else [f"{'/'.join(key)}{SUFFIX}"]
    if missing:
        raise CacheError(
            f"{str(options.path)!r} has no file for {len(missing):,} of {options.samples:,} images of source "
            f"{options.source.name!r}, such as {', '.join(missing[:3])}: write the missing files with FKD's "
            "generate_soft_label.py, or give the split that the cache was made from"
        )
    return paths


def _safe_globals() -> list[Any]:
    """Return the functions and types that arrays of numbers are pickled with."""
    from numpy._core.multiarray import _reconstruct

    return [
        *((_reconstruct, f"{module}.multiarray._reconstruct") for module in ("numpy._core", "numpy.core")),
        np.ndarray,
        np.dtype,
        codecs.encode,
        *(type(np.dtype(name)) for name in _DTYPES),
    ]


def _arrays(path: Path) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_safe_globals()):
            warnings.filterwarnings("ignore", message=".*TorchScript")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = "it holds objects other than arrays" if "weights_only" in str(error) else "it is damaged"
        raise CacheError(
            f"{str(path)!r} cannot be read as a file of FKD: {reason}. Expected three arrays written by "
            "torch.save"
        ) from error
    kinds = (np.ndarray, torch.Tensor)
    if (
        not isinstance(content, (list, tuple))
        or len(content) != 3
        or not all(isinstance(part, kinds) for part in content)
    ):
        raise CacheError(
            f"{str(path)!r} holds {type(content).__name__}, expected three arrays: coordinates, flips and "
            "labels"
        )
    coords, flips, labels = (np.asarray(part) for part in content)
    if any(str(part.dtype) not in _DTYPES for part in (coords, flips, labels)):
        dtypes = ", ".join(str(part.dtype) for part in (coords, flips, labels))
        raise CacheError(f"{str(path)!r} holds arrays of the dtypes {dtypes}, expected numbers")
    return coords, flips, labels


def _crops(
    coords: NDArray[Any], flips: NDArray[Any], sides: NDArray[np.int32], where: str
) -> NDArray[np.int32]:
    """Return view parameters `(V, 5)`: edges are rounded to whole pixels, as Pillow's crop does."""
    shares = coords.astype(np.float64)
    with np.errstate(invalid="ignore"):
        inside = (shares >= 0) & (shares <= 1)
        inside[:, 2:] &= shares[:, :2] + shares[:, 2:] <= 1 + OUTSIDE
    if not inside.all():
        view = int(np.flatnonzero(~inside.all(1))[0])
        raise CacheError(
            f"{where}: view {view} has the crop {shares[view].tolist()}, expected top, left, height and "
            "width as "
            "shares of the image's sides"
        )
    if not np.isin(flips, (0, 1)).all():
        raise CacheError(f"{where}: the flips hold {flips.max()}, expected 0 and 1")
    corner, extent = shares[:, :2] * sides, shares[:, 2:] * sides
    start, stop = np.rint(corner).astype(np.int64), np.rint(corner + extent).astype(np.int64)
    if (stop <= start).any():
        view = int(np.flatnonzero((stop <= start).any(1))[0])
        raise CacheError(
            f"{where}: the crop of view {view} is empty in an image of {sides[0]} x {sides[1]} pixels"
        )
    return rows_of_crops(start, stop, sides[None], flips.astype(bool))
