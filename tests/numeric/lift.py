"""Norms and rotary embeddings of transformers in the dtype of their input, where they would round to float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

__all__ = ["lifted"]


def _rms_norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    variance = hidden.pow(2).mean(-1, keepdim=True)
    return self.weight * (hidden * torch.rsqrt(variance + self.variance_epsilon))


def _gemma_rms_norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    variance = hidden.pow(2).mean(-1, keepdim=True)
    return (1.0 + self.weight) * (hidden * torch.rsqrt(variance + self.eps))


def _rotary(self: Any, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angles = position_ids[:, :, None].to(hidden.dtype) * self.inv_freq.to(hidden.dtype)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


_LIFTED: list[tuple[type[torch.nn.Module], Callable[..., Any]]] = [
    (modeling_llama.LlamaRMSNorm, _rms_norm),
    (modeling_qwen2.Qwen2RMSNorm, _rms_norm),
    (modeling_qwen3.Qwen3RMSNorm, _rms_norm),
    (modeling_mistral.MistralRMSNorm, _rms_norm),
    (modeling_gemma2.Gemma2RMSNorm, _gemma_rms_norm),
    (modeling_llama.LlamaRotaryEmbedding, _rotary),
    (modeling_qwen2.Qwen2RotaryEmbedding, _rotary),
    (modeling_qwen3.Qwen3RotaryEmbedding, _rotary),
    (modeling_mistral.MistralRotaryEmbedding, _rotary),
    (modeling_gemma2.Gemma2RotaryEmbedding, _rotary),
    (modeling_gpt_neox.GPTNeoXRotaryEmbedding, _rotary),
]


@contextmanager
def lifted() -> Iterator[None]:
    """While open, Llama, Qwen 2 and 3, Gemma 2, Mistral and GPT-NeoX compute in float64 throughout (GPT-2 does by itself)."""
    originals = [(cls, cls.forward) for cls, _ in _LIFTED]
    for cls, forward in _LIFTED:
        cls.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for cls, forward in originals:
            cls.forward = forward  # type: ignore[method-assign]
