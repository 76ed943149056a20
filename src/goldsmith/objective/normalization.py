"""What a step's weighted nll is made of and divided by: the one place where a denominator is defined.

| normalization | numerator | denominator |
|---|---|---|
| `token` | sum_i u_i nll(i) | sum_i u_i W(i) |
| `example` | sum_i u_i nll(i) / W(i) | sum_i u_i |
| `sum` | sum_i u_i nll(i) | 1 |
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from goldsmith.types import PackedBatch

__all__ = ["Normalization", "step_denominator", "token_coefficients"]

Normalization = Literal["token", "example", "sum"]


def token_coefficients(batch: PackedBatch, normalization: Normalization, *, denominator: float = 1.0) -> torch.Tensor:
    """float64 [K]: the factor of each gold token's loss, `u_i w_t` or `u_i w_t / W(i)`, over the step's denominator.

    With the denominator of the whole step, the weighted nll of all micro-batches of the step add up to its loss.
    """
    per_example = batch.example_weights
    if normalization == "example":
        per_example = per_example / batch.example_weight_sums
    return batch.target_weights.double() * (per_example / denominator)[batch.target_example]


def step_denominator(
    example_weights: npt.NDArray[np.float64], weight_sums: npt.NDArray[np.float64], normalization: Normalization
) -> float:
    """The denominator of a whole step, over all micro-batches and ranks, before any forward pass.

    Args:
        example_weights: u_i, [E].
        weight_sums: W(i), [E].
    """
    if normalization == "token":
        return float(np.dot(example_weights, weight_sums))
    if normalization == "example":
        return float(example_weights.sum())
    return 1.0
