"""Two models on the same gold: the case worked by hand, what is counted, what is refused, and how it reads."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from goldsmith.errors import ConfigError, DataError
from goldsmith.scoring.compare import Comparison, scores_from_probabilities
from goldsmith.scoring.ranking import compare
from goldsmith.types import TokenScores

NEW_YORK_A = scores_from_probabilities({"New York": [("New", 0.6), (" York", 0.8)]})
NEW_YORK_B = scores_from_probabilities({"New York": [("New", 0.9), (" York", 0.4)]})


def scores(**log_probs: float) -> list[TokenScores]:
    return [
        TokenScores(example_id=name, source="", log_prob=value, num_target_tokens=2, num_bytes=3)
        for name, value in log_probs.items()
    ]


def random_scores(count: int, *, seed: int, shift: float = 0.0) -> list[TokenScores]:
    hard, own = np.random.default_rng(0), np.random.default_rng(seed)
    examples = {}
    for index in range(count):
        base = hard.random(int(hard.integers(2, 9)))
        examples[f"eval:{index}"] = np.clip(base + 0.2 * own.normal(size=len(base)) + shift, 0.01, 1).tolist()
    return list(scores_from_probabilities(examples))


def test_new_york_by_hand() -> None:
    comparison = compare(NEW_YORK_A, NEW_YORK_B)
    assert comparison.probabilities == pytest.approx((0.48, 0.36))
    assert comparison.log_probs == pytest.approx((math.log(0.48), math.log(0.36)))
    assert comparison.mean_nll == pytest.approx((-math.log(0.48) / 2, -math.log(0.36) / 2))
    assert comparison.bits_per_byte == pytest.approx((-math.log2(0.48) / 8, -math.log2(0.36) / 8))
    assert comparison.higher == "A"
    assert (comparison.wins, comparison.ties, comparison.losses) == (1, 0, 0)
    assert comparison.starts == (0, 1)
    assert comparison.comebacks == (1, 0)


def test_new_york_can_be_read() -> None:
    assert str(compare(NEW_YORK_A, NEW_YORK_B)) == (
        "A and B on the gold of 'New York'\n"
        "\n"
        "                               A         B\n"
        "P(token 1)  'New'            0.6       0.9\n"
        "P(token 2)  ' York'          0.8       0.4\n"
        "P(gold), their product      0.48      0.36\n"
        "log P(gold)              -0.7340   -1.0217\n"
        "mean nll per token        0.3670    0.5108\n"
        "bits per byte             0.1324    0.1842\n"
        "\n"
        "A gives the gold the higher likelihood, 1.333 times that of B, though B starts better "
        "(0.9 against 0.6 on the first token)."
    )


def test_who_wins_does_not_depend_on_the_side() -> None:
    swapped = compare(NEW_YORK_B, NEW_YORK_A, names=("B", "A"))
    assert swapped.higher == "A"
    assert swapped.comebacks == (0, 1)
    assert "A gives the gold the higher likelihood" in str(swapped)
    assert "though B starts better (0.9 against 0.6" in str(swapped)


def test_a_single_score_may_stand_without_a_list() -> None:
    assert compare(NEW_YORK_A[0], NEW_YORK_B[0]).higher == "A"


def test_the_swapped_comparison_is_the_mirror_image() -> None:
    a, b = random_scores(40, seed=1), random_scores(40, seed=2, shift=0.05)
    there, back = compare(a, b), compare(list(reversed(b)), a)
    assert there.mean_difference.estimate == pytest.approx(-back.mean_difference.estimate)
    assert there.mean_difference.low == pytest.approx(-back.mean_difference.high)
    assert (there.wins, there.ties, there.losses) == (back.losses, back.ties, back.wins)
    assert there.comebacks == back.comebacks[::-1]


def test_a_model_against_itself_is_a_tie_everywhere() -> None:
    own = random_scores(30, seed=1)
    comparison = compare(own, own)
    assert comparison.higher is None
    assert (comparison.wins, comparison.ties, comparison.losses) == (0, 30, 0)
    assert comparison.mean_difference.low == comparison.mean_difference.high == 0
    assert "the same likelihood" in str(comparison)
    assert "furthest ahead" not in str(comparison)


def test_ids_that_only_one_has_are_counted_and_left_out() -> None:
    comparison = compare(scores(x=-1.0, y=-2.0, z=-50.0), scores(y=-2.5, x=-1.5, w=-9.0, v=-9.0))
    assert (comparison.num_shared, comparison.num_only_a, comparison.num_only_b) == (2, 1, 2)
    assert comparison.log_probs == (-3.0, -4.0)
    assert "left out: 1 example only in A, 2 only in B" in str(comparison)
    assert "left out: 1 example only in A, 2 only in B" in comparison._repr_html_()


def test_nothing_shared_is_an_error_that_shows_ids_of_both() -> None:
    with pytest.raises(DataError, match=r"share no example: 1 ids such as 'x' against 1 such as 'train:0'"):
        compare(scores(x=-1.0), scores(**{"train:0": -1.0}))


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(DataError, match=r"A: no example was scored"):
        compare([], scores(x=-1.0))
    with pytest.raises(DataError, match=r"B: example 'x' is scored twice"):
        compare(scores(x=-1.0), [*scores(x=-1.0), *scores(x=-1.0)])
    with pytest.raises(DataError, match=r"A: example 'x': log_prob is nan"):
        compare(scores(x=math.nan), scores(x=-1.0))
    with pytest.raises(ConfigError, match="both are called 'm'"):
        compare(NEW_YORK_A, NEW_YORK_B, names=("m", "m"))


@pytest.mark.parametrize("probability", [0.0, -0.1, 1.5, math.nan])
def test_probabilities_must_be_probabilities(probability: float) -> None:
    with pytest.raises(DataError, match=r"'x': the probability .* is not in \(0, 1\]"):
        scores_from_probabilities({"x": [0.5, probability]})


def test_probabilities_of_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="no gold token"):
        scores_from_probabilities({"x": []})
    with pytest.raises(DataError, match="no example"):
        scores_from_probabilities({})


def test_ten_thousand_examples_read_in_one_screen() -> None:
    a, b = random_scores(10_000, seed=1), random_scores(10_000, seed=2, shift=0.02)
    comparison = compare(a, b, names=("base", "tuned"))
    text = str(comparison)
    assert len(text.splitlines()) < 42
    assert max(map(len, text.splitlines())) < 140
    assert comparison.higher == "tuned"
    assert comparison.is_clear
    assert comparison.mean_difference.low < comparison.mean_difference.estimate < comparison.mean_difference.high < 0
    for part in ("10,000 examples", "paired bootstrap", "starts worse but wins", "furthest ahead: tuned", "tie"):
        assert part in text
    assert comparison.wins + comparison.ties + comparison.losses == 10_000


def test_the_largest_differences_are_the_largest() -> None:
    a, b = scores(p=-1.0, q=-5.0, r=-2.0), scores(p=-4.0, q=-1.0, r=-2.5)
    for_a, for_b = compare(a, b).largest()
    assert [pair.example_id for pair in for_a] == ["p", "r"]
    assert [pair.example_id for pair in for_b] == ["q"]


def test_an_interval_that_holds_zero_is_said() -> None:
    generator = np.random.default_rng(3)
    names = [f"e{index}" for index in range(60)]
    a = scores(**dict(zip(names, -5 - generator.random(60), strict=True)))
    b = scores(**dict(zip(names, -5 - generator.random(60), strict=True)))
    comparison = compare(a, b)
    assert comparison.is_clear is False
    assert "do not settle it" in str(comparison)


def test_few_examples_are_said_to_be_few() -> None:
    assert "likely too narrow" in str(compare(scores(x=-1.0, y=-2.0), scores(x=-2.0, y=-2.5)))


def test_parts_of_a_row_are_drawn_together() -> None:
    def turns(values: np.ndarray, *, source: bool) -> list[TokenScores]:
        return [
            TokenScores(
                example_id=f"row{row}@{turn}",
                source=f"eval.jsonl:{row + 1}" if source else "",
                log_prob=float(value),
                num_target_tokens=1,
                num_bytes=1,
            )
            for row, value in enumerate(values)
            for turn in range(8)
        ]

    generator = np.random.default_rng(4)
    a, b = -5 - generator.random(20), -5 - generator.random(20)
    alone = compare(turns(a, source=False), turns(b, source=False)).mean_difference
    together = compare(turns(a, source=True), turns(b, source=True)).mean_difference
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_gold_cut_into_other_tokens_is_compared_by_the_whole_only() -> None:
    a = scores_from_probabilities({"x": [("New", 0.6), (" York", 0.8)], "y": [("a", 0.5)]})
    b = scores_from_probabilities({"x": [("New York", 0.4)], "y": [("a", 0.5)]})
    comparison = compare(a, b)
    assert comparison.num_differently_tokenized == 1
    assert comparison.num_starts_known == 1
    assert "tokenised differently on 1 example" in str(comparison)


def test_gold_of_other_lengths_is_told() -> None:
    a = scores_from_probabilities({"x": [("yes", 0.6)]})
    b = scores_from_probabilities({"x": [("no", 0.4)]})
    assert "careful: the gold differs in byte length on 1 example" in str(compare(a, b))


def test_long_gold_shows_the_tokens_that_differ_most() -> None:
    a = scores_from_probabilities({"x": [0.5] * 400 + [0.9]})
    b = scores_from_probabilities({"x": [0.5] * 400 + [0.1]})
    text = str(compare(a, b))
    assert "the 24 of 401 tokens that differ most" in text
    assert "P(token 401)" in text
    assert len(text.splitlines()) < 40


def test_probabilities_below_the_smallest_float_can_be_read() -> None:
    text = str(compare(scores(x=-5000.0), scores(x=-9000.0)))
    assert "e-2172" in text  # exp(-5000) = 3.370e-2172
    assert "e^4000 times that of B" in text


def test_json_holds_every_figure() -> None:
    values = json.loads(json.dumps(compare(NEW_YORK_A, NEW_YORK_B).to_json(), allow_nan=False))
    assert values["higher"] == "A"
    assert values["comebacks"] == [1, 0]
    assert values["mean_difference"]["low"] is None


def test_files_are_called_by_stem_or_else_by_path(tmp_path: Path) -> None:
    for folder, name in (("one", "a"), ("one", "b"), ("two", "a")):
        path = tmp_path / folder / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"example_id": "x", "log_prob": -1.0}\n')

    def names(comparison: Comparison) -> tuple[str, str]:
        return comparison.names

    assert names(compare(tmp_path / "one/a.jsonl", tmp_path / "one/b.jsonl")) == ("a", "b")
    same_stem = compare(tmp_path / "one/a.jsonl", tmp_path / "two/a.jsonl")
    assert names(same_stem) == (str(tmp_path / "one/a.jsonl"), str(tmp_path / "two/a.jsonl"))


def test_the_files_of_the_example_are_the_case_worked_by_hand() -> None:
    folder = Path(__file__).parents[3] / "examples" / "new_york"
    comparison = compare(folder / "a.jsonl", folder / "b.jsonl")
    assert comparison.probabilities == pytest.approx((0.48, 0.36))
    assert (
        str(comparison).splitlines()[1:-1]
        == str(compare(NEW_YORK_A, NEW_YORK_B)).replace("   A         B", "   a         b").splitlines()[1:-1]
    )


# --- groups, tokens, the sign test


def test_by_position_the_first_token_is_lost_and_the_second_wins() -> None:
    """The case of the README in several examples: what each position adds, and they sum to the whole."""
    a = scores_from_probabilities({f"e{i}": [("New", 0.6), (" York", 0.8)] for i in range(3)})
    b = scores_from_probabilities({f"e{i}": [("New", 0.9), (" York", 0.4)] for i in range(3)})
    comparison = compare(a, b)
    first, second = comparison.groups
    assert (first.by, first.label, second.label) == ("position", "1", "2-4")
    assert first.difference.estimate == pytest.approx(math.log(0.6 / 0.9))
    assert second.difference.estimate == pytest.approx(math.log(0.8 / 0.4))
    assert comparison.mean_difference.estimate == pytest.approx(math.log(0.48 / 0.36))
    assert (first.wins, first.losses, second.wins, second.losses) == (0, 3, 3, 0)
    assert comparison.higher == "A"
    text = str(comparison)
    assert "by position in gold" in text
    assert "though B starts better on more examples" in text


def test_by_source_is_over_the_examples_of_the_source() -> None:
    def rows(*values: float) -> list[TokenScores]:
        return [
            TokenScores(
                example_id=str(place), source="", source_name=name, log_prob=value, num_target_tokens=1, num_bytes=1
            )
            for place, (name, value) in enumerate(zip(["x", "x", "y"], values, strict=True))
        ]

    x, y = compare(rows(-1.0, -2.0, -3.0), rows(-2.0, -4.0, -1.0)).groups
    assert (x.label, x.num_examples, x.difference.estimate, x.wins) == ("x", 2, 1.5, 2)
    assert (y.label, y.num_examples, y.difference.estimate, y.losses) == ("y", 1, -2.0, 1)


def test_the_tokens_that_differ_most_come_first() -> None:
    a = scores_from_probabilities({"x": [("a", 0.5), ("b", 0.9)], "y": [("c", 0.2)]})
    b = scores_from_probabilities({"x": [("a", 0.4), ("b", 0.1)], "y": [("c", 0.8)]})
    tokens = compare(a, b).largest_tokens()
    assert [(token.text, token.position) for token in tokens] == [("b", 2), ("c", 1), ("a", 1)]
    assert tokens[0].difference == pytest.approx(math.log(9))


def test_the_sign_test_counts_rows_and_no_ties() -> None:
    a = scores(**{f"e{i}": -1.0 for i in range(10)})
    b = scores(**{f"e{i}": (-2.0 if i < 9 else -0.5) for i in range(10)})
    assert compare(a, b).sign_p == pytest.approx(22 / 1024)
    assert compare(a, a).sign_p == 1.0


def test_a_chance_below_what_a_float_holds_is_not_shown_as_none() -> None:
    worse, better = (
        [
            TokenScores(example_id=str(n), source="", log_prob=value, num_target_tokens=1, num_bytes=1)
            for n in range(1200)
        ]
        for value in (-2.0, -1.0)
    )
    assert "sign test: p < 2e-308" in str(compare(worse, better))


def test_other_tokens_are_never_compared_per_token() -> None:
    a = scores_from_probabilities({"x": [("New", 0.6), (" York", 0.8)], "y": [("ab", 0.5), ("c", 0.5)]})
    b = scores_from_probabilities({"x": [("New York", 0.4)], "y": [("a", 0.5), ("bc", 0.5)]})
    comparison = compare(a, b)
    assert comparison.num_differently_tokenized == 2  # `y` has as many tokens, but others
    assert comparison.mean_nll is None
    assert comparison.bits_per_byte is not None
    assert comparison.groups == ()
    text = str(comparison)
    assert "compared in nats per example and bits per byte, never per token" in text
    assert "nll per token" not in text


def test_a_comparison_as_a_data_frame_and_as_html() -> None:
    comparison = compare(scores(x=-1.0, y=-2.0), scores(x=-2.0, y=-2.0), names=("<a>", "b"))
    frame = comparison.to_pandas()
    assert frame["example_id"].tolist() == ["x", "y"]
    assert frame["difference"].tolist() == [1.0, 0.0]
    assert "&lt;a&gt; - b" in comparison._repr_html_()
    assert "<a>" not in comparison._repr_html_()


def test_gold_after_other_contexts_is_told() -> None:
    a, b = scores(x=-1.0, y=-2.0), scores(x=-2.0, y=-2.0)
    with_contexts = [
        [replace(one, context=f"{one.example_id}{end}") for one in own] for own, end in ((a, ""), (b, "\n"))
    ]
    assert compare(*with_contexts).num_other_contexts == 2
    assert "careful: the context differs on 2 examples" in str(compare(*with_contexts))
    assert compare(with_contexts[0], b).num_other_contexts == 0


# --- more than two


def test_three_models_are_ranked_and_every_pair_is_tested() -> None:
    good, same, bad = (random_scores(60, seed=seed, shift=shift) for seed, shift in ((1, 0.2), (2, 0.2), (3, -0.2)))
    ranking = compare(bad, good, same, names=("bad", "good", "same"))
    assert ranking.names[2] == "bad"
    assert ranking.num_shared == 60
    by_pair = {(test.higher, test.lower): test for test in ranking.tests}
    assert len(by_pair) == 3
    for model in ranking.models:
        interval = model.log_prob_per_example
        assert interval.estimate == pytest.approx(model.log_prob / 60)
        assert interval.low < interval.estimate < interval.high
    close = by_pair[ranking.names[0], ranking.names[1]]
    assert not close.is_clear
    for name in ranking.names[:2]:
        test = by_pair[name, "bad"]
        assert test.is_clear
        assert test.p_corrected == pytest.approx(3 * test.p_value)  # the least of three, and a tie with it
        pair = compare(*({"bad": bad, "good": good, "same": same}[key] for key in (name, "bad")))
        assert test.difference.estimate == pytest.approx(pair.mean_difference.estimate)
        assert test.difference.low == pytest.approx(pair.mean_difference.low)
    text = str(ranking)
    assert "3 models on 60 examples" in text
    assert "not settled" in text
    assert json.loads(json.dumps(ranking.to_json()))["models"][2]["name"] == "bad"
    assert ranking.to_pandas()["name"].tolist() == list(ranking.names)
    assert "bad" in ranking._repr_html_()


def test_a_ranking_counts_what_it_leaves_out() -> None:
    ranking = compare(scores(x=-1.0, y=-2.0), scores(y=-2.5, z=-1.5), scores(y=-9.0))
    assert ranking.num_shared == 1
    assert ranking.num_left_out == {"A": 1, "B": 1, "C": 0}
    assert "left out, as not all have scored them: 1 of A, 1 of B" in str(ranking)
    assert "left out, as not all have scored them: 1 of A, 1 of B" in ranking._repr_html_()
    with pytest.raises(DataError, match="no example that all have scored"):
        compare(scores(x=-1.0), scores(x=-1.0), scores(y=-1.0))
    with pytest.raises(ConfigError, match="2 names"):
        compare(scores(x=-1.0), scores(x=-1.0), scores(x=-1.0), names=("a", "b"))


def test_a_ranking_of_other_tokenizers_has_no_figure_per_token() -> None:
    a = scores_from_probabilities({"x": [("New York", 0.4)], "y": [("a", 0.5)]})
    b = scores_from_probabilities({"x": [("New", 0.6), (" York", 0.8)], "y": [("a", 0.5)]})
    ranking = compare(a, b, a[:1] + b[1:])
    assert ranking.num_differently_tokenized == 1
    assert all(model.nll_per_token is None and model.bits_per_byte is not None for model in ranking.models)
    assert "never per token" in str(ranking)


def test_a_folder_is_no_score_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder, not a score file"):
        compare(tmp_path, tmp_path, names=("a", "b"))
