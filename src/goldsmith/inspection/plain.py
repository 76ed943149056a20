"""The plain path: rows padded to a rectangle, the model's own forward, full logits, the formula. Nothing of the fast path.

It takes a model, ids and weights, and shares no code with packing, attention, the objective or the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from goldsmith.types import TokenizedExample

__all__ = ["PlainStep", "plain_step"]


@dataclass(frozen=True, kw_only=True)
class PlainStep:
    """Loss, log-probabilities of the gold tokens (example by example, in order) and gradients by parameter name."""

    loss: float
    log_probs: torch.Tensor
    gradients: dict[str, torch.Tensor]


def plain_step(
    causal_lm: PreTrainedModel,
    examples: Sequence[TokenizedExample],
    *,
    normalization: str,
    label_smoothing: float,
) -> PlainStep:
    """One step as a textbook has it, all rows in one padded batch; the gradients are taken off the model again.

    With plain ("eager") attention a row is a batch by itself: padding that sees nothing within a sliding window would be NaN.

    Args:
        causal_lm: with its own attention while this runs.
        normalization: `token`, `example` or `sum`.
    """
    device = next(causal_lm.parameters()).device
    width = max(example.num_tokens for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.int64)
    weights = torch.zeros(len(examples), width, dtype=torch.float64)
    is_token = torch.zeros(len(examples), width, dtype=torch.int64)
    for row, example in enumerate(examples):
        ids[row, : example.num_tokens] = torch.from_numpy(example.token_ids.astype(np.int64))
        weights[row, : example.num_tokens] = torch.from_numpy(example.target_weights.astype(np.float64))
        is_token[row, : example.num_tokens] = 1
    example_weights = torch.tensor([example.example_weight for example in examples], dtype=torch.float64)
    weight_sums = weights.sum(dim=1)
    numerator_weights, denominator = {
        "token": (example_weights, float((example_weights * weight_sums).sum())),
        "example": (example_weights / weight_sums, float(example_weights.sum())),
        "sum": (example_weights, 1.0),
    }[normalization]

    factors = weights[:, 1:] * numerator_weights[:, None] / denominator
    gold_log_probs = []
    loss = 0.0
    with _own_attention(causal_lm) as attention:
        rows_at_once = 1 if attention == "eager" else len(examples)
        for first in range(0, len(examples), rows_at_once):
            rows = slice(first, first + rows_at_once)
            longest = int(is_token[rows].sum(dim=1).max())
            row_ids, mask = ids[rows, :longest].to(device), is_token[rows, :longest].to(device)
            logits = causal_lm(input_ids=row_ids, attention_mask=mask, use_cache=False).logits
            log_probs = torch.log_softmax(logits[:, :-1], dim=-1)
            gold = log_probs.gather(2, row_ids[:, 1:, None]).squeeze(2)
            losses = -(1.0 - label_smoothing) * gold - label_smoothing * log_probs.mean(dim=-1)
            part = (factors[rows, : longest - 1].to(device, losses.dtype) * losses).sum()
            part.backward()
            loss += float(part.detach())
            gold_log_probs.append(gold.detach().cpu()[weights[rows, 1:longest] > 0])
    gradients = {}
    for name, parameter in causal_lm.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad
            parameter.grad = None
    return PlainStep(loss=loss, log_probs=torch.cat(gold_log_probs), gradients=gradients)


@contextmanager
def _own_attention(causal_lm: Any) -> Iterator[str]:
    """The attention of `transformers`; the plain one where a soft cap or the class rules the fused one out."""
    before = causal_lm.config._attn_implementation
    soft_capped = getattr(causal_lm.config.get_text_config(), "attn_logit_softcapping", None) is not None
    own = "eager" if soft_capped or not causal_lm._supports_sdpa else "sdpa"
    causal_lm.set_attn_implementation(own)
    try:
        yield own
    finally:
        causal_lm.set_attn_implementation(before)
