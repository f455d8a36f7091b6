"""Exchanges: the targets that students which train together give each other, one module each."""

from coursepack.distill.exchange import (
    attention,
    collaborative,
    discriminators,
    feature_fusion,
    gate,
    outputs,
    replicas,
)
from coursepack.distill.exchange.base import Exchange

EXCHANGES: dict[str, Exchange] = {
    "outputs": outputs.EXCHANGE,
    "collaborative": collaborative.EXCHANGE,
    "attention": attention.EXCHANGE,
    "gate": gate.EXCHANGE,
    "feature_fusion": feature_fusion.EXCHANGE,
    "discriminators": discriminators.EXCHANGE,
    "stale": replicas.EXCHANGE,
}
"""Exchanges by name. To add one, write a module in this package and add a row here."""
