"""Fusion of several teachers: their weights, and the temperature of the fused targets."""

from coursepack.distill.fusion import adaptive, gated, min_norm, monitored, sequence, unify, weights
from coursepack.distill.fusion.base import Fusion

FUSIONS: dict[str, Fusion] = {
    "fixed": weights.FIXED,
    "uniform": weights.UNIFORM,
    "best": weights.BEST,
    "random": weights.RANDOM,
    "confidence": weights.CONFIDENCE,
    "entropy": weights.ENTROPY,
    "adaptive": adaptive.ADAPTIVE,
    "gated": gated.GATED,
    "min_norm": min_norm.MIN_NORM,
    "sequence": sequence.SEQUENCE,
    "monitored": monitored.MONITORED,
    "unify": unify.UNIFY,
}
"""Fusions by name. To add one, write a module in this package and add a row here."""
