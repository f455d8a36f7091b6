"""From a folder of JPEGs to a student: `precompute run` and `distill train`, with and without workers."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import store_files
from image_files import cut, random_image, save_image
from safetensors.torch import load_file, save_file

from coursepack.data import open_source
from coursepack.data.store import StoreReader
from coursepack.distill import open_teacher_stores
from coursepack.distill.cli import main as distill
from coursepack.models import build_network
from coursepack.models.build import WEIGHTS_FILE
from coursepack.models.record import METRICS_FILE
from coursepack.precompute.cli import main as precompute

CLASSES, FILES = ("ant", "bee", "cat"), 8
RESNET18 = "torchvision:resnet18"


def command(main, *words):
    return CliRunner().invoke(main, [str(word) for word in (*words, "--device", "cpu")])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """24 JPEGs of many sizes for training, 6 to evaluate on, and a resnet18's fresh weights."""
    folder = tmp_path_factory.mktemp("folder")
    for split, files in (("train", FILES), ("val", 2)):
        for label, name in enumerate(CLASSES):
            for number in range(files):
                size = (34 + 5 * number, 70 - 3 * number - label)
                pixels = random_image(split, label, number, size=size)
                pixels = (pixels // 3 + np.array([50, 100, 150])[(np.arange(3) + label) % 3]).astype(np.uint8)
                save_image(folder / "images" / split / name / f"{number}.jpg", pixels, quality=85)
    state = build_network(RESNET18, len(CLASSES), seed=2).module.state_dict()
    save_file({name: value.clone() for name, value in state.items()}, folder / "resnet18.safetensors")
    return folder


def run_words(place: Path, store: Path, *words, root=None):
    teacher = ["--teacher", RESNET18, "--weights", place / "resnet18.safetensors", "--size", 32]
    source = ["--source", "folder", "--root", root or place / "images", "--view", "imagenet-strong"]
    return ["run", *teacher, *source, "--views", 2, "--batch-size", 10, "--store", store, *words]


@pytest.fixture(scope="module")
def store(place):
    result = command(precompute, *run_words(place, place / "s.zarr", "--workers", 0))
    assert result.exit_code == 0, result.output
    return place / "s.zarr"


def test_workers_write_the_same_store(place, store, tmp_path):
    result = command(precompute, *run_words(place, tmp_path / "w.zarr", "--workers", 2))
    assert result.exit_code == 0, result.output
    assert store_files(tmp_path / "w.zarr") == store_files(store)
    reader = StoreReader(store)
    assert (reader.manifest.samples, reader.views) == (24, (0, 1))
    rows = [reader.rows("logits", view, np.arange(24)).decode() for view in (0, 1)]
    assert not torch.equal(*rows)


def trained(place, store, out, workers, *words):
    student = ["--student", "digits-resnet", "--set", "student_size=16", "--store", store]
    words = [*student, "--root", place / "images", "--epochs", 3, "--batch-size", 7, *words]
    result = command(distill, "train", *words, "--workers", workers, "--out", out)
    assert result.exit_code == 0, result.output
    metrics = [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()]
    for entry in metrics:
        del entry["seconds"]
    return metrics, load_file(out / WEIGHTS_FILE)


@pytest.mark.parametrize("words", [[], ["--views-per-load", 2]], ids=["one view", "two views per load"])
def test_a_student_is_the_same_with_and_without_workers(place, store, tmp_path, words):
    torch.manual_seed(1)
    (metrics, weights), (again, other) = (
        trained(place, store, tmp_path / str(workers), workers, *words) for workers in (0, 2)
    )
    assert metrics == again
    assert all(torch.equal(weights[name], other[name]) for name in weights)
    assert [entry["epoch"] for entry in metrics] == [0, 1, 2]
    assert metrics[0]["train"]["loss"] != metrics[2]["train"]["loss"]
    assert set(metrics[0]["evaluation"]) == {"accuracy", "nll", "calibration_error"}


def test_a_damaged_file_is_refused_by_name_before_anything_is_made(place, store, tmp_path):
    root = tmp_path / "images"
    shutil.copytree(place / "images", root)
    damaged = root / "train" / "bee" / "3.jpg"
    cut(damaged, 0.6)
    result = command(precompute, *run_words(place, tmp_path / "d.zarr", root=root))
    assert (result.exit_code, "Traceback" in result.output) == (1, False)
    assert "source 'folder:train' has 1 damaged files among 24:" in result.stderr
    assert f"  {damaged} cannot be decoded: " in result.stderr
    assert not (tmp_path / "d.zarr").exists()
    words = ["--student", "digits-resnet", "--store", store, "--root", root, "--out", tmp_path / "run"]
    refused = command(distill, "train", *words)
    assert (refused.exit_code, str(damaged) in refused.stderr) == (1, True)
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_damaged_after_the_start_stops_training_by_name(place, store, tmp_path, monkeypatch):
    """The scan is over, so that only decoding can tell: whoever decodes."""
    root = tmp_path / "images"
    shutil.copytree(place / "images", root)
    source = open_source("folder", root)
    damaged = Path(source.path(11))
    words = ["--student", "digits-resnet", "--set", "student_size=16", "--store", store, "--root", root]
    words += ["--epochs", 1, "--batch-size", 7, "--allow-drift", "--views", 1]

    def cut_late(*_, **__):
        cut(damaged, 0.5)
        return ()

    monkeypatch.setattr(sys.modules[open_teacher_stores.__module__], "check_drift", cut_late)
    intact = damaged.read_bytes()
    texts = []
    for workers in (0, 2):
        damaged.write_bytes(intact)
        result = command(distill, "train", *words, "--workers", workers, "--out", tmp_path / str(workers))
        assert (result.exit_code, "Traceback" in result.output) == (1, False), result.output
        texts.append(next(line for line in result.stderr.splitlines() if line.startswith("Error: ")))
    assert texts[0] == texts[1]
    assert texts[0].startswith(f"Error: sample 11 of source 'folder:train' cannot be read: {damaged}: ")
