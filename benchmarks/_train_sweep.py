"""Time of ten students in one sweep, in successive runs, and in runs with live teachers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from _harness import row

from coursepack.distill.recipe import TrainRecipe
from coursepack.distill.runs.sweep import Student, sweep
from coursepack.distill.runs.train import train

if TYPE_CHECKING:
    from pathlib import Path

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RATES = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1)


@dataclass(frozen=True)
class Size:
    """Sizes of the measurement."""

    student: str = "resnet20"
    students: int = 10
    limit: int = 640
    epochs: int = 2
    live: int = 2
    """Number of students trained with live teachers; their time is scaled to all students."""


FULL = Size()
QUICK = Size("resnet8", students=2, limit=32, epochs=1, live=1)


def sweeps(place: Any, size: Size) -> list[dict[str, Any]]:
    """Measure the seconds of all students, including evaluations."""
    folder: Path = place.folder / "sweep"
    recipes = [
        TrainRecipe.model_validate(
            place.recipe(
                size.student, "kd", 64, limit=size.limit, epochs=size.epochs, evaluate_every=size.epochs,
                optimizer={"lr": rate},
            )
        )
        for rate in RATES[: size.students]
    ]  # fmt: skip
    students = [Student(f"lr={recipe.optimizer.lr}", recipe) for recipe in recipes]
    seconds = {}
    for name, run in {
        "one sweep, all together": lambda out: sweep(students, out, device=DEVICE, together=len(students)),
        "one sweep, one by one": lambda out: sweep(students, out, device=DEVICE),
        "single runs": lambda out: [train(s.recipe, out / s.name, device=DEVICE) for s in students],
        "single runs, live teachers": lambda out: [
            train(s.recipe.model_copy(update={"online": True}), out / s.name, device=DEVICE)
            for s in students[: size.live]
        ],
    }.items():
        started = time.perf_counter()
        run(folder / name.replace(" ", "-"))
        seconds[name] = time.perf_counter() - started
    seconds["single runs, live teachers"] *= len(students) / size.live
    config = {
        "student": size.student, "students": len(students), "teachers": list(place.names),
        "samples": size.limit, "epochs": size.epochs, "live students run": size.live,
    }  # fmt: skip
    base = seconds["single runs"]
    return [
        *(row(f"sweep: {name}", [value], "s", config) for name, value in seconds.items()),
        *(
            row(f"sweep: {name} / single runs", [value / base], "ratio", config)
            for name, value in seconds.items()
        ),
    ]
