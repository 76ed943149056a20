"""Rows that begin with the same context carry it once: a step's rows as a forest of segments. Pure functions.

A segment is a stretch of tokens; its parent is the segment whose tokens come before it. Only tokens of weight 0 are
shared, so every gold token belongs to one row. A stretch is shared where that saves enough tokens to pay for the
attention call that it costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from goldsmith.data.packing import IndexedExamples, pack, plan_microbatches
from goldsmith.types import PackedBatch

__all__ = [
    "Segment",
    "pack_shared",
    "plan_shared_microbatches",
    "shareable_length",
    "shared_segments",
    "sorted_by_prefix",
]

# Tokens that one shared stretch must save. An attention call over it costs less than computing so many tokens.
MIN_SAVED_TOKENS = 64

# Tokens of a table of prefixes; more are compared one by one.
_MOST_IN_TABLE = 1 << 20

TokenIds = npt.NDArray[np.int32] | npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Tokens `start:stop` of row `row` (of any row that shares them).

    Attributes:
        parent: index of the segment that comes before it, -1 for none.
        is_leaf: the rest of its row, gold included; otherwise context that several rows share.
    """

    row: int
    start: int
    stop: int
    parent: int
    is_leaf: bool


def shareable_length(target_weights: npt.NDArray[np.float32]) -> int:
    """Tokens before the first gold one."""
    gold = np.flatnonzero(target_weights)
    return int(gold[0]) if len(gold) else int(target_weights.shape[0]) - 1


def shared_segments(
    rows: Sequence[TokenIds], shareable: Sequence[int], *, min_saved: int = MIN_SAVED_TOKENS
) -> list[Segment]:
    """The forest of some rows, every parent before its children and every subtree contiguous.

    Args:
        rows: token ids of each.
        shareable: how many tokens of each row, from its beginning, may be shared; fewer than it has.
        min_saved: tokens that one shared stretch must save.

    >>> prompt = np.arange(100, dtype=np.int32)
    >>> rows = [np.append(prompt, [7]).astype(np.int32), np.append(prompt, [8, 9]).astype(np.int32)]
    >>> [(s.start, s.stop, s.parent) for s in shared_segments(rows, [100, 100])]
    [(0, 100, -1), (100, 101, 0), (100, 102, 0)]
    """
    order, common = sorted_by_prefix(rows, shareable)
    if _largest_saving(common) < min_saved:  # most steps of short rows: no tree has to be grown
        return [Segment(row=row, start=0, stop=len(rows[row]), parent=-1, is_leaf=True) for row in order]
    segments: list[Segment] = []
    # (first, end, depth, parent): rows order[first:end] agree in `depth` tokens, which stand in `parent` and above.
    pending = [(0, len(rows), 0, -1)] if len(rows) else []
    while pending:
        first, end, depth, parent = pending.pop()
        if end - first == 1:
            row = order[first]
            segments.append(Segment(row=row, start=depth, stop=len(rows[row]), parent=parent, is_leaf=True))
            continue
        agreed = min(common[first + 1 : end])
        if (end - first - 1) * (agreed - depth) >= min_saved:
            segments.append(Segment(row=order[first], start=depth, stop=agreed, parent=parent, is_leaf=False))
            depth, parent = agreed, len(segments) - 1
        cuts = [first, *(place for place in range(first + 1, end) if common[place] == agreed), end]
        # Last in, first out: pushed from the last, so that they are laid down from the first.
        pending += [(*span, depth, parent) for span in reversed(list(pairwise(cuts)))]
    return segments


def sorted_by_prefix(rows: Sequence[TokenIds], shareable: Sequence[int]) -> tuple[list[int], list[int]]:
    """Rows in the order of what they may share, and how many tokens each may share with the one before it."""
    if len(rows) * max(shareable, default=0) > _MOST_IN_TABLE:
        return _sorted_one_by_one(rows, shareable)
    lengths = np.array(shareable, dtype=np.int64)
    # One row of the table each, counted from 1; 0 stands behind the end, so that a beginning comes before what goes on.
    table = np.zeros((len(rows), int(lengths.max(initial=0))), dtype=">u4")
    if len(rows):
        prefixes = np.concatenate([row[:length] for row, length in zip(rows, shareable, strict=True)])
        table[np.arange(table.shape[1]) < lengths[:, None]] = prefixes.astype(np.int64) + 1
    data, width = table.tobytes(), 4 * table.shape[1]
    order = sorted(range(len(rows)), key=lambda row: (data[row * width : (row + 1) * width], row))
    differs = table[order[1:]] != table[order[:-1]]
    common = np.where(differs.any(axis=1), differs.argmax(axis=1), table.shape[1]) if table.shape[1] else lengths[1:]
    shorter = np.minimum(lengths[order[1:]], lengths[order[:-1]])
    return order, [0, *np.minimum(common, shorter).tolist()]


def _sorted_one_by_one(rows: Sequence[TokenIds], shareable: Sequence[int]) -> tuple[list[int], list[int]]:
    """The same without a table, for many long rows."""
    prefixes = [row[:length] for row, length in zip(rows, shareable, strict=True)]
    order = sorted(range(len(rows)), key=lambda row: (prefixes[row].astype(">i4").tobytes(), row))
    common = [0]
    for before, row in pairwise(order):
        length = min(len(prefixes[before]), len(prefixes[row]))
        differing = np.flatnonzero(prefixes[before][:length] != prefixes[row][:length])
        common.append(int(differing[0]) if len(differing) else length)
    return order, common


def _largest_saving(common: Sequence[int]) -> int:
    """The most tokens that one stretch at the beginning of neighbouring rows saves: the largest rectangle below `common`.

    >>> _largest_saving([0, 3, 1, 5, 4, 0])
    8
    """
    largest = 0
    rising: list[tuple[int, int]] = []  # (first place, how many tokens), both ascending
    for place, height in enumerate([*common, 0]):
        first = place
        while rising and rising[-1][1] >= height:
            first, lower = rising.pop()
            largest = max(largest, lower * (place - first))
        rising.append((first, height))
    return largest


def plan_shared_microbatches(rows: Sequence[TokenIds], shareable: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Like `plan_microbatches`, with the rows of a family together and their common context counted once.

    A family larger than the budget is cut, and each part carries the context again.
    """
    families: list[list[int]] = []
    for segment in shared_segments(rows, shareable):
        if segment.parent == -1:
            families.append([])
        if segment.is_leaf:
            families[-1].append(segment.row)
    pieces: list[list[int]] = []
    for family in families:
        pieces += _within_budget(family, rows, shareable, max_tokens)
    sizes = [_num_tokens(piece, rows, shareable) for piece in pieces]
    plan = plan_microbatches(sizes, max_tokens)
    return sorted(sorted(row for piece in members for row in pieces[piece]) for members in plan)


def _within_budget(
    family: list[int], rows: Sequence[TokenIds], shareable: Sequence[int], max_tokens: int
) -> list[list[int]]:
    """Consecutive parts of a family that each keep the budget, or are one row."""
    pieces = []
    first = 0
    while first < len(family):
        end = len(family)
        while end - first > 1 and _num_tokens(family[first:end], rows, shareable) > max_tokens:
            end = first + (end - first) // 2
        pieces.append(family[first:end])
        first = end
    return pieces


def _num_tokens(chosen: Sequence[int], rows: Sequence[TokenIds], shareable: Sequence[int]) -> int:
    if len(chosen) == 1:
        return len(rows[chosen[0]])
    segments = shared_segments([rows[row] for row in chosen], [shareable[row] for row in chosen])
    return sum(segment.stop - segment.start for segment in segments)


def pack_shared(
    examples: IndexedExamples, indices: Sequence[int] | npt.NDArray[np.int64], *, min_saved: int = MIN_SAVED_TOKENS
) -> PackedBatch:
    """`pack`, with contexts that several of the examples begin with laid down once.

    `target_positions` may repeat: several rows' first gold tokens may follow the same context token.
    """
    plain = pack(examples, indices)
    lengths = plain.segment_lengths.numpy()
    token_ids = plain.input_ids.numpy()
    row_starts = np.cumsum(lengths) - lengths
    rows = [token_ids[start : start + length] for start, length in zip(row_starts, lengths, strict=True)]
    first_gold = np.full(len(rows), np.iinfo(np.int64).max)
    np.minimum.at(first_gold, plain.target_example.numpy(), plain.target_positions.numpy() + 1)
    segments = shared_segments(rows, (first_gold - row_starts).tolist(), min_saved=min_saved)
    if all(segment.parent == -1 for segment in segments):
        return plain

    segment_lengths = np.array([segment.stop - segment.start for segment in segments], dtype=np.int64)
    segment_starts = np.cumsum(segment_lengths) - segment_lengths
    token_of_slot = np.concatenate(
        [row_starts[segment.row] + np.arange(segment.start, segment.stop) for segment in segments]
    )
    # Where each token of the plain pack stands in this one; a shared token's places fall together.
    slot_of_token = np.empty(len(token_ids), dtype=np.int64)
    for leaf_index, leaf in enumerate(segments):
        index = leaf_index if leaf.is_leaf else -1
        while index != -1:
            segment = segments[index]
            own = row_starts[leaf.row] + np.arange(segment.start, segment.stop)
            slot_of_token[own] = segment_starts[index] + np.arange(segment_lengths[index])
            index = segment.parent
    return replace(
        plain,
        input_ids=plain.input_ids[token_of_slot],
        position_ids=plain.position_ids[token_of_slot],
        segment_lengths=torch.from_numpy(segment_lengths),
        segment_parents=torch.tensor([segment.parent for segment in segments], dtype=torch.int64),
        target_positions=torch.from_numpy(slot_of_token[plain.target_positions.numpy()]),
    )
