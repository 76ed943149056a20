"""A data set's gold under one model, summed up: figures with intervals, and the same broken down."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from goldsmith.errors import DataError
from goldsmith.scoring.display import data_frame, html_table, text_table
from goldsmith.scoring.files import row_of
from goldsmith.statistics import Interval, bootstrap_ratios
from goldsmith.types import TokenScores

if TYPE_CHECKING:
    from goldsmith.scoring.score import GoldTokens

__all__ = [
    "BREAKDOWNS",
    "InstructionDifficulty",
    "Parts",
    "ScoreGroup",
    "ScoreSummary",
    "ScoreTally",
    "parts_from_json",
    "parts_of",
    "parts_to_json",
    "position_bins",
    "summarize",
]

# What the figures are broken down by, in the order in which they are shown.
BREAKDOWNS = ("source", "role", "turn", "position", "length")

# Upper ends of the bins of a position in gold and of a length of gold, in tokens: powers of 4.
_BIN_ENDS = tuple(4**power for power in range(12))
# Turns from this one on are one group.
_LAST_TURN = 9

# (breakdown, label) -> log P, gold tokens, tokens of rank 1 (-1: unknown) of one example's part in it.
Parts = dict[tuple[str, str], tuple[float, int, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreGroup:
    """The gold of one source, role, turn, position or length.

    Attributes:
        by: which breakdown, one of `BREAKDOWNS`.
        label: which part of it, such as `2-4`.
        num_examples: examples that have gold in it.
        log_prob: nats, of all its gold tokens together.
        nll_per_token, token_accuracy: as in `ScoreSummary`, over these tokens.
    """

    by: str
    label: str
    num_examples: int
    num_target_tokens: int
    log_prob: float
    nll_per_token: Interval
    token_accuracy: Interval | None

    def to_json(self) -> dict[str, object]:
        """Figures only; unknown ones are null."""
        return {
            "by": self.by,
            "label": self.label,
            "num_examples": self.num_examples,
            "num_target_tokens": self.num_target_tokens,
            "log_prob": self.log_prob,
            "nll_per_token": self.nll_per_token.to_json(),
            "token_accuracy": None if self.token_accuracy is None else self.token_accuracy.to_json(),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class InstructionDifficulty:
    """How much the context helps with the gold, as the ratio of two perplexities per token, an example each.

    `exp(nll given the context - nll without it)`: near 0 where the context tells the gold, 1 where it says nothing, above 1
    where it misleads. Introduced as instruction-following difficulty (IFD), there a ratio of the nlls themselves, by Li et
    al. 2023, "From Quantity to Quality"; in this form by Li et al. 2024, "Superfiltering".

    Attributes:
        mean: over examples, with an interval.
        quantiles: 5%, 25%, 50%, 75% and 95% of the examples lie below these.
        share_above_one: of the examples, with an interval.
        log_prob_without_context: nats, of all gold together.
    """

    mean: Interval
    quantiles: tuple[float, float, float, float, float]
    share_above_one: Interval
    log_prob_without_context: float

    def to_json(self) -> dict[str, object]:
        """Figures only."""
        return {
            "mean": self.mean.to_json(),
            "quantiles": dict(zip(("5%", "25%", "50%", "75%", "95%"), self.quantiles, strict=True)),
            "share_above_one": self.share_above_one.to_json(),
            "log_prob_without_context": self.log_prob_without_context,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSummary:
    """A data set's gold under one model. Intervals are bootstrapped over rows (the parts of a row together).

    Attributes:
        log_prob: nats, of all gold together; the tokens are not weighted.
        nll_per_token: nats; -log_prob / num_target_tokens.
        nll_per_example: nats; -log_prob / num_examples.
        bits_per_byte: -log_prob / ln 2 / num_bytes, the figure that compares across tokenizers; None where the bytes are not
            known.
        token_accuracy: the share of gold tokens that no token is likelier than (rank 1); None where ranks are not known.
        exact: the share of examples all of whose gold tokens are of rank 1. Given the gold so far each next token is then the
            greedy choice, so greedy decoding writes the gold, to the end token (but for ties). None likewise.
        weighted_log_prob, weight_sum: as the objective weighs tokens and examples; None where unknown.
        weighted_nll: -weighted_log_prob / weight_sum, a training run's evaluation nll on the same data.
        difficulty: where the gold was scored without its context too.
        groups: the figures broken down; a breakdown of which there is one part only is left out, but for `role`.
        output: the score file, where one was written.
    """

    num_examples: int
    num_target_tokens: int
    num_bytes: int
    log_prob: float
    nll_per_token: Interval
    nll_per_example: Interval
    bits_per_byte: Interval | None
    token_accuracy: Interval | None = None
    exact: Interval | None = None
    weighted_log_prob: float | None = None
    weight_sum: float | None = None
    weighted_nll: Interval | None = None
    difficulty: InstructionDifficulty | None = None
    groups: tuple[ScoreGroup, ...] = ()
    output: str | None = None

    @property
    def perplexity(self) -> float:
        """exp(nll_per_token); infinite where no float holds it."""
        return _exp(self.nll_per_token.estimate)

    @property
    def perplexity_interval(self) -> Interval:
        """exp of `nll_per_token` and its bounds."""
        nll = self.nll_per_token
        return replace(nll, estimate=_exp(nll.estimate), low=_exp(nll.low), high=_exp(nll.high))

    @property
    def is_weighted(self) -> bool:
        """Whether some token or example weighs other than 1, so that the weighted sum says something of its own."""
        return self.weight_sum is not None and self.weight_sum != self.num_target_tokens

    def to_json(self) -> dict[str, object]:
        """Figures only; unknown ones are null, and so is an infinite perplexity."""

        def shown(interval: Interval | None) -> dict[str, float | None] | None:
            if interval is None:
                return None
            values = interval.to_json()
            return {key: value if value is not None and math.isfinite(value) else None for key, value in values.items()}

        return {
            "num_examples": self.num_examples,
            "num_target_tokens": self.num_target_tokens,
            "num_bytes": self.num_bytes,
            "log_prob": self.log_prob,
            "nll_per_token": shown(self.nll_per_token),
            "nll_per_example": shown(self.nll_per_example),
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "perplexity_interval": shown(self.perplexity_interval),
            "bits_per_byte": shown(self.bits_per_byte),
            "token_accuracy": shown(self.token_accuracy),
            "exact": shown(self.exact),
            "weighted_log_prob": self.weighted_log_prob,
            "weight_sum": self.weight_sum,
            "weighted_nll": shown(self.weighted_nll),
            "difficulty": None if self.difficulty is None else self.difficulty.to_json(),
            "groups": [group.to_json() for group in self.groups],
            "output": self.output,
        }

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame`: the whole in its first row, a row for each group below it.

        Raises:
            ConfigError: pandas is not installed.
        """
        whole = ScoreGroup(
            by="all",
            label="",
            num_examples=self.num_examples,
            num_target_tokens=self.num_target_tokens,
            log_prob=self.log_prob,
            nll_per_token=self.nll_per_token,
            token_accuracy=self.token_accuracy,
        )
        rows: list[dict[str, object]] = []
        for group in (whole, *self.groups):
            row: dict[str, object] = {
                "by": group.by,
                "label": group.label,
                "num_examples": group.num_examples,
                "num_target_tokens": group.num_target_tokens,
                "log_prob": group.log_prob,
            }
            for name, interval in (("nll_per_token", group.nll_per_token), ("token_accuracy", group.token_accuracy)):
                values = {} if interval is None else interval.to_json()
                row |= {
                    name: values.get("estimate"),
                    f"{name}_low": values.get("low"),
                    f"{name}_high": values.get("high"),
                }
            rows.append(row)
        return data_frame(rows)

    def _figures(self) -> list[tuple[str, str]]:
        figures = [
            ("log P, total", f"{self.log_prob:,.4f} nats"),
            ("nll per token", f"{_figure(self.nll_per_token)} nats"),
            ("nll per example", f"{_figure(self.nll_per_example)} nats"),
            ("perplexity", f"{_figure(self.perplexity_interval, digits='.4g')} per token"),
        ]
        if self.bits_per_byte is not None:
            figures.append(("bits per byte", _figure(self.bits_per_byte)))
        if self.token_accuracy is not None and self.exact is not None:
            figures.append(("token accuracy", f"{_percent(self.token_accuracy)} of gold tokens are the likeliest"))
            figures.append(("decoded exactly", f"{_percent(self.exact)} of examples, by greedy choice"))
        if self.is_weighted and self.weighted_nll is not None and self.weighted_log_prob is not None:
            figures.append(
                ("log P, weighted", f"{self.weighted_log_prob:,.4f} nats, sum of weights {self.weight_sum:,.4f}")
            )
            figures.append(("nll, weighted", f"{_figure(self.weighted_nll)} nats, as a training run evaluates it"))
        if self.difficulty is not None:
            bounds = ", ".join(f"{value:.3f}" for value in self.difficulty.quantiles)
            without = -self.difficulty.log_prob_without_context / self.num_target_tokens
            figures.append(("without context", f"{without:,.4f} nats per token"))
            figures.append(("difficulty (IFD)", f"{_figure(self.difficulty.mean)} mean of examples"))
            figures.append(("", f"5, 25, 50, 75, 95% of examples lie below {bounds}"))
            figures.append(("", f"{_percent(self.difficulty.share_above_one)} of examples lie above 1"))
        return figures

    def _group_rows(self) -> list[tuple[str, list[list[str]]]]:
        tables = []
        for by in BREAKDOWNS:
            rows = [[f"by {_TITLES[by]}", "examples", "gold tokens", "nll per token", "", "accuracy"]]
            for group in self.groups:
                if group.by == by:
                    nll = group.nll_per_token
                    rows.append(
                        [
                            group.label,
                            f"{group.num_examples:,}",
                            f"{group.num_target_tokens:,}",
                            f"{nll.estimate:,.4f}",
                            f"({nll.low:,.4f} to {nll.high:,.4f})" if nll.is_known else "",
                            "" if group.token_accuracy is None else f"{group.token_accuracy.estimate:.1%}",
                        ]
                    )
            if len(rows) > (2 if by == "role" else 1):  # one role only says what the figures above say
                tables.append((by, rows))
        return tables

    def __str__(self) -> str:
        examples = "example" if self.num_examples == 1 else "examples"
        tokens = "token" if self.num_target_tokens == 1 else "tokens"
        figures = self._figures()
        width = max(len(label) for label, _ in figures)
        lines = [f"{self.num_examples:,} {examples}, {self.num_target_tokens:,} gold {tokens}"]
        lines += [f"{label:<{width}}  {value}" for label, value in figures]
        blocks = ["\n".join(lines), *(text_table(rows) for _, rows in self._group_rows())]
        if self.output is not None:
            blocks.append(f"scores: {self.output}")
        return "\n\n".join(blocks)

    def _repr_html_(self) -> str:
        """A small table, for a notebook."""
        figures = [["", f"{self.num_examples:,} examples, {self.num_target_tokens:,} gold tokens"]]
        figures += [[label, value] for label, value in self._figures()]
        return html_table(figures) + "".join(html_table(rows) for _, rows in self._group_rows())


_TITLES = {
    "source": "source",
    "role": "role of gold",
    "turn": "turn of gold",
    "position": "position in gold",
    "length": "length of gold",
}


class ScoreTally:
    """Sums up scores as they stream by; keeps some ten numbers an example, and five for each part of a breakdown."""

    def __init__(self) -> None:
        self._log_probs = array("d")
        self._num_target_tokens = array("q")
        self._num_bytes = array("q")
        self._weighted_log_probs = array("d")
        self._weight_sums = array("d")
        self._without_context = array("d")
        self._rows = array("q")
        self._row_numbers: dict[tuple[str, str], int] = {}
        self._num_best = array("q")
        # (breakdown, label) -> examples, and the columns of `Parts`.
        self._parts: dict[tuple[str, str], tuple[array[int], array[float], array[int], array[int]]] = {}

    def add(self, scores: TokenScores, parts: Parts | None = None) -> None:
        """Count one example.

        Args:
            parts: from `parts_of`; by default what the score row itself tells.
        """
        if parts is None:
            parts = parts_of(scores)
        place = len(self._log_probs)
        self._log_probs.append(scores.log_prob)
        self._num_target_tokens.append(scores.num_target_tokens)
        self._num_bytes.append(scores.num_bytes)
        self._weighted_log_probs.append(_or_nan(scores.weighted_log_prob))
        self._weight_sums.append(_or_nan(scores.weight_sum))
        self._without_context.append(_or_nan(scores.log_prob_without_context))
        self._rows.append(self._row_numbers.setdefault(row_of(scores), len(self._row_numbers)))
        self._num_best.append(parts["all", ""][2] if ("all", "") in parts else -1)
        for key, (log_prob, count, num_best) in parts.items():
            if key[0] == "all":
                continue
            if key not in self._parts:
                self._parts[key] = (array("q"), array("d"), array("q"), array("q"))
            places, log_probs, counts, bests = self._parts[key]
            places.append(place)
            log_probs.append(log_prob)
            counts.append(count)
            bests.append(num_best)

    def summary(self, *, num_resamples: int = 2000, seed: int = 0) -> ScoreSummary:
        """The figures so far.

        Args:
            num_resamples, seed: of the bootstrap.

        Raises:
            DataError: nothing was scored, or the number of gold tokens is not known for some example.
        """
        if not self._log_probs:
            raise DataError("nothing was scored: there is no mean of no examples")
        counts = np.array(self._num_target_tokens, dtype=np.float64)
        if not counts.all():
            raise DataError("some examples do not say how many gold tokens they have, so nll per token is not defined")
        figures = _Figures(np.array(self._rows), len(self._row_numbers))
        log_probs = np.array(self._log_probs)
        num_bytes = np.array(self._num_bytes, dtype=np.float64)
        num_best = np.array(self._num_best, dtype=np.float64)
        ones = np.ones_like(counts)
        figures.add("nll_per_token", -log_probs, counts)
        figures.add("nll_per_example", -log_probs, ones)
        if num_bytes.all():
            figures.add("bits_per_byte", -log_probs, num_bytes)
        if (num_best >= 0).all():
            figures.add("token_accuracy", num_best, counts)
            figures.add("exact", (num_best == counts).astype(np.float64), ones)
        weighted, weights = np.array(self._weighted_log_probs), np.array(self._weight_sums)
        is_weighted = bool(np.isfinite(weighted).all() and np.isfinite(weights).all())
        if is_weighted:
            figures.add("weighted_nll", -weighted, weights)
        without = np.array(self._without_context)
        has_without = bool(np.isfinite(without).all())
        ratios = np.exp(np.minimum((without - log_probs) / counts, 700.0))
        if has_without:
            figures.add("difficulty", ratios, ones)
            figures.add("above_one", (ratios > 1).astype(np.float64), ones)
        shown = self._shown_parts()
        for key, (places, part_log_probs, part_counts, part_best) in shown:
            at = np.array(places)
            figures.add((*key, "nll"), -np.array(part_log_probs), np.array(part_counts, dtype=np.float64), at=at)
            if min(part_best) >= 0:
                figures.add(
                    (*key, "accuracy"),
                    np.array(part_best, dtype=np.float64),
                    np.array(part_counts, dtype=np.float64),
                    at=at,
                )
        found = figures.intervals(num_resamples=num_resamples, seed=seed)
        groups = [
            ScoreGroup(
                by=key[0],
                label=key[1],
                num_examples=len(places),
                num_target_tokens=sum(part_counts),
                log_prob=math.fsum(part_log_probs),
                nll_per_token=found[(*key, "nll")],
                token_accuracy=found.get((*key, "accuracy")),
            )
            for key, (places, part_log_probs, part_counts, _) in shown
        ]
        difficulty = None
        if has_without:
            q5, q25, q50, q75, q95 = np.quantile(ratios, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist()
            difficulty = InstructionDifficulty(
                mean=found["difficulty"],
                quantiles=(q5, q25, q50, q75, q95),
                share_above_one=found["above_one"],
                log_prob_without_context=math.fsum(self._without_context),
            )
        return ScoreSummary(
            num_examples=len(log_probs),
            num_target_tokens=int(counts.sum()),
            num_bytes=sum(self._num_bytes),
            log_prob=math.fsum(self._log_probs),
            nll_per_token=found["nll_per_token"],
            nll_per_example=found["nll_per_example"],
            bits_per_byte=found["bits_per_byte"].scaled(1 / math.log(2)) if "bits_per_byte" in found else None,
            token_accuracy=found.get("token_accuracy"),
            exact=found.get("exact"),
            weighted_log_prob=math.fsum(self._weighted_log_probs) if is_weighted else None,
            weight_sum=math.fsum(self._weight_sums) if is_weighted else None,
            weighted_nll=found.get("weighted_nll"),
            difficulty=difficulty,
            groups=tuple(groups),
        )

    def _shown_parts(
        self,
    ) -> list[tuple[tuple[str, str], tuple[array[int], array[float], array[int], array[int]]]]:
        """Breakdowns of more than one part, and the roles, in order."""
        parts = sorted(self._parts.items(), key=lambda item: (BREAKDOWNS.index(item[0][0]), _label_order(item[0][1])))
        numbers: dict[str, int] = {}
        for by, _ in self._parts:
            numbers[by] = numbers.get(by, 0) + 1
        return [(key, columns) for key, columns in parts if numbers[key[0]] > 1 or key[0] == "role"]


class _Figures:
    """Ratios of sums over the same rows, bootstrapped together. Legend: E examples, R rows."""

    def __init__(self, rows_E: npt.NDArray[np.int64], num_rows: int) -> None:
        self._rows_E, self._num_rows = rows_E, num_rows
        self._names: list[object] = []
        self._tops: list[npt.NDArray[np.float64]] = []
        self._bottoms: list[npt.NDArray[np.float64]] = []

    def add(
        self,
        name: object,
        tops: npt.NDArray[np.float64],
        bottoms: npt.NDArray[np.float64],
        *,
        at: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """One figure: numerators and denominators of all examples, or of the examples `at`."""
        rows = self._rows_E if at is None else self._rows_E[at]
        self._names.append(name)
        for columns, values in ((self._tops, tops), (self._bottoms, bottoms)):
            columns.append(np.bincount(rows, weights=values, minlength=self._num_rows).astype(np.float64))

    def intervals(self, *, num_resamples: int, seed: int) -> dict[object, Interval]:
        intervals = bootstrap_ratios(
            np.stack(self._tops, axis=1), np.stack(self._bottoms, axis=1), num_resamples=num_resamples, seed=seed
        )
        return dict(zip(self._names, intervals, strict=True))


def parts_of(scores: TokenScores, gold: GoldTokens | None = None) -> Parts:
    """One example's share of each group of each breakdown, and of the whole as ("all", "").

    Args:
        scores: tells source, length, and tokens where it lists them.
        gold: its gold tokens; by default the tokens of `scores`, if any, as one turn.
    """
    num_best = -1
    parts: Parts = {}
    log_probs: npt.NDArray[np.float64] | None = None
    is_best: npt.NDArray[np.bool_] | None = None
    turns: npt.NDArray[np.int64] | None = None
    if gold is not None:
        log_probs, is_best, turns = gold.log_probs, gold.is_best, gold.turns
        for role, is_own in gold.roles.items():
            if is_own.all():
                parts["role", role] = (scores.log_prob, scores.num_target_tokens, int(np.count_nonzero(is_best)))
            else:
                _add(parts, ("role", role), is_own, log_probs, is_best)
    elif scores.tokens is not None:
        log_probs = np.array([token.log_prob for token in scores.tokens])
        ranks = [token.rank for token in scores.tokens]
        is_best = None if None in ranks else np.array(ranks) == 1
        turns = np.ones(len(log_probs), dtype=np.int64)
    if is_best is not None:
        num_best = int(np.count_nonzero(is_best))
    whole = (scores.log_prob, scores.num_target_tokens, num_best)
    if num_best >= 0:
        parts["all", ""] = whole
    if scores.source_name:
        parts["source", scores.source_name] = whole
    if log_probs is not None and turns is not None:
        for turn in np.unique(turns).tolist():
            _add(parts, ("turn", _turn_label(turn)), turns == turn, log_probs, is_best)
        positions = np.arange(1, len(log_probs) + 1)
        for low, high, label in position_bins(len(log_probs)):
            _add(parts, ("position", label), (positions >= low) & (positions <= high), log_probs, is_best)
    if scores.num_target_tokens:
        parts["length", position_bins(scores.num_target_tokens)[-1][2] + " tokens"] = whole
    return parts


def summarize(scores: Iterable[TokenScores], *, num_resamples: int = 2000, seed: int = 0) -> ScoreSummary:
    """The figures of a finished list of scores; errors as in `ScoreTally.summary`."""
    tally = ScoreTally()
    for score in scores:
        tally.add(score)
    return tally.summary(num_resamples=num_resamples, seed=seed)


def parts_to_json(parts: Parts) -> list[list[object]]:
    """As JSON can hold them."""
    return [[*key, *values] for key, values in parts.items()]


def parts_from_json(rows: Sequence[Sequence[Any]]) -> Parts:
    """The inverse of `parts_to_json`."""
    return {(by, label): (log_prob, count, num_best) for by, label, log_prob, count, num_best in rows}


def _add(
    parts: Parts,
    key: tuple[str, str],
    chosen: npt.NDArray[np.bool_],
    log_probs: npt.NDArray[np.float64],
    is_best: npt.NDArray[np.bool_] | None,
) -> None:
    """Add the chosen tokens to a part."""
    log_prob, count, num_best = parts.get(key, (0.0, 0, 0))
    best = -1 if is_best is None else num_best + int(np.count_nonzero(is_best & chosen))
    parts[key] = (log_prob + float(log_probs[chosen].sum()), count + int(np.count_nonzero(chosen)), best)


def position_bins(last: int) -> list[tuple[int, int, str]]:
    """Bins of 1..last, their ends powers of 4: (from, to, label); the last bin is the one that `last` lies in.

    >>> [label for _, _, label in position_bins(20)]
    ['1', '2-4', '5-16', '17-64']
    """
    bins, low = [], 1
    for high in _BIN_ENDS:
        bins.append((low, high, str(low) if low == high else f"{low}-{high}"))
        if high >= last:
            break
        low = high + 1
    return bins


def _turn_label(turn: int) -> str:
    return str(turn) if turn < _LAST_TURN else f"{_LAST_TURN} and later"


def _label_order(label: str) -> tuple[int, str]:
    """Bins and turns by their number, names by the alphabet."""
    digits = label.partition("-")[0].partition(" ")[0]
    return (int(digits) if digits.isdecimal() else 0, label)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _exp(value: float) -> float:
    return math.nan if math.isnan(value) else math.exp(value) if value < 709 else math.inf


def _figure(interval: Interval, digits: str = ".4f") -> str:
    text = f"{interval.estimate:,{digits}}"
    if interval.is_known:
        text += f"  ({interval.confidence:.0%} interval {interval.low:,{digits}} to {interval.high:,{digits}})"
    return text


def _percent(interval: Interval) -> str:
    text = f"{interval.estimate:.2%}"
    if interval.is_known:
        text += f"  ({interval.confidence:.0%} interval {interval.low:.2%} to {interval.high:.2%})"
    return text
