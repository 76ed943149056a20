"""`torchrun`, as users start it: killed in the middle and started again, it ends where one process ends.

What happens between the ranks is tested without it, and faster, in `faults/test_ranks.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forked import SOURCE, forked
from runs import TrainingRun, assert_same_run, read_metrics, valid_checkpoints
from safetensors.torch import load_file


def torchrun(run: TrainingRun, logs: Path, **env: str) -> tuple[int, dict[int, str]]:
    """Its exit code, and what each rank wrote to its own file of standard error."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["--redirects", "3", "--log-dir", str(logs), "-m", "goldsmith.cli", *map(str, run.command().arguments)]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", **env}
    ended = subprocess.run(words, cwd=run.folder, env=environment, capture_output=True, timeout=180, check=False)
    (attempt,) = logs.glob("*/attempt_0")
    return ended.returncode, {rank: (attempt / str(rank) / "stderr.log").read_text() for rank in (0, 1)}


def test_killed_and_started_again(tmp_path: Path, tiny_model_folder: Path) -> None:
    changes: dict[str, Any] = {
        "model": {"path": str(tiny_model_folder), "device": "cpu", "dtype": "float64"},
        "training.max_steps": 16,
    }
    data = tmp_path / "data"
    run = TrainingRun(tmp_path / "torchrun", data=data, model=tiny_model_folder, changes=changes)

    # One process dies; the other does not wait for it for ever.
    code, stderr = torchrun(run, tmp_path / "logs-1", GOLDSMITH_FAIL_POINT="checkpoint.rename:4")
    assert code != 0
    assert "Traceback" not in stderr[1]
    (*_, last) = valid_checkpoints(run)
    assert 0 < last < 16
    assert not (run.output / "result.json").exists()

    code, stderr = torchrun(run, tmp_path / "logs-2")
    assert code == 0, stderr
    assert stderr[1] == ""  # one speaks for all
    assert json.loads((run.output / "environment.json").read_text())["ranks"] == 2

    # To the bit as two processes that nothing happened to; to rounding as one process.
    two = TrainingRun(tmp_path / "two", data=data, model=tiny_model_folder, changes=changes)
    assert [outcome.exit_code for outcome in forked().start(*two.command().ranks(2)).wait()] == [0, 0]
    assert_same_run(run, two)
    one = TrainingRun(tmp_path / "one", data=data, model=tiny_model_folder, changes=changes)
    one.finish()
    for record, wanted in zip(read_metrics(run.metrics), read_metrics(one.metrics), strict=True):
        assert (record["kind"], record["step"]) == (wanted["kind"], wanted["step"])
        assert record["nll"] == pytest.approx(wanted["nll"], rel=1e-9)
    weights = load_file(run.checkpoint(16) / "model.safetensors")
    for name, tensor in load_file(one.checkpoint(16) / "model.safetensors").items():
        assert tensor.dtype.is_floating_point
        assert float((weights[name] - tensor).norm() / tensor.norm()) <= 1e-9, name
