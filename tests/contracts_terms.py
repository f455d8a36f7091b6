"""What every loss term and every fusion has to do: each row of `LOSSES` and `FUSIONS` is tested."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coursepack.distill.fusion import FUSIONS
from coursepack.distill.losses import LOSSES
from coursepack.distill.losses.base import (
    BuildContext,
    FeaturePair,
    LossInputs,
    Needs,
    Step,
    StudentOutput,
    TeacherHead,
)
from coursepack.distill.objective import Objective
from coursepack.distill.objective_config import ObjectiveConfig
from coursepack.distill.targets.base import Targets

if TYPE_CHECKING:
    from torch import Tensor

N, C, K, D = 6, 5, 3, 4
"""Samples, classes, teachers, width of the student's embedding."""
TAP, LAYER = "tap", "layer"
BESIDE: dict[str, dict[str, Any]] = {
    "latents": {"fusion": {"name": "adaptive"}},
    "gate": {"fusion": {"name": "gated"}},
}
"""Numbers of the objective that a term needs beside its own."""


def normal(*shape: int, seed: int) -> Tensor:
    """Numbers of a seed."""
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 2, shape)).float()


def pair_of(needs: Needs, teacher: int) -> FeaturePair:
    """A pair that a term can compare."""
    assert needs.pairs is not None
    if needs.pairs.choose == "flows":
        return FeaturePair(teacher, f"{TAP}+{TAP}@gram", f"{LAYER}+second", (3, 2), (3, 4, 4), (2, 2, 2))
    # The layer of a student that is wrapped with the teacher's head has the teacher's channels.
    student_shape = (4, 4, 4) if needs.teacher_head else (3, 4, 4)
    maps = bool({"map", "margin"} & set(needs.pairs.reductions))
    return FeaturePair(teacher, TAP, LAYER, (4, 2, 2) if maps else (4,), student_shape)


def context_of(needs: Needs, term: str = "") -> BuildContext:
    """Everything that a term or a fusion is built for."""
    pairs = () if needs.pairs is None else tuple(pair_of(needs, teacher) for teacher in range(K))
    return BuildContext(
        teachers=K,
        classes=C,
        epochs=K,
        accuracies=(0.5, 0.7, 0.6),
        embedding_width=D,
        heads=tuple(TeacherHead(normal(C, 4, seed=30 + k), normal(C, seed=40 + k)) for k in range(K))
        if needs.teacher_heads
        else (),
        labels=np.arange(N) % C,
        pairs_by_term={} if needs.pairs is None else {term: pairs},
    )


def inputs_of(needs: Needs, context: BuildContext, *, other: int = N) -> LossInputs:
    """A batch that has what the needs declare and nothing else; samples from `other` on are other ones."""

    def rows(*shape: int, seed: int) -> Tensor:
        return torch.cat([normal(N, *shape, seed=seed)[:other], normal(N, *shape, seed=seed + 50)[other:]])

    pairs = next(iter(context.pairs_by_term.values()), ())
    layers = {
        layer: shape
        for pair in pairs
        for layer, shape in zip(pair.layers, (pair.student_shape, pair.second_shape or ()), strict=False)
    }
    layers |= dict.fromkeys(needs.student_layers, (3, 4, 4))
    targets = None
    if needs.teachers:
        logits = [rows(C, seed=1 + k).requires_grad_() for k in range(K)] if needs.logits else []
        features = {(pair.teacher, pair.tap): rows(*pair.teacher_shape, seed=9) for pair in pairs}
        targets = Targets(logits, features=features)
    return LossInputs(
        StudentOutput(
            rows(C, seed=0).requires_grad_(),
            rows(D, seed=7).requires_grad_() if needs.embedding else None,
            {layer: rows(*shape, seed=8).requires_grad_() for layer, shape in layers.items()},
        ),
        torch.arange(N) % C,
        targets,
        Step(),
        np.arange(N),
        peers=(rows(C, seed=20),) if needs.peers else (),
    )


def value_of(name: str, **batch: int) -> tuple[Tensor | None, LossInputs, Objective]:
    """What a term gives for a batch, as the objective calls it."""
    config = ObjectiveConfig.model_validate({"hard_weight": 0.0, **BESIDE.get(name, {}), "terms": {name: {}}})
    needs = config.needs()
    context = context_of(needs, name)
    objective, seen = Objective(config, context), []
    objective.terms[name].register_forward_hook(lambda _module, _args, value: seen.append(value))
    inputs = inputs_of(needs, context, **batch)
    objective(inputs)
    return seen[0], inputs, objective


def check_description(row: Any, config: Any, key: str, name: str) -> None:
    """The row says what it is, and its numbers survive being written down."""
    assert row.formula
    assert row.source
    assert getattr(config, key) == name
    assert type(config).model_validate(config.model_dump()) == config
    assert isinstance(row.needs(config), Needs)


def check_term(name: str) -> None:
    """Per sample `(N,)` or a scalar, float32, finite, reproducible; no gradient to the teachers."""
    check_description(LOSSES[name], LOSSES[name].config(), "term", name)
    value, inputs, objective = value_of(name)
    assert value is not None
    assert value.dtype == torch.float32
    assert value.shape in ((N,), ())
    assert value.isfinite().all()
    again = value_of(name)[0]
    assert again is not None
    assert torch.equal(again, value)
    value.mean().backward()
    student = inputs.student
    learned = [student.logits, student.embedding, *student.features.values(), *objective.parameters()]
    assert any(tensor is not None and tensor.grad is not None and tensor.grad.any() for tensor in learned)
    teachers = [] if inputs.targets is None else inputs.targets.logits
    assert all(logits.grad is None for logits in teachers if isinstance(logits, torch.Tensor))


def check_rows(name: str) -> None:
    """A sample's loss depends on the rest of its batch only where the needs declare it."""
    kept = N // 2
    before, after = value_of(name), value_of(name, other=kept)
    if LOSSES[name].needs(LOSSES[name].config()).whole_batch:
        return
    assert before[0] is not None
    assert after[0] is not None
    if before[0].ndim:
        torch.testing.assert_close(after[0][:kept], before[0][:kept], rtol=1e-6, atol=1e-7)
        assert not torch.equal(after[0], before[0])
    elif not torch.equal(after[0], before[0]):
        # A mean over samples gives a sample the same gradient whatever the others are.
        for value, inputs, _ in (before, after):
            value.backward()
            assert inputs.student.logits.grad is not None, (
                "a scalar that depends on the samples declares whole_batch"
            )
        own, same = (inputs.student.logits.grad[:kept] for _, inputs, _ in (after, before))
        torch.testing.assert_close(own, same, rtol=1e-6, atol=1e-9)


def check_fusion(name: str) -> None:
    """Weights `(K,)` or `(N, K)` float32, none negative, that sum to one, however sure the teachers are.

    A fusion that abstains leaves samples without weights, and says so.
    """
    row = FUSIONS[name]
    config = row.config(name=name)
    check_description(row, config, "name", name)
    needs = row.needs(config) | Needs(fused=True)
    context = context_of(needs)
    if row.choose is not None:
        chosen = [row.choose(config, context, Step(0, batch)) for batch in range(20)]
        assert set(chosen) <= set(range(K))
        assert (len(set(chosen)) > 1) == row.every_batch
    inputs = inputs_of(needs, context)
    assert inputs.targets is not None
    sure = [1e4 * torch.eye(C)[torch.arange(N) % C].roll(k, 1) for k in range(K)]
    for logits in (inputs.targets.logits, sure, sure[:1] * K):
        weights = row.build(config, context)(replace(inputs, targets=Targets(logits)))
        if weights is None:
            continue
        assert weights.dtype == torch.float32
        assert weights.shape in ((K,), (N, K))
        assert (weights >= 0).all()
        sums = weights.sum(-1)
        if row.abstains:
            sums = sums + (weights == 0).all(-1)
        torch.testing.assert_close(sums, torch.ones(weights.shape[:-1]))
