"""The optimizer: parameter groups, construction, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

__all__ = ["OptimizerConfig", "build_optimizer", "learning_rate", "warmup_steps"]


class OptimizerConfig(BaseModel):
    """`optimizer:` of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["adamw"] = Field("adamw", description="AdamW (Loshchilov and Hutter 2019)")
    learning_rate: float = Field(2.0e-5, gt=0.0, description="the peak, reached at the end of the warm-up")
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay of the first and second moment")
    eps: float = Field(1.0e-8, gt=0.0, description="added to the root of the second moment")
    weight_decay: float = Field(0.0, ge=0.0, description="decoupled; for matrices only, never for biases and norms")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="after the warm-up, down to zero")
    warmup_ratio: float = Field(0.03, ge=0.0, lt=1.0, description="share of the steps with a rising learning rate")
    max_grad_norm: float | None = Field(1.0, gt=0.0, description="clip the norm of all gradients together; null: never")


def build_optimizer(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], config: OptimizerConfig
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, weight decay on those with two dimensions or more."""
    trainable = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def warmup_steps(config: OptimizerConfig, total_steps: int) -> int:
    """How many steps rise; at least one is left at the peak."""
    return min(math.ceil(config.warmup_ratio * total_steps), total_steps - 1)


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The learning rate of update `step` (1-based) out of `total_steps`: never zero, so that no step is wasted.

    >>> config = OptimizerConfig(learning_rate=1.0, schedule="linear", warmup_ratio=0.2)
    >>> [round(learning_rate(config, step, 10), 3) for step in range(1, 11)]
    [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    """
    warmup = warmup_steps(config, total_steps)
    if step <= warmup:
        return config.learning_rate * step / warmup
    progress = (step - 1 - warmup) / (total_steps - warmup)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
    if config.schedule == "linear":
        return config.learning_rate * (1.0 - progress)
    return config.learning_rate
