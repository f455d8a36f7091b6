"""Methods that compare relations and statistics of features."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coursepack.distill.methods.base import Method

RELATIONS: dict[str, Method] = {}
