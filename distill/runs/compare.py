"""Comparison of runs: runs that differ only in their seed form a group, which is one row of a table."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coursepack.canonical import canonical_json, differences
from coursepack.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coursepack.distill.runs.folder import FinishedRun


EXTRAS = {
    "calibration_error": (("evaluation", "calibration_error"), "ece"),
    "agreement": (("teachers", "agreement"), "agrees"),
    "teacher_kl": (("teachers", "kl"), "kl to teachers"),
    "clamped": (("temperature", "clamped"), "T clamped"),
}
"""Optional columns: keys in an epoch's metrics, and the column's header."""


@dataclass(frozen=True)
class Group:
    """Runs of one recipe with different seeds."""

    label: str
    """Recipe fields that distinguish this group from the others."""
    accuracy: dict[int, float]
    """Accuracy on the evaluation split after the last epoch, in [0, 1], by seed."""
    nll: dict[int, float]
    """Negative log-likelihood in nats, by seed."""
    epochs: dict[int, int]
    """Number of epochs trained, by seed."""
    epoch_seconds: float
    """Median seconds per epoch over all runs, without evaluation."""
    wins: int | None
    """Number of seeds with a higher accuracy than in the first group; None for the first group itself."""
    paired: int
    """Number of seeds shared with the first group."""
    extras: dict[str, float]
    """Mean over seeds of each optional column that all runs have."""
    curve: dict[int, float]
    """Mean accuracy on the evaluation split by number of epochs, for epochs evaluated in all runs."""

    @property
    def mean(self) -> float:
        """Mean accuracy over seeds."""
        return statistics.fmean(self.accuracy.values())

    @property
    def spread(self) -> float:
        """Standard deviation of the accuracy over seeds; NaN for one run."""
        return statistics.stdev(self.accuracy.values()) if len(self.accuracy) > 1 else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Return the group as plain values."""
        return {
            "label": self.label,
            "runs": len(self.accuracy),
            "accuracy_mean": self.mean,
            "accuracy_sd": None if math.isnan(self.spread) else self.spread,
            "nll_mean": statistics.fmean(self.nll.values()),
            "epoch_seconds": self.epoch_seconds,
            "wins": self.wins,
            "paired": self.paired,
            **self.extras,
            "accuracy": {str(seed): value for seed, value in self.accuracy.items()},
        }


def compare(runs: Sequence[FinishedRun]) -> list[Group]:
    """Compare the groups of `group_runs`.

    Raises:
        RunError: as `group_runs`.
    """
    grouped = group_runs(runs)
    recipes = [_shared_fields(members[0]) for members in grouped]
    first = {run.recipe.seed: _final(run)["accuracy"] for run in grouped[0]}
    return [
        _group(members, _label(recipe, recipes), first, is_first=index == 0)
        for index, (members, recipe) in enumerate(zip(grouped, recipes, strict=True))
    ]


def group_runs(runs: Sequence[FinishedRun]) -> list[list[FinishedRun]]:
    """Group runs by recipe without its seed, in order of first appearance.

    Raises:
        RunError: there is no run, two runs have the same recipe and seed, or runs were evaluated on different
            data.
    """
    if not runs:
        raise RunError("there is nothing to compare: name at least one run")
    evaluations = {run.recipe.evaluation for run in runs}
    if len(evaluations) > 1:
        raise RunError(f"the runs were evaluated on different data: {', '.join(sorted(evaluations))}")
    grouped: dict[str, list[FinishedRun]] = {}
    for run in runs:
        grouped.setdefault(canonical_json(_shared_fields(run)), []).append(run)
    for members in grouped.values():
        seeds = [run.recipe.seed for run in members]
        repeated = {seed for seed in seeds if seeds.count(seed) > 1}
        if repeated:
            paths = [str(run.path) for run in members if run.recipe.seed in repeated]
            raise RunError(f"these runs have the same recipe and seed, keep one of each: {', '.join(paths)}")
    return list(grouped.values())


def table_rows(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows for `print_table`."""
    shown_extras = [name for name in EXTRAS if any(name in group.extras for group in groups)]
    header = ["recipe", "runs", "accuracy", "+- sd", "nll", "epoch", "beats first"]
    header += [EXTRAS[name][1] for name in shown_extras]
    rows = []
    for group in groups:
        spread = "-" if math.isnan(group.spread) else f"{group.spread:.2%}"
        wins = "-" if group.wins is None else f"{group.wins} of {group.paired}"
        nll = statistics.fmean(group.nll.values())
        runs, epoch = str(len(group.accuracy)), f"{group.epoch_seconds * 1000:.1f} ms"
        more = [f"{group.extras[name]:.3f}" if name in group.extras else "-" for name in shown_extras]
        rows.append([group.label, runs, f"{group.mean:.2%}", spread, f"{nll:.3f}", epoch, wins, *more])
    return header, rows


def plot(groups: Sequence[Group], path: Path) -> None:
    """Plot accuracy by epoch, one line per group, with each run's final accuracy as a dot.

    Raises:
        RunError: the file cannot be written, or its format is unknown.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for group in groups:
        shown = [100 * value for value in group.curve.values()]
        (line,) = axes.plot(list(group.curve), shown, label=group.label)
        last = [100 * value for value in group.accuracy.values()]
        axes.scatter(list(group.epochs.values()), last, s=12, color=line.get_color())
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy, %")
    axes.legend(fontsize="small")
    try:
        figure.savefig(path)
    except (ValueError, OSError) as error:
        raise RunError(f"cannot write a plot to {str(path)!r}: {error}. Name a .png, .svg or .pdf") from error


def _group(members: list[FinishedRun], label: str, first: dict[int, float], *, is_first: bool) -> Group:
    accuracy = {run.recipe.seed: float(_final(run)["accuracy"]) for run in members}
    paired = accuracy.keys() & first.keys()
    return Group(
        label=label,
        accuracy=accuracy,
        nll={run.recipe.seed: float(_final(run)["nll"]) for run in members},
        epoch_seconds=statistics.median(line["seconds"] for run in members for line in run.metrics),
        wins=None if is_first else sum(accuracy[seed] > first[seed] for seed in paired),
        paired=len(paired),
        extras=_extras(members),
        epochs={run.recipe.seed: run.metrics[-1]["epoch"] + 1 for run in members},
        curve=_mean_curve([_curve(run) for run in members]),
    )


def _curve(run: FinishedRun) -> dict[int, float]:
    """Return the accuracy by number of epochs, for epochs with an evaluation."""
    evaluated = [line for line in run.metrics if line.get("evaluation")]
    return {line["epoch"] + 1: float(line["evaluation"]["accuracy"]) for line in evaluated}


def _mean_curve(curves: Sequence[dict[int, float]]) -> dict[int, float]:
    common = set.intersection(*map(set, curves))
    return {epoch: statistics.fmean(curve[epoch] for curve in curves) for epoch in sorted(common)}


def _extras(members: Sequence[FinishedRun]) -> dict[str, float]:
    extras = {}
    for name, (keys, _) in EXTRAS.items():
        values = [(run.metrics[-1].get(keys[0]) or {}).get(keys[1]) for run in members]
        known = [float(value) for value in values if value is not None]
        if len(known) == len(members):
            extras[name] = statistics.fmean(known)
    return extras


def _final(run: FinishedRun) -> dict[str, Any]:
    evaluation: dict[str, Any] = run.metrics[-1]["evaluation"]
    return evaluation


def _shared_fields(run: FinishedRun) -> dict[str, Any]:
    shared = run.recipe.model_dump(mode="json", exclude={"seed"})
    return {**shared, "ensemble": run.ensemble} if run.ensemble else shared


def _label(recipe: dict[str, Any], recipes: list[dict[str, Any]]) -> str:
    """Return a label of the fields that distinguish a recipe: student, method, teachers, then others."""
    words = [recipe["method"], _student(recipe)]
    if recipe["stores"]:
        names = ", ".join(_store_names(recipe["stores"], recipes))
        words.append(f"from {names}" + (" live" if recipe["online"] else ""))
    compared = {"method", "student", "online"}
    for other in recipes:
        for path, mine, _ in differences(recipe, other):
            top = path.partition(".")[0].partition("[")[0]
            # Methods imply their objectives, and stores imply their views. A store records its root as an
            # absolute path, which may be the folder that another recipe names with a relative one.
            implied = {
                "stores": True,
                "view": bool(recipe["stores"] or other["stores"]),
                "objective": other["method"] != recipe["method"],
                "root": _folder(recipe["root"]) == _folder(other["root"]),
                **dict.fromkeys(("peers", "member", "replicas", "group", "ensemble"), True),
            }.get(top, False)
            if path not in compared and not implied:
                compared.add(path)
                words.append(f"{path}={mine}")
    return " ".join(words)


def _folder(root: str | None) -> Path | None:
    return None if root is None else Path(root).resolve()


def _student(recipe: dict[str, Any]) -> str:
    """Return the name of a student, of one of several that trained together, or of their ensemble."""
    networks: list[str] = [recipe["student"], *recipe.get("peers", [])]
    if "ensemble" in recipe:
        return f"{recipe['ensemble']} of {' + '.join(networks)}"
    if recipe.get("replicas"):
        return f"{networks[0]} (replica {recipe.get('member', 0) + 1} of {recipe['replicas']})"
    if len(networks) == 1:
        return networks[0]
    return f"{networks[0]} (student {recipe.get('member', 0)} of {len(networks)})"


def _store_names(stores: list[str], recipes: list[dict[str, Any]]) -> list[str]:
    """Return the stores' folder names, or their paths if stores of another recipe have the same names."""

    def short(paths: list[str]) -> list[str]:
        return [Path(path).name.removesuffix(".zarr") for path in paths]

    others = [recipe["stores"] for recipe in recipes if recipe["stores"] != stores]
    return stores if short(stores) in map(short, others) else short(stores)
