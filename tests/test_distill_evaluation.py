"""`distill eval`: of a group, every student and their ensembles are evaluated as in the last epoch."""

import json

import pytest
import torch
from builders import CPU, make_recipe
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from coursepack.distill.cli import main
from coursepack.distill.runs.folder import EXCHANGE_FILE, load_runs
from coursepack.distill.runs.train import train


def evaluated(folder, *words):
    """Exit status and output of `distill eval`."""
    result = CliRunner().invoke(main, ["eval", str(folder), "--device", "cpu", *words])
    assert result.exit_code == 0 or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout or result.stderr


def trained(folder, method, **fields):
    train(make_recipe(method=method, limit=100, **fields), folder, device=CPU)
    return folder


@pytest.mark.parametrize(
    ("method", "ensembles"),
    [("dml", []), ("one", ["gated"]), ("ffl", ["fused"]), ("okddip", []), ("codistillation", [])],
)
def test_a_group_is_evaluated_as_in_its_last_epoch(tmp_path, method, ensembles):
    folder = trained(tmp_path / "o", method, optimizer={"lr": 0.02, "ema": 0.9}, epochs=2)
    status, output = evaluated(folder, "--json")
    assert status == 0, output
    rows, runs = json.loads(output), load_runs(folder)
    assert [row.get("ensemble", "") for row in rows] == [run.ensemble for run in runs]
    assert [run.ensemble for run in runs if run.ensemble] == [*ensembles, "ensemble"]
    for row, run in zip(rows, runs, strict=True):
        assert (row["run"], row["source"]) == (str(run.path), "digits:test")
        for name, value in run.metrics[-1]["evaluation"].items():
            assert row[name] == pytest.approx(value, rel=1e-6), (run.ensemble or run.path, name)


def test_each_student_and_ensemble_has_a_line(tmp_path):
    folder = trained(tmp_path / "o", "one")
    status, output = evaluated(folder, "--source", "digits:train")
    assert status == 0, output
    names = [f"{folder}/0", f"{folder}/1", f"{folder} gated", f"{folder} ensemble"]
    assert [line.split(": accuracy ")[0] for line in output.splitlines()] == names
    assert all(line.endswith("on digits:train, 1,442 samples") for line in output.splitlines())
    _, alone = evaluated(folder / "1", "--source", "digits:train")
    assert alone in output


def test_an_exchange_that_does_not_fit_is_refused(tmp_path):
    folder = trained(tmp_path / "o", "one")
    file = folder / EXCHANGE_FILE
    weights = load_file(file)
    save_file({**weights, "linear.weight": torch.zeros(7, 7)}, file)
    status, output = evaluated(folder)
    assert status == 1
    assert f"Error: weights '{file}' are not of exchange 'gate' between these students" in output
    file.write_bytes(b"\1" * 100)
    assert "Error: the weights of exchange 'gate' cannot be read" in evaluated(folder)[1]
    file.unlink()
    status, output = evaluated(folder)
    assert (status, output.strip()) == (
        1,
        f"Error: the weights of exchange 'gate' cannot be read: there are no weights at '{file}'",
    )


def test_an_unfinished_student_is_refused(tmp_path):
    folder = trained(tmp_path / "o", "dml")
    (folder / "1" / "student.safetensors").unlink()
    status, output = evaluated(folder)
    assert status == 1
    assert f"run '{folder / '1'}' is unfinished" in output
