"""Shapes of terms and fusions beyond those that are there: memories, gates trained by labels."""

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import CPU, loss_inputs, make_recipe

from coursepack.distill.fusion import FUSIONS
from coursepack.distill.fusion.base import Fusion, FusionConfig
from coursepack.distill.losses import LOSSES
from coursepack.distill.losses.base import BuildContext, Loss, Needs, TermConfig
from coursepack.distill.methods import METHODS
from coursepack.distill.objective import Objective
from coursepack.distill.setup.prepare import prepare
from coursepack.distill.targets.base import Targets
from coursepack.distill.training.loop import train_epoch
from coursepack.distill.training.state import make_state
from coursepack.kernels import decode


class MemoryConfig(TermConfig):
    term: Literal["memory"] = "memory"


class Memory(torch.nn.Module):
    """The squared distance from a sample's logits to those of the last time; CRD keeps a memory like it."""

    def __init__(self, samples, classes):
        super().__init__()
        self.register_buffer("kept", torch.zeros(samples, classes))

    def forward(self, inputs):
        return (inputs.student.logits - self.kept[inputs.samples]).square().mean(1)

    def after_step(self, inputs):
        self.kept[inputs.samples] = inputs.student.logits.detach()


class GateConfig(FusionConfig):
    name: Literal["gate"] = "gate"


class Gate(torch.nn.Module):
    """Weights from the student's embedding, trained by the labels alone."""

    def __init__(self, width, teachers):
        super().__init__()
        self.layer = torch.nn.Linear(width, teachers)

    def forward(self, inputs):
        return self.layer(inputs.student.embedding.detach()).softmax(1)


class GateLabelConfig(TermConfig):
    term: Literal["gate_label"] = "gate_label"


class GateLabel(torch.nn.Module):
    """Cross-entropy of the fused targets to the labels; its gradient goes to the gate."""

    def forward(self, inputs):
        probs = torch.stack([decode(logits).softmax(1) for logits in inputs.soft.logits], 1)
        mixture = (inputs.soft.weights[:, :, None] * probs).sum(1)
        return F.nll_loss(mixture.log(), inputs.labels, reduction="none")


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    for name, config, needs, build in (
        ("memory", MemoryConfig, Needs(), lambda _, c: Memory(len(c.labels), c.classes)),
        ("gate_label", GateLabelConfig, Needs(fused=True), lambda *_: GateLabel()),
    ):
        monkeypatch.setitem(LOSSES, name, Loss(config, "", "", lambda _, needs=needs: needs, build))
    gate = Fusion(GateConfig, "", "", "mixture", lambda _, c: Gate(c.embedding_width, c.teachers),
                  lambda _: Needs(embedding="fusion 'gate'"))  # fmt: skip
    monkeypatch.setitem(FUSIONS, "gate", gate)


def with_terms(recipe, fusion=None, **terms):
    changes = {"terms": terms} | ({} if fusion is None else {"fusion": fusion})
    return recipe.model_copy(update={"objective": recipe.objective.model_copy(update=changes)})


def test_a_memory_is_told_of_every_step_once():
    setup = prepare(with_terms(make_recipe(limit=100), memory=MemoryConfig()), CPU)
    state = make_state(setup)
    kept = state.learner.objective.terms["memory"].kept
    assert kept.shape == (len(setup.source.labels), 10)
    train_epoch([state], setup.batches(0), None)
    seen = kept.abs().amax(1) > 0
    assert sorted(setup.samples.tolist()) == torch.nonzero(seen)[:, 0].tolist()
    assert "objective.terms.memory.kept" in state.state()["learner"], "a checkpoint has it"


def test_a_gate_is_trained_by_its_own_term(stores):
    recipe = make_recipe(stores, limit=100, student="digits-cnn")
    setup = prepare(with_terms(recipe, GateConfig(), gate_label=GateLabelConfig(weight=2.0)), CPU)
    state = make_state(setup)
    before = state.learner.objective.fusion.layer.weight.detach().clone()
    told = train_epoch([state], setup.batches(0), setup.targets)[0]
    assert told["gate_label"] > 0
    assert not torch.equal(before, state.learner.objective.fusion.layer.weight)


def test_a_term_may_occur_twice():
    targets = Targets([torch.randn(6, 5, generator=torch.manual_seed(0))])
    student, labels = torch.randn(6, 5), torch.arange(6) % 5
    config = METHODS["kd"].objective
    twice = config.model_validate({**config.model_dump(), "terms": {
        "again": {"term": "soft_target", "weight": 0.9, "hard_weight": 0.1}}})  # fmt: skip
    one, two = (Objective(each)(loss_inputs(student, labels, targets)).loss for each in (config, twice))
    assert two.item() == pytest.approx(2 * one.item(), rel=1e-6)


def test_terms_that_leave_a_step_out_add_nothing():
    class Silent(torch.nn.Module):
        def forward(self, _inputs):
            return None

    LOSSES["memory"] = replace(LOSSES["memory"], build=lambda *_: Silent())
    config = METHODS["supervised"].objective.model_copy(update={"terms": {"memory": MemoryConfig()}})
    inputs = loss_inputs(torch.randn(4, 3), torch.arange(4) % 3)
    assert list(Objective(config, BuildContext(labels=np.arange(4)))(inputs).terms) == ["cross_entropy"]


class NormGapConfig(TermConfig):
    term: Literal["norm_gap"] = "norm_gap"
    power: float = 2.0


class NormGap(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.power = config.power

    def forward(self, inputs):
        gap = inputs.student.logits.norm(dim=1) - inputs.teachers.logits[0].norm(dim=1)
        return gap.abs() ** self.power


def test_a_term_of_ones_own_is_one_row(monkeypatch):
    loss = Loss(NormGapConfig, "| |z| - |z_1| |^power", "made up", lambda _: Needs(teacher_logits=True),
                lambda config, _: NormGap(config))  # fmt: skip
    monkeypatch.setitem(LOSSES, "norm_gap", loss)
    term = NormGapConfig(weight=0.5, power=1.0)
    config = METHODS["kd"].objective.model_copy(update={"terms": {"gap": term}})
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    value = Objective(config)(loss_inputs(student, torch.arange(6) % 5, Targets([teacher])))
    gap = np.linalg.norm(student.numpy(), axis=1) - np.linalg.norm(teacher.numpy(), axis=1)
    assert value.terms["gap"].item() == pytest.approx(0.5 * np.abs(gap).mean(), rel=1e-5)
