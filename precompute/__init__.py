"""Stage one: run a frozen teacher once over augmented views and write its outputs to a store."""

from coursepack.precompute.job import Job as Job
from coursepack.precompute.job import run_job as run_job

__all__ = ["Job", "run_job"]
