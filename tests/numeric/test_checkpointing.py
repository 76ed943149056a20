"""Layers computed again in the backward pass: the gradient of layers that kept everything, and less kept."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lift import lifted
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, MixtralConfig, Qwen3Config

from goldsmith.data.packing import pack
from goldsmith.data.shared_context import pack_shared
from goldsmith.errors import ModelError
from goldsmith.models.checkpointing import checkpoint_layers, decoder_layers, keep_activations
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.types import PackedBatch, TokenizedExample

SIZES: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
# By hand; by hand with norms of heads; soft caps and windows; another family; a router.
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES),
    "gemma2": Gemma2Config(**SIZES, query_pre_attn_scalar=6, sliding_window=8),
    "gpt2": GPT2Config(vocab_size=53, n_embd=24, n_layer=3, n_head=4, n_positions=64),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}


def examples() -> list[TokenizedExample]:
    """Four of the six begin with the same context, long enough to be shared."""
    generator = np.random.default_rng(3)
    context = generator.integers(0, 53, size=30)
    made = []
    for number, length in enumerate([9, 28, 5, 14, 11, 7]):
        ids = generator.integers(0, 53, size=length)
        weights = np.concatenate([[0.0], generator.choice([0.0, 0.5, 1.0], size=length - 2), [1.0]])
        if number < 4:
            ids, weights = np.concatenate([context, ids]), np.concatenate([np.zeros(30), weights])
        made.append(
            TokenizedExample(
                token_ids=ids.astype(np.int32),
                target_weights=weights.astype(np.float32),
                example_id=str(number),
                example_weight=1.0,
                source=f"test:{number}",
                num_bytes=0,
            )
        )
    return made


def build(name: str, dtype: torch.dtype = torch.float64) -> LikelihoodModel:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        causal_lm = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).to(dtype)
    if name == "mixtral":
        causal_lm.set_experts_implementation("eager")  # the grouped products of experts know no float64
    return LikelihoodModel(causal_lm.eval())


def one_pass(
    model: LikelihoodModel, batch: PackedBatch, run: Callable[[Callable[[], None]], None] | None = None
) -> Any:
    model.zero_grad(set_to_none=True)
    loss = model(batch).weighted_nll
    (run or (lambda backward: backward()))(loss.backward)
    return float(loss.detach()), {name: parameter.grad for name, parameter in model.causal_lm.named_parameters()}


def assert_same(got: Any, expected: Any, *, to_the_bit: bool) -> None:
    assert got[0] == expected[0]
    for name, gradient in expected[1].items():
        if to_the_bit:
            assert torch.equal(got[1][name], gradient), name
        assert float((got[1][name] - gradient).norm()) <= 1e-12 * max(float(gradient.norm()), 1e-3), name


@pytest.mark.parametrize("name", CONFIGS)
def test_the_gradient_is_that_of_layers_that_kept_everything(name: str) -> None:
    with lifted():
        model = build(name)
        assert bool(model.num_layers_by_hand) == (name in ("llama", "qwen3"))
        batch = pack(examples(), list(range(6)))
        expected = one_pass(model, batch)
        assert len(decoder_layers(model.causal_lm)) == checkpoint_layers(model.causal_lm) == 3
        got = one_pass(model, batch)
        assert_same(got, expected, to_the_bit=True)
        checkpoint_layers(model.causal_lm)  # once more changes nothing
        assert_same(one_pass(model, batch), expected, to_the_bit=True)
        keep_activations(model.causal_lm)
        assert_same(one_pass(model, batch), expected, to_the_bit=True)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_with_shared_contexts(name: str) -> None:
    with lifted():
        model = build(name)
        batch = pack_shared(examples(), list(range(6)))
        assert (batch.segment_parents >= 0).any()
        expected = one_pass(model, batch)
        checkpoint_layers(model.causal_lm)
        assert_same(one_pass(model, batch), expected, to_the_bit=True)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_backward_pass_in_another_thread(name: str) -> None:
    """As autograd does on a GPU: there the layout of the pack is not set, and it must be another pack's neither."""
    with lifted():
        model = build(name)
        first, second = pack(examples(), [0, 1, 2]), pack(examples(), [3, 4, 5])
        expected = one_pass(model, first)
        checkpoint_layers(model.causal_lm)

        def in_a_thread(backward: Callable[[], None]) -> None:
            with torch.no_grad():
                model(second)
            thread = threading.Thread(target=backward)
            thread.start()
            thread.join()

        assert_same(one_pass(model, first, in_a_thread), expected, to_the_bit=True)


def test_only_the_inputs_of_layers_are_kept() -> None:
    def kept_bytes(model: LikelihoodModel) -> int:
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages: dict[int, torch.UntypedStorage] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            sums = model(pack(examples(), list(range(6))))
        del sums
        return sum(storage.nbytes() for storage in storages.values())

    model = build("gpt2", torch.float32)
    everything = kept_bytes(model)
    checkpoint_layers(model.causal_lm)
    assert kept_bytes(model) < everything / 3


def test_frozen_layers_below_are_not_computed_again() -> None:
    model = build("llama")
    for name, parameter in model.causal_lm.named_parameters():
        parameter.requires_grad_(name.startswith("model.layers.2."))
    calls = []
    for number, layer in enumerate(decoder_layers(model.causal_lm)):
        own: Any = layer.forward
        layer.forward = lambda *a, own=own, number=number, **k: (calls.append(number), own(*a, **k))[1]
    checkpoint_layers(model.causal_lm)
    model(pack(examples(), [0, 1])).weighted_nll.backward()
    assert calls == [0, 1, 2, 2]
    calls.clear()
    with torch.no_grad():
        model(pack(examples(), [0, 1]))
    assert calls == [0, 1, 2]


def test_dropout_draws_the_same_again() -> None:
    config = replace_dropout(CONFIGS["gpt2"])
    with torch.random.fork_rng(), lifted():
        torch.manual_seed(4)
        causal_lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32).double()
        model = LikelihoodModel(causal_lm.train())
        batch = pack(examples(), list(range(6)))
        torch.manual_seed(5)
        expected = one_pass(model, batch)
        checkpoint_layers(model.causal_lm)
        torch.manual_seed(5)
        assert_same(one_pass(model, batch), expected, to_the_bit=True)
        torch.manual_seed(6)
        assert one_pass(model, batch)[0] != expected[0]


def replace_dropout(config: Any) -> Any:
    values = config.to_dict()
    values |= {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.0}
    return GPT2Config(**values)


def test_a_class_without_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from goldsmith.models import checkpointing

    class NoLayer:
        pass

    model = build("llama", torch.float32)
    monkeypatch.setattr(checkpointing, "GradientCheckpointingLayer", NoLayer)
    with pytest.raises(ModelError, match="LlamaForCausalLM does not say which of its modules are layers"):
        checkpoint_layers(model.causal_lm)
