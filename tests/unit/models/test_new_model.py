"""A new model: the same for the same arguments, and settings that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from goldsmith.errors import ConfigError
from goldsmith.models.load import load_causal_lm
from goldsmith.models.new_model import init_causal_lm
from goldsmith.models.precision import stored_dtype

INIT: dict[str, Any] = {
    "architecture": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
IDS = torch.tensor([[1, 5, 9, 2]])


def test_deterministic_given_the_seed_and_global_state_untouched() -> None:
    state = torch.get_rng_state()
    first = init_causal_lm(INIT, vocab_size=40, seed=3)
    torch.manual_seed(99)
    torch.rand(7)
    second = init_causal_lm(INIT, vocab_size=40, seed=3)
    other = init_causal_lm(INIT, vocab_size=40, seed=4)
    torch.set_rng_state(state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    init_causal_lm(INIT, vocab_size=40)
    assert torch.equal(state, torch.get_rng_state())


def test_float64_holds_the_float32_weights() -> None:
    single = init_causal_lm(INIT, vocab_size=40)
    double = init_causal_lm(INIT, vocab_size=40, dtype="float64")
    assert torch.equal(single.lm_head.weight.double(), double.lm_head.weight)
    assert stored_dtype(double) == torch.float64


def test_tokens_come_from_the_tokenizer() -> None:
    config = init_causal_lm(INIT, vocab_size=40, bos_token_id=3, eos_token_id=4).config
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (40, 3, 4, None)


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    model = init_causal_lm(INIT, vocab_size=40)
    model.save_pretrained(tmp_path)
    assert torch.equal(model(IDS).logits, load_causal_lm(tmp_path)(IDS).logits)


def test_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'lama' is not .* 'llama'"):
        init_causal_lm({**INIT, "architecture": "lama"}, vocab_size=40)


def test_architecture_that_is_no_causal_lm() -> None:
    with pytest.raises(ConfigError, match="'t5' is not a causal language model"):
        init_causal_lm({"architecture": "t5"}, vocab_size=40)


def test_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"model\.init\.num_layer: .*'num_hidden_layers'"):
        init_causal_lm({**INIT, "num_layer": 3}, vocab_size=40)


def test_dtype_belongs_elsewhere() -> None:
    with pytest.raises(ConfigError, match=r"set `model\.dtype`"):
        init_causal_lm({**INIT, "dtype": "bfloat16"}, vocab_size=40)


def test_value_of_the_wrong_type() -> None:
    with pytest.raises(ConfigError, match="hidden_size"):
        init_causal_lm({**INIT, "hidden_size": "wide"}, vocab_size=40)


def test_heads_that_do_not_divide_the_width() -> None:
    with pytest.raises(ConfigError, match="not a multiple"):
        init_causal_lm({**INIT, "hidden_size": 17}, vocab_size=40)


def test_names_of_the_architecture_itself() -> None:
    model = init_causal_lm({"architecture": "gpt2", "n_embd": 16, "num_hidden_layers": 1, "n_head": 2}, vocab_size=40)
    assert len(model.transformer.h) == 1


def test_rope_theta_may_be_given_plainly() -> None:
    model = init_causal_lm({**INIT, "rope_theta": 123.0}, vocab_size=40)
    assert model.config.rope_parameters["rope_theta"] == 123.0


def test_vocabulary_may_be_padded_but_not_cut() -> None:
    assert init_causal_lm({**INIT, "vocab_size": 64}, vocab_size=40).lm_head.weight.shape[0] == 64
    with pytest.raises(ConfigError, match="the tokenizer has 40 tokens"):
        init_causal_lm({**INIT, "vocab_size": 39}, vocab_size=40)
