"""Every chain in recipes/ is planned on made-up data and says whether it was run; those of the digits run."""

import re
from pathlib import Path

import pytest
from builders import CPU
from click.testing import CliRunner

from coursepack.config import write_yaml
from coursepack.data.sources import evaluation_spec
from coursepack.data.sources.fake import stand_in
from coursepack.distill.cli import main as distill
from coursepack.distill.recipe import load_recipe
from coursepack.distill.runs.chain.plan import plan_chain

ROOT = Path(__file__).parents[1]
CHAINS = sorted((ROOT / "recipes").rglob("chains/*.yaml"))
DIGITS = [path for path in CHAINS if path.parents[1].name == "digits"]


def name_of(path):
    return f"{path.parents[1].name}-{path.stem}"


def test_there_are_chains_of_every_kind():
    kinds = {"takd", "born-again", "label-refinery", "tf-kd-self", "pro-kd"}
    for source in ("digits", "cifar100"):
        assert {path.stem for path in CHAINS if path.parents[1].name == source} >= kinds


@pytest.mark.parametrize("path", CHAINS, ids=name_of)
def test_chains_are_planned(path, tmp_path):
    values = load_recipe(path)
    source = stand_in(values["base"]["source"], 16)
    values["base"] |= {"source": source, "evaluation": evaluation_spec(source), "root": None}
    (tmp_path / "c.yaml").write_text(write_yaml(values))
    stages = plan_chain(tmp_path / "c.yaml", tmp_path / "o", device=CPU)
    assert [stage.name for stage in stages] == [stage["name"] for stage in values["stages"]]
    assert sorted(tmp_path.iterdir()) == [tmp_path / "c.yaml"]
    for stage in stages:
        assert stage.train is None or not stage.train.stores or stage.train.method != "supervised"


@pytest.mark.parametrize("path", CHAINS, ids=name_of)
def test_chains_say_whether_they_were_run(path):
    comment = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert f"distill chain {path.relative_to(ROOT).as_posix()} --out" in comment
    assert ("NOT RUN HERE" in comment) == (path not in DIGITS)
    assert ("Expected on the 355 test digits" in comment) == (path in DIGITS)


@pytest.mark.parametrize("path", CHAINS, ids=name_of)
def test_no_student_of_a_chain_sees_a_view_twice_in_published_settings(path):
    values = load_recipe(path)
    if path not in DIGITS:
        views = {stage["precompute"]["views"] for stage in values["stages"] if "precompute" in stage}
        assert views == {values["base"]["epochs"]}


@pytest.mark.slow
@pytest.mark.parametrize("path", DIGITS, ids=name_of)
def test_chains_of_the_digits_run(path, tmp_path):
    values = load_recipe(path)
    for stage in values["stages"]:
        if "train" in stage:
            stage["train"]["limit"] = 40
            if "keep_checkpoints" not in stage["train"]:  # whose epochs other stages name
                stage["train"]["epochs"] = max(1, len(stage["train"].get("stores", [])))
        elif "precompute" in stage:
            stage["precompute"]["views"] = 1
    (tmp_path / "c.yaml").write_text(write_yaml(values))
    words = ["chain", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "o"), "--device", "cpu"]
    result = CliRunner().invoke(distill, words)
    assert result.exit_code == 0, result.output
    named = set(re.findall(r"[\w-]+", result.stdout))
    assert {stage["name"] for stage in values["stages"] if "precompute" not in stage} <= named
