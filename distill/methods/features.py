"""Methods that regress features through adapters, or compare them across layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coursepack.distill.methods.base import Method

FEATURES: dict[str, Method] = {}
