"""What scoring wants to know of each gold token beside its log-probability: rank, best token, entropy, alternatives.

Nothing here is differentiated, and a token costs no more than its row of logits: a chunk of them is made at a time, as in
`linear_cross_entropy`, and every figure of a row is read off it while it is in the cache.

Legend: K gold tokens, V vocabulary, D width, N alternatives, B rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from goldsmith.objective.cross_entropy import OutputHead
from goldsmith.objective.linear_cross_entropy import CACHE_BYTES, default_chunk_size

__all__ = ["TokenStatistics", "token_statistics"]


@dataclass(frozen=True, kw_only=True)
class TokenStatistics:
    """Of each gold token; what was not asked for is None. In float32, or float64 where the hidden states are.

    Attributes:
        log_probs_K: of the gold token, nats.
        best_log_probs_K: of the likeliest token, nats.
        is_best_K: whether no token is likelier than the gold one (rank 1). Taken from the logits: two log-probabilities may
            round to one value where the logits differ.
        ranks_K: int64; 1 + the number of tokens whose logit is strictly larger.
        entropies_K: of the distribution, nats.
        top_ids_KN: int64, the likeliest tokens, the likeliest first.
        top_log_probs_KN: theirs, nats.
    """

    log_probs_K: torch.Tensor
    best_log_probs_K: torch.Tensor
    is_best_K: torch.Tensor
    ranks_K: torch.Tensor | None = None
    entropies_K: torch.Tensor | None = None
    top_ids_KN: torch.Tensor | None = None
    top_log_probs_KN: torch.Tensor | None = None


@torch.no_grad()
def token_statistics(
    hidden_KD: torch.Tensor,
    head: OutputHead,
    target_ids_K: torch.Tensor,
    *,
    top: int = 0,
    detailed: bool = True,
    chunk_size: int | None = None,
) -> TokenStatistics:
    """Log-probability, rank, best token, entropy and the likeliest tokens at each gold position.

    Under autocast the product runs in its type and everything else in float32.

    Args:
        hidden_KD: hidden states that predict the gold.
        head: the output projection.
        target_ids_K: gold ids, int64.
        top: how many of the likeliest tokens are listed (at most the vocabulary); 0 for none.
        detailed: ranks and entropies too.
        chunk_size: rows of logits at a time; changes memory only.

    >>> head = OutputHead(weight_VD=torch.log(torch.tensor([[0.6], [0.3], [0.1]], dtype=torch.float64)))
    >>> found = token_statistics(torch.ones(1, 1, dtype=torch.float64), head, torch.tensor([1]), top=2)
    >>> found.ranks_K.tolist(), found.top_ids_KN.tolist(), [round(p, 3) for p in found.log_probs_K.exp().tolist()]
    ([2], [[0, 1]], [0.3])
    """
    num_targets, vocabulary = hidden_KD.shape[0], head.weight_VD.shape[0]
    device_type = hidden_KD.device.type
    is_autocast = torch.is_autocast_enabled(device_type) and hidden_KD.dtype != torch.float64
    product_dtype = torch.get_autocast_dtype(device_type) if is_autocast else hidden_KD.dtype
    sum_dtype = torch.float64 if hidden_KD.dtype == torch.float64 else torch.float32
    if chunk_size is None:
        chunk_size = default_chunk_size(
            vocabulary,
            # Logits are never in half precision.
            element_bytes=max(4, hidden_KD.element_size()),
            device_type=device_type,
        )
    top = min(top, vocabulary)

    def empty(*size: int, dtype: torch.dtype = sum_dtype) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=hidden_KD.device)

    log_probs_K, best_K = empty(num_targets), empty(num_targets)
    is_best_K = empty(num_targets, dtype=torch.bool)
    ranks_K = empty(num_targets, dtype=torch.int64) if detailed else None
    entropies_K = empty(num_targets) if detailed else None
    top_ids_KN = empty(num_targets, top, dtype=torch.int64) if top else None
    top_log_probs_KN = empty(num_targets, top) if top else None

    with torch.autocast(device_type, enabled=False):
        hidden, weight = hidden_KD.to(product_dtype), head.weight_VD.to(product_dtype)
        buffer = hidden.new_empty(min(chunk_size, num_targets), vocabulary)
        block_size = max(1, CACHE_BYTES // (vocabulary * buffer.element_size())) if device_type == "cpu" else chunk_size
        for start in range(0, num_targets, chunk_size):
            stop = min(start + chunk_size, num_targets)
            chunk = torch.mm(hidden[start:stop], weight.T, out=buffer[: stop - start]).to(sum_dtype)
            for first in range(start, stop, block_size):
                rows = slice(first, min(first + block_size, stop))
                logits_BV = _finished(chunk[first - start : rows.stop - start], head)
                gold_B1 = logits_BV.gather(1, target_ids_K[rows, None])
                if ranks_K is not None:
                    ranks_K[rows] = 1 + (logits_BV > gold_B1).sum(dim=1)
                maximum_B1 = logits_BV.amax(dim=1, keepdim=True)
                if top_ids_KN is not None and top_log_probs_KN is not None:
                    top_log_probs_KN[rows], top_ids_KN[rows] = logits_BV.topk(top, dim=1)
                # In this order, as in `linear_cross_entropy`, so that both give the same log-probabilities to the bit.
                shifted_BV = logits_BV.sub_(maximum_B1)
                exponentials_BV = shifted_BV.exp() if entropies_K is not None else shifted_BV.exp_()
                sums_B1 = exponentials_BV.sum(dim=1, keepdim=True)
                log_normalizer_B1 = sums_B1.log().add_(maximum_B1)
                if entropies_K is not None:
                    # -sum p log p = log Z - sum p (logit - max); where p is 0 so is the term, even of a logit of -inf.
                    terms_BV = exponentials_BV.mul_(shifted_BV).nan_to_num_(nan=0.0)
                    entropies_K[rows] = (sums_B1.log() - terms_BV.sum(dim=1, keepdim=True) / sums_B1).squeeze(1)
                log_probs_K[rows] = (gold_B1 - log_normalizer_B1).squeeze(1)
                best_K[rows] = (maximum_B1 - log_normalizer_B1).squeeze(1)
                is_best_K[rows] = (gold_B1 >= maximum_B1).squeeze(1)
                if top_log_probs_KN is not None:
                    top_log_probs_KN[rows] -= log_normalizer_B1
    if entropies_K is not None:
        entropies_K.clamp_(min=0.0)
    return TokenStatistics(
        log_probs_K=log_probs_K,
        best_log_probs_K=best_K,
        is_best_K=is_best_K,
        ranks_K=ranks_K,
        entropies_K=entropies_K,
        top_ids_KN=top_ids_KN,
        top_log_probs_KN=top_log_probs_KN,
    )


def _finished(logits_BV: torch.Tensor, head: OutputHead) -> torch.Tensor:
    """Products with the output embedding to logits, in place."""
    if head.bias_V is not None:
        logits_BV += head.bias_V.to(logits_BV.dtype)
    if head.logit_scale != 1.0:
        logits_BV *= head.logit_scale
    if head.soft_cap is not None:
        logits_BV.div_(head.soft_cap).tanh_().mul_(head.soft_cap)
    return logits_BV
