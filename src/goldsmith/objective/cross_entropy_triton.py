"""Cross-entropy of a chunk of logits and its gradient on CUDA: one kernel, two reads of the logits and one write.

The same numbers as `_block` of `linear_cross_entropy.py`, which goes over the logits seven times. A program takes a row:
first the running maximum and sum of exponentials (Milakov and Gimelshein 2018), then the gradient. Sums are float32.

Legend: C rows of a chunk, V vocabulary.
"""

# Kernels are compiled by Triton from their source; their arguments have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch

from goldsmith.objective.cross_entropy import OutputHead

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with PyTorch for CUDA, and with no other
    triton = None

__all__ = ["cross_entropy_rows", "has_triton"]

BLOCK = 4096


def has_triton() -> bool:
    """Whether the kernel can be compiled here."""
    return triton is not None


def cross_entropy_rows(
    logits_CV: torch.Tensor,
    ids_C: torch.Tensor,
    coefficients_C: torch.Tensor,
    bias_V: torch.Tensor | None,
    head: OutputHead,
    label_smoothing: float,
    *,
    grad_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Log-probabilities and losses, float32 [C], and the gradient of the products (before bias and scale), [C, V].

    Args:
        logits_CV: products of hidden states and output embedding, float32, contiguous; they are not changed.
        coefficients_C: float32, the factor of each row's loss in the gradient.
        grad_dtype: of the gradient; None for none.
    """
    rows, vocabulary = logits_CV.shape
    log_probs_C = torch.empty(rows, dtype=torch.float32, device=logits_CV.device)
    losses_C = torch.empty_like(log_probs_C)
    grad_CV = None if grad_dtype is None else torch.empty_like(logits_CV, dtype=grad_dtype)
    _rows_kernel[(rows,)](
        logits_CV,
        logits_CV if grad_CV is None else grad_CV,
        ids_C,
        coefficients_C,
        logits_CV if bias_V is None else bias_V,
        log_probs_C,
        losses_C,
        head.logit_scale,
        head.soft_cap or 1.0,
        label_smoothing,
        vocabulary=vocabulary,
        HAS_BIAS=bias_V is not None,
        HAS_CAP=head.soft_cap is not None,
        IS_SMOOTHED=label_smoothing > 0.0,
        WANTS_GRADIENT=grad_CV is not None,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return log_probs_C, losses_C, grad_CV


_rows_kernel: Any = None
if triton is not None:

    @triton.jit
    def _logits(
        row_pointer, bias_pointer, columns, vocabulary, scale, cap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr
    ):
        """What the model's softmax sees, and tanh of its capped part; -inf beyond the vocabulary."""
        inside = columns < vocabulary
        values = tl.load(row_pointer + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            values += tl.load(bias_pointer + columns, mask=inside, other=0.0).to(tl.float32)
        values *= scale
        bounded = values
        if HAS_CAP:
            bounded = 2.0 * tl.sigmoid(2.0 * values / cap) - 1.0
            values = cap * bounded
        return tl.where(inside, values, float("-inf")), bounded

    @triton.jit
    def _rows_kernel(
        logits, gradients, ids, coefficients, bias, log_probs, losses, scale, cap, smoothing,
        vocabulary: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, IS_SMOOTHED: tl.constexpr,
        WANTS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        row_pointer = logits + row * vocabulary
        gold_id = tl.load(ids + row)
        maximum = float("-inf")
        exponentials = 0.0
        total = 0.0
        gold = 0.0
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            values, _ = _logits(row_pointer, bias, columns, vocabulary, scale, cap, HAS_BIAS, HAS_CAP)
            if IS_SMOOTHED:
                total += tl.sum(tl.where(columns < vocabulary, values, 0.0))
            gold += tl.sum(tl.where(columns == gold_id, values, 0.0))
            higher = tl.maximum(maximum, tl.max(values))
            exponentials = exponentials * tl.exp(maximum - higher) + tl.sum(tl.exp(values - higher))
            maximum = higher
        log_normalizer = maximum + tl.log(exponentials)
        log_prob = gold - log_normalizer
        loss = -log_prob
        if IS_SMOOTHED:
            loss = (1.0 - smoothing) * loss - smoothing * (total / vocabulary - log_normalizer)
        tl.store(log_probs + row, log_prob)
        tl.store(losses + row, loss)
        if WANTS_GRADIENT:
            factor = tl.load(coefficients + row) * scale
            for start in range(0, vocabulary, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                values, bounded = _logits(row_pointer, bias, columns, vocabulary, scale, cap, HAS_BIAS, HAS_CAP)
                gradient = tl.exp(values - log_normalizer)
                if IS_SMOOTHED:
                    gradient -= smoothing / vocabulary
                gradient -= tl.where(columns == gold_id, 1.0 - smoothing, 0.0)
                gradient *= factor
                if HAS_CAP:
                    gradient *= 1.0 - bounded * bounded
                tl.store(
                    gradients + row * vocabulary + columns,
                    gradient.to(gradients.dtype.element_ty),
                    mask=columns < vocabulary,
                )
