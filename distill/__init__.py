"""Stage two: train students from teachers' stores, from teachers run live, or without teachers.

A custom training loop uses `open_teacher_stores`, `make_objective`, `make_targets` and `Learner`
(docs/library.md). Names are imported when they are used, so that `distill --help` does not import torch.
"""

from typing import TYPE_CHECKING, Any

from coursepack.lazy import public_name

if TYPE_CHECKING:
    from coursepack.distill.fusion import FUSIONS as FUSIONS
    from coursepack.distill.losses import LOSSES as LOSSES
    from coursepack.distill.losses.base import LossInputs as LossInputs
    from coursepack.distill.losses.base import Step as Step
    from coursepack.distill.losses.base import StudentOutput as StudentOutput
    from coursepack.distill.methods import METHODS as METHODS
    from coursepack.distill.objective import Objective as Objective
    from coursepack.distill.objective_config import ObjectiveConfig as ObjectiveConfig
    from coursepack.distill.recipe import TrainRecipe as TrainRecipe
    from coursepack.distill.runs.train import train as train
    from coursepack.distill.setup.build import make_objective as make_objective
    from coursepack.distill.setup.wrap import wrap_student as wrap_student
    from coursepack.distill.targets.live import OnlineTargets as OnlineTargets
    from coursepack.distill.targets.stores import CachedTargets as CachedTargets
    from coursepack.distill.targets.teacher_stores import TeacherStores as TeacherStores
    from coursepack.distill.targets.teacher_stores import make_targets as make_targets
    from coursepack.distill.targets.teacher_stores import open_teacher_stores as open_teacher_stores
    from coursepack.distill.training.learner import Learner as Learner

_MODULES = {
    "FUSIONS": "fusion",
    "LOSSES": "losses",
    "METHODS": "methods",
    "CachedTargets": "targets.stores",
    "Learner": "training.learner",
    "LossInputs": "losses.base",
    "Objective": "objective",
    "ObjectiveConfig": "objective_config",
    "OnlineTargets": "targets.live",
    "Step": "losses.base",
    "StudentOutput": "losses.base",
    "TeacherStores": "targets.teacher_stores",
    "TrainRecipe": "recipe",
    "make_objective": "setup.build",
    "make_targets": "targets.teacher_stores",
    "open_teacher_stores": "targets.teacher_stores",
    "train": "runs.train",
    "wrap_student": "setup.wrap",
}
"""Module of each public name within this package."""
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    return public_name(__name__, _MODULES, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
