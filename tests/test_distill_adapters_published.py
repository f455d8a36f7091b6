"""Losses with adapters and memories against figures of published implementations (tests/golden/published)."""

import pytest
import torch
from builders import loss_inputs
from test_distill_published import agree, figures

from coursepack.distill.losses.activation_boundaries import ABConfig, ActivationBoundaries, boundary_loss
from coursepack.distill.losses.adapters import Regressor
from coursepack.distill.losses.base import FeaturePair
from coursepack.distill.losses.contrast import Contrast, CRDConfig
from coursepack.distill.losses.factor_transfer import factor_distance
from coursepack.distill.losses.hint import Hints
from coursepack.distill.losses.overhaul import partial_distance
from coursepack.distill.losses.vid import FeatureModel
from coursepack.distill.targets.base import Targets
from coursepack.models.reductions import above_margin, attention, margins


def inputs_of(student, teacher):
    """Inputs of four samples, with features by layer, and by teacher and tap."""
    targets = Targets([], teacher, (0,))
    return loss_inputs(torch.zeros(4, 10), torch.zeros(4).long(), targets, features=student)


def published(name, case, loss, student="student"):
    """The value of `loss(student, held)` and its gradient, on the inputs of a published figure."""
    held = figures(name, case)
    tensor = held[student].clone().requires_grad_()
    value = loss(tensor, held)
    value.backward()
    return held, value, tensor.grad


def regressed(student, held):
    regressor = Regressor((5, 4, 4), (6, 4, 4), relu=True).double()
    with torch.no_grad():
        regressor.conv.weight.copy_(held["conv_weight"])
        regressor.conv.bias.copy_(held["conv_bias"])
    return (regressor(student) - held["teacher"]).square().mean()


def test_fitnets_regressor():
    held, value, gradient = published("fitnet", "same", regressed)
    agree(value, held["repdistiller_loss"])
    agree(gradient, held["grad_repdistiller"])


@pytest.mark.parametrize("source", ["lenscloth", "amtml"])
def test_hints(source):
    """The linear adapter; AMTML's release divides both features by their norm over channels before it."""

    def hints(student, held):
        module = Hints([FeaturePair(0, "tap", "layer", (6, 4, 4), (5, 4, 4))])
        change = module.adapters[0].change
        with torch.no_grad():
            change.weight.copy_(held[f"{source}_weight"])
            change.bias.zero_()
        teacher = held["teacher"]
        if source == "amtml":
            student, teacher = (torch.nn.functional.normalize(each) for each in (student, teacher))
        return module(inputs_of({"layer": student}, {(0, "tap"): teacher})).mean()

    held, value, gradient = published("fitnet", "same", hints)
    agree(value, held[f"{source}_loss"])
    agree(gradient, held[f"grad_{source}"])


def test_vid():
    models = []

    def vid(student, held):
        models.append(model := FeatureModel((6, 4, 4), (6, 4, 4)).double())
        with torch.no_grad():
            for number in range(3):
                model.mean[2 * number].weight.copy_(held[f"conv_{number}"])
            model.log_scale.copy_(held["log_scale"])
        return model(student, held["teacher"]).mean()

    held, value, gradient = published("vid", "a", vid)
    for source in ("repdistiller", "mdistiller"):
        agree(value, held[f"{source}_loss"])
    agree(gradient, held["grad_repdistiller"])
    agree(models[0].log_scale.grad, held["grad_log_scale"])


def test_activation_boundaries():
    held = figures("ab", "three_layers")
    students = [held[f"student_{layer}"].clone().requires_grad_() for layer in range(3)]
    teachers = [held[f"teacher_{layer}"] for layer in range(3)]
    sums = [boundary_loss(s, t).sum() for s, t in zip(students, teachers, strict=True)]
    for layer, total in enumerate(sums):
        agree(total, held[f"raw_sums_{layer}"])
        agree(0.003 * total / 4 * 2.0 ** (layer - 2), held[f"repdistiller_losses_{layer}"])
    agree(0.003 * sums[2] / 4, held["mmrazor_layer2"])
    agree(sums[2] / students[2].numel(), held["zoo_layer2"])
    pairs = [
        FeaturePair(0, f"tap{layer}", f"layer{layer}", tuple(t.shape[1:]), tuple(t.shape[1:]))
        for layer, t in enumerate(teachers)
    ]
    module = ActivationBoundaries(ABConfig(), pairs)
    features = {(0, f"tap{layer}"): teacher for layer, teacher in enumerate(teachers)}
    inputs = inputs_of({f"layer{layer}": student for layer, student in enumerate(students)}, features)
    value = 0.003 * module(inputs).mean()
    value.backward()
    agree(value, held["bhheo_loss"])
    for layer, student in enumerate(students):
        agree(student.grad, held[f"grad_bhheo_{layer}"])


def test_overhaul():
    def ofd(student, held):
        target = above_margin(held["teacher"], margins(held["bn_bias"], held["bn_weight"]).double())
        agree(target, held["clovaai_target"])
        return partial_distance(student, target).sum()

    held, value, gradient = published("ofd", "a", ofd)
    agree(value, held["clovaai_loss"])
    agree(gradient, held["grad_clovaai"])
    agree(value / 4, held["mdistiller_loss"])
    agree(value / 4000, held["mmrazor_loss"])


def test_factor_transfer():
    held, value, gradient = published("ft", "a", lambda s, held: factor_distance(s, held["teacher"]).mean())
    agree(value, held["kim_loss"])
    agree(value, held["torchdistill_loss"])
    agree(gradient, held["grad_kim"])


def test_factor_transfer_of_attention():
    def distance(student, held):
        return factor_distance(attention(student), attention(held["teacher"])).mean()

    held, value, gradient = published("ft", "a", distance)
    agree(value, held["repdistiller_loss"])
    agree(gradient, held["grad_repdistiller"])


def test_contrast():
    made, after = [], []

    def crd(student, held):
        made.append(module := Contrast(5, 7, 20, CRDConfig(dim=6)).double())
        with torch.no_grad():
            for side, name in (("student", "s"), ("teacher", "t")):
                getattr(module, side).weight.copy_(held[f"embed_{name}_weight"])
                getattr(module, side).bias.copy_(held[f"embed_{name}_bias"])
                getattr(module, f"{side}_memory").copy_(held[f"memory_{side}"])
        embeddings = module.embed(student, held["teacher"])
        value = module(*embeddings, held["contrast_index"]).mean()
        after.append(lambda: module.remember(*(each.detach() for each in embeddings), held["index"]))
        return value

    held, value, gradient = published("crd", "first", crd)
    after[0]()
    module = made[0]
    agree(value, held["repdistiller_loss"].squeeze())
    agree(gradient, held["grad_repdistiller"])
    agree(module.teacher.weight.grad, held["grad_embed_t_weight"])
    agree(module.log_normalizers.exp(), torch.stack([held["z_student"], held["z_teacher"]]))
    for side in ("student", "teacher"):
        agree(getattr(module, f"{side}_memory"), held[f"memory_{side}_after"])
