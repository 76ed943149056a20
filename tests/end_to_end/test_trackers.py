"""`trackers:` from a recipe to the tracker: the records of metrics.jsonl, before and after a resume, and no run lost to a fault."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import goldsmith
from goldsmith import distributed
from goldsmith.errors import ConfigError
from goldsmith.recipe import Recipe
from goldsmith.training import trainer
from goldsmith.training.trackers import config as tracker_config

GOLD = [{"prompt": f"{number} + 1 = ", "completion": str(number + 1)} for number in range(8)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int | None, dict[str, float]]]:
    """What a trackio that remembers is told."""
    rows: list[tuple[int | None, dict[str, float]]] = []

    def log(metrics: dict[str, float], step: int | None = None) -> None:
        if "fail" in rows:
            raise RuntimeError("the server is gone")
        rows.append((step, metrics))

    module = ModuleType("trackio")
    module.__spec__ = ModuleSpec("trackio", None, origin="a file")
    module.init = lambda **_: SimpleNamespace(log=log, finish=lambda: None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", module)
    return rows


@pytest.fixture
def recipe(tiny_model_folder: Path, tmp_path: Path) -> Callable[..., Recipe]:
    for name, rows in (("train", GOLD), ("eval", GOLD[:2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**changes: Any) -> Recipe:
        values: dict[str, Any] = {
            "model": {"path": str(tiny_model_folder), "device": "cpu"},
            "data": {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")},
            "training": {"max_steps": 3, "batch_size": 4, "log_update_ratio_every": 1},
            "report": {"examples": 0},
            "output_dir": str(tmp_path / "run"),
        }
        return Recipe.from_mapping({**values, **changes})

    return make


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_tracker_is_told_what_is_written(recipe: Callable[..., Recipe], told: list[Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="waits for tensorboard (extra `tensorboard`)")
    goldsmith.train(recipe(trackers=["trackio", "tensorboard"]), quiet=True)
    lines = metrics(tmp_path / "run")
    assert [number for number, _ in told] == [line["step"] for line in lines]
    for line, (_, numbers) in zip(lines, told, strict=True):
        prefix = "train" if line["kind"] == "step" else "eval"
        assert numbers[f"{prefix}/nll"] == line["nll"]
    assert told[1][1]["train/update_to_weight/layer 1"] == lines[1]["update_to_weight"]["layer 1"]
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_a_tracker_may_come_and_go_and_its_faults_end_no_run(
    recipe: Callable[..., Recipe], told: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a tracker, killed before the result; then with one that fails at its first record."""
    from goldsmith.workflows import run

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run.Trainer, "result", killed)
        with pytest.raises(KeyboardInterrupt):
            goldsmith.train(recipe(checkpoint={"every_steps": 2}), quiet=True)
    before = metrics(tmp_path / "run")
    told.append("fail")
    result = goldsmith.train(
        recipe(checkpoint={"every_steps": 2}, trackers=[{"name": "trackio", "project": "other"}]), quiet=True
    )
    assert result.training.steps == 3
    after = metrics(tmp_path / "run")
    assert [line["nll"] for line in after] == [line["nll"] for line in before]
    assert told == ["fail"]


def test_other_ranks_tell_nothing(
    recipe: Callable[..., Recipe], told: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(trainer, "read_evaluations", lambda path: [])  # the main process writes them
    assert goldsmith.train(recipe(trackers=["trackio"]), quiet=True).training.steps == 3
    assert told == []
    assert not (tmp_path / "run" / "trackers.json").exists()


def test_a_tracker_that_is_not_installed_is_said_before_training(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_config, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="trackers: mlflow is not installed"):
        goldsmith.train(recipe(trackers=["mlflow"]), quiet=True)
    assert not (tmp_path / "run").exists()
