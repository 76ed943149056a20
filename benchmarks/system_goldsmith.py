"""goldsmith: its own trainer, with nothing turned off but checkpoints."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from child import Setting, Stopwatch, Work, run_child

from goldsmith.data.dataset import Dataset
from goldsmith.models.adapters import AdapterBase, AdapterConfig, attach_adapter
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.models.load import load_causal_lm
from goldsmith.models.randomness import silence_randomness
from goldsmith.objective.cross_entropy import ObjectiveConfig
from goldsmith.training.checkpoint import CheckpointConfig
from goldsmith.training.optimizer import OptimizerConfig
from goldsmith.training.trainer import EvaluationConfig, Trainer, TrainingConfig
from goldsmith.types import TokenizedExample


def build_trainer(work: Work, tokens_per_microbatch: int, output_dir: Path) -> Trainer:
    """The trainer of this work, as a recipe would make it."""
    weights = [
        np.where(np.arange(len(row)) < context, 0.0, 1.0).astype(np.float32)
        for row, context in zip(work.rows, work.context_lengths, strict=True)
    ]
    data = Dataset(
        [
            TokenizedExample(
                token_ids=row,
                target_weights=weight,
                example_id=str(index),
                example_weight=1.0,
                source=f"row:{index}",
                num_bytes=0,
            )
            for index, (row, weight) in enumerate(zip(work.rows, weights, strict=True))
        ],
        groups=work.families.tolist(),
    )
    causal_lm = load_causal_lm(work.model_folder, device=str(work.device))
    silence_randomness(causal_lm)
    if rank := work.facts["lora_rank"]:
        attach_adapter(
            causal_lm,
            AdapterConfig(kind="lora", rank=rank, alpha=2 * rank),
            base=AdapterBase(path=str(work.model_folder), revision=None),
            seed=work.facts["seed"],
        )
    causal_lm.train()
    trainer = Trainer(
        model=LikelihoodModel(causal_lm),
        train=data,
        evaluation=None,
        config=TrainingConfig(
            epochs=1,
            batch_size=work.facts["batch_size"],
            tokens_per_microbatch=tokens_per_microbatch,
            seed=work.facts["seed"],
        ),
        objective=ObjectiveConfig(),
        optimizer=OptimizerConfig(
            learning_rate=work.facts["learning_rate"], schedule="constant", warmup_ratio=0.0, max_grad_norm=1.0
        ),
        evaluation_config=EvaluationConfig(),
        checkpoint=CheckpointConfig(),
        total_steps=len(work.steps()),
        output_dir=output_dir,
    )
    for step, rows in enumerate(work.steps(), start=1):
        if not np.array_equal(trainer.order.step(step)[1], rows):
            raise RuntimeError(f"step {step} of the trainer holds other rows than the work says")
    return trainer


def train(work: Work, setting: Setting, stopwatch: Stopwatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(work, setting["tokens_per_microbatch"], Path(folder))
        shared_tokens = 0
        stopwatch.start()
        for step in range(1, len(work.steps(setting["steps"])) + 1):
            record, _ = trainer.train_step(step)
            stopwatch.step_done(record.nll)
            shared_tokens += record.shared_tokens
        stopwatch.notes["tokens not computed again, in shared contexts"] = shared_tokens


if __name__ == "__main__":
    run_child(train, ["goldsmith", "torch", "transformers", "numpy"])
