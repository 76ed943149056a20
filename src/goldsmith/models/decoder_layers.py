"""Decoder layers by hand: one autograd node a layer, few passes over memory, little kept for the backward pass.

A layer of the Llama kind (normalise, attend, add, normalise, gated MLP, add) in eager PyTorch makes some fifty passes over
its activations and keeps about thirty of their size. Here residuals are added inside the matrix products, rotary
embedding and gating work in place, norms and the gated product are computed again in the backward pass (they cost one
pass each), and about eleven times the activations' size is kept. The last layer computes its MLP for gold positions only.

An *instance's* forward is replaced, for the classes in the table below, where every part is the plain module that its class
says, or such a one with the two factors of LoRA beside it (`lora.py`). On a CPU it computes in float32 or float64; on CUDA
products are in half precision (autocast's, or the model's own), residuals in the type that they come in, and the pieces
between are Triton kernels. Outside of a pack the instance runs the forward of its class. The proof that every model must
pass runs these layers too.

Legend: N tokens, R rows of the output (N, or the gold ones), D width, H query heads, J key-value heads, W width of a head,
I width of the MLP, F rank of the factors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm

from goldsmith.models import attention_cpu, attention_cuda
from goldsmith.models.layer_kernels import has_kernels
from goldsmith.models.layer_linears import LINEARS, PARAMETERS, LayerLinears, present
from goldsmith.models.layer_pieces import pieces_for
from goldsmith.models.layout import PackLayout, current_layout
from goldsmith.models.lora import is_active, plain_lora

__all__ = ["install_decoder_layers"]

# The linear layers that have an input in common.
QUERY_KEY_VALUE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

# Layer class -> class of its norms. Exact classes: a subclass may compute something else.
LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    LlamaDecoderLayer: LlamaRMSNorm,
    MistralDecoderLayer: MistralRMSNorm,
    Qwen2DecoderLayer: Qwen2RMSNorm,
    Qwen3DecoderLayer: Qwen3RMSNorm,
}


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """What a layer computes with besides its tensors.

    Attributes:
        lora: its linear layers that have factors beside them, and the scale of their product.
    """

    head_width: int
    scale: float
    window: int | None
    epsilon: float
    is_last: bool
    lora: dict[str, float]


def install_decoder_layers(causal_lm: PreTrainedModel) -> int:
    """Replace the forward of every layer that can be computed by hand, and of the final norm; returns how many layers."""
    decoder = causal_lm.get_decoder()
    layers = [module for module in decoder.modules() if type(module) in LAYERS]
    # All are decided before any is changed: a model that is computed by hand in part would count as one that is not.
    plans = []
    for number, layer in enumerate(layers):
        settings = _settings(layer, is_last=number == len(layers) - 1)
        if settings is None:
            return 0
        plans.append((layer, settings))
    for layer, settings in plans:
        layer.forward = partial(_forward, layer, settings)
    final_norm = getattr(decoder, "norm", None)
    if layers and type(final_norm) is LAYERS[type(layers[0])]:
        final_norm.forward = partial(_forward_norm, final_norm)
    return len(layers)


def _settings(layer: Any, *, is_last: bool) -> LayerSettings | None:
    """None where a part of the layer is not the plain module that is computed here."""
    norm = LAYERS[type(layer)]
    attention, mlp = layer.self_attn, layer.mlp
    linears = {name: layer.get_submodule(name) for name in LINEARS}
    factors = {name: plain_lora(linear) for name, linear in linears.items()}
    norms: list[Any] = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    epsilons: set[Any] = {module.variance_epsilon for module in norms if type(module) is norm}
    is_plain = (
        all(type(linear) is nn.Linear or factors[name] is not None for name, linear in linears.items())
        and all(type(module) is norm for module in norms)
        and len(epsilons) == 1
        and type(mlp.act_fn) in (nn.SiLU, SiLUActivation)
        and not attention.attention_dropout
    )
    if not is_plain:
        return None
    return LayerSettings(
        head_width=attention.head_dim,
        scale=attention.scaling,
        window=_window(attention),
        epsilon=epsilons.pop(),
        is_last=is_last,
        lora={name: found.scale for name, found in factors.items() if found is not None},
    )


def _window(attention: Any) -> int | None:
    """Qwen decides by layer; Mistral has one window for all layers, in its configuration."""
    if hasattr(attention, "sliding_window"):
        window: int | None = attention.sliding_window
        return window
    return getattr(attention.config, "sliding_window", None) if "Mistral" in type(attention).__name__ else None


def _forward(
    layer: Any,
    settings: LayerSettings,
    hidden_states: torch.Tensor,
    *arguments: Any,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **keywords: Any,
) -> torch.Tensor:
    layout = current_layout()
    dtype = _product_dtype(hidden_states)
    is_by_hand = layout is not None and position_embeddings is not None and dtype is not None
    if is_by_hand and settings.lora:
        is_by_hand = all(is_active(layer.get_submodule(name)) for name in settings.lora)
    if layout is None or position_embeddings is None or dtype is None or not is_by_hand:
        plain: torch.Tensor = type(layer).forward(
            layer, hidden_states, *arguments, position_embeddings=position_embeddings, **keywords
        )
        return plain
    tensors = [_tensor(layer, name) for name in PARAMETERS]
    for name in settings.lora:
        factors = plain_lora(layer.get_submodule(name))
        assert factors is not None
        tensors += [factors.down_FD, factors.up_DF]
    cos, sin = (table[0] for table in position_embeddings)
    if hidden_states.device.type == "cpu":
        cos, sin = cos.to(dtype), sin.to(dtype)
    apply: Callable[..., torch.Tensor] = _DecoderLayer.apply
    return apply(hidden_states[0], cos, sin, settings, layout, dtype, *tensors)[None]


def _product_dtype(hidden: torch.Tensor) -> torch.dtype | None:
    """The type of the matrix products; None where such hidden states are not computed by hand."""
    if hidden.device.type == "cpu":
        is_exact = hidden.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
        return hidden.dtype if is_exact else None
    if hidden.device.type != "cuda" or not has_kernels():
        return None
    if torch.is_autocast_enabled("cuda") and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype("cuda")
    return hidden.dtype if hidden.dtype in (torch.bfloat16, torch.float16) else None


def _tensor(layer: nn.Module, name: str) -> torch.Tensor | None:
    found: Any = layer
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, torch.Tensor) else None


def _forward_norm(norm: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    if current_layout() is None or _product_dtype(hidden_states) is None:
        plain: torch.Tensor = type(norm).forward(norm, hidden_states)
        return plain
    apply: Callable[..., torch.Tensor] = _RMSNorm.apply
    return apply(hidden_states, norm.weight, norm.variance_epsilon)


class _RMSNorm(torch.autograd.Function):
    """Root-mean-square norm that keeps its input and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        y, scales = pieces_for(x.device.type).normalize(x, weight, epsilon, x.dtype)
        ctx.save_for_backward(x, weight, scales)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, weight, scales = ctx.saved_tensors
        grad_x, grad_weight = pieces_for(x.device.type).normalize_backward(
            # A copy: the gradient is not ours to overwrite.
            grad.clone(), x, None, scales, weight, None, wants_weight=ctx.needs_input_grad[1]
        )  # fmt: skip
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), None


class _DecoderLayer(torch.autograd.Function):
    """One layer, [N, D] -> [R, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: torch.Tensor,
        cos_NW: torch.Tensor,
        sin_NW: torch.Tensor,
        settings: LayerSettings,
        layout: PackLayout,
        dtype: torch.dtype,
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        device = x_ND.device.type
        with torch.autocast(device, enabled=False):
            pieces, attend = pieces_for(device), _attention_of(device).attend
            linears = LayerLinears(tensors, settings.lora, dtype)
            own = linears.own
            width, epsilon = settings.head_width, settings.epsilon
            query_size, key_size = linears.size("self_attn.q_proj"), linears.size("self_attn.k_proj")
            num_tokens = x_ND.shape[0]

            normalized_ND, scales_N1 = pieces.normalize(x_ND, present(own["input_layernorm.weight"]), epsilon, dtype)
            joint = normalized_ND.new_empty(num_tokens, query_size + 2 * key_size)
            sizes = [query_size, key_size, key_size]
            linears.apply(QUERY_KEY_VALUE, normalized_ND, out=joint.split(sizes, dim=1))
            del normalized_ND
            heads = joint.view(num_tokens, -1, width)
            num_query, num_key = query_size // width, key_size // width
            unnormed, head_scales = None, None
            if own["self_attn.q_norm.weight"] is not None:
                unnormed = heads[:, : num_query + num_key].clone()
                head_scales = joint.new_empty(num_tokens, num_query + num_key, 1, dtype=scales_N1.dtype)
                for name, part in _normed_heads(num_query, num_key):
                    normed, head_scales[:, part] = pieces.normalize(
                        unnormed[:, part].contiguous(), present(own[name]), epsilon, dtype
                    )
                    heads[:, part] = normed
            pieces.rotate(heads[:, : num_query + num_key], cos_NW, sin_NW)
            query, key, value = heads.split([num_query, num_key, num_key], dim=1)
            attended_NHW, attention_saved = attend(query, key, value, layout, settings.scale, settings.window)

            rows = layout.gold_rows_R if settings.is_last else None
            attended = attended_NHW.view(num_tokens, query_size)
            residual = x_ND
            if rows is not None:
                attended, residual = attended.index_select(0, rows), x_ND.index_select(0, rows)
            middle_RD = linears.apply_and_add("self_attn.o_proj", attended, residual)

            normalized_RD, middle_scales_R1 = pieces.normalize(
                middle_RD, present(own["post_attention_layernorm.weight"]), epsilon, dtype
            )
            gate_RI, up_RI = linears.apply(GATE_UP, normalized_RD)
            del normalized_RD
            out_RD = linears.apply_and_add("mlp.down_proj", pieces.gate(gate_RI, up_RI), middle_RD)

        ctx.save_for_backward(
            x_ND, cos_NW, sin_NW, scales_N1, joint, unnormed, head_scales, attended_NHW, middle_RD, middle_scales_R1,
            gate_RI, up_RI, *tensors, *linears.downs.values(), *attention_saved,
        )  # fmt: skip
        ctx.settings, ctx.layout, ctx.dtype, ctx.num_tensors = settings, layout, dtype, len(tensors)
        ctx.down_names = tuple(linears.downs)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[Any, ...]:
        settings, layout, dtype = ctx.settings, ctx.layout, ctx.dtype
        saved = ctx.saved_tensors
        (x_ND, cos_NW, sin_NW, scales_N1, joint, unnormed, head_scales, attended_NHW, middle_RD, middle_scales_R1, gate_RI, up_RI) = saved[:12]  # fmt: skip  # noqa: E501
        tensors, others = saved[12 : 12 + ctx.num_tensors], saved[12 + ctx.num_tensors :]
        downs = dict(zip(ctx.down_names, others, strict=False))
        attention_saved = others[len(downs) :]
        linears = LayerLinears(tensors, settings.lora, dtype, downs=downs, needed=ctx.needs_input_grad[6:])
        own, needed = linears.own, linears.needed
        pieces, attend_backward = pieces_for(x_ND.device.type), _attention_of(x_ND.device.type).attend_backward

        grad_RD = grad_out.contiguous()
        grad_product_RD = grad_RD.to(dtype)
        # The gated MLP.
        grad_gated = linears.backward(("mlp.down_proj",), (grad_product_RD,), pieces.gate(gate_RI, up_RI))
        grad_gate, grad_up = pieces.gate_backward(grad_gated, gate_RI, up_RI)
        del grad_gated, grad_product_RD
        middle_weight = present(own["post_attention_layernorm.weight"])
        normalized_RD, unscaled_RD = pieces.normalize_again(middle_RD, middle_scales_R1, middle_weight, dtype)
        grad_normalized = linears.backward(GATE_UP, (grad_gate, grad_up), normalized_RD)
        del normalized_RD, grad_gate, grad_up
        grad_middle, grad_weight = pieces.normalize_backward(
            grad_normalized, middle_RD, unscaled_RD, middle_scales_R1, middle_weight, grad_RD,
            wants_weight=needed["post_attention_layernorm.weight"],
        )  # fmt: skip
        linears.note_norm("post_attention_layernorm.weight", grad_weight)
        del unscaled_RD, grad_normalized

        # Attention.
        rows = layout.gold_rows_R if settings.is_last else None
        attended = attended_NHW.flatten(1)
        grad_product_RD = grad_middle.to(dtype)
        if rows is not None:
            attended = attended.index_select(0, rows)
        grad_attended = linears.backward(("self_attn.o_proj",), (grad_product_RD,), attended)
        del grad_product_RD, attended
        if rows is not None:
            everywhere = grad_attended.new_zeros(x_ND.shape[0], grad_attended.shape[1])
            grad_attended = everywhere.index_copy_(0, rows, grad_attended)
        num_tokens, width = x_ND.shape[0], settings.head_width
        query_size, key_size = linears.size("self_attn.q_proj"), linears.size("self_attn.k_proj")
        sizes = [query_size // width, key_size // width, key_size // width]
        query, key, value = joint.view(num_tokens, -1, width).split(sizes, dim=1)
        grad_joint = torch.empty_like(joint)
        grad_heads = grad_joint.view(num_tokens, -1, width)
        grad_query, grad_key, grad_value = grad_heads.split(sizes, dim=1)
        attend_backward(
            grad_attended.view(num_tokens, -1, width),
            query,
            key,
            value,
            attended_NHW,
            attention_saved,
            layout,
            settings.scale,
            settings.window,
            into=(grad_query, grad_key, grad_value),
        )
        del grad_attended
        pieces.rotate(grad_heads[:, : sizes[0] + sizes[1]], cos_NW, sin_NW, back=True)
        if unnormed is not None:
            for name, part in _normed_heads(sizes[0], sizes[1]):
                grad_part, grad_weight = pieces.normalize_backward(
                    grad_heads[:, part].contiguous(), unnormed[:, part].contiguous(), None,
                    head_scales[:, part].contiguous(), present(own[name]), None, wants_weight=needed[name],
                )  # fmt: skip
                linears.note_norm(name, grad_weight)
                grad_heads[:, part] = grad_part

        first_weight = present(own["input_layernorm.weight"])
        normalized_ND, unscaled_ND = pieces.normalize_again(x_ND, scales_N1, first_weight, dtype)
        parts = grad_joint.split([query_size, key_size, key_size], dim=1)
        # Where nothing below this layer is trained, that is all.
        wants_input = ctx.needs_input_grad[0] or needed["input_layernorm.weight"]
        grad_normalized = linears.backward(QUERY_KEY_VALUE, parts, normalized_ND, wants_input=wants_input)
        del normalized_ND
        if not wants_input:
            return (None, None, None, None, None, None, *linears.gradients())
        grad_x, grad_weight = pieces.normalize_backward(
            grad_normalized, x_ND, unscaled_ND, scales_N1, first_weight, grad_middle if rows is None else None,
            wants_weight=needed["input_layernorm.weight"],
        )  # fmt: skip
        linears.note_norm("input_layernorm.weight", grad_weight)
        if rows is not None:
            grad_x = grad_x.index_add_(0, rows, grad_middle)
        return (grad_x, None, None, None, None, None, *linears.gradients())


def _normed_heads(num_query: int, num_key: int) -> tuple[tuple[str, slice], tuple[str, slice]]:
    return (
        ("self_attn.q_norm.weight", slice(0, num_query)),
        ("self_attn.k_norm.weight", slice(num_query, num_query + num_key)),
    )


def _attention_of(device_type: str) -> ModuleType:
    return attention_cuda if device_type == "cuda" else attention_cpu
