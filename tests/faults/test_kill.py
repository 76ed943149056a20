"""SIGKILL: whatever the instant, the same command again ends where a run ends that nothing happened to.

The default run kills one run at every fail-point in turn, and others at a sample of instants. The campaign
(`make faults`) goes through them one by one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from forked import SOURCE
from runs import TrainingRun, assert_same_run, checkpoint_steps, read_metrics, valid_checkpoints

from goldsmith.storage import FAIL_POINTS

NewRun = Callable[..., TrainingRun]
Reference = Callable[..., TrainingRun]

KILLED = -signal.SIGKILL
# Every checkpoint prunes another (but the best); the best is often not the last.
EVERY_STEP: dict[str, Any] = {
    "training.epochs": 3,
    "checkpoint.every_steps": 1,
    "checkpoint.keep": 1,
    "evaluation.every_steps": 2,
    "optimizer.learning_rate": 0.1,
}


def assert_safe(run: TrainingRun, *, had_one: bool) -> bool:
    """What must hold whenever a process died: complete checkpoints are valid, one is there once one was, the best is."""
    steps = valid_checkpoints(run)
    assert steps or not had_one, "the last valid checkpoint is gone"
    if steps:
        # What the newest checkpoint knows as the best must still be there.
        best = json.loads((run.checkpoint(steps[-1]) / "state.json").read_text())["best_step"]
        assert best in (None, 0) or best in steps, f"the best checkpoint, {best}, was pruned: {steps}"
    return bool(steps)


def test_a_run_killed_at_every_fail_point_in_turn(new_run: NewRun, reference: Reference) -> None:
    run = new_run(EVERY_STEP)
    # First with no checkpoint to go back to, then from the second passing on: each attempt gains one step.
    places = ["metrics.append:2", "checkpoint.model", "checkpoint.rename"]
    places += [f"{name}:2" for name in FAIL_POINTS if name.startswith("checkpoint.")]
    places += [name for name in FAIL_POINTS if name.startswith("export.")]
    assert {place.partition(":")[0] for place in places} == set(FAIL_POINTS)
    had_one = False
    for place in places:
        outcome = run.train_dying_at(place)
        assert outcome.exit_code == KILLED, f"{place}: not passed: {outcome.stderr}"
        assert not (run.output / "result.json").exists()
        had_one = assert_safe(run, had_one=had_one)
    run.finish()
    assert_same_run(run, reference(EVERY_STEP))


def test_a_best_checkpoint_in_the_middle_is_there_at_the_end(reference: Reference) -> None:
    run = reference(EVERY_STEP)
    evaluations = [record for record in read_metrics(run.metrics) if record["kind"] == "evaluation"]
    best = min(evaluations, key=lambda record: record["nll"])["step"]
    assert 0 < best < 12, "the recipe of this test must have its best in the middle"
    assert checkpoint_steps(run) == [best, 12]


@pytest.mark.parametrize(
    ("every_steps", "keep", "places"),
    [
        (2, 2, ["checkpoint.rename:3", "metrics.append:4", "checkpoint.pruning"]),
        (5, 1, ["checkpoint.renamed", "metrics.append:3", "checkpoint.pruning", "export.rename"]),
        (None, 1, ["metrics.append:7", "checkpoint.optimizer"]),
    ],
)
def test_other_intervals(
    new_run: NewRun, reference: Reference, every_steps: int | None, keep: int, places: list[str]
) -> None:
    changes = {"checkpoint.every_steps": every_steps, "checkpoint.keep": keep, "evaluation.every_steps": None}
    run = new_run(changes)
    had_one = False
    for place in places:
        assert run.train_dying_at(place).exit_code == KILLED, place
        had_one = assert_safe(run, had_one=had_one)
    run.finish()
    assert_same_run(run, reference(changes))


def kill_until_done(run: TrainingRun, instants: list[float]) -> int:
    """Kill the command after each of `instants` (seconds) in turn, then let it finish; how many kills hit."""
    hits, had_one = 0, False
    for instant in instants:
        running = run.start()
        time.sleep(instant)
        running.signal(signal.SIGKILL)
        (outcome,) = running.wait()
        assert outcome.exit_code in (KILLED, 0), outcome.stderr
        hits += outcome.exit_code == KILLED
        had_one = assert_safe(run, had_one=had_one)
    run.finish()
    return hits


def test_kills_at_random_instants(new_run: NewRun, reference: Reference) -> None:
    expected = reference()
    seconds = new_run(name="timed").finish().seconds
    choice = random.Random(7)
    hits = kill_until_done(run := new_run(), [seconds * choice.uniform(0.1, 0.7) for _ in range(4)])
    assert hits >= 1
    assert_same_run(run, expected)


def die_at_file_event(run: TrainingRun, number: int) -> int:
    """The command, killed just before its n-th look at or change of a file in the run folder."""
    return run.train(signals={number: signal.SIGKILL}, watched=run.output).exit_code


def test_kills_between_file_operations(new_run: NewRun, reference: Reference) -> None:
    """Places that no fail-point names: half-written folders, a rename that did not come, a run that is just claimed."""
    total = new_run(name="count").train(watched=new_run(name="count").output).file_events
    assert total is not None
    assert total > 100
    run = new_run()
    # The claim of the folder, one operation after the other; what is done once is not done again.
    for number in [2, 3, 5, 8, 12, 20, 30, total // 3, total // 2, total // 4]:
        assert die_at_file_event(run, number) in (KILLED, 0)
        assert_safe(run, had_one=False)
    run.finish()
    assert_same_run(run, reference())


def test_a_new_process_with_another_hash_seed_is_the_same(new_run: NewRun, reference: Reference) -> None:
    """Not a forked child: an interpreter of its own, where sets are in another order."""
    run = new_run()
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "4242"}
    words = [sys.executable, "-m", "goldsmith.cli", *run.command().arguments]
    killed = subprocess.run(
        words,
        cwd=run.folder,
        env={**environment, "GOLDSMITH_FAIL_POINT": "checkpoint.manifest:3"},
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert killed.returncode == KILLED
    run.finish()
    assert_same_run(run, reference())


# --- the campaign

SETTINGS: dict[str, dict[str, Any]] = {
    "every step, keep 1": EVERY_STEP,
    "every 2, keep 2": {},
    "every 5, keep 1": {"checkpoint.every_steps": 5, "checkpoint.keep": 1},
    "from nothing": {
        "model": {
            "device": "cpu",
            "init": {
                "architecture": "llama",
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
        },
        "tokenizer": {"train": {"kind": "character"}},
        "data.max_length": 64,
    },
}


@pytest.mark.campaign
@pytest.mark.parametrize("passing", [1, 2, 4])
@pytest.mark.parametrize("place", FAIL_POINTS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_campaign_fail_points(new_run: NewRun, reference: Reference, setting: str, place: str, passing: int) -> None:
    run = new_run(SETTINGS[setting])
    outcome = run.train_dying_at(f"{place}:{passing}")
    assert outcome.exit_code in (KILLED, 0)
    assert_safe(run, had_one=False)
    run.finish()
    assert_same_run(run, reference(SETTINGS[setting]))


@pytest.mark.campaign
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("setting", SETTINGS)
def test_campaign_every_file_operation(new_run: NewRun, reference: Reference, setting: str, part: int) -> None:
    """Every eighth file operation of the run, in turn; the eight parts together are all of them."""
    expected = reference(SETTINGS[setting])
    count = new_run(SETTINGS[setting], name="count")
    total = count.train(watched=count.output).file_events
    assert total is not None
    for number in range(1 + part, total + 1, 8):
        run = new_run(SETTINGS[setting], name=f"run-{number}")
        assert die_at_file_event(run, number) == KILLED
        assert_safe(run, had_one=False)
        outcome = run.train()
        assert outcome.exit_code == 0, f"after a kill at file operation {number} of {total}: {outcome.stderr}"
        assert_same_run(run, expected)
        shutil.rmtree(run.folder)


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("setting", SETTINGS)
def test_campaign_random_instants(new_run: NewRun, reference: Reference, setting: str, seed: int) -> None:
    expected = reference(SETTINGS[setting])
    seconds = new_run(SETTINGS[setting], name="timed").finish().seconds
    choice = random.Random(seed)
    run = new_run(SETTINGS[setting])
    kill_until_done(run, [seconds * choice.uniform(0.0, 0.9) for _ in range(choice.randint(1, 6))])
    assert_same_run(run, expected)
