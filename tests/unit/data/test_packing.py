"""Order, cut and pack: every example once, budgets kept, the shift right, no context a target."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goldsmith.data.mixture import copies_in_epoch
from goldsmith.data.packing import epoch_order, pack, plan_microbatches, steps_per_epoch
from goldsmith.types import TokenizedExample


@st.composite
def examples(draw: st.DrawFn, max_size: int = 6) -> list[TokenizedExample]:
    found = []
    for index in range(draw(st.integers(1, max_size))):
        length = draw(st.integers(2, 9))
        weights = [
            0.0,
            *draw(st.lists(st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.0]), min_size=length - 1, max_size=length - 1)),
        ]
        found.append(
            TokenizedExample(
                token_ids=np.array(
                    draw(st.lists(st.integers(0, 99), min_size=length, max_size=length)), dtype=np.int32
                ),
                target_weights=np.array(weights, dtype=np.float32),
                example_id=f"e:{index}",
                example_weight=draw(st.sampled_from([0.5, 1.0, 3.0])),
                source=f"e:{index}",
                num_bytes=3,
            )
        )
    return found


@settings(deadline=None, max_examples=60)
@given(examples(), st.randoms(use_true_random=False))
def test_pack_lists_exactly_the_gold_shifted_by_one(rows: list[TokenizedExample], random: object) -> None:
    indices = list(range(len(rows)))
    random.shuffle(indices)  # type: ignore[attr-defined]
    batch = pack(rows, indices)

    expected = []  # (hidden state's position, id, weight, example), written out token by token
    start = 0
    for place, index in enumerate(indices):
        row = rows[index]
        for t in range(1, row.num_tokens):
            if row.target_weights[t] > 0:
                expected.append((start + t - 1, int(row.token_ids[t]), float(row.target_weights[t]), place))
        start += row.num_tokens
    found = list(
        zip(
            batch.target_positions.tolist(),
            batch.target_ids.tolist(),
            batch.target_weights.tolist(),
            batch.target_example.tolist(),
            strict=True,
        )
    )
    assert found == expected
    assert batch.input_ids.tolist() == [int(t) for index in indices for t in rows[index].token_ids]
    assert batch.position_ids.tolist() == [t for index in indices for t in range(rows[index].num_tokens)]
    assert batch.segment_lengths.tolist() == [rows[index].num_tokens for index in indices]
    assert batch.segment_parents.tolist() == [-1] * len(rows)
    assert batch.example_indices == tuple(indices)
    assert batch.example_weights.tolist() == [rows[index].example_weight for index in indices]
    assert batch.example_weight_sums.tolist() == [rows[index].weight_sum for index in indices]
    # A hidden state only ever predicts the token behind it, in its own example.
    ends = batch.segment_lengths.cumsum(0)
    for position, example in zip(batch.target_positions.tolist(), batch.target_example.tolist(), strict=True):
        assert position + 1 < int(ends[example])


def test_pack_refuses_a_target_at_position_0_and_an_empty_pack() -> None:
    row = TokenizedExample(
        token_ids=np.array([1, 2], dtype=np.int32),
        target_weights=np.array([1.0, 1.0], dtype=np.float32),
        example_id="e",
        example_weight=1.0,
        source="e:1",
        num_bytes=1,
    )
    with pytest.raises(ValueError, match="first token"):
        pack([row], [0])
    with pytest.raises(ValueError, match="at least one"):
        pack([row], [])


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 60))
def test_plan_holds_each_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    plan = plan_microbatches(lengths, budget)
    assert sorted(index for rows in plan for index in rows) == list(range(len(lengths)))
    for rows in plan:
        assert rows == sorted(rows)
        assert sum(lengths[index] for index in rows) <= budget or len(rows) == 1
    assert plan == sorted(plan)
    assert plan == plan_microbatches(np.array(lengths, dtype=np.int64), budget)
    fitting = [length for length in lengths if length <= budget]
    # Best-fit leaves at most one micro-batch half empty.
    assert len(plan) <= len(lengths) - len(fitting) + max(2 * sum(fitting) // budget + 1, 0)


def test_plan_is_even_where_the_budget_allows() -> None:
    plan = plan_microbatches([4, 4, 4, 4, 2, 2], 16)
    assert sorted(sum([4, 4, 4, 4, 2, 2][i] for i in rows) for rows in plan) == [10, 10]
    assert plan_microbatches([], 5) == []
    for lengths, budget in (([0], 5), ([3], 0)):
        with pytest.raises(ValueError, match="at least 1"):
            plan_microbatches(lengths, budget)


def test_plan_of_many_rows_is_near_the_least() -> None:
    lengths = np.random.default_rng(0).integers(5, 400, 5000)
    plan = plan_microbatches(lengths, 4096)
    assert len(plan) <= lengths.sum() / 4096 * 1.01 + 1


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=30), st.integers(0, 2**40), st.integers(0, 100))
def test_order_holds_each_example_once_and_keeps_parts_together(parts: list[int], seed: int, epoch: int) -> None:
    groups = np.repeat(np.arange(len(parts)), parts)
    order = epoch_order(groups, seed=seed, epoch=epoch)
    assert sorted(order.tolist()) == list(range(len(groups)))
    rows_met = groups[order]
    changes = np.flatnonzero(np.diff(rows_met)) + 1
    assert len(changes) == len(parts) - 1  # each row is met in one run
    for run in np.split(order, changes):
        assert run.tolist() == list(range(run[0], run[0] + len(run)))
    assert order.tolist() == epoch_order(groups, seed=seed, epoch=epoch).tolist()


def test_order_depends_on_seed_and_epoch_and_is_frozen() -> None:
    groups = np.arange(50)
    orders = {tuple(epoch_order(groups, seed=seed, epoch=epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    # A change here changes every run that is resumed: it must be meant.
    assert epoch_order(np.arange(8), seed=0, epoch=0).tolist() == FROZEN_ORDER
    assert epoch_order(np.zeros(0, dtype=np.int64), seed=0, epoch=0).tolist() == []


FROZEN_ORDER = [0, 3, 7, 5, 1, 2, 6, 4]


def test_repeats_give_whole_copies_and_a_seeded_fraction() -> None:
    groups = np.repeat(np.arange(100), 2)  # every row has two parts
    repeats = np.where(groups < 40, 2.25, 0.5)
    counts = []
    for epoch in range(3):
        order = epoch_order(groups, seed=1, epoch=epoch, repeats=repeats)
        times = np.bincount(order, minlength=200)
        assert (times[0::2] == times[1::2]).all()  # parts go together
        assert set(times[:80]) == {2, 3}
        assert set(times[80:]) == {0, 1}
        assert times[:80:2].sum() == 40 * 2 + 10
        assert times[80::2].sum() == 30
        counts.append(tuple(times))
    assert len(set(counts)) == 3  # another choice each epoch, of the same number


def test_order_refuses_scattered_parts_and_bad_repeats() -> None:
    with pytest.raises(ValueError, match="decrease"):
        epoch_order(np.array([0, 1, 0]), seed=0, epoch=0)
    with pytest.raises(ValueError, match="shape"):
        epoch_order(np.array([0, 1]), seed=0, epoch=0, repeats=np.ones(3))
    with pytest.raises(ValueError, match="above 0"):
        epoch_order(np.array([0, 1]), seed=0, epoch=0, repeats=np.array([1.0, 0.0]))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=40), st.integers(0, 2**32))
def test_copies_add_up_to_the_rounded_sum(repeats: list[float], seed: int) -> None:
    values = np.array(repeats)
    keys = np.random.default_rng(seed).integers(0, 2**63, len(values)).astype(np.uint64)
    copies = copies_in_epoch(values, keys)
    assert ((copies == np.floor(values)) | (copies == np.floor(values) + 1)).all()
    fractions = float((values - np.floor(values)).sum())
    assert abs(int(copies.sum()) - int(np.floor(values).sum()) - fractions) <= 0.5 + 1e-9


def test_steps_per_epoch_counts_the_smaller_last_step() -> None:
    assert [steps_per_epoch(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    with pytest.raises(ValueError, match="batch_size"):
        steps_per_epoch(3, 0)
