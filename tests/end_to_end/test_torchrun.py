"""`torchrun`, as users start it: two processes end where one ends, also where they go on with a run that was killed.

What happens between the ranks is tested without it, and faster, in `faults/test_ranks.py`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forked import SOURCE, forked
from runs import TrainingRun, assert_same_run, read_metrics, valid_checkpoints
from safetensors.torch import load_file

STEPS = 16


def torchrun(run: TrainingRun, logs: Path, *options: str, **env: str) -> tuple[int, list[dict[int, str]]]:
    """Its exit code, and for each attempt what each rank wrote to its own file of standard error."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    words += ["--redirects", "3", "--log-dir", str(logs), "-m", "goldsmith.cli", *map(str, run.command().arguments)]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", **env}
    with subprocess.Popen(
        words, cwd=run.folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            exit_code = process.wait(180)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends its ranks; a SIGKILL would leave them behind
            raise
    attempts = [
        {rank: (attempt / str(rank) / "stderr.log").read_text() for rank in (0, 1)}
        for attempt in sorted(logs.glob("*/attempt_*"))
    ]
    return exit_code, attempts


@pytest.fixture
def runs(tmp_path: Path, tiny_model_folder: Path) -> Any:
    """`runs(name)`: the same recipe in a folder of its own."""
    changes: dict[str, Any] = {
        "model": {"path": str(tiny_model_folder), "device": "cpu", "dtype": "float64"},
        "training.max_steps": STEPS,
    }
    return lambda name: TrainingRun(tmp_path / name, data=tmp_path / "data", model=tiny_model_folder, changes=changes)


def assert_ends_as_without_torchrun(run: TrainingRun, runs: Any) -> None:
    """To the bit as two processes that nothing happened to; to rounding as one process."""
    two, one = runs("two"), runs("one")
    assert [outcome.exit_code for outcome in forked().start(*two.command().ranks(2)).wait()] == [0, 0]
    assert_same_run(run, two)
    one.finish()
    for record, wanted in zip(read_metrics(run.metrics), read_metrics(one.metrics), strict=True):
        assert (record["kind"], record["step"]) == (wanted["kind"], wanted["step"])
        assert record["nll"] == pytest.approx(wanted["nll"], rel=1e-9)
    weights = load_file(run.checkpoint(STEPS) / "model.safetensors")
    for name, tensor in load_file(one.checkpoint(STEPS) / "model.safetensors").items():
        assert float((weights[name] - tensor).norm() / tensor.norm()) <= 1e-9, name


def test_two_processes_resume_and_end_as_one(tmp_path: Path, runs: Any) -> None:
    run = runs("torchrun")
    killed = forked().start(*run.command(env={"GOLDSMITH_FAIL_POINT": "checkpoint.rename:4"}).ranks(2)).wait()
    assert killed[0].exit_code == -signal.SIGKILL
    assert 0 < valid_checkpoints(run)[-1] < STEPS
    code, (stderr,) = torchrun(run, tmp_path / "logs")
    assert code == 0, stderr
    assert stderr[1] == ""  # one speaks for all
    assert json.loads((run.output / "environment.json").read_text())["ranks"] == 2
    assert_ends_as_without_torchrun(run, runs)


@pytest.mark.campaign
def test_campaign_a_killed_rank_ends_torchrun_and_the_same_command_resumes(tmp_path: Path, runs: Any) -> None:
    """The other rank does not wait for ever. (`--max-restarts` is not used: plain gloo often fails to meet again.)"""
    run = runs("torchrun")
    code, (stderr,) = torchrun(run, tmp_path / "logs-1", GOLDSMITH_FAIL_POINT="metrics.append:14")
    assert code != 0
    assert "another process ended" in stderr[1]
    assert 0 < valid_checkpoints(run)[-1] < STEPS
    assert not (run.output / "result.json").exists()
    code, (stderr,) = torchrun(run, tmp_path / "logs-2")
    assert code == 0, stderr
    assert_ends_as_without_torchrun(run, runs)
