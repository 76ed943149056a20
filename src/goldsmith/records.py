"""The schema of every file that a run writes: rooms meet in these, and in nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

__all__ = [
    "MEASURED_FIELDS",
    "DataReport",
    "EvaluationRecord",
    "ExampleRecord",
    "FileReport",
    "StepRecord",
    "TrainingState",
]

# Fields of metrics.jsonl that are measured on the machine; every other field is the same after a resume, to the bit.
MEASURED_FIELDS = ("seconds", "data_seconds", "tokens_per_second", "peak_memory_bytes")


def _plain(value: Any) -> Any:
    if isinstance(value, _Record):
        return value.to_json()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


class _Record:
    def to_json(self) -> dict[str, Any]:
        """A mapping that `json.dumps` takes."""
        # `asdict` copies every value deeply: 2 ms a step of the demo, for records that hold numbers and texts.
        return {name: _plain(value) for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; keys that this version does not know are an error."""
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class StepRecord(_Record):
    """One optimizer update, a line of `metrics.jsonl` with `kind` = `step`.

    Attributes:
        step: 1 for the first update.
        epoch: 0 for the first pass over the data.
        tokens: of the step's rows.
        shared_tokens: of these, how many were not computed because another row's context gave them.
        nll: weighted nll of the step's gold divided by its weight, in nats a token, whatever the normalisation.
        nll_by_source: the same of the gold of each source in the step, by its name; empty where the data has one source.
        loss: what was differentiated (normalisation and label smoothing included).
        grad_norm: of all gradients together, before clipping.
        update_to_weight: per layer group, norm of the update / norm of the weights.
        seconds, tokens_per_second, peak_memory_bytes: measured.
        data_seconds: of these seconds, what passed before the model had its next pack: rows drawn, cut into micro-batches, packed.
        tokens_per_microbatch: as it was in this step; smaller than the recipe's where memory did not suffice.
    """

    step: int
    epoch: int
    examples: int
    tokens: int
    gold_tokens: int
    microbatches: int
    shared_tokens: int
    nll: float
    loss: float
    learning_rate: float
    grad_norm: float
    update_to_weight: dict[str, float]
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    tokens_per_microbatch: int
    nll_by_source: dict[str, float] = field(default_factory=dict)
    data_seconds: float = 0.0
    kind: str = "step"


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord(_Record):
    """An evaluation over the whole held-out set, a line of `metrics.jsonl` with `kind` = `evaluation`.

    Attributes:
        step: updates before it; 0 is the model as it came.
        nll: weighted nll of the set divided by its weight sum, one division, in nats a token.
        nll_by_source: the same of each source's rows, by its name; empty where there is one source.
        is_best: the lowest nll so far.
    """

    step: int
    epoch: int
    examples: int
    gold_tokens: int
    nll: float
    nll_per_example: float
    is_best: bool
    seconds: float
    tokens_per_second: float
    nll_by_source: dict[str, float] = field(default_factory=dict)
    kind: str = "evaluation"


@dataclass(frozen=True, kw_only=True)
class ExampleRecord(_Record):
    """One example of one step, a line of `examples.jsonl`; its nll is that of the weights before the update.

    Attributes:
        nll: unweighted sum over its gold tokens (weight > 0), nats.
        source_name: of its source.
    """

    step: int
    epoch: int
    example_id: str
    source: str
    nll: float
    gold_tokens: int
    source_name: str = ""


@dataclass(frozen=True, kw_only=True)
class FileReport(_Record):
    """What became of the rows of one file: `rows_in == used + sum(rejected.values()) + dropped + over_limit`.

    Attributes:
        path: as the recipe wrote it.
        name: of its source.
        sha256: of a file; None where there is none.
        format: of its rows; empty where none could be read.
        format_detected: whether it was found in the first rows, and not said.
        revision: of a hub data set, where it is known.
        examples, tokens, gold_tokens: as they are trained.
        too_long: rows longer than `max_length`: rejected, `dropped`, `cut` or `split`, as `data.on_too_long` says.
        tokens_lost, gold_tokens_lost: cut off, or of rows that were rejected or dropped for their length.
        tokens_repeated: context tokens that the parts of split rows hold again. Without a limit there would have been
            `tokens + tokens_lost - tokens_repeated`.
    """

    path: str
    name: str
    sha256: str | None
    rows_in: int
    used: int
    rejected: dict[str, int]
    over_limit: int
    examples: int
    tokens: int
    gold_tokens: int
    straddles: int
    format: str = ""
    format_detected: bool = False
    revision: str | None = None
    too_long: int = 0
    dropped: int = 0
    cut: int = 0
    split: int = 0
    tokens_lost: int = 0
    gold_tokens_lost: int = 0
    tokens_repeated: int = 0


@dataclass(frozen=True, kw_only=True)
class DataReport(_Record):
    """`data.json`: every file of a split, and the first rejections of each reason with their places."""

    files: list[FileReport] = field(default_factory=list)
    rejections: dict[str, list[str]] = field(default_factory=dict)

    @property
    def rows_in(self) -> int:
        return sum(file.rows_in for file in self.files)

    @property
    def used(self) -> int:
        return sum(file.used for file in self.files)

    @property
    def rejected(self) -> dict[str, int]:
        """Rejections by reason, over all files."""
        total: dict[str, int] = {}
        for file in self.files:
            for reason, count in file.rejected.items():
                total[reason] = total.get(reason, 0) + count
        return total

    @property
    def first_rejected(self) -> dict[str, str]:
        """Of each reason of `rejected` its first row: where it lies, and what was seen there."""
        return {reason: places[0] for reason, places in self.rejections.items()}

    @property
    def tokens(self) -> int:
        return sum(file.tokens for file in self.files)

    @property
    def gold_tokens(self) -> int:
        return sum(file.gold_tokens for file in self.files)


@dataclass(frozen=True, kw_only=True)
class TrainingState(_Record):
    """`state.json` of a checkpoint: the position and what the loop carries besides weights and moments.

    Attributes:
        step: updates done.
        best_step, best_nll: of the best evaluation so far, or None.
        evaluations_without_improvement: for early stopping.
        stopped_early: early stopping ended the run here.
        metrics_offset, examples_offset: bytes of the two files at this point.
        elapsed_seconds: time spent in all runs so far.
        halved_tokens_per_microbatch, halved_from: what is used in place of the recipe's value, and that value, since a step
            ran out of memory; None otherwise.
        stream: the position within streamed data; None where the data is held.
    """

    step: int
    best_step: int | None
    best_nll: float | None
    evaluations_without_improvement: int
    stopped_early: bool
    metrics_offset: int
    examples_offset: int
    elapsed_seconds: float
    halved_tokens_per_microbatch: int | None = None
    halved_from: int | None = None
    stream: dict[str, Any] | None = None

    @classmethod
    def initial(cls) -> TrainingState:
        """Before anything was done."""
        return cls(
            step=0,
            best_step=None,
            best_nll=None,
            evaluations_without_improvement=0,
            stopped_early=False,
            metrics_offset=0,
            examples_offset=0,
            elapsed_seconds=0.0,
        )
