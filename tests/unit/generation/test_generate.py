"""Decoding in batches against a plain loop: one context at a time, no cache, no padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from goldsmith.errors import DataError, NumericalError
from goldsmith.generation.generate import (
    GenerationConfig,
    decode_text,
    end_token_ids,
    generate,
)
from goldsmith.models.attention import PACKED_ATTENTION
from goldsmith.models.likelihood import LikelihoodModel

VOCABULARY = 24
END = 3
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.5,
    "pad_token_id": None,
    "bos_token_id": 2,
    "eos_token_id": END,
    "tie_word_embeddings": False,  # tied, a random model repeats its last token for ever
}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(1)
    if name == "llama":
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**SIZES))
    elif name == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, initializer_range=0.5, eos_token_id=END,
                bos_token_id=2, tie_word_embeddings=False,
            )
        )  # fmt: skip
    elif name == "opt":
        model = OPTForCausalLM(
            OPTConfig(
                vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                word_embed_proj_dim=32, init_std=0.5, eos_token_id=END, bos_token_id=2, pad_token_id=1,
                tie_word_embeddings=False,
            )
        )  # fmt: skip
    elif name == "mistral":
        model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5))
    else:
        model = Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=5, attn_logit_softcapping=2.0))
    return model.double().eval()


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<pad>", "<s>", "</s>", *(f"w{index}" for index in range(VOCABULARY - 4))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def contexts(count: int = 9) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(4, VOCABULARY, size=int(generator.integers(1, 15))).tolist() for _ in range(count)]


def plain_greedy(model: PreTrainedModel, context: list[int], max_new_tokens: int, ends: set[int]) -> list[int]:
    """Argmax over the model's own logits of the whole sequence, again for every token."""
    model.set_attn_implementation("eager")
    ids = list(context)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(context) :]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mistral", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_greedy_in_batches_equals_the_plain_loop_row_by_row(name: str, batch_size: int) -> None:
    model = build(name)
    unstopped = [plain_greedy(model, context, 12, set()) for context in contexts()]
    ends = {unstopped[0][2], unstopped[4][5]}  # so that rows end early beside rows that do not
    expected = [plain_greedy(model, context, 12, ends) for context in contexts()]
    assert len({len(new) for new in expected}) >= 3
    assert len({token_id for new in unstopped for token_id in new}) >= 8
    config = GenerationConfig(max_new_tokens=12, batch_size=batch_size)
    found = list(generate(model, tokenizer(), contexts(), config, end_ids=ends))
    assert [generation.index for generation in found] == list(range(len(expected)))
    for generation, new in zip(found, expected, strict=True):
        is_ended = new[-1] in ends
        assert list(generation.token_ids) == (new[:-1] if is_ended else new)
        assert generation.stop_reason == ("end" if is_ended else "length")


def test_windows_keep_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = build("llama"), GenerationConfig(max_new_tokens=6, batch_size=2)
    whole = list(generate(model, tokenizer(), contexts(), config))
    monkeypatch.setattr("goldsmith.generation.generate._WINDOW_BATCHES", 1)
    assert list(generate(model, tokenizer(), contexts(), config)) == whole


def test_the_models_own_generation_settings_do_not_enter() -> None:
    model = build("llama")
    plain = list(generate(model, tokenizer(), contexts(), GenerationConfig(max_new_tokens=8)))
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.suppress_tokens = list(range(4, 14))
    model.generation_config.do_sample = True
    own = model.generation_config
    assert list(generate(model, tokenizer(), contexts(), GenerationConfig(max_new_tokens=8))) == plain
    assert model.generation_config is own


def test_the_model_is_as_it_was_at_every_handing_over() -> None:
    likelihood = LikelihoodModel(build("llama"))
    model = likelihood.causal_lm
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    for _ in generate(model, tokenizer(), contexts(3), GenerationConfig(max_new_tokens=4, batch_size=1)):
        assert model.config._attn_implementation == PACKED_ATTENTION
        assert [module.training for module in model.modules()] == modes


def test_sampling_depends_on_seed_and_place_and_not_on_the_batch() -> None:
    model = build("llama")

    def sample(**settings: Any) -> list[tuple[int, ...]]:
        config = GenerationConfig(**{"max_new_tokens": 10, "temperature": 1.5, "seed": 7, **settings})
        return [generation.token_ids for generation in generate(model, tokenizer(), contexts(), config)]

    one_by_one = sample(batch_size=1)
    assert sample(batch_size=4) == one_by_one
    assert sample(batch_size=9) == one_by_one
    assert sample(seed=8) != one_by_one
    short = sample(max_new_tokens=3)
    assert short == [token_ids[:3] for token_ids in one_by_one]
    global_state = torch.random.get_rng_state()
    sample()
    assert torch.equal(torch.random.get_rng_state(), global_state)


def test_two_samples_of_one_context_differ() -> None:
    config = GenerationConfig(max_new_tokens=10, temperature=2.0)
    a, b = generate(build("llama"), tokenizer(), [[5, 6, 7]] * 2, config)
    assert a.token_ids != b.token_ids


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.6)])
def test_sampled_tokens_have_the_models_distribution(temperature: float, top_p: float) -> None:
    model, count = build("llama"), 3000
    with torch.no_grad():
        logits = 0.5 * model(input_ids=torch.tensor([[5, 9, 6]])).logits[0, -1]
        model.lm_head.weight *= 0.5  # flatter, so that more than one token is likely
    expected = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = expected.sort(descending=True)
        kept = order[: int((ordered.cumsum(0) < top_p).sum()) + 1]
        expected = torch.zeros_like(expected).index_copy(0, kept, expected[kept] / expected[kept].sum())
    config = GenerationConfig(max_new_tokens=1, temperature=temperature, top_p=top_p, batch_size=count)
    generations = generate(model, tokenizer(), [[5, 9, 6]] * count, config, end_ids=[])
    counts = torch.bincount(torch.tensor([g.token_ids[0] for g in generations]), minlength=VOCABULARY)
    assert not counts[expected == 0].any()
    errors = (counts / count - expected).abs()
    assert bool((errors <= 5 * (expected * (1 - expected) / count).sqrt() + 1e-9).all())


def test_soft_capped_attention_may_be_padded_in_single_precision() -> None:
    model = build("gemma2").float()
    one_by_one = list(generate(model, tokenizer(), contexts(), GenerationConfig(max_new_tokens=8, batch_size=1)))
    assert (
        list(generate(model, tokenizer(), contexts(), GenerationConfig(max_new_tokens=8, batch_size=9))) == one_by_one
    )


def test_a_broken_model_is_an_error_and_not_token_zero() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match="not finite"):
        list(generate(model, tokenizer(), contexts(), GenerationConfig()))


def test_a_nearly_zero_temperature_is_greedy() -> None:
    model = build("llama")
    greedy = list(generate(model, tokenizer(), contexts(), GenerationConfig(max_new_tokens=8)))
    cold = list(generate(model, tokenizer(), contexts(), GenerationConfig(max_new_tokens=8, temperature=1e-6)))
    assert cold == greedy


def test_positions_that_the_model_does_not_have_are_not_used() -> None:
    torch.manual_seed(1)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, n_positions=12, initializer_range=0.5)
    )
    model = model.double().eval()
    config = GenerationConfig(max_new_tokens=6)
    found = list(generate(model, tokenizer(), [[4] * 11, [5, 6], [4] * 9], config, end_ids=[]))
    assert [len(generation.token_ids) for generation in found] == [1, 6, 3]
    with pytest.raises(DataError, match="context 1 has 12 tokens, the model 12 positions"):
        generate(model, tokenizer(), [[5], [4] * 12], config)
    with pytest.raises(DataError, match="context 0 has no token"):
        generate(model, tokenizer(), [[]], config)


def test_no_context_gives_nothing() -> None:
    assert list(generate(build("llama"), tokenizer(), [], GenerationConfig())) == []


def test_end_tokens_are_special_tokens_only() -> None:
    model, words = build("llama"), tokenizer()
    assert end_token_ids(model, words) == (END,)
    model.generation_config.eos_token_id = [END, 7]  # 7 is an ordinary word
    assert end_token_ids(model, words) == (END,)
    words.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    turn_end = words.convert_tokens_to_ids("<|im_end|>")
    assert end_token_ids(model, words) == (END,)
    assert end_token_ids(model, words, gold=[[9, turn_end], [9, 7]]) == (END, turn_end)


def test_text_ends_before_the_end_token() -> None:
    assert decode_text(tokenizer(), [4, 5, END, 6], [END]) == "w0 w1"
    assert decode_text(tokenizer(), np.array([4, 5], dtype=np.int32), [END]) == "w0 w1"
