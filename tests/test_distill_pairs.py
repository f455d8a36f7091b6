"""Default pairs of taps and student layers, and the taps that a refusal proposes."""

import shlex

import numpy as np
import pytest
from builders import CPU, make_recipe, write_store, write_teacher
from click.testing import CliRunner

from coursepack.data import open_source, view_recipe
from coursepack.data.store import StoreReader
from coursepack.data.views.mixing import Mix
from coursepack.distill.cli import main as distill
from coursepack.distill.methods import METHODS
from coursepack.distill.recipe import resolve_objective
from coursepack.distill.setup.costs import planned_store
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.setup.requirements import check_needs, term_pairs
from coursepack.distill.training.loop import train_epoch
from coursepack.distill.training.state import make_state
from coursepack.errors import RecipeError
from coursepack.models import build_network
from coursepack.precompute.cli import main as precompute


def pairs_of(method, teacher, student):
    """Pairs that are chosen for a store that is not written yet."""
    objective = METHODS[method].objective
    found = term_pairs(objective, [planned_store(teacher, 10, 4)], build_network(student, 10))[method]
    return [(tap.partition("@")[0], layer) for _, tap, layer in found]


def test_layers_are_paired_by_map_size_where_they_cannot_be_by_depth():
    """Maps of wrn-16-2 have 32, 32, 16, 8 and 8 positions a side, those of resnet32x4 32, 32, 16 and 8."""
    stages = [(layer, layer) for layer in ("stem", "layer1", "layer2", "layer3")]
    assert pairs_of("at", "resnet32x4", "resnet8x4") == stages
    assert pairs_of("at", "resnet32x4", "wrn-16-2") == [*stages, ("layer3", "norm")]
    assert pairs_of("at", "wrn-40-2", "wrn-16-2") == [*stages, ("norm", "norm")]
    assert pairs_of("fsp", "vgg13", "resnet8x4") == [
        ("layer1+layer2", "layer1+layer2"), ("layer2+layer3", "layer2+layer3")
    ], "the flow of other channels is left out"  # fmt: skip
    # No flow has the student's channels, as in the papers' tables: those by depth are refused.
    assert len(pairs_of("fsp", "resnet32x4", "wrn-16-2")) == 4


def test_attention_of_a_teacher_with_fewer_blocks(tmp_path):
    source = open_source("fake,classes=10,size=32,samples=24")
    teacher = write_teacher(tmp_path / "resnet8", "resnet8")
    store = write_store(tmp_path / "resnet8.zarr", teacher, source=source, view="none")
    fields = {"student": "wrn-16-2", "source": source.name, "evaluation": source.name, "batch_size": 12}
    with pytest.raises(RecipeError, match="features that are not stored") as refusal:
        prepare(make_recipe([store], method="at", **fields), CPU)
    line = str(refusal.value).splitlines()[-1]
    assert CliRunner().invoke(precompute, shlex.split(line)[1:]).exit_code == 0
    run = prepare(make_recipe([store], method="at", **fields), CPU)
    state = make_state(run)
    assert [pair.layer for pair in state.learner.objective.context.pairs_by_term["at"]][-1] == "norm"
    assert train_epoch([state], run.batches(0), run.targets)[0]["at"] > 0


@pytest.mark.parametrize("method", ["you17", "crd", "rkd"])
def test_vectors_are_not_to_be_pooled(tmp_path, teachers, method):
    """The line of the refusal is one that stage one accepts: only maps are pooled."""
    names = ("mlp", "cnn", "resnet")
    stores = [
        write_store(tmp_path / f"{name}.zarr", teacher, views=1)
        for name, teacher in zip(names, teachers, strict=True)
    ]
    fields = {"method": method, "student": "digits-cnn", "limit": 64}
    with pytest.raises(RecipeError, match="features that are not stored") as refusal:
        prepare(make_recipe(stores, **fields), CPU)
    lines = [line for line in str(refusal.value).splitlines() if line.startswith("  precompute run")]
    assert [line.rpartition("--tap ")[2] for line in lines] == ["hidden2", "hidden", "layer2:pooled"]
    words = [word for store in stores for word in ("--store", str(store))]
    assert CliRunner().invoke(distill, ["methods", method, *words]).exit_code == 0
    for line in lines:
        result = CliRunner().invoke(precompute, shlex.split(line)[1:])
        assert result.exit_code == 0, result.output
    run = prepare(make_recipe(stores, **fields), CPU)
    assert np.isfinite(train_epoch([make_state(run)], run.batches(0), run.targets)[0]["loss"])


@pytest.mark.parametrize(
    ("method", "advice"),
    [
        ("crd", "Use stores of a view without mix"),
        ("dkd", "Use stores of a view without mix"),
        ("ka-ps", "Use stores of a view without mix, or --set objective.adjustment=none"),
    ],
)
def test_advice_for_mixed_images_is_of_what_helps(tapped, method, advice):
    reader = StoreReader(tapped[0])
    mixed = view_recipe("digits").model_copy(update={"mix": Mix(mixup_alpha=1.0)})
    objective = resolve_objective(method, {"adjustment": "shift"}, "test", classes=10)
    with pytest.raises(RecipeError, match=rf"a mixed image has two labels. {advice}$"):
        check_needs(method, objective, [reader], mixed, None)
