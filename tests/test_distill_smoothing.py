"""Label smoothing: values and gradients against torch's own in float64."""

import pytest
import torch
import torch.nn.functional as F
from builders import CPU, loss_inputs, make_recipe

from coursepack.data import view_recipe
from coursepack.distill.losses.base import Step
from coursepack.distill.losses.label import cross_entropy
from coursepack.distill.methods import METHODS
from coursepack.distill.objective import Objective
from coursepack.distill.recipe import resolve_objective
from coursepack.distill.schedule import value_at
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.targets.base import Targets
from coursepack.distill.training.state import make_state
from coursepack.kernels import MixedLabels


def float64_reference(student, teachers, labels, hard, smoothing, temperature=4.0, soft=0.9):
    """`kd` with label smoothing, in float64, with torch's own smoothed cross-entropy."""
    student = student.detach().double().requires_grad_()
    total = torch.zeros(())
    if teachers is not None:
        mixture = (teachers.double() / temperature).softmax(-1).mean(0)
        log_q = (student / temperature).log_softmax(1)
        total = soft * temperature**2 * F.kl_div(log_q, mixture, reduction="batchmean")
    if isinstance(labels, MixedLabels):
        parts = [
            F.cross_entropy(student, ids, label_smoothing=smoothing, reduction="none")
            for ids in (labels.first, labels.second)
        ]
        share = labels.lam.double()
        total = total + hard * (share * parts[0] + (1 - share) * parts[1]).mean()
    else:
        total = total + hard * F.cross_entropy(student, labels, label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(total, student)
    return total.detach(), gradient


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("method", ["supervised", "kd"])
def test_label_smoothing_is_torchs(method, mixed):
    generator = torch.Generator().manual_seed(0)
    student = (3 * torch.randn(16, 10, generator=generator)).requires_grad_()
    teachers = 4 * torch.randn(2, 16, 10, generator=generator)
    labels = torch.randint(0, 10, (16,), generator=generator)
    if mixed:
        labels = MixedLabels(labels, labels.flip(0), torch.rand(16, generator=generator))
    config = resolve_objective(method, {"label_smoothing": 0.2}, "test")
    targets = None if method == "supervised" else Targets(list(teachers))
    value = Objective(config)(loss_inputs(student, labels, targets))
    value.loss.backward()
    known = (teachers, config.hard_weight) if method == "kd" else (None, 1.0)
    want, gradient = float64_reference(student, known[0], labels, known[1], 0.2)
    torch.testing.assert_close(value.loss.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.grad.double(), gradient, rtol=1e-4, atol=1e-7)
    assert "label_smoothing" in value.terms
    plain = Objective(METHODS[method].objective)(loss_inputs(student, labels, targets))
    assert "label_smoothing" not in plain.terms


@pytest.mark.parametrize("method", ["supervised", "kd"])
def test_label_smoothing_follows_the_schedule_of_the_hard_weight(method):
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(8, 10, generator=generator).requires_grad_()
    teachers = torch.randn(2, 8, 10, generator=generator)
    labels = torch.randint(0, 10, (8,), generator=generator)
    weight = {"shape": "cosine", "start": 1.0, "end": 0.0, "epochs": 4}
    config = resolve_objective(method, {"label_smoothing": 0.1, "hard_weight": weight}, "test")
    targets = None if method == "supervised" else Targets(list(teachers))
    objective = Objective(config)
    seen = []
    for epoch in range(6):
        value = objective(loss_inputs(student, labels, targets, step=Step(epoch)))
        hard = value_at(config.hard_weight, epoch)
        seen.append(hard)
        want, _ = float64_reference(student, teachers if targets else None, labels, hard, 0.1)
        torch.testing.assert_close(value.loss.detach().double(), want, rtol=1e-5, atol=1e-6)
    assert seen[0] == 1
    assert seen[-1] == 0
    assert len(set(seen)) > 3


def test_mixed_views_are_learned_with_smoothed_labels(stores):
    view = view_recipe("digits").model_dump(mode="json") | {"mix": {"mixup_alpha": 0.8}}
    run = prepare(make_recipe(view=view, objective={"label_smoothing": 0.3}, limit=None), CPU)
    batch = next(run.batches(0))
    assert isinstance(batch.labels, MixedLabels)
    output = make_state(run).learner(batch, None)
    want, _ = float64_reference(output.student_logits, None, batch.labels, 1.0, 0.3)
    torch.testing.assert_close(output.value.loss.detach().double(), want, rtol=1e-5, atol=1e-6)
    plain = cross_entropy(output.student_logits, batch.labels).mean()
    assert float(plain.detach()) != pytest.approx(float(want))


@pytest.mark.parametrize("method", ["supervised", "kd"])
def test_a_sample_without_a_label_has_nothing_to_smooth(method):
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(6, 10, generator=generator).requires_grad_()
    labels = torch.tensor([1, -100, 3, -100, 5, 6])
    objective = Objective(resolve_objective(method, {"label_smoothing": 0.2, "hard_weight": 1.0}, "test"))
    targets = None if method == "supervised" else Targets([student.detach().clone()])
    value = objective(loss_inputs(student, labels, targets))
    want = F.cross_entropy(student, labels, label_smoothing=0.2, reduction="none").mean()
    torch.testing.assert_close(value.loss, want, rtol=1e-5, atol=1e-6)
