from __future__ import annotations

import io

import pytest
from rich.console import Console

from goldsmith.records import EvaluationRecord, StepRecord
from goldsmith.training import progress
from goldsmith.training.progress import NoProgress, TerminalProgress, progress_reporter


def step_record(step: int) -> StepRecord:
    values = dict.fromkeys(StepRecord.__dataclass_fields__, 0)
    values |= {"step": step, "nll": 1.25, "tokens_per_second": 12345.6, "update_to_weight": {}, "kind": "step"}
    return StepRecord.from_json(values)


def evaluation(step: int, *, is_best: bool = True) -> EvaluationRecord:
    values = dict.fromkeys(EvaluationRecord.__dataclass_fields__, 0)
    values |= {"step": step, "nll": 1.5, "gold_tokens": 1234, "is_best": is_best, "kind": "evaluation"}
    return EvaluationRecord.from_json(values)


def test_without_a_terminal_an_evaluation_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with NoProgress(lines=True) as reporter:
        reporter.start(done=0, total=3)
        reporter.evaluation(evaluation(0))
        reporter.step(step_record(1))
        reporter.evaluation(evaluation(3))
        reporter.evaluation(evaluation(6, is_best=False))
    seen = capsys.readouterr()
    assert seen.out == ""
    assert seen.err.splitlines() == [
        "step 0: held-out nll 1.5000 nats a token over 1,234 gold tokens",
        "step 3: held-out nll 1.5000 nats a token over 1,234 gold tokens  (best so far)",
        "step 6: held-out nll 1.5000 nats a token over 1,234 gold tokens",
    ]


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_reporter(quiet=True) as reporter:
        reporter.start(done=0, total=3)
        reporter.step(step_record(1))
        reporter.evaluation(evaluation(3))
    seen = capsys.readouterr()
    assert (seen.out, seen.err) == ("", "")


def test_a_terminal_sees_a_bar_with_nll_speed_and_time_left() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120, color_system=None)
    with TerminalProgress(console) as reporter:
        reporter.start(done=2, total=40)
        reporter.step(step_record(3))
        reporter.evaluation(evaluation(3))
    seen = output.getvalue()
    assert "3/40" in seen
    assert "nll 1.2500" in seen
    assert "12,346 tokens/s" in seen
    assert "left" in seen
    assert "held-out nll 1.5000" in seen


@pytest.mark.parametrize(("is_terminal", "quiet", "kind"), [(True, False, TerminalProgress), (True, True, NoProgress)])
def test_what_standard_error_is_decides(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool, quiet: bool, kind: type
) -> None:
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=io.StringIO(), force_terminal=is_terminal))
    assert isinstance(progress_reporter(quiet=quiet), kind)
