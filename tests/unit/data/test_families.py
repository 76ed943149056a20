"""Families of rows, and the order in which they meet: every row once, whatever the families are."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goldsmith.data.families import MIN_SHARED_TOKENS, family_levels, grouped_order
from goldsmith.data.order import StepOrder
from goldsmith.types import TokenizedExample

Array = npt.NDArray[np.int64]


def example(context: list[int], gold: int = 1) -> TokenizedExample:
    return TokenizedExample(
        token_ids=np.array([*context, *[7] * gold], dtype=np.int32),
        target_weights=np.array([0.0] * len(context) + [1.0] * gold, dtype=np.float32),
        example_id="",
        example_weight=1.0,
        source="",
        num_bytes=0,
    )


def levels_of(contexts: list[list[int]]) -> list[list[int]]:
    found: list[list[int]] = family_levels([example(one) for one in contexts], np.arange(len(contexts))).tolist()
    return found


def in_steps(order: Array, batch_size: int) -> list[list[int]]:
    return [order[start : start + batch_size].tolist() for start in range(0, len(order), batch_size)]


def test_families_are_rows_that_begin_alike() -> None:
    shared = list(range(100, 100 + MIN_SHARED_TOKENS))
    other = list(range(500, 500 + 2 * MIN_SHARED_TOKENS))
    found = levels_of([[*shared, 1], [1, 2, 3], [*other, 1], [*shared, 2], shared, [*other[:-1], 9], shared[:-1], []])
    assert [row[0] for row in found] == [0, -1, 1, 0, 0, 1, -1, -1]
    # Gold is never shared, so it makes no family.
    same_gold = [example([5], gold=60), example([5], gold=60)]
    assert family_levels(same_gold, np.arange(2)).tolist() == [[-1], [-1]]


def test_families_within_families() -> None:
    prompt = list(range(100, 400))
    questions = [[*prompt, *range(1000 * n, 1000 * n + 40)] for n in (1, 2, 3)]
    found = np.array(levels_of([[*question, answer] for answer in range(4) for question in questions]))
    assert found[:, 0].tolist() == [0] * 12
    assert len(set(found[:3, 1])) == 3
    assert (found[:, 1] >= 0).all()
    assert (found.reshape(4, 3, -1) == found[:3]).all()


def test_a_family_is_that_of_a_rows_first_example() -> None:
    context = list(range(100, 140))
    examples = [example(context), example([*context, 7, 8]), example([1]), example([*context, 3])]
    assert family_levels(examples, np.array([0, 2, 3])).tolist() == [[0], [-1], [0]]


@given(
    rows=st.lists(st.tuples(st.integers(1, 5), st.integers(-1, 4), st.integers(-1, 1)), min_size=1, max_size=60),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 3),
    repeated=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_every_example_once_and_the_parts_of_a_row_adjacent(
    rows: list[tuple[int, int, int]], batch_size: int, seed: int, repeated: bool
) -> None:
    lengths = [length for length, _, _ in rows]
    groups = np.repeat(np.arange(len(rows)), lengths)
    levels = np.array([[family, 2 * family + deeper if family >= 0 <= deeper else -1] for _, family, deeper in rows])
    repeats = np.repeat([2.0 if row % 3 == 0 else 1.0 for row in range(len(rows))], lengths) if repeated else None
    order = grouped_order(groups, levels, seed=seed, epoch=1, batch_size=batch_size, repeats=repeats)
    expected = np.ones(len(groups)) if repeats is None else repeats
    assert np.bincount(order, minlength=len(groups)).tolist() == expected.tolist()
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    place = 0
    while place < len(order):  # row after row, each whole
        row = groups[order[place]]
        assert order[place : place + lengths[row]].tolist() == list(range(starts[row], starts[row] + lengths[row]))
        place += lengths[row]
    assert (
        order.tolist()
        == grouped_order(groups, levels, seed=seed, epoch=1, batch_size=batch_size, repeats=repeats).tolist()
    )


def test_families_meet_in_one_step_and_are_never_cut_without_need() -> None:
    # 24 families of 5, 30 of 3, 90 rows alone: 300 rows in steps of 8, which the rows alone can fill.
    family_of_row = np.concatenate([np.repeat(np.arange(24), 5), np.repeat(np.arange(24, 54), 3), np.full(90, -1)])
    family_of_row = family_of_row[np.random.default_rng(0).permutation(300)]
    orders = []
    for epoch in range(3):
        order = grouped_order(np.arange(300), family_of_row[:, None], seed=4, epoch=epoch, batch_size=8)
        steps = in_steps(order, 8)
        met = Counter(family for step in steps for family in {family_of_row[row] for row in step} if family >= 0)
        assert len(met) == 54
        assert sum(count > 1 for count in met.values()) <= 2
        orders.append(order.tolist())
        # Steps are shuffled, and a step holds several families and rows alone.
        assert len({tuple(sorted(family_of_row[row] for row in step)) for step in steps}) > 10
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] != grouped_order(np.arange(300), family_of_row[:, None], seed=5, epoch=0, batch_size=8).tolist()


def test_families_larger_than_a_step_fill_steps_of_their_own() -> None:
    family_of_row = np.repeat([0, 1], 20)
    steps = in_steps(grouped_order(np.arange(40), family_of_row[:, None], seed=0, epoch=0, batch_size=8), 8)
    assert sorted(len({family_of_row[row] for row in step}) for step in steps) == [1, 1, 1, 1, 2]
    # Who meets whom is drawn anew in each epoch.
    again = in_steps(grouped_order(np.arange(40), family_of_row[:, None], seed=0, epoch=1, batch_size=8), 8)
    assert {frozenset(step) for step in steps} != {frozenset(step) for step in again}
    # The last step is the small one.
    sizes = [
        len(step)
        for step in in_steps(grouped_order(np.arange(21), family_of_row[:21, None], seed=0, epoch=0, batch_size=8), 8)
    ]
    assert sizes == [8, 8, 5]


def test_a_deeper_family_stays_together_within_a_large_one() -> None:
    levels = np.stack([np.zeros(64, dtype=np.int64), np.arange(64) % 16], axis=1)  # 16 questions with 4 answers each
    steps = in_steps(grouped_order(np.arange(64), levels, seed=2, epoch=0, batch_size=8), 8)
    assert all(sorted(Counter(row % 16 for row in step).values()) == [4, 4] for step in steps)


def test_without_families_rows_are_shuffled() -> None:
    none = np.full((50, 1), -1)
    order = grouped_order(np.arange(50), none, seed=0, epoch=0, batch_size=8)
    assert sorted(order.tolist()) == list(range(50))
    assert order.tolist() != list(range(50))
    assert grouped_order(np.zeros(0, dtype=np.int64), none[:0], seed=0, epoch=0, batch_size=8).tolist() == []


def test_the_order_stays_the_same_over_versions() -> None:
    """A stopped run goes on with the order that it began with, so the function may not change."""
    levels = np.array([0, -1, 1, 0, 1, 0, -1, 1])[:, None]
    assert grouped_order(np.arange(8), levels, seed=0, epoch=0, batch_size=4).tolist() == FROZEN_ORDER


FROZEN_ORDER = [6, 0, 5, 3, 1, 4, 7, 2]


def test_step_order_draws_grouped_steps() -> None:
    levels = np.repeat(np.arange(10), 2)[:, None]
    order = StepOrder(np.arange(20), np.ones(20), seed=1, batch_size=4, levels=levels)
    assert order.steps_before(2) == 10
    for step in (7, 2, 10, 1):  # in any order of asking
        epoch, indices = order.step(step)
        assert epoch == (step - 1) // 5
        assert sorted(Counter((indices // 2).tolist()).values()) == [2, 2]
    repeats = np.where(np.arange(20) < 10, 1.5, 1.0)
    repeated = StepOrder(np.arange(20), repeats, seed=1, batch_size=4, levels=levels)
    assert repeated.steps_before(1) == 7
    assert sum(len(repeated.step(step)[1]) for step in range(1, 8)) == 25


def test_a_hundred_thousand_rows_take_seconds() -> None:
    rng = np.random.default_rng(0)
    family_of_row = np.where(rng.random(100_000) < 0.5, rng.integers(0, 8000, 100_000), -1)
    started = time.process_time()
    order = grouped_order(np.arange(100_000), family_of_row[:, None], seed=0, epoch=0, batch_size=64)
    assert time.process_time() - started < 5
    assert len(np.unique(order)) == 100_000


@pytest.mark.parametrize("num_rows", [300])
def test_finding_families_does_not_compare_every_pair(num_rows: int) -> None:
    prompt = list(range(2000))
    found = levels_of([[*prompt, *range(5000 + 50 * row, 5050 + 50 * row)] for row in range(num_rows)])
    assert {tuple(row) for row in found} == {(0,)}
