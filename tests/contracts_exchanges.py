"""What every exchange between students has to do: each row of `EXCHANGES` is tested."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from contracts_terms import C, D, N, check_description, normal

from coursepack.distill.exchange import EXCHANGES
from coursepack.distill.exchange.base import ExchangeInputs, GroupContext, MemberShapes
from coursepack.distill.losses.base import LossInputs, Step, StudentOutput
from coursepack.distill.losses.mutual import Mutual, MutualConfig
from coursepack.distill.objective_config import ObjectiveConfig
from coursepack.models.build import build_network, seeded

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from coursepack.distill.exchange.base import Exchanged
    from coursepack.models import Network

SHAPE = (3, 4, 4)
"""Shape of the students' last maps."""
LABELS = torch.arange(N) % C


def config_of(name: str) -> ObjectiveConfig:
    """The objective of students that learn through an exchange alone."""
    values = {"hard_weight": 0.0, "exchange": {"name": name}, "terms": {"mutual": {}}}
    return ObjectiveConfig.model_validate(values)


def count_of(name: str) -> int:
    """Number of students: three, or as near to it as the exchange takes."""
    fewest, most = EXCHANGES[name].students
    return max(fewest, 3 if most is None else min(3, most))


def built(name: str, *, seed: int = 0) -> nn.Module:
    """An exchange in the middle of training."""
    config, row = config_of(name), EXCHANGES[name]
    needs = config.needs()
    members = tuple(
        MemberShapes(
            D if needs.embedding else 0,
            f"map{index}" if row.layers == "last map" else "",
            SHAPE if row.layers == "last map" else (),
        )
        for index in range(count_of(name))
    )
    networks = tuple(build_network("digits-small", C, seed=index) for index in range(count_of(name)))
    with seeded(seed):
        exchange = row.build(config.exchange, GroupContext(members, C, seed, networks))
    for method, position in (("begin_epoch", 0), ("begin_step", 0)):
        if hasattr(exchange, method):
            getattr(exchange, method)(position)
    return exchange


def inputs_of(name: str, *, other: int = N) -> ExchangeInputs:
    """Outputs that have what the exchange declares and nothing else; samples from `other` on differ."""

    def rows(*shape: int, seed: int) -> Tensor:
        mixed = [normal(N, *shape, seed=seed)[:other], normal(N, *shape, seed=seed + 50)[other:]]
        return torch.cat(mixed)

    needs, maps = config_of(name).needs(), EXCHANGES[name].layers == "last map"
    outputs = tuple(
        StudentOutput(
            rows(C, seed=index).requires_grad_(),
            rows(D, seed=10 + index).requires_grad_() if needs.embedding else None,
            {f"map{index}": rows(*SHAPE, seed=20 + index).requires_grad_()} if maps else {},
        )
        for index in range(count_of(name))
    )

    def predict(network: Network, own: int) -> Tensor:
        logits: Tensor = network.module(rows(1, 8, 8, seed=30 + own))
        return logits

    return ExchangeInputs(outputs, LABELS, Step(), predict)


def exchanged(name: str, exchange: nn.Module | None = None, **batch: int) -> tuple[Exchanged, ExchangeInputs]:
    """What an exchange makes of a batch, and the batch."""
    inputs = inputs_of(name, **batch)
    return (exchange or built(name))(inputs), inputs


def check_exchange(name: str) -> None:
    """One or more finite logits `(N, C)` float32 for every student to follow, and losses that are scalars."""
    row = EXCHANGES[name]
    check_description(row, row.config(), "name", name)
    assert config_of(name).exchange == row.config()
    found, inputs = exchanged(name)
    assert len(found.targets) == len(inputs.outputs)
    for target in (target for own in found.targets for target in own):
        assert (target.shape, target.dtype) == ((N, C), torch.float32)
        assert target.isfinite().all()
    assert all(found.targets), "a student has nobody to follow"
    check_losses(found.losses, len(inputs.outputs))
    again, _ = exchanged(name)
    for own, same in zip(found.targets, again.targets, strict=True):
        assert all(torch.equal(*pair) for pair in zip(own, same, strict=True))


def check_losses(losses: tuple[Mapping[str, Tensor], ...], students: int) -> None:
    """Finite scalars by name for every student, or none at all."""
    assert len(losses) in (0, students)
    for value in (value for own in losses for value in own.values()):
        assert value.shape == ()
        assert value.isfinite()
        assert value.requires_grad


def check_gradients(name: str) -> None:
    """Gradients reach other students, or the exchange, exactly if the row says why in `joint`.

    What is not detached is declared, since gradients of such students cannot be scaled each by itself.
    """
    exchange, mutual = built(name), Mutual(MutualConfig())
    found, inputs = exchanged(name, exchange)
    reached: set[str] = set()
    for index, (output, targets) in enumerate(zip(inputs.outputs, found.targets, strict=True)):
        # A student's own logits, apart from those that its targets were made of.
        own = StudentOutput(output.logits.detach().requires_grad_())
        value = mutual(LossInputs(own, LABELS, peers=targets))
        assert value is not None
        loss = value.mean()
        reached |= gradients(loss, inputs, exchange, index)
    more = list(found.losses)
    if hasattr(exchange, "second_step"):
        second = exchange.second_step(inputs)
        check_losses(second, len(inputs.outputs))
        more += second
    for index, losses in enumerate(more):
        for loss in losses.values():
            reached |= gradients(loss, inputs, exchange, index % len(inputs.outputs))
    trained = any(value.requires_grad for value in exchange.parameters())
    assert bool(reached) == bool(EXCHANGES[name].joint), reached
    assert trained == ("the exchange" in reached), "its parameters are not trained by any loss"


def gradients(loss: Tensor, inputs: ExchangeInputs, exchange: nn.Module, own: int) -> set[str]:
    """Who but the student itself receives a gradient of its loss."""
    if not loss.requires_grad:
        return set()
    tensors: dict[Tensor, str] = {}
    for index, output in enumerate(inputs.outputs):
        read = (output.logits, output.embedding, *output.features.values())
        tensors |= {each: f"student {index}" for each in read if each is not None}
    tensors |= {value: "the exchange" for value in exchange.parameters() if value.requires_grad}
    values = torch.autograd.grad(loss, list(tensors), retain_graph=True, allow_unused=True)
    found = zip(tensors.values(), values, strict=True)
    return {who for who, value in found if value is not None and value.any()} - {f"student {own}"}


def check_rows(name: str) -> None:
    """What a sample's students follow depends on the rest of the batch only where the needs declare it."""
    if config_of(name).needs().whole_batch:
        return
    kept = N // 2
    (before, _), (after, _) = exchanged(name), exchanged(name, other=kept)
    for own, changed in zip(before.targets, after.targets, strict=True):
        for target, other in zip(own, changed, strict=True):
            torch.testing.assert_close(other[:kept], target[:kept], rtol=1e-6, atol=1e-7)
            assert not torch.equal(other, target)


def check_state(name: str) -> None:
    """Its state, and no more, makes another one the same: a run goes on as if it had not been interrupted."""
    exchange, other = built(name), built(name, seed=1)
    exchanged(name, exchange)
    other.load_state_dict(exchange.state_dict())
    before, after = (exchanged(name, each)[0] for each in (exchange, other))
    for own, same in zip(before.targets, after.targets, strict=True):
        assert all(torch.equal(*pair) for pair in zip(own, same, strict=True))
