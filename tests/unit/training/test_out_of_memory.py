"""A step that does not fit is cut finer and done again; only a row that does not fit by itself stops the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_trainer import build_trainer, gradients, make_examples, weights
from transformers import AutoTokenizer

from goldsmith.data.dataset import Dataset
from goldsmith.errors import MachineError
from goldsmith.models.evaluate import iterate_log_probs, sum_log_likelihood
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.models.out_of_memory import OutOfMemoryError, is_out_of_memory
from goldsmith.scoring.score import Asked, score_windows
from goldsmith.scoring.texts import TokenTexts
from goldsmith.training.progress import NoProgress
from goldsmith.training.trainer import Trainer

EXAMPLES = make_examples(16, seed=1)
LONGEST = max(len(example.token_ids) for example in EXAMPLES)
CPU_MESSAGE = "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


class Memory:
    """A model's forward that has room for so many tokens."""

    def __init__(self, model: LikelihoodModel, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
        self.tokens = tokens
        self.error: Callable[[], BaseException] = lambda: torch.OutOfMemoryError("CUDA out of memory")
        self.failures: list[int] = []
        own = model.forward

        def forward(batch: Any, *arguments: Any) -> Any:
            if batch.num_tokens > self.tokens:
                self.failures.append(batch.num_tokens)
                raise self.error()
            return own(batch, *arguments)

        monkeypatch.setattr(model, "forward", forward)


class Notes(NoProgress):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def note(self, line: str) -> None:
        self.heard.append(line)


def build(folder: Path, **settings: Any) -> tuple[Trainer, list[str]]:
    trainer = build_trainer(folder, EXAMPLES, **{"batch_size": 16, **settings})
    notes = Notes()
    trainer.progress = notes
    trainer.memory._note = notes.note
    return trainer, notes.heard


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "error",
    [lambda: torch.OutOfMemoryError("CUDA out of memory"), lambda: RuntimeError(CPU_MESSAGE), MemoryError],
    ids=["gpu", "cpu", "python"],
)
def test_a_step_is_cut_finer_and_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException]
) -> None:
    trainer, notes = build(tmp_path / "small")
    whole, _ = build(tmp_path / "whole")
    memory = Memory(trainer.model, monkeypatch, 60)
    memory.error = error
    record, examples = trainer.train_step(1)
    expected, expected_examples = whole.train_step(1)
    assert record.loss == pytest.approx(expected.loss, rel=1e-9)
    assert record.grad_norm == pytest.approx(expected.grad_norm, rel=1e-9)
    assert [example.nll for example in examples] == pytest.approx([example.nll for example in expected_examples])
    assert expected.microbatches == 1
    assert record.microbatches > 2
    tokens = sum(len(example.token_ids) for example in EXAMPLES)
    # From what the step held, not from the 8,192 that it might have.
    budgets = [tokens // 2, tokens // 4, tokens // 8][: len(notes)]
    assert record.tokens_per_microbatch == trainer.memory.tokens_per_microbatch == budgets[-1] <= 60
    assert notes[0] == (
        f"out of memory: training.tokens_per_microbatch 8,192 -> {budgets[0]:,} from here on; the step is done again"
    )
    failures = len(memory.failures)
    trainer.train_step(1)
    assert len(memory.failures) == failures  # the new value is kept


def test_a_failed_attempt_leaves_no_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = build(tmp_path, tokens_per_microbatch=60)
    longest_first = sorted(range(16), key=lambda index: len(EXAMPLES[index].token_ids))
    indices = np.array(longest_first)
    sums = trainer.forward_backward(indices)
    expected = gradients(trainer)
    assert sums.microbatches > 3
    trainer.optimizer.zero_grad(set_to_none=True)
    seen: list[int] = []
    own = trainer.model.forward

    def failing_third(batch: Any, *arguments: Any) -> Any:
        seen.append(batch.num_tokens)
        if len(seen) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(batch, *arguments)

    monkeypatch.setattr(trainer.model, "forward", failing_third)
    with pytest.raises(OutOfMemoryError):
        trainer.forward_backward(indices)
    assert all(parameter.grad is None for parameter in trainer.parameters)
    got = trainer.memory.fitting(trainer.forward_backward, indices)
    assert got.loss == pytest.approx(sums.loss, rel=1e-12)
    for name, gradient in gradients(trainer).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-9, atol=1e-12), name


def test_a_row_that_does_not_fit_alone_stops_the_run_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, notes = build(tmp_path)
    Memory(trainer.model, monkeypatch, LONGEST - 1)
    before = weights(trainer)
    with pytest.raises(MachineError, match=rf"a single row does not fit: x\d+ \(rows:\d+\), {LONGEST} tokens") as error:
        trainer.train_step(1)
    assert error.value.exit_code == 7
    assert "activation_checkpointing: layers" in str(error.value.remedy)
    assert len(notes) >= 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())


def test_other_errors_are_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, notes = build(tmp_path)
    memory = Memory(trainer.model, monkeypatch, 0)
    memory.error = lambda: RuntimeError("shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="shapes"):
        trainer.train_step(1)
    assert notes == []
    assert not is_out_of_memory(ValueError("can't allocate memory"))


def test_a_resumed_run_goes_on_with_the_smaller_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "save_every": 2, "batch_size": 8}
    whole, _ = build(tmp_path / "whole", **settings)
    Memory(whole.model, monkeypatch, 50)
    whole.train()
    stopped, _ = build(tmp_path / "stopped", **settings)
    Memory(stopped.model, monkeypatch, 50)
    own = stopped.train_step

    def dying(step: int) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return own(step)

    monkeypatch.setattr(stopped, "train_step", dying)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed, notes = build(tmp_path / "stopped", **settings)
    memory = Memory(resumed.model, monkeypatch, 50)
    resumed.train()
    assert (memory.failures, notes) == ([], [])
    assert resumed.state.halved_tokens_per_microbatch == whole.memory.tokens_per_microbatch < 100
    budgets = [record["tokens_per_microbatch"] for record in records(tmp_path / "stopped")]
    assert budgets == [record["tokens_per_microbatch"] for record in records(tmp_path / "whole")]
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name
    # Who asks for another value gets it.
    other, _ = build(tmp_path / "stopped", **settings, tokens_per_microbatch=4000)
    other.resume()
    assert other.memory.tokens_per_microbatch == 4000


# --- evaluation


def test_evaluation_goes_on_in_smaller_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, notes = build(tmp_path, evaluation=EXAMPLES)
    truth = trainer.evaluate(0)
    memory = Memory(trainer.model, monkeypatch, 70)
    record = trainer.evaluate(0)
    assert record.nll == pytest.approx(truth.nll, rel=1e-12)
    assert record.nll_per_example == pytest.approx(truth.nll_per_example, rel=1e-12)
    assert notes
    assert f"evaluation goes on with {trainer.memory.evaluation_tokens:,} tokens at a time" in notes[-1]
    failures = len(memory.failures)
    trainer.evaluate(0)
    assert len(memory.failures) == failures
    assert trainer.memory.tokens_per_microbatch == 8192  # of training


def test_every_example_is_evaluated_once_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = build(tmp_path)
    model, data = trainer.model, trainer.train_data
    expected = dict(iterate_log_probs(model, data, tokens_per_microbatch=10**6))
    Memory(model, monkeypatch, LONGEST + 5)
    heard: list[int] = []
    got = list(iterate_log_probs(model, data, tokens_per_microbatch=10**6, note_halved=heard.append))
    assert [index for index, _ in got] == list(range(16))
    for index, values in got:
        assert values == pytest.approx(expected[index], rel=1e-12)
    assert heard == sorted(heard, reverse=True)


def test_an_example_that_does_not_fit_alone_stops_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = build(tmp_path)
    Memory(trainer.model, monkeypatch, LONGEST - 1)
    with pytest.raises(OutOfMemoryError, match=rf"a single row does not fit: .*{LONGEST} tokens"):
        sum_log_likelihood(trainer.model, trainer.train_data, tokens_per_microbatch=10**6)


@pytest.mark.parametrize("shares", [False, True])
def test_scoring_goes_on_in_smaller_packs(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, shares: bool
) -> None:
    trainer, _ = build(tmp_path)
    model, texts = trainer.model, TokenTexts(AutoTokenizer.from_pretrained(tiny_model_folder))
    # Four times the same contexts, so that there is something to share.
    data = Dataset(
        [
            replace(
                example,
                example_id=f"e{place}",
                token_ids=np.concatenate([np.arange(70, dtype=np.int32) % 20, example.token_ids]),
                target_weights=np.concatenate([np.zeros(70, dtype=np.float32), example.target_weights]),
            )
            for place, example in enumerate(EXAMPLES)
        ]
    )
    asked = Asked(tokens=True, without_context=True, beginning=(1,))

    def scores(**settings: Any) -> list[Any]:
        found = score_windows(model, texts, data, asked, tokens_per_microbatch=400, shares_contexts=shares, **settings)
        return [example.scores for window in found for example in window]

    whole = scores()
    failures = []
    own = model.statistics

    def statistics(batch: Any, **keywords: Any) -> Any:
        if batch.num_tokens > 130:
            failures.append(batch.num_tokens)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(batch, **keywords)

    monkeypatch.setattr(model, "statistics", statistics)
    heard: list[int] = []
    for score, expected in zip(scores(note_halved=heard.append), whole, strict=True):
        assert (score.example_id, score.num_target_tokens) == (expected.example_id, expected.num_target_tokens)
        assert score.log_prob == pytest.approx(expected.log_prob, rel=1e-9)
        assert score.log_prob_without_context == pytest.approx(expected.log_prob_without_context, rel=1e-9)
        assert [token.rank for token in score.tokens] == [token.rank for token in expected.tokens]
    assert heard == sorted(heard, reverse=True)
    assert 0 < len(heard) == len(failures) < 5  # the smaller value is kept from window to window
    data = Dataset([data[0]])
    monkeypatch.setattr(model, "statistics", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(OutOfMemoryError, match="a single row does not fit: e0"):
        scores()
