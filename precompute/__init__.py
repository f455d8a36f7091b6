"""Stage one: run a frozen teacher once over augmented views and write its outputs to a store.

Names are imported when they are used, so that `precompute --help` does not import torch.
"""

from typing import TYPE_CHECKING, Any

from coursepack.lazy import public_name

if TYPE_CHECKING:
    from coursepack.precompute.job import Job as Job
    from coursepack.precompute.job import run_job as run_job

_MODULES = {"Job": "job", "run_job": "job"}
"""Module of each public name within this package."""
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    return public_name(__name__, _MODULES, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
