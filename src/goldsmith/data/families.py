"""Rows that begin with the same context: found once, and an order of an epoch in which they meet in a step. Pure functions.

Legend: E examples, R rows, L levels. A family is a set of rows whose contexts begin with the same `MIN_SHARED_TOKENS` tokens or
more; within it, rows that share so many more are a family of the next level (all questions behind one system prompt, then
all answers to one question).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from goldsmith.data.mixture import copies_in_epoch
from goldsmith.data.packing import IndexedExamples
from goldsmith.data.shared_context import shareable_length, sorted_by_prefix

__all__ = ["MIN_SHARED_TOKENS", "family_levels", "grouped_order"]

# Fewer are not worth another order of the rows: many texts begin with the same few words.
MIN_SHARED_TOKENS = 32
_MAX_LEVELS = 4


def family_levels(examples: IndexedExamples, row_starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """int64 [R, L]: the family of each row at each level, counted from 0; -1 where it has none.

    Only tokens before the first gold one count, those of the row's first example. Two rows of one family at a level are of one
    family at every level above it.

    Args:
        row_starts: int64 [R], the first example of each row.
    """
    contexts = []
    candidates: dict[bytes, list[int]] = defaultdict(list)
    for row, start in enumerate(row_starts.tolist()):
        example = examples[start]
        context = example.token_ids[: shareable_length(example.target_weights)]
        contexts.append(context)
        if len(context) >= MIN_SHARED_TOKENS:
            candidates[context[:MIN_SHARED_TOKENS].tobytes()].append(row)
    levels = np.full((len(row_starts), _MAX_LEVELS), -1, dtype=np.int64)
    counts = [0] * _MAX_LEVELS
    for rows in candidates.values():
        if len(rows) < 2:
            continue
        order, common = sorted_by_prefix([contexts[row] for row in rows], [len(contexts[row]) for row in rows])
        pending = [(0, len(rows), 0)]  # positions in `order`, of one family at this level
        while pending:
            first, end, level = pending.pop()
            levels[[rows[place] for place in order[first:end]], level] = counts[level]
            counts[level] += 1
            if level + 1 == _MAX_LEVELS:
                continue
            deeper = min(common[first + 1 : end]) + MIN_SHARED_TOKENS
            cuts = [first, *(place for place in range(first + 1, end) if common[place] < deeper), end]
            pending += [(begin, stop, level + 1) for begin, stop in pairwise(cuts) if stop - begin > 1]
    return levels[:, : max(1, sum(count > 0 for count in counts))]


def grouped_order(
    groups: npt.NDArray[np.int64],
    levels: npt.NDArray[np.int64],
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    repeats: npt.NDArray[np.float64] | None = None,
) -> npt.NDArray[np.int64]:
    """The order of an epoch in which the rows of a family meet in a step, if they have room there; else in as few as they need.

    Families come in random order, rows within a family as well, and the steps are shuffled again. The parts of a row stay
    adjacent. Every example is there as often as in `epoch_order`, once without `repeats`. Depends on the arguments alone.

    Args:
        groups: int64 [E], the row of each example; not decreasing.
        levels: int64 [R, L], see `family_levels`.
        seed: of the run.
        epoch: counts from 0.
        batch_size: examples a step.
        repeats: float64 [E], as in `epoch_order`.

    Returns:
        int64 [M], indices of examples; a step is `batch_size` of them, one after another.
    """
    if len(groups) == 0:
        return np.zeros(0, dtype=np.int64)
    row_starts = np.flatnonzero(np.diff(groups, prepend=groups[0] - 1))
    row_lengths = np.diff(row_starts, append=len(groups))
    # Another stream than that of the shuffled order; raw bits, for they stay the same over versions of numpy.
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch, 1]))

    def keys(count: int) -> npt.NDArray[np.uint64]:
        return np.asarray(bits.random_raw(count), dtype=np.uint64)

    copies = np.arange(len(row_starts), dtype=np.int64)
    if repeats is not None:
        copies = np.repeat(copies, copies_in_epoch(repeats[row_starts], keys(len(row_starts))))
    sort_keys = [keys(len(copies))]
    for level in range(levels.shape[1] - 1, -1, -1):
        family = levels[copies, level]
        # A row outside of any family of this level is drawn among its families with a key of its own.
        of_family = keys(int(family.max(initial=-1)) + 1)
        own = keys(len(copies))
        sort_keys.append(np.where(family >= 0, of_family[family] if len(of_family) else own, own))
    copies = copies[np.lexsort(sort_keys)]

    chunks = _chunks(levels[copies, 0], row_lengths[copies], batch_size)
    places = _in_steps([int(row_lengths[copies[first:end]].sum()) for first, end in chunks], chunks, batch_size)
    spans = [span for first, end in places for span in range(first, end)]
    ordered = copies[spans]
    ordered = _shuffled_steps(ordered, row_lengths[ordered], batch_size, keys)
    lengths = row_lengths[ordered]
    within = np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.asarray(np.repeat(row_starts[ordered], lengths) + within, dtype=np.int64)


def _chunks(families: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], batch_size: int) -> list[tuple[int, int]]:
    """[first, end) of stretches of one family that each fit into a step (or are one row); a row without family is alone."""
    chunks: list[tuple[int, int]] = []
    first = size = 0
    before = -1
    for place, (family, length) in enumerate(zip(families.tolist(), lengths.tolist(), strict=True)):
        if place > first and (family == -1 or family != before or size + length > batch_size):
            chunks.append((first, place))
            first, size = place, 0
        size += length
        before = family
    chunks.append((first, len(families)))
    return chunks


def _in_steps(sizes: Sequence[int], chunks: Sequence[tuple[int, int]], batch_size: int) -> list[tuple[int, int]]:
    """The chunks in an order in which few of them are cut by the end of a step.

    The next one is taken where it fits into what is left of the step, else the largest later one that fits, else the next one all
    the same, and the step's end cuts it.
    """
    # By size, in order: the first one of the head's size is the head itself.
    waiting: dict[int, deque[int]] = defaultdict(deque)
    for chunk, size in enumerate(sizes):
        waiting[size].append(chunk)
    known = sorted(waiting)
    taken = [False] * len(chunks)
    ordered: list[tuple[int, int]] = []
    room = batch_size
    head = 0
    while len(ordered) < len(chunks):
        while taken[head]:
            head += 1
        chosen = head
        if sizes[head] > room:
            place = bisect_right(known, room)
            if place:
                chosen = waiting[known[place - 1]][0]
        size = sizes[chosen]
        waiting[size].popleft()
        if not waiting[size]:
            known.remove(size)
        taken[chosen] = True
        ordered.append(chunks[chosen])
        room = (room - size) % batch_size or batch_size
    return ordered


def _shuffled_steps(
    rows: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    batch_size: int,
    keys: Callable[[int], npt.NDArray[np.uint64]],
) -> npt.NDArray[np.int64]:
    """The same steps in random order, the last one last if it is smaller. Steps that a row reaches over stay together."""
    ends = np.cumsum(lengths)
    block_ends = np.flatnonzero(ends % batch_size == 0) + 1
    blocks = np.split(rows, block_ends)
    rest = blocks.pop()  # empty where the last step is full
    order = np.argsort(keys(len(blocks)), kind="stable").tolist() if blocks else []
    return np.concatenate([*(blocks[index] for index in order), rest])
