"""TinyViT's sparse soft labels (Wu et al. 2022): per epoch, a seed and k probabilities for each image.

A folder `logits_topK_epochE` has, per rank R, `rankR-keys.txt` with one key per line and `rankR-values.bin`
with one record per key: seed int32, class ids int16 `(k,)`, probabilities float16 `(k,)`. A key is the index
of an image in the order of ImageFolder, or the name of its file without suffix.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coursepack.console import progress
from coursepack.data import ViewRecipe
from coursepack.data.views.recorded import ParametersDigest, Recorded
from coursepack.errors import CacheError, RecipeError
from coursepack.precompute.caches.base import FIXED, REPLAYED, CacheOptions, given_view
from coursepack.precompute.caches.replay import crops_of_seeds
from coursepack.precompute.caches.sparse import check_ids, check_probs, logits_of_probs, spread_probs

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK = 8192
"""Number of records that are checked together."""
_FOLDER = re.compile(r"logits_top([1-9][0-9]{0,4})_epoch([0-9]{1,6})")
_VALUES = re.compile(r"rank([0-9]{1,6})-values\.bin")
_SEEDS = (
    "Every record has a seed of TinyViT's own augmentations. Crops and flips are replayed from it with "
    "--replay-seeds; that is right only if nothing else was drawn: AUG.AUTO_AUGMENT none, AUG.COLOR_JITTER "
    "0, "
    "AUG.REPROB 0, AUG.MIXUP 0 and AUG.CUTMIX 0 in its config. RandAugment, erasing and mixing of TinyViT's "
    "default config cannot be replayed here, and such a cache cannot be imported"
)


@dataclass(frozen=True)
class _Rows:
    cache: TinyVitCache
    records: NDArray[Any]
    params: NDArray[np.int32] | None

    def logits(self, rows: slice) -> NDArray[np.float32]:
        return self.cache.logits(self.records[rows])


class TinyVitCache:
    """Records of all images of a source, in one or more epochs."""

    by_sample = False
    sample_bytes = 0

    def __init__(self, options: CacheOptions) -> None:
        """Find the epochs, and read and check all records.

        Raises:
            CacheError: files are missing or damaged, or do not fit the source.
            RecipeError: it is not said which view the cache was made for, or it cannot be replayed.
        """
        self._options = options
        self._k, self._epochs = _epochs(options.path)
        if self._k > options.classes:
            raise CacheError(
                f"{str(options.path)!r} holds {self._k} classes per record, but source "
                f"{options.source.name!r} has "
                f"{options.classes}"
            )
        self.views, self.encoding = len(self._epochs), f"topk16:{self._k + 1}"
        self._record = np.dtype([("seed", "<i4"), ("ids", "<i2", (self._k,)), ("probs", "<f2", (self._k,))])
        self._held: tuple[int, NDArray[Any]] | None = None
        replays = options.replay_seeds
        fixed = None if replays else given_view(options, _SEEDS)
        if replays and options.view is not None:
            raise RecipeError("--replay-seeds and --view are given: a view is replayed or fixed, give one")
        parameters, self.digest = self._check(replays=replays)
        self.recipe = fixed or ViewRecipe(ops=(Recorded(parameters=parameters),))
        self.facts: dict[str, Any] = {
            "format": "tinyvit",
            "views": REPLAYED if replays else FIXED,
            "epochs": [epoch for epoch, _ in self._epochs],
            "k": self._k,
            "temperature": options.temperature,
        }

    def load(self, view: int, start: int, stop: int) -> _Rows:
        """Return the answers of a view for the samples `start` to `stop`."""
        records = self._records(view)[start:stop]
        return _Rows(self, records, self._params(records, start) if self._options.replay_seeds else None)

    def logits(self, records: NDArray[Any]) -> NDArray[np.float32]:
        """Return the logits `(n, C)` of records `(n,)`."""
        ids, probs = records["ids"].astype(np.int64), records["probs"].astype(np.float32)
        dense = spread_probs(ids, probs, self._options.classes)
        return logits_of_probs(dense, self._options.temperature)

    def _check(self, *, replays: bool) -> tuple[str, str]:
        """Check all records; returns the digests of their view parameters and of the records."""
        parameters, answers = ParametersDigest(self.views), hashlib.sha256()
        samples = self._options.samples
        with progress(f"read {self._options.path.name}", self.views * samples, "records") as meter:
            for view, (_, folder) in enumerate(self._epochs):
                for start in range(0, samples, CHUNK):
                    records = self._records(view)[start : start + CHUNK]
                    where = f"{str(folder)!r}, from sample {start}"
                    check_ids(records["ids"], self._options.classes, where)
                    check_probs(records["probs"], where, whole=False)
                    if replays:
                        _check_seeds(records["seed"], where)
                        parameters.add(view, self._params(records, start))
                    answers.update(records.tobytes())
                    meter.advance(len(records))
        return parameters.hexdigest(), answers.hexdigest()

    def _params(self, records: NDArray[Any], start: int) -> NDArray[np.int32]:
        samples = np.arange(start, start + len(records))
        return crops_of_seeds(records["seed"], self._options.source.sizes(samples))

    def _records(self, view: int) -> NDArray[Any]:
        """Return the records `(N,)` of an epoch in the order of the samples."""
        if self._held is None or self._held[0] != view:
            self._held = (view, self._in_order(self._epochs[view][1]))
        return self._held[1]

    def _in_order(self, folder: Path) -> NDArray[Any]:
        names = sorted(path.name for path in folder.iterdir() if _VALUES.fullmatch(path.name))
        ranks = sorted(int(name[4:].partition("-")[0]) for name in names)
        if not ranks:
            raise CacheError(f"{str(folder)!r} has no rankR-values.bin")
        records = np.empty(self._options.samples, self._record)
        found = np.zeros(self._options.samples, bool)
        for rank in ranks:
            keys, values = self._read_rank(folder, rank)
            samples = self._samples_of(keys, folder / f"rank{rank}-keys.txt")
            # Of an image that padding gave to several ranks, the first record is taken, with its own seed.
            samples, first = np.unique(samples, return_index=True)
            new = ~found[samples]
            records[samples[new]] = values[first[new]]
            found[samples] = True
        if not found.all():
            missing = np.flatnonzero(~found)
            raise CacheError(
                f"{str(folder)!r} has no record for {len(missing):,} of {len(found):,} samples of source "
                f"{self._options.source.name!r}, first for {missing[:5].tolist()}: files of a rank are "
                "missing, or "
                "the cache was made from another split"
            )
        return records

    def _read_rank(self, folder: Path, rank: int) -> tuple[list[str], NDArray[Any]]:
        key_file, value_file = folder / f"rank{rank}-keys.txt", folder / f"rank{rank}-values.bin"
        if not key_file.is_file():
            raise CacheError(f"{str(key_file)!r} is missing: it names the records of {value_file.name}")
        try:
            lines = key_file.read_text(encoding="utf-8").split("\n")
            keys = [line.strip() for line in (lines if lines[-1] else lines[:-1])]
        except UnicodeDecodeError as error:
            raise CacheError(f"{str(key_file)!r} is damaged: it is no text") from error
        size, expected = value_file.stat().st_size, len(keys) * self._record.itemsize
        if size != expected:
            raise CacheError(
                f"{str(value_file)!r} has {size:,} bytes, expected {expected:,}: {len(keys):,} records of "
                f"{self._record.itemsize} bytes, with {self._k} classes each. It is truncated, or the "
                "folder's name "
                "has another number of classes than its records"
            )
        return keys, np.fromfile(value_file, self._record)

    def _samples_of(self, keys: list[str], key_file: Path) -> NDArray[np.int64]:
        """Return the sample of each key."""
        count = self._options.samples
        if all(key.isdecimal() and len(key) < 16 for key in keys):
            samples = np.array(keys, np.int64)
            wrong = np.flatnonzero(samples >= count)
        else:
            by_name = self._samples_by_name()
            samples = np.array([by_name.get(key, -1) for key in keys], np.int64)
            wrong = np.flatnonzero(samples < 0)
        if len(wrong):
            raise CacheError(
                f"{str(key_file)!r} has {len(wrong):,} keys that are no samples of source "
                f"{self._options.source.name!r}, such as {keys[wrong[0]]!r:.80}, expected indices 0 to "
                f"{count - 1} or "
                "names of its files: give the split that the cache was made from"
            )
        return samples

    def _samples_by_name(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for sample in range(self._options.samples):
            image = self._options.source.path(sample)
            if image is None:
                break
            stem = Path(image).stem
            found[stem] = -1 if stem in found else sample
        return found


def open_tinyvit(options: CacheOptions) -> TinyVitCache:
    """Open TinyViT's records and check all of them.

    Raises:
        CacheError: files are missing or damaged, or do not fit the source.
        RecipeError: it is not said which view the cache was made for, or it cannot be replayed.
    """
    return TinyVitCache(options)


def _check_seeds(seeds: NDArray[np.int32], where: str) -> None:
    if (seeds < 0).any():
        raise CacheError(f"{where}: a record has the seed {seeds.min()}, expected 0 to 2**31 - 1")


def _epochs(path: Path) -> tuple[int, list[tuple[int, Path]]]:
    """Return k, and number and folder of each epoch in ascending order."""
    if not path.is_dir():
        raise CacheError(f"there is no folder of TinyViT's records at {str(path)!r}")
    folders = [path] if _FOLDER.fullmatch(path.name) else sorted(path.iterdir())
    matches = [(match, folder) for folder in folders if (match := _FOLDER.fullmatch(folder.name))]
    if not matches:
        raise CacheError(
            f"{str(path)!r} has no folder logits_topK_epochE, as TinyViT's save_logits.py writes them"
        )
    widths = sorted({int(match[1]) for match, _ in matches})
    if len(widths) > 1:
        raise CacheError(
            f"{str(path)!r} has epochs with {' and '.join(map(str, widths))} classes per record, expected "
            "one number: "
            "import one logits_topK_epochE folder, or move the others away"
        )
    return widths[0], sorted((int(match[2]), folder) for match, folder in matches)
