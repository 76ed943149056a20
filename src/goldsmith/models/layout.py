"""How the segments of one pack lie in memory and are grouped into batched calls; every layer of a forward pass reads it.

Segments of like length go through one batched call, right-padded to the longest of their group: under a causal mask a padded
key lies after every real query, so the padding needs no mask and cannot be seen. A pack of 128 short words therefore
costs a few calls a layer and not 128, and a long segment stands in a group of its own, read in place.

Legend: N tokens of the pack, H heads, G segments of a group, L longest of the group, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch

__all__ = [
    "PackLayout",
    "SegmentGroup",
    "current_layout",
    "gather_groups",
    "group_segments",
    "pack_layout",
    "scatter_groups",
]

# Cost of one more batched call, in the unit of one padded query-key pair, as measured on a CPU with 4 heads of width 32
# (`benchmarks/attention_groups.py`): a call costs about as much as 3,500 pairs, a gathered token as much as 16.
CALL_COST = 3500.0
TOKEN_COST = 16.0


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
    """How the segments of one pack lie and are grouped. Tables are made where a kernel asks for them.

    Attributes:
        segment_lengths: in pack order; they sum to N.
        device: of the tables.
        ancestors: for each segment that others continue, (tokens of all segments below it, its own tokens): the former see
            all of the latter, besides what they see of their own segment.
        gold_rows_R: int64 [R], ascending: the only positions whose last hidden state is wanted; a layer that knows that
            it is the last may leave out the others, and then returns [1, R, ...]. None: all are wanted.
        masks: masks of sliding windows, filled as layers ask for them.
    """

    segment_lengths: tuple[int, ...]
    device: torch.device
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
        lengths = tuple(int(length) for length in segment_lengths)
        return cls(
            segment_lengths=lengths,
            device=torch.device(device),
            ancestors=_ancestors(lengths, segment_parents or ()),
            gold_rows_R=gold_rows_R,
        )

    @cached_property
    def num_tokens(self) -> int:
        """N."""
        return sum(self.segment_lengths)

    @property
    def groups(self) -> tuple[SegmentGroup, ...]:
        """Segments by batched call, longest first."""
        return self._tables[0]

    @property
    def slot_N(self) -> torch.Tensor:
        """int64 [N], where each token stands in the groups laid end to end."""
        return self._tables[1]

    @cached_property
    def _tables(self) -> tuple[tuple[SegmentGroup, ...], torch.Tensor]:
        lengths = torch.tensor(self.segment_lengths, dtype=torch.int64)
        starts = torch.cumsum(lengths, 0) - lengths
        order = torch.argsort(lengths, descending=True, stable=True)
        slot_N = torch.empty(self.num_tokens, dtype=torch.int64)
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
                    token_GL=tokens_GL.flatten().to(self.device),
                    is_token_GL=None if bool(is_token.all()) else is_token.flatten().to(self.device),
                )
            )
            first += size
            offset += size * longest
        return tuple(groups), slot_N.to(self.device)

    @cached_property
    def bounds_S1(self) -> torch.Tensor:
        """int32 [S + 1] on the device: where each segment starts, and N."""
        return _bounds(self.segment_lengths, self.device)

    @cached_property
    def ancestor_bounds(self) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """For each of `ancestors`, the `bounds_S1` of the two stretches as one segment each."""
        return tuple(
            (_bounds([below.stop - below.start], self.device), _bounds([above.stop - above.start], self.device))
            for below, above in self.ancestors
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


def _bounds(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


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


def gather_groups(rows_NHD: torch.Tensor, layout: PackLayout) -> Iterator[torch.Tensor]:
    """[N, H, D] -> a [G, H, L, D] view or copy for each group."""
    heads, width = rows_NHD.shape[1:]
    for group in layout.groups:
        is_alone = group.start >= 0
        own = slice(group.start, group.start + group.length)
        rows = rows_NHD[own] if is_alone else rows_NHD.index_select(0, group.token_GL)
        yield rows.view(group.num_segments, group.length, heads, width).transpose(1, 2)


def scatter_groups(padded: Sequence[torch.Tensor], layout: PackLayout, target_NHD: torch.Tensor) -> None:
    """Write each group's [G, H, L, D] to its tokens; padding is dropped."""
    if all(group.start >= 0 for group in layout.groups):
        for rows, group in zip(padded, layout.groups, strict=True):
            target_NHD[group.start : group.start + group.length] = rows[0].transpose(0, 1)
        return
    # One copy that lays the groups end to end and one that picks the tokens cost less than writing by index.
    slots = torch.cat([rows.transpose(1, 2).flatten(0, 1) for rows in padded])
    torch.index_select(slots, 0, layout.slot_N, out=target_NHD)
