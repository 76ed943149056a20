from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_trainer import build_model, build_trainer, make_examples, weights

from goldsmith.errors import CheckpointError, ConfigError
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.records import TrainingState
from goldsmith.training.checkpoint import CheckpointStore
from goldsmith.training.lower_precision import BFloat16AdamW, round_stochastically
from goldsmith.training.optimizer import OptimizerConfig, build_optimizer, set_learning_rate

STATE_DTYPES = ["bfloat16", "int8"]
needs_torchao = pytest.mark.skipif(
    "torchao" not in sys.modules and __import__("importlib.util").util.find_spec("torchao") is None,
    reason="waits for torchao (the extra `quantized`)",
)


def parametrized(*dtypes: str) -> Any:
    return pytest.mark.parametrize(
        "state_dtype", [pytest.param(d, marks=needs_torchao) if d == "int8" else d for d in dtypes]
    )


def problem(seed: int = 0) -> list[tuple[str, torch.nn.Parameter]]:
    """A matrix that torchao quantises (4,096 elements), one that it does not, and a vector."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"large": (64, 64), "odd": (5, 3), "vector": (7,)}
    return [(name, torch.nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in shapes.items()]


def update(optimizer: torch.optim.Optimizer, named: list[tuple[str, torch.nn.Parameter]], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for _, parameter in named:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 0.1
    set_learning_rate(optimizer, 0.01 / step)
    optimizer.step()


def test_rounding_is_to_a_neighbour_and_right_on_average() -> None:
    values = torch.tensor([1.0, 1.001, -3.14159, 1e-30, 0.0, 65504.0]).repeat(20000, 1)
    rounded = round_stochastically(values, torch.Generator().manual_seed(0)).float()
    exact = values[0].bfloat16().float() == values[0]
    assert torch.equal(rounded[:, exact], values[:, exact])
    relative = (rounded - values).abs() / values.abs().clamp_min(1e-38)
    assert float(relative.max()) <= 2**-7
    assert torch.allclose(rounded.mean(dim=0), values[0], rtol=1e-4)
    # To the nearest, the mean is off by up to half of the distance between neighbours.
    assert abs(float(values[0, 1].bfloat16()) / 1.001 - 1) > 5e-4
    again = round_stochastically(values, torch.Generator().manual_seed(0)).float()
    assert torch.equal(again, rounded)


def test_the_second_moment_does_not_stand_still() -> None:
    """Of constant gradients it goes to their square; rounded to the nearest it would stop at half of that."""
    parameter = torch.nn.Parameter(torch.zeros(512))
    optimizer = BFloat16AdamW([parameter], lr=0.0)
    for _ in range(4000):
        parameter.grad = torch.ones(512)
        optimizer.step()
    mean = float(optimizer.state[parameter]["exp_avg_sq"].float().mean())
    assert mean == pytest.approx(1 - 0.999**4000, rel=0.01)
    nearest = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(4000):
        nearest = (nearest.float() * 0.999 + 0.001).bfloat16()
    assert float(nearest) < 0.6


@parametrized(*STATE_DTYPES)
def test_close_to_float32(state_dtype: Any) -> None:
    """20 steps of the same gradients: the ways differ by a few percent of their length."""
    reference, lower, start = problem(), problem(), problem()
    settings: dict[str, Any] = {"weight_decay": 0.1}
    exact = build_optimizer(reference, OptimizerConfig(**settings))
    rounded = build_optimizer(lower, OptimizerConfig(**settings, state_dtype=state_dtype))
    for step in range(1, 21):
        update(exact, reference, step)
        update(rounded, lower, step)
    for (name, one), (_, other), (_, before) in zip(reference, lower, start, strict=True):
        way = float((one - before).detach().norm())
        difference = float((one - other).detach().norm())
        assert difference <= 0.05 * way, name
        if state_dtype == "int8" and name != "large":
            assert difference <= 1e-4 * way, name  # too small to be quantised
    moment = rounded.state[lower[0][1]]["exp_avg_sq"]
    inner = moment.codes if state_dtype == "int8" else moment
    assert inner.dtype == (torch.uint8 if state_dtype == "int8" else torch.bfloat16)


def test_the_first_bfloat16_step_is_the_formula_in_chunks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("goldsmith.training.lower_precision.CHUNK", 10)
    named, reference = problem(), problem()
    optimizer = build_optimizer(named, OptimizerConfig(weight_decay=0.1, state_dtype="bfloat16"))
    exact = build_optimizer(reference, OptimizerConfig(weight_decay=0.1))
    update(optimizer, named, 1)
    update(exact, reference, 1)
    for (_, one), (_, other) in zip(named, reference, strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-8)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, parameter in problem():
            self.register_parameter(name, parameter)


@parametrized("float32", *STATE_DTYPES)
def test_a_checkpoint_brings_back_every_bit(tmp_path: Path, state_dtype: Any) -> None:
    store = CheckpointStore(folder=tmp_path, keep=1)
    config = OptimizerConfig(weight_decay=0.1, state_dtype=state_dtype)
    model, resumed = Model(), Model()
    optimizer = build_optimizer(model.named_parameters(), config)
    for step in (1, 2, 3):
        update(optimizer, list(model.named_parameters()), step)
    store.save(model, optimizer, TrainingState.initial())
    other = build_optimizer(resumed.named_parameters(), config)
    store.load(0, resumed, other)
    for step in (4, 5):
        update(optimizer, list(model.named_parameters()), step)
        update(other, list(resumed.named_parameters()), step)
    for (name, one), (_, two) in zip(model.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, two), name


@parametrized(*STATE_DTYPES)
def test_state_of_another_precision_is_refused(tmp_path: Path, state_dtype: Any) -> None:
    store = CheckpointStore(folder=tmp_path, keep=1)
    model, other = Model(), Model()
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig())
    update(optimizer, list(model.named_parameters()), 1)
    store.save(model, optimizer, TrainingState.initial())
    lower = build_optimizer(other.named_parameters(), OptimizerConfig(state_dtype=state_dtype))
    with pytest.raises(CheckpointError, match="another"):
        store.load(0, other, lower)


@parametrized(*STATE_DTYPES)
def test_a_stopped_run_ends_as_one_that_was_not(tmp_path: Path, state_dtype: Any) -> None:
    def model() -> LikelihoodModel:
        own = build_model()
        own.causal_lm.float()
        return own

    def build(folder: Path, steps: int = 6) -> Any:
        settings: dict[str, Any] = {"batch_size": 4, "save_every": 3, "state_dtype": state_dtype}
        trainer = build_trainer(folder, make_examples(10), model=model(), max_steps=6, **settings)
        if steps < 6:
            own = trainer.train_step

            def dying(step: int) -> Any:
                if step > steps:
                    raise KeyboardInterrupt
                return own(step)

            trainer.train_step = dying  # type: ignore[method-assign]
        return trainer

    whole = build(tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "stopped", steps=4).train()
    resumed = build(tmp_path / "stopped")
    resumed.train()
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name


def test_without_torchao_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ConfigError, match=r"computed by torchao.*\n.*pip install 'goldsmith\[quantized\]'"):
        build_optimizer(problem(), OptimizerConfig(state_dtype="int8"))
