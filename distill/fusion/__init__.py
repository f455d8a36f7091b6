"""Fusion of several teachers: how much each counts, and at which temperature."""

from coursepack.distill.fusion import adaptive, weights
from coursepack.distill.fusion.base import Fusion

FUSIONS: dict[str, Fusion] = {
    "fixed": weights.FIXED,
    "uniform": weights.UNIFORM,
    "best": weights.BEST,
    "random": weights.RANDOM,
    "confidence": weights.CONFIDENCE,
    "entropy": weights.ENTROPY,
    "adaptive": adaptive.ADAPTIVE,
}
"""Every fusion by name. A new one is a file beside these and a row here."""
