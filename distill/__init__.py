"""Stage two: train students from stores, or from teachers run live, or alone.

In a loop of one's own: `open_course`, `make_objective`, `make_targets` and a `Learner` (docs/library.md).
"""

from coursepack.distill.building import make_objective as make_objective
from coursepack.distill.course import Course as Course
from coursepack.distill.course import make_targets as make_targets
from coursepack.distill.course import open_course as open_course
from coursepack.distill.facts import Moment as Moment
from coursepack.distill.fusion import FUSIONS as FUSIONS
from coursepack.distill.learner import Learner as Learner
from coursepack.distill.methods import METHODS as METHODS
from coursepack.distill.objective import Objective as Objective
from coursepack.distill.objective_config import ObjectiveConfig as ObjectiveConfig
from coursepack.distill.recipe import TrainRecipe as TrainRecipe
from coursepack.distill.targets import CachedTargets as CachedTargets
from coursepack.distill.targets import OnlineTargets as OnlineTargets
from coursepack.distill.train import train as train

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
