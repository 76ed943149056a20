"""The update within the backward pass: the ordinary update to the bit, or a refusal with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from small_trainer import build_model, build_trainer, make_examples, weights

from goldsmith import distributed
from goldsmith.errors import ConfigError, NumericalError
from goldsmith.models.out_of_memory import OutOfMemoryError
from goldsmith.records import MEASURED_FIELDS
from goldsmith.training.optimizer import OptimizerConfig

EXAMPLES = make_examples(10, seed=1)


def build(folder: Path, **settings: Any) -> Any:
    return build_trainer(folder, EXAMPLES, **{"batch_size": 4, "max_grad_norm": None, **settings})


def records(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED_FIELDS} for line in lines]


@pytest.mark.parametrize(
    "settings",
    [{}, {"state_dtype": "bfloat16"}, {"activation_checkpointing": "layers"}],
    ids=["float32", "bfloat16", "layers"],
)
def test_the_run_is_the_same_to_the_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Weights, moments, gradient norms and update ratios; a parameter that no row reaches included."""

    def run(name: str, **more: Any) -> Any:
        model = build_model()
        model.causal_lm.register_parameter("unused", torch.nn.Parameter(torch.ones(2, 3, dtype=torch.float64)))
        trainer = build(tmp_path / name, epochs=2, log_update_ratio_every=2, model=model, **settings, **more)
        trainer.train()
        return trainer

    ordinary, within = run("ordinary"), run("within", step_in_backward=True)
    for name, tensor in weights(ordinary).items():
        assert torch.equal(tensor, weights(within)[name]), name
    assert (weights(within)["unused"] < 1).all()  # weight decay
    assert records(tmp_path / "ordinary") == records(tmp_path / "within")
    assert any(record["update_to_weight"] for record in records(tmp_path / "within"))
    for one, two in zip(ordinary.optimizer.state.values(), within.optimizer.state.values(), strict=False):
        assert one.keys() == two.keys()
    assert all(parameter.grad is None for parameter in within.parameters)


def test_gradients_are_freed_at_once(tmp_path: Path) -> None:
    trainer = build(tmp_path, step_in_backward=True)
    own = trainer.optimizer.step
    at_once: list[int] = []

    def step() -> None:
        at_once.append(sum(parameter.grad is not None for parameter in trainer.parameters))
        own()

    trainer.optimizer.step = step
    trainer.train_step(1)
    assert at_once == [1] * len(trainer.parameters)


def test_clipping_is_refused() -> None:
    with pytest.raises(ValidationError, match="so they cannot be clipped by it; set max_grad_norm: null"):
        OptimizerConfig(step_in_backward=True)


def test_several_micro_batches_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a step may hold \d+ tokens, and would be cut") as error:
        build(tmp_path, step_in_backward=True, tokens_per_microbatch=40)
    asked = int(str(error.value.remedy).split("tokens_per_microbatch: ")[1].split(",")[0])
    build(tmp_path, step_in_backward=True, tokens_per_microbatch=asked)
    with pytest.raises(ConfigError):
        build(tmp_path, step_in_backward=True, tokens_per_microbatch=asked - 1)
    # A row alone is one micro-batch whatever its length.
    build(tmp_path, step_in_backward=True, batch_size=1, tokens_per_microbatch=1)


def test_a_step_that_is_cut_all_the_same_updates_nothing(tmp_path: Path) -> None:
    trainer = build(tmp_path, step_in_backward=True)
    before = weights(trainer)
    trainer.memory.tokens_per_microbatch = 30
    with pytest.raises(ConfigError, match="the first would be applied before the second is computed"):
        trainer.train_step(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match="2 processes add up their gradients before an update"):
        build(tmp_path, step_in_backward=True)


def test_a_loss_that_is_not_finite_updates_nothing(tmp_path: Path) -> None:
    trainer = build(tmp_path, step_in_backward=True, max_steps=2)
    trainer.model.causal_lm.model.norm.weight.data[0] = float("nan")
    before = weights(trainer)
    with pytest.raises(NumericalError, match="The weights are as they were after step 0"):
        trainer.train_step(1)
    for name, tensor in weights(trainer).items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name


def test_a_gradient_that_is_not_finite_stops_and_says_what_it_spoilt(tmp_path: Path) -> None:
    trainer = build(tmp_path, step_in_backward=True)
    trainer.parameters[-1].register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    with pytest.raises(NumericalError, match="the weights were updated with it; the newest checkpoint is whole"):
        trainer.train_step(1)


def test_out_of_memory_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(tmp_path, step_in_backward=True)

    def fails(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer.model, "forward", fails)
    with pytest.raises(OutOfMemoryError, match="4 rows do not fit"):
        trainer.train_step(1)
