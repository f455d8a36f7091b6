"""Errors of fields with several types name the field and what it takes, without pydantic's own words."""

import re
from typing import Annotated, Literal

import pytest
from click.testing import CliRunner
from pydantic import Field

from coursepack.config import Config, OneOf, parse_config
from coursepack.distill.cli import main as distill
from coursepack.errors import RecipeError, UnknownName, nearest


class Curve(Config):
    shape: Literal["linear", "step"]
    end: Annotated[float, Field(ge=0)] = 1.0


class Circle(Config):
    name: Literal["circle"] = "circle"
    radius: Annotated[float, Field(ge=0)] | Curve = 1.0


class Box(Config):
    name: Literal["box"] = "box"
    side: int = 1


Kind = Literal["none", "shift"]


class Both(Config):
    weight: Annotated[float, Field(ge=0)] | Curve | None = 1.0
    kinds: Kind | tuple[Kind, ...] = "none"
    count: int | None = None
    figure: Annotated[Circle, OneOf("name", {"circle": Circle})] = Circle()
    figures: dict[str, Annotated[Circle, OneOf("name", {"circle": Circle})]] = Field(default={})
    pair: tuple[int | str, bool | Curve] = (1, True)
    shapes: tuple[Annotated[Circle | Box, Field(discriminator="name")], ...] = ()


CASES = [
    ({"weight": "fast"}, "weight: expected a number or a mapping with shape, end, got 'fast'"),
    ({"weight": [1]}, "weight: expected a number or a mapping with shape, end, got [1]"),
    ({"weight": -1}, "weight: expected at least 0, got -1"),
    ({"weight": {"shap": "step"}},
     "weight.shape: is missing\n  weight.shap: unknown key, did you mean 'shape'?"),
    ({"weight": {"shape": "step", "end": -1}},
     "weight.end: expected at least 0, got -1"),
    ({"weight": {"shape": "sine"}}, "weight.shape: expected 'linear' or 'step', got 'sine'"),
    ({"kinds": "shfit"}, "kinds: expected 'none' or 'shift' or a list, got 'shfit'"),
    ({"kinds": ["none", "shfit"]}, "kinds.1: expected 'none' or 'shift', got 'shfit'"),
    ({"count": "few"},
     "count: expected an integer, got 'few'"),
    ({"figure": {"name": "circle", "radius": "wide"}},
     "figure.radius: expected a number or a mapping with shape, end, got 'wide'"),
    ({"figures": {"a": {"name": "circle", "radius": -2}}},
     "figures.a.radius: expected at least 0, got -2"),
    ({"shapes": [{"name": "circle", "radius": "wide"}, {"name": "box", "side": "long"}]},
     "shapes.0.radius: expected a number or a mapping with shape, end, got 'wide'\n"
     "  shapes.1.side: expected an integer, got"),
    ({"pair": [None, "perhaps"]},
     "pair.0: expected an integer or text, got null\n"
     "  pair.1: expected true or false or a mapping with shape, end, got 'perhaps'"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "text"), CASES)
def test_errors_of_unions(values, text):
    with pytest.raises(RecipeError) as caught:
        parse_config(Both, values, "a.yaml")
    assert str(caught.value).startswith(f"a.yaml is not valid:\n  {text}")


@pytest.mark.parametrize(
    ("assignment", "text"),
    [
        ("objective.hard_weight=fast",
         "objective.hard_weight: expected a number or a mapping with shape, start, end, epochs, got"),
        ("objective.hard_weight=-1",
         "objective.hard_weight: expected at least 0, got -1"),
        ("objective.temperature={shape: warmp, start: 4, epochs: 3}",
         "objective.temperature.shape: expected 'warmup', 'ramp', 'cosine' or 'step', got 'warmp'"),
        ("objective.temperature=0", "objective.temperature: expected more than 0, got 0"),
        ("objective.adjustment=[shfit]",
         "objective.adjustment.0: expected 'none', 'shift' or 'smooth', got"),
        ("objective.terms={hint: {weight: much}}",
         "objective.terms.hint.weight: expected a number or"),
        ("objective.peers={hard_weight: much}", "peers.hard_weight: expected a number or a mapping"),
    ],
)  # fmt: skip
def test_a_wrong_assignment_names_its_field(tmp_path, assignment, text):
    words = ["train", "--student", "digits-small", "--source", "digits", "--view", "digits"]
    result = CliRunner().invoke(distill, [*words, "--out", str(tmp_path / "new"), "--set", assignment])
    assert result.exit_code == 1
    assert text in result.stderr
    assert not re.search(r"constrained|function-|instance of|\[|Schedule", result.stderr.partition("got")[0])


@pytest.mark.parametrize(
    ("name", "known", "near"),
    [
        ("foo", ["uniform", "fixed"], None),
        ("zzz", ["none"], None),
        ("unifrom", ["uniform", "fixed"], "uniform"),
        ("digit", ["none", "digits"], "digits"),
        ("", ["a"], None),
    ],
)
def test_suggestions_are_similar(name, known, near):
    assert nearest(name, known) == near
    assert ("Did you mean" in str(UnknownName("name", name, known))) == (near is not None)


def test_a_fusion_that_is_nothing_like_another_gets_no_suggestion(tmp_path):
    words = ["train", "--student", "digits-small", "--source", "digits", "--view", "digits"]
    words += ["--out", str(tmp_path / "new"), "--set", "objective.fusion.name=foo"]
    said = CliRunner().invoke(distill, words).stderr
    assert "objective.fusion: unknown name 'foo', expected one of 'fixed', 'uniform'" in said
    assert "did you mean" not in said.lower()
