"""Decoder layers by hand: one autograd node a layer, few passes over memory, little kept for the backward pass.

A layer of the Llama kind (normalise, attend, add, normalise, gated MLP, add) in eager PyTorch makes some fifty passes over
its activations and keeps about thirty of their size. Here residuals are added inside the matrix products, rotary
embedding and gating work in place, norms and the gated product are computed again in the backward pass (they cost one
pass each), and about eleven times the activations' size is kept. The last layer computes its MLP for gold positions only.

An *instance's* forward is replaced, for the classes in the table below, on a CPU, in float32 or float64, where every part is
the plain module that its class says (an adapter's layer is not, and keeps its own forward). Outside of a pack
the instance runs the forward of its class. The proof that every model must pass runs these layers too.

Legend: N tokens, R rows of the output (N, or the gold ones), D width, H query heads, J key-value heads, W width of a head,
I width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm

from goldsmith.models.attention_cpu import attend, attend_backward
from goldsmith.models.layout import PackLayout, current_layout

__all__ = ["install_decoder_layers"]

# Layer class -> class of its norms. Exact classes: a subclass may compute something else.
LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    LlamaDecoderLayer: LlamaRMSNorm,
    MistralDecoderLayer: MistralRMSNorm,
    Qwen2DecoderLayer: Qwen2RMSNorm,
    Qwen3DecoderLayer: Qwen3RMSNorm,
}

# The tensors of a layer in the order in which the autograd node takes them.
PARAMETERS = (
    "input_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.q_proj.bias",
    "self_attn.k_proj.weight",
    "self_attn.k_proj.bias",
    "self_attn.v_proj.weight",
    "self_attn.v_proj.bias",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "self_attn.o_proj.weight",
    "self_attn.o_proj.bias",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.gate_proj.bias",
    "mlp.up_proj.weight",
    "mlp.up_proj.bias",
    "mlp.down_proj.weight",
    "mlp.down_proj.bias",
)


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """What a layer computes with besides its tensors."""

    head_width: int
    scale: float
    window: int | None
    epsilon: float
    is_last: bool


def install_decoder_layers(causal_lm: PreTrainedModel) -> int:
    """Replace the forward of every layer that can be computed by hand, and of the final norm; returns how many layers."""
    decoder = causal_lm.get_decoder()
    layers = [module for module in decoder.modules() if type(module) in LAYERS]
    for number, layer in enumerate(layers):
        settings = _settings(layer, is_last=number == len(layers) - 1)
        if settings is None:
            return 0
        layer.forward = partial(_forward, layer, settings)
    final_norm = getattr(decoder, "norm", None)
    if layers and type(final_norm) is LAYERS[type(layers[0])]:
        final_norm.forward = partial(_forward_norm, final_norm)
    return len(layers)


def _settings(layer: Any, *, is_last: bool) -> LayerSettings | None:
    """None where a part of the layer is not the plain module that is computed here."""
    norm = LAYERS[type(layer)]
    attention, mlp = layer.self_attn, layer.mlp
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    norms: list[Any] = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    epsilons: set[Any] = {module.variance_epsilon for module in norms if type(module) is norm}
    is_plain = (
        all(type(linear) is nn.Linear for linear in linears)
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
    if layout is None or position_embeddings is None or not _by_hand(hidden_states):
        plain: torch.Tensor = type(layer).forward(
            layer, hidden_states, *arguments, position_embeddings=position_embeddings, **keywords
        )
        return plain
    tensors = [_tensor(layer, name) for name in PARAMETERS]
    cos, sin = (table[0].to(hidden_states.dtype) for table in position_embeddings)
    apply: Callable[..., torch.Tensor] = _DecoderLayer.apply
    return apply(hidden_states[0], cos, sin, settings, layout, *tensors)[None]


def _by_hand(hidden: torch.Tensor) -> bool:
    return (
        hidden.device.type == "cpu"
        and hidden.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
    )


def _tensor(layer: nn.Module, name: str) -> torch.Tensor | None:
    found: Any = layer
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, torch.Tensor) else None


def _forward_norm(norm: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    if current_layout() is None or not _by_hand(hidden_states):
        plain: torch.Tensor = type(norm).forward(norm, hidden_states)
        return plain
    apply: Callable[..., torch.Tensor] = _RMSNorm.apply
    return apply(hidden_states, norm.weight, norm.variance_epsilon)


# ---------------------------------------------------------------------------------------------------------------- pieces


def _scales(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """1 / root mean square over the last dimension, kept as 1."""
    norms: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norms.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()


def _norm_backward(
    grad: torch.Tensor, normalized: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `x * scales * weight`; `grad` is overwritten.

    Args:
        normalized: x * scales.

    Returns:
        the gradient of x *before* its factor `scales`, so that the caller can add it to a residual in one pass, and the
        gradient of the weight.
    """
    products = grad * normalized
    grad_weight = products.flatten(0, -2).sum(dim=0)
    projections = (products @ weight).div_(weight.shape[0]).unsqueeze(-1)
    return grad.mul_(weight).addcmul_(normalized, projections, value=-1.0), grad_weight


def _rotate(x_NHW: torch.Tensor, cos_NW: torch.Tensor, sin_NW: torch.Tensor, *, back: bool = False) -> None:
    """Rotary embedding in place: the first half of a head's width is rotated against the second."""
    half = x_NHW.shape[-1] // 2
    cos, sin = cos_NW[:, None, :half], sin_NW[:, None, :half]
    sign = -1.0 if back else 1.0
    first, second = x_NHW[..., :half], x_NHW[..., half:]
    rotated_first = (first * cos).addcmul_(second, sin, value=-sign)
    second.mul_(cos).addcmul_(first, sin, value=sign)
    first.copy_(rotated_first)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    torch.mm(x, weight.T, out=out)
    if bias is not None:
        out += bias


class _RMSNorm(torch.autograd.Function):
    """Root-mean-square norm (Zhang and Sennrich 2019) that keeps its input and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        scales = _scales(x, epsilon)
        ctx.save_for_backward(x, weight, scales)
        return (x * scales).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, weight, scales = ctx.saved_tensors
        grad_x, grad_weight = _norm_backward(grad.clone(), x * scales, scales, weight)
        return grad_x.mul_(scales), grad_weight if ctx.needs_input_grad[1] else None, None


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
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        p = dict(zip(PARAMETERS, tensors, strict=True))
        width, epsilon = settings.head_width, settings.epsilon
        query_weight, key_weight = _present(p["self_attn.q_proj.weight"]), _present(p["self_attn.k_proj.weight"])
        query_size, key_size = query_weight.shape[0], key_weight.shape[0]
        num_tokens = x_ND.shape[0]

        scales_N1 = _scales(x_ND, epsilon)
        normalized_ND = (x_ND * scales_N1).mul_(_present(p["input_layernorm.weight"]))
        joint = x_ND.new_empty(num_tokens, query_size + 2 * key_size)
        sizes = [query_size, key_size, key_size]
        for part, name in zip(joint.split(sizes, dim=1), ("q_proj", "k_proj", "v_proj"), strict=True):
            _linear(normalized_ND, _present(p[f"self_attn.{name}.weight"]), p[f"self_attn.{name}.bias"], part)
        del normalized_ND
        heads = joint.view(num_tokens, -1, width)
        num_query, num_key = query_size // width, key_size // width
        unnormed, head_scales = None, None
        if p["self_attn.q_norm.weight"] is not None:
            unnormed = heads[:, : num_query + num_key].clone()
            head_scales = _scales(unnormed, epsilon)
            heads[:, :num_query].mul_(head_scales[:, :num_query]).mul_(p["self_attn.q_norm.weight"])
            heads[:, num_query : num_query + num_key].mul_(head_scales[:, num_query:]).mul_(
                _present(p["self_attn.k_norm.weight"])
            )
        _rotate(heads[:, : num_query + num_key], cos_NW, sin_NW)
        query, key, value = heads.split([num_query, num_key, num_key], dim=1)
        attended_NHW, attention_saved = attend(query, key, value, layout, settings.scale, settings.window)

        rows = layout.gold_rows_R if settings.is_last else None
        attended = attended_NHW.view(num_tokens, query_size)
        residual = x_ND
        if rows is not None:
            attended, residual = attended.index_select(0, rows), x_ND.index_select(0, rows)
        middle_RD = torch.addmm(residual, attended, _present(p["self_attn.o_proj.weight"]).T)
        if p["self_attn.o_proj.bias"] is not None:
            middle_RD += p["self_attn.o_proj.bias"]

        middle_scales_R1 = _scales(middle_RD, epsilon)
        normalized_RD = (middle_RD * middle_scales_R1).mul_(_present(p["post_attention_layernorm.weight"]))
        inner = _present(p["mlp.gate_proj.weight"]).shape[0]
        gate_RI, up_RI = (middle_RD.new_empty(len(middle_RD), inner) for _ in range(2))
        _linear(normalized_RD, _present(p["mlp.gate_proj.weight"]), p["mlp.gate_proj.bias"], gate_RI)
        _linear(normalized_RD, _present(p["mlp.up_proj.weight"]), p["mlp.up_proj.bias"], up_RI)
        del normalized_RD
        gated_RI = functional.silu(gate_RI).mul_(up_RI)
        out_RD = torch.addmm(middle_RD, gated_RI, _present(p["mlp.down_proj.weight"]).T)
        if p["mlp.down_proj.bias"] is not None:
            out_RD += p["mlp.down_proj.bias"]

        ctx.save_for_backward(
            x_ND, cos_NW, sin_NW, scales_N1, joint, unnormed, head_scales, attended_NHW, middle_RD, middle_scales_R1,
            gate_RI, up_RI, *tensors, *attention_saved,
        )  # fmt: skip
        ctx.settings, ctx.layout = settings, layout
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[Any, ...]:
        settings, layout = ctx.settings, ctx.layout
        saved = ctx.saved_tensors
        (x_ND, cos_NW, sin_NW, scales_N1, joint, unnormed, head_scales, attended_NHW, middle_RD, middle_scales_R1, gate_RI, up_RI) = saved[:12]  # fmt: skip  # noqa: E501
        p = dict(zip(PARAMETERS, saved[12 : 12 + len(PARAMETERS)], strict=True))
        attention_saved = saved[12 + len(PARAMETERS) :]
        needed = dict(zip(PARAMETERS, ctx.needs_input_grad[5:], strict=True))
        grads: dict[str, torch.Tensor] = {}

        def parameter_grads(name: str, grad_y: torch.Tensor, inputs: torch.Tensor) -> None:
            if needed[f"{name}.weight"]:
                grads[f"{name}.weight"] = grad_y.T @ inputs
            if needed[f"{name}.bias"]:
                grads[f"{name}.bias"] = grad_y.sum(dim=0)

        grad_RD = grad_out.contiguous()
        # The gated MLP.
        gated = functional.silu(gate_RI)
        parameter_grads("mlp.down_proj", grad_RD, gated * up_RI)
        grad_gated = grad_RD @ p["mlp.down_proj.weight"]
        grad_up = gated.mul_(grad_gated)
        grad_gate = torch.ops.aten.silu_backward(grad_gated.mul_(up_RI), gate_RI)
        del gated, grad_gated
        unscaled_RD = middle_RD * middle_scales_R1
        normalized_RD = unscaled_RD * p["post_attention_layernorm.weight"]
        parameter_grads("mlp.gate_proj", grad_gate, normalized_RD)
        parameter_grads("mlp.up_proj", grad_up, normalized_RD)
        del normalized_RD
        grad_normalized = (grad_gate @ p["mlp.gate_proj.weight"]).addmm_(grad_up, p["mlp.up_proj.weight"])
        del grad_gate, grad_up
        unscaled_grad, grads["post_attention_layernorm.weight"] = _norm_backward(
            grad_normalized, unscaled_RD, middle_scales_R1, p["post_attention_layernorm.weight"]
        )
        grad_middle = torch.addcmul(grad_RD, unscaled_grad, middle_scales_R1)
        del unscaled_RD, unscaled_grad, grad_normalized

        # Attention.
        rows = layout.gold_rows_R if settings.is_last else None
        attended = attended_NHW.flatten(1)
        parameter_grads("self_attn.o_proj", grad_middle, attended if rows is None else attended.index_select(0, rows))
        grad_attended = grad_middle @ p["self_attn.o_proj.weight"]
        if rows is not None:
            everywhere = grad_attended.new_zeros(x_ND.shape[0], grad_attended.shape[1])
            grad_attended = everywhere.index_copy_(0, rows, grad_attended)
        num_tokens, width = x_ND.shape[0], settings.head_width
        query_size, key_size = p["self_attn.q_proj.weight"].shape[0], p["self_attn.k_proj.weight"].shape[0]
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
        _rotate(grad_heads[:, : sizes[0] + sizes[1]], cos_NW, sin_NW, back=True)
        if unnormed is not None:
            for name, part in (("q_norm", slice(0, sizes[0])), ("k_norm", slice(sizes[0], sizes[0] + sizes[1]))):
                scales, key_name = head_scales[:, part], f"self_attn.{name}.weight"
                grad_part, grads[key_name] = _norm_backward(
                    grad_heads[:, part].contiguous(), unnormed[:, part] * scales, scales, p[key_name]
                )
                torch.mul(grad_part, scales, out=grad_heads[:, part])

        unscaled_ND = x_ND * scales_N1
        normalized_ND = unscaled_ND * p["input_layernorm.weight"]
        parts = grad_joint.split([query_size, key_size, key_size], dim=1)
        for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
            parameter_grads(f"self_attn.{name}", part, normalized_ND)
        del normalized_ND
        wanted = [grads.get(name) if needed[name] else None for name in PARAMETERS]
        if not (ctx.needs_input_grad[0] or needed["input_layernorm.weight"]):
            # Nothing below this layer is trained.
            return (None, None, None, None, None, *wanted)
        grad_normalized = parts[0] @ p["self_attn.q_proj.weight"]
        grad_normalized.addmm_(parts[1], p["self_attn.k_proj.weight"])
        grad_normalized.addmm_(parts[2], p["self_attn.v_proj.weight"])
        unscaled_grad, grads["input_layernorm.weight"] = _norm_backward(
            grad_normalized, unscaled_ND, scales_N1, p["input_layernorm.weight"]
        )
        if rows is None:
            grad_x = torch.addcmul(grad_middle, unscaled_grad, scales_N1)
        else:
            grad_x = unscaled_grad.mul_(scales_N1).index_add_(0, rows, grad_middle)
        wanted[0] = grads["input_layernorm.weight"] if needed["input_layernorm.weight"] else None
        return (grad_x, None, None, None, None, *wanted)


def _present(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor
