"""Wrong values of every field of a recipe: texts name the field, in words of neither pydantic nor Python."""

import json
import re
import subprocess
import sys
from typing import Annotated, get_args, get_origin

import pytest
import yaml
from click.testing import CliRunner

from coursepack.config import check_given
from coursepack.distill.cli import main as distill
from coursepack.distill.methods import METHODS
from coursepack.distill.recipe import TrainRecipe, objective_values
from coursepack.distill.recipe_names import wrong_names
from coursepack.distill.setup.resolve import resolve_recipe
from coursepack.errors import CoursepackError, RecipeError
from coursepack.models import build_network
from coursepack.problems import EXPECTED
from coursepack.unions import OneOf, models_of

WRONG = ["zzz", -3, 0.5, 1e400, None, True, [[]], ["zzz", -1], {"zzz": 1}, {"name": "zzz"}]
FOREIGN = re.compile(
    r"constrained|function-|\[key\]|should|unable to parse|Field required|tagged|union|instance of|type=|"
    r"https?://|NoneType|<class|Value error|valid (string|integer|number)|tuple|dict\b|pydantic"
)


def families_of(annotation):
    """Families of configs and unions with tags in an annotation: the tag's key, and configs by tag."""
    if isinstance(annotation, OneOf):
        return [(annotation.key, annotation.members)]
    found = [family for inner in get_args(annotation) for family in families_of(inner)]
    for mark in getattr(annotation, "__metadata__", ()):
        if isinstance(mark, OneOf):
            found.append((mark.key, mark.members))
        elif key := getattr(mark, "discriminator", None):
            members = get_args(get_args(annotation)[0])
            found.append((key, {each.model_fields[key].default: each for each in members}))
    return found


def places(model):
    """Functions that put a value into one field of a config, for all fields at any depth."""
    for name, field in model.model_fields.items():
        yield name, lambda value, name=name: {name: value}
        annotation = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        kinds = [field.annotation, *get_args(field.annotation)]
        in_mapping = any(get_origin(each) is dict for each in kinds)
        in_list = any(get_origin(each) is tuple for each in kinds)
        families = families_of(annotation)

        def inside(value, name=name, in_mapping=in_mapping, in_list=in_list):
            return {name: {"one": value} if in_mapping else [value] if in_list else value}

        for key, members in families:
            for tag, member in members.items():
                for path, put in places(member):
                    if path.split(".")[0] != key:
                        yield (
                            f"{name}.{path}",
                            lambda value, put=put, key=key, tag=tag, inside=inside: inside(
                                {key: tag, **put(value)}
                            ),
                        )
        if not families:
            for inner in models_of(field):
                for path, put in places(inner):
                    yield f"{name}.{path}", lambda value, put=put, inside=inside: inside(put(value))


PLACES = list(places(TrainRecipe))


def test_all_fields_are_found():
    found = {path for path, _ in PLACES}
    expected = {
        "epochs",
        "optimizer.schedule.shape",
        "objective.soft_weight.shape",
        "objective.fusion.weights",
    }
    assert expected | {"objective.terms.weight", "view.ops.padding", "view.seed"} <= found
    assert len(PLACES) > 300


@pytest.mark.parametrize("wrong", WRONG, ids=json.dumps)
def test_wrong_values_are_refused_in_plain_words(wrong):
    refused = 0
    for path, put in PLACES:
        try:
            check_given(TrainRecipe, put(wrong), "here")
        except RecipeError as error:
            refused += 1
            text = str(error).replace("text of the form", "")
            said = re.sub(r"got .*", "", text)
            assert not FOREIGN.search(said), (path, text)
            assert path.partition(".")[0] in text, (path, text)
    assert refused > len(PLACES) / 4


def refusal(values):
    """Text with which the full check refuses a recipe's values."""
    objective = values.get("objective")
    if isinstance(objective, dict):
        values = values | {"objective": objective_values("kd", objective, classes=1)}
    try:
        check_given(TrainRecipe, values, "here")
    except RecipeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("wrong", ["zzz", {"zzz": 1}, {"name": "zzz"}, None], ids=json.dumps)
def test_wrong_names_are_found_without_the_configs_in_the_same_words(wrong):
    found = 0
    for path, put in PLACES:
        lines = wrong_names(put(wrong), "kd")
        found += bool(lines)
        assert not lines or refusal(put(wrong)) == "\n  ".join(["here is not valid:", *lines]), path
    assert (found > 5) == (wrong is not None)


@pytest.mark.parametrize("method", METHODS)
def test_the_fields_of_all_methods_have_right_names(method):
    values = json.loads(json.dumps({"objective": objective_values(method, {}, classes=10), "zzz": 1}))
    assert wrong_names(values, method) == ["zzz: unknown key"]


@pytest.mark.parametrize("wrong", ["zzz", "-3", "[[]]", "{zzz: 1}"])
def test_wrong_values_on_the_command_line(tmp_path, wrong):
    fields = [
        path for path, _ in PLACES if not path.startswith(("objective.terms", "view", "student", "root"))
    ]
    plain = [path for path in fields if path.partition(".")[0] in ("epochs", "optimizer", "seed", "patience")]
    for path in plain:
        words = ["train", "--student", "digits-small", "--source", "nothing", "--out", str(tmp_path / "new")]
        result = CliRunner().invoke(distill, [*words, "--set", f"{path}={wrong}"])
        assert result.exit_code == 1
        assert result.stdout == ""
        assert not FOREIGN.search(re.sub(r"got .*", "", result.stderr)), result.stderr
    assert not (tmp_path / "new").exists()


def test_expectations_are_in_plain_words():
    assert not any(FOREIGN.search(text) for text in EXPECTED.values())


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"optimizer": {"name": "adam"}},
         "optimizer.name: expected 'sgd' or 'adamw', got 'adam', did you mean 'adamw'?"),
        ({"objective": {"terms": {"Hint": {"weight": 1}}}}, "objective.terms.Hint: "),
        ({"objective": {"fusion": {"layer": "a"}}}, "objective.fusion.layer: unknown key of 'fixed'"),
        ({"objective": {"hard_weight": "foo"}},
         "objective.hard_weight: expected a number or a mapping with shape, "),
        ({"source": None}, "source: expected text, got null"),
        ({"compile": "perhaps"}, "compile: expected true or false, got 'perhaps'"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas.1: is missing"),
        ({"optimizer": {"betas": [0.9, 0.9, 0.9]}}, "optimizer.betas: expected 2 or fewer entries, got "),
        ({"seed": 1 << 63}, "seed: expected less than 9223372036854775808, got 9223372036854775808"),
        ({"epochs": 2.5}, "epochs: expected an integer, got 2.5"),
    ],
)  # fmt: skip
def test_texts(values, text):
    with pytest.raises(RecipeError) as caught:
        check_given(TrainRecipe, values, "here")
    assert f"\n  {text}" in str(caught.value)


WRONG_NAMES = {
    "method": {"method": "kdd"},
    "field": {"optimzer": {"lr": 0.1}, "epochs": 3},
    "fields": {"optimizer": {"lrr": 0.1, "name": "adam"}, "objective": {"temprature": 2}, "zzz": 1},
    "fusion": {"method": "kd", "objective": {"fusion": {"name": "confidnce"}}},
    "fields of a family": {"method": "dkd", "objective": {"terms": {"dkd": {"alfa": 1, "zzz": 2}}}},
    "term": {"objective": {"terms": {"hnt": {"weight": 1}}}},
    "renamed field": {"optimiser": {"lr": 0.1}},
    "op": {"view": {"ops": [{"op": "pad_crp", "padding": 1}]}},
    "view": {"view": "cifr"},
    "source": {"source": "digts:train"},
    "student": {"student": "digits-smal"},
}
"""Fields of recipes with wrong names."""
ALL_REFUSED = """
import sys
from pathlib import Path

from coursepack.distill.cli import main

for file in sorted(Path().glob("*.yaml")):
    try:
        main(["train", str(file), "--out", "run"])
    except SystemExit as end:
        assert end.code == 1
    assert not {"torch", "numpy", "zarr"} & set(sys.modules), file
"""


def test_wrong_names_in_recipe_files_are_refused_without_torch_and_in_the_same_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = []
    for number, fields in enumerate(WRONG_NAMES.values()):
        values = {"student": "digits-small", "source": "digits", "view": "digits", **fields}
        file = f"{number:02}.yaml"
        (tmp_path / file).write_text(yaml.safe_dump(values))
        with pytest.raises(CoursepackError) as full:
            build_network(resolve_recipe(values, file).student, 10)
        expected.append(f"Error: {full.value}\n")
    command = [sys.executable, "-c", ALL_REFUSED]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "".join(expected))


@pytest.mark.parametrize("method", [[], {}, ["kd"], 3])
def test_a_method_that_is_no_text_is_refused_beside_an_objective(method):
    values = {"student": "digits-small", "source": "digits", "view": "digits", "method": method}
    with pytest.raises(RecipeError, match="method"):
        resolve_recipe(values | {"objective": {"soft_weight": 1}}, "here")
