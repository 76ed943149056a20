"""The protocol with a tracker that remembers: what it is told, when, and that its faults stay its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from goldsmith.records import EvaluationRecord, StepRecord
from goldsmith.training.trackers.following import Following
from goldsmith.training.trackers.protocol import RunFacts, read_identity, scalars, write_identity

STEP = StepRecord(
    step=7,
    epoch=1,
    examples=4,
    tokens=50,
    gold_tokens=20,
    microbatches=2,
    shared_tokens=0,
    nll=1.5,
    loss=1.6,
    learning_rate=1e-3,
    grad_norm=2.0,
    update_to_weight={"layer 3": 0.01, "embedding": 0.02},
    seconds=0.5,
    tokens_per_second=100.0,
    peak_memory_bytes=1000,
    tokens_per_microbatch=64,
    nll_by_source={"poems": 1.25},
)
EVALUATION = EvaluationRecord(
    step=7,
    epoch=1,
    examples=3,
    gold_tokens=9,
    nll=0.5,
    nll_per_example=1.5,
    is_best=True,
    seconds=0.1,
    tokens_per_second=90.0,
)


class Remembering:
    """A tracker that keeps what it is told, prints, and raises where it is asked to."""

    def __init__(self, fails_at: str = "") -> None:
        self.told: list[Any] = []
        self.fails_at = fails_at

    def _note(self, name: str, what: Any) -> None:
        print("a tracker that prints")
        if name == self.fails_at:
            raise OSError("no\nroute to host")
        self.told.append((name, what))

    def start(self, facts: RunFacts) -> None:
        self._note("start", facts)

    def log(self, record: StepRecord | EvaluationRecord) -> None:
        self._note("log", record)

    def finish(self, result: Any) -> None:
        self._note("finish", result)


@pytest.fixture
def facts(tmp_path: Path) -> RunFacts:
    return RunFacts(name="french", folder=tmp_path, settings={"training.seed": 0})


def test_scalars_are_the_numbers_of_the_record() -> None:
    numbers = scalars(STEP)
    assert numbers["train/nll"] == 1.5
    assert numbers["train/update_to_weight/layer 3"] == 0.01
    assert numbers["train/nll_by_source/poems"] == 1.25
    assert not {"train/step", "train/kind"} & set(numbers)
    # Every number of the line in metrics.jsonl, and nothing else.
    written = json.loads(json.dumps(STEP.to_json()))
    del written["step"], written["kind"]
    assert len(numbers) == sum(len(value) if isinstance(value, dict) else 1 for value in written.values())
    assert scalars(EVALUATION)["eval/nll"] == 0.5
    assert all(type(number) is float for number in {**numbers, **scalars(EVALUATION)}.values())


def test_told_in_order_and_finished_once(facts: RunFacts, capsys: pytest.CaptureFixture[str]) -> None:
    tracker, notes = Remembering(), list[str]()
    following = Following({"one": tracker}, facts)
    following.start(resumed_from=6, note=notes.append)
    following.log(STEP)
    following.log(EVALUATION)
    following.finish(None)
    following.finish(None)
    assert tracker.told == [
        ("start", replace(facts, resumed_from=6)),
        ("log", STEP),
        ("log", EVALUATION),
        ("finish", None),
    ]
    assert notes == []
    assert capsys.readouterr().out == ""  # standard output is the command's own


@pytest.mark.parametrize("fails_at", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_named_once_and_off(facts: RunFacts, fails_at: str) -> None:
    failing, whole, notes = Remembering(fails_at), Remembering(), list[str]()
    following = Following({"failing": failing, "whole": whole}, facts)
    following.start(resumed_from=0, note=notes.append)
    following.log(STEP)
    following.log(EVALUATION)
    following.finish(None)
    assert len(notes) == 1
    assert notes[0].startswith("tracker failing: OSError: no route to host; it is off")
    assert [name for name, _ in failing.told] == {"start": [], "log": ["start"], "finish": ["start", "log", "log"]}[
        fails_at
    ]
    assert [name for name, _ in whole.told] == ["start", "log", "log", "finish"]


@pytest.mark.parametrize("durable", [True, False])
def test_identities_stand_side_by_side(tmp_path: Path, durable: bool) -> None:
    assert read_identity(tmp_path, "wandb") == {}
    write_identity(tmp_path, "wandb", {"id": "a1"}, durable=durable)
    write_identity(tmp_path, "mlflow", {"run_id": "b2"}, durable=durable)
    write_identity(tmp_path, "wandb", {"id": "c3"}, durable=durable)
    assert (read_identity(tmp_path, "wandb"), read_identity(tmp_path, "mlflow")) == ({"id": "c3"}, {"run_id": "b2"})
    assert [path.name for path in tmp_path.iterdir()] == ["trackers.json"]
