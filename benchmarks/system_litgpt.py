"""LitGPT's own entry point, `litgpt.finetune.full.setup` or `.lora.setup`, on rows that are tokenised already.

Its model, data collation, chunked loss, loop and log are its own. Where it would do other work than every system here, the
name that its recipe looks up is replaced, and nothing else: it cannot clip, its learning rate is a cosine after a warm-up from 0,
it leaves tied embeddings untied (its pretraining ties them, the same way), and it ends with a checkpoint. It takes the mean
of the micro-batches' means; here each is weighted by its gold, so that the update is that of all others, and how far its own
figure was off is noted.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from child import Setting, Stopwatch, Work, run_child
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import name_to_config
from litgpt.data.base import DataModule, get_sft_collate_fn
from litgpt.finetune import full, lora
from litgpt.model import GPT
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from torch.utils.data import DataLoader, SequentialSampler

# The converter of a family of models is chosen by the beginning of a name.
NAMES = {"llama": "work", "qwen2": "qwen2.5-work"}


class _TrainedError(Exception):
    """The loop has ended; what follows in LitGPT's recipe is a checkpoint."""


class _InOrder(SequentialSampler):
    def __init__(self, rows: Any, stopwatch: Stopwatch) -> None:
        super().__init__(rows)
        self.stopwatch = stopwatch

    def __iter__(self) -> Iterator[int]:
        self.stopwatch.start()
        return super().__iter__()


class _Rows(DataModule):  # type: ignore[misc]
    """The rows in the order of training, as `litgpt.data.SFTDataset` gives them."""

    def __init__(self, work: Work, rows: list[int], stopwatch: Stopwatch) -> None:
        super().__init__()
        self.samples = [self._sample(work, row) for row in rows]
        self.collate = get_sft_collate_fn(pad_id=work.facts["pad_id"])
        self.stopwatch = stopwatch

    @staticmethod
    def _sample(work: Work, row: int) -> dict[str, Any]:
        ids = torch.from_numpy(work.rows[row].astype("int64"))
        labels = ids.clone()
        labels[: work.context_lengths[row]] = -100
        return {
            "input_ids": ids,
            "labels": labels,
            "token_counts": {"raw": len(ids), "raw_plus_prompt_template": len(ids)},
        }

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None, **_: Any) -> None:
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        sampler = _InOrder(self.samples, self.stopwatch)
        return DataLoader(self.samples, batch_size=self.batch_size, sampler=sampler, collate_fn=self.collate)

    def val_dataloader(self) -> DataLoader[Any]:
        """LitGPT looks at the loss of one batch before it begins; that is not timed, and the shortest row costs no memory."""
        return DataLoader([min(self.samples, key=lambda sample: len(sample["input_ids"]))], collate_fn=self.collate)


class _ClippingAdamW(torch.optim.AdamW):
    def __init__(self, parameters: Any, *, max_norm: float, updated: Callable[[], None], **settings: Any) -> None:
        super().__init__(parameters, **settings)
        self.max_norm = max_norm
        self.updated = updated

    def step(self, closure: Any = None) -> Any:
        torch.nn.utils.clip_grad_norm_(self.param_groups[0]["params"], self.max_norm)
        result = super().step(closure)
        self.updated()
        return result


class _StepLoss:
    """LitGPT's loss of a micro-batch, weighted so that those of a step add up to the mean over its gold tokens."""

    def __init__(self, gold: list[list[int]], stopwatch: Stopwatch) -> None:
        self.own = full.chunked_cross_entropy
        self.gold = gold
        self.stopwatch = stopwatch
        self.means: list[torch.Tensor] = []
        self.largest_difference = 0.0

    def __call__(self, logits: Any, targets: torch.Tensor, *args: Any, **keywords: Any) -> torch.Tensor:
        mean = self.own(logits, targets, *args, **keywords)
        if not torch.is_grad_enabled():
            return mean
        gold = self.gold[len(self.stopwatch.losses)]
        weight = gold[len(self.means)] * len(gold) / sum(gold)
        self.means.append(mean.detach())
        # LitGPT divides by the number of micro-batches itself.
        return mean if len(gold) == 1 else mean * weight

    def updated(self) -> None:
        gold = self.gold[len(self.stopwatch.losses)]
        means = torch.stack(self.means)
        loss = float((means * means.new_tensor(gold)).sum() / sum(gold))
        self.largest_difference = max(self.largest_difference, abs(loss - float(means.mean())))
        self.means.clear()
        self.stopwatch.step_done(loss)


class _TiedGPT(GPT):  # type: ignore[misc]
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.transformer.wte.weight = self.lm_head.weight


def convert(work: Work, folder: Path) -> None:
    """The model as LitGPT reads it, by its own converter, which writes beside what it reads."""
    for file in work.model_folder.iterdir():
        (folder / file.name).symlink_to(file)
    published = json.loads((work.model_folder / "config.json").read_text())
    name = NAMES[published["model_type"]]
    config = {
        "name": name,
        "block_size": published["max_position_embeddings"],
        "vocab_size": published["vocab_size"],
        "padded_vocab_size": published["vocab_size"],
        "n_layer": published["num_hidden_layers"],
        "n_embd": published["hidden_size"],
        "n_head": published["num_attention_heads"],
        "n_query_groups": published["num_key_value_heads"],
        "intermediate_size": published["intermediate_size"],
        "norm_eps": published["rms_norm_eps"],
        "rope_base": published["rope_parameters"]["rope_theta"],
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "attn_bias": published["model_type"] == "qwen2",
        "norm_class_name": "RMSNorm",
        "mlp_class_name": "LLaMAMLP",
    }
    with patch.dict(name_to_config, {name: config}):
        convert_hf_checkpoint(folder, model_name=name)


def train(work: Work, setting: Setting, stopwatch: Stopwatch) -> None:
    size, batch_size = setting["rows_per_microbatch"], work.facts["batch_size"]
    steps = [step.tolist() for step in work.steps(setting["steps"])]
    if any(len(step) != batch_size for step in steps):
        raise ValueError(
            "LitGPT leaves out the last step where it holds fewer rows; give it a multiple of the batch size"
        )
    rank = work.facts["lora_rank"]
    recipe: ModuleType = lora if rank else full
    factors: dict[str, Any] = {f"lora_{name}": True for name in ("query", "key", "value", "projection", "mlp")}
    factors |= {"lora_r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0}
    gold = [
        [
            sum(len(work.rows[row]) - int(work.context_lengths[row]) for row in step[start : start + size])
            for start in range(0, batch_size, size)
        ]
        for step in steps
    ]
    loss = _StepLoss(gold, stopwatch)

    def constant(optimizer: Any, warmup_steps: int, max_steps: int) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    def end(*_: Any) -> None:
        raise _TrainedError

    replaced: dict[str, Any] = {
        "chunked_cross_entropy": loss,
        "get_lr_scheduler": constant,
        "create_finetuning_performance_report": end,
    }
    if work.facts["shape"]["tie_word_embeddings"] and not rank:
        replaced["GPT"] = _TiedGPT
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.multiple(recipe, **replaced),
        patch.dict(os.environ, {"LT_ACCELERATOR": work.device.type}),
    ):
        checkpoint = Path(folder) / "checkpoint"
        checkpoint.mkdir()
        convert(work, checkpoint)
        with suppress(_TrainedError):
            recipe.setup(
                checkpoint_dir=checkpoint,
                out_dir=Path(folder) / "out",
                precision="32-true" if work.device.type == "cpu" else "bf16-mixed",
                devices=1,
                data=_Rows(work, [row for step in steps for row in step], stopwatch),
                train=TrainArgs(
                    save_interval=None,
                    log_interval=10,
                    global_batch_size=batch_size,
                    micro_batch_size=size,
                    lr_warmup_steps=1,
                    epochs=1,
                    max_steps=len(steps),
                ),
                eval=EvalArgs(interval=len(steps) + 1, max_new_tokens=1, max_iters=1, final_validation=False),
                optimizer={
                    "class_path": f"{__name__}.{_ClippingAdamW.__name__}",
                    "init_args": {
                        "lr": work.facts["learning_rate"],
                        "betas": (0.9, 0.999),
                        "eps": 1e-8,
                        "weight_decay": 0.0,
                        "fused": True,
                        "max_norm": 1.0,
                        "updated": loss.updated,
                    },
                },
                seed=work.facts["seed"],
                **(factors if rank else {}),
            )
    if loss.largest_difference > 5e-7:  # more than rounding
        stopwatch.notes["nats by which its own loss, a mean of means, was off"] = round(loss.largest_difference, 6)


if __name__ == "__main__":
    run_child(train, ["litgpt", "lightning", "torch", "numpy"])
