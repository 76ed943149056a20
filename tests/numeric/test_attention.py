"""Packed attention against a plain softmax over one segment at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goldsmith.errors import ModelError
from goldsmith.models import attention
from goldsmith.models.attention import packed_attention
from goldsmith.models.layout import PackLayout, group_segments, pack_layout

LENGTHS = [
    [1],
    [5],
    [3, 3, 3],
    [1, 2, 3, 4, 5, 6, 7, 8],
    [40, 1, 7, 7, 39, 300, 2, 41],
    [600, 2, 600],
]


class Layer(torch.nn.Module):
    is_causal = True


def plain(query, key, value, lengths, *, scale, window=None, softcap=None):
    """[1, H, N, D] three times -> [1, N, H, D], a loop over segments and a full matrix of scores."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    outputs, start = [], 0
    for length in lengths:
        own = slice(start, start + length)
        scores = query[0, :, own] @ key[0, :, own].transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        hidden = distance < 0
        if window is not None:
            hidden |= distance >= window
        outputs.append(torch.softmax(scores.masked_fill(hidden, float("-inf")), -1) @ value[0, :, own])
        start += length
    return torch.cat(outputs, dim=1).transpose(0, 1)[None]


def tensors(lengths, *, heads=4, key_heads=2, width=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # As layers make them: [1, N, H, D] transposed, so not contiguous.
    return [
        torch.randn(1, sum(lengths), h, width, generator=generator, dtype=dtype).transpose(1, 2).requires_grad_()
        for h in (heads, key_heads, key_heads)
    ]


def packed(lengths, leaves, **options):
    with pack_layout(PackLayout.plan(lengths)):
        return packed_attention(Layer(), *leaves, None, **options)[0]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("window", [None, 1, 4, 280])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_forward_and_backward_in_float64(lengths, window, softcap, key_heads):
    leaves = tensors(lengths, key_heads=key_heads)
    out = packed(lengths, leaves, scaling=0.3, sliding_window=window, softcap=softcap)
    expected = plain(*leaves, lengths, scale=0.3, window=window, softcap=softcap)
    assert float((out - expected).abs().max()) <= 1e-12
    direction = torch.randn_like(expected)
    for got, wanted in zip(
        torch.autograd.grad((out * direction).sum(), leaves),
        torch.autograd.grad((expected * direction).sum(), leaves),
        strict=True,
    ):
        assert float((got - wanted).norm()) <= 1e-11 * float(wanted.norm().clamp_min(1.0))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_other_devices_path_gives_the_same(lengths, monkeypatch):
    """The path for other devices, run on the CPU by taking the flash kernel's place."""
    leaves = tensors(lengths, dtype=torch.float64)
    fast = packed(lengths, leaves, sliding_window=4)
    monkeypatch.setattr(attention, "_is_cpu", lambda tensor: False)
    general = packed(lengths, leaves, sliding_window=4)
    assert float((fast - general).abs().max()) <= 1e-12


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    window=st.one_of(st.none(), st.integers(1, 30)),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_any_segments(lengths, window, seed):
    leaves = tensors(lengths, seed=seed, dtype=torch.float32)
    out = packed(lengths, leaves, sliding_window=window)
    expected = plain(*(leaf.double() for leaf in leaves), lengths, scale=8**-0.5, window=window)
    assert float((out.double() - expected).abs().max()) <= 2e-6


def test_no_segment_sees_another():
    lengths = [3, 9, 9, 4]
    leaves = [leaf.detach() for leaf in tensors(lengths)]
    before = packed(lengths, leaves)
    for leaf in leaves:
        leaf[:, :, 3:12] = 1e6  # the second segment
    after = packed(lengths, leaves)
    others = [*range(3), *range(12, 25)]
    assert torch.equal(before[:, others], after[:, others])


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_groups_are_the_cheapest_contiguous_cut(lengths):
    ordered = sorted(lengths, reverse=True)
    sizes = group_segments(ordered)
    assert sum(sizes) == len(ordered)
    assert min(sizes) >= 1


def test_short_segments_share_a_call_and_long_ones_stand_alone():
    assert len(group_segments(sorted([20 + i % 9 for i in range(128)], reverse=True))) <= 3
    assert group_segments([4000, 2000, 500]) == [1, 1, 1]


def test_misuse_is_refused_by_name():
    leaves = tensors([4])
    with pytest.raises(RuntimeError, match="Layer: packed attention outside of a pack"):
        packed_attention(Layer(), *leaves, None)
    with pytest.raises(ModelError, match="Layer uses attention sinks"):
        packed([4], leaves, s_aux=torch.zeros(4))
    with pytest.raises(ModelError, match="in both directions"):
        packed([4], leaves, is_causal=False)
    with pack_layout(PackLayout.plan([4])), pytest.raises(ModelError, match="mask of its own"):
        packed_attention(Layer(), *leaves, torch.zeros(1, 1, 4, 4))
