"""Frozen weights in 4 bits, as `bitsandbytes` keeps them for qlora: what they are as numbers, and what keeps them as they are.

The model that is trained is the one whose weights are the unpacked ones: its products, its gradients and its merged result are
theirs. Two habits of `bitsandbytes` would change the numbers on the way, and are turned off when a model is loaded: on a CPU with
bfloat16 instructions a layer in evaluation repacks its weights for good, for a product in bfloat16 that has no gradient; and
a layer casts its bias to the type of its products when it first runs, after a fingerprint may have been taken. And what its kernels
unpack is compared with the definition, a shape at a time: one of them is wrong for some.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from goldsmith.errors import ModelError

__all__ = [
    "copy_unpacked",
    "has_packed_weights",
    "keep_as_packed",
    "num_weights",
    "packed_bytes",
    "packed_parts",
    "products_in_float32",
    "take_products_in",
]


# Of each shape, so many are compared with what they should be.
PROVEN_WEIGHTS = 1 << 20


def _is_packed(parameter: object) -> bool:
    return getattr(parameter, "quant_state", None) is not None


def _packed_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every linear layer of 4 bits by name; of an adapted one the layer below the factors."""
    for name, module in model.named_modules():
        # Its own parameter: `peft`'s layer passes on the weight of the one below.
        if _is_packed(module._parameters.get("weight")):
            yield name, module


def has_packed_weights(model: nn.Module) -> bool:
    """Whether any weight is in 4 bits."""
    return any(_is_packed(parameter) for parameter in model.parameters())


def num_weights(parameter: torch.Tensor) -> int:
    """How many weights a parameter stands for: a byte of a packed one holds two."""
    state: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def packed_parts(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the codes of a packed parameter are scaled by, by name; nothing of any other."""
    state: Any = getattr(parameter, "quant_state", None)
    return {} if state is None else dict(sorted(state.as_dict(packed=True).items()))


def packed_bytes(parameter: torch.Tensor) -> int:
    """The memory of a parameter, with what it is scaled by."""
    return sum(part.numel() * part.element_size() for part in (parameter, *packed_parts(parameter).values()))


def keep_as_packed(model: nn.Module) -> None:
    """Let no forward pass change what is frozen; see the module. To be done once, when the model was loaded.

    Raises:
        ModelError: a shape of weights that is unpacked to other numbers than its codes stand for.
    """
    proven = set()
    for name, layer in _packed_layers(model):
        layer.support_avx512bf16_for_cpu = False
        if layer.bias is not None:
            layer.bias.data = layer.bias.data.to(layer.compute_dtype)
        shape = tuple(layer.weight.quant_state.shape)
        if shape not in proven:
            _prove(name, layer.weight, shape)
            proven.add(shape)


def _prove(name: str, parameter: Any, shape: tuple[int, ...]) -> None:
    """Seen with bitsandbytes 0.50.2 on a CPU with AVX-512: rows of 16, 32 or 96 weights. Multiples of 64 are right."""
    expected = _looked_up(parameter, PROVEN_WEIGHTS)
    found = _unpacked(parameter).reshape(-1)[: len(expected)].float()
    if not float((found - expected).abs().max()) <= 1e-3 * float(expected.abs().max()):
        raise ModelError(
            f"{name}: bitsandbytes unpacks 4-bit weights of the shape {list(shape)} on {found.device.type} to other numbers than "
            "their codes stand for",
            remedy="use `kind: lora`, or another version of bitsandbytes; on another kind of device it may be right",
        )


def _looked_up(parameter: Any, limit: int) -> torch.Tensor:
    """The first weights of a packed parameter by the definition: the code's number times the scale of its block."""
    from bitsandbytes.functional import dequantize_blockwise

    state = parameter.quant_state
    scales = state.absmax
    if state.nested:
        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    size = min(limit, math.prod(state.shape))
    pairs = parameter.data.reshape(-1).view(torch.uint8)[: -(-size // 2)]
    codes = torch.stack([pairs >> 4, pairs & 15], dim=1).reshape(-1)[:size].long()
    blocks = torch.arange(size, device=codes.device) // state.blocksize
    values: torch.Tensor = state.code.float()[codes] * scales.float()[blocks]
    return values


@torch.no_grad()
def copy_unpacked(packed: nn.Module, plain: PreTrainedModel) -> int:
    """Give a plain model the weights of a packed one, wherever that has packed ones, unpacked; returns how many layers.

    Args:
        packed: with an adapter or without.
        plain: of the same architecture, not adapted.
    """
    layers = list(_packed_layers(packed))
    for name, layer in layers:
        target: Any = plain.get_submodule(name.removesuffix(".base_layer"))
        weight = _unpacked(layer.weight)
        target.weight.copy_(weight.T if isinstance(target, Conv1D) else weight)
        if layer.bias is not None:
            target.bias.copy_(layer.bias)
    return len(layers)


def _unpacked(parameter: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight: torch.Tensor = dequantize_4bit(parameter.data, parameter.quant_state)
    return weight


def take_products_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Packed layers take their products in this type from now on, whatever they trained in."""
    for _, layer in _packed_layers(model):
        _take_products_in(layer, dtype)


def _take_products_in(layer: Any, dtype: torch.dtype) -> None:
    layer.compute_dtype = dtype
    if layer.bias is not None:
        layer.bias.data = layer.bias.data.to(dtype)


@contextmanager
def products_in_float32(model: nn.Module) -> Iterator[None]:
    """Packed layers take their products in float32 while this is open, whatever they train in; for comparing."""
    layers = [layer for _, layer in _packed_layers(model)]
    before = [layer.compute_dtype for layer in layers]
    take_products_in(model, torch.float32)
    try:
        yield
    finally:
        for layer, dtype in zip(layers, before, strict=True):
            # A bias was cast to float32, which lost nothing, so neither does the way back.
            _take_products_in(layer, dtype)
