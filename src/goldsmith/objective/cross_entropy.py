"""The plain reference of the objective: full logits, a log-softmax, a weighted sum.

Legend: K gold tokens, V vocabulary, D width of the hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

__all__ = ["ObjectiveConfig", "ObjectiveSums", "OutputHead", "cross_entropy"]


class ObjectiveConfig(BaseModel):
    """`objective:` of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    normalization: Literal["token", "example", "sum"] = Field(
        "token", description="what the weighted nll of a step is divided by: its weight sum, its examples, or nothing"
    )
    label_smoothing: float = Field(
        0.0, ge=0.0, lt=1.0, description="mass taken from the gold token and spread evenly over the vocabulary"
    )


@dataclass(frozen=True, kw_only=True)
class OutputHead:
    """From hidden states to logits: `cap * tanh(scale * (h W^T + b) / cap)`, the cap only where there is one.

    Attributes:
        weight_VD: the output embedding.
        bias_V: its bias, or None.
        logit_scale: factor on the logits (Cohere; Granite divides, so its inverse).
        soft_cap: the bound of Gemma 2's final logits, or None.
    """

    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None = None
    logit_scale: float = 1.0
    soft_cap: float | None = None


@dataclass(frozen=True, kw_only=True)
class ObjectiveSums:
    """Sums over the gold tokens of one pack; no mean anywhere.

    Attributes:
        weighted_nll: scalar, differentiable: sum of weight times loss (with label smoothing, the smoothed loss).
        weight_sum: float64 scalar, the sum of the weights.
        log_probs_K: log p of each gold token in nats, detached, never smoothed and not weighted.
    """

    weighted_nll: torch.Tensor
    weight_sum: torch.Tensor
    log_probs_K: torch.Tensor


def cross_entropy(
    hidden_KD: torch.Tensor,
    head: OutputHead,
    target_ids_K: torch.Tensor,
    target_weights_K: torch.Tensor,
    *,
    label_smoothing: float = 0.0,
) -> ObjectiveSums:
    """Weighted cross-entropy against one-hot gold, written as the formula is.

    With s = `label_smoothing`, the loss of a token is `-(1 - s) log p(y) - s / V sum_v log p(v)`; its gradient with
    respect to a logit is `p - (1 - s) one_hot(y) - s / V`, times the weight.

    Args:
        hidden_KD: hidden states that predict the gold, float32 or float64.
        head: the output projection.
        target_ids_K: gold ids, int64.
        target_weights_K: a weight for each, any float type; converted to that of the logits.
    """
    logits_KV = torch.nn.functional.linear(hidden_KD, head.weight_VD, head.bias_V)
    if logits_KV.dtype in (torch.float16, torch.bfloat16):
        logits_KV = logits_KV.float()
    if head.logit_scale != 1.0:
        logits_KV = logits_KV * head.logit_scale
    if head.soft_cap is not None:
        logits_KV = head.soft_cap * torch.tanh(logits_KV / head.soft_cap)
    log_probs_KV = torch.log_softmax(logits_KV, dim=-1)
    log_probs_K = log_probs_KV.gather(1, target_ids_K[:, None]).squeeze(1)
    losses_K = -log_probs_K
    if label_smoothing > 0.0:
        losses_K = (1.0 - label_smoothing) * losses_K - label_smoothing * log_probs_KV.mean(dim=-1)
    return ObjectiveSums(
        weighted_nll=(target_weights_K.to(losses_K.dtype) * losses_K).sum(),
        weight_sum=target_weights_K.double().sum(),
        log_probs_K=log_probs_K.detach(),
    )
