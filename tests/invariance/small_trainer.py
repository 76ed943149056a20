"""A small float64 model, gold of every weight, and the real trainer around them, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from goldsmith.data.dataset import Dataset
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.objective.cross_entropy import ObjectiveConfig
from goldsmith.training.checkpoint import CheckpointConfig
from goldsmith.training.optimizer import OptimizerConfig
from goldsmith.training.trainer import EvaluationConfig, Trainer, TrainingConfig, planned_steps
from goldsmith.types import TokenizedExample

__all__ = ["VOCABULARY", "build_model", "build_trainer", "gradients", "make_examples", "weights"]

VOCABULARY = 31


def build_model(chunk_size: int | None = None, label_smoothing: float = 0.0) -> LikelihoodModel:
    """The same weights for every call."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = LlamaForCausalLM(config).double()
    return LikelihoodModel(model, chunk_size=chunk_size, label_smoothing=label_smoothing)


def make_examples(number: int, *, seed: int = 0, plain: bool = False) -> list[TokenizedExample]:
    """Rows of 2 to 24 tokens. `plain`: every weight is 0 or 1; else token weights in {0, 0.5, 1, 2}, example weights 1 or 2."""
    generator = np.random.default_rng(seed)
    examples = []
    for index in range(number):
        length = int(generator.integers(2, 25))
        weights = generator.choice([0.0, 1.0] if plain else [0.0, 0.5, 1.0, 2.0], size=length).astype(np.float32)
        weights[0], weights[-1] = 0.0, 1.0
        examples.append(
            TokenizedExample(
                token_ids=generator.integers(0, VOCABULARY, size=length).astype(np.int32),
                target_weights=weights,
                example_id=f"x{index}",
                example_weight=1.0 if plain else float(generator.choice([1.0, 2.0])),
                source=f"rows:{index}",
                num_bytes=0,
            )
        )
    return examples


def build_trainer(
    folder: Path,
    data: Sequence[TokenizedExample] | Dataset,
    *,
    evaluation: Sequence[TokenizedExample] | None = None,
    model: LikelihoodModel | None = None,
    normalization: Any = "token",
    label_smoothing: float = 0.0,
    **settings: Any,
) -> Trainer:
    """A trainer with defaults that show a difference: weight decay, clipping, a schedule."""
    folder.mkdir(parents=True, exist_ok=True)
    dataset = data if isinstance(data, Dataset) else Dataset(data)
    optimizer = {"learning_rate": 0.01, "weight_decay": 0.1, "warmup_ratio": 0.2, "max_grad_norm": 1.0}
    optimizer |= {key: settings.pop(key) for key in list(settings) if key in OptimizerConfig.model_fields}
    every_steps, early_stopping = settings.pop("evaluate_every", None), settings.pop("early_stopping", None)
    checkpoint = CheckpointConfig(every_steps=settings.pop("save_every", None), keep=settings.pop("keep", 2))
    order = settings.pop("order", "shuffled")
    config = TrainingConfig(**{"epochs": 1, "batch_size": 8, **settings})
    return Trainer(
        model=model or build_model(label_smoothing=label_smoothing),
        train=dataset,
        evaluation=None if evaluation is None else Dataset(evaluation),
        config=config,
        objective=ObjectiveConfig(normalization=normalization, label_smoothing=label_smoothing),
        optimizer=OptimizerConfig(**optimizer),
        evaluation_config=EvaluationConfig(every_steps=every_steps, early_stopping=early_stopping),
        checkpoint=checkpoint,
        total_steps=planned_steps(dataset, config),
        output_dir=folder,
        order=order,
    )


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What `forward_backward` left, by parameter."""
    found = {}
    for name, parameter in trainer.model.causal_lm.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return found


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The parameters as they are now."""
    return {name: parameter.detach().clone() for name, parameter in trainer.model.causal_lm.named_parameters()}
