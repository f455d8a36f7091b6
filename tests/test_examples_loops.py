"""Loops of one's own, and other people's trainers: step by step the losses of `distill train`."""

import importlib.util
import json
import re
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner
from spawned import run

from coursepack.data import Renderer, epoch_order, subset
from coursepack.distill import Learner, Objective, ObjectiveConfig, open_teacher_stores
from coursepack.distill.cli import main as distill

ROOT = Path(__file__).parents[1]


def example(name):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses_of_the_command(stores, method, epochs, out, monkeypatch):
    """Every step's loss as `distill train` has it, and what it says of the epochs."""
    losses, forward = [], Objective.forward

    def spy(self, inputs):
        value = forward(self, inputs)
        losses.append(value.loss.item())
        return value

    words = ["train", "--student", "digits-small", "--method", method, "--epochs", epochs, "--seed", 3]
    words += ["--lr", 0.05, "--momentum", 0.9, "--weight-decay", 5e-4, "--batch-size", 64, "--out", out]
    words += [word for store in stores for word in ("--store", store)]
    with monkeypatch.context() as patch:
        patch.setattr(Objective, "forward", spy)
        result = CliRunner().invoke(distill, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return losses, [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# A plain one; weights that are learned; a teacher drawn for each batch; features of the teachers.
@pytest.mark.parametrize("method", ["kd", "amtml", "random", "amtml-hints"])
def test_a_loop_of_ones_own_has_the_losses_of_the_command(tapped, method, tmp_path, monkeypatch):
    wanted, told = losses_of_the_command(tapped, method, 3, tmp_path / "run", monkeypatch)
    assert example("own_loop").train(tapped, method, epochs=3, seed=3) == wanted
    assert len(wanted) == 3 * 23
    assert sum(wanted[-23:]) < 0.9 * sum(wanted[:23]), "nothing was learned, so equality says little"
    sizes = [64] * 22 + [1442 - 22 * 64]
    last = sum(loss * size for loss, size in zip(wanted[-23:], sizes, strict=True)) / 1442
    assert told[-1]["train"]["loss"] == pytest.approx(last, rel=1e-5)


@pytest.mark.integration
# Lightning 2.6 itself calls what torch 2.15 deprecates.
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:The `srun` command is available")  # on machines with Slurm
@pytest.mark.parametrize("method", ["kd", "amtml"])
def test_lightning_has_the_losses_of_the_command(tapped, method, tmp_path, monkeypatch):
    wanted, _ = losses_of_the_command(tapped, method, 3, tmp_path / "run", monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert example("lightning_module").train(tapped, method, epochs=3, seed=3) == wanted


@pytest.mark.integration
@pytest.mark.parametrize("method", ["kd", "amtml"])
def test_the_hugging_face_trainer_has_the_losses_of_the_command(tapped, method, tmp_path, monkeypatch):
    wanted, _ = losses_of_the_command(tapped, method, 3, tmp_path / "run", monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert example("hf_trainer").train(tapped, method, epochs=3, seed=3) == wanted


def test_the_loop_runs_as_a_script(tapped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("script", ROOT / "examples" / "own_loop.py", *tapped)
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"kd: 46 steps, loss \d\.\d{4} to \d\.\d{4}\n", result.stdout)
    assert not list(tmp_path.iterdir()), "it writes nothing"


@pytest.mark.integration
@pytest.mark.parametrize("name", ["lightning_module", "hf_trainer"])
def test_other_peoples_trainers_run_as_scripts(tapped, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["script", ROOT / "examples" / f"{name}.py", *tapped, "--method", "amtml-hints"]
    result = run(*words, before=warnings.resetwarnings)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^amtml-hints: 46 steps, loss \d+\.\d{4} to \d+\.\d{4}$", result.stdout, re.M), (
        result.stdout
    )


def test_the_page_shows_the_loop_as_it_is():
    text = (ROOT / "examples" / "own_loop.py").read_text()
    imports = text[text.index("import torch\n") : text.index("def train(")]
    loop = text[text.index("def train(") : text.index("\n\n\ndef main")]
    page = (ROOT / "docs" / "library.md").read_text()
    assert f"```python\n{imports}{loop}\n```\n" in page
    body = [line.strip() for line in loop.splitlines()[1:]]
    count = sum(1 for line in body if line and not line.startswith("#"))
    assert count < 25
    assert f"{count} lines (the body of the function, without comments and blank lines)" in page


def test_the_other_code_of_the_page_runs(tapped):
    page = (ROOT / "docs" / "library.md").read_text()
    loop, network, images = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {"teachers": open_teacher_stores(tapped), "views": [0], "Renderer": Renderer}
    names["order"] = epoch_order(subset(names["teachers"].source, limit=None), seed=0, epoch=0)
    for code in (loop, network, images):
        exec(code, names)
    logits = Learner(names["student"], Objective(ObjectiveConfig())).predict(names["batch"]).logits
    assert logits.shape == (1442 % 64, 10)
