"""Sources through the commands: from a hold-out to its evaluation, and damage that is refused at once."""

from __future__ import annotations

import shlex

import pytest
from builders import write_teacher
from click.testing import CliRunner
from image_files import write_tree

from coursepack.distill.cli import main as distill
from coursepack.distill.runs.folder import load_run
from coursepack.precompute.cli import main as precompute

FAKE = "fake,size=8,samples=200,channels=1"


def run(command, line, status=0):
    result = CliRunner().invoke(command, shlex.split(line))
    assert result.exit_code == status, result.output
    return result


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_teacher(tmp_path / "mlp", seed=1)
    return tmp_path


def test_a_student_of_a_hold_out_is_evaluated_on_what_was_held_out(workplace):
    store = f"--source {FAKE}:train-0.2 --view digits --views 1 --store s.zarr"
    run(precompute, f"run --teacher run:mlp {store}")
    run(distill, "train --student digits-small --store s.zarr --epochs 1 --out new")
    recipe = load_run(workplace / "new").recipe
    assert recipe.source == f"{FAKE}:train-0.2"
    assert recipe.evaluation == f"{FAKE}:train+0.2"
    result = run(distill, "eval new")
    assert "40 samples" in result.stdout
    other = "train --student digits-small --store s.zarr --epochs 1 --out other"
    refused = run(distill, f"{other} --source {FAKE}:train-0.3", status=1)
    assert f"was written from source '{FAKE}:train-0.2'" in refused.stderr


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (precompute, "run --teacher run:mlp --view digits --views 1 --store new"),
        (precompute, "plan --teacher run:mlp --view digits --views 1 --store new"),
        (distill, "train --student digits-small --view digits --set evaluation=folder:train --out new"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(workplace, command, line):
    write_tree(workplace / "tree", [f"class {label}" for label in range(10)])
    (workplace / "tree" / "class 3" / "class 3_5.png").write_bytes(b"")
    result = run(command, f"{line} --source folder --root tree", status=1)
    assert "Error: source 'folder:train' has 1 damaged files among 30:\n" in result.stderr
    assert f"  {workplace}/tree/class 3/class 3_5.png is empty (0 bytes)\nReplace" in result.stderr
    assert not (workplace / "new").exists()
