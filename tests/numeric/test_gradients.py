"""Gradient of every parameter in float64: packed, chunked, cut into micro-batches, against the plain padded loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from lift import lifted
from plain import OWN_ATTENTION, PlainRow, PlainStep, plain_log_probs, plain_step
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from goldsmith.data.packing import pack, plan_microbatches
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.objective.cross_entropy import OutputHead, cross_entropy
from goldsmith.objective.linear_cross_entropy import linear_cross_entropy
from goldsmith.objective.normalization import step_denominator, token_coefficients
from goldsmith.types import TokenizedExample

GRADIENT_TOLERANCE = 1e-6
LOSS_TOLERANCE = 1e-9
OBJECTIVE_TOLERANCE = 1e-10

VOCABULARY = 53
WINDOW = 5  # shorter than most of the rows
WIDTHS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT2_WIDTHS: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT2_IDS: dict[str, Any] = {"initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**WIDTHS, head_dim=12),
    "qwen3": Qwen3Config(**WIDTHS, head_dim=8),
    "gemma2": Gemma2Config(
        **WIDTHS,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=WINDOW,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "mistral": MistralConfig(**WIDTHS, sliding_window=WINDOW),
    "gpt2": GPT2Config(**GPT2_WIDTHS, **GPT2_IDS, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    "gpt_neox": GPTNeoXConfig(**{k: v for k, v in WIDTHS.items() if k != "num_key_value_heads"}, rotary_pct=0.5),
}
NORMALIZATIONS = ("token", "example", "sum")


def make_rows() -> list[PlainRow]:
    """Rows on both sides of the window, with gold at the end, in the middle, everywhere, and of every weight."""
    generator = np.random.default_rng(7)
    rows = []
    for number, length in enumerate([2, 3, 5, 6, 9, 12, 17, 9]):
        weights = generator.choice([0.0, 0.5, 1.0, 2.0], size=length)
        weights[0] = 0.0
        weights[-1] = [0.5, 1.0, 2.0][number % 3]  # at least one gold token
        if number == 4:
            weights[1:] = 1.0
        ids = generator.integers(0, VOCABULARY, size=length)
        rows.append(PlainRow(ids=ids.tolist(), weights=weights.tolist(), example_weight=[1.0, 2.0][number % 2]))
    return rows


ROWS = make_rows()
EXAMPLES = [
    TokenizedExample(
        token_ids=np.array(row.ids, dtype=np.int32),
        target_weights=np.array(row.weights, dtype=np.float32),
        example_id=str(number),
        example_weight=row.example_weight,
        source=f"rows:{number}",
        num_bytes=0,
    )
    for number, row in enumerate(ROWS)
]
CUTS: dict[str, list[list[int]]] = {
    "one pack": [list(range(len(ROWS)))],
    "a row each": [[index] for index in range(len(ROWS))],
    "reversed pairs": [[7, 6], [5, 4], [3, 2], [1, 0]],
    "uneven": [[3, 0, 6], [1], [7, 2, 4, 5]],
    "planned for 20 tokens": plan_microbatches([len(row.ids) for row in ROWS], 20),
    "planned for 4 tokens": plan_microbatches([len(row.ids) for row in ROWS], 4),
}
CHUNK_SIZES = (1, 7, None)


@pytest.fixture(scope="module", autouse=True)
def in_float64() -> Iterator[None]:
    with lifted():
        yield


def build(config: PreTrainedConfig, attention: str = "eager") -> PreTrainedModel:
    """The same weights for every call: biases and norms are random too, so that none of them is at a special point."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    model.set_attn_implementation(attention)
    return model.train()


def packed_step(
    model: LikelihoodModel, cut: Sequence[Sequence[int]], normalization: str, chunk_size: int | None
) -> PlainStep:
    """A step as it is trained: the denominator first, then every micro-batch, gradients summed by autograd."""
    model.zero_grad(set_to_none=True)
    model.chunk_size = chunk_size
    denominator = step_denominator(
        np.array([example.example_weight for example in EXAMPLES]),
        np.array([example.weight_sum for example in EXAMPLES]),
        normalization,  # type: ignore[arg-type]
    )
    loss = 0.0
    for indices in cut:
        batch = pack(EXAMPLES, indices)
        coefficients_K = token_coefficients(batch, normalization)  # type: ignore[arg-type]
        part = model(batch, coefficients_K).weighted_nll / denominator
        part.backward()
        loss += float(part.detach())
    gradients = {}
    for name, parameter in model.causal_lm.named_parameters():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad.clone()
    return PlainStep(loss=loss, gradients=gradients)


def relative_errors(got: PlainStep, truth: PlainStep) -> dict[str, float]:
    """|a - b| / max(|b|, 1e-3 * global norm), by parameter."""
    assert got.gradients.keys() == truth.gradients.keys()
    total = float(torch.stack([gradient.norm() for gradient in truth.gradients.values()]).norm())
    return {
        name: float((got.gradients[name] - gradient).norm()) / max(float(gradient.norm()), 1e-3 * total)
        for name, gradient in truth.gradients.items()
    }


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradient_of_every_parameter(family: str, normalization: str, record_property: Any) -> None:
    config = CONFIGS[family]
    soft_capped = getattr(config, "attn_logit_softcapping", None) is not None
    plain = build(config, OWN_ATTENTION if soft_capped else "sdpa")
    truth = plain_step(plain, ROWS, normalization)
    assert all(gradient.dtype == torch.float64 for gradient in truth.gradients.values())

    model = LikelihoodModel(build(config))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, model.causal_lm.state_dict()[name]), name
    worst_gradient = worst_loss = 0.0
    for number, (cut_name, cut) in enumerate(CUTS.items()):
        assert sorted(index for indices in cut for index in indices) == list(range(len(ROWS))), cut_name
        got = packed_step(model, cut, normalization, CHUNK_SIZES[number % len(CHUNK_SIZES)])
        errors = relative_errors(got, truth)
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] <= GRADIENT_TOLERANCE, f"{cut_name}: {worst}: {errors[worst]:.2e}"
        loss_error = abs(got.loss - truth.loss) / abs(truth.loss)
        assert loss_error <= LOSS_TOLERANCE, f"{cut_name}: loss {got.loss} against {truth.loss}"
        worst_gradient, worst_loss = max(worst_gradient, errors[worst]), max(worst_loss, loss_error)
    record_property("gradient_error", worst_gradient)
    record_property("loss_error", worst_loss)
    print(f"{family} {normalization}: gradient {worst_gradient:.1e}, loss {worst_loss:.1e}")


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_every_chunk_size_on_one_pack(chunk_size: int | None) -> None:
    config = CONFIGS["qwen3"]
    truth = plain_step(build(config, "sdpa"), ROWS, "token")
    got = packed_step(LikelihoodModel(build(config)), CUTS["one pack"], "token", chunk_size)
    assert max(relative_errors(got, truth).values()) <= GRADIENT_TOLERANCE


def test_log_probs_of_every_gold_token() -> None:
    config = CONFIGS["mistral"]
    log_probs = plain_log_probs(build(config, "sdpa"), ROWS)
    batch = pack(EXAMPLES, CUTS["uneven"][2])
    got = LikelihoodModel(build(config))(batch).log_probs_K
    expected = torch.stack(
        [
            log_prob
            for index in CUTS["uneven"][2]
            for weight, log_prob in zip(ROWS[index].weights[1:], log_probs[index], strict=True)
            if weight > 0
        ]
    )
    torch.testing.assert_close(got, expected.detach(), rtol=0, atol=1e-9)


class TestThatTheComparisonCanFail:
    """Each of these is a fault that the peers had; the comparison above must see it."""

    def test_a_longer_window(self) -> None:
        truth = plain_step(build(CONFIGS["mistral"], "sdpa"), ROWS, "token")
        longer = MistralConfig(**WIDTHS, sliding_window=WINDOW + 1)
        got = packed_step(LikelihoodModel(build(longer)), CUTS["one pack"], "token", None)
        assert max(relative_errors(got, truth).values()) > 1e-3

    def test_no_soft_cap(self) -> None:
        truth = plain_step(build(CONFIGS["gemma2"], OWN_ATTENTION), ROWS, "token")
        values = {**CONFIGS["gemma2"].to_dict(), "attn_logit_softcapping": None}
        got = packed_step(LikelihoodModel(build(Gemma2Config(**values))), CUTS["one pack"], "token", None)
        assert max(relative_errors(got, truth).values()) > 1e-3

    def test_mean_of_micro_batch_means(self) -> None:
        truth = plain_step(build(CONFIGS["llama"], "sdpa"), ROWS, "token")
        model = LikelihoodModel(build(CONFIGS["llama"]))
        model.zero_grad(set_to_none=True)
        for indices in CUTS["uneven"]:
            batch = pack(EXAMPLES, indices)
            coefficients_K = token_coefficients(batch, "token")
            (model(batch, coefficients_K).weighted_nll / coefficients_K.sum() / len(CUTS["uneven"])).backward()
        gradients = {name: parameter.grad for name, parameter in model.causal_lm.named_parameters()}
        assert all(gradient is not None for gradient in gradients.values())
        got = PlainStep(loss=0.0, gradients={k: v for k, v in gradients.items() if v is not None})
        assert max(relative_errors(got, truth).values()) > 1e-2

    def test_without_lifting_the_figures_are_those_of_float32(self) -> None:
        # Shows that `lifted` does something; 1e-10 lies between what is seen with it and without it.
        model = LikelihoodModel(build(CONFIGS["gemma2"]))
        batch = pack(EXAMPLES, range(len(EXAMPLES)))
        exact = model(batch).log_probs_K
        from transformers.models.gemma2 import modeling_gemma2

        lifted_forward = modeling_gemma2.Gemma2RMSNorm.forward
        try:
            modeling_gemma2.Gemma2RMSNorm.forward = lambda self, hidden: lifted_forward(self, hidden.float()).double()
            rounded = model(batch).log_probs_K
        finally:
            modeling_gemma2.Gemma2RMSNorm.forward = lifted_forward
        assert float((exact - rounded).abs().max()) > 1e-9


@pytest.mark.parametrize(("targets", "vocabulary", "width"), [(1, 2, 1), (7, 3, 5), (53, 252, 24), (130, 507, 33)])
@pytest.mark.parametrize("chunk_size", [1, 7, 64, None])
def test_the_objective_by_itself(targets: int, vocabulary: int, width: int, chunk_size: int | None) -> None:
    """Chunked against the reference, and both against the sum written out: value, log-probabilities and gradients."""
    generator = torch.Generator().manual_seed(targets)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ids_K = torch.randint(vocabulary, (targets,), generator=generator)
    weights_K = torch.tensor([0.5, 1.0, 2.0])[torch.randint(3, (targets,), generator=generator)]
    for bias, scale, cap, smoothing in [(False, 1.0, None, 0.0), (True, 0.25, 3.0, 0.0), (True, 2.0, None, 0.1)]:
        hidden_KD, weight_VD = normal(targets, width), normal(vocabulary, width)
        bias_V = normal(vocabulary) if bias else None
        leaves = [leaf.requires_grad_() for leaf in (hidden_KD, weight_VD, bias_V) if leaf is not None]
        head = OutputHead(weight_VD=weight_VD, bias_V=bias_V, logit_scale=scale, soft_cap=cap)

        logits_KV = scale * (hidden_KD @ weight_VD.T + (0.0 if bias_V is None else bias_V))
        logits_KV = logits_KV if cap is None else cap * torch.tanh(logits_KV / cap)
        log_probs_KV = logits_KV - logits_KV.exp().sum(dim=1, keepdim=True).log()
        own_K = log_probs_KV[torch.arange(targets), ids_K]
        losses_K = -(1 - smoothing) * own_K - smoothing / vocabulary * log_probs_KV.sum(dim=1)
        truth = (weights_K.double() * losses_K).sum()
        true_gradients = torch.autograd.grad(truth, leaves)

        reference = cross_entropy(hidden_KD, head, ids_K, weights_K, label_smoothing=smoothing)
        chunked = linear_cross_entropy(
            hidden_KD, head, ids_K, weights_K, label_smoothing=smoothing, chunk_size=chunk_size
        )
        for sums in (reference, chunked):
            assert abs(float((sums.weighted_nll - truth).detach())) <= OBJECTIVE_TOLERANCE * abs(float(truth.detach()))
            assert float(sums.weight_sum) == float(weights_K.double().sum())
            torch.testing.assert_close(sums.log_probs_K, own_K.detach(), rtol=OBJECTIVE_TOLERANCE, atol=1e-12)
            for got, true in zip(torch.autograd.grad(sums.weighted_nll, leaves), true_gradients, strict=True):
                assert float((got - true).norm()) <= OBJECTIVE_TOLERANCE * float(true.norm()) + 1e-14
