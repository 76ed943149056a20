"""Each adapter: tensorboard for real; the others against modules that know the documented calls and no other.

The libraries themselves are in `tests/end_to_end/test_tracker_libraries.py`, where they are installed.

The signatures of the fakes are those of wandb 0.31, mlflow 3.17 and trackio 0.43, as far as the adapters use them: an argument
that the library does not know is a TypeError here, too.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from goldsmith.records import EvaluationRecord, StepRecord
from goldsmith.training.trackers.config import MlflowConfig, TrackioConfig, WandbConfig
from goldsmith.training.trackers.mlflow import MlflowTracker
from goldsmith.training.trackers.protocol import RunFacts, Tracker, read_identity, scalars
from goldsmith.training.trackers.tensorboard import TensorboardTracker
from goldsmith.training.trackers.trackio import TrackioTracker
from goldsmith.training.trackers.wandb import WandbTracker
from goldsmith.training.trainer import TrainingResult

RESULT = TrainingResult(
    steps=4, nll_before=2.0, nll_after=1.0, best_step=4, best_nll=1.0, stopped_early=False, seconds=1.0
)


def step(number: int) -> StepRecord:
    return StepRecord(
        step=number,
        epoch=0,
        examples=4,
        tokens=50,
        gold_tokens=20,
        microbatches=1,
        shared_tokens=0,
        nll=1.0 / number,
        loss=1.0,
        learning_rate=1e-3,
        grad_norm=2.0,
        update_to_weight={"layer 3": 0.01},
        seconds=0.5,
        tokens_per_second=100.0,
        peak_memory_bytes=1000,
        tokens_per_microbatch=64,
    )


def evaluation(after: int) -> EvaluationRecord:
    return EvaluationRecord(
        step=after,
        epoch=0,
        examples=3,
        gold_tokens=9,
        nll=2.0 - after / 10,
        nll_per_example=1.5,
        is_best=True,
        seconds=0.1,
        tokens_per_second=90.0,
    )


@pytest.fixture
def facts(tmp_path: Path) -> RunFacts:
    return RunFacts(name="french", folder=tmp_path, settings={"optimizer.learning_rate": 1e-3, "adapter": None})


def killed_and_resumed(make: Any, facts: RunFacts) -> Tracker:
    """Steps 1 to 3, killed without a word with the checkpoint of step 2, and steps 3 and 4 of the run that goes on."""
    first = make()
    first.start(facts)
    for record in (evaluation(0), step(1), step(2), evaluation(2), step(3)):
        first.log(record)
    getattr(getattr(first, "_writer", None), "flush", lambda: None)()
    second: Tracker = make()
    second.start(replace(facts, resumed_from=2))
    for record in (step(3), step(4), evaluation(4)):
        second.log(record)
    second.finish(RESULT)
    return second


# --- tensorboard, the library itself


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_each_step_once(facts: RunFacts) -> None:
    pytest.importorskip("tensorboard", reason="waits for tensorboard (extra `tensorboard`)")
    killed_and_resumed(TensorboardTracker, facts)
    events = read_events(facts.folder)
    assert events["train/nll"] == [(number, pytest.approx(1.0 / number)) for number in (1, 2, 3, 4)]
    assert events["eval/nll"] == [(number, pytest.approx(2.0 - number / 10)) for number in (0, 2, 4)]
    assert events["train/update_to_weight/layer_3"][0] == (1, pytest.approx(0.01))


def test_tensorboard_begins_again_where_there_was_no_checkpoint(facts: RunFacts) -> None:
    pytest.importorskip("tensorboard", reason="waits for tensorboard (extra `tensorboard`)")
    for _ in range(2):
        tracker = TensorboardTracker()
        tracker.start(facts)
        for record in (evaluation(0), step(1)):
            tracker.log(record)
        tracker.finish(None)
    events = read_events(facts.folder)
    assert ([number for number, _ in events["train/nll"]], [number for number, _ in events["eval/nll"]]) == ([1], [0])


# --- wandb


class FakeWandb(ModuleType):
    """Runs by id; what one process tells of a step is one row, and another process begins anew, as wandb does offline."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: dict[str, SimpleNamespace] = {}

    def init(
        self,
        entity: str | None = None,
        project: str | None = None,
        dir: str | None = None,
        id: str | None = None,
        name: str | None = None,
        tags: Any = None,
        config: dict[str, Any] | None = None,
        allow_val_change: bool | None = None,
        group: str | None = None,
        mode: str | None = None,
        resume: str | None = None,
    ) -> Any:
        assert id is not None
        assert resume == "allow"
        run = self.runs.setdefault(id, SimpleNamespace(processes=[], exit_codes=[], arguments=[]))
        rows: dict[int, dict[str, Any]] = {}
        run.processes.append(rows)
        run.arguments.append({"project": project, "name": name, "mode": mode, "dir": dir, "config": config})

        def log(data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
            assert step is not None
            if step >= max(rows, default=0):
                rows.setdefault(step, {}).update(data)

        return SimpleNamespace(log=log, finish=lambda exit_code=None: run.exit_codes.append(exit_code))


def test_wandb_goes_on_with_its_run(facts: RunFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = WandbConfig(project="legal", mode="offline")
    killed_and_resumed(lambda: WandbTracker(config), facts)
    ((run_id, run),) = fake.runs.items()
    assert read_identity(facts.folder, "wandb") == {"id": run_id, "train": 4, "eval": 4}
    assert [sorted(rows) for rows in run.processes] == [[0, 1, 2, 3], [4]]
    # A step and the evaluation after it are one row.
    assert run.processes[0][2] == {**scalars(step(2)), **scalars(evaluation(2))}
    assert run.exit_codes == [0]
    assert len(run.arguments) == 2
    assert run.arguments[0] == {
        "project": "legal",
        "name": "french",
        "mode": "offline",
        "dir": str(facts.folder),
        "config": {"optimizer.learning_rate": 1e-3, "adapter": None},
    }


def test_wandb_is_told_of_a_run_that_was_cut_off(facts: RunFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = WandbTracker(WandbConfig())
    tracker.start(facts)
    tracker.finish(None)
    assert next(iter(fake.runs.values())).exit_codes == [1]


# --- mlflow


class FakeMlflowClient:
    """Appends whatever it is told; parameters are written once."""

    runs: dict[str, SimpleNamespace]
    experiments: dict[str, str]

    def __init__(self, tracking_uri: str | None = None) -> None:
        self.tracking_uri = tracking_uri

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        return self.experiments.setdefault(name, str(len(self.experiments)))

    def create_run(self, experiment_id: str, run_name: str | None = None) -> Any:
        run_id = f"run{len(self.runs)}"
        self.runs[run_id] = SimpleNamespace(
            name=run_name, experiment=experiment_id, metrics=[], params={}, status=["RUNNING"], batches=[]
        )
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def update_run(self, run_id: str, status: str | None = None, name: str | None = None) -> None:
        self.runs[run_id].status.append(status)

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        run = self.runs[run_id]
        assert len(params) <= 100  # the server's own limit
        for key, value in params:
            assert key not in run.params
            run.params[key] = value
        run.metrics += metrics
        run.batches.append(len(params) + len(metrics))

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        return [metric for metric in self.runs[run_id].metrics if metric.key == key]

    def set_terminated(self, run_id: str, status: str | None = None) -> None:
        self.runs[run_id].status.append(status)


@pytest.fixture
def fake_mlflow(monkeypatch: pytest.MonkeyPatch) -> type[FakeMlflowClient]:
    mlflow, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
    client = type("Client", (FakeMlflowClient,), {"runs": {}, "experiments": {}})
    mlflow.MlflowClient = client  # type: ignore[attr-defined]
    entities.Metric = lambda key, value, timestamp, step: SimpleNamespace(  # type: ignore[attr-defined]
        key=key, value=value, timestamp=timestamp, step=step
    )
    entities.Param = lambda key, value: (key, value)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    return client


def test_mlflow_is_told_each_step_once(facts: RunFacts, fake_mlflow: type[FakeMlflowClient]) -> None:
    killed_and_resumed(lambda: MlflowTracker(MlflowConfig(experiment="legal")), facts)
    ((run_id, run),) = fake_mlflow.runs.items()
    assert (run.name, run.experiment, fake_mlflow.experiments) == ("french", "0", {"legal": "0"})
    assert read_identity(facts.folder, "mlflow") == {"run_id": run_id}
    told = Counter((metric.key, metric.step) for metric in run.metrics)
    assert set(told.values()) == {1}
    assert sorted(number for key, number in told if key == "train/nll") == [1, 2, 3, 4]
    assert sorted(number for key, number in told if key == "eval/nll") == [0, 2, 4]
    assert run.params == {"optimizer.learning_rate": "0.001", "adapter": "None"}
    assert run.status == ["RUNNING", "RUNNING", "FINISHED"]


def test_mlflow_takes_many_settings_in_parts(facts: RunFacts, fake_mlflow: type[FakeMlflowClient]) -> None:
    many = replace(facts, settings={f"key.{number}": "x" * 7000 for number in range(230)})
    for _ in range(2):  # the second run finds the experiment
        tracker = MlflowTracker(MlflowConfig(run_name="mine"))
        tracker.start(many)
        tracker.finish(None)
        (facts.folder / "trackers.json").unlink()
    first, second = fake_mlflow.runs.values()
    assert first.batches == second.batches == [100, 100, 30]
    assert {len(value) for value in first.params.values()} == {6000}
    assert (first.name, first.status) == ("mine", ["RUNNING", "KILLED"])
    assert len(fake_mlflow.experiments) == 1


# --- trackio


class FakeTrackio(ModuleType):
    """Runs by name; appends whatever it is told."""

    def __init__(self) -> None:
        super().__init__("trackio")
        self.runs: dict[str, SimpleNamespace] = {}

    def init(
        self,
        project: str,
        name: str | None = None,
        space_id: str | None = None,
        config: dict[str, Any] | None = None,
        resume: str = "never",
        embed: bool = True,
    ) -> Any:
        assert resume == "allow"
        assert name is not None
        run = self.runs.setdefault(name, SimpleNamespace(rows=[], project=project, config=config, finished=0))

        def finish() -> None:
            run.finished += 1

        return SimpleNamespace(log=lambda metrics, step=None: run.rows.append((step, metrics)), finish=finish)


def test_trackio_is_told_each_step_once(facts: RunFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    killed_and_resumed(lambda: TrackioTracker(TrackioConfig()), facts)
    ((name, run),) = fake.runs.items()
    assert name.startswith("french-")
    assert [(number, "train/nll" in metrics) for number, metrics in run.rows] == [
        (0, False),
        (1, True),
        (2, True),
        (2, False),
        (3, True),
        (4, True),
        (4, False),
    ]
    assert (run.project, run.finished) == ("goldsmith", 1)
    # Another run in a folder of the same name is another run.
    (facts.folder / "trackers.json").unlink()
    TrackioTracker(TrackioConfig()).start(facts)
    assert len(fake.runs) == 2
