"""Every recipe in recipes/ runs on made-up data, and says where its figures are from."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from coursepack.distill.cli import main as distill
from coursepack.distill.recipe import load_recipe
from coursepack.distill.run_folder import load_run

RECIPES = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))
LEAST = 25


def test_there_are_recipes_for_every_source():
    assert len(RECIPES) >= LEAST
    assert {path.parent.name for path in RECIPES} == {"digits", "cifar100", "cinic10", "tiny-imagenet"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipes_run(path, tmp_path):
    result = CliRunner().invoke(distill, ["train", str(path), "--smoke", "--out", str(tmp_path / "o")])
    assert result.exit_code == 0, result.output
    run = load_run(tmp_path / "o")
    assert run.recipe.source.startswith("fake,")
    assert len(run.metrics) == 2
    values = load_recipe(path)
    assert run.recipe.method == values["method"]
    assert len(run.recipe.stores) == len(values.get("stores", ()))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipes_say_whether_they_were_run(path):
    comment = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    place = path.relative_to(path.parents[2]).as_posix()
    assert f"distill train {place}" in comment
    assert ("NOT RUN HERE" in comment) != ("Expected on the 355 test digits" in comment)
    assert "@@" not in comment


def test_a_smoke_run_is_the_same_every_time(tmp_path):
    recipe = RECIPES[-1].parents[1] / "digits" / "amtml-hints.yaml"
    told = []
    for name in ("a", "b"):
        words = ["train", str(recipe), "--smoke", "--out", str(tmp_path / name)]
        assert CliRunner().invoke(distill, words).exit_code == 0
        told.append([{**line, "seconds": 0} for line in load_run(tmp_path / name).metrics])
    assert told[0] == told[1]


def test_a_smoke_run_needs_nothing_that_a_recipe_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(
        "student: digits-cnn\nsource: imagenet:train\nroot: /nowhere\nview: digits\nstores: [no.zarr]\n"
        "student_size: 8\nmethod: amtml\nobjective:\n  soft_weight: {shape: cosine, end: 0.5, epochs: 90}\n"
    )
    result = CliRunner().invoke(distill, ["train", "r.yaml", "--smoke", "--out", "o"])
    assert result.exit_code == 0, result.output
    assert load_run(tmp_path / "o").recipe.objective.soft_weight.epochs == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o", "r.yaml"]
