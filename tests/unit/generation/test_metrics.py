"""Exact matches and edit rates, also with several right answers."""

from __future__ import annotations

import itertools

import pytest

from goldsmith.errors import DataError
from goldsmith.generation.metrics import fewest_edits, measure, measure_example


def test_the_nearest_variant_counts_and_its_length_divides() -> None:
    said = ["T", "AH", "M", "AA", "T"]
    found = fewest_edits(said, [["T", "AH", "M", "EY", "T", "OW", "Z"], ["T", "AH", "M", "AA", "T", "OW"]])
    assert (found.edits, found.reference_length, found.variant) == (1, 6, 1)


def test_of_equally_near_variants_the_longest_counts_in_any_order() -> None:
    variants = ["ab", "abcd", "abd"]
    for order in itertools.permutations(variants):
        found = fewest_edits("abc", order)
        assert (found.edits, found.reference_length) == (1, 4)


def test_a_rate_is_one_division() -> None:
    metrics = measure([measure_example("a x", "a b"), measure_example("one two", "one two three four five six seven")])
    assert metrics.word_edit_rate.estimate == 6 / 9
    assert metrics.character_edit_rate.estimate == (1 + 26) / (3 + 33)
    assert metrics.exact_match.estimate == 0.0


def test_exact_match_takes_any_right_answer_character_for_character() -> None:
    examples = [measure_example("yes", ["no", "yes"]), measure_example("yes ", "yes"), measure_example("", "yes")]
    metrics = measure(examples)
    assert metrics.num_exact == 1
    assert metrics.exact_match.estimate == pytest.approx(1 / 3)
    assert examples[2].characters.edits == 3


def test_a_rate_may_exceed_one() -> None:
    assert measure([measure_example("a b c d", "x")]).word_edit_rate.estimate == 4.0


def test_tokens_are_counted_where_a_tokenizer_is_given() -> None:
    examples = [measure_example("abcd", ["abxx", "zz"], tokenize=lambda text: [text[:2], text[2:]])]
    metrics = measure(examples)
    assert metrics.token_edit_rate is not None
    assert metrics.token_edit_rate.estimate == 1 / 2
    assert measure([measure_example("a", "a")]).token_edit_rate is None


def test_nothing_is_an_error_and_not_zero() -> None:
    with pytest.raises(DataError, match="nothing was generated"):
        measure([])
    with pytest.raises(DataError, match="no gold to compare with"):
        measure_example("a", [])
    with pytest.raises(DataError, match="the gold is empty"):
        measure([measure_example("a", "")])


def test_figures_can_be_read() -> None:
    text = str(measure([measure_example("a b", "a b"), measure_example("a c", "a b")]))
    assert "exact match          50.00%  (95% interval 0.00% to 100.00%)  (1 of 2)" in text
    assert "word edit rate       25.00%" in text
