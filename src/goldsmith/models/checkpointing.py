"""Activation checkpointing: of each decoder layer only the input is kept, and the backward pass computes the layer again.

An instance's forward is wrapped, whichever it is: that of its class in `transformers`, or the one by hand of
`decoder_layers`. The same operations run on the same tensors, so the gradient is the same; on a CPU to the bit.

The layout of a pack is a context variable that is gone by the time of the backward pass, which on a GPU runs in another
thread besides. It is kept with each layer and set again around the second computation.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from goldsmith.errors import ModelError
from goldsmith.models.layout import current_layout, pack_layout

__all__ = ["checkpoint_layers", "decoder_layers", "keep_activations"]


def decoder_layers(causal_lm: PreTrainedModel) -> list[nn.Module]:
    """The layers of the decoder in order, outermost only."""
    layers: list[nn.Module] = []
    inner: set[nn.Module] = set()
    for module in causal_lm.get_decoder().modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inner:
            layers.append(module)
            inner.update(module.modules())
    return layers


def checkpoint_layers(causal_lm: PreTrainedModel) -> int:
    """From now on compute every decoder layer again in the backward pass; returns how many layers. Idempotent.

    Raises:
        ModelError: the model's class does not say which of its modules are layers.
    """
    layers = decoder_layers(causal_lm)
    if not layers:
        raise ModelError(
            f"{type(causal_lm).__name__} does not say which of its modules are layers, so they cannot be computed again",
            remedy="set training.activation_checkpointing: none",
        )
    for layer in layers:
        if not _is_wrapped(layer):
            layer.forward = partial(_forward, layer.forward)
    return len(layers)


def keep_activations(causal_lm: PreTrainedModel) -> None:
    """Undo `checkpoint_layers`."""
    for layer in decoder_layers(causal_lm):
        own: Any = layer.forward
        if _is_wrapped(layer):
            layer.forward = own.args[0]


def _is_wrapped(layer: nn.Module) -> bool:
    return isinstance(layer.forward, partial) and layer.forward.func is _forward


def _forward(own: Any, *arguments: Any, **keywords: Any) -> Any:
    if not torch.is_grad_enabled():
        return own(*arguments, **keywords)
    layout = current_layout()

    def compute(*arguments: Any, **keywords: Any) -> Any:
        if layout is None:
            return own(*arguments, **keywords)
        with pack_layout(layout):
            return own(*arguments, **keywords)

    # Not reentrant: gradients reach tensors that the layer closes over, and whatever needs none costs none.
    return checkpoint(compute, *arguments, use_reentrant=False, **keywords)
