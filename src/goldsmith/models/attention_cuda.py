"""Packed attention on CUDA: PyTorch's variable-length flash kernels, forward and backward, in half precision.

These are the kernels behind `torch.nn.attention.varlen`, called as the operators under it: its function has changed its
signature from release to release, and gives no way to pass the normalizers over *all* keys to the backward pass, which
a shared context needs. Segments of any lengths go through one call, nothing is padded or masked.

Legend: N tokens of the pack, H query heads, J key-value heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from goldsmith.models.layout import PackLayout

__all__ = ["attend", "attend_backward", "in_product_dtype", "takes_varlen", "width_fits_varlen"]

_flash: Callable[..., tuple[torch.Tensor, ...]] = torch.ops.aten._flash_attention_forward
_flash_backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = (
    torch.ops.aten._flash_attention_backward
)


def in_product_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """In the type of matrix products: that of autocast where it is on. (Norms of queries and keys leave it; float64 stays.)"""
    if not torch.is_autocast_enabled("cuda") or tensors[0].dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype("cuda")
    return tuple(tensor.to(dtype) for tensor in tensors)


def takes_varlen(query: torch.Tensor) -> bool:
    """Whether the kernels take such queries: half precision, and heads of a width that fits."""
    return query.dtype in (torch.bfloat16, torch.float16) and width_fits_varlen(query.shape[-1])


def width_fits_varlen(width: int) -> bool:
    """A head's width must be a multiple of 8, up to 256."""
    return width % 8 == 0 and width <= 256


def attend(
    query_NHD: torch.Tensor,
    key_NJD: torch.Tensor,
    value_NJD: torch.Tensor,
    layout: PackLayout,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Packed attention on CUDA, outside of autograd; see `attention_cpu.attend`."""
    bounds, longest = layout.bounds_S1, max(layout.segment_lengths)
    out_NHD, normalizer_HN, random_state, unused, _ = _flash(
        query_NHD, key_NJD, value_NJD, bounds, bounds, longest, longest, 0.0, True, False,
        scale=scale, window_size_left=_left(window), window_size_right=0,
    )  # fmt: skip
    for (below, above), (query_bounds, key_bounds) in zip(layout.ancestors, layout.ancestor_bounds, strict=True):
        theirs_NHD, theirs_HN, *_ = _flash(
            query_NHD[below], key_NJD[above], value_NJD[above], query_bounds, key_bounds,
            below.stop - below.start, above.stop - above.start, 0.0, False, False,
            scale=scale, window_size_left=-1, window_size_right=-1,
        )  # fmt: skip
        # Attentions over disjoint keys join by their shares of the sum of the exponentials.
        ours_HN = normalizer_HN[:, below]
        both_HN = torch.logaddexp(ours_HN, theirs_HN)
        joined = out_NHD[below] * _share(ours_HN, both_HN) + theirs_NHD * _share(theirs_HN, both_HN)
        out_NHD[below] = joined.to(out_NHD.dtype)
        normalizer_HN[:, below] = both_HN
    return out_NHD, [normalizer_HN, random_state, unused]


def attend_backward(
    grad_NHD: torch.Tensor,
    query_NHD: torch.Tensor,
    key_NJD: torch.Tensor,
    value_NJD: torch.Tensor,
    out_NHD: torch.Tensor,
    saved: Sequence[torch.Tensor],
    layout: PackLayout,
    scale: float,
    window: int | None,
    *,
    into: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """The gradients of query, key and value, written over the three tensors `into`."""
    normalizer_HN, random_state, unused = saved
    bounds, longest = layout.bounds_S1, max(layout.segment_lengths)
    gradients = _flash_backward(
        grad_NHD, query_NHD, key_NJD, value_NJD, out_NHD, normalizer_HN, bounds, bounds, longest, longest, 0.0, True,
        random_state, unused, scale=scale, window_size_left=_left(window), window_size_right=0,
    )  # fmt: skip
    if layout.ancestors:
        # Shares of several parts are added up: not in half precision.
        gradients = tuple(gradient.float() for gradient in gradients)  # type: ignore[assignment]
    for (below, above), (query_bounds, key_bounds) in zip(layout.ancestors, layout.ancestor_bounds, strict=True):
        parts = _flash_backward(
            grad_NHD[below], query_NHD[below], key_NJD[above], value_NJD[above], out_NHD[below],
            normalizer_HN[:, below].contiguous(), query_bounds, key_bounds, below.stop - below.start,
            above.stop - above.start, 0.0, False, random_state, unused,
            scale=scale, window_size_left=-1, window_size_right=-1,
        )  # fmt: skip
        for gradient, part, where in zip(gradients, parts, (below, above, above), strict=True):
            gradient[where] += part
    for target, gradient in zip(into, gradients, strict=True):
        target.copy_(gradient)


def _left(window: int | None) -> int:
    """Keys to the left of a query that it sees besides its own; -1 for all."""
    return -1 if window is None else window - 1


def _share(part_HN: torch.Tensor, whole_HN: torch.Tensor) -> torch.Tensor:
    """[N, H, 1]."""
    return (part_HN - whole_HN).exp().T[..., None]
