"""Whose words the gold of an example is: found where ids and weights are built, and kept through every cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from goldsmith.types import GoldTurn, TokenizedExample

__all__ = ["gold_turns", "kept_turns", "turn_indices"]


def gold_turns(
    target_weights: npt.NDArray[np.float32], speakers: Sequence[tuple[int, str]], *, first: int = 1
) -> tuple[GoldTurn, ...]:
    """The turns that have gold, numbered from `first`.

    Args:
        speakers: (position from which on the tokens are a message's, its role), ascending; gold stands behind the first.

    >>> [(turn.begin, turn.role) for turn in gold_turns(np.array([0, 1, 0, 0, 1], np.float32), [(0, "user"), (2, "assistant")])]
    [(1, 'user'), (4, 'assistant')]
    """
    gold = np.flatnonzero(target_weights)
    edges = [*np.searchsorted(gold, [begin for begin, _ in speakers]).tolist(), len(gold)]
    turns: list[GoldTurn] = []
    for (_, role), (low, high) in zip(speakers, itertools.pairwise(edges), strict=True):
        if low < high:
            turns.append(GoldTurn(begin=int(gold[low]), number=first + len(turns), role=role))
    return tuple(turns)


def kept_turns(example: TokenizedExample, kept: npt.NDArray[np.int64]) -> tuple[GoldTurn, ...]:
    """The turns of what is left of an example.

    Args:
        kept: int64, ascending: positions of the tokens that are kept.
    """
    if not example.turns:
        return ()
    places = np.flatnonzero(example.target_weights[kept])
    owners = turn_indices(example, kept[places])
    first = np.flatnonzero(np.diff(owners, prepend=-1))
    return tuple(replace(example.turns[owners[index]], begin=int(places[index])) for index in first)


def turn_indices(example: TokenizedExample, gold: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Of each gold position the index of its turn in `example.turns`, which are known."""
    begins = np.array([turn.begin for turn in example.turns])
    return np.searchsorted(begins, gold, side="right").astype(np.int64) - 1
