"""Randomness of models: found and turned off, in the configuration and in the modules."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from goldsmith.models.randomness import silence_randomness

TINY: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
IDS = torch.tensor([[1, 5, 9, 2]])


def test_every_dropout_of_gpt2() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=16)).train()
    before = model(IDS).logits
    assert not torch.equal(before, model(IDS).logits)
    changed = silence_randomness(model)
    assert changed["config.attn_pdrop"] == 0.1
    assert changed["transformer.drop.p"] == 0.1
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    assert silence_randomness(model) == {}


def test_router_jitter_and_router_loss() -> None:
    config = MixtralConfig(
        **TINY, num_local_experts=4, router_jitter_noise=0.5, output_router_logits=True, attention_dropout=0.5
    )
    model = MixtralForCausalLM(config).train()
    changed = silence_randomness(model)
    assert {
        "config.router_jitter_noise",
        "config.output_router_logits",
        "config.attention_dropout",
    } <= changed.keys()
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    assert model(IDS).get("router_logits") is None


def test_nothing_to_do() -> None:
    assert silence_randomness(LlamaForCausalLM(LlamaConfig(**TINY))) == {}
