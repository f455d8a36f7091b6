"""A teacher that does much worse on the store's views than its run recorded is reported."""

from __future__ import annotations

import json
import shutil

import pytest
from builders import CPU, make_recipe
from click.testing import CliRunner

from coursepack.distill.runs.train import train
from coursepack.precompute.cli import main as precompute

LINE = "run --teacher run:{} --source {} --view {} --views 1 --store new.zarr --block-rows 300"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A run of a few epochs on the digits."""
    folder = tmp_path_factory.mktemp("run") / "teacher"
    train(make_recipe(epochs=4), folder, device=CPU)
    return folder


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda line: CliRunner().invoke(precompute, line.split())


def test_views_that_suit_the_teacher_give_no_warning(teacher, call):
    result = call(LINE.format(teacher, "digits", "digits"))
    assert result.exit_code == 0, result.output
    assert "its run recorded" not in result.stderr


@pytest.mark.parametrize("several", [False, True])
def test_views_that_do_not_suit_the_teacher_are_reported_once(teacher, call, tmp_path, several):
    (tmp_path / "crops.yaml").write_text(
        "ops: [{op: pad_crop, padding: 4}, {op: vertical_flip, probability: 1.0}]\n"
    )
    line = LINE.format(teacher, "digits:test", "crops.yaml")
    if several:
        (tmp_path / "t.yaml").write_text(
            "source: digits:test\nview: crops.yaml\nviews: 2\nblock_rows: 100\n"
            f"teachers: [{{teacher: 'run:{teacher}', store: new.zarr}}]\n"
        )
        line = "run t.yaml"
    result = call(line)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("but its run recorded") == 1
    assert "teacher 'digits-small' classifies " in result.stderr
    assert "of the views of 'digits:test' correctly" in result.stderr


def test_a_checkpoint_is_compared_with_the_evaluation_of_its_own_epoch(call, tmp_path):
    train(make_recipe(epochs=6, keep_checkpoints=1), tmp_path / "path", device=CPU)
    lines = [json.loads(line) for line in (tmp_path / "path" / "metrics.jsonl").read_text().splitlines()]
    first, last = (lines[index]["evaluation"]["accuracy"] for index in (0, -1))
    assert last - first > 0.2
    result = call(LINE.format(tmp_path / "path@1", "digits:test", "none"))
    assert result.exit_code == 0, result.output
    assert "recorded" not in result.stderr


def test_a_record_of_other_samples_is_not_compared(teacher, call, tmp_path):
    other = shutil.copytree(teacher, tmp_path / "other")
    (other / "recipe.yaml").write_text("evaluation: cifar10:test\n")
    assert "recorded" not in call(LINE.format(other, "digits:test", "none")).stderr
    last = json.dumps({"epoch": 0, "evaluation": {"accuracy": 1.0}})
    for text in ("", "noise\n", '{"evaluation": 3}\n', f"{last}\n"):
        (other / "metrics.jsonl").write_text(text)
        shutil.rmtree("new.zarr")
        result = call(LINE.format(other, "digits:test", "none"))
        assert (result.exit_code, "recorded" in result.stderr) == (0, False)
