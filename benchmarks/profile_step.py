"""Where the time and the memory of one goldsmith step go.

    .venv/bin/python benchmarks/profile_step.py [--workload gsm8k-135m] [--rows 16] [--top 15] [--kind element-wise]

A warm-up step, the steps under the clock alone, the last of them again under `torch.profiler` (the first one also measures
update_to_weight), and a forward pass that notes every tensor kept for the backward pass, with the line of code that made
it. Shares are of the wall time, by self time of operators; what is left over is Python and dispatch.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
import traceback
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from child import Work
from system_goldsmith import build_trainer
from torch.profiler import ProfilerActivity, profile
from workloads import WORKLOADS, prepare

from goldsmith.models.step import microbatches
from goldsmith.objective.normalization import token_coefficients
from goldsmith.training.metrics import peak_memory_bytes
from goldsmith.training.trainer import Trainer

# Operators by kind, without `aten::` and underscores at either end; a trailing `*` stands for any ending.
KINDS: dict[str, str] = {
    "matrix products": "mm addmm bmm baddbmm mv addmv dot mkldnn_linear*",
    "attention kernel": "scaled_dot_product* flash_attention*",
    "optimizer, clipping, its measurement": "fused_adamw* foreach*",
    "copies, gathers, fills": "copy cat index index_select index_add index_copy index_put* gather scatter* fill zero "
    "embedding* slice_backward select_backward nonzero unique* sort argsort",
    "element-wise and reductions": "mul add sub rsub div neg pow rsqrt sqrt square addcmul addcdiv silu silu_backward sigmoid "
    "tanh gelu* cos sin mean sum linalg_vector_norm exp log logsumexp log_softmax* amax where masked_fill*",
}
REST = "views, allocation, small operators"
NODES = "Python inside autograd nodes"


def kind_of(operator: str) -> str:
    """The kind of an operator by the profiler's name of it.

    >>> kind_of("aten::addmm"), kind_of("aten::add_"), kind_of("aten::_index_put_impl_")
    ('matrix products', 'element-wise and reductions', 'copies, gathers, fills')
    >>> kind_of("aten::expand"), kind_of("_DecoderLayerBackward")
    ('views, allocation, small operators', 'Python inside autograd nodes')
    """
    if not operator.startswith("aten::"):
        return NODES
    name = operator.removeprefix("aten::").strip("_")
    for kind, patterns in KINDS.items():
        for pattern in patterns.split():
            if name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1])):
                return kind
    return REST


def time_table(trainer: Trainer, step: int, top: int, kind: str) -> list[str]:
    """Profile one step; lines to print. The operators listed are those whose kind begins with `kind`."""
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        trainer.train_step(step)
    wall = time.perf_counter() - started
    kinds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in profiler.key_averages():
        kinds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
        calls[kind_of(event.key)] += event.count
    # The profiler counts an operator of several threads once, by the clock, so that shares are of the wall time.
    lines = [f"profiled step {wall:.2f} s ({sum(calls.values()):,} operator calls)"]
    for name, seconds in sorted(kinds.items(), key=lambda item: -item[1]):
        lines.append(f"  {seconds:8.3f} s  {seconds / wall:6.1%}  {name} ({calls[name]:,} calls)")
    lines.append(f"  {wall - sum(kinds.values()):8.3f} s  {1 - sum(kinds.values()) / wall:6.1%}  outside of operators")
    lines.append(f"the {top} largest operators{f' of kind {kind}' if kind else ''} by input shapes:")
    by_shape = [
        event for event in profiler.key_averages(group_by_input_shape=True) if kind_of(event.key).startswith(kind)
    ]
    for event in sorted(by_shape, key=lambda event: -event.self_cpu_time_total)[:top]:
        shapes = ", ".join(str(list(shape)) for shape in event.input_shapes if shape)
        lines.append(
            f"  {event.self_cpu_time_total / 1e6:8.3f} s  {event.count:6,} x {event.key.removeprefix('aten::')} {shapes[:110]}"
        )
    return lines


def memory_table(trainer: Trainer, top: int) -> list[str]:
    """What the first micro-batch keeps for its backward pass, by the line that made it; parameters are not counted."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in trainer.model.parameters()}
    kept: dict[int, tuple[int, str, tuple[int, ...]]] = {}
    # Held until the end: a storage that is freed could give its address to another.
    storages: list[Any] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = (storage.nbytes(), _place(), tuple(tensor.shape))
            storages.append(storage)
        return tensor

    packs = microbatches(
        trainer.train_data,
        trainer.order.step(1)[1],
        tokens_per_microbatch=trainer.config.tokens_per_microbatch,
        shares_contexts=False,
    )
    packed, _ = next(packs)
    batch = packed.to(trainer.device)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        sums = trainer.model(batch, token_coefficients(batch, "token"))
    del sums
    total = sum(size for size, _, _ in kept.values())
    places: dict[str, list[int]] = defaultdict(list)
    for size, place, _ in kept.values():
        places[place].append(size)
    lines = [
        f"kept for the backward pass of a micro-batch of {batch.num_tokens:,} tokens: {total / 1e6:,.0f} MB, "
        f"{total / batch.num_tokens / 1e3:,.0f} kB a token"
    ]
    for place, sizes in sorted(places.items(), key=lambda item: -sum(item[1]))[:top]:
        lines.append(f"  {sum(sizes) / 1e6:9.1f} MB  {sum(sizes) / total:6.1%}  {len(sizes):4} tensors  {place}")
    return lines


def _place() -> str:
    """The innermost line outside of torch: `file:line code`."""
    for frame in reversed(traceback.extract_stack()[:-2]):
        if f"{Path(torch.__file__).parent}" not in frame.filename:
            return f"{Path(frame.filename).name}:{frame.lineno} {(frame.line or '')[:90]}"
    return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="gsm8k-135m", choices=WORKLOADS)
    parser.add_argument("--rows", type=int, help="rows to draw steps from; a step holds at most a batch of them")
    parser.add_argument("--tokens-per-microbatch", type=int)
    parser.add_argument("--top", type=int, default=15)
    parser.add_argument("--kind", default="", help="list operators of this kind only, such as element-wise")
    options = parser.parse_args()
    workload = WORKLOADS[options.workload]
    budget = options.tokens_per_microbatch or workload.tokens_per_microbatch
    with tempfile.TemporaryDirectory() as folder:
        prepare(options.workload, Path(folder), num_rows=options.rows or 2 * workload.batch_size)
        work = Work.read(Path(folder))
        trainer = build_trainer(work, budget, Path(folder) / "run")
        print(
            f"{options.workload}: {work.facts['parameters'] / 1e6:.1f} M parameters, torch {torch.__version__}, "
            f"{torch.get_num_threads()} threads, at most {budget} tokens a micro-batch"
        )
        last = len(work.steps())
        trainer.train_step(1)
        for step in range(1, last + 1):
            before = resource.getrusage(resource.RUSAGE_SELF)
            record, _ = trainer.train_step(step)
            used = resource.getrusage(resource.RUSAGE_SELF)
            print(
                f"step {step}: {record.seconds:.2f} s, {record.tokens:,} tokens ({record.gold_tokens:,} gold) in "
                f"{record.microbatches} micro-batches, {record.tokens_per_second:,.0f} tokens/s, "
                f"waited {1e3 * record.data_seconds:.1f} ms for data ({record.data_seconds / record.seconds:.2%}); processor "
                f"{used.ru_utime - before.ru_utime:.2f} s, system {used.ru_stime - before.ru_stime:.2f} s, "
                f"{used.ru_minflt - before.ru_minflt:,} page faults"
            )
        peak = peak_memory_bytes(trainer.device)
        states = 16 * work.facts["parameters"]
        print(
            f"peak resident memory {peak / 1e9:.2f} GB, of which weights, gradients and both moments {states / 1e9:.2f} GB"
        )
        print("\n".join(time_table(trainer, last, options.top, options.kind)))
        print("\n".join(memory_table(trainer, options.top)))


if __name__ == "__main__":
    main()
