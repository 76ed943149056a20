"""Memory that does not suffice, on one of several processes too; and what a resumed run may change about memory."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forked import Outcome, forked
from runs import TrainingRun, assert_same_run, read_metrics, without_measures
from safetensors.torch import load_file

NewRun = Callable[..., TrainingRun]
Reference = Callable[..., TrainingRun]

# `goldsmith train` on a machine where training has room for so many tokens at a time in one process.
SCRIPT = """
import os, sys
import torch
from goldsmith.cli import main
from goldsmith.models.likelihood import LikelihoodModel

own = LikelihoodModel.forward

def forward(self, batch, *arguments):
    if os.environ.get("RANK", "0") == "{rank}" and torch.is_grad_enabled() and batch.num_tokens > {tokens}:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return own(self, batch, *arguments)

LikelihoodModel.forward = forward
sys.argv = ["goldsmith", "train", "recipe.yaml"]
code = 0
try:
    main()
except SystemExit as ended:
    code = ended.code or 0
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""


def train_in(run: TrainingRun, *, rank: int, tokens: int, ranks: int = 2) -> list[Outcome]:
    script = SCRIPT.replace("{rank}", str(rank)).replace("{tokens}", str(tokens))
    command = replace(run.command(), script=script)
    return forked().start(*command.ranks(ranks)).wait()


@pytest.fixture
def in_float64(small_model_folder: Path) -> dict[str, Any]:
    """Changes of the recipe: a step is one micro-batch a process."""
    model = {"path": str(small_model_folder), "device": "cpu", "dtype": "float64"}
    return {"model": model, "training.max_steps": 6, "training.tokens_per_microbatch": 1000}


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_out_of_memory_cuts_the_step_of_all(
    new_run: NewRun, reference: Reference, in_float64: dict[str, Any], rank: int
) -> None:
    """The other one has its gradients by then, and waits for the sum."""
    run = new_run(in_float64)
    outcomes = train_in(run, rank=rank, tokens=24)
    assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes
    assert "out of memory: training.tokens_per_microbatch 1,000 -> " in outcomes[0].stderr
    assert "out of memory" not in outcomes[1].stderr  # one speaks for all
    records, expected = read_metrics(run.metrics), read_metrics(reference(in_float64).metrics)
    budgets = [record["tokens_per_microbatch"] for record in records if record["kind"] == "step"]
    assert budgets[-1] < 1000
    assert budgets == sorted(budgets, reverse=True)
    for record, wanted in zip(records, expected, strict=True):
        assert record["nll"] == pytest.approx(wanted["nll"], rel=1e-9)
    state = json.loads((run.checkpoint(6) / "state.json").read_text())
    assert (state["halved_tokens_per_microbatch"], state["halved_from"]) == (budgets[-1], 1000)


def test_a_row_that_does_not_fit_ends_every_process(new_run: NewRun, in_float64: dict[str, Any]) -> None:
    run = new_run(in_float64)
    outcomes = train_in(run, rank=1, tokens=4)
    assert [outcome.exit_code for outcome in outcomes] == [7, 7], outcomes
    for outcome in outcomes:
        assert "a single row does not fit: t" in outcome.stderr
        assert "train.jsonl:" in outcome.stderr
        assert "Traceback" not in outcome.stderr


def test_the_choice_is_made_once_and_kept(new_run: NewRun, reference: Reference) -> None:
    """Layers computed again give the same run to the bit, here and after a resume."""
    run = new_run({"training.memory_limit": "1 KB"})
    assert run.train_dying_at("checkpoint.renamed:2").exit_code == -signal.SIGKILL
    assert "activation_checkpointing: layers\n" in (run.output / "recipe.yaml").read_text()
    outcome = run.finish()
    assert "activation checkpointing: layers" in outcome.stderr
    assert "rounding" not in outcome.stderr
    budget = json.loads((run.output / "memory.json").read_text())
    assert budget["activation_checkpointing"] == "layers"
    assert budget["total_bytes"] > budget["bytes"]["parameters"] > 0
    other = reference()
    assert "activation_checkpointing: none\n" in (other.output / "recipe.yaml").read_text()
    assert without_measures(read_metrics(run.metrics)) == without_measures(read_metrics(other.metrics))
    assert_same_weights(run, other)


def test_a_resumed_run_may_choose_otherwise(new_run: NewRun, reference: Reference) -> None:
    run = new_run()
    assert run.train_dying_at("checkpoint.renamed:2").exit_code == -signal.SIGKILL
    outcome = run.finish("training.activation_checkpointing=layers", "training.memory_limit=3GB")
    assert "training.activation_checkpointing: none before, layers now" in outcome.stderr
    assert_same_weights(run, reference())


@pytest.mark.parametrize("within", ["true", "false"])
def test_the_update_may_move_into_the_backward_pass_and_out_of_it(
    new_run: NewRun, reference: Reference, within: str
) -> None:
    changes = {
        "training.tokens_per_microbatch": 1000,
        "optimizer": {"learning_rate": 0.02, "max_grad_norm": None, "step_in_backward": within == "false"},
    }
    run = new_run(changes)
    assert run.train_dying_at("checkpoint.renamed:2").exit_code == -signal.SIGKILL
    run.finish(f"optimizer.step_in_backward={within}")
    expected = reference(changes)
    assert without_measures(read_metrics(run.metrics)) == without_measures(read_metrics(expected.metrics))
    assert_same_weights(run, expected)


def test_bfloat16_moments_resume_to_the_bit(new_run: NewRun, reference: Reference) -> None:
    changes = {"optimizer": {"learning_rate": 0.02, "weight_decay": 0.1, "state_dtype": "bfloat16"}}
    run = new_run(changes)
    assert run.train_dying_at("checkpoint.renamed:2").exit_code == -signal.SIGKILL
    run.finish()
    assert_same_run(run, reference(changes))


def assert_same_weights(run: TrainingRun, reference: TrainingRun) -> None:
    weights = load_file(run.checkpoint(8) / "model.safetensors")
    for name, tensor in load_file(reference.checkpoint(8) / "model.safetensors").items():
        assert weights[name].equal(tensor), name
