"""Calibration against its definition, written plainly, and on cases whose answer is known."""

from __future__ import annotations

import math

import pytest
from report_examples import sides

from goldsmith.report.calibration import NUM_BINS, calibration
from goldsmith.types import TokenScore, TokenScores


def scores_of(*tokens: TokenScore) -> list[TokenScores]:
    total = math.fsum(token.log_prob for token in tokens)
    return [
        TokenScores(
            example_id="a", source="", log_prob=total, num_target_tokens=len(tokens), num_bytes=1, tokens=tokens
        )
    ]


def place(confidence: float, *, is_right: bool) -> TokenScore:
    """A gold position where the likeliest token has this probability, and is the gold one or not."""
    best = math.log(confidence)
    return TokenScore(
        token_id=1, text="a", log_prob=best if is_right else best - 1.0, rank=1 if is_right else 2, best_log_prob=best
    )


def test_it_is_the_sum_of_its_definition() -> None:
    scores = sides()[1].scores
    tokens = [token for score in scores for token in score.tokens or ()]
    bins: dict[int, list[tuple[float, bool]]] = {}
    for token in tokens:
        assert token.best_log_prob is not None
        confidence = math.exp(token.best_log_prob)
        bins.setdefault(min(int(confidence * NUM_BINS), NUM_BINS - 1), []).append((confidence, token.rank == 1))
    expected = sum(
        len(members)
        / len(tokens)
        * abs(sum(right for _, right in members) / len(members) - sum(c for c, _ in members) / len(members))
        for members in bins.values()
    )
    found = calibration(scores)
    assert found.num_tokens == len(tokens)
    assert found.expected_calibration_error == pytest.approx(expected, rel=1e-12)
    assert sum(found.counts) == len(tokens) == sum(found.gold_histogram)
    for index in range(NUM_BINS):
        members = bins.get(index, [])
        assert found.counts[index] == len(members)
        if members:
            assert found.accuracies[index] == pytest.approx(sum(right for _, right in members) / len(members))
        else:
            assert found.accuracies[index] is None
    assert found.entropy == pytest.approx(math.fsum(token.entropy or 0.0 for token in tokens) / len(tokens))


def test_a_model_that_is_right_as_often_as_it_says_has_no_error() -> None:
    tokens = [place(0.75, is_right=number < 3) for number in range(4)]
    assert calibration(scores_of(*tokens)).expected_calibration_error == pytest.approx(0.0, abs=1e-12)


def test_a_model_that_is_sure_and_wrong_has_all_the_error() -> None:
    found = calibration(scores_of(place(0.9, is_right=False), place(1.0, is_right=False)))
    assert found.expected_calibration_error == pytest.approx(0.95)
    assert found.counts[-1] == 2, "a probability of 1 belongs to the last bin"


def test_without_ranks_there_is_a_histogram_and_no_error() -> None:
    found = calibration(scores_of(TokenScore(token_id=1, text="a", log_prob=math.log(0.05))))
    assert found.expected_calibration_error is None
    assert found.num_tokens == 0
    assert found.gold_histogram == (1, *[0] * 9)
    nothing = calibration([])
    assert nothing.expected_calibration_error is None
    assert sum(nothing.gold_histogram) == 0
