"""Packed attention for autograd: one function over the kernels of whichever device, which look at no autograd themselves.

Legend: N tokens of the pack, H query heads, J key-value heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from goldsmith.models.layout import PackLayout

__all__ = ["PackedFlash", "PackedKernels"]


class PackedKernels(Protocol):
    """What `attention_cpu` and `attention_cuda` both are."""

    def attend(
        self,
        query_NHD: torch.Tensor,
        key_NJD: torch.Tensor,
        value_NJD: torch.Tensor,
        layout: PackLayout,
        scale: float,
        window: int | None,
        /,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]: ...

    def attend_backward(
        self,
        grad_NHD: torch.Tensor,
        query_NHD: torch.Tensor,
        key_NJD: torch.Tensor,
        value_NJD: torch.Tensor,
        out_NHD: torch.Tensor,
        saved: Sequence[torch.Tensor],
        layout: PackLayout,
        scale: float,
        window: int | None,
        /,
        *,
        into: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> None: ...


class PackedFlash(torch.autograd.Function):
    """`attend` of `kernels`; [1, H, N, D] in (key and value [1, J, N, D]) and [1, N, H, D] out. Only unpadded tensors are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: PackLayout,
        scale: float,
        window: int | None,
        kernels: PackedKernels,
    ) -> torch.Tensor:
        query_NHD, key_NJD, value_NJD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        out_NHD, saved = kernels.attend(query_NHD, key_NJD, value_NJD, layout, scale, window)
        ctx.save_for_backward(query_NHD, key_NJD, value_NJD, out_NHD, *saved)
        ctx.layout, ctx.scale, ctx.window, ctx.kernels = layout, scale, window, kernels
        return out_NHD[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, out, *saved = ctx.saved_tensors
        into = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
        ctx.kernels.attend_backward(
            grad_out[0], query, key, value, out, saved, ctx.layout, ctx.scale, ctx.window, into=into
        )
        return (*(gradient.transpose(0, 1)[None] for gradient in into), None, None, None, None)
