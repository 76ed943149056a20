"""What a group costs in packed attention: the measurement behind CALL_COST and TOKEN_COST of `models/layout.py`.

    .venv/bin/python benchmarks/attention_groups.py [--repeats 15] [--json FILE]

Packs of many kinds go forward and backward through `packed_attention`, cut into groups in several ways each. The times
are then explained, by least squares of relative errors, as

    time = per pack + per group * groups + per pair * padded pairs + per token * gathered tokens + per token * tokens

Per group over per pair is CALL_COST, per gathered token over per pair TOKEN_COST. The last part is the same for every cut
of a pack and chooses nothing. Then the cut that `group_segments` chooses is timed beside one group for all, a
group a length, and a group a segment, on packs like those of the workloads.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from workloads import token_rows

from goldsmith.models import attention_cpu
from goldsmith.models import layout as layouts
from goldsmith.models.attention import packed_attention
from goldsmith.models.layout import PackLayout, group_segments, pack_layout

# Query heads, key heads, width of a head.
HEADS = {"the demo's model": (4, 4, 32), "SmolLM2-135M": (9, 3, 64)}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One pack, cut one way: what the model of the cost knows of it, and seconds forward and backward."""

    groups: int
    pairs: float
    gathered: int
    tokens: int
    seconds: float


def layout_of(lengths: Sequence[int], sizes: Sequence[int]) -> PackLayout:
    """The layout of a pack that is cut into groups of these sizes, longest segments first."""
    with mock.patch.object(layouts, "group_segments", return_value=list(sizes)):
        layout = PackLayout.plan(lengths)
        assert len(layout.groups) == len(sizes)
    return layout


def cuts(lengths: Sequence[int]) -> dict[str, list[int]]:
    """Ways to cut a pack into groups."""
    ordered = sorted(lengths, reverse=True)
    by_length = [ordered.count(length) for length in sorted(set(ordered), reverse=True)]
    half = len(ordered) // 2
    return {
        "as chosen": group_segments(ordered),
        "one for all": [len(ordered)],
        "two halves": [half, len(ordered) - half] if half else [len(ordered)],
        "one a length": by_length,
        "one a segment": [1] * len(ordered),
    }


def seconds(layout: PackLayout, heads: tuple[int, int, int], repeats: int) -> float:
    """Forward and backward of one layer's attention, the median."""
    num_heads, num_key_heads, width = heads
    shapes = ((num_heads, width), (num_key_heads, width), (num_key_heads, width))
    # As they come out of a projection: [N, heads, width], seen as [1, heads, N, width].
    query, key, value = (
        torch.randn(1, layout.num_tokens, *shape).transpose(1, 2).requires_grad_(True) for shape in shapes
    )
    gradient = torch.randn(1, layout.num_tokens, num_heads, width)
    module: Any = SimpleNamespace(is_causal=True)
    times = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        with pack_layout(layout):
            output, _ = packed_attention(module, query, key, value, None)
        torch.autograd.grad(output, (query, key, value), gradient)
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def sample(lengths: Sequence[int], sizes: Sequence[int], heads: tuple[int, int, int], repeats: int) -> Sample:
    layout = layout_of(lengths, sizes)
    return Sample(
        groups=len(layout.groups),
        pairs=sum(group.num_segments * group.length**2 / 2 for group in layout.groups),
        gathered=sum(group.num_segments * group.length for group in layout.groups if group.start < 0),
        tokens=layout.num_tokens,
        seconds=seconds(layout, heads, repeats),
    )


def fit(samples: Sequence[Sample]) -> dict[str, float]:
    """Nanoseconds per pack, group, pair, gathered token and token; coefficients below zero are left out."""
    names = ["pack", "group", "pair", "gathered token", "token"]
    columns = np.array([[1.0, s.groups, s.pairs, s.gathered, s.tokens] for s in samples])
    times = np.array([s.seconds for s in samples])
    weighted, ones = columns / times[:, None], np.ones(len(times))
    chosen = list(range(len(names)))
    while True:
        solution = np.linalg.lstsq(weighted[:, chosen], ones, rcond=None)[0]
        if (solution >= 0).all():
            break
        chosen.pop(int(np.argmin(solution)))
    costs = dict.fromkeys(names, 0.0)
    for column, cost in zip(chosen, solution, strict=True):
        costs[names[column]] = float(cost * 1e9)
    errors = np.abs(weighted[:, chosen] @ solution - 1.0)
    return {**costs, "median relative error": float(np.median(errors))}


def short_segments(heads: tuple[int, int, int], repeats: int) -> dict[int, float]:
    """Time of plain products over that of the flash kernel, for one group of segments of each length."""
    ratios = {}
    for length in (8, 16, 24, 32, 48, 64, 128, 256):
        layout = layout_of([length] * (2048 // length), [2048 // length])
        times = []
        for limit in (length, length - 1):
            with mock.patch.object(attention_cpu, "SHORT_LENGTH", limit):
                times.append(seconds(layout, heads, repeats))
        ratios[length] = times[0] / times[1]
    return ratios


def packs() -> list[list[int]]:
    """Lengths of segments: even ones of many sizes, and mixed ones."""
    draw = random.Random(0)
    even = [
        [length] * count for length in (8, 16, 32, 64, 128, 256) for count in (1, 2, 4, 16) if length * count <= 2048
    ]
    words = [[max(4, round(draw.gauss(16, 4))) for _ in range(count)] for count in (16, 64, 128)]
    rows = [[max(20, round(draw.gauss(200, 70))) for _ in range(count)] for count in (2, 4, 8)]
    return [*even, *words, *rows]


def typical_packs() -> dict[str, list[int]]:
    """Packs as steps of the workloads have them."""
    typical = {}
    for source, count in (("pronunciations", 128), ("gsm8k", 8), ("legal", 8)):
        rows, _ = token_rows(source, count, 49_152)
        typical[f"{count} rows of {source}"] = [len(row.context) + len(row.gold) for row in rows]
    return typical


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; in use: CALL_COST {layouts.CALL_COST:.0f}, "
          f"TOKEN_COST {layouts.TOKEN_COST:.0f} pairs\n")  # fmt: skip
    figures: dict[str, Any] = {}
    for name, heads in HEADS.items():
        samples = []
        for lengths in packs():
            done: list[list[int]] = []
            for sizes in cuts(lengths).values():
                if sizes not in done:
                    done.append(sizes)
                    samples.append(sample(lengths, sizes, heads, options.repeats))
        costs = fit(samples)
        print(f"{name}: {heads[0]} query heads, {heads[1]} key heads of width {heads[2]}; {len(samples)} samples")
        print("  " + ", ".join(f"{cost:,.1f} ns a {part}" for part, cost in costs.items() if "error" not in part))
        print(f"  median relative error {costs['median relative error']:.0%}")
        if costs["pair"] > 0:
            print(f"  CALL_COST {costs['group'] / costs['pair']:,.0f} pairs, "
                  f"TOKEN_COST {costs['gathered token'] / costs['pair']:,.1f} pairs")  # fmt: skip
        comparison = {}
        for pack, lengths in typical_packs().items():
            timed = {cut: sample(lengths, sizes, heads, options.repeats) for cut, sizes in cuts(lengths).items()}
            comparison[pack] = {cut: [one.groups, one.seconds] for cut, one in timed.items()}
            print(f"  {pack}: " + ", ".join(
                f"{cut} ({one.groups}) {one.seconds * 1e3:.2f} ms" for cut, one in timed.items()))  # fmt: skip
        short = short_segments(heads, options.repeats)
        print("  plain products over the flash kernel, in time: " + ", ".join(
            f"{ratio:.2f} at {length} tokens" for length, ratio in short.items()))  # fmt: skip
        figures[name] = {"costs": costs, "cuts": comparison, "plain products over flash": short}
        print()
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
