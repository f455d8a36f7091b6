"""Tiny teachers, stores and recipes for tests: no training, only seeded weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from coursepack.config import write_yaml
from coursepack.data import open_source, view_recipe
from coursepack.data.store import StoreReader
from coursepack.distill.exchange import EXCHANGES
from coursepack.distill.losses.base import LossInputs, Step, StudentOutput
from coursepack.distill.methods import METHODS
from coursepack.distill.recipe import TrainRecipe, resolve_objective
from coursepack.models import TeacherRunner, build_network, load_teacher, parse_tap
from coursepack.models.build import NETWORK_FILE, WEIGHTS_FILE
from coursepack.precompute import Job, run_job

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")
STUDENT = "digits-small"
SHARPNESS = 40.0
"""Factor of the head's fresh weights, so that teachers have opinions."""
_MAPS = ({"teacher": 1, "tap": "conv2", "layer": "conv2"}, {"teacher": 2, "tap": "layer1", "layer": "conv1"})
_FLOWS = ({"teacher": 1, "tap": "conv1+conv2:gram", "layer": "conv1+conv2"},)
PAIRS = {
    "at": _MAPS,
    "nst": _MAPS,
    "fsp": _FLOWS,
    "ab": ({"teacher": 2, "tap": "layer1", "layer": "conv1"},),
    "ofd": ({"teacher": 2, "tap": "layer2.0.bn1:margin", "layer": "conv1"},),
}
"""Pairs of the stores `tapped` with a `digits-cnn`, for the terms that cannot take any tap of any teacher."""
PHASES = {
    "ab": ("objective.hard_weight.epochs=1", "objective.terms.ab.weight.epochs=1"),
    "ft": ("objective.terms.ft.paraphraser_epochs=1",),
    "annealing-kd": (
        "objective.hard_weight.epochs=1",
        "objective.terms.annealed_logits.weight.epochs=1",
        "objective.terms.annealed_logits.epochs=1",
    ),
}
"""Assignments that shorten a method's first phase to one epoch."""
FEW = (
    "supervised",
    "kd",
    "amtml",
    "dtd-flsw",
    "fitnets",
    "fsp",
    "crd",
    "ft",
    "reviewkd",
    "simkd",
    "okddip",
    "afd",
)
"""Methods without teachers, with weights of teachers, with features of every kind, and with peers."""


def few_by_default(names) -> list[Any]:
    """Parameters of a test of many methods: all but a `FEW` are marked `integration`."""
    return [name if name in FEW else pytest.param(name, marks=pytest.mark.integration) for name in names]


def write_teacher(folder: Path, network: str = "digits-mlp", *, classes: int = 10, seed: int = 0) -> Path:
    """A run folder that `run:FOLDER` can load."""
    built = build_network(network, classes, seed=seed)
    state = {name: value.clone() for name, value in built.module.state_dict().items()}
    state["head.weight"] *= SHARPNESS
    folder.mkdir(parents=True)
    (folder / NETWORK_FILE).write_text(write_yaml(built.describe()))
    save_file(state, folder / WEIGHTS_FILE)
    return folder


def write_store(path: Path, teacher: Path, *, source=None, view="digits", view_seed=None, order=None, **job):
    """A float32 store of a teacher's run folder, two views by default."""
    source = source or open_source("digits")
    runner = TeacherRunner(load_teacher(f"run:{teacher}", source.class_names))
    job = {"views": 2, "encoding": "float32", **job}
    run_job(Job(path, source, view_recipe(view, view_seed), runner, **job), block_order=order)
    return path


def write_known(path: Path, teacher: Path, known, *, source=None, taps=(), **job):
    """A float32 store, by default of the digits, whose teacher knows only some of ten classes, two views."""
    source, columns = (
        source or open_source("digits"),
        [label if label in known else None for label in range(10)],
    )
    network = load_teacher(f"run:{teacher}", source.class_names, columns=columns)
    runner = TeacherRunner(network, [parse_tap(tap) for tap in taps], columns=columns)
    job = {"views": 2, "encoding": "float32", **job}
    run_job(Job(path, source, view_recipe("digits"), runner, **job), quiet=True)
    return path


def make_recipe(stores=(), *, method=None, objective=None, **fields: Any) -> TrainRecipe:
    """A recipe for ten classes, by default the digits: `kd` with stores, else `supervised`, one epoch.

    A fusion with more phases has one epoch for each.
    """
    method = method or ("kd" if stores else "supervised")
    if METHODS[method].objective.needs().peers:
        exchange = EXCHANGES[METHODS[method].objective.exchange.name]
        student = fields.get("student", STUDENT if exchange.layers == "none" else "digits-cnn")
        fields = {"student": student, "peers": [student] * (exchange.students[0] - 1), **fields}
    view = StoreReader(stores[0]).manifest.identity["view"]["recipe"] if stores else view_recipe("digits")
    resolved = resolve_objective(method, objective or {}, "test", classes=10)
    values = {
        "student": STUDENT,
        "method": method,
        "objective": resolved,
        "stores": [str(store) for store in stores],
        "source": "digits:train",
        "evaluation": "digits:test",
        "view": view,
        "epochs": resolved.fusion.fewest_epochs(len(stores)) if stores else 1,
    }
    return TrainRecipe.model_validate(values | fields)


def made_up_batch(samples: int, classes: int, teachers: int, width: int) -> dict[str, np.ndarray]:
    """Logits of a student and of teachers, labels, and embeddings, in float64."""
    rng = np.random.default_rng(0)
    return {
        "student": rng.normal(size=(samples, classes)) * 2,
        "teachers": rng.normal(size=(teachers, samples, classes)) * 3,
        "labels": rng.integers(0, classes, samples),
        "embedding": rng.normal(size=(samples, width)),
    }


def loss_inputs(student_logits, labels, targets=None, *, embedding=None, features=None, step=None):
    """Inputs of an objective for one batch."""
    output = StudentOutput(student_logits, embedding, features or {})
    return LossInputs(output, labels, targets, step or Step())
