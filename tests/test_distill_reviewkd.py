"""Knowledge review: fusion modules and loss against NumPy and the release, pairs, warm-up, training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import CPU, make_recipe
from helpers import make_job
from reference.maps import averaged, convolved, nearest, normalized
from test_distill_published import agree, figures

from coursepack.distill.losses.base import FeaturePair, LossInputs, StudentOutput
from coursepack.distill.losses.reviewkd import ReviewKD, hierarchical_context_loss
from coursepack.distill.methods import METHODS
from coursepack.distill.schedule import value_at
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.targets.base import Targets
from coursepack.distill.training.loop import train_epoch
from coursepack.distill.training.state import make_state
from coursepack.models import parse_tap
from coursepack.precompute import run_job

N = 6
PAIRS = (
    FeaturePair(0, "t1", "s1", (3, 8, 8), (5, 8, 8)),
    FeaturePair(0, "t2", "s2", (4, 8, 8), (6, 4, 4)),
    FeaturePair(0, "t3", "s3", (7, 2, 2), (9, 2, 2)),
    FeaturePair(0, "t3@pooled", "s3", (8,), (9, 2, 2)),
)
"""Equal sizes, a larger teacher, equal sizes again, and the mean of the student's deepest map."""


@pytest.mark.parametrize("source", ["dvlab", "mdistiller"])
def test_the_hierarchical_context_loss_is_the_published_one(source):
    held = figures("reviewkd", "hcl")
    levels = [held[f"student_{level}"].clone().requires_grad_() for level in range(4)]
    loss = sum(
        hierarchical_context_loss(student, held[f"teacher_{level}"]).mean()
        for level, student in enumerate(levels)
    )
    loss.backward()
    agree(loss, held[f"{source}_loss"])
    for level, student in enumerate(levels):
        agree(student.grad, held[f"grad_dvlab_{level}"])


# The reference: float64, from the paper's figures 3 and 4 and the release's sizes.


def reference(weights, students, teachers, pairs=PAIRS):
    """The loss `(N,)`; `weights` are the module's, `students` and `teachers` maps by name."""
    deeper, total = None, 0.0
    for level in reversed(range(len(pairs))):
        pair, w = (
            pairs[level],
            {
                name.removeprefix(f"levels.0.fusions.{level}."): value
                for name, value in weights.items()
                if name.startswith(f"levels.0.fusions.{level}.")
            },
        )
        student, teacher = students[pair.layer], teachers[pair.tap]
        if teacher.ndim == 2:
            student, teacher = student.mean((2, 3), keepdims=True), teacher[:, :, None, None]
        fused = normalized(convolved(student, w["enter.0.weight"]), w["enter.1.weight"], w["enter.1.bias"])
        if deeper is not None:
            deeper = nearest(deeper, fused.shape[2:])
            gates = convolved(np.concatenate([fused, deeper], 1), w["attention.weight"], w["attention.bias"])
            gates = 1 / (1 + np.exp(-gates))
            fused = fused * gates[:, :1] + deeper * gates[:, 1:]
        deeper = fused = nearest(fused, teacher.shape[2:])
        output = normalized(convolved(fused, w["leave.0.weight"]), w["leave.1.weight"], w["leave.1.bias"])
        squares, shares = [((output - teacher) ** 2).mean((1, 2, 3))], [1.0]
        for side in (4, 2, 1):
            if side < teacher.shape[2]:
                squares.append(((averaged(output, side) - averaged(teacher, side)) ** 2).mean((1, 2, 3)))
                shares.append(shares[-1] / 2)
        total = total + sum(share * value for share, value in zip(shares, squares, strict=True)) / sum(shares)
    return total


def case(seed=0):
    rng = np.random.default_rng(seed)
    students = {pair.layer: rng.normal(size=(N, *pair.student_shape)) for pair in PAIRS}
    teachers = {pair.tap: rng.normal(size=(N, *pair.teacher_shape)) for pair in PAIRS}
    module = ReviewKD(PAIRS, seed=3)
    with torch.no_grad():  # fresh normalization does nothing that could be wrong
        for value in module.parameters():
            value += 0.3 * torch.from_numpy(rng.normal(size=value.shape)).float()
    return module, students, teachers


def inputs_of(students, teachers):
    features = {name: torch.from_numpy(value).float().requires_grad_() for name, value in students.items()}
    targets = {(0, name): torch.from_numpy(value).float() for name, value in teachers.items()}
    output = StudentOutput(torch.zeros(N, 10), features=features)
    return LossInputs(output, torch.zeros(N).long(), Targets([], targets, (0,)))


def test_value_and_gradients():
    module, students, teachers = case()
    weights = {name: value.double().numpy().copy() for name, value in module.state_dict().items()}
    inputs = inputs_of(students, teachers)
    value = module(inputs)
    want = reference(weights, students, teachers)
    np.testing.assert_allclose(value.detach().numpy(), want, rtol=1e-5)
    value.sum().backward()

    def slope(values, name, index):
        kept, sums = values[name][index], []
        for step in (1e-5, -1e-5):
            values[name][index] = kept + step
            sums.append(reference(weights, students, teachers).sum())
        values[name][index] = kept
        return (sums[0] - sums[1]) / 2e-5

    for layer, index in (("s1", (1, 2, 3, 4)), ("s2", (0, 5, 3, 3)), ("s3", (4, 8, 0, 1))):
        got = inputs.student.features[layer].grad[index].item()
        assert got == pytest.approx(slope(students, layer, index), rel=1e-3, abs=1e-5)
    own = dict(module.named_parameters())
    for level in range(len(PAIRS)):
        for name in (
            "enter.0.weight",
            "enter.1.bias",
            "leave.0.weight",
            "leave.1.weight",
            "attention.weight",
        ):
            name = f"levels.0.fusions.{level}.{name}"
            if name in own:
                index = tuple(side - 1 for side in own[name].shape)
                got = own[name].grad[index].item()
                assert got == pytest.approx(slope(weights, name, index), rel=1e-3, abs=1e-5), name
    assert sum(name.endswith("attention.weight") for name in own) == len(PAIRS) - 1


def test_several_teachers_have_modules_of_their_own_and_equal_weight():
    module, students, teachers = case()
    both = ReviewKD(
        [*PAIRS, *(FeaturePair(1, p.tap, p.layer, p.teacher_shape, p.student_shape) for p in PAIRS)]
    )
    state = module.state_dict()
    both.load_state_dict(state | {name.replace("levels.0.", "levels.1.", 1): v for name, v in state.items()})
    inputs = inputs_of(students, teachers)
    targets = inputs.targets.features
    shared = Targets([], targets | {(1, tap): value for (_, tap), value in targets.items()}, (0, 1))
    one = module(inputs)
    two = both(LossInputs(inputs.student, inputs.labels, shared))
    torch.testing.assert_close(two, one)


def test_modules_depend_on_the_seed_alone():
    first, again, other = (ReviewKD(PAIRS, seed=seed).state_dict() for seed in (0, 0, 1))
    name = "levels.0.fusions.0.enter.0.weight"
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not torch.equal(first[name], other[name])


def test_the_weight_rises_for_twenty_epochs():
    weight = METHODS["reviewkd"].objective.terms["reviewkd"].weight
    assert [value_at(weight, epoch) for epoch in (0, 1, 10, 20, 200)] == [0, 0.25, 2.5, 5, 5]


@pytest.fixture(scope="module")
def tapped_cnn(tmp_path_factory, teachers):
    """A store of the `digits-cnn` among the teachers with both of its maps."""
    path = tmp_path_factory.mktemp("review") / "cnn.zarr"
    run_job(make_job(path, teachers[1], taps=(parse_tap("conv1"), parse_tap("conv2"))), quiet=True)
    return path


def test_a_batch_of_one_adds_nothing():
    module, students, teachers = case()
    one = [{name: value[:1] for name, value in each.items()} for each in (students, teachers)]
    inputs = inputs_of(*one)
    output = StudentOutput(torch.zeros(1, 10), features=inputs.student.features)
    assert module(LossInputs(output, torch.zeros(1).long(), inputs.targets)) is None


def test_a_student_is_trained_with_every_block(tapped_cnn):
    objective = {"terms": {"reviewkd": {"weight": 1.0}}}
    recipe = make_recipe(
        [tapped_cnn], method="reviewkd", student="digits-resnet", objective=objective, limit=128
    )
    setup = prepare(recipe, CPU)
    state = make_state(setup)
    pairs = state.learner.objective.context.pairs_by_term["reviewkd"]
    assert [pair.layer for pair in pairs] == ["stem", "layer1", "layer2"]
    assert [pair.tap for pair in pairs][0::2] == ["conv1", "conv2"]
    losses = [train_epoch([state], setup.batches(epoch), setup.targets, epoch)[0] for epoch in range(3)]
    assert losses[-1]["reviewkd"] < 0.9 * losses[0]["reviewkd"]
    groups = state.optimizer.param_groups
    trained = {id(value) for group in groups for value in group["params"]}
    assert {id(value) for value in state.learner.objective.terms.parameters()} <= trained
