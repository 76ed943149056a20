"""Proof that packed equals alone: families that hold, features that do not, and faults planted into the fast path."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CONFIG_MAPPING,
    BertConfig,
    BloomConfig,
    Cohere2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    StableLmConfig,
    Starcoder2Config,
    T5Config,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from goldsmith.errors import ModelError
from goldsmith.models import decoder_layers, proof
from goldsmith.models.attention import PACKED_ATTENTION, packed_attention
from goldsmith.models.layout import PackLayout
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.models.proof import TOLERANCE, prove, shrink

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Sizes as published, written down from memory.
PUBLISHED: dict[str, PreTrainedConfig] = {
    "Llama-3.1-8B": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_parameters=dict(LLAMA3_ROPE),
        bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009],
    ),
    "SmolLM2-135M": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "Qwen2.5-7B": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=131072,
        sliding_window=131072,
        use_sliding_window=False,
        max_window_layers=28,
    ),
    "Qwen2 with a window from layer 20 on": Qwen2Config(
        num_hidden_layers=28, use_sliding_window=True, sliding_window=4096, max_window_layers=20
    ),
    "Qwen3-0.6B": Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "Mistral-7B": MistralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        sliding_window=4096,
    ),
    "Mistral-Nemo": MistralConfig(
        vocab_size=131072,
        hidden_size=5120,
        intermediate_size=14336,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        sliding_window=None,
    ),
    "Gemma-2-9b": Gemma2Config(
        vocab_size=256000,
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=4096,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
    "Gemma-3-1b": Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=1152,
        intermediate_size=6912,
        num_hidden_layers=26,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
    ),
    "Phi-3-mini-4k": Phi3Config(
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
        sliding_window=2047,
        pad_token_id=32000,
        eos_token_id=32000,
    ),
    "OLMo-2-7B": Olmo2Config(
        vocab_size=100352, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    ),
    "Granite-3.1-8b": GraniteConfig(
        vocab_size=49155,
        hidden_size=4096,
        intermediate_size=12800,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_key_value_heads=8,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.0078125,
        logits_scaling=16.0,
    ),
    "Pythia-160m": GPTNeoXConfig(
        vocab_size=50304, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    ),
    "GPT-2": GPT2Config(),
    "GPT-2 with scores scaled by layer": GPT2Config(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
    "OPT-125m": OPTConfig(
        hidden_size=768, ffn_dim=3072, num_hidden_layers=12, num_attention_heads=12, word_embed_proj_dim=768
    ),
    "OPT-350m": OPTConfig(
        hidden_size=1024,
        ffn_dim=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        word_embed_proj_dim=512,
        do_layer_norm_before=False,
    ),
    "Mixtral-8x7B": MixtralConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_local_experts=8),
    "Qwen1.5-MoE-A2.7B": Qwen2MoeConfig(
        hidden_size=2048,
        intermediate_size=5632,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=60,
        num_experts_per_tok=4,
    ),
    "Qwen3-30B-A3B": Qwen3MoeConfig(
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
    ),
    "StableLM-2-1.6b": StableLmConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=32, use_qkv_bias=True
    ),
    "Command-R7B": Cohere2Config(
        vocab_size=256000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        sliding_window=4096,
        logit_scale=0.25,
    ),
    "StarCoder2-3b": Starcoder2Config(
        hidden_size=3072, intermediate_size=12288, num_hidden_layers=30, num_attention_heads=24, num_key_value_heads=2
    ),
    "Phi-2": PhiConfig(
        vocab_size=51200,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4},
    ),
    "DeepSeek-V3": DeepseekV3Config(),
}


@pytest.fixture(autouse=True)
def no_proof_from_before() -> Iterator[None]:
    proof._proofs.clear()
    yield
    proof._proofs.clear()


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation gives, on the meta device or not."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self.num_elements = max(self.num_elements, leaf.numel())
        return result


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_hold(name: str) -> None:
    with LargestTensor() as seen:
        result = prove(PUBLISHED[name], name=name)
    assert result.name == name
    assert 0.0 <= result.largest_difference <= TOLERANCE / 4
    assert min(result.row_lengths) < 6 < max(result.row_lengths)
    assert seen.num_elements < 200_000


def test_every_kind_of_layer_stays() -> None:
    gemma = prove(PUBLISHED["Gemma-3-1b"], name="gemma")
    assert gemma.num_layers == 6
    assert [kind.partition(", ")[2] for kind in gemma.layer_kinds] == ["sliding_attention", "full_attention"]
    assert prove(PUBLISHED["Qwen2 with a window from layer 20 on"], name="qwen").num_layers == 21
    assert prove(PUBLISHED["Llama-3.1-8B"], name="llama").num_layers == 2
    # Three dense layers, then experts.
    assert prove(PUBLISHED["DeepSeek-V3"], name="deepseek").num_layers == 4


def test_shrinking_keeps_the_relations() -> None:
    qwen = shrink(PUBLISHED["Qwen3-0.6B"], name="qwen")
    assert qwen.hidden_size < qwen.num_attention_heads * qwen.head_dim
    nemo = shrink(PUBLISHED["Mistral-Nemo"], name="nemo")
    assert nemo.hidden_size > nemo.num_attention_heads * nemo.head_dim
    assert nemo.sliding_window is None
    llama = shrink(PUBLISHED["Llama-3.1-8B"], name="llama")
    assert llama.hidden_size == llama.num_attention_heads * llama.head_dim
    assert 1 < llama.num_key_value_heads < llama.num_attention_heads
    assert llama.rope_parameters["original_max_position_embeddings"] == 8
    gemma = shrink(PUBLISHED["Gemma-3-1b"], name="gemma")
    assert gemma.num_key_value_heads == 1
    assert gemma.sliding_window == 6
    opt = shrink(PUBLISHED["OPT-350m"], name="opt")
    assert opt.word_embed_proj_dim != opt.hidden_size
    experts = shrink(PUBLISHED["Qwen1.5-MoE-A2.7B"], name="moe")
    assert experts.shared_expert_intermediate_size == experts.intermediate_size != experts.moe_intermediate_size


@pytest.mark.parametrize("rope_type", ["linear", "yarn", "llama3"])
def test_rotary_scaling_that_does_not_look_at_the_batch_holds(rope_type: str) -> None:
    rope = {**LLAMA3_ROPE, "rope_type": rope_type}
    if rope_type != "llama3":
        rope = {key: value for key, value in rope.items() if not key.endswith("_freq_factor")}
    if rope_type == "linear":
        del rope["original_max_position_embeddings"]
    prove(LlamaConfig(rope_parameters=rope), name=rope_type)


def test_a_model_with_few_positions_and_tokens() -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=12, vocab_size=20)
    assert max(prove(config, name="short").row_lengths) == 12


class TestRefused:
    def refused(self, config: PreTrainedConfig, *parts: str) -> None:
        with pytest.raises(ModelError) as caught:
            prove(config, name="their/model")
        for part in ("their/model", *parts):
            assert part in caught.value.message
        assert caught.value.remedy
        assert caught.value.exit_code == 4

    def test_gpt_oss(self) -> None:
        self.refused(GptOssConfig(), "gpt_oss", "attention sinks")

    def test_qwen3_next(self) -> None:
        self.refused(Qwen3NextConfig(), "qwen3_next", "linear_attention layers", "state")

    def test_lfm2_with_convolutions(self) -> None:
        kinds = ["conv", "conv", "full_attention", "conv"]
        self.refused(Lfm2Config(num_hidden_layers=4, layer_types=kinds), "lfm2", "conv layers")

    @pytest.mark.parametrize("model_type", ["mamba", "jamba", "recurrent_gemma", "rwkv", "falcon_h1"])
    def test_recurrent(self, model_type: str) -> None:
        self.refused(CONFIG_MAPPING[model_type](), model_type, "state from token to token")

    def test_longrope(self) -> None:
        rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
        config = Phi3Config(
            rope_parameters=rope, max_position_embeddings=131072, original_max_position_embeddings=4096, pad_token_id=0
        )
        self.refused(config, "phi3", "longrope", "longest row")

    def test_dynamic_rope(self) -> None:
        rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        self.refused(LlamaConfig(rope_parameters=rope), "llama", "dynamic", "longest row")

    def test_dynamic_rope_of_one_kind_of_layer(self) -> None:
        config = Gemma3TextConfig(num_hidden_layers=6)
        config.rope_parameters["full_attention"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        self.refused(config, "dynamic")

    def test_attention_that_does_not_go_through_transformers_interface(self) -> None:
        self.refused(BloomConfig(hidden_size=64, n_layer=2, n_head=8), "bloom", "layer 0", "BloomBlock")

    def test_both_directions(self) -> None:
        self.refused(BertConfig(), "bert", "both directions")

    def test_not_a_causal_language_model(self) -> None:
        self.refused(T5Config(), "t5", "no causal language model")

    def test_a_configuration_that_does_not_shrink_is_never_built(self) -> None:
        with LargestTensor() as seen:
            self.refused(CONFIG_MAPPING["blt"](), "blt", "does not shrink", "encoder_hash_tok_embedding")
        assert seen.num_elements < 200_000

    def test_a_refusal_is_not_remembered_as_a_proof(self) -> None:
        self.refused(GptOssConfig())
        self.refused(GptOssConfig())


class TestPlantedFaults:
    """The proof must see each of these, in the place where it is."""

    def caught(self, config: PreTrainedConfig, *parts: str) -> None:
        with pytest.raises(ModelError) as error:
            prove(config, name="faulty")
        for part in ("do not get the log-probabilities", *parts):
            assert part in error.value.message

    def plant_attention(self, monkeypatch: pytest.MonkeyPatch, **changed: Any) -> None:
        def faulty(*args: Any, **kwargs: Any) -> Any:
            return packed_attention(*args, **{**kwargs, **changed})

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, PACKED_ATTENTION, faulty)
        settings = decoder_layers._settings

        def faulty_settings(*args: Any, **kwargs: Any) -> Any:
            found = settings(*args, **kwargs)
            names = {"sliding_window": "window", "scaling": "scale"}
            return found and dataclasses.replace(found, **{names[key]: value for key, value in changed.items()})

        if changed.keys() <= {"sliding_window", "scaling"}:
            monkeypatch.setattr(decoder_layers, "_settings", faulty_settings)

    def plant_head(self, monkeypatch: pytest.MonkeyPatch, **changed: Any) -> None:
        head = LikelihoodModel.head
        monkeypatch.setattr(LikelihoodModel, "head", lambda self: dataclasses.replace(head(self), **changed))

    @pytest.mark.parametrize("name", ["Llama-3.1-8B", "GPT-2", "Gemma-3-1b", "Granite-3.1-8b", "Mixtral-8x7B"])
    def test_rows_see_each_other(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        plan = PackLayout.plan
        monkeypatch.setattr(PackLayout, "plan", lambda lengths, **others: plan([sum(lengths)], **others))
        self.caught(PUBLISHED[name], "layer 0")

    @pytest.mark.parametrize("name", ["GPT-2", "OPT-125m"])
    def test_positions_go_on_from_row_to_row(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        def faulty(*args: Any) -> Any:
            batch = pack(*args)
            return dataclasses.replace(batch, position_ids=torch.arange(batch.num_tokens))

        pack = proof.pack
        monkeypatch.setattr(proof, "pack", faulty)
        self.caught(PUBLISHED[name], "layer 0")

    @pytest.mark.parametrize("window", [None, 5, 7])
    @pytest.mark.parametrize("name", ["Mistral-7B", "Gemma-2-9b", "Gemma-3-1b", "Command-R7B", "Phi-3-mini-4k"])
    def test_another_window(self, monkeypatch: pytest.MonkeyPatch, name: str, window: int | None) -> None:
        self.plant_attention(monkeypatch, sliding_window=window)
        self.caught(PUBLISHED[name], "layer 0")

    def test_attention_soft_cap_ignored(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plant_attention(monkeypatch, softcap=None)
        self.caught(PUBLISHED["Gemma-2-9b"], "layer 0", "sliding_attention")

    @pytest.mark.parametrize("name", ["Gemma-2-9b", "Granite-3.1-8b"])
    def test_attention_scale_ignored(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.plant_attention(monkeypatch, scaling=None)
        self.caught(PUBLISHED[name], "layer 0")

    @pytest.mark.parametrize("name", ["Command-R7B", "Granite-3.1-8b"])
    def test_wrong_logit_scale(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.plant_head(monkeypatch, logit_scale=1.0)
        self.caught(PUBLISHED[name], "output head")

    def test_final_soft_cap_ignored(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plant_head(monkeypatch, soft_cap=None)
        self.caught(PUBLISHED["Gemma-2-9b"], "output head")

    def test_output_bias_ignored(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plant_head(monkeypatch, bias_V=None)
        self.caught(PUBLISHED["Phi-2"], "output head")

    def test_not_a_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plant_attention(monkeypatch, scaling=float("nan"))
        self.caught(PUBLISHED["Llama-3.1-8B"], "layer 0")

    def test_an_exception_becomes_a_refusal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: Any, **__: Any) -> Any:
            raise KeyError("no such kernel")

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, PACKED_ATTENTION, broken)
        with pytest.raises(ModelError, match="cannot be run packed: KeyError: 'no such kernel'"):
            prove(PUBLISHED["GPT-2"], name="faulty")


class TestManners:
    TINY = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)

    def test_random_state_and_threads_are_left_alone(self) -> None:
        torch.manual_seed(5)
        before = torch.get_rng_state()
        prove(self.TINY, name="tiny")
        assert torch.equal(before, torch.get_rng_state())
        assert torch.get_default_dtype() == torch.float32

    def test_the_configuration_is_left_alone(self) -> None:
        config = LlamaConfig(num_hidden_layers=4)
        before = config.to_dict()
        prove(config, name="tiny")
        assert config.to_dict() == before

    def test_kept_for_the_process_under_any_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first = prove(self.TINY, name="tiny")
        monkeypatch.setattr(proof, "_carry_out", lambda *_: pytest.fail("proved again"))
        second = prove(self.TINY, name="other")
        assert second == dataclasses.replace(first, name="other")

    def test_another_configuration_is_proved_anew(self) -> None:
        prove(self.TINY, name="tiny")
        prove(LlamaConfig(**{**self.TINY.to_dict(), "attention_bias": True}), name="tiny")
        assert len(proof._proofs) == 2

    def test_it_is_quick(self) -> None:
        start = time.process_time()
        prove(self.TINY, name="tiny")
        assert time.process_time() - start < 1.5


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("Llama-3.1-8B", True),
        ("Qwen2.5-7B", True),
        ("GPT-2", True),
        ("Granite-3.1-8b", True),
        ("Gemma-2-9b", False),
        ("Mistral-7B", False),
        ("DeepSeek-V3", False),
    ],
)
def test_whether_a_context_may_be_carried_once(name: str, shares: bool) -> None:
    assert prove(PUBLISHED[name], name=name).shares_contexts is shares
