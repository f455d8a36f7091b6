"""Methods of several teachers against float64 references, published figures, and digits stores."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import CPU, loss_inputs, make_recipe, write_store, write_teacher
from helpers import make_job
from reference import teams as ref
from reference.loss import soft_target_loss as reference_loss
from reference.methods import numeric_gradient

from coursepack.data import open_source
from coursepack.data.sources import evaluation_spec
from coursepack.data.store import StoreReader
from coursepack.data.store.opening import load_manifest
from coursepack.distill.fusion.min_norm import logit_gradients, min_norm_weights
from coursepack.distill.losses.base import BuildContext, FeaturePair, TeacherHead
from coursepack.distill.losses.confidence_hint import ConfidenceHints
from coursepack.distill.losses.discriminator import Discriminator, DiscriminatorConfig
from coursepack.distill.losses.triplet_order import distances, order_loss
from coursepack.distill.objective import Objective
from coursepack.distill.recipe import resolve_objective
from coursepack.distill.runs.train import train
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.targets.base import Targets
from coursepack.distill.training.loop import train_epoch
from coursepack.distill.training.state import make_state
from coursepack.errors import RecipeError
from coursepack.models import parse_tap
from coursepack.precompute import run_job

RUN = sys.modules["coursepack.distill.runs.student"]
N, C, K = 6, 5, 3
HEADS = ("hidden2", "hidden", "layer2@pooled")
"""Deepest taps of the stores `tapped`, which the heads read; ReLU follows in the first two."""


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(0, 2, shape)


def logits_of(student, teachers):
    targets = Targets([torch.from_numpy(each) for each in teachers])
    return loss_inputs(torch.from_numpy(student).requires_grad_(), torch.arange(len(student)) % C, targets)


# AE-KD


@pytest.mark.parametrize("largest", [0.25, 0.4, 0.6, 1.0])
@pytest.mark.parametrize(("count", "rank"), [(1, 3), (2, 5), (4, 2), (5, 8)])
def test_min_norm_weights_are_those_of_the_best_active_set(count, rank, largest):
    largest = max(largest, 1 / count)
    for seed in range(20):
        gradients = drawn(count, rank, seed=seed)
        gram = gradients @ gradients.T
        weights = min_norm_weights(gram, largest)
        assert weights.sum() == pytest.approx(1, abs=1e-12)
        assert (weights >= 0).all()
        assert (weights <= largest + 1e-12).all()
        best = ref.min_norm(gram, largest)
        assert weights @ gram @ weights == pytest.approx(best @ gram @ best, rel=1e-8, abs=1e-9 * gram.max())
        if rank > count:
            np.testing.assert_allclose(weights, best, atol=1e-7)


def test_min_norm_weights_do_not_depend_on_the_size_of_the_gradients():
    """The release's tolerance is absolute: it returns (0.6, 0.4, 0) for gradients as small as these."""
    gradients = drawn(3, 10)
    gram = gradients @ gradients.T
    np.testing.assert_allclose(
        min_norm_weights(1e-12 * gram, 0.6), min_norm_weights(gram, 0.6), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize(
    ("gram", "largest", "weights"),
    [
        ([[0, 0], [0, 0]], 0.6, [0.5, 0.5]),
        ([[4, 4], [4, 4]], 1.0, [0.5, 0.5]),
        ([[1, -1], [-1, 1]], 0.6, [0.5, 0.5]),
        ([[1, 0], [0, 9]], 1.0, [0.9, 0.1]),
        ([[1, 0], [0, 9]], 0.6, [0.6, 0.4]),
        ([[1, 2], [2, 9]], 1.0, [1, 0]),
        ([[1, 0, 0], [0, 9, 0], [0, 0, 4]], 1 / 3, [1 / 3, 1 / 3, 1 / 3]),
        ([[7]], 1.0, [1]),
    ],
)
def test_min_norm_weights_of_small_cases(gram, largest, weights):
    np.testing.assert_allclose(min_norm_weights(np.array(gram, float), largest), weights, atol=1e-6)


def test_gradients_of_the_teachers_are_those_of_autograd():
    student, teachers = drawn(N, C), drawn(K, N, C, seed=1)
    inputs = logits_of(student, teachers)
    got = logit_gradients(inputs, 4.0)
    np.testing.assert_allclose(got, ref.logit_gradients(student, teachers, 4.0), rtol=1e-5, atol=1e-7)
    for k in range(K):
        leaf = torch.from_numpy(student).requires_grad_()
        probs = (torch.from_numpy(teachers[k]) / 4).softmax(1)
        kl = (probs * (probs.log() - (leaf / 4).log_softmax(1))).sum(1)
        (16 * kl).sum().backward()
        np.testing.assert_allclose(4 * got[k], leaf.grad.mean(0), rtol=1e-4, atol=1e-6)


def test_ae_kd_is_the_sum_of_its_weighted_losses():
    student, teachers, labels = drawn(N, C), drawn(K, N, C, seed=1), np.arange(N) % C
    config = resolve_objective("ae-kd", {}, "test", classes=C)
    inputs = logits_of(student, teachers)
    value = Objective(config, BuildContext(K))(inputs)
    gradients = ref.logit_gradients(student, teachers, 4.0)
    weights = ref.min_norm(gradients @ gradients.T, 0.6)
    np.testing.assert_allclose(value.weights, weights, atol=1e-5)
    assert not value.weights.requires_grad

    def total(student):
        soft = reference_loss(
            student, teachers, labels, weights=np.tile(weights, (N, 1)), temperature=4.0, combine="sum",
            soft_weight=0.9, hard_weight=1.0,
        )  # fmt: skip
        return soft.loss.mean()

    value.loss.backward()
    assert value.loss.item() == pytest.approx(total(student), rel=1e-5)
    np.testing.assert_allclose(inputs.student.logits.grad, numeric_gradient(total, student), atol=1e-5)


def test_ae_kd_needs_whole_batches(stores):
    with pytest.raises(RecipeError, match=r"'ae-kd' relates all samples of a batch \(fusion 'min_norm'\)"):
        prepare(make_recipe(stores, method="ae-kd", accumulate=2), CPU)


# CA-MKD's features


def module_and_inputs(teacher_shapes, student_shape, *, order=None):
    """Confidence hints of a few teachers, with their inputs as float32."""
    order = list(range(len(teacher_shapes))) if order is None else order
    pairs = [FeaturePair(k, "tap", "layer", teacher_shapes[k], student_shape) for k in order]
    heads = [
        TeacherHead(torch.from_numpy(drawn(C, shape[0], seed=k)).float(), torch.ones(C))
        for k, shape in enumerate(teacher_shapes)
    ]
    features = {
        (k, "tap"): torch.from_numpy(drawn(N, *shape, seed=10 + k)).float()
        for k, shape in enumerate(teacher_shapes)
    }
    student = torch.from_numpy(drawn(N, *student_shape, seed=20)).float().requires_grad_()
    inputs = loss_inputs(
        torch.zeros(N, C), torch.arange(N) % C, Targets([], features), features={"layer": student}
    )
    return ConfidenceHints(pairs, heads, seed=1), inputs, student


def embedded(student, adapter, size):
    """ReLU(BN(1x1 convolution)) of maps pooled to `size`, statistics of the batch."""
    cell = student.shape[2] // size
    pooled = student.reshape(*student.shape[:2], size, cell, size, cell).mean((3, 5))
    weight, bias = (value.detach().double().numpy() for value in adapter.layer.parameters())
    maps = np.einsum("oc,nchw->nohw", weight[:, :, 0, 0], pooled) + bias[:, None, None]
    mean, deviation = maps.mean((0, 2, 3), keepdims=True), maps.var((0, 2, 3), keepdims=True)
    return np.maximum((maps - mean) / np.sqrt(deviation + 1e-5), 0)


def test_confidence_hints_and_their_gradient():
    shapes = [(4, 2, 2), (3, 4, 4)]
    module, inputs, student = module_and_inputs(shapes, (2, 4, 4))
    labels = inputs.labels.numpy()
    features = [rows.double().numpy() for rows in inputs.targets.features.values()]

    def reference(values):
        adapted = [
            embedded(values, adapter, shape[1])
            for adapter, shape in zip(module.adapters, shapes, strict=True)
        ]
        logits = [
            maps.mean((2, 3)) @ head.weight.double().numpy().T + 1
            for maps, head in zip(adapted, module.heads, strict=True)
        ]
        return ref.confident_error(adapted, features, logits, labels)

    value = module(inputs)
    point = student.detach().double().numpy()
    np.testing.assert_allclose(value.detach(), reference(point), rtol=1e-4)
    value.sum().backward()
    gradient = numeric_gradient(lambda values: reference(values).sum(), point)
    np.testing.assert_allclose(student.grad, gradient, rtol=1e-3, atol=1e-3)
    assert all(
        parameter.grad.abs().max() > 0 for parameter in module.adapters.parameters() if parameter.ndim > 1
    )


def test_every_teacher_gets_the_students_own_map():
    """In the release a teacher with a smaller map leaves its pooled map to the teachers after it."""
    shapes = [(4, 1, 1), (3, 4, 4)]
    module, inputs, _ = module_and_inputs(shapes, (2, 4, 4))
    turned, _, _ = module_and_inputs(shapes, (2, 4, 4), order=[1, 0])
    turned.adapters = torch.nn.ModuleList(list(module.adapters)[::-1])
    torch.testing.assert_close(turned(inputs), module(inputs))


@pytest.mark.parametrize(
    ("shapes", "student_shape", "adapted"),
    [
        ([(4,), (3, 2, 2)], (2, 4, 4), [(4,), (3, 2, 2)]),
        ([(4, 8, 8), (3, 3, 3)], (2, 4, 4), [(4, 8, 8), (3, 3, 3)]),
        ([(4, 2, 2), (3,)], (2,), [(4,), (3,)]),
    ],
)
def test_vectors_and_larger_maps_are_compared_too(shapes, student_shape, adapted):
    module, inputs, student = module_and_inputs(shapes, student_shape)
    assert [tuple(adapter(student).shape[1:]) for adapter in module.adapters] == adapted
    value = module(inputs)
    assert value.shape == (N,)
    value.mean().backward()
    assert student.grad.any()


def test_a_batch_of_one_sample_is_normalized_by_running_statistics():
    module, inputs, student = module_and_inputs([(4,), (3, 1, 1)], (2, 4, 4))
    module(inputs)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    adapted = [adapter(student[:1]) for adapter in module.adapters]
    assert all(each.isfinite().all() for each in adapted)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_one_teacher_counts_whole():
    module, inputs, _ = module_and_inputs([(4, 2, 2)], (2, 4, 4))
    adapted = module.adapters[0](inputs.student.features["layer"])
    plain = (adapted - inputs.targets.features[0, "tap"]).square().flatten(1).mean(1)
    torch.testing.assert_close(module(inputs), plain)


def test_heads_are_read_from_the_stores_and_not_from_checkpoints(tapped):
    recipe = make_recipe(tapped, method="ca-mkd-features", student="digits-cnn", limit=64)
    setup = prepare(recipe, CPU)
    state = make_state(setup)
    term = state.learner.objective.terms["confidence_hint"]
    for head, store in zip(term.heads, tapped, strict=True):
        assert torch.equal(head.weight, torch.from_numpy(StoreReader(store).static("head_weight")))
    assert not [name for name in state.learner.state_dict() if "heads" in name]
    assert [(pair.tap, pair.layer) for pair in term.pairs] == [(tap, "hidden") for tap in HEADS]
    before = {name: value.detach().clone() for name, value in term.named_parameters()}
    metrics = train_epoch([state], setup.batches(0), setup.targets)[0]
    assert metrics["confidence_hint"] > 0
    moved = [name for name, value in term.named_parameters() if not torch.equal(value, before[name])]
    assert moved == list(before)


def test_a_head_that_reads_something_else_is_refused(tmp_path, teachers):
    store = tmp_path / "cnn.zarr"
    run_job(make_job(store, teachers[1], taps=(parse_tap("conv2"),), encoding="float32"))
    recipe = make_recipe([store], method="ca-mkd-features", student="digits-cnn", limit=64)
    text = (
        r"applies the head of teacher 0, which reads 64 values, to features like tap 'conv2' \(shape \(32, 4"
    )
    with pytest.raises(RecipeError, match=text):
        make_state(prepare(recipe, CPU))


def test_a_store_without_a_head_is_refused(tapped, monkeypatch):
    setup = prepare(make_recipe(tapped[:1]), CPU)
    tables = {"labels": setup.readers[0].manifest.tables["labels"]}
    monkeypatch.setattr(
        "coursepack.data.store.reader.load_manifest",
        lambda *args: replace(load_manifest(*args), tables=tables),
    )
    with pytest.raises(
        RecipeError, match=r"needs the teachers' heads, but store '.*' has no 'static/head_weight'"
    ):
        prepare(make_recipe(tapped[:1], method="ca-mkd-features", student="digits-cnn"), CPU)


# You et al. 2017


def test_order_loss_and_its_gradient():
    student, teachers = drawn(N, 4), drawn(K, N, 3, seed=1)
    tensor = torch.from_numpy(student).requires_grad_()
    voters = torch.stack([distances(torch.from_numpy(each)) for each in teachers])
    for margin, chunk_bytes in itertools.product((0.0, 0.2, 3.0), (1, 1 << 20)):
        tensor.grad = None
        loss = order_loss(distances(tensor), voters, margin, chunk_bytes)
        np.testing.assert_allclose(loss.detach(), ref.order_loss(student, teachers, margin), rtol=1e-10)
        loss.sum().backward()
        gradient = numeric_gradient(lambda x, m=margin: ref.order_loss(x, teachers, m).sum(), student)
        np.testing.assert_allclose(tensor.grad, gradient, atol=1e-6)


def test_teachers_that_contradict_each_other_cancel_out():
    line = torch.arange(4.0)[:, None]
    table = distances(line)
    voters = torch.stack([table, table.max() - table])
    assert not order_loss(distances(torch.randn(4, 2)), voters, 0.2).any()


def test_a_student_with_the_teachers_order_and_margins_has_no_loss():
    points = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    table = distances(points)
    assert not order_loss(10 * table, table[None], 0.2).any()
    assert order_loss(table.max() - table, table[None], 0.2).all()


def test_teachers_of_one_layer_vote_together(tapped):
    pairs = [
        {"teacher": 0, "tap": "hidden2", "layer": "hidden"},
        {"teacher": 1, "tap": "hidden", "layer": "conv1"},
        {"teacher": 2, "tap": "layer2:pooled", "layer": "hidden"},
    ]
    recipe = make_recipe(
        tapped, method="you17", student="digits-cnn", limit=64,
        objective={"terms": {"triplet_order": {"pairs": pairs}}},
    )  # fmt: skip
    setup = prepare(recipe, CPU)
    state = make_state(setup)
    votes = state.learner.objective.terms["triplet_order"].votes
    assert {layer: [pair.teacher for pair in pairs] for layer, pairs in votes.items()} == {
        "hidden": [0, 2],
        "conv1": [1],
    }
    assert train_epoch([state], setup.batches(0), setup.targets)[0]["triplet_order"] > 0


# MEAL


def discriminator_of(**changes):
    return Discriminator(DiscriminatorConfig(**changes), C, seed=3).double()


def layers_of(module):
    return [
        (layer.weight.detach().numpy(), layer.bias.detach().numpy())
        for layer in (module.layer1, module.layer2, module.layer3)
    ]


@pytest.mark.parametrize("last_relu", [False, True])
def test_the_discriminators_loss_and_gradient(last_relu):
    student, teacher = drawn(N, C), drawn(N, C, seed=1)
    inputs = logits_of(student, [teacher])
    module = discriminator_of(reverse=False, last_relu=last_relu)
    layers = layers_of(module)
    value = module(inputs)
    want = ref.discriminator_loss(layers, student, teacher, last_relu=last_relu)
    np.testing.assert_allclose(value.detach(), want, rtol=1e-7)
    value.sum().backward()
    gradient = numeric_gradient(
        lambda x: ref.discriminator_loss(layers, x, teacher, last_relu=last_relu).sum(), student
    )
    np.testing.assert_allclose(inputs.student.logits.grad, gradient, atol=1e-7)


def test_the_student_works_against_the_discriminator():
    """Only the sign of the student's gradient differs from the release without --grl."""
    found = {}
    for reverse in (True, False):
        inputs = logits_of(drawn(N, C), [drawn(N, C, seed=1)])
        module = discriminator_of(reverse=reverse)
        value = module(inputs)
        value.mean().backward()
        found[reverse] = (value, inputs.student.logits.grad, [each.grad for each in module.parameters()])
    assert torch.equal(found[True][0], found[False][0])
    assert torch.equal(found[True][1], -found[False][1])
    assert found[True][1].any()
    for mine, theirs in zip(found[True][2], found[False][2], strict=True):
        assert torch.equal(mine, theirs)


def test_the_discriminator_has_its_own_learning_rate(stores):
    recipe = make_recipe(stores, method="meal", limit=64, optimizer={"lr": 0.5})
    setup = prepare(recipe, CPU)
    state = make_state(setup)
    before = [value.detach().clone() for value in state.learner.objective.parameters()]
    metrics = train_epoch([state], setup.batches(0), setup.targets)[0]
    own, *groups = state.optimizer.param_groups
    assert own["lr"] == 0.5
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.5 * 0.01, 1e-4)]
    assert len(groups[0]["params"]) == 6
    after = list(state.learner.objective.parameters())
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert metrics["loss"] == pytest.approx(metrics["soft_target"] + metrics["discriminator"], rel=1e-5)
    assert sum(weight > 0 for weight in metrics["teachers"]["weight"]) == 1, "one batch, one teacher"


def test_a_discriminator_takes_no_topk_rows(tmp_path):
    spec = "fake,classes=100,size=8,samples=100,channels=1"
    source, teacher = open_source(spec), write_teacher(tmp_path / "t", classes=100)
    store = write_store(tmp_path / "mlp.zarr", teacher, source=source, encoding="topk:3")
    with pytest.raises(
        RecipeError, match=r"'meal' \(the discriminator\) needs all logits, but store"
    ) as caught:
        prepare(
            make_recipe([store], method="meal", source=source.name, evaluation=evaluation_spec(spec)), CPU
        )
    assert "CWSM" not in str(caught.value)


# All of them


class Stopped(BaseException):
    """An interruption."""


@pytest.mark.parametrize("method", ["ae-kd", "ca-mkd-features", "you17", "meal"])
def test_a_student_learns(tapped, method):
    light = {"terms": {"confidence_hint": {"weight": 1.0}}} if method == "ca-mkd-features" else {}
    fields = {"student": "digits-cnn", "limit": 300, "optimizer": {"lr": 0.05}, "epochs": 4}
    recipe = make_recipe(tapped, method=method, objective=light, **fields)
    setup = prepare(recipe, CPU)
    state = make_state(setup)
    told = [train_epoch([state], setup.batches(epoch), setup.targets, epoch)[0] for epoch in range(4)]
    assert told[-1]["accuracy"] > told[0]["accuracy"]
    assert told[-1]["soft_target"] < told[0]["soft_target"]


@pytest.mark.parametrize("method", ["ca-mkd-features", "meal"])
def test_what_a_method_learns_is_resumed(tmp_path, tapped, method, monkeypatch):
    fields = {"method": method, "student": "digits-cnn", "limit": 100, "batch_size": 32, "epochs": 2}
    recipe = make_recipe(tapped, optimizer={"lr": 0.02}, **fields)
    once, out = tmp_path / "once", tmp_path / "o"
    train(recipe, once, device=CPU)
    save, left = RUN.save_checkpoint, [5]

    def counted(*arguments):
        save(*arguments)
        left[0] -= 1
        if not left[0]:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(RUN, "save_checkpoint", counted)
        with pytest.raises(Stopped):
            train(recipe, out, device=CPU, resume=True, checkpoint_seconds=0)
    train(recipe, out, device=CPU, resume=True)
    for name in ("student.safetensors", "best.safetensors"):
        assert (out / name).read_bytes() == (once / name).read_bytes()
