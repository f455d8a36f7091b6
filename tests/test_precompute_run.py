"""Stage one: what is stored is what the teacher says, and what cannot be stored is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import write_teacher
from contracts_encodings import float16_ulp
from helpers import file_identities, make_job, store_files

from coursepack.data import open_source
from coursepack.data.store import StoreReader, load_manifest
from coursepack.data.store.owners import Part
from coursepack.data.views import draw, render
from coursepack.errors import NonFiniteOutput, RecipeError, StoreMismatch, UnknownName
from coursepack.models.build import WEIGHTS_FILE
from coursepack.models.taps import Tap
from coursepack.models.teacher import TeacherOutput
from coursepack.precompute import run_job

EVERYTHING = np.arange(1442)


@pytest.fixture(scope="module")
def teacher(teachers):
    return teachers[1]


@pytest.fixture(scope="module")
def written(cnn_store):
    return cnn_store


def live_answers(job, view):
    """The teacher's answers to one view, block by block in the batches that stage one lays out."""
    source, size = job.source, job.runner.network.preprocessing.size
    found: dict[str, list] = {}
    for block in range(0, 1442, job.block_rows):
        samples = EVERYTHING[block : block + job.block_rows]
        for start in range(0, len(samples), job.batch_size):
            batch = samples[start : start + job.batch_size]
            pixels = render(job.recipe, source, batch, draw(job.recipe, source, batch, view), size)
            for name, value in job.runner.run(torch.from_numpy(pixels)).arrays().items():
                found.setdefault(name, []).append(value.numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


@pytest.mark.parametrize("encoding", ["float32", "float16"])
def test_stored_values_are_the_teachers_own(tmp_path, teacher, encoding):
    taps = (Tap(("conv2",)), Tap(("hidden",)))
    encodings = {"encoding": encoding, "feature_encoding": encoding}
    job = make_job(tmp_path / "s.zarr", teacher, **encodings, taps=taps, block_rows=300, batch_size=64)
    run_job(job)
    reader = StoreReader(tmp_path / "s.zarr")
    assert set(reader.manifest.arrays) == {"logits", "features/conv2", "features/hidden"}
    assert reader.manifest.arrays["features/conv2"].row_shape == (32, 4, 4)
    for view in range(2):
        for name, expected in live_answers(job, view).items():
            found = reader.rows(name, np.full(1442, view), EVERYTHING).decode().numpy()
            bound = float16_ulp(expected) / 2 if encoding == "float16" else 0
            assert (np.abs(found.astype(np.float64) - expected) <= bound).all()


def test_batch_size_changes_no_more_than_the_last_bits(tmp_path, teacher):
    answers, digests = [], []
    for batch_size in (7, 64, 1024):
        path = tmp_path / f"{batch_size}.zarr"
        run_job(make_job(path, teacher, views=1, encoding="float32", batch_size=batch_size))
        reader = StoreReader(path)
        answers.append(reader.components("logits", 0, EVERYTHING)["values"])
        digests.append((reader.manifest.fingerprint, reader.manifest.view_records["0"]["draws"]))
    assert digests[0] == digests[1] == digests[2]
    for other in answers[1:]:
        assert np.abs(other - answers[0]).max() <= 1e-5 * np.abs(answers[0]).max()


def test_manifest_says_what_the_teacher_is_worth(written, teacher):
    manifest = load_manifest(written)
    job = make_job(written, teacher, block_rows=500)
    labels = torch.from_numpy(open_source("digits").labels)
    for view in range(2):
        logits = torch.from_numpy(live_answers(job, view)["logits"]).double()
        sums = manifest.view_records[str(view)]["sums"]
        assert sums["rows"] == 1442
        assert sums["correct"] == int((logits.argmax(1) == labels).sum())
        expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        assert sums["cross_entropy"] == pytest.approx(expected, rel=1e-5)
        entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum().item()
        assert sums["entropy"] == pytest.approx(entropy, rel=1e-5)
    assert manifest.origin == {"weights_file": str((teacher / WEIGHTS_FILE).resolve())}
    assert manifest.identity["teacher"]["network"] == "digits-cnn"
    assert manifest.class_names == tuple("0123456789")


def test_running_again_changes_nothing(store, teacher):
    files, identities = store_files(store), file_identities(store)
    manifest = (store / "manifest.json").stat()
    run_job(make_job(store, teacher, block_rows=500))
    assert (store_files(store), file_identities(store)) == (files, identities)
    assert (store / "manifest.json").stat().st_mtime_ns == manifest.st_mtime_ns


def test_other_weights_are_another_teacher(written, tmp_path):
    files = store_files(written)
    other = make_job(written, write_teacher(tmp_path / "other", "digits-cnn", seed=5))
    with pytest.raises(StoreMismatch, match=r"teacher\.weights +store: [0-9a-f]{64} +recipe: [0-9a-f]{64}"):
        run_job(other)
    assert store_files(written) == files


class Sick:
    """A runner whose answers to some pixels are not finite."""

    def __init__(self, runner, pixels):
        self._runner, self._pixels = runner, pixels

    def __getattr__(self, name):
        return getattr(self._runner, name)

    def run(self, pixels):
        output = self._runner.run(pixels)
        bad = torch.tensor([any(torch.equal(image, other) for other in self._pixels) for image in pixels])
        logits = output.logits.clone()
        logits[bad, 3] = float("nan")
        return TeacherOutput(logits, output.features)


def test_answer_that_is_not_finite_names_the_samples_and_keeps_the_rest(tmp_path, teacher):
    job = make_job(tmp_path / "s.zarr", teacher, block_rows=100, batch_size=50)
    ids = np.array([230, 241])
    pixels = torch.from_numpy(render(job.recipe, job.source, ids, draw(job.recipe, job.source, ids, 1), 8))
    text = r"gives logits that are not finite for 2 samples of a batch \(230, 241\): check its weights"
    with pytest.raises(NonFiniteOutput, match=text):
        run_job(replace(job, runner=Sick(job.runner, pixels)))
    kept = file_identities(tmp_path / "s.zarr")
    assert load_manifest(tmp_path / "s.zarr").committed_views() == (0,)
    static = ["static/head_bias/c.0", "static/head_weight/c.0.0"]
    assert [place for place in sorted(kept) if not place.startswith("logits/")] == ["labels/c.0", *static]
    assert len(kept) == 3 + 15 + 2
    run_job(job)
    assert kept.items() <= file_identities(tmp_path / "s.zarr").items()
    run_job(make_job(tmp_path / "once.zarr", teacher, block_rows=100, batch_size=50))
    assert store_files(tmp_path / "s.zarr") == store_files(tmp_path / "once.zarr")


def test_parts_one_after_another_commit_when_the_last_is_done(tmp_path, teacher, written):
    for index in (2, 0, 1):
        job = make_job(tmp_path / "s.zarr", teacher, block_rows=500, part=Part(index, 3))
        manifest = run_job(job)
        assert manifest.committed_views() == ((0, 1) if index == 1 else ())
    assert store_files(tmp_path / "s.zarr") == store_files(written)


@pytest.mark.parametrize("field", ["views", "batch_size"])
def test_numbers_out_of_range_are_refused(tmp_path, teacher, field):
    with pytest.raises(RecipeError, match=f"{field} is 0, expected at least 1"):
        run_job(make_job(tmp_path / "s.zarr", teacher, **{field: 0}))
    with pytest.raises(UnknownName, match=r"unknown encoding 'float61'\. Did you mean 'float16'\?"):
        run_job(make_job(tmp_path / "s.zarr", teacher, encoding="float61"))
    assert not (tmp_path / "s.zarr").exists()
