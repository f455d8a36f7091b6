"""Exchanges: what students that train together say to each other, one module each."""

from coursepack.distill.exchange import outputs
from coursepack.distill.exchange.base import Exchange

EXCHANGES: dict[str, Exchange] = {
    "outputs": outputs.EXCHANGE,
}
"""Exchanges by name. To add one, write a module in this package and add a row here."""
