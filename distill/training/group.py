"""Groups of students that train together: their states, and the exchange between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coursepack.data.store.locations import open_group
from coursepack.distill.exchange import EXCHANGES
from coursepack.distill.exchange.base import GroupContext, MemberShapes, ReplicaContext
from coursepack.distill.setup.prepare import provenance
from coursepack.distill.setup.student import probe_student
from coursepack.distill.training.optimizer import make_optimizer
from coursepack.distill.training.state import make_learner, state_of
from coursepack.models.build import seeded

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from coursepack.distill.recipe import TrainRecipe
    from coursepack.distill.setup.prepare import Setup
    from coursepack.distill.training.learner import Learner
    from coursepack.distill.training.state import TrainState

OWN_FIELDS = (
    *("member", "seed", "group", "root", "stores", "reading", "online"),
    *("accumulate", "precision", "channels_last", "compile", "deterministic", "keep_checkpoints"),
)
"""Fields of the recipe in which the replicas of a group may differ."""


def make_group(setup: Setup, recipe: TrainRecipe | None = None) -> list[TrainState]:
    """Return the states of a freshly initialized student and its peers, or of a student that trains alone.

    Args:
        setup: the setup that they train in.
        recipe: recipe of the student and its peers; defaults to the setup's.

    Raises:
        UnknownName, RecipeError: a network cannot be built, or does not fit the exchange.
    """
    recipe = recipe or setup.recipe
    members = recipe.members()
    learners = [make_learner(setup, member) for member in members]
    config = recipe.objective.exchange
    if len(learners) > 1:
        exchange = _build_exchange(setup, recipe, learners).to(setup.device)
        couples = any(learner.couples for learner in learners)
        for index, learner in enumerate(learners):
            learner.couples = couples
            learner.requires_grad_(index == 0 or config.train_peers)
            learner.own_part = index if setup.shares > 1 else None
        learners[0].exchange = exchange
    elif recipe.replicas:
        learners[0].exchange = _build_replica(setup, recipe, learners[0])
    states = [
        state_of(learner, member, setup.steps_per_epoch)
        for learner, member in zip(learners, members, strict=True)
    ]
    for state in states[1:]:
        state.is_frozen = not config.train_peers
        _scale_rate(state.optimizer, config.peer_lr_factor)
    if hasattr(learners[0].exchange, "second_step"):
        factor = config.second_lr_factor  # type: ignore[attr-defined]  # a second step has a factor in its config
        for state in states:
            state.second = make_optimizer(state.learner, recipe.optimizer)
            _scale_rate(state.second, factor)
    return states


def _scale_rate(optimizer: Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr_factor"] = group.get("lr_factor", 1.0) * factor


def _build_exchange(setup: Setup, recipe: TrainRecipe, learners: list[Learner]) -> nn.Module:
    config = recipe.objective.exchange
    shapes = tuple(_shapes(learner, setup.source.channels) for learner in learners)
    networks = tuple(learner.network for learner in learners)
    with seeded(recipe.seed):
        return EXCHANGES[config.name].build(
            config, GroupContext(shapes, len(setup.source.class_names), recipe.seed, networks)
        )


def _build_replica(setup: Setup, recipe: TrainRecipe, learner: Learner) -> nn.Module:
    config = recipe.objective.exchange
    build = EXCHANGES[config.name].build_replica
    assert build is not None
    assert recipe.group is not None
    assert recipe.replicas is not None
    where = open_group(recipe.group)
    context = ReplicaContext(
        recipe.member, recipe.replicas, learner.network, where, _shared_identity(setup, recipe)
    )
    return build(config, context)


def _shared_identity(setup: Setup, recipe: TrainRecipe) -> dict[str, Any]:
    """Return everything in which the replicas of a group agree: recipe and fingerprints of the data."""
    origin = provenance(setup)
    return {
        "recipe": recipe.model_dump(mode="json", exclude=set(OWN_FIELDS)),
        "source_fingerprint": origin["source_fingerprint"],
        "view_fingerprint": origin["view_fingerprint"],
        "stores": [store["fingerprint"] for store in origin["stores"]],
    }


def _shapes(learner: Learner, channels: int) -> MemberShapes:
    context = learner.objective.context
    if not context.last_map:
        return MemberShapes(context.embedding_width)
    shapes = probe_student(learner.network, channels, [context.last_map]).features
    return MemberShapes(context.embedding_width, context.last_map, shapes[context.last_map])
