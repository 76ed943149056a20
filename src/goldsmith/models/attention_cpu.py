"""Packed attention on a CPU: PyTorch's flash kernel called directly, forward and backward, float32 and float64.

Short segments go through plain batched products. A shared context is joined to what continues it by the logarithms of
the normalizers, so that its keys are read where they lie and its gradient is the exact sum.

Legend: N tokens of the pack, H heads, G segments of a group, L longest of the group, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from goldsmith.models.layout import PackLayout, SegmentGroup, gather_groups, scatter_groups

__all__ = ["attend", "attend_backward"]

# Segments up to this length go through plain batched products: half the flash kernel's time at 16 tokens, all of it at 32.
SHORT_LENGTH = 24

# Queries a block where the sliding window is shorter than the segment.
WINDOW_BLOCK = 256

Call = tuple[slice, slice, torch.Tensor | None]  # queries, keys, mask (None: causal over the same positions)


def _calls(group: SegmentGroup, layout: PackLayout, window: int | None, like: torch.Tensor) -> list[Call]:
    """The kernel calls of a group: one, or one a block of queries where a sliding window leaves most keys out."""
    if window is None or group.length <= window:
        everything = slice(0, group.length)
        return [(everything, everything, None)]
    calls: list[Call] = []
    for start in range(0, group.length, WINDOW_BLOCK):
        end = min(start + WINDOW_BLOCK, group.length)
        first_key = max(0, start - window + 1)
        mask = layout.window_mask(end - start, end - first_key, window, like)
        calls.append((slice(start, end), slice(first_key, end), mask))
    return calls


_flash: Callable[..., tuple[torch.Tensor, torch.Tensor]] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
)


def attend(
    query_NHD: torch.Tensor,
    key_NHD: torch.Tensor,
    value_NHD: torch.Tensor,
    layout: PackLayout,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Packed attention on the CPU, outside of autograd.

    Args:
        query_NHD: may be a slice of a larger tensor; key and value may have fewer heads.

    Returns:
        The attended values [N, H, D], contiguous, and what `attend_backward` needs besides these and the arguments.
    """
    heads, width = query_NHD.shape[1], value_NHD.shape[2]
    saved: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    padded = (gather_groups(tensor, layout) for tensor in (query_NHD, key_NHD, value_NHD))
    for group, group_query, group_key, group_value in zip(layout.groups, *padded, strict=True):
        if group.length <= SHORT_LENGTH and not layout.ancestors:
            out, probabilities = _attend_short(group_query, group_key, group_value, layout, scale, window)
            saved.append(probabilities)
            outputs.append(out)
            continue
        blocks = []
        for queries, keys, mask in _calls(group, layout, window, query_NHD):
            out, log_normalizer = _flash(
                group_query[:, :, queries],
                group_key[:, :, keys],
                group_value[:, :, keys],
                0.0,
                mask is None,
                attn_mask=mask,
                scale=scale,
            )
            blocks.append(out)
            saved.append(log_normalizer)
        outputs.append(blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2))
    out_NHD = query_NHD.new_empty(layout.num_tokens, heads, width)
    scatter_groups(outputs, layout, out_NHD)
    if layout.ancestors:
        saved = [_add_ancestors(query_NHD, key_NHD, value_NHD, out_NHD, saved, layout, scale)]
    return out_NHD, saved


def _add_ancestors(
    query_NHD: torch.Tensor,
    key_NHD: torch.Tensor,
    value_NHD: torch.Tensor,
    out_NHD: torch.Tensor,
    own_normalizers: Sequence[torch.Tensor],
    layout: PackLayout,
    scale: float,
) -> torch.Tensor:
    """Join what segments see of their ancestors to what they see of themselves, in place; returns log normalizers [N, H, 1].

    Two attentions over disjoint keys join into that over all keys: each output is weighted with its share of the sum of
    the exponentials, which the logarithms of these sums give.
    """
    normalizer_NH1 = query_NHD.new_empty(*out_NHD.shape[:2], 1)
    scatter_groups(
        [normalizer[..., None].to(query_NHD.dtype) for normalizer in own_normalizers], layout, normalizer_NH1
    )
    for below, above in layout.ancestors:
        out, normalizer = _flash(
            _as_one(query_NHD[below]), _as_one(key_NHD[above]), _as_one(value_NHD[above]), 0.0, False, scale=scale
        )
        theirs = normalizer[0].T[..., None].to(normalizer_NH1.dtype)
        ours = normalizer_NH1[below]
        both = torch.logaddexp(ours, theirs)
        out_NHD[below] = out_NHD[below] * (ours - both).exp_() + out[0].transpose(0, 1) * (theirs - both).exp_()
        normalizer_NH1[below] = both
    return normalizer_NH1


def _as_one(rows_NHD: torch.Tensor) -> torch.Tensor:
    return rows_NHD.transpose(0, 1)[None]


def attend_backward(
    grad_NHD: torch.Tensor,
    query_NHD: torch.Tensor,
    key_NHD: torch.Tensor,
    value_NHD: torch.Tensor,
    out_NHD: torch.Tensor,
    saved: Sequence[torch.Tensor],
    layout: PackLayout,
    scale: float,
    window: int | None,
    *,
    into: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """The gradients of query, key and value, written over the three tensors `into`."""
    padded = (gather_groups(tensor, layout) for tensor in (query_NHD, key_NHD, value_NHD, out_NHD, grad_NHD))
    # With ancestors these are the normalizers over all keys: a part's gradient needs the probabilities within the whole.
    gradients: list[tuple[torch.Tensor, ...]] = []
    left = (group[..., 0] for group in gather_groups(saved[0], layout)) if layout.ancestors else iter(saved)
    for group, group_query, group_key, group_value, group_out, group_grad in zip(layout.groups, *padded, strict=True):
        if group.is_token_GL is not None:
            # A padded slot repeats a token, and must not repeat its gradient.
            group_grad = group_grad * group.is_token_GL.view(group.num_segments, 1, group.length, 1)
        if group.length <= SHORT_LENGTH and not layout.ancestors:
            gradients.append(_attend_short_backward(group_grad, group_query, group_key, group_value, next(left), scale))
            continue
        calls = _calls(group, layout, window, query_NHD)
        sums = [torch.zeros_like(t) for t in (group_query, group_key, group_value)] if len(calls) > 1 else []
        for queries, keys, mask in calls:
            parts = _flash_backward(
                group_grad[:, :, queries],
                group_query[:, :, queries],
                group_key[:, :, keys],
                group_value[:, :, keys],
                group_out[:, :, queries],
                next(left).contiguous(),
                0.0,
                mask is None,
                attn_mask=mask,
                scale=scale,
            )
            for total, part, where in zip(sums, parts, (queries, keys, keys), strict=False):
                total[:, :, where] += part
        gradients.append(tuple(sums) or parts)
    for target_NHD, padded_parts in zip(into, zip(*gradients, strict=True), strict=True):
        scatter_groups(padded_parts, layout, target_NHD)
    for below, above in layout.ancestors:
        parts = _flash_backward(
            _as_one(grad_NHD[below]),
            _as_one(query_NHD[below]),
            _as_one(key_NHD[above]),
            _as_one(value_NHD[above]),
            _as_one(out_NHD[below]),
            saved[0][below, :, 0].T[None].contiguous(),
            0.0,
            False,
            scale=scale,
        )
        for target_NHD, part, where in zip(into, parts, (below, above, above), strict=True):
            target_NHD[where] += part[0].transpose(0, 1)


def _attend_short(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackLayout, scale: float, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain products for short segments, where the flash kernel's blocks are mostly empty.

    Args:
        query: [G, H, L, D]; key and value [G, J, L, D] with H = J * R.

    Returns:
        [G, H, L, D], and the probabilities [G * J, R * L, L].
    """
    length = query.shape[2]
    queries, keys, values = _as_batch(query, key.shape[1]), _as_batch(key, key.shape[1]), _as_batch(value, key.shape[1])
    repeats = queries.shape[1] // length
    mask = layout.window_mask(length, length, window or length, query).repeat(repeats, 1)
    scores = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=scale)
    probabilities = torch.softmax(scores, dim=-1)
    return torch.bmm(probabilities, values).view(*query.shape[:3], value.shape[3]), probabilities


def _attend_short_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    probabilities: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """The gradients of query, key and value, each in its own shape."""
    heads = key.shape[1]
    grads, queries, keys, values = (_as_batch(tensor, heads) for tensor in (grad, query, key, value))
    grad_values = torch.bmm(probabilities.transpose(1, 2), grads)
    grad_probabilities = torch.bmm(grads, values.transpose(1, 2))
    grad_scores = torch.ops.aten._softmax_backward_data(grad_probabilities, probabilities, -1, probabilities.dtype)
    grad_queries = torch.bmm(grad_scores.mul_(scale), keys)
    grad_keys = torch.bmm(grad_scores.transpose(1, 2), queries)
    return grad_queries.view(query.shape), grad_keys.view(key.shape), grad_values.view(value.shape)


def _as_batch(tensor: torch.Tensor, key_heads: int) -> torch.Tensor:
    """[G, J * R, L, D] -> [G * J, R * L, D], contiguous: the queries that share a key head, under each other."""
    num_segments, heads, length, width = tensor.shape
    return tensor.reshape(num_segments * key_heads, heads // key_heads * length, width)
