"""Layers by hand against the forward of their own classes, under autograd, on the same packs."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from lift import lifted
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from goldsmith.data.packing import pack
from goldsmith.models import decoder_layers
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.types import TokenizedExample

SIZES = {
    "vocab_size": 67,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "qwen2": Qwen2Config(**{**SIZES, "head_dim": 6}),
    "qwen2 with windows": Qwen2Config(
        **{**SIZES, "head_dim": 6}, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SIZES),
}


def examples(seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number, length in enumerate([9, 2, 23, 9, 14]):
        weights = (torch.rand(length, generator=generator) < 0.5).float()
        weights[0] = 0.0
        weights[-1] = 1.0
        made.append(
            TokenizedExample(
                token_ids=torch.randint(67, (length,), generator=generator).int().numpy(),
                target_weights=weights.numpy(),
                example_id=str(number),
                example_weight=1.0,
                source=f"test:{number}",
                num_bytes=0,
            )
        )
    return made


def random_model(config, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                parameter.add_(0.3 * noise if parameter.ndim < 2 else noise * parameter.shape[-1] ** -0.5)
    return model


def by_hand_and_plain(monkeypatch, config, dtype=torch.float64):
    hand = LikelihoodModel(random_model(config, dtype))
    with monkeypatch.context() as patch:
        patch.setattr(decoder_layers, "LAYERS", {})
        plain = LikelihoodModel(random_model(config, dtype))
    assert hand.num_layers_by_hand == 3
    assert plain.num_layers_by_hand == 0
    return hand, plain


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_in_float64(name, monkeypatch):
    hand, plain = by_hand_and_plain(monkeypatch, CONFIGS[name])
    batch = pack(examples(), range(5))
    with lifted():
        expected = plain(batch)
        expected.weighted_nll.backward()
    with lifted():
        got = hand(batch)
        got.weighted_nll.backward()
    assert float((got.log_probs_K - expected.log_probs_K).abs().max()) <= 1e-12
    plain_parameters = dict(plain.named_parameters())
    total = torch.nn.utils.get_total_norm([p.grad for p in plain_parameters.values()])
    for parameter_name, parameter in hand.named_parameters():
        wanted = plain_parameters[parameter_name].grad
        error = (parameter.grad - wanted).norm() / torch.maximum(wanted.norm(), 1e-3 * total)
        assert float(error) <= 1e-12, parameter_name


@pytest.mark.parametrize("name", ["llama with biases", "qwen3"])
def test_float32_is_no_less_accurate_than_the_plain_layers(name, monkeypatch):
    hand, plain = by_hand_and_plain(monkeypatch, CONFIGS[name], torch.float32)
    truth = LikelihoodModel(plain_double(plain))
    batch = pack(examples(), range(5))
    for model in (hand, plain):
        model(batch).weighted_nll.backward()
    with lifted():
        truth(batch).weighted_nll.backward()
    errors = []
    for model in (hand, plain):
        pairs = zip(model.parameters(), truth.parameters(), strict=True)
        errors.append(sum(float((p.grad.double() - t.grad).square().sum()) for p, t in pairs) ** 0.5)
    total = float(torch.nn.utils.get_total_norm([p.grad for p in truth.parameters()]))
    assert errors[0] <= 2 * errors[1] + 1e-7 * total


def plain_double(model):
    copy = random_model(model.causal_lm.config, torch.float64)
    copy.load_state_dict({name: t.double() for name, t in model.causal_lm.state_dict().items()})
    return copy


@pytest.mark.parametrize("trained", ["mlp", "q_proj", "layernorm", "embed_tokens", "layers.2"])
def test_only_what_is_trained_gets_a_gradient(trained, monkeypatch):
    hand, plain = by_hand_and_plain(monkeypatch, CONFIGS["llama with biases"])
    for model in (hand, plain):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained in name)
    batch = pack(examples(), range(5))
    for model in (hand, plain):
        with lifted():
            model(batch).weighted_nll.backward()
    for (name, parameter), expected in zip(hand.named_parameters(), plain.parameters(), strict=True):
        assert (parameter.grad is None) == (trained not in name)
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, expected.grad, rtol=0, atol=1e-10), name


def test_where_one_layer_has_a_part_of_another_class_all_keep_their_own_forward():
    class Adapted(torch.nn.Linear):
        pass

    model = random_model(CONFIGS["llama"])
    layer = model.model.layers[1]
    layer.mlp.up_proj.__class__ = Adapted
    assert LikelihoodModel(model).num_layers_by_hand == 0
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_outside_of_a_pack_the_model_is_its_own():
    model = random_model(CONFIGS["llama"], torch.float32).eval()
    ids = torch.arange(10)[None]
    before = model(ids).logits
    LikelihoodModel(model)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(ids).logits, before)


def test_less_is_kept_for_the_backward_pass(monkeypatch):
    """Bytes that autograd holds after a forward pass, parameters not counted."""
    kept = []
    batch = pack(examples(), [index for index, _ in itertools.product(range(5), range(8))])
    wide = LlamaConfig(**{**SIZES, "hidden_size": 96, "intermediate_size": 256, "head_dim": 16})
    for model in by_hand_and_plain(monkeypatch, wide, torch.float32):
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages: dict[int, int] = {}

        def note(tensor: torch.Tensor, storages=storages, parameters=parameters) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            sums = model(batch)
        kept.append(sum(storages.values()))
        del sums
    assert kept[0] < 0.6 * kept[1]
