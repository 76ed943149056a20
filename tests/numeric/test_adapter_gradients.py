"""Gradient of every adapter weight in float64: packed, against peft's own model fed one row at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lift import lifted
from plain import OWN_ATTENTION, PlainRow, plain_log_probs
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from goldsmith.data.packing import pack
from goldsmith.models.adapters import AdapterBase, AdapterConfig, attach_adapter
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.objective.normalization import step_denominator, token_coefficients
from goldsmith.types import TokenizedExample

VOCABULARY = 41
WIDTHS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT2: dict[str, Any] = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32, "initializer_range": 0.2}
SILENT: dict[str, Any] = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**WIDTHS),
    "qwen2": Qwen2Config(**WIDTHS),  # biases
    "gpt2": GPT2Config(vocab_size=VOCABULARY, **GPT2, **SILENT),  # Conv1D, tied embeddings
    "qwen3": Qwen3Config(**WIDTHS, head_dim=6),  # norms of queries and keys
    "mistral": MistralConfig(**WIDTHS, sliding_window=4),
    "gemma2": Gemma2Config(**WIDTHS, head_dim=6, sliding_window=4, attn_logit_softcapping=2.0),
}
RANK, ALPHA = 3, 5.0
BASE = AdapterBase(path="base", revision=None)


def make_rows() -> list[PlainRow]:
    generator = np.random.default_rng(3)
    rows = []
    for number, length in enumerate([2, 5, 11, 7]):
        weights = generator.choice([0.0, 1.0, 2.0], size=length)
        weights[0], weights[-1] = 0.0, 1.0
        ids = generator.integers(0, VOCABULARY, size=length)
        rows.append(PlainRow(ids=ids.tolist(), weights=weights.tolist(), example_weight=[1.0, 0.5][number % 2]))
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
Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def in_float64() -> Iterator[None]:
    with lifted():
        yield


def build(family: str, attention: str = "eager", **changes: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        # A copy: the attention is a setting of the configuration, and each model has its own.
        config = copy.deepcopy(CONFIGS[family])
        config.update(changes)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation=attention)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim < 2:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def packed(model: PreTrainedModel) -> tuple[float, Gradients]:
    """The step cut in two packs, and the gradients that it leaves on the model."""
    likelihood = LikelihoodModel(model, chunk_size=5).train()
    denominator = step_denominator(
        np.array([row.example_weight for row in ROWS]), np.array([sum(row.weights) for row in ROWS]), "token"
    )
    loss = 0.0
    for members in ([3, 0, 1], [2]):
        batch = pack(EXAMPLES, members)
        part = likelihood(batch, token_coefficients(batch, "token")).weighted_nll / denominator
        part.backward()
        loss += float(part.detach())
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def plain(model: Any) -> tuple[float, Gradients]:
    """One row at a time through the wrapper of peft."""
    denominator = sum(row.example_weight * sum(row.weights) for row in ROWS)
    loss = 0.0
    for row in ROWS:
        (log_probs,) = plain_log_probs(model, [row])
        part = (
            -row.example_weight * (torch.tensor(row.weights[1:], dtype=torch.float64) * log_probs).sum() / denominator
        )
        part.backward()
        loss += float(part.detach())
    prefix = "base_model.model."
    return loss, {name.removeprefix(prefix): p.grad for name, p in model.named_parameters() if p.grad is not None}


def through_peft(family: str, ours: PreTrainedModel, **settings: Any) -> Any:
    """The same base, an adapter that the test configures itself, and the weights of ours."""
    import peft

    soft_capped = getattr(CONFIGS[family], "attn_logit_softcapping", None) is not None
    base = build(family, OWN_ATTENTION if soft_capped else "sdpa")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=ALPHA,
        target_modules="all-linear",
        fan_in_fan_out=family == "gpt2",
        **settings,
    )
    model = peft.get_peft_model(base, config)
    weights = {f"base_model.model.{name}": tensor for name, tensor in ours.state_dict().items()}
    assert model.state_dict().keys() == weights.keys()
    model.load_state_dict(weights)
    return model


def largest_error(got: Gradients, truth: Gradients) -> float:
    """|a - b| / max(|b|, 1e-3 * global norm), the largest of all parameters."""
    assert got.keys() == truth.keys()
    total = float(torch.stack([gradient.norm() for gradient in truth.values()]).norm())
    return max(float((got[k] - b).norm()) / max(float(b.norm()), 1e-3 * total) for k, b in truth.items())


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
def test_gradient_of_every_adapter_weight(family: str, kind: str) -> None:
    model = build(family)
    attach_adapter(model, AdapterConfig(kind=kind, rank=RANK, alpha=ALPHA), base=BASE, at_random=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained)
    reference = through_peft(family, model, use_dora=kind == "dora", use_rslora=kind == "rslora")
    loss, gradients = packed(model)
    true_loss, true_gradients = plain(reference)
    # No weight gradient of a frozen weight is made; each trained one is there, and is not zero.
    assert gradients.keys() == trained
    assert all(float(gradient.norm()) > 0 for gradient in gradients.values())
    assert abs(loss - true_loss) <= 1e-9 * abs(true_loss)
    assert largest_error(gradients, true_gradients) <= 1e-6


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(
    "targets",
    # Also some of the linear layers that have an input in common, and not the first of them.
    ["layers.0.*", "layers.1.*", "layers.1.self_attn.q_proj", "layers.1.self_attn.[kv]_proj", "layers.0.mlp.up_proj"],
)
def test_adapters_in_some_layers(targets: str, kind: str) -> None:
    """The other layers are plain ones, which may be computed by hand."""
    model, reference = build("qwen2"), build("qwen2", "sdpa")
    config = AdapterConfig(kind=kind, rank=RANK, alpha=ALPHA, target_modules=(targets,))
    for one in (model, reference):
        attach_adapter(one, config, base=BASE, at_random=True)
    loss, gradients = packed(model)
    true_loss, true_gradients = plain(reference)
    assert abs(loss - true_loss) <= 1e-9 * abs(true_loss)
    assert largest_error(gradients, true_gradients) <= 1e-6
    assert {name.split(".")[2] for name in gradients} == {targets.split(".")[1]}


def test_weights_beside_factors_that_are_trained_too() -> None:
    """What peft does not do, and the layers from pieces would: all weights, biases and factors together."""
    model, reference = build("qwen2"), build("qwen2", "sdpa")
    for one in (model, reference):
        attach_adapter(one, AdapterConfig(rank=RANK, alpha=ALPHA), base=BASE, at_random=True)
        one.requires_grad_(True)
    (loss, gradients), (true_loss, true_gradients) = packed(model), plain(reference)
    assert abs(loss - true_loss) <= 1e-9 * abs(true_loss)
    assert largest_error(gradients, true_gradients) <= 1e-6


def test_another_scale_is_seen() -> None:
    model = build("llama")
    attach_adapter(model, AdapterConfig(rank=RANK, alpha=ALPHA), base=BASE, at_random=True)
    loss, gradients = packed(model)
    true_loss, true_gradients = plain(through_peft("llama", model, use_rslora=True))
    assert abs(loss - true_loss) > 1e-3 * abs(true_loss)
    assert largest_error(gradients, true_gradients) > 1e-2


@pytest.mark.parametrize("tied", [True, False])
def test_gradient_of_new_tokens_and_of_saved_modules(tied: bool) -> None:
    """Rows of the embeddings against the same rows of a model whose embeddings are trained whole."""
    new = [7, 40]
    model, whole = (build("llama", attention, tie_word_embeddings=tied) for attention in ("eager", "sdpa"))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    config = AdapterConfig(rank=RANK, alpha=ALPHA, modules_to_save=("layers.1.mlp", "model.norm"))
    attach_adapter(model, config, base=BASE, new_token_ids=new, at_random=True)
    names = dict(model.named_parameters())
    attach_adapter(whole, AdapterConfig(rank=RANK, alpha=ALPHA), base=BASE)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if name in names:
                parameter.copy_(names[name])
            elif "layers.1.mlp" in name and "lora_" in name:
                parameter.zero_()  # there the other model has none
            parameter.requires_grad_(True)
    loss, gradients = packed(model)
    true_loss, true_gradients = plain(whole)
    assert abs(loss - true_loss) <= 1e-9 * abs(true_loss)
    rows = "model.embed_tokens.token_adapter.trainable_tokens_delta.default"
    expected = {rows: true_gradients["model.embed_tokens.weight"][new]}
    if not tied:
        expected["lm_head.token_adapter.trainable_tokens_delta.default"] = true_gradients["lm_head.weight"][new]
    for name in gradients.keys() - expected.keys():
        # `mlp.modules_to_save.default.up_proj.weight` is `mlp.up_proj.base_layer.weight` of the other one.
        place = name.replace(".modules_to_save.default", "")
        adapted = place.replace(".weight", ".base_layer.weight")
        expected[name] = true_gradients[adapted if adapted in true_gradients else place]
    assert largest_error(gradients, expected) <= 1e-6
