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
from torch.autograd.function import once_differentiable

from goldsmith.objective.cross_entropy import ObjectiveSums, OutputHead
from goldsmith.objective.cross_entropy_triton import cross_entropy_rows, has_triton

__all__ = ["default_chunk_size", "linear_cross_entropy", "product"]

LOGITS_BYTES_PER_CHUNK = 64 * 2**20
# A GPU needs larger products to be busy.
LOGITS_BYTES_PER_CHUNK_CUDA = 512 * 2**20
# The element-wise passes over a chunk go by blocks of rows of about this size, so that they read from the cache.
CACHE_BYTES = 2 * 2**20


def default_chunk_size(vocabulary: int, *, element_bytes: int = 4, device_type: str = "cpu") -> int:
    """Rows of a chunk so that its logits take at most 64 MiB, 512 MiB on CUDA (at least 16 rows)."""
    limit = LOGITS_BYTES_PER_CHUNK_CUDA if device_type == "cuda" else LOGITS_BYTES_PER_CHUNK
    return max(16, limit // (vocabulary * element_bytes))


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
        chunk_size = default_chunk_size(
            head.weight_VD.shape[0],
            # Logits are never in half precision.
            element_bytes=max(4, hidden_KD.element_size()),
            device_type=hidden_KD.device.type,
        )
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
        is_autocast = torch.is_autocast_enabled(device_type) and hidden_KD.dtype != torch.float64
        product_dtype = torch.get_autocast_dtype(device_type) if is_autocast else hidden_KD.dtype
        # Softmax and sums are never taken in half precision.
        sum_dtype = torch.float64 if hidden_KD.dtype == torch.float64 else torch.float32
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        num_targets, vocabulary = hidden_KD.shape[0], weight_VD.shape[0]

        with torch.autocast(device_type, enabled=False):
            hidden = hidden_KD.to(product_dtype)
            weight = weight_VD.to(product_dtype)
            coefficients_K = target_weights_K.to(sum_dtype)
            log_probs_K = torch.empty(num_targets, dtype=sum_dtype, device=hidden.device)
            losses_K = torch.empty(num_targets, dtype=sum_dtype, device=hidden.device)
            grad_hidden = torch.empty_like(hidden) if wants_hidden else None
            grad_weight: torch.Tensor | None = None
            grad_bias = torch.zeros(vocabulary, dtype=sum_dtype, device=hidden.device) if wants_bias else None
            wants_gradient = wants_hidden or wants_weight or wants_bias
            is_fused = device_type == "cuda" and sum_dtype == torch.float32 and has_triton()
            logits_buffer = hidden.new_empty(0 if is_fused else min(chunk_size, num_targets), vocabulary)
            block_size = _rows_in_cache(logits_buffer)

            for start in range(0, num_targets, chunk_size):
                rows = slice(start, min(start + chunk_size, num_targets))
                hidden_CD = hidden[rows]
                product_CV: torch.Tensor | None  # the gradient of the products
                if is_fused:
                    log_probs_K[rows], losses_K[rows], product_CV = cross_entropy_rows(
                        product(hidden_CD, weight.T),
                        target_ids_K[rows],
                        coefficients_K[rows],
                        bias_V,
                        head,
                        label_smoothing,
                        grad_dtype=product_dtype if wants_gradient else None,
                    )
                else:
                    product_CV = torch.mm(hidden_CD, weight.T, out=logits_buffer[: len(hidden_CD)])
                    # In half precision this is a copy; otherwise the gradient takes the place of the logits.
                    logits_CV = product_CV.to(sum_dtype)
                    for first in range(rows.start, rows.stop, block_size):
                        block = slice(first, min(first + block_size, rows.stop))
                        log_probs_K[block], losses_K[block] = _block(
                            logits_CV[first - rows.start : block.stop - rows.start],
                            target_ids_K[block],
                            coefficients_K[block] if wants_gradient else None,
                            bias_V,
                            head,
                            label_smoothing,
                        )
                    product_CV = logits_CV.to(product_dtype)
                if not wants_gradient or product_CV is None:
                    continue
                if grad_bias is not None:
                    grad_bias += product_CV.sum(dim=0, dtype=sum_dtype)
                if grad_hidden is not None:
                    torch.mm(product_CV, weight, out=grad_hidden[rows])
                if not wants_weight:
                    continue
                if grad_weight is None:
                    grad_weight = product(product_CV.T, hidden_CD).to(sum_dtype)
                elif product_dtype == sum_dtype:
                    grad_weight.addmm_(product_CV.T, hidden_CD)
                else:
                    grad_weight += product(product_CV.T, hidden_CD)
            weighted_nll = (coefficients_K.double() * losses_K.double()).sum()

        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden_KD.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        ctx.mark_non_differentiable(log_probs_K)
        return weighted_nll.to(sum_dtype), log_probs_K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nll: torch.Tensor, _grad_log_probs: torch.Tensor) -> tuple[Any, ...]:
        # Training passes coefficients that are divided already, and then there is nothing to scale.
        is_one = grad_nll.device.type == "cpu" and float(grad_nll) == 1.0
        gradients = tuple(
            None if saved is None else (saved if is_one else saved * grad_nll.to(saved.dtype)).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*gradients, None, None, None, None, None)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A matrix product that is not rounded to half precision, where the device can do that."""
    if a.dtype in (torch.bfloat16, torch.float16) and a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def _rows_in_cache(logits_CV: torch.Tensor) -> int:
    """Rows whose passes of `_block` stay in the cache of a CPU; on another device all of them."""
    if logits_CV.device.type != "cpu":
        return max(1, logits_CV.shape[0])
    return max(1, CACHE_BYTES // (logits_CV.shape[1] * logits_CV.element_size()))


def _block(
    logits_BV: torch.Tensor,
    ids_B: torch.Tensor,
    coefficients_B: torch.Tensor | None,
    bias_V: torch.Tensor | None,
    head: OutputHead,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and losses [B] of a block of rows.

    Args:
        logits_BV: the products with the output embedding; overwritten, with the gradient of these products where there
            are coefficients.
    """
    ids_B1 = ids_B[:, None]
    if bias_V is not None:
        logits_BV += bias_V.to(logits_BV.dtype)
    if head.logit_scale != 1.0:
        logits_BV *= head.logit_scale
    tanh_BV = None
    if head.soft_cap is not None:
        tanh_BV = torch.tanh(logits_BV / head.soft_cap)
        torch.mul(tanh_BV, head.soft_cap, out=logits_BV)
    gold_B1 = logits_BV.gather(1, ids_B1)
    mean_B1 = logits_BV.mean(dim=1, keepdim=True) if label_smoothing > 0.0 else None
    maximum_B1 = logits_BV.amax(dim=1, keepdim=True)
    exponentials_BV = logits_BV.sub_(maximum_B1).exp_()
    sums_B1 = exponentials_BV.sum(dim=1, keepdim=True)
    log_normalizer_B1 = sums_B1.log().add_(maximum_B1)
    log_probs_B = (gold_B1 - log_normalizer_B1).squeeze(1)
    losses_B = -log_probs_B
    if mean_B1 is not None:
        losses_B = (1.0 - label_smoothing) * losses_B - label_smoothing * (mean_B1 - log_normalizer_B1).squeeze(1)
    if coefficients_B is not None:
        factors_B1 = (coefficients_B * head.logit_scale)[:, None]
        grad_BV = exponentials_BV.mul_(factors_B1 / sums_B1)
        if label_smoothing > 0.0:
            grad_BV -= factors_B1 * (label_smoothing / logits_BV.shape[1])
        grad_BV.scatter_add_(1, ids_B1, -(1.0 - label_smoothing) * factors_B1)
        if tanh_BV is not None:
            grad_BV *= 1.0 - tanh_BV.square_()
    return log_probs_B, losses_B
