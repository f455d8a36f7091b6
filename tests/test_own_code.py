"""Python code that a store or a run's folder names is not imported unless the user trusts it."""

from __future__ import annotations

import shlex
import sys

import pytest
import torch
import yaml
from builders import CPU, make_recipe, write_store, write_teacher
from click.testing import CliRunner

from coursepack.data import ViewRecipe, open_source, view_recipe
from coursepack.distill.cli import main as distill
from coursepack.distill.runs.train import train
from coursepack.distill.targets.teacher_stores import open_teacher_stores
from coursepack.errors import UntrustedCode
from coursepack.models import TeacherRunner, load_teacher
from coursepack.precompute import Job, run_job
from coursepack.precompute.cli import main as precompute

CODE = """
from pathlib import Path
import numpy as np
from torch import nn
from torchvision.transforms import v2

Path({marker!r}).touch()

class Data:
    classes = tuple("0123456789")
    targets = [index % 10 for index in range(40)]
    def __init__(self, root=None, split=None): pass
    def __len__(self): return 40
    def __getitem__(self, index):
        return np.full((8, 8, 1), index, np.uint8), self.targets[index]

def view(size):
    return v2.Resize((size, size))

class Net(nn.Sequential):
    preprocessing = {{"size": 8, "mean": [0.5], "std": [0.5]}}
    def __init__(self, classes):
        super().__init__(nn.Flatten(), nn.Linear(64, classes))
        nn.init.constant_(self[1].weight, 0.01)
        nn.init.zeros_(self[1].bias)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Stores and runs that name the module `strange`, made by somebody who named it."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "code").mkdir()
    (folder / "code" / "strange.py").write_text(CODE.format(marker=str(folder / "imported")))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder / "code")
        mlp = write_teacher(folder / "mlp", seed=1)
        write_store(folder / "source.zarr", mlp, source=open_source("python:strange:Data"))
        (folder / "view.yaml").write_text("ops: [{op: pipeline, factory: 'strange:view'}]\n")
        write_store(folder / "view.zarr", mlp, view=str(folder / "view.yaml"))
        digits = open_source("digits")
        own = TeacherRunner(load_teacher("python:strange:Net", digits.class_names, weights="own"))
        run_job(Job(folder / "teacher.zarr", digits, view_recipe("digits"), own, 1))
        train(make_recipe(student="python:strange:Net", limit=50), folder / "student", device=CPU)
        named = {"source": "python:strange:Data:train", "evaluation": "python:strange:Data:test"}
        train(make_recipe(**named), folder / "run", device=CPU)
        grid = {"base": {"student": "digits-small", "stores": ["source.zarr"]}, "grid": {"seed": [0]}}
        (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
        yield folder
    sys.modules.pop("strange", None)


@pytest.fixture
def call(folder, monkeypatch):
    """Run a line in a process that has not imported the module; returns the result and whether it did."""
    monkeypatch.chdir(folder)

    def call(line):
        sys.modules.pop("strange", None)
        (folder / "imported").unlink(missing_ok=True)
        command, *words = shlex.split(line)
        result = CliRunner().invoke({"distill": distill, "precompute": precompute}[command], words)
        return result, (folder / "imported").exists()

    return call


TRAIN = "distill train --student digits-small --epochs 1 --limit 32 --out new"
STORED = [
    (f"{TRAIN} --store source.zarr", "store 'source.zarr'", "python:strange:Data:train"),
    (f"{TRAIN} --store view.zarr", "store 'view.zarr'", "python:strange:view"),
    (f"{TRAIN} --store teacher.zarr --online", "store 'teacher.zarr'", "python:strange:Net"),
    ("distill sweep grid.yaml --out new", "store 'source.zarr'", "python:strange:Data:train"),
    ("distill eval student", "run 'student'", "python:strange:Net"),
    ("distill eval run", "run 'run'", "python:strange:Data:test"),
    ("precompute verify --store source.zarr --content", "the store", "python:strange:Data:train"),
    ("precompute verify --store view.zarr --content", "the store", "python:strange:view"),
    ("precompute verify --store teacher.zarr --deep 3", "store 'teacher.zarr'", "python:strange:Net"),
    ("precompute inspect source.zarr --out new.png", "store 'source.zarr'", "python:strange:Data:train"),
    ("precompute inspect view.zarr --out new.png", "store 'view.zarr'", "python:strange:view"),
    ("precompute run --teacher run:student --source digits --view digits --views 1 --store new.zarr",
     "run 'student'", "python:strange:Net"),
    ("precompute plan --teacher run:student --source digits --view digits --views 1 --store new.zarr",
     "run 'student'", "python:strange:Net"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "holder", "spec"), STORED)
def test_what_a_file_names_is_not_imported(folder, call, line, holder, spec):
    result, imported = call(line)
    assert (result.exit_code, imported) == (1, False), result.output
    said = (
        f"Error: {holder} names Python code that would be imported and run: '{spec}', from module 'strange'."
    )
    assert said in result.stderr
    assert "--trust-code" in result.stderr
    assert not [path for path in folder.iterdir() if path.name.startswith("new")]


@pytest.mark.parametrize("line", [STORED[index][0] for index in (0, 2, 4, 5, 6, 8, 9)])
def test_what_is_trusted_is_run(folder, call, tmp_path, line):
    result, imported = call(f"{line.replace('new', str(tmp_path / 'new'))} --trust-code")
    assert (result.exit_code, imported) == (0, True), result.output


@pytest.mark.parametrize("store", ["source", "view"])
def test_verify_checks_the_bytes_and_says_what_it_left_out(call, store):
    result, imported = call(f"precompute verify --store {store}.zarr")
    assert (result.exit_code, imported) == (0, False), result.output
    assert "the views are not checked: the store names Python code" in result.stderr
    assert f"{store}.zarr: sound" in result.stdout
    result, imported = call(f"precompute verify --store {store}.zarr --trust-code")
    assert (result.exit_code, imported, "not checked" in result.stderr) == (0, True, False)


@pytest.mark.parametrize(
    "words",
    [
        "--store source.zarr --source python:strange:Data",
        "--store view.zarr --view view.yaml",
        "--source python:strange:Data --view digits",
    ],
)
def test_what_the_command_names_is_run(call, tmp_path, words):
    result, imported = call(f"{TRAIN.replace('new', str(tmp_path / 'new'))} {words}")
    assert (result.exit_code, imported) == (0, True), result.output
    # So is what a recipe names, that of a run's folder too.
    result, imported = call(f"distill train {tmp_path / 'new' / 'recipe.yaml'} --out {tmp_path / 'again'}")
    assert (result.exit_code, imported) == (0, True), result.output


def test_in_python_too(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for store in ("source.zarr", "view.zarr"):
        with pytest.raises(UntrustedCode, match=f"store '{store}' names Python code"):
            open_teacher_stores([store])
    with pytest.raises(PermissionError, match="trust_code=True in Python"):
        load_teacher("run:student", open_source("digits").class_names)
    assert open_teacher_stores(["view.zarr"], trust_code=True).view == ViewRecipe.model_validate(
        yaml.safe_load((folder / "view.yaml").read_text())
    )
    assert isinstance(
        load_teacher("run:student", tuple("0123456789"), trust_code=True).module, torch.nn.Sequential
    )
