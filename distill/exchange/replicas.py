"""Exchange of weights between replicas, each trained by a process of its own, through files of a folder.

group.json              recipe and data fingerprints, which are the same for all replicas of the group
replica-1.safetensors   newest weights of the first replica, with its number of steps

A replica replaces its own file atomically, and reads the others' when they have changed. It waits for no
other: one that is slow, stopped or dead leaves its file as it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from coursepack.canonical import canonical_json, difference_table
from coursepack.console import warn
from coursepack.distill.exchange.base import (
    Exchange,
    Exchanged,
    ExchangeInputs,
    GroupContext,
    ReplicaContext,
)
from coursepack.distill.exchange.stale import Recorded, Stale, StaleConfig, copy_weights, frozen_copy
from coursepack.distill.losses.base import Needs
from coursepack.errors import RunError
from coursepack.parsing import parse_json

if TYPE_CHECKING:
    from torch import Tensor

    from coursepack.data.store.locations.base import Location
    from coursepack.models import Network

GROUP_FILE = "group.json"
MOST_GROUP_BYTES = 1 << 24
HEADER_BYTES = 1 << 20
"""Most bytes of a file of weights beyond the weights."""
STEPS = "steps"
"""Key of the number of steps in the metadata of a file."""


class Replicas(Recorded):
    """Newest known weights of the other replicas, whose logits this one follows.

    They are not part of its state: a replica that is resumed reads the files again.
    """

    def __init__(self, config: StaleConfig, context: ReplicaContext) -> None:
        """Check that the folder is empty or belongs to this group.

        Raises:
            RunError: it is the folder of another group, or cannot be read.
        """
        super().__init__()
        self.config = config
        self._context = (context,)  # in a tuple, so that its network is not part of this module
        self._others: dict[int, tuple[Network, int]] = {}
        self._tags: dict[int, str] = {}
        self._has_started = False
        check_group(context.location, context.identity)

    def begin_step(self, steps: int) -> None:
        """Exchange files if it is due after a number of steps, or to start."""
        starts, is_due = not self._has_started, self.config.is_due(steps)
        if starts:
            self._start()
        if is_due:
            self._write(steps)
        if is_due or (starts and steps >= self.config.burn_in):
            self._read_all()
        self.record.add([steps - theirs for _, theirs in self._others.values()])

    def forward(self, inputs: ExchangeInputs) -> Exchanged:
        """Return the logits of the replicas whose weights are known."""
        assert inputs.predict is not None
        with torch.no_grad():
            logits = [inputs.predict(self._others[index][0], 0).float() for index in sorted(self._others)]
        return Exchanged((tuple(logits),))

    def _start(self) -> None:
        """Create the group unless it exists, and remove what this replica left when it was killed."""
        (context,) = self._context
        content = canonical_json(context.identity, indent=1).encode()
        if context.location.create(GROUP_FILE, content) is None:
            check_group(context.location, context.identity)
        own = _key(context.index)
        context.location.sweep("", lambda name: name.startswith(f"{own}."))
        self._has_started = True

    def _write(self, steps: int) -> None:
        (context,) = self._context
        weights = {
            name: value.detach().cpu().contiguous()
            for name, value in context.network.module.state_dict().items()
        }
        content = save(weights, metadata={STEPS: str(steps)})
        context.location.put(_key(context.index), content)
        self.record.moved += len(content)

    def _read_all(self) -> None:
        (context,) = self._context
        for index in range(context.count):
            if index == context.index:
                continue
            key = _key(index)
            try:
                self._read(index)
            except (OSError, ValueError, SafetensorError) as error:
                warn(
                    f"weights of replica {index + 1} are not used, since {context.location.where(key)!r} "
                    f"cannot be read: {' '.join(str(error).split())[:300]}"
                )

    def _read(self, index: int) -> None:
        """Read the weights of another replica if they have changed."""
        (context,) = self._context
        tag = context.location.tag(_key(index))
        if tag is None or tag == self._tags.get(index):
            return
        self._tags[index] = tag
        held = context.network.module.state_dict()
        most = sum(value.numel() * value.element_size() for value in held.values()) + HEADER_BYTES
        content = context.location.get(_key(index), most)
        weights, steps = parse_weights(content)
        check_weights(weights, held)
        network = self._others[index][0] if index in self._others else frozen_copy(context.network)
        copy_weights(weights, network.module)
        self._others[index] = (network, steps)
        self.record.moved += len(content)


def check_group(location: Location, identity: dict[str, Any]) -> None:
    """Check that a folder is empty, or that of a group of this identity.

    Raises:
        RunError: it belongs to another group, or cannot be read.
    """
    try:
        content = location.get(GROUP_FILE, MOST_GROUP_BYTES)
        held = parse_json(content)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise RunError(
            f"{location.where(GROUP_FILE)!r} cannot be read ({error}): give another --group"
        ) from error
    if held != parse_json(canonical_json(identity)):
        table = difference_table(held, identity, "group", "this run")
        raise RunError(
            f"group {str(location)!r} is of other replicas.\n{table}\n"
            "Train with the values of the group, or give another --group."
        )


def parse_weights(content: bytes) -> tuple[dict[str, Tensor], int]:
    """Return the weights in a file of a replica, and its number of steps.

    Raises:
        SafetensorError, ValueError: the content is damaged.
    """
    weights = load(content)
    length = int.from_bytes(content[:8], "little")
    header = parse_json(content[8 : 8 + length])
    steps = header.get("__metadata__", {}).get(STEPS, "")
    if not (steps.isascii() and steps.isdigit() and len(steps) < 16):
        raise ValueError(f"its number of steps is {steps!r:.40}")
    return weights, int(steps)


def check_weights(weights: dict[str, Tensor], held: dict[str, Tensor]) -> None:
    """Check that the weights of another replica fit the network, and are finite.

    Raises:
        ValueError: they do not, or are not.
    """
    if odd := sorted(weights.keys() ^ held.keys()):
        raise ValueError(f"{odd[0]!r:.80} is in one network only")
    for name, value in held.items():
        found = weights[name]
        if (found.shape, found.dtype) != (value.shape, value.dtype):
            raise ValueError(
                f"{name!r:.80} is {found.dtype} {tuple(found.shape)}, expected {value.dtype} "
                f"{tuple(value.shape)}"
            )
        if found.is_floating_point() and not bool(found.isfinite().all()):
            raise ValueError(f"{name!r:.80} has values that are not finite")


def _key(index: int) -> str:
    return f"replica-{index + 1}.safetensors"


def _needs(_config: StaleConfig) -> Needs:
    return Needs(one_process="every student is trained by one process")


def _build(config: StaleConfig, context: GroupContext) -> Stale:
    return Stale(config, context.networks)


def _build_replica(config: StaleConfig, context: ReplicaContext) -> Replicas:
    return Replicas(config, context)


EXCHANGE = Exchange(
    config=StaleConfig,
    formula="z_j of a copy of every other student j, which is refreshed every `every` steps",
    source="Anil et al. 2018 (codistillation), arXiv 1804.03235",
    build=_build,
    needs=_needs,
    build_replica=_build_replica,
)
