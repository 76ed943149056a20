from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from goldsmith.training.optimizer import OptimizerConfig, build_optimizer, learning_rate, warmup_steps


@given(
    total=st.integers(1, 500),
    warmup=st.floats(0, 0.99),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
)
def test_learning_rate_rises_to_the_peak_and_never_reaches_zero(total, warmup, schedule):
    config = OptimizerConfig(learning_rate=0.5, schedule=schedule, warmup_ratio=warmup)
    rates = [learning_rate(config, step, total) for step in range(1, total + 1)]
    rising = warmup_steps(config, total)
    assert all(0 < rate <= 0.5 for rate in rates)
    assert rates[:rising] == sorted(rates[:rising])
    assert rates[rising:] == sorted(rates[rising:], reverse=True)
    assert rates[rising] == 0.5


def test_cosine_is_half_way_down_in_the_middle():
    config = OptimizerConfig(learning_rate=1.0, warmup_ratio=0.0)
    assert learning_rate(config, 51, 100) == pytest.approx(0.5)
    assert learning_rate(config, 26, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_decay_for_matrices_only():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    model[0].weight.requires_grad_(True)
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig(weight_decay=0.1))
    by_decay = {group["weight_decay"]: group["params"] for group in optimizer.param_groups}
    assert by_decay[0.1] == [model[0].weight]
    assert len(by_decay[0.0]) == 3


def test_one_step_is_the_formula_of_adamw():
    parameter = torch.nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.01, betas=(0.9, 0.99), eps=1e-8)
    optimizer = build_optimizer([("w", parameter)], config)
    gradient = torch.tensor([[0.5, 0.25]], dtype=torch.float64)
    before = parameter.detach().clone()
    parameter.grad = gradient.clone()
    optimizer.step()
    # At the first step both bias-corrected moments are the gradient and its square.
    expected = before * (1 - 0.1 * 0.01) - 0.1 * gradient / (gradient.abs() + 1e-8)
    assert torch.allclose(parameter.detach(), expected, rtol=1e-12)


def test_frozen_parameters_are_left_out():
    model = torch.nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig())
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]
