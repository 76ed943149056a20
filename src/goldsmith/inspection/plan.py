"""How the rows will be cut into steps and micro-batches, from a sample of their lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from goldsmith.data.packing import plan_microbatches, steps_per_epoch
from goldsmith.inspection.survey import Sample

__all__ = ["Measured", "Plan", "plan_run"]

_SAMPLED_STEPS = 200


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Of a run, before anything is measured.

    Attributes:
        examples, tokens, gold_tokens: of an epoch, `repeat` included.
        steps_per_epoch: exact where every `repeat` is 1.
        steps: of the whole run.
        epochs: what these steps are.
        microbatches_per_step: mean over sampled steps.
        fill: tokens of these steps / what their micro-batches could hold.
        padding: what share of a step would be padding if its rows were padded to the longest.
    """

    examples: float
    tokens: float
    gold_tokens: float
    batch_size: int
    tokens_per_microbatch: int
    steps_per_epoch: int
    steps: int
    epochs: float
    microbatches_per_step: float
    fill: float
    padding: float

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps_per_epoch


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A few steps of the recipe's model on sampled rows, on this machine.

    Attributes:
        tokens: of all measured steps.
        seconds: of each: forward, backward and update.
        seconds_per_step, seconds_total: of the planned steps, from the time a token took.
        peak_memory_bytes: of the process (CPU) or of the device, while it was measured.
    """

    device: str
    parameters: int
    tokens: int
    seconds: tuple[float, ...]
    tokens_per_second: float
    seconds_per_step: float
    seconds_total: float
    peak_memory_bytes: int


def plan_run(
    sample: Sample, *, batch_size: int, tokens_per_microbatch: int, epochs: int, max_steps: int | None
) -> Plan | None:
    """The plan of a run over what was sampled; None for no rows."""
    if not sample.lengths or sample.epoch_examples < 0.5:
        return None
    per_epoch = steps_per_epoch(max(1, math.floor(sample.epoch_examples + 0.5)), batch_size)
    lengths = np.array(sample.lengths, dtype=np.int64)
    lengths = lengths[np.random.Generator(np.random.Philox(0)).permutation(len(lengths))]
    size = min(batch_size, len(lengths))
    tokens = batches = padded = 0
    steps = [lengths[i : i + size] for i in range(0, len(lengths) - size + 1, size)][:_SAMPLED_STEPS]
    for step in steps:
        tokens += int(step.sum())
        batches += len(plan_microbatches(step, tokens_per_microbatch))
        padded += int(step.max()) * len(step)
    total = max_steps or epochs * per_epoch
    return Plan(
        examples=sample.epoch_examples,
        tokens=sample.epoch_tokens,
        gold_tokens=sample.epoch_gold_tokens,
        batch_size=batch_size,
        tokens_per_microbatch=tokens_per_microbatch,
        steps_per_epoch=per_epoch,
        steps=total,
        epochs=total / per_epoch,
        microbatches_per_step=batches / len(steps),
        fill=tokens / (batches * tokens_per_microbatch),
        padding=1 - tokens / padded,
    )
