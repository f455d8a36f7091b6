"""Recipes of earlier versions: finished runs still open, and an old key names the new one."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from coursepack.distill.cli import main as distill
from coursepack.distill.renamed import RENAMED, upgrade_recipe
from coursepack.distill.runs.folder import load_run
from coursepack.models import load_teacher

OLD = Path(__file__).parent / "golden" / "run-v1"


def test_a_finished_run_of_an_earlier_version_is_read():
    recipe = load_run(OLD).recipe
    assert recipe.optimizer.lr == 0.01
    objective = recipe.objective
    assert (objective.fusion.name, objective.soft_weight) == ("adaptive", 0.14)
    weights = {key: term.weight for key, term in objective.terms.items()}
    assert weights == {"angle": 1.0, "distance": 2.0, "latents": 0.1}


def test_it_is_evaluated_compared_and_a_teacher():
    result = CliRunner().invoke(distill, ["eval", str(OLD)])
    assert result.exit_code == 0, result.output
    assert CliRunner().invoke(distill, ["compare", str(OLD)]).exit_code == 0
    assert load_teacher(f"run:{OLD}", tuple("0123456789")).classes == 10


def test_hints_and_given_weights_are_carried_over():
    old = {
        "objective": {
            "fusion": {"name": "fixed", "l2": 0.1, "layer": None},
            "teacher_weights": [1.0, 2.0],
            "relations": {"angle": 0.0, "distance": 0.0, "student": "probs"},
            "hints": {"weight": 0.5, "pairs": []},
            "term": {},
            "term_weight": 1.0,
        }
    }
    objective = upgrade_recipe(old)["objective"]
    assert objective["fusion"] == {"name": "fixed", "weights": [1.0, 2.0]}
    assert objective["terms"] == {"hint": {"weight": 0.5, "pairs": []}}


@pytest.mark.parametrize("old", [key for key in RENAMED if "term" not in key])
def test_an_old_key_in_a_recipe_names_the_new_one(tmp_path, old):
    words = ["train", "--student", "digits-small", "--source", "digits", "--view", "digits"]
    result = CliRunner().invoke(distill, [*words, "--set", f"{old}=1", "--out", str(tmp_path / "o")])
    assert result.exit_code == 1
    assert f"{old}: now {RENAMED[old]}" in result.stderr
    assert not (tmp_path / "o").exists()
