"""How long the examples are: exact figures from counts of each length, and a picture of them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Bar", "Lengths", "bars_svg", "bars_text", "histogram", "summarise"]

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_MAX_BARS = 16


@dataclass(frozen=True, kw_only=True)
class Bar:
    """Examples of `low` to `high` tokens, both included."""

    low: int
    high: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Of one kind of tokens (all, context or gold) over the examples.

    Attributes:
        percentiles: percent -> tokens; the smallest length that so many examples do not exceed.
        bars: the histogram.
    """

    count: int
    total: int
    mean: float
    minimum: int
    maximum: int
    percentiles: Mapping[int, int]
    bars: tuple[Bar, ...]


def summarise(counts: Counter[int]) -> Lengths | None:
    """The figures of the examples counted by length; None for no examples.

    >>> found = summarise(Counter({1: 3, 10: 1}))
    >>> found.mean, found.percentiles[75], found.percentiles[95]
    (3.25, 1, 10)
    """
    count = counts.total()
    if not count:
        return None
    total = sum(length * number for length, number in counts.items())
    ordered = sorted(counts)
    reached = list(itertools.accumulate(counts[length] for length in ordered))
    percentiles = {}
    for percent in PERCENTILES:
        needed = -(-count * percent // 100)
        percentiles[percent] = next(length for length, sofar in zip(ordered, reached, strict=True) if sofar >= needed)
    return Lengths(
        count=count,
        total=total,
        mean=total / count,
        minimum=ordered[0],
        maximum=ordered[-1],
        percentiles=percentiles,
        bars=histogram(counts),
    )


def histogram(counts: Counter[int]) -> tuple[Bar, ...]:
    """At most 16 bars of one width, a round number; the last holds everything beyond the 99th percentile's bar.

    >>> [(bar.low, bar.high, bar.count) for bar in histogram(Counter({0: 1, 7: 2, 15: 4}))]
    [(0, 0, 1), (1, 1, 0), (2, 2, 0), (3, 3, 0), (4, 4, 0), (5, 5, 0), (6, 6, 0), (7, 7, 2), ..., (15, 15, 4)]
    """
    ordered = sorted(counts)
    needed, reached, high = -(-counts.total() * 99 // 100), 0, ordered[-1]
    for length in ordered:
        reached += counts[length]
        if reached >= needed:
            high = length
            break
    # A few very long examples must not press all others into one bar.
    if ordered[-1] <= 2 * high:
        high = ordered[-1]
    width = next(
        factor * 10**power for power in range(20) for factor in (1, 2, 5) if (high // (factor * 10**power)) < _MAX_BARS
    )
    sums: Counter[int] = Counter()
    for length, number in counts.items():
        sums[min(length, high) // width] += number
    first, last = min(sums), max(sums)
    bars = [Bar(low=i * width, high=(i + 1) * width - 1, count=sums[i]) for i in range(first, last + 1)]
    if ordered[-1] > bars[-1].high:
        bars[-1] = Bar(low=bars[-1].low, high=ordered[-1], count=bars[-1].count)
    return tuple(bars)


def bars_text(bars: tuple[Bar, ...], *, width: int = 40) -> list[str]:
    """The histogram as lines of text."""
    highest = max(bar.count for bar in bars)
    digits = len(f"{bars[-1].high:,}")
    lines = []
    for bar in bars:
        eighths = round(bar.count / highest * width * 8)
        drawn = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        if bar.count and not drawn:
            drawn = "▏"
        lines.append(f"{bar.low:>{digits},}-{bar.high:<{digits},} {drawn:<{width}} {bar.count:,}")
    return lines


def bars_svg(bars: tuple[Bar, ...], *, title: str) -> str:
    """The histogram as an SVG element. Nothing in it but numbers and `title`, which is the program's own."""
    highest = max(bar.count for bar in bars)
    step, height = 44, 120
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{title}" '
        f'viewBox="0 0 {len(bars) * step + 8} {height + 44}" width="{len(bars) * step + 8}">'
    ]
    for index, bar in enumerate(bars):
        size = bar.count / highest * height
        x = 4 + index * step
        parts.append(
            f'<rect x="{x + 2}" y="{18 + height - size:.1f}" width="{step - 4}" height="{size:.1f}">'
            f"<title>{bar.low:,} to {bar.high:,} tokens: {bar.count:,}</title></rect>"
            f'<text x="{x + step / 2}" y="{14 + height - size:.1f}">{bar.count:,}</text>'
            f'<text x="{x + step / 2}" y="{height + 34}">{bar.low:,}</text>'
        )
    return "".join(parts) + "</svg>"
