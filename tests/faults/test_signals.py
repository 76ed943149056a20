"""SIGINT and SIGTERM: the step is finished, a checkpoint written, exit code 75; the same command goes on to the same end."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest
from runs import TrainingRun, assert_same_run, checkpoint_steps, read_metrics, valid_checkpoints

NewRun = Callable[..., TrainingRun]
Reference = Callable[..., TrainingRun]

STOPPED = 75
# One checkpoint, at the end: what lies there after a stop was written because of the stop.
AT_THE_END = {"checkpoint.every_steps": None, "evaluation.every_steps": None, "checkpoint.keep": 1}


def when_training(run: TrainingRun, lines: int) -> None:
    """Wait until `metrics.jsonl` has so many lines."""
    deadline = time.monotonic() + 60
    while not run.metrics.exists() or run.metrics.read_bytes().count(b"\n") < lines:
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_writes_a_checkpoint_and_resumes(new_run: NewRun, reference: Reference, number: int) -> None:
    changes = {**AT_THE_END, "training.max_steps": 30}
    run = new_run(changes)
    running = run.start()
    when_training(run, 3)
    running.signal(number)
    (outcome,) = running.wait()
    assert outcome.exit_code == STOPPED, outcome.stderr
    assert "same command" in outcome.stderr
    assert '"exit_code": 75' in outcome.stdout
    (stopped_after,) = valid_checkpoints(run)
    assert 2 <= stopped_after < 30
    assert f"after step {stopped_after} of 30" in outcome.stderr
    assert read_metrics(run.metrics)[-1]["step"] == stopped_after
    run.finish()
    assert_same_run(run, reference(changes))


def test_stops_while_files_are_written(new_run: NewRun, reference: Reference) -> None:
    """A signal in the middle of a save, of the claim and of the export: at each the run is stopped or finished, and goes on."""
    run = new_run()
    codes = []
    for event in (5, 18, 60, 90, 110, 20):
        outcome = run.train(watched=run.output, signals={event: signal.SIGTERM})
        assert outcome.exit_code in (0, STOPPED), outcome.stderr
        codes.append(outcome.exit_code)
        valid_checkpoints(run)
    assert STOPPED in codes
    run.finish()
    assert_same_run(run, reference(), newest_checkpoint_only=True)


def test_a_second_signal_acts_at_once(new_run: NewRun, reference: Reference) -> None:
    """Also one of the other kind: a scheduler's SIGTERM after a Ctrl-C must not wait for the step to end."""
    run = new_run()
    total = run.train(watched=run.output, env={"GOLDSMITH_FAIL_POINT": "checkpoint.model"}).file_events
    assert total is None  # killed: nothing is written about it
    fresh = new_run(name="fresh")
    outcome = fresh.train(watched=fresh.output, signals={30: signal.SIGINT, 31: signal.SIGTERM})
    assert outcome.exit_code == STOPPED, outcome.stderr
    assert "the checkpoint is written" not in outcome.stderr
    assert "from the last checkpoint, if any" in outcome.stderr
    assert checkpoint_steps(fresh) == []
    assert not list((fresh.output / "checkpoints").glob(".*")), "what was half written is removed"
    fresh.finish()
    assert_same_run(fresh, reference(), newest_checkpoint_only=True)


def test_a_signal_before_the_run_has_begun_leaves_nothing_behind(new_run: NewRun) -> None:
    run = new_run()
    outcome = run.train(watched=run.output, signals={3: signal.SIGINT})  # just before recipe.yaml is written
    assert outcome.exit_code == STOPPED
    assert not run.output.exists()


def test_a_command_in_the_background_of_a_shell_ignores_sigint(new_run: NewRun, reference: Reference) -> None:
    """A Ctrl-C in the terminal is not meant for it; SIGTERM is."""
    run = new_run()
    outcome = run.train(watched=run.output, signals={30: signal.SIGINT, 60: signal.SIGTERM}, ignore_sigint=True)
    assert outcome.exit_code == STOPPED
    assert valid_checkpoints(run)
    assert (
        run.train(watched=run.output, signals={5: signal.SIGINT, 25: signal.SIGINT}, ignore_sigint=True).exit_code == 0
    )
    assert_same_run(run, reference(), newest_checkpoint_only=True)


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(30))
def test_campaign_signals(new_run: NewRun, reference: Reference, seed: int) -> None:
    """One or two signals at random file operations, again and again."""
    import random

    choice = random.Random(seed)
    run = new_run()
    for _ in range(choice.randint(1, 5)):
        first = choice.randint(1, 150)
        signals = {first: choice.choice([signal.SIGINT, signal.SIGTERM])}
        if choice.random() < 0.5:
            signals[first + choice.randint(1, 10)] = choice.choice([signal.SIGINT, signal.SIGTERM])
        outcome = run.train(watched=run.output, signals=signals)
        assert outcome.exit_code in (0, STOPPED), outcome.stderr
        valid_checkpoints(run)
    run.finish()
    assert_same_run(run, reference(), newest_checkpoint_only=True)
