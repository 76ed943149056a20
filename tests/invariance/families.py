"""Tiny models of several families, with random weights that are nowhere special, and what of them is trained.

Nothing of goldsmith is imported here: both sides of the matrix are given models by this file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

__all__ = [
    "BY_HAND",
    "FAMILIES",
    "TRAINED",
    "TRAINED_BY_HAND",
    "TRAINED_BY_PEFT",
    "VOCABULARY",
    "WINDOW",
    "build",
    "is_soft_capped",
]

VOCABULARY = 41
POSITIONS = 64
WINDOW = 7  # shorter than most of the rows

IDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
WIDTHS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "head_dim": 8,
    **IDS,
}
WITHOUT_GROUPS = {key: value for key, value in WIDTHS.items() if key not in ("num_key_value_heads", "head_dim")}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**WIDTHS, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**WIDTHS, tie_word_embeddings=False),  # biases of query, key and value
    "qwen3": Qwen3Config(**WIDTHS, tie_word_embeddings=True),  # norms of query and key
    "mistral": MistralConfig(**WIDTHS, sliding_window=WINDOW, tie_word_embeddings=False),
    "gemma2": Gemma2Config(  # a window in every other layer, soft caps on scores and logits, four norms a layer
        **WIDTHS,
        query_pre_attn_scalar=8,
        sliding_window=WINDOW,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(  # learnt positions
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=4,
        n_positions=POSITIONS,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        **IDS,
    ),
    "gpt_neox": GPTNeoXConfig(  # attention and MLP side by side, rotary embedding of half a head
        **WITHOUT_GROUPS, rotary_pct=0.5, tie_word_embeddings=False
    ),
    "opt": OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        dropout=0.0,
        attention_dropout=0.0,
        **IDS,
    ),
}
BY_HAND = ("llama", "qwen2", "qwen3", "mistral")

# What has a gradient: every parameter; those of the last layer and what follows it; low-rank additions to every matrix, in ten
# lines of our own; and the same by `peft`, whose layers the adapters of a recipe are made of.
TRAINED = ("all", "top", "low rank")
TRAINED_BY_PEFT = ("lora", "dora")
# Layers by hand know plain weights, and the factors of peft's LoRA beside them.
TRAINED_BY_HAND = ("all", "top", "lora")


def is_soft_capped(family: str) -> bool:
    """Whether scores of attention are bounded, which `scaled_dot_product_attention` cannot do."""
    return getattr(FAMILIES[family], "attn_logit_softcapping", None) is not None


class LowRank(nn.Module):
    """A frozen matrix and a trained addition of rank 2 (LoRA, Hu et al. 2021); `down` would begin at zero in a real run."""

    def __init__(self, base: nn.Module, in_features: int, out_features: int) -> None:
        super().__init__()
        self.base = base
        self.up = nn.Parameter(torch.randn(2, in_features) * in_features**-0.5)
        self.down = nn.Parameter(torch.randn(out_features, 2) * 0.3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = self.base(inputs) + inputs @ self.up.T @ self.down.T
        return added


def build(family: str, *, trained: str = "all", dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """The same weights for every call and dtype: float64 ones are the float32 ones, widened."""
    auto_model: Any = AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(17)
        config = type(FAMILIES[family])(**FAMILIES[family].to_dict())
        model: PreTrainedModel = auto_model.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                # Biases and norms too; matrices large enough that attention is far from uniform.
                parameter += torch.randn_like(parameter) * (0.2 if parameter.ndim < 2 else 0.3)
        layers = next(module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList))
        if trained != "all":
            model.requires_grad_(False)
        if trained == "top":
            layers[-1].requires_grad_(True)
            if not model.config.tie_word_embeddings:
                model.get_output_embeddings().requires_grad_(True)
        elif trained == "low rank":
            _add_low_rank(layers)
        elif trained in TRAINED_BY_PEFT:
            _add_by_peft(model, layers, trained)
    return model.to(dtype).train()


def _add_low_rank(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, LowRank(child, child.in_features, child.out_features))
        elif isinstance(child, Conv1D):
            setattr(module, name, LowRank(child, *child.weight.shape))
        else:
            _add_low_rank(child)


def _add_by_peft(model: nn.Module, layers: nn.ModuleList, kind: str) -> None:
    """Random factors, none of them zero; for `dora` the length of each weight is trained besides."""
    import peft

    inside = set(layers.modules())
    targets = [name for name, m in model.named_modules() if m in inside and isinstance(m, (nn.Linear, Conv1D))]
    is_transposed = any(isinstance(module, Conv1D) for module in inside)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=targets,
        use_dora=kind == "dora",
        fan_in_fan_out=is_transposed,
        init_lora_weights=False,
    )
    peft.inject_adapter_in_model(config, model)
