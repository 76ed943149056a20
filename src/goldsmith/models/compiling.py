"""`torch.compile` for decoder layers: each layer by itself, with the number of tokens left open, so that nothing recompiles.

Packs differ in their number of tokens from micro-batch to micro-batch. Compiled once with that size as a symbol, a layer takes all
of them; filler to a fixed shape would be computed for nothing. Attention is left out: it calls a kernel as it is.
Layers by hand (`decoder_layers.py`) are left as they are: they are faster than what the compiler makes of the plain ones.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from goldsmith.models.attention import PACKED_ATTENTION, packed_attention

__all__ = ["compile_layers"]


def compile_layers(causal_lm: PreTrainedModel) -> int:
    """Compile every decoder layer that is not computed by hand, at its first call; returns how many."""
    names = set(getattr(causal_lm, "_no_split_modules", None) or ())
    modules = causal_lm.get_decoder().modules()
    layers = [module for module in modules if type(module).__name__ in names and "forward" not in vars(module)]
    # The layout of a pack is no argument of it, so a compiler must not look inside.
    AttentionInterface.register(PACKED_ATTENTION, torch.compiler.disable(packed_attention))
    for layer in layers:
        _compile(layer)
    return len(layers)


def _compile(layer: nn.Module) -> None:
    layer.compile(dynamic=True)
