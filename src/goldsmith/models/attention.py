"""Attention over a pack: every segment attends causally to itself and to nothing else (but to a context that it shares).

Registered with `transformers` as `goldsmith_packed`. No mask function is registered with it: for such a name
`transformers` builds no mask, and the layout of the pack takes its place. It is set around the decoder's forward with
`pack_layout`.

Three ways, chosen by what is asked for: PyTorch's flash kernel on a CPU (`attention_cpu.py`), its variable-length flash
kernels on CUDA in half precision (`attention_cuda.py`), and for the rest (float32 on CUDA, soft caps, narrow values,
other devices) `scaled_dot_product_attention` or plain products over the groups of the layout.

Legend: N tokens of the pack, H heads, G segments of a group, L longest of the group, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

from goldsmith.errors import ModelError
from goldsmith.models import attention_cpu, attention_cuda
from goldsmith.models.attention_cuda import in_product_dtype, takes_varlen
from goldsmith.models.attention_function import PackedFlash, PackedKernels
from goldsmith.models.layout import PackLayout, current_layout, gather_groups

__all__ = ["PACKED_ATTENTION", "SharedContextError", "packed_attention"]

PACKED_ATTENTION = "goldsmith_packed"


class SharedContextError(RuntimeError):
    """This kind of attention does not compute segments with ancestors: pack every row with its own context."""


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that `transformers` layers call.

    Args:
        query: [1, H, N, D]; key and value may have fewer heads, each shared by H / heads queries.

    Returns:
        [1, N, H, D], and no attention weights.

    Raises:
        ModelError: the layer asks for something that this attention does not do (attention sinks, an own mask,
            attention in both directions).
    """
    layout = current_layout()
    name = type(module).__name__
    if layout is None or layout.num_tokens != query.shape[2] or query.shape[0] != 1:
        raise RuntimeError(f"{name}: packed attention outside of a pack of its size; use LikelihoodModel")
    if others.get("s_aux") is not None:
        raise ModelError(f"{name} uses attention sinks, which packed attention does not compute")
    if attention_mask is not None:
        raise ModelError(f"{name} builds an attention mask of its own, which packed attention does not apply")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise ModelError(f"{name} attends in both directions; goldsmith trains causal language models")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)

    # The flash kernels want values as wide as keys; latent attention (DeepSeek-V3) has narrower ones.
    if softcap is None and dropout == 0.0 and query.shape[-1] == value.shape[-1]:
        flash: Callable[..., torch.Tensor] = PackedFlash.apply
        kernels: PackedKernels | None = None
        if _is_cpu(query):
            if torch.is_autocast_enabled("cpu") and query.dtype != torch.float64:
                # Some of the three come in half precision and some do not; the kernels want one type.
                with torch.autocast("cpu", enabled=False):
                    wide = [tensor.float() for tensor in (query, key, value)]
                    return flash(*wide, layout, scale, sliding_window, attention_cpu), None
            kernels = attention_cpu
        elif query.device.type == "cuda":
            query, key, value = in_product_dtype(query, key, value)
            kernels = attention_cuda if takes_varlen(query) else None
        if kernels is not None:
            return flash(query, key, value, layout, scale, sliding_window, kernels), None
    if layout.ancestors:
        raise SharedContextError(f"{name}: this kind of attention does not compute a shared context")
    padded = [gather_groups(tensor[0].transpose(0, 1), layout) for tensor in (query, key, value)]
    outputs = []
    for group, group_query, group_key, group_value in zip(layout.groups, *padded, strict=True):
        if softcap is not None:
            attended = _soft_capped(
                group_query, group_key, group_value, layout, scale, sliding_window, softcap, dropout
            )
        else:
            mask = None
            if sliding_window is not None and group.length > sliding_window:
                mask = layout.window_mask(group.length, group.length, sliding_window, group_query)
            attended = functional.scaled_dot_product_attention(
                group_query,
                group_key,
                group_value,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=group_query.shape[1] != group_key.shape[1],
            )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[layout.slot_N][None], None


def _is_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def _soft_capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackLayout,
    scale: float,
    window: int | None,
    soft_cap: float,
    dropout: float,
) -> torch.Tensor:
    """Plain attention with bounded scores, `cap * tanh(scores / cap)` (Gemma 2); [G, H, L, D] in and out."""
    length, repeats = query.shape[2], query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = soft_cap * torch.tanh(query @ key.transpose(2, 3) * (scale / soft_cap))
    scores = scores + layout.window_mask(length, length, window or length, scores)
    sum_dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    probabilities = torch.softmax(scores, dim=-1, dtype=sum_dtype).to(value.dtype)
    return functional.dropout(probabilities, dropout) @ value


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
