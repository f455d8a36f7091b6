"""Losses with adapters and memories: published figures, formulas in float64, and students trained."""

import itertools

import numpy as np
import pytest
import torch
from builders import CPU, make_recipe
from helpers import make_job
from reference import adapters as reference

from coursepack.data import view_recipe
from coursepack.data.views.mixing import Mix
from coursepack.distill.distributed import Ranks
from coursepack.distill.losses.activation_boundaries import ABConfig, ActivationBoundaries, boundary_loss
from coursepack.distill.losses.adapters import Regressor, layer_factors
from coursepack.distill.losses.base import BuildContext, FeaturePair, LossInputs, Step, StudentOutput
from coursepack.distill.losses.contrast import CRD, Contrast, CRDConfig, Negatives
from coursepack.distill.losses.factor_transfer import (
    FactorTransfer,
    FTConfig,
    factor_distance,
)
from coursepack.distill.losses.hint import HintConfig
from coursepack.distill.losses.overhaul import OFDConfig, Overhaul, partial_distance
from coursepack.distill.losses.vid import VID, VIDConfig, gaussian_loss
from coursepack.distill.methods import METHODS
from coursepack.distill.setup.costs import planned_store
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.setup.requirements import check_needs, term_pairs
from coursepack.distill.targets.base import Targets
from coursepack.distill.training.loop import train_epoch
from coursepack.distill.training.state import make_state
from coursepack.errors import RecipeError
from coursepack.models import build_network, parse_tap
from coursepack.models.reductions import above_margin
from coursepack.precompute import run_job

ADAPTED = ("fitnets", "vid", "ab", "crd", "ofd", "ft")
BN = {"teacher": 0, "tap": "layer2.0.bn1:margin", "layer": "layer2.0.bn1"}
SIGNS = {"teacher": 0, "tap": "layer2.0.bn1:sign", "layer": "layer2.0.bn1"}
OBJECTIVES = {
    "ab": {"terms": {"ab": {"pairs": [SIGNS], "weight": 0.003}}, "hard_weight": 1.0},
    "ofd": {"terms": {"ofd": {"pairs": [BN]}}},
    "crd": {"terms": {"crd": {"negatives": 32, "dim": 8}}},
    "ft": {"terms": {"ft": {"paraphraser_epochs": 1}}},
}
"""What a method needs beside its numbers to train on digits."""


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, teachers):
    """A store of the residual teacher with the features of every method, one of them as bits."""
    path = tmp_path_factory.mktemp("adapted") / "resnet.zarr"
    taps = ("layer1", "layer2", "layer2:pooled", "layer2.0.bn1:margin")
    for some, encoding in ((taps, "float32"), (("layer2.0.bn1:sign",), "bits")):
        fields = {"encoding": "float32", "feature_encoding": encoding}
        run_job(make_job(path, teachers[2], taps=tuple(map(parse_tap, some)), **fields), quiet=True)
    return path


def recipe_of(method, store, **fields):
    """A recipe of a method for a residual student, few samples."""
    values = {
        "student": "digits-resnet",
        "limit": 96,
        "batch_size": 32,
        "optimizer": {"lr": 0.01},
        "epochs": 3,
    }
    return make_recipe([store], method=method, objective=OBJECTIVES.get(method), **values | fields)


def inputs_of(student, teacher, *, samples=None, epoch=0):
    """One batch of a pair: teacher 0, tap `tap`, layer `layer`."""
    output = StudentOutput(torch.zeros(len(student), 10), features={"layer": student})
    targets = Targets([], {(0, "tap"): teacher}, (0,))
    return LossInputs(output, torch.zeros(len(student)).long(), targets, Step(epoch), samples)


def pair_of(student_shape, teacher_shape, teacher=0):
    return FeaturePair(teacher, "tap", "layer", teacher_shape, student_shape)


def drawn(*shape, seed=0):
    """Float64 normal numbers."""
    return np.random.default_rng(seed).normal(size=shape)


def check(loss, formula, *arrays):
    """Compare values `(N,)` with a reference, and the gradient to the first array with its differences."""
    tensors = [torch.from_numpy(array) for array in arrays]
    first = tensors[0].clone().requires_grad_()
    value = loss(first, *tensors[1:])
    np.testing.assert_allclose(value.detach(), formula(*arrays), rtol=1e-9)
    value.sum().backward()
    for index in np.ndindex(*(min(2, side) for side in arrays[0].shape)):
        moved = [arrays[0].copy() for _ in range(2)]
        moved[0][index] += 1e-6
        moved[1][index] -= 1e-6
        slope = (formula(moved[0], *arrays[1:]) - formula(moved[1], *arrays[1:])).sum() / 2e-6
        assert first.grad[index].item() == pytest.approx(slope, rel=1e-4, abs=1e-6)


# Formulas


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((5, 4, 4), (3, 2, 2)),
        ((5, 2, 2), (3, 4, 4)),
        ((5, 4, 4), (3, 3, 3)),
        ((5, 4, 4), (3, 4, 4)),
        ((5,), (3,)),
    ],
)
def test_a_regressor_is_a_convolution_with_batch_normalization(student, teacher):
    torch.manual_seed(0)
    module = Regressor(student, teacher, relu=True).double()
    weight, bias = (value.detach().numpy() for value in module.conv.parameters())
    scale, shift = drawn(3, seed=1), drawn(3, seed=2)
    with torch.no_grad():
        module.norm.weight.copy_(torch.from_numpy(scale))
        module.norm.bias.copy_(torch.from_numpy(shift))

    def formula(features):
        maps = features.reshape(*features.shape[:2], *(student[1:] or (1, 1)))
        if len(student) == 3 and student[1] * 2 == teacher[1]:
            out = reference.transposed_convolution(maps, weight, bias, 2, 1)
        elif len(student) == 3 and student[1] == 2 * teacher[1]:
            out = reference.convolution(maps, weight, bias, 2, 1)
        else:
            out = reference.convolution(maps, weight, bias)
        out = np.maximum(reference.normalized(out, scale, shift), 0)
        return (out**2).reshape(6, -1).sum(1)

    check(lambda maps: module(maps).square().flatten(1).sum(1), formula, drawn(6, *student))


def test_a_regressor_takes_a_single_vector():
    """A last batch of one sample has no variance; running statistics serve it."""
    module = Regressor((5,), (3,))
    module(torch.randn(8, 5))
    assert module(torch.randn(1, 5)).isfinite().all()
    assert module.like(torch.randn(2, 3, 4, 4)).shape == (2, 3)


def test_smaller_maps_of_other_sizes_are_repeated():
    assert Regressor((5, 2, 2), (3, 7, 5))(torch.randn(4, 5, 2, 2)).shape == (4, 3, 7, 5)
    assert Regressor((5, 8, 8), (3, 4, 4), pointwise=True)(torch.randn(4, 5, 8, 8)).shape == (4, 3, 4, 4)


def test_gaussian_loss():
    variance = np.abs(drawn(3, seed=2)) + 0.1
    check(gaussian_loss, reference.gaussian_loss, drawn(2, 3, 2, 2), drawn(2, 3, 2, 2, seed=1), variance)


def test_boundary_loss():
    student, teacher = 2 * drawn(3, 4, 2, 2), drawn(3, 4, 2, 2, seed=1)
    teacher[0, 0] = 0  # not active
    check(
        lambda s, t: boundary_loss(s, t, 0.7),
        lambda s, t: reference.boundary_loss(s, t, 0.7),
        student,
        teacher,
    )


def test_boundaries_read_signs_alone():
    student, teacher = (torch.from_numpy(drawn(3, 4, seed=seed)) for seed in range(2))
    assert torch.equal(boundary_loss(student, teacher), boundary_loss(student, teacher.sign()))


def test_partial_distance():
    margin = -np.abs(drawn(3, seed=2))

    def loss(student, teacher):
        return partial_distance(student, above_margin(teacher, torch.from_numpy(margin)))

    def formula(student, teacher):
        return reference.partial_distance(student, teacher, margin)

    check(loss, formula, drawn(4, 3, 2, 2), drawn(4, 3, 2, 2, seed=1))


def test_factor_distance():
    check(factor_distance, reference.factor_distance, drawn(3, 4, 2, 2), drawn(3, 4, 2, 2, seed=1))


def test_contrastive_loss():
    module = Contrast(5, 7, 20, CRDConfig(dim=6, temperature=0.2)).double()
    memories = [getattr(module, f"{side}_memory").numpy().copy() for side in ("student", "teacher")]
    rows = np.random.default_rng(3).integers(0, 20, (4, 9))
    unit = [each / np.linalg.norm(each, axis=1)[:, None] for each in (drawn(4, 6), drawn(4, 6, seed=1))]

    def loss(student, teacher):
        module.log_normalizers.fill_(-torch.inf)
        return module(student, teacher, torch.from_numpy(rows))

    def formula(student, teacher):
        return reference.contrast(student, teacher, *memories, rows, 0.2)

    values = loss(*map(torch.from_numpy, unit))
    np.testing.assert_allclose(values.detach(), formula(*unit), rtol=1e-9)
    module.remember(*map(torch.from_numpy, unit), torch.arange(4))
    for side, memory, embedding in zip(("student", "teacher"), memories, unit, strict=True):
        wanted = reference.remembered(memory, range(4), embedding, 0.5)
        np.testing.assert_allclose(getattr(module, f"{side}_memory"), wanted, rtol=1e-9)


def test_normalizers_are_set_once():
    module = Contrast(5, 7, 20, CRDConfig(dim=6))
    rows = torch.arange(9).repeat(4, 1)
    module(*(torch.randn(4, 6) for _ in range(2)), rows)
    before = module.log_normalizers.clone()
    module(*(torch.randn(4, 6) for _ in range(2)), rows)
    assert torch.equal(module.log_normalizers, before)
    assert before.isfinite().all()


# Negatives and memories


def test_negatives_are_of_other_classes_and_drawn_by_sample_and_epoch():
    labels = np.random.default_rng(0).integers(0, 4, 50)
    samples = np.sort(np.random.default_rng(1).permutation(200)[:50])
    negatives = Negatives(samples, labels, 999, 7)
    rows = negatives.draw(samples[10:30], 3)
    assert rows.shape == (20, 999)
    assert (labels[rows] != labels[10:30, None]).all()
    others = [set(np.flatnonzero(labels != label)) for label in labels[10:30]]
    assert [set(row) for row in rows] == others, "every sample of another class is drawn"
    assert np.array_equal(negatives.draw(samples[15:16], 3), rows[5:6])
    assert not np.array_equal(negatives.draw(samples[10:30], 4), rows)
    assert np.array_equal(negatives.rows_of(samples[[4, 2]]), [4, 2])


def test_one_class_has_no_negatives():
    context = BuildContext(labels=np.zeros(5, dtype=np.int64))
    with pytest.raises(RecipeError, match="all 5 training samples have the same class"):
        CRD(CRDConfig(), context)


def test_memories_follow_the_first_view_of_each_sample_that_was_seen():
    pair = pair_of((5,), (7,))
    context = BuildContext(labels=np.arange(8) % 3, samples=np.array([1, 3, 4, 6, 7]), pairs=(pair,))
    module = CRD(CRDConfig(dim=6, negatives=4), context)
    contrast = module.contrasts[0]
    before = contrast.student_memory.clone()
    samples = np.array([6, 3, 6, 3])
    inputs = inputs_of(torch.randn(4, 5), torch.randn(4, 7), samples=samples)
    assert module(inputs).shape == (4,)
    assert torch.equal(contrast.student_memory, before)
    embeddings, _ = contrast.embed(inputs.student.features["layer"], torch.randn(4, 7))
    module.after_step(inputs)
    wanted = reference.remembered(
        before.double().numpy(), [3, 1], embeddings[:2].detach().double().numpy(), 0.5
    )
    np.testing.assert_allclose(contrast.student_memory, wanted, rtol=1e-5, atol=1e-6)


def test_memories_hold_the_training_samples_alone(adapted):
    state = make_state(prepare(recipe_of("crd", adapted), CPU))
    memory = state.learner.objective.terms["crd"].contrasts[0].teacher_memory
    assert memory.shape == (96, 8)
    assert any(name.endswith("teacher_memory") for name in state.state()["learner"])


def test_contrast_is_refused_for_parts_of_batches_and_mixed_images(adapted):
    with pytest.raises(RecipeError, match=r"relates all samples of a batch \(crd\)"):
        prepare(recipe_of("crd", adapted, accumulate=2), CPU)
    run = prepare(recipe_of("crd", adapted), CPU)
    mixed = view_recipe("digits").model_copy(update={"mix": Mix(mixup_alpha=1.0)})
    with pytest.raises(RecipeError, match="crd draws negatives of other classes, but the view mixes images"):
        check_needs("crd", run.recipe.objective, run.readers, mixed, None)


def test_a_memory_is_refused_under_ranks(adapted):
    text = "method 'crd' cannot be trained on 2 ranks, since crd keeps a memory of the samples"
    with pytest.raises(RecipeError, match=text):
        prepare(recipe_of("crd", adapted), CPU, Ranks(0, 2))


# Phases, options and pairs


def test_the_paraphraser_is_trained_first_and_then_frozen():
    module = FactorTransfer(FTConfig(paraphraser_epochs=2, weight=3.0), [pair_of((4, 4, 4), (6, 2, 2))])
    paraphraser = module.translators[0].paraphraser
    student, teacher = torch.randn(5, 4, 4, 4, requires_grad=True), torch.randn(5, 6, 2, 2)
    module.begin_epoch(1)
    module(inputs_of(student, teacher, epoch=1)).mean().backward()
    assert student.grad is None
    assert all(value.grad.any() for value in paraphraser.parameters())
    module.zero_grad()
    module.begin_epoch(2)
    loss = module(inputs_of(student, teacher, epoch=2))
    loss.mean().backward()
    assert student.grad.any()
    assert all(value.grad is None for value in paraphraser.parameters())
    translator = module.translators[0]
    factors = translator.factors(student, teacher)
    assert factors[0].shape == factors[1].shape == (5, 3, 2, 2)
    torch.testing.assert_close(loss, 3 * factor_distance(*factors))


def test_a_paraphraser_learns_to_reconstruct():
    module = FactorTransfer(FTConfig(), [pair_of((4, 4, 4), (6, 2, 2))])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    inputs, errors = inputs_of(torch.randn(16, 4, 4, 4), torch.rand(16, 6, 2, 2)), []
    for _ in range(60):
        optimizer.zero_grad()
        loss = module(inputs).mean()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < 0.7 * errors[0]


def test_a_fixed_variance_is_a_scaled_hint():
    pairs = [pair_of((5, 4, 4), (3, 2, 2))]
    fixed, learned = (VID(VIDConfig(variance=variance), pairs) for variance in ("fixed", "learned"))
    trained = [{name for name, _ in module.named_parameters()} for module in (learned, fixed)]
    assert trained[0] - trained[1] == {"models.0.log_scale"}
    inputs = inputs_of(torch.randn(4, 5, 4, 4), torch.randn(4, 3, 2, 2))
    torch.testing.assert_close(fixed(inputs), learned(inputs))
    mean = fixed.models[0].mean(torch.nn.functional.adaptive_avg_pool2d(inputs.student.features["layer"], 2))
    error = (mean - inputs.teachers.features_of(0, "tap")).square().flatten(1).mean(1)
    torch.testing.assert_close(fixed(inputs), error / 10 + np.log(5) / 2)


def test_layers_count_half_of_the_next_and_teachers_as_much_as_each_other():
    pairs = [pair_of((3,), (3,), teacher) for teacher in (0, 0, 1, 0)]
    assert layer_factors(pairs) == [0.125, 0.25, 0.5, 0.5]


@pytest.mark.parametrize(
    ("term", "build"), [("ab", lambda p: ActivationBoundaries(ABConfig(), p)), ("ofd", Overhaul)]
)
def test_maps_are_not_compared_with_vectors(term, build):
    with pytest.raises(RecipeError, match=rf"term '{term}' compares \w+ one by one, but tap 'tap' has shape"):
        build([pair_of((5,), (3, 2, 2))])


def test_the_term_of_boundaries_ends_with_its_weight():
    schedule = {"shape": "step", "start": 0.003, "end": 0.0, "epochs": 2}
    module = ActivationBoundaries(ABConfig(weight=schedule), [pair_of((3,), (3,))])
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    assert module(inputs_of(student, teacher, epoch=1)) is not None
    assert module(inputs_of(student, teacher, epoch=2)) is None


# Students


@pytest.mark.parametrize("method", ADAPTED)
def test_students_train(adapted, method):
    recipe = recipe_of(method, adapted)
    run = prepare(recipe, CPU)
    state = make_state(run)
    trained = dict(state.learner.objective.terms.named_parameters())
    before = {name: value.detach().clone() for name, value in trained.items()}
    told = [train_epoch([state], run.batches(epoch), run.targets, epoch)[0] for epoch in range(3)]
    key = "hint" if method == "fitnets" else method
    assert all(np.isfinite(each["loss"]) for each in told)
    assert told[-1][key] < told[0][key] or method == "ft"
    moved = {name for name, value in trained.items() if not torch.equal(value, before[name])}
    assert moved == set(trained)


def test_published_numbers():
    """RepDistiller's weights of means over samples; its VID and FitNets take means over values as well."""
    weights = {
        name: METHODS[name].objective.terms["hint" if name == "fitnets" else name].weight for name in ADAPTED
    }
    assert weights.pop("ab").start == 0.003
    assert weights == {"fitnets": 100.0, "vid": 1.0, "crd": 0.8, "ofd": 0.001, "ft": 500.0}


def test_configs_are_refused_out_of_range():
    for config, fields in itertools.product((HintConfig, OFDConfig), ({"adapter": "other"}, {"weight": -1})):
        with pytest.raises(ValueError, match=r"adapter|weight"):
            config(**fields)


def test_margins_are_of_batch_normalizations_where_nothing_is_stored():
    teacher, student = planned_store("digits-resnet", 10, 5), build_network("digits-cnn", 10)
    pairs = term_pairs(METHODS["ofd"].objective, [teacher], student)["ofd"]
    assert pairs == [
        (0, "layer1.1.bn2@margin", "conv1"),
        (0, "layer1.1.bn2@margin", "conv2"),
        (0, "layer2.1.bn2@margin", "hidden"),
    ]


@pytest.mark.parametrize(
    ("method", "taps"),
    [
        ("crd", "--tap layer2:pooled"),
        ("ab", "--tap stem:sign --tap layer2:sign"),
        ("ofd", "--tap layer1.1.bn2:margin --tap layer2.1.bn2:margin"),
        ("ft", "--tap layer2"),
    ],
)
def test_missing_taps_are_refused_with_the_smallest_reduction(stores, method, taps):
    fields = {"student": "digits-cnn", "limit": 64, "epochs": 40}
    if method == "ab":
        layers = {"layers": ["conv1", "conv2"]}
        fields["objective"] = {"terms": {"ab": layers}}
    with pytest.raises(RecipeError) as caught:
        prepare(make_recipe(stores[2:], method=method, **fields), CPU)
    assert str(caught.value).endswith(taps)
