"""Teachers that know different classes: unified targets against references, refusals, and training."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from builders import CPU, loss_inputs, make_recipe, write_known
from click.testing import CliRunner
from reference import unify as ref
from reference.loss import soft_target_loss as reference_loss
from reference.methods import softmax

from coursepack.distill.cli import main as distill
from coursepack.distill.fusion.class_sets import linked_teachers
from coursepack.distill.fusion.unify import Unify, UnifyConfig
from coursepack.distill.losses.base import BuildContext
from coursepack.distill.objective import Objective
from coursepack.distill.recipe import resolve_objective
from coursepack.distill.runs.folder import load_run
from coursepack.distill.runs.train import train
from coursepack.distill.setup.build import make_objective
from coursepack.distill.setup.describe import warnings_of
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.targets.base import Targets
from coursepack.distill.targets.teacher_stores import open_teacher_stores
from coursepack.distill.training.loop import train_epoch
from coursepack.distill.training.state import make_state
from coursepack.errors import RecipeError
from coursepack.models import build_network

N, C = 5, 7
SETS = {
    "ring": ((0, 1, 2, 3), (3, 4, 5), (5, 6, 0)),
    "chain": ((0, 1), (1, 2, 3), (3, 4, 5, 6)),
    "nested": ((0, 1, 2, 3, 4, 5, 6), (1, 2), (2, 5, 6)),
    "full": ((0, 1, 2, 3, 4, 5, 6),) * 3,
}
REFERENCES = {
    "cross_entropy": ref.cross_entropy,
    "factorization": ref.factorization,
    "logit_factorization": ref.logit_factorization,
    "mean": ref.mean,
}
SOLVED = ("cross_entropy", "factorization", "logit_factorization")
EQUAL = 1e6
"""Ridge that keeps the scales of teachers equal."""


def drawn(known, *, scale=2.0, seed=0):
    """Logits `(N, C_k)` of each teacher."""
    rng = np.random.default_rng(seed)
    return [rng.normal(0, scale, (N, len(classes))) for classes in known]


def unified(form, known, logits, temperature=1.0):
    """The unified probabilities `(N, C)`."""
    fusion = Unify(UnifyConfig(form=form), known, C)
    found = fusion.unify([torch.from_numpy(each) for each in logits], temperature)
    assert found.isfinite().all()
    probs = (found / temperature).softmax(1).numpy()
    np.testing.assert_allclose(probs.sum(1), 1)
    return probs


@pytest.mark.parametrize("form", REFERENCES)
@pytest.mark.parametrize("sets", SETS)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_unified_targets_are_those_of_a_general_optimizer(form, sets, temperature):
    known = SETS[sets]
    logits = drawn(known)
    found = unified(form, known, logits, temperature)
    for row in range(N):
        teachers = [
            dict(zip(classes, softmax(each[row], temperature), strict=True))
            for classes, each in zip(known, logits, strict=True)
        ]
        np.testing.assert_allclose(found[row], REFERENCES[form](teachers, C), atol=2e-6)


@pytest.mark.parametrize("form", SOLVED)
@pytest.mark.parametrize("sets", SETS)
@pytest.mark.parametrize("scale", [0.1, 3.0, 10.0])
def test_teachers_that_agree_give_back_what_they_were_taken_from(form, sets, scale):
    whole = np.random.default_rng(3).normal(0, scale, (N, C))
    logits = [whole[:, list(classes)] + 5.0 * k for k, classes in enumerate(SETS[sets])]
    want = np.array([softmax(row) for row in whole])
    np.testing.assert_allclose(unified(form, SETS[sets], logits), want, atol=1e-6)
    if sets != "full":
        assert np.abs(unified("mean", SETS[sets], logits) - want).max() > 0.01, "the mean does not"


@pytest.mark.parametrize("form", REFERENCES)
def test_the_order_of_the_teachers_does_not_matter(form):
    known = SETS["ring"]
    logits = drawn(known)
    there, back = unified(form, known, logits), unified(form, known[::-1], logits[::-1])
    np.testing.assert_allclose(back, there, atol=1e-9)


@pytest.mark.parametrize("form", REFERENCES)
def test_one_teacher_of_all_classes_gives_itself_back(form):
    (logits,) = drawn(SETS["full"][:1])
    want = np.array([softmax(row, 3.0) for row in logits])
    for known in ((range(C),), ()):
        np.testing.assert_allclose(unified(form, known, [logits], 3.0), want, rtol=1e-9)
    order = np.random.default_rng(1).permutation(C)
    np.testing.assert_allclose(unified(form, (order,), [logits], 3.0)[:, order], want, rtol=1e-9)


@pytest.mark.parametrize("form", REFERENCES)
@pytest.mark.parametrize("sets", SETS)
@pytest.mark.parametrize("scale", [30.0, 1e3, 1e5])
def test_peaked_rows_stay_finite(form, sets, scale):
    known = SETS[sets]
    logits = drawn(known, scale=scale)
    logits[0][0] = 0.0
    logits[0][0, 0] = scale
    unified(form, known, logits)


def test_groups_of_teachers_are_found_through_others():
    assert linked_teachers([(0, 1), (2, 3), (1, 2)]) == [[0, 1, 2]]
    assert linked_teachers([(0, 1), (4, 5), (1, 2), (5, 6)]) == [[0, 2], [1, 3]]


def test_sets_that_leave_something_open_are_refused():
    apart = ((0, 1, 2), (3, 4, 5, 6), (2, 1))
    for form in SOLVED:
        text = r"teachers 0, 2 and 1 \(counted from 0\) have no class in common"
        with pytest.raises(RecipeError, match=text):
            Unify(UnifyConfig(form=form), apart, C)
    Unify(UnifyConfig(form="mean"), apart, C)
    for form in REFERENCES:
        with pytest.raises(RecipeError, match="no teacher knows class 3, 6 of the source's 7"):
            Unify(UnifyConfig(form=form), ((0, 1, 2), (2, 4, 5)), C)


# Logits


def unified_logits(known, logits, temperature=1.0, **fields):
    """The unified logits `(N, C)` of the factorization of logits, with mean zero."""
    fusion = Unify(UnifyConfig(form="logit_factorization", **fields), known, C)
    found = fusion.unify([torch.from_numpy(each) for each in logits], temperature)
    assert found.isfinite().all()
    return centered(found.numpy())


def centered(logits):
    return logits - logits.mean(1, keepdims=True)


@pytest.mark.parametrize("sets", SETS)
@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_logits_of_teachers_that_agree_are_given_back_at_every_temperature(sets, temperature):
    whole = np.random.default_rng(3).normal(0, 5, (N, C))
    logits = [whole[:, list(classes)] + 5.0 * k for k, classes in enumerate(SETS[sets])]
    np.testing.assert_allclose(unified_logits(SETS[sets], logits, temperature), centered(whole), atol=1e-9)


@pytest.mark.parametrize("sets", SETS)
def test_neither_a_temperature_nor_constants_change_the_unified_logits(sets):
    known, rng = SETS[sets], np.random.default_rng(4)
    logits = drawn(known)
    want = unified_logits(known, logits)
    np.testing.assert_allclose(unified_logits(known, logits, 7.0), want, atol=1e-5)
    moved = [each + rng.normal(0, 9, (N, 1)) for each in logits]
    np.testing.assert_allclose(unified_logits(known, moved), want, atol=1e-5)
    back = unified_logits(known[::-1], logits[::-1])
    np.testing.assert_allclose(back, want, atol=1e-5)


def test_teachers_of_other_scales_are_brought_to_their_mean():
    whole = np.random.default_rng(5).normal(0, 3, (N, C))
    logits = [scale * whole for scale in (0.5, 1.0, 1.5)]
    np.testing.assert_allclose(unified_logits(SETS["full"], logits), centered(whole), rtol=1e-6)
    known = ((0, 1, 2, 3, 4), (2, 3, 4, 5, 6), (0, 1, 3, 5, 6))
    logits = [each[:, list(classes)] for each, classes in zip(logits, known, strict=True)]
    want, errors = centered(whole), []
    for ridge in (0.01, EQUAL):
        found = unified_logits(known, logits, ridge=ridge)
        scales = (found * want).sum(1) / np.square(want).sum(1)
        np.testing.assert_allclose(scales, 1.0, atol=0.3)
        errors.append(np.abs(found / scales[:, None] - want).max())
    assert errors[0] < errors[1] / 10


@pytest.mark.parametrize("sets", SETS)
def test_a_large_ridge_keeps_the_scales_equal_and_no_other_has_longer_logits(sets):
    known = SETS[sets]
    logits = drawn(known)
    cells = [(k, c) for k, classes in enumerate(known) for c in classes]
    design = np.array([np.concatenate([np.eye(C)[c], np.eye(3)[k]]) for k, c in cells])
    want = np.linalg.lstsq(design, np.concatenate(logits, 1).T, rcond=None)[0][:C].T
    want = centered(want)
    np.testing.assert_allclose(unified_logits(known, logits, ridge=EQUAL), want, atol=1e-4)
    lengths = [np.linalg.norm(each, axis=1) for each in (unified_logits(known, logits), want)]
    assert (lengths[0] < lengths[1] * (1 + 1e-9)).all()


def test_a_teacher_that_says_the_opposite_is_left_out():
    whole = np.random.default_rng(6).normal(0, 3, (N, C))
    found = unified_logits(SETS["full"], [whole, -whole, whole])
    cosines = (found * centered(whole)).sum(1) / np.linalg.norm(found, axis=1)
    np.testing.assert_allclose(cosines, np.linalg.norm(centered(whole), axis=1), rtol=1e-3)


@pytest.mark.parametrize("sets", SETS)
def test_rows_without_differences_are_uniform(sets):
    logits = [np.full((N, len(classes)), 3.0 * k) for k, classes in enumerate(SETS[sets])]
    np.testing.assert_allclose(unified_logits(SETS[sets], logits), 0, atol=1e-12)
    logits[1] += np.random.default_rng(7).normal(0, 2, logits[1].shape)
    unified_logits(SETS[sets], logits)


def test_a_ridge_of_zero_is_refused():
    with pytest.raises(RecipeError, match=r"fusion\.ridge: expected more than 0, got 0"):
        resolve_objective("uhc-mf-logits", {"fusion": {"ridge": 0}}, "test", classes=C)


# The objective


@pytest.mark.parametrize(
    ("method", "form"),
    [("uhc-ce", SOLVED[0]), ("uhc-mf", SOLVED[1]), ("uhc-mf-logits", SOLVED[2]), ("uhc-naive", "mean")],
)
def test_the_loss_is_the_divergence_from_the_unified_target(method, form):
    known, student = SETS["ring"], np.random.default_rng(9).normal(0, 2, (N, C))
    logits = drawn(known, scale=4.0)
    objective = Objective(resolve_objective(method, {}, "test", classes=C), BuildContext(3, C, known))
    leaf = torch.from_numpy(student).float().requires_grad_()
    targets = Targets([torch.from_numpy(each).float().requires_grad_() for each in logits])
    value = objective(loss_inputs(leaf, torch.zeros(N, dtype=torch.int64), targets))
    value.loss.backward()
    target = 4.0 * np.log(unified(form, known, logits, 4.0))
    labels = np.zeros(N, dtype=np.int64)
    want = reference_loss(student, target[None], labels, temperature=4.0, soft_weight=1.0, hard_weight=0.0)
    assert value.loss.item() == pytest.approx(want.loss.mean(), rel=1e-5)
    np.testing.assert_allclose(leaf.grad.numpy() * N, want.grad_student, atol=1e-5)
    assert all(each.grad is None for each in targets.logits)
    assert value.targets is targets
    assert value.unified.shape == (N, C)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dynamic_temperature": {"kind": "cwsm"}, "temperature": 10.0}, "a dynamic temperature cannot use"),
        ({"standardize": True}, "standardize cannot use"),
        ({"divergence": "mse"}, "divergence 'mse' cannot use"),
        ({"adjustment": ["shift", "none", "none"]}, "an adjustment for each teacher cannot use"),
        ({"terms": {"discriminator": {}}}, "the discriminator cannot use"),
        ({"terms": {"annealed_logits": {}}}, "annealed logits cannot use"),
    ],
)
def test_what_needs_other_than_one_distribution_is_refused(changes, text):
    with pytest.raises(RecipeError, match=f"fusion 'unify' makes one distribution .* which {text}"):
        resolve_objective("uhc-ce", changes, "test", classes=C)


# Stores


@pytest.mark.parametrize("method", ["uhc-ce", "uhc-mf", "uhc-mf-logits", "uhc-naive"])
def test_students_are_trained_from_stores_of_some_classes(thirds, tmp_path, method):
    words = ["train", "--student", "digits-small", "--method", method, "--limit", "130", "--epochs", "2"]
    words += [part for store in thirds for part in ("--store", str(store))]
    result = CliRunner().invoke(distill, [*words, "--lr", "0.1", "--out", str(tmp_path / "o")])
    assert result.exit_code == 0, result.output
    first, last = load_run(tmp_path / "o").metrics
    assert last["train"]["soft_target"] < first["train"]["soft_target"]
    assert last["teachers"]["weight"] == pytest.approx([1 / 3] * 3)
    assert last["teachers"]["kl"] >= 0


def test_live_teachers_give_the_same_targets(thirds):
    losses = []
    for online in (False, True):
        recipe = make_recipe(thirds, method="uhc-ce", limit=64, online=online, batch_size=32)
        run = prepare(recipe, CPU)
        losses.append(train_epoch([make_state(run)], run.batches(0), run.targets)[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_objectives_of_own_loops_know_the_classes(thirds):
    stores, student = open_teacher_stores(thirds), build_network("digits-small", 10)
    objective = make_objective(stores, student, "uhc-ce")
    assert objective.context.known == ((0, 1, 2, 3), (3, 4, 5, 6), (0, 6, 7, 8, 9))


@pytest.mark.parametrize("method", ["kd", "ca-mkd", "best", "dkd", "amtml"])
def test_methods_that_compare_all_classes_name_one_that_does_not(thirds, method):
    text = (
        rf"method '{method}' compares all classes, but the teacher of store '.*' knows [45] of the source's "
        r"10 \([03], .*\)\. Learn from such teachers together with --method uhc-ce"
    )
    with pytest.raises(RecipeError, match=text):
        prepare(make_recipe(thirds, method=method), CPU)


def test_features_of_such_teachers_are_compared_as_any(thirds):
    hints = {
        "soft_weight": 0.0,
        "terms": {"hint": {"pairs": [{"teacher": 0, "tap": "hidden1", "layer": "hidden"}]}},
    }
    run = prepare(make_recipe(thirds, method="kd", objective=hints, limit=64), CPU)
    assert train_epoch([make_state(run)], run.batches(0), run.targets)[0]["hint"] > 0


def test_teachers_without_a_common_class_are_refused_or_warned_of(thirds, teachers, tmp_path):
    apart = [thirds[0], write_known(tmp_path / "rest.zarr", teachers[1], range(4, 10), views=1)]
    with pytest.raises(RecipeError, match=r"teachers 0 and 1 \(counted from 0\) have no class in common"):
        prepare(make_recipe(apart, method="uhc-ce"), CPU)
    with pytest.raises(RecipeError, match="no teacher knows class 7, 8, 9 of the source's 10"):
        prepare(make_recipe(thirds[:2], method="uhc-naive"), CPU)
    recipe = make_recipe(apart, method="uhc-naive")
    (warning,) = warnings_of(recipe, prepare(recipe, CPU).readers)
    assert "the teachers digits-mlp and rest have no class in common" in warning
    recipe = make_recipe(thirds, method="uhc-naive")
    assert warnings_of(recipe, prepare(recipe, CPU).readers) == []


def test_a_report_compares_students_with_what_their_teachers_know(thirds, tmp_path):
    recipe = make_recipe(thirds, method="uhc-ce", limit=64)
    train(recipe, tmp_path / "o", device=CPU)
    words = ["report", str(tmp_path / "o"), "--out", str(tmp_path / "r.html"), "--json"]
    result = CliRunner().invoke(distill, words)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["problems"] == []
