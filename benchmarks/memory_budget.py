"""Where the memory of one goldsmith step goes, as planned, and with `--measure` what steps were seen to take.

    python benchmarks/memory_budget.py --workload gsm8k-135m [--tokens N] [--checkpointing layers] [--measure]

Without `--tokens` it is the largest micro-batch of the workload's rows.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from child import Work
from system_goldsmith import build_trainer
from workloads import WORKLOADS, prepare

from goldsmith.models.checkpointing import checkpoint_layers
from goldsmith.training.memory import MemoryBudget, ModelShape, memory_budget
from goldsmith.training.metrics import peak_memory_bytes

WHEN = {"always": "always", "gradient": "forward and backward", "update": "update"}


def table(budget: MemoryBudget) -> str:
    """The budget as a Markdown table."""
    lines = [
        f"A micro-batch of {budget.tokens:,} tokens, {budget.gold_tokens:,} of them gold; "
        f"activation checkpointing: {budget.activation_checkpointing}.",
        "",
        "| buffer | MB | when |",
        "|---|---:|---|",
    ]
    lines += [f"| {term.name} | {term.bytes / 1e6:,.0f} | {WHEN[term.when]} |" for term in budget.terms]
    return "\n".join([*lines, f"| **at most at a time** | **{budget.total / 1e6:,.0f}** | |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="gsm8k-135m", choices=WORKLOADS)
    parser.add_argument("--rows", type=int)
    parser.add_argument(
        "--tokens", type=int, help="at most in a micro-batch; without --measure so many, half of them taken to be gold"
    )
    parser.add_argument("--checkpointing", default="none", choices=["none", "layers"])
    parser.add_argument("--state-dtype", default="float32", choices=["float32", "bfloat16", "int8"])
    parser.add_argument("--measure", action="store_true", help="do two steps of the workload, and print their peak")
    options = parser.parse_args()
    workload = WORKLOADS[options.workload]
    with tempfile.TemporaryDirectory() as folder:
        prepare(options.workload, Path(folder), num_rows=options.rows or 2 * workload.batch_size)
        work = Work.read(Path(folder))
        trainer = build_trainer(work, options.tokens or workload.tokens_per_microbatch, Path(folder) / "run")
        own = trainer.memory.budget()
        tokens = own.tokens if options.measure else options.tokens or own.tokens
        budget = memory_budget(
            ModelShape.of(trainer.model),
            tokens=tokens,
            gold_tokens=tokens // 2 if options.tokens and not options.measure else own.gold_tokens,
            activation_checkpointing=options.checkpointing,
            state_dtype=options.state_dtype,
        )
        print(table(budget))
        if options.measure:
            if options.checkpointing == "layers":
                checkpoint_layers(trainer.model.causal_lm)
            before = peak_memory_bytes(trainer.device) - budget.bytes_of("parameters")
            print(f"\nBeyond the {before / 1e6:,.0f} MB of the process without its model:")
            # The optimizer makes its state in the first update: a step like all others is the second one.
            for step in (1, 2):
                record, _ = trainer.train_step(step)
                print(
                    f"step {step}: {record.tokens:,} tokens in {record.microbatches} micro-batches, "
                    f"{record.seconds:.1f} s, peak {(record.peak_memory_bytes - before) / 1e6:,.0f} MB"
                )


if __name__ == "__main__":
    main()
