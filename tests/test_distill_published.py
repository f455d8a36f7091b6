"""Losses, weights and gradients against figures of published implementations (tests/golden/published)."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import loss_inputs

from coursepack.distill.fusion.fused import standardized
from coursepack.distill.fusion.temperature import sample_temperatures
from coursepack.distill.losses.base import BuildContext
from coursepack.distill.losses.dkd import decoupled_divergences
from coursepack.distill.losses.relation import angle_loss, distance_loss
from coursepack.distill.objective import Objective
from coursepack.distill.recipe import resolve_objective
from coursepack.distill.targets.base import Targets
from coursepack.kernels import shift_logits, soft_target_loss, soft_targets

PUBLISHED = Path(__file__).parent / "golden" / "published"
ALL_FREE = {"gamma": 1.0, "lowest": 0.1, "highest": 100.0}
"""TextBrewer's temperatures are not clamped."""


def figures(name, case="a"):
    """The arrays of one case as tensors, in float64 where they are numbers."""
    with np.load(PUBLISHED / f"{name}.npz") as held:
        return {
            key.removeprefix(f"{case}."): torch.from_numpy(held[key])
            for key in held.files
            if key.startswith(f"{case}.")
        }


def agree(got, want):
    """To 1e-5 of the largest value."""
    want = torch.as_tensor(want, dtype=torch.float64)
    got = torch.as_tensor(got).detach().double()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def objective_value(case, changes, teachers, method="kd"):
    """A method's value on a case, with the student's logits and whatever else receives a gradient."""
    held = figures(case) if isinstance(case, str) else case
    student = held["student"].clone().requires_grad_()
    config = resolve_objective(method, changes, "test", classes=student.shape[1])
    adaptive = "latents" in held
    width = held["latents"].shape[1] if adaptive else 0
    objective = Objective(config, BuildContext(len(teachers), embedding_width=width)).double()
    embedding = held["representation_map"].flatten(1).clone().requires_grad_() if adaptive else None
    if adaptive:
        with torch.no_grad():
            objective.fusion.latents.copy_(held["latents"])
            objective.fusion.shared.copy_(held["shared"][:, 0])
    labels = held.get("labels", torch.zeros(len(student), dtype=torch.int64))
    value = objective(loss_inputs(student, labels, Targets(list(teachers)), embedding=embedding))
    return value, student, embedding, objective


def compare(case, changes, teachers, loss, gradient, *, method="kd"):
    """Check a method's loss and its gradient to the student's logits."""
    value, student, _, _ = objective_value(case, changes, teachers, method)
    value.loss.backward()
    agree(value.loss, loss)
    agree(student.grad, gradient)


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        *[
            (source, {"soft_weight": 1.0, "hard_weight": 0.0})
            for source in ("repdistiller", "mdistiller", "zoo", "mmrazor", "hunto")
        ],
        ("torchdistill", {"soft_weight": 0.7, "hard_weight": 0.3}),
        ("szagoruyko", {"soft_weight": 0.7, "hard_weight": 0.3}),
        ("takd", {"soft_weight": 0.6 / 5, "hard_weight": 0.4}),  # mean over the five classes, too
    ],
)
def test_kd(source, changes):
    held = figures("kd")
    loss, gradient = held[f"{source}_loss"], held[f"grad_{source}"]
    compare("kd", changes, [held["teacher"]], loss, gradient)


@pytest.mark.parametrize(
    ("source", "standardize"), [("mdistiller", False), ("mmrazor", False), ("std", True)]
)
def test_dkd(source, standardize):
    held = figures("dkd")
    changes = {"hard_weight": 0.0, "standardize": standardize, "terms": {"dkd": {"weight": 1.0}}}
    loss, gradient = held[f"{source}_loss"], held[f"grad_{source}"]
    compare("dkd", changes, [held["teacher"]], loss, gradient, method="dkd")


def test_the_parts_of_dkd():
    held = figures("dkd")
    log_q, probs = (held["student"] / 4).log_softmax(1), (held["teacher"] / 4).softmax(1)
    target, others = decoupled_divergences(log_q, probs, held["labels"])
    agree(4**2 * target.mean(), held["mdistiller_tckd"])
    agree(4**2 * others.mean(), held["mdistiller_nckd"])


@pytest.mark.parametrize("source", ["hunto", "segmentation", "torchdistill", "mmrazor"])
def test_dist(source):
    held = figures("dist")
    changes = {"hard_weight": 0.0, "temperature": 1.0, "terms": {"dist": {"weight": 1.0}}}
    loss, gradient = held[f"{source}_loss"], held[f"grad_{source}"]
    compare("dist", changes, [held["teacher"]], loss, gradient, method="dist")


@pytest.mark.parametrize(
    ("source", "changes"),
    [("sun", {"soft_weight": 1.0, "hard_weight": 0.0}), ("torchdistill", {})],
)
def test_standardized_logits(source, changes):
    held = figures("logit_std")
    loss, gradient = held[f"{source}_loss"], held[f"grad_{source}"]
    compare("logit_std", changes, [held["teacher"]], loss, gradient, method="logit-std")
    agree(standardized(held["teacher"]), held["sun_standardised"])


def test_self_training_of_tf_kd():
    """Its KL is divided by the five classes, and has T², which the paper's equation has not."""
    held = figures("tfkd")
    changes = {"soft_weight": 0.95 / 5}
    loss, gradient = held["self_loss"], held["grad_self"]
    compare("tfkd", changes, [held["teacher"]], loss, gradient, method="tf-kd-self")


def test_the_virtual_teacher_of_tf_kds_release():
    """The softmax of a probability, an untempered student, and KL divided by the five classes."""
    held = figures("tfkd")
    term = {"weight": 0.95 / 5, "softening": "double_softmax"}
    changes = {"hard_weight": 0.05, "terms": {"virtual_teacher": term}}
    compare("tfkd", changes, [], held["reg_loss"], held["grad_reg"], method="tf-kd")


def entropy(logits, temperature=1.0):
    """Of softmax(logits / temperature), `(N,)` nats."""
    log_probs = (logits / temperature).log_softmax(1)
    return -(log_probs.exp() * log_probs).sum(1)


@pytest.mark.parametrize("source", ["refinery", "fkd"])
def test_soft_cross_entropy_is_kl_and_the_teachers_entropy(source):
    held = figures("refinery")
    value, student, _, _ = objective_value(held, {}, [held["teacher"]], "label-refinery")
    value.loss.backward()
    agree(value.loss + entropy(held["teacher"]).mean(), held[f"{source}_loss"])
    agree(student.grad, held[f"grad_{source}"])


@pytest.mark.parametrize(
    ("source", "smoothing"),
    [
        ("torch", 0.1),
        ("pfnet", 0.1),
        ("tfkd", 0.1 * 5 / 4),  # the smoothed share goes to the four wrong classes alone
    ],
)
def test_label_smoothing(source, smoothing):
    held = figures("lsr")
    changes = {"label_smoothing": smoothing}
    compare("lsr", changes, [], held[f"{source}_loss"], held[f"grad_{source}"], method="supervised")


@pytest.mark.parametrize("source", ["lenscloth", "amtml"])
@pytest.mark.parametrize(("name", "loss"), [("distance", distance_loss), ("angle", angle_loss)])
def test_relations(source, name, loss):
    held = figures("rkd")
    student = held["student"].requires_grad_()
    value = loss(student, held["teacher"])
    value.backward()
    agree(value, held[f"{source}_{name}"])
    agree(student.grad, held[f"grad_lenscloth_{name}"])


def test_relations_together():
    held = figures("rkd")
    student = held["student"].requires_grad_()
    value = 25 * distance_loss(student, held["teacher"]) + 50 * angle_loss(student, held["teacher"])
    value.backward()
    agree(value, held["repdistiller_loss"])
    agree(student.grad, held["grad_repdistiller"])


def test_relations_of_normalized_embeddings():
    """mmrazor normalizes its embeddings by default."""
    held = figures("rkd")
    student, teacher = F.normalize(held["student"]), F.normalize(held["teacher"])
    agree(distance_loss(student, teacher), held["mmrazor_distance"])
    agree(angle_loss(student, teacher), held["mmrazor_angle"])


def test_equal_samples_count_as_a_distance_of_zero():
    """The releases clamp squared distances at 1e-12 and take the mean over all that are above zero."""

    def released(embedding):
        squared = (embedding[:, None] - embedding[None]).square().sum(2).clamp_min(1e-12)
        table = squared.sqrt() * (1 - torch.eye(len(embedding), dtype=torch.float64))
        return table / table[table > 0].mean()

    held = figures("rkd")
    student, teacher = (torch.cat([held[name], held[name][:2]]) for name in ("student", "teacher"))
    agree(distance_loss(student, teacher), F.smooth_l1_loss(released(student), released(teacher)))


@pytest.mark.parametrize(
    ("method", "source", "size"),
    [
        ("avg", "aver", 1.0),
        ("ebkd", "ebkd", 2 / 3),  # its weights sum to K - 1, and it divides by K
        ("ca-mkd", "camkd", 1 / 3),  # it divides by K
    ],
)
def test_several_teachers(method, source, size):
    held = figures("multi_logits")
    changes = {"soft_weight": size, "hard_weight": 0.0}
    loss, gradient = held[f"{source}_loss"], held[f"grad_{source}"]
    compare("multi_logits", changes, held["teachers"], loss, gradient, method=method)
    if f"{source}_weights" in held:
        value, _, _, _ = objective_value(held, {}, held["teachers"], method)
        published = held[f"{source}_weights"].T
        agree(value.weights, published / published.sum(1, keepdim=True))


def test_ca_mkd_with_its_cross_entropy():
    held = figures("multi_logits")
    changes = {"soft_weight": 1 / 3}
    loss, gradient = held["total_loss"], held["grad_total"]
    compare("multi_logits", changes, held["teachers"], loss, gradient, method="ca-mkd")


def test_weights_per_sample():
    """MMKD's weights are a small network's; its figure's gradient does not go through them."""
    held = figures("meta_weights", "mmkd")
    student, teachers = held["student"].requires_grad_(), list(held["teachers"])
    weights = held["mmkd_weights"]
    loss = soft_target_loss(student, teachers, weights=weights, temperature=4.0, combine="sum").mean()
    loss.backward()
    agree(loss, held["mmkd_loss"])
    agree(student.grad, held["grad_mmkd"])


def at_temperature(student, labels):
    """0.3 CE at T = 5, of LR_adaptive_learning, whose other notebooks take it at T = 1 as we do."""
    return 0.3 * F.cross_entropy(student / 5, labels)


def check_adaptive(loss, tensors, held, source):
    """Gradients to logits, embedding and latents."""
    student, embedding, objective = tensors
    loss.backward()
    agree(student.grad, held[f"grad_{source}"])
    agree(embedding.grad, held[f"grad_{source}_map"].flatten(1))
    agree(objective.fusion.latents.grad, held[f"grad_{source}_latents"])
    agree(objective.fusion.shared.grad, held[f"grad_{source}_shared"][:, 0])


def test_amtml_with_angles_and_distances_of_log_probs():
    held = figures("amtml")
    terms = {"angle": {"student": "log_probs"}, "distance": {"student": "log_probs"}}
    changes = {"terms": terms, "hard_weight": 0.0}
    value, *tensors = objective_value(held, changes, held["teachers"], "amtml")
    agree(value.weights, held["learning_weights"])
    agree(value.terms["angle"], held["angle_log_probs"])
    agree(value.terms["distance"], held["distance_log_probs"])
    loss = value.loss + at_temperature(tensors[0], held["labels"])
    agree(loss, held["learning_loss"])
    agree(loss - value.terms["latents"], held["learning_loss_val"])
    check_adaptive(loss, tensors, held, "learning")


def test_amtml_as_in_its_notebook_with_hints():
    """Its cross-entropy is at T = 1, and relations are left out of its loss."""
    held = figures("amtml")
    value, *tensors = objective_value(held, {"terms": {"angle": None}}, held["teachers"], "amtml")
    agree(value.loss, held["hint_loss"])
    check_adaptive(value.loss, tensors, held, "hint")
    soft = {"terms": {"angle": None}, "hard_weight": 0.0, "soft_weight": 2 / 10}
    agree(objective_value(held, soft, held["teachers"], "amtml")[0].loss, held["hint_loss_alpha1"])


@pytest.mark.parametrize("name", ["angle", "distance"])
def test_amtml_relations_of_logits(name):
    held = figures("amtml")
    terms = {"angle": None, "latents": None, name: {"student": "logits"}}
    changes = {"terms": terms, "soft_weight": 0.0, "hard_weight": 0.0}
    value, student, _, _ = objective_value(held, changes, held["teachers"], "amtml")
    value.loss.backward()
    agree(value.loss, held[f"{name}_logits"])
    agree(student.grad, held[f"grad_{name}_logits"])


def test_the_average_of_teachers_in_amtmls_notebooks():
    held = figures("amtml_triplets")
    changes = {"soft_weight": 1.4 / 10, "hard_weight": 0.3, "temperature": 5.0}
    compare("amtml_triplets", changes, held["teachers"], held["avg_kd_loss"], held["grad_avg_kd"])


def published_temperatures(held, kind, teacher):
    return sample_temperatures(held["student"], teacher, kind=kind, base=4.0, slope=1.0, **ALL_FREE).values


def test_dynamic_temperatures_and_shifted_logits():
    held = figures("ka_dtd")
    agree(published_temperatures(held, "flsw", held["teacher"]), held["textbrewer_flsw"])
    agree(published_temperatures(held, "cwsm", None), held["textbrewer_cwsm"])
    moved = shift_logits(held["teacher"], held["labels"])
    agree(moved, held["textbrewer_shifted"])
    agree(published_temperatures(held, "flsw", moved), held["textbrewer_flsw_after_shift"])


@pytest.mark.parametrize(
    ("source", "kind", "adjustment"),
    [
        ("flsw", "flsw", "none"),
        ("cwsm", "cwsm", "none"),
        ("shift", "none", "shift"),
        ("both", "flsw", "shift"),
    ],
)
def test_adjusted_teachers_at_dynamic_temperatures(source, kind, adjustment):
    """TextBrewer's loss is a cross-entropy without T²: our divergence over T_x² and an entropy."""
    held = figures("ka_dtd")
    student = held["student"].clone().requires_grad_()
    teacher = held["teacher"] if adjustment == "none" else shift_logits(held["teacher"], held["labels"])
    fixed = torch.full((len(student),), 4.0)
    temperatures = fixed if kind == "none" else published_temperatures(held, kind, teacher)
    ours = soft_target_loss(
        student, [held["teacher"]], held["labels"], temperature=temperatures, adjustment=[adjustment],
        row_weight=1 / temperatures**2,
    )  # fmt: skip
    ours.mean().backward()
    entropies = entropy(teacher, temperatures[:, None].double())
    agree((ours + entropies).mean(), held[f"textbrewer_{source}_loss"])
    agree(student.grad, held[f"grad_textbrewer_{source}"])


@pytest.mark.parametrize(
    ("method", "source"), [("dtd-flsw", "flsw"), ("dtd-cwsm", "cwsm"), ("ka-dtd", "flsw_after_shift")]
)
def test_methods_take_the_published_temperatures(method, source):
    held = figures("ka_dtd")
    dynamic = {"slope": 1.0, **ALL_FREE}
    changes = {"temperature": 4.0, "dynamic_temperature": dynamic}
    value, _, _, _ = objective_value(held, changes, [held["teacher"]], method)
    agree(value.temperatures.values, held[f"textbrewer_{source}"])


def test_smoothed_labels_of_wrong_teachers():
    """KD_Lib gives 0.9 to the label and 0.1 / (C - 1) to each other class: epsilon is 0.1 C / (C - 1)."""
    held = figures("ka_dtd")
    got = soft_targets(
        [held["teacher"]], held["labels"], temperature=20.0, adjustment=["smooth"], smoothing=0.1 * 5 / 4
    )
    agree(got, held["kdlib_lsr_target"])


def test_figures_are_described():
    """Every file is in index.json, with each of its arrays."""
    told = json.loads((PUBLISHED / "index.json").read_text())["entries"]
    assert {entry["file"] for entry in told} == {path.name for path in PUBLISHED.glob("*.npz")}
    for entry in told:
        for name, case in entry["cases"].items():
            held = figures(entry["name"], name)
            shapes = case["inputs"] | case["outputs"]
            assert {key: list(value.shape) for key, value in held.items()} == shapes
            assert all(math.isfinite(float(value.double().sum())) for value in held.values())
