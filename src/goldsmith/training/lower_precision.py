"""AdamW whose moments take less memory than float32: bfloat16 with stochastic rounding, or 8 bits by torchao.

The second moment moves by 1 - beta2 = 0.001 of its distance a step, and a bfloat16 number is 0.004 from its neighbour: rounded
to the nearest it would stand still for ever. Rounded up or down with the probability that keeps the mean, it moves as it
should on average. The random bits are a function of (step, parameter), so that a resumed run draws the same.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from goldsmith.errors import ConfigError

__all__ = ["BFloat16AdamW", "adamw_8bit", "round_stochastically"]

# Elements that are in float32 at a time.
CHUNK = 1 << 22


def round_stochastically(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 -> bfloat16: one of the two neighbours, the mean over draws being the value itself.

    bfloat16 is the upper half of a float32: random bits are added to the lower half, which is then cut off.
    """
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits = values.contiguous().view(torch.int32).add(noise).bitwise_and_(-1 << 16)
    return bits.view(torch.float32).to(torch.bfloat16)


class BFloat16AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) that keeps both moments in bfloat16 and computes in float32.

    Args:
        params: parameters, or groups of them with their own `weight_decay`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def new_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state before the first step."""
        moments = {
            name: torch.zeros_like(parameter, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
            for name in ("exp_avg", "exp_avg_sq")
        }
        return {"step": torch.zeros((), dtype=torch.float32), **moments}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("BFloat16AdamW takes no closure")
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is not None:
                    self._update(parameter, number, group)

    def _update(self, parameter: torch.Tensor, number: int, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(self.new_state(parameter))
        state["step"] += 1
        step = int(state["step"])
        (beta1, beta2), rate = group["betas"], group["lr"]
        step_size = rate / (1.0 - beta1**step)
        root_of_correction = math.sqrt(1.0 - beta2**step)
        # Mixed, because the generator of a CPU looks at 32 bits of a seed only.
        seed = int(np.random.SeedSequence([step, number]).generate_state(1)[0])
        generator = torch.Generator(parameter.device).manual_seed(seed)
        assert parameter.grad is not None
        if not parameter.is_contiguous():
            raise ValueError(f"a parameter of shape {list(parameter.shape)} is not contiguous")
        flat = (parameter, parameter.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"])
        parts = (tensor.detach().view(-1).split(CHUNK) for tensor in flat)
        for weight, grad, mean, square in zip(*parts, strict=True):
            grad_32 = grad.float()
            mean_32 = mean.float().lerp_(grad_32, 1.0 - beta1)
            square_32 = square.float().mul_(beta2).addcmul_(grad_32, grad_32, value=1.0 - beta2)
            mean.copy_(round_stochastically(mean_32, generator))
            square.copy_(round_stochastically(square_32, generator))
            denominator = square_32.sqrt_().div_(root_of_correction).add_(group["eps"])
            weight.mul_(1.0 - rate * group["weight_decay"])
            weight.sub_(mean_32.div_(denominator).mul_(step_size).to(weight.dtype))


def adamw_8bit(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """torchao's AdamW with moments of 8 bits and one float32 scale for each 256 of them (Dettmers et al. 2021).

    A parameter of fewer than 4,096 elements, or of a number that 256 does not divide, keeps float32 moments.

    Raises:
        ConfigError: torchao is not installed.
    """
    try:
        with _quiet_import():
            from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            f"optimizer.state_dtype: int8 is computed by torchao, which cannot be imported: {error}",
            remedy="pip install 'goldsmith[quantized]', or use optimizer.state_dtype: bfloat16",
        ) from error

    class EagerAdamW8bit(AdamW8bit):  # type: ignore[misc]
        """torchao compiles the update of each shape, for which a CPU needs a C++ compiler and half a minute; not so here."""

        def new_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
            """The state before the first step."""
            return {
                "step": torch.tensor(0.0),
                "exp_avg": self._new_buffer(parameter, True),
                "exp_avg_sq": self._new_buffer(parameter, False),
            }

        def step(self, closure: Any = None) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    return EagerAdamW8bit(groups, **settings)


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    """torchao warns of kernels for other machines than this one."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
