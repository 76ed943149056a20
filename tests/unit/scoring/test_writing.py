"""A score file that is written in windows: whole or not there, gone on with, and the same bytes either way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from goldsmith.errors import MachineError
from goldsmith.scoring.files import read_scores
from goldsmith.scoring.tally import Parts, ScoreTally, parts_of
from goldsmith.scoring.writing import ScoreWriter
from goldsmith.types import TokenScore, TokenScores

RUN = {"model": "m", "data": "d"}


def window(*names: str) -> list[tuple[TokenScores, Parts]]:
    examples = []
    for name in names:
        token = TokenScore(token_id=3, text=name, log_prob=-1 / 3, rank=1, alternatives=((3, name, -1 / 3),))
        scores = TokenScores(
            example_id=name, source="eval.jsonl:1", log_prob=-1 / 3, num_target_tokens=1, num_bytes=2, tokens=(token,)
        )
        examples.append((scores, parts_of(scores)))
    return examples


WINDOWS = [window("é", "b"), window("\ud800"), window("line\u2028end", "y")]


def written(path: Path, *, run: dict[str, object] | None = None) -> bytes:
    with ScoreWriter(path, run or RUN) as writer:
        for one in WINDOWS:
            writer.write_window(one)
        writer.finish()
    return path.read_bytes()


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_file_is_read_back_in_order(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    written(path)
    expected = [scores for one in WINDOWS for scores, _ in one]
    if suffix == "jsonl":
        assert read_scores(path) == expected
    assert [one.log_prob for one in read_scores(path)] == [one.log_prob for one in expected]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("cut", [-1, -60, 0])
def test_an_interrupted_file_ends_with_the_same_bytes(tmp_path: Path, suffix: str, cut: int) -> None:
    """Interrupted after two windows; the partial file then loses its last bytes, as when the machine went down."""
    whole = written(tmp_path / f"whole.{suffix}")
    path = tmp_path / f"a.{suffix}"
    with ScoreWriter(path, RUN) as writer:
        for one in WINDOWS[:2]:
            writer.write_window(one)
    assert not path.exists()
    partial = tmp_path / f"a.{suffix}.partial"
    data = partial.read_bytes()
    partial.write_bytes(data[:cut] if cut else data + b'{"row": {"exa')
    with ScoreWriter(path, RUN) as writer:
        assert writer.num_done == (2 if cut else 3)
        done = list(writer.done())
        assert done == [example for one in WINDOWS for example in one][: writer.num_done]
        tally = ScoreTally(len(done))
        for row, (scores, parts) in enumerate(done):
            tally.add(scores, parts, row=row)
        for one in WINDOWS[1 if cut else 2 :]:
            writer.write_window(one)
        writer.finish()
    assert path.read_bytes() == whole
    assert not partial.exists()


def test_a_file_that_died_before_its_first_line_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    (tmp_path / "a.jsonl.partial").write_bytes(b'{"format": "gold')
    assert written(path) == written(tmp_path / "b.jsonl")


def test_the_partial_file_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with ScoreWriter(path, RUN, how={"threads": 1}) as writer:
        writer.write_window(WINDOWS[0])
    with (
        pytest.raises(MachineError, match=r"differs in:\n  model: 'm' there, 'other' here") as raised,
        ScoreWriter(path, {**RUN, "model": "other"}),
    ):
        pass
    assert "remove" in str(raised.value)
    with ScoreWriter(path, RUN, how={"threads": 2}) as writer:
        assert (writer.num_done, writer.changed) == (2, ("threads",))
    (tmp_path / "a.jsonl.partial").write_text("my own notes\n")
    with pytest.raises(MachineError, match="not a partial score file"), ScoreWriter(path, RUN):
        pass
    assert (tmp_path / "a.jsonl.partial").read_text() == "my own notes\n"


def test_two_cannot_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with (
        ScoreWriter(path, RUN),
        pytest.raises(MachineError, match="another process is writing"),
        ScoreWriter(path, RUN),
    ):
        pass


def test_a_file_that_was_not_finished_does_not_bear_the_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("the old one")
    with ScoreWriter(path, RUN) as writer:
        writer.write_window(WINDOWS[0])
    assert path.read_text() == "the old one"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(
            MachineError, match=r"none/a\.jsonl: the score file cannot be written: No such file.*\n.*--output"
        ),
        ScoreWriter(tmp_path / "none" / "a.jsonl", RUN),
    ):
        pass


def _cut_line(lines: list[bytes]) -> None:
    lines[4] = lines[4][:40] + b"\n"


def _other_number(lines: list[bytes]) -> None:
    lines[4] = lines[4].replace(b"-0.333", b"-0.633")


def _no_line(lines: list[bytes]) -> None:
    del lines[4]


def _other_order(lines: list[bytes]) -> None:
    lines[1:3] = lines[2:0:-1]


@pytest.mark.parametrize(("damage", "left"), [(_cut_line, 2), (_other_number, 2), (_no_line, 2), (_other_order, 0)])
def test_a_window_that_is_not_as_it_was_written_is_computed_again(
    tmp_path: Path, damage: Callable[[list[bytes]], None], left: int
) -> None:
    whole = written(tmp_path / "whole.jsonl")
    path = tmp_path / "a.jsonl"
    with ScoreWriter(path, RUN) as writer:
        for one in WINDOWS[:2]:
            writer.write_window(one)
    partial = tmp_path / "a.jsonl.partial"
    lines = partial.read_bytes().splitlines(keepends=True)
    damage(lines)
    partial.write_bytes(b"".join(lines))
    with ScoreWriter(path, RUN) as writer:
        assert writer.num_done == left
        for one in WINDOWS[1 if left else 0 :]:
            writer.write_window(one)
        writer.finish()
    assert path.read_bytes() == whole
