"""Losses between features: against NumPy references and published figures, and trained on digits stores."""

import shlex

import numpy as np
import pytest
import torch
from builders import CPU, make_recipe, write_store
from click.testing import CliRunner
from reference import methods as ref_methods
from reference import relations as ref
from test_distill_published import agree, figures

from coursepack.distill.losses import LOSSES
from coursepack.distill.losses.at import attention_loss
from coursepack.distill.losses.base import BuildContext, FeaturePair, LossInputs, StudentOutput
from coursepack.distill.losses.cc import correlation_loss
from coursepack.distill.losses.fsp import flow_loss
from coursepack.distill.losses.nst import selectivity_loss
from coursepack.distill.losses.pkt import probabilistic_loss
from coursepack.distill.losses.sp import similarity_loss
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.targets.base import Targets
from coursepack.distill.training.loop import train_epoch
from coursepack.distill.training.state import make_state
from coursepack.errors import RecipeError
from coursepack.models import reductions
from coursepack.models.taps import tap_from_name
from coursepack.precompute.cli import main as precompute

N = 6
PLAIN = {"at": ref.at, "nst": ref.nst, "sp": ref.sp, "pkt": ref.pkt, "cc": ref.cc}


def maps(*shape, seed):
    """Maps as after a ReLU, `(N, *shape)` float64."""
    return np.maximum(np.random.default_rng(seed).normal(0.3, 1, (N, *shape)), 0)


def pooled(features):
    return features.reshape(*features.shape[:2], -1).mean(2)


def term_value(name, tap, student, teachers, config=None):
    """Value of a term for pairs of one tap, float32, with the student's tensors."""
    config = LOSSES[name].config(**(config or {}))
    layers = [f"layer{index}" for index in range(len(student))]
    held = dict(zip(layers, [torch.from_numpy(x).float().requires_grad_() for x in student], strict=True))
    stored, pairs = {}, []
    for index, outputs in enumerate(teachers):
        parsed = tap_from_name(tap)
        tensors = [torch.from_numpy(x).float() for x in outputs]
        if parsed.reduction == "pooled" and tensors[0].ndim == 2:
            tensors = [x[..., None, None] for x in tensors]
        stored[index, tap] = parsed.reduce(tensors, None)
        whole = tap_from_name(tap.partition("@sketch")[0]).reduce(tensors, None).shape[1:]
        shapes = [tuple(x.shape[1:]) for x in student]
        pairs.append(FeaturePair(index, tap, "+".join(layers), tuple(whole), *shapes))
    module = LOSSES[name].build(config, BuildContext(teachers=len(teachers), pairs=tuple(pairs)))
    inputs = LossInputs(
        StudentOutput(torch.zeros(N, 3), features=held), torch.zeros(N).long(), Targets([], stored)
    )
    return module(inputs), list(held.values())


def check_slopes(value, student, reference, chosen=((0, 0, 1, 1), (3, 2, 0, 2), (5, 1, 3, 0))):
    """The gradient to the student against finite differences of the reference."""
    value.mean().backward()
    for tensor, index in zip([student[0]] * len(chosen), chosen, strict=True):
        index = index[: tensor.ndim]
        sides = []
        for step in (1e-5, -1e-5):
            moved = [x.detach().double().numpy().copy() for x in student]
            moved[0][index] += step
            sides.append(reference(*moved))
        slope = (sides[0] - sides[1]) / 2e-5
        assert tensor.grad[index].item() == pytest.approx(slope, rel=2e-3, abs=2e-6)


@pytest.mark.parametrize(
    ("name", "tap", "per_sample"),
    [
        ("at", "t@attention", True),
        ("at", "t", True),
        ("nst", "t@gram", True),
        ("nst", "t", True),
        ("sp", "t", False),
    ],
)
def test_maps_against_the_formula(name, tap, per_sample):
    student, teacher = maps(3, 4, 4, seed=1) + 0.1, maps(5, 4, 4, seed=2) + 0.1
    value, tensors = term_value(name, tap, [student], [[teacher]])
    assert value.shape == ((N,) if per_sample else ())
    assert value.mean().item() == pytest.approx(PLAIN[name](student, teacher), rel=1e-4)
    check_slopes(value, tensors, lambda moved: PLAIN[name](moved, teacher))


@pytest.mark.parametrize("name", ["pkt", "cc", "distance", "angle"])
@pytest.mark.parametrize("tap", ["t@pooled", "t"])
@pytest.mark.parametrize("vectors", [False, True])
def test_embeddings_against_the_formula(name, tap, vectors):
    """Maps on either side are averaged over positions, whichever of them the store holds."""
    config = {"compare": "features"} if name in ("distance", "angle") else {}
    plain = {**PLAIN, "distance": ref_methods.distance_loss, "angle": ref_methods.angle_loss}[name]
    student, teacher = maps(3, 4, 4, seed=1), maps(5, 4, 4, seed=2)
    student = pooled(student) if vectors else student
    value, tensors = term_value(name, tap, [student], [[teacher]], config)
    assert value.shape == ()

    def reference(moved):
        return plain(pooled(moved) if moved.ndim == 4 else moved, pooled(teacher))

    # Embeddings of positive numbers are alike, so that what the losses compare are small differences.
    assert value.item() == pytest.approx(reference(student), rel=1e-3)
    check_slopes(value, tensors, reference)


def test_flows_against_the_formula():
    student = [maps(3, 4, 4, seed=1), maps(5, 4, 4, seed=2)]
    teacher = [maps(3, 4, 4, seed=3), maps(5, 4, 4, seed=4)]
    value, tensors = term_value("fsp", "a+b@gram", student, [teacher])
    assert value.shape == (N,)
    assert value.mean().item() == pytest.approx(ref.fsp(student, teacher), rel=1e-5)
    check_slopes(value, tensors, lambda *moved: ref.fsp(moved, teacher))


@pytest.mark.parametrize("tap", ["t@attention", "t", "t@attention2"])
def test_attention_of_larger_students_is_of_their_pooled_maps(tap):
    student, teacher = maps(3, 8, 8, seed=1), maps(5, 4, 4, seed=2)
    side = 2 if tap.endswith("2") else 4
    expected = ref.at(ref.tiles(student, side), ref.tiles(teacher, side))
    value, _ = term_value("at", tap, [student], [[teacher]])
    assert value.mean().item() == pytest.approx(expected, rel=1e-4)
    if tap == "t":
        value, _ = term_value("at", tap, [teacher], [[student]])
        assert value.mean().item() == pytest.approx(expected, rel=1e-4)


def test_attention_at_the_papers_distance():
    student, teacher = maps(3, 4, 4, seed=1), maps(5, 4, 4, seed=2)
    value, _ = term_value("at", "t@attention", [student], [[teacher]], {"distance": "norm"})
    assert value.mean().item() == pytest.approx(ref.at_norm(student, teacher), rel=1e-4)


EQUAL = {
    "at": "t@attention",
    "nst": "t@gram",
    "sp": "t",
    "pkt": "t@pooled",
    "cc": "t@pooled",
    "distance": "t@pooled",
    "angle": "t@pooled",
    "fsp": "a+b@gram",
}


@pytest.mark.parametrize("name", EQUAL)
def test_a_student_like_its_teacher_has_no_loss(name):
    config = {"compare": "features"} if name in ("distance", "angle") else {}
    features = [maps(3, 4, 4, seed=1)] * (2 if name == "fsp" else 1)
    for tap in (EQUAL[name], f"{EQUAL[name]}@sketch5"):
        if "sketch" in tap and name not in ("nst", "sp", "fsp"):
            continue
        value, tensors = term_value(name, tap, features, [features], config)
        assert value.abs().max().item() < 1e-9
        value.sum().backward()
        assert all(tensor.grad.abs().max() < 1e-4 for tensor in tensors)


@pytest.mark.parametrize("name", EQUAL)
def test_teachers_are_averaged(name):
    config = {"compare": "features"} if name in ("distance", "angle") else {}
    count = 2 if name == "fsp" else 1
    student, first, second = ([maps(3, 4, 4, seed=s + i) for i in range(count)] for s in (1, 3, 5))
    alone = [term_value(name, EQUAL[name], student, [teacher], config)[0] for teacher in (first, second)]
    together = term_value(name, EQUAL[name], student, [first, second], config)[0]
    torch.testing.assert_close(together, (alone[0] + alone[1]) / 2)


@pytest.mark.parametrize(
    ("name", "tap", "least"), [("sp", "t@sketch", 0.02), ("nst", "t@gram@sketch", 0), ("fsp", "a+b@gram@sketch", 0)]
)
def test_losses_of_sketches_are_close(name, tap, least):
    """Differences of Grams and flows are kept on average; SP's rows are normalized, which adds a bias."""
    count = 2 if name == "fsp" else 1
    student, teacher = ([maps(12, 8, 8, seed=s + i) for i in range(count)] for s in (1, 5))
    exact = term_value(name, tap.removesuffix("@sketch"), student, [teacher])[0].mean()
    for width, most in ((64, 0.8), (96, 0.6)):
        found = term_value(name, f"{tap}{width}", student, [teacher])[0].mean()
        assert abs(found / exact - 1) < most
    assert least < 1


def released(name, student, teacher, eps=1e-7):
    """A loss on the figures' tensors, in float64."""
    return {
        "at": lambda: attention_loss(reductions.attention(student), reductions.attention(teacher)).mean(),
        "norm": lambda: attention_loss(
            reductions.attention(student), reductions.attention(teacher), "norm"
        ).mean(),
        "nst": lambda: selectivity_loss(reductions.gram(student), reductions.gram(teacher)).mean(),
        "sp": lambda: similarity_loss(student, teacher),
        "pkt": lambda: probabilistic_loss(student, teacher, eps),
        "cc": lambda: correlation_loss(student, teacher),
    }[name]()


@pytest.mark.parametrize(
    ("loss", "file", "source", "numbers"),
    [
        ("at", "at", "repdistiller", {}),
        ("at", "at", "szagoruyko", {}),
        ("norm", "at", "torchdistill", {}),
        ("nst", "nst", "repdistiller", {}),
        ("sp", "sp", "repdistiller", {}),
        ("pkt", "pkt", "passalis", {}),
        ("pkt", "pkt", "repdistiller", {}),
        ("pkt", "pkt", "zoo", {"eps": 1e-6}),
        ("cc", "cc", "zoo", {}),
    ],
)
def test_published_figures(loss, file, source, numbers):
    held = figures(file)
    student = held["student"].requires_grad_()
    value = released(loss, student, held["teacher"], **numbers)
    value.backward()
    agree(value, held[f"{source}_loss"].reshape(()))
    agree(student.grad, held[f"grad_{source}"])


def test_published_figures_without_gradients():
    held = figures("nst")
    agree(released("nst", held["student"], held["teacher"]), held["zoo_loss"])
    held = figures("at")
    found = torch.nn.functional.normalize(reductions.attention(held["student"]))
    agree(found, held["repdistiller_map"])


def test_published_flows():
    held = figures("fsp")
    student = [held[f"student_{side}"].requires_grad_() for side in ("first", "second")]
    teacher = reductions.pair_gram(held["teacher_first"], held["teacher_second"])
    flow = reductions.pair_gram(*student)
    agree(flow.transpose(1, 2), held["repdistiller_matrix"])
    value = flow_loss(flow, teacher).mean()
    value.backward()
    agree(value, held["repdistiller_loss"])
    agree(value, held["zoo_loss"])
    agree(student[0].grad, held["grad_first"])
    agree(student[1].grad, held["grad_second"])
