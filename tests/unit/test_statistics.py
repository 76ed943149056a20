"""Intervals and edit distance against plain versions of the same."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goldsmith.statistics import (
    Interval,
    bootstrap_interval,
    bootstrap_ratio,
    bootstrap_ratios,
    edit_distance,
    group_totals,
    holm,
    paired_bootstrap,
    sign_flip_test,
    sign_test,
)


def plain_edit_distance(a: Sequence[object], b: Sequence[object]) -> int:
    """The textbook table, one row at a time."""
    above = list(range(len(b) + 1))
    for i, item in enumerate(a, start=1):
        row = [i]
        for j, other in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (item != other)))
        above = row
    return above[-1]


@settings(max_examples=300, deadline=None)
@given(st.text("abc", max_size=90), st.text("abc", max_size=90))
def test_edit_distance_equals_the_textbook_table(a: str, b: str) -> None:
    assert edit_distance(a, b) == plain_edit_distance(a, b)


@given(st.lists(st.sampled_from(["HH", "AH", "L", 3, (1, 2)]), max_size=12), st.lists(st.integers(0, 4), max_size=12))
def test_edit_distance_takes_any_hashable(a: list[object], b: list[int]) -> None:
    assert edit_distance(a, b) == plain_edit_distance(a, b) == edit_distance(b, a)


def test_edit_distance_of_arrays_and_lists_is_the_same() -> None:
    assert edit_distance(np.array([1, 2, 3], dtype=np.int32), [1, 3]) == 1


def test_edit_distance_is_fast_on_long_texts() -> None:
    generator = np.random.default_rng(0)
    words_a, words_b = generator.integers(500, size=(2, 2000)).tolist()
    started = time.perf_counter()
    edit_distance(words_a, words_b)
    assert time.perf_counter() - started < 1.0  # about 0.01 s; the textbook table takes seconds
    texts = ["".join(row) for row in generator.choice(list("abcdefghij "), size=(60, 1000))]
    started = time.perf_counter()
    for a, b in zip(texts[::2], texts[1::2], strict=True):
        edit_distance(a, b)
    assert time.perf_counter() - started < 1.0  # 30 of 1,000 pairs


def test_bootstrap_covers_the_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        interval = bootstrap_interval(generator.normal(2.0, 1.0, size=60), num_resamples=300, seed=trial)
        hits += interval.low <= 2.0 <= interval.high
    assert 175 <= hits <= 199


def test_bootstrap_is_the_same_for_the_same_seed_only() -> None:
    values = np.random.default_rng(2).normal(size=50)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_bootstrap_does_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    tops, bottoms = np.arange(1.0, 11.0), np.arange(11.0, 21.0)
    whole = bootstrap_ratio(tops, bottoms)
    monkeypatch.setattr("goldsmith.statistics._DRAWS_PER_CHUNK", 70)
    assert bootstrap_ratio(tops, bottoms) == whole


def test_blocks_of_a_large_set_give_the_same_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(5)
    tops, bottoms = generator.exponential(size=6000), generator.integers(1, 9, size=6000)
    whole = bootstrap_ratio(tops, bottoms)
    monkeypatch.setattr("goldsmith.statistics._MOST_BLOCKS", 1000)
    blocks = bootstrap_ratio(tops, bottoms)
    assert blocks.estimate == whole.estimate
    assert blocks.high - blocks.low == pytest.approx(whole.high - whole.low, rel=0.15)


def test_ratio_is_one_division_of_two_sums() -> None:
    interval = bootstrap_ratio([1.0, 30.0], [1.0, 10.0])
    assert interval.estimate == 31 / 11  # the mean of the two means would be 2.0
    assert 1.0 <= interval.low < interval.estimate < interval.high <= 3.0


def test_one_value_has_no_interval_and_none_is_an_error() -> None:
    alone = bootstrap_interval([4.0])
    assert alone.estimate == 4.0
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)
    assert not alone.is_known
    assert alone.to_json()["low"] is None
    with pytest.raises(ValueError, match="no values"):
        bootstrap_interval([])


@pytest.mark.parametrize(
    ("tops", "bottoms", "told"),
    [
        ([math.nan], [1.0], "not finite"),
        ([1.0, 2.0], [1.0], "one length"),
        ([1.0], [0.0], "sum to more than 0"),
        ([1.0, 1.0], [2.0, -1.0], "sum to more than 0"),
    ],
)
def test_bad_input_is_told(tops: list[float], bottoms: list[float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        bootstrap_ratio(tops, bottoms)


def test_paired_bootstrap_cancels_what_is_hard_for_both() -> None:
    generator = np.random.default_rng(3)
    hardness = generator.normal(scale=50.0, size=200)
    a, b = hardness + 0.5, hardness + generator.normal(scale=0.1, size=200)
    paired = paired_bootstrap(a, b)
    assert 0.4 < paired.low < paired.high < 0.6
    swapped = paired_bootstrap(b, a)
    assert swapped.low == pytest.approx(-paired.high)
    assert swapped.high == pytest.approx(-paired.low)


def test_grouped_examples_are_drawn_together() -> None:
    generator = np.random.default_rng(4)
    per_group = generator.normal(size=20)
    groups = np.repeat(np.arange(20), 10)
    differences = per_group[groups]  # ten copies of the same news
    alone = paired_bootstrap(differences, np.zeros(200))
    grouped = paired_bootstrap(differences, np.zeros(200), groups=groups)
    assert grouped.estimate == pytest.approx(alone.estimate)
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)


def test_group_totals_take_labels_of_any_kind() -> None:
    assert group_totals(["b", "a", "b"], [1.0, 2.0, 4.0]).tolist() == [2.0, 5.0]


def test_scaling_by_a_negative_factor_keeps_low_below_high() -> None:
    assert Interval(estimate=-2.0, low=-3.0, high=-1.0).scaled(-1.0) == Interval(estimate=2.0, low=1.0, high=3.0)


@pytest.mark.parametrize("size", [2, 37, 20_001])
def test_figures_together_have_the_intervals_that_each_has_alone(size: int) -> None:
    generator = np.random.default_rng(5)
    tops, bottoms = generator.random((size, 3)), generator.integers(1, 9, size=(size, 3)).astype(float)
    together = bootstrap_ratios(tops, bottoms, num_resamples=200)
    for figure, interval in enumerate(together):
        alone = bootstrap_ratio(tops[:, figure], bottoms[:, figure], num_resamples=200)
        assert interval.estimate == pytest.approx(alone.estimate, rel=1e-12)
        assert interval.low == pytest.approx(alone.low, rel=1e-9)
        assert interval.high == pytest.approx(alone.high, rel=1e-9)


def test_a_figure_of_one_example_has_no_interval_beside_others_that_have() -> None:
    tops = np.array([[1.0, 2.0], [3.0, 0.0], [2.0, 0.0]])
    bottoms = np.array([[1.0, 4.0], [1.0, 0.0], [1.0, 0.0]])
    whole, single = bootstrap_ratios(tops, bottoms, num_resamples=100)
    assert whole.is_known
    assert not single.is_known
    assert single.estimate == 0.5


@pytest.mark.parametrize(
    ("tops", "bottoms", "told"),
    [
        (np.ones((2, 2)), np.ones((2, 1)), "one shape"),
        (np.ones((0, 2)), np.ones((0, 2)), "one shape"),
        (np.full((2, 1), np.inf), np.ones((2, 1)), "not finite"),
        (np.ones((2, 2)), np.array([[1.0, 0.0], [1.0, 0.0]]), "sum to more than 0"),
    ],
)
def test_bad_figures_are_told(tops: np.ndarray, bottoms: np.ndarray, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        bootstrap_ratios(tops, bottoms)


@given(st.integers(0, 40), st.integers(0, 40))
def test_the_sign_test_is_the_binomial_tail(wins: int, losses: int) -> None:
    total = wins + losses
    tail = sum(math.comb(total, k) for k in range(min(wins, losses) + 1)) / 2**total
    assert sign_test(wins, losses) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


def test_the_sign_test_of_a_million() -> None:
    assert sign_test(500_000, 500_000) == 1.0
    assert sign_test(503_000, 497_000) == pytest.approx(1.97e-9, rel=0.02)  # 6 standard deviations
    with pytest.raises(ValueError, match="negative"):
        sign_test(-1, 2)


def test_flipping_signs_gives_the_share_of_all_flips() -> None:
    values = np.array([3.0, 1.0, 2.0, -0.5, 1.5, 0.25])
    flips = [np.dot(values, [1 - 2 * (mask >> i & 1) for i in range(6)]) for mask in range(64)]
    exact = np.mean(np.abs(flips) >= abs(values.sum()) - 1e-9)
    assert sign_flip_test(values, num_resamples=20_000) == pytest.approx(exact, abs=0.01)


def test_flipping_signs_of_nothing_and_of_noise() -> None:
    with pytest.raises(ValueError, match="vector"):
        sign_flip_test([])
    with pytest.raises(ValueError, match="not finite"):
        sign_flip_test([math.nan])
    assert sign_flip_test([0.0, 0.0]) == 1.0
    generator = np.random.default_rng(0)
    assert sign_flip_test(generator.normal(0.0, 1.0, 25_000), num_resamples=300) > 0.05
    assert sign_flip_test(generator.normal(0.1, 1.0, 25_000), num_resamples=300) == 1 / 301


def test_holm_by_hand() -> None:
    assert holm([0.005, 0.011, 0.02, 0.04, 0.13]) == pytest.approx([0.025, 0.044, 0.06, 0.08, 0.13])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
