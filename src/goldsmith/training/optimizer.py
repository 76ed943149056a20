"""The optimizer: parameter groups, construction, precision of its state, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from goldsmith.training.lower_precision import BFloat16AdamW, adamw_8bit

__all__ = ["OptimizerConfig", "build_optimizer", "learning_rate", "set_learning_rate", "warmup_steps"]


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
    state_dtype: Literal["float32", "bfloat16", "int8"] = Field(
        "float32",
        description="of the two moments: 8, 4 or 2 bytes a parameter; int8 is torchao's. Less than float32 changes the result",
    )
    step_in_backward: bool = Field(
        False,
        description="update each parameter as its gradient is complete and free that: one micro-batch a step, no clipping",
    )

    @model_validator(mode="after")
    def _step_in_backward_is_exact(self) -> Self:
        if self.step_in_backward and self.max_grad_norm is not None:
            raise ValueError(
                "step_in_backward updates a parameter before the norm of all gradients is known, so they cannot be clipped by "
                "it; set max_grad_norm: null, or leave step_in_backward out"
            )
        return self


def build_optimizer(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, weight decay on those with two dimensions or more.

    Raises:
        ConfigError: `state_dtype: int8` without torchao.
    """
    trainable = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}
    if config.state_dtype == "bfloat16":
        return BFloat16AdamW(groups, **settings)
    if config.state_dtype == "int8":
        return adamw_8bit(groups, **settings)
    return torch.optim.AdamW(groups, **settings, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """For all parameters."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)  # torchao's own must stay the tensor that it is
        else:
            group["lr"] = rate


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
