"""The forms of born-again networks: labels weighted by the teacher's confidence, and permuted predictions."""

import numpy as np
import pytest
import torch
from builders import CPU, make_recipe
from reference import logits as ref
from reference.methods import numeric_gradient

from coursepack.distill.losses.base import BuildContext, LossInputs, Step, StudentOutput
from coursepack.distill.losses.born_again import permuted_probs
from coursepack.distill.methods import METHODS
from coursepack.distill.objective import Objective
from coursepack.distill.recipe import resolve_objective
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.targets.base import Targets
from coursepack.distill.training.loop import train_epoch
from coursepack.distill.training.state import make_state
from coursepack.errors import RecipeError
from coursepack.kernels import MixedLabels

N, C, K = 6, 5, 2
SAMPLES = np.array([3, 1, 4, 15, 9, 2])
WEIGHTS = [0.3, 0.7]
METHODS_HERE = ("born-again-cwtm", "born-again-dkpp")


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return rng.normal(0, 2, (N, C)), rng.normal(0, 3, (K, N, C)), rng.integers(0, C, N)


def value_of(student, teachers, labels, method, *, epoch=0, samples=SAMPLES, **changes):
    """Value of a method's objective, and the student's logits that receive its gradient."""
    config = resolve_objective(method, {"fusion": {"weights": WEIGHTS}, **changes}, "test", classes=C)
    objective = Objective(config, BuildContext(K, classes=C, seed=3))
    logits = torch.from_numpy(student).requires_grad_()
    targets = Targets([torch.from_numpy(teacher) for teacher in teachers])
    labels = labels if isinstance(labels, MixedLabels) else torch.as_tensor(labels)
    value = objective(LossInputs(StudentOutput(logits), labels, targets, Step(epoch), samples))
    value.loss.backward()
    return value.loss.item(), logits.grad


def mixture(teachers, temperature=1.0):
    return ref.mixture(teachers, np.tile(WEIGHTS, (N, 1)), temperature)


def check(reference, value, gradient, student):
    """Loss and gradient are those of a reference."""
    assert value == pytest.approx(reference(student).mean(), rel=1e-5)
    want = numeric_gradient(lambda logits: reference(logits).mean(), student)
    np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_labels_are_weighted_by_the_teachers_confidence(batch):
    student, teachers, labels = batch
    value, gradient = value_of(*batch, "born-again-cwtm")
    check(lambda z: ref.confident_label(z, mixture(teachers), labels), value, gradient, student)
    sure = np.stack([40.0 * np.eye(C)[labels]] * K)
    plain = torch.nn.functional.cross_entropy(torch.from_numpy(student), torch.from_numpy(labels)).item()
    assert value_of(student, sure, labels, "born-again-cwtm")[0] == pytest.approx(plain, rel=1e-5)


def test_mixed_labels_are_weighted_alike(batch):
    student, teachers, labels = batch
    second, lam = (labels + 1) % C, np.linspace(0.1, 0.9, N)
    mixed = MixedLabels(torch.from_numpy(labels), torch.from_numpy(second), torch.from_numpy(lam).float())
    probs = mixture(teachers)
    first, other = (ref.confident_label(student, probs, ids) for ids in (labels, second))
    value = value_of(student, teachers, mixed, "born-again-cwtm")[0]
    assert value == pytest.approx((lam * first + (1 - lam) * other).mean(), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_predictions_are_permuted(batch, temperature):
    student, teachers, _ = batch
    probs = mixture(teachers, temperature)
    shuffled = permuted_probs(torch.from_numpy(probs), 3, SAMPLES, 2).numpy()
    value, gradient = value_of(*batch, "born-again-dkpp", epoch=2, temperature=temperature)
    check(lambda z: ref.divergence(z, shuffled, temperature), value, gradient, student)


def test_a_permutation_keeps_the_top_class_and_is_of_its_sample_and_epoch():
    probs = torch.rand(N, 7, dtype=torch.float64).softmax(1)
    once = permuted_probs(probs, 1, SAMPLES, 0)
    top = probs.argmax(1)
    assert torch.equal(once.argmax(1), top)
    assert torch.equal(once.amax(1), probs.amax(1))
    assert torch.equal(once.sort(1).values, probs.sort(1).values)
    assert not torch.equal(once, probs)
    assert not torch.equal(once, permuted_probs(probs, 1, SAMPLES, 1))
    assert not torch.equal(once, permuted_probs(probs, 2, SAMPLES, 0))
    order = [4, 0, 5, 2, 1, 3]
    assert torch.equal(permuted_probs(probs[order], 1, SAMPLES[order], 0), once[order])


def test_permutations_are_uniform():
    """Every class other than the top one receives each of the probabilities equally often."""
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).expand(6000, -1)
    shuffled = permuted_probs(probs, 0, np.arange(6000), 0)
    for held in (0, 2, 3):
        for value in (0.1, 0.2, 0.3):
            share = (shuffled[:, held] == torch.tensor(value)).double().mean().item()
            assert share == pytest.approx(1 / 3, abs=0.03)


def test_what_they_read():
    cwtm, dkpp = (METHODS[name].objective.needs() for name in METHODS_HERE)
    assert cwtm.labels
    assert cwtm.whole_batch == ("confident_label",)
    assert not dkpp.labels
    assert not dkpp.whole_batch
    assert cwtm.logits
    assert dkpp.logits


def test_permutations_need_the_indices_of_the_samples(batch):
    with pytest.raises(RecipeError, match=r"^term 'permuted' draws a permutation for each sample, but "):
        value_of(*batch, "born-again-dkpp", samples=None)


@pytest.mark.parametrize("method", METHODS_HERE)
def test_a_student_is_trained(stores, method):
    setup = prepare(make_recipe(stores[:1], method=method, limit=128, optimizer={"lr": 0.01}), CPU)
    state = make_state(setup)
    told = [train_epoch([state], setup.batches(epoch), setup.targets)[0] for epoch in range(3)]
    losses = [epoch["loss"] for epoch in told]
    assert losses[-1] < losses[0]
