"""How the CUDA path joins attentions over disjoint keys, with its kernels replaced by plain float64 ones.

The kernels themselves are set against the truth on a GPU (`tests/gpu`).
"""

import pytest
import torch

from goldsmith.models import attention_cpu, attention_cuda
from goldsmith.models.attention_function import PackedFlash
from goldsmith.models.layout import PackLayout


def flash(query, key, value, query_bounds, key_bounds, _max_q, _max_k, _dropout, is_causal, _debug, *, scale, **window):
    """The contract of `aten::_flash_attention_forward` for packed tensors [N, H, D]."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    out = torch.empty_like(query)
    normalizer = query.new_empty(query.shape[1], query.shape[0])
    for q0, q1, k0, k1 in zip(query_bounds[:-1], query_bounds[1:], key_bounds[:-1], key_bounds[1:], strict=True):
        scores = scores_of(query[q0:q1], key[k0:k1], is_causal, scale, window["window_size_left"])
        out[q0:q1] = (scores.softmax(-1) @ value[k0:k1].transpose(0, 1)).transpose(0, 1)
        normalizer[:, q0:q1] = scores.logsumexp(-1)
    return out, normalizer, torch.zeros(2), torch.zeros(0), torch.zeros(0)


def scores_of(query, key, is_causal, scale, left):
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    if is_causal:
        sees = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
        if left >= 0:
            sees &= torch.ones_like(sees).triu(-left)
        scores = scores.masked_fill(~sees, float("-inf"))
    return scores


def flash_backward(
    grad, query, key, value, out, normalizer, query_bounds, key_bounds, _q, _k, _dropout, is_causal, _state, _unused,
    *, scale, **window
):  # fmt: skip
    """The contract of `aten::_flash_attention_backward`: probabilities are those under the normalizers that it is given."""
    heads, repeats = key.shape[1], query.shape[1] // key.shape[1]
    wide_key, wide_value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    grads = [torch.zeros_like(query), torch.zeros_like(wide_key), torch.zeros_like(wide_value)]
    for q0, q1, k0, k1 in zip(query_bounds[:-1], query_bounds[1:], key_bounds[:-1], key_bounds[1:], strict=True):
        scores = scores_of(query[q0:q1], wide_key[k0:k1], is_causal, scale, window["window_size_left"])
        probabilities = (scores - normalizer[:, q0:q1, None]).exp()
        grad_probabilities = torch.einsum("qhd,khd->hqk", grad[q0:q1], wide_value[k0:k1])
        row_sums = (grad[q0:q1] * out[q0:q1]).sum(-1).T[..., None]
        grad_scores = probabilities * (grad_probabilities - row_sums) * scale
        grads[0][q0:q1] = torch.einsum("hqk,khd->qhd", grad_scores, wide_key[k0:k1])
        grads[1][k0:k1] = torch.einsum("hqk,qhd->khd", grad_scores, query[q0:q1])
        grads[2][k0:k1] = torch.einsum("hqk,qhd->khd", probabilities, grad[q0:q1])
    return grads[0], *(g.view(len(g), heads, repeats, -1).sum(2) for g in grads[1:])


@pytest.mark.parametrize(
    ("lengths", "parents", "window"),
    [
        ([5, 30, 1, 26], None, None),
        ([40, 3], None, 7),
        ([12, 9, 30, 3, 20], [-1, 0, 0, 2, -1], None),
    ],
)
def test_equals_the_cpu_path(lengths, parents, window, monkeypatch):
    monkeypatch.setattr(attention_cuda, "_flash", flash)
    monkeypatch.setattr(attention_cuda, "_flash_backward", flash_backward)
    # Sums over ancestors leave half precision; here they must not leave float64.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.manual_seed(0)
    layout = PackLayout.plan(lengths, segment_parents=parents)
    shapes = [(1, 4, sum(lengths), 8), (1, 2, sum(lengths), 8), (1, 2, sum(lengths), 8)]
    found = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    expected = [tensor.detach().clone().requires_grad_() for tensor in found]
    outs = [
        PackedFlash.apply(*tensors, layout, 0.3, window, kernels)
        for kernels, tensors in ((attention_cuda, found), (attention_cpu, expected))
    ]
    upstream = torch.randn_like(outs[0])
    for out in outs:
        out.backward(upstream)
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=1e-12)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-12)
