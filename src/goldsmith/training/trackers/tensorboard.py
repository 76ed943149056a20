"""tensorboard: event files in `tensorboard/` of the run folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from goldsmith.records import EvaluationRecord, StepRecord
from goldsmith.training.trackers.protocol import RunFacts, scalars

if TYPE_CHECKING:
    from goldsmith.training.trainer import TrainingResult

__all__ = ["TensorboardTracker"]


class TensorboardTracker:
    """Writes through `torch.utils.tensorboard`. Of a run that goes on, steps after its checkpoint are purged and written again."""

    def start(self, facts: RunFacts) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = facts.folder / "tensorboard"
        # Evaluations have the step that they come after, so what was written of the checkpoint's own step stays. A run that
        # died before its first checkpoint begins at 0 again.
        purge = None if not folder.is_dir() else facts.resumed_from + 1 if facts.resumed_from else 0
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge)
        if purge is None:
            rows = "".join(f"| {key} | {value} |\n" for key, value in facts.settings.items())
            self._writer.add_text("recipe", f"| key | value |\n|---|---|\n{rows}", 0)

    def log(self, record: StepRecord | EvaluationRecord) -> None:
        for name, number in scalars(record).items():
            # Tags may hold no space: tensorboard's own reader would show them otherwise than they were written.
            self._writer.add_scalar(name.replace(" ", "_"), number, record.step)
        if isinstance(record, EvaluationRecord):
            self._writer.flush()

    def finish(self, result: TrainingResult | None) -> None:
        self._writer.close()
