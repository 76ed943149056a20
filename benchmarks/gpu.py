"""goldsmith beside TRL with Liger's kernels on one GPU: speed, memory and first losses on the same rows, in turn.

    python benchmarks/gpu.py --rounds 3 --output benchmarks/results            the table
    python benchmarks/gpu.py --system goldsmith --cases qwen2.5-0.5b:gsm8k     one system, printed

Every system runs in a process of its own, in turn (A B A B); a process goes through all cases, so that starting costs little.
Weights are random, drawn on the GPU from the same seed; float32 parameters with bfloat16 products where all of them are
trained, bfloat16 parameters under LoRA. Rows are those of `workloads.py` (a stand-in of the same lengths where the data is absent).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from workloads import token_rows

HERE = Path(__file__).resolve().parent
WARM_UP_STEPS = 2
PEAK_TFLOPS = 989.0  # dense bfloat16 of an H100 or H200 (SXM), by the datasheet

QWEN_05B = {
    "architecture": "qwen2", "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_1B = {
    "architecture": "llama", "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 131_072, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_8B = {
    "architecture": "llama", "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072,
    "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """A shape, its rows and how a step is cut.

    Attributes:
        rows_per_step: examples of an update, the same for all systems.
        tokens_per_microbatch: goldsmith's.
        rows_per_microbatch: TRL's, by setting; the fastest counts.
    """

    shape: dict[str, Any]
    rows: str
    rows_per_step: int
    tokens_per_microbatch: int
    rows_per_microbatch: tuple[int, ...]
    steps: int
    lora_rank: int = 0


CASES = {
    "qwen2.5-0.5b:gsm8k-2k": Case(
        shape=QWEN_05B, rows="gsm8k", rows_per_step=64, tokens_per_microbatch=2048, rows_per_microbatch=(8,), steps=6
    ),
    "qwen2.5-0.5b:gsm8k": Case(
        shape=QWEN_05B, rows="gsm8k", rows_per_step=64, tokens_per_microbatch=16_384, rows_per_microbatch=(32, 64), steps=6
    ),
    "qwen2.5-0.5b:legal": Case(
        shape=QWEN_05B, rows="legal", rows_per_step=32, tokens_per_microbatch=16_384, rows_per_microbatch=(16,), steps=6
    ),
    "llama-3.2-1b:gsm8k": Case(
        shape=LLAMA_1B, rows="gsm8k", rows_per_step=64, tokens_per_microbatch=16_384, rows_per_microbatch=(32,), steps=5
    ),
    "llama-3.1-8b-lora:gsm8k": Case(
        shape=LLAMA_8B, rows="gsm8k", rows_per_step=64, tokens_per_microbatch=8192, rows_per_microbatch=(16, 32), steps=4,
        lora_rank=16,
    ),
    "llama-3.1-8b-lora:legal": Case(
        shape=LLAMA_8B, rows="legal", rows_per_step=16, tokens_per_microbatch=8192, rows_per_microbatch=(4,), steps=4,
        lora_rank=16,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Work:
    """The rows of every step: token ids, and how many of them are context."""

    steps: list[list[tuple[list[int], int]]]
    linear_parameters: int
    case: Case

    @property
    def tokens_a_step(self) -> float:
        return statistics.mean(sum(len(ids) for ids, _ in step) for step in self.steps[WARM_UP_STEPS:])

    @property
    def gold_a_step(self) -> float:
        return statistics.mean(sum(len(ids) - context for ids, context in step) for step in self.steps[WARM_UP_STEPS:])

    @property
    def flops_a_step(self) -> float:
        """What must be computed: products with weights, forward and backward; attention, adapters and padding are not counted."""
        factor = 4.0 if self.case.lora_rank else 6.0
        head = self.case.shape["hidden_size"] * self.case.shape["vocab_size"]
        return factor * (self.linear_parameters * self.tokens_a_step + head * self.gold_a_step)


def build_model(case: Case) -> Any:
    """Random weights, drawn on the GPU: the same in every process."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = dict(case.shape)
    config = AutoConfig.for_model(shape.pop("architecture"), **shape, bos_token_id=None, eos_token_id=0, pad_token_id=1)
    dtype = torch.bfloat16 if case.lora_rank else torch.float32
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def lora_config(case: Case) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=case.lora_rank, lora_alpha=2 * case.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def work_of(case: Case, model: Any) -> Work:
    rows, _ = token_rows(case.rows, case.rows_per_step * case.steps, case.shape["vocab_size"])
    plain = [([*row.context, *row.gold], len(row.context)) for row in rows]
    plain = [plain[index % len(plain)] for index in range(case.rows_per_step * case.steps)]
    order = np.random.default_rng(0).permutation(len(plain))
    shuffled = [plain[index] for index in order]
    size = case.rows_per_step
    linear = sum(m.weight.numel() for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear))
    steps = [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
    return Work(steps=steps, linear_parameters=linear, case=case)


class Stopwatch:
    """Losses and times of the steps, with the device's queue empty at each mark."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.marks: list[float] = []

    def mark(self, loss: float | None = None) -> None:
        torch.cuda.synchronize()
        self.marks.append(time.perf_counter())
        if loss is not None:
            self.losses.append(loss)

    @property
    def median_seconds(self) -> float:
        return statistics.median(np.diff(self.marks)[WARM_UP_STEPS:])


def run_goldsmith(case: Case, setting: dict[str, Any]) -> tuple[Work, Stopwatch]:
    from goldsmith.data.dataset import Dataset
    from goldsmith.models.compiling import compile_layers
    from goldsmith.models.likelihood import LikelihoodModel
    from goldsmith.models.randomness import silence_randomness
    from goldsmith.models.step import forward_backward
    from goldsmith.training.metrics import total_norm
    from goldsmith.training.optimizer import OptimizerConfig, build_optimizer
    from goldsmith.types import TokenizedExample

    model = build_model(case)
    work = work_of(case, model)
    silence_randomness(model)
    if case.lora_rank:
        from peft import inject_adapter_in_model

        model.requires_grad_(False)
        torch.manual_seed(1)
        inject_adapter_in_model(lora_config(case), model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    examples = [
        TokenizedExample(
            token_ids=np.array(ids, dtype=np.int32),
            target_weights=(np.arange(len(ids)) >= context).astype(np.float32),
            example_id=str(index),
            example_weight=1.0,
            source="",
            num_bytes=0,
        )
        for index, (ids, context) in enumerate(row for step in work.steps for row in step)
    ]
    data = Dataset(examples, groups=list(range(len(examples))))
    likelihood = LikelihoodModel(model)
    if setting.get("compile"):
        compile_layers(model)
    likelihood.train()
    optimizer = build_optimizer(likelihood.named_parameters(), OptimizerConfig(learning_rate=1e-5))
    trainable = [p for p in likelihood.parameters() if p.requires_grad]
    watch = Stopwatch()
    watch.mark()
    for step in range(len(work.steps)):
        indices = np.arange(step * case.rows_per_step, (step + 1) * case.rows_per_step)
        sums = forward_backward(
            likelihood,
            data,
            indices,
            normalization="token",
            tokens_per_microbatch=setting.get("tokens_per_microbatch", case.tokens_per_microbatch),
            shares_contexts=False,
        )
        norm = float(total_norm(p.grad for p in trainable if p.grad is not None))
        torch._foreach_mul_([p.grad for p in trainable], min(1.0, 1.0 / (norm + 1e-6)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.mark(sums.loss)
    return work, watch


def run_trl(case: Case, setting: dict[str, Any]) -> tuple[Work, Stopwatch]:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    model = build_model(case)
    work = work_of(case, model)
    watch = Stopwatch()
    micro_losses: list[torch.Tensor] = []

    class Marks(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            watch.mark()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.mark(float(torch.stack(micro_losses).sum()))
            micro_losses.clear()

    class Trainer(SFTTrainer):  # type: ignore[misc]
        def training_step(self, *args: Any, **keywords: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*args, **keywords)
            micro_losses.append(loss.detach())
            return loss

    data = Dataset.from_list(
        [{"input_ids": ids, "labels": [-100] * context + ids[context:]} for step in work.steps for ids, context in step]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<end>": 0, "<pad>": 1, "<unk>": 2}, unk_token="<unk>")),
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    size = setting["rows_per_microbatch"]
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=case.rows_per_step // size,
            num_train_epochs=1,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            bf16=True,
            max_length=None,
            use_liger_kernel=True,
            torch_compile=setting.get("torch_compile", False),
            gradient_checkpointing=setting.get("gradient_checkpointing", False),
            train_sampling_strategy="sequential",
            save_strategy="no",
            logging_steps=100,
            report_to="none",
            disable_tqdm=True,
            seed=1,
        )
        trainer = Trainer(
            model=model,
            args=config,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[Marks()],
            peft_config=lora_config(case) if case.lora_rank else None,
        )
        trainer.train()
    return work, watch


SYSTEMS: dict[str, Callable[[Case, dict[str, Any]], tuple[Work, Stopwatch]]] = {
    "goldsmith": run_goldsmith,
    "trl": run_trl,
}


def settings_of(system: str, case: Case) -> list[dict[str, Any]]:
    if system == "goldsmith":
        return [{"tokens_per_microbatch": case.tokens_per_microbatch}]
    return [{"rows_per_microbatch": rows} for rows in case.rows_per_microbatch]


def measure(system: str, name: str, setting: dict[str, Any]) -> dict[str, Any]:
    """One run in this process."""
    import gc

    if setting.get("profile"):
        setting = {key: value for key, value in setting.items() if key != "profile"}
        with torch.profiler.profile() as profiler:
            result = measure(system, name, setting)
        print(profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=70))
        return result

    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    result: dict[str, Any] = {"system": system, "case": name, "setting": setting}
    started = time.perf_counter()
    try:
        work, watch = SYSTEMS[system](CASES[name], setting)
    except torch.OutOfMemoryError:
        return result | {"outcome": "out of memory"}
    except Exception as error:
        import traceback

        traceback.print_exc()
        return result | {"outcome": f"failed: {type(error).__name__}: {str(error)[:300]}"}
    seconds = watch.median_seconds
    return result | {
        "outcome": "done",
        "seconds_a_step": seconds,
        "step_seconds": np.diff(watch.marks).tolist(),
        "all_seconds": time.perf_counter() - started,
        "tokens_a_second": work.tokens_a_step / seconds,
        "share_of_peak": work.flops_a_step / seconds / (PEAK_TFLOPS * 1e12),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(),
        "losses": watch.losses,
    }


def show(result: dict[str, Any]) -> None:
    if result["outcome"] != "done":
        print(f"{result['case']:32} {result['system']:10} {result['setting']}: {result['outcome']}", flush=True)
        return
    print(
        f"{result['case']:32} {result['system']:10} {result['setting']}: {1000 * result['seconds_a_step']:.0f} ms a step, "
        f"{result['tokens_a_second']:,.0f} tokens/s, {100 * result['share_of_peak']:.1f}% of {PEAK_TFLOPS:.0f} TFLOP/s, "
        f"{result['peak_gpu_bytes'] / 1e9:.1f} GB, losses {[round(loss, 4) for loss in result['losses'][:3]]}, "
        f"first step {result['step_seconds'][0]:.1f} s, in all {result['all_seconds']:.0f} s",
        flush=True,
    )


def run_child(system: str, jobs: list[tuple[str, dict[str, Any]]], timeout: float) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.jsonl"
        command = [sys.executable, __file__, "--system", system, "--jobs", json.dumps(jobs), "--out", str(file)]
        with_log = subprocess.run(command, cwd=HERE, timeout=timeout, stderr=subprocess.PIPE, text=True, check=False)
        if with_log.returncode != 0:
            print(with_log.stderr[-2000:], flush=True)
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(results: list[dict[str, Any]], chosen: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Markdown; medians over the rounds of each system's chosen setting."""
    lines = [
        "| case | system | setting | ms a step | tokens/s | of the peak rate | peak GPU memory | times as slow | first loss |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in CASES:
        own: float | None = None
        for system in SYSTEMS:
            setting = chosen.get((system, name))
            runs = [
                r
                for r in results
                if (r["system"], r["case"], r["setting"]) == (system, name, setting) and r["outcome"] == "done"
            ]
            if not runs:
                continue
            seconds = statistics.median(r["seconds_a_step"] for r in runs)
            own = own or seconds
            lines.append(
                f"| {name} | {system} | {setting} | {1000 * seconds:.0f} "
                f"| {statistics.median(r['tokens_a_second'] for r in runs):,.0f} "
                f"| {100 * statistics.median(r['share_of_peak'] for r in runs):.1f}% "
                f"| {max(r['peak_gpu_bytes'] for r in runs) / 1e9:.1f} GB | {seconds / own:.2f} | {runs[0]['losses'][0]:.4f} |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=SYSTEMS)
    parser.add_argument("--cases", help="some of them, comma separated")
    parser.add_argument("--jobs", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=360.0, help="no new round begins after so long")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    options = parser.parse_args(arguments)
    names = options.cases.split(",") if options.cases else list(CASES)
    if options.system:
        jobs = json.loads(options.jobs) if options.jobs else None
        if jobs is None:
            jobs = [(name, setting) for name in names for setting in settings_of(options.system, CASES[name])]
        for name, setting in jobs:
            result = measure(options.system, name, setting)
            show(result)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(result) + "\n")
        return 0
    started = time.monotonic()
    results: list[dict[str, Any]] = []
    chosen: dict[tuple[str, str], dict[str, Any]] = {}
    for number in range(options.rounds):
        if number and time.monotonic() - started > options.seconds:
            break
        for system in SYSTEMS:
            if number == 0:
                jobs = [(name, setting) for name in names for setting in settings_of(system, CASES[name])]
            else:
                jobs = [(name, chosen[system, name]) for name in names if (system, name) in chosen]
            results += run_child(system, jobs, timeout=600)
            if number == 0:
                for name in names:
                    done = [r for r in results if (r["system"], r["case"]) == (system, name) and r["outcome"] == "done"]
                    if done:
                        chosen[system, name] = min(done, key=lambda r: r["seconds_a_step"])["setting"]
        options.output.mkdir(parents=True, exist_ok=True)
        stem = options.output / f"gpu-{date.today().isoformat()}"
        head = {
            "device": torch.cuda.get_device_name(),
            "versions": {n: metadata.version(n) for n in ("torch", "transformers", "trl", "liger-kernel", "peft")},
            "rounds": number + 1,
        }
        stem.with_suffix(".json").write_text(json.dumps({**head, "results": results}, indent=1) + "\n")
        stem.with_suffix(".md").write_text(f"{json.dumps(head)}\n\n{table(results, chosen)}\n")
        print(stem.with_suffix(".md").read_text(), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
