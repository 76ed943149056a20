"""Several processes: the same losses as one, one set of files, and an end for all of them whatever happens to one.

Each rank writes its own output; what `torchrun` adds is tested in `end_to_end/test_torchrun.py`.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forked import Command, Outcome, forked
from runs import (
    TrainingRun,
    assert_same_run,
    checkpoint_steps,
    read_metrics,
    valid_checkpoints,
)
from safetensors.torch import load_file

from goldsmith.storage import FolderLock

NewRun = Callable[..., TrainingRun]
Reference = Callable[..., TrainingRun]


def run_ranks(run: TrainingRun, number: int, *overrides: str, **keywords: Any) -> list[Outcome]:
    return forked().start(*run.command(*overrides, **keywords).ranks(number)).wait()


@pytest.fixture(scope="module")
def in_float64(small_model_folder: Path) -> dict[str, Any]:
    """Changes of the recipe."""
    return {"model": {"path": str(small_model_folder), "device": "cpu", "dtype": "float64"}, "training.max_steps": 20}


@pytest.fixture(scope="module")
def two_ranks(
    tmp_path_factory: pytest.TempPathFactory, gold_folder: Path, small_model_folder: Path, in_float64: dict[str, Any]
) -> TrainingRun:
    """An uninterrupted run of two processes."""
    run = TrainingRun(
        tmp_path_factory.mktemp("two") / "ranks", data=gold_folder, model=small_model_folder, changes=in_float64
    )
    outcomes = run_ranks(run, 2)
    assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes
    assert json.loads(outcomes[0].stdout)["training"]["steps"] == 20
    assert outcomes[1].stdout == outcomes[1].stderr == ""  # one speaks for all
    return run


def assert_equal_to_rounding(run: TrainingRun, reference: TrainingRun, tolerance: float) -> None:
    records, expected = read_metrics(run.metrics), read_metrics(reference.metrics)
    assert len(records) == len(expected)
    for record, wanted in zip(records, expected, strict=True):
        exact = ["kind", "step", "epoch", "examples", "gold_tokens"]
        exact += ["tokens", "learning_rate"] if record["kind"] == "step" else ["is_best"]
        assert {key: record[key] for key in exact} == {key: wanted[key] for key in exact}
        for key in ("nll", "loss", "grad_norm") if record["kind"] == "step" else ("nll", "nll_per_example"):
            assert record[key] == pytest.approx(wanted[key], rel=tolerance), (record["step"], key)
    lines = [json.loads(line) for line in (run.output / "examples.jsonl").read_text().splitlines()]
    wanted_lines = [json.loads(line) for line in (reference.output / "examples.jsonl").read_text().splitlines()]
    for line, wanted in zip(lines, wanted_lines, strict=True):
        assert line.pop("nll") == pytest.approx(wanted.pop("nll"), rel=tolerance)
        assert line == wanted
    weights = load_file(run.checkpoint(20) / "model.safetensors")
    for name, tensor in load_file(reference.checkpoint(20) / "model.safetensors").items():
        difference = float((weights[name].double() - tensor.double()).norm() / tensor.double().norm())
        assert difference <= tolerance, f"{name}: {difference:.1e}"


def test_two_processes_train_as_one(two_ranks: TrainingRun, reference: Reference, in_float64: dict[str, Any]) -> None:
    """13 rows, 4 a step: every fourth step has one example and so nothing for the second rank; 5 are held out."""
    one = reference(in_float64)
    assert_equal_to_rounding(two_ranks, one, 1e-9)
    steps = [record for record in read_metrics(two_ranks.metrics) if record["kind"] == "step"]
    assert {record["microbatches"] for record in steps if record["examples"] == 1} == {1}
    assert json.loads((two_ranks.output / "environment.json").read_text())["ranks"] == 2
    assert sorted(path.name for path in two_ranks.output.iterdir()) == sorted(
        path.name for path in one.output.iterdir()
    )
    valid_checkpoints(two_ranks)


def test_three_processes_train_as_one(new_run: NewRun, reference: Reference, in_float64: dict[str, Any]) -> None:
    run = new_run(in_float64)
    assert [outcome.exit_code for outcome in run_ranks(run, 3, "training.tokens_per_microbatch=20")] == [0, 0, 0]
    assert_equal_to_rounding(run, reference(in_float64), 1e-9)


def test_a_finished_run_says_so_in_every_process(two_ranks: TrainingRun) -> None:
    outcomes = run_ranks(two_ranks, 2)
    assert [outcome.exit_code for outcome in outcomes] == [0, 0]
    assert json.loads(outcomes[0].stdout)["already_finished"] is True


@pytest.mark.parametrize("stopped", [1])
def test_a_signal_to_one_stops_all_after_the_same_step(
    new_run: NewRun, two_ranks: TrainingRun, in_float64: dict[str, Any], stopped: int
) -> None:
    run = new_run(in_float64)
    running = forked().start(*run.command().ranks(2))
    while not run.metrics.exists() or run.metrics.read_bytes().count(b"\n") < 4:
        time.sleep(0.002)
    running.signal(signal.SIGTERM, stopped)
    outcomes = running.wait()
    assert [outcome.exit_code for outcome in outcomes] == [75, 75], outcomes
    last = valid_checkpoints(run)[-1]
    assert 3 <= last < 20
    for outcome in outcomes:
        assert f"after step {last} of 20" in outcome.stderr
    assert [outcome.exit_code for outcome in run_ranks(run, 2)] == [0, 0]
    assert_same_run(run, two_ranks, newest_checkpoint_only=True)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_and_the_run_resumes(
    new_run: NewRun, two_ranks: TrainingRun, in_float64: dict[str, Any], victim: int
) -> None:
    run = new_run(in_float64)
    running = forked().start(*run.command().ranks(2))
    while len(checkpoint_steps(run)) < 2:
        time.sleep(0.002)
    running.signal(signal.SIGKILL, victim)
    outcomes = running.wait(30)
    assert outcomes[victim].exit_code == -signal.SIGKILL
    assert outcomes[1 - victim].exit_code == 7, outcomes[1 - victim].stderr
    assert "another process ended" in outcomes[1 - victim].stderr
    assert "Traceback" not in outcomes[1 - victim].stderr
    assert valid_checkpoints(run)
    assert [outcome.exit_code for outcome in run_ranks(run, 2)] == [0, 0]
    assert_same_run(run, two_ranks)


def test_another_number_of_processes_is_said_on_resume(
    new_run: NewRun, reference: Reference, in_float64: dict[str, Any]
) -> None:
    run = new_run(in_float64)
    assert run.train_dying_at("checkpoint.renamed:3").exit_code == -signal.SIGKILL
    outcomes = run_ranks(run, 2)
    assert [outcome.exit_code for outcome in outcomes] == [0, 0]
    assert "ranks: 1 when the run began, 2 now" in outcomes[0].stderr
    assert_equal_to_rounding(run, reference(in_float64), 1e-9)


# --- errors: each process ends with the code of the table, without a traceback


def assert_refused(outcomes: list[Outcome], codes: list[int], *words: str) -> None:
    assert [outcome.exit_code for outcome in outcomes] == codes, outcomes
    for outcome in outcomes:
        assert "Traceback" not in outcome.stderr
    for word in words:
        assert word in outcomes[0].stderr


def test_a_folder_in_use(new_run: NewRun) -> None:
    run = new_run()
    with FolderLock(run.output):
        assert_refused(run_ranks(run, 2), [7, 7], "in use")


def test_another_recipe(two_ranks: TrainingRun) -> None:
    assert_refused(run_ranks(two_ranks, 2, "training.batch_size=3"), [7, 7], "training.batch_size")


def test_bad_data(new_run: NewRun) -> None:
    run = new_run()
    assert_refused(run_ranks(run, 2, "data.max_length=3"), [3, 3], "longer than max_length")
    assert not run.output.exists()


def test_a_full_disk(new_run: NewRun) -> None:
    run = new_run()
    outcomes = run_ranks(run, 2, env={"GOLDSMITH_FAIL_POINT": "checkpoint.model:2!enospc"})
    assert_refused(outcomes, [7, 7], "the disk is full")
    assert [outcome.exit_code for outcome in run_ranks(run, 2)] == [0, 0]


# --- choices are made once


def test_a_tokenizer_is_learnt_by_one_process(new_run: NewRun) -> None:
    """Unigram training is not deterministic: two processes would learn two."""
    changes = {
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
        "tokenizer": {"train": {"kind": "unigram", "vocab_size": 300}},
        "data.max_length": 64,
        "training.max_steps": 2,
    }
    run = new_run(changes)
    script = """
import os, sys
from goldsmith import load_recipe, train
from goldsmith.data.tokenizer import train_tokenizer

def learn(*arguments, **keywords):
    assert os.environ["RANK"] == "0", "learnt a second time"
    print("learnt")
    return train_tokenizer(*arguments, **keywords)

for module in list(sys.modules.values()):
    if module.__name__.startswith("goldsmith.workflows") and hasattr(module, "train_tokenizer"):
        module.train_tokenizer = learn
train(load_recipe("recipe.yaml"), quiet=True)
"""
    command = replace(run.command(), script=script)
    outcomes = forked().start(*command.ranks(2)).wait()
    assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes
    assert [outcome.stdout for outcome in outcomes] == ["learnt\n", ""]
    assert (run.output / "model" / "tokenizer.json").is_file()
    assert not list(run.output.glob(".*.tmp"))


def test_the_number_of_steps_that_fit_a_time_is_agreed(new_run: NewRun) -> None:
    run = new_run({"training.max_steps": 1000, "training.max_seconds": 0.3})
    outcomes = run_ranks(run, 2)
    assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes
    result = json.loads(outcomes[0].stdout)
    assert 1 <= result["training"]["steps"] < 1000
    assert f"max_steps: {result['training']['steps']}\n" in (run.output / "recipe.yaml").read_text()


def test_from_python_rows_in_memory_are_shared_out_too(new_run: NewRun, reference: Reference) -> None:
    run = new_run()
    script = """
import json
from goldsmith import load_recipe, train
recipe = load_recipe("recipe.yaml")
rows = [[json.loads(line) for line in open(sources[0].path)] for sources in (recipe.data.train, recipe.data.eval)]
train(recipe, train_rows=(row for row in rows[0]), eval_rows=iter(rows[1]), quiet=True)
"""
    outcomes = forked().start(*Command(script=script, cwd=run.folder).ranks(2)).wait()
    assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes
    for record, wanted in zip(read_metrics(run.metrics), read_metrics(reference().metrics), strict=True):
        assert record["nll"] == pytest.approx(wanted["nll"], rel=1e-4)


def test_sources_and_weights_of_tokens_are_summed_over_processes(
    new_run: NewRun, in_float64: dict[str, Any], tmp_path: Path
) -> None:
    """Three sources of which a step may hold one alone, each token with a weight of its own, and rows that count otherwise."""
    sources = []
    for place, name in enumerate("abc"):
        path = tmp_path / f"{name}.jsonl"
        with path.open("w") as file:
            for number in range(3 + 2 * place):
                length = 4 + (5 * number + place) % 9
                ids = [3 + (7 * number + 11 * place + token) % 80 for token in range(length)]
                weights = [0.0, *(0.25 * (1 + (token + place) % 5) for token in range(length - 1))]
                row = {"id": f"{name}{number}", "token_ids": ids, "target_weights": weights}
                file.write(json.dumps(row) + "\n")
        sources.append({"path": str(path), "name": name, "weight": 1.0 + place})
    changes = {
        **in_float64,
        "data": {"train": sources, "eval": [dict(source) for source in sources]},
        "evaluation": {"every_steps": 5},
    }
    runs = [new_run(changes, name="one"), new_run(changes, name="two")]
    runs[0].finish()
    outcomes = run_ranks(runs[1], 2)
    assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes
    assert_equal_to_rounding(runs[1], runs[0], 1e-9)
    records, expected = (read_metrics(run.metrics) for run in (runs[1], runs[0]))
    assert {len(record["nll_by_source"]) for record in expected} >= {2, 3}
    for record, wanted in zip(records, expected, strict=True):
        assert record["nll_by_source"] == pytest.approx(wanted["nll_by_source"], rel=1e-9)
    assert len({round(nll, 3) for nll in expected[0]["nll_by_source"].values()}) == 3
