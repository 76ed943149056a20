"""wandb (offline), mlflow and trackio themselves, where they are installed: what they wrote is read back."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import goldsmith
from goldsmith import storage
from goldsmith.errors import MachineError
from goldsmith.recipe import Recipe
from goldsmith.records import StepRecord
from goldsmith.training.trackers.config import MlflowConfig, TrackerConfig, TrackioConfig, WandbConfig
from goldsmith.training.trackers.following import Following
from goldsmith.training.trackers.protocol import RunFacts, read_identity

# name -> step -> values that were told of it; each is to be told once.
Told = dict[str, dict[int, list[float]]]

GOLD = [{"prompt": f"{number} + 1 = ", "completion": str(number + 1)} for number in range(8)]
STEP = StepRecord(
    step=1,
    epoch=0,
    examples=4,
    tokens=50,
    gold_tokens=20,
    microbatches=1,
    shared_tokens=0,
    nll=1.0,
    loss=1.0,
    learning_rate=1e-3,
    grad_norm=2.0,
    update_to_weight={"layer 3": 0.01},
    seconds=0.5,
    tokens_per_second=100.0,
    peak_memory_bytes=1000,
    tokens_per_microbatch=64,
)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """One thread, and nothing of the user's own settings."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb-own"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["wandb", "mlflow", "trackio"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> TrackerConfig:
    """Each tracker, on this machine only."""
    name = request.param
    pytest.importorskip(name, reason=f"waits for {name} (extra `{name}`)")
    if name == "mlflow":
        pytest.importorskip("sqlalchemy", reason="waits for mlflow whole: mlflow-skinny speaks to a server only")
        return MlflowConfig(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    return WandbConfig(mode="offline") if name == "wandb" else TrackioConfig()


def read_back(config: TrackerConfig, folder: Path) -> Told:
    """What the tracker's own files hold of the run in `folder`."""
    identity = read_identity(folder, config.name)
    told: Told = {}

    def add(name: str, number: int, value: float) -> None:
        if name.startswith(("train/", "eval/")):
            told.setdefault(name, {}).setdefault(number, []).append(float(value))

    if isinstance(config, WandbConfig):
        for path in sorted((folder / "wandb").glob(f"offline-run-*/run-{identity['id']}.wandb")):
            for number, values in wandb_history(path):
                for name, value in values.items():
                    if name.startswith(("train/", "eval/")):
                        add(name, number, value)
    elif isinstance(config, MlflowConfig):
        import mlflow

        client: Any = mlflow.MlflowClient(tracking_uri=config.tracking_uri)
        run_id = str(identity["run_id"])
        for name in client.get_run(run_id).data.metrics:
            for metric in client.get_metric_history(run_id, name):
                add(name, metric.step, metric.value)
    else:
        from trackio.sqlite_storage import SQLiteStorage

        assert isinstance(config, TrackioConfig)
        for row in SQLiteStorage.get_logs(config.project, str(identity["name"])):
            for name, value in row.items():
                if isinstance(value, int | float):
                    add(name, row["step"], value)
    return told


def wandb_history(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Rows of a `.wandb` file: records in the blocks of LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            record: Any = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                yield record.history.step.num, {name: json.loads(value) for name, value in items.items()}


def test_a_run_that_was_stopped_is_told_once(
    config: TrackerConfig, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GOLD))
    recipe = Recipe.from_mapping(
        {
            "model": {"path": str(tiny_model_folder), "device": "cpu"},
            "data": {"train": str(tmp_path / "gold.jsonl"), "eval": str(tmp_path / "gold.jsonl")},
            "training": {"max_steps": 4, "batch_size": 4, "log_update_ratio_every": 1},
            "evaluation": {"every_steps": 2},
            "checkpoint": {"every_steps": 1},
            "report": {"examples": 0},
            "trackers": [config.model_dump()],
            "output_dir": str(tmp_path / "run"),
        }
    )
    # The disk is full at the checkpoint of step 3: the step was told, and is done again.
    monkeypatch.setenv("GOLDSMITH_FAIL_POINT", "checkpoint.begin:3!enospc")
    storage._passings.clear()
    with pytest.raises(MachineError, match="disk is full"):
        goldsmith.train(recipe, quiet=True)
    monkeypatch.delenv("GOLDSMITH_FAIL_POINT")
    storage._passings.clear()
    goldsmith.train(recipe, quiet=True)

    told = read_back(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4]
    # What a step took is another number the second time.
    exact = {"nll", "loss", "learning_rate", "grad_norm", "gold_tokens", "is_best", "update_to_weight"}
    for line in lines:
        prefix = "train" if line["kind"] == "step" else "eval"
        for key in exact & line.keys():
            values = {f"/{inner}": value for inner, value in line[key].items()} if key == "update_to_weight" else None
            for inner, value in (values or {"": line[key]}).items():
                assert told[f"{prefix}/{key}{inner}"][line["step"]] == [pytest.approx(float(value))], key
    assert set(told["train/seconds"]) == {1, 2, 3, 4}
    assert all(len(values) == 1 for steps in told.values() for values in steps.values())


def test_numbers_that_are_none(config: TrackerConfig, tmp_path: Path) -> None:
    """The run stops at a loss that is not finite; a measure that is not finite does not stop its tracker."""
    notes: list[str] = []
    (tmp_path / "run").mkdir()
    facts = RunFacts(name=f"run-{tmp_path.name}", folder=tmp_path / "run", settings={"optimizer.eps": math.nan})
    following = Following.of([config], facts)
    following.start(resumed_from=0, note=notes.append)
    ratios = {"layer 3": math.inf, "embedding": math.nan}
    following.log(replace(STEP, update_to_weight=ratios))
    following.log(replace(STEP, step=2))
    following.finish(None)
    assert notes == []
    told = read_back(config, tmp_path / "run")
    assert set(told["train/nll"]) == {1, 2}
    assert told["train/update_to_weight/layer 3"][2] == [0.01]
    # Either left out, or shown as what it is (mlflow keeps the largest number for an infinity).
    shown = told["train/update_to_weight/layer 3"].get(1, [math.inf])[0]
    assert shown > 1e300
