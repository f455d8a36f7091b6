"""Losses between features: against NumPy references and published figures, and trained on digits stores."""

import shlex

import numpy as np
import pytest
import torch
from builders import CPU, loss_inputs, make_recipe, write_store
from click.testing import CliRunner
from reference import methods as ref_methods
from reference import relations as ref
from test_distill_published import agree, figures

from coursepack.data import open_source, view_recipe
from coursepack.distill.cli import main as distill
from coursepack.distill.losses import LOSSES
from coursepack.distill.losses.at import attention_loss
from coursepack.distill.losses.base import BuildContext, FeaturePair, LossInputs, StudentOutput
from coursepack.distill.losses.cc import correlation_loss
from coursepack.distill.losses.fsp import flow_loss
from coursepack.distill.losses.nst import selectivity_loss
from coursepack.distill.losses.pkt import probabilistic_loss
from coursepack.distill.losses.sp import similarity_loss
from coursepack.distill.objective import Objective
from coursepack.distill.recipe import resolve_objective
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.targets.base import Targets
from coursepack.distill.training.loop import train_epoch
from coursepack.distill.training.state import make_state
from coursepack.errors import RecipeError
from coursepack.models import TeacherRunner, load_teacher, parse_tap, reductions
from coursepack.models.taps import tap_from_name
from coursepack.precompute import Job, run_job
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
        if "sketch" in tap and name not in ("nst", "fsp"):
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


@pytest.mark.parametrize(("name", "tap"), [("nst", "t@gram@sketch"), ("fsp", "a+b@gram@sketch")])
def test_losses_of_sketches_are_close(name, tap):
    """Squared distances of Gram matrices and of flows are kept on average."""
    count = 2 if name == "fsp" else 1
    student, teacher = ([maps(12, 8, 8, seed=s + i) for i in range(count)] for s in (1, 5))
    exact = term_value(name, tap.removesuffix("@sketch"), student, [teacher])[0].mean()
    found = term_value(name, f"{tap}96", student, [teacher])[0].mean()
    assert abs(found / exact - 1) < 0.5


def test_similarities_of_sketches_pull_the_student_the_same_way():
    """The teacher alone is projected: over projections, the mean gradient is nearly that of whole maps."""
    student, teacher = (torch.from_numpy(maps(16, 8, 8, seed=seed)).float() for seed in (1, 2))

    def gradient(target):
        moved = student.clone().requires_grad_()
        similarity_loss(moved, target).backward()
        return moved.grad.flatten()

    exact = gradient(teacher)
    found = torch.stack([gradient(reductions.sketch(teacher, 256, seed)) for seed in range(60)])
    bias, cosine = found.mean(0) - exact, torch.nn.functional.cosine_similarity
    assert cosine(found.mean(0), exact, dim=0) > 0.9
    assert bias.norm() < 0.5 * exact.norm()
    single, pairs = term_value("sp", "t@sketch256", [student.double().numpy()], [[teacher.double().numpy()]])
    single.backward()
    torch.testing.assert_close(pairs[0].grad.flatten(), found[0])


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
    found = torch.nn.functional.normalize(reductions.attention(held["teacher"]))
    agree(found, held["repdistiller_map"])


def test_rkd_with_its_published_weights():
    held = figures("rkd")
    pair = FeaturePair(0, "t@pooled", "layer", (4,), (4,))
    context = BuildContext(pairs_by_term={"distance": (pair,), "angle": (pair,)})
    objective = Objective(resolve_objective("rkd", {}, "test", classes=3), context)
    student = held["student"].float().requires_grad_()
    targets = Targets([], {(0, pair.tap): held["teacher"].float()})
    value = objective(
        loss_inputs(torch.zeros(6, 3), torch.zeros(6).long(), targets, features={"layer": student})
    )
    relations = value.loss - value.terms["cross_entropy"]
    relations.backward()
    agree(relations, held["repdistiller_loss"])
    agree(student.grad, held["grad_repdistiller"])


def test_published_flows():
    held = figures("fsp")
    student = [held[f"student_{side}"].requires_grad_() for side in ("first", "second")]
    teacher = reductions.pair_gram(held["teacher_first"], held["teacher_second"])
    agree(teacher.transpose(1, 2), held["repdistiller_matrix"])
    value = flow_loss(reductions.pair_gram(*student), teacher).mean()
    value.backward()
    agree(value, held["repdistiller_loss"])
    agree(value, held["zoo_loss"])
    agree(student[0].grad, held["grad_first"])
    agree(student[1].grad, held["grad_second"])


TAPS = (
    *("stem:attention", "layer1:attention", "layer2:attention", "layer2", "layer2:pooled", "layer2:gram"),
    *("stem+layer1:gram", "layer1+layer2:gram", "layer1:sketch:200", "layer2:sketch:200"),
    *("layer2:gram:sketch:64", "stem+layer1:gram:sketch:100"),
)
METHODS = ("at", "sp", "rkd", "pkt", "cc", "nst", "fsp")


@pytest.fixture(scope="module")
def featured(tmp_path_factory, teachers):
    """A float32 store of `digits-resnet` with every tap that the methods read, two views."""
    path, source = tmp_path_factory.mktemp("featured") / "resnet.zarr", open_source("digits")
    runner = TeacherRunner(
        load_teacher(f"run:{teachers[2]}", source.class_names), [parse_tap(tap) for tap in TAPS]
    )
    job = Job(path, source, view_recipe("digits"), runner, 2, encoding="float32", feature_encoding="float32")
    run_job(job, quiet=True)
    return path


def trained(store, method, student="digits-resnet", online=False, **terms):
    """Metrics of one epoch, and the pairs of taps and layers of each term."""
    fields = {"student": student, "limit": 128, "optimizer": {"lr": 0.01}, "online": online}
    recipe = make_recipe([store], method=method, objective={"terms": terms}, **fields)
    run = prepare(recipe, CPU)
    state = make_state(run)
    told = train_epoch([state], run.batches(0), run.targets)[0]
    pairs = state.learner.objective.context.pairs_by_term
    return told, {key: [(pair.tap, pair.layer) for pair in of_term] for key, of_term in pairs.items()}


CHOSEN = {
    "at": [("stem@attention", "stem"), ("layer1@attention", "layer1"), ("layer2@attention", "layer2")],
    "sp": [("layer2", "layer2")],
    "distance": [("layer2@pooled", "layer2")],
    "angle": [("layer2@pooled", "layer2")],
    "pkt": [("layer2@pooled", "layer2")],
    "cc": [("layer2@pooled", "layer2")],
    "nst": [("layer2@gram", "layer2")],
    "fsp": [("stem+layer1@gram", "stem+layer1"), ("layer1+layer2@gram", "layer1+layer2")],
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_train_on_the_smallest_taps_that_are_stored(featured, method):
    told, pairs = trained(featured, method)
    assert pairs == {key: CHOSEN[key] for key in (("distance", "angle") if method == "rkd" else (method,))}
    assert all(0 < told[key] < 1e4 for key in pairs)
    assert told["cross_entropy"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_smoke_run_needs_no_pairs(tmp_path, method):
    (tmp_path / "r.yaml").write_text(
        f"student: digits-resnet\nmethod: {method}\n"
        "source: digits\nview: digits\nstores: [no.zarr, none.zarr]\n"
    )
    words = ["train", str(tmp_path / "r.yaml"), "--smoke", "--out", str(tmp_path / "o")]
    result = CliRunner().invoke(distill, words)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("method", METHODS)
def test_missing_taps_are_refused_with_the_line_that_adds_them(stores, method):
    with pytest.raises(RecipeError) as refusal:
        prepare(make_recipe([stores[2]], method=method, student="digits-resnet"), CPU)
    text = str(refusal.value)
    assert text.startswith(f"method '{method}' needs features that are not stored. Add them with\n")
    key = "angle" if method == "rkd" else method
    taps = [tap_from_name(tap).text for tap, _ in CHOSEN[key]]
    assert text.endswith(f"--store {stores[2]} " + " ".join(f"--tap {tap}" for tap in taps))


def test_a_perceptron_has_no_flows(stores):
    with pytest.raises(RecipeError, match=r"has no two consecutive blocks that give maps: name layers with"):
        prepare(make_recipe([stores[2]], method="fsp", student="digits-small"), CPU)


def refusal_of(featured, method, tap, layer, student="digits-cnn", key=None):
    pairs = [{"teacher": 0, "tap": tap, "layer": layer}]
    objective = {"terms": {key or method: {"pairs": pairs}}}
    with pytest.raises(RecipeError) as refusal:
        make_state(prepare(make_recipe([featured], method=method, student=student, objective=objective), CPU))
    return str(refusal.value)


@pytest.mark.parametrize(
    ("method", "tap", "layer", "problem", "stored"),
    [
        ("at", "layer1:attention", "conv2",
         "the teacher's 64 positions cannot be compared with the student's 4 x 4", "layer1:attention:4"),
        ("at", "layer1:attention", "hidden", "it takes one layer of the student that gives maps", ""),
        ("nst", "stem+layer1:gram", "conv2", "it takes the matrix of one layer", "layer1:gram"),
        ("nst", "layer2:sketch:200", "conv2", "it takes no sketch of 'map'", "layer2"),
        ("pkt", "layer2:sketch:200", "conv2", "it takes no sketch of 'map'", "layer2"),
        ("fsp", "stem+layer1:gram", "conv1+conv2",
         "the student's flow is (16, 32), and flows have to be of the same numbers of channels", ""),
        ("fsp", "stem+layer1:gram:sketch:100", "conv1+conv2", "the student's flow is (16, 32), and", ""),
        ("fsp", "layer2:gram", "conv1+conv2", "it takes a tap of two layers, as a+b:gram", ""),
    ],
)  # fmt: skip
def test_pairs_that_do_not_fit_are_refused_with_the_tap_that_does(
    featured, method, tap, layer, problem, stored
):
    text = refusal_of(featured, method, tap, layer)
    assert text.startswith(f"term {method!r} cannot compare {parse_tap(tap).name!r} of store '{featured}'")
    assert f"with layer {layer!r} of the student (shape (" in text
    assert problem in text
    assert text.endswith(f" --store {featured} --tap {stored}") == bool(stored)
    assert ("precompute run" in text) == bool(stored)


def test_the_line_of_a_refusal_stores_a_tap_that_fits(tmp_path, teachers):
    store = write_store(tmp_path / "resnet.zarr", teachers[2])
    for method, student in (("fsp", "digits-resnet"), ("at", "digits-cnn")):
        with pytest.raises(RecipeError) as refusal:
            prepare(make_recipe([store], method=method, student=student), CPU)
        line = str(refusal.value).splitlines()[-1]
        result = CliRunner().invoke(precompute, shlex.split(line)[1:])
        assert result.exit_code == 0, result.output
    line = refusal_of(store, "at", "stem:attention", "conv2").splitlines()[-1]
    assert CliRunner().invoke(precompute, shlex.split(line)[1:]).exit_code == 0
    fits = [{"teacher": 0, "tap": "stem:attention:4", "layer": "conv2"}]
    told, pairs = trained(store, "at", "digits-cnn", at={"pairs": fits})
    assert pairs == {"at": [("stem@attention4", "conv2")]}
    assert told["at"] > 0


@pytest.mark.parametrize(
    ("method", "tap", "layer"),
    [
        ("sp", "layer2", "layer2"),
        ("nst", "layer2:gram", "layer2"),
        ("fsp", "stem+layer1:gram", "stem+layer1"),
    ],
)
def test_sketches_train_as_what_they_are_made_of(featured, method, tap, layer):
    width = {"sp": 200, "nst": 64, "fsp": 100}[method]
    losses = []
    for text in (tap, f"{tap}:sketch:{width}"):
        told, pairs = trained(
            featured, method, **{method: {"pairs": [{"teacher": 0, "tap": text, "layer": layer}]}}
        )
        assert pairs == {method: [(parse_tap(text).name, layer)]}
        losses.append(told[method])
    assert losses[1] == pytest.approx(losses[0], rel=0.3)
    assert losses[1] != losses[0]
    sketched = {method: {"pairs": [{"teacher": 0, "tap": text, "layer": layer}]}}
    assert trained(featured, method, online=True, **sketched)[0][method] == pytest.approx(losses[1], rel=1e-4)


def test_what_depends_on_the_batch_is_declared():
    coupled = {
        name: LOSSES[name].needs(LOSSES[name].config()).whole_batch
        for name in ("at", "nst", "fsp", "sp", "pkt", "cc")
    }
    assert coupled == {"at": (), "nst": (), "fsp": (), "sp": ("sp",), "pkt": ("pkt",), "cc": ("cc",)}
    features = LOSSES["angle"].config(compare="features")
    assert LOSSES["angle"].needs(features).whole_batch == ("angle",)
    assert not LOSSES["angle"].needs(features).logits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layers": ["a"]},
            "pairs and layers are of features, but compare is outputs: give compare=features",
        ),
        ({"compare": "features", "student": "logits"}, "student is .logits., a form of outputs"),
    ],
)
def test_relations_of_outputs_and_of_features_are_told_apart(changes, message):
    with pytest.raises(ValueError, match=message):
        LOSSES["angle"].config(**changes)
