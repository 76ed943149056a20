"""The pieces of a decoder layer as Triton kernels: every tensor is read once and written once, sums are float32.

See `layer_pieces.py` for what each computes. Residuals may be float32 or half precision, products are half precision.

Legend: N rows, D width of a row, H heads, W width of a head, I width of the MLP.
"""

# Kernels are compiled by Triton from their source; their arguments have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with PyTorch for CUDA, and with no other
    triton = None

__all__ = ["KernelPieces", "has_kernels"]

# Programs that share the rows of a norm's backward pass, each with its own sum for the weight.
BACKWARD_PROGRAMS = 512
GATE_BLOCK = 2048


def has_kernels() -> bool:
    """Whether they can be compiled here."""
    return triton is not None


class KernelPieces:
    """`Pieces` for CUDA. Tensors are contiguous but for heads, whose last dimension is."""

    def normalize(
        self, x_ND: torch.Tensor, weight_D: torch.Tensor, epsilon: float, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        width = x_ND.shape[-1]
        rows = x_ND.numel() // width
        y_ND = torch.empty_like(x_ND, dtype=dtype)
        scales = torch.empty(*x_ND.shape[:-1], 1, dtype=torch.float32, device=x_ND.device)
        _normalize[(rows,)](
            x_ND, weight_D, y_ND, scales, epsilon, D=width, BLOCK=_power_of_two(width), num_warps=_warps(width)
        )
        return y_ND, scales

    def normalize_again(
        self, x_ND: torch.Tensor, scales_N1: torch.Tensor, weight_D: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        width = x_ND.shape[-1]
        y_ND = torch.empty_like(x_ND, dtype=dtype)
        _normalize_again[(x_ND.numel() // width,)](
            x_ND, weight_D, y_ND, scales_N1, D=width, BLOCK=_power_of_two(width), num_warps=_warps(width)
        )
        return y_ND, None

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
        width = x_ND.shape[-1]
        rows = x_ND.numel() // width
        programs = min(rows, BACKWARD_PROGRAMS)
        grad_x = torch.empty_like(x_ND)
        sums = torch.empty(programs if wants_weight else 0, width, dtype=torch.float32, device=x_ND.device)
        _normalize_backward[(programs,)](
            grad_ND,
            x_ND,
            scales_N1,
            weight_D,
            grad_x if residual_ND is None else residual_ND,
            grad_x,
            sums,
            rows,
            triton.cdiv(rows, programs),
            D=width,
            BLOCK=_power_of_two(width),
            HAS_RESIDUAL=residual_ND is not None,
            WANTS_WEIGHT=wants_weight,
            num_warps=_warps(width),
        )
        return grad_x, sums.sum(dim=0) if wants_weight else None

    def rotate(self, x_NHW: torch.Tensor, cos_NW: torch.Tensor, sin_NW: torch.Tensor, *, back: bool = False) -> None:
        tokens, heads, width = x_NHW.shape
        half = width // 2
        _rotate[(tokens,)](
            x_NHW,
            cos_NW,
            sin_NW,
            x_NHW.stride(0),
            x_NHW.stride(1),
            cos_NW.stride(0),
            -1.0 if back else 1.0,
            HEADS=heads,
            HALF=half,
            BLOCK_H=_power_of_two(heads),
            BLOCK_W=_power_of_two(half),
            num_warps=4,
        )

    def gate(self, gate_NI: torch.Tensor, up_NI: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(gate_NI)
        size = gate_NI.numel()
        _gate[(triton.cdiv(size, GATE_BLOCK),)](gate_NI, up_NI, out, size, BLOCK=GATE_BLOCK, num_warps=8)
        return out

    def gate_backward(
        self, grad_NI: torch.Tensor, gate_NI: torch.Tensor, up_NI: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        grad_gate, grad_up = torch.empty_like(gate_NI), grad_NI
        size = gate_NI.numel()
        _gate_backward[(triton.cdiv(size, GATE_BLOCK),)](
            grad_NI, gate_NI, up_NI, grad_gate, grad_up, size, BLOCK=GATE_BLOCK, num_warps=8
        )
        return grad_gate, grad_up


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _warps(width: int) -> int:
    return 4 if width <= 1024 else 8 if width <= 4096 else 16


_normalize: Any = None
_normalize_again: Any = None
_normalize_backward: Any = None
_rotate: Any = None
_gate: Any = None
_gate_backward: Any = None
if triton is not None:

    @triton.jit
    def _normalize(x, weight, y, scales, epsilon, D: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        inside = columns < D
        values = tl.load(x + row * D + columns, mask=inside, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(values * values) / D + epsilon)
        factors = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + row * D + columns, (values * scale * factors).to(y.dtype.element_ty), mask=inside)
        tl.store(scales + row, scale)

    @triton.jit
    def _normalize_again(x, weight, y, scales, D: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        inside = columns < D
        values = tl.load(x + row * D + columns, mask=inside, other=0.0).to(tl.float32)
        factors = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scales + row)
        tl.store(y + row * D + columns, (values * scale * factors).to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def _normalize_backward(
        grad, x, scales, weight, residual, grad_x, sums, rows, turns,
        D: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, WANTS_WEIGHT: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        factors = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for turn in range(turns):
            row = program + turn * tl.num_programs(0)
            inside = (columns < D) & (row < rows)
            gradients = tl.load(grad + row * D + columns, mask=inside, other=0.0).to(tl.float32)
            values = tl.load(x + row * D + columns, mask=inside, other=0.0).to(tl.float32)
            scale = tl.load(scales + row, mask=row < rows, other=0.0)
            values *= scale
            if WANTS_WEIGHT:
                total += gradients * values
            gradients *= factors
            result = (gradients - values * (tl.sum(gradients * values) / D)) * scale
            if HAS_RESIDUAL:
                result += tl.load(residual + row * D + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_x + row * D + columns, result.to(grad_x.dtype.element_ty), mask=inside)
        if WANTS_WEIGHT:
            tl.store(sums + program * D + columns, total, mask=columns < D)

    @triton.jit
    def _rotate(
        x, cos, sin, token_stride, head_stride, table_stride, sign,
        HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        heads = tl.arange(0, BLOCK_H)[:, None]
        columns = tl.arange(0, BLOCK_W)[None, :]
        inside = (heads < HEADS) & (columns < HALF)
        table = token * table_stride + columns
        cosines = tl.load(cos + table, mask=columns < HALF, other=0.0).to(tl.float32)
        sines = tl.load(sin + table, mask=columns < HALF, other=0.0).to(tl.float32) * sign
        first_place = x + token * token_stride + heads * head_stride + columns
        second_place = first_place + HALF
        first = tl.load(first_place, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(second_place, mask=inside, other=0.0).to(tl.float32)
        tl.store(first_place, (first * cosines - second * sines).to(x.dtype.element_ty), mask=inside)
        tl.store(second_place, (second * cosines + first * sines).to(x.dtype.element_ty), mask=inside)

    @triton.jit
    def _gate(gate, up, out, size, BLOCK: tl.constexpr):
        places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = places < size
        gates = tl.load(gate + places, mask=inside, other=0.0).to(tl.float32)
        ups = tl.load(up + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + places, (gates * tl.sigmoid(gates) * ups).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _gate_backward(grad, gate, up, grad_gate, grad_up, size, BLOCK: tl.constexpr):
        places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = places < size
        gradients = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
        gates = tl.load(gate + places, mask=inside, other=0.0).to(tl.float32)
        ups = tl.load(up + places, mask=inside, other=0.0).to(tl.float32)
        shares = tl.sigmoid(gates)
        slopes = shares * (1.0 + gates * (1.0 - shares))
        tl.store(grad_gate + places, (gradients * ups * slopes).to(grad_gate.dtype.element_ty), mask=inside)
        tl.store(grad_up + places, (gradients * gates * shares).to(grad_up.dtype.element_ty), mask=inside)
