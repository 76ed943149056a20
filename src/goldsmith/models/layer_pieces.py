"""The element-wise pieces of a decoder layer by hand: few passes over memory, in place where that is possible.

Two makes of each: plain PyTorch operations for a CPU, in float32 and float64, and Triton kernels for CUDA
(`layer_kernels.py`), where products are in half precision and sums in float32. `pieces_for` says which.

Legend: N rows, D width of a row, H heads, W width of a head, I width of the MLP.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional

__all__ = ["Pieces", "pieces_for"]


class Pieces(Protocol):
    """What a layer computes between its matrix products."""

    def normalize(
        self, x_ND: torch.Tensor, weight_D: torch.Tensor, epsilon: float, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Root-mean-square norm (Zhang and Sennrich 2019), `x * scales * weight` in `dtype`, and the scales [N, 1]."""

    def normalize_again(
        self, x_ND: torch.Tensor, scales_N1: torch.Tensor, weight_D: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The norm once more, and `x * scales` where that came about."""

    def normalize_backward(
        self,
        grad_ND: torch.Tensor,
        x_ND: torch.Tensor,
        unscaled_ND: torch.Tensor | None,
        scales_N1: torch.Tensor,
        weight_D: torch.Tensor,
        residual_ND: torch.Tensor | None,
        *,
        wants_weight: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gradient of x, added to that of the residual, and the gradient of the weight; `grad_ND` may be overwritten."""

    def rotate(self, x_NHW: torch.Tensor, cos_NW: torch.Tensor, sin_NW: torch.Tensor, *, back: bool = False) -> None:
        """Rotary embedding in place: the first half of a head's width is rotated against the second."""

    def gate(self, gate_NI: torch.Tensor, up_NI: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up`."""

    def gate_backward(
        self, grad_NI: torch.Tensor, gate_NI: torch.Tensor, up_NI: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of gate and up; `grad_NI` may be overwritten."""


class _PlainPieces:
    def normalize(
        self, x_ND: torch.Tensor, weight_D: torch.Tensor, epsilon: float, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        norms: torch.Tensor = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True)
        scales_N1 = norms.square_().div_(x_ND.shape[-1]).add_(epsilon).rsqrt_()
        return (x_ND * scales_N1).mul_(weight_D).to(dtype), scales_N1

    def normalize_again(
        self, x_ND: torch.Tensor, scales_N1: torch.Tensor, weight_D: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        unscaled_ND = x_ND * scales_N1
        return (unscaled_ND * weight_D).to(dtype), unscaled_ND

    def normalize_backward(
        self,
        grad_ND: torch.Tensor,
        x_ND: torch.Tensor,
        unscaled_ND: torch.Tensor | None,
        scales_N1: torch.Tensor,
        weight_D: torch.Tensor,
        residual_ND: torch.Tensor | None,
        *,
        wants_weight: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if unscaled_ND is None:
            unscaled_ND = x_ND * scales_N1
        products = grad_ND * unscaled_ND
        grad_weight = products.flatten(0, -2).sum(dim=0) if wants_weight else None
        projections = (products @ weight_D).div_(weight_D.shape[0]).unsqueeze(-1)
        unscaled_grad = grad_ND.mul_(weight_D).addcmul_(unscaled_ND, projections, value=-1.0)
        if residual_ND is None:
            return unscaled_grad.mul_(scales_N1), grad_weight
        return torch.addcmul(residual_ND, unscaled_grad, scales_N1), grad_weight

    def rotate(self, x_NHW: torch.Tensor, cos_NW: torch.Tensor, sin_NW: torch.Tensor, *, back: bool = False) -> None:
        half = x_NHW.shape[-1] // 2
        cos, sin = cos_NW[:, None, :half], sin_NW[:, None, :half]
        sign = -1.0 if back else 1.0
        first, second = x_NHW[..., :half], x_NHW[..., half:]
        rotated_first = (first * cos).addcmul_(second, sin, value=-sign)
        second.mul_(cos).addcmul_(first, sin, value=sign)
        first.copy_(rotated_first)

    def gate(self, gate_NI: torch.Tensor, up_NI: torch.Tensor) -> torch.Tensor:
        return functional.silu(gate_NI).mul_(up_NI)

    def gate_backward(
        self, grad_NI: torch.Tensor, gate_NI: torch.Tensor, up_NI: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        grad_up = functional.silu(gate_NI).mul_(grad_NI)
        grad_gate: torch.Tensor = torch.ops.aten.silu_backward(grad_NI.mul_(up_NI), gate_NI)
        return grad_gate, grad_up


_PLAIN = _PlainPieces()


def pieces_for(device_type: str) -> Pieces:
    """The make for a kind of device."""
    if device_type == "cuda":
        from goldsmith.models.layer_kernels import KernelPieces

        return KernelPieces()
    return _PLAIN
