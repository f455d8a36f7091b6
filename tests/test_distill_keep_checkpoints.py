"""Weights of earlier epochs: kept by a run, loaded as teachers, and written to stores in one pass."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
from builders import CPU, make_recipe
from click.testing import CliRunner
from helpers import rewrite_manifest, store_files
from safetensors.torch import load_file

from coursepack.config import write_yaml
from coursepack.data import Batch, open_source
from coursepack.data.store import StoreReader, load_manifest
from coursepack.distill.cli import main as distill
from coursepack.distill.runs.folder import RunFolder, load_run
from coursepack.distill.runs.train import train
from coursepack.distill.setup.prepare import prepare
from coursepack.errors import RecipeError, RunError
from coursepack.models import load_teacher
from coursepack.models.build import WEIGHTS_FILE
from coursepack.models.run_specs import checkpoint_file, kept_epochs, spec_of_weights
from coursepack.models.weights import weights_fingerprint
from coursepack.precompute.cli import main as precompute

RUN = sys.modules["coursepack.distill.runs.student"]
CLASSES = open_source("digits").class_names
FIELDS = {"limit": 150, "batch_size": 50, "epochs": 6, "keep_checkpoints": 2}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A run of six epochs that kept every second."""
    folder = tmp_path_factory.mktemp("runs") / "path"
    train(make_recipe(student="digits-cnn", **FIELDS), folder, device=CPU)
    return folder


def checkpoints(folder):
    return {file.name: file.read_bytes() for file in (folder / "checkpoints").iterdir()}


def command(group, *words):
    return CliRunner().invoke(group, [*map(str, words), "--device", "cpu"])


def test_weights_are_kept_after_every_so_many_epochs(tmp_path, path):
    assert sorted(checkpoints(path)) == [f"epoch-000{epoch}.safetensors" for epoch in (2, 4, 6)]
    assert checkpoint_file(path, 6).read_bytes() == (path / WEIGHTS_FILE).read_bytes()
    shorter = make_recipe(student="digits-cnn", **{**FIELDS, "epochs": 4})
    train(shorter, tmp_path / "o", device=CPU)
    assert checkpoint_file(path, 4).read_bytes() == (tmp_path / "o" / WEIGHTS_FILE).read_bytes()
    assert load_run(path).recipe.keep_checkpoints == 2
    train(make_recipe(**{**FIELDS, "keep_checkpoints": None}), tmp_path / "none", device=CPU)
    assert not (tmp_path / "none" / "checkpoints").exists()


def test_an_average_of_the_weights_is_kept_in_their_place(tmp_path):
    fields = {**FIELDS, "epochs": 2, "keep_checkpoints": 1}
    train(make_recipe(optimizer={"lr": 0.05, "ema": 0.9}, **fields), tmp_path / "o", device=CPU)
    assert checkpoint_file(tmp_path / "o", 2).read_bytes() == (tmp_path / "o" / WEIGHTS_FILE).read_bytes()


class Stopped(BaseException):
    """An interruption."""


@pytest.mark.parametrize("steps", [2, 7, 12, 17])
def test_an_interrupted_run_keeps_the_same_bytes(tmp_path, path, monkeypatch, steps):
    recipe, out = make_recipe(student="digits-cnn", **FIELDS), tmp_path / "o"
    left, save = [steps], RUN.save_checkpoint

    def counted(*arguments):
        if left[0] == steps - 2:
            save(*arguments)  # what is done after this is lost
        left[0] -= 1
        if left[0] == 0:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(RUN, "save_checkpoint", counted)
        with pytest.raises(Stopped):
            train(recipe, out, device=CPU, checkpoint_seconds=0)
    assert kept_epochs(out) == [epoch for epoch in (2, 4, 6) if 3 * epoch < steps]
    train(recipe, out, device=CPU, resume=True)
    assert checkpoints(out) == checkpoints(path)


def test_what_is_trained_again_is_forgotten_first(tmp_path, path, monkeypatch):
    recipe, out = make_recipe(student="digits-cnn", **FIELDS), tmp_path / "o"
    seen, reopen, begin = [], RunFolder.reopen, RunFolder.begin
    monkeypatch.setattr(
        RunFolder, "reopen", lambda self, epoch: (reopen(self, epoch), seen.append(kept_epochs(out)))
    )
    monkeypatch.setattr(
        RunFolder,
        "begin",
        lambda self, *args, **how: (begin(self, *args, **how), seen.append(kept_epochs(out))),
    )
    log, save = RunFolder.log, RUN.save_checkpoint

    def stopping(self, metrics):
        log(self, metrics)
        if metrics["epoch"] == 4:
            raise Stopped

    def only_once(folder, position, *rest):
        if position.epoch == 3 and not (folder / "checkpoint.pt").exists():
            save(folder, position, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", stopping)
        patch.setattr(RUN, "save_checkpoint", only_once)
        with pytest.raises(Stopped):
            train(recipe, out, device=CPU, checkpoint_seconds=0)
    assert kept_epochs(out) == [2, 4]
    train(recipe, out, device=CPU, resume=True)
    assert seen == [[], [2]]
    assert checkpoints(out) == checkpoints(path)
    train(make_recipe(**{**FIELDS, "epochs": 2}), out, device=CPU, overwrite=True)
    assert sorted(checkpoints(out)) == ["epoch-0002.safetensors"]


def test_a_run_that_would_keep_nothing_is_refused():
    text = (
        r"keep_checkpoints is 7, but the run has 6 epochs, so none would be kept: give --keep-checkpoints 6"
    )
    with pytest.raises(RecipeError, match=text):
        prepare(make_recipe(**{**FIELDS, "keep_checkpoints": 7}), CPU)


def test_another_number_is_refused_when_a_run_goes_on(tmp_path, monkeypatch):
    def stopped(*_):
        raise Stopped

    monkeypatch.setattr(RUN, "save_checkpoint", stopped)
    with pytest.raises(Stopped):
        train(make_recipe(**FIELDS), tmp_path / "o", device=CPU, checkpoint_seconds=0)
    with pytest.raises(RunError, match=r"keep_checkpoints\s+started with: 2\s+now: 3"):
        train(make_recipe(**{**FIELDS, "keep_checkpoints": 3}), tmp_path / "o", device=CPU, resume=True)


# As teachers


def test_every_epoch_is_a_teacher_of_its_own(path):
    found = {}
    for spec in ("@2", "@4", "@6", ""):
        network = load_teacher(f"run:{path}{spec}", CLASSES)
        found[spec] = weights_fingerprint(network.module)
        held = load_file(network.weights_file)
        assert all(held[name].equal(value) for name, value in network.module.state_dict().items())
        assert spec_of_weights(network.weights_file) == f"run:{path.resolve()}{spec}"
    assert found["@6"] == found[""]
    assert len(set(found.values())) == 3


def test_an_epoch_that_was_not_kept_is_refused_with_those_that_were(tmp_path, path, teacher):
    words = ["run", "--source=digits", "--view=digits", "--views=1", f"--store={tmp_path / 's.zarr'}"]
    for epoch in (0, 3, 40):
        result = command(precompute, *words, "--teacher", f"run:{path}@{epoch}")
        assert result.exit_code == 1
        assert result.stderr.strip() == (
            f"Error: run {str(path)!r} kept no checkpoint after {epoch} epochs: expected @2, @4, @6"
        )
    for spec in ("3", "all"):
        result = command(precompute, *words, "--teacher", f"run:{teacher}@{spec}")
        assert result.stderr.strip().endswith(
            "expected a run that was trained with `distill train --keep-checkpoints EVERY`"
        )
    result = command(precompute, *words, "--teacher", f"run:{tmp_path}/none@2")
    assert f"there is no run at '{tmp_path}/none'" in result.stderr
    with pytest.raises(RunError, match=r"all kept checkpoints of a run.*name one of them, @2, @4, @6"):
        load_teacher(f"run:{path}@all", CLASSES)
    assert not list(tmp_path.iterdir())


def test_checkpoints_of_an_unfinished_run_are_named_one_by_one(tmp_path, path):
    out = tmp_path / "o"
    (out / "checkpoints").mkdir(parents=True)
    for name in ("network.yaml", "checkpoints/epoch-0002.safetensors"):
        (out / name).write_bytes((path / name).read_bytes())
    assert load_teacher(f"run:{out}@2", CLASSES).classes == 10
    words = ["run", "--source=digits", "--view=digits", "--views=1", f"--store={tmp_path / 's'}"]
    result = command(precompute, *words, "--teacher", f"run:{out}@all")
    assert "is unfinished or not a run, so its checkpoints are not all kept: finish it first" in result.stderr


def test_a_folder_may_have_an_at_sign(tmp_path, teacher):
    (tmp_path / "mlp@2").symlink_to(teacher)
    assert load_teacher(f"run:{tmp_path / 'mlp@2'}", CLASSES).spec == "digits-mlp"


# In stores


@pytest.fixture
def rendered(monkeypatch):
    """Rows (sample, view) of every batch that is rendered."""
    rows, render_all = [], Batch.render_all

    def watched(self, sizes):
        rows.extend(zip(self.samples.tolist(), self.views.tolist(), strict=True))
        return render_all(self, sizes)

    monkeypatch.setattr(Batch, "render_all", watched)
    return rows


def test_all_checkpoints_are_written_in_one_pass(tmp_path, path, rendered):
    words = ["run", "--source=digits", "--view=digits", "--views=2", "--encoding=float32"]
    together = tmp_path / "path"
    result = command(precompute, *words, "--teacher", f"run:{path}@all", "--store", together)
    assert result.exit_code == 0, result.output
    assert len(rendered) == len(set(rendered)) == 2 * 1442
    names = [f"epoch-000{epoch}.zarr" for epoch in (2, 4, 6)]
    assert sorted(child.name for child in together.iterdir()) == names
    fingerprints = set()
    for name, epoch in zip(names, (2, 4, 6), strict=True):
        alone = tmp_path / name
        assert (
            command(precompute, *words, "--teacher", f"run:{path}@{epoch}", "--store", alone).exit_code == 0
        )
        assert store_files(alone) == store_files(together / name)
        fingerprints.add(load_manifest(alone).fingerprint)
    assert len(fingerprints) == 3
    refused = command(precompute, *words, "--teacher", f"run:{path}@4", "--store", together / names[0])
    assert refused.exit_code == 1
    assert "weights" in refused.stderr


def test_a_file_of_teachers_takes_them_too(tmp_path, path, teacher):
    values = {
        "source": "digits", "view": "digits", "views": 1,
        "teachers": [
            {"teacher": f"run:{path}@all", "store": str(tmp_path / "path")},
            {"teacher": f"run:{teacher}", "store": str(tmp_path / "mlp.zarr")},
        ],
    }  # fmt: skip
    (tmp_path / "t.yaml").write_text(write_yaml(values))
    result = command(precompute, "run", tmp_path / "t.yaml")
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "path").iterdir())) == 3
    assert load_manifest(tmp_path / "mlp.zarr").committed_views() == (0,)


def test_a_student_follows_the_path_of_its_teacher(tmp_path, path):
    words = ["run", "--source=digits", "--view=digits", "--views=2", "--teacher", f"run:{path}@all"]
    assert command(precompute, *words, "--store", tmp_path / "path").exit_code == 0
    stores = sorted((tmp_path / "path").iterdir())
    train(make_recipe(stores, method="pro-kd", limit=100, epochs=3), tmp_path / "o", device=CPU)
    told = [line["teachers"]["weight"] for line in load_run(tmp_path / "o").metrics]
    assert told == np.eye(3).tolist()
    train(make_recipe(stores, online=True, limit=100, epochs=3), tmp_path / "live", device=CPU)
    recipe = [
        "train",
        "--student",
        "digits-cnn",
        "--method",
        "at",
        "--store",
        stores[0],
        "--out",
        tmp_path / "x",
    ]
    refused = command(distill, *recipe)
    assert re.search(rf"precompute run --teacher run:{path.resolve()}@2 ", refused.stderr), refused.output
    assert StoreReader(stores[0]).manifest.origin["weights_file"].endswith("epoch-0002.safetensors")
    rewrite_manifest(
        stores[0], lambda values: values["origin"].update(weights_file=str(checkpoint_file(path, 4)))
    )
    with pytest.raises(Exception, match="are not the ones that wrote the store"):
        prepare(make_recipe(stores, online=True), CPU)
