"""The packed data, unpacked again by a plain reader: within the precision that the module states, and nothing lost."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from typing import Any

import pytest
from report_examples import example, sides

from goldsmith.report.payload import ALTERNATIVE_STEPS, ENTROPY_STEPS, LOG_PROB_STEPS, Side, build_payload
from goldsmith.types import TokenScore, TokenScores


def unpacked(payload: bytes) -> tuple[dict[str, Any], list[list[int]]]:
    """The header, and its columns."""
    data = gzip.decompress(payload)
    length = int.from_bytes(data[:4], "little")
    header, place = json.loads(data[4 : 4 + length]), 4 + length
    columns = []
    for count, width in header["columns"]:
        planes = [data[place + plane * count : place + (plane + 1) * count] for plane in range(width)]
        columns.append([sum(planes[plane][index] << (8 * plane) for plane in range(width)) for index in range(count)])
        place += count * width
    assert place == len(data)
    return header, columns


def build(both: list[Side], **keywords: Any) -> tuple[dict[str, Any], list[list[int]]]:
    return unpacked(build_payload(title="t", runs=(), sides=both, **{"max_examples": 1000} | keywords))


def test_every_token_comes_back() -> None:
    both = sides(7)
    header, columns = build(both)
    for place, side in enumerate(both):
        packed = header["sides"][place]
        index = packed["columns"]
        tokens = [token for score in side.scores for token in score.tokens or ()]
        gold = columns[header["sides"][0]["columns"]["gold"]]  # the same on both sides, so written once
        assert packed["gold_from"] == [0] * 7
        assert packed["log_prob"] == [score.log_prob for score in side.scores]
        for at, token in enumerate(tokens):
            assert header["texts"][gold[at]] == token.text
            assert header["token_ids"][gold[at]] == token.token_id
            log_prob = -columns[index["log_prob"]][at] / LOG_PROB_STEPS
            assert log_prob == pytest.approx(token.log_prob, abs=0.51 / LOG_PROB_STEPS)
            assert columns[index["rank"]][at] == token.rank
            best = log_prob + (columns[index["best"]][at] - 1) / LOG_PROB_STEPS
            assert best == pytest.approx(token.best_log_prob, abs=1.01 / LOG_PROB_STEPS)
            assert (columns[index["entropy"]][at] - 1) / ENTROPY_STEPS == pytest.approx(
                token.entropy, abs=0.51 / ENTROPY_STEPS
            )
            below_best = 0
            for slot, (token_id, _, alternative) in enumerate(token.alternatives or ()):
                below_best += columns[index["gaps"][slot]][at]
                code = columns[index["alternatives"][slot]][at]
                assert (code == 1) == (token_id == token.token_id)
                if code != 1:
                    assert header["token_ids"][code - 2] == token_id
                    assert best - below_best / ALTERNATIVE_STEPS == pytest.approx(
                        alternative, abs=0.53 / ALTERNATIVE_STEPS
                    )


def test_the_same_values_give_the_same_bytes() -> None:
    assert build_payload(title="t", runs=(), sides=sides(5), max_examples=9) == build_payload(
        title="t", runs=(), sides=sides(5), max_examples=9
    )


def test_a_pair_is_the_difference_of_what_both_have() -> None:
    before, after = sides(6)
    after = replace(after, scores=after.scores[2:])
    header, _ = build([before, after])
    (pair,) = header["pairs"]
    differences = [b.log_prob - a.log_prob for a, b in zip(before.scores[2:], after.scores, strict=True)]
    assert pair["num_examples"] == 4
    assert pair["mean"]["estimate"] == pytest.approx(sum(differences) / 4)
    assert pair["higher"] == sum(difference > 0 for difference in differences)
    assert header["sides"][1]["log_prob"][:2] == [None, None]
    assert header["sides"][1]["num_tokens"][:2] == [0, 0]


def test_sums_are_over_all_examples_and_tokens_over_the_first() -> None:
    both = sides(8)
    header, columns = build(both, max_examples=3)
    assert header["num_examples"] == 8
    assert header["examples"]["id"] == ["row-0", "row-1", "row-2"]
    assert header["sides"][0]["totals"]["log_prob"] == pytest.approx(sum(score.log_prob for score in both[0].scores))
    assert header["sides"][0]["calibration"]["num_tokens"] == 8 * 12
    assert len(columns[header["sides"][0]["columns"]["log_prob"]]) == 3 * 12


def test_other_tokens_of_the_same_gold_are_kept_apart() -> None:
    one = example(0, 1.0, seed=0)
    whole = TokenScore(token_id=99, text="".join(token.text for token in one.tokens or ()), log_prob=-3.0)
    other = replace(one, tokens=(whole,), num_target_tokens=1, log_prob=-3.0)
    header, columns = build([Side(name="a", scores=[one]), Side(name="b", scores=[other])])
    assert header["sides"][1]["gold_from"] == [1]
    assert header["texts"][columns[header["sides"][1]["columns"]["gold"]][0]] == whole.text
    assert "rank" not in header["sides"][1]["columns"]


def test_a_file_of_sums_only_is_enough() -> None:
    bare = TokenScores(example_id="a\ud800", source="", log_prob=-2.5, num_target_tokens=0, num_bytes=0)
    header, _ = build([Side(name="bare", scores=[bare])])
    assert header["examples"]["id"] == ["a\ud800"], "half a surrogate pair is kept, too"
    assert header["sides"][0]["log_prob"] == [-2.5]
    assert "nll_per_token" not in header["sides"][0]["totals"]


def test_numbers_beyond_four_bytes_end_there() -> None:
    """A weight of ten million, and what some tools write for a probability of 0."""
    far = TokenScore(token_id=1, text="x", log_prob=-3.4e38, weight=1e7, rank=10**12)
    scores = TokenScores(example_id="a", source="", log_prob=-3.4e38, num_target_tokens=1, num_bytes=1, tokens=(far,))
    header, columns = build([Side(name="a", scores=[scores])])
    assert header["sides"][0]["totals"]["log_prob"] == -3.4e38
    index = header["sides"][0]["columns"]
    assert [columns[index[name]] for name in ("log_prob", "weight", "rank")] == [[2**32 - 1]] * 3


def test_numbers_beyond_two_bytes_and_weights_are_kept() -> None:
    far = TokenScore(token_id=1, text="x", log_prob=-400.0, weight=0.25, rank=70_000, best_log_prob=-0.001)
    score = TokenScores(example_id="a", source="", log_prob=-400.0, num_target_tokens=1, num_bytes=1, tokens=(far,))
    header, columns = build([Side(name="a", scores=[score])])
    index = header["sides"][0]["columns"]
    assert columns[index["log_prob"]] == [400 * LOG_PROB_STEPS]
    assert columns[index["rank"]] == [70_000]
    assert columns[index["weight"]] == [250]
