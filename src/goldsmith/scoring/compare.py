"""Two models on the same gold, paired: which gives it the higher likelihood, by how much, and where."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from goldsmith.errors import ConfigError, DataError
from goldsmith.scoring.compare_text import render_comparison, row_lines
from goldsmith.scoring.display import data_frame, html_table
from goldsmith.scoring.files import row_of
from goldsmith.scoring.pairing import PairedExample, PairedToken, Pairing, TokenKind, bare, numbers_of, pair_up
from goldsmith.scoring.tally import position_bins
from goldsmith.statistics import Interval, bootstrap_ratios, group_totals, paired_bootstrap, sign_test
from goldsmith.types import TokenScore, TokenScores

__all__ = [
    "TIE_TOLERANCE",
    "Comparison",
    "PairedExample",
    "PairedGroup",
    "PairedToken",
    "TokenKind",
    "by_example_id",
    "compare_pair",
    "scores_from_probabilities",
]

# Two scores of one model, computed in another batching, differ by rounding; this near, in nats, is a tie.
TIE_TOLERANCE = 1e-4

_BREAKDOWNS = ("source", "role", "position")


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedGroup:
    """The difference in one source, of one role's gold, or at some positions of the gold.

    Attributes:
        by: `source`, `role` or `position`.
        num_examples: of the source; or that have gold there.
        difference: nats per example. Of a source: over its examples. Of a role, and of positions: what their tokens add to the
            mean difference of all examples, so that all roles, and all positions, sum to it.
        wins, losses: examples on which the first, and the second, gives the gold (there) the higher likelihood.
    """

    by: str
    label: str
    num_examples: int
    difference: Interval
    wins: int
    losses: int

    def to_json(self) -> dict[str, object]:
        return {
            "by": self.by,
            "label": self.label,
            "num_examples": self.num_examples,
            "difference": self.difference.to_json(),
            "wins": self.wins,
            "losses": self.losses,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two models on the examples that both have scored. `print` it for the whole story.

    Attributes:
        names: what the two are called.
        pairs: the shared examples, in the order of the first.
        num_only_a, num_only_b: examples that only one of them has, which are left out.
        mean_difference: log P under the first minus log P under the second, nats an example, with a paired bootstrap
            interval over examples (the parts of one row are drawn together).
        tie_tolerance: a difference of at most this many nats is a tie.
        num_resamples, seed: of the intervals.
        num_rows: rows that the examples come from; the parts of one are not independent.
        sign_p: the sign test's two-sided p-value: rows that the first wins against rows that the second wins.
        groups: by source where there are several, by role where several have gold, and by position; the latter two where both
            list the same gold tokens.
        tokens: every gold token of the only example, where there is but one and both list the same tokens.
        differing_tokens, differing_kinds: the gold tokens that differ most, and the kinds of them that do in sum, where both list
            the same tokens; largest first, at most `KEPT_TOKENS` of each.
        notes: what was done to the rows before they were scored, a line each; see `compare_models`.
        rejected: of each model that was scored here the rows that were skipped, by reason.
    """

    names: tuple[str, str]
    pairs: tuple[PairedExample, ...]
    num_only_a: int
    num_only_b: int
    mean_difference: Interval
    tie_tolerance: float
    num_resamples: int
    seed: int
    num_rows: int
    sign_p: float
    groups: tuple[PairedGroup, ...] = ()
    tokens: tuple[PairedToken, ...] = ()
    differing_tokens: tuple[PairedToken, ...] = ()
    differing_kinds: tuple[TokenKind, ...] = ()
    notes: tuple[str, ...] = ()
    rejected: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def num_shared(self) -> int:
        return len(self.pairs)

    @property
    def log_probs(self) -> tuple[float, float]:
        """Total log P of the shared gold under each, in nats."""
        return (math.fsum(pair.a.log_prob for pair in self.pairs), math.fsum(pair.b.log_prob for pair in self.pairs))

    @property
    def probabilities(self) -> tuple[float, float]:
        """P of all the shared gold under each, exp of `log_probs`; 0.0 where it is below the smallest float."""
        a, b = self.log_probs
        return math.exp(a), math.exp(b)

    @property
    def num_target_tokens(self) -> tuple[int, int] | None:
        """Gold tokens of each; None unless all are known."""
        counts = [(pair.a.num_target_tokens, pair.b.num_target_tokens) for pair in self.pairs]
        if not all(a and b for a, b in counts):
            return None
        return sum(a for a, _ in counts), sum(b for _, b in counts)

    @property
    def mean_nll(self) -> tuple[float, float] | None:
        """nll per gold token of each, one division each; None unless all token counts are known and the tokens are the same.

        Where the two cut the gold into other tokens, a mean per token compares nothing.
        """
        counts = self.num_target_tokens
        if counts is None or self.num_differently_tokenized:
            return None
        a, b = self.log_probs
        return -a / counts[0], -b / counts[1]

    @property
    def bits_per_byte(self) -> tuple[float, float] | None:
        """The measure that does not depend on the tokenizer; None unless all byte counts are known."""
        num_bytes = sum(pair.a.num_bytes for pair in self.pairs), sum(pair.b.num_bytes for pair in self.pairs)
        if not all(pair.a.num_bytes and pair.b.num_bytes for pair in self.pairs):
            return None
        a, b = self.log_probs
        return -a / math.log(2) / num_bytes[0], -b / math.log(2) / num_bytes[1]

    @property
    def num_differently_tokenized(self) -> int:
        """Shared examples whose gold the two are known to cut into other tokens: by their number, or by their texts."""
        return sum(pair.is_differently_tokenized for pair in self.pairs)

    @property
    def num_other_contexts(self) -> int:
        """Shared examples whose gold the two are known to have scored after other contexts."""
        return sum(not pair.has_same_context for pair in self.pairs)

    @property
    def higher(self) -> str | None:
        """The name of the one that gives the shared gold the higher likelihood; None for a tie."""
        if abs(self.mean_difference.estimate) <= self.tie_tolerance:
            return None
        return self.names[0] if self.mean_difference.estimate > 0 else self.names[1]

    @property
    def is_clear(self) -> bool | None:
        """Whether the interval of the mean difference leaves out 0; None where one example gives no interval."""
        interval = self.mean_difference
        return interval.low > 0 or interval.high < 0 if interval.is_known else None

    @property
    def wins(self) -> int:
        """Examples on which the first has the higher likelihood."""
        return sum(pair.difference > self.tie_tolerance for pair in self.pairs)

    @property
    def losses(self) -> int:
        """Examples on which the second has the higher likelihood."""
        return sum(pair.difference < -self.tie_tolerance for pair in self.pairs)

    @property
    def ties(self) -> int:
        return self.num_shared - self.wins - self.losses

    @property
    def num_starts_known(self) -> int:
        """Examples whose first gold token is known, and the same, under both."""
        return sum(pair.start_difference is not None for pair in self.pairs)

    @property
    def starts(self) -> tuple[int, int]:
        """On how many examples the first, and the second, gives the first gold token the higher probability."""
        known = [pair.start_difference for pair in self.pairs if pair.start_difference is not None]
        return sum(d > self.tie_tolerance for d in known), sum(d < -self.tie_tolerance for d in known)

    @property
    def comebacks(self) -> tuple[int, int]:
        """On how many examples the first, and the second, wins although the other starts better."""
        tie = self.tie_tolerance
        known = [(pair.start_difference, pair.difference) for pair in self.pairs if pair.start_difference is not None]
        return (
            sum(start < -tie and whole > tie for start, whole in known),
            sum(start > tie and whole < -tie for start, whole in known),
        )

    def largest(self, count: int = 5) -> tuple[tuple[PairedExample, ...], tuple[PairedExample, ...]]:
        """The examples with the largest differences: those the first wins, and those the second wins."""
        ordered = sorted(self.pairs, key=lambda pair: (pair.difference, pair.example_id))
        return (
            tuple(pair for pair in reversed(ordered[-count:]) if pair.difference > self.tie_tolerance),
            tuple(pair for pair in ordered[:count] if pair.difference < -self.tie_tolerance),
        )

    def largest_tokens(self, count: int = 8) -> tuple[PairedToken, ...]:
        """The gold tokens with the largest differences, either way, where both list the same tokens; at most `KEPT_TOKENS`."""
        return self.differing_tokens[:count]

    def largest_kinds(self, count: int = 8) -> tuple[TokenKind, ...]:
        """The kinds of gold token, by their text, whose differences are largest in sum; likewise."""
        return self.differing_kinds[:count]

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame`, a row for each shared example; pairs of values end in `_a` and `_b`, as `names`.

        Raises:
            ConfigError: pandas is not installed.
        """
        return data_frame(
            [
                {
                    "example_id": pair.example_id,
                    "source": pair.a.source or pair.b.source,
                    "log_prob_a": pair.a.log_prob,
                    "log_prob_b": pair.b.log_prob,
                    "difference": pair.difference,
                    "start_difference": pair.start_difference,
                    "num_target_tokens_a": pair.a.num_target_tokens or None,
                    "num_target_tokens_b": pair.b.num_target_tokens or None,
                    "num_bytes": pair.a.num_bytes or pair.b.num_bytes or None,
                }
                for pair in self.pairs
            ]
        )

    def _repr_html_(self) -> str:
        """A small table, for a notebook."""
        interval, (name_a, name_b) = self.mean_difference, self.names
        mean = f"{interval.estimate:+.4f} nats per example"
        if interval.is_known:
            mean += f" ({interval.confidence:.0%} interval {interval.low:+.4f} to {interval.high:+.4f})"
        rows = [
            ["", f"{self.num_shared:,} examples"],
            *(["", line] for line in row_lines(self)),
            [f"log P, {name_a} - {name_b}", mean],
            ["higher likelihood", f"{name_a} on {self.wins:,}, {name_b} on {self.losses:,}, ties {self.ties:,}"],
            ["sign test", f"p = {self.sign_p:.2g}"],
        ]
        if self.num_starts_known:
            starts = self.starts
            rows.append(["better first token", f"{name_a} on {starts[0]:,}, {name_b} on {starts[1]:,}"])
        for label, values in (("nll per token", self.mean_nll), ("bits per byte", self.bits_per_byte)):
            if values is not None:
                rows.append([label, f"{name_a} {values[0]:.4f}, {name_b} {values[1]:.4f}"])
        return html_table(rows)

    def to_json(self) -> dict[str, object]:
        """Every figure, and the examples with the largest differences; pairs of values are in the order of `names`."""
        for_a, for_b = self.largest()
        return {
            "names": list(self.names),
            "notes": list(self.notes),
            "rejected": {name: dict(reasons) for name, reasons in self.rejected.items()},
            "num_shared": self.num_shared,
            "num_only": [self.num_only_a, self.num_only_b],
            "log_prob": list(self.log_probs),
            "num_target_tokens": None if self.num_target_tokens is None else list(self.num_target_tokens),
            "nll_per_token": None if self.mean_nll is None else list(self.mean_nll),
            "bits_per_byte": None if self.bits_per_byte is None else list(self.bits_per_byte),
            "mean_difference": self.mean_difference.to_json(),
            "higher": self.higher,
            "is_clear": self.is_clear,
            "wins": self.wins,
            "ties": self.ties,
            "losses": self.losses,
            "num_rows": self.num_rows,
            "sign_p": self.sign_p,
            "num_differently_tokenized": self.num_differently_tokenized,
            "num_other_contexts": self.num_other_contexts,
            "tie_tolerance": self.tie_tolerance,
            "num_starts_known": self.num_starts_known,
            "starts": list(self.starts),
            "comebacks": list(self.comebacks),
            "groups": [group.to_json() for group in self.groups],
            "largest_tokens": [token.to_json() for token in self.largest_tokens()],
            "largest_kinds": [kind.to_json() for kind in self.largest_kinds(25)],
            "largest": [[pair.to_json() for pair in for_a], [pair.to_json() for pair in for_b]],
        }

    def __str__(self) -> str:
        return render_comparison(self)


def compare_pair(
    a: TokenScores | Iterable[TokenScores],
    b: TokenScores | Iterable[TokenScores],
    *,
    names: tuple[str, str] = ("A", "B"),
    tie_tolerance: float = TIE_TOLERANCE,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Pair two models' scores of the same gold by `example_id`; see `ranking.compare`, which this is of two."""
    if names[0] == names[1]:
        raise ConfigError(f"both are called {names[0]!r}", remedy="give them two different names")
    found = pair_up(a, b, names=names, tie_tolerance=tie_tolerance)
    pairs = found.pairs
    # The order of the files must not move the interval, so pairs are resampled in the order of their names.
    order = sorted(range(len(pairs)), key=lambda place: (row_of(pairs[place].a), pairs[place].example_id))
    in_order = [pairs[place] for place in order]
    number_of_row: dict[tuple[str, str], int] = {}
    rows = np.array([number_of_row.setdefault(row_of(pair.a), len(number_of_row)) for pair in in_order])
    interval = paired_bootstrap(
        [pair.a.log_prob for pair in in_order],
        [pair.b.log_prob for pair in in_order],
        groups=rows,
        num_resamples=num_resamples,
        seed=seed,
    )
    row_differences = group_totals(rows, [pair.difference for pair in in_order])
    return Comparison(
        names=names,
        pairs=pairs,
        num_only_a=found.num_only_a,
        num_only_b=found.num_only_b,
        mean_difference=interval,
        tie_tolerance=tie_tolerance,
        num_resamples=num_resamples,
        seed=seed,
        num_rows=len(number_of_row),
        sign_p=sign_test(
            int(np.count_nonzero(row_differences > tie_tolerance)),
            int(np.count_nonzero(row_differences < -tie_tolerance)),
        ),
        groups=_groups(found, order, rows, tie_tolerance=tie_tolerance, num_resamples=num_resamples, seed=seed),
        tokens=found.only,
        differing_tokens=found.tokens,
        differing_kinds=found.kinds,
    )


def _groups(
    found: Pairing,
    order: Sequence[int],
    rows: npt.NDArray[np.int64],
    *,
    tie_tolerance: float,
    num_resamples: int,
    seed: int,
) -> tuple[PairedGroup, ...]:
    """The breakdowns that have more than one part, bootstrapped together over rows.

    Args:
        order: the pairs in the order of `rows`.
    """
    # (by, label) -> places of the pairs, ascending, and their differences there.
    parts: dict[tuple[str, str], tuple[array[int], array[float]]] = {}

    def add(by: str, label: str, place: int, difference: float) -> None:
        places, differences = parts.setdefault((by, label), (array("q"), array("d")))
        places.append(place)
        differences.append(difference)

    for place, number in enumerate(order):
        pair = found.pairs[number]
        if source := pair.a.source_name or pair.b.source_name:
            add("source", source, place, pair.difference)
        if found.roles is not None:
            for role, difference in found.roles[number].items():
                add("role", role, place, difference)
        if found.positions is not None:
            sums = found.positions[number]
            for (_, _, label), difference in zip(position_bins(4 ** (len(sums) - 1)), sums, strict=True):
                add("position", label, place, difference)
    # Sources and roles as they come, positions by their number.
    keys = [
        key
        for by in _BREAKDOWNS
        for key in sorted(
            (key for key in parts if key[0] == by),
            key=lambda key: int(key[1].partition("-")[0]) if key[0] == "position" else parts[key][0][0],
        )
    ]
    keys = [key for key in keys if sum(other[0] == key[0] for other in keys) > 1]
    if not keys:
        return ()
    num_rows = int(rows.max()) + 1
    everyone = np.bincount(rows, minlength=num_rows).astype(np.float64)
    tops, bottoms = [], []
    for key in keys:
        places, values = np.array(parts[key][0], dtype=np.int64), np.array(parts[key][1], dtype=np.float64)
        tops.append(np.bincount(rows[places], weights=values, minlength=num_rows))
        members = np.bincount(rows[places], minlength=num_rows).astype(np.float64)
        bottoms.append(members if key[0] == "source" else everyone)
    intervals = bootstrap_ratios(
        np.stack(tops, axis=1), np.stack(bottoms, axis=1), num_resamples=num_resamples, seed=seed
    )
    return tuple(
        PairedGroup(
            by=key[0],
            label=key[1],
            num_examples=len(parts[key][0]),
            difference=interval,
            wins=sum(value > tie_tolerance for value in parts[key][1]),
            losses=sum(value < -tie_tolerance for value in parts[key][1]),
        )
        for key, interval in zip(keys, intervals, strict=True)
    )


def scores_from_probabilities(
    examples: Mapping[str, Sequence[float | tuple[str, float]]],
) -> tuple[TokenScores, ...]:
    """Scores from the probabilities of gold tokens, for a case worked by hand.

    Args:
        examples: example id -> the probability of each gold token given all before it, or (text, probability) pairs.

    Returns:
        Scores with token id -1 (unknown); bytes are counted where every text is given.

    Raises:
        DataError: no example, no token, or a probability that is not in (0, 1].

    >>> scores_from_probabilities({"New York": [0.6, 0.8]})[0].num_target_tokens
    2
    """
    scores = []
    for example_id, gold in examples.items():
        tokens = []
        for item in gold:
            text, probability = item if isinstance(item, tuple) else ("", item)
            if not 0 < probability <= 1:
                raise DataError(
                    f"{example_id!r}: the probability {probability} is not in (0, 1]",
                    remedy="give probabilities here, not log-probabilities",
                )
            tokens.append(TokenScore(token_id=-1, text=text, log_prob=math.log(probability)))
        if not tokens:
            raise DataError(f"{example_id!r}: no gold token")
        scores.append(
            TokenScores(
                example_id=example_id,
                source="",
                log_prob=math.fsum(token.log_prob for token in tokens),
                num_target_tokens=len(tokens),
                num_bytes=sum(len(t.text.encode()) for t in tokens) if all(t.text for t in tokens) else 0,
                tokens=tuple(tokens),
            )
        )
    if not scores:
        raise DataError("no example was given")
    return tuple(scores)


def by_example_id(scores: TokenScores | Iterable[TokenScores], name: str) -> dict[str, TokenScores]:
    """Scores by their ids, in order, without their tokens; errors as in `compare`."""
    by_id: dict[str, TokenScores] = {}
    for score in numbers_of(scores, name):
        if score.example_id in by_id:
            raise DataError(f"{name}: example {score.example_id!r} is scored twice")
        by_id[score.example_id] = bare(score)
    if not by_id:
        raise DataError(f"{name}: no example was scored")
    return by_id
