"""Stage two: train students from stores, or from teachers run live, or alone."""

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
    "Learner",
    "Objective",
    "ObjectiveConfig",
    "OnlineTargets",
    "TrainRecipe",
    "train",
]
