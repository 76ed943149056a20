"""A full disk: exit code 7 wherever it is met, and after space was made the same command ends where it would have ended."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import TrainingRun, assert_same_run, checkpoint_steps, valid_checkpoints

from goldsmith.storage import FAIL_POINTS

NewRun = Callable[..., TrainingRun]
Reference = Callable[..., TrainingRun]

EVERY_STEP: dict[str, Any] = {
    "training.epochs": 3,
    "checkpoint.every_steps": 1,
    "checkpoint.keep": 1,
    "evaluation.every_steps": 2,
    "optimizer.learning_rate": 0.1,
}


def test_a_disk_that_fills_at_every_fail_point_in_turn(new_run: NewRun, reference: Reference) -> None:
    run = new_run(EVERY_STEP)
    places = ["metrics.append:2", "checkpoint.model"]
    places += [f"{name}:2" for name in FAIL_POINTS if name.startswith("checkpoint.")]
    places += [name for name in FAIL_POINTS if name.startswith("export.")]
    assert {place.partition(":")[0] for place in places} == set(FAIL_POINTS)
    for place in places:
        outcome = run.train_dying_at(f"{place}!enospc")
        assert outcome.exit_code == 7, f"{place}: {outcome.stderr}"
        assert "the disk is full" in outcome.stderr
        assert "same command" in outcome.stderr
        assert not list(run.output.glob(".*.tmp")), "what was half written takes the space that is wanted"
        valid_checkpoints(run)
    run.finish()
    assert_same_run(run, reference(EVERY_STEP))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(kibibytes)`: a file system of that size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kibibytes: int) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "none", str(folder)], check=False, capture_output=True
        )
        if done.returncode != 0:
            pytest.skip("waits for the right to mount a small file system")
        return folder

    with contextlib.ExitStack() as stack:
        stack.callback(subprocess.run, ["umount", str(folder)], check=False, capture_output=True)
        yield mount


def test_a_disk_that_is_really_full(
    small_disk: Callable[[int], Path], gold_folder: Path, small_model_folder: Path, reference: Reference
) -> None:
    disk = small_disk(2048)
    run = TrainingRun(disk / "a", data=gold_folder, model=small_model_folder)
    running = run.start()
    deadline = time.monotonic() + 60
    while not checkpoint_steps(run):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    (outcome,) = running.wait()
    assert outcome.exit_code == 7, outcome.stderr
    assert "the disk is full" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert valid_checkpoints(run)
    ballast.unlink()
    run.finish()
    assert_same_run(run, reference())


def test_too_small_a_disk_is_refused_before_the_start(
    small_disk: Callable[[int], Path], gold_folder: Path, small_model_folder: Path
) -> None:
    disk = small_disk(160)
    run = TrainingRun(disk / "a", data=gold_folder, model=small_model_folder)
    outcome = run.train()
    assert outcome.exit_code == 7, outcome.stderr
    assert " free, but " in outcome.stderr
    assert "checkpoint.keep" in outcome.stderr
    assert not run.output.exists()
