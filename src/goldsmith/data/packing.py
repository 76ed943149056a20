"""The order of an epoch, the cut of a step into micro-batches, and the pack itself. Pure functions.

The shift by one (a hidden state predicts the *next* token) happens in `pack` and nowhere else.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from goldsmith.data.mixture import copies_in_epoch
from goldsmith.types import PackedBatch, TokenizedExample

__all__ = ["IndexedExamples", "epoch_order", "pack", "plan_microbatches", "steps_per_epoch"]


class IndexedExamples(Protocol):
    """What `pack` needs of a data set; a list of examples has it, and so has `dataset.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> TokenizedExample: ...


def epoch_order(
    groups: npt.NDArray[np.int64],
    *,
    seed: int,
    epoch: int,
    repeats: npt.NDArray[np.float64] | None = None,
) -> npt.NDArray[np.int64]:
    """The order in which an epoch goes through the examples: rows are shuffled, the parts of a row stay adjacent.

    Depends on the arguments alone, not on how the epoch is cut. The same row repeated is shuffled copy by copy.

    Args:
        groups: int64 [E], the row of each example; not decreasing, so that the parts of a row lie together.
        seed: the seed of the run, >= 0.
        epoch: counts from 0.
        repeats: float64 [E], how often an epoch holds the example; parts of a row have the same value. None: once each.

    Returns:
        int64 [M], indices of examples. Without `repeats` each of the E exactly once, so M = E.

    Raises:
        ValueError: `groups` decreases, `repeats` has another length, or a repeat is not above 0.
    """
    num_examples = int(groups.shape[0])
    if num_examples == 0:
        return np.zeros(0, dtype=np.int64)
    steps = np.diff(groups)
    if np.any(steps < 0):
        raise ValueError("groups must not decrease: the parts of a row have to lie together")
    row_starts = np.concatenate([[0], np.flatnonzero(steps) + 1]).astype(np.int64)
    row_lengths = np.diff(row_starts, append=num_examples)
    num_rows = int(row_starts.shape[0])
    # Raw bits, not Generator.permutation: their stream is promised to stay the same over versions of numpy.
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))

    if repeats is None:
        copies = np.arange(num_rows, dtype=np.int64)
    else:
        if repeats.shape != groups.shape:
            raise ValueError(f"repeats has shape {repeats.shape}, groups {groups.shape}")
        counts = copies_in_epoch(repeats[row_starts], np.asarray(bits.random_raw(num_rows), dtype=np.uint64))
        copies = np.repeat(np.arange(num_rows, dtype=np.int64), counts)
    keys = np.asarray(bits.random_raw(int(copies.shape[0])), dtype=np.uint64)
    copies = copies[np.argsort(keys, kind="stable")]

    lengths = row_lengths[copies]
    first_of_copy = np.cumsum(lengths) - lengths
    within = np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(first_of_copy, lengths)
    return np.asarray(np.repeat(row_starts[copies], lengths) + within, dtype=np.int64)


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """ceil(examples / batch_size): the last step of an epoch may be smaller.

    >>> steps_per_epoch(10, 4)
    3
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if num_examples < 0:
        raise ValueError(f"num_examples must not be negative, but is {num_examples}")
    return -(-num_examples // batch_size)


def plan_microbatches(lengths: Sequence[int] | npt.NDArray[np.int64], max_tokens: int) -> list[list[int]]:
    """Cut a step into micro-batches of at most `max_tokens` tokens each: few of them, and of like size.

    Best-fit decreasing finds how many are needed; the rows are then dealt, longest first, each to the micro-batch with
    the fewest tokens, and that evener plan is taken where it keeps the budget too. Deterministic.

    Args:
        lengths: tokens of each row, > 0.
        max_tokens: the budget. A row above it is a micro-batch by itself.

    Returns:
        Micro-batches of indices into `lengths`, each ascending, in the order of their first index.

    Raises:
        ValueError: a length or the budget is below 1.

    >>> plan_microbatches([3, 9, 2, 4, 1], 6)
    [[0, 2], [1], [3, 4]]
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
    sizes = [int(length) for length in lengths]
    if any(size < 1 for size in sizes):
        raise ValueError("every length must be at least 1")
    alone = [[index] for index, size in enumerate(sizes) if size > max_tokens]
    fitting = sorted((i for i, size in enumerate(sizes) if size <= max_tokens), key=lambda i: (-sizes[i], i))
    plan = _best_fit(fitting, sizes, max_tokens)
    even = _deal_evenly(fitting, sizes, len(plan))
    if all(sum(sizes[i] for i in rows) <= max_tokens for rows in even):
        plan = even
    return sorted(sorted(rows) for rows in (*alone, *plan))


def _best_fit(order: list[int], sizes: list[int], max_tokens: int) -> list[list[int]]:
    """Each row into the fullest micro-batch that still has room for it, else into a new one."""
    plan: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, index into plan), ascending
    for index in order:
        size = sizes[index]
        place = bisect_left(rooms, (size, -1))
        if place == len(rooms):
            plan.append([])
            room, batch = max_tokens, len(plan) - 1
        else:
            room, batch = rooms.pop(place)
        plan[batch].append(index)
        if room > size:
            insort(rooms, (room - size, batch))
    return plan


def _deal_evenly(order: list[int], sizes: list[int], num_batches: int) -> list[list[int]]:
    """Each row, longest first, to the micro-batch with the fewest tokens."""
    plan: list[list[int]] = [[] for _ in range(num_batches)]
    loads = [(0, batch) for batch in range(num_batches)]
    for index in order:
        load, batch = loads[0]
        plan[batch].append(index)
        heapq.heapreplace(loads, (load + sizes[index], batch))
    return plan


def pack(examples: IndexedExamples, indices: Sequence[int] | npt.NDArray[np.int64]) -> PackedBatch:
    """Lay the examples `indices` end to end, without padding, and list what is predicted where.

    Token t of an example is predicted by the hidden state of token t-1, so a gold token at position n of the pack has
    target position n-1. Position 0 of an example is never predicted, so no target reaches over to another example.

    Args:
        examples: the data set, or any sequence of examples.
        indices: which of them, in pack order; at least one. An index may occur twice.

    Returns:
        The pack, on the CPU. Its fields are described in `types.PackedBatch`; here every segment is a whole example.

    Raises:
        ValueError: no index, or an example that breaks the contract of `TokenizedExample` (programmer's error).
    """
    chosen = [examples[int(index)] for index in indices]
    if not chosen:
        raise ValueError("a pack needs at least one example")
    lengths = np.array([example.token_ids.shape[0] for example in chosen], dtype=np.int64)
    token_ids = np.concatenate([example.token_ids for example in chosen])
    weights = np.concatenate([example.target_weights for example in chosen])
    if weights.shape != token_ids.shape:
        raise ValueError(f"{token_ids.shape[0]} token ids, but {weights.shape[0]} target weights")
    starts = np.cumsum(lengths) - lengths
    if np.any(lengths < 1) or np.any(weights[starts] != 0):
        raise ValueError("the first token of an example cannot be a target: nothing comes before it")

    gold = np.flatnonzero(weights > 0)
    example_of_token = np.repeat(np.arange(len(chosen), dtype=np.int64), lengths)
    return PackedBatch(
        input_ids=torch.from_numpy(token_ids.astype(np.int64)),
        position_ids=torch.from_numpy(np.arange(token_ids.shape[0], dtype=np.int64) - np.repeat(starts, lengths)),
        segment_lengths=torch.from_numpy(lengths),
        segment_parents=torch.full((len(chosen),), -1, dtype=torch.int64),
        target_positions=torch.from_numpy(gold - 1),
        target_ids=torch.from_numpy(token_ids[gold].astype(np.int64)),
        target_weights=torch.from_numpy(weights[gold].astype(np.float32)),
        target_example=torch.from_numpy(example_of_token[gold]),
        example_indices=tuple(int(index) for index in indices),
        example_weights=torch.tensor([example.example_weight for example in chosen], dtype=torch.float64),
        example_weight_sums=torch.tensor([example.weight_sum for example in chosen], dtype=torch.float64),
    )
