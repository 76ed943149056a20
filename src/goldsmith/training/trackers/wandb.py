"""wandb: a run of Weights & Biases, whose id and last steps are kept in the run folder."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from goldsmith.records import EvaluationRecord, StepRecord
from goldsmith.training.trackers.config import WandbConfig
from goldsmith.training.trackers.protocol import RunFacts, read_identity, scalars, write_identity

if TYPE_CHECKING:
    from goldsmith.training.trainer import TrainingResult

__all__ = ["WandbTracker"]


class WandbTracker:
    """Goes on with its own run by id. Offline wandb does not know what an earlier process told it, so the last step of each
    kind is kept, too: a step that is done again is told once.

    Args:
        config: see `WandbConfig`.
    """

    def __init__(self, config: WandbConfig) -> None:
        self._config = config

    def start(self, facts: RunFacts) -> None:
        import wandb

        self._folder = facts.folder
        self._identity = {"train": -1, "eval": -1, **read_identity(facts.folder, "wandb")}
        if "id" not in self._identity:
            self._identity["id"] = secrets.token_hex(4)
            # Before it is used: a process that dies in between goes on with the same one.
            write_identity(self._folder, "wandb", self._identity)
        self._run: Any = wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            name=self._config.run_name or facts.name,
            group=self._config.group,
            tags=self._config.tags or None,
            mode=self._config.mode,
            dir=str(facts.folder),
            id=str(self._identity["id"]),
            resume="allow",
            config=dict(facts.settings),
            # What a resumed run may change is changed there, too.
            allow_val_change=True,
        )

    def log(self, record: StepRecord | EvaluationRecord) -> None:
        kind = "train" if isinstance(record, StepRecord) else "eval"
        if record.step <= int(self._identity[kind]):
            return
        # A step and the evaluation after it have the same number, and become one row.
        self._run.log(scalars(record), step=record.step)
        self._identity = {**self._identity, kind: record.step}
        write_identity(self._folder, "wandb", self._identity, durable=False)

    def finish(self, result: TrainingResult | None) -> None:
        self._run.finish(exit_code=1 if result is None else 0)
