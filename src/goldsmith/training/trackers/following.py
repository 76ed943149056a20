"""The trackers of one run, told together. What fails is said once and left out: a run is worth more than its display."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from goldsmith.records import EvaluationRecord, StepRecord
from goldsmith.training.trackers.config import (
    MlflowConfig,
    TensorboardConfig,
    TrackerConfig,
    TrackioConfig,
    WandbConfig,
)
from goldsmith.training.trackers.mlflow import MlflowTracker
from goldsmith.training.trackers.protocol import RunFacts, Tracker
from goldsmith.training.trackers.tensorboard import TensorboardTracker
from goldsmith.training.trackers.trackio import TrackioTracker
from goldsmith.training.trackers.wandb import WandbTracker

if TYPE_CHECKING:
    from goldsmith.training.trainer import TrainingResult

__all__ = ["Following", "build_tracker"]


def build_tracker(config: TrackerConfig) -> Tracker:
    """The adapter of a tracker; its library is not loaded yet."""
    match config:
        case TensorboardConfig():
            return TensorboardTracker()
        case WandbConfig():
            return WandbTracker(config)
        case MlflowConfig():
            return MlflowTracker(config)
        case TrackioConfig():
            return TrackioTracker(config)


class Following:
    """All trackers of a run. None of its methods raises because of a tracker.

    Args:
        trackers: by name.
        facts: of the run; `resumed_from` is given when it starts.
    """

    def __init__(self, trackers: Mapping[str, Tracker], facts: RunFacts) -> None:
        self._trackers = dict(trackers)
        self._facts = facts
        self._note: Callable[[str], None] = lambda line: None

    @classmethod
    def of(cls, configs: Sequence[TrackerConfig], facts: RunFacts) -> Following:
        """Those that a recipe names."""
        return cls({config.name: build_tracker(config) for config in configs}, facts)

    def start(self, *, resumed_from: int, note: Callable[[str], None]) -> None:
        """The run begins or goes on.

        Args:
            note: told in one line of a tracker that fails, now or later.
        """
        self._note = note
        facts = replace(self._facts, resumed_from=resumed_from)
        self._tell(lambda tracker: tracker.start(facts))

    def log(self, record: StepRecord | EvaluationRecord) -> None:
        """A record was written."""
        self._tell(lambda tracker: tracker.log(record))

    def finish(self, result: TrainingResult | None) -> None:
        """The run has ended; only the first call is told."""
        self._tell(lambda tracker: tracker.finish(result))
        self._trackers.clear()

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                # Standard output carries the result of the command and nothing else; some trackers print.
                with contextlib.redirect_stdout(sys.stderr):
                    call(tracker)
            except Exception as error:
                del self._trackers[name]
                what = " ".join(str(error).split()) or "no message"
                self._note(
                    f"tracker {name}: {type(error).__name__}: {what}; it is off from here on, and metrics.jsonl has every record"
                )
