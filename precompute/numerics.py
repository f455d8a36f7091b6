"""The kind of machine and the settings that a store's rows were computed with.

They decide the last bits of a teacher's answer: the same teacher gives others under AVX-512 and AVX2, on
another GPU, or in batches of another size. That is no part of a store's identity: rows of both kinds are
right, but no longer the same bytes. Every block records its `environment`; `numerics` is the fingerprint of
what in it may change bits. Within one `numerics` a store's bytes do not depend on who wrote which block when.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from coursepack.canonical import difference_table, fingerprint
from coursepack.console import say
from coursepack.data.store.done import done_objects, read_done
from coursepack.data.store.locations import open_location
from coursepack.errors import StoreMismatch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from coursepack.data.store import Manifest
    from coursepack.models import TeacherRunner

NUMERICS = "numerics"
NOT_NUMERIC = ("coursepack", "torchvision", "numpy", NUMERICS)
"""Members of an environment that change no bit of an answer to given pixels."""
ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
"""Environment variables that choose instructions and that `cpu_capability` does not show."""


def environment_of(runner: TeacherRunner, batch_size: int) -> dict[str, Any]:
    """Versions, device and settings of a teacher's run; `numerics` is the fingerprint of the numeric ones."""
    facts = {
        **{name: version(name) for name in ("coursepack", "torch", "torchvision", "numpy")},
        **_device_facts(runner.device),
        "batch_size": batch_size,
        "memory_layout": runner.memory_layout,
        "compile": runner.compiled,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    return {**facts, NUMERICS: fingerprint(_numeric(facts))}


def _device_facts(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        cudnn: Any = torch.backends.cudnn
        major, minor = torch.cuda.get_device_capability(device)
        return {
            "device": device.type,
            "device_name": torch.cuda.get_device_name(device),
            "compute_capability": f"{major}.{minor}",
            "cudnn": cudnn.version(),
        }
    from llvmlite.binding import get_host_cpu_name

    limits = {name: os.environ[name] for name in ISA_LIMITS if name in os.environ}
    return {
        "device": device.type,
        "device_name": get_host_cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **({"isa_limits": limits} if limits else {}),
    }


def _numeric(environment: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in environment.items() if name not in NOT_NUMERIC}


@dataclass(frozen=True)
class NumericsGuard:
    """Compares the environments that a store records with that of a run."""

    store: Path
    own: dict[str, Any]
    same_numerics: bool = False
    """Refuse rows of other numerics instead of warning of them."""

    def check(self, manifest: Manifest, *, seen: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
        """Warn of rows that were written under other numerics, or refuse them.

        Args:
            manifest: the store's.
            seen: environments that were compared before.

        Returns:
            The environments that are recorded, for `seen`.

        Raises:
            StoreMismatch: there are such rows, or rows that do not record it, and `same_numerics` is set.
        """
        recorded = recorded_environments(self.store, manifest)
        fresh = [entry for entry in recorded if entry not in seen]
        others = [entry for entry in fresh if entry.get(NUMERICS, self.own[NUMERICS]) != self.own[NUMERICS]]
        if others:
            self._tell(others[0])
        elif self.same_numerics and any(NUMERICS not in entry for entry in fresh):
            raise StoreMismatch(
                f"store {str(self.store)!r} does not record the numerics of all its rows, since an earlier "
                "version wrote them: leave --same-numerics out, or use another --store"
            )
        return recorded

    def _tell(self, other: dict[str, Any]) -> None:
        table = difference_table(_numeric(other), _numeric(self.own), "store", "here")
        found = f"store {str(self.store)!r} has rows of other numerics than this run's"
        if self.same_numerics:
            raise StoreMismatch(
                f"{found}.\n{table}\nRun on a machine of the same kind with the same settings, use another "
                "--store, or leave --same-numerics out."
            )
        say(
            f"warning: {found}: the last bits of its rows depend on which run wrote them.\n{table}\n"
            "--same-numerics refuses this."
        )


def recorded_environments(store: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """Environments of committed views and of blocks that are done besides, each once."""
    found: list[dict[str, Any]] = []
    _add(found, manifest.environments)
    location = open_location(store)
    for view, index in done_objects(location):
        entry = read_done(location, view, index)
        if entry is not None:  # else another process has committed its view since
            _add(found, [entry["record"]["environment"]])
    return found


def views_by_numerics(manifest: Manifest) -> list[dict[str, Any]]:
    """The numerics of the committed views: `numerics`, what it stands for, and its `views`.

    A view whose blocks differ is listed under each; views of earlier versions have None.
    """
    groups: dict[str | None, dict[str, Any]] = {}
    for view, record in sorted(manifest.view_records.items(), key=lambda item: int(item[0])):
        for entry in record["environments"]:
            name = None if entry.get(NUMERICS) is None else str(entry[NUMERICS])
            group = groups.setdefault(name, {NUMERICS: name, **_numeric(entry), "views": []})
            if int(view) not in group["views"]:
                group["views"].append(int(view))
    return list(groups.values())


def describe_numerics(group: dict[str, Any]) -> str:
    """A group of `views_by_numerics` in a line, without its views."""
    if group[NUMERICS] is None:
        return "not recorded"
    shown = [group["device"], group["device_name"]]
    shown += [str(group[name]) for name in ("cpu_capability", "compute_capability") if name in group]
    return (
        f"{group[NUMERICS][:12]}: {' '.join(shown)}, torch {group['torch']}, batches of {group['batch_size']}"
    )


def _add(found: list[dict[str, Any]], more: Iterable[dict[str, Any]]) -> None:
    found += [entry for entry in more if entry not in found]
