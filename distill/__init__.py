"""Stage two: train students from stores, or from teachers run live, or alone.

In a loop of one's own: `open_course`, `make_objective`, `make_targets` and a `Learner` (docs/library.md).
"""

from coursepack.distill.fusion.weights import FUSIONS as FUSIONS
from coursepack.distill.losses.base import Moment as Moment
from coursepack.distill.losses.config import ObjectiveConfig as ObjectiveConfig
from coursepack.distill.losses.objective import Objective as Objective
from coursepack.distill.methods import METHODS as METHODS
from coursepack.distill.recipe import TrainRecipe as TrainRecipe
from coursepack.distill.runs.train import train as train
from coursepack.distill.setup.build import make_objective as make_objective
from coursepack.distill.targets.opening import Course as Course
from coursepack.distill.targets.opening import make_targets as make_targets
from coursepack.distill.targets.opening import open_course as open_course
from coursepack.distill.targets.stores import CachedTargets as CachedTargets
from coursepack.distill.targets.stores import OnlineTargets as OnlineTargets
from coursepack.distill.training.learner import Learner as Learner

__all__ = [
    "FUSIONS",
    "METHODS",
    "CachedTargets",
    "Course",
    "Learner",
    "Moment",
    "Objective",
    "ObjectiveConfig",
    "OnlineTargets",
    "TrainRecipe",
    "make_objective",
    "make_targets",
    "open_course",
    "train",
]
