"""A data set's gold under one model, summed up: figures with intervals, and the same broken down."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from goldsmith.data.truncation import Losses
from goldsmith.scoring.display import data_frame, html_table, text_table
from goldsmith.statistics import Interval

__all__ = ["BREAKDOWNS", "InstructionDifficulty", "ScoreGroup", "ScoreSummary", "lost_text", "skipped_lines"]

# What the figures are broken down by, in the order in which they are shown.
BREAKDOWNS = ("source", "role", "turn", "position", "length")


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
        losses: what rows longer than the limit cost, where the rows were read here: none of their lost gold is in any figure.
        rejected: rows that could not be used and were skipped, by reason, where the rows were read here.
        first_rejected: the first of each reason: where it lies, and what was seen there.
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
    losses: Losses | None = None
    rejected: Mapping[str, int] = field(default_factory=dict)
    first_rejected: Mapping[str, str] = field(default_factory=dict)
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
            "losses": None if self.losses is None else self.losses.of_report(),
            "rejected": dict(self.rejected),
            "first_rejected": dict(self.first_rejected),
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
        if self.losses is not None and self.losses.rows_too_long:
            figures.append(("rows too long", lost_text(self.losses)))
        for number, line in enumerate(skipped_lines(self.rejected, self.first_rejected)):
            figures.append(("" if number else "rows skipped", line))
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


def lost_text(losses: Losses) -> str:
    """What became of rows that were too long, and what that cost."""
    parts = {
        "dropped": losses.rows_dropped,
        "cut": losses.rows_cut,
        "split": losses.rows_split,
        "rejected": losses.rows_too_long - losses.rows_dropped - losses.rows_cut - losses.rows_split,
    }
    shown = ", ".join(f"{count:,} {what}" for what, count in parts.items() if count)
    return f"{shown}; {losses.tokens_lost:,} tokens lost, {losses.gold_tokens_lost:,} of them gold"


def _without_remedy(place: str) -> str:
    """Leaving rows out is what was chosen to do about them; in Python and in JSON the remedy stands.

    >>> _without_remedy("f.jsonl:3: 12 tokens, but max_length is 11; shorten the row")
    'f.jsonl:3: 12 tokens, but max_length is 11'
    >>> _without_remedy("f.jsonl:4: a JSON object was expected, but this is of type str: 'a; b'")
    "f.jsonl:4: a JSON object was expected, but this is of type str: 'a; b'"
    """
    seen, _, remedy = place.rpartition("; ")
    is_quoted = any(remedy.count(mark) or seen.count(mark) % 2 for mark in "'\"")
    return place if is_quoted or not seen else seen


def skipped_lines(rejected: Mapping[str, int], first: Mapping[str, str]) -> list[str]:
    """How many rows were skipped, by reason, and below that the first of each, without its remedy; nothing where none was.

    >>> skipped_lines({"too long": 2}, {"too long": "gold.jsonl:3: 12 tokens, but max_length is 11; shorten the row"})
    ['2 too long', 'too long: first gold.jsonl:3: 12 tokens, but max_length is 11']
    """
    if not rejected:
        return []
    counts = ", ".join(f"{count:,} {reason}" for reason, count in rejected.items())
    seen = {reason: _without_remedy(first[reason]) for reason in rejected if reason in first}
    return [counts, *(f"{reason}: first {place}" for reason, place in seen.items())]


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
