"""`torch.compile` for decoder layers: each layer by itself, with the number of tokens left open, so that nothing recompiles.

Packs differ in their number of tokens from micro-batch to micro-batch. Compiled once with that size as a symbol, a layer takes all
of them; filler to a fixed shape would be computed for nothing. Attention is left out: it calls a kernel as it is, and reads the
layout of the pack, which is no argument of it. Layers by hand (`decoder_layers.py`) are left as they are: they are faster than what
the compiler makes of the plain ones.

An instance's forward is compiled, and not the call around it: layers that are computed again in the backward pass
(`checkpointing.py`) wrap the compiled forward. `design/0004-compilation.md` has what was measured.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from goldsmith.errors import ConfigError, MachineError
from goldsmith.models.attention import PACKED_ATTENTION, packed_attention

__all__ = ["compile_layers", "require_compilable"]

_compiled: WeakSet[nn.Module] = WeakSet()


def require_compilable(causal_lm: PreTrainedModel) -> None:
    """Refuse what `training.compile: layers` would do nothing for, or what this machine cannot compile.

    Raises:
        ConfigError: every layer is computed by hand.
        MachineError: a CPU without a C++ compiler.
    """
    if not _plain_layers(causal_lm):
        raise ConfigError(
            f"training.compile: layers of {type(causal_lm).__name__} are computed by hand here, which is faster than compiled "
            "ones; there is none to compile",
            remedy="set training.compile: 'off'",
        )
    if causal_lm.device.type == "cpu" and not _has_cpp_compiler():
        raise MachineError(
            "training.compile: layers wants a C++ compiler on a CPU, and none was found",
            remedy="install g++ or name one in the environment variable CXX, or set training.compile: 'off'",
        )


def compile_layers(causal_lm: PreTrainedModel) -> int:
    """Compile every decoder layer that is not computed by hand, at its first call; returns how many. Idempotent.

    To be done before `checkpoint_layers`.
    """
    layers = _plain_layers(causal_lm)
    # The layout of a pack is no argument of it, so a compiler must not look inside.
    AttentionInterface.register(PACKED_ATTENTION, torch.compiler.disable(packed_attention))
    for layer in layers:
        if layer not in _compiled:
            layer.forward = torch.compile(layer.forward, dynamic=True)
            _compiled.add(layer)
    return len(layers)


def _plain_layers(causal_lm: PreTrainedModel) -> list[nn.Module]:
    names = set(getattr(causal_lm, "_no_split_modules", None) or ())
    return [
        module
        for module in causal_lm.get_decoder().modules()
        if type(module).__name__ in names and (module in _compiled or "forward" not in vars(module))
    ]


def _has_cpp_compiler() -> bool:
    # Imported here: it takes a second.
    from torch._inductor import cpp_builder, exc

    builder: Any = cpp_builder
    try:
        builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return False
    return True
