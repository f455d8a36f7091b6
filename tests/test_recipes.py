"""Every recipe in recipes/ runs on made-up data, and says where its figures and its teachers are from."""

import functools
import re
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from coursepack.config import description_at
from coursepack.distill.cli import main as distill
from coursepack.distill.recipe import LearningRateConfig, OptimizerConfig, TrainRecipe, load_recipe
from coursepack.distill.runs.folder import load_run, load_runs
from coursepack.models import build_network, parse_tap
from coursepack.precompute.cli import main as precompute

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "chains")
UNRUN = [path for path in RECIPES if path.parent.name != "digits"]
BY_DEFAULT = [path for path in RECIPES if path not in UNRUN or path.stem == "supervised"]
RUNS = [path if path in BY_DEFAULT else pytest.param(path, marks=pytest.mark.integration) for path in RECIPES]
LEAST = 30


def name_of(path):
    return f"{path.parent.name}-{path.stem}"


def commands(path):
    """What the commands in a recipe's comment are parsed to: `(name, values)` of each, loops written out."""
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    lines = [re.sub(r"^# *(?:(?:Run|Stores?):)? *", "", line) for line in comment]
    found = []
    for line in re.sub(r"\s*\\\n", " ", "\n".join(lines)).splitlines():
        loop = re.fullmatch(r"for (\w+) in (.*?); do (.*); done", line)
        each = [loop[3].replace(f"${loop[1]}", word) for word in loop[2].split()] if loop else [line]
        for command in each:
            program, _, name = command.partition(" ")
            if (program, name.split(" ")[0]) in {("distill", "train"), ("precompute", "run")}:
                _, name, *words = shlex.split(command)
                group = distill if program == "distill" else precompute
                found.append((name, group.commands[name].make_context(name, words).params))
    return found


def trained(path):
    """The networks that the commands of a recipe train, by the folder of the run."""
    found = {}
    for name, values in commands(path):
        if name == "train":
            said = load_recipe(ROOT / values["recipe_file"]) | dict(
                assignment.split("=", 1) for assignment in values["assignments"]
            )
            found[values["out"].as_posix()] = (*values["student"], said.get("student"))[0]
    return found


@functools.cache
def layers(spec):
    """Names of a network's layers; a network that does not exist raises."""
    with torch.device("meta"):  # without values
        return {name for name, _ in build_network(spec, 10).module.named_modules()}


def test_there_are_recipes_for_every_source():
    assert len(RECIPES) >= LEAST
    assert {path.parent.name for path in RECIPES} == {"digits", "cifar100", "cinic10", "tiny-imagenet"}


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_recipes_run(path, tmp_path):
    result = CliRunner().invoke(distill, ["train", str(path), "--smoke", "--out", str(tmp_path / "o")])
    assert result.exit_code == 0, result.output
    run = load_runs(tmp_path / "o")[0]
    assert run.recipe.source.startswith("fake,")
    assert len(run.metrics) == max(2, run.recipe.objective.fusion.fewest_epochs(len(run.recipe.stores)))
    values = load_recipe(path)
    assert run.recipe.method == values["method"]
    assert len(run.recipe.stores) == len(values.get("stores", ()))


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipes_say_whether_they_were_run(path):
    comment = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    place = path.relative_to(ROOT).as_posix()
    assert f"distill train {place}" in comment
    assert ("NOT RUN HERE" in comment) != ("Expected on the 355 test digits" in comment)
    assert "@@" not in comment


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_networks_that_a_recipe_names_exist(path):
    text = path.read_text()
    named = {load_recipe(path)["student"], *re.findall(r"(?:--student |\bstudent=)([\w:-]*\w)", text)}
    named |= {peer for peer in load_recipe(path).get("peers", ()) if not peer.startswith("run:")}
    named |= set(trained(path).values()) if path in UNRUN else set()
    for spec in named:
        assert "head" in layers(spec) or "fc" in layers(spec), spec


@pytest.mark.parametrize("path", UNRUN, ids=name_of)
def test_the_commands_of_a_recipe_make_its_stores_from_teachers_that_are_trained(path):
    values, makers = load_recipe(path), trained(path.with_name("supervised.yaml"))
    own = path.relative_to(ROOT).as_posix()
    made = {}
    for name, said in commands(path):
        if name == "train":
            assert said["recipe_file"].as_posix() == own
            assert said["root"] == f"data/{'cifar' if path.parent.name == 'cifar100' else path.parent.name}"
            continue
        assert (said["source_spec"], said["view"]) == (values["source"].partition(":")[0], values["view"])
        run, _, epoch = said["teacher"].removeprefix("run:").partition("@")
        network = makers[run]
        taps = {parse_tap(tap) for tap in said["taps"]}
        assert {layer for tap in taps for layer in tap.layers} <= layers(network)
        store = said["store"].as_posix()
        kept = [name for name in values["stores"] if name.startswith(f"{store}/epoch-")]
        made |= {name: {tap.name for tap in taps} for name in (kept if epoch == "all" else [store])}
    assert trained(path), "no command trains the student"
    assert set(values.get("stores", ())) <= set(made)
    for pair in values.get("objective", {}).get("hints", {}).get("pairs", ()):
        assert pair["tap"] in made[values["stores"][pair["teacher"]]]
        assert pair["layer"] in layers(values["student"])


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


def test_a_smoke_run_goes_through_every_phase_in_two_epochs(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "student: digits-cnn\nsource: digits\nview: digits\nepochs: 90\npatience: 9\nevaluate_every: 30\n"
        "batch_size: 512\naccumulate: 64\n"
        "optimizer: {schedule: {shape: step, milestones: [30, 60], warmup_epochs: 5}}\n"
    )
    words = ["train", str(tmp_path / "r.yaml"), "--smoke", "--out", str(tmp_path / "o")]
    result = CliRunner().invoke(distill, words)
    assert result.exit_code == 0, result.output
    run = load_run(tmp_path / "o")
    assert [set(line["evaluation"]) >= {"accuracy"} for line in run.metrics] == [True, True]
    schedule = run.recipe.optimizer.schedule
    assert (schedule.milestones, schedule.warmup_epochs, run.recipe.patience) == ((1,), 1.0, 1)


@pytest.mark.parametrize("path", UNRUN, ids=name_of)
def test_learning_rates_fall_within_the_epochs(path):
    values = load_recipe(path)
    assert max(values["optimizer"]["schedule"]["milestones"]) < values["epochs"]


def table_of_fields(heading):
    """Rows of docs/training.md after `heading`: field, flag, default, description."""
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    text = page.partition(heading)[2].partition("\n\nThe following options")[0]
    rows = [line.split("|")[1:5] for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip(" `") for cell in row] for row in rows]


def test_the_page_on_training_knows_the_fields_flags_and_defaults():
    recipe = TrainRecipe.model_validate(
        {"student": "s", "objective": {}, "source": "a", "evaluation": "b", "view": {}}
    )
    flags = {name for option in distill.commands["train"].params for name in option.opts}
    rows = table_of_fields("**how long**")  # fields whose default is a number or a word
    assert len(rows) > 20
    words = {"none": None, "all": None, "never": None, "": (), "true": True, "false": False}
    for field, flag, default, _ in rows:
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
    listed = {field for field, *_ in rows}
    config, schedule = OptimizerConfig.model_fields, LearningRateConfig.model_fields
    assert {f"optimizer.{name}" for name in config if name != "schedule"} <= listed
    assert {f"optimizer.schedule.{name}" for name in schedule} <= listed


def test_the_page_on_training_describes_the_fields_as_the_help_does():
    rows = table_of_fields("## Fields")
    described = {field: text for field, _, _, text in rows}
    fields = {field: description_at(TrainRecipe, field) for field in described}
    assert described == {field: " ".join(text.split()) for field, text in fields.items()}
    tops = {field.partition(".")[0] for field in described}
    assert tops == set(TrainRecipe.model_fields)
