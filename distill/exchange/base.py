"""Base types of exchanges: config, inputs and output for one batch, and the table row.

A group is a student and its peers, which train together on the same batches. In every step, an exchange maps
the outputs of all students of the group to the logits that each of them follows; the loss term `mutual`
compares a student with them. An exchange may have parameters, layers of the students that it reads, and
losses of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from coursepack.config import Config
from coursepack.distill.losses.base import Needs, Step, StudentOutput

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from coursepack.data.store.locations.base import Location
    from coursepack.kernels import MixedLabels
    from coursepack.models import Network


class ExchangeConfig(Config):
    """Base class of the configs of exchanges."""

    name: str = "outputs"
    """Name of the exchange, a key of `EXCHANGES`."""
    train_peers: bool = True
    """Train the peers; false keeps their initial weights, so that they are teachers that run live."""
    peer_lr_factor: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of the peers over that of the student."""

    @property
    def is_sequential(self) -> bool:
        """True if students are updated one after another within a step."""
        return False

    @property
    def splits_rows(self) -> bool:
        """True if every student reads rows of its own, a share of the samples."""
        return False

    @model_serializer(mode="wrap")
    def _keep_name(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"name": self.name, **handler(self)}


@dataclass(frozen=True)
class MemberShapes:
    """Shapes of what an exchange reads of one student, for one sample."""

    embedding_width: int = 0
    """Width D of the embedding; 0 if the exchange does not need it."""
    last_map: str = ""
    """Name of the deepest block that gives maps; empty if the exchange does not read it."""
    map_shape: tuple[int, ...] = ()
    """Shape (C, H, W) of that block's output."""


@dataclass(frozen=True)
class GroupContext:
    """Properties of a group of students that an exchange is built from."""

    students: tuple[MemberShapes, ...]
    """The student, then its peers."""
    classes: int
    """Number of classes C."""
    seed: int = 0
    """Seed of the exchange's initial weights."""
    networks: tuple[Network, ...] = ()
    """Networks of the student and of its peers."""


@dataclass(frozen=True)
class ReplicaContext:
    """Properties of one of several replicas of a student, each trained by a process of its own."""

    index: int
    """Index of the replica."""
    count: int
    """Number of replicas."""
    network: Network
    """Network of the replica."""
    location: Location
    """Folder or bucket through which the replicas exchange weights."""
    identity: dict[str, Any]
    """Everything in which replicas must agree, as plain values."""


@dataclass(frozen=True)
class ExchangeInputs:
    """Inputs of an exchange for one batch."""

    outputs: tuple[StudentOutput, ...]
    """Outputs of the student and of its peers, in this order, with gradient."""
    labels: Tensor | MixedLabels
    """Class ids `(N,)` int64, or two class ids and their shares per sample if images are mixed."""
    step: Step = field(default_factory=Step)
    predict: Callable[[Network, int], Tensor] | None = None
    """Returns a network's logits for the rows of a student by index."""


@dataclass(frozen=True)
class Exchanged:
    """Output of an exchange for one batch."""

    targets: tuple[tuple[Tensor, ...], ...]
    """Logits `(N, C)` that each student follows. Gradients flow through targets that are not detached."""
    losses: tuple[Mapping[str, Tensor], ...] = ()
    """Further losses of each student by name, weighted scalars with gradient; empty if there are none. Losses
    of the exchange itself, such as that of a fused classifier, stand with the first student."""


@dataclass(frozen=True)
class Exchange:
    """One kind of exchange.

    The module that `build` returns maps `ExchangeInputs` to `Exchanged`. Its parameters are trained by the
    optimizer of the first student. Optional methods are `begin_epoch(epoch)`; `begin_step(steps)`, called
    before every step with the number of completed ones; `parameter_groups()`, for parameters with their own
    optimizer settings; `after_step(inputs)`; `epoch_metrics()`, which returns the metrics of an epoch as
    plain values and starts the next; `ensembles(outputs)`, which returns logits `(N, C)` to evaluate by
    name; and `second_step(inputs)`, which returns further losses of each student, as in `Exchanged.losses`.
    These are minimized by a step of their own after the usual one, with `second_lr_factor` of the config
    times its learning rate.
    """

    config: type[ExchangeConfig]
    formula: str
    """Targets of each student, in one line."""
    source: str
    """Paper and equation."""
    build: Callable[[Any, GroupContext], nn.Module]
    needs: Callable[[Any], Needs] = lambda _config: Needs()
    """Needs of the exchange from every student of a group."""
    layers: Literal["none", "last map"] = "none"
    """Layers that are read of every student: `last map` is its deepest block that gives maps."""
    students: tuple[int, int | None] = (2, None)
    """Smallest and largest number of students, the peers included; None means no limit."""
    build_replica: Callable[[Any, ReplicaContext], nn.Module] | None = None
    """Builds the exchange of one of several replicas; None if the students have to be in one process."""
    joint: str = ""
    """Reason why gradients flow from one student's loss into another student, or into the exchange; empty if
    every target is detached and the exchange has no parameters."""
