"""The optimizer's update within the backward pass: each gradient is used as soon as it is complete, and freed at once.

Exact where nothing has to be known of all gradients before the first is used: one micro-batch a step, one process, no
clipping. A parameter that took part has its update when `backward` returns; the others have a gradient of zero, as in the ordinary
update, and get theirs at the end.

What cannot be done is to look whether all gradients are finite and then update nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Self

import torch

from goldsmith import distributed
from goldsmith.data.dataset import Dataset
from goldsmith.errors import ConfigError
from goldsmith.training.memory import largest_microbatch
from goldsmith.training.metrics import grouped_ratios, root_of_sum, squared_norm, weight_and_update

__all__ = ["UpdateInBackward", "require_one_microbatch"]


class UpdateInBackward:
    """While this is open, a backward pass updates.

    Args:
        optimizer: a step of it leaves alone whatever has no gradient.
        named: the trainable parameters.
        measures_update: whether the norms of updates are wanted.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        named: Sequence[tuple[str, torch.nn.Parameter]],
        *,
        measures_update: bool,
    ) -> None:
        self._optimizer = optimizer
        self._named = named
        self._measures_update = measures_update
        self._gradient_squares: dict[str, torch.Tensor] = {}
        self._weight_squares: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def __enter__(self) -> Self:
        self._handles = [
            parameter.register_post_accumulate_grad_hook(partial(self._update, name)) for name, parameter in self._named
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def has_begun(self) -> bool:
        """Whether a parameter was updated."""
        return bool(self._gradient_squares)

    def finish(self) -> tuple[float, dict[str, float]]:
        """Update what took no part in the backward pass; the norm of all gradients, and update over weight by layer group."""
        for name, parameter in self._named:
            if name not in self._gradient_squares:
                parameter.grad = torch.zeros_like(parameter)
                self._update(name, parameter)
        # In the order of the parameters and not of the backward pass: then rounding is as in the ordinary update.
        grad_norm = float(root_of_sum([self._gradient_squares[name] for name, _ in self._named]))
        ratios = {name: self._weight_squares[name] for name, _ in self._named} if self._measures_update else {}
        return grad_norm, grouped_ratios(ratios)

    @torch.no_grad()
    def _update(self, name: str, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self._gradient_squares[name] = squared_norm(parameter.grad)
        before = parameter.detach().clone() if self._measures_update else None
        # Every other gradient is freed or not there yet.
        self._optimizer.step()
        parameter.grad = None
        if before is not None:
            self._weight_squares[name] = weight_and_update(before, parameter.detach())


def require_one_microbatch(data: Dataset, *, batch_size: int, tokens_per_microbatch: int) -> None:
    """Refuse an update in the backward pass where it would not be exact.

    Raises:
        ConfigError: several processes, or a step that may be cut.
    """
    if distributed.world_size() > 1:
        raise ConfigError(
            f"optimizer.step_in_backward: {distributed.world_size()} processes add up their gradients before an update",
            remedy="use one process, or leave optimizer.step_in_backward out",
        )
    tokens, _ = largest_microbatch(data, batch_size=batch_size, tokens_per_microbatch=sys.maxsize)
    if batch_size > 1 and tokens > tokens_per_microbatch:
        raise ConfigError(
            f"optimizer.step_in_backward: a step may hold {tokens:,} tokens, and would be cut into micro-batches of "
            f"{tokens_per_microbatch:,}; each would be applied before the next is computed",
            remedy=f"set training.tokens_per_microbatch: {tokens}, a smaller training.batch_size, or leave "
            "optimizer.step_in_backward out",
        )
