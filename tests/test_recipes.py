"""Every recipe in recipes/ runs on made-up data, and says where its figures are from."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from coursepack.distill.cli import main as distill
from coursepack.distill.learning_rate import LearningRateConfig
from coursepack.distill.optimiser import OptimiserConfig
from coursepack.distill.recipe import TrainRecipe, load_recipe
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


def table_of_fields():
    """Rows of docs/training.md's table of fields: field, flag, default."""
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    rows = [line.split("|")[1:4] for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip(" `") for cell in row] for row in rows]


def test_the_page_on_training_knows_the_fields_flags_and_defaults():
    recipe = TrainRecipe.model_validate(
        {"student": "s", "objective": {}, "source": "a", "evaluation": "b", "view": {}}
    )
    flags = {name for option in distill.commands["train"].params for name in option.opts}
    rows = table_of_fields()
    assert len(rows) > 20
    words = {"none": None, "all": None, "never": None, "": (), "true": True, "false": False}
    for field, flag, default in rows:
        value = recipe
        for part in field.split("."):
            value = getattr(value, part)
        if default in words:
            assert value == words[default], field
        elif isinstance(value, tuple):
            assert default == ", ".join(map(str, value)), field
        else:
            assert default == (f"{value:g}" if isinstance(value, float) else str(value)), field
        assert not flag or flag in flags, field
    told = {field for field, _, _ in rows}
    config, schedule = OptimiserConfig.model_fields, LearningRateConfig.model_fields
    assert {f"optimiser.{name}" for name in config if name != "schedule"} <= told
    assert {f"optimiser.schedule.{name}" for name in schedule} <= told
