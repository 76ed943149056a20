"""Intervals by bootstrap, and edit distance. Pure functions; nothing random that is not seeded."""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "ExactSum",
    "Interval",
    "RowResampling",
    "bootstrap_interval",
    "bootstrap_ratio",
    "bootstrap_ratios",
    "edit_distance",
    "group_totals",
    "holm",
    "paired_bootstrap",
    "sign_flip_test",
    "sign_test",
]

# How many resampled indices are held at once: 2 million int64 are 16 MB.
_DRAWS_PER_CHUNK = 2_000_000
# More pairs than this are summed in as many blocks first, which bounds the time at about a second.
_MOST_BLOCKS = 20_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """An estimate with its bootstrap interval.

    Attributes:
        estimate: the figure on the data as they are.
        low, high: percentile bounds; NaN where there is only one independent value to resample.
        confidence: the nominal coverage, such as 0.95.
    """

    estimate: float
    low: float
    high: float
    confidence: float = 0.95

    @property
    def is_known(self) -> bool:
        """False where there was only one independent value, so that nothing can be said about its spread."""
        return not (math.isnan(self.low) or math.isnan(self.high))

    def scaled(self, factor: float) -> Interval:
        """The interval of `factor` times the figure; a negative factor swaps the bounds."""
        bounds = sorted((self.low * factor, self.high * factor)) if self.is_known else (math.nan, math.nan)
        return Interval(estimate=self.estimate * factor, low=bounds[0], high=bounds[1], confidence=self.confidence)

    def to_json(self) -> dict[str, float | None]:
        """A mapping that JSON can hold: an unknown bound is null."""
        return {
            "estimate": self.estimate,
            "low": self.low if self.is_known else None,
            "high": self.high if self.is_known else None,
            "confidence": self.confidence,
        }


def bootstrap_ratio(
    numerators: npt.ArrayLike,
    denominators: npt.ArrayLike,
    *,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """sum(numerators) / sum(denominators), with a percentile bootstrap interval over the pairs.

    A corpus figure such as nll per token is one division of two sums, never a mean of means; a resample draws whole
    examples, so that numerator and denominator stay together. Above 20,000 pairs, blocks of pairs drawn at random are
    resampled in their place: sums of independent pairs are independent too, and the spread comes out the same.

    Args:
        numerators: [E], finite.
        denominators: [E], finite, >= 0, with a sum > 0.
        confidence: coverage of the interval, between 0 and 1.
        num_resamples: how many times the E pairs are drawn anew, with replacement.
        seed: the same seed gives the same interval.

    Returns:
        The interval; its bounds are NaN where E is 1.

    Raises:
        ValueError: nothing to average, different lengths, a value that is not finite, or denominators that sum to 0.

    >>> bootstrap_ratio([1.0, 3.0], [1.0, 1.0]).estimate
    2.0
    """
    tops = np.asarray(numerators, dtype=np.float64)
    bottoms = np.asarray(denominators, dtype=np.float64)
    if tops.ndim != 1 or tops.shape != bottoms.shape:
        raise ValueError(
            f"numerators and denominators must be vectors of one length, not {tops.shape}, {bottoms.shape}"
        )
    if tops.size == 0:
        raise ValueError("no values: a mean of nothing is not defined")
    if not (np.isfinite(tops).all() and np.isfinite(bottoms).all()):
        raise ValueError("a value is not finite")
    if (bottoms < 0).any() or bottoms.sum() <= 0:
        raise ValueError("the denominators must be >= 0 and sum to more than 0")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, not {num_resamples}")
    estimate = float(tops.sum() / bottoms.sum())
    if tops.size == 1:
        return Interval(estimate=estimate, low=math.nan, high=math.nan, confidence=confidence)

    generator = np.random.default_rng(seed)
    if tops.size > _MOST_BLOCKS:
        blocks = generator.permutation(np.arange(tops.size) % _MOST_BLOCKS)
        tops, bottoms = group_totals(blocks, tops), group_totals(blocks, bottoms)
    constant_bottoms = bool((bottoms == bottoms[0]).all())
    ratios: list[npt.NDArray[np.float64]] = []
    for first in range(0, num_resamples, max(1, _DRAWS_PER_CHUNK // tops.size)):
        num_rows = min(max(1, _DRAWS_PER_CHUNK // tops.size), num_resamples - first)
        drawn = generator.integers(tops.size, size=(num_rows, tops.size))
        top = tops[drawn].sum(axis=1)
        bottom = bottoms[0] * tops.size if constant_bottoms else bottoms[drawn].sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios.append(top / bottom)
    values = np.concatenate(ratios)
    # A resample whose denominators are all 0 has no ratio; it is left out rather than counted as 0.
    values = values[np.isfinite(values)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(estimate=estimate, low=float(low), high=float(high), confidence=confidence)


def bootstrap_ratios(
    numerators: npt.NDArray[np.float64],
    denominators: npt.NDArray[np.float64],
    *,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> list[Interval]:
    """`bootstrap_ratio` of several figures of the same E examples at once; every figure sees the same resamples.

    The draws are counted once, and all sums of all resamples are one matrix product. A figure that one example only has
    a part in (all other denominators are 0) has no interval. Drawn like `bootstrap_ratio`, so that a figure's interval is
    the same here and there.

    Args:
        numerators, denominators: [E, M], a column a figure; else as in `bootstrap_ratio`.
        confidence, num_resamples, seed: as in `bootstrap_ratio`.

    Raises:
        ValueError: no examples, other shapes, a value that is not finite, or a column whose denominators sum to 0.

    >>> tops, bottoms = np.array([[1.0, 0.0], [3.0, 1.0]]), np.array([[1.0, 1.0], [1.0, 1.0]])
    >>> [interval.estimate for interval in bootstrap_ratios(tops, bottoms)]
    [2.0, 0.5]
    """
    if numerators.ndim != 2 or numerators.shape != denominators.shape or numerators.shape[0] == 0:
        raise ValueError(f"two matrices of one shape are wanted, not {numerators.shape} and {denominators.shape}")
    if not (np.isfinite(numerators).all() and np.isfinite(denominators).all()):
        raise ValueError("a value is not finite")
    if (denominators < 0).any() or (denominators.sum(axis=0) <= 0).any():
        raise ValueError("the denominators must be >= 0 and sum to more than 0")
    resampling = RowResampling(numerators.shape[0], seed=seed)
    return resampling.intervals(
        resampling.sums(numerators),
        resampling.sums(denominators),
        estimates=numerators.sum(axis=0) / denominators.sum(axis=0),
        is_spread=np.count_nonzero(denominators, axis=0) > 1,
        confidence=confidence,
        num_resamples=num_resamples,
    )


class RowResampling:
    """The resamples of `bootstrap_ratios`, for rows that come one after another and are not kept: their sums are.

    Attributes:
        num_places: how many sums there are of a figure: one a row, or one a block of rows where there are more than 20,000.
    """

    def __init__(self, num_rows: int, *, seed: int = 0) -> None:
        self._generator = np.random.default_rng(seed)
        self.num_places = min(num_rows, _MOST_BLOCKS)
        # int16 [R] or None: two bytes a row; how rows are drawn does not depend on the type.
        self._blocks: npt.NDArray[np.int16] | None = None
        if num_rows > _MOST_BLOCKS:
            self._blocks = self._generator.permutation(np.resize(np.arange(_MOST_BLOCKS, dtype=np.int16), num_rows))

    def place(self, row: int) -> int:
        """Which sum a row belongs to."""
        return row if self._blocks is None else int(self._blocks[row])

    def sums(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Of rows [R, M]: [num_places, M]."""
        if self._blocks is None:
            return values
        return np.stack([np.bincount(self._blocks, weights=column) for column in values.T], axis=1).astype(np.float64)

    def intervals(
        self,
        numerators: npt.NDArray[np.float64],
        denominators: npt.NDArray[np.float64],
        *,
        estimates: npt.NDArray[np.float64],
        is_spread: npt.NDArray[np.bool_],
        confidence: float = 0.95,
        num_resamples: int = 2000,
    ) -> list[Interval]:
        """An interval a figure.

        Args:
            numerators, denominators: [num_places, M], a column a figure.
            estimates: [M].
            is_spread: [M], whether more than one row has a part in it; what one row has alone has no interval.
        """
        generator = copy.deepcopy(self._generator)
        size, num_figures = numerators.shape
        columns = np.concatenate([numerators, denominators], axis=1)
        ratios = np.empty((num_resamples, num_figures))
        rows_at_once = max(1, _DRAWS_PER_CHUNK // size)
        for first in range(0, num_resamples, rows_at_once):
            num_rows = min(rows_at_once, num_resamples - first)
            drawn = generator.integers(size, size=(num_rows, size)) + np.arange(num_rows)[:, None] * size
            counts = np.bincount(drawn.ravel(), minlength=num_rows * size).reshape(num_rows, size).astype(np.float64)
            totals = counts @ columns
            with np.errstate(divide="ignore", invalid="ignore"):
                ratios[first : first + num_rows] = totals[:, :num_figures] / totals[:, num_figures:]
        tail = (1 - confidence) / 2
        intervals = []
        for figure in range(num_figures):
            low = high = math.nan
            values = ratios[:, figure]
            # A resample whose denominators are all 0 has no ratio; it is left out rather than counted as 0.
            values = values[np.isfinite(values)]
            if is_spread[figure] and values.size:
                low, high = np.quantile(values, [tail, 1 - tail])
            intervals.append(
                Interval(estimate=float(estimates[figure]), low=float(low), high=float(high), confidence=confidence)
            )
        return intervals


class ExactSum:
    """A sum of floats of any number, rounded once, at its end: that of `math.fsum`, without holding the terms.

    >>> total = ExactSum()
    >>> for term in (1e100, 1.0, -1e100):
    ...     total.add(term)
    >>> total.value
    1.0
    """

    __slots__ = ("_units",)

    def __init__(self) -> None:
        self._units = 0

    def add(self, term: float) -> None:
        """
        Raises:
            ValueError, OverflowError: the term is not finite.
        """
        # In units of 2^-1127 every float is a whole number: the smallest is 2^-1074, and a mantissa has 53 bits.
        mantissa, exponent = math.frexp(term)
        self._units += int(mantissa * 2**53) << (exponent + 1074)

    @property
    def value(self) -> float:
        return self._units / (1 << 1127)


def bootstrap_interval(
    values: npt.ArrayLike, *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> Interval:
    """The mean of `values` [E] with a percentile bootstrap interval; arguments and errors as in `bootstrap_ratio`."""
    vector = np.asarray(values, dtype=np.float64)
    return bootstrap_ratio(vector, np.ones_like(vector), confidence=confidence, num_resamples=num_resamples, seed=seed)


def paired_bootstrap(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    *,
    groups: npt.ArrayLike | None = None,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean of `a - b` over E pairs, resampling pairs: what is hard for both cancels.

    Args:
        a, b: [E], finite; `a[i]` and `b[i]` belong to the same example.
        groups: [E] labels; examples of one group (the turns of one conversation) are drawn together, because they are
            not independent. None: each example is a group by itself.
        confidence, num_resamples, seed: as in `bootstrap_ratio`.

    Raises:
        ValueError: as `bootstrap_ratio`.

    >>> paired_bootstrap([3.0, 5.0], [1.0, 2.0]).estimate
    2.5
    """
    first = np.asarray(a, dtype=np.float64)
    second = np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"a and b must be pairs, not {first.shape} against {second.shape}")
    differences = first - second
    counts = np.ones_like(differences)
    if groups is not None:
        differences, counts = group_totals(groups, differences), group_totals(groups, counts)
    return bootstrap_ratio(differences, counts, confidence=confidence, num_resamples=num_resamples, seed=seed)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of so many wins and losses if each were a fair coin's; ties are left out before.

    Exact: twice the binomial tail, at most 1. 1.0 where there is neither a win nor a loss.

    >>> round(sign_test(9, 1), 6)
    0.021484
    >>> sign_test(0, 0)
    1.0
    """
    if wins < 0 or losses < 0:
        raise ValueError(f"wins and losses must not be negative: {wins}, {losses}")
    total, fewer = wins + losses, min(wins, losses)
    steps = np.arange(fewer, dtype=np.float64)
    # log of the binomial coefficients 0..fewer, each from the one before.
    log_terms = np.concatenate([[0.0], np.cumsum(np.log(total - steps) - np.log(steps + 1))])
    largest = float(log_terms.max())
    log_tail = largest + math.log(float(np.exp(log_terms - largest).sum())) - total * math.log(2)
    return min(1.0, 2.0 * math.exp(log_tail))


def sign_flip_test(differences: npt.ArrayLike, *, num_resamples: int = 9999, seed: int = 0) -> float:
    """Two-sided p-value of the sum of paired differences, if each were as likely to have the other sign.

    A permutation test (Fisher): signs are drawn at random, and the p-value is the share of draws, the data's own among
    them, whose sum is as far from 0. It is never below 1 / (num_resamples + 1). Above 20,000 differences, blocks of them
    drawn at random take their place.

    Args:
        differences: [E], finite; where several belong together (the parts of a row), their totals.

    Raises:
        ValueError: nothing to test, or a value that is not finite.

    >>> sign_flip_test([1.0, 1.0, 1.0, -1.0]) > 0.5
    True
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"a vector of differences is wanted, not one of shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("a value is not finite")
    generator = np.random.default_rng(seed)
    if values.size > _MOST_BLOCKS:
        values = group_totals(generator.permutation(np.arange(values.size) % _MOST_BLOCKS), values)
    # A sum that is equal but for the order of its terms counts as equal.
    least = abs(float(values.sum())) - 1e-12 * float(np.abs(values).sum())
    as_far, rows_at_once = 1, max(1, _DRAWS_PER_CHUNK // values.size)
    for first in range(0, num_resamples, rows_at_once):
        num_rows = min(rows_at_once, num_resamples - first)
        signs = generator.integers(2, size=(num_rows, values.size), dtype=np.int8) * 2.0 - 1.0
        as_far += int(np.count_nonzero(np.abs(signs @ values) >= least))
    return as_far / (num_resamples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (1979): p-values of several tests such that the chance of any false one keeps its level.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, running = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = running
    return corrected


def group_totals(groups: npt.ArrayLike, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The sum of `values` [E] within each group of `groups` [E]: [G], in the order in which the labels sort."""
    labels = np.asarray(groups)
    vector = np.asarray(values, dtype=np.float64)
    if labels.shape != vector.shape:
        raise ValueError(f"groups and values must have one length, not {labels.shape} and {vector.shape}")
    _, inverse = np.unique(labels, return_inverse=True)
    totals: npt.NDArray[np.float64] = np.bincount(inverse, weights=vector).astype(np.float64)
    return totals


def edit_distance(a: Sequence[Hashable] | npt.NDArray[Any], b: Sequence[Hashable] | npt.NDArray[Any]) -> int:
    """The fewest insertions, deletions and substitutions of single items that turn `a` into `b`.

    The items may be anything hashable: characters of two strings, words, token ids.

    Myers' bit-parallel algorithm (J. ACM 46(3), 1999, in the form of Hyyrö, 2003): one column of the dynamic program is
    held as the bits of two integers, a bit for each item of the shorter sequence, so that a column costs a dozen
    operations on whole integers.

    >>> edit_distance("kitten", "sitting")
    3
    >>> edit_distance("HH AH L OW".split(), "HH EH L OW".split())
    1
    >>> edit_distance([], [7, 7])
    2
    """
    pattern, text = list(a), list(b)
    if len(pattern) > len(text):
        pattern, text = text, pattern
    # What is equal at both ends costs nothing.
    start = 0
    while start < len(pattern) and pattern[start] == text[start]:
        start += 1
    end = 0
    while end < len(pattern) - start and pattern[-1 - end] == text[-1 - end]:
        end += 1
    pattern, text = pattern[start : len(pattern) - end], text[start : len(text) - end]
    if not pattern:
        return len(text)

    positions: dict[Hashable, int] = {}
    for index, item in enumerate(pattern):
        positions[item] = positions.get(item, 0) | (1 << index)
    full = (1 << len(pattern)) - 1
    last = 1 << (len(pattern) - 1)
    vertical_up, vertical_down = full, 0  # where a step down the column raises or lowers the distance by one
    distance = len(pattern)
    for item in text:
        match = positions.get(item, 0)
        diagonal_zero = (((match & vertical_up) + vertical_up) ^ vertical_up) | match | vertical_down
        horizontal_up = vertical_down | (full & ~(diagonal_zero | vertical_up))
        horizontal_down = vertical_up & diagonal_zero
        if horizontal_up & last:
            distance += 1
        elif horizontal_down & last:
            distance -= 1
        # The row above the pattern is 0, 1, 2, ...: its steps are all +1, which is the bit shifted in.
        horizontal_up = ((horizontal_up << 1) | 1) & full
        horizontal_down = (horizontal_down << 1) & full
        vertical_up = horizontal_down | (full & ~(diagonal_zero | horizontal_up))
        vertical_down = horizontal_up & diagonal_zero
    return distance
