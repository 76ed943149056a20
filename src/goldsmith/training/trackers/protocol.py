"""What a tracker is and what it is told: the records of `metrics.jsonl`, as flat numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from goldsmith.records import EvaluationRecord, StepRecord
from goldsmith.storage import write_atomic

if TYPE_CHECKING:
    from goldsmith.training.trainer import TrainingResult

__all__ = ["IDENTITIES", "RunFacts", "Tracker", "read_identity", "scalars", "write_identity"]

IDENTITIES = "trackers.json"

Setting = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What is known of a run before its first step.

    Attributes:
        name: of the run folder.
        folder: the run folder, absolute.
        settings: dotted key of the resolved recipe -> value, defaults included.
        resumed_from: updates that were done before; 0 for a run that begins.
    """

    name: str
    folder: Path
    settings: Mapping[str, Setting]
    resumed_from: int = 0


class Tracker(Protocol):
    """Told of one run, from its start to its end. Any method may raise: the run then goes on without the tracker."""

    def start(self, facts: RunFacts) -> None:
        """The run begins, or goes on after `facts.resumed_from` updates."""

    def log(self, record: StepRecord | EvaluationRecord) -> None:
        """A record was written to `metrics.jsonl`."""

    def finish(self, result: TrainingResult | None) -> None:
        """The run has ended; None where it was stopped or failed."""


def scalars(record: StepRecord | EvaluationRecord) -> dict[str, float]:
    """The numbers of a record by flat names: `train/...` of a step, `eval/...` of an evaluation; the step is no part of them.

    >>> record = EvaluationRecord(
    ...     step=3, epoch=0, examples=2, gold_tokens=9, nll=0.5, nll_per_example=2.25, is_best=True, seconds=0.1,
    ...     tokens_per_second=90.0, nll_by_source={"poems": 0.5},
    ... )
    >>> scalars(record)["eval/nll"], scalars(record)["eval/nll_by_source/poems"], scalars(record)["eval/is_best"]
    (0.5, 0.5, 1.0)
    """
    prefix = "train" if isinstance(record, StepRecord) else "eval"
    numbers: dict[str, float] = {}
    for name, value in record.to_json().items():
        if name in ("step", "kind"):
            continue
        named = {f"/{inner}": number for inner, number in value.items()} if isinstance(value, dict) else {"": value}
        numbers |= {f"{prefix}/{name}{inner}": float(number) for inner, number in named.items()}
    return numbers


def read_identity(folder: Path, tracker: str) -> dict[str, str | int]:
    """What a tracker keeps in the run folder to find its own run again; empty for a new one."""
    path = folder / IDENTITIES
    if not path.is_file():
        return {}
    identity: dict[str, str | int] = json.loads(path.read_text(encoding="utf-8")).get(tracker, {})
    return identity


def write_identity(folder: Path, tracker: str, identity: Mapping[str, str | int], *, durable: bool = True) -> None:
    """Keep it there.

    Args:
        durable: also if the machine loses its power; costs two waits for the disk.
    """
    path = folder / IDENTITIES
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    text = json.dumps({**known, tracker: dict(identity)}, indent=1) + "\n"
    if durable:
        write_atomic(path, text)
    else:
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
