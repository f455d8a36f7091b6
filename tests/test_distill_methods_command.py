"""`distill methods`: filters, evidence, bytes of a view, and the tables of the docs."""

import json
from pathlib import Path

import pytest
from builders import write_store, write_teacher
from click.testing import CliRunner

from coursepack.data.store import load_manifest
from coursepack.distill.cli import main as distill
from coursepack.distill.methods import METHODS
from coursepack.distill.objective_config import ObjectiveConfig
from coursepack.distill.setup.costs import planned_store, view_costs
from coursepack.errors import RecipeError
from coursepack.models import build_network

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"


def printed(*words):
    result = CliRunner().invoke(distill, ["methods", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_page_has_the_tables_that_the_command_prints():
    tables = printed("--markdown")
    assert f"<!-- distill methods --markdown -->\n\n{tables}\n<!-- end -->" in PAGE.read_text(), (
        "put the output of `distill methods --markdown` between the two comments of docs/methods.md"
    )
    assert all(f"\n| `{name}` |" in tables for name in METHODS)


def test_methods_are_filtered_by_need():
    def names(*words):
        return [each["name"] for each in json.loads(printed("--json", *words))]

    assert set(names("--needs", "features")) == {
        name for name, method in METHODS.items() if method.objective.needs().pairs is not None
    }
    assert "amtml-hints" in names("--needs", "features")
    assert "logit-std" in names("--needs", "all-classes", "--needs", "logits")
    assert {"tf-kd", "supervised"} <= set(names()) - set(names("--needs", "logits"))
    assert {"label-refinery", "simkd"}.isdisjoint(names("--needs", "labels"))
    assert names("--needs", "teacher-head") == ["ca-mkd-features", "simkd"]
    listed = printed("--needs", "all-classes")
    assert "logit-std       release             needs logits, all-classes, labels\n" in listed
    assert "dtd-cwsm" not in listed


def test_evidence_and_needs_are_printed():
    text = printed("dkd")
    assert "  evidence  release\n" in text
    assert "one label per sample (no mixed images)" in text
    assert '"weight": {"shape": "warmup", "start": 0.05, "end": 1.0, "epochs": 19}' in text


def hints(tap, layer="conv2"):
    pair = {"teacher": 0, "tap": tap, "layer": layer}
    return ObjectiveConfig.model_validate({"soft_weight": 1.0, "terms": {"hint": {"pairs": [pair]}}})


def test_bytes_of_arrays_that_are_not_stored():
    """Maps of a digits-cnn's conv2 have 32 x 4 x 4 values, and there are ten classes."""
    teacher = planned_store("digits-cnn", 10, 1000)
    for tap, name, size in (
        ("conv2", "features/conv2", 2 * 32 * 16),
        ("conv2:pooled", "features/conv2@pooled", 2 * 32),
        ("conv2:attention", "features/conv2@attention", 2 * 16),
        ("conv2:map:2", "features/conv2@map2", 2 * 32 * 4),
        ("conv2:sign", "features/conv2@sign", 32 * 16 // 8),
    ):
        (cost,) = view_costs(hints(tap), [teacher], build_network("digits-cnn", 10))
        assert cost.arrays == {"logits": 20, name: size}
        assert (cost.samples, cost.read, cost.whole) == (1000, 20 + size, 20 + 2 * 32 * 16)


def test_bytes_of_stores_are_those_of_their_encoding(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    teacher = write_teacher(tmp_path / "cnn", "digits-cnn")
    plain, half = (
        write_store(tmp_path / f"{name}.zarr", teacher, encoding=name) for name in ("float32", "int8")
    )
    text = printed("kd", "--store", str(plain), "--store", str(half), "--json")
    found = json.loads(text)[0]["bytes"]
    samples = load_manifest(plain).samples
    assert [each["arrays_per_sample"] for each in found.values()] == [{"logits": 40}, {"logits": 14}]
    assert [each["per_view"] for each in found.values()] == [40 * samples, 14 * samples]
    assert [each["unreduced_per_view"] for each in found.values()] == [20 * samples] * 2
    table = printed("amtml-hints", "--store", str(plain), "--student", "digits-cnn")
    assert "logits, features/conv2" in table
    assert f"{40 + 2 * 32 * 16:,}" in table
    assert "unreduced, per view" in table


def test_changed_numbers_change_needs_and_bytes(tmp_path):
    store = str(write_store(tmp_path / "cnn.zarr", write_teacher(tmp_path / "cnn", "digits-cnn")))

    def told(name, *assignments):
        words = [word for each in assignments for word in ("--set", each)]
        (found,) = json.loads(printed(name, "--json", "--store", store, "--student", "digits-cnn", *words))
        return found, found["bytes"][store]["arrays_per_sample"]

    assert told("kd")[1] == {"logits": 40}
    hinted, read = told("kd", "objective.terms.hint.weight=0.01", "objective.hard_weight=0")
    assert read == {"logits": 40, "features/conv2": 2 * 32 * 16}
    assert hinted["need_names"] == ["logits", "features"]
    assert (hinted["defaults"]["hard_weight"], hinted["defaults"]["soft_weight"]) == (0, 0.9)
    pairs = "objective.terms.at.pairs=[{teacher: 0, tap: 'conv1:attention:4', layer: conv2}]"
    assert told("at", pairs)[1] == {"features/conv1@attention4": 2 * 16}
    assert told("amtml")[0]["defaults"]["soft_weight"] == "1.4 / C"
    assert told("amtml", "objective.soft_weight=0.5")[0]["defaults"]["soft_weight"] == 0.5
    assert told("best", "objective.fusion.teacher=0")[1] == {"logits": 40}
    text = printed("kd", "--set", "objective.temperature=2")
    assert '  values    {"soft_weight": 0.9, "hard_weight": 0.1, "temperature": 2.0}' in text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["kd", "--set", "batch_size=4"], "--set batch_size: a method is changed by fields of its objective"),
        (
            ["kd", "--set", "objective=4"],
            "--set objective: a method is changed by fields of its objective, as",
        ),
        (["kd", "--set", "objective.softness=4"], "softness"),
        (["kd", "--set", "objective.temperature"], "is not key=value"),
        (["--set", "objective.temperature=4"], "are for one method: name it"),
    ],
)
def test_other_changes_are_refused(words, text):
    result = CliRunner().invoke(distill, ["methods", *words])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert text in result.stderr


def test_bytes_are_for_one_method_of_known_networks(tmp_path):
    result = CliRunner().invoke(distill, ["methods", "--store", "a.zarr"])
    assert result.exit_code == 1
    assert "--store, --student and --set are for one method: name it" in result.stderr
    with pytest.raises(
        RecipeError, match=r"teacher 'python:mine:net' cannot be built here: store the features"
    ):
        view_costs(METHODS["amtml-hints"].objective, [planned_store("python:mine:net", 10, 5)])
    (cost,) = view_costs(METHODS["kd"].objective, [planned_store("python:mine:net", 10, 5)])
    assert cost.read == cost.whole == 20
