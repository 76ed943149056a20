"""LoRA's linear layers in few passes: the product of the factors is added inside a matrix product.

`peft`'s layer casts its input to the factors' type, multiplies by the scale, adds and casts back: five passes over activations for
two small products. Here `x W^T` is computed, `(x A^T) B^T` is added to it in place, and the backward pass does the same.
Taken for the plain kind (one adapter, no dropout, no bias or magnitude of its own); every other keeps `peft`'s forward.

Legend: N rows, D width in, O width out, F rank. The factors are A [F, D] and B [O, F].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from goldsmith.objective.linear_cross_entropy import product

__all__ = ["LoraFactors", "install_lora_layers", "is_active", "plain_lora"]


@dataclass(frozen=True, kw_only=True)
class LoraFactors:
    """`scale * x A^T B^T` is what they add.

    Attributes:
        down_FD: A.
        up_DF: B, [O, F].
    """

    down_FD: torch.Tensor
    up_DF: torch.Tensor
    scale: float


def plain_lora(module: nn.Module) -> LoraFactors | None:
    """The factors of a linear layer of `peft`'s plain LoRA; None for everything else."""
    if f"{type(module).__module__}.{type(module).__qualname__}" != "peft.tuners.lora.layer.Linear":
        return None
    layer: Any = module
    if type(layer.base_layer) is not nn.Linear or layer.base_layer.weight.requires_grad:
        return None
    if layer.base_layer.bias is not None and layer.base_layer.bias.requires_grad:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or active[0] in layer.lora_variant or layer.lora_bias.get(active[0]):
        return None
    [name] = active
    if not isinstance(layer.lora_dropout[name], nn.Identity):
        return None
    return LoraFactors(
        down_FD=layer.lora_A[name].weight, up_DF=layer.lora_B[name].weight, scale=float(layer.scaling[name])
    )


def is_active(module: Any) -> bool:
    """Whether the factors are to be added now: neither merged into the weight nor turned off."""
    return not module.merged and not module.disable_adapters


def install_lora_layers(causal_lm: PreTrainedModel) -> int:
    """Replace the forward of every plain LoRA layer's instance; returns how many."""
    layers = [module for module in causal_lm.modules() if plain_lora(module) is not None]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    return len(layers)


def _forward(layer: Any, x: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
    factors = plain_lora(layer)
    if factors is None or arguments or keywords or not is_active(layer):
        plain: torch.Tensor = type(layer).forward(layer, x, *arguments, **keywords)
        return plain
    base = layer.base_layer
    apply: Callable[..., torch.Tensor] = _LoraLinear.apply
    return apply(x, base.weight, base.bias, factors.down_FD, factors.up_DF, factors.scale)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_OD: torch.Tensor,
        bias_O: torch.Tensor | None,
        down_FD: torch.Tensor,
        up_DF: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        device = x.device.type
        is_autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device) if is_autocast else weight_OD.dtype
        with torch.autocast(device, enabled=False):
            x_ND = x.flatten(0, -2).to(dtype)
            down_NF = x_ND @ down_FD.to(dtype).T
            y = nn.functional.linear(x_ND, weight_OD.to(dtype), None if bias_O is None else bias_O.to(dtype))
            y.addmm_(down_NF, up_DF.to(dtype).T, alpha=scale)
        ctx.save_for_backward(x_ND, down_NF, weight_OD, down_FD, up_DF)
        ctx.scale, ctx.shape, ctx.x_dtype = scale, x.shape, x.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x_ND, down_NF, weight_OD, down_FD, up_DF = ctx.saved_tensors
        dtype = x_ND.dtype
        grad_NO = grad.flatten(0, -2).to(dtype)
        grad_down_NF = (grad_NO @ up_DF.to(dtype)).mul_(ctx.scale)
        grad_x = grad_down = grad_up = None
        if ctx.needs_input_grad[3]:
            grad_down = product(grad_down_NF.T, x_ND).to(down_FD.dtype)
        if ctx.needs_input_grad[4]:
            grad_up = product(grad_NO.T, down_NF).mul_(ctx.scale).to(up_DF.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = (grad_NO @ weight_OD.to(dtype)).addmm_(grad_down_NF, down_FD.to(dtype))
            grad_x = grad_x.view(ctx.shape).to(ctx.x_dtype)
        return grad_x, None, None, grad_down, grad_up, None
