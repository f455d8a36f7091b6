"""`--tensorboard`: what TensorBoard itself reads is what metrics.jsonl says."""

import itertools
import json
import sys

import numpy as np
import pytest
from builders import CPU, make_recipe
from click.testing import CliRunner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from coursepack.distill import train
from coursepack.distill.cli import main as distill
from coursepack.distill.runs.tracking.tensorboard import MetricWriter
from coursepack.errors import RecipeError


def curves(folder):
    """Every curve in a folder of event files: value by epoch, in the order of the files."""
    read = EventAccumulator(str(folder)).Reload()
    assert set(read.Tags()["scalars"]) == {tag for kind in read.Tags().values() if kind for tag in kind}
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def flat(value, *path):
    """Numbers by their path, as TensorBoard groups them."""
    if isinstance(value, (dict, list)):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        return dict(itertools.chain.from_iterable(flat(each, *path, key).items() for key, each in inner))
    return {"/".join(map(str, path)): value}


@pytest.mark.parametrize("method", ["ka-dtd", "amtml"])
def test_every_number_is_on_the_board(tmp_path, stores, method):
    words = ["train", "--student", "digits-small", "--method", method, "--limit", 100, "--epochs", 3]
    words += ["--views-per-load", 2, "--tensorboard", "--out", tmp_path / "o"]
    words += [word for store in stores for word in ("--store", store)]
    result = CliRunner().invoke(distill, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (tmp_path / "o" / "metrics.jsonl").read_text().splitlines()]
    shown, told = curves(tmp_path / "o" / "tensorboard"), [flat(line) for line in lines]
    assert shown.keys() == told[0].keys()
    assert {"train/soft_target", "teachers/weight/2", "evaluation/nll", "view/1"} <= shown.keys()
    for name, curve in shown.items():
        assert [step for step, _ in curve] == [0, 1, 2], name
        wanted = np.array([line[name] for line in told], np.float32)
        assert np.array_equal(np.array([value for _, value in curve], np.float32), wanted), name


def test_an_epoch_is_on_the_board_once_it_is_over(tmp_path):
    with MetricWriter(tmp_path) as board:
        for epoch in range(2):
            board.log({"epoch": epoch, "train": {"loss": 1.5 - epoch}})
            assert curves(tmp_path)["train/loss"] == [(0, 1.5), (1, 0.5)][: epoch + 1]


def test_a_run_that_goes_on_replaces_what_came_after(tmp_path):
    for first, losses in ((0, (5.0, 4.0, 3.0)), (1, (2.0, 1.0))):
        with MetricWriter(tmp_path, first=first) as board:
            for epoch, loss in enumerate(losses, start=first):
                board.log({"epoch": epoch, "loss": loss})
    assert curves(tmp_path)["loss"] == [(0, 5.0), (1, 2.0), (2, 1.0)]


def test_tensorboard_is_asked_for_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RecipeError, match=r"pip install 'coursepack\[tensorboard\]'"):
        train(make_recipe(limit=50), tmp_path / "o", device=CPU, tensorboard=True)
    assert not (tmp_path / "o").exists()
