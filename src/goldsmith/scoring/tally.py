"""Scores summed up as they stream by: what is held does not grow with the examples."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from goldsmith.errors import DataError
from goldsmith.scoring.files import row_of
from goldsmith.scoring.summary import BREAKDOWNS, InstructionDifficulty, ScoreGroup, ScoreSummary
from goldsmith.statistics import ExactSum, Interval, RowResampling
from goldsmith.types import TokenScores

if TYPE_CHECKING:
    from goldsmith.scoring.score import GoldTokens

__all__ = ["Parts", "ScoreTally", "parts_from_json", "parts_of", "parts_to_json", "position_bins", "summarize"]

# Upper ends of the bins of a position in gold and of a length of gold, in tokens: powers of 4.
_BIN_ENDS = tuple(4**power for power in range(12))
# Turns from this one on are one group.
_LAST_TURN = 9

# (breakdown, label) -> log P, gold tokens, tokens of rank 1 (-1: unknown) of one example's part in it.
Parts = dict[tuple[str, str], tuple[float, int, int]]

# Of each example beside log P, gold tokens and tokens of rank 1.
_FIGURES = ("one", "num_bytes", "exact", "weighted", "weight_sum", "ratio", "above_one")
_TOTALS = ("weighted", "weight_sum", "without")


def _sums(num_places: int) -> array[float]:
    """Of one number of each example, within each place of the resampling."""
    return array("d", bytes(8 * num_places))


class _Part:
    """The examples that have gold in one part of a breakdown."""

    __slots__ = (
        "best",
        "count",
        "is_spread",
        "knows_best",
        "last_row",
        "log_prob",
        "num_examples",
        "num_tokens",
        "total",
    )

    def __init__(self, num_places: int) -> None:
        self.log_prob, self.count, self.best = (_sums(num_places) for _ in range(3))
        self.total = ExactSum()
        self.num_examples = self.num_tokens = 0
        self.last_row = -1
        self.is_spread, self.knows_best = False, True

    def add(self, place: int, row: int, log_prob: float, count: int, num_best: int) -> None:
        self.log_prob[place] += log_prob
        self.count[place] += count
        self.best[place] += num_best
        self.total.add(log_prob)
        self.num_examples += 1
        self.num_tokens += count
        self.knows_best &= num_best >= 0
        if count:
            self.is_spread |= self.last_row not in (-1, row)
            self.last_row = row


class ScoreTally:
    """Sums up scores as they stream by.

    What it holds does not grow with the examples, but for two bytes a row above 20,000 rows, and eight bytes an example
    where the gold was scored without its context too (its quantiles want every value).
    """

    def __init__(self, num_rows: int, *, seed: int = 0) -> None:
        """
        Args:
            num_rows: of which the examples are; the parts of a row are drawn together.
            seed: of the bootstrap.
        """
        self._resampling = RowResampling(num_rows, seed=seed)
        # The whole, and the sums of its other figures.
        self._all = self._new_part()
        self._columns = {name: _sums(self._resampling.num_places) for name in _FIGURES}
        self._totals = {name: ExactSum() for name in _TOTALS}
        self._num_bytes = 0
        self._ratios = array("d")
        self._knows = dict.fromkeys(("count", "num_bytes", "weights", "without"), True)
        self._parts: dict[tuple[str, str], _Part] = {}

    def add(self, scores: TokenScores, parts: Parts | None = None, *, row: int) -> None:
        """Count one example.

        Args:
            parts: from `parts_of`; by default what the score row itself tells.
            row: the number of its row, below `num_rows`.
        """
        if parts is None:
            parts = parts_of(scores)
        place = self._resampling.place(row)
        log_prob, count = scores.log_prob, scores.num_target_tokens
        num_best = parts["all", ""][2] if ("all", "") in parts else -1
        self._all.add(place, row, log_prob, count, num_best)
        columns, knows = self._columns, self._knows
        columns["one"][place] += 1.0
        columns["num_bytes"][place] += scores.num_bytes
        columns["exact"][place] += num_best == count
        self._num_bytes += scores.num_bytes
        knows["count"] &= count > 0
        knows["num_bytes"] &= scores.num_bytes > 0
        weighted, weight_sum, without = scores.weighted_log_prob, scores.weight_sum, scores.log_prob_without_context
        if weighted is None or weight_sum is None:
            knows["weights"] = False
        else:
            columns["weighted"][place] += weighted
            columns["weight_sum"][place] += weight_sum
            self._totals["weighted"].add(weighted)
            self._totals["weight_sum"].add(weight_sum)
        if without is None:
            knows["without"] = False
            self._ratios = array("d")
        elif knows["without"] and count:
            ratio = float(np.exp(np.minimum((without - log_prob) / count, 700.0)))
            columns["ratio"][place] += ratio
            columns["above_one"][place] += ratio > 1
            self._totals["without"].add(without)
            self._ratios.append(ratio)
        for key, (part_log_prob, part_count, part_best) in parts.items():
            if key[0] == "all":
                continue
            if key not in self._parts:
                self._parts[key] = self._new_part()
            self._parts[key].add(place, row, part_log_prob, part_count, part_best)

    def summary(self, *, num_resamples: int = 2000) -> ScoreSummary:
        """The figures so far.

        Args:
            num_resamples: of the bootstrap.

        Raises:
            DataError: nothing was scored, or the number of gold tokens is not known for some example.
        """
        whole, knows = self._all, self._knows
        if not whole.num_examples:
            raise DataError("nothing was scored: there is no mean of no examples")
        if not knows["count"]:
            raise DataError("some examples do not say how many gold tokens they have, so nll per token is not defined")
        column = {name: np.frombuffer(sums) for name, sums in self._columns.items()}
        nll, counts, ones, spread = (
            -np.frombuffer(whole.log_prob),
            np.frombuffer(whole.count),
            column["one"],
            whole.is_spread,
        )
        figures = _Figures(self._resampling)
        figures.add("nll_per_token", nll, counts, spread)
        figures.add("nll_per_example", nll, ones, spread)
        if knows["num_bytes"]:
            figures.add("bits_per_byte", nll, column["num_bytes"], spread)
        if whole.knows_best:
            figures.add("token_accuracy", np.frombuffer(whole.best), counts, spread)
            figures.add("exact", column["exact"], ones, spread)
        if knows["weights"]:
            figures.add("weighted_nll", -column["weighted"], column["weight_sum"], spread)
        if knows["without"]:
            figures.add("difficulty", column["ratio"], ones, spread)
            figures.add("above_one", column["above_one"], ones, spread)
        shown = self._shown_parts()
        for key, part in shown:
            figures.add((*key, "nll"), -np.frombuffer(part.log_prob), np.frombuffer(part.count), part.is_spread)
            if part.knows_best:
                figures.add((*key, "accuracy"), np.frombuffer(part.best), np.frombuffer(part.count), part.is_spread)
        found = figures.intervals(num_resamples=num_resamples)
        groups = [_group(key, part, found[(*key, "nll")], found.get((*key, "accuracy"))) for key, part in shown]
        difficulty = None
        if knows["without"]:
            q5, q25, q50, q75, q95 = np.quantile(np.frombuffer(self._ratios), [0.05, 0.25, 0.5, 0.75, 0.95]).tolist()
            difficulty = InstructionDifficulty(
                mean=found["difficulty"],
                quantiles=(q5, q25, q50, q75, q95),
                share_above_one=found["above_one"],
                log_prob_without_context=self._totals["without"].value,
            )
        return ScoreSummary(
            num_examples=whole.num_examples,
            num_target_tokens=whole.num_tokens,
            num_bytes=self._num_bytes,
            log_prob=whole.total.value,
            nll_per_token=found["nll_per_token"],
            nll_per_example=found["nll_per_example"],
            bits_per_byte=found["bits_per_byte"].scaled(1 / math.log(2)) if "bits_per_byte" in found else None,
            token_accuracy=found.get("token_accuracy"),
            exact=found.get("exact"),
            weighted_log_prob=self._totals["weighted"].value if knows["weights"] else None,
            weight_sum=self._totals["weight_sum"].value if knows["weights"] else None,
            weighted_nll=found.get("weighted_nll"),
            difficulty=difficulty,
            groups=tuple(groups),
        )

    def _new_part(self) -> _Part:
        return _Part(self._resampling.num_places)

    def _shown_parts(self) -> list[tuple[tuple[str, str], _Part]]:
        """Breakdowns of more than one part, and the roles, in order."""
        parts = sorted(self._parts.items(), key=lambda item: (BREAKDOWNS.index(item[0][0]), _label_order(item[0][1])))
        numbers: dict[str, int] = {}
        for by, _ in self._parts:
            numbers[by] = numbers.get(by, 0) + 1
        return [(key, part) for key, part in parts if numbers[key[0]] > 1 or key[0] == "role"]


class _Figures:
    """Ratios of sums over the same rows, bootstrapped together."""

    def __init__(self, resampling: RowResampling) -> None:
        self._resampling = resampling
        self._names: list[object] = []
        self._tops: list[npt.NDArray[np.float64]] = []
        self._bottoms: list[npt.NDArray[np.float64]] = []
        self._are_spread: list[bool] = []

    def add(
        self, name: object, tops: npt.NDArray[np.float64], bottoms: npt.NDArray[np.float64], is_spread: bool
    ) -> None:
        """One figure: the sums of its numerators and of its denominators, and whether several rows have a part in it."""
        self._names.append(name)
        self._tops.append(tops)
        self._bottoms.append(bottoms)
        self._are_spread.append(is_spread)

    def intervals(self, *, num_resamples: int) -> dict[object, Interval]:
        tops, bottoms = np.stack(self._tops, axis=1), np.stack(self._bottoms, axis=1)
        intervals = self._resampling.intervals(
            tops,
            bottoms,
            estimates=tops.sum(axis=0) / bottoms.sum(axis=0),
            is_spread=np.array(self._are_spread),
            num_resamples=num_resamples,
        )
        return dict(zip(self._names, intervals, strict=True))


def _group(key: tuple[str, str], part: _Part, nll: Interval, accuracy: Interval | None) -> ScoreGroup:
    return ScoreGroup(
        by=key[0],
        label=key[1],
        num_examples=part.num_examples,
        num_target_tokens=part.num_tokens,
        log_prob=part.total.value,
        nll_per_token=nll,
        token_accuracy=accuracy,
    )


def parts_of(scores: TokenScores, gold: GoldTokens | None = None) -> Parts:
    """One example's share of each group of each breakdown, and of the whole as ("all", "").

    Args:
        scores: tells source, length, and tokens where it lists them.
        gold: its gold tokens; by default the tokens of `scores`, if any, with the turns that these tell, else as one turn.
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
    elif scores.tokens is None:
        # Of several turns the sums are not known.
        if len(scores.turns) == 1:
            [turn] = scores.turns
            for key in (("role", turn.role), ("turn", _turn_label(turn.number))):
                parts[key] = (scores.log_prob, scores.num_target_tokens, -1)
    else:
        log_probs = np.array([token.log_prob for token in scores.tokens])
        ranks = [token.rank for token in scores.tokens]
        is_best = None if None in ranks else np.array(ranks) == 1
        turns = np.ones(len(log_probs), dtype=np.int64)
        if scores.turns:
            begins = [turn.begin for turn in scores.turns]
            owners = np.searchsorted(begins, np.arange(len(log_probs)), side="right") - 1
            turns = np.array([turn.number for turn in scores.turns])[owners]
            roles = [turn.role for turn in scores.turns]
            for role in dict.fromkeys(roles):
                _add(parts, ("role", role), np.array([one == role for one in roles])[owners], log_probs, is_best)
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
    held = list(scores)
    numbers: dict[tuple[str, str], int] = {}
    rows = [numbers.setdefault(row_of(score), len(numbers)) for score in held]
    tally = ScoreTally(len(numbers), seed=seed)
    for score, row in zip(held, rows, strict=True):
        tally.add(score, row=row)
    return tally.summary(num_resamples=num_resamples)


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
