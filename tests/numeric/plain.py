"""The plain loop that the fast path is judged by: padded rows, full logits, log-softmax, a sum, a division, autograd.

Nothing here comes from the package: torch, transformers, and plain lists of ids and weights. It is written to be read,
not to be fast. `own_attention` is for models whose attention bounds its scores (Gemma 2), which
`scaled_dot_product_attention` cannot do.

Legend: B rows, T longest row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

__all__ = ["OWN_ATTENTION", "PlainRow", "PlainStep", "plain_log_probs", "plain_step"]

OWN_ATTENTION = "plain_reference"


@dataclass(frozen=True, kw_only=True)
class PlainRow:
    """One example: a weight for the prediction of each token, 0 for context."""

    ids: list[int]
    weights: list[float]
    example_weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class PlainStep:
    """Loss of a step in float64 and its gradient, by parameter name; log p of every token of every row but its first."""

    loss: float
    gradients: dict[str, torch.Tensor]
    log_probs: list[torch.Tensor] = field(default_factory=list)


def plain_log_probs(model: PreTrainedModel, rows: Sequence[PlainRow]) -> list[torch.Tensor]:
    """log p of every token of every row but its first, differentiable; all rows in one right-padded batch."""
    return [
        log_probs_TV.gather(1, torch.tensor(row.ids[1:])[:, None]).squeeze(1)
        for row, log_probs_TV in zip(rows, _all_log_probs(model, rows), strict=True)
    ]


def _all_log_probs(model: PreTrainedModel, rows: Sequence[PlainRow]) -> list[torch.Tensor]:
    """Row by row [its tokens but the first, V]: what the model gives to every token of the vocabulary."""
    longest = max(len(row.ids) for row in rows)
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask_BT = torch.zeros(len(rows), longest, dtype=torch.int64)
    for number, row in enumerate(rows):
        ids_BT[number, : len(row.ids)] = torch.tensor(row.ids)
        mask_BT[number, : len(row.ids)] = 1
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    log_probs_BTV = torch.log_softmax(logits_BTV, dim=-1)
    return [log_probs_BTV[number, : len(row.ids) - 1] for number, row in enumerate(rows)]


def plain_step(
    model: PreTrainedModel, rows: Sequence[PlainRow], normalization: str, label_smoothing: float = 0.0
) -> PlainStep:
    """The loss of a step over `rows`, as the three formulas are written, and the gradient of every trainable parameter."""
    model.zero_grad(set_to_none=True)
    numerator = torch.zeros((), dtype=torch.float64)
    denominator = 0.0
    gold_log_probs = []
    for row, log_probs_TV in zip(rows, _all_log_probs(model, rows), strict=True):
        log_probs = log_probs_TV.gather(1, torch.tensor(row.ids[1:])[:, None]).squeeze(1)
        gold_log_probs.append(log_probs.detach())
        # Cross-entropy with the gold token's distribution, of which a part is spread over the whole vocabulary.
        losses = -(1 - label_smoothing) * log_probs - label_smoothing * log_probs_TV.mean(dim=1)
        nll = (torch.tensor(row.weights[1:], dtype=torch.float64) * losses).sum()
        weight_sum = sum(row.weights[1:])
        if normalization == "token":
            numerator = numerator + row.example_weight * nll
            denominator += row.example_weight * weight_sum
        elif normalization == "example":
            numerator = numerator + row.example_weight * nll / weight_sum
            denominator += row.example_weight
        elif normalization == "sum":
            numerator = numerator + row.example_weight * nll
            denominator = 1.0
        else:
            raise ValueError(normalization)
    loss = numerator / denominator
    loss.backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return PlainStep(loss=float(loss.detach()), gradients=gradients, log_probs=gold_log_probs)


def own_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Scores, soft cap, mask, softmax, all in the inputs' dtype; `attention_mask` is additive, [B, 1, T, T]."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = scaling * query @ key.transpose(2, 3)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    assert attention_mask is not None
    return (torch.softmax(scores + attention_mask, dim=-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(OWN_ATTENTION, own_attention)
AttentionMaskInterface.register(OWN_ATTENTION, eager_mask)
