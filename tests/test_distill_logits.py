"""Losses on logits: DKD, DIST, standardized logits, Tf-KD and refined labels."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import CPU, loss_inputs, make_recipe, write_store, write_teacher
from reference import logits as ref
from reference.loss import soft_target_loss as reference_loss
from reference.methods import confidence_weights, kl, numeric_gradient, softmax

from coursepack.data import open_source, view_recipe
from coursepack.data.sources import evaluation_spec
from coursepack.distill.fusion.fused import standardized
from coursepack.distill.losses.base import BuildContext, Step
from coursepack.distill.losses.dkd import decoupled_divergences
from coursepack.distill.losses.virtual_teacher import virtual_probs
from coursepack.distill.methods import METHODS
from coursepack.distill.objective import Objective
from coursepack.distill.recipe import resolve_objective
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.setup.requirements import check_needs
from coursepack.distill.targets.base import Targets
from coursepack.distill.training.loop import train_epoch
from coursepack.distill.training.state import make_state
from coursepack.errors import RecipeError
from coursepack.kernels import MixedLabels

N, C, K, D = 6, 5, 3, 4
SINGLE_RANK = {"soft_weight": 0.0, "hard_weight": 0.0}
"""No divergence and no cross-entropy beside the term that is tested."""


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    student, teachers = rng.normal(0, 2, (N, C)), rng.normal(0, 3, (K, N, C))
    return student, teachers, rng.integers(0, C, N)


def value_of(student, teachers, labels, method, step=None, embedding=None, **changes):
    """Value of a method's objective, and the student's logits that receive its gradient."""
    config = resolve_objective(method, changes, "test", classes=C)
    objective = Objective(config, BuildContext(len(teachers), classes=C, embedding_width=D, seed=3))
    logits = torch.from_numpy(student).requires_grad_()
    targets = Targets([torch.from_numpy(teacher) for teacher in teachers]) if len(teachers) else None
    inputs = loss_inputs(logits, torch.as_tensor(labels), targets, embedding=embedding, step=step)
    return objective(inputs), logits, objective


def check(reference, batch, method, **changes):
    """Loss and gradient are those of a reference from the student's logits to values `(N,)`."""
    value, logits, _ = value_of(*batch, method, **changes)
    value.loss.backward()
    assert value.loss.item() == pytest.approx(reference(batch[0]).mean(), rel=1e-5)
    want = numeric_gradient(lambda student: reference(student).mean(), batch[0])
    np.testing.assert_allclose(logits.grad, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
    assert np.abs(want).max() > 1e-4, "the gradient that is compared is not zero"


WEIGHTS = [0.5, 0.2, 0.3]


def fixed(batch, temperature):
    """Mixture of the teachers with the weights `WEIGHTS`."""
    return ref.mixture(batch[1], np.tile(WEIGHTS, (N, 1)), temperature)


FIXED = {"fusion": {"weights": WEIGHTS}}


@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1.0, 8.0, 4.0), (0.3, 2.0, 1.0)])
def test_dkd(batch, alpha, beta, temperature):
    probs = fixed(batch, temperature)
    check(
        lambda student: ref.dkd(student, probs, batch[2], temperature, alpha, beta),
        batch, "dkd", **SINGLE_RANK, **FIXED, temperature=temperature,
        terms={"dkd": {"alpha": alpha, "beta": beta, "weight": 1.0}},
    )  # fmt: skip


def test_dkd_of_standardized_logits(batch):
    probs = ref.mixture(np.array([ref.standardized(t) for t in batch[1]]), np.full((N, K), 1 / K), 2.0)
    check(
        lambda student: ref.dkd(ref.standardized(student), probs, batch[2], 2.0, 1.0, 8.0),
        batch, "dkd", **SINGLE_RANK, temperature=2.0, standardize=True, terms={"dkd": {"weight": 1.0}},
    )  # fmt: skip


def test_dkd_with_the_weights_of_kl_is_kl(batch):
    """KL(P || q) = TCKD + (1 - P_y) NCKD."""
    student, teachers, labels = (torch.as_tensor(each) for each in batch)
    probs = teachers[0].softmax(1)
    target, others = decoupled_divergences(student.log_softmax(1), probs, labels)
    rest = 1 - probs.gather(1, labels[:, None])[:, 0]
    divergence = [kl(p, softmax(z)) for p, z in zip(probs.numpy(), batch[0], strict=True)]
    np.testing.assert_allclose(target + rest * others, divergence, rtol=1e-9)


def test_weights_of_teachers_get_a_gradient_from_dkd_and_dist(batch):
    for term in ("dkd", "dist"):
        embedding = torch.from_numpy(np.random.default_rng(1).normal(size=(N, D))).float()
        changes = {**SINGLE_RANK, "fusion": {"name": "adaptive"}, "terms": {term: {"weight": 1.0}}}
        value, _, objective = value_of(*batch, term, embedding=embedding, **changes)
        value.loss.backward()
        assert objective.fusion.latents.grad.isfinite().all()
        assert objective.fusion.latents.grad.abs().max() > 1e-4


def test_weights_that_do_not_sum_to_one_scale_dkd(batch):
    """As they scale the gradient of the divergence."""

    def loss(*weights):
        return value_of(*batch, "dkd", fusion={"weights": weights}, **SINGLE_RANK)[0].loss.item()

    assert loss(2.0, 4.0, 6.0) == pytest.approx(12 * loss(1 / 6, 1 / 3, 1 / 2), rel=1e-5)


def test_dkd_where_teacher_or_student_is_sure():
    """No infinity and no NaN, as the releases' logarithm of a probability of zero gives."""
    labels = torch.tensor([0, 0, 1, 1])
    student = torch.tensor([[0, 1, 2.0], [1e4, 0, 1], [1e4, 0, 1], [0, 1, 2]]).requires_grad_()
    teacher = torch.tensor([[1e4, 0, 1], [0, 1, 2.0], [0, 1, 2], [1e4, 0, 1]])
    config = resolve_objective("dkd", {}, "test", classes=3)
    loss = Objective(config)(loss_inputs(student, labels, Targets([teacher]))).loss
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_ignored_labels_add_nothing_to_dkd_and_tf_kd(batch):
    student, teachers, labels = batch
    some, none = labels.copy(), np.full(N, -100)
    some[0] = -100
    for method, term in (("dkd", "dkd"), ("tf-kd", "virtual_teacher")):
        changes = {"hard_weight": 0.0, "terms": {term: {"weight": 1.0}}}
        taught = teachers if method == "dkd" else []
        assert value_of(student, taught, none, method, **changes)[0].loss.item() == 0
        value, logits, _ = value_of(student, taught, some, method, **changes)
        value.loss.backward()
        assert (logits.grad.abs().sum(1) > 0).tolist() == [False] + [True] * (N - 1)


def test_dkd_warms_up_as_in_its_release(batch):
    """min(epoch / 20, 1), epochs counted from 1."""
    changes = {"hard_weight": 0.0}
    whole = value_of(*batch, "dkd", Step(100), **changes)[0].loss.item()
    for epoch in (0, 9, 19, 20):
        loss = value_of(*batch, "dkd", Step(epoch), **changes)[0].loss.item()
        assert loss == pytest.approx(min((epoch + 1) / 20, 1) * whole, rel=1e-5)


@pytest.mark.parametrize(
    ("beta", "gamma", "temperature"), [(1.0, 1.0, 4.0), (0.5, 2.0, 1.0), (1.0, 0.0, 2.0)]
)
def test_dist(batch, beta, gamma, temperature):
    probs = fixed(batch, temperature)
    check(
        lambda student: ref.dist(student, probs, temperature, beta, gamma),
        batch, "dist", **SINGLE_RANK, **FIXED, temperature=temperature,
        terms={"dist": {"beta": beta, "gamma": gamma, "weight": 1.0}},
    )  # fmt: skip


def test_dist_without_classes_over_the_batch_is_per_sample():
    def needs(gamma):
        return resolve_objective("dist", {"terms": {"dist": {"gamma": gamma}}}, "test").needs()

    assert needs(1.0).whole_batch == ("dist",)
    assert needs(0.0).whole_batch == ()


def test_a_batch_of_one_and_constant_rows_leave_dist_finite():
    for student in (torch.zeros(1, C), torch.zeros(3, C)):
        logits, teacher = student.requires_grad_(), torch.randn(len(student), C)
        config = resolve_objective("dist", {}, "test", classes=C)
        loss = Objective(config)(
            loss_inputs(logits, torch.zeros(len(logits), dtype=torch.int64), Targets([teacher]))
        ).loss
        loss.backward()
        assert loss.isfinite()
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "js", "mse"])
@pytest.mark.parametrize("fusion", ["fixed", "confidence"])
def test_standardized_logits_with_any_divergence_and_fusion(batch, divergence, fusion):
    _, teachers, labels = batch
    changed = np.array([ref.standardized(teacher) for teacher in teachers])
    weights = confidence_weights(teachers, labels) if fusion == "confidence" else np.full((N, K), 1 / K)
    combine = "sum" if fusion == "confidence" else "mixture"

    def reference(logits):
        soft = reference_loss(
            ref.standardized(logits), changed, labels, weights=weights, temperature=2.0, soft_weight=9.0,
            divergence=divergence, combine=combine,
        )  # fmt: skip
        hard = [-np.log(softmax(row)[label]) for row, label in zip(logits, labels, strict=True)]
        return soft.loss + 0.1 * np.array(hard)

    check(reference, batch, "logit-std", divergence=divergence, fusion={"name": fusion})


def test_standardizing_forgets_scale_and_offset(batch):
    student, teachers, labels = batch
    changes = {"hard_weight": 0.0}
    loss = value_of(student, teachers, labels, "logit-std", **changes)[0].loss.item()
    other = value_of(7 * student - 3, teachers / 5 + 1, labels, "logit-std", **changes)[0].loss.item()
    assert other == pytest.approx(loss, rel=1e-5)
    constant = torch.full((2, C), 3.0).requires_grad_()
    standardized(constant).sum().backward()
    assert constant.grad.isfinite().all()


def test_relations_take_standardized_logits_from_both_sides(batch):
    """A student with the teacher's logits, scaled, has the teacher's angles."""
    _, teachers, labels = batch
    changes = {**SINGLE_RANK, "terms": {"angle": {}}}
    scaled = 5 * teachers[0]
    assert value_of(scaled, teachers[:1], labels, "kd", standardize=True, **changes)[0].loss.item() < 1e-6
    assert value_of(scaled, teachers[:1], labels, "kd", **changes)[0].loss.item() > 1e-3


@pytest.mark.parametrize("softening", ["both", "double_softmax"])
@pytest.mark.parametrize(("confidence", "temperature"), [(0.99, 20.0), (0.9, 1.0)])
def test_virtual_teacher(batch, softening, confidence, temperature):
    student, _, labels = batch
    config = {"confidence": confidence, "temperature": temperature, "softening": softening, "weight": 1000.0}
    check(
        lambda logits: 1000 * ref.virtual_teacher(logits, labels, confidence, temperature, softening),
        (student, [], labels), "tf-kd", hard_weight=0.0, terms={"virtual_teacher": config},
    )  # fmt: skip


def test_a_virtual_teacher_at_t_1_is_label_smoothing(batch):
    """With confidence 1 - eps + eps / C: Tf-KD's regularization generalizes label smoothing."""
    student, _, labels = batch
    eps = 0.3
    config = {"confidence": 1 - eps + eps / C, "temperature": 1.0, "weight": 1.0}
    value, logits, _ = value_of(
        student, [], labels, "tf-kd", hard_weight=0.0, terms={"virtual_teacher": config}
    )
    value.loss.backward()
    smoothed = torch.from_numpy(student).requires_grad_()
    F.cross_entropy(smoothed, torch.from_numpy(labels), label_smoothing=eps).backward()
    torch.testing.assert_close(logits.grad, smoothed.grad, rtol=1e-5, atol=1e-7)


def test_the_papers_picture_of_a_softened_virtual_teacher():
    """Figure 3 at ten classes and T = 20 shows 0.150 and 0.095: a = 0.999, tempered."""
    assert virtual_probs(10, 0.999, 20.0, "both") == pytest.approx((0.149, 0.0945), abs=5e-4)
    label, other = virtual_probs(100, 0.99, 20.0, "double_softmax")
    assert label == pytest.approx(0.0105, abs=5e-5)
    assert label + 99 * other == pytest.approx(1)


def test_mixed_labels_weigh_virtual_teachers(batch):
    logits = torch.from_numpy(batch[0])
    first, second = torch.arange(N) % C, (torch.arange(N) + 1) % C
    lam = torch.linspace(0, 1, N)
    objective = Objective(resolve_objective("tf-kd", {"hard_weight": 0.0}, "test", classes=C))
    values = [
        objective(loss_inputs(logits[n : n + 1], ids[n : n + 1])).loss
        for ids in (first, second)
        for n in range(N)
    ]
    want = (lam * torch.stack(values[:N]) + (1 - lam) * torch.stack(values[N:])).mean()
    mixed = objective(loss_inputs(logits, MixedLabels(first, second, lam))).loss
    torch.testing.assert_close(mixed, want)


def test_self_training_of_tf_kd_has_no_squared_temperature(batch):
    student, teachers, labels = batch
    value, _, _ = value_of(student, teachers[:1], labels, "tf-kd-self", hard_weight=0.0)
    pairs = zip(teachers[0], student, strict=True)
    divergence = np.mean([kl(softmax(teacher, 20.0), softmax(logits, 20.0)) for teacher, logits in pairs])
    assert value.loss.item() == pytest.approx(0.95 * divergence, rel=1e-4)


@pytest.mark.parametrize("method", ["label-refinery", "born-again"])
def test_refined_labels_are_all_that_is_read(batch, method):
    student, teachers, labels = batch
    value, logits, _ = value_of(student, teachers[:1], labels, method)
    value.loss.backward()
    want = torch.from_numpy(student).requires_grad_()
    F.cross_entropy(want, torch.from_numpy(teachers[0]).softmax(1)).backward()
    torch.testing.assert_close(logits.grad, want.grad, rtol=1e-5, atol=1e-7)
    other = value_of(student, teachers[:1], (labels + 1) % C, method)[0]
    assert other.loss.item() == value.loss.item()
    needs = METHODS[method].objective.needs()
    assert not needs.labels
    assert "labels" not in METHODS[method].needs


@pytest.mark.parametrize("method", ["dkd", "dist", "logit-std", "tf-kd", "tf-kd-self", "label-refinery"])
def test_a_student_is_trained(stores, method):
    used = stores if METHODS[method].objective.needs().teachers else []
    setup = prepare(make_recipe(used, method=method, limit=128, optimizer={"lr": 0.01}), CPU)
    state, losses = make_state(setup), []
    for epoch in range(3):
        told = train_epoch([state], setup.batches(epoch), setup.targets)[0]
        losses.append(told["loss"] / (1 if method != "dkd" else 1 + epoch))
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]


def test_dkd_is_refused_for_mixed_images():
    config = resolve_objective("dkd", {}, "test", classes=C)
    text = (
        r"^term 'dkd' separates the label's class from the rest, but the view mixes images: a mixed image "
        r"has two labels. Use stores of a view without mix$"
    )
    with pytest.raises(RecipeError, match=text):
        check_needs("dkd", config, [], view_recipe("cifar-strong"), None)


def test_standardized_logits_are_refused_where_logits_are_missing(tmp_path):
    spec = "fake,classes=100,size=8,samples=100,channels=1"
    source, teacher = open_source(spec), write_teacher(tmp_path / "t", classes=100)
    store = write_store(tmp_path / "cnn.zarr", teacher, source=source, encoding="topk:3")
    fields = {"source": source.name, "evaluation": evaluation_spec(spec)}
    with pytest.raises(RecipeError) as caught:
        prepare(make_recipe([store], method="logit-std", **fields), CPU)
    text = str(caught.value)
    assert "method 'logit-std' (logit standardization) needs all logits, but store" in text
    assert text.endswith(f"--view digits --views 2 --store {tmp_path / 'cnn-dense.zarr'}")
