"""`precompute import --format numpy` and `precompute export`, beside independent readers and writers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import CPU, make_recipe, write_store
from cached import call, random_probs, right_probs, softmax_of
from click.testing import CliRunner
from helpers import store_files
from safetensors.numpy import save_file
from safetensors.torch import load_file, safe_open

from coursepack.data import open_source, view_recipe
from coursepack.data.store import StoreReader
from coursepack.distill.cli import main as distill
from coursepack.distill.runs.train import train
from coursepack.distill.targets.stores import open_stores
from coursepack.errors import RecipeError
from coursepack.precompute.caches import FORMATS
from coursepack.precompute.caches.base import CacheOptions
from coursepack.precompute.caches.write import cache_plan, import_cache
from coursepack.precompute.cli import main as precompute

SOURCE = open_source("digits")
N = len(SOURCE.labels)
LOGITS = np.log(right_probs(SOURCE.labels)).astype(np.float32)
IMPORT = ("import", "--format", "numpy", "--source", "digits", "--view", "none")


@pytest.fixture
def files(tmp_path):
    """A function that writes arrays to a file by its suffix."""

    def write(name, **arrays):
        path = tmp_path / name
        if path.suffix == ".npy":
            (array,) = arrays.values()
            np.save(path, array)
        elif path.suffix == ".npz":
            np.savez(path, **arrays)
        else:
            save_file(arrays, path)
        return path

    return write


# Import


@pytest.mark.parametrize(
    ("suffix", "dtype"), [("npy", np.float32), ("npz", np.float64), ("safetensors", np.float16)]
)
def test_arrays_become_a_store_of_the_view_they_were_made_for(files, tmp_path, suffix, dtype):
    path = files(f"cache.{suffix}", logits=LOGITS.astype(dtype))
    shown = call(*IMPORT, path, "--out", tmp_path / "s.zarr")
    assert "without views of its own" in " ".join(shown.split())
    reader = StoreReader(tmp_path / "s.zarr")
    decoded = reader.rows("logits", 0, np.arange(N)).decode().numpy()
    assert reader.views == (0,)
    assert np.allclose(decoded, LOGITS, rtol=2e-3, atol=1e-3)
    facts = reader.manifest.identity["teacher"]["imported"]
    assert facts == {"format": "numpy", "views": "fixed", "values": "logits"}
    assert reader.manifest.totals["correct"] == N


def test_several_views_are_kept_apart(files, tmp_path):
    views = np.stack([LOGITS, LOGITS[:, ::-1]])
    path = files("cache.npz", first=views, labels=SOURCE.labels)
    call(*IMPORT, path, "--out", tmp_path / "s.zarr", "--encoding", "float32")
    reader = StoreReader(tmp_path / "s.zarr")
    for view in range(2):
        assert np.array_equal(reader.rows("logits", view, np.arange(N)).decode().numpy(), views[view])


def test_an_imported_store_goes_with_stores_of_the_same_view(files, tmp_path, teacher):
    imported = tmp_path / "s.zarr"
    call(*IMPORT, files("cache.npy", logits=LOGITS), "--out", imported)
    own = write_store(tmp_path / "own.zarr", teacher, view="none", views=1)
    assert len(open_stores([imported, own])) == 2


@pytest.mark.parametrize("temperature", [1, 4])
def test_probabilities_are_those_of_the_cache_at_its_temperature(files, tmp_path, temperature):
    probs = random_probs(N)
    probs[0] = np.eye(10)[3]
    path = files("cache.npy", probs=probs)
    words = ("--values", "probs", "--temperature", temperature, "--encoding", "float32")
    call(*IMPORT, path, *words, "--out", tmp_path / "s.zarr")
    given = softmax_of(StoreReader(tmp_path / "s.zarr"), 0, temperature)
    assert np.allclose(given, probs, atol=1e-6)


def nan(array):
    array = array.copy()
    array[7, 3] = np.nan
    return array


REFUSED = [
    ("cache.npy", {"x": LOGITS[:-1]}, (), "expected (1442, 10), or (V, 1442, 10)"),
    ("cache.npy", {"x": LOGITS[:, :9]}, (), "has shape (1442, 9)"),
    ("cache.npy", {"x": LOGITS[None, None]}, (), "has shape (1, 1, 1442, 10)"),
    ("cache.npy", {"x": LOGITS[:0]}, (), "has shape (0, 10)"),
    ("cache.npy", {"x": LOGITS.astype(np.int32)}, (), "has dtype int32"),
    ("cache.npy", {"x": nan(LOGITS)}, (), "1 rows have NaN or infinity, first row 7"),
    ("cache.npy", {"x": np.exp(LOGITS)}, (), "give --values probs"),
    ("cache.npy", {"x": LOGITS}, ("--values", "probs"), "expected probabilities"),
    ("cache.npz", {"a": LOGITS, "b": LOGITS}, (), "has 2 arrays: give --array with one of a, b"),
    ("cache.npz", {"a": LOGITS}, ("--array", "c"), "has no array 'c'"),
    ("cache.npz", {"a": LOGITS, "labels": SOURCE.labels[::-1].copy()}, (), "the rows are in another order"),
    ("cache.safetensors", {"logits": LOGITS, "labels": SOURCE.labels[:5].copy()}, (), "has shape (5,)"),
    ("cache.npy", {"x": LOGITS}, ("--view", "digits"), "the view (pad_crop) is drawn at random"),
    ("cache.npy", {"x": LOGITS}, ("--replay-seeds",), "--replay-seeds is for --format tinyvit"),
    ("cache.npy", {"x": LOGITS * 1e5}, (), "outside the range of float16"),
]


@pytest.mark.parametrize(("name", "arrays", "words", "expected"), REFUSED)
def test_wrong_arrays_are_refused(files, tmp_path, name, arrays, words, expected):
    line = call(*IMPORT, files(name, **arrays), "--out", tmp_path / "s.zarr", *words, status=1)
    assert expected in line


@pytest.mark.parametrize("suffix", ["npy", "npz", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.99])
def test_truncated_files_are_refused(files, tmp_path, suffix, share):
    path = files(f"cache.{suffix}", logits=LOGITS)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert "cannot be read" in call(*IMPORT, path, "--out", tmp_path / "s.zarr", status=1)
    assert not (tmp_path / "s.zarr").exists()


def test_pickles_are_not_read(tmp_path):
    np.save(tmp_path / "cache.npy", np.array([{"code": 1}], dtype=object))
    line = call(*IMPORT, tmp_path / "cache.npy", "--out", tmp_path / "s.zarr", status=1)
    assert "without pickles" in line


def test_the_view_is_the_users_word(files, tmp_path):
    words = ("import", "--format", "numpy", "--source", "digits", files("cache.npy", x=LOGITS))
    assert "does not say which view" in call(*words, "--out", tmp_path / "s.zarr", status=1)


def test_answers_in_another_order_cause_a_warning(files, tmp_path):
    path = files("cache.npy", x=np.roll(LOGITS, 1, axis=1))
    words = [*IMPORT, str(path), "--out", str(tmp_path / "s.zarr")]
    result = CliRunner().invoke(precompute, words)
    assert result.exit_code == 0
    assert "hardly more than by chance" in result.stderr


def test_an_interrupted_import_goes_on(files, tmp_path, monkeypatch):
    path = files("cache.npy", x=np.stack([LOGITS, -LOGITS]))
    cache = FORMATS["numpy"](CacheOptions(path, SOURCE, view_recipe("none")))
    plan = cache_plan(cache, SOURCE, path)
    plan = replace(plan, block_rows=500)
    import_cache(tmp_path / "whole.zarr", cache, SOURCE, plan)
    load, left = cache.load, [4]

    def stop(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return load(*arguments)

    monkeypatch.setattr(cache, "load", stop)
    with pytest.raises(KeyboardInterrupt):
        import_cache(tmp_path / "s.zarr", cache, SOURCE, plan)
    monkeypatch.undo()
    import_cache(tmp_path / "s.zarr", cache, SOURCE, plan)
    assert store_files(tmp_path / "s.zarr") == store_files(tmp_path / "whole.zarr")


# Use of an imported store


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    np.save(folder / "cache.npy", LOGITS)
    call(*IMPORT, folder / "cache.npy", "--out", folder / "s.zarr")
    return folder / "s.zarr"


def test_a_student_learns_from_it(imported, tmp_path):
    words = ["train", "--student", "digits-small", "--store", imported, "--epochs", 1, "--limit", 64]
    result = CliRunner().invoke(distill, [str(word) for word in [*words, "--out", tmp_path / "run"]])
    assert result.exit_code == 0, result.output
    assert "ops: []" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_what_it_cannot_do_is_said(imported, tmp_path):
    for words in (("--deep", 5), ("--deep", 5, "--weights", "w.pt")):
        assert "there is no teacher to run" in call("verify", "--store", imported, *words, status=1)
    for fields in ({"online": True}, {"method": "amtml-hints", "student": "digits-cnn"}, {"method": "simkd"}):
        recipe = make_recipe([imported], **fields)
        with pytest.raises(RecipeError, match="was imported from"):
            train(recipe, tmp_path / "run", device=CPU)
    assert "sound" in call("verify", "--store", imported, "--content")
    assert "float16" in call("inspect", imported)
    status = json.loads(call("status", "--store", imported, "--json"))
    assert status["network"] == "imported:numpy"
    assert "no features, head or teacher" in status["imported"]


def test_another_cache_is_not_mixed_in(imported, files, tmp_path):
    path = files("cache.npy", x=LOGITS + 1)
    shutil.copytree(imported, tmp_path / "s.zarr")
    line = call(*IMPORT, path, "--out", tmp_path / "s.zarr", status=1)
    assert "was written by another recipe" in line


# Export


def test_an_export_is_read_by_safetensors(tapped, tmp_path):
    path = tmp_path / "out.safetensors"
    shown = call("export", tapped[1], "--out", path)
    assert "features/conv2" in shown
    reader, tensors = StoreReader(tapped[1]), load_file(path)
    assert set(tensors) == {*reader.manifest.arrays, "labels", "views"}
    assert np.array_equal(tensors["labels"], SOURCE.labels)
    assert tensors["views"].tolist() == [0, 1]
    for name in reader.manifest.arrays:
        for view in (0, 1):
            decoded = reader.rows(name, view, np.arange(N)).decode()
            assert tensors[name].dtype == torch.float32
            assert torch.equal(tensors[name][view], decoded), name
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["view_fingerprint"] == reader.manifest.view_fingerprint
    assert json.loads(metadata["class_names"]) == list(SOURCE.class_names)
    assert json.loads(metadata["teacher"])["network"] == "digits-cnn"


def test_views_are_chosen_and_sparse_rows_decoded(teacher, tmp_path):
    store = write_store(tmp_path / "s.zarr", teacher, views=3, encoding="topk:2")
    values = json.loads(call("export", store, "--out", tmp_path / "a.safetensors", "--views", 2, "--json"))
    assert values["tensors"]["logits"] == [2, N, 10]
    assert values["bytes"] == (tmp_path / "a.safetensors").stat().st_size
    logits = load_file(tmp_path / "a.safetensors")["logits"]
    assert torch.equal(logits[1], StoreReader(store).rows("logits", 1, np.arange(N)).decode())


def test_an_export_is_imported_again_and_trains_the_same_student(stores, tmp_path):
    path, again = tmp_path / "out.safetensors", tmp_path / "again.zarr"
    call("export", stores[1], "--out", path)
    words = ("import", path, "--format", "numpy", "--source", "digits", "--view", "digits")
    shown = call(*words, "--encoding", "float32", "--out", again)
    assert "with views of coursepack" in " ".join(shown.split())
    weights = []
    for store in (stores[1], again):
        train(make_recipe([store], limit=64), tmp_path / store.stem, device=CPU)
        weights.append((tmp_path / store.stem / "student.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--out", "x.npz"), "expected .safetensors"),
        (("--out", "x.safetensors", "--views", 9), "has 3 views with all of its arrays"),
    ],
)
def test_wrong_exports_are_refused(stores, tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in call("export", stores[0], *words, status=1)
    assert not list(tmp_path.iterdir())
