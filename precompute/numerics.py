"""Kind of machine and settings that the rows of a store were computed with.

They determine the last bits of a teacher's outputs, which differ between AVX-512 and AVX2, between GPUs and
between batch sizes. They are not part of a store's identity: rows of different kinds are equally correct, but
not the same bytes. Every block records its `environment`; `numerics` is the fingerprint of the entries that
may change bits. While it is the same, a store's bytes do not depend on which process wrote which block.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from coursepack.canonical import difference_table, fingerprint
from coursepack.console import warn
from coursepack.data.store.done import done_objects, read_done
from coursepack.data.store.locations import open_location
from coursepack.errors import StoreMismatch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from coursepack.data.store import Manifest
    from coursepack.models import TeacherRunner

NUMERICS = "numerics"
"""Key of the fingerprint in an environment."""
NOT_NUMERIC = ("coursepack", "torchvision", "numpy", NUMERICS)
"""Keys of an environment that do not affect a teacher's outputs for given pixels."""
ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
"""Environment variables that limit CPU instructions without a change of `cpu_capability`."""


def environment_of(runner: TeacherRunner, batch_size: int) -> dict[str, Any]:
    """Return versions, device and settings of a teacher's run, with their fingerprint under `numerics`."""
    environment = {
        **{name: version(name) for name in ("coursepack", "torch", "torchvision", "numpy")},
        **_device_properties(runner.device),
        "batch_size": batch_size,
        "memory_layout": runner.memory_layout,
        "compile": runner.compiled,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    return {**environment, NUMERICS: fingerprint(numeric_entries(environment))}


def _device_properties(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        cudnn: Any = torch.backends.cudnn
        major, minor = torch.cuda.get_device_capability(device)
        return {
            "device": device.type,
            "device_name": torch.cuda.get_device_name(device),
            "compute_capability": f"{major}.{minor}",
            "cudnn": cudnn.version(),
            "padded_batches": True,
        }
    from llvmlite.binding import get_host_cpu_name

    limits = {name: os.environ[name] for name in ISA_LIMITS if name in os.environ}
    return {
        "device": device.type,
        "device_name": get_host_cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **({"isa_limits": limits} if limits else {}),
    }


def numeric_entries(environment: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of an environment that determine its `numerics`."""
    return {name: value for name, value in environment.items() if name not in NOT_NUMERIC}


@dataclass(frozen=True)
class NumericsGuard:
    """Compares the environments recorded in a store with the environment of the current run."""

    store: str | Path
    """Folder or address of the store."""
    own: dict[str, Any]
    """Environment of the current run, from `environment_of`."""
    same_numerics: bool = False
    """Raise an error for rows with other numerics instead of a warning."""

    def check(self, manifest: Manifest, *, seen: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
        """Warn if the store has rows with other numerics than the current run.

        Args:
            manifest: manifest of the store.
            seen: environments that an earlier call returned; they are not compared again.

        Returns:
            All recorded environments, to be passed as `seen` to a later call.

        Raises:
            StoreMismatch: `same_numerics` is set, and there are rows with other or unrecorded numerics.
        """
        recorded = recorded_environments(self.store, manifest)
        fresh = [entry for entry in recorded if entry not in seen]
        others = [entry for entry in fresh if entry.get(NUMERICS, self.own[NUMERICS]) != self.own[NUMERICS]]
        if others:
            self._report(others[0])
        elif self.same_numerics and any(NUMERICS not in entry for entry in fresh):
            raise StoreMismatch(
                f"store {str(self.store)!r} has rows without recorded numerics, written by an earlier "
                "version of coursepack: leave --same-numerics out, or use another --store"
            )
        return recorded

    def _report(self, other: dict[str, Any]) -> None:
        table = difference_table(numeric_entries(other), numeric_entries(self.own), "store", "here")
        found = f"store {str(self.store)!r} has rows of other numerics than this run's"
        if self.same_numerics:
            raise StoreMismatch(
                f"{found}.\n{table}\nRun on a machine of the same kind with the same settings, use another "
                "--store, or leave --same-numerics out."
            )
        warn(
            f"warning: {found}: the last bits of its rows depend on which run wrote them.\n{table}\n"
            "--same-numerics refuses this."
        )


def recorded_environments(store: str | Path, manifest: Manifest) -> list[dict[str, Any]]:
    """Return the distinct environments of committed views and of finished blocks of uncommitted ones."""
    found: list[dict[str, Any]] = []
    _add(found, manifest.environments)
    location = open_location(store)
    for view, index in done_objects(location):
        entry = read_done(location, view, index)
        if entry is not None:  # else another process has committed its view since
            _add(found, [entry["record"]["environment"]])
    return found


def views_by_numerics(manifest: Manifest) -> list[dict[str, Any]]:
    """Group the committed views by their numerics.

    Returns:
        One mapping per group with `numerics` (None for views written by earlier versions), the environment's
        entries that determine it, and the list `views`. A view whose blocks differ is in several groups.
    """
    groups: dict[str | None, dict[str, Any]] = {}
    for view, record in sorted(manifest.view_records.items(), key=lambda item: int(item[0])):
        for entry in record["environments"]:
            name = None if entry.get(NUMERICS) is None else str(entry[NUMERICS])
            group = groups.setdefault(name, {NUMERICS: name, **numeric_entries(entry), "views": []})
            if int(view) not in group["views"]:
                group["views"].append(int(view))
    return list(groups.values())


def describe_numerics(group: dict[str, Any]) -> str:
    """Format a group of `views_by_numerics` as one line, without its views."""
    if group[NUMERICS] is None:
        return "not recorded"
    shown = [group["device"], group["device_name"]]
    shown += [str(group[name]) for name in ("cpu_capability", "compute_capability") if name in group]
    return (
        f"{group[NUMERICS][:12]}: {' '.join(shown)}, torch {group['torch']}, batches of {group['batch_size']}"
    )


def _add(found: list[dict[str, Any]], more: Iterable[dict[str, Any]]) -> None:
    found += [entry for entry in more if entry not in found]
