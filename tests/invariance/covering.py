"""Covering arrays: few cases in which every pair of values of every two factors meets. Own code of forty lines; seeded.

A fault of a cut shows where two things meet (a window and a chunk, a frozen layer and a shared context); every pair is
tried in some dozens of cases, where the product of all factors has tens of thousands.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

__all__ = ["covering_array", "full_product"]

Factors = Mapping[str, Sequence[Any]]
Pair = tuple[str, int, str, int]  # a factor and the place of its value, twice


def covering_array(factors: Factors, *, seed: int = 0, candidates: int = 12) -> list[dict[str, Any]]:
    """Cases, each a value for every factor, that between them hold every pair of values; the same ones for the same seed.

    Greedy: a case begins with a pair that is still missing, and each further factor takes the value that brings the most
    missing pairs; of some such cases, drawn in different orders of the factors, the best is kept.

    >>> cases = covering_array({"a": [1, 2], "b": "xy", "c": [True, False]})
    >>> len(cases) < 8, {(case["a"], case["c"]) for case in cases} == {(1, True), (1, False), (2, True), (2, False)}
    (True, True)
    """
    generator = random.Random(seed)
    missing: set[Pair] = {
        (first, i, second, j)
        for first, second in combinations(factors, 2)
        for i, j in product(range(len(factors[first])), range(len(factors[second])))
    }
    places = {name: place for place, name in enumerate(factors)}

    def gained(chosen: Mapping[str, int], name: str, value: int) -> int:
        pairs = (
            (other, number, name, value) if places[other] < places[name] else (name, value, other, number)
            for other, number in chosen.items()
        )
        return sum(pair in missing for pair in pairs)

    cases = []
    while missing:
        best: tuple[int, dict[str, int]] = (0, {})
        for _ in range(candidates):
            first, i, second, j = generator.choice(sorted(missing))
            chosen = {first: i, second: j}
            total = 1
            for name in generator.sample(list(factors), len(factors)):
                if name not in chosen:
                    gains = [gained(chosen, name, value) for value in range(len(factors[name]))]
                    value = generator.choice([v for v, gain in enumerate(gains) if gain == max(gains)])
                    total += gains[value]
                    chosen[name] = value
            best = max(best, (total, chosen), key=lambda scored: scored[0])
        chosen = best[1]
        missing -= {(a, chosen[a], b, chosen[b]) for a, b in combinations(factors, 2)}
        cases.append({name: factors[name][chosen[name]] for name in factors})
    return cases


def full_product(factors: Factors) -> list[dict[str, Any]]:
    """Every case there is, the last factor changing fastest."""
    return [dict(zip(factors, values, strict=True)) for values in product(*factors.values())]
