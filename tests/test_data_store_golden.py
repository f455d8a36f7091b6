"""Stores of every format version, written once and for all: every later release has to read them."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from helpers import store_files, write_rows

from coursepack.data.store import StoreReader, load_manifest, verify
from coursepack.data.store.contents import list_key
from coursepack.data.store.zarr_metadata import zarr_metadata

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
from write import ROWS  # noqa: E402 - a script beside the stores that it made

STORES = {version: GOLDEN / f"version-{version}.zarr" for version in (1, 2)}
VALUES = json.loads((GOLDEN / "version-1.json").read_text())
ARRAYS = {"logits": ("q", "affine"), "features/hidden@sign": ("bits",)}


@pytest.fixture(params=STORES)
def store(request):
    return STORES[request.param]


@pytest.mark.parametrize("reading", ["resident", "mapped", "windowed"])
def test_the_golden_store_reads_as_it_was_written(store, reading):
    reader = StoreReader(store, reading)
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


def test_zarr_reads_the_same(store):
    group = zarr.open_group(store, mode="r")
    for name, components in ARRAYS.items():
        for component in components:
            for view in (0, 1):
                assert group[name][component][view].tolist() == VALUES[name][view][component]
    assert group["labels"][:].tolist() == VALUES["labels"]
    assert group["static/head_bias"][:].tolist() == VALUES["static"]["head_bias"]


def test_the_golden_store_is_sound_and_spelled_as_this_release_spells_it(store):
    assert verify(store).problems == ()
    manifest = load_manifest(store)
    assert manifest.to_json() == (store / "manifest.json").read_text()
    for view, digest in manifest.list_digests.items():
        assert manifest.entries[view].to_bytes() == (store / list_key(view, digest)).read_bytes()
    for key, metadata in zarr_metadata(manifest).items():
        assert json.loads((store / key).read_text()) == metadata


@pytest.mark.parametrize("version", STORES)
def test_this_release_writes_the_data_and_metadata_of_every_version(tmp_path, version):
    path = tmp_path / "s.zarr"
    write_rows(path, replace(ROWS, format_version=version, views=1))
    write_rows(path, replace(ROWS, views=2))
    written, golden = store_files(path), store_files(STORES[version])
    # What manifests record has grown since, and some of it depends on the machine.
    for key in [key for key in golden if key == "manifest.json" or key.startswith("views/")]:
        del golden[key]
    assert {key: written[key] for key in golden} == golden
    assert load_manifest(path).format_version == version


def test_a_golden_store_is_extended(tmp_path, store):
    path, before = tmp_path / "s.zarr", store_files(store)
    shutil.copytree(store, path)
    write_rows(path, replace(ROWS, views=3))
    assert StoreReader(path).views == (0, 1, 2)
    assert verify(path).problems == ()
    assert load_manifest(path).format_version == load_manifest(store).format_version
    after = store_files(path)
    assert all(after[key] == data for key, data in before.items() if "/c." in key)


def test_a_changed_value_would_be_noticed(tmp_path, store):
    shutil.copytree(store, tmp_path / "s.zarr")
    file = tmp_path / "s.zarr/logits/q/c.0.0.0"
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    assert [problem.key for problem in verify(tmp_path / "s.zarr").problems] == ["logits/q/c.0.0.0"]
