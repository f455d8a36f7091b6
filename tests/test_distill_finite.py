"""A loss that is not finite is blamed on what is at fault: a changed file, a teacher, or the student."""

from __future__ import annotations

import os
import shutil
import signal

import numpy as np
import pytest
import torch
from builders import CPU, loss_inputs, make_recipe, write_store, write_teacher
from helpers import RowStore, write_rows
from spawned import run

from coursepack.data.store import StoreReader
from coursepack.distill.losses.base import Step
from coursepack.distill.methods import METHODS
from coursepack.distill.objective import Objective
from coursepack.distill.runs.train import train
from coursepack.distill.setup import prepare as prepare_module
from coursepack.distill.targets.base import Targets
from coursepack.distill.targets.stores import CachedTargets
from coursepack.errors import NonFiniteOutput, StoreDamaged, TrainingDiverged

FIRST = "logits/values/c.0.0.0"
NAN = b"\xff"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    return write_store(folder / "s.zarr", write_teacher(folder / "mlp"))


@pytest.fixture
def store(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "s.zarr")


def overwrite(path, byte):
    """Change the rows of a file in place, as no writer of ours does."""
    with path.open("r+b") as file:
        file.write(byte * 20_000)


def shorten(path):
    os.truncate(path, 4096)


def touch(path):
    os.utime(path)


def replace(path):
    """Another file of the same name: what is mapped is still the old one."""
    other = path.with_name("other")
    other.write_bytes(NAN * path.stat().st_size)
    other.replace(path)


CHANGES = [
    (lambda path: overwrite(path, NAN), "was changed while it was read, and no longer matches its checksum"),
    (
        lambda path: overwrite(path, b"\0"),
        "was changed while it was read, and no longer matches its checksum",
    ),
    (shorten, r"was changed while it was read: it has 4096 bytes, expected \d+"),
    (touch, None),
    (replace, None),
]


@pytest.mark.parametrize(("change", "text"), CHANGES, ids=["nan", "zeros", "shorter", "touched", "replaced"])
@pytest.mark.parametrize("reading", ["mapped", "windowed", "resident"])
def test_reader_notices_files_that_are_changed_in_place(tmp_path, reading, change, text):
    rows = write_rows(tmp_path / "s.zarr", RowStore(samples=5000, views=1, block_rows=5000))
    path, everything = tmp_path / "s.zarr" / FIRST, np.arange(5000)
    reader = StoreReader(tmp_path / "s.zarr", reading)
    expected = reader.components("logits", 0, everything)["values"].tobytes()
    assert expected == rows.stored("logits", 0).tobytes()
    change(path)
    if text is None or reading == "resident":
        reader.check_unchanged()
        assert reader.components("logits", 0, everything)["values"].tobytes() == expected
        return
    with pytest.raises(StoreDamaged, match=text) as caught:
        reader.check_unchanged()
    assert str(path) in str(caught.value)
    if change is shorten:
        # Touching a row that is gone would end the process.
        with pytest.raises(StoreDamaged, match=text):
            reader.components("logits", 0, everything)


@pytest.mark.parametrize(("change", "text"), CHANGES[:3], ids=["nan", "zeros", "shorter"])
def test_training_ends_with_the_name_of_the_changed_file(tmp_path, store, monkeypatch, change, text):
    fetch, calls = CachedTargets.fetch, []

    def changing(self, *args):
        calls.append(args)
        if len(calls) == 2:
            change(store / FIRST)
        return fetch(self, *args)

    monkeypatch.setattr(CachedTargets, "fetch", changing)
    recipe = make_recipe([store], reading="mapped", epochs=2, limit=300)
    with pytest.raises(StoreDamaged, match=text) as caught:
        train(recipe, tmp_path / "out", device=CPU)
    assert str(store / FIRST) in str(caught.value)
    assert "precompute verify" in str(caught.value)


@pytest.mark.parametrize("method", ["kd", "ca-mkd"])
def test_stored_targets_that_are_not_finite_are_named(tmp_path, sound, monkeypatch, method):
    """Rows with the right checksums, as another program might write them."""
    rows, ids = StoreReader.rows, [7, 1200]

    def poisoned(self, array, view, samples):
        found = rows(self, array, view, samples)
        found.values[torch.from_numpy(np.isin(samples, ids))] = float("nan")
        return found

    def together(wanted, view, samples):
        return [poisoned(reader, array, view, samples) for reader, array in wanted]

    monkeypatch.setattr(StoreReader, "rows", poisoned)
    monkeypatch.setattr("coursepack.distill.targets.stores.read_together", together)
    recipe = make_recipe([sound, sound], method=method)
    text = r"holds logits that are not finite for 2 samples of view 0 \(7, 1200\): no student can learn"
    with pytest.raises(NonFiniteOutput, match=text):
        train(recipe, tmp_path / "out", device=CPU)


def test_live_teacher_with_weights_that_are_not_finite_is_named(tmp_path, sound, monkeypatch):
    live_teachers = prepare_module.live_teachers

    def sick(*args, **options):
        runners = live_teachers(*args, **options)
        runners[0].network.module.head.bias.data[3] = float("nan")
        return runners

    monkeypatch.setattr(prepare_module, "live_teachers", sick)
    recipe = make_recipe([sound], online=True, limit=300)
    with pytest.raises(
        NonFiniteOutput, match=r"'digits-mlp' has weights that are not finite, first 'head\.bias'"
    ):
        train(recipe, tmp_path / "out", device=CPU)


@pytest.mark.parametrize(
    ("student", "teacher", "step", "text"),
    [
        (
            float("nan"),
            1.0,
            Step(0, 0),
            "since the student's logits are not. It has not been updated yet: check",
        ),
        (float("nan"), 1.0, Step(1, 0), "since the student's logits are not. Use a smaller --lr"),
        (1.0, float("nan"), Step(1, 0), "since the targets of teacher 1 are not. Check its weights"),
    ],
)
def test_input_that_is_not_finite_is_named(student, teacher, step, text):
    config = METHODS["dtd-flsw"].objective
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    targets = Targets([logits, logits * teacher])
    with pytest.raises(TrainingDiverged) as caught:
        Objective(config)(loss_inputs(logits * student, torch.zeros(4).long(), targets, step=step))
    assert text in str(caught.value)


def test_a_bus_error_is_not_silent(tmp_path):
    """What no check can catch: a file that is cut short between the check and the copy."""
    (tmp_path / "file").write_bytes(b"x" * 8192)
    code = f"""
import mmap, os
from coursepack.distill.cli import main
main(["methods", "--json"], standalone_mode=False)
with open({str(tmp_path / "file")!r}, "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    os.truncate(file.fileno(), 0)
    mapped[5000]
"""
    result = run("code", code)
    assert result.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in result.stderr
