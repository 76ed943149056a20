"""Two score files brought together row by row: what is held, in which order, by role and by kind of token."""

from __future__ import annotations

import errno
import gc
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from goldsmith.errors import DataError, MachineError
from goldsmith.scoring.compare import scores_from_probabilities
from goldsmith.scoring.files import score_to_json, stream_scores
from goldsmith.scoring.parquet import write_parquet_rows
from goldsmith.scoring.ranking import compare
from goldsmith.types import GoldTurn, TokenScore, TokenScores

WORDS = ["a", " b", "\n", "ü", "", "\ud800"]


def two_models(count: int) -> tuple[list[TokenScores], list[TokenScores]]:
    """Of the same gold, of one to forty tokens, every third row in two parts; contexts differ now and then."""
    generator = np.random.default_rng(0)
    sides: tuple[list[TokenScores], list[TokenScores]] = ([], [])
    for number in range(count):
        texts = [WORDS[place] for place in generator.integers(0, len(WORDS), size=int(generator.integers(1, 41)))]
        for side, own in enumerate(sides):
            log_probs = (-5 * generator.random(len(texts))).tolist()
            tokens = tuple(
                TokenScore(token_id=1, text=text, log_prob=log_prob)
                for text, log_prob in zip(texts, log_probs, strict=True)
            )
            own.append(
                TokenScores(
                    example_id=f"e{number // 3}#{number % 3}",
                    source=f"f:{number // 3}",
                    source_name="laws" if number % 5 else "maths",
                    log_prob=math.fsum(log_probs),
                    num_target_tokens=len(texts),
                    num_bytes=len(texts),
                    tokens=tokens,
                    context=f"{number}" if number % 7 else f"{number}, {side}",
                )
            )
    return sides


def write(path: Path, scores: Sequence[TokenScores]) -> Path:
    lines = [json.dumps(score_to_json(one)) + "\n" for one in scores]
    path.write_text("".join(lines))
    return path


def figures(*given: Any) -> dict[str, object]:
    comparison = compare(*given, names=("A", "B"))
    return {**comparison.to_json(), "frame": comparison.to_pandas().to_dict(), "text": str(comparison)}


def test_files_in_any_order_say_what_lists_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, from memory and from the disk; what only one has lies between the others."""
    a, b = two_models(90)
    a, b = [one for one in a if one.example_id != "e7#0"], [one for one in b if one.example_id not in ("e3#1", "e9#2")]
    expected = figures(a, b)
    assert expected["num_only"] == [2, 1]
    assert {group["by"] for group in expected["groups"]} == {"source", "position"}  # type: ignore[attr-defined]
    assert expected["num_other_contexts"]
    random.Random(0).shuffle(b)
    files = write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", b)
    assert figures(*files) == expected
    monkeypatch.setattr("goldsmith.scoring.pairing._BYTES_IN_MEMORY", 1)
    assert figures(*files) == expected
    assert figures(iter(a), iter(b)) == expected


def test_tokens_of_a_few_examples_are_in_memory_and_not_all(tmp_path: Path) -> None:
    a, b = two_models(300)
    files = [write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", b)]
    total = sum(len(one.tokens or ()) for one in a)
    del a, b
    live = []

    def counted(path: Path) -> Iterator[TokenScores]:
        for number, score in enumerate(stream_scores(path)):
            if number % 50 == 49:
                live.append(sum(type(thing) is TokenScore for thing in gc.get_objects()))
            yield score

    gc.collect()
    others = sum(type(thing) is TokenScore for thing in gc.get_objects())
    comparison = compare(counted(files[0]), counted(files[1]))
    assert len(live) == 12
    assert max(live) - others <= 3 * 40 < total / 10
    assert comparison.pairs[0].a.tokens is None
    assert len(comparison.largest_tokens(10**6)) == 100


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.SpooledTemporaryFile.write", full)
    a, b = two_models(3)
    with pytest.raises(MachineError, match="No space left") as caught:
        compare(a, b)
    assert "TMPDIR" in str(caught.value.remedy)


def test_the_second_is_refused_where_it_scores_an_example_twice() -> None:
    a, b = two_models(4)
    for twice in (b[0], replace(b[0], example_id="of its own")):
        with pytest.raises(DataError, match=r"B: example .* is scored twice"):
            compare(a, [*b, twice, twice])


def test_kinds_of_token_are_summed_and_ordered_by_their_sum() -> None:
    a = scores_from_probabilities({"x": [("\n", 0.5), ("b", 0.9), ("\n", 0.5)], "y": [("\n", 0.5), ("c", 0.2)]})
    b = scores_from_probabilities({"x": [("\n", 0.1), ("b", 0.1), ("\n", 0.1)], "y": [("\n", 0.1), ("c", 0.2)]})
    comparison = compare(a, b)
    line_break, letter = comparison.largest_kinds()
    assert (line_break.text, line_break.count) == ("\n", 3)
    assert line_break.difference == pytest.approx(3 * math.log(5))
    assert line_break.mean_difference == pytest.approx(math.log(5))
    assert (letter.text, letter.count) == ("b", 1)
    assert comparison.largest_tokens(1)[0].text == "b"
    *_, line = [line for line in str(comparison).splitlines() if line.startswith("'\\n'")]
    assert line.split() == ["'\\n'", "3", "+1.6094", "+4.83"]
    assert comparison.to_json()["largest_kinds"] == [line_break.to_json(), letter.to_json()]


def test_kinds_of_one_token_each_are_not_printed() -> None:
    a = scores_from_probabilities({"x": [("a", 0.5), ("b", 0.9)], "y": [("c", 0.2)]})
    b = scores_from_probabilities({"x": [("a", 0.4), ("b", 0.1)], "y": [("c", 0.8)]})
    assert "kinds of token" not in str(compare(a, b))
    assert len(compare(a, b).largest_kinds()) == 3


def turns(*begins: int) -> tuple[GoldTurn, ...]:
    """The user's and the assistant's, in turn."""
    return tuple(
        GoldTurn(begin=begin, number=number, role="assistant" if number % 2 == 0 else "user")
        for number, begin in enumerate(begins, start=1)
    )


def test_roles_add_up_to_the_mean_difference(tmp_path: Path) -> None:
    def of(*rows: list[float]) -> list[TokenScores]:
        scores = scores_from_probabilities({str(number): row for number, row in enumerate(rows)})
        of_both = [replace(one, turns=turns(0, 2)) for one in scores[:-1]]
        return [*of_both, replace(scores[-1], turns=(GoldTurn(begin=0, number=3, role="assistant"),))]

    a = of([0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5], [0.5])
    b = of([0.5, 0.25, 0.5], [0.5, 0.5, 0.5, 0.25], [0.25])
    comparison = compare(write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", b))
    user, assistant = [group for group in comparison.groups if group.by == "role"]
    assert (user.label, user.num_examples, user.wins, user.losses) == ("user", 2, 1, 0)
    assert (assistant.label, assistant.num_examples, assistant.wins) == ("assistant", 3, 2)
    assert [user.difference.estimate, assistant.difference.estimate] == pytest.approx(
        [math.log(2) / 3, 2 * math.log(2) / 3]
    )
    assert "by role of gold" in str(comparison)
    # One of the two may be a file that does not know them; where both know, and otherwise, nobody does.
    unknown = [replace(one, turns=()) for one in b]
    assert [group for group in compare(a, unknown).groups if group.by == "role"] == [user, assistant]
    others = [replace(one, turns=(GoldTurn(begin=0, number=1, role="tool"),)) for one in b]
    assert not [group for group in compare(a, others).groups if group.by == "role"]
    assert not [group for group in compare([replace(a[0], turns=()), *a[1:]], unknown).groups if group.by == "role"]


def test_rows_of_one_role_need_no_tokens() -> None:
    def of(*log_probs: float) -> list[TokenScores]:
        return [
            TokenScores(
                example_id=str(number),
                source="",
                log_prob=log_prob,
                num_target_tokens=2,
                num_bytes=2,
                turns=(GoldTurn(begin=0, number=1, role="user" if number else "assistant"),),
            )
            for number, log_prob in enumerate(log_probs)
        ]

    groups = compare(of(-1.0, -2.0), of(-3.0, -3.0)).groups
    assert [(group.by, group.label, group.difference.estimate) for group in groups] == [
        ("role", "assistant", 1.0),
        ("role", "user", 0.5),
    ]


def test_a_parquet_file_may_lack_what_came_later(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    a, _ = two_models(3)
    write_parquet_rows(tmp_path / "a.parquet", [score_to_json(one) for one in a[:2]])
    pq.write_table(pq.read_table(tmp_path / "a.parquet").drop_columns(["turns"]), tmp_path / "old.parquet")
    assert [one.turns for one in stream_scores(tmp_path / "old.parquet")] == [(), ()]
