"""The tally holds sums in place of examples, and says what all examples at once would say."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from goldsmith.scoring.tally import ScoreTally
from goldsmith.statistics import ExactSum, Interval, bootstrap_ratios
from goldsmith.types import TokenScores


def some_scores(count: int, *, without: bool = False) -> Iterator[tuple[int, TokenScores]]:
    """(row, score); every third row has two parts."""
    generator = np.random.default_rng(0)
    row = -1
    for number in range(count):
        row += number % 4 != 3
        log_prob, bare = -generator.random(2) * 9
        yield (
            row,
            TokenScores(
                example_id=f"e{number}",
                source=f"f:{row}",
                source_name="laws" if row % 5 else "maths",
                log_prob=log_prob,
                num_target_tokens=1 + number % 30,
                num_bytes=1 + number % 7,
                weighted_log_prob=log_prob / 2,
                weight_sum=0.5 + number % 3,
                log_prob_without_context=bare if without else None,
            ),
        )


@pytest.mark.parametrize("most_blocks", [20_000, 50])
def test_figures_are_those_of_all_rows_at_once(monkeypatch: pytest.MonkeyPatch, most_blocks: int) -> None:
    monkeypatch.setattr("goldsmith.statistics._MOST_BLOCKS", most_blocks)
    scores = list(some_scores(400, without=True))
    num_rows = scores[-1][0] + 1
    tally = ScoreTally(num_rows)
    for row, score in scores:
        tally.add(score, row=row)
    summary = tally.summary(num_resamples=100)

    def plain(top: list[float], bottom: list[float], at: list[int] | None = None) -> Interval:
        tops, bottoms = np.zeros((num_rows, 1)), np.zeros((num_rows, 1))
        for place in range(len(scores)) if at is None else at:
            tops[scores[place][0]] += top[place]
            bottoms[scores[place][0]] += bottom[place]
        return bootstrap_ratios(tops, bottoms, num_resamples=100)[0]

    nll = [-score.log_prob for _, score in scores]
    counts = [float(score.num_target_tokens) for _, score in scores]
    ones = [1.0] * len(scores)
    ratios = [
        math.exp(((score.log_prob_without_context or 0) - score.log_prob) / score.num_target_tokens)
        for _, score in scores
    ]
    expected = {
        "nll_per_token": plain(nll, counts),
        "nll_per_example": plain(nll, ones),
        "bits_per_byte": plain(nll, [score.num_bytes * math.log(2) for _, score in scores]),
        "weighted_nll": plain([value / 2 for value in nll], [score.weight_sum or 0 for _, score in scores]),
    }
    found = {name: getattr(summary, name) for name in expected}
    assert summary.difficulty is not None
    expected |= {"mean": plain(ratios, ones), "above": plain([float(ratio > 1) for ratio in ratios], ones)}
    found |= {"mean": summary.difficulty.mean, "above": summary.difficulty.share_above_one}
    for group in summary.groups:
        if group.by == "source":
            at = [place for place, (_, score) in enumerate(scores) if score.source_name == group.label]
            expected[group.label], found[group.label] = plain(nll, counts, at), group.nll_per_token
            assert group.num_examples == len(at)
            assert group.log_prob == math.fsum(-nll[place] for place in at)
    assert {"laws", "maths"} <= found.keys()
    for name, interval in expected.items():
        for bound in ("estimate", "low", "high"):
            assert getattr(found[name], bound) == pytest.approx(getattr(interval, bound), rel=1e-12), name
    assert summary.log_prob == math.fsum(-value for value in nll)
    assert summary.difficulty.quantiles[2] == pytest.approx(np.median(ratios))
    # Asked again it says the same, to the bit.
    assert tally.summary(num_resamples=100) == summary


@pytest.mark.parametrize(("without", "bytes_an_example"), [(False, 0), (True, 10)])
def test_memory_does_not_grow_with_the_examples(
    monkeypatch: pytest.MonkeyPatch, without: bool, bytes_an_example: int
) -> None:
    monkeypatch.setattr("goldsmith.statistics._MOST_BLOCKS", 100)
    tally = ScoreTally(20_000)
    held = []
    tracemalloc.start()
    try:
        for number, (row, score) in enumerate(some_scores(12_001, without=without)):
            tally.add(score, row=row)
            if number in (2_000, 12_000):
                held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert (held[1] - held[0]) / 10_000 <= bytes_an_example + 0.2


def test_what_one_row_has_alone_has_no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("goldsmith.statistics._MOST_BLOCKS", 10)
    tally = ScoreTally(60)
    for number in range(60):
        name = "rare" if number in (4, 5) else "often"
        score = TokenScores(
            example_id=str(number), source="f", source_name=name, log_prob=-1.0, num_target_tokens=2, num_bytes=1
        )
        # The two rare ones are of one row.
        tally.add(score, row=4 if number == 5 else number)
    groups = {group.label: group.nll_per_token for group in tally.summary().groups if group.by == "source"}
    assert groups["often"].is_known
    assert not groups["rare"].is_known


def test_a_sum_is_rounded_once() -> None:
    generator = np.random.default_rng(0)
    terms = [*(generator.standard_normal(500) * 10.0 ** generator.integers(-320, 300, size=500)), 5e-324, -0.0, 0.0]
    total = ExactSum()
    for term in terms:
        total.add(float(term))
    assert total.value == math.fsum(terms)
    assert ExactSum().value == 0.0
    with pytest.raises((ValueError, OverflowError)):
        total.add(math.nan)
