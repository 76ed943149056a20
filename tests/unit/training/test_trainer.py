from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_trainer import build_model, build_trainer, make_examples, weights

from goldsmith.data.dataset import Dataset
from goldsmith.errors import CheckpointError, NumericalError, StoppedBySignal
from goldsmith.models.evaluate import iterate_log_probs
from goldsmith.models.step import microbatches
from goldsmith.records import EvaluationRecord, StepRecord
from goldsmith.training.optimizer import learning_rate
from goldsmith.training.trainer import Trainer, TrainingConfig, nll_by_source, planned_steps, stop_on_signals
from goldsmith.types import TokenizedExample

TRAIN = make_examples(10, seed=1)
HELD_OUT = make_examples(5, seed=2)


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def scripted_evaluations(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, nlls: list[float]) -> None:
    """Let the held-out nll be what a test needs, evaluation by evaluation."""
    values = iter(nlls)
    own = trainer.evaluate

    def evaluate(step: int) -> EvaluationRecord:
        record = own(step).to_json()
        record["nll"] = next(values)
        record["is_best"] = trainer.state.best_nll is None or record["nll"] < trainer.state.best_nll
        return EvaluationRecord.from_json(record)

    monkeypatch.setattr(trainer, "evaluate", evaluate)


# --- records


def test_every_step_is_recorded(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, TRAIN, epochs=2, batch_size=4, schedule="linear", log_update_ratio_every=2)
    result = trainer.train()
    steps = records(tmp_path, "step")
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert [record["epoch"] for record in steps] == [0, 0, 0, 1, 1, 1]
    assert [record["examples"] for record in steps] == [4, 4, 2] * 2
    assert [record["learning_rate"] for record in steps] == [
        learning_rate(trainer.optimizer_config, step, 6) for step in range(1, 7)
    ]
    assert [bool(record["update_to_weight"]) for record in steps] == [True, True, False, True, False, True]
    assert set(steps[0]["update_to_weight"]) == {"embedding", "layer 0", "layer 1", "other"}
    assert all(0 < ratio < 1 for ratio in steps[0]["update_to_weight"].values())
    for epoch in (0, 1):
        own = [record for record in steps if record["epoch"] == epoch]
        assert sum(record["tokens"] for record in own) == sum(len(example.token_ids) for example in TRAIN)
        assert sum(record["gold_tokens"] for record in own) == sum(example.num_target_tokens for example in TRAIN)
    assert all(record["grad_norm"] > 0 and record["tokens_per_second"] > 0 for record in steps)
    assert [StepRecord.from_json(record).to_json() for record in steps] == steps
    assert (result.steps, result.nll_before, result.best_step, result.stopped_early) == (6, None, None, False)


def test_every_example_is_recorded_once_an_epoch(tmp_path: Path) -> None:
    build_trainer(tmp_path, TRAIN, epochs=2, batch_size=4).train()
    lines = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    assert len(lines) == 20
    for epoch in (0, 1):
        ids = [line["example_id"] for line in lines if line["epoch"] == epoch]
        assert sorted(ids) == sorted(example.example_id for example in TRAIN)
    by_id = {example.example_id: example for example in TRAIN}
    for line in lines:
        assert line["gold_tokens"] == by_id[line["example_id"]].num_target_tokens
        assert line["source"] == by_id[line["example_id"]].source
        assert line["nll"] > 0
    orders = [[line["example_id"] for line in lines if line["epoch"] == epoch] for epoch in (0, 1)]
    assert orders[0] != orders[1]


def test_every_source_is_named_in_every_record(tmp_path: Path) -> None:
    def sources(examples: list[TokenizedExample]) -> list[str]:
        return ["maths" if number % 3 else "law" for number in range(len(examples))]

    train = Dataset(TRAIN, source_names=sources(TRAIN))
    trainer = build_trainer(tmp_path / "all", train, evaluation=HELD_OUT, max_steps=3, batch_size=4)
    trainer.evaluation_data = Dataset(HELD_OUT, source_names=sources(HELD_OUT))
    _, indices = trainer.order.step(1)
    sums = trainer.forward_backward(indices)
    trainer.optimizer.zero_grad()
    trainer.train()

    name_of = {example.example_id: name for example, name in zip(TRAIN, sources(TRAIN), strict=True)}
    lines = [json.loads(line) for line in (tmp_path / "all" / "examples.jsonl").read_text().splitlines()]
    assert [line["source_name"] for line in lines] == [name_of[line["example_id"]] for line in lines]

    # The plain reference: the weighted nll of every gold token, summed by source, divided once.
    model = build_model()

    def expected(examples: list[TokenizedExample], names: list[str]) -> dict[str, float]:
        totals: dict[str, list[float]] = {}
        for example, name in zip(examples, names, strict=True):
            [(_, log_probs)] = iterate_log_probs(model, Dataset([example]), tokens_per_microbatch=1000)
            weights = example.target_weights[example.target_weights > 0].astype(np.float64)
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] -= example.example_weight * float(weights @ log_probs)
            total[1] += example.example_weight * float(weights.sum())
        return {name: nll / weight for name, (nll, weight) in totals.items()}

    first = records(tmp_path / "all", "step")[0]
    of_step = [TRAIN[index] for index in indices]
    assert first["nll_by_source"] == pytest.approx(
        expected(of_step, [name_of[e.example_id] for e in of_step]), rel=1e-10
    )
    assert len({name_of[example.example_id] for example in of_step}) == 2
    assert first["nll_by_source"] == nll_by_source(train, indices, sums.weighted_nll_E)
    before = records(tmp_path / "all", "evaluation")[0]
    assert before["nll_by_source"] == pytest.approx(expected(HELD_OUT, sources(HELD_OUT)), rel=1e-10)

    # Cut otherwise it is the same to rounding; of one source nothing is said.
    cut = build_trainer(tmp_path / "cut", train, max_steps=1, batch_size=4, tokens_per_microbatch=1)
    cut.train()
    assert records(tmp_path / "cut", "step")[0]["nll_by_source"] == pytest.approx(first["nll_by_source"], rel=1e-10)
    build_trainer(tmp_path / "one", TRAIN, evaluation=HELD_OUT, max_steps=1, batch_size=4).train()
    assert records(tmp_path / "one", "step")[0]["nll_by_source"] == {}
    assert records(tmp_path / "one", "evaluation")[0]["nll_by_source"] == {}


def test_the_nll_of_sources_is_the_same_to_the_bit_after_a_resume(tmp_path: Path) -> None:
    train = Dataset(TRAIN, source_names=[f"s{number % 2}" for number in range(len(TRAIN))])
    halves = tmp_path / "halves"
    build_trainer(tmp_path / "steady", train, max_steps=4, batch_size=4, schedule="constant").train()
    build_trainer(halves, train, max_steps=2, batch_size=4, save_every=2, schedule="constant").train()
    build_trainer(halves, train, max_steps=4, batch_size=4, save_every=2, schedule="constant").train()
    split = [record["nll_by_source"] for record in records(halves, "step")]
    assert split == [record["nll_by_source"] for record in records(tmp_path / "steady", "step")]
    assert len(split) == 4


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_is_the_optimizers(tmp_path: Path, schedule: str) -> None:
    trainer = build_trainer(tmp_path, TRAIN, epochs=1, batch_size=4, schedule=schedule, warmup_ratio=0.34)
    seen = []
    own = trainer.optimizer.step
    trainer.optimizer.step = lambda: (seen.append(trainer.optimizer.param_groups[0]["lr"]), own())  # type: ignore[method-assign]
    trainer.train()
    assert seen == [record["learning_rate"] for record in records(tmp_path, "step")]
    assert seen[0] == 0.005
    assert seen[1] == 0.01
    assert seen[2] == {"cosine": 0.01, "linear": 0.01, "constant": 0.01}[schedule]


def test_clipping_bounds_the_update_and_the_norm_is_recorded_before_it(tmp_path: Path) -> None:
    free = build_trainer(tmp_path / "free", TRAIN, max_steps=1, max_grad_norm=None)
    norm = free.forward_backward(free.order.step(1)[1])
    assert norm.loss > 0
    total = float(torch.nn.utils.get_total_norm([p.grad for p in free.parameters if p.grad is not None]))
    clipped = build_trainer(tmp_path / "clipped", TRAIN, max_steps=1, max_grad_norm=total / 10)
    seen: list[float] = []
    own = clipped.optimizer.step

    def step() -> None:
        seen.append(float(torch.nn.utils.get_total_norm([p.grad for p in clipped.parameters if p.grad is not None])))
        own()

    clipped.optimizer.step = step  # type: ignore[method-assign,assignment]
    record, _ = clipped.train_step(1)
    assert record.grad_norm == pytest.approx(total)
    assert seen == [pytest.approx(total / 10)]


# --- evaluation, the best, early stopping


def test_evaluation_before_the_first_step_every_so_many_and_at_the_end(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, TRAIN, evaluation=HELD_OUT, max_steps=7, batch_size=4, evaluate_every=3)
    result = trainer.train()
    evaluations = records(tmp_path, "evaluation")
    assert [record["step"] for record in evaluations] == [0, 3, 6, 7]
    assert [record["epoch"] for record in evaluations] == [0, 0, 1, 2]
    assert all(record["examples"] == 5 for record in evaluations)
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kinds[0] == "evaluation"
    assert (result.nll_before, result.nll_after) == (evaluations[0]["nll"], evaluations[-1]["nll"])
    best = min(evaluations, key=lambda record: record["nll"])
    assert (result.best_step, result.best_nll) == (best["step"], best["nll"])
    # An evaluation that falls on the last step is made once.
    again = build_trainer(tmp_path / "b", TRAIN, evaluation=HELD_OUT, max_steps=6, batch_size=4, evaluate_every=3)
    again.train()
    assert [record["step"] for record in records(tmp_path / "b", "evaluation")] == [0, 3, 6]


def test_without_every_steps_only_before_and_after(tmp_path: Path) -> None:
    build_trainer(tmp_path, TRAIN, evaluation=HELD_OUT, max_steps=4, batch_size=4).train()
    assert [record["step"] for record in records(tmp_path, "evaluation")] == [0, 4]


def test_early_stopping_waits_for_so_many_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build_trainer(
        tmp_path,
        TRAIN,
        evaluation=HELD_OUT,
        max_steps=50,
        batch_size=4,
        evaluate_every=2,
        early_stopping=2,
        save_every=100,
        keep=1,
    )
    scripted_evaluations(trainer, monkeypatch, [5.0, 4.0, 4.5, 3.0, 3.0, 3.5, 1.0])
    result = trainer.train()
    # 3.0 at step 6 is the best; equal is no improvement; the second one without stops the run after step 10.
    assert (result.steps, result.stopped_early) == (10, True)
    assert (result.best_step, result.best_nll, result.nll_after) == (6, 3.0, 3.5)
    assert [record["is_best"] for record in records(tmp_path, "evaluation")] == [True, True, False, True, False, False]
    # Saved where an evaluation was the best, and where it stopped; the best is kept besides the newest.
    assert trainer.store.steps() == [6, 10]
    assert [record["step"] for record in records(tmp_path, "step")] == list(range(1, 11))


def test_a_run_that_stopped_early_stays_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"max_steps": 50, "batch_size": 4, "evaluate_every": 1, "early_stopping": 1}
    trainer = build_trainer(tmp_path, TRAIN, evaluation=HELD_OUT, **settings)
    scripted_evaluations(trainer, monkeypatch, [5.0, 4.0, 4.5])
    first = trainer.train()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = build_trainer(tmp_path, TRAIN, evaluation=HELD_OUT, **settings)
    result = again.train()
    assert result.stopped_early
    assert (result.steps, result.best_step) == (first.steps, first.best_step) == (2, 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_patience_is_carried_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {
        "max_steps": 50,
        "batch_size": 4,
        "evaluate_every": 1,
        "early_stopping": 3,
        "save_every": 1,
    }
    trainer = build_trainer(tmp_path, TRAIN, evaluation=HELD_OUT, **settings)
    scripted_evaluations(trainer, monkeypatch, [5.0, 4.0, 4.5, 4.5])
    own_log = trainer.progress.evaluation

    def stop_after_step_three(record: EvaluationRecord) -> None:
        own_log(record)
        if record.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer.progress, "evaluation", stop_after_step_three)
    with pytest.raises(StoppedBySignal, match="after step 3 of 50"):
        trainer.train()
    resumed = build_trainer(tmp_path, TRAIN, evaluation=HELD_OUT, **settings)
    scripted_evaluations(resumed, monkeypatch, [4.2])  # the third without improvement
    result = resumed.train()
    assert (result.steps, result.stopped_early, result.best_step) == (4, True, 1)


def test_the_best_before_any_step_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build_trainer(tmp_path, TRAIN, evaluation=HELD_OUT, max_steps=3, batch_size=4, evaluate_every=1, keep=1)
    scripted_evaluations(trainer, monkeypatch, [1.0, 2.0, 3.0, 4.0])
    result = trainer.train()
    assert (result.best_step, result.best_nll) == (0, 1.0)
    assert trainer.store.steps() == [3]


# --- numerical stop


def spoil_gradient(trainer: Trainer, value: float) -> None:
    parameter = trainer.parameters[-1]
    parameter.register_hook(lambda gradient: torch.full_like(gradient, value))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_before_the_update(tmp_path: Path, value: float) -> None:
    trainer = build_trainer(tmp_path, TRAIN, max_steps=4, batch_size=4, save_every=1)
    trainer.train_step(1)
    before = weights(trainer)
    moments = {name: value.clone() for state in trainer.optimizer.state.values() for name, value in state.items()}
    spoil_gradient(trainer, value)
    with pytest.raises(NumericalError, match=r"step 2: loss \d.*the gradient, and no single example") as error:
        trainer.train_step(2)
    assert error.value.exit_code == 5
    for index in trainer.order.step(2)[1]:
        assert f"{TRAIN[index].example_id} ({TRAIN[index].source})" in error.value.message
    for name, tensor in weights(trainer).items():
        assert torch.equal(tensor, before[name])
    assert moments
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {1}


def test_a_loss_that_is_not_finite_names_its_examples(tmp_path: Path) -> None:
    """An untied embedding row that one example alone uses is NaN."""
    examples = make_examples(10, seed=1)
    rare = 7
    for example in examples:
        example.token_ids[example.token_ids == rare] = 8
    examples[4].token_ids[0] = rare
    trainer = build_trainer(tmp_path, examples, max_steps=3, batch_size=10)
    embedding = trainer.model.causal_lm.get_input_embeddings()
    untied = torch.nn.Parameter(embedding.weight.detach().clone())
    untied.data[rare] = float("nan")
    embedding.weight = untied
    with pytest.raises(NumericalError, match=r"step 1: .*these examples: x4 \(rows:4\)\. The weights are as they were"):
        trainer.train_step(1)


def test_many_blamed_examples_are_shortened(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, make_examples(20), max_steps=1, batch_size=20)
    for parameter in trainer.parameters:
        parameter.data.fill_(float("nan"))
    with pytest.raises(NumericalError, match=r"x\d+ \(rows:\d+\) and 12 more"):
        trainer.train_step(1)


def test_a_numerical_stop_leaves_the_last_checkpoint_and_the_files_of_the_good_steps(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, TRAIN, max_steps=6, batch_size=4, save_every=2)
    own = trainer.train_step

    def spoiled(step: int) -> Any:
        if step == 4:
            spoil_gradient(trainer, float("inf"))
        return own(step)

    trainer.train_step = spoiled  # type: ignore[method-assign]
    with pytest.raises(NumericalError, match="step 4: "):
        trainer.train()
    assert trainer.store.steps() == [2]
    assert [record["step"] for record in records(tmp_path, "step")] == [1, 2, 3]
    # With the cause gone the run goes on from the checkpoint to the same end.
    resumed = build_trainer(tmp_path, TRAIN, max_steps=6, batch_size=4, save_every=2)
    resumed.train()
    whole = build_trainer(tmp_path / "whole", TRAIN, max_steps=6, batch_size=4, save_every=2)
    whole.train()
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name])


# --- signals


@pytest.fixture
def handlers() -> Any:
    """Handlers of known behaviour for the test, and the former ones afterwards."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    former = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    yield interrupt
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_acts(handlers: Callable[..., None], first: int, second: int) -> None:
    with stop_on_signals() as requested:
        assert not requested()
        os.kill(os.getpid(), first)
        assert requested()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), second)
    assert signal.getsignal(signal.SIGINT) is handlers
    assert signal.getsignal(signal.SIGTERM) is handlers


def test_an_ignored_signal_stays_ignored(handlers: Callable[..., None]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_on_signals() as requested:
        os.kill(os.getpid(), signal.SIGINT)
        assert not requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert requested()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_signals_are_the_callers_outside_the_main_thread() -> None:
    import threading

    seen: list[bool] = []

    def work() -> None:
        with stop_on_signals() as requested:
            seen.append(requested())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_finishes_the_step_saves_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handlers: Callable[..., None], number: int
) -> None:
    settings: dict[str, Any] = {"evaluation": HELD_OUT, "max_steps": 8, "batch_size": 4}
    whole = build_trainer(tmp_path / "whole", TRAIN, **settings)
    whole.train()
    trainer = build_trainer(tmp_path / "stopped", TRAIN, **settings)
    own = trainer.forward_backward
    calls = []

    def signalled(indices: Any) -> Any:
        calls.append(indices)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return own(indices)

    monkeypatch.setattr(trainer, "forward_backward", signalled)
    with pytest.raises(StoppedBySignal, match="after step 3 of 8") as error:
        trainer.train()
    assert error.value.exit_code == 75
    assert trainer.store.steps() == [3]
    resumed = build_trainer(tmp_path / "stopped", TRAIN, **settings)
    resumed.train()
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name])
    assert [r["nll"] for r in records(tmp_path / "whole", "evaluation")] == [
        r["nll"] for r in records(tmp_path / "stopped", "evaluation")
    ]


def test_a_signal_in_the_last_step_lets_the_run_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handlers: Callable[..., None]
) -> None:
    trainer = build_trainer(tmp_path, TRAIN, max_steps=2, batch_size=4)
    own = trainer.train_step

    def signalled(step: int) -> Any:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return own(step)

    monkeypatch.setattr(trainer, "train_step", signalled)
    assert trainer.train().steps == 2


# --- resume, in this process


def test_the_random_state_is_the_recipes_and_the_callers_is_left(tmp_path: Path) -> None:
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        trainer = build_trainer(tmp_path / str(seed), TRAIN, max_steps=1, batch_size=4)
        trainer.train()
        assert torch.equal(torch.get_rng_state(), before)
        states.append((trainer.store.path(1) / "optimizer.safetensors").read_bytes())
    assert states[0] == states[1]


def test_a_resume_prunes_what_a_dead_process_left(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "batch_size": 4, "save_every": 1}
    build_trainer(tmp_path, TRAIN, keep=4, **settings).train()
    resumed = build_trainer(tmp_path, TRAIN, keep=1, **settings)
    assert resumed.store.steps() == [1, 2, 3, 4]
    resumed.train()
    assert resumed.store.steps() == [4]


def test_a_damaged_newest_checkpoint_is_not_passed_over(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "batch_size": 4, "save_every": 2}
    build_trainer(tmp_path, TRAIN, **settings).train()
    path = tmp_path / "checkpoints" / "step-00000004" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"step-00000004/model\.safetensors"):
        build_trainer(tmp_path, TRAIN, **settings).train()


def test_a_parameter_that_the_loss_does_not_reach_is_resumed_too(tmp_path: Path) -> None:
    """Its gradient counts as zero, as it does where several processes sum theirs."""

    def build(folder: Path) -> Trainer:
        model = build_model()
        model.causal_lm.register_parameter("unused", torch.nn.Parameter(torch.ones(3, 2, dtype=torch.float64)))
        return build_trainer(folder, TRAIN, model=model, max_steps=4, batch_size=4, save_every=1)

    whole = build(tmp_path / "whole")
    whole.train()
    stopped = build(tmp_path / "stopped")
    own = stopped.train_step

    def dying(step: int) -> Any:
        if step == 3:
            raise RuntimeError("died")
        return own(step)

    stopped.train_step = dying  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="died"):
        stopped.train()
    resumed = build(tmp_path / "stopped")
    resumed.train()
    assert torch.equal(weights(whole)["unused"], weights(resumed)["unused"])
    assert (weights(whole)["unused"] < 1).all()  # weight decay alone


# --- plans


def test_planned_steps() -> None:
    data = Dataset(TRAIN)
    assert planned_steps(data, TrainingConfig(epochs=3, batch_size=4)) == 9
    assert planned_steps(data, TrainingConfig(epochs=3, batch_size=4, max_steps=2)) == 2
    assert planned_steps(data, TrainingConfig(epochs=2, batch_size=10)) == 2
    repeated = Dataset(TRAIN, repeats=[2.5] * 10)
    assert planned_steps(repeated, TrainingConfig(epochs=2, batch_size=4)) == 14


def test_the_share_of_a_rank_keeps_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all ranks every example is there once; a row longer than the budget is alone, with several ranks as with one."""
    from goldsmith import distributed

    lengths = [24, 3, 4, 5, 3, 2, 4]
    examples = make_examples(7)
    for index, length in enumerate(lengths):
        object.__setattr__(examples[index], "token_ids", np.zeros(length, dtype=np.int32) + 1)
        values = np.zeros(length, dtype=np.float32)
        values[-1] = 1.0
        object.__setattr__(examples[index], "target_weights", values)
    for budget in (6, 9, 1000):
        trainer = build_trainer(tmp_path, examples, tokens_per_microbatch=budget)
        for ranks in (1, 2, 3):
            seen: list[int] = []
            monkeypatch.setattr(distributed, "world_size", lambda ranks=ranks: ranks)
            for rank in range(ranks):
                monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
                for batch, members in microbatches(
                    trainer.train_data, np.arange(7), tokens_per_microbatch=budget, shares_contexts=False
                ):
                    assert len(members) == 1 or int(batch.segment_lengths.sum()) <= budget
                    seen.extend(members.tolist())
            assert sorted(seen) == list(range(7))


def test_a_rank_may_have_nothing_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from goldsmith import distributed

    trainer = build_trainer(tmp_path, TRAIN)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    sums = trainer.forward_backward(np.array([3]))
    assert (sums.loss, sums.microbatches) == (0.0, 0)


def families(num_families: int, size: int) -> Dataset:
    """Rows of `size` answers to each question, far apart from each other in the data."""
    rng = np.random.default_rng(0)
    questions = [rng.integers(0, 30, 40) for _ in range(num_families)]
    rows = []
    for answer in range(size):
        for number, question in enumerate(questions):
            gold = rng.integers(0, 30, 3)
            rows.append(
                TokenizedExample(
                    token_ids=np.concatenate([question, gold]).astype(np.int32),
                    target_weights=np.array([0.0] * 40 + [1.0] * 3, dtype=np.float32),
                    example_id=f"{number}/{answer}",
                    example_weight=1.0,
                    source=f"rows:{len(rows)}",
                    num_bytes=0,
                )
            )
    return Dataset(rows)


def test_rows_of_one_context_meet_in_a_step_and_share_it(tmp_path: Path) -> None:
    saved = {}
    for order in ("shuffled", "grouped"):
        build_trainer(tmp_path / order, families(8, 3), epochs=2, batch_size=6, order=order).train()
        steps = records(tmp_path / order, "step")
        saved[order] = sum(step["shared_tokens"] for step in steps)
        lines = [json.loads(line) for line in (tmp_path / order / "examples.jsonl").read_text().splitlines()]
        for epoch in (0, 1):
            assert len({line["example_id"] for line in lines if line["epoch"] == epoch}) == 24
        assert all(0 < step["data_seconds"] < step["seconds"] for step in steps)
    # Two of three answers find their question computed, in every step.
    assert saved["grouped"] == 2 * 8 * 2 * 40
    assert saved["shuffled"] < saved["grouped"] / 2


def test_a_grouped_run_resumes_to_the_bit(tmp_path: Path) -> None:
    data = families(8, 3)
    whole = build_trainer(tmp_path / "whole", data, epochs=2, batch_size=5, order="grouped")
    whole.train()
    stopped = build_trainer(tmp_path / "cut", data, epochs=2, batch_size=5, order="grouped", save_every=3)
    own = stopped.train_step

    def until_step_8(step: int) -> Any:
        if step == 8:
            raise KeyboardInterrupt
        return own(step)

    stopped.train_step = until_step_8  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = build_trainer(tmp_path / "cut", data, epochs=2, batch_size=5, order="grouped", save_every=3)
    resumed.train()
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (tmp_path / "cut" / "examples.jsonl").read_text() == (tmp_path / "whole" / "examples.jsonl").read_text()
