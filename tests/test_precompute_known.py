"""Stores of teachers that know only some of the source's classes: class maps, rows, statistics, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from builders import CPU, write_known, write_teacher
from click.testing import CliRunner
from helpers import random_source, rewrite_manifest

from coursepack.data import open_source
from coursepack.data.encodings import parse_encoding
from coursepack.data.sources import InMemory
from coursepack.data.store import StorePlan, StoreReader, load_manifest
from coursepack.data.store.planning import fresh_manifest
from coursepack.errors import RecipeError, StoreDamaged
from coursepack.models.classes import load_columns
from coursepack.precompute.cli import main as precompute
from coursepack.precompute.inspect import describe_store
from coursepack.precompute.page.answers import answers, disagreement
from coursepack.precompute.verify import job_of_store, verify_deep

NAMES = ("cat", "dog", "7")
SAMPLES = np.arange(1442)


def call(*words, status=0):
    result = CliRunner().invoke(precompute, [str(word) for word in words])
    assert result.exit_code == status, result.output
    return result


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("[4, missing, 11]", (4, None, 11)),
        ("{dog: missing, 7: 0, cat: 1}", (1, None, 0)),
        ("[b, missing, a]", (1, None, 0)),
    ],
)
def test_a_class_map_marks_classes_that_the_teacher_does_not_know(tmp_path, text, columns):
    (tmp_path / "map.yaml").write_text(text)
    assert load_columns(tmp_path / "map.yaml", NAMES, lambda: ("a", "b")) == columns


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[4, missing, missing]", "has 1 classes that the teacher knows, expected at least 2"),
        ("[4, missing, 4]", "gives one of the teacher's classes to two classes"),
        (
            "[4, null, 4]",
            "gives None for 'dog', expected a class id, or 'missing' if the teacher does not know",
        ),
    ],
)
def test_class_maps_that_leave_too_little_are_refused(tmp_path, text, message):
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_columns(tmp_path / "map.yaml", NAMES)


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """The store of a teacher of five outputs, the fourth of them of no class of the source."""
    folder = tmp_path_factory.mktemp("five")
    teacher = write_teacher(folder / "run", "digits-cnn", classes=5, seed=4)
    (folder / "map.yaml").write_text("[missing, 2, missing, missing, 0, missing, 4, missing, missing, 1]")
    words = ["run", "--teacher", f"run:{teacher}", "--source", "digits", "--view", "digits", "--views", "1"]
    words += ["--classes", folder / "map.yaml", "--tap", "hidden", "--device", "cpu"]
    call(*words, "--encoding", "float32", "--feature-encoding", "float32", "--store", folder / "s.zarr")
    return folder, words


def test_the_store_has_the_columns_of_known_classes(five):
    folder, words = five
    reader = StoreReader(folder / "s.zarr")
    manifest = reader.manifest
    assert manifest.known_classes == (1, 4, 6, 9)
    assert not manifest.knows_all
    assert manifest.identity["teacher"]["columns"] == [None, 2, None, None, 0, None, 4, None, None, 1]
    logits = reader.rows("logits", 0, SAMPLES).decode()
    assert logits.shape == (1442, 4)
    hidden = reader.rows("features/hidden", 0, SAMPLES).decode().clamp_min(0).numpy()
    head = hidden @ reader.static("head_weight").T + reader.static("head_bias")
    np.testing.assert_allclose(logits.numpy(), head, atol=1e-2)
    job = job_of_store(folder / "s.zarr", manifest, weights=None, root=None, device=CPU)
    assert verify_deep(job, 1442).wrong == ()
    before = (folder / "s.zarr" / "manifest.json").read_bytes()
    call(*words, "--encoding", "float32", "--feature-encoding", "float32", "--store", folder / "s.zarr")
    assert (folder / "s.zarr" / "manifest.json").read_bytes() == before, "nothing was left to do"


def test_statistics_are_of_the_classes_that_it_knows(five):
    folder, _ = five
    reader = StoreReader(folder / "s.zarr")
    labels = open_source("digits").labels
    log_probs = reader.rows("logits", 0, SAMPLES).decode().double().log_softmax(1)
    known = np.isin(labels, (1, 4, 6, 9))
    column = torch.from_numpy(np.searchsorted((1, 4, 6, 9), labels[known]))
    own = log_probs[torch.from_numpy(known)]
    correct = int((own.argmax(1) == column).sum())
    assert reader.manifest.totals == {"rows": known.sum(), "correct": correct}
    told = json.loads(call("inspect", folder / "s.zarr", "--json").stdout)
    (view,) = told["stores"][0]["views"].values()
    assert view["accuracy"] == pytest.approx(correct / known.sum())
    assert view["cross_entropy"] == pytest.approx(-own.gather(1, column[:, None]).mean().item(), rel=1e-5)
    entropy = -(log_probs.exp() * log_probs).sum(1).mean().item()
    assert view["entropy"] == pytest.approx(entropy, rel=1e-5)
    assert 0 <= view["calibration_error"] <= 1


def test_pages_and_pictures_name_the_sources_classes(five, thirds, tmp_path):
    folder, _ = five
    reader = StoreReader(folder / "s.zarr")
    top = [answer.classes[0] for answer in answers(reader, 0, SAMPLES[:50], 3)]
    column = reader.rows("logits", 0, SAMPLES[:50]).decode().argmax(1)
    assert top == [(1, 4, 6, 9)[index] for index in column.tolist()]
    readers = [StoreReader(store) for store in thirds]
    assert np.isfinite(disagreement(readers, 0).divergence).all()
    call("inspect", *thirds, "--out", tmp_path / "grid.png")
    call("inspect", *thirds, "--html", tmp_path / "page.html")
    call("inspect", *thirds)


def test_encodings_that_keep_the_label_are_refused():
    plan = StorePlan(
        identity={"teacher": {"columns": [None, *range(99)]}},
        origin={},
        labels=np.zeros(5, dtype=np.int64),
        class_names=tuple(map(str, range(100))),
        views=1,
        arrays={"logits": (parse_encoding("topk:3"), (99,))},
    )
    text = "encoding topk:3 keeps the logit of the label, which a teacher that knows 99 of 100 classes may"
    with pytest.raises(RecipeError, match=text):
        fresh_manifest(plan)


@pytest.mark.parametrize("encoding", ["float16", "int8"])
def test_other_encodings_hold_them(teacher, tmp_path, encoding):
    known = (0, 2, 5)
    store = write_known(tmp_path / "s.zarr", teacher, known, encoding=encoding, views=1)
    exact = write_known(tmp_path / "e.zarr", teacher, known, views=1)
    found, want = (StoreReader(each).rows("logits", 0, SAMPLES).decode() for each in (store, exact))
    torch.testing.assert_close(found, want, rtol=1e-2, atol=0.2)


def test_a_store_may_have_no_sample_of_a_known_class(teacher, tmp_path):
    source = random_source(20)
    source = InMemory("zeros:train", source.images, np.zeros(20, dtype=np.int64), source.class_names)
    store = write_known(tmp_path / "s.zarr", teacher, (3, 8), source=source, views=1)
    assert load_manifest(store).totals == {"rows": 0, "correct": 0}
    (view,) = describe_store(StoreReader(store))["views"].values()
    assert (view["accuracy"], view["cross_entropy"], view["calibration_error"]) == (0, 0, 0)
    assert view["entropy"] > 0
    assert "0.00%" in call("status", "--store", store).stdout


def test_forged_columns_are_refused(teacher, tmp_path):
    store = write_known(tmp_path / "s.zarr", teacher, (3, 8, 9), views=1)

    def forge(values):
        values["identity"]["teacher"]["columns"][0] = 0

    rewrite_manifest(store, forge)
    with pytest.raises(StoreDamaged, match=r"logits of \(3,\) for a teacher that knows 4 of 10 classes"):
        load_manifest(store)
