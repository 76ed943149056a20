"""Does a model's probability mean what it says? Reliability of its likeliest token on the gold, in bins.

At each gold position the model has a likeliest token, with a probability c (its confidence), and that token is the gold one or
it is not. Of a calibrated model, of all positions with confidence c a share c is right. Positions are put into bins of equal
width of c; bin b has n_b positions, mean confidence conf_b and a share acc_b that is right:

    ECE = sum_b n_b / N * |acc_b - conf_b|          (Guo et al. 2017, "On Calibration of Modern Neural Networks", eq. 3)

The gold's own probability has no such diagram: the gold token is the right one at every position. What holds of it is a mean. If
the gold were drawn from the model, -log p of the gold would be the entropy of the model's distribution on average; nll above
entropy is confidence that the gold does not bear out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from goldsmith.types import TokenScores

__all__ = ["Calibration", "calibration"]

NUM_BINS = 10


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Counts over gold tokens. Where a figure's fields are missing in the scores it is None or its counts are 0.

    Attributes:
        gold_histogram: gold tokens by their own probability, in `NUM_BINS` bins of equal width.
        num_tokens: gold tokens that say both their rank and the best log-probability; the next three are of these.
        counts, confidences, accuracies: per bin of confidence; mean confidence and share right, None in an empty bin.
        expected_calibration_error: between 0 and 1.
        confidence, accuracy: means over all; their difference is the overconfidence.
        entropy, entropy_nll: mean entropy of the model where it is known, and mean nll of the same gold tokens, nats.
    """

    gold_histogram: tuple[int, ...]
    num_tokens: int
    counts: tuple[int, ...]
    confidences: tuple[float | None, ...]
    accuracies: tuple[float | None, ...]
    expected_calibration_error: float | None
    confidence: float | None
    accuracy: float | None
    entropy: float | None
    entropy_nll: float | None

    def to_json(self) -> dict[str, Any]:
        """For the page."""
        return asdict(self)


def calibration(scores: Iterable[TokenScores]) -> Calibration:
    """The counts over every gold token of `scores`; each token counts once, whatever its weight."""
    gold: list[float] = []
    best: list[float] = []
    is_right: list[bool] = []
    entropies: list[float] = []
    entropy_log_probs: list[float] = []
    for score in scores:
        for token in score.tokens or ():
            gold.append(token.log_prob)
            if token.best_log_prob is not None and token.rank is not None:
                best.append(token.best_log_prob)
                is_right.append(token.rank == 1)
            if token.entropy is not None:
                entropies.append(token.entropy)
                entropy_log_probs.append(token.log_prob)

    confidence = np.exp(np.array(best, dtype=np.float64))
    right = np.array(is_right, dtype=np.float64)
    bins = _bins(confidence)
    counts = np.bincount(bins, minlength=NUM_BINS)
    confidence_sums = np.bincount(bins, weights=confidence, minlength=NUM_BINS).astype(np.float64)
    right_sums = np.bincount(bins, weights=right, minlength=NUM_BINS).astype(np.float64)
    gaps = np.abs(right_sums - confidence_sums)  # n_b * |acc_b - conf_b|
    return Calibration(
        gold_histogram=tuple(np.bincount(_bins(np.exp(np.array(gold))), minlength=NUM_BINS).tolist()),
        num_tokens=len(best),
        counts=tuple(counts.tolist()),
        confidences=_ratios(confidence_sums, counts),
        accuracies=_ratios(right_sums, counts),
        expected_calibration_error=float(gaps.sum() / len(best)) if best else None,
        confidence=float(confidence.mean()) if best else None,
        accuracy=float(right.mean()) if best else None,
        entropy=math.fsum(entropies) / len(entropies) if entropies else None,
        entropy_nll=-math.fsum(entropy_log_probs) / len(entropy_log_probs) if entropy_log_probs else None,
    )


def _bins(probabilities: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The bin of each: [0, 0.1), [0.1, 0.2), ... [0.9, 1]."""
    bins: npt.NDArray[np.int64] = np.clip((probabilities * NUM_BINS).astype(np.int64), 0, NUM_BINS - 1)
    return bins


def _ratios(tops: npt.NDArray[np.float64], bottoms: npt.NDArray[np.int64]) -> tuple[float | None, ...]:
    return tuple(top / bottom if bottom else None for top, bottom in zip(tops.tolist(), bottoms.tolist(), strict=True))
