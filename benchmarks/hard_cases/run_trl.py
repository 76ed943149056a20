"""What TRL's SFTTrainer trains on in each hard case, as JSON: run_trl.py OUTPUT. In an environment that has TRL.

Read from the batch that its data loader hands to the model, so that preparation, truncation and collation are all in it.
Conversations are trained with `assistant_only_loss=True`. Messages are those that an ordinary run does not print.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from cases import (
    CASES,
    Case,
    Same,
    decode,
    difference,
    make_model,
    make_tokenizer,
    plain_gradient,
    plain_log_probs,
    plain_loss,
    plain_rows,
)
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer


class _Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__(level=logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())


@contextmanager
def _listening() -> Iterator[list[str]]:
    """Warnings of every kind, as a user would read them."""
    listener = _Listener()
    loggers = [logging.getLogger(name) for name in ("", "trl", "transformers", "datasets", "accelerate")]
    for logger in loggers:
        logger.addHandler(listener)
    # A warning that is shown once a process is to be heard in every case.
    for once in (transformers.utils.logging.warning_once,):
        once.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield listener.heard
    finally:
        for logger in loggers:
            logger.removeHandler(listener)
        listener.heard += [str(warning.message) for warning in caught]


def make_trainer(case: Case, folder: Path, **settings: Any) -> SFTTrainer:
    """The trainer on the case's file, as a user would set it up."""
    data = datasets.load_dataset(
        "json", data_files=str(case.write(folder)), split="train", cache_dir=str(folder / "cache")
    )
    config = SFTConfig(
        **{
            "output_dir": str(folder / "out"),
            "max_length": case.max_length,
            "per_device_train_batch_size": len(case.rows),
            "assistant_only_loss": "messages" in case.rows[0],
            "train_sampling_strategy": "sequential",
            "use_cpu": True,
            "bf16": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **case.trl,
            **settings,
        }
    )
    return SFTTrainer(model=make_model(), args=config, train_dataset=data, processing_class=make_tokenizer(case))


def observe(case: Case, ordinary: Sequence[str] = ()) -> dict[str, Any]:
    """As `run_goldsmith.observe`; `messages` are what it said, but for what any run says."""
    found: dict[str, Any] = {}
    with _listening() as heard, tempfile.TemporaryDirectory() as folder:
        try:
            if isinstance(case.right, Same):
                found["number"], found["shown"] = globals()[f"measure_{case.measure}"](case, Path(folder))
            else:
                [batch] = list(make_trainer(case, Path(folder)).get_train_dataloader())
                found["examples"] = _examples(batch)
        except Exception as error:  # whatever it raises is what the user sees
            traceback.print_exc()
            found["refused"] = f"{type(error).__name__}: {error}"
    return {**found, "messages": [message for message in dict.fromkeys(heard) if message not in ordinary]}


def _examples(batch: dict[str, torch.Tensor]) -> list[dict[str, list[Any]]]:
    examples = []
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        is_there = mask.bool()
        weights = (labels[is_there] != -100).float()
        examples.append({"ids": ids[is_there].tolist(), "weights": weights.tolist()})
    return examples


def measure_packing(case: Case, folder: Path) -> tuple[float, str]:
    trainer = make_trainer(case, folder, per_device_train_batch_size=1)
    [batch] = list(trainer.get_train_dataloader())
    model = trainer.model.eval()
    ids, gold = batch["input_ids"][0], batch["labels"][0] != -100
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) == len(case.rows)
    worst = 0.0
    wanted = {
        tuple(token for token, weight in zip(row, weights, strict=True) if weight > 0)
        for row, weights in plain_rows(case)
    }
    with torch.no_grad():
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        log_probs = torch.log_softmax(model(**inputs).logits[0], dim=-1)
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            row, weights = ids[start:end].tolist(), gold[start:end].float().tolist()
            places = torch.arange(start + 1, end)[gold[start + 1 : end]]
            if tuple(ids[places].tolist()) not in wanted:
                return math.inf, f"the gold is {decode(ids[places].tolist())!r}"
            packed = log_probs[places - 1, ids[places]]
            worst = max(worst, difference(packed, plain_log_probs(make_model(), row, weights)))
    return worst, f"{worst:.1e}"


class _Gradient(TrainerCallback):
    """Keeps the gradient of the first update."""

    found: torch.Tensor

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).clone()


def measure_accumulation(case: Case, folder: Path) -> tuple[float, str]:
    size = len(case.rows)
    settings = {"gradient_accumulation_steps": size, "max_steps": 1, "max_grad_norm": 0.0}
    trainer = make_trainer(case, folder, per_device_train_batch_size=1, **settings)
    gradient = _Gradient()
    trainer.add_callback(gradient)
    trainer.train()
    worst = difference(gradient.found, plain_gradient(make_model(), case))
    return worst, f"{worst:.1e}"


def measure_evaluation(case: Case, folder: Path) -> tuple[float, str]:
    losses = []
    for size in (1, 2, 3):
        trainer = make_trainer(case, folder, per_device_eval_batch_size=size)
        losses.append(trainer.evaluate(eval_dataset=trainer.train_dataset)["eval_loss"])
    truth = float(plain_loss(make_model(), case).detach())
    worst = max(abs(loss / truth - 1) for loss in losses)
    return worst, f"{', '.join(f'{loss:.5f}' for loss in losses)}; plain {truth:.5f}"


if __name__ == "__main__":
    datasets.disable_progress_bars()
    plain = replace(next(case for case in CASES if case.name == "pad_is_end"), pad="<pad>")
    ordinary = observe(plain)["messages"]
    result: dict[str, Any] = {}
    for case in CASES:
        result[case.name] = observe(case, ordinary)
        if case.remedied:
            result[case.name]["remedied"] = observe(replace(case, **case.remedied), ordinary)
    versions = {"trl": trl.__version__, "transformers": transformers.__version__, "datasets": datasets.__version__}
    Path(sys.argv[1]).write_text(json.dumps({"cases": result, "versions": versions}), encoding="utf-8")
