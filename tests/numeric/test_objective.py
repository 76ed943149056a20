"""The fast objective against the plain reference, and the plain reference against autograd of the formula."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goldsmith.objective.cross_entropy import ObjectiveSums, OutputHead, cross_entropy
from goldsmith.objective.linear_cross_entropy import default_chunk_size, linear_cross_entropy

SHAPES = [(1, 2, 1), (5, 11, 4), (123, 507, 36), (252, 97, 33)]  # K, V, D: awkward on purpose
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "soft cap": {"soft_cap": 3.0},
    "scaled": {"logit_scale": 0.25},
    "all": {"bias": True, "soft_cap": 2.0, "logit_scale": 1.75},
}


def inputs(shape, dtype, *, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    K, V, D = shape
    hidden = torch.randn(K, D, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, generator=generator, dtype=dtype, requires_grad=True)
    bias_V = torch.randn(V, generator=generator, dtype=dtype, requires_grad=True) if bias else None
    ids = torch.randint(V, (K,), generator=generator)
    weights = torch.tensor([0.5, 1.0, 2.0, 1.0])[torch.arange(K) % 4]
    return hidden, weight, bias_V, ids, weights


def run(function, shape, dtype, head_options, label_smoothing, **options) -> tuple[ObjectiveSums, list[torch.Tensor]]:
    head_options = dict(head_options)
    hidden, weight, bias, ids, weights = inputs(shape, dtype, bias=head_options.pop("bias", False))
    head = OutputHead(weight_VD=weight, bias_V=bias, **head_options)
    sums = function(hidden, head, ids, weights, label_smoothing=label_smoothing, **options)
    leaves = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    return sums, list(torch.autograd.grad(sums.weighted_nll * 0.37, leaves))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).norm() / b.norm().clamp_min(1e-300)).detach())


@pytest.mark.parametrize(("shape", "head", "label_smoothing"), list(itertools.product(SHAPES, HEADS, [0.0, 0.1])))
@pytest.mark.parametrize("chunk_size", [1, 7, 10_000])
def test_fast_equals_plain_in_float64(shape, head, label_smoothing, chunk_size):
    plain, plain_grads = run(cross_entropy, shape, torch.float64, HEADS[head], label_smoothing)
    fast, fast_grads = run(
        linear_cross_entropy, shape, torch.float64, HEADS[head], label_smoothing, chunk_size=chunk_size
    )
    assert relative(fast.weighted_nll, plain.weighted_nll) <= 1e-10
    assert float(fast.weight_sum) == float(plain.weight_sum)
    assert float((fast.log_probs_K - plain.log_probs_K).abs().max()) <= 1e-10
    for fast_grad, plain_grad in zip(fast_grads, plain_grads, strict=True):
        assert float((fast_grad - plain_grad).norm()) <= 1e-10 * max(1.0, float(plain_grad.norm()))


@pytest.mark.parametrize(("shape", "head"), list(itertools.product(SHAPES, HEADS)))
def test_fast_is_no_less_accurate_than_plain_in_float32(shape, head):
    """Judged against the float64 truth: the fast path may err twice as much as the plain one, plus one rounding."""
    truth, truth_grads = run(cross_entropy, shape, torch.float64, HEADS[head], 0.0)
    plain, plain_grads = run_rounded(cross_entropy, shape, HEADS[head])
    fast, fast_grads = run_rounded(linear_cross_entropy, shape, HEADS[head], chunk_size=50)

    def check(of_fast, of_plain, of_truth):
        floor = 4e-7 * float(of_truth.norm())
        error_fast, error_plain = ((x.double() - of_truth).norm() for x in (of_fast, of_plain))
        assert float(error_fast) <= 2 * float(error_plain) + floor

    check(fast.weighted_nll, plain.weighted_nll, truth.weighted_nll)
    check(fast.log_probs_K, plain.log_probs_K, truth.log_probs_K)
    for triple in zip(fast_grads, plain_grads, truth_grads, strict=True):
        check(*triple)


def run_rounded(function, shape, head_options, **options):
    """The float64 inputs rounded to float32, so that both precisions see the same numbers as nearly as can be."""
    head_options = dict(head_options)
    hidden, weight, bias, ids, weights = inputs(shape, torch.float64, bias=head_options.pop("bias", False))
    leaves = [None if t is None else t.detach().float().requires_grad_() for t in (hidden, weight, bias)]
    head = OutputHead(weight_VD=leaves[1], bias_V=leaves[2], **head_options)
    sums = function(leaves[0], head, ids, weights, **options)
    return sums, list(torch.autograd.grad(sums.weighted_nll * 0.37, [leaf for leaf in leaves if leaf is not None]))


@pytest.mark.parametrize("function", [cross_entropy, linear_cross_entropy])
def test_gradient_of_a_logit_is_probability_minus_one_hot(function):
    """With the identity as output embedding, hidden states are logits."""
    logits = torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    head = OutputHead(weight_VD=torch.eye(3, dtype=torch.float64))
    sums = function(logits, head, torch.tensor([1]), torch.tensor([2.0]))
    (grad,) = torch.autograd.grad(sums.weighted_nll, logits)
    expected = 2.0 * (torch.softmax(logits.detach(), -1) - torch.tensor([[0.0, 1.0, 0.0]]))
    assert torch.allclose(grad, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("function", [cross_entropy, linear_cross_entropy])
def test_gradcheck(function):
    hidden, weight, bias, ids, weights = inputs((4, 5, 3), torch.float64, bias=True)

    def nll(hidden, weight, bias):
        head = OutputHead(weight_VD=weight, bias_V=bias, soft_cap=2.0, logit_scale=0.7)
        return function(hidden, head, ids, weights, label_smoothing=0.2).weighted_nll

    assert torch.autograd.gradcheck(nll, (hidden, weight, bias))


@given(cut=st.integers(1, 40), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_sums_of_parts_are_the_sum_of_the_whole(cut, seed):
    hidden, weight, _, ids, weights = inputs((41, 13, 6), torch.float64, seed=seed)
    head = OutputHead(weight_VD=weight)
    whole = linear_cross_entropy(hidden, head, ids, weights)
    parts = [
        linear_cross_entropy(hidden[part], head, ids[part], weights[part])
        for part in (slice(None, cut), slice(cut, None))
    ]
    assert float(sum(part.weighted_nll for part in parts) - whole.weighted_nll) == pytest.approx(0.0, abs=1e-10)
    assert sum(float(part.weight_sum) for part in parts) == float(whole.weight_sum)


def test_frozen_output_embedding_gets_no_gradient():
    hidden, weight, _, ids, weights = inputs((9, 7, 4), torch.float64)
    head = OutputHead(weight_VD=weight.detach())
    sums = linear_cross_entropy(hidden, head, ids, weights)
    sums.weighted_nll.backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_no_gradient_is_computed_when_none_is_wanted():
    hidden, weight, _, ids, weights = inputs((9, 7, 4), torch.float64)
    with torch.no_grad():
        sums = linear_cross_entropy(hidden, OutputHead(weight_VD=weight), ids, weights)
    assert not sums.weighted_nll.requires_grad


def test_huge_logits_stay_finite():
    hidden = torch.full((3, 2), 1e4, dtype=torch.float32, requires_grad=True)
    weight = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [0.5, 0.5]], requires_grad=True)
    sums = linear_cross_entropy(hidden, OutputHead(weight_VD=weight), torch.tensor([0, 1, 2]), torch.ones(3))
    sums.weighted_nll.backward()
    assert torch.isfinite(sums.log_probs_K).all()
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()


def test_default_chunk_is_bounded():
    assert default_chunk_size(49_152) * 49_152 * 4 <= 64 * 2**20
    assert default_chunk_size(10**9) == 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype):
    hidden, weight, _, ids, weights = inputs((64, 300, 16), torch.float64)
    truth = cross_entropy(hidden, OutputHead(weight_VD=weight), ids, weights)
    half = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight)]
    for function in (cross_entropy, linear_cross_entropy):
        sums = function(half[0], OutputHead(weight_VD=half[1]), ids, weights)
        assert sums.weighted_nll.dtype == torch.float32
        assert relative(sums.weighted_nll.double(), truth.weighted_nll) < 2e-2


def test_no_gradient_product_is_made_under_no_grad(monkeypatch):
    hidden, weight, bias, ids, weights = inputs((9, 7, 4), torch.float64, bias=True)
    monkeypatch.setattr(torch.Tensor, "scatter_add_", lambda *_: pytest.fail("a gradient was computed"))
    with torch.no_grad():
        linear_cross_entropy(hidden, OutputHead(weight_VD=weight, bias_V=bias), ids, weights)
