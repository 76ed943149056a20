"""Score files: what is written is read back to the bit, and what is wrong is named by file, line, field and value."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goldsmith.errors import DataError, MachineError
from goldsmith.scoring.files import read_scores, score_from_json, score_to_json, write_scores
from goldsmith.types import TokenScore, TokenScores

log_probs = st.floats(max_value=0.0, allow_nan=False, allow_infinity=False, min_value=-1e6)
token_scores = st.builds(
    TokenScore,
    token_id=st.integers(-1, 10**6),
    text=st.text(max_size=5),
    log_prob=log_probs,
    weight=st.floats(min_value=0.125, max_value=8, width=32),
)


@st.composite
def any_scores(draw: st.DrawFn) -> TokenScores:
    tokens = draw(st.none() | st.lists(token_scores, min_size=1, max_size=5).map(tuple))
    return TokenScores(
        example_id=draw(st.text()),
        source=draw(st.text()),
        log_prob=draw(log_probs) if tokens is None else math.fsum(token.log_prob for token in tokens),
        num_target_tokens=draw(st.integers(0, 99)) if tokens is None else len(tokens),
        num_bytes=draw(st.integers(0, 99)),
        tokens=tokens,
    )


@given(any_scores())
def test_a_row_is_read_back_to_the_bit(scores: TokenScores) -> None:
    line = json.dumps(score_to_json(scores), allow_nan=False)
    assert score_from_json(json.loads(line), place="a.jsonl:1") == scores


def test_a_file_is_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    scores = [
        TokenScores(example_id=name, source="eval.jsonl:1", log_prob=-0.1, num_target_tokens=1, num_bytes=2)
        for name in ("é", "b", "\ud800", "line\u2028end")
    ]
    assert list(write_scores(path, iter(scores))) == scores
    assert read_scores(path) == scores
    assert list(tmp_path.iterdir()) == [path]


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


def test_a_file_that_was_not_finished_does_not_bear_the_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("the old one")

    def broken() -> Iterator[TokenScores]:
        yield TokenScores(example_id="a", source="", log_prob=-1.0, num_target_tokens=1, num_bytes=1)
        raise RuntimeError("the model died")

    with pytest.raises(RuntimeError):
        list(write_scores(path, broken()))
    assert path.read_text() == "the old one"


def test_an_error_of_the_rows_is_not_taken_for_one_of_the_file(tmp_path: Path) -> None:
    def unreadable() -> Iterator[TokenScores]:
        raise OSError("the data went away")
        yield

    with pytest.raises(OSError, match="the data went away"):
        list(write_scores(tmp_path / "a.jsonl", unreadable()))


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"none/a\.jsonl: the score file cannot be written: No such file"):
        list(write_scores(tmp_path / "none" / "a.jsonl", []))
