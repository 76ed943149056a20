"""Attention over a pack: every segment attends causally to itself and to nothing else.

Segments of like length go through one batched call, right-padded to the longest of their group: under a causal mask a padded
key lies after every real query, so the padding needs no mask and cannot be seen. A pack of 128 short words therefore
costs a few calls a layer and not 128, and a long segment stands in a group of its own, read in place.

Registered with `transformers` as `goldsmith_packed`. No mask function is registered with it: for such a name
`transformers` builds no mask, and the layout of the pack takes its place. It is set around the decoder's forward with
`pack_layout`.

On the CPU the flash kernel of PyTorch is called directly, forward and backward, float32 and float64, and short segments
go through plain batched products. Other devices use
`scaled_dot_product_attention` on the same groups. That path has never run on a GPU.

Legend: N tokens of the pack, H heads, G segments of a group, L longest of the group, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import AttentionInterface

from goldsmith.errors import ModelError

__all__ = [
    "PACKED_ATTENTION",
    "PackLayout",
    "SegmentGroup",
    "SharedContextError",
    "attend",
    "attend_backward",
    "current_layout",
    "group_segments",
    "pack_layout",
    "packed_attention",
]

PACKED_ATTENTION = "goldsmith_packed"

# Cost of one more batched call, in the unit of one padded query-key pair, as measured on a CPU with 4 heads of width 32
# (`benchmarks/attention_groups.py`): a call costs about as much as 3,500 pairs, a gathered token as much as 16.
CALL_COST = 3500.0
TOKEN_COST = 16.0

# Segments up to this length go through plain batched products: half the flash kernel's time at 16 tokens, all of it at 32.
SHORT_LENGTH = 24

# Queries a block where the sliding window is shorter than the segment.
WINDOW_BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class SegmentGroup:
    """Segments that go through one batched call.

    Attributes:
        num_segments: G.
        length: L, of the longest.
        start: where its only segment starts in the pack, for G = 1; -1 where it is gathered.
        token_GL: int64 [G * L], the token of each padded slot (padding repeats the segment's last token).
        is_token_GL: bool [G * L], False for padding; None where there is none.
    """

    num_segments: int
    length: int
    start: int
    token_GL: torch.Tensor
    is_token_GL: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class PackLayout:
    """How the segments of one pack are grouped.

    Attributes:
        num_tokens: N.
        groups: longest segments first.
        slot_N: int64 [N], where each token stands in the groups laid end to end.
        ancestors: for each segment that others continue, (tokens of all segments below it, its own tokens): the former see
            all of the latter, besides what they see of their own segment.
        gold_rows_R: int64 [R], ascending: the only positions whose last hidden state is wanted; a layer that knows that
            it is the last may leave out the others, and then returns [1, R, ...]. None: all are wanted.
        masks: masks of sliding windows, filled as layers ask for them.
    """

    num_tokens: int
    groups: tuple[SegmentGroup, ...]
    slot_N: torch.Tensor
    ancestors: tuple[tuple[slice, slice], ...] = ()
    gold_rows_R: torch.Tensor | None = None
    masks: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def plan(
        cls,
        segment_lengths: Sequence[int],
        device: torch.device | str = "cpu",
        gold_rows_R: torch.Tensor | None = None,
        segment_parents: Sequence[int] | None = None,
    ) -> PackLayout:
        """The layout of segments of these lengths, in pack order.

        Args:
            segment_parents: -1 for none; a parent comes before its children, and all that is below it follows it at once.
        """
        lengths = torch.as_tensor(segment_lengths, dtype=torch.int64)
        num_tokens = int(lengths.sum())
        starts = torch.cumsum(lengths, 0) - lengths
        order = torch.argsort(lengths, descending=True, stable=True)
        slot_N = torch.empty(num_tokens, dtype=torch.int64)
        groups = []
        first = offset = 0
        for size in group_segments(lengths[order].tolist()):
            members = order[first : first + size]
            longest = int(lengths[members[0]])
            columns = torch.arange(longest)
            own = torch.minimum(columns[None, :], lengths[members][:, None] - 1)
            tokens_GL = starts[members][:, None] + own
            is_token = columns[None, :] < lengths[members][:, None]
            slots = torch.arange(offset, offset + size * longest).view(size, longest)
            slot_N[tokens_GL[is_token]] = slots[is_token]
            groups.append(
                SegmentGroup(
                    num_segments=size,
                    length=longest,
                    start=int(starts[members[0]]) if size == 1 else -1,
                    token_GL=tokens_GL.flatten().to(device),
                    is_token_GL=None if bool(is_token.all()) else is_token.flatten().to(device),
                )
            )
            first += size
            offset += size * longest
        return cls(
            num_tokens=num_tokens,
            groups=tuple(groups),
            slot_N=slot_N.to(device),
            ancestors=_ancestors(lengths.tolist(), segment_parents or ()),
            gold_rows_R=gold_rows_R,
        )

    def window_mask(self, queries: int, keys: int, window: int, like: torch.Tensor) -> torch.Tensor:
        """Additive [queries, keys]: the last query sees the last key, each sees `window` keys up to itself."""
        key = (queries, keys, window)
        if key not in self.masks:
            distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None, :]
            mask = torch.zeros(queries, keys, dtype=like.dtype)
            mask.masked_fill_((distance < 0) | (distance >= window), float("-inf"))
            self.masks[key] = mask.to(like.device)
        return self.masks[key]


def _ancestors(lengths: Sequence[int], parents: Sequence[int]) -> tuple[tuple[slice, slice], ...]:
    """See `PackLayout.ancestors`; innermost last."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    last_below: dict[int, int] = {}
    for segment, parent in enumerate(parents):
        above = parent
        while above != -1:
            if not (above < segment and last_below.get(above, above) == segment - 1):
                raise ValueError(f"segment {segment} does not follow what is below its ancestor {above} at once")
            last_below[above] = segment
            above = parents[above]
    return tuple(
        (slice(starts[above + 1], starts[last + 1]), slice(starts[above], starts[above + 1]))
        for above, last in sorted(last_below.items())
    )


def group_segments(lengths: Sequence[int]) -> list[int]:
    """Cut segment lengths, sorted descending, into groups of least cost; returns the size of each group.

    A group of G segments costs `CALL_COST + G * L * (L / 2 + TOKEN_COST)` (a group of one is not gathered). Exact, by
    dynamic programming over the distinct lengths.
    """
    distinct: list[tuple[int, int]] = []  # (length, how many)
    for length in lengths:
        if distinct and distinct[-1][0] == length:
            distinct[-1] = (length, distinct[-1][1] + 1)
        else:
            distinct.append((length, 1))
    best = [0.0]
    cut_before = [0]
    counts = [0]
    for _, count in distinct:
        counts.append(counts[-1] + count)
    for end in range(1, len(distinct) + 1):
        costs = []
        for start in range(end):
            size, longest = counts[end] - counts[start], distinct[start][0]
            gathered = TOKEN_COST if size > 1 else 0.0
            costs.append(best[start] + CALL_COST + size * longest * (longest / 2 + gathered))
        cheapest = min(range(end), key=costs.__getitem__)
        best.append(costs[cheapest])
        cut_before.append(cheapest)
    sizes = []
    end = len(distinct)
    while end > 0:
        sizes.append(counts[end] - counts[cut_before[end]])
        end = cut_before[end]
    return sizes[::-1]


_layout: ContextVar[PackLayout | None] = ContextVar("goldsmith_pack_layout", default=None)


def current_layout() -> PackLayout | None:
    """The layout of the pack that is being computed; None outside of one."""
    return _layout.get()


@contextmanager
def pack_layout(layout: PackLayout) -> Iterator[None]:
    """While this is open, `packed_attention` works on a pack of this layout."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that `transformers` layers call.

    Args:
        query: [1, H, N, D]; key and value may have fewer heads, each shared by H / heads queries.

    Returns:
        [1, N, H, D], and no attention weights.

    Raises:
        ModelError: the layer asks for something that this attention does not do (attention sinks, an own mask,
            attention in both directions).
    """
    layout = _layout.get()
    name = type(module).__name__
    if layout is None or layout.num_tokens != query.shape[2] or query.shape[0] != 1:
        raise RuntimeError(f"{name}: packed attention outside of a pack of its size; use LikelihoodModel")
    if others.get("s_aux") is not None:
        raise ModelError(f"{name} uses attention sinks, which packed attention does not compute")
    if attention_mask is not None:
        raise ModelError(f"{name} builds an attention mask of its own, which packed attention does not apply")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise ModelError(f"{name} attends in both directions; goldsmith trains causal language models")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)

    # The flash kernel wants values as wide as keys; latent attention (DeepSeek-V3) has narrower ones.
    if softcap is None and dropout == 0.0 and _is_cpu(query) and query.shape[-1] == value.shape[-1]:
        apply: Callable[..., torch.Tensor] = _PackedFlashCPU.apply
        return apply(query, key, value, layout, scale, sliding_window), None
    if layout.ancestors:
        raise SharedContextError(f"{name}: a shared context is computed by the flash kernel of the CPU only")
    padded = [_gather_groups(tensor[0].transpose(0, 1), layout) for tensor in (query, key, value)]
    outputs = []
    for group, group_query, group_key, group_value in zip(layout.groups, *padded, strict=True):
        if softcap is not None:
            attended = _soft_capped(
                group_query, group_key, group_value, layout, scale, sliding_window, softcap, dropout
            )
        else:
            mask = None
            if sliding_window is not None and group.length > sliding_window:
                mask = layout.window_mask(group.length, group.length, sliding_window, group_query)
            attended = functional.scaled_dot_product_attention(
                group_query,
                group_key,
                group_value,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=group_query.shape[1] != group_key.shape[1],
            )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[layout.slot_N][None], None


def _is_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def _soft_capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackLayout,
    scale: float,
    window: int | None,
    soft_cap: float,
    dropout: float,
) -> torch.Tensor:
    """Plain attention with bounded scores, `cap * tanh(scores / cap)` (Gemma 2); [G, H, L, D] in and out."""
    length, repeats = query.shape[2], query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = soft_cap * torch.tanh(query @ key.transpose(2, 3) * (scale / soft_cap))
    scores = scores + layout.window_mask(length, length, window or length, scores)
    sum_dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    probabilities = torch.softmax(scores, dim=-1, dtype=sum_dtype).to(value.dtype)
    return functional.dropout(probabilities, dropout) @ value


def _gather_groups(rows_NHD: torch.Tensor, layout: PackLayout) -> Iterator[torch.Tensor]:
    """[N, H, D] -> a [G, H, L, D] view or copy for each group."""
    heads, width = rows_NHD.shape[1:]
    for group in layout.groups:
        is_alone = group.start >= 0
        own = slice(group.start, group.start + group.length)
        rows = rows_NHD[own] if is_alone else rows_NHD.index_select(0, group.token_GL)
        yield rows.view(group.num_segments, group.length, heads, width).transpose(1, 2)


class SharedContextError(RuntimeError):
    """This kind of attention does not compute segments with ancestors: pack every row with its own context."""


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
    padded = (_gather_groups(tensor, layout) for tensor in (query_NHD, key_NHD, value_NHD))
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
    _scatter_groups(outputs, layout, out_NHD)
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
    _scatter_groups(
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
    padded = (_gather_groups(tensor, layout) for tensor in (query_NHD, key_NHD, value_NHD, out_NHD, grad_NHD))
    # With ancestors these are the normalizers over all keys: a part's gradient needs the probabilities within the whole.
    gradients: list[tuple[torch.Tensor, ...]] = []
    left = (group[..., 0] for group in _gather_groups(saved[0], layout)) if layout.ancestors else iter(saved)
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
        _scatter_groups(padded_parts, layout, target_NHD)
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


def _scatter_groups(padded: Sequence[torch.Tensor], layout: PackLayout, target_NHD: torch.Tensor) -> None:
    """Write each group's [G, H, L, D] to its tokens; padding is dropped."""
    if all(group.start >= 0 for group in layout.groups):
        for rows, group in zip(padded, layout.groups, strict=True):
            target_NHD[group.start : group.start + group.length] = rows[0].transpose(0, 1)
        return
    # One copy that lays the groups end to end and one that picks the tokens cost less than writing by index.
    slots = torch.cat([rows.transpose(1, 2).flatten(0, 1) for rows in padded])
    torch.index_select(slots, 0, layout.slot_N, out=target_NHD)


class _PackedFlashCPU(torch.autograd.Function):
    """`attend` for autograd; [1, H, N, D] in and [1, N, H, D] out. Only unpadded tensors are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: PackLayout,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        query_NHD, key_NHD, value_NHD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        out_NHD, saved = attend(query_NHD, key_NHD, value_NHD, layout, scale, window)
        ctx.save_for_backward(query_NHD, key_NHD, value_NHD, out_NHD, *saved)
        ctx.layout, ctx.scale, ctx.window = layout, scale, window
        return out_NHD[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, out, *saved = ctx.saved_tensors
        into = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
        attend_backward(grad_out[0], query, key, value, out, saved, ctx.layout, ctx.scale, ctx.window, into=into)
        return (*(gradient.transpose(0, 1)[None] for gradient in into), None, None, None)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
