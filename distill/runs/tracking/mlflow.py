"""Metrics for MLflow, an optional dependency.

The variables of its own, such as `MLFLOW_TRACKING_URI` and `MLFLOW_EXPERIMENT_NAME`, are followed. Without
a server, MLflow keeps runs in a database in the current folder.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from coursepack.console import inform
from coursepack.distill.runs.tracking.base import leaves, missing_tracker, scalars

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coursepack.distill.runs.tracking.base import TrackedRun

EXPERIMENT = "coursepack"
"""Experiment of the runs, unless `MLFLOW_EXPERIMENT_NAME` names another."""
SERVER = "MLFLOW_TRACKING_URI"
MAX_METRICS, MAX_PARAMS = 1000, 100
"""Maximum numbers of values in a request."""
MAX_CHARACTERS = 500
"""Maximum number of characters of a recipe's value; longer ones are cut."""


def check() -> None:
    """Check that the library is installed.

    Raises:
        RecipeError: it is not.
    """
    try:
        import mlflow  # noqa: F401 - only to see whether it is installed
    except ImportError as error:
        raise missing_tracker("mlflow", error) from error


def start(run: TrackedRun) -> MlflowTracker:
    """Start a run of MLflow, or continue the one that the run was tracked as before."""
    return MlflowTracker(run)


class MlflowTracker:
    """Run of MLflow."""

    def __init__(self, run: TrackedRun) -> None:
        """Start or continue the run. Nothing global of MLflow is changed."""
        import mlflow

        state = dict(run.state or {})
        # An address in the environment may contain a password, so it is not kept.
        own = None if SERVER in os.environ else state.get("uri", mlflow.get_tracking_uri())
        self._client: Any = mlflow.MlflowClient(own)
        self._last = -1
        if "run_id" in state:
            self._run = state["run_id"]
            self._client.update_run(self._run, status="RUNNING")
            self._last = max(
                (each.step for each in self._client.get_metric_history(self._run, "epoch")), default=-1
            )
        else:
            self._run = self._client.create_run(self._experiment(), run_name=run.name).info.run_id
            self._log_recipe(run.recipe)
        self.state: Mapping[str, str] = {"run_id": self._run, **({} if own is None else {"uri": own})}
        inform(f"{run.folder}: tracked as run {self._run} of MLflow" + ("" if own is None else f" in {own}"))

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        found = self._client.get_experiment_by_name(name)
        return str(self._client.create_experiment(name) if found is None else found.experiment_id)

    def _log_recipe(self, recipe: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        values = [
            Param(name, str(value)[:MAX_CHARACTERS]) for name, value in leaves(dict(recipe), separator=".")
        ]
        for begin in range(0, len(values), MAX_PARAMS):
            self._client.log_batch(self._run, params=values[begin : begin + MAX_PARAMS])

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Log the metrics of one epoch, unless the tracked run has that epoch already."""
        from mlflow.entities import Metric

        epoch = int(metrics["epoch"])
        if epoch <= self._last:
            return
        now = round(time.time() * 1000)
        values = [Metric(name, value, now, epoch) for name, value in scalars(metrics)]
        for begin in range(0, len(values), MAX_METRICS):
            self._client.log_batch(self._run, metrics=values[begin : begin + MAX_METRICS])
        self._last = epoch

    def end(self, error: BaseException | None) -> None:
        """End the run, as failed if there is an error."""
        status = (
            "FINISHED" if error is None else "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        )
        self._client.set_terminated(self._run, status)
