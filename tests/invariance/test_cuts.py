"""The invariance law: how a step is cut, packed, chunked and ordered in memory changes neither loss nor gradient."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain import PlainRow, plain_step
from small_trainer import build_model, build_trainer, gradients, make_examples, weights

from goldsmith.data.dataset import Dataset
from goldsmith.models.evaluate import sum_log_likelihood
from goldsmith.training.trainer import Trainer
from goldsmith.types import TokenizedExample

NORMALIZATIONS = ("token", "example", "sum")
LOSS_TOLERANCE = 1e-9
GRADIENT_TOLERANCE = 1e-6
ALL_AT_ONCE = 10**6
BUDGETS = (1, 24, 41, 77, ALL_AT_ONCE)
CHUNK_SIZES = (1, 5, None)


def relative_errors(got: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """|a - b| / max(|b|, 1e-3 * global norm), by name."""
    assert got.keys() == truth.keys()
    total = float(torch.stack([tensor.norm() for tensor in truth.values()]).norm())
    return {
        name: float((got[name] - tensor).norm()) / max(float(tensor.norm()), 1e-3 * total)
        for name, tensor in truth.items()
    }


def report(record_property: Any, **errors: float) -> None:
    """The largest errors seen, for whoever runs with `-s` or reads the report."""
    for name, error in errors.items():
        record_property(name, error)
        print(f"{name} {error:.1e}")


def one_step(trainer: Trainer, indices: list[int]) -> tuple[float, np.ndarray, dict[str, torch.Tensor], int]:
    trainer.optimizer.zero_grad(set_to_none=True)
    sums = trainer.forward_backward(np.array(indices))
    return sums.loss, sums.nll_E, gradients(trainer), sums.microbatches


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_step_cut_in_every_way(tmp_path: Path, normalization: str, record_property: Any) -> None:
    examples = make_examples(16)
    indices = list(range(16))
    whole = build_trainer(tmp_path, examples, normalization=normalization, tokens_per_microbatch=ALL_AT_ONCE)
    loss, nll_E, truth, microbatches = one_step(whole, indices)
    assert microbatches == 1
    counts = set()
    worst_loss = worst_gradient = 0.0
    for budget in BUDGETS:
        for chunk_size in CHUNK_SIZES:
            trainer = build_trainer(
                tmp_path,
                examples,
                model=build_model(chunk_size),
                normalization=normalization,
                tokens_per_microbatch=budget,
            )
            got_loss, got_nll_E, got, microbatches = one_step(trainer, indices)
            counts.add(microbatches)
            np.testing.assert_allclose(got_nll_E, nll_E, rtol=LOSS_TOLERANCE)
            worst_loss = max(worst_loss, abs(got_loss - loss) / abs(loss))
            worst_gradient = max(worst_gradient, *relative_errors(got, truth).values())
    report(record_property, loss_error=worst_loss, gradient_error=worst_gradient)
    assert worst_loss <= LOSS_TOLERANCE
    assert worst_gradient <= GRADIENT_TOLERANCE
    assert min(counts) == 1
    assert max(counts) == 16  # a row each
    assert len(counts) == len(BUDGETS)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_step_is_that_of_the_plain_loop(tmp_path: Path, normalization: str) -> None:
    """Not only the same as itself: padded rows, full logits, the formula as it is written."""
    examples = make_examples(6)
    trainer = build_trainer(tmp_path, examples, normalization=normalization, tokens_per_microbatch=30)
    loss, _, got, _ = one_step(trainer, list(range(6)))
    plain = build_model().causal_lm
    plain.set_attn_implementation("sdpa")
    rows = [
        PlainRow(
            ids=example.token_ids.tolist(),
            weights=example.target_weights.tolist(),
            example_weight=example.example_weight,
        )
        for example in examples
    ]
    truth = plain_step(plain, rows, normalization)
    assert loss == pytest.approx(truth.loss, rel=LOSS_TOLERANCE)
    assert max(relative_errors(got, truth.gradients).values()) <= GRADIENT_TOLERANCE


def test_the_order_within_a_step_does_not_matter(tmp_path: Path) -> None:
    examples = make_examples(12)
    trainer = build_trainer(tmp_path, examples, tokens_per_microbatch=50)
    loss, nll_E, truth, _ = one_step(trainer, list(range(12)))
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(12)
        got_loss, got_nll_E, got, _ = one_step(trainer, order.tolist())
        assert got_loss == pytest.approx(loss, rel=LOSS_TOLERANCE)
        np.testing.assert_allclose(got_nll_E, nll_E[order], rtol=LOSS_TOLERANCE)
        assert max(relative_errors(got, truth).values()) <= GRADIENT_TOLERANCE


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_weight_two_is_the_example_twice(tmp_path: Path, normalization: str) -> None:
    single = [replace(example, example_weight=1.0) for example in make_examples(5)]
    weighted = [
        replace(example, example_weight=2.0 if index in (1, 3) else 1.0) for index, example in enumerate(single)
    ]
    doubled = single + [replace(single[index], example_id=f"again {index}") for index in (1, 3)]
    loss, _, truth, _ = one_step(build_trainer(tmp_path, weighted, normalization=normalization), list(range(5)))
    got_loss, _, got, _ = one_step(build_trainer(tmp_path, doubled, normalization=normalization), list(range(7)))
    assert got_loss == pytest.approx(loss, rel=LOSS_TOLERANCE)
    assert max(relative_errors(got, truth).values()) <= GRADIENT_TOLERANCE
    unweighted, *_ = one_step(build_trainer(tmp_path, single, normalization=normalization), list(range(5)))
    assert abs(unweighted - loss) > 1e-4 * loss  # the test can fail


def test_all_token_weights_doubled_change_the_sum_alone(tmp_path: Path) -> None:
    examples = make_examples(6)
    doubled = [replace(example, target_weights=2 * example.target_weights) for example in examples]
    for normalization, factor in (("token", 1.0), ("example", 1.0), ("sum", 2.0)):
        loss, *_ = one_step(build_trainer(tmp_path, examples, normalization=normalization), list(range(6)))
        got, *_ = one_step(build_trainer(tmp_path, doubled, normalization=normalization), list(range(6)))
        assert got == pytest.approx(factor * loss, rel=LOSS_TOLERANCE)


def test_a_token_of_weight_zero_is_context(tmp_path: Path) -> None:
    """What it is does not matter for the loss of others before it, and it is never a target."""
    (example, *_) = [e for e in make_examples(20) if e.num_target_tokens < len(e.token_ids) - 4]
    trainer = build_trainer(tmp_path, [example])
    _, nll_E, _, _ = one_step(trainer, [0])
    log_probs = -nll_E[0]
    ids = torch.from_numpy(example.token_ids).long()
    with torch.no_grad():
        model = build_model().causal_lm
        model.set_attn_implementation("sdpa")
        full = torch.log_softmax(model(input_ids=ids[None], use_cache=False).logits[0], dim=-1)
    gold = np.flatnonzero(example.target_weights > 0)
    expected = sum(float(full[position - 1, ids[position]]) for position in gold)
    assert log_probs == pytest.approx(expected, rel=LOSS_TOLERANCE)


# --- trajectories


def trajectory(
    folder: Path, examples: list[TokenizedExample], **settings: Any
) -> tuple[dict[str, torch.Tensor], list[Any]]:
    trainer = build_trainer(folder, examples, max_steps=20, batch_size=6, **settings)
    trainer.train()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return weights(trainer), records


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_twenty_steps_take_the_same_way(tmp_path: Path, normalization: str, record_property: Any) -> None:
    """Optimizer, clipping, weight decay and schedule included; the last step of each epoch is smaller."""
    examples = make_examples(20)  # 4 steps an epoch, the last of 2 examples
    truth, expected = trajectory(
        tmp_path / "whole", examples, normalization=normalization, tokens_per_microbatch=ALL_AT_ONCE
    )
    start = {name: tensor.detach() for name, tensor in build_model().causal_lm.named_parameters()}
    assert min(relative_errors(truth, start).values()) > 1e-2  # it is a way
    for number, (budget, chunk_size) in enumerate([(1, None), (40, 3)]):
        got, records = trajectory(
            tmp_path / str(number),
            examples,
            normalization=normalization,
            tokens_per_microbatch=budget,
            model=build_model(chunk_size),
        )
        changes = ({name: after[name] - start[name] for name in start} for after in (got, truth))
        worst = max(relative_errors(*changes).values())
        report(record_property, change_error=worst)
        assert worst <= 1e-6
        assert [record["examples"] for record in records] == [6, 6, 6, 2] * 5
        for record, wanted in zip(records, expected, strict=True):
            for key in ("nll", "loss", "grad_norm"):
                assert record[key] == pytest.approx(wanted[key], rel=1e-7), (record["step"], key)
            for key in ("step", "epoch", "examples", "tokens", "gold_tokens", "learning_rate"):
                assert record[key] == wanted[key]
        lines = [json.loads(line) for line in (tmp_path / str(number) / "examples.jsonl").read_text().splitlines()]
        wanted_lines = [json.loads(line) for line in (tmp_path / "whole" / "examples.jsonl").read_text().splitlines()]
        assert [line["example_id"] for line in lines] == [line["example_id"] for line in wanted_lines]
        for line, wanted in zip(lines, wanted_lines, strict=True):
            assert line["nll"] == pytest.approx(wanted["nll"], rel=1e-7)


def test_label_smoothing_is_cut_like_the_rest(tmp_path: Path) -> None:
    examples = make_examples(12)
    _, plain_nll_E, _, _ = one_step(build_trainer(tmp_path, examples), list(range(12)))
    whole = build_trainer(tmp_path, examples, label_smoothing=0.1, tokens_per_microbatch=ALL_AT_ONCE)
    loss, _, truth, _ = one_step(whole, list(range(12)))
    unsmoothed, *_ = one_step(build_trainer(tmp_path, examples), list(range(12)))
    assert abs(loss - unsmoothed) > 1e-4
    for budget in (1, 50):
        trainer = build_trainer(tmp_path, examples, label_smoothing=0.1, tokens_per_microbatch=budget)
        got_loss, nll_E, got, _ = one_step(trainer, list(range(12)))
        np.testing.assert_allclose(nll_E, plain_nll_E, rtol=LOSS_TOLERANCE)  # log-probabilities are never smoothed
        assert got_loss == pytest.approx(loss, rel=LOSS_TOLERANCE)
        assert max(relative_errors(got, truth).values()) <= GRADIENT_TOLERANCE


# --- steps and epochs


def test_max_steps_and_epochs_are_the_same_steps(tmp_path: Path) -> None:
    examples = make_examples(10)
    by_epochs = build_trainer(tmp_path / "epochs", examples, epochs=3, batch_size=4)
    by_steps = build_trainer(tmp_path / "steps", examples, max_steps=9, batch_size=4)
    assert by_epochs.total_steps == by_steps.total_steps == 9
    by_epochs.train()
    by_steps.train()
    for name, tensor in weights(by_epochs).items():
        assert torch.equal(tensor, weights(by_steps)[name])
    # Stopped in the middle of an epoch, the order is the same as far as it goes.
    shorter = build_trainer(tmp_path / "shorter", examples, max_steps=4, batch_size=4)
    for step in range(1, 5):
        assert shorter.order.step(step)[0] == by_epochs.order.step(step)[0]
        np.testing.assert_array_equal(shorter.order.step(step)[1], by_epochs.order.step(step)[1])


def test_a_batch_larger_than_the_data_is_one_step_an_epoch(tmp_path: Path) -> None:
    examples = make_examples(5)
    trainer = build_trainer(tmp_path, examples, epochs=3, batch_size=64)
    assert trainer.total_steps == 3
    trainer.train()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["epoch"], record["examples"]) for record in records] == [(0, 5), (1, 5), (2, 5)]


def test_the_last_step_of_an_epoch_has_its_own_denominator(tmp_path: Path) -> None:
    examples = make_examples(5, plain=True)
    trainer = build_trainer(tmp_path, examples, epochs=1, batch_size=4, learning_rate=1e-12, weight_decay=0.0)
    trainer.train()
    *_, last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (index,) = trainer.order.step(2)[1].tolist()
    alone, nll_E, _, _ = one_step(build_trainer(tmp_path, examples), [index])
    assert last["examples"] == 1
    assert last["loss"] == pytest.approx(alone, rel=1e-6)
    assert last["nll"] == pytest.approx(nll_E[0] / examples[index].num_target_tokens, rel=1e-6)


# --- evaluation


def test_evaluation_is_one_division_for_any_budget(tmp_path: Path) -> None:
    """Uneven packs: a mean of their means would differ, and differently for each budget."""
    examples = make_examples(23, seed=3)
    model = build_model()
    numerator = denominator = per_example = weight = 0.0
    own_means = []
    for example in examples:
        alone = sum_log_likelihood(model, Dataset([example]), tokens_per_microbatch=1)
        numerator += alone.weighted_nll
        denominator += alone.weight_sum
        per_example += example.example_weight * alone.weighted_nll / alone.weight_sum
        weight += example.example_weight
        own_means.append(alone.nll)
    truth = numerator / denominator
    assert abs(np.mean(own_means) - truth) > 1e-4  # the mean of means is another number
    for budget in (1, 30, 64, 200, ALL_AT_ONCE):
        trainer = build_trainer(tmp_path, examples[:4], evaluation=examples, model=model, tokens_per_microbatch=budget)
        record = trainer.evaluate(0)
        assert record.nll == pytest.approx(truth, rel=LOSS_TOLERANCE)
        assert record.nll_per_example == pytest.approx(per_example / weight, rel=LOSS_TOLERANCE)
        assert record.examples == 23
        assert record.gold_tokens == sum(example.num_target_tokens for example in examples)


def test_evaluation_leaves_the_step_after_it_as_it_was(tmp_path: Path) -> None:
    """With evaluations between, the same weights come out, to the bit."""
    examples = make_examples(12)
    plain = build_trainer(tmp_path / "plain", examples, epochs=2, batch_size=4)
    watched = build_trainer(
        tmp_path / "watched", examples, epochs=2, batch_size=4, evaluation=make_examples(5, seed=9), evaluate_every=1
    )
    plain.train()
    watched.train()
    for name, tensor in weights(plain).items():
        assert torch.equal(tensor, weights(watched)[name]), name


# --- shared contexts


def with_shared_contexts(number: int) -> list[TokenizedExample]:
    """Every four rows begin with the same context, long enough to be worth sharing."""
    examples = make_examples(number, seed=11)
    generator = np.random.default_rng(12)
    shared = []
    for index, example in enumerate(examples):
        if index % 4 == 0:
            context = generator.integers(0, 31, size=int(generator.integers(26, 34))).astype(np.int32)
        shared.append(
            replace(
                example,
                token_ids=np.concatenate([context, example.token_ids]),
                target_weights=np.concatenate([np.zeros(len(context), dtype=np.float32), example.target_weights]),
            )
        )
    return shared


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_context_carried_once_changes_no_number(tmp_path: Path, normalization: str, record_property: Any) -> None:
    examples = with_shared_contexts(16)
    indices = list(range(16))
    settings: dict[str, Any] = {"normalization": normalization, "batch_size": 16}
    plain = build_trainer(tmp_path, examples, shared_context="off", tokens_per_microbatch=ALL_AT_ONCE, **settings)
    assert not plain.shares_contexts
    loss, nll_E, truth, _ = one_step(plain, indices)
    worst_loss = worst_gradient = 0.0
    for budget in (*BUDGETS, 220):
        trainer = build_trainer(tmp_path, examples, tokens_per_microbatch=budget, **settings)
        assert trainer.shares_contexts
        got_loss, got_nll_E, got, _ = one_step(trainer, indices)
        if budget == ALL_AT_ONCE:
            record, _ = build_trainer(tmp_path, examples, tokens_per_microbatch=budget, **settings).train_step(1)
            assert record.shared_tokens >= 4 * 3 * 26
        np.testing.assert_allclose(got_nll_E, nll_E, rtol=LOSS_TOLERANCE)
        worst_loss = max(worst_loss, abs(got_loss - loss) / abs(loss))
        worst_gradient = max(worst_gradient, *relative_errors(got, truth).values())
    report(record_property, loss_error=worst_loss, gradient_error=worst_gradient)
    assert worst_loss <= LOSS_TOLERANCE
    assert worst_gradient <= GRADIENT_TOLERANCE
