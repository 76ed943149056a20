"""The fast path of the objective: output projection and cross-entropy together, a chunk of logits at a time.

The gradient of a logit is known as soon as its softmax is (`p - one_hot(y)`, times the weight), so the forward pass
already multiplies it into the gradients of the hidden states and of the output embedding. The backward pass only scales them. Thus
three matrix products in all, none of them repeated, and never more than one chunk of logits in memory.

Legend: K gold tokens, V vocabulary, D width, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

from goldsmith.objective.cross_entropy import ObjectiveSums, OutputHead

__all__ = ["default_chunk_size", "linear_cross_entropy"]

LOGITS_BYTES_PER_CHUNK = 64 * 2**20


def default_chunk_size(vocabulary: int, *, element_bytes: int = 4) -> int:
    """Rows of a chunk so that its logits take at most 64 MiB (at least 16 rows)."""
    return max(16, LOGITS_BYTES_PER_CHUNK // (vocabulary * element_bytes))


def linear_cross_entropy(
    hidden_KD: torch.Tensor,
    head: OutputHead,
    target_ids_K: torch.Tensor,
    target_weights_K: torch.Tensor,
    *,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
) -> ObjectiveSums:
    """Same arguments, same result as `cross_entropy` up to rounding; `chunk_size` (rows) changes memory only.

    Under autocast the matrix products run in its type and everything else in float32.
    """
    if chunk_size is None:
        chunk_size = default_chunk_size(head.weight_VD.shape[0], element_bytes=hidden_KD.element_size())
    leaves: tuple[torch.Tensor | None, ...] = (hidden_KD, head.weight_VD, head.bias_V)
    if not torch.is_grad_enabled():
        # `needs_input_grad` does not know of `no_grad`, and the gradients are two of the three products.
        leaves = tuple(None if tensor is None else tensor.detach() for tensor in leaves)
    apply: Callable[..., tuple[torch.Tensor, torch.Tensor]] = _LinearCrossEntropy.apply
    weighted_nll, log_probs_K = apply(*leaves, target_ids_K, target_weights_K, head, label_smoothing, chunk_size)
    return ObjectiveSums(weighted_nll=weighted_nll, weight_sum=target_weights_K.double().sum(), log_probs_K=log_probs_K)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_KD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_ids_K: torch.Tensor,
        target_weights_K: torch.Tensor,
        head: OutputHead,
        label_smoothing: float,
        chunk_size: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device_type = hidden_KD.device.type
        product_dtype = (
            torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden_KD.dtype
        )
        # Softmax and sums are never taken in half precision.
        sum_dtype = torch.float64 if hidden_KD.dtype == torch.float64 else torch.float32
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        num_targets, vocabulary = hidden_KD.shape[0], weight_VD.shape[0]

        with torch.autocast(device_type, enabled=False):
            hidden = hidden_KD.to(product_dtype)
            weight = weight_VD.to(product_dtype)
            coefficients_K = target_weights_K.to(sum_dtype)
            log_probs_K = torch.empty(num_targets, dtype=sum_dtype, device=hidden.device)
            weighted_nll = torch.zeros(
                (), dtype=torch.float64 if device_type == "cpu" else sum_dtype, device=hidden.device
            )
            grad_hidden = torch.empty_like(hidden) if wants_hidden else None
            grad_weight = torch.zeros_like(weight_VD, dtype=sum_dtype) if wants_weight else None
            grad_bias = torch.zeros(vocabulary, dtype=sum_dtype, device=hidden.device) if wants_bias else None

            for start in range(0, num_targets, chunk_size):
                rows = slice(start, min(start + chunk_size, num_targets))
                hidden_CD = hidden[rows]
                ids_C1 = target_ids_K[rows, None]
                coefficients_C = coefficients_K[rows]

                logits_CV = (hidden_CD @ weight.T).to(sum_dtype)
                if bias_V is not None:
                    logits_CV += bias_V.to(sum_dtype)
                if head.logit_scale != 1.0:
                    logits_CV *= head.logit_scale
                tanh_CV = None
                if head.soft_cap is not None:
                    tanh_CV = torch.tanh_(logits_CV.div_(head.soft_cap))
                    logits_CV = tanh_CV * head.soft_cap

                log_normalizer_C1 = torch.logsumexp(logits_CV, dim=-1, keepdim=True)
                log_probs_C = (logits_CV.gather(1, ids_C1) - log_normalizer_C1).squeeze(1)
                log_probs_K[rows] = log_probs_C
                losses_C = -log_probs_C
                if label_smoothing > 0.0:
                    mean_log_prob_C = logits_CV.mean(dim=-1) - log_normalizer_C1.squeeze(1)
                    losses_C = (1.0 - label_smoothing) * losses_C - label_smoothing * mean_log_prob_C
                weighted_nll += (coefficients_C * losses_C).sum(dtype=weighted_nll.dtype)

                if not (wants_hidden or wants_weight or wants_bias):
                    continue
                # In place from here: logits -> probabilities -> gradient of the logits before scale and cap.
                grad_CV = logits_CV.sub_(log_normalizer_C1).exp_()
                grad_CV.scatter_add_(1, ids_C1, torch.full_like(ids_C1, -(1.0 - label_smoothing), dtype=sum_dtype))
                if label_smoothing > 0.0:
                    grad_CV -= label_smoothing / vocabulary
                grad_CV *= (coefficients_C * head.logit_scale)[:, None]
                if tanh_CV is not None:
                    grad_CV *= 1.0 - tanh_CV.square_()
                if grad_bias is not None:
                    grad_bias += grad_CV.sum(dim=0)
                product_CV = grad_CV.to(product_dtype)
                if grad_hidden is not None:
                    torch.mm(product_CV, weight, out=grad_hidden[rows])
                if grad_weight is not None:
                    if product_dtype == sum_dtype:
                        grad_weight.addmm_(product_CV.T, hidden_CD)
                    else:
                        grad_weight += product_CV.T @ hidden_CD

        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden_KD.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        ctx.mark_non_differentiable(log_probs_K)
        return weighted_nll.to(sum_dtype), log_probs_K

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_nll: torch.Tensor, _grad_log_probs: torch.Tensor) -> tuple[Any, ...]:
        dtypes = ctx.dtypes  # type: ignore[attr-defined]
        gradients = tuple(
            None if saved is None else (saved * grad_nll.to(saved.dtype)).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, dtypes, strict=True)  # type: ignore[attr-defined]
        )
        return (*gradients, None, None, None, None, None)
