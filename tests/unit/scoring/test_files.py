"""Score files: what is written is read back to the bit, and what is wrong is named by file, line, field and value."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from goldsmith.errors import DataError
from goldsmith.scoring.files import read_scores, score_from_json, score_to_json
from goldsmith.scoring.parquet import write_parquet_rows
from goldsmith.types import GoldTurn, TokenScore, TokenScores

log_probs = st.floats(max_value=0.0, allow_nan=False, allow_infinity=False, min_value=-1e6)
token_scores = st.builds(
    TokenScore,
    token_id=st.integers(-1, 10**6),
    text=st.text(max_size=5),
    log_prob=log_probs,
    weight=st.floats(min_value=0.125, max_value=8, width=32),
    rank=st.none() | st.integers(1, 10**6),
    best_log_prob=st.none() | log_probs,
    entropy=st.none() | st.floats(min_value=0, max_value=20),
    alternatives=st.none()
    | st.lists(st.tuples(st.integers(0, 10**6), st.text(max_size=5), log_probs), max_size=3).map(tuple),
).map(
    # The likeliest token is no less likely than the gold one.
    lambda token: (
        token if token.best_log_prob is None else replace(token, best_log_prob=max(token.best_log_prob, token.log_prob))
    )
)


@st.composite
def any_turns(draw: st.DrawFn, count: int) -> tuple[GoldTurn, ...]:
    begins = sorted({0, *draw(st.lists(st.integers(0, count - 1), max_size=3))})
    numbers = sorted(draw(st.sets(st.integers(1, 99), min_size=len(begins), max_size=len(begins))))
    return tuple(
        GoldTurn(begin=begin, number=number, role=draw(st.text(max_size=3)))
        for begin, number in zip(begins, numbers, strict=True)
    )


@st.composite
def any_scores(draw: st.DrawFn) -> TokenScores:
    tokens = draw(st.none() | st.lists(token_scores, min_size=1, max_size=5).map(tuple))
    num_target_tokens = draw(st.integers(0, 99)) if tokens is None else len(tokens)
    return TokenScores(
        example_id=draw(st.text()),
        source=draw(st.text()),
        source_name=draw(st.text(max_size=5)),
        weighted_log_prob=draw(st.none() | log_probs),
        weight_sum=draw(st.none() | st.floats(min_value=0.125, max_value=99)),
        context_tokens=draw(st.none() | st.integers(1, 99)),
        context=draw(st.none() | st.text(max_size=9)),
        log_prob_without_context=draw(st.none() | log_probs),
        log_prob=draw(log_probs) if tokens is None else math.fsum(token.log_prob for token in tokens),
        num_target_tokens=num_target_tokens,
        num_bytes=draw(st.integers(0, 99)),
        turns=draw(st.just(()) | any_turns(num_target_tokens or 9)),
        tokens=tokens,
    )


@given(any_scores())
def test_a_row_is_read_back_to_the_bit(scores: TokenScores) -> None:
    line = json.dumps(score_to_json(scores), allow_nan=False)
    assert score_from_json(json.loads(line), place="a.jsonl:1") == scores


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(any_scores(), min_size=1, max_size=4, unique_by=lambda scores: scores.example_id))
def test_parquet_is_read_back_to_the_bit(tmp_path: Path, scores: list[TokenScores]) -> None:
    path = tmp_path / "a.parquet"
    write_parquet_rows(path, [score_to_json(one) for one in scores])
    assert read_scores(path) == scores


def test_parquet_holds_half_a_surrogate_as_the_replacement_character(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet_rows(path, [{"example_id": "x\ud800", "log_prob": -1.0}])
    assert read_scores(path)[0].example_id == "x�"


def test_parquet_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_text("{}")
    with pytest.raises(DataError, match=r"a\.parquet: the score file cannot be read"):
        read_scores(path)


def test_what_a_minimal_file_leaves_out_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '\ufeff{"example_id": 7, "log_prob": -1.5}\n\n{"example_id": "b", "tokens": [{"log_prob": -0.5}]}\n'
    )
    whole, by_token = read_scores(path)
    assert whole == TokenScores(example_id="7", source="", log_prob=-1.5, num_target_tokens=0, num_bytes=0)
    assert by_token.log_prob == -0.5
    assert by_token.num_target_tokens == 1


def test_context_tokens_are_not_gold() -> None:
    tokens = [{"log_prob": -9.0, "weight": 0}, {"log_prob": -0.5, "weight": 0.25}]
    assert score_from_json({"example_id": "a", "tokens": tokens}, place="a:1").log_prob == -0.5


def test_a_hair_above_zero_is_zero() -> None:
    assert score_from_json({"example_id": "a", "log_prob": 1e-8}, place="a:1").log_prob == 0.0


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"example_id": "a", "log_prob": -1', "invalid JSON: .*column.*-1"),
        ("[1, 2]", r"a JSON object was expected, not \[1, 2\]"),
        ('{"log_prob": -1.0, "id": "a"}', r"`example_id` is missing; the fields are \['id', 'log_prob'\]"),
        ('{"example_id": null, "log_prob": -1.0}', "`example_id` is None"),
        ('{"example_id": "a"}', r"`log_prob` is missing and there are no `tokens`; the fields are \['example_id'\]"),
        ('{"example_id": "a", "log_prob": "-1"}', "`log_prob` is '-1', not a number"),
        ('{"example_id": "a", "log_prob": true}', "`log_prob` is True, not a number"),
        ('{"example_id": "a", "log_prob": NaN}', "`log_prob` is nan; a log-probability must be finite"),
        ('{"example_id": "a", "log_prob": -Infinity}', "`log_prob` is -inf; a log-probability must be finite"),
        (
            '{"example_id": "a", "log_prob": -1.7e308}',
            r"`log_prob` is -1.7e\+308; a log-probability must be finite, and above",
        ),
        ('{"example_id": "a", "tokens": [{"log_prob": -1, "rank": 0}]}', r"`tokens\[0\].rank` is 0\n.*counts from 1"),
        (
            '{"example_id": "a", "tokens": [{"log_prob": -1, "best_log_prob": -1.5}]}',
            r"`tokens\[0\].best_log_prob` is -1.5, below `log_prob`, -1.0",
        ),
        (
            '{"example_id": "a", "tokens": [{"log_prob": -1, "entropy": -0.1}]}',
            r"`tokens\[0\].entropy` is -0.1, below 0",
        ),
        ('{"example_id": "a", "log_prob": 0.48}', "`log_prob` is 0.48, above 0"),
        (
            '{"example_id": "a", "tokens": [{"log_prob": -1}, {"log_prob": 2.5}]}',
            r"`tokens\[1\].log_prob` is 2.5, above",
        ),
        ('{"example_id": "a", "tokens": [{"text": "x"}]}', r"`tokens\[0\].log_prob` is missing"),
        ('{"example_id": "a", "tokens": []}', "`tokens` lists no gold token"),
        ('{"example_id": "a", "tokens": [{"log_prob": -1, "weight": -1}]}', r"`tokens\[0\].weight` is -1"),
        (
            '{"example_id": "a", "log_prob": -0.5, "tokens": [{"log_prob": -1}]}',
            "`log_prob` is -0.5 but its 1 gold tokens sum to -1",
        ),
        (
            '{"example_id": "a", "num_target_tokens": 3, "tokens": [{"log_prob": -1}]}',
            "`num_target_tokens` is 3 but 1 gold",
        ),
        ('{"example_id": "a", "log_prob": -1, "num_bytes": -4}', "`num_bytes` is -4"),
        ('{"example_id": "a", "log_prob": -1, "context": 5}', "`context` is 5, not text"),
        ('{"example_id": "a", "log_prob": -1, "weight_sum": "x"}', "`weight_sum` is 'x', not a finite number"),
        (
            '{"example_id": "a", "log_prob": -1, "log_prob_without_context": 2}',
            "`log_prob_without_context` is 2, above",
        ),
        ('{"example_id": "a", "tokens": [{"log_prob": -1, "rank": -2}]}', r"`tokens\[0\].rank` is -2"),
        (
            '{"example_id": "a", "tokens": [{"log_prob": -1, "alternatives": [[1, 2, -1.0]]}]}',
            r"`tokens\[0\].alternatives` holds \[1, 2, -1.0\], not",
        ),
        (
            '{"example_id": "a", "log_prob": -1, "turns": [[0, 1]]}',
            r"`turns` holds \[0, 1\], not \[begin, number, role\]",
        ),
        ('{"example_id": "a", "log_prob": -1, "turns": 5}', "`turns` holds 5, not"),
        (
            '{"example_id": "a", "log_prob": -1, "turns": [[1, 1, "user"]]}',
            r"`turns` is \[\[1, 1, 'user'\]\], of 0 gold",
        ),
        (
            '{"example_id": "a", "log_prob": -1, "num_target_tokens": 2, "turns": [[0, 1, "user"], [2, 2, "user"]]}',
            "`turns` is .*, of 2 gold tokens",
        ),
        ('{"example_id": "a", "log_prob": -1, "turns": [[0, 2, "user"], [1, 2, "user"]]}', "`turns` is "),
        ('{"example_id": "first", "log_prob": -1}', "`example_id` 'first' was already on line 1"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"example_id": "first", "log_prob": -1.0}\n' + "\n" * 5 + line + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl:7: {told}") as raised:
        read_scores(path)
    assert raised.value.exit_code == 3


def test_bytes_that_are_not_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"example_id": "a\xff", "log_prob": -1.0}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: not UTF-8 \(byte 17"):
        read_scores(path)


def test_no_file_and_no_rows_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_scores(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="has no rows"):
        read_scores(tmp_path / "empty.jsonl")
