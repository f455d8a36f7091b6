"""A store of format version 1, written once and for all: every later release has to read it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from coursepack.data.store import StoreReader, load_manifest, verify
from coursepack.data.store.zarr_metadata import zarr_metadata

GOLDEN = Path(__file__).parent / "golden"
STORE = GOLDEN / "version-1.zarr"
VALUES = json.loads((GOLDEN / "version-1.json").read_text())
ARRAYS = {"logits": ("q", "affine"), "features/hidden@sign": ("bits",)}


@pytest.mark.parametrize("reading", ["resident", "mapped", "windowed"])
def test_the_golden_store_reads_as_it_was_written(reading):
    reader = StoreReader(STORE, reading)
    assert reader.views == (0, 1)
    assert reader.labels().tolist() == VALUES["labels"]
    assert reader.static("head_bias").tolist() == VALUES["static"]["head_bias"]
    for name, components in ARRAYS.items():
        for view in (0, 1):
            found = reader.components(name, view, np.arange(20))
            assert set(found) == set(components)
            assert {part: rows.tolist() for part, rows in found.items()} == VALUES[name][view]
    for view in (0, 1):
        decoded = reader.rows("logits", view, np.arange(20)).decode().numpy()
        assert decoded.tolist() == VALUES["decoded logits"][view]
    signs = reader.rows("features/hidden@sign", 1, np.arange(20)).decode().numpy()
    packed = np.packbits(signs.reshape(20, -1) > 0, axis=1)
    assert packed.tolist() == VALUES["features/hidden@sign"][1]["bits"]


def test_zarr_reads_the_same():
    group = zarr.open_group(STORE, mode="r")
    for name, components in ARRAYS.items():
        for component in components:
            for view in (0, 1):
                assert group[name][component][view].tolist() == VALUES[name][view][component]
    assert group["labels"][:].tolist() == VALUES["labels"]
    assert group["static/head_bias"][:].tolist() == VALUES["static"]["head_bias"]


def test_the_golden_store_is_sound_and_spelled_as_this_release_spells_it():
    assert verify(STORE).problems == ()
    manifest = load_manifest(STORE)
    assert manifest.to_json() == (STORE / "manifest.json").read_text()
    for key, metadata in zarr_metadata(manifest).items():
        assert json.loads((STORE / key).read_text()) == metadata


def test_a_changed_value_would_be_noticed(tmp_path):
    shutil.copytree(STORE, tmp_path / "s.zarr")
    file = tmp_path / "s.zarr/logits/q/c.0.0.0"
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    assert [problem.key for problem in verify(tmp_path / "s.zarr").problems] == ["logits/q/c.0.0.0"]
