"""Stage two: train students from teachers' stores, from teachers run live, or without teachers.

A custom training loop uses `open_teacher_stores`, `make_objective`, `make_targets` and `Learner`
(docs/library.md).
"""

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

__all__ = [
    "FUSIONS",
    "LOSSES",
    "METHODS",
    "CachedTargets",
    "Learner",
    "LossInputs",
    "Objective",
    "ObjectiveConfig",
    "OnlineTargets",
    "Step",
    "StudentOutput",
    "TeacherStores",
    "TrainRecipe",
    "make_objective",
    "make_targets",
    "open_teacher_stores",
    "train",
    "wrap_student",
]
