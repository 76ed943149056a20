"""TRL's SFTTrainer on rows that are tokenised already, in the given order, with no truncation."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from child import Setting, Stopwatch, Work, lora_config, run_child
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class _Marks(TrainerCallback):
    """Tells the stopwatch of the start and of each update."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch
        self.micro_losses: list[torch.Tensor] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.stopwatch.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.stopwatch.step_done(float(torch.stack(self.micro_losses).sum()))
        self.micro_losses.clear()


class _Trainer(SFTTrainer):  # type: ignore[misc]
    marks: _Marks

    def training_step(self, *args: Any, **keywords: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **keywords)
        # Each micro-batch's loss is its sum over the step's count of gold tokens: they add up to the step's.
        self.marks.micro_losses.append(loss.detach())
        return loss


def train(work: Work, setting: Setting, stopwatch: Stopwatch) -> None:
    is_cuda = work.device.type == "cuda"
    size = setting["rows_per_microbatch"]
    steps = work.steps(setting["steps"])
    rows = [int(row) for step in steps for row in step]
    data = Dataset.from_list(
        [
            {
                "input_ids": work.rows[row].tolist(),
                "labels": [-100] * int(work.context_lengths[row])
                + work.rows[row][work.context_lengths[row] :].tolist(),
            }
            for row in rows
        ]
    )
    model = AutoModelForCausalLM.from_pretrained(work.model_folder, dtype=torch.float32, attn_implementation="sdpa")
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=work.facts["batch_size"] // size,
            num_train_epochs=1,
            learning_rate=work.facts["learning_rate"],
            lr_scheduler_type="constant",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            bf16=is_cuda,
            use_cpu=not is_cuda,
            max_length=None,
            padding_free=setting.get("padding_free", False),
            gradient_checkpointing=setting.get("gradient_checkpointing", False),
            train_sampling_strategy="sequential",
            save_strategy="no",
            logging_steps=10,
            report_to="none",
            disable_tqdm=True,
            dataloader_num_workers=0,
            seed=work.facts["seed"],
        )
        marks = _Marks(stopwatch)
        trainer = _Trainer(
            model=model,
            args=config,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(work.model_folder),
            callbacks=[marks],
            peft_config=lora_config(work),
        )
        trainer.marks = marks
        trainer.train()


if __name__ == "__main__":
    run_child(train, ["trl", "torch", "transformers", "accelerate", "numpy"])
