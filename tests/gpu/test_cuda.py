"""What runs on CUDA only, against float64 truth on the CPU: kernels of attention and objective, a step, a run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from goldsmith.data.dataset import Dataset
from goldsmith.models import attention_cuda, likelihood
from goldsmith.models.attention import packed_attention
from goldsmith.models.compiling import compile_layers
from goldsmith.models.layer_pieces import pieces_for
from goldsmith.models.layout import PackLayout, pack_layout
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.models.step import forward_backward
from goldsmith.objective.cross_entropy import OutputHead, cross_entropy
from goldsmith.objective.linear_cross_entropy import linear_cross_entropy
from goldsmith.types import TokenizedExample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a CUDA device")


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float(
        (found.detach().double().cpu() - truth.detach().double().cpu()).norm() / truth.detach().double().norm()
    )


def plain_attention(query, key, value, layout, window):
    """[1, H, N, D] float64; every token sees its segment and the ancestors' tokens."""
    tokens = layout.num_tokens
    sees = torch.zeros(tokens, tokens, dtype=torch.bool)
    start = 0
    for length in layout.segment_lengths:
        own = slice(start, start + length)
        sees[own, own] = torch.ones(length, length, dtype=torch.bool).tril()
        if window is not None:
            sees[own, own] &= torch.ones(length, length, dtype=torch.bool).triu(1 - window)
        start += length
    for below, above in layout.ancestors:
        sees[below, above] = True
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.transpose(2, 3)) * query.shape[-1] ** -0.5
    return (scores.masked_fill(~sees, float("-inf")).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(
    ("lengths", "parents", "window"),
    [([7, 130, 1, 64], None, None), ([300], None, 50), ([40, 9, 70, 3, 20], [-1, 0, 0, 2, -1], None)],
)
def test_attention_and_its_gradients(lengths, parents, window, width):
    torch.manual_seed(0)
    shapes = [(1, 8, sum(lengths), width), (1, 2, sum(lengths), width), (1, 2, sum(lengths), width)]
    tensors = [torch.randn(shape).bfloat16() for shape in shapes]
    truth = [tensor.double().requires_grad_() for tensor in tensors]
    expected = plain_attention(*truth, PackLayout.plan(lengths, segment_parents=parents), window)
    upstream = torch.randn_like(expected).bfloat16()
    expected.backward(upstream.double())

    found = [tensor.cuda().requires_grad_() for tensor in tensors]
    layout = PackLayout.plan(lengths, device="cuda", segment_parents=parents)
    module = torch.nn.Module()
    with pack_layout(layout):
        out, _ = packed_attention(module, *found, None, sliding_window=window)
    assert out.grad_fn is not None
    assert getattr(out.grad_fn, "kernels", None) is attention_cuda
    out.backward(upstream.cuda())
    assert relative(out, expected) < 6e-3
    for tensor, true in zip(found, truth, strict=True):
        assert relative(tensor.grad, true.grad) < 1e-2


def test_attention_in_float32_needs_no_half_precision():
    torch.manual_seed(0)
    lengths = [7, 130, 1, 64]
    tensors = [torch.randn(1, heads, sum(lengths), 64) for heads in (8, 2, 2)]
    expected = plain_attention(*(tensor.double() for tensor in tensors), PackLayout.plan(lengths), None)
    with pack_layout(PackLayout.plan(lengths, device="cuda")):
        out, _ = packed_attention(torch.nn.Module(), *(tensor.cuda() for tensor in tensors), None)
    assert relative(out, expected) < 1e-5


@pytest.mark.parametrize("soft_cap", [None, 30.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_objective(soft_cap, label_smoothing, has_bias, autocast):
    torch.manual_seed(0)
    gold, width, vocabulary = 333, 64, 5003
    hidden = torch.randn(gold, width).bfloat16().float()
    weight = (torch.randn(vocabulary, width) / 4).bfloat16().float()
    bias = torch.randn(vocabulary) if has_bias else None
    ids, weights = torch.randint(vocabulary, (gold,)), torch.rand(gold)

    def leaves(device, dtype):
        return [None if t is None else t.to(device, dtype).requires_grad_() for t in (hidden, weight, bias)]

    def run(objective, tensors, device):
        head = OutputHead(weight_VD=tensors[1], bias_V=tensors[2], logit_scale=0.7, soft_cap=soft_cap)
        sums = objective(tensors[0], head, ids.to(device), weights.to(device), label_smoothing=label_smoothing)
        sums.weighted_nll.backward()
        return sums

    truth = leaves("cpu", torch.float64)
    expected = run(cross_entropy, truth, "cpu")
    found = leaves("cuda", torch.float32)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        sums = run(lambda *a, **k: linear_cross_entropy(*a, chunk_size=100, **k), found, "cuda")
    # Inputs are exact in bfloat16 and logits are never rounded to it: the loss is that of float32 either way.
    assert float((sums.log_probs_K.cpu() - expected.log_probs_K).abs().max()) < 2e-4
    assert relative(sums.weighted_nll, expected.weighted_nll) < 1e-5
    for tensor, true in zip(found, truth, strict=True):
        if tensor is not None and true is not None:
            assert relative(tensor.grad, true.grad) < (5e-3 if autocast else 1e-4)


def rows(number: int, longest: int) -> Dataset:
    draw = np.random.default_rng(0)
    prompt = draw.integers(3, 500, 20)
    examples = []
    for index in range(number):
        ids = np.concatenate([prompt, draw.integers(3, 500, draw.integers(10, longest))]).astype(np.int32)
        weights = np.where(np.arange(len(ids)) < 25, 0.0, 1.0).astype(np.float32)
        examples.append(
            TokenizedExample(
                token_ids=ids, target_weights=weights, example_id=str(index), example_weight=1.0, source="", num_bytes=0
            )
        )
    return Dataset(examples, groups=list(range(number)))


def models() -> dict[str, torch.nn.Module]:
    shape = {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**shape))
    torch.manual_seed(0)
    return {"llama": llama, "qwen3": Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=64))}


def gradient(model: LikelihoodModel) -> torch.Tensor:
    return torch.cat([p.grad.detach().double().cpu().flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("way", ["by hand", "shared", "eager", "compiled"])
def test_gradient_of_a_step(name, way, monkeypatch):
    data = rows(12, 200)
    indices = np.arange(len(data))
    truth = LikelihoodModel(models()[name].double())
    expected = forward_backward(truth, data, indices, normalization="token", tokens_per_microbatch=10_000)

    causal_lm = models()[name].cuda()
    if way in ("eager", "compiled"):
        monkeypatch.setattr(likelihood, "install_decoder_layers", lambda causal_lm: 0)
    model = LikelihoodModel(causal_lm)
    assert model.num_layers_by_hand == (3 if way in ("by hand", "shared") else 0)
    if way == "compiled":
        assert compile_layers(causal_lm) == 3
    assert model.shares_contexts(512)
    sums = forward_backward(
        model, data, indices, normalization="token", tokens_per_microbatch=700, shares_contexts=way == "shared"
    )
    if way == "shared":
        assert sums.computed_tokens < data.lengths.sum()
    assert sums.microbatches > 1
    assert sums.loss == pytest.approx(expected.loss, rel=2e-3)
    assert relative(gradient(model), gradient(truth)) < 2e-2


@pytest.mark.parametrize("way", ["by hand", "layers of peft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_lora(way, dtype, monkeypatch):
    peft = pytest.importorskip("peft")
    data = rows(12, 200)

    def adapted(causal_lm):
        causal_lm.requires_grad_(False)
        torch.manual_seed(3)
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        peft.inject_adapter_in_model(config, causal_lm)
        for name, parameter in causal_lm.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter.data, std=0.05, generator=torch.Generator().manual_seed(len(name)))
        return causal_lm

    rounded = models()["llama"].to(dtype).float()
    truth = LikelihoodModel(adapted(rounded).double())
    expected = forward_backward(truth, data, np.arange(12), normalization="token", tokens_per_microbatch=10_000)
    causal_lm = adapted(models()["llama"].to(dtype).float())
    for name, parameter in causal_lm.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    if way == "layers of peft":
        monkeypatch.setattr(likelihood, "install_decoder_layers", lambda causal_lm: 0)
        monkeypatch.setattr(likelihood, "install_lora_layers", lambda causal_lm: 0)
    model = LikelihoodModel(causal_lm.cuda())
    assert model.num_layers_by_hand == (3 if way == "by hand" else 0)
    sums = forward_backward(model, data, np.arange(12), normalization="token", tokens_per_microbatch=700)
    assert sums.loss == pytest.approx(expected.loss, rel=2e-3)
    assert all(p.grad is None for n, p in causal_lm.named_parameters() if "lora_" not in n)
    assert relative(gradient(model), gradient(truth)) < 3e-2


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 896, 4096])
def test_pieces_of_a_layer(residual, width):
    torch.manual_seed(0)
    plain, kernels = pieces_for("cpu"), pieces_for("cuda")
    x, grad, upstream = (torch.randn(700, width).to(residual) for _ in range(3))
    grad = grad.bfloat16()
    weight = 1 + torch.randn(width) / 10

    y, scales = plain.normalize(x.double(), weight.double(), 1e-5, torch.float64)
    found, found_scales = kernels.normalize(x.cuda(), weight.cuda(), 1e-5, torch.bfloat16)
    assert relative(found, y) < 3e-3
    assert relative(found_scales, scales) < 1e-6
    assert relative(kernels.normalize_again(x.cuda(), found_scales, weight.cuda(), torch.bfloat16)[0], y) < 3e-3
    expected = plain.normalize_backward(
        grad.double(), x.double(), None, scales, weight.double(), upstream.double(), wants_weight=True
    )
    result = kernels.normalize_backward(
        grad.cuda(), x.cuda(), None, found_scales, weight.cuda(), upstream.cuda(), wants_weight=True
    )
    assert relative(result[0], expected[0]) < (1e-6 if residual == torch.float32 else 3e-3)
    assert relative(result[1], expected[1]) < 1e-5

    heads = torch.randn(700, 6, 64).bfloat16()
    cos, sin = (torch.randn(700, 32).repeat(1, 2) for _ in range(2))
    for back in (False, True):
        turned, on_gpu = heads.double(), heads.cuda()
        plain.rotate(turned[:, :4], cos.double(), sin.double(), back=back)
        kernels.rotate(on_gpu[:, :4], cos.cuda(), sin.cuda(), back=back)
        assert relative(on_gpu, turned) < 3e-3

    gate, up, grad = (torch.randn(700, width).bfloat16() for _ in range(3))
    assert relative(kernels.gate(gate.cuda(), up.cuda()), plain.gate(gate.double(), up.double())) < 3e-3
    expected = plain.gate_backward(grad.double(), gate.double(), up.double())
    result = kernels.gate_backward(grad.cuda(), gate.cuda(), up.cuda())
    assert relative(result[0], expected[0]) < 3e-3
    assert relative(result[1], expected[1]) < 3e-3
