"""The gated fusion: weights and gradients against float64 references, what trains it, labels, training."""

import numpy as np
import pytest
import torch
from builders import CPU, loss_inputs, made_up_batch, make_recipe
from reference import methods as ref
from reference.loss import soft_target_loss as reference_loss

from coursepack.distill.fusion.gated import Gated
from coursepack.distill.losses.base import BuildContext
from coursepack.distill.objective import Objective
from coursepack.distill.recipe import resolve_objective
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.targets.base import Targets
from coursepack.distill.training.loop import train_epoch
from coursepack.distill.training.state import make_state
from coursepack.errors import RecipeError, TrainingDiverged
from coursepack.kernels import MixedLabels

N, C, K, D = 8, 5, 3, 4
LEARNED = ("embedding", "latents", "shared")


@pytest.fixture
def batch():
    return made_up_batch(N, C, K, D)


def objective_of(method="amtml-gated", **changes):
    """An objective whose latents are large enough for gradients that can be compared."""
    changes["fusion"] = {"name": "gated", "init": 1.0, **changes.get("fusion", {})}
    config = resolve_objective(method, changes, "test", classes=C)
    return Objective(config, BuildContext(teachers=K, embedding_width=D, seed=3))


def evaluated(objective, batch, labels=None):
    """The value on a batch, and the tensors that may have got gradients."""
    student = torch.from_numpy(batch["student"]).float().requires_grad_()
    embedding = torch.from_numpy(batch["embedding"]).float().requires_grad_()
    targets = Targets([torch.from_numpy(each).float().requires_grad_() for each in batch["teachers"]])
    labels = torch.from_numpy(batch["labels"]) if labels is None else labels
    value = objective(loss_inputs(student, labels, targets, embedding=embedding))
    value.loss.backward()
    assert all(logits.grad is None for logits in targets.logits)
    fusion = objective.fusion
    return value, {
        "student": student, "embedding": embedding, "latents": fusion.latents, "shared": fusion.shared
    }  # fmt: skip


def mixture_cross_entropy(weights, teachers, labels):
    """`-log sum_k w_k P_k(y)` of each sample, P_k at T = 1."""
    return np.array(
        [
            -np.log(sum(weights[n, k] * ref.softmax(teachers[k, n])[labels[n]] for k in range(len(teachers))))
            for n in range(len(labels))
        ]
    )


def references(objective, batch):
    """The divergence and the gate's loss as functions of what they may train, with the values of it."""
    config = objective.config
    given = {
        "embedding": batch["embedding"],
        "latents": objective.fusion.latents.detach().double().numpy(),
        "shared": objective.fusion.shared.detach().double().numpy(),
        "student": batch["student"],
    }

    def weights_of(values):
        return ref.adaptive_weights(values["embedding"], values["latents"], values["shared"])

    def divergence(values, weights=None):
        soft = reference_loss(
            values["student"], batch["teachers"], batch["labels"],
            weights=weights_of(values) if weights is None else weights,
            temperature=config.temperature, soft_weight=config.soft_weight, hard_weight=config.hard_weight,
        )  # fmt: skip
        return soft.loss.mean()

    def gate(values):
        return mixture_cross_entropy(weights_of(values), batch["teachers"], batch["labels"]).mean()

    return given, weights_of(given), divergence, gate


def gradient(function, given, name):
    return ref.numeric_gradient(lambda value: function({**given, name: value}), given[name])


@pytest.mark.parametrize("to_student", [False, True])
@pytest.mark.parametrize("divergence_too", [False, True])
def test_loss_and_gradients_are_those_of_the_reference(batch, to_student, divergence_too):
    fusion = {"student_gradient": to_student, "divergence_gradient": divergence_too}
    objective = objective_of(fusion=fusion, terms={"latents": None, "gate": {"weight": 2.0}})
    given, weights, divergence, gate = references(objective, batch)
    value, tensors = evaluated(objective, batch)
    np.testing.assert_allclose(value.weights.numpy(), weights, rtol=1e-4, atol=1e-6)
    assert value.terms["gate"].item() == pytest.approx(2 * gate(given), rel=1e-5)
    assert value.terms["soft_target"].item() == pytest.approx(divergence(given), rel=1e-5)
    for name in LEARNED:
        if name == "embedding" and not to_student:
            assert tensors[name].grad is None
            continue
        want = 2 * gradient(gate, given, name)
        if divergence_too:
            want = want + gradient(divergence, given, name)
        assert np.abs(want).max() > 1e-3, "the gradient that is compared is not zero"
        np.testing.assert_allclose(tensors[name].grad.numpy(), want, rtol=1e-3, atol=1e-4)
    want = gradient(lambda values: divergence(values, weights), given, "student")
    np.testing.assert_allclose(tensors["student"].grad.numpy(), want, rtol=1e-3, atol=1e-5)


def test_the_divergence_alone_trains_nothing_of_the_gate(batch):
    _, tensors = evaluated(objective_of(terms={"latents": None, "gate": {"weight": 0.0}}), batch)
    assert tensors["student"].grad.abs().max() > 0
    assert all(tensors[name].grad is None for name in LEARNED)


def test_the_fusion_brings_the_term_that_trains_it(batch):
    value, tensors = evaluated(objective_of("kd", terms={}), batch)
    assert list(value.terms) == ["soft_target", "gate"]
    assert tensors["latents"].grad.abs().max() > 0
    assert "gate" not in resolve_objective("kd", {}, "test").all_terms()
    labels_alone = {"soft_weight": 0.0, "fusion": {"name": "gated"}}
    assert not resolve_objective("kd", labels_alone, "test").needs().teachers, "nothing is fused"


def test_the_term_needs_the_fusion(batch):
    config = resolve_objective("kd", {"terms": {"gate": {}}}, "test")
    with pytest.raises(RecipeError, match="'gate' trains fusion 'gated', but this objective has another"):
        Objective(config)(
            loss_inputs(
                torch.from_numpy(batch["student"]).float(),
                torch.from_numpy(batch["labels"]),
                Targets([torch.from_numpy(each).float() for each in batch["teachers"]]),
            )
        )


def test_mixed_labels_are_weighted_by_their_shares(batch):
    second, lam = (batch["labels"] + 1) % C, np.linspace(0, 1, N)
    mixed = MixedLabels(
        torch.from_numpy(batch["labels"]), torch.from_numpy(second), torch.from_numpy(lam).float()
    )
    objective = objective_of()
    value, _ = evaluated(objective, batch, mixed)
    weights = references(objective, batch)[1]
    first, other = (
        mixture_cross_entropy(weights, batch["teachers"], ids) for ids in (batch["labels"], second)
    )
    want = (lam * first + (1 - lam) * other).mean()
    assert value.terms["gate"].item() == pytest.approx(want, rel=1e-5)


def test_a_sample_without_a_label_trains_nothing(batch):
    objective = objective_of(terms={"latents": None})
    value, tensors = evaluated(objective, batch, torch.full((N,), -100))
    assert value.terms["gate"].item() == 0
    assert tensors["latents"].grad.abs().max() == 0


def test_teachers_that_are_sure_and_wrong_give_finite_losses_and_gradients(batch):
    """Probabilities of the label that are zero in float32, for one teacher or for all."""
    wrong = (batch["labels"][None, :, None] + 1) % C == np.arange(C)
    for sharp in (1, K):
        teachers = batch["teachers"].copy()
        teachers[:sharp] = 1e4 * wrong
        value, tensors = evaluated(objective_of(), {**batch, "teachers": teachers})
        assert value.loss.isfinite()
        assert value.terms["gate"] > 0
        assert all(tensors[name].grad.isfinite().all() for name in ("student", "latents", "shared"))


def test_a_student_that_diverged_is_told_so(batch):
    broken = {**batch, "embedding": np.full((N, D), np.nan)}
    with pytest.raises(TrainingDiverged, match="a teacher's weight is not finite"):
        evaluated(objective_of(), broken)


def test_the_gate_prefers_the_teacher_that_knows_the_labels(batch):
    """The divergence prefers the one that the student resembles; here it is the only right one that gains."""
    right = 6.0 * np.eye(C)[batch["labels"]]
    teachers = np.stack([batch["student"], right, np.zeros((N, C))])
    objective = objective_of(fusion={"init": 0.1}, terms={"latents": None})
    optimizer = torch.optim.SGD(objective.fusion.parameters(), lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        value, _ = evaluated(objective, {**batch, "teachers": teachers, "embedding": np.ones((N, D))})
        optimizer.step()
    assert value.weights[:, 1].min() > 0.8


def test_a_gate_is_trained_with_a_student_from_stores(stores):
    run = prepare(make_recipe(stores, method="amtml-gated", limit=100), CPU)
    state = make_state(run)
    fusion = state.learner.objective.fusion
    assert isinstance(fusion, Gated)
    before = fusion.latents.detach().clone()
    metrics = train_epoch([state], run.batches(0), run.targets)[0]
    assert metrics["gate"] > 0
    assert not torch.equal(fusion.latents, before)
    assert "objective.fusion.latents" in state.state()["learner"], "a checkpoint has it"


def test_angles_and_hints_are_options(tapped):
    objective = {"terms": {"angle": {}, "hint": {"weight": 0.01}}}
    recipe = make_recipe(tapped, method="amtml-gated", objective=objective, student="digits-cnn", limit=64)
    run = prepare(recipe, CPU)
    metrics = train_epoch([make_state(run)], run.batches(0), run.targets)[0]
    assert {"soft_target", "latents", "angle", "hint", "gate"} <= metrics.keys()
