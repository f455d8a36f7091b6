"""Rows of several stores read in one call equal those that each store reads, and are refused alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import RowStore, write_rows

from coursepack.data.store import StoreReader, read_together
from coursepack.errors import StoreDamaged, StoreIncomplete, UnknownName

SHAPES = {"logits": (10,), "features/stem": (7, 30)}
SAMPLES = 3000  # rows enough for two threads
ENCODINGS = ("float32", "float16", "bfloat16", "int8", "int4", "topk:3", "topk16:3")


def rows_in(encoding, seed=0):
    shapes = SHAPES if "k" not in encoding and encoding != "int4" else {"logits": (10,)}
    return RowStore(samples=SAMPLES, block_rows=1024, encoding=encoding, shapes=shapes, seed=seed)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A store of every encoding."""
    folder = tmp_path_factory.mktemp("together")
    for seed, name in enumerate(ENCODINGS):
        write_rows(folder / f"{seed}.zarr", rows_in(name, seed))
    return [folder / f"{seed}.zarr" for seed in range(len(ENCODINGS))]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("reading", ["mapped", "resident", "windowed"])
def test_all_arrays_of_all_stores(stores, reading, threads):
    readers = [StoreReader(path, reading) for path in stores]
    wanted = [(reader, array) for reader in readers for array in reader.manifest.arrays]
    samples = np.random.default_rng(0).integers(0, SAMPLES, 2000)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for view in (0, 1, np.arange(2000) % 2):
            found = read_together(wanted, view, samples)
            assert len(found) == len(wanted) > len(readers)
            for (reader, array), rows in zip(wanted, found, strict=True):
                seed = readers.index(reader)
                whole = [rows_in(ENCODINGS[seed], seed).decoded(array, each) for each in (0, 1)]
                expected = np.where(np.reshape(view, (-1,) + (1,) * len(SHAPES[array])) == 0, *(
                    each[samples] for each in whole
                ))  # fmt: skip
                assert np.array_equal(rows.decode().numpy(), expected)
    finally:
        torch.set_num_threads(before)


def test_refusals_are_those_of_a_single_store(stores, tmp_path):
    first, other = (StoreReader(path) for path in stores[:2])
    samples = np.arange(5)
    with pytest.raises(UnknownName, match="logit"):
        read_together([(first, "logits"), (other, "logit")], 0, samples)
    with pytest.raises(StoreIncomplete, match=r"view 2 of 'logits' is not committed in store .*1\.zarr"):
        read_together([(other, "logits"), (first, "logits")], 2, samples)
    with pytest.raises(IndexError, match=f"sample {SAMPLES} was asked for, expected 0 to {SAMPLES - 1}"):
        read_together([(first, "logits"), (other, "logits")], 0, np.array([1, SAMPLES, -1]))
    write_rows(tmp_path / "bad.zarr", RowStore(samples=SAMPLES))
    shard = next(path for path in sorted((tmp_path / "bad.zarr").rglob("c.0.*")) if path.is_file())
    content = bytearray(shard.read_bytes())
    content[40] ^= 1
    shard.write_bytes(content)
    for reading in ("mapped", "resident", "windowed"):
        bad = StoreReader(tmp_path / "bad.zarr", reading)
        with pytest.raises(StoreDamaged, match=r"bad\.zarr.* does not match its checksum"):
            read_together([(first, "logits"), (bad, "logits")], 0, samples)
