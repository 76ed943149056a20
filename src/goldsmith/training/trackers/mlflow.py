"""mlflow: a run of an experiment, whose id is kept in the run folder."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

from goldsmith.records import EvaluationRecord, StepRecord
from goldsmith.training.trackers.config import MlflowConfig
from goldsmith.training.trackers.protocol import RunFacts, read_identity, scalars, write_identity

if TYPE_CHECKING:
    from goldsmith.training.trainer import TrainingResult

__all__ = ["MlflowTracker"]

# What mlflow takes at once, and of one value.
MAX_PARAMS_PER_BATCH = 100
MAX_PARAM_CHARACTERS = 6000


class MlflowTracker:
    """Speaks to mlflow's client, so that the active run of whoever calls goldsmith from Python stays as it is.

    mlflow appends what it is told. Of a run that goes on it is asked for the last step it has, and not told of that again.

    Args:
        config: see `MlflowConfig`.
    """

    def __init__(self, config: MlflowConfig) -> None:
        self._config = config

    def start(self, facts: RunFacts) -> None:
        import mlflow
        from mlflow.entities import Metric, Param

        self._metric: Any = Metric
        self._client: Any = mlflow.MlflowClient(tracking_uri=self._config.tracking_uri)
        self._last = {"train": -1, "eval": -1}
        identity = read_identity(facts.folder, "mlflow")
        if identity:
            self._run_id = str(identity["run_id"])
            self._client.update_run(self._run_id, status="RUNNING")
            for kind in self._last:
                history = self._client.get_metric_history(self._run_id, f"{kind}/nll")
                self._last[kind] = max((metric.step for metric in history), default=-1)
            return
        experiment = self._client.get_experiment_by_name(self._config.experiment)
        experiment_id = (
            self._client.create_experiment(self._config.experiment) if experiment is None else experiment.experiment_id
        )
        run = self._client.create_run(experiment_id, run_name=self._config.run_name or facts.name)
        self._run_id = run.info.run_id
        write_identity(facts.folder, "mlflow", {"run_id": self._run_id})
        params = [Param(_name(key), str(value)[:MAX_PARAM_CHARACTERS]) for key, value in facts.settings.items()]
        for begin in range(0, len(params), MAX_PARAMS_PER_BATCH):
            self._client.log_batch(self._run_id, params=params[begin : begin + MAX_PARAMS_PER_BATCH])

    def log(self, record: StepRecord | EvaluationRecord) -> None:
        kind = "train" if isinstance(record, StepRecord) else "eval"
        if record.step <= self._last[kind]:
            return
        now = int(time.time() * 1000)
        metrics = [self._metric(_name(key), number, now, record.step) for key, number in scalars(record).items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def finish(self, result: TrainingResult | None) -> None:
        self._client.set_terminated(self._run_id, status="KILLED" if result is None else "FINISHED")


def _name(key: str) -> str:
    """A key of the characters that mlflow allows.

    >>> _name("train/nll_by_source/poems (old)")
    'train/nll_by_source/poems _old_'
    """
    return re.sub(r"[^\w\-. /]", "_", key, flags=re.ASCII)
