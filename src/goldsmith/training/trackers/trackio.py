"""trackio: a run of a project, whose name is kept in the run folder."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from goldsmith.records import EvaluationRecord, StepRecord
from goldsmith.training.trackers.config import TrackioConfig
from goldsmith.training.trackers.protocol import RunFacts, read_identity, scalars, write_identity

if TYPE_CHECKING:
    from goldsmith.training.trainer import TrainingResult

__all__ = ["TrackioTracker"]


class TrackioTracker:
    """Goes on with its own run by name. trackio appends what it is told, so the last step of each kind is kept, too.

    Args:
        config: see `TrackioConfig`.
    """

    def __init__(self, config: TrackioConfig) -> None:
        self._config = config

    def start(self, facts: RunFacts) -> None:
        import trackio

        self._folder = facts.folder
        self._identity = read_identity(facts.folder, "trackio")
        if not self._identity:
            # trackio knows a run by its name alone: without the digits, a second run in a folder of the same name elsewhere
            # would go on with the first one.
            name = self._config.run_name or f"{facts.name}-{secrets.token_hex(2)}"
            self._identity = {"name": name, "train": -1, "eval": -1}
            write_identity(self._folder, "trackio", self._identity)
        self._run: Any = trackio.init(
            project=self._config.project,
            name=str(self._identity["name"]),
            space_id=self._config.space_id,
            config=dict(facts.settings),
            resume="allow",
            embed=False,
        )

    def log(self, record: StepRecord | EvaluationRecord) -> None:
        kind = "train" if isinstance(record, StepRecord) else "eval"
        if record.step <= int(self._identity[kind]):
            return
        self._run.log(scalars(record), step=record.step)
        self._identity = {**self._identity, kind: record.step}
        write_identity(self._folder, "trackio", self._identity, durable=False)

    def finish(self, result: TrainingResult | None) -> None:
        self._run.finish()
